"""The rollout's schedule: trajectories that go on by themselves against trajectories that wait for each other every turn.

    python bench/rollout.py                       36 trajectories of 8 to 20 turns, heavy-tailed executor, five pairs
    python bench/rollout.py --trajectories 256 --http --sim-latency 1     the executor behind HTTP, in a process of its own

The policy is a stand-in that answers after --policy-latency whoever else asks, as a server does; the executor is the
simulated one, with waiting times drawn from a log-normal distribution around --sim-latency. Both sides play the same edits
and wait for the same calls. `critical path` is the bound: what the slowest trajectory waits for, were it alone and all else
free. Also printed: how much of a core this process used, and with --http over how many connections the calls went.
"""
from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import side_by_side

from backends import OpenAIBackend, Reply, Request, SimulatedBackend
from canvas import Canvas, CanvasConfig
from operators import library
from rollout import Job, RolloutConfig, SampleRequest, Trajectory, rollout
from tasks import Task

OPERATORS = ("Plan", "Decompose", "Custom", "AnswerGenerate", "Review", "Verify", "Revise", "Format")  # none runs a program
END = -1


class Policy:
    """Sampler and tokenizer of the stand-in: an id is a number of a text, and a conversation starts with its task's."""

    end_id = END

    def __init__(self, edits: dict[str, list[str]], latency: float) -> None:
        self.edits, self.latency = list(edits.values()), latency
        self.number = {problem: i for i, problem in enumerate(edits)}
        self.due: list[tuple[float, int, Future, SampleRequest]] = []
        self.changed = threading.Condition()
        threading.Thread(target=self.answer, daemon=True).start()

    def prompt_ids(self, system: str, user: str) -> list[int]:
        return [self.number[user]]

    def feedback_ids(self, text: str, ended: bool) -> list[int]:
        return [0]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.edits[i // 100][i % 100] for i in ids if i != END)

    def submit(self, requests: Sequence[SampleRequest]) -> list[Future]:
        futures, when = [Future() for _ in requests], time.monotonic() + self.latency
        with self.changed:
            for future, request in zip(futures, requests, strict=True):
                heapq.heappush(self.due, (when, id(future), future, request))
            self.changed.notify()
        return futures

    def release(self, key: object) -> None:
        """Nothing is kept."""

    def answer(self) -> None:
        while True:
            with self.changed:
                while not self.due or (left := self.due[0][0] - time.monotonic()) > 0:
                    self.changed.wait(left if self.due else None)
                _, _, future, request = heapq.heappop(self.due)
            text = 100 * request.tokens[0] + request.tokens.count(END)
            future.set_result(SimpleNamespace(ids=[text, END], logprobs=[-1.0, -1.0], version=0))


class Noted(SimulatedBackend):
    """The simulated executor, which notes for every task how long its calls wait in all."""

    def __init__(self, latency: float, url: str = "", concurrency: int = 32) -> None:
        super().__init__(0, latency)
        self.waited: Counter[str] = Counter()
        self.http = OpenAIBackend([url], "stand-in", concurrency=concurrency) if url else None

    def complete(self, request: Request) -> Reply:
        seconds = self.wait(request)
        self.waited[request.task.problem] += seconds  # the calls of a task come one after the other
        if self.http is None:
            return super().complete(request)
        self.http.complete(Request(request.task, "", "", f"{seconds}", {}))
        return SimulatedBackend(0).complete(request)


def make_edits(trajectories: int, turns: int) -> dict[str, list[str]]:
    """The edits of every trajectory, by its problem: a call for each but finish, one after the other."""
    rng, edits = random.Random(0), {}
    for i in range(trajectories):
        n = turns - (turns * 6 // 10) * i // max(trajectories - 1, 1)
        names = ["Custom", *(rng.choice(OPERATORS) for _ in range(n - 2))]  # with a solution to read, none fails without a call
        texts = [f"<action>add</action><operator>{name}</operator>" for name in names]
        edits[f"What is {i} + 1?"] = [*texts, "<action>finish</action>"]
    return edits


def play(edits: dict[str, list[str]], args: argparse.Namespace, lockstep: bool, url: str = "") -> dict[str, float]:
    """Play all trajectories; makespan, critical path and processor time of this process, in seconds."""
    backend, policy, n = Noted(args.sim_latency, url, len(edits)), Policy(edits, args.policy_latency), len(edits)
    operators, config = library(), CanvasConfig(max_turns=args.turns)
    jobs = [Job(Task(str(i), "toy_math", "math", problem, (str(i + 1),)), 0, 0) for i, problem in enumerate(edits)]

    def score(tau: Trajectory) -> None:
        tau.reward = 0.0

    began, used = time.monotonic(), time.process_time()
    taus = rollout(jobs, policy, policy, lambda task: Canvas(task, operators, backend, config), score,
                   RolloutConfig(lockstep=lockstep, workers=n))
    makespan, used = time.monotonic() - began, time.process_time() - used
    assert all(tau.stop_reason == "finished" for tau in taus), Counter(f"{tau.stop_reason} {tau.error}" for tau in taus)
    alone = [backend.waited[tau.task.problem] + args.policy_latency * len(tau.turns) for tau in taus]
    return {"makespan": makespan, "critical_path": max(alone), "processor": used,
            "calls": sum(tau.canvas.usage.calls for tau in taus)}


async def serve() -> None:
    """An executor that waits as many seconds as the prompt says; GET tells how many connections were opened."""
    opened = 0

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        while head := (await reader.readline()).split():
            size = 0
            while (line := await reader.readline()) not in (b"\r\n", b""):
                size = int(line.split()[1]) if line.lower().startswith(b"content-length") else size
            body: Any = opened - 1
            if head[0] == b"POST":
                await asyncio.sleep(float(json.loads(await reader.readexactly(size))["messages"][0]["content"]))
                body = {"choices": [{"message": {"content": "It is done."}}]}
            content = json.dumps(body).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = side_by_side.make_parser(__doc__, "rollout")
    parser.add_argument("--trajectories", type=int, default=36, help="default %(default)s")
    parser.add_argument("--turns", type=int, default=20, help="of the longest (default %(default)s)")
    parser.add_argument("--sim-latency", type=float, default=0.1, help="median seconds of a call (default %(default)s)")
    parser.add_argument("--policy-latency", type=float, default=0.05, help="seconds of a turn (default %(default)s)")
    parser.add_argument("--http", action="store_true", help="put the executor behind HTTP")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return asyncio.run(serve())
    edits, played = make_edits(args.trajectories, args.turns), {"ours": [], "lock-step": []}
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True) if args.http else None
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1" if server else ""

    def side(name: str) -> float:
        played[name].append(play(edits, args, name == "lock-step", url))
        return played[name][-1]["makespan"]

    try:
        pairs = side_by_side.run_pairs({name: lambda name=name: side(name) for name in played}, args.pairs)
        if server:
            with urllib.request.urlopen(url) as answer:
                connections = json.load(answer)
    finally:
        if server:
            server.kill()
    path, cores = ([step[name] / step[by] for step in played["ours"][1:]] for name, by in
                   (("makespan", "critical_path"), ("processor", "makespan")))
    first = played["ours"][0]
    result = {"trajectories": args.trajectories, **side_by_side.compare(pairs, "lock-step"), "bound": first["critical_path"],
              "over_critical_path": median(path), "over_critical_path_range": [min(path), max(path)],
              "cores": median(cores), "calls": first["calls"]}
    print(f"{args.trajectories} trajectories, {result['calls']} calls: {result['seconds']['ours']:.2f} s, critical path "
          f"{result['bound']:.2f} s: {result['over_critical_path']:.3f} of it ({min(path):.3f}-{max(path):.3f}); lock-step takes "
          f"{side_by_side.told(result)} times as long; this process used {result['cores']:.2f} of a core")
    if server:
        result |= {"connections": connections}
        print(f"{(args.pairs + 1) * 2} rollouts of {result['calls']} calls went over {connections} connections")
    side_by_side.write(args.json, result)


if __name__ == "__main__":
    main()
