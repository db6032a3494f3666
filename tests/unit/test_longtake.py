"""The public module: light to import, and every name leads somewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

import longtake

CHECK = """
import sys, longtake
heavy = {"torch", "ray", "av", "pyarrow", "boto3"} & set(sys.modules)
assert not heavy, heavy
longtake.open_manifest, longtake.follow, longtake.JobSpec
heavy = {"torch", "ray"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_loads_neither_torch_nor_ray() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", longtake.__all__)
def test_every_name_leads_somewhere(name: str) -> None:
    assert getattr(longtake, name).__name__ == name
    assert name in dir(longtake)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rendr'"):
        _ = longtake.rendr
