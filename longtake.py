"""The public face of Longtake: the few typed names that users import. Light: neither torch nor ray is loaded by it.

import longtake
table = longtake.open_manifest("s3://bucket/prefix/job").to_table()
for new in longtake.follow("s3://bucket/prefix/job", cursor):
    ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.consume import NewRows as NewRows
    from jobs.consume import follow as follow
    from jobs.consume import open_manifest as open_manifest
    from jobs.export import export as export
    from jobs.render import render as render
    from jobs.spec import JobSpec as JobSpec
    from jobs.status import JobStatus as JobStatus
    from jobs.status import read_status as read_status
    from jobs.verify import VerifyReport as VerifyReport
    from jobs.verify import verify as verify

_HOMES = {
    "JobSpec": "jobs.spec",
    "JobStatus": "jobs.status",
    "NewRows": "jobs.consume",
    "VerifyReport": "jobs.verify",
    "export": "jobs.export",
    "follow": "jobs.consume",
    "open_manifest": "jobs.consume",
    "read_status": "jobs.status",
    "render": "jobs.render",
    "verify": "jobs.verify",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longtake' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
