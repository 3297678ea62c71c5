"""Executor LLMs: what runs the operators' prompts. The policy is not here; it lives in policy.py.

Three backends with one method, `complete(Request) -> Reply`:

* SimulatedBackend (the default): no LLM. A seeded skill model that knows the gold answer and answers in each operator's
  real output format, right with a probability that depends on operator, kind of task, difficulty and what came before.
  Every outcome is a pure function of (seed, task, operator, prompt, inputs), like a model at temperature 0, so the
  trajectories of a group differ by their workflows and not by luck. It is a simulation and is called so wherever shown.
* OpenAIBackend: any OpenAI-compatible server over HTTP.
* CachedBackend: records the replies of another backend on disk by content, and replays them, also offline.

Usage counts what was really spent. An unknown price stays unknown (None), never 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from simulated import Simulation
from tasks import Task


class ExecutorError(RuntimeError):
    """The executor could not answer, after all retries. Never feedback, never a reward: the trajectory is dropped."""


@dataclass
class Usage:
    """What executor calls cost. `dollars` is None as soon as one part of it is unknown."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    dollars: float | None = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, other: Usage) -> None:
        with self._lock:  # parallel branches of a workflow add at once
            self.calls += other.calls
            self.cached += other.cached
            self.prompt_tokens += other.prompt_tokens
            self.completion_tokens += other.completion_tokens
            self.seconds += other.seconds
            known = self.dollars is not None and other.dollars is not None
            self.dollars = self.dollars + other.dollars if known else None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}


@dataclass(frozen=True)
class Request:
    """One executor call. `text` is the whole message; prompt and inputs are its parts, which only a simulation reads."""

    task: Task
    operator: str
    prompt: str
    text: str
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    text: str
    usage: Usage


class Backend(Protocol):
    name: str
    instant: bool  # answers without waiting: rollouts may then go in lock-step, which makes them deterministic

    def complete(self, request: Request) -> Reply: ...


