"""Batches and the update: no split changes the step, the step is the right one; with the real model at the end."""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import Sample, Tiny, V, full_logprobs, some_trajectories, without_lora
from torch import Tensor

import cwrpo
from cwrpo import (
    Batch,
    UpdateConfig,
    batch_logprobs,
    batch_loss,
    collate,
    group_advantages,
    micro_batches,
    token_logprobs,
    update,
)
from lora import add_lora, disable_lora, lora_parameters
from policy import InProcessSampler
from qwen3 import Qwen3, Qwen3Config
from rollout import Job, RolloutConfig, Trajectory, rollout

# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_every_trajectory_is_in_exactly_one_micro_batch_within_the_budget() -> None:
    for seed in range(30):
        taus = some_trajectories(seed, seed, turns=4)
        batches = micro_batches(taus, max_tokens=40)
        assert sorted(tau.task for batch in batches for tau in batch) == list(range(seed))
        for batch in batches:
            longest = max(len(tau.tokens) for tau in batch)
            assert len(batch) == 1 or len(batch) * longest <= 40
            assert all(len(tau.tokens) >= 0.75 * longest for tau in batch), "padding costs as much as tokens do"


def test_a_trajectory_longer_than_the_budget_is_alone_and_not_dropped() -> None:
    assert [len(batch) for batch in micro_batches(some_trajectories(4), max_tokens=1)] == [1, 1, 1, 1]


def test_collate_pads_on_the_right_and_masks_by_position() -> None:
    pad_like = Trajectory(task=0, index=0, advantage=2.0)
    pad_like.add_prompt([0, 0])
    pad_like.add_sample(Sample([0, 0], [-1.0, -2.0]))        # the policy sampled the id that pads
    longer = Trajectory(task=1, index=0, advantage=-1.0)
    longer.add_prompt([5])
    longer.add_sample(Sample([6, 7], [-3.0, -4.0]))
    longer.add_feedback([8])
    longer.add_sample(Sample([9], [-5.0]))
    batch = collate([pad_like, longer])
    assert batch.ids.tolist() == [[0, 0, 0, 0, 0], [5, 6, 7, 8, 9]]
    assert batch.mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 0, 1]]
    assert batch.sampled_logprobs.tolist() == [[0, 0, -1, -2, 0], [0, -3, -4, 0, -5]]
    assert batch.advantages.tolist() == [2, -1]
    assert torch.equal(batch.mask, batch.sampled_mask)


def test_no_mask_trains_everything_but_the_prompt_and_the_padding() -> None:
    batch = collate(some_trajectories(5), no_mask=True)
    for tau, mask, sampled in zip(some_trajectories(5), batch.mask.tolist(), batch.sampled_mask.tolist(), strict=True):
        start, end = tau.mask.index(1), len(tau.mask)
        assert mask == [start <= t < end for t in range(len(mask))]
        assert sampled == [bool(m) for m in tau.mask] + [False] * (len(mask) - end)


def test_collate_takes_a_trajectory_without_any_token() -> None:
    batch = collate([Trajectory(task=0, index=0, advantage=0.0)], no_mask=True)
    assert (batch.ids.tolist(), batch.mask.tolist()) == ([[0]], [[False]])


# ---------------------------------------------------------------------------------------------------------------------
# The update


def test_every_setting_is_read() -> None:
    """A loss term whose coefficient batch_loss does not hand over would be tested, have a flag, and do nothing."""
    source = Path(cwrpo.__file__).read_text()
    assert [field.name for field in fields(UpdateConfig) if not re.search(rf"config\.{field.name}\b", source)] == []


PLAIN = UpdateConfig(max_grad_norm=math.inf, kl_coef=0.1, entropy_coef=0.05, micro_batch_tokens=40, chunk=3)


def step(taus: Sequence[Trajectory], config: UpdateConfig = PLAIN, model: Tiny | None = None,
         lr: float = 1.0) -> tuple[list[Tensor], dict[str, float]]:
    """One update with plain SGD: return by how much every parameter moved, and the stats."""
    model = model or Tiny()
    before = [p.detach().clone() for p in model.parameters()]
    stats = update(model, torch.optim.SGD(model.parameters(), lr=lr), taus, config, without_lora)
    return [(p.detach() - b) / lr for p, b in zip(model.parameters(), before, strict=True)], stats


