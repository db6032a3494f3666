"""What a model weighs and costs, worked out from its sizes: parameters, bytes, floating-point operations. No torch.

Counts of parameters are exact. Times are arithmetic too: operations over an assumed share of a GPU's peak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.model.backbones import Backbone

BFLOAT16_BYTES = 2
FLOAT32_BYTES = 4
TABLE_CHANNELS = 16  # of a tile table, behind those of a key; see cache/table_layout.py
TABLE_RECORD_BYTES = 24  # of a slot of its history: position, m, weight, partner
TABLE_CODE_BITS = {"int8": 8, "int4": 4}  # of a packed history; see cache/table_codes.py
TABLE_CODE_GROUP = 32  # channels of `int4` that share a largest one of 2 bytes, where they divide a head's; else all do
DEFAULT_WINDOW_LATENT_FRAMES = 24  # WindowCacheConfig: sink 3 and recent 21
UTILISATION = 0.4
"""Share of the dense bfloat16 peak that large matrix products and attention reach together; an assumption."""


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says."""

    name: str
    memory_bytes: int
    peak_flops: float
    """Dense bfloat16, without sparsity."""


GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu("A100 40GB", 40 << 30, 312e12),
    "a100-80gb": Gpu("A100 80GB", 80 << 30, 312e12),
    "l40s": Gpu("L40S", 48 << 30, 362e12),
    "rtx-4090": Gpu("RTX 4090", 24 << 30, 165e12),
    "h100": Gpu("H100 SXM", 80 << 30, 989e12),
    "h200": Gpu("H200 SXM", 141 << 30, 989e12),
    "b200": Gpu("B200", 180 << 30, 2250e12),
}


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def layer_parameters(dim: int, ffn_dim: int, *, takes_image: bool) -> int:
    """Of one transformer layer."""
    attention = 4 * _linear(dim, dim) + 2 * dim
    image = 2 * _linear(dim, dim) + dim if takes_image else 0
    return 2 * attention + image + 2 * dim + _linear(dim, ffn_dim) + _linear(ffn_dim, dim) + 6 * dim


def dit_parameters(backbone: Backbone) -> int:
    """Of the transformer; the bundled model's camera maps included."""
    b, dim = backbone, backbone.dim
    patch = b.patch[0] * b.patch[1] * b.patch[2]
    count = _linear(b.in_channels * patch, dim) + _linear(b.text_dim, dim) + _linear(dim, dim)
    count += _linear(b.freq_dim, dim) + _linear(dim, dim) + _linear(dim, 6 * dim)
    count += b.num_layers * layer_parameters(dim, b.ffn_dim, takes_image=b.image_dim > 0)
    count += _linear(dim, patch * b.latent_channels) + 2 * dim
    if b.image_dim:
        count += 2 * b.image_dim + _linear(b.image_dim, b.image_dim) + _linear(b.image_dim, dim) + 2 * dim
    if b.control_channels:
        count += _linear(b.control_channels * patch, dim)
    return count


def control_parameters(backbone: Backbone) -> int:
    """Of LongVie 2's control module; 0 for models without."""
    sizes = backbone.control_branch
    if sizes is None:
        return 0
    layers = 2 * sizes.num_layers * layer_parameters(sizes.dim, sizes.ffn_dim, takes_image=backbone.image_dim > 0)
    return layers + 4 * _linear(backbone.dim, sizes.dim) + sizes.num_layers * _linear(sizes.dim, backbone.dim)


def text_parameters(backbone: Backbone) -> int:
    """Of umT5's encoder; 0 for models that bring another."""
    sizes, dim = backbone.umt5, backbone.text_dim
    if sizes is None:
        return 0
    inner = sizes.num_heads * sizes.head_dim
    layer = 2 * dim + 4 * dim * inner + 32 * sizes.num_heads + 3 * dim * sizes.ffn_dim
    return sizes.num_words * dim + sizes.num_layers * layer + dim


