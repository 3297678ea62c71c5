"""Random episodes: whatever is said, the graph keeps its invariants, runs exactly what DESIGN says, and earns by its signs.

The second half of this file is a model of the canvas's semantics of some thirty lines, written apart from canvas.py: the
calls that an episode makes, their order and its solution must be those of the model.
"""

import re
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from scripted import MATH, Scripted, add, conditional, delete, loop, modify, parallel, set_prompt

import operators
from backends import Request
from canvas import Canvas, CanvasConfig
from edits import Edit, InvalidEdit, parse_edit
from graph import Graph
from rewards import Grade, RewardConfig, reward

LIBRARY = operators.library(["Plan", "Decompose", "Custom", "AnswerGenerate", "Review", "Verify", "Revise", "Aggregate",
                             "ScEnsemble", "Format"])     # none that runs programs: those are for other tests
CHECKERS, ENSEMBLES = {"Review", "Verify"}, {"Aggregate", "ScEnsemble"}

name = st.sampled_from(list(LIBRARY))
places = st.integers(1, 4)
targets = st.integers(0, 60).map("?{}".format) | st.sampled_from(["n1", "n2", "n2.1", "n9"])     # see aimed
names = st.lists(name, min_size=1, max_size=3).map(", ".join)
edits = st.one_of(
    st.builds(add, name, position=st.none() | places), st.builds(parallel, names),
    st.builds(conditional, st.sampled_from(sorted(CHECKERS)), name, st.just("") | name),
    st.builds(loop, names, st.integers(1, 3)), st.builds(delete, targets), st.builds(modify, targets, name),
    st.builds(set_prompt, targets, st.sampled_from(["Briefly.", "At length."])))


def aimed(edit: str, graph: Graph) -> str:
    """Return the edit with its target ?17 replaced by an id of the graph, so that most edits hit something."""
    ids = [part for stage in graph.stages for part in dict.fromkeys([stage.id, *[node.id for node in stage.nodes]])] or ["n1"]
    return re.sub(r"\?(\d+)", lambda match: ids[int(match[1]) % len(ids)], edit)


def reply(request: Request) -> str:
    """A deterministic executor whose every answer depends on all that it reads, in the operator's own form."""
    number = zlib.crc32(f"{request.operator}\n{request.text}".encode()) % 7
    passed = "yes" if number % 2 else "no"
    return {"Review": f"<feedback>is {number}</feedback><passed>{passed}</passed>",
            "Verify": f"<answer>{number}</answer><passed>{passed}</passed>",
            "ScEnsemble": "<answer>A</answer>"}.get(request.operator, f"<thought>hm</thought><answer>{number}</answer>")


def new_canvas() -> tuple[Canvas, Scripted]:
    backend = Scripted(**dict.fromkeys(LIBRARY, reply))
    return Canvas(MATH, LIBRARY, backend, CanvasConfig(max_turns=1000)), backend


# ---- the graph


def recount(text: str) -> str:
    """Return the counts of feedback, from the workflow as it is written."""
    body = re.sub(r"n\d+(\.\d+)?:", "", text)
    nodes = [word for word in re.findall(r"[A-Za-z]\w*", body) if word != "done"]
    kinds = [{"[": "parallel", "?": "conditional", "*": "loop"}[sign] for sign in re.findall(r"[\[?*]", body)]
    has = ["checker"] * bool(CHECKERS & set(nodes)) + ["format"] * ("Format" in nodes) + list(dict.fromkeys(kinds))
    return f"{len(nodes)} operators, {len(set(nodes))} types; has {', '.join(has) or 'no checker, format or structure'}."


@given(st.lists(edits, min_size=4, max_size=14))
@settings(max_examples=80, deadline=None)
def test_edits_keep_ids_unique_and_unused_the_text_readable_and_the_counts_right(said: list[str]) -> None:
    canvas, _ = new_canvas()
    canvas.config = CanvasConfig(max_turns=1000, feedback_chars=5000)
    canvas.run_graph = lambda: None  # type: ignore[method-assign]
    gone: set[str] = set()
    before, ids = "", set()
    for text in said:
        feedback = canvas.step(aimed(text, canvas.graph))
        after = canvas.graph.to_text(ids=True)
        assert feedback.ok or after == before, "a refused edit changes nothing"
        now = [stage.id for stage in canvas.graph.stages]
        now += [node.id for stage in canvas.graph.stages if stage.kind != "operator" for node in stage.nodes]
        assert len(set(now)) == len(now)
        gone |= ids - set(now)
        assert not gone & set(now), "an id that was gone names another node"
        for graph in (Graph.from_text(after), Graph.from_text(canvas.graph.to_text())):
            assert graph.to_text() == canvas.graph.to_text()
        assert Graph.from_text(after).to_text(ids=True) == after
        assert f"\n{recount(after)} Turn {canvas.turn}" in feedback.text
        before, ids = after, set(now)


# ---- what runs


