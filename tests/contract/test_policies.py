"""One class of tests for every AttentionPolicy: what a plan promises, whatever it leaves out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.attention.ann_self import AnnSelfAttention, AnnSettings
from workers.attention.dense import DenseAttention
from workers.attention.gate import GatedAttention
from workers.attention.history import DenseRegion
from workers.attention.radial import RadialAttention, RadialSettings
from workers.attention.streaming import StreamingAttention
from workers.attention.svg import SvgAttention, SvgSettings
from workers.attention.svg2 import Svg2Attention, Svg2Settings
from workers.config import SearchName
from workers.contracts import (
    AttentionPlan,
    AttentionPolicy,
    KeyValues,
    Moment,
    PlanPart,
    PlansAfterRope,
    TiledKeys,
    Tiles,
)
from workers.kernels.reference import ReferenceKernel
from workers.search.select import make_search

ROWS, COLUMNS, HEADS, DIM, CHUNK = 3, 5, 2, 8, 3
FRAME = ROWS * COLUMNS
SINK, RECENT, TILE = 2 * FRAME, FRAME + 4, 8  # none of them divides the others
SPARSE = Moment(chunk_index=9, step_index=3, num_steps=4, noise_level=0.5)
REGION = DenseRegion(SINK, RECENT)
EVERYWHERE = 10**6


@dataclass(frozen=True)
class Made:
    """A policy as it is used, and one set so that it sees everything."""

    usual: Callable[[], AttentionPolicy]
    full: Callable[[], AttentionPolicy]


def make_annsa(search: SearchName, density: float, **more: Any) -> AnnSelfAttention:
    settings = AnnSettings(SINK, RECENT, density, query_tile=4, key_tile=TILE, **more)
    return AnnSelfAttention(settings, make_search(search), None)


POLICIES: dict[str, Made] = {
    "dense": Made(DenseAttention, DenseAttention),
    "streaming": Made(lambda: StreamingAttention(REGION), lambda: StreamingAttention(DenseRegion(SINK, EVERYWHERE))),
    "annsa": Made(lambda: make_annsa("quant", 0.3), lambda: make_annsa("quant", 0.9999)),
    "annsa-by-bucket": Made(
        lambda: make_annsa("lsh", 0.3, order="bucket", num_buckets=4),
        lambda: make_annsa("lsh", 0.9999, order="bucket", num_buckets=4),
    ),
    "radial": Made(
        lambda: RadialAttention(RadialSettings(REGION, TILE)),
        lambda: RadialAttention(RadialSettings(REGION, TILE, decay=1e6)),
    ),
    "svg": Made(
        lambda: SvgAttention(SvgSettings(REGION, TILE, num_samples=7)),
        lambda: SvgAttention(SvgSettings(REGION, TILE, density=1.0)),
    ),
    "svg2": Made(
        lambda: Svg2Attention(Svg2Settings(REGION, query_tile=4, key_tile=TILE, keys_per_cluster=16, top_p=0.5)),
        lambda: Svg2Attention(Svg2Settings(REGION, query_tile=4, key_tile=TILE, top_p=1.0)),
    ),
}


@dataclass(frozen=True)
class Scene:
    """What a policy is asked about."""

    q_BQND: Tensor
    position_Q3: Tensor
    cached: KeyValues | None
    own: KeyValues


def positions(first: int, num: int) -> Tensor:
    time, row, column = torch.arange(first, first + num), torch.arange(ROWS), torch.arange(COLUMNS)
    return torch.cartesian_prod(time, row, column).float()


def make_scene(num_frames: int, *, batch: int = 1, merged: bool = False, seed: int = 0) -> Scene:
    """A chunk after `num_frames` cached ones; `merged` is a history as TempCache gives it: other tokens per head,
    some standing for many, some for none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, dtype=torch.float64, generator=generator)

    position = positions(num_frames, CHUNK)
    num = CHUNK * FRAME
    own = KeyValues(draw(num, HEADS, DIM), draw(num, HEADS, DIM), position)
    num_keys = num_frames * FRAME
    cached = None
    if num_keys and merged:
        order = torch.rand(batch, HEADS, num_keys - SINK - RECENT, generator=generator).argsort(-1) + SINK
        ends = torch.arange(SINK), torch.arange(num_keys - RECENT, num_keys)
        ends_BNK = [end.expand(batch, HEADS, -1) for end in ends]
        where = torch.cat((ends_BNK[0], order, ends_BNK[1]), -1)
        mass = torch.rand(batch, HEADS, num_keys, dtype=torch.float64, generator=generator) * 3
        mass[..., SINK + 1 : num_keys - RECENT : 7] = -torch.inf
        position_BKN3 = positions(0, num_frames)[where].transpose(1, 2)
        cached = KeyValues(draw(num_keys, HEADS, DIM), draw(num_keys, HEADS, DIM), position_BKN3, mass)
    elif num_keys:
        cached = KeyValues(draw(num_keys, HEADS, DIM), draw(num_keys, HEADS, DIM), positions(0, num_frames))
    return Scene(draw(num, HEADS, DIM), position, cached, own)


