"""eval.py, stats.py, play.py and the baselines of an evaluation: numbers checkable by hand, programs as users run them."""

import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted import add, parallel

import baselines
import eval as evaluation
import operators
import play
import stats
from backends import CachedBackend, ExecutorError, Reply, Request, SimulatedBackend, Usage
from canvas import Canvas, CanvasConfig
from convert import write_tasks
from graph import Graph
from metrics import evaluation_record
from policy import ChatTokenizer
from rollout import Trajectory
from tasks import Task, toy_tasks

ROOT = Path(__file__).parent.parent
LIBRARY = operators.library()


def record(task: str = "a", score: float = 1.0, **more: object) -> dict:
    """A record with what stats.py reads."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "calls": 2, "cached": 0}
    return {"method": "policy", "task_id": task, "run": 0, "source": "gsm8k", "kind": "math", "score": score, "em": score, "f1":
            score, "dropped": "", "parts": {"diversity": 1.0}, "turns": [], "operators": 3, "operator_types": 2, "usage": usage,
            "n_policy_tokens": 7, "seconds": 1.0, "dollars": 0.5, "stop_reason": "finished", "workflow": "Plan",
            "judge": "", **more}


# ---- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right", "p"), [
    ([1] * 10 + [0] * 2, [0] * 10 + [1] * 2, 2 * (1 + 12 + 66) / 4096),  # 10 against 2 of 12 discordant tasks
    ([1] * 5, [0] * 5, 2 / 32), ([1, 0], [0, 1], 1.0), ([1, 1, 0], [1, 1, 0], 1.0),
    ([1] * 5 + [1] * 90, [0] * 5 + [1] * 90, 2 / 32),  # tasks on which both agree say nothing
])
def test_mcnemar_counts_only_discordant_tasks(left: list[int], right: list[int], p: float) -> None:
    assert stats.mcnemar(left, right) == pytest.approx(p)
    assert stats.mcnemar(right, left) == pytest.approx(p)


def test_the_interval_is_that_of_the_mean() -> None:
    """Half of 400 tasks right: the normal approximation is 0.5 +- 1.96 * 0.5 / 20."""
    mean, low, high = stats.interval([0.0, 1.0] * 200)
    assert (mean, low, high) == (0.5, pytest.approx(0.451, abs=0.004), pytest.approx(0.549, abs=0.004))


def test_runs_of_a_task_are_averaged_before_tasks_are_resampled() -> None:
    """One task always right and one always wrong: the mean is 0.5, however often each was played."""
    row = stats.row("all", [record("a", 1.0, run=i) for i in range(50)] + [record("b", 0.0, run=i) for i in range(2)])
    assert (row["score"], row["low"], row["high"], row["tasks"]) == (0.5, 0.0, 1.0, 2)
    assert stats.by_task([record("a", 1.0), record("a", 0.0, run=1), record("a", 0.5, run=2)], stats._score) == {"a": 0.5}
    assert stats.row("all", [record("a", 1.0), record("a", 0.0, run=1), record("b", 1.0)])["score"] == 0.75


def test_the_paired_bootstrap_agrees_with_a_z_test() -> None:
    rng = random.Random(0)
    differences = [rng.gauss(0.02, 0.2) for _ in range(300)]
    mean = sum(differences) / 300
    sd = (sum((d - mean) ** 2 for d in differences) / 300) ** 0.5
    z = abs(mean) / (sd / 300**0.5)
    assert stats.paired_bootstrap(differences) == pytest.approx(2 * (1 - 0.5 * (1 + math.erf(z / 2**0.5))), abs=0.02)
    assert stats.paired_bootstrap([0.5, 0.5, 0.5]) == 0.25  # three tasks cannot prove much
    assert stats.paired_bootstrap([0.0] * 40) == 1.0


def test_the_test_fits_the_scores() -> None:
    ones, zeros = [record(str(i), 1.0) for i in range(6)], [record(str(i), 0.0) for i in range(6)]
    assert stats.compare(ones, zeros)["test"] == "McNemar"
    assert stats.compare(ones, zeros)["p"] == 2 / 64
    halves = [record(str(i), 0.5) for i in range(6)]
    assert stats.compare(ones, halves)["test"] == "paired bootstrap"
    twice = ones + [record(str(i), 1.0, run=1) for i in range(6)]  # runs of a task are not independent
    assert stats.compare(twice, zeros)["test"] == "paired bootstrap"
    assert stats.compare(ones, zeros[:3])["tasks"] == 3
    assert stats.compare(ones, [record("z")]) == {"tasks": 0}


def test_failures_are_zeros_in_the_headline_and_shown_apart() -> None:
    row = stats.row("all", [record("a"), record("b", 1.0, dropped="grader_error"), record("c", 1.0, dropped="executor_error"),
                            record("d", 1.0, stop_reason="max_turns")])
    assert (row["score"], row["em"], row["f1"]) == (0.5, 0.5, 0.5)
    assert (row["failed"], row["grader_errors"], row["unfinished"]) == (0.5, 1, 0.25)


def test_one_unknown_price_makes_the_cost_unknown() -> None:
    assert stats.row("x", [record(), record("b")])["dollars"] == 0.5
    row = stats.row("x", [record(), record("b", dollars=None)])
    assert row["dollars"] is None
    assert "unknown" in stats.table([row])
    assert max(map(len, stats.table([row]).splitlines())) <= 110


def test_a_table_has_rows_for_sources_kinds_groups_and_all() -> None:
    records = [record(), record("b", source="nq", kind="qa"), record("c", source="hotpotqa", kind="qa")]
    rows = stats.rows(records, iid=["gsm8k", "hotpotqa"])
    assert [(row["source"], row["tasks"]) for row in rows] == [
        ("gsm8k", 1), ("hotpotqa", 1), ("nq", 1), ("kind math", 1), ("kind qa", 2), ("IID", 2), ("OOD", 1), ("all", 3)]
    assert [row["metric"] for row in rows][:3] == ["accuracy", "F1", "F1"]


def trajectory(mask: list[int], usage: Usage) -> Trajectory:
    canvas = SimpleNamespace(graph=Graph.from_text("Plan -> Custom -> Custom"), usage=usage)
    return Trajectory(Task("t", "nq", "qa", "?", ("x",)), 0, canvas=canvas, tokens=[0] * len(mask), mask=mask,
                      stop_reason="finished", parts=None, grade=SimpleNamespace(score=1.0, em=1.0, f1=1.0, error=""))


@pytest.mark.parametrize(("mask", "executor", "price", "dollars"), [
    ([0, 0, 1, 1, 0, 0, 0, 1], 0.25, (100_000, 1_000_000), 0.25 + 0.1 * (2 + 7) + 1.0 * 3),  # turns read 2 and 7 tokens
    ([0, 0, 1, 1], 0.25, None, None), ([0, 0, 1, 1], None, (1, 1), None), ([], 0.25, None, 0.25),
])
def test_dollars_hold_policy_and_executor(mask: list[int], executor: float | None, price: tuple | None,
                                          dollars: float | None) -> None:
    for usage in (Usage(1, 0, 10, 5, 0.0, executor), Usage(1, 0, 10, 5, 0.0, executor).again()):  # live, or from a cache
        found = evaluation_record(trajectory(mask, usage), "policy", price)
        assert found["dollars"] == (None if dollars is None else pytest.approx(dollars))
    assert (found["operators"], found["operator_types"]) == (3, 2)


# ---- baselines --------------------------------------------------------------------------------------------------------


class Scripted:
    """An executor that says what `reply(attempt)` says and counts ten tokens a call."""

    name, instant = "scripted", True

    def __init__(self, reply: Callable[[int], str]) -> None:
        self.reply, self.seen = reply, []

    def complete(self, request: Request) -> Reply:
        self.seen.append(request.text)
        return Reply(self.reply(len(self.seen) - 1), Usage(1, 0, 6, 4, dollars=None))


def canvases(backend: object) -> Callable[[Task], Canvas]:
    return lambda task: Canvas(task, {"Plan": LIBRARY["Plan"]}, backend, CanvasConfig())


QUESTION = Task("q", "nq", "qa", "Who?", ("Ann",))


def test_direct_asks_the_executor_once_whatever_the_library_is() -> None:
    backend = Scripted(lambda i: "<thought>hm</thought><answer>Ann</answer>")
    canvas = baselines.direct(QUESTION, canvases(backend))
    assert (canvas.answer, len(backend.seen), canvas.usage.calls) == ("Ann", 1, 1)


@pytest.mark.parametrize(("budget", "calls"), [(0, 1), (9, 1), (10, 1), (19, 1), (20, 2), (55, 5), (10_000, 64)])
def test_self_consistency_spends_what_the_policy_spent(budget: int, calls: int) -> None:
    backend = Scripted(lambda i: "<answer>Ann</answer>")
    canvas = baselines.self_consistency(QUESTION, canvases(backend), budget)
    assert (len(backend.seen), canvas.usage.calls, canvas.usage.prompt_tokens) == (calls, calls, 6 * calls)
    assert len(set(backend.seen)) == calls  # each attempt asks for another sample, also at temperature 0


def test_self_consistency_votes_over_equal_results() -> None:
    replies = ["Bob", "the Ann!", "Cid", "ann"]
    canvas = baselines.self_consistency(QUESTION, canvases(Scripted(lambda i: f"<answer>{replies[i]}</answer>")), 40)
    assert canvas.answer == "the Ann!"
    sums = Task("m", "gsm8k", "math", "?", ("1000",))
    replies = ["7", "1,000", r"\boxed{1000}", "8"]
    canvas = baselines.self_consistency(sums, canvases(Scripted(lambda i: f"<answer>{replies[i]}</answer>")), 40)
    assert canvas.answer == "1,000"


def test_self_consistency_lets_programs_vote_that_pass_the_public_tests() -> None:
    task = Task("c", "toy_code", "code", "?", ("",), "f", "assert f(1) == 2", "assert f(2) == 3")
    replies = ["def f(x): return 2 * x + 1", "def f(x): return 2 * x + 1", "def f(x): return x + 1"]
    backend = Scripted(lambda i: f"```python\n{replies[i]}\n```")
    assert baselines.self_consistency(task, canvases(backend), 30).answer == replies[2]


def test_a_baseline_that_loses_its_executor_is_a_failure() -> None:
    def fail() -> Canvas:
        raise ExecutorError("gone")

    tau = evaluation.answer_of(QUESTION, 0, fail, SimpleNamespace(new_canvas=canvases(None)))
    assert (tau.dropped, tau.error, evaluation_record(tau, "direct")["score"]) == ("executor_error", "gone", 0.0)


# ---- the programs -----------------------------------------------------------------------------------------------------


def run_eval(*words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        evaluation.main()


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The flags of an evaluation of six tasks that takes seconds."""
    path = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    write_tasks(str(path), [task for source in ("toy_math", "toy_qa") for task in toy_tasks(source, 3, 9)])
    return ["--model", tiny_model, "--data", path, "--max-turns", 2, "--max-context", 1200]


