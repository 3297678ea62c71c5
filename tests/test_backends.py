"""backends.py and simulated.py: usage, record and replay, and the simulated skill model (OpenAIBackend: test_openai.py)."""

import functools
import itertools
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import ASK, MATH, Scripted, in_threads

import simulated
from backends import CachedBackend, ExecutorError, Reply, Request, SimulatedBackend, Usage
from canvas import Canvas, CanvasConfig
from graph import Graph
from operators import REGISTRY, Context, extract_code, tag
from sandbox import run_tests
from simulated import Simulation
from tasks import Task, toy_tasks


def test_added_usage_is_unknown_as_soon_as_one_part_is() -> None:
    total = Usage()
    total.add(Usage(1, 0, 10, 5, 0.5, 0.25))
    total.add(Usage(1, 0, 10, 5, 0.5, 0.25).again())
    assert total.to_dict() == {"calls": 1, "cached": 1, "prompt_tokens": 20, "completion_tokens": 10, "seconds": 0.5,
                               "dollars": 0.25, "dollars_cached": 0.25}
    assert total.cost == 0.5
    total.add(Usage(1, dollars=None).again())  # nothing was paid, but what it once cost is not known
    assert (total.dollars, total.dollars_cached, total.cost) == (0.25, None, None)
    total.add(Usage(1, dollars=None))
    total.add(Usage(1, dollars=1.0))
    assert (total.calls, total.dollars) == (3, None)


# ---- record and replay


def test_what_was_recorded_is_replayed_offline(tmp_path: Path) -> None:
    texts = ["plain", "\ud800 odd \u2028", "x" * 10_000]
    asks = [replace(ASK, text=text, inputs={"problem": text}) for text in texts]
    recorder = CachedBackend(tmp_path, Scripted(Custom=lambda request: request.text.upper()), "m/0")
    recorded = [recorder.complete(ask) for ask in asks]
    replay = CachedBackend(tmp_path, fingerprint="m/0")
    for ask, first in zip(asks, recorded, strict=True):
        again = replay.complete(ask)
        assert again.text == first.text == ask.text.upper()
        assert (first.usage.calls, first.usage.dollars) == (1, 0.25)
        assert again.usage == Usage(0, 1, 10, 5, 0.0, 0.0, 0.25)  # what the recording took, and nothing paid
        assert recorder.complete(ask).usage == again.usage
    assert (recorder.name, replay.name, replay.instant) == ("cached scripted", "replay", False)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("changed", [
    {"text": "other"}, {"operator": "Plan"}, {"task": replace(MATH, id="m2")}, {"inputs": {"problem": "other"}}])
def test_a_call_that_was_not_recorded_is_named(tmp_path: Path, changed: dict) -> None:
    CachedBackend(tmp_path, Scripted()).complete(ASK)
    ask = replace(ASK, **changed)
    with pytest.raises(ExecutorError) as caught:
        CachedBackend(tmp_path).complete(ask)
    assert str(caught.value) == f"replay: no recorded reply for {ask.operator} on {ask.task.id} in {tmp_path}"


def test_another_model_or_temperature_shares_no_reply(tmp_path: Path) -> None:
    CachedBackend(tmp_path, Scripted(), "qwen/0.0").complete(ASK)
    with pytest.raises(ExecutorError):
        CachedBackend(tmp_path, fingerprint="qwen/0.7").complete(ASK)


def test_equal_calls_at_one_time_are_made_once(tmp_path: Path) -> None:
    def slowly(request: Request) -> str:
        time.sleep(0.1)
        return "once"

    inner = Scripted(Custom=slowly)
    cached = CachedBackend(tmp_path, inner)
    replies = in_threads(6, lambda: cached.complete(ASK))
    assert ([reply.text for reply in replies], len(inner.requests)) == (["once"] * 6, 1)
    assert sorted((reply.usage.calls, reply.usage.cached) for reply in replies) == [(0, 1)] * 5 + [(1, 0)]
    assert {(reply.usage.prompt_tokens, reply.usage.cost) for reply in replies} == {(10, 0.25)}
    assert sum(reply.usage.dollars for reply in replies) == 0.25


