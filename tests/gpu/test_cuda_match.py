"""Chunks taken over by a CUDA kernel against the same by Triton: all bits of a table that merges pairs."""

from dataclasses import replace

import pytest
import torch

from tests.packed_checks import DTYPE, INTERPRETED, SIZES, fill

pytest.importorskip("triton")
from workers.cache import turn_chunk

HAS_KERNEL = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_KERNEL, reason="needs compute capability 9.0")]


@pytest.mark.parametrize(
    ("frame", "candidate_tiles", "heads"), [(88, 3, 2), (64, 2, 1), (40, 0, 2), (280, 4, 3), (1560, 4, 12)]
)
def test_chunks_are_taken_over_with_the_bits_of_triton(
    frame: int, candidate_tiles: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = replace(SIZES, storage="int4", head_dim=128, tile=128, num_heads=heads, candidate_tiles=candidate_tiles)
    s = replace(s, num_layers=2, frame_tokens=frame, chunk_tokens=3 * frame)
    num_chunks, calls, run = s.kept_chunks + s.spare_chunks + 3, [], turn_chunk.turn_chunk
    monkeypatch.setattr(turn_chunk, "turn_chunk", lambda *given: calls.append(run(*given)))
    found = fill(s, num_chunks, "kernels", DTYPE).state()
    assert calls, "the kernel was not used"
    monkeypatch.setattr(turn_chunk, "fits", lambda *_: False)
    calls.clear()
    expected = fill(s, num_chunks, "kernels", DTYPE).state()
    assert not calls
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert int(expected["0.m_NC"].max()) > 1
