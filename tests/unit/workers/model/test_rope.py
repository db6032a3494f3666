"""3-D RoPE against complex numbers in float64, and the published check values."""

import math

import pytest
import torch

from workers.model.rope import (
    Rotation,
    grid_positions,
    make_rotation,
    rotate,
    rotate_in_parts,
    rotate_in_place,
    split_head_dim,
)


def reference_rotate(x_QND: torch.Tensor, position_Q3: torch.Tensor, theta: float) -> torch.Tensor:
    """Plain complex rotation, token by token and pair by pair."""
    out = torch.empty_like(x_QND)
    for t in range(x_QND.shape[0]):
        first = 0
        for axis, size in enumerate(split_head_dim(x_QND.shape[2])):
            for j in range(size // 2):
                angle = float(position_Q3[t, axis]) * theta ** (-2 * j / size)
                turn = complex(math.cos(angle), math.sin(angle))
                for n in range(x_QND.shape[1]):
                    a = first + 2 * j
                    z = complex(x_QND[t, n, a], x_QND[t, n, a + 1]) * turn
                    out[t, n, a], out[t, n, a + 1] = z.real, z.imag
            first += size
    return out


@pytest.mark.parametrize(("head_dim", "split"), [(128, (44, 42, 42)), (40, (16, 12, 12)), (64, (24, 20, 20))])
def test_time_gets_what_row_and_column_leave(head_dim: int, split: tuple[int, int, int]) -> None:
    assert split_head_dim(head_dim) == split


@pytest.mark.parametrize("head_dim", [40, 128])
def test_rotation_equals_complex_product(head_dim: int) -> None:
    torch.manual_seed(1)
    position = torch.rand(7, 3) * torch.tensor([900.0, 30.0, 52.0])
    x = torch.randn(7, 2, head_dim, dtype=torch.float64)
    rotation = make_rotation(position, head_dim, 10000.0)
    for function in (rotate, rotate_in_parts):
        out = function(x[None].float(), rotation)[0]
        torch.testing.assert_close(out.double(), reference_rotate(x, position, 10000.0), atol=2e-6, rtol=0)


def test_second_pair_turns_by_the_published_angles() -> None:
    rotation = make_rotation(torch.tensor([[1.0, 1.0, 1.0]]), 128, 10000.0)
    angle = torch.atan2(rotation.sin, rotation.cos)[0, 0, 0]
    assert angle[1].item() == pytest.approx(0.657933, abs=1e-6)
    assert angle[22 + 1].item() == pytest.approx(0.644947, abs=1e-6)
    assert angle[22 + 21 + 1].item() == pytest.approx(0.644947, abs=1e-6)


def test_only_relative_positions_reach_the_logits() -> None:
    torch.manual_seed(2)
    q, k = torch.randn(2, 1, 5, 2, 40)
    near = grid_positions(torch.arange(1), 1, 5)
    far = near + torch.tensor([700.0, 3.5, -20.25])
    logits = [
        torch.einsum("bqnd,bknd->bnqk", rotate(q, make_rotation(p, 40, 1e4)), rotate(k, make_rotation(p, 40, 1e4)))
        for p in (near, far)
    ]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


def test_grid_counts_frames_then_rows_then_columns() -> None:
    grid = grid_positions(torch.tensor([4, 9]), rows=2, columns=3)
    assert grid.shape == (12, 3)
    assert grid[0].tolist() == [4, 0, 0]
    assert grid[5].tolist() == [4, 1, 2]
    assert grid[6].tolist() == [9, 0, 0]


def test_world_origin_moves_rows_and_columns_per_latent_frame_and_sample() -> None:
    origin = torch.tensor([[[10.0, 20.0], [10.5, 20.0]], [[0.0, 0.0], [-1.0, 0.25]]])  # (x, y)
    grid = grid_positions(torch.tensor([0, 1]).expand(2, 2), 2, 2, origin)
    assert grid.shape == (2, 8, 3)
    assert grid[0, 4].tolist() == [1, 20.0, 10.5]
    assert grid[1, 7].tolist() == [1, 1.25, 0.0]


@pytest.mark.parametrize("step", [1 / 8, 1 / 3, 1000.0])
@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_heads_with_their_own_tokens_are_turned_like_each_head_alone(step: float, num_tokens: int) -> None:
    """Positions in whole eighths are looked up in tables; others, and far ones, are computed. Both to the last bit."""
    rng = torch.Generator().manual_seed(0)
    position = torch.randint(-40, 200, (2, num_tokens, 3, 3), generator=rng) * step
    rotation = make_rotation(position, 40, 1e4)
    for head in range(3):
        alone = make_rotation(position[:, :, head], 40, 1e4)
        assert torch.equal(rotation.cos[:, :, head], alone.cos[:, :, 0])
        assert torch.equal(rotation.sin[:, :, head], alone.sin[:, :, 0])


@pytest.mark.parametrize("step", [1.0, 0.125, 0.3])
@pytest.mark.parametrize("first", [0.0, -700.0, 2000.0])
def test_keys_are_turned_in_place_as_by_a_rotation_of_each(step: float, first: float) -> None:
    generator = torch.Generator().manual_seed(5)
    position = first + step * torch.randint(900, (1, 33, 2, 3), generator=generator).float()
    x = torch.randn(1, 33, 2, 64, generator=generator)
    angle = torch.cat(
        [
            position[..., axis, None].double() * 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            for axis, size in enumerate(split_head_dim(64))
        ],
        -1,
    )
    want = rotate(x, Rotation(angle.cos().float(), angle.sin().float()))
    torch.testing.assert_close(rotate(x, make_rotation(position, 64, 10000.0)), want, rtol=1e-5, atol=1e-6)
    if step == 0.3:
        return  # not what a merging cache keeps
    rotate_in_place(x, position, 10000.0)
    torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-6)
