"""Make the tiny default policy from nothing: tokenizer, tiny Qwen3, and imitation of an editor that draws by chance.

The result is an ordinary Hugging Face directory (config.json, model.safetensors, tokenizer.json), so that the tiny run
takes the same code path as Qwen3-8B. The demonstrations are edits on the toy tasks, with the canvas's real feedback between
them, of an editor that knows nothing of which operator suits which task:

    tiny           the grammar and the usual order of the roles, as a language model does that has read of agents
                   (baselines.ordered_edit)
    tiny-grammar   the grammar alone (baselines.random_edit), in eight turns: structure is then what is to be learned, as
                   bench/ablations.py needs it

One thing more is taught, because any language model can do it and a policy cannot learn to treat kinds of tasks differently
without: to know the kind of the task while writing an edit. Linear layers must read it from the states before each token of
the edits, and are thrown away: for `tiny` also from those between the network's layers, which an adapter of the last one can
use, and all of one size, so that a faint trace will not do.

    python warmstart.py                    three minutes on two cores; `python train.py` does it when needed, in runs/
    python warmstart.py --name tiny-grammar
    python warmstart.py --out runs/tiny    a directory of your choice, for --model and scripts/serve_vllm.sh
    python warmstart.py --seed 1           other demonstrations, other weights
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

import baselines
import operators
from backends import SimulatedBackend
from canvas import Canvas, CanvasConfig
from edits import TAGS, Edit, parse_edit
from policy import ChatTokenizer
from qwen3 import Qwen3, Qwen3Config
from tasks import Task, toy_tasks
from toys import TOY_CANVAS, TOY_SOURCES

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen's pre-tokenizer: contractions, words, single digits, punctuation, line breaks, blanks.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# For servers that are asked to chat with it, as an executor is; policy.ChatTokenizer frames turns itself.
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
VOCAB = 1024
EPISODES = 900
EPOCHS = 3
BATCH_TOKENS = 2048  # small: the grammar is learned by many steps, not by many tokens
PEAK_LR = 4e-3
KNOWING = 1.0  # weight of telling the kind of the task from the states that write edits
READING = 0.5  # weight of predicting the task and the feedback: what a policy cannot read it cannot learn to use


class Lesson(NamedTuple):
    editor: Callable[[Canvas, random.Random], str]  # who is imitated
    canvas: CanvasConfig
    throughout: bool  # the kind is known between the layers too, and strongly; not where results were made without


LESSONS = {  # by the name that --model takes
    "tiny": Lesson(baselines.ordered_edit, CanvasConfig(**TOY_CANVAS), throughout=True),
    "tiny-grammar": Lesson(baselines.random_edit, replace(CanvasConfig(**TOY_CANVAS), max_turns=8), throughout=False)}


def tiny_config(vocab: int) -> Qwen3Config:
    return Qwen3Config.from_dict({
        "model_type": "qwen3", "vocab_size": vocab, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
        "attention_bias": False})


def make_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE trained on canvas conversations, with Qwen's split rule and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # Edit tags are tokens of their own, as <think> is in Qwen3: an edit is then six to ten tokens, and well-formed sooner.
    tags = [*(f"<{slash}{name}>" for name in TAGS for slash in ("", "/")), "<think>", "</think>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(SPECIAL) - len(tags), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in tags])
    return tokenizer


def demonstrate(task: Task, seed: int, name: str = "tiny") -> list[tuple[str, str]]:
    """One episode of the editor `name` as (who, text) pairs: system, user, then edit, feedback, edit, ..."""
    rng = random.Random(f"{seed}/demonstration/{task.id}")
    lesson = LESSONS[name]
    canvas = Canvas(task, operators.library(), SimulatedBackend(seed), lesson.canvas)
    system, user = canvas.prompt()
    episode = [("system", system), ("user", user)]
    while not canvas.done:
        text = lesson.editor(canvas, rng)
        episode += [("edit", text), ("feedback", canvas.step(text).text)]
    return episode[:-1]


def encode(episode: list[tuple[str, str]], tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    """(tokens, mask) framed as in a rollout; mask is 1 on the edits and their end-of-turn tokens."""
    tokens = tokenizer.prompt_ids(episode[0][1], episode[1][1])
    mask = [0] * len(tokens)
    for who, text in episode[2:]:
        edit = who == "edit"
        ids = [*tokenizer.encode(text), tokenizer.end_id] if edit else tokenizer.feedback_ids(text, ended=True)
        tokens += ids
        mask += [int(edit)] * len(ids)
    return tokens, mask


def imitate(model: Qwen3, examples: list[tuple[list[int], list[int], int]], seed: int, progress: bool = True,
            throughout: bool = True) -> float:
    """Train all weights on (tokens, mask, kind) to predict edits, what the canvas says, with less weight, and the kind, an
    index into TOY_SOURCES, from the states before the edits' tokens: the last ones or, throughout, also those that enter the
    last layer, each at unit size. Return the last epoch's mean loss of the edits, nats a token."""
    rng = random.Random(f"{seed}/imitation")
    batches = []
    for example in sorted(examples, key=lambda example: -len(example[0])):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0][0]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(example)
    steps = EPOCHS * len(batches)
    probes = torch.nn.ModuleList(torch.nn.Linear(model.config.hidden_size, len(TOY_SOURCES)) for _ in range(1 + throughout))
    between: list[torch.Tensor] = []  # (B, T, D), of this batch
    hook = model.model.layers[-1].register_forward_pre_hook(lambda layer, given: between.append(given[0]))
    decay, rest = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1},
                                   {"params": [*rest, *probes.parameters()], "weight_decay": 0.0}],
                                  lr=PEAK_LR, betas=(0.9, 0.95))
    warm_up = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))))
    model.train()
    losses: list[float] = []
    for _ in tqdm(range(EPOCHS), desc="warm start", disable=not progress, unit="epoch"):
        losses = []
        for batch in rng.sample(batches, len(batches)):
            T = len(batch[0][0])
            ids = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens, *_ in batch])  # (B, T)
            mask = torch.tensor([mask + [0] * (T - len(mask)) for _, mask, _ in batch]).bool()  # (B, T)
            real = torch.tensor([[1] * len(mask) + [0] * (T - len(mask)) for _, mask, _ in batch]).bool()[:, 1:]  # (B, T - 1)
            states = model.hidden(ids)[:, :-1][real]  # (M, D): the state before each token predicts it
            losses_of = F.cross_entropy(model.head(states), ids[:, 1:][real], reduction="none")  # (M,)
            edit = mask[:, 1:][real]
            kinds = torch.tensor([kind for *_, kind in batch])[:, None].expand(real.shape)[real]  # (M,)
            loss = losses_of[edit].mean() + READING * losses_of[~edit].mean()
            read = [states[edit]]
            if throughout:
                read = [F.rms_norm(x, x.shape[-1:]) for x in (between[-1][:, :-1][real][edit], states[edit])]
            for probe, x in zip(probes, read, strict=True):
                loss += KNOWING * F.cross_entropy(probe(x), kinds[edit])
            between.clear()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(losses_of[edit].mean().item())
    hook.remove()
    model.eval()
    return sum(losses) / len(losses)


