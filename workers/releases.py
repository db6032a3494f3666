"""Published models that we can load: where they are published, under which licence, which files, how large.

Facts only, without torch: the driver asks before anything starts. Names and licences are as their authors state them.
"""

from __future__ import annotations

from dataclasses import dataclass

APACHE = "Apache-2.0"
ACADEMIC_ONLY = "ACADEMIC USE ONLY: no commercial use and no production use (Tencent's own terms)"
CODE_APACHE_WEIGHTS_UNCLEAR = (
    "Apache-2.0 for the code; the card of the weights has said CC BY-NC-SA 4.0 (NO COMMERCIAL USE): read it before you "
    "use them"
)
UNLICENSED = "NO LICENCE FILE for its code; ask the authors before any use beyond reading"


@dataclass(frozen=True)
class Published:
    """One repository of weights."""

    repository: str
    """On huggingface.co."""
    licence: str
    files: tuple[str, ...]
    """What is needed of it; a name that ends in / is a folder."""

    @property
    def download(self) -> str:
        """What fetches it into a folder of that name.

        Each pattern has its own --include: the client takes a word behind the first one for a file name, and then
        downloads that file alone.
        """
        patterns = (f"{name}*" if name.endswith("/") else name for name in self.files)
        wanted = " ".join(f"--include '{pattern}'" for pattern in patterns)
        return f"hf download {self.repository} --local-dir {self.repository.rpartition('/')[2]} {wanted}"


@dataclass(frozen=True)
class Release:
    """What one backbone needs to be rendered with."""

    base: Published
    finetune: Published | None = None
    """Trained on top of the base: a distilled transformer, or LongVie 2's two files."""

    @property
    def finetune_names(self) -> tuple[str, ...]:
        """File names, without folders, by which the second part is recognised."""
        return tuple(name.rpartition("/")[2] for name in self.finetune.files) if self.finetune else ()

    @property
    def parts(self) -> tuple[Published, ...]:
        """All that is to be fetched."""
        return (self.base,) if self.finetune is None else (self.base, self.finetune)

    @property
    def licences(self) -> tuple[str, ...]:
        """One line for each part."""
        return tuple(f"{part.repository}: {part.licence}" for part in self.parts)


_COMMON = ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/")
_TRANSFORMER = ("diffusion_pytorch_model*",)
_WAN_1B = Published("Wan-AI/Wan2.1-T2V-1.3B", APACHE, (*_TRANSFORMER, *_COMMON))
_WAN_14B = Published("Wan-AI/Wan2.1-T2V-14B", APACHE, (*_TRANSFORMER, *_COMMON))
_WAN_I2V = Published(
    "Wan-AI/Wan2.1-I2V-14B-480P",
    APACHE,
    (*_TRANSFORMER, *_COMMON, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
)
_WAN_1B_COMPANIONS = Published(_WAN_1B.repository, APACHE, _COMMON)

RELEASES: dict[str, Release] = {
    "wan2.1-t2v-1.3b": Release(_WAN_1B),
    "wan2.1-t2v-14b": Release(_WAN_14B),
    "wan2.1-i2v-14b": Release(_WAN_I2V),
    "self-forcing-1.3b": Release(
        _WAN_1B_COMPANIONS,
        Published("gdhe17/Self-Forcing", CODE_APACHE_WEIGHTS_UNCLEAR, ("checkpoints/self_forcing_dmd.pt",)),
    ),
    "rolling-forcing-1.3b": Release(
        _WAN_1B_COMPANIONS,
        Published("TencentARC/RollingForcing", ACADEMIC_ONLY, ("checkpoints/rolling_forcing_dmd.pt",)),
    ),
    "longvie2-14b": Release(
        _WAN_I2V, Published("Vchitect/LongVie2", UNLICENSED, ("dit.safetensors", "control.safetensors"))
    ),
}
