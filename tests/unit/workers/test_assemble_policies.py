"""Names of policies, caches and reuses become the classes they stand for; bad settings are refused by name."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from workers.assemble_policies import ann_settings, make_policy, make_reuse
from workers.attention.gate import GatedAttention
from workers.config import (
    AnnSelfAttentionConfig,
    FlowCacheConfig,
    RadialAttentionConfig,
    RenderConfig,
    Svg2AttentionConfig,
    SvgAttentionConfig,
)
from workers.config_reuse import FlowReuseConfig, NoReuseConfig, ReuseConfig, TeaCacheConfig
from workers.contracts import Moment, PlansAfterRope
from workers.reuse.flowcache import FlowReuse
from workers.reuse.teacache import TeaCache

PATTERNS = [RadialAttentionConfig, SvgAttentionConfig, Svg2AttentionConfig]


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_pattern_is_gated_as_configured(
    kind: type[RadialAttentionConfig] | type[SvgAttentionConfig] | type[Svg2AttentionConfig],
) -> None:
    gate = make_policy(kind(dense_step_share=0.5, dense_layers=2), frame_tokens=64, num_layers=4)
    assert isinstance(gate, GatedAttention)
    assert [gate.is_dense(layer, Moment(0, 3, 4)) for layer in range(4)] == [True, True, False, False]
    assert [gate.is_dense(3, Moment(0, step, 4)) for step in range(4)] == [True, True, False, False]
    assert isinstance(gate, PlansAfterRope) == kind.__name__.startswith("Svg")


@pytest.mark.parametrize("kind", ["dense", "streaming", "radial", "svg", "svg2"])
def test_every_baseline_can_be_asked_for_by_name(kind: str) -> None:
    config = RenderConfig.model_validate({"attention": {"kind": kind}})
    assert config.attention.kind == kind
    make_policy(config.attention, frame_tokens=64, num_layers=4)


def test_reuses_are_made_anew_for_each_take() -> None:
    assert make_reuse(NoReuseConfig()) is None
    assert type(make_reuse(TeaCacheConfig())) is TeaCache
    assert type(make_reuse(FlowReuseConfig())) is FlowReuse
    assert make_reuse(TeaCacheConfig()) is not make_reuse(TeaCacheConfig())


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("attention", {"kind": "radial", "decay": 0.0}, "greater than 0"),
        ("attention", {"kind": "radial", "tile": 0}, "greater than or equal to 1"),
        ("attention", {"kind": "svg", "density": 1.5}, "less than or equal to 1"),
        ("attention", {"kind": "svg2", "top_p": 0.0}, "greater than 0"),
        ("attention", {"kind": "svg3"}, "'streaming', 'radial', 'svg', 'svg2'"),
        ("reuse", {"kind": "teacache", "coefficients": ()}, "at least 1 item"),
        ("reuse", {"kind": "flowcache", "warmup_steps": 0}, "greater than or equal to 1"),
        ("cache", {"kind": "flow", "budget_latent_frames": 11}, "cache.budget_latent_frames: 11 is below 12"),
        ("cache", {"kind": "flow", "importance": -0.1}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused_with_field_value_and_range(part: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RenderConfig.model_validate({part: values})
    assert message in str(caught.value)


def test_a_flow_budget_leaves_room_for_history() -> None:
    assert FlowCacheConfig(sink_latent_frames=2, recent_latent_frames=3, budget_latent_frames=8).importance == 0.07
    kinds = TypeAdapter(ReuseConfig).json_schema()["discriminator"]["mapping"]
    assert set(kinds) == {"none", "teacache", "flowcache"}


@pytest.mark.parametrize(
    ("frame_tokens", "given", "at_once", "clean_share"),
    [
        (64, {}, True, 1 / 3),
        (64, {"clean_pass_share": 1.0}, True, 1.0),
        (1560, {}, True, 1.0),
        (1560, {"history_at": None}, False, 1.0),
        (64, None, False, 1.0),
    ],
)
def test_small_pictures_choose_once_and_show_a_clean_pass_a_third(
    frame_tokens: int, given: dict[str, Any] | None, at_once: bool, clean_share: float
) -> None:
    record = {"policy": "annsa"} if given is None else {"policy": "fastar-quant", "attention": given}
    config = RenderConfig.model_validate(record).attention
    assert isinstance(config, AnnSelfAttentionConfig)
    settings = ann_settings(config, frame_tokens)
    assert (settings.at_once, settings.clean_share) == (at_once, clean_share)
    assert settings.chooses_twice == (given is not None and not at_once)


@pytest.mark.parametrize("policy", ["annsa", "fastar-adaptive", "fastar-quant"])
def test_queries_of_small_pictures_choose_together_only_where_a_fixed_number_is_seen(policy: str) -> None:
    config = RenderConfig.model_validate({"policy": policy}).attention
    assert isinstance(config, AnnSelfAttentionConfig)
    settings, expected = ann_settings(config, 64), {"fastar-quant": (32, 192)}.get(policy, (64, 64))
    assert (settings.key_tile, settings.query_tile) == expected
    large = ann_settings(config, 1560)
    assert (large.key_tile, large.query_tile) == (128, 128)
