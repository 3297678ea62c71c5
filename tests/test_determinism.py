"""One seed, one run: two runs of train.py, the second of them offline from what the first recorded, agree bit for bit."""

import json
import re
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripted import FINISH, add, conditional, loop, parallel
from test_framing import Says
from test_policy import byte_level_bpe

import operators
import train
from backends import CachedBackend, SimulatedBackend
from canvas import Canvas, CanvasConfig
from edits import Edit, InvalidEdit, parse_edit
from policy import ChatTokenizer
from rollout import Job, RolloutConfig, Trajectory, rollout
from rundir import RunDir
from tasks import toy_tasks

# What a replay may differ in: how long it took, and which calls were live and which answered from the cache.
TIMINGS = re.compile(r"seconds|tokens_per_second|executor_|dollars")
EDITS = [add("Custom"), add("Review"), add("Format"), loop("Custom, Review"), conditional("Verify", "Revise"),
         parallel("Custom, AnswerGenerate"), FINISH]


def generous(text: str) -> Edit | InvalidEdit:
    """Read any text as some edit: a policy as small as that of a test writes hardly any that runs something."""
    return parse_edit(EDITS[zlib.crc32(text.encode()) % len(EDITS)])


def run(out: Path, model: Path, *more: str) -> list[dict]:
    """Train for two steps; return the log."""
    words = ["--model", model, "--steps", 2, "--tasks-per-source", 1, "--rollouts-per-task", 2, "--eval-tasks", 1, "--max-turns",
             3, "--no-baselines", "--max-context", 1200, "--out", out, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, words)])
        patch.setattr("canvas.parse_edit", generous)
        train.main()
    return RunDir(out).read("metrics.jsonl")


def test_two_runs_with_one_seed_agree_and_the_second_needs_no_executor(tmp_path: Path, tiny_model: Path) -> None:
    cache = str(tmp_path / "cache")
    logs = run(tmp_path / "1", tiny_model, "--executor-cache", cache), run(tmp_path / "2", tiny_model, "--executor-cache", cache,
                                                                          "--replay")
    kept = [[{key: value for key, value in row.items() if not TIMINGS.search(key)} for row in log] for log in logs]
    assert kept[0] == kept[1]
    assert {"loss", "grad_norm", "reward", "kl_ref"} <= kept[0][0].keys()
    assert any(row["grad_norm"] > 0 for row in logs[0])
    assert [[row["executor_calls"] > 0 for row in log] for log in logs] == [[True, True], [False, False]]
    weights = [load_file(tmp_path / name / "checkpoints/step_000002/adapter_model.safetensors") for name in "12"]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def play(tokenizer: ChatTokenizer, backend: CachedBackend) -> list[Trajectory]:
    """Play an episode of the same edits on each of six tasks."""
    taus = []
    for task in toy_tasks("toy_math", 3, 0) + toy_tasks("toy_qa", 3, 0):
        taus += rollout([Job(task, 0, 0)], Says(tokenizer, EDITS), tokenizer,
                        lambda task: Canvas(task, operators.library(), backend, CanvasConfig(max_turns=9)),
                        lambda tau: setattr(tau, "reward", float(len(tau.canvas.answer))), RolloutConfig())
    return taus


def written(tau: Trajectory) -> bytes:
    """Everything of an episode but its times, as bytes."""
    turns = [[turn.text, turn.feedback, turn.ok, turn.info] for turn in tau.turns]
    return json.dumps([tau.tokens, tau.mask, tau.sampled_logprobs, turns, tau.stop_reason, tau.canvas.answer, tau.reward,
                       tau.canvas.graph.to_text(ids=True), tau.canvas.state]).encode()


def test_a_recorded_episode_is_replayed_byte_for_byte(tmp_path: Path) -> None:
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    tokenizer = ChatTokenizer(tmp_path)
    first = play(tokenizer, CachedBackend(tmp_path / "cache", SimulatedBackend(0)))
    second = play(tokenizer, CachedBackend(tmp_path / "cache"))
    assert [written(tau) for tau in first] == [written(tau) for tau in second]
    assert {tau.stop_reason for tau in first} == {"finished"}
    assert len({tau.canvas.answer for tau in first}) > 3
    assert (sum(tau.canvas.usage.calls for tau in first) > 40, sum(tau.canvas.usage.calls for tau in second)) == (True, 0)


def test_a_replay_that_leaves_the_record_is_an_executor_error_and_no_made_up_reply(tmp_path: Path) -> None:
    feedback = Canvas(toy_tasks("toy_math", 1, 0)[0], operators.library(), CachedBackend(tmp_path)).step(add("Custom"))
    assert (feedback.stop_reason, feedback.text) == ("executor_error", "")
    assert "no recorded reply for Custom" in feedback.error
