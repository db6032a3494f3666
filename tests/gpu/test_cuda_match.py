"""Chunks taken over by kernels by CUDA against the same by Triton: all bits of a table that merges pairs."""

from dataclasses import replace

import pytest
import torch

from tests.packed_checks import DTYPE, INTERPRETED, SIZES, fill

HAS_KERNELS = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_KERNELS, reason="needs compute capability 9.0")]
KERNELS = ("turn_chunk", "frame_before", "near_keys")


@pytest.mark.parametrize(
    ("frame", "candidate_tiles", "heads"), [(88, 3, 2), (64, 2, 1), (40, 0, 2), (280, 4, 3), (1560, 4, 12)]
)
@pytest.mark.parametrize("kernels", [*((name,) for name in KERNELS), KERNELS])
def test_chunks_are_taken_over_with_the_bits_of_triton(
    kernels: tuple[str, ...], frame: int, candidate_tiles: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    s = replace(SIZES, storage="int4", head_dim=128, tile=128, num_heads=heads, candidate_tiles=candidate_tiles)
    s = replace(s, num_layers=2, frame_tokens=frame, chunk_tokens=3 * frame)
    num_chunks = s.kept_chunks + s.spare_chunks + 3
    for name in set(KERNELS) - set(kernels):
        monkeypatch.setattr(f"workers.cache.{name}.fits", lambda *_: False)
    found = fill(s, num_chunks, "kernels", DTYPE).state()
    for name in KERNELS:
        monkeypatch.setattr(f"workers.cache.{name}.fits", lambda *_: False)
    expected = fill(s, num_chunks, "kernels", DTYPE).state()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert int(expected["0.m_NC"].max()) > 1
