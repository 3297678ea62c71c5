"""rewards.py and mathgrade.py: what is right, what is wrong, what is our own failure, and what a workflow earns.

Each table names where its rule comes from; "ours" marks a rule that no protocol fixes.
"""

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mathgrade
import rewards
import sandbox
from graph import Graph
from operators import library
from rewards import Grade, RewardConfig, grade, reward
from tasks import Task, from_record, read_tasks, toy_tasks

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"


def task(source: str, *answers: str, kind: str = "qa", **more: object) -> Task:
    return Task(f"{source}/1", source, kind, "?", answers, **more)


# ---- math

NUMBERS = [
    # gold, answer, right.  Extraction: SANDBOX 6.3, then "answer is" in the last line (ours)
    ("5", r"\boxed{5}", 1),
    ("5", r"it is \boxed{4}, no, \boxed{5}", 1),
    ("5", r"it is \boxed{5}, no, \boxed{4}", 0),
    ("5", r"\boxed{\boxed{5}}", 1),
    ("5", r"\boxed{5", 0),  # unclosed: no box
    ("5", r"\boxed{5} so \boxed{4", 1),  # the last balanced one
    ("5", r"\fbox{5}", 1),  # Hendrycks reads fbox as well
    ("72", "#### 72", 1),  # GSM8K
    ("72", "#### 71\n#### 72\nbye", 1),
    ("72", "6 * 12 = 72", 0),
    ("42", "42", 1),
    ("42", "So 6 * 7 = 42. The answer is 42.", 1),
    ("42", "The answer is 41.\nNo: the answer is 42", 1),
    ("42", "The answer is 42.\nOr is it?", 0),  # only the last line counts
    ("42", "Final answer: **42**.", 1),
    ("42", "The answer is $42$.", 1),
    ("42", "Let $x$ be it. The answer is 42.", 1),
    ("42", "first $41$, then $42$", 1),
    ("42", r"first \(41\), then \(42\)", 1),
    ("42", r"\[x = 42\]", 1),
    ("42", "$$42$$", 1),
    ("42", "it costs $40, then $42", 0),  # pandoc's rule: these are prices
    ("42", "it costs $42 $40", 0),
    ("42", "I found 42", 0),  # prose is not searched
    ("42", "the answer is 41 or 42", 0),  # two guesses
    ("42", "41, 42", 0),
    ("42", "0" * 3000 + r" \boxed{42}", 1),  # the end of a long answer counts
    ("42", r"\boxed{42}" + " " + "x" * 3000, 0),
    # exact numbers: GSM8K removes commas, lm-eval `$` and a last dot; Fractions decide
    ("8400", "$8,400", 1),
    ("8400", r"\$8,400.00", 1),
    ("8,400", "8400", 1),
    ("1000", "1{,}000", 1),  # MATH
    ("1000", r"1\,000", 1),
    ("1000", "10,00", 0),
    ("5", "5.", 1),
    ("5", "5.01", 0),
    ("5", "-5", 0),
    ("-5", "−5", 1),  # a typographic minus
    ("5", "٥", 0),  # only ASCII digits (PRM800K accepts others)
    ("12", "1 2", 0),
    ("0.5", "1/2", 1),
    ("1/2", r"\frac{2}{4}", 1),
    ("1/2", r"\dfrac12", 1),
    ("-1/2", r"-\frac{1}{2}", 1),
    ("-1/2", r"\frac{-1}{2}", 1),
    ("-1/2", r"\frac{1}{-2}", 1),
    ("1/3", "0.333333", 0),  # exact
    ("7/2", r"3\frac{1}{2}", 1),
    ("15/4", "3 3/4", 1),
    ("33/4", "3 3/4", 0),
    ("21/2", "2 1/2", 0),
    ("5", "5/0", 0),
    ("0.001", "1e-3", 1),  # Python prints such numbers
    ("5", "x = 5", 1),
    ("5", "4 = 5", 0),
    ("5", "x = 4 = 5", 0),
    ("90", r"90^\circ", 1),
    ("90", "90°", 1),
    ("18", "18 dollars", 1),
    ("18", r"18\text{ cm}^2", 1),
    (r"5.4 \text{ cents}", "5.4", 1),
    (r"5.4 \text{ cents}", "5.5", 0),
    ("18", "18 million", 0),
    ("3", "3 pi", 0),
    ("50", r"50\%", 1),  # Hendrycks drops \%
    (r"50\%", "0.5", 1),  # math-verify divides
    ("50", "0.5", 0),
    # ours: a calculation is not an answer, the question may hold it
    ("57", "12 + 45", 0),
    ("1024", "2^{10}", 0),
    ("4", r"\sqrt{16}", 0),
    ("9", "9^{9^{9^9}}", 0),
]

