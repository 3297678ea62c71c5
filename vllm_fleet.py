"""Several vLLM servers as one sampler: a trajectory stays where its prefix is cached, and outlives its server.

Three decisions:
* All turns of a trajectory go to one server, whose prefix cache holds what came before. A new one goes to the server that
  has the fewest.
* A server that fails is left out and its trajectories go on elsewhere. A conversation's tokens are all that a turn needs, a
  seed and a position fix every draw, and all servers sample from the same weights: each one's were compared with ours.
* A server gets requests only while it has the newest adapter. One that is left out is tried again with every new adapter,
  and at once, for `patience` seconds, when no other is left.

    fleet = Fleet([VLLMSampler(url, model, tokenizer, adapters=...) for url in urls], patience=300.0)
    fleet.load_adapter(version=0)                   # then submit() as with VLLMSampler
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from policy import Sample, SampleRequest
from vllm_sampler import InFlight, VLLMSampler
from vllm_server import ServerError

AWAY_SECONDS = 5.0                                  # that a server may be away before its trajectories move
REFUSED = (400, 413, 422)                           # the request's own fault: another server would refuse it too


class Fleet:
    """Has the methods of policy.InProcessSampler. Its members should have a patience of AWAY_SECONDS, and a directory each."""

    def __init__(self, members: Sequence[VLLMSampler], patience: float) -> None:
        assert members, "a fleet needs a server"
        self.members, self.patience, self.version = list(members), patience, 0
        self._flight, self._lock, self._reviving = InFlight(), threading.Lock(), threading.Lock()
        self._live = set(range(len(members)))                    # those that have the newest adapter; under _lock
        self._home: dict[Hashable, int] = {}                     # the server of every trajectory; under _lock
        self._why: dict[int, str] = {}                           # each was left out last, as it was printed; under _lock
        self._none_since = 0.0                                   # since when no server takes part

    def submit(self, requests: Sequence[SampleRequest]) -> list[Future[Sample]]:
        """Send requests and return their futures in the same order; errors are those of VLLMSampler.submit."""
        futures = self._flight.add(requests)
        for request, future in zip(requests, futures, strict=True):
            self._send(request, future)
        return futures

    def release(self, key: Hashable) -> None:
        """Forget where a trajectory was sampled."""
        with self._lock:
            self._home.pop(key, None)

    def _send(self, request: SampleRequest, future: Future, moves: int = 0) -> None:
        """Have the trajectory's server sample a turn, or another one if that is left out."""
        with self._lock:
            home = self._home.get(request.key, 0)
            if self._live and (request.key not in self._home or home not in self._live):
                load = Counter(self._home.values())
                home = self._home[request.key] = min(self._live, key=lambda i: (load[i], i))
        try:
            [sample] = self.members[home].submit([request])
        except RuntimeError as error:                            # it was closed in the meantime
            return self._flight.answer(request.key, future, error, None)
        sample.add_done_callback(lambda done: self._on_sample(request, future, moves, home, done))

    def _on_sample(self, request: SampleRequest, future: Future, moves: int, member: int, done: Future) -> None:
        """Pass a sample on, or have another server make it. Runs in the thread that waited for the server."""
        error = done.exception()
        if isinstance(error, ServerError) and error.status not in REFUSED and not self._flight.closed.is_set():
            self._leave_out(member, error)
            if moves < len(self.members) and self._revive():
                return self._send(request, future, moves + 1)
        self._flight.answer(request.key, future, error, None if error else done.result())

    # ---- who is there ------------------------------------------------------------------------------------------------

    def _leave_out(self, i: int, error: ServerError) -> None:
        with self._lock:
            if i in self._live:
                self._live.remove(i)
                if not self._live:
                    self._none_since = time.monotonic()
            elif self._why.get(i) == str(error):
                return                                           # nothing new
            self._why[i], left = str(error), len(self._live)
        print(f"policy server {self.members[i].server.url} is left out, {left} of {len(self.members)} remain: {error}",
              file=sys.stderr, flush=True)

    def _update(self, i: int) -> ServerError | None:
        """Give member i the newest adapter; whether that works decides whether it takes part."""
        member = self.members[i]
        try:
            if member.adapter and member.version == self.version:
                member.recover(member.adapter)
            else:
                member.load_adapter(self.version)
        except ServerError as error:
            self._leave_out(i, error)
            return error
        with self._lock:
            back = i not in self._live
            self._live.add(i)
        if back:
            print(f"policy server {member.server.url} takes part again", file=sys.stderr, flush=True)
        return None

    def _revive(self) -> bool:
        """Return whether a server is left; if not, wait for one until none has been there for `patience` seconds."""
        with self._reviving:                                     # one thread waits, the others come after it
            while not self._live and not self._flight.closed.is_set() and time.monotonic() < self._none_since + self.patience:
                for i, member in enumerate(self.members):
                    if member.server.healthy():
                        self._update(i)
                self._flight.closed.wait(0 if self._live else 1.0)
        return bool(self._live)

    def load_adapter(self, version: int) -> None:
        """Hand the live weights to all servers at once; those that do not take them are left out.

        Raises RuntimeError while requests are in flight, and ServerError when no server takes them.
        """
        self._flight.require_none()
        self.version = version
        # one that was left out and does not answer would cost every step the time of its retries
        there = [i for i, member in enumerate(self.members) if i in self._live or member.server.healthy()]
        with ThreadPoolExecutor(len(self.members)) as pool:
            errors = [error for error in pool.map(self._update, there) if error]
        if not self._revive():
            raise errors[0] if errors else ServerError("no policy server answers", again=False)

    def close(self) -> None:
        """Close all members; what is still in flight fails with RuntimeError."""
        self._flight.close()
        for member in self.members:
            member.close()
