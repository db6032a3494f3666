"""Named architectures: sizes only. Every shape of the model side is derived from one of these records.

The bundled model and the Wan checkpoints are the same class (`dit.py`) with other numbers; what a number means to the
picture (positions, latents, timing) is said here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
class Umt5Sizes:
    """Wan's text encoder; its width is the `text_dim` of the backbone."""

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_words: int
    """Rows of the vocabulary, unused ones included."""


@dataclass(frozen=True)
class WanVaeSizes:
    """Wan's VAE; latent channels and strides are those of the backbone."""

    dim: int
    multipliers: tuple[int, int, int, int] = (1, 2, 4, 4)
    num_units: int = 2
    """Residual units in a stage of the encoder; the decoder has one more."""


@dataclass(frozen=True)
class ImageEncoderSizes:
    """The vision tower of CLIP whose last layer but one gives the image tokens; its width is `image_dim`."""

    num_layers: int
    num_heads: int
    ffn_dim: int
    picture: int
    """Height and width of the picture that it sees."""
    patch: int


@dataclass(frozen=True)
class ControlBranchSizes:
    """The control module of LongVie 2: two stacks of narrower layers beside the first layers of the model."""

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int


@dataclass(frozen=True)
class Native:
    """How a published model was trained to be sampled: what it is rendered with unless somebody asks for other."""

    num_steps: int
    shift: float
    guidance: float = 1.0
    window_chunks: int = 1
    """Chunks denoised together, each at a level of its own; 1 is chunk by chunk."""
    attended_latent_frames: int = 21
    """Latent frames that a query sees at most, the noisy ones included."""
    sink_latent_frames: int = 0
    """First latent frames that stay visible, moved to stand right before the recent ones."""


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
    rollout: Literal["chunkwise", "rolling", "clipwise"] = "chunkwise"
    """How chunks follow one another: one at a time, several at falling noise levels, or whole clips (`rollouts/`)."""
    native: Native | None = None
    control_branch: ControlBranchSizes | None = None
    """Depth and track maps (LongVie 2); None means that the model takes none."""
    umt5: Umt5Sizes | None = None
    wan_vae: WanVaeSizes | None = None
    image_encoder: ImageEncoderSizes | None = None

    def __post_init__(self) -> None:
        assert self.dim % self.num_heads == 0
        assert self.head_dim % 2 == 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def renders_alone(self) -> bool:
        """False for a model that takes a picture beside the noise: it is loaded as the base of others only."""
        return self.rollout == "clipwise" or self.in_channels == self.latent_channels

    @property
    def clip_stride(self) -> int:
        """Pictures from the start of a clip to that of the next, whose first picture is the last of this one."""
        return self.temporal_stride * (self.chunk_latent_frames - 1)

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
                f"video: {width}x{height} pixels do not divide into tokens of {pitch_w}x{pitch_h} pixels of {self.name}"
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
        if self.rollout == "clipwise":
            return max(1, -(-(num_frames - 1) // self.clip_stride))
        missing = max(0, num_frames - self.first_video_frames)
        latent_frames = 1 + -(-missing // self.temporal_stride)
        return -(-latent_frames // self.chunk_latent_frames)

    def chunk_of_frame(self, frame: int) -> int:
        """Chunk that decodes to this video frame; where clips overlap, the earlier one."""
        if self.rollout == "clipwise":
            return max(0, frame - 1) // self.clip_stride
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

_UMT5_XXL = Umt5Sizes(num_layers=24, num_heads=64, head_dim=64, ffn_dim=10240, num_words=256384)
_WAN_VAE = WanVaeSizes(dim=96)
_CLIP_VIT_H = ImageEncoderSizes(num_layers=32, num_heads=16, ffn_dim=5120, picture=224, patch=14)

_TINY_WAN = Backbone(
    name="tiny-wan-test",
    dim=80,
    num_layers=3,
    num_heads=2,
    ffn_dim=96,
    in_channels=16,
    text_dim=32,
    text_tokens=24,
    width=64,
    height=32,
    umt5=Umt5Sizes(num_layers=2, num_heads=4, head_dim=8, ffn_dim=48, num_words=128),
    wan_vae=WanVaeSizes(dim=4),
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
    umt5=_UMT5_XXL,
    wan_vae=_WAN_VAE,
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
    umt5=_UMT5_XXL,
    wan_vae=_WAN_VAE,
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
    umt5=_UMT5_XXL,
    wan_vae=_WAN_VAE,
    image_encoder=_CLIP_VIT_H,
)

_WAN_1B_TEST = replace(
    _WAN_1B,  # all its sizes but for the text encoder, whose 11 GB say nothing about a render's time
    name="wan-1.3b-test",
    umt5=Umt5Sizes(num_layers=2, num_heads=8, head_dim=64, ffn_dim=1024, num_words=128),
    native=Native(num_steps=4, shift=5.0),
)

_SELF_FORCING = replace(_WAN_1B, name="self-forcing-1.3b", native=Native(num_steps=4, shift=5.0))

_ROLLING_FORCING = replace(
    _WAN_1B,
    name="rolling-forcing-1.3b",
    rollout="rolling",
    native=Native(num_steps=5, shift=5.0, window_chunks=5, sink_latent_frames=3),
)

_LONGVIE2 = replace(
    _WAN_I2V,
    name="longvie2-14b",
    sampler="euler",
    rollout="clipwise",
    chunk_latent_frames=21,  # a clip of 81 pictures is one chunk
    native=Native(num_steps=50, shift=5.0, guidance=5.0),
    control_branch=ControlBranchSizes(dim=2560, num_layers=12, num_heads=20, ffn_dim=6912),
)

BACKBONES: dict[str, Backbone] = {
    b.name: b
    for b in (
        *(_WORLD, _TINY, _TINY_WAN, _WAN_1B, _WAN_14B, _WAN_I2V, _SELF_FORCING, _ROLLING_FORCING, _LONGVIE2),
        _WAN_1B_TEST,
    )
}


@dataclass(frozen=True)
class AttentionGeometry:
    """Self-attention of a model that is measured but not rendered with: enough for benchmarks of attention."""

    name: str
    num_layers: int
    num_heads: int
    head_dim: int
    latent_frames: int
    rows: int
    columns: int
    text_tokens: int
    """Prompt tokens that stand in the same softmax as the video's."""
    rope_channels: tuple[int, int, int]
    rope_theta: float

    @property
    def num_tokens(self) -> int:
        """Tokens of one call."""
        return self.latent_frames * self.rows * self.columns + self.text_tokens


HUNYUAN_VIDEO = AttentionGeometry(
    name="hunyuanvideo",
    num_layers=60,  # 20 with two streams and 40 with one; all attend jointly
    num_heads=24,
    head_dim=128,
    latent_frames=33,  # 129 pictures of 1280x720
    rows=45,
    columns=80,
    text_tokens=256,
    rope_channels=(16, 56, 56),
    rope_theta=256.0,
)


def find_backbone(name: str) -> Backbone:
    """The sizes of a named architecture.

    Raises:
        ConfigUnsupported: No such name; the message lists those that exist.
    """
    if name not in BACKBONES:
        raise ConfigUnsupported(f"backbone.name: unknown model {name!r}; known: {', '.join(BACKBONES)}")
    return BACKBONES[name]
