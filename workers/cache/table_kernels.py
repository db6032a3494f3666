"""The kernels of a tile table, by the names its caller knows; importing this imports Triton."""

from workers.cache.triton_collect import merge_into_codes
from workers.cache.triton_match import match
from workers.cache.triton_merge import merge
from workers.cache.triton_pack import flag_listed, pack, unpack, unpack_sample, unpack_tiles

__all__ = ["flag_listed", "match", "merge", "merge_into_codes", "pack", "unpack", "unpack_sample", "unpack_tiles"]
