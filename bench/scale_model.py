"""How long a training step takes at scale: a discrete-event SIMULATION from a table of costs. Nothing here is measured.

    python bench/scale_model.py                                    all tables of docs/SCALE.md
    python bench/scale_model.py --set call_median=0.8 --set prefill=0.05e-3     with costs of your own
    python bench/scale_model.py --costs my_costs.json              the same, from a file; --show prints the table of costs

Every trajectory goes policy -> executor -> policy -> ... as rollout.py has it. A policy server decodes all conversations that
fit its KV cache together (one token each takes `decode + n * decode_each + tokens * decode_kv` seconds), stops for prefills,
and keeps idle conversations as long as there is room (least recently used go first; those are prefilled anew). Executor
calls wait for one of `executor_slots`, and for the rate limit if there is one. The update is tokens * update / trainers.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Costs:
    """Seconds, bytes and tokens; every default is an assumption, with where it comes from."""

    # Qwen3-8B in bfloat16 on an A100-80GB: 8.2e9 weights, 312e12 FLOP/s and 2.0e12 B/s by its data sheet, of which a half and
    # 0.7 are assumed to be reached; 147,456 bytes of KV a token (36 layers * 2 * 8 heads * 128 * 2 bytes).
    decode: float = 11.7e-3          # a decoding step: 16.4e9 bytes of weights are read
    decode_each: float = 0.105e-3    # and for each conversation in it: 2 * 8.2e9 FLOP
    decode_kv: float = 0.105e-6      # and for each token that they hold: 147,456 bytes are read
    prefill: float = 0.105e-3        # a token: 2 * 8.2e9 FLOP
    kv_tokens: int = 370_000         # that fit one server: (0.9 * 80e9 - 16.4e9 - 1e9) / 147,456
    update: float = 0.42e-3          # a token: reference 2, forward 2, again 2 (checkpointing), backward 2: 8 * 8.2e9 FLOP
    adapter: float = 245e6           # bytes of LoRA of rank 64 on q, k, v, o in float32
    disk: float = 1e9                # bytes a second of the file system that trainer and servers share
    load: float = 0.5                # a server's own time to take an adapter, and the comparison of its log-probs: a guess
    # Executor calls over the internet: guesses, to be replaced by metrics.jsonl's seconds_executor and executor_calls.
    call_median: float = 2.0         # seconds, log-normal
    call_sigma: float = 0.6
    calls_a_turn: float = 1.2
    executor_slots: int = 32         # --executor-concurrency
    executor_rate: float = math.inf  # calls a second that the provider allows
    # Conversations: the published run's means (132k completion tokens, 169k in all, 36 trajectories); their spread is a guess.
    turns: int = 10                  # mean; uniform from 4 to 16
    prompt: int = 430
    sampled: int = 367               # a turn, mean; log-normal with sigma 0.7
    feedback: int = 60


@dataclass
class Conversation:
    number: int
    lengths: list[int]               # tokens to sample, turn by turn
    calls: list[list[float]]         # seconds of the executor calls after each turn, one after the other
    tokens: int
    server: int = 0
    turn: int = 0
    target: float = 0.0              # server's virtual time at which the turn is sampled
    cached: int = 0                  # tokens whose keys and values its server still has


def conversations(n: int, costs: Costs, seed: int) -> list[Conversation]:
    rng, made = random.Random(seed), []
    for number in range(n):
        turns = rng.randint(max(1, costs.turns - 6), costs.turns + 6)
        lengths = [max(1, round(costs.sampled * rng.lognormvariate(-0.245, 0.7))) for _ in range(turns)]
        calls = [[costs.call_median * rng.lognormvariate(0, costs.call_sigma)
                  for _ in range(int(costs.calls_a_turn) + (rng.random() < costs.calls_a_turn % 1))] for _ in range(turns)]
        made.append(Conversation(number, lengths, calls, costs.prompt))
    return made


@dataclass
class Server:
    """Continuous batching as a fluid: `virtual` counts the tokens that every running conversation has got so far."""

    costs: Costs
    now: float = 0.0
    virtual: float = 0.0
    stall: float = 0.0               # seconds of prefill that are still to be done
    busy: float = 0.0
    held: int = 0                    # tokens of running conversations, what they will sample included
    epoch: int = 0                   # of the scheduled end: older ones are void
    running: list[tuple[float, int, Conversation]] = field(default_factory=list)
    waiting: deque = field(default_factory=deque)
    idle: OrderedDict = field(default_factory=OrderedDict)
    idle_tokens: int = 0
    prefilled: int = 0
    reused: int = 0

    def token_seconds(self) -> float:
        return self.costs.decode + len(self.running) * self.costs.decode_each + self.held * self.costs.decode_kv

    def advance(self, now: float) -> None:
        seconds, self.now = now - self.now, now
        if self.running:
            self.busy += seconds
            stalled = min(self.stall, seconds)
            self.stall -= stalled
            self.virtual += (seconds - stalled) / self.token_seconds()

    def admit(self) -> None:
        """Start waiting conversations while they fit; idle ones make room, the oldest first."""
        while self.waiting:
            tau = self.waiting[0]
            need = tau.tokens + tau.lengths[tau.turn]
            if self.running and self.held + need > self.costs.kv_tokens:
                return
            self.waiting.popleft()
            if self.idle.pop(tau.number, None):
                self.idle_tokens -= tau.cached
            while self.idle and self.held + need + self.idle_tokens > self.costs.kv_tokens:
                _, gone = self.idle.popitem(last=False)
                self.idle_tokens -= gone.cached
                gone.cached = 0
            self.stall += (tau.tokens - tau.cached) * self.costs.prefill
            self.prefilled += tau.tokens - tau.cached
            self.reused += tau.cached
            self.held += need
            tau.target = self.virtual + tau.lengths[tau.turn]
            heapq.heappush(self.running, (tau.target, tau.number, tau))

    def next_end(self) -> float:
        return self.now + self.stall + max(0.0, self.running[0][0] - self.virtual) * self.token_seconds()

    def finish(self) -> Conversation:
        _, _, tau = heapq.heappop(self.running)
        self.held -= tau.tokens + tau.lengths[tau.turn]
        tau.tokens += tau.lengths[tau.turn]
        tau.cached, self.idle[tau.number] = tau.tokens, tau
        self.idle_tokens += tau.cached
        return tau


def rollout(taus: list[Conversation], n_servers: int, costs: Costs) -> dict[str, float]:
    """Play all conversations; return seconds and how busy policy and executor were."""
    servers = [Server(costs) for _ in range(n_servers)]
    events: list[tuple[float, int, str, Any]] = []
    slots, queue, serial, last_call, executor_busy, now = costs.executor_slots, deque(), 0, 0.0, 0.0, 0.0

    def at(when: float, what: str, who: Any) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(events, (when, serial, what, who))

    def reschedule(server: Server) -> None:
        server.admit()
        server.epoch += 1
        if server.running:
            at(server.next_end(), "sampled", (server, server.epoch))

    def call() -> None:
        nonlocal slots, last_call, executor_busy
        while slots and queue:
            tau, seconds = queue.popleft()
            last_call = max(now, last_call + 1 / costs.executor_rate)
            slots -= 1
            executor_busy += seconds
            at(last_call + seconds, "called", tau)

    def next_call(tau: Conversation) -> None:
        if tau.calls[tau.turn]:
            queue.append((tau, tau.calls[tau.turn].pop()))
            return call()
        tau.turn += 1
        server = servers[tau.server]
        server.advance(now)
        if tau.turn == len(tau.lengths):                         # its keys and values are no longer wanted
            if server.idle.pop(tau.number, None):
                server.idle_tokens -= tau.cached
            return None
        tau.tokens += costs.feedback
        server.waiting.append(tau)
        return reschedule(server)

    for i, tau in enumerate(taus):
        tau.server = i % n_servers
        servers[tau.server].waiting.append(tau)
    for server in servers:
        reschedule(server)
    while events:
        now, _, what, who = heapq.heappop(events)
        if what == "called":
            slots += 1
            next_call(who)
            call()
        elif who[1] == who[0].epoch:
            who[0].advance(now)
            tau = who[0].finish()
            reschedule(who[0])
            next_call(tau)
    assert all(tau.turn == len(tau.lengths) for tau in taus), "a conversation did not end"
    prefilled, reused = (sum(getattr(server, name) for server in servers) for name in ("prefilled", "reused"))
    return {"seconds": now, "policy": fmean(server.busy for server in servers) / now,
            "executor": executor_busy / now / costs.executor_slots, "reuse": reused / (reused + prefilled)}


def alone(tau: Conversation, costs: Costs) -> float:
    """Seconds of a conversation if nobody else were there."""
    step = costs.decode + costs.decode_each + costs.decode_kv * (costs.prompt + sum(tau.lengths)) / 2
    return sum(tau.lengths) * step + sum(map(sum, tau.calls)) + costs.prompt * costs.prefill


def step(n: int, servers: int, trainers: int, costs: Costs, seed: int = 0) -> dict[str, Any]:
    taus = conversations(n, costs, seed)
    slowest, n_calls = max(alone(tau, costs) for tau in taus), sum(len(calls) for tau in taus for calls in tau.calls)
    played = rollout(taus, servers, costs)
    sync = costs.adapter / costs.disk * (1 + servers) + costs.load           # written once, read by every server
    update = sum(tau.tokens for tau in taus) * costs.update / trainers
    parts = {"sync": sync, "rollout": played["seconds"], "update": update}
    bound = max(parts, key=parts.get)
    if bound == "rollout":
        bound = ("executor slots" if played["executor"] > 0.8 else
                 "executor rate" if n_calls / costs.executor_rate > 0.8 * played["seconds"] else
                 "slowest trajectory" if slowest > 0.75 * played["seconds"] else "policy servers")
    return {"trajectories": n, "servers": servers, "trainers": trainers, **parts, "slowest alone": slowest,
            "policy busy": played["policy"], "executor busy": played["executor"], "prefix reused": played["reuse"],
            "step, depth 0": sync + played["seconds"] + update, "step, depth 1": max(sync + played["seconds"], update),
            "bound by": bound}


def table(title: str, rows: list[dict[str, Any]]) -> None:
    def shown(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:.2f}" if isinstance(value, float) and value < 1 else f"{value:,.0f}"
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(map(shown, row.values()))} |")


def published(costs: Costs) -> None:
    one, two = step(36, 1, 1, costs), conversations(36, costs, 0)
    sampled = sum(sum(tau.lengths) for tau in two)
    table("The published run's batch (36 trajectories, 8B, 2 A100: one samples, one trains), seconds of a step",
          [{"": "published", "seconds": 1004.0, "completion tokens a second": 132_000 / 1004},
           *({"": f"simulated, depth {depth}", "seconds": one[f"step, depth {depth}"],
              "completion tokens a second": sampled / one[f"step, depth {depth}"]} for depth in (0, 1)),
           {"": "one stream, decoding alone", "seconds": 132_000 * (costs.decode + costs.decode_each),
            "completion tokens a second": 1 / (costs.decode + costs.decode_each)}])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, metavar="FILE", help="JSON object of costs that replace the assumed ones")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="replace one of them")
    parser.add_argument("--show", action="store_true", help="print the costs and simulate nothing")
    args = parser.parse_args()
    own = json.loads(args.costs.read_text(encoding="utf-8")) if args.costs else {}
    own |= {name: float(value) for name, _, value in (word.partition("=") for word in args.set)}
    if unknown := own.keys() - {cost.name for cost in fields(Costs)}:
        parser.error(f"unknown costs: {', '.join(sorted(unknown))}; --show lists them")
    costs = replace(Costs(), **{name: type(getattr(Costs, name))(value) for name, value in own.items()})
    if args.show:
        return print("\n".join(f"{cost.name:16s} {getattr(costs, cost.name):g}" for cost in fields(costs)))
    many = replace(costs, executor_slots=max(costs.executor_slots, 4096))
    sizes = ((36, 1, 1), (36, 4, 1), (512, 1, 1), (512, 8, 1), (512, 8, 8), (8192, 8, 8), (8192, 64, 32), (8192, 128, 64))
    table(f"What bounds a step, with {costs.executor_slots} executor calls at a time", [step(*size, costs) for size in sizes])
    table("The same with 4,096 executor calls at a time", [step(*size, many) for size in sizes])
    table("Servers for each trainer: 512 trajectories, 4,096 calls", [step(512, n, 1, many) for n in (1, 2, 3, 4, 6, 8)])
    table("A provider's rate limit: 512 trajectories, 8 servers, 8 trainers",
          [{"calls a second": rate, **step(512, 8, 8, replace(many, executor_rate=rate))} for rate in (200.0, 50.0, 20.0, 5.0)])
    table("Sync: one file system for all, 8,192 trajectories, 4,096 calls",
          [step(8192, n, n // 2, many) for n in (64, 128, 256)])
    return published(costs)


if __name__ == "__main__":
    main()
