"""The sampler on a policy server, with every fault that a server can have, against a stand-in (fake_vllm.py)."""

import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_vllm import FakeVLLM

import train
import vllm_sampler
from lora import add_lora, disable_lora, lora_layers
from policy import ChatTokenizer, InProcessSampler, Sample, SampleRequest
from qwen3 import Qwen3
from rollout import Job, RolloutConfig, Trajectory, rollout
from rundir import RunDir
from vllm_check import checks
from vllm_sampler import VLLMSampler
from vllm_server import ServerError

TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_sampler, "PAUSE", 0.001)


@pytest.fixture(scope="module")
def tokenizer(padded_model: Path) -> ChatTokenizer:
    return ChatTokenizer(padded_model)


@pytest.fixture
def server(padded_model: Path, tokenizer: ChatTokenizer) -> Iterator[FakeVLLM]:
    fake = FakeVLLM(Qwen3.from_pretrained(padded_model).eval(), tokenizer)
    fake.start()
    yield fake
    fake.opened.set()
    fake.kill()


def policy(directory: Path, seed: int = 0, rank: int = 4) -> Qwen3:
    """A trainer's model whose adapter is not zero."""
    model = Qwen3.from_pretrained(directory)
    add_lora(model, rank, 2 * rank, 0.0, TARGETS, torch.Generator().manual_seed(seed))
    change_weights(model, seed)
    return model


@torch.no_grad()
def change_weights(model: Qwen3, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))


@pytest.fixture
def make(server: FakeVLLM, padded_model: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> Iterator[Callable]:
    """Make samplers with version 0 loaded; they are closed at the end of the test."""
    made = []

    def make_sampler(loaded: bool = True, model: Qwen3 | None = None, **options: float) -> VLLMSampler:
        sampler = VLLMSampler(server.url, model or policy(padded_model), tokenizer, tmp_path / "run.adapters",
                              **{"max_context": 512, "timeout": 20, "patience": 20} | options)
        made.append(sampler)
        if loaded:
            sampler.load_adapter(version=0)
            server.requests.clear()
        return sampler

    yield make_sampler
    server.opened.set()
    for sampler in made:
        sampler.close()


def ask(key: int = 0, room: int = 12) -> SampleRequest:
    prompt = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(key)).tolist()
    return SampleRequest(key, prompt, room, seed=2**62 + key)


def take(sampler: VLLMSampler, *requests: SampleRequest) -> list[Sample]:
    return [future.result(30) for future in sampler.submit(requests or [ask()])]


def failure(sampler: VLLMSampler, request: SampleRequest | None = None) -> str:
    [future] = sampler.submit([request or ask()])
    with pytest.raises(ServerError) as error:
        future.result(30)
    return str(error.value)


# ---- what is asked and what is accepted ------------------------------------------------------------------------------


def test_a_turn_has_the_ids_and_logprobs_that_the_adapter_gives(make: Callable, padded_model: Path) -> None:
    """The other sampler, in this process with the same weights, draws the same tokens from the same seeds."""
    model = policy(padded_model)
    sampler = make(model=model, temperature=0.8)
    limit = sampler.tokenizer.vocab_size
    inside = InProcessSampler(model.eval(), sampler.tokenizer.end_id, 0.8, vocab_limit=limit, max_context=512)
    requests = [ask(key) for key in range(6)]
    expected = [future.result(30) for future in inside.submit(requests)]
    inside.close()
    for sample, other in zip(take(sampler, *requests), expected, strict=True):
        assert (sample.ids, sample.finish, sample.version) == (other.ids, other.finish, other.version)
        assert sample.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_nothing_is_left_to_the_defaults_of_the_server(make: Callable, server: FakeVLLM) -> None:
    sampler = make(temperature=0.7, top_p=0.9, top_k=5)
    take(sampler)
    [body] = server.requests
    assert body["prompt"] == ask().tokens
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                                          "frequency_penalty", "n", "seed", "max_tokens", "logprobs", "return_token_ids")} == {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "n": 1, "seed": 2**62, "max_tokens": 12, "logprobs": 0, "return_token_ids": True}
    assert body["stop_token_ids"] == [sampler.tokenizer.end_id]
    assert body["ignore_eos"] is True                # other end tokens of generation_config.json do not end a turn
    assert sorted(map(int, body["logit_bias"])) == list(range(sampler.tokenizer.vocab_size, 1056))


