"""Prompt lists: what is read, what is quarantined with which line, and what ends in an error."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.errors import PromptsError
from jobs.prompt_row import Prompt, Rejected
from jobs.prompts import PromptSource, read_prompts, scan_prompts
from jobs.shards import TaskDefaults, tasks_of
from workers.task import segments_of

DEFAULTS = TaskDefaults(seed=1, samples=2, num_frames=96)


def read(path: Path, data: str | bytes | list[object], name: str) -> list[Prompt | Rejected]:
    file = path / name
    if isinstance(data, list):
        data = "\n".join(json.dumps(row) for row in data)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_prompts(PromptSource(str(file))))


def only(rows: list[Prompt | Rejected]) -> Prompt | Rejected:
    assert len(rows) == 1
    return rows[0]


def test_txt_with_bom_crlf_and_blank_lines_keeps_physical_line_numbers(tmp_path: Path) -> None:
    rows = read(tmp_path, b"\xef\xbb\xbfa meadow\r\n\r\n  a desert \r\n", "p.txt")
    assert [(r.line, r.text) for r in rows if isinstance(r, Prompt)] == [(1, "a meadow"), (3, "a desert")]


def test_jsonl_columns_and_extras_are_carried(tmp_path: Path) -> None:
    row = only(
        read(
            tmp_path,
            [
                {
                    "prompt": [{"frame": 0, "prompt": "a"}, {"frame": 40, "prompt": "b"}],
                    "id": "x_1",
                    "seed": 5,
                    "samples": 3,
                    "frames": 80,
                    "negative_prompt": "blur",
                    "mood": "calm",
                    "tags": ["a", 1],
                    "score": 0.5,
                }
            ],
            "p.jsonl",
        )
    )
    assert isinstance(row, Prompt)
    assert (row.item_id, row.seed, row.samples, row.num_frames, row.negative_prompt) == ("x_1", 5, 3, 80, "blur")
    assert [s.frame for s in row.segments] == [0, 40]
    assert row.extra == {"mood": "calm", "tags": '["a",1]', "score": 0.5}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt": " \t"}, "empty_prompt"),
        ({"id": "a"}, "empty_prompt"),
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": 7}, "wrong_type"),
        ({"prompt": {"frame": 0}}, "wrong_type"),
        ({"prompt": ["a"]}, "wrong_type"),
        ({"prompt": [{"frame": 0, "prompt": "a", "x": 1}]}, "wrong_type"),
        ({"prompt": [{"frame": True, "prompt": "a"}]}, "wrong_type"),
        ({"prompt": [{"frame": 3, "prompt": "a"}]}, "bad_value"),
        ({"prompt": [{"frame": 0, "prompt": "a"}, {"frame": 0, "prompt": "b"}]}, "bad_value"),
        ({"prompt": "x" * 20_001}, "prompt_too_long"),
        ({"prompt": "a\x00b"}, "bad_value"),
        ({"prompt": "a\ud800b"}, "bad_value"),
        ({"prompt": "a", "id": "../../etc"}, "bad_id"),
        ({"prompt": "a", "id": "a.b"}, "bad_id"),
        ({"prompt": "a", "id": "a\nb"}, "bad_id"),
        ({"prompt": "a", "id": "a\n"}, "bad_id"),
        ({"prompt": "a", "id": "_a"}, "bad_id"),
        ({"prompt": "a", "id": "nul"}, "bad_id"),
        ({"prompt": "a", "id": "\U0001f600" * 1024}, "bad_id"),
        ({"prompt": "a", "id": 1.5}, "wrong_type"),
        ({"prompt": "a", "id": True}, "wrong_type"),
        ({"prompt": "a", "seed": "one"}, "wrong_type"),
        ({"prompt": "a", "seed": -1}, "bad_value"),
        ({"prompt": "a", "samples": 0}, "bad_value"),
        ({"prompt": "a", "frames": 10**9}, "bad_value"),
        ({"prompt": "a", "negative_prompt": 3}, "wrong_type"),
        ({"prompt": "a", "note": "x" * 70_000}, "row_too_long"),
        (["a"], "wrong_type"),
    ],
)
def test_a_bad_row_is_rejected_with_its_line_and_the_next_row_is_read(tmp_path: Path, row: object, kind: str) -> None:
    rejected, good = read(tmp_path, [row, {"prompt": "good"}], "p.jsonl")
    assert isinstance(rejected, Rejected)
    assert (rejected.line, rejected.kind) == (1, kind)
    assert rejected.reason
    assert isinstance(good, Prompt)


def test_broken_json_bad_utf8_and_double_fields_cost_their_line_only(tmp_path: Path) -> None:
    data = b'{"prompt": "a"\n{"prompt": "\xff"}\n{"prompt": "a", "prompt": "b"}\n' + b"[" * 5000 + b'\n{"prompt": "ok"}'
    rows = read(tmp_path, data, "p.jsonl")
    assert [(r.line, r.kind if isinstance(r, Rejected) else "") for r in rows] == [
        (1, "bad_json"),
        (2, "bad_utf8"),
        (3, "bad_json"),
        (4, "bad_json"),
        (5, ""),
    ]


def test_a_line_longer_than_memory_allows_is_passed_over(tmp_path: Path) -> None:
    rows = read(tmp_path, b"x" * (5 << 20) + b"\nshort\n", "p.txt")
    assert isinstance(rows[0], Rejected)
    assert rows[0].kind == "row_too_long"
    assert isinstance(rows[1], Prompt)
    assert rows[1].line == 2


def test_second_row_of_an_id_is_rejected(tmp_path: Path) -> None:
    rows = read(
        tmp_path, [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}, {"id": "b", "prompt": "x"}], "p.jsonl"
    )
    assert [r.kind for r in rows if isinstance(r, Rejected)] == ["duplicate_id"]
    same = read(tmp_path, "one\ntwo\none\n", "p.txt")
    assert isinstance(same[2], Rejected)
    assert "samples" in same[2].reason


def test_a_control_folder_is_part_of_the_task_and_of_the_manifest(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        [
            {"prompt": "a valley", "control": "/clips/valley"},
            {"prompt": "a valley", "control": "/clips/hill"},
            {"prompt": "a valley"},
            {"prompt": "a valley", "control": "clips/valley"},
            {"prompt": "a valley", "control": 7},
        ],
        "p.jsonl",
    )
    good = [row for row in rows if isinstance(row, Prompt)]
    assert [row.control for row in good] == ["/clips/valley", "/clips/hill", None]
    assert len({row.item_id for row in good}) == 3
    (task,) = tasks_of(good[0], TaskDefaults(seed=1, samples=1, num_frames=81))
    assert task.attempt("e1a1").control == task.extra["control"] == "/clips/valley"
    bad = [row for row in rows if isinstance(row, Rejected)]
    assert [row.kind for row in bad] == ["bad_value", "wrong_type"]
    assert "control must be an absolute path, not 'clips/valley'" in bad[0].reason


def test_content_id_is_the_same_in_every_format_and_ignores_extra_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a meadow"], "theme": ["x"]}), tmp_path / "p.parquet")
    ids = {
        only(read(tmp_path, "a meadow\n", "p.txt")).item_id,
        only(read(tmp_path, "theme,prompt\ny,a meadow\n", "p.csv")).item_id,
        only(read(tmp_path, [{"prompt": "a meadow", "samples": 4}], "p.jsonl")).item_id,
        only(list(read_prompts(PromptSource(str(tmp_path / "p.parquet"))))).item_id,
    }
    assert len(ids) == 1


def test_csv_quotes_newlines_segments_and_numbers(tmp_path: Path) -> None:
    text = 'id,prompt,seed,note\r\na,"two\r\nlines, ""quoted""",7,\r\nb,"[{""frame"":0,""prompt"":""x""}]",,n\r\n'
    first, second = read(tmp_path, text, "p.csv")
    assert isinstance(first, Prompt)
    assert isinstance(second, Prompt)
    assert (first.line, first.seed, first.text) == (2, 7, 'two\nlines, "quoted"')
    assert (second.line, second.seed, second.text, second.extra) == (4, None, "x", {"note": "n"})


