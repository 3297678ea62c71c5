"""bench/tabular.py: softmax tables in the network's place."""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import pytest

import train
from rewards import Grade
from tasks import toy_tasks
from world import World

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import tabular
from tabular import Choice, Editor, Tables

FLAGS: argparse.Namespace = train.parse_args(["--seed", "0"])


def objective(tables: Tables, episodes: list[tuple[list[Choice], float]]) -> float:
    """Mean over episodes of advantage * log-probability."""
    logs = [a * math.log(tables.probabilities(c.key, c.n)[c.chosen]) for choices, a in episodes for c in choices]
    return sum(logs) / len(episodes)


def test_a_step_is_along_the_gradient_of_mean_advantage_times_log_probability() -> None:
    tables = Tables()
    tables.logits = {("a",): [0.5, -0.3, 0.1], ("b",): [1.0, 0.0]}
    episodes = [([Choice(("a",), 0, 3), Choice(("b",), 1, 2)], 1.5), ([Choice(("a",), 2, 3), Choice(("a",), 0, 3)], -0.5)]
    before = {key: list(row) for key, row in tables.logits.items()}
    numeric = {}
    for key, row in before.items():
        for i in range(len(row)):
            sides = []
            for h in (1e-5, -1e-5):
                tables.logits[key][i] = before[key][i] + h
                sides.append(objective(tables, episodes))
                tables.logits[key][i] = before[key][i]
            numeric[key, i] = (sides[0] - sides[1]) / 2e-5
    tables.ascend(episodes, lr=0.1)
    for (key, i), slope in numeric.items():
        assert tables.logits[key][i] - before[key][i] == pytest.approx(0.1 * slope, abs=1e-8)


def test_every_episode_of_the_tables_is_accepted_finishes_in_time_and_has_solved() -> None:
    world, tables, rng = World(FLAGS), Tables(), random.Random(0)
    for task in [*toy_tasks("toy_math", 60, 0), *toy_tasks("toy_qa", 60, 0)]:
        canvas = tabular.play(task, Editor(tables, rng), world)  # an edit that is refused fails in there
        assert canvas.turn <= FLAGS.max_turns
        assert {"Programmer", "Custom", "AnswerGenerate"} & set(canvas.graph.operators())
        assert not canvas._missing_for_finish()


@pytest.mark.parametrize(("setting", "share"), [("plain", 1 / 3), ("kinds", 1.0)])
def test_tables_learn_what_is_rewarded_and_the_kind_of_task_only_where_they_are_by_kind(
        setting: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = {"math": "Verify", "qa": "Review", "code": "Test"}

    def fits(canvas: object, *_: object) -> Grade:
        used = {"Verify", "Review", "Test"} & set(canvas.graph.operators())
        return Grade(*[float(used == {checker[canvas.task.kind]})] * 3)

    monkeypatch.setattr(tabular, "graded", fits)
    result = tabular.run(setting, 0, lr=40.0, steps=15, eval_tasks=8)
    assert result["trajectories"] == 15 * 54
    found = sum(result["scores"]) / 24
    assert found > 0.6 if share == 1 else found < 0.45, found


def test_eight_executions_are_asked_of_executors_of_other_seeds() -> None:
    task, world = toy_tasks("toy_math", 1, 0)[0], World(FLAGS)
    canvas = tabular.play(task, Editor(Tables(), random.Random(1)), world)
    eight = tabular.score(canvas, 8, seed=0).score
    assert 8 * eight in range(1, 8)  # some of the eight are right and some wrong, so they are not all the same one
    assert {tabular.score(canvas, 8, seed=n).score for n in range(1, 5)} != {eight}
    assert tabular.score(canvas, 1, seed=5) == tabular.graded(canvas)


def test_a_run_is_made_once_and_tabled_beside_the_best_reachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "reachable-3.json").write_text(json.dumps({"accuracy": 0.8}))
    monkeypatch.setattr(tabular, "REACHABLE", tmp_path / "best")
    words = ["tabular.py", "--settings", "plain", "--seeds", "3", "4", "--steps", "1", "--eval-tasks", "2",
             "--results", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", words)
    tabular.main()
    first = capsys.readouterr().out
    scores = [json.loads((tmp_path / "made" / f"plain-12-{seed}.json").read_text())["scores"] for seed in (3, 4)]
    means = [sum(row) / len(row) for row in scores]
    assert f"| {sum(means) / 2:.3f} ± " in first
    assert f"| 3: {means[0] / 0.8:.2f}, 4: not computed " in first
    monkeypatch.setattr(tabular, "run", None)  # whatever is made again fails
    tabular.main()
    assert capsys.readouterr().out == first
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "2"])
    with pytest.raises(ValueError, match="made with --steps 1 --eval-tasks 2"):
        tabular.main()
