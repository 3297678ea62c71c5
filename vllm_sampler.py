"""The policy on a vLLM server: token ids over HTTP, and the adapter that the trainer has just changed.

Three decisions:
* An answer is used only if it is what was asked for: our prompt, ids of our vocabulary with a log-probability each, and
  an end that we asked for. Anything else is an error that drops the trajectory; nothing is ever filled in.
* Every version of the adapter has a name and a directory of its own. vLLM keys its prefix cache by name and path: with
  either one used again it would read keys and values of older weights. A directory is deleted after its name is unloaded.
* A seed and a position fix every draw, so that a failed request is sent again as it was. Tries are bounded, and so is the
  time for which a server may be away; one that comes back gets the adapter again before it is asked to sample.

    scripts/serve_vllm.sh MODEL                     the server, with the flags that this needs
    sampler = VLLMSampler("http://127.0.0.1:8000", model, tokenizer, adapters=Path("runs/my.adapters"))
    sampler.load_adapter(version=0)                 # the live LoRA weights; then submit() as with InProcessSampler
"""

import math
import random
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from lora import lora_layers, save_adapter
from policy import ChatTokenizer, Sample, SampleRequest, request_problem, sampling_logprobs
from qwen3 import Qwen3
from vllm_server import IN_FLIGHT, Server, ServerError

T = TypeVar("T")
TRIES = 8                                           # of one call that keeps failing while the server is there
PAUSE = 0.25                                        # seconds before the second try; doubled with each, up to 30
# Largest difference between a log-prob of the server and ours, in nats, for the same weights. Measured on a CPU: 6e-6 in
# float32 and 0.09 in bfloat16, where low temperatures and large models can only be worse.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
PROBE = "What is 2 + 3? Colourless green ideas sleep furiously."


class InFlight:
    """Who waits for which turn: a future for every trajectory that is being sampled."""

    def __init__(self) -> None:
        self.closed, self._lock = threading.Event(), threading.Lock()
        self._futures: dict[Hashable, Future[Sample]] = {}

    def add(self, requests: Sequence[SampleRequest]) -> list[Future[Sample]]:
        """New futures, in the order of the requests; ValueError if a key is in flight already, RuntimeError after close()."""
        futures: list[Future[Sample]] = [Future() for _ in requests]
        with self._lock:
            self._require_open()
            keys = {request.key for request in requests}
            if len(keys) < len(requests) or keys & self._futures.keys():
                raise ValueError("a trajectory samples one turn at a time, but a key is in flight or given twice")
            self._futures |= {request.key: future for request, future in zip(requests, futures, strict=True)}
        for future in futures:
            future.set_running_or_notify_cancel()                # from here on cancel() is refused
        return futures

    def answer(self, key: Hashable, future: Future[Sample], error: BaseException | None, sample: Sample | None) -> None:
        """Hand over what a future waits for, unless close() has answered it."""
        with self._lock:
            if self._futures.pop(key, None) is not future:
                return
        future.set_exception(error) if error else future.set_result(sample)

    def require_none(self) -> None:
        with self._lock:
            self._require_open()
            if self._futures:
                raise RuntimeError(f"{len(self._futures)} requests are in flight; weights must not change under them")

    def close(self) -> None:
        """What is still in flight fails with RuntimeError."""
        with self._lock:
            self.closed.set()
            futures, self._futures = self._futures, {}
        for future in futures.values():
            future.set_exception(RuntimeError("this sampler was closed"))

    def _require_open(self) -> None:
        if self.closed.is_set():
            raise RuntimeError("this sampler was closed")


@dataclass(frozen=True)
class Adapter:
    """One version of the LoRA weights, as the server knows it."""

    name: str
    directory: Path
    version: int


