"""On a GPU, its calls captured and its copies late: a table built again from a log is the one that was, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.bench.history_engine import Variant, make_engine, make_plan
from tests.bench.rollout_rows import Settings
from tests.late_copies import Late
from workers.cache.side_work import OnStream
from workers.model.backbones import find_backbone
from workers.rollouts.chunk_log import ChunkLog, path_of, replay_log
from workers.snapshot import RolloutId

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CHUNKS, STOP = 13, 9
ROLLOUT = RolloutId("fingerprint", "revision", "a-0", 7)
LOOKS_ONCE = Variant(
    "small",
    kept_chunks=2,
    spare_chunks=2,
    rule="pairs",
    storage="int4",
    density=0.3,
    history_at=(0,),
    clean_share=0.5,
    density_until_full=0.6,
)
WAYS = {
    "as the policy": LOOKS_ONCE,
    "no list for clean passes": replace(LOOKS_ONCE, clean_share=1.0),
    "all steps look": replace(LOOKS_ONCE, history_at=None, clean_share=1.0),
    "not packed, by chains": replace(LOOKS_ONCE, rule="chains", storage="model"),
    "steps in 8 bits": replace(LOOKS_ONCE, fp8="all"),
}


@pytest.mark.parametrize("side", [OnStream, Late])
@pytest.mark.parametrize("way", list(WAYS))
@torch.no_grad()
def test_the_table_and_what_follows_are_the_same(way: str, side: type[OnStream], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if WAYS[way].fp8 != "none" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("8-bit products need compute capability 9.0")
    backbone = replace(find_backbone("wan2.1-t2v-1.3b"), num_layers=2)
    settings = Settings(backbone, 208, 160, torch.device("cuda"), torch.bfloat16, 120)
    first, second = (make_engine(WAYS[way], settings, None, None) for _ in range(2))
    rollout, plan = first.rollout, make_plan(first, settings, CHUNKS)
    log = ChunkLog(tmp_path, ROLLOUT, rollout.chooser.num_tiles, rollout.device, side(rollout.device, "chunk log"))
    expected, latents = {}, []
    for chunk in rollout.run(plan, record=log.record):
        latents.append(chunk.latents_BTCHW.clone())
        if chunk.index + 1 == STOP:
            expected = {name: x.clone() for name, x in first.table.state().items()}
    log.close()
    for index in range(STOP, CHUNKS - 1):
        path_of(tmp_path, index).unlink()
    assert replay_log(tmp_path, ROLLOUT, second.rollout, plan) == STOP
    found = second.table.state()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for chunk in second.rollout.run(plan, STOP):
        assert torch.equal(chunk.latents_BTCHW, latents[chunk.index])


def test_the_rollout_does_not_wait_on_the_host_for_a_copy(tmp_path: Path) -> None:
    device = torch.device("cuda")
    log = ChunkLog(tmp_path, ROLLOUT, 99, device)
    latents, lists = (
        torch.zeros(1, 3, 16, 8, 8, device=device),
        [torch.zeros(2, 3, 4, dtype=torch.int32, device=device)],
    )
    for index in range(2):
        log.record(index, latents, lists)()
        log.flush()  # makes what is made once
    torch.cuda._sleep(2_000_000_000)  # about a second
    asleep = torch.cuda.current_stream().record_event()
    log.record(2, latents, lists)()
    assert not asleep.query()
    log.close()
    assert path_of(tmp_path, 2).exists()
