"""The Flow-Director's side of tokens: turns framed in ids, the sampling distribution, and an in-process sampler.

Three decisions:
* Token in, token out. A conversation is a list of ids that only ever grows, framed in ChatML by hand. To render a chat
  template anew every turn drops earlier <think> blocks and re-tokenises samples: log-probs of tokens nobody drew.
* A draw is a pure function of the distribution, a seed and the token's index in the conversation, so a trajectory does
  not depend on the company it is sampled in. It is reported as it was drawn, the end token included.
* Keys and values stay with the trajectory between turns: a turn costs its new tokens only.

    tokenizer = ChatTokenizer("Qwen3-0.6B")
    sampler = InProcessSampler(model, tokenizer.end_id, vocab_limit=tokenizer.vocab_size)
    tokens = tokenizer.prompt_ids("You design workflows.", "What is 2 + 3?")
    [future] = sampler.submit([SampleRequest(key="tau 0", tokens=tokens, max_new_tokens=256, seed=1)])
    sample = future.result()
    tokens = tokens + sample.ids + tokenizer.feedback_ids("Node n1 was added.", ended=sample.finish == "stop")
"""

import hashlib
import math
import re
import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qwen3 import KVCache, Qwen3

FRAME = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
PREFILL_TOKENS, SHARE_TOKENS = 2048, 32  # ids in one prefill call, padding included; shortest prefix worth a call of its own


