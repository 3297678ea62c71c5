"""Advantages, loss and log-probabilities against brute force: scalar loops, finite differences, full logits."""

import doctest
import itertools
import math
import random
from contextlib import nullcontext
from statistics import fmean, pstdev, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Tiny, V, full_logprobs, some_trajectories
from torch import Tensor, nn

import cwrpo
from cwrpo import add_stats, collate, cwrpo_loss, group_advantages, mean_stats, token_logprobs, uniform_groups

# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def test_advantages_equal_a_loop_over_groups() -> None:
    rng = random.Random(0)
    groups = [rng.choice(["math", "qa", ("code", 1)]) for _ in range(40)]
    rewards = [rng.uniform(-1, 1) for _ in groups]
    for group, reward, advantage in zip(groups, rewards, group_advantages(rewards, groups).tolist(), strict=True):
        members = [r for g, r in zip(groups, rewards, strict=True) if g == group]
        mean = sum(members) / len(members)
        std = math.sqrt(sum((r - mean) ** 2 for r in members) / len(members))
        assert advantage == pytest.approx((reward - mean) / std, rel=1e-6)


@pytest.mark.parametrize("reward", [0.1, -1.0, 1 / 3, 1e9])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_a_uniform_or_singleton_group_gets_exactly_zero(reward: float, n: int) -> None:
    advantages = group_advantages([reward] * n + [5.0, 6.0], ["a"] * n + ["b"] * 2)
    assert advantages.tolist() == [0.0] * n + [-1.0, 1.0]


def test_a_nearly_uniform_group_is_divided_by_the_floor() -> None:
    assert group_advantages([0.5, 0.5002], [0, 0], std_floor=0.01).tolist() == pytest.approx([-0.01, 0.01])


def test_advantages_accept_tensors_and_do_not_depend_on_the_order() -> None:
    rewards, groups = torch.tensor([0.0, 1.0, 0.25, -1.0, 0.5]), [1, 1, 2, 2, 2]
    order = [3, 0, 4, 2, 1]
    shuffled = group_advantages(rewards[order], [groups[i] for i in order])
    torch.testing.assert_close(shuffled, group_advantages(rewards, groups)[order])


def test_a_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(AssertionError, match="not finite"):
        group_advantages([0.0, math.nan], [0, 0])


def test_uniform_groups_are_named() -> None:
    assert uniform_groups([0.1, 0.1, 0.1, 1, 2, 7], ["a", "a", "a", "b", "b", "c"]) == {"a": True, "b": False, "c": True}


def test_doctests() -> None:
    assert doctest.testmod(cwrpo).failed == 0
    assert doctest.testmod(cwrpo).attempted > 0


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def reference_loss(new: list, old: list, ref: list, mask: list, A: list, clip_eps: float, kl_coef: float,
                   denominator: float, loss_norm: str = "trajectory", clip_eps_high: float | None = None,
                   entropy: list | None = None, entropy_coef: float = 0.0, sampled_logprobs: list | None = None,
                   tis_cap: float | None = None) -> float:
    """Eq. 10 in plain floats, one token at a time."""
    J = 0.0
    high = clip_eps if clip_eps_high is None else clip_eps_high
    for i in range(len(new)):
        for t in range(len(new[i])):
            if not mask[i][t]:
                continue
            r = math.exp(new[i][t] - old[i][t])
            term = min(r * A[i], min(max(r, 1 - clip_eps), 1 + high) * A[i])
            if tis_cap is not None:
                term *= min(math.exp(old[i][t] - sampled_logprobs[i][t]), tis_cap)
            d = ref[i][t] - new[i][t]
            term -= kl_coef * (math.exp(d) - d - 1)
            if entropy is not None:
                term += entropy_coef * entropy[i][t]
            J += term / (sum(mask[i]) if loss_norm == "trajectory" else 1) / denominator
    return -J


