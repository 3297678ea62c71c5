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
from collections import namedtuple
from collections.abc import Callable

from codec import CODECS, MODULES, PLAIN, PLAIN_TYPES, class_names, containers

MESSAGE_LIMIT = 1 << 26
PRINTED_LIMIT = 1 << 20
FORWARDED = ("len", "iter", "next", "reversed", "bool", "str", "repr", "hash", "int", "float", "index", "round", "format",
             "getitem", "setitem", "delitem", "enter", "exit", "call")
AWAITED = ("anext", "aenter", "aexit")
BETWEEN_OWN = ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "abs",
               "and", "or", "xor")
SCALING = ("mul", "truediv", "floordiv", "mod", "pow")  # `vector * 3` too, but not `answer - expected`
SPECIAL = ("__name__", "__qualname__", "__doc__", "__annotations__", "__dict__")
BASES = {base.__name__ for base in PLAIN}
NOTHING = ("load", (), {}, ())  # a request as (op, args, named, outcome), before there was one


class Expired(BaseException):
    """The tests' time is up; no `except Exception` in a test may swallow it."""


class Closed(BaseException):
    """The other process has ended, or speaks nonsense."""


class Ref:
    """A proxy for an object on the other side. `_base`: the builtin type, if any, as whose value it can be compared.

    Only what cannot help a liar is forwarded: `==`, `<`, `-` .. are asked only between two of the program's own objects
    and `in` goes by iteration (but for objects of a class that the tests name), so a program's operators never see, and
    never answer for, a value of the tests. An object that derives from list, int .. is compared by its content, which comes
    here as a plain value.
    """
    __slots__ = ("_base", "_label", "_number", "_peer")  # no __dict__: that is the object's

    def __new__(cls, peer: Peer, number: int, label: str, base: str = "") -> Ref:
        if isinstance(peer, str):  # `class Dog(Animal)`, Animal being a proxy, calls its base's class: (name, bases, members)
            return number[0]._peer.subclass(peer, number[0], dict(label))
        self = object.__new__(cls)
        for name, value in (("_peer", peer), ("_number", number), ("_label", label), ("_base", base)):
            object.__setattr__(self, name, value)
        return self

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name not in SPECIAL:
            raise AttributeError(name)  # protocols like __array__ would let a program's object act for a value
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._peer.ask("setattr", self, name, value)

    def __contains__(self, item: object) -> bool:
        if self._number in self._peer.made:
            return bool(self._peer.ask("contains", self, item))
        return any(item is other or item == other for other in iter(self))

    def __instancecheck__(self, other: object) -> bool:
        return bool(self._peer.ask("isinstance", other, self))

    def __subclasscheck__(self, other: object) -> bool:
        return bool(self._peer.ask("issubclass", other, self))

    __class__ = property(lambda self: getattr(builtins, self._base) if self._base else Ref)


Ref.__doc__ = property(lambda self: self._peer.ask("getattr", self, "__doc__"))
for _op in FORWARDED:
    setattr(Ref, f"__{_op}__", lambda self, *args, _op=_op, **named: self._peer.ask(_op, self, *args, **named))
for _op in BETWEEN_OWN:
    setattr(Ref, f"__{_op}__", lambda self, *args, _op=_op: self._peer.operate(_op, self, *args))
    setattr(Ref, f"__r{_op}__", lambda self, other, _op=_op: self._peer.operate(_op, other, self))
for _op in AWAITED:
    async def _awaited(self: Ref, *args: object, _op: str = _op) -> object:
        return self._peer.ask(_op, self, *args)
    setattr(Ref, f"__{_op}__", _awaited)
Ref.__aiter__ = lambda self: self


