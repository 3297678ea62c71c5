"""The simulated executor's skill model: a documented, seeded stand-in for a language model.

It knows the gold answer and answers in each operator's real output format, right with a probability that depends on the
operator, the kind of task, a latent difficulty and what came before. The tables below are the whole world: nothing in
them knows of structures, counts or rewards. Every outcome is a pure function of (seed, task, operator, prompt, inputs),
as with a model at temperature 0: asking twice for the same thing gives the same reply. And an operator that is asked again
about a task, but shown something else, errs alike: half of the variance of every success belongs to task and operator. A
task also has a usual wrong answer, given half of the time by whoever is wrong. So asking often is worth less than it would be
with independent errors, and another operator more.

An operator that the tables do not name (a plug-in) is answered by its declared role: in the format and with the skill of the
built-in operator that LIKE names, from what it reads. So one built-in operator can be exchanged for another of its role, and
a plug-in is as good as its role and no better, whatever its prompt asks for. One that expects a format of its own gets a
reply it cannot read, and fails. To see less is no advantage: a checker that is not shown a solution tosses a coin, a
reviser or an ensemble without one solves the problem itself, as Custom would.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from tasks import Task

# Probability that a solver is right on a task of medium difficulty, before help from plans or feedback.
SOLVE = {
    "Programmer": {"math": 0.60, "code": 0.50, "qa": 0.15, "choice": 0.40},
    "Custom": {"math": 0.35, "code": 0.40, "qa": 0.50, "choice": 0.45},
    "AnswerGenerate": {"math": 0.30, "code": 0.20, "qa": 0.55, "choice": 0.50},
    "CustomCodeGenerate": {"math": 0.45, "code": 0.45, "qa": 0.10, "choice": 0.30},
}
# What earlier work adds to a solver's log-odds.
PLAN_HELPS = {"math": 0.6, "code": 0.9, "qa": 0.0, "choice": 0.3}
SUBPROBLEMS_HELP = {"math": 0.2, "code": 0.2, "qa": 0.9, "choice": 0.3}
FEEDBACK_HELPS = 0.5
# A checker's chance to notice a wrong solution, and to reject a right one.
CHECK = {
    "Review": {"math": (0.50, 0.15), "code": (0.50, 0.15), "qa": (0.75, 0.08), "choice": (0.60, 0.12)},
    "Verify": {"math": (0.85, 0.05), "code": (0.45, 0.20), "qa": (0.40, 0.20), "choice": (0.60, 0.12)},
}
VERIFY_SUGGESTS_RIGHT = {"math": 0.60, "code": 0.0, "qa": 0.30, "choice": 0.45}
# Revise: chance to repair a wrong solution without feedback, with a critique, with failed tests, with a right suggestion.
REVISE = {"none": 0.15, "critique": 0.50, "tests": 0.60, "right suggestion": 0.90}
KEEPS = {"Custom": 0.85, "Revise": 0.95, "Revise after feedback": 0.70, "Format": 0.98}  # a right solution stays right
AGGREGATE = {"most right": 0.95, "half right": 0.65, "some right": 0.35, "none right": 0.03}
VOTE_FINDS_RIGHT = 0.55
SHARED = 0.5  # of the variance of a success: how much an operator's errors on one task are the same errors
DIFFICULTY_SLOPE = 3.0  # log-odds between the easiest and the hardest task
LIKE = {"plan": "Plan", "solve": "Custom", "check": "Review", "revise": "Revise", "ensemble": "Aggregate", "format": "Format"}
NORMAL = NormalDist()
OTHER_WORDS = ("Lisbon", "Amara", "the Old Mill", "Tarn", "1987", "a lighthouse")


def _shift(probability: float, log_odds: float) -> float:
    odds = math.log(probability / (1 - probability)) + log_odds if 0 < probability < 1 else math.inf * (probability - 0.5)
    return 1 / (1 + math.exp(-odds))


def _hashed(what: str) -> float:
    """A uniform number inside (0, 1)."""
    digest = hashlib.sha256(what.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:6], "big") + 0.5) / 2**48


def _plain(text: str) -> str:
    """The answer inside the forms that the simulation writes, for comparison: no prose, case, articles, punctuation."""
    text = text.rpartition("answer is ")[2] if "answer is " in text else text
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s./-]", "", text.lower())).split()).strip(" .")


class Simulation:
    """One reply: draws are uniform numbers from a hash of everything that a temperature-0 model would see."""

    def __init__(self, seed: int, task: Task, operator: str, prompt: str, inputs: Mapping[str, Any], role: str = "solve") -> None:
        self.task, self.inputs, self.kind = task, inputs, task.kind
        self.operator = operator if operator in REPLIES else LIKE[role]
        self.solution = inputs.get("solution") or (inputs.get("code", "") if task.kind == "code" else "")
        seen = json.dumps([prompt, inputs], sort_keys=True, default=str)
        self.question = f"{seed}/{self.task.id}"
        self.position = f"{self.question}/{operator}/{seen}"
        level = self.task.meta.get("level")
        latent = random.Random(f"{seed}/difficulty/{self.task.id}").random()
        self.difficulty = 0.5 * (level - 1) / 3 + 0.5 * latent if isinstance(level, int) else latent

    def uniform(self, name: str = "") -> float:
        return _hashed(f"{self.position}/{name}")

    def success(self, name: str = "") -> float:
        """A uniform number, as a normal one the sum of one for task and operator and one for what they are shown."""
        same, fresh = NORMAL.inv_cdf(_hashed(f"{self.question}/{self.operator}/same/{name}")), NORMAL.inv_cdf(self.uniform(name))
        return NORMAL.cdf(math.sqrt(SHARED) * same + math.sqrt(1 - SHARED) * fresh)

    def happens(self, probability: float, log_odds: float = 0.0, name: str = "") -> bool:
        """Draw an event that gets rarer as the task gets harder."""
        return self.success(name) < _shift(probability, log_odds - DIFFICULTY_SLOPE * (self.difficulty - 0.5))

    # ---- answers

    def answer(self, right: bool) -> str:
        """The gold answer, or one of a few wrong ones; for code a program."""
        gold = self.task.answers[0]
        if right:
            return gold or "unanswerable"
        usual = self.uniform("usual mistake") < SHARED
        k = int(3 * (_hashed(f"{self.question}/which wrong answer") if usual else self.uniform("which wrong answer")))
        if self.kind == "code":
            return _wrong_program(self.task, k)
        if distractors := self.task.meta.get("distractors"):
            return str(distractors[k % len(distractors)])
        if self.kind == "choice":
            return [letter for letter in "abcde" if letter != gold.strip().lower()[:1]][k]
        if re.fullmatch(r"-?\d{1,15}", gold):
            return str(int(gold) + (1, -2, 10)[k])
        if self.kind == "math":
            return f"{gold} + {k + 1}"
        accepted = {_plain(text) for text in self.task.answers}
        names = [w for w in re.findall(r"\b[A-Z][a-z]{2,}\b", self.task.problem) if _plain(w) not in accepted]
        names += [w for w in OTHER_WORDS if _plain(w) not in accepted]
        return names[int(self.uniform("which name") * len(names))]

    def is_right(self, text: str) -> bool:
        if self.kind == "code":
            return text.strip() == self.task.answers[0].strip()
        return _plain(text) in {_plain(answer) for answer in (*self.task.answers, self.answer(True))}

    def solved(self, base: float) -> bool:
        log_odds = PLAN_HELPS[self.kind] if self.inputs.get("plan") else 0.0
        log_odds += SUBPROBLEMS_HELP[self.kind] if self.inputs.get("subproblems") else 0.0
        log_odds += FEEDBACK_HELPS if self.inputs.get("feedback") else 0.0
        return self.happens(base, log_odds)

    # ---- replies, one method an operator

    def reply(self) -> str:
        """Answer in the operator's output format."""
        return REPLIES[self.operator](self)

    def _plan(self) -> str:
        return "Read it, work it out in order, check the result."

    def _decompose(self) -> str:
        return "What is given? What follows? What is asked?"

    def _programmer(self) -> str:
        right = self.solved(SOLVE[self.operator][self.kind])
        if not right and self.uniform("syntax") < 0.2:
            return "```python\nprint(answer\n```"  # does not parse: fails, is fed back and tried again
        text = self.answer(right)
        return f"```python\n{text}\n```" if self.kind == "code" else f"```python\nanswer = {text!r}\nprint(answer)\n```"

    def _prose(self, answer: str) -> str:
        return f"```python\n{answer}\n```" if self.kind == "code" else f"Going through it step by step, the answer is {answer}."

    def _custom(self) -> str:
        base = SOLVE["Custom"][self.kind]
        if self.solution and self.is_right(self.solution):
            return self._prose(self.answer(self.uniform("keep") < KEEPS["Custom"]))
        return self._prose(self.answer(self.solved(base)))

    def _answergenerate(self) -> str:
        answer = self.answer(self.solved(SOLVE["AnswerGenerate"][self.kind]))
        return f"<thought>Looking for it.</thought><answer>{self._fenced(answer)}</answer>"

    def _solve_anew(self) -> str:
        return f"<answer>{self._fenced(self.answer(self.solved(SOLVE['Custom'][self.kind])))}</answer>"

    def _fenced(self, answer: str) -> str:
        return f"\n```python\n{answer}\n```\n" if self.kind == "code" else answer

    def _review(self) -> str:
        hit, false_alarm = CHECK[self.operator][self.kind] if self.solution else (0.5, 0.5)
        right = self.is_right(self.solution)
        rejects = self.success("reject") < (false_alarm if right else hit)
        suggestion = ""
        if self.operator == "Verify":
            agrees = right or self.success("suggestion") < VERIFY_SUGGESTS_RIGHT[self.kind]
            suggestion = "" if self.kind == "code" else f"<answer>{self.answer(agrees and not (right and rejects))}</answer>"
        notes = "<feedback>One step does not hold.</feedback><passed>no</passed>" if rejects else "<passed>yes</passed>"
        return suggestion + notes

    def _revise(self) -> str:
        feedback = self.inputs.get("feedback", "")
        if not self.solution:
            return self._solve_anew()
        if self.is_right(self.solution):
            keeps = KEEPS["Revise after feedback" if feedback else "Revise"]
            return f"<answer>{self._fenced(self.answer(self.uniform('keep') < keeps))}</answer>"
        why = "critique" if feedback else "none"
        if "public tests passed" in feedback:
            why = "tests"
        elif "Suggested answer: " in feedback and self.is_right(feedback.rpartition("Suggested answer: ")[2]):
            why = "right suggestion"
        return f"<answer>{self._fenced(self.answer(self.happens(REVISE[why])))}</answer>"

    def _scensemble(self) -> str:
        right = [i for i, text in enumerate(self.inputs["candidates"]) if self.is_right(text)]
        finds = right and self.uniform("vote") < VOTE_FINDS_RIGHT
        index = right[0] if finds else int(self.uniform("letter") * len(self.inputs["candidates"]))
        return f"<answer>{chr(65 + index % 26)}</answer>"

    def _aggregate(self) -> str:
        candidates = self.inputs.get("candidates") or [self.solution] * bool(self.solution)
        if not candidates:
            return self._solve_anew()
        share = sum(map(self.is_right, candidates)) / len(candidates)
        found = "none right" if share == 0 else "some right" if share < 0.5 else "half right" if share == 0.5 else "most right"
        return f"<answer>{self._fenced(self.answer(self.uniform('combine') < AGGREGATE[found]))}</answer>"

    def _format(self) -> str:
        solution = self.solution
        if self.kind == "code" or self.uniform("keep") < KEEPS["Format"]:
            short = solution.rpartition("answer is ")[2].removesuffix(".") if "answer is " in solution else solution
            return f"<answer>{self._fenced(short)}</answer>"
        return f"<answer>{self.answer(False)}</answer>"


