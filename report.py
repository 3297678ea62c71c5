"""See a run: a page that replays how every workflow was designed, and the learning curves as one picture.

    python report.py RUN                              # RUN/report.html and RUN/curves.png
    python report.py RUN --out page.html              # only the page, elsewhere
    python report.py SEED_0 SEED_1 SEED_2 --out curves.png    # mean and range over several runs

Reads metrics.jsonl and trajectories.jsonl (needed), summary.json and args.json (shown when there) of a run directory.

* Columns are found by name. One that a run did not log has no curve; one that PANELS does not know gets its own.
* The page is report.html.template with report.js, report_workflow.js and the data put in: one file, no network, no
  framework. The data are inert JSON blocks in which every `<` is escaped, so that a task's text can neither end its
  block nor start a script; each trajectory is a block of its own, parsed only when it is looked at.
* curves.png needs matplotlib, imported only there. The page does not.
"""
import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MAX_TRAJECTORIES = 2000  # in one page (some 40 MB, opens in under two seconds); above it whole steps are left out
HERE = Path(__file__).parent
NODE_ID = re.compile(r"\bn\d+(?:\.\d+)*:")  # "n3.1:Programmer" -> "Programmer"
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
    Panel("KL", ("kl_ref", "kl_sampler", "sampler_kl"),
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


@dataclass
class Run:
    """What a run directory holds, with what was wrong with it (`notes`). Trajectories have `step` and `tau` set."""

    name: str
    metrics: list[dict[str, Any]]
    trajectories: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------- reading
def read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read one dict a line; a line that is not one (the last, when a run was killed) is left out with a note.

    NaN and Infinity, which Python writes and no browser's JSON reads, become None: a gap in the curve.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is {path.parent} a run directory (train.py --out)?")
    rows = []
    with open(path, "rb") as file:  # bytes: a cut line may end inside a character
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line, parse_constant=lambda _: None) if line.strip() else None
            except ValueError:  # JSONDecodeError and UnicodeDecodeError
                row = line
            if isinstance(row, dict):
                rows.append(row)
            elif row is not None:
                notes.append(f"{path.name}, line {number}: not a complete JSON object (cut short?), left out")
    return rows


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object; {} and a note when it is not there or does not hold one."""
    if not path.is_file():
        notes.append(f"{path.name} is not there (yet)")
        return {}
    try:
        value = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except ValueError as error:
        value = error
    if not isinstance(value, dict):
        notes.append(f"{path.name}: not a JSON object, left out")
        return {}
    return value


def without_rewritten(rows: list[dict[str, Any]], one_per_step: bool) -> list[dict[str, Any]]:
    """Drop what a resumed run wrote again: where the step number goes back, the rows from that step on are stale."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        again = one_per_step or (kept and kept[-1]["step"] > row["step"])
        while again and kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def load_run(run_dir: str | Path, with_trajectories: bool = True) -> Run:
    """Read a run directory. FileNotFoundError or ValueError, with what to do, when there is nothing to show."""
    path, notes = Path(run_dir), []
    rows = read_rows(path / "metrics.jsonl", notes)
    metrics = [row for row in rows if _is_number(row.get("step"))]
    if len(metrics) < len(rows):
        notes.append(f"metrics.jsonl: {len(rows) - len(metrics)} rows without a step, left out")
    if not metrics:
        raise ValueError(f"{path / 'metrics.jsonl'} has no complete row with a step: let the run finish its first step")
    run = Run(path.resolve().name, without_rewritten(metrics, one_per_step=True), notes=notes)
    if with_trajectories:
        older = path / "trajectories.1.jsonl"  # what was rotated away, if anything
        rows = [*(read_rows(older, notes) if older.is_file() else ()), *read_rows(path / "trajectories.jsonl", notes)]
        for row in rows:
            row["step"] = row["step"] if _is_number(row.get("step")) else 0
        run.trajectories = without_rewritten(rows, one_per_step=False)
        seen: Counter[float] = Counter()
        for row in run.trajectories:  # tau: its place in its step, which the page's permanent links name
            row["tau"] = seen[row["step"]]
            seen[row["step"]] += 1
        run.summary = read_object(path / "summary.json", notes)
        run.args = read_object(path / "args.json", notes)
    return run


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -------------------------------------------------------------------------------------------------------- computing
def columns(metrics: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Turn rows into columns, numeric ones only, `step` first: {name: one value a row, None where the row lacks it}."""
    names = dict.fromkeys(("step", *(name for row in metrics for name in row)))
    table = {name: [row.get(name) if _is_number(row.get(name)) else None for row in metrics] for name in names}
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
        smoothed.append(None if value is None else _mean(values[max(0, i - half):i + half + 1]))
    return smoothed


def commonest_workflows(trajectories: list[dict[str, Any]], top: int = 3) -> dict[str, list[dict[str, Any]]]:
    """Which workflows each kind of task gets in the first, middle and last third of the steps.

    {kind: [{steps: [first, last], n, distinct, top: [{workflow, n, reward}]}]}, commonest first, without node ids (two
    graphs that differ only by them are the same design); a third without trajectories is left out.
    """
    if not trajectories:
        return {}
    first, last = (end(row["step"] for row in trajectories) for end in (min, max))
    cells: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in trajectories:
        third = int(3 * (row["step"] - first) / (last - first + 1))
        cells.setdefault(str(row.get("kind") or row.get("source") or "task"), {}).setdefault(third, []).append(row)
    result: dict[str, list[dict[str, Any]]] = {}
    for kind in sorted(cells):
        for _, rows in sorted(cells[kind].items()):
            rewards: dict[str, list[float | None]] = {}
            for row in rows:
                rewards.setdefault(NODE_ID.sub("", str(row.get("workflow") or "")), []).append(row.get("reward"))
            ranked = sorted(rewards.items(), key=lambda item: (-len(item[1]), item[0]))
            result.setdefault(kind, []).append({
                "steps": [min(row["step"] for row in rows), max(row["step"] for row in rows)],
                "n": len(rows), "distinct": len(ranked),
                "top": [{"workflow": text, "n": len(r), "reward": _mean(r)} for text, r in ranked[:top]]})
    return result


def thin_out(trajectories: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Keep at most `limit` trajectories: whole steps, evenly spaced, the first and the last among them.

    One step is always kept, even if it alone is above the limit: half a group cannot be compared.
    """
    sizes = Counter(row["step"] for row in trajectories)
    steps, chosen = sorted(sizes), set(sizes)
    keep = min(len(steps), limit * len(steps) // max(1, len(trajectories)) + 1)  # too many by one or a few
    while len(chosen) > 1 and sum(sizes[step] for step in chosen) > limit:
        chosen = {steps[-1]} if keep < 2 else {steps[round(i * (len(steps) - 1) / (keep - 1))] for i in range(keep)}
        keep -= 1
    return [row for row in trajectories if row["step"] in chosen]


def headline(run: Run) -> dict[str, Any]:
    """summary.json, or as much of it as metrics.jsonl tells while the run has not written one."""
    if run.summary:
        return run.summary
    table = columns(run.metrics)
    result: dict[str, Any] = {"steps": len(run.metrics)}
    for key, name, part in (("reward_first10", "reward", slice(10)), ("reward_last10", "reward", slice(-10, None)),
                            ("feasible_rate_last10", "feasible_rate", slice(-10, None)),
                            ("tokens_per_second", "tokens_per_second", slice(None))):
        if (value := _mean(table.get(name, [])[part])) is not None:
            result[key] = value
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ---------------------------------------------------------------------------------------------------------- writing
def embed(value: object) -> str:
    """JSON that is safe inside <script>: ASCII only (a lone surrogate has no UTF-8), no `<` (no </script>, no <!--)."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def write_page(run: Run, path: Path) -> Path:
    """Write the self-contained page of one run."""
    table = columns(run.metrics)
    panels = [asdict(panel) | {"columns": panel_columns(panel, table)} for panel in PANELS]
    known = {"step", *(name for panel in panels for name in panel["columns"])}
    panels += [asdict(Panel(name, (name,), "", group="other")) for name in table if name not in known]
    shown, notes = thin_out(run.trajectories, MAX_TRAJECTORIES), list(run.notes)
    if len(shown) < len(run.trajectories):
        notes.append(f"this page holds {len(shown)} of {len(run.trajectories)} trajectories: whole steps, evenly spaced")
    page = {
        "name": run.name, "notes": notes, "summary": headline(run), "from_summary": bool(run.summary), "args": run.args,
        "panels": [panel for panel in panels if panel["columns"]],
        "table": {name: [v if v is None or name == "step" else float(f"{v:.6g}") for v in values]
                  for name, values in table.items()},
        "workflows": commonest_workflows(run.trajectories),
        "trajectories": [  # what the list needs; the rest is parsed on demand
            {key: row.get(key) for key in ("step", "tau", "task_id", "source", "reward")}
            | {"turns": len(row.get("turns") or ())} for row in shown]}
    blocks = [f'<script type="application/json" id="tau-{i}">{embed(row)}</script>' for i, row in enumerate(shown)]
    html = (HERE / "report.html.template").read_text(encoding="utf-8")
    script = "".join((HERE / name).read_text(encoding="utf-8") for name in ("report_workflow.js", "report.js"))
    # In this order: a marker holds a `<`, so no data can contain one, and none is looked for in what the script says.
    for marker, text in (("script", script), ("page", embed(page)), ("trajectories", "\n".join(blocks))):
        html = html.replace(f"<!--{marker}-->", text)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)  # a reader never sees half a page
    return path


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


def plot_curves(runs: list[Run], path: Path) -> Path:
    """Draw the panels with `picture` set; one run: raw values behind the smoothed; several: mean and range."""
    try:
        from matplotlib.figure import Figure  # a Figure of its own draws with Agg and needs no display
    except ImportError as error:
        raise ImportError(f"{path.name} needs matplotlib ({error}): pip install matplotlib") from error
    tables = [columns(run.metrics) for run in runs]
    logged = {name: [] for table in tables for name in table}
    panels = [(panel, names) for panel in PANELS if panel.picture and (names := panel_columns(panel, logged))]
    n_rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(8, 0.3 + 2.0 * n_rows), layout="constrained")  # 8 inches: small text reads well at 800 px
    axes = figure.subplots(n_rows, 3, squeeze=False).flat
    for axis, (panel, names) in zip(axes, panels, strict=False):
        _plot_panel(axis, panel, names, tables)
    for axis in figure.axes[len(panels):]:
        axis.set_axis_off()
    for axis in figure.axes[max(0, len(panels) - 3):len(panels)]:  # the lowest panel of each column
        axis.set_xlabel("step", fontsize=8)
    names = ", ".join(run.name for run in runs)
    title = names if len(runs) == 1 else f"mean and range of {len(runs)} runs: {names}"
    figure.suptitle(title if len(title) < 110 else title[:107] + "...", fontsize=9)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=200)
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


def write_report(run_dir: str | Path) -> Path:
    """Write RUN/report.html, one self-contained page; the errors of load_run."""
    return write_page(load_run(run_dir), Path(run_dir) / "report.html")


def write_curves(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Write the learning curves of one run, or mean and range of several, as a PNG; the errors of load_run."""
    return plot_curves([load_run(run_dir, with_trajectories=False) for run_dir in run_dirs], Path(path))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 0, or 2 and a line on stderr when something cannot be read or written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a run directory of train.py; several: curves over, say, the seeds of one setting")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="write only this file: .html the page (one RUN), .png the curves (default: report.html and "
                             "curves.png in RUN; with several RUNs, curves.png in the current directory)")
    args = parser.parse_args(argv)
    several = len(args.runs) > 1
    if args.out and args.out.suffix not in (".html", ".png"):
        parser.error(f"--out {args.out}: its name must end in .html (the page) or .png (the curves)")
    if args.out and args.out.suffix == ".html" and several:
        parser.error("a page shows one run: give one RUN, or --out FILE.png for the curves of several")
    if args.out or several:
        outputs = [args.out or Path("curves.png")]
    else:
        outputs = [Path(args.runs[0]) / name for name in ("report.html", "curves.png")]
    try:
        runs = [load_run(run, with_trajectories=outputs[0].suffix == ".html") for run in args.runs]
        for note in (f"note: {run.name}: {note}" for run in runs for note in run.notes):
            print(note, file=sys.stderr)
        for path in outputs:
            print(write_page(runs[0], path) if path.suffix == ".html" else plot_curves(runs, path))
    except (OSError, ValueError, ImportError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
