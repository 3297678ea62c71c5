"""tasks.py and toys.py: what is read, what is refused and how, and that every toy task has the answer it claims."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from tasks import Task, TaskError, docstring_asserts, from_record, read_tasks, to_record, toy_tasks

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
TOYS = ("toy_math", "toy_qa", "toy_code")
QUESTION = {"problem": "1 + 1?", "ground_truth": "2", "source": "gsm8k"}


def write(directory: Path, *records: object, name: str = "tasks.jsonl") -> Path:
    path = directory / name
    path.write_text(
        "\n".join(text if isinstance(text, str) else json.dumps(text) for text in records), encoding="utf-8"
    )
    return path


def read_one(directory: Path, **record: object) -> Task:
    return read_tasks(write(directory, {**QUESTION, **record}))[0]


# ---- reading


def test_a_question_keeps_its_fields(tmp_path: Path) -> None:
    task = read_one(tmp_path, meta={"task_id": "gsm8k-test-7", "subject": "sums"})
    assert task == Task(
        "gsm8k-test-7", "gsm8k", "math", "1 + 1?", ("2",), meta={"task_id": "gsm8k-test-7", "subject": "sums"}
    )


def test_aliases_of_the_keys_are_read(tmp_path: Path) -> None:
    task = read_tasks(write(tmp_path, {"question": "who?", "answer": ["Ann", "Anna", "Ann"], "dataset": "nq"}))[0]
    assert (task.problem, task.answers, task.source, task.kind) == ("who?", ("Ann", "Anna"), "nq", "qa")


@pytest.mark.parametrize(("truth", "answers"), [(5, ("5",)), (0, ("0",)), (2.5, ("2.5",)), (["a", 1], ("a", "1"))])
def test_numbers_and_lists_become_answers(tmp_path: Path, truth: object, answers: tuple[str, ...]) -> None:
    assert read_one(tmp_path, ground_truth=truth).answers == answers


@pytest.mark.parametrize(
    ("record", "source", "kind"),
    [
        ({"source": "mathqa", "problem_type": "math"}, "mathqa", "choice"),  # a known source decides
        ({"source": "SQuAD v2"}, "squad_v2", "qa"),
        ({"source": "human-eval"}, "humaneval", "code"),
        ({"source": "my_set", "problem_type": "qa"}, "my_set", "qa"),
        ({"source": None, "problem_type": "multiple_choice"}, "multiple_choice", "choice"),
    ],
)
def test_source_decides_the_kind_where_it_is_known(tmp_path: Path, record: dict, source: str, kind: str) -> None:
    task = read_one(tmp_path, **record)
    assert (task.source, task.kind) == (source, kind)


def test_unanswerable_questions_have_the_empty_answer(tmp_path: Path) -> None:
    for truth in (None, [], ""):
        assert read_one(tmp_path, source="squad_v2", ground_truth=truth).answers == ("",)


def test_ids_are_unique_over_files_and_name_line_or_task_id(tmp_path: Path) -> None:
    def question(task_id: object) -> dict:
        return {**QUESTION, "meta": {"task_id": task_id}}

    a = write(tmp_path, QUESTION, question(7), question("gsm8k/7#2"), name="a")
    b = write(tmp_path, question(7), question("gsm8k/7#2"), name="b")
    found = [task.id for task in read_tasks([a, str(b)])]
    assert found == ["gsm8k/1", "gsm8k/7", "gsm8k/7#2", "gsm8k/7#3", "gsm8k/7#2#2"]


def test_blank_lines_crlf_and_byte_order_mark_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(QUESTION).encode() + b"\r\n\r\n" + json.dumps(QUESTION).encode() + b"\r\n"
    )
    assert [task.id for task in read_tasks(path)] == ["gsm8k/1", "gsm8k/3"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "found a list"),
        ('"text"', "found a str"),
        ("[" * 100_000, "not JSON"),
        ('{"problem": "x", "ground_truth": NaN, "source": "gsm8k"}', "NaN is not a JSON value"),
        ('{"problem": "\\ud800", "ground_truth": "1", "source": "gsm8k"}', "surrogates not allowed"),
        ({**QUESTION, "problem": " "}, "problem (or question) must be a non-empty string"),
        ({**QUESTION, "problem": 5}, "problem (or question) must be a non-empty string, got 5"),
        ({"problem": "x", "source": "gsm8k"}, "ground_truth (or answer) must be"),
        ({**QUESTION, "ground_truth": []}, "ground_truth (or answer) must be"),
        ({**QUESTION, "ground_truth": {"text": ["x"]}}, "ground_truth (or answer) must be"),
        ({**QUESTION, "ground_truth": [["x"]]}, "ground_truth (or answer) must be"),
        ({**QUESTION, "ground_truth": ""}, "only squad_v2 has unanswerable questions"),
        ({**QUESTION, "meta": "x"}, "meta must be an object"),
        ({**QUESTION, "source": "mystery"}, "problem_type must be one of math, choice, qa, code"),
        ({**QUESTION, "source": "mystery", "problem_type": ["qa"]}, "problem_type must be one of"),
        ({**QUESTION, "source": "apps", "meta": {"test": 5}}, "meta.test must be text"),
        ({**QUESTION, "source": "apps", "meta": {"test": [{"input": "x"}]}}, "meta.test must be text"),
        (
            {**QUESTION, "source": "apps", "meta": {"entry_point": 5}},
            "meta.entry_point and meta.prompt must be strings",
        ),
        ({**QUESTION, "source": "apps", "meta": {"input_output": "{"}}, "meta.input_output must hold"),
        ({**QUESTION, "source": "apps", "meta": {"input_output": {"inputs": ["1"], "outputs": []}}}, "of one length"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_cause(tmp_path: Path, line: object, complaint: str) -> None:
    path = write(tmp_path, QUESTION, line)
    with pytest.raises(TaskError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert complaint in str(caught.value)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"missing\.jsonl: cannot be read: No such file"):
        read_tasks(tmp_path / "missing.jsonl")
    with pytest.raises(TaskError, match="cannot be read: Is a directory"):
        read_tasks(tmp_path)
    with pytest.raises(TaskError, match=r"empty\.jsonl: no tasks in it"):
        read_tasks(write(tmp_path, "\n \n", name="empty.jsonl"))
    with pytest.raises(TaskError, match="no task files given"):
        read_tasks([])
    (tmp_path / "latin").write_bytes(json.dumps(QUESTION).encode() + b"\n\xe9\n")
    with pytest.raises(TaskError, match=r"latin:2: not UTF-8"):
        read_tasks(tmp_path / "latin")


def test_a_line_is_never_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(QUESTION)
    path = write(tmp_path, line, line + " ")
    monkeypatch.setattr(tasks, "MAX_LINE", len(line) + 1)  # the line break counts
    assert len(read_tasks(path)) == 2
    monkeypatch.setattr(tasks, "MAX_LINE", len(line))
    with pytest.raises(TaskError, match=r"tasks\.jsonl:1: line longer than"):
        read_tasks(path)


# ---- code tasks

PROMPT = '''import math

def double(x):
    return 2 * x

def twice(x, y=0):
    """Twice.

    >>> twice(1)
    2
    >>> twice([1, 'a'])
    [1, 'a',
     1, 'a']

    twice(2) == 4
    - twice("a\\n") ==> 'a\\na\\n'
    * twice(x) -> 5
    >>> twice(-1, y=1) ➞ -2.
    twice(0) returns 0
    twice(1) => ("Venus")
    twice(1) => ("Venus",)
    assert twice({}) = {}  # an empty one
    twice(5) == double(5)
    other(1) == 2
    twice(7) is fine
    >>> twice(9)
    """
'''


def test_examples_of_a_docstring_become_asserts() -> None:
    assert docstring_asserts(PROMPT, "twice").splitlines() == [
        "assert twice(1) == 2",
        "assert twice([1, 'a']) == [1, 'a', 1, 'a']",
        "assert twice(2) == 4",
        "assert twice(-1, y=1) == -2",
        "assert twice(0) == 0",
        "assert twice(1) == ('Venus',)",
        "assert twice({}) == {}",
    ]


@pytest.mark.parametrize(
    "prompt", ["", "def f(", "x = 1", "def g():\n    '''f(1) == 1'''", "def f(): pass", "\0", "(" * 500]
)
def test_a_prompt_without_examples_gives_no_asserts(prompt: str) -> None:
    assert docstring_asserts(prompt, "f") == ""


def humaneval(**meta: object) -> Task:
    meta = {"task_id": "HumanEval/0", "entry_point": "twice", "test": "def check(candidate):\n    pass\n", **meta}
    return from_record({"problem": PROMPT, "ground_truth": "    return x + x\n", "source": "humaneval", "meta": meta})


def test_humaneval_reference_is_prompt_and_body() -> None:
    space: dict = {}
    exec(humaneval().answers[0], space)
    assert space["twice"](4) == 8


def test_humaneval_tests_get_the_helpers_of_the_prompt_but_not_the_solution() -> None:
    hidden = humaneval().hidden_tests
    assert hidden == "import math\ndef double(x):\n    return 2 * x\ndef check(candidate):\n    pass\n"


def test_humaneval_public_tests_come_from_the_docstring() -> None:
    assert humaneval().public_tests == docstring_asserts(PROMPT, "twice")
    assert humaneval(public_tests="assert 1").public_tests == "assert 1"


def test_mbpp_public_test_is_the_first_assert_with_the_setup() -> None:
    meta = {"test_imports": ["import math"], "test_list": ["assert f(1) == 1", "assert f(2) == 2"], "task_id": 5}
    task = from_record({"problem": "p", "ground_truth": "def f(x): return x", "source": "mbpp", "meta": meta})
    assert task.hidden_tests == "import math\nassert f(1) == 1\nassert f(2) == 2"
    assert task.public_tests == "import math\nassert f(1) == 1"
    assert task.id == "mbpp/5"


def test_apps_programs_read_stdin_and_functions_are_called() -> None:
    def read(value: object) -> Task:
        return from_record({"problem": "p", "source": "apps", "meta": {"input_output": value}})

    program = read(json.dumps({"inputs": ["1\n2\n", ["3", 4]], "outputs": ["3\n", ["7"]]}))
    assert program.hidden_tests == [{"input": "1\n2\n", "output": "3\n"}, {"input": "3\n4", "output": "7"}]
    assert (program.entry_point, program.public_tests) == (None, program.hidden_tests[:1])
    call = read({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]})  # results come wrapped in a list
    assert call.entry_point == "add"
    assert call.hidden_tests == [{"input": [1, 2], "output": 3}, {"input": [3, 4], "output": 7}]
    plain = read({"fn_name": "pair", "inputs": [[1], [2]], "outputs": [[1, 1], [2]]})
    assert [case["output"] for case in plain.hidden_tests] == [[1, 1], [2]]


def test_a_code_task_without_tests_or_reference_can_be_read(tmp_path: Path) -> None:
    task = read_one(tmp_path, source="apps", ground_truth=None)
    assert (task.answers, task.hidden_tests, task.public_tests) == (("",), "", "")


def test_meta_never_holds_tests() -> None:
    tests = {"test": "assert f(1) == 1", "test_imports": ["import os"], "test_setup_code": "x = 1"}
    task = from_record({"problem": "p", "source": "mbpp", "meta": {**tests, "entry_point": "f", "level": 2}})
    assert task.meta == {"level": 2}


# ---- toy tasks


@pytest.mark.parametrize("source", TOYS)
def test_the_first_toy_tasks_do_not_depend_on_how_many_are_made(source: str) -> None:
    assert toy_tasks(source, 40, 3)[:7] == toy_tasks(source, 7, 3)


@pytest.mark.parametrize("source", TOYS)
def test_toy_tasks_differ_by_index_and_by_seed(source: str) -> None:
    texts = [task.problem for seed in (0, 1) for task in toy_tasks(source, 150, seed)]
    assert len(set(texts)) > 0.93 * len(texts)
    assert len({task.id for seed in (0, 1) for task in toy_tasks(source, 150, seed)}) == 300


def test_toy_tasks_are_the_same_in_every_process() -> None:
    code = (
        "import tasks; print([vars(t) for s in ('toy_math', 'toy_qa', 'toy_code') for t in tasks.toy_tasks(s, 9, 5)])"
    )
    digests = set()
    for hash_seed in ("1", "2"):  # a result that depends on the order of a set shows here
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
        digests.add(hashlib.sha256(out.stdout).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(("source", "longest"), [("toy_math", 220), ("toy_qa", 350), ("toy_code", 220)])
def test_toy_texts_are_short_and_open_with_kind_and_level(source: str, longest: int) -> None:
    found = toy_tasks(source, 600, 0)
    assert {task.meta["level"] for task in found} == {1, 2, 3, 4}
    for task in found:
        assert task.problem.startswith(f"[{source[4:]}, level {task.meta['level']}] ")
        assert len(task.problem) <= longest, task.problem


def solve_math(text: str) -> int:
    """Read a toy_math problem, independently of the way it is made."""
    text = text.partition("] ")[2]
    if expression := re.fullmatch(r"(?:Compute|What is|Find the value of) (.+)[.?]", text):
        return eval(expression[1])
    if text.startswith("Let "):
        space: dict = {}
        exec(text[4 : text.index(".")].replace(", ", "\n"), {}, space)
        return space[text[-2]]
    start, *steps = re.split(r", (?:then )?", text[: text.index(".")])
    value = int(re.search(r"\d+", start)[0])
    kinds = {
        "add|buys|finds|is given|makes": lambda a, b: a + b,
        "subtract|gives away|loses|sells|throws": lambda a, b: a - b,
        r"multiply|swaps each for|trades each|gets \d+ in place": lambda a, b: a * b,
        r"divide|keeps 1 in|trades every|swaps each \d+ for 1": lambda a, b: a / b,
    }
    for step in steps:
        (apply,) = [function for words, function in kinds.items() if re.match(words, step)]
        value = apply(value, int(max(re.findall(r"\d+", step), key=int)))
    return value


def test_toy_math_answers_are_right() -> None:
    for task in toy_tasks("toy_math", 500, 0):
        assert str(task.answers[0]) == f"{solve_math(task.problem):g}", task.problem


def test_toy_math_has_one_step_more_than_its_level() -> None:
    for task in toy_tasks("toy_math", 300, 1):
        numbers = re.findall(r"\d+", task.problem.partition("] ")[2])
        extra = len(re.findall(r"keeps 1 in|for 1\b(?!\d)(?=,|\.)", task.problem))
        assert len(numbers) - extra == task.meta["level"] + 2, task.problem


FACTS = {
    r"(\w+) lives in (\w+)\.": "home town",
    r"(\w+) works as a (\w+)\.": "job",
    r"The best friend of (\w+) is (\w+)\.": "best friend",
    r"(\w+) lies on the (\w+)\.": "river",
    r"The mayor of (\w+) is (\w+)\.": "mayor",
    r"The (\w+) flows into the (\w+)\.": "river",
}


def solve_qa(text: str) -> str:
    """Follow the question's phrase through the facts."""
    known = {}
    for pattern, relation in FACTS.items():
        for start, end in re.findall(pattern, text):
            assert (relation, start) not in known, "two answers"
            known[relation, start] = end

    def resolve(phrase: str) -> str:
        nested = re.fullmatch(r"the (home town|job|best friend|river|mayor) (?:of|at|that takes in) (.+)", phrase)
        return known[nested[1], resolve(nested[2])] if nested else phrase.removeprefix("the ")

    return resolve(re.search(r"(?:Who|What) is (.+)\?$", text)[1])


