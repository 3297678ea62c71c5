"""CWRPO, Canvas Workflow Relative Policy Optimization (FlowSteer, arXiv 2602.01664), in the order a step uses it:

    group_advantages   A_i = (R_i - mean of its group) / max(std of its group, floor)
    token_logprobs     log-probability of every trained token under the trainer's weights
    cwrpo_loss         Eq. 10: clipped surrogate minus beta * k3, over the tokens that the policy sampled
    update             micro-batches, backward, clip, and one optimiser step per epoch

Three decisions:
* The loss is divided by a denominator of the whole step, which is handed in. Losses of micro-batches are summed, and so
  are the gradients of ranks, so that no way to split a batch changes the gradient. (A mean of means is not the mean.)
* Logits exist only for trained tokens and only a chunk at a time, in backward too: (B, T, 151936) floats is the memory.
* What must not count is filled with zeros (masked_fill), not multiplied by zero: a feedback token has a gradient of
  exactly 0, and a nan there stays there.

Trajectories come from rollout.py; the model is any module with `hidden` and `head`, such as qwen3.py's.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ranks import of_all_ranks, sum_gradients
from rollout import Trajectory

# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def uniform_groups(rewards: Sequence[float] | Tensor, groups: Sequence[Hashable]) -> dict[Hashable, bool]:
    """Map each group to whether all its rewards are equal (one reward is): then it has nothing to teach.

    The share of uniform groups, the first number to read when the loss is 0, is the mean of the values.
    """
    seen: dict[Hashable, set[float]] = {}
    for reward, group in zip(torch.as_tensor(rewards, dtype=torch.float64).tolist(), groups, strict=True):
        seen.setdefault(group, set()).add(reward)
    return {group: len(values) == 1 for group, values in seen.items()}


def group_advantages(rewards: Sequence[float] | Tensor, groups: Sequence[Hashable], std_floor: float = 0.01) -> Tensor:
    """Return A_i = (R_i - mean_group) / max(std_group, std_floor), (N,); the std is the population's.

    groups: one key per reward, the task's source (CWRPO) or the task (GRPO). A uniform group gets exactly 0.

    >>> group_advantages([1.0, 0.0, 0.1, 0.1, 0.1], ["a", "a", "b", "b", "b"]).tolist()
    [1.0, -1.0, 0.0, 0.0, 0.0]
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)                          # (N,)
    assert rewards.isfinite().all(), f"a reward is not finite: {rewards.tolist()}"
    advantages = torch.zeros_like(rewards)
    for group, uniform in uniform_groups(rewards, groups).items():
        if uniform:                                  # told by equality: the float mean of 0.1, 0.1, 0.1 is not 0.1
            continue
        member = torch.tensor([other == group for other in groups])
        centred = rewards[member] - rewards[member].mean()
        advantages[member] = centred / max(centred.square().mean().sqrt().item(), std_floor)
    return advantages.float()


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities and the loss


