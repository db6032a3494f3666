"""What our CUDA convolution reads lies where its descriptors look: addresses worked out as the GPU does."""

import pytest
import torch

from workers.model.halo_conv import Cut, choose_cut, make_source, pack_weight, takes


def swizzle(address: int) -> int:
    """Of rows of 64 bytes: bits 4 and 5 are combined with bits 7 and 8."""
    return address ^ (address >> 7 & 3) << 4


@pytest.mark.parametrize(("channels_in", "channels_out", "tile"), [(96, 96, 96), (64, 384, 192)])
def test_packed_weights_lie_where_the_product_looks(channels_in: int, channels_out: int, tile: int) -> None:
    weight = torch.arange(channels_out * channels_in * 27).view(channels_out, channels_in, 3, 3, 3)
    packed = pack_weight(weight, tile)
    assert packed.shape == (channels_out // tile, 3, channels_in // 32, 3, 3, tile, 32)
    for column, step, time, row, place in [(0, 0, 0, 0, 0), (tile - 1, 1, 2, 1, 0), (37, 1, 1, 2, 2), (6, 0, 0, 0, 1)]:
        image = packed[-1, time, step, row].flatten()  # one slot of weights
        for k in range(32):
            start = place * tile * 64 + k // 16 * 32
            address = swizzle(start + column // 8 * 512 + column % 8 * 64 + k % 16 * 2)
            expected = weight[channels_out - tile + column, step * 32 + k, time, row, place]
            assert image[address // 2] == expected


def test_slots_fit_into_shared_memory_and_tiles_into_registers() -> None:
    for channels in (96, 192, 384):
        cut = choose_cut(channels)
        assert channels % cut.channels == 0
        assert cut.shared_bytes <= 223 * 1024
        assert cut.rows * cut.columns // 128 * cut.channels // 2 <= 192  # totals of a thread
    assert not takes(16, 384)
    assert not takes(96, 8)


def test_the_source_holds_a_product_of_the_width_of_a_tile() -> None:
    source = make_source(192, 384, Cut(192, 8, 16))
    assert "#define MB 1\n" in source
    assert "m64n192k16" in source
    assert '"+f"(d[95]) : "l"(a)' in source
