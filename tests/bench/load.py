"""A closed-loop load: `python load.py PORT CALLERS REQUESTS SECONDS BODY_FILE`.

It stops at whichever comes first, the number or the time (0: no limit). Every answer is read to its
end and compared with the expected one. Prints one line of JSON.
The token comes by the environment, as BENCH_TOKEN.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench import wire  # noqa: E402


class Caller:
    """One caller: a kept connection, the answer it waits for, and when it asked."""

    __slots__ = ("sock", "answer", "body", "asked", "unsent")

    def __init__(self, port: int) -> None:
        self.sock = wire.connect(port)
        self.sock.setblocking(False)
        self.answer = wire.Answer()
        self.body = b""
        self.asked = 0.0
        self.unsent = memoryview(b"")


def main() -> None:
    port, callers, requests = (int(word) for word in sys.argv[1:4])
    seconds = float(sys.argv[4])
    request = wire.request(port, Path(sys.argv[5]).read_bytes(), os.environ["BENCH_TOKEN"])
    selector = selectors.DefaultSelector()
    requests = requests or 10**9
    begun = time.perf_counter()
    end = begun + (seconds or 600.0)
    times: list[float] = []
    asked = finished = errors = open_callers = 0

    def ask(caller: Caller) -> None:
        nonlocal asked
        asked += 1
        caller.answer, caller.body, caller.asked = wire.Answer(), b"", time.perf_counter()
        caller.unsent = memoryview(request)
        push(caller)

    def push(caller: Caller) -> None:
        try:
            caller.unsent = caller.unsent[caller.sock.send(caller.unsent) :]
        except BlockingIOError:
            pass
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if caller.unsent else 0)
        selector.modify(caller.sock, events, caller)

    def open_one() -> None:
        nonlocal open_callers
        caller = Caller(port)
        open_callers += 1
        selector.register(caller.sock, selectors.EVENT_READ, caller)
        ask(caller)

    for _ in range(min(callers, requests)):
        open_one()
    while open_callers:
        ready = selector.select(20.0)
        if not ready:  # nobody answers any more
            errors += open_callers
            break
        for key, mask in ready:
            caller = key.data
            if mask & selectors.EVENT_WRITE and caller.unsent:
                push(caller)
            if not mask & selectors.EVENT_READ:
                continue
            try:
                data = caller.sock.recv(65536)
                caller.body += caller.answer.feed(data)
                good = bool(data)
            except BlockingIOError:
                continue
            except (OSError, wire.WireError, ValueError):
                good = False
            if good and not caller.answer.done:
                continue
            now = time.perf_counter()
            finished += 1
            if good and caller.answer.status == 200 and caller.body == wire.COMPLETION:
                times.append((now - caller.asked) * 1000)
            else:
                errors += 1
            again = asked < requests and now < end
            if again and good and caller.answer.kept:
                ask(caller)
                continue
            selector.unregister(caller.sock)
            caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            caller.sock.close()
            open_callers -= 1
            if again and errors < 1000:
                open_one()
    took = time.perf_counter() - begun
    print(
        json.dumps(
            {
                "requests": finished,
                "per_second": finished / took,
                "errors": errors,
                "p50_ms": wire.percentile(times, 0.5),
                "p99_ms": wire.percentile(times, 0.99),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
