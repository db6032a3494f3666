"""What every kernel for a GPU must do, against the reference in float64; tests/gpu has one subclass a kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from workers.contracts import Attended, Kernel, KernelPart, KeyValues, TiledKeys, Tiles
from workers.kernels.reference import ReferenceKernel

BATCH, HEADS = 2, 3
# One rounding of the weights and one of the result: 2^-8 in bfloat16, 2^-11 in float16; float32 is summed as it is.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LSE_TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


class KernelContract:
    """Subclass it, say what the kernel takes, and make one."""

    device = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    head_dims: tuple[int, ...] = (64, 128)
    takes_mass = True

    def make(self) -> Kernel:
        raise NotImplementedError

    @pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        if request.param not in self.dtypes:
            pytest.skip(f"does not compute in {request.param}")
        return request.param

    @pytest.fixture(params=[40, 64, 128])
    def head_dim(self, request: pytest.FixtureRequest) -> int:
        if request.param not in self.head_dims:
            pytest.skip(f"does not take head dimension {request.param}")
        return request.param

    @pytest.fixture(params=[False, True], ids=["plain", "log-m"])
    def mass(self, request: pytest.FixtureRequest) -> bool:
        if request.param and not self.takes_mass:
            pytest.skip("does not add log m")
        return request.param

    def random_queries(self, num: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(BATCH, num, HEADS, head_dim, device=self.device).to(dtype)

    def random_keys(self, num: int, head_dim: int, dtype: torch.dtype, mass: bool) -> KeyValues:
        k, v = torch.randn(2, BATCH, num, HEADS, head_dim, device=self.device).to(dtype).unbind(0)
        log_mass = None
        if mass:
            log_mass = torch.rand(BATCH, HEADS, num, device=self.device) * 4
            log_mass = log_mass.masked_fill(torch.rand_like(log_mass) < 0.2, -math.inf)
        return KeyValues(k, v, torch.zeros(num, 3, device=self.device), log_mass)

    def random_tiles(self, sizes: tuple[int, int], tile: tuple[int, int], share: float, orders: bool) -> Tiles:
        shape = (BATCH, HEADS, *(-(-size // t) for size, t in zip(sizes, tile, strict=True)))
        visible = torch.rand(shape, device=self.device) < share
        made = [torch.rand(BATCH, HEADS, n, device=self.device).argsort(-1) if orders else None for n in sizes]
        return Tiles(visible, *tile, *made)

    def check(self, q: Tensor, parts: tuple[KernelPart, ...]) -> None:
        kernel = self.make()
        expected_out, expected_lse = ReferenceKernel().attend(q.double(), parts)
        for _ in range(2):  # the second time with what was planned or kept
            out, lse = kernel.attend(q, parts)
            assert out.shape == q.shape
            assert out.dtype == q.dtype
            assert lse.dtype == torch.float32
            torch.testing.assert_close(out.double(), expected_out, atol=TOLERANCE[q.dtype], rtol=0)
            torch.testing.assert_close(lse.double(), expected_lse, atol=LSE_TOLERANCE[q.dtype], rtol=0)

    @pytest.mark.parametrize("num_keys", [(1,), (257,), (128, 64, 33)], ids=str)
    def test_equals_softmax_over_the_union(
        self, dtype: torch.dtype, head_dim: int, mass: bool, num_keys: tuple[int, ...]
    ) -> None:
        torch.manual_seed(0)
        q = self.random_queries(190, head_dim, dtype)
        self.check(q, tuple(self.random_keys(n, head_dim, dtype, mass and i != 1) for i, n in enumerate(num_keys)))

    @pytest.mark.parametrize("tile", [(128, 128), (256, 128), (64, 64), (48, 80)], ids=str)
    @pytest.mark.parametrize("num_keys", [1280, 1100])
    @pytest.mark.parametrize("share", [0.1, 0.5])
    @pytest.mark.parametrize("orders", [False, True], ids=["as-they-come", "ordered"])
    def test_tiles_equal_softmax_under_their_mask(
        self, mass: bool, tile: tuple[int, int], num_keys: int, share: float, orders: bool
    ) -> None:
        torch.manual_seed(1)
        dtype, head_dim = self.dtypes[0], self.head_dims[-1]
        q = self.random_queries(300, head_dim, dtype)
        tiles = self.random_tiles((300, num_keys), tile, share, orders)
        tiled = TiledKeys(self.random_keys(num_keys, head_dim, dtype, mass), tiles)
        self.check(q, (tiled,))
        self.check(q, (tiled, self.random_keys(300, head_dim, dtype, False)))

    def test_what_was_attended_before_counts_by_its_log_sum_exp(self, dtype: torch.dtype, mass: bool) -> None:
        torch.manual_seed(4)
        head_dim = self.head_dims[-1]
        q = self.random_queries(190, head_dim, dtype)
        before, after = (self.random_keys(num, head_dim, dtype, mass) for num in (300, 128))
        out, lse = ReferenceKernel().attend(q.double(), (before,))
        self.check(q, (after, Attended(out.to(dtype), lse.float())))

    def test_tiles_in_every_dtype_and_head_dimension(self, dtype: torch.dtype, head_dim: int, mass: bool) -> None:
        torch.manual_seed(2)
        q = self.random_queries(200, head_dim, dtype)
        tiles = self.random_tiles((200, 640), (128, 128), 0.4, False)
        self.check(q, (TiledKeys(self.random_keys(640, head_dim, dtype, mass), tiles),))

    def test_a_query_that_is_nan_stays_nan(self) -> None:
        dtype, head_dim = self.dtypes[0], self.head_dims[-1]
        q = self.random_queries(20, head_dim, dtype)
        q[0, 4, 1, 2] = math.nan
        keys = self.random_keys(256, head_dim, dtype, False)
        tiles = self.random_tiles((20, 256), (128, 128), 2.0, False)
        for parts in ((keys,), (TiledKeys(keys, tiles), keys)):
            out, _ = self.make().attend(q, parts)
            assert out[0, 4, 1].isnan().all()
            assert out[0, 5].isfinite().all()
