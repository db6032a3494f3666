"""JobSpec -> driver -> exit code: checks first, then the actors; prints how to go on before anything can break.

`python -m jobs.render ...` is the verb `render` of the command line.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace

import pyarrow.compute as pc

from cluster.errors import StoreError
from cluster.log_lines import set_up_logging
from cluster.object_store import ObjectStore
from cluster.start import ray_job_id
from cluster.telemetry import Telemetry
from jobs.commit import MANIFEST, QUARANTINE, PartSeries
from jobs.driver import Driver
from jobs.errors import JobError
from jobs.flags import arguments_of
from jobs.ground import open_ground
from jobs.job_record import begin_record, code_version, note_run
from jobs.observer import TelemetryFeed
from jobs.outcome import EXIT_ITEMS_FAILED, JobInputs, Outcome, exit_code, is_closed
from jobs.preflight import Preflight, check_before_start
from jobs.progress import FrameRate, JobProgress, make_display
from jobs.prompt_row import Rejected
from jobs.prompts import read_prompts
from jobs.replay import Replay
from jobs.report import SHEET_KEY, make_report, report_text
from jobs.rows import JobFacts
from jobs.shards import PlannedTask, plan_tasks
from jobs.spec import JobSpec
from jobs.stop_request import is_stop_requested
from jobs.stopping import StopSwitch, stopped_at_once
from jobs.view import JobView
from workers.task import RenderResult

logger = logging.getLogger(__name__)

STOP_POLL_S = 3.0
"""How late a `longtake cancel` may be noticed; costs one request a poll."""


@dataclass(frozen=True)
class RunOptions:
    """What concerns this run and not the job."""

    takeover: bool = False
    dry_run: bool = False
    json_logs: bool = False
    verbose: bool = False
    with_sheet: bool = True


def render(spec: JobSpec, options: RunOptions | None = None) -> int:
    """Render what is missing of a job and return the exit code.

    Raises:
        SpecError, PromptsError, SpecChanged: Nothing was started; exit code 2.
        LeaseHeld, LeaseLost: Another driver has the job; exit code 75.
        ClusterError: Ray or the store is gone; a later run resumes; exit code 75.
    """
    options = options or RunOptions()
    set_up_logging(json_lines=options.json_logs, verbose=options.verbose, facts={"job": spec.job_id})
    for warning in spec.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    stop = StopSwitch()
    with stop.on_signals():
        with stopped_at_once():
            found = check_before_start(spec, is_ray_job=ray_job_id() is not None)
            spec = spec.with_absolute_paths()
            print(_found_text(spec, found), flush=True)
            if options.dry_run:
                return 0
            resume = resume_command(spec)
            begin_record(found.store, spec, found.scan, found.weights)
            note_run(found.store, spec, found.scan, resume)
            print(f"to go on after a stop or a crash: {resume}", flush=True)
            if found.scan.num_open:
                print(f"{found.scan.num_open} left to do; waiting for Ray and its actors ...", flush=True)
        outcome = _run(spec, found, options, stop)
        print(_end_text(found.store, outcome, with_sheet=options.with_sheet))
    if not outcome.is_complete:
        print(f"{outcome.reason}; go on with: {resume}")
    if outcome.exit_code == EXIT_ITEMS_FAILED and spec.exit_zero_on_item_failures:
        return 0
    return outcome.exit_code


def resume_command(spec: JobSpec) -> str:
    """What to type to go on: the same job, whatever the working directory."""
    program = ["python", "-m", "jobs.render"] if ray_job_id() is not None else ["longtake", "render"]
    return shlex.join([*program, *arguments_of(spec)])


def _run(spec: JobSpec, found: Preflight, options: RunOptions, stop: StopSwitch) -> Outcome:
    if not found.scan.num_open and is_closed(found.store, found.replay):
        ledger = found.replay.ledger
        return Outcome(exit_code(ledger, spec.allowed_failures), "nothing is left to do", ledger.summary())
    frames_before = _committed_frames(found.store, found.replay)
    with ExitStack() as stack:
        with stopped_at_once():  # a cluster takes its time to come up
            ground = stack.enter_context(
                open_ground(spec, found.store.url, num_tasks=found.scan.num_tasks, start_now=found.scan.num_open > 0)
            )
        display = stack.enter_context(closing(make_display(json_logs=options.json_logs)))
        telemetry = stack.enter_context(closing(Telemetry(job=spec.job_id, model=spec.render.backbone.name)))
        feed, rate = TelemetryFeed(telemetry, spec.pricing.usd_per_gpu_hour, found.store), FrameRate()

        def show(view: JobView) -> None:
            progress = _progress(view, spec, found, frames_before)
            display.update(progress)
            rate.add(progress.frames_done)
            feed.show(view, found.scan.num_tasks, rate.eta_s(progress))

        def tell(result: RenderResult, shard: int) -> None:
            item = result.task_id.rpartition("-")[0]
            facts = {"shard": shard, "item": item, "task": result.task_id, "attempt": result.attempt}
            logger.info("video finished", extra=facts | {"frames": result.num_frames, "wall_s": result.wall_s})
            feed.finished(result)

        driver = Driver(
            replace(_inputs(spec, found), on_result=tell),
            found.store,
            ground.open_pool,
            ground.limits,
            takeover=options.takeover,
            stop=stop,
            on_progress=show,
        )
        stack.enter_context(_stop_requests(found.store, driver))
        try:
            return driver.run()
        except JobError as error:  # told outside: a refusal is no reason for a local Ray to leave its logs behind
            refusal = error
    raise refusal


def _source(spec: JobSpec) -> Iterator[PlannedTask | Rejected]:
    return plan_tasks(read_prompts(spec.source), spec.task_defaults)


def _inputs(spec: JobSpec, found: Preflight) -> JobInputs:
    price = spec.pricing.usd_per_gpu_hour
    facts = JobFacts(
        job_id=spec.job_id,
        store_url=found.store.url,
        input_uri=spec.prompts.url,
        render_fingerprint=spec.render_fingerprint,
        code_version=code_version(),
        usd_per_gpu_hour=price,
        usd_rate_source=None if price is None else "pricing.usd_per_gpu_hour",
    )
    video = spec.render.video
    card = {
        "model": spec.render.backbone.name,
        "video": f"{video.width}x{video.height}, {video.fps} frames/s",
        "job seed": str(spec.seed),
        "render fingerprint": spec.render_fingerprint,
    }
    return JobInputs(facts, _source(spec), spec.seed, spec.allowed_failures, card)


def _committed_frames(store: ObjectStore, replay: Replay) -> int:
    parts = PartSeries(store, MANIFEST, "")
    published = sum(pc.sum(table["num_frames"]).as_py() or 0 for table in parts.read_new(["num_frames"]))
    return int(published) + sum(int(json.loads(row.data)["num_frames"]) for row in replay.unpublished)


def _progress(view: JobView, spec: JobSpec, found: Preflight, frames_before: int) -> JobProgress:
    price = spec.pricing.usd_per_gpu_hour
    in_hand = sum(actor.frames_done for actor in view.actors)
    return JobProgress(
        num_tasks=found.scan.num_tasks,
        num_succeeded=view.num_succeeded,
        num_failed=view.num_failed,
        num_rejected=view.num_rejected,
        num_running=view.num_running,
        frames_done=frames_before + view.run_frames + in_hand,
        num_frames=found.scan.num_frames,
        usd=None if price is None else sum(view.gpu_seconds.values()) * price / 3600,
        actors=view.actors,
        note=view.note,
    )


@contextmanager
def _stop_requests(store: ObjectStore, driver: Driver) -> Iterator[None]:
    """Within, a `longtake cancel` from anywhere reaches the driver of this process."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(STOP_POLL_S):
            with suppress(StoreError):  # the driver itself judges a store that is away
                if driver.epoch is not None and is_stop_requested(store, driver.epoch):
                    driver.stop.request("longtake cancel")
                    return

    thread = threading.Thread(target=watch, name="stop-requests", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _found_text(spec: JobSpec, found: Preflight) -> str:
    scan = found.scan
    lines = [
        f"job {spec.job_id}: {scan.num_items} prompts, {scan.num_tasks} videos of up to {scan.longest_frames} frames "
        f"with {spec.render.backbone.name}",
        f"into {found.store.url}",
    ]
    if scan.num_rejected:
        lines.append(f"{scan.num_rejected} bad rows will stand in the quarantine; the first ones:")
        lines += [f"  line {row.line}: {row.kind}: {row.reason}" for row in scan.first_rejected[:5]]
    return "\n".join(lines)


def _end_text(store: ObjectStore, outcome: Outcome, *, with_sheet: bool) -> str:
    is_news = outcome.is_complete and (outcome.run_succeeded > 0 or store.size(SHEET_KEY) is None)
    report = make_report(store.url, with_sheet=with_sheet and is_news)
    lines = [report_text(report)]
    if report.num_videos:
        lines.append(f"  videos: {store.url}/videos/")
        lines.append(f"  manifest: {store.url}/{MANIFEST}part-*.parquet")
    if report.status.num_failed + report.status.num_rejected:
        lines.append(f"  what was given up or refused: {store.url}/{QUARANTINE}part-*.parquet")
    return "\n".join(lines)


if __name__ == "__main__":
    from jobs.cli import main

    main(["render", *sys.argv[1:]])