class Peer:
    """One end of the wire; `perform(op, *args)` answers what the other end asks for."""
    def __init__(self, fd: int, perform: Callable, callbacks_only: bool) -> None:
        self.fd, self.perform, self.callbacks_only = fd, perform, callbacks_only
        self.objects, self.numbers, self.errors, self.refs, self.tuples = [], {}, {}, {}, {}
        self.known: dict[int, int] = {}  # while changed arguments are encoded: number by id of their containers
        self.lent: list = []  # those containers, while they are decoded on the side that they came from
        self.closed = False
        self.classes: set[int] = set()  # ids of proxies of the program's classes: names of the tests with a capital
        self.made: set[int] = set()  # numbers of the objects that the tests have made with these
        self.watch = False  # whether the tests look at arguments after a call with a result
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
                    self.closed = True
                    raise Closed("the program's process ended")
                size -= len(parts[-1])
            return b"".join(parts)
        if (size := int.from_bytes(exactly(4), "big")) > MESSAGE_LIMIT:
            self.closed = True
            raise Closed("the program broke the protocol")
        return json.loads(exactly(size))

    def encode(self, value: object) -> object:
        """Plain values as themselves or [tag, parts]; anything else stays here and goes as a reference."""
        kind, name = type(value), type(value).__name__
        if value is None or kind in (bool, float):
            return value
        if kind is int:
            return value if abs(value) < 1 << 63 else ["int", [hex(value)]]  # decimal text of big ones is limited, and slow
        if kind is str:  # JSON would join two lone surrogates into one character
            lone = not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)
            return ["str", [value.encode("utf-8", "surrogatepass").hex()]] if lone else value
        if issubclass(kind, Ref):
            return ["yours", [value._number]]
        if kind.__module__ in MODULES and name in CODECS and kind is not type:
            encoded = [name, [self.encode(part) for part in CODECS[name][0](value)]]
            return ["same", [self.known[id(value)], encoded]] if id(value) in self.known else encoded
        if isinstance(value, tuple) and (shape := self.tuple_shape(kind)):
            return ["namedtuple", [*shape, *map(self.encode, tuple.__iter__(value))]]
        if base := next((base for base in PLAIN if issubclass(kind, base)), None):
            return self.reference(value, base.__name__) if kind.__module__ == "solution" else self.encode(PLAIN[base](value))
        if kind.__module__ == "numpy":
            array = name == "ndarray" and value.dtype.kind in "biufc"
            return ["ndarray", [self.encode(value.tolist()), value.dtype.str]] if array else self.encode(value.tolist())
        if isinstance(value, type) and value.__name__ in PLAIN_TYPES and value.__module__ == "builtins":
            return ["type", [value.__name__]]
        if isinstance(value, type) and issubclass(value, Exception):
            return ["exception", class_names(value)]
        if self.callbacks_only and getattr(value, "__self__", None) is builtins:
            return ["builtin", [value.__name__]]  # a test that hands out `eval` does not mean the judge's
        return self.reference(value, "coroutine" if kind is types.CoroutineType else "")

    def reference(self, value: object, base: str) -> list:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)  # kept alive, so that its id stays its own
        label = getattr(value, "__name__", None)
        return ["ref", [self.numbers[id(value)], label if isinstance(label, str) else type(value).__name__, base]]

    def tuple_shape(self, kind: type) -> tuple[str, str] | None:
        """(name, fields) of a namedtuple's class that adds nothing but them, None of any other."""
        fields = getattr(kind, "_fields", None)
        if not isinstance(fields, tuple) or {name for name in dir(kind) if name[0] != "_"} != {*fields, "count", "index"}:
            return None
        shape = (kind.__name__, " ".join(fields))
        self.tuples.setdefault(shape, kind)
        return shape

    def decode(self, data: object) -> object:
        """The inverse of `encode`; anything malformed is an error in the caller, that is, a failed test."""
        if not isinstance(data, list):
            return data
        tag, body = data
        if tag == "ref":
            number, label, base = int(body[0]), str(body[1])[:100], body[2]
            ref = self.refs.setdefault(number, Ref(self, number, label, base if base in BASES else ""))
            return self.awaitable(ref) if base == "coroutine" else ref  # `is` holds here if there
        if tag == "yours":
            return self.objects[body[0]]
        if tag == "same":
            old, new = self.lent[body[0]], self.decode(body[1])
            if type(old) is not type(new):
                raise TypeError("a changed argument is of another type")
            old.clear()
            old.extend(new) if isinstance(old, list) else old.update(new)
            return old
        if tag == "namedtuple":
            name, fields, *items = body
            kind = self.tuples.get((name, fields)) or self.tuples.setdefault((name, fields), namedtuple(name, fields))
            return kind._make(map(self.decode, items))
        if tag == "exception":
            return self.error_class(body)
        if tag == "builtin" and not self.callbacks_only:
            return getattr(builtins, body[0])
        return CODECS[tag][1](*map(self.decode, body))

    def awaitable(self, ref: Ref) -> types.CoroutineType:
        """A coroutine of ours that has the other side run its own to the end."""
        async def wait() -> object:
            return self.ask("await", ref)
        return wait()

    def subclass(self, name: str, base: Ref, members: dict) -> object:
        """A class over there that derives from one over there; its methods are ours, called back with a proxy as self."""
        cell = members.pop("__classcell__", None)
        passed = {key: value for key, value in members.items() if key not in ("__module__", "__qualname__", "__annotations__")}
        kind = self.ask("subclass", base, name, passed)
        if cell:
            cell.cell_contents = kind  # the class that super() looks for
        return kind

    def error_class(self, names: list[str]) -> type[BaseException]:
        """The class for an exception of the other side; ends of loops become plain errors. names: as in class_names."""
        kind = getattr(builtins, names[-1], None)
        if not (isinstance(kind, type) and issubclass(kind, (Exception, SystemExit))) or kind.__name__.startswith("Stop"):
            names, kind = [*names, ""], RuntimeError
        for name in map(str, names[-2::-1]):
            members = {"__str__": lambda self: self.__dict__.get("_text", BaseException.__str__(self))}
            kind = self.errors.setdefault(name, type(name, (kind,), members))
        return kind

    def ask(self, op: str, *args: object, **named: object) -> object:
        """Have `op` performed on the other side; meanwhile serve its callbacks."""
        self.last = (op, args, named, "did not return")
        lent = containers((*args, *named.values())) if op == "call" else []
        encoded = [self.encode(arg) for arg in args], {key: self.encode(arg) for key, arg in named.items()}
        self.send("do", op, *encoded, self.watch, self.printed())
        while (message := self.receive())[0] == "do":
            self.serve(message)
        kind, body, changed, printed = message
        sys.stdout.write(str(printed))  # where the tests have redirected it to
        if kind == "raise":
            names, arguments, attributes, line = changed
            name = str(names[0])
            self.last = (op, args, named, f"raised {name}: {body}" + (f" (line {line} of the program)" if line else ""))
            kind = {("next", "StopIteration"): StopIteration, ("anext", "StopAsyncIteration"): StopAsyncIteration}.get(
                (op, name)) or self.error_class(names)
            raise self.error(kind, str(body), self.decode(arguments), self.decode(attributes))
        if self.callbacks_only and not self.watch and body is not None:
            lent, changed = [], None  # whatever the program says
        self.lent = lent
        self.decode(changed)
        result = self.decode(body)
        if op == "call" and id(args[0]) in self.classes and isinstance(result, Ref):
            self.made.add(result._number)
        self.last = (op, args, named, (result,))
        return result

    @staticmethod
    def error(kind: type[BaseException], text: str, arguments: tuple, attributes: dict) -> BaseException:
        try:
            error = kind(*arguments)
        except TypeError:  # one that wants other arguments than it keeps
            error = kind.__new__(kind)
            error.args = arguments
        error.__dict__ |= {name: value for name, value in attributes.items() if not hasattr(kind, name)} | {"_text": text}
        return error

    def operate(self, op: str, *args: object) -> object:
        """An operator: among the program's objects theirs, of the content of its lists, numbers .. Python's own; between
        an object and a plain value only for a result that is the program's own again."""
        operation = getattr(operator, op, None) or getattr(operator, op + "_")
        if all(isinstance(arg, Ref) for arg in args):
            return self.ask(op, *args)
        if any(isinstance(arg, Ref) and not arg._base for arg in args):
            result = self.ask(op, *args) if op in SCALING else None
            return result if isinstance(result, Ref) else NotImplemented
        return operation(*(self.ask("plain", arg) if isinstance(arg, Ref) else arg for arg in args))

    def serve(self, message: list) -> None:
        """Perform one request and answer it. The judge performs only what its `perform` allows on what the tests handed out."""
        _, op, raw, raw_named, watched, printed = message
        sys.stdout.write(str(printed))
        try:
            if self.callbacks_only and op not in ("input", "read", "readline") and not (
                    raw and isinstance(raw[0], list) and raw[0][0] == "yours"):
                raise TypeError("only objects of the tests can be asked")
            args, named = [self.decode(arg) for arg in raw], {key: self.decode(arg) for key, arg in raw_named.items()}
            lent = containers((*args, *named.values())) if op == "call" else []
            result = self.perform(op, *args, **named)
            changed = None
            # As with list.sort, a call that returns None hands changed arguments back; others only where tests look at them.
            if lent and (result is None or watched):
                after = [*map(self.encode, args), *map(self.encode, named.values())]
                if watched or after != [*raw, *raw_named.values()]:
                    self.known = {id(container): number for number, container in enumerate(lent)}
                    changed = ["tuple", [self.encode(arg) for arg in (*args, *named.values())]]
            encoded = self.encode(result)
            self.known = {}
            self.send("return", encoded, changed, self.printed())
        except BaseException as error:
            self.known = {}
            if isinstance(error, (Closed, Expired)):
                raise
            self.send("raise", *self.describe(error), self.printed())

    def describe(self, error: BaseException) -> tuple[str, list]:
        """(text, [names of the class and its bases, arguments, attributes, line of the program])."""
        try:
            text = str(error)[:1000]
            attributes = {key: value for key, value in vars(error).items() if key[0] != "_"}
            parts = [self.encode(error.args), self.encode(attributes)]
            if len(json.dumps(parts)) > 1 << 20:
                raise ValueError("too much to pass on")
        except Exception:  # it cannot even be shown
            text = type(error).__name__
            parts = [["tuple", [text]], ["dict", []]]
        return text, [class_names(type(error)), *parts, program_line(error)]

    def printed(self) -> str:
        """What the program has printed since the last answer."""
        return ""


