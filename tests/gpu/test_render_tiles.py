"""Takes over a tile table on a GPU: replayed calls, and those that other devices would take, make the same video."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tile_takes import SMALL, render
from workers.assemble import LoadedModel, load_model
from workers.assemble_tiles import TableSeat
from workers.config import RenderConfig
from workers.kernels.select import Hardware, KernelNeed
from workers.kernels.select_listed import choose_listed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make_model(**fields: Any) -> LoadedModel:
    record = {"policy": "fastar-tiles", "cache": SMALL, "attention": {"density": 0.3}, **fields}
    return load_model(RenderConfig.model_validate(record))


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
