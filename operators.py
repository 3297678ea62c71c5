"""The operator library: what a node of a workflow can do.

An operator is one small function, a description (what the policy reads to choose it) and a default prompt, registered by
name. The function sees a `Context`: the public side of the task, the prompt of its node, and exactly the inputs that it
declared in `reads`. The canvas re-runs a node only when its operator, its prompt or one of those inputs changed, so
`reads` is also the dependency list. Gold answers and hidden tests are not reachable from a Context.

An operator fails by its own doing (an unparsable answer, a program that errs) by returning `Result(error=...)`: that is
feedback for the policy. An executor that cannot be reached raises; that is nobody's feedback and ends the trajectory.

Write your own in a file and pass it with `--operator-file my_ops.py`:

    from operators import Context, Result, operator

    @operator("Shout", role="format", reads=("solution",), prompt="", description="Writes the solution in capitals.")
    def shout(ctx: Context) -> Result:
        return Result(ctx.inputs["solution"].upper(), {"solution": ctx.inputs["solution"].upper()})
"""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import codegrade
import sandbox
from backends import without_thinking

ROLES = ("plan", "solve", "check", "revise", "ensemble", "format")
# What flows along the workflow. A node reads some of these and writes some of them.
STATE_KEYS = ("problem", "plan", "subproblems", "code", "solution", "feedback", "candidates")
MAX_ATTEMPTS = 3
OUTPUT_CHARS = 8000  # a longer solution is cut: it is read by language models, not by people

run_program = sandbox.memoised(sandbox.run_program)
run_tests = sandbox.memoised(sandbox.run_tests)


@dataclass(frozen=True)
class Context:
    """What one operator call sees. `complete(text, inputs)` asks the executor LLM and returns its reply."""

    operator: str
    prompt: str
    kind: str
    entry_point: str | None
    public_tests: str | list
    inputs: Mapping[str, Any]
    complete: Callable[[str, Mapping[str, Any]], str]
    frame: str = ""  # DS-1000: the code that the question shows, with [insert] where the program goes

    def ask(self, note: str = "", **more: Any) -> str:
        """The executor's reply to prompt + inputs (+ a note), without its reasoning. `more`: what an attempt adds or replaces."""
        parts, seen = [self.prompt], {**self.inputs, **more}
        for key in self.inputs:
            value = seen[key]
            if key == "candidates":
                value = "\n".join(f"{chr(65 + i % 26)}. {text}" for i, text in enumerate(value))
            if value:
                parts.append(f"## {key.capitalize()}\n{value}")
        if self.kind == "code" and self.entry_point:
            parts.append(f"The function must be called `{self.entry_point}`. Answer with one ```python block.")
        if self.frame:
            parts.append("Write only the code that goes on from the code above, in one ```python block, indented as it goes on.")
        if note:
            parts.append(note)
        return without_thinking(self.complete("\n\n".join(parts), seen))


@dataclass(frozen=True)
class Result:
    """`output` is shown; `writes` changes the state; `passed` is a checker's verdict; `error` marks a failed node."""

    output: str
    writes: Mapping[str, Any] = field(default_factory=dict)
    passed: bool | None = None
    error: str = ""


@dataclass(frozen=True)
class Operator:
    name: str
    role: str
    description: str
    prompt: str
    reads: tuple[str, ...]
    run: Callable[[Context], Result]
    advertised: bool = True


REGISTRY: dict[str, Operator] = {}


def operator(name: str, *, role: str, reads: Iterable[str], description: str, prompt: str,
             advertised: bool = True) -> Callable[[Callable[[Context], Result]], Callable[[Context], Result]]:
    """Register the decorated function under `name`; a later registration of the same name replaces the earlier one."""
    reads = tuple(reads)
    if role not in ROLES:
        raise ValueError(f"operator {name}: role {role!r} is not one of {', '.join(ROLES)}")
    if unknown := [key for key in reads if key not in STATE_KEYS]:
        raise ValueError(f"operator {name}: cannot read {unknown}; known inputs are {', '.join(STATE_KEYS)}")
    if not re.fullmatch(r"[A-Za-z]\w*", name) or name.lower() == "done":
        raise ValueError(f"operator name {name!r}: use letters, digits and _ only, not the reserved word 'done'")

    def register(run: Callable[[Context], Result]) -> Callable[[Context], Result]:
        REGISTRY[name] = Operator(name, role, description, prompt, reads, run, advertised)
        return run

    return register


