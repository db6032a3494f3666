"""Which rollout a model takes, and what it cannot be combined with: refused before anything is rendered."""

from __future__ import annotations

import logging

from workers.config import RenderConfig
from workers.config_reuse import NoReuseConfig
from workers.contracts import ChunkJudge, StepReuse
from workers.errors import ConfigUnsupported
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import Backbone
from workers.model.dit import AttendPrompt, CausalDiT, attend_prompt_dense
from workers.rollout import Rollout
from workers.rollouts.rolling_window import RollingWindowRollout

logger = logging.getLogger(__name__)


def check_rollout(backbone: Backbone, config: RenderConfig) -> None:
    """Refuse what this model's rollout cannot do; note what it was not trained for.

    Raises:
        ConfigUnsupported: Names the field.
    """
    if config.cache.kind == "native" and backbone.native is None:
        raise ConfigUnsupported(f"cache.kind: native: {backbone.name} has no window of its own")
    if backbone.rollout != "chunkwise" and not isinstance(config.reuse, NoReuseConfig):
        raise ConfigUnsupported(
            f"reuse.kind: {config.reuse.kind} goes by the steps of one chunk; {backbone.name} denoises several at once"
        )
    if not backbone.renders_alone:
        raise ConfigUnsupported(
            f"backbone.name: {backbone.name} takes a picture beside the noise; it is loaded as the base of others only"
        )
    if backbone.rollout == "clipwise" and config.guard.enabled:
        raise ConfigUnsupported(f"guard.enabled: {backbone.name} makes whole clips, which no guard watches yet")
    if config.cache.kind == "tiles" and (backbone.rollout != "chunkwise" or backbone.image_dim):
        how = "takes pictures" if backbone.rollout == "chunkwise" else f"renders {backbone.rollout}"
        raise ConfigUnsupported(
            f"cache.kind: tiles: its loop denoises one chunk at a time from text alone, and {backbone.name} {how}; "
            "take policy: fastar-quant"
        )
    native, asked = backbone.native, config.sampling
    if native is not None and (asked.num_steps, asked.shift) != (native.num_steps, native.shift):
        logger.warning(
            "%s was trained with sampling.num_steps %d and sampling.shift %g, asked for are %d and %g",
            backbone.name,
            native.num_steps,
            native.shift,
            asked.num_steps,
            asked.shift,
        )


def make_rollout(
    model: CausalDiT,
    attention: RolloutAttention,
    stopwatch: Stopwatch,
    reuse: StepReuse | None = None,
    judge: ChunkJudge | None = None,
    attend_prompt: AttendPrompt = attend_prompt_dense,
) -> Rollout | RollingWindowRollout:
    """The rollout of a model that goes chunk by chunk or in a rolling window."""
    if model.backbone.rollout == "rolling":
        return RollingWindowRollout(model, attention, stopwatch, judge, attend_prompt)
    return Rollout(model, attention, stopwatch, reuse, judge, attend_prompt)
