"""The loop over a tile table against the plain rollout: the same where all is kept and seen, and when it merges."""

from dataclasses import replace

import pytest
import torch

from tests.tables import make_captured
from workers.assemble_tiles import size_table
from workers.attention.dense import DenseAttention
from workers.attention.tile_choice import Estimate, TileChoice
from workers.cache.dense import DenseCache
from workers.cache.layer_table import LayerTable
from workers.cache.low_bit import Storage
from workers.cache.packed_table import PackedTable
from workers.cache.table_codes import CodedStorage, decode_into
from workers.cache.tile_table import TileTable
from workers.contracts import KVCache
from workers.denoise import draw_noise, make_schedule
from workers.errors import NonFiniteLatents
from workers.kernels.sdpa import SdpaKernel
from workers.key_codes import KeyCodes
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import find_backbone
from workers.model.dit import CausalDiT
from workers.rollout import CleanChunk, Rollout, RolloutPlan

BACKBONE = find_backbone("tiny-test")
ROWS, COLUMNS = 2, 3
SIZE, SHAPE = (2 * ROWS, 2 * COLUMNS), (1, 3, 16, 2 * ROWS, 2 * COLUMNS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    torch.manual_seed(4)
    dit = CausalDiT(BACKBONE)
    dit.reset_parameters(zero_output=False)
    return dit.eval().requires_grad_(False)


def make_plan(model: CausalDiT, num_chunks: int, switch_at: int = 99) -> RolloutPlan:
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randn(1, rows, BACKBONE.text_dim, generator=generator) for rows in (7, 5)]
    masses = [torch.randn(1, text.shape[1], generator=generator) for text in texts]
    prompts = [model.project_prompt(text, mass) for text, mass in zip(texts, masses, strict=True)]

    def control(index: int) -> torch.Tensor:
        return torch.randn((1, 3, BACKBONE.control_channels, *SIZE), generator=torch.Generator().manual_seed(index))

    return RolloutPlan(
        num_chunks=num_chunks,
        latent_size=SIZE,
        schedule=make_schedule(3, 3.0),
        guidance=1.0,
        noise=lambda chunk, step: draw_noise(11, chunk, step, SHAPE),
        prompt=lambda index: [prompts[index >= switch_at]],
        control=control,
    )


def roll_plainly(model: CausalDiT, plan: RolloutPlan, cache: KVCache) -> list[CleanChunk]:
    attention = RolloutAttention(BACKBONE, cache, DenseAttention(), SdpaKernel())
    return list(Rollout(model, attention, Stopwatch(CPU)).run(plan))


def assert_same(found: list[CleanChunk], expected: list[CleanChunk]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.latents_BTCHW, b.latents_BTCHW, rtol=1e-4, atol=1e-4)


def test_keeping_and_seeing_all_is_dense_attention(model: CausalDiT) -> None:
    plan = make_plan(model, 6, switch_at=3)
    sizes = size_table(BACKBONE, SIZE, kept_chunks=8, tile=8)
    found = list(make_captured(model, sizes, SIZE, num_chosen=999).run(plan))
    assert_same(found, roll_plainly(model, plan, DenseCache(BACKBONE.num_layers)))
    assert found[0].density == 1.0


@pytest.mark.parametrize("candidate_tiles", [None, 2])
def test_a_table_that_merges_is_the_same_cache_in_both_loops(model: CausalDiT, candidate_tiles: int | None) -> None:
    plan = make_plan(model, 9)
    sizes = size_table(
        BACKBONE, SIZE, kept_chunks=2, spare_chunks=2, tile=8, candidate_tiles=candidate_tiles, decay=0.2
    )
    found = list(make_captured(model, sizes, SIZE, num_chosen=999).run(plan))
    table = TileTable(sizes, torch.float32, CPU)
    assert_same(found, roll_plainly(model, plan, table))
    assert all(bool((layer.m_NC > 1).any()) for layer in table.layers)


def test_seeing_fewer_tiles_changes_little_and_is_counted(model: CausalDiT) -> None:
    plan = make_plan(model, 5)
    sizes = size_table(BACKBONE, SIZE, kept_chunks=8, tile=8)
    dense = list(make_captured(model, sizes, SIZE, num_chosen=999).run(plan))
    sparse = list(make_captured(model, sizes, SIZE, num_chosen=2, always_sink=True).run(plan))
    assert sparse[-1].density < 0.9 < dense[-1].density
    distance = (sparse[-1].latents_BTCHW - dense[-1].latents_BTCHW).square().mean().sqrt()
    assert 0 < float(distance) < 0.5 * float(dense[-1].latents_BTCHW.std())


def test_a_video_after_another_is_as_if_it_came_first(model: CausalDiT) -> None:
    plan = make_plan(model, 5)
    sizes = size_table(BACKBONE, SIZE, kept_chunks=1, spare_chunks=1, tile=8)
    rollout = make_captured(model, sizes, SIZE, num_chosen=3)
    first = list(rollout.run(plan))
    rollout.table.clear()
    second = list(rollout.run(plan))
    assert all(torch.equal(a.latents_BTCHW, b.latents_BTCHW) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("storage", "estimate"), [("int8", "exact"), ("int4", "exact"), ("int4", "quant")])
