"""The judge: executes the tests of sandbox.run_tests against proxies of the program (wire.py) and writes the verdict.

It runs in a sandbox of its own, since tests too come from strangers. Every assert at the top level, check(candidate), test
function and unittest method counts; whatever is not accounted for is a failure.
"""
from __future__ import annotations

import ast
import builtins
import json
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator

from wire import BETWEEN_OWN, FORWARDED, NOTHING, SPECIAL, Expired, Peer, Ref, apply, program_line

MODULES = ("math", "re", "sys", "os", "random", "collections", "itertools", "functools", "operator", "string", "typing",
           "datetime", "decimal", "fractions", "statistics", "heapq", "bisect", "copy", "json", "time", "unittest", "numpy")
# Names that tests use without importing them; never the program's, lest it define a Counter that equals everything.
STANDARD = dict.fromkeys(("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple"), "collections")
STANDARD |= {"Decimal": "decimal", "Fraction": "fractions"}


class Verdict:
    """Counts, and one JSON line per change of them in a file that no other process can reach, signed with the nonce."""
    def __init__(self, peer: Peer, config: dict, lines: list[str]) -> None:
        self.peer, self.fd, self.nonce = peer, config["verdict"], config["nonce"]
        self.limit, self.lines = config["limit"], lines
        self.passed, self.total, self.expected, self.errors, self.expired = 0, 0, 0, [], False

    def write(self, done: bool = False) -> None:
        error = "\n".join(self.errors[:3]) if done else ""
        os.write(self.fd, json.dumps([self.nonce, self.passed, max(self.total, self.expected), error, done]).encode() + b"\n")

    def expire(self, number: int, frame: object) -> None:
        self.expired = True
        raise Expired

    def unit(self, action: Callable, *args: object, counts: bool = True) -> None:
        """Run one test; what does not count is set-up, which must not fail either."""
        if self.expired:
            return
        self.peer.last = NOTHING
        try:
            action(*args)
            self.passed += counts
            self.total += counts
        except BaseException as error:
            self.total += 1
            self.errors.append(self.explain(error)[:1000])
        self.write()

    def explain(self, error: BaseException) -> str:
        """One line for a reader (or a language model): which assert, what the program did, what was raised."""
        line, call = program_line(error, "tests"), self.describe_last()
        where = self.lines[line - 1].strip()[:300] if line and line <= len(self.lines) else "the tests"
        text = str(error)[:500]
        if self.expired or isinstance(error, Expired):
            parts = [f"timeout: not done after {self.limit:g} s", where]
        else:
            reason = text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
            parts = [f"{where} failed", "" if f"raised {reason}" in call else reason]
        return ": ".join(filter(None, [*parts, call]))

    def describe_last(self) -> str:
        op, args, named, outcome = self.peer.last
        if op == "load":
            return "" if isinstance(outcome, tuple) else f"loading the program {outcome}"
        shown = [short(arg) for arg in args[1:]] + [f"{key}={short(arg)}" for key, arg in named.items()]
        label = args[0]._label if isinstance(args[0], Ref) else short(args[0])
        call = f"{label}({', '.join(shown)})" if op == "call" else f"{op}({', '.join([label, *shown])})"
        return f"{call} " + (f"returned {short(outcome[0])}" if isinstance(outcome, tuple) else outcome)


def short(value: object, limit: int = 200) -> str:
    """repr, cut in the middle; a proxy is named, not asked."""
    if isinstance(value, Ref):
        return f"<{value._label}>"
    try:
        text = repr(value)
    except Exception as error:  # an integer of 10,000 digits, a proxy inside that fails
        text = f"<{type(value).__name__}: no repr, {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[:limit // 2]} ... {text[-limit // 2:]}"


def loose(value: object) -> object:
    """JSON has no tuples: for expected values that come as JSON, tuple and list are the same."""
    if isinstance(value, (list, tuple)):
        return [loose(item) for item in value]
    return {key: loose(item) for key, item in value.items()} if isinstance(value, dict) else value


def perform(op: str, thing: object, *args: object, **named: object) -> object:
    """What the program may do to what the tests hand out: call it, iterate, use objects of the tests' own classes; no more.

    Names that begin with an underscore, and frames, would lead from there to the tests' text and expected values.
    """
    if op in ("input", "read", "readline"):
        return builtins.input(thing) if op == "input" else getattr(sys.stdin, op)(thing)
    kind, name = type(thing), str(args[0]) if args else ""
    if op == "call":
        return thing(*args, **named)
    if isinstance(thing, Iterator) and op in ("iter", "next"):
        return apply(op, thing)
    own = kind.__module__ == "tests" or kind is types.SimpleNamespace
    if op == "getattr" and isinstance(thing, types.FunctionType) and name in SPECIAL[:3]:
        return getattr(thing, name)
    if op in ("getattr", "setattr"):
        if name.startswith("_") or not (own or (op == "getattr" and kind.__module__ in ("_io", "unittest.mock"))):
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r} for a program")
        if hasattr(kind, name) if kind.__module__ == "unittest.mock" else op == "setattr" and callable(getattr(kind, name, None)):
            raise AttributeError(f"{name!r} is the tests' own")
        return getattr(thing, name) if op == "getattr" else setattr(thing, name, *args[1:])
    if op in FORWARDED + BETWEEN_OWN and (own or kind.__module__ == "_io"):
        return apply(op, thing, *args)
    raise TypeError(f"a program cannot ask for {op!r} here")