EXPRESSIONS = [
    # gold, answer, right: strings, then math-verify's own rules
    (r"14+7\sqrt{2}", r"7\sqrt{2}+14", 1),
    (r"14+7\sqrt{2}", r"14 - 7\sqrt{2}", 0),
    (r"\sqrt{8}", r"2\sqrt2", 1),
    (r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt{3}}{2}", 1),
    ("x+y", "y+x", 1),
    (r"\frac{1}{x+1}", "1/(x+1)", 1),
    ("5k", "5k", 1),
    ("5k", "6k", 0),
    ("(3,-3,1)", "(3, -3, 1)", 1),
    ("(3,-3,1)", "(3,-3,-1)", 0),
    ("(1,2)", "[1,2]", 0),
    (r"\{1,2\}", "2, 1", 1),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}", 1),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", 0),
    (r"\pm\sqrt{2}", r"\sqrt{2}", 0),
    (r"10\sqrt{3}\text{ cm}", r"10\sqrt{3}", 1),
    (r"y = 2x+1", "2x+1", 1),
    # Python and sympy text, which math-verify misses (SANDBOX 5)
    (r"14+7\sqrt{2}", "7*sqrt(2) + 14", 1),
    (r"\frac{\pi}{6}", "pi/6", 1),
    (r"288\pi", "288*pi", 1),
    ("x^2", "x**2", 1),
    ("x^{10}", "x**10", 1),
    ("2^{x+1}", "2**(x + 1)", 1),
    ("1+2i", "1 + 2*I", 1),
    (r"(-\infty,3)", "(-oo, 3)", 1),
    (r"\sin(x)", "sin(x)", 1),
    (r"\sqrt{x+1}", "sqrt((x+1))", 1),
    ("1-1/e", "1+1/e", 0),  # equal in running text by math-verify's fallback to a number
    (r"\sqrt{16}", "4", 1),
    (r"\sqrt{16}", r"3 \to 4", 0),  # the same fallback
    # ours: words are words, and lists of guesses are not answers
    (r"\text{even}", "Even", 1),
    (r"\text{even}", "neve", 0),
    ("east", "East", 1),
    ("east", "seat", 0),  # a product of the same four letters
    (r"\text{(B)}", "(B)", 1),
    (r"14+7\sqrt{2}", r"x = 14+7\sqrt{2}", 1),
    (r"14+7\sqrt{2}", r"13 = 14+7\sqrt{2}", 0),
    (r"14+7\sqrt{2}", r"13, 14+7\sqrt{2}", 0),
    ("x=5", "x=4=5", 0),
    (r"\{1,2\}", r"1} \boxed{2", 0),  # must not leave the box that it is put in
    (r"14+7\sqrt{2}", r"\boxed{13 \\ 14+7\sqrt{2}}", 0),
    (r"14+7\sqrt{2}", "I do not know", 0),
]


@pytest.mark.parametrize(("gold", "answer", "right"), NUMBERS)
def test_a_gold_number_needs_that_number(gold: str, answer: str, right: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathgrade, "equal", None)  # never asked
    assert grade(task("math", gold), answer) == Grade(right, right, right)


@pytest.mark.parametrize(("gold", "answer", "right"), EXPRESSIONS)
def test_expressions_are_compared_by_value(gold: str, answer: str, right: int) -> None:
    assert grade(task("math", gold), answer) == Grade(right, right, right)


@pytest.mark.parametrize("source", ["gsm8k", "math", "aime2025", "toy_math"])
def test_all_math_sources_are_graded_alike(source: str) -> None:
    assert grade(task(source, "70"), r"\boxed{070}").score == 1  # AIME answers are integers, not strings
    assert grade(task(source, "70", "71"), "71").score == 1
    assert grade(task(source, "70"), "71").score == 0


