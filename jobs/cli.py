"""The `longtake` command: one verb, one function called. Read verbs have `--json` and need the store alone.

Exit codes: 0 all good, 1 our fault or a timeout, 2 usage (nothing was started), 3 some items failed, 4 stopped and
resumable, 75 infrastructure (try again).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from cluster.errors import AccessDenied, ClusterError, StoreUnsuitable
from cluster.object_store import open_store
from jobs.doctor import examine
from jobs.errors import JobError, SpecError
from jobs.export import export as export_job
from jobs.flags import with_spec_flags
from jobs.models import models
from jobs.plan import JobPlan
from jobs.preflight import plan_job
from jobs.progress import duration_text, size_text
from jobs.render import RunOptions
from jobs.render import render as render_job
from jobs.report import make_report, report_text
from jobs.retry import reopen_failures
from jobs.spec_schema import schema_text
from jobs.spec_text import FieldPath, build_spec
from jobs.status import JobStatus, read_status, wait_for_end
from jobs.stop_request import request_stop
from jobs.verify import VerifyReport
from jobs.verify import verify as verify_job

EXIT_TIMEOUT, EXIT_USAGE, EXIT_ITEMS_FAILED, EXIT_TEMPFAIL = 1, 2, 3, 75

app = typer.Typer(
    name="longtake",
    help="Render long AI videos in bulk: a prompt list in, finished videos and Parquet manifests out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Verb = TypeVar("Verb", bound=Callable[..., Any])

Job = Annotated[str, typer.Argument(metavar="JOB", help="Folder of the job: <out>/<job_id>, local or s3://.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Config = Annotated[Path | None, typer.Option("--config", help="Spec as YAML; flags win over it.")]
Timeout = Annotated[float | None, typer.Option("--timeout", min=0.0, help="Seconds; exit 1 when they are up.")]
Sheet = Annotated[bool, typer.Option("--sheet/--no-sheet", help="Draw the contact sheet (into the job).")]
Rerender = Annotated[str, typer.Option("--rerender", metavar="1%", help="Render a share again, compare frames.")]
ExportForm = Annotated[Literal["webdataset", "videofolder"], typer.Option("--format", help="What to write.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="One field of the spec.")]


def _explained(verb: Verb) -> Verb:
    """Turn errors that a user or the world is to blame for into a line on stderr and their exit code."""

    @functools.wraps(verb)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except JobError as error:
            code, message = error.exit_code, str(error)
        except ClusterError as error:
            is_users = isinstance(error, AccessDenied | StoreUnsuitable)
            code, message = EXIT_USAGE if is_users else EXIT_TEMPFAIL, str(error)
        except ValueError as error:  # a store URL that cannot be one
            code, message = EXIT_USAGE, str(error)
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(code)

    return wrapper  # type: ignore[return-value]


def _print(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


@_explained
def _render(
    values: dict[FieldPath, Any],
    config: Config = None,
    assignments: Assignments = None,
    takeover: Annotated[bool, typer.Option("--takeover", help="Fence a driver that still holds the job.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, start nothing.")] = False,
    sheet: Sheet = True,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log one JSON object a line.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every decision.")] = False,
) -> None:
    """Render a prompt list; the same command again goes on where it stopped."""
    spec = build_spec(file=config, assignments=assignments or (), flags=values)
    options = RunOptions(takeover=takeover, dry_run=dry_run, json_logs=json_logs, verbose=verbose, with_sheet=sheet)
    raise typer.Exit(render_job(spec, options))


@_explained
def _plan(
    values: dict[FieldPath, Any],
    config: Config = None,
    assignments: Assignments = None,
    gpu_s_per_frame: Annotated[
        float | None, typer.Option("--gpu-s-per-frame", min=0.0, help="Speed, if you know it: GPU seconds a frame.")
    ] = None,
    like: Annotated[str | None, typer.Option("--like", metavar="JOB", help="Measure the speed on this job.")] = None,
    as_json: Json = False,
) -> None:
    """Check a job and say what it needs: videos, GPU hours, bytes, money. Starts nothing."""
    spec = build_spec(file=config, assignments=assignments or (), flags=values)
    plan = plan_job(spec, gpu_s_per_frame=gpu_s_per_frame, like=like)
    if as_json:
        _print(plan.as_dict() | {"spec": spec.model_dump(mode="json")})
    else:
        typer.echo(_plan_text(plan))


app.command("render")(with_spec_flags(_render))
app.command("plan")(with_spec_flags(_plan))
app.add_typer(models, name="models")


@app.command()
@_explained
def status(job: Job, as_json: Json = False) -> None:
    """Progress and failures of a job, cluster or not."""
    found = read_status(job)
    _print(found.as_dict()) if as_json else typer.echo(_status_text(found))


@app.command()
@_explained
def wait(
    job: Job,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0.0, help="Seconds; exit 1 when they are up.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Wait until nothing drives the job any more; exit with its code."""
    found = wait_for_end(job, timeout_s=timeout)
    if found is None:
        typer.echo(f"error: still running after {timeout} s", err=True)
        raise typer.Exit(EXIT_TIMEOUT)
    _print(found.as_dict()) if as_json else typer.echo(_status_text(found))
    code = found.exit_code
    raise typer.Exit(4 if found.state == "interrupted" or code is None else code)


