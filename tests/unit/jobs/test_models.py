"""`longtake models` as a user types it."""

import json
from pathlib import Path

from typer.testing import CliRunner

from jobs.cli import app
from tests.wan_files import write_whole_model


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["models", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_list_says_licences_loudly() -> None:
    code, out, _ = run("list")
    assert code == 0
    assert "longtake-world" in out
    assert "ACADEMIC USE ONLY" in out
    names = [card["name"] for card in json.loads(run("list", "--json")[1])["models"]]
    assert "wan2.1-t2v-1.3b" in names
    assert not any(name.endswith("-test") for name in names)
    assert "base only" in next(line for line in out.splitlines() if line.startswith("wan2.1-i2v-14b"))


def test_show_says_what_is_needed_and_what_a_take_costs() -> None:
    code, out, _ = run("show", "self-forcing-1.3b", "--gpu", "h100", "--frames", "81")
    assert code == 0
    for words in ("1,418,996,800 parameters", "hf download gdhe17/Self-Forcing", "H100 SXM: fits", "assumed, not"):
        assert words in out
    found = json.loads(run("show", "self-forcing-1.3b", "--gpu", "h100", "--json")[1])
    assert found["estimate"]["num_frames"] == 501
    code, out, _ = run("show", "wan2.1-i2v-14b", "--gpu", "h100")
    assert (code, "not rendered with by itself" in out, "a take of" in out) == (0, True, False)
    assert "less than a second of arithmetic" in run("show", "longtake-world", "--gpu", "h100")[1]
    code, _, err = run("show", "wan3")
    assert (code, "unknown model 'wan3'" in err) == (2, True)
    code, _, err = run("show", "wan2.1-t2v-14b", "--width", "500")
    assert (code, "do not divide" in err) == (2, True)


def test_check_exits_by_what_is_there(tmp_path: Path) -> None:
    folder = write_whole_model(tmp_path / "w")
    code, out, _ = run("check", str(folder))
    assert code == 0
    assert "tiny-wan-test" in out
    assert out.splitlines()[-1] == "complete"
    (folder / "Wan2.1_VAE.pth").unlink()
    code, out, _ = run("check", str(folder), "--json")
    assert code == 3
    assert [part["part"] for part in json.loads(out)["parts"] if not part["is_good"]] == ["VAE"]
    code, _, err = run("check", str(tmp_path / "nowhere"))
    assert (code, "nothing there" in err) == (2, True)
