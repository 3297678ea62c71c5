"""DS-1000 with the real libraries: tasks of ours in its true format, graded by its protocol and worked on by operators.

Questions end as the data set's do: a closed <code> block and the variable to set, a function left open, or (Matplotlib) code
with comments all through. code_context has its parts: generate_test_case, exec_test, exec_context, test_execution.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from scripted import Scripted

from canvas import Canvas, CanvasConfig
from codegrade import missing_libraries
from graph import Graph
from operators import REGISTRY
from rewards import grade
from tasks import Task, from_record

END = """

def test_execution(solution: str):
    code = exec_context.replace("[insert]", solution)
    for i in range({cases}):
        test_input, expected_result = generate_test_case(i + 1)
        test_env = {{"test_input": test_input}}
        exec(code, test_env)
        assert exec_test(test_env["{result}"], expected_result)
"""
PANDAS = '''import pandas as pd
import numpy as np
import copy


def generate_test_case(test_case_id):
    def generate_ans(data):
        df = data
        return df.groupby("kind")["n"].sum().reset_index()

    def define_test_input(test_case_id):
        if test_case_id == 1:
            df = pd.DataFrame({"kind": ["a", "b", "a"], "n": [1, 2, 3]})
        if test_case_id == 2:
            df = pd.DataFrame({"kind": ["x", "y", "x", "z"], "n": [5, 6, 7, 8]})
        return df

    test_input = define_test_input(test_case_id)
    expected_result = generate_ans(copy.deepcopy(test_input))
    return test_input, expected_result


def exec_test(result, ans):
    try:
        pd.testing.assert_frame_equal(result, ans, check_dtype=False)
        return 1
    except:
        return 0


exec_context = r"""
import pandas as pd
import numpy as np
df = test_input
[insert]
"""
''' + END.format(cases=2, result="result")
PANDAS_QUESTION = """Problem:
I have a DataFrame and want the sum of n of each kind, as columns kind and n.

A:
<code>
import pandas as pd


df = pd.DataFrame({'kind': ['a', 'b', 'a'], 'n': [1, 2, 3]})
</code>
result = ... # put solution in this variable
BEGIN SOLUTION
<code>
"""
SCIPY = '''import numpy as np
import copy
import scipy.optimize as sciopt


def generate_test_case(test_case_id):
    test_input = np.array([1.0, 4.0, -3.0])
    return test_input, copy.deepcopy(test_input)


def exec_test(result, ans):
    try:
        np.testing.assert_allclose(result, ans, atol=1e-3)
        return 1
    except:
        return 0


exec_context = r"""
import scipy.optimize as sciopt
import numpy as np
target = test_input
def f(target):
[insert]
result = f(target)
"""
''' + END.format(cases=1, result="result")
SCIPY_QUESTION = """Problem:
Find the x with the least squared distance to the target, by scipy.

A:
<code>
import numpy as np
import scipy.optimize as sciopt
example_target = np.array([1.0, 2.0])
def f(target=example_target):
    # return the solution in this function
    # result = f(target)
    ### BEGIN SOLUTION"""
