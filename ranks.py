"""Several trainer processes that act as one, by torch.distributed: `torchrun --nproc-per-node=N train.py ...`

Three decisions:
* Ranks differ in two things alone: which episodes they play and which trajectories they compute gradients of. Everything
  else (tasks, advantages, denominators, learning rate, clipping) is computed by each from the same gathered list, and so
  is the same; LoRA gradients are summed, and nothing else of the model ever travels.
* The update is shared by tokens: conversations differ in length by ten times, and a step takes as long as its slowest rank.
* Objects travel by gloo, gradients on a GPU by NCCL. Gloo sees at once that a process is gone, and waits patiently for one
  that is slow. Whatever is left of a run then ends, with a message.

Without torchrun all of this does nothing: rank 0 of 1.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T, R = TypeVar("T"), TypeVar("R")
BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
PATIENCE = timedelta(hours=6)                       # with a rank that is alive: a step's slowest executor call lies within it


class RankError(RuntimeError):
    """Another rank of the run has ended, or is not in the state that this one is in."""


def launched() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if launched() else 0


def size() -> int:
    return dist.get_world_size() if launched() else 1


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Be one of torchrun's processes inside the block; give the device of this one (cuda: one GPU a process)."""
    if not BY_TORCHRUN:
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    yield device
    dist.destroy_process_group()                    # not after an error: it would wait for the others


@contextmanager
def others_alive() -> Iterator[None]:
    """Say in our words what torch.distributed says when a process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"rank {rank()} of {size()} lost another one, whose own message says why ({str(error)[:120]}); "
                        "continue with --resume") from error


def of_all_ranks(value: Any) -> list[Any]:
    """Return the value of every rank, in rank order; [value] without torchrun."""
    if size() == 1:
        return [value]
    values = [None] * size()
    with others_alive():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def one_after_another() -> Iterator[None]:
    """Rank 0 runs the block first, then all others: the first makes a file that the others only read."""
    if rank():
        of_all_ranks(None)
    yield
    if not rank():
        of_all_ranks(None)


def shared(items: Sequence[T], work: Callable[[Sequence[T]], list[R]], workers: int) -> Callable[[], list[R]]:
    """Do this rank's share, of the first `workers` ranks, of work(items) -> a result per item.

    Returns a function that all ranks have to call, and gives all results in the order of the items. (In two parts, because
    the work may be done in another thread, and ranks must meet in one.)
    """
    if size() == 1:
        done = work(items)
        return lambda: done
    mine = work(items[rank()::workers]) if rank() < workers else []

    def gather() -> list[R]:
        parts = [iter(part) for part in of_all_ranks(mine)]
        results = [next(parts[i % workers]) for i in range(len(items))]
        assert not any(list(part) for part in parts), f"more results than the {len(items)} items"
        return results

    return gather


def balanced(items: Sequence[T], weight: Callable[[T], int]) -> list[T]:
    """Return this rank's part of the items, which sum to about the same weight for every rank; some may get none.

    Longest first, each to whoever has least so far: at most 4/3 of the best possible (Graham 1969).
    """
    parts: list[list[T]] = [[] for _ in range(size())]
    loads = [0] * size()
    for item in sorted(items, key=weight, reverse=True):
        least = loads.index(min(loads))
        parts[least].append(item)
        loads[least] += weight(item)
    return parts[rank()]


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over ranks, in place. The sum and not the mean: the denominator already counts every rank."""
    if size() == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    with others_alive():
        dist.all_reduce(flat)                       # one message for all of LoRA
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def shard(model: nn.Module, device: str) -> None:
    """Spread the frozen weights of every layer of a Qwen3 over all ranks (FSDP2), in place; one layer at a time is whole.

    What is trained stays whole everywhere: LoRA has a hundredth of the base's weights, its gradients are summed in one message
    after all micro-batches instead of one a layer and micro-batch, and a checkpoint is written by one rank as it is. So do
    embedding and head, which chunks of different number need on every rank. All ranks must take the same passes: `update`
    sees to it. Each layer goes to the device as it is sharded: none ever holds the whole model.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: they take seconds to import
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(device.partition(":")[0], (size(),))
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    whole = {weight for weight in model.parameters() if not isinstance(weight, DTensor)}
    for weight in whole:
        weight.data = weight.data.to(device)
    fully_shard(model, mesh=mesh, ignored_params=whole)              # owns nothing itself: it lets layers be fetched ahead
    register_fsdp_forward_method(model, "hidden")


def require_alike(**values: Any) -> None:
    """Raise RankError, on all ranks, where a value differs between them."""
    for name, value in values.items():
        seen = of_all_ranks(value)
        if any(other != seen[0] for other in seen):
            raise RankError(f"ranks disagree on {name}: {', '.join(map(str, seen))}")


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """Name the values of tensors in a few characters."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