@app.command()
@_explained
def report(
    job: Job,
    sheet: Annotated[
        bool, typer.Option("--sheet/--no-sheet", help="Draw the contact sheet (writes into the job).")
    ] = True,
    as_json: Json = False,
) -> None:
    """What the job delivered: figures, failures by kind, a contact sheet."""
    found = make_report(job, with_sheet=sheet)
    _print(found.as_dict()) if as_json else typer.echo(report_text(found))


@app.command()
@_explained
def retry(
    job: Job,
    kind: Annotated[list[str] | None, typer.Option("--kind", help="Only failures of this error_type.")] = None,
    item: Annotated[list[str] | None, typer.Option("--item", help="Only this item_id.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List them, reopen nothing.")] = False,
    render_now: Annotated[bool, typer.Option("--render/--no-render", help="Render them at once.")] = True,
    as_json: Json = False,
) -> None:
    """Give failed videos another chance."""
    reopened = reopen_failures(job, kinds=kind or (), items=item or (), dry_run=dry_run)
    if as_json:
        _print({"tasks": reopened.task_ids, "reopened": 0 if dry_run else len(reopened.task_ids)})
    else:
        typer.echo(f"{len(reopened.task_ids)} failed videos {'would be' if dry_run else 'are'} reopened")
    if render_now and not dry_run and reopened.task_ids:
        raise typer.Exit(render_job(reopened.spec, RunOptions()))


@app.command()
@_explained
def cancel(
    job: Job,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say whether there is something to stop.")] = False,
    as_json: Json = False,
) -> None:
    """Ask the driver of a job to stop: what is finished is committed, the rest can be resumed."""
    found = read_status(job)
    is_running = found.state in {"running", "stopping"}
    if is_running and not dry_run:
        request_stop(open_store(job))
    if as_json:
        _print({"state": found.state, "requested": is_running and not dry_run})
    else:
        typer.echo("the driver will stop within seconds" if is_running else f"nothing to stop: {found.state}")


@app.command()
@_explained
def verify(
    job: Job,
    quick: Annotated[bool, typer.Option("--quick", help="Existence and sizes only, no download.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Remove files that nobody names.")] = False,
    rerender: Annotated[
        str, typer.Option("--rerender", metavar="1%", help="Render a share again, compare frames.")
    ] = "0%",
    as_json: Json = False,
) -> None:
    """Check every video against the manifest; exit 3 if something is wrong."""
    found = verify_job(job, deep=not quick, sweep=sweep, rerender=_share(rerender))
    _print(found.as_dict()) if as_json else typer.echo(_verify_text(found))
    raise typer.Exit(0 if found.is_good else EXIT_ITEMS_FAILED)