SKLEARN = '''import numpy as np
import copy
from sklearn.preprocessing import StandardScaler


def generate_test_case(test_case_id):
    test_input = np.array([[0.0, 1.0], [2.0, 5.0], [4.0, 0.0]])
    return test_input, StandardScaler().fit_transform(copy.deepcopy(test_input))


def exec_test(result, ans):
    try:
        np.testing.assert_allclose(result, ans)
        return 1
    except:
        return 0


exec_context = r"""
import numpy as np
from sklearn import preprocessing
def load_data():
    return test_input
data = load_data()
[insert]
"""
''' + END.format(cases=1, result="scaled")
SKLEARN_QUESTION = """Problem:
Standardise the columns.

A:

<code>
import numpy as np
from sklearn import preprocessing
data = load_data()
</code>
scaled = ... # put solution in this variable
BEGIN SOLUTION
<code>
"""
MATPLOTLIB = '''import numpy as np
import matplotlib.pyplot as plt
from PIL import Image


def skip_plt_cmds(l):
    return all(p not in l for p in ["plt.show()", "plt.clf()", "plt.close()", "savefig"])


def generate_test_case(test_case_id):
    plt.plot(np.arange(5), np.arange(5) ** 2)
    plt.savefig("ans.png", bbox_inches="tight")
    plt.close()
    return None, None


def exec_test(result, ans):
    code_img = np.array(Image.open("output.png"))
    oracle_img = np.array(Image.open("ans.png"))
    if not (code_img.shape == oracle_img.shape and np.allclose(code_img, oracle_img)):
        (line,) = plt.gca().lines
        assert list(line.get_ydata()) == [0, 1, 4, 9, 16]
    return 1


exec_context = r"""
import numpy as np
import matplotlib.pyplot as plt
x = np.arange(5)
y = np.arange(5) ** 2
[insert]
plt.savefig('output.png', bbox_inches ='tight')
result = None
"""


def test_execution(solution: str):
    solution = "\\n".join(filter(skip_plt_cmds, solution.split("\\n")))
    code = exec_context.replace("[insert]", solution)
    test_env = {"test_input": None}
    generate_test_case(1)
    exec(code, test_env)
    assert exec_test(test_env["result"], None)
'''
MATPLOTLIB_QUESTION = """import numpy as np
import matplotlib.pyplot as plt

x = np.arange(5)
y = np.arange(5) ** 2

# Plot y over x
# SOLUTION START
"""
NUMPY_QUESTION = PANDAS_QUESTION.replace("import pandas as pd", "import numpy as np").replace(
    "df = pd.DataFrame({'kind': ['a', 'b', 'a'], 'n': [1, 2, 3]})", "a = np.arange(4)")


def ds1000(question: str, context: str = "") -> Task:
    return from_record({"problem": question, "source": "ds1000", "ground_truth": "?", "meta": {
        "task_id": 7, "code_context": context or "def test_execution(solution): pass"}})


@pytest.mark.parametrize(("library", "task", "answer", "right"), [
    ("pandas", (PANDAS_QUESTION, PANDAS), 'result = df.groupby("kind", as_index=False).n.sum()', 1),
    ("pandas", (PANDAS_QUESTION, PANDAS), 'result = df.groupby("kind").n.sum()', 0),  # a Series
    ("pandas", (PANDAS_QUESTION, PANDAS), 'result = pd.DataFrame({"kind": ["a", "b"], "n": [4, 2]})', 0),  # one case alone
    ("pandas", (PANDAS_QUESTION, PANDAS), 'df = pd.DataFrame({"kind": ["a"]})\nresult = df', 0),
    ("pandas", (PANDAS_QUESTION, PANDAS), "```python\nresult = df.groupby('kind', as_index=False)['n'].sum()\n", 1),  # not closed
    ("pandas", (PANDAS_QUESTION, PANDAS), "result = df.groupby('kind', as_index=False).n.sum()\n</code>\n```python\n1\n```", 1),
    ("scipy", (SCIPY_QUESTION, SCIPY),
     "    result = sciopt.minimize(lambda x: ((x - target) ** 2).sum(), np.zeros(3)).x\n    return result", 1),
    ("scipy", (SCIPY_QUESTION, SCIPY), "    return sciopt.minimize(lambda x: (x ** 2).sum(), target).x", 0),
    ("scipy", (SCIPY_QUESTION, SCIPY), "result = target", 0),  # not indented: no body of the function
    ("sklearn", (SKLEARN_QUESTION, SKLEARN), "scaled = preprocessing.StandardScaler().fit_transform(data)", 1),
    ("sklearn", (SKLEARN_QUESTION, SKLEARN), "scaled = preprocessing.MinMaxScaler().fit_transform(data)", 0),
    ("sklearn", (SKLEARN_QUESTION, SKLEARN), "result = preprocessing.scale(data)", 0),  # another variable
    ("matplotlib", (MATPLOTLIB_QUESTION, MATPLOTLIB), "plt.plot(x, y, 'r--')", 1),  # another picture of the same points
    ("matplotlib", (MATPLOTLIB_QUESTION, MATPLOTLIB), "plt.plot(y, x)", 0),
])
def test_each_library_is_graded_by_the_protocol(library: str, task: tuple[str, str], answer: str, right: int) -> None:
    pytest.importorskip(library)
    result = grade(ds1000(*task), answer)
    assert (result.passed, result.error) == (bool(right), "")