def library(names: Iterable[str] | None = None, files: Iterable[str | Path] = ()) -> dict[str, Operator]:
    """Operators by name: the advertised built-in ones plus those of `files`, or exactly `names`, in that order.

    Raises ValueError for an unknown name and for a plug-in file that cannot be loaded. Plug-ins never leak into
    libraries that did not ask for them.
    """
    known = dict(REGISTRY)
    for path in files:
        added = _load_plugin(Path(path))
        lowered = {name.lower() for name in added}  # names are matched without case, so `plan` replaces `Plan`
        known = {name: op for name, op in known.items() if name in added or name.lower() not in lowered} | added
    if names is None:
        return {name: op for name, op in known.items() if op.advertised}
    by_lower = {name.lower(): op for name, op in known.items()}
    chosen = {}
    for name in names:
        op = by_lower.get(name.strip().lower())
        if op is None:
            raise ValueError(f"unknown operator {name!r}; known: {', '.join(known)}")
        chosen[op.name] = op
    if not chosen:
        raise ValueError("the operator library is empty; name at least one operator")
    return chosen


def _load_plugin(path: Path) -> dict[str, Operator]:
    if not path.is_file():
        raise ValueError(f"operator file {path} does not exist")
    before = dict(REGISTRY)
    try:
        REGISTRY.clear()
        spec = importlib.util.spec_from_file_location(f"operator_file_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError("its name must end in .py")
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
        spec.loader.exec_module(module)
        added = dict(REGISTRY)
    except Exception as error:
        raise ValueError(f"operator file {path} could not be loaded: {type(error).__name__}: {error}") from error
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)
    if not added:
        raise ValueError(f"operator file {path} registers no operator; see the example at the top of operators.py")
    return added


# ---- reading replies ----------------------------------------------------------------------------------------------


def tag(text: str, name: str) -> str | None:
    """Content of the last complete <name>...</name> in `text`, stripped; None if there is none."""
    lowered = text.lower() if len(text.lower()) == len(text) else text  # some capitals grow when lowered
    end = lowered.rfind(f"</{name}>")
    start = lowered.rfind(f"<{name}>", 0, end) if end >= 0 else -1
    return text[start + len(name) + 2:end].strip() if start >= 0 else None


def extract_code(text: str) -> str | None:
    """The last ```python block (or the last plain fenced block); None if no block is closed."""
    blocks = re.findall(r"```([^\n`]*)\n(.*?)```", text, flags=re.DOTALL)  # linear: an opening line holds no backtick
    words = [re.split(r"[^a-z0-9_+-]", line.lower().strip())[0] for line, _ in blocks]
    python = [body for word, (_, body) in zip(words, blocks, strict=True) if word in ("python", "py", "python3")]
    chosen = python or [body for word, (_, body) in zip(words, blocks, strict=True) if not word]
    return chosen[-1].strip("\n") if chosen else None


def _solution(ctx: Context, text: str) -> Result:
    """A solution as it stands; on code tasks it is a program, which is then also what Test runs."""
    return Result(text, {"solution": text, "code": text} if ctx.kind == "code" else {"solution": text})


def _read_solution(ctx: Context, text: str) -> Result:
    """The solution in a reply. A program is never cut: half of it would be another program."""
    text = text.strip()
    if ctx.kind != "code":
        return _solution(ctx, text[:OUTPUT_CHARS]) if text else Result("", error="the reply was empty")
    code = extract_code(text) or (text if "def " in text or "class " in text else None)
    return _solution(ctx, code) if code else Result("", error="the reply holds no ```python block")


def read_verdict(reply: str, suggestion: str | None = None) -> Result:
    """A checker's result: <passed>yes</passed>, or <feedback>why not</feedback> and <passed>no</passed>."""
    verdict = (tag(reply, "passed") or "").strip().lower()
    if verdict not in ("yes", "no", "true", "false"):
        return Result("", error="the reply holds no <passed>yes</passed> or <passed>no</passed>")
    passed = verdict in ("yes", "true")
    notes = tag(reply, "feedback") or reply.split("<passed>")[0].strip()
    if suggestion and not passed:
        notes = f"{notes} Suggested answer: {suggestion}".strip()
    notes = "" if passed else (notes or "a problem was found")[:OUTPUT_CHARS]
    return Result("passed" if passed else notes, {"feedback": notes}, passed=passed)


def _vote(candidates: tuple[str, ...], exact: bool) -> str | None:
    """The candidate with most votes if it has at least two and no rival has as many. `exact`: case and blanks count."""
    plain = [text.strip() if exact else " ".join(text.lower().split()).rstrip(".") for text in candidates]
    originals = dict(reversed(list(zip(plain, candidates, strict=True))))  # the first of equal ones
    counts = Counter(plain).most_common(2)
    clear = counts and counts[0][1] >= 2 and (len(counts) == 1 or counts[0][1] > counts[1][1])
    return originals[counts[0][0]] if clear else None


