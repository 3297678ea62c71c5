"""Whole runs of train.py and eval.py with an executor over HTTP: record and replay, faults, a server that dies, the key."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fault_server import Answer, Behaviour, FaultServer, completion, reply, status
from safetensors.torch import load_file
from scripted import FINISH, add, parallel
from test_train import TIMINGS, fails

import backends
import eval as evaluation
import train
from policy import ChatTokenizer
from rundir import RunDir

Serve = Callable[..., FaultServer]
SMALL = ["--tasks-per-source", "1", "--rollouts-per-task", "2", "--eval-tasks", "1", "--max-turns", "3", "--save-every", "10",
         "--max-context", "1200", "--max-new-tokens", "8", "--executor-model", "m"]
KEY = "sk-secret-77"
EDITS = [add("Custom"), parallel("Custom, AnswerGenerate"), add("Plan"), add("Custom", "Be brief."), FINISH]


@pytest.fixture(autouse=True)
def legal_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canvas reads legal edits, which ones being a function of what was sampled: the small policy writes none."""
    monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: EDITS[sum(ids) % len(EDITS)])


def run(program: object, *words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, words)])
        program.main()


def logged(path: Path) -> list[dict]:
    """metrics.jsonl without what a clock or a cache decides."""
    return [{name: value for name, value in row.items() if not TIMINGS.search(name) and not name.startswith("executor_")}
            for row in RunDir(path).read("metrics.jsonl")]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(RunDir(path).latest() / "adapter_model.safetensors")


def quoting(server: FaultServer) -> Callable[[int], Answer]:
    """Answers that differ from call to call, as a model's at a temperature do, and quote whatever the client sent."""
    def answer(number: int) -> Answer:
        usage = {"prompt_tokens": 1000, "completion_tokens": 100}
        return completion(f"{server.calls[-1].headers.get('authorization')} says: the answer is {number}.", usage=usage)
    return answer


def test_a_recorded_run_replays_bit_for_bit_without_server_and_key_and_the_key_is_in_no_file(
        tmp_path: Path, tiny_model: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    server = serve(reply())
    server.answer = quoting(server)
    words = ["--model", tiny_model, "--steps", 2, *SMALL, "--executor-url", server.url, "--executor-cache", tmp_path / "cache"]
    monkeypatch.setenv("MY_KEY", KEY)
    run(train, "--out", tmp_path / "recorded", *words, "--executor-key-env", "MY_KEY", "--executor-prices", 2, 10)
    live = len(server.calls)
    server.stop()
    monkeypatch.delenv("MY_KEY")
    run(train, "--out", tmp_path / "replayed", *words, "--executor-key-env", "MY_KEY", "--executor-prices", 2, 10, "--replay")
    assert len(server.calls) == live > 10

    free = [{**row, "dollars": 0.0} for row in logged(tmp_path / "recorded")]
    assert free == logged(tmp_path / "replayed")
    first, second = weights(tmp_path / "recorded"), weights(tmp_path / "replayed")
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    dollars = [row["dollars"] for row in logged(tmp_path / "recorded")]
    assert all(cost > 0 for cost in dollars)
    assert sum(dollars) <= live * 0.003 + 1e-9  # 1000 * 2 + 100 * 10 dollars for a million

    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert b'"--executor-key-env"' not in everything[0]
    assert any(b"MY_KEY" in content for content in everything)  # its name may be known
    assert not any(KEY.encode() in content for content in everything)
    assert any(b"Bearer *** says" in content for content in everything)
    assert not any(KEY in text for text in capfd.readouterr())


def test_a_replay_of_what_was_not_recorded_names_the_call(
        tmp_path: Path, tiny_model: Path, serve: Serve, capsys: pytest.CaptureFixture) -> None:
    words = ["--model", tiny_model, "--steps", 1, *SMALL, "--executor-url", serve(reply()).url]
    (tmp_path / "cache").mkdir()
    message = fails(capsys, train.main, "--out", tmp_path / "run", *words, "--executor-cache", tmp_path / "cache", "--replay")
    assert "executor_error: replay: no recorded reply for " in message
    assert " on toy_" in message


def test_a_trajectory_whose_call_was_refused_is_dropped_and_the_step_goes_on(
        tmp_path: Path, tiny_model: Path, serve: Serve) -> None:
    refused = []

    def refuse_one(number: int) -> Behaviour | Answer:
        training = "before" in phase
        if training and not refused:
            refused.append(number)
            return status(400, content=b"content policy")
        return completion()

    phase = []
    evaluate = train.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *args, label, **kwargs: (evaluate(*args, label=label, **kwargs),
                                                                        phase.append(label))[0])
        run(train, "--out", tmp_path / "run", "--model", tiny_model, "--steps", 2, *SMALL, "--no-baselines",
            "--executor-url", serve(answer=refuse_one).url)
    first, second = RunDir(tmp_path / "run").read("metrics.jsonl")
    assert (first["trajectories"], first["dropped"], first["dropped/executor_error"]) == (6, 1, 1)
    assert (second["trajectories"], second["dropped"]) == (6, 0)
    [lost] = [tau for tau in RunDir(tmp_path / "run").read("trajectories.jsonl") if tau["dropped"]]
    assert (lost["stop_reason"], lost["reward"], lost["advantage"]) == ("executor_error", None, None)
    assert "HTTP 400: content policy" in lost["error"]