@pytest.mark.parametrize(("line", "missing"), [
    ("import nowhere as n", "nowhere"), ("import json, nowhere.b as n", "nowhere"), ("    from nowhere.a import x", "nowhere"),
    ("from the mean of all", ""), ("important = 1", ""), ("import os.path as p", ""),
    ("text = '''\nfrom nowhere to eternity\n'''", ""),
])
def test_missing_libraries_are_those_that_are_imported(line: str, missing: str) -> None:
    assert " ".join(missing_libraries(f"import math\n{line}\n")) == missing


# ---- operators


def run(task: Task, name: str, reply: str, code: str = "") -> tuple[Any, list[str]]:
    """(result, what the executor was told) of an operator on a canvas."""
    backend = Scripted(**{name: reply})
    canvas = Canvas(task, REGISTRY, backend, CanvasConfig())
    canvas.graph = Graph.from_text(name)
    if code:
        canvas.graph = Graph.from_text(f"CustomCodeGenerate -> {name}")
        backend.says["CustomCodeGenerate"] = f"```python\n{code}\n```"
    canvas.run_graph()
    return canvas.results[canvas.graph.nodes()[-1].id], [request.text for request in backend.requests]


def test_programmer_runs_a_snippet_in_the_code_of_the_question() -> None:
    result, told = run(ds1000(NUMPY_QUESTION), "Programmer", "```python\nresult = a * 2\n```")
    assert (result.error, result.writes["solution"]) == ("", "result = a * 2")  # the snippet alone is the solution
    assert "Write only the code that goes on" in told[0]


@pytest.mark.parametrize(("snippet", "why"), [
    ("result = b * 2", "name 'b' is not defined"), ("print(a)", "name 'result' is not defined"), ("result = (", "SyntaxError"),
])
def test_programmer_is_told_why_a_snippet_fails_there(snippet: str, why: str) -> None:
    result, told = run(ds1000(NUMPY_QUESTION), "Programmer", f"```python\n{snippet}\n```")
    assert why in result.error
    assert why in told[1]
    assert len(told) == 3


@pytest.mark.parametrize(("question", "snippet", "passed"), [
    (NUMPY_QUESTION, "result = a * 2", True), (NUMPY_QUESTION, "a * 2", False), (NUMPY_QUESTION, "result = a / 'x'", False),
    (SCIPY_QUESTION.replace("import scipy.optimize as sciopt\n", ""), "    return target", True),
    (SCIPY_QUESTION.replace("import scipy.optimize as sciopt\n", ""), "return target", False),
    (MATPLOTLIB_QUESTION.replace("import matplotlib.pyplot as plt\n", ""), "print(y)", True),
])
def test_test_passes_what_runs_in_the_code_of_the_question(question: str, snippet: str, passed: bool) -> None:
    result, _ = run(ds1000(question), "Test", "", snippet)
    assert (result.passed, result.error) == (passed, "")


def test_nothing_is_said_of_a_snippet_whose_surroundings_do_not_run() -> None:
    """load_data() exists in the tests alone."""
    question = SKLEARN_QUESTION.replace("from sklearn import preprocessing\n", "")
    assert run(ds1000(question), "Programmer", "```python\nscaled = data\n```")[0].error == ""
    result, _ = run(ds1000(question), "Test", "", "scaled = data")
    assert (result.passed, result.error) == (None, "the code in the question does not run by itself, so nothing can be tested")


def test_operators_see_nothing_of_the_hidden_context() -> None:
    secret = "import numpy as np\nSECRET = 4711\ndef test_execution(solution): pass"
    task = ds1000(NUMPY_QUESTION, secret)
    for name in ("Programmer", "Custom", "Revise"):
        _, told = run(task, name, "```python\nresult = a * SECRET\n```", "" if name == "Programmer" else "result = a")
        assert not any("4711" in text for text in told)
    assert "4711" not in str(task.meta)
    assert "name 'SECRET' is not defined" in run(task, "Programmer", "```python\nresult = a * SECRET\n```")[0].error


def test_a_question_without_code_has_no_frame() -> None:
    seen: Mapping[str, Any] = ds1000("Problem:\nDouble a.").meta
    assert seen["frame"] == ""
    assert "no public tests" in run(ds1000("Problem:\nDouble a."), "Test", "", "result = 1")[0].error
    assert from_record({"problem": NUMPY_QUESTION, "source": "mbpp", "ground_truth": "", "meta": {}}).meta == {}
