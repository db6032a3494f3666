"""Every named policy through the actor into an MP4: what one take taught a policy must not reach the next."""

from pathlib import Path
from typing import get_args

import pytest

from workers.actor import RenderActor
from workers.config import RenderConfig
from workers.errors import ConfigUnsupported
from workers.named_policies import PolicyName
from workers.task import PromptSegment, RenderResult, RenderSetup, RenderTask

FRAMES = 192  # 48 latent frames: sink and newest ones are less than a quarter


def make_task(name: str) -> RenderTask:
    segment = PromptSegment(frame=0, prompt=f"a {name} valley, the camera pans left")
    return RenderTask(
        task_id=f"{name}-0",
        item_id=name,
        sample_index=0,
        attempt="e1a1",
        segments=(segment,),
        seed=7,
        num_frames=FRAMES,
    )


def load(root: Path, **fields: object) -> RenderActor:
    record = {"backbone": {"name": "tiny-test"}, "video": {"width": 64, "height": 32}} | fields
    actor = RenderActor(RenderSetup(job_id="job", config=RenderConfig.model_validate(record), store_url=str(root)))
    actor.load()
    return actor


QUICK = ("fastar-quant",)


@pytest.mark.parametrize(
    "policy", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in get_args(PolicyName)]
)
def test_a_policy_renders_and_forgets_between_takes(tmp_path: Path, policy: PolicyName) -> None:
    fields = {"cache": {"budget_latent_frames": 30}} if policy.startswith(("fastar", "temp", "flow")) else {}
    first, alone = load(tmp_path / "a", policy=policy, **fields), load(tmp_path / "b", policy=policy, **fields)
    _, second = first.run([make_task("red"), make_task("blue")])
    (again,) = alone.run([make_task("blue")])
    first.close()
    alone.close()
    assert isinstance(second, RenderResult), second
    assert isinstance(again, RenderResult), again
    assert second.frames_sha256 == again.frames_sha256
    assert second.attn_density_mean is not None
    assert second.num_frames == FRAMES
    is_sparse = policy not in ("dense", "annca")
    assert (second.attn_density_mean < 0.999) == is_sparse
    if policy.startswith(("fastar", "temp")):
        assert second.kv_policy == ("tiles-30-8-pairs-int4" if policy == "fastar-tiles" else "temporal-30-int8")
        # The budget is counted in bfloat16, that of a table in keys; the render computes in float32.
        limit = 30 * 8 * 2 * 80 * 3 * 2
        assert second.kv_bytes <= (limit * 4 if policy == "fastar-tiles" else limit)


def test_a_budget_that_holds_too_little_is_refused_before_the_first_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigUnsupported, match=r"cache\.budget_latent_frames: 13 is below 20, .* chunk of 3"):
        load(tmp_path, policy="tempcache", cache={"budget_latent_frames": 13})
    with pytest.raises(ConfigUnsupported, match=r"cache\.budget_latent_frames: 20: .* is too small: .* take [\d,]+"):
        load(tmp_path, policy="tempcache", cache={"budget_latent_frames": 20})


def test_a_layer_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigUnsupported, match=r"attention\.layers: 9 .* from 0 to 2"):
        load(tmp_path, policy="annsa", attention={"layers": [1, 9]})
