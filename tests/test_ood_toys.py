"""The toy sources that are never trained on: right answers, graded by their families; and that workflows matter there too."""

import hashlib
import math
import re
from pathlib import Path

import pytest
from test_tasks import write

import baselines
import operators
import sandbox
import toys
from backends import SimulatedBackend
from canvas import Canvas, CanvasConfig
from rewards import grade
from simulated import _wrong_program
from tasks import Task, read_tasks, to_record, toy_tasks


def test_the_training_sources_are_what_they_were_before_there_were_others() -> None:
    made = [(task.problem, task.answers) for source in ("toy_math", "toy_qa", "toy_code") for task in toy_tasks(source, 50, 5)]
    assert hashlib.sha256(repr(made).encode()).hexdigest()[:16] == "34e8888eccc61baf"


@pytest.mark.parametrize(("source", "kind", "levels"), [
    ("toy_aime", "math", {3, 4}), ("toy_mathqa", "choice", {1, 2, 3, 4}), ("toy_open_qa", "qa", {1, 2, 3, 4}),
    ("toy_stdin_code", "code", {1, 2, 3, 4})])
def test_kind_and_level_can_be_read_in_the_text(source: str, kind: str, levels: set[int]) -> None:
    made = toy_tasks(source, 100, 0)
    assert {task.meta["level"] for task in made} == levels
    assert all(task.kind == kind and task.problem.startswith(f"[{kind}, level {task.meta['level']}] ") for task in made)
    assert len({task.problem for task in made}) > 70


def solve_aime(text: str) -> int:
    """Read a toy_aime problem, independently of the way it is made."""
    n = [int(number) for number in re.findall(r"\d+", text.partition("] ")[2])]
    if "remainder" in text:
        return (pow(n[0], n[1], n[3]) + n[2]) % n[3]
    if "divisors" in text:
        return sum((1 if d * d == n[0] else 2) for d in range(1, math.isqrt(n[0]) + 1) if n[0] % d == 0)
    if "multiples" in text:
        return n[0] // n[1] + n[0] // n[2] - n[0] // math.lcm(n[1], n[2])
    if "sum of the digits" in text:
        return sum(int(digit) for digit in str(n[0] ** n[1]))
    if "pairs" in text:
        return sum(n[0] % x == 0 for x in range(1, math.isqrt(n[0] - 1) + 1))
    return sum(sum(map(int, f"{i:04d}")) == n[1] for i in range(1, n[0] + 1))


def test_toy_aime_answers_are_right() -> None:
    made = toy_tasks("toy_aime", 200, 0)
    assert all(int(task.answers[0]) == solve_aime(task.problem) for task in made)
    assert all(0 <= int(task.answers[0]) <= 999 for task in made)


def test_the_right_letter_of_toy_mathqa_stands_before_the_right_value() -> None:
    for task in toy_tasks("toy_mathqa", 200, 0):
        story, options = task.problem.partition("] ")[2].split("Options: ")
        value, *steps = re.split(r"; |, then ", story.split(". How")[0])
        value = int(re.search(r"\d+", value)[0])
        for step in steps:
            n = int(re.search(r"\d+", step)[0])
            value = value * n if "times" in step else value // n if "one part" in step else (
                value - n if "leak" in step or "evaporate" in step else value + n)
        shown = dict(re.findall(r"([a-e])\) (-?\d+)", options))
        assert int(shown.pop(task.answers[0])) == value, task.problem
        assert sorted(shown) == sorted(task.meta["distractors"])


def test_the_open_world_is_one_world() -> None:
    """The same question has the same answer whatever the seed."""
    known: dict[str, str] = {}
    for task in (task for seed in range(8) for task in toy_tasks("toy_open_qa", 150, seed)):
        phrase = re.fullmatch(r"(?:Who is|What is|Name|Do you know) (.+)[?.]", task.problem.partition("] ")[2])[1]
        assert known.setdefault(phrase, task.answers[-1]) == task.answers[-1]
        assert task.answers[-1] not in task.problem


@pytest.mark.parametrize("source", toys.OOD)
def test_gold_answers_are_right_and_others_wrong(source: str) -> None:
    for task in toy_tasks(source, 3 if source == "toy_stdin_code" else 40, 3):
        assert all(grade(task, answer).score == 1 for answer in task.answers)
        for wrong in task.meta.get("distractors", ()):
            assert (grade(task, wrong).score, grade(task, wrong).error) == (0, "")


def test_a_wrong_program_that_reads_stdin_fails_hidden_tests_and_one_in_three_hides_it_from_public_ones() -> None:
    """As with functions: wrong everywhere, failing with an exception, right on the public tests alone."""
    task = toy_tasks("toy_stdin_code", 1, 0)[0]
    for k, public in enumerate((False, False, True)):
        program = _wrong_program(task, k)
        assert (grade(task, program).score, grade(task, program).error) == (0, "")
        assert sandbox.run_tests(program, task.public_tests).passed is public


@pytest.mark.parametrize("source", toys.OOD)
def test_a_written_task_reads_back_as_itself(source: str, tmp_path: Path) -> None:
    made = toy_tasks(source, 20, 2)
    assert read_tasks(write(tmp_path, *[to_record(task) for task in made])) == made


CALCULATE = "Plan -> Programmer -> (Verify -> Revise) * 3 -> Format"
READ = "Decompose -> AnswerGenerate -> (Review -> Revise) * 3 -> Format"


@pytest.mark.parametrize(("source", "best", "other"), [
    ("toy_aime", CALCULATE, READ), ("toy_open_qa", READ, CALCULATE), ("toy_mathqa", CALCULATE, "")])
def test_what_is_best_differs_between_kinds_and_one_operator_is_clearly_worse(source: str, best: str, other: str) -> None:
    """bench/world.py has the table; toy_stdin_code takes minutes there."""
    library = operators.library()

    def new_canvas(task: Task) -> Canvas:
        return Canvas(task, library, SimulatedBackend(0), CanvasConfig())

    def mean(workflow: str) -> float:
        made = toy_tasks(source, 48, 0)
        return sum(baselines.score_workflow(workflow, task, new_canvas, grade) for task in made) / len(made)

    for worse in filter(None, (other, "Custom -> Format", "AnswerGenerate -> Format", "Programmer -> Format")):
        assert mean(best) > mean(worse) + 0.1, worse
