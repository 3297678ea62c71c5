"""Every comparison in bench/ runs to its end at its smallest size and writes what it promises; no time is asserted."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import ROOT, Program

sys.path.append(str(Path(__file__).parent.parent / "bench"))  # behind ours: it has a canvas.py of its own
import side_by_side


def run(tmp_path: Path, name: str, *words: object) -> dict[str, Any]:
    """Return the json of one run."""
    out = tmp_path / f"{name}.json"
    program = Program(ROOT / f"bench/{name}.py", "--pairs", 1, "--json", out, *words, place=tmp_path)
    assert program.ended() == 0, program.err.read_text()
    result = json.loads(out.read_text())
    low, high = result["ratio_range"]
    assert 0 < low <= result["ratio"] <= high
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["bound"]
    return result


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("bench"), "canvas", "--episodes", 3, "--turns", 12, "--long", 40)


def test_the_canvas_runs_what_an_edit_changed_and_no_more(canvas: dict[str, Any]) -> None:
    assert canvas["ours"]["runs_per_edit"] == canvas["ours"]["changed_per_edit"]
    assert canvas["ours"]["most_above_changed"] == 0


def test_forgetting_every_result_runs_more_nodes_for_the_same_changes(canvas: dict[str, Any]) -> None:
    assert canvas["whole graph"]["changed_per_edit"] == canvas["ours"]["changed_per_edit"]
    assert canvas["whole graph"]["calls_per_trajectory"] > canvas["ours"]["calls_per_trajectory"]


def test_both_schedules_make_the_same_calls_over_pooled_connections(tmp_path: Path) -> None:
    result = run(tmp_path, "rollout", "--trajectories", 4, "--turns", 4, "--sim-latency", 0.002, "--policy-latency", 0.001,
                 "--http")
    assert result["calls"] == 3 + 3 + 2 + 1  # every turn but finish makes one
    assert result["connections"] <= 4 * 4  # rollouts, trajectories
    assert result["over_critical_path"] >= 1


def test_all_sides_of_the_update_have_the_same_gradients(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = run(tmp_path, "update", "--trajectories", 2, "--no-memory")
    assert "theirs" in result["gradient_error"]  # and "trl", where its trainer can be imported
    assert max(result["gradient_error"].values()) < 1e-5, result["gradient_error"]
    assert result["against"].keys() == result["gradient_error"].keys()
    assert set(result["bound"]) == {"ours", "theirs"}


def test_both_sides_of_sampling_write_the_same_greedy_text(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = run(tmp_path, "sampling", "--conversations", 3, "--turns", 2, "--new-tokens", 8)
    assert result["sampled"] == 3 * 2 * 8
    assert result["greedy_agreement"] == 1


def test_a_checkpoint_is_loaded_beside_its_bytes_being_read(tmp_path: Path) -> None:
    result = run(tmp_path, "load", "--gigabytes", 0.01)
    assert result["bytes"] == pytest.approx(1e7, rel=0.2)
    assert result["peak_over_weights"] > 0


def test_the_exponent_of_a_cost_is_the_slope_between_logarithms() -> None:
    assert side_by_side.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert side_by_side.exponent([1, 10], [7, 7]) == pytest.approx(0)


def test_growth_is_measured_at_each_size(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    program = Program(ROOT / "bench/scaling.py", "--only", "update by trajectories", "sampling by turns", "--sizes", 2,
                      "--json", out, place=tmp_path)
    assert program.ended() == 0, program.err.read_text()
    scales = json.loads(out.read_text())["scales"]
    assert [scale["sizes"] for scale in scales.values()] == [[4, 8], [2, 4]]
    for scale in scales.values():
        assert scale["exponent"] == side_by_side.exponent(scale["sizes"], scale["seconds"])
