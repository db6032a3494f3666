"""The ledger: which tasks are settled, derived from manifest parts, quarantine parts and the journal behind them.

Never a second truth: it is rebuilt at every start. A million tasks cost about 17 MB.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from jobs.errors import JournalBroken
from jobs.id_set import IdSet
from jobs.rows import Row, task_id_of


class Ledger:
    """What is known of every task that has a row.

    `succeeded` is final. `failed` (given up) lasts until the task is reopened, which counts its generation up.
    """

    def __init__(self) -> None:
        self._succeeded = IdSet()
        self._given_up = IdSet()
        self._rejected = IdSet()
        self._reopened: dict[str, int] = {}
        self._generations: dict[str, int] = {}
        self.failures = Counter[str]()
        """Given up and not reopened, by kind of error."""

    @property
    def num_succeeded(self) -> int:
        return len(self._succeeded)

    @property
    def num_failed(self) -> int:
        """Tasks given up and not reopened."""
        return self.failures.total()

    @property
    def num_rejected(self) -> int:
        """Lines of the prompt list that could not become tasks."""
        return len(self._rejected)

    def is_settled(self, task_id: str) -> bool:
        """Has it succeeded, or been given up, or been rejected?"""
        if task_id in self._succeeded or task_id in self._rejected:
            return True
        return task_id in self._given_up and task_id not in self._reopened

    def has_succeeded(self, task_id: str) -> bool:
        return task_id in self._succeeded

    def generation(self, task_id: str) -> int:
        """How often the task has been reopened."""
        return self._generations.get(task_id, 0)

    def would_change(self, row: Row) -> bool:
        """Is this row news? A second success, a failure of a settled task and a repeated rejection are not."""
        task_id = task_id_of(row)
        if row["status"] == "reopened":
            return task_id in self._given_up and task_id not in self._reopened and task_id not in self._succeeded
        return not self.is_settled(task_id)

    def absorb(self, row: Row) -> None:
        """Take in a row that has been committed, in commit order.

        Raises:
            JournalBroken: It contradicts what is already there.
        """
        task_id = task_id_of(row)
        if not self.would_change(row):
            raise JournalBroken(f"a second {row['status']} row of task {task_id}, which is settled")
        self.take(row)

    def absorb_part(self, row: Row) -> None:
        """Take in a row of a published part; parts of manifest/ come before those of quarantine/, each in order."""
        task_id = task_id_of(row)
        if row["status"] in ("failed", "reopened") and task_id in self._succeeded:
            return  # an earlier generation of a task that has succeeded since
        self.take(row)

    def take(self, row: Row) -> None:
        """Take in a row of which `would_change` has just said yes."""
        task_id, status = task_id_of(row), row["status"]
        if status == "succeeded":
            self._succeeded.add(task_id)
            self._reopened.pop(task_id, None)
        elif status == "rejected":
            self._rejected.add(task_id)
        elif status == "failed":
            self._given_up.add(task_id)
            self._reopened.pop(task_id, None)
            self.failures[row["error_type"]] += 1
        else:
            self._reopened[task_id] = self._generations[task_id] = row["generation"]
            self.failures[row["error_type"]] -= 1  # it names the kind that it takes back

    def summary(self) -> dict[str, Any]:
        """Counts for `_SUCCESS` and `_result.json`."""
        return {
            "succeeded": self.num_succeeded,
            "failed": self.num_failed,
            "rejected": self.num_rejected,
            "failures": {kind: count for kind, count in sorted(self.failures.items()) if count},
        }
