"""What flags describe: tasks, executor, canvases and grading, policy, sampler.

One place for each, so that a model is evaluated in the world that it was trained in.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from functools import partial
from pathlib import Path

import torch

import operators
import ranks
from backends import Backend, CachedBackend, OpenAIBackend, SimulatedBackend, request_parameters
from canvas import Canvas, CanvasConfig
from flags import UsageError, reward_config
from hacks import credit
from memory import wake
from policy import ChatTokenizer, InProcessSampler
from qwen3 import Qwen3
from rewards import grade, reward
from rollout import Trajectory
from tasks import Task, read_tasks, toy_tasks
from terminal import Progress
from toys import OOD, TOY_CANVAS, TOY_SOURCES
from vllm_check import require
from vllm_fleet import AWAY_SECONDS, Fleet
from vllm_sampler import VLLMSampler
from warmstart import LESSONS, tiny_policy


def load_tasks(args: argparse.Namespace, n_toy: int = 128) -> tuple[list[Task], list[Task]]:
    """(training tasks, held-out tasks), disjoint by problem text."""
    if args.data:
        train = read_tasks(args.data)
        shuffled = random.Random(f"{args.seed}/held out").sample(train, len(train))  # which ones depends on the seed alone
        sizes = {source: sum(t.source == source for t in train) for source in {t.source for t in train}}
        held_out = []
        for source, size in sorted(sizes.items()):
            held_out += [t for t in shuffled if t.source == source][: min(args.eval_tasks, size // 4)]
        if not held_out:
            raise UsageError(f"{', '.join(map(str, args.data))}: {len(train)} tasks; at least 4 of a source are needed, "
                             "as a quarter is held out")
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
    return [task for source in OOD for task in toy_tasks(source, args.eval_tasks, args.seed + 500_000)]


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
            allow_answer_tag=args.allow_answer_tag, brief=args.brief,
            problem_chars=TOY_CANVAS["problem_chars"] if args.brief else CanvasConfig.problem_chars)

    def new_canvas(self, task: Task) -> Canvas:
        return Canvas(task, self.library, self.backend, self.config)

    def score(self, tau: Trajectory) -> None:
        """Grade the final answer and set the reward (paper Eq. 11)."""
        tau.answer = tau.canvas.answer
        tau.grade = grade(tau.task, tau.answer)
        tau.parts = reward(tau.canvas, tau.grade, self.reward_config)
        tau.reward = tau.parts.total
        tau.hacks = credit(tau.canvas).hacks


def model_directory(model: str) -> Path:
    """Where --model lies; what it names of LESSONS is made if need be."""
    return tiny_policy(Path("runs"), name=model) if model in LESSONS else Path(model)


def load_policy(args: argparse.Namespace) -> tuple[Qwen3, ChatTokenizer]:
    directory = model_directory(args.model)
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
    return samplers[0] if len(samplers) == 1 else Fleet(samplers, args.policy_timeout)


def vllm_samplers(args: argparse.Namespace, model: Qwen3, tokenizer: ChatTokenizer) -> list[VLLMSampler]:
    """A sampler for each --policy-url. With several, a dead server is left after seconds: the others go on."""
    out, several = Path(args.out or f"runs/eval-{os.getpid()}"), len(args.policy_url) > 1
    names = [f"{out.name}-{i}" if several else out.name for i in range(len(args.policy_url))]
    return [VLLMSampler(url, model, tokenizer, out.parent / f"{name}.adapters",
                        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_context=args.max_context,
                        timeout=args.policy_timeout, patience=AWAY_SECONDS if several else args.policy_timeout)
            for url, name in zip(args.policy_url, names, strict=True)]
