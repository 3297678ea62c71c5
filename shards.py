"""Reads the safetensors files of a Hugging Face directory, tensor by tensor, so that no second copy of a model exists."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_tensors(directory: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield (file, name, tensor) of every safetensors file of a model; a tensor maps its file until it is copied."""
    names, index = ["model.safetensors"], directory / "model.safetensors.index.json"
    if not (directory / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
    for path in (directory / name for name in names):
        if not path.is_file():
            raise FileNotFoundError(f"missing weight file {path}")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in sorted(file.keys()):
                    yield path, name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