def test_a_turn_never_asks_for_more_than_the_context_holds(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    long = SampleRequest("long", ask().tokens * 25 + [1] * 7, 100, seed=0)
    assert len(take(sampler, long)[0].ids) <= 5
    assert server.requests[-1]["max_tokens"] == 512 - 507


@pytest.mark.parametrize(("fault", "said"), [
    ("no ids", "lacks token_ids"), ("no logprobs", "lacks token_ids or log-prob"), ("no choices", "lacks"),
    ("a missing logprob", "log-probabilities"), ("one logprob less", "with 11 log-prob|with [0-9]+ log-prob"),
    ("impossible logprob", "-9999"), ("clipped", "stopped after 1 of 12"), ("aborted", "finish_reason abort"),
    ("padding id", "outside of the tokenizer's vocabulary"), ("another prompt", "another prompt")])
def test_an_answer_that_is_not_what_was_sampled_is_refused_at_once(make: Callable, server: FakeVLLM, fault: str,
                                                                   said: str) -> None:
    sampler = make()
    server.faults = [fault]
    assert re.search(said, failure(sampler))
    assert len(server.requests) == 1


@pytest.mark.parametrize(("tokens", "room"), [([], 5), ([1], 0), ([1056], 5), (list(range(512)), 1)])
def test_a_request_that_cannot_be_sampled_fails_alone_and_unsent(make: Callable, server: FakeVLLM, tokens: list[int],
                                                                 room: int) -> None:
    bad, good = make().submit([SampleRequest("bad", tokens, room, 0), ask()])
    with pytest.raises(ValueError, match="trajectory 'bad'"):
        bad.result(30)
    assert good.result(30).ids
    assert len(server.requests) == 1


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", "slow", "truncated", "invalid json", 408, 429, 500, 502, 503, 504, (429, "0.01"),
                                   (503, "Wed, 21 Oct 2026 07:28:00 GMT")], ids=str)
def test_a_passing_fault_changes_nothing_but_the_time(make: Callable, server: FakeVLLM, fault: object) -> None:
    sampler = make()
    [expected] = take(sampler)
    server.faults = [fault, fault]
    [sample] = take(sampler)
    assert sample == expected
    assert len(server.requests) == (2 if fault == "slow" else 4)
    assert all(body == server.requests[0] for body in server.requests)


@pytest.mark.parametrize("fault", ["reset", "truncated", "invalid json", 429, 500, 503], ids=str)
def test_a_fault_that_stays_is_given_up_after_a_bounded_number_of_tries(make: Callable, server: FakeVLLM, fault: object) -> None:
    sampler = make()
    server.faults = [fault] * 100
    failure(sampler)
    assert len(server.requests) == vllm_sampler.TRIES


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 501])
def test_a_refusal_is_not_repeated_but_told_in_the_words_of_the_server(make: Callable, server: FakeVLLM, status: int) -> None:
    sampler = make()
    server.faults = [status] * 100
    assert f"HTTP {status}: made-up error {status}" in failure(sampler)
    # 404 is what a server says that was restarted without the adapter: it is looked for, once
    assert len(server.requests) == (2 if status == 404 else 1)


