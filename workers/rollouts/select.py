"""Which rollout a model takes, and what it cannot be combined with: refused before anything is rendered."""

from __future__ import annotations

import logging

from workers.config import RenderConfig
from workers.contracts import ChunkJudge, StepReuse
from workers.errors import ConfigUnsupported
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import Backbone
from workers.model.dit import AttendPrompt, CausalDiT, attend_prompt_dense
from workers.model_limits import conflicts_with_model
from workers.rollout import Rollout
from workers.rollouts.rolling_window import RollingWindowRollout

logger = logging.getLogger(__name__)


def check_rollout(backbone: Backbone, config: RenderConfig) -> None:
    """Refuse what this model cannot do; note what it was not trained for.

    Raises:
        ConfigUnsupported: Names the field.
    """
    for problem in conflicts_with_model(config, backbone):
        raise ConfigUnsupported(problem)
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
