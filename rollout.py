"""Trajectories, and the loop that makes them: the policy edits a canvas, turn by turn, token in and token out.

Three decisions:
* A trajectory's ids only ever append: prompt + sampled + feedback + sampled + ... Text is decoded for the canvas to
  read and never encoded back, so the tokens that are trained are the tokens that were sampled, whatever the tokenizer
  makes of them.
* `mask` says by position who wrote a token: 1 where the policy sampled it, its end-of-turn token included, else 0.
  No rule looks at a token's value: a sampled token that equals the padding or the end token is trained like any other.
* A failure of ours (server down, grader crashed) never becomes a reward: the trajectory is `dropped`, with its cause.

Standard library only: the sampler, tokenizer, canvases and grader come in as arguments.

    taus = rollout([Job(task, index=0, seed=1)], sampler, tokenizer, new_canvas, score, RolloutConfig())
"""

import hashlib
import math
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

STOP_REASONS = ("finished", "max_turns", "max_tokens", "policy_error", "executor_error")


@dataclass
class Turn:
    """One edit and the canvas's answer to it, as text: for logs and reports, never for training."""

    text: str
    n_sampled: int
    version: int                                     # of the adapter that sampled it
    widths: list[int] = field(default_factory=list)  # characters of `text` that each sampled token stands for
    feedback: str = ""
    ok: bool = False
    info: dict = field(default_factory=dict)         # what the canvas wants logged


@dataclass(eq=False)                                 # two rollouts that happen to agree are still two rollouts
class Trajectory:
    """One episode. tokens, mask and sampled_logprobs are parallel lists that only grow."""

    task: Any
    index: int                                       # which rollout of the task
    seed: int = 0
    canvas: Any = None
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)    # where mask is 0 it is 0.0, and nothing reads it
    turns: list[Turn] = field(default_factory=list)
    stop_reason: str = ""                            # one of STOP_REASONS; "" while the episode runs
    error: str = ""                                  # what went wrong, for policy_error and executor_error
    answer: str = ""
    grade: Any = None
    parts: Any = None
    reward: float | None = None
    hacks: dict = field(default_factory=dict)        # how often each way to earn R_div for nothing (hacks.py) occurs
    judge: str = ""                                  # an LLM judge's verdict, if one was asked (llm_judge.py)
    advantage: float | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"policy": 0.0, "executor": 0.0, "grading": 0.0})

    def add_prompt(self, ids: Sequence[int]) -> None:
        """Open the conversation."""
        assert not self.tokens, f"the prompt comes first, but there are {len(self.tokens)} tokens already"
        self._append(ids, 0, [0.0] * len(ids))

    def add_sample(self, sample: Any) -> None:
        """Append what the policy sampled, as it was sampled; ValueError if any log-probability is missing."""
        if not sample.ids or len(sample.ids) != len(sample.logprobs):
            raise ValueError(f"a sample of {len(sample.ids)} ids came with {len(sample.logprobs)} log-probabilities")
        if not all(logprob is not None and math.isfinite(logprob) for logprob in sample.logprobs):
            raise ValueError(f"a sampled token has no finite log-probability: {sample.logprobs}")
        self._append(sample.ids, 1, sample.logprobs)

    def add_feedback(self, ids: Sequence[int]) -> None:
        """Append what the policy reads next."""
        assert any(self.mask), "feedback answers a turn, but nothing was sampled yet"
        self._append(ids, 0, [0.0] * len(ids))

    def _append(self, ids: Sequence[int], mask: int, logprobs: Sequence[float]) -> None:
        self.tokens.extend(ids)
        self.mask.extend([mask] * len(ids))
        self.sampled_logprobs.extend(logprobs)
        lengths = len(self.tokens), len(self.mask), len(self.sampled_logprobs)
        assert len(set(lengths)) == 1, f"tokens, mask and sampled_logprobs have different lengths: {lengths}"

    @property
    def version(self) -> int | None:
        """The oldest adapter that wrote any of it; None before the first turn."""
        return min((turn.version for turn in self.turns), default=None)

    @property
    def dropped(self) -> str:
        """Return why this trajectory must stay out of the batch, or ""."""
        if self.stop_reason in ("policy_error", "executor_error"):
            return self.stop_reason
        return "grader_error" if self.grade is not None and self.grade.error else ""


