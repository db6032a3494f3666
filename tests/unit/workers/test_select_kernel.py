"""Which kernel runs where: decided from records alone, so that GPUs nobody has here can be asked about."""

from collections.abc import Callable

import pytest
import torch

from workers.config import KernelName
from workers.contracts import Kernel
from workers.errors import KernelUnavailable
from workers.kernels.reference import ReferenceKernel
from workers.kernels.sdpa import SdpaKernel
from workers.kernels.select import CAPABILITIES, Hardware, KernelNeed, choose, load_kernel, select_kernel

CPU = Hardware("cpu")
TURING, AMPERE, HOPPER, BLACKWELL, GEFORCE = (
    Hardware("cuda", compute) for compute in ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))
)
WAN = KernelNeed(torch.bfloat16, 128)
MERGED = KernelNeed(torch.bfloat16, 128, log_mass=True)
SPARSE = KernelNeed(torch.bfloat16, 128, tiles=True)
FAST = KernelNeed(torch.bfloat16, 128, log_mass=True, tiles=True)


class Named(ReferenceKernel):
    """Stands for a kernel whose package this machine has not."""

    def __init__(self, name: str) -> None:
        self.name = name


def with_packages(*missing: str) -> Callable[[KernelName, Hardware, KernelNeed], Kernel]:
    def load(name: KernelName, hardware: Hardware, need: KernelNeed) -> Kernel:
        if name in missing:
            raise ImportError(f"No module named {name!r}")
        return Named(name)

    return load


def name_of(hardware: Hardware, need: KernelNeed, *missing: str) -> str:
    kernel = choose("auto", hardware, need, with_packages(*missing)).kernel
    assert isinstance(kernel, Named)
    return kernel.name


FLASH = ("flash-attn-4", "flash-attn-3", "flash-attn-2")


@pytest.mark.parametrize(
    ("hardware", "need", "missing", "expected"),
    [
        (HOPPER, WAN, (), "flash-attn-4"),
        (HOPPER, WAN, ("flash-attn-4",), "flashinfer"),
        (HOPPER, WAN, ("flash-attn-4", "flashinfer"), "flash-attn-3"),
        (HOPPER, WAN, (*FLASH, "flashinfer"), "sdpa"),
        (HOPPER, FAST, (), "flash-attn-4"),
        (HOPPER, FAST, ("flash-attn-4",), "triton"),
        (HOPPER, SPARSE, ("flash-attn-4",), "flashinfer"),
        (HOPPER, FAST, ("flash-attn-4", "triton"), "flash-attn-3"),
        (BLACKWELL, WAN, (), "flash-attn-4"),
        (BLACKWELL, MERGED, (), "sdpa"),
        (BLACKWELL, FAST, (), "triton"),
        (AMPERE, WAN, (), "flashinfer"),
        (AMPERE, MERGED, (), "sdpa"),
        (AMPERE, FAST, (), "triton"),
        (GEFORCE, WAN, (), "sdpa"),
        (TURING, WAN, (), "reference"),
        (HOPPER, KernelNeed(torch.float32, 64), (), "sdpa"),
        (HOPPER, KernelNeed(torch.float32, 64, tiles=True), (), "triton"),
        (HOPPER, KernelNeed(torch.bfloat16, 40), ("flash-attn-4",), "flash-attn-3"),
        (CPU, KernelNeed(torch.float32, 64, log_mass=True, tiles=True), (), "sdpa"),
        (CPU, KernelNeed(torch.float64, 64), (), "reference"),
    ],
)
def test_auto_takes_the_best_that_can_do_all(
    hardware: Hardware, need: KernelNeed, missing: tuple[str, ...], expected: str
) -> None:
    assert name_of(hardware, need, *missing) == expected


@pytest.mark.parametrize(
    ("name", "hardware", "need", "reason"),
    [
        ("flash-attn-4", AMPERE, WAN, r"compute capability 9.0 to 11.9, this GPU has 8.0"),
        ("flash-attn-4", CPU, WAN, r"on cuda, not on cpu"),
        ("flash-attn-4", HOPPER, KernelNeed(torch.float32, 128), r"backbone.dtype is float32.*bfloat16, float16"),
        ("flash-attn-4", HOPPER, KernelNeed(torch.bfloat16, 136), r"head dimension.* is 136.*8 to 128 in steps of 8"),
        ("flash-attn-4", BLACKWELL, MERGED, r"cache.kind.*log m on 9.0 to 9.0 alone, this GPU has 10.0"),
        ("flashinfer", HOPPER, KernelNeed(torch.bfloat16, 96), r"is 96, it takes 64, 128, 256"),
        ("flashinfer", HOPPER, MERGED, r"cache.kind merges keys, and it cannot add log m"),
        ("flash-attn-3", BLACKWELL, WAN, r"9.0 to 9.0"),
        ("triton", TURING, WAN, r"8.0 and later, this GPU has 7.5"),
        ("sdpa", CPU, KernelNeed(torch.float64, 64), r"float64.*float32, bfloat16, float16"),
    ],
)
def test_a_kernel_by_name_is_refused_with_field_value_and_range(
    name: KernelName, hardware: Hardware, need: KernelNeed, reason: str
) -> None:
    with pytest.raises(KernelUnavailable, match=rf"kernel.name: '{name}' cannot run here: .*{reason}"):
        choose(name, hardware, need, with_packages())


def test_a_missing_package_is_one_clear_line() -> None:
    with pytest.raises(KernelUnavailable, match=r"'flashinfer'.*package cannot be imported \(No module named"):
        choose("flashinfer", HOPPER, WAN, with_packages("flashinfer"))


def test_what_auto_passed_over_is_kept_with_the_reasons() -> None:
    choice = choose("auto", HOPPER, FAST, with_packages("flash-attn-4", "triton", "flash-attn-3"))
    refused = dict(choice.refused)
    assert list(refused) == ["flash-attn-4", "flashinfer", "triton", "flash-attn-3"]
    assert "log m" in refused["flashinfer"]
    assert "No module named" in refused["triton"]


def test_no_kernel_at_all_names_every_reason() -> None:
    with pytest.raises(KernelUnavailable, match=r"'auto' found no kernel.*flash-attn-4: .*reference: "):
        choose("auto", Hardware("xpu"), WAN, with_packages())


def test_this_machine_without_gpu_packages(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    with caplog.at_level("INFO"):
        assert isinstance(select_kernel("auto", cpu, KernelNeed(torch.bfloat16, 64)), SdpaKernel)
    assert "attention kernel sdpa" in caplog.text
    assert "not flash-attn-4: it computes on cuda, not on cpu" in caplog.text
    assert isinstance(select_kernel("auto", cpu, KernelNeed(torch.float64, 64)), ReferenceKernel)


def test_every_kernel_of_the_configuration_has_its_capabilities_and_loads_or_names_its_package() -> None:
    names = [capability.name for capability in CAPABILITIES]
    assert sorted(("auto", *names)) == sorted(KernelName.__args__)  # type: ignore[attr-defined]
    for name in names:
        try:
            kernel = load_kernel(name, CPU, KernelNeed(torch.float32, 64))
        except ImportError as error:
            assert error.name  # noqa: PT017
        else:
            assert torch.__version__ in kernel.version
