"""FlashInfer, if it is installed; it builds its kernels on their first use (a minute or two)."""

import pytest
import torch

from tests.kernel_contract import KernelContract
from workers.contracts import Kernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestFlashInfer(KernelContract):
    takes_mass = False

    def make(self) -> Kernel:
        pytest.importorskip("flashinfer")
        from workers.kernels.flashinfer import FlashInferKernel

        return FlashInferKernel("fa3" if torch.cuda.get_device_capability()[0] == 9 else "fa2")
