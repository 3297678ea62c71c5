"""The Qwen3 network by hand: reads and writes Hugging Face directories, and gives the same logits.

Four decisions:
* Every module has the name that the checkpoint gives it (`model.layers.0.self_attn.q_proj.weight`, ...), so loading
  is a loop over tensors and not a table of translations.
* `forward` is split in two: `hidden` (everything up to the final norm) and `head` (the vocabulary projection). The
  logits of a whole batch, (B, T, 151936), are what fills a GPU; a trainer asks for `hidden` and applies `head` only to
  the positions it scores.
* The last layer computes its queries, attention and MLP only where a state is wanted: a trainer scores one token in ten.
* One rule for the KV cache: a query at position p sees the entries 0..p of its row. Nothing else has to be remembered
  about a row, so rows of different lengths prefill, decode and are reused in one batch.

Not covered: sliding windows, rope scaling (YaRN), attention biases, quantised weights, mixture of experts. A
config.json that asks for one of them is refused by name.

    logits = Qwen3.from_pretrained("Qwen3-0.6B", device="cuda", dtype=torch.bfloat16)(ids)          # (B, T) -> (B, T, V)
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shards import SHARD_BYTES, read_tensors, replacing, write_tensors

# The one value this file implements of each choice that a config.json may make.
IMPLEMENTED = {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
               "use_sliding_window": False, "quantization_config": None, "partial_rotary_factor": None}
ROPE = {"rope_theta", "rope_type", "type"}       # what may stand in rope_scaling or rope_parameters


@dataclass(frozen=True)
class Qwen3Config:
    """The sizes of a Qwen3 under the names of config.json; the comments give the values of Qwen3-8B."""

    vocab_size: int                          # V, 151936; includes padding rows beyond the tokenizer's last id
    hidden_size: int                         # 4096
    intermediate_size: int                   # 12288, width of the SwiGLU
    num_hidden_layers: int                   # 36
    num_attention_heads: int                 # Hq, 32
    num_key_value_heads: int                 # Hkv, 8: groups of Hq / Hkv query heads share one key/value head
    head_dim: int                            # Dh, 128; free: Hq * Dh need not be hidden_size
    max_position_embeddings: int = 32768     # 40960; a promise about quality, not a size of anything here
    rope_theta: float = 10000.0              # 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False        # True up to 4B: lm_head is the embedding matrix
    bos_token_id: int | None = None          # the two ids are carried along for other readers of config.json
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
        if (Hq := self.num_attention_heads) % (Hkv := self.num_key_value_heads):
            raise ValueError(f"num_key_value_heads must divide num_attention_heads, got {Hkv} and {Hq}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Qwen3Config":
        """Read the dictionary of a config.json of transformers 4 or 5; ValueError names what is not implemented."""
        for name, value in IMPLEMENTED.items():
            if raw.get(name, value) != value:
                raise ValueError(f"{name} = {raw[name]!r} is not implemented (only {value!r})")
        if odd := set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError(f"layer_types has {sorted(odd)}; only 'full_attention' is implemented")
        # transformers 4 writes rope_theta beside rope_scaling, transformers 5 writes both inside rope_parameters
        ropes = [raw, raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}]
        for rope_type in (rope.get("rope_type", rope.get("type", "default")) for rope in ropes):
            if rope_type != "default":
                raise ValueError(f"rope type {rope_type!r} is not implemented (only 'default')")
        for name, value in ((name, value) for rope in ropes[1:] for name, value in rope.items() if name not in ROPE):
            raise ValueError(f"{name} = {value!r} of the rotary embedding is not implemented")
        thetas = {float(rope["rope_theta"]) for rope in ropes if "rope_theta" in rope}
        if len(thetas) > 1:
            raise ValueError(f"rope_theta is given twice with different values {sorted(thetas)}")
        fields = dataclasses.fields(cls)
        known = {field.name: raw[field.name] for field in fields if field.name in raw}
        known["rope_theta"] = thetas.pop() if thetas else cls.rope_theta
        if missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in known]:
            raise ValueError(f"missing {', '.join(missing)}")
        return cls(**known)

    @classmethod
    def from_json(cls, path: str | Path) -> "Qwen3Config":
        """Read a config.json, or the one in a directory."""
        path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no model configuration at {path} (expected a Hugging Face directory)")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json should hold; rope_theta in both places, for readers of either age."""
        fixed = {name: value for name, value in IMPLEMENTED.items() if value is not None}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return fixed | dataclasses.asdict(self) | {"architectures": ["Qwen3ForCausalLM"], "rope_parameters": rope}