def build(directory: Path, seed: int = 0, episodes: int = EPISODES, progress: bool = True, name: str = "tiny") -> dict:
    """Make the policy `name` (of LESSONS) in `directory`, written whole or not at all. Returns what was measured."""
    started = time.monotonic()
    tasks = [task for source in TOY_SOURCES for task in toy_tasks(source, episodes // len(TOY_SOURCES), seed + 10**6)]
    with ThreadPoolExecutor(4) as pool:  # programs of the simulated executor are really run, and take their time
        demonstrations = list(tqdm(pool.map(lambda task: demonstrate(task, seed, name), tasks), total=len(tasks),
                                   desc="demonstrations", disable=not progress))
    texts = [text for episode in demonstrations for _, text in episode]
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        make_tokenizer(texts).save(str(temporary / "tokenizer.json"))
        (temporary / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "model_max_length": 4096, "chat_template": CHAT_TEMPLATE}, indent=2))
        tokenizer = ChatTokenizer(temporary)
        torch.manual_seed(seed)
        model = Qwen3(tiny_config(VOCAB))
        examples = [(*encode(episode, tokenizer), TOY_SOURCES.index(task.source))
                    for task, episode in zip(tasks, demonstrations, strict=True)]
        loss = imitate(model, examples, seed, progress, LESSONS[name].throughout)
        model.save_pretrained(temporary)
        facts = {"parameters": sum(p.numel() for p in model.parameters()), "episodes": len(tasks),
                 "edits": sum(who == "edit" for episode in demonstrations for who, _ in episode),
                 "imitation_loss": loss, "seconds": time.monotonic() - started}
        (temporary / "warmstart.json").write_text(json.dumps(facts, indent=2))
        if directory.exists():  # another process was faster: both made the same
            shutil.rmtree(temporary)
        else:
            temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return facts


def tiny_policy(root: Path, seed: int = 0, progress: bool = True, name: str = "tiny") -> Path:
    """The directory of the policy `name` (of LESSONS) below `root`, made if it is not there; named by what made it."""
    made_of = hashlib.sha256()
    here = Path(__file__).parent
    for file in ("warmstart.py", "baselines.py", "canvas.py", "edits.py", "graph.py", "operators.py", "simulated.py", "toys.py"):
        made_of.update((here / file).read_bytes())
    directory = root / f"{name}-{seed}-{made_of.hexdigest()[:12]}"
    if not (directory / "model.safetensors").exists():
        build(directory, seed, progress=progress, name=name)
    return directory


def parse_rate(texts: Sequence[str]) -> float:
    """Share of sampled turns that read as an edit."""
    return sum(isinstance(parse_edit(text), Edit) for text in texts) / max(len(texts), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="directory to make (default: runs/NAME-SEED-HASH)")
    parser.add_argument("--name", choices=sorted(LESSONS), default="tiny", help="who is imitated (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of demonstrations and weights (default %(default)s)")
    args = parser.parse_args()
    if args.out is not None and args.out.exists():
        parser.error(f"{args.out} exists; choose another --out or remove it")
    if args.out is None:
        args.out = tiny_policy(Path("runs"), args.seed, name=args.name)
    else:
        build(args.out, args.seed, name=args.name)
    print(f"{args.out}: {(args.out / 'warmstart.json').read_text()}")


if __name__ == "__main__":
    main()
