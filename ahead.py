"""The trajectories of one step after the other; with --async-depth 1, those of the next are sampled while this one trains.

Three decisions:
* Step k is sampled by version max(0, k - depth) of the adapter: at depth 0 by the weights that it then trains, at depth 1 by
  those that step k - 1 began with. Nothing else depends on who was faster, so a run can still be repeated bit for bit.
* At depth 1 the sampler has LoRA weights of its own and shares the frozen ones: the live ones move while it samples. A
  checkpoint holds both, so that a resumed run samples its first step with the weights that the whole run would have used.
* The loss is told: old log-probs are the trainer's, and the truncated weight min(trainer / sampler, --tis-cap) corrects for
  what the sampler drew differently, a step's learning included.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import nn

from lora import lora_state_dict
from rollout import Trajectory
from world import Sampler

Gather = Callable[[], list[Trajectory]]


class Rollouts:
    """play(step) samples this rank's share; what it returns is called, by the main thread of every rank, for the whole step.

    sampled: the model that the sampler reads; at depth 0 the trained model itself.
    """

    def __init__(self, model: nn.Module, sampled: nn.Module, sampler: Sampler, play: Callable[[int], Gather],
                 depth: int) -> None:
        assert (sampled is model) == (depth == 0), f"depth {depth}, but {sampled is model=}"
        self.model, self.sampled, self.sampler, self.play, self.depth = model, sampled, sampler, play, depth
        self.seconds: dict[str, float] = {}                      # of the step that was taken last: sync and rollout
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._next: Future[tuple[Gather, dict[str, float]]] | None = None

    def take(self, step: int) -> list[Trajectory]:
        """Return the trajectories of a step, waiting for what is sampled already or sampling them now."""
        gather, self.seconds = self._next.result() if self._next else self._sample(step)
        self._next = None
        return gather()

    def prefetch(self, step: int) -> None:
        """At depth 1, begin to sample this step with the weights as they are now; call it before they move."""
        if self.depth:
            self._copy()
            self._next = self._thread.submit(self._sample, step)

    def sync(self, version: int) -> None:
        """Hand the live weights to the sampler, as for an evaluation."""
        self._copy()
        self.sampler.load_adapter(version)

    def _copy(self) -> None:
        if self.depth:
            self.sampled.load_state_dict(lora_state_dict(self.model), strict=False)

    def _sample(self, step: int) -> tuple[Gather, dict[str, float]]:
        began = time.monotonic()
        self.sampler.load_adapter(version=max(0, step - self.depth))
        synced = time.monotonic()
        gather = self.play(step)
        return gather, {"sync": synced - began, "rollout": time.monotonic() - synced}