class KVCache:
    """Keys and values of `rows` independent sequences, up to `capacity` tokens each.

    Rows have no length: what a query sees follows from its position alone (see `Qwen3.hidden`), so a row is reused by
    writing the next sequence into it from position 0.
    """

    def __init__(self, config: Qwen3Config, rows: int, capacity: int, device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        # zeros, not empty: a masked entry has probability 0, but 0 times a NaN found in fresh memory is NaN
        self.k = torch.zeros(shape, device=device, dtype=dtype)    # (layers, rows, Hkv, capacity, Dh)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.rows, self.capacity = rows, capacity


@dataclass
class Context:
    """What every layer of one forward pass needs besides its input; made once, in `Qwen3.hidden`."""

    key_angles: tuple[Tensor, Tensor]        # cos and sin, (B, 1, T, Dh) each
    query_angles: tuple[Tensor, Tensor]      # the same, or those of `places`, (B, 1, Q, Dh)
    mask: Tensor | None                      # (B, 1, T, L) bool, True = visible; None = causal over the T tokens
    cache: KVCache | None = None
    at: tuple | None = None                  # where the cache stores this batch; an index that selects (B, T, Hkv, Dh)
    view: slice | Tensor | None = None       # the cache rows to read; a slice, which copies nothing, where possible
    places: Tensor | None = None             # (B, Q) where the last layer has queries; None = everywhere, Q = T

    def last(self, wanted: Tensor) -> "Context":
        """Return the last layer's context when states are wanted at some of the T places only, (B, T) bool."""
        first_wanted = (~wanted).byte().argsort(dim=1, stable=True)                      # (B, T) places, wanted ones first
        places = first_wanted[:, :max(1, int(wanted.sum(1).max()))]                      # (B, Q)
        causal = torch.arange(wanted.size(1), device=wanted.device) <= places[:, :, None]
        mask = causal if self.mask is None else pick(self.mask[:, 0], places)            # (B, Q, L)
        angles = tuple(pick(angle[:, 0], places)[:, None] for angle in self.key_angles)
        return dataclasses.replace(self, query_angles=angles, mask=mask[:, None], places=places)


def pick(x: Tensor, places: Tensor | None) -> Tensor:
    """Return x[b, places[b, q]], (B, Q, D), of x (B, T, D); x itself where places is None."""
    return x if places is None else x.gather(1, places[:, :, None].expand(-1, -1, x.size(-1)))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 and rounded to x's dtype before the weight, as transformers does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rotary_angles(positions: Tensor, config: Qwen3Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, (B, 1, T, Dh) each; computed in float32 whatever `dtype` is."""
    even = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequency = 1.0 / config.rope_theta ** (even / config.head_dim)           # (Dh/2,)
    angle = positions[:, None, :, None].float() * frequency                   # (B, 1, T, Dh/2)
    angle = torch.cat((angle, angle), dim=-1)                                 # (B, 1, T, Dh)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of coordinates of x (B, H, T, Dh) by their angles.

    The trap is which two coordinates make a pair. The paper pairs neighbours; Hugging Face checkpoints, Qwen3's among
    them, pair the first half with the second. The two differ by a permutation of weight rows, so the wrong one loads
    without complaint, keeps every norm, and talks nonsense. For Dh = 8, the frequency that turns each coordinate:

        coordinate             0   1   2   3   4   5   6   7
        interleaved (paper)    f0  f0  f1  f1  f2  f2  f3  f3      pairs (0,1) (2,3) (4,5) (6,7)
        half-split (here)      f0  f1  f2  f3  f0  f1  f2  f3      pairs (0,4) (1,5) (2,6) (3,7)
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: Qwen3Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)      # over each head, not over all of them
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        Dh, wanted = self.head_dim, pick(x, ctx.places)
        q = self.q_norm(self.q_proj(wanted).unflatten(-1, (-1, Dh))).transpose(1, 2)     # (B, Hq, Q, Dh)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, Dh))).transpose(1, 2)          # (B, Hkv, T, Dh)
        v = self.v_proj(x).unflatten(-1, (-1, Dh)).transpose(1, 2)                       # (B, Hkv, T, Dh)
        q, k = rotate(q, *ctx.query_angles), rotate(k, *ctx.key_angles)
        if ctx.cache is not None:
            all_k, all_v = ctx.cache.k[self.layer], ctx.cache.v[self.layer]              # (rows, Hkv, capacity, Dh)
            all_k[ctx.at], all_v[ctx.at] = k.transpose(1, 2), v.transpose(1, 2)
            if ctx.mask is not None:                     # without one this is the beginning: k and v are all there is
                length = ctx.mask.size(-1)
                k, v = all_k[:, :, :length][ctx.view], all_v[:, :, :length][ctx.view]    # (B, Hkv, L, Dh)
        y = attend(q, k, v, ctx.mask)                                                    # (B, Hq, Q, Dh)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from q (B, Hq, T, Dh) to k, v (B, Hkv, L, Dh); mask (B, 1, T, L), or None for causal with L = T."""
    B, Hq, T, Dh = q.shape
    groups = Hq // k.size(1)
    if mask is None:
        # by hand: with enable_gqa=True CUDA has no memory-efficient kernel for float32 and would build (T, T) scores
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)    # (B, Hq, T, Dh)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Query heads that share a key head become more queries of that head: the cache is read in place, never repeated.
    q = q.reshape(B, -1, groups * T, Dh)                                                 # (B, Hkv, groups * T, Dh)
    mask = mask if T == 1 else mask.repeat(1, 1, groups, 1)                              # (B, 1, groups * T, L)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, Hq, T, Dh)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: Qwen3Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = pick(x, ctx.places) + self.self_attn(self.input_layernorm(x), ctx)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, final norm: what the checkpoint calls `model`."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """A Qwen3 causal language model; `Qwen3(config)` is randomly initialised, `Qwen3.from_pretrained` is loaded."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False      # recompute each layer in backward: activations of one layer at a time
        self.model = Decoder(config)
        tied = config.tie_word_embeddings        # a tied head has no weight of its own, here as in the checkpoint
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if not (weight.is_meta or name.endswith("norm.weight")):  # from_pretrained fills a meta model
                nn.init.normal_(weight, std=0.02)

    def forward(self, ids: Tensor, positions: Tensor | None = None, cache: KVCache | None = None,
                rows: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V); the arguments are those of `hidden`."""
        return self.head(self.hidden(ids, positions, cache, rows, segments))

    def head(self, hidden: Tensor) -> Tensor:
        """Project hidden states (..., D) to logits (..., V)."""
        return F.linear(hidden, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)

    def hidden(self, ids: Tensor, positions: Tensor | None = None, cache: KVCache | None = None,
               rows: Tensor | None = None, segments: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """Return the states after the final norm, (B, T, D), for ids (B, T).

        positions: (B, T) rotary positions; 0..T-1 when not given.
        segments: (B, T); several sequences packed in a row. A run of equal numbers is one sequence: it sees only itself
            and its positions start at 0.
        cache, rows: batch row b reads and writes cache row rows[b] (all different; 0..B-1 when not given): K and V of
            the T tokens are stored at positions[b], then the query at position p sees the entries 0..p. Consecutive
            rows are read in place, any other choice copies them.
        wanted: (B, T) bool; return only these states, (M, D) in the order of x[wanted]. The last layer then computes
            keys and values everywhere and all else only there.

        Right padding needs no mask. Without a cache attention is causal, so no token sees the padding after it; with a
        cache the padding's entries lie beyond the row's true length, where the next tokens overwrite them before any
        query reaches that far. What comes out at padding positions means nothing.
        """
        assert ids.dim() == 2, f"ids must be (B, T), got {tuple(ids.shape)}"
        ctx = self._context(ids, positions, cache, rows, segments)
        x = self.model.embed_tokens(ids)                                                 # (B, T, D)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.model.layers:
            if wanted is not None and layer is self.model.layers[-1]:
                ctx = ctx.last(wanted)
            # use_reentrant=False: the reentrant kind gives no gradient at all when its input needs none, which is the
            # case here whenever the embedding is frozen (LoRA)
            x = checkpoint(layer, x, ctx, use_reentrant=False) if recompute else layer(x, ctx)
        return self.model.norm(x if wanted is None else x[wanted.gather(1, ctx.places)])

    def _context(self, ids: Tensor, positions: Tensor | None, cache: KVCache | None, rows: Tensor | None,
                 segments: Tensor | None) -> Context:
        (B, T), device = ids.shape, ids.device
        index = torch.arange(T, device=device).expand(B, T)
        mask = at = view = None
        if segments is not None:
            assert cache is None, "packed segments and a KV cache cannot be combined"
            new = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)         # (B, T) first token of a run
            start = torch.where(new, index, 0).cummax(dim=1).values                      # (B, T) where its run began
            mask = (start[:, :, None] == start[:, None, :]).tril()[:, None]              # (B, 1, T, T)
            index = index - start
        positions = index if positions is None else positions
        assert positions.shape == ids.shape, f"positions {tuple(positions.shape)} for ids {tuple(ids.shape)}"
        if cache is not None:
            assert not torch.is_grad_enabled(), "a KV cache is for inference: use it under torch.no_grad()"
            length = int(positions.max()) + 1
            assert length <= cache.capacity, f"position {length - 1} in a KV cache of {cache.capacity} entries"
            first = 0 if rows is None else int(rows[0])
            run = torch.arange(first, first + B, device=device)
            view = slice(first, first + B) if rows is None or torch.equal(rows, run) else rows
            at = ((run if rows is None else rows)[:, None], slice(None), positions)
            if not torch.equal(positions, index):        # else a prefill from position 0: plain causal attention
                mask = (torch.arange(length, device=device) <= positions[:, :, None])[:, None]     # (B, 1, T, L)
        angles = rotary_angles(positions, self.config, self.model.norm.weight.dtype)
        return Context(angles, angles, mask, cache, at, view)

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32) -> "Qwen3":
        """Load a Hugging Face directory (config.json; model.safetensors, or shards with their index), in eval mode.

        Tensors are read, converted and moved one by one: the peak is the model plus one tensor. ValueError names
        missing, unknown and mis-shaped tensors; FileNotFoundError a missing file.
        """
        with torch.device("meta"):
            model = cls(Qwen3Config.from_json(directory))
        shapes = {name: weight.shape for name, weight in model.named_parameters()}
        missing, spare_head = set(shapes), None
        for path, name, tensor in read_tensors(Path(directory)):
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                spare_head = tensor              # Qwen3-0.6B as published stores its tied matrix twice
            elif name not in missing:
                problem = "appears twice" if name in shapes else "is unknown; is this a plain Qwen3 checkpoint?"
                raise ValueError(f"{path}: tensor {name} {problem}")
            elif tensor.shape != shapes[name] or not tensor.is_floating_point():
                raise ValueError(f"{path}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, config.json asks for "
                                 f"floats of shape {tuple(shapes[name])}")
            else:
                missing.remove(name)
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device=device, dtype=dtype)))
            del tensor                           # or it would be kept while the next one is read
            embedding = model.model.embed_tokens.weight
            if spare_head is not None and not embedding.is_meta:
                if not torch.equal(spare_head.to(embedding), embedding):
                    raise ValueError(f"{path}: config.json ties lm_head to the embedding, but lm_head.weight is different")
                spare_head = None
        if missing:
            raise ValueError(f"{directory}: {len(missing)} tensors are missing: {', '.join(sorted(missing)[:5])}")
        return model.eval()

    def save_pretrained(self, directory: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write config.json and the weights in Hugging Face names; each file is a temporary one, then renamed."""
        with torch.device("meta"):
            expected = {name for name, _ in Qwen3(self.config).named_parameters()}
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self.named_parameters()}
        if odd := sorted(weights.keys() ^ expected):
            raise ValueError(f"not a plain Qwen3 (merge LoRA before saving): {len(odd)} odd tensors, as {odd[0]}")
        config = self.config.to_dict() | {"torch_dtype": str(self.model.norm.weight.dtype).removeprefix("torch.")}
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory, weights, shard_bytes)
        with replacing(directory / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
