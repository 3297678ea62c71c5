"""OpenAIBackend and endpoint.py against a real server that misbehaves (fault_server.py)."""

import email.utils
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_server import Answer, Behaviour, FaultServer, completion, cut, drip, hang, head, reply, reset, slow, status
from scripted import ASK, MATH, add, in_threads

import endpoint
import operators
from backends import ExecutorError, OpenAIBackend
from canvas import Canvas
from endpoint import Endpoint, retry_after

Serve = Callable[..., FaultServer]
LENGTH_100 = head(200, {"Content-Length": "100"})


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def fails(backend: OpenAIBackend) -> str:
    with pytest.raises(ExecutorError) as caught:
        backend.complete(ASK)
    return str(caught.value)


# ---- one call


@pytest.mark.parametrize(("base", "path"), [
    ("", "/v1/chat/completions"), ("/", "/v1/chat/completions"), ("/v1", "/v1/chat/completions"),
    ("/v1/", "/v1/chat/completions"), ("/v1beta/openai/", "/v1beta/openai/chat/completions")])
def test_a_call_posts_one_user_message_and_reads_the_reply(serve: Serve, base: str, path: str) -> None:
    server = serve(reply())
    answer = OpenAIBackend([server.url + base], "qwen", temperature=0.3, max_tokens=99).complete(ASK)
    [call] = server.calls
    assert (answer.text, call.path) == ("It is 42.", path)
    assert call.body == {
        "model": "qwen", "temperature": 0.3, "max_tokens": 99, "messages": [{"role": "user", "content": ASK.text}]}
    assert "authorization" not in call.headers


def test_extra_parameters_are_sent_and_null_takes_one_out(serve: Serve) -> None:
    server = serve(reply())
    extra = {"reasoning_effort": "low", "max_tokens": None, "max_completion_tokens": 4096}
    OpenAIBackend([server.url], "m", extra=extra).complete(ASK)
    assert server.calls[0].body == {"model": "m", "temperature": 0.0, "reasoning_effort": "low", "max_completion_tokens": 4096,
                                    "messages": [{"role": "user", "content": ASK.text}]}


@pytest.mark.parametrize(("prices", "usage", "expected"), [
    ((2.0, 10.0), {"prompt_tokens": 1000, "completion_tokens": 300}, (1000, 300, 0.005)),
    (None, {"prompt_tokens": 1000, "completion_tokens": 300}, (1000, 300, None)),  # an unknown price is not 0
    ((2.0, 10.0), None, (0, 0, None)),  # nor is an unknown count
    ((2.0, 10.0), {"prompt_tokens": 1000}, (0, 0, None)),
    ((2.0, 10.0), {"prompt_tokens": None, "completion_tokens": 1}, (0, 0, None)),
    ((2.0, 10.0), {"prompt_tokens": True, "completion_tokens": 1}, (0, 0, None)),
    ((2.0, 10.0), {"prompt_tokens": -1, "completion_tokens": 1}, (0, 0, None)),
    ((2.0, 10.0), {"prompt_tokens": 10**400, "completion_tokens": 1}, (0, 0, None)),
    ((2.0, 10.0), "much", (0, 0, None)),
])
def test_usage_and_price(serve: Serve, prices: Any, usage: Any, expected: tuple) -> None:
    spent = OpenAIBackend([serve(reply(usage=usage)).url], "m", prices=prices).complete(ASK).usage
    assert (spent.calls, spent.cached) == (1, 0)
    assert (spent.prompt_tokens, spent.completion_tokens, spent.dollars) == expected
    assert 0 < spent.seconds < 30


def test_an_answer_without_text_is_paid_for_too(serve: Serve, waits: list[float]) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 300}
    server = serve(reply("", usage=usage), status(503), reply(usage=usage))
    spent = OpenAIBackend([server.url], "m", prices=(2.0, 10.0)).complete(ASK).usage
    assert (spent.calls, spent.prompt_tokens, spent.completion_tokens, spent.dollars) == (1, 2000, 600, 0.01)


# ---- what the answer may hold


