"""Flags that train.py and eval.py share, the presets, and the objects that flags describe.

One place for each, so that a model is evaluated in the world that it was trained in.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import operators
import ranks
import sandbox
import toys
from backends import Backend, CachedBackend, OpenAIBackend, SimulatedBackend, request_parameters
from canvas import FINISH_RULES, Canvas, CanvasConfig
from hacks import credit
from memory import wake
from policy import ChatTokenizer, InProcessSampler
from qwen3 import Qwen3
from rewards import RewardConfig, grade, reward
from rollout import Trajectory
from tasks import Task, read_tasks, toy_tasks
from terminal import Progress
from vllm_check import require
from vllm_fleet import AWAY_SECONDS, Fleet
from vllm_sampler import VLLMSampler
from warmstart import CANVAS, TOY_SOURCES, tiny_policy

# The tiny preset (these and the flags' own defaults) is what measured best on the toy tasks; `paper` is what the paper
# did. Flags given by hand win. Below temperature 1 a tiny policy makes fewer slips: an illegal edit costs it a turn but no
# reward, so at 1 nothing keeps them from spreading once a workflow is feasible with turns to spare. A usual gradient has
# a norm of 0.03; the jumps to 0.4 come just before such a spread.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"temperature": 0.8, "max_new_tokens": 32,  # legal edits have 25 tokens at most
             "micro_batch_tokens": 4096, "max_grad_norm": 0.1},
    "qwen3-0.6b": {
        "tasks_per_source": 6, "rollouts_per_task": 6, "group_by": "task", "lr": 1e-4, "kl_coef": 0.005,
        "lora_rank": 32, "lora_alpha": 64.0, "steps": 200, "brief": False,
        "max_turns": 12, "feedback_chars": 800, "problem_chars": 6000, "dtype": "bfloat16",
        "lora_targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "gradient_checkpointing": True},
    "paper": {
        "tasks_per_source": 6, "rollouts_per_task": 1, "group_by": "source", "lr": 1e-5, "lora_rank": 64, "lora_alpha": 64.0,
        "lora_dropout": 0.05, "lora_targets": "q_proj,k_proj,v_proj,o_proj", "steps": 300, "warmup_steps": 10,
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 2048, "max_turns": 20, "feedback_chars": 800,
        "problem_chars": 6000, "brief": False, "prompt_mode": "ask", "finish_rules": "operators,checker,structure,test",
        "weight_decay": 0.01, "kl_coef": 0.005, "dtype": "bfloat16", "gradient_checkpointing": True},
}


def preset_defaults(arguments: Sequence[str] | None, known: argparse.ArgumentParser | None = None) -> dict[str, Any]:
    """The defaults of the preset that the arguments name, or of the run; read ahead of them all, so that --help shows them.

    Raises UsageError if --args names no args.json, or one with flags that the parser `known` does not know.
    """
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ahead.add_argument("--preset", default="tiny")
    ahead.add_argument("--args", type=Path)
    first, _ = ahead.parse_known_args(arguments)
    if not (first.args and known):
        return PRESETS.get(first.preset, {})  # the real parser refuses an unknown one
    try:
        stored = json.loads(first.args.read_text(encoding="utf-8"))["flags"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--args {first.args} is no args.json of a run: {type(error).__name__}: {error}") from error
    stored = {name: value for name, value in stored.items() if name not in ("out", "resume", "args", "check")}
    if unknown := stored.keys() - {action.dest for action in known._actions}:
        raise UsageError(f"--args {first.args} has flags that this version does not know: {', '.join(sorted(unknown))}")
    return stored


class HelpMarkdown(argparse.Action):
    """--help-markdown: print the flags as tables, as docs/FLAGS.md has them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        formatter = parser._get_formatter()
        for group in parser._action_groups:
            rows = [f"| `{formatter._format_action_invocation(action)}` | {formatter._expand_help(action)} |"
                    for action in group._group_actions if action.option_strings and action.help]
            if rows:
                print(f"\n## {group.title}\n\n| flag | what |\n|---|---|", *rows, sep="\n")
        parser.exit()


