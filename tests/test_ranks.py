"""Several processes are one run: the same step however the work is shared, one set of files, an end when one of them dies."""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_vllm import FakeVLLM, Settings
from forked import Program, as_ranks
from safetensors.torch import load_file
from scripted import TRAIN_WITH_LEGAL_EDITS
from test_update import PLAIN, step
from tiny import V, some_trajectories

import ranks
import train
from cwrpo import update
from flags import UsageError
from lora import add_lora, disable_lora, lora_layers, lora_parameters, read_adapter, save_adapter
from policy import ChatTokenizer
from qwen3 import Qwen3, Qwen3Config
from rundir import RunDir

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", 3, "--tasks-per-source", 1, "--rollouts-per-task", 3, "--eval-tasks", 2, "--max-turns", 3, "--no-baselines",
         "--save-every", 1, "--max-context", 1200]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "size", lambda: size)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_item_goes_to_one_rank_and_the_ranks_have_about_the_same_tokens(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [random.Random(i).randint(100, 9000) for i in range(50)]
    parts = []
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        parts.append(ranks.balanced(lengths, weight=lambda n: n))
    assert sorted(n for part in parts for n in part) == sorted(lengths)
    assert max(map(sum, parts)) < 1.02 * sum(lengths) / size, "tokens are shared, not trajectories"


def test_a_single_long_trajectory_leaves_ranks_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1, 2)
    assert ranks.balanced([7], weight=lambda n: n) == []


@pytest.mark.parametrize(("size", "workers", "n"), [(1, 1, 5), (3, 3, 7), (3, 3, 2), (4, 1, 5)])
def test_shared_work_is_done_once_and_comes_back_in_the_order_of_the_items(size: int, workers: int, n: int,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[int]] = []
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        gather = ranks.shared(range(n), lambda share: [10 * item for item in share], workers)
        monkeypatch.setattr(ranks, "of_all_ranks", lambda mine: done.append(mine) or done)
        if rank < size - 1:                                  # gathers too early: only its share is of interest
            with contextlib.suppress(StopIteration, IndexError):
                gather()
    assert gather() == [10 * item for item in range(n)]
    assert size == 1 or sum(map(len, done)) == n


def in_processes(function: Callable, n: int, *args: object) -> None:
    """Call function(rank, *args) in n processes at once."""
    torch.multiprocessing.start_processes(function, args, n, start_method="forkserver")


# ---- the step ---------------------------------------------------------------------------------------------------------

SHARES = [(3, 1), (1, 2), (5, 1), (None, 2)]                 # how many of five rank 0 gets and rank 1 the rest; epochs


def train_on_rank(rank: int, size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=size)
    results = []
    for cut, epochs in SHARES:
        taus = some_trajectories(5)
        of_rank = [taus[:cut], taus[cut:], [], []][rank] if cut else ranks.balanced(taus, weight=lambda tau: len(tau.tokens))
        results.append(step(of_rank if size > 1 else taus, replace(PLAIN, epochs=epochs, max_grad_norm=0.5)))
    torch.save(results, directory / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_take_the_same_step_as_one_process_whatever_their_shares(size: int, tmp_path: Path) -> None:
    """To float64's rounding, with unequal shares, ranks without any trajectory, several epochs and a clipped norm."""
    in_processes(train_on_rank, size, size, tmp_path)
    for i, (_, epochs) in enumerate(SHARES):
        expected, expected_stats = step(some_trajectories(5), replace(PLAIN, epochs=epochs, max_grad_norm=0.5))
        for rank in range(size):
            moved, stats = torch.load(tmp_path / f"rank{rank}.pt")[i]
            torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-14)
            assert stats == pytest.approx(expected_stats, rel=1e-12, abs=1e-14)
    assert expected_stats["grad_norm"] > 0.5, "clipping must have something to do"


# ---- whole runs -------------------------------------------------------------------------------------------------------


def legal(directory: Path, before: str = "") -> Path:
    """A script like train.py, with a policy whose every turn is a legal edit."""
    script = directory / "legal.py"
    script.write_text(f"import sys; sys.path.insert(0, '.')\n{before}\n{TRAIN_WITH_LEGAL_EDITS}")
    return script