def test_what_nobody_sees_of_a_packed_table_may_be_anything(
    model: CausalDiT, storage: Storage, estimate: Estimate, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Littered(PackedTable):
        """Its unlisted tiles, and before a choice what is not sampled, are full of what is not there."""

        def lay_out(self, layer_index: int, *, seen_only: bool = False) -> LayerTable:
            found = super().lay_out(layer_index, seen_only=seen_only)
            if seen_only:
                unseen = (self._is_seen_LNJ[layer_index] == 0).repeat_interleave(self.settings.tile, 1)
                self.num_unseen += int(unseen.sum())
                for x in (found.k_NLW, found.v_NLD):
                    x[unseen] = 50 * torch.randn(x[unseen].shape)
            return found

        def lay_out_sample(self, layer_index: int, slot_R: torch.Tensor) -> LayerTable:
            self.workspace.k_NLW[..., : self.settings.head_dim + 2].normal_(std=50)
            return super().lay_out_sample(layer_index, slot_R)

        num_unseen = 0

    class Whole(PackedTable):
        """All keys are laid out before a choice."""

        def lay_out_sample(self, layer_index: int, slot_R: torch.Tensor) -> LayerTable:
            return self.lay_out(layer_index)

    plan = make_plan(model, 9)
    sizes = size_table(BACKBONE, SIZE, kept_chunks=2, spare_chunks=2, tile=8, rule="pairs", storage=storage)
    found = []
    for kind in (Whole, PackedTable, Littered):
        monkeypatch.setattr("tests.tables.make_table", kind)
        rollout = make_captured(model, sizes, SIZE, num_chosen=2, estimate=estimate, keys_per_tile=2)
        lists = [index for index, _ in rollout._lists[False]]
        found.append([(chunk.latents_BTCHW, torch.stack(lists)) for chunk in rollout.run(plan)])
    assert isinstance(rollout.table, Littered)
    assert rollout.table.num_unseen > 0
    for whole, *others in zip(*found, strict=True):
        assert all(torch.equal(a, b) for other in others for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_choice_that_takes_codes_gets_them_and_nothing_is_unpacked_for_it(
    model: CausalDiT, storage: CodedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its layer's keys can be told from them: the lists and latents of a choice among unpacked ones."""

    class OfCodes(TileChoice):
        def takes_codes(self, keys: KeyCodes | None) -> bool:
            return keys is not None

        def choose(
            self,
            q_QNW: torch.Tensor,
            keys: torch.Tensor | KeyCodes,
            index_NIJ: torch.Tensor,
            clean_NIJ: torch.Tensor | None = None,
        ) -> None:
            assert isinstance(keys, KeyCodes)
            end, start = keys.end_NLW, keys.history_start
            history = end.new_zeros(len(end), keys.code_NCB.shape[1], end.shape[2])
            decode_into(keys.code_NCB, keys.largest_NCG, history[..., : BACKBONE.head_dim], storage)
            history[..., BACKBONE.head_dim : BACKBONE.head_dim + 2] = keys.mass_NC2
            whole = torch.cat((end[:, :start], history, end[:, start:]), 1)
            super().choose(q_QNW, whole, index_NIJ, clean_NIJ)

    plan = make_plan(model, 9)
    sizes = size_table(BACKBONE, SIZE, kept_chunks=2, spare_chunks=2, tile=8, rule="pairs", storage=storage)
    found = []
    for kind in (TileChoice, OfCodes):
        monkeypatch.setattr("tests.tables.TileChoice", kind)
        rollout = make_captured(model, sizes, SIZE, num_chosen=2, keys_per_tile=2)
        lists = [index for index, _ in rollout._lists[False]]
        found.append([(chunk.latents_BTCHW, torch.stack(lists)) for chunk in rollout.run(plan)])
        monkeypatch.setattr(PackedTable, "lay_out_sample", None)
    for by_keys, by_codes in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(by_keys, by_codes, strict=True))


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_few_bits_change_little_and_take_less(model: CausalDiT, storage: Storage) -> None:
    plan = make_plan(model, 9)
    sizes = size_table(BACKBONE, SIZE, kept_chunks=2, spare_chunks=2, tile=8, rule="pairs")
    wide, packed = (
        list(make_captured(model, replace(sizes, storage=bits), SIZE, num_chosen=999).run(plan))
        for bits in ("model", storage)
    )
    distance = (packed[-1].latents_BTCHW - wide[-1].latents_BTCHW).square().mean().sqrt()
    assert 0 < float(distance) < 0.2 * float(wide[-1].latents_BTCHW.std())
    assert packed[-1].kv_bytes < 0.7 * wide[-1].kv_bytes


def test_compiled_pieces_give_the_same(model: CausalDiT) -> None:
    plan = make_plan(model, 3)
    sizes = size_table(BACKBONE, SIZE, kept_chunks=1, spare_chunks=1, tile=8)
    plain = list(make_captured(model, sizes, SIZE, num_chosen=3).run(plan))
    rollout = make_captured(model, sizes, SIZE, num_chosen=3, backend="aot_eager")
    assert_same(list(rollout.run(plan)), plain)


def test_no_chunk_with_nan_is_remembered(model: CausalDiT) -> None:
    plan = make_plan(model, 4)

    def noise(chunk: int, step: int) -> torch.Tensor:
        return draw_noise(11, chunk, step, SHAPE) * (float("nan") if chunk == 2 else 1.0)

    rollout = make_captured(model, size_table(BACKBONE, SIZE, tile=8), SIZE, num_chosen=3)
    with pytest.raises(NonFiniteLatents):
        list(rollout.run(replace(plan, noise=noise)))
    assert rollout.table.layers[0].num_chunks == 2
