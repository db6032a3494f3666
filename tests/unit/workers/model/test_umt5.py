"""The text encoder: prompts cleaned as published, rows behind a prompt zero, weights that rest between calls."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.wan_files import TINY, scramble, write_tokenizer
from workers.errors import CheckpointMismatch, ConfigUnsupported
from workers.model import umt5
from workers.model.text_encoder import fold_padding
from workers.model.umt5 import Umt5Encoder, clean_prompt, import_library, make_umt5, open_tokenizer

CPU = torch.device("cpu")
NUM_ROWS = TINY.text_tokens
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("tokenizer") / "umt5"
    write_tokenizer(folder)
    return open_tokenizer(folder)


def make_encoder(tokenizer: object, *, is_resting: bool = False) -> Umt5Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        module = make_umt5(TINY).eval().requires_grad_(False)
        scramble(module)
    return Umt5Encoder(module, tokenizer, NUM_ROWS, CPU, is_resting=is_resting)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a red\n\thouse  ", "a red house"),
        ("tea &amp;amp; cake", "tea & cake"),
        ("the cafÃ©", "the café"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("Keeps Capitals", "Keeps Capitals"),
        ("一只猫", "一只猫"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(text: str, expected: str) -> None:
    assert clean_prompt(text) == expected


@given(st.text(max_size=60))
def test_a_clean_prompt_has_single_spaces_only(text: str) -> None:
    clean = clean_prompt(text)
    assert clean == " ".join(clean.split())


def test_rows_equal_those_of_a_call_padded_to_the_full_length(tokenizer: object) -> None:
    """The published code pads to all rows, masks, and zeroes what is behind the prompt."""
    encoder = make_encoder(tokenizer)
    text = "the camera flies over a red house"
    encoded = encoder.encode([text])
    ids = encoder.tokenize(text)[None]
    num = ids.shape[1]
    assert (num, encoded.num_tokens_B.tolist()) == (8, [8])  # seven words and the end mark
    assert ids[0, -1] == 1
    padded = torch.nn.functional.pad(ids, (0, NUM_ROWS - num))
    mask = torch.nn.functional.pad(torch.ones(1, num, dtype=torch.int64), (0, NUM_ROWS - num))
    full = encoder.module(input_ids=padded, attention_mask=mask).last_hidden_state * mask[..., None]
    torch.testing.assert_close(encoded.text_BPE, full[:, :num], atol=1e-5, rtol=1e-5)
    folded = fold_padding(encoded, NUM_ROWS)
    assert folded.log_mass_BP[0, num].exp().item() == pytest.approx(NUM_ROWS - num)


def test_prompts_of_a_batch_do_not_see_one_another(tokenizer: object) -> None:
    encoder = make_encoder(tokenizer)
    both = encoder.encode(["a river", "the camera flies over the green hill"])
    alone = encoder.encode(["a river"])
    assert both.num_tokens_B.tolist() == [3, 8]
    torch.testing.assert_close(both.text_BPE[:1, :3], alone.text_BPE, atol=1e-5, rtol=1e-5)
    assert not both.text_BPE[0, 3:].any()


def test_a_prompt_is_encoded_once_while_it_is_remembered(tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(tokenizer)
    calls: list[int] = []
    encoder.module.encoder.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    first = encoder.encode(["a river"]).text_BPE
    both = encoder.encode(["a red house", "a river"])
    assert len(calls) == 2
    assert both.num_tokens_B.tolist() == [4, 3]
    assert torch.equal(both.text_BPE[1, :3], first[0])  # to the last bit, whatever stands beside it
    monkeypatch.setattr(umt5, "REMEMBERED_PROMPTS", 2)
    encoder.encode(["a green hill"])  # forgets the red house, which was used before the river
    encoder.encode(["a river"])
    assert len(calls) == 3
    encoder.encode(["a red house"])
    assert len(calls) == 4


def test_prompts_that_were_read_ahead_are_not_read_again(tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umt5, "READ_AHEAD", 2)
    encoder = make_encoder(tokenizer, is_resting=True)
    calls: list[int] = []
    encoder.module.encoder.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    texts = ["a river", "a red house", "a green hill"]
    encoder.read_ahead(texts)
    assert len(calls) == 2  # the last one would drive out what another take needs
    rows = [encoder.encode([text]).text_BPE for text in texts]
    assert len(calls) == 3
    alone = make_encoder(tokenizer)
    assert all(torch.equal(row, alone.encode([text]).text_BPE) for row, text in zip(rows, texts, strict=True))


def test_who_asks_for_a_remembered_prompt_does_not_wait_for_one_that_is_read(tokenizer: object) -> None:
    encoder = make_encoder(tokenizer, is_resting=True)
    encoder.encode(["a river"])
    is_reading, may_go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        is_reading.set()
        assert may_go_on.wait(PATIENCE_S)

    handle = encoder.module.encoder.block[0].register_forward_hook(hold)  # type: ignore[union-attr,operator]
    with ThreadPoolExecutor(2) as pool:
        try:
            ahead = pool.submit(encoder.read_ahead, ["a red house"])
            assert is_reading.wait(PATIENCE_S)
            handle.remove()
            assert encoder.encode(["a river"]).num_tokens_B.tolist() == [3]
            other = pool.submit(encoder.encode, ["a green hill"])  # whose weights are abroad
            assert not ahead.done()
            assert not other.done()
        finally:
            may_go_on.set()
        ahead.result(PATIENCE_S)
        green = other.result(PATIENCE_S).text_BPE
    assert torch.equal(green, make_encoder(tokenizer).encode(["a green hill"]).text_BPE)


def test_a_long_prompt_is_cut_and_an_empty_one_is_its_end_mark(tokenizer: object) -> None:
    encoder = make_encoder(tokenizer)
    assert encoder.encode(["river " * 100]).num_tokens_B.tolist() == [NUM_ROWS]
    assert encoder.encode([""]).num_tokens_B.tolist() == [1]


def test_resting_weights_visit_one_layer_at_a_time_and_change_nothing(tokenizer: object) -> None:
    plain, resting = make_encoder(tokenizer), make_encoder(tokenizer, is_resting=True)
    before = dict(resting.module.named_parameters())
    abroad: list[set[str]] = []

    def look(*_: object) -> None:
        now = dict(resting.module.named_parameters())
        abroad.append({name.split(".layer.")[0] for name, p in now.items() if p is not before[name]})

    for layer in resting.module.encoder.block:  # type: ignore[union-attr]
        layer.layer[0].register_forward_hook(look)
    text = ["a green hill & the river"]
    assert torch.equal(resting.encode(text).text_BPE, plain.encode(text).text_BPE)
    assert abroad == [{"encoder.block.0"}, {"encoder.block.1"}]
    after = dict(resting.module.named_parameters())
    assert all(after[name] is p for name, p in before.items())


def test_the_tokenizer_is_the_file_s_own_whatever_class_is_named_beside_it(tmp_path: Path) -> None:
    """transformers' T5Tokenizer would read unknown letters as <unk> and leave full-width ones as they are."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁red", "▁house"]
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    encoder = make_encoder(open_tokenizer(tmp_path))
    ids = encoder.tokenize(" ｒｅｄ 猫  house").tolist()
    assert [pieces[i] for i in ids] == ["▁red", "▁", "<0xE7>", "<0x8C>", "<0xAB>", "▁house", "</s>"]
    assert encoder.tokenize("red " * 100).tolist() == [pieces.index("▁red")] * (NUM_ROWS - 1) + [1]


def test_a_folder_without_tokenizer_and_a_missing_package_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"no tokenizer .*expected tokenizer\.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointMismatch, match=r"no tokenizer \(it has no model\)"):
        open_tokenizer(tmp_path)
    with pytest.raises(ConfigUnsupported, match=r"nowhere_at_all: pip install 'longtake\[wan\]'"):
        import_library("nowhere_at_all")
