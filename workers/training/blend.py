"""Blend weights that were trained from one start: `python -m workers.training.blend DIR=0.5 DIR=0.5 --out DIR`.

The mean of runs that differ in data, order and recipe is often better than each of them (model soups, Wortsman et al.,
2022), and one between a start and its fine-tuned end trades what the two are good at. Only the DiT is blended; text
encoder, VAE and card are those of the first folder. `--dit FILE` writes the DiT of one folder alone, which is all that
two runs from one start differ in; such a file may stand for a folder after the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.checkpoints.files import open_weights, save_weights
from workers.model.backbones import Backbone, find_backbone
from workers.model.vae import VideoVAE
from workers.training.sequence import WorldModel


def open_dit(source: Path, backbone: Backbone) -> dict[str, Tensor]:
    """Float32 state of the DiT in a folder of weights, or in a file of `write_dit`."""
    dit = WorldModel(backbone).dit
    if source.is_dir():
        open_weights(source).fill("dit", dit)
    else:
        dit.load_state_dict({name: tensor.float() for name, tensor in load_file(str(source)).items()})
    return dit.state_dict()


def write_dit(source: Path, file: Path, backbone: Backbone) -> None:
    """Write the DiT of a folder alone, float16."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in open_dit(source, backbone).items()}, str(file))


def blend(sources: Sequence[tuple[Path, float]], out: Path, backbone: Backbone) -> str:
    """Write the weighted mean of several DiTs; returns the revision.

    Args:
        sources: Folders, or files after the first folder, and what each counts for; any sum but zero.
        out: Folder of the result.
        backbone: Of all of them.
    Raises:
        ValueError: The shares sum to zero.
    """
    total = sum(share for _, share in sources)
    if not total:
        raise ValueError("shares sum to zero: give each folder a share, for example DIR=0.5")
    first = open_weights(sources[0][0])
    model, vae = WorldModel(backbone), VideoVAE()
    first.fill("text", model.text_encoder)
    first.fill("vae", vae)
    states = [(open_dit(source, backbone), share / total) for source, share in sources]
    names = states[0][0]
    mean = {
        name: sum((state[name] * share for state, share in states[1:]), names[name] * states[0][1]) for name in names
    }
    model.dit.load_state_dict(mean)
    blended = {_name_of(source): round(share / total, 4) for source, share in sources}
    return save_weights(
        out, {"dit": model.dit, "text": model.text_encoder, "vae": vae}, {**first.card, "blend": blended}
    )


def _name_of(source: Path) -> str:
    """Revision of a folder, or name of a file."""
    return open_weights(source).revision[:16] if source.is_dir() else source.stem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", help="DIR=SHARE; a share that is not given is 1")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder of the result")
    where.add_argument("--dit", type=Path, help="write the DiT of the only source to this file")
    options = parser.parse_args()
    backbone = find_backbone("longtake-world")
    sources = [(Path(text.partition("=")[0]), float(text.partition("=")[2] or 1)) for text in options.sources]
    if options.dit:
        if len(sources) != 1:
            parser.error("--dit takes one source")
        write_dit(sources[0][0], options.dit, backbone)
    else:
        print(blend(sources, options.out, backbone))


if __name__ == "__main__":
    main()