REPLIES = {
    "Plan": Simulation._plan, "Decompose": Simulation._decompose, "Programmer": Simulation._programmer,
    "CustomCodeGenerate": Simulation._programmer, "Custom": Simulation._custom, "AnswerGenerate": Simulation._answergenerate,
    "Review": Simulation._review, "Verify": Simulation._review, "Revise": Simulation._revise,
    "ScEnsemble": Simulation._scensemble, "MdEnsemble": Simulation._scensemble, "Aggregate": Simulation._aggregate,
    "Format": Simulation._format,
}


SPOIL = """
_right = {name}
def {name}(*args, **kwargs):
    value = _right(*args, **kwargs)
    {special}
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float, complex)): return value + 1
    if isinstance(value, str): return value + "?"
    if isinstance(value, (list, tuple)): return value[:-1] if value else type(value)([0])
    return 0 if value is None else None
"""


STDIN_SPOIL = """import io as _io, sys as _sys
_given = _sys.stdin.read()
_sys.stdin = _io.StringIO(_given)
{program}
{special}
print("?")
"""


def _wrong_program(task: Task, k: int) -> str:
    """A program that fails hidden tests: wrong everywhere (k=0), failing with an exception (1), right on the public tests
    alone (2), which Test cannot see and a critique can."""
    if isinstance(task.hidden_tests, list) and not task.entry_point:  # a program that reads stdin
        shown = [case["input"] for case in task.public_tests or ()]
        special = ("", 'raise IndexError("list index out of range")', f"if _given in {shown!r}: raise SystemExit")[k % 3]
        return STDIN_SPOIL.format(program=task.answers[0].rstrip(), special=special)
    special = ("pass", 'raise IndexError("list index out of range")',
               f'if ", ".join(map(repr, args)) in {task.public_tests!r}: return value')[k % 3]
    return task.answers[0].rstrip() + "\n" + SPOIL.format(name=task.entry_point or "solve", special=special)
