"""The recall that a guard estimates against the exact one: equal where it can be, near where keys are only sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.attention.estimate import Logits, estimate_recall
from workers.attention.measure import exact_recall, scaled_logits
from workers.contracts import AuditKeys

HEADS, QUERIES, DIM, SINGLE, OWN = 4, 8, 32, 60, 40
seeds = st.integers(0, 2**31)


@dataclass
class History:
    """Keys of `num_groups` things seen again and again, each thing merged into its newest key."""

    seed: int
    num_tokens: int = 4000
    num_groups: int = 200
    noise: float = 0.3
    """How much one thing's keys differ; their cosine is about 1 / (1 + noise ** 2)."""
    sharp: float = 1.0
    evicted: float = 0.0
    """Share of the groups that the cache let go."""
    seen: float = 1.0
    """Share of the groups that a query sees."""
    weight: float = 1.0
    """Mass of a group over the number of its keys."""
    num_audit: int = 256
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        things, tokens = self.num_groups, self.num_tokens
        base = self.randn(1, things, HEADS, DIM)
        owner = torch.randint(0, things, (1, HEADS, tokens), generator=self.generator)
        original = base.gather(1, owner.transpose(1, 2)[..., None].expand(1, tokens, HEADS, DIM))
        original = original + self.noise * self.randn(*original.shape)
        newest = torch.zeros(1, HEADS, things, dtype=torch.long)
        newest.scatter_reduce_(-1, owner, torch.arange(tokens).expand_as(owner), "amax")
        merged = original.gather(1, newest.transpose(1, 2)[..., None].expand(1, things, HEADS, DIM))
        mass = torch.zeros(1, HEADS, things).scatter_add_(-1, owner, torch.ones(owner.shape))
        is_gone = torch.rand(1, HEADS, things, generator=self.generator) < self.evicted
        self.mass = mass
        self.log_mass = (mass.log() + math.log(self.weight)).masked_fill(is_gone, -math.inf)
        self.owner = owner.masked_fill(is_gone.gather(-1, owner), -1)
        picked = torch.randint(0, things, (QUERIES,), generator=self.generator)
        self.q = self.sharp * 0.7 * (base[:, picked] + self.randn(1, QUERIES, HEADS, DIM))
        self.original, self.merged = original, merged
        self.single, self.own = self.randn(1, SINGLE, HEADS, DIM), self.randn(1, OWN, HEADS, DIM)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def logits(self) -> tuple[Logits, Logits]:
        """With the own keys, and with the cache: single keys, then groups."""
        own = scaled_logits(self.q, self.own)
        entries = scaled_logits(self.q, torch.cat((self.single, self.merged), 1))
        seen = torch.ones_like(entries, dtype=torch.bool)
        seen[..., SINGLE:] = torch.rand(seen[..., SINGLE:].shape, generator=self.generator) < self.seen
        log_mass = torch.cat((torch.zeros(1, HEADS, SINGLE), self.log_mass), -1)
        return Logits(own, torch.ones_like(own, dtype=torch.bool)), Logits(entries, seen, log_mass)

    def audit(self, num: int) -> tuple[Tensor, AuditKeys]:
        which = torch.randperm(self.num_tokens, generator=self.generator)[:num]
        k = self.original[:, which]
        owner = self.owner[..., which]
        members = self.mass.gather(-1, owner.clamp(min=0)).clamp(min=1)
        owner = torch.where(owner >= 0, owner + SINGLE, -1)
        stop = SINGLE + self.num_groups
        return scaled_logits(self.q, k), AuditKeys(
            k, torch.zeros(num, 3), owner, members, self.num_tokens, SINGLE, stop
        )

    def recalls(self, num_audit: int | None = None) -> tuple[Tensor, Tensor]:
        """Exact and estimated, per query."""
        own, cached = self.logits()
        true = scaled_logits(self.q, torch.cat((self.single, self.original), 1))
        owner = torch.where(self.owner >= 0, self.owner + SINGLE, -1)
        owner = torch.cat((torch.arange(SINGLE).expand(1, HEADS, -1), owner), -1)
        exact = exact_recall(
            true.double(),
            (own.logit_BNQK.double(), own.seen_BNQK),
            (cached.weighed().double(), cached.seen_BNQK),
            owner,
        )
        return exact.float(), estimate_recall(own, cached, *self.audit(num_audit or self.num_audit))


