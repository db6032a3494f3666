"""FlashAttention 4, 3 and 2, whichever are installed; kernels of generation 4 compile on their first use (seconds)."""

import pytest
import torch

from tests.kernel_contract import KernelContract
from workers.contracts import Kernel
from workers.kernels.flash_attn import FlashAttnKernel, Generation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def make(generation: Generation, *, skips_tiles: bool = False) -> Kernel:
    try:
        return FlashAttnKernel(generation, skips_tiles=skips_tiles)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(not IS_HOPPER, reason="generation 4 adds log m and skips tiles on Hopper")
class TestGeneration4(KernelContract):
    head_dims = (40, 64, 128)

    def make(self) -> Kernel:
        return make(4, skips_tiles=True)


@pytest.mark.skipif(not IS_HOPPER, reason="generation 3 is for Hopper")
class TestGeneration3(KernelContract):
    head_dims = (40, 64, 128)

    def make(self) -> Kernel:
        return make(3)


class TestGeneration2(KernelContract):
    head_dims = (40, 64, 128)

    def make(self) -> Kernel:
        return make(2)
