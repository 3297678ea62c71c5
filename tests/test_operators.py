"""operators.py: what each operator reads, asks, writes and how it fails; the Programmer and Test in the real sandbox."""

import re
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from scripted import CODE, MATH, USUAL, Scripted, add, new_canvas

import operators
from operators import REGISTRY, STATE_KEYS, Context, Operator, Result, extract_code, library, tag, without_thinking
from tasks import Task

TWELVE = ["Plan", "Decompose", "Programmer", "Custom", "AnswerGenerate", "Test", "Review", "Verify", "Revise", "ScEnsemble",
          "Aggregate", "Format"]
FENCED = "```python\nprint(42)\n```"
STATE = {"problem": "the problem", "plan": "the plan", "subproblems": "the parts", "code": "print(1)",
         "solution": "a solution", "feedback": "a critique", "candidates": ("one", "two")}


def run(name: str, *replies: str, task: Task = MATH, **state: Any) -> tuple[Result, list[str]]:
    """Run one operator on STATE; return its result and the requests it sent. The last reply repeats."""
    op, sent = REGISTRY[name], []

    def complete(text: str, inputs: dict[str, Any]) -> str:
        sent.append(text)
        return replies[min(len(sent), len(replies)) - 1]

    inputs = {key: {**STATE, **state}[key] for key in op.reads}
    return op.run(Context(name, op.prompt, task.kind, task.entry_point, task.public_tests, inputs, complete)), sent


# ---- wiring

READS = {
    "Plan": ["problem"],
    "Decompose": ["problem"],
    "Programmer": ["problem", "plan", "subproblems", "feedback"],
    "Custom": ["problem", "plan", "subproblems", "solution"],
    "AnswerGenerate": ["problem", "subproblems"],
    "Review": ["problem", "solution"],
    "Verify": ["problem", "solution"],
    "Revise": ["problem", "solution", "feedback"],
    "ScEnsemble": ["problem", "candidates"],
    "Aggregate": ["problem", "subproblems", "candidates"],
    "Format": ["problem", "solution"],
    "MdEnsemble": ["problem", "candidates"],
    "CustomCodeGenerate": ["problem", "plan", "subproblems"],
}


@pytest.mark.parametrize("name", READS)
def test_an_operator_asks_with_its_prompt_and_exactly_what_it_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "run_program", lambda code, stdin: operators.sandbox.RunResult("ok", "42", "", 0.0))
    shown = {**STATE, "candidates": "A. two\nB. one" if name == "MdEnsemble" else "A. one\nB. two"}  # Md shuffles
    _, sent = run(name, USUAL[name])
    parts = [REGISTRY[name].prompt, *(f"## {key.capitalize()}\n{shown[key]}" for key in READS[name])]
    assert sent[0] == "\n\n".join(parts)


@pytest.mark.parametrize(("name", "reply", "output", "writes", "passed"), [
    ("Plan", " First. ", "First.", {"plan": "First."}, None),
    ("Decompose", "a?\nb?", "a?\nb?", {"subproblems": "a?\nb?"}, None),
    ("Custom", "<think>hm</think> It is 42.", "It is 42.", {"solution": "It is 42."}, None),
    ("AnswerGenerate", USUAL["AnswerGenerate"], "42", {"solution": "42"}, None),
    ("Review", "<passed>Yes</passed>", "passed", {"feedback": ""}, True),
    ("Review", "<feedback>no unit</feedback><passed>no</passed>", "no unit", {"feedback": "no unit"}, False),
    ("Review", "Line 2 is off. <passed>false</passed>", "Line 2 is off.", {"feedback": "Line 2 is off."}, False),
    ("Review", "<passed>no</passed>", "a problem was found", {"feedback": "a problem was found"}, False),
    ("Verify", "<answer>42</answer><passed>true</passed>", "passed", {"feedback": ""}, True),
    ("Verify", "<answer>42</answer><feedback>differs</feedback><passed>no</passed>",
     "differs Suggested answer: 42", {"feedback": "differs Suggested answer: 42"}, False),
    ("Revise", "<answer>43</answer>", "43", {"solution": "43"}, None),
    ("Revise", "It is 43.", "It is 43.", {"solution": "It is 43."}, None),
    ("Aggregate", "<answer>both</answer>", "both", {"solution": "both"}, None),
    ("Format", "So <answer>42</answer>", "42", {"solution": "42"}, None),
    ("CustomCodeGenerate", FENCED, "print(42)", {"solution": "print(42)", "code": "print(42)"}, None),
    ("ScEnsemble", "<answer>b</answer>", "two", {"solution": "two"}, None),
    ("ScEnsemble", "(B)", "two", {"solution": "two"}, None),
])
def test_what_an_operator_writes(name: str, reply: str, output: str, writes: dict, passed: bool | None) -> None:
    assert run(name, reply)[0] == Result(output, writes, passed)


