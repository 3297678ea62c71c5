"""Fixtures for tests that play whole episodes."""

from pathlib import Path

import pytest

import warmstart


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy directory as warmstart makes it, from few episodes: it runs, and writes an edit now and then."""
    directory = tmp_path_factory.mktemp("policy") / "tiny"
    warmstart.build(directory, episodes=30, progress=False)
    return directory
