"""See a run: a page that replays how every workflow was designed, and the learning curves as one picture.

    python report.py runs/default                             RUN/report.html and RUN/curves.png
    python report.py runs/mine-eval --out page.html           the page of an evaluation (eval.py --out), elsewhere
    python report.py runs/s0 runs/s1 runs/s2 --out curves.png     mean and range over several runs, say the seeds of a setting

Reads metrics.jsonl and trajectories.jsonl (needed), summary.json and args.json (shown when there) of a run directory;
trajectories.jsonl (needed), eval.json and args.json of an evaluation, which has no curves.

* The page is report.html.template with report.js, report_workflow.js and the data put in: one file, no network, no
  framework. The data are inert JSON blocks in which every `<` is escaped, so that a task's text can neither end its
  block nor start a script; each trajectory is a block of its own, parsed only when it is looked at.
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

from curves import PANELS, Panel, columns, is_number, mean, panel_columns, plot_curves

MAX_TRAJECTORIES = 2000  # in one page (some 40 MB, opens in under two seconds); above it whole steps are left out
HERE = Path(__file__).parent
SCRIPTS = ("report_workflow.js", "report_curves.js", "report.js")
NODE_ID = re.compile(r"\bn\d+(?:\.\d+)*:")  # "n3.1:Programmer" -> "Programmer"
DIFFICULTY = ((1 / 3, "hard"), (2 / 3, "medium"), (1.0, "easy"))  # by the mean score of a task's answers, at most


@dataclass
class Run:
    """What a run or an evaluation left, with what was wrong with it (`notes`). Trajectories have `step` and `tau` set."""

    name: str
    metrics: list[dict[str, Any]]  # empty: an evaluation
    trajectories: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # of an evaluation: stats.row's rows by method
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------- reading
def read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read one dict a line; a line that is not one (the last, when a run was killed) is left out with a note.

    NaN and Infinity, which Python writes and no browser's JSON reads, become None: a gap in the curve.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is {path.parent} a run directory (train.py --out) or an evaluation "
                                "(eval.py --out)?")
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
    """Read a run or an evaluation. FileNotFoundError or ValueError, with what to do, when there is nothing to show.

    An evaluation has no metrics.jsonl, and its trajectories name their method. Curves (with_trajectories=False) need a run.
    """
    path, notes = Path(run_dir), []
    run = Run(path.resolve().name, [], notes=notes)
    evaluation = not (path / "metrics.jsonl").is_file() and is_evaluation(path)
    if not evaluation:
        rows = read_rows(path / "metrics.jsonl", notes)
        metrics = [row for row in rows if is_number(row.get("step"))]
        if len(metrics) < len(rows):
            notes.append(f"metrics.jsonl: {len(rows) - len(metrics)} rows without a step, left out")
        if not metrics:
            raise ValueError(f"{path / 'metrics.jsonl'} has no complete row with a step: let the run finish its first step")
        run.metrics = without_rewritten(metrics, one_per_step=True)
    elif not with_trajectories:
        raise ValueError(f"{path} is an evaluation and has no curves; python report.py {path} writes its page")
    if with_trajectories:
        run.trajectories = read_trajectories(path, notes)
        run.args = read_object(path / "args.json", notes)
        result = read_object(path / ("eval.json" if evaluation else "summary.json"), notes)
        if evaluation:
            run.tables = {"policy": result.get("rows", []), **result.get("baselines", {})}
        else:
            run.summary = result
    return run


def is_evaluation(path: Path) -> bool:
    """Whether trajectories.jsonl there holds episodes of eval.py."""
    return (path / "trajectories.jsonl").is_file() and any("method" in row for row in read_rows(path / "trajectories.jsonl", []))


def read_trajectories(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the rows of trajectories.jsonl, what was rotated away first, with `tau`: the place in its step, for links."""
    older = path / "trajectories.1.jsonl"
    rows = [*(read_rows(older, notes) if older.is_file() else ()), *read_rows(path / "trajectories.jsonl", notes)]
    for row in rows:
        row["step"] = row["step"] if is_number(row.get("step")) else 0
    rows = without_rewritten(rows, one_per_step=False)
    seen: Counter[float] = Counter()
    for row in rows:
        row["tau"] = seen[row["step"]]
        seen[row["step"]] += 1
    return rows


