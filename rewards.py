"""Graders per dataset family, and the reward of a workflow (paper Eq. 11-14).

    grade(task, answer)            -> Grade: was the final answer right?
    reward(canvas, grade, config)  -> RewardParts: diversity of the workflow, and the grade that it releases

A wrong answer and a grader that failed are different things: the first is score 0, the second a Grade with an `error`,
which the caller must drop and count, never learn from. Nothing here repairs an answer beyond the published protocols
and the rules written at each grader; training and evaluation use the same ones. What counts as the answer in a text:

    math    the last balanced box, else what follows the last ####, else X of "answer is X" in the last line, else the
            last $..$, else all of it (mathgrade.math_answer)
    choice  the letter in what math_answer finds
    qa      all of it, as the official scripts take it
    code    the last ```python block, else all of it
"""

import ast
import math
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import codegrade
import mathgrade
import sandbox
from hacks import credit
from operators import extract_code
from tasks import KIND_OF, Task

if TYPE_CHECKING:
    from canvas import Canvas


@dataclass(frozen=True)
class Grade:
    """Result of one grading. With an `error` training must drop the trajectory; evaluation counts the zeros."""

    score: float  # in [0, 1], what training is rewarded with: F1 for question answering, else em
    em: float
    f1: float
    passed: bool | None = None  # code only: all hidden tests passed
    error: str = ""  # our failure: time limit of the verifier, sandbox, a task without tests


def grade(task: Task, answer: str) -> Grade:
    """Grade a final answer by the rules of its source, or of its kind where the source is unknown. Thread-safe.

    An empty answer scores 0, but for squad_v2, where it is the official way to say that there is no answer.
    """
    kind = KIND_OF.get(task.source, task.kind)
    grader = BY_SOURCE.get(task.source, BY_KIND[kind])
    if not answer.strip() and task.source != "squad_v2":
        return Grade(0.0, 0.0, 0.0, passed=False if kind == "code" else None)
    try:
        return grader(task, answer)
    except (mathgrade.VerifierError, sandbox.SandboxError) as error:
        return Grade(0.0, 0.0, 0.0, error=str(error) or type(error).__name__)


def _all_or_nothing(right: bool) -> Grade:
    return Grade(float(right), float(right), float(right))


# ------------------------------------------------------------------------------------------------------ math, choice
def grade_math(task: Task, answer: str) -> Grade:
    """gsm8k, math, aime2025, toy_math. A comparison that runs out of time is an error, not a wrong answer.

    It earns nothing either way: an answer made to be slow has score 0 in evaluation and leaves the batch in training.
    """
    return _all_or_nothing(any(mathgrade.same_math(gold, answer) for gold in task.answers))


_LETTER = re.compile(
    r"(?:(?:the |my )?(?:correct |right |best |final )?(?:option|choice|answer)(?: is)?\s*[:=-]?\s*)*"
    r"[(\[\"'“]?\s*([a-j])\s*(?:[)\].:,\"'”=-](?:\s.*)?|\s(?:because|since)\s.*"
    r"|[)\]]?\sis (?:the |my )?(?:correct |right |best |final )?(?:option|choice|answer)\W*)?",
    re.DOTALL,
)


def choice_letter(text: str) -> str:
    """Return the letter of `c`, `(c)`, `c ) 30`, `Option C: 30`, a boxed or `answer is` one; "" if there is none."""
    words = _plain_words(mathgrade.math_answer(text))
    match = _LETTER.fullmatch(words)
    several = match and re.search(r"(?:,|\bor|\band)\s*\(?[a-j]\)?(?![\w'])", words[match.end(1):])  # a list of guesses
    return match[1] if match and not several else ""