class Score(torch.autograd.Function):
    """(log-probability of the target, entropy), (m,) each, of softmax(logits / temperature), logits (m, V), targets (m,).

    By hand for memory: of all that autograd would keep, one (m, V) tensor is enough, and one more is what backward makes.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logprobs = (logits if temperature == 1 else logits.to(dtype) / temperature).log_softmax(-1, dtype=dtype)
        entropy = -logprobs.exp().mul_(logprobs).sum(-1)
        ctx.save_for_backward(logprobs, targets[:, None], entropy[:, None])
        ctx.set_materialize_grads(False)             # mostly nothing asks for the entropy's gradient
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprob: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor, None, None]:
        """d logprob / d logit_j = [j is the target] - p_j;  d entropy / d logit_j = -p_j (logprob_j + entropy)."""
        logprobs, targets, entropy = ctx.saved_tensors
        of_logprob = torch.zeros_like(entropy) if of_logprob is None else of_logprob[:, None]
        wanted = of_logprob if of_entropy is None else of_logprob + of_entropy[:, None] * (logprobs + entropy)
        grad = logprobs.exp().mul_(-wanted).scatter_add_(-1, targets, of_logprob)
        return (grad if ctx.temperature == 1 else grad.div_(ctx.temperature)).to(ctx.dtype), None, None


def token_logprobs(model: nn.Module, ids: Tensor, mask: Tensor, temperature: float = 1.0,
                   vocab_limit: int | None = None, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy, (B, T) each, of the distribution that every masked token was drawn from.

    Entry t scores ids[:, t]. The state that predicts it sits at t - 1: the shift by one lives here and nowhere else.
    Zero where mask is 0. Rows are padded on the right, which a causal model does not see.

    temperature, vocab_limit: as in sampling; ids from vocab_limit on are padding of the model's vocabulary.
    chunk: tokens that pass through the head at a time; backward computes their logits again, chunk by chunk.
    """
    assert temperature > 0, f"temperature {temperature}: greedy decoding has no log-probabilities to train"
    mask = mask.bool()
    assert not mask[:, 0].any(), "nothing stands before position 0 that could predict it"
    targets = ids[mask]                                                              # (M,), M masked tokens
    assert vocab_limit is None or (targets < vocab_limit).all(), f"a trained id is not below vocab_limit {vocab_limit}"
    states = model.hidden(ids, wanted=mask.roll(-1, 1))                              # (M, D); nothing wraps, see above

    def score_chunk(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return Score.apply(model.head(states)[:, :vocab_limit], targets, temperature)

    scores = []
    for start in range(0, max(len(targets), 1), chunk):      # once even if nothing is masked: backward needs a graph
        part = states[start:start + chunk], targets[start:start + chunk]
        # not reentrant: that kind gives no gradient at all when its inputs need none (only the head is trained)
        grad = torch.is_grad_enabled()
        scores.append(checkpoint(score_chunk, *part, use_reentrant=False) if grad else score_chunk(*part))
    logprobs, entropy = (torch.cat(column) for column in zip(*scores, strict=True))  # (M,)
    zeros = logprobs.new_zeros(ids.shape)                                            # (B, T)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


def cwrpo_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, advantages: Tensor,
               clip_eps: float, kl_coef: float, denominator: float, *, loss_norm: str = "trajectory",
               clip_eps_high: float | None = None, entropy: Tensor | None = None, entropy_coef: float = 0.0,
               sampled_logprobs: Tensor | None = None, sampled_mask: Tensor | None = None,
               tis_cap: float | None = None) -> tuple[Tensor, dict[str, float]]:
    """Return (-J, stats) of a micro-batch (Eq. 10). Arguments are (B, T), advantages (B,).

        J = 1/N sum_i 1/|tau_i| sum_t mask_it [ min(r A_i, clip(r, 1 - clip_eps, 1 + clip_eps) A_i) - kl_coef k3 ]
        r = exp(logprobs - old)          k3 = exp(ref - logprobs) - (ref - logprobs) - 1

    denominator, of the whole step, by loss_norm: its number of trajectories N ("trajectory"), its number of masked
        tokens ("token"), or any constant ("constant"). Only "trajectory" divides by |tau_i|, the row's masked tokens.
    clip_eps_high: another bound for the upper side. entropy_coef: adds entropy_coef * entropy inside the bracket.
    tis_cap: multiplies the surrogate by min(exp(old - sampled), tis_cap), the truncated trainer/sampler weight.
    sampled_mask: where sampled_logprobs mean something, if not everywhere in mask.
    stats: sums over tokens, which add_stats accumulates and mean_stats turns into what is logged.
    """
    assert loss_norm in ("trajectory", "token", "constant"), loss_norm
    assert denominator > 0, f"denominator {denominator}"
    assert ref_logprobs is not None or kl_coef == 0, f"kl_coef {kl_coef} needs ref_logprobs"
    assert entropy is not None or entropy_coef == 0, f"entropy_coef {entropy_coef} needs entropy"
    assert sampled_logprobs is not None or tis_cap is None, f"tis_cap {tis_cap} needs sampled_logprobs"
    mask, old_logprobs = mask.bool(), old_logprobs.detach()

    def masked(x: Tensor) -> Tensor:
        return x.masked_fill(~mask, 0.0)

    A = advantages.to(logprobs)[:, None]                                             # (B, 1)
    low, high = 1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    logratio = masked(logprobs - old_logprobs)                                       # (B, T)
    ratio = logratio.exp()
    bracket = torch.minimum(ratio * A, ratio.clamp(low, high) * A)
    clipped = (A > 0) & (ratio > high) | (A < 0) & (ratio < low)                     # the gradient is cut off here
    stats = {"tokens": mask.sum(), "clipfrac": masked(clipped).sum(), "ratio_max": masked(ratio).max(),
             "approx_kl": (ratio - 1 - logratio).sum()}
    if sampled_logprobs is not None:
        sampled = mask if sampled_mask is None else mask & sampled_mask.bool()
        assert sampled_logprobs[sampled].isfinite().all(), "a sampled token has no sampled log-probability"
        gap = (old_logprobs - sampled_logprobs).masked_fill(~sampled, 0.0)           # log(trainer / sampler)
        stats |= {"sampler_tokens": sampled.sum(), "sampler_gap": gap.abs().sum(), "sampler_gap_max": gap.abs().max(),
                  "sampler_kl": (gap.exp() - 1 - gap).sum()}                         # k3 of KL(sampler, trainer)
        if tis_cap is not None:
            bracket = bracket * gap.exp().clamp(max=tis_cap)
    if ref_logprobs is not None:
        to_ref = masked(ref_logprobs.detach() - logprobs)
        k3 = to_ref.exp() - to_ref - 1
        stats["kl_ref"] = k3.sum()
        if kl_coef:                                  # at 0 nothing of it may reach the gradient: 0 * inf is nan
            bracket = bracket - kl_coef * k3
    if entropy is not None:
        stats["entropy"] = masked(entropy).sum()
        if entropy_coef:
            bracket = bracket + entropy_coef * entropy
    if loss_norm == "trajectory":
        bracket = bracket / mask.sum(1, keepdim=True).clamp(min=1)                   # without any token: 0, not 0/0
    return -masked(bracket).sum() / denominator, {name: value.item() for name, value in stats.items()}


