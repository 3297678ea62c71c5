"""Loading a checkpoint against reading its files and copying what was read: seconds, and peak memory over the weights.

    python bench/load.py                       2 GB of bfloat16 in two files, five pairs; needs as much room on disk
    python bench/load.py --dtype float32       the same, converted while it is loaded

The other side is the bound: it reads the files from start to end into a buffer of 8 MiB and copies that into memory which
is new each time, as that of the weights is. Both sides find the files where the one before left them, in the page cache.
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import side_by_side
import torch
from peak_memory import checkpoint, loading_peak

from qwen3 import Qwen3, Qwen3Config


def load(directory: Path, dtype: str) -> None:
    Qwen3.from_pretrained(directory, dtype=getattr(torch, dtype))  # freed within the time that is measured


def read_and_copy(directory: Path) -> None:
    buffer, parts = torch.empty(2**23, dtype=torch.uint8), []
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(memoryview(buffer.numpy())):
                parts.append(buffer[:n].clone())


def main() -> None:
    parser = side_by_side.make_parser(__doc__, "load")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights on disk (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="in memory (default %(default)s)")
    args = parser.parse_args()
    hidden, vocab = (1024, 50_000) if args.gigabytes >= 0.5 else (128, 5000)
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": hidden // 8, "tie_word_embeddings": True}
    layers = max(1, round((args.gigabytes * 1e9 / 2 - vocab * hidden) / (15 * hidden**2)))
    with tempfile.TemporaryDirectory(prefix="load-") as place:
        directory = Path(place)
        checkpoint(directory, Qwen3Config(num_hidden_layers=layers, **sizes), shards=2)
        stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        sides = {"ours": lambda: load(directory, args.dtype), "read and copy": lambda: read_and_copy(directory)}
        result = {"bytes": stored, "dtype": args.dtype,
                  **side_by_side.compare(side_by_side.run_pairs(sides, args.pairs), "read and copy")}
        weights, peak = loading_peak(directory, args.dtype)
    result |= {"bound": result["seconds"]["read and copy"], "peak_over_weights": peak / weights}
    for side, seconds in result["seconds"].items():
        print(f"{side:>13}: {seconds:6.2f} s, {stored / seconds / 1e9:5.2f} GB/s")
    print(f"loading goes at {side_by_side.told(result)} of the speed of reading and copying; peak memory "
          f"{result['peak_over_weights']:.3f} of the weights")
    side_by_side.write(args.json, result, torch=torch.__version__)


if __name__ == "__main__":
    main()
