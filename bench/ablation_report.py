"""Tables and figures of bench/ablations.py, from its result files alone."""
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from hacks import HACKS, rates
from operators import library
from stats import RESAMPLES, markdown
from toys import OOD

Result = dict[str, Any]
Results = dict[str, dict[int, Result]]  # variant -> seed -> result
WINDOW = 5  # steps over which the training accuracy is averaged: some 270 episodes


def load(directory: Path, names: Sequence[str]) -> Results:
    """Read what is there. Raises ValueError when the runs do not belong into one table."""
    found: Results = {}
    for name in names:
        for path in sorted(directory.glob(f"{name}-[0-9]*.json")):
            if path.stem.rpartition("-")[0] == name:
                result = json.loads(path.read_text())
                found.setdefault(name, {})[result["seed"]] = result
    results = [result for runs in found.values() for result in runs.values()]
    for key in ("warm_start", "trajectories"):
        if len(values := {result[key] for result in results}) > 1:
            raise ValueError(f"{directory}: results with different {key}: {sorted(values)}; remove the old ones")
    if "full" not in found:
        raise ValueError(f"{directory}: no result of the variant full yet")
    return found


def scores(result: Result, ood: bool) -> dict[str, float]:
    """{task id: score} of one group of sources."""
    return {r["task_id"]: r["score"] for r in result["records"] if (r["source"] in OOD) == ood}


