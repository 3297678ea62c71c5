"""The Workflow Canvas: an executable graph that the Flow-Director edits, one edit a turn.

`Canvas.step(text)` reads the edit, checks it, changes the graph, brings the graph's results up to date and answers with
feedback. Decisions that matter:

* Incremental execution: a node re-runs only if its operator, its prompt or what it reads changed: an edit costs no more.
* No policy text can crash, hang or trap an episode: whatever is not an edit is an invalid edit, which spends the turn.
* Failures of an operator are feedback. Failures of the infrastructure (executor or sandbox out of order) are not: the
  episode ends as `executor_error` and its trajectory is never trained on.

Play the Flow-Director yourself, or run a saved workflow (play.py):  python canvas.py [run FILE --question ...]
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import operators
from backends import Backend, ExecutorError, Request, Usage
from edits import FORMS, Edit, InvalidEdit, parse_edit, strip_tags
from graph import Graph, GraphError, Node, Stage
from operators import Context, Operator, Result
from sandbox import SandboxError
from tasks import Task

__all__ = ["Canvas", "CanvasConfig", "Edit", "Feedback", "Graph", "InvalidEdit", "parse_edit"]
LOGGED_CHARS = 400  # of a prompt or an output in trajectories.jsonl
TAG_LIKE = re.compile(r"<(?=[/|A-Za-z])")
FINISH_RULES = ("operators", "checker", "structure", "test")


@dataclass(frozen=True)
class CanvasConfig:
    max_turns: int = 20
    feedback_chars: int = 800  # at least 200: status, workflow and turn must fit
    prompt_mode: str = "inline"  # "ask": after add/modify the canvas asks for each new node's prompt (the paper's way)
    finish_rules: tuple[str, ...] = ()  # what `finish` demands, out of FINISH_RULES
    min_operators: int = 5
    allow_answer_tag: bool = False
    problem_chars: int = 6000  # of the problem shown to the policy; a cut is marked, and executors read all of it
    brief: bool = False  # a system prompt of names only, for policies too small to read descriptions


@dataclass
class Feedback:
    """The canvas's answer. `ok`: the edit was accepted; `stop_reason` is set when `done`."""

    text: str
    ok: bool
    done: bool = False
    stop_reason: str | None = None
    error: str = ""  # why the infrastructure failed, for the log; only with stop_reason "executor_error"
    info: dict[str, Any] = field(default_factory=dict)  # edit, workflow, executed, failed, cached, results, ...


