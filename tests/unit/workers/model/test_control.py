"""Camera positions as maps on the latent grid."""

import math

import numpy as np
import pytest
import torch

from workers.model.backbones import find_backbone
from workers.model.control import CUT_PX, chunks_after_cuts, control_maps, group_camera, world_origin
from workers.worlds.camera import KINDS, RANGE, SPEEDS, CameraMove, trace

BACKBONE = find_backbone("longtake-world")
WAN_TIMING = find_backbone("wan2.1-t2v-1.3b")


def test_features_are_sines_of_the_world_position_of_each_cell() -> None:
    camera = torch.tensor([[[100.0, -7.0], [101.0, -7.0], [102.0, -7.0], [103.0, -7.0]]])[None]
    maps = control_maps(camera, 48, 32, BACKBONE)
    assert maps.shape == (1, 1, BACKBONE.control_channels, 4, 6)
    assert maps.dtype == torch.float32
    octaves, row, column = BACKBONE.control_octaves, 3, 5
    x, y = 101.5 + (column + 0.5) * 8, -7.0 + (row + 0.5) * 8
    for axis, place in enumerate((x, y)):
        for k in range(octaves):
            angle = 2 * math.pi * place / (8 * 2**k)
            first = axis * 2 * octaves + k
            assert maps[0, 0, first, row, column].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert maps[0, 0, first + octaves, row, column].item() == pytest.approx(math.cos(angle), abs=1e-4)
    motion = maps[0, 0, 4 * octaves :, row, column]
    torch.testing.assert_close(motion, torch.tensor([-1.5, 0, -0.5, 0, 0.5, 0, 1.5, 0]) / 8)


def test_the_same_place_gives_the_same_features_whenever_it_is_seen() -> None:
    out_and_back = torch.tensor([0.0, 16.0, 32.0, 16.0, 0.0])
    camera = torch.stack((out_and_back, torch.zeros(5)), -1)[None, :, None].expand(1, 5, 4, 2)
    maps = control_maps(camera, 64, 64, BACKBONE)
    torch.testing.assert_close(maps[:, 0], maps[:, 4])
    torch.testing.assert_close(maps[0, 1, : 4 * BACKBONE.control_octaves, :, 0], maps[0, 0, :48, :, 2])


def test_positions_are_grouped_into_whole_chunks_and_the_last_one_holds() -> None:
    camera = torch.arange(14.0)[None, :, None].expand(1, 14, 2)
    groups = group_camera(camera, BACKBONE)
    assert groups.shape == (1, 6, 4, 2)
    assert groups[0, :, :, 0].flatten().tolist() == [*range(14), *[13.0] * 10]


def test_a_first_latent_frame_of_one_picture_repeats_its_position() -> None:
    camera = torch.arange(9.0)[None, :, None].expand(1, 9, 2)
    groups = group_camera(camera, WAN_TIMING)
    assert groups[0, :, :, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_world_origin_counts_in_tokens() -> None:
    camera = torch.tensor([32.0, -8.0]).expand(1, 1, 4, 2)
    assert world_origin(camera, BACKBONE).tolist() == [[[2.0, -0.5]]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_only_a_hard_cut_parts_a_chunk_from_the_one_before(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = trace(CameraMove(kind, seed, SPEEDS[-1][1]), 480, (900.0, 900.0), (0.0, RANGE), rng)
    jumps = np.abs(np.diff(path, axis=0)).max(1) > CUT_PX
    expected = {int(frame + 1) // 12 for frame in jumps.nonzero()[0]}
    camera = group_camera(torch.from_numpy(path)[None], BACKBONE)[0]
    assert chunks_after_cuts(camera, BACKBONE) == expected
    assert bool(expected) == (kind == "cut")
    assert not chunks_after_cuts(camera, WAN_TIMING)
