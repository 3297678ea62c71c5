"""edits.py: what counts as an edit, what is refused and with which words, and that no text can hurt the reader."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edits import FIELDS, FORMS, TAGS, Edit, InvalidEdit, parse_edit, strip_tags

ADD = "<action>add</action>"


def read(text: str) -> Edit:
    edit = parse_edit(text)
    assert isinstance(edit, Edit), edit
    return edit


# ---- accepted


@pytest.mark.parametrize(("text", "fields"), [
    (f"{ADD}<operator>Plan</operator>", {"operators": ("Plan",)}),
    (f"{ADD}<structure>operator</structure><operator>Plan</operator>", {"operators": ("Plan",)}),
    (f"{ADD}<operator>Plan</operator><position>2</position>", {"operators": ("Plan",), "position": 2}),
    (f"{ADD}<position>2</position><operator>Plan</operator>", {"operators": ("Plan",), "position": 2}),
    (f"{ADD}<operator>Plan</operator><prompt>Be brief.</prompt>", {"operators": ("Plan",), "prompts": ("Be brief.",)}),
    (f"{ADD}<structure>parallel</structure><operators>A, B ,C</operators><prompt>a</prompt><prompt></prompt><prompt>c</prompt>",
     {"structure": "parallel", "operators": ("A", "B", "C"), "prompts": ("a", "", "c")}),
    (f"{ADD}<structure>conditional</structure><condition>V</condition><true>R</true>",
     {"structure": "conditional", "operators": ("V", "R")}),
    (f"{ADD}<structure>conditional</structure><condition>V</condition><true>R</true><false>X</false>",
     {"structure": "conditional", "operators": ("V", "R", "X")}),
    (f"{ADD}<structure>conditional</structure><condition>V</condition><true>R</true><false>Done</false>",
     {"structure": "conditional", "operators": ("V", "R")}),
    (f"{ADD}<structure>loop</structure><operators>A</operators>", {"structure": "loop", "operators": ("A",), "count": 3}),
    (f"{ADD}<structure>loop</structure><operators>A, B</operators><count>10</count>",
     {"structure": "loop", "operators": ("A", "B"), "count": 10}),
    ("<action>delete</action><target>n2</target>", {"action": "delete", "target": "n2"}),
    ("<action>modify</action><target>n2</target><operator>B</operator>",
     {"action": "modify", "target": "n2", "operators": ("B",)}),
    ("<action>modify</action><target>n2</target><operator>B</operator><prompt>p</prompt>",
     {"action": "modify", "target": "n2", "operators": ("B",), "prompts": ("p",)}),
    ("<action>set_prompt</action><target>n3.1</target><prompt> two\nlines </prompt>",
     {"action": "set_prompt", "target": "n3.1", "prompts": ("two\nlines",)}),
    ("<action>finish</action>", {"action": "finish"}),
    ("<action>finish</action><answer> 42 </answer>", {"action": "finish", "answer": "42"}),
])
def test_every_edit_is_read(text: str, fields: dict[str, Any]) -> None:
    assert parse_edit(text) == Edit(**{"action": "add", **fields})


def test_every_form_that_is_shown_to_the_policy_is_read_as_what_it_shows() -> None:
    read_as = {key: (read(form).action, read(form).structure) for key, form in FORMS.items()}
    structures = ("parallel", "conditional", "loop")
    assert read_as == {key: ("add", key) if key in structures else (key, "operator") for key in FORMS}
    assert set(FIELDS) == {action for action, _ in read_as.values()}


def test_tags_actions_structures_and_targets_may_be_in_any_case_and_spaced() -> None:
    text = "<ACTION> Add </Action>\n\n<Structure>LOOP</structure> \n<OPERATORS> Plan ,  plan</operators><Count> 2 </COUNT>"
    assert read(text) == Edit("add", ("Plan", "plan"), "loop", 2)
    assert read("<action>DELETE</action> <target> N3.1 </target>").target == "n3.1"


# ---- exactly one edit


@pytest.mark.parametrize(("behind", "ignored"), [
    ("", False),
    (" That should do it.", False),  # nothing that looks like an edit was lost
    ("<action>finish</action>", True),
    ("<operator>Format</operator>", True),  # a second time
    ("<target>n1</target>", True),  # of another edit
    ("<answer>42</answer>", True),
    ("<action>nonsense</action>", True),
])
def test_the_first_complete_edit_counts_and_the_rest_is_ignored_openly(behind: str, ignored: bool) -> None:
    edit = read(f"{ADD}<operator>Plan</operator>{behind}")
    assert (edit.operators, edit.ignored) == (("Plan",), ignored)


def test_an_incomplete_edit_does_not_stand_in_the_way_of_a_complete_one() -> None:
    edit = read(f"{ADD} no operator here. <action>finish</action>")
    assert (edit.action, edit.reasoning, edit.ignored) == ("finish", f"{ADD} no operator here.", False)


def test_of_several_incomplete_edits_the_first_is_explained() -> None:
    edit = parse_edit(f"so {ADD}<action>delete</action>")
    assert edit == InvalidEdit("add needs a operator tag", FORMS["add"], "so")


def test_tags_inside_a_prompt_are_its_text() -> None:
    edit = read("<action>set_prompt</action><target>n1</target><prompt>Write <action>finish</action> at the end.</prompt>")
    assert (edit.prompts, edit.ignored) == (("Write <action>finish</action> at the end.",), False)


# ---- reasoning


def test_what_stands_before_the_edit_is_kept_as_reasoning() -> None:
    edit = read(f"First a plan. {ADD}<operator>Plan</operator>")
    assert (edit.reasoning, edit.ignored) == ("First a plan.", False)


def test_drafts_inside_a_think_block_are_reasoning_and_not_edits() -> None:
    edit = read(f" <Think>Maybe {ADD}<operator>Custom</operator>? No.</THINK>\nSo: {ADD}<operator>Plan</operator>")
    assert edit.operators == ("Plan",)
    assert edit.reasoning == f"<Think>Maybe {ADD}<operator>Custom</operator>? No.</THINK>\nSo:"


def test_an_unclosed_think_block_holds_no_edit() -> None:
    text = "<think> let me see <action>finish</action>"
    assert parse_edit(text) == InvalidEdit("the think block is not closed", FORMS["add"], text)


# ---- refused


@pytest.mark.parametrize(("text", "reason", "form"), [
    ("", "no edit found", "add"),
    ("I add a Plan operator and then finish.", "no edit found", "add"),  # prose is never turned into an edit
    ("<action>add", "no edit found", "add"),
    ("</action>add<action>", "no edit found", "add"),
    ("< action>finish</ action>", "no edit found", "add"),
    ("<operator>Plan</operator>", "no edit found", "add"),
    ("<action></action>", "unknown action ''; actions are add, delete, modify, set_prompt, finish", "add"),
    ("<action>undo</action>", "unknown action 'undo'; actions are add, delete, modify, set_prompt, finish", "add"),
    (ADD, "add needs a operator tag", "add"),
    (f"{ADD}<operator> </operator>", "add needs a operator tag", "add"),
    (f"<operator>Plan</operator>{ADD}", "add needs a operator tag", "add"),  # fields follow their action
    (f"{ADD}<structure>switch</structure>", "unknown structure 'switch'; structures are parallel, conditional, loop", "parallel"),
    (f"{ADD}<structure>parallel</structure><operator>A</operator>", "parallel needs a operators tag", "parallel"),
    (f"{ADD}<structure>parallel</structure><operators>A,,B</operators>", "operators has an empty name", "parallel"),
    (f"{ADD}<structure>parallel</structure><operators>A, B</operators><count>2</count>",
     "count does not belong to this parallel", "parallel"),
    (f"{ADD}<operator>A</operator><count>2</count>", "count does not belong to this add", "add"),
    (f"{ADD}<structure>conditional</structure><true>A</true>", "conditional needs a condition tag", "conditional"),
    (f"{ADD}<structure>conditional</structure><condition>A</condition>", "conditional needs a true tag", "conditional"),
    (f"{ADD}<structure>loop</structure>", "loop needs a operators tag", "loop"),
    (f"{ADD}<structure>loop</structure><operators>A</operators><count>0</count>", "count is 0; it must be 1 to 10", "loop"),
    (f"{ADD}<structure>loop</structure><operators>A</operators><count>11</count>", "count is 11; it must be 1 to 10", "loop"),
    (f"{ADD}<structure>loop</structure><operators>A</operators><count>two</count>",
     "count must be a whole number, not 'two'", "loop"),
    (f"{ADD}<operator>A</operator><position>-1</position>", "position must be a whole number, not '-1'", "add"),
    (f"{ADD}<operator>A</operator><position>１</position>", "position must be a whole number, not '１'", "add"),
    (f"{ADD}<operator>A</operator><position>{'9' * 5000}</position>",
     f"position must be a whole number, not '{'9' * 20}'", "add"),
    ("<action>delete</action>", "delete needs a target tag", "delete"),
    ("<action>modify</action><target>n1</target>", "modify needs a operator tag", "modify"),
    ("<action>modify</action><operator>A</operator>", "modify needs a target tag", "modify"),
    ("<action>modify</action><target>n1</target><operator>A</operator><prompt>p</prompt><prompt>q</prompt>",
     "one node takes one prompt", "modify"),
    ("<action>set_prompt</action><target>n1</target>", "set_prompt needs a prompt tag", "set_prompt"),
    ("<action>set_prompt</action><target>n1</target><prompt> </prompt>", "set_prompt needs a prompt tag", "set_prompt"),
])
def test_anything_else_is_refused_with_a_reason_and_the_right_form(text: str, reason: str, form: str) -> None:
    edit = parse_edit(text)
    assert isinstance(edit, InvalidEdit)
    assert (edit.reason, edit.form) == (reason, FORMS[form])


# ---- no text can hurt

pieces = st.one_of(
    st.sampled_from([f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]),
    st.sampled_from(["<think>", "</think>", "add", "finish", "n1", "Plan, Custom", "<", ">", "</", "İ", "2", "\ud800", "\x00"]),
    st.text(max_size=6),
)


@given(st.lists(pieces, max_size=30).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_text_is_an_edit_or_an_invalid_edit_and_never_an_exception(text: str) -> None:
    edit = parse_edit(text)
    assert isinstance(edit, Edit | InvalidEdit)
    assert edit.reasoning in text
    assert all(f"<{tag}>" not in strip_tags(text).lower() or "<<" in text for tag in ("action", "prompt"))


@pytest.mark.parametrize(("text", "prompt"), [
    ("Be brief.", "Be brief."),
    ("<prompt> Be brief. </prompt>", "Be brief."),
    ("<think>What to say?</think>\nUse <b>bold</b>.", "Use <b>bold</b>."),
    ("<think>never closed", ""),
    ("", ""),
])
def test_a_prompt_in_prose_loses_its_tags_and_its_thinking(text: str, prompt: str) -> None:
    assert strip_tags(text) == prompt


@pytest.mark.parametrize("unit", [
    "<action>x</action>", "<prompt>", "</prompt><prompt>", "<operator>A</operator>", f"{ADD}<operator>", "<", "<action", "\n ",
    "<think>", f"{ADD}<structure>loop</structure><operators>,</operators>",
])
def test_reading_takes_linear_time(unit: str) -> None:
    """Eight times the text takes eight times as long; a quadratic reader would take 64 times as long."""
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        start = time.process_time()
        parse_edit(text)
        return time.process_time() - start

    assert seconds(100_000) < 32 * max(seconds(12_500), 0.005)
