"""Grade many math answers from many threads and print the throughput.  python bench/math_grading.py [-n 10000]

One answer in a thousand is made to be slow (9^{9^{9^9}}): its grading ends by the worker's clock, as an error and no verdict,
and holds up nobody else's for longer than that.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from rewards import grade
from tasks import Task

SLOW = "9^{9^{9^9}}"


def case(i: int) -> tuple[str, str, bool | None]:
    """(gold, answer, right); None: no verdict is expected."""
    if i % 1000 == 999:
        return r"1+\sqrt{2}", SLOW, None
    return (str(i), rf"\boxed{{{i:,}}}", True) if i % 2 else (rf"{i}+\sqrt{{2}}", rf"\sqrt{{2}}+{i + i % 4}", i % 4 == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=10_000, help="gradings (default %(default)s)")
    parser.add_argument("--threads", type=int, default=16, help="default %(default)s")
    args = parser.parse_args()
    cases = [case(i) for i in range(args.n)]
    started = time.monotonic()
    with ThreadPoolExecutor(args.threads) as pool:
        grades = list(pool.map(lambda c: grade(Task("1", "math", "math", "?", (c[0],)), c[1]), cases))
    seconds = time.monotonic() - started
    wrong = sum(g.score != c[2] for g, c in zip(grades, cases, strict=True) if c[2] is not None)
    stopped = sum(bool(g.error) for g in grades)
    print(f"{args.n} gradings from {args.threads} threads in {seconds:.1f} s: {args.n / seconds:.0f} a second; {wrong} wrong, "
          f"{stopped} stopped by the clock")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
