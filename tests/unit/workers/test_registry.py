"""What models need and cost: counts that are exact, estimates that follow the geometry, weights that are recognised."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.wan_files import TINY, TINY_I2V, make_dit, write_forcing, write_single_file, write_whole_model
from workers import registry
from workers.assemble_tiles import keep_history, runs_of, table_settings
from workers.cache.low_bit import Storage
from workers.cache.packed_table import PackedTable, make_table
from workers.checkpoints import fetch
from workers.config import BUNDLED_WEIGHTS, WindowCacheConfig
from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.errors import CheckpointMismatch, ConfigUnsupported
from workers.geometry import (
    DEFAULT_WINDOW_LATENT_FRAMES,
    GPUS,
    Workload,
    control_parameters,
    dit_parameters,
    image_parameters,
    layer_parameters,
    text_parameters,
)
from workers.kernels.listed_parts import make_parted
from workers.model.backbones import BACKBONES, Backbone, find_backbone
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT
from workers.model.image_encoder import make_image_encoder
from workers.model.umt5 import make_umt5
from workers.releases import RELEASES, Published, Release


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_parameters_are_counted_exactly(name: str) -> None:
    backbone = find_backbone(name)
    with torch.device("meta"):
        assert dit_parameters(backbone) == count(CausalDiT(backbone))
        if backbone.umt5 is not None:
            assert text_parameters(backbone) == count(make_umt5(backbone))
        if backbone.image_encoder is not None:
            assert image_parameters(backbone) == count(make_image_encoder(backbone))
        if backbone.control_branch is not None:
            assert control_parameters(backbone) == count(ControlBranch(backbone))


def test_published_counts() -> None:
    assert dit_parameters(find_backbone("wan2.1-t2v-1.3b")) == 1_418_996_800
    assert dit_parameters(find_backbone("wan2.1-t2v-14b")) == 14_288_491_584
    assert dit_parameters(find_backbone("wan2.1-i2v-14b")) == 16_394_878_784
    assert control_parameters(find_backbone("longvie2-14b")) == 2_633_637_888
    assert layer_parameters(80, 96, takes_image=True) > layer_parameters(80, 96, takes_image=False)


def test_the_default_window_is_that_of_the_configuration() -> None:
    config = WindowCacheConfig()
    assert config.sink_latent_frames + config.recent_latent_frames == DEFAULT_WINDOW_LATENT_FRAMES


def workload(name: str, frames: int, **sizes: int) -> Workload:
    backbone = find_backbone(name)
    native = backbone.native
    steps, guidance = (native.num_steps, native.guidance) if native else (4, 1.0)
    return Workload(backbone, sizes.get("width", 832), sizes.get("height", 480), frames, steps, guidance)


def test_cache_bytes_are_those_of_the_published_models() -> None:
    work = workload("self-forcing-1.3b", 81)
    assert work.native_latent_frames == work.history_latent_frames == 21
    assert work.kv_bytes(21) / 2**30 == pytest.approx(5.6, abs=0.05)
    assert work.kv_bytes(24) / 2**30 == pytest.approx(6.4, abs=0.05)
    assert workload("rolling-forcing-1.3b", 501).native_latent_frames == 21


def test_operations_of_a_call_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from workers.model.dit import attend_prompt_dense

    backbone = replace(TINY, num_layers=2)
    model = make_dit(backbone)
    work = Workload(backbone, 64, 32, 9, 1)
    latents = torch.randn(1, 3, 16, 4, 8)
    prompt = model.project_prompt(torch.randn(1, backbone.text_tokens, 32))

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(2, 3)
        return (scores.softmax(-1) @ heads[2]).transpose(1, 2)

    with FlopCounterMode(display=False) as counter:
        model(latents, torch.full((1, 3), 500.0), prompt, attend, attend_prompt=attend_prompt_dense)
    counted = sum(
        flops for name, flops in counter.get_flop_counts()["Global"].items() if "convolution" not in str(name)
    )
    # Patches, head and the embedding of time are not in the formula; cross-attention on the CPU may not be counted.
    assert work.call_flops(3, 3) == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_kept_of_the_history_is_counted_where_some_calls_take_it(dtype: torch.dtype) -> None:
    backbone = find_backbone("tiny-test")
    config, once = TileCacheConfig(budget_latent_frames=24, spare_latent_frames=6), TileAttentionConfig(history_at=(0,))
    sizes = table_settings(config, backbone, backbone.latent_size(backbone.width, backbone.height))
    table, runs = make_table(sizes, dtype, torch.device("cpu")), runs_of(once, sizes)
    _, kept = keep_history(table, runs, make_parted("torch", sizes.tile))
    work = Workload(backbone, backbone.width, backbone.height, 3000, 4)
    assert work.kept_history_bytes(once, dtype.itemsize) == kept.num_bytes
    always = TileAttentionConfig()
    assert work.kept_history_bytes(always) == 0
    assert 0.3 < work.table_flops(config, once) / work.table_flops(config, always) < 1
    every_step = TileAttentionConfig(history_at=(0, 1, 2, 3))
    assert work.table_flops(config, every_step) == pytest.approx(work.table_flops(config, always))


@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
@pytest.mark.parametrize(("name", "tile"), [("tiny-test", None), ("longtake-world", 32), ("longtake-world", None)])
def test_bytes_of_a_tile_table_are_those_that_it_takes(name: str, tile: int | None, storage: Storage) -> None:
    backbone = find_backbone(name)
    config = TileCacheConfig(tile=tile, budget_latent_frames=24, spare_latent_frames=6, storage=storage)
    sizes = table_settings(config, backbone, backbone.latent_size(backbone.width, backbone.height))
    work = Workload(backbone, backbone.width, backbone.height, 3000, 4)
    for dtype in (torch.bfloat16, torch.float32):
        table = make_table(sizes, dtype, torch.device("cpu"))
        held = {key: tensor.nbytes for key, tensor in table.state().items() if not key.endswith("counts")}
        if isinstance(table, PackedTable):
            held["workspace"] = table.workspace.k_NLW.nbytes + table.workspace.v_NLD.nbytes
        assert work.table_bytes(config, dtype.itemsize) == sum(held.values())
        records = ("position_NC3", "m_NC", "weight_NC", "partner_NC", "mean_NJD")
        assert sizes.bytes(dtype) == sum(num for key, num in held.items() if key.split(".")[-1] not in records)
    of_pairs = work.table_bytes(config.model_copy(update={"merging": "pairs"})) - work.table_bytes(config)
    distances = 4 * sizes.num_layers * sizes.num_heads * sizes.history_slots
    assert of_pairs == (0 if storage == "model" else distances)
    short, long = (
        registry.estimate(name, gpu=GPUS["h100"], width=None, height=None, num_frames=frames) for frames in (501, 3000)
    )
    assert short.tile_table_bytes == long.tile_table_bytes
    assert short.tile_table_seconds is not None
    assert long.tile_table_seconds is not None
    assert short.tile_table_seconds < long.tile_table_seconds


def test_a_model_with_another_loop_has_no_tile_table() -> None:
    rolling = registry.estimate("rolling-forcing-1.3b", gpu=None, width=None, height=None, num_frames=501)
    assert (rolling.tile_table_bytes, rolling.tile_table_peak_bytes, rolling.tile_table_seconds) == (None, None, None)


@pytest.mark.parametrize("name", list(RELEASES))
def test_estimates_grow_with_the_take_and_shrink_with_the_gpu(name: str) -> None:
    short = registry.estimate(name, gpu=GPUS["h100"], width=None, height=None, num_frames=81)
    long = registry.estimate(name, gpu=GPUS["h100"], width=None, height=None, num_frames=501)
    newer = registry.estimate(name, gpu=GPUS["b200"], width=None, height=None, num_frames=501)
    assert short.teraflop < long.teraflop
    assert short.whole_history_bytes < long.whole_history_bytes
    assert long.native_cache_bytes <= long.whole_history_bytes
    assert newer.seconds is not None
    assert long.seconds is not None
    assert newer.seconds < long.seconds
    assert long.fits == (name != "wan2.1-t2v-14b")  # its default window is too much for 80 GB
    unknown = registry.estimate(name, gpu=None, width=None, height=None, num_frames=81)
    assert (unknown.seconds, unknown.fits) == (None, None)


@pytest.mark.parametrize(("name", "measured"), [("self-forcing-1.3b", 24.7e9), ("rolling-forcing-1.3b", 25.5e9)])
def test_a_predicted_peak_is_near_the_measured_one(name: str, measured: float) -> None:
    cost = registry.estimate(name, gpu=None, width=None, height=None, num_frames=3000)
    assert cost.peak_bytes == pytest.approx(measured, rel=0.05)  # rollout-h200, with pictures
    without = measured - {"self-forcing-1.3b": 9.66e9, "rolling-forcing-1.3b": 8.57e9}[name]
    assert cost.peak_bytes - cost.vae_decode_bytes == pytest.approx(without, rel=0.05)


def test_gpus_are_found_by_name_and_by_what_the_machine_says() -> None:
    assert registry.find_gpu("H100") is GPUS["h100"]
    with pytest.raises(ConfigUnsupported, match="gpu: 'h1000' is not known; known: a100"):
        registry.find_gpu("h1000")
    found = registry.match_gpu("NVIDIA H100 80GB HBM3, 81559\n")
    assert found is not None
    assert (found.memory_bytes, found.peak_flops) == (81559 << 20, GPUS["h100"].peak_flops)
    four = registry.match_gpu("NVIDIA GeForce RTX 4090, 24564\nNVIDIA GeForce RTX 4090, 24564\n")
    assert four is not None
    assert four.peak_flops == GPUS["rtx-4090"].peak_flops
    assert registry.match_gpu("NVIDIA GeForce RTX 3060, 12288") is None
    assert registry.match_gpu("") is None


def test_every_model_with_weights_elsewhere_says_where() -> None:
    named = {b.name for b in BACKBONES.values() if b.text is None and not b.name.endswith("-test")}
    assert named == set(RELEASES)
    shown = registry.show_model("rolling-forcing-1.3b")
    assert any("ACADEMIC USE ONLY" in licence for licence in shown["licences"])
    assert "hf download TencentARC/RollingForcing" in shown["download"][1]
    assert registry.list_models()[0].name == "longtake-world"
    with pytest.raises(ConfigUnsupported, match="unknown model"):
        registry.show_model("wan3")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "DEFAULT_CACHE", tmp_path / "cache")


def look(url: Path, name: str | None = None, finetune: Path | None = None) -> tuple[Any, dict[str, Any]]:
    found = registry.check(str(url), name, str(finetune) if finetune else None, fetch=False)
    return found, {part["part"]: part for part in found["parts"]}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_whole_model_is_recognised(tmp_path: Path, layout: str) -> None:
    folder = write_whole_model(tmp_path / "w", layout=layout)
    found, parts = look(folder)
    assert found["model"] == "tiny-wan-test"
    assert found["is_complete"]
    assert set(parts) == {"transformer", "text encoder", "tokenizer", "VAE"}
    assert f"{layout} layout, 96 tensors: all fit" in parts["transformer"]["detail"]


def test_what_is_missing_is_named_part_by_part(tmp_path: Path) -> None:
    folder = write_whole_model(tmp_path / "w")
    tensors = make_dit().state_dict()
    del tensors["blocks.1.ffn.2.bias"]
    save_file(tensors, str(folder / "diffusion_pytorch_model.safetensors"))
    (folder / "Wan2.1_VAE.pth").unlink()
    found, parts = look(folder)
    assert not found["is_complete"]
    assert "1 of 96 tensors missing (blocks.1.ffn.2.bias)" in parts["transformer"]["detail"]
    assert "not there: Wan2.1_VAE.pth or vae/" in parts["VAE"]["detail"]
    assert parts["text encoder"]["is_good"]
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"PK not a zip")
    assert "cut off" in look(folder)[1]["text encoder"]["detail"]


def test_one_file_and_things_that_are_no_model(tmp_path: Path) -> None:
    alone = write_single_file(tmp_path, make_dit().state_dict())
    found, parts = look(alone)
    assert found["model"] == "tiny-wan-test"
    assert parts["transformer"]["is_good"]
    assert not parts["VAE"]["is_good"]
    i2v = tmp_path / "i2v"
    write_whole_model(i2v)
    save_file(make_dit(TINY_I2V).state_dict(), str(i2v / "diffusion_pytorch_model.safetensors"))
    assert look(i2v)[0]["model"] is None
    assert "of another shape" in look(i2v, "tiny-wan-test")[1]["transformer"]["detail"]
    with pytest.raises(CheckpointMismatch, match="nothing there"):
        look(tmp_path / "nowhere")


def test_a_distilled_model_is_known_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Backbone = replace(TINY, name="tiny-forcing")
    monkeypatch.setitem(BACKBONES, "tiny-forcing", backbone)
    release = Release(Published("a/b", "", ()), Published("c/d", "no use at all", ("checkpoints/forcing_dmd.pt",)))
    monkeypatch.setitem(RELEASES, "tiny-forcing", release)
    folder = write_whole_model(tmp_path / "w")
    own = write_forcing(tmp_path / "other.pt", {"generator": make_dit().state_dict()})
    assert look(folder)[0]["model"] == "tiny-wan-test"
    assert not look(folder, "tiny-forcing")[1]["transformer"]["is_good"]
    found, parts = look(folder, "tiny-forcing", own)
    assert found["is_complete"]
    assert "other.pt: distilled layout, 96 tensors: all fit" in parts["transformer"]["detail"]
    write_forcing(folder / "forcing_dmd.pt", {"generator_ema": make_dit().state_dict()})
    found, parts = look(folder)
    assert found["model"] == "tiny-forcing"
    assert found["licences"] == ["a/b: ", "c/d: no use at all"]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a0d2c5ae8d0c\nsize 5676070424\n"


@pytest.mark.parametrize(("layout", "tokenizer"), [("original", "google/umt5-xxl"), ("diffusers", "tokenizer")])
def test_pointers_of_git_lfs_are_told_from_files(tmp_path: Path, layout: str, tokenizer: str) -> None:
    folder = write_whole_model(tmp_path / "w", layout=layout)
    (folder / tokenizer / "tokenizer.json").write_text(POINTER)
    found, parts = look(folder)
    assert [name for name, part in parts.items() if not part["is_good"]] == ["tokenizer"]
    for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.pth")]:
        path.write_text(POINTER)
    found, parts = look(folder)
    assert (found["model"], found["is_complete"], len(parts)) == (None, False, 4)
    for part in parts.values():
        assert "is a Git LFS pointer that stands for a file of 5,676,070,424 bytes; run `git" in part["detail"]


def test_damage_is_named_although_the_model_is_not_known(tmp_path: Path) -> None:
    folder = write_whole_model(tmp_path / "w")
    for name in ("diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])
    found, parts = look(folder)
    assert found["model"] is None
    assert "diffusion_pytorch_model.safetensors: cut off" in parts["transformer"]["detail"]
    assert "Wan2.1_VAE.pth: cut off" in parts["VAE"]["detail"]
    assert "no tokenizer (Expecting" in parts["tokenizer"]["detail"]
    assert parts["text encoder"]["is_good"]
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    detail = look(folder)[1]["transformer"]["detail"]
    assert "no transformer there: expected diffusion_pytorch_model.safetensors" in detail
    assert "models_t5_umt5-xxl-enc-bf16.pth" in detail


def test_a_folder_of_another_model_is_called_by_its_sizes(tmp_path: Path) -> None:
    folder = write_whole_model(tmp_path / "w")
    detail = look(folder, "wan2.1-t2v-1.3b")[1]["transformer"]["detail"]
    assert "of another shape" in detail
    assert "By its shapes it has the sizes of tiny-wan-test (width 80, 3 layers" in detail
    strange = replace(TINY, num_layers=2)
    save_file(make_dit(strange).state_dict(), str(folder / "diffusion_pytorch_model.safetensors"))
    detail = look(folder)[1]["transformer"]["detail"]
    assert "sizes of no model known here (width 80, 2 layers" in detail
    save_file({"unet.weight": torch.ones(2)}, str(folder / "diffusion_pytorch_model.safetensors"))
    assert "1 tensors of no Wan transformer (first: weight)" in look(folder)[1]["transformer"]["detail"]


def test_a_tokenizer_with_more_words_than_the_text_encoder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_whole_model(tmp_path / "w")
    small = replace(TINY, name="few-words", umt5=replace(TINY.umt5, num_words=9))
    monkeypatch.setitem(BACKBONES, small.name, small)
    part = look(folder, small.name)[1]["tokenizer"]
    assert (part["is_good"], part["detail"]) == (False, "google/umt5-xxl: 16 words, the text encoder knows 9")


def test_the_bundled_weights_are_checked_part_by_part(tmp_path: Path) -> None:
    found, parts = look(BUNDLED_WEIGHTS)
    assert (found["model"], found["is_complete"]) == ("longtake-world", True)
    assert set(parts) == {"transformer", "text encoder", "VAE"}
    copy = Path(shutil.copytree(BUNDLED_WEIGHTS, tmp_path / "copy"))
    (copy / "weights-1.safetensors").write_bytes(b"")
    found, parts = look(copy)
    assert not found["is_complete"]
    assert "weights-1.safetensors: altered or cut off" in parts["weights"]["detail"]


@pytest.mark.parametrize("name", list(RELEASES))
def test_the_client_understands_the_commands_that_download(name: str) -> None:
    """A word behind the first pattern would be taken for a file name, and that file alone downloaded."""
    import click
    import typer
    from huggingface_hub.cli.download import download

    app = typer.Typer()
    app.command("download")(download)
    command = typer.main.get_command(app)
    for line, published in zip(registry.show_model(name)["download"], RELEASES[name].parts, strict=True):
        program, verb, *words = shlex.split(line)
        assert (program, verb) == ("hf", "download")
        with click.Context(command):
            given = command.make_context("download", words).params
        assert given["repo_id"] == published.repository
        assert not given["filenames"]
        assert given["include"] == [f"{file}*" if file.endswith("/") else file for file in published.files]


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("wan.md", "wan2.1-t2v-1.3b"),
        ("self-forcing.md", "self-forcing-1.3b"),
        ("rolling-forcing.md", "rolling-forcing-1.3b"),
        ("longvie2.md", "longvie2-14b"),
    ],
)
def test_the_pages_show_the_commands_that_download(page: str, name: str) -> None:
    text = (Path(__file__).parents[3] / "docs" / "backbones" / page).read_text()
    words = " ".join(text.replace("\\\n", " ").split())
    for command in registry.show_model(name)["download"]:
        assert command in words
