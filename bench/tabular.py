"""How much can so many trajectories teach at all? Softmax tables in the network's place, in the world of the tiny preset.

    python bench/tabular.py              every setting on seeds 3, 4 and 5; goes on where it was stopped
    python bench/tabular.py --report     the table from bench/results/tabular alone
    python bench/tabular.py --seeds 0 1 2 --lrs 3 5 8 12 --results runs/tabular    how the sizes of steps were chosen

The tables have far less to learn than a network. They know the grammar and the usual order of roles (plan, solve, repair,
format), finish in time, make no slip, and have a dozen small distributions to learn (`Editor`); their gradients are exact.
Tasks, their order, canvas, reward, advantages and number of trajectories are those of `python train.py --seed N`. Settings:

    plain        as train.py
    kinds        tables of its own for each kind of task
    eight        the answer's reward is the mean of eight executions, each by an executor of another seed
    four-times   160 steps in place of 40
"""
from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from ablations import versions, write

import baselines
import train
from backends import SimulatedBackend
from canvas import Canvas
from cwrpo import group_advantages
from rewards import Grade, grade, reward
from rundir import end_on_signals
from stats import markdown
from tasks import Task
from terminal import Progress
from world import World, load_tasks

RESULTS = Path(__file__).parent / "results" / "tabular"
REACHABLE = Path(__file__).parent / "results" / "ablations"  # reachable-SEED.json, by bench/ablations.py


class Setting(NamedTuple):
    by_kind: bool
    executions: int  # of a workflow
    times: int  # the steps
    lr: float


SETTINGS = {  # each with the size of steps that was best on seeds 0, 1 and 2
    "plain": Setting(False, 1, 1, 12), "kinds": Setting(True, 1, 1, 12), "eight": Setting(False, 8, 1, 8),
    "four-times": Setting(False, 1, 4, 3)}
MAX_LOOP = 10
TURNS = 8  # of an episode, as in bench/ablations.py
NEXT = {"": ("plan", "solve"), "plan": ("plan", "solve"), "solve": ("solve", "repair", "format"),
        "repair": ("repair", "format", "finish"), "format": ("finish",)}  # by the last step; "" is the empty canvas
TURNS_NEEDED = {"plan": 5, "solve": 4, "repair": 3, "format": 2, "finish": 1}  # solve, ensemble, format, finish fit into 4
STEP_OF = {"plan": "plan", "solve": "solve", "ensemble": "solve", "check": "repair", "revise": "repair", "format": "format"}


class Tables:
    """Independent softmax distributions, one a key, all uniform at first; their parameters are plain log-odds."""

    def __init__(self) -> None:
        self.logits: dict[tuple, list[float]] = {}

    def probabilities(self, key: tuple, n: int) -> list[float]:
        weights = [math.exp(x) for x in self.logits.setdefault(key, [0.0] * n)]
        return [weight / sum(weights) for weight in weights]

    def ascend(self, episodes: Sequence[tuple[list[Choice], float]], lr: float) -> None:
        """One step of gradient ascent on the mean over episodes of advantage * log-probability of the choices."""
        steps: dict[tuple, list[float]] = {}
        for choices, advantage in episodes:
            for key, chosen, n in choices:
                step, p = steps.setdefault(key, [0.0] * n), self.probabilities(key, n)
                for i in range(n):
                    step[i] += advantage * ((i == chosen) - p[i]) / len(episodes)
        for key, step in steps.items():
            self.logits[key] = [x + lr * dx for x, dx in zip(self.logits[key], step, strict=True)]


class Choice(NamedTuple):
    key: tuple
    chosen: int
    n: int


