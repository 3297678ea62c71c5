"""The update step against transformers + PEFT: the same weights, trajectories, masks and loss; tokens a second and memory.

    python bench/update.py                                       the tiny preset's shape, five pairs
    python bench/update.py --shape vocabulary --trajectories 3   hidden 512, 8 layers, Qwen3's 151,936 ids; a minute a pair
    python bench/update.py --shape vocabulary                    all 36 trajectories: ten minutes a pair
    python bench/update.py --shape 8b --device cuda --gradient-checkpointing     Qwen3-8B with random weights, bfloat16

Both sides score the reference (LoRA off), score, back-propagate and step AdamW. Theirs is what a trainer built from parts
does: transformers' model with PEFT's LoRA and gradient checkpointing, a trajectory at a time, the logits of all its tokens.
(One at a time is its fastest here: padding costs more than calls.) First the gradients are compared, then pairs are run one
after the other; the ratio is the median over pairs. Peak memory is that of a fresh process that runs one side once.

Prints a row a side and the ratios. `matmul bound` is the time that the matrix products of the
frozen weights alone would take (2 FLOPs a weight and token for each forward pass and for the gradient of the input), at the
speed of a large matrix product measured here. Our side's bound counts what exactness needs; theirs what they compute.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import side_by_side
import torch
from torch import Tensor, nn

from cwrpo import UpdateConfig, collate, cwrpo_loss, update
from lora import add_lora, disable_lora, lora_parameters
from qwen3 import Qwen3, Qwen3Config
from rollout import Trajectory

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# layers, hidden, intermediate, heads, key heads, head size, vocabulary; trajectories, their shortest and longest, LoRA rank
SHAPES = {
    "tiny": ((2, 128, 384, 4, 2, 32, 1024), (54, 250, 1400), 16),
    "vocabulary": ((8, 512, 1536, 8, 4, 64, 151_936), (36, 200, 2000), 16),
    "8b": ((36, 4096, 12288, 32, 8, 128, 151_936), (36, 2000, 8000), 64),
}
LORA = ("lora_A", "lora_B")
POLICY_SHARE, TURNS = 0.08, 8                # of the tokens, in this many turns


def make_trajectories(n: int, shortest: int, longest: int, vocab_size: int) -> list[Trajectory]:
    """Conversations of random ids with lengths evenly spread; groups of advantages that sum to 0."""
    rng, taus = random.Random(0), []
    for i in range(n):
        length = shortest + (longest - shortest) * i // max(n - 1, 1)
        turn = max(1, round(length * POLICY_SHARE / TURNS))
        ends = [length * (k + 2) // (TURNS + 1) for k in range(TURNS)]
        mask = [int(any(end - turn <= t < end for end in ends)) for t in range(length)]
        tau = Trajectory(task=None, index=i, stop_reason="finished", advantage=1.0 if i % 2 else -1.0)
        tau.tokens, tau.mask = [rng.randrange(vocab_size) for _ in range(length)], mask
        tau.sampled_logprobs = [-1.0 * m for m in mask]
        taus.append(tau)
    return taus


def make_model(shape: str, device: str, dtype: torch.dtype) -> Qwen3:
    """Random weights, with LoRA whose B is not zero, so that every gradient is something."""
    (layers, hidden, intermediate, heads, key_heads, head_dim, vocab), _, rank = SHAPES[shape]
    config = Qwen3Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_dim,
                         max_position_embeddings=16384, rope_theta=1e6, tie_word_embeddings=shape != "8b")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen3(config)
    torch.set_default_dtype(default)
    add_lora(model, rank, 2.0 * rank, 0.0, TARGETS)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def make_theirs(ours: Qwen3, rank: int) -> nn.Module:
    """transformers' model and PEFT's adapters with our weights."""
    import peft  # late: the process that measures our memory holds neither
    import transformers

    config = transformers.Qwen3Config(**{**ours.config.to_dict(), "attn_implementation": "sdpa"})
    weight = ours.model.norm.weight
    with torch.device(weight.device):
        base = transformers.Qwen3ForCausalLM(config).to(weight.dtype)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS))
    state = {}
    for name, value in ours.state_dict().items():
        for mine, other in ((".base.weight", ".base_layer.weight"), *((part, f"{part}.default.weight") for part in LORA)):
            name = name.replace(mine, other)
        state[f"base_model.model.{name}"] = value.detach()
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys, report
    assert all("lm_head" in name for name in report.missing_keys), report  # tied
    return model


def their_update(model: nn.Module, optimizer: torch.optim.Optimizer, taus: Sequence[Trajectory], config: UpdateConfig,
                 step: bool) -> None:
    """One step of the same loss; the logits of every token exist, as transformers' forward makes them."""
    def logprobs(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float() / config.temperature
        scores = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return torch.nn.functional.pad(scores, (1, 0))

    optimizer.zero_grad()
    for tau in taus:
        batch = collate([tau], next(model.parameters()).device)
        with torch.no_grad(), model.disable_adapter():
            ref = logprobs(batch.ids)
        new = logprobs(batch.ids)
        loss, _ = cwrpo_loss(new, new, ref, batch.mask, batch.advantages, config.clip_eps, config.kl_coef, len(taus))
        loss.backward()
    if step:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.max_grad_norm)
        optimizer.step()


