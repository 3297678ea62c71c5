"""Two official protocols for programs that are more than "run these tests": APPS and DS-1000.

APPS (hendrycks/apps, eval/testing_util.py). A program that reads stdin is run once a case, a function is called once a
case, four seconds each, with the imports that the script puts first. Three things of the script are left out, because
they pass wrong programs: the comparison of lines as *sets* of tokens ("3 2 1" for "1 2 3"), rounding to three decimals,
and a tolerance between integers (1000001 for 1000000). Our score can be lower than the script's, never higher for these.

DS-1000 (xlang-ai/DS-1000, test_ds1000.py). The task's code_context runs the solution in its own interpreter. That cannot
be made safe against a program that wants to be judged right (it shares the process with its judge): evaluate with it,
do not train on it. A program that ends the process early has failed, whatever its exit code. A solution is a snippet that
goes on from the code in its question (or completes a function there). That code, which anybody can read, is all that operators
get: Programmer and Test run the snippet inside it. The test inputs, and whatever else code_context holds, are for the grader.
"""

from __future__ import annotations

import importlib.util
import re
import secrets

import sandbox
from sandbox import RunResult, TestResult
from tasks import parse

CASE_SECONDS = 4.0  # testing_util.py's timeout, a case
CALLS_SECONDS = 60.0  # of all calls together, at most
DS1000_SECONDS = 120.0  # test_ds1000.py's timeout
FRAME_SECONDS = 60.0  # of a snippet in the code of its question
DS1000_MEMORY = 8192  # MB of address space: tensorflow and torch reserve several GB
PRELUDE = ("import sys, time, itertools, collections, math, fractions, random, heapq, bisect, string, re, functools, copy; "
           "from itertools import accumulate, product, permutations, combinations; from functools import lru_cache, reduce; "
           "from collections import Counter, OrderedDict, deque, defaultdict, ChainMap; from typing import *; "
           "from math import sqrt, sin, cos, tan, ceil, fabs, floor, gcd, exp, log, log2; from heapq import *\n")
LIBRARIES = {"sklearn": "scikit-learn", "tensorflow": "tensorflow", "skimage": "scikit-image", "PIL": "pillow"}

run_tests = sandbox.memoised(sandbox.run_tests)
run_program = sandbox.memoised(sandbox.run_program)


# -------------------------------------------------------------------------------------------------------------- APPS
def run_apps(code: str, cases: list[dict], entry_point: str | None, wrapped: bool) -> TestResult:
    """Judge a program by {input, output} cases: of stdin and stdout or, with entry_point, of arguments and value.

    `wrapped`: every output came in a list of one, from which it was taken. Ends at the first failure.
    """
    if "from __future__" not in code:
        code = PRELUDE + ("import numpy as np\n" if re.search(r"\bnp\.", code) else "") + code
    if entry_point:
        return run_tests(code, call_tests(cases, entry_point, wrapped), entry_point,
                         min(CASE_SECONDS * len(cases), CALLS_SECONDS))
    seconds = 0.0
    for passed, case in enumerate(cases):
        result = run_tests(code, [{"input": case["input"], "output": case["output"]}], None, CASE_SECONDS)
        seconds += result.seconds
        if not result.passed:
            return TestResult(False, passed, len(cases), result.error, seconds)
    return TestResult(bool(cases), len(cases), len(cases), "", seconds)


def call_tests(cases: list[dict], entry_point: str, wrapped: bool) -> str:
    """APPS' comparison of values as Python text: equal to the output or, where outputs are lists, to its first element;
    tuples count as lists, since JSON has none."""
    tests = ["def _plain(value):", "    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value",
             "def _agrees(got, wanted, also):", "    got = _plain(got)", "    return got == wanted or got in also"]
    for case in cases:
        wanted = case["output"]
        also = [[wanted]] if wrapped else wanted[:1] if isinstance(wanted, list) else []
        given = case["input"] if isinstance(case["input"], list) else [case["input"]]
        tests.append(f"assert _agrees({entry_point}(*{given!r}), {wanted!r}, {also!r})")
    return "\n".join(tests)


# ------------------------------------------------------------------------------------------------------------ DS-1000
def missing_libraries(code_context: str) -> list[str]:
    """What the context imports, also in the program that it keeps as text, and this Python does not have."""
    lines = re.findall(r"^[ \t]*(?:from[ \t]+(\w+)[\w.]*[ \t]+import\b|import[ \t]+([\w., \t]+)$)", code_context, re.MULTILINE)
    names = {re.split(r"[.\s]", part.strip())[0] for one, several in lines for part in (one or several).split(",")} - {""}
    return sorted(LIBRARIES.get(name, name) for name in names if importlib.util.find_spec(name) is None)


def ds1000_solution(text: str) -> str:
    """The snippet in a reply, by the official post-processing: up to </code>, a closing fence or END SOLUTION."""
    text = text.partition("</code>")[0].replace("```python", "").partition("```")[0].partition("\nEND SOLUTION")[0]
    return text.replace("<code>", "").replace("BEGIN SOLUTION", "").strip("\n")


def run_framed(code: str, frame: str) -> RunResult:
    """Run a snippet inside the code that its question shows (tasks.ds1000_frame), which is no test but tells errors.

    Where that code alone does not run (it calls a load_data() that only the tests have, or a library is missing), nothing can
    be said of the snippet: status "ok", unrun.
    """
    if not _frame_runs(frame):
        return RunResult("ok", "", "not run: the code around it does not run by itself", 0.0)
    return run_program(frame.replace("[insert]", code), "", FRAME_SECONDS, DS1000_MEMORY)


def test_framed(code: str, frame: str) -> TestResult | None:
    """The one public test of a snippet: to run in its frame and to set the variables that the frame asks for. None where the
    frame does not run."""
    if not _frame_runs(frame):
        return None
    result = run_framed(code, frame)
    error = "" if result.status == "ok" else f"{result.status}: {result.stderr.strip()[-500:]}"
    return TestResult(not error, int(not error), 1, error, result.seconds)


def _frame_runs(frame: str) -> bool:
    head = frame.partition("[insert]")[0]
    alone = head if parse(head) else f"{head}    pass"  # it ends inside a function
    return run_program(alone, "", FRAME_SECONDS, DS1000_MEMORY).status == "ok"


def run_ds1000(solution: str, code_context: str) -> RunResult:
    """Run test_execution(solution), and test_string(solution) where there is one. Passed: status "ok"."""
    nonce = secrets.token_hex(16)  # printed after the tests: sys.exit() in the solution does not get there
    lines = [code_context, f"_solution = {solution!r}", "test_execution(_solution)"]
    lines += ["test_string(_solution)"] if re.search(r"^def test_string\(", code_context, re.MULTILINE) else []
    # A figure is drawn to nowhere; numpy and sklearn must not write below a home that is read-only.
    head = "import os\nos.environ.update(MPLBACKEND='Agg', MPLCONFIGDIR='/tmp', TF_CPP_MIN_LOG_LEVEL='3')\n"
    result = sandbox.run_program(f"{head}{chr(10).join(lines)}\nprint('\\n{nonce}')", "", DS1000_SECONDS, DS1000_MEMORY)
    if result.status == "ok" and result.stdout.rstrip().rpartition("\n")[2] != nonce:
        return RunResult("error", result.stdout, "the program ended before its tests did", result.seconds)
    return result
