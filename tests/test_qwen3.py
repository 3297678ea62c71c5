"""qwen3.py against transformers' Qwen3 on tiny random models, and against itself (cache, padding, packing, disk)."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peak_memory import checkpoint, loading_peak
from safetensors.torch import load_file, save_file

import qwen3
import shards
from qwen3 import KVCache, Qwen3, Qwen3Config

V = 131


def tiny(**changes: Any) -> Qwen3Config:
    base = Qwen3Config(vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rope_theta=5e4)
    return dataclasses.replace(base, **changes)


def random_model(config: Qwen3Config, seed: int = 0) -> Qwen3:
    """A model in which every weight matters: norm scales far from 1, weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    model = Qwen3(config)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        else:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def transformers_twin(model: Qwen3) -> transformers.Qwen3ForCausalLM:
    twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**model.config.to_dict())).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    twin.tie_weights()
    for weight in twin.parameters():        # not twin.to(dtype): that rounds the rotary frequencies, a buffer, as well
        weight.data = weight.data.to(model.model.norm.weight.dtype)
    return twin


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# ---------- parity

@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("head_dim", "rope_theta"), [(12, 5e4), (20, 1e6)])    # 4 * 12 = 48 is hidden_size, 4 * 20 is not
def test_logits_equal_transformers(kv_heads: int, tied: bool, head_dim: int, rope_theta: float) -> None:
    model = random_model(tiny(num_key_value_heads=kv_heads, tie_word_embeddings=tied, head_dim=head_dim,
                              rope_theta=rope_theta))
    twin = transformers_twin(model)
    for length in (1, 2, 33, 300):
        ids = random_ids(2, length)
        expected = twin(ids).logits
        assert expected.std() > 0.5
        assert (model(ids) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_logits_equal_transformers(kv_heads: int, tied: bool) -> None:
    model = random_model(tiny(num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=1e6)).bfloat16()
    twin = transformers_twin(model)
    for length in (1, 33, 300):
        ids = random_ids(2, length)
        ours, expected = model(ids).float(), twin(ids).logits.float()
        assert (ours - expected).abs().max() <= 0.02 * expected.abs().max()


def test_gradients_equal_transformers() -> None:
    model = random_model(tiny(tie_word_embeddings=True))
    twin, ids = transformers_twin(model), random_ids(2, 20)
    with torch.enable_grad():
        for network, logits in ((model, model(ids)), (twin, twin(ids).logits)):
            network.zero_grad()
            logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).mean().backward()
    expected = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


def test_given_positions_turn_as_in_transformers() -> None:
    model = random_model(tiny())
    ids, positions = random_ids(2, 9), torch.tensor([[0, 1, 2, 50, 51, 90, 91, 92, 200], list(range(300, 309))])
    expected = transformers_twin(model)(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model(ids, positions), expected, rtol=1e-5, atol=2e-5)


def test_head_of_hidden_is_forward() -> None:
    for tied in (True, False):
        model, ids = random_model(tiny(tie_word_embeddings=tied)), random_ids(2, 5)
        hidden = model.hidden(ids)                                      # (2, 5, 48)
        assert torch.equal(model.head(hidden), model(ids))
        torch.testing.assert_close(model.head(hidden[1, 3]), model(ids)[1, 3])


@pytest.mark.parametrize(("sizes", "count"), [                  # V, D, MLP, layers, Hq, Hkv, Dh of the published files
    ((151936, 1024, 3072, 28, 16, 8, 128, True), 596_049_920),      # Qwen3-0.6B
    ((151936, 2048, 6144, 28, 16, 8, 128, True), 1_720_574_976),    # Qwen3-1.7B
    ((151936, 2560, 9728, 36, 32, 8, 128, True), 4_022_468_096),    # Qwen3-4B
    ((151936, 4096, 12288, 36, 32, 8, 128, False), 8_190_735_360),  # Qwen3-8B
    ((151936, 5120, 17408, 40, 40, 8, 128, False), 14_768_307_200),  # Qwen3-14B
    ((151936, 5120, 25600, 64, 64, 8, 128, False), 32_762_123_264),  # Qwen3-32B
])
def test_published_parameter_counts(sizes: tuple, count: int) -> None:
    config = Qwen3Config(*sizes[:7], tie_word_embeddings=sizes[7])
    with torch.device("meta"):
        model = Qwen3(config)
        twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config.to_dict()))
    assert sum(weight.numel() for weight in model.parameters()) == count
    assert sum(weight.numel() for weight in twin.parameters()) == count


