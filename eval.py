"""Evaluate a Flow-Director: a table per source, kind and group, against baselines, with intervals and paired tests.

    python eval.py --adapter runs/default                        the run's own held-out tasks and flags
    python eval.py --adapter runs/default --data my_tasks.jsonl  other tasks, all of them
    python eval.py --adapter runs/default --baseline direct self-consistency random untrained "fixed:Plan -> Custom -> Format"
    python eval.py --adapter runs/default --ask "What is 17 * 23?" --save-workflow w.json
    python eval.py --compare a/eval.json b/eval.json

stats.py says how the numbers are made. Every episode is written to OUT/trajectories.jsonl when it ends; with --resume an
evaluation goes on where it was stopped. Seeds depend on (seed, task, run), so that all methods meet the same chances.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds: Ctrl-C, --help and a mistake are answered at once
    from rundir import end_on_signals

    end_on_signals("eval.py: interrupted", seconds=0)
    from flags import parse_evaluation, read_early

    ARGS = read_early("eval.py", parse_evaluation, __doc__)

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import baselines
import play
import ranks
import report
import stats
from backends import ExecutorError
from canvas import Canvas
from convert import overlap
from flags import UsageError, check_shared_flags, parse_evaluation
from graph import GraphError
from llm_judge import make_judge
from lora import add_lora, load_adapter, read_adapter
from metrics import evaluation_record
from policy import ChatTokenizer
from rollout import Job, RolloutConfig, Trajectory, rollout, turn_seed
from rundir import RunDir, end_on_signals, naming_lacks
from sandbox import SandboxError
from tasks import Task, TaskError, read_tasks
from terminal import workflows_text
from vllm_server import ServerError
from world import Sampler, World, load_policy, load_tasks, make_sampler, ood_toys

AT_ONCE = 64  # episodes played together
BASELINES = ("direct", "self-consistency", "random", "untrained")
MAY_CHANGE = {"out", "resume", "baseline", "runs", "limit", "workers", "data_given", "executor_cache", "replay", "quiet",
              "log_json"}  # on resume


class JudgedWorld(World):
    """A world in which an LLM gives its opinion of every answer that was graded, if --judge-url names one."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.judge = make_judge(args.judge_url, args.judge_model, args.judge_key_env, timeout=args.executor_timeout,
                                concurrency=args.executor_concurrency, cache=args.executor_cache, replay=args.replay)

    def score(self, tau: Trajectory) -> None:
        super().score(tau)
        if self.judge and not tau.dropped:
            tau.judge = self.judge.verdict(tau.task, tau.answer)


def rollout_config(args: argparse.Namespace, world: World) -> RolloutConfig:
    return RolloutConfig(max_context=args.max_context, max_new_tokens=args.max_new_tokens,
                         lockstep=world.backend.lockstep and not args.policy_url,
                         workers=getattr(args, "workers", max(RolloutConfig.workers, args.executor_concurrency)))


def job_seed(seed: int, task: Task, run: int) -> int:
    return turn_seed(random.Random(f"{seed}/eval/{task.id}/{run}").getrandbits(60), 0)


def evaluate(tasks: Sequence[Task], sampler: Sampler, tokenizer: ChatTokenizer, world: World,
             config: RolloutConfig, seed: int, runs: int = 1, label: str = "evaluating") -> list[Trajectory]:
    """Play every task `runs` times, each rank its share."""
    def play(mine: Sequence[tuple[Task, int]]) -> list[Trajectory]:
        return [tau for taus in play_pairs(mine, sampler, tokenizer, world, config, seed, label) for tau in taus]
    return ranks.shared([(task, run) for task in tasks for run in range(runs)], play, world.players)()


