"""A provider's stand-in for the benchmark: `python upstream.py PORT`.

A request whose body says `"stream": true` gets server-sent events at the pace its `bench` key asks for
({"chunks": 100, "interval": 0.05}); each event carries the monotonic time of its sending, which another process on the
same machine can compare with its own. Any other request gets the fixed completion (that's for machines without nginx).
One thread and a selector: a thread for each of 500 streams would itself be what the rows measure.
"""

from __future__ import annotations

import heapq
import json
import random
import selectors
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench import wire  # noqa: E402

JSON_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(wire.COMPLETION)
) + wire.COMPLETION
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
EVENT = (
    b'data: {"id":"chatcmpl-Bench0123456789","object":"chat.completion.chunk","created":1760000000,"model":"gpt-bench",'
    b'"system_fingerprint":"fp_bench","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,'
    b'"finish_reason":null}],"bench":{"i":%d,"t":%d}}\n\n'
)
LAST = b"data: [DONE]\n\n"


class Connection:
    """What one caller said so far, what it still has to get, and the events its stream is still owed."""

    __slots__ = ("sock", "inbox", "outbox", "sent", "chunks", "interval")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbox = b""
        self.outbox = b""
        self.sent = self.chunks = 0
        self.interval = 0.0


class Upstream:
    def __init__(self, port: int) -> None:
        self.random = random.Random(1)
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.due: list[tuple[float, int, Connection]] = []
        self.ticket = 0  # connections can't be ordered, so no two entries of the heap may be equal before them

    def run(self) -> None:
        while True:
            wait = max(0.0, self.due[0][0] - time.monotonic()) if self.due else None
            for key, mask in self.selector.select(wait):
                connection = key.data
                if connection is None:
                    self.accept()
                elif mask & selectors.EVENT_READ:
                    self.read(connection)
                elif connection.outbox:
                    self.send(connection, b"")
            now = time.monotonic()
            while self.due and self.due[0][0] <= now:
                at, _, connection = heapq.heappop(self.due)
                self.tick(connection, at)

    def accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(sock, selectors.EVENT_READ, Connection(sock))

    def close(self, connection: Connection) -> None:
        if connection.sock.fileno() >= 0:
            self.selector.unregister(connection.sock)
            connection.sock.close()

    def read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close(connection)
            return
        connection.inbox += data
        head, blank, rest = connection.inbox.partition(b"\r\n\r\n")
        if not blank:
            return
        lower = head.lower()
        at = lower.find(b"\r\ncontent-length:")
        if at < 0 and b"\r\ntransfer-encoding: chunked" in lower:
            if not rest.endswith(b"0\r\n\r\n"):
                return
            body = rest
        else:
            length = int(lower[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(rest) < length:
                return
            body = rest
        connection.inbox = b""
        self.answer(connection, body)

    def answer(self, connection: Connection, body: bytes) -> None:
        if b'"stream": true' not in body:
            self.send(connection, JSON_ANSWER)
            return
        wish = json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])["bench"]
        connection.sent, connection.chunks, connection.interval = 0, wish["chunks"], wish["interval"]
        self.send(connection, STREAM_HEAD)
        # A random phase: callers don't start in step, and 500 events at one moment would measure a queue.
        self.plan(connection, time.monotonic() + self.random.random() * connection.interval)

    def plan(self, connection: Connection, at: float) -> None:
        self.ticket += 1
        heapq.heappush(self.due, (at, self.ticket, connection))

    def tick(self, connection: Connection, at: float) -> None:
        if connection.sock.fileno() < 0:
            return
        if connection.sent == connection.chunks:
            self.send(connection, b"%x\r\n%b\r\n0\r\n\r\n" % (len(LAST), LAST))
            return
        event = EVENT % (connection.sent, time.monotonic_ns())
        connection.sent += 1
        self.send(connection, b"%x\r\n%b\r\n" % (len(event), event))
        self.plan(connection, at + connection.interval)

    def send(self, connection: Connection, data: bytes) -> None:
        connection.outbox += data
        try:
            count = connection.sock.send(connection.outbox)
        except BlockingIOError:
            count = 0
        except OSError:
            self.close(connection)
            return
        connection.outbox = connection.outbox[count:]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outbox else 0)
        key = self.selector.get_key(connection.sock)
        if key.events != events:
            self.selector.modify(connection.sock, events, connection)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Upstream(int(sys.argv[1])).run()
