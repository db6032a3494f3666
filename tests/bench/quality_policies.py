"""What the quality bench compares: the named policies as they are, and single settings of them varied."""

from __future__ import annotations

from typing import Any

from workers.config import RenderConfig, TemporalCacheConfig

Record = dict[str, Any]

_BUDGET = TemporalCacheConfig().budget_latent_frames

POLICIES: dict[str, Record] = {
    "dense": {"policy": "dense"},
    "window": {"policy": "window"},
    "window at the same bytes": {"policy": "window", "cache": {"recent_latent_frames": _BUDGET - 3}},
    "tempcache": {"policy": "tempcache"},
    "annsa": {"policy": "annsa"},
    "annca": {"policy": "annca"},
    "fastar-lsh": {"policy": "fastar-lsh"},
    "fastar-quant": {"policy": "fastar-quant"},
    "fastar-adaptive": {"policy": "fastar-adaptive"},
    "fastar-tiles": {"policy": "fastar-tiles"},
    "streaming": {"policy": "streaming"},
    "radial": {"policy": "radial"},
    "svg": {"policy": "svg"},
    "svg2": {"policy": "svg2"},
    "teacache": {"policy": "teacache"},
    "flowcache": {"policy": "flowcache"},
    "flowcache + radial": {"policy": "flowcache", "attention": {"kind": "radial"}},
}
"""Those of the paper's tables."""

GUARDED = "fastar-quant, guarded"


def _small_tiles(kept: int = 48, **attention: Any) -> Record:
    """A tile table as it was by default before it kept the past: small, merging chains, every call looking."""
    cache = {"budget_latent_frames": kept, "spare_latent_frames": 15, "merging": "chains", "storage": "model"}
    every = {"density": 0.1, "estimate": "quant", "history_at": None, "clean_pass_share": 1.0}
    return {"policy": "fastar-tiles", "cache": cache, "attention": every | attention}


def _tiles(kept: int, spare: int, seen: int, share: float, storage: str, **attention: int) -> tuple[str, Record]:
    """A faithful tile table, at which one denoising step and the clean pass look; sizes in latent frames."""
    name = f"fastar-tiles, {kept} latent frames, {spare} spare, {seen} seen, clean pass {share:.2f}, {storage}"
    for field, value in attention.items():
        name += f", {value} {field.replace('_', ' ')}"
    cache = {"merging": "pairs", "budget_latent_frames": kept, "spare_latent_frames": spare, "storage": storage}
    looks = {"density": seen / kept, "history_at": (0,), "clean_pass_share": share, **attention}
    return name, {"policy": "fastar-tiles", "cache": cache, "attention": looks}


VARIANTS: dict[str, Record] = {
    "tempcache, int4": {"policy": "tempcache", "cache": {"storage": "int4"}},
    "tempcache, 60 latent frames": {"policy": "tempcache", "cache": {"budget_latent_frames": 60}},
    "tempcache, 90 latent frames": {"policy": "tempcache", "cache": {"budget_latent_frames": 90}},
    "fastar-quant, 60 latent frames": {"policy": "fastar-quant", "cache": {"budget_latent_frames": 60}},
    "fastar-quant, 90 latent frames": {"policy": "fastar-quant", "cache": {"budget_latent_frames": 90}},
    "fastar-quant, 48 latent frames seen": {"policy": "fastar-quant", "attention": {"seen_latent_frames": 48}},
    "fastar-tiles, 48 latent frames": _small_tiles(),
    "fastar-tiles, 20% of the tiles": _small_tiles(density=0.2),
    "fastar-tiles, sink and newest always": _small_tiles(always_sink=True, always_recent=True),
    "fastar-tiles, 2 of 8 keys looked at": _small_tiles(keys_per_tile=2, queries_per_tile=2),
    "fastar-tiles, all tiles": _small_tiles(density=1.0),
    "fastar-tiles, 111 latent frames": _small_tiles(111),
    "fastar-tiles, 120 latent frames, 30%": _small_tiles(120, density=0.3),
    "fastar-adaptive, every step looks": {
        "policy": "fastar-adaptive",
        "attention": {"history_at": None, "dense_step_share": 0.3},
    },
    "fastar-adaptive, clean pass sees as much": {"policy": "fastar-adaptive", "attention": {"clean_pass_share": 1.0}},
    "fastar-quant, every step looks": {"policy": "fastar-quant", "attention": {"history_at": None}},
    **dict(
        _tiles(*sizes)
        for sizes in (
            (156, 30, 12, 1.0, "int4"),
            (180, 30, 12, 1.0, "model"),
            (240, 30, 12, 1.0, "model"),
            (240, 30, 12, 1.0, "int4"),
            (120, 30, 18, 1 / 3, "int4"),
            *((156, 30, seen, 1 / 3, "int4") for seen in (12, 18, 24)),
            *((156, 15, seen, 1 / 3, "int4") for seen in (12, 18)),
            *((150, 15, seen, 1 / 3, "int4") for seen in (12, 16, 18, 24)),
            *((150, 15, seen, 4 / seen, "int4") for seen in (60, 75, 88, 90)),
            *((150, 18, seen, 4 / seen, "int4") for seen in (12, 86, 90)),
            (150, 15, 18, 1 / 2, "int4"),
            (156, 15, 18, 1 / 3, "model"),
            (180, 30, 18, 1 / 3, "int4"),
            (180, 15, 18, 1 / 3, "int4"),
            (240, 30, 18, 1 / 3, "model"),
        )
    ),
    **dict(
        _tiles(156, 30, 18, 1 / 3, "int4", keys_per_tile=keys, queries_per_tile=queries)
        for keys, queries in ((2, 2), (4, 1))
    ),
    "fastar-tiles, fp8 large": {"policy": "fastar-tiles", "backbone": {"fp8": "large"}},
    "fastar-tiles, fp8 all": {"policy": "fastar-tiles", "backbone": {"fp8": "all"}},
    "fastar-tiles, fp8 attention": {"policy": "fastar-tiles", "attention": {"fp8": "steps"}},
    "fastar-tiles, fp8 attention everywhere": {"policy": "fastar-tiles", "attention": {"fp8": "all"}},
    "fastar-tiles, fp8 all, fp8 attention": {
        "policy": "fastar-tiles",
        "backbone": {"fp8": "all"},
        "attention": {"fp8": "steps"},
    },
    GUARDED: {"policy": "fastar-quant", "guard": {"enabled": True}},
}

