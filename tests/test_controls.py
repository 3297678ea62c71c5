"""bench/controls.py: what is played against a trained workflow."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

import baselines
import train
from graph import Graph
from rewards import grade
from tasks import toy_tasks
from world import World, load_tasks, ood_toys

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import controls

WORDS = ["--seed", "0", "--eval-tasks", "2"]
FLAGS: argparse.Namespace = train.parse_args(WORDS)


def shape(text: str) -> list[tuple[str, int, int]]:
    return [(stage.kind, len(stage.nodes), stage.count) for stage in Graph.from_text(text).stages]


def test_a_shuffle_keeps_the_structure_and_the_operators_and_is_legal() -> None:
    text = "Plan -> [Programmer, Custom] -> Aggregate -> (Verify ? Revise : done) -> (Review -> Revise) * 3 -> Format"
    task, world = toy_tasks("toy_qa", 1, 0)[0], World(FLAGS)
    made = {controls.shuffled(text, task, world, str(seed)) for seed in range(20)}
    assert len(made) == 20
    for other in made:
        assert shape(other) == shape(text)
        assert Counter(Graph.from_text(other).operators()) == Counter(Graph.from_text(text).operators())
        baselines.fixed(other, task, world.new_canvas)  # raises for what the canvas would refuse


@pytest.mark.parametrize("text", ["", "(Verify ? Plan : done)"])
def test_what_has_no_other_order_stays_as_it_is(text: str) -> None:
    assert controls.shuffled(text, toy_tasks("toy_qa", 1, 0)[0], World(FLAGS), "0") == text


def test_controls_are_played_once_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture) -> None:
    tasks, world = load_tasks(FLAGS)[1] + ood_toys(FLAGS), World(FLAGS)
    tasks = [task for task in tasks if task.source in ("toy_math", "toy_open_qa")]
    text = "Decompose -> Custom -> Format"
    right = {task.id: baselines.score_workflow(text, task, world.new_canvas, grade) for task in tasks}
    records = [{"task_id": t.id, "source": t.source, "score": 1.0, "workflow": text, "executor_tokens": 250} for t in tasks]
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "full-0.json").write_text(json.dumps({"seed": 0, "flags": WORDS, "versions": {}, "records": records}))
    monkeypatch.setattr(sys, "argv", ["controls.py", "--trained", str(tmp_path / "trained"), "--results", str(tmp_path / "c")])
    controls.main()
    found = json.loads((tmp_path / "c" / "full-0.json").read_text())["records"]
    assert {r["task_id"]: r["score"] for r in found["default-prompts"]} == right
    assert all(0 < r["executor_tokens"] <= 250 for r in found["equal-tokens"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| default-prompts"))
    difference = 1 - sum(right[t.id] for t in tasks if t.source == "toy_math") / 2
    assert f"{difference:+.3f} (" in row

    monkeypatch.setattr(controls, "run", lambda *_: pytest.fail("played twice"))
    controls.main()
