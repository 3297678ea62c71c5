"""examples/ and the README's operator: each is loaded as a user loads it and does what its description says."""

import math
import random
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
from rewards import grade
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


@pytest.mark.parametrize(("reply", "why"), [
    ("", "the reply holds no <expression>"), ("<expression>(</expression>", "( could not be evaluated: error"),
    ("<expression>1" + "+1" * 500 + "</expression>", "of at most 1000 characters"),
])
def test_the_calculator_fails_with_a_reason(reply: str, why: str) -> None:
    result = run("Calculator", "calculator.py", reply, problem="?")
    assert why in result.error
    assert result.writes == {}


def test_the_calculator_evaluates_in_the_sandbox_alone(tmp_path: Path) -> None:
    """sympify runs what it is given: this expression is a program."""
    run("Calculator", "calculator.py", f"<expression>[open('{tmp_path}/made', 'w').close()]</expression>", problem="?")
    assert not list(tmp_path.iterdir())


CODE = "def half(xs):\n    total = sum(xs)\n    return total / len(xs)"


def test_the_debugger_names_the_line_and_its_variables() -> None:
    tests = "assert half([2]) == 2\nassert half([]) == 0"
    result = run("Debugger", "debugger.py", kind="code", tests=tests, entry="half", code=CODE)
    assert result.passed is False
    assert result.writes["feedback"] == ("line 3: return total / len(xs)\nZeroDivisionError: division by zero\n"
                                         "variables: {'xs': '[]', 'total': '0'}")


def test_the_debugger_shows_short_variables_of_the_program_alone() -> None:
    code = "import math\nname = 'x' * 5000\ndef f(): return 1\nvalue = math.sqrt(-1)"
    result = run("Debugger", "debugger.py", kind="code", code=code)
    assert result.writes["feedback"].startswith("line 4: value = math.sqrt(-1)\nValueError: ")
    assert f"'name': \"'{'x' * 79}\"" in result.writes["feedback"]
    assert "__" not in result.writes["feedback"]
    assert "'f'" not in result.writes["feedback"]


def test_the_debugger_and_self_critique_need_something_to_check() -> None:
    assert "no code to debug" in run("Debugger", "debugger.py", kind="code", tests="assert f() == 1", entry="f").error
    assert "no solution to criticise" in run("SelfCritique", "self_critique.py", "<passed>yes</passed>", problem="?").error


HALVE = "print(int(input()) // 2)"


@pytest.mark.parametrize(("tests", "entry", "code", "passed"), [
    ("assert half([2]) == 2", "half", CODE, True), ([{"input": [[2]], "output": 2}], "half", CODE, True),
    ([{"input": [[2]], "output": 3}], "half", CODE, False), ([{"input": "4", "output": "2"}], None, HALVE, True),
    ([{"input": "4", "output": "3"}], None, HALVE, False), ("", None, "print(1)", True), ("", None, "1 / 0", False),
])
def test_the_debugger_knows_each_kind_of_test(tests: str | list, entry: str | None, code: str, passed: bool) -> None:
    assert run("Debugger", "debugger.py", kind="code", tests=tests, entry=entry, code=code).passed is passed


@pytest.mark.parametrize(("verdict", "passed", "feedback"), [("yes", True, ""), ("No", False, "too small")])
def test_self_critique_judges_after_both_sides(verdict: str, passed: bool, feedback: str) -> None:
    reply = f"<for>fits</for><feedback>too small</feedback><passed>{verdict}</passed>"
    result = run("SelfCritique", "self_critique.py", reply, problem="?", solution="3")
    assert (result.passed, result.writes) == (passed, {"feedback": feedback})
    assert run("SelfCritique", "self_critique.py", "hm", problem="?", solution="3").error


def test_self_critique_takes_reviews_place_in_the_simulation() -> None:
    """It finds wrong solutions and lets right ones pass, about as often as Review, so that Revise has something to do."""
    library = operators.library(["Custom", "SelfCritique", "Revise"], [ROOT / "examples/self_critique.py"])
    verdicts: dict[bool, list[bool]] = {True: [], False: []}
    revised = []
    for task in toy_tasks("toy_qa", 150, 5):
        canvas = Canvas(task, library, SimulatedBackend(), CanvasConfig())
        canvas.graph = Graph.from_text("Custom -> (SelfCritique ? Revise : done)")
        canvas.run_graph()
        right = grade(task, canvas.results["n1"].output.rpartition("answer is ")[2].removesuffix(".")).em == 1
        verdicts[right].append(canvas.results["n2.1"].passed)
        revised.append("n2.2" in canvas.results)
    assert sum(verdicts[True]) / len(verdicts[True]) > 0.8  # the tables: 0.92
    assert sum(verdicts[False]) / len(verdicts[False]) < 0.4  # 0.25
    assert 20 < sum(revised) < 120


def test_the_retriever_finds_the_passage_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("The Danube rises in the Black Forest.\n\nThe Rhine flows to the North Sea.\n")
    (tmp_path / "b.txt").write_text("Bread is baked from flour, and the oven is hot.")
    assert "RETRIEVER_DIR" in run("Retriever", "retriever.py", problem="?").error
    monkeypatch.setenv("RETRIEVER_DIR", str(tmp_path))
    result = run("Retriever", "retriever.py", problem="Where does the Danube rise?", plan="Look it up.")
    assert result.writes["plan"].startswith("Look it up.\nPassages:\n- The Danube rises in the Black Forest.")
    assert "no passage" in run("Retriever", "retriever.py", problem="xyzzy").error


def test_the_retriever_ranks_by_bm25(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula of Robertson and Zaragoza (2009, eq. 3.15), with the logarithm that cannot be negative, in a few lines."""
    rng, names = random.Random(3), ("ant", "bee", "cat", "dog", "eel", "fox")
    texts = [" ".join(rng.choices(names, k=rng.randint(2, 30))) for _ in range(9)]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:5]))
    (tmp_path / "sub" / "b.txt").write_text("\n \n".join(texts[5:]))
    (tmp_path / "c.md").write_text("ant ant ant")  # is no .txt

    def bm25(text: str) -> float:
        found, mean = text.split(), sum(len(other.split()) for other in texts) / 9
        total = 0.0
        for word in ("ant", "fox"):
            n, f = sum(word in other.split() for other in texts), found.count(word)
            total += math.log(1 + (9 - n + 0.5) / (n + 0.5)) * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * len(found) / mean))
        return total

    monkeypatch.setenv("RETRIEVER_DIR", str(tmp_path))
    notes = run("Retriever", "retriever.py", problem="An ANT, a fox?").writes["plan"]
    assert notes.split("\n") == ["Passages:", *(f"- {text}" for text in sorted(texts, key=bm25, reverse=True)[:3])]


def test_operators_can_be_removed_replaced_and_added() -> None:
    four = operators.library(["Plan", "Programmer", "Custom", "Format"])
    assert "Review" not in system_prompt(four, CanvasConfig())
    chosen = operators.library(["Plan", "Custom", "SelfCritique", "Format"], [ROOT / "examples/self_critique.py"])
    assert "- SelfCritique (check): argues" in system_prompt(chosen, CanvasConfig())
    files = sorted((ROOT / "examples").glob("*.py"))
    everything = operators.library(files=files)
    assert set(everything) == set(operators.library()) | {"Calculator", "Debugger", "SelfCritique", "Retriever"}
    task = toy_tasks("toy_math", 1, 0)[0]
    canvas = Canvas(task, everything, SimulatedBackend(), CanvasConfig())
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
