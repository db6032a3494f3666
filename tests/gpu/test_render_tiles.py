"""Takes over a tile table on a GPU: replayed calls, and those that other devices would take, make the same video."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tile_takes import SMALL, render
from workers.assemble import LADDER, LoadedModel, load_model
from workers.assemble_tiles import TableSeat
from workers.config import RenderConfig
from workers.kernels.select import Hardware, KernelNeed
from workers.kernels.select_listed import choose_listed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make_model(**fields: Any) -> LoadedModel:
    record = {"policy": "fastar-tiles", "cache": SMALL, "attention": {"density": 0.3}, **fields}
    return load_model(RenderConfig.model_validate(record))


def need_products() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs products of 8-bit floats")


def with_ways(model: LoadedModel, **changes: Any) -> LoadedModel:
    assert model.seat is not None
    ways = replace(model.seat.ways, **changes)
    return replace(model, seat=TableSeat(model.dit, model.config, model.latent_size, ways))


def test_replayed_calls_make_the_frames_of_plain_calls(tmp_path: Path) -> None:
    model = make_model()
    assert model.backend.endswith("CUDA graphs")
    captured, again = render(model, tmp_path), render(model, tmp_path, task_id="b-0")
    plain = render(with_ways(model, graphs=False), tmp_path, task_id="c-0")
    assert captured.frames_sha256 == again.frames_sha256 == plain.frames_sha256


def test_what_a_gpu_may_lack_changes_rounding_alone(tmp_path: Path) -> None:
    model = make_model()
    need = KernelNeed(model.dit.dtype, model.backbone.head_dim)
    listed = choose_listed("reference", Hardware.of(model.device), need, 8)
    bare = with_ways(model, listed=listed, kernels=False)
    fast, plain = render(model, tmp_path), render(bare, tmp_path, task_id="b-0")
    assert "plain torch" in plain.backend
    assert abs(fast.quality.mean_luma - plain.quality.mean_luma) < 4
    assert fast.kv_bytes == plain.kv_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("compiled", [False, True])
def test_products_of_8_bits_stay_near_those_of_the_models_dtype(tmp_path: Path, dtype: str, compiled: bool) -> None:
    need_products()
    backbone = {"dtype": dtype, "compiled": compiled}
    results = [
        render(make_model(backbone=backbone | {"fp8": fp8}), tmp_path, task_id=f"{fp8}-0")
        for fp8 in ("none", "ffn", "large", "all")
    ]
    assert len({result.frames_sha256 for result in results}) == 4
    for result in results[1:]:
        assert abs(result.quality.mean_luma - results[0].quality.mean_luma) < 4


def test_a_window_and_an_attempt_in_float32_do_not_round(tmp_path: Path) -> None:
    need_products()
    plain, coded = (make_model(backbone={"dtype": "bfloat16", "fp8": fp8}) for fp8 in ("none", "all"))

    def render_all(model: LoadedModel) -> list[str]:
        kinds: tuple[dict[str, Any], ...] = ({}, {"ladder_rung": len(LADDER)}, {}, {"full_precision": True}, {})
        name = model.config.backbone.fp8
        return [render(model, tmp_path, task_id=f"{name}{i}-0", **kind).frames_sha256 for i, kind in enumerate(kinds)]

    table, window, again, wide, last = render_all(coded)
    exact = render_all(plain)
    assert (window, wide) == (exact[1], exact[3])
    assert table == again == last != exact[0]
