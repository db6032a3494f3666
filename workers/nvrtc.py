"""CUDA kernels without a toolkit: compiled when first used, by the runtime compiler that comes with torch, and launched
through the driver on torch's current stream, also while a CUDA graph is captured."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LONGEST_WAIT_S = 60
"""After which a wait inside a kernel fails: a machine may be paused for seconds."""


@functools.cache
def load_driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def check(status: int) -> None:
    """Raise unless a call of the driver succeeded."""
    if status:
        raise RuntimeError(f"CUDA driver error {status}")


def find_compiler(packages: Path) -> Any:
    """CUDA's runtime compiler: the one that is loaded or installed, else the one beside torch.

    Args:
        packages: Where Python's packages lie.
    """
    version = (torch.version.cuda or "").split(".")[0]
    found = [f"libnvrtc.so.{version}", *map(str, sorted(packages.glob("nvidia/*/lib/libnvrtc.so.*")))]
    for name in found:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"CUDA's runtime compiler was not found; tried {', '.join(found)}")


def lacks_compiler() -> str:
    """Why no CUDA can be compiled here; empty where it can."""
    try:
        find_compiler(_packages())
    except RuntimeError as error:
        return str(error)
    return ""


def _packages() -> Path:
    return Path(torch.__file__).parents[1]


def make_hopper_source(names: Mapping[str, object], products: str, own: Path) -> str:
    """CUDA of a kernel for compute capability 9.0, behind what such kernels share (hopper.cuh).

    Args:
        names: What it leaves to be defined.
        products: Functions that multiply.
        own: Its file.
    """
    shared = Path(__file__).with_name("hopper.cuh").read_text()
    return define({"LONGEST_WAIT_S": _LONGEST_WAIT_S, **names}) + shared + products + own.read_text()


def make_coded_source(names: Mapping[str, object], own: Path, products: str = "") -> str:
    """CUDA of a kernel for compute capability 9.0 that reads rows of codes of 4 bits, behind what such kernels share
    (hopper.cuh, codes_of_4.cuh); arguments as of `make_hopper_source`."""
    codes = Path(__file__).with_name("codes_of_4.cuh").read_text()
    return make_hopper_source(names, codes + products, own)


def make_halo_source(names: Mapping[str, int], kind: str, own: Path) -> str:
    """CUDA of a convolution whose tiles come with their borders, behind what such kernels share (hopper.cuh, halo.cuh).

    Args:
        names: What it leaves to be defined; N: columns of a product.
        kind: Of what is multiplied, as of `product_of_shared`.
        own: Its file, beside halo.cuh.
    """
    product = product_of_shared(names["N"], kind)
    return make_hopper_source(names, product + own.with_name("halo.cuh").read_text(), own)


def product_of_registers(declaration: str, room: int | str, columns: int, kind: str) -> str:
    """A function that multiplies 64 rows, in four registers, with some columns in shared memory, over 32 bytes.

    Args:
        declaration: Up to its name.
        room: Length of what it adds to, of which it takes as many numbers as there are.
        columns: A multiple of 8.
        kind: Of the instruction, behind the columns.
    """
    sums = columns // 2
    totals, outputs = ", ".join(f"%{i}" for i in range(sums)), ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    taken, given = ", ".join(f"unsigned int a{i}" for i in range(4)), ", ".join(f'"r"(a{i})' for i in range(4))
    left, right = ", ".join(f"%{sums + i}" for i in range(4)), sums + 4
    ends = "1, 1, 0" if "bf16" in kind else "1, 1"  # 16 bits may lie turned
    return f"""
{declaration}(float (&d)[{room}], {taken}, unsigned long long b, int adds) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{right + 1}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}{kind} {{{totals}}}, {{{left}}}, %{right}, p, {ends};\\n}}"
        : {outputs} : {given}, "l"(b), "r"(adds));
}}
"""


def product_of_shared(columns: int, kind: str) -> str:
    """A function that multiplies 64 rows with some columns, both in shared memory, over 16 numbers.

    Args:
        columns: A multiple of 8.
        kind: Of these, of 16 bits.
    """
    count = columns // 2
    numbers, outputs = ", ".join(f"%{i}" for i in range(count)), ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void wgmma(float (&d)[{count}], unsigned long long a, unsigned long long b, int adds) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
        "{{{numbers}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}"
        : {outputs} : "l"(a), "l"(b), "r"(adds));
}}
"""


def define(names: Mapping[str, object]) -> str:
    """What stands ahead of a source that leaves these to whoever compiles it."""
    return "".join(f"#define {name} {value}\n" for name, value in names.items())


def compile_source(source: str, library: Any, architecture: str = "sm_90a") -> bytes:
    """Machine code, by the runtime compiler; its messages are the error."""
    program = ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if failed:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, code)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def load_functions(source: str, names: Sequence[str], shared_bytes: int, device: int) -> list[ctypes.c_void_p]:
    """Functions of a source, on a device.

    Args:
        shared_bytes: Of dynamic shared memory, that the first may ask for.
    """
    code = compile_source(source, find_compiler(_packages()))
    driver, module = load_driver(), ctypes.c_void_p()
    functions = [ctypes.c_void_p() for _ in names]
    with torch.cuda.device(device):
        check(driver.cuModuleLoadData(ctypes.byref(module), code))
        for name, function in zip(names, functions, strict=True):
            check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        most_dynamic = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(functions[0], most_dynamic, shared_bytes))
    return functions


def address_of(tensor: Tensor | None) -> ctypes.c_void_p:
    """As an argument of a kernel; 0 where there is none."""
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def launch(
    function: ctypes.c_void_p, programs: int, threads: int, shared_bytes: int, given: Sequence[Any], device: int
) -> None:
    """On the current stream.

    Args:
        given: The arguments, as ctypes has them.
    """
    arguments = (ctypes.c_void_p * len(given))(*map(ctypes.addressof, given))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    launched = load_driver().cuLaunchKernel
    check(launched(function, programs, 1, 1, threads, 1, 1, shared_bytes, stream, arguments, None))