class Editor:
    """Plays one episode from the tables and remembers what it chose."""

    def __init__(self, tables: Tables, rng: random.Random, kind: str = "") -> None:
        self.tables, self.rng, self.kind, self.choices = tables, rng, kind, list[Choice]()

    def choose(self, what: str, options: Sequence[Any]) -> Any:
        key = (self.kind, what, *options)
        chosen = self.rng.choices(range(len(options)), self.tables.probabilities(key, len(options)))[0]
        self.choices.append(Choice(key, chosen, len(options)))
        return options[chosen]

    def edit(self, canvas: Canvas) -> str:
        """The next edit, as text: the step that follows the last one, its structure, its operators."""
        roles = {name: op.role for name, op in canvas.library.items()}
        named = {role: [name for name in roles if roles[name] == role] for role in roles.values()}
        stages = canvas.graph.stages
        if stages and stages[-1].kind == "parallel":
            return added(operator=self.choose("ensemble", named["ensemble"]))
        last = STEP_OF[roles[stages[-1].nodes[-1].operator]] if stages else ""
        left = canvas.config.max_turns - canvas.turn
        step = self.choose(f"after {last}", [name for name in NEXT[last] if TURNS_NEEDED[name] <= left])
        if step == "finish":
            return "<action>finish</action>"
        if step == "solve":
            n = self.choose("solvers", (1, 2, 3, 4))
            names = [self.choose("solver", named["solve"]) for _ in range(n)]
            return added(operator=names[0]) if n == 1 else added(structure="parallel", operators=", ".join(names))
        if step == "repair":
            return self.repair(named["check"], named["revise"])
        return added(operator=self.choose(step, named[step]))

    def repair(self, checkers: Sequence[str], revisers: Sequence[str]) -> str:
        form = self.choose("form", ("check", "revise", "conditional", "loop"))
        checker = self.choose("checker", checkers) if form != "revise" else ""
        reviser = self.choose("reviser", revisers) if form != "check" else ""
        if form == "loop":
            return added(structure="loop", operators=f"{checker}, {reviser}", count=self.choose("count", range(1, MAX_LOOP + 1)))
        if form == "conditional":
            return added(structure="conditional", condition=checker, true=reviser)
        return added(operator=checker or reviser)


def added(**tags: Any) -> str:
    return "<action>add</action>" + "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags.items())


# ---- a run -----------------------------------------------------------------------------------------------------------------


def play(task: Task, editor: Editor, world: World) -> Canvas:
    canvas = world.new_canvas(task)
    while not canvas.done:
        feedback = canvas.step(editor.edit(canvas))
        assert feedback.ok, f"the canvas refused an edit of the tables: {feedback.error or feedback.text}"
    return canvas


def score(canvas: Canvas, executions: int, seed: int) -> Grade:
    """The answer's grade, or the mean over executions of the workflow by executors that nothing else asks."""
    if executions == 1:
        return graded(canvas)
    scores = []
    for i in range(executions):
        backend = SimulatedBackend(seed + 10_000 * (i + 1))
        new_canvas = partial(Canvas, library=canvas.library, backend=backend, config=canvas.config)
        scores.append(baselines.score_workflow(canvas.graph.to_text(), canvas.task, new_canvas, grade))
    return Grade(fmean(scores), fmean(scores), fmean(scores))


def graded(canvas: Canvas) -> Grade:
    result = grade(canvas.task, canvas.answer)
    if result.error:
        raise OSError(f"the grader failed on {canvas.task.id}: {result.error}")
    return result


