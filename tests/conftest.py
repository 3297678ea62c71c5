"""Fixtures for tests that play whole episodes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import warmstart
from qwen3 import Qwen3


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy directory as warmstart makes it, from few episodes: it runs, and writes an edit now and then."""
    directory = tmp_path_factory.mktemp("policy") / "tiny"
    warmstart.build(directory, episodes=30, progress=False)
    return directory


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
