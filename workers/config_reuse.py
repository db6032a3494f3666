"""The parts of a render that spare the layers in some denoising steps. Loads without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from workers.config_part import Part


class NoReuseConfig(Part):
    """Every denoising step runs the whole model."""

    kind: Literal["none"] = "none"


class TeaCacheConfig(Part):
    """A step whose input hardly changed adds again what the layers added before (TeaCache)."""

    kind: Literal["teacache"] = "teacache"
    threshold: float = Field(0.85, gt=0.0, description="Predicted change that may add up before the layers run again.")
    coefficients: tuple[float, ...] = Field(
        (1.0, 0.0),
        min_length=1,
        strict=False,
        description="Polynomial from input to output change, highest power first.",
    )


class FlowReuseConfig(Part):
    """As TeaCache, by the change of a chunk's embedded latents alone (FlowCache)."""

    kind: Literal["flowcache"] = "flowcache"
    threshold: float = Field(0.85, gt=0.0, description="Change that may add up before the layers run again.")
    warmup_steps: int = Field(1, ge=1, description="First steps of a chunk that always run.")


ReuseConfig = Annotated[NoReuseConfig | TeaCacheConfig | FlowReuseConfig, Field(discriminator="kind")]