def _choice(reply: str, n: int) -> int | None:
    """Index of the letter (A, B, ...) that a vote names; None if it names none of the n candidates."""
    letter = (tag(reply, "answer") or reply).strip().strip("().").upper()
    return ord(letter) - 65 if len(letter) == 1 and 0 <= ord(letter) - 65 < n else None


# ---- the twelve operators -----------------------------------------------------------------------------------------


@operator("Plan", role="plan", reads=("problem",), description="writes a step-by-step plan that later solvers read",
          prompt="Write a short step-by-step plan for solving this problem. Do not solve it.")
def plan(ctx: Context) -> Result:
    text = ctx.ask()[:OUTPUT_CHARS]
    return Result(text, {"plan": text}) if text else Result("", error="the reply was empty")


@operator("Decompose", role="plan", reads=("problem",), description="splits the problem into sub-problems",
          prompt="Split this problem into two to four smaller sub-problems, one a line. Do not solve them.")
def decompose(ctx: Context) -> Result:
    text = ctx.ask()[:OUTPUT_CHARS]
    return Result(text, {"subproblems": text}) if text else Result("", error="the reply was empty")


def _example_stdin(ctx: Context) -> str:
    """Input of the first public case: a program that reads stdin must not fail for want of any."""
    if ctx.kind != "code" or ctx.entry_point or not isinstance(ctx.public_tests, list) or not ctx.public_tests:
        return ""
    given = ctx.public_tests[0]["input"]
    return given if isinstance(given, str) else "\n".join(map(str, given))


@operator("Programmer", role="solve", reads=("problem", "plan", "subproblems", "feedback"),
          description="writes Python and runs it, up to 3 attempts; strong on calculation and code",
          prompt="Solve the problem with a Python program. Unless a function is asked for, print only the final answer.")
def programmer(ctx: Context) -> Result:
    error = ""
    for attempt in range(MAX_ATTEMPTS):
        note = f"Your last program failed:\n{error}\nWrite a corrected one." if error else ""
        code = extract_code(ctx.ask(note, attempt=attempt, error=error))
        if code is None:
            error = "the reply holds no ```python block"
            continue
        result = codegrade.run_framed(code, ctx.frame) if ctx.frame else run_program(code, _example_stdin(ctx))
        output = result.stdout.strip()
        if result.status != "ok":
            error = f"{result.status}: {result.stderr.strip()[-500:]}".strip()
        elif ctx.kind == "code":
            return _solution(ctx, code)
        elif output:
            return Result(output[:OUTPUT_CHARS], {"solution": output[:OUTPUT_CHARS], "code": code})
        else:
            error = "the program printed nothing"
    return Result("", error=f"no working program after {MAX_ATTEMPTS} attempts; the last: {error}")


@operator("Custom", role="solve", reads=("problem", "plan", "subproblems", "solution"),
          description="follows a free instruction; strong on questions about text",
          prompt="Solve the problem step by step and end with 'The answer is ...'.")
def custom(ctx: Context) -> Result:
    return _read_solution(ctx, ctx.ask())


@operator("AnswerGenerate", role="solve", reads=("problem", "subproblems"),
          description="thinks, then gives a short direct answer",
          prompt="Think first inside <thought>...</thought>, then give the answer alone inside <answer>...</answer>.")
def answer_generate(ctx: Context) -> Result:
    reply = ctx.ask()
    answer = tag(reply, "answer")
    return _read_solution(ctx, answer) if answer else Result("", error="the reply holds no <answer>...</answer>")


@operator("Test", role="check", reads=("code",), prompt="", description="runs the public tests on the code (code tasks)")
def test(ctx: Context) -> Result:
    if not ctx.public_tests and not ctx.frame:
        return Result("", error="this task has no public tests")
    if ctx.kind != "code" or not ctx.inputs["code"]:
        return Result("", error="there is no code to test; add a solver before Test")
    verdict = codegrade.test_framed(ctx.inputs["code"], ctx.frame) if ctx.frame else run_tests(
        ctx.inputs["code"], ctx.public_tests, ctx.entry_point)
    if verdict is None:
        return Result("", error="the code in the question does not run by itself, so nothing can be tested")
    if verdict.passed:
        return Result(f"passed {verdict.n_passed}/{verdict.n_total} public tests", {"feedback": ""}, passed=True)
    notes = f"{verdict.n_passed}/{verdict.n_total} public tests passed. {verdict.error}".strip()[:OUTPUT_CHARS]
    return Result(notes, {"feedback": notes}, passed=False)


