"""HTTP as the benchmark's programs speak it: one fixed request, and answers read in whatever pieces they arrive.

Written by hand because http.client costs ten times what is to be measured.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Sequence
from typing import Any

PATH = "/v1/chat/completions"
TOKEN_HEADER = "X-Broker-Token"

# What a model answers to a short question, with its usage: some 600 bytes.
COMPLETION = json.dumps(
    {
        "id": "chatcmpl-Bench0123456789",
        "object": "chat.completion",
        "created": 1760000000,
        "model": "gpt-bench",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "The function reads one line at a time, so the whole file is never in memory. "
                    "If two lines share a key, the later one wins; a line that can't be read is counted, not raised.",
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 211, "completion_tokens": 42, "total_tokens": 253},
    }
).encode()


def prompt(size: int, **more: Any) -> bytes:
    """A chat request of about `size` bytes: turns of some 4 kB, with line ends, quotes and letters like real ones."""
    sentence = 'def read(path):\n    """Yield each line."""\n    # Größe, naïve, 日本語: not all of it is ASCII\n'
    messages = [{"role": "system", "content": "You are a careful programmer. Answer in one paragraph."}]
    body = {"model": "gpt-bench", "messages": messages, **more}
    left = size - len(json.dumps(body, ensure_ascii=False).encode())
    while left > 48:
        characters = min(4000, max(1, left * 9 // 10 - 40))
        text = (sentence * (characters // len(sentence) + 1))[:characters]
        messages.append({"role": "user" if len(messages) % 2 else "assistant", "content": text})
        left -= len(json.dumps(messages[-1], ensure_ascii=False).encode()) + 2
    return json.dumps(body, ensure_ascii=False).encode()


def request(port: int, body: bytes, token: str) -> bytes:
    """The head an SDK sends (its 16 headers or so) and the body, ready for one sendall."""
    head = (
        f"POST {PATH} HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        "Accept: application/json\r\n"
        "Accept-Encoding: gzip, deflate\r\n"
        "User-Agent: OpenAI/Python 3.54.0\r\n"
        "X-Stainless-Lang: python\r\n"
        "X-Stainless-Package-Version: 3.54.0\r\n"
        "X-Stainless-OS: Linux\r\n"
        "X-Stainless-Arch: x64\r\n"
        "X-Stainless-Runtime: CPython\r\n"
        "X-Stainless-Runtime-Version: 3.13.0\r\n"
        "X-Stainless-Retry-Count: 0\r\n"
        "X-Stainless-Read-Timeout: 600\r\n"
        f"{TOKEN_HEADER}: {token}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "\r\n"
    )
    return head.encode() + body


class WireError(Exception):
    """The other side said something that is not an answer, or closed before its end."""


class Answer:
    """One answer, fed as it comes; `feed` returns the body bytes that this piece held."""

    __slots__ = ("status", "done", "chunked", "left", "raw", "in_body", "length", "kept")

    def __init__(self) -> None:
        self.status = 0
        self.done = False
        self.chunked = False
        self.kept = True  # whether the connection may be used again
        self.left = 0
        self.length = 0  # of the body, so far
        self.raw = b""
        self.in_body = False

    def feed(self, data: bytes) -> bytes:
        self.raw = self.raw + data if self.raw else data
        if not self.in_body:
            end = self.raw.find(b"\r\n\r\n")
            if end < 0:
                return b""
            self._head(self.raw[:end])
            self.raw = self.raw[end + 4 :]
        body = self._chunks() if self.chunked else self._counted()
        self.length += len(body)
        return body

    def _head(self, head: bytes) -> None:
        if not head.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")):
            raise WireError(repr(head[:60]))
        self.kept = head.startswith(b"HTTP/1.1 ")
        self.status = int(head[9:12])
        lower = head.lower()
        self.chunked = b"\r\ntransfer-encoding: chunked" in lower
        at = lower.find(b"\r\ncontent-length:")
        if at >= 0:
            end = lower.find(b"\r\n", at + 17)
            self.left = int(lower[at + 17 : end if end >= 0 else len(lower)])
        elif not self.chunked:
            raise WireError("an answer without a length: " + repr(head[:200]))
        self.in_body = True

    def _counted(self) -> bytes:
        body = self.raw
        self.left -= len(body)
        self.raw = b""
        if self.left < 0:
            raise WireError("more bytes than announced")
        self.done = self.left == 0
        return body

    def _chunks(self) -> bytes:
        pieces = []
        raw = self.raw
        at = 0
        while True:
            end = raw.find(b"\r\n", at)
            if end < 0:
                break
            size = int(raw[at:end], 16)
            if len(raw) < end + 2 + size + 2:
                break
            pieces.append(raw[end + 2 : end + 2 + size])
            at = end + 2 + size + 2
            if size == 0:
                self.done = True
                break
        self.raw = raw[at:]
        return b"".join(pieces)


def exchange(sock: socket.socket, wire: bytes) -> tuple[int, bytes]:
    """Send one request on a kept connection and wait for its answer: status and body."""
    sock.sendall(wire)
    answer = Answer()
    body = b""
    while not answer.done:
        data = sock.recv(65536)
        if not data:
            raise WireError("closed before the end of the answer")
        body += answer.feed(data)
    return answer.status, body


def connect(port: int, timeout: float = 20.0) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank; of no values 0."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
