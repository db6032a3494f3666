"""CUDA of rows of codes of 4 bits against kernels of Triton, where groups, positions and slots are not as usual."""

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]
_HEADS, _SLOTS, _DIM = 2, 3000, 128


def _codes(generator: torch.Generator, odd: float) -> tuple[Tensor, Tensor]:
    """Of rows of which some have a group of nothing, of very little or of very much."""
    shape = _HEADS, _SLOTS, _DIM // 2
    low, high = (torch.randint(1, 16, shape, generator=generator, device="cuda").to(torch.uint8) for _ in range(2))
    largest = torch.rand((_HEADS, _SLOTS, 4), generator=generator, device="cuda") * 3 + 0.5
    for value in (0.0, 1e-20, 1e15):
        largest[torch.rand(largest.shape, generator=generator, device="cuda") < odd] = value
    return low | high << 4, largest.bfloat16()


@pytest.mark.parametrize("odd", [0.0, 0.003])
@pytest.mark.parametrize("shift", [0.0, 0.5, 5000.0])
@pytest.mark.parametrize(("values", "keys"), [(0, 0), (1, 1), (2, 2)])
def test_distances_have_the_bits_of_those_by_triton(
    odd: float, shift: float, values: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from workers.cache import row_distances, triton_pairs
    from workers.cache.triton_rows import StoredHistory, coded_rows
    from workers.cache.unrotated import TurnBack

    monkeypatch.setattr(row_distances, "_VALUES", values)
    monkeypatch.setattr(row_distances, "_KEYS", keys)
    generator = torch.Generator(device="cuda").manual_seed(0)
    k, v = (coded_rows(*_codes(generator, odd), _DIM, "int4", torch.bfloat16) for _ in range(2))
    own = torch.arange(_SLOTS, device="cuda", dtype=torch.int32)
    m = torch.randint(1, 9, (_HEADS, _SLOTS), generator=generator, device="cuda", dtype=torch.int32)
    m[:, -40:] = 0
    partner = (torch.rand(m.shape, generator=generator, device="cuda") * own).int()
    partner[:, :30] = -1
    position = torch.stack([own // 100, own % 100 // 10, own % 10], -1).float().repeat(_HEADS, 1, 1)
    position[:, ::50, 0] += shift
    of, turn_back = StoredHistory(k, v, position, m, m.float(), partner), TurnBack(_DIM, 10000.0, torch.device("cuda"))
    found = triton_pairs.find_distances(of, turn_back)
    monkeypatch.setattr(triton_pairs, "fits", lambda *_: False)
    expected = triton_pairs.find_distances(of, turn_back)
    is_link = (partner >= 0) & (m > 0)
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.of_values[is_link], expected.of_values[is_link])
    assert torch.equal(found.of_keys, expected.of_keys)