def test_equal_calls_at_one_time_fail_together(tmp_path: Path) -> None:
    def slowly(request: Request) -> str:
        time.sleep(0.1)
        raise ExecutorError("down")

    inner = Scripted(Custom=slowly)
    cached = CachedBackend(tmp_path, inner)
    assert [str(error) for error in in_threads(6, lambda: cached.complete(ASK))] == ["down"] * 6
    assert len(inner.requests) == 1  # none of them had to wait for five others to fail first


def test_different_calls_at_one_time_do_not_wait_for_each_other(tmp_path: Path) -> None:
    together = threading.Barrier(100, timeout=20)
    cached = CachedBackend(tmp_path, Scripted(Custom=lambda request: f"{together.wait() >= 0} {request.text}"))
    texts = [str(i) for i in range(100)]
    replies = in_threads(100, lambda: cached.complete(replace(ASK, text=texts.pop())))
    assert sorted(reply.text for reply in replies) == sorted(f"True {i}" for i in range(100))


DAMAGED = {
    "torn": lambda whole: whole[:20], "empty": lambda whole: b"", "not JSON": lambda whole: b"\xff\xfe",
    "no text": lambda whole: b"{}", "a list": lambda whole: b"[]", "too deep": lambda whole: b"[" * 100_000,
    "text of another type": lambda whole: whole.replace(b'"right"', b"17"),
    "another text": lambda whole: whole.replace(b"right", b"wrong"),
    "other usage": lambda whole: whole.replace(b'"prompt_tokens": 10', b'"prompt_tokens": 90'),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_recording_is_never_an_answer(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    CachedBackend(tmp_path, Scripted(Custom="right")).complete(ASK)
    [path] = tmp_path.rglob("*.json")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ExecutorError, match=f"the reply recorded for Custom on m1 is damaged: {path}"):
        CachedBackend(tmp_path).complete(ASK)
    assert CachedBackend(tmp_path, Scripted(Custom="new")).complete(ASK).text == "new"  # recorded again
    assert CachedBackend(tmp_path).complete(ASK).text == "new"


def test_a_recording_under_another_calls_name_is_never_its_answer(tmp_path: Path) -> None:
    recorder = CachedBackend(tmp_path, Scripted(Custom=lambda request: request.text))
    recorder.complete(replace(ASK, text="a"))
    [path] = tmp_path.rglob("*.json")
    content = path.read_bytes()
    path.unlink()
    recorder.complete(replace(ASK, text="b"))
    [path] = tmp_path.rglob("*.json")
    path.write_bytes(content)
    with pytest.raises(ExecutorError, match="checksum"):
        CachedBackend(tmp_path).complete(replace(ASK, text="b"))


def test_a_failed_call_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match="down"):
        CachedBackend(tmp_path, Scripted(Custom=ExecutorError("down"))).complete(ASK)
    assert CachedBackend(tmp_path, Scripted(Custom="up")).complete(ASK).text == "up"


# ---- the simulated executor: a pure function


def simulate(task: Task, operator: str, seed: int = 0, prompt: str = "p", role: str = "solve", **inputs: Any) -> str:
    return SimulatedBackend(seed).complete(Request(task, operator, prompt, "text", inputs, role)).text


def verdicts(seed: int = 0, prompt: str = "p", plan: str = "", error: str = "") -> str:
    return "".join("wr"[repr(f"a{i}") in simulate(Task(f"t{i}", "gsm8k", "math", "?", (f"a{i}",)), "Programmer", seed, prompt,
                                                  plan=plan, error=error)] for i in range(40))


def test_a_reply_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = "import sys; sys.path[:0] = ['.', 'tests']; import test_backends; print(test_backends.verdicts())"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment,
                          cwd=Path(__file__).parent.parent)
    assert said.stdout.strip() == verdicts()


def test_a_reply_depends_on_seed_prompt_and_inputs_and_on_nothing_else() -> None:
    same = verdicts()
    assert all(verdicts() == same for _ in range(2))
    others = [verdicts(seed=1), verdicts(prompt="q"), verdicts(plan="A plan."), verdicts(error="division by zero")]
    assert len({same, *others}) == 5


