"""What the simulated executor makes of fixed workflows: does the best one differ between kinds, do shortcuts lose?

    python bench/world.py --tasks 64          a table and bench/results/world.json; minutes, for toy_stdin_code most of them

The last rows are shortcuts: one operator and finish, and the least that earns all of R_div. No policy takes part.
"""
from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import baselines
import operators
import toys
from backends import SimulatedBackend
from canvas import Canvas, CanvasConfig
from rewards import grade
from stats import markdown
from tasks import Task, toy_tasks

WORKFLOWS = {
    "calculate, verify": "Plan -> Programmer -> (Verify -> Revise) * 3 -> Format",
    "split, read, review": "Decompose -> AnswerGenerate -> (Review -> Revise) * 3 -> Format",
    "program, test, review": "Plan -> Programmer -> (Test -> Revise) * 3 -> (Review -> Revise) * 3 -> Format",
    "three opinions, verify": "[Programmer, Custom, AnswerGenerate] -> ScEnsemble -> (Verify ? Revise : done) -> Format",
    "Programmer alone": "Programmer -> Format",
    "Custom alone": "Custom -> Format",
    "AnswerGenerate alone": "AnswerGenerate -> Format",
    "the least for R_div": "Custom -> Format -> [Plan, Plan] -> Review",
}


def random_structures(n: int, seed: int) -> str:
    """n random structures of two to four random operators and a Format: what a policy does that has learned form alone."""
    rng, library = random.Random(seed), operators.library()
    free = [name for name in library if library[name].role != "ensemble"]
    bodies = [rng.choices(free, k=rng.randint(2, 4)) for _ in range(n)]
    stages = [f"[{', '.join(b)}]" if rng.random() < 0.5 else f"({' -> '.join(b)}) * {rng.randint(1, 3)}" for b in bodies]
    return " -> ".join([*stages, "Format"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=64, help="of each source (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of tasks and simulation (default %(default)s)")
    parser.add_argument("--sources", nargs="+", choices=tuple(toys.MAKERS), default=list(toys.MAKERS))
    args = parser.parse_args()
    scores = measure(args)
    print(markdown([("", *args.sources), *((name, *(f"{row[s]:.2f}" for s in args.sources)) for name, row in scores.items())]))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "world.json").write_text(json.dumps({"flags": vars(args), "workflows": WORKFLOWS, "scores": scores}, indent=1))


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{workflow: {source: mean score}}"""
    library, backend = operators.library(), SimulatedBackend(args.seed)

    def new_canvas(task: Task) -> Canvas:
        return Canvas(task, library, backend, CanvasConfig())

    scores: dict[str, dict[str, float]] = {}
    for source in args.sources:
        tasks = toy_tasks(source, args.tasks, args.seed)
        for name, workflow in WORKFLOWS.items():
            score = sum(baselines.score_workflow(workflow, task, new_canvas, grade) for task in tasks) / len(tasks)
            scores.setdefault(name, {})[source] = score
        mean = sum(baselines.score_workflow(random_structures(6, i), task, new_canvas, grade) for i, task in enumerate(tasks))
        scores.setdefault("six random structures", {})[source] = mean / len(tasks)
        print(f"{source} done", file=sys.stderr, flush=True)
    return scores


if __name__ == "__main__":
    main()
