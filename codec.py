"""Values that cross the wire between a program and its tests: into parts that JSON can hold, and back into plain objects."""
from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator

PLAIN_TYPES = ("bool", "int", "float", "complex", "str", "bytes", "list", "tuple", "dict", "set", "frozenset", "range",
               "object", "type")
MODULES = ("builtins", "collections", "decimal", "fractions", "datetime", "array")  # of the types in CODECS
CONTAINERS = (list, dict, set)


def keys_and_values(value: dict) -> Iterator:
    for item in value.items():
        yield from item


def paired(*parts: object) -> Iterable[tuple]:
    return zip(parts[::2], parts[1::2], strict=True)


def lazy(module: str, name: str) -> Callable:
    """A class that is imported only when it is needed: what this file imports, every program waits for."""
    return lambda *args: getattr(__import__(module), name)(*args)


def text_of(module: str, name: str) -> tuple[Callable, Callable]:
    return (lambda value: (value.isoformat(),)), (lambda text: getattr(__import__(module), name).fromisoformat(text))


# By name of the type: into parts that can be encoded, and back.
CODECS: dict[str, tuple[Callable, Callable]] = {
    **{kind.__name__: (iter, lambda *parts, kind=kind: kind(parts)) for kind in (list, tuple, set, frozenset)},
    "dict": (keys_and_values, lambda *parts: dict(paired(*parts))),
    "int": (hex, lambda text: int(text, 16)),
    "str": (str, lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass")),
    "bytes": (lambda value: (value.hex(),), bytes.fromhex),
    "bytearray": (lambda value: (value.hex(),), bytearray.fromhex),
    "complex": (lambda value: (value.real, value.imag), complex),
    "range": (lambda value: (value.start, value.stop, value.step), range),
    "slice": (lambda value: (value.start, value.stop, value.step), slice),
    "dict_keys": (iter, lambda *parts: dict.fromkeys(parts).keys()),
    "dict_items": (lambda value: (dict(value),), lambda value: value.items()),
    "type": (str, lambda name: getattr(builtins, PLAIN_TYPES[PLAIN_TYPES.index(name)])),
    "Counter": (lambda value: (dict(value),), lazy("collections", "Counter")),
    "OrderedDict": (keys_and_values, lambda *parts: lazy("collections", "OrderedDict")(paired(*parts))),
    "defaultdict": (lambda value: (value.default_factory, dict(value)), lazy("collections", "defaultdict")),
    "deque": (lambda value: (list(value), value.maxlen), lazy("collections", "deque")),
    "Decimal": (lambda value: (str(value),), lazy("decimal", "Decimal")),
    "Fraction": (lambda value: (value.numerator, value.denominator), lazy("fractions", "Fraction")),
    "array": (lambda value: (value.typecode, value.tolist()), lazy("array", "array")),
    "ndarray": (iter, lambda items, kind: __import__("numpy").array(items, dtype=str(kind))),
    "timedelta": (lambda value: (value.days, value.seconds, value.microseconds), lazy("datetime", "timedelta")),
    "timezone": (lambda value: (value.utcoffset(None),), lazy("datetime", "timezone")),
    **{name: text_of("datetime", name) for name in ("date", "time", "datetime")}}

# What is compared by its content although a class derives from it: how to get at that, whatever the class overrides.
PLAIN: dict[type, Callable] = {
    int: int.__int__, float: float.__float__, str: str.__str__, dict: dict.copy,
    **{kind: lambda value, kind=kind: kind(kind.__iter__(value)) for kind in (list, tuple, set, frozenset)}}


def containers(values: Iterable) -> list:
    """The lists, dicts and sets in these values, in an order that only their shape decides."""
    found, todo = [], list(values)
    while todo:
        value = todo.pop()
        if type(value) in CONTAINERS:
            found.append(value)
        if type(value) in (list, tuple):
            todo.extend(value)
        elif type(value) is dict:
            todo.extend(value.values())
    return found


def class_names(kind: type[BaseException]) -> list[str]:
    """Names of an exception's class and of its bases, up to the first builtin one."""
    names = [base.__name__ for base in kind.__mro__]
    return names[:1 + next(i for i, base in enumerate(kind.__mro__) if getattr(builtins, base.__name__, None) is base)][:20]