@pytest.mark.parametrize(("content", "text"), [
    ("<think>6 * 7?</think>\n\nIt is 42.", "It is 42."),
    ("6 * 7 is\n</think>It is 42.", "It is 42."),  # where the chat template opens the block
    ([{"type": "text", "text": "It is "}, {"type": "image"}, {"type": "text", "text": "42."}, 7], "It is 42."),
    ("a\ud800b\0c\U0001f600", "a\ufffdb\ufffdc\U0001f600"),
    ("    indented\n", "    indented\n"),
    ("x" * 1_000_000, "x" * 1_000_000),
])
def test_the_text_of_an_answer(serve: Serve, content: Any, text: str) -> None:
    assert OpenAIBackend([serve(reply(content)).url], "m").complete(ASK).text == text


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_no_answer(serve: Serve, waits: list[float], name: str) -> None:
    server = serve(reply("It is 42.", message={name: "Is it 41?"}), reply(None, message={name: "Is it 41?"}))
    backend = OpenAIBackend([server.url], "m")
    assert backend.complete(ASK).text == "It is 42."
    assert "the answer has no text but reasoning" in fails(backend)


@pytest.mark.parametrize("content", [None, "", "<think>Is it"])
def test_reasoning_that_used_up_all_tokens_is_an_empty_answer_and_said_once(
        serve: Serve, capsys: pytest.CaptureFixture, content: Any) -> None:
    """The model failed, not the server: an operator makes feedback of it, and the trajectory goes on."""
    choice = {"message": {"content": content, "reasoning_content": "Is it 41?"}, "finish_reason": "length"}
    server = serve((200, {}, json.dumps({"choices": [choice]}).encode()))
    backend = OpenAIBackend([server.url], "m")
    assert [backend.complete(ASK).text for _ in range(2)] == ["", ""]
    assert capsys.readouterr().err.count("""--executor-extra '{"max_tokens": 16384}'""") == 1


def test_a_prompt_that_no_encoder_takes_is_sent_without_what_it_refuses(serve: Serve) -> None:
    server = serve(reply())
    OpenAIBackend([server.url], "m").complete(replace(ASK, text="a\ud800b"))
    assert server.calls[0].body["messages"][0]["content"] == "a\ufffdb"


# ---- trying again

GOOD = completion()[2]
FAULTS = {
    "408": status(408), "409": status(409), "429": status(429), "500": status(500), "502": status(502), "503": status(503),
    "504": status(504), "529": status(529),
    "reset before the answer": reset(), "reset in the answer": reset(LENGTH_100 + b"{"),
    "end before the answer": cut(b""), "end in the answer": cut(LENGTH_100 + GOOD[:20]),
    "end in a chunk": cut(head(200, {"Transfer-Encoding": "chunked"}) + b"30\r\n" + GOOD[:20]),
    "hang": hang, "slow first byte": slow(1.5), "drip in the headers": drip(b"HTTP/1.1 200 OK\r\nX-A: "),
    "drip in the body": drip(head(200, {"Content-Length": "1000000"})), "drip without an end": drip(head(200, {})),
    "not HTTP": cut(b"\xff\xfe\r\n\r\n"), "endless header": cut(b"HTTP/1.1 200 OK\r\na: " + b"b" * 100_000),
    "huge": cut(head(200, {}) + b" " * (9 << 20)),
    "truncated JSON": status(200, content=GOOD[:-3]), "no JSON": status(200, content=b"<html>"),
    "empty": status(200, content=b""), "no choices": status(200, content=b'{"error": "overloaded"}'),
    "no choice": status(200, content=b'{"choices": []}'), "no message": status(200, content=b'{"choices": [{}]}'),
    "a list": status(200, content=b"[]"), "a number": status(200, content=b"1"), "deep": status(200, content=b"[" * 100_000),
    "null message": status(200, content=b'{"choices": [{"message": null}]}'), "bad UTF-8": status(200, content=b"\xff\xfe"),
    "null content": reply(None), "blank content": reply(" \n"), "content of another type": reply(42), "no parts": reply([]),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_tried_again_and_then_an_error_that_names_it(serve: Serve, waits: list[float], fault: Behaviour) -> None:
    server = serve(fault, reply())
    assert OpenAIBackend([server.url], "m", timeout=1.0).complete(ASK).text == "It is 42."
    assert (len(server.calls), len(waits)) == (2, 1)
    server = serve(fault)
    began = time.monotonic()
    message = fails(OpenAIBackend([server.url], "m", timeout=0.2, retries=2))
    assert message.startswith("no answer from the executor in 3 attempts (")
    assert f"; the last: {server.url}/v1: " in message
    assert len(message) < 600
    assert len(server.calls) == 3
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("fault", "why"), [
    (status(503, content=b"engine is busy"), "HTTP 503: engine is busy"),
    (hang, "no whole answer within 0.2 s"), (FAULTS["huge"], "the answer is larger than 8 MiB"),
    (reset(), "ConnectionResetError: [Errno 104] Connection reset by peer"),
    (cut(LENGTH_100 + b"{"), "the connection ended 99 bytes before the answer did"),
    (FAULTS["no choices"], 'the answer has no choices with a message: {"error": "overloaded"}'),
    (status(200, content=b"\x1b[2J\n\nred"), "the answer has no choices with a message: [2J red"),
    (reply(None), "the answer has no text, finish_reason None"),
])
def test_an_error_says_what_happened(serve: Serve, waits: list[float], fault: Behaviour, why: str) -> None:
    message = fails(OpenAIBackend([serve(fault).url], "m", timeout=0.2 if fault is hang else 30, retries=0))
    assert message.partition("/v1: ")[2] == why


