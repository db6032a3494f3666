"""Columns of the user's own prompt list: their types over all parts of a manifest, and their names beside ours.

A column keeps the type of the first part that has it, because readers take the schema of one part for all. A value that
does not fit a later part goes, as JSON, into `user_misfits`: nothing is lost and no reader breaks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from jobs.columns import COLUMN_NAMES

BOOL, INT, FLOAT, STRING = pa.bool_(), pa.int64(), pa.float64(), pa.string()
MAX_EXACT_FLOAT_INT = 2**53  # a larger integer would not survive in a float column


def column_name(name: str) -> str:
    """Name in the manifest: the user's own, with the prefix `user_` (once or more) only where ours has it."""
    while name in COLUMN_NAMES:
        name = f"user_{name}"
    return name


def unify_types(rows: Iterable[Mapping[str, Any]], fixed: Mapping[str, pa.DataType]) -> dict[str, pa.DataType]:
    """Types of all user columns of a part: the fixed ones first, then new names in order of appearance.

    Int and float unify to float, all equal types to themselves, anything else to string (as JSON). A column that holds
    nothing but null stays out until a part has a value.
    """
    types = dict(fixed)
    for row in rows:
        for name, value in row.items():
            if value is None or name in fixed:
                continue
            found = _type_of(value)
            types[name] = found if name not in types else _wider(types[name], found)
    return types


def to_arrays(
    rows: Sequence[Mapping[str, Any]], types: Mapping[str, pa.DataType]
) -> tuple[dict[str, pa.Array], list[str | None]]:
    """One array per column, and per row the JSON of the values that did not fit."""
    misfits: list[dict[str, Any]] = [{} for _ in rows]
    arrays = {}
    for name, kind in types.items():
        values = []
        for row, misfit in zip(rows, misfits, strict=True):
            value = row.get(name)
            fits, cell = _fit(value, kind)
            values.append(cell)
            if not fits:
                misfit[name] = value
        arrays[name] = pa.array(values, kind)
    return arrays, [json.dumps(misfit, ensure_ascii=False, sort_keys=True) if misfit else None for misfit in misfits]


def _type_of(value: Any) -> pa.DataType:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return INT
    return FLOAT if isinstance(value, float) else STRING


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    if a == b:
        return a
    return FLOAT if {a, b} == {INT, FLOAT} else STRING


def _fit(value: Any, kind: pa.DataType) -> tuple[bool, Any]:
    """Does the value fit the column, and what stands in the cell?"""
    if value is None:
        return True, None
    if kind == STRING:
        return True, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    if isinstance(value, bool) or kind == BOOL:
        return (True, value) if isinstance(value, bool) and kind == BOOL else (False, None)
    if kind == FLOAT and (isinstance(value, float) or (isinstance(value, int) and abs(value) <= MAX_EXACT_FLOAT_INT)):
        return True, float(value)
    if kind == INT and isinstance(value, int):
        return True, value
    return False, None