BASELINES = ["--baseline", "direct", "self-consistency", "random", "untrained", "fixed:plan -> [Custom, programmer] -> Aggregate"]


def test_an_evaluation_writes_tables_and_goes_on_where_it_was_stopped(small: list, tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "whole"
    run_eval(*small, "--out", out, *BASELINES)
    shown = capsys.readouterr().out
    for text in ("a simulation, no LLM", "policy against self-consistency", "toy_qa", "contamination: unknown", "McNemar", "OOD"):
        assert text in shown
    whole = json.loads((out / "eval.json").read_text())
    assert (out / "eval.md").read_text().count("| toy_math") == 2 * 6 + 5 + 1  # two tables a method, five comparisons, hacks
    assert len((out / "trajectories.jsonl").read_text().splitlines()) == 6 * 6

    torn = tmp_path / "torn"  # killed in the middle of its 20th line
    torn.mkdir()
    shutil.copy(out / "args.json", torn)
    text = (out / "trajectories.jsonl").read_text().splitlines(keepends=True)
    (torn / "trajectories.jsonl").write_text("".join(text[:19]) + text[19][:40])
    flags = json.loads((torn / "args.json").read_text())
    flags["flags"]["out"] = str(torn)
    (torn / "args.json").write_text(json.dumps(flags))
    run_eval(*small, "--out", torn, "--resume", *BASELINES)
    again = json.loads((torn / "eval.json").read_text())
    assert len((torn / "trajectories.jsonl").read_text().splitlines()) == 36
    assert sorted(map(str, again["scores"])) == sorted(map(str, whole["scores"]))

    capsys.readouterr()
    run_eval("--compare", out, torn / "eval.json")
    assert "| all       | 6     |" in capsys.readouterr().out


def test_a_recorded_evaluation_and_its_replays_give_the_same_table(small: list, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch,
                                                                   capsys: pytest.CaptureFixture) -> None:
    """Every number but the seconds: tokens, calls and the attempts of self-consistency too, which tokens pay for."""
    edits = [add("Plan"), add("Custom"), parallel("Custom, AnswerGenerate")]
    monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: edits[sum(ids) % 3])  # the small policy writes no legal edit

    def numbers(name: str, *words: object) -> tuple[str, list[dict]]:
        run_eval(*small, "--limit", 2, "--executor-cache", tmp_path / "cache", "--out", tmp_path / name, *words, *BASELINES)
        found = json.loads((tmp_path / name / "eval.json").read_text())
        for rows in [found["rows"], *found["baselines"].values()]:
            for row in rows:
                del row["seconds"]
        return json.dumps([found["rows"], found["baselines"], found["comparisons"], found["scores"]]), found

    recorded, found = numbers("record")
    capsys.readouterr()
    assert numbers("first", "--replay")[0] == numbers("second", "--replay")[0] == recorded
    assert "executor replay of simulated (a simulation, no LLM)" in capsys.readouterr().out
    assert found["baselines"]["direct"][-1]["executor_calls"] == 1
    assert found["baselines"]["self-consistency"][-1]["executor_calls"] > 1


