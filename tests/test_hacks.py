"""Workflows that collect R_div for nothing: what is used, told from graph and execution."""

import pytest

from backends import SimulatedBackend
from canvas import Canvas, CanvasConfig, Graph
from hacks import HACKS, credit
from operators import library
from rewards import Grade, RewardConfig, reward
from tasks import toy_tasks


def played(text: str, source: str = "toy_math") -> Canvas:
    canvas = Canvas(toy_tasks(source, 1, 0)[0], library(), SimulatedBackend(0), CanvasConfig())
    canvas.graph = Graph.from_text(text)
    canvas.run_graph()
    return canvas


@pytest.mark.parametrize(("text", "used", "structures", "hacks"), [
    # text, operators that are used, structures that are, (no_op, idle_parallel, idle_control, after_format)
    ("Custom", 1, 0, (0, 0, 0, 0)),
    ("Plan -> Custom -> Format", 3, 0, (0, 0, 0, 0)),
    ("Plan -> AnswerGenerate -> Format", 2, 0, (1, 0, 0, 0)),  # reads no plan
    ("Plan -> Plan -> Custom", 2, 0, (1, 0, 0, 0)),  # the second hides the first
    ("Custom -> AnswerGenerate", 1, 0, (1, 0, 0, 0)),
    ("Custom -> AnswerGenerate -> Aggregate", 3, 0, (0, 0, 0, 0)),  # but both are candidates
    ("Custom -> Aggregate -> AnswerGenerate -> Aggregate", 4, 0, (0, 0, 0, 0)),
    ("Custom -> Review -> Format", 2, 0, (1, 0, 0, 0)),  # nobody reads its notes
    ("Custom -> Review -> Revise -> Format", 4, 0, (0, 0, 0, 0)),
    ("Custom -> Test -> Revise", 2, 0, (1, 0, 0, 0)),  # it fails: no code, no tests
    ("[Custom, AnswerGenerate] -> ScEnsemble", 3, 1, (0, 0, 0, 0)),
    ("[Custom, AnswerGenerate] -> Format", 2, 0, (1, 1, 0, 0)),  # the last solution wins, nobody reads the other
    ("[Plan, Decompose] -> Custom", 3, 1, (0, 0, 0, 0)),
    ("[Plan, Decompose] -> AnswerGenerate", 2, 0, (1, 1, 0, 0)),
    ("[Plan, Plan] -> Custom", 3, 1, (0, 0, 0, 0)),  # plans stand side by side
    ("Plan -> [Plan, Decompose] -> Custom", 3, 1, (1, 0, 0, 0)),  # and hide the one before
    ("Custom -> [Plan, Decompose] -> Format", 2, 0, (2, 1, 0, 0)),
    ("Custom -> (Review ? Revise : done)", 3, 1, (0, 0, 0, 0)),  # whether it fired or not
    ("Custom -> (Test ? Revise : done)", 1, 0, (2, 0, 1, 0)),  # it never can
    ("(Review ? Revise : done) -> Custom", 1, 0, (2, 0, 1, 0)),  # there is nothing to review yet
    ("Custom -> (Review ? Plan : done) -> Format", 2, 0, (2, 0, 1, 0)),
    ("Custom -> (Review ? Plan : Revise) -> Format", 4, 1, (1, 0, 0, 0)),
    ("Custom -> (Review ? Plan : done) -> Custom", 4, 1, (0, 0, 0, 0)),
    ("Custom -> (Review ? Plan : done) -> Revise", 3, 0, (1, 0, 1, 0)),  # its notes are read, its branch is not
    ("Custom -> (Review -> Revise) * 3", 3, 1, (0, 0, 0, 0)),
    ("Custom -> (Revise -> Review) * 2", 3, 1, (0, 0, 0, 0)),  # the notes are for the next round
    ("Custom -> (Revise -> Review) * 1", 2, 0, (1, 0, 1, 0)),  # which never comes
    ("Custom -> (Review -> Revise) * 1", 3, 0, (0, 0, 1, 0)),
    ("(Custom -> Verify) * 3", 2, 1, (0, 0, 0, 0)),  # the verdict decides whether to go on
    ("Custom -> (Plan -> Verify) * 3 -> Format", 2, 0, (2, 0, 1, 0)),
    ("Custom -> Format -> Review -> Plan", 2, 0, (2, 0, 0, 2)),
    ("Custom -> Format -> (Verify ? Revise : done)", 2, 0, (0, 0, 0, 2)),
    ("Format -> Custom -> Format", 2, 0, (1, 0, 0, 0)),
])  # fmt: skip
def test_what_is_used_and_what_is_a_hack(text: str, used: int, structures: int, hacks: tuple[int, ...]) -> None:
    found = credit(played(text))
    assert (len(found.operators), len(found.structures), tuple(found.hacks[name] for name in HACKS)) == (used, structures, hacks)


def test_a_test_of_code_is_used() -> None:
    found = credit(played("Custom -> (Test ? Revise : done) -> Format", "toy_code"))
    assert (found.operators, found.structures) == (["Custom", "Test", "Revise", "Format"], ["conditional"])


def test_strict_pays_for_what_is_used_alone() -> None:
    """Five operators, a checker, a Format and a parallel; without --strict-structure that is all R_div asks for."""
    hack = "Custom -> Format -> [Plan, Plan] -> Review"
    honest = "[Custom, AnswerGenerate] -> Aggregate -> (Review ? Revise : done) -> Format"
    for text, strict, diversity, answer in ((hack, False, 1.0, 1.0), (hack, True, 0.4, 0.0), (honest, True, 1.0, 1.0)):
        parts = reward(played(text), Grade(1, 1, 1), RewardConfig(strict=strict))
        assert (parts.diversity, parts.answer) == (diversity, answer), text


def test_strict_keeps_the_credit_for_checker_and_format() -> None:
    parts = reward(played("Custom -> Format -> [Plan, Plan] -> Review"), Grade(1, 1, 1), RewardConfig(strict=True))
    assert (parts.checker, parts.format, parts.operators, parts.structure) == (0.2, 0.2, 0.0, 0.0)