SCENES: dict[str, Callable[[], Scene]] = {
    "first-chunk": lambda: make_scene(0),
    "all-within-sink-and-recent": lambda: make_scene(3),
    "one-frame-of-history": lambda: make_scene(5),
    "long": lambda: make_scene(40),
    "batch-of-two": lambda: make_scene(18, batch=2),
    "merged": lambda: make_scene(18, batch=2, merged=True),
}


def ask(policy: AttentionPolicy, scene: Scene, moment: Moment = SPARSE, layer_index: int = 1) -> AttentionPlan:
    policy.begin_chunk(scene.position_Q3)
    return policy.plan(layer_index, moment, scene.q_BQND, scene.cached, scene.own)


def source(part: PlanPart, scene: Scene) -> KeyValues:
    if part.source == "own":
        return scene.own
    assert scene.cached is not None
    return scene.cached


def mask_of(plan: AttentionPlan, scene: Scene) -> Tensor:
    """Who sees whom, bool [B, N, Q, cached + own keys]; a key planned twice fails."""
    num_cached = 0 if scene.cached is None else scene.cached.num_tokens
    batch, num = scene.q_BQND.shape[:2]
    times = torch.zeros(batch, HEADS, num, num_cached + num, dtype=torch.int64)
    for part in plan.parts:
        offset = num_cached if part.source == "own" else 0
        run = slice(offset + part.start, offset + part.stop)
        assert (times[..., run] == 0).all(), "runs overlap"
        times[..., run] += 1 if part.tiles is None else part.tiles.mask(num, part.stop - part.start).long()
    return times.bool()


def attend(plan: AttentionPlan, scene: Scene) -> tuple[Tensor, Tensor]:
    parts = [(source(part, scene).narrow(part.start, part.stop), part.tiles) for part in plan.parts]
    return ReferenceKernel().attend(
        scene.q_BQND, tuple(keys if tiles is None else TiledKeys(keys, tiles) for keys, tiles in parts)
    )


def assert_same_tiles(a: Tiles | None, b: Tiles | None) -> None:
    assert (a is None) == (b is None)
    if a is None or b is None:
        return
    assert (a.query_tile, a.key_tile) == (b.query_tile, b.key_tile)
    assert torch.equal(a.visible_BNIJ, b.visible_BNIJ)
    for x, y in ((a.query_order_BNQ, b.query_order_BNQ), (a.key_order_BNK, b.key_order_BNK)):
        assert (x is None) == (y is None)
        assert x is None or (y is not None and torch.equal(x, y))


