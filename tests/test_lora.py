"""lora.py against PEFT on a tiny random Qwen3: arithmetic, gradients, merging, files."""

import inspect
import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from forked import ROOT, Program
from safetensors.torch import load_file, save_file

import lora
from lora import LoRALinear, add_lora, disable_lora, load_adapter, lora_layers, lora_state_dict, save_adapter
from qwen3 import Qwen3, Qwen3Config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
V = 67
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_model(seed: int = 0) -> Qwen3:
    """A tiny model in which every weight matters: random norm scales, weights large enough."""
    torch.manual_seed(seed)
    model = Qwen3(Qwen3Config(V, 32, 48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
                              tie_word_embeddings=True))
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        else:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def lora_model(rank: int = 4, alpha: float = 12, seed: int = 0, **options: Any) -> Qwen3:
    """The same model with LoRA whose A and B are both random."""
    model = base_model()
    add_lora(model, rank, alpha, **options)
    randomise(model, seed)
    return model


def randomise(model: Qwen3, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lora.lora_parameters(model):
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


def peft_base(model: Qwen3) -> transformers.Qwen3ForCausalLM:
    """transformers' network with the base weights of ours."""
    twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**model.config.to_dict())).eval()
    weights = {name.replace(".base.", "."): weight for name, weight in model.state_dict().items() if ".lora_" not in name}
    assert twin.load_state_dict(weights, strict=False) == (["lm_head.weight"], [])
    twin.tie_weights()
    return twin.to(model.model.norm.weight.dtype)


def peft_twin(model: Qwen3, directory: Path) -> peft.PeftModel:
    """PEFT's model with the base of ours and the adapter that we write to `directory`."""
    return peft.PeftModel.from_pretrained(peft_base(model), str(save_adapter(model, directory)), is_trainable=True)


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, V, (3, 14), generator=torch.Generator().manual_seed(seed))


def loss(logits: torch.Tensor) -> torch.Tensor:
    return -logits.log_softmax(-1).gather(-1, ids().roll(-1, 1)[..., None]).mean()


