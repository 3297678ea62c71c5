"""Tasks: questions with gold answers and tests, read from FlowSteer-Dataset JSONL or made from a seed.

Nothing is repaired in silence: a bad line is an error that names the file and the line. A task keeps its public tests,
which operators may run, apart from its hidden tests, which only the grader runs; meta never holds tests, so that
printing it leaks none.

    python tasks.py --help      convert, inspect, split, overlap, toy: see convert.py
"""

import ast
import itertools
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import toys

MAX_LINE = 16 * 2**20  # bytes; the largest APPS items are a few MB, anything above is not a line of tasks
SOURCES = {
    "math": ("gsm8k", "math", "aime2025", "toy_math", "toy_aime"),
    "choice": ("mathqa", "toy_mathqa"),
    "qa": ("hotpotqa", "squad_v2", "triviaqa", "nq", "toy_qa", "toy_open_qa"),
    "code": ("humaneval", "mbpp", "apps", "ds1000", "toy_code", "toy_stdin_code"),
}  # kind -> the sources that we know
KIND_OF = {source: kind for kind, sources in SOURCES.items() for source in sources}
ALIASES = {"squad": "squad_v2", "squadv2": "squad_v2", "nq_open": "nq", "aime": "aime2025", "aime25": "aime2025",
           "aime_2025": "aime2025", "human_eval": "humaneval", "trivia_qa": "triviaqa", "math_qa": "mathqa",
           "hotpot_qa": "hotpotqa", "ds_1000": "ds1000"}
# Never kept in meta.
TEST_KEYS = {"test", "test_list", "public_tests", "test_imports", "test_setup_code", "input_output", "code_context"}
EXPECTED = "expected one JSON object a line with problem, ground_truth and source"


class TaskError(ValueError):
    """Task data that cannot be used; the text says where it is, what is wrong and what is expected."""


@dataclass(frozen=True)
class Task:
    """One question. Tests are Python text or a list of {input, output} cases.

    Cases are for programs that read stdin, or for calls when entry_point is given (input: the list of arguments).
    A code task without hidden tests can be read; grading it is then reported as an error, never as a wrong answer.
    """

    id: str  # unique among the tasks that were read together
    source: str  # dataset name; chooses the grader
    kind: str  # math, qa, code or choice; chooses the grader of an unknown source
    problem: str
    answers: tuple[str, ...]  # never empty. Gold answer + aliases; code: reference program or ""; unanswerable: ("",)
    entry_point: str | None = None
    public_tests: str | list = ""
    hidden_tests: str | list = ""
    meta: dict = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- reading