FIXED = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
TARGETS = (0.8, 0.85, 0.9, 0.95, 0.98)
FAMILIES = {"annsa": "annsa", "fastar": "fastar-quant"}
"""Whose density is set from a recall target: over the whole history, and over the compressed one."""


def _adaptive_table() -> dict[str, Record]:
    table: dict[str, Record] = {}
    apart: Record = {"dense_step_share": 0.3, "history_at": None}  # each noise level by itself
    for family, policy in FAMILIES.items():
        for density in FIXED:
            fixed: Record = {"density": density, "seen_latent_frames": None, **apart}
            table[f"{family}, density {density}"] = {"policy": policy, "attention": fixed}
        for target in TARGETS:
            adaptive: Record = {"target_recall": target, **apart}
            table[f"{family}, recall {target}"] = {"policy": policy, "attention": adaptive}
    return table


ADAPTIVE = _adaptive_table()
"""Fixed densities against recall targets."""


def _candidates() -> dict[str, Record]:
    table: dict[str, Record] = {}
    for budget in (60, 90, 119):
        for storage in ("int8", "int4"):
            cache: Record = {"budget_latent_frames": budget, "storage": storage}
            table[f"tempcache, {budget} latent frames in {storage}"] = {"policy": "tempcache", "cache": cache}
        for seen in (32, 48, 64, 96, 128):
            record = {"cache": {"budget_latent_frames": budget}, "attention": {"seen_latent_frames": seen}}
            table[f"fastar-quant, {budget} latent frames, {seen} seen"] = {"policy": "fastar-quant", **record}
        for target in (0.9, 0.93, 0.95):
            record = {"cache": {"budget_latent_frames": budget}, "attention": {"target_recall": target}}
            table[f"fastar-adaptive, {budget} latent frames, recall {target}"] = {"policy": "fastar-adaptive", **record}
    return table


CANDIDATES = _candidates()
"""From which the settings of the named policies are chosen, on worlds of their own."""

ALL = POLICIES | VARIANTS | ADAPTIVE | CANDIDATES
BY_GROUP = (
    "dense",
    "window",
    "window at the same bytes",
    "tempcache",
    "annsa",
    "fastar-quant",
    "fastar-adaptive",
    GUARDED,
)
"""Compared on every kind of world."""

_SLOW = ("svg2", "svg", "radial", "streaming", "flowcache + radial")


def config_of(name: str) -> RenderConfig:
    """The render of a setting."""
    return RenderConfig.model_validate(ALL[name])


def is_heavy(name: str) -> bool:
    """Whether its cache grows with the walk: few of them fit beside one another."""
    return config_of(name).cache.kind == "dense"


def slow_first(names: list[str]) -> list[str]:
    """Dense, which all are compared with; then the slowest, so that none of them is the last to end."""
    return sorted(names, key=lambda name: (name != "dense", _SLOW.index(name) if name in _SLOW else len(_SLOW)))
