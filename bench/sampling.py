"""Sampling in this process against Hugging Face's generate, called turn by turn: the same weights, conversations and turns.

    python bench/sampling.py                              36 conversations of 8 turns, the tiny default's shape, five pairs
    python bench/sampling.py --shape vocabulary           hidden 512, 8 layers, Qwen3's 151,936 ids; 6 conversations, ten minutes
    python bench/sampling.py --shape vocabulary --conversations 36

A turn samples a number of tokens (ids mean nothing here: the weights are random and no turn ends early) and is answered with
others. Ours keeps keys and values from turn to turn and samples with LoRA on, as training does. Theirs is given the LoRA
merged, its fastest form, and all conversations in one left-padded batch; each call builds a cache of its own. First both
decode greedily, and the shares of equal ids are compared. `bound`: the larger of the FLOPs of ours at a large matrix
product's speed and the bytes of weights and caches that its decoding steps read at this machine's speed of copying.

vLLM needs a server: bench/sampler_step.py compares it with the sampler in this process.
"""
from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import side_by_side
import torch
import transformers
from update import make_model, make_theirs, matmul_speed

from policy import InProcessSampler, SampleRequest
from qwen3 import Qwen3

CONVERSATIONS = {"tiny": 36, "vocabulary": 6}
Sample = Callable[[list[list[int]], int], list[list[int]]]  # conversations, number of the turn -> the ids of each turn


def play(sample: Sample, args: argparse.Namespace, vocab: int) -> list[list[int]]:
    """Play all turns of all conversations; return what was sampled, and nothing of what was read."""
    rng = random.Random(0)

    def read(n: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(n)]

    shared = read(60)  # the system prompt
    conversations = [shared + read(90 + 200 * i // args.conversations) for i in range(args.conversations)]
    sampled: list[list[int]] = [[] for _ in conversations]
    for turn in range(args.turns):
        for i, ids in enumerate(sample(conversations, turn)):
            assert len(ids) == args.new_tokens, f"{len(ids)} ids were sampled, not {args.new_tokens}"
            sampled[i] += ids
            conversations[i] = conversations[i] + ids + read(args.feedback_tokens)
    return sampled


def our_side(model: Qwen3, args: argparse.Namespace, temperature: float) -> tuple[Sample, InProcessSampler]:
    sampler = InProcessSampler(model, end_id=-1, temperature=temperature)

    def sample(conversations: list[list[int]], turn: int) -> list[list[int]]:
        if turn == 0:
            sampler.load_adapter(version=0)  # as after every update: nothing is cached
        requests = [SampleRequest(i, ids, args.new_tokens, seed=turn) for i, ids in enumerate(conversations)]
        return [future.result().ids for future in sampler.submit(requests)]

    return sample, sampler


def their_side(model: transformers.PreTrainedModel, args: argparse.Namespace, temperature: float) -> Sample:
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}

    @torch.no_grad()
    def sample(conversations: list[list[int]], turn: int) -> list[list[int]]:
        width = max(map(len, conversations))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in conversations])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in conversations])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=args.new_tokens, pad_token_id=0, **chosen)
        return out[:, width:].tolist()

    return sample


def bound_seconds(model: Qwen3, sampler: InProcessSampler, args: argparse.Namespace) -> float:
    """What arithmetic and memory ask of our side at least, for what it put through the model in one play."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = sum(w.numel() for name, w in model.named_parameters() if "layers" in name and "lora" not in name)
    flops = 2 * (body * (sampler.prefilled + sampler.decoded) + head * sampler.decoded)
    tokens = 60 + 190 + (args.new_tokens + args.feedback_tokens) * args.turns / 2  # of a conversation, in the middle
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * args.conversations
    read = 4 * (body + head + cache) * args.turns * args.new_tokens
    source, target = torch.ones(2**25), torch.ones(2**25)

    def copy() -> float:
        began = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - began

    return max(flops / matmul_speed("cpu", torch.float32), read / (4 * 2 * 2**25 / min(copy() for _ in range(6))))


def main() -> None:
    parser = side_by_side.make_parser(__doc__, "sampling")
    parser.add_argument("--shape", choices=CONVERSATIONS, default="tiny")
    parser.add_argument("--conversations", type=int, help=f"default {CONVERSATIONS}")
    parser.add_argument("--turns", type=int, default=8, help="default %(default)s")
    parser.add_argument("--new-tokens", type=int, default=16, help="sampled in a turn (default %(default)s)")
    parser.add_argument("--feedback-tokens", type=int, default=80, help="read after it (default %(default)s)")
    args = parser.parse_args()
    args.conversations = args.conversations or CONVERSATIONS[args.shape]
    ours = make_model(args.shape, "cpu", torch.float32).eval()
    theirs = copy.deepcopy(make_theirs(ours)).merge_and_unload().eval()  # a copy: merging would change our weights
    theirs.generation_config.eos_token_id = None
    vocab, number = ours.config.vocab_size, args.conversations * args.turns * args.new_tokens

    sample, sampler = our_side(ours, args, 0.0)
    pairs = zip(play(sample, args, vocab), play(their_side(theirs, args, 0.0), args, vocab), strict=True)
    agree = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=True)) / number
    bound = bound_seconds(ours, sampler, args)
    sampler.close()

    sample, sampler = our_side(ours, args, 0.8)
    sides = {"ours": lambda: play(sample, args, vocab),
             "generate": lambda: play(their_side(theirs, args, 0.8), args, vocab)}
    result = {"shape": args.shape, "conversations": args.conversations, "turns": args.turns, "sampled": number,
              "greedy_agreement": agree, "bound": bound,
              **side_by_side.compare(side_by_side.run_pairs(sides, args.pairs), "generate")}
    sampler.close()
    for side, seconds in result["seconds"].items():
        print(f"{side:>8}: {seconds:7.2f} s, {number / seconds:7.0f} sampled tokens/s")
    print(f"{agree:.1%} of greedy ids are equal; faster by {side_by_side.told(result)}; bound of ours {bound:.2f} s")
    side_by_side.write(args.json, result, torch=torch.__version__, transformers=transformers.__version__)


if __name__ == "__main__":
    main()
