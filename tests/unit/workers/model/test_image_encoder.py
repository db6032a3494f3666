"""Image tokens: squeezed whole, CLIP's scale, all layers but the last, no final norm."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from tests.wan_files import TINY, scramble
from workers.checkpoints.place import build_empty
from workers.model.backbones import ImageEncoderSizes, find_backbone
from workers.model.image_encoder import ImageEncoder, make_image_encoder

I2V = replace(TINY, image_dim=32, image_encoder=ImageEncoderSizes(3, 2, 48, picture=28, patch=14))


def test_tokens_are_those_before_the_last_layer_and_the_last_norm() -> None:
    module = make_image_encoder(I2V).eval().requires_grad_(False)
    torch.manual_seed(6)
    scramble(module)
    encoder = ImageEncoder(module, I2V)
    pictures = torch.rand(2, 3, 40, 56) * 2 - 1
    tokens = encoder.encode(pictures)
    assert tokens.shape == (2, 5, 32)  # 2x2 patches and the class
    tower = encoder.module
    x = tower.pre_layrnorm(tower.embeddings(encoder.prepare(pictures)))  # type: ignore[operator]
    for layer in tower.encoder.layers[:2]:  # type: ignore[union-attr,index]
        x = layer(x, attention_mask=None)
    torch.testing.assert_close(tokens, x, atol=1e-5, rtol=1e-5)


def test_pictures_are_squeezed_without_keeping_their_shape() -> None:
    encoder = ImageEncoder(make_image_encoder(I2V), I2V)
    white = encoder.prepare(torch.ones(1, 3, 30, 100))
    assert white.shape == (1, 3, 28, 28)
    torch.testing.assert_close(
        white[0, :, 3, 5],
        (1 - torch.tensor([0.4815, 0.4578, 0.4082])) / torch.tensor([0.2686, 0.2613, 0.2758]),
        atol=1e-3,
        rtol=1e-3,
    )
    ramp = torch.linspace(-1, 1, 100).expand(1, 3, 30, 100)
    expected = F.interpolate(ramp, size=(28, 28), mode="bicubic")[0, 0, 0]
    torch.testing.assert_close(encoder.prepare(ramp)[0, 0, 0] * 0.26862954 + 0.48145466, expected / 2 + 0.5)


def test_a_tower_without_memory_gets_its_counter() -> None:
    module = build_empty(lambda: make_image_encoder(I2V))
    module.to_empty(device="cpu").requires_grad_(False)
    scramble(module)
    assert ImageEncoder(module, I2V).encode(torch.zeros(1, 3, 28, 28)).isfinite().all()


def test_the_true_tower_gives_257_tokens_of_width_1280() -> None:
    backbone = find_backbone("wan2.1-i2v-14b")
    with torch.device("meta"):
        state = make_image_encoder(backbone).state_dict()
    assert state["embeddings.position_embedding.weight"].shape == (257, 1280)
    assert sum(key.endswith("mlp.fc1.weight") for key in state) == 32