def add_stats(totals: dict[str, float], stats: dict[str, float]) -> None:
    """Add the stats of another micro-batch, in place: sums add up, `*_max` are maxima."""
    for name, value in stats.items():
        totals[name] = max(totals.get(name, value), value) if name.endswith("_max") else totals.get(name, 0.0) + value


def mean_stats(totals: dict[str, float]) -> dict[str, float]:
    """Return means per trained token (sampler_*: per sampled token), and the maxima as they are."""
    means = {}
    for name, value in totals.items():
        if name.endswith("_max"):
            means[name] = value
        elif not name.endswith("tokens"):
            means[name] = value / max(totals["sampler_tokens" if name.startswith("sampler_") else "tokens"], 1)
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """Trajectories as tensors, padded on the right with 0 (any id would do: the mask goes by position)."""

    ids: Tensor                                      # (B, T) int64
    mask: Tensor                                     # (B, T) bool, the tokens to train
    sampled_mask: Tensor                             # (B, T) bool, the tokens that the policy sampled: the same, mostly
    sampled_logprobs: Tensor                         # (B, T)
    advantages: Tensor                               # (B,)


def micro_batches(trajectories: Sequence[Trajectory], max_tokens: int) -> list[list[Trajectory]]:
    """Split into lists of at most max_tokens tokens, padding included; a longer trajectory gets a list of its own.

    Longest first: neighbours have similar lengths, and whatever does not fit into memory fails at once. No trajectory is
    padded by more than a third of its length: padding costs as much as tokens do, and another forward pass costs little.
    """
    batches: list[list[Trajectory]] = []
    for tau in sorted(trajectories, key=lambda tau: len(tau.tokens), reverse=True):
        width = len(batches[-1][0].tokens) if batches else 0
        if batches and (len(batches[-1]) + 1) * width <= max_tokens and 4 * len(tau.tokens) >= 3 * width:
            batches[-1].append(tau)
        else:
            batches.append([tau])
    n = sum(map(len, batches))
    assert n == len(trajectories), f"{len(trajectories)} trajectories went in, {n} came out"
    return batches


def collate(trajectories: Sequence[Trajectory], device: torch.device | str = "cpu", no_mask: bool = False) -> Batch:
    """Turn trajectories, at least one, into a Batch. no_mask (an ablation) trains feedback too: all but the prompt."""
    T = max(1, *(len(tau.tokens) for tau in trajectories))

    def pad(rows: list[list], dtype: torch.dtype) -> Tensor:
        return torch.tensor([row + [0] * (T - len(row)) for row in rows], dtype=dtype, device=device)

    masks = [tau.mask for tau in trajectories]
    prompts = [[*mask, 1].index(1) for mask in masks]        # tokens before the first sampled one
    trained = [[0] * n + [1] * (len(mask) - n) for n, mask in zip(prompts, masks, strict=True)] if no_mask else masks
    return Batch(pad([tau.tokens for tau in trajectories], torch.int64), pad(trained, torch.bool),
                 pad(masks, torch.bool), pad([tau.sampled_logprobs for tau in trajectories], torch.float32),
                 torch.tensor([tau.advantage for tau in trajectories], dtype=torch.float32, device=device))


# ---------------------------------------------------------------------------------------------------------------------
# The update


@dataclass(frozen=True)
class UpdateConfig:
    clip_eps: float = 0.2
    clip_eps_high: float | None = None               # None: clip_eps
    kl_coef: float = 0.005                           # 0: no reference pass
    entropy_coef: float = 0.0
    loss_norm: str = "trajectory"                    # | "token" | "constant", which needs loss_constant
    loss_constant: float | None = None
    tis_cap: float | None = None                     # None: no importance correction of the sampler
    no_mask: bool = False                            # ablation: train on feedback tokens too
    temperature: float = 1.0                         # of sampling
    vocab_limit: int | None = None                   # of sampling
    epochs: int = 1                                  # optimiser steps per batch
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 16384                  # tokens of one forward pass, padding included
    chunk: int = 64                                  # tokens whose logits exist at the same time: 39 MB of Qwen3's


