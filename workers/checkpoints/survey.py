"""What is at a path: each part of a model, its layout, and how its tensors fit. Keeps nothing of them in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from workers.checkpoints.companions import (
    CLIP,
    UMT5,
    VAE,
    Companion,
    clip_shapes,
    find_companion,
    find_tokenizer,
    read_companion,
)
from workers.checkpoints.fetch import WeightFolder, open_folder
from workers.checkpoints.files import CARD_NAME, open_weights
from workers.checkpoints.longvie2 import CONTROL_FILE, DIT_FILE, read_control, replace_tensors
from workers.checkpoints.modules import fetch_tokenizer, find_finetune
from workers.checkpoints.place import build_empty, compare
from workers.checkpoints.rolling_forcing import read_generator
from workers.checkpoints.tensor_files import Stored
from workers.checkpoints.wan import fetch_tensors, find_dit, no_transformer, our_names, read_dit, read_sizes, sizes_of
from workers.config import BackboneConfig
from workers.errors import CheckpointMismatch, RenderError
from workers.model.backbones import Backbone, find_backbone
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT
from workers.model.image_encoder import make_image_encoder
from workers.model.text_encoder import TextEncoder
from workers.model.umt5 import make_umt5
from workers.model.vae import VideoVAE
from workers.model.wan_vae import make_wan_vae
from workers.releases import RELEASES

BUNDLED_BACKBONE = "longtake-world"


@dataclass(frozen=True)
class PartFinding:
    """One part of a model."""

    part: str
    is_good: bool
    detail: str


@dataclass(frozen=True)
class Survey:
    """All parts, and whether one can render."""

    url: str
    model: str | None
    parts: tuple[PartFinding, ...]

    @property
    def is_complete(self) -> bool:
        return self.model is not None and all(part.is_good for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_complete": self.is_complete}


def survey(url: str, name: str | None, finetune: str | None, *, fetch: bool) -> Survey:
    """Look at a folder or file of weights.

    Args:
        url: Local or s3://.
        name: Model that it should be; None guesses by file names, then by shapes.
        finetune: Where the part trained on top of the base is, if it is elsewhere.
        fetch: Open files of a bucket, which downloads them into the cache; local files are always opened.
    Raises:
        CheckpointMismatch: There is nothing at that path.
        ConfigUnsupported: No such model.
    """
    folder = open_folder(url)
    opens = fetch or not folder.store.url.startswith("s3://")
    _ = folder.sizes
    backbone, reason = (find_backbone(name), "") if name else _guess(folder, opens)
    if backbone is not None and backbone.text is not None:
        return Survey(folder.url, backbone.name, survey_bundled(folder, backbone, opens=opens))
    if backbone is None:
        beside = [] if folder.only else [_alone(folder, companion, opens=opens) for companion in (UMT5, VAE)]
        tokenizer = [] if folder.only else [_tokenizer(folder, None, opens=opens)]
        return Survey(folder.url, None, (PartFinding("transformer", False, reason), *beside, *tokenizer))
    parts = [
        _transformer(folder, backbone, finetune, opens=opens),
        _companion(folder, UMT5, lambda: make_umt5(backbone), opens=opens),
        _tokenizer(folder, backbone, opens=opens),
        _companion(folder, VAE, lambda: make_wan_vae(backbone), opens=opens),
    ]
    if backbone.control_branch is not None:
        parts.append(_control(folder, backbone, finetune, opens=opens))
    if backbone.image_encoder is not None:
        parts.append(_companion(folder, CLIP, lambda: make_image_encoder(backbone), opens=opens))
    return Survey(folder.url, backbone.name, tuple(parts))


def _guess(folder: WeightFolder, opens: bool) -> tuple[Backbone | None, str]:
    """By the published name of what stands on top of the base, else by the shapes of the transformer; or why not."""
    there = {key.rpartition("/")[2] for key in folder.sizes}
    for name, release in RELEASES.items():
        if release.finetune_names and set(release.finetune_names) <= there:
            return find_backbone(name), ""
    file = find_dit(folder)
    if file is None and CARD_NAME in folder.sizes:
        return find_backbone(BUNDLED_BACKBONE), ""
    if file is None:
        return None, no_transformer(folder)
    if not opens:
        return None, f"{file} (not opened): name the model with --model, or look inside with --download"
    try:
        found = _open_transformer(folder, file)
    except CheckpointMismatch as error:
        return None, str(error)
    sizes = read_sizes(found)
    if sizes is None:
        return None, f"{file}: {len(found)} tensors of no Wan transformer (first: {next(iter(found), 'none')})"
    return sizes.backbone(), f"{file}: {sizes.text()}; name the model with --model to see what differs"


def _open_transformer(folder: WeightFolder, file: str) -> Mapping[str, Stored]:
    return read_generator(folder) if folder.only else our_names(fetch_tensors(folder, file))[0]


def survey_bundled(folder: WeightFolder, backbone: Backbone, *, opens: bool) -> tuple[PartFinding, ...]:
    """A folder of the bundled model's kind: every byte against its card, every part against its network."""
    if not opens:
        is_there = CARD_NAME in folder.sizes
        return (PartFinding("weights", is_there, f"{CARD_NAME} {'(not opened)' if is_there else 'not there'}"),)
    try:
        weights = open_weights(folder.url)
    except RenderError as error:
        return (PartFinding("weights", False, str(error)),)
    makers = {"dit": lambda: CausalDiT(backbone), "text": lambda: TextEncoder(backbone), "vae": VideoVAE}
    names = {"dit": "transformer", "text": "text encoder", "vae": "VAE"}
    parts = []
    for part, make in makers.items():
        try:
            weights.fill(part, make())
        except RenderError as error:
            parts.append(PartFinding(names[part], False, str(error)))
        else:
            parts.append(PartFinding(names[part], True, f"revision {weights.revision[:12]}: all fit"))
    return tuple(parts)