def test_latency_waits_and_changes_nothing_else(waits: list[float]) -> None:
    slow = SimulatedBackend(0, latency=2.0)
    assert [slow.complete(ASK).text for _ in range(2)] == [SimulatedBackend(0).complete(ASK).text] * 2
    assert waits[0] == waits[1] > 0
    for i in range(300):
        slow.complete(replace(ASK, text=str(i)))
    assert sorted(waits)[150] == pytest.approx(2.0, rel=0.25)  # the median
    assert (slow.instant, SimulatedBackend(0).instant) == (False, True)


def test_the_simulation_has_no_price() -> None:
    assert SimulatedBackend(0).complete(ASK).usage.dollars is None


# ---- the simulated executor: its tables

GOLD = "1234567"
WRONG = "no"


@functools.cache
def medium(kind: str) -> list[Task]:
    """About 1,200 tasks of medium difficulty, where the tables hold as they stand."""
    gold = GOLD if kind == "math" else "Dree"
    tasks = (Task(f"{kind}-{i}", "s", kind, "Who is Bela Cora?", (gold,)) for i in range(12_000))
    return [task for task in tasks if abs(Simulation(0, task, "", "", {}).difficulty - 0.5) < 0.05]


def share(kind: str, operator: str, right: Callable[[str, Task], bool], **inputs: Any) -> float:
    """How often `right` holds for replies on tasks of medium difficulty."""
    return sum(right(simulate(task, operator, **inputs), task) for task in medium(kind)) / len(medium(kind))


def holds_gold(reply: str, task: Task) -> bool:
    return re.search(rf"\b{task.answers[0]}\b", reply) is not None


def rejects(reply: str, task: Task) -> bool:
    return tag(reply, "passed") == "no"


@pytest.mark.parametrize(("kind", "operator", "right", "inputs", "expected"), [
    ("math", "Programmer", holds_gold, {}, 0.60),
    ("math", "Programmer", holds_gold, {"plan": "A plan."}, 0.73),  # log-odds 0.41 + 0.6
    ("math", "Programmer", holds_gold, {"plan": "A plan.", "subproblems": "Parts."}, 0.77),
    ("qa", "Programmer", holds_gold, {}, 0.15),
    ("qa", "Custom", holds_gold, {}, 0.50),
    ("qa", "Custom", holds_gold, {"subproblems": "Parts."}, 0.71),  # log-odds 0 + 0.9
    ("qa", "Custom", holds_gold, {"plan": "A plan."}, 0.50),  # a plan does not help here
    ("math", "Custom", holds_gold, {}, 0.35),
    ("math", "Custom", holds_gold, {"solution": GOLD}, 0.85),
    ("math", "AnswerGenerate", holds_gold, {}, 0.30),
    ("qa", "AnswerGenerate", holds_gold, {}, 0.55),
    ("math", "Verify", rejects, {"solution": WRONG}, 0.85),
    ("math", "Verify", rejects, {"solution": f"So the answer is {GOLD}."}, 0.05),
    ("qa", "Verify", rejects, {"solution": WRONG}, 0.40),
    ("math", "Review", rejects, {"solution": WRONG}, 0.50),
    ("math", "Review", rejects, {"solution": GOLD}, 0.15),
    ("qa", "Review", rejects, {"solution": WRONG}, 0.75),
    ("math", "Revise", holds_gold, {"solution": WRONG}, 0.15),
    ("math", "Revise", holds_gold, {"solution": WRONG, "feedback": "One step does not hold."}, 0.50),
    ("math", "Revise", holds_gold, {"solution": WRONG, "feedback": "1/2 public tests passed."}, 0.60),
    ("math", "Revise", holds_gold, {"solution": WRONG, "feedback": f"x Suggested answer: {GOLD}"}, 0.90),
    ("math", "Revise", holds_gold, {"solution": WRONG, "feedback": f"x Suggested answer: {WRONG}"}, 0.50),
    ("math", "Revise", holds_gold, {"solution": GOLD}, 0.95),
    ("math", "Revise", holds_gold, {"solution": GOLD, "feedback": "One step does not hold."}, 0.70),
    ("math", "Aggregate", holds_gold, {"candidates": (GOLD, GOLD, WRONG)}, 0.95),
    ("math", "Aggregate", holds_gold, {"candidates": (GOLD, WRONG)}, 0.65),
    ("math", "Aggregate", holds_gold, {"candidates": (GOLD, WRONG, WRONG)}, 0.35),
    ("math", "Aggregate", holds_gold, {"candidates": (WRONG,)}, 0.03),
    ("math", "ScEnsemble", lambda reply, task: tag(reply, "answer") == "B", {"candidates": (WRONG, GOLD)}, 0.775),  # .55 + .45/2
    ("math", "Format", holds_gold, {"solution": f"So the answer is {GOLD}."}, 0.98),
])
def test_the_simulated_skills_are_those_of_the_tables(
        kind: str, operator: str, right: Callable[[str, Task], bool], inputs: dict, expected: float) -> None:
    assert share(kind, operator, right, **inputs) == pytest.approx(expected, abs=0.045)  # about 1200 draws: 3 sigma