@pytest.fixture(params=[0, 2**18], ids=["branch", "sum first"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large layer adds the branch to its output, a small one B A to its weight: everything must hold for both."""
    monkeypatch.setattr(lora, "SUM_FIRST", request.param)


# ---------- arithmetic

@pytest.mark.usefixtures("both_ways")
def test_a_new_adapter_changes_no_logit() -> None:
    model = base_model()
    before = model(ids())
    add_lora(model, 4, 8, targets=ALL)
    assert len(lora_layers(model)) == 2 * 7
    assert torch.equal(model(ids()), before)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj", "o_proj"), ALL, ("v_proj",)])
def test_logits_and_gradients_equal_pefts(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = lora_model(targets=targets)
    twin = peft_twin(model, tmp_path / "a")
    ours, theirs = model(ids()), twin(ids()).logits
    assert (ours - base_model()(ids())).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    loss(ours).backward()
    loss(theirs).backward()
    gradients = {n.replace(".default.weight", "").removeprefix(lora.PREFIX): w.grad
                 for n, w in twin.named_parameters() if w.requires_grad}
    own = {n: w.grad for n, w in model.named_parameters() if w.requires_grad}
    assert own.keys() == gradients.keys() == lora_state_dict(model).keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_lora_stays_float32_on_a_bfloat16_base_and_equals_peft(tmp_path: Path) -> None:
    model = base_model().bfloat16()
    add_lora(model, 4, 12)
    randomise(model, 0)
    assert {weight.dtype for weight in lora.lora_parameters(model)} == {torch.float32}
    ours, theirs = model(ids()), peft_twin(model, tmp_path / "a")(ids()).logits
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()
    loss(ours.float()).backward()
    assert all(weight.grad.dtype == torch.float32 and weight.grad.any() for weight in lora.lora_parameters(model))


@pytest.mark.usefixtures("both_ways")
def test_merge_equals_pefts(tmp_path: Path) -> None:
    model = lora_model(targets=ALL)
    twin, before = peft_twin(model, tmp_path / "a").merge_and_unload(), model(ids())
    lora.merge(model)
    assert not lora_layers(model)
    merged = model.state_dict()
    for name, weight in twin.state_dict().items():
        if name != "lm_head.weight":
            torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(ids()), before, rtol=1e-4, atol=1e-4)


def test_merge_rounds_a_bfloat16_weight_once() -> None:
    model = base_model().bfloat16()
    add_lora(model, 4, 12)
    randomise(model, 0)
    name = "model.layers.1.self_attn.k_proj"
    layer = lora_layers(model)[name]
    expected = (layer.base.weight.double() + 3 * layer.lora_B.double() @ layer.lora_A.double()).bfloat16()
    lora.merge(model)
    assert torch.equal(model.get_submodule(name).weight, expected)


@pytest.mark.usefixtures("both_ways")
def test_dropout_acts_on_the_input_of_the_lora_branch_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer, x = LoRALinear(torch.nn.Linear(8, 5), rank=2, alpha=4, dropout=0.5), torch.randn(6, 8)
    torch.nn.init.normal_(layer.lora_B)
    torch.manual_seed(3)
    out = layer.train()(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(out, layer.base(x) + 2 * dropped @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T)


def test_a_layer_sums_its_weights_first_only_if_it_is_small_and_nothing_is_dropped_or_rounded() -> None:
    calls = []
    for rows, dtype, dropout in ((512, torch.float32, 0.0), (513, torch.float32, 0.0), (512, torch.bfloat16, 0.0),
                                 (512, torch.float32, 0.5)):
        layer = LoRALinear(torch.nn.Linear(512, rows).to(dtype), rank=2, alpha=4, dropout=dropout).train()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "summed", lambda layer=layer: calls.append(layer.base.out_features) or layer.base.weight)
            layer(torch.ones(1, 512, dtype=dtype))
    assert calls == [512]                           # 512 * 512 = SUM_FIRST, float32, no dropout


@torch.no_grad()
def test_a_kept_sum_follows_every_way_to_change_the_weights() -> None:
    layer, x = LoRALinear(torch.nn.Linear(8, 5), rank=2, alpha=4), torch.randn(6, 8)
    changes = (lambda: setattr(layer, "lora_B", torch.nn.Parameter(torch.randn(5, 2))),
               lambda: layer.lora_B.add_(1.0), lambda: layer.lora_A.mul_(2.0), lambda: layer.base.weight.add_(0.5),
               lambda: layer.load_state_dict({"lora_A": torch.randn(2, 8)}, strict=False))
    for change in changes:
        before = layer(x)
        assert layer.summed() is layer.summed()     # kept: nothing is summed twice
        change()
        assert not torch.allclose(layer(x), before)
        torch.testing.assert_close(layer(x), layer.base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T)


def test_a_kept_sum_never_takes_part_in_training() -> None:
    layer, x, gradients = LoRALinear(torch.nn.Linear(8, 5), rank=2, alpha=4), torch.randn(6, 8), []
    with torch.no_grad():
        layer(x)                                    # now a sum is kept, without a graph
    for _ in range(2):                              # and one with a graph could be walked once only
        layer.zero_grad()
        layer(x).sum().backward()
        gradients.append(layer.lora_B.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_start_is_pefts_distribution_and_a_seed_repeats_it() -> None:
    first, second, other = (base_model() for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        add_lora(model, 64, 64, generator=torch.Generator().manual_seed(seed))
    a, b, c = (lora_state_dict(model)["model.layers.0.self_attn.q_proj.lora_A"] for model in (first, second, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    bound = 1 / math.sqrt(32)                       # kaiming uniform with a = sqrt(5): 1 / sqrt(fan in)
    assert 0.99 * bound < a.abs().max() <= bound
    assert abs(a.std() - bound / math.sqrt(3)) < 0.02 * bound


# ---------- training

@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_moves_every_b_and_nothing_frozen(checkpointing: bool) -> None:
    model = base_model().train()
    add_lora(model, 4, 8, targets=ALL)
    model.gradient_checkpointing = checkpointing
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.01, weight_decay=0.1)
    loss(model(ids())).backward()
    optimizer.step()
    for name, weight in model.state_dict().items():
        moved = not torch.equal(weight, before[name])
        assert moved == (".lora_" in name), name    # A moves too: not by its gradient, B is 0, but by weight decay


def test_only_lora_is_trainable() -> None:
    model = lora_model()
    trainable = {id(weight) for weight in model.parameters() if weight.requires_grad}
    assert trainable == {id(weight) for weight in lora.lora_parameters(model)}
    assert len(trainable) == 2 * 4 * 2              # layers * targets * (A, B)
    model.requires_grad_(True)
    lora.mark_only_lora_as_trainable(model)
    assert {id(weight) for weight in model.parameters() if weight.requires_grad} == trainable


@pytest.mark.usefixtures("both_ways")
def test_lora_state_dict_goes_back_into_another_model() -> None:
    first, second = lora_model(seed=1), lora_model(seed=2)
    _, unexpected = second.load_state_dict(lora_state_dict(first), strict=False)
    assert not unexpected
    assert torch.equal(first(ids()), second(ids()))


# ---------- switching off

@pytest.mark.usefixtures("both_ways")
def test_disable_lora_is_the_exact_base_nests_and_survives_exceptions() -> None:
    model, base = lora_model(), base_model()(ids())
    tuned = model(ids())
    assert not torch.allclose(tuned, base, atol=0.1)
    with disable_lora(model):
        assert torch.equal(model(ids()), base)
        with disable_lora(model):
            assert torch.equal(model(ids()), base)
        assert torch.equal(model(ids()), base)
    with pytest.raises(IndexError), disable_lora(model):            # an id outside the vocabulary
        model(ids() + V)
    assert torch.equal(model(ids()), tuned)


@pytest.mark.usefixtures("both_ways")
def test_disable_lora_leaves_other_models_and_other_threads_alone() -> None:
    model, other, seen = lora_model(seed=1), lora_model(seed=2), []
    tuned, other_tuned = model(ids()), other(ids())
    with disable_lora(model):
        assert torch.equal(other(ids()), other_tuned)
        thread = threading.Thread(target=lambda: seen.append(model(ids()).detach()))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], tuned)


# ---------- files

def test_peft_reads_our_adapter_bit_for_bit(tmp_path: Path) -> None:
    model = lora_model(rank=3, alpha=5, dropout=0.25, targets=ALL)
    twin = peft_twin(model, tmp_path / "a")
    config = twin.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 5, 0.25, "none")
    assert set(config.target_modules) == set(ALL)
    theirs = peft.get_peft_model_state_dict(twin)
    ours = lora_state_dict(model)
    assert {f"{lora.PREFIX}{name}.weight" for name in ours} == theirs.keys()
    assert all(torch.equal(theirs[f"{lora.PREFIX}{name}.weight"], weight) for name, weight in ours.items())


def peft_adapter(directory: Path, **options: Any) -> peft.PeftModel:
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    twin = peft.get_peft_model(peft_base(base_model()), peft.LoraConfig(**config)).eval()
    for name, weight in twin.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    twin.save_pretrained(directory)
    return twin


def test_we_read_pefts_adapter_bit_for_bit(tmp_path: Path) -> None:
    twin, model = peft_adapter(tmp_path, lora_dropout=0.1), base_model()
    load_adapter(model, tmp_path)                   # adds the layers, in the model's mode: eval, no dropout
    for name, weight in peft.get_peft_model_state_dict(twin).items():
        assert torch.equal(lora_state_dict(model)[name.removeprefix(lora.PREFIX).removesuffix(".weight")], weight)
    layer = lora_layers(model)["model.layers.1.mlp.down_proj"]
    assert (layer.rank, layer.alpha, layer.dropout) == (3, 6, 0.1)
    torch.testing.assert_close(model(ids()), twin(ids()).logits, rtol=1e-5, atol=1e-5)
    load_adapter(model, tmp_path)                   # finds them


def test_an_adapter_on_some_layers_only_comes_back(tmp_path: Path) -> None:
    model = lora_model(targets=("layers.1.self_attn.q_proj",))
    assert list(lora_layers(model)) == ["model.layers.1.self_attn.q_proj"]
    twin, again = peft_twin(model, tmp_path / "a"), base_model()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(ids()), model(ids()))
    torch.testing.assert_close(twin(ids()).logits, model(ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"use_dora": True}, "use_dora = True"),
    ({"use_rslora": True}, "use_rslora = True"),
    ({"bias": "all"}, "bias = 'all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"layers_to_transform": [1]}, "layers_to_transform"),
    ({"target_modules": r".*q_proj"}, "target_modules a list of names"),
])
def test_what_peft_can_do_beyond_plain_lora_is_refused_by_name(tmp_path: Path, options: dict, message: str) -> None:
    peft_adapter(tmp_path, **options)
    model = base_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)


@pytest.mark.parametrize(("change", "message"), [
    ({"peft_type": "IA3"}, "peft_type must be 'LORA'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"r": 0}, "must be numbers"),
    ({"r": None}, "must be numbers"),
    ({"r": 5}, r"adapter has \(r, alpha\) \(5, 12\), the model \[\(4, 12\)\]"),
    ({"lora_alpha": 13}, r"adapter has \(r, alpha\) \(4, 13\)"),
    ({"target_modules": ["q_proj"]}, "target different layers, as model.layers.0.self_attn.k_proj"),
    ({"target_modules": ["c_attn"]}, "'c_attn' matches no linear layer"),
    ({"something_new": [1]}, r"something_new = \[1\] is not implemented"),
])
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    model = lora_model()
    path = save_adapter(model, tmp_path / "a") / lora.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "a")


def test_wrong_tensors_are_named_and_leave_the_model_unchanged(tmp_path: Path) -> None:
    model, path = lora_model(seed=1), save_adapter(lora_model(seed=2), tmp_path / "a") / lora.WEIGHTS
    before, good = model(ids()), load_file(path)
    last = f"{lora.PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"
    for change, message in (({last: None}, f"1 missing tensors: {last}"),
                            ({last: torch.zeros(24, 5)}, rf"{last} has shape \(24, 5\), the model needs \(24, 4\)"),
                            ({"model.norm.weight": torch.zeros(2)}, "1 unknown tensors: model.norm.weight")):
        save_file({name: weight for name, weight in (good | change).items() if weight is not None}, path)
        for target in (model, base_model()):
            with pytest.raises(ValueError, match=message):
                load_adapter(target, tmp_path / "a")
        assert torch.equal(model(ids()), before)
        assert not lora_layers(target)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="unreadable adapter"):
        load_adapter(model, tmp_path / "a")


def test_saving_replaces_an_adapter_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, place = lora_model(seed=1), lora_model(rank=2, seed=2), tmp_path / "a"
    save_adapter(old, place)

    def half_written(weights: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(lora, "save_file", half_written)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(new, place)
    load_adapter(old, place)
    save_adapter(new, place)
    load_adapter(new, place)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_saving_never_deletes_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds other files \(thesis.tex\)"):
        save_adapter(lora_model(), tmp_path)
    with pytest.raises(FileExistsError, match="is not a directory"):
        save_adapter(lora_model(), tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_add_lora_refuses_what_cannot_work() -> None:
    model = base_model()
    with pytest.raises(ValueError, match="'query' matches no linear layer"):
        add_lora(model, 4, 8, targets=("q_proj", "query"))
    for rank, dropout, targets in ((0, 0.0, ("q_proj",)), (4, 1.0, ("q_proj",)), (4, 0.0, ())):
        with pytest.raises(ValueError, match="LoRA needs rank >= 1"):
            add_lora(model, rank, 8, dropout, targets)
    assert not lora_layers(model)
    add_lora(model, 4, 8)
    with pytest.raises(ValueError, match="already has LoRA"):
        add_lora(model, 4, 8)


def test_a_model_with_lora_is_not_saved_as_a_plain_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="merge LoRA before saving"):
        lora_model().save_pretrained(tmp_path)


# ---------- python lora.py merge

def merge_arguments(place: Path, model: Qwen3, *more: str) -> list[str]:
    """The command for base and adapter of `model`, which are written to `place`; the result goes to place / "m"."""
    base_model().save_pretrained(place / "base")
    (place / "base" / "tokenizer.json").write_text("{}")
    save_adapter(model, place / "a")
    return ["merge", f"--model={place / 'base'}", f"--adapter={place / 'a'}", f"--out={place / 'm'}", *more]


def test_merge_command_writes_a_model_that_transformers_loads(tmp_path: Path) -> None:
    model = lora_model()
    arguments = merge_arguments(tmp_path, model)
    lora.main(arguments)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == FILES
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(merged(ids()).logits, model(ids()), rtol=1e-4, atol=1e-4)
    with pytest.raises(SystemExit, match="exists and holds other files"):
        lora.main(arguments)

    base_model().bfloat16().save_pretrained(tmp_path / "base")          # the dtype of the base is kept
    lora.merge_directory(tmp_path / "base", tmp_path / "a", tmp_path / "m16")
    assert {weight.dtype for weight in load_file(tmp_path / "m16" / "model.safetensors").values()} == {torch.bfloat16}


def greedy(logits: Callable[[torch.Tensor], torch.Tensor], n: int) -> list[list[int]]:
    tokens = ids()[:, :4]
    for _ in range(n):
        tokens = torch.cat((tokens, logits(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens[:, 4:].tolist()


@torch.no_grad()
def test_a_sharded_merge_says_in_transformers_what_base_and_adapter_say(tmp_path: Path) -> None:
    model = lora_model(targets=ALL)
    lora.main(merge_arguments(tmp_path, model, "--max-shard-gb=20e-6"))
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "m" / "model.safetensors").exists()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    said = merged.generate(ids()[:, :4], attention_mask=torch.ones(3, 4), max_new_tokens=24, do_sample=False)[:, 4:].tolist()
    assert said == greedy(model, 24) == greedy(Qwen3.from_pretrained(tmp_path / "m"), 24)
    with disable_lora(model):
        assert said != greedy(model, 24)


def test_merge_command_fails_with_one_clear_line_and_leaves_nothing(tmp_path: Path,
                                                                    tmp_path_factory: pytest.TempPathFactory) -> None:
    base_model().save_pretrained(tmp_path / "base")
    command = Program(ROOT / "lora.py", "merge", "--model", tmp_path / "base", "--adapter", tmp_path / "nowhere", "--out",
                      tmp_path / "m", place=tmp_path_factory.mktemp("said"))
    assert command.ended() == 1
    assert command.err.read_text().count("\n") == 1
    assert "nowhere is not a PEFT adapter directory: it has no adapter_config.json" in command.err.read_text()
    save_adapter(lora_model(), tmp_path / "a")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 49}))
    with pytest.raises(SystemExit, match=r"down_proj\.weight is torch\.float32 \(32, 48\)"):
        lora.main(["merge", f"--model={tmp_path / 'base'}", f"--adapter={tmp_path / 'a'}", f"--out={tmp_path / 'm'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


class Hub:
    """Stands in for the module huggingface_hub and its HfApi; notes what is asked of it."""

    def __init__(self, private: bool, fails: bool = False) -> None:
        self.private, self.fails, self.asked = private, fails, []

    def HfApi(self) -> "Hub":
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.asked.append(("create", repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
        if self.fails:
            raise RuntimeError("HTTP 403")
        self.asked.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


FILES = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(("public", "is_private"), [(False, True), (True, False), (True, True)])
def test_push_uploads_the_merged_model_to_a_private_repository_unless_asked(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, public: bool, is_private: bool) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub(is_private))
    lora.main([*merge_arguments(tmp_path, lora_model()), "--push=me/mine", *["--public"] * public])
    assert hub.asked == [("create", "me/mine", not public, True), ("upload", "me/mine", FILES)]
    assert capsys.readouterr().out.endswith("uploaded: https://hub/me/mine\n")


def test_a_public_repository_that_is_there_already_gets_nothing_without_public(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub(private=False))
    with pytest.raises(SystemExit, match=r"m is written but was not uploaded: .*me/mine exists and is public; give --public"):
        lora.main([*merge_arguments(tmp_path, lora_model()), "--push=me/mine"])
    assert [what for what, *_ in hub.asked] == ["create"]


def test_push_without_the_library_says_what_to_install_before_anything_is_merged(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match="--push needs huggingface_hub: pip install huggingface_hub"):
        lora.main([*merge_arguments(tmp_path, lora_model()), "--push=me/mine"])
    assert not (tmp_path / "m").exists()


def test_a_failed_upload_says_that_the_model_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(private=True, fails=True))
    with pytest.raises(SystemExit, match=r"m is written but was not uploaded: RuntimeError\('HTTP 403'\)"):
        lora.main([*merge_arguments(tmp_path, lora_model()), "--push=me/mine"])
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == FILES


def test_the_calls_of_push_are_those_of_the_real_library() -> None:
    """The stand-in above would accept names that huggingface_hub does not have."""
    api = pytest.importorskip("huggingface_hub").HfApi()
    inspect.signature(api.create_repo).bind("me/mine", private=True, exist_ok=True)
    inspect.signature(api.repo_info).bind("me/mine")
    inspect.signature(api.upload_folder).bind(repo_id="me/mine", folder_path=Path())


@pytest.mark.parametrize(("words", "message"), [(["--public"], "--public needs --push"),
                                                (["--max-shard-gb=0"], "--max-shard-gb must be above 0")])
def test_flags_of_merge_that_make_no_sense_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        lora.main(["merge", "--model=x", "--adapter=x", "--out=x", *words])
    assert message in capsys.readouterr().err
