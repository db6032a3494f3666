"""What our CUDA enlargement reads lies where its descriptors look: addresses worked out as the GPU does."""

import pytest
import torch

from workers.model.enlarge_conv import Cut, choose_cut, make_source, pack_phases, takes


def swizzle(address: int, row: int) -> int:
    """In rows of 64 bytes, bits 4 and 5 are combined with bits 7 and 8; in rows of 128, 4 to 6 with 7 to 9."""
    return address ^ (address >> 7 & (3 if row == 64 else 7)) << 4


@pytest.mark.parametrize("deep", [32, 64])
@pytest.mark.parametrize(("taps", "side"), [(1, 2), (3, 1)])
def test_packed_weights_lie_where_the_product_looks(taps: int, side: int, deep: int) -> None:
    phases, out, channels_in, tile = side * 2, 192, 128, 96
    shape = (phases * out, channels_in, taps, side, side)
    weight = torch.arange(torch.Size(shape).numel()).view(shape)
    packed = pack_phases(weight, Cut(tile, deep=deep))
    assert packed.shape == (phases * out // tile, taps, channels_in // deep, side, side, tile, deep)
    for column, step, time, row, place in [(0, 0, 0, 0, 0), (95, 1, taps - 1, side - 1, 0), (37, 1, 0, 0, side - 1)]:
        image = packed[-1, time, step, row].flatten()  # one slot of weights
        for k in range(deep):
            start = place * tile * deep * 2 + k // 16 * 32
            address = swizzle(start + column // 8 * 16 * deep + column % 8 * 2 * deep + k % 16 * 2, 2 * deep)
            expected = weight[phases * out - tile + column, step * deep + k, time, row, place]
            assert image[address // 2] == expected


@pytest.mark.parametrize(
    "channels", [(192, 96, False), (384, 192, False), (384, 384, True), (192, 192, True), (64, 96, False)]
)
def test_slots_fit_into_shared_memory_and_tiles_into_registers(channels: tuple[int, int, bool]) -> None:
    channels_in, out, doubled = channels
    cut = choose_cut(channels_in, out, doubled=doubled)
    assert takes(channels_in, out)
    assert out % cut.channels == channels_in % cut.deep == 0
    assert cut.shared_bytes(1 if doubled else 2) + 4 * out * (2 if doubled else 4) + 512 <= 227 * 1024
    assert cut.rows * cut.columns // 128 * cut.channels // 2 <= 192  # totals of a thread
    assert not cut.kept or cut.slots_b == channels_in // cut.deep * 2


def test_the_source_says_what_is_made() -> None:
    source = make_source(192, 96, choose_cut(192, 96))
    for line in ("#define ENLARGED 1", "#define KEPT 1", "#define NB 12", "#define MB 2"):
        assert line + "\n" in source
    assert "m64n96k16.f32.bf16.bf16" in source
    assert '"+f"(d[47]) : "l"(a)' in source
    assert "#define ENLARGED 0\n" in make_source(384, 384, choose_cut(384, 384, doubled=True), doubled=True)