@pytest.mark.parametrize(("name", "reply", "state", "error"), [
    ("Plan", "", {}, "the reply was empty"),
    ("Plan", "<think>for ever", {}, "the reply was empty"),
    ("Decompose", " ", {}, "the reply was empty"),
    ("Custom", "<think>only</think>", {}, "the reply was empty"),
    ("AnswerGenerate", "It is 42.", {}, "the reply holds no <answer>...</answer>"),
    ("AnswerGenerate", "<answer></answer>", {}, "the reply holds no <answer>...</answer>"),
    ("Review", "Looks fine.", {}, "the reply holds no <passed>yes</passed> or <passed>no</passed>"),
    ("Review", "<passed>maybe</passed>", {}, "the reply holds no <passed>yes</passed> or <passed>no</passed>"),
    ("Verify", "<answer>42</answer>", {}, "the reply holds no <passed>yes</passed> or <passed>no</passed>"),
    ("Revise", "", {}, "the reply was empty"),
    ("Aggregate", "", {}, "the reply was empty"),
    ("Format", "", {}, "the reply was empty"),
    ("ScEnsemble", "<answer>C</answer>", {}, "the vote names none of the candidates"),
    ("ScEnsemble", "the first one", {}, "the vote names none of the candidates"),
    ("MdEnsemble", "none", {}, "no vote named a candidate"),
    ("CustomCodeGenerate", "print(42)", {}, "the reply holds no ```python block"),
    ("Review", "", {"solution": ""}, "there is no solution to review; add a solver before it"),
    ("Verify", "", {"solution": ""}, "there is no solution to verify; add a solver before it"),
    ("Revise", "", {"solution": ""}, "there is no solution to revise; add a solver before it"),
    ("Format", "", {"solution": ""}, "there is no solution to format; add a solver before it"),
    ("Aggregate", "", {"candidates": ()}, "there are no candidates; add solvers before Aggregate"),
    ("ScEnsemble", "", {"candidates": ()}, "there are no candidates; add solvers before the ensemble"),
    ("MdEnsemble", "", {"candidates": ()}, "there are no candidates; add solvers before the ensemble"),
])
def test_a_reply_that_cannot_be_read_and_a_missing_input_fail_the_node(name: str, reply: str, state: dict, error: str) -> None:
    assert run(name, reply, **state)[0] == Result("", error=error)


@pytest.mark.parametrize("name", READS)
def test_a_custom_prompt_replaces_the_default_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "run_program", lambda code, stdin: operators.sandbox.RunResult("ok", "42", "", 0.0))
    backend = Scripted()
    canvas = new_canvas(backend)
    canvas.step(add("Custom", "one"))
    canvas.step(add("AnswerGenerate", "two"))
    canvas.step(add(name, "In rhymes, please."))
    assert backend.requests[-1].operator == name
    assert backend.requests[-1].text.startswith("In rhymes, please.\n\n## Problem\nWhat is 6 * 7?")
    assert REGISTRY[name].prompt not in backend.requests[-1].text


# ---- votes


@pytest.mark.parametrize(("candidates", "winner", "asked"), [
    (("7", "8", "7"), "7", 0),
    (("The Esk.", "esk", "the  esk"), "The Esk.", 0),  # the first of those that agree
    (("7",), "7", 0),
    (("7", "8"), "8", 1),  # no majority: the executor says B
    (("7", "8", "8", "7"), "8", 1),  # a tie is none either
])
def test_a_majority_decides_and_only_without_one_the_executor(candidates: tuple[str, ...], winner: str, asked: int) -> None:
    result, sent = run("ScEnsemble", "<answer>B</answer>", candidates=candidates)
    assert (result.output, len(sent)) == (winner, asked)


