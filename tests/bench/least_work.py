"""The bytes and operations that the parts of a chunk over a tile table cannot do without, and how long bytes take.

Each kernel reads and writes once what it needs, as kernels are now: a new way of doing a part needs a new count here.
What is small enough to stay in a GPU's cache (scales, modulation, records of links) is not counted.
"""

from __future__ import annotations

from tests.bench.history_engine import Engine
from workers.cache.packed_table import PackedTable
from workers.cache.table_codes import CodedStorage, coded_bytes
from workers.cache.table_layout import TableSettings
from workers.model.fp8_linears import LinearWeights
from workers.model.prompt_attention import hold_prompt
from workers.model.static_layers import LayerWeights

COPY_TB_PER_S = 4.2
"""What bytes are counted at: a copy reaches 4.26 on an H200, whose data sheet says 4.8."""
BYTES_NOTE = f"least_ms: what bytes take at {COPY_TB_PER_S} TB/s, the pace of a copy on an H200."
UNPACKING = "unpacking in calls"
PASSES = "norms, rotations, gates, cross-attention; codes"
"""On a GPU all of cross-attention; where the compiler does it, its products count as linear layers."""
Work = tuple[float, float]
"""GB that must move and TFLOP that must be done for a chunk."""


def milliseconds_of(gigabytes: float) -> float:
    """At the pace of a copy."""
    return gigabytes / COPY_TB_PER_S


def least_work(engine: Engine) -> dict[str, Work]:
    """By part; calls of the model are made to see how many tiles they read."""
    s, size = engine.sizes, engine.table.dtype.itemsize
    rows, key, value = s.num_layers * s.num_heads, s.width * size, s.head_dim * size
    looked_at = _query_tiles(s) * (s.candidate_tiles or 0) * s.tile
    of_old = value if s.storage == "model" else coded_bytes(s.head_dim, s.storage)  # what is old is read where it lies
    compared = s.chunk_tokens * (s.frame_tokens + (s.candidate_tiles or 0) * s.tile)
    means = s.history_slots // s.tile * value
    # Turned back are the keys of the chunk and of the latent frame before; what is turned is written and read twice.
    matched = (s.chunk_tokens + s.frame_tokens) * 3 * value + s.chunk_tokens * value + looked_at * of_old + means
    moved = 4
    if isinstance(engine.table, PackedTable) and engine.table._kernels is not None:
        # A chunk is moved once, to the newest; from there keys are turned back, and codes and records are written.
        matched += s.chunk_tokens * (key + 2 * of_old + 24) + s.frame_tokens * (of_old - value)
        moved = 2
    return {
        "moving chunks": (rows * s.chunk_tokens * (key + value) * moved / 1e9, 0.0),
        "matching": (rows * matched / 1e9, rows * compared * s.head_dim * 2 / 1e12),
        "merging": (_least_merging(s, size) * s.num_layers / s.spare_chunks, 0.0),
        "selection": _least_selection(engine, rows),
        PASSES: (_least_passes(engine), 0.0),
        **_least_packing(engine),
    }


def least_of_merge(s: TableSettings, storage: CodedStorage) -> dict[str, float]:
    """GB of one merge of a packed layer by kernel; a partner's value is counted as if it lay in a cache."""
    slots, kept, given_up = (s.num_heads * num for num in (s.history_tokens, s.kept_tokens, s.spare_tokens))
    codes = coded_bytes(s.head_dim, storage)
    if s.rule == "pairs":  # distances are known but of keys that are new, or whose partner has changed since
        compared = {
            "_value_distances": slots * (codes + 16),
            "_key_distances": 2 * given_up * (2 * codes + 28),
        }
    else:
        compared = {"pair_cosine": slots * (codes + 24)}
    bytes_of = compared | {
        "move_rows": kept * (4 * codes + 92),
        "average_rows": given_up * 3 * codes,
        "_weigh": given_up * (2 * codes + 56),
    }
    return {kernel: num / 1e9 for kernel, num in bytes_of.items()}


def bytes_of_passes(w: LayerWeights, num_tokens: int, num_heads: int, prompt_rows: int) -> int:
    """Of one layer in one call: all that `static_layers.py` does between linear layers, and codes of weights.

    Args:
        w: Of the layer; which products are of codes is theirs to say.
        num_tokens: Of a chunk.
        num_heads: Of the model.
        prompt_rows: Keys of cross-attention, filled up.
    """
    size, width = w.norm_q_E.element_size(), w.norm_q_E.numel()
    stream = num_tokens * width * size

    def taken(linear: LinearWeights) -> int:
        """A product's inputs, as what comes before writes them."""
        return num_tokens * width if _is_coded(linear) else stream

    def attended(linear: LinearWeights) -> int:
        """What attention wrote, encoded, or read as it lies."""
        return stream + taken(linear) if _is_coded(linear) else 0

    enter = 3 * stream + taken(w.qkv)  # what the layer before ends with is added here
    rotate = 6 * stream + num_tokens * width // num_heads * 4  # with cosines and sines, in float32
    to_cross = attended(w.out) + 3 * stream + taken(w.cross_q)
    cross = 3 * stream + 2 * prompt_rows * width * size  # queries twice, for their norm is over all heads
    to_ffn = attended(w.cross_out) + 3 * stream + taken(w.up)
    # GELU is in the product but for codes.
    gelu = num_tokens * w.up.weight_OI.shape[0] * (size + 1) if _is_coded(w.down) else 0
    linears = (w.qkv, w.out, w.cross_q, w.cross_out, w.up, w.down)
    codes = sum(linear.weight_OI.numel() * (size + 1) for linear in linears if _is_coded(linear))
    return enter + rotate + to_cross + cross + to_ffn + gelu + codes


