"""The workflow as a data structure: an ordered list of stages, its text form, and the changes that edits make.

A stage is an operator node, or a structure over operator nodes: `parallel`, `conditional` or `loop`. Structures do not
nest. Node ids are never reused, so that feedback about `n2` always means the same node.

    Plan -> [Programmer, Custom] -> Aggregate -> (Verify ? Revise : done) -> (Programmer -> Review) * 2 -> Format

The same text with ids (`n1:Plan -> n2:[n2.1:Programmer, n2.2:Custom]`) is what the policy reads in feedback. Both forms
are read back by `Graph.from_text`; the graph that is written is the graph that runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_NODES = 64  # operator nodes in one graph: a bound on what one episode can cost, refused openly, never cut in silence
MAX_COUNT = 10  # repetitions of a loop
DEFAULT_COUNT = 3
STRUCTURES = ("parallel", "conditional", "loop")


class GraphError(ValueError):
    """A change that would break the graph, or a text that is not a workflow. The message says how to mend it."""


@dataclass
class Node:
    id: str
    operator: str
    prompt: str | None = None  # None: the operator's default prompt


@dataclass
class Stage:
    """kind 'operator': one node with the stage's own id. Otherwise children n3.1, n3.2, ...; a conditional's children
    are condition, true branch and, if there is one, false branch, in this order."""

    id: str
    kind: str
    nodes: list[Node]
    count: int = 1
    born: int = 0  # children ever created: their ids are not reused either

    def to_text(self, ids: bool = False) -> str:
        names = [f"{node.id}:{node.operator}" if ids else node.operator for node in self.nodes]
        if self.kind == "operator":
            return names[0]
        if self.kind == "parallel":
            text = "[" + ", ".join(names) + "]"
        elif self.kind == "conditional":
            text = f"({names[0]} ? {names[1]} : {names[2] if len(names) > 2 else 'done'})"
        else:
            text = "(" + " -> ".join(names) + f") * {self.count}"
        return f"{self.id}:{text}" if ids else text


@dataclass
class Graph:
    stages: list[Stage] = field(default_factory=list)
    born: int = 0  # stages ever created

    # ---- reading -------------------------------------------------------------------------------------------------

    def to_text(self, ids: bool = False) -> str:
        return " -> ".join(stage.to_text(ids) for stage in self.stages)

    def nodes(self) -> list[Node]:
        """Every operator node in order, nested ones too."""
        return [node for stage in self.stages for node in stage.nodes]

    def operators(self) -> list[str]:
        return [node.operator for node in self.nodes()]

    def structures(self) -> list[str]:
        return [stage.kind for stage in self.stages if stage.kind != "operator"]

    def find(self, target: str) -> tuple[Stage, Node | None]:
        """(stage, None) for a structure's own id, (stage, node) for an operator node. Raises GraphError."""
        for stage in self.stages:
            for node in stage.nodes:
                if node.id == target:
                    return stage, node
            if stage.id == target:
                return stage, None
        known = ", ".join([node.id for node in self.nodes()]) or "none, the graph is empty"
        raise GraphError(f"there is no node {target[:40]!r}; nodes are: {known}")

    # ---- changing ------------------------------------------------------------------------------------------------

    def insert(self, kind: str, operators: list[str], count: int = 1, position: int | None = None) -> Stage:
        """Add a stage before `position` (1-based; None appends) and return it. Raises GraphError."""
        if position is None:
            position = len(self.stages) + 1
        if not 1 <= position <= len(self.stages) + 1:
            raise GraphError(f"position {position} is outside 1..{len(self.stages) + 1}")
        if len(self.nodes()) + len(operators) > MAX_NODES:
            raise GraphError(f"a workflow holds at most {MAX_NODES} operators; delete some first")
        _check_shape(kind, len(operators), count)
        self.born += 1
        stage = Stage(f"n{self.born}", kind, [], count)
        for name in operators:
            self._add_child(stage, name)
        self.stages.insert(position - 1, stage)
        return stage

    def _add_child(self, stage: Stage, name: str) -> None:
        stage.born += 1
        stage.nodes.append(Node(stage.id if stage.kind == "operator" else f"{stage.id}.{stage.born}", name))

    def delete(self, target: str) -> None:
        """Remove a stage, or one child of a structure if a valid structure remains. Raises GraphError."""
        stage, node = self.find(target)
        if node is None or stage.kind == "operator":
            self.stages.remove(stage)
            return
        if stage.kind == "conditional" and stage.nodes.index(node) < 2:
            raise GraphError(f"a conditional needs its condition and its true branch; delete {stage.id} as a whole")
        try:
            _check_shape(stage.kind, len(stage.nodes) - 1, stage.count)
        except GraphError as error:
            raise GraphError(f"{error}; delete {stage.id} as a whole") from None
        stage.nodes.remove(node)

    # ---- text ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_text(cls, text: str) -> Graph:
        """Read either text form. Ids in the text are kept, missing ones are given. Raises GraphError with the place."""
        return _Reader(text).graph()


