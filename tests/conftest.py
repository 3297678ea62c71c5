"""Fixtures for tests that play whole episodes or talk to a server."""

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the cores, and so do the programs they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from fault_server import Answer, Behaviour, FaultServer

import backends
import report
import warmstart
from qwen3 import Qwen3

LONGEST = ("test_vllm", "test_hostile", "test_vllm_sampler", "test_sandbox", "test_train", "test_ranks", "test_rewards",
           "test_graders", "test_bench", "test_ahead", "test_browser", "test_strangers", "test_ordinary", "test_vllm_fleet",
           "test_qwen3", "test_report", "test_policy", "test_openai", "test_executor_runs", "test_examples", "test_ds1000")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also what takes minutes: two vLLM servers, more runs of several ranks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files come first, or one of two workers would end with one while the other has nothing left to do."""
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --slow"))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves of a run are drawn where they are looked at: to draw them takes longer than a step of the tiny policy."""
    if request.path.stem not in ("test_report", "test_terminal"):
        monkeypatch.setattr(report, "write_curves", lambda runs, path: path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy directory as warmstart makes it, from few episodes: it runs, and writes an edit now and then.

    The worker that needs it first makes it for all.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with (root / "policy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "tiny").exists():
            warmstart.build(root / "tiny", episodes=30, progress=False)
    return root / "tiny"


@pytest.fixture(scope="session")
def padded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with what real directories have: a padded vocabulary, whose ids would be drawn if nothing forbade it, and
    sampling defaults that are not ours."""
    directory = tmp_path_factory.mktemp("padded") / "tiny"
    directory.mkdir()
    small = Qwen3.from_pretrained(tiny_model)
    large = Qwen3(dataclasses.replace(small.config, vocab_size=small.config.vocab_size + 32))
    weights = small.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = torch.cat([weights[name], weights[name][:32]])  # as likely as the first 32
    large.load_state_dict(weights)
    large.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_model / name, directory / name)
    (directory / "generation_config.json").write_text(json.dumps(
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.3, "eos_token_id": [995, 997]}))
    return directory


@pytest.fixture
def serve() -> Iterator[Callable[..., FaultServer]]:
    """serve(behaviour, behaviour, ...) starts a server that does these in turn; the last one repeats."""
    servers: list[FaultServer] = []

    def start(*script: Behaviour | Answer, **more: Any) -> FaultServer:
        servers.append(FaultServer(*script, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a backend would have slept; its clock goes forward by them."""
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append, monotonic=lambda: time.monotonic() + sum(slept))
    monkeypatch.setattr(backends, "time", clock)
    return slept