# ---------- only the states that are wanted

@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_wanted_states_and_their_gradients_are_those_of_the_full_pass(packed: bool, checkpointing: bool) -> None:
    model, ids = random_model(tiny()), random_ids(4, 23)
    model.gradient_checkpointing = checkpointing
    wanted = torch.rand(4, 23, generator=torch.Generator().manual_seed(2)) < 0.3
    wanted[1], wanted[2] = False, True                          # a row without any, and one with all
    segments = (torch.arange(23) // 9).expand(4, 23) if packed else None
    weight, gradients = torch.randn(48, generator=torch.Generator().manual_seed(3)), []
    with torch.enable_grad():
        full = model.hidden(ids, segments=segments)[wanted]     # (M, 48)
        some = model.hidden(ids, segments=segments, wanted=wanted)
        for states in (full, some):
            model.zero_grad()
            (states @ weight).sum().backward()
            gradients.append({name: w.grad for name, w in model.named_parameters()})
    torch.testing.assert_close(some, full, rtol=1e-5, atol=1e-5)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-4, msg=name)


def test_the_last_layer_works_only_where_states_are_wanted() -> None:
    """The reason for `wanted`: 3 of 2 * 40 positions go through the last MLP, padded to the 2 of the fuller row."""
    model, seen = random_model(tiny()), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape[:2])))
    wanted = torch.zeros(2, 40, dtype=torch.bool)
    wanted[0, [5, 39]] = wanted[1, 7] = True
    assert model.hidden(random_ids(2, 40), wanted=wanted).shape == (3, 48)
    assert seen == [(2, 40), (2, 40), (2, 2)]


def test_a_prefill_that_wants_no_state_fills_the_cache_all_the_same() -> None:
    model, ids, caches = random_model(tiny()), random_ids(2, 12), []
    for wanted in (None, torch.zeros(2, 5, dtype=torch.bool)):
        caches.append(KVCache(model.config, rows=2, capacity=16))
        model.hidden(ids[:, :7], cache=caches[-1])
        states = model.hidden(ids[:, 7:], torch.arange(7, 12).expand(2, 5), caches[-1], wanted=wanted)
    assert states.shape == (0, 48)
    assert torch.equal(caches[0].k, caches[1].k)
    assert torch.equal(caches[0].v, caches[1].v)


# ---------- padding and packing