def test_toy_qa_answers_follow_from_the_facts() -> None:
    for task in toy_tasks("toy_qa", 500, 0):
        assert solve_qa(task.problem) == task.answers[-1].removeprefix("a "), task.problem


def test_toy_qa_has_level_plus_two_facts_and_at_most_three_hops() -> None:
    for task in toy_tasks("toy_qa", 200, 1):
        facts, question = re.fullmatch(r"\[.*?\] (.+\.) (Wh.+\?)", task.problem).groups()
        assert facts.count(".") == task.meta["level"] + 2
        hops = len(re.findall(r"home town|job|best friend|river|mayor", question))
        assert hops == min(task.meta["level"], 3), task.problem


@pytest.mark.parametrize("source", ["toy_math", "toy_qa"])
def test_distractors_are_several_and_wrong(source: str) -> None:
    for task in toy_tasks(source, 300, 0):
        distractors = task.meta["distractors"]
        assert len(set(distractors)) == len(distractors) >= 3
        assert not {text.lower() for text in distractors} & {answer.lower() for answer in task.answers}
        if source == "toy_qa":
            assert all(re.search(rf"\b{text}\b", task.problem) for text in distractors)
        else:
            assert all(re.fullmatch(r"-?\d+", text) for text in distractors)


def passes(program: str, tests: str) -> bool:
    space: dict = {}
    exec(program, space)
    try:
        exec(tests, space)
    except AssertionError:
        return False
    return True