def test_an_operator_that_is_shown_something_else_errs_alike_and_another_one_does_not() -> None:
    def both(other: str, **inputs: Any) -> float:
        right = [holds_gold(simulate(t, "Custom"), t) and holds_gold(simulate(t, other, **inputs), t) for t in medium("qa")]
        return sum(right) / len(right)

    assert both("Custom", plan="A plan.") == pytest.approx(1 / 4 + math.asin(1 / 2) / (2 * math.pi), abs=0.045)  # that is 1/3
    assert both("AnswerGenerate") == pytest.approx(0.50 * 0.55, abs=0.045)


def test_a_task_has_a_usual_wrong_answer() -> None:
    def wrong(task: Task, operator: str) -> str:
        return Simulation(0, task, operator, "", {}).answer(False)

    same = [wrong(task, "Custom") == wrong(task, "AnswerGenerate") for task in medium("math")]
    assert sum(same) / len(same) == pytest.approx(1 / 4 + 3 / 4 * 1 / 3, abs=0.045)  # both the usual one, or by chance, of three


@pytest.mark.parametrize(("role", "right", "inputs", "expected"), [
    ("solve", holds_gold, {}, 0.35), ("solve", holds_gold, {"solution": GOLD}, 0.85),
    ("check", rejects, {"solution": WRONG}, 0.50), ("check", rejects, {"solution": GOLD}, 0.15),
    ("revise", holds_gold, {"solution": WRONG, "feedback": "One step does not hold."}, 0.50), ("revise", holds_gold, {}, 0.35),
    ("ensemble", holds_gold, {"candidates": (GOLD, WRONG)}, 0.65), ("ensemble", holds_gold, {}, 0.35),
    ("format", holds_gold, {"solution": GOLD}, 0.98),
])
def test_an_operator_that_is_not_in_the_tables_is_as_good_as_its_role(
        role: str, right: Callable[[str, Task], bool], inputs: dict, expected: float) -> None:
    """Named as methods of the simulation are, to be sure that it is the role that decides."""
    for name in ("Mine", "prose"):
        assert share("math", name, right, role=role, **inputs) == pytest.approx(expected, abs=0.045)


def test_a_checker_that_is_not_shown_a_solution_tosses_a_coin() -> None:
    assert share("qa", "Mine", rejects, role="check") == pytest.approx(0.5, abs=0.045)  # 0.75 and 0.08 for one that sees it


def test_an_operator_that_is_not_in_the_tables_answers_in_the_form_of_its_role() -> None:
    for source in ("toy_math", "toy_qa", "toy_code"):
        for task, name in itertools.product(toy_tasks(source, 8, 3), simulated.LIKE.values()):
            mine = replace(REGISTRY[name], name="Mine")
            canvas = Canvas(task, {"Custom": REGISTRY["Custom"], "Mine": mine}, SimulatedBackend(), CanvasConfig())
            canvas.graph = Graph.from_text("[Custom, Custom] -> Mine")
            canvas.run_graph()
            assert canvas.results["n2"].error == "", name
            assert mine.role != "check" or canvas.results["n2"].passed is not None


