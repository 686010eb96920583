"""Runs broker.py with a stop-watch around each of its functions: `python profiled_broker.py BROKER RESULT ARGUMENT...`.

RESULT.start, once it exists, sets the watches to zero; RESULT.stop has RESULT written. Processor time of the thread is
what counts, so that waiting for a socket is nobody's cost. cProfile would see one thread only, and charges small
functions most of all; a watch costs about one microsecond a call, which stands in the caller's row.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FunctionType
from typing import Any, Callable

EVERY_THREAD: list[dict[str, list[int]]] = []
LOCAL = threading.local()


def watches() -> tuple[list[int], dict[str, list[int]]]:
    """This thread's stack of what its callees took, and its rows: calls, own time, time with callees."""
    try:
        return LOCAL.stack, LOCAL.rows
    except AttributeError:
        LOCAL.stack, LOCAL.rows = [], {}
        EVERY_THREAD.append(LOCAL.rows)
        return LOCAL.stack, LOCAL.rows


def note(name: str, stack: list[int], rows: dict[str, list[int]], begun: int, calls: int) -> None:
    spent = time.thread_time_ns() - begun
    callees = stack.pop()
    if stack:
        stack[-1] += spent
    row = rows.setdefault(name, [0, 0, 0])
    row[0] += calls
    row[1] += spent - callees
    row[2] += spent


class Steps:
    """A generator or coroutine whose every step is timed: what passes between two steps is nobody's time."""

    def __init__(self, steps: Any, name: str) -> None:
        self.steps, self.name, self.calls = steps, name, 1

    def __iter__(self) -> Steps:
        return self

    __await__ = __iter__

    def __next__(self) -> Any:
        return self.step(self.steps.send, None)

    def send(self, value: Any) -> Any:
        return self.step(self.steps.send, value)

    def throw(self, *error: Any) -> Any:
        return self.step(self.steps.throw, *error)

    def close(self) -> None:
        self.steps.close()

    def step(self, go: Callable[..., Any], *values: Any) -> Any:
        stack, rows = watches()
        begun = time.thread_time_ns()
        stack.append(0)
        try:
            return go(*values)
        finally:
            note(self.name, stack, rows, begun, self.calls)
            self.calls = 0


def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(function):
        return function
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        def in_steps(*args: Any, **keywords: Any) -> Any:
            return Steps(function(*args, **keywords), name)

        return in_steps

    @functools.wraps(function)
    def whole(*args: Any, **keywords: Any) -> Any:
        stack, rows = watches()
        begun = time.thread_time_ns()
        stack.append(0)
        try:
            return function(*args, **keywords)
        finally:
            note(name, stack, rows, begun, 1)

    return whole


def watch_class(cls: type) -> None:
    for name, value in list(vars(cls).items()):
        if name.startswith("__") and name not in ("__init__", "__call__", "__enter__", "__exit__"):
            continue
        if isinstance(value, FunctionType):
            setattr(cls, name, watched(value, value.__qualname__))
        elif isinstance(value, (staticmethod, classmethod)) and isinstance(value.__func__, FunctionType):
            inner = value.__func__
            setattr(cls, name, type(value)(watched(inner, inner.__qualname__)))
        elif isinstance(value, property) and isinstance(value.fget, FunctionType):
            setattr(cls, name, property(watched(value.fget, value.fget.__qualname__), value.fset, value.fdel))


def watch_module(module: Any) -> None:
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, FunctionType):
            setattr(module, name, watched(value, value.__qualname__))
        elif isinstance(value, type):
            watch_class(value)


def watch_library() -> None:
    """The calls out of broker.py that cost the most, so that they stand under their own names."""
    for name in ("recv", "recv_into", "send", "sendall", "sendmsg", "accept", "connect", "setsockopt", "settimeout"):
        setattr(socket.socket, name, watched(getattr(socket.socket, name), "(socket) " + name))
    for owner, name in ((json, "loads"), (json, "dumps"), (os, "write"), (os, "writev"), (os, "fstat"), (os, "stat")):
        if hasattr(owner, name):
            setattr(owner, name, watched(getattr(owner, name), f"({owner.__name__}) {name}"))
    json.JSONDecoder.decode = watched(json.JSONDecoder.decode, "(json) decode")


def attend(result: Path) -> None:
    start, stop = Path(f"{result}.start"), Path(f"{result}.stop")
    while not stop.exists():
        if start.exists():
            for rows in EVERY_THREAD:
                for row in list(rows.values()):
                    row[:] = [0, 0, 0]
            start.unlink()
        time.sleep(0.02)
    total: dict[str, list[int]] = {}
    for rows in EVERY_THREAD:
        for name, row in list(rows.items()):
            total[name] = [a + b for a, b in zip(total.get(name, [0, 0, 0]), row)]
    found = [
        {"name": name, "calls": calls, "self_us": own / 1000, "total_us": whole / 1000}
        for name, (calls, own, whole) in total.items()
        if calls
    ]
    found.sort(key=lambda row: -float(row["self_us"]))  # type: ignore[arg-type]
    result.write_text(json.dumps(found))
    stop.unlink()


def main() -> None:
    file, result = Path(sys.argv[1]), Path(sys.argv[2])
    watch_library()
    spec = importlib.util.spec_from_file_location("broker", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["broker"] = module
    spec.loader.exec_module(module)
    watch_module(module)
    threading.Thread(target=attend, args=(result,), daemon=True).start()
    sys.exit(module.main(sys.argv[3:]))


if __name__ == "__main__":
    main()