def test_a_server_that_is_not_there_is_an_executor_error(waits: list[float]) -> None:
    assert fails(OpenAIBackend([closed_port()], "m")).endswith("/v1: ConnectionRefusedError: [Errno 111] Connection refused")
    assert len(waits) == 10


def test_the_waits_grow_up_to_thirty_seconds_long_enough_for_a_restart(serve: Serve, waits: list[float]) -> None:
    """1, 2, 4, 8, 16, 20, 20 seconds, each times 0.75 to 1.25."""
    server = serve(status(503))
    fails(OpenAIBackend([server.url], "m"))
    assert len(server.calls) == 11
    for wait, middle in zip(waits, [1, 2, 4, 8, 16, 30, 30, 30, 30, 30], strict=True):
        assert 0.75 * middle <= wait <= 1.25 * middle


@pytest.mark.parametrize(("header", "low", "high"), [
    ("7", 7, 7), ("3600", 60, 60), ("0.25", 0.75, 1.25), ("0", 0.75, 1.25), ("soon", 0.75, 1.25), ("-5", 0.75, 1.25),
    ("1e9", 0.75, 1.25), ("1.2.3", 0.75, 1.25), ("9" * 400, 0.75, 1.25)])
def test_retry_after_is_honoured_up_to_a_minute(serve: Serve, waits: list[float], header: str, low: float, high: float) -> None:
    server = serve(status(429, {"Retry-After": header}), reply())
    OpenAIBackend([server.url], "m").complete(ASK)
    assert low <= waits[0] <= high


def test_retry_after_may_be_a_date_by_the_clock_of_the_server() -> None:
    def date(seconds: float) -> str:
        return email.utils.formatdate(seconds, usegmt=True)

    now = 1_445_412_000.0  # its clock is years behind
    assert retry_after({"Retry-After": date(now + 30), "Date": date(now)}) == 30
    assert retry_after({"Retry-After": date(now - 30), "Date": date(now)}) == 0
    assert 25 < retry_after({"Retry-After": date(time.time() + 30)}) <= 31
    assert retry_after({"Retry-After": "Wed, 99 Feb 99999999 07:28:00 GMT"}) == 0


def test_the_time_of_a_call_is_bounded(serve: Serve, waits: list[float]) -> None:
    """With a timeout of 120 s no attempt begins after 270 s: four waits of 60 s fit."""
    server = serve(status(503, {"Retry-After": "3600"}))
    fails(OpenAIBackend([server.url], "m", timeout=120))
    assert (len(server.calls), waits) == (5, [60, 60, 60, 60])


def test_an_answer_that_is_none_is_asked_for_three_times(serve: Serve, waits: list[float]) -> None:
    server = serve(reply(None))
    fails(OpenAIBackend([server.url], "m"))
    assert len(server.calls) == 3