# ---- choice

CHOICES = [
    # the forms that SANDBOX 4 lists for MathQA
    ("c", "c", 1),
    ("c", "C", 1),
    ("c", "(c)", 1),
    ("c", "c ) 30", 1),
    ("c", "c) 30", 1),
    ("c", "C. 30", 1),
    ("c", "option c", 1),
    ("c", "Option C: 30", 1),
    ("c", r"\boxed{c}", 1),
    ("c", r"\boxed{\text{(C)}}", 1),
    ("c", "The answer is (c).", 1),
    ("c", "I think 30 is it.\nAnswer: C", 1),
    ("c", "**c**", 1),
    ("c", "d", 0),
    ("c", "b) 30", 0),
    ("c", "30", 0),  # the value for the letter
    ("c", "a, b or c", 0),
    ("a", "a train is fast", 0),  # an article is no letter
    ("e", "e.g. this one", 0),
    ("c", "c d", 0),
]


@pytest.mark.parametrize(("gold", "answer", "right"), CHOICES)
def test_a_choice_is_its_letter(gold: str, answer: str, right: int) -> None:
    assert grade(task("mathqa", gold, kind="choice"), answer) == Grade(right, right, right)


def test_a_choice_whose_gold_is_no_letter_is_compared_as_text() -> None:
    assert grade(task("quiz", "True", kind="choice"), "true").score == 1
    assert grade(task("quiz", "True", kind="choice"), "false").score == 0


# ---- question answering

QA = [
    # source, golds, answer, EM, F1
    # evaluate-v2.0.py: lower, ASCII punctuation, articles, blanks; F1 over token multisets
    ("nq", ["Talia Shire"], "talia shire", 1, 1),
    ("nq", ["Talia Shire"], "The Talia  Shire!", 1, 1),
    ("nq", ["Talia Shire"], "Talia", 0, 2 / 3),
    ("nq", ["Talia Shire"], "It is Talia Shire", 0, 2 / 3),
    ("nq", ["a b c"], "b b c", 0, 4 / 5),  # articles go first: b c against b b c
    ("nq", ["x x y"], "x z x x", 0, 4 / 7),
    ("nq", ["14 December 1972 UTC", "December 1972"], "December 1972", 1, 1),  # maximum over the aliases
    ("nq", ["14 December 1972 UTC", "December 1972"], "1972", 0, 2 / 3),
    ("nq", ["O'Connor"], "OConnor", 1, 1),
    ("nq", ["“quoted”"], "quoted", 0, 0),  # typographic quotes stay
    ("nq", ["yes"], "yes it is", 0, 1 / 2),  # no such rule here
    ("nq", ["an apple"], "banana", 0, 0),
    ("nq", ["apple"], "theapple", 0, 0),  # articles are words
    ("toy_qa", ["the Velm", "Velm"], "Velm.", 1, 1),
    ("other", ["Velm"], "velm", 1, 1),
    # SQuAD v2: golds that normalise to "" are dropped, none left is unanswerable
    ("squad_v2", [""], "", 1, 1),
    ("squad_v2", [""], "the", 1, 1),
    ("squad_v2", ["", "the"], "a.", 1, 1),
    ("squad_v2", [""], "Paris", 0, 0),
    ("squad_v2", ["Paris"], "", 0, 0),
    ("squad_v2", ["Paris", ""], "", 0, 0),
    ("squad_v2", ["in Paris", "Paris"], "paris", 1, 1),
    ("squad_v2", [""], "Unanswerable.", 1, 1),  # ours; the script gives 0
    ("squad_v2", [""], "no answer", 1, 1),
    ("squad_v2", [""], "no answer is known for Paris", 0, 0),
    ("squad_v2", ["No answer"], "no answer", 1, 1),
    ("squad_v2", ["Paris"], "no answer", 0, 0),
    # hotpot_evaluate_v1.py: yes, no and noanswer match themselves only; two empty texts have EM 1 and F1 0
    ("hotpotqa", ["yes"], "Yes.", 1, 1),
    ("hotpotqa", ["yes"], "yes it is", 0, 0),
    ("hotpotqa", ["yes it is"], "yes", 0, 0),
    ("hotpotqa", ["no"], "yes", 0, 0),
    ("hotpotqa", ["noanswer"], "noanswer found", 0, 0),
    ("hotpotqa", ["Dewey Lake Monster"], "the Lake Monster", 0, 4 / 5),
    ("hotpotqa", ["the"], "a", 1, 0),
    # triviaqa_evaluation.py: punctuation and _ become blanks, quotes too
    ("triviaqa", ["O'Connor"], "o connor", 1, 1),
    ("triviaqa", ["O'Connor"], "OConnor", 0, 0),
    ("triviaqa", ["snow_white"], "Snow White", 1, 1),
    ("triviaqa", ["‘Snow’ White"], "snow white", 1, 1),
    ("triviaqa", ["A-ha"], "ha", 1, 1),
    ("triviaqa", ["Sunset Blvd", "Sunset Boulevard"], "on Sunset Boulevard", 0, 4 / 5),
]