def _plain_words(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\\[ ,;:!]|\\q?quad\b|~", " ", text.replace("*", "").replace("`", "")).strip().lower()


def grade_choice(task: Task, answer: str) -> Grade:
    """mathqa and other multiple choice: the option's letter. The option's value instead of its letter is wrong."""
    letter = choice_letter(answer)
    golds = [choice_letter(gold) or _plain_words(gold) for gold in task.answers]
    return _all_or_nothing(letter in golds if letter else _plain_words(answer) in golds)


def answer_key(task: Task, answer: str) -> str:
    """What two answers with the same result have in common, as far as it can be told cheaply: for votes, not for grades."""
    if task.kind == "math":
        values = mathgrade.number(mathgrade.math_answer(answer))
        return str(max(values)) if values else "".join(mathgrade.math_answer(answer).split())
    if task.kind == "choice":
        return choice_letter(answer) or _plain_words(answer)
    return squad_normalise(answer) if task.kind == "qa" else program(task, answer).strip()


# -------------------------------------------------------------------------------------------------- question answering
# Normalised texts, without articles, that say that there is no answer and nothing else.
_TEXTS = r"(?:(?:this|that|given|provided|above) )*(?:context|text|passage|paragraph|article|information)(?: given| provided)?"
_BY = rf"(?: (?:from|in|by|on|with|using|based on) {_TEXTS})?"
_SUBJECT = rf"(?:based on {_TEXTS} )?(?:(?:{_TEXTS}|(?:this |that |given )?question|answer|it|this|that) )?"
_CANNOT = "(?:cannot|can not|cant|could not|couldnt)"
_IT = "(?: (?:this|that|it|(?:this |that )?(?:question|information|answer)|answer to (?:this |that )?question))?"
_FIND = "(?:answer|tell|say|determine)"
_TO_ANSWER = rf"(?: to answer{_IT})?"
NO_ANSWER = re.compile(
    r"|".join((
        r"(?:answer is |answer )?(?:noanswer|none|na|unknown|null)",
        r"(?:sorry )?(?:there is |there are |theres |i have |answer is )?no (?:possible |valid |correct )?answers?"
        rf"(?: (?:is |are )?(?:possible|given|provided|found|available)| can be (?:found|given|determined))?{_BY}",
        rf"there (?:is not|isnt) (?:any )?answer{_BY}",
        rf"{_SUBJECT}(?:gives|provides|contains|has) no (?:answer|information)(?: (?:about|on) (?:this|that|it))?",
        rf"{_SUBJECT}(?:is |was |are )?(?:unanswerable|not answerable|(?:not |im)possible to {_FIND}){_IT}{_BY}",
        rf"{_SUBJECT}{_CANNOT} be (?:answered|determined|found|inferred){_BY}",
        rf"{_SUBJECT}(?:is |was )?not (?:mentioned|stated|specified|provided|given|known|available|found|in {_TEXTS}){_BY}",
        rf"{_SUBJECT}(?:does not|doesnt|do not) (?:say|mention|state|specify|provide|contain|give|answer){_IT}",
        rf"{_SUBJECT}(?:does not|doesnt|do not) (?:provide|contain|give|have) (?:enough|sufficient|any) information{_TO_ANSWER}",
        r"(?:there is |theres )?(?:not enough|insufficient|no) (?:information|context)"
        rf"(?: (?:is |was )?(?:available|given|provided))?(?: (?:about|on) (?:this|that|it))?{_TO_ANSWER}{_BY}",
        r"(?:i|we) (?:do not|dont) know",
        rf"(?:(?:i|we) )?{_CANNOT} (?:{_FIND}|be known){_IT}{_BY}",
    ))
)


def squad_normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single blanks (evaluate-v2.0.py, in its order)."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def trivia_normalise(text: str) -> str:
    """As SQuAD's, but punctuation, typographic quotes and `_` become blanks (triviaqa_evaluation.py)."""
    text = re.sub(f"[{re.escape(string.punctuation)}‘’´`]", " ", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(gold: str, answer: str) -> float:
    """Return the F1 of two normalised texts as multisets of tokens; where one has no tokens, whether both have none."""
    gold_tokens, tokens = gold.split(), answer.split()
    if not gold_tokens or not tokens:
        return float(gold_tokens == tokens)
    common = (Counter(gold_tokens) & Counter(tokens)).total()
    return 2 * common / (len(gold_tokens) + len(tokens))


def _grade_qa(golds: list[str], answer: str, f1: Callable[[str, str], float] = token_f1) -> Grade:
    best = max(f1(gold, answer) for gold in golds)
    return Grade(best, float(answer in golds), best)


def grade_qa(task: Task, answer: str) -> Grade:
    """nq (DPR's exact match), toy_qa and unknown sources: SQuAD's normalisation, maximum over the gold answers."""
    return _grade_qa([squad_normalise(gold) for gold in task.answers], squad_normalise(answer))


def grade_squad(task: Task, answer: str) -> Grade:
    """squad_v2: gold answers that normalise to "" are dropped; none left means unanswerable, which "" alone answers.

    Ours: where there is no answer, a text that says so in as many words (NO_ANSWER) and says nothing else counts as "".
    """
    golds = [gold for gold in map(squad_normalise, task.answers) if gold] or [""]
    answer = squad_normalise(answer)
    return _grade_qa(golds, "" if golds == [""] and NO_ANSWER.fullmatch(answer) else answer)


def grade_trivia(task: Task, answer: str) -> Grade:
    """triviaqa: its own normalisation, maximum over the aliases."""
    return _grade_qa([trivia_normalise(gold) for gold in task.answers], trivia_normalise(answer))


def _hotpot_f1(gold: str, answer: str) -> float:
    if gold != answer and {gold, answer} & {"yes", "no", "noanswer"}:
        return 0.0
    return token_f1(gold, answer) if gold and answer else 0.0  # two empty texts: EM 1 but F1 0, as the script has it


def grade_hotpot(task: Task, answer: str) -> Grade:
    """hotpotqa: F1 is 0 where one side is yes, no or noanswer and the other is not (hotpot_evaluate_v1.py)."""
    return _grade_qa([squad_normalise(gold) for gold in task.answers], squad_normalise(answer), _hotpot_f1)


# ---------------------------------------------------------------------------------------------------------------- code
run_tests = sandbox.memoised(sandbox.run_tests)


