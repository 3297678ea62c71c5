"""The simulation behind docs/SCALE.md against arithmetic that a person can do."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("scale_model", Path(__file__).parent.parent / "bench" / "scale_model.py")
sys.modules["scale_model"] = model = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(model)

COSTS = replace(model.Costs(), prompt=100, feedback=10)


def two_turns() -> list:
    return [model.Conversation(0, [20, 30], [[1.0, 2.0], [4.0]], COSTS.prompt)]


def test_one_conversation_takes_its_prefills_its_tokens_and_its_calls() -> None:
    """The second turn prefills the feedback alone; a token costs more, the more its conversation will hold."""
    expected = 110 * COSTS.prefill + 7.0
    for n, held in ((20, 120), (30, 160)):
        expected += n * (COSTS.decode + COSTS.decode_each + held * COSTS.decode_kv)
    played = model.rollout(two_turns(), 1, COSTS)
    assert played["seconds"] == pytest.approx(expected)
    assert played["reuse"] == pytest.approx(120 / 230)


def test_one_slot_makes_executor_calls_one_after_the_other_and_a_rate_spaces_them() -> None:
    taus = model.conversations(20, COSTS, 0)
    calls = [seconds for tau in taus for turn in tau.calls for seconds in turn]
    assert model.rollout(taus, 1, replace(COSTS, executor_slots=1))["seconds"] >= sum(calls)
    slow = model.rollout(model.conversations(20, COSTS, 0), 1, replace(COSTS, executor_rate=0.1))["seconds"]
    assert len(calls) / 0.1 <= slow < len(calls) / 0.1 + 200


def test_conversations_that_do_not_fit_together_are_prefilled_again() -> None:
    whole, small = (model.rollout(model.conversations(40, COSTS, 0), 1, replace(COSTS, kv_tokens=n)) for n in (10**7, 15_000))
    assert whole["reuse"] > 0.9
    assert small["reuse"] < 0.2
    assert small["seconds"] > 1.5 * whole["seconds"]


def test_two_servers_share_what_one_could_not_do_as_fast() -> None:
    many = replace(COSTS, executor_slots=4096)
    one, two = (model.rollout(model.conversations(400, COSTS, 0), n, many)["seconds"] for n in (1, 2))
    assert two < 0.7 * one