def test_after_a_call_in_vain_the_next_ones_are_short_until_one_succeeds(serve: Serve, waits: list[float]) -> None:
    server = serve(answer=lambda number: status(503) if number < 11 + 3 or number > 14 else reply())
    backend = OpenAIBackend([server.url], "m")
    fails(backend)
    assert len(server.calls) == 11
    fails(backend)  # 3 seconds: attempts after 0, 1 and 3 of them, or one fewer
    assert len(server.calls) in (13, 14)
    waits.clear()
    server.answer = lambda number: reply()
    backend.complete(ASK)
    server.answer = lambda number: status(503)
    waits.clear()
    fails(backend)
    assert len(waits) == 10


def test_trouble_is_said_when_it_begins_and_when_it_ends(
        serve: Serve, waits: list[float], capsys: pytest.CaptureFixture) -> None:
    server = serve(status(503), reply(), *[status(503)] * 4, reply())
    backend = OpenAIBackend([server.url], "m")
    backend.complete(ASK)
    assert capsys.readouterr().err == ""  # a hiccup
    backend.complete(ASK)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("executor: does not answer; trying again for ")
    assert first.endswith(f"{server.url}/v1: HTTP 503: no")
    assert second.startswith("executor: answers again, after ")


# ---- refusals


@pytest.mark.parametrize(("code", "hint"), [
    (400, ""), (422, ""), (404, " (is 'qwen-9' the server's name of the model, and the URL right up to /v1?)"),
    (401, " (the server wants a key; name the environment variable that holds it with --executor-key-env)"),
    (403, " (the server wants a key; name the environment variable that holds it with --executor-key-env)"),
    (302, " (redirects are not followed; give the final address)"),
    (307, " (redirects are not followed; give the final address)"), (204, "")])
def test_a_refusal_is_not_tried_again_and_says_why(serve: Serve, waits: list[float], code: int, hint: str) -> None:
    elsewhere = serve(reply())
    said = b"" if code == 204 else b'{"error": "no such model"}'
    server = serve(status(code, {"Location": elsewhere.url}, said))
    backend = OpenAIBackend([server.url, serve(reply()).url], "qwen-9")
    assert fails(backend) == f"{server.url}/v1: HTTP {code}: {said.decode()}{hint}".rstrip().replace(":  (", ": (")
    assert (len(server.calls), elsewhere.calls, waits) == (1, [], [])  # never another host either


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://", "", "http://h:99999", "http://[::1", "http://a b"])
def test_a_url_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="is no server's URL: ") as caught:
        OpenAIBackend([url], "m")
    assert repr(url) in str(caught.value)


def test_a_server_without_tls_is_not_spoken_to_in_plain(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "CONNECT_SECONDS", 0.2)
    server = serve(reply())
    assert "no connection within 0.2 s" in fails(OpenAIBackend([server.url.replace("http:", "https:")], "m", retries=0))
    assert server.calls == []


def test_a_missing_url_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="needs at least one --executor-url"):
        OpenAIBackend([], "m")


def test_the_body_of_a_redirect_is_not_read_without_end(serve: Serve) -> None:
    endless = drip(head(302, {"Location": "/elsewhere"}) + b" " * (9 << 20), every=60)
    assert "larger than 8 MiB" in fails(OpenAIBackend([serve(endless).url], "m", retries=0))


# ---- several URLs, many calls


def test_a_dead_url_is_left_out_while_another_lives(serve: Serve, waits: list[float]) -> None:
    server, dead = serve(reply()), serve(status(503))
    backend = OpenAIBackend([dead.url, closed_port(), server.url], "m")
    for _ in range(5):
        assert backend.complete(ASK).text == "It is 42."
    assert (len(server.calls), len(dead.calls), waits) == (5, 1, [])  # tried once, and nobody waited


def test_a_dead_url_that_comes_back_is_used_again(serve: Serve, waits: list[float]) -> None:
    first, second = serve(status(503), reply()), serve(reply())
    backend = OpenAIBackend([first.url, second.url], "m")
    backend.complete(ASK)
    backend.complete(ASK)
    assert (len(first.calls), len(second.calls)) == (1, 2)
    waits.append(3.0)  # time passes
    backend.complete(ASK)
    backend.complete(ASK)
    assert (len(first.calls), len(second.calls)) == (3, 2)


