"""How committed rows become visible: numbered parts decided by put_if_absent, then the job's closing records.

Part n covers the journal entries after part n-1 up to its own `last_seq`. Who loses the race for a number reads the
winner and goes on behind it, so parts never overlap, whoever wrote them (docs/commit-protocol.md).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from cluster.errors import NotFound
from cluster.object_store import ObjectStore
from jobs.manifest import CommittedRow, PartHead, build_part, part_key, read_head, read_part

logger = logging.getLogger(__name__)

MANIFEST, QUARANTINE = "manifest/", "quarantine/"
SUCCESS_KEY, RESULT_KEY, CARD_KEY = "_SUCCESS", "_result.json", "README.md"


class PartSeries:
    """The parts of one prefix in order, and the right end of what they cover.

    Invariant: `last_seq` never decreases, and no row at or below it is ever written by this object again.
    """

    def __init__(self, store: ObjectStore, prefix: str, job_id: str) -> None:
        self._store = store
        self._prefix = prefix
        self._job_id = job_id
        self._types: dict[str, pa.DataType] = {}
        self.num_parts = 0
        self.num_rows = 0
        self.last_seq = 0
        self.max_epoch = 0

    def read_new(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Go to the end of the series, yielding some columns of every part on the way (one GET a part)."""
        while True:
            try:
                data = self._store.get(part_key(self._prefix, self.num_parts))
            except NotFound:
                return
            self._step_over(read_head(data))
            yield read_part(data, columns)

    def publish(self, rows: Sequence[CommittedRow], last_seq: int, epoch: int) -> None:
        """Make all rows up to entry `last_seq` visible that no part shows yet; nothing happens if there are none.

        Args:
            rows: Every row of this series between `self.last_seq` and `last_seq`; older ones are passed over.
            epoch: Ours.
        Raises:
            OutcomeUnknown, StoreUnavailable: Ask again with the same or more rows.
        """
        while rows := [row for row in rows if row.seq > self.last_seq]:
            head = PartHead(self._job_id, len(rows), self.last_seq + 1, last_seq, epoch, self._types)
            data = build_part(rows, head)
            key = part_key(self._prefix, self.num_parts)
            if not self._store.put_if_absent(key, data):
                data = self._store.get(key)  # the winner, or our own try whose answer was lost
            self._step_over(read_head(data))
        self.last_seq = max(self.last_seq, last_seq)

    def _step_over(self, head: PartHead) -> None:
        self.num_parts += 1
        self.num_rows += head.num_rows
        self.last_seq = max(self.last_seq, head.last_seq)
        self.max_epoch = max(self.max_epoch, head.epoch)
        self._types = head.user_types


def write_success(store: ObjectStore, job_id: str, totals: Mapping[str, Any]) -> None:
    """`_SUCCESS` at the job's root: every item is succeeded or finally given up."""
    store.put(SUCCESS_KEY, _json({"job_id": job_id, **totals}))


def remove_success(store: ObjectStore) -> None:
    """A run that has new work to do takes the marker away first, so that consumers wait again."""
    store.delete([SUCCESS_KEY])


def write_result(store: ObjectStore, result: Mapping[str, Any]) -> None:
    """`_result.json`: the outcome of the last run, with its exit code; overwritten by every run."""
    store.put(RESULT_KEY, _json(result))


def read_json(store: ObjectStore, key: str) -> dict[str, Any] | None:
    """`_SUCCESS`, `_result.json` or `job.json`; None if it is not there."""
    try:
        body: dict[str, Any] = json.loads(store.get(key))
    except NotFound:
        return None
    return body


def write_card(store: ObjectStore, job_id: str, facts: Mapping[str, Any]) -> None:
    """`README.md`: a Hugging Face card by which `load_dataset(<job root>)` reads the manifest and nothing else."""
    store.put(CARD_KEY, dataset_card(job_id, facts).encode())


def dataset_card(job_id: str, facts: Mapping[str, Any]) -> str:
    """The text of the card; `facts` become its table."""
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
configs:
- config_name: default
  data_files: "{MANIFEST}part-*.parquet"
tags:
- video
- synthetic
---
# {job_id}

Videos rendered by Longtake. One row per finished video in `{MANIFEST}part-*.parquet`; the column `file_name` is the
video's path below this folder. Rows that were given up or were bad input are in `{QUARANTINE}`.

| | |
|---|---|
{table}
"""


def _json(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()