def _transformer(folder: WeightFolder, backbone: Backbone, finetune: str | None, *, opens: bool) -> PartFinding:
    part = "transformer"
    try:
        overlays = find_finetune(backbone, BackboneConfig(name=backbone.name, finetune=finetune), folder)
        file = find_dit(folder)
        is_alone = bool(overlays) and DIT_FILE not in overlays
        shown = next(iter(overlays.values())).url if is_alone else file
        if shown is None:
            return PartFinding(part, False, no_transformer(folder))
        if not opens:
            return PartFinding(part, True, f"{shown} (by its name; not opened)")
        if is_alone:
            layout, found = "distilled", dict(read_generator(next(iter(overlays.values()))))
        elif folder.only:
            layout, found = "single file", dict(read_generator(folder))
        else:
            layout, found = our_names(fetch_tensors(folder, str(file)))[1], read_dit(folder)
        if DIT_FILE in overlays:
            layout, found = f"{layout}, with replacements", replace_tensors(found, overlays[DIT_FILE])
    except RenderError as error:
        return PartFinding(part, False, str(error))
    fit = compare(build_empty(lambda: CausalDiT(backbone)), found)
    sizes = None if fit.is_good else read_sizes(found)
    hint = f". By its shapes it has {sizes.text()}" if sizes and sizes != sizes_of(backbone) else ""
    return PartFinding(part, fit.is_good, f"{shown}: {layout} layout, {len(found)} tensors: {fit.text()}{hint}")


def _control(folder: WeightFolder, backbone: Backbone, finetune: str | None, *, opens: bool) -> PartFinding:
    part = "control module"
    try:
        config = BackboneConfig(name=backbone.name, finetune=finetune)
        where = find_finetune(backbone, config, folder)[CONTROL_FILE]
        if not opens:
            return PartFinding(part, True, f"{where.url} (by its name; not opened)")
        fit = compare(build_empty(lambda: ControlBranch(backbone)), read_control(where))
    except RenderError as error:
        return PartFinding(part, False, str(error))
    return PartFinding(part, fit.is_good, f"{where.url}: {fit.text()}")


def _companion(
    folder: WeightFolder, companion: Companion, make: Callable[[], nn.Module], *, opens: bool
) -> PartFinding:
    alone = _alone(folder, companion, opens=opens)
    if not alone.is_good or not opens:
        return alone
    try:
        found = read_companion(folder, companion)
        fit = compare(build_empty(make), clip_shapes(found) if companion is CLIP else found)
    except RenderError as error:
        return PartFinding(companion.what, False, str(error))
    name = find_companion(folder, companion) or ""
    layout = "diffusers" if name.startswith(f"{companion.folder}/") else "original"
    return PartFinding(companion.what, fit.is_good, f"{name}: {layout} layout: {fit.text()}")


def _alone(folder: WeightFolder, companion: Companion, *, opens: bool) -> PartFinding:
    """Is it there, and can it be opened?"""
    name = find_companion(folder, companion)
    if name is None:
        where = "in the folder of the base model" if folder.only else "published with the base model"
        detail = f"not there: {companion.published} or {companion.folder}/, {where}"
        return PartFinding(companion.what, False, detail)
    if not opens:
        return PartFinding(companion.what, True, f"{name} (by its name; not opened)")
    try:
        found = read_companion(folder, companion)
    except RenderError as error:
        return PartFinding(companion.what, False, str(error))
    return PartFinding(companion.what, True, f"{name}: {len(found)} tensors")


def _tokenizer(folder: WeightFolder, backbone: Backbone | None, *, opens: bool) -> PartFinding:
    part, name = "tokenizer", find_tokenizer(folder)
    if name is None:
        return PartFinding(part, False, "not there: google/umt5-xxl/ or tokenizer/, published with the base model")
    if not opens:
        return PartFinding(part, True, f"{name} (by its name; not opened)")
    try:
        num_words = fetch_tokenizer(folder, name).get_vocab_size()
    except RenderError as error:
        return PartFinding(part, False, str(error))
    rows = num_words if backbone is None or backbone.umt5 is None else backbone.umt5.num_words
    detail = f"{name}: {num_words} words" + (f", the text encoder knows {rows}" if num_words > rows else "")
    return PartFinding(part, num_words <= rows, detail)
