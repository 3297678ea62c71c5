"""A canvas without a policy: play the Flow-Director by hand, or run a saved workflow on another question.

    python canvas.py                                                type edits, read feedback, see the workflow drawn
    python canvas.py --source toy_code --seed 3 --prompt-mode ask   another task, and the paper's two-step interaction
    python canvas.py run w.json --question "..." --executor-url http://localhost:8000 --executor-model my-model

A saved workflow is JSON: the graph as text with its node ids, the custom prompts by node, and the kind of its question.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import operators
from backends import Backend, ExecutorError, OpenAIBackend, SimulatedBackend
from canvas import Canvas, CanvasConfig, Graph
from rewards import RewardConfig, grade, reward
from sandbox import SandboxError
from tasks import SOURCES, Task, TaskError, toy_tasks

SIMULATED_NOTE = "The executor is a simulation, no LLM: it cannot know the answer. Name a real one with --executor-url."


def question(text: str, kind: str) -> Task:
    """A task that nobody knows the answer of."""
    if not text.strip():
        raise TaskError("the question is empty")
    return Task("question", "question", kind, text, ("(an answer that the simulation cannot know)",))


def save_workflow(path: Path, canvas: Canvas) -> None:
    prompts = {node.id: node.prompt for node in canvas.graph.nodes() if node.prompt is not None}
    saved = {"workflow": canvas.graph.to_text(ids=True), "prompts": prompts, "kind": canvas.task.kind}
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_workflow(path: Path) -> tuple[Graph, str]:
    """(graph, kind) of a saved workflow. Raises ValueError that names the file."""
    try:
        saved: Any = json.loads(path.read_text(encoding="utf-8"))
        graph, kind = Graph.from_text(saved["workflow"]), saved.get("kind", "qa")
        for name, prompt in saved.get("prompts", {}).items():
            node = graph.find(name)[1]
            if node is None or not isinstance(prompt, str):
                raise ValueError(f"prompts: {name!r} is no node with a text")
            node.prompt = prompt
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a saved workflow: {type(error).__name__}: {error}") from None
    return graph, kind


def run_saved(args: argparse.Namespace) -> None:
    """Run a saved workflow on one question and print what each node said."""
    if bool(args.executor_url) != bool(args.executor_model):
        raise ValueError("--executor-url and --executor-model belong together; one of them is missing")
    graph, kind = load_workflow(args.workflow)
    backend: Backend = SimulatedBackend()
    if args.executor_url:
        backend = OpenAIBackend(args.executor_url, args.executor_model, args.executor_key_env)
    canvas = Canvas(question(args.question, args.kind or kind), operators.library(None, args.operator_file), backend)
    known = canvas.library | operators.REGISTRY  # a workflow may use what is known but not advertised
    for node in graph.nodes():
        if node.operator not in known:
            raise ValueError(f"{args.workflow} uses {node.operator}, which is none of {', '.join(known)}; see --operator-file")
    canvas.library, canvas.graph = known, graph
    canvas.run_graph()
    print(f"workflow: {graph.to_text(ids=True)}")
    for name, result in canvas.results.items():
        print(f"{name} {graph.find(name)[1].operator}: {(result.error and 'failed: ' + result.error) or result.output}")
    print(f"\nanswer: {canvas.answer}" + ("" if args.executor_url else f"\n{SIMULATED_NOTE}"))


def drawing(graph: Graph, ran: Sequence[str] = (), failed: Sequence[str] = ()) -> str:
    """The workflow as text, a stage below the other; nodes that just ran have a *, failed ones a !."""
    marks = {**dict.fromkeys(ran, "*"), **dict.fromkeys(failed, "!")}
    blocks = []
    for stage in graph.stages:
        names = [f"{node.id} {node.operator}{marks.get(node.id, '')}" for node in stage.nodes]
        if stage.kind == "parallel":
            lines = [f"┌ {names[0]}", *(f"├ {name}" for name in names[1:-1]), f"└ {names[-1]}"]
        elif stage.kind == "conditional":
            lines = [f"◇ {names[0]}", f"├ problem: {names[1]}", f"└ fine: {names[2] if len(names) > 2 else 'done'}"]
        elif stage.kind == "loop":
            lines = [f"↻ up to {stage.count} ×", *(f"│ {name}" for name in names)]
        else:
            lines = names
        blocks.append("\n".join(f"  {line}" for line in lines))
    return "\n  ↓\n".join(blocks) or "  (empty)"


def play(args: argparse.Namespace) -> None:
    task = toy_tasks(args.source, 1, args.seed)[0]
    config = CanvasConfig(max_turns=args.max_turns, prompt_mode=args.prompt_mode)
    canvas = Canvas(task, operators.library(), SimulatedBackend(args.seed), config)
    system, user = canvas.prompt()
    print(f"{system}\n\n{'-' * 80}\nTask: {user}\n{'-' * 80}\nOne edit a line; Ctrl-D gives up. The executor is simulated.")
    while not canvas.done:
        try:
            feedback = canvas.step(input(f"\n[turn {canvas.turn + 1}] > "))
        except (EOFError, KeyboardInterrupt):
            print("\nGiven up.")
            break
        print(f"{feedback.text or feedback.error}\n\n{drawing(canvas.graph, canvas.ran_last, feedback.info.get('failed', ()))}")
    earned = reward(canvas, grade(task, canvas.answer), RewardConfig())
    print(f"\nAnswer: {canvas.answer!r}   gold: {task.answers[0]!r}")
    print("Reward: " + ", ".join(f"{name} {value:g}" for name, value in asdict(earned).items()))


def main(arguments: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["run"]:
        parser = argparse.ArgumentParser(prog="canvas.py run", description="Run a saved workflow on one question.")
        parser.add_argument("workflow", type=Path, metavar="FILE", help="as eval.py --ask --save-workflow wrote it")
        parser.add_argument("--question", required=True, help="what the workflow is to answer")
        parser.add_argument("--kind", choices=tuple(SOURCES), help="of the question; default: as in the file")
        parser.add_argument("--executor-url", nargs="+", metavar="URL", help="OpenAI-compatible; default: the simulation")
        parser.add_argument("--executor-model", help="model name at --executor-url")
        parser.add_argument("--executor-key-env", metavar="NAME", help="environment variable that holds the API key")
        parser.add_argument("--operator-file", nargs="+", default=[], metavar="FILE", help="plug-ins that the workflow uses")
        action, words = run_saved, words[1:]
    else:
        parser = argparse.ArgumentParser(prog="canvas.py", description=__doc__,
                                         formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--source", default="toy_math", help="toy_math, toy_qa or toy_code (default %(default)s)")
        parser.add_argument("--seed", type=int, default=0, help="which task, and the simulated executor's seed")
        parser.add_argument("--max-turns", type=int, default=20, help="turns before the episode ends (default %(default)s)")
        parser.add_argument("--prompt-mode", choices=("inline", "ask"), default="inline", help="ask: a prompt per new node")
        action = play
    args = parser.parse_args(words)
    try:
        action(args)
    except (ValueError, OSError, ExecutorError, SandboxError) as error:
        sys.exit(f"canvas.py: {error}")
