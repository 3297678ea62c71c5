"""report.py: what is read, what is left out with a note, what is written. How the page looks and acts needs a browser."""

import html.parser
import json
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

import curves
import report
from graph import Graph

HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp;</b> \u2028 数 \ud800"
HERE = Path(report.__file__).parent


def make_run(path: Path, steps: int = 4, **first: Any) -> Path:
    """A run directory of `steps` steps with two trajectories each; `first` changes the first trajectory."""
    path.mkdir(parents=True)
    turn = {"text": "<action>add</action><operator>Plan</operator>", "edit": "add Plan", "ok": True, "feedback": "ok",
            "workflow": "n1:Plan", "executed": ["n1"], "n_sampled": 9}
    metrics = [{"step": i, "reward": i / 10, "accuracy/toy_qa": 0.5, "feasible_rate": 1.0} for i in range(steps)]
    taus = [{"step": i, "task_id": f"t{i}", "source": "toy_qa", "kind": "qa", "problem": "?", "answers": ["a"],
             "reward": 0.5, "workflow": "n1:Plan -> n2:Format", "turns": [turn]} for i in range(steps) for _ in "ab"]
    taus[0].update(first)
    write_lines(path / "metrics.jsonl", metrics)
    write_lines(path / "trajectories.jsonl", taus)
    return path


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Scripts(html.parser.HTMLParser):
    """The <script> elements of a page as a browser would see them: [(attributes, text)]."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[list[Any]] = []
        self.inside = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.inside = tag == "script"
        if self.inside:
            self.found.append([dict(attrs), ""])

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1][1] += data

    def json(self, name: str) -> Any:
        return next(json.loads(text) for attributes, text in self.found if attributes.get("id") == name)


def test_both_files_are_written_and_named_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "run")
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(run / "curves.png")]
    assert not list(run.glob("*.tmp"))
    picture = (run / "curves.png").read_bytes()
    assert (picture[:8], struct.unpack(">I", picture[16:20])[0]) == (b"\x89PNG\r\n\x1a\n", 1600)  # 1600 pixels wide


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    page = report.write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    for text in ("<!--page-->", "<!--trajectories-->", "<!--script-->", "src=", "@import", "url("):
        assert text not in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 1  # http-equiv
    assert "default-src 'none'" in page


@pytest.mark.parametrize("key", ["problem", "task_id", "source", "kind", "workflow", "answer"])
def test_hostile_text_stays_text(tmp_path: Path, key: str) -> None:
    scripts = Scripts(report.write_report(make_run(tmp_path / "run", steps=2, **{key: HOSTILE})))
    assert [a.get("type") for a, _ in scripts.found] == ["application/json"] * 5 + [None]  # run, 4 trajectories, code
    assert scripts.json("tau-0")[key] == HOSTILE


def test_a_hostile_run_name_and_column_name_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<script>alert(1)<")
    write_lines(run / "metrics.jsonl", [{"step": 0, HOSTILE: 1.0}])
    page = Scripts(report.write_report(run)).json("page")
    assert page["name"] == run.name
    assert [panel["columns"] for panel in page["panels"]] == [[HOSTILE]]


def test_the_script_never_parses_text_as_html() -> None:
    script = "".join((HERE / name).read_text() for name in report.SCRIPTS)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser", "</script"):
        assert way not in script


def test_nan_and_missing_values_become_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 0, "reward": NaN, "loss": 1.5}\n{"step": 1, "loss": null}\n'
                                       '{"step": 2, "reward": 0.25, "loss": Infinity, "note": "text", "flag": true}\n')
    table = Scripts(report.write_report(run)).json("page")["table"]
    assert table == {"step": [0, 1, 2], "reward": [None, None, 0.25], "loss": [1.5, None, None]}
    assert report.write_curves([run], tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize("cut", [b'{"step": 4, "rew', b'{"step": 4, "note": "\xe6\x95', b"[4, 0.1]", b"\x00\x00"])
def test_a_half_written_last_line_is_left_out_with_a_note(tmp_path: Path, cut: bytes) -> None:
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        (run / name).write_bytes((run / name).read_bytes() + cut)
    loaded = report.load_run(run)
    assert (len(loaded.metrics), len(loaded.trajectories)) == (4, 8)
    assert [note[:28] for note in loaded.notes[:2]] == ["metrics.jsonl, line 5: not a", "trajectories.jsonl, line 9: "]
    assert Scripts(report.write_report(run)).json("page")["notes"] == loaded.notes


def test_rows_that_a_resumed_run_wrote_again_replace_the_stale_ones() -> None:
    rows = [{"step": int(text[0]), "text": text} for text in ("0a", "0b", "1a", "1b", "2a", "1c", "1d", "2c")]
    assert [row["text"] for row in report.without_rewritten(rows, one_per_step=False)] == ["0a", "0b", "1c", "1d", "2c"]
    assert [row["text"] for row in report.without_rewritten(rows, one_per_step=True)] == ["0b", "1d", "2c"]


def test_rotated_trajectories_come_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_lines(run / "trajectories.1.jsonl", [{"step": 0, "task_id": "old"}])
    taus = report.load_run(run).trajectories
    assert [(tau["task_id"], tau["tau"]) for tau in taus[:3]] == [("old", 0), ("t0", 1), ("t0", 2)]


@pytest.mark.parametrize("name", ["metrics.jsonl", "trajectories.jsonl"])
def test_a_missing_file_is_named_and_the_status_is_2(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report.py: {run / name} is missing")
    assert error.count("\n") == 1
    assert not (run / "report.html").exists()


def test_a_run_without_a_complete_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": ')
    assert report.main([str(run)]) == 2
    assert "no complete row" in capsys.readouterr().err


def test_without_summary_the_headline_comes_from_the_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20)
    page = Scripts(report.write_report(run)).json("page")
    assert page["summary"] == pytest.approx({"steps": 20, "reward_first10": 0.45, "reward_last10": 1.45,
                                             "feasible_rate_last10": 1.0})
    (run / "summary.json").write_text('{"steps": 7}')
    page = Scripts(report.write_report(run)).json("page")
    assert (page["summary"], page["from_summary"]) == ({"steps": 7}, True)


def test_every_logged_column_has_a_panel(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    row = {"step": 0, "reward": 0, "kl_ref": 0, "accuracy/b": 0, "accuracy/a": 0, "reward/a": 0, "brand_new": 0}
    write_lines(run / "metrics.jsonl", [row])
    panels = Scripts(report.write_report(run)).json("page")["panels"]
    assert [(panel["group"], panel["columns"]) for panel in panels] == [
        ("learning", ["reward"]), ("learning", ["accuracy/a", "accuracy/b"]), ("learning", ["reward/a"]),
        ("learning", ["kl_ref"]), ("other", ["brand_new"])]


def test_curves_of_several_runs_have_mean_and_range_where_all_have_values() -> None:
    tables = [curves.columns([{"step": s, "reward": r} for s, r in rows])
              for rows in ([(0, 1.0), (1, 2.0), (2, 9.0)], [(0, 3.0), (1, None)], [(0, 5.0), (1, 4.0)])]
    assert curves.spread(tables, "reward") == [(0, [1.0, 3.0, 5.0])]
    assert curves.spread([*tables, {"step": [0], "loss": [1.0]}], "reward") == [(0, [1.0, 3.0, 5.0])]


def test_several_runs_give_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [str(make_run(tmp_path / str(seed), steps=3 + seed)) for seed in range(3)]
    monkeypatch.chdir(tmp_path)
    assert report.main(runs) == 0
    assert report.main([*runs, "--out", "b.png"]) == 0
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not list(tmp_path.glob("*/curves.png"))


@pytest.mark.parametrize("out", ["page.html", "page.pdf"])
def test_an_out_file_that_cannot_be_meant_is_refused(tmp_path: Path, out: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path), str(tmp_path), "--out", out])


def test_smoothing_is_a_centred_mean_that_keeps_gaps() -> None:
    assert curves.smooth([0.0, 3.0, None, 5.0, 1.0], 3) == [1.5, 1.5, None, 3.0, 3.0]
    assert curves.smooth([0.0, 3.0, None], 1) == [0.0, 3.0, None]


def test_commonest_workflows_are_counted_by_kind_and_third_without_ids() -> None:
    rows = [{"step": step, "kind": kind, "workflow": text, "reward": reward} for step, kind, text, reward in [
        (1, "qa", "n1:Plan -> n2:[n2.1:Custom, n2.2:Custom]", 1.0),
        (2, "qa", "n4:Plan -> n7:[n7.3:Custom, n7.4:Custom]", 0.0),
        (2, "qa", "Format", None), (6, "qa", "Format", None), (2, "math", "Plan", -1.0), (3, "math", "", -1.0)]]
    found = report.commonest_workflows(rows)
    assert found["qa"] == [
        {"steps": [1, 2], "n": 3, "distinct": 2, "top": [{"workflow": "Plan -> [Custom, Custom]", "n": 2, "reward": 0.5},
                                                         {"workflow": "Format", "n": 1, "reward": None}]},
        {"steps": [6, 6], "n": 1, "distinct": 1, "top": [{"workflow": "Format", "n": 1, "reward": None}]}]
    assert [third["steps"] for third in found["math"]] == [[2, 2], [3, 3]]
    assert report.commonest_workflows([]) == {}


@pytest.mark.parametrize(("limit", "kept"), [(100, list(range(10))), (9, [0, 4, 9]), (8, [0, 9]), (5, [9]), (1, [9])])
def test_a_page_keeps_whole_steps_with_the_first_and_the_last(limit: int, kept: list[int]) -> None:
    rows = [{"step": step, "tau": tau} for step in range(10) for tau in range(3)]
    thinned = report.thin_out(rows, limit)
    assert sorted({row["step"] for row in thinned}) == kept
    assert len(thinned) == 3 * len(kept)


def test_a_thinned_page_says_so_and_keeps_the_numbers_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_TRAJECTORIES", 4)
    page = Scripts(report.write_report(make_run(tmp_path / "run", steps=9))).json("page")
    assert [(row["step"], row["tau"]) for row in page["trajectories"]] == [(0, 0), (0, 1), (8, 0), (8, 1)]
    assert "this page holds 4 of 18 trajectories: whole steps, evenly spaced" in page["notes"]


# ---- the script, where Node.js is at hand ---------------------------------------------------------------------------
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")


def run_node(code: str, expression: str) -> Any:
    """What the expression is worth after the code."""
    code += f"\nconsole.log(JSON.stringify({expression}))"
    return json.loads(subprocess.run(["node", "-e", code], capture_output=True, check=True, timeout=60).stdout)


@needs_node
def test_the_page_reads_every_workflow_as_graph_py_does() -> None:
    texts = ["", "Plan", "Plan -> [Programmer, Custom] -> Aggregate -> (Verify ? Revise : done) -> "
             "(Programmer -> Review) * 2 -> Format", "(Verify ? Revise : Format)", "(Test) * 10", "[A,B,C]->D"]
    graphs = [Graph.from_text(text) for text in texts]
    code = (HERE / "report_workflow.js").read_text()
    for ids in (False, True):
        found = run_node(code, f"{json.dumps([graph.to_text(ids) for graph in graphs])}.map(parseWorkflow)")
        for graph, stages in zip(graphs, found, strict=True):
            assert [stage["kind"] for stage in stages] == [stage.kind for stage in graph.stages]
            assert [stage.get("count", 1) for stage in stages] == [stage.count for stage in graph.stages]
            assert [(node["id"], node["name"]) for stage in stages for node in stage["nodes"]] == [
                (node.id if ids else None, node.operator) for node in graph.nodes()]


@needs_node
@pytest.mark.parametrize("text", ["Plan ->", "[A, B", "(A ? B)", "(A -> B)", "(A) * x", "A B", "(empty)", "[A, [B]]",
                                  "n1:", "A & B"])
def test_what_is_no_workflow_is_not_drawn_as_one(text: str) -> None:
    assert run_node((HERE / "report_workflow.js").read_text(), f"parseWorkflow({json.dumps(text)})") is None


@needs_node
def test_the_page_smooths_as_the_picture_does() -> None:
    values = [0.0, 3.0, None, 5.0, 1.0, 2.0]
    source = (HERE / "report_curves.js").read_text()
    code = source[source.index("function smooth"):source.index("function ticks")]
    found = run_node(code, f"[1, 3, 5].map(window => smooth({json.dumps(values)}, window))")
    assert found == [pytest.approx(curves.smooth(values, window)) for window in (1, 3, 5)]


# ---- evaluations, and what a workflow's size depends on --------------------------------------------------------------
def make_evaluation(path: Path, tasks: int = 3, **more: Any) -> Path:
    """An evaluation of a policy and one baseline, an episode a task each."""
    path.mkdir()
    write_lines(path / "trajectories.jsonl", [
        {"step": 0, "task_id": f"t{i}", "kind": "qa", "method": method, "reward": 0.5, "workflow": text, "turns": []}
        for method, text in (("policy", "Plan -> Format"), ("random", "Custom")) for i in range(tasks)])
    row = {"source": "all", "tasks": tasks, "score": 0.5, "low": 0.1, "high": 0.9, "metric": "F1"}
    (path / "eval.json").write_text(json.dumps({"rows": [row], "baselines": {"random": [row]}}))
    return path


def test_an_evaluation_has_a_page_of_its_own_and_no_curves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluation = make_evaluation(tmp_path / "e")
    assert report.main([str(evaluation)]) == 0
    assert capsys.readouterr().out.split() == [str(evaluation / "report.html")]
    page = Scripts(evaluation / "report.html").json("page")
    assert (page["table"], page["panels"], list(page["tables"])) == ({"step": []}, [], ["policy", "random"])
    assert [(row["tau"], row["method"]) for row in page["trajectories"]] == list(enumerate(["policy"] * 3 + ["random"] * 3))
    assert [third["top"][0]["workflow"] for third in page["workflows"]["qa"]] == ["Plan -> Format"]  # the policy's alone


def test_a_picture_of_an_evaluation_is_refused_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluation = make_evaluation(tmp_path / "e")
    assert report.main([str(evaluation), "--out", str(tmp_path / "c.png")]) == 2
    assert "is an evaluation and has no curves; python report.py" in capsys.readouterr().err


def test_a_large_evaluation_keeps_whole_tasks() -> None:
    rows = [{"step": 0, "task_id": task, "method": method} for method in "ab" for task in range(10)]
    kept = report.thin_out(rows, 9)
    assert [(row["method"], row["task_id"]) for row in kept] == [(m, t) for m in "ab" for t in (0, 3, 6, 9)]


def test_operators_are_told_by_how_often_a_task_was_solved() -> None:
    rows = [{"step": step, "kind": "qa", "task_id": task, "score": score, "workflow": text} for step, task, score, text in [
        (0, "a", 0.0, "Plan"), (0, "b", 1.0, "n1:Plan -> n2:(n2.1:Verify ? n2.2:Revise : done)"),
        (2, "a", 0.5, "[Custom, Custom]"), (2, "b", 1.0, "(Review) * 3"), (2, "b", 0.9, ""), (2, "c", None, "Plan")]]
    assert report.operators_by_difficulty(rows) == {"qa": [
        {"difficulty": "hard", "tasks": 1, "operators": [1, 2]}, {"difficulty": "easy", "tasks": 1, "operators": [3, 0.5]}]}
