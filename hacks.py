"""What in a workflow does nothing: graphs that collect R_div without being used.

R_div counts nodes and structures, whatever they are for. Four ways to collect it for nothing, each a name in HACKS:

    no_op           an operator that failed, or whose output no later step and not the answer depends on
    idle_parallel   a parallel of which fewer than two branches have an output that is used
    idle_control    a conditional that can never fire (its checker fails: nothing to check, no tests), or whose branches are
                    no_op; a loop that cannot repeat (count 1) or whose body is no_op
    after_format    an operator behind the last stage that holds a Format

The first three are liveness, as a compiler finds dead code: backward from the answer, an operator is used if it writes what is
read later. What it wrote is known from its last execution; of one that never ran (a branch not taken) by its role. What an
operator reads it declares. Whether a reader profited from what it read nobody knows, so nothing is concluded from values: a
Revise that returns the solution unchanged is used. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from graph import Node, Stage

if TYPE_CHECKING:
    from canvas import Canvas

HACKS = ("no_op", "idle_parallel", "idle_control", "after_format")
WRITES = {"plan": {"plan", "subproblems"}, "check": {"feedback"}}  # of a node that never ran, by role; the others: a solution


@dataclass
class Credit:
    """What is used: operator names and kinds of structure; and how often each hack occurs."""

    operators: list[str] = field(default_factory=list)
    structures: list[str] = field(default_factory=list)
    hacks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HACKS, 0))


class _Liveness:
    """Backward over the stages. `live`: the keys of the state that something behind this point reads."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas, self.live, self.used = canvas, {"solution"}, set()

    def failed(self, node: Node) -> bool:
        result = self.canvas.results.get(node.id)
        return bool(result and result.error)

    def role(self, node: Node) -> str:
        return self.canvas.library[node.operator].role

    def writes(self, node: Node) -> set[str]:
        """What it changes; a new solution is a candidate too."""
        result = self.canvas.results.get(node.id)
        if result:
            written = set() if result.error else set(result.writes)
        else:
            written = WRITES.get(self.role(node), {"solution", "code"})
        return written | ({"candidates"} if "solution" in written else set())

    def use(self, *nodes: Node) -> None:
        for node in nodes:
            self.used.add(node.id)
            self.live |= set(self.canvas.library[node.operator].reads)

    def step(self, node: Node, always: bool = True) -> None:
        """One node. Where it always runs, what it writes hides what was there; candidates pile up until an ensemble."""
        written = self.writes(node)
        if written & self.live:
            if always:
                self.live -= written - (set() if self.role(node) == "ensemble" else {"candidates"})
            self.use(node)

    def parallel(self, nodes: list[Node]) -> None:
        """Branches do not read each other. The last solution wins, all are candidates, notes stand side by side."""
        used, hidden, changed = [], set(), set()
        for node in reversed(nodes):
            written = self.writes(node)
            if written & (self.live - hidden):
                used.append(node)
            hidden |= written & {"solution", "code"}
            changed |= written - {"candidates"}
        self.live -= changed
        self.use(*used)

    def conditional(self, condition: Node, branches: list[Node]) -> None:
        """The condition is used where a branch is, or its notes are. Branches may be skipped, so they hide nothing."""
        used = [node for node in branches if not self.failed(condition) and self.writes(node) & self.live]
        self.use(*used)
        notes = self.writes(condition)
        if used or notes & self.live:
            self.live -= notes
            self.use(condition)

    def loop(self, nodes: list[Node], count: int) -> None:
        for _ in range(min(count, 2) + 1):  # what the next round reads is live at the end of this one
            for node in reversed(nodes):
                self.step(node, always=False)
        works = any(node.id in self.used and self.role(node) != "check" for node in nodes)
        for node in nodes:  # a checker decides whether to go on
            if count > 1 and works and self.role(node) == "check" and not self.failed(node):
                self.use(node)

    def stage(self, stage: Stage) -> None:
        if stage.kind == "parallel":
            self.parallel(stage.nodes)
        elif stage.kind == "conditional":
            self.conditional(stage.nodes[0], stage.nodes[1:])
        elif stage.kind == "loop" and stage.count > 1:
            self.loop(stage.nodes, stage.count)
        else:
            for node in reversed(stage.nodes):
                self.step(node)


def rates(found: Sequence[tuple[dict[str, int], int]]) -> dict[str, float]:
    """Means over graphs, given (hacks, number of operators) of each: for no_op the share of its operators that are, for the
    others whether there is any."""
    return {name: fmean(hacks.get(name, 0) / max(n, 1) if name == "no_op" else bool(hacks.get(name)) for hacks, n in found)
            for name in HACKS}


def credit(canvas: Canvas) -> Credit:
    """Return what is used in a canvas that has been run, and the hacks in it."""
    stages, found = canvas.graph.stages, Credit()
    liveness = _Liveness(canvas)
    for stage in reversed(stages):
        liveness.stage(stage)
    formats = [i for i, stage in enumerate(stages) if any(liveness.role(node) == "format" for node in stage.nodes)]
    for i, stage in enumerate(stages):
        late = bool(formats) and i > formats[-1]
        used = [node for node in stage.nodes if node.id in liveness.used]
        found.hacks["no_op"] += len(stage.nodes) - len(used)
        found.hacks["after_format"] += late * len(stage.nodes)
        found.operators += [] if late else [node.operator for node in used]
        if stage.kind == "parallel":
            idle, name = len(used) < 2, "idle_parallel"
        elif stage.kind == "conditional":
            idle, name = not any(node in used for node in stage.nodes[1:]), "idle_control"
        else:
            idle, name = not used or stage.count < 2, "idle_control"
        if stage.kind != "operator":
            found.hacks[name] += idle
            found.structures += [] if idle or late else [stage.kind]
    return found
