"""What a turn of the canvas costs when the executor answers at once, and what incremental execution saves.

    python bench/canvas.py                  random legal edits, graphs of 4 to 64 nodes, episodes of 2,000 turns

The other side is the same canvas that forgets its results before every turn and so runs the whole graph again. Both take the
same edits, of which a random legal editor makes large graphs. The operators are the real ones; the executor's one reply has a
part for each of them, and the one program in it has been run before. A turn's time is the best of several plays, for other
work on the machine to have no part in it. `floor` is what no canvas avoids: one pass of a regular expression over the edit,
and writing the feedback's characters once.
"""
from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import side_by_side

from backends import Reply, Request, Usage
from baselines import random_edit
from canvas import Canvas, CanvasConfig, Feedback
from edits import TAG
from graph import Node
from operators import Context, Result, library
from tasks import toy_tasks

REPLY = "<answer>4</answer>\n<passed>no</passed><feedback>The sum is wrong.</feedback>\n```python\nprint(4)\n```"


class Instant:
    """An executor that answers at once."""

    name, instant, lockstep = "instant", True, True

    def __init__(self) -> None:
        self.reply, self.calls = Reply(REPLY, Usage(1, 0, 50, 25)), 0

    def complete(self, request: Request) -> Reply:
        self.calls += 1
        return self.reply


class Watched(Canvas):
    """A canvas that can forget its results before a turn, and that counts what an edit has changed.

    `changed`: runs of a node (a loop has several) with another operator, prompt or input than the last time.
    """

    def __init__(self, *words: Any, forgets: bool = False) -> None:
        super().__init__(*words)
        self.forgets, self.seen, self.changed = forgets, {}, 0

    def step(self, text: str) -> Feedback:
        self.changed = 0
        if self.forgets:
            self._memo, self._passed = {}, []
        return super().step(text)

    def _run_node(self, node: Node, state: dict[str, Any], iteration: int = 0) -> Result:
        content = node.operator, node.prompt, [state[key] for key in self.library[node.operator].reads]
        self.changed += self.seen.get((node.id, iteration)) != content
        self.seen[node.id, iteration] = content
        return super()._run_node(node, state, iteration)


