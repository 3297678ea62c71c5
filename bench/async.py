"""--async-depth 0 beside 1, over seeds: seconds a step and what is learnt from as many trajectories.

    python bench/async.py --model runs/tiny --latency 0.3 --steps 20 --seeds 0 1 2

The executor is the simulated one with latency (a simulation; heavy-tailed, median --latency seconds a call). For each seed
the two depths are trained one after the other, from the same policy and with all other flags the same. A row a run:
median seconds of a step after the first, and of its parts; reward and R_div = 1 in the first and last quarter of the steps;
sampler_kl. Then the ratio of seconds and the difference of the last rewards, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median, stdev

ROOT = Path(__file__).parent.parent
PARTS = ("step", "rollout", "update")


def train(out: Path, seed: int, depth: int, args: argparse.Namespace) -> dict[str, float]:
    """Run train.py and return the row."""
    words = ["--model", args.model, "--out", out, "--seed", seed, "--async-depth", depth, "--sim-latency", args.latency,
             "--steps", args.steps, "--tasks-per-source", args.tasks_per_source, "--rollouts-per-task", args.rollouts_per_task,
             "--eval-tasks", 1, "--no-baselines", "--quiet"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    quarter = max(1, len(log) // 4)
    row = {f"s/{part}": median(step[f"seconds_{part}"] for step in log[1:]) for part in PARTS}
    for name in ("reward", "feasible_rate"):
        row[f"{name} first"] = fmean(step[name] for step in log[:quarter])
        row[f"{name} last"] = fmean(step[name] for step in log[-quarter:])
    return row | {"sampler_kl": fmean(step["sampler_kl"] for step in log)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as of train.py (default %(default)s)")
    parser.add_argument("--latency", type=float, default=0.3, help="median seconds of an executor call (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--tasks-per-source", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--rollouts-per-task", type=int, default=6, help="(default %(default)s)")
    args = parser.parse_args()
    rows: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as directory:
        for i, seed in enumerate(args.seeds):
            for depth in ((0, 1), (1, 0))[i % 2]:             # who comes first alternates: machines have moods
                rows[depth].append(row := train(Path(directory) / f"{seed}-{depth}", seed, depth, args))
                if i == 0 and len(rows[0]) + len(rows[1]) == 1:
                    print("| seed | depth | " + " | ".join(row) + " |\n" + "|---" * (len(row) + 2) + "|")
                print(f"| {seed} | {depth} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |", flush=True)
    pairs = list(zip(rows[0], rows[1], strict=True))
    print(f"\nseconds a step, depth 0 / depth 1, median over seeds: {median(a['s/step'] / b['s/step'] for a, b in pairs):.2f}")
    gained = [b["reward last"] - a["reward last"] for a, b in pairs]
    spread = f" (standard deviation {stdev(gained):.3f})" if len(gained) > 1 else ""
    print(f"reward of the last quarter, depth 1 - depth 0, mean over {len(gained)} seeds: {fmean(gained):+.3f}{spread}")


if __name__ == "__main__":
    main()
