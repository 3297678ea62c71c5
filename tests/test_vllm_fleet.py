"""Several policy servers as one sampler: stand-ins for vLLM (fake_vllm.py), of which some die, lag or come back."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_vllm import FakeVLLM
from test_vllm_sampler import SMALL, ask, change_weights, policy, run

import vllm_fleet
import vllm_sampler
from policy import ChatTokenizer, Sample, SampleRequest
from qwen3 import Qwen3
from rundir import RunDir
from vllm_fleet import Fleet
from vllm_sampler import VLLMSampler
from vllm_server import ServerError


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_sampler, "PAUSE", 0.001)
    monkeypatch.setattr(vllm_fleet, "AWAY_SECONDS", 0.0)


@pytest.fixture(scope="module")
def base(padded_model: Path) -> Qwen3:
    return Qwen3.from_pretrained(padded_model).eval()


@pytest.fixture
def servers(base: Qwen3, padded_model: Path) -> Iterator[list[FakeVLLM]]:
    fakes = [FakeVLLM(base, ChatTokenizer(padded_model)) for _ in range(3)]
    for fake in fakes:
        fake.start()
    yield fakes
    for fake in fakes:
        fake.opened.set()
        fake.kill()


@pytest.fixture
def make(servers: list[FakeVLLM], padded_model: Path, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """make(n) joins the first n servers, with version 0 loaded."""
    made = []

    def make_fleet(n: int, patience: float = 20.0, seed: int = 0) -> Fleet:
        model = policy(padded_model, seed)
        fleet = Fleet([VLLMSampler(fake.url, model, ChatTokenizer(padded_model), tmp_path / f"{len(made)}-{i}.adapters",
                                   max_context=512, timeout=20, patience=0.0) for i, fake in enumerate(servers[:n])], patience)
        made.append(fleet)
        fleet.load_adapter(version=0)
        for fake in servers:
            fake.requests.clear()
        return fleet

    yield make_fleet
    for fleet in made:
        fleet.close()


def play(fleet: Fleet, keys: range, turns: int = 1) -> dict[int, list[Sample]]:
    """Some turns of each trajectory, all trajectories at once; every turn goes on from what was sampled before."""
    requests, samples = {key: ask(key) for key in keys}, {key: [] for key in keys}
    for _ in range(turns):
        for key, future in zip(keys, fleet.submit(list(requests.values())), strict=True):
            sample = future.result(30)
            samples[key].append(sample)
            requests[key] = SampleRequest(key, requests[key].tokens + sample.ids, 12, requests[key].seed + 1)
    return samples


def prompts(server: FakeVLLM) -> list[tuple[int, ...]]:
    return [tuple(body["prompt"][:20]) for body in server.requests]


def test_a_trajectory_stays_where_its_prefix_is_cached(make: Callable, servers: list[FakeVLLM]) -> None:
    play(make(3), range(9), turns=3)
    for server in servers:                           # three trajectories each, all turns of them
        assert len(set(prompts(server))) == 3
        assert len(prompts(server)) == 9


def test_a_new_trajectory_goes_where_there_are_fewest(make: Callable, servers: list[FakeVLLM]) -> None:
    fleet = make(2)
    play(fleet, range(4))                            # 0 and 2 on the first server, 1 and 3 on the second
    fleet.release(1)
    fleet.release(3)
    before = len(servers[1].requests)
    play(fleet, range(10, 12))
    assert len(servers[1].requests) - before == 2


def test_the_trajectories_of_a_dead_server_go_on_elsewhere_as_they_would_have(make: Callable, servers: list[FakeVLLM]) -> None:
    """Killed after the first turn: the next turns have the ids that a single sound server gives."""
    alone = play(make(1), range(6), turns=3)
    fleet = make(2)
    first = play(fleet, range(6), turns=1)
    servers[0].kill()
    samples = {key: first[key] for key in range(6)}
    requests = [SampleRequest(key, ask(key).tokens + first[key][0].ids, 12, ask(key).seed + 1) for key in range(6)]
    for key, future in enumerate(fleet.submit(requests)):
        samples[key].append(future.result(30))
    assert [[s.ids for s in samples[key]] for key in range(6)] == [[s.ids for s in alone[key][:2]] for key in range(6)]
    assert len(set(prompts(servers[1]))) == 6


def test_a_server_that_dies_with_turns_in_flight_loses_none(make: Callable, servers: list[FakeVLLM]) -> None:
    fleet = make(2)
    servers[0].faults += ["hang"] * 3
    futures = fleet.submit([ask(key) for key in range(6)])
    while len(servers[0].requests) < 3:
        time.sleep(0.01)
    servers[0].kill()
    assert all(future.result(30).version == 0 for future in futures)


def test_one_poisoned_request_does_not_take_the_servers_with_it(make: Callable, servers: list[FakeVLLM]) -> None:
    """400: every server would refuse it. The others go on, on both servers."""
    fleet = make(2)
    servers[0].faults.append(400)
    [bad] = fleet.submit([ask(0)])
    with pytest.raises(ServerError, match="HTTP 400"):
        bad.result(30)
    play(fleet, range(1, 9))
    assert all(len(set(prompts(server))) >= 4 for server in servers[:2])


def test_a_server_without_the_newest_adapter_gets_no_request_until_it_has_it(make: Callable, servers: list[FakeVLLM],
                                                                              capfd: pytest.CaptureFixture) -> None:
    fleet = make(2)
    servers[0].settings.runtime_loading = False
    change_weights(fleet.members[0].model, seed=1)
    fleet.load_adapter(version=1)
    assert f"{servers[0].url} is left out, 1 of 2 remain" in capfd.readouterr().err
    assert all(turn.version == 1 for turns in play(fleet, range(4)).values() for turn in turns)
    assert servers[0].requests == []
    servers[0].settings.runtime_loading = True
    change_weights(fleet.members[0].model, seed=2)
    fleet.load_adapter(version=2)
    play(fleet, range(10, 14))
    assert len(set(prompts(servers[0]))) >= 2
    assert {name.split("-")[2] for server in servers[:2] for name in server.adapters} == {"v2"}


def test_the_last_server_is_waited_for_and_gets_the_adapter_again(make: Callable, servers: list[FakeVLLM],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make(2)
    before = play(fleet, range(2))
    for server in servers[:2]:
        server.kill()
    futures = fleet.submit([ask(key) for key in range(2)])
    while fleet._live:
        time.sleep(0.01)
    servers[1].start()
    assert [future.result(30).ids for future in futures] == [before[key][0].ids for key in range(2)]
    assert len(servers[1].adapters) == 1


def test_without_any_server_all_turns_fail_together_after_the_patience(make: Callable, servers: list[FakeVLLM]) -> None:
    fleet = make(2, patience=1.0)
    for server in servers[:2]:
        server.kill()
    for future in fleet.submit([ask(key) for key in range(6)]):
        with pytest.raises(ServerError):
            future.result(10)
    with pytest.raises(ServerError):
        fleet.load_adapter(version=1)


def test_a_run_on_two_servers_outlives_one_of_them(servers: list[FakeVLLM], padded_model: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Same ids as on one server, no trajectory lost, and every turn by the adapter of its step."""
    for fake in servers:
        fake.settings.max_model_len = 1200
    words = ["--model", padded_model, *SMALL]
    run(monkeypatch, *words, "--policy-url", servers[2].url, "--out", tmp_path / "one")
    complete = FakeVLLM.complete

    def complete_and_die(self: FakeVLLM, body: dict) -> dict:
        turns = sum("-v1-" in asked["model"] for asked in self.requests)         # in step 1, its probe included
        if self is servers[0] and turns == 3:
            threading.Thread(target=self.kill).start()
        return complete(self, body)

    monkeypatch.setattr(FakeVLLM, "complete", complete_and_die)
    run(monkeypatch, *words, "--policy-url", servers[0].url, servers[1].url, "--out", tmp_path / "two")
    one, two = (RunDir(tmp_path / name).read("trajectories.jsonl") for name in ("one", "two"))
    texts = [[[turn["text"] for turn in record["turns"]] for record in records] for records in (one, two)]
    assert texts[0] == texts[1]
    assert all(record["version"] == record["step"] and not record["dropped"] for record in two)
    assert any("-v1-" in body["model"] for body in servers[0].requests)
    assert servers[1].adapters == {}
