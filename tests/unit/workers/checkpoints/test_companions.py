"""Text encoder, VAE and image encoder: original and library names reach the same module bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.wan_files import (
    TINY,
    TINY_I2V,
    make_umt5_tensors,
    make_vae_tensors,
    original_clip,
    scramble,
    write_whole_model,
)
from workers.checkpoints.companions import (
    CLIP,
    UMT5,
    VAE,
    clip_shapes,
    find_companion,
    find_tokenizer,
    read_companion,
    umt5_name,
    vae_name,
)
from workers.checkpoints.fetch import open_folder
from workers.checkpoints.place import build_empty, compare, fill
from workers.errors import CheckpointMismatch
from workers.model.backbones import find_backbone
from workers.model.image_encoder import make_image_encoder
from workers.model.umt5 import make_umt5
from workers.model.wan_vae import make_wan_vae

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_each_layout_loads_bit_for_bit(tmp_path: Path, layout: str) -> None:
    folder = open_folder(write_whole_model(tmp_path / "w", layout=layout), tmp_path / "cache")
    text, vae = build_empty(lambda: make_umt5(TINY)), build_empty(lambda: make_wan_vae(TINY))
    fill(text, read_companion(folder, UMT5), what="text encoder", device=CPU)
    fill(vae, read_companion(folder, VAE), what="VAE", device=CPU)
    expected = make_umt5_tensors()
    assert text.state_dict().keys() == expected.keys() | {"encoder.embed_tokens.weight"}
    assert all(torch.equal(text.state_dict()[key], t) for key, t in expected.items())
    assert text.get_parameter("shared.weight") is text.get_parameter("encoder.embed_tokens.weight")
    expected = make_vae_tensors()
    assert all(torch.equal(t, expected[key]) for key, t in vae.state_dict().items())
    assert find_tokenizer(folder) == ("google/umt5-xxl" if layout == "original" else "tokenizer")


def test_names_of_the_true_files() -> None:
    """As published; the sizes are checked against the counts of parameters."""
    backbone = find_backbone("wan2.1-i2v-14b")
    text, vae = build_empty(lambda: make_umt5(backbone)), build_empty(lambda: make_wan_vae(backbone))
    assert sum(p.numel() for p in text.parameters()) == 5_680_910_336
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert len(vae.state_dict()) == 194
    for theirs, ours in {
        "blocks.23.pos_embedding.embedding.weight": (
            "encoder.block.23.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        "blocks.0.ffn.gate.0.weight": "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    }.items():
        assert umt5_name(theirs) == ours
        assert ours in text.state_dict()
    for theirs, ours in {
        "conv1.weight": "quant_conv.weight",
        "encoder.conv1.bias": "encoder.conv_in.bias",
        "encoder.downsamples.5.time_conv.weight": "encoder.down_blocks.5.time_conv.weight",
        "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
        "decoder.middle.2.residual.6.weight": "decoder.mid_block.resnets.1.conv2.weight",
        "decoder.upsamples.3.resample.1.weight": "decoder.up_blocks.0.upsamplers.0.resample.1.weight",
        "decoder.upsamples.4.shortcut.weight": "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
        "decoder.upsamples.14.residual.0.gamma": "decoder.up_blocks.3.resnets.2.norm1.gamma",
        "decoder.head.0.gamma": "decoder.norm_out.gamma",
        "encoder.head.2.weight": "encoder.conv_out.weight",
    }.items():
        assert vae_name(theirs) == ours
        assert ours in vae.state_dict()


def test_latents_are_normalised_by_the_published_numbers() -> None:
    config = make_wan_vae(TINY).config
    assert config.latents_mean == [
        *[-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508],
        *[0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
    ]
    assert config.latents_std == [
        *[2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743],
        *[3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    ]


def test_names_that_nobody_knows_stay_and_are_reported() -> None:
    assert vae_name("surplus.weight") == "surplus.weight"
    assert vae_name("decoder.surplus.weight") == "decoder.surplus.weight"
    assert umt5_name("blocks.0.surplus.weight") == "blocks.0.surplus.weight"


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_image_encoder_loads_bit_for_bit(tmp_path: Path, layout: str) -> None:
    tower = make_image_encoder(TINY_I2V)
    scramble(tower)
    state = tower.state_dict()
    if layout == "original":
        torch.save(original_clip(state), tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    else:
        (tmp_path / "image_encoder").mkdir()
        published = {f"vision_model.{key}": t for key, t in state.items()}
        save_file(published, str(tmp_path / "image_encoder" / "model.safetensors"))
    fresh = build_empty(lambda: make_image_encoder(TINY_I2V))
    found = clip_shapes(read_companion(open_folder(tmp_path, tmp_path / "cache"), CLIP))
    fill(fresh, found, what="image encoder", device=CPU)
    assert all(torch.equal(t, state[key]) for key, t in fresh.state_dict().items())


def test_what_is_missing_is_asked_for_by_its_published_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, str(tmp_path / "x.safetensors"))
    folder = open_folder(tmp_path, tmp_path / "cache")
    assert find_companion(folder, UMT5) is None
    with pytest.raises(CheckpointMismatch, match=r"no text encoder: expected models_t5_.*text_encoder/.*copy it there"):
        read_companion(folder, UMT5)


def test_a_vae_of_another_size_is_reported(tmp_path: Path) -> None:
    folder = open_folder(write_whole_model(tmp_path / "w"), tmp_path / "cache")
    wider = build_empty(lambda: make_wan_vae(find_backbone("wan2.1-t2v-1.3b")))
    fit = compare(wider, read_companion(folder, VAE))
    assert not fit.missing
    assert not fit.unexpected
    assert f"{len(fit.misshaped)} of another shape" in fit.text()
    assert "decoder.conv1.weight is (16, 16, 3, 3, 3), expected (384, 16, 3, 3, 3)" in fit.text()
