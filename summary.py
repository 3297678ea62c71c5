"""The end of a training run: what it is compared with, what is written, and what is printed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import baselines
import report
from eval import score_of, summarise
from metrics import commonest_workflows
from rewards import grade
from rollout import Trajectory
from rundir import RunDir
from tasks import Task
from terminal import summary_text
from world import World


def finish(out: RunDir, args: argparse.Namespace, after: Sequence[Trajectory], pool: Sequence[Task],
           held_out: Sequence[Task], world: World, started: float) -> dict[str, Any]:
    """Compare with the start and the baselines, write summary.json, the plots and the page, and print it all."""
    metrics = out.read("metrics.jsonl")
    before = json.loads((out.path / "before.json").read_text(encoding="utf-8"))
    mean = {name: sum(row[name] for row in rows) / len(rows) for name, rows in
            (("reward", metrics[-10:]), ("feasible_rate", metrics[-10:]), ("tokens_per_second", metrics))}
    summary: dict[str, Any] = {
        "seed": args.seed, "steps": args.steps, "wall_seconds": 0.0,
        "reward_first10": sum(row["reward"] for row in metrics[:10]) / len(metrics[:10]), "reward_last10": mean["reward"],
        "feasible_rate_last10": mean["feasible_rate"], "accuracy_random": before["random"],
        "accuracy_warmstart": before["rows"][-1]["score"], "accuracy_trained": sum(map(score_of, after)) / len(after),
        "accuracy_best_fixed": None, "accuracy_best_reachable": None, "tokens_per_second": mean["tokens_per_second"],
        "trajectories": sum(row["trajectories"] for row in metrics), "commonest_workflow": commonest_workflows(after)}
    if not args.no_baselines and world.backend.instant:
        if not (args.quiet or args.log_json):
            print("Searching for the best fixed and the best reachable workflows ...", file=sys.stderr, flush=True)
        fixed = baselines.best_fixed(pool, held_out, world.new_canvas, grade, summary["trajectories"], args.seed)
        reachable = baselines.best_reachable(pool, held_out, world.new_canvas, grade, args.max_turns)
        summary |= {"accuracy_best_fixed": fixed.accuracy, "best_fixed": fixed.workflow, "best_reachable": reachable,
                    "accuracy_best_reachable": sum(r["accuracy"] * r["tasks"] for r in reachable) / len(held_out)}
    summary["wall_seconds"] = time.monotonic() - started
    out.write_json("summary.json", summary)
    report.write_curves([out.path], out.path / "curves.png")
    report.write_report(out.path)
    if args.log_json:
        print(json.dumps(summary), flush=True)
    else:
        print(f"\n{summary_text(summary, before, summarise(after), 'simulated' in world.backend.name)}\n"
              f"adapter {out.latest()}\nmetrics {out.path / 'metrics.jsonl'}\n"
              f"plots   {out.path / 'curves.png'}\npage    {out.path / 'report.html'}")
    return summary
