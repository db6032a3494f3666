"""The bundled text encoder: any string, exact padding, no influence between samples."""

from dataclasses import replace

import pytest
import torch

from workers.model.backbones import find_backbone
from workers.model.text_encoder import NUM_FEATURES, EncodedText, TextEncoder, fold_padding, tokenize

BACKBONE = find_backbone("tiny-test")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(BACKBONE).eval()


@pytest.mark.parametrize("text", ["", "a", "Ünïcödé – 海の島 🏝️", "x" * 5000, "\x00\udcff", "word " * 1000])
def test_any_string_gives_finite_rows_within_the_text_length(encoder: TextEncoder, text: str) -> None:
    with torch.no_grad():
        rows, num_tokens = encoder.encode([text])
    assert rows.isfinite().all()
    assert num_tokens[0] <= BACKBONE.text_tokens
    assert rows.shape == (1, max(1, int(num_tokens[0])), BACKBONE.text_dim)


def test_rows_past_the_prompt_are_zero_and_do_not_change_it(encoder: TextEncoder) -> None:
    short, long = "two red houses", "a green valley with a long winding river, then snow"
    with torch.no_grad():
        alone, _ = encoder.encode([short])
        both, num_tokens = encoder.encode([short, long, ""])
    assert num_tokens.tolist() == [3, 11, 0]
    assert both[0, 3:].abs().max() == 0
    assert both[2].abs().max() == 0
    torch.testing.assert_close(both[0, :3], alone[0], atol=1e-5, rtol=0)


def test_order_of_words_and_case_of_letters(encoder: TextEncoder) -> None:
    with torch.no_grad():
        red, same, swapped = (encoder.encode([t])[0] for t in ("red house", "Red HOUSE", "house red"))
    assert torch.equal(red, same)
    assert (red.mean(1) - swapped.mean(1)).abs().max() > 1e-3


def test_related_words_share_rows_and_hashes_do_not_change_between_runs() -> None:
    backbone = replace(BACKBONE, text=find_backbone("longtake-world").text)
    rows, _ = tokenize(["island islands mountain"], backbone)
    island, islands, mountain = (set(r.tolist()) - {0} for r in rows[0])
    assert len(island & islands) >= 5
    assert not island & mountain
    assert rows.shape[2] == NUM_FEATURES
    assert rows[0, 0, :3].tolist() == [1495, 637, 2358]  # blake2b, not Python's own seeded hash


def test_folded_padding_weighs_as_much_as_all_of_it() -> None:
    text = torch.randn(3, 6, 4) * (torch.arange(6)[None, :, None] < torch.tensor([2, 6, 0])[:, None, None])
    folded, log_mass = fold_padding(EncodedText(text, torch.tensor([2, 6, 0])), text_tokens=6)
    assert folded.shape == (3, 7, 4)
    torch.testing.assert_close(log_mass.exp().sum(1), torch.full((3,), 6.0))
    torch.testing.assert_close(log_mass.exp()[0], torch.tensor([1.0, 1, 4, 0, 0, 0, 0]))
    assert log_mass[1, 6] == -torch.inf
