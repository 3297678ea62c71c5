"""From the public data sets' original files to our task files, and looking at task files: `python tasks.py ...`.

    python tasks.py convert --dataset squad_v2 --in dev-v2.0.json --out squad_v2.jsonl
    python tasks.py inspect squad_v2.jsonl
    python tasks.py split all.jsonl --train train.jsonl --test test.jsonl --test-share 0.1 --seed 0
    python tasks.py overlap train.jsonl test.jsonl

One function a data set, from one original record to records in FlowSteer-Dataset's schema; its docstring names the fields
that it expects, and error messages quote it. JSON, JSON lines and .gz of both are told apart by what they hold. Nothing
is repaired in silence: a record that does not fit is an error that names file and record (--skip-bad counts it instead).
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mathgrade
import toys
from tasks import ALIASES, Task, TaskError, from_record, parse, problem_key, read_tasks, to_record, toy_tasks

Record = dict[str, Any]


# --------------------------------------------------------------------------------------------------- original files
def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (position, object): the elements of a JSON array, the lines of JSON lines, or one JSON object."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            number, first = next(lines, (0, ""))
            try:
                value = json.loads(first)
            except ValueError:  # a document over several lines, or nothing at all
                value = json.loads(first + file.read())
            if isinstance(value, list):
                yield from ((f"record {i}", item) for i, item in enumerate(value))
                return
            yield f"line {number}", value
            for number, line in lines:
                try:
                    yield f"line {number}", json.loads(line)
                except ValueError as error:
                    raise TaskError(f"{path}: line {number}: not JSON ({error})") from None
    except (OSError, EOFError) as error:  # EOFError: a .gz that was cut off
        raise TaskError(f"{path}: cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        hint = "Parquet; export it as JSON lines first" if path.suffix == ".parquet" else "not UTF-8"
        raise TaskError(f"{path}: {hint} (byte {error.start}: {error.reason})") from None
    except ValueError as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"{path}: neither JSON nor JSON lines ({error})") from None


def _by_number(path: Path) -> tuple:
    return path.parent, not path.stem.isdigit(), int(path.stem) if path.stem.isdigit() else 0, path.name


def read_directory(dataset: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (position, object) of MATH's tree of JSON files or APPS' directory of directories."""
    if dataset == "math":
        for file in sorted(path.rglob("*.json"), key=_by_number):
            name = str(file.relative_to(path).with_suffix(""))
            yield name, {**dict(read_records(file)).popitem()[1], "unique_id": name}
    elif dataset == "apps":
        for question in sorted(path.rglob("question.txt"), key=lambda file: _by_number(file.parent)):
            folder, record = question.parent, {"question": question.read_text(encoding="utf-8")}
            for name in ("solutions.json", "input_output.json", "starter_code.py", "metadata.json"):
                text = (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else ""
                record |= json.loads(text or "{}") if name == "metadata.json" else {name.partition(".")[0]: text}
            yield str(folder.relative_to(path)), {**record, "problem_id": str(folder.relative_to(path))}
    else:
        raise TaskError(f"{path} is a directory; {dataset} is read from a file, only math and apps from directories")


# -------------------------------------------------------------------------------------------------------- converters
def _record(problem: str, truth: object, task_id: object = None, **meta: object) -> Record:
    """A record without source and kind; meta without what is None."""
    meta = {key: value for key, value in {"task_id": task_id, **meta}.items() if value is not None}
    return {"problem": problem, "ground_truth": truth, "meta": meta}


def gsm8k(r: Record) -> Iterator[Record]:
    """{"question", "answer"}; the answer ends in "#### " and the result"""
    found = re.search(r"####\s*\$?(-?[0-9][0-9.,]*)", r["answer"])
    if not found:
        raise ValueError("the answer has no #### with a number behind it")
    yield _record(r["question"], found[1].replace(",", "").rstrip("."))


def math(r: Record) -> Iterator[Record]:
    r"""{"problem", "solution", "level", "type"}; the answer is the solution's last \boxed{}, or "answer" where given"""
    truth = r["answer"] if r.get("answer") else mathgrade.last_box(r["solution"])
    if truth is None:
        raise ValueError(r"the solution has no \boxed{} that is closed")
    yield _record(r["problem"], truth, r.get("unique_id"), level=r.get("level"), subject=r.get("type") or r.get("subject"))


def hotpotqa(r: Record) -> Iterator[Record]:
    """{"_id", "question", "answer", "context": [[title, [sentence, ...]], ...]}, or {"title": [], "sentences": []} there"""
    context = r["context"]
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    passages = "\n".join(f"[{title}] {''.join(sentences)}" for title, sentences in pairs)
    yield _record(f"{r['question']}\n\nContext:\n{passages}", r["answer"], r.get("_id") or r.get("id"), type=r.get("type"),
                  level=r.get("level"))


NO_ANSWER_NOTE = 'If the context does not hold the answer, answer "unanswerable".'


def squad_v2(r: Record) -> Iterator[Record]:
    """{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers", "is_impossible"}]}]}]}, or one a line"""
    if "data" in r:
        flat = ((article, part, qa) for article in r["data"] for part in article["paragraphs"] for qa in part["qas"])
    else:
        flat = iter([(r, r, r)])
    for article, part, qa in flat:
        answers = qa["answers"]
        texts = answers["text"] if isinstance(answers, dict) else [answer["text"] for answer in answers]
        texts = [] if qa.get("is_impossible") else texts
        yield _record(f"{qa['question'].strip()}\n\nContext:\n{part['context']}\n\n{NO_ANSWER_NOTE}", texts, qa["id"],
                      title=article.get("title"))


def called_function(tests: Iterable[str], code: str) -> str | None:
    """The function of `code` that the tests call first: the name that a solution must have."""
    defined = [node.name for node in parse(code) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    calls = [node.func.id for test in tests for node in ast.walk(ast.Module(parse(test), []))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return next((name for name in calls if name in defined), None)


def mbpp(r: Record) -> Iterator[Record]:
    """{"task_id", "text" or "prompt", "code", "test_list", "test_setup_code" or "test_imports"}"""
    code, number = r["code"].replace("\r\n", "\n"), int(r["task_id"])
    split = next(name for end, name in ((10, "prompt"), (510, "test"), (600, "validation"), (1e9, "train")) if number <= end)
    yield _record(r["text"] if "text" in r else r["prompt"], code, number, split=split, test_list=r["test_list"],
                  entry_point=called_function(r["test_list"], code), test_imports=r.get("test_imports"),
                  test_setup_code=r.get("test_setup_code"))


def humaneval(r: Record) -> Iterator[Record]:
    """{"task_id", "prompt", "entry_point", "canonical_solution", "test"}"""
    yield _record(r["prompt"], r["canonical_solution"], r["task_id"], entry_point=r["entry_point"], test=r["test"])


def triviaqa(r: Record) -> Iterator[Record]:
    """{"Data": [{"Question", "QuestionId", "Answer": {"Value", "NormalizedAliases", "HumanAnswers"}}]}, or one a line"""
    for item in r.get("Data", [r]):
        item = {key.replace("_", "").lower(): value for key, value in item.items()}
        answer = {key.replace("_", "").lower(): value for key, value in item["answer"].items()}
        golds = [*(answer.get("normalizedaliases") or answer["aliases"]), *answer.get("humananswers", [])]
        # The value is written as people write it; it comes first, and is among the normalised aliases anyway.
        yield _record(item["question"], [answer["value"], *golds], item.get("questionid"))


def nq(r: Record) -> Iterator[Record]:
    """{"question", "answer": [alias, ...]}"""
    yield _record(r["question"], r["answer"])


def options_of(text: str) -> dict[str, str]:
    """MathQA's options: "a ) 12 , b ) 15 , ..." or the text of a Python list of such. An option may hold commas."""
    if text.lstrip().startswith("["):
        text = " , ".join(ast.literal_eval(text.strip()))
    marks, start = [], 0
    for letter in "abcdefghij":
        mark = re.compile(rf"(?:^|,)\s*{letter}\s*\)").search(text, start)
        if not mark:
            break
        marks.append((letter, mark.start(), start := mark.end()))
    ends = [begin for _, begin, _ in marks[1:]] + [len(text)]
    return {letter: text[begin:end].strip() for (letter, _, begin), end in zip(marks, ends, strict=True)}


def mathqa(r: Record) -> Iterator[Record]:
    """{"Problem", "options": "a ) 12 , b ) 15 , ...", "correct": letter, "category"}"""
    options, letter = options_of(r["options"]), r["correct"].strip().lower()
    if letter not in options:
        raise ValueError(f"the correct option {letter!r} is none of {options}")
    listed = "\n".join(f"{name}) {text}" for name, text in options.items())
    yield _record(f"{r['Problem'].strip()}\n\nOptions:\n{listed}\n\nAnswer with the letter of the right option.", letter,
                  options=options, category=r.get("category"))


def aime2025(r: Record) -> Iterator[Record]:
    """{"problem" or "question", "answer": an integer of 0 to 999, "id" or "problem_idx"}, in any case of letters"""
    r = {key.lower(): value for key, value in r.items()}
    values = [value for value in mathgrade.number(str(r["answer"])) if value in range(1000)]
    if len(values) != 1:
        raise ValueError(f"the answer is {r['answer']!r}, not an integer of 0 to 999")
    yield _record(r["problem"] if "problem" in r else r["question"], str(values[0]),
                  next((r[name] for name in ("id", "problem_idx") if r.get(name) is not None), None))


def _loaded(value: Any, empty: Any) -> Any:
    return (json.loads(value) if value.strip() else empty) if isinstance(value, str) else value or empty


def apps(r: Record) -> Iterator[Record]:
    """{"problem_id", "question", "solutions", "input_output", "starter_code", "difficulty"}; the middle ones JSON texts"""
    solutions, cases = _loaded(r.get("solutions"), [""]), _loaded(r.get("input_output"), {})
    starter, problem = (r.get("starter_code") or "").strip("\n"), r["question"].strip()
    problem += f"\n\nStart from:\n```python\n{starter}\n```" if starter else ""
    problem += "" if cases.get("fn_name") else "\n\nRead standard input and write standard output."
    yield _record(problem, solutions[0], r.get("problem_id", r.get("id")), input_output=cases or None,
                  difficulty=r.get("difficulty"))


def ds1000(r: Record) -> Iterator[Record]:
    """{"prompt", "reference_code", "code_context", "metadata": {"problem_id", "library"}}"""
    meta = r.get("metadata", r)
    yield _record(r["prompt"], r["reference_code"], meta.get("problem_id"), library=meta.get("library"),
                  perturbation_type=meta.get("perturbation_type"), code_context=r["code_context"])


def flowsteer(r: Record) -> Iterator[Record]:
    """{"problem", "ground_truth", "source", "problem_type", "meta"}: read as it is"""
    yield r


CONVERTERS: dict[str, Callable[[Record], Iterator[Record]]] = {
    function.__name__: function for function in (gsm8k, math, hotpotqa, squad_v2, mbpp, humaneval, triviaqa, nq, mathqa,
                                                 aime2025, apps, ds1000, flowsteer)}


def convert(dataset: str, path: str | Path, skipped: list[str] | None = None) -> Iterator[Task]:
    """Yield the tasks of an original file or directory. Raises TaskError at the first bad record, unless a list for the
    messages of `skipped` ones is given."""
    path, dataset = Path(path), ALIASES.get(dataset, dataset)
    function, index = CONVERTERS[dataset], 0
    stem = path.name.partition(".")[0]
    for position, original in read_directory(dataset, path) if path.is_dir() else read_records(path):
        try:
            if not isinstance(original, dict):
                raise TypeError(f"found a {type(original).__name__}")
            for record in function(original):
                if dataset != "flowsteer":
                    record |= {"source": dataset}
                    record["meta"].setdefault("task_id", f"{stem}-{index}")
                task = from_record(record, index)
                index += 1
                yield task
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            message = f"{path}: {position}: {reason}; expected {dataset} as {function.__doc__}"
            if skipped is None:
                raise TaskError(message) from None
            skipped.append(message)
    if index == 0:
        raise TaskError(f"{path}: no tasks in it; expected {dataset} as {function.__doc__}")


# ------------------------------------------------------------------------------------------- looking at and splitting
def inspect(tasks: list[Task]) -> str:
    """Describe tasks: counts, lengths, repetitions, unanswerable questions, missing tests, three examples."""
    lengths = sorted(len(task.problem) for task in tasks)
    percentiles = [f"p{p} {lengths[(len(lengths) - 1) * p // 100]}" for p in (0, 10, 50, 90, 99, 100)]
    code = [task for task in tasks if task.kind == "code"]
    counts = Counter((task.kind, task.source) for task in tasks)
    rows = [f"{count:8}  {kind:6}  {source}" for (kind, source), count in sorted(counts.items())]
    rows += [f"{len(tasks):8}  in all", "", f"problem length in characters: {', '.join(percentiles)}"]
    rows += [f"repeated problems: {len(tasks) - len({(task.source, problem_key(task)) for task in tasks})}"]
    rows += [f"repeated ids: {sum(re.search('#[0-9]+$', task.id) is not None for task in tasks)}"]
    rows += [f"unanswerable questions: {sum(task.kind == 'qa' and not any(task.answers) for task in tasks)}"]
    rows += [f"code tasks without hidden tests: {sum(not task.hidden_tests for task in code)}"]
    rows += [f"code tasks without public tests: {sum(not task.public_tests for task in code)}"]
    for task in [tasks[i * len(tasks) // 3] for i in range(min(3, len(tasks)))]:
        rows += ["", f"{task.id} ({task.source}, {task.kind})", f"  problem  {task.problem[:300]!r}"]
        rows += [f"  answers  {str(task.answers)[:200]}"]
    return "\n".join(rows)


def split(tasks: list[Task], test_share: float, seed: int) -> tuple[list[Task], list[Task]]:
    """(train, test) without repeated problems; of each source the share `test_share`, rounded, is for the test.

    Which ones is decided by a hash of seed and problem, so a task keeps its side as long as the sizes allow.
    """
    unique = {problem_key(task): task for task in reversed(tasks)}  # of equal ones the first
    tasks = [task for task in tasks if unique[problem_key(task)] is task]
    test: set[str] = set()
    for source in sorted({task.source for task in tasks}):
        keys = [problem_key(task) for task in tasks if task.source == source]
        keys.sort(key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
        test |= set(keys[: round(len(keys) * test_share)])
    return [t for t in tasks if problem_key(t) not in test], [t for t in tasks if problem_key(t) in test]


def overlap(left: list[Task], right: list[Task]) -> dict[str, tuple[int, int]]:
    """{source: (tasks of `right` whose problem stands in `left`, tasks of `right`)}."""
    known = {problem_key(task) for task in left}
    return {source: (sum(problem_key(t) in known for t in right if t.source == source), n)
            for source, n in sorted(Counter(task.source for task in right).items())}


def write_tasks(path: str, tasks: Iterable[Task]) -> int:
    """Write task JSONL whole or not at all; return how many."""
    temporary, count = Path(f"{path}.{os.getpid()}.tmp"), 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for task in tasks:
                file.write(json.dumps(to_record(task), ensure_ascii=False) + "\n")
                count += 1
        temporary.replace(path)
    except OSError as error:
        raise TaskError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return count


def run_convert(args: argparse.Namespace) -> None:
    skipped: list[str] | None = [] if args.skip_bad else None
    found = convert(args.dataset, args.input, skipped)
    if args.split:
        found = (task for task in found if task.meta.get("split") == args.split)
    count = write_tasks(args.out, found)
    print(f"{args.out}: {count} tasks" + (f", {len(skipped)} records left out" if skipped else ""))
    for message in (skipped or [])[:10]:
        print(f"  {message}", file=sys.stderr)


def run_split(args: argparse.Namespace) -> None:
    if not 0 < args.test_share < 1:
        raise TaskError(f"--test-share is {args.test_share}; it must lie between 0 and 1")
    tasks = read_tasks(args.files)
    train, test = split(tasks, args.test_share, args.seed)
    print(f"{len(tasks)} tasks, {len(tasks) - len(train) - len(test)} repeated problems left out")
    for path, part in ((args.train, train), (args.test, test)):
        print(f"{path}: {write_tasks(path, part)} tasks, {dict(Counter(task.source for task in part))}")
    print(f"overlap: {sum(n for n, _ in overlap(train, test).values())}")


def run_overlap(args: argparse.Namespace) -> None:
    for source, (n, of) in overlap(read_tasks(args.left), read_tasks(args.right)).items():
        print(f"{source}: {n} of {of} tasks of {args.right} stand in {args.left}")


def run_toy(args: argparse.Namespace) -> None:
    for task in toy_tasks(args.source, args.n, args.seed):
        print(json.dumps(to_record(task), ensure_ascii=False))


def main() -> None:
    """The commands of `python tasks.py`."""
    parser = argparse.ArgumentParser(prog="tasks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="read a public data set's original files, write task JSONL")
    command.add_argument("--dataset", required=True, choices=[*CONVERTERS, *ALIASES], help="whose format the original has")
    command.add_argument("--in", required=True, dest="input", metavar="ORIGINAL", help="file, or directory (math, apps)")
    command.add_argument("--out", required=True, metavar="FILE", help="task file to write")
    command.add_argument("--split", choices=("prompt", "test", "validation", "train"), help="of mbpp, by its official ids")
    command.add_argument("--skip-bad", action="store_true", help="leave out records that do not fit, and count them")
    command.set_defaults(run=run_convert)
    command = commands.add_parser("inspect", help="count, measure and show the tasks of JSONL files")
    command.add_argument("files", nargs="+", metavar="FILE", help="task file")
    command.set_defaults(run=lambda args: print(inspect(read_tasks(args.files))))
    command = commands.add_parser("split", help="split into train and test, without repeated problems")
    command.add_argument("files", nargs="+", metavar="FILE", help="task file")
    command.add_argument("--train", required=True, metavar="FILE", help="to write: training tasks")
    command.add_argument("--test", required=True, metavar="FILE", help="to write: test tasks")
    command.add_argument("--test-share", type=float, default=0.1, help="of each source (default %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="another seed, another split (default 0)")
    command.set_defaults(run=run_split)
    command = commands.add_parser("overlap", help="how many tasks of the second file stand in the first")
    command.add_argument("left", metavar="FILE", help="say, the training tasks")
    command.add_argument("right", metavar="FILE", help="say, the test tasks")
    command.set_defaults(run=run_overlap)
    command = commands.add_parser("toy", help="print toy tasks as JSONL")
    command.add_argument("source", choices=tuple(toys.MAKERS), help="which kind")
    command.add_argument("-n", type=int, default=3, help="how many (default 3)")
    command.add_argument("--seed", type=int, default=0, help="another seed, other tasks (default 0)")
    command.set_defaults(run=run_toy)
    args = parser.parse_args()
    try:
        args.run(args)
        sys.stdout.flush()
    except TaskError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except BrokenPipeError:  # `| head` has seen enough; keep the interpreter from flushing into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