@app.command()
@_explained
def export(
    job: Job,
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="An empty folder or prefix.")],
    export_format: Annotated[
        Literal["webdataset", "videofolder"], typer.Option("--format", help="Form.")
    ] = "webdataset",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: Json = False,
) -> None:
    """Copy the finished videos into webdataset shards or a Hugging Face VideoFolder."""
    found = export_job(job, destination, export_format, dry_run=dry_run)
    figures = {"videos": found.num_videos, "bytes": found.num_bytes, "files": found.num_files}
    _print(figures) if as_json else typer.echo(", ".join(f"{count} {name}" for name, count in figures.items()))


@app.command()
@_explained
def doctor(
    url: Annotated[str | None, typer.Argument(metavar="OUT", help="Where you want to write; is probed.")] = None,
    address: Annotated[str | None, typer.Option("--address", help="Ray address of a cluster to look at.")] = None,
    as_json: Json = False,
) -> None:
    """Examine this machine and, if named, a store and a cluster: is everything there that a render needs?"""
    findings = examine(url, address)
    if as_json:
        _print({"good": all(f.is_good for f in findings), "findings": [f.as_dict() for f in findings]})
    else:
        typer.echo("\n".join(f"{'ok  ' if f.is_good else 'FAIL'} {f.name}: {f.detail}" for f in findings))
    raise typer.Exit(0 if all(f.is_good for f in findings) else EXIT_USAGE)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec."""
    typer.echo(schema_text(), nl=False)


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise SpecError(f"--rerender {text}: give a share such as 1% or 0.01")
    return share


def _plan_text(plan: JobPlan) -> str:
    hours = "unknown" if plan.gpu_hours is None else f"{plan.gpu_hours:.2f}"
    wall = "unknown" if plan.wall_hours is None else duration_text(plan.wall_hours * 3600)
    lines = [
        f"job {plan.job_id} at {plan.job_url}",
        f"  {plan.num_items} prompts ({plan.num_rejected} rows rejected), {plan.num_tasks} videos, "
        f"{plan.num_done} done",
        f"  {plan.num_frames} frames, {duration_text(plan.video_s)} of video, longest {plan.longest_frames} frames",
        f"  GPU hours left: {hours} (speed: {plan.rate_source}); wall time: {wall}",
        f"  cost: {'unknown' if plan.usd is None else f'${plan.usd:.2f}'}; "
        f"storage: {'unknown' if plan.num_bytes is None else size_text(plan.num_bytes)}",
    ]
    return "\n".join(lines + [f"  note: {note}" for note in plan.notes])


def _status_text(found: JobStatus) -> str:
    left = found.num_tasks - found.num_succeeded - found.num_failed
    lines = [
        f"job {found.job_id}: {found.state}",
        f"  {found.num_succeeded}/{found.num_tasks} done, {found.num_failed} failed, "
        f"{found.num_rejected} rows rejected, {max(0, left)} left",
        f"  {found.num_parts} manifest parts, {found.num_unpublished} committed rows not yet in one",
    ]
    if found.failures:
        lines.append("  failures: " + ", ".join(f"{count} {kind}" for kind, count in found.failures.items()))
    if found.driver is not None and not found.driver["released"]:
        driver = found.driver
        gone = ", gone" if found.state == "interrupted" else ""
        lines.append(f"  driver: process {driver['pid']} on {driver['host']}, epoch {driver['epoch']}{gone}")
    if found.state in {"interrupted", "stopped"} and found.resume_command:
        lines.append(f"  go on with: {found.resume_command}")
    return "\n".join(lines)


def _verify_text(found: VerifyReport) -> str:
    lines = [f"{problem.kind}: {problem.key}: {problem.detail}" for problem in found.problems]
    lines.append(
        f"{found.num_videos} videos, {found.num_decoded} decoded, {found.num_rerendered} rendered again: "
        f"{len(found.problems)} problems"
    )
    lines.append(
        f"{found.num_orphans} files ({size_text(found.orphan_bytes)}) that nobody names, {found.num_swept} removed, "
        f"{found.num_in_progress} still being made"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    app(list(arguments) if arguments is not None else None)


if __name__ == "__main__":
    main()
