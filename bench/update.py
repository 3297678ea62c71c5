"""The update step against transformers + PEFT, and TRL: the same weights, trajectories, masks and loss; speed and memory.

    python bench/update.py                                       the tiny preset's shape, five pairs
    python bench/update.py --shape vocabulary --trajectories 3   hidden 512, 8 layers, Qwen3's 151,936 ids; a minute a side
    python bench/update.py --shape vocabulary                    all 36 trajectories: ten minutes a side
    python bench/update.py --shape 8b --device cuda --gradient-checkpointing     Qwen3-8B with random weights, bfloat16

All sides score the reference (LoRA off), score, back-propagate and step AdamW. `theirs` is what a trainer built from parts
does: transformers' model with PEFT's LoRA and gradient checkpointing, a trajectory at a time, the logits of all its tokens.
(One at a time is its fastest here: padding costs more than calls.) `trl`, where it is installed (pip install trl==1.16.0), is
that model in the hands of GRPOTrainer: its own scores, whose logits it never holds at once, and its own loss, set to be ours.
First the gradients are compared, then the sides are run one after the other, pair by pair; a ratio is the median over pairs.
Peak memory is that of a fresh process that runs one side once.

Prints a row a side and the ratios. `matmul bound`, of ours and theirs, is the time that the matrix products of the
frozen weights alone would take (2 FLOPs a weight and token for each forward pass and for the gradient of the input), at the
speed of a large matrix product measured here. Our side's bound counts what exactness needs; theirs what they compute.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import side_by_side
import torch
from torch import Tensor, nn

from cwrpo import UpdateConfig, collate, cwrpo_loss, update
from lora import add_lora, disable_lora, lora_layers, lora_parameters
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
# TRL can stand there for test_trl.py without the packages that its trainer needs
OTHERS = ("theirs", "trl") if all(map(importlib.util.find_spec, ("trl", "datasets"))) else ("theirs",)


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


def their_base(ours: Qwen3) -> tuple[nn.Module, Any]:
    """transformers' model of our shape, and PEFT's settings of our LoRA."""
    import peft  # late: the process that measures our memory holds neither
    import transformers

    config = transformers.Qwen3Config(**{**ours.config.to_dict(), "attn_implementation": "sdpa"})
    weight = ours.model.norm.weight
    with torch.device(weight.device):
        base = transformers.Qwen3ForCausalLM(config).to(weight.dtype)
    rank = next(iter(lora_layers(ours).values())).rank
    return base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS)


def take_weights(model: nn.Module, ours: Qwen3) -> None:
    """Give PEFT's model our frozen weights themselves, for three models of 8B fill a card, and copies of LoRA's."""
    state = {}
    for name, value in ours.state_dict().items():
        for mine, other in ((".base.weight", ".base_layer.weight"), *((part, f"{part}.default.weight") for part in LORA)):
            name = name.replace(mine, other)
        state[f"base_model.model.{name}"] = value.detach().clone() if "lora" in name else value.detach()
    report = model.load_state_dict(state, strict=False, assign=True)
    model.get_base_model().tie_weights()
    assert not report.unexpected_keys, report
    assert all("lm_head" in name for name in report.missing_keys), report  # tied


def make_theirs(ours: Qwen3) -> nn.Module:
    """transformers' model and PEFT's adapters with our weights."""
    import peft

    base, lora = their_base(ours)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(base, lora)
    take_weights(model, ours)
    return model.train()


def make_trl(ours: Qwen3, n: int, config: UpdateConfig) -> Any:
    """GRPOTrainer with our weights, which divides its loss by n trajectories; it is never asked to sample."""
    import datasets
    import tokenizers
    import transformers
    import trl

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    base, lora = their_base(ours)
    on_cpu = base.device.type == "cpu"
    with tempfile.TemporaryDirectory() as place:  # it makes its output's directory at once
        settings = trl.GRPOConfig(output_dir=place, report_to=[], use_cpu=on_cpu, bf16=not on_cpu, loss_type="grpo",
                                  beta=config.kl_coef, temperature=config.temperature, per_device_train_batch_size=2,
                                  num_generations=2, use_bias_correction_kl=False)  # k3 as it is, not times the ratio
        trainer = trl.GRPOTrainer(base, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=settings,
                                  train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 2), peft_config=lora,
                                  processing_class=transformers.PreTrainedTokenizerFast(
                                      tokenizer_object=words, pad_token="a", eos_token="a"))
    take_weights(trainer.model, ours)
    trainer.model.train()
    if settings.gradient_checkpointing:  # what train() would do first
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = n
    return trainer


def trl_update(trainer: Any, optimizer: torch.optim.Optimizer, taus: Sequence[Trajectory], config: UpdateConfig,
               step: bool) -> None:
    """One step of GRPOTrainer's scores and loss, a trajectory at a time; the feedback inside is its `tool_mask`."""
    model, device = trainer.model, next(trainer.model.parameters()).device
    optimizer.zero_grad()
    for tau in taus:
        ids, mask = (torch.tensor([values], device=device) for values in (tau.tokens, tau.mask))
        prompt, everything = tau.mask.index(1), torch.ones_like(ids)
        with torch.no_grad(), model.disable_adapter():
            ref, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, everything, ids.size(1) - prompt)
        trainer._compute_loss(model, {
            "prompt_ids": ids[:, :prompt], "prompt_mask": everything[:, :prompt], "completion_ids": ids[:, prompt:],
            "completion_mask": everything[:, prompt:], "tool_mask": mask[:, prompt:], "ref_per_token_logps": ref,
            "advantages": torch.tensor([tau.advantage], device=device)}).backward()
    finish_update(model, optimizer, config, step)


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
    finish_update(model, optimizer, config, step)


