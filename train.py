"""Train a Flow-Director with CWRPO.

    python train.py                                     no GPU, no server, no download; at most ten minutes on two cores
    python train.py --data tasks/*.jsonl --steps 100    real tasks (FlowSteer-Dataset JSONL)
    python train.py --out runs/default --resume         go on where a run was stopped or killed
    torchrun --nproc-per-node=2 train.py                several processes or GPUs, one run (also with --resume)

Each step samples whole conversations with the canvas (token in, token out), grades them, and takes one optimiser step on
LoRA weights. Tasks and sampling seeds are pure functions of (seed, step, task, rollout, turn): to resume, nothing but
weights, optimiser and step has to be restored.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds: Ctrl-C, --help and a mistake are answered at once
    from rundir import end_on_signals

    end_on_signals("train.py: interrupted", seconds=0)
    from flags import parse_training, read_early

    ARGS = read_early("train.py", parse_training, __doc__)

import argparse
import json
import math
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import baselines
import ranks
import trackers
from ahead import Gather, Rollouts
from backends import ExecutorError, Request
from cwrpo import UpdateConfig, group_advantages, uniform_groups, update
from eval import evaluate, rollout_config, summarise
from flags import UsageError, check_shared_flags, parse_training
from lora import add_lora, disable_lora, lora_parameters, with_own_lora
from memory import server_asleep
from metrics import rollout_metrics, trajectory_record
from policy import ChatTokenizer
from qwen3 import Qwen3
from ranks import RankError
from rewards import grade
from rollout import Job, Trajectory, rollout, turn_seed
from rundir import ReadOnly, RunDir, end_on_signals, naming_lacks
from summary import finish
from tasks import Task, toy_tasks
from terminal import Progress
from vllm_check import Check, checks
from vllm_server import ServerError
from warmstart import parse_rate
from world import Sampler, World, load_policy, load_tasks, make_sampler, vllm_samplers


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_training(arguments, __doc__)


def check_flags(args: argparse.Namespace) -> None:
    check_shared_flags(args)
    trackers.require(*(name for name in trackers.MODULES if getattr(args, name)))
    for name in ("steps", "tasks_per_source", "rollouts_per_task", "save_every", "epochs", "lora_rank", "micro_batch_tokens",
                 "min_trajectories"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.group_by == "task" and args.rollouts_per_task == 1:
        raise UsageError("--group-by task with --rollouts-per-task 1: every group has one trajectory, every advantage is 0")
    if args.shard and (ranks.size() == 1 or not args.policy_url or args.async_depth):
        raise UsageError("--shard needs several processes (torchrun --nproc-per-node=2 or more) and --policy-url, as sampling in "
                         "a process would put every layer together for every token; and --async-depth 0")
    if args.colocate and (ranks.size() > 1 or len(args.policy_url or ()) != 1 or args.async_depth):
        raise UsageError("--colocate is one card in turns: one --policy-url, one process and --async-depth 0")
    if args.lr <= 0:
        raise UsageError(f"--lr is {args.lr}; it must be positive")


# ---- a step's ingredients, pure in (seed, step) -----------------------------------------------------------------------


def choose_jobs(pool: Sequence[Task], step: int, args: argparse.Namespace) -> list[Job]:
    """The step's episodes. Each source is gone through in a new order an epoch, so that every task comes equally often."""
    jobs = []
    for source in sorted({task.source for task in pool}):
        tasks = [task for task in pool if task.source == source]
        for place in range(step * args.tasks_per_source, (step + 1) * args.tasks_per_source):
            epoch, i = divmod(place, len(tasks))
            task = tasks[random.Random(f"{args.seed}/{source}/{epoch}").sample(range(len(tasks)), len(tasks))[i]]
            for rollout_index in range(args.rollouts_per_task):
                seed = random.Random(f"{args.seed}/{step}/{place}/{task.id}/{rollout_index}").getrandbits(60)
                jobs.append(Job(task, rollout_index, turn_seed(seed, 0)))
    return jobs


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up that starts above zero, then cosine down to a tenth."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / (args.warmup_steps + 1)
    progress = (step - args.warmup_steps) / max(args.steps - args.warmup_steps, 1)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def update_config(args: argparse.Namespace, vocab_limit: int, n_sources: int) -> UpdateConfig:
    most = n_sources * args.tasks_per_source * args.rollouts_per_task * args.max_turns * args.max_new_tokens
    names = ("clip_eps", "clip_eps_high", "kl_coef", "entropy_coef", "loss_norm", "tis_cap", "no_mask", "temperature",
             "epochs", "max_grad_norm", "micro_batch_tokens")
    return UpdateConfig(**{name: getattr(args, name) for name in names}, vocab_limit=vocab_limit,
                        loss_constant=float(most))


