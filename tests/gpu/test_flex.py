"""FlexAttention, compiled; each new shape compiles, so this takes minutes."""

import pytest
import torch

from tests.kernel_contract import KernelContract
from workers.contracts import Kernel
from workers.kernels.flex import FlexKernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestFlex(KernelContract):
    dtypes = (torch.bfloat16, torch.float32)

    def make(self) -> Kernel:
        return FlexKernel(compiled=True)
