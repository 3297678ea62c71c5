"""LoRA by hand (Hu et al., arXiv 2106.09685): y = W x + alpha / rank * B A x with W frozen and B zero at the start.

Three decisions:
* A and B are float32 whatever the base is: an Adam step of 1e-5 on a bfloat16 weight is mostly rounded away.
* Nothing merges by itself, in train(), eval() or anywhere: a bfloat16 W that had B A added and taken off again is not
  the W it was. `merge` is for the end. `disable_lora` leaves the exact base model, which is the reference of the loss.
* On disk an adapter is PEFT's (adapter_config.json + adapter_model.safetensors): vLLM and peft load ours, and we load
  theirs. A configuration that asks for more than plain LoRA is refused by name rather than half understood.

    add_lora(model, rank=64, alpha=64)              # freezes the rest
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-5)
    python lora.py merge --model Qwen3-0.6B --adapter out/checkpoints/step_000100 --out merged
"""

import argparse
import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from publish import hub, model_card, push
from shards import SHARD_BYTES

PREFIX = "base_model.model."                        # what PEFT puts before every module name
MAX_RANK = 4096  # an adapter's own words decide how much is allocated
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of PEFT's configuration that change nothing in the arithmetic. Any other field that we do not read must be off.
HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version",
            "qalora_group_size", "revision", "task_type"}
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "merges.txt", "chat_template.jinja", "generation_config.json")

# The LoRA layers (by id) that are switched off in this thread. Not a flag on the layer: a sampler thread that shares
# the model must keep its LoRA while the trainer's thread computes reference log-probabilities.
_off: ContextVar[frozenset[int]] = ContextVar("lora_off", default=frozenset())
# Weights of a layer whose W + B A is summed before it meets the input: one product over the tokens instead of three.
# It pays where the weight fits into a cache and the tokens do not; a large layer would pay in memory for the sum.
SUM_FIRST = 2**18


class LoRALinear(nn.Module):
    """A frozen nn.Linear and its low-rank update."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0,
                 generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, dropout
        # PEFT's initialisation, which is that of nn.Linear; drawn on the CPU so that a seed means the same everywhere
        start = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(start.to(base.weight.device))                                     # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))  # (out, r)
        self.train(base.training)       # a new module trains: in an evaluated model its dropout would be on
        self.sum_first = base.weight.numel() <= SUM_FIRST and base.weight.dtype == self.lora_A.dtype
        self._summed: tuple[list, Tensor, tuple] | None = None       # see summed()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        if id(self) in _off.get():
            return self.base(x)                                                                      # (..., out)
        if self.sum_first and not (self.dropout and self.training):
            return F.linear(x, self.summed(), self.base.bias)
        y = self.base(x)                                                                             # (..., out)
        low = F.linear(F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training), self.lora_A)  # (..., r)
        if y.dtype == low.dtype:        # one pass over (..., out) instead of three
            return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_B.T, alpha=self.scale).view(y.shape)
        return (y + self.scale * F.linear(low, self.lora_B)).to(y.dtype)

    def summed(self) -> Tensor:
        """Return W + alpha / rank * B A, (out, in); without gradients it is kept until one of them is written to."""
        if torch.is_grad_enabled():
            return self.base.weight + self.delta()
        weights = self.base.weight.detach(), self.lora_A.detach(), self.lora_B.detach()
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        known = self._summed                    # read once: a sampler thread and a trainer may share this layer
        if known is None or known[0] != state:  # `weights` are kept as well, or a new one could get an old one's address
            known = self._summed = state, self.base.weight + self.delta(), weights
        return known[1]

    def delta(self) -> Tensor:
        """Return the update of the weight, alpha / rank * B A, (out, in) in float32."""
        return self.scale * (self.lora_B @ self.lora_A)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the LoRA layers by the name of the linear layer they wrap."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return A and B of every layer: what the optimiser gets."""
    return [weight for layer in lora_layers(model).values() for weight in (layer.lora_A, layer.lora_B)]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return A and B by name (`<module>.lora_A`); not copies: `model.load_state_dict(..., strict=False)` takes it back."""
    return {f"{name}.{part}": getattr(layer, part).detach()
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


def with_own_lora(model: nn.Module) -> nn.Module:
    """Return a model that shares the frozen weights and has copies of A and B, which one may train while this one samples."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters() if not weight.requires_grad})


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze every parameter but A and B."""
    model.requires_grad_(False)
    for weight in lora_parameters(model):
        weight.requires_grad_(True)


def target_linears(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers whose dotted name ends in a target (PEFT's rule); ValueError if a target has none."""
    linears = {name.removesuffix(".base"): module for name, module in model.named_modules()
               if isinstance(module, nn.Linear)}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            raise ValueError(f"LoRA target {target!r} matches no linear layer of the model")
    return {name: linear for name, linear in linears.items()
            if any(f".{name}".endswith(f".{target}") for target in targets)}


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0,
             targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
             generator: torch.Generator | None = None) -> None:
    """Wrap every targeted linear layer and freeze the rest. B is zero, so the model's output does not change."""
    if rank < 1 or not 0 <= dropout < 1 or not targets:
        raise ValueError(f"LoRA needs rank >= 1, 0 <= dropout < 1 and a target; got {rank}, {dropout}, {targets}")
    if lora_layers(model):
        raise ValueError("the model already has LoRA layers")
    for name, linear in target_linears(model, targets).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linear, rank, alpha, dropout, generator))
    mark_only_lora_as_trainable(model)


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Make the model its exact base inside the block, for this thread only.

    Blocks nest, and an exception restores what was before. Run backward inside the block too if activations are
    recomputed: gradient checkpointing replays the forward pass with the setting it finds at that moment.
    """
    token = _off.set(_off.get() | {id(layer) for layer in lora_layers(model).values()})
    try:
        yield
    finally:
        _off.reset(token)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add B A into the base weights and unwrap, in place; summed in float32 and rounded once to the base's dtype."""
    for name, layer in lora_layers(model).items():
        weight = layer.base.weight
        weight.copy_(weight.float() + layer.delta())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


