"""The flags of train.py and eval.py, and the presets.

Nothing here, nor what is imported here, needs torch or other packages that take long to import: the two programs read their
flags before they import the rest, so that --help and a mistake are answered at once. world.py makes what flags describe.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sandbox
import trackers
from canvas import FINISH_RULES
from rewards import RewardConfig
from rundir import RunDir
from toys import TOY_CANVAS

# The tiny preset (these and the flags' own defaults) is what measured best on the toy tasks; `paper` is what the paper
# did. Flags given by hand win. At temperature 0.3 a tiny policy makes hardly a slip: an illegal edit costs it a turn but no
# reward, so that at 1 nothing keeps them from spreading once a workflow is feasible with turns to spare. A usual gradient
# has a norm of 0.03; the jumps to 0.4 come just before such a spread.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"temperature": 0.3, "steps": 50, "max_new_tokens": 32,  # legal edits have 25 tokens at most
             "micro_batch_tokens": 4096, "max_grad_norm": 0.1},
    "qwen3-0.6b": {
        "tasks_per_source": 6, "rollouts_per_task": 6, "group_by": "task", "lr": 1e-4, "kl_coef": 0.005,
        "lora_rank": 32, "lora_alpha": 64.0, "steps": 200, "brief": False,
        "max_turns": 12, "feedback_chars": 800, "dtype": "bfloat16",
        "lora_targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "gradient_checkpointing": True},
    "paper": {
        "tasks_per_source": 6, "rollouts_per_task": 1, "group_by": "source", "lr": 1e-5, "lora_rank": 64, "lora_alpha": 64.0,
        "lora_dropout": 0.05, "lora_targets": "q_proj,k_proj,v_proj,o_proj", "steps": 300, "warmup_steps": 10,
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 2048, "max_turns": 20, "feedback_chars": 800,
        "brief": False, "prompt_mode": "ask", "finish_rules": "operators,checker,structure,test",
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
    world.add_argument("--eval-tasks", type=int, default=64,
                       help="held out of each source, of --data at most a quarter (default %(default)s)")
    world.add_argument("--seed", type=int, default=0, help="of tasks, sampling and simulation (default %(default)s)")

    policy = parser.add_argument_group("policy")
    policy.add_argument("--model", default="tiny",
                        help="Qwen3 directory, or one made on the spot: `tiny`, `tiny-grammar` (default %(default)s)")
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
                        help="for one turn, the server's queue included, and for a restart of the last server that is left "
                             "(default %(default)s)")

    canvas = parser.add_argument_group("canvas")
    canvas.add_argument("--max-turns", type=int, default=TOY_CANVAS["max_turns"], help="turns an episode (default %(default)s)")
    canvas.add_argument("--prompt-mode", choices=("inline", "ask"), default="inline",
                        help="ask: the canvas asks for each new node's prompt, as in the paper (default %(default)s)")
    canvas.add_argument("--feedback-chars", type=int, default=TOY_CANVAS["feedback_chars"], help="at most (default %(default)s)")
    canvas.add_argument("--brief", action=argparse.BooleanOptionalAction, default=TOY_CANVAS["brief"],
                        help="for very small policies: a system prompt of names only, and of a problem "
                             f"{TOY_CANVAS['problem_chars']} characters (executors read all of it)")
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
    positive = ("eval_tasks", "max_new_tokens", "max_turns", "min_operators", "executor_concurrency")
    for name in positive:
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.temperature <= 0:
        raise UsageError(f"--temperature is {args.temperature}; sampling needs a positive one")
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p is {args.top_p}; it must lie in (0, 1]")
    if args.feedback_chars < 200:
        raise UsageError(f"--feedback-chars is {args.feedback_chars}; status, workflow and turn need at least 200")
    if args.policy_timeout <= 0:
        raise UsageError(f"--policy-timeout is {args.policy_timeout}; it must be above 0 seconds")
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
    if unknown := set(filter(None, args.finish_rules.split(","))) - set(FINISH_RULES):
        raise UsageError(f"--finish-rules: unknown {', '.join(sorted(unknown))}; known are {', '.join(FINISH_RULES)}")
    if args.device.startswith("cuda"):
        import torch  # late: see above

        if not torch.cuda.is_available():
            raise UsageError(f"--device {args.device}, but this PyTorch sees no CUDA device")
    reward_config(args)
    try:
        sandbox.require(args.require_sandbox)
    except sandbox.SandboxError as error:
        raise UsageError(f"--require-sandbox {args.require_sandbox}: {error}") from error


def reward_config(args: argparse.Namespace) -> RewardConfig:
    try:
        checker, form, many, structure = (float(weight) for weight in args.reward_weights.split(","))
    except ValueError:
        raise UsageError(f"--reward-weights is {args.reward_weights!r}; expected four numbers with commas") from None
    return RewardConfig(checker=checker, format=form, operators=many, structure=structure, min_operators=args.min_operators,
                        release=not args.no_release, diversity=not args.no_diversity, strict=args.strict_structure)


# ---- the two programs ----------------------------------------------------------------------------------------------


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/default"), help="run directory (default %(default)s)")
    run.add_argument("--steps", type=int, default=40,
                     help="optimiser steps; the learning rate falls over them (default %(default)s)")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, with its flags")
    run.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="a set of defaults (default %(default)s)")
    run.add_argument("--args", type=Path, metavar="FILE", help="the flags of another run's args.json, in place of a preset's")
    run.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (default %(default)s)")
    run.add_argument("--check", action="store_true", help="only see whether the servers are what training needs")
    for name in trackers.MODULES:
        run.add_argument(f"--{name}", action="store_true", help=f"the numbers of metrics.jsonl there too (pip install {name})")
    run.add_argument("--no-baselines", action="store_true", help="skip the search for fixed and reachable workflows")

    batch = parser.add_argument_group("batch")
    batch.add_argument("--tasks-per-source", type=int, default=3, help="tasks of each source a step (default %(default)s)")
    batch.add_argument("--rollouts-per-task", type=int, default=6,
                       help="trajectories a task; more: less noise in the advantages, more time (default %(default)s)")
    batch.add_argument("--group-by", choices=("source", "task"), default="task",
                       help="rewards are compared within a source (CWRPO) or a task (GRPO) (default %(default)s)")
    batch.add_argument("--async-depth", type=int, choices=(0, 1), default=0,
                       help="1: the next step is sampled, by the adapter before, while this one trains (default %(default)s)")
    batch.add_argument("--skip-uniform-groups", action="store_true", help="leave groups of equal rewards out of the update")
    batch.add_argument("--max-dropped", type=float, default=0.2, help="stop above this share of failures (default %(default)s)")
    batch.add_argument("--min-trajectories", type=int, default=2, help="stop if fewer are sound (default %(default)s)")

    loss = parser.add_argument_group("loss and optimiser (paper Eq. 10)")
    loss.add_argument("--lr", type=float, default=2.5e-3,
                      help="peak; cosine to a tenth. Too high: kl_ref jumps, invalid_edits rise (default %(default)s)")
    loss.add_argument("--warmup-steps", type=int, default=3, help="linear, from above zero (default %(default)s)")
    loss.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's (default %(default)s)")
    loss.add_argument("--max-grad-norm", type=float, default=1.0,
                      help="gradients above this norm are scaled to it (default %(default)s)")
    loss.add_argument("--epochs", type=int, default=1, help="optimiser steps per batch (default %(default)s)")
    loss.add_argument("--clip-eps", type=float, default=0.2,
                      help="ratio clip; matters from the second of --epochs on (default %(default)s)")
    loss.add_argument("--clip-eps-high", type=float, help="another bound for the upper side (clip-higher)")
    loss.add_argument("--kl-coef", type=float, default=0.03, help="beta of the k3 penalty (default %(default)s; 0: none)")
    loss.add_argument("--entropy-coef", type=float, default=0.0, help="entropy bonus; 0: none (default %(default)s)")
    loss.add_argument("--loss-norm", choices=("trajectory", "token", "constant"), default="trajectory",
                      help="mean over trajectories of token means (paper), over all tokens, or the sum over tokens by the "
                           "most that a step could have (Dr. GRPO) (default %(default)s)")
    loss.add_argument("--tis-cap", type=float, help="cap of the trainer/sampler importance weight, say 2; default: no weight, "
                                                    "with --async-depth 1 a cap of 2")
    loss.add_argument("--no-mask", action="store_true", help="ablation: feedback tokens are trained too")
    loss.add_argument("--micro-batch-tokens", type=int, default=16384, help="raise until it no longer fits (default %(default)s)")
    loss.add_argument("--colocate", action="store_true",
                      help="the policy server, which is on our card, sleeps during an update (memory.py says what fits)")
    loss.add_argument("--shard", action="store_true", help="by torchrun: every rank keeps a part of each layer's frozen weights")
    loss.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more compute")

    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora-rank", type=int, default=16, help="more: more to learn, more memory (default %(default)s)")
    lora.add_argument("--lora-alpha", type=float, default=32.0, help="scale is alpha / rank (default %(default)s)")
    lora.add_argument("--lora-dropout", type=float, default=0.0, help="above 0 the first ratio is not 1 (default %(default)s)")
    lora.add_argument("--lora-targets", default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
                      help="(default %(default)s)")


def parse_training(arguments: Sequence[str] | None, manual: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser)
    add_shared_flags(parser)
    parser.add_argument("--help-markdown", action=HelpMarkdown, nargs=0, help="these flags as tables")
    parser.set_defaults(**preset_defaults(arguments, parser))
    args = parser.parse_args(arguments)
    if args.async_depth and args.tis_cap is None:
        args.tis_cap = 2.0
    if args.resume:  # a run goes on with its own flags; only --steps may be raised, and a server may have moved
        given = {word.split("=")[0] for word in (sys.argv[1:] if arguments is None else arguments) if word.startswith("--")}
        if extra := given - {"--resume", "--out", "--steps", "--executor-url", "--policy-url", "--quiet", "--log-json"}:
            raise UsageError(f"--resume takes the run's own flags; remove {', '.join(sorted(extra))}")
        moved = {name: getattr(args, name) for name in ("steps", "executor_url", "policy_url")
                 if f"--{name.replace('_', '-')}" in given}
        stored = vars(args) | RunDir(args.out).read_args()["flags"] | moved
        args = argparse.Namespace(**stored | {"out": args.out, "resume": True, "quiet": args.quiet, "log_json": args.log_json})
    return args


def parse_evaluation(arguments: Sequence[str] | None, manual: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def read_early(program: str, parse: Callable[[Sequence[str] | None, str], argparse.Namespace], manual: str) -> argparse.Namespace:
    """The flags of a program that has yet to import the rest."""
    try:
        return parse(None, manual)
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {error}")
