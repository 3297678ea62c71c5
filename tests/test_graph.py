"""graph.py: both text forms, every error of the reader with its place, ids that are never reused."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph import DEFAULT_COUNT, MAX_NODES, Graph, GraphError, Stage

EXAMPLE = "Plan -> [Programmer, Custom] -> Aggregate -> (Verify ? Revise : done) -> (Programmer -> Review) * 2 -> Format"
WITH_IDS = ("n1:Plan -> n2:[n2.1:Programmer, n2.2:Custom] -> n3:Aggregate -> n4:(n4.1:Verify ? n4.2:Revise : done)"
            " -> n5:(n5.1:Programmer -> n5.2:Review) * 2 -> n6:Format")


def ids(graph: Graph) -> list[str]:
    return [node.id for node in graph.nodes()]


# ---- text


def test_the_documented_example_reads_and_writes_with_and_without_ids() -> None:
    graph = Graph.from_text(EXAMPLE)
    assert (graph.to_text(), graph.to_text(ids=True)) == (EXAMPLE, WITH_IDS)
    assert Graph.from_text(WITH_IDS) == graph


def test_operators_and_structures_are_listed_in_order_nested_ones_too() -> None:
    graph = Graph.from_text(EXAMPLE)
    assert graph.operators() == [
        "Plan", "Programmer", "Custom", "Aggregate", "Verify", "Revise", "Programmer", "Review", "Format"]
    assert graph.structures() == ["parallel", "conditional", "loop"]


@pytest.mark.parametrize(("text", "canonical"), [
    ("", ""),
    ("  Plan->Format\n ", "Plan -> Format"),
    ("(Verify?Revise:DONE)", "(Verify ? Revise : done)"),
    ("(Verify ? Revise : Custom)", "(Verify ? Revise : Custom)"),
    ("(A)*10", "(A) * 10"),
    ("[A,B,A]", "[A, B, A]"),
    ("n7 -> n2 ", "n7 -> n2"),  # without a colon these are names
])
def test_blanks_do_not_matter_and_the_form_written_is_canonical(text: str, canonical: str) -> None:
    assert Graph.from_text(text).to_text() == canonical


@pytest.mark.parametrize(("text", "written", "next_id"), [
    ("n3:A -> n1:B", "n3:A -> n1:B", "n4"),  # an edited graph: order is not the order of birth
    ("A -> n4:B -> C", "n5:A -> n4:B -> n6:C", "n7"),
    ("n2:[A, n2.1:B]", "n2:[n2.2:A, n2.1:B]", "n3"),  # a missing child id is a fresh one
    ("n1:(n1.5:A -> B) * 2", "n1:(n1.5:A -> n1.6:B) * 2", "n2"),
])
def test_ids_in_a_text_are_kept_and_missing_ones_are_fresh(text: str, written: str, next_id: str) -> None:
    graph = Graph.from_text(text)
    assert graph.to_text(ids=True) == written
    assert graph.insert("operator", ["New"]).id == next_id


@pytest.mark.parametrize(("text", "message"), [
    ("->", "character 1: expected an operator name, found '->'"),
    ("A ->", "character 5: expected an operator name, found 'the end'"),
    ("A B", "character 3: expected ->, found 'B'"),
    ("A; B", "character 2: ';' does not belong into a workflow"),
    ("A -> 7", "character 6: expected an operator name, found '7'"),
    ("[A]", "a parallel needs at least 2 operators"),
    ("[A, B", "character 6: expected ], found 'the end'"),
    ("[]", "character 2: expected an operator name, found ']'"),
    ("(A ? B)", "character 7: expected :, found ')'"),
    ("(A ? done : B)", "character 6: 'done' stands only in a conditional's false branch"),
    ("(A ? B : C) * 2", "character 13: expected ->, found '*'"),
    ("(A)", "character 4: expected *, found 'the end'"),
    ("(A) * x", "character 7: expected a count, found 'x'"),
    ("(A) * 0", "a loop's count is 0; it must be 1 to 10"),
    ("(A) * 11", "a loop's count is 11; it must be 1 to 10"),
    ("([A, B]) * 2", "character 2: expected an operator name, found '['"),
    ("Done", "character 1: 'done' stands only in a conditional's false branch"),
    ("n1:A -> n1:B", "character 9: the id n1 occurs twice"),
    ("n1.1:A", "the id n1.1 belongs to a child, but stands before a stage"),
    ("n1:[n10.1:A, n1.2:B]", "the id n10.1 cannot stand inside n1"),
    ("n1:[n2:A, B]", "the id n2 cannot stand inside n1"),
    ("n1:n2:A", "the id n2 cannot stand inside n1"),
    ("[n1.1:A, B]", "the id n1.1 cannot stand inside a stage without an id"),
    (" -> ".join(["A"] * (MAX_NODES + 1)), f"a workflow holds at most {MAX_NODES} operators; delete some first"),
])
def test_a_text_that_is_no_workflow_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        Graph.from_text(text)
    assert str(caught.value) == message


names = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8).map(lambda text: "A" + text)
stages = st.one_of(
    st.tuples(st.just("operator"), st.lists(names, min_size=1, max_size=1), st.just(1)),
    st.tuples(st.just("parallel"), st.lists(names, min_size=2, max_size=4), st.just(1)),
    st.tuples(st.just("conditional"), st.lists(names, min_size=2, max_size=3), st.just(1)),
    st.tuples(st.just("loop"), st.lists(names, min_size=1, max_size=3), st.integers(1, 10)),
)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Graphs with a past: inserted anywhere, then deleted from."""
    graph = Graph()
    for kind, operators, count in draw(st.lists(stages, max_size=8)):
        graph.insert(kind, operators, count, draw(st.integers(1, len(graph.stages) + 1)))
    for _ in range(draw(st.integers(0, 4)) if graph.stages else 0):
        target = draw(st.sampled_from(graph.nodes())).id if graph.stages else ""
        try:
            graph.delete(target)
        except GraphError:
            continue  # the rest would be no structure
    return graph


