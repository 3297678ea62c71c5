"""A scripted executor and a few tasks, shared by the tests of operators and canvas."""

import threading
from collections.abc import Callable
from typing import Any

import operators
from backends import Reply, Request, Usage
from canvas import Canvas, CanvasConfig
from tasks import Task

MATH = Task("m1", "gsm8k", "math", "What is 6 * 7?", ("42",))
CODE = Task("c1", "mbpp", "code", "Write double(x).", ("def double(x):\n    return 2 * x",), "double",
            "assert double(2) == 4", "assert double(3) == 6")
ASK = Request(MATH, "Custom", "Solve.", "Solve.\n\n## Problem\nWhat is 6 * 7?", {"problem": "What is 6 * 7?"})

# `python -c` of this trains with a policy whose every turn is a legal edit, whatever it wrote: one that has seen thirty
# episodes might never write one, and so never call the executor. It draws no curves (see conftest.few_pictures).
TRAIN_WITH_LEGAL_EDITS = """
import canvas, report, runpy
report.write_curves = lambda runs, path: path
EDIT, NAMES = "<action>add</action><operator>{}</operator>", ("Custom", "Format", "Verify")
canvas.Canvas._edit_or_prompt = lambda self, text: canvas.parse_edit(EDIT.format(NAMES[len(text) % 3]))
runpy.run_path("train.py", run_name="__main__")
"""

# What each operator reads in the ordinary case: the executor's side of its format.
USUAL = {
    "Plan": "First multiply.",
    "Decompose": "What is six?\nWhat is seven?",
    "Programmer": "```python\nprint(42)\n```",
    "Custom": "The answer is 42.",
    "AnswerGenerate": "<thought>six sevens</thought><answer>42</answer>",
    "Review": "<feedback>too low</feedback><passed>no</passed>",
    "Verify": "<answer>42</answer><passed>yes</passed>",
    "Revise": "<answer>43</answer>",
    "ScEnsemble": "<answer>A</answer>",
    "Aggregate": "<answer>42</answer>",
    "Format": "<answer>42</answer>",
    "MdEnsemble": "<answer>B</answer>",
    "CustomCodeGenerate": "```python\nprint(42)\n```",
}

Says = str | list[str] | Exception | Callable[[Request], str]


class Scripted:
    """Replies by operator: a text, texts in turn (the last one repeats), an exception to raise, or a function."""

    name, instant = "scripted", True

    def __init__(self, **says: Says) -> None:
        self.says: dict[str, Says] = {**USUAL, **says}
        self.requests: list[Request] = []
        self._lock, self._taken = threading.Lock(), 0

    def complete(self, request: Request) -> Reply:
        says = self.says[request.operator]
        with self._lock:
            before = sum(earlier.operator == request.operator for earlier in self.requests)
            self.requests.append(request)
        if isinstance(says, Exception):
            raise says
        if isinstance(says, list):
            says = says[min(before, len(says) - 1)]
        return Reply(says(request) if callable(says) else says, Usage(1, 0, 10, 5, dollars=0.25))

    def calls(self) -> list[str]:
        """Names of the operators that called since the last time this was asked."""
        names = [request.operator for request in self.requests[self._taken:]]
        self._taken = len(self.requests)
        return names


def in_threads(n: int, call: Callable[[], Any]) -> list[Any]:
    """Call it n times at once; an exception of a call is its result."""
    results: list[Any] = [None] * n

    def one(i: int) -> None:
        try:
            results[i] = call()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def new_canvas(backend: Scripted | None = None, task: Task = MATH, **config: Any) -> Canvas:
    """A canvas that knows all fourteen operators."""
    return Canvas(task, operators.library(operators.REGISTRY), backend or Scripted(), CanvasConfig(**config))


def add(name: str, *prompts: str, position: int | None = None) -> str:
    place = "" if position is None else f"<position>{position}</position>"
    return f"<action>add</action><operator>{name}</operator>{place}" + "".join(f"<prompt>{p}</prompt>" for p in prompts)


def parallel(names: str, *prompts: str) -> str:
    notes = "".join(f"<prompt>{p}</prompt>" for p in prompts)
    return f"<action>add</action><structure>parallel</structure><operators>{names}</operators>{notes}"


def loop(names: str, count: int | str = 2) -> str:
    return f"<action>add</action><structure>loop</structure><operators>{names}</operators><count>{count}</count>"


def conditional(condition: str, true: str, false: str = "") -> str:
    other = f"<false>{false}</false>" if false else ""
    return f"<action>add</action><structure>conditional</structure><condition>{condition}</condition><true>{true}</true>{other}"


def delete(target: str) -> str:
    return f"<action>delete</action><target>{target}</target>"


def modify(target: str, name: str, *prompts: str) -> str:
    notes = "".join(f"<prompt>{p}</prompt>" for p in prompts)
    return f"<action>modify</action><target>{target}</target><operator>{name}</operator>{notes}"


def set_prompt(target: str, prompt: str) -> str:
    return f"<action>set_prompt</action><target>{target}</target><prompt>{prompt}</prompt>"


FINISH = "<action>finish</action>"
