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
VARIANTS: dict[str, Record] = {
    "tempcache, full log m": {"policy": "tempcache", "cache": {"mass_decay": 0.0}},
    "tempcache, int8": {"policy": "tempcache", "cache": {"storage": "int8"}},
    "tempcache, 60 latent frames": {"policy": "tempcache", "cache": {"budget_latent_frames": 60}},
    "tempcache, 120 latent frames": {"policy": "tempcache", "cache": {"budget_latent_frames": 120}},
    "fastar-quant, 60 latent frames": {"policy": "fastar-quant", "cache": {"budget_latent_frames": 60}},
    "fastar-quant, 120 latent frames": {"policy": "fastar-quant", "cache": {"budget_latent_frames": 120}},
    "fastar-tiles, 20% of the tiles": {"policy": "fastar-tiles", "attention": {"density": 0.2}},
    "fastar-tiles, sink and newest always": {
        "policy": "fastar-tiles",
        "attention": {"always_sink": True, "always_recent": True},
    },
    "fastar-tiles, 2 of 8 keys looked at": {
        "policy": "fastar-tiles",
        "attention": {"keys_per_tile": 2, "queries_per_tile": 2},
    },
    "fastar-tiles, all tiles": {"policy": "fastar-tiles", "attention": {"density": 1.0}},
    "fastar-tiles, 111 latent frames": {"policy": "fastar-tiles", "cache": {"budget_latent_frames": 111}},
    "fastar-tiles, 120 latent frames, 30%": {
        "policy": "fastar-tiles",
        "cache": {"budget_latent_frames": 120},
        "attention": {"density": 0.3},
    },
    GUARDED: {"policy": "fastar-quant", "guard": {"enabled": True}},
}

FIXED = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
TARGETS = (0.8, 0.85, 0.9, 0.95, 0.98)
FAMILIES = {"annsa": "annsa", "fastar": "fastar-quant"}
"""Whose density is set from a recall target: over the whole history, and over the compressed one."""


def _adaptive_table() -> dict[str, Record]:
    table: dict[str, Record] = {}
    for family, policy in FAMILIES.items():
        for density in FIXED:
            table[f"{family}, density {density}"] = {"policy": policy, "attention": {"density": density}}
        for target in TARGETS:
            table[f"{family}, recall {target}"] = {"policy": policy, "attention": {"target_recall": target}}
    return table


ADAPTIVE = _adaptive_table()
"""Fixed densities against recall targets."""


def _candidates() -> dict[str, Record]:
    base: Record = {
        "budget_latent_frames": 60,
        "merge_matching": True,
        "merge_score": "ward",
        "keeps_heaviest": True,
        "free_share": 16,
        "min_cosine": 1.0,
        "mass_decay": 0.3,
    }
    tree = base | {"merge_matching": False, "merge_score": "cosine", "min_cosine": 0.995, "mass_decay": 16.0}
    caches: dict[str, Record] = {
        "trees in 119": tree | {"budget_latent_frames": 119, "keeps_heaviest": False},
        "pairs in 60": base,
        "pairs in 119": base | {"budget_latent_frames": 119},
        "pairs in 45": base | {"budget_latent_frames": 45},
        "pairs in 81": base | {"budget_latent_frames": 81},
        "pairs in 60, newest": base | {"keeps_heaviest": False},
        "pairs in 60, decay 0": base | {"mass_decay": 0.0},
        "pairs in 60, decay 1": base | {"mass_decay": 1.0},
        "pairs in 92, int8": base | {"budget_latent_frames": 92, "storage": "int8"},
        "pairs in 76, int8 and int4": base | {"budget_latent_frames": 76, "storage": "int8", "value_storage": "int4"},
    }
    table = {f"tempcache, {name}": {"policy": "tempcache", "cache": cache} for name, cache in caches.items()}

    def add(name: str, budget: int, **attention: float) -> None:
        cache = base | {"budget_latent_frames": budget}
        table[f"fastar-quant, {name}"] = {"policy": "fastar-quant", "cache": cache, "attention": attention}

    add("60, seen 48 in all steps", 60, seen_latent_frames=48, dense_step_share=0.0)
    add("60, seen 72 in all steps", 60, seen_latent_frames=72, dense_step_share=0.0)
    add("60, seen 48", 60, seen_latent_frames=48)
    add("119, seen 48 in all steps", 119, seen_latent_frames=48, dense_step_share=0.0)
    add("60, density 0.6", 60, density=0.6)
    add("60, recall 0.95 in all steps", 60, target_recall=0.95, dense_step_share=0.0)
    add("45, seen 48 in all steps", 45, seen_latent_frames=48, dense_step_share=0.0)
    more: dict[str, Record] = {
        "pairs in 60, with values": base | {"value_scale": 1.0},
        "pairs in 60, mass": base | {"merge_score": "mass"},
        "pairs in 60, logit": base | {"merge_score": "logit"},
        "ward without pairs in 60": base | {"merge_matching": False},
        "pairs in 60, 0.999": base | {"min_cosine": 0.999},
        "pairs in 60, cosine": base | {"merge_score": "cosine"},
        "pairs in 119, decay 1": base | {"mass_decay": 1.0, "budget_latent_frames": 119},
    }
    table |= {f"tempcache, {name}": {"policy": "tempcache", "cache": cache} for name, cache in more.items()}
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
