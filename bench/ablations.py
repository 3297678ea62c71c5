"""Does CWRPO do what it says? Ablations, baselines and sensitivity, all in the simulated toy world.

    python bench/ablations.py                                  everything: hours on two cores; stop it and start it again
    python bench/ablations.py --variants full no-mask --seeds 3 4
    python bench/ablations.py --report                         tables and figures of what is there, no training

Every (variant, seed) is one train.py run from the same warm start with the same number of trajectories, then an evaluation on
the held-out tasks (IID) and on sources that were never trained on (OOD). Its result is a file, bench/results/ablations/
VARIANT-SEED.json, that is never made twice; a run that is cut off goes on from its last checkpoint in --work. Seed after seed
is gone through, so that what is there at any time compares all variants. Reporting seeds are 3, 4, 5 (6, 7 for the main five);
nothing may be tuned on them.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import ablation_report

import baselines
import cwrpo
import eval as evaluation
import train
from metrics import evaluation_record
from rewards import grade
from rollout import Trajectory
from rundir import RunDir, end_on_signals
from world import World, load_policy, load_tasks, make_sampler, model_directory, ood_toys

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "ablations"
MAIN = ("full", "no-mask", "no-diversity", "no-release", "grpo")
VARIANTS: dict[str, str] = {  # name -> flags of train.py beside SHARED and the tiny preset's
    "full": "",
    "no-mask": "--no-mask",
    "no-diversity": "--no-diversity",  # which is GRPO with the mask: the preset's groups are tasks
    "no-release": "--no-release",
    "grpo": "--group-by task --no-diversity --no-mask",  # the answer's reward alone, every token behind the prompt trained
    "by-source": "--group-by source",  # the paper's groups; the preset compares rollouts of one task
    "dr-grpo": "--loss-norm constant",  # and advantages without the division by the deviation
    "two-epochs": "--epochs 2",  # what clip-higher is to be compared with: with one epoch nothing is ever clipped
    "clip-higher": "--epochs 2 --clip-eps-high 0.28",
    "kl-off": "--kl-coef 0",
    "reinforce-1024": "--kl-coef 0",  # historical: see `historical`
    "strict": "--strict-structure",
    "min-operators-3": "--min-operators 3",
    "min-operators-4": "--min-operators 4",
    "min-operators-7": "--min-operators 7",
    "equal-weights": "--reward-weights 0.25,0.25,0.25,0.25",
    "rising-weights": "--reward-weights 0.1,0.2,0.3,0.4",
}
# A policy that knows the grammar alone, in short episodes: what knows the order of the roles already is nearly always feasible.
SHARED = ("--no-baselines", "--quiet", "--model", "tiny-grammar", "--max-turns", "8", "--temperature", "0.8")
CURVES = ("reward", "feasible_rate", "accuracy", "operators", "hack_no_op", "hack_idle_parallel", "hack_idle_control",
          "hack_after_format")


# ---- what is not a flag of train.py, because nobody should train with it ---------------------------------------------------


def truncated(tau: Trajectory, n: int = 1024) -> Trajectory:
    """The first n tokens of a conversation: what the published code trained on, whatever followed."""
    return replace(tau, tokens=tau.tokens[:n], mask=tau.mask[:n], sampled_logprobs=tau.sampled_logprobs[:n])


@contextlib.contextmanager
def historical(variant: str) -> Iterator[None]:
    """The parts of dr-grpo and reinforce-1024 that train.py has no flag for.

    dr-grpo: A = R - mean of the group. Rewards lie in [-1, 1], so that no deviation exceeds the floor of 1.
    reinforce-1024: A = R - mean of the step, and the loss sees the first 1024 tokens of each conversation. With one optimiser
    step a batch the ratio is 1, and the clipped surrogate is REINFORCE's gradient.
    """
    plain = cwrpo.group_advantages
    if variant == "dr-grpo":
        with patch.object(train, "group_advantages", lambda rewards, groups: plain(rewards, groups, std_floor=1.0)):
            yield
    elif variant == "reinforce-1024":
        def update(model: Any, optimizer: Any, taus: Sequence[Trajectory], *rest: Any) -> dict[str, float]:
            return cwrpo.update(model, optimizer, [truncated(tau) for tau in taus], *rest)

        with (patch.object(train, "group_advantages", lambda rewards, groups: plain(rewards, [0] * len(groups), std_floor=1.0)),
              patch.object(train, "update", update)):
            yield
    else:
        yield


# ---- one run ---------------------------------------------------------------------------------------------------------------


def words_of(variant: str, seed: int, args: argparse.Namespace) -> list[str]:
    """All flags that the run depends on; --out is not one."""
    shared = [*SHARED, "--seed", str(seed), "--steps", str(args.steps), "--eval-tasks", str(args.eval_tasks), *args.flags.split()]
    return [*shared, *VARIANTS[variant].split()]


def run(variant: str, seed: int, args: argparse.Namespace) -> None:
    """Train, or go on training, and evaluate; write the result's file."""
    out, words = args.work / f"{variant}-{seed}", words_of(variant, seed, args)
    started = (out / "args.json").exists()
    if started:
        require_same(out, words)
    with historical(variant):
        if not (out / "summary.json").exists():
            train.train(train.parse_args(["--out", str(out), "--resume"] if started else ["--out", str(out), *words]))
    flags = train.parse_args(["--out", str(out), *words])
    records = evaluated(out, flags)
    metrics, summary = RunDir(out).read("metrics.jsonl"), json.loads((out / "summary.json").read_text())
    kept = ("task_id", "source", "score", "operators", "hacks", "workflow")
    result = {
        "variant": variant, "seed": seed, "flags": words, "warm_start": warm_start(flags),
        "versions": versions(), "trajectories": summary["trajectories"],
        "warm_start_score": summary["accuracy_warmstart"],  # on the held-out tasks
        "curves": {name: [row[name] for row in metrics] for name in CURVES},
        "records": [{**{name: r[name] for name in kept}, "feasible": bool(r["parts"]) and r["parts"]["diversity"] == 1,
                     "turns": len(r["turns"]), "executor_tokens": r["usage"]["prompt_tokens"] + r["usage"]["completion_tokens"]}
                    for r in records]}
    write(args.results / f"{variant}-{seed}.json", result)


