"""The loop of one video over a tile table, on buffers that never move: each call of the model is one CUDA graph.

The same order of work as `workers/rollout.py`, without guidance, reuse or probes. A call is captured once with the
choice of tiles in every layer and once with the tiles chosen before, which the later steps of a chunk share; where
not all steps look at the history, once more without it (`kept_history.py`), and where a clean pass sees fewer tiles or
computes with other weights, once more so. Between clean pass and next chunk the table takes the chunk over; nothing but
the check for NaN waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.contracts import PromptKeys
from workers.denoise import step_euler, step_renoise, to_device
from workers.errors import NonFiniteLatents
from workers.key_codes import KeyCodes
from workers.metrics import Stopwatch
from workers.model.dit import CausalDiT
from workers.model.prompt_attention import PromptTable, hold_prompt
from workers.model.rope import Rotation, make_rotation
from workers.model.static_layers import CodedTargets, StaticLayers, Stream, Targets
from workers.rollout import CleanChunk, RolloutPlan, chunk_positions
from workers.rollouts.kept_history import KeptHistory, Keys, Looked, Mark
from workers.rollouts.table_parts import Chooser, Table
from workers.streams import stream_for

AttendTable = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""See `workers/kernels/listed_tiles.py`."""
Record = Callable[[int, Tensor, Sequence[Tensor]], Callable[[], None]]
"""(chunk, its clean latents, tiles that its clean pass saw of each layer) -> what is called before the lists change;
see `chunk_log.py`."""


@dataclass(frozen=True)
class CapturedSettings:
    """How the loop runs."""

    choose_at: tuple[int, ...] = (0,)
    """Denoising steps that choose tiles anew; the others, and the clean pass, use those of the step before."""
    graphs: bool = True
    """Capture the calls; needs a GPU."""
    prompt_rows: int = 16
    """Prompts are filled up to a multiple of so many rows; where that changes, calls are captured anew."""
    history_at: tuple[int, ...] | None = None
    """Denoising steps that look at the history, those of `choose_at` among them; the others take what the newest of
    them saw of it. None: all look. The clean pass always does: one that takes loses a decibel of what is seen again."""


