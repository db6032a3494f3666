"""What parts of a chunk cannot do without is counted as the kernels work now."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.bench import least_work, rollout_history
from tests.bench.history_engine import Engine, warm_up
from tests.tiny_wan import TINY
from workers.cache.packed_table import PackedTable
from workers.cache.table_codes import coded_bytes
from workers.cache.table_layout import TableSettings
from workers.model.dit import CausalDiT
from workers.model.fp8_linears import Fp8Linears
from workers.model.static_layers import StaticLayers

POLICY = replace(rollout_history.VARIANTS["fastar-tiles"], kept_chunks=2, spare_chunks=2, density=0.5)
AT_480P = TableSettings(30, 12, 128, 4680, 1560, kept_chunks=43, spare_chunks=5, rule="pairs", storage="int4")


def full_engine(**changes: object) -> Engine:
    """Its table has merged."""
    engine = rollout_history.engine_for(replace(POLICY, **changes), TINY)
    warm_up(engine, TINY)
    rollout_history.roll(engine, TINY, engine.chunks_to_fill)
    return engine


def shares_seen(engine: Engine) -> tuple[float, float]:
    """Of all tiles, those on some list of a step; on some of a clean pass."""
    tiles, shares = engine.sizes.num_slots // engine.sizes.tile, []
    for which in (0, 1):
        lists = [of_layer[which] for of_layer in engine.rollout._lists[False]]
        seen = [len(head.unique()) for listed in lists if listed is not None for head in listed]
        shares.append(sum(seen) / len(seen) / tiles)
    return shares[0], shares[1]


@torch.no_grad()
def test_only_calls_that_look_unpack() -> None:
    once = full_engine()
    found = least_work.least_work(once)[least_work.UNPACKING][0]
    step, clean = shares_seen(once)
    assert clean < step
    s, vector = once.sizes, once.sizes.head_dim * 4
    of_key, of_value = (coded_bytes(s.head_dim, "int4") + more for more in (8 + s.width * 4, vector))
    sampled = once.variant.keys_per_tile / s.tile * of_key
    slots = s.num_layers * s.num_heads * s.num_slots / 1e9
    assert found == pytest.approx(slots * ((step + clean) * (of_key + of_value) + sampled))
    always = full_engine(history_at=None)
    step, clean = shares_seen(always)
    found = least_work.least_work(always)[least_work.UNPACKING][0]
    assert found == pytest.approx(slots * ((2 * step + clean) * (of_key + of_value) + sampled))


@torch.no_grad()
def test_only_a_new_chunk_is_packed_and_merging_writes_codes_at_once() -> None:
    engine = full_engine()
    assert isinstance(engine.table, PackedTable)
    s, work = engine.sizes, least_work.least_work(engine)
    new = s.num_layers * s.num_heads * s.chunk_tokens
    assert work["packing"][0] == pytest.approx(new * 2 * (coded_bytes(s.head_dim, "int4") + s.head_dim * 4 + 4) / 1e9)
    of_layer = sum(least_work.least_of_merge(s, "int4").values())
    assert work["merging"][0] == pytest.approx(of_layer * s.num_layers / s.spare_chunks)


def test_a_merge_moves_kept_codes_once_and_no_kept_value() -> None:
    found = least_work.least_of_merge(AT_480P, "int4")
    kept, given_up = 12 * 43 * 4680, 12 * 5 * 4680
    assert found["move_rows"] == kept * (2 * 2 * (64 + 8) + 92) / 1e9
    assert found["average_rows"] == given_up * 3 * (64 + 8) / 1e9
    assert sum(found.values()) == pytest.approx(1.37, abs=0.01)


def make_layers(fp8: Fp8Linears) -> StaticLayers:
    torch.manual_seed(0)
    return StaticLayers(CausalDiT(TINY.backbone).to(torch.bfloat16).eval(), fp8)


@pytest.mark.parametrize(
    ("fp8", "streams", "codes", "coded"),
    [
        ("none", 21, 0, ()),
        # In place of a stream of inputs are codes of one byte; what attention wrote is encoded in a pass of its own.
        ("ffn", 20, 1, ("up", "down")),
        ("large", 19, 2, ("up", "down", "qkv")),
        ("all", 20, 5, ("up", "down", "qkv", "out", "cross_q", "cross_out")),
    ],
)
def test_passes_of_a_layer_are_counted_one_by_one(
    fp8: Fp8Linears, streams: int, codes: int, coded: tuple[str, ...]
) -> None:
    layers = make_layers(fp8)
    tokens, rows, (heads, dim) = 10, 16, (TINY.backbone.num_heads, TINY.backbone.head_dim)
    width, ffn = heads * dim, TINY.backbone.ffn_dim
    expected = tokens * width * (2 * streams + codes) + tokens * dim * 4 + 2 * rows * width * 2
    expected += sum(getattr(layers.weights[0], name).weight_OI.numel() for name in coded) * 3
    expected += tokens * ffn * 3 if coded else 0
    assert least_work.bytes_of_passes(layers.weights[0], tokens, heads, rows) == expected
    assert least_work.bytes_of_passes(layers.clean_weights[0], tokens, heads, rows) == (
        least_work.bytes_of_passes(make_layers("none").weights[0], tokens, heads, rows)
    )


@torch.no_grad()
def test_a_chunk_has_its_steps_in_8_bits_and_its_clean_pass_in_16() -> None:
    engine = full_engine(fp8="all")
    layers, s = engine.rollout._layers, engine.sizes
    step, clean = (
        least_work.bytes_of_passes(
            weights[0], s.chunk_tokens, s.num_heads, 16 * -(-engine.prompt[0].k_BPND.shape[1] // 16)
        )
        for weights in (layers.weights, layers.clean_weights)
    )
    found = least_work.least_work(engine)[least_work.PASSES][0]
    assert found == pytest.approx(s.num_layers * (2 * step + clean) / 1e9)