def test_a_run_whose_server_dies_stops_with_its_steps_saved_and_goes_on_elsewhere(
        tmp_path: Path, tiny_model: Path, serve: Serve, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "PATIENCE", 0.1)
    server, out, append = serve(reply()), tmp_path / "run", RunDir.append

    def die_after_two_steps(self: RunDir, name: str, *records: dict) -> None:
        append(self, name, *records)
        if name == "metrics.jsonl" and records[0]["step"] == 1:
            server.stop()

    monkeypatch.setattr(RunDir, "append", die_after_two_steps)
    message = fails(capsys, train.main, "--out", out, "--model", tiny_model, "--steps", 3, *SMALL, "--no-baselines",
                    "--executor-timeout", 2, "--executor-url", server.url)
    assert "continue with --resume" in message
    assert "Connection refused" in message
    assert (out / "latest").read_text() == "checkpoints/step_000002\n"
    run(train, "--resume", "--out", out, "--executor-url", serve(reply()).url)
    assert [row["step"] for row in logged(out)] == [0, 1, 2]


def test_a_run_without_an_executor_ends_before_its_first_step(
        tmp_path: Path, tiny_model: Path, serve: Serve, capsys: pytest.CaptureFixture) -> None:
    words = ["--model", tiny_model, *SMALL, "--executor-url", serve(status(401, content=b"who are you?")).url]
    message = fails(capsys, train.main, "--out", tmp_path / "run", *words)
    assert "HTTP 401: who are you? (the server wants a key; name the environment variable" in message
    assert not (tmp_path / "run/before.json").exists()  # no table of zeros


@pytest.mark.parametrize(("words", "expected"), [
    (["--executor-extra", "{}"], "--executor-extra belongs to --executor-url"),
    (["--executor-key-env", "A"], "--executor-key-env belongs to --executor-url"),
    (["--executor-extra", "[]"], "no JSON object"), (["--executor-extra", '{"seed": NaN}'], "no JSON object"),
    (["--executor-extra", "[" * 100_000], "no JSON object"),
    (["--executor-extra", '{"stream": true}'], "stream cannot be set here"),
    (["--executor-timeout", "nan"], "--executor-timeout"), (["--executor-concurrency", 0], "--executor-concurrency"),
    (["--executor-url", "http://h", "--executor-model", "m", "--executor-prices", -1, 2], "--executor-prices"),
    (["--executor-url", "http://h", "--executor-model", "m", "--executor-key-env", "NOT_SET"], "NOT_SET"),
    (["--executor-url", "h:80", "--executor-model", "m"], "must begin with http"),
    (["--executor-cache", "no_such_directory", "--replay"], "no_such_directory"),
])
def test_bad_executor_flags_get_one_clear_message(words: list, expected: str, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture) -> None:
    for program in (train, evaluation):
        assert expected in fails(capsys, program.main, "--out", tmp_path / "run", *words)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("calls", "workers"), [("2", 32), ("32", 32), ("100", 100)])
def test_training_has_a_worker_for_every_call_that_may_be_made_at_one_time(calls: str, workers: int) -> None:
    args = train.parse_args(["--max-context", "1200", "--executor-concurrency", calls])
    world = SimpleNamespace(backend=SimpleNamespace(lockstep=False))
    assert evaluation.rollout_config(args, world).workers == workers