@pytest.mark.parametrize("loss_norm", ["trajectory", "token", "constant"])
def test_micro_batches_order_and_padding_change_neither_step_nor_stats(loss_norm: str) -> None:
    taus, config = some_trajectories(7), replace(PLAIN, loss_norm=loss_norm, loss_constant=9.0)
    moved, stats = step(taus, replace(config, micro_batch_tokens=10_000))
    for other, tokens in ((taus, 1), (taus, 45), (taus[::-1], 45), (taus[3:] + taus[:3], 10_000)):
        other_moved, other_stats = step(other, replace(config, micro_batch_tokens=tokens))
        torch.testing.assert_close(other_moved, moved)
        assert other_stats == pytest.approx(stats)


@pytest.mark.parametrize("loss_norm", ["trajectory", "token", "constant"])
def test_gradient_through_the_model_equals_finite_differences(loss_norm: str) -> None:
    """All of batch_loss: shift, temperature, chunks, ratio against other old weights, clip, KL, entropy, importance."""
    config = UpdateConfig(kl_coef=0.3, entropy_coef=0.1, clip_eps_high=0.3, tis_cap=1.5, temperature=0.8, vocab_limit=V,
                          loss_norm=loss_norm, chunk=4)
    model, batch = Tiny(seed=1), collate(some_trajectories(4))
    with torch.no_grad():
        with without_lora(model):
            ref = batch_logprobs(model, batch, config)[0]
        old = batch_logprobs(model, batch, config)[0]
        model.lora.add_(0.5)                         # the weights have moved since: ratios leave 1

    def loss() -> Tensor:
        return batch_loss(model, batch, old, ref, 3.0, config)[0]

    loss().backward()
    rng = random.Random(0)
    for name, parameter in model.named_parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in rng.sample(range(len(flat)), min(len(flat), 5)):
            value, sides = flat[i].item(), []
            for h in (1e-6, -1e-6):
                flat[i] = value + h
                with torch.no_grad():
                    sides.append(loss().item())
            flat[i] = value
            assert gradient[i].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7), name


def test_one_step_per_batch_needs_no_second_forward_for_the_old_logprobs() -> None:
    taus, model = some_trajectories(5), Tiny()
    moved, stats = step(taus, replace(PLAIN, kl_coef=0.0), model)
    assert [training for _, training, _ in model.calls] == [True] * len(micro_batches(taus, 40))
    twice, config = Tiny(), replace(PLAIN, kl_coef=0.0)
    for part in micro_batches(taus, 40):
        batch = collate(part)
        with torch.no_grad():
            old = batch_logprobs(twice, batch, config)[0]
        batch_loss(twice, batch, old, None, len(taus), config)[0].backward()
    for delta, parameter in zip(moved, twice.parameters(), strict=True):
        torch.testing.assert_close(delta, -parameter.grad if parameter.grad is not None else torch.zeros_like(delta))
    assert stats["ratio_max"] == 1
    assert stats["clipfrac"] == stats["approx_kl"] == 0


def test_later_epochs_are_compared_with_the_weights_before_the_first() -> None:
    taus, config, model = some_trajectories(6), replace(PLAIN, epochs=3), Tiny()
    _, stats = step(taus, config, model, lr=0.05)
    assert stats["approx_kl"] > 0
    assert stats["ratio_max"] > 1
    twice = Tiny()
    optimizer = torch.optim.SGD(twice.parameters(), lr=0.05)
    batch = collate(taus)
    with torch.no_grad():
        old = batch_logprobs(twice, batch, config)[0]
        with without_lora(twice):
            ref = batch_logprobs(twice, batch, config)[0]
    for _ in range(3):
        optimizer.zero_grad()
        batch_loss(twice, batch, old, ref, len(taus), config)[0].backward()
        optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(twice.parameters()))


def test_a_sampled_end_token_is_trained_and_feedback_is_not() -> None:
    tau = Trajectory(task=0, index=0, advantage=1.0, stop_reason="finished")
    tau.add_prompt([1, 2])
    tau.add_sample(Sample([3, 10], [-1.0, -1.0]))            # 10 ends the turn
    tau.add_feedback([4, 5])
    tau.add_sample(Sample([6, 10], [-1.0, -1.0]))
    model, batch = Tiny(), collate([tau])

    def logprobs() -> list[float]:
        return token_logprobs(model, batch.ids, torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]))[0][0].tolist()

    before = logprobs()
    config = replace(PLAIN, kl_coef=0.0, entropy_coef=0.0)
    bias = step([tau], config, model, lr=0.01)[0][-1]        # how the head's bias moved, (V,)
    gained = [after - b for after, b in zip(logprobs(), before, strict=True)]
    assert min(gained[t] for t in (2, 3, 6, 7)) > 0, "every sampled token of a good trajectory must become likelier"
    assert (bias[[4, 5]] < 0).all(), "ids of feedback move only as rivals of what was sampled"