class SimulatedBackend:
    """The skill model of simulated.py. `latency` (median, seconds) adds heavy-tailed waiting, a pure function too."""

    name = "simulated"

    def __init__(self, seed: int = 0, latency: float = 0.0) -> None:
        self.seed, self.latency, self.instant = seed, latency, latency == 0

    def complete(self, request: Request) -> Reply:
        text = Simulation(self.seed, request.task, request.operator, request.prompt, request.inputs).reply()
        if self.latency:
            rng = random.Random(f"{self.seed}/latency/{request.task.id}/{request.text}")
            time.sleep(self.latency * rng.lognormvariate(0, 1))
        # A quarter of the characters stands for tokens: the simulation has no tokenizer.
        return Reply(text, Usage(1, 0, len(request.text) // 4, len(text) // 4, dollars=None))


# ---- any OpenAI-compatible server -----------------------------------------------------------------------------------

RETRY_STATUS = (408, 409, 429, 500, 502, 503, 504)


class OpenAIBackend:
    """POST {url}/chat/completions. Several URLs are used least-in-flight; the key comes from a named environment variable.

    `prices`: (dollars per million prompt tokens, per million completion tokens); None = unknown. Raises ExecutorError
    when every retry failed or the server refuses the request; never falls back to another host or model.
    """

    name, instant = "openai", False

    def __init__(self, urls: Iterable[str], model: str, api_key_env: str | None = None, *, temperature: float = 0.0,
                 max_tokens: int = 2048, timeout: float = 120.0, retries: int = 5, concurrency: int = 32,
                 prices: tuple[float, float] | None = None) -> None:
        import requests  # late: the simulated default needs no HTTP library

        self.urls = [url.rstrip("/") if url.rstrip("/").endswith("/v1") else url.rstrip("/") + "/v1" for url in urls]
        if not self.urls:
            raise ValueError("the openai executor needs at least one --executor-url")
        if api_key_env and not os.environ.get(api_key_env):
            raise ValueError(f"the environment variable {api_key_env} (--executor-key-env) is empty or not set")
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.timeout, self.retries, self.prices = timeout, retries, prices
        self._errors = requests.RequestException
        self._session = requests.Session()
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=concurrency))
        self._session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=concurrency))
        self._key = os.environ[api_key_env] if api_key_env else ""
        if self._key:
            self._session.headers["Authorization"] = f"Bearer {self._key}"
        self._slots = threading.BoundedSemaphore(concurrency)
        self._lock = threading.Lock()
        self._in_flight = dict.fromkeys(self.urls, 0)
        self._dead_until = dict.fromkeys(self.urls, 0.0)

    def complete(self, request: Request) -> Reply:
        body = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens,
                "messages": [{"role": "user", "content": request.text}]}
        started, why = time.monotonic(), ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self._wait(attempt, why))
            with self._slots:
                reply, why = self._post(body)
            if reply is not None:
                reply.usage.seconds = time.monotonic() - started
                return reply
        raise ExecutorError(f"executor {', '.join(self.urls)} failed {self.retries + 1} times; the last: {why}")

    def _wait(self, attempt: int, why: str) -> float:
        """Exponential backoff with jitter, or what the server's Retry-After asked for, at most a minute."""
        asked = re.search(r": HTTP \d+, retry after (\d+(?:\.\d+)?)$", why, re.ASCII)
        return min(60.0, float(asked.group(1)) if asked else 0.5 * 2**attempt * (0.5 + random.random()))

    def _post(self, body: dict[str, Any]) -> tuple[Reply | None, str]:
        """(reply, "") or (None, why it may be tried again). Raises ExecutorError where trying again cannot help."""
        with self._lock:
            now = time.monotonic()
            alive = [url for url in self.urls if self._dead_until[url] <= now] or self.urls
            url = min(alive, key=self._in_flight.__getitem__)
            self._in_flight[url] += 1
        try:
            answer = self._session.post(f"{url}/chat/completions", json=body, timeout=self.timeout, allow_redirects=False)
        except self._errors as error:
            with self._lock:
                self._dead_until[url] = time.monotonic() + 10  # others take over; tried again after that
            return None, f"{url}: {type(error).__name__}"
        finally:
            with self._lock:
                self._in_flight[url] -= 1
        if answer.status_code in RETRY_STATUS:
            after = answer.headers.get("Retry-After", "")
            return None, f"{url}: HTTP {answer.status_code}" + (f", retry after {after}" if after else "")
        text = answer.content.decode("utf-8", "replace")
        if self._key:  # servers quote it: "incorrect API key: ..."
            text = text.replace(self._key, "***")
        if answer.status_code != 200:
            raise ExecutorError(f"{url}: HTTP {answer.status_code}: {text[:300]} (model {self.model!r})")
        return self._read(url, text)

    def _read(self, url: str, content: str) -> tuple[Reply | None, str]:
        try:
            data = json.loads(content)
            text = data["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return None, f"{url}: the answer is not a chat completion: {content[:200]!r}"
        if not isinstance(text, str) or not text.strip():
            return None, f"{url}: the answer has no content"
        usage = data["usage"] if isinstance(data.get("usage"), dict) else {}
        tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        known = all(isinstance(n, int) for n in tokens)
        spent = Usage(1, 0, *(tokens if known else (0, 0)), dollars=None)
        if self.prices and known:
            spent.dollars = (spent.prompt_tokens * self.prices[0] + spent.completion_tokens * self.prices[1]) / 1e6
        return Reply(text, spent), ""


# ---- record and replay ----------------------------------------------------------------------------------------------


class CachedBackend:
    """A content-addressed cache of replies on disk. With `inner` it records; without, it only replays.

    Calls with equal content share one reply, also across trajectories. Raises ExecutorError for a miss in replay.
    """

    def __init__(self, directory: str | Path, inner: Backend | None = None, fingerprint: str = "") -> None:
        self.directory, self.inner = Path(directory), inner
        self.name = f"cached {inner.name}" if inner else "replay"
        self.instant = inner.instant if inner else True
        self.fingerprint = fingerprint  # whatever else decides a reply: model name, temperature, simulation seed
        self._locks = [threading.Lock() for _ in range(64)]  # equal calls wait for the first instead of repeating it

    def complete(self, request: Request) -> Reply:
        content = json.dumps([self.fingerprint, request.task.id, request.operator, request.text,
                              request.inputs], sort_keys=True, default=str)
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        path = self.directory / key[:2] / f"{key}.json"
        with self._locks[int(key[:4], 16) % len(self._locks)]:
            if path.exists():
                stored = json.loads(path.read_text(encoding="utf-8"))
                return Reply(stored["text"], Usage(0, 1, dollars=0.0))
            if self.inner is None:
                raise ExecutorError(f"replay: no recorded reply for {request.operator} on {request.task.id} in {self.directory}")
            reply = self.inner.complete(request)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            record = {"text": reply.text, "operator": request.operator, "usage": reply.usage.to_dict()}
            temporary.write_text(json.dumps(record), encoding="utf-8")
            temporary.replace(path)
            return reply

