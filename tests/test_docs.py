"""What the documents claim about the code, held against the code."""

import ast
import re
from pathlib import Path

import pytest
from test_determinism import generous

import train

ROOT = Path(__file__).parent.parent


def test_the_walkthrough_is_written_by_its_script_and_its_numbers_agree(tiny_model: Path, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """With another policy, read generously: the same headings; the loss in a loop equals the trained one (asserted there), the
    gradient too."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.setattr("canvas.parse_edit", generous)       # else it takes many tasks until two rewards differ
    import walkthrough

    walkthrough.main(["--model", str(tiny_model), "--out", str(tmp_path / "w.md")])
    written, kept = (tmp_path / "w.md").read_text(), (ROOT / "docs/WALKTHROUGH.md").read_text()
    assert re.findall("^#.*", written, re.MULTILINE) == re.findall("^#.*", kept, re.MULTILINE)
    for text in (written, kept):
        autograd, moved = map(float, re.search(r"(\S+) by autograd, (\S+) by moving", text).groups())
        assert autograd == pytest.approx(moved, rel=0.02, abs=1e-7)
        advantages = [float(row.split("|")[-2]) for row in re.findall(r"^\| \d+ \| `.*", text, re.MULTILINE)]
        assert len(advantages) == 6
        assert sum(advantages) == pytest.approx(0, abs=0.01)


def test_every_place_in_the_equation_map_exists_and_cites_its_equation() -> None:
    rows = re.findall(r"^\| (Eq\. [\d-]+|.*) \| .* \| `(\w+\.py):([\w.]+)` \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 8
    for equation, file, name in rows:
        node = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            found = [child for child in node.body if getattr(child, "name", "") == part]
            assert found, f"{file} has no {name}"
            node = found[0]
        assert equation.startswith("Eq.") <= (equation in ast.get_docstring(node)), f"{file}:{name} does not cite {equation}"


def test_the_file_table_names_every_file_with_about_its_lines() -> None:
    rows = re.findall(r"^\| (`\w+\.py`.*?) \| .* \| (\d+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = [re.findall(r"`(\w+\.py)`", files) for files, _ in rows]
    assert sorted(file for files in named for file in files) == sorted(path.name for path in ROOT.glob("*.py"))
    for files, (_, lines) in zip(named, rows, strict=True):
        assert sum(len((ROOT / file).read_text().splitlines()) for file in files) == pytest.approx(int(lines), rel=0.1), files


def test_the_table_of_flags_is_what_train_py_prints(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train.parse_args(["--help-markdown"])
    printed = capsys.readouterr().out
    assert (ROOT / "docs/FLAGS.md").read_text().endswith(printed), "python train.py --help-markdown, into docs/FLAGS.md"
    assert 70 < printed.count("\n| `--") <= 78
