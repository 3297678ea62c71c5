"""What autograd keeps of a small model is what memory.py says; a server that shares our card sleeps while we need it."""

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVLLM, Settings

import memory
import train
from cwrpo import UpdateConfig, token_logprobs
from lora import add_lora, lora_layers, lora_parameters
from policy import ChatTokenizer
from qwen3 import Qwen3, Qwen3Config
from rundir import RunDir
from vllm_server import Server, ServerError

RANK, T = 8, 64
WIDTHS = {torch.bfloat16: 2, torch.float32: 4}


def small(layers: int, dtype: torch.dtype, targets: tuple[str, ...]) -> Qwen3:
    """As large layers are computed: base and LoRA apart."""
    config = Qwen3Config(vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=24)
    model = Qwen3(config).to(dtype).eval()
    add_lora(model, RANK, RANK, targets=targets)
    for layer in lora_layers(model).values():
        layer.sum_first = False
    return model


def kept_by_autograd(model: Qwen3) -> int:
    """Bytes of the tensors that a forward pass over T tokens leaves for backward, each storage once, parameters not."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.hidden(torch.zeros((1, T), dtype=torch.int64))
    assert states.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("targets", [memory.ALL_TARGETS, memory.ALL_TARGETS[:4], ("q_proj", "v_proj"), ("down_proj",)])
def test_a_layer_keeps_exactly_what_the_formula_says(dtype: torch.dtype, targets: tuple[str, ...]) -> None:
    """The third layer against two: what the first one lacks (its input needs no gradient) is in neither."""
    models = [small(layers, dtype, targets) for layers in (2, 3)]
    two, three = map(kept_by_autograd, models)
    assert three - two == T * memory.layer_activations(models[0].config, WIDTHS[dtype], RANK, targets)


def test_with_recomputation_a_layer_keeps_its_input_alone() -> None:
    def alive(layers: int) -> int:
        model = small(layers, torch.bfloat16, memory.ALL_TARGETS)
        model.gradient_checkpointing = True
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        states = model.hidden(torch.zeros((1, T), dtype=torch.int64))
        found = [value for value in gc.get_objects() if type(value) is torch.Tensor and value.shape == (1, T, 64)]
        assert states.requires_grad
        return len({value.untyped_storage().data_ptr() for value in found if value.dtype == torch.bfloat16} - own)

    assert alive(4) - alive(3) == 1


class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that all tensors of a number of elements, views apart, had at one time."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.now, self.most, self.seen = numel, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() == self.numel:
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen.add(storage)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, storage.nbytes())
        return made

    def gone(self, nbytes: int) -> None:
        self.now -= nbytes


@pytest.mark.parametrize("dtype", WIDTHS)
def test_logits_take_what_the_budget_says_forward_and_backward(dtype: torch.dtype) -> None:
    model = small(1, dtype, memory.ALL_TARGETS)
    ids, chunk = torch.zeros((1, 21), dtype=torch.int64), 10
    with Alive(chunk * model.config.vocab_size) as alive:
        token_logprobs(model, ids, torch.arange(21)[None] > 0, temperature=0.8, chunk=chunk)[0].sum().backward()
    assert alive.most == memory.budget(model.config, 1, width=WIDTHS[dtype], chunk=chunk)["logits"]
    assert memory.budget(model.config, 1)["logits"] == UpdateConfig().chunk * model.config.vocab_size * 10


def test_weights_and_lora_of_the_budget_are_those_of_the_model() -> None:
    model = small(3, torch.bfloat16, memory.ALL_TARGETS)
    parts = memory.budget(model.config, context=T, rank=RANK)
    assert parts["lora"] == sum(weight.nbytes for weight in lora_parameters(model))
    assert parts["weights"] + parts["lora"] == sum(weight.nbytes for weight in model.parameters())
    optimizer = torch.optim.AdamW(lora_parameters(model))
    model.hidden(torch.zeros((1, T), dtype=torch.int64)).float().sum().backward()
    optimizer.step()
    state = sum(value.nbytes for of_one in optimizer.state.values() for value in of_one.values() if value.dim())
    assert parts["optimizer"] == state


@pytest.mark.parametrize(("size", "billions"), [("0.6B", 0.596), ("4B", 4.022), ("8B", 8.191), ("32B", 32.762)])
def test_published_sizes_have_their_published_parameters(size: str, billions: float) -> None:
    assert memory.budget(memory.published(size), 1, width=1)["weights"] / 1e9 == pytest.approx(billions, abs=0.001)


# ---- one card in turns ------------------------------------------------------------------------------------------------


@pytest.fixture
def server(padded_model: Path) -> Iterator[FakeVLLM]:
    fake = FakeVLLM(Qwen3.from_pretrained(padded_model).eval(), ChatTokenizer(padded_model), Settings(max_model_len=1200))
    fake.start()
    yield fake
    fake.opened.set()
    fake.kill()


def test_the_server_sleeps_during_an_update_and_at_no_other_time(server: FakeVLLM, padded_model: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sleeps refuses to sample, so the run would end. A killed run has left it asleep: it is woken first."""
    server.asleep, update, states = True, train.update, []

    def watched(*args: object) -> dict:
        states.append(server.asleep)
        return update(*args)

    monkeypatch.setattr(train, "update", watched)
    monkeypatch.setattr(sys, "argv", list(map(str, [
        "train.py", "--model", padded_model, "--policy-url", server.url, "--colocate", "--out", tmp_path / "run", "--steps", 2,
        "--tasks-per-source", 1, "--rollouts-per-task", 2, "--eval-tasks", 1, "--max-turns", 2, "--no-baselines", "--max-context",
        1200, "--lora-rank", 4, "--max-new-tokens", 16])))
    train.main()
    assert states == [True, True]
    assert not server.asleep
    assert [row["dropped"] for row in RunDir(tmp_path / "run").read("metrics.jsonl")] == [0, 0]


def test_the_server_wakes_when_an_update_fails(server: FakeVLLM) -> None:
    with pytest.raises(FloatingPointError), memory.server_asleep(Server(server.url, 5)):
        raise FloatingPointError
    assert not server.asleep


def test_a_server_that_cannot_sleep_is_told_how(server: FakeVLLM) -> None:
    server.settings.sleep_mode = False
    with pytest.raises(ServerError, match="--enable-sleep-mode"), memory.server_asleep(Server(server.url, 5)):
        raise AssertionError("must not begin")


@pytest.mark.parametrize("words", [[], ["--policy-url", "http://a", "http://b"],
                                   ["--policy-url", "http://a", "--async-depth", "1"]])
def test_one_card_is_refused_where_it_cannot_work(words: list[str]) -> None:
    with pytest.raises(train.UsageError, match="--colocate is one card in turns"):
        train.check_flags(train.parse_args(["--colocate", *words]))