@pytest.mark.parametrize(("kl_coef", "epochs", "expected"), [
    (0.0, 1, [(True, True)]), (0.1, 1, [(False, False), (True, True)]),
    (0.1, 2, [(False, False), (False, True), (True, True), (True, True)])])
def test_forward_passes_are_those_needed_with_dropout_only_where_gradients_flow(
        kl_coef: float, epochs: int, expected: list) -> None:
    model = Tiny(dropout=0.5)
    step(some_trajectories(3), replace(PLAIN, kl_coef=kl_coef, epochs=epochs, micro_batch_tokens=10_000), model)
    assert [(training, lora_on) for _, training, lora_on in model.calls] == expected
    assert not model.training


def test_with_dropout_the_first_ratio_is_still_one() -> None:
    _, stats = step(some_trajectories(4), PLAIN, Tiny(dropout=0.5))
    assert stats["ratio_max"] == 1


def test_kl_ref_is_measured_against_the_model_without_lora() -> None:
    taus, model = some_trajectories(4), Tiny()
    batch = collate(taus)
    with torch.no_grad():
        new = full_logprobs(model, batch.ids, batch.mask)[batch.mask]
        with without_lora(model):
            ref = full_logprobs(model, batch.ids, batch.mask)[batch.mask]
    _, stats = step(taus)
    assert stats["kl_ref"] == pytest.approx(((ref - new).exp() - 1 - (ref - new)).mean().item())
    assert stats["kl_ref"] > 1e-4
    sampled = torch.tensor([value for tau in taus for value, m in zip(tau.sampled_logprobs, tau.mask, strict=True) if m])
    assert stats["sampler_gap"] == pytest.approx((new - sampled).abs().mean().item())