def test_right_padding_needs_no_mask() -> None:
    model = random_model(tiny())
    twin, lengths, ids = transformers_twin(model), [1, 7, 30, 12], random_ids(4, 30)
    keep = torch.arange(30) < torch.tensor(lengths)[:, None]
    ours, expected = model(ids), twin(ids, attention_mask=keep.long()).logits
    torch.testing.assert_close(ours[keep], expected[keep], rtol=1e-5, atol=1e-5)
    for row, length in enumerate(lengths):
        alone = model(ids[row:row + 1, :length])[0]
        torch.testing.assert_close(ours[row, :length], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_segments_equal_each_sequence_alone_in_transformers(kv_heads: int) -> None:
    model, ids = random_model(tiny(num_key_value_heads=kv_heads)), random_ids(2, 40)
    twin = transformers_twin(model)
    runs = [[(0, 12), (12, 13), (13, 40)], [(0, 1), (1, 25), (25, 40)]]
    numbers = [[4, 0, 7], [3, 0, 3]]                    # the second row's 3 comes back: runs count, not numbers
    segments = torch.tensor([[n for n, (begin, end) in zip(ns, spans, strict=True) for _ in range(begin, end)]
                             for ns, spans in zip(numbers, runs, strict=True)])
    logits = model(ids, segments=segments)
    for row, spans in enumerate(runs):
        for begin, end in spans:
            alone = twin(ids[row:row + 1, begin:end]).logits[0]
            torch.testing.assert_close(logits[row, begin:end], alone, rtol=1e-5, atol=1e-5)


def test_positions_restart_in_every_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, angles = [], qwen3.rotary_angles      # watched, because rotary attention itself is blind to a common shift
    monkeypatch.setattr(qwen3, "rotary_angles", lambda positions, *rest: seen.append(positions) or angles(positions, *rest))
    random_model(tiny())(random_ids(1, 6), segments=torch.tensor([[5, 5, 5, 2, 2, 5]]))
    assert seen[0].tolist() == [[0, 1, 2, 0, 1, 0]]


# ---------- KV cache

@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", [None, [2, 3, 4], [4, 0, 2]])          # in place from 0, in place from 2, copied
def test_cached_chunks_equal_full_computation(kv_heads: int, rows: list[int] | None) -> None:
    config = tiny(num_key_value_heads=kv_heads)
    model, ids, cache = random_model(config), random_ids(3, 60), KVCache(config, rows=5, capacity=60)
    cache.k.fill_(9.0), cache.v.fill_(9.0)                              # what earlier users of the rows left behind
    index = None if rows is None else torch.tensor(rows)
    pieces = []
    for begin, end in ((0, 11), (11, 12), (12, 13), (13, 40), (40, 60)):
        positions = torch.arange(begin, end).expand(3, -1)
        pieces.append(model(ids[:, begin:end], positions, cache=cache, rows=index))
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-5, atol=1e-5)


def test_ragged_rows_prefill_decode_and_are_reused_in_one_batch() -> None:
    config = tiny()
    model, cache = random_model(config), KVCache(config, rows=4, capacity=80)
    full = random_ids(3, 40)
    for first_length in ([5, 17, 2], [1, 3, 20]):                       # the second time rows hold an older sequence
        lengths, rows = torch.tensor(first_length), torch.tensor([3, 1, 0])
        for width in (20, 1, 1, 9, 1):
            real = torch.full((3,), width) if width < 20 else lengths   # the prefill is right-padded, later steps full
            at = torch.zeros(3, dtype=torch.long) if width == 20 else lengths
            positions = at[:, None] + torch.arange(width)
            logits = model(full.gather(1, positions.clamp(max=39)), positions, cache, rows)
            for b in range(3):
                begin, end = int(at[b]), int(at[b] + real[b])
                expected = model(full[b:b + 1, :end])[0, begin:]
                torch.testing.assert_close(logits[b, :end - begin], expected, rtol=1e-5, atol=2e-5)
            lengths = at + real


def test_a_query_sees_exactly_the_entries_up_to_its_position() -> None:
    config = tiny()
    model, ids, cache = random_model(config), random_ids(1, 12), KVCache(config, rows=1, capacity=12)
    model(ids, cache=cache)
    step = (ids[:, 8:9], torch.tensor([[8]]))
    expected = model(*step, cache=cache)
    cache.k[..., 9:, :] += 5.0                                          # later entries: invisible
    assert torch.equal(model(*step, cache=cache), expected)
    cache.v[..., 7, :] += 5.0                                           # an earlier one: visible
    assert not torch.allclose(model(*step, cache=cache), expected, atol=1e-2)


def test_a_fresh_cache_holds_zeros_because_masked_nan_would_spread() -> None:
    cache = KVCache(tiny(), rows=2, capacity=3)
    assert cache.k.shape == cache.v.shape == (3, 2, 2, 3, 16)
    assert not torch.cat((cache.k, cache.v)).any()


def test_cache_misuse_is_an_assertion() -> None:
    config = tiny()
    model, cache = random_model(config), KVCache(config, rows=2, capacity=8)
    with pytest.raises(AssertionError, match="position 8 in a KV cache of 8"):
        model(random_ids(2, 9), cache=cache)
    with pytest.raises(AssertionError, match="cannot be combined"):
        model(random_ids(2, 4), cache=cache, segments=torch.zeros(2, 4))
    with torch.enable_grad(), pytest.raises(AssertionError, match="no_grad"):
        model(random_ids(2, 4), cache=cache)