def test_a_url_that_failed_is_tried_by_one_call_before_others_follow(serve: Serve, waits: list[float]) -> None:
    answer_now = threading.Event()

    def held(connection: socket.socket, call: Any) -> bool:
        answer_now.wait(20)
        return reply()(connection, call)

    first, second = serve(status(503), held), serve(reply(), held)
    backend = OpenAIBackend([first.url, second.url], "m")
    backend.complete(ASK)
    waits.append(3.0)
    threads = [threading.Thread(target=backend.complete, args=(ASK,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(first.calls) + len(second.calls) < 2 + 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (len(first.calls), len(second.calls)) == (1 + 1, 1 + 5)  # by load alone it would be 1 + 3 and 1 + 3
    answer_now.set()
    for thread in threads:
        thread.join(20)


def test_several_urls_are_used_least_in_flight(serve: Serve) -> None:
    everyone = threading.Barrier(4, timeout=20)

    def together(number: int) -> Answer:
        everyone.wait()  # nobody is answered before all four are in flight
        return completion()

    servers = [serve(answer=together), serve(answer=together)]
    backend = OpenAIBackend([server.url for server in servers], "m", retries=0)
    assert [answer.text for answer in in_threads(4, lambda: backend.complete(ASK))] == ["It is 42."] * 4
    assert [len(server.calls) for server in servers] == [2, 2]


def test_no_more_calls_are_in_flight_than_the_limit(serve: Serve, waits: list[float]) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def count(number: int) -> Behaviour | Answer:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return [completion(), status(503), reset(), status(429)][number % 4]

    backend = OpenAIBackend([serve(answer=count).url, serve(answer=count).url], "m", concurrency=3)
    in_threads(16, lambda: backend.complete(ASK))
    assert most == 3


def test_connections_are_kept_and_a_dropped_idle_one_costs_nothing(serve: Serve, waits: list[float]) -> None:
    server = serve(reply())
    backend = OpenAIBackend([server.url], "m", retries=0)
    for _ in range(5):
        backend.complete(ASK)
    assert server.connections == 1
    server.drop_connections()  # as vLLM does after five idle seconds
    time.sleep(0.05)
    backend.complete(ASK)
    assert (server.connections, waits) == (2, [])


def test_a_server_that_dies_within_an_answer_and_comes_back_is_waited_for(serve: Serve) -> None:
    started = threading.Event()

    def dying(connection: socket.socket, call: Any) -> bool:
        connection.sendall(LENGTH_100)
        started.set()
        return hang(connection, call)

    server = serve(dying, reply())
    backend = OpenAIBackend([server.url], "m")

    def restart() -> None:
        started.wait(20)
        server.stop()
        time.sleep(2)
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    assert backend.complete(ASK).text == "It is 42."
    thread.join()


def test_five_hundred_calls_leave_no_thread_and_no_socket_behind(waits: list[float]) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    faults = [fault for name, fault in FAULTS.items() if name not in ("huge", "slow first byte")]
    rng = random.Random(0)
    threads, files = threading.active_count(), descriptors()
    with FaultServer(answer=lambda number: rng.choice(faults) if rng.random() < 0.3 else reply()) as server:
        backend = OpenAIBackend([server.url], "m", timeout=0.1, retries=1, concurrency=4)
        failed = 0
        for _ in range(125):
            failed += sum(isinstance(answer, ExecutorError) for answer in in_threads(4, lambda: backend.complete(ASK)))
    assert 0 < failed < 250
    deadline = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.05)  # the server's threads
    assert threading.active_count() <= threads  # fewer if one of an earlier test has ended meanwhile
    assert descriptors() <= files + 4  # the pool's


# ---- the key

KEY = "sk-secret/77"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")  # as `export MY_KEY="$(cat file)"` may leave it
    return "MY_KEY"


def test_the_key_is_sent_and_shown_nowhere(
        serve: Serve, waits: list[float], key: str, capsys: pytest.CaptureFixture) -> None:
    quoted = [json.dumps({"error": f"incorrect API key provided: {KEY}"}), KEY, '"sk\\u002dsecret\\/77"']
    server = serve(*(status(code, content=text.encode()) for code in (400, 401, 503, 200) for text in quoted),
                   reset(f"HTTP/1.1 200 {KEY}\r\n{KEY}".encode()), cut(f"{KEY}\r\n\r\n".encode()), reply(f"It is {KEY}."))
    backend = OpenAIBackend([server.url], "m", key, retries=0)
    said = [repr(backend), str(vars(backend))]
    for _ in range(14):
        said.append(fails(backend))
    said.append(backend.complete(ASK).text)
    assert {call.headers["authorization"] for call in server.calls} == {f"Bearer {KEY}"}
    assert not any("secret" in text for text in [*said, *capsys.readouterr()])
    assert "provided: ***" in said[2]
    assert "(the key in MY_KEY was refused)" in said[5]
    assert said[-1] == "It is ***."


def test_a_placeholder_for_a_key_is_no_secret(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "EMPTY")
    assert OpenAIBackend([serve(reply("The list is EMPTY.")).url], "m", "MY_KEY").complete(ASK).text == "The list is EMPTY."


@pytest.mark.parametrize(("value", "why"), [
    ("", "is empty or not set"), (" \n", "is empty or not set"), ("sk-secret\nX: 1", "holds characters that no header can carry"),
    ("sk-sécret", "holds characters that no header can carry")])
def test_a_key_that_cannot_be_sent_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, value: str, why: str) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ValueError, match=rf"^the environment variable MY_KEY \(--executor-key-env\) {why}$"):
        OpenAIBackend(["http://h"], "m", "MY_KEY")


