from typing import get_args

import pytest
from pydantic import ValidationError

from workers.config import AnnSelfAttentionConfig, RenderConfig
from workers.config_tiles import TileAttentionConfig
from workers.named_policies import POLICIES, PolicyName


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_a_policy_is_its_parts_and_survives_being_written_down(name: PolicyName) -> None:
    config = RenderConfig(policy=name)
    for part, preset in POLICIES[name].items():
        assert preset.items() <= getattr(config, part).model_dump().items()
    assert RenderConfig.model_validate_json(config.model_dump_json()) == config


def test_a_field_beside_the_policy_wins() -> None:
    config = RenderConfig.model_validate({"policy": "fastar-lsh", "cache": {"budget_latent_frames": 50}})
    assert config.cache.kind == "temporal"
    assert config.cache.budget_latent_frames == 50
    assert config.attention.kind == "annsa"
    assert config.attention.search == "lsh"


def test_another_kind_beside_the_policy_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"stands for cache\.kind: temporal, but .*: window is given"):
        RenderConfig.model_validate({"policy": "fastar-quant", "cache": {"kind": "window"}})


def test_a_budget_without_room_for_history_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"budget_latent_frames: 11 is below 12"):
        RenderConfig.model_validate({"policy": "tempcache", "cache": {"budget_latent_frames": 11}})


def test_thresholds_outside_of_cosines_are_refused() -> None:
    for value in (1.5, -2.0, float("nan")):
        with pytest.raises(ValidationError, match=rf"cache.min_cosine: {value} is outside of \[-1, 1\]"):
            RenderConfig.model_validate({"policy": "tempcache", "cache": {"min_cosine": value}})


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match="'fastar-quant'"):
        RenderConfig.model_validate({"policy": "fastar"})


def test_a_density_takes_the_place_of_what_the_policy_sees() -> None:
    as_named = RenderConfig.model_validate({"policy": "fastar-quant"})
    assert isinstance(as_named.attention, AnnSelfAttentionConfig)
    assert as_named.attention.seen_latent_frames == 75
    given = RenderConfig.model_validate({"policy": "fastar-quant", "attention": {"density": 0.4}})
    assert isinstance(given.attention, AnnSelfAttentionConfig)
    assert (given.attention.density, given.attention.seen_latent_frames) == (0.4, None)
    for config in (as_named, given):
        assert RenderConfig.model_validate(config.model_dump()) == config


def test_a_density_given_beside_the_policy_holds_from_the_start() -> None:
    as_named = RenderConfig.model_validate({"policy": "fastar-tiles"})
    given = RenderConfig.model_validate({"policy": "fastar-tiles", "attention": {"density": 0.16}})
    assert isinstance(as_named.attention, TileAttentionConfig)
    assert isinstance(given.attention, TileAttentionConfig)
    assert (as_named.attention.density, as_named.attention.density_until_full) == (0.08, 0.12)
    assert (given.attention.density, given.attention.density_until_full) == (0.16, None)
    for config in (as_named, given):
        assert RenderConfig.model_validate(config.model_dump()) == config
