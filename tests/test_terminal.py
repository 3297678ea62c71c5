"""What a person, a log file and a script see of a run; and the same numbers in TensorBoard and Weights & Biases."""

import fcntl
import io
import json
import os
import pty
import select
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted import add, parallel

import eval as evaluation
import play
import terminal
import trackers
import train
from graph import Graph
from world import World

SMALL = ["--tasks-per-source", "1", "--rollouts-per-task", "2", "--eval-tasks", "2", "--max-turns", "2", "--max-context", "1200"]
LONG = "R 0.57 R_div=1 0.96 acc 0.62 gnorm 0.08 uni 0.11 123456 tok/s " * 2


class Clock:
    """time.monotonic and time.time, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(terminal, "time", clock := Clock())
    return clock


def test_without_a_terminal_a_line_comes_every_few_seconds_and_at_the_end(time: Clock, capsys: pytest.CaptureFixture) -> None:
    with terminal.Progress("playing", 8) as line:
        for _ in range(8):
            time.now += 2
            line.advance(text="fine")
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"playing {done}/8 0:{2 * done:02} fine" for done in (1, 4, 7, 8)]
    assert shown.out == ""


WAITS_FOR_CTRL_C = """
import time, rundir, terminal
rundir.end_on_signals("cut off")
try:
    with terminal.Progress("playing", 8) as line:
        time.sleep(0.2)  # or the bar is not drawn again
        line.advance(2, "R 0.5")
        time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit("interrupted")
