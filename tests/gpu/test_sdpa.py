"""torch's fused kernels on CUDA: every path that `sdpa.py` may take there."""

import pytest
import torch

from tests.kernel_contract import KernelContract
from workers.contracts import Kernel
from workers.kernels.sdpa import SdpaKernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestFlashAndMemoryEfficient(KernelContract):
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    head_dims = (40, 64, 128)

    def make(self) -> Kernel:
        return SdpaKernel("flash")


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="cuDNN is chosen from Hopper on"
)
class TestCudnn(KernelContract):
    head_dims = (40, 64, 128)

    def make(self) -> Kernel:
        return SdpaKernel("cudnn")