def save_adapter(model: nn.Module, directory: str | Path) -> Path:
    """Write the adapter in PEFT's format and return its directory.

    Written beside it under a temporary name and then renamed. An adapter that is already there is replaced; a
    directory that holds anything else is left alone (FileExistsError).
    """
    layers = lora_layers(model)
    assert layers, "the model has no LoRA layers to save"
    first = next(iter(layers.values()))
    targets = sorted({name.rpartition(".")[2] for name in layers})
    if target_linears(model, targets).keys() != layers.keys():      # only some of the layers that bear these names
        targets = sorted(layers)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout,
        "target_modules": targets,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
        "use_dora": False, "use_rslora": False,
    }
    weights = {f"{PREFIX}{name}.weight": weight.cpu().contiguous() for name, weight in lora_state_dict(model).items()}
    directory = Path(directory)
    with new_directory(directory, replaces={CONFIG, WEIGHTS, "README.md"}) as temporary:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return directory


@contextmanager
def new_directory(final: Path, replaces: set[str]) -> Iterator[Path]:
    """Give a temporary directory that becomes `final` when the block ends well, and vanishes when it does not.

    A `final` that exists may hold only files named in `replaces`. It is moved aside first: a reader can find it missing
    for an instant, never half written.
    """
    final = Path(os.path.abspath(final))
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise FileExistsError(f"{final} exists and is not a directory")
    if final.is_dir() and (others := sorted({path.name for path in final.iterdir()} - replaces)):
        raise FileExistsError(f"{final} exists and holds other files ({', '.join(others[:3])}); choose a new directory")
    temporary, old = (final.with_name(f".{final.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    for leftover in (temporary, old):       # of a killed process that had the same number, as in a restarted container
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if final.is_dir():
            os.replace(final, old)
        os.replace(temporary, final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_adapter(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the configuration and the weights of a PEFT directory; ValueError for anything but plain LoRA."""
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is not a PEFT adapter directory: it has no {name}")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(directory / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{directory}: unreadable adapter: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{directory / CONFIG}: peft_type must be 'LORA'")
    rest = dict(config)
    rank, alpha, targets = (rest.pop(name, None) for name in ("r", "lora_alpha", "target_modules"))
    dropout, start = rest.pop("lora_dropout", 0.0), rest.pop("init_lora_weights", True)
    numbers = all(isinstance(value, int | float) for value in (rank, alpha, dropout)) and 0 < rank <= MAX_RANK
    if not numbers or not isinstance(rank, int) or not isinstance(targets, list) or not targets:
        raise ValueError(f"{directory / CONFIG}: r (at most {MAX_RANK}), lora_alpha, lora_dropout must be numbers and "
                         f"target_modules a list of names, got {rank!r}, {alpha!r}, {dropout!r}, {targets!r}")
    if start not in (True, False, "gaussian"):          # PiSSA, OLoRA, ...: their base weights are not the base's
        raise ValueError(f"{directory / CONFIG}: init_lora_weights = {start!r} is not implemented")
    for name, value in rest.items():
        if name not in HARMLESS | {"peft_type"} and value and value != "none":
            raise ValueError(f"{directory / CONFIG}: {name} = {value!r} is not implemented (plain LoRA only)")
    return config, weights


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Load a PEFT adapter into the model; adds the LoRA layers, or checks them against the file if they are there.

    The model is changed only after everything has been checked: ValueError for a rank, alpha or target that differs and
    for missing, unknown and mis-shaped tensors.
    """
    config, weights = read_adapter(directory)
    rank, alpha = config["r"], config["lora_alpha"]
    linears, layers = target_linears(model, config["target_modules"]), lora_layers(model)
    if layers:
        own = {(layer.rank, layer.alpha) for layer in layers.values()}
        if own != {(rank, alpha)}:
            raise ValueError(f"{directory}: adapter has (r, alpha) {(rank, alpha)}, the model {sorted(own)}")
        if odd := sorted(layers.keys() ^ linears.keys()):
            raise ValueError(f"{directory}: adapter and model target different layers, as {odd[0]}")
    shapes = {}
    for name, linear in linears.items():
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (rank, linear.in_features)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (linear.out_features, rank)
    for problem, keys in (("missing", shapes.keys() - weights.keys()), ("unknown", weights.keys() - shapes.keys())):
        if keys:
            raise ValueError(f"{directory}: {len(keys)} {problem} tensors: {', '.join(sorted(keys)[:3])}")
    for key, shape in shapes.items():
        if tuple(weights[key].shape) != shape:
            raise ValueError(f"{directory}: {key} has shape {tuple(weights[key].shape)}, the model needs {shape}")
    if not layers:
        add_lora(model, rank, alpha, config.get("lora_dropout", 0.0), config["target_modules"])
    with torch.no_grad():
        for name, weight in lora_state_dict(model).items():
            weight.copy_(weights[f"{PREFIX}{name}.weight"])


def merge_directory(model_dir: Path, adapter: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the Hugging Face directory of model + adapter, in the dtype that the model's config.json names."""
    from qwen3 import Qwen3, Qwen3Config  # only here: the layers above fit any model

    Qwen3Config.from_json(model_dir)
    raw = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{model_dir / 'config.json'}: cannot merge into dtype {dtype!r}")
    read_adapter(adapter)  # fails in milliseconds, before the minutes that a large model takes to load
    with new_directory(out, replaces=set()) as temporary:
        model = Qwen3.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        load_adapter(model, adapter)
        merge(model)
        model.save_pretrained(temporary, shard_bytes)
        for name in COMPANIONS:
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, temporary / name)


EXAMPLES = """LoRA adapters in PEFT's format. `merge --help` and `push --help` have the flags.

    python lora.py merge --model Qwen3-0.6B --adapter runs/real/checkpoints/step_000200 --out merged
    python lora.py merge --model Qwen3-8B --adapter adapter --out merged --max-shard-gb 2      files of 2 GB at most
    python lora.py merge --model Qwen3-0.6B --adapter adapter --out merged --push user/name    private, unless --public
    python lora.py push --adapter runs/real/checkpoints/step_000200 --eval runs/real-eval --to user/name    the adapter alone
"""


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="add an adapter into its base model and write a plain model directory")
    command.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the base model")
    command.add_argument("--out", type=Path, required=True, help="directory to write; must be new or empty")
    command.add_argument("--max-shard-gb", type=float, default=SHARD_BYTES / 1e9,
                         help="a larger model is written as several files of at most this size (default %(default)g)")
    command.add_argument("--push", metavar="REPO", help="then upload it to this repository of the Hugging Face hub (user/name)")
    upload = commands.add_parser("push", help="upload an adapter with its card, without merging it")
    upload.add_argument("--to", dest="push", metavar="REPO", required=True, help="repository of the Hugging Face hub (user/name)")
    for either in (command, upload):
        either.add_argument("--adapter", type=Path, required=True, help="PEFT adapter directory, as a run's checkpoint")
        either.add_argument("--eval", type=Path, metavar="DIR", help="eval.py's --out: its table goes into the card, README.md")
        either.add_argument("--public", action="store_true", help="a public repository (default: a private one)")
    args = parser.parse_args(arguments)
    if args.public and not args.push:
        parser.error("--public needs --push")
    if args.command == "merge" and not args.max_shard_gb > 0:
        parser.error(f"--max-shard-gb must be above 0, got {args.max_shard_gb}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        if args.push:
            hub()  # before the minutes that merging takes
        read_adapter(args.adapter)
        card = model_card(args.adapter, args.model if args.command == "merge" else None, args.eval)
        if args.command == "merge":
            merge_directory(args.model, args.adapter, args.out, int(args.max_shard_gb * 1e9))
            (args.out / "README.md").write_text(card, encoding="utf-8")
            print(f"merged {args.adapter} into {args.model}: {args.out}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"lora.py {args.command}: {error}") from None
    if not args.push:
        return
    with tempfile.TemporaryDirectory() as place:  # a checkpoint also holds the optimiser, which nobody wants
        if args.command == "push":
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(args.adapter / name, Path(place) / name)
            (Path(place) / "README.md").write_text(card, encoding="utf-8")
        try:
            print(f"uploaded: {push(args.out if args.command == 'merge' else Path(place), args.push, args.public)}")
        except Exception as error:  # the library's own, its HTTP client's, the system's: they have no base in common
            written = f"{args.out} is written but was" if args.command == "merge" else f"{args.adapter} was"
            raise SystemExit(f"lora.py {args.command}: {written} not uploaded: {error!r}") from None


if __name__ == "__main__":
    main()