def some_arguments(B: int = 3, T: int = 7, seed: int = 0) -> dict[str, Any]:
    """Random (B, T) arguments of the loss, float64, with ratios on both sides of both clip bounds."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)

    def near(scale: float) -> Tensor:
        return old + scale * torch.randn(B, T, generator=g, dtype=torch.float64)

    mask = torch.rand(B, T, generator=g) < 0.6
    mask[:, 0], mask[:, 1] = False, True
    return {"logprobs": near(0.4), "old_logprobs": old, "ref_logprobs": near(0.5), "mask": mask,
            "advantages": torch.randn(B, generator=g, dtype=torch.float64), "entropy": -near(0.1),
            "sampled_logprobs": near(0.3), "clip_eps": 0.2, "kl_coef": 0.05, "denominator": 3}


NORMS = {"trajectory": 3, "token": 12, "constant": 2.5}
SWITCHES = {"clip_eps_high": (None, 0.4), "kl_coef": (0.0, 0.7), "entropy_coef": (0.0, 0.3), "tis_cap": (None, 1.1),
            "clip_eps": (0.2, 0.05)}


@pytest.mark.parametrize("loss_norm", NORMS)
@pytest.mark.parametrize("values", itertools.product(*SWITCHES.values()), ids=str)
def test_loss_and_gradient_equal_the_scalar_reference(loss_norm: str, values: tuple) -> None:
    switches = dict(zip(SWITCHES, values, strict=True)) | {"loss_norm": loss_norm, "denominator": NORMS[loss_norm]}
    arguments = some_arguments(T=5) | switches
    leaves = {name: arguments[name].requires_grad_() for name in ("logprobs", "entropy")}
    loss, _ = cwrpo_loss(**arguments)
    loss.backward()
    floats = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    floats = {{"logprobs": "new", "old_logprobs": "old", "ref_logprobs": "ref", "advantages": "A"}.get(name, name): value
              for name, value in floats.items()}
    assert loss.item() == pytest.approx(reference_loss(**floats), abs=1e-12)
    for name, reference_name in (("logprobs", "new"), ("entropy", "entropy")):
        gradient = torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad
        for i, row in enumerate(floats[reference_name]):
            for t, value in enumerate(row):
                sides = []
                for h in (1e-6, -1e-6):
                    row[t] = value + h
                    sides.append(reference_loss(**floats))
                row[t] = value
                assert gradient[i, t].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-8)


def trl_loss(new: list, old: list, ref: list, mask: list, A: list, epsilon: float, epsilon_high: float, beta: float,
             loss_type: str, max_length: int, ratios: list | None) -> float:
    """GRPO's losses as TRL documents them (https://huggingface.co/docs/trl/main/en/grpo_trainer, "Computing the loss").

    grpo: mean over completions of the mean over tokens; bnpo: mean over all tokens; dr_grpo: sum over B * max_length.
    ratios: min(trainer / sampler, cap) per token, which TRL multiplies into the surrogate and not into the KL.
    """
    completions = []
    for i in range(len(new)):
        tokens = []
        for t in (t for t in range(len(new[i])) if mask[i][t]):
            ratio = math.exp(new[i][t] - old[i][t])
            clipped = max(1 - epsilon, min(1 + epsilon_high, ratio))
            loss = -min(ratio * A[i], clipped * A[i]) * (1.0 if ratios is None else ratios[i][t])
            tokens.append(loss + beta * (math.exp(ref[i][t] - new[i][t]) - (ref[i][t] - new[i][t]) - 1))
        completions.append(tokens)
    every = [loss for tokens in completions for loss in tokens]
    if loss_type == "grpo":
        return fmean(fmean(tokens) for tokens in completions)
    return sum(every) / (len(every) if loss_type == "bnpo" else len(new) * max_length)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("loss_type", "loss_norm"), [("grpo", "trajectory"), ("bnpo", "token"), ("dr_grpo", "constant")])
def test_loss_equals_trls_where_the_settings_coincide(loss_type: str, loss_norm: str, beta: float, corrected: bool) -> None:
    """There they are called epsilon, beta, loss_type and vllm_importance_sampling_cap."""
    arguments = some_arguments(B=4, T=9) | {"kl_coef": beta, "clip_eps_high": 0.28, "tis_cap": 1.2 if corrected else None}
    mask, old = arguments["mask"], arguments["old_logprobs"]
    denominator = {"trajectory": 4, "token": int(mask.sum()), "constant": 4 * 9}[loss_norm]
    loss, _ = cwrpo_loss(**(arguments | {"denominator": denominator, "loss_norm": loss_norm}))
    ratios = (old - arguments["sampled_logprobs"]).exp().clamp(max=1.2).tolist() if corrected else None
    expected = trl_loss(arguments["logprobs"].tolist(), old.tolist(), arguments["ref_logprobs"].tolist(), mask.tolist(),
                        arguments["advantages"].tolist(), 0.2, 0.28, beta, loss_type, 9, ratios)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_advantages_are_trls_but_for_the_kind_of_std_and_what_keeps_it_from_zero() -> None:
    """TRL: (R - mean) / (std + 1e-4) with the sample's std (n - 1). Ours: the population's, at least the floor."""
    rewards = [0.3, -0.8, 1.0, 0.0]
    trl = [(reward - fmean(rewards)) / (stdev(rewards) + 1e-4) for reward in rewards]
    ours = group_advantages(rewards, [0] * 4).tolist()
    assert ours == pytest.approx([a * (stdev(rewards) + 1e-4) / pstdev(rewards) for a in trl], rel=1e-6)


@pytest.mark.parametrize(("advantage", "ratio", "objective", "slope"), [
    # objective = min(r A, clip(r) A); slope = its derivative by log r
    (1.0, 0.5, 0.5, 0.5),        # good token, grown rarer: pull it back up
    (1.0, 1.5, 1.2, 0.0),        # good token, already likelier: clipped
    (-1.0, 0.5, -0.8, 0.0),      # bad token, already rarer: clipped
    (-1.0, 1.5, -1.5, -1.5),     # bad token, grown likelier: push it down
])
def test_clip_in_four_quadrants(advantage: float, ratio: float, objective: float, slope: float) -> None:
    new = torch.tensor([[0.0, math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, stats = cwrpo_loss(new, torch.zeros(1, 2), None, torch.tensor([[0, 1]]), torch.tensor([advantage]), 0.2, 0.0, 1)
    loss.backward()
    assert loss.item() == pytest.approx(-objective)
    assert new.grad.tolist() == [[0.0, pytest.approx(-slope)]]
    assert (stats["clipfrac"], stats["ratio_max"]) == (slope == 0, pytest.approx(ratio))


def test_gradient_of_the_kl_term_points_back_to_the_reference() -> None:
    drift = torch.tensor([[0.0, 0.7, -0.7, 0.0]], dtype=torch.float64)
    new = (drift - 1).requires_grad_()
    loss, stats = cwrpo_loss(new, drift - 1, torch.full((1, 4), -1.0, dtype=torch.float64), torch.tensor([[0, 1, 1, 1]]),
                             torch.zeros(1), 0.2, 1.0, 1)
    loss.backward()
    _, above, below, equal = new.grad[0].tolist()
    assert above > 0 > below, "descent must lower what lies above the reference and raise what lies below"
    assert equal == 0
    assert stats["kl_ref"] == pytest.approx(math.exp(-0.7) + 0.7 - 1 + math.exp(0.7) - 0.7 - 1)


def test_whatever_stands_outside_the_mask_changes_nothing_and_gets_no_gradient() -> None:
    arguments = some_arguments() | {"tis_cap": 1.2, "entropy_coef": 0.1}
    outside = ~arguments["mask"]
    expected, expected_stats = cwrpo_loss(**arguments)
    for garbage in (0.0, 77.0, math.nan, -math.inf):
        changed = dict(arguments)
        for name in ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "sampled_logprobs"):
            changed[name] = arguments[name].masked_fill(outside, garbage)
        changed["logprobs"].requires_grad_()
        loss, stats = cwrpo_loss(**changed)
        loss.backward()
        assert loss.item() == expected.item()
        assert stats == expected_stats
        assert (changed["logprobs"].grad[outside] == 0).all()
        assert (changed["logprobs"].grad[~outside] != 0).any()


def test_loss_and_stats_add_up_over_any_split_and_order() -> None:
    arguments = some_arguments(B=6)
    for loss_norm in ("trajectory", "token", "constant"):
        whole, whole_stats = cwrpo_loss(**arguments, loss_norm=loss_norm)
        total, totals = 0.0, {}
        for rows in ([4], [0, 2, 5], [3, 1]):
            part = {name: value[rows] if isinstance(value, Tensor) else value for name, value in arguments.items()}
            loss, stats = cwrpo_loss(**part, loss_norm=loss_norm)
            total += loss.item()
            add_stats(totals, stats)
        assert total == pytest.approx(whole.item(), abs=1e-12)
        assert totals == pytest.approx(whole_stats)


def test_a_trajectory_without_tokens_of_the_policy_adds_nothing() -> None:
    arguments = some_arguments(B=2) | {"entropy_coef": 0.1}
    arguments["mask"][1] = False
    leaves = [arguments[name].requires_grad_() for name in ("logprobs", "entropy")]
    alone = {name: value[:1] if isinstance(value, Tensor) else value for name, value in arguments.items()}
    loss = cwrpo_loss(**arguments)[0]
    assert loss.item() == pytest.approx(cwrpo_loss(**alone)[0].item(), rel=1e-12)
    loss.backward()
    for leaf in leaves:
        assert (leaf.grad[0] != 0).any()
        assert (leaf.grad[1] == 0).all(), "0, not 0/0"


def test_old_and_reference_are_constants_even_if_a_caller_forgets_to_detach() -> None:
    new = torch.tensor([[0.0, -1.0]], requires_grad=True)
    loss, _ = cwrpo_loss(new, new, 3 * new, torch.tensor([[0, 1]]), torch.tensor([2.0]), 0.2, 0.1, 1)
    loss.backward()
    assert new.grad.tolist() == [[0.0, pytest.approx(-2.0 + 0.1 * (1 - math.exp(-2)))]]


def test_a_missing_sampled_logprob_is_an_error() -> None:
    arguments = some_arguments()
    arguments["sampled_logprobs"][0, 1] = math.nan
    with pytest.raises(AssertionError, match="no sampled log-probability"):
        cwrpo_loss(**arguments)


@pytest.mark.parametrize(("missing", "switches"), [("ref_logprobs", {}), ("sampled_logprobs", {"tis_cap": 2.0}),
                                                   ("entropy", {"entropy_coef": 0.1})])
def test_a_switch_without_what_it_needs_is_an_error(missing: str, switches: dict) -> None:
    with pytest.raises(AssertionError, match=f"needs {missing}"):
        cwrpo_loss(**(some_arguments() | switches | {missing: None}))


def test_terms_that_are_switched_off_cannot_poison_the_gradient() -> None:
    new = torch.tensor([[0.0, -1.0]], requires_grad=True)
    loss, _ = cwrpo_loss(new, new, torch.tensor([[0.0, 1e4]]), torch.tensor([[0, 1]]), torch.tensor([1.0]), 0.2, 0.0, 1,
                         entropy=new * math.inf)
    loss.backward()
    assert new.grad.tolist() == [[0.0, -1.0]]


def test_logged_means_are_what_they_are_called() -> None:
    arguments = some_arguments()
    mask = arguments["mask"]
    _, stats = cwrpo_loss(**arguments)
    new, old, ref, sampled = (arguments[f"{name}logprobs"][mask] for name in ("", "old_", "ref_", "sampled_"))
    ratio, A = (new - old).exp(), arguments["advantages"][:, None].expand(mask.shape)[mask]
    clipped = [(a > 0 and r > 1.2) or (a < 0 and r < 0.8) for a, r in zip(A.tolist(), ratio.tolist(), strict=True)]
    assert 0 < sum(clipped) < len(clipped)
    assert mean_stats(stats) == pytest.approx({
        "clipfrac": sum(clipped) / len(clipped),
        "ratio_max": ratio.max().item(),
        "approx_kl": (ratio - 1 - (new - old)).mean().item(),
        "kl_ref": ((ref - new).exp() - 1 - (ref - new)).mean().item(),
        "entropy": arguments["entropy"][mask].mean().item(),
        "sampler_gap": (old - sampled).abs().mean().item(),
        "sampler_gap_max": (old - sampled).abs().max().item(),
        "sampler_kl": ((old - sampled).exp() - 1 - (old - sampled)).mean().item(),
    })


def test_where_the_policy_sampled_nothing_there_is_no_importance_weight_and_no_gap() -> None:
    arguments = some_arguments() | {"tis_cap": 5.0}
    arguments["sampled_mask"] = arguments["mask"].clone()
    arguments["sampled_mask"][:, 1] = False
    arguments["sampled_logprobs"][:, 1] = math.nan
    loss, stats = cwrpo_loss(**arguments)
    neutral = arguments["sampled_logprobs"].clone()
    neutral[:, 1] = arguments["old_logprobs"][:, 1]
    expected, _ = cwrpo_loss(**(arguments | {"sampled_mask": None, "sampled_logprobs": neutral}))
    assert loss.item() == expected.item()
    sampled = arguments["sampled_mask"]
    gap = (arguments["old_logprobs"] - arguments["sampled_logprobs"])[sampled].abs().mean().item()
    assert mean_stats(stats)["sampler_gap"] == pytest.approx(gap)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize(("temperature", "vocab_limit"), [(1.0, V), (0.6, 9)])
def test_token_logprobs_equal_those_from_full_logits(chunk: int, temperature: float, vocab_limit: int) -> None:
    model, batch = Tiny(), collate(some_trajectories(5))
    ids = batch.ids.clamp(max=vocab_limit - 1)
    logprobs, entropy = token_logprobs(model, ids, batch.mask, temperature, vocab_limit, chunk)
    torch.testing.assert_close(logprobs, full_logprobs(model, ids, batch.mask, temperature, vocab_limit))
    probabilities = (model.head(model.hidden(ids))[:, :-1, :vocab_limit] / temperature).softmax(-1)
    expected = torch.zeros_like(entropy)
    expected[:, 1:] = torch.distributions.Categorical(probabilities).entropy() * batch.mask[:, 1:]
    torch.testing.assert_close(entropy, expected)


def test_chunks_and_padding_change_neither_values_nor_gradients() -> None:
    results = []
    for chunk, padding, keep_grad in ((1000, 0, True), (2, 0, True), (3, 5, True), (3, 0, False)):
        model, batch = Tiny(), collate(some_trajectories(4))
        ids = nn.functional.pad(batch.ids, (0, padding), value=7)
        mask = nn.functional.pad(batch.mask, (0, padding))
        with nullcontext() if keep_grad else torch.no_grad():
            logprobs, entropy = token_logprobs(model, ids, mask, chunk=chunk)
        if keep_grad:
            (logprobs.sum() + 0.3 * entropy.sum()).backward()
            results.append([logprobs[:, :batch.ids.shape[1]], *(p.grad for p in model.parameters())])
        else:
            torch.testing.assert_close(logprobs, results[0][0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_the_head_never_sees_more_than_a_chunk_nor_an_untrained_position() -> None:
    model, batch = Tiny(), collate(some_trajectories(6))
    logprobs, _ = token_logprobs(model, batch.ids, batch.mask, chunk=4)
    assert max(model.head_rows) == 4
    assert sum(model.head_rows) == batch.mask.sum()
    logprobs.sum().backward()
    assert sum(model.head_rows) == 2 * batch.mask.sum(), "backward computes every chunk once more"


def test_a_head_that_is_trained_alone_gets_its_gradient() -> None:
    model, batch = Tiny(), collate(some_trajectories(2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("out."))
    token_logprobs(model, batch.ids, batch.mask)[0].sum().backward()
    assert model.out.weight.grad.abs().sum() > 0


def test_bfloat16_logits_are_scored_in_float32() -> None:
    model = SimpleNamespace(hidden=lambda ids, wanted: torch.randn(1, 4, 8).bfloat16()[wanted], head=lambda hidden: hidden)
    logprobs, _ = token_logprobs(model, torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 1, 1]]))
    assert logprobs.dtype == torch.float32


def test_an_empty_mask_still_has_a_gradient_path() -> None:
    model, ids = Tiny(), torch.tensor([[1, 2, 3]])
    logprobs, _ = token_logprobs(model, ids, torch.zeros_like(ids))
    logprobs.sum().backward()
    assert logprobs.tolist() == [[0.0] * 3]


def test_what_cannot_be_scored_is_refused() -> None:
    model, ids = Tiny(), torch.tensor([[1, 2, 9]])
    with pytest.raises(AssertionError, match="position 0"):
        token_logprobs(model, ids, torch.tensor([[1, 0, 0]]))
    with pytest.raises(AssertionError, match="greedy"):
        token_logprobs(model, ids, torch.tensor([[0, 1, 1]]), temperature=0.0)
    with pytest.raises(AssertionError, match="vocab_limit 9"):
        token_logprobs(model, ids, torch.tensor([[0, 1, 1]]), vocab_limit=9)