def program(task: Task, answer: str) -> str:
    """Return the program in an answer: its last ```python block, or all of it.

    HumanEval's protocol is prompt + completion. The prompt goes before a complete function too: its imports and helpers
    belong to the function, and the later definition wins.
    """
    code = extract_code(answer) or answer
    prompt = task.meta.get("prompt", task.problem)
    if task.source != "humaneval" or "from __future__" in code or not _is_stub(prompt, task.entry_point):
        return code
    return f"{prompt.rstrip()}\n{code.strip(chr(10))}\n"


def _is_stub(prompt: str, entry_point: str | None) -> bool:
    try:
        body = ast.parse(prompt).body
    except (SyntaxError, ValueError):
        return False
    return bool(body) and getattr(body[-1], "name", None) == entry_point


def grade_code(task: Task, answer: str) -> Grade:
    """humaneval, mbpp, toy_code: pass@1 on the hidden tests. A program that is too slow has failed."""
    if not task.hidden_tests:
        return Grade(0.0, 0.0, 0.0, error=f"{task.id} has no hidden tests")
    result = run_tests(program(task, answer), task.hidden_tests, task.entry_point)
    if result.passed and not result.n_total:
        return Grade(0.0, 0.0, 0.0, error=f"the hidden tests of {task.id} test nothing")
    return _passed(result.passed)


def _passed(right: bool) -> Grade:
    return Grade(float(right), float(right), float(right), right)


def grade_apps(task: Task, answer: str) -> Grade:
    """apps: every case, by the official comparison less what passes wrong programs (codegrade.py)."""
    if not isinstance(task.hidden_tests, list) or not task.hidden_tests:
        return grade_code(task, answer)
    wrapped = bool(task.meta.get("wrapped_outputs"))
    return _passed(codegrade.run_apps(program(task, answer), task.hidden_tests, task.entry_point, wrapped).passed)


def grade_ds1000(task: Task, answer: str) -> Grade:
    """ds1000: test_execution, and test_string where there is one, of the task's code_context. Not for training."""
    if "def test_execution(" not in task.hidden_tests:
        return Grade(0.0, 0.0, 0.0, error=f"{task.id} has no code_context with test_execution()")
    if missing := codegrade.missing_libraries(task.hidden_tests):
        message = f"{task.id} needs libraries that are not installed: pip install {' '.join(missing)}"
        return Grade(0.0, 0.0, 0.0, error=message)
    solution = codegrade.ds1000_solution(extract_code(answer.partition("</code>")[0]) or answer)
    return _passed(codegrade.run_ds1000(solution, task.hidden_tests).status == "ok")


BY_SOURCE = {"hotpotqa": grade_hotpot, "squad_v2": grade_squad, "triviaqa": grade_trivia, "apps": grade_apps,
             "ds1000": grade_ds1000}
BY_KIND = {"math": grade_math, "choice": grade_choice, "qa": grade_qa, "code": grade_code}


# -------------------------------------------------------------------------------------------------------------- reward
@dataclass(frozen=True)
class RewardConfig:
    """Weights of the diversity reward and its ablations. Raises ValueError where no workflow could earn its answer."""

    base: float = -1.0
    checker: float = 0.2
    format: float = 0.2
    operators: float = 0.2
    structure: float = 0.4
    min_operators: int = 5
    release: bool = True  # False: the answer counts in every workflow
    diversity: bool = True  # False: every workflow counts as a feasible one
    strict: bool = False  # True: operators and structures that do nothing (hacks.py) earn nothing

    def __post_init__(self) -> None:
        weights = (self.checker, self.format, self.operators, self.structure)
        if min(weights) < 0 or (self.release and self.diversity and _total(weights) < 1):
            raise ValueError(f"diversity weights must be >= 0 and sum to 1 or more, or no answer counts; got {weights}")


@dataclass(frozen=True)
class RewardParts:
    """total = base + diversity + answer. The last four are what the workflow earned, uncapped, whatever the config."""

    total: float
    base: float
    diversity: float  # R_div; 1 where it is switched off
    answer: float  # the grader's score, 0 while it is withheld
    checker: float
    format: float
    operators: float
    structure: float


def _total(values: tuple[float, ...]) -> float:
    """Sum so that 0.1 + 0.2 + 0.3 + 0.4 is 1 and not a little more or less: R_div = 1 is a test for equality."""
    return round(math.fsum(values), 9)


def reward(canvas: "Canvas", grade: Grade, config: RewardConfig) -> RewardParts:
    """Return R = base + R_div + 1[R_div = 1] * R_ans of a finished canvas, from its graph (Eq. 11-14).

    With config.strict the operators and structures are those that are used, as hacks.py tells from graph and execution.
    """
    names, structures = canvas.graph.operators(), canvas.graph.structures()
    roles = {canvas.library[name].role for name in names}
    if config.strict:
        used = credit(canvas)
        names, structures = used.operators, used.structures
    earned = (
        config.checker * ("check" in roles),
        config.format * ("format" in roles),
        config.operators * (len(names) >= config.min_operators),
        config.structure * bool(structures),
    )
    diversity = min(_total(earned), 1.0) if config.diversity else 1.0
    answer = grade.score if diversity == 1.0 or not config.release else 0.0
    return RewardParts(config.base + diversity + answer, config.base, diversity, answer, *earned)