def to_host(flag: Tensor) -> Callable[[], bool]:
    """The value of a flag as it is now; asking for it waits for that, and for nothing queued since."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    value = torch.empty((), dtype=torch.bool, pin_memory=True)
    value.copy_(flag, non_blocking=True)
    arrived = torch.cuda.current_stream().record_event()

    def ask() -> bool:
        arrived.synchronize()
        return bool(value)

    return ask


def keep_no_record(index: int, latents: Tensor, lists: Sequence[Tensor]) -> Callable[[], None]:
    return lambda: None


class CapturedRollout:
    """One video after another on one model.

    Args:
        model: In evaluation mode; without image tokens.
        layers: Of that model.
        table: Fresh.
        parts: The chooser of that table's tiles, and self-attention over listed tiles; where not all steps look at the
            history, the chooser of the history's alone, and what keeps what was seen of it.
        latent_size: Height and width.
        settings: How it runs.
    """

    def __init__(
        self,
        model: CausalDiT,
        layers: StaticLayers,
        table: Table,
        parts: tuple[Chooser, AttendTable | KeptHistory],
        latent_size: tuple[int, int],
        settings: CapturedSettings,
    ) -> None:
        self._model, self._layers, self.table, self._settings = model, layers, table, settings
        self.chooser, self._attend = parts
        assert isinstance(self._attend, KeptHistory) == (settings.history_at is not None)
        b = model.backbone
        self.device, self._latent_size = model.head.modulation.device, latent_size
        self._rows, self._columns = b.token_grid(latent_size)
        num = b.chunk_latent_frames * self._rows * self._columns

        def empty(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._latents = empty(1, b.chunk_latent_frames, b.in_channels, *latent_size, dtype=torch.float32)
        self._timestep = empty(1, b.chunk_latent_frames, dtype=torch.float32)
        self._flow = empty(1, b.chunk_latent_frames, b.latent_channels, *latent_size, dtype=torch.float32)
        self._control = empty(1, num, b.dim) if b.control_channels else None
        angle = (1, num, 1, b.head_dim // 2)
        self._rotation = Rotation(empty(*angle, dtype=torch.float32), empty(*angle, dtype=torch.float32))
        self._q_QNW = empty(num, b.num_heads, table.layers[0].k_NLW.shape[-1])
        self._q_QNW[..., b.head_dim : b.head_dim + 2] = 1.0
        self._targets = [Targets(self._q_QNW[..., : b.head_dim], *table.own(index)) for index in range(b.num_layers)]
        self._takes_codes = self.chooser.takes_codes(table.key_codes(0))
        self._is_early = self.chooser.has_early_list
        self._lists = {early: self._new_lists(early) for early in {False, self._is_early}}
        self._prompt: list[PromptTable] = []
        self._held: Sequence[PromptKeys] | None = None
        self._graphs: dict[tuple[bool, bool, bool, bool], torch.cuda.CUDAGraph] = {}
        self.on_part: Mark | None = None
        """Told `calls` after each call and `sampler` after what lies between two; for measurements."""

    @torch.no_grad()
    def run(
        self,
        plan: RolloutPlan,
        first_chunk: int = 0,
        stopwatch: Stopwatch | None = None,
        record: Record = keep_no_record,
    ) -> Iterator[CleanChunk]:
        """Chunks from `first_chunk` on, in order.

        Args:
            plan: What is rolled out.
            first_chunk: The table holds the chunks before it.
            stopwatch: Gets the stages "denoise" and "cache"; then the GPU is waited for once more in each chunk.
            record: Told each chunk that becomes history.
        Raises:
            NonFiniteLatents: A chunk holds a NaN or an infinity; it is neither yielded nor remembered.
        """
        assert plan.guidance == 1.0, "a tile table holds one branch"
        stage = nullcontext if stopwatch is None else stopwatch.stage
        noise = self._draw(plan, first_chunk)
        for index in range(first_chunk, plan.num_chunks):
            with stage("denoise"):
                position = self.begin(plan, index)
                latents = self._denoise(plan, noise)
                is_finite = to_host(torch.isfinite(latents).all())
            with stage("cache"):
                if index + 1 < plan.num_chunks:
                    self.call(latents, 0.0, choose=False, clean=True)
                    noise = self._draw(plan, index + 1)  # now, while the GPU is busy
                if not is_finite():  # waits for the denoising steps, not for the clean pass
                    raise NonFiniteLatents(f"chunk {index} holds NaN or infinity after its last denoising step")
                if index + 1 < plan.num_chunks:
                    recorded = record(index, latents, self.clean_lists)
                    self.remember(position)
                    recorded()  # the next chunk's tiles come into the same lists
            self._mark("sampler")
            density = min(1.0, self.slots_seen(plan.schedule.num_steps) / ((index + 1) * len(position)))
            yield CleanChunk(index, latents, self.table.num_bytes, density)

    @property
    def latents_shape(self) -> torch.Size:
        """Of a chunk."""
        return self._latents.shape

    @property
    def clean_lists(self) -> list[Tensor]:
        """Of each layer: the tiles that the clean pass of the chunk in hand sees; buffers of all chunks."""
        return [listed if fewer is None else fewer for listed, fewer in self._lists[self._is_early]]

    def list_for_clean_pass(self, index_LNIJ: Tensor) -> None:
        """The chunk in hand is not denoised: the tiles that a step would have chosen for its clean pass."""
        for index, (listed, values) in enumerate(zip(self.clean_lists, index_LNIJ, strict=True)):
            listed.copy_(values)
            self.table.note_seen(index, listed)

    def slots_seen(self, num_steps: int) -> float:
        """By a query, empty ones included, on average over so many denoising steps of a chunk."""
        steps, seen = self._settings.history_at, self.chooser.num_slots_seen(early=self._is_early)
        if not isinstance(self._attend, KeptHistory) or steps is None:
            return seen
        return seen * len(steps) / num_steps + self._attend.num_slots_fresh

    def call(self, latents: Tensor, timestep: float, *, choose: bool, look: bool = True, clean: bool = False) -> Tensor:
        """Flow of the chunk in hand, float32; overwritten by the next call."""
        self._mark("sampler")
        self.load(latents, timestep)
        self.replay(choose, look, clean)
        self._mark("calls")
        return self._flow

    def replay(self, choose: bool, look: bool = True, clean: bool = False) -> None:
        """One call on the buffers as they are, by its graph where calls are captured."""
        if not self._settings.graphs:
            self.compute(choose, look=look, clean=clean)
            return
        call = (choose, look, clean and self._has_clean_calls)
        key = (*call, self._is_early and look)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*call)
        self._graphs[key].replay()

    @property
    def _has_clean_calls(self) -> bool:
        """Whether a clean pass does otherwise than a step."""
        attends_otherwise = isinstance(self._attend, KeptHistory) and self._attend.has_clean_ways
        return self.chooser.has_clean_list or self._layers.has_clean_weights or attends_otherwise

    def reads_coded(self, *, clean: bool = False) -> bool:
        """Whether calls that look read the history in 8-bit floats."""
        return isinstance(self._attend, KeptHistory) and self._attend.reads_coded(clean=clean)

    def rehearse(self) -> None:
        """Capture the calls of a history that has merged, where those before see another number of tiles."""
        self._is_early = False
        for choose, look, clean, early in list(self._graphs):
            if early:
                self.replay(choose, look, clean)

    def attend_at_once(self, at_once: bool) -> None:
        """Whether calls that look attend to history and own chunk at once, as they do unless a bench asks otherwise."""
        if isinstance(self._attend, KeptHistory):
            self._attend.attends_at_once = at_once
            self._graphs.clear()

    def _mark(self, part: str) -> None:
        if self.on_part is not None:
            self.on_part(part)

    def load(self, latents: Tensor, timestep: float) -> None:
        """Fill the buffers of a call."""
        self._latents.copy_(latents)
        self._timestep.fill_(timestep)

    def compute(self, choose: bool, mark: Mark = lambda name: None, *, look: bool = True, clean: bool = False) -> None:
        """One call on the buffers as they are; one that chooses tiles looks at the history, too, and so does a clean
        pass, with tiles that were chosen before."""
        assert look or (not choose and isinstance(self._attend, KeptHistory))
        assert look or not clean
        model, layers = self._model, self._layers
        x = model.embed_patches(self._latents)
        if self._control is not None:
            x = x + self._control
        stream = Stream(x[0].to(model.dtype))
        time_BTE, time_BT6E = model.embed_time(self._timestep)
        time_T6E = time_BT6E[0]
        mark("embed")
        targets = self._targets_of(rows=choose or clean or (look and not self._has_clean_calls), clean=clean)
        for index, weights in enumerate(layers.clean_weights if clean else layers.weights):
            listed, fewer = self._lists[self._is_early][index]
            x = layers.enter(weights, stream, time_T6E, self._rotation, targets[index])
            mark("queries, keys, values")
            if choose:
                self.chooser.choose(self._q_QNW, self._sampled_keys(index, mark), listed, fewer)
                self.table.note_seen(index, listed)
                mark("selection")
            elif clean and fewer is not None:
                listed = fewer
                self.table.note_seen(index, listed)
            if isinstance(self._attend, KeptHistory):
                looked = self._look(index, listed, mark, clean=clean) if look else None
                given = index, self._q_QNW, self.table.layers[index], looked, mark
                out = self._attend.attend(*given, clean=clean, is_coded=isinstance(targets[index], CodedTargets))
            else:
                keys = self._lay_out(index, mark)
                out = self._attend(self._q_QNW, keys.k_NLW, keys.v_NLD, listed)
                mark("attention")
            stream = layers.leave(weights, self._prompt[index], x, out, time_T6E)
            mark("output, cross-attention, feed-forward")
        x = layers.settle(stream, time_T6E)
        self._flow.copy_(model.read_out(x[None], time_BTE, self._latent_size))
        mark("head")

    def _targets_of(self, *, rows: bool, clean: bool) -> Sequence[Targets | CodedTargets]:
        """Of each layer: where a call writes queries, keys and values, and codes where it attends to these.

        Args:
            rows: Queries and keys are read as they are, too: by a choice, or by a table that takes keys over. A step
                whose graph may serve a clean pass as well counts as one.
            clean: A clean pass.
        """
        rooms = self._attend.rooms_for_codes(clean=clean) if isinstance(self._attend, KeptHistory) else None
        return self._targets if rooms is None else [CodedTargets(to, *rooms, rows) for to in self._targets]

    def _sampled_keys(self, index: int, mark: Mark) -> Tensor | KeyCodes:
        """What the choice of tiles reads of a layer."""
        codes = self.table.key_codes(index) if self._takes_codes else None
        if codes is not None:
            return codes
        keys = self.table.lay_out_sample(index, self.chooser.sampled_slot_R)
        if self.table.is_packed:
            mark("unpacking")
        return keys.k_NLW

    def _lay_out(self, index: int, mark: Mark) -> Keys:
        """What attention reads of a layer."""
        keys = self.table.lay_out(index, seen_only=True)
        if self.table.is_packed:
            mark("unpacking")
        return keys

    def _look(self, index: int, listed: Tensor, mark: Mark, *, clean: bool) -> Looked:
        if not self.reads_coded(clean=clean):
            return Looked(self._lay_out(index, mark), listed)
        assert isinstance(self._attend, KeptHistory)
        tiles = self._attend.lay_out_coded(index)
        mark("unpacking")
        return Looked(tiles, listed)

    def remember(self, position_Q3: Tensor) -> None:
        """The last call was a clean pass: its keys become history."""
        self.table.remember_chunk(position_Q3)

    def begin(self, plan: RolloutPlan, index: int) -> Tensor:
        """Fill the buffers for a chunk; its positions."""
        b = self._model.backbone
        self._is_early = self.chooser.has_early_list and not self.table.has_merged
        position = chunk_positions(plan, b, index, self.device)
        rotation = make_rotation(position, b.head_dim, b.rope_theta)
        for buffer, values in zip(self._rotation, rotation, strict=True):
            buffer.copy_(values)
        (prompt,) = plan.prompt(index)
        if prompt is not self._held:
            self._hold(prompt)
        maps = plan.control(index)
        if self._control is not None and maps is not None:
            self._control.copy_(self._model.embed_control(maps.to(self.device)))
        return position

    def _new_lists(self, early: bool) -> list[tuple[Tensor, Tensor | None]]:
        """Of each layer: the tiles that a step sees, and those that a clean pass does where they are fewer."""
        b, new_list = self._model.backbone, self.chooser.new_list
        return [
            (
                new_list(b.num_heads, early=early),
                new_list(b.num_heads, for_clean_pass=True, early=early) if self.chooser.has_clean_list else None,
            )
            for _ in range(b.num_layers)
        ]

    def _hold(self, prompt: Sequence[PromptKeys]) -> None:
        """Another prompt: into the buffers of the last one where they fit, else the calls are captured anew."""
        tables = hold_prompt(prompt, self._settings.prompt_rows)
        self._held = prompt
        if self._prompt and self._prompt[0].k_NPD.shape == tables[0].k_NPD.shape:
            for old, new in zip(self._prompt, tables, strict=True):
                for buffer, values in zip(old, new, strict=True):
                    buffer.copy_(values)
        else:
            self._prompt = tables
            self._graphs.clear()

    def _draw(self, plan: RolloutPlan, index: int) -> list[Tensor]:
        """All noise of a chunk."""
        num = 1 if self._model.backbone.sampler == "euler" else plan.schedule.num_steps
        return [to_device(plan.noise(index, step), self.device) for step in range(num)]

    def _denoise(self, plan: RolloutPlan, noise: Sequence[Tensor]) -> Tensor:
        """Clean latents of one chunk, float32."""
        schedule, is_euler = plan.schedule, self._model.backbone.sampler == "euler"
        latents = noise[0]
        for step, (sigma, timestep) in enumerate(zip(schedule.sigmas, schedule.timesteps, strict=True)):
            looks = self._settings.history_at
            choose, look = step in self._settings.choose_at, looks is None or step in looks
            flow = self.call(latents, timestep, choose=choose, look=look)
            next_sigma = schedule.next_sigma(step)
            if is_euler or next_sigma == 0.0:
                latents = step_euler(latents, flow, sigma, next_sigma)
            else:
                latents = step_renoise(latents, flow, sigma, next_sigma, noise[step + 1])
        return latents

    def _capture(self, choose: bool, look: bool, clean: bool) -> torch.cuda.CUDAGraph:
        # At the priority of the stream that the loop runs on: kernels of a graph keep the one they were captured at.
        priority = torch.cuda.current_stream().priority
        stream = stream_for("before a capture", self.device, priority)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and fills the workspaces of libraries
                self.compute(choose, look=look, clean=clean)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # Other threads go on with their own work meanwhile, such as decoding the chunk before.
        capturing = stream_for("capture", self.device, priority) if priority else None
        with torch.cuda.graph(graph, pool=pool, stream=capturing, capture_error_mode="thread_local"):
            self.compute(choose, look=look, clean=clean)
        return graph