def truncation_note(args: argparse.Namespace) -> str:
    """What to tell once when sampling is truncated; "" when it is not."""
    if args.top_p == 1 and args.top_k < 1:
        return ""
    return (f"Note: --top-p {args.top_p} and --top-k {args.top_k} cut what is sampled, and the trainer scores the whole "
            "distribution: the ratio is biased, by as much as sampler_kl in metrics.jsonl says.")


# ---- the run ----------------------------------------------------------------------------------------------------------


def make_model(args: argparse.Namespace) -> tuple[Qwen3, ChatTokenizer]:
    """The policy with fresh LoRA layers."""
    with ranks.one_after_another():  # the first may have to make the policy
        model, tokenizer = load_policy(args)
    torch.manual_seed(args.seed)  # LoRA's A matrices
    add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets.split(","))
    model.gradient_checkpointing = args.gradient_checkpointing
    return model, tokenizer


def check(args: argparse.Namespace) -> bool:
    """Print a line for everything that can be wrong with the servers; return whether all is well."""
    check_flags(args)
    if not (args.policy_url or args.executor_url):
        raise UsageError("--check looks at servers, but neither --policy-url nor --executor-url names one")
    results = []
    if args.policy_url:
        for sampler in vllm_samplers(args, *make_model(args)):
            try:
                for result in checks(sampler):
                    results.append(result)
                    print(f"{'ok  ' if result.ok else 'FAIL'} policy {result.name}: {result.text}", flush=True)
            finally:
                sampler.close()
    if args.executor_url:
        try:
            reply = World(args).backend.complete(Request(toy_tasks("toy_math", 1, 0)[0], "Custom", "", "What is 2 + 3?", {}))
            results.append(Check("executor", True, f"{args.executor_model} answers {reply.text[:40]!r}"))
        except ExecutorError as error:
            results.append(Check("executor", False, str(error)))
        print(f"{'ok  ' if results[-1].ok else 'FAIL'} executor: {results[-1].text}", flush=True)
    return all(result.ok for result in results)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Run all steps and return the summary. The main loop below is the whole algorithm, run by every rank alike."""
    started = time.monotonic()
    check_flags(args)
    if ranks.rank():  # rank 0 alone writes and prints
        args.quiet, args.log_json, args.tensorboard, args.wandb = True, False, False, False
    pool, held_out = load_tasks(args)
    world = World(args)
    out = ReadOnly(args.out) if ranks.rank() else RunDir(args.out)
    if not args.resume:
        out.require_new()
    model, tokenizer = make_model(args)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=args.lr, weight_decay=args.weight_decay)
    config = update_config(args, tokenizer.vocab_size, len({task.source for task in pool}))
    sampled = with_own_lora(model) if args.async_depth else model
    sampler = make_sampler(args, sampled, tokenizer)
    if args.shard:
        ranks.shard(model, args.device)

    def play(step: int) -> Gather:
        def of_rank(jobs: Sequence[Job]) -> list[Trajectory]:
            return rollout(jobs, sampler, tokenizer, world.new_canvas, world.score, rollout_config(args, world))
        return ranks.shared(choose_jobs(pool, step, args), of_rank, world.players)

    try:
        if not args.resume:
            out.create(environment(args, world))
        evaluate_before(args, out, held_out, sampler, tokenizer, world)
        start_step = out.restore(model, optimizer, sampled) if args.resume else 0
        ranks.require_alike(start_step=start_step, weights=ranks.fingerprint(lora_parameters(model)))
        line = world.progress("training", args.steps, start_step)
        tracked = trackers.Trackers(out.path, vars(args), start_step, args.tensorboard, args.wandb)
        rollouts = Rollouts(model, sampled, sampler, play, args.async_depth)
        for step in range(start_step, args.steps):
            began = time.monotonic()
            try:
                taus = rollouts.take(step)
                batch = ranks.balanced(select(taus, args), weight=lambda tau: len(tau.tokens))
            except (ExecutorError, ServerError, RankError):
                out.save(step, model, optimizer, sampled)  # --resume goes on with this very step
                raise
            seconds, ready = rollouts.seconds, time.monotonic()
            if step + 1 < args.steps:
                rollouts.prefetch(step + 1)
            optimizer.param_groups[0]["lr"] = learning_rate(step, args)
            with server_asleep(sampler.server) if args.colocate else nullcontext():
                stats = update(model, optimizer, batch, config, disable_lora)
            seconds |= {"update": time.monotonic() - ready, "step": time.monotonic() - began}
            tracked.log(log(out, line, step, taus, stats, seconds, args))
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                out.save(step + 1, model, optimizer, sampled)
        line.close()
        tracked.close()
        rollouts.sync(args.steps)
        after = evaluate(held_out, sampler, tokenizer, world, rollout_config(args, world), args.seed, label="after")
        require_sound(after, args)
    finally:
        sampler.close()
    return {} if ranks.rank() else finish(out, args, after, pool, held_out, world, started)


def evaluate_before(args: argparse.Namespace, out: RunDir, held_out: Sequence[Task], sampler: Sampler,
                    tokenizer: ChatTokenizer, world: World) -> None:
    """Write before.json, once: the untrained policy and the random editor on the held-out tasks."""
    if (out.path / "before.json").exists():
        return
    if (note := truncation_note(args)) and not ranks.rank():
        print(note, file=sys.stderr, flush=True)
    taus = evaluate(held_out, sampler, tokenizer, world, rollout_config(args, world), args.seed, label="before")
    require_sound(taus, args)
    floor = None
    if world.backend.instant and not ranks.rank():
        floor = baselines.random_editor(held_out, world.new_canvas, grade, args.seed)
    out.write_json("before.json", {"rows": summarise(taus), "random": floor,
                                   "parse_rate": parse_rate([t.text for u in taus for t in u.turns])})


def require_sound(taus: Sequence[Trajectory], args: argparse.Namespace) -> list[Trajectory]:
    """Return the trajectories that did not fail; ExecutorError when there are too few of them to go on."""
    kept = [tau for tau in taus if not tau.dropped]
    if len(taus) - len(kept) > args.max_dropped * len(taus) or len(kept) < min(args.min_trajectories, len(taus)):
        causes = sorted({f"{tau.dropped}: {tau.error or tau.grade.error}" for tau in taus if tau.dropped})
        raise ExecutorError(f"{len(taus) - len(kept)} of {len(taus)} trajectories failed (--max-dropped {args.max_dropped}, "
                            f"--min-trajectories {args.min_trajectories}); continue with --resume when this is mended: "
                            f"{'; '.join(causes[:3])}")
    return kept


def select(taus: Sequence[Trajectory], args: argparse.Namespace) -> list[Trajectory]:
    """Give every sound trajectory its advantage; stop when too many failed or none can teach anything."""
    kept = require_sound(taus, args)
    groups = [group_of(tau, args) for tau in kept]
    rewards = [tau.reward for tau in kept]
    for tau, advantage in zip(kept, group_advantages(rewards, groups).tolist(), strict=True):
        tau.advantage = advantage
    if args.skip_uniform_groups:
        uniform = uniform_groups(rewards, groups)
        kept = [tau for tau, group in zip(kept, groups, strict=True) if not uniform[group]] or kept
    return kept


def group_of(tau: Trajectory, args: argparse.Namespace) -> str:
    return tau.task.source if args.group_by == "source" else tau.task.id


def log(out: RunDir, line: Progress, step: int, taus: Sequence[Trajectory], stats: dict[str, float],
        seconds: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Write and show the step; return its row of metrics.jsonl. seconds: of sync, rollout, update and the whole step."""
    scored = [tau for tau in taus if not tau.dropped]
    uniform = uniform_groups([tau.reward for tau in scored], [group_of(tau, args) for tau in scored])
    phases = {phase: sum(tau.seconds[phase] for tau in taus) for phase in ("policy", "executor", "grading")}
    metrics = {"step": step, **rollout_metrics(taus), "uniform_groups": sum(uniform.values()) / len(uniform),
               **{name: value for name, value in stats.items() if name != "trajectories"},
               "tokens_per_second": sum(len(tau.tokens) for tau in taus) / seconds["step"],
               **{f"seconds_{phase}": value for phase, value in (phases | seconds).items()}}  # phases: summed over trajectories
    out.append("trajectories.jsonl", *(trajectory_record(tau, step) for tau in taus))
    out.append("metrics.jsonl", metrics)
    shown = {"R": metrics["reward"], "R_div=1": metrics["feasible_rate"], "acc": metrics["accuracy"],
             "gnorm": metrics["grad_norm"], "uni": metrics["uniform_groups"]}
    text = " ".join(f"{name} {value:.2f}" for name, value in shown.items())
    line.advance(text=f"{text} {metrics['tokens_per_second']:.0f} tok/s")
    if args.log_json:
        print(json.dumps(metrics), flush=True)
    return metrics


def environment(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """What args.json records: flags, versions, commit, default prompts. Keys never stand in flags, only names of variables."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {"flags": flags, "python": platform.python_version(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "commit": commit.stdout.strip() or "unknown", "prompts": world.prompts}


INTERRUPTED = f"train.py: interrupted{', as all ranks are when one has ended' * ranks.BY_TORCHRUN}; continue with --resume"


def main(args: argparse.Namespace | None = None) -> None:
    try:
        args = args or parse_args()
        with naming_lacks(), ranks.joined(args.device) as args.device:
            if not args.check:
                train(args)
            elif not check(args):
                sys.exit(1)
    except (ValueError, OSError, ExecutorError, ServerError, FloatingPointError, RankError) as error:
        sys.exit(f"train.py: {f'rank {ranks.rank()}: ' * (ranks.size() > 1)}{error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    end_on_signals(INTERRUPTED)
    main(ARGS)