def require_same(out: Path, words: list[str]) -> None:
    """A run that was begun goes on with its own flags; refuse if these are others."""
    wanted, stored = vars(train.parse_args(words)), RunDir(out).read_args()["flags"]
    set_later = ("out", "resume", "max_context")
    if other := [name for name in stored if name not in set_later and stored[name] != wanted.get(name)]:
        raise ValueError(f"{out} was begun with another {', '.join(other)}; remove it or choose another --work")


def versions() -> dict[str, Any]:
    """What a result was made with."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "commit": commit}


def warm_start(flags: argparse.Namespace) -> str:
    """What all runs began with, by content: the demonstrations behind the weights were played in the same world."""
    return hashlib.sha256((model_directory(flags.model) / "model.safetensors").read_bytes()).hexdigest()[:12]


def evaluated(out: Path, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of the trained policy on held-out and OOD tasks; feasible is what the unchanged R_div says."""
    flags.adapter, flags.no_diversity, flags.no_release, flags.strict_structure = out, False, False, False
    flags.min_operators, flags.reward_weights = 5, "0.2,0.2,0.2,0.4"
    model, tokenizer = load_policy(flags)
    evaluation.add_adapter(flags, model.eval())
    world, sampler = World(flags), make_sampler(flags, model, tokenizer)
    try:
        sampler.load_adapter(version=0)
        taus = evaluation.evaluate(load_tasks(flags)[1] + ood_toys(flags), sampler, tokenizer, world,
                                   evaluation.rollout_config(flags, world), flags.seed)
    finally:
        sampler.close()
    return [evaluation_record(tau) for tau in taus]


def reachable(seed: int, args: argparse.Namespace) -> None:
    """The best that a policy can reach which tells training sources apart (baselines.best_reachable), once a seed."""
    flags = train.parse_args(words_of("full", seed, args))
    pool, held_out = load_tasks(flags)
    rows = baselines.best_reachable(pool, held_out, World(flags).new_canvas, grade, flags.max_turns)
    accuracy = sum(row["accuracy"] * row["tasks"] for row in rows) / len(held_out)
    write(args.results / f"reachable-{seed}.json", {"seed": seed, "accuracy": accuracy, "rows": rows,
                                                    "flags": words_of("full", seed, args)})


def write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def to_do(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(variant, seed) pairs without a result; the main five first within a seed, and alone from seed 6 on."""
    names = sorted(args.variants, key=lambda name: (name not in MAIN, list(VARIANTS).index(name)))
    pairs = [(name, seed) for seed in args.seeds for name in names if seed < 6 or name in MAIN]
    left = []
    for name, seed in pairs:
        path = args.results / f"{name}-{seed}.json"
        if not path.exists():
            left.append((name, seed))
        elif json.loads(path.read_text())["flags"] != words_of(name, seed, args):
            raise ValueError(f"{path} was made with other flags; choose another --results")
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), metavar="NAME",
                        help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5, 6, 7], help="(default: 3 to 7)")
    parser.add_argument("--steps", type=int, default=40, help="of each run (default %(default)s)")
    parser.add_argument("--eval-tasks", type=int, default=64, help="of each source (default %(default)s)")
    parser.add_argument("--flags", default="", help="further flags of train.py for every variant, in quotes")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="run directories (default %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of the results' files (default %(default)s)")
    parser.add_argument("--figures", type=Path, help="directory for ablations.png and dynamics.png (default: --results)")
    parser.add_argument("--report", action="store_true", help="only tables and figures, from the results that are there")
    args = parser.parse_args()
    if not args.report:
        left = to_do(args)
        for i, (variant, seed) in enumerate(left):
            print(f"{i + 1} of {len(left)}: {variant}, seed {seed}", file=sys.stderr, flush=True)
            if not (args.results / f"reachable-{seed}.json").exists():
                reachable(seed, args)
            run(variant, seed, args)
    print(ablation_report.report(args.results, list(VARIANTS), args.figures or args.results))


if __name__ == "__main__":
    end_on_signals("bench/ablations.py: interrupted; the same command goes on")
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"bench/ablations.py: {error}")
    except KeyboardInterrupt:
        sys.exit("bench/ablations.py: interrupted; the same command goes on")