def _is_coded(linear: LinearWeights) -> bool:
    return linear.scale_1O is not None


def _least_passes(engine: Engine) -> float:
    """GB. The clean pass has weights of its own; embedding and the end of the model are not counted."""
    layers, s = engine.rollout._layers, engine.sizes
    prompt_rows = hold_prompt(engine.prompt[:1])[0].k_NPD.shape[1]

    def of_call(weights: list[LayerWeights]) -> int:
        return sum(bytes_of_passes(w, s.chunk_tokens, s.num_heads, prompt_rows) for w in weights)

    steps = engine.num_calls - 1
    return (steps * of_call(layers.weights) + of_call(layers.clean_weights)) / 1e9


def _least_merging(s: TableSettings, size: int) -> float:
    """GB of one merge of one layer."""
    if s.storage != "model":
        return sum(least_of_merge(s, s.storage).values())
    key, value = s.width * size, s.head_dim * size
    # Each key with its partner (of pairs values too), those given up with that of their group, their values, and all
    # that is kept, both ways.
    compared = 2 * (key + value if s.rule == "pairs" else key)
    of_head = s.history_tokens * (compared + 48) + s.spare_tokens * (2 * key + value)
    return s.num_heads * (of_head + s.kept_tokens * 2 * (key + value)) / 1e9


def _least_selection(engine: Engine, rows: int) -> Work:
    """Sampled keys and queries; the mass of each tile for each such query is written, and read for each list."""
    s, v, key = engine.sizes, engine.variant, engine.sizes.width * engine.table.dtype.itemsize
    tiles, lists = s.num_slots // s.tile, 1 + engine.chooser.has_clean_list
    keys, queries, of_key = tiles * v.keys_per_tile, _query_tiles(s) * v.queries_per_tile, key
    if isinstance(engine.table, PackedTable) and engine.chooser.takes_codes(engine.table.key_codes(0)):
        assert s.storage != "model"
        of_key = coded_bytes(s.head_dim, s.storage) + 4
    moved, done = keys * of_key + queries * (key + tiles * 4 * (1 + lists)), keys * queries * s.head_dim * 2
    choices = len(engine.choose_at) * rows
    return choices * moved / 1e9, choices * done / 1e12


def _least_packing(engine: Engine) -> dict[str, Work]:
    """Of a packed history: between codes and channels."""
    s, table = engine.sizes, engine.table
    if not isinstance(table, PackedTable) or s.storage == "model":
        return {}
    size, rows = table.dtype.itemsize, s.num_layers * s.num_heads
    coded, key, value = coded_bytes(s.head_dim, s.storage), s.width * size, s.head_dim * size
    of_key, of_value = coded + 2 * size + key, coded + value
    # Plain torch lays out a chunk that is taken over and the latent frame before; kernels read them where they lie.
    brought = s.chunk_tokens * 2 * (key + value) + s.frame_tokens * of_key
    sampled = len(engine.choose_at) * engine.variant.keys_per_tile / s.tile
    looks = 0.0 if engine.chooser.takes_codes(table.key_codes(0)) else sampled * of_key
    for tables, clean in zip(_tables_laid_out(engine, table), (False, True), strict=True):
        in_8_bits = 2 * coded + 2 * size + 2 * s.head_dim + 16  # log m of each key beside
        looks += tables * (in_8_bits if engine.rollout.reads_coded(clean=clean) else of_key + of_value)
    packed = s.chunk_tokens * 2 * (coded + value + size)  # what merges is written as codes at once
    return {
        UNPACKING: (rows * s.num_slots * looks / 1e9, 0.0),
        "unpacking": (rows * brought / 1e9, 0.0),
        "packing": (rows * packed / 1e9, 0.0),
    }


def _tables_laid_out(engine: Engine, table: PackedTable) -> tuple[float, float]:
    """By the steps of a chunk that look at the history, and by the clean pass: how many whole tables that is."""
    engine.rollout.replay(True)
    of_step = table.seen_share
    engine.rollout.replay(False, clean=True)
    return (engine.num_looking - 1) * of_step, table.seen_share


def _query_tiles(s: TableSettings) -> int:
    return -(-s.chunk_tokens // s.tile)