def read_tasks(paths: str | Path | Sequence[str | Path]) -> list[Task]:
    """Read FlowSteer-Dataset JSONL files in order.

    A repeated id gets the suffix #2, #3, ...: data sets repeat items to weigh them, so this is no error.
    """
    tasks, seen = [], Counter()
    for path in [paths] if isinstance(paths, str | Path) else paths:
        before = len(tasks)
        for number, line in _lines(Path(path)):
            try:
                record = json.loads(line, parse_constant=_refuse)
                json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair would fail late, in a tokenizer
                task = from_record(record, number)
            except TaskError as error:
                raise TaskError(f"{path}:{number}: {error}") from None
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{path}:{number}: not JSON ({error}); {EXPECTED}") from None
            ident = task.id
            while seen[ident]:
                seen[task.id] += 1
                ident = f"{task.id}#{seen[task.id]}"
            seen[ident] = 1
            tasks.append(replace(task, id=ident))
        if len(tasks) == before:
            raise TaskError(f"{path}: no tasks in it; {EXPECTED}")
    if not tasks:
        raise TaskError("no task files given")
    return tasks


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each non-blank line, never holding more than MAX_LINE bytes."""
    number = 0
    try:
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE + 1)
                if len(line) > MAX_LINE:
                    raise TaskError(f"{path}:{number}: line longer than {MAX_LINE} bytes; expected one task a line")
                if not line:
                    return
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()  # a byte-order mark is tolerated
                if text:
                    yield number, text
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}:{number}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def from_record(record: object, number: int = 0) -> Task:
    """Make a task of one FlowSteer-Dataset object; `number` names a task that has no meta.task_id."""
    if not isinstance(record, dict):
        raise TaskError(f"found a {type(record).__name__}; {EXPECTED}")
    problem, truth = _first(record, "problem", "question"), _first(record, "ground_truth", "answer")
    if not isinstance(problem, str) or not problem.strip():
        raise TaskError(f"problem (or question) must be a non-empty string, got {problem!r:.60}")
    meta = {} if record.get("meta") is None else record["meta"]
    if not isinstance(meta, dict):
        raise TaskError(f"meta must be an object, got {meta!r:.60}")
    source, kind = _source_and_kind(record)
    name = str(_first(meta, "task_id", "id") if _first(meta, "task_id", "id") is not None else number)
    name = name if name.lower().startswith(source) else f"{source}/{name}"
    if kind == "code" or source == "squad_v2":  # no reference program; an unanswerable question
        truth = "" if truth in (None, []) else truth
    answers = truth if isinstance(truth, list) else [truth]
    if kind == "qa" and isinstance(meta.get("all_answers"), list):  # FlowSteer-Dataset's accepted variants
        answers = [*answers, *meta["all_answers"]]
    if source == "squad_v2" and meta.get("has_answer") is False:
        answers = [""]
    if not answers or not all(isinstance(answer, str | int | float) for answer in answers):
        raise TaskError(f"ground_truth (or answer) must be a string, a number or a list of them, got {truth!r:.60}")
    answers = tuple(dict.fromkeys(map(str, answers)))  # without repetitions, in order
    if kind == "code":
        return _code_task(Task(name, source, kind, problem, answers[:1]), meta)
    if source != "squad_v2" and not all(answer.strip() for answer in answers):
        raise TaskError("ground_truth (or answer) is empty; only squad_v2 has unanswerable questions")
    return Task(name, source, kind, problem, answers, meta=meta)


def to_record(task: Task) -> dict:
    """Return the FlowSteer-Dataset object that reads back as this task."""
    tests = {"entry_point": task.entry_point, "test": task.hidden_tests, "public_tests": task.public_tests}
    return {
        "problem": task.problem,
        "ground_truth": task.answers[0] if len(task.answers) == 1 else list(task.answers),
        "source": task.source,
        "problem_type": task.kind,
        "meta": {**task.meta, "task_id": task.id, **(tests if task.kind == "code" else {})},
    }


def problem_key(task: Task) -> str:
    """What two tasks with the same problem have in common: the letters and digits of its text, without case."""
    return "".join(char for char in unicodedata.normalize("NFKC", task.problem).casefold() if char.isalnum())


def _first(record: dict, *names: str) -> object:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _source_and_kind(record: dict) -> tuple[str, str]:
    """Return source and kind. A known source decides the kind (MathQA says math, but is graded by letter)."""
    source, kind = _first(record, "source", "dataset"), record.get("problem_type")
    source = re.sub(r"[\s-]+", "_", str(source or kind).strip().lower())
    source = ALIASES.get(source, source)
    kind = KIND_OF.get(source, "choice" if kind in ("multiple_choice", "mathqa_mc") else kind)
    if kind not in tuple(SOURCES):
        known = f"source {source!r} is none of {', '.join(KIND_OF)}"
        raise TaskError(f"{known}; so problem_type must be one of {', '.join(SOURCES)}, got {kind!r:.60}")
    return source, kind


# ---------------------------------------------------------------------------------------------------------- code tasks
def _code_task(task: Task, meta: dict) -> Task:
    """Fill in entry point, tests and the complete reference program from meta, in each dataset's way."""
    entry_point, prompt, body = meta.get("entry_point"), meta.get("prompt") or task.problem, task.answers[0]
    public, hidden = meta.get("public_tests") or "", _first(meta, "test", "test_list", "code_context") or ""
    kept = {key: value for key, value in meta.items() if key not in TEST_KEYS | {"entry_point", "prompt"}}
    if meta.get("input_output"):
        entry_point, hidden, wrapped = _input_output(meta["input_output"])
        public = public or sample_cases(task.problem, hidden)
        kept |= {"wrapped_outputs": True} if wrapped else {}
    if isinstance(hidden, list) and all(isinstance(line, str) for line in hidden):
        hidden = "\n".join(hidden)
    cases = hidden if isinstance(hidden, list) else []
    valid = all(isinstance(case, dict) and {"input", "output"} <= set(case) for case in cases)
    if not isinstance(entry_point, str | None) or not isinstance(prompt, str) or not isinstance(public, str | list):
        raise TaskError("meta.entry_point and meta.prompt must be strings, meta.public_tests text or a list")
    if not isinstance(hidden, str | list) or not valid:
        raise TaskError(f"meta.test must be text, a list of asserts or of {{input, output}}, got {hidden!r:.60}")
    if task.source == "humaneval" and entry_point and isinstance(hidden, str):
        if body and f"def {entry_point}(" not in body:  # the canonical body continues the prompt
            body = prompt.rstrip("\n") + "\n" + body
        helpers = _helpers(prompt, entry_point)
        hidden = hidden if not hidden or hidden.startswith(helpers) else helpers + hidden
        public = public or docstring_asserts(prompt, entry_point)
    if task.source == "mbpp" and isinstance(hidden, str):
        setup = [part for part in (meta.get("test_imports"), meta.get("test_setup_code")) if part]
        hidden = "\n".join([*(part if isinstance(part, str) else "\n".join(part) for part in setup), hidden])
        public = public or _first_assert(hidden)
    if task.source == "ds1000":
        kept["frame"] = ds1000_frame(prompt)
    if task.source == "apps" and entry_point and isinstance(hidden, list) and isinstance(public, list):
        hidden, public = _int_keys(hidden), _int_keys(public)
    return replace(task, answers=(body,), entry_point=entry_point, public_tests=public, hidden_tests=hidden, meta=kept)