@operator("Review", role="check", reads=("problem", "solution"), description="criticises the solution",
          prompt="Look for errors in this solution. Write <feedback>what is wrong</feedback> and then "
                 "<passed>yes</passed> if it is right or <passed>no</passed> if not.")
def review(ctx: Context) -> Result:
    if not ctx.inputs["solution"]:
        return Result("", error="there is no solution to review; add a solver before it")
    return read_verdict(ctx.ask())


@operator("Verify", role="check", reads=("problem", "solution"),
          description="recomputes the answer independently and compares; strong on calculation",
          prompt="Solve the problem again on your own: <answer>your answer</answer>. Then <feedback>what differs</feedback> "
                 "and <passed>yes</passed> if the given solution agrees with yours or <passed>no</passed> if not.")
def verify(ctx: Context) -> Result:
    if not ctx.inputs["solution"]:
        return Result("", error="there is no solution to verify; add a solver before it")
    reply = ctx.ask()
    return read_verdict(reply, tag(reply, "answer"))


@operator("Revise", role="revise", reads=("problem", "solution", "feedback"),
          description="rewrites the solution using the newest feedback",
          prompt="Rewrite the solution so that it answers the feedback. Give the new solution inside <answer>...</answer>.")
def revise(ctx: Context) -> Result:
    if not ctx.inputs["solution"]:
        return Result("", error="there is no solution to revise; add a solver before it")
    reply = ctx.ask()
    return _read_solution(ctx, tag(reply, "answer") or reply)


@operator("ScEnsemble", role="ensemble", reads=("problem", "candidates"),
          description="takes the majority of the candidate solutions",
          prompt="Which candidate is the best solution? Answer with its letter inside <answer>...</answer>.")
def sc_ensemble(ctx: Context) -> Result:
    candidates = ctx.inputs["candidates"]
    if not candidates:
        return Result("", error="there are no candidates; add solvers before the ensemble")
    winner = _vote(candidates, ctx.kind == "code") if len(candidates) > 1 else candidates[0]
    if winner is None:  # no majority: the executor chooses
        index = _choice(ctx.ask(), len(candidates))
        if index is None:
            return Result("", error="the vote names none of the candidates")
        winner = candidates[index]
    return _solution(ctx, winner)


@operator("Aggregate", role="ensemble", reads=("problem", "subproblems", "candidates"),
          description="combines sub-answers or candidates into one solution",
          prompt="Combine these partial or rival solutions into one final solution inside <answer>...</answer>.")
def aggregate(ctx: Context) -> Result:
    if not ctx.inputs["candidates"]:
        return Result("", error="there are no candidates; add solvers before Aggregate")
    reply = ctx.ask()
    return _read_solution(ctx, tag(reply, "answer") or reply)


@operator("Format", role="format", reads=("problem", "solution"), description="gives the shortest exact answer",
          prompt="Give only the final answer to the problem, as short as possible, inside <answer>...</answer>. "
                 "If it is a program, repeat the program unchanged.")
def format_answer(ctx: Context) -> Result:
    if not ctx.inputs["solution"]:
        return Result("", error="there is no solution to format; add a solver before it")
    reply = ctx.ask()
    return _read_solution(ctx, tag(reply, "answer") or reply)


# ---- known, but not advertised by default -------------------------------------------------------------------------


@operator("MdEnsemble", role="ensemble", reads=("problem", "candidates"), advertised=False,
          description="three votes of the executor over shuffled candidates",
          prompt="Which candidate is the best solution? Answer with its letter inside <answer>...</answer>.")
def md_ensemble(ctx: Context) -> Result:
    candidates = list(ctx.inputs["candidates"])
    if not candidates:
        return Result("", error="there are no candidates; add solvers before the ensemble")
    votes: Counter[str] = Counter()
    for attempt in range(3):
        shuffled = random.Random(attempt).sample(candidates, len(candidates))  # against position bias
        index = _choice(ctx.ask(candidates=shuffled), len(shuffled))
        if index is not None:
            votes[shuffled[index]] += 1
    return _solution(ctx, votes.most_common(1)[0][0]) if votes else Result("", error="no vote named a candidate")


@operator("CustomCodeGenerate", role="solve", reads=("problem", "plan", "subproblems"), advertised=False,
          description="writes code without running it",
          prompt="Write a Python program that solves the problem, in one ```python block.")
def custom_code_generate(ctx: Context) -> Result:
    code = extract_code(ctx.ask())
    return Result(code, {"solution": code, "code": code}) if code else Result("", error="the reply holds no ```python block")
