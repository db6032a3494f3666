"""Files of tensors, opened without reading them: what a file holds is known first, its numbers come tensor by tensor.

Safetensors (one file, or shards with an index) are read into one small buffer, torch's zip files are mapped into memory
and their pages let go of as soon as they are copied: the host never holds a second copy of a model. A pickle is opened
with `weights_only=True` alone, so that no code of a file ever runs.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import mmap
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from workers.errors import CheckpointMismatch

PIECE_BYTES = 8 << 20
"""Read and copied at a time: large enough for full disk speed, small beside any model."""
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    key: str
    """Its name in the file."""
    pieces: Callable[[], Iterator[Tensor]]
    """Its numbers in order, flat, at most PIECE_BYTES at a time; a piece is valid until the next one is asked for."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def reshaped(self, shape: tuple[int, ...]) -> Stored:
        """The same numbers under another shape."""
        assert math.prod(shape) == math.prod(self.shape)
        return replace(self, shape=shape)

    def share(self, index: int, count: int) -> Stored:
        """One of `count` equal runs of rows."""
        rows, *rest = self.shape
        assert rows % count == 0
        num = math.prod(self.shape) // count
        pieces = functools.partial(_cut, self.pieces, index * num, (index + 1) * num)
        return replace(self, shape=(rows // count, *rest), pieces=pieces)

    def read(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own.

        Raises:
            CheckpointMismatch: A number is NaN or infinite.
        """
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        flat, start = out.view(-1), 0
        for piece in self.pieces():
            if piece.is_floating_point() and not _is_finite(piece):
                raise CheckpointMismatch(f"{self.file}: tensor {self.key} holds NaN or infinity; fetch the file again")
            flat[start : start + len(piece)].copy_(piece)
            start += len(piece)
        return out


def _cut(pieces: Callable[[], Iterator[Tensor]], start: int, stop: int) -> Iterator[Tensor]:
    at = 0
    for piece in pieces():
        if at + len(piece) > start and at < stop:
            yield piece[max(0, start - at) : stop - at]
        at += len(piece)


def open_tensors(path: Path) -> dict[str, Stored]:
    """All tensors of one safetensors file, of an index with its shards, or of a torch file that is one flat dict.

    Raises:
        CheckpointMismatch: The file is cut off, of another kind, or holds more than tensors; the message names it.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    if path.suffix in TORCH_SUFFIXES:
        return as_stored(open_torch_file(path), path)
    return _open_safetensors(path)


def shards_of(index: Path) -> dict[str, str]:
    """Tensor -> file name, as an index says."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is empty")
        if not all(isinstance(v, str) and Path(v).name == v for v in weight_map.values()):
            raise ValueError("weight_map must map tensors to plain file names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatch(f"{index}: is no index of safetensors shards ({error!r}); fetch it again") from error
    return cast(dict[str, str], weight_map)


def _open_shards(index: Path) -> dict[str, Stored]:
    weight_map = shards_of(index)
    found: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.exists():
            raise CheckpointMismatch(f"{shard}: missing; {index.name} names it. Fetch it into the same folder")
        found.update(_open_safetensors(shard))
    absent = sorted(weight_map.keys() - found.keys())
    if absent:
        raise CheckpointMismatch(
            f"{index}: {len(absent)} tensors are in none of its shards (first: {', '.join(absent[:3])}); the index "
            "and the shards are of different models: fetch all of them again"
        )
    return found


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointMismatch(
                    f"{path}: no safetensors file, or cut off in its header ({size} bytes); expected a safetensors "
                    "file. Fetch it again"
                )
            header = json.loads(file.read(length))
        start = 8 + length
        tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
        end = start + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        found = {key: _entry(path, key, entry, start) for key, entry in tensors.items()}
    except FileNotFoundError:
        raise CheckpointMismatch(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(f"{path}: no safetensors file ({error!r}); fetch it again") from error
    if size != end:
        raise CheckpointMismatch(
            f"{path}: cut off or altered: it has {size} bytes, its header promises {end}; fetch it again"
        )
    return found


def _entry(path: Path, key: str, entry: Mapping[str, Any], start: int) -> Stored:
    shape = tuple(int(n) for n in entry["shape"])
    if entry["dtype"] not in _DTYPES:
        raise CheckpointMismatch(
            f"{path}: tensor {key} is stored as {entry['dtype']}; expected one of {', '.join(_DTYPES)}. Quantised "
            "files cannot be loaded: take the published bfloat16 or float32 file"
        )
    dtype = _DTYPES[entry["dtype"]]
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise CheckpointMismatch(f"{path}: tensor {key} has {last - first} bytes, which is no {shape} of {dtype}")
    return Stored(shape, dtype, path, key, functools.partial(_read_pieces, path, start + first, last - first, dtype))


def _read_pieces(path: Path, offset: int, num_bytes: int, dtype: torch.dtype) -> Iterator[Tensor]:
    # Pages of its own, which go back to the system: on the heap it would leave holes between the tensors.
    view = memoryview(mmap.mmap(-1, max(1, min(num_bytes, PIECE_BYTES))))
    buffer = torch.frombuffer(view, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        left = num_bytes
        while left:
            size = min(left, PIECE_BYTES)
            have = 0
            while have < size:
                got = file.readinto(view[have:size])
                if not got:
                    raise CheckpointMismatch(f"{path}: became shorter while it was read")
                have += got
            yield buffer[:size].view(dtype)
            left -= size


def open_torch_file(path: Path) -> dict[str, Any]:
    """What a `.pt` or `.pth` holds: a dict, perhaps of dicts, of tensors that are still on disk.

    Raises:
        CheckpointMismatch: Cut off, no torch file, or it asks for Python objects (whose code would run).
    """
    try:
        # The form before torch 1.6 cannot be mapped: it is read whole.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise CheckpointMismatch(
            f"{path}: holds Python objects besides tensors, or is no torch file; such a file is never unpickled, "
            "because its code would run. Expected a dict of tensors: fetch it again, or convert it to safetensors "
            f"where you trust it ({_first_line(error)})"
        ) from error
    except FileNotFoundError:
        raise CheckpointMismatch(f"{path}: no such file") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointMismatch(
            f"{path}: cut off, or no file of torch.save; expected a dict of tensors: fetch it again "
            f"({_first_line(error)})"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointMismatch(f"{path}: holds a {type(found).__name__}; expected a dict of tensors")
    return found


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def as_stored(tensors: Mapping[str, Any], path: Path) -> dict[str, Stored]:
    """The tensors of a dict that came from a torch file.

    Raises:
        CheckpointMismatch: A value is no tensor.
    """
    strangers = [f"{key} ({type(value).__name__})" for key, value in tensors.items() if not isinstance(value, Tensor)]
    if strangers or not tensors:
        raise CheckpointMismatch(
            f"{path}: expected a flat dict of tensors, found {', '.join(strangers[:5]) or 'an empty one'}"
        )
    is_mapped = _is_zip(path)
    return {
        key: Stored(tuple(value.shape), value.dtype, path, key, functools.partial(_flat_pieces, value, is_mapped))
        for key, value in tensors.items()
    }


def _flat_pieces(tensor: Tensor, is_mapped: bool) -> Iterator[Tensor]:
    is_view = is_mapped and tensor.is_contiguous()  # else it was saved with strides, and is copied here
    for piece in tensor.detach().reshape(-1).split(max(1, PIECE_BYTES // tensor.dtype.itemsize)):
        yield piece
        if is_view:
            _let_go(piece)


def _let_go(piece: Tensor) -> None:
    """Tell the system that these pages of a mapped file are not needed: they are clean and come back when touched."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    first = -(-piece.data_ptr() // page) * page  # whole pages inside the piece only
    last = (piece.data_ptr() + piece.nbytes) // page * page
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _is_finite(piece: Tensor) -> bool:
    """A finite sum proves it in one pass; another sum may only have overflowed."""
    return bool(piece.sum().isfinite()) or bool(piece.isfinite().all())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
