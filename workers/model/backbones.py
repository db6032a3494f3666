"""Named architectures: sizes only. Every shape of the model side is derived from one of these records.

The bundled model and the Wan checkpoints are the same class (`dit.py`) with other numbers; what a number means to the
picture (positions, latents, timing) is said here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.errors import ConfigUnsupported


@dataclass(frozen=True)
class TextSizes:
    """The bundled text encoder; Wan's own umT5 encoder is not described here."""

    num_layers: int
    num_heads: int
    num_rows: int
    """Rows of the table that hashed words and word pieces share."""


@dataclass(frozen=True)
class Backbone:
    """Sizes of one causal video DiT and of what feeds it."""

    name: str
    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    in_channels: int
    text_dim: int
    text_tokens: int
    width: int
    height: int
    """Picture size in pixels that the weights were trained for."""
    text: TextSizes | None = None
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 10000.0
    world_rope: bool = False
    """Rows and columns of RoPE are world coordinates (in tokens) instead of coordinates in the picture."""
    control_octaves: int = 0
    """Octaves of Fourier features of the world coordinates; 0 means that the model takes no camera."""
    image_dim: int = 0
    """Width of image tokens (257 of them in Wan I2V); 0 means that the model takes none."""
    chunk_latent_frames: int = 3
    temporal_stride: int = 4
    spatial_stride: int = 8
    first_video_frames: int = 1
    """Pictures that the first latent frame decodes to; each later one gives `temporal_stride`."""
    fps: int = 16
    sampler: Literal["euler", "renoise"] = "renoise"
    """How a denoising step goes on: along the flow, or from the clean estimate with fresh noise (distilled models)."""

    def __post_init__(self) -> None:
        assert self.dim % self.num_heads == 0
        assert self.head_dim % 2 == 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def control_channels(self) -> int:
        """Sine and cosine per octave for x and y, then the motion of each picture inside its latent frame."""
        return 4 * self.control_octaves + 2 * self.temporal_stride if self.control_octaves else 0

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """Latent (height, width) of a picture size.

        Raises:
            ConfigUnsupported: The size does not divide into whole tokens.
        """
        pitch_h, pitch_w = self.spatial_stride * self.patch[1], self.spatial_stride * self.patch[2]
        if width % pitch_w or height % pitch_h:
            raise ConfigUnsupported(
                f"{width}x{height} pixels do not divide into tokens of {pitch_w}x{pitch_h} pixels of {self.name}"
            )
        return height // self.spatial_stride, width // self.spatial_stride

    def token_grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of this (height, width)."""
        return latent_size[0] // self.patch[1], latent_size[1] // self.patch[2]

    def tokens_per_latent_frame(self, width: int, height: int) -> int:
        """Tokens of a latent frame at this picture size."""
        rows, columns = self.token_grid(self.latent_size(width, height))
        return rows * columns

    def num_video_frames(self, latent_frames: int) -> int:
        """Pictures that `latent_frames` decode to from the start of a video."""
        return 0 if latent_frames == 0 else self.first_video_frames + self.temporal_stride * (latent_frames - 1)

    def num_chunks(self, num_frames: int) -> int:
        """Whole chunks needed for at least `num_frames` pictures."""
        missing = max(0, num_frames - self.first_video_frames)
        latent_frames = 1 + -(-missing // self.temporal_stride)
        return -(-latent_frames // self.chunk_latent_frames)

    def chunk_of_frame(self, frame: int) -> int:
        """Chunk that decodes to this video frame."""
        missing = max(0, frame - self.first_video_frames + 1)
        return (-(-missing // self.temporal_stride)) // self.chunk_latent_frames


_WORLD = Backbone(
    name="longtake-world",
    dim=256,
    num_layers=8,
    num_heads=4,
    ffn_dim=768,
    in_channels=16,
    text_dim=128,
    text_tokens=512,
    width=128,
    height=128,
    text=TextSizes(num_layers=2, num_heads=4, num_rows=4096),
    control_octaves=12,
    first_video_frames=4,
    sampler="renoise",
)

_TINY = Backbone(
    name="tiny-test",
    dim=80,
    num_layers=3,
    num_heads=2,
    ffn_dim=96,
    in_channels=16,
    text_dim=32,
    text_tokens=64,
    width=64,
    height=32,
    text=TextSizes(num_layers=1, num_heads=2, num_rows=64),
    control_octaves=12,
    first_video_frames=4,
    sampler="euler",
)

_WAN_1B = Backbone(
    name="wan2.1-t2v-1.3b",
    dim=1536,
    num_layers=30,
    num_heads=12,
    ffn_dim=8960,
    in_channels=16,
    text_dim=4096,
    text_tokens=512,
    width=832,
    height=480,
)

_WAN_14B = Backbone(
    name="wan2.1-t2v-14b",
    dim=5120,
    num_layers=40,
    num_heads=40,
    ffn_dim=13824,
    in_channels=16,
    text_dim=4096,
    text_tokens=512,
    width=832,
    height=480,
)

_WAN_I2V = Backbone(
    name="wan2.1-i2v-14b",
    dim=5120,
    num_layers=40,
    num_heads=40,
    ffn_dim=13824,
    in_channels=36,
    text_dim=4096,
    text_tokens=512,
    width=640,
    height=352,
    image_dim=1280,
)

BACKBONES: dict[str, Backbone] = {b.name: b for b in (_WORLD, _TINY, _WAN_1B, _WAN_14B, _WAN_I2V)}


def find_backbone(name: str) -> Backbone:
    """The sizes of a named architecture.

    Raises:
        ConfigUnsupported: No such name; the message lists those that exist.
    """
    if name not in BACKBONES:
        raise ConfigUnsupported(f"backbone.name: unknown model {name!r}; known: {', '.join(BACKBONES)}")
    return BACKBONES[name]