class ChatTokenizer:
    """The tokenizer.json of a Qwen3 directory, and ChatML turns in ids.

    enable_thinking=False ends every prompt and feedback with an empty <think> block, as Qwen3's own template does.
    Raises FileNotFoundError, or ValueError for a file that cannot be read or has no usable ChatML tokens.
    """

    def __init__(self, directory: str | Path, enable_thinking: bool = True) -> None:
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path} (expected a Hugging Face directory)")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:               # the library raises bare Exception for every malformed file
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
        self._tokenizer.no_truncation()          # a file may ask for either, and both change ids behind our back
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True         # encode the text of a special token as any other text
        ids = {text: self._tokenizer.token_to_id(text) for text in FRAME}
        if bad := [text for text in FRAME if ids[text] is None or ids[text] in self.encode(text)]:
            raise ValueError(f"{path} has no special token {' '.join(bad)}; turns are framed in these (ChatML)")
        self.start_id, self.end_id, self.pad_id = ids.values()
        self._known = frozenset(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(self._known) + 1   # ids from here to the model's vocab_size are padding
        self._replacement = self.encode("\ufffd")
        thinking = "" if enable_thinking else "<think>\n\n</think>\n\n"
        self._open = [*self.encode("\n"), self.start_id]
        self._answer = [self.end_id, *self._open, *self.encode("assistant\n" + thinking)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of text from outside (a task, feedback, an executor's answer), never a special one.

        "<|im_end|>" in it is spelled in ordinary tokens, so that no text can end its turn or open another. Added tokens
        that the tokenizer does not call special (<think>, <tool_call>) are matched, as Qwen's own encoder does.
        Lone surrogates, which UTF-8 cannot hold, become U+FFFD: an executor's answer must not crash an episode.
        """
        return self._tokenizer.encode(re.sub("[\ud800-\udfff]", "\ufffd", text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of ids, special tokens only on request; an id without a token (padding) reads as U+FFFD."""
        known = [j for i in ids for j in ((i,) if i in self._known else self._replacement)]
        return self._tokenizer.decode(known, skip_special_tokens=not special)

    def prompt_ids(self, system: str, user: str) -> list[int]:
        """Return the ids that open a conversation, up to where the policy's first turn begins."""
        return [self.start_id, *self.encode("system\n" + system), self.end_id, *self._user_turn(user)]

    def feedback_ids(self, text: str, ended: bool) -> list[int]:
        """Return the ids to append to a sampled turn; `ended` says whether the policy sampled <|im_end|> itself."""
        return [*([] if ended else [self.end_id]), *self._user_turn(text)]

    def _user_turn(self, text: str) -> list[int]:
        # "user\n" and the text are one string: the tokenizer merges newlines across that border, and so did Qwen
        return [*self._open, *self.encode("user\n" + text), *self._answer]


def sampling_logprobs(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1,
                      vocab_limit: int | None = None) -> Tensor:
    """Return log-probs (B, V), float32, of the distribution that logits (B, V) are drawn from; -inf: cannot be drawn.

    In vLLM's order (`processed_logprobs`): temperature, then the top_k largest (-1 or 0: off), then of these the most
    probable up to a mass of top_p, renormalised. Temperature 0 stands for greedy decoding: as in vLLM, the log-probs
    are those of temperature 1, not truncated. Ids from vocab_limit on are padding of the vocabulary: never drawn.
    """
    logits, V = logits.float(), logits.size(-1)
    if vocab_limit is not None and vocab_limit < V:
        logits = logits.masked_fill(torch.arange(V, device=logits.device) >= vocab_limit, -math.inf)
    if temperature == 0:
        return logits.log_softmax(-1)
    logits = logits / temperature
    if 0 < top_k < V or top_p < 1:
        kept, ids = logits.topk(top_k if 0 < top_k < V else V, dim=-1)               # (B, K), the largest first
        if top_p < 1:
            probs = kept.softmax(-1)
            above = probs.cumsum(-1) - probs                                         # mass of all that is more probable
            kept = kept.masked_fill(above >= top_p, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, kept)
    return logits.log_softmax(-1)


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on nothing but its arguments: 52 bits of a hash."""
    digest = hashlib.blake2b(f"{seed},{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Return ids (B,) by inverting each row's cumulative distribution at uniforms (B,), float64.

    The id drawn is the first whose cumulative mass exceeds u * total: never one without mass, which adds nothing to it;
    and there is one, because u <= 1 - 2**-52 keeps u * total below the total.
    """
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)                      # (B, V)
    ids = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    return ids.clamp(max=logprobs.size(-1) - 1)      # only NaN gets beyond; the caller sees it in the log-prob


@dataclass(frozen=True)
class SampleRequest:
    """One turn to sample."""

    key: Hashable                # the trajectory; its cache lives under this key until release(key)
    tokens: list[int]            # the whole conversation so far
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """One sampled turn."""

    ids: list[int]               # at least one; with the end token, if it was sampled
    logprobs: list[float]        # of these ids, under the distribution that they were drawn from
    finish: str                  # "stop": the end token was sampled; "length": max_new_tokens or max_context reached
    version: int                 # of the adapter


def request_problem(request: SampleRequest, vocab_size: int, max_context: int) -> str:
    """Say why a request cannot be sampled; "" if it can."""
    if not 1 <= len(request.tokens) < max_context or request.max_new_tokens < 1:
        return f"{len(request.tokens)} tokens and {request.max_new_tokens} new ones in a context of {max_context}"
    if min(request.tokens) < 0 or max(request.tokens) >= vocab_size:
        return f"ids {min(request.tokens)}..{max(request.tokens)} do not fit a vocabulary of {vocab_size}"
    return ""


@dataclass
class _Slot:
    """One trajectory's row of the KV cache, and the turn that is being sampled into it."""

    row: int
    tokens: list[int] = field(default_factory=list)
    cached: int = 0              # keys and values of tokens[:cached] are in the cache
    request: SampleRequest | None = None
    logprobs: list[float] = field(default_factory=list)


class InProcessSampler:
    """Samples from a model in this process: a worker thread decodes one batch that requests join and leave.

    The KV cache has a row for every trajectory, as wide as the longest: right for small models; 8B wants a server.
    The model is the live one: nothing may be in flight while a trainer changes its weights, and load_adapter() must be
    called after. It is in eval mode during a decoding step only: whoever has the last result may train at once. What
    one submit() hands over while nothing is in flight gives the same bits every time; else their last ones depend on
    timing, and a token changes only where its random number falls within rounding of a border.
    """

    def __init__(self, model: Qwen3, end_id: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1,
                 vocab_limit: int | None = None, max_context: int = 16384) -> None:
        if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= -1):
            raise ValueError(f"temperature {temperature}, top_p {top_p}, top_k {top_k}: expected >= 0, 0 < p <= 1, >= -1")
        self.model, self.end_id, self.max_context, self.version = model, end_id, max_context, 0
        self.temperature, self.truncation = temperature, (top_p, top_k, vocab_limit)
        self.prefilled = self.decoded = 0                    # tokens that went through the model so far
        self._cache: KVCache | None = None                   # the worker's, while anything is in flight
        self._slots: dict[Hashable, _Slot] = {}              # this and the rest: under the lock of _changed
        self._rows: list[_Slot | None] = []                  # who owns which row of the cache
        self._queue: list[SampleRequest] = []                # what the worker has not seen yet
        self._futures: dict[Hashable, Future[Sample]] = {}   # of everything in flight, the queue included
        self._released: set[Hashable] = set()                # to be freed before the next batch
        self._error: Exception | None = None                 # why the worker ended
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._worker.start()

    def submit(self, requests: Sequence[SampleRequest]) -> list[Future[Sample]]:
        """Queue requests, all at once, and return their futures in the same order.

        A request that cannot be sampled (empty, too long, unknown ids) fails alone: its future raises ValueError. This
        call raises ValueError if a key is in flight already, RuntimeError if the worker has ended.
        """
        futures: list[Future[Sample]] = [Future() for _ in requests]
        with self._changed:
            self._require_running()
            keys = {request.key for request in requests}
            if len(keys) < len(requests) or keys & self._futures.keys():
                raise ValueError("a trajectory samples one turn at a time, but a key is in flight or given twice")
            self._released -= keys
            for request, future in zip(requests, futures, strict=True):
                future.set_running_or_notify_cancel()        # from here on cancel() is refused
                if problem := request_problem(request, self.model.config.vocab_size, self.max_context):
                    future.set_exception(ValueError(f"trajectory {request.key!r}: {problem}"))
                else:
                    self._queue.append(request)
                    self._futures[request.key] = future
            self._changed.notify()
        return futures

    def release(self, key: Hashable) -> None:
        """Free a trajectory's cache before the next request joins; unknown keys are ignored."""
        with self._changed:
            self._released.add(key)
            if not self._futures:    # else later: how far a step reads the cache, and so the last bits, depends on all rows
                self._free_released()

    def _free_released(self) -> None:
        for key in self._released - self._futures.keys():
            self._released.remove(key)
            if slot := self._slots.pop(key, None):
                self._rows[slot.row] = None

    def load_adapter(self, version: int) -> None:
        """Drop all keys and values, because the live weights have changed."""
        with self._changed:
            self._require_running()
            if self._futures:
                raise RuntimeError(f"{len(self._futures)} requests are in flight; weights must not change under them")
            self._slots, self._rows = {}, []
            self._cache, self.version = None, version        # the trainer can have the memory

    def close(self) -> None:
        """Stop the worker; what is still in flight fails with RuntimeError."""
        with self._changed:
            self._error = self._error or RuntimeError("it was closed")
            self._changed.notify()
        self._worker.join()

    def _require_running(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"this sampler has ended: {self._error!r}") from self._error

    # From here on everything runs in the worker thread.

    def _run(self) -> None:
        live: list[_Slot] = []
        try:
            while True:
                with self._changed:
                    while not (self._queue or live or self._error):
                        self._changed.wait()
                    self._require_running()
                    new, self._queue = [self._assign(request) for request in self._queue], []
                training = self.model.training
                try:
                    self.model.eval()                        # no dropout
                    with torch.no_grad():
                        self._prefill_new(new)
                        live += new
                        self._decode(live)
                finally:
                    self.model.train(training)
                live = self._finish(live)
        except Exception as error:                           # goes to everyone who waits and everyone who still comes
            with self._changed:
                self._error = self._error or error
                failed, self._futures = self._futures, {}
            for future in failed.values():
                future.set_exception(error)

    def _assign(self, request: SampleRequest) -> _Slot:
        """Give a request the slot of its trajectory, keeping what the cache holds of its tokens, or a new one."""
        self._free_released()
        slot = self._slots.get(request.key)
        if slot is None:
            if None not in self._rows:
                self._rows.append(None)
            row = self._rows.index(None)
            slot = self._slots[request.key] = self._rows[row] = _Slot(row)
        # the last token is left for the first decode step, which needs its hidden state
        slot.cached = min(common_prefix(slot.tokens[:slot.cached], request.tokens), len(request.tokens) - 1)
        slot.tokens, slot.request, slot.logprobs = list(request.tokens), request, []
        return slot

    def _prefill_new(self, slots: list[_Slot]) -> None:
        """Bring all but the last token of each slot into the cache."""
        self._reserve(max((len(slot.tokens) for slot in slots), default=0))
        fresh = [slot for slot in slots if slot.cached == 0]
        if len(fresh) > 1:
            # What all begin with (the system prompt) is computed once and copied; it is what min and max begin with
            shared = common_prefix(*(way([slot.tokens[:-1] for slot in fresh]) for way in (min, max)))
            if shared >= SHARE_TOKENS:
                self._prefill([(fresh[0], shared)])
                rows = [slot.row for slot in fresh]
                for store in (self._cache.k, self._cache.v):                         # (layers, rows, Hkv, capacity, Dh)
                    store[:, rows, :, :shared] = store[:, rows[0], None, :, :shared]
                for slot in fresh:
                    slot.cached = shared
        self._prefill([(slot, len(slot.tokens) - 1) for slot in slots])

    def _prefill(self, work: list[tuple[_Slot, int]]) -> None:
        """Compute keys and values of tokens[cached:end] for every (slot, end), in right-padded batches."""
        while work := [(slot, end) for slot, end in work if slot.cached < end]:
            # the longest and all at least 3/4 as long, so at most a quarter is padding; what is too long comes back
            work.sort(key=lambda item: item[0].cached - item[1])
            width = min(work[0][1] - work[0][0].cached, PREFILL_TOKENS)
            group = [(slot, end) for slot, end in work if 4 * (end - slot.cached) >= 3 * width]
            ids, positions, rows = [], [], []
            for slot, end in group[:max(1, PREFILL_TOKENS // width)]:
                chunk = slot.tokens[slot.cached:end][:width]
                ids.append(chunk + [0] * (width - len(chunk)))
                # padding is stored at `end`, where the true entry will replace it before any query sees it
                positions.append([min(slot.cached + i, end) for i in range(width)])
                rows.append(slot.row)
                slot.cached += len(chunk)
                self.prefilled += len(chunk)
            new, wanted = self._tensor(ids), self._tensor(ids, torch.bool).zero_()  # only keys and values are wanted
            self.model.hidden(new, self._tensor(positions), self._cache, self._tensor(rows), wanted=wanted)

    def _decode(self, live: list[_Slot]) -> None:
        """Feed the last token of every live slot and append the next one."""
        # idle rows count too: a turn that ended exactly at the capacity would write its next token behind it
        self._reserve(max(slot.cached + 1 for slot in [*self._rows, *live] if slot))
        low, high = min(slot.row for slot in live), max(slot.row for slot in live) + 1
        # A run of rows is read in place, any other choice is copied, every step. So a few idle rows take part: they write
        # where their next token will, and their output is dropped.
        rows = list(range(low, high)) if 2 * len(live) >= high - low else [slot.row for slot in live]
        last = {slot.row: slot.tokens[-1] for slot in live}
        ids = self._tensor([last.get(row, 0) for row in rows])[:, None]              # (rows, 1)
        positions = self._tensor([slot.cached if (slot := self._rows[row]) else 0 for row in rows])[:, None]
        hidden = self.model.hidden(ids, positions, self._cache, self._tensor(rows))[:, 0]          # (rows, D)
        logits = self.model.head(hidden[[rows.index(row) for row in last]])          # (live, V)
        logprobs = sampling_logprobs(logits, self.temperature, *self.truncation)
        uniforms = self._tensor([uniform(slot.request.seed, len(slot.tokens)) for slot in live], torch.float64)
        drawn = draw(logprobs, uniforms) if self.temperature > 0 else logprobs.argmax(-1)          # (live,)
        chosen = logprobs.gather(-1, drawn[:, None])[:, 0].tolist()
        for slot, token, logprob in zip(live, drawn.tolist(), chosen, strict=True):
            if not math.isfinite(logprob):
                raise FloatingPointError(f"a token was sampled with log-prob {logprob}: are the weights finite?")
            slot.tokens.append(token)
            slot.logprobs.append(logprob)
            slot.cached += 1
        self.decoded += len(live)

    def _finish(self, live: list[_Slot]) -> list[_Slot]:
        """Resolve the futures of finished slots and return the others."""
        going, done = [], []
        with self._changed:
            for slot in live:
                n, key, ended = len(slot.logprobs), slot.request.key, slot.tokens[-1] == self.end_id
                if not (ended or n == slot.request.max_new_tokens or len(slot.tokens) == self.max_context):
                    going.append(slot)
                    continue
                sample = Sample(slot.tokens[-n:], slot.logprobs, "stop" if ended else "length", self.version)
                done.append((self._futures.pop(key), sample))
            if not self._futures:
                self._free_released()
        for future, sample in done:              # only now: the next turn may be submitted as soon as this is resolved
            future.set_result(sample)
        return going

    def _reserve(self, columns: int) -> None:
        """Make the cache large enough for all rows and for conversations of `columns` tokens; it grows by doubling."""
        old, rows, capacity = self._cache, len(self._rows), 256
        if old is not None:
            rows, capacity = max(rows, old.rows), old.capacity
        while capacity < columns:
            capacity *= 2
        if old is None or (rows, capacity) != (old.rows, old.capacity):
            weight = self.model.model.embed_tokens.weight
            self._cache = KVCache(self.model.config, rows, capacity, weight.device, weight.dtype)
            if old is not None:
                self._cache.k[:, :old.rows, :, :old.capacity] = old.k
                self._cache.v[:, :old.rows, :, :old.capacity] = old.v

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.model.model.embed_tokens.weight.device)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many leading items of two lists are equal."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
