"""What is logged, against numbers that can be checked by eye."""

from types import SimpleNamespace

import pytest

from backends import Usage
from graph import Graph
from metrics import commonest_workflows, mutual_information, rollout_metrics, tokens_read


def tau(source: str, workflow: str, reward: float, score: float, diversity: float = 1.0, *, dropped: str = "",
        dollars: float | None = 0.5, invalid: int = 0) -> SimpleNamespace:
    turns = [SimpleNamespace(info={"invalid": i < invalid, "refused": False}) for i in range(4)]
    parts = SimpleNamespace(diversity=diversity, checker=0.2, format=0.2, operators=0.2, structure=0.4)
    canvas = SimpleNamespace(graph=Graph.from_text(workflow), usage=Usage(3, 1, 10, 5, dollars=dollars))
    return SimpleNamespace(task=SimpleNamespace(source=source, kind=source.split("_")[-1]), canvas=canvas, reward=reward,
                           grade=SimpleNamespace(score=score), parts=parts, dropped=dropped, turns=turns,
                           stop_reason="finished", mask=[0, 1, 1], tokens=[1, 2, 3], hacks={})


def test_two_sources_with_a_workflow_each_share_one_bit() -> None:
    assert mutual_information([("math", "A"), ("math", "A"), ("qa", "B"), ("qa", "B")]) == pytest.approx(1.0)


def test_the_same_workflow_for_everything_shares_nothing() -> None:
    """The alarm for the first complaint of users: mutual information 0, share of the commonest 1."""
    metrics = rollout_metrics([tau("a_math", "Plan -> Custom", 1, 1), tau("a_qa", "Plan -> Custom", 0, 0)])
    assert (metrics["mutual_information"], metrics["commonest_share"], metrics["distinct_workflows"]) == (0.0, 1.0, 1)


def test_workflows_that_all_differ_may_still_use_the_same_operators_for_every_source() -> None:
    """Then source and workflow share a bit, which says nothing, and source and operator none."""
    metrics = rollout_metrics([tau("a_math", "Plan -> Custom", 1, 1), tau("a_qa", "Custom -> Plan", 1, 1)])
    assert (metrics["mutual_information"], metrics["operator_information"]) == (1.0, 0.0)
    metrics = rollout_metrics([tau("a_math", "Plan -> Plan", 1, 1), tau("a_qa", "Custom -> Custom", 1, 1)])
    assert metrics["operator_information"] == pytest.approx(1.0)


def test_dropped_trajectories_are_counted_by_cause_and_kept_out_of_the_means() -> None:
    metrics = rollout_metrics([tau("a_math", "Plan", 0.5, 0.5), tau("a_math", "Plan", 9, 9, dropped="executor_error")])
    assert (metrics["reward"], metrics["dropped"], metrics["dropped/executor_error"]) == (0.5, 1, 1)


def test_an_unknown_price_is_null_and_never_zero() -> None:
    known, unknown = tau("a_math", "Plan", 1, 1), tau("a_math", "Plan", 1, 1, dollars=None)
    assert rollout_metrics([known, known])["dollars"] == 1.0
    assert rollout_metrics([known, unknown])["dollars"] is None


def test_rates_count_graphs_and_invalid_edits_count_turns() -> None:
    metrics = rollout_metrics([tau("a_math", "[Plan, Custom] -> (Custom) * 2", 1, 1, invalid=1), tau("a_qa", "Plan", 1, 1)])
    assert (metrics["parallel_rate"], metrics["loop_rate"], metrics["conditional_rate"]) == (0.5, 0.5, 0.0)
    assert metrics["invalid_edits"] == 1 / 8
    assert metrics["operators"] == 2.0


def test_only_a_diversity_of_one_is_feasible() -> None:
    metrics = rollout_metrics([tau("a_math", "Plan", 0, 0, diversity=0.8), tau("a_math", "Plan", 1, 1)])
    assert metrics["feasible_rate"] == metrics["feasible_rate/a_math"] == 0.5


def test_the_commonest_workflow_is_told_by_kind() -> None:
    taus = [tau("a_math", "Plan", 1, 1), tau("a_math", "Plan", 1, 1), tau("a_math", "Custom", 1, 1), tau("a_qa", "Custom", 1, 1)]
    assert commonest_workflows(taus) == {"math": "Plan", "qa": "Custom"}


def test_what_a_turn_read_are_the_tokens_in_front_of_it() -> None:
    assert tokens_read([0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0]) == [3, 1, 2]
    assert tokens_read([]) == tokens_read([0, 0]) == []


def test_operators_that_do_nothing_are_a_share_of_the_operators_and_other_hacks_a_share_of_graphs() -> None:
    busy, idle = tau("a_math", "Plan", 1, 1), tau("a_math", "Plan -> Plan -> Custom -> Custom", 1, 1)
    idle.hacks = {"no_op": 2, "after_format": 2}
    metrics = rollout_metrics([busy, idle])
    assert (metrics["hack_no_op"], metrics["hack_after_format"], metrics["hack_idle_control"]) == (0.25, 0.5, 0)