class UsageError(ValueError):
    """Flags that contradict each other or the machine; the message names them."""


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    world = parser.add_argument_group("tasks")
    world.add_argument("--data", nargs="+", metavar="FILE", help="task files (JSONL); default: the built-in toy tasks")
    world.add_argument("--eval-data", nargs="+", metavar="FILE", help="held-out task files; default: a part of --data")
    world.add_argument("--eval-tasks", type=int, default=64, help="held-out tasks per source, at most (default %(default)s)")
    world.add_argument("--seed", type=int, default=0, help="of tasks, sampling and simulation (default %(default)s)")

    policy = parser.add_argument_group("policy")
    policy.add_argument("--model", default="tiny", help="Qwen3 directory, or `tiny`: made on the spot (default %(default)s)")
    policy.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default %(default)s)")
    policy.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen base weights")
    policy.add_argument("--temperature", type=float, default=1.0, help="of sampling, and so of scoring (default %(default)s)")
    policy.add_argument("--top-p", type=float, default=1.0, help="nucleus; below 1 biases the ratio (default %(default)s)")
    policy.add_argument("--top-k", type=int, default=-1, help="-1: off; a limit biases the ratio (default %(default)s)")
    policy.add_argument("--max-new-tokens", type=int, default=1024, help="of one turn (default %(default)s)")
    policy.add_argument("--max-context", type=int, help="tokens of a conversation; default: the model's, at most 16384")

    policy.add_argument("--policy-url", nargs="+", metavar="URL",
                        help="vLLM server(s) that sample the policy (scripts/serve_vllm.sh); default: this process does")
    policy.add_argument("--policy-timeout", type=float, default=600.0, metavar="SECONDS",
                        help="for one turn, the server's queue included (default %(default)s)")
    policy.add_argument("--policy-wait", type=float, default=300.0, metavar="SECONDS",
                        help="how long the (last) server may be away, as for a restart (default %(default)s)")
    policy.add_argument("--adapter-dir", type=Path, metavar="DIR", help="where adapters are handed to the server, which must "
                        "read them under the same path; default: beside --out")

    canvas = parser.add_argument_group("canvas")
    canvas.add_argument("--max-turns", type=int, default=CANVAS.max_turns, help="turns an episode (default %(default)s)")
    canvas.add_argument("--prompt-mode", choices=("inline", "ask"), default="inline",
                        help="ask: the canvas asks for each new node's prompt, as in the paper (default %(default)s)")
    canvas.add_argument("--feedback-chars", type=int, default=CANVAS.feedback_chars, help="at most (default %(default)s)")
    canvas.add_argument("--problem-chars", type=int, default=CANVAS.problem_chars,
                        help="of the problem shown to the policy; executors read all of it (default %(default)s)")
    canvas.add_argument("--brief", action=argparse.BooleanOptionalAction, default=CANVAS.brief,
                        help="a system prompt of names only, for very small policies")
    canvas.add_argument("--finish-rules", default="", metavar="RULES", help=f"what finish demands: {','.join(FINISH_RULES)}")
    canvas.add_argument("--min-operators", type=int, default=5, help="for finish and reward (default %(default)s)")
    canvas.add_argument("--allow-answer-tag", action="store_true", help="let the policy overrule the graph's answer")
    canvas.add_argument("--operators", metavar="NAMES", help="comma-separated selection; default: the twelve")
    canvas.add_argument("--operator-file", nargs="+", default=[], metavar="FILE", help="plug-ins: see operators.py")

    _add_executor_flags(parser.add_argument_group("executor"))

    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--quiet", action="store_true", help="no progress, only what the program prints at its end")
    shown.add_argument("--log-json", action="store_true",
                       help="for scripts: stdout has JSON alone, of train.py a line a step and then the summary, of eval.py "
                            "one object, the contents of eval.json")

    rewards = parser.add_argument_group("reward (paper Eq. 11-14)")
    rewards.add_argument("--reward-weights", default="0.2,0.2,0.2,0.4", help="checker,format,operators,structure")
    rewards.add_argument("--no-release", action="store_true", help="ablation: R_ans is always added")
    rewards.add_argument("--no-diversity", action="store_true", help="ablation: R = R_ans")
    rewards.add_argument("--strict-structure", action="store_true",
                         help="operators and structures that do nothing earn nothing (hacks.py)")


