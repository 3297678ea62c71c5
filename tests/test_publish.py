"""The card of a published model: what the run and its evaluation wrote, and nothing that belongs to the machine."""

import json
import sys
from pathlib import Path

import pytest
from test_lora import Hub, base_model, lora_model

import lora
import stats
import train
from publish import model_card

FLAGS = ["--preset", "paper", "--model", "/home/ann/models/Qwen3-8B", "--out", "/home/ann/runs/a",
         "--data", "/home/ann/secret project/tasks.jsonl", "mine.jsonl",
         "--executor-url", "http://10.0.0.7:8000", "--executor-model", "Qwen/Qwen3-8B",
         "--policy-url", "http://ann:pw@10.0.0.8", "--executor-key-env", "ANNS_KEY", "--executor-extra", '{"user": "ann"}',
         "--operator-file", "C:\\Users\\ann\\ops.py", "../ann/more.py", "--lr", "3e-5"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a run with FLAGS, as train.py leaves it."""
    place = tmp_path / "run" / "checkpoints" / "step_000300"
    lora.save_adapter(lora_model(), place)
    (place / "state.pt").write_bytes(b"the optimiser")
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(train.parse_args(FLAGS)).items()}
    (tmp_path / "run" / "args.json").write_text(json.dumps({"flags": flags, "commit": "c0ffee", "torch": "2.13.0"}))
    return place


def evaluated(place: Path, executor_url: str | None = None) -> Path:
    """The directory of an evaluation of two tasks, one of them solved, beside a baseline that solves none."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "calls": 2, "cached": 0}
    records = [{"method": method, "task_id": task, "run": 0, "source": "gsm8k", "kind": "math", "score": score, "em": score,
                "f1": score, "dropped": "", "parts": {"diversity": 1.0}, "turns": [], "operators": 3, "operator_types": 2,
                "usage": usage, "n_policy_tokens": 7, "seconds": 1.0, "dollars": None, "stop_reason": "finished",
                "workflow": "Plan", "judge": ""}
               for method, scores in (("policy", (1.0, 0.0)), ("fixed:Plan | x", (0.0, 0.0)))
               for task, score in zip("ab", scores, strict=True)]
    found = stats.results(records, ["policy", "fixed:Plan | x"], ["gsm8k"])
    place.mkdir()
    notes = ["policy /home/ann/models/Qwen3-8B, adapter /home/ann/runs/a", "contamination: 0 of 2"]
    (place / "eval.json").write_text(json.dumps({**found, "notes": notes, "flags": {"executor_url": str(executor_url)}}))
    return place


def test_a_card_has_the_base_the_flags_and_the_numbers(checkpoint: Path, tmp_path: Path) -> None:
    card = model_card(checkpoint, None, evaluated(tmp_path / "eval"))
    assert card.startswith('---\nlibrary_name: peft\nbase_model: "Qwen3-8B"\ntags: [flowsteer, lora]\n---\n')
    assert "Checkpoint `step_000300`, code c0ffee, torch 2.13.0" in card
    flags = " ".join(card.split("```")[1].split())
    for word in ("lora_rank=64", "lr=3e-05", "preset=paper", "data=tasks.jsonl,mine.jsonl", "executor_model=Qwen/Qwen3-8B",
                 "operator_file=ops.py,more.py", "no_mask=False"):
        assert word in flags.split(" ")
    assert "| this model | gsm8k | 2 | accuracy | 0.500 (0.000-1.000) | 1.00 |\n" in card
    assert "| fixed:Plan / x | all | 2 | accuracy | 0.000 (0.000-0.000) | 1.00 |\n" in card
    assert card.rstrip().split("\n\n")[-1].startswith("Contamination: 0 of 2.\nThe executor was a simulation")


def test_a_card_tells_nothing_of_the_machine(checkpoint: Path, tmp_path: Path) -> None:
    card = model_card(checkpoint, Path("/home/ann/models/Qwen3-8B"), evaluated(tmp_path / "eval", "http://10.0.0.7:8000"))
    for private in ("ann", "home", "secret", "10.0.0", "http:", "KEY", str(tmp_path)):
        assert private not in card
    assert "simulation" not in card


def test_an_adapter_of_unknown_origin_gets_a_card_that_says_so(tmp_path: Path) -> None:
    lora.save_adapter(lora_model(), tmp_path / "deep" / "er" / "adapter")
    card = model_card(tmp_path / "deep" / "er" / "adapter", Path("Qwen3-0.6B"), None)
    assert 'base_model: "Qwen3-0.6B"' in card
    assert "The run is not known" in card
    assert "It was not evaluated" in card


@pytest.mark.parametrize("text", ["[]", "{", '{"rows": [{"source": 3}]}'])
def test_an_evaluation_that_eval_py_did_not_write_is_refused(text: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ValueError, match=r"eval\.json is not what our programs write"):
        model_card(checkpoint, None, tmp_path)


def test_push_uploads_the_adapter_and_its_card_without_the_optimiser(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub(private=True))
    lora.main(["push", f"--adapter={checkpoint}", "--to=me/mine"])
    assert hub.asked[-1] == ("upload", "me/mine", ["README.md", "adapter_config.json", "adapter_model.safetensors"])


def test_merge_writes_the_card_beside_the_model(checkpoint: Path, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    lora.main(["merge", f"--model={tmp_path / 'base'}", f"--adapter={checkpoint}", f"--out={tmp_path / 'm'}",
               f"--eval={evaluated(tmp_path / 'eval')}"])
    card = (tmp_path / "m" / "README.md").read_text()
    assert "A merged model of base," in card
    assert "library_name: transformers" in card
    assert "| this model | gsm8k |" in card
