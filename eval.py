"""Evaluate a Flow-Director on held-out tasks: a table per source, with confidence intervals.

    python eval.py --adapter runs/default                        the run's own held-out tasks and flags
    python eval.py --adapter runs/default --data my_tasks.jsonl  other tasks, all of them
    python eval.py --data my_tasks.jsonl                         the policy before training

Failures (executor, policy or grader out of order) count as score 0 in the table and are shown apart. The 95% intervals
are bootstrapped over tasks, with the runs of one task averaged first, because they are not independent.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from tqdm import tqdm

from backends import ExecutorError
from flags import (
    PRESETS,
    Sampler,
    UsageError,
    World,
    add_shared_flags,
    check_shared_flags,
    load_policy,
    load_tasks,
    make_sampler,
    preset_defaults,
)
from lora import add_lora, load_adapter, read_adapter
from metrics import commonest_workflows, trajectory_record
from policy import ChatTokenizer
from rollout import Job, RolloutConfig, Trajectory, rollout, turn_seed
from rundir import RunDir, end_on_signals
from tasks import Task, read_tasks
from vllm_sampler import ServerError

AT_ONCE = 64  # episodes played together
RESAMPLES = 2000


def rollout_config(args: argparse.Namespace, world: World) -> RolloutConfig:
    return RolloutConfig(max_context=args.max_context, max_new_tokens=args.max_new_tokens,
                         lockstep=world.backend.lockstep and not args.policy_url)


def evaluate(tasks: Sequence[Task], sampler: Sampler, tokenizer: ChatTokenizer, world: World,
             config: RolloutConfig, seed: int, runs: int = 1, label: str = "") -> list[Trajectory]:
    """Play every task `runs` times. Seeds depend on (seed, task, run), so that policies meet the same chances."""
    jobs = [Job(task, run, turn_seed(random.Random(f"{seed}/eval/{task.id}/{run}").getrandbits(60), 0))
            for task in tasks for run in range(runs)]
    taus: list[Trajectory] = []
    with tqdm(total=len(jobs), desc=label or "evaluating", unit="tau", disable=None, leave=False) as bar:
        for start in range(0, len(jobs), AT_ONCE):
            taus += rollout(jobs[start:start + AT_ONCE], sampler, tokenizer, world.new_canvas, world.score, config)
            bar.update(len(taus) - bar.n)
    return taus


def score_of(tau: Trajectory) -> float:
    return 0.0 if tau.dropped else tau.grade.score


def interval(taus: Sequence[Trajectory], seed: int = 0) -> tuple[float, float, float]:
    """(mean score, low, high): 95% bootstrap over tasks."""
    by_task: dict[str, list[float]] = {}
    for tau in taus:
        by_task.setdefault(tau.task.id, []).append(score_of(tau))
    means = np.array([fmean(scores) for scores in by_task.values()])
    rng = np.random.default_rng(seed)
    resampled = means[rng.integers(0, len(means), (RESAMPLES, len(means)))].mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(means.mean()), float(low), float(high)


def summarise(taus: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """A row per source and one for all."""
    sources = sorted({tau.task.source for tau in taus})
    rows = []
    for name in [*sources, "all"] if len(sources) > 1 else sources:
        mine = [tau for tau in taus if name in ("all", tau.task.source)]
        scored = [tau for tau in mine if not tau.dropped]
        score, low, high = interval(mine)
        exact = [tau.grade.em if tau.grade.passed is None else float(tau.grade.passed) for tau in scored]
        rows.append({
            "source": name, "tasks": len({tau.task.id for tau in mine}), "score": score, "low": low, "high": high,
            "exact": sum(exact) / len(mine), "feasible_rate": sum(tau.parts.diversity == 1 for tau in scored) / len(mine),
            "turns": fmean(len(tau.turns) for tau in mine),
            "operators": fmean(len(tau.canvas.graph.operators()) for tau in mine),
            "executor_calls": fmean(tau.canvas.usage.calls for tau in mine), "failed": len(mine) - len(scored)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, aligned for the terminal. score: F1 for questions, accuracy for math and choice, pass@1 for code."""
    head = ("source", "tasks", "score", "95% interval", "EM/pass", "R_div = 1", "turns", "operators", "calls", "failed")
    cells = [head, *((r["source"], str(r["tasks"]), f"{r['score']:.3f}", f"{r['low']:.3f}-{r['high']:.3f}",
                      f"{r['exact']:.3f}", f"{r['feasible_rate']:.2f}", f"{r['turns']:.1f}", f"{r['operators']:.1f}",
                      f"{r['executor_calls']:.1f}", str(r["failed"])) for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_flags(parser)
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--adapter", type=Path, metavar="RUN", help="run directory or PEFT adapter; none: untrained")
    evaluation.add_argument("--runs", type=int, default=1, help="episodes a task (default %(default)s)")
    evaluation.add_argument("--limit", type=int, help="tasks per source, at most")
    evaluation.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="defaults without a run directory")
    evaluation.add_argument("--out", type=Path, metavar="DIR", help="write eval.json, eval.md and trajectories.jsonl there")
    known = {action.dest for action in parser._actions}
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides the defaults of the rest
    ahead.add_argument("--adapter", type=Path)
    ahead.add_argument("--data", nargs="+")
    first, _ = ahead.parse_known_args(arguments)
    defaults = dict(preset_defaults(arguments))
    if first.adapter and (first.adapter / "args.json").exists():
        defaults |= RunDir(first.adapter).read_args()["flags"]
        for name in ("preset", "out"):
            defaults.pop(name, None)
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    args = parser.parse_args(arguments)
    args.data_given = first.data is not None
    return args


def adapter_directory(path: Path) -> Path:
    """A run's newest checkpoint, or the adapter directory itself."""
    if (path / "adapter_config.json").exists():
        return path
    newest = RunDir(path).latest()
    if newest is None:
        raise UsageError(f"{path} is neither an adapter directory nor a run with a checkpoint")
    return newest


def run(args: argparse.Namespace) -> None:
    check_shared_flags(args)
    if args.out and args.out.exists():
        raise UsageError(f"--out {args.out} exists; choose another")
    if args.data_given:  # named files are evaluated whole; a run's own tasks are its held-out ones
        tasks = read_tasks(args.data)
    else:
        tasks = load_tasks(args)[1]
    if args.limit:
        tasks = [t for i, t in enumerate(tasks) if sum(o.source == t.source for o in tasks[:i]) < args.limit]
    world = World(args)
    model, tokenizer = load_policy(args)
    if args.adapter:
        directory = adapter_directory(args.adapter)
        config, _ = read_adapter(directory)
        add_lora(model, config["r"], config["lora_alpha"], 0.0, config["target_modules"])
        load_adapter(model, directory)
    model.eval()
    sampler = make_sampler(args, model, tokenizer)
    try:
        sampler.load_adapter(version=0)
        taus = evaluate(tasks, sampler, tokenizer, world, rollout_config(args, world), args.seed, args.runs)
    finally:
        sampler.close()
    rows = summarise(taus)
    executor = world.backend.name + (" (a simulation, no LLM)" if "simulated" in world.backend.name else "")
    print(f"policy {args.model}, adapter {args.adapter or 'none'}; executor {executor}\n\n{table(rows)}")
    for kind, text in commonest_workflows(taus).items():
        print(f"commonest workflow for {kind}: {text or '(empty)'}")
    if args.out:
        args.out.mkdir(parents=True)
        out = RunDir(args.out)
        out.write_json("eval.json", {"rows": rows, "flags": {k: str(v) for k, v in vars(args).items()}})
        (args.out / "eval.md").write_text(table(rows) + "\n", encoding="utf-8")
        out.append("trajectories.jsonl", *(trajectory_record(tau, 0) for tau in taus))


INTERRUPTED = "eval.py: interrupted"


def main() -> None:
    try:
        run(parse_args())
    except (ValueError, OSError, ExecutorError, ServerError, json.JSONDecodeError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    end_on_signals(INTERRUPTED)
    main()