# -------------------------------------------------------------------------------------------------------- computing
def thirds_by_kind(trajectories: list[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """{kind: [rows of the first, the middle and the last third of the steps]}, an empty third left out.

    Of an evaluation with baselines only the policy's: the others design nothing.
    """
    rows = [row for row in trajectories if row.get("method", "policy") == "policy"]
    cells: dict[str, dict[int, list[dict[str, Any]]]] = {}
    if rows:
        first, last = (end(row["step"] for row in rows) for end in (min, max))
        for row in rows:
            third = int(3 * (row["step"] - first) / (last - first + 1))
            cells.setdefault(str(row.get("kind") or row.get("source") or "task"), {}).setdefault(third, []).append(row)
    return {kind: [part for _, part in sorted(cells[kind].items())] for kind in sorted(cells)}


def commonest_workflows(trajectories: list[dict[str, Any]], top: int = 3) -> dict[str, list[dict[str, Any]]]:
    """Which workflows each kind of task gets in the first, middle and last third of the steps.

    {kind: [{steps: [first, last], n, distinct, top: [{workflow, n, reward}]}]}, commonest first, without node ids: two
    graphs that differ only by them are the same design.
    """
    result: dict[str, list[dict[str, Any]]] = {}
    for kind, parts in thirds_by_kind(trajectories).items():
        for rows in parts:
            rewards: dict[str, list[float | None]] = {}
            for row in rows:
                rewards.setdefault(NODE_ID.sub("", str(row.get("workflow") or "")), []).append(row.get("reward"))
            ranked = sorted(rewards.items(), key=lambda item: (-len(item[1]), item[0]))
            result.setdefault(kind, []).append({
                "steps": [min(row["step"] for row in rows), max(row["step"] for row in rows)],
                "n": len(rows), "distinct": len(ranked),
                "top": [{"workflow": text, "n": len(r), "reward": mean(r)} for text, r in ranked[:top]]})
    return result


def operators_by_difficulty(trajectories: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{kind: [{difficulty, tasks, operators: mean size of the workflow in each third of the steps, None without one}]}.

    A task's difficulty is how often the recorded answers to it were right, over the whole run: hard, at most a third.
    """
    scores: dict[str, list[float | None]] = {}
    for row in trajectories:
        scores.setdefault(str(row.get("task_id")), []).append(row.get("score"))
    level = {task: next(name for most, name in DIFFICULTY if rate <= most)
             for task, values in scores.items() if (rate := mean(values)) is not None}
    result: dict[str, list[dict[str, Any]]] = {}
    for kind, parts in thirds_by_kind(trajectories).items():
        for _, name in DIFFICULTY:
            found = [[row for row in rows if level.get(str(row.get("task_id"))) == name] for rows in parts]
            if tasks := {str(row.get("task_id")) for rows in found for row in rows}:
                result.setdefault(kind, []).append({
                    "difficulty": name, "tasks": len(tasks), "operators": [mean(list(map(n_operators, rows))) for rows in found]})
    return result


def n_operators(row: dict[str, Any]) -> int:
    """Operator nodes of a trajectory's final workflow, counted in its text."""
    return sum(name != "done" for name in re.findall(r"[A-Za-z]\w*", NODE_ID.sub("", str(row.get("workflow") or ""))))


def thin_out(trajectories: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Keep at most `limit` trajectories: whole steps, evenly spaced, the first and the last among them.

    Of an evaluation, which is one step: whole tasks. One unit is always kept, even if it alone is above the limit: half
    a group cannot be compared.
    """
    unit = "step" if len({row["step"] for row in trajectories}) > 1 else "task_id"
    sizes = Counter(row.get(unit) for row in trajectories)
    steps, chosen = list(sizes), set(sizes)
    keep = min(len(steps), limit * len(steps) // max(1, len(trajectories)) + 1)  # too many by one or a few
    while len(chosen) > 1 and sum(sizes[step] for step in chosen) > limit:
        chosen = {steps[-1]} if keep < 2 else {steps[round(i * (len(steps) - 1) / (keep - 1))] for i in range(keep)}
        keep -= 1
    return [row for row in trajectories if row.get(unit) in chosen]


def headline(run: Run) -> dict[str, Any]:
    """summary.json, or as much of it as metrics.jsonl tells while the run has not written one."""
    if run.summary or not run.metrics:
        return run.summary
    table = columns(run.metrics)
    result: dict[str, Any] = {"steps": len(run.metrics)}
    for key, name, part in (("reward_first10", "reward", slice(10)), ("reward_last10", "reward", slice(-10, None)),
                            ("feasible_rate_last10", "feasible_rate", slice(-10, None)),
                            ("tokens_per_second", "tokens_per_second", slice(None))):
        if (value := mean(table.get(name, [])[part])) is not None:
            result[key] = value
    return result


# ---------------------------------------------------------------------------------------------------------- writing
def embed(value: object) -> str:
    """JSON that is safe inside <script>: ASCII only (a lone surrogate has no UTF-8), no `<` (no </script>, no <!--)."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def write_page(run: Run, path: Path) -> Path:
    """Write the self-contained page of one run."""
    table = columns(run.metrics) or {"step": []}
    panels = [asdict(panel) | {"columns": panel_columns(panel, table)} for panel in PANELS]
    known = {"step", *(name for panel in panels for name in panel["columns"])}
    panels += [asdict(Panel(name, (name,), "", group="other")) for name in table if name not in known]
    shown, notes = thin_out(run.trajectories, MAX_TRAJECTORIES), list(run.notes)
    if len(shown) < len(run.trajectories):
        notes.append(f"this page holds {len(shown)} of {len(run.trajectories)} trajectories: whole "
                     f"{'steps' if run.metrics else 'tasks'}, evenly spaced")
    page = {
        "name": run.name, "notes": notes, "summary": headline(run), "from_summary": bool(run.summary), "args": run.args,
        "panels": [panel for panel in panels if panel["columns"]],
        "table": {name: [v if v is None or name == "step" else float(f"{v:.6g}") for v in values]
                  for name, values in table.items()},
        "workflows": commonest_workflows(run.trajectories), "difficulty": operators_by_difficulty(run.trajectories),
        "tables": run.tables,
        "trajectories": [  # what the list needs; the rest is parsed on demand
            {key: row.get(key) for key in ("step", "tau", "task_id", "source", "reward", "method")}
            | {"turns": len(row.get("turns") or ())} for row in shown]}
    blocks = [f'<script type="application/json" id="tau-{i}">{embed(row)}</script>' for i, row in enumerate(shown)]
    html = (HERE / "report.html.template").read_text(encoding="utf-8")
    script = "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    # In this order: a marker holds a `<`, so no data can contain one, and none is looked for in what the script says.
    for marker, text in (("script", script), ("page", embed(page)), ("trajectories", "\n".join(blocks))):
        html = html.replace(f"<!--{marker}-->", text)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)  # a reader never sees half a page
    return path


def write_report(run_dir: str | Path) -> Path:
    """Write RUN/report.html, one self-contained page; the errors of load_run."""
    return write_page(load_run(run_dir), Path(run_dir) / "report.html")


def write_curves(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Write the learning curves of one run, or mean and range of several, as a PNG; the errors of load_run."""
    runs = [load_run(run_dir, with_trajectories=False) for run_dir in run_dirs]
    return plot_curves([columns(run.metrics) for run in runs], [run.name for run in runs], Path(path))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 0, or 2 and a line on stderr when something cannot be read or written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a run directory of train.py, or one evaluation of eval.py; several runs: their curves in one "
                             "picture, mean and range, over, say, the seeds of a setting")
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
            if path.suffix == ".html":
                print(write_page(runs[0], path))
            elif runs[0].metrics:  # an evaluation has none, and a page alone
                print(plot_curves([columns(run.metrics) for run in runs], [run.name for run in runs], path))
    except (OSError, ValueError, ImportError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
