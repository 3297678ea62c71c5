"""What a person at a terminal sees: one progress line, and the end of a run.

Progress goes to stderr, results to stdout, so that a redirected table is a table. On a terminal the line is a bar of at
most 100 columns; elsewhere (a log file, CI) it becomes a plain line every few seconds, the first and the last among them.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from typing import Any

from tqdm import tqdm

import stats

COLUMNS, EVERY = 100, 5.0  # of a line; seconds between two plain lines


class Progress:
    """How far something is. `quiet`: nothing is shown; `plain=False`: nothing where stderr is no terminal."""

    def __init__(self, label: str, total: int, start: int = 0, quiet: bool = False, plain: bool = True) -> None:
        self.label, self.total, self.done = label, total, start
        self.plain = plain and not quiet and not sys.stderr.isatty()
        self.began = time.monotonic()
        self.shown: float | None = None  # when the newest plain line was printed
        self.bar = tqdm(total=total, initial=start, desc=label, disable=quiet or None,  # None: where there is no terminal
                        ncols=min(COLUMNS, shutil.get_terminal_size((COLUMNS, 1)).columns), nrows=20, leave=False,
                        bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}")

    def advance(self, n: int = 1, text: str = "") -> None:
        """Show that n more are done, with what can be said about them."""
        self.done += n
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(n)
        now = time.monotonic()
        if self.plain and (self.shown is None or now - self.shown >= EVERY or self.done >= self.total):
            self.shown = now
            line = f"{self.label} {self.done}/{self.total} {clock(now - self.began)} {text}"
            print(line.rstrip()[:COLUMNS], file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clock(seconds: float) -> str:
    """3725 -> 1:02:05, 65 -> 1:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def wrapped(label: str, text: str, width: int = COLUMNS) -> str:
    """The text behind its label, in as many lines as it needs, indented."""
    return "\n".join(textwrap.wrap(f"{label} {text}", width, subsequent_indent="    "))


def summary_text(summary: dict[str, Any], before: dict[str, Any], after_rows: list[dict[str, Any]], simulated: bool) -> str:
    """The end of a training run: held-out tasks before and after, what to compare them with, what was learnt.

    summary: as in summary.json; before: as in before.json; after_rows: stats.row's.
    """
    note = " (simulated executor: a simulation, no LLM)" if simulated else ""
    lines = [f"Held-out tasks before training{note}", stats.table(before["rows"]), "",
             f"Held-out tasks after training{note}", stats.table(after_rows), ""]
    for name in ("accuracy_random", "accuracy_warmstart", "accuracy_trained", "accuracy_best_fixed", "accuracy_best_reachable"):
        lines.append(f"{name:28s} {'not computed' if summary[name] is None else format(summary[name], '.3f')}")
    lines += [f"{'edits that parse at the start':28s} {before['parse_rate']:.3f}",
              f"{'reward, first 10 -> last 10':28s} {summary['reward_first10']:.3f} -> {summary['reward_last10']:.3f}",
              f"{'R_div = 1, last 10 steps':28s} {summary['feasible_rate_last10']:.3f}", "",
              workflows_text(summary["commonest_workflow"]), "",
              f"{summary['trajectories']} trajectories, {summary['tokens_per_second']:.0f} tokens/s, "
              f"{clock(summary['wall_seconds'])} in all"]
    return "\n".join(lines)


def workflows_text(by_kind: dict[str, str]) -> str:
    """The commonest workflow of every kind of task."""
    return "\n".join(wrapped(f"commonest workflow for {kind}:", text or "(empty)") for kind, text in by_kind.items())
