"""Self-attention of a rollout, layer by layer: cache -> policy -> rotation -> kernel.

Keys are cached before RoPE and rotated here, once per chunk for those that do not change within it. The clean pass
attends like any other and then gives its keys to the cache.
"""

from __future__ import annotations

from torch import Tensor

from workers.contracts import AttentionPolicy, Kernel, KeyValues, KVCache
from workers.model.backbones import Backbone
from workers.model.rope import Rotation, make_rotation, rotate


class RolloutAttention:
    """The `attend` of a `CausalDiT` during a rollout; call `begin_chunk`, then let the model call this object.

    Args:
        backbone: Head dimension and RoPE base.
        cache: Filled by clean passes.
        policy: Chooses among the keys.
        kernel: Computes.
    """

    def __init__(self, backbone: Backbone, cache: KVCache, policy: AttentionPolicy, kernel: Kernel) -> None:
        self.cache = cache
        self._head_dim, self._theta = backbone.head_dim, backbone.rope_theta
        self._policy, self._kernel = policy, kernel
        self._position_Q3: Tensor | None = None
        self._rotation: Rotation | None = None
        self._rotated: dict[int, tuple[KeyValues, KeyValues]] = {}
        self._tables: dict[tuple[int, int], tuple[Tensor, Rotation]] = {}
        self._is_clean = False

    def begin_chunk(self, position_Q3: Tensor) -> None:
        """The next calls are about tokens at these (latent frame, row, column), float32, on the model's device."""
        self._position_Q3 = position_Q3
        self._rotation = make_rotation(position_Q3, self._head_dim, self._theta)
        self.end_chunk()
        self._is_clean = False

    def begin_clean_pass(self) -> None:
        """The next call of each layer brings clean keys, which are to be remembered."""
        self._is_clean = True

    def end_chunk(self) -> None:
        """Forget what was rotated for this chunk, before the next one needs the memory."""
        self._rotated.clear()
        self._tables.clear()

    def __call__(self, layer_index: int, q_BQND: Tensor, k_BQND: Tensor, v_BQND: Tensor) -> Tensor:
        assert self._rotation is not None, "begin_chunk comes first"
        assert self._position_Q3 is not None
        own = KeyValues(k_BQND, v_BQND, self._position_Q3)
        cached = self.cache.read(layer_index)
        plan = self._policy.plan(layer_index, q_BQND, cached, own)
        parts = tuple(self._rotate(layer_index, part, own, cached) for part in plan.parts)
        out_BQND, _ = self._kernel.attend(rotate(q_BQND, self._rotation), parts)
        if self._is_clean:
            self._rotated.pop(layer_index, None)
            self.cache.append(layer_index, own)
        return out_BQND

    def _rotate(self, layer_index: int, part: KeyValues, own: KeyValues, cached: KeyValues | None) -> KeyValues:
        """The same keys after RoPE."""
        if part is own:
            assert self._rotation is not None
            return KeyValues(rotate(part.k_BKND, self._rotation), part.v_BKND, part.position_K3, part.log_mass_BNK)
        source, rotated = self._rotated.get(layer_index, (None, None))
        if rotated is not None and source is part:
            return rotated
        rotated = KeyValues(
            rotate(part.k_BKND, self._table(part.position_K3)), part.v_BKND, part.position_K3, part.log_mass_BNK
        )
        if part is cached:
            self._rotated[layer_index] = part, rotated
        return rotated

    def _table(self, position_K3: Tensor) -> Rotation:
        """Rotation of cached keys; layers that share their positions share it."""
        key = position_K3.data_ptr(), len(position_K3)
        if key not in self._tables:
            # The positions are kept beside their table, so that their address cannot be given to others meanwhile.
            self._tables[key] = position_K3, make_rotation(position_K3, self._head_dim, self._theta)
        return self._tables[key][1]
