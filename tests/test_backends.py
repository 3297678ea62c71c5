"""backends.py and simulated.py: the HTTP client against a real tiny server, the cache, and the simulated skill model."""

import functools
import http.server
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import MATH, Scripted

import backends
import simulated
from backends import CachedBackend, ExecutorError, OpenAIBackend, Reply, Request, SimulatedBackend, Usage
from operators import REGISTRY, Context, extract_code, tag
from sandbox import run_tests
from simulated import Simulation
from tasks import Task, toy_tasks

ASK = Request(MATH, "Custom", "Solve.", "Solve.\n\n## Problem\nWhat is 6 * 7?", {"problem": "What is 6 * 7?"})
Answer = tuple[int, dict[str, str], bytes]


def completion(text: str | None = "It is 42.", **more: Any) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], **more}).encode()


class Server(http.server.ThreadingHTTPServer):
    """Answers POSTs with what `answer(number of the call)` returns and keeps what it was sent."""

    daemon_threads = True

    def __init__(self, answer: Callable[[int], Answer]) -> None:
        server = self
        self.calls: list[tuple[str, dict, dict]] = []  # path, headers, body

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.calls.append((self.path, dict(self.headers), body))
                status, headers, content = answer(len(server.calls) - 1)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None: ...  # not into the test's output

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args: Any) -> None: ...  # a client that gave up; other failures show in what it was answered


Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(answer, answer, ...) starts a server that gives these answers in turn; the last one repeats."""
    servers: list[Server] = []

    def start(*answers: Answer, answer: Callable[[int], Answer] | None = None) -> Server:
        server = Server(answer or (lambda number: answers[min(number, len(answers) - 1)]))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the backend would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(backends, "time", SimpleNamespace(monotonic=time.monotonic, sleep=slept.append))
    return slept


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# ---- the OpenAI-compatible backend


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_call_posts_one_user_message_and_reads_the_reply(serve: Serve, suffix: str) -> None:
    server = serve(completion(usage={"prompt_tokens": 11, "completion_tokens": 7}))
    reply = OpenAIBackend([server.url + suffix], "qwen", temperature=0.3, max_tokens=99).complete(ASK)
    path, headers, body = server.calls[0]
    assert (reply.text, path) == ("It is 42.", "/v1/chat/completions")
    assert body == {"model": "qwen", "temperature": 0.3, "max_tokens": 99, "messages": [{"role": "user", "content": ASK.text}]}
    assert "Authorization" not in headers


@pytest.mark.parametrize(("prices", "usage", "expected"), [
    ((2.0, 10.0), {"prompt_tokens": 1000, "completion_tokens": 300}, (1000, 300, 0.005)),
    (None, {"prompt_tokens": 1000, "completion_tokens": 300}, (1000, 300, None)),  # an unknown price is not 0
    ((2.0, 10.0), None, (0, 0, None)),  # nor is an unknown count
    ((2.0, 10.0), {"prompt_tokens": 1000}, (0, 0, None)),
    ((2.0, 10.0), {"prompt_tokens": None, "completion_tokens": 1}, (0, 0, None)),
    ((2.0, 10.0), "much", (0, 0, None)),
])
def test_usage_and_price(serve: Serve, prices: Any, usage: Any, expected: tuple) -> None:
    spent = OpenAIBackend([serve(completion(usage=usage)).url], "m", prices=prices).complete(ASK).usage
    assert (spent.calls, spent.cached) == (1, 0)
    assert (spent.prompt_tokens, spent.completion_tokens, spent.dollars) == expected
    assert 0 < spent.seconds < 30


def test_added_usage_is_unknown_as_soon_as_one_part_is() -> None:
    total = Usage()
    total.add(Usage(1, 0, 10, 5, 0.5, 0.25))
    total.add(Usage(0, 1, dollars=0.0))
    assert total.to_dict() == {
        "calls": 1, "cached": 1, "prompt_tokens": 10, "completion_tokens": 5, "seconds": 0.5, "dollars": 0.25}
    total.add(Usage(1, dollars=None))
    total.add(Usage(1, dollars=1.0))
    assert (total.calls, total.dollars) == (3, None)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(serve: Serve, waits: list[float], status: int) -> None:
    server = serve((status, {}, b"busy"), (status, {}, b"busy"), completion())
    assert OpenAIBackend([server.url], "m").complete(ASK).text == "It is 42."
    assert len(server.calls) == 3
    assert 0.5 <= waits[0] <= 1.5 <= 2 * waits[1] <= 6.0  # 0.5 * 2^attempt, times 0.5 to 1.5


@pytest.mark.parametrize(("header", "wait"), [("7", 7.0), ("0.25", 0.25), ("3600", 60.0), ("0", 0.0)])
def test_retry_after_is_honoured_up_to_a_minute(serve: Serve, waits: list[float], header: str, wait: float) -> None:
    server = serve((429, {"Retry-After": header}, b""), completion())
    OpenAIBackend([server.url], "m").complete(ASK)
    assert waits == [wait]


@pytest.mark.parametrize("header", ["Wed, 21 Oct 2015 07:28:00 GMT", "1.2.3", "soon", "-5", "1e9"])
def test_a_retry_after_that_is_no_number_of_seconds_is_the_usual_backoff(serve: Serve, waits: list[float], header: str) -> None:
    server = serve((503, {"Retry-After": header}, b""), completion())
    OpenAIBackend([server.url], "m").complete(ASK)
    assert 0.5 <= waits[0] <= 1.5


@pytest.mark.parametrize("status", [400, 401, 404, 422, 302])
def test_a_refusal_is_not_tried_again_and_says_why(serve: Serve, waits: list[float], status: int) -> None:
    elsewhere = serve(completion())
    server = serve((status, {"Location": elsewhere.url}, b'{"error": "no such model"}'))
    with pytest.raises(ExecutorError) as caught:
        OpenAIBackend([server.url], "qwen-9").complete(ASK)
    assert str(caught.value) == f"{server.url}/v1: HTTP {status}: {{\"error\": \"no such model\"}} (model 'qwen-9')"
    assert (len(server.calls), elsewhere.calls, waits) == (1, [], [])  # never another host either


@pytest.mark.parametrize(("content", "why"), [
    (b"<html>", "the answer is not a chat completion: '<html>'"),
    (b'{"choices": []}', "the answer is not a chat completion: '{\"choices\": []}'"),
    (b"[]", "the answer is not a chat completion: '[]'"),
    (b"\xff\xfe", "the answer is not a chat completion: '\ufffd\ufffd'"),
    (b'{"error": "HTTP 1, retry after 59"}', "the answer is not a chat completion: "),
    (completion(None)[2], "the answer has no content"),
    (completion(" \n")[2], "the answer has no content"),
])
def test_an_answer_that_is_none_is_tried_again_and_then_an_error(
        serve: Serve, waits: list[float], content: bytes, why: str) -> None:
    server = serve((200, {}, content))
    with pytest.raises(ExecutorError, match="failed 3 times; the last: ") as caught:
        OpenAIBackend([server.url], "m", retries=2).complete(ASK)
    assert f"{server.url}/v1: {why}" in str(caught.value)
    assert len(server.calls) == 3
    assert max(waits) <= 3  # nothing in the content sets the clock


def test_a_server_that_is_not_there_is_an_executor_error(waits: list[float]) -> None:
    url = closed_port()
    with pytest.raises(ExecutorError) as caught:
        OpenAIBackend([url], "m", retries=1).complete(ASK)
    assert str(caught.value) == f"executor {url}/v1 failed 2 times; the last: {url}/v1: ConnectionError"


def test_a_server_that_does_not_answer_in_time_is_given_up(serve: Serve, waits: list[float]) -> None:
    over = threading.Event()

    def hang(number: int) -> Answer:
        over.wait(20)
        return completion()

    server = serve(answer=hang)
    with pytest.raises(ExecutorError, match="ReadTimeout"):
        OpenAIBackend([server.url], "m", timeout=0.1, retries=0).complete(ASK)
    over.set()


def test_a_dead_url_is_left_out_while_another_lives(serve: Serve, waits: list[float]) -> None:
    server = serve(completion())
    backend = OpenAIBackend([closed_port(), server.url], "m")
    for _ in range(3):
        assert backend.complete(ASK).text == "It is 42."
    assert (len(server.calls), len(waits)) == (3, 1)  # the dead one cost one wait, once


def test_several_urls_are_used_least_in_flight(serve: Serve) -> None:
    everyone = threading.Barrier(4, timeout=20)

    def together(number: int) -> Answer:
        everyone.wait()  # nobody is answered before all four are in flight
        return completion()

    servers = [serve(answer=together), serve(answer=together)]
    backend = OpenAIBackend([server.url for server in servers], "m", retries=0)
    assert in_threads(4, lambda: backend.complete(ASK).text) == ["It is 42."] * 4
    assert [len(server.calls) for server in servers] == [2, 2]


def test_no_more_calls_are_in_flight_than_the_limit(serve: Serve) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def count(number: int) -> Answer:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.03)
        with lock:
            now -= 1
        return completion()

    backend = OpenAIBackend([serve(answer=count).url], "m", concurrency=2)
    in_threads(6, lambda: backend.complete(ASK))
    assert most == 2


def test_the_key_comes_from_the_named_variable_and_is_shown_nowhere(
        serve: Serve, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-77")
    quoting = (400, {}, b'{"error": "incorrect API key provided: sk-secret-77"}')
    server = serve(completion(), quoting, (200, {}, b"sk-secret-77"))
    backend = OpenAIBackend([server.url], "m", api_key_env="MY_KEY", retries=0)
    backend.complete(ASK)
    assert server.calls[0][1]["Authorization"] == "Bearer sk-secret-77"
    said = [repr(backend), str(backend)]
    for _ in range(2):
        with pytest.raises(ExecutorError) as caught:
            backend.complete(ASK)
        said += [str(caught.value), repr(caught.value)]
    assert "provided: ***" in said[2]
    assert not any("sk-secret" in text for text in said)


def test_a_missing_key_or_url_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match=r"^the environment variable NO_SUCH_KEY \(--executor-key-env\) is empty or not set$"):
        OpenAIBackend(["http://h"], "m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ValueError, match="needs at least one --executor-url"):
        OpenAIBackend([], "m")


def in_threads(n: int, call: Callable[[], Any]) -> list[Any]:
    """Call it n times at once; an exception of a call is its result."""
    results: list[Any] = [None] * n

    def one(i: int) -> None:
        try:
            results[i] = call()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


# ---- record and replay


def test_what_was_recorded_is_replayed_offline(tmp_path: Path) -> None:
    texts = ["plain", "\ud800 odd \u2028", "x" * 10_000]
    asks = [replace(ASK, text=text, inputs={"problem": text}) for text in texts]
    recorder = CachedBackend(tmp_path, Scripted(Custom=lambda request: request.text.upper()), "m/0")
    recorded = [recorder.complete(ask) for ask in asks]
    replay = CachedBackend(tmp_path, fingerprint="m/0")
    for ask, first in zip(asks, recorded, strict=True):
        again = replay.complete(ask)
        assert again.text == first.text == ask.text.upper()
        assert (first.usage.calls, first.usage.dollars) == (1, 0.25)
        assert again.usage == Usage(0, 1, 0, 0, 0.0, 0.0)
    assert (recorder.name, replay.name, replay.instant) == ("cached scripted", "replay", True)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("changed", [
    {"text": "other"}, {"operator": "Plan"}, {"task": replace(MATH, id="m2")}, {"inputs": {"problem": "other"}}])
def test_a_call_that_was_not_recorded_is_named(tmp_path: Path, changed: dict) -> None:
    CachedBackend(tmp_path, Scripted()).complete(ASK)
    ask = replace(ASK, **changed)
    with pytest.raises(ExecutorError) as caught:
        CachedBackend(tmp_path).complete(ask)
    assert str(caught.value) == f"replay: no recorded reply for {ask.operator} on {ask.task.id} in {tmp_path}"


def test_another_model_or_temperature_shares_no_reply(tmp_path: Path) -> None:
    CachedBackend(tmp_path, Scripted(), "qwen/0.0").complete(ASK)
    with pytest.raises(ExecutorError):
        CachedBackend(tmp_path, fingerprint="qwen/0.7").complete(ASK)


def test_equal_calls_at_one_time_are_made_once(tmp_path: Path) -> None:
    def slowly(request: Request) -> str:
        time.sleep(0.1)
        return "once"

    inner = Scripted(Custom=slowly)
    cached = CachedBackend(tmp_path, inner)
    replies = in_threads(6, lambda: cached.complete(ASK))
    assert ([reply.text for reply in replies], len(inner.requests)) == (["once"] * 6, 1)
    assert sorted((reply.usage.calls, reply.usage.cached) for reply in replies) == [(0, 1)] * 5 + [(1, 0)]


def test_a_failed_call_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match="down"):
        CachedBackend(tmp_path, Scripted(Custom=ExecutorError("down"))).complete(ASK)
    assert CachedBackend(tmp_path, Scripted(Custom="up")).complete(ASK).text == "up"


# ---- the simulated executor: a pure function


def simulate(task: Task, operator: str, seed: int = 0, prompt: str = "p", **inputs: Any) -> str:
    return SimulatedBackend(seed).complete(Request(task, operator, prompt, "text", inputs)).text


def verdicts(seed: int = 0, prompt: str = "p", plan: str = "", error: str = "") -> str:
    return "".join("wr"[repr(f"a{i}") in simulate(Task(f"t{i}", "gsm8k", "math", "?", (f"a{i}",)), "Programmer", seed, prompt,
                                                  plan=plan, error=error)] for i in range(40))


def test_a_reply_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = "import sys; sys.path[:0] = ['.', 'tests']; import test_backends; print(test_backends.verdicts())"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment,
                          cwd=Path(__file__).parent.parent)
    assert said.stdout.strip() == verdicts()


def test_a_reply_depends_on_seed_prompt_and_inputs_and_on_nothing_else() -> None:
    same = verdicts()
    assert all(verdicts() == same for _ in range(2))
    others = [verdicts(seed=1), verdicts(prompt="q"), verdicts(plan="A plan."), verdicts(error="division by zero")]
    assert len({same, *others}) == 5


def test_latency_waits_and_changes_nothing_else(waits: list[float]) -> None:
    slow = SimulatedBackend(0, latency=2.0)
    assert [slow.complete(ASK).text for _ in range(2)] == [SimulatedBackend(0).complete(ASK).text] * 2
    assert waits[0] == waits[1] > 0
    for i in range(300):
        slow.complete(replace(ASK, text=str(i)))
    assert sorted(waits)[150] == pytest.approx(2.0, rel=0.25)  # the median
    assert (slow.instant, SimulatedBackend(0).instant) == (False, True)


def test_the_simulation_has_no_price() -> None:
    assert SimulatedBackend(0).complete(ASK).usage.dollars is None


# ---- the simulated executor: its tables

GOLD = "1234567"
WRONG = "no"


@functools.cache
def medium(kind: str) -> list[Task]:
    """About 1,200 tasks of medium difficulty, where the tables hold as they stand."""
    gold = GOLD if kind == "math" else "Dree"
    tasks = (Task(f"{kind}-{i}", "s", kind, "Who is Bela Cora?", (gold,)) for i in range(12_000))
    return [task for task in tasks if abs(Simulation(0, task, "", "", {}).difficulty - 0.5) < 0.05]


def share(kind: str, operator: str, right: Callable[[str, Task], bool], **inputs: Any) -> float:
    """How often `right` holds for replies on tasks of medium difficulty."""
    return sum(right(simulate(task, operator, **inputs), task) for task in medium(kind)) / len(medium(kind))


def holds_gold(reply: str, task: Task) -> bool:
    return re.search(rf"\b{task.answers[0]}\b", reply) is not None


def rejects(reply: str, task: Task) -> bool:
    return tag(reply, "passed") == "no"


@pytest.mark.parametrize(("kind", "operator", "right", "inputs", "expected"), [
    ("math", "Programmer", holds_gold, {}, 0.60),
    ("math", "Programmer", holds_gold, {"plan": "A plan."}, 0.73),  # log-odds 0.41 + 0.6
    ("math", "Programmer", holds_gold, {"plan": "A plan.", "subproblems": "Parts."}, 0.77),
    ("qa", "Programmer", holds_gold, {}, 0.15),
    ("qa", "Custom", holds_gold, {}, 0.50),
    ("qa", "Custom", holds_gold, {"subproblems": "Parts."}, 0.71),  # log-odds 0 + 0.9
    ("qa", "Custom", holds_gold, {"plan": "A plan."}, 0.50),  # a plan does not help here
    ("math", "Custom", holds_gold, {}, 0.35),
    ("math", "Custom", holds_gold, {"solution": GOLD}, 0.85),
    ("math", "AnswerGenerate", holds_gold, {}, 0.30),
    ("qa", "AnswerGenerate", holds_gold, {}, 0.55),
    ("math", "Verify", rejects, {"solution": WRONG}, 0.85),
    ("math", "Verify", rejects, {"solution": f"So the answer is {GOLD}."}, 0.05),
    ("qa", "Verify", rejects, {"solution": WRONG}, 0.40),
    ("math", "Review", rejects, {"solution": WRONG}, 0.50),
    ("math", "Review", rejects, {"solution": GOLD}, 0.15),
    ("qa", "Review", rejects, {"solution": WRONG}, 0.75),
    ("math", "Revise", holds_gold, {"solution": WRONG}, 0.15),
    ("math", "Revise", holds_gold, {"solution": WRONG, "feedback": "One step does not hold."}, 0.50),
    ("math", "Revise", holds_gold, {"solution": WRONG, "feedback": "1/2 public tests passed."}, 0.60),
    ("math", "Revise", holds_gold, {"solution": WRONG, "feedback": f"x Suggested answer: {GOLD}"}, 0.90),
    ("math", "Revise", holds_gold, {"solution": WRONG, "feedback": f"x Suggested answer: {WRONG}"}, 0.50),
    ("math", "Revise", holds_gold, {"solution": GOLD}, 0.95),
    ("math", "Revise", holds_gold, {"solution": GOLD, "feedback": "One step does not hold."}, 0.70),
    ("math", "Aggregate", holds_gold, {"candidates": (GOLD, GOLD, WRONG)}, 0.95),
    ("math", "Aggregate", holds_gold, {"candidates": (GOLD, WRONG)}, 0.65),
    ("math", "Aggregate", holds_gold, {"candidates": (GOLD, WRONG, WRONG)}, 0.35),
    ("math", "Aggregate", holds_gold, {"candidates": (WRONG,)}, 0.03),
    ("math", "ScEnsemble", lambda reply, task: tag(reply, "answer") == "B", {"candidates": (WRONG, GOLD)}, 0.775),  # .55 + .45/2
    ("math", "Format", holds_gold, {"solution": f"So the answer is {GOLD}."}, 0.98),
])
def test_the_simulated_skills_are_those_of_the_tables(
        kind: str, operator: str, right: Callable[[str, Task], bool], inputs: dict, expected: float) -> None:
    assert share(kind, operator, right, **inputs) == pytest.approx(expected, abs=0.045)  # about 1200 draws: 3 sigma


def test_hard_tasks_are_solved_less_often() -> None:
    def solved(level: int) -> float:
        made = [Task(f"t{i}", "s", "math", "?", (GOLD,), meta={"level": level}) for i in range(600)]
        return sum(holds_gold(simulate(task, "Programmer"), task) for task in made) / 600

    shares = [solved(level) for level in (1, 2, 3, 4)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[3] > 0.25


def test_one_program_in_five_that_is_wrong_does_not_even_parse() -> None:
    replies = [simulate(task, "Programmer") for task in medium("math")]
    wrong = [reply for reply, task in zip(replies, medium("math"), strict=True) if not holds_gold(reply, task)]
    assert sum("print(answer\n" in reply for reply in wrong) / len(wrong) == pytest.approx(0.2, abs=0.06)


def test_a_wrong_answer_is_of_the_right_form_and_never_a_right_one() -> None:
    for source in ("toy_math", "toy_qa"):
        for task in toy_tasks(source, 60, 5):
            answers = {Simulation(seed, task, "Custom", "", {}).answer(False) for seed in range(8)}
            assert len(answers) > 1
            assert not {simulated._plain(text) for text in answers} & {simulated._plain(text) for text in task.answers}
    for gold in "abcde":
        answers = {Simulation(seed, Task("t", "mathqa", "choice", "?", (gold,)), "Custom", "", {}).answer(False)
                   for seed in range(30)}
        assert len(answers) == 3
        assert answers < set("abcde") - {gold}


def test_every_operator_answers_in_a_form_that_the_operator_reads() -> None:
    rng = random.Random(1)
    for source in ("toy_math", "toy_qa", "toy_code"):
        for task in toy_tasks(source, 4, 3):
            for op in REGISTRY.values():
                state = {"problem": task.problem, "plan": "", "subproblems": "", "code": task.answers[0], "feedback": "",
                         "solution": rng.choice([task.answers[0], "print(1)"]), "candidates": (task.answers[0], "print(1)")}
                if op.name in ("Programmer", "Test"):
                    continue  # they run programs; the next tests and those of operators.py do
                seen = {key: state[key] for key in op.reads}

                def complete(text: str, inputs: Any, task: Task = task, name: str = op.name) -> str:
                    return simulate(task, name, **inputs)

                context = Context(op.name, op.prompt, task.kind, task.entry_point, task.public_tests, seen, complete)
                assert op.run(context).error == "", (op.name, task.kind)


# ---- the simulated executor: its programs


def passes(program: str, tests: str) -> bool:
    """Run our own constants in this process: a sandbox for each of hundreds would take minutes."""
    try:
        exec(f"{program}\n{tests}", {})
    except Exception:
        return False
    return True


def test_wrong_programs_fail_hidden_tests_and_only_the_third_kind_passes_the_public_ones() -> None:
    for task in toy_tasks("toy_code", 40, 11):
        assert passes(task.answers[0], task.public_tests)
        assert passes(task.answers[0], task.hidden_tests)
        wrong = [simulated._wrong_program(task, k) for k in range(3)]
        assert [passes(program, task.hidden_tests) for program in wrong] == [False] * 3, task.id
        assert [passes(program, task.public_tests) for program in wrong] == [False, False, True], task.id


def test_the_sandbox_agrees_on_what_the_simulated_programmer_writes() -> None:
    found = set()
    for task in toy_tasks("toy_code", 4, 2):
        program = extract_code(simulate(task, "CustomCodeGenerate"))
        if program is None or "answer\n" in program:
            continue
        right = Simulation(0, task, "", "", {}).is_right(program)
        assert run_tests(program, task.hidden_tests, task.entry_point).passed == right
        found.add(right)
    assert found == {True, False}


def test_replies_carry_their_usage() -> None:
    reply = SimulatedBackend(0).complete(ASK)
    assert isinstance(reply, Reply)
    assert (reply.usage.calls, reply.usage.prompt_tokens) == (1, len(ASK.text) // 4)