class Clock:
    """Adds up the seconds inside operators."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, run: Callable[[Context], Result]) -> Callable[[Context], Result]:
        def timed_run(ctx: Context) -> Result:
            began = time.perf_counter()
            result = run(ctx)
            self.seconds += time.perf_counter() - began
            return result

        return timed_run


CLOCK = Clock()
LIBRARY = {name: replace(op, run=CLOCK.timed(op.run)) for name, op in library().items()}


def new_canvas(turns: int, kind: type = Canvas, **words: Any) -> Canvas:
    return kind(toy_tasks("toy_math", 1, 0)[0], LIBRARY, Instant(), CanvasConfig(max_turns=turns), **words)


def random_edits(seed: int, turns: int) -> list[str]:
    """An episode of a random legal editor that never finishes."""
    rng, canvas, texts = random.Random(seed), new_canvas(turns + 1), []
    canvas.run_graph = lambda: None  # type: ignore[method-assign]
    while len(texts) < turns:
        text = random_edit(canvas, rng)
        if "finish" not in text:
            texts.append(f"<think>\nThe next edit.\n</think>\n\n{text}")
            canvas.step(texts[-1])
    return texts


def play(texts: list[str], kind: type = Canvas, **words: Any) -> tuple[list[float], list[float], int]:
    """(seconds of each turn, those of them outside operators, characters of feedback)"""
    canvas, seconds, outside, characters = new_canvas(len(texts) + 1, kind, **words), [], [], 0
    for text in texts:
        CLOCK.seconds, began = 0.0, time.perf_counter()
        feedback = canvas.step(text)
        seconds.append(time.perf_counter() - began)
        outside.append(seconds[-1] - CLOCK.seconds)
        characters += len(feedback.text)
    return seconds, outside, characters


def counted(episodes: list[list[str]]) -> dict[str, Any]:
    """Runs of nodes and executor calls, of both sides, and what the policy reads."""
    totals: dict[str, Any] = {}
    for name, forgets in (("ours", False), ("whole graph", True)):
        runs, changed, calls, read_once, read_again = [], [], [], [], []
        for texts in episodes:
            canvas = new_canvas(len(texts) + 1, Watched, forgets=forgets)
            context, again = sum(map(len, canvas.prompt())), 0
            for text in texts:
                again += context
                feedback = canvas.step(text)
                runs.append(len(feedback.info["executed"]))
                changed.append(canvas.changed)
                context += len(text) + len(feedback.text)
            calls.append(canvas.backend.calls)
            read_once.append(context / 4)
            read_again.append(again / 4)
        totals[name] = {"runs_per_edit": mean(runs), "changed_per_edit": mean(changed), "calls_per_trajectory": mean(calls),
                        "most_above_changed": max(r - c for r, c in zip(runs, changed, strict=True))}
    totals["tokens_read_once"], totals["tokens_read_every_turn"] = mean(read_once), mean(read_again)
    return totals


def growth(nodes: list[int], turns: int) -> dict[str, Any]:
    """Median microseconds of a turn by graph size (prompt of the last node set anew), and early and late in a long episode."""
    by_nodes = []
    for n in nodes:
        names = ["Plan", "Custom", "Review", "Revise"]
        texts = [f"<action>add</action><operator>{names[i % 4]}</operator>" for i in range(n)]
        sets = [f"<action>set_prompt</action><target>n{n}</target><prompt>Careful, {i}.</prompt>" for i in range(60)]
        by_nodes.append(1e6 * min(median(play(texts + sets)[1][n:]) for _ in range(5)))
    names = ["Custom", "AnswerGenerate"]
    texts = [f"<action>add</action><operator>{name}</operator>" for name in ("Plan", "Custom", "Review", "Revise") * 2]
    modify = "<action>modify</action><target>n{}</target><operator>{}</operator>"
    texts += [modify.format(1 + i % 8, names[i // 8 % 2]) for i in range(turns)]
    seconds = play(texts)[1][8:]
    part = max(len(seconds) // 10, 1)
    return {"nodes": nodes, "microseconds_by_nodes": by_nodes, "exponent_nodes": side_by_side.exponent(nodes, by_nodes),
            "turns": turns, "microseconds_first_tenth": 1e6 * median(seconds[:part]),
            "microseconds_last_tenth": 1e6 * median(seconds[-part:])}


def floor(texts: list[str], characters: int) -> float:
    """Microseconds a turn of finding the tags of the edits and writing as many characters as the feedback has."""
    word = "feedback "
    began = time.perf_counter()
    for text in texts:
        list(TAG.finditer(text))
        "".join([word] * (characters // len(texts) // len(word)))
    return 1e6 * (time.perf_counter() - began) / len(texts)


def main() -> None:
    parser = side_by_side.make_parser(__doc__, "canvas")
    parser.add_argument("--episodes", type=int, default=40, help="of random edits (default %(default)s)")
    parser.add_argument("--turns", type=int, default=20, help="an episode (default %(default)s)")
    parser.add_argument("--long", type=int, default=2000, help="turns of the long episode (default %(default)s)")
    args = parser.parse_args()
    episodes = [random_edits(seed, args.turns) for seed in range(args.episodes)]
    for texts in episodes:
        play(texts)  # the program has run
    sides = {"ours": lambda: sum(sum(play(texts, Watched)[0]) for texts in episodes),
             "whole graph": lambda: sum(sum(play(texts, Watched, forgets=True)[0]) for texts in episodes)}
    result = side_by_side.compare(side_by_side.run_pairs(sides, args.pairs), "whole graph")
    played = [[play(texts) for texts in episodes] for _ in range(2 * args.pairs)]
    with_operators, outside = ([1e6 * min(plays) for episode in zip(*played, strict=True)
                                for plays in zip(*(times[i] for times in episode), strict=True)] for i in range(2))
    result |= {"microseconds": median(outside), "microseconds_p90": sorted(outside)[int(0.9 * len(outside))],
               "microseconds_with_operators": median(with_operators), "bound": floor(episodes[0], played[0][0][2]),
               **counted(episodes), **growth([4, 8, 16, 32, 64], args.long)}
    print(f"a turn outside operators: {result['microseconds']:.0f} microseconds (median of {len(outside)} turns; nine in ten "
          f"below {result['microseconds_p90']:.0f}; floor {result['bound']:.0f}); with operators "
          f"{result['microseconds_with_operators']:.0f}")
    print(f"the whole graph every turn: {side_by_side.told(result)} times as long")
    for name in sides:
        n = result[name]
        print(f"{name}: {n['runs_per_edit']:.2f} node runs an edit, {n['changed_per_edit']:.2f} of them changed (at most "
              f"{n['most_above_changed']} above), {n['calls_per_trajectory']:.1f} executor calls a trajectory")
    print(f"the policy reads {result['tokens_read_once']:.0f} tokens (characters / 4) a trajectory; "
          f"{result['tokens_read_every_turn']:.0f} if it read all of them anew every turn")
    sizes = ", ".join(f"{n}: {t:.0f}" for n, t in zip(result["nodes"], result["microseconds_by_nodes"], strict=True))
    print(f"by graph size: {sizes} microseconds, exponent {result['exponent_nodes']:.2f}; turns 1 to {args.long // 10}: "
          f"{result['microseconds_first_tenth']:.0f}, the last tenth of {args.long}: {result['microseconds_last_tenth']:.0f}")
    side_by_side.write(args.json, result)


if __name__ == "__main__":
    main()
