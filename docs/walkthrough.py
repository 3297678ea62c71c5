"""Write docs/WALKTHROUGH.md: one trajectory from its question to its gradient, with the real numbers of the tiny policy.

    python docs/walkthrough.py [--model runs/tiny] [--out docs/WALKTHROUGH.md]

Every number is computed twice where that says something: by the code that trains, and by the formula, in a plain loop.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from math import exp
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train
from cwrpo import Batch, UpdateConfig, batch_logprobs, batch_loss, collate, group_advantages, uniform_groups, update
from eval import rollout_config
from lora import disable_lora, lora_layers, lora_parameters
from policy import ChatTokenizer
from qwen3 import Qwen3
from rollout import Job, Trajectory, rollout, turn_seed
from tasks import toy_tasks
from world import World, make_sampler

ENTRY = ("model.layers.1.self_attn.v_proj", 0, 0)    # of a B matrix: the weight whose gradient is shown
STEP = 0.03


def play(args: argparse.Namespace, model: Qwen3, tokenizer: ChatTokenizer) -> tuple[list[Trajectory], UpdateConfig]:
    """Six rollouts of the first toy task on which they differ."""
    world = World(args)
    sampler = make_sampler(args, model, tokenizer)
    try:
        for task in toy_tasks("toy_math", 20, args.seed):
            jobs = [Job(task, i, turn_seed(args.seed, i)) for i in range(args.rollouts_per_task)]
            taus = rollout(jobs, sampler, tokenizer, world.new_canvas, world.score, rollout_config(args, world))
            rewards = [tau.reward for tau in taus]
            if not uniform_groups(rewards, [task.id] * len(taus))[task.id]:
                break
    finally:
        sampler.close()
    for tau, advantage in zip(taus, group_advantages(rewards, [task.id] * len(taus)).tolist(), strict=True):
        tau.advantage = advantage
    return taus, train.update_config(args, tokenizer.vocab_size, 1)


def code(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")


def token_rows(tau: Trajectory, tokenizer: ChatTokenizer, ours: Sequence[float], places: Sequence[int]) -> list[str]:
    rows = ["| position | id | text | mask | log-prob, sampler | log-prob, trainer |", "|---|---|---|---|---|---|"]
    for i in places:
        text = repr(tokenizer.decode([tau.tokens[i]], special=True))[1:-1].replace("|", "\\|").replace("<", "&lt;")
        scores = f"{tau.sampled_logprobs[i]:.4f} | {ours[i]:.4f}" if tau.mask[i] else " | "
        rows.append(f"| {i} | {tau.tokens[i]} | {text} | {tau.mask[i]} | {scores} |")
    return rows


def loss_in_a_loop(taus: Sequence[Trajectory], new: Sequence[Sequence[float]], old: Sequence[Sequence[float]],
                   ref: Sequence[Sequence[float]], config: UpdateConfig) -> float:
    """Eq. 10 with a loop over trajectories and one over tokens."""
    J = 0.0
    for tau, new_i, old_i, ref_i in zip(taus, new, old, ref, strict=True):
        for t, m in enumerate(tau.mask):
            if m:
                r, log_ref = exp(new_i[t] - old_i[t]), ref_i[t] - new_i[t]
                clipped = min(max(r, 1 - config.clip_eps), 1 + config.clip_eps)
                k3 = exp(log_ref) - log_ref - 1
                J += (min(r * tau.advantage, clipped * tau.advantage) - config.kl_coef * k3) / sum(tau.mask) / len(taus)
    return -J


def gradient(model: Qwen3, batch: Batch, config: UpdateConfig) -> tuple[float, float]:
    """Of the loss by ENTRY: by autograd, and by moving the weight by STEP to both sides (in float64, but for the norms)."""
    model = copy.deepcopy(model).double()
    with torch.no_grad(), disable_lora(model):
        old = ref = batch_logprobs(model, batch, config)[0]          # B is 0 before the first step: all three are equal
    weight, row, column = lora_layers(model)[ENTRY[0]].lora_B, *ENTRY[1:]
    batch_loss(model, batch, old, ref, len(batch.ids), config)[0].backward()
    analytic, losses = weight.grad[row, column].item(), []
    for step in (STEP, -STEP):
        with torch.no_grad():
            weight[row, column] = step
            losses.append(batch_loss(model, batch, old, ref, len(batch.ids), config)[0].item())
    return analytic, (losses[0] - losses[1]) / (2 * STEP)


def told(args: argparse.Namespace) -> str:
    model, tokenizer = train.make_model(args)
    taus, config = play(args, model, tokenizer)
    tau = max(taus, key=lambda tau: (tau.reward, -len(tau.tokens)))
    batch = collate(taus)
    with torch.no_grad():
        before = batch_logprobs(model, batch, config)[0].tolist()
    which = taus.index(tau)
    gap = max(abs(a - b) for a, b, m in zip(tau.sampled_logprobs, before[which], tau.mask, strict=False) if m)
    analytic, numeric = gradient(model, batch, config)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=args.lr, weight_decay=args.weight_decay)
    stats = update(model, optimizer, taus, config, disable_lora)
    with torch.no_grad():
        after = batch_logprobs(model, batch, config)[0].tolist()
        moved = batch_loss(model, batch, torch.tensor(before), torch.tensor(before), len(taus), config)[0].item()
    looped = [loss_in_a_loop(taus, new, before, before, config) for new in (before, after)]
    assert abs(looped[0] - stats["loss"]) < 1e-5 > abs(looped[1] - moved), f"{looped} by hand, {stats['loss']}, {moved}"

    start = tau.mask.index(1)
    end = start + tau.turns[0].n_sampled
    lines = [HEAD, "## The question", code(tau.task.problem), f"The answer that is wanted: `{tau.task.answers[0]}`.",
             f"## The prompt\n\n{start} ids, of which the last ones are:",
             "\n".join(token_rows(tau, tokenizer, before[which], range(start - 9, start))),
             "The text from outside (system prompt, question, feedback) is encoded so that none of it can become a frame token.",
             f"## The turns\n\nThe policy samples until `<|im_end|>`; the canvas answers. This episode has {len(tau.turns)} "
             f"turns and ended as `{tau.stop_reason}`."]
    for i, turn in enumerate(tau.turns):
        lines += [f"Turn {i + 1}, the edit:", code(turn.text), "the feedback:", code(turn.feedback or "(none)")]
    lines += ["## Ids, mask, log-probs\n\nThe first turn and the beginning of its feedback. The mask is 1 where the policy "
              "sampled the token, `<|im_end|>` included.",
              "\n".join(token_rows(tau, tokenizer, before[which], range(start, min(end + 6, len(tau.tokens))))),
              f"Of its {len(tau.tokens)} tokens {sum(tau.mask)} were sampled. The trainer scores them in one packed pass, the "
              f"sampler had a cache and a batch of others: they differ by at most {gap:.1e} nats.",
              "## Rewards and advantages\n\nThe same question, six times. `R = -1 + R_div + 1[R_div = 1] R_ans` (Eq. 11-14), "
              "`A = (R - mean) / max(std, 0.01)`.", "\n".join(reward_rows(taus)),
              f"## The loss (Eq. 10)\n\nBefore the step new, old and reference weights are the same (LoRA's B is 0): every ratio "
              f"is 1, every k3 is 0, and the loss is minus the mean advantage, {looped[0]:.6f} in a loop and {stats['loss']:.6f} "
              "from `cwrpo.update`. A loss of 0 says nothing: its gradient does not vanish.",
              f"## The gradient\n\nBy `{ENTRY[0]}.lora_B[{ENTRY[1]}, {ENTRY[2]}]`: {analytic:.4e} by autograd, {numeric:.4e} by "
              f"moving the weight by {STEP} to both sides. The norm over all LoRA weights is {stats['grad_norm']:.4f}"
              + (f", above `--max-grad-norm {config.max_grad_norm}`: it is scaled to that." if
                 stats["grad_norm"] > config.max_grad_norm else "."),
              f"## After one step of AdamW\n\nLearning rate {args.lr}. The log-prob of what was sampled moves with the sign of "
              "the advantage:", "\n".join(moved_rows(taus, before, after)),
              f"On these tokens the loss is now {looped[1]:.6f} in a loop, {moved:.6f} from `cwrpo.cwrpo_loss`: it fell, ratios "
              "are no longer 1, and k3 pulls back to the reference."]
    return "\n\n".join(lines) + "\n"


HEAD = """# One trajectory, from the question to the gradient

