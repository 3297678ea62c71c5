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
    ood_toys,
    preset_defaults,
)
from graph import GraphError
from llm_judge import make_judge
from lora import add_lora, load_adapter, read_adapter
from metrics import evaluation_record
from policy import ChatTokenizer
from rollout import Job, RolloutConfig, Trajectory, rollout, turn_seed
from rundir import RunDir, end_on_signals
from sandbox import SandboxError
from tasks import Task, TaskError, read_tasks
from terminal import workflows_text
from vllm_server import ServerError

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--adapter", type=Path, metavar="RUN", help="run directory or PEFT adapter; none: untrained")
    group.add_argument("--runs", type=int, default=1, help="episodes a task (default %(default)s)")
    group.add_argument("--limit", type=int, help="tasks per source, at most")
    group.add_argument("--workers", type=int, default=32, help="canvases and gradings at a time (default %(default)s)")
    group.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="defaults without a run directory")
    group.add_argument("--out", type=Path, metavar="DIR", help="write eval.json, eval.md, trajectories.jsonl, report.html there")
    group.add_argument("--resume", action="store_true", help="go on with the evaluation in --out")
    group.add_argument("--baseline", nargs="+", default=[], metavar="NAME",
                       help='direct: the executor alone; self-consistency: the executor alone at as many tokens; random: a '
                            'random editor; untrained: the policy without adapter; "fixed:Plan -> ...": this workflow')
    group.add_argument("--train-data", nargs="+", metavar="FILE", help="what the policy was trained on; default: the run's")
    group.add_argument("--policy-prices", nargs=2, type=float, metavar=("IN", "OUT"),
                       help="dollars per million tokens read and written; default: unknown")
    group.add_argument("--judge-url", nargs="+", metavar="URL", help="server(s) of an LLM that judges answers too, in a table "
                       "beside the scores; its calls use --executor-timeout, -concurrency and -cache")
    group.add_argument("--judge-model", help="model name at --judge-url")
    group.add_argument("--judge-key-env", metavar="NAME", help="environment variable that holds the judge's API key")
    group.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two eval.json, and nothing else")
    group.add_argument("--ask", metavar="QUESTION", help="design a workflow for one question, show how, print the answer")
    group.add_argument("--kind", choices=("math", "choice", "qa", "code"), default="qa", help="of --ask (default %(default)s)")
    group.add_argument("--save-workflow", type=Path, metavar="FILE", help="of --ask; run it with python canvas.py run FILE")
    known = {action.dest for action in parser._actions}
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides the defaults of the rest
    ahead.add_argument("--adapter", type=Path)
    ahead.add_argument("--data", nargs="+")
    first, _ = ahead.parse_known_args(arguments)
    defaults = dict(preset_defaults(arguments))
    if first.adapter and (first.adapter / "args.json").exists():
        defaults |= RunDir(first.adapter).read_args()["flags"]
        for name in ("preset", "out", "resume", "quiet", "log_json"):
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
