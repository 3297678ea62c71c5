"""What is logged about a step: one flat dict, each name defined here once.

Means are over the trajectories that were scored, before any filtering; dropped ones are counted by cause. `workflow_*`
names watch for the first complaint of users of such systems, a policy that designs the same workflow for everything:
mutual_information near 0 with commonest_share near 1 is that alarm.

Standard library only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import groupby, pairwise
from statistics import fmean
from typing import Any

import hacks

STOP_REASONS = ("finished", "max_turns", "max_tokens")

DEFINITIONS = {
    "reward": "mean R(tau); from -1, feasible workflows are >= 0",
    "reward_diversity": "mean R_div in [0, 1]",
    "reward_answer": "mean R_ans, the grader's score, whether released or not",
    "feasible_rate": "share of trajectories with R_div = 1",
    "accuracy": "mean grader score of the answers",
    "turns": "turns a trajectory", "operators": "operator nodes in the final graph",
    "invalid_edits": "share of turns that were no legal edit", "refused_finishes": "finishes refused, per trajectory",
    "uniform_groups": "share of groups in which all rewards are equal: they teach nothing",
    "distinct_workflows": "number of different final workflows", "commonest_share": "share of the commonest one",
    "parallel_rate": "share of graphs with a parallel", "conditional_rate": "share with a conditional",
    "loop_rate": "share with a loop",
    "hack_no_op": "share of a graph's operators whose output nothing uses (hacks.py)",
    "hack_idle_parallel": "share with a parallel of which fewer than two branches are used",
    "hack_idle_control": "share with a conditional that cannot fire or a loop that cannot repeat",
    "hack_after_format": "share with an operator behind the last Format",
    "mutual_information": "of source and workflow, in bits",
    "operator_information": "of source and the name of an operator, in bits; 0: the same operators for every source",
    "executor_calls": "live executor calls a trajectory", "executor_cached": "calls answered from a cache, a trajectory",
    "executor_tokens": "prompt and completion tokens of the executor, cached replies included, a trajectory",
    "dollars": "paid for the executor in this step, dropped trajectories too, cached replies not; null where a price is unknown",
    "tokens_per_second": "tokens of all conversations by the step's wall time",
    "grad_norm": "norm of the gradient before clipping", "clipfrac": "share of tokens whose gradient the clip cut off",
    "approx_kl": "KL(old, new), k3", "kl_ref": "k3 to the reference (LoRA off)", "entropy": "nats a policy token",
    "sampler_kl": "KL(sampler, trainer), k3", "sampler_gap": "mean |logprob - sampled_logprob|",
}


def mutual_information(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Plug-in estimate in bits; biased upwards when there are few pairs for many values."""
    n = len(pairs)
    both, left, right = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    return sum(k / n * math.log2(k * n / (left[a] * right[b])) for (a, b), k in both.items()) if n else 0.0


def workflow_metrics(taus: Sequence[Any]) -> dict[str, Any]:
    """Statistics of the final graphs."""
    texts = [tau.canvas.graph.to_text() for tau in taus]
    kinds = [set(tau.canvas.graph.structures()) for tau in taus]
    commonest = Counter(texts).most_common(1)[0][1]
    return {"operators": fmean(len(tau.canvas.graph.operators()) for tau in taus),
            "distinct_workflows": len(set(texts)), "commonest_share": commonest / len(texts),
            **{f"{kind}_rate": fmean(kind in found for found in kinds) for kind in ("parallel", "conditional", "loop")},
            **{f"hack_{name}": rate for name, rate in
               hacks.rates([(tau.hacks, len(tau.canvas.graph.operators())) for tau in taus]).items()},
            "operator_information": mutual_information([(t.task.source, n) for t in taus for n in t.canvas.graph.operators()]),
            "mutual_information": mutual_information([(t.task.source, text) for t, text in zip(taus, texts, strict=True)])}


def reward_metrics(taus: Sequence[Any]) -> dict[str, float]:
    return {"reward": fmean(tau.reward for tau in taus), "feasible_rate": fmean(tau.parts.diversity == 1 for tau in taus),
            "accuracy": fmean(tau.grade.score for tau in taus)}


