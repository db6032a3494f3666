"""Attention over a table in two parts, the history and the rest, composed exactly by their log-sum-exps.

So what one denoising step saw of the history can serve the others (`rollouts/kept_history.py`). The history is read
by lists; the rest, the own chunk above all, may lie in one run of slots, which a dense kernel reads faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from workers.coded_tiles import CodedTiles
from workers.kernels.listed_gather import attend_gathered_lse
from workers.kernels.listed_tiles import AttendInto, AttendLse, ListedName, copied, make_attend_into, make_attend_lse
from workers.kernels.lse import merge

AttendRun = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q_QNW, k_NKW, v_NKD) -> out_QND, lse_QN: every query sees every key. W may be D where log m is 0 throughout."""
Compose = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(out_a_QND, lse_a_QN, out_b_QND, lse_b_QN) -> out_QND over both sets of keys, in the dtype of out_a."""


class CodeChunk(Protocol):
    """q_QNW -> q_NIB, and keys and values that lie in one run become tiles."""

    def __call__(
        self, q_QNW: Tensor, k_NKW: Tensor, v_NKD: Tensor, out: CodedTiles | None = None
    ) -> tuple[Tensor, CodedTiles]: ...


class AttendCoded(Protocol):
    """q_NIB, tiles, index_NIJ or None for all, number of queries -> out_QND and lse_QN, written if given."""

    def __call__(
        self,
        q_NIB: Tensor,
        tiles: CodedTiles,
        index_NIJ: Tensor | None,
        num_queries: int,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class CodedAttention:
    """With products of 8-bit floats, of queries and keys that are coded before; see `fp8_tiles.py`."""

    code_chunk: CodeChunk
    attend: AttendCoded
    code_values: Callable[[Tensor, Tensor], object]
    """(v_NKD, v_NTB written): what is left of `code_chunk` where queries and keys were coded as they were computed."""


class PartedAttention(NamedTuple):
    """How the parts are attended to."""

    listed: AttendLse
    run: AttendRun | None
    """None where lists must do."""
    compose: Compose
    listed_into: AttendInto
    """`listed` into buffers."""
    coded: CodedAttention | None = None
    """Both are attended to so, in place of the first two."""


def make_parted(name: ListedName | Literal["reference"], tile: int, *, dense: bool = True) -> PartedAttention:
    """In that way of `listed_tiles`; "reference" gathers.

    Args:
        name: Of the way.
        tile: Slots of a tile.
        dense: Runs of slots by a dense kernel, where the way has one.
    Raises:
        ImportError: Its package is not installed.
    """
    if name == "reference":

        def gathered(q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor) -> tuple[Tensor, Tensor]:
            return attend_gathered_lse(q_QNW, k_NLW, v_NLD, index_NIJ, tile)

        return PartedAttention(gathered, None, compose_plain, copied(gathered))
    listed, into = make_attend_lse(name, tile), make_attend_into(name, tile)
    if name == "torch":
        return PartedAttention(listed, None, compose_plain, into)
    from workers.kernels.triton_compose import compose

    return PartedAttention(listed, _make_flash_run() if dense and name == "flash-attn-4" else None, compose, into)


def make_rounded(ways: PartedAttention, tile: int) -> PartedAttention:
    """Composed in the same way, attended to with the rounding of 8-bit floats, by plain torch and more slowly."""
    from workers.kernels.fp8_plain import attend_coded_plain

    def listed(q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor) -> tuple[Tensor, Tensor]:
        return attend_coded_plain(q_QNW, k_NLW, v_NLD, index_NIJ, tile)

    def run(q_QNW: Tensor, k_NKW: Tensor, v_NKD: Tensor) -> tuple[Tensor, Tensor]:
        return attend_coded_plain(q_QNW, k_NKW, v_NKD, None, tile)

    return PartedAttention(listed, run, ways.compose, copied(listed))


def make_coded(ways: PartedAttention) -> PartedAttention:
    """Composed in the same way, attended to by the kernel that multiplies 8-bit floats."""
    from workers.kernels.fp8_tiles import attend_coded, code_chunk, code_values

    return ways._replace(coded=CodedAttention(code_chunk, attend_coded, code_values))


def compose_plain(out_a_QND: Tensor, lse_a_QN: Tensor, out_b_QND: Tensor, lse_b_QN: Tensor) -> Tensor:
    """The reference, in the dtype of the log-sum-exps."""
    a, b = (x.to(lse_a_QN.dtype) for x in (out_a_QND, out_b_QND))
    return merge(a, lse_a_QN, b, lse_b_QN)[0].to(out_a_QND.dtype)


def _make_flash_run() -> AttendRun:
    from flash_attn.cute.interface import _flash_attn_fwd

    def attend(q_QNW: Tensor, k_NKW: Tensor, v_NKD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = k_NKW.transpose(0, 1)[None], v_NKD.transpose(0, 1)[None]
        scale = v_NKD.shape[-1] ** -0.5
        out, lse = _flash_attn_fwd(q_QNW[None], k, v, softmax_scale=scale, num_splits=1, return_lse=True)[:2]
        return out[0], lse[0].T

    return attend
