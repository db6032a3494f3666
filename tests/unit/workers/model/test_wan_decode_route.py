"""How Wan's pictures are decoded follows from the GPU and the packages, and one line says why nothing faster does."""

import logging

import pytest
import torch

from tests.wan_files import TINY, make_vae_tensors
from workers import nvrtc
from workers.model import wan_vae
from workers.model.wan_decode_route import RouteChoice, choose_route
from workers.model.wan_vae import WanVae, make_wan_vae

HALF, WIDE = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find_compiler", lambda packages: object())


@pytest.mark.parametrize(
    ("compute", "dtype", "has_triton", "route", "line"),
    [
        ((9, 0), HALF, True, "fours", "VAE decodes by fours"),
        (
            (9, 0), torch.float16, True, "triton",
            "VAE decodes by triton; not fours: it takes bfloat16, not float16",
        ),
        (
            (8, 0), HALF, True, "triton",
            "VAE decodes by triton; not fours: it is made for compute capability 9.0, this is 8.0",
        ),
        (
            (10, 0), HALF, True, "triton",
            "VAE decodes by triton; not fours: it is made for compute capability 9.0, this is 10.0",
        ),
        (
            (9, 0), HALF, False, "cudnn",
            "VAE decodes by cudnn; not fours: Triton is not installed; not triton: Triton is not installed",
        ),
        (
            (9, 0), WIDE, True, "cudnn",
            "VAE decodes by cudnn; not fours: it takes bfloat16, not float32; "
            "not triton: it is faster in 16 bits alone, not in float32",
        ),
        (
            (7, 5), HALF, True, "cudnn",
            "VAE decodes by cudnn; not fours: it is made for compute capability 9.0, this is 7.5; "
            "not triton: it needs compute capability 8.0, this is 7.5",
        ),
        (
            None, HALF, True, "cudnn",
            "VAE decodes by cudnn; not fours: it is made for compute capability 9.0, this is no CUDA device; "
            "not triton: it needs compute capability 8.0, this is no CUDA device",
        ),
    ],
)  # fmt: skip
def test_the_fastest_that_can_run_is_taken_and_why_no_faster(
    compute: tuple[int, int] | None, dtype: torch.dtype, has_triton: bool, route: str, line: str
) -> None:
    assert choose_route(compute, dtype, has_triton=has_triton) == (route, line)


def test_without_the_runtime_compiler_it_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_compiler(packages: object) -> object:
        raise RuntimeError("CUDA's runtime compiler was not found; tried libnvrtc.so.13")

    monkeypatch.setattr(nvrtc, "find_compiler", find_compiler)
    choice = choose_route((9, 0), HALF, has_triton=True)
    assert choice.route == "triton"
    assert choice.line.endswith("not fours: CUDA's runtime compiler was not found; tried libnvrtc.so.13")


def test_a_decoder_takes_and_says_what_was_chosen_unless_another_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_wan_vae(TINY).eval().requires_grad_(False)
    module.load_state_dict(make_vae_tensors())
    monkeypatch.setattr(wan_vae, "find_route", lambda weight: RouteChoice("cudnn-tried", "the line"))
    with caplog.at_level(logging.INFO):
        assert WanVae(module, fast=True).version == "VAE by cudnn-tried"
        assert WanVae(module, fast=True, route="cudnn").version == "VAE by cudnn"
        assert WanVae(module).version == "", "the library decodes on a CPU"
    assert caplog.messages == ["the line"]
