"""A server that misbehaves as told: HTTP/1.1 over plain sockets, so that it can do what no proper server would.

    with FaultServer(reset(), status(429, {"Retry-After": "1"}), reply("42")) as server: ... server.url

gives the first call the first behaviour, and so on; the last one repeats. A behaviour is a function of the open socket and
the call; it returns True to keep the connection. `stop()` and `start()` kill the server and bring it back on its port.
"""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Call:
    path: str
    headers: dict[str, str]  # names in lower case
    body: dict[str, Any]


Behaviour = Callable[[socket.socket, Call], bool]


def completion(text: Any = "It is 42.", message: dict | None = None, **more: Any) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text, **(message or {})}}], **more}).encode()


def head(code: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {code} Said So", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def answering(code: int, headers: dict[str, str], content: bytes) -> Behaviour:
    def behave(connection: socket.socket, call: Call) -> bool:
        connection.sendall(head(code, {"Content-Length": str(len(content)), **headers}) + content)
        return True
    return behave


def reply(text: Any = "It is 42.", **more: Any) -> Behaviour:
    return answering(*completion(text, **more))


def status(code: int, headers: dict[str, str] | None = None, content: bytes = b"no") -> Behaviour:
    return answering(code, headers or {}, content)


def reset(after: bytes = b"") -> Behaviour:
    """Send these bytes and reset the connection (RST, not an orderly end)."""
    def behave(connection: socket.socket, call: Call) -> bool:
        connection.sendall(after)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False
    return behave


def cut(after: bytes) -> Behaviour:
    """Send these bytes and end the connection in order."""
    def behave(connection: socket.socket, call: Call) -> bool:
        connection.sendall(after)
        return False
    return behave


def slow(seconds: float, then: Behaviour | None = None) -> Behaviour:
    """Nothing for a while, then an answer."""
    def behave(connection: socket.socket, call: Call) -> bool:
        time.sleep(seconds)
        return (then or reply())(connection, call)
    return behave


def drip(start: bytes = b"", every: float = 0.05) -> Behaviour:
    """A byte now and then, for ever: no single read of the client takes long."""
    def behave(connection: socket.socket, call: Call) -> bool:
        connection.sendall(start)
        while True:
            connection.sendall(b"x")
            time.sleep(every)
    return behave


def hang(connection: socket.socket, call: Call) -> bool:
    """Never answer; ends when the client does."""
    while connection.recv(1 << 16):
        ...
    return False


class FaultServer:
    def __init__(self, *script: Behaviour | Answer, answer: Callable[[int], Behaviour | Answer] | None = None) -> None:
        self.answer = answer or (lambda number: script[min(number, len(script) - 1)])
        self.calls: list[Call] = []
        self.connections = self.port = 0
        self._lock, self._open = threading.Lock(), set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Die: nobody listens, and every open connection is reset."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self._thread.join(10)
        self.drop_connections()

    def drop_connections(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "FaultServer":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was stopped
            while True:
                connection, _ = listener.accept()
                with self._lock:
                    self.connections += 1
                    self._open.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError, ValueError, IndexError), connection.makefile("rb") as file:  # or what is no HTTP
                while (call := self._read(file)) is not None:
                    with self._lock:
                        number = len(self.calls)
                        self.calls.append(call)
                    behave = self.answer(number)
                    if not (answering(*behave) if isinstance(behave, tuple) else behave)(connection, call):
                        return
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    @staticmethod
    def _read(file: Any) -> Call | None:
        line = file.readline()
        if not line:
            return None
        headers = {}
        while (header := file.readline().strip()):
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return Call(line.split()[1].decode(), headers, json.loads(file.read(int(headers.get("content-length", 0))) or b"null"))