def run(setting: str, seed: int, lr: float, steps: int, eval_tasks: int) -> dict[str, Any]:
    """Train tables, evaluate them on the held-out tasks; return what is kept of it."""
    by_kind, executions, times, _ = SETTINGS[setting]
    args = train.parse_args(["--seed", str(seed), "--steps", str(steps * times), "--eval-tasks", str(eval_tasks),
                             "--max-turns", str(TURNS)])
    pool, held_out = load_tasks(args)
    world, tables, rng = World(args), Tables(), random.Random(f"{seed}/tables")
    accuracy = []

    def new_editor(task: Task) -> Editor:
        return Editor(tables, rng, task.kind if by_kind else "")

    line = Progress(f"{setting}, seed {seed}, lr {lr:g}", args.steps)
    for step in range(args.steps):
        tasks = [job.task for job in train.choose_jobs(pool, step, args)]
        editors = [new_editor(task) for task in tasks]
        canvases = [play(task, editor, world) for task, editor in zip(tasks, editors, strict=True)]
        rewards = [reward(canvas, score(canvas, executions, seed), world.reward_config).total for canvas in canvases]
        advantages = group_advantages(rewards, [task.id for task in tasks]).tolist()
        size = train.learning_rate(step, argparse.Namespace(**vars(args) | {"lr": lr}))
        tables.ascend([(editor.choices, a) for editor, a in zip(editors, advantages, strict=True)], size)
        accuracy.append(fmean(graded(canvas).score for canvas in canvases))
        line.advance(text=f"acc {accuracy[-1]:.2f}")
    line.close()
    final = [play(task, new_editor(task), world) for task in held_out]
    return {"setting": setting, "seed": seed, "lr": lr, "steps": steps, "eval_tasks": eval_tasks, "versions": versions(),
            "trajectories": args.steps * len(tasks), "accuracy": accuracy, "scores": [graded(canvas).score for canvas in final],
            "workflows": [canvas.graph.to_text() for canvas in final]}


def require_same(path: Path, args: argparse.Namespace) -> None:
    """A result that is there stands for these flags; refuse if it was made with others."""
    made = json.loads(path.read_text())
    if (made["steps"], made["eval_tasks"]) != (args.steps, args.eval_tasks):
        raise ValueError(f"{path} was made with --steps {made['steps']} --eval-tasks {made['eval_tasks']}; "
                         "choose another --results")


def report(results: Path) -> str:
    """Mean ± standard deviation over seeds of the held-out score, and its share of the best reachable, where that is known."""
    rows = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    best = {int(path.stem.rpartition("-")[2]): json.loads(path.read_text())["accuracy"]
            for path in REACHABLE.glob("reachable-*.json")}
    table = [("", "lr", "trajectories", "executions", "held-out score", "of the best reachable, by seed")]
    for setting in SETTINGS:
        for lr in sorted({row["lr"] for row in rows if row["setting"] == setting}):
            mine = sorted((row for row in rows if (row["setting"], row["lr"]) == (setting, lr)), key=lambda row: row["seed"])
            scores = [fmean(row["scores"]) for row in mine]
            spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
            shares = [f"{row['seed']}: {x / best[row['seed']]:.2f}" if row["seed"] in best else f"{row['seed']}: not computed"
                      for row, x in zip(mine, scores, strict=True)]
            table.append((setting, f"{lr:g}", str(mine[0]["trajectories"]), str(SETTINGS[setting].executions),
                          f"{fmean(scores):.3f}{spread}", ", ".join(shares)))
    return markdown(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS), metavar="NAME",
                        help=f"of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5], help="(default: 3 to 5)")
    parser.add_argument("--lrs", nargs="+", type=float, help="sizes of a step, each tried (default: the setting's own)")
    parser.add_argument("--steps", type=int, default=40, help="of a run, four times as many where the setting says so "
                                                              "(default %(default)s)")
    parser.add_argument("--eval-tasks", type=int, default=64, help="of each source (default %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of the results' files (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="only the table, from the results that are there")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    runs = [(s, seed, lr) for seed in args.seeds for s in args.settings for lr in args.lrs or [SETTINGS[s].lr]]
    for setting, seed, lr in runs * (not args.report):
        path = args.results / f"{setting}-{lr:g}-{seed}.json"
        if path.exists():
            require_same(path, args)
        else:
            write(path, run(setting, seed, lr, args.steps, args.eval_tasks))
    print(report(args.results))


if __name__ == "__main__":
    end_on_signals("bench/tabular.py: interrupted; the same command goes on")
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"bench/tabular.py: {error}")
    except KeyboardInterrupt:
        sys.exit("bench/tabular.py: interrupted; the same command goes on")
