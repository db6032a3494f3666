"""The driver without a model: items per second against Ray Data, memory, the tail.

`python -m tests.bench.driver --items 100000 --rounds 3`; parts by `--only throughput|memory|makespan`.

Throughput: two actors, a task that does nothing, every item committed to local disk by its own journal entry before the
next one is written. Ray Data's map_batches(batch_size=1) + write_parquet on the same cluster commits nothing before the
end. Rounds alternate, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.object_store import open_store
from cluster.pool import ActorResources
from jobs.driver import Driver, JobInputs, Limits
from tests.bench import noop
from tests.bench.record import median_and_spread, report

PARTS = ("throughput", "memory", "makespan")
CHILD = "--memory-child"


def main() -> None:
    """Run the parts asked for; each writes its own record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--dir", type=Path, help="where to put the stores; default: a temporary folder")
    parser.add_argument(CHILD, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ltb", dir=args.dir) as folder:
        if args.memory_child:
            print(json.dumps(memory_of_run(args.memory_child, Path(folder))))
            return
        parts = {"throughput": throughput, "memory": memory, "makespan": makespan}
        for name in args.only or PARTS:
            parts[name](args, Path(folder))


def limits(**more: Any) -> Limits:
    """Two actors; every item its own journal entry."""
    return Limits(num_actors=2, max_rows_per_entry=1, **more)


def throughput(args: argparse.Namespace, folder: Path) -> None:
    """Ours and Ray Data, in turn, on one cluster."""
    from cluster.start import LocalSize, connect

    ours, theirs = [], []
    with connect(local=LocalSize(num_cpus=2)):
        for number in range(args.rounds):
            ours.append(args.items / our_seconds(args.items, folder / f"ours-{number}"))
            theirs.append(args.items / ray_data_seconds(args.items, folder / f"theirs-{number}"))
    rows = []
    for name, values in (
        ("longtake driver, one durable commit per item", ours),
        ("ray data map_batches(1) + write_parquet, no commit before the end", theirs),
    ):
        median, spread = median_and_spread(values)
        ratio = median / median_and_spread(theirs)[0]
        rows.append({"side": name, "items": args.items, "items_per_s": median, "+-": spread, "ratio": ratio})
    report("driver_throughput", rows, f"{args.rounds} rounds, alternating; higher is better.")


def our_seconds(count: int, folder: Path) -> float:
    """Wall time of a whole run, from the empty store to the released lease."""
    from cluster.ray_pool import ActorPool

    store = open_store(str(folder))

    def open_pool() -> ActorPool:
        return ActorPool(noop.NoOpActor, None, ActorResources(num_cpus=0.5))

    begun = time.perf_counter()
    outcome = Driver(JobInputs(noop.facts(str(folder)), noop.tasks(count)), store, open_pool, limits()).run()
    seconds = time.perf_counter() - begun
    assert (outcome.exit_code, outcome.run_succeeded) == (0, count)
    shutil.rmtree(folder)
    return seconds


def ray_data_seconds(count: int, folder: Path) -> float:
    """The same items through Ray Data with two actors; its own columns are the id and one constant."""
    import ray

    class NoOp:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch["ok"] = [True] * len(batch["id"])
            return batch

    ray.data.DataContext.get_current().enable_progress_bars = False
    begun = time.perf_counter()
    data = ray.data.range(count).map_batches(NoOp, batch_size=1, concurrency=2, num_cpus=0.5)
    data.write_parquet(str(folder))
    seconds = time.perf_counter() - begun
    shutil.rmtree(folder)
    return seconds


def memory(args: argparse.Namespace, folder: Path) -> None:
    """Resident memory of the driver after 10,000 and 1,000,000 tasks, each in a process of its own."""
    rows = []
    for count in (10_000, 1_000_000):
        command = [sys.executable, "-m", "tests.bench.driver", CHILD, str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"tasks": count, **json.loads(done.stdout.splitlines()[-1])})
    growth = rows[1]["peak_rss_mb"] - rows[0]["peak_rss_mb"]
    notes = f"Peak grows by {growth:.1f} MB (limit 50). Pool simulated in the process; group commit into local files."
    report("driver_memory", rows, notes)


def memory_of_run(count: int, folder: Path) -> dict[str, float]:
    """Run in this process with an echo pool, so that only the driver's own memory is seen."""
    from tests.bench.echo_pool import EchoPool

    begun = time.perf_counter()
    grouped = Limits(num_actors=2, max_rows_per_entry=500)
    inputs = JobInputs(noop.facts(str(folder)), noop.tasks(count))
    outcome = Driver(inputs, open_store(str(folder)), EchoPool, grouped).run()
    assert outcome.run_succeeded == count
    seconds = time.perf_counter() - begun
    gc.collect()
    return {"peak_rss_mb": _status_mb("VmHWM"), "rss_at_end_mb": _status_mb("VmRSS"), "seconds": seconds}


def _status_mb(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def makespan(args: argparse.Namespace, folder: Path) -> None:
    """Simulated mixed jobs against the lower bound and first come first served."""
    from tests.makespan import measure

    rows = []
    for num_actors, num_slow in ((2, 0), (8, 0), (16, 0), (32, 0), (8, 2), (16, 3)):
        for seed in range(args.rounds):
            spans = measure(1000, num_actors, seed, num_slow=num_slow)
            rows.append(
                {
                    "items": 1000,
                    "actors": num_actors,
                    "3 x slower": num_slow,
                    "seed": seed,
                    "bound_s": spans.bound_s,
                    "ours / bound": spans.ours_s / spans.bound_s,
                    "fifo / bound": spans.fifo_s / spans.bound_s,
                    "taken over at the tail": spans.num_taken_back,
                }
            )
    report("driver_makespan", rows, "Simulated; the driver knows neither the +-10% of single takes nor who is slow.")


if __name__ == "__main__":
    main()
