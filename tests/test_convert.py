"""convert.py: each data set from a small file in its original format, written by us, to tasks; splits and overlaps."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import convert
from rewards import grade
from tasks import Task, TaskError, from_record, problem_key, read_tasks, sample_cases, to_record, toy_tasks

ROOT = Path(__file__).parent.parent


def converted(dataset: str, directory: Path, content: object, name: str = "original.json") -> list[Task]:
    """The tasks of a file that holds `content`: bytes, text, or a value that is written as JSON."""
    path = directory / name
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(convert.convert(dataset, path))


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# ---- math and choice


def test_gsm8k_takes_what_stands_behind_the_hashes(tmp_path: Path) -> None:
    text = lines({"question": "How far?", "answer": "6*200 = <<6*200=1200>>1200\n34 more\n#### 1,234"},
                 {"question": "How cold?", "answer": "so\n#### -3"}, {"question": "How much?", "answer": "#### 0.5"})
    first, second, third = converted("gsm8k", tmp_path, text, "test.jsonl")
    assert first == Task("gsm8k/test-0", "gsm8k", "math", "How far?", ("1234",), meta={"task_id": "test-0"})
    assert (second.answers, third.answers, third.id) == (("-3",), ("0.5",), "gsm8k/test-2")


@pytest.mark.parametrize(("solution", "answer"), [
    (r"so $x=\boxed{5}$.", "5"), (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),  # nested braces
    (r"$\boxed{1}$, no: $\fbox{2}$", "2"), (r"it is $\boxed 7$.", "7"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{3} and \boxed{4", "3"),
])
def test_math_takes_the_last_box_of_the_solution(solution: str, answer: str, tmp_path: Path) -> None:
    record = {"problem": "Find $x$.", "level": "Level 2", "type": "Algebra", "solution": solution}
    (task,) = converted("math", tmp_path, record)
    assert (task.answers, task.meta["level"], task.meta["subject"]) == ((answer,), "Level 2", "Algebra")


def test_math_is_read_from_its_tree_in_numerical_order(tmp_path: Path) -> None:
    for name in ("algebra/10", "algebra/2", "geometry/1"):
        path = tmp_path / "test" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"problem": name, "solution": r"\boxed{1}", "level": "Level 1", "type": "x"}, indent=1))
    found = list(convert.convert("math", tmp_path / "test"))
    assert [task.id for task in found] == ["math/algebra/2", "math/algebra/10", "math/geometry/1"]


def test_math_500_brings_its_answer(tmp_path: Path) -> None:
    record = {"problem": "p", "solution": r"\boxed{x}", "answer": "(3,4)", "subject": "Algebra", "level": 2, "unique_id": "a/1"}
    (task,) = converted("math", tmp_path, lines(record), "test.jsonl")
    assert (task.answers, task.id, task.meta["subject"]) == (("(3,4)",), "math/a/1", "Algebra")


@pytest.mark.parametrize(("text", "options"), [
    ("a ) 24 , b ) 120 , c ) 625 , d ) 720 , e ) 1024", {"a": "24", "b": "120", "c": "625", "d": "720", "e": "1024"}),
    ("a ) rs . 1,000 , b ) 3 , 500 , c ) none of these", {"a": "rs . 1,000", "b": "3 , 500", "c": "none of these"}),
    ("['a ) 5 ( 2 / 7 ) %', 'b ) 10 %']", {"a": "5 ( 2 / 7 ) %", "b": "10 %"}),  # a list, as some items have it
    ("a)1,b)2,c)3", {"a": "1", "b": "2", "c": "3"}),
])
def test_mathqa_options_are_told_apart(text: str, options: dict[str, str], tmp_path: Path) -> None:
    record = {"Problem": "how many ?", "Rationale": "...", "options": text, "correct": "b", "annotated_formula": "",
              "linear_formula": "", "category": "general"}
    (task,) = converted("mathqa", tmp_path, [record])
    assert (task.kind, task.answers, task.meta["options"]) == ("choice", ("b",), options)
    assert f"\na) {options['a']}\nb) {options['b']}" in task.problem


AIME = [
    {"question": "Find the sum.", "answer": "70"},  # opencompass/AIME2025, TIGER-Lab/AIME25
    {"problem": "Find the sum.", "answer": "070", "id": "0"},  # math-ai/aime25
    {"id": 60, "problem": "Find the sum.", "solution": "...", "answer": "70", "url": "u", "year": 2025},  # yentinglin/aime_2025
    {"problem_idx": 1, "problem": "Find the sum.", "answer": 70, "problem_type": ["Number Theory"]},  # MathArena/aime_2025
    {"ID": "2025-I-1", "Problem": "Find the sum.", "Solution": "...", "Answer": 70},  # Maxwell-Jia's layout
    {"question": "Find the sum.", "answer": "70^\\circ"},  # one answer of opencompass has its degrees
]


@pytest.mark.parametrize("record", AIME)
def test_aime_2025_is_read_in_each_layout(record: dict, tmp_path: Path) -> None:
    (task,) = converted("aime2025", tmp_path, lines(record), "aime2025-I.jsonl")
    assert (task.problem, task.answers, task.source) == ("Find the sum.", ("70",), "aime2025")


@pytest.mark.parametrize("answer", ["1000", "-1", "1/2", "x", ""])
def test_an_aime_answer_is_an_integer_below_a_thousand(answer: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="not an integer of 0 to 999"):
        converted("aime2025", tmp_path, lines({"question": "?", "answer": answer}))


# ---- question answering

HOTPOT = {"_id": "5a8b57f2", "answer": "yes", "question": "Same nationality?", "type": "comparison", "level": "hard",
          "supporting_facts": [["Ed Wood", 0]],
          "context": [["Ed Wood", ["Ed was American.", " He made films."]], ["Scott D", ["Scott is American."]]]}


def test_hotpotqa_puts_the_passages_into_the_problem(tmp_path: Path) -> None:
    (task,) = converted("hotpotqa", tmp_path, [HOTPOT])
    assert task.problem == ("Same nationality?\n\nContext:\n[Ed Wood] Ed was American. He made films.\n"
                            "[Scott D] Scott is American.")
    assert (task.id, task.answers, task.meta["type"]) == ("hotpotqa/5a8b57f2", ("yes",), "comparison")


def test_hotpotqa_of_the_hub_reads_the_same(tmp_path: Path) -> None:
    pairs = HOTPOT["context"]
    record = {**HOTPOT, "id": HOTPOT["_id"], "context": {"title": [t for t, _ in pairs], "sentences": [s for _, s in pairs]}}
    del record["_id"]
    assert converted("hotpotqa", tmp_path, lines(record)) == converted("hotpotqa", tmp_path, [HOTPOT])


SQUAD = {"version": "v2.0", "data": [{"title": "Normans", "paragraphs": [{"context": "The Normans lived in France.", "qas": [
    {"question": "Where did they live?", "id": "56dd", "is_impossible": False,
     "answers": [{"text": "France", "answer_start": 21}, {"text": "in France", "answer_start": 18},
                 {"text": "France", "answer_start": 21}]},
    {"question": "Who ruled?", "id": "5ad3", "is_impossible": True, "answers": [],
     "plausible_answers": [{"text": "Normans", "answer_start": 4}]}]}]}]}


@pytest.mark.parametrize("indent", [None, 2])
def test_squad_v2_has_unanswerable_questions(indent: int | None, tmp_path: Path) -> None:
    answerable, impossible = converted("squad", tmp_path, json.dumps(SQUAD, indent=indent))
    assert (answerable.answers, impossible.answers) == (("France", "in France"), ("",))
    assert (answerable.id, answerable.source) == ("squad_v2/56dd", "squad_v2")
    assert answerable.problem.startswith("Where did they live?\n\nContext:\nThe Normans lived in France.\n")
    assert grade(impossible, "Normans").score == 0
    assert grade(impossible, "unanswerable").score == 1  # as the problem asks for


def test_squad_v2_of_the_hub_reads_the_same(tmp_path: Path) -> None:
    article, (part,) = SQUAD["data"][0], SQUAD["data"][0]["paragraphs"]
    flat = [{"id": qa["id"], "title": article["title"], "context": part["context"], "question": qa["question"],
             "answers": {"text": [a["text"] for a in qa["answers"]], "answer_start": [0] * len(qa["answers"])}}
            for qa in part["qas"]]
    assert converted("squad_v2", tmp_path, lines(*flat)) == converted("squad_v2", tmp_path, SQUAD)


TRIVIA = {"Answer": {"Aliases": ["Sunset Blvd", "West Sunset Boulevard"], "MatchedWikiEntityName": "Sunset Boulevard",
                     "NormalizedAliases": ["sunset blvd", "west sunset boulevard"], "NormalizedValue": "sunset blvd",
                     "Type": "WikipediaEntity", "Value": "Sunset Blvd", "HumanAnswers": ["Sunset Strip"]},
          "EntityPages": [], "Question": "Which musical?", "QuestionId": "tc_33", "QuestionSource": "http://x",
          "SearchResults": []}


def test_triviaqa_accepts_every_alias(tmp_path: Path) -> None:
    (task,) = converted("triviaqa", tmp_path, {"Data": [TRIVIA], "Domain": "Web", "Split": "dev", "Version": 1.0})
    assert (task.id, task.problem) == ("triviaqa/tc_33", "Which musical?")
    assert task.answers == ("Sunset Blvd", "sunset blvd", "west sunset boulevard", "Sunset Strip")
    assert grade(task, "the West Sunset-Boulevard").em == grade(task, "sunset strip").em == 1


def test_triviaqa_of_the_hub_reads_the_same(tmp_path: Path) -> None:
    answer = {"aliases": TRIVIA["Answer"]["Aliases"], "normalized_aliases": TRIVIA["Answer"]["NormalizedAliases"],
              "value": "Sunset Blvd", "normalized_value": "sunset blvd", "human_answers": ["Sunset Strip"]}
    flat = {"question": "Which musical?", "question_id": "tc_33", "answer": answer, "entity_pages": {}}
    assert converted("triviaqa", tmp_path, lines(flat)) == converted("triviaqa", tmp_path, {"Data": [TRIVIA]})


def test_triviaqa_without_answers_says_so(tmp_path: Path) -> None:
    hidden = {key: value for key, value in TRIVIA.items() if key != "Answer"}
    with pytest.raises(TaskError, match="no field 'answer'"):
        converted("triviaqa", tmp_path, {"Data": [hidden]})


def test_nq_open_has_a_list_of_answers(tmp_path: Path) -> None:
    text = lines({"question": "who got the first nobel prize", "answer": ["Wilhelm Conrad Röntgen", "Röntgen"]})
    (task,) = converted("nq_open", tmp_path, text, "NQ-open.dev.jsonl")
    assert (task.id, task.source, task.answers) == ("NQ-open-0", "nq", ("Wilhelm Conrad Röntgen", "Röntgen"))


# ---- code

MBPP = {"text": "Write a function to add.", "code": "import math\r\ndef helper(x):\r\n  return x\r\ndef add(a, b):\r\n"
        "  return helper(a) + b", "task_id": 11, "test_setup_code": "", "challenge_test_list": [],
        "test_list": ["assert set([add(1, 2)]) == {3}", "assert add(2, 2) == 4", "assert add(0, 1) == 1"]}


def test_mbpp_full_and_sanitized_read_alike(tmp_path: Path) -> None:
    clean = {"source_file": "x.ipynb", "task_id": 11, "prompt": MBPP["text"], "code": MBPP["code"], "test_imports": [],
             "test_list": MBPP["test_list"]}
    full, sanitized = converted("mbpp", tmp_path, lines(MBPP), "mbpp.jsonl"), converted("mbpp", tmp_path, [clean])
    assert full == sanitized
    (task,) = full
    assert (task.id, task.entry_point, task.meta["split"]) == ("mbpp/11", "add", "test")
    assert task.public_tests == "assert set([add(1, 2)]) == {3}"  # the first assert
    assert task.hidden_tests.count("assert") == 3
    assert grade(task, task.answers[0]).passed
    assert not grade(task, "def add(a, b): return 3").passed


@pytest.mark.parametrize(("number", "split"), [(1, "prompt"), (10, "prompt"), (11, "test"), (510, "test"), (511, "validation"),
                                               (600, "validation"), (601, "train"), (974, "train")])
def test_mbpp_splits_by_its_ids(number: int, split: str, tmp_path: Path) -> None:
    (task,) = converted("mbpp", tmp_path, lines({**MBPP, "task_id": number}))
    assert task.meta["split"] == split


def test_mbpp_imports_and_setup_stand_before_the_tests(tmp_path: Path) -> None:
    record = {**MBPP, "test_setup_code": "root = 1", "test_imports": ["import math"]}
    (task,) = converted("mbpp", tmp_path, lines(record))
    assert task.hidden_tests.startswith("import math\nroot = 1\nassert ")
    assert task.public_tests == "import math\nroot = 1\nassert set([add(1, 2)]) == {3}"


HUMANEVAL = {"task_id": "HumanEval/0", "entry_point": "double", "canonical_solution": "    return x + x\n",
             "prompt": 'def double(x):\n    """Double.\n    >>> double(2)\n    4\n    """\n',
             "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(3) == 6\n"}


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_humaneval_is_read_packed_and_unpacked(name: str, tmp_path: Path) -> None:
    text = lines(HUMANEVAL).encode()
    (task,) = converted("humaneval", tmp_path, gzip.compress(text) if name.endswith("gz") else text, name)
    assert (task.id, task.entry_point, task.public_tests) == ("HumanEval/0", "double", "assert double(2) == 4")
    assert grade(task, "    return 2 * x").passed
    assert not grade(task, "    return 4").passed


STDIN = {"inputs": ["3\n1 2 3\n", "1\n5\n", "2\n9 9"], "outputs": ["6\n", "5\n", "18"]}
QUESTION = "Add the numbers.\n\n-----Examples-----\nInput\n3\n1 2 3\n\nOutput\n6\n\nInput\n1\n5\n\nOutput\n5\n"


def write_apps(directory: Path, number: str, question: str, cases: dict | None, starter: str = "") -> None:
    folder = directory / number
    folder.mkdir()
    (folder / "question.txt").write_text(question)
    (folder / "metadata.json").write_text('{"difficulty": "interview", "url": "https://x"}')
    (folder / "solutions.json").write_text(json.dumps(["input(); print(sum(map(int, input().split())))"]))
    if cases:
        (folder / "input_output.json").write_text(json.dumps(cases))
    if starter:
        (folder / "starter_code.py").write_text(starter)


def test_apps_directories_hold_a_problem_each(tmp_path: Path) -> None:
    write_apps(tmp_path, "0010", "untested", None)
    write_apps(tmp_path, "0002", QUESTION, STDIN)
    program, untested = convert.convert("apps", tmp_path)
    assert (program.id, untested.id, program.meta["difficulty"]) == ("apps/0002", "apps/0010", "interview")
    assert program.hidden_tests[2] == {"input": "2\n9 9", "output": "18"}
    assert program.public_tests == program.hidden_tests[:2]  # those that the question shows
    assert (untested.hidden_tests, untested.public_tests, program.entry_point) == ("", "", None)
    assert grade(program, program.answers[0]).passed


def test_apps_of_the_hub_holds_json_texts(tmp_path: Path) -> None:
    call = {"fn_name": "pair", "inputs": [[1, [2]], [3, []]], "outputs": [[[1, 2]], [[3]]]}
    record = {"problem_id": 7, "question": "Pair them.", "solutions": json.dumps(["def pair(a, b):\n return [a] + b"]),
              "input_output": json.dumps(call), "difficulty": "introductory", "url": "u", "starter_code": "def pair(a, b):\n\t"}
    empty = {**record, "problem_id": 8, "solutions": "", "input_output": ""}
    task, bare = converted("apps", tmp_path, lines(record, empty), "test.jsonl")
    assert (task.id, task.entry_point) == ("apps/7", "pair")
    assert task.hidden_tests == [{"input": [1, [2]], "output": [1, 2]}, {"input": [3, []], "output": [3]}]
    assert "def pair(a, b):" in task.problem
    assert (bare.hidden_tests, bare.answers) == ("", ("",))
    assert grade(task, task.answers[0]).passed


def test_apps_dictionaries_get_their_integer_keys_back(tmp_path: Path) -> None:
    call = {"fn_name": "swap", "inputs": [[{"1": 2}]], "outputs": [[{"2": 1}]]}
    (task,) = converted("apps", tmp_path, lines({"question": "Swap.", "input_output": json.dumps(call), "problem_id": 1}))
    assert task.hidden_tests == [{"input": [{1: 2}], "output": {2: 1}}]
    again = from_record(json.loads(json.dumps(to_record(task))))  # JSON made text of the keys once more
    assert again.hidden_tests == task.hidden_tests
    assert grade(again, "def swap(d): return {b: a for a, b in d.items()}").passed


@pytest.mark.parametrize(("question", "public"), [
    (QUESTION, 2), ("No examples; 3, 6, 1, 5.", 1),
    ("-----Sample Input-----\n  1 \n5\n-----Sample Output-----\n5", 1),
    ("Sample Input\n\n2\n9 9\n\nSample Output\n\n18", 1), ("-----Examples-----\nInput\n3\n1 2 3\nOutput\n7", 1),
])
def test_apps_sample_cases_are_public(question: str, public: int) -> None:
    cases = [{"input": a, "output": b} for a, b in zip(STDIN["inputs"], STDIN["outputs"], strict=True)]
    found = sample_cases(question, cases)
    assert len(found) == public
    assert found[0] == (cases[1] if "  1 " in question else cases[2] if "9 9" in question else cases[0])


DS1000 = {"prompt": "Problem:\nDouble a.\nA:\n<code>\nimport numpy as np\na = np.arange(3)\n</code>\nresult = ... # put solution "
          "in this variable\nBEGIN SOLUTION\n<code>\n", "reference_code": "result = a * 2",
          "metadata": {"problem_id": 291, "library_problem_id": 0, "library": "Numpy", "test_case_cnt": 1,
                       "perturbation_type": "Origin", "perturbation_origin_id": 0},
          "code_context": "import numpy as np\ndef test_execution(solution):\n    pass\n"}


def test_ds1000_keeps_its_context_as_hidden_tests(tmp_path: Path) -> None:
    (task,) = converted("ds1000", tmp_path, lines(DS1000), "test.jsonl")
    assert (task.id, task.answers, task.meta["library"]) == ("ds1000/291", ("result = a * 2",), "Numpy")
    assert task.hidden_tests == DS1000["code_context"]
    assert "code_context" not in task.meta
    assert task.public_tests == ""


# ---- FlowSteer-Dataset as it is


def test_flowsteer_records_are_read_as_they_are(tmp_path: Path) -> None:
    records = [
        {"problem": "p", "problem_type": "qa", "source": "triviaqa", "ground_truth": "A", "meta": {"id": "t1", "all_answers":
                                                                                                   ["A", "B"]}},
        {"problem": "p", "problem_type": "qa", "source": "squad_v2", "ground_truth": "none", "meta": {"has_answer": False}},
        {"problem": "p", "problem_type": "mathqa_mc", "source": "mathqa", "ground_truth": "c", "meta": {}},
        {"problem": "p", "problem_type": "code", "source": "apps", "ground_truth": "", "meta": {"input_output": STDIN}},
    ]
    trivia, squad, choice, program = converted("flowsteer", tmp_path, lines(*records), "train_12k.jsonl")
    assert (trivia.id, trivia.answers) == ("triviaqa/t1", ("A", "B"))
    assert (squad.answers, choice.kind, len(program.hidden_tests)) == (("",), "choice", 3)


# ---- errors


@pytest.mark.parametrize(("dataset", "content", "message"), [
    ("gsm8k", lines({"question": "?", "answer": "no result"}), "line 1: the answer has no ####"),
    ("gsm8k", lines({"question": "?", "answer": "#### 1"}, {"question": "?"}), "line 2: no field 'answer'"),
    ("gsm8k", lines({"question": "?", "answer": "#### 1"}) + "{oops\n", "line 2: not JSON"),
    ("math", {"problem": "?", "solution": r"\boxed{3"}, r"no \boxed{} that is closed"),
    ("mathqa", [{"Problem": "?", "options": "a ) 1 , b ) 2", "correct": "e"}], "record 0: the correct option 'e'"),
    ("hotpotqa", [HOTPOT, [1]], "record 1: found a list"),
    ("apps", lines({"question": "?", "input_output": "{"}), "line 1: "),
    ("nq", "", "neither JSON nor JSON lines"),
    ("nq", "[]", "no tasks in it"),
    ("nq", b"PAR1\xff\xfe", "not UTF-8"),
])
def test_a_record_that_does_not_fit_is_named(dataset: str, content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        converted(dataset, tmp_path, content)
    assert message in str(caught.value)
    assert str(tmp_path / "original.json") in str(caught.value)


def test_a_damaged_archive_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read"):
        converted("humaneval", tmp_path, gzip.compress(lines(HUMANEVAL).encode())[:-9], "HumanEval.jsonl.gz")
    with pytest.raises(TaskError, match="is a directory; nq is read from a file"):
        list(convert.convert("nq", tmp_path))


# ---- split, overlap, command line


def test_a_split_has_no_overlap_and_no_repetitions() -> None:
    tasks = toy_tasks("toy_math", 60, 0) + toy_tasks("toy_qa", 40, 0) + toy_tasks("toy_math", 30, 0)
    train, test = convert.split(tasks, 0.25, seed=3)
    keys = [problem_key(task) for task in train + test]
    assert len(set(keys)) == len(keys) == len({problem_key(task) for task in tasks})
    assert Counter(task.source for task in test) == {"toy_math": 15, "toy_qa": 10}
    assert convert.split(tasks[::-1], 0.25, seed=3)[1][0] in test  # by problem, not by position
    assert convert.split(tasks, 0.25, seed=4)[1] != test


def test_overlap_ignores_case_and_punctuation() -> None:
    left = [Task("1", "nq", "qa", "Who wrote “Emma”?", ("x",))]
    right = [Task("1", "nq", "qa", "who wrote Emma", ("x",)), Task("2", "nq", "qa", "who wrote Emmas", ("x",))]
    assert convert.overlap(left, right) == {"nq": (1, 2)}


def run_cli(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tasks.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_line_converts_splits_and_compares(tmp_path: Path) -> None:
    original, out = tmp_path / "mbpp.jsonl", tmp_path / "out.jsonl"
    original.write_text(lines(*({**MBPP, "task_id": n, "text": f"Add {n}."} for n in (1, 20, 30, 700, 40))))
    done = run_cli("convert", "--dataset", "mbpp", "--in", original, "--out", out, "--split", "test")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}: 3 tasks\n", "")
    assert [task.id for task in read_tasks(out)] == ["mbpp/20", "mbpp/30", "mbpp/40"]
    done = run_cli("split", out, out, "--train", tmp_path / "a", "--test", tmp_path / "b", "--test-share", 0.34)
    assert "6 tasks, 3 repeated problems left out" in done.stdout
    assert "overlap: 0" in done.stdout
    assert (len(read_tasks(tmp_path / "a")), len(read_tasks(tmp_path / "b"))) == (2, 1)
    assert run_cli("overlap", out, tmp_path / "b").stdout.startswith("mbpp: 1 of 1 tasks")


def test_bad_records_are_counted_when_asked(tmp_path: Path) -> None:
    original, out = tmp_path / "x.jsonl", tmp_path / "out.jsonl"
    original.write_text(lines({"question": "?", "answer": "#### 1"}, {"question": "?", "answer": "none"}))
    done = run_cli("convert", "--dataset", "gsm8k", "--in", original, "--out", out)
    assert (done.returncode, out.exists()) == (2, False)
    assert "line 2: the answer has no ####" in done.stderr
    done = run_cli("convert", "--dataset", "gsm8k", "--in", original, "--out", out, "--skip-bad")
    assert (done.returncode, done.stdout) == (0, f"{out}: 1 tasks, 1 records left out\n")


def test_inspect_counts_the_unanswerable(tmp_path: Path) -> None:
    convert.write_tasks(str(tmp_path / "t"), convert.convert("squad_v2", _write(tmp_path / "s.json", SQUAD)))
    assert "unanswerable questions: 1" in convert.inspect(read_tasks(tmp_path / "t"))


def _write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path
