"""Every published layout loads into the same model bit for bit; what does not fit is named with key and expectation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.wan_files import (
    BASE_LAYOUTS,
    TINY,
    TINY_I2V,
    Tensors,
    make_dit,
    write_diffusers,
    write_original,
    write_original_shards,
)
from workers.checkpoints.fetch import open_folder
from workers.checkpoints.wan import build_dit, from_diffusers, our_names, read_dit, read_sizes, to_diffusers
from workers.errors import CheckpointMismatch
from workers.model.backbones import Backbone, find_backbone
from workers.model.dit import CausalDiT

CPU = torch.device("cpu")


def load(path: Path, backbone: Backbone = TINY, dtype: torch.dtype | None = None) -> CausalDiT:
    return build_dit(backbone, read_dit(open_folder(path, path.parent / "cache")), CPU, dtype)


def assert_same(model: CausalDiT, tensors: Tensors) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.mark.parametrize("backbone", [TINY, TINY_I2V], ids=["t2v", "i2v"])
@pytest.mark.parametrize("layout", BASE_LAYOUTS)
def test_each_layout_loads_bit_for_bit(folder: Path, layout: str, backbone: Backbone) -> None:
    tensors = make_dit(backbone).state_dict()
    assert_same(load(BASE_LAYOUTS[layout](folder, tensors), backbone), tensors)


def test_names_of_the_true_models_survive_the_way_to_diffusers_and_back() -> None:
    for name, count in (("wan2.1-t2v-1.3b", 825), ("wan2.1-t2v-14b", 1095), ("wan2.1-i2v-14b", 1303)):
        with torch.device("meta"):
            keys = list(CausalDiT(find_backbone(name)).state_dict())
        assert len(keys) == count
        renamed = {to_diffusers(key) for key in keys}
        assert len(renamed) == count
        assert {from_diffusers(key) for key in renamed} == set(keys)


def test_diffusers_own_model_has_exactly_our_renamed_keys() -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=40,
            in_channels=36,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=96,
            num_layers=3,
            image_dim=32,
            added_kv_proj_dim=80,
            rope_max_seq_len=64,
        ).state_dict()
        ours = CausalDiT(TINY_I2V).state_dict()
    assert {from_diffusers(key): t.shape for key, t in theirs.items()} == {key: t.shape for key, t in ours.items()}
    assert theirs["blocks.0.norm2.weight"].shape == (80,)  # the swap with norm3: the affine one


@given(st.lists(st.sampled_from(["_fsdp_wrapped_module", "module", "_orig_mod"]), max_size=4), st.booleans())
def test_wrappers_are_stripped_wherever_they_stand(wrappers: list[str], is_diffusers: bool) -> None:
    keys = list(make_dit(replace(TINY, num_layers=1)).state_dict())
    published = {}
    for key in keys:
        parts = (to_diffusers(key) if is_diffusers else key).split(".")
        published[".".join(["model", *wrappers, parts[0], *wrappers, *parts[1:]])] = key
    found, layout = our_names(published)
    assert found == {key: key for key in keys}
    assert layout == ("diffusers" if is_diffusers else "original")


def test_numbers_are_cast_once_on_the_way(folder: Path) -> None:
    tensors = make_dit().state_dict()
    model = load(write_original(folder, tensors), dtype=torch.bfloat16)
    assert all(torch.equal(t, tensors[key].bfloat16()) for key, t in model.state_dict().items())


def test_a_report_counts_all_and_names_the_first(folder: Path) -> None:
    tensors = make_dit().state_dict()
    for key in [k for k in tensors if k.startswith("blocks.2.self_attn.")]:
        del tensors[key]
    tensors["surplus.weight"] = torch.ones(3)
    tensors["head.head.weight"] = torch.ones(63, 80)
    with pytest.raises(CheckpointMismatch) as caught:
        load(write_original(folder, tensors))
    text = str(caught.value)
    assert str(folder / "diffusion_pytorch_model.safetensors") in text
    assert "10 of 96 tensors missing (blocks.2.self_attn.q.weight" in text
    assert "and 5 more" in text
    assert "1 not expected (surplus.weight)" in text
    assert "head.head.weight is (63, 80), expected (64, 80)" in text
    assert "fetch them again" in text


def test_weights_of_another_model_are_called_by_its_name(folder: Path) -> None:
    other = replace(TINY, dim=96, num_heads=2)
    with pytest.raises(CheckpointMismatch, match="name that model, or fetch") as caught:
        load(write_original(folder, make_dit(other).state_dict()))
    assert "sizes of no model known here (width 96, 3 layers, ffn 96, 16 channels in)" in str(caught.value)
    write_original(folder, make_dit(TINY_I2V).state_dict())
    with pytest.raises(CheckpointMismatch, match="takes an image"):
        load(folder)


def test_sizes_are_read_off_the_shapes(folder: Path) -> None:
    write_diffusers(folder, make_dit().state_dict())
    sizes = read_sizes(read_dit(open_folder(folder, folder / "cache")))
    assert sizes is not None
    assert sizes.backbone() is TINY


def test_a_folder_without_a_transformer_lists_what_is_there(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, str(folder / "lora.safetensors"))
    with pytest.raises(CheckpointMismatch, match=r"expected diffusion_pytorch_model\.safetensors.*lora\.safetensors"):
        load(folder)
    with pytest.raises(CheckpointMismatch, match="nothing there"):
        load(folder / "nowhere")


def test_the_same_tensor_under_two_names_is_refused() -> None:
    with pytest.raises(CheckpointMismatch, match="two names"):
        our_names({"module.blocks.0.norm3.bias": 1, "blocks.0.norm3.bias": 2})


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def replace_by_text(path: Path) -> None:
    path.write_text("<html>404: the page was moved</html>" * 40)


def poison(path: Path) -> None:
    tensors = load_file(path)
    tensors["head.modulation"][0, 1, 3] = float("nan")
    save_file(tensors, str(path))


def shorten_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, r"cut off or altered: it has \d+ bytes, its header promises \d+; fetch it again"),
        (replace_by_text, "expected a safetensors file. Fetch it again"),
        (shorten_header, "cut off in its header"),
        (poison, "tensor head.modulation holds NaN or infinity; fetch the file again"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    path = write_original(folder, make_dit().state_dict()) / "diffusion_pytorch_model.safetensors"
    damage(path)
    with pytest.raises(CheckpointMismatch, match=words) as caught:
        load(folder)
    assert str(path) in str(caught.value)


def test_an_unknown_number_format_is_refused(folder: Path) -> None:
    tensors = make_dit().state_dict()
    tensors["head.modulation"] = tensors["head.modulation"].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointMismatch, match=r"head\.modulation is stored as F8_E4M3.*bfloat16"):
        load(write_original(folder, tensors))


def test_a_missing_shard_and_a_wrong_index_are_named(folder: Path) -> None:
    write_original_shards(folder, make_dit().state_dict())
    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointMismatch, match=r"00002-of-00003\.safetensors: no such file"):
        load(folder)
    shard.write_bytes(data)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["blocks.9.ffn.0.bias"] = shard.name
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointMismatch, match=r"1 tensors are in none of its shards \(first: blocks\.9"):
        load(folder)
    index.write_text("{")
    with pytest.raises(CheckpointMismatch, match="is no index of safetensors shards"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointMismatch, match="plain file names"):
        load(folder)
