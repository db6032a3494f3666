"""Policies by name: what `--policy fastar-quant` stands for. The parts themselves are in `config.py`.

The baselines stand for the settings that did best with our models; see docs/results.md for what each costs and keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

PolicyName = Literal[
    "dense",
    "window",
    "tempcache",
    "annsa",
    "annca",
    "fastar-lsh",
    "fastar-quant",
    "fastar-adaptive",
    "fastar-tiles",
    "streaming",
    "radial",
    "svg",
    "svg2",
    "teacache",
    "flowcache",
]

Parts = Mapping[str, Mapping[str, Any]]

_TEMPORAL = {"kind": "temporal"}
_SPARSE = {"seen_latent_frames": 75, "seen_across": "model", "dense_step_share": 0.0, "history_at": (0,)}
"""Of a compressed history, in the first step of a chunk: for the same work recall is higher than with fewer and a dense
first step."""

POLICIES: Mapping[PolicyName, Parts] = {
    "dense": {},
    "window": {"cache": {"kind": "window"}},
    "tempcache": {"cache": _TEMPORAL},
    "annsa": {"attention": {"kind": "annsa"}},
    "annca": {"prompt_attention": {"kind": "annca"}},
    "fastar-lsh": {
        "cache": _TEMPORAL,
        "attention": {"kind": "annsa", "search": "lsh", **_SPARSE},
        "prompt_attention": {"kind": "annca", "search": "lsh"},
    },
    "fastar-quant": {
        "cache": _TEMPORAL,
        "attention": {"kind": "annsa", "search": "quant", **_SPARSE},
        "prompt_attention": {"kind": "annca", "search": "quant"},
    },
    "fastar-adaptive": {
        "cache": _TEMPORAL,
        "attention": {"kind": "annsa", "target_recall": 0.95, "dense_step_share": 0.0, "history_at": (0,)},
        "prompt_attention": {"kind": "annca"},
    },
    "fastar-tiles": {
        "cache": {
            "kind": "tiles",
            "budget_latent_frames": 150,
            "spare_latent_frames": 15,
            "merging": "pairs",
            "storage": "int4",
        },
        "attention": {
            "kind": "tiles",
            "density": 0.08,
            "density_until_full": 0.12,
            "estimate": "exact",
            "history_at": (0,),
            "clean_pass_share": 1 / 3,
        },
    },
    "streaming": {"attention": {"kind": "streaming"}},
    "radial": {"attention": {"kind": "radial"}},
    "svg": {"attention": {"kind": "svg", "tile": 8}},
    "svg2": {"attention": {"kind": "svg2"}},
    "teacache": {"reuse": {"kind": "teacache"}},
    "flowcache": {"cache": {"kind": "flow"}, "reuse": {"kind": "flowcache"}},
}
_INSTEAD_OF = {"density": ("seen_latent_frames", "density_until_full")}
"""A field that is given beside a policy -> the policy's own that it takes the place of."""
assert set(POLICIES) == set(get_args(PolicyName))


def fill_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """A render record with the parts that its `policy` names; single fields given beside it win.

    Raises:
        ValueError: A part of another kind is given beside the policy.
    """
    filled = dict(record)
    presets: Mapping[Any, Parts] = POLICIES
    for name, preset in presets.get(filled.get("policy"), {}).items():
        given = filled.get(name)
        fields = dict(given) if isinstance(given, Mapping) else {} if given is None else given.model_dump()
        kind = fields.get("kind", preset["kind"])
        if kind != preset["kind"]:
            raise ValueError(
                f"policy: {filled['policy']} stands for {name}.kind: {preset['kind']}, but {name}.kind: {kind} is "
                "given beside it; leave one of them out"
            )
        left_out = {other for field, others in _INSTEAD_OF.items() if field in fields for other in others}
        filled[name] = {**{field: value for field, value in preset.items() if field not in left_out}, **fields}
    return filled