Written by `python docs/walkthrough.py`: the first step of a fresh run of the tiny policy. The executor is a simulation. Last
digits depend on PyTorch and the number of threads."""


def reward_rows(taus: Sequence[Trajectory]) -> list[str]:
    rows = ["| rollout | workflow | turns | checker | format | operators | structure | R_div | R_ans | R | A |",
            "|" + "---|" * 11]
    for tau in taus:
        p = tau.parts
        graph = tau.canvas.graph.to_text() or "(empty)"
        rows.append(f"| {tau.index} | `{graph}` | {len(tau.turns)} | {p.checker:.1f} | {p.format:.1f} | {p.operators:.1f} "
                    f"| {p.structure:.1f} | {p.diversity:.1f} | {tau.grade.score:.1f} | {tau.reward:.2f} "
                    f"| {tau.advantage:+.3f} |")
    return rows


def moved_rows(taus: Sequence[Trajectory], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> list[str]:
    rows = ["| rollout | A | sampled tokens | mean log-prob before | after | change |", "|---|---|---|---|---|---|"]
    for tau, old, new in zip(taus, before, after, strict=True):
        n = sum(tau.mask)
        rows.append(f"| {tau.index} | {tau.advantage:+.3f} | {n} | {sum(old) / n:.4f} | {sum(new) / n:.4f} "
                    f"| {(sum(new) - sum(old)) / n:+.4f} |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a policy directory (default: the tiny one, made if there is none)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "WALKTHROUGH.md", help="(default %(default)s)")
    args = parser.parse_args(arguments)
    args.out.write_text(told(train.parse_args(["--model", args.model])), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
