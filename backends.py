"""Executor LLMs: what runs the operators' prompts. The policy is not here; it lives in policy.py.

Three backends with one method, `complete(Request) -> Reply`:

* SimulatedBackend (the default): no LLM. A seeded skill model that knows the gold answer and answers in each operator's
  real output format, right with a probability that depends on operator, kind of task, difficulty and what came before.
  Every outcome is a pure function of (seed, task, operator, prompt, inputs), like a model at temperature 0, so the
  trajectories of a group differ by their workflows and not by luck. It is a simulation and is called so wherever shown.
* OpenAIBackend: any OpenAI-compatible server over HTTP (endpoint.py).
* CachedBackend: records the replies of another backend on disk by content, and replays them, also offline.

Usage keeps what the work takes apart from what was paid: a reply from a cache has the tokens and the price of its recording,
so that a replay gives the numbers of the recorded run, and costs nothing. An unknown price stays unknown (None), never 0.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from simulated import Simulation
from tasks import Task


class ExecutorError(RuntimeError):
    """The executor could not answer, after all retries. Never feedback, never a reward: the trajectory is dropped."""


@dataclass
class Usage:
    """What executor calls took. A sum of dollars is None as soon as one part of it is unknown."""

    calls: int = 0  # that went to the executor
    cached: int = 0  # that a cache answered
    prompt_tokens: int = 0  # of both, as for all tokens
    completion_tokens: int = 0
    seconds: float = 0.0
    dollars: float | None = 0.0  # paid, so for `calls` alone
    dollars_cached: float | None = 0.0  # what the replies of `cached` cost when they were recorded
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, other: Usage) -> None:
        with self._lock:  # parallel branches of a workflow add at once
            self.calls += other.calls
            self.cached += other.cached
            self.prompt_tokens += other.prompt_tokens
            self.completion_tokens += other.completion_tokens
            self.seconds += other.seconds
            self.dollars = _sum(self.dollars, other.dollars)
            self.dollars_cached = _sum(self.dollars_cached, other.dollars_cached)

    def __reduce__(self) -> tuple:
        return Usage, tuple(value for name, value in vars(self).items() if name != "_lock")  # a lock cannot be pickled

    @property
    def cost(self) -> float | None:
        """Dollars of all calls, as if none had come from a cache."""
        return _sum(self.dollars, self.dollars_cached)

    def again(self) -> Usage:
        """The usage of the same single reply, when a cache gives it once more."""
        return Usage(0, 1, self.prompt_tokens, self.completion_tokens, dollars_cached=self.cost)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


@dataclass(frozen=True)
class Request:
    """One executor call. `text` is the whole message; the rest is what it was made of, which only a simulation reads."""

    task: Task
    operator: str
    prompt: str
    text: str
    inputs: Mapping[str, Any]
    role: str = "solve"  # of the operator


@dataclass(frozen=True)
class Reply:
    text: str
    usage: Usage


class Backend(Protocol):
    name: str
    instant: bool  # answers without waiting, so that a search over workflows is affordable
    lockstep: bool  # trajectories wait for each other at every turn, which makes a run repeatable bit for bit

    def complete(self, request: Request) -> Reply: ...


class SimulatedBackend:
    """The skill model of simulated.py. `latency` (median, seconds) adds heavy-tailed waiting, a pure function too."""

    name = "simulated"

    def __init__(self, seed: int = 0, latency: float = 0.0) -> None:
        self.seed, self.latency = seed, latency
        self.instant = self.lockstep = latency == 0

    def wait(self, request: Request) -> float:
        """Seconds that a call takes."""
        return self.latency * random.Random(f"{self.seed}/latency/{request.task.id}/{request.text}").lognormvariate(0, 1)

    def complete(self, request: Request) -> Reply:
        text = Simulation(self.seed, request.task, request.operator, request.prompt, request.inputs, request.role).reply()
        if self.latency:
            time.sleep(self.wait(request))
        # A quarter of the characters stands for tokens: the simulation has no tokenizer.
        return Reply(text, Usage(1, 0, len(request.text) // 4, len(text) // 4, dollars=None))


# ---- any OpenAI-compatible server -----------------------------------------------------------------------------------

RETRY_STATUS = (408, 409, 429)  # and every 5xx
PATIENCE = 150.0  # seconds of waiting in one call: vLLM needs up to 100 to come back after a crash
UNUSABLE_ANSWERS = 3  # a server that answers nonsense is asked no more often than this


class _Again(Exception):
    """This attempt failed and another may not. `asked`: seconds that the server wants to be left alone."""

    def __init__(self, why: str, asked: float = 0.0, answered: bool = False) -> None:
        super().__init__(why)
        self.asked, self.answered = asked, answered


def request_parameters(model: str, extra: Mapping[str, Any] | None = None, temperature: float = 0.0,
                       max_tokens: int = 2048) -> dict[str, Any]:
    """What every request holds beside its message. In `extra`, null takes a parameter out: not all servers know them all."""
    chosen = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **(extra or {})}
    return {name: value for name, value in chosen.items() if value is not None}


class OpenAIBackend:
    """POST {url}/chat/completions. Several URLs share the load; the key comes from a named environment variable.

    A call goes to the URL with the least in flight. One that fails is left out, at first for two seconds, at most for a
    minute, then tried by a single call. What another attempt may mend (no connection, no whole answer, HTTP 408, 409, 429,
    5xx, an answer without text) is tried at once elsewhere, then again after an exponential backoff with jitter, or when
    Retry-After says. Everything else (400, 401, 404, ...) is raised at once.

    A call takes at most 2 * `timeout` + 160 seconds, beside waiting until fewer than `concurrency` calls are under way; it
    keeps its place while it waits to try again. After one that failed for good the next try for three seconds, until one
    succeeds.

    `prices`: (dollars per million prompt tokens, per million completion tokens); None = unknown. Usage counts what servers
    reported, of answers without text too. Raises ExecutorError; never falls back to another host or model.
    """

    name, instant, lockstep = "openai", False, False

    def __init__(self, urls: Iterable[str], model: str, api_key_env: str | None = None, *, temperature: float = 0.0,
                 max_tokens: int = 2048, timeout: float = 120.0, retries: int = 10, concurrency: int = 32,
                 prices: tuple[float, float] | None = None, extra: Mapping[str, Any] | None = None,
                 role: str = "executor") -> None:
        from endpoint import Endpoint, read_key  # late: the simulated default needs no HTTP library

        self.role = role  # what messages and flags call it
        self.key_name, key = api_key_env, read_key(api_key_env, f"--{role}-key-env") if api_key_env else ""
        self.endpoints = [Endpoint(url, key, concurrency) for url in urls]
        if not self.endpoints:
            raise ValueError(f"the openai {role} needs at least one --{role}-url")
        self.parameters = request_parameters(model, extra, temperature, max_tokens)
        self.timeout, self.retries, self.prices = timeout, retries, prices
        self._slots = threading.BoundedSemaphore(concurrency)
        self._lock = threading.Lock()
        self._troubled = self._in_vain = self._told_of_cut = False

    def complete(self, request: Request) -> Reply:
        body = {**self.parameters, "messages": [{"role": "user", "content": _valid(request.text)}]}
        spent, began = Usage(1), time.monotonic()
        with self._slots:
            text = self._ask(body, spent)
        spent.seconds = time.monotonic() - began
        return Reply(text, spent)

    def _ask(self, body: dict[str, Any], spent: Usage) -> str:
        began, unusable, attempts = time.monotonic(), 0, 0
        limit = began + (3.0 if self._in_vain else self.timeout + PATIENCE)
        for turn in range(self.retries + 1):
            asked, tried = math.inf, []
            while (endpoint := self._take(tried)) is not None:
                try:
                    text = self._attempt(endpoint, body, spent)
                    self._in_vain = False
                    self._tell(False, f"answers again, after {time.monotonic() - began:.0f} s")
                    return text
                except _Again as failure:
                    last, asked = f"{endpoint.url}: {failure}", min(asked, failure.asked)
                    attempts, unusable = attempts + 1, unusable + failure.answered
                tried.append(endpoint)
                if unusable == UNUSABLE_ANSWERS or time.monotonic() > limit:
                    break
            wait = max(min(60.0, asked), min(30.0, 2.0**turn) * random.uniform(0.75, 1.25))
            if unusable == UNUSABLE_ANSWERS or turn == self.retries or time.monotonic() + wait > limit:
                break
            if turn == 2:  # not for a hiccup
                self._tell(True, f"does not answer; trying again for {limit - time.monotonic():.0f} s. {last}")
            time.sleep(wait)
        self._in_vain = unusable < UNUSABLE_ANSWERS
        raise ExecutorError(f"no answer from the {self.role} in {attempts} attempts ({time.monotonic() - began:.0f} s); "
                            f"the last: {last}")

    def _take(self, tried: list[Any]) -> Any:
        """The URL for the next attempt; None if those that are left are not fit and another one has just been tried."""
        with self._lock:
            now = time.monotonic()
            fit = [e for e in self.endpoints if e not in tried and e.ready_at <= now and not (e.failures and e.in_flight)]
            if fit:
                chosen = min(fit, key=lambda e: e.in_flight)
            elif tried:
                return None
            else:
                chosen = min(self.endpoints, key=lambda e: (e.failures, e.ready_at))
            chosen.in_flight += 1
            return chosen

    def _attempt(self, endpoint: Any, body: dict[str, Any], spent: Usage) -> str:
        """The text of the answer. Raises _Again, or ExecutorError where trying again cannot help."""
        from endpoint import Unreachable, retry_after

        asked, healthy = 0.0, False
        try:
            status, headers, content = endpoint.post("/chat/completions", body, self.timeout)
            if status in RETRY_STATUS or status >= 500:
                asked = retry_after(headers)
                raise _Again(f"HTTP {status}: {endpoint.quote(content)}", asked)
            if status == 200:
                text = self._read(endpoint, content, spent)
            healthy = True
        except Unreachable as error:
            raise _Again(str(error)) from None
        except ValueError as error:
            raise ExecutorError(f"{endpoint.url}: {error}") from None
        finally:
            with self._lock:
                endpoint.in_flight -= 1
                endpoint.failures = 0 if healthy else endpoint.failures + 1
                endpoint.ready_at = 0.0 if healthy else time.monotonic() + max(asked, min(60.0, 2.0**endpoint.failures))
        if status != 200:
            raise ExecutorError(f"{endpoint.url}: HTTP {status}: {endpoint.quote(content)} {self._hint(status)}".rstrip())
        return text

    def _read(self, endpoint: Any, content: bytes, spent: Usage) -> str:
        try:
            data = json.loads(content)
            choice = data["choices"][0]
            message = dict(choice["message"])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Again(f"the answer has no choices with a message: {endpoint.quote(content)}", answered=True) from None
        self._count(data.get("usage"), spent)
        text = message.get("content")
        if isinstance(text, list):  # of parts
            text = "".join(part["text"] for part in text if isinstance(part, dict) and isinstance(part.get("text"), str))
        text = endpoint.redact(_valid(text)) if isinstance(text, str) else ""
        if "think>" in text:
            text = without_thinking(text)
        if text.strip():
            return text
        if choice.get("finish_reason") == "length":  # its tokens were used up by reasoning: the model failed, not the server
            if not self._told_of_cut:
                self._told_of_cut = True
                print(f"{self.role}: max_tokens is too small for this model: an answer ended within its reasoning and counts as "
                      "empty. Raise it with --executor-extra '{\"max_tokens\": 16384}'.", file=sys.stderr, flush=True)
            return ""
        but = " but reasoning" if message.get("reasoning_content") or message.get("reasoning") else ""
        raise _Again(f"the answer has no text{but}, finish_reason {choice.get('finish_reason')!r:.40}", answered=True)

    def _count(self, usage: Any, spent: Usage) -> None:
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else [None]
        if not all(type(n) is int and 0 <= n < 10**9 for n in tokens):
            return spent.add(Usage(dollars=None))
        dollars = sum(n * price for n, price in zip(tokens, self.prices, strict=True)) / 1e6 if self.prices else None
        spent.add(Usage(0, 0, *tokens, dollars=dollars))

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return (f"(the key in {self.key_name} was refused)" if self.key_name else
                    f"(the server wants a key; name the environment variable that holds it with --{self.role}-key-env)")
        if status == 404:
            return f"(is {self.parameters['model']!r} the server's name of the model, and the URL right up to /v1?)"
        return "(redirects are not followed; give the final address)" if 300 <= status < 400 else ""

    def _tell(self, troubled: bool, text: str) -> None:
        """Say it when trouble begins and when it ends, not at every call."""
        with self._lock:
            changed, self._troubled = self._troubled != troubled, troubled
        if changed:
            print(f"{self.role}: {text}", file=sys.stderr, flush=True)


def _valid(text: str) -> str:
    """Text that every encoder takes: lone surrogates and NUL become U+FFFD."""
    return re.sub("[\ud800-\udfff\0]", "\ufffd", text)


def without_thinking(text: str) -> str:
    """What a reasoning model says after its <think> block; an unclosed block has no answer behind it."""
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after.strip()
    return "" if text.lstrip().startswith("<think>") else text.strip()


# ---- record and replay ----------------------------------------------------------------------------------------------


class CachedBackend:
    """A content-addressed cache of replies and their usage on disk. With `inner` it records; without, it only replays.

    Calls with equal content share one reply, also across trajectories; equal calls at one time are made once and fail
    together. A damaged file is recorded again. Raises ExecutorError for a miss or a damaged file in replay. Rollouts go in
    lock-step, so that a recorded run has the same batches, and so the same bits, as its replay.
    """

    lockstep = True

    def __init__(self, directory: str | Path, inner: Backend | None = None, fingerprint: str = "",
                 instant: bool = False) -> None:
        self.directory, self.inner, self.instant = Path(directory), inner, instant
        self.name = f"cached {inner.name}" if inner else "replay"
        self.fingerprint = fingerprint  # whatever else decides a reply: model name, temperature, simulation seed
        self._lock, self._running = threading.Lock(), {}

    def complete(self, request: Request) -> Reply:
        content = json.dumps([self.fingerprint, request.task.id, request.operator, request.text,
                              request.inputs], sort_keys=True, default=str)
        key = _sha256(content)
        with self._lock:
            mine = key not in self._running
            future = self._running.setdefault(key, Future())
        if not mine:
            return Reply(future.result().text, future.result().usage.again())
        try:
            future.set_result(self._read(key, request) or self._record(key, self.inner.complete(request), request))
        except BaseException as error:
            future.set_exception(error)
        finally:
            with self._lock:
                del self._running[key]
        return future.result()

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"

    def _read(self, key: str, request: Request) -> Reply | None:
        """The recorded reply; None where it has to be recorded."""
        call = f"{request.operator} on {request.task.id}"
        try:
            stored = json.loads(self._path(key).read_bytes())
            if stored["sha256"] != _checksum(key, stored["text"], stored["usage"]):
                raise ValueError("text and usage do not fit their checksum")
            return Reply(stored["text"], Usage(**stored["usage"]).again())
        except FileNotFoundError:
            why = f"replay: no recorded reply for {call} in {self.directory}"
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = f"replay: the reply recorded for {call} is damaged: {self._path(key)}: {error!r}"
        if self.inner is None:
            raise ExecutorError(why)
        return None

    def _record(self, key: str, reply: Reply, request: Request) -> Reply:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        usage = reply.usage.to_dict()
        temporary.write_text(json.dumps({"text": reply.text, "sha256": _checksum(key, reply.text, usage),
                                         "operator": request.operator, "usage": usage}), encoding="utf-8")
        temporary.replace(path)
        return reply


def _checksum(key: str, text: str, usage: Mapping[str, Any]) -> str:
    return _sha256(key + text + json.dumps(usage, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