class Canvas:
    """One episode on one task. `.graph .solution .answer .usage` may be read at any time."""

    def __init__(self, task: Task, library: dict[str, Operator], backend: Backend,
                 config: CanvasConfig | None = None) -> None:
        self.task, self.library, self.backend = task, library, backend
        self.config = config or CanvasConfig()
        assert self.config.feedback_chars >= 200, f"feedback_chars is {self.config.feedback_chars}, at least 200"
        self.graph = Graph()
        self.usage = Usage()
        self.turn, self.done = 0, False
        self.pending: list[Node] = []  # nodes whose custom prompt was asked for (prompt_mode "ask")
        self.state = self._initial_state()
        self.results: dict[str, Result] = {}  # newest result by node id, of the nodes that the last run visited
        self.ran_last: list[str] = []  # ids of the nodes that the last turn executed, in order
        self._memo: dict[tuple[str, int], tuple[tuple, Result]] = {}  # (node id, loop iteration) -> content, result
        self._passed: list[tuple[tuple, dict[str, Result], dict[str, Any]]] = []  # each stage's shape, results and state after it
        self._final_answer: str | None = None
        self._names = {name.lower(): name for name in library}

    def __getstate__(self) -> dict[str, Any]:
        """Only what is logged of an episode travels to another process: not the library and the executor of this one."""
        return {name: getattr(self, name) for name in ("graph", "usage", "state", "_final_answer")}

    @property
    def solution(self) -> str:
        return self.state["solution"]

    @property
    def answer(self) -> str:
        return self.solution if self._final_answer is None else self._final_answer

    # ---- a turn --------------------------------------------------------------------------------------------------

    def step(self, text: str) -> Feedback:
        """Take one turn of the policy. Raises only for misuse (stepping a finished episode)."""
        assert not self.done, "step() after the episode's end"
        self.turn += 1
        self.ran_last = []
        try:
            return self._accept(self._edit_or_prompt(text))
        except (ExecutorError, SandboxError) as error:
            self.done = True
            info = {"edit": "", "workflow": self.graph.to_text(ids=True), "executed": self.ran_last}
            return Feedback("", ok=False, done=True, stop_reason="executor_error", error=str(error), info=info)

    def _edit_or_prompt(self, text: str) -> Edit | InvalidEdit:
        said = parse_edit(text)
        if not self.pending:
            return said
        if isinstance(said, Edit):
            self.pending = []  # an edit instead of a prompt cancels the question
            return said
        node = self.pending[0]
        return Edit("set_prompt", target=node.id, prompts=(strip_tags(text),))

    def _accept(self, said: Edit | InvalidEdit) -> Feedback:
        if isinstance(said, InvalidEdit):
            return self._feedback(f"Invalid edit: {said.reason}.", ok=False, edit="", form=said.form)
        if said.action == "finish":
            return self._finish(said)
        try:
            done = self._apply(said)
        except GraphError as error:
            form = FORMS[said.action if said.structure == "operator" else said.structure]
            return self._feedback(f"Invalid edit: {error}.", ok=False, edit=said.action, form=form)
        if said.ignored:
            done += " Only the first edit of a turn counts; the rest was ignored."
        if self.pending:
            node = self.pending[0]
            ask = f"Write the prompt for {node.id} {node.operator} ({self.library[node.operator].description})."
            return self._feedback(f"OK: {done} {ask}", ok=True, edit=done)
        self.run_graph()
        return self._feedback(f"OK: {done}", ok=True, edit=done)

    def _finish(self, said: Edit) -> Feedback:
        self.run_graph()  # nodes whose prompt was still asked for run with their default prompt
        missing = self._missing_for_finish()
        if missing:
            return self._feedback(f"Finish refused: {', '.join(missing)}.", ok=False, edit="finish", refused=True)
        if said.answer is not None and self.config.allow_answer_tag:
            self._final_answer = said.answer
        self.done = True
        return self._feedback("OK: finished.", ok=True, edit="finish", stop_reason="finished")

    def _missing_for_finish(self) -> list[str]:
        rules, nodes = self.config.finish_rules, self.graph.operators()
        missing = []
        if "operators" in rules and len(nodes) < self.config.min_operators:
            missing.append(f"{self.config.min_operators - len(nodes)} more operators needed")
        if "checker" in rules and not any(self.library[name].role == "check" for name in nodes):
            missing.append("a checker needed (" + ", ".join(self._of_role("check")) + ")")
        if "structure" in rules and not self.graph.structures():
            missing.append("a structure needed (parallel, conditional or loop)")
        if ("test" in rules and self.task.kind == "code" and self.task.public_tests and "Test" in self.library
                and "Test" not in nodes):
            missing.append("a Test needed")
        return missing

    def _of_role(self, role: str) -> list[str]:
        return [op.name for op in self.library.values() if op.role == role]

    # ---- changing the graph ----------------------------------------------------------------------------------------

    def _apply(self, edit: Edit) -> str:
        """Change the graph or raise GraphError with the graph unchanged; return what was done in words."""
        names = [self._canonical(name) for name in edit.operators]
        if edit.action == "delete":
            self.graph.delete(edit.target)
            return f"deleted {edit.target}."
        if edit.action == "add":
            self._check_roles(edit.structure, names)
            if len(edit.prompts) > len(names):
                raise GraphError(f"{len(edit.prompts)} prompts for {len(names)} operators")
            stage = self.graph.insert(edit.structure, names, edit.count, edit.position)
            for node, prompt in zip(stage.nodes, edit.prompts, strict=False):
                node.prompt = prompt or None
            self._ask_for(stage.nodes[len(edit.prompts):])
            return f"added {stage.id}."
        stage, node = self.graph.find(edit.target)
        if node is None:
            raise GraphError(f"{stage.id} is a {stage.kind}; name one of its nodes: {', '.join(n.id for n in stage.nodes)}")
        if edit.action == "modify":
            after = [names[0] if n is node else n.operator for n in stage.nodes]
            self._check_roles(stage.kind, after)
            node.operator, node.prompt = names[0], (edit.prompts[0] or None) if edit.prompts else None
            self._ask_for([] if edit.prompts else [node])
            return f"{node.id} is now {node.operator}."
        node.prompt = edit.prompts[0] or None
        self.pending = [waiting for waiting in self.pending if waiting is not node]
        return f"set the prompt of {node.id} {node.operator}."

    def _ask_for(self, nodes: list[Node]) -> None:
        if self.config.prompt_mode == "ask":
            self.pending = list(nodes)

    def _canonical(self, name: str) -> str:
        if name.lower() not in self._names:
            raise GraphError(f"unknown operator {name[:40]!r}; operators are {', '.join(self.library)}")
        return self._names[name.lower()]

    def _check_roles(self, structure: str, names: list[str]) -> None:
        if structure == "parallel" and (found := [n for n in names if self.library[n].role == "ensemble"]):
            raise GraphError(f"{found[0]} combines candidates and cannot run inside a parallel; add it after one")
        if structure == "conditional" and self.library[names[0]].role != "check":
            raise GraphError(f"the condition must be a checker ({', '.join(self._of_role('check'))}), not {names[0]}")

    # ---- running the graph -----------------------------------------------------------------------------------------

    def _initial_state(self) -> dict[str, Any]:
        return {**dict.fromkeys(operators.STATE_KEYS, ""), "problem": self.task.problem, "candidates": ()}

    def run_graph(self) -> None:
        """Bring the graph up to date. Nodes whose content is unchanged keep their result and cost nothing."""
        before, self._passed, self.results, state = self._passed, [], {}, self._initial_state()
        for stage in self.graph.stages:
            shape = stage.kind, stage.count, [(node.id, node.operator, node.prompt) for node in stage.nodes]
            if before and before[0][0] == shape:  # and nothing before it has changed either
                _, results, state = before.pop(0)
            else:
                before, state = [], self._run_stage(stage, state)
                results = {node.id: self.results.pop(node.id) for node in stage.nodes if node.id in self.results}
            self.results |= results  # in the order of the graph: threads finish in any
            self._passed.append((shape, results, state))
        self.state = state

    def _run_stage(self, stage: Stage, state: dict[str, Any]) -> dict[str, Any]:
        if stage.kind == "parallel":
            return self._run_parallel(stage, state)
        if stage.kind == "conditional":
            result = self._run_node(stage.nodes[0], state)
            state = _merge(state, result, self.library[stage.nodes[0].operator])
            # True means a problem was found. A failed condition found nothing: the solution is kept.
            branch = 1 if result.passed is False else 2
            if result.error or branch >= len(stage.nodes):
                return state
            node = stage.nodes[branch]
            return _merge(state, self._run_node(node, state), self.library[node.operator])
        for iteration in range(stage.count):  # an operator stage is a loop of one
            for node in stage.nodes:
                result = self._run_node(node, state, iteration)
                state = _merge(state, result, self.library[node.operator])
                if stage.kind == "loop" and result.passed:
                    return state
        return state

    def _run_parallel(self, stage: Stage, state: dict[str, Any]) -> dict[str, Any]:
        """All branches start from the same state, run concurrently, and are merged in their order."""
        stale = [node for node in stage.nodes if self._known(node, self._content(node, state)) is None]
        if len(stale) > 1:  # a thread costs more than all else in a turn
            with ThreadPoolExecutor(len(stale)) as pool:
                list(pool.map(lambda node: self._run_node(node, state), stale))
        results = [self._run_node(node, state) for node in stage.nodes]
        order = {node.id: i for i, node in enumerate(stage.nodes)}
        self.ran_last.sort(key=lambda name: order.get(name, -1))  # threads finish in any order; the record does not
        merged, notes = state, {}
        for node, result in zip(stage.nodes, results, strict=True):
            merged = _merge(merged, result, self.library[node.operator])
            for key in {"plan", "subproblems", "feedback"} & set(() if result.error else result.writes):
                notes.setdefault(key, []).append(result.writes[key])
        return merged | {key: "\n".join(filter(None, texts)) for key, texts in notes.items()}  # notes stand side by side

    def _content(self, node: Node, state: dict[str, Any]) -> tuple[str, str, tuple]:
        """(operator, prompt, inputs): what decides a node's result. Unchanged inputs are the same objects: quick to compare."""
        op = self.library[node.operator]
        return op.name, op.prompt if node.prompt is None else node.prompt, tuple(map(state.__getitem__, op.reads))

    def _known(self, node: Node, content: tuple, iteration: int = 0) -> Result | None:
        """The node's result, if it was run with this very content."""
        before, result = self._memo.get((node.id, iteration), (None, None))
        return result if before == content else None

    def _run_node(self, node: Node, state: dict[str, Any], iteration: int = 0) -> Result:
        content = self._content(node, state)
        result = self._known(node, content, iteration)
        if result is None:
            op, task = self.library[node.operator], self.task
            _, prompt, values = content

            def complete(text: str, seen: dict[str, Any]) -> str:
                reply = self.backend.complete(Request(task, op.name, prompt, text, seen, op.role))
                self.usage.add(reply.usage)
                return reply.text

            inputs = dict(zip(op.reads, values, strict=True))
            context = Context(op.name, prompt, task.kind, task.entry_point, task.public_tests, inputs, complete,
                              task.meta.get("frame", ""))
            result = op.run(context)
            self._memo[(node.id, iteration)] = content, result
            self.ran_last.append(node.id)
        self.results[node.id] = result
        return result

    # ---- what the policy reads -------------------------------------------------------------------------------------

    def prompt(self) -> tuple[str, str]:
        """(system, user) texts that open the conversation."""
        return system_prompt(self.library, self.config), _middle(self.task.problem, self.config.problem_chars)

    def _feedback(self, status: str, ok: bool, edit: str, stop_reason: str | None = None, *, form: str = "",
                  refused: bool = False) -> Feedback:
        if stop_reason is None and self.turn >= self.config.max_turns:
            self.run_graph()  # whatever was waiting for a prompt still counts
            stop_reason = "max_turns"
        self.done = stop_reason is not None
        failed = [name for name in dict.fromkeys(self.ran_last) if self.results[name].error]
        workflow = self.graph.to_text(ids=True)
        info = {"edit": edit, "workflow": workflow, "executed": list(self.ran_last), "failed": failed,
                "invalid": bool(form), "refused": refused, "results": self._results_for_log(),
                "cached": [name for name in self.results if name not in self.ran_last]}
        text = self._feedback_text(_safe(status), form and f" Form: {form}", workflow)
        return Feedback(text, ok, self.done, stop_reason, info=info)

    def _results_for_log(self) -> dict[str, dict[str, str]]:
        """{node id: its own prompt, if it has one, and what it said} of the nodes that the last turn executed, cut short."""
        prompts = {node.id: node.prompt for node in self.graph.nodes() if node.prompt is not None}
        return {name: ({"prompt": _middle(prompts[name], LOGGED_CHARS)} if name in prompts else {})
                | {"output": _middle(self.results[name].error or self.results[name].output, LOGGED_CHARS)}
                for name in dict.fromkeys(self.ran_last)}

    def _feedback_text(self, status: str, form: str, workflow: str) -> str:
        """Status, workflow, counts and turn always; the newest results share what is left of the budget. `status` may
        quote the policy and is made safe; `form` (of an invalid edit) is our own, and is shown whole or not at all."""
        names = self.graph.operators()
        roles = {self.library[name].role for name in names}
        has = ["checker"] * ("check" in roles) + ["format"] * ("format" in roles) + list(dict.fromkeys(self.graph.structures()))
        tail = f"{len(names)} operators, {len(set(names))} types; has {', '.join(has) or 'no checker, format or structure'}."
        tail += f" Turn {self.turn} of {self.config.max_turns}."
        if missing := self.config.finish_rules and self._missing_for_finish():
            tail += f" Before finish: {', '.join(missing)}."
        budget = self.config.feedback_chars
        tail = _middle(tail, budget // 2)
        kept = min(len(status), 40)  # of the status at least, whatever else is long
        room = budget - len(tail) - len("\nWorkflow: \n") - kept
        workflow = f"Workflow: {_middle(workflow or '(empty)', min(room, budget // 2))}"
        room = budget - len(workflow) - len(tail) - 2
        status = _middle(status, room - len(form)) + form if len(form) + kept <= room else _middle(status, room)
        room = budget - len(status) - len(workflow) - len(tail) - 2
        lines = []
        for name in reversed(dict.fromkeys(self.ran_last)):  # the newest first: it is what the edit was for
            result, operator = self.results[name], self.graph.find(name)[1].operator
            said = f"failed: {result.error} (modify or delete {name})" if result.error else result.output
            width = min(room - 1, budget // 3)
            if width < 24:
                break
            lines.insert(0, _middle(f"{name} {operator}: {' '.join(_safe(said).split())}", width))
            room -= len(lines[0]) + 1
        return "\n".join([status, *lines, workflow, tail])


def _merge(state: dict[str, Any], result: Result, op: Operator) -> dict[str, Any]:
    """The state after a node. A failed node leaves the last good solution in place."""
    if result.error:
        return state
    after = {**state, **result.writes}
    if "solution" in result.writes:  # an ensemble consumes the candidates, every other solver adds one
        before = () if op.role == "ensemble" else state["candidates"]
        after["candidates"] = (*before, result.writes["solution"])
    return after


def _middle(text: str, width: int) -> str:
    """Cut in the middle: beginnings name things, ends hold answers."""
    if len(text) <= width:
        return text
    assert width >= 8, f"width is {width}, which holds no text"
    left = (width - 5) // 2
    return f"{text[:left]} ... {text[len(text) - (width - 5 - left):]}"


def _safe(text: str) -> str:
    """Data in feedback cannot pass for a tag of ours or for a special token; only tag-like `<` are replaced."""
    return TAG_LIKE.sub("‹", text)


def system_prompt(library: dict[str, Operator], config: CanvasConfig) -> str:
    """What the policy is told at the start; lists exactly the operators that are registered."""
    if config.brief:
        return f"Design a workflow, one edit a turn.\nOperators: {', '.join(library)}."
    listing = "\n".join(f"- {op.name} ({op.role}): {op.description}" for op in library.values())
    forms = "\n".join(FORMS.values())
    return f"""You design a workflow of operators that solves the task. The workflow is a graph on a canvas. Each turn you write
exactly one edit; the canvas checks it, runs what changed and answers with feedback. Build step by step, react to the
results, and finish when the solution is right. You do not solve the task yourself.

Operators:
{listing}

Edits, one a turn, in these forms (<position>N</position> inserts before stage N; <prompt>...</prompt> after an operator
gives it an instruction of your own; a conditional runs <true> when its checker finds a problem):
{forms}"""


def main() -> None:
    import play  # late: it stands above this file

    play.main()


if __name__ == "__main__":
    main()
