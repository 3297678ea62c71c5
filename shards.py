"""Reads and writes the safetensors files of a Hugging Face directory, so that no second copy of a model exists."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9                          # of one file: what transformers and the Hugging Face hub are used to
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_tensors(directory: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield (file, name, tensor) of every safetensors file of a model, each tensor read when its turn comes.

    The library checks a file; the bytes are read here. Its tensors map the file, and every page that was read stays in
    this process's memory until the file is closed: a second copy of the model.
    """
    names, index = [WEIGHTS], directory / INDEX
    if not (directory / WEIGHTS).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: weight files are names in its own directory, got {name!r:.99}")
    for path in (directory / name for name in names):
        if not path.is_file():
            raise FileNotFoundError(f"missing weight file {path}")
        try:
            with safe_open(path, framework="pt", device="cpu"):
                pass                             # names, shapes and offsets agree with each other and with the file's size
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items()):
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{path}: tensor {name} has dtype {entry['dtype']}, which is not implemented")
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                # torch's memory is aligned to 64 bytes, numpy's to 16: the last bit of a product can depend on it
                raw = torch.empty(end - begin, dtype=torch.uint8)
                if (n := file.readinto(raw.numpy())) != end - begin:
                    raise ValueError(f"{path}: tensor {name} has {n} bytes of {end - begin}; was the file cut meanwhile?")
                yield path, name, raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` that becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(directory: Path, weights: dict[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors or, if it would be larger than shard_bytes, numbered shards and their index.

    A tensor is never cut: one that is larger than shard_bytes is a shard. A single file replaces an older one whole;
    several files cannot, so shards go only where no weights are (FileExistsError).
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    n = len(shards)
    names = [WEIGHTS] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    if n > 1 and (there := sorted(path.name for path in directory.glob("model*.safetensors*"))):
        raise FileExistsError(f"{directory} holds weights already ({there[0]}); write {n} shards to a new directory")
    for name, shard in zip(names, shards, strict=True):
        with replacing(directory / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if n > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in weights.values())
        with replacing(directory / INDEX) as temporary:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