def test_what_is_logged_belongs_to_the_step_taken() -> None:
    taus, config = some_trajectories(4), replace(PLAIN, max_grad_norm=0.01)
    unclipped, free = step(taus)
    norm = torch.cat([delta.flatten() for delta in unclipped]).norm().item()
    moved, stats = step(taus, config)
    assert free["grad_norm"] == stats["grad_norm"] == pytest.approx(norm), "grad_norm is the norm before clipping"
    assert torch.cat([delta.flatten() for delta in moved]).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert (stats["trajectories"], stats["tokens"]) == (4, sum(sum(tau.mask) for tau in taus))
    assert step(taus, lr=0.25)[1]["lr"] == 0.25
    batch, model = collate(taus), Tiny()
    with torch.no_grad():
        with without_lora(model):
            ref = batch_logprobs(model, batch, PLAIN)[0]
        whole = batch_loss(model, batch, None, ref, 4, PLAIN)[0].item()
    assert stats["loss"] == pytest.approx(whole), "not the loss of the last micro-batch"


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    taus, model = some_trajectories(3), Tiny()
    taus[1].advantage = math.inf
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="no step was taken"):
        step(taus, model=model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("spoil", [{"stop_reason": "policy_error"}, {"grade": SimpleNamespace(error="crash")},
                                   {"advantage": None}])
def test_what_is_not_for_training_is_refused(spoil: dict) -> None:
    taus = some_trajectories(3)
    for name, value in spoil.items():
        setattr(taus[1], name, value)
    with pytest.raises(AssertionError, match=r"not for training|no advantage"):
        step(taus)


def test_nothing_to_train_on_is_said_so() -> None:
    with pytest.raises(ValueError, match="0 trajectories"):
        step([])
    with pytest.raises(ValueError, match="1 trajectories, 0 tokens"):
        step([Trajectory(task=0, index=0, advantage=1.0)])
    with pytest.raises(ValueError, match="denominator=None"):
        step(some_trajectories(2), replace(PLAIN, loss_norm="constant"))


def test_a_trajectory_without_tokens_counts_in_the_denominator_and_moves_nothing() -> None:
    taus = some_trajectories(3)
    moved, _ = step(taus)
    more, _ = step([*taus, Trajectory(task=9, index=0, advantage=1.0)], replace(PLAIN, micro_batch_tokens=1))
    torch.testing.assert_close(more, [delta * 3 / 4 for delta in moved])


# ---------------------------------------------------------------------------------------------------------------------
# With the real model, LoRA and sampler


class Letters:
    """A tokenizer of 24 ids: feedback and prompts are runs of low ids, 23 ends a turn."""

    end_id = 23

    def prompt_ids(self, system: str, user: str) -> list[int]:
        return [1, 2, 3 + len(user)]

    def feedback_ids(self, text: str, ended: bool) -> list[int]:
        return [*([] if ended else [23]), 1, 4 + len(text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


class ThreeTurns:
    """A canvas that finishes in the third turn; the task is the user's text."""

    def __init__(self, task: str) -> None:
        self.task, self.heard = task, []

    def prompt(self) -> tuple[str, str]:
        return "", self.task

    def step(self, text: str) -> SimpleNamespace:
        self.heard.append(text)
        done = len(self.heard) == 3
        return SimpleNamespace(text="x" * (len(text) % 5), ok=True, done=done, stop_reason="finished" if done else None,
                               error="", info={})


def play_and_train(temperature: float, reward: Callable[[Trajectory], float]) -> tuple[Qwen3, list[Trajectory], dict]:
    torch.manual_seed(0)
    model = Qwen3(Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                              num_attention_heads=2, num_key_value_heads=1, head_dim=8))
    with torch.no_grad():
        model.lm_head.weight.mul_(30)                # a policy that prefers some ids
    add_lora(model, rank=2, alpha=4)
    sampler = InProcessSampler(model, end_id=23, temperature=temperature, vocab_limit=24)

    def score(tau: Trajectory) -> None:
        tau.reward = reward(tau)

    jobs = [Job(task="abc"[i % 3], index=i // 3, seed=i) for i in range(12)]
    taus = rollout(jobs, sampler, Letters(), ThreeTurns, score, RolloutConfig(max_new_tokens=6, lockstep=True))
    sampler.close()
    for tau, advantage in zip(taus, group_advantages([t.reward for t in taus], [t.task for t in taus]), strict=True):
        tau.advantage = advantage.item()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    config = UpdateConfig(temperature=temperature, vocab_limit=24, micro_batch_tokens=100)
    return model, taus, update(model, optimizer, taus, config, disable_lora)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_gives_sampled_tokens_the_probability_they_were_drawn_with(temperature: float) -> None:
    model, taus, stats = play_and_train(temperature, lambda tau: float(sum(tau.tokens) % 7))
    assert stats["sampler_gap_max"] < 1e-4
    assert stats["sampler_kl"] < 1e-7  # exp(gap) of one token is rounded to 6e-8
    assert stats["kl_ref"] == 0, "B starts at zero, so the policy is its own reference"
    assert all(len(tau.turns) == 3 and len(set(tau.mask)) == 2 for tau in taus)
    moved = {name: p.abs().sum().item() for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    assert len(moved) == 8
    assert min(moved.values()) > 0, "every B must move in the first step"


def test_a_run_can_be_repeated_bit_for_bit() -> None:
    first, second = (play_and_train(1.0, lambda tau: float(sum(tau.tokens) % 7)) for _ in range(2))
    assert [tau.tokens for tau in first[1]] == [tau.tokens for tau in second[1]]
    assert [tau.sampled_logprobs for tau in first[1]] == [tau.sampled_logprobs for tau in second[1]]
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))
    assert first[2] == second[2]


def test_a_rewarded_token_becomes_likelier() -> None:
    def share_of_low_ids(tau: Trajectory) -> float:
        sampled = [i for i, m in zip(tau.tokens, tau.mask, strict=True) if m]
        return sum(i < 8 for i in sampled) / len(sampled)

    def probability_of_low_ids(model: Qwen3, batch: Batch) -> float:
        with torch.no_grad():
            logits = model(batch.ids)[:, :-1, :24][batch.mask[:, 1:]]
        return logits.softmax(-1)[:, :8].sum(-1).mean().item()

    model, taus, _ = play_and_train(1.0, share_of_low_ids)
    with disable_lora(model):
        before = probability_of_low_ids(model, collate(taus))
    assert probability_of_low_ids(model, collate(taus)) > before + 0.005
