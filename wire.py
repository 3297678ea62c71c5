"""The wire between a program and its tests, which run in two sandboxed processes and share one socket.

`candidate` executes the program and answers calls; in the other process (judge.py) the program's names are proxies. What the
program does to its interpreter (patch assert, builtins or unittest, lie in __eq__, exit with 0) stays there. Messages are
tagged JSON, never pickled; values are rebuilt as plain objects, so `==` is Python's own.
"""
from __future__ import annotations

import builtins
import io
import json
import operator
import os
import sys
import types
from collections.abc import Callable

MESSAGE_LIMIT = 1 << 26
PRINTED_LIMIT = 1 << 20
FORWARDED = ("len", "iter", "next", "bool", "str", "repr", "hash", "getitem", "setitem", "delitem", "enter", "exit", "call")
BETWEEN_OWN = ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "abs")
SCALING = ("mul", "truediv", "floordiv", "mod", "pow")  # `vector * 3` too, but not `answer - expected`
PLAIN_TYPES = ("bool", "int", "float", "complex", "str", "bytes", "list", "tuple", "dict", "set", "frozenset", "range",
               "object", "type")
NOTHING = ("load", (), {}, ())  # a request as (op, args, named, outcome), before there was one


class Expired(BaseException):
    """The tests' time is up; no `except Exception` in a test may swallow it."""


class Ref:
    """A proxy for an object on the other side.

    Only what cannot help a liar is forwarded: `==`, `<`, `-` .. are asked only between two of the program's own objects
    and `in` goes by iteration, so a program's operators never see, and never answer for, a value of the tests.
    """
    def __init__(self, peer: Peer, number: int, label: str) -> None:
        self.__dict__.update(_peer=peer, _number=number, _label=label)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name not in ("__name__", "__qualname__", "__doc__", "__annotations__", "__dict__"):
            raise AttributeError(name)  # protocols like __array__ would let a program's object act for a value
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._peer.ask("setattr", self, name, value)

    def __instancecheck__(self, other: object) -> bool:
        return bool(self._peer.ask("isinstance", other, self))


for _op in FORWARDED:
    setattr(Ref, f"__{_op}__", lambda self, *args, _op=_op, **named: self._peer.ask(_op, self, *args, **named))
for _op in BETWEEN_OWN:
    setattr(Ref, f"__{_op}__", lambda self, *args, _op=_op: self._peer.ask(_op, self, *args)
            if all(isinstance(arg, Ref) for arg in args) else self._peer.scale(_op, self, *args))


