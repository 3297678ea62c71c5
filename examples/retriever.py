"""Retriever: the passages of a folder of text files that fit the problem best (BM25), put before the solvers as notes.

    RETRIEVER_DIR=my_texts python train.py --operator-file examples/retriever.py

It asks no language model. Passages are paragraphs; they join the plan, which Programmer and Custom read.
"""

import functools
import math
import os
import re
from collections import Counter
from pathlib import Path

from operators import Context, Result, operator

PASSAGES, K1, B = 3, 1.5, 0.75  # how many are shown; BM25's usual constants


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@functools.cache
def index(folder: str) -> list[tuple[str, Counter]]:
    """Every paragraph of every .txt file, with its words counted."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(Path(folder).rglob("*.txt")))
    return [(part.strip(), Counter(words(part))) for text in texts for part in re.split(r"\n\s*\n", text) if part.strip()]


def best(question: str, folder: str) -> list[str]:
    passages, asked = index(folder), set(words(question))
    mean = sum(counts.total() for _, counts in passages) / max(len(passages), 1)
    rarity = {word: math.log(1 + (len(passages) - n + 0.5) / (n + 0.5)) for word in asked
              for n in [sum(word in counts for _, counts in passages)]}

    def score(counts: Counter) -> float:
        length = K1 * (1 - B + B * counts.total() / mean)
        return sum(rarity[word] * counts[word] * (K1 + 1) / (counts[word] + length) for word in asked)

    ranked = sorted(passages, key=lambda passage: -score(passage[1]))
    return [text for text, counts in ranked[:PASSAGES] if score(counts) > 0]


@operator("Retriever", role="plan", reads=("problem", "plan"), prompt="", description="looks up passages of a text collection")
def retriever(ctx: Context) -> Result:
    folder = os.environ.get("RETRIEVER_DIR", "")
    if not folder or not index(folder):
        return Result("", error=f"no .txt files in RETRIEVER_DIR={folder!r}")
    if not (found := best(ctx.inputs["problem"], folder)):
        return Result("", error="no passage shares a word with the problem")
    notes = "\n".join(f"- {text}" for text in found)
    return Result(notes, {"plan": f"{ctx.inputs['plan']}\nPassages:\n{notes}".strip()})