class VLLMSampler:
    """Samples from a vLLM server that serves `model`'s base weights; has the methods of policy.InProcessSampler.

    adapters: a directory of this run alone, which the server must be able to read under the same absolute path.
    timeout: seconds for one turn, waiting in the server's queue included. patience: seconds that it may be away.
    """

    def __init__(self, url: str, model: Qwen3, tokenizer: ChatTokenizer, adapters: Path, *, temperature: float = 1.0,
                 top_p: float = 1.0, top_k: int = -1, max_context: int = 16384, timeout: float = 600.0,
                 patience: float = 300.0) -> None:
        self.server, self.model, self.tokenizer = Server(url, timeout), model, tokenizer
        self.adapters, self.max_context, self.patience, self.version = adapters.resolve(), max_context, patience, 0
        self.base = ""                                           # the served name of the base model: see find_base
        self.dtype = model.model.norm.weight.dtype
        self.tolerance = TOLERANCE.get(self.dtype, 0.5)
        self.compares = True                                     # every adapter; a sharded model cannot score on one rank alone
        # Everything is sent: what is left out would come from the model's generation_config.json. The end token alone ends
        # a turn, as in training. Padded ids of the vocabulary, which no text has, are never drawn.
        padding = range(tokenizer.vocab_size, model.config.vocab_size)
        self.distribution = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": 0.0,
                              "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                              "logit_bias": {str(i): -100.0 for i in padding}, "n": 1, "ignore_eos": True,
                              "stop_token_ids": [tokenizer.end_id], "logprobs": 0, "return_token_ids": True}
        self.adapter: Adapter | None = None                     # None: the base model
        self._flight, self._recovery = InFlight(), threading.Lock()
        self._slots = threading.BoundedSemaphore(IN_FLIGHT)
        self._away_since: float | None = None                    # under _recovery

    def find_base(self) -> dict:
        """Ask for the served name of the base model and return its entry of /v1/models."""
        bases = [model for model in self.server.models() if not model.get("parent")]
        if not bases:
            raise ServerError(f"{self.server.url} serves no model", again=False)
        self.base = bases[0]["id"]
        return bases[0]

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[SampleRequest]) -> list[Future[Sample]]:
        """Send requests and return their futures in the same order.

        A future raises ValueError if its request cannot be sampled, ServerError if the server fails after all retries.
        This call raises ValueError if a key is in flight already, RuntimeError if the sampler is closed.
        """
        futures = self._flight.add(requests)
        for request, future in zip(requests, futures, strict=True):
            threading.Thread(target=self._work, args=(request, future, self.adapter), name="vllm", daemon=True).start()
        return futures

    def release(self, key: Hashable) -> None:
        """Nothing to free: the server's prefix cache forgets by itself."""

    def _work(self, request: SampleRequest, future: Future, adapter: Adapter | None) -> None:
        sample, failure = None, None
        try:
            if problem := request_problem(request, self.model.config.vocab_size, self.max_context):
                raise ValueError(f"trajectory {request.key!r}: {problem}")
            with self._slots:
                sample = self._retry(lambda: self.sample_once(request, adapter, self.distribution), adapter)
        except Exception as error:                               # handed to whoever waits for the future
            failure = error
        self._flight.answer(request.key, future, failure, sample)

    def sample_once(self, request: SampleRequest, adapter: Adapter | None, distribution: dict) -> Sample:
        """One attempt at one turn."""
        room = min(request.max_new_tokens, self.max_context - len(request.tokens))
        body = {"model": adapter.name if adapter else self.base, "prompt": request.tokens, "max_tokens": room,
                "seed": request.seed, **distribution}
        answer = self.server.json("/v1/completions", body)
        try:
            [choice] = answer["choices"]
            ids, prompt, finish = choice["token_ids"], choice["prompt_token_ids"], choice["finish_reason"]
            logprobs = choice["logprobs"]["token_logprobs"]
            problem = self._sample_problem(request, room, ids, prompt, logprobs, finish)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"it lacks token_ids or log-probabilities ({type(error).__name__}: {error})"
        if problem:
            raise ServerError(f"{self.server.url}/v1/completions: the answer cannot be trained on: {problem}", again=False)
        return Sample(ids, logprobs, finish, adapter.version if adapter else self.version)

    def _sample_problem(self, request: SampleRequest, room: int, ids: list, prompt: list, logprobs: list, finish: str) -> str:
        """Say why an answer is not a turn that the policy sampled; "" if it is one."""
        end, limit = self.tokenizer.end_id, self.tokenizer.vocab_size
        if prompt != request.tokens:
            return f"it continues another prompt ({len(prompt)} ids, sent were {len(request.tokens)})"
        if not ids or len(ids) != len(logprobs):
            return f"{len(ids)} ids with {len(logprobs)} log-probabilities"
        if not all(type(i) is int and 0 <= i < limit for i in ids):
            return f"ids outside of the tokenizer's vocabulary of {limit}: {ids}"
        if not all(isinstance(x, int | float) and -9999 < x <= 1e-4 for x in logprobs):      # vLLM writes -inf as -9999
            return f"log-probabilities {logprobs}"
        if ((finish, len(ids)) != ("length", room) and (finish, ids[-1]) != ("stop", end)) or end in ids[:-1]:
            return f"it stopped after {len(ids)} of {room} tokens with id {ids[-1]} (finish_reason {finish})"
        return ""

    # ---- retries -----------------------------------------------------------------------------------------------------

    def _retry(self, call: Callable[[], T], adapter: Adapter | None) -> T:
        """Call until it succeeds, at most TRIES times, each time after the server is there and has the adapter."""
        strikes = 0                                              # of what is worth one more try, not many
        for attempt in range(TRIES):
            try:
                if attempt:
                    self.recover(adapter)
                return call()
            except ServerError as error:
                gone = error.status == 404 and adapter is not None       # it restarted and we never saw it away
                strikes += error.timed_out or gone
                if not (error.again or gone) or strikes == 2 or attempt == TRIES - 1 or self._flight.closed.is_set():
                    raise
                if error.after > self.patience:
                    raise ServerError(f"{self.server.url} asks to wait for {error.after:g} s", again=False) from error
                pause = error.after or min(30.0, PAUSE * 2**attempt * random.uniform(0.5, 1.5))
            self._flight.closed.wait(pause)
        raise AssertionError("unreachable")

    def recover(self, adapter: Adapter | None) -> None:
        """Wait until the server is there, and load the adapter again if it was restarted."""
        with self._recovery:                                     # one thread waits and loads, the others come after it
            self._await_health()
            if adapter and adapter.name not in {model["id"] for model in self.server.models()}:
                self._load(adapter)
                print(f"policy server {self.server.url}: adapter {adapter.name} loaded again", file=sys.stderr, flush=True)

    def _await_health(self) -> None:
        while not self.server.healthy():
            if self._away_since is None:
                self._away_since = time.monotonic()
                print(f"policy server {self.server.url} is away; waiting up to {self.patience:g} s", file=sys.stderr, flush=True)
            if self._flight.closed.is_set() or time.monotonic() - self._away_since > self.patience:
                raise ServerError(f"{self.server.url} was away for more than {self.patience:g} s", again=False)
            self._flight.closed.wait(1.0)
        if self._away_since is not None:
            seconds, self._away_since = time.monotonic() - self._away_since, None
            print(f"policy server {self.server.url} is back after {seconds:.0f} s", file=sys.stderr, flush=True)

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def load_adapter(self, version: int) -> None:
        """Hand the live LoRA weights to the server as a new adapter, check that it samples from them, drop the last one.

        Without LoRA layers the base model is sampled. Raises RuntimeError while requests are in flight, and ServerError
        with the server's words when it refuses the adapter.
        """
        self._flight.require_none()
        if not self.base:
            self._retry(self.find_base, None)
            self._retry(self._forget_leftovers, None)
        if lora_layers(self.model):
            name = f"{self.adapters.name.removesuffix('.adapters')}-v{version}-{secrets.token_hex(4)}"
            new = Adapter(name, self.adapters / name, version)
            save_adapter(self.model, new.directory)
            try:
                self._retry(lambda: self._load(new), None)
            except ServerError:
                shutil.rmtree(new.directory, ignore_errors=True)
                raise
            self.drop_adapter()
            self.adapter = new
        self.version = version

    def drop_adapter(self) -> None:
        """Go back to the base model: unload the adapter, and only then delete its directory."""
        if self.adapter:
            name, directory = self.adapter.name, self.adapter.directory
            self._retry(lambda: self._unload(name), None)
            shutil.rmtree(directory)
            self.adapter = None

    def _load(self, adapter: Adapter) -> None:
        """One attempt to load an adapter and to see it sample what the trainer's own weights would."""
        if adapter.name not in {model["id"] for model in self.server.models()}:
            try:
                self.server.call("/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": str(adapter.directory)})
            except ServerError as error:
                self._flight.closed.wait(1.0 if error.status == 500 else 0)     # a dying server says 500 before it is gone
                if error.status and error.status != 503 and self.server.healthy():
                    raise ServerError(f"the server refused adapter {adapter.directory}: {error}", again=False) from error
                raise
        if adapter.name not in {model["id"] for model in self.server.models()}:
            raise ServerError(f"{self.server.url} took adapter {adapter.name} but does not serve it", again=True)
        gap = self.logprob_gap(adapter) if self.compares else 0.0
        if not gap <= self.tolerance:
            raise ServerError(f"{self.server.url} with adapter {adapter.name} samples from other weights than the trainer's: "
                              f"log-probabilities differ by {gap:.3g} nats (at most {self.tolerance}). Does it serve the model "
                              "and dtype of the trainer, with --logprobs-mode processed_logprobs?", again=False)

    @torch.no_grad()
    def logprob_gap(self, adapter: Adapter | None, n: int = 8) -> float:
        """Return the largest |server - trainer| over the log-probs of n sampled tokens (fewer if the turn ends), nats."""
        tokens = self.tokenizer.prompt_ids(PROBE, PROBE)
        plain = self.distribution | {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
        sample = self.sample_once(SampleRequest("probe", tokens, n, seed=0), adapter, plain)
        training = self.model.training
        self.model.eval()                                        # no dropout
        try:
            ids = torch.tensor([tokens + sample.ids], device=self.model.model.embed_tokens.weight.device)
            states = self.model.hidden(ids)[0, len(tokens) - 1:-1]                               # (n, D)
            logprobs = sampling_logprobs(self.model.head(states), vocab_limit=self.tokenizer.vocab_size)
        finally:
            self.model.train(training)
        ours = logprobs[torch.arange(len(sample.ids)), sample.ids].tolist()
        return max(abs(a - b) if math.isfinite(a) else math.inf for a, b in zip(ours, sample.logprobs, strict=True))

    def _unload(self, name: str) -> None:
        """One attempt; an adapter that a restart has removed is no error."""
        try:
            self.server.call("/v1/unload_lora_adapter", {"lora_name": name}, timeout=60)
        except ServerError as error:
            if error.status != 404:
                raise

    def _forget_leftovers(self) -> None:
        """Unload and delete what a killed process of this run has left: directories last, for the server may read them."""
        for model in self.server.models():
            if self.adapters in Path(model.get("root") or "/").parents:
                self._unload(model["id"])
        shutil.rmtree(self.adapters, ignore_errors=True)

    def close(self) -> None:
        """Unload the adapter and delete its directory; what is still in flight fails with RuntimeError."""
        self._flight.close()
        adapter, self.adapter = self.adapter, None
        try:
            if adapter:
                self._unload(adapter.name)
            shutil.rmtree(self.adapters, ignore_errors=True)
        except ServerError as error:                             # a server that is there may still read the directory
            print(f"{adapter.directory} was left behind: {error}", file=sys.stderr, flush=True)
        self.server.close()
