"""How the costs grow: processor seconds at doubling sizes, and the k of cost ~ size ** k by least squares.

    python bench/scaling.py            the update step, and sampling in this process, at the tiny default's shape: a minute or two

An update is scoring the reference, scoring, backward and AdamW (as in update.py); a play of sampling is whole conversations,
every turn of them, with the cache (as in sampling.py). One size is varied, the rest stays. The canvas is in canvas.py.
Each size is the best of three, in processor seconds of this process: other work on the machine has little part in them.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sampling
import side_by_side
import torch
import update

from cwrpo import UpdateConfig
from lora import disable_lora, lora_parameters

REPEATS = 3


def processor_seconds(run: Callable[[], Any]) -> float:
    run()  # what is made once is not counted
    best = float("inf")
    for _ in range(REPEATS):
        began = time.process_time()
        run()
        best = min(best, time.process_time() - began)
    return best


def of_update(trajectories: int = 8, tokens: int = 500, vocabulary: int = 1024) -> float:
    layers, *rest, _ = update.SHAPES["tiny"][0]
    update.SHAPES["scaled"] = ((layers, *rest, vocabulary), *update.SHAPES["tiny"][1:])
    model = update.make_model("scaled", "cpu", torch.float32)
    taus = update.make_trajectories(trajectories, tokens, tokens, vocabulary)
    optimizer, config = torch.optim.AdamW(lora_parameters(model), lr=1e-6), UpdateConfig(kl_coef=0.03)
    return processor_seconds(lambda: update.update(model, optimizer, taus, config, disable_lora))


def of_sampling(conversations: int = 16, turns: int = 8, new_tokens: int = 16) -> float:
    args = argparse.Namespace(conversations=conversations, turns=turns, new_tokens=new_tokens, feedback_tokens=80)
    model = update.make_model("tiny", "cpu", torch.float32).eval()
    sample, sampler = sampling.our_side(model, args, 0.8)
    try:
        return processor_seconds(lambda: sampling.play(sample, args, model.config.vocab_size))
    finally:
        sampler.close()


SCALES: dict[str, tuple[Callable[[int], float], Sequence[int]]] = {
    "update by trajectories": (lambda n: of_update(trajectories=n), (4, 8, 16, 32)),
    "update by tokens of a trajectory": (lambda n: of_update(tokens=n), (250, 500, 1000, 2000)),
    "update by vocabulary": (lambda n: of_update(vocabulary=n), (1024, 8192, 32768, 131072)),
    "sampling by conversations": (lambda n: of_sampling(conversations=n), (4, 8, 16, 32)),
    "sampling by turns": (lambda n: of_sampling(turns=n), (2, 4, 8, 16)),
    "sampling by tokens of a turn": (lambda n: of_sampling(new_tokens=n), (8, 16, 32, 64)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SCALES), default=list(SCALES), metavar="COST",
                        help=f"of {', '.join(map(repr, SCALES))} (default: all)")
    parser.add_argument("--sizes", type=int, choices=(2, 3, 4), default=4, help="the smallest so many (default %(default)s)")
    parser.add_argument("--json", type=Path, default=side_by_side.RESULTS / "scaling.json",
                        help="where to write (default %(default)s)")
    args = parser.parse_args()
    result = {}
    for name in args.only:
        measure, sizes = SCALES[name][0], SCALES[name][1][:args.sizes]
        seconds = [measure(size) for size in sizes]
        result[name] = {"sizes": list(sizes), "seconds": seconds, "exponent": side_by_side.exponent(sizes, seconds)}
        told = ", ".join(f"{size}: {took:.2f} s" for size, took in zip(sizes, seconds, strict=True))
        print(f"{name}: {told}; exponent {result[name]['exponent']:.2f}", flush=True)
    side_by_side.write(args.json, {"scales": result}, torch=torch.__version__)


if __name__ == "__main__":
    main()