def rollout_metrics(taus: Sequence[Any]) -> dict[str, Any]:
    """Everything about a step's trajectories; needs at least one that was not dropped."""
    scored = [tau for tau in taus if not tau.dropped]
    assert scored, "no trajectory was scored"
    metrics: dict[str, Any] = {"trajectories": len(taus), "dropped": len(taus) - len(scored)}
    metrics |= {f"dropped/{cause}": n for cause, n in sorted(Counter(t.dropped for t in taus if t.dropped).items())}
    metrics |= reward_metrics(scored)
    for part in ("checker", "format", "operators", "structure", "diversity"):
        metrics[f"reward_{part}"] = fmean(getattr(tau.parts, part) for tau in scored)
    metrics["reward_answer"] = metrics["accuracy"]
    turns = [turn for tau in scored for turn in tau.turns]
    metrics["turns"] = len(turns) / len(scored)
    metrics["invalid_edits"] = fmean(bool(turn.info.get("invalid")) for turn in turns)
    metrics["refused_finishes"] = sum(bool(turn.info.get("refused")) for turn in turns) / len(scored)
    metrics |= {f"stop/{reason}": fmean(tau.stop_reason == reason for tau in scored) for reason in STOP_REASONS}
    metrics |= workflow_metrics(scored)
    metrics["policy_tokens"] = fmean(sum(tau.mask) for tau in scored)
    metrics["conversation_tokens"] = fmean(len(tau.tokens) for tau in scored)
    usages = [tau.canvas.usage for tau in scored]
    metrics["executor_calls"] = fmean(usage.calls for usage in usages)
    metrics["executor_cached"] = fmean(usage.cached for usage in usages)
    metrics["executor_tokens"] = fmean(usage.prompt_tokens + usage.completion_tokens for usage in usages)
    prices = [tau.canvas.usage.dollars for tau in taus]
    metrics["dollars"] = None if None in prices else sum(prices)
    for source in sorted({tau.task.source for tau in scored}):
        of_source = reward_metrics([tau for tau in scored if tau.task.source == source])
        metrics |= {f"{name}/{source}": value for name, value in of_source.items()}
    return metrics


def commonest_workflows(taus: Sequence[Any]) -> dict[str, str]:
    """The commonest final workflow of each kind of task."""
    by_kind: dict[str, Counter] = {}
    for tau in taus:
        by_kind.setdefault(tau.task.kind, Counter())[tau.canvas.graph.to_text()] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in sorted(by_kind.items())}


def trajectory_record(tau: Any, step: int) -> dict[str, Any]:
    """A readable line of trajectories.jsonl."""
    return {
        "step": step, "task_id": tau.task.id, "source": tau.task.source, "kind": tau.task.kind, "problem": tau.task.problem,
        "answers": list(tau.task.answers), "reward": tau.reward, "parts": vars(tau.parts) if tau.parts else None,
        "hacks": tau.hacks, "advantage": tau.advantage, "score": tau.grade.score if tau.grade else None, "answer": tau.answer,
        "stop_reason": tau.stop_reason, "dropped": tau.dropped, "error": tau.error, "version": tau.version,
        "workflow": tau.canvas.graph.to_text(), "n_tokens": len(tau.tokens),
        "n_policy_tokens": sum(tau.mask), "usage": tau.canvas.usage.to_dict(),
        "turns": [{"text": turn.text, "edit": turn.info.get("edit", ""), "ok": turn.ok, "feedback": turn.feedback,
                   "workflow": turn.info.get("workflow", ""), "executed": turn.info.get("executed", []),
                   "failed": turn.info.get("failed", []), "cached": turn.info.get("cached", []),
                   "results": turn.info.get("results", {}), "n_read": n_read, "n_sampled": turn.n_sampled,
                   "widths": turn.widths}
                  for turn, n_read in zip(tau.turns, tokens_read(tau.mask), strict=False)],
    }


def tokens_read(mask: Sequence[int]) -> list[int]:
    """How many tokens, prompt or feedback, were put in front of each turn: the zeros before each run of ones."""
    runs = [(trained, len(list(run))) for trained, run in groupby(mask)]
    return [n for (trained, n), (after, _) in pairwise(runs) if after]


def evaluation_record(tau: Any, method: str = "policy", policy_price: Sequence[float] | None = None) -> dict[str, Any]:
    """A line of an evaluation's trajectories.jsonl: what stats.py reads. Dollars are what the work costs, replies from a
    cache at the price of their recording; unknown if a part of them is."""
    names, usage = tau.canvas.graph.operators(), tau.canvas.usage
    read = sum(i for i in range(1, len(tau.mask)) if tau.mask[i] and not tau.mask[i - 1])  # what precedes each turn
    dollars = usage.cost
    if any(tau.mask):
        policy = (read * policy_price[0] + sum(tau.mask) * policy_price[1]) / 1e6 if policy_price else None
        dollars = None if dollars is None or policy is None else dollars + policy
    grade = tau.grade
    scores = {"score": grade.score, "em": grade.em, "f1": grade.f1} if grade else {"score": 0.0, "em": 0.0, "f1": 0.0}
    return {**trajectory_record(tau, 0), "method": method, "run": tau.index, **scores, "operators": len(names),
            "operator_types": len(set(names)), "policy_tokens_read": read, "seconds": sum(tau.seconds.values()),
            "dollars": dollars, "grader_error": grade.error if grade else "", "judge": tau.judge}