@pytest.mark.parametrize("name", POLICIES)
class TestEveryPolicy:
    @pytest.mark.parametrize("scene_name", SCENES)
    def test_names_runs_that_exist_and_do_not_overlap(self, name: str, scene_name: str) -> None:
        scene = SCENES[scene_name]()
        plan = ask(POLICIES[name].usual(), scene)
        for part in plan.parts:
            assert 0 <= part.start < part.stop <= source(part, scene).num_tokens
        mask_of(plan, scene)

    @pytest.mark.parametrize("scene_name", SCENES)
    def test_every_query_sees_its_own_chunk_the_sink_and_the_newest_keys(self, name: str, scene_name: str) -> None:
        scene = SCENES[scene_name]()
        mask = mask_of(ask(POLICIES[name].usual(), scene), scene)
        num_cached = mask.shape[-1] - len(scene.position_Q3)
        assert mask[..., num_cached:].all()
        assert mask[..., : min(SINK, num_cached)].all()
        assert mask[..., max(0, num_cached - RECENT) : num_cached].all()

    @pytest.mark.parametrize("scene_name", SCENES)
    def test_tiles_have_the_shape_of_what_they_cut(self, name: str, scene_name: str) -> None:
        scene = SCENES[scene_name]()
        batch, num = scene.q_BQND.shape[:2]
        for part in ask(POLICIES[name].usual(), scene).parts:
            if part.tiles is None:
                continue
            tiles, num_keys = part.tiles, part.stop - part.start
            shape = (batch, HEADS, -(-num // tiles.query_tile), -(-num_keys // tiles.key_tile))
            assert tiles.visible_BNIJ.shape == shape
            assert tiles.visible_BNIJ.dtype == torch.bool
            for order, length in ((tiles.query_order_BNQ, num), (tiles.key_order_BNK, num_keys)):
                if order is not None:
                    assert order.dtype == torch.int64
                    assert torch.equal(order.sort(-1).values, torch.arange(length).expand(batch, HEADS, -1))

    @pytest.mark.parametrize("scene_name", SCENES)
    def test_equals_dense_when_set_to_see_everything(self, name: str, scene_name: str) -> None:
        scene = SCENES[scene_name]()
        plan = ask(POLICIES[name].full(), scene)
        expected = attend(ask(DenseAttention(), scene), scene)
        torch.testing.assert_close(attend(plan, scene), expected, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("scene_name", SCENES)
    def test_equals_softmax_over_what_its_mask_shows(self, name: str, scene_name: str) -> None:
        scene = SCENES[scene_name]()
        plan = ask(POLICIES[name].usual(), scene)
        seen = mask_of(plan, scene)
        keys = [scene.own] if scene.cached is None else [scene.cached, scene.own]
        logit = torch.einsum("bqnd,bknd->bnqk", scene.q_BQND, torch.cat([x.k_BKND for x in keys], 1)) / DIM**0.5
        if scene.cached is not None and scene.cached.log_mass_BNK is not None:
            mass = torch.cat((scene.cached.log_mass_BNK, scene.own.k_BKND.new_zeros(*seen.shape[:2], seen.shape[2])), 2)
            logit = logit + mass[:, :, None]
        weight = logit.masked_fill(~seen, -torch.inf).softmax(-1)
        out = torch.einsum("bnqk,bknd->bqnd", weight, torch.cat([x.v_BKND for x in keys], 1))
        torch.testing.assert_close(attend(plan, scene)[0], out, atol=1e-12, rtol=0)

    def test_is_dense_behind_a_gate_in_the_first_steps(self, name: str) -> None:
        scene, policy = make_scene(18), POLICIES[name].usual()
        gate = GatedAttention(policy, dense_step_share=0.3)
        assert mask_of(ask(gate, scene, Moment(chunk_index=9, step_index=0, num_steps=4)), scene).all()
        assert torch.equal(mask_of(ask(gate, scene), scene), mask_of(ask(policy, scene), scene))
        assert isinstance(gate, PlansAfterRope) == isinstance(policy, PlansAfterRope)

    @pytest.mark.parametrize("merged", [False, True])
    def test_is_a_function_of_what_it_is_asked(self, name: str, merged: bool) -> None:
        scene = make_scene(18, batch=2, merged=merged)
        policy, fresh = POLICIES[name].usual(), POLICIES[name].usual()
        ask(policy, make_scene(30, seed=5))  # another rollout: nothing of it may be left
        for moment in (SPARSE, Moment(9, noise_level=0.0, is_clean_pass=True)):
            a, b = ask(policy, scene, moment), ask(fresh, scene, moment)
            assert len(a.parts) == len(b.parts)
            for x, y in zip(a.parts, b.parts, strict=True):
                assert (x.source, x.start, x.stop) == (y.source, y.start, y.stop)
                assert_same_tiles(x.tiles, y.tiles)

    def test_changes_nothing_it_is_given(self, name: str) -> None:
        scene, same = make_scene(18, batch=2, merged=True), make_scene(18, batch=2, merged=True)
        ask(POLICIES[name].usual(), scene)
        assert scene.cached is not None
        assert same.cached is not None
        assert torch.equal(scene.q_BQND, same.q_BQND)
        assert torch.equal(scene.cached.k_BKND, same.cached.k_BKND)
        assert torch.equal(scene.cached.position_K3, same.cached.position_K3)

    def test_every_batch_entry_is_planned_by_itself(self, name: str) -> None:
        both = make_scene(18, batch=2, merged=True)
        mask = mask_of(ask(POLICIES[name].usual(), both), both)
        assert both.cached is not None
        assert both.cached.log_mass_BNK is not None
        for index in range(2):
            pick = slice(index, index + 1)
            old, own = both.cached, both.own
            cached = KeyValues(
                old.k_BKND[pick], old.v_BKND[pick], old.position_K3[pick], both.cached.log_mass_BNK[pick]
            )
            one = Scene(
                both.q_BQND[pick],
                both.position_Q3,
                cached,
                KeyValues(own.k_BKND[pick], own.v_BKND[pick], own.position_K3),
            )
            assert torch.equal(mask_of(ask(POLICIES[name].usual(), one), one)[0], mask[index])


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "dense"])
def test_a_sparse_policy_leaves_something_out(name: str) -> None:
    scene = make_scene(40)
    assert mask_of(ask(POLICIES[name].usual(), scene), scene).double().mean() < 0.8
