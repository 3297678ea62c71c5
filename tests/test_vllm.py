"""A real vLLM server on the CPU: the contract that vllm_sampler.py relies on, and whole runs against it.

scripts/install_vllm_cpu.sh makes its environment, scripts/serve_vllm.sh starts it, once for this file; its base model is the
tiny policy with a padded vocabulary and with sampling defaults that are not ours.
"""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import requests
import torch
from forked import Program
from scripted import TRAIN_WITH_LEGAL_EDITS

from lora import add_lora, lora_layers, merge
from policy import ChatTokenizer, Sample, SampleRequest, sampling_logprobs
from qwen3 import Qwen3
from rundir import RunDir
from vllm_check import checks
from vllm_sampler import VLLMSampler

ROOT = Path(__file__).parent.parent
VERSION = re.search(r"^vllm-cpu==(.+)$", (ROOT / "requirements-vllm-cpu.txt").read_text(), re.MULTILINE)[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ENV = Path(os.environ.get("VLLM_ENV") or CACHE / "flowsteer" / f"vllm-cpu-{VERSION}")
pytestmark = pytest.mark.skipif(not (ENV / "installed").exists(), reason=f"no vLLM in {ENV}: see scripts/install_vllm_cpu.sh")

CONTEXT = 1200
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SMALL = ["--steps", 3, "--tasks-per-source", 1, "--rollouts-per-task", 2, "--eval-tasks", 1, "--max-turns", 3, "--no-baselines",
         "--max-context", CONTEXT]


class Server:
    """scripts/serve_vllm.sh in the background."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.model, self.directory = model, directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and return once it is ready."""
        self.script = subprocess.Popen(
            ["bash", ROOT / "scripts/serve_vllm.sh", self.model, "--port", str(self.port)],
            cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"VLLM_ENV": str(ENV), "VLLM_CPU_KVCACHE_SPACE": "1",
                              "VLLM_ENABLE_V1_MULTIPROCESSING": "0",    # one process less to start: a quarter of the time
                              "PYTHONDONTWRITEBYTECODE": ""})           # else each of them compiles what it imports
        said = ""
        for line in self.script.stdout:
            said += line
            if line.startswith("ready after"):
                break
        assert "ready after" in said, said
        self.group = int(re.search(r"process group (\d+)", said)[1])

    def kill(self) -> None:
        """As a crash of the machine: all of its processes at once."""
        os.killpg(self.group, signal.SIGKILL)
        self.script.communicate(timeout=60)

    def stop(self) -> None:
        self.script.send_signal(signal.SIGTERM)
        self.script.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(padded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(padded_model, tmp_path_factory.mktemp("vllm"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def sampler(server: Server, padded_model: Path, tmp_path: Path) -> Iterator[VLLMSampler]:
    model = Qwen3.from_pretrained(padded_model)
    add_lora(model, 8, 16, 0.0, TARGETS.split(","), torch.Generator().manual_seed(0))
    sampler = VLLMSampler(server.url, model, ChatTokenizer(padded_model), tmp_path / "run.adapters", temperature=0.8, top_k=50,
                          top_p=0.95, max_context=CONTEXT)
    yield sampler
    sampler.close()


@torch.no_grad()
def change_weights(model: Qwen3, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=generator))


def sample(sampler: VLLMSampler, n: int = 8, room: int = 32, seed: int = 0) -> list[tuple[SampleRequest, Sample]]:
    prompts = [sampler.tokenizer.prompt_ids("You design workflows." * (1 + i), f"What is {i} + {seed}?") for i in range(n)]
    requests = [SampleRequest(i, prompt, room, seed=2**62 + 100 * seed + i) for i, prompt in enumerate(prompts)]
    return [(request, future.result(300)) for request, future in zip(requests, sampler.submit(requests), strict=True)]


@torch.no_grad()
def our_logprobs(model: Qwen3, sampler: VLLMSampler, request: SampleRequest, ids: Sequence[int]) -> list[float]:
    """Of every sampled id, by our own network, under the distribution that the sampler was made with."""
    logits = model(torch.tensor([request.tokens + ids]))[0, len(request.tokens) - 1:-1]
    wanted = {name: sampler.distribution[name] for name in ("temperature", "top_p", "top_k")}
    logprobs = sampling_logprobs(logits, vocab_limit=sampler.tokenizer.vocab_size, **wanted)
    return logprobs[torch.arange(len(ids)), ids].tolist()


def gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_the_server_that_the_script_starts_passes_every_check(sampler: VLLMSampler) -> None:
    results = list(checks(sampler))
    assert [(result.name, result.ok) for result in results if not result.ok] == []
    assert len(results) == 8


def test_sampled_ids_and_logprobs_agree_with_our_network(sampler: VLLMSampler) -> None:
    """At temperature 0.8, top-p 0.95, top-k 50 over a padded vocabulary, with an adapter; again with the same seeds."""
    change_weights(sampler.model, seed=1)
    sampler.load_adapter(version=1)
    first = sample(sampler)
    assert sum(len(turn.ids) for _, turn in first) > 50
    gaps = [gap(our_logprobs(sampler.model, sampler, request, turn.ids), turn.logprobs) for request, turn in first]
    print(f"largest difference of {sum(len(turn.ids) for _, turn in first)} log-probs: {max(gaps):.1e} nats")
    assert max(gaps) < 1e-5
    assert [turn.ids for _, turn in sample(sampler)] == [turn.ids for _, turn in first]


def test_only_the_end_token_ends_a_turn(sampler: VLLMSampler) -> None:
    """<|endoftext|> is an end token of the model's generation_config.json, but in training it is a token like any other."""
    sampler.load_adapter(version=0)
    pad, end = sampler.tokenizer.pad_id, sampler.tokenizer.end_id
    for token, length, finish in ((pad, 6, "length"), (end, 1, "stop")):
        sampler.distribution["logit_bias"][str(token)] = 100.0
        [(_, turn)] = sample(sampler, n=1, room=6)
        del sampler.distribution["logit_bias"][str(token)]
        assert (turn.ids, turn.finish) == ([token] * length, finish)


def test_more_prompt_tokens_than_a_batch_holds_are_sampled_all_the_same(sampler: VLLMSampler) -> None:
    """vLLM 0.32 on a CPU dies of a seeded request whose prompt it cuts in two: serve_vllm.sh has it cut none."""
    sampler.load_adapter(version=0)
    requests = [SampleRequest(i, sampler.tokenizer.prompt_ids("You design workflows. " * 40, f"What is {i}?"), 2, seed=i)
                for i in range(60)]
    assert sum(len(request.tokens) for request in requests) > 16_000     # max_num_batched_tokens is 2,048 to 8,192
    assert all(len(future.result(300).ids) <= 2 for future in sampler.submit(requests))


def test_five_adapters_in_a_row_sample_as_the_merged_models_do(sampler: VLLMSampler, padded_model: Path) -> None:
    """Each version is compared with W + alpha / r B A in plain linear layers, and is not the version before it."""
    sampler.distribution |= {"top_p": 1.0, "top_k": -1}
    worst, last, moved = 0.0, None, []
    for version in range(1, 6):
        change_weights(sampler.model, seed=version)
        sampler.load_adapter(version=version)
        merged = Qwen3.from_pretrained(padded_model)
        add_lora(merged, 8, 16, 0.0, TARGETS.split(","))
        merged.load_state_dict(sampler.model.state_dict())
        merge(merged)
        turns = sample(sampler, n=4, room=16, seed=7)            # the same prompts for every version
        assert all(turn.version == version for _, turn in turns)
        worst = max(worst, *(gap(our_logprobs(merged, sampler, request, turn.ids), turn.logprobs) for request, turn in turns))
        if last:
            moved.append(max(gap(our_logprobs(last, sampler, request, turn.ids), turn.logprobs) for request, turn in turns))
        last = merged
    print(f"largest difference from the merged models: {worst:.1e} nats; from the version before: at least {min(moved):.1e}")
    assert worst < 1e-5
    assert min(moved) > 1e-2


def train(place: Path, *words: object) -> Program:
    (place / "legal.py").write_text(f"import sys; sys.path.insert(0, '.')\n{TRAIN_WITH_LEGAL_EDITS}")
    return Program(place / "legal.py", "--out", place / "run", *words, place=place)


@pytest.fixture(scope="module")
def outlived(server: Server, padded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, str]:
    """A run whose policy and executor are one server: SIGKILL of it in the middle of the second step, then a new one. Returns the
    run and what it said."""
    place = tmp_path_factory.mktemp("outlived")
    run, out = train(place, "--model", padded_model, "--policy-url", server.url, "--policy-timeout", 1200,
                     "--executor-url", server.url, "--executor-model", "tiny", "--executor-timeout", 600,
                     "--executor-extra", '{"max_tokens": 16, "min_tokens": 4}', *SMALL), RunDir(place / "run")
    try:
        deadline = time.monotonic() + 300
        while len(out.read("metrics.jsonl")) < 1 and run.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)                              # the second step has begun
        server.kill()
        server.start()
        code, said = run.ended(1200), run.err.read_text()
    finally:
        run.kill()
    assert code == 0, said
    return out, said


def test_a_run_trains_with_policy_and_executor_on_one_server(outlived: tuple[RunDir, str]) -> None:
    out, _ = outlived
    log = out.read("metrics.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2]
    assert max(row["sampler_kl"] for row in log) < 1e-4
    assert all(row["executor_calls"] > 0 for row in log)
    assert max(row["grad_norm"] for row in log) > 0
    assert all(record["version"] == record["step"] for record in out.read("trajectories.jsonl"))
    assert not out.path.with_name("run.adapters").exists()


def test_a_run_outlives_its_server(outlived: tuple[RunDir, str]) -> None:
    out, said = outlived
    assert re.search(r"is away; .*is back after \d+ s", said, re.DOTALL), said
    assert [(row["step"], row["dropped"]) for row in out.read("metrics.jsonl")] == [(0, 0), (1, 0), (2, 0)]


def requests_running(url: str) -> float:
    """How many requests a server decodes at this moment, by its own metrics."""
    text = requests.get(f"{url}/metrics", timeout=60).text
    return sum(map(float, re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)))


@pytest.mark.slow
def test_a_run_outlives_one_of_its_two_servers(server: Server, padded_model: Path, tmp_path: Path) -> None:
    """SIGKILL of one in the second step, with turns under way: no trajectory is lost or sampled by another version."""
    second = Server(padded_model, tmp_path)
    second.start()
    run = train(tmp_path, "--model", padded_model, "--policy-url", server.url, second.url, *SMALL,
                "--rollouts-per-task", 4, "--max-new-tokens", 200)
    try:
        deadline = time.monotonic() + 300
        while run.is_alive() and time.monotonic() < deadline:
            if len(RunDir(tmp_path / "run").read("metrics.jsonl")) == 1 and requests_running(second.url):
                break
            time.sleep(0.02)
        os.killpg(second.group, signal.SIGSTOP)      # what is asked from now on waits for an answer
        time.sleep(3)
        second.kill()
        code, said = run.ended(1200), run.err.read_text()
    finally:
        run.kill()
    assert code == 0, said
    assert f"policy server {second.url} is left out, 1 of 2 remain" in said, said
    log = RunDir(tmp_path / "run").read("metrics.jsonl")
    assert [(row["step"], row["trajectories"], row["dropped"]) for row in log] == [(0, 12, 0), (1, 12, 0), (2, 12, 0)]
    assert max(row["sampler_kl"] for row in log) < 1e-4
    assert all(record["version"] == record["step"] for record in RunDir(tmp_path / "run").read("trajectories.jsonl"))
