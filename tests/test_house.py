"""The rules of the house: small files, small functions, two wings, no circles, no swallowed exceptions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("*.py"))}
ENVIRONMENT = {"sandbox", "contain", "judge", "wire", "codec", "memo", "tasks", "toys", "convert", "backends", "endpoint",
               "simulated", "operators", "graph", "edits", "canvas", "rewards", "mathgrade", "codegrade", "report", "baselines",
               "metrics", "stats", "play", "llm_judge", "curves", "terminal", "trackers", "hacks"}
MODEL = {"lora", "qwen3", "shards", "policy", "vllm_server", "vllm_sampler", "vllm_fleet", "vllm_check", "memory", "publish"}


def imports(tree: ast.AST, top_only: bool = False) -> set[str]:
    nodes = tree.body if top_only else ast.walk(tree)
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = tree.body if top_only else ast.walk(tree)
    return plain | {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_and_functions_can_be_seen_whole(name: str) -> None:
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("\n") + 1 <= 400
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(FILES[name])
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60}
    assert long == {}


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_the_environment_knows_neither_torch_nor_the_model(name: str) -> None:
    assert imports(FILES[name]) & (MODEL | {"torch", "warmstart", "cwrpo"}) == set()


@pytest.mark.parametrize("name", sorted(MODEL))
def test_the_model_knows_nothing_of_canvases(name: str) -> None:
    assert imports(FILES[name]) & ENVIRONMENT == set()


def test_eval_never_imports_train() -> None:
    assert "train" not in imports(FILES["eval"])


def test_there_are_no_circles() -> None:
    graph = {name: imports(tree, top_only=True) & FILES.keys() for name, tree in FILES.items()}
    while free := [name for name, needs in graph.items() if not needs]:
        graph = {name: needs - set(free) for name, needs in graph.items() if name not in free}
    assert graph == {}


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_exception_is_swallowed(name: str) -> None:
    silent = [node.lineno for node in ast.walk(FILES[name]) if isinstance(node, ast.ExceptHandler)
              and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
              and all(isinstance(part, ast.Pass | ast.Continue) for part in node.body)]
    assert silent == []