@pytest.mark.parametrize(("source", "golds", "answer", "em", "f1"), QA)
def test_question_answering_follows_the_official_scripts(
    source: str, golds: list[str], answer: str, em: float, f1: float
) -> None:
    result = grade(task(source, *golds), answer)
    assert (result.em, result.f1, result.score) == (em, pytest.approx(f1), pytest.approx(f1))
    assert (result.passed, result.error) == (None, "")


def test_there_are_eighty_cases() -> None:
    assert len(NUMBERS) + len(EXPRESSIONS) + len(CHOICES) + len(QA) >= 80


@pytest.mark.parametrize("source", ["gsm8k", "mathqa", "nq", "hotpotqa", "triviaqa", "toy_qa", "humaneval"])
def test_an_empty_answer_is_wrong_without_asking_a_grader(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in rewards.BY_KIND:
        monkeypatch.setitem(rewards.BY_KIND, name, None)
    for name in rewards.BY_SOURCE:
        monkeypatch.setitem(rewards.BY_SOURCE, name, None)
    result = grade(task(source, "the"), " \n")
    assert (result.score, result.error) == (0, "")
    assert result.passed is (False if source == "humaneval" else None)


def test_the_source_comes_before_the_kind() -> None:
    assert grade(Task("1", "gsm8k", "qa", "?", ("1/2",)), "0.5").score == 1
    assert grade(Task("1", "unheard_of", "math", "?", ("1/2",)), "0.5").score == 1
    assert grade(Task("1", "unheard_of", "qa", "?", ("1/2",)), "0.5").score == 0


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.text(alphabet="\\boxed{}$#.,/%frac-12 =answeris\n()*", max_size=80))
def test_no_text_breaks_a_grader(text: str) -> None:
    for source in ("gsm8k", "mathqa", "nq", "squad_v2", "hotpotqa", "triviaqa"):
        result = grade(task(source, "12"), text)
        assert 0 <= result.score <= 1
        assert result.error == ""
    mathgrade.to_latex(text)
    if mathgrade._plain(mathgrade.math_answer(text)):
        assert mathgrade.same_math(text, text)