def test_csv_quote_that_is_never_closed_costs_one_line(tmp_path: Path) -> None:
    text = 'id,prompt\na,"lost\nb,fine\nc,"also ""fine"""\nd,too,many\ne,last\n'
    rows = read(tmp_path, text, "p.csv")
    assert [(r.line, r.item_id if isinstance(r, Prompt) else r.kind) for r in rows] == [
        (2, "bad_csv"),
        (3, "b"),
        (4, "c"),
        (5, "bad_csv"),
        (6, "e"),
    ]


def test_parquet_struct_prompts_and_integer_ids(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("frame", pa.int64()), ("prompt", pa.string())]))
    prompts = pa.array([[{"frame": 0, "prompt": "x"}], None], type=kind)
    pq.write_table(pa.table({"prompt": prompts, "id": [17, 18], "seed": [1.0, None]}), tmp_path / "p.parquet")
    good, bad = read_prompts(PromptSource(str(tmp_path / "p.parquet")))
    assert isinstance(good, Prompt)
    assert (good.item_id, good.seed) == ("17", 1)
    assert isinstance(bad, Rejected)
    assert (bad.line, bad.kind) == (2, "empty_prompt")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("missing.txt", None, "no such file"),
        ("p.docx", b"x", "--prompts-format"),
        ("p.txt", "x".encode("utf-16"), "UTF-16"),
        ("p.txt", b"", "no usable prompt"),
        ("p.jsonl", b'{"prompt": ""}\n', "line 1: prompt is empty"),
        ("p.jsonl", b'{"text": "a", "id": "b"}\n', "line 1: prompt is missing (found: text, id)"),
        ("p.csv", b"id,promt\na,b\n", "rename 'promt'"),
        ("p.csv", b"prompt,prompt\na,b\n", "stands twice"),
        ("p.csv", b"id;prompt\na;b\n", "separated by commas"),
        ("p.parquet", b"PAR1 not really", "cannot be read as Parquet"),
    ],
)
def test_a_useless_file_is_an_error_that_names_it(tmp_path: Path, name: str, data: bytes | None, words: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptsError) as caught:
        scan_prompts(PromptSource(str(tmp_path / name)), DEFAULTS)
    assert name in str(caught.value)
    assert words in str(caught.value)