def test_a_key_in_place_of_a_name_or_in_a_url_is_refused_and_not_quoted() -> None:
    for urls, name in ((["http://h"], "sk-secret"), (["http://u:secret@h"], None), (["http://h/v1?key=secret"], None)):
        with pytest.raises(ValueError, match="environment variable") as caught:
            OpenAIBackend(urls, "m", name)
        assert "secret" not in str(caught.value)


def test_a_program_that_the_executor_wrote_cannot_read_the_key(serve: Serve, key: str) -> None:
    """It prints its environment and that of every process whose /proc it can read."""
    program = ("import glob, os\nprint('seen', dict(os.environ))\nfor path in glob.glob('/proc/*/environ'):\n"
               "    try:\n        print(path, open(path).read())\n    except OSError as error:\n        print(error)\n")
    server = serve(reply(f"```python\n{program}```"))
    canvas = Canvas(MATH, operators.library(), OpenAIBackend([server.url], "m", key))
    canvas.step(add("Programmer"))
    assert canvas.solution.startswith("seen {")
    assert "secret" not in canvas.solution


# ---- what the environment says


def test_a_proxy_of_the_environment_is_used_for_other_machines_only(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, server = serve(reply("proxied")), serve(reply("direct"))
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for host in ("127.0.0.1", "localhost"):
        assert OpenAIBackend([f"http://{host}:{server.port}"], "m").complete(ASK).text == "direct"
    assert OpenAIBackend(["http://executor.invalid"], "m").complete(ASK).text == "proxied"
    assert [call.path for call in proxy.calls] == ["http://executor.invalid/v1/chat/completions"]


@pytest.mark.parametrize(("host", "this_machine"), [
    ("localhost", True), ("LOCALHOST", True), ("a.localhost", True), ("127.0.0.1", True), ("127.8.9.1", True), ("[::1]", True),
    ("localhost.example.org", False), ("10.0.0.1", False), ("127.0.0.1.example.org", False)])
def test_which_hosts_are_this_machine(host: str, this_machine: bool) -> None:
    assert Endpoint(f"http://{host}:80")._session.trust_env != this_machine


def test_netrc_is_not_read_and_cookies_are_not_kept(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine executor.invalid login me password secret\n")
    proxy = serve(status(200, {"Set-Cookie": "a=b"}, GOOD))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", proxy.url)
    backend = OpenAIBackend(["http://executor.invalid"], "m")
    for _ in range(2):
        backend.complete(ASK)
    assert not {"authorization", "cookie"} & (proxy.calls[0].headers.keys() | proxy.calls[1].headers.keys())


def test_a_large_answer_cannot_hide_in_a_small_one(serve: Serve) -> None:
    server = serve(reply())
    OpenAIBackend([server.url], "m").complete(ASK)
    assert server.calls[0].headers["accept-encoding"] == "identity"
    assert endpoint.MAX_BYTES == 8 << 20
