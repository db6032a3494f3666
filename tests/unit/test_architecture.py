"""The house rules that a machine can check: who imports whom, where a package lives, how long a file may be."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("cluster", "workers", "jobs")

WORKERS_SEEN_BY_JOBS = {"workers.config", "workers.task", "workers.errors", "workers.actor"}
# The two places where a job looks at finished pictures; both load PyAV and neither loads torch.
NAMED_EXCEPTIONS = {
    ("jobs.report", "workers.video.contact_sheet"),
    ("jobs.verify", "workers.video.decode"),
    ("jobs.plan", "workers.model.backbones"),
    ("jobs.render", "workers.model.backbones"),
    ("jobs.weights", "workers.model.backbones"),
    ("jobs.plan", "workers.geometry"),
    ("jobs.plan", "workers.model_limits"),
    # What models are published, what they need and cost: facts without torch.
    ("jobs.models", "workers.registry"),
}
CLUSTER_SEEN_BY_WORKERS = {"cluster.object_store", "cluster.errors", "cluster.owned_folder", "cluster.log_lines"}

HOME = {
    "ray": {"cluster"},
    "boto3": {"cluster"},
    "botocore": {"cluster"},
    "torch": {"workers"},
    "flash_attn": {"workers"},
    "flashinfer": {"workers"},
    "faiss": {"workers"},
    "triton": {"workers"},
    "transformers": {"workers"},
    "diffusers": {"workers"},
    "ftfy": {"workers"},
    "safetensors": {"workers"},
    "av": {"workers"},
    "PIL": {"workers"},
    "pyarrow": {"jobs"},
    "typer": {"jobs"},
    "click": {"jobs"},
    "rich": {"jobs"},
    "yaml": {"jobs"},
    "webdataset": {"jobs"},
}

# Inside workers/, who may import whom (layout: left may import right).
WORKERS_RANK = {
    "actor": 0,
    "assemble": 1,
    "assemble_cache": 1,
    "assemble_policies": 1,
    "assemble_tiles": 1,
    "pipeline": 1,
    "clip_take": 1,
    "warm_up": 1,
    "training": 1,
    "rollout": 2,
    "rollouts": 2,
    "snapshot": 2,
    "video": 2,
    "quality": 2,
    "checkpoints": 2,
    "registry": 2,
    "geometry": 3,
    "model_limits": 2,
    "kernel_limits": 4,
    "releases": 4,
    "worlds": 2,
    "cache": 2,
    "attention": 2,
    "reuse": 2,
    "kernels": 2,
    "model": 3,
    "search": 3,
    "denoise": 4,
    "metrics": 4,
    "packed_keys": 4,
    "coded_tiles": 4,
    "key_codes": 4,
    "triton_decode": 4,
    "nvrtc": 4,
    "tensor_map": 4,
    "rows": 5,
    "streams": 5,
    "contracts": 5,
    "config": 6,
    "config_part": 6,
    "config_reuse": 6,
    "config_tiles": 6,
    "named_policies": 6,
    "task": 6,
    "errors": 6,
}
STRANGERS = {"cache", "attention", "kernels"}


@functools.cache
def source_files() -> list[Path]:
    return sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Imports and functions."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_module(node.module, alias.name))


def is_module(package: str, name: str) -> bool:
    folder = ROOT / Path(*package.split("."))
    return (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()


def edges() -> Iterator[tuple[str, str]]:
    for path in source_files():
        for target in imports_of(path):
            if target.split(".")[0] in FLOORS and target.count(".") >= 1:
                yield module_of(path), target


def floor_edge_allowed(source: str, target: str) -> bool:
    floor, goal = source.split(".")[0], target.split(".")[0]
    if floor == goal:
        return True
    if floor == "workers":
        return any(target.startswith(name) for name in CLUSTER_SEEN_BY_WORKERS)
    if floor == "jobs" and goal == "cluster":
        return True
    if floor == "jobs" and goal == "workers":
        if (source, target) in NAMED_EXCEPTIONS or any((source, t) in NAMED_EXCEPTIONS for t in parents(target)):
            return True
        return any(target == name or target.startswith(name + ".") for name in WORKERS_SEEN_BY_JOBS)
    return False


def parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def test_imports_go_down_the_stairs_only() -> None:
    # `from workers import x` names the package first and the module after it: only the module counts.
    wrong = [f"{a} -> {b}" for a, b in edges() if b not in FLOORS and not floor_edge_allowed(a, b)]
    packages_only = {f"{a} -> {b}" for a, b in edges() if (ROOT / Path(*b.split("."))).is_dir()}
    assert [edge for edge in wrong if edge not in packages_only] == []


def test_inside_workers_left_imports_right() -> None:
    wrong = []
    for source, target in edges():
        if not (source.startswith("workers.") and target.startswith("workers.")):
            continue
        a, b = source.split(".")[1], target.split(".")[1]
        if a == b:
            continue
        strangers = {a, b} <= STRANGERS or (a == "model" and b in STRANGERS)
        if strangers or WORKERS_RANK[a] > WORKERS_RANK[b]:
            wrong.append(f"{source} -> {target}")
    assert wrong == []


def test_every_package_is_imported_at_home_only() -> None:
    wrong = []
    for path in source_files():
        floor = path.relative_to(ROOT).parts[0]
        for target in imports_of(path):
            home = HOME.get(target.split(".")[0])
            if home is not None and floor not in home:
                wrong.append(f"{module_of(path)} imports {target}")
    assert wrong == []


def test_files_stay_short_enough_to_read_in_one_go() -> None:
    long = {str(p.relative_to(ROOT)): n for p in source_files() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_functions_stay_short() -> None:
    long = []
    for path in source_files():
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert long == []


def test_package_init_files_are_empty() -> None:
    assert [p for p in source_files() if p.name == "__init__.py" and p.read_text().strip()] == []


@pytest.mark.parametrize(
    "module", ["workers.config", "workers.task", "workers.errors", "workers.actor", "workers.registry", "jobs.cli"]
)
def test_driver_side_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