def _add_executor_flags(executor: argparse._ArgumentGroup) -> None:
    executor.add_argument("--executor-url", nargs="+", metavar="URL",
                          help="OpenAI-compatible server(s); default: the simulated executor, which is no LLM")
    executor.add_argument("--executor-model", help="model name at --executor-url")
    executor.add_argument("--executor-key-env", metavar="NAME", help="environment variable that holds the API key")
    executor.add_argument("--executor-extra", type=_json_object, metavar="JSON",
                          help='more request parameters, or others: \'{"reasoning_effort": "low"}\'; null leaves one out')
    executor.add_argument("--executor-prices", type=float, nargs=2, metavar=("IN", "OUT"),
                          help="dollars per million prompt and completion tokens; default: unknown")
    executor.add_argument("--executor-timeout", type=float, default=120.0, help="seconds of an attempt (default %(default)s)")
    executor.add_argument("--executor-concurrency", type=int, default=32, help="calls at one time (default %(default)s)")
    executor.add_argument("--executor-cache", metavar="DIR", help="record replies; equal calls share one reply")
    executor.add_argument("--replay", action="store_true", help="answer from --executor-cache alone; a miss is an error")
    executor.add_argument("--sim-latency", type=float, default=0.0, help="median seconds of a simulated call; heavy-tailed")

    executor.add_argument("--require-sandbox", choices=tuple(sandbox.LEVELS), default="limits", metavar="LEVEL",
                          help=f"refuse to run programs at less: {'; '.join(f'{k}: {v}' for k, v in sandbox.LEVELS.items())} "
                               "(default %(default)s); see python sandbox.py --doctor")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=int)  # NaN is no JSON, and int() refuses it
    except (ValueError, ArithmeticError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    if reserved := {"model", "messages", "stream", "n"} & value.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(reserved))} cannot be set here")
    return value


def check_shared_flags(args: argparse.Namespace) -> None:
    """Refuse contradictions before anything is loaded or written. Raises UsageError."""
    positive = ("eval_tasks", "max_new_tokens", "max_turns", "min_operators", "problem_chars", "executor_concurrency")
    for name in positive:
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.temperature <= 0:
        raise UsageError(f"--temperature is {args.temperature}; sampling needs a positive one")
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p is {args.top_p}; it must lie in (0, 1]")
    if args.feedback_chars < 200:
        raise UsageError(f"--feedback-chars is {args.feedback_chars}; status, workflow and turn need at least 200")
    if args.policy_timeout <= 0 or args.policy_wait < 0:
        raise UsageError(f"--policy-timeout {args.policy_timeout}, --policy-wait {args.policy_wait}: seconds, above 0")
    if args.policy_url and len(set(args.policy_url)) < len(args.policy_url):
        raise UsageError(f"--policy-url names a server twice: {' '.join(args.policy_url)}")
    if bool(args.executor_url) != bool(args.executor_model):
        raise UsageError("--executor-url and --executor-model belong together; one of them is missing")
    for name in ("executor_key_env", "executor_extra", "executor_prices"):
        if getattr(args, name) is not None and not args.executor_url:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --executor-url, which is missing")
    if not all(0 <= price < math.inf for price in args.executor_prices or ()):
        raise UsageError(f"--executor-prices are {args.executor_prices}; they must be dollars, at least 0")
    if not 0 < args.executor_timeout <= 3600:
        raise UsageError(f"--executor-timeout is {args.executor_timeout}; it must be in (0, 3600] seconds")
    if args.executor_url and args.sim_latency:
        raise UsageError("--sim-latency belongs to the simulated executor, but --executor-url names a real one")
    if args.replay and not args.executor_cache:
        raise UsageError("--replay needs --executor-cache DIR, where the replies were recorded")
    if args.replay and not Path(args.executor_cache).is_dir():
        raise UsageError(f"--replay: there is no directory {args.executor_cache}, so nothing was recorded")
    if args.eval_data and not args.data:
        raise UsageError("--eval-data without --data: training would use the toy tasks")
    if unknown := set(filter(None, args.finish_rules.split(","))) - set(FINISH_RULES):
        raise UsageError(f"--finish-rules: unknown {', '.join(sorted(unknown))}; known are {', '.join(FINISH_RULES)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {args.device}, but this PyTorch sees no CUDA device")
    reward_config(args)
    try:
        sandbox.require(args.require_sandbox)
    except sandbox.SandboxError as error:
        raise UsageError(f"--require-sandbox {args.require_sandbox}: {error}") from error