def image_parameters(backbone: Backbone) -> int:
    """Of CLIP's vision tower; 0 for models that take no image."""
    sizes, dim = backbone.image_encoder, backbone.image_dim
    if sizes is None:
        return 0
    tokens = (sizes.picture // sizes.patch) ** 2 + 1
    layer = 4 * _linear(dim, dim) + _linear(dim, sizes.ffn_dim) + _linear(sizes.ffn_dim, dim) + 4 * dim
    return sizes.num_layers * layer + 3 * sizes.patch**2 * dim + tokens * dim + dim + 4 * dim


@dataclass(frozen=True)
class Workload:
    """One take of a model."""

    backbone: Backbone
    width: int
    height: int
    num_frames: int
    num_steps: int
    guidance: float = 1.0

    @property
    def frame_tokens(self) -> int:
        return self.backbone.tokens_per_latent_frame(self.width, self.height)

    @property
    def num_chunks(self) -> int:
        return self.backbone.num_chunks(self.num_frames)

    @property
    def history_latent_frames(self) -> int:
        """Latent frames of the whole take."""
        return self.num_chunks * self.backbone.chunk_latent_frames

    @property
    def native_latent_frames(self) -> int:
        """Latent frames that the model's own attention keeps; the default window's for models without one."""
        native = self.backbone.native
        attended = native.attended_latent_frames if native else DEFAULT_WINDOW_LATENT_FRAMES
        return min(self.history_latent_frames, max(attended, self.backbone.chunk_latent_frames))

    def kv_bytes(self, latent_frames: int) -> int:
        """Keys and values of so many latent frames, uncompressed in bfloat16."""
        return 2 * latent_frames * self.frame_tokens * self.backbone.dim * self.backbone.num_layers * BFLOAT16_BYTES

    def table_bytes(self, cache: TileCacheConfig, itemsize: int = BFLOAT16_BYTES) -> int:
        """All that a tile table holds, the workspace of a packed one too: the same for every length.

        Args:
            cache: Its sizes.
            itemsize: Bytes of a channel as computed.
        """
        b, tile = self.backbone, cache.tile_for(self.frame_tokens)
        chunks, tokens = cache.chunks(b.chunk_latent_frames), b.chunk_latent_frames * self.frame_tokens
        chunk_slots = -(-tokens // tile) * tile
        history = -(-(chunks["kept_chunks"] + chunks["spare_chunks"]) * tokens // tile) * tile
        ends = (chunks["sink_chunks"] + chunks["recent_chunks"] + 1) * chunk_slots
        vector = (2 * b.head_dim + TABLE_CHANNELS) * itemsize
        records = history * TABLE_RECORD_BYTES + history // tile * b.head_dim * itemsize
        if cache.storage == "model":
            return b.num_layers * b.num_heads * ((ends + history) * vector + records)
        groups = b.head_dim // TABLE_CODE_GROUP if cache.storage == "int4" and b.head_dim % TABLE_CODE_GROUP == 0 else 1
        coded = b.head_dim * TABLE_CODE_BITS[cache.storage] // 8 + 2 * groups
        if cache.merging == "pairs":  # kernels keep distances from partners
            records += history * FLOAT32_BYTES
        packed = ends * vector + history * (2 * coded + 2 * itemsize) + records
        return b.num_heads * (b.num_layers * packed + (ends + history) * vector)

    def kept_history_bytes(self, attention: TileAttentionConfig, itemsize: int = BFLOAT16_BYTES) -> int:
        """What is kept of the history for calls that do not look at it: result and log-sum-exp of each layer."""
        if attention.history_at is None:
            return 0
        b = self.backbone
        tokens = b.chunk_latent_frames * self.frame_tokens
        return b.num_layers * tokens * b.num_heads * (b.head_dim * itemsize + FLOAT32_BYTES)

    def table_flops(self, cache: TileCacheConfig, attention: TileAttentionConfig) -> float:
        """All calls of a take over a full tile table; matching and merging are not counted."""
        own, calls = self.backbone.chunk_latent_frames, self.num_steps + 1
        seen = own + round(attention.density * cache.budget_latent_frames)
        looks = calls if attention.history_at is None else len(attention.history_at) + 1  # the clean pass does
        return self.num_chunks * (looks * self.call_flops(own, seen) + (calls - looks) * self.call_flops(own, own))

    @property
    def call_latent_frames(self) -> int:
        """Latent frames denoised in one call."""
        native = self.backbone.native
        return self.backbone.chunk_latent_frames * (native.window_chunks if native else 1)

    @property
    def activation_bytes(self) -> int:
        """Of one layer in its widest moment, about: stream, norms, q, k, v, output, and the feed-forward's two."""
        tokens = self.call_latent_frames * self.frame_tokens
        return tokens * (8 * self.backbone.dim + 2 * self.backbone.ffn_dim) * BFLOAT16_BYTES

    def call_flops(self, query_frames: int, key_frames: int) -> float:
        """One call of the transformer."""
        b, queries = self.backbone, query_frames * self.frame_tokens
        linear = 2 * (6 * b.dim**2 + 2 * b.dim * b.ffn_dim)
        attention = 4 * b.dim * (key_frames * self.frame_tokens + b.text_tokens)
        flops = float(b.num_layers * queries * (linear + attention))
        if b.control_branch is not None:
            sizes = b.control_branch
            inner = replace(
                b,
                dim=sizes.dim,
                num_layers=2 * sizes.num_layers,
                ffn_dim=sizes.ffn_dim,
                num_heads=sizes.num_heads,
                control_branch=None,
            )
            flops += replace(self, backbone=inner).call_flops(query_frames, query_frames)
        return flops

    @property
    def take_flops(self) -> float:
        """All calls of a take with the model's own attention, guidance and clean passes included."""
        b = self.backbone
        own, kept = b.chunk_latent_frames, self.native_latent_frames
        branches = 1 if self.guidance == 1.0 else 2
        if b.rollout == "clipwise":
            return self.num_chunks * self.num_steps * branches * self.call_flops(own, own)
        if b.rollout == "rolling":
            window = self.call_latent_frames
            return self.num_chunks * (self.call_flops(window, max(kept, window)) + self.call_flops(own, kept))
        calls = self.num_steps * branches + 1
        return sum(calls * self.call_flops(own, min(kept, (index + 1) * own)) for index in range(self.num_chunks))

    def seconds(self, gpu: Gpu) -> float:
        """Denoising of one take, without VAE and encoding."""
        return self.take_flops / (gpu.peak_flops * UTILISATION)