@settings(max_examples=15)
@given(seed=seeds, noise=st.floats(0.05, 0.6), sharp=st.floats(0.5, 1.2), num_groups=st.sampled_from((100, 200, 600)))
def test_a_sample_of_256_keys_tells_recall_within_3_points(
    seed: int, noise: float, sharp: float, num_groups: int
) -> None:
    """The mean over a few layers' queries, as the probe takes it."""
    pairs = [History(seed + i, noise=noise, sharp=sharp, num_groups=num_groups).recalls() for i in range(4)]
    exact, estimate = (torch.cat(recalls).mean().item() for recalls in zip(*pairs, strict=True))
    assert estimate == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", [{"evicted": 0.3}, {"seen": 0.4}, {"evicted": 0.3, "seen": 0.5}, {"weight": 0.3}])
def test_evicted_unseen_and_underweight_groups_are_missed(seed: int, loss: dict[str, float]) -> None:
    pairs = [History(10 * seed + i, **loss).recalls() for i in range(4)]  # type: ignore[arg-type]
    exact, estimate = (torch.cat(recalls).mean().item() for recalls in zip(*pairs, strict=True))
    assert exact < 0.9
    assert estimate == pytest.approx(exact, abs=0.03)


@given(seed=seeds, sharp=st.floats(0.5, 6.0), num_audit=st.integers(1, 40))
def test_nothing_lost_is_recall_one_however_small_the_sample(seed: int, sharp: float, num_audit: int) -> None:
    history = History(seed, noise=0.0, sharp=sharp, num_tokens=300, num_groups=20)
    exact, estimate = history.recalls(num_audit)
    assert torch.allclose(exact, torch.ones_like(exact), atol=1e-5)
    assert torch.allclose(estimate, torch.ones_like(estimate), atol=1e-3)


@given(seed=seeds, noise=st.floats(0.0, 1.0))
def test_a_sample_of_all_keys_tells_recall_itself(seed: int, noise: float) -> None:
    history = History(seed, noise=noise, num_tokens=600, num_groups=40, evicted=0.2, seen=0.7)
    exact, estimate = history.recalls(600)
    assert (estimate - exact).abs().max() < 1e-4


@given(seed=seeds, share=st.floats(0.0, 1.0))
def test_for_a_selection_the_estimate_is_the_exact_recall(seed: int, share: float) -> None:
    history = History(seed, num_tokens=200, num_groups=20, seen=share)
    own, cached = history.logits()
    cached = Logits(cached.logit_BNQK, cached.seen_BNQK)
    owner = torch.arange(SINGLE + 20).expand(1, HEADS, -1)
    exact = exact_recall(cached.logit_BNQK, own[:2], cached[:2], owner)
    assert torch.allclose(estimate_recall(own, cached), exact, atol=1e-5)
    half = Logits(own.logit_BNQK, torch.arange(OWN).expand_as(own.logit_BNQK) % 2 == 0)
    assert torch.allclose(estimate_recall(half), exact_recall(half.logit_BNQK[..., :0], half[:2]), atol=1e-5)


@given(seed=seeds, sharp=st.floats(0.5, 30.0), num_audit=st.integers(1, 20))
def test_the_estimate_is_a_finite_share_whatever_the_sample(seed: int, sharp: float, num_audit: int) -> None:
    history = History(seed, noise=2.0, sharp=sharp, num_tokens=100, num_groups=30, evicted=0.5, seen=0.5)
    _, estimate = history.recalls(num_audit)
    assert bool(torch.isfinite(estimate).all())
    assert float(estimate.min()) >= 0
    assert float(estimate.max()) <= 1
