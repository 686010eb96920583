"""The caller: raw bytes to the broker, and answers out of raw bytes."""

import json
import re
import socket
import struct

from .common import Gone, Headers
from .leaks import REMEMBERED_BYTES


class Answer(Headers):
    """An answer of the broker."""

    def __init__(self, status, reason, headers, body):
        self.status = status
        self.reason = reason
        self.headers = headers  # (name, value) in order
        self.body = body

    def header(self, name):
        """The first value of this header, None where it is absent."""
        values = self.all(name)
        return values[0] if values else None

    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        """The broker's own error code, None on any other answer."""
        return self.header("X-Broker-Error")

    @property
    def message(self):
        """What the broker's own error tells a person."""
        return self.json()["error"]["message"]

    def __repr__(self):
        return f"<{self.status} {self.reason} {self.body[:300]!r}>"


class Caller:
    """A raw connection to the broker: a socket that can also read an answer.

    `settimeout`, `shutdown`, `fileno` and the like are the socket's own."""

    def __init__(self, broker, timeout=10):
        self.broker = broker
        self.sock = socket.create_connection(("127.0.0.1", broker.port), timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = bytearray()  # all that came
        self._used = 0  # how much of it was read as answers
        broker.callers.append(self)
        broker.seen.watch(self.received)

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, data):
        """Send all of it."""
        self.sock.sendall(data)

    def recv(self, count=65536):
        data = self.sock.recv(count)
        if len(self.received) < REMEMBERED_BYTES:
            self.received += data
        return data

    def close(self):
        self.sock.close()

    def half_close(self):
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self):
        """Close with a TCP reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def read_all(self):
        """All bytes not yet read, up to the close by the broker."""
        try:
            while self.recv():
                pass
        except ConnectionResetError:
            pass
        except socket.timeout:
            raise AssertionError(f"not closed; so far came {bytes(self.received[-2000:])!r}") from None
        rest = bytes(self.received[self._used :])
        self._used = len(self.received)
        return rest

    def read_until(self, end):
        """The bytes up to and with `end`."""
        while True:
            at = self.received.find(end, self._used)
            if at >= 0:
                return self._take(at + len(end) - self._used)
            self._more(f"waiting for {end!r}")

    def read_exactly(self, count):
        while len(self.received) - self._used < count:
            self._more(f"waiting for {count} bytes")
        return self._take(count)

    def read_head(self):
        """Status, reason and headers of the next answer, as an Answer with body None."""
        head = self.read_until(b"\r\n\r\n")
        lines = head[:-4].decode("latin-1").split("\r\n")
        start = re.fullmatch(r"HTTP/1\.[01] ([0-9]{3}) ([^\r\n]*)", lines[0])
        if not start:
            raise AssertionError(f"not a status line: {lines[0]!r}")
        headers = [tuple(part.strip() for part in line.split(":", 1)) for line in lines[1:]]
        return Answer(int(start.group(1)), start.group(2), headers, None)

    def read_chunk(self):
        """The data of the next chunk; b"" is the last one."""
        line = self.read_until(b"\r\n")
        if not re.fullmatch(rb"[0-9A-Fa-f]+\r\n", line):
            raise AssertionError(f"not a chunk size: {line!r}")
        data = self.read_exactly(int(line, 16))
        if self.read_exactly(2) != b"\r\n":
            raise AssertionError("a chunk without its end")
        return data

    def read_body(self, head, method="GET"):
        if method == "HEAD" or head.status < 200 or head.status in (204, 304):
            return b""
        if (head.header("Transfer-Encoding") or "").lower() == "chunked":
            parts = []
            while True:
                part = self.read_chunk()
                if not part:
                    break
                parts.append(part)
            body = b"".join(parts)
            # The wire shows it in pieces; the leak check wants it whole.
            self.broker.seen.add(body)
            return body
        if head.header("Content-Length") is not None:
            return self.read_exactly(int(head.header("Content-Length")))
        return self.read_all()

    def read_answer(self, method="GET"):
        """The next answer, whole; `method` is that of its request."""
        answer = self.read_head()
        answer.body = self.read_body(answer, method)
        return answer

    def read_answers(self):
        """All answers up to the close by the broker (to requests other than HEAD)."""
        if self.sock.fileno() >= 0:
            self.read_all()
        self._used, answers = 0, []
        while self._used < len(self.received):
            answers.append(self.read_answer())
        return answers

    def _take(self, count):
        data = bytes(self.received[self._used : self._used + count])
        self._used += count
        return data

    def _more(self, why):
        try:
            data = self.recv()
        except socket.timeout:
            raise AssertionError(f"nothing came, {why} after {bytes(self.received[-500:])!r}") from None
        if not data:
            raise Gone(f"closed, {why} after {bytes(self.received[-500:])!r}")