@pytest.mark.parametrize(("words", "message"), [
    (["--baseline", "best"], "known are direct, self-consistency, random, untrained"),
    (["--baseline", "fixed:Plan -> Nonsense"], "unknown operator 'Nonsense'"),
    (["--baseline", "fixed:Plan ->"], "--baseline 'fixed:Plan ->'"),
    (["--resume"], "--resume needs --out"), (["--runs", "0"], "must be at least 1"),
    (["--judge-url", "http://x"], "--judge-url and --judge-model belong together"),
    (["--judge-model", "m"], "--judge-url and --judge-model belong together"),
    (["--judge-key-env", "KEY"], "--judge-key-env belongs to --judge-url"),
    (["--judge-url", "ftp://x", "--judge-model", "m"], "is no server's URL"),
    (["--judge-url", "http://x", "--judge-model", "m", "--judge-key-env", "NOT_SET_17"], "NOT_SET_17 (--judge-key-env) is empty"),
    (["--judge-url", "http://x", "--judge-model", "m", "--ask", "What?"], "a question of --ask has none"),
    (["--save-workflow", "w.json"], "needs --ask"), (["--ask", " "], "the question is empty"),
    (["--compare", "nowhere.json", "nowhere.json"], "No such file"),
])
def test_mistakes_are_told_before_anything_is_played(small: list, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_eval(*small, *words)
    assert message in str(exit_.value.code)


def test_an_evaluation_does_not_go_on_with_other_flags(small: list, tmp_path: Path) -> None:
    run_eval(*small, "--limit", 1, "--out", tmp_path / "e")
    with pytest.raises(SystemExit, match="go on with it by --resume"):
        run_eval(*small, "--limit", 1, "--out", tmp_path / "e")
    with pytest.raises(SystemExit, match="other flags than before: temperature"):
        run_eval(*small, "--limit", 1, "--out", tmp_path / "e", "--resume", "--temperature", 0.5)


def test_contamination_is_counted_by_problem() -> None:
    train = toy_tasks("toy_math", 4, 0)
    assert evaluation.contamination(train, train[:2] + toy_tasks("toy_qa", 2, 0)) == (
        "contamination: 2 of 4 evaluated tasks stand in the training tasks (toy_math 2 of 2)")
    assert "unknown" in evaluation.contamination(None, train)


def test_a_question_is_asked_its_workflow_saved_and_run_on_another(small: list, tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture) -> None:
    saved = tmp_path / "w.json"
    run_eval(*small, "--ask", "Who wrote Emma?", "--save-workflow", saved)
    shown = capsys.readouterr().out
    assert "[turn 1]" in shown
    assert "answer: " in shown
    assert play.SIMULATED_NOTE in shown
    play.main(["run", str(saved), "--question", "Who wrote Persuasion?"])
    assert f"workflow: {json.loads(saved.read_text())['workflow']}" in capsys.readouterr().out


def test_a_saved_workflow_keeps_ids_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    canvas = Canvas(QUESTION, LIBRARY, SimulatedBackend(), CanvasConfig())
    for text in ("<action>add</action><operator>Plan</operator><prompt>Plan it.</prompt>",
                 "<action>add</action><structure>parallel</structure><operators>Custom, Programmer</operators>",
                 "<action>delete</action><target>n1</target>",
                 "<action>set_prompt</action><target>n2.2</target><prompt>Compute it.</prompt>"):
        assert canvas.step(text).ok
    play.save_workflow(tmp_path / "w.json", canvas)
    graph, kind = play.load_workflow(tmp_path / "w.json")
    assert graph.to_text(ids=True) == canvas.graph.to_text(ids=True)
    assert [node.prompt for node in graph.nodes()] == [None, "Compute it."]
    assert kind == "qa"
    play.main(["run", str(tmp_path / "w.json"), "--question", "How many?"])
    assert "n2.2 Programmer: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"workflow": "Plan ->"}', '{"workflow": "Plan", "prompts": {"n9": "x"}}',
                                  '{"workflow": "Plan", "prompts": {"n1": 5}}', '{"workflow": "Nonsense"}', '{"workflow": 3}'])
def test_a_file_that_is_no_workflow_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        play.main(["run", str(tmp_path / "w.json"), "--question", "?"])
    assert "w.json" in str(exit_.value.code)


def test_self_consistency_asks_as_often_when_a_cache_answers(tmp_path: Path) -> None:
    """A reply from the cache counts the tokens that it took when it was recorded."""
    backend = CachedBackend(tmp_path, SimulatedBackend())
    budget = 5.5 * sum(baselines.direct(QUESTION, canvases(SimulatedBackend())).usage.to_dict()[name]
                       for name in ("prompt_tokens", "completion_tokens"))
    first, again = (baselines.self_consistency(QUESTION, canvases(backend), budget) for _ in range(2))
    assert (first.usage.calls, first.usage.cached) == (again.usage.cached, again.usage.calls) == (4, 0)
    assert (first.usage.prompt_tokens, first.answer) == (again.usage.prompt_tokens, again.answer)