def shape(graph: Graph) -> list[tuple[str, list[str], int]]:
    return [(stage.kind, [node.operator for node in stage.nodes], stage.count) for stage in graph.stages]


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_any_graph_reads_back_as_it_was_written(graph: Graph) -> None:
    plain, whole = Graph.from_text(graph.to_text()), Graph.from_text(graph.to_text(ids=True))
    assert shape(plain) == shape(whole) == shape(graph)
    assert whole.to_text(ids=True) == graph.to_text(ids=True)
    assert len(set(ids(whole))) == len(ids(whole))


@given(st.text(alphabet="AB n1.2:[]()?*,->done\n", max_size=40))
@settings(max_examples=300, deadline=None)
def test_the_reader_returns_a_graph_or_a_graph_error_whatever_the_text(text: str) -> None:
    try:
        graph = Graph.from_text(text)
    except GraphError:
        return
    assert Graph.from_text(graph.to_text(ids=True)).to_text(ids=True) == graph.to_text(ids=True)
    assert len(set(ids(graph))) == len(ids(graph))


# ---- changes


def test_stages_go_to_the_end_or_in_front_of_the_position() -> None:
    graph = Graph()
    for name, position in [("A", None), ("B", None), ("C", 1), ("D", 3), ("E", 5)]:
        graph.insert("operator", [name], position=position)
    assert graph.to_text() == "C -> A -> D -> B -> E"


@pytest.mark.parametrize("position", [-1, 0, 3])
def test_a_position_outside_the_graph_is_refused(position: int) -> None:
    graph = Graph.from_text("A")
    with pytest.raises(GraphError, match=rf"^position {position} is outside 1\.\.2$"):
        graph.insert("operator", ["B"], position=position)
    assert graph.to_text() == "A"


@pytest.mark.parametrize(("kind", "operators", "count", "message"), [
    ("parallel", ["A"], 1, "a parallel needs at least 2 operators"),
    ("loop", [], 1, "a loop needs at least 1 operator"),
    ("loop", ["A"], 0, "a loop's count is 0; it must be 1 to 10"),
    ("loop", ["A"], 11, "a loop's count is 11; it must be 1 to 10"),
    ("conditional", ["A"], 1, "a conditional needs a condition, a true branch and optionally a false branch"),
    ("conditional", ["A"] * 4, 1, "a conditional needs a condition, a true branch and optionally a false branch"),
    ("switch", ["A"], 1, "structure 'switch' is not one of parallel, conditional, loop"),
    ("parallel", ["A"] * MAX_NODES, 1, f"a workflow holds at most {MAX_NODES} operators; delete some first"),
])
def test_a_wrong_shape_is_refused_and_changes_nothing(kind: str, operators: list[str], count: int, message: str) -> None:
    graph = Graph.from_text("A")
    with pytest.raises(GraphError) as caught:
        graph.insert(kind, operators, count)
    assert str(caught.value) == message
    assert graph == Graph.from_text("A")


def test_ids_are_never_used_again() -> None:
    graph = Graph.from_text("A -> [B, C, D]")
    graph.delete("n2.3")
    graph.delete("n1")
    graph.insert("operator", ["E"])
    graph.delete("n3")
    assert graph.insert("operator", ["F"]).id == "n4"
    assert graph.to_text(ids=True) == "n2:[n2.1:B, n2.2:C] -> n4:F"


@pytest.mark.parametrize(("text", "target", "left"), [
    ("A -> B", "n1", "B"),
    ("A -> [B, C]", "n2", "A"),
    ("[A, B, C]", "n1.2", "[A, C]"),
    ("(A -> B) * 3", "n1.1", "(B) * 3"),
    ("(A ? B : C)", "n1.3", "(A ? B : done)"),
])
def test_delete_removes_a_stage_or_one_child(text: str, target: str, left: str) -> None:
    graph = Graph.from_text(text)
    graph.delete(target)
    assert graph.to_text() == left


@pytest.mark.parametrize(("text", "target", "message"), [
    ("[A, B]", "n1.1", "a parallel needs at least 2 operators; delete n1 as a whole"),
    ("(A) * 2", "n1.1", "a loop needs at least 1 operator; delete n1 as a whole"),
    ("(A ? B : C)", "n1.1", "a conditional needs its condition and its true branch; delete n1 as a whole"),
    ("(A ? B : C)", "n1.2", "a conditional needs its condition and its true branch; delete n1 as a whole"),
    ("A -> [B, C]", "n9", "there is no node 'n9'; nodes are: n1, n2.1, n2.2"),
    ("", "n1", "there is no node 'n1'; nodes are: none, the graph is empty"),
])
def test_a_delete_that_would_break_the_graph_is_refused(text: str, target: str, message: str) -> None:
    graph = Graph.from_text(text)
    with pytest.raises(GraphError) as caught:
        graph.delete(target)
    assert (str(caught.value), graph.to_text()) == (message, text)


def test_find_tells_a_structure_from_a_node() -> None:
    graph = Graph.from_text("A -> [B, C]")
    structure, nothing = graph.find("n2")
    assert isinstance(structure, Stage)
    assert (structure.kind, nothing) == ("parallel", None)
    stage, node = graph.find("n2.2")
    assert (stage is structure, node and node.operator) == (True, "C")
    assert graph.find("n1")[1] is graph.stages[0].nodes[0]


def test_the_default_count_is_the_documented_three() -> None:
    assert DEFAULT_COUNT == 3
