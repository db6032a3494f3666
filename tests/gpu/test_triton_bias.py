"""The Triton kernel. With `TRITON_INTERPRET=1` it runs without a GPU, line by line in numpy (not in bfloat16: the
interpreter of Triton 3.6 multiplies its bits as whole numbers)."""

import os

import pytest
import torch

from tests.kernel_contract import KernelContract
from workers.contracts import Kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]


class TestTriton(KernelContract):
    device = "cpu" if INTERPRETED else "cuda"
    dtypes = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
    head_dims = (40, 64, 128)

    def make(self) -> Kernel:
        pytest.importorskip("triton")
        from workers.kernels.triton_bias import TritonKernel

        return TritonKernel()