"""


def read_until(screen: int, wanted: bytes) -> bytes:
    said = b""
    while wanted not in said:
        assert select.select([screen], [], [], 30)[0], f"{wanted!r} does not come; there is {said!r}"
        said += os.read(screen, 4096)
    return said


@pytest.mark.parametrize(("rows", "columns"), [(24, 80), (0, 0)], ids=["80 columns", "a terminal that knows no size"])
def test_a_bar_is_shown_on_every_terminal_and_ctrl_c_leaves_it_as_it_was(rows: int, columns: int) -> None:
    process, screen = pty.fork()
    if process == 0:
        os.chdir(Path(terminal.__file__).parent)
        os.execv(sys.executable, [sys.executable, "-c", WAITS_FOR_CTRL_C])
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    before = termios.tcgetattr(screen)
    assert b"playing 2/8 |" in read_until(screen, b"R 0.5")
    os.write(screen, b"\x03")
    assert b"Traceback" not in read_until(screen, b"interrupted\r\n")
    assert termios.tcgetattr(screen) == before
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    os.close(screen)


@pytest.mark.parametrize("way", [{"quiet": True}, {"plain": False}])
def test_without_a_terminal_quiet_and_json_show_no_progress(way: dict, capsys: pytest.CaptureFixture) -> None:
    with terminal.Progress("playing", 1, **way) as line:
        line.advance()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("columns", "least"), [("200", 80), ("80", 60)])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_progress_line_fits_100_columns_and_the_terminal(columns: str, least: int, is_terminal: bool,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setenv("COLUMNS", columns)
    with terminal.Progress("training", 40, start=3) as line:
        line.advance(text=LONG)
        line.bar.refresh()
    widths = [len(text.rstrip()) for text in screen.getvalue().replace("\n", "\r").split("\r")]
    assert least < max(widths) <= (min(100, int(columns)) if is_terminal else 100)
    assert "4/40" in screen.getvalue()


def test_a_long_workflow_is_shown_in_lines_that_fit(capsys: pytest.CaptureFixture) -> None:
    workflow = " -> ".join(["(Programmer -> Review) * 2", "[Custom, Custom, AnswerGenerate]"] * 6)
    text = terminal.workflows_text({"math": workflow, "qa": ""})
    assert max(map(len, text.splitlines())) <= 100
    assert " ".join(text.split()) == f"commonest workflow for math: {workflow} commonest workflow for qa: (empty)"


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0:00"), (65, "1:05"), (59.6, "1:00"), (3725, "1:02:05")])
def test_times_read_as_a_clock(seconds: float, said: str) -> None:
    assert terminal.clock(seconds) == said


@pytest.mark.parametrize(("words", "shown"), [([], (False, True)), (["--quiet"], (True, True)), (["--log-json"], (False, False))])
def test_the_flags_decide_what_is_shown(words: list[str], shown: tuple[bool, bool]) -> None:
    chosen = World(train.parse_args(words)).progress.keywords
    assert (chosen["quiet"], chosen["plain"]) == shown


def test_log_json_prints_nothing_but_a_line_a_step_and_the_summary(tmp_path: Path, tiny_model: Path,
                                                                  capsys: pytest.CaptureFixture) -> None:
    train.train(train.parse_args(["--out", str(tmp_path / "run"), "--model", str(tiny_model), "--steps", "2", "--no-baselines",
                                  "--log-json", "--quiet", *SMALL]))
    shown = capsys.readouterr()
    *steps, summary = map(json.loads, shown.out.splitlines())
    assert steps == [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert shown.err == ""
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


def test_an_evaluation_prints_one_object_for_scripts_and_writes_its_page(tmp_path: Path, tiny_model: Path,
                                                                         capsys: pytest.CaptureFixture) -> None:
    evaluation.run(evaluation.parse_args(["--out", str(tmp_path / "e"), "--model", str(tiny_model), "--log-json", "--quiet",
                                          *SMALL[4:]]))
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads((tmp_path / "e" / "eval.json").read_text())
    assert shown.err == ""
    assert (tmp_path / "e" / "report.html").stat().st_size > 10_000


# ---- trackers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_done(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, trackers.MODULES[name], None)  # as if it were not installed
    args = train.parse_args(["--out", str(tmp_path / "run"), f"--{name}"])
    with pytest.raises(trackers.TrackerError, match=f"--{name} needs a package .*: pip install {name}"):
        train.train(args)
    assert not (tmp_path / "run").exists()


def test_trackers_get_the_names_and_numbers_of_metrics_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int) -> None:
            heard.append(("begin", directory, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            heard.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            heard.append("closed")

    run = SimpleNamespace(log=lambda numbers, step: heard.append((numbers, step)), finish=lambda: heard.append("finished"))
    wandb = SimpleNamespace(init=lambda **words: heard.append(words) or run)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracked = trackers.Trackers(tmp_path, {"lr": 0.1}, 7, tensorboard=True, wandb=True)
    tracked.log({"step": 7, "reward": 0.5, "accuracy/toy_qa": 1, "dollars": None})
    tracked.close()
    assert heard == [
        ("begin", str(tmp_path / "tensorboard"), 7),
        {"project": "flowsteer", "name": tmp_path.name, "dir": str(tmp_path), "config": {"lr": 0.1}},
        ("reward", 0.5, 7), ("accuracy/toy_qa", 1, 7), ({"reward": 0.5, "accuracy/toy_qa": 1}, 7), "closed", "finished"]


def test_nothing_is_imported_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in trackers.MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    trackers.require()
    trackers.Trackers(tmp_path, {}, 0, tensorboard=False, wandb=False).log({"step": 0, "reward": 1.0})


# ---- a canvas by hand -------------------------------------------------------------------------------------------------


def test_the_workflow_is_drawn_as_text_with_its_structures_and_what_ran() -> None:
    graph = Graph.from_text("Plan -> [Custom, Programmer, Custom] -> (Verify ? Revise : done) -> (Review -> Revise) * 2")
    assert play.drawing(graph, ran=["n2.2", "n3.1"], failed=["n3.1"]) == """\
  n1 Plan
  ↓
  ┌ n2.1 Custom
  ├ n2.2 Programmer*
  └ n2.3 Custom
  ↓
  ◇ n3.1 Verify!
  ├ problem: n3.2 Revise
  └ fine: done
  ↓
  ↻ up to 2 ×
  │ n4.1 Review
  │ n4.2 Revise"""


def test_a_canvas_played_by_hand_shows_the_drawing_after_every_edit(monkeypatch: pytest.MonkeyPatch,
                                                                    capsys: pytest.CaptureFixture) -> None:
    edits = iter([add("Custom"), parallel("Plan, Custom"), "<action>finish</action>"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(edits))
    play.main([])
    shown = capsys.readouterr().out
    assert "  n1 Custom*\n" in shown
    assert "  n1 Custom\n  ↓\n  ┌ n2.1 Plan*\n  └ n2.2 Custom*\n" in shown