def test_programs_that_differ_in_indentation_are_different_candidates() -> None:
    inside = "def f(x):\n    for i in x:\n        s = i\n        return s"
    outside = "def f(x):\n    for i in x:\n        s = i\n    return s"
    result, sent = run("ScEnsemble", "C", task=CODE, candidates=(inside, outside, "def f(x): pass"))
    assert (result.writes["code"], len(sent)) == ("def f(x): pass", 1)


@pytest.mark.parametrize("name", ["ScEnsemble", "MdEnsemble"])
def test_a_candidate_wins_as_it_stands_even_a_script_without_a_function(name: str) -> None:
    scripts = ('print("```python\\nx\\n```")', "print(int(input()))")
    result, _ = run(name, "A", task=CODE, candidates=scripts)
    assert result.writes["code"] == result.writes["solution"] == result.output
    assert result.output in scripts


def test_md_ensemble_counts_three_votes_over_the_shuffled_candidates_that_each_request_shows() -> None:
    candidates = ("one", "two", "three")
    sent: list[str] = []

    def complete(text: str, inputs: dict[str, Any]) -> str:  # always votes for "two", wherever it stands
        sent.append(text)
        return next(line[0] for line in text.splitlines() if line.endswith(". two"))

    op = REGISTRY["MdEnsemble"]
    result = op.run(Context(op.name, op.prompt, "math", None, "", {"problem": "?", "candidates": candidates}, complete))
    assert result.output == "two"
    assert len(sent) == 3
    assert all(text.count(". three") == 1 for text in sent)
    assert len(set(sent)) > 1


# ---- code


def test_on_a_code_task_the_program_is_the_solution_and_the_request_names_the_function() -> None:
    reply = "Here:\n```python\ndef double(x):\n    return 2 * x\n```"
    for name in ("Custom", "Revise", "Aggregate", "Format"):
        result, sent = run(name, reply, task=CODE)
        assert result.writes == {"solution": "def double(x):\n    return 2 * x", "code": "def double(x):\n    return 2 * x"}
        assert "The function must be called `double`." in sent[0]
    assert run("Custom", "I cannot.", task=CODE)[0].error == "the reply holds no ```python block"


def test_a_long_program_is_never_cut_and_a_long_text_is() -> None:
    program = "def double(x):\n" + "    x = x\n" * 2000 + "    return 2 * x"
    assert run("Format", f"<answer>\n```python\n{program}\n```\n</answer>", task=CODE)[0].writes["code"] == program
    assert len(run("Custom", "x" * 9000)[0].output) == operators.OUTPUT_CHARS


