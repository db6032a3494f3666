"""What a render looks like, as frozen records: everything in here may change pixels, and nothing outside it may.

Loads without torch, so that a driver can validate a job on a machine that has no GPU packages. The resolved record and
its hash (``render_fingerprint``) travel with every task and stand in every manifest row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from workers import config_tiles
from workers.config_part import HistoryAt, Part, check_steps
from workers.config_reuse import NoReuseConfig, ReuseConfig
from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.named_policies import PolicyName, fill_in

BUNDLED_WEIGHTS = Path(__file__).parent / "training" / "weights"
"""Of a backbone that names no checkpoint."""
SEEDED_BACKBONE = "tiny-test"
"""Has no weights: it starts from numbers drawn with a fixed seed, for tests of everything but the picture."""


class BackboneConfig(Part):
    """Which model renders."""

    name: str = Field("longtake-world", description="Architecture and weights; `longtake models list` shows them.")
    checkpoint: str | None = Field(
        None, description="Path or s3:// URL of weights; empty means the weights bundled with the package."
    )
    finetune: str | None = Field(
        None,
        description="Path or s3:// URL of what was trained on top of the checkpoint: a distilled .pt, or the folder of "
        "LongVie 2's two files; empty: looked for in the checkpoint's folder.",
    )
    use_ema: bool = Field(True, description="Of a distilled checkpoint with both, the averaged weights.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Arithmetic of the transformer.")
    compiled: bool = Field(
        False,
        description="Compile the transformer around its attention: a slower start, other last bits, "
        "and on a GPU fewer trips to memory.",
    )
    fp8: Literal["none", "ffn", "large", "all"] = Field(
        "none",
        description="Linear layers in 8-bit floats: those of the feed-forward, also those of queries, keys and values, "
        "or all in a layer; in denoising steps, not in clean passes. Faster on a GPU that multiplies such, a little "
        "less exact; with cache.kind: tiles only.",
    )

    @field_validator("checkpoint", "finetune")
    @classmethod
    def _name_from_anywhere(cls, url: str | None) -> str | None:
        """Actors have working directories of their own."""
        return url if url is None or "://" in url else str(Path(url).expanduser().absolute())


class SamplingConfig(Part):
    """How noise becomes a clean chunk."""

    num_steps: int = Field(4, ge=1, le=64, description="Denoising steps per chunk.")
    shift: float = Field(3.0, gt=0.0, le=20.0, description="Timestep shift of the flow-matching schedule.")
    guidance: float = Field(
        1.0, ge=0.0, le=20.0, description="Classifier-free guidance; 1 means off (one call a step)."
    )


SearchName = Literal["exact", "lsh", "quant", "faiss-lsh", "faiss-flat", "faiss-sq8"]


class DenseCacheConfig(Part):
    """Every key of the whole history, uncompressed: memory grows with the video."""

    kind: Literal["dense"] = "dense"


class WindowCacheConfig(Part):
    """The first latent frames and the newest ones; all between is forgotten."""

    kind: Literal["window"] = "window"
    sink_latent_frames: int = Field(3, ge=0, description="First latent frames, always kept.")
    recent_latent_frames: int = Field(21, ge=1, description="Newest latent frames kept.")


class TemporalCacheConfig(Part):
    """The whole history under a fixed number of bytes: keys of one thing over time become one key (TempCache)."""

    kind: Literal["temporal"] = "temporal"
    sink_latent_frames: int = Field(3, ge=0, description="First latent frames, kept as they are.")
    recent_latent_frames: int = Field(6, ge=1, description="Newest latent frames, kept as they are.")
    budget_latent_frames: int = Field(
        119, ge=2, description="Hard limit: the bytes that so many latent frames take uncompressed in bfloat16."
    )
    min_cosine: float = Field(
        0.99999,
        description="Keys join a group from this cosine (before RoPE, in [-1, 1]) on; a full cache goes lower.",
    )
    storage: Literal["model", "int8", "int4"] = Field("int8", description="How old keys and values are stored.")
    search: SearchName = Field("exact", description="Who finds the nearest key.")

    @field_validator("min_cosine")
    @classmethod
    def _is_a_cosine(cls, value: float) -> float:
        if not -1.0 <= value <= 1.0:
            raise ValueError(f"cache.min_cosine: {value} is outside of [-1, 1]")
        return value

    @model_validator(mode="after")
    def _leave_room_for_history(self) -> Self:
        least = self.sink_latent_frames + self.recent_latent_frames + 3
        if self.budget_latent_frames < least:
            raise ValueError(
                f"cache.budget_latent_frames: {self.budget_latent_frames} is below {least}, the sum of "
                f"sink_latent_frames {self.sink_latent_frames}, recent_latent_frames {self.recent_latent_frames} and a "
                "chunk of 3"
            )
        return self


class FlowCacheConfig(Part):
    """A fixed number of keys per head, chosen by importance and against redundancy (FlowCache)."""

    kind: Literal["flow"] = "flow"
    sink_latent_frames: int = Field(3, ge=0, description="First latent frames, always kept.")
    recent_latent_frames: int = Field(6, ge=1, description="Newest latent frames, always kept.")
    budget_latent_frames: int = Field(120, ge=2, description="Hard limit: latent frames' worth of keys, all together.")
    importance: float = Field(0.07, ge=0.0, le=1.0, description="Weight of importance; redundancy has the rest.")

    @model_validator(mode="after")
    def _leave_room_for_history(self) -> Self:
        least = self.sink_latent_frames + self.recent_latent_frames + 3
        if self.budget_latent_frames < least:
            raise ValueError(
                f"cache.budget_latent_frames: {self.budget_latent_frames} is below {least}, the sum of "
                f"sink_latent_frames {self.sink_latent_frames}, recent_latent_frames {self.recent_latent_frames} and a "
                "chunk of 3"
            )
        return self


class NativeCacheConfig(Part):
    """The window, the sink and the times that a published model was trained with; brings its own attention."""

    kind: Literal["native"] = "native"


CacheConfig = Annotated[
    DenseCacheConfig | WindowCacheConfig | TemporalCacheConfig | FlowCacheConfig | NativeCacheConfig | TileCacheConfig,
    Field(discriminator="kind"),
]


class DenseAttentionConfig(Part):
    """Every query attends to every key that the cache holds."""

    kind: Literal["dense"] = "dense"


class AnnSelfAttentionConfig(Part):
    """A query attends to the keys of its own buckets (AnnSA)."""

    kind: Literal["annsa"] = "annsa"
    search: SearchName = Field("quant", description="What tells near keys from far ones.")
    order: Literal["time", "bucket"] = Field(
        "time", description="How keys are put into tiles: pieces of a picture, or keys of one bucket (the paper's)."
    )
    num_buckets: int = Field(64, ge=2, le=4096, description="Buckets of a head in `bucket` order; a power of two.")
    tile: int | None = Field(
        None, ge=8, le=1024, description="Keys of a tile; empty: a latent frame, at most 128, or half of one as below."
    )
    query_tile: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="Queries of a tile; empty: as `tile`, or with `seen_latent_frames` those that fit into 192.",
    )
    sink_latent_frames: int = Field(3, ge=0, description="First latent frames, seen by all.")
    recent_latent_frames: int = Field(6, ge=1, description="Newest latent frames, seen by all.")
    density: float = Field(0.3, gt=0.0, le=1.0, description="Share of the history's keys that a query sees.")
    seen_latent_frames: int | None = Field(None, ge=1, description="So much of it instead, where its mass is.")
    seen_across: Literal["layer", "model"] = Field(
        "layer", description="Who competes for it: heads of a layer, or, after a chunk's first step, all layers."
    )
    clean_pass_share: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Of what a step sees by `seen_latent_frames` or `target_recall`, what the clean pass sees; empty: "
        "a third with `seen_across: model`, or with a target that looks once, where a latent frame has at most 96 "
        "tokens, else all.",
    )
    history_at: HistoryAt = None
    target_recall: float | None = Field(
        None, gt=0.0, le=1.0, description="Sets the density for each layer, head and noise level; empty keeps it."
    )
    dense_step_share: float = Field(0.3, ge=0.0, le=1.0, description="Share of the first steps that stay dense.")
    # a list in files
    layers: tuple[int, ...] | None = Field(None, strict=False, description="Layers that are sparse; empty means all.")
    calibration: str | None = Field(None, description="File that says which layers are sparse, for these weights.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_buckets & (self.num_buckets - 1):
            raise ValueError(f"attention.num_buckets: {self.num_buckets} is not a power of two in [2, 4096]")
        if self.layers is not None and self.calibration is not None:
            raise ValueError("attention.layers and attention.calibration: give one of them, both say which are sparse")
        if self.layers is not None and any(layer < 0 for layer in self.layers):
            raise ValueError(f"attention.layers: {self.layers} names a layer below 0")
        check_steps("attention.history_at", self.history_at)
        return self


class StreamingAttentionConfig(Part):
    """A query sees the first and the newest latent frames, whatever the cache holds."""

    kind: Literal["streaming"] = "streaming"
    sink_latent_frames: int = Field(3, ge=0, description="First latent frames, seen by all.")
    recent_latent_frames: int = Field(21, ge=1, description="Newest latent frames, seen by all.")


class PatternConfig(Part):
    """What the baselines share: where they are dense, and their tiles."""

    sink_latent_frames: int = Field(3, ge=0, description="First latent frames, seen by all.")
    recent_latent_frames: int = Field(6, ge=1, description="Newest latent frames, seen by all.")
    dense_step_share: float = Field(0.25, ge=0.0, le=1.0, description="Share of the first steps that stay dense.")
    dense_layers: int = Field(1, ge=0, description="First layers that stay dense.")
    tile: int | None = Field(
        None, ge=1, le=1024, description="Queries and keys of a tile; empty: a quarter of a latent frame, at most 128."
    )


class RadialAttentionConfig(PatternConfig):
    """A static mask whose width halves with each doubling of the distance in time (RadialAttention)."""

    kind: Literal["radial"] = "radial"
    decay: float = Field(1.0, gt=0.0, le=1000.0, description="Factor on the width of the mask.")


class SvgAttentionConfig(PatternConfig):
    """Each head is spatial or temporal, found by profiling (SparseVideoGen)."""

    kind: Literal["svg"] = "svg"
    density: float = Field(0.25, gt=0.0, le=1.0, description="Share of the history's keys that a query sees.")
    num_samples: int = Field(64, ge=1, le=4096, description="Queries that profile a head in each call.")


class Svg2AttentionConfig(PatternConfig):
    """Queries and keys in the order of k-means; a query cluster sees the key clusters with most mass (SVG 2)."""

    kind: Literal["svg2"] = "svg2"
    top_p: float = Field(0.9, gt=0.0, le=1.0, description="Share of the predicted attention mass that is seen.")
    min_share: float = Field(0.1, ge=0.0, le=1.0, description="Share of the key clusters that is always seen.")
    queries_per_cluster: int = Field(16, ge=1, description="Mean size of a query cluster.")
    keys_per_cluster: int = Field(64, ge=1, description="Mean size of a key cluster, while there are few enough.")
    max_key_clusters: int = Field(1000, ge=1, description="Most key clusters of a head.")


AttentionConfig = Annotated[
    DenseAttentionConfig
    | AnnSelfAttentionConfig
    | StreamingAttentionConfig
    | RadialAttentionConfig
    | SvgAttentionConfig
    | Svg2AttentionConfig
    | TileAttentionConfig,
    Field(discriminator="kind"),
]


class DensePromptConfig(Part):
    """Every query attends to every row of the prompt."""

    kind: Literal["dense"] = "dense"


class AnnPromptConfig(Part):
    """Rows of the prompt that fall into no bucket of a current query are left out for this step (AnnCA)."""

    kind: Literal["annca"] = "annca"
    search: SearchName = Field("quant", description="What makes the buckets.")
    num_buckets: int = Field(16, ge=2, le=4096, description="Buckets of a head, a power of two; more keep fewer rows.")
    dense_step_share: float = Field(0.0, ge=0.0, le=1.0, description="Share of the first steps that stay dense.")
    # a list in files
    layers: tuple[int, ...] | None = Field(None, strict=False, description="Layers that choose; empty means all.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers is not None and any(layer < 0 for layer in self.layers):
            raise ValueError(f"prompt_attention.layers: {self.layers} names a layer below 0")
        if self.num_buckets & (self.num_buckets - 1):
            raise ValueError(f"prompt_attention.num_buckets: {self.num_buckets} is not a power of two in [2, 4096]")
        return self


PromptAttentionConfig = Annotated[DensePromptConfig | AnnPromptConfig, Field(discriminator="kind")]


class PositionsConfig(Part):
    """Which time the rotation of a cached key gets."""

    time: Literal["absolute", "relative", "capped"] = Field(
        "absolute", description="As made; counted from the newest query; or that with a largest distance."
    )
    cap_latent_frames: int = Field(750, ge=1, description="Largest distance in time that `capped` lets the model see.")


class GuardConfig(Part):
    """Watches how much attention the compression costs, and acts on it while the take is rendered."""

    enabled: bool = Field(False, description="Estimate recall in each chunk and act below the floor.")
    floor: float = Field(0.85, gt=0.0, lt=1.0, description="Lowest recall that is accepted.")
    num_queries: int = Field(8, ge=1, le=256, description="Queries looked at in a layer and chunk.")


KernelName = Literal[
    "auto", "reference", "sdpa", "flash-attn-4", "flash-attn-3", "flash-attn-2", "flashinfer", "triton", "flex"
]


class KernelConfig(Part):
    """How attention is computed. `auto` resolves once, at load, and the choice is written to the manifest."""

    name: KernelName = Field("auto", description="Attention kernel; one that cannot do the render is an error.")


class VideoConfig(Part):
    """Frames and their encoding."""

    width: int = Field(128, ge=16, le=8192, multiple_of=16, description="Picture width, pixels.")
    height: int = Field(128, ge=16, le=8192, multiple_of=16, description="Picture height, pixels.")
    num_frames: int = Field(96, ge=1, le=1_000_000, description="Video frames per take unless the row says otherwise.")
    fps: int = Field(16, ge=1, le=240, description="Frames per second of the file.")
    crf: int = Field(18, ge=0, le=51, description="x264 constant rate factor; lower is better and larger.")
    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow"] = "veryfast"
    segment_frames: int = Field(48, ge=1, le=4096, description="Frames of a closed-GOP segment after the first one.")


class QualityGateConfig(Part):
    """When a finished or half-finished take is refused instead of delivered."""

    max_black_ratio: float = Field(0.98, ge=0.0, le=1.0, description="Refused when more of its frames are black.")
    max_frozen_ratio: float = Field(1.0, ge=0.0, le=1.0, description="Refused when more of its frames equal the last.")


class RenderConfig(Part):
    """All that decides the pixels of a take, given its prompt, seed and length."""

    policy: PolicyName | None = Field(
        None, description="Names a combination of cache, attention, prompt_attention and reuse; their own fields win."
    )
    backbone: BackboneConfig = BackboneConfig()
    sampling: SamplingConfig = SamplingConfig()
    cache: CacheConfig = DenseCacheConfig()
    attention: AttentionConfig = DenseAttentionConfig()
    prompt_attention: PromptAttentionConfig = DensePromptConfig()
    reuse: ReuseConfig = NoReuseConfig()
    positions: PositionsConfig = PositionsConfig()
    guard: GuardConfig = GuardConfig()
    kernel: KernelConfig = KernelConfig()
    video: VideoConfig = VideoConfig()
    quality_gate: QualityGateConfig = QualityGateConfig()

    @model_validator(mode="before")
    @classmethod
    def _read_policy(cls, record: Any) -> Any:
        return fill_in(record) if isinstance(record, Mapping) else record

    @model_validator(mode="after")
    def _native_is_whole(self) -> Self:
        if isinstance(self.cache, NativeCacheConfig):
            if self.attention.kind != "dense":
                raise ValueError(
                    f"cache.kind: native brings its own attention; attention.kind: {self.attention.kind} must be dense"
                )
            if self.positions.time != "absolute":
                raise ValueError(
                    f"cache.kind: native brings its own times; positions.time: {self.positions.time} must be absolute"
                )
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        for name in ("choose_at", "history_at"):
            check_steps(f"attention.{name}", getattr(self.attention, name, None), self.sampling.num_steps)
        for problem in config_tiles.conflicts(self):
            raise ValueError(problem)
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON of this record: equal fingerprints mean equal pixels."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
