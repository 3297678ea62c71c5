"""The columns of metrics.jsonl as diagrams: which belong together, how they are smoothed, and curves.png.

Columns are found by name. One that a run did not log has no curve; one that PANELS does not know gets its own on the
page. matplotlib is imported only to draw the picture; the page (report.py) does not need it.
"""
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's palette without its yellow: told apart by every kind of colour vision. Dashes tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One small diagram: some columns of metrics.jsonl on one axis. "accuracy/*" is one curve per source."""

    title: str
    columns: tuple[str, ...]
    meaning: str
    limits: tuple[float, float] | None = None  # of the y axis; None: what the data need
    group: str = "learning"  # learning | structure | machine: the page's section
    picture: bool = False  # in curves.png too


RATE = (0.0, 1.0)
PANELS = (
    Panel("reward", ("reward", "reward_diversity", "reward_answer"),
          "Mean R of the step and its two parts. Rises from about -1; R < 0 is an infeasible workflow.", picture=True),
    Panel("feasible_rate", ("feasible_rate",), "Share with R_div = 1. Should come close to 1 and stay.", RATE, picture=True),
    Panel("accuracy by source", ("accuracy/*", "accuracy"), "Mean grader score of the answers.", RATE, picture=True),
    Panel("reward by source", ("reward/*",), "A flat one is too hard, too easy or always infeasible."),
    Panel("feasible_rate by source", ("feasible_rate/*",), "Share with R_div = 1 in each source.", RATE),
    Panel("parts of R_div", ("reward_checker", "reward_format", "reward_operators", "reward_structure"), "Means; full marks "
          "are 0.2, 0.2, 0.2 and 0.4 by default."),
    Panel("turns and operators", ("turns", "operators"), "Per trajectory. Too few operators cost reward.", picture=True),
    Panel("grad_norm", ("grad_norm",), "Before clipping. 0: nothing was learnt; see uniform_groups.", picture=True),
    Panel("entropy", ("entropy",), "Nats a policy token. Falls slowly; near 0 exploring has stopped.", picture=True),
    Panel("KL", ("kl_ref", "sampler_kl"),
          "To the reference (grows slowly) and between sampler and trainer (should stay near 0).", picture=True),
    Panel("clipfrac", ("clipfrac",), "Share of clipped tokens. Above 0.3 the steps are too large."),
    Panel("approx_kl", ("approx_kl",), "Old to new policy in the step. 0 with one update per batch."),
    Panel("loss", ("loss",), "Near 0 by construction: advantages sum to 0 in a group. Read reward instead."),
    Panel("uniform_groups", ("uniform_groups",), "Share of groups with equal rewards: they teach nothing.", RATE),
    Panel("invalid edits", ("invalid_edits", "refused_finishes"), "Share of turns; finishes per trajectory. Should fall."),
    Panel("stop reasons", ("stop/*",), "Shares. Many max_turns: the policy does not finish.", RATE),
    Panel("structures", ("parallel_rate", "conditional_rate", "loop_rate"), "Share of workflows that have one.", RATE,
          "structure", True),
    Panel("distinct_workflows", ("distinct_workflows",), "Different workflows in a step.", None, "structure"),
    Panel("commonest_share", ("commonest_share",), "Near 1: the same workflow for every task.", RATE, "structure"),
    Panel("mutual_information", ("mutual_information",), "Bits, of source and workflow. 0: the design ignores the task.",
          None, "structure"),
    Panel("tokens_per_second", ("tokens_per_second",), "Tokens of all conversations.", None, "machine", True),
    Panel("seconds", ("seconds_policy", "seconds_executor", "seconds_update"),
          "Update by the clock; policy and executor summed over trajectories.", None, "machine"),
    Panel("executor_calls", ("executor_calls", "executor_cached"), "Live and cached, per trajectory.", None, "machine"),
    Panel("lr", ("lr",), "The learning rate that the step used.", None, "machine"),
)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def columns(metrics: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Turn rows into columns, numeric ones only, `step` first: {name: one value a row, None where the row lacks it}."""
    names = dict.fromkeys(("step", *(name for row in metrics for name in row)))
    table = {name: [row.get(name) if is_number(row.get(name)) else None for row in metrics] for name in names}
    return {name: values for name, values in table.items() if any(value is not None for value in values)}


def panel_columns(panel: Panel, table: dict[str, list[float | None]]) -> list[str]:
    """The columns of a panel that were logged: "accuracy/*" stands for all of its sources, in order of name."""
    found = []
    for name in panel.columns:
        if name.endswith("/*"):
            found += sorted(column for column in table if column.startswith(name[:-1]))
        elif name in table:
            found.append(name)
    return found


def smooth(values: Sequence[float | None], window: int) -> list[float | None]:
    """Centred mean over `window` rows, gaps left out. Centred, because a trailing mean shows every change too late."""
    half, smoothed = window // 2, []
    for i, value in enumerate(values):
        smoothed.append(None if value is None else mean(values[max(0, i - half):i + half + 1]))
    return smoothed


def spread(runs: list[dict[str, list[float | None]]], name: str) -> list[tuple[float, list[float]]]:
    """[(step, the smoothed value of every run that logs the column)], at the steps that all of these runs reached.

    Only there: the mean over a changing set of runs would jump where one of them ends.
    """
    curves = []
    for table in runs:
        if name in table:
            smoothed = smooth(table[name], max(1, len(table[name]) // 20))
            curves.append({s: v for s, v in zip(table["step"], smoothed, strict=True) if v is not None})
    common = set.intersection(*map(set, curves)) if curves else set()
    return [(step, [curve[step] for curve in curves]) for step in sorted(common)]


def plot_curves(tables: list[dict[str, list[float | None]]], names: Sequence[str], path: Path) -> Path:
    """Draw the panels with `picture` set, of runs as `columns` gives them and their names.

    One run: raw values behind the smoothed; several: mean and range. ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # a Figure of its own draws with Agg and needs no display
        from PIL import Image  # comes with matplotlib
    except ImportError as error:
        raise ImportError(f"{path.name} needs matplotlib ({error}): pip install matplotlib") from error
    logged = {name: [] for table in tables for name in table}
    panels = [(panel, found) for panel in PANELS if panel.picture and (found := panel_columns(panel, logged))]
    n_rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(8, 0.3 + 2.0 * n_rows), layout="constrained")  # 8 inches: small text reads well at 800 px
    axes = figure.subplots(n_rows, 3, squeeze=False).flat
    for axis, (panel, found) in zip(axes, panels, strict=False):
        _plot_panel(axis, panel, found, tables)
    for axis in figure.axes[len(panels):]:
        axis.set_axis_off()
    for axis in figure.axes[max(0, len(panels) - 3):len(panels)]:  # the lowest panel of each column
        axis.set_xlabel("step", fontsize=8)
    title = names[0] if len(names) == 1 else f"mean and range of {len(names)} runs: {', '.join(names)}"
    figure.suptitle(title if len(title) < 110 else title[:107] + "...", fontsize=9)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(picture := io.BytesIO(), format="png", dpi=200)
    Image.open(picture).convert("RGB").quantize(64).save(temporary, format="png", optimize=True)  # a third of the bytes
    os.replace(temporary, path)
    return path


def _plot_panel(axis: Any, panel: Panel, names: list[str], tables: list[dict[str, list[float | None]]]) -> None:
    for i, name in enumerate(names):
        points = spread(tables, name)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        steps, values = [step for step, _ in points], [v for _, v in points]
        if len(tables) > 1:
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0)
        elif len(names) < 3:  # raw values behind more curves would be a tangle
            raw = [float("nan") if v is None else v for v in tables[0][name]]
            axis.plot(tables[0]["step"], raw, color=colour, alpha=0.3, lw=0.8)
        axis.plot(steps, [sum(v) / len(v) for v in values], color=colour, linestyle=dash, lw=1.4,
                  marker="o" if len(steps) == 1 else None, markersize=3, label=name.rpartition("/")[2])
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.limits:
        axis.set_ylim(panel.limits[0] - 0.03, panel.limits[1] + 0.03)
    if len(names) > 1 or names[0] != panel.title:
        axis.legend(fontsize=6.5, frameon=False, handlelength=1.8, borderaxespad=0.1)
