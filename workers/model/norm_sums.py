"""Launches norm_sums.cu: norm and SiLU of frames, and at once the sums of frames that `winograd.py` convolves.

Normed frames are rounded once, to float16, and sums are made of what was rounded: they do not depend on where a video
is cut into calls, if at whole groups. Compiled when first used, by the compiler that comes with torch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.winograd import Winograd, transform_frames
from workers.nvrtc import address_of, launch, load_functions, make_hopper_source

_VECTOR = 4
"""Channels that a thread reads at once: 16 bytes of eight were no faster, and take registers."""
_MOST_VECTORS = 3
"""Of a thread: registers hold them for six frames."""


class Programs(NamedTuple):
    """How the work is cut."""

    threads: int
    together: int
    """Programs of a multiprocessor that registers are shared among."""


def choose_programs(way: Winograd) -> Programs:
    """As many threads as registers have room for."""
    return Programs(128, together=5 if way.num > 2 else 7)


def takes(channels: int) -> bool:
    """Whether these divide among lanes: a power of two, or three times one."""
    return _share(channels) is not None


def _share(channels: int) -> int | None:
    """Vectors of a thread, the fewest that leave a pixel no more lanes than there are in a warp."""
    for vectors in range(1, _MOST_VECTORS + 1):
        lanes, rest = divmod(channels, _VECTOR * vectors)
        if rest == 0 and 0 < lanes <= 32 and lanes & (lanes - 1) == 0:
            return vectors
    return None


def make_source(channels: int, way: Winograd, how: Programs) -> str:
    """CUDA of the kernel."""
    vectors = _share(channels)
    assert vectors is not None
    names = {
        "CHANNELS": channels,
        "ROOT": f"({channels**0.5!r}f)",
        "NUM": way.num,
        "TAPS": way.taps,
        "THREADS": how.threads,
        "TOGETHER": how.together,
        "VECTORS": vectors,
    }
    return make_hopper_source(names, _write_sums(way), Path(__file__).with_suffix(".cu"))


def _write_sums(way: Winograd) -> str:
    """A function that makes the sums of a group; products at x and -x share what is even and what is odd in x."""
    lines = []
    for pair in range(len(way.points)):
        columns = list(enumerate(zip(way.frames[2 * pair], way.frames[2 * pair + 1], strict=True)))
        assert all(abs(plus) == abs(minus) for _, (plus, minus) in columns)
        even = _write_sum([(plus, f) for f, (plus, minus) in columns if plus == minus])
        odd = _write_sum([(plus, f) for f, (plus, minus) in columns if plus != minus])
        lines.append(f"float even{pair} = {even}, odd{pair} = {odd};")
        lines.append(f"s[{2 * pair}] = even{pair} + odd{pair}, s[{2 * pair + 1}] = even{pair} - odd{pair};")
    for tap in range(2 * len(way.points), way.taps):
        lines.append(f"s[{tap}] = {_write_sum([(factor, f) for f, factor in enumerate(way.frames[tap])])};")
    body = "\n    ".join(lines)
    return f"""
template <class Frames> __device__ __forceinline__ void add_up(const Frames& d, float (&s)[{way.taps}]) {{
    {body}
}}
"""


def _write_sum(terms: Sequence[tuple[float, int]]) -> str:
    """Factors times frames; a factor of one first, as it needs no product."""
    left = sorted((term for term in terms if term[0]), key=lambda term: term[0] != 1.0)
    (factor, frame), *others = left
    text = f"d({frame})" if factor == 1.0 else f"({factor!r}f) * d({frame})"
    for factor, frame in others:
        text = f"fmaf({factor!r}f, d({frame}), {text})"
    return text


@functools.cache
def _load(channels: int, way: Winograd, how: Programs, device: int) -> ctypes.c_void_p:
    return load_functions(make_source(channels, way, how), ("norm_sums",), 0, device)[0]


def norm_sums(
    x_THWC: Tensor, before_THWC: Tensor | None, gamma_C: Tensor, way: Winograd, how: Programs | None = None
) -> tuple[Tensor, Tensor]:
    """`transform_frames` of norm and SiLU of frames, and the last two of these, for the next call; all in float16.

    Args:
        x_THWC: bfloat16, any number of frames, at least one.
        before_THWC: The last two of the call before, float16; None: zeros.
        gamma_C: Weights of the norm, bfloat16. All tensors are contiguous.
        way: Of the convolution.
        how: The work's cut if not as `choose_programs` says; results are the same.
    Returns:
        [taps * groups, H, W, C] and [2, H, W, C].
    """
    num, height, width, channels = x_THWC.shape
    assert num > 0
    assert gamma_C.shape == (channels,)
    assert x_THWC.dtype == gamma_C.dtype == torch.bfloat16
    assert before_THWC is None or before_THWC.dtype == torch.float16
    assert before_THWC is None or before_THWC.shape == (2, height, width, channels)
    for given in (x_THWC, before_THWC, gamma_C):
        assert given is None or (given.is_contiguous() and given.data_ptr() % 16 == 0)
    how = how or choose_programs(way)
    device, vectors = x_THWC.get_device(), _share(channels)
    assert vectors is not None
    assert device == torch.cuda.current_device()
    groups, threads = -(-num // way.num), height * width * channels // (_VECTOR * vectors)
    sums = x_THWC.new_empty((way.taps * groups, height, width, channels), dtype=torch.float16)
    last = x_THWC.new_empty((2, height, width, channels), dtype=torch.float16)
    pointers = map(address_of, (x_THWC, before_THWC, gamma_C, sums, last))
    arguments = [*pointers, ctypes.c_int(height * width), ctypes.c_int(num)]
    launch(_load(channels, way, how, device), -(-threads // how.threads), how.threads, 0, arguments, device)
    return sums, last


def norm_sums_plain(
    x_THWC: Tensor, before_THWC: Tensor | None, gamma_C: Tensor, way: Winograd
) -> tuple[Tensor, Tensor]:
    """The same step by step; norms in float64 where x is, else in float32."""
    wide = x_THWC if x_THWC.dtype == torch.float64 else x_THWC.float()
    unit = F.normalize(wide, dim=-1, eps=1e-12)
    normed = F.silu(unit * x_THWC.shape[-1] ** 0.5 * gamma_C.to(wide.dtype)).half()
    before = torch.zeros_like(normed[:1]).repeat(2, 1, 1, 1) if before_THWC is None else before_THWC
    return transform_frames(before, normed, way), torch.cat((before, normed))[-2:]