def update(model: nn.Module, optimizer: torch.optim.Optimizer, trajectories: Sequence[Trajectory], config: UpdateConfig,
           disable_lora: Callable[[nn.Module], AbstractContextManager]) -> dict[str, float]:
    """Take config.epochs optimiser steps on the trajectories (of this rank); return what to log.

    Trains the parameters that require a gradient; the reference is the same model inside disable_lora(model). Leaves
    the model in eval mode. Several epochs log their mean. Raises ValueError when there is no token to train, and
    FloatingPointError, with no step taken, when the loss or the gradient is not finite.
    """
    for tau in trajectories:
        assert not tau.dropped, f"a dropped trajectory ({tau.dropped}) is not for training"
        assert tau.advantage is not None, f"rollout {tau.index} of {tau.task} has no advantage"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = [collate(taus, parameters[0].device, config.no_mask)
               for taus in micro_batches(trajectories, config.micro_batch_tokens)]
    # All ranks take equally many passes, some of them over nothing: a sharded layer is put together by all at once.
    spare = max(of_all_ranks(len(batches))) - len(batches)
    batches += [collate([Trajectory(None, 0, advantage=0.0)], parameters[0].device)] * spare
    n_trajectories = sum(of_all_ranks(len(trajectories)))
    n_tokens = sum(of_all_ranks(sum(int(batch.mask.sum()) for batch in batches)))
    denominator = {"trajectory": n_trajectories, "token": n_tokens, "constant": config.loss_constant}[config.loss_norm]
    if not n_tokens or not denominator:
        raise ValueError(f"nothing to train on: {n_trajectories} trajectories, {n_tokens} tokens, {denominator=}")

    model.eval()                                     # what the policy is compared with is computed without dropout
    with torch.no_grad():
        with disable_lora(model):
            refs = [batch_logprobs(model, batch, config)[0] if config.kl_coef else None for batch in batches]
        # With one step per batch nothing moves between old and new: see batch_loss.
        olds = [batch_logprobs(model, batch, config)[0] if config.epochs > 1 else None for batch in batches]

    totals, losses, grad_norms = {}, [], []
    model.train()
    for _ in range(config.epochs):
        optimizer.zero_grad()
        loss = 0.0
        for batch, old, ref in zip(batches, olds, refs, strict=True):
            part, stats = batch_loss(model, batch, old, ref, denominator, config)
            part.backward()
            loss += part.item()
            add_stats(totals, stats)
        sum_gradients(parameters)
        loss = sum(of_all_ranks(loss))
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()        # the norm before clipping
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"loss {loss}, grad_norm {grad_norm}: not finite, no step was taken; look at "
                                     "ratio_max and kl_ref of the steps before, and lower the learning rate")
        losses.append(loss)
        grad_norms.append(grad_norm)
        optimizer.step()
    model.eval()

    summed: dict[str, float] = {}
    for of_rank in of_all_ranks(totals):
        add_stats(summed, of_rank)
    return {"loss": fmean(losses), "grad_norm": fmean(grad_norms), "lr": optimizer.param_groups[0]["lr"],
            "trajectories": n_trajectories, "tokens": n_tokens, **mean_stats(summed)}


def batch_logprobs(model: nn.Module, batch: Batch, config: UpdateConfig) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy of the batch, (B, T) each, as it was sampled."""
    return token_logprobs(model, batch.ids, batch.mask, config.temperature, config.vocab_limit, config.chunk)


def batch_loss(model: nn.Module, batch: Batch, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
               denominator: float, config: UpdateConfig) -> tuple[Tensor, dict[str, float]]:
    """Return loss and stats of a micro-batch. old_logprobs None: the weights have not moved since they were sampled.

    Then old is logprobs itself, detached: the ratio is 1 and its gradient that of logprobs, exactly what a second
    forward pass would give, without the pass (and with dropout better: both sides see the same units dropped).
    """
    logprobs, entropy = batch_logprobs(model, batch, config)
    return cwrpo_loss(logprobs, logprobs if old_logprobs is None else old_logprobs, ref_logprobs, batch.mask,
                      batch.advantages, config.clip_eps, config.kl_coef, denominator, loss_norm=config.loss_norm,
                      clip_eps_high=config.clip_eps_high, entropy=entropy, entropy_coef=config.entropy_coef,
                      sampled_logprobs=batch.sampled_logprobs, sampled_mask=batch.sampled_mask, tis_cap=config.tis_cap)
