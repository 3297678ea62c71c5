"""Evaluation records to numbers: tables with intervals, paired tests, comparisons of two evaluations.

A record is one episode (or one answer of a baseline) as eval.py writes it. Everything here is computed from records, so that
an evaluation that was resumed, or read back from its file, gives the same numbers. Three rules:
* A task is the unit: its runs are averaged first, because they are not independent. Intervals and tests are over tasks.
* Failures of ours (server, sandbox, grader) count as score 0 in every mean, and are shown apart.
* What is not known (a price) stays unknown: None in JSON, "unknown" in tables, never 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import hacks

Record = dict[str, Any]
RESAMPLES = 10_000
METRIC = {"math": "accuracy", "choice": "accuracy", "qa": "F1", "code": "pass@1"}  # what `score` is, by kind
IN_DISTRIBUTION = ("gsm8k", "math", "hotpotqa", "squad_v2", "mbpp", "humaneval")  # the sources that the paper trains on


def by_task(records: Sequence[Record], value: Callable[[Record], float]) -> dict[str, float]:
    """{task id: mean of its runs}."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["task_id"], []).append(value(record))
    return {task: fmean(values) for task, values in found.items()}


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Means of RESAMPLES bootstrap samples of the tasks."""
    rng, sums = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, 500):  # in blocks: thousands of tasks times ten thousand samples would not fit
        sums.append(values[rng.integers(0, len(values), (500, len(values)))].mean(1))
    return np.concatenate(sums)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): 95% percentile bootstrap over tasks; `values` has one number a task."""
    low, high = np.quantile(_resampled(np.asarray(values, float), seed), [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


# ------------------------------------------------------------------------------------------------------- paired tests
def mcnemar(left: Sequence[float], right: Sequence[float]) -> float:
    """Exact two-sided p of McNemar's test: of the tasks that only one side solves, each side's share is a coin's."""
    only_left = sum(a > b for a, b in zip(left, right, strict=True))
    only_right = sum(a < b for a, b in zip(left, right, strict=True))
    n, k = only_left + only_right, min(only_left, only_right)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def paired_bootstrap(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p: twice the share of bootstrap means (over tasks) on the other side of zero. At least 1/RESAMPLES, and
    2/2^n: n tasks that all differ in one direction are no more surprising than n heads of a coin."""
    means = _resampled(np.asarray(differences, float), seed)
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    return min(1.0, max(2 * tail, 1 / RESAMPLES, 2 / 2 ** min(len(differences), 60)))


def compare(left: Sequence[Record], right: Sequence[Record]) -> dict[str, Any]:
    """Compare the scores of two methods on the tasks that both have. McNemar's test where every task has one run a side
    and every score is 0 or 1, else the paired bootstrap over tasks."""
    a, b = by_task(left, _score), by_task(right, _score)
    shared = [task for task in a if task in b]
    if not shared:
        return {"tasks": 0}
    left_scores, right_scores = [a[task] for task in shared], [b[task] for task in shared]
    differences = [x - y for x, y in zip(left_scores, right_scores, strict=True)]
    once = all(sum(record["task_id"] in b for record in side) <= len(shared) for side in (left, right))
    binary = once and {*left_scores, *right_scores} <= {0.0, 1.0}
    difference, low, high = interval(differences)
    return {"tasks": len(shared), "left": fmean(left_scores), "right": fmean(right_scores), "difference": difference,
            "low": low, "high": high, "test": "McNemar" if binary else "paired bootstrap",
            "p": mcnemar(left_scores, right_scores) if binary else paired_bootstrap(differences)}


# -------------------------------------------------------------------------------------------------------------- tables
def _score(record: Record) -> float:
    return 0.0 if record["dropped"] else float(record["score"])


def parts(records: Sequence[Record], iid: Sequence[str]) -> list[tuple[str, list[Record]]]:
    """The rows of a table: each source, kind and group (IID: its source was trained on) that is there, then all."""
    named: dict[str, list[Record]] = {}
    for title, name in (("", lambda r: r["source"]), ("kind ", lambda r: r["kind"]),
                        ("", lambda r: "IID" if r["source"] in iid else "OOD")):
        group: dict[str, list[Record]] = {}
        for record in records:
            group.setdefault(title + name(record), []).append(record)
        named |= dict(sorted(group.items()))
    return [*named.items(), ("all", list(records))]


def _mean(records: Sequence[Record], value: Callable[[Record], float | None]) -> float | None:
    values = [value(record) for record in records]
    return None if None in values else fmean(values)


def row(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """One row: score and EM with intervals, means of what an episode took, shares of what went wrong."""
    metrics = {METRIC[record["kind"]] for record in records}
    score, low, high = interval(list(by_task(records, _score).values()))
    em, em_low, em_high = interval(list(by_task(records, lambda r: 0.0 if r["dropped"] else float(r["em"])).values()))
    usages = [record["usage"] for record in records]
    return {
        "source": name, "tasks": len({record["task_id"] for record in records}),
        "metric": metrics.pop() if len(metrics) == 1 else "mixed",
        "score": score, "low": low, "high": high, "em": em, "em_low": em_low, "em_high": em_high,
        "f1": fmean(0.0 if r["dropped"] else float(r["f1"]) for r in records),
        "feasible_rate": fmean(bool(r["parts"]) and r["parts"]["diversity"] == 1 for r in records),
        "turns": fmean(len(r["turns"]) for r in records), "operators": fmean(r["operators"] for r in records),
        "operator_types": fmean(r["operator_types"] for r in records),
        "policy_tokens": fmean(r["n_policy_tokens"] for r in records),
        "executor_tokens": fmean(u["prompt_tokens"] + u["completion_tokens"] for u in usages),
        "executor_calls": fmean(u["calls"] + u["cached"] for u in usages), "seconds": fmean(r["seconds"] for r in records),
        "hacks": hacks.rates([(r.get("hacks", {}), r["operators"]) for r in records]),
        "dollars": _mean(records, lambda r: r["dollars"]),
        "unfinished": fmean(r["stop_reason"] in ("max_turns", "max_tokens") for r in records),
        "failed": fmean(bool(r["dropped"]) for r in records),
        "grader_errors": sum(r["dropped"] == "grader_error" for r in records),
    }


def rows(records: Sequence[Record], iid: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every part of the records; the last is for all of them."""
    return [row(name, part) for name, part in parts(records, iid)]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for the terminal; the first row is the head."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def table(found: Sequence[dict[str, Any]]) -> str:
    """Rows as two Markdown tables that fit a terminal: how good, and what an episode took.

    score: F1 for questions, accuracy for math and choice, pass@1 for code; failures are zeros in it.
    """
    good = (("", "tasks", "metric", "score (95%)", "EM (95%)", "unfinished", "failed", "grader errors"), *((
        r["source"], str(r["tasks"]), r["metric"], f"{r['score']:.3f} ({r['low']:.3f}-{r['high']:.3f})",
        f"{r['em']:.3f} ({r['em_low']:.3f}-{r['em_high']:.3f})", f"{r['unfinished']:.1%}", f"{r['failed']:.1%}",
        str(r["grader_errors"])) for r in found))
    head = ("", "R_div = 1", "turns", "operators", "types", "policy tokens", "executor tokens", "calls", "seconds", "dollars")
    took = (head, *((
        r["source"], f"{r['feasible_rate']:.2f}", f"{r['turns']:.1f}", f"{r['operators']:.1f}", f"{r['operator_types']:.1f}",
        f"{r['policy_tokens']:.0f}", f"{r['executor_tokens']:.0f}", f"{r['executor_calls']:.1f}", f"{r['seconds']:.2f}",
        "unknown" if r["dollars"] is None else f"{r['dollars']:.5f}") for r in found))
    return f"{markdown(good)}\n\n{markdown(took)}"


def hack_table(found: Sequence[dict[str, Any]]) -> str:
    """How much of R_div is collected for nothing: the share of operators that are no_op, and of workflows with the others."""
    return markdown([("", *hacks.HACKS), *((r["source"], *(f"{r['hacks'][name]:.2f}" for name in hacks.HACKS)) for r in found)])


def comparison(left: Sequence[Record], right: Sequence[Record], iid: Sequence[str]) -> list[dict[str, Any]]:
    """`compare` for every part that both sides have."""
    theirs = dict(parts(right, iid))
    found = [{"source": name, **compare(part, theirs[name])} for name, part in parts(left, iid) if name in theirs]
    return [r for r in found if r["tasks"]]


def comparison_table(found: Sequence[dict[str, Any]], left: str, right: str) -> str:
    head = ("", "tasks", left, right, "difference (95%)", "test", "p")
    return markdown([head, *((r["source"], str(r["tasks"]), f"{r['left']:.3f}", f"{r['right']:.3f}",
                              f"{r['difference']:+.3f} ({r['low']:+.3f} to {r['high']:+.3f})", r["test"], f"{r['p']:.4f}")
                             for r in found)])


def judged(records: Sequence[Record], iid: Sequence[str]) -> list[dict[str, Any]]:
    """What an LLM judge said, a row for every part in which it was asked: its share of "right" over the answers on which it
    has a verdict, the rules' score and EM on the same answers, how often "right" is EM 1, and the answers without a verdict."""
    found = []
    for name, part in parts([r for r in records if r["judge"]], iid) if any(r["judge"] for r in records) else ():
        clear = [r for r in part if r["judge"] in ("right", "wrong")]
        right = by_task(clear, lambda r: float(r["judge"] == "right"))
        mean, low, high = interval(list(right.values())) if clear else (None, None, None)
        found.append({"source": name, "answers": len(part), "right": mean, "low": low, "high": high,
                      "score": fmean(by_task(clear, _score).values()) if clear else None,
                      "em": fmean(by_task(clear, lambda r: r["em"]).values()) if clear else None,
                      "agrees": fmean((r["judge"] == "right") == (r["em"] == 1) for r in clear) if clear else None,
                      "unparsable": sum(r["judge"] == "unparsable" for r in part),
                      "failed": sum(r["judge"] == "failed" for r in part)})
    return found


def judge_table(found: Sequence[dict[str, Any]]) -> str:
    head = ("", "answers", "judge: right (95%)", "score", "EM", "judge = EM", "unparsable", "failed")
    return markdown([head, *((
        r["source"], str(r["answers"]), *(("no verdict", "-", "-", "-") if r["right"] is None else (
            f"{r['right']:.3f} ({r['low']:.3f}-{r['high']:.3f})", f"{r['score']:.3f}", f"{r['em']:.3f}", f"{r['agrees']:.1%}")),
        str(r["unparsable"]), str(r["failed"])) for r in found)])


# ---------------------------------------------------------------------------------------------------------- evaluations
def results(records: list[dict[str, Any]], methods: Sequence[str], iid: Sequence[str]) -> dict[str, Any]:
    """What eval.json holds beside flags: rows by method, comparisons with the policy, and scores by method and task."""
    of = {method: [r for r in records if r["method"] == method] for method in methods}
    kept = ("method", "task_id", "run", "source", "kind", "score", "em", "f1", "dropped", "judge")
    return {"rows": rows(of["policy"], iid), "baselines": {m: rows(of[m], iid) for m in methods if m != "policy"},
            "comparisons": {m: comparison(of["policy"], of[m], iid) for m in methods if m != "policy"},
            "judge": {m: judged(of[m], iid) for m in methods}, "iid_sources": list(iid),
            "scores": [{name: r[name] for name in kept} for r in records]}


def as_markdown(found: dict[str, Any], notes: Sequence[str]) -> str:
    blocks = [*notes, f"policy\n\n{table(found['rows'])}",
              "policy: share of operators that do nothing, and of workflows with other idle parts (hacks.py)",
              hack_table(found["rows"])]
    blocks += [f"{name}\n\n{table(rows)}" for name, rows in found["baselines"].items()]
    blocks += [f"policy against {name}, paired over tasks\n\n{comparison_table(rows, 'policy', name[:24])}"
               for name, rows in found["comparisons"].items()]
    blocks += [f"{name}, as the LLM judge sees it; code is tested and not judged\n\n{judge_table(rows)}"
               for name, rows in found["judge"].items() if rows]
    return "\n\n".join(blocks)


def commonest_texts(records: Sequence[Record]) -> dict[str, str]:
    """The policy's commonest final workflow for each kind of task."""
    texts: dict[str, list[str]] = {}
    for record in records:
        if record["method"] == "policy":
            texts.setdefault(record["kind"], []).append(record["workflow"])
    return {kind: max(found, key=found.count) for kind, found in sorted(texts.items())}


def compare_files(paths: Sequence[Path]) -> str:
    """How the policies of two evaluations differ on the tasks that both have."""
    sides, sources = [], []
    for path in paths:
        path = path / "eval.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            sides.append([r for r in found["scores"] if r["method"] == "policy"])
            sources.append(found["iid_sources"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not an eval.json of this program ({type(error).__name__}: {error})") from None
    found = comparison(*sides, sources[0])
    if not found:
        raise ValueError(f"{paths[0]} and {paths[1]} share no task")
    return (f"A {paths[0]}\nB {paths[1]}\n\n{comparison_table(found, 'A', 'B')}")