@dataclass(frozen=True)
class Job:
    """One episode to play. The seed fixes everything that the policy samples in it."""

    task: Any
    index: int
    seed: int


@dataclass(frozen=True)
class RolloutConfig:
    max_context: int = 16384                         # tokens of a whole conversation
    max_new_tokens: int = 2048                       # of one turn
    min_new_tokens: int = 16                         # a turn with less room than this is not begun
    lockstep: bool = False                           # see _Rollout
    workers: int = 32                                # canvas steps and gradings at the same time


@dataclass(frozen=True)
class SampleRequest:
    """One turn to sample, field for field policy.SampleRequest (which is not imported, as it would bring torch)."""

    key: Hashable                                    # one per trajectory: a KV cache may live under it until release
    tokens: list[int]                                # the whole conversation so far
    max_new_tokens: int
    seed: int


def turn_seed(seed: int, turn: int) -> int:
    """Return a seed for one turn: 63 bits, which every sampler accepts, of a hash of its position and nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{turn}".encode()).digest()[:8], "big") >> 1


def rollout(jobs: Sequence[Job], sampler: Any, tokenizer: Any, new_canvas: Callable[[Any], Any],
            score: Callable[[Trajectory], None], config: RolloutConfig) -> list[Trajectory]:
    """Play every job to its end; return one trajectory per job, in the order of the jobs.

    sampler: submit(requests) -> a Future each, of a sample with .ids .logprobs .version; release(key)
    tokenizer: prompt_ids(system, user), feedback_ids(text, ended), decode(ids), end_id
    new_canvas: task -> canvas with .prompt() -> (system, user) and .step(text) -> feedback, which has .text .ok .done
        .stop_reason (of the last turn) .error (of an executor_error) .info
    score: sets answer, grade, parts and reward of a trajectory that has ended; called in a worker thread

    A failed sample (RuntimeError, ValueError, OSError) or an unreachable executor ends its own trajectory and no other,
    unscored. Any other exception (in a sampler, a canvas, in score, in this file) is a bug: it propagates, after the
    workers have ended.
    """
    return _Rollout(jobs, sampler, tokenizer, new_canvas, score, config).run()


class _Rollout:
    """The event loop. Each trajectory goes policy -> executor -> policy -> ... -> grading at its own pace.

    The calling thread owns all state; workers run canvas.step and score and nothing else. Trajectories that are ready
    at the same time are submitted together. Who is ready together depends on timing, and the last bits of batched
    arithmetic depend on the batch. `lockstep` waits for everyone before it submits, so that every batch is a pure
    function of the seeds and a run can be repeated bit for bit; it costs nothing when the executor answers at once.
    """

    def __init__(self, jobs: Sequence[Job], sampler: Any, tokenizer: Any, new_canvas: Callable[[Any], Any],
                 score: Callable[[Trajectory], None], config: RolloutConfig) -> None:
        self.sampler, self.tokenizer, self.score, self.config = sampler, tokenizer, score, config
        self.taus = [Trajectory(job.task, job.index, job.seed, new_canvas(job.task)) for job in jobs]
        self.widths: dict[int, int] = {}                                 # id -> characters that it decodes to on its own
        self.ready: set[Trajectory] = set()                              # their next turn can be sampled
        self.pending: dict[Future, tuple[Trajectory, str, float]] = {}   # under way: whose, in which phase, since when
        self.pool = ThreadPoolExecutor(config.workers, thread_name_prefix="rollout")

    def run(self) -> list[Trajectory]:
        handlers = {"policy": self.on_sample, "executor": self.on_step, "grading": self.on_score}
        try:
            for tau in self.taus:
                self.extend(tau, self.tokenizer.prompt_ids(*tau.canvas.prompt()))
            while self.ready or self.pending:
                playing = any(phase != "grading" for _, phase, _ in self.pending.values())
                if self.ready and not (self.config.lockstep and playing):
                    self.submit()
                for future in wait(self.pending, return_when=FIRST_COMPLETED).done:
                    tau, phase, began = self.pending.pop(future)
                    tau.seconds[phase] += time.monotonic() - began       # the wait for a free worker included
                    handlers[phase](tau, future)
        finally:                                     # after a normal end there is nothing left to cancel or to release
            for future in self.pending:
                future.cancel()
            self.pool.shutdown()                     # waits for the steps that run: no thread outlives this call
            for tau in self.taus:
                if not tau.stop_reason:
                    self.sampler.release(id(tau))
        return self.taus

    def begin(self, tau: Trajectory, phase: str, future: Future) -> None:
        self.pending[future] = (tau, phase, time.monotonic())

    def extend(self, tau: Trajectory, ids: Sequence[int]) -> None:
        """Append what the policy reads next, unless no turn fits behind it: then the context is full."""
        if len(tau.tokens) + len(ids) + self.config.min_new_tokens > self.config.max_context:
            return self.end(tau, "max_tokens")
        append = tau.add_feedback if tau.turns else tau.add_prompt
        append(ids)
        self.ready.add(tau)

    def submit(self) -> None:
        batch = [tau for tau in self.taus if tau in self.ready]          # in job order: a set's order means nothing
        self.ready.clear()
        requests = [SampleRequest(key=id(tau), tokens=list(tau.tokens), seed=turn_seed(tau.seed, len(tau.turns)),
                                  max_new_tokens=min(self.config.max_new_tokens,
                                                     self.config.max_context - len(tau.tokens))) for tau in batch]
        for tau, future in zip(batch, self.sampler.submit(requests), strict=True):
            self.begin(tau, "policy", future)

    def on_sample(self, tau: Trajectory, future: Future) -> None:
        try:
            sample = future.result()
        except (RuntimeError, ValueError, OSError) as error:     # a server or a device that fails; a TypeError is a bug of ours
            return self.end(tau, "policy_error", f"{type(error).__name__}: {error}")
        tau.add_sample(sample)
        text = self.tokenizer.decode(sample.ids[:-1] if self.ended(tau) else sample.ids)
        for token in set(sample.ids) - self.widths.keys():
            self.widths[token] = len(self.tokenizer.decode([token]))
        tau.turns.append(Turn(text, len(sample.ids), sample.version, [self.widths[token] for token in sample.ids]))
        self.begin(tau, "executor", self.pool.submit(tau.canvas.step, text))

    def on_step(self, tau: Trajectory, future: Future) -> None:
        feedback, turn = future.result(), tau.turns[-1]
        turn.feedback, turn.ok, turn.info = feedback.text, feedback.ok, feedback.info
        if feedback.done:                            # the last feedback is logged but not appended: nobody reads it
            return self.end(tau, feedback.stop_reason, feedback.error)
        self.extend(tau, self.tokenizer.feedback_ids(feedback.text, ended=self.ended(tau)))

    def ended(self, tau: Trajectory) -> bool:
        """Return whether the turn just sampled ends with an end token that the policy sampled itself."""
        return tau.tokens[-1] == self.tokenizer.end_id

    def end(self, tau: Trajectory, stop_reason: str, error: str = "") -> None:
        assert stop_reason in STOP_REASONS, f"stop_reason {stop_reason!r} is none of {STOP_REASONS}"
        tau.stop_reason, tau.error = stop_reason, error
        self.sampler.release(id(tau))
        if not tau.dropped:
            self.begin(tau, "grading", self.pool.submit(self.score, tau))

    def on_score(self, tau: Trajectory, future: Future) -> None:
        future.result()
        assert tau.dropped or tau.reward is not None, f"score() gave rollout {tau.index} of {tau.task} no reward"