def test_hard_tasks_are_solved_less_often() -> None:
    def solved(level: int) -> float:
        made = [Task(f"t{i}", "s", "math", "?", (GOLD,), meta={"level": level}) for i in range(600)]
        return sum(holds_gold(simulate(task, "Programmer"), task) for task in made) / 600

    shares = [solved(level) for level in (1, 2, 3, 4)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[3] > 0.25


def test_one_program_in_five_that_is_wrong_does_not_even_parse() -> None:
    replies = [simulate(task, "Programmer") for task in medium("math")]
    wrong = [reply for reply, task in zip(replies, medium("math"), strict=True) if not holds_gold(reply, task)]
    assert sum("print(answer\n" in reply for reply in wrong) / len(wrong) == pytest.approx(0.2, abs=0.06)


def test_a_wrong_answer_is_of_the_right_form_and_never_a_right_one() -> None:
    for source in ("toy_math", "toy_qa"):
        for task in toy_tasks(source, 60, 5):
            answers = {Simulation(seed, task, "Custom", "", {}).answer(False) for seed in range(8)}
            assert len(answers) > 1
            assert not {simulated._plain(text) for text in answers} & {simulated._plain(text) for text in task.answers}
    for gold in "abcde":
        answers = {Simulation(seed, Task("t", "mathqa", "choice", "?", (gold,)), "Custom", "", {}).answer(False)
                   for seed in range(30)}
        assert len(answers) == 3
        assert answers < set("abcde") - {gold}


def test_every_operator_answers_in_a_form_that_the_operator_reads() -> None:
    rng = random.Random(1)
    for source in ("toy_math", "toy_qa", "toy_code"):
        for task in toy_tasks(source, 4, 3):
            for op in REGISTRY.values():
                state = {"problem": task.problem, "plan": "", "subproblems": "", "code": task.answers[0], "feedback": "",
                         "solution": rng.choice([task.answers[0], "print(1)"]), "candidates": (task.answers[0], "print(1)")}
                if op.name in ("Programmer", "Test"):
                    continue  # they run programs; the next tests and those of operators.py do
                seen = {key: state[key] for key in op.reads}

                def complete(text: str, inputs: Any, task: Task = task, name: str = op.name) -> str:
                    return simulate(task, name, **inputs)

                context = Context(op.name, op.prompt, task.kind, task.entry_point, task.public_tests, seen, complete)
                assert op.run(context).error == "", (op.name, task.kind)


# ---- the simulated executor: its programs


def passes(program: str, tests: str) -> bool:
    """Run our own constants in this process: a sandbox for each of hundreds would take minutes."""
    try:
        exec(f"{program}\n{tests}", {})
    except (AssertionError, IndexError):  # how our wrong programs fail; any other error is a mistake in them
        return False
    return True


def test_wrong_programs_fail_hidden_tests_and_only_the_third_kind_passes_the_public_ones() -> None:
    for task in toy_tasks("toy_code", 40, 11):
        assert passes(task.answers[0], task.public_tests)
        assert passes(task.answers[0], task.hidden_tests)
        wrong = [simulated._wrong_program(task, k) for k in range(3)]
        assert [passes(program, task.hidden_tests) for program in wrong] == [False] * 3, task.id
        assert [passes(program, task.public_tests) for program in wrong] == [False, False, True], task.id


def test_the_sandbox_agrees_on_what_the_simulated_programmer_writes() -> None:
    found = set()
    for task in toy_tasks("toy_code", 4, 2):
        program = extract_code(simulate(task, "CustomCodeGenerate"))
        if program is None or "answer\n" in program:
            continue
        right = Simulation(0, task, "", "", {}).is_right(program)
        assert run_tests(program, task.hidden_tests, task.entry_point).passed == right
        found.add(right)
    assert found == {True, False}


def test_replies_carry_their_usage() -> None:
    reply = SimulatedBackend(0).complete(ASK)
    assert isinstance(reply, Reply)
    assert (reply.usage.calls, reply.usage.prompt_tokens) == (1, len(ASK.text) // 4)
