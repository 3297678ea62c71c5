"""SIGKILL at random moments of a training run: is everything that it wrote readable, and nothing lost?

    python bench/kill.py --times 20     a small run, killed and resumed until it is done; then compared with one left alone

After every kill all files are read and processes counted; in the end weights and logs must equal the whole run's bit for
bit. Prints a line for each kill and ends with exit code 1 at the first thing that is wrong. It takes some minutes.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import warmstart
from rundir import RunDir

ROOT = Path(__file__).parent.parent
SMALL = ["--tasks-per-source", "1", "--rollouts-per-task", "2", "--eval-tasks", "2", "--max-turns", "3", "--no-baselines",
         "--save-every", "1", "--max-context", "1200"]


def start(*words: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, words)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def orphans() -> list[str]:
    """Command lines of what outlives a run: as subreaper, this process becomes the parent of all of it."""
    deadline, found = time.monotonic() + 10, ["unknown"]
    while found and time.monotonic() < deadline:
        found = []
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if f"PPid:\t{os.getpid()}\n" in status.read_text():
                    found.append(status.with_name("cmdline").read_text())
                    os.waitpid(int(status.parent.name), os.WNOHANG)
            except OSError:
                continue  # it ended while we looked
        time.sleep(0.05)
    return found


def read_all(run: Path) -> None:
    """Read every file as its reader would; raises at the first that is broken."""
    for name in ("args.json", "before.json", "summary.json"):
        if (run / name).exists():
            json.loads((run / name).read_text())
    for log in ("metrics.jsonl", "trajectories.jsonl"):
        if (run / log).exists():
            lines = (run / log).read_text().split("\n")
            for line in lines[:-1]:  # only what follows the last newline may be torn
                json.loads(line)
    for checkpoint in (run / "checkpoints").glob("step_??????"):
        load_file(checkpoint / "adapter_model.safetensors")
        json.loads((checkpoint / "adapter_config.json").read_text())
        torch.load(checkpoint / "state.pt", weights_only=True)
    if latest := RunDir(run).latest():
        assert latest.is_dir(), f"{latest} is pointed to and does not exist"


def same(one: Path, other: Path, steps: int) -> bool:
    """Whether two runs ended with the same weights and logs; only timings may differ."""
    name = f"checkpoints/step_{steps:06d}/adapter_model.safetensors"
    logs = [[{key: value for key, value in row.items() if "seconds" not in key and "per_second" not in key}
             for row in RunDir(run).read("metrics.jsonl")] for run in (one, other)]
    first, second = load_file(one / name), load_file(other / name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first) and logs[0] == logs[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    with tempfile.TemporaryDirectory(prefix="kill-") as directory:
        model, whole, killed = (Path(directory, name) for name in ("tiny", "whole", "killed"))
        warmstart.build(model, episodes=30, progress=False)
        steps = 2 * args.times  # most kills come after one more step; some then fall between its log and its checkpoint
        words = ["--model", model, "--steps", steps, *SMALL]
        began = time.monotonic()
        assert start("--out", whole, *words).wait() == 0
        took = time.monotonic() - began
        print(f"a run of {steps} steps left alone: {took:.1f} s", flush=True)
        for kill in range(args.times):
            process = start("--out", killed, *(["--resume"] if (killed / "args.json").exists() else words))
            before, began = len(RunDir(killed).read("metrics.jsonl")), time.monotonic()
            if kill % 4:  # not during start-up: a step later, somewhere in the next one or two
                while len(RunDir(killed).read("metrics.jsonl")) <= before and process.poll() is None:
                    time.sleep(0.01)
            time.sleep(rng.uniform(0, 2 * took / (steps + 10)) if kill % 4 else rng.uniform(0, 10))
            process.send_signal(signal.SIGKILL)
            message = process.communicate()[1]
            assert process.returncode in (0, -signal.SIGKILL), message
            assert not (left := orphans()), f"still running: {left}"
            read_all(killed)
            logged = [row["step"] for row in RunDir(killed).read("metrics.jsonl")]
            print(f"kill {kill + 1} after {time.monotonic() - began:.2f} s: {len(logged)} steps logged, checkpoint "
                  f"{getattr(RunDir(killed).latest(), 'name', None)}", flush=True)
        assert start("--out", killed, "--resume").wait() == 0
        if not same(whole, killed, steps):
            sys.exit("the killed run ended elsewhere than the one left alone")
        print(f"{args.times} kills: every file readable, no process left, the same weights and logs in the end")


if __name__ == "__main__":
    main()
