"""Ordinary programs and tests, each with a wrong twin: their verdicts must be those of plain Python, which shares a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox import run_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="containment is written against Linux")
TEXT = (Path(__file__).parent / "ordinary_programs.txt").read_text(encoding="utf-8")
CASES: dict[str, list[str]] = {}  # name: [program, wrong program, tests]
for _case in TEXT.removeprefix("=== ").split("\n=== "):
    _name, _, _body = _case.partition("\n")
    CASES[_name] = [_body.partition("--- wrong\n")[0], *_body.partition("--- wrong\n")[2].split("--- tests\n")]
PLAIN = """
import asyncio, io, json, sys, types, unittest
def passes(program, tests):
    space = sys.modules["tests"] = types.ModuleType("tests")
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
    sys.setrecursionlimit(1000)
    try:
        exec(compile(program + "\\n" + tests, "tests", "exec", dont_inherit=True), space.__dict__)
        for name, value in list(vars(space).items()):
            if name == "check" or (name.startswith("test_") and callable(value)):
                value(*[space.f] if name == "check" else [])
            if name.startswith("Test") and not issubclass(value, unittest.TestCase):
                it = value()
                it.setup_method()
                [getattr(it, name)() for name in vars(value) if name.startswith("test")]
        return unittest.TextTestRunner().run(unittest.TestLoader().loadTestsFromModule(space)).wasSuccessful()
    except BaseException:
        return False
verdicts = [[passes(program, tests), passes(wrong, tests)] for program, wrong, tests in json.load(sys.stdin)]
print(verdicts, file=sys.__stdout__)
"""


def test_plain_python_accepts_every_program_and_refuses_its_wrong_twin() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN], input=json.dumps([*CASES.values()]), text=True,
                          capture_output=True, check=True, timeout=120)
    wrong = [name for name, verdicts in zip(CASES, json.loads(done.stdout.lower()), strict=True) if verdicts != [True, False]]
    assert wrong == []


@pytest.mark.parametrize("name", CASES)
def test_an_ordinary_program_passes_and_its_wrong_twin_fails(name: str) -> None:
    program, wrong, tests = CASES[name]
    entry = "f" if "def check(" in tests else None
    good = run_tests(program, tests, entry)
    assert good.passed, good
    assert not run_tests(wrong, tests, entry).passed