def launch(directory: Path, size: int, *words: object) -> Program:
    """Run train.py in as many processes as torchrun would start; return the first."""
    programs = as_ranks(size, legal(directory), *words, place=directory / f"said{size}")
    for program in programs:
        assert program.ended() == 0, program.err.read_text()
    return programs[0]


@pytest.mark.parametrize("group_by", ["task", pytest.param("source", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(group_by: str, tmp_path: Path, tiny_model: Path) -> None:
    """The same episodes, rewards and advantages, and the same weights to float32's rounding, in one set of files."""
    runs = [tmp_path / "1", tmp_path / "2"]
    for size, out in enumerate(runs, 1):
        launch(tmp_path, size, "--model", tiny_model, "--out", out, "--group-by", group_by, *SMALL)
    printed = [(tmp_path / f"said2/rank{rank}/out").read_text().count("accuracy_trained") for rank in range(2)]
    assert printed == [1, 0], "rank 0 alone prints"
    one, two = (RunDir(out).read("trajectories.jsonl") for out in runs)
    assert len(one) == len(two) == 3 * 9
    for name in ("step", "task_id", "reward", "advantage", "n_tokens", "workflow", "usage"):
        drop = {"seconds"} if name == "usage" else set()
        values = [[{k: v for k, v in r[name].items() if k not in drop} if drop else r[name] for r in log] for log in (one, two)]
        assert values[0] == values[1], name
    assert len({record["advantage"] for record in one}) > 2
    logs = [RunDir(out).read("metrics.jsonl") for out in runs]
    for a, b in zip(*logs, strict=True):
        numbers = {k: v for k, v in a.items() if isinstance(v, float) and not re.search(r"second|sampler|loss", k)}
        assert {k: b[k] for k in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-6)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    weights = [load_file(out / "checkpoints/step_000003/adapter_model.safetensors") for out in runs]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-2, atol=2e-4)
    summaries = [json.loads((out / "summary.json").read_text()) for out in runs]
    assert summaries[0]["accuracy_trained"] == summaries[1]["accuracy_trained"]


DIES = """
import os, signal
from rundir import ReadOnly
def append(self, name, *records):
    if name == "metrics.jsonl" and records[0]["step"] == 1: os.kill(os.getpid(), signal.SIGKILL)
ReadOnly.append = append
"""


def test_a_rank_that_dies_ends_the_run_which_can_be_resumed(tmp_path: Path, tiny_model: Path) -> None:
    """Rank 1 is killed after the second update: rank 0 says so, saves the step it was in, and --resume ends the run."""
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, legal(tmp_path, DIES), "--model", tiny_model, "--out", out, *map(str, SMALL)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert re.search(r"train.py: (rank 0: .* lost another one|interrupted, as all ranks are).*continue with --resume",
                     done.stderr), done.stderr                # whether gloo or torchrun is the first to notice
    assert (out / "latest").read_text() in ("checkpoints/step_000001\n", "checkpoints/step_000002\n")  # torchrun may end it first
    launch(tmp_path, 2, "--resume", "--out", out)
    assert [row["step"] for row in RunDir(out).read("metrics.jsonl")] == [0, 1, 2]


def outlive(rank: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    ranks.of_all_ranks(None)
    if rank:
        os._exit(0)
    with pytest.raises(ranks.RankError, match="rank 0 of 2 lost another one"):
        ranks.of_all_ranks(None)
    (directory / "told").touch()
    os._exit(0)                                              # not through gloo, which would wait


def test_who_waits_for_a_dead_rank_is_told_at_once(tmp_path: Path) -> None:
    in_processes(outlive, 2, tmp_path)
    assert (tmp_path / "told").exists()


def test_ranks_that_differ_refuse_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "of_all_ranks", lambda value: [value, "other"])
    with pytest.raises(ranks.RankError, match="disagree on weights: mine, other"):
        ranks.require_alike(weights="mine")


# ---- sharded weights --------------------------------------------------------------------------------------------------


def small_qwen3(checkpointing: bool) -> Qwen3:
    """In float64, its down_proj as large layers are computed (base and LoRA apart), the others as small ones."""
    torch.manual_seed(0)
    model = Qwen3(Qwen3Config(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                              num_key_value_heads=1, head_dim=8)).eval()
    add_lora(model, rank=2, alpha=4, targets=("q_proj", "o_proj", "down_proj"))
    for name, layer in lora_layers(model).items():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        layer.sum_first = "down_proj" not in name
    model.gradient_checkpointing = checkpointing
    return model.double()


def one_update(model: Qwen3, taus: list, epochs: int) -> tuple[torch.Tensor, list[torch.Tensor], dict]:
    """Logits before, gradients (as the last step of SGD left them), and stats."""
    with torch.no_grad():
        logits = model.head(model.hidden(torch.arange(8).view(2, 4) % V))
    stats = update(model, torch.optim.SGD(lora_parameters(model), lr=0.1), taus, replace(PLAIN, epochs=epochs), disable_lora)
    return logits, [weight.grad for weight in lora_parameters(model)], stats


def shard_on_rank(rank: int, size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=size)
    results = []
    for checkpointing, epochs in ((False, 1), (True, 2)):
        model = small_qwen3(checkpointing)
        whole = sum(weight.numel() for weight in model.model.layers.parameters() if not weight.requires_grad)
        ranks.shard(model, "cpu")
        kept = sum(weight.to_local().numel() for weight in model.model.layers.parameters() if not weight.requires_grad)
        taus = some_trajectories(5)
        results.append((*one_update(model, taus[:1] if rank else taus[1:], epochs), kept / whole))
        save_adapter(model, directory / f"adapter-{rank}-{epochs}")
    torch.save(results, directory / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_sharded_weights_give_the_same_logits_gradients_and_adapter_files(tmp_path: Path) -> None:
    """Rank 1 has one micro-batch and rank 0 several: it must take part in putting layers together for all of them."""
    in_processes(shard_on_rank, 2, 2, tmp_path)
    for i, (checkpointing, epochs) in enumerate(((False, 1), (True, 2))):
        model = small_qwen3(checkpointing)
        logits, gradients, stats = one_update(model, some_trajectories(5), epochs)
        save_adapter(model, tmp_path / "whole")
        for rank in range(2):
            sharded_logits, sharded_gradients, sharded_stats, kept = torch.load(tmp_path / f"rank{rank}.pt")[i]
            torch.testing.assert_close(sharded_logits, logits, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(sharded_gradients, gradients, rtol=1e-10, atol=1e-14)
            assert sharded_stats == pytest.approx(stats, rel=1e-10, abs=1e-14)
            assert kept == pytest.approx(0.5, abs=0.02)
            files = [read_adapter(tmp_path / name) for name in ("whole", f"adapter-{rank}-{epochs}")]
            assert files[0][0] == files[1][0]
            torch.testing.assert_close(files[1][1], files[0][1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("size", "words"), [(1, ["--policy-url", "http://x"]), (2, []),
                                             (2, ["--policy-url", "http://x", "--async-depth", "1"])])
def test_sharding_is_refused_where_it_cannot_work(size: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, size)
    with pytest.raises(UsageError, match=r"--shard needs several processes .* and --policy-url"):
        train.check_flags(train.parse_args(["--shard", *words]))


@pytest.mark.slow
def test_a_sharded_run_on_a_policy_server_trains_as_one_process_does(tmp_path: Path, padded_model: Path) -> None:
    """Rank 0 alone talks to the server; the adapter that it hands over is whole, and its log-probs are the trainer's."""
    server = FakeVLLM(Qwen3.from_pretrained(padded_model).eval(), ChatTokenizer(padded_model), Settings(max_model_len=1200))
    server.start()
    words = ["--model", padded_model, "--policy-url", server.url, *SMALL, "--max-new-tokens", 16]
    try:
        for size, more in ((1, []), (2, ["--shard"])):
            launch(tmp_path, size, *words, *more, "--out", tmp_path / str(size))
    finally:
        server.opened.set()
        server.kill()
    logs = [RunDir(tmp_path / str(size)).read("metrics.jsonl") for size in (1, 2)]
    for a, b in zip(*logs, strict=True):
        for name in ("reward", "grad_norm", "kl_ref", "entropy", "policy_tokens"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
        assert b["sampler_gap_max"] < 1e-4
    weights = [load_file(tmp_path / str(size) / "checkpoints/step_000003/adapter_model.safetensors") for size in (1, 2)]
    assert weights[0].keys() == weights[1].keys()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-2, atol=2e-4)
