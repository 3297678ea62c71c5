"""The random editor, and the searches that tell how good a policy could be."""

import random
from types import SimpleNamespace

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


def test_a_random_editor_makes_legal_edits_only() -> None:
    for seed in range(200):
        canvas, rng = new_canvas(toy_tasks("toy_qa", 1, seed)[0]), random.Random(seed)
        canvas.run_graph = lambda: None
        while not canvas.done:
            text = baselines.random_edit(canvas, rng)
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