@pytest.mark.parametrize(("text", "code"), [
    ("no code", None),
    ("```python\nnever closed", None),
    ("```python\na\n```\nthen\n```py\nb\n```", "b"),
    ("```\nplain\n```", "plain"),
    ("```python\na\n```\n```\noutput\n```", "a"),  # a plain block is what it prints
    ("```json\n{}\n```", None),
    ("```Python title=x\n\na\n\n```", "a"),
])
def test_the_last_python_block_is_the_code(text: str, code: str | None) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize("unit", ["`", "```a", "```\n", "a", "```python\n"])
def test_extracting_code_takes_linear_time(unit: str) -> None:
    start = time.process_time()
    extract_code("```" + unit * (200_000 // len(unit)))
    assert time.process_time() - start < 2  # linear: 0.01 s


@pytest.mark.parametrize(("text", "content"), [
    ("<a>1</a><a> 2 </a>", "2"), ("<A>1</A>", "1"), ("<a>1", None), ("1</a>", None), ("İ<a>1</a>", "1"), ("</a><a>", None),
])
def test_a_tag_is_read_from_the_last_complete_pair(text: str, content: str | None) -> None:
    assert tag(text, "a") == content


@pytest.mark.parametrize(("text", "said"), [
    ("<think>a</think> b", "b"), ("b", "b"), ("<think>a", ""), ("a</think>b</think> c ", "c"), (" x < y ", "x < y"),
])
def test_thinking_is_not_part_of_a_reply(text: str, said: str) -> None:
    assert without_thinking(text) == said


# ---- Programmer and Test, in the real sandbox


def test_the_programmer_runs_its_program_and_answers_with_what_it_prints() -> None:
    result, sent = run("Programmer", "```python\nprint(6 * 7)\n```")
    assert (result, len(sent)) == (Result("42", {"solution": "42", "code": "print(6 * 7)"}), 1)


def test_the_programmer_tries_three_times_and_reads_its_error_each_time() -> None:
    replies = ["no block", "```python\nprint(1 / 0)\n```", "```python\nprint(42)\n```"]
    result, sent = run("Programmer", *replies)
    assert (result.output, len(sent)) == ("42", 3)
    assert "failed" not in sent[0]
    assert sent[1].endswith("Your last program failed:\nthe reply holds no ```python block\nWrite a corrected one.")
    assert "Your last program failed:\nerror: Traceback" in sent[2]
    assert "ZeroDivisionError: division by zero\nWrite a corrected one." in sent[2]


def test_a_programmer_without_a_working_program_fails_with_its_last_error() -> None:
    result, sent = run("Programmer", "```python\nx = 1\n```")
    assert (result.error, len(sent)) == ("no working program after 3 attempts; the last: the program printed nothing", 3)
    assert not result.writes


@pytest.mark.parametrize("program", ["print('\ud800')", "a\x00b", "(" * 5000, "import sys; sys.exit(3)"])
def test_a_hostile_program_is_its_own_failure_and_not_ours(program: str) -> None:
    error = run("Programmer", f"```python\n{program}\n```")[0].error
    assert error.startswith("no working program after 3 attempts; the last: error")


def test_a_program_that_reads_stdin_gets_the_first_public_input() -> None:
    cases = [{"input": "3\n", "output": "6"}, {"input": "oops", "output": ""}]
    stdin_task = replace(CODE, entry_point=None, public_tests=cases, hidden_tests=cases)
    result, sent = run("Programmer", "```python\nprint(2 * int(input()))\n```", task=stdin_task)
    assert (result.writes.get("code"), len(sent)) == ("print(2 * int(input()))", 1)


def test_the_test_operator_runs_the_public_tests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = operators.run_tests
    monkeypatch.setattr(operators, "run_tests", lambda *args: seen.append(args) or real(*args))
    right, wrong = "def double(x):\n    return 2 * x", "def double(x):\n    return 5"
    only_public = "def double(x):\n    return 4"  # would fail the hidden test
    assert run("Test", task=CODE, code=right)[0] == Result("passed 1/1 public tests", {"feedback": ""}, True)
    assert run("Test", task=CODE, code=only_public)[0].passed is True
    failed = run("Test", task=CODE, code=wrong)[0]
    assert failed.passed is False
    assert failed.writes == {"feedback": failed.output}
    assert failed.output.startswith("0/1 public tests passed. ")
    assert seen == [(code, CODE.public_tests, "double") for code in (right, only_public, wrong)]


def test_test_without_code_or_tests_says_so() -> None:
    assert run("Test", task=CODE, code="")[0].error == "there is no code to test; add a solver before Test"
    assert run("Test", task=MATH)[0].error == "this task has no public tests"


def walk(value: Any) -> str:
    """Every piece of data that hangs from a Context, as one text."""
    if is_dataclass(value):
        return "".join(walk(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return "".join(walk(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return "".join(map(walk, value))
    return value if isinstance(value, str) else ""


def test_hidden_tests_and_gold_answers_reach_no_operator_and_no_request() -> None:
    task = replace(CODE, hidden_tests="assert double(77123) == 154246", answers=("def double(x): return x + x  # gold",))
    contexts: list[Context] = []

    def spied(op: Operator) -> Callable[[Context], Result]:
        return lambda ctx: contexts.append(ctx) or op.run(ctx)

    program = "```python\ndef double(x):\n    return 2 * x\n```"
    solvers = ("Programmer", "Custom", "CustomCodeGenerate", "Revise", "Aggregate", "Format")
    backend = Scripted(**dict.fromkeys(solvers, program), AnswerGenerate=f"<answer>{program}</answer>")
    canvas = new_canvas(backend, task)
    canvas.library = {name: replace(op, run=spied(op)) for name, op in canvas.library.items()}
    for name in canvas.library:
        feedback = canvas.step(add(name))
        assert not feedback.info["failed"], feedback.text
    assert {context.operator for context in contexts} == set(canvas.library)
    assert "assert double(2) == 4" in walk(contexts)  # the walk does find tests
    for secret in ("77123", "# gold"):
        assert secret not in walk(contexts)
        assert all(secret not in request.text + walk(dict(request.inputs)) for request in backend.requests)


# ---- the library and plug-ins

SHOUT = """
from __future__ import annotations
from dataclasses import dataclass
from operators import Context, Result, operator

@dataclass
class Note:
    text: str

@operator("{name}", role="format", reads=("solution",), prompt="", description="Writes in capitals.")
def shout(ctx: Context) -> Result:
    return Result(ctx.inputs["solution"].upper(), {{"solution": Note(ctx.inputs["solution"].upper()).text}})
"""


def plugin(directory: Path, text: str) -> Path:
    (directory / "my_ops.py").write_text(text)
    return directory / "my_ops.py"


def test_twelve_operators_are_advertised_and_two_more_are_known() -> None:
    assert list(library()) == TWELVE
    assert [name for name in REGISTRY if name not in TWELVE] == ["MdEnsemble", "CustomCodeGenerate"]
    assert {name: op.role for name, op in REGISTRY.items() if op.role not in ("solve", "plan")} == {
        "Test": "check", "Review": "check", "Verify": "check", "Revise": "revise", "ScEnsemble": "ensemble",
        "Aggregate": "ensemble", "Format": "format", "MdEnsemble": "ensemble"}


def test_names_select_in_order_in_any_case_hidden_ones_too() -> None:
    assert list(library([" format", "MDENSEMBLE", "Plan"])) == ["Format", "MdEnsemble", "Plan"]


def test_a_plug_in_adds_an_operator_that_works_and_leaks_into_no_other_library(tmp_path: Path) -> None:
    mine = library(files=[plugin(tmp_path, SHOUT.format(name="Shout"))])
    assert list(mine) == [*TWELVE, "Shout"]
    assert list(library()) == TWELVE
    assert "Shout" not in REGISTRY
    canvas = new_canvas(Scripted())
    canvas.library, canvas._names = mine, {name.lower(): name for name in mine}
    canvas.step(add("Custom"))
    canvas.step(add("shout"))
    assert canvas.answer == "THE ANSWER IS 42."


@pytest.mark.parametrize("name", ["Format", "format"])
def test_a_plug_in_replaces_the_operator_of_its_name_in_any_case(tmp_path: Path, name: str) -> None:
    mine = library(files=[plugin(tmp_path, SHOUT.format(name=name))])
    assert sorted(mine) == sorted([*TWELVE[:-1], name])
    assert mine[name].description == "Writes in capitals."
    assert list(library(["FORMAT"], [tmp_path / "my_ops.py"])) == [name]
    assert library()["Format"].description == "gives the shortest exact answer"


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1", "registers no operator; see the example at the top of operators.py"),
    ("import nothing_like_it", "could not be loaded: ModuleNotFoundError: No module named 'nothing_like_it'"),
    ("def (", "could not be loaded: SyntaxError: invalid syntax"),
    (SHOUT.replace("format", "shouter").format(name="X"), "operator X: role 'shouter' is not one of plan, solve, check"),
    (SHOUT.replace('"solution",', '"gold",').format(name="X"), "operator X: cannot read ['gold']; known inputs are problem,"),
    (SHOUT.format(name="done"), "operator name 'done': use letters, digits and _ only, not the reserved word 'done'"),
    (SHOUT.format(name="A B"), "operator name 'A B': use letters"),
])
def test_a_bad_plug_in_is_a_clear_error_and_leaves_the_library_whole(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="operator file") as caught:
        library(files=[plugin(tmp_path, text)])
    assert message in str(caught.value)
    assert str(tmp_path / "my_ops.py") in str(caught.value)
    assert list(library()) == TWELVE


@pytest.mark.parametrize(("names", "files", "message"), [
    (["Plan", "Plann"], [], "unknown operator 'Plann'; known: Plan, Decompose"),
    ([], [], "the operator library is empty; name at least one operator"),
    (None, ["/nowhere/ops.py"], "operator file /nowhere/ops.py does not exist"),
    (None, [str(Path(__file__).parent.parent / "requirements.txt")], "its name must end in .py"),
])
def test_a_bad_selection_is_a_clear_error(names: list[str] | None, files: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        library(names, files)


def test_every_declared_input_exists() -> None:
    assert all(set(op.reads) <= set(STATE_KEYS) for op in REGISTRY.values())