def test_toy_code_reference_passes_and_every_distractor_fails_a_hidden_test() -> None:
    for task in toy_tasks("toy_code", 150, 0):
        assert passes(task.answers[0], task.hidden_tests)
        assert passes(task.answers[0], task.public_tests)
        assert len(task.meta["distractors"]) >= task.meta["level"]
        assert not any(passes(program, task.hidden_tests) for program in task.meta["distractors"])


def test_toy_code_tests_cover_the_edges_and_stay_apart() -> None:
    for task in toy_tasks("toy_code", 50, 0):
        public, hidden = task.public_tests.splitlines(), task.hidden_tests.splitlines()
        assert 1 <= len(public) <= 2
        assert len(hidden) >= 5
        assert not set(public) & set(hidden)
        for edge in ("[]", "[0]", "[-3, -1, -2]"):
            assert f"{task.entry_point}({edge}) ==" in task.hidden_tests


def test_toy_code_draws_from_many_families() -> None:
    bodies = [line for task in toy_tasks("toy_code", 300, 0) for line in task.answers[0].splitlines()[1:]]
    assert len({re.sub(r"\d+", "k", line) for line in bodies}) >= 20


def test_unknown_toys_and_negative_counts_are_refused() -> None:
    with pytest.raises(TaskError, match="toy tasks are toy_math, toy_qa, toy_code"):
        toy_tasks("toy_art", 3, 0)
    with pytest.raises(TaskError, match="0 or more"):
        toy_tasks("toy_math", -1, 0)
    assert toy_tasks("toy_math", 0, 0) == []


