"""Publish a model: its card (README.md), filled from what the run and its evaluation wrote, and the upload.

A card holds what args.json and eval.json say and nothing else, and less: no address of a server and no name of a key's
variable, and of a place on the machine its last part alone.

    python lora.py merge --model Qwen3-8B --adapter runs/8b/checkpoints/step_000300 --out merged --eval runs/8b-eval
    python lora.py push --adapter runs/8b/checkpoints/step_000300 --eval runs/8b-eval --to user/name
"""

from __future__ import annotations

import importlib
import json
import textwrap
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any

# Flags that say nothing about the model: where and how it was watched, and whose key it used.
LEFT_OUT = {"out", "resume", "args", "check", "quiet", "log_json", "tensorboard", "wandb", "executor_key_env", "executor_extra"}
CARD = """---
library_name: {library}
base_model: "{base}"
tags: [flowsteer, lora]
---
# {base} as a Flow-Director

{what} of {base}, trained with LoRA and CWRPO ([FlowSteer](https://arxiv.org/abs/2602.01664)): given a question, it designs
an agentic workflow edit by edit on the Workflow Canvas, whose operators another model runs. It is no chat model.

## How it was trained

{training}

## How it does

{evaluation}
"""
UNKNOWN = "The run is not known: no args.json lies beside the adapter."
NOT_EVALUATED = "It was not evaluated for this card (`--eval DIR` takes the numbers of eval.py)."
SIMULATED = "The executor was a simulation: numbers say that the algorithm learns, not how good a workflow is with a real model."


def model_card(adapter: Path, model: Path | None, evaluation: Path | None) -> str:
    """Return README.md for an adapter, or for the model that it is merged into if `model`, its base, is given.

    evaluation: the --out of eval.py. Raises ValueError if its eval.json, or the run's args.json, is not what we write.
    """
    adapter = adapter.resolve()
    run = next((place / "args.json" for place in (adapter, *adapter.parents[:2]) if (place / "args.json").is_file()), None)
    base = model or (_told(run, lambda args: args["flags"]["model"]) if run else "unknown")
    return CARD.format(library="transformers" if model else "peft", what="A merged model" if model else "An adapter",
                       base=_place(str(base)),
                       training=f"Checkpoint `{adapter.name}`, {_told(run, _training)}" if run else UNKNOWN,
                       evaluation=_told(evaluation / "eval.json", _table) if evaluation else NOT_EVALUATED)


def _told(path: Path, tell: Callable[[dict[str, Any]], str]) -> str:
    try:
        return tell(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what our programs write: {type(error).__name__}: {error}") from None


def _place(text: str) -> str:
    """The text; of a place that begins at the machine's root, at home or above here, its last part."""
    windows = PureWindowsPath(text)
    outside = text.startswith(("/", "~")) or windows.drive or ".." in windows.parts
    return (windows if windows.drive else PurePosixPath(text)).name if outside else text


def _training(args: dict[str, Any]) -> str:
    shown = []
    for name, value in sorted(args["flags"].items()):
        values = value if isinstance(value, list) else [value]
        if name not in LEFT_OUT and value not in (None, "", []) and not any("://" in str(part) for part in values):
            shown.append(f"{name}={','.join(_place(str(part)) for part in values)}")
    flags = textwrap.fill(" ".join(shown), 110, break_long_words=False, break_on_hyphens=False)
    simulated = "" if args["flags"]["executor_url"] else f"\n\n{SIMULATED}"
    return f"code {args['commit']}, torch {args['torch']}, with these flags:\n\n```\n{flags}\n```{simulated}"


def _table(found: dict[str, Any]) -> str:
    lines = ["| method | source | tasks | metric | score (95% interval) | R_div = 1 |", "|---|---|---|---|---|---|"]
    for method, rows in {"this model": found["rows"], **found["baselines"]}.items():
        for row in (row for row in rows if not row["source"].startswith("kind ")):
            score = f"{row['score']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
            cells = (method, row["source"], row["tasks"], row["metric"], score, f"{row['feasible_rate']:.2f}")
            lines.append(f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in cells)} |")
    notes = [f"C{note[1:]}." for note in found["notes"] if note.startswith("contamination")]
    return "\n".join([*lines, "", *notes, *[SIMULATED] * (found["flags"]["executor_url"] == "None")])


# ---- the Hugging Face hub ---------------------------------------------------------------------------------------------


def hub() -> ModuleType:
    """Return huggingface_hub; ValueError says how to get it."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError("--push needs huggingface_hub: pip install huggingface_hub, then `hf auth login`") from None


def push(directory: Path, repo: str, public: bool) -> str:
    """Upload a directory to the Hugging Face hub and return its address; the repository is private unless `public`.

    Raises ValueError, before anything is uploaded, for a repository that exists and is public when `public` is not given.
    """
    api = hub().HfApi()
    url = api.create_repo(repo, private=not public, exist_ok=True)
    if not public and not api.repo_info(repo).private:
        raise ValueError(f"{repo} exists and is public; give --public to publish there, or name another repository")
    api.upload_folder(repo_id=repo, folder_path=directory)
    return str(url)