# ---- math-verify's process


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Let mathgrade use one fresh worker with short limits, and let the test change what the worker is."""
    idle: queue.LifoQueue = queue.LifoQueue()
    idle.put(None)
    monkeypatch.setattr(mathgrade, "_idle", idle)

    def use(change: str) -> None:
        worker = tmp_path / "worker.py"
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mathgrade; mathgrade.LIMIT = 2.0"
        worker.write_text(f"{start}\n{change}\nmathgrade._serve()\n")
        monkeypatch.setattr(mathgrade, "__file__", str(worker))

    use("")
    yield use
    for worker in idle.queue:
        mathgrade._stop(worker)


SLOW = r"(99999^{9999})^{9999} + \sqrt{2}"
HARD = task("math", r"1+\sqrt{2}")


def test_an_answer_that_takes_too_long_is_our_error_and_hurts_no_other(one_worker: object) -> None:
    result = grade(HARD, SLOW)
    assert (result.score, "needed more than 2 s" in result.error) == (0, True), result.error
    worker = mathgrade._idle.queue[0]
    assert grade(HARD, r"\sqrt{2}+1").score == 1
    assert mathgrade._idle.queue[0] is worker  # the alarm is enough: the process lives on


def test_a_worker_that_hears_no_alarm_is_ended_and_replaced(one_worker: object) -> None:
    one_worker("mathgrade._expire = lambda number, frame: None; mathgrade.WATCHDOG = 4.0")
    assert "crashed or hung" in grade(HARD, SLOW).error
    one_worker("")
    assert grade(HARD, r"\sqrt{2}+1").score == 1


def test_a_crash_is_our_error_and_the_next_answer_is_graded(one_worker: object) -> None:
    assert grade(HARD, r"\sqrt{2}+1").score == 1
    mathgrade._idle.queue[0].kill()
    mathgrade._idle.queue[0].wait()
    assert grade(HARD, r"\sqrt{2}+1").score == 1  # an idle worker that died is replaced without loss
    one_worker("import os; mathgrade._compare = lambda gold, answer: os._exit(3)")
    mathgrade._stop(mathgrade._idle.queue[0])
    assert "crashed or hung" in grade(HARD, r"\sqrt{2}+1").error
    one_worker("")
    assert grade(HARD, r"\sqrt{2}+1").score == 1


def test_a_missing_math_verify_is_our_error_and_says_how_to_get_it(one_worker: object) -> None:
    one_worker("sys.modules['math_verify'] = None")
    assert "pip install 'math-verify" in grade(HARD, r"\sqrt{2}+1").error
    assert grade(HARD, r"1+\sqrt{2}").score == 1  # strings and numbers do not need it


def test_too_much_memory_is_our_error(one_worker: object) -> None:
    one_worker("def hungry(*texts):\n    bytearray(8 << 30)\nsys.modules['math_verify'] = type(sys)('math_verify')\n"
               "sys.modules['math_verify'].__dict__.update(parse=lambda *a, **k: 1, verify=lambda *a, **k: hungry(), "
               "LatexExtractionConfig=lambda: 1)")  # fmt: skip
    assert grade(HARD, r"\sqrt{2}+1").error.startswith("math-verify ran out of memory")


def test_a_worker_sees_no_credentials_and_no_chatter_is_taken_for_a_verdict(
    one_worker: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXECUTOR_API_KEY", "secret")
    one_worker("import os\ndef spy(gold, answer):\n    print('true')\n    os.write(1, b'true')\n"
               "    return 'saw ' + repr(os.environ.get('EXECUTOR_API_KEY'))\nmathgrade._compare = spy")  # fmt: skip
    assert grade(HARD, r"\sqrt{2}+1").error.startswith("saw None")


def test_sixteen_threads_get_their_own_verdicts() -> None:
    cases = [(f"{i}+\\sqrt{{2}}", f"\\sqrt{{2}}+{i + i % 2}", float(i % 2 == 0)) for i in range(48)]
    with ThreadPoolExecutor(16) as pool:
        scores = list(pool.map(lambda case: grade(task("math", case[0]), case[1]).score, cases))
    assert scores == [right for _, _, right in cases]


USE = "from tasks import Task\nfrom rewards import grade\nT = Task('1', 'math', 'math', '?', (r'1+\\sqrt{2}',))\n"
PRINT = r"print(grade(T, r'\sqrt{2}+1').score)" + "\n"


@pytest.mark.parametrize("way", ["-c", "script without a __main__ guard", "stdin"])
def test_grading_works_however_python_was_started(way: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(USE + PRINT)
    args = {"-c": ["-c", USE + PRINT], "stdin": ["-"]}.get(way, [str(script)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    text = USE + PRINT if way == "stdin" else None
    done = subprocess.run(
        [sys.executable, *args], cwd=tmp_path, env=environment, input=text, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr, done.returncode) == ("1.0\n", "", 0)


@pytest.mark.parametrize("end", ["exit", "kill", "busy"])
def test_no_worker_outlives_the_program(end: str, tmp_path: Path) -> None:
    code = USE + PRINT + "import mathgrade, os, sys, threading, time\npid = mathgrade._idle.queue[-1].pid\n"
    if end == "busy":  # a grading is under way in a thread that nobody waits for
        code += f"threading.Thread(target=grade, args=(T, {SLOW!r}), daemon=True).start(); time.sleep(0.3)\n"
    code += "print(pid, flush=True)\n" + ("time.sleep(60)\n" if end == "kill" else "")
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "1.0\n"
    worker = int(program.stdout.readline())
    if end == "kill":
        program.kill()
    assert program.wait(60) == (-signal.SIGKILL if end == "kill" else 0)
    program.stdout.close()
    deadline = time.monotonic() + 4  # sooner than a busy worker's own limit
    while alive(worker):
        assert time.monotonic() < deadline, f"worker {worker} is still there"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


# ---- code

DOUBLE = {"entry_point": "double", "hidden_tests": "assert double(2) == 4\nassert double(0) == 0", "kind": "code"}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("def double(x):\n    return 2 * x", 1),
        ("```python\ndef double(x):\n    return 2 * x\n```", 1),
        ("First\n```python\ndef double(x): return x\n```\nbetter\n```python\ndef double(x): return 2 * x\n```\n.", 1),
        ("```python\ndef double(x): return 2 * x\n```\nworse\n```python\ndef double(x): return x\n```", 0),
        ("def double(x):\n    return 4", 0),
        ("def double(x)", 0),
        ("All tests pass.", 0),
        ("raise SystemExit(0)", 0),
    ],
)
def test_code_passes_all_hidden_tests_or_fails(answer: str, right: int) -> None:
    assert grade(task("toy_code", "", **DOUBLE), answer) == Grade(right, right, right, passed=bool(right))


HUMANEVAL = from_record({
    "problem": "from typing import List\n\ndef one():\n    return 1\n\ndef add(x: List[int]) -> int:\n    '''Add 1.'''\n",
    "ground_truth": "    return sum(x) + one()\n",
    "source": "humaneval",
    "meta": {"entry_point": "add", "test": "def check(candidate):\n    assert candidate([1, 2]) == one() + 3\n"},
})  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return sum(x) + one()", 1),  # the protocol: prompt + completion
        ("```python\n    return sum(x) + one()\n```", 1),
        ("def add(x: List[int]) -> int:\n    return sum(x) + 1", 1),  # with the imports of the prompt
        ("def add(x):\n    return sum(x) + one()", 1),  # and its helpers
        ("from __future__ import annotations\ndef add(x):\n    return sum(x) + 1", 1),
        ("    return sum(x)", 0),
        ("def plus(x):\n    return sum(x) + 1", 0),
        ("", 0),
    ],
)
def test_humaneval_answers_follow_their_prompt(answer: str, right: int) -> None:
    assert grade(HUMANEVAL, answer).passed is bool(right)
    assert grade(HUMANEVAL, HUMANEVAL.answers[0]).passed


def test_a_program_is_judged_once_for_equal_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    wait = threading.Event()

    def run_tests(code: str, tests: str | list, entry_point: str | None = None) -> sandbox.TestResult:
        calls.append(code)
        wait.wait(5)
        return sandbox.TestResult(True, 1, 1, "", 0.1)

    monkeypatch.setattr(rewards, "run_tests", sandbox.memoised(run_tests))
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(grade, task("toy_code", "", kind="code", hidden_tests=[{"input": "", "output": ""}]), "x")
        ] * 4
        wait.set()
        assert all(future.result().passed for future in futures)
    assert len(calls) == 1


def test_failures_of_the_sandbox_and_missing_tests_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grade(task("apps", "x", kind="code"), "print()").error == "apps/1 has no hidden tests"
    result = sandbox.TestResult(True, 0, 0, "", 0.0)
    monkeypatch.setattr(rewards, "run_tests", lambda *args: result)
    assert "test nothing" in grade(task("toy_code", "", **DOUBLE), "x").error

    def fail(*args: object) -> None:
        raise sandbox.SandboxError("no descriptor left")

    monkeypatch.setattr(rewards, "run_tests", fail)
    assert grade(task("toy_code", "", **DOUBLE), "x") == Grade(0, 0, 0, None, "no descriptor left")


def test_a_program_that_is_too_slow_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = sandbox.TestResult(False, 0, 1, "timeout after 10 s", 10.0)
    monkeypatch.setattr(rewards, "run_tests", lambda *args: result)
    assert grade(task("toy_code", "", **DOUBLE), "while 1: pass") == Grade(0, 0, 0, False)


# ---- gold answers


@pytest.mark.parametrize("name", ["gsm8k", "math", "hotpotqa", "nq"])
def test_real_gold_answers_are_right_and_others_wrong(name: str) -> None:
    if not (DATA / f"{name}.jsonl").exists():
        pytest.skip(f"no {name}.jsonl in ../shared/data")
    for each in read_tasks(DATA / f"{name}.jsonl"):
        wrapped = [rf"so it is \boxed{{{gold}}}." for gold in each.answers if each.kind == "math"]
        for answer in (*each.answers, *wrapped):
            assert grade(each, answer) == Grade(1, 1, 1), (each.id, answer)
        assert grade(each, "zzz 17/91").score == 0, each.id


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_real_reference_programs_pass(name: str) -> None:
    if not (DATA / f"{name}.jsonl").exists():
        pytest.skip(f"no {name}.jsonl in ../shared/data")
    for each in read_tasks(DATA / f"{name}.jsonl")[::6]:  # every sixth: all 96 take 15 s, and all 96 pass
        assert grade(each, each.answers[0]).passed, each.id
        assert grade(each, f"def {each.entry_point}(*args):\n    return 'wrong'").passed is False, each.id


@pytest.mark.parametrize(("source", "n"), [("toy_math", 100), ("toy_qa", 100), ("toy_code", 4)])
def test_toy_gold_answers_are_right_and_distractors_wrong(source: str, n: int) -> None:
    for each in toy_tasks(source, n, 11):
        for answer in each.answers:
            assert grade(each, answer).score == 1, each
        for answer in each.meta["distractors"]:
            result = grade(each, answer)
            assert (result.score, result.error) == (0, ""), (each, answer)


# ---- reward


def canvas_of(checker: bool, form: bool, operators: bool, structure: bool) -> SimpleNamespace:
    """A canvas with exactly these features."""
    stages = ["[Plan, Custom]" if structure else "Plan"]
    stages += ["Verify"] * checker + ["Format"] * form
    stages += ["Custom"] * (5 - len(stages) - structure if operators else 0)
    return SimpleNamespace(graph=Graph.from_text(" -> ".join(stages)), library=library())


FEATURES = list(itertools.product((False, True), repeat=4))
DIVERSITY = {  # checker, format, operators, structure -> R_div, by hand
    (0, 0, 0, 0): 0.0, (0, 0, 0, 1): 0.4, (0, 0, 1, 0): 0.2, (0, 0, 1, 1): 0.6,
    (0, 1, 0, 0): 0.2, (0, 1, 0, 1): 0.6, (0, 1, 1, 0): 0.4, (0, 1, 1, 1): 0.8,
    (1, 0, 0, 0): 0.2, (1, 0, 0, 1): 0.6, (1, 0, 1, 0): 0.4, (1, 0, 1, 1): 0.8,
    (1, 1, 0, 0): 0.4, (1, 1, 0, 1): 0.8, (1, 1, 1, 0): 0.6, (1, 1, 1, 1): 1.0,
}  # fmt: skip


@pytest.mark.parametrize("score", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("features", FEATURES)
def test_signs_are_separated(features: tuple[bool, ...], score: float) -> None:
    parts = reward(canvas_of(*features), Grade(score, score, score), RewardConfig())
    feasible = all(features)
    assert parts.diversity == pytest.approx(DIVERSITY[features])
    assert parts.answer == (score if feasible else 0)
    assert parts.total == parts.base + parts.diversity + parts.answer
    assert (parts.checker, parts.format, parts.operators, parts.structure) == tuple(
        weight * has for weight, has in zip((0.2, 0.2, 0.2, 0.4), features, strict=True)
    )
    if feasible:
        assert parts.total == score  # exactly: R_div is 1, not 1.0000000000000002
    else:
        assert parts.total <= -0.2 + 1e-9


@pytest.mark.parametrize("features", FEATURES)
def test_without_release_the_answer_always_counts(features: tuple[bool, ...]) -> None:
    parts = reward(canvas_of(*features), Grade(0.5, 0, 0.5), RewardConfig(release=False))
    assert parts.total == pytest.approx(-1 + DIVERSITY[features] + 0.5)


@pytest.mark.parametrize("features", FEATURES)
def test_without_diversity_only_the_answer_counts(features: tuple[bool, ...]) -> None:
    for release in (True, False):
        parts = reward(canvas_of(*features), Grade(0.5, 0, 0.5), RewardConfig(diversity=False, release=release))
        assert (parts.total, parts.diversity, parts.answer) == (0.5, 1.0, 0.5)
        assert parts.structure == 0.4 * features[3]  # still reported


@pytest.mark.parametrize(
    "weights",
    [*set(itertools.permutations((0.1, 0.2, 0.3, 0.4))), (0.2, 0.2, 0.2, 0.4), (0.4, 0.2, 0.2, 0.2), (0.7, 0.1, 0.1, 0.1),
     (0.3, 0.3, 0.3, 0.1), (0.5, 0.5, 0.5, 0.5)],
)  # fmt: skip
def test_full_diversity_is_exactly_one(weights: tuple[float, ...]) -> None:
    config = RewardConfig(checker=weights[0], format=weights[1], operators=weights[2], structure=weights[3])
    parts = reward(canvas_of(True, True, True, True), Grade(0.75, 0, 0.75), config)
    assert (parts.diversity, parts.total) == (1.0, 0.75)
    least = min(range(4), key=lambda i: weights[i])
    parts = reward(canvas_of(*[i != least for i in range(4)]), Grade(1, 1, 1), config)
    assert (parts.diversity == 1.0) == (sum(weights) - weights[least] >= 1)


@pytest.mark.parametrize(
    ("text", "checker", "form", "operators", "structure"),
    [
        ("Custom -> Custom -> Custom -> Custom -> Custom", 0, 0, 1, 0),
        ("Test", 1, 0, 0, 0),
        ("Review", 1, 0, 0, 0),
        ("Programmer -> (Verify ? Revise : done)", 1, 0, 0, 1),  # the condition is a checker, and 3 nodes
        ("Programmer -> (Verify ? Revise : Format)", 1, 1, 0, 1),  # so does a branch count
        ("[Programmer, Review, Custom, Format, Custom]", 1, 1, 1, 1),  # and children of a parallel
        ("(Programmer -> Review) * 3", 1, 0, 0, 1),  # a loop's body counts once
        ("(Custom -> Custom -> Custom -> Custom -> Review) * 1 -> Format", 1, 1, 1, 1),
        ("[Custom, Review] -> (Test ? Revise : done) -> (Custom -> Test) * 2", 1, 0, 1, 1),  # each feature counts once
        ("", 0, 0, 0, 0),
    ],
)
def test_features_are_read_from_the_graph(text: str, checker: int, form: int, operators: int, structure: int) -> None:
    canvas = SimpleNamespace(graph=Graph.from_text(text) if text else Graph(), library=library())
    parts = reward(canvas, Grade(1, 1, 1), RewardConfig())
    has = (0.2 * checker, 0.2 * form, 0.2 * operators, 0.4 * structure)
    assert (parts.checker, parts.format, parts.operators, parts.structure) == has


def test_the_number_of_operators_is_a_setting() -> None:
    canvas = SimpleNamespace(graph=Graph.from_text("Custom -> Custom"), library=library())
    assert reward(canvas, Grade(1, 1, 1), RewardConfig(min_operators=2)).operators == 0.2
    assert reward(canvas, Grade(1, 1, 1), RewardConfig(min_operators=3)).operators == 0


@pytest.mark.parametrize("weights", [{"checker": 0.1}, {"structure": 0.0}, {"format": -0.2, "structure": 0.8}])
def test_weights_that_no_workflow_can_fill_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="no answer counts"):
        RewardConfig(**weights)


def test_low_weights_are_fine_where_nothing_is_released() -> None:
    assert RewardConfig(structure=0.0, release=False).structure == 0
    assert RewardConfig(structure=0.0, diversity=False).structure == 0


def test_grades_and_parts_can_be_logged() -> None:
    parts = reward(canvas_of(True, True, True, True), grade(task("nq", "a b"), "b"), RewardConfig())
    assert json.loads(json.dumps(vars(parts)))["total"] == parts.total