def test_gradient_checkpointing_changes_no_gradient_when_embeddings_are_frozen() -> None:
    model, ids = random_model(tiny()), random_ids(2, 9)
    model.model.embed_tokens.requires_grad_(False)
    gradients = []
    with torch.enable_grad():
        for model.gradient_checkpointing in (False, True):
            model.zero_grad()
            model(ids).square().mean().backward()
            gradients.append({n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad})
    assert len(gradients[0]) == 3 * 11 + 2                              # every weight but the embedding
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# ---------- disk

@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_save(tmp_path: Path, tied: bool) -> None:
    model, ids = random_model(tiny(tie_word_embeddings=tied, eos_token_id=7)), random_ids(2, 20)
    model.save_pretrained(tmp_path / "new" / "model")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model", dtype=torch.float32)
    assert (twin.config.eos_token_id, twin.config.tie_word_embeddings) == (7, tied)
    torch.testing.assert_close(model(ids), twin(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_we_load_what_transformers_saves(tmp_path: Path, tied: bool, shard: str) -> None:
    model = random_model(tiny(tie_word_embeddings=tied))
    transformers_twin(model).save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard == "20KB")
    loaded = Qwen3.from_pretrained(tmp_path)
    assert (loaded.config, loaded.training) == (model.config, False)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_round_trip_keeps_every_bit_in_bfloat16(tmp_path: Path) -> None:
    model = random_model(tiny()).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = Qwen3.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert {w.dtype for w in Qwen3.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_a_tied_matrix_stored_twice_is_accepted_only_if_both_agree(tmp_path: Path) -> None:
    model = random_model(tiny(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(Qwen3.from_pretrained(tmp_path)(random_ids(1, 4)), model(random_ids(1, 4)))
    weights["lm_head.weight"][3, 4] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ties lm_head to the embedding, but lm_head.weight is different"):
        Qwen3.from_pretrained(tmp_path)


def broken(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = "model.layers.1.self_attn.k_norm.weight"
    if how == "missing":
        del weights[name]
    elif how == "unknown":
        weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)
    elif how == "shape":
        weights[name] = torch.zeros(17)
    else:
        weights[name] = torch.zeros(16).to(torch.int8 if how == "integers" else torch.float8_e4m3fn)
    return weights


@pytest.mark.parametrize(("how", "message"), [
    ("missing", r"1 tensors are missing: model.layers.1.self_attn.k_norm.weight"),
    ("unknown", r"tensor model.layers.1.self_attn.q_proj.bias is unknown"),
    ("shape", r"k_norm.weight is torch.float32 \(17,\), config.json asks for floats of shape \(16,\)"),
    ("integers", r"k_norm.weight is torch.int8 \(16,\), config.json asks for floats"),
    ("float8", r"k_norm.weight has dtype F8_E4M3, which is not implemented"),
])
def test_wrong_tensors_are_named(tmp_path: Path, how: str, message: str) -> None:
    random_model(tiny()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(broken(load_file(path), how), path)
    with pytest.raises(ValueError, match=message):
        Qwen3.from_pretrained(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    transformers_twin(random_model(tiny())).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(shards[0]) | load_file(shards[1]), shards[1])
    with pytest.raises(ValueError, match="appears twice"):
        Qwen3.from_pretrained(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model configuration at .*config\.json"):
        Qwen3.from_pretrained(tmp_path)
    model = random_model(tiny())
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        Qwen3.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"missing weight file .*model\.safetensors"):
        Qwen3.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"missing weight file .*model-1\.safetensors"):
        Qwen3.from_pretrained(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not a safetensors index"):
        Qwen3.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_the_previous_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(tiny()).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half_written(weights: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(shards, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        random_model(tiny(), seed=5).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_loading_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """The peak of a process of its own, mapped pages included; 80 MB of it are what the first call of torch brings in."""
    checkpoint(tmp_path, Qwen3Config(10_000, 512, 2048, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=4,
                                     head_dim=128), shards=2)
    weights, peak = loading_peak(tmp_path, "bfloat16")
    assert weights > 100e6
    assert peak < 1.1 * weights + 80e6


def test_loaded_weights_lie_where_a_killed_run_and_a_whole_one_round_alike(tmp_path: Path) -> None:
    """Matrix products may sum in another order in memory that is aligned otherwise."""
    random_model(tiny()).save_pretrained(tmp_path)
    assert {weight.data_ptr() % 64 for weight in Qwen3.from_pretrained(tmp_path).parameters()} == {0}


def test_a_large_model_is_saved_in_shards_that_transformers_loads(tmp_path: Path) -> None:
    model, ids = random_model(tiny()), random_ids(2, 20)
    model.save_pretrained(tmp_path, shard_bytes=40_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert [path.name for path in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert all(path.stat().st_size < 40_000 + 4_000 for path in files)          # a header each
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in model.parameters())
    assert {name: tmp_path / place for name, place in index["weight_map"].items()} == {
        name: path for path in files for name in load_file(path)}
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (model(ids) - twin(ids).logits).abs().max() <= 1e-5
    assert torch.equal(Qwen3.from_pretrained(tmp_path)(ids), model(ids))


def test_shards_are_not_mixed_with_weights_that_are_there(tmp_path: Path) -> None:
    random_model(tiny()).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds weights already \(model\.safetensors\)"):
        random_model(tiny(), seed=5).save_pretrained(tmp_path, shard_bytes=40_000)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---------- config.json

PUBLISHED = {                                                                   # Qwen3-0.6B's file, transformers 4 style
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_both_generations_of_config_read_the_same() -> None:
    config = Qwen3Config.from_dict(PUBLISHED)
    assert (config.rope_theta, config.head_dim, config.num_key_value_heads) == (1e6, 128, 8)
    assert (config.tie_word_embeddings, config.rms_norm_eps, config.eos_token_id) == (True, 1e-6, 151645)
    newer = {name: value for name, value in PUBLISHED.items() if name not in ("rope_theta", "rope_scaling")}
    newer |= {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "layer_types": ["full_attention"] * 28}
    assert Qwen3Config.from_dict(newer) == config
    assert Qwen3Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("change", "message"), [
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope type 'yarn'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"rope_theta is given twice .*500000.*1000000"),
    ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "factor = 4.0 of the rotary embedding"),
    ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 of the rotary"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"head_dim": 127}, "head_dim must be even"),
    ({"head_dim": None}, "head_dim must be a positive integer, got None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
    ({"num_key_value_heads": 5}, "num_key_value_heads must divide num_attention_heads, got 5 and 16"),
])
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | change))
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):
        Qwen3Config.from_json(tmp_path)


def test_every_field_that_transformers_knows_is_read_refused_or_without_effect() -> None:
    """A field of a later transformers lands in none of the three sets, and this test says so."""
    fields, common = (set(inspect.signature(kind).parameters)
                      for kind in (transformers.Qwen3Config, transformers.PreTrainedConfig))
    own = fields - common - {"kwargs"}
    read = {field.name for field in dataclasses.fields(Qwen3Config)} | {"rope_parameters", "layer_types"}
    without_effect = {"use_cache", "initializer_range", "pad_token_id", "sliding_window", "max_window_layers"}
    assert own - read - set(qwen3.IMPLEMENTED) == without_effect & own
    assert len(own) > 15


def test_a_config_without_a_size_or_without_an_object_is_refused(tmp_path: Path) -> None:
    required = {field.name for field in dataclasses.fields(Qwen3Config) if field.default is dataclasses.MISSING}
    for name in required:
        with pytest.raises(ValueError, match=f"missing {name}"):
            Qwen3Config.from_dict({key: value for key, value in PUBLISHED.items() if key != name})
    for text in ("[1]", "{", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            Qwen3Config.from_json(tmp_path)