class Peer:
    """One end of the wire; `perform(op, *args)` answers what the other end asks for."""
    def __init__(self, fd: int, perform: Callable, callbacks_only: bool) -> None:
        self.fd, self.perform, self.callbacks_only = fd, perform, callbacks_only
        self.objects, self.numbers, self.errors, self.refs = [], {}, {}, {}
        self.last: tuple = NOTHING  # the newest request: for error messages

    def send(self, *message: object) -> None:
        data = json.dumps(message).encode()
        if len(data) > MESSAGE_LIMIT:
            raise ValueError("the value is too large to be passed on")
        data = memoryview(len(data).to_bytes(4, "big") + data)
        while data:
            data = data[os.write(self.fd, data):]

    def receive(self) -> list:
        def exactly(size: int) -> bytes:
            parts = []
            while size:
                parts.append(os.read(self.fd, min(size, 1 << 20)))
                if not parts[-1]:
                    raise EOFError("the program's process ended")
                size -= len(parts[-1])
            return b"".join(parts)
        if (size := int.from_bytes(exactly(4), "big")) > MESSAGE_LIMIT:
            raise EOFError("the program broke the protocol")
        return json.loads(exactly(size))

    def encode(self, value: object) -> object:
        """Plain values as themselves or [tag, payload]; anything else stays here and goes as a reference."""
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            return value if abs(value) < 1 << 63 else ["int", hex(value)]  # decimal text of big ones is limited, and slow
        if isinstance(value, str):  # JSON would join two lone surrogates into one character
            lone = not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)
            return ["str", value.encode("utf-8", "surrogatepass").hex()] if lone else value
        kind, name = type(value), type(value).__name__
        for plain in ("list", "tuple", "set", "frozenset"):
            if isinstance(value, getattr(builtins, plain)):
                return [plain, [self.encode(item) for item in value]]
        if isinstance(value, dict):
            pairs = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            return ["Counter" if name == "Counter" else "dict", pairs]
        if isinstance(value, (bytes, bytearray)):
            return ["bytes", value.hex()]
        if kind in (complex, range):
            return [name, [value.real, value.imag] if kind is complex else [value.start, value.stop, value.step]]
        if kind.__module__ in ("collections", "decimal", "fractions", "datetime") and name in DECODERS:
            return [name, [self.encode(item) for item in value] if name == "deque" else str(value)]
        if kind.__module__ == "numpy":
            array = name == "ndarray" and value.dtype.kind in "biufc"
            return ["ndarray", [self.encode(value.tolist()), value.dtype.str]] if array else self.encode(value.tolist())
        if isinstance(value, type) and value.__name__ in PLAIN_TYPES and value.__module__ == "builtins":
            return ["type", value.__name__]
        if isinstance(value, type) and issubclass(value, Exception):
            return ["exception", [value.__name__, builtin_base(value)]]
        if isinstance(value, Ref):
            return ["yours", value._number]
        if self.callbacks_only and getattr(value, "__self__", None) is builtins:
            return ["builtin", value.__name__]  # a test that hands out `eval` does not mean the judge's
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)  # kept alive, so that its id stays its own
        return ["ref", [self.numbers[id(value)], str(getattr(value, "__name__", name))]]

    def decode(self, data: object) -> object:
        """The inverse of `encode`; anything malformed is an error in the caller, that is, a failed test."""
        if not isinstance(data, list):
            return data
        tag, body = data
        if tag in ("list", "tuple", "set", "frozenset"):
            return getattr(builtins, tag)(self.decode(item) for item in body)
        if tag in ("dict", "Counter"):
            pairs = {self.decode(key): self.decode(item) for key, item in body}
            return pairs if tag == "dict" else __import__("collections").Counter(pairs)
        if tag == "ndarray":
            return __import__("numpy").array(self.decode(body[0]), dtype=str(body[1]))
        if tag == "ref":
            return self.refs.setdefault(body[0], Ref(self, int(body[0]), str(body[1])[:100]))  # `is` holds here if there
        if tag == "yours":
            return self.objects[body]
        if tag == "exception":
            return self.error_class(*body)
        if tag == "builtin" and not self.callbacks_only:
            return getattr(builtins, body)
        return DECODERS[tag]([self.decode(item) for item in body] if tag == "deque" else body)

    def error_class(self, name: str, base: str) -> type[Exception]:
        """The class for an exception of the other side; exits and ends of loops become plain errors."""
        kind = getattr(builtins, base, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or kind.__name__.startswith("Stop"):
            kind = RuntimeError
        return kind if kind.__name__ == name else self.errors.setdefault(name, type(str(name), (kind,), {}))

    def ask(self, op: str, *args: object, **named: object) -> object:
        """Have `op` performed on the other side; meanwhile serve its callbacks."""
        self.last = (op, args, named, "did not return")
        self.send("do", op, [self.encode(arg) for arg in args], {key: self.encode(arg) for key, arg in named.items()})
        while (message := self.receive())[0] == "do":
            self.serve(message)
        kind, body, extra, printed = message
        sys.stdout.write(str(printed))  # where the tests have redirected it to
        if kind == "raise":
            name, base, line = extra
            self.last = (op, args, named, f"raised {name}: {body}" + (f" (line {line} of the program)" if line else ""))
            kind = StopIteration if (op, name) == ("next", "StopIteration") else self.error_class(name, base)
            error = kind.__new__(kind)  # not by __init__: UnicodeDecodeError wants five arguments
            error.args = (body,)
            raise error
        result = self.decode(body)
        self.last = (op, args, named, (result,))
        for old, new in zip(args, map(self.decode, extra or ()), strict=False):
            if isinstance(old, (list, dict, set)):
                old.clear()
                old.extend(new) if isinstance(old, list) else old.update(new)
        return result

    def scale(self, op: str, ref: Ref, *args: object) -> object:
        """An operator between a program's object and a plain value: only for a result that is the program's own again."""
        result = self.ask(op, ref, *args) if op in SCALING else None
        return result if isinstance(result, Ref) else NotImplemented

    def serve(self, message: list) -> None:
        """Perform one request and answer it. The judge performs only calls of functions that the tests handed out."""
        _, op, args, named = message
        try:
            if self.callbacks_only and (op != "call" or args[0][0] != "yours"):
                raise TypeError("objects of the tests can only be called")
            args = [self.decode(arg) for arg in args]
            result = self.perform(op, *args, **{key: self.decode(arg) for key, arg in named.items()})
            # As with list.sort, only a call that returns None hands changed arguments back.
            changed = op == "call" and result is None and any(isinstance(arg, (list, dict, set)) for arg in args)
            encoded = self.encode(result)
            self.send("return", encoded, [self.encode(arg) for arg in args] if changed else None, self.printed())
        except BaseException as error:
            if isinstance(error, (EOFError, Expired)):
                raise
            text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
            name = type(error).__name__
            self.send("raise", text[:1000], [name, builtin_base(type(error)), program_line(error)], self.printed())

    def printed(self) -> str:
        """What the program has printed since the last answer."""
        return ""


DECODERS: dict[str, Callable] = {
    "int": lambda body: int(body, 16), "bytes": bytes.fromhex, "complex": lambda body: complex(*body),
    "str": lambda body: bytes.fromhex(body).decode("utf-8", "surrogatepass"), "range": lambda body: range(*body),
    "type": lambda body: getattr(builtins, PLAIN_TYPES[PLAIN_TYPES.index(body)]),
    "deque": lambda body: __import__("collections").deque(body),
    "Decimal": lambda body: __import__("decimal").Decimal(body), "Fraction": lambda body: __import__("fractions").Fraction(body),
    "date": lambda body: __import__("datetime").date.fromisoformat(body),
    "datetime": lambda body: __import__("datetime").datetime.fromisoformat(body)}


def builtin_base(kind: type) -> str:
    """Name of the nearest builtin class that an exception class derives from."""
    return next(base.__name__ for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base)


def program_line(error: BaseException, file: str = "program.py") -> int | None:
    """The newest line of `file` that the error passed through."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else line
        trace = trace.tb_next
    return line


def candidate(config: dict) -> None:
    """Role: execute the program when asked to, then perform what the tests ask of it."""
    solution = sys.modules["solution"] = types.ModuleType("solution")

    def perform(op: str, *args: object, **named: object) -> object:
        if op == "load":
            exec(compile(config["code"], "program.py", "exec", dont_inherit=True), solution.__dict__)
            return {name: solution.__dict__[name] for name in args if name in solution.__dict__}
        if op == "call":
            return args[0](*args[1:], **named)
        if op in ("enter", "exit"):
            return getattr(args[0], f"__{op}__")(*args[1:])
        return (getattr(builtins, op, None) or getattr(operator, op))(*args)

    def printed() -> str:
        text = output.getvalue()[:PRINTED_LIMIT].decode(errors="replace")
        output.seek(0)
        output.truncate()
        return text

    output = io.BytesIO()
    sys.stdout = io.TextIOWrapper(output, "utf-8", "replace", write_through=True)
    peer = Peer(config["wire"], perform, callbacks_only=False)
    peer.printed = printed
    while True:  # until the judge's end closes
        peer.serve(peer.receive())


