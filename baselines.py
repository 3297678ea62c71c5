"""What a learned policy must beat: a random legal editor, the best fixed workflow, and the best that can be reached.

* `random_edit` picks uniformly among the kinds of edit that are legal now, then uniformly among their arguments. It knows
  the grammar and nothing else; its accuracy is the floor.
* `ordered_edit` also knows the usual order of the roles and how many turns are left, as any language model does that has read
  of agents, and nothing of which operator suits which task. The warm start of the tiny preset imitates it.
* `best_fixed` is what a random editor finds in a given number of episodes when one workflow must serve every task.
* `best_reachable` searches a family of several hundred workflows for each source, on training tasks, and scores the
  winners on the held-out ones: the best that a policy can do which tells sources apart and nothing else.
* `direct` is the executor alone, asked once; `self_consistency` the executor alone, asked until it spent as many tokens as
  the policy's workflow did on that task, then a majority vote: what the same money buys without a workflow.

Standard library only; runs the same canvas, operators, sandbox and graders as training does.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import operators
from canvas import Canvas, Graph
from graph import MAX_COUNT
from rewards import Grade, answer_key
from tasks import Task

NewCanvas = Callable[[Task], Canvas]
Grader = Callable[[Task, str], Grade]
PROMPTS = ("Be careful.", "Work step by step.", "Check every number.", "Answer in few words.")


def random_edit(canvas: Canvas, rng: random.Random) -> str:
    """One legal edit as text. Legal: the canvas accepts it; a refused finish is the only exception."""
    graph, library = canvas.graph, canvas.library
    names, nodes = list(library), graph.nodes()
    checkers = [name for name in names if library[name].role == "check"]
    free = [name for name in names if library[name].role != "ensemble"]  # what may stand inside a parallel
    kinds = ["add", "finish", "loop"] + ["parallel"] * (len(free) > 1) + ["conditional"] * bool(checkers)
    kind = rng.choice(kinds + ["delete", "modify", "set_prompt"] * bool(nodes))
    head = f"<action>{kind if kind in ('delete', 'modify', 'set_prompt', 'finish') else 'add'}</action>"
    if kind == "finish":
        return head
    if kind == "delete":
        return f"{head}<target>{rng.choice(graph.stages).id}</target>"
    if kind in ("modify", "set_prompt"):
        stage = rng.choice(graph.stages)
        node = rng.choice(stage.nodes)
        if kind == "set_prompt":
            return f"{head}<target>{node.id}</target><prompt>{rng.choice(PROMPTS)}</prompt>"
        legal = free if stage.kind == "parallel" else names
        if stage.kind == "conditional" and node is stage.nodes[0]:
            legal = checkers
        return f"{head}<target>{node.id}</target><operator>{rng.choice(legal)}</operator>"
    if kind == "add":
        body = f"<operator>{rng.choice(names)}</operator>"
    elif kind == "conditional":
        body = f"<structure>conditional</structure><condition>{rng.choice(checkers)}</condition><true>{rng.choice(names)}</true>"
        body += f"<false>{rng.choice(names)}</false>" * rng.randint(0, 1)
    else:
        chosen = rng.choices(free if kind == "parallel" else names, k=rng.randint(2, 4))
        body = f"<structure>{kind}</structure><operators>{', '.join(chosen)}</operators>"
        body += f"<count>{rng.randint(1, MAX_COUNT // 3)}</count>" * (kind == "loop")
    if graph.stages and rng.random() < 0.25:
        body += f"<position>{rng.randint(1, len(graph.stages) + 1)}</position>"
    return head + body


# What may follow a step of a workflow in its usual order; "" is the empty canvas.
ORDER = {"": ("plan", "solve", "parallel"), "plan": ("plan", "solve", "parallel"), "solve": ("repair", "format"),
         "parallel": ("ensemble",), "ensemble": ("repair", "format"), "repair": ("repair", "format"), "format": ("finish",),
         "finish": ()}
SLIPS = 0.15  # share of the edits that delete, modify or set a prompt, so that the policy knows these too


def orders(step: str, turns: int, plans: int) -> int:
    """In how many usual orders a workflow can be finished within `turns` if `step` comes next and `plans` operators plan."""
    if not turns or (step == "plan" and not plans):
        return 0
    rest = sum(orders(following, turns - 1, plans - (step == "plan")) for following in ORDER[step])
    return rest or step == "finish"


def ordered_edit(canvas: Canvas, rng: random.Random) -> str:
    """One edit of a workflow that is drawn uniformly among the usual orders that fit into the turns, then uniformly among the
    operators of each role. The library must have operators of all six roles.

    Plan (each operator once), solve (one solver, or several in a parallel and an ensemble), check and revise any number of
    times, format, finish; with SLIPS a change of what is there, while that leaves time enough.
    """
    graph, left = canvas.graph, canvas.config.max_turns - canvas.turn
    role = {name: op.role for name, op in canvas.library.items()}
    named = {kind: [name for name in role if role[name] == kind] for kind in role.values()}
    last = ""
    if graph.stages:
        if rng.random() < SLIPS and left > 5:  # so many are enough for any rest
            return _changed(graph, role, named, rng)
        stage = graph.stages[-1]
        last = role[stage.nodes[-1].operator]
        last = "parallel" if stage.kind == "parallel" else "repair" if last in ("check", "revise") else last
    used = set(graph.operators())
    fresh = [name for name in named["plan"] if name not in used]
    weights = [orders(step, left, len(fresh)) for step in ORDER[last]]
    step = rng.choices(ORDER[last], weights)[0] if any(weights) else "finish"
    if step == "finish":
        return "<action>finish</action>"
    head, body = "<action>add</action>", ""
    if step == "parallel":
        chosen = rng.sample(named["solve"], rng.randint(2, len(named["solve"])))
        body = f"<structure>parallel</structure><operators>{', '.join(chosen)}</operators>"
    elif step == "repair":
        body = _repair(rng.choice(named["check"]), rng.choice(named["revise"]), rng)
    return head + (body or f"<operator>{rng.choice(fresh if step == 'plan' else named[step])}</operator>")


def _changed(graph: Graph, role: dict[str, str], named: dict[str, list[str]], rng: random.Random) -> str:
    """Take back the last stage, give a node another operator of its role, or set its prompt: the order stays a usual one."""
    kind = rng.choice(("delete", "modify", "set_prompt"))
    node = graph.stages[-1] if kind == "delete" else rng.choice(graph.nodes())
    head = f"<action>{kind}</action><target>{node.id}</target>"
    if kind == "modify":
        return f"{head}<operator>{rng.choice(named[role[node.operator]])}</operator>"
    return head + f"<prompt>{rng.choice(PROMPTS)}</prompt>" * (kind == "set_prompt")


def _repair(checker: str, reviser: str, rng: random.Random) -> str:
    form = rng.choice(("check", "revise", "conditional", "loop"))
    if form == "conditional":
        return f"<structure>conditional</structure><condition>{checker}</condition><true>{reviser}</true>"
    if form == "loop":
        return (f"<structure>loop</structure><operators>{checker}, {reviser}</operators>"
                f"<count>{rng.randint(2, MAX_COUNT - 1)}</count>")
    return f"<operator>{checker if form == 'check' else reviser}</operator>"


def random_graph(canvas: Canvas, rng: random.Random) -> Graph:
    """The graph that a random editor ends with. It does not read feedback, so nothing need be run on the way."""
    canvas.run_graph = lambda: None  # type: ignore[method-assign]
    while not canvas.done:
        canvas.step(random_edit(canvas, rng))
    return canvas.graph


def score_workflow(text: str, task: Task, new_canvas: NewCanvas, grade: Grader) -> float:
    """Grader score in [0, 1] of one workflow on one task."""
    canvas = new_canvas(task)
    canvas.graph = Graph.from_text(text)
    canvas.run_graph()
    result = grade(task, canvas.answer)
    if result.error:
        raise OSError(f"the grader failed on {task.id}: {result.error}")
    return result.score


@dataclass(frozen=True)
class Scored:
    workflow: str
    accuracy: float


def _accuracies(workflows: Sequence[str], tasks: Sequence[Task], new_canvas: NewCanvas, grade: Grader) -> list[float]:
    """Mean score of each workflow over the tasks."""
    with ThreadPoolExecutor(4) as pool:  # the sandbox waits for processes; the rest is Python and takes turns
        pairs = itertools.product(workflows, tasks)
        scores = list(pool.map(lambda pair: score_workflow(*pair, new_canvas, grade), pairs))
    n = len(tasks)
    return [sum(scores[i * n:(i + 1) * n]) / n for i in range(len(workflows))]


def _halving(workflows: Sequence[str], tasks: Sequence[Task], new_canvas: NewCanvas, grade: Grader, first: int = 4) -> str:
    """Successive halving: all workflows on a few tasks, the better quarter on four times as many, and so on."""
    left, n = list(workflows), min(first, len(tasks))
    while len(left) > 1:
        accuracies = _accuracies(left, tasks[:n], new_canvas, grade)
        order = sorted(range(len(left)), key=lambda i: (-accuracies[i], len(left[i])))  # ties: the shorter workflow
        if n >= len(tasks):
            return left[order[0]]
        left, n = [left[i] for i in order[: max(1, len(left) // 4)]], n * 4
    return left[0]


def best_fixed(train: Sequence[Task], held_out: Sequence[Task], new_canvas: NewCanvas, grade: Grader, episodes: int,
               seed: int) -> Scored:
    """The best single workflow for all tasks that a random editor finds in `episodes` episodes, half of them spent on
    finding graphs (each tried on its own task), half on comparing the best of those on training tasks."""
    rng = random.Random(f"{seed}/best fixed")
    tasks = [rng.choice(train) for _ in range(episodes // 2)]
    graphs = [random_graph(new_canvas(task), rng).to_text() for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda pair: score_workflow(*pair, new_canvas, grade), zip(graphs, tasks, strict=True)))
    order = sorted(range(len(graphs)), key=lambda i: -scores[i])
    finalists = list(dict.fromkeys(graphs[i] for i in order))[: max(2, episodes // 2 // 48)]
    sample = rng.sample(list(train), min(len(train), 48))
    accuracies = _accuracies(finalists, sample, new_canvas, grade)
    best = finalists[max(range(len(finalists)), key=accuracies.__getitem__)]
    return Scored(best, _accuracies([best], held_out, new_canvas, grade)[0])


def family(has_code_tests: bool) -> list[str]:
    """A few hundred workflows: every combination of preparation, solving, checking with repair, and formatting."""
    prepare = ("", "Plan", "Decompose", "Plan -> Decompose")
    solve = ("Programmer", "Custom", "AnswerGenerate", "[Programmer, Custom] -> Aggregate",
             "[Custom, AnswerGenerate] -> Aggregate", "[Programmer, Custom, AnswerGenerate] -> ScEnsemble",
             "[Programmer, Custom, AnswerGenerate] -> Aggregate", "AnswerGenerate -> Custom")
    repair = ["", "(Review ? Revise : done)", "(Verify ? Revise : done)", "(Review -> Revise) * 3", "(Verify -> Revise) * 3",
              "(Verify -> Revise) * 3 -> (Review -> Revise) * 3", "(Review -> Revise) * 8", "(Verify -> Revise) * 8"]
    if has_code_tests:
        repair += ["(Test ? Revise : done)", "(Test -> Revise) * 3", "(Test -> Revise) * 8",
                   "(Test -> Revise) * 8 -> (Review -> Revise) * 3", "(Test -> Revise) * 8 -> (Review ? Revise : done)"]
    return [" -> ".join(filter(None, parts)) for parts in itertools.product(prepare, solve, repair, ("Format",))]


def best_reachable(train: Sequence[Task], held_out: Sequence[Task], new_canvas: NewCanvas, grade: Grader,
                   max_turns: int) -> list[dict]:
    """Search the family for each source. Returns rows {source, workflow, accuracy, tasks}.

    A stage takes a turn to add, so a workflow of more than max_turns stages is out of a policy's reach, and out of this.
    """
    rows = []
    for source in sorted({task.source for task in held_out}):
        mine, theirs = ([task for task in tasks if task.source == source] for tasks in (train, held_out))
        workflows = [text for text in family(any(task.public_tests for task in theirs))
                     if len(Graph.from_text(text).stages) <= max_turns]
        best = _halving(workflows, mine or theirs, new_canvas, grade)
        accuracy = _accuracies([best], theirs, new_canvas, grade)[0]
        rows.append({"source": source, "workflow": best, "accuracy": accuracy, "tasks": len(theirs)})
    return rows


def random_editor(tasks: Sequence[Task], new_canvas: NewCanvas, grade: Grader, seed: int) -> float:
    """Mean grader score of episodes played by `random_edit`, one a task."""
    def play(task: Task) -> float:
        text = random_graph(new_canvas(task), random.Random(f"{seed}/random editor/{task.id}")).to_text()
        return score_workflow(text, task, new_canvas, grade)

    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(play, tasks))
    return sum(scores) / len(scores)


# ---- baselines of an evaluation: each returns a canvas, with answer and usage ------------------------------------------------


def fixed(text: str, task: Task, new_canvas: NewCanvas) -> Canvas:
    """One given workflow, run once. Raises GraphError for a text that is none."""
    canvas = new_canvas(task)
    canvas.graph = Graph.from_text(text)
    for node in canvas.graph.nodes():
        node.operator = canvas._canonical(node.operator)
    for stage in canvas.graph.stages:
        canvas._check_roles(stage.kind, [node.operator for node in stage.nodes])
    canvas.run_graph()
    return canvas


def random_workflow(task: Task, new_canvas: NewCanvas, seed: str) -> Canvas:
    """The workflow that a random legal editor ends with, run once."""
    return fixed(random_graph(new_canvas(task), random.Random(seed)).to_text() or "Custom", task, new_canvas)


def direct(task: Task, new_canvas: NewCanvas, attempt: int = 0) -> Canvas:
    """The executor alone: one call, whose reply is the answer. A further attempt says so in its prompt, so that an executor
    at temperature 0 does not give the same reply again."""
    canvas = new_canvas(task)
    op = operators.REGISTRY["CustomCodeGenerate" if task.kind == "code" else "AnswerGenerate"]
    canvas.library = {op.name: op}  # whatever library the policy is given
    canvas.graph = Graph.from_text(op.name)
    canvas.graph.nodes()[0].prompt = f"{op.prompt}\nThis is independent attempt {attempt + 1}." if attempt else None
    canvas.run_graph()
    return canvas


MAX_ATTEMPTS = 64


def self_consistency(task: Task, new_canvas: NewCanvas, token_budget: float) -> Canvas:
    """The executor alone, asked again as long as one more call of average size fits into the budget (once at least), then a
    vote over equal results; the first of the commonest wins. Programs that fail the public tests have no vote."""
    spent, answers, total = 0, [], new_canvas(task)
    for attempt in range(MAX_ATTEMPTS):
        canvas = direct(task, new_canvas, attempt)
        total.usage.add(canvas.usage)
        spent += canvas.usage.prompt_tokens + canvas.usage.completion_tokens
        answers += [canvas.answer] if canvas.answer else []
        if spent == 0 or spent + spent / (attempt + 1) > token_budget:  # no tokens: the server reports none
            break
    if task.public_tests:
        passing = [a for a in answers if operators.run_tests(a, task.public_tests, task.entry_point).passed]
        answers = passing or answers
    keys = [answer_key(task, answer) for answer in answers]
    if keys:
        total._final_answer = answers[keys.index(Counter(keys).most_common(1)[0][0])]
    return total
