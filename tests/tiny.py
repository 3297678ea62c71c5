"""A tiny model, brute-force scoring and made-up trajectories, for the tests of cwrpo.py."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rollout import Trajectory

V = 11  # the vocabulary of the tiny model


class Tiny(nn.Module):
    """A causal two-layer network in float64 with the two methods that cwrpo.py asks of a model."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.places = nn.Embedding(V, 6), nn.Embedding(64, 6)
        self.qkv = nn.ModuleList(nn.Linear(6, 18) for _ in range(2))
        self.out = nn.Linear(6, V)
        self.lora = nn.Parameter(torch.randn(6))     # what `without_lora` switches off
        self.lora_on, self.dropout = True, nn.Dropout(dropout)
        self.calls: list[tuple[int, bool, bool]] = []        # (rows, training, lora_on) of every forward pass
        self.head_rows: list[int] = []
        self.double()

    def hidden(self, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
        self.calls.append((len(ids), self.training, self.lora_on))
        T = ids.shape[1]
        x = self.embed(ids) + self.places(torch.arange(T))
        for layer in self.qkv:
            q, k, v = layer(x).chunk(3, -1)
            scores = (q @ k.transpose(1, 2)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            x = x + self.dropout(scores.softmax(-1) @ v)
        x = x * (1 + 0.1 * self.lora) if self.lora_on else x
        return x if wanted is None else x[wanted]

    def head(self, hidden: Tensor) -> Tensor:
        self.head_rows.append(len(hidden))
        return self.out(hidden)


@contextmanager
def without_lora(model: Tiny) -> Iterator[None]:
    model.lora_on = False
    yield
    model.lora_on = True


@dataclass
class Sample:
    ids: list[int]
    logprobs: list[float]


def some_trajectories(n: int, seed: int = 0, turns: int = 2) -> list[Trajectory]:
    """Prompt, then sample and feedback in turn, ending with a sample; lengths, ids and advantages are random."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(V) for _ in range(rng.randint(low, high))]

    taus = []
    for i in range(n):
        tau = Trajectory(task=i, index=0, advantage=rng.uniform(-2, 2), stop_reason="finished", reward=0.0)
        tau.add_prompt(ids(2, 6))
        for turn in range(rng.randint(1, turns)):
            if turn:
                tau.add_feedback(ids(1, 4))
            sampled = ids(1, 5)
            tau.add_sample(Sample(sampled, [rng.uniform(-3, -1) for _ in sampled]))
        taus.append(tau)
    return taus


def full_logprobs(model: Tiny, ids: Tensor, mask: Tensor, temperature: float = 1.0, vocab_limit: int = V) -> Tensor:
    """The (B, T, V) way, token by token."""
    logprobs = (model.head(model.hidden(ids))[..., :vocab_limit] / temperature).log_softmax(-1)
    result = torch.zeros(ids.shape, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        result[b, t] = logprobs[b, t - 1, ids[b, t]]
    return result
