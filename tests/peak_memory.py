"""Memory that loading a checkpoint needs, over the size of its weights. For a model of 1.2 GB:  python tests/peak_memory.py"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from qwen3 import Qwen3, Qwen3Config


def checkpoint(directory: Path, config: Qwen3Config, shards: int) -> None:
    """Write a bfloat16 checkpoint of random weights in this many files."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Qwen3(config).named_parameters()}
    places, noise = {}, torch.randn(2**16).bfloat16()
    for shard in range(shards):
        names = list(shapes)[shard::shards]
        places |= dict.fromkeys(names, f"model-{shard}.safetensors")
        weights = {name: noise.repeat(shapes[name].numel() // 2**16 + 1)[:shapes[name].numel()].view(shapes[name])
                   for name in names}
        save_file(weights, directory / f"model-{shard}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (directory / "config.json").write_text(json.dumps(config.to_dict()))


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the peak) of this process in bytes (Linux); pages of mapped files count too."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def load(directory: str, dtype: str) -> None:
    before = resident("VmRSS")
    model = Qwen3.from_pretrained(directory, dtype=getattr(torch, dtype))
    print(sum(weight.nbytes for weight in model.parameters()), resident("VmHWM") - before)


def loading_peak(directory: Path, dtype: str) -> tuple[int, int]:
    """Return (bytes of the weights, bytes by which loading them raised the peak of a fresh process)."""
    done = subprocess.run([sys.executable, __file__, directory, dtype], capture_output=True, text=True, check=True)
    weights, peak = done.stdout.split()
    return int(weights), int(peak)


if __name__ == "__main__" and sys.argv[1:]:
    load(*sys.argv[1:])
elif __name__ == "__main__":
    sizes = Qwen3Config(50_000, 1024, 3072, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=8,
                        head_dim=128, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as place:
        checkpoint(Path(place), sizes, shards=2)
        for name in ("bfloat16", "float32"):
            weights, peak = loading_peak(Path(place), name)
            print(f"{name}: weights {weights / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {peak / weights:.3f} of the weights")