def program_line(error: BaseException, file: str = "program.py") -> int | None:
    """The newest line of `file` that the error passed through."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else line
        trace = trace.tb_next
    return line


def apply(op: str, thing: object, *args: object, **named: object) -> object:
    """Do what `op` names, among FORWARDED, BETWEEN_OWN, getattr, setattr, isinstance and issubclass."""
    if op == "call":
        return thing(*args, **named)
    if op in ("enter", "exit"):
        return getattr(thing, f"__{op}__")(*args)
    return (getattr(operator, op, None) or getattr(builtins, op, None) or getattr(operator, op + "_"))(thing, *args)


class Input(io.TextIOBase):
    """The program's stdin: what the tests have put into theirs."""
    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def read(self, size: int = -1) -> str:
        return self.peer.ask("read", size)

    def readline(self, size: int = -1) -> str:
        return self.peer.ask("readline", size)


def candidate(config: dict) -> None:
    """Role: execute the program when asked to, then perform what the tests ask of it."""
    solution = sys.modules["solution"] = types.ModuleType("solution")

    def run(awaitable: object) -> object:
        import asyncio
        loop = loops[0] if loops else loops.append(asyncio.new_event_loop()) or loops[0]
        return loop.run_until_complete(awaitable)

    def method(value: object) -> object:
        return (lambda self, *args, **named: value(self, *args, **named)) if isinstance(value, Ref) else value

    def perform(op: str, *args: object, **named: object) -> object:
        if op == "load":
            exec(compile(config["code"], "program.py", "exec", dont_inherit=True), solution.__dict__)
        if op in ("load", "names"):
            return {name: solution.__dict__[name] for name in args if name in solution.__dict__}
        if op == "plain":
            return next(plain(args[0]) for base, plain in PLAIN.items() if isinstance(args[0], base))
        if op == "subclass":
            base, name, members = args
            return types.new_class(name, (base,), {}, lambda space: space.update(
                {key: method(value) for key, value in members.items()}))
        if op == "super":
            return getattr(super(*args[:2]), args[2])
        if op == "await":
            return run(args[0])
        if op in AWAITED:
            return run(getattr(args[0], f"__{op}__")(*args[1:]))
        return apply(op, *args, **named)

    def printed() -> str:
        text = output.getvalue()[:PRINTED_LIMIT].decode(errors="replace")
        output.seek(0)
        output.truncate()
        return text

    output, loops = io.BytesIO(), []
    sys.stdout = io.TextIOWrapper(output, "utf-8", "replace", write_through=True)
    peer = Peer(config["wire"], perform, callbacks_only=False)
    peer.printed = printed
    sys.stdin = Input(peer)
    builtins.input = lambda prompt="": peer.ask("input", prompt)
    while True:  # until the judge's end closes
        peer.serve(peer.receive())
