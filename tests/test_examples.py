"""examples/ and the README's operator: each is loaded as a user loads it and does what its description says."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import operators
from backends import SimulatedBackend
from canvas import Canvas, CanvasConfig, system_prompt
from graph import Graph
from operators import Context, Result
from tasks import toy_tasks

ROOT = Path(__file__).parent.parent


def run(name: str, file: str, reply: str | Callable = "", kind: str = "math", tests: str | list = "", entry: str | None = None,
        **inputs: str) -> Result:
    """Run an example's operator on these inputs, with an executor that says `reply`."""
    op = operators.library(files=[ROOT / "examples" / file])[name]
    seen: Mapping[str, Any] = {key: inputs.get(key, "") for key in op.reads}
    return op.run(Context(name, op.prompt, kind, entry, tests, seen, lambda text, state: reply))


@pytest.mark.parametrize(("reply", "value"), [
    ("<expression>solve(x**2 - 2*x - 3, x)</expression>", "[-1, 3]"), ("<expression>Rational(1, 3) + Rational(1, 6)</expression>",
                                                                       "1/2"),
    ("<expression>binomial(10, 3)</expression>", "120"), ("<expression>Integral(x, (x, 0, 2))</expression>", "2"),
    ("I compute. The answer is 6*7.", "42"),
])
def test_the_calculator_is_exact(reply: str, value: str) -> None:
    assert run("Calculator", "calculator.py", reply, problem="?").writes == {"solution": value}


@pytest.mark.parametrize("reply", ["", "<expression>(</expression>", "<expression>" + "9**" * 400 + "9</expression>"])
def test_the_calculator_fails_with_a_reason(reply: str) -> None:
    result = run("Calculator", "calculator.py", reply, problem="?")
    assert result.error
    assert result.writes == {}


CODE = "def half(xs):\n    total = sum(xs)\n    return total / len(xs)"


def test_the_debugger_names_the_line_and_its_variables() -> None:
    tests = "assert half([2]) == 2\nassert half([]) == 0"
    result = run("Debugger", "debugger.py", kind="code", tests=tests, entry="half", code=CODE)
    assert result.passed is False
    assert result.writes["feedback"] == ("line 3: return total / len(xs)\nZeroDivisionError: division by zero\n"
                                         "variables: {'xs': '[]', 'total': '0'}")


HALVE = "print(int(input()) // 2)"


@pytest.mark.parametrize(("tests", "entry", "code", "passed"), [
    ("assert half([2]) == 2", "half", CODE, True), ([{"input": [[2]], "output": 2}], "half", CODE, True),
    ([{"input": [[2]], "output": 3}], "half", CODE, False), ([{"input": "4", "output": "2"}], None, HALVE, True),
    ([{"input": "4", "output": "3"}], None, HALVE, False), ("", None, "print(1)", True), ("", None, "1 / 0", False),
])
def test_the_debugger_knows_each_kind_of_test(tests: str | list, entry: str | None, code: str, passed: bool) -> None:
    assert run("Debugger", "debugger.py", kind="code", tests=tests, entry=entry, code=code).passed is passed


@pytest.mark.parametrize(("verdict", "passed", "feedback"), [("right", True, ""), ("Wrong", False, "too small")])
def test_self_critique_judges_after_both_sides(verdict: str, passed: bool, feedback: str) -> None:
    reply = f"<for>fits</for><against>too small</against><verdict>{verdict}</verdict>"
    result = run("SelfCritique", "self_critique.py", reply, problem="?", solution="3")
    assert (result.passed, result.writes) == (passed, {"feedback": feedback})
    assert run("SelfCritique", "self_critique.py", "hm", problem="?", solution="3").error


def test_the_retriever_finds_the_passage_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("The Danube rises in the Black Forest.\n\nThe Rhine flows to the North Sea.\n")
    (tmp_path / "b.txt").write_text("Bread is baked from flour, and the oven is hot.")
    assert "RETRIEVER_DIR" in run("Retriever", "retriever.py", problem="?").error
    monkeypatch.setenv("RETRIEVER_DIR", str(tmp_path))
    result = run("Retriever", "retriever.py", problem="Where does the Danube rise?", plan="Look it up.")
    assert result.writes["plan"].startswith("Look it up.\nPassages:\n- The Danube rises in the Black Forest.")
    assert "no passage" in run("Retriever", "retriever.py", problem="xyzzy").error


def test_operators_can_be_removed_replaced_and_added() -> None:
    four = operators.library(["Plan", "Programmer", "Custom", "Format"])
    assert "Review" not in system_prompt(four, CanvasConfig())
    chosen = operators.library(["Plan", "Custom", "SelfCritique", "Format"], [ROOT / "examples/self_critique.py"])
    assert "- SelfCritique (check): argues" in system_prompt(chosen, CanvasConfig())
    files = sorted((ROOT / "examples").glob("*.py"))
    everything = operators.library(files=files)
    assert set(everything) == set(operators.library()) | {"Calculator", "Debugger", "SelfCritique", "Retriever"}
    task = toy_tasks("toy_math", 1, 0)[0]
    canvas = Canvas(task, everything, SimulatedBackend(), CanvasConfig())  # a simulation takes an unknown operator for Custom
    canvas.graph = Graph.from_text("Plan -> Calculator -> Format")
    canvas.run_graph()
    assert canvas.answer


def test_the_operator_of_the_readme_runs_and_has_fifteen_lines(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(# my_ops\.py.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert code.count("\n") <= 15
    (tmp_path / "my_ops.py").write_text(code)
    op = operators.library(files=[tmp_path / "my_ops.py"])["Shorten"]
    asked = []

    def complete(text: str, state: Mapping[str, Any]) -> str:
        asked.append(text)
        return "<answer>42</answer>"

    inputs = {"problem": "How many?", "solution": "It is, all told, 42."}
    assert op.run(Context(op.name, op.prompt, "math", None, "", inputs, complete)).writes == {"solution": "42"}
    assert "How many?" in asked[0]
    assert op.run(Context(op.name, op.prompt, "math", None, "", inputs, lambda text, state: "")).error
