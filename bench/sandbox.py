"""What isolation costs, and whether anything is left behind.

    python bench/sandbox.py                    medians of a trivial program, against a plain subprocess; one and many threads
    python bench/sandbox.py --programs 2000    the same with 2,000 programs, a part of them hostile, through the 32 threads

Prints milliseconds and ratios, and ends with exit code 1 if a descriptor, thread, process, zombie or file was left behind.
Times mean something only on an idle machine.
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import sandbox

THREADS = 32
DAEMON = "import os\nif os.fork() == 0:\n    os.setsid(); os.execv('/bin/sleep', ['sleep', '99'])"
PROGRAMS = ["pass", "print(6 * 7)", "import os\nos._exit(3)", DAEMON, "open('f', 'w').write('x' * 99)", "raise SystemExit(1)",
            "import os, signal; os.kill(os.getpid(), 9)", "import threading\nthreading.Thread(target=print).start()"]


def milliseconds(function: Callable[[], object], repeat: int) -> float:
    """Median wall-clock time of a call."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def left_behind() -> dict[str, int]:
    """What a leak would add to."""
    mine = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            mine += f"PPid:\t{os.getpid()}\n" in status.read_text()
        except OSError:
            continue  # it ended while we looked
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(), "children": mine,
            "files": len(list(Path(tempfile.gettempdir()).glob("sandbox-*")))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200, help="through 32 threads (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=41, help="calls a median is taken of (default %(default)s)")
    args = parser.parse_args()
    sandbox.run_program("pass")  # the probe
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, layers {', '.join(sandbox._layers())}")
    plain = [os.path.realpath(sys.executable), "-s", "-S", "-B", "-X", "utf8", "-c", "pass"]
    base = milliseconds(lambda: subprocess.run(plain, env={}, check=True), args.repeat)
    program = milliseconds(lambda: sandbox.run_program("pass"), args.repeat)
    tests = milliseconds(lambda: sandbox.run_tests("def f(x): return x", "assert f(1) == 1", "f"), args.repeat)
    print(f"median of one at a time: plain subprocess {base:.1f} ms, run_program {program:.1f} ms ({program / base:.1f} times), "
          f"run_tests {tests:.1f} ms ({tests / base:.1f} times, two processes)")
    before = left_behind()
    for threads in (1, os.cpu_count() or 1, THREADS):
        number = args.programs if threads == THREADS else min(args.programs, 200)
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(sandbox.run_program, [PROGRAMS[n % len(PROGRAMS)] for n in range(number)]))
        seconds = time.perf_counter() - began
        print(f"{number} programs through {threads} threads: {number / seconds:.1f} a second")
    after = left_behind()
    print(f"before {before}\nafter  {after}")
    sys.exit(before != after)


if __name__ == "__main__":
    main()