def difference(full: dict[int, Result], other: dict[int, Result], ood: bool, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of other - full, paired by task within a seed; 95% bootstrap over seeds and, in each, over tasks.

    Two levels, because the tasks of one training run are not independent: with three seeds the interval is as wide as three
    seeds make it.
    """
    pairs = []
    for one in sorted(full.keys() & other.keys()):
        left, right = scores(full[one], ood), scores(other[one], ood)
        pairs.append(np.array([right[task] - left[task] for task in left]))
    rng, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = [pairs[i] for i in rng.integers(0, len(pairs), len(pairs))]
        means.append(fmean(float(d[rng.integers(0, len(d), len(d))].mean()) for d in drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    return fmean(float(d.mean()) for d in pairs), float(low), float(high)


def shown(values: Sequence[float], digits: int = 3) -> str:
    """mean +- standard deviation over seeds."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def main_table(found: Results) -> str:
    """One row a variant. Feasible, operators and turns are of the held-out IID tasks; feasible by the unchanged R_div."""
    rows = [("", "seeds", "IID", "OOD", "R_div = 1", "operators", "turns", "IID - full (95%)", "OOD - full (95%)")]
    for name, runs in found.items():
        iid = {seed: [r for r in result["records"] if r["source"] not in OOD] for seed, result in runs.items()}
        means = {key: [fmean(r[key] for r in records) for records in iid.values()] for key in ("feasible", "operators", "turns")}
        cells = [name, str(len(runs)), *(shown([fmean(scores(r, ood).values()) for r in runs.values()]) for ood in (False, True)),
                 shown(means["feasible"], 2), shown(means["operators"], 1), shown(means["turns"], 1)]
        for ood in (False, True):
            paired = name != "full" and found["full"].keys() & runs.keys()
            cells.append("{:+.3f} ({:+.3f} to {:+.3f})".format(*difference(found["full"], runs, ood)) if paired else "")
        rows.append(tuple(cells))
    return markdown(rows)


def hack_table(found: Results) -> str:
    """hacks.rates of the workflows for held-out IID and OOD tasks of all seeds."""
    rows = [("", *HACKS)]
    for variant in ("full", "strict", "no-diversity"):
        if variant in found:
            records = [r for result in found[variant].values() for r in result["records"]]
            rows.append((variant, *(f"{rate:.2f}" for rate in rates([(r["hacks"], r["operators"]) for r in records]).values())))
    return markdown(rows)


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean of each step and the WINDOW - 1 before it."""
    return [fmean(values[max(0, i - WINDOW + 1):i + 1]) for i in range(len(values))]


def steps_to(values: Sequence[float], goal: float) -> int | None:
    """Number of steps after which the smoothed value has reached the goal; None if it never does."""
    return next((i + 1 for i, value in enumerate(smoothed(values)) if i + 1 >= WINDOW and value >= goal), None)


def efficiency_table(found: Results, best: dict[int, float]) -> str:
    """Training trajectories until the smoothed training accuracy reaches 90% of the best reachable, by seed; - if never."""
    seeds = sorted(best)
    rows = [("", *(f"seed {seed}: {0.9 * best[seed]:.3f}" for seed in seeds))]
    for name in [name for name in found if name in ("full", "by-source", "grpo")]:
        cells = []
        for seed in seeds:
            result = found[name].get(seed)
            steps = result and steps_to(result["curves"]["accuracy"], 0.9 * best[seed])
            final = f"- (ends at {smoothed(result['curves']['accuracy'])[-1]:.3f})" if result else ""
            cells.append(str(steps * result["trajectories"] // len(result["curves"]["accuracy"])) if steps else final)
        rows.append((name, *cells))
    return markdown(rows)


def first_steps_table(found: Results) -> str:
    """Does structure come first and answers after? Steps until each has made nine tenths of its own way, mean over seeds."""
    rows = [("", "R_div = 1: steps", "answer accuracy: steps")]
    for name in [name for name in found if name in ("full", "no-release")]:
        for_each = []
        for key in ("feasible_rate", "accuracy"):
            taken = []
            for result in found[name].values():
                values = smoothed(result["curves"][key])[WINDOW - 1:]
                goal = values[0] + 0.9 * (max(values) - values[0])
                taken.append(next(i for i, value in enumerate(values) if value >= goal) + WINDOW)
            for_each.append(shown(taken, 1))
        rows.append((name, *for_each))
    return markdown(rows)


def last_table(found: Results) -> str:
    """Is the operator chosen that pays? Of full's workflows for held-out IID tasks: how often each operator is the last that
    answers (of role solve, revise or ensemble), and the mean score of those workflows."""
    answering = [name for name, op in library().items() if op.role in ("solve", "revise", "ensemble")]
    scores_of: dict[str, dict[str, list[float]]] = {}  # source -> operator -> scores
    for record in (r for result in found["full"].values() for r in result["records"] if r["source"] not in OOD):
        last = [name for name in re.findall(r"[A-Za-z_]\w*", record["workflow"]) if name in answering]
        scores_of.setdefault(record["source"], {}).setdefault(last[-1] if last else "none", []).append(record["score"])
    rows = [("", *scores_of)]
    for name in (*answering, "none"):
        if any(name in by_name for by_name in scores_of.values()):
            rows.append((name, *(f"{len(by_name[name]) / sum(map(len, by_name.values())):.0%}: {fmean(by_name[name]):.2f}"
                                 if name in by_name else "0%" for by_name in scores_of.values())))
    return markdown(rows)


def draw(found: Results, directory: Path) -> None:
    """ablations.png: differences to full with their intervals. dynamics.png: curves of full, no-release and strict."""
    from matplotlib.figure import Figure  # a Figure of its own draws without a display

    names = [name for name in found if name != "full" and found[name].keys() & found["full"].keys()]
    figure = Figure(figsize=(9, 0.4 * len(names) + 1.6), layout="constrained")
    for axis, ood in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        rows = [difference(found["full"], found[name], ood) for name in names]
        for y, (mean, low, high) in enumerate(rows):
            axis.plot([low, high], [y, y], color="tab:blue")
            axis.plot(mean, y, "o", color="tab:blue")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(yticks=range(len(names)), yticklabels=names, title=f"{'OOD' if ood else 'IID'} accuracy minus full (simulation)")
        axis.invert_yaxis() if not ood else None
        axis.locator_params(axis="x", nbins=5)
    figure.savefig(directory / "ablations.png", dpi=110)

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = (("feasible_rate", "R_div = 1"), ("accuracy", "answer accuracy"), ("hack_no_op", "share of no-op operators"))
    for axis, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in [name for name in ("full", "no-release", "strict") if name in found]:
            curves = np.array([smoothed(result["curves"][key]) for result in found[name].values()])  # (seeds, steps)
            line, = axis.plot(range(1, curves.shape[1] + 1), curves.mean(0), label=name)
            axis.fill_between(range(1, curves.shape[1] + 1), curves.min(0), curves.max(0), alpha=0.2, color=line.get_color())
        axis.set(title=title, xlabel="step", ylim=(0, 1))
        axis.legend()
    figure.savefig(directory / "dynamics.png", dpi=110)


def report(directory: Path, names: Sequence[str], figures: Path) -> str:
    """Everything that the results which are there say, as Markdown; draws the figures."""
    found = load(directory, names)
    best = {(r := json.loads(path.read_text()))["seed"]: r["accuracy"] for path in sorted(directory.glob("reachable-*.json"))}
    figures.mkdir(parents=True, exist_ok=True)
    draw(found, figures)
    one = next(iter(found["full"].values()))
    return "\n\n".join((
        f"A simulation. {one['trajectories']} trajectories a run, warm start {one['warm_start']} for all; mean ± standard "
        "deviation over seeds; differences paired by task, 95% bootstrap over seeds and, in each, over tasks.", main_table(found),
        "Share of operators that are no_op, and of workflows with other parts that do nothing:", hack_table(found),
        f"Trajectories until training accuracy (mean of {WINDOW} steps) reaches 90% of the best reachable:",
        efficiency_table(found, best), "Steps until nine tenths of the way from the first to the highest mean are made:",
        first_steps_table(found),
        "The last operator that answers, in the workflows of full on IID sources: share of workflows, and their score:",
        last_table(found)))
