"""What a render over a tile table can be, and what is refused: field, value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from workers.assemble import load_model
from workers.config import RenderConfig
from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.errors import ConfigUnsupported


def make(**fields: Any) -> RenderConfig:
    return RenderConfig.model_validate({"policy": "fastar-tiles", **fields})


def test_the_policy_keeps_150_latent_frames_in_4_bits_of_which_12_are_seen_once_a_chunk() -> None:
    config = make()
    assert isinstance(config.cache, TileCacheConfig)
    assert isinstance(config.attention, TileAttentionConfig)
    chunks = config.cache.chunks(3)
    assert chunks == {"sink_chunks": 1, "recent_chunks": 1, "kept_chunks": 43, "spare_chunks": 5}
    assert (config.cache.merging, config.cache.storage) == ("pairs", "int4")
    assert config.attention.density * config.cache.budget_latent_frames == pytest.approx(12)
    assert (config.attention.history_at, config.attention.clean_pass_share) == ((0,), 1 / 3)
    assert RenderConfig.model_validate_json(config.model_dump_json()) == config


def test_the_kinds_alone_are_a_small_table_at_which_every_call_looks() -> None:
    config = make(policy=None, cache={"kind": "tiles"}, attention={"kind": "tiles"})
    assert isinstance(config.cache, TileCacheConfig)
    assert isinstance(config.attention, TileAttentionConfig)
    assert config.cache.chunks(3) == {"sink_chunks": 1, "recent_chunks": 1, "kept_chunks": 9, "spare_chunks": 5}
    assert (config.attention.density, config.attention.history_at) == (0.1, None)
    once = make(attention={"choose_at": [0, 2], "history_at": [0, 2, 3]}).attention
    assert isinstance(once, TileAttentionConfig)
    assert once.history_at == (0, 2, 3)


@pytest.mark.parametrize(("frame_tokens", "tile"), [(8, 8), (64, 8), (256, 32), (1023, 64), (1560, 128), (6240, 128)])
def test_a_tile_is_at_most_an_eighth_of_a_latent_frame(frame_tokens: int, tile: int) -> None:
    assert TileCacheConfig().tile_for(frame_tokens) == tile
    assert TileCacheConfig(tile=64).tile_for(frame_tokens) == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": {"tile": 24}}, r"cache\.tile: 24 is not a power of two in \[8, 128\]"),
        ({"cache": {"budget_latent_frames": 20}}, r"cache\.budget_latent_frames: 20 is below 22, the sum of"),
        ({"cache": {"storage": "fp8"}}, r"cache\.tiles\.storage\n *Input should be 'model', 'int8' or 'int4'"),
        ({"attention": {"choose_at": [1, 2]}}, r"attention\.choose_at: \[1, 2\] must begin with 0 and rise"),
        (
            {"attention": {"choose_at": [0, 4], "history_at": None}},
            r"attention\.choose_at: 4 is no denoising step: .* from 0 to 3",
        ),
        ({"attention": {"history_at": [1, 2]}}, r"attention\.history_at: \[1, 2\] must begin with 0 and rise"),
        ({"attention": {"history_at": [0, 2, 2]}}, r"attention\.history_at: \[0, 2, 2\] must begin with 0 and rise"),
        ({"attention": {"history_at": []}}, r"attention\.tiles\.history_at\s+Tuple should have at least 1 item"),
        ({"attention": {"history_at": [0, 4]}}, r"attention\.history_at: 4 is no denoising step: .* from 0 to 3"),
        (
            {"attention": {"choose_at": [0, 2], "history_at": [0, 1]}},
            r"attention\.choose_at: \[0, 2\] must be among attention\.history_at: \[0, 1\], for a step that chooses",
        ),
        ({"attention": {"density": 0.0}}, r"greater than 0"),
        (
            {"attention": {"fp8": "steps", "history_at": None}},
            r"attention\.fp8: steps needs attention\.history_at: .* apart from the rest",
        ),
        (
            {"attention": {"fp8": "all"}, "cache": {"storage": "model"}},
            r"attention\.fp8: all does not go with cache\.storage: model, .* must be int8 or int4",
        ),
        ({"attention": {"fp8": "large"}}, r"attention\.tiles\.fp8\s+Input should be 'none', 'steps' or 'all'"),
        ({"prompt_attention": {"kind": "annca"}}, r"prompt_attention\.kind: annca does not go with cache\.kind: tiles"),
        ({"reuse": {"kind": "teacache"}}, r"reuse\.kind: teacache .* must be none"),
        ({"positions": {"time": "capped"}}, r"positions\.time: capped: .* must be absolute"),
        ({"guard": {"enabled": True}}, r"guard\.enabled: true .* no probe sees .* must be false"),
        ({"sampling": {"guidance": 3.0}}, r"sampling\.guidance: 3: .* one branch; it must be 1"),
        ({"kernel": {"name": "sdpa"}}, r"kernel\.name: sdpa .* allowed: auto, flash-attn-4, triton, reference"),
        ({"policy": None, "cache": {"kind": "tiles"}}, r"attention\.kind: dense does not go with cache\.kind: tiles"),
        (
            {"policy": "fastar-quant", "backbone": {"fp8": "large"}},
            r"backbone\.fp8: large goes with cache\.kind: tiles alone, not with temporal; it must be none",
        ),
        ({"policy": None, "attention": {"kind": "tiles"}}, r"attention\.kind: tiles .* not with dense"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": {"recent_latent_frames": 4}}, r"cache\.recent_latent_frames: 4 is not a multiple of 3"),
        ({"cache": {"budget_latent_frames": 50}}, r"cache\.budget_latent_frames: 50 is not a multiple of 3"),
    ],
)
def test_lengths_are_whole_chunks_of_the_model(fields: dict[str, Any], message: str) -> None:
    tiny = {"backbone": {"name": "tiny-test"}, "video": {"width": 64, "height": 32}}
    with pytest.raises(ConfigUnsupported, match=message):
        load_model(make(**tiny, **fields))


@pytest.mark.parametrize("name", ["rolling-forcing-1.3b", "longvie2-14b"])
def test_models_with_another_loop_are_refused_before_their_weights_are_looked_for(name: str) -> None:
    sizes = {"width": 832, "height": 480} if name.startswith("rolling") else {"width": 640, "height": 352}
    with pytest.raises(ConfigUnsupported, match=rf"cache\.kind: tiles: .* {name} renders .*fastar-quant"):
        load_model(make(backbone={"name": name}, video=sizes))
