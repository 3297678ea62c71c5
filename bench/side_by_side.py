"""What the comparisons in this directory share: interleaved pairs, medians with their spread, growth exponents, json files.

The sides of a pair run one after the other, in turns first and second, and a first pair is not counted: what else a machine
does then meets both. A ratio is the median over pairs of (seconds of the other side) / (seconds of ours).
"""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


def make_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """A parser with the flags that all comparisons have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="counted ones (default %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="where to write (default %(default)s)")
    return parser


def run_pairs(sides: dict[str, Callable[[], Any]], pairs: int) -> list[dict[str, float]]:
    """Seconds of every side in every counted pair; a side that returns a number has measured itself."""
    measured = []
    for number in range(pairs + 1):
        seconds = {}
        for name in list(sides) if number % 2 else reversed(sides):
            began = time.perf_counter()
            own = sides[name]()
            seconds[name] = own if isinstance(own, float) else time.perf_counter() - began
        measured.append(seconds)
    return measured[1:]


def compare(pairs: Sequence[dict[str, float]], other: str, ours: str = "ours") -> dict[str, Any]:
    """How many times as long the other side takes: median and range over pairs, beside each side's median seconds."""
    ratios = sorted(pair[other] / pair[ours] for pair in pairs)
    return {"ratio": median(ratios), "ratio_range": [ratios[0], ratios[-1]],
            "seconds": {side: median(pair[side] for pair in pairs) for side in (other, ours)}}


def told(result: dict[str, Any]) -> str:
    low, high = result["ratio_range"]
    return f"{result['ratio']:.2f} ({low:.2f}-{high:.2f})"


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The k of cost ~ size ** k: slope of the least squares line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def write(path: Path, result: dict[str, Any], **versions: str) -> None:
    """Write the result with what it depends on."""
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS"),
               "machine": platform.machine(), "load": os.getloadavg()[0], **versions}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **machine, **result}, indent=1) + "\n")
    print(f"written to {path}")
