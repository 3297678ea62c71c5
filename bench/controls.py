"""Is it the trained workflow that answers, or what it costs, or its size? Controls for the results of bench/ablations.py.

    python bench/controls.py             for every seed of the variant full that is there; goes on where it was stopped
    python bench/controls.py --report    the table from bench/results/controls alone

On every task that a trained policy was evaluated on, three things are played against the workflow that it designed there:
default-prompts   the same workflow with the operators' default prompts
shuffled          the same structure with its operators in random order (what the canvas would refuse is drawn again)
equal-tokens      the executor alone, asked as often as the executor tokens of the policy's episode allow, then a vote

The simulated executor's skill does not depend on prompts: there, default-prompts can differ by luck alone.
"""
from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import ablation_report
import ablations

import baselines
import train
from canvas import Canvas
from graph import Graph, GraphError
from rewards import grade
from rundir import end_on_signals
from tasks import Task
from world import World, load_tasks, ood_toys

RESULTS = Path(__file__).parent / "results" / "controls"
TRIES = 1000  # of a shuffle, before the workflow is played as it is


def shuffled(text: str, task: Task, world: World, seed: str) -> str:
    """The workflow with its operators permuted, such that the canvas accepts it; itself where no drawn order is accepted."""
    rng, graph = random.Random(seed), Graph.from_text(text)
    canvas = world.new_canvas(task)
    names = graph.operators()
    for _ in range(TRIES):
        other, drawn = copy.deepcopy(graph), rng.sample(names, len(names))
        for node, name in zip(other.nodes(), drawn, strict=True):
            node.operator = name
        try:
            for stage in other.stages:
                canvas._check_roles(stage.kind, [node.operator for node in stage.nodes])
        except GraphError:
            continue
        return other.to_text()
    return text


def play(record: dict[str, Any], task: Task, world: World, seed: int) -> dict[str, dict[str, Any]]:
    """{control: record} on one task."""
    text = record["workflow"]
    other = shuffled(text, task, world, f"{seed}/shuffled/{task.id}")
    canvases: dict[str, Callable[[], Canvas]] = {
        "default-prompts": lambda: baselines.fixed(text, task, world.new_canvas),
        "shuffled": lambda: baselines.fixed(other, task, world.new_canvas),
        "equal-tokens": lambda: baselines.self_consistency(task, world.new_canvas, record["executor_tokens"])}
    found = {}
    for name, make in canvases.items():
        canvas = make()
        result = grade(task, canvas.answer)
        if result.error:
            raise OSError(f"the grader failed on {task.id}: {result.error}")
        tokens = canvas.usage.prompt_tokens + canvas.usage.completion_tokens
        found[name] = {"task_id": task.id, "source": task.source, "score": result.score, "executor_tokens": tokens}
    return found


def run(path: Path, results: Path) -> None:
    """Play the controls of one result of bench/ablations.py."""
    result = json.loads(path.read_text())
    flags = train.parse_args(result["flags"])
    tasks = {task.id: task for task in load_tasks(flags)[1] + ood_toys(flags)}
    world, seed = World(flags), result["seed"]
    with ThreadPoolExecutor(4) as pool:
        played = list(pool.map(lambda record: play(record, tasks[record["task_id"]], world, seed), result["records"]))
    records = {name: [each[name] for each in played] for name in played[0]}
    kept = {name: result[name] for name in ("seed", "flags", "versions")}
    ablations.write(results / path.name, {**kept, "records": records})


def report(variant: str, trained: Path, results: Path) -> str:
    """The table: mean over seeds of each group's score and tokens, and the trained policy's minus it, paired by task."""
    files = sorted(results.glob(f"{variant}-[0-9]*.json"))
    if not files:
        raise ValueError(f"{results} has no results of {variant}; run bench/controls.py without --report")
    policy = {r["seed"]: r for r in (json.loads((trained / path.name).read_text()) for path in files)}
    controls = [json.loads(path.read_text()) for path in files]
    by_name = {"policy": policy} | {name: {c["seed"]: {"records": c["records"][name]} for c in controls}
                                    for name in controls[0]["records"]}
    rows = [("", "seeds", "IID", "OOD", "executor tokens", "policy - it, IID (95%)", "policy - it, OOD (95%)")]
    for name, runs in by_name.items():
        cells = [name, str(len(runs))]
        cells += [ablation_report.shown([_mean(ablation_report.scores(r, ood).values()) for r in runs.values()])
                  for ood in (False, True)]
        cells.append(f"{_mean([r['executor_tokens'] for run in runs.values() for r in run['records']]):.0f}")
        for ood in (False, True):
            found = ablation_report.difference(runs, policy, ood)
            cells.append("" if name == "policy" else "{:+.3f} ({:+.3f} to {:+.3f})".format(*found))
        rows.append(tuple(cells))
    return f"A simulation. Variant {variant}.\n\n{ablation_report.markdown(rows)}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=tuple(ablations.VARIANTS), default="full", help="(default %(default)s)")
    parser.add_argument("--trained", type=Path, default=ablations.RESULTS, help="results of ablations.py (default %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of the controls (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="only the table, from the results that are there")
    args = parser.parse_args()
    paths = [] if args.report else sorted(args.trained.glob(f"{args.variant}-[0-9]*.json"))
    for path in paths:
        if not (args.results / path.name).exists():
            print(path.name, file=sys.stderr, flush=True)
            run(path, args.results)
    print(report(args.variant, args.trained, args.results))


if __name__ == "__main__":
    end_on_signals("bench/controls.py: interrupted; the same command goes on")
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"bench/controls.py: {error}")
    except KeyboardInterrupt:
        sys.exit("bench/controls.py: interrupted; the same command goes on")
