"""--async-depth 1: which weights sample which step, that the live ones may move meanwhile, and what a resumed run does."""

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_vllm import FakeVLLM, Settings
from safetensors.torch import load_file
from test_determinism import TIMINGS, generous

import train
from ahead import Rollouts
from backends import ExecutorError
from lora import add_lora, disable_lora, lora_parameters, with_own_lora
from policy import ChatTokenizer
from qwen3 import Qwen3, Qwen3Config
from rundir import RunDir

SMALL = ["--steps", 4, "--tasks-per-source", 1, "--rollouts-per-task", 2, "--eval-tasks", 1, "--max-turns", 3, "--no-baselines",
         "--max-context", 1200, "--async-depth", 1]


def small_model() -> Qwen3:
    torch.manual_seed(0)
    model = Qwen3(Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                              num_key_value_heads=1, head_dim=8)).eval()
    add_lora(model, rank=2, alpha=4)
    return model


def test_a_model_with_lora_of_its_own_shares_the_frozen_weights_and_stays_when_the_other_is_trained() -> None:
    model, ids = small_model(), torch.tensor([[1, 2, 3]])
    own = with_own_lora(model)
    for weight, other in zip(model.parameters(), own.parameters(), strict=True):
        assert (weight.data_ptr() == other.data_ptr()) == (not weight.requires_grad)
    with torch.no_grad():
        before = own(ids)
        for weight in lora_parameters(model):
            weight.add_(0.5)
        assert torch.equal(own(ids), before)
        assert not torch.allclose(model(ids), before)
        with disable_lora(model):                            # as the trainer does for the reference, while the other samples
            assert torch.equal(own(ids), before)


def test_at_depth_1_a_step_is_sampled_by_the_weights_that_the_one_before_began_with() -> None:
    """And it is under way while they move: the sampler waits here until the 'update' is over."""
    model, moved, drawn = small_model(), threading.Event(), []
    sampled = with_own_lora(model)
    [weight, *_], [own, *_] = lora_parameters(model), lora_parameters(sampled)
    first = weight[0, 0].item()

    def play(step: int) -> object:
        assert step == 0 or moved.wait(10)
        drawn.append((step, round(own[0, 0].item() - first)))
        return lambda: [step]

    versions = []
    rollouts = Rollouts(model, sampled, SimpleNamespace(load_adapter=lambda version: versions.append(version)), play, depth=1)
    for step in range(3):
        assert rollouts.take(step) == [step]
        moved.clear()
        rollouts.prefetch(step + 1)
        with torch.no_grad():
            weight.add_(1.0)
        moved.set()
    rollouts.take(3)
    assert drawn == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert versions == [0, 0, 1, 2]


def test_the_importance_weight_is_capped_at_2_by_default_at_depth_1_alone() -> None:
    assert train.parse_args([]).tis_cap is None
    assert train.parse_args(["--async-depth", "1"]).tis_cap == 2
    assert train.parse_args(["--async-depth", "1", "--tis-cap", "5"]).tis_cap == 5


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out), *map(str, words)])
    monkeypatch.setattr("canvas.parse_edit", generous)
    train.main()


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at depth 1 that was left alone."""
    out = tmp_path_factory.mktemp("ahead") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, out, "--model", tiny_model, *SMALL)
    return out


@pytest.mark.parametrize(("save_every", "fault"), [(1, "log"), (3, "log"), (9, "rollout")])
def test_a_run_at_depth_1_that_was_cut_off_resumes_to_the_same_bits(save_every: int, fault: str, tmp_path: Path, tiny_model: Path,
                                                                    whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds the weights that sample the next step: with one of this step, of one before, of the error itself."""
    words = ["--model", tiny_model, "--save-every", save_every, *SMALL]
    with monkeypatch.context() as patch:
        append, rollout, calls = RunDir.append, train.rollout, []

        def full(self: RunDir, name: str, *records: dict) -> None:
            if name == "metrics.jsonl" and records[0]["step"] == 3:
                raise OSError("No space left on device")
            append(self, name, *records)

        def broken(*args: object) -> list:
            calls.append(args)
            if len(calls) == 3:
                raise ExecutorError("it is down")
            return rollout(*args)

        if fault == "log":
            patch.setattr(RunDir, "append", full)
        else:
            patch.setattr(train, "rollout", broken)
        with pytest.raises(SystemExit, match=r"No space left|it is down"):
            run(patch, tmp_path / "cut", *words)
    run(monkeypatch, tmp_path / "cut", "--resume")
    logs = [[{key: value for key, value in row.items() if not TIMINGS.search(key)} for row in RunDir(out).read("metrics.jsonl")]
            for out in (whole, tmp_path / "cut")]
    assert logs[0] == logs[1]
    weights = [load_file(out / "checkpoints/step_000004/adapter_model.safetensors") for out in (whole, tmp_path / "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    log = RunDir(tmp_path / "cut").read("trajectories.jsonl")
    assert {(record["step"], record["version"]) for record in log} == {(0, 0), (1, 0), (2, 1), (3, 2)}
    assert logs[0][2]["sampler_kl"] > logs[0][0]["sampler_kl"], "from step 1 on the sampler lags behind the trainer"


def test_a_policy_server_gets_the_adapter_that_a_step_is_to_be_sampled_with(tmp_path: Path, padded_model: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed over, and compared with the trainer's, while the live weights are trained."""
    server = FakeVLLM(Qwen3.from_pretrained(padded_model).eval(), ChatTokenizer(padded_model), Settings(max_model_len=1200))
    server.start()
    try:
        run(monkeypatch, tmp_path / "run", "--model", padded_model, "--policy-url", server.url, *SMALL, "--max-new-tokens", 16)
    finally:
        server.opened.set()
        server.kill()
    log = RunDir(tmp_path / "run").read("trajectories.jsonl")
    assert {(record["step"], record["version"]) for record in log} == {(0, 0), (1, 0), (2, 1), (3, 2)}
    assert not any(record["dropped"] for record in log)
    loaded = [name.split("-v")[1].split("-")[0] for kind, name, *_ in server.events if kind == "load"]
    assert loaded == ["0", "0", "0", "1", "2", "4"], "one to be checked, one a step, one to evaluate"
