"""Text and files from strangers: no reader may take more than a moment over 100 kB made to hurt it, or leave its directory."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import canvas
import edits
import graph
import lora
import mathgrade
import operators
import rewards
import sandbox
import shards
import tasks
from rundir import RunDir, RunError

SIZE = 100_000
# What regular expressions and hand-written parsers stumble over: long runs, openings that never close, near-matches.
UNITS = [
    "a", " ", "\n", "\t", "0", "9", "1,", "1 ", "<", "</", "<action>", "</action>", "<action>add", "<think>", "</think>",
    "```", "```\n", "``` \n", "`", "\\boxed{", "\\frac{", "\\frac{1}{", "{", "}", "{}", "(", ")", "[", "((", "$", "$ ",
    "$a", "\\$", "\\(", "\\[", "####", "# ", "answer is ", "answer", "answer:", " is", "a the ", "sqrt(", "sqrt (", "-",
    "- ", "->", "-> ", ">>> ", ">>> f(", "* ", ".", "..", ",", ":", "|", "n1:", "n1.1:", "A, ", "A -> ", "(A ? ", "[A, ",
    "\\text{", "\\text {", "a ", "aa ", "1 aa", "^\\circ", "°", "\\circ", "\\left", "%", "\x00", "\ud800", "é", "İ",
    "\u2028", "&", "1e9", "*", "\\", "_", '"', "'", "=", "x =",
]
READERS: dict[str, Callable[[str], object]] = {
    "parse_edit": edits.parse_edit,
    "strip_tags": edits.strip_tags,
    "an edit's prompt": lambda text: edits.parse_edit(f"<action>add</action><operator>Custom</operator><prompt>{text}</prompt>"),
    "a graph": lambda text: refusal(graph.Graph.from_text, text),
    "feedback": canvas._safe,
    "tag": lambda text: operators.tag(text, "answer"),
    "without_thinking": operators.without_thinking,
    "extract_code": operators.extract_code,
    "math_answer": mathgrade.math_answer,
    "number": lambda text: mathgrade.number(mathgrade.math_answer(text)),
    "to_latex": lambda text: mathgrade.to_latex(mathgrade.math_answer(text)),
    "the plain form of math": lambda text: mathgrade._plain(mathgrade.math_answer(text)),
    "choice_letter": rewards.choice_letter,
    "squad_normalise": rewards.squad_normalise,
    "trivia_normalise": rewards.trivia_normalise,
    "a docstring": lambda text: tasks.docstring_asserts(f"def f(x):\n    '''{text.replace(chr(39), '')}'''\n", "f"),
    "printed output": lambda text: sandbox._same_output(text, text + "1"),
}


def refusal(function: Callable[[str], object], text: str) -> str:
    """What a reader says when it refuses the text."""
    try:
        function(text)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("reader", READERS)
def test_no_text_of_a_hundred_kilobytes_takes_long(reader: str) -> None:
    slow = {}
    for unit in UNITS:
        for text in (unit * (SIZE // len(unit)), "x" + unit * (SIZE // len(unit)) + "!"):
            began = time.process_time()  # not wall clock: machines are busy
            READERS[reader](text)
            if (seconds := time.process_time() - began) > 3:
                slow[unit] = seconds
    assert slow == {}  # quadratic ones take ten and more


class Bomb:
    """Pickled, it runs a command when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_checkpoint_cannot_run_code_or_point_outside_of_its_run(tmp_path: Path) -> None:
    run, model = RunDir(tmp_path / "run"), torch.nn.Sequential(OrderedDict(q_proj=torch.nn.Linear(2, 2)))
    lora.add_lora(model, 1, 1.0, 0.0, ["q_proj"])
    run.create({"flags": {}})
    optimizer = torch.optim.SGD(lora.lora_parameters(model), lr=1.0)
    final = run.save(1, model, optimizer)
    torch.save(Bomb(tmp_path / "exploded"), final / "state.pt")
    with pytest.raises(RunError, match="cannot be read"):
        run.restore(model, optimizer)
    assert not (tmp_path / "exploded").exists()
    (run.path / "latest").write_text("../../elsewhere/step_000001")
    assert run.latest() == final


def test_an_adapter_cannot_ask_for_any_amount_of_memory(tmp_path: Path) -> None:
    (tmp_path / lora.CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 10**9, "lora_alpha": 1, "target_modules": ["q_proj"]})
    )
    save_file({"x": torch.zeros(1)}, tmp_path / lora.WEIGHTS)
    with pytest.raises(ValueError, match=r"r \(at most 4096\)"):
        lora.read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_names_files_of_its_own_directory_only(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (directory / shards.INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="names in its own directory"):
        list(shards.read_tensors(directory))


def test_a_task_file_that_is_no_task_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    record = {"problem": "2 + 2", "ground_truth": "4", "source": "gsm8k", "problem_type": "math"}
    wrong = ({"problem": None}, {"ground_truth": {"a": 1}}, {"meta": "x"}, {"source": "mbpp", "meta": {"test": 5}})
    for text in ("[" * 100_000, "{" * 9, "null", "[]", '"x"', "\0\0", '{"problem": 1e999}', "9" * 10_000,
                 *(json.dumps(record | part) for part in wrong)):
        path.write_text(text + "\n", encoding="utf-8")
        with pytest.raises(tasks.TaskError) as refused:
            tasks.read_tasks([str(path)])
        assert "tasks.jsonl" in str(refused.value), text[:99]
        assert len(str(refused.value)) < 1000
