"""Has FlashInfer compile its dense kernel for this GPU, by one small call; then makes the file that is named."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from workers.contracts import KeyValues
from workers.kernels.select import Hardware, KernelNeed, load_kernel

HEAD_DIM = 128  # of every Wan model


def main() -> None:
    """Build, then say so."""
    device = torch.device("cuda")
    kernel = load_kernel("flashinfer", Hardware.of(device), KernelNeed(torch.bfloat16, HEAD_DIM))
    q, k, v = (torch.randn(1, 256, 2, HEAD_DIM, device=device, dtype=torch.bfloat16) for _ in range(3))
    kernel.attend(q, (KeyValues(k, v, torch.zeros(256, 3, device=device)),))
    torch.cuda.synchronize()
    Path(sys.argv[1]).touch()


if __name__ == "__main__":
    main()