# ---- writing, command line


@pytest.mark.parametrize("source", TOYS)
def test_a_written_task_reads_back_as_itself(source: str, tmp_path: Path) -> None:
    made = toy_tasks(source, 30, 2)
    assert read_tasks(write(tmp_path, *[to_record(task) for task in made])) == made


def test_a_written_humaneval_task_keeps_its_tests() -> None:
    again = from_record(json.loads(json.dumps(to_record(humaneval()))))
    assert again == humaneval()


def run_cli(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tasks.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_cli_prints_toy_tasks_that_read_back(tmp_path: Path) -> None:
    done = run_cli("toy", "toy_code", "-n", "3", "--seed", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_tasks(write(tmp_path, done.stdout)) == toy_tasks("toy_code", 3, 4)


def test_cli_inspects_files(tmp_path: Path) -> None:
    untested = {**QUESTION, "source": "apps", "problem": "untested"}
    path = write(tmp_path, QUESTION, QUESTION, {**QUESTION, "meta": {"task_id": 1}}, untested)
    done = run_cli("inspect", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    for text in (
        "3  math    gsm8k",
        "1  code    apps",
        "4  in all",
        "p50 6",
        "repeated problems: 2",
        "repeated ids: 1",
    ):
        assert text in done.stdout
    assert "code tasks without hidden tests: 1" in done.stdout


@pytest.mark.parametrize("args", [("inspect", "missing.jsonl"), ("toy", "toy_math", "-n", "-1"), ("toy", "art"), ()])
def test_cli_errors_are_one_message_and_exit_code_2(args: tuple[str, ...]) -> None:
    done = run_cli(*args)
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_cli_may_be_cut_off_by_head() -> None:
    command = f"{sys.executable} tasks.py toy toy_code -n 500 | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


# ---- real data


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gsm8k", "math"), ("math", "math"), ("hotpotqa", "qa"), ("nq", "qa"), ("humaneval", "code"), ("mbpp", "code")],
)
def test_real_data_is_read_completely(name: str, kind: str) -> None:
    if not (DATA / f"{name}.jsonl").exists():
        pytest.skip(f"no {name}.jsonl in ../shared/data")
    found = read_tasks(DATA / f"{name}.jsonl")
    assert {(task.source, task.kind) for task in found} == {(name, kind)}
    assert len(found) == 48
    if kind == "code":
        assert all(
            task.hidden_tests and task.entry_point and f"def {task.entry_point}" in task.answers[0] for task in found
        )
    if name == "humaneval":
        assert sum(bool(task.public_tests) for task in found) >= 40
