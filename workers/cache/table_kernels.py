"""The kernels of a tile table, by the names its caller knows; importing this imports Triton."""

from workers.cache.triton_collect import merge_into_codes
from workers.cache.triton_match import match, take_in
from workers.cache.triton_merge import merge
from workers.cache.triton_pack import flag_listed, pack, unpack, unpack_sample
from workers.cache.unpack_coded import unpack_coded

__all__ = [
    "flag_listed", "match", "merge", "merge_into_codes", "pack", "take_in", "unpack", "unpack_coded", "unpack_sample",
]  # fmt: skip