def _input_output(value: object) -> tuple[str | None, list[dict], bool]:
    """Return (fn_name, cases, whether the outputs were wrapped) of APPS' {inputs, outputs[, fn_name]} or its JSON text."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        pairs, name = list(zip(value["inputs"], value["outputs"], strict=True)), value.get("fn_name")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TaskError(f"meta.input_output must hold lists inputs and outputs of one length ({error!r:.70})") from None
    wrapped = bool(name) and all(isinstance(wanted, list) and len(wanted) == 1 for _, wanted in pairs)
    if not name:  # a list stands for the lines of the text
        pairs = [[text if isinstance(text, str) else _lines_of(text) for text in pair] for pair in pairs]
    elif wrapped:
        pairs = [(given, wanted[0]) for given, wanted in pairs]  # APPS wraps the returned value in a list
    return name or None, [{"input": given, "output": wanted} for given, wanted in pairs], wrapped


def _lines_of(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _int_keys(cases: list[dict]) -> list[dict]:
    """Undo what JSON does to dictionaries with integer keys, in arguments and results, as APPS' own script does."""
    def undo(value: Any) -> Any:
        whole = isinstance(value, dict) and value and all(re.fullmatch(r"-?[0-9]{1,18}", str(key)) for key in value)
        return {int(key): item for key, item in value.items()} if whole else value

    return [{**case, "input": [undo(item) for item in case["input"]] if isinstance(case["input"], list) else case["input"],
             "output": undo(case["output"])} for case in cases]


def sample_cases(question: str, cases: list[dict]) -> list[dict]:
    """The public ones of APPS' cases: those that stand, input and output line by line, in the question's examples.

    Examples begin at "-----Example" or "Sample Input"; where none of the cases stands there, the first case is public.
    """
    def plain(text: object) -> str:
        return "\n" + "\n".join(line.strip() for line in str(text).splitlines() if line.strip()) + "\n"

    begin = re.search(r"-----\s*(?:Example|Sample)|^\W*(?:Examples?|Sample Input)\b", question, re.MULTILINE | re.IGNORECASE)
    examples = plain(question[begin.start():]) if begin else ""
    shown = [case for case in cases if isinstance(case["input"], str) and case["input"].strip()
             and plain(case["input"]) in examples and plain(case["output"]) in examples]
    return shown or cases[:1]