def test_a_server_that_hangs_is_asked_twice(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    sampler.server.timeout = 0.2
    server.faults = ["hang"] * 100
    assert "no answer within 0.2 s" in failure(sampler)
    assert len(server.requests) == 2


def test_retry_after_is_waited_for(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    server.faults = [(429, "0.5")]
    began = time.monotonic()
    take(sampler)
    assert time.monotonic() - began > 0.5


def test_patience_is_for_a_server_that_is_away_and_not_for_one_that_errs(make: Callable, server: FakeVLLM) -> None:
    sampler = make(patience=0.0)
    server.faults += [500, 500]
    assert len(take(sampler)) == 1


def test_a_server_that_asks_for_more_time_than_there_is_is_given_up(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    server.faults = [(429, "86400")]
    assert "asks to wait for 86400 s" in failure(sampler)


def test_a_server_that_dies_and_comes_back_gets_the_adapter_again(make: Callable, server: FakeVLLM,
                                                                  capsys: pytest.CaptureFixture) -> None:
    """Killed with four turns in flight; what they and later turns sample is what they would have sampled."""
    sampler, requests = make(), [ask(key) for key in range(8)]
    expected = take(sampler, *requests)
    server.faults = ["hang"] * 4
    futures = sampler.submit(requests[:4])
    while len(server.requests) < 12:
        time.sleep(0.01)
    server.kill()
    server.faults = []
    time.sleep(0.3)
    server.start()
    assert [future.result(30) for future in futures] + take(sampler, *requests[4:]) == expected
    assert [event[0] for event in server.events] == ["load", "load"]             # once by the trainer, once after the restart
    assert "loaded again" in capsys.readouterr().err


def test_a_restart_that_nobody_saw_is_found_out_by_the_missing_adapter(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    [expected] = take(sampler)
    server.adapters = {}
    assert take(sampler) == [expected]


def test_a_server_that_stays_away_is_given_up_by_all_at_once(make: Callable, server: FakeVLLM) -> None:
    sampler = make(patience=0.5)
    server.kill()
    began = time.monotonic()
    futures = sampler.submit([ask(key) for key in range(20)])
    for future in futures:
        with pytest.raises(ServerError, match="away for more than"):
            future.result(30)
    assert time.monotonic() - began < 10             # not 20 times as long
    server.start()
    assert take(sampler)[0].ids                      # and is welcome when it comes back


def test_a_vanished_adapter_is_an_error_in_the_words_of_the_server(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    (sampler.adapter.directory / "adapter_model.safetensors").unlink()
    server.adapters = {}                             # restarted, so that it has to be read again
    assert "No adapter found" in failure(sampler)
    assert len(server.requests) == 1


class Echo:
    """A canvas of two turns."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def prompt(self) -> tuple[str, str]:
        return "Design.", "What is 2 + 3?"

    def step(self, text: str) -> SimpleNamespace:
        self.texts.append(text)
        return SimpleNamespace(text="Go on.", ok=True, done=len(self.texts) == 2, stop_reason="finished", error="", info={})


def test_only_what_the_policy_sampled_is_ever_trained(make: Callable, server: FakeVLLM) -> None:
    """24 episodes of two turns with a fault in every second answer: the survivors equal those of a run without faults."""
    sampler = make()

    def play(faults: list) -> list[Trajectory]:
        server.faults = faults
        return rollout([Job("task", i, 100 + i) for i in range(24)], sampler, sampler.tokenizer, lambda task: Echo(),
                       lambda tau: setattr(tau, "reward", 1.0), RolloutConfig(max_context=512, max_new_tokens=8))

    rng = random.Random(0)
    kinds = ["reset", "truncated", "invalid json", 429, 500, 503, "no ids", "a missing logprob", "clipped", "padding id", 400]
    whole, faulty = play([]), play([rng.choice(kinds) if rng.random() < 0.5 else None for _ in range(100)])
    dropped = [tau for tau in faulty if tau.dropped]
    assert {tau.dropped for tau in dropped} == {"policy_error"}
    assert 3 < len(dropped) < 21
    assert all(tau.error.startswith("ServerError: ") and tau.reward is None for tau in dropped)
    for tau, clean in zip(faulty, whole, strict=True):
        n = len(tau.tokens)
        assert (tau.tokens, tau.mask) == (clean.tokens[:n], clean.mask[:n])      # dropped ones end early, and hold no other text
        assert tau.dropped or n == len(clean.tokens)


def test_no_thread_and_no_socket_is_left_behind(make: Callable, server: FakeVLLM) -> None:
    """Steps of ten turns with faults and a new adapter; then all is as after the first. LEAK_STEPS=500 takes some minutes."""
    sampler = make()
    rng = random.Random(1)

    def steps(n: int) -> tuple[int, int]:
        for step in range(n):
            sampler.load_adapter(version=step)
            server.faults = [rng.choice([None, None, None, "reset", 503, "truncated", "no ids"]) for _ in range(10)]
            for future in sampler.submit([ask(key, room=1) for key in range(10)]):
                assert future.exception(30) is None or isinstance(future.exception(), ServerError)
            server.faults = []
        time.sleep(0.1)
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    first, last = steps(5), steps(int(os.environ.get("LEAK_STEPS", "10")))
    print(f"threads and descriptors after 5 steps: {first}, in the end: {last}")
    # at most 10 connections are kept on either side, whatever happened before; a leak would be of hundreds
    assert last[0] <= first[0] + 10, (first, last)
    assert last[1] <= first[1] + 20, (first, last)
    assert len([thread for thread in threading.enumerate() if thread.name == "vllm"]) == 0


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_every_version_has_a_name_and_a_directory_of_its_own_and_the_last_one_goes(make: Callable, server: FakeVLLM,
                                                                                   padded_model: Path) -> None:
    model = policy(padded_model)
    sampler = make(model=model)
    for version in (1, 2, 2):                        # the same version twice is another adapter too
        change_weights(model, version)
        sampler.load_adapter(version=version)
        assert [sampler.adapter.name] == list(server.adapters)
        assert list(sampler.adapters.iterdir()) == [sampler.adapter.directory]
        assert take(sampler)[0].version == version
    loads = [event for event in server.events if event[0] == "load"]
    assert len({event[1] for event in loads}) == len({event[2] for event in loads}) == 4
    unloads = [event for event in server.events if event[0] == "unload"]
    assert [event[3] for event in unloads] == [True] * 3         # a directory is deleted after its adapter is unloaded
    assert [event[0] for event in server.events] == ["load", *["load", "unload"] * 3]


def test_after_close_the_server_is_as_before(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    sampler.close()
    assert server.adapters == {}
    assert not sampler.adapters.exists()


def test_a_refused_adapter_is_told_in_the_words_of_the_server_and_the_last_one_stays(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    kept = sampler.adapter
    server.settings.max_lora_rank = 2
    with pytest.raises(ServerError, match=r"refused adapter .*LoRA rank 4 is greater than max_lora_rank 2"):
        sampler.load_adapter(version=1)
    assert (sampler.adapter, list(sampler.adapters.iterdir())) == (kept, [kept.directory])
    assert take(sampler)[0].version == 0


def test_an_adapter_that_the_server_does_not_sample_from_is_noticed(make: Callable, server: FakeVLLM,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make()
    monkeypatch.setattr("fake_vllm.load_adapter", lambda model, path: None)      # takes it and keeps the base weights
    with pytest.raises(ServerError, match="samples from other weights than the trainer's"):
        sampler.load_adapter(version=1)


def test_weights_do_not_change_under_requests_in_flight(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    server.faults = ["hang"]
    [future] = sampler.submit([ask()])
    with pytest.raises(RuntimeError, match="1 requests are in flight"):
        sampler.load_adapter(version=1)
    with pytest.raises(ValueError, match="one turn at a time"):
        sampler.submit([ask()])
    server.opened.set()
    assert future.result(30).version == 0


def test_close_fails_what_is_in_flight_and_what_comes_later(make: Callable, server: FakeVLLM) -> None:
    sampler = make()
    server.faults = ["hang"]
    [future] = sampler.submit([ask()])
    sampler.close()
    with pytest.raises(RuntimeError, match="closed"):
        future.result(0)
    with pytest.raises(RuntimeError, match="closed"):
        sampler.submit([ask()])


def test_what_a_killed_process_of_the_run_left_is_removed_and_nothing_else(make: Callable, server: FakeVLLM,
                                                                           tmp_path: Path) -> None:
    killed = make()
    killed_adapter = killed.adapter
    killed.adapter = None                            # so that close() has nothing to do
    other = VLLMSampler(server.url, killed.model, killed.tokenizer, tmp_path / "other.adapters", max_context=512)
    other.load_adapter(version=5)
    sampler = make()
    assert set(server.adapters) == {other.adapter.name, sampler.adapter.name}
    assert not killed_adapter.directory.exists()
    assert other.adapter.directory.exists()
    other.close()


def test_without_lora_the_base_model_is_sampled(make: Callable, server: FakeVLLM, padded_model: Path) -> None:
    [sample] = take(make(model=Qwen3.from_pretrained(padded_model)))
    assert server.requests[0]["model"] == "tiny"
    assert (server.events, sample.version) == ([], 0)


# ---- the check before a run ------------------------------------------------------------------------------------------


def found(sampler: VLLMSampler) -> dict[str, str]:
    return {check.name: check.text for check in checks(sampler) if not check.ok}


def test_a_good_server_passes_every_check_and_is_left_as_it_was(make: Callable, server: FakeVLLM) -> None:
    sampler = make(loaded=False)
    before = [layer.lora_B.clone() for layer in lora_layers(sampler.model).values()]
    assert [(check.name, check.ok) for check in checks(sampler)] == [(name, True) for name in (
        "server", "model", "context", "tokenizer", "log-probs", "weights", "adapters", "LoRA")]
    assert server.adapters == {}
    assert sampler.adapter is None
    for layer, kept in zip(lora_layers(sampler.model).values(), before, strict=True):
        assert torch.equal(layer.lora_B, kept)


@pytest.mark.parametrize(("wrong", "name", "advice"), [
    ({"max_model_len": 256}, "context", "--max-model-len 512"),
    ({"shift_ids": 1}, "tokenizer", "serve the directory of --model"),
    ({"processed_logprobs": False}, "log-probs", "--logprobs-mode processed_logprobs"),
    ({"scale": 1.5}, "weights", "--dtype float32"),
    ({"runtime_loading": False}, "adapters", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=true"),
    ({"enable_lora": False}, "LoRA", "--enable-lora"),
    ({"max_lora_rank": 2}, "LoRA", "--max-lora-rank 8"),
])
def test_what_is_wrong_with_a_server_is_named_with_the_flag_that_mends_it(make: Callable, server: FakeVLLM, wrong: dict,
                                                                          name: str, advice: str) -> None:
    for setting, value in wrong.items():
        setattr(server.settings, setting, value)
    problems = found(make(loaded=False))
    assert list(problems) == [name]
    assert advice in problems[name]
    assert "\n" not in problems[name]


def test_an_adapter_directory_that_the_server_cannot_see_is_named(make: Callable, server: FakeVLLM,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    load = FakeVLLM.load
    monkeypatch.setattr(FakeVLLM, "load", lambda self, name, path: load(self, name, path and f"/elsewhere{path}"))
    assert "choose an --out where it can" in found(make(loaded=False))["LoRA"]


def test_without_a_server_there_is_one_line_and_it_says_how_to_start_one(make: Callable, server: FakeVLLM) -> None:
    sampler = make(loaded=False)
    server.kill()
    [(name, text)] = found(sampler).items()
    assert name == "server"
    assert "Connection refused" in text
    assert "scripts/serve_vllm.sh" in text


# ---- whole runs ------------------------------------------------------------------------------------------------------

SMALL = ["--steps", 2, "--tasks-per-source", 1, "--rollouts-per-task", 2, "--eval-tasks", 1, "--max-turns", 2, "--no-baselines",
         "--max-context", 1200, "--lora-rank", 4, "--max-new-tokens", 16]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    train.main()


def test_check_prints_a_line_for_everything_and_writes_no_run(server: FakeVLLM, padded_model: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture) -> None:
    words = ["--check", "--model", padded_model, "--policy-url", server.url, "--out", tmp_path / "run", "--max-context", 512]
    run(monkeypatch, *words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("ok   policy ") for line in lines)
    server.settings.max_lora_rank = 8
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words)
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL policy LoRA: ")
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_not_begin_on_a_server_that_cannot_serve_it(server: FakeVLLM, padded_model: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    server.settings.max_model_len, server.settings.runtime_loading = 600, False
    with pytest.raises(SystemExit, match=r"(?s)--max-model-len 1200.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        run(monkeypatch, "--model", padded_model, "--policy-url", server.url, "--out", tmp_path / "run", *SMALL)
    assert not (tmp_path / "run").exists()


def test_a_step_goes_on_with_the_survivors_and_stops_where_resume_goes_on(
        server: FakeVLLM, padded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers' worth of trouble: one lost trajectory of six in step 0 is counted; with two lost in step 1 the run stops,
    and --resume ends with the weights of a run that was left alone."""
    server.settings.max_model_len = 1200
    words = ["--model", padded_model, "--policy-url", server.url, *SMALL, "--max-dropped", 0.2]
    original, lose = train.rollout, {0: 1, 1: 2}

    def faulty(jobs: list, sampler: VLLMSampler, *rest: object) -> list[Trajectory]:
        if jobs[0].seed in seeds:
            server.faults = ["no ids"] * lose.get(seeds.index(jobs[0].seed), 0)
        taus = original(jobs, sampler, *rest)
        server.faults = []
        return taus

    args = train.parse_args(list(map(str, [*words, "--out", tmp_path / "run"])))
    pool, _ = train.load_tasks(args)
    seeds = [train.choose_jobs(pool, step, args)[0].seed for step in range(2)]
    monkeypatch.setattr(train, "rollout", faulty)
    with pytest.raises(SystemExit, match=r"2 of 6 trajectories failed.*--resume.*policy_error: ServerError: .*token_ids"):
        run(monkeypatch, *words, "--out", tmp_path / "run")
    log = RunDir(tmp_path / "run").read("metrics.jsonl")
    assert [(row["step"], row["trajectories"], row["dropped"], row["dropped/policy_error"]) for row in log] == [(0, 6, 1, 1)]
    assert (tmp_path / "run" / "latest").read_text() == "checkpoints/step_000001\n"
    assert server.adapters == {}
    lose.clear()
    run(monkeypatch, "--resume", "--out", tmp_path / "run")
    log = RunDir(tmp_path / "run").read("metrics.jsonl")
    assert [(row["step"], row["dropped"]) for row in log] == [(0, 1), (1, 0)]
    assert all(row["sampler_kl"] < 1e-4 and row["seconds_sync"] > 0 for row in log)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["trajectories"] == 12


def test_too_few_sound_trajectories_stop_the_run() -> None:
    args = train.parse_args(["--max-dropped", "1", "--min-trajectories", "3"])
    taus = [Trajectory(None, i, stop_reason="finished" if i < 3 else "policy_error", error="gone") for i in range(8)]
    assert len(train.require_sound(taus, args)) == 3
    taus[0].stop_reason, taus[0].error = "policy_error", "gone"
    with pytest.raises(train.ExecutorError, match=r"6 of 8 trajectories failed .*--min-trajectories 3"):
        train.require_sound(taus, args)


def test_disabling_lora_is_what_the_weights_are_compared_under(make: Callable) -> None:
    """The base model's log-probs agree with ours only without our adapter: the comparison can fail."""
    sampler = make()
    with disable_lora(sampler.model):
        assert sampler.logprob_gap(None) < 1e-5
    assert sampler.logprob_gap(None) > 1e-2
    assert sampler.logprob_gap(sampler.adapter) < 1e-5