def judge(config: dict) -> None:
    """Role: execute the tests against proxies and write the verdict."""
    peer = Peer(config["wire"], perform, callbacks_only=True)
    tests, entry = config["tests"], config["entry_point"]
    verdict = Verdict(peer, config, tests.split("\n") if isinstance(tests, str) else [])
    signal.signal(signal.SIGALRM, verdict.expire)
    signal.setitimer(signal.ITIMER_REAL, config["limit"], 0.2)  # again and again: unittest swallows anything
    try:
        if isinstance(tests, str):
            judge_text(verdict, tests, entry)
        else:
            verdict.expected, function = len(tests), load(peer, set(), entry)[entry]
            for case in tests:
                verdict.unit(judge_case, function, case)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        verdict.errors.insert(0, verdict.explain(error)[:1000])
    if peer.closed:  # which a test may have caught
        verdict.errors.append("the program's process ended")
    verdict.write(done=True)


def load(peer: Peer, names: set[str], entry: str | None, builtins_stay: bool = True) -> dict[str, object]:
    """Execute the program over there; return its objects by name, the entry point among them.

    A program must not redefine the `set` or `all` that the tests compare with, unless nothing else is tested.
    """
    found = peer.ask("load", *sorted(names | {"Solution"} | ({entry} if entry else set())))
    if entry or builtins_stay:
        found = {name: value for name, value in found.items() if name == entry or not hasattr(builtins, name)}
    if entry and entry not in found and "Solution" in found:
        found[entry] = getattr(found["Solution"](), entry)
    if entry and entry not in found:
        raise NameError(f"the program does not define {entry!r}")
    return found