# ---- what the flags describe --------------------------------------------------------------------------------------


def load_tasks(args: argparse.Namespace, n_toy: int = 128) -> tuple[list[Task], list[Task]]:
    """(training tasks, held-out tasks), disjoint by problem text."""
    if args.data:
        train = read_tasks(args.data)
        if args.eval_data:
            held_out = _first_of_each_source(read_tasks(args.eval_data), args.eval_tasks)
        else:  # a quarter of each source, at most; which ones depends on the seed alone
            shuffled = random.Random(f"{args.seed}/held out").sample(train, len(train))
            sizes = {source: sum(t.source == source for t in train) for source in {t.source for t in train}}
            held_out = []
            for source, size in sorted(sizes.items()):
                held_out += [t for t in shuffled if t.source == source][: min(args.eval_tasks, size // 4)]
    else:
        train = [task for source in TOY_SOURCES for task in toy_tasks(source, n_toy, args.seed)]
        held_out = [task for source in TOY_SOURCES for task in toy_tasks(source, args.eval_tasks, args.seed + 500_000)]
    seen = {task.problem for task in held_out}
    train = [task for task in train if task.problem not in seen]
    if not train:
        raise UsageError("no training tasks are left beside the held-out ones; give more --data or fewer --eval-tasks")
    return train, held_out


def ood_toys(args: argparse.Namespace) -> list[Task]:
    """Toy tasks of sources that are never trained on: the test of what carries over."""
    return [task for source in toys.OOD for task in toy_tasks(source, args.eval_tasks, args.seed + 500_000)]


def _first_of_each_source(tasks: Sequence[Task], n: int) -> list[Task]:
    taken: dict[str, int] = {}
    kept = []
    for task in tasks:
        taken[task.source] = taken.get(task.source, 0) + 1
        if taken[task.source] <= n:
            kept.append(task)
    return kept


def players(args: argparse.Namespace) -> int:
    """How many ranks play episodes: policy servers are asked, and given adapters, by rank 0 alone."""
    return 1 if args.policy_url else ranks.size()


def make_backend(args: argparse.Namespace) -> Backend:
    """The executor. A replay needs neither server nor key, only the flags that decided the replies."""
    backend: Backend | None = None
    if args.executor_url:
        fingerprint = json.dumps(request_parameters(args.executor_model, args.executor_extra), sort_keys=True)
        if not args.replay:
            backend = OpenAIBackend(args.executor_url, args.executor_model, args.executor_key_env, extra=args.executor_extra,
                                    timeout=args.executor_timeout,
                                    concurrency=max(1, args.executor_concurrency // players(args)), prices=args.executor_prices)
    else:
        backend, fingerprint = SimulatedBackend(args.seed, args.sim_latency), f"simulated {args.seed}"
    if args.executor_cache:
        instant = backend is not None and backend.instant
        cached = CachedBackend(args.executor_cache, None if args.replay else backend, fingerprint, instant)
        cached.name += " of simulated" * (args.replay and not args.executor_url)  # a simulation is called one wherever it shows
        return cached
    return backend


class World:
    """Canvas factory and grading, as the flags say: what rollout needs beside a sampler."""

    def __init__(self, args: argparse.Namespace) -> None:
        names = args.operators.split(",") if args.operators else None
        self.library = operators.library(names, args.operator_file)
        self.prompts = {name: op.prompt for name, op in self.library.items()}  # by default; args.json has them for the page
        self.backend = make_backend(args)
        self.reward_config = reward_config(args)
        self.players = players(args)
        self.progress = partial(Progress, quiet=args.quiet, plain=not args.log_json)  # progress(label, total) -> its line
        self.config = CanvasConfig(
            max_turns=args.max_turns, feedback_chars=args.feedback_chars, prompt_mode=args.prompt_mode,
            finish_rules=tuple(filter(None, args.finish_rules.split(","))), min_operators=args.min_operators,
            allow_answer_tag=args.allow_answer_tag, brief=args.brief, problem_chars=args.problem_chars)

    def new_canvas(self, task: Task) -> Canvas:
        return Canvas(task, self.library, self.backend, self.config)

    def score(self, tau: Trajectory) -> None:
        """Grade the final answer and set the reward (paper Eq. 11)."""
        tau.answer = tau.canvas.answer
        tau.grade = grade(tau.task, tau.answer)
        tau.parts = reward(tau.canvas, tau.grade, self.reward_config)
        tau.reward = tau.parts.total
        tau.hacks = credit(tau.canvas).hacks


def reward_config(args: argparse.Namespace) -> RewardConfig:
    try:
        checker, form, many, structure = (float(weight) for weight in args.reward_weights.split(","))
    except ValueError:
        raise UsageError(f"--reward-weights is {args.reward_weights!r}; expected four numbers with commas") from None
    return RewardConfig(checker=checker, format=form, operators=many, structure=structure, min_operators=args.min_operators,
                        release=not args.no_release, diversity=not args.no_diversity, strict=args.strict_structure)


def load_policy(args: argparse.Namespace) -> tuple[Qwen3, ChatTokenizer]:
    directory = tiny_policy(Path("runs")) if args.model == "tiny" else Path(args.model)
    if not directory.is_dir():
        raise UsageError(f"--model {args.model}: no such directory; expected config.json, *.safetensors and tokenizer.json")
    tokenizer = ChatTokenizer(directory)
    device = "cpu" if getattr(args, "shard", False) else args.device
    model = Qwen3.from_pretrained(directory, device, getattr(torch, args.dtype))
    if args.max_context is None:
        args.max_context = min(model.config.max_position_embeddings, 16384)
    return model, tokenizer


Sampler = InProcessSampler | VLLMSampler | Fleet


def make_sampler(args: argparse.Namespace, model: Qwen3, tokenizer: ChatTokenizer) -> Sampler:
    """Make the sampler that the flags name. Policy servers are checked first: ServerError says all that is wrong with one."""
    if not args.policy_url or ranks.rank():
        return InProcessSampler(model, tokenizer.end_id, args.temperature, args.top_p, args.top_k, tokenizer.vocab_size,
                                args.max_context)
    samplers = vllm_samplers(args, model, tokenizer)
    try:
        for sampler in samplers:
            if getattr(args, "colocate", False):
                wake(sampler.server)
            require(sampler)
            sampler.compares = not getattr(args, "shard", False)  # from here on: the checks above had the whole model
    except BaseException:
        for sampler in samplers:
            sampler.close()
        raise
    return samplers[0] if len(samplers) == 1 else Fleet(samplers, args.policy_wait)


def vllm_samplers(args: argparse.Namespace, model: Qwen3, tokenizer: ChatTokenizer) -> list[VLLMSampler]:
    """A sampler for each --policy-url. With several, a dead server is left after seconds: the others go on."""
    out, several = Path(args.out or f"runs/eval-{os.getpid()}"), len(args.policy_url) > 1
    names = [f"{out.name}-{i}" if several else out.name for i in range(len(args.policy_url))]
    return [VLLMSampler(url, model, tokenizer, Path(args.adapter_dir or out.parent) / f"{name}.adapters",
                        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_context=args.max_context,
                        timeout=args.policy_timeout, patience=AWAY_SECONDS if several else args.policy_wait)
            for url, name in zip(args.policy_url, names, strict=True)]