def _check_shape(kind: str, n: int, count: int) -> None:
    if kind not in ("operator", *STRUCTURES):
        raise GraphError(f"structure {kind[:40]!r} is not one of {', '.join(STRUCTURES)}")
    if kind == "parallel" and n < 2:
        raise GraphError("a parallel needs at least 2 operators")
    if kind == "loop" and n < 1:
        raise GraphError("a loop needs at least 1 operator")
    if kind == "conditional" and n not in (2, 3):
        raise GraphError("a conditional needs a condition, a true branch and optionally a false branch")
    if kind == "loop" and not 1 <= count <= MAX_COUNT:
        raise GraphError(f"a loop's count is {count}; it must be 1 to {MAX_COUNT}")


TOKEN = re.compile(r"\s*(?:(->)|([\[\](),?:*])|(n\d{1,6}(?:\.\d{1,6})?(?=\s*:))|([A-Za-z]\w*)|(\d{1,6})|(\S))")


class _Reader:
    """Recursive descent over the grammar  stage (-> stage)*.  One token of look-ahead, two to tell ( : ) from ids."""

    def __init__(self, text: str) -> None:
        self.tokens = []
        for match in TOKEN.finditer(text.rstrip()):
            if match.group(6):
                raise GraphError(f"character {match.start(6) + 1}: {match.group(6)!r} does not belong into a workflow")
            kind = ("", "arrow", "sign", "id", "name", "number")[match.lastindex or 0]
            self.tokens.append((kind, match.group(match.lastindex or 0), match.start(match.lastindex or 0)))
        self.tokens.append(("end", "the end", len(text)))
        self.at = 0
        self.seen: set[str] = set()

    def peek(self, value: str) -> bool:
        return self.tokens[self.at][1] == value

    def take(self, expected: str, kind: str | None = None) -> str:
        found_kind, found, place = self.tokens[self.at]
        if (kind and found_kind != kind) or (not kind and found != expected):
            raise GraphError(f"character {place + 1}: expected {expected}, found {found!r}")
        self.at += 1
        return found

    def identifier(self) -> str | None:
        """`n3:` or `n3.1:` in front of a stage or node."""
        if self.tokens[self.at][0] != "id":
            return None
        place = self.tokens[self.at][2]
        name = self.take("an id", "id")
        self.take(":")
        if name in self.seen:
            raise GraphError(f"character {place + 1}: the id {name} occurs twice")
        self.seen.add(name)
        return name

    def node(self) -> tuple[str | None, str]:
        own = self.identifier()
        place = self.tokens[self.at][2]
        name = self.take("an operator name", "name")
        if name.lower() == "done":
            raise GraphError(f"character {place + 1}: 'done' stands only in a conditional's false branch")
        return own, name

    def graph(self) -> Graph:
        found = []
        if self.tokens[0][0] != "end":
            found.append(self.stage())
            while self.tokens[self.at][0] != "end":
                self.take("->")
                found.append(self.stage())
        graph = Graph(born=max([int(own[1:]) for own, *_ in found if own], default=0))
        for own, kind, nodes, count in found:
            if strange := [child for child, _ in nodes if child and child.rpartition(".")[0] != own]:
                raise GraphError(f"the id {strange[0]} cannot stand inside {own or 'a stage without an id'}")
            stage = graph.insert(kind, [name for _, name in nodes], count)
            if own is None:
                continue
            graph.born -= 1  # insert gave a fresh id; the text had one
            stage.id = own
            if kind == "operator":
                stage.nodes[0].id = own
                continue
            stage.born = max((int(child.rpartition(".")[2]) for child, _ in nodes if child), default=0)
            for node, (child, _) in zip(stage.nodes, nodes, strict=True):
                stage.born += child is None
                node.id = child or f"{own}.{stage.born}"
        return graph

    def stage(self) -> tuple[str | None, str, list[tuple[str | None, str]], int]:
        own = self.identifier()
        if own and "." in own:
            raise GraphError(f"the id {own} belongs to a child, but stands before a stage")
        if self.peek("["):
            self.take("[")
            nodes = [self.node()]
            while self.peek(","):
                self.take(",")
                nodes.append(self.node())
            self.take("]")
            return own, "parallel", nodes, 1
        if not self.peek("("):
            return own, "operator", [self.node()], 1
        self.take("(")
        nodes = [self.node()]
        if self.peek("?"):
            self.take("?")
            nodes.append(self.node())
            self.take(":")
            if self.tokens[self.at][1].lower() == "done":
                self.at += 1
            else:
                nodes.append(self.node())
            self.take(")")
            return own, "conditional", nodes, 1
        while self.peek("->"):
            self.take("->")
            nodes.append(self.node())
        self.take(")")
        self.take("*")
        return own, "loop", nodes, int(self.take("a count", "number"))