def model_run(graph: Graph, known: dict[tuple[str, int], Any], ask: Callable[..., str]) -> tuple[list[str], dict[str, Any]]:
    """Bring the graph up to date as DESIGN section 4 says; return the ids of what ran, in order, and the state after it.

    known: what each (node, iteration) ran with last, and its result. A node runs again if its operator, its prompt or
    what it reads has changed. A failed node leaves the state alone.
    """
    ran: list[str] = []

    def node_result(node: Any, state: dict[str, Any], iteration: int) -> operators.Result:
        op = LIBRARY[node.operator]
        prompt = node.prompt or op.prompt
        reads = {key: state[key] for key in op.reads}
        if known.get((node.id, iteration), [None])[0] != (op.name, prompt, reads):
            context = operators.Context(op.name, prompt, MATH.kind, None, "", reads, lambda text, seen: ask(op.name, text))
            known[node.id, iteration] = (op.name, prompt, reads), op.run(context)
            ran.append(node.id)
        return known[node.id, iteration][1]

    def after(state: dict[str, Any], op: str, result: operators.Result) -> dict[str, Any]:
        if result.error:
            return state
        candidates = () if op in ENSEMBLES else state["candidates"]
        new = {"candidates": (*candidates, result.writes["solution"])} if "solution" in result.writes else {}
        return state | dict(result.writes) | new

    state = dict.fromkeys(operators.STATE_KEYS, "") | {"problem": MATH.problem, "candidates": ()}
    for stage in graph.stages:
        start, passed = state, False
        if stage.kind == "conditional":
            verdict = node_result(stage.nodes[0], state, 0)
            state = after(state, stage.nodes[0].operator, verdict)
            branches = stage.nodes[1:2] if verdict.passed is False else stage.nodes[2:]
            for node in branches if not verdict.error else []:
                state = after(state, node.operator, node_result(node, state, 0))
        for iteration in range(0 if stage.kind == "conditional" else stage.count):
            notes: dict[str, list[str]] = {}
            for node in [] if passed else stage.nodes:
                result = node_result(node, start if stage.kind == "parallel" else state, iteration)
                state = after(state, node.operator, result)
                for key in ("plan", "subproblems", "feedback"):
                    if not result.error and key in result.writes:
                        notes.setdefault(key, []).append(result.writes[key])
                if passed := stage.kind == "loop" and bool(result.passed):
                    break
            if stage.kind == "parallel":      # notes of branches stand side by side; of solutions the last one counts
                state = state | {key: "\n".join(text for text in texts if text) for key, texts in notes.items()}
    return ran, state


@given(st.lists(edits, min_size=2, max_size=9))
@settings(max_examples=60, deadline=None)
def test_every_edit_runs_exactly_the_nodes_and_calls_of_the_model(said: list[str]) -> None:
    canvas, backend = new_canvas()
    known: dict[tuple[str, int], Any] = {}
    for text in said:
        calls: list[tuple[str, str]] = []

        def ask(operator: str, text: str, calls: list = calls) -> str:
            calls.append((operator, text))
            return reply(SimpleNamespace(operator=operator, text=text))

        seen = len(backend.requests)
        feedback = canvas.step(aimed(text, canvas.graph))
        ran, state = model_run(canvas.graph, known, ask) if feedback.ok else ([], canvas.state)
        assert feedback.info["executed"] == ran
        assert sorted((request.operator, request.text) for request in backend.requests[seen:]) == sorted(calls)
        assert (canvas.state, canvas.solution) == (state, state["solution"])


# ---- what it earns


FEATURES = st.lists(st.sampled_from([add("Format"), add("Review"), parallel("Custom, Format"), conditional("Verify", "Revise"),
                                     loop("Custom, Review", 2)]), max_size=4)


@given(st.lists(edits, max_size=6), FEATURES, st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_the_sign_of_the_reward_tells_a_feasible_workflow_from_any_other(
        said: list[str], more: list[str], score: float, least: int) -> None:
    canvas, _ = new_canvas()
    canvas.run_graph = lambda: None  # type: ignore[method-assign]
    for edit in said + more:
        canvas.step(aimed(edit, canvas.graph))
    text = canvas.graph.to_text()
    words = [word for word in re.findall(r"[A-Za-z]\w*", text) if word != "done"]
    has = (bool(CHECKERS & set(words)), "Format" in words, len(words) >= least, any(sign in text for sign in "[?*"))
    parts = reward(canvas, Grade(score, score, score), RewardConfig(min_operators=least))
    assert parts.diversity == pytest.approx(sum(w for w, earned in zip((0.2, 0.2, 0.2, 0.4), has, strict=True) if earned))
    event("feasible" if all(has) else "infeasible")
    if all(has):
        assert parts.total == score
    else:
        assert (parts.total < 0, parts.answer) == (True, 0)


# ---- any bytes

raw = st.binary(max_size=200) | st.lists(st.sampled_from(
    [b"<action>", b"</action>", b"add", b"<operator>", b"</operator>", b"<prompt>", b"\xff", b"\xed\xa0\x80", b"\x00",
     b"<think>", b"</think>", b"finish", b"<target>n1</target>", "１".encode(), b"<count>", b"</count>", b"9" * 30]),
    max_size=30).map(b"".join) | (st.binary(max_size=4) | st.sampled_from(["²".encode(), "１".encode(), b"9" * 5000])).map(
        lambda count: b"<action>add</action><structure>loop</structure><operators>Plan</operators><count>" + count + b"</count>")


@given(raw, st.sampled_from(["latin-1", "utf-8", "utf-16-le"]))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_an_edit_or_an_invalid_edit_and_the_canvas_answers(data: bytes, encoding: str) -> None:
    errors = "surrogatepass" if encoding == "utf-16-le" and len(data) % 2 == 0 else "replace"
    for text in (data.decode(encoding, errors), data.decode("utf-8", "surrogateescape")):
        assert isinstance(parse_edit(text), Edit | InvalidEdit)
        canvas, _ = new_canvas()
        assert len(canvas.step(text).text) <= canvas.config.feedback_chars
