"""The parts of a render over a tile table, and what they can be combined with. Loads without torch.

Cache and attention are one thing here: the table holds keys as a kernel reads them, and the choice of tiles is made for
that table. So both kinds are called `tiles`, and neither goes with another kind of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from workers.config_part import HistoryAt, Part, check_steps

TABLE_KERNELS = ("auto", "flash-attn-4", "triton", "reference")
"""Values of `kernel.name` that can read a tile table."""
LARGEST_TILE = 128
Fp8Attention = Literal["none", "steps", "all"]
"""Calls whose attention multiplies 8-bit floats."""


class TileCacheConfig(Part):
    """The whole history in a table of fixed size that a GPU reads as it lies: TempCache in whole tiles."""

    kind: Literal["tiles"] = "tiles"
    sink_latent_frames: int = Field(3, ge=0, description="First latent frames, kept as they are; whole chunks.")
    recent_latent_frames: int = Field(3, ge=1, description="Newest latent frames, kept as they are; whole chunks.")
    budget_latent_frames: int = Field(
        48, ge=2, description="Hard limit: latent frames' worth of keys, all together; whole chunks."
    )
    spare_latent_frames: int = Field(
        15,
        ge=1,
        description="Of these, how many a full history frees at once; whole chunks. More: faster, keeps less.",
    )
    merging: Literal["chains", "pairs"] = Field(
        "chains",
        description="What a full history merges: chains of nearest keys under their newest, or the pairs that lose "
        "least under their heavier key.",
    )
    mass_decay: float = Field(
        16.0,
        ge=0.0,
        description="How fast unlike members of a group lose their mass; 0 is the paper's log m.",
    )
    candidate_tiles: int | None = Field(
        4, ge=0, description="Tiles in which a key looks for its nearest, beside the latent frame before; empty: all."
    )
    storage: Literal["model", "int8", "int4"] = Field(
        "model",
        description="How the history lies: as computed, or as codes that are unpacked when a layer is read; int4 "
        "has a scale for 32 channels, or one a vector where 32 does not divide a head's channels.",
    )
    tile: int | None = Field(
        None, ge=8, le=LARGEST_TILE, description="Keys of a tile, a power of two; empty: an eighth of a latent frame."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tile is not None and self.tile & (self.tile - 1):
            raise ValueError(f"cache.tile: {self.tile} is not a power of two in [8, {LARGEST_TILE}]")
        least = self.sink_latent_frames + self.recent_latent_frames + self.spare_latent_frames + 1
        if self.budget_latent_frames < least:
            raise ValueError(
                f"cache.budget_latent_frames: {self.budget_latent_frames} is below {least}, the sum of "
                f"sink_latent_frames {self.sink_latent_frames}, recent_latent_frames {self.recent_latent_frames}, "
                f"spare_latent_frames {self.spare_latent_frames} and one that is kept"
            )
        return self

    def tile_for(self, frame_tokens: int) -> int:
        """Keys of a tile: as asked, or the largest power of two within an eighth of a latent frame, 8 to 128."""
        if self.tile is not None:
            return self.tile
        return min(LARGEST_TILE, 1 << max(3, (frame_tokens // 8).bit_length() - 1))

    def chunks(self, chunk_latent_frames: int) -> dict[str, int]:
        """Sink, newest, kept and spare history in chunks.

        Raises:
            ValueError: One of them is no whole number; names the field.
        """
        history = self.budget_latent_frames - self.sink_latent_frames - self.recent_latent_frames
        for name in ("sink", "recent", "budget", "spare"):
            value = getattr(self, f"{name}_latent_frames")
            if value % chunk_latent_frames:
                raise ValueError(
                    f"cache.{name}_latent_frames: {value} is not a multiple of {chunk_latent_frames}, the latent "
                    "frames that this model makes at once"
                )
        return {
            "sink_chunks": self.sink_latent_frames // chunk_latent_frames,
            "recent_chunks": self.recent_latent_frames // chunk_latent_frames,
            "kept_chunks": (history - self.spare_latent_frames) // chunk_latent_frames,
            "spare_chunks": self.spare_latent_frames // chunk_latent_frames,
        }


class TileAttentionConfig(Part):
    """Every tile of queries sees equally many tiles of the table, chosen once a chunk (AnnSA in fixed shapes)."""

    kind: Literal["tiles"] = "tiles"
    density: float = Field(0.1, gt=0.0, le=1.0, description="Share of the table's tiles that a query sees.")
    density_until_full: float | None = Field(
        None, gt=0.0, le=1.0, description="The same until the history merges for the first time; empty: density."
    )
    estimate: Literal["exact", "quant", "lsh"] = Field("quant", description="How the mass of a tile is estimated.")
    keys_per_tile: int = Field(16, ge=1, le=LARGEST_TILE, description="Keys of a tile that are looked at.")
    queries_per_tile: int = Field(8, ge=1, le=LARGEST_TILE, description="Queries of a tile that look.")
    choose_at: tuple[int, ...] = Field(
        (0,), min_length=1, strict=False, description="Denoising steps that choose anew; the first must be 0."
    )
    history_at: HistoryAt = None
    clean_pass_share: float = Field(
        1.0, gt=0.0, le=1.0, description="Of the tiles that a step sees, what the clean pass sees: the heaviest."
    )
    always_sink: bool = Field(False, description="The sink is always seen, beside what the density allows.")
    always_recent: bool = Field(False, description="The newest chunks are always seen, likewise.")
    fp8: Fp8Attention = Field(
        "none",
        description="Products of attention in 8-bit floats: in denoising steps, or in clean passes too, whose keys are "
        "what is remembered. Faster on a GPU that has a kernel for it, a little less exact; with history_at, and "
        "cache.storage: int8 or int4.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        looks = self.history_at
        check_steps("attention.choose_at", self.choose_at)
        check_steps("attention.history_at", looks)
        if looks is not None and not set(self.choose_at) <= set(looks):
            raise ValueError(
                f"attention.choose_at: {list(self.choose_at)} must be among attention.history_at: {list(looks)}, for a "
                "step that chooses tiles looks at them"
            )
        if self.fp8 != "none" and looks is None:
            raise ValueError(
                f"attention.fp8: {self.fp8} needs attention.history_at: its kernel attends to the history apart from "
                "the rest ([0, 1, 2, 3] lets four steps look)"
            )
        return self


def conflicts(render: Any) -> Iterator[str]:
    """What does not go with a tile table, one message each, naming the field, its value and what is allowed.

    Args:
        render: A `RenderConfig`, whose file imports this one.
    """
    cache, attention = render.cache.kind, render.attention.kind
    if attention == "tiles" != cache:
        yield f"attention.kind: tiles goes with cache.kind: tiles alone, not with {cache} (policy: fastar-tiles)"
    if cache != "tiles":
        if render.backbone.fp8 != "none":
            yield (
                f"backbone.fp8: {render.backbone.fp8} goes with cache.kind: tiles alone, not with {cache}; it must be "
                "none (or policy: fastar-tiles)"
            )
        return
    whole = "does not go with cache.kind: tiles, whose calls are replayed whole"
    if attention != "tiles":
        yield f"attention.kind: {attention} {whole}; it must be tiles (policy: fastar-tiles)"
    if render.prompt_attention.kind != "dense":
        yield f"prompt_attention.kind: {render.prompt_attention.kind} {whole}; it must be dense"
    if render.reuse.kind != "none":
        yield f"reuse.kind: {render.reuse.kind} {whole}; it must be none"
    if render.positions.time != "absolute":
        yield (
            f"positions.time: {render.positions.time}: keys of a tile table lie rotated at the times they were made "
            "at; it must be absolute"
        )
    if render.guard.enabled:
        yield (
            f"guard.enabled: true {whole}, so no probe sees its queries; it must be false (the guard watches "
            "policy: fastar-quant)"
        )
    yield from _value_conflicts(render)


def _value_conflicts(render: Any) -> Iterator[str]:
    sampling = render.sampling
    if sampling.guidance != 1.0:
        yield f"sampling.guidance: {sampling.guidance:g}: a tile table holds the keys of one branch; it must be 1"
    if render.attention.kind == "tiles" and render.attention.fp8 != "none" and render.cache.storage == "model":
        yield (
            f"attention.fp8: {render.attention.fp8} does not go with cache.storage: model, whose keys are read as they "
            "lie; it must be int8 or int4"
        )
    if render.kernel.name not in TABLE_KERNELS:
        yield f"kernel.name: {render.kernel.name} cannot read a tile table; allowed: {', '.join(TABLE_KERNELS)}"
