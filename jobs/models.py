"""`longtake models`: which models there are, what they need, what is at a path, what a take costs on a GPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from workers import registry
from workers.errors import RenderError
from workers.registry import Estimate

EXIT_USAGE, EXIT_INCOMPLETE = 2, 3

models = typer.Typer(help="Models: list them, show what one needs and costs, check weights.", no_args_is_help=True)
Verb = TypeVar("Verb", bound=Callable[..., Any])

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Model, as in --model.")]
GpuName = Annotated[str | None, typer.Option("--gpu", help="For this GPU (h100, a100-80gb, ...); else the one here.")]
Frames = Annotated[int, typer.Option("--frames", min=1, help="Video frames of a take.")]
Width = Annotated[int | None, typer.Option("--width", min=16, help="Picture width; else what it was trained for.")]
Height = Annotated[int | None, typer.Option("--height", min=16, help="Picture height; else what it was trained for.")]


def _explained(verb: Verb) -> Verb:
    """A render error is the user's here: one line on stderr, exit code 2."""

    @functools.wraps(verb)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except RenderError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_USAGE) from error

    return wrapper  # type: ignore[return-value]


def _print(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


@models.command("list")
@_explained
def list_models(as_json: Json = False) -> None:
    """All models, their size, how they render, where their weights are and under which licence."""
    cards = registry.list_models()
    if as_json:
        _print({"models": [card.as_dict() for card in cards]})
        return
    for card in cards:
        size = f"{card.num_parameters / 1e9:.1f}B" if card.num_parameters > 5e7 else f"{card.num_parameters / 1e6:.0f}M"
        typer.echo(f"{card.name:22} {size:>6}  {card.width}x{card.height:<4} {card.rollout:9}  {card.source}")
        typer.echo(f"{'':22} {'':>6}  {card.licence}")


@models.command("show")
@_explained
def show(
    name: Name,
    gpu: GpuName = None,
    frames: Frames = 501,
    width: Width = None,
    height: Height = None,
    as_json: Json = False,
) -> None:
    """What a model needs, how to get it, and what a take of it costs."""
    found = registry.show_model(name)
    cost = registry.estimate(name, gpu=registry.find_gpu(gpu), width=width, height=height, num_frames=frames)
    if as_json:
        _print({**found, "estimate": cost.as_dict()})
        return
    lines = _model_text(found)
    if found["renders_alone"]:
        lines += _estimate_text(cost, found["fps"])
    else:
        lines.append("  takes a picture beside the noise: not rendered with by itself, others stand on it")
    typer.echo("\n".join(lines))


@models.command("check")
@_explained
def check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder or file of weights, local or s3://.")],
    name: Annotated[str | None, typer.Option("--model", help="What it should be; else it is found out.")] = None,
    finetune: Annotated[str | None, typer.Option("--finetune", help="What stands on top of it, if elsewhere.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a bucket's files here to look into them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What is at a path: layout, files, missing tensors. Exit 3 if something is missing."""
    found = registry.check(path, name, finetune, fetch=download)
    if as_json:
        _print(found)
    else:
        typer.echo(f"{found['url']}: {found['model'] or 'unknown model'}")
        for part in found["parts"]:
            typer.echo(f"  {'ok  ' if part['is_good'] else 'FAIL'} {part['part']}: {part['detail']}")
        for licence in found["licences"]:
            typer.echo(f"  licence: {licence}")
        typer.echo("complete" if found["is_complete"] else "not complete: nothing can be rendered from this yet")
    raise typer.Exit(0 if found["is_complete"] else EXIT_INCOMPLETE)


def _model_text(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['name']}: {found['width']}x{found['height']}, {found['fps']} frames/s, {found['rollout']}"]
    lines += [f"  {part}: {count:,} parameters" for part, count in found["parts"].items()]
    lines += [f"  licence: {licence}" for licence in found["licences"]]
    lines += ["  get it with:"] if found["download"] else []
    return lines + [f"    {command}" for command in found["download"]]


def _table_text(cost: Estimate, gib: Callable[[int], str]) -> list[str]:
    if cost.tile_table_bytes is None or cost.tile_table_peak_bytes is None:
        return []
    is_known = cost.tile_table_seconds is not None and cost.tile_table_seconds >= 1
    seconds = f", about {cost.tile_table_seconds:.0f} s, as assumed below" if is_known else ""
    return [
        f"    policy fastar-tiles: {gib(cost.tile_table_bytes)} for the whole history whatever the length, "
        f"peak about {gib(cost.tile_table_peak_bytes)}{seconds}",
    ]


def _estimate_text(cost: Estimate, fps: int) -> list[str]:
    def gib(num_bytes: int) -> str:
        return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"

    window = f"{gib(cost.native_cache_bytes)} in its window" if cost.native_cache_bytes else "none kept between clips"
    lines = [
        f"  a take of {cost.num_frames} frames ({cost.num_frames / fps:.0f} s), {cost.width}x{cost.height}, "
        f"{cost.num_steps} steps, bfloat16, worked out from the geometry:",
        f"    weights {gib(cost.weight_bytes)} on the GPU, text encoder {gib(cost.text_encoder_bytes)} of host memory",
        f"    keys and values: {window}, {gib(cost.whole_history_bytes)} for the whole history",
        f"    peak about {gib(cost.peak_bytes)} with pictures{' and that window' if cost.native_cache_bytes else ''}",
        *_table_text(cost, gib),
        f"    denoising {cost.teraflop:,.0f} TFLOP, VAE and encoding not counted",
    ]
    if cost.seconds is None:
        return [*lines, "    no known GPU here: name one with --gpu for its time"]
    fits = "fits" if cost.fits else "DOES NOT FIT"
    if cost.seconds < 1:
        return [*lines, f"    {cost.gpu}: {fits}; less than a second of arithmetic: what else it takes, measure"]
    return [
        *lines,
        f"    {cost.gpu}: {fits}; about {cost.seconds:.0f} s, {cost.frames_per_second:.1f} frames/s, if "
        f"{cost.utilisation:.0%} of its bfloat16 peak are reached (assumed, not measured)",
    ]