def finish_update(model: nn.Module, optimizer: torch.optim.Optimizer, config: UpdateConfig, step: bool) -> None:
    if step:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.max_grad_norm)
        optimizer.step()


def make_sides(args: argparse.Namespace, which: Sequence[str]) -> dict[str, Callable[[bool], Any]]:
    """A function a side that takes one update (True), or leaves its gradients where they are (False)."""
    dtype = torch.bfloat16 if args.shape == "8b" else torch.float32
    ours = make_model(args.shape, args.device, dtype)
    _, (_, shortest, longest), _ = SHAPES[args.shape]
    taus = make_trajectories(args.trajectories, shortest, longest, ours.config.vocab_size)
    ours.gradient_checkpointing = args.gradient_checkpointing
    config = UpdateConfig(kl_coef=0.03, micro_batch_tokens=args.micro_batch_tokens, max_grad_norm=1e9)
    sides: dict[str, Any] = {}

    def add(name: str, what: Any, model: nn.Module, their: Callable[..., None]) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        sides[name] = SimpleNamespace(run=lambda step: their(what, optimizer, taus, config, step),
                                      parameters=dict(model.named_parameters()))

    if "theirs" in which:
        theirs = make_theirs(ours)
        add("theirs", theirs, theirs, their_update)
    if "trl" in which:
        trainer = make_trl(ours, len(taus), config)
        add("trl", trainer, trainer.model, trl_update)
    if "ours" in which:
        optimizer = torch.optim.AdamW(lora_parameters(ours), lr=1e-6)
        frozen = SimpleNamespace(zero_grad=optimizer.zero_grad, step=lambda: None, param_groups=optimizer.param_groups)
        sides["ours"] = SimpleNamespace(
            run=lambda step: update(ours, optimizer if step else frozen, taus, config, disable_lora),
            parameters=dict(ours.named_parameters()))
    sides["tokens"] = sum(len(tau.tokens) for tau in taus)
    sides["policy_tokens"] = sum(sum(tau.mask) for tau in taus)
    return sides


def gradient_error(sides: dict[str, Any], other: str) -> float:
    """Largest difference of a LoRA gradient between ours and another side, relative to that gradient's largest entry."""
    for side in ("ours", other):
        sides[side].run(False)
    worst = 0.0
    for name, weight in sides["ours"].parameters.items():
        if weight.grad is not None:
            name = name.replace("lora_A", "lora_A.default.weight").replace("lora_B", "lora_B.default.weight")
            theirs = sides[other].parameters[f"base_model.model.{name}"].grad
            worst = max(worst, ((weight.grad - theirs).abs().max() / theirs.abs().max()).item())
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
    parser.add_argument("--only", choices=("ours", *OTHERS), help="run one side once and print its peak memory in GiB")
    args = parser.parse_args()
    args.trajectories = args.trajectories or SHAPES[args.shape][1][0]
    if args.only:
        return run_one_side(args)
    names = ("ours", *OTHERS)
    memory = {} if args.no_memory else {side: peak_gib(args, side) for side in names}
    sides = make_sides(args, names)
    bounds = matmul_bounds(args, sides)
    errors = {other: gradient_error(sides, other) for other in OTHERS}
    runs = {side: lambda side=side: seconds(sides[side].run, args.device) for side in names}
    pairs = side_by_side.run_pairs(runs, args.pairs)
    against = {other: side_by_side.compare(pairs, other) for other in OTHERS}
    result = {"shape": args.shape, "trajectories": args.trajectories, "tokens": sides["tokens"],
              "policy_tokens": sides["policy_tokens"], "gradient_error": errors, "peak_gib": memory, "bound": bounds,
              "pairs": pairs, "against": against, **against["theirs"]}
    for side in names:
        took = median(pair[side] for pair in pairs)
        print(f"{side:>7}: {took:8.2f} s, {sides['tokens'] / took:8.0f} tokens/s"
              + (f", matmul bound {bounds[side]:.2f} s" if side in bounds else "")
              + (f", peak memory {memory[side]:.2f} GiB" if memory else ""))
    for other in OTHERS:
        print(f"{other:>7}: gradients differ by {errors[other]:.1e} of their largest entry; ours is faster by "
              + side_by_side.told(against[other])
              + (f" and needs {memory['ours'] / memory[other]:.2f} of the memory" if memory else ""))
    packages = ("torch", "transformers", "peft", *(name for name in OTHERS if name == "trl"))
    side_by_side.write(args.json, result, **{name: importlib.metadata.version(name) for name in packages})


if __name__ == "__main__":
    main()