def names_in(nodes: list[ast.AST]) -> tuple[set[str], set[str]]:
    """(names that the tests may take from the program, those that can come from nowhere else)."""
    used, bound = set(), set()
    for node in nodes:
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.ImportFrom) and node.module == "solution":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "solution":
            used.add(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return used, used - bound - set(dir(builtins))


def judge_case(function: Ref, case: dict) -> None:
    """One call with given arguments and expected value."""
    arguments = case["input"] if isinstance(case["input"], (list, tuple)) else [case["input"]]
    if loose(function(*arguments)) != loose(case["output"]):
        raise AssertionError(f"expected {short(case['output'])}")


def judge_text(verdict: Verdict, tests: str, entry: str | None) -> None:
    """Python text: top-level asserts one by one, then check(candidate), test_* functions and unittest cases."""
    tree = ast.parse(tests)
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    called = {node.value.func.id for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
              and isinstance(node.value.func, ast.Name)} & defined
    nodes = list(ast.walk(tree))
    names, free = names_in(nodes)
    claims = any(isinstance(node, (ast.Assert, ast.Raise)) or "assert" in getattr(node, "attr", "") for node in nodes)

    def is_test(node: ast.stmt) -> bool:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return False
        return any(isinstance(part, ast.Assert) or (isinstance(part, ast.Name) and part.id in called)
                   for part in ast.walk(node))

    functions = [name for name in sorted(defined - called) if name.startswith("test_") or (name == "check" and entry)]
    methods = [method for node in tree.body if isinstance(node, ast.ClassDef) for method in node.body
               if getattr(method, "name", "").startswith("test")]
    verdict.expected = sum(map(is_test, tree.body)) + len(functions) + len(methods)  # should the program not even load
    verdict.write()
    if not claims:
        raise AssertionError("the tests assert nothing")
    bases = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    known = {name: __import__(name) for name in MODULES if name in bases and name != entry}
    known |= {"np": __import__("numpy")} if "np" in bases else {}
    known |= {name: getattr(__import__(STANDARD[name]), name) for name in names & STANDARD.keys() if name != entry}
    found = load(verdict.peer, names - known.keys(), entry, bool(free - known.keys()))
    verdict.peer.classes = {id(value) for name, value in found.items() if name[0].isupper()}
    verdict.peer.watch = looks_at_arguments(nodes, {*found, "candidate", "solution"})
    space = {"__name__": "tests", "super": super_of, **found, **known}
    plain = {name: value for name, value in found.items() if name in free and not isinstance(value, Ref)}

    def run(action: Callable, *args: object) -> None:
        """Perform a test after what the program has made of its global variables."""
        space.update(verdict.peer.ask("names", *plain) if plain else {})
        verdict.peer.last = NOTHING
        action(*args)

    sys.modules["solution"] = types.ModuleType("solution")
    vars(sys.modules["solution"]).update(found)
    if "unittest" in known or "unittest" in tests:
        __import__("unittest").main = lambda *args, **named: None  # the cases are run below
    for node in tree.body:
        code = compile(ast.Module([node], []), "tests", "exec", dont_inherit=True)
        verdict.unit(run, exec, code, space, counts=is_test(node))
    for name in functions:
        verdict.unit(run, space.get(name), *([found[entry]] if name == "check" else []))
    classes = [space[name] for name in sorted(defined) if isinstance(space.get(name), type)]
    unittest = sys.modules.get("unittest")
    cases = [kind for kind in classes if unittest and issubclass(kind, unittest.TestCase)]
    unittest_cases(verdict, cases)
    for kind in classes:
        for name in vars(kind) if kind not in cases and kind.__name__.startswith("Test") else ():
            if name.startswith("test"):
                verdict.unit(run, test_method, kind, name)
    verdict.expected = verdict.expected if verdict.expired else 0


def test_method(kind: type, name: str) -> None:
    """A method of a test class as pytest knows it: an object of its own, setup_method and teardown_method around."""
    it = kind()
    getattr(it, "setup_method", lambda: None)()
    try:
        getattr(it, name)()
    finally:
        getattr(it, "teardown_method", lambda: None)()


def unittest_cases(verdict: Verdict, cases: list[type]) -> None:
    """Run TestCase classes; a skipped test does not count (a program's SkipTest arrives as a plain error)."""
    for kind in cases if not verdict.expired else ():
        unittest = sys.modules["unittest"]
        suite, result = unittest.TestLoader().loadTestsFromTestCase(kind), unittest.TestResult()
        count = suite.countTestCases()
        suite.run(result)
        failed = result.errors + result.failures + [(case, "unexpected success") for case in result.unexpectedSuccesses]
        count -= len(result.skipped)
        verdict.total += max(count, len(failed))
        verdict.passed += max(count - len(failed), 0)
        verdict.errors += [f"{case}: {text.strip().splitlines()[-1]}"[:1000] for case, text in failed]
        verdict.write()


def super_of(*args: object) -> object:
    """super() in the tests; in a class that derives from the program's, it is the program's."""
    if args:
        return super(*args)
    variables = sys._getframe(1).f_locals
    kind, it = variables["__class__"], variables[sys._getframe(1).f_code.co_varnames[0]]
    if not isinstance(kind, Ref):
        return super(kind, it)
    return type("super", (), {"__getattribute__": lambda self, name: kind._peer.ask("super", kind, it, name)})()


def looks_at_arguments(nodes: list[ast.AST], program: set[str]) -> bool:
    """Whether a test looks at what it has passed to the program, other than to compute what the result should be.

    Only then are arguments that a call with a result has changed handed back: a program that empties the list for
    `f(x) == sorted(x)` gains nothing, while `f(x); assert x == [1, 2]` sees what f did.
    """
    places = (ast.Name, ast.Attribute, ast.Subscript)

    def mentions(node: ast.AST, names: set[str]) -> bool:
        return any(isinstance(part, places) and ast.unparse(part) in names for part in ast.walk(node))

    def plainly(node: ast.AST, names: set[str]) -> bool:  # but for what only says where to look, like k in x[:k]
        return any(plainly(part, names) for part in ast.iter_child_nodes(node) if part is not getattr(node, "slice", None)) or (
            isinstance(node, places) and ast.unparse(node) in names)

    def asks(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Call) and mentions(part.func, program | results) for part in ast.walk(node))

    results: set[str] = set()  # names of what the program has returned
    for _ in range(2):
        for node in nodes:
            source = next((value for name in ("value", "iter", "context_expr")
                           if (value := getattr(node, name, None)) is not None), None)
            targets = getattr(node, "targets", None) or [getattr(node, "target", None) or getattr(node, "optional_vars", None)]
            if isinstance(node, ast.FunctionDef) and asks(node) and not node.name.startswith(("test", "check", "set")):
                program = program | {node.name}
            elif isinstance(source, ast.AST) and targets[0] is not None and (asks(source) or mentions(source, results)):
                results |= {ast.unparse(part) for target in targets for part in ast.walk(target) if isinstance(part, places)}
    passed, todo = set(), [arg for node in nodes if isinstance(node, ast.Call) and mentions(node.func, program | results)
                           for arg in (*node.args, *(word.value for word in node.keywords))]
    while todo:
        node = todo.pop()
        if isinstance(node, places):
            passed.add(ast.unparse(node))
        elif isinstance(node, (ast.List, ast.Tuple, ast.Starred, ast.Dict)):
            todo += ast.iter_child_nodes(node)

    for node in nodes:
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.test] if isinstance(
            node, ast.Assert) else node.args if isinstance(node, ast.Call) and "assert" in getattr(node.func, "attr", "") else []
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)) and any(
                mentions(side, passed) for side in sides) and not isinstance(node.comparators[0], ast.Constant):
            return True
        if any(mentions(side, passed) for side in sides) and not any(
                asks(side) or plainly(side, results) for side in sides):
            return True
    return False
