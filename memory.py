"""What fits on a card: the memory of training and sampling by model size and context, and one card for both in turns.

    python memory.py                                   the table of docs/SCALE.md, in GB
    python memory.py --model /models/Qwen3-8B --context 16384 --lora-rank 64

`budget` follows what autograd keeps, tensor by tensor; tests/test_memory.py counts the tensors of small models and finds the
same. It knows no fragmentation and no CUDA context: leave a tenth and 1 GB. For the server, weights and KV cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from qwen3 import Qwen3Config
from vllm_server import Server, ServerError

# layers, hidden, intermediate, heads, key heads; head_dim 128 and 151,936 ids everywhere; the head is tied up to 4B
SIZES = {"0.6B": (28, 1024, 3072, 16, 8), "1.7B": (28, 2048, 6144, 16, 8), "4B": (36, 2560, 9728, 32, 8),
         "8B": (36, 4096, 12288, 32, 8), "14B": (40, 5120, 17408, 40, 8), "32B": (64, 5120, 25600, 64, 8)}
ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def published(size: str) -> Qwen3Config:
    layers, hidden, intermediate, heads, key_heads = SIZES[size]
    tied = size in ("0.6B", "1.7B", "4B")
    return Qwen3Config(151_936, hidden, intermediate, layers, heads, key_heads, 128, tie_word_embeddings=tied)


def linear_shapes(config: Qwen3Config) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear layers of one layer."""
    D, M, Q, K = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim,
                  config.num_key_value_heads * config.head_dim)
    return {"q_proj": (D, Q), "k_proj": (D, K), "v_proj": (D, K), "o_proj": (Q, D), "gate_proj": (D, M), "up_proj": (D, M),
            "down_proj": (M, D)}


def layer_activations(config: Qwen3Config, width: int, rank: int, targets: Sequence[str]) -> int:
    """Bytes a token that autograd keeps of one layer; width: bytes of a number of the base's dtype."""
    D, M, Q, K = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim,
                  config.num_key_value_heads * config.head_dim)
    norms = 4 * (2 * D + Q + K) + 4 * (2 + config.num_attention_heads + config.num_key_value_heads)    # float32, and 1/rms
    attention = 4 * Q * width + 4 * config.num_attention_heads       # q; k and v for every query head; the result; sum of exp
    mlp = 3 * M * width                                              # gate, silu(gate), up
    # LoRA reads float32. A narrower base's input is copied for each layer that reads it; else what q, k, v read is one tensor,
    # and so is what gate and up read; o reads the result of the attention, which is counted above.
    shapes, names = linear_shapes(config), set(targets)
    inputs = [shapes[name][0] for name in targets]
    if width == 4:
        inputs = [D] * bool(names & {"q_proj", "k_proj", "v_proj"}) + [D] * bool(names & {"gate_proj", "up_proj"})
        inputs += [M] * ("down_proj" in names)
    return norms + attention + mlp + 4 * sum(inputs) + 4 * rank * len(targets)


def budget(config: Qwen3Config, context: int, rank: int = 64, targets: Sequence[str] = ALL_TARGETS, width: int = 2,
           conversations: int = 36, chunk: int = 64) -> dict[str, int]:
    """Return the parts in bytes: of a trainer whose micro-batch is one conversation of `context` tokens, and of a server.

    width: bytes of a number of the base (2: bfloat16). chunk: tokens whose logits exist at once (cwrpo.UpdateConfig).
    conversations: how many the server's KV cache has room for. `activations` recomputes each layer in backward
    (--gradient-checkpointing): all layers' inputs and one layer's inside; `activations_kept` does not.
    """
    shapes, layers, D, V = linear_shapes(config), config.num_hidden_layers, config.hidden_size, config.vocab_size
    layer = sum(i * o for i, o in shapes.values()) + 2 * D + 2 * config.head_dim
    weights = width * (layers * layer + D + V * D * (1 if config.tie_word_embeddings else 2))
    lora = 4 * layers * rank * sum(sum(shapes[name]) for name in targets)
    inside = context * layer_activations(config, width, rank, targets)
    return {"weights": weights, "lora": lora, "gradients": lora, "optimizer": 2 * lora,
            "activations": context * layers * D * width + inside, "activations_kept": layers * inside,
            "logits": chunk * V * (width + 2 * 4),               # and in float32: scaled, log-probs; or these and their gradient
            "kv_cache": 2 * width * layers * config.num_key_value_heads * config.head_dim * context * conversations}


TRAINER = ("weights", "lora", "gradients", "optimizer", "activations", "logits")


def row(name: str, config: Qwen3Config, context: int, **more: int) -> list[str]:
    parts = budget(config, context, **more)
    trainer = sum(parts[part] for part in TRAINER)
    kept = trainer - parts["activations"] + parts["activations_kept"]
    resting = sum(parts[part] for part in TRAINER[:4] if part != "gradients")        # beside the server while it is awake
    server = parts["weights"] + parts["lora"] + parts["kv_cache"]
    values = (parts["weights"], parts["lora"] * 4, parts["activations"], parts["logits"], trainer, kept, parts["kv_cache"],
              server, max(trainer, resting + server))
    return [name, f"{context:,}", *(f"{value / 1e9:.1f}" for value in values)]


HEAD = ["model", "context", "weights", "LoRA, gradients, AdamW", "activations", "logits", "trainer",
        "trainer, nothing recomputed", "KV cache", "server", "--colocate"]


@contextmanager
def server_asleep(server: Server) -> Iterator[None]:
    """Have the card to ourselves inside the block: vLLM's sleep mode, level 1 (weights to the CPU's memory, no KV cache)."""
    try:
        server.call("/sleep?level=1", {})
    except ServerError as error:
        if error.status in (404, 405, 500):
            raise ServerError(f"the policy server cannot sleep ({error}); start it with --enable-sleep-mode and the environment "
                              "variable VLLM_SERVER_DEV_MODE=1, or train without --colocate", again=False) from error
        raise
    try:
        yield
    finally:
        wake(server)


def wake(server: Server) -> None:
    """Give the card back, and wake the server if it sleeps, as a killed run may have left it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if server.json("/is_sleeping").get("is_sleeping"):
        server.call("/wake_up", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Qwen3 directory; default: the published sizes")
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384], help="tokens (default 4096 16384)")
    parser.add_argument("--lora-rank", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--conversations", type=int, default=36, help="that the server holds at once (default %(default)s)")
    args = parser.parse_args()
    try:
        models = {args.model.name: Qwen3Config.from_json(args.model)} if args.model else {size: published(size) for size in SIZES}
    except (ValueError, OSError) as error:
        sys.exit(f"memory.py: {error}")
    rows = [row(name, config, context, rank=args.lora_rank, conversations=args.conversations)
            for name, config in models.items() for context in args.context]
    for cells in (HEAD, ["---"] * len(HEAD), *rows):
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
