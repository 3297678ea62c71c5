"""Memory of results: equal calls share one result, and equal calls at one time run once."""
from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def memoised(function: Callable, keep: Callable[[Any], bool], size: int = 4096) -> Callable:
    """`function` with an LRU of those results of which `keep` is true; exceptions are not kept."""
    signature, lock, cache = inspect.signature(function), threading.Lock(), OrderedDict()

    @functools.wraps(function)
    def wrapper(*args: Any, **named: Any) -> Any:
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        key = repr(bound.arguments)
        with lock:
            future = cache.get(key)
            owner = future is None
            if owner:
                future = cache[key] = Future()
            cache.move_to_end(key)
            while len(cache) > size:
                cache.popitem(last=False)
        if not owner:
            return future.result()
        kept = False
        try:
            result = function(*args, **named)
            kept = keep(result)
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with lock:
                if not kept and cache.get(key) is future:
                    del cache[key]
        return result

    return wrapper
