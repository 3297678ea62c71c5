"""The edit grammar: what the Flow-Director writes in a turn, read into an `Edit` or refused as an `InvalidEdit`.

Exactly one edit counts: the first complete one. What stands before it is reasoning; what stands behind it is ignored,
and the canvas says so. Prose is never turned into an edit. Reading is one pass over the tags, so that hostile text of
any length costs linear time, and it never raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from graph import DEFAULT_COUNT, MAX_COUNT, STRUCTURES

FORMS = {
    "add": "<action>add</action><operator>NAME</operator>",
    "parallel": "<action>add</action><structure>parallel</structure><operators>NAME, NAME</operators>",
    "conditional": "<action>add</action><structure>conditional</structure><condition>CHECKER</condition><true>NAME</true>",
    "loop": "<action>add</action><structure>loop</structure><operators>NAME, NAME</operators><count>2</count>",
    "delete": "<action>delete</action><target>n1</target>",
    "modify": "<action>modify</action><target>n1</target><operator>NAME</operator>",
    "set_prompt": "<action>set_prompt</action><target>n1</target><prompt>TEXT</prompt>",
    "finish": "<action>finish</action>",
}
# Tags that may follow each action. A tag that does not belong to the edit, or comes a second time, ends the edit.
FIELDS = {
    "add": ("operator", "structure", "operators", "condition", "true", "false", "count", "position", "prompt"),
    "delete": ("target",),
    "modify": ("target", "operator", "prompt"),
    "set_prompt": ("target", "prompt"),
    "finish": ("answer",),
}
TAGS = ("action", "operator", "operators", "structure", "condition", "true", "false", "count", "position", "prompt",
        "target", "answer")
TAG = re.compile(rf"<(/?)({'|'.join(sorted(TAGS, key=len, reverse=True))})>", re.IGNORECASE | re.ASCII)
THINK_END = re.compile("</think>", re.IGNORECASE)


@dataclass(frozen=True)
class Edit:
    action: str
    operators: tuple[str, ...] = ()  # one for a plain add and for modify; condition, true[, false] for a conditional
    structure: str = "operator"
    count: int = 1
    position: int | None = None  # 1-based; None appends
    target: str = ""
    prompts: tuple[str, ...] = field(default=())
    answer: str | None = None
    reasoning: str = ""
    ignored: bool = False  # something that looks like an edit followed and was not used


@dataclass(frozen=True)
class InvalidEdit:
    reason: str
    form: str  # the right form, to be shown to the policy
    reasoning: str = ""


class _Invalid(Exception):
    """(reason, key of FORMS)"""


def strip_tags(text: str) -> str:
    """`text` without edit tags and without a leading <think> block: what a prompt written in prose says."""
    return TAG.sub("", _after_thinking(text)[1] or "").strip()


def parse_edit(text: str) -> Edit | InvalidEdit:
    """Read the first complete edit of `text`. Never raises; returns InvalidEdit with a reason and the right form."""
    reasoning, rest = _after_thinking(text)
    if rest is None:
        return InvalidEdit("the think block is not closed", FORMS["add"], text)
    fields = _fields(rest)
    actions = [i for i, (name, *_) in enumerate(fields) if name == "action"]
    if not actions:
        return InvalidEdit("no edit found", FORMS["add"], text)
    first_error: _Invalid | None = None
    for i in actions:
        try:
            values, used = _read(fields, i)
        except _Invalid as error:
            first_error = first_error or error
            continue
        return Edit(**values, reasoning=(reasoning + rest[: fields[i][2]]).strip(), ignored=used < len(fields))
    assert first_error is not None, "no action was read, none was refused"
    reason, form = first_error.args
    return InvalidEdit(reason, FORMS[form], (reasoning + rest[: fields[actions[0]][2]]).strip())


def _after_thinking(text: str) -> tuple[str, str | None]:
    """(thinking, what follows it). Drafts inside <think> are reasoning, not edits; None: the block is not closed."""
    if not text.lstrip().lower().startswith("<think>"):
        return "", text
    match = THINK_END.search(text)
    return (text[: match.end()], text[match.end():]) if match else (text, None)


def _fields(text: str) -> list[tuple[str, str, int]]:
    """(tag name, content, start) of every closed tag, left to right. Tags inside a content are content."""
    tags = [(m[2].lower(), m[1] == "/", *m.span()) for m in TAG.finditer(text)]
    next_close: dict[str, int] = {}
    closes = [0] * len(tags)  # index of the next closing tag of the same name
    for i in range(len(tags) - 1, -1, -1):
        name, is_close, *_ = tags[i]
        closes[i] = next_close.get(name, -1)
        if is_close:
            next_close[name] = i
    fields, i = [], 0
    while i < len(tags):
        name, is_close, start, end = tags[i]
        if is_close or closes[i] < 0:
            i += 1
            continue
        fields.append((name, text[end:tags[closes[i]][2]].strip(), start))
        i = closes[i] + 1
    return fields


def _read(fields: list[tuple[str, str, int]], at: int) -> tuple[dict[str, Any], int]:
    """What makes the edit whose action is fields[at], and the index behind its last field."""
    action = fields[at][1].lower()
    if action not in FIELDS:
        raise _Invalid(f"unknown action {action[:40]!r}; actions are {', '.join(FIELDS)}", "add")
    got: dict[str, str] = {}
    prompts = []
    i = at + 1
    while i < len(fields) and fields[i][0] in FIELDS[action] and (fields[i][0] == "prompt" or fields[i][0] not in got):
        name, content, _ = fields[i]
        got[name] = content
        if name == "prompt":
            prompts.append(content)
        i += 1
    values: dict[str, Any] = {"action": action, "prompts": tuple(prompts)}
    if action == "finish":
        values["answer"] = got.get("answer")
    elif action == "add":
        values.update(_read_add(got))
    else:
        values["target"] = _need(got, "target", action).lower()
        if action == "modify":
            values["operators"] = (_need(got, "operator", action),)
        if action == "set_prompt":
            _need(got, "prompt", action)
        if len(prompts) > 1:
            raise _Invalid("one node takes one prompt", action)
    return values, i


def _need(got: dict[str, str], name: str, form: str) -> str:
    if not got.get(name):
        raise _Invalid(f"{form} needs a {name} tag", form)
    return got[name]


def _read_add(got: dict[str, str]) -> dict:
    kind = got.get("structure", "operator").lower()
    if kind not in ("operator", *STRUCTURES):
        raise _Invalid(f"unknown structure {kind[:40]!r}; structures are {', '.join(STRUCTURES)}", "parallel")
    form = "add" if kind == "operator" else kind
    if kind == "operator":
        allowed, operators = {"operator"}, [_need(got, "operator", "add")]
    elif kind == "conditional":
        allowed = {"condition", "true", "false"}
        operators = [_need(got, "condition", kind), _need(got, "true", kind)]
        if got.get("false", "done").lower() != "done":
            operators.append(got["false"])
    else:
        allowed = {"operators", "count"} if kind == "loop" else {"operators"}
        operators = [name.strip() for name in _need(got, "operators", kind).split(",")]
        if not all(operators):
            raise _Invalid("operators has an empty name", kind)
    if stray := [name for name in got if name not in allowed | {"structure", "position", "prompt"}]:
        raise _Invalid(f"{stray[0]} does not belong to this {form}", form)
    count = DEFAULT_COUNT if kind == "loop" else 1
    if "count" in got:
        count = _number(got["count"], "count", form)
        if not 1 <= count <= MAX_COUNT:
            raise _Invalid(f"count is {count}; it must be 1 to {MAX_COUNT}", form)
    position = _number(got["position"], "position", form) if "position" in got else None
    return {"structure": kind, "operators": tuple(operators), "count": count, "position": position}


def _number(text: str, name: str, form: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text):  # not int(): it takes '１', '1_0' and 5,000 digits
        raise _Invalid(f"{name} must be a whole number, not {text[:20]!r}", form)
    return int(text)