def ds1000_frame(prompt: str) -> str:
    """The code that a DS-1000 question shows around its solution, with [insert] for it; "" if it shows none.

    That is the last <code> block that holds something, closed or (where a function has to be completed) open, or the whole
    question where it is code as in the Matplotlib ones; at the end the variables into which the solution has to be put.
    """
    blocks = [block for block in re.findall(r"<code>\n?(.*?)(?:</code>|\Z)", prompt, re.DOTALL) if block.strip()]
    shown = blocks[-1] if blocks else prompt if "# SOLUTION START" in prompt else ""
    wanted = re.search(r"^([\w, ]+?) *= *\.\.\. *# *put solution in th", prompt, re.MULTILINE)
    return f"{shown.rstrip()}\n[insert]\n{wanted[1] if wanted else ''}" if shown.strip() else ""


def parse(text: str) -> list[ast.stmt]:
    """Return the statements of a program, none where it does not parse: nothing can be learnt from it then."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's prompts
            return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _helpers(prompt: str, entry_point: str) -> str:
    """Return imports and helper functions of a HumanEval prompt (a few checks call them), "" where it has no helper."""
    others = [node for node in parse(prompt) if getattr(node, "name", None) != entry_point]
    has_helper = any(isinstance(node, ast.FunctionDef) for node in others)
    return "".join(ast.unparse(node) + "\n" for node in others) if has_helper else ""


def _first_assert(tests: str) -> str:
    """Return the tests up to and including their first assert."""
    body = parse(tests)
    end = next((i for i, node in enumerate(body, 1) if isinstance(node, ast.Assert)), 0)
    return "\n".join(ast.get_source_segment(tests, node) or "" for node in body[:end])


_BULLET = re.compile(r"^\s*(>>>|[*-] )?\s*(assert )?")
_ARROW = re.compile(r"\)\s*(# *)?(==>|=>|==|=|->|➞|→|returns?\b|should return\b)")


def docstring_asserts(prompt: str, entry_point: str) -> str:
    """Turn a docstring's examples into asserts: `>>> f(x)` and its output, `f(x) == y`, `f(x) ==> y`, `f(x) -> y`.

    Arguments and results must be literals; anything else is left out. So is ("Venus"), which may mean a tuple.
    A docstring can be wrong (HumanEval/47 and /116 are); its asserts are then as wrong as the text to be solved.
    """
    functions = [node for node in parse(prompt) if isinstance(node, ast.FunctionDef) and node.name == entry_point]
    lines = (ast.get_docstring(functions[-1]) or "").splitlines() if functions else []
    asserts = []
    for i, line in enumerate(lines):
        text = _BULLET.sub("", line)
        if ">>>" in line and not _ARROW.search(text):  # doctest: the output is on the lines that follow
            output = itertools.takewhile(lambda row: row.strip() and ">>>" not in row, lines[i + 1 :])
            text += " == " + "\n".join(output)
        text = _ARROW.sub(") ==", text, count=1).rstrip(" .;")
        match parse(text):
            case [ast.Expr(ast.Compare(ast.Call(ast.Name(name)) as call, [ast.Eq()], [wanted]))] if name == entry_point:
                vague = text.endswith(")") and isinstance(wanted, ast.Constant)
                values = [*call.args, *(keyword.value for keyword in call.keywords), wanted]
                if not vague and all(map(_is_literal, values)):
                    asserts.append(f"assert {ast.unparse(call)} == {ast.unparse(wanted)}")
    return "\n".join(asserts)


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------ toy tasks, CLI
def toy_tasks(source: str, n: int, seed: int) -> list[Task]:
    """Return items 0..n-1 of a toy source, a pure function of its arguments (see toys.py)."""
    if source not in toys.MAKERS or n < 0:
        raise TaskError(f"toy tasks are {', '.join(toys.MAKERS)}, 0 or more of them; got {n} of {source!r}")
    return [from_record(record) for record in toys.toy_records(source, n, seed)]


def main() -> None:
    import convert  # late: it stands above this file

    convert.main()


if __name__ == "__main__":
    main()
