"""The bench of attention kernels: published geometries, and that one kernel's failure leaves the others."""

from dataclasses import replace

import pytest
import torch

from tests.bench import kernels, listed_kernels
from workers.kernels.sdpa import SdpaKernel
from workers.model.backbones import find_backbone


def test_the_geometries_are_those_of_the_models() -> None:
    world, settings = find_backbone("longtake-world"), {name: make() for name, make in kernels.GPU.items()}
    frame_tokens = world.tokens_per_latent_frame(world.width, world.height)
    assert (kernels.CPU.heads, kernels.CPU.head_dim) == (world.num_heads, world.head_dim)
    assert kernels.CPU.num_queries == world.chunk_latent_frames * frame_tokens
    sizes = {name: (s.heads, s.head_dim, s.num_queries, s.num_keys) for name, s in settings.items()}
    assert sizes == {
        "wan2.1-t2v-1.3b": (12, 128, 4680, 131_072),
        "wan2.1-t2v-14b": (40, 128, 4680, 131_072),
        "hunyuanvideo": (24, 128, 14_400, 119_056),
    }


class _Broken:
    def attend(self, *_: object) -> None:
        raise RuntimeError("no room\nfor this")


@pytest.mark.parametrize("name", list(kernels.GPU))
def test_each_geometry_is_measured_and_failures_are_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"device": torch.device("cpu"), "dtype": torch.float32, "num_queries": 24, "num_keys": 96, "repeats": 1}
    setting = replace(kernels.GPU[name](), **small, tiles=((8, 8),))
    both = {"broken": _Broken(), "sdpa": SdpaKernel()}
    monkeypatch.setattr(kernels, "usable_kernels", lambda *_: both)
    rows, failures = kernels.bench(setting)
    assert failures == ["broken: no room"]
    assert {row["kernel"] for row in rows} == {"sdpa"}
    assert sum(row["case"].startswith("tiles 8x8") for row in rows) == 2 * len(kernels.DENSITIES)


def test_listed_kernels_stand_beside_the_fastest_dense_one_at_equal_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed_kernels, "CASES", (listed_kernels.Case("small", 150, 6, 2),))
    monkeypatch.setattr(listed_kernels, "DENSE_CASES", ((150, 400),))
    told: list[int] = []
    rows = listed_kernels.bench(torch.device("cpu"), lambda rows: told.append(len(rows)))
    dense, *listed = rows
    assert (dense["kernel"], dense["case"]) == ("sdpa", "dense, 150 queries, 400 keys")
    assert [row["kernel"] for row in listed] == ["torch", "torch, lists in rising order"]
    assert told == [1, 3]
    for row in listed:
        assert row["keys_seen"] == 256
        assert row["of_highest_dense_rate"] == pytest.approx(row["tflops"] / dense["tflops"])


def test_a_way_that_differs_from_the_reference_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed_kernels, "make_attend", lambda name, tile: lambda q, k, v, index: q[..., :128] * 2)
    assert listed_kernels.listed_ways(torch.device("cpu"), torch.float32) == {}
