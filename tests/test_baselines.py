"""The random editor, and the searches that tell how good a policy could be."""

import random
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import baselines
import operators
from backends import SimulatedBackend
from canvas import Canvas, CanvasConfig
from graph import Graph
from rewards import grade
from tasks import Task, toy_tasks

LIBRARY = operators.library()


def new_canvas(task: Task) -> Canvas:
    return Canvas(task, LIBRARY, SimulatedBackend(0), CanvasConfig(max_turns=8))


def no_grader(task: Task, answer: str) -> SimpleNamespace:
    return SimpleNamespace(score=float(answer == "right"), error="")


class Known:
    """A canvas whose answer is right iff its workflow is the one that the task names in its problem."""

    def __init__(self, task: Task) -> None:
        self.task, self.graph = task, Graph()

    def run_graph(self) -> None:
        self.answer = "right" if self.graph.to_text() == self.task.problem else "wrong"


@pytest.mark.parametrize("editor", [baselines.random_edit, baselines.ordered_edit])
def test_an_editor_makes_legal_edits_only(editor: Callable[[Canvas, random.Random], str]) -> None:
    for seed in range(200):
        canvas, rng = new_canvas(toy_tasks("toy_qa", 1, seed)[0]), random.Random(seed)
        canvas.run_graph = lambda: None
        while not canvas.done:
            text = editor(canvas, rng)
            assert canvas.step(text).ok, text


def test_every_kind_of_edit_is_drawn() -> None:
    seen = set()
    for seed in range(100):
        canvas, rng = new_canvas(toy_tasks("toy_qa", 1, 0)[0]), random.Random(seed)
        canvas.run_graph = lambda: None
        while not canvas.done:
            text = baselines.random_edit(canvas, rng)
            seen |= {word for word in ("delete", "modify", "set_prompt", "finish", "parallel", "conditional", "loop",
                                       "<position>", "<false>") if word in text}
            canvas.step(text)
    assert len(seen) == 9, seen


def ordered(seed: int, max_turns: int) -> Graph:
    """The workflow that an ordered editor finishes in time."""
    canvas, rng = Canvas(toy_tasks("toy_qa", 1, 0)[0], LIBRARY, SimulatedBackend(0), CanvasConfig(max_turns)), random.Random(seed)
    canvas.run_graph = lambda: None
    while not canvas.done:
        feedback = canvas.step(baselines.ordered_edit(canvas, rng))
    assert feedback.stop_reason == "finished", feedback
    return canvas.graph


@pytest.mark.parametrize("max_turns", [3, 4, 8, 12])
def test_an_ordered_editor_formats_and_finishes_in_time(max_turns: int) -> None:
    for seed in range(200):
        roles = [LIBRARY[name].role for name in ordered(seed, max_turns).operators()]
        assert roles[-1] == "format", roles
        assert "solve" in roles, roles


def test_its_changes_keep_the_order_of_the_roles() -> None:
    order = ["plan", "solve", "ensemble", "check", "revise", "format"]
    steps = {"check": "revise"}  # which take turns
    for seed in range(200):
        roles = [LIBRARY[name].role for name in ordered(seed, 12).operators()]
        places = [order.index(steps.get(role, role)) for role in roles]
        assert places == sorted(places), roles


def test_an_ordered_editor_plans_once_by_each_operator_and_loops_more_than_once() -> None:
    texts = [ordered(seed, 12).to_text() for seed in range(300)]
    assert {int(n) for text in texts for n in re.findall(r"\* (\d+)", text)} == set(range(2, 10))
    assert any("Plan -> Decompose" in text for text in texts)
    assert any("Decompose -> Plan" in text for text in texts)
    assert any(re.search(r"\[\w+, \w+, \w+\] -> (Aggregate|ScEnsemble)", text) for text in texts)


def every_order(turns: int) -> list[tuple[str, ...]]:
    """Brute force: all sequences of at most so many steps that the table allows, with two operators that plan."""
    found, begun = [], [()]
    while begun:
        steps = begun.pop()
        if steps and steps[-1] == "finish":
            found.append(steps)
        elif len(steps) < turns:
            begun += [(*steps, step) for step in baselines.ORDER[steps[-1] if steps else ""]]
    return [steps for steps in found if steps.count("plan") <= 2]


@pytest.mark.parametrize("turns", [2, 3, 4, 8, 12])
def test_orders_are_counted_as_by_brute_force(turns: int) -> None:
    for first in baselines.ORDER[""]:
        assert baselines.orders(first, turns, 2) == sum(steps[0] == first for steps in every_order(turns))


def test_every_order_that_fits_is_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four turns have room for four: solve, solve and repair, plan and solve, parallel and ensemble; then format, finish."""
    monkeypatch.setattr(baselines, "SLIPS", 0.0)
    roles = Counter(tuple(sorted({LIBRARY[name].role.replace("revise", "check") for name in ordered(seed, 4).operators()}))
                    for seed in range(800))
    assert len(roles) == 4
    assert all(abs(n - 200) < 4 * (800 * 0.25 * 0.75) ** 0.5 for n in roles.values()), roles


def test_the_search_finds_the_workflow_that_is_right() -> None:
    wanted = "Decompose -> AnswerGenerate -> (Review -> Revise) * 8 -> Format"
    tasks = [Task(f"t{i}", "nq", "qa", wanted, ("right",)) for i in range(12)]
    row, = baselines.best_reachable(tasks, tasks, Known, no_grader, max_turns=4)
    assert (row["workflow"], row["accuracy"], row["tasks"]) == (wanted, 1.0, 12)
    row, = baselines.best_reachable(tasks, tasks, Known, no_grader, max_turns=3)
    assert row["accuracy"] == 0                     # four stages are out of reach in three turns


def test_a_score_is_the_grade_of_the_workflows_answer() -> None:
    """Programmer alone is right on some toy_math tasks and wrong on others, by the seed alone."""
    tasks = toy_tasks("toy_math", 12, 0)
    scores = [baselines.score_workflow("Programmer", task, new_canvas, grade) for task in tasks]
    assert scores == [baselines.score_workflow("Programmer", task, new_canvas, grade) for task in tasks]
    assert set(scores) == {0.0, 1.0}


def test_the_best_workflow_differs_between_kinds() -> None:
    """What helps is in the world, not in the reward: programs for math, reading for questions."""
    def mean(source: str, workflow: str) -> float:
        tasks = toy_tasks(source, 60, 0)
        return sum(baselines.score_workflow(workflow, task, new_canvas, grade) for task in tasks) / len(tasks)

    math = "Programmer -> (Verify -> Revise) * 3 -> Format"
    reading = "Decompose -> AnswerGenerate -> (Review -> Revise) * 3 -> Format"
    assert mean("toy_math", math) > mean("toy_math", reading) + 0.1
    assert mean("toy_qa", reading) > mean("toy_qa", math) + 0.1
