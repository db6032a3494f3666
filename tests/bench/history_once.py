"""Rows of `rollout_history` that look at the history in one denoising step of a chunk, its first, and their check.

Their numbers are the latent frames kept and seen, the newest chunk among both: every call attends to it afresh, for the
queries that look are those of noise. With `own` at the end it competes with the history, and only the own chunk is
attended to afresh. Beside them stand tables of the same sizes at which every call looks.
"""

from __future__ import annotations

import traceback
from dataclasses import replace

import torch

from tests.bench.history_checks import BFLOAT16_ERROR
from tests.bench.history_engine import Variant
from tests.bench.rollout_rows import Settings
from tests.tables import draw_listed
from workers.attention.tile_choice import TileRuns
from workers.kernels.listed_parts import make_parted
from workers.kernels.listed_tiles import ListedName, attend_listed_plain
from workers.rollouts.kept_history import FreshSlots, KeptHistory, Looked

_CHUNK = 3
"""Latent frames; of them are sink and newest chunk one each."""
_SMALL = Variant("", history_at=(0,), always_recent=True)


def _pairs(kept: int, seen: int, spare: int) -> Variant:
    """Sizes in latent frames."""
    return replace(
        _SMALL,
        name=f"pairs-{kept}-seen-{seen}-once",
        rule="pairs",
        kept_chunks=(kept - spare) // _CHUNK - 2,
        spare_chunks=spare // _CHUNK,
        density=(seen - _CHUNK) / (kept - _CHUNK),
    )


def _own(variant: Variant) -> Variant:
    """The newest chunk competes with the history: of as many latent frames seen more are chosen."""
    _, kept, _, seen, *_ = variant.name.split("-")
    return replace(variant, name=f"{variant.name}-own", always_recent=False, density=int(seen) / int(kept))


def _always(variant: Variant) -> Variant:
    """Every call looks."""
    own = _own(variant)
    return replace(own, name=own.name.removesuffix("-once-own"), history_at=None)


def _packed(variant: Variant) -> Variant:
    """Its history lies in 4 bits."""
    return replace(variant, name=f"{variant.name}-int4", storage="int4")


def _seen_by_clean_pass(variant: Variant, share: float) -> Variant:
    """So much of what a step sees."""
    return replace(variant, name=f"{variant.name}-clean-{share:.2f}", clean_share=share)


def _spare_15(variant: Variant) -> Variant:
    """Every merge frees half as many slots as those of the other faithful tables do."""
    assert variant.spare_chunks * _CHUNK == 15
    return replace(variant, name=f"{variant.name}-spare-15")


_FAITHFUL = (_pairs(120, 12, 15), _pairs(180, 12, 30), _pairs(180, 30, 30), _pairs(240, 24, 30))
_TILES = replace(
    _spare_15(_seen_by_clean_pass(_packed(_own(_pairs(150, 12, 15))), 1 / 3)),
    name="fastar-tiles",
    density_until_full=18 / 150,
    with_pictures=True,
)
_RECALL_SEEN = 86
_RECALL = replace(
    _TILES,
    name="fastar-tiles-recall",
    kept_chunks=42,
    spare_chunks=6,
    density=_RECALL_SEEN / 150,
    density_until_full=None,
    clean_share=4 / _RECALL_SEEN,
)
"""As many latent frames seen as a recall of 0.92 takes, by the clean pass as many as ever, and a sixth fewer merges."""
ONCE = (
    replace(_SMALL, name="fastar-exact-once"),
    replace(_SMALL, name="fastar-exact-once-own", always_recent=False),
    replace(_SMALL, name="pairs-once", rule="pairs"),
    *_FAITHFUL,
    *(_own(variant) for variant in (_FAITHFUL[1], _pairs(240, 12, 30))),
    *(_always(variant) for variant in _FAITHFUL[1:]),
    *(_packed(_own(variant)) for variant in (_FAITHFUL[1], _pairs(240, 12, 30), _pairs(156, 12, 30))),
    *(_seen_by_clean_pass(_packed(_own(_pairs(156, seen, 30))), 1 / 3) for seen in (12, 18)),
    *(_spare_15(_seen_by_clean_pass(_packed(_own(_pairs(156, seen, 15))), 1 / 3)) for seen in (12, 18)),
    _TILES,
    replace(_TILES, name="fastar-tiles-fp8", fp8="large"),
    replace(_TILES, name="fastar-tiles-fp8-all", fp8="all"),
    replace(_TILES, name="fastar-tiles-fp8-attention", fp8_attention="steps"),
    replace(_TILES, name="fastar-tiles-fp8-all-attention", fp8="all", fp8_attention="steps"),
    _RECALL,
    replace(_RECALL, name="fastar-tiles-recall-fp8", fp8="all", fp8_attention="steps"),
    _seen_by_clean_pass(_own(_pairs(240, 18, 30)), 1 / 3),
)
"""Tiles are chosen by products of 16 bits, which is the faster way there; `fastar-tiles` is the policy of that name."""


def choose_parted(settings: Settings, name: ListedName) -> tuple[ListedName, str]:
    """That way of attending in two parts, if it agrees with the reference; else the reference, and why."""
    try:
        error = max(_parted_error(settings, name, recent) for recent in (False, True))
    except Exception as problem:
        traceback.print_exc()
        return "torch", f"Two parts by {name} left out: {type(problem).__name__}: {str(problem)[:200]}."
    if error > BFLOAT16_ERROR:
        return "torch", f"Two parts by {name} left out: they differ from the reference by {error:.2e}."
    return name, f"Two parts by {name}: they differ from attention over both by {error:.2e}."


def _parted_error(settings: Settings, name: ListedName, recent: bool) -> float:
    """Of what a call that looks gives, and of the next one that takes."""
    tile, dim, heads, device = (
        128 if settings.frame_tokens >= 128 else 16,
        settings.backbone.head_dim,
        3,
        settings.device,
    )
    queries, tiles = 2 * tile + 37 % tile, 11
    q, k, v, index = draw_listed((queries, heads, dim), tile, 5, 2, most_mass=2.0, empty=slice(tile, tile + 9))
    _, more_k, more_v, _ = draw_listed(
        (1, heads, dim), tile, 6, 1, most_mass=0.0, empty=slice(3 * tile + queries, 6 * tile)
    )
    k, v = torch.cat((k, more_k), 1), torch.cat((v, more_v), 1)
    q, k, v = (x.to(device, settings.dtype) for x in (q, k, v))
    always = ((5, 8), (8, tiles)) if recent else ((8, tiles),)
    layer, index = _Layer(k, v), index.to(device)
    fresh = FreshSlots.of(TileRuns(((0, 5),), always, tiles), queries, tile)
    kept = KeptHistory(make_parted(name, tile), fresh, [layer])
    seen = torch.tensor(fresh.list_of(tiles), device=device).expand(*index.shape[:2], -1)
    expected = attend_listed_plain(q.float(), k.float(), v.float(), torch.cat((index, seen), -1).int(), tile)
    worst = 0.0
    for looked in (Looked(layer, index), None):
        found = kept.attend(0, q, layer, looked).float()
        worst = max(worst, float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()))
    return worst


class _Layer:
    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k_NLW, self.v_NLD = k, v