def make_sides(args: argparse.Namespace, which: Sequence[str]) -> dict[str, Callable[[bool], Any]]:
    """A function a side that takes one update (True), or leaves its gradients where they are (False)."""
    dtype = torch.bfloat16 if args.shape == "8b" else torch.float32
    ours = make_model(args.shape, args.device, dtype)
    _, (_, shortest, longest), rank = SHAPES[args.shape]
    taus = make_trajectories(args.trajectories, shortest, longest, ours.config.vocab_size)
    ours.gradient_checkpointing = args.gradient_checkpointing
    config = UpdateConfig(kl_coef=0.03, micro_batch_tokens=args.micro_batch_tokens, max_grad_norm=1e9)
    sides: dict[str, Any] = {}
    if "theirs" in which:
        theirs = make_theirs(ours, rank)
        theirs.train()
        their_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-6)
        sides["theirs"] = SimpleNamespace(run=lambda step: their_update(theirs, their_optimizer, taus, config, step),
                                          parameters=dict(theirs.named_parameters()))
    if "ours" in which:
        optimizer = torch.optim.AdamW(lora_parameters(ours), lr=1e-6)
        frozen = SimpleNamespace(zero_grad=optimizer.zero_grad, step=lambda: None, param_groups=optimizer.param_groups)
        sides["ours"] = SimpleNamespace(
            run=lambda step: update(ours, optimizer if step else frozen, taus, config, disable_lora),
            parameters=dict(ours.named_parameters()))
    sides["tokens"] = sum(len(tau.tokens) for tau in taus)
    sides["policy_tokens"] = sum(sum(tau.mask) for tau in taus)
    return sides


def gradient_error(sides: dict[str, Any]) -> float:
    """Largest difference of a LoRA gradient between the sides, relative to that gradient's largest entry."""
    for side in ("ours", "theirs"):
        sides[side].run(False)
    worst = 0.0
    for name, weight in sides["ours"].parameters.items():
        if weight.grad is not None:
            name = name.replace("lora_A", "lora_A.default.weight").replace("lora_B", "lora_B.default.weight")
            other = sides["theirs"].parameters[f"base_model.model.{name}"].grad
            worst = max(worst, ((weight.grad - other).abs().max() / other.abs().max()).item())
    return worst


def seconds(run: Callable[[bool], Any], device: str) -> float:
    began = time.perf_counter()
    run(True)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_speed(device: str, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product, the best of five."""
    n = 8192 if device.startswith("cuda") else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda _: a @ b, device) for _ in range(6))
    return 2 * n**3 / best


def matmul_bounds(args: argparse.Namespace, sides: dict[str, Any]) -> dict[str, float]:
    """Seconds that the products with the frozen weights take at full speed; see the module's docstring."""
    (layers, hidden, intermediate, heads, key_heads, head_dim, vocab), _, _ = SHAPES[args.shape]
    attention = hidden * head_dim * (2 * heads + 2 * key_heads)
    body, head = layers * (attention + 3 * hidden * intermediate), hidden * vocab
    tokens, policy = sides["tokens"], sides["policy_tokens"]
    flops = {"ours": 2 * (3 + args.gradient_checkpointing) * body * tokens + 2 * 4 * head * policy,
             "theirs": 2 * 4 * body * tokens + 2 * 3 * head * tokens}
    speed = matmul_speed(args.device, torch.bfloat16 if args.shape == "8b" else torch.float32)
    return {side: count / speed for side, count in flops.items()}


def peak_gib(args: argparse.Namespace, side: str) -> float:
    """Peak memory of a process of its own that takes one update."""
    words = [sys.executable, __file__, "--shape", args.shape, "--device", args.device, "--only", side,
             "--micro-batch-tokens", str(args.micro_batch_tokens), "--trajectories", str(args.trajectories)]
    words += ["--gradient-checkpointing"] * args.gradient_checkpointing
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def run_one_side(args: argparse.Namespace) -> None:
    side = make_sides(args, [args.only])[args.only]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    side.run(True)
    on_gpu = args.device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"before {before:.3f} peak {peak:.3f}")


def main() -> None:
    parser = side_by_side.make_parser(__doc__, "update")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trajectories", type=int, help="evenly spread between the same lengths (default: the shape's number)")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="of our side (default %(default)s)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on our side: less memory, a third more compute")
    parser.add_argument("--no-memory", action="store_true", help="leave out the two processes that measure peak memory")
    parser.add_argument("--only", choices=("ours", "theirs"), help="run one side once and print its peak memory in GiB")
    args = parser.parse_args()
    args.trajectories = args.trajectories or SHAPES[args.shape][1][0]
    if args.only:
        return run_one_side(args)
    memory = {} if args.no_memory else {side: peak_gib(args, side) for side in ("ours", "theirs")}
    sides = make_sides(args, ["ours", "theirs"])
    error, bounds = gradient_error(sides), matmul_bounds(args, sides)
    runs = {side: lambda side=side: seconds(sides[side].run, args.device) for side in ("ours", "theirs")}
    pairs = side_by_side.run_pairs(runs, args.pairs)
    result = {"shape": args.shape, "trajectories": args.trajectories, "tokens": sides["tokens"],
              "policy_tokens": sides["policy_tokens"], "gradient_error": error, "peak_gib": memory, "bound": bounds,
              "memory_ratio": memory["ours"] / memory["theirs"] if memory else None, "pairs": pairs,
              **side_by_side.compare(pairs, "theirs")}
    for side, took in result["seconds"].items():
        print(f"{side:>7}: {took:8.2f} s, {sides['tokens'] / took:8.0f} tokens/s, matmul bound {bounds[side]:.2f} s")
    print(f"gradients differ by {error:.1e} of their largest entry; faster by {side_by_side.told(result)}")
    if memory:
        print(f"peak memory: ours {memory['ours']:.2f} GiB, theirs {memory['theirs']:.2f} GiB: {result['memory_ratio']:.2f}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    side_by_side.write(args.json, result, **versions)


if __name__ == "__main__":
    main()