def play_pairs(pairs: Sequence[tuple[Task, int]], sampler: Sampler, tokenizer: ChatTokenizer, world: World,
               config: RolloutConfig, seed: int, label: str) -> Iterator[list[Trajectory]]:
    """Play (task, run) pairs; yield the trajectories of AT_ONCE of them at a time."""
    with world.progress(label, len(pairs)) as line:
        for start in range(0, len(pairs), AT_ONCE):
            jobs = [Job(task, run, job_seed(seed, task, run)) for task, run in pairs[start:start + AT_ONCE]]
            yield rollout(jobs, sampler, tokenizer, world.new_canvas, world.score, config)
            line.advance(len(jobs))


def score_of(tau: Trajectory) -> float:
    return 0.0 if tau.dropped else tau.grade.score


def summarise(taus: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """A row per source and one for all."""
    records = [evaluation_record(tau) for tau in taus]
    sources = sorted({record["source"] for record in records})
    found = [stats.row(name, [r for r in records if r["source"] == name]) for name in sources]
    return found + ([stats.row("all", records)] if len(sources) > 1 else [])


# ---- baselines ----------------------------------------------------------------------------------------------------


def answer_of(task: Task, run: int, make: Callable[[], Canvas], world: World) -> Trajectory:
    """A baseline's canvas as a trajectory without turns, graded like the policy's."""
    tau, started = Trajectory(task, run, canvas=world.new_canvas(task)), time.monotonic()
    try:
        tau.canvas, tau.stop_reason = make(), "finished"
    except (ExecutorError, SandboxError) as error:
        tau.stop_reason, tau.error = "executor_error", str(error)
    tau.seconds["executor"] = time.monotonic() - started
    if not tau.dropped:
        world.score(tau)
    return tau


def run_baseline(name: str, pairs: Sequence[tuple[Task, int]], world: World, budgets: dict[str, float], seed: int,
                 workers: int) -> Iterator[Trajectory]:
    def one(pair: tuple[Task, int]) -> Trajectory:
        task, run = pair
        makers = {name: lambda: baselines.fixed(name.partition(":")[2], task, world.new_canvas),  # unless it is one of these
                  "direct": lambda: baselines.direct(task, world.new_canvas, run),
                  "random": lambda: baselines.random_workflow(task, world.new_canvas, f"{seed}/random/{task.id}/{run}"),
                  "self-consistency": lambda: baselines.self_consistency(task, world.new_canvas, budgets[task.id])}
        return answer_of(task, run, makers[name], world)

    with ThreadPoolExecutor(workers) as pool, world.progress(name[:30], len(pairs)) as line:
        for tau in pool.map(one, pairs):
            line.advance()
            yield tau


def check_baselines(names: Sequence[str], world: World, tasks: Sequence[Task], policy_url: str | None) -> None:
    """Refuse what is no baseline before anything is played."""
    if "untrained" in names and policy_url:
        raise UsageError("--baseline untrained needs the policy in this process, without --policy-url")
    for name in (name for name in names if name not in BASELINES):
        if not name.startswith("fixed:"):
            raise UsageError(f'--baseline {name!r}: known are {", ".join(BASELINES)} and "fixed:WORKFLOW"')
        canvas = world.new_canvas(tasks[0])
        canvas.run_graph = lambda: None  # type: ignore[method-assign]
        try:
            baselines.fixed(name.partition(":")[2], tasks[0], lambda task, canvas=canvas: canvas)
        except GraphError as error:
            raise UsageError(f"--baseline {name!r}: {error}") from None


# ---- the program --------------------------------------------------------------------------------------------------


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_evaluation(arguments, __doc__)


def adapter_directory(path: Path) -> Path:
    """A run's newest checkpoint, or the adapter directory itself."""
    if (path / "adapter_config.json").exists():
        return path
    newest = RunDir(path).latest()
    if newest is None:
        raise UsageError(f"{path} is neither an adapter directory nor a run with a checkpoint")
    return newest


def training_tasks(args: argparse.Namespace) -> list[Task] | None:
    """The tasks that the policy was trained on; None where nobody says."""
    if args.train_data:
        return read_tasks(args.train_data)
    if not args.adapter or not (args.adapter / "args.json").exists():
        return None
    flags = RunDir(args.adapter).read_args()["flags"]
    try:
        return load_tasks(argparse.Namespace(**{**vars(args), **flags}))[0]
    except TaskError as error:
        print(f"the training tasks cannot be read: {error}", file=sys.stderr)
        return None


def contamination(train: Sequence[Task] | None, tasks: Sequence[Task]) -> str:
    if train is None:
        return "contamination: unknown, name the training tasks with --train-data"
    found = overlap(list(train), list(tasks))
    named = ", ".join(f"{source} {n} of {of}" for source, (n, of) in found.items() if n)
    return (f"contamination: {sum(n for n, _ in found.values())} of {len(tasks)} evaluated tasks stand in the training tasks"
            + (f" ({named})" if named else ""))


def choose_tasks(args: argparse.Namespace) -> list[Task]:
    """Named files are evaluated whole; a run's own tasks are its held-out ones, and on toy tasks the OOD sources too."""
    tasks = read_tasks(args.data) if args.data_given else load_tasks(args)[1] + ([] if args.data else ood_toys(args))
    taken: dict[str, int] = {}
    for task in tasks:
        taken[task.id] = sum(other.source == task.source for other in tasks[:len(taken)])
    return [task for task in tasks if args.limit is None or taken[task.id] < args.limit]


def open_out(args: argparse.Namespace, world: World) -> tuple[RunDir | None, list[dict[str, Any]]]:
    """(the directory of the evaluation, what was played in it already)."""
    flags = {name: str(value) for name, value in vars(args).items()}
    if not args.out:
        if args.resume:
            raise UsageError("--resume needs --out DIR, the evaluation to go on with")
        return None, []
    out = RunDir(args.out)
    if not args.out.exists():
        args.out.mkdir(parents=True)
        out.write_json("args.json", {"flags": flags, "prompts": world.prompts})
        return out, []
    if not args.resume:
        raise UsageError(f"--out {args.out} exists; go on with it by --resume, or choose another")
    before = out.read_args()["flags"]
    changed = [name for name in flags if name not in MAY_CHANGE and flags[name] != before.get(name, flags[name])]
    if changed:
        raise UsageError(f"--resume with other flags than before: {', '.join(sorted(changed))}")
    records = out.read("trajectories.jsonl")
    temporary = args.out / "trajectories.jsonl.tmp"  # without a line that a killed run left half written
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    temporary.replace(args.out / "trajectories.jsonl")
    return out, records


def evaluate_all(args: argparse.Namespace, tasks: Sequence[Task], world: World, out: RunDir | None,
                 records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Play what is not in `records` yet: the policy, then the baselines. Returns all records of these tasks and methods."""
    done = {(r["method"], r["task_id"], r["run"]) for r in records}

    def missing(method: str) -> list[tuple[Task, int]]:
        return [(t, run) for t in tasks for run in range(args.runs) if (method, t.id, run) not in done]

    def keep(method: str, taus: Sequence[Trajectory]) -> None:
        new = [evaluation_record(tau, method, args.policy_prices) for tau in taus]
        records.extend(new)
        if out:
            with (out.path / "trajectories.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in new)

    model, tokenizer = load_policy(args)
    for method in ["untrained"] * ("untrained" in args.baseline) + ["policy"]:
        if method == "policy":
            add_adapter(args, model)
        model.eval()
        sampler = make_sampler(args, model, tokenizer)
        try:
            sampler.load_adapter(version=0)
            for taus in play_pairs(missing(method), sampler, tokenizer, world, rollout_config(args, world), args.seed, method):
                keep(method, taus)
        finally:
            sampler.close()
    spent = stats.by_task([r for r in records if r["method"] == "policy"],
                          lambda r: r["usage"]["prompt_tokens"] + r["usage"]["completion_tokens"])
    for name in args.baseline:
        if name != "untrained":
            for tau in run_baseline(name, missing(name), world, spent, args.seed, args.workers):
                keep(name, [tau])
    ids, methods = {task.id for task in tasks}, {"policy", *args.baseline}
    return [r for r in records if r["task_id"] in ids and r["method"] in methods and r["run"] < args.runs]


def add_adapter(args: argparse.Namespace, model: Any) -> None:
    if args.adapter:
        directory = adapter_directory(args.adapter)
        config, _ = read_adapter(directory)
        add_lora(model, config["r"], config["lora_alpha"], 0.0, config["target_modules"])
        load_adapter(model, directory)


class ShownCanvas(Canvas):
    """A canvas that prints every turn."""

    def step(self, text: str) -> Any:
        feedback = super().step(text)
        print(f"\n[turn {self.turn}] {' '.join(text.split())}\n{feedback.text or feedback.error}", flush=True)
        return feedback


def ask(args: argparse.Namespace) -> None:
    """Design a workflow for one question; show every turn; print the answer."""
    task, world = play.question(args.ask, args.kind), World(args)
    world.new_canvas = lambda task: ShownCanvas(task, world.library, world.backend, world.config)
    model, tokenizer = load_policy(args)
    add_adapter(args, model.eval())
    sampler = make_sampler(args, model, tokenizer)
    try:
        sampler.load_adapter(version=0)
        (tau,) = evaluate([task], sampler, tokenizer, world, rollout_config(args, world), args.seed)
    finally:
        sampler.close()
    if tau.error:
        raise UsageError(f"{tau.stop_reason}: {tau.error}")
    print(f"\nworkflow: {tau.canvas.graph.to_text() or '(empty)'}   ({tau.stop_reason})\nanswer: {tau.canvas.answer}")
    if "simulated" in world.backend.name:
        print(play.SIMULATED_NOTE)
    if args.save_workflow:
        play.save_workflow(args.save_workflow, tau.canvas)


def run(args: argparse.Namespace) -> None:
    if args.compare:
        return print(stats.compare_files(args.compare))
    check_shared_flags(args)
    if args.save_workflow and not args.ask:
        raise UsageError("--save-workflow needs --ask, the question that a workflow is designed for")
    if args.ask is not None:
        if args.judge_url:
            raise UsageError("--judge-url compares answers with the right ones; a question of --ask has none")
        return ask(args)
    if args.runs < 1 or args.workers < 1 or (args.limit is not None and args.limit < 1):
        raise UsageError("--runs, --workers and --limit must be at least 1")
    tasks, world = choose_tasks(args), JudgedWorld(args)
    check_baselines(args.baseline, world, tasks, args.policy_url)
    train = training_tasks(args)
    iid = sorted({task.source for task in train}) if train else stats.IN_DISTRIBUTION
    out, records = open_out(args, world)
    records = evaluate_all(args, tasks, world, out, records)
    found = stats.results(records, ["policy", *args.baseline], iid)
    executor = world.backend.name + (" (a simulation, no LLM)" if "simulated" in world.backend.name else "")
    notes = [f"policy {args.model}, adapter {args.adapter or 'none'}; executor {executor}; {args.runs} runs a task",
             contamination(train, tasks)]
    notes += [f"LLM judge {args.judge_model}: beside the scores, not in them"] if world.judge else []
    result = {**found, "notes": notes, "flags": {k: str(v) for k, v in vars(args).items()}}
    shown = stats.as_markdown(found, notes)
    print(json.dumps(result) if args.log_json else f"{shown}\n\n{workflows_text(stats.commonest_texts(records))}")
    if out:
        out.write_json("eval.json", result)
        (args.out / "eval.md").write_text(shown + "\n", encoding="utf-8")
        page = report.write_report(args.out)
        if not args.log_json:
            print(f"page {page}")


INTERRUPTED = "eval.py: interrupted"


def main(args: argparse.Namespace | None = None) -> None:
    try:
        with naming_lacks():
            run(args or parse_args())
    except (ValueError, OSError, ExecutorError, ServerError, json.JSONDecodeError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    end_on_signals(INTERRUPTED)
    main(ARGS)