def test_parquet_with_numbers_for_prompts_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "p.parquet")
    with pytest.raises(PromptsError, match="type int64"):
        scan_prompts(PromptSource(str(tmp_path / "p.parquet")), DEFAULTS)


def test_scan_counts_and_settles_one_type_per_extra_column(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "x": 1, "y": 1, "z": True, "n": None},
        {"prompt": "b", "x": 1.5, "y": "s", "frames": 10, "samples": 1},
        {"prompt": ""},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows))
    scan = scan_prompts(PromptSource(str(file)), DEFAULTS)
    assert (scan.num_rows, scan.num_items, scan.num_tasks, scan.num_frames) == (3, 2, 3, 2 * 96 + 10)
    assert scan.columns == {"x": "float64", "y": "string", "z": "bool", "n": "string"}
    assert scan.rejected == {"empty_prompt": 1}


def test_the_sample_prompts_are_good(tmp_path: Path) -> None:
    sample = Path(__file__).parents[3] / "jobs" / "samples" / "prompts.jsonl"
    scan = scan_prompts(PromptSource(str(sample)), DEFAULTS)
    assert (scan.num_items, scan.num_rejected) == (12, 0)


@pytest.mark.parametrize(
    "prompt",
    [
        "a meadow",
        '[{"frame":0,"prompt":"a text that looks like segments"}]',
        [{"frame": 0, "prompt": "a"}, {"frame": 9, "prompt": "b"}],
    ],
)
def test_the_manifests_prompt_column_leads_back_to_the_segments(tmp_path: Path, prompt: object) -> None:
    row = only(read(tmp_path, [{"prompt": prompt}], "p.jsonl"))
    assert isinstance(row, Prompt)
    assert segments_of(row.text) == row.segments
