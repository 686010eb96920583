#!/usr/bin/env python3
"""broker.py: a localhost credential broker. It holds the key, so read it before you trust it.

An agent that holds a provider's key can leak it. The broker holds the key instead and offers, on 127.0.0.1 only,
an HTTP endpoint that lets listed paths through and attaches the key itself:

    python broker.py --config broker_config.example.json --dry-run      # no key, no network
    python broker.py --config my_config.json -- your-agent              # the agent never sees the key

THE MAP. A request's way, in the order of `Connection.handle`:

     1  read_head, RequestHead         the bytes are one unambiguous HTTP request       400 408 431
     2  check_host                     it was sent to us by name (DNS rebinding)        403
     3  check_not_a_web_page           no browser made it                               403
     4  HEALTH_PATHS                   /healthz and / say {"ok": true} to anybody
     5  identify_caller                it shows the caller token                        401
     6  Allowlist.match, check_query   method, path and query are allowed               403 405 426
     7  check_body_head, check_json    size, type, strict JSON, no secret in it         413 415 400 403
     8  Exchange.log_request           the event log takes it, or it goes no further    503
     9  dry_run_answer                 in dry-run a canned answer, and that is all
    10  SecretCache.get                the secret, from memory or its source            503
    11  outbound_head                  strip what the caller brought, attach ours
    12  relay                          the answer, as it arrives, the secret redacted   502 504
    13  Exchange.finish                the event log takes the outcome

The secret's own path is short: SECRET_SOURCES -> Secret -> outbound_head and Redactor.
What it does not protect from: hostile code that runs as your own user (it can replace this file), and a caller that
uses the listed paths for something you would not want. README.md says more.
"""
from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Attack: a planted ssl.py or json.py beside this file. Python puts a script's folder first on sys.path (`-P`
    # exists only since 3.11); nothing of ours is ever imported from there.
    sys.path[:] = [entry for entry in sys.path
                   if os.path.realpath(entry or os.curdir) != os.path.dirname(os.path.realpath(__file__))]

import base64
import collections
import errno
import functools
import hashlib
import heapq
import hmac
import html
import http.server
import itertools
import json
import re
import select
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import struct
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import subprocess
    Popen = subprocess.Popen[bytes]

__version__ = "1.0.0"

# ----------------------------------------------------------------------------------------------------------------------
# 1. Vocabulary: limits, refusals and header tables. Seconds and bytes unless a name says otherwise.
#
# To add a refusal: one row in ERRORS, a check_... that raises it, and its line in the map.

KIB, MIB = 1024, 1024 * 1024
HEAD_LIMIT, HEADER_COUNT_LIMIT = 32 * KIB, 100      # Node allows 16 KiB; Apache and CPython 100 headers
REMEMBERED_HEAD_LIMIT, REMEMBERED_HEADER_COUNT = 3 * KIB, 40
HEAD_SECONDS = 10                       # from a head's first byte to its last
BODY_SILENCE_SECONDS = 30
IDLE_SECONDS = 60                       # a caller's connection with nothing said, and a kept upstream one
PATH_LIMIT, QUERY_LIMIT, PARAMETER_LIMIT = 1024, 4096, 100
BUFFERED_LIMIT = 256 * MIB              # all request bodies together
JSON_INLINE_LIMIT = 3 * MIB             # a longer body is parsed in a thread, so that streams go on
READ_AHEAD_LIMIT = 64 * KIB             # what a caller may pipeline behind a request in flight
DRAIN_STRANGER = 1, 64 * KIB            # how long and how much of a refused body is read and dropped
DRAIN_CALLER_SECONDS = 10
UPSTREAM_HEAD_LIMIT, INTERIM_LIMIT = 256 * KIB, 8
UPSTREAM_CONNECT_SECONDS, UPSTREAM_IDLE_CONNECTIONS = 10, 64
RECEIVE_BYTES = 256 * KIB
USAGE_LIMIT = MIB                       # the longest JSON text in which `usage` is looked for
GRACE_SECONDS = 30
LINGER_SECONDS = 0.00005                # looked for the next event before sleeping: to be woken takes 60 us more
FAILURE_SECONDS, RENEWAL_SECONDS = 5, 60    # a failed secret is not asked for again; a rejected one resolved anew
LOGGED_STRING_LIMIT, DENIALS_A_MINUTE = 256, 20

# `!`: asking again can't help. It becomes `x-should-retry: false`, which the OpenAI and Anthropic SDKs and Claude Code
# obey; without it some of them ask for a minute.
ERRORS = {code.rstrip("!"): (status, code.endswith("!")) for status, codes in {
    400: "bad_request! invalid_json!",
    401: "client_token_required!",
    403: "browser_not_allowed! host_not_allowed! path_not_allowed! query_not_allowed! secret_in_request!",
    405: "method_not_allowed!",
    408: "request_timeout",
    413: "request_too_large!",
    415: "content_encoding_not_supported! content_type_not_supported!",
    426: "upgrade_not_supported!",
    431: "headers_too_large!",
    500: "internal_error",
    502: "upstream_protocol_error upstream_redirect! upstream_rejected_secret! upstream_tls_error! upstream_unreachable",
    503: "event_log_unavailable! secret_unavailable! too_many_requests_in_flight",
    504: "upstream_timeout",
}.items() for code in codes.split()}

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"     # RFC 9110 section 5.6.2
SEGMENT = r"[A-Za-z0-9._~:@+,=\-]+"
# Header names, lower case, `_` read as `-` (WSGI and CGI servers can't tell the two apart). RFC 9110 section 7.6.1
# lists the hop-by-hop ones.
HOP_BY_HOP = "connection|keep-alive|te|trailers?|transfer-encoding|upgrade|proxy.*"
# Attack: a prompt-injected agent brings its own credential, names another method or path, or bills another
# organization. The caller brings no authority of its own.
REQUEST_DROPPED = re.compile(
    HOP_BY_HOP + r"|(?:.*-)?authorization|.*api-?key|x-functions-key|x-access-key|.*-secret|.*-token"
    r"|.*-subscription-key|cookie.*|x-http-method.*|.*method-override|x-original-.*|x-rewrite-.*|x-forwarded-.*"
    r"|forwarded|via|x-real-ip|host|origin|referer|expect|http2-settings|accept-encoding|content-length"
    r"|openai-organization|openai-project|x-goog-user-project")
# What would give a web page or another origin a hold on the broker's answers, or name the account.
ANSWER_DROPPED = re.compile(
    HOP_BY_HOP + r"|set-cookie.*|access-control-.*|www-authenticate|alt-svc|strict-transport-security"
    r"|clear-site-data|refresh|link|report-to|nel|server|via|x-broker-.*|openai-organization|openai-project"
    r"|anthropic-organization-id|content-length|x-content-type-options|cross-origin-resource-policy"
    r"|content-security-policy")
ANSWER_FIXED = ("X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\n"
                "Content-Security-Policy: default-src 'none'; sandbox\r\n")
TOKEN_HEADERS = ("x-broker-token", "authorization", "x-api-key", "api-key", "x-goog-api-key")
NONE: frozenset[str] = frozenset()
HEALTH_PATHS = ("/healthz", "/")
JSON_TYPE = "application/json"


def is_dropped(name: str, table: re.Pattern[str], own: frozenset[str]) -> bool:
    """Whether a header is in one of the two tables, or in `own`."""
    plain = name.lower().replace("_", "-")
    # A framing header in another spelling is read as the real one by some servers.
    disguised = "_" in name and plain in ("content-type", "content-encoding", "transfer-encoding")
    return disguised or plain in own or (in_table if len(name) < 64 else in_table.__wrapped__)(plain, table)


@functools.lru_cache(maxsize=512)
def in_table(plain: str, table: re.Pattern[str]) -> bool:
    """Remembered, since few names come, often. Attack: long ones, of which hundreds would be kept."""
    return table.fullmatch(plain) is not None


# ----------------------------------------------------------------------------------------------------------------------
# 2. Errors. Raised by checks, turned into an answer or an exit in one place each.
#
#   ConfigError          exit 2: wrong usage, wrong configuration, a bad token
#   OperationalError     exit 1: port taken, secret not resolvable, log not writable
#   SecretUnavailable    503, or exit 1 at start; the text is for the operator
#   RequestError         answered with its code; but once an answer's head has gone out, the caller is cut off
#   ClientDisconnected   nobody is there to answer


class ConfigError(Exception):
    """The text names the file and the key, what is wrong, and the mend, on one line."""


class OperationalError(Exception):
    """Something around the broker fails; the text names it and the mend."""


class SecretUnavailable(Exception):
    """The secret can't be resolved; the text holds nothing token-like."""


class ClientDisconnected(Exception):
    """The caller has left, or its connection has to end."""


class RequestError(Exception):
    """A refusal. `message` goes to the caller, and may be all that its user sees; so it names the mend."""

    def __init__(self, code: str, message: str, headers: str = "") -> None:
        super().__init__(code)
        self.code, self.message, self.headers = code, message, headers
        self.status, self.final = ERRORS[code]


def printable(text: str) -> str:
    """The one way out for text: on one line, printable characters only, secrets and tokens redacted."""
    return "".join(c if c.isprintable() else "?" for c in OUTPUT_REDACTOR.text(text))


def say(text: str) -> None:
    """Writes one line to stderr; no error if nobody can read it any more."""
    try:
        if sys.stderr is not None:      # print(file=None) would go to stdout
            print(printable(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def report_bug(bug: BaseException) -> None:
    """One line for the operator: type and place, not the text, which may hold what a caller sent."""
    trace = bug.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}" if trace is not None else "an unknown place"
    say(f"broker: internal error: {type(bug).__name__} in {place}: please report it")


# ----------------------------------------------------------------------------------------------------------------------
# 3. Redaction: pure functions of bytes, one mechanism for answers, the event log and stderr.
#
# The search is bytes.find, form by form: it runs in C and skips. One alternation of all forms as a regular expression
# took 1,600 us for 400 kB; find took 230 us for 11 forms.

REDACTED = b"[redacted]"


def body_forms(secret: bytes) -> set[bytes]:
    """The secret as it stands in JSON: raw, escaped as Python does, and as PHP does (`\\/`)."""
    escaped = secret.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return {secret, escaped, escaped.replace(b"/", b"\\/")}


def secret_forms(secret: bytes) -> set[bytes]:
    """Every form in which an upstream, or a program that logs, might show a secret.

    JSON, HTML, percent-encoding (all bytes, or what the usual encoders call unsafe), hex, and base64 at the three
    alignments: of each the inner characters, which depend on no neighbour. So b"s3cr3t" is looked for as `s3cr3t`,
    `733363723374` (hex), `%73%33%63%72%33%74`, and `czNjcjN0`, `MzY3Izd`, `zM2NyM3` (base64).
    """
    text = secret.decode("latin-1")
    forms = body_forms(secret) | {html.escape(text, quote).encode("latin-1") for quote in (True, False)}
    percent = [urllib.parse.quote(secret, safe=safe) for safe in ("", "/", "!'()*", ";,/?:@&=+$!'()*#")]
    for form in (*percent, "".join(f"%{byte:02X}" for byte in secret)):
        forms |= {form.encode(), re.sub("%..", lambda match: match[0].lower(), form).encode()}
    forms |= {secret.hex().encode(), secret.hex().upper().encode()}
    for alignment, shared in enumerate((0, 2, 3)):
        whole = base64.b64encode(b"\0" * alignment + secret).rstrip(b"=")
        inner = whole[shared:-1] if (alignment + len(secret)) % 3 else whole[shared:]
        forms |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return forms


def find_any(forms: Iterable[bytes], data: bytes | bytearray) -> bool:
    for form in forms:
        if data.find(form) >= 0:        # 0.1 us for 600 bytes, where `in` takes 0.26 to find out that it is bytes
            return True
    return False


class Redactor:
    """Replaces every form of the given secrets by `[redacted]`."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self.secrets = tuple(secrets)
        encoded = [secret.encode("utf-8", "surrogateescape") for secret in self.secrets]
        self.forms = sorted(set().union(*map(secret_forms, encoded)), key=len, reverse=True)
        self.body_forms = set().union(*map(body_forms, encoded))
        self.longest = max(map(len, self.forms), default=0)
        self.pattern = re.compile(b"|".join(map(re.escape, self.forms)))
        self.inner = frozenset(byte for form in self.forms for byte in form[:-1])
        self.openings = frozenset(form[:size] for form in self.forms for size in (1, 2, 3))

    def also(self, secret: Secret | None) -> Redactor:
        """One that knows this secret too: that of a request in flight may have been rotated away long ago."""
        if secret is None or secret.reveal() in self.secrets:
            return self
        return Redactor((*self.secrets, secret.reveal()))

    def has(self, data: bytes) -> bool:
        """Whether any form is in the data."""
        return find_any(self.forms, data)

    def clean(self, data: bytes) -> bytes:
        """The data with every whole form replaced."""
        # The pattern is faster for what is short: 0.7 us for 150 bytes, where find takes 1.5.
        return self.pattern.sub(REDACTED, data) if self.forms and (len(data) < 600 or self.has(data)) else data

    def text(self, text: str) -> str:
        return self.clean(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass") if self.forms else text

    def open_tail(self, data: bytes) -> int:
        """How many bytes at the end might be the beginning of a form: all that may be held back."""
        if not data or data[-1] not in self.inner:
            return 0
        tail = data[max(0, len(data) - self.longest + 1):]
        starts = [len(tail) - size for size in (1, 2, 3) if size <= len(tail) and tail[-size:] in self.openings]
        for form in self.forms:
            at = tail.find(form[:4])
            while at >= 0 and not form.startswith(tail[at:]):
                at = tail.find(form[:4], at + 1)
            if at >= 0:
                starts.append(at)
        return len(tail) - min(starts, default=len(tail))


class RedactedStream:
    """A redactor for data that comes in pieces: a secret split across them is found all the same."""

    def __init__(self, redactor: Redactor) -> None:
        self.redactor, self.held = redactor, b""

    def feed(self, data: bytes, last: bool) -> bytes:
        """The next piece in, what may go out now."""
        data = self.redactor.clean(self.held + data)
        keep = 0 if last else self.redactor.open_tail(data)
        self.held = data[len(data) - keep:]
        return data[:len(data) - keep] if keep else data


OUTPUT_REDACTOR = Redactor()            # of everything that must not come out on stderr, stdout or in the event log


def guard_output(*values: str) -> None:
    """From now on none of these values comes out there; a word too short for a key is no secret, but would be everywhere."""
    global OUTPUT_REDACTOR
    values = tuple(value for value in values if len(value) >= 12)
    older = [value for value in OUTPUT_REDACTOR.secrets if value not in values]
    OUTPUT_REDACTOR = Redactor((*older, *dict.fromkeys(values))[-32:])
    shown.cache_clear()


# ----------------------------------------------------------------------------------------------------------------------
# 4. HTTP messages: bytes in, values out (RFC 9112), strict, one parser for requests and answers.
#
# Why not http.server's and http.client's own: they take bare LF, NUL, folded lines, two lengths, and `//v1` for `/v1`;
# and cost 42-55 us for 16 headers, each way. This costs 8, and 3 for header lines that came before.

REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.(?P<minor>[01])")
STATUS_LINE = re.compile(r"HTTP/1\.(?P<minor>[01]) ([1-5][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
LENGTH_LINE = re.compile(r"content-length:[\t ]*([0-9]{1,18})[\t ]*\r\n", re.I)
# One line a match. Blanks around the value are cut in Python: as part of the pattern they would make a line of blanks
# with a control character at its end take quadratic time.
HEADER_LINE = re.compile(rf"^({TOKEN}):([\t\x20-\x7e\x80-\xff]*)\r\n", re.M)
# What no head may hold, found before its end has come: a caller that speaks TLS, or ends lines with LF alone, is told
# at once and not after HEAD_SECONDS.
HOPELESS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
PATH = re.compile(rf"(?!.*/\.\.?(?:/|$))/(?:{SEGMENT}(?:/{SEGMENT})*)?")


class Malformed(Exception):
    """The bytes are not one unambiguous HTTP message; the text says why and quotes nothing."""


class TooLong(Malformed):
    """A head over its limit."""


def words(value: str) -> list[str]:
    """A comma-separated list, lower case."""
    return [word.strip().lower() for word in value.split(",")]


class Headers:
    """All header lines of a head but its Content-Length. Raises Malformed."""

    def __init__(self, text: str) -> None:
        found = HEADER_LINE.findall(text)
        if len(found) != text.count("\n"):
            raise Malformed("a header is not `Name: value` with CRLF at its end")
        self.lines = [(name, value.strip("\t ")) for name, value in found]
        self.fields: dict[str, str] = {}        # the first value for each lower-case name
        self.repeated: set[str] = set()         # names that came more than once
        for name, value in self.lines:
            if (name := name.lower()) not in self.fields:
                self.fields[name] = value
            else:
                self.repeated.add(name)
        self.passed: dict[tuple[bool, frozenset[str]], str] = {}    # what `end_to_end` found
        self.connection = words(",".join([value for name, value in self.lines if name.lower() == "connection"]))
        # What `Connection` names, as `is_dropped` reads it.
        self.named = frozenset(name.replace("_", "-") for name in self.connection if name)

    def end_to_end(self, table: re.Pattern[str], own: frozenset[str]) -> str:
        """The lines that go on: not in the table, not in `own`, and not named by `Connection`, but for the body's type."""
        lines = self.passed.get((table is REQUEST_DROPPED, own))
        if lines is None:
            dropped = own | (self.named - {"content-type"})
            lines = self.passed[table is REQUEST_DROPPED, own] = "".join(
                [f"{name}: {value}\r\n" for name, value in self.lines if not is_dropped(name, table, dropped)])
        return lines


class Head:
    """The whole head of a message, its empty line included. Raises Malformed. Attack: two readings of where it ends."""

    remembered: Callable[[str], Headers]    # for each direction its own

    def __init__(self, raw: bytes, first_line: re.Pattern[str]) -> None:
        text, self.raw = raw[:-2].decode("latin-1"), raw
        self.length: int | None = None
        if at := text.lower().find("\ncontent-length:") + 1:
            length = LENGTH_LINE.match(text, at)
            if length is None:
                raise Malformed("its Content-Length is not one plain number")
            self.length, text = int(length[1]), text[:at] + text[length.end():]
        first, _, rest = text.partition("\r\n")
        line = first_line.fullmatch(first)
        if line is None:
            raise Malformed("its first line is not HTTP/1.1's")
        self.line, self.minor = line, line["minor"] == "1"
        # The same lines come again and again, but for their Content-Length. Attack: long or many ones, to fill the memory.
        common = len(rest) <= REMEMBERED_HEAD_LIMIT and rest.count("\n") <= REMEMBERED_HEADER_COUNT
        self.headers = self.remembered(rest) if common else Headers(rest)
        self.fields, self.repeated = self.headers.fields, self.headers.repeated
        coding = self.fields.get("transfer-encoding")
        self.chunked = coding is not None
        if "content-length" in self.fields:
            raise Malformed("its Content-Length is there twice")
        if coding is not None and (self.length is not None or coding.lower() != "chunked" or not self.minor
                                   or "transfer-encoding" in self.repeated):
            raise Malformed("its Transfer-Encoding is not exactly `chunked`, once, with HTTP/1.1, without a Content-Length")
        connection = self.headers.connection
        self.keep_alive = "close" not in connection if self.minor else "keep-alive" in connection


class RequestHead(Head):
    """A request's head, its path and Host in the one accepted form."""

    remembered = staticmethod(functools.lru_cache(maxsize=16)(Headers))

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw, REQUEST_LINE)
        self.method, self.target = str(self.line[1]), str(self.line[2])
        self.path, _, self.query = self.target.partition("?")
        if len(self.headers.lines) >= HEADER_COUNT_LIMIT + (self.length is None):
            raise TooLong(f"it has more than {HEADER_COUNT_LIMIT} headers")
        if len(self.path) > PATH_LIMIT or not PATH.fullmatch(self.path):
            raise Malformed(f"the path must be at most {PATH_LIMIT} characters in segments of A-Z a-z 0-9 . _ ~ : @ + , = - "
                            "between single slashes, none of them . or .., without % encoding")
        if "host" not in self.fields or "host" in self.repeated:
            raise Malformed("it must have exactly one Host header")


class AnswerHead(Head):
    remembered = staticmethod(functools.lru_cache(maxsize=16)(Headers))

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw, STATUS_LINE)
        self.status, self.reason = int(self.line[2]), self.line[3] or ""


async def read_head(channel: Channel, deadline: float, limit: int) -> bytes:
    """A head with its empty line. Raises Malformed, OSError, and EOFError when the peer says nothing at all."""
    scanned, end = 0, channel.buffer.find(b"\r\n\r\n") + 4
    while end < 4 and len(channel.buffer) <= limit:
        if HOPELESS.search(channel.buffer, max(0, scanned - 2)):
            raise Malformed("its head has a control character, or a line that does not end in CRLF")
        scanned = len(channel.buffer)
        if not (data := await channel.recv(deadline)):
            raise Malformed("it ends in its head") if channel.buffer else EOFError
        channel.buffer += data
        end = channel.buffer.find(b"\r\n\r\n", max(0, scanned - 3)) + 4
    if not 4 <= end <= limit:
        raise TooLong(f"its head is longer than {limit // KIB} KiB")
    raw, channel.buffer = channel.buffer[:end], channel.buffer[end:]
    return raw


class Body:
    """Where a message's body ends (RFC 9112 sections 6 and 7), and what of the bytes that came belongs to it.

    A caller's body (`strict`) is held to the bare form: chunks without extensions, and no trailers.
    """

    # The end of a chunk with the next one's size; the end of the last; and what may still become one of them.
    STRICT = tuple(map(re.compile, (rb"(?:\r\n)?([0-9A-Fa-f]{1,15})\r\n", rb"\r\n", rb"(?:\r\n)?[0-9A-Fa-f]{0,15}\r?|\r")))
    LENIENT = tuple(map(re.compile, (
        rb"(?:\r\n)?([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]{0,4096})?\r\n",
        rb"(?:[\t\x20-\x7e\x80-\xff]+\r\n)*\r\n",
        rb"(?:\r\n)?(?:[0-9A-Fa-f]{1,15}[ \t]*(?:;[\t\x20-\x7e\x80-\xff]{0,4096})?\r?)?|\r")))
    TRAILERS_LIMIT = 64 * KIB
    first, last = True, False           # whether the next size line is the first one, or the last one was read

    def __init__(self, length: int | None, chunked: bool, strict: bool) -> None:
        """`length` None and not chunked: until the connection ends."""
        self.chunked, self.left, self.done = chunked, 0 if chunked else length, length == 0
        self.strict = strict

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """(the body's bytes among these, the rest: not yet readable, or behind the body). Raises Malformed."""
        if not self.chunked:
            piece, data = (data, b"") if self.left is None else (data[:self.left], data[self.left:])
            if self.left is not None:
                self.left -= len(piece)
                self.done = not self.left
            return piece, data
        pieces, at = [], 0
        size_line, end, open_line = self.STRICT if self.strict else self.LENIENT
        while not self.done:
            if self.left:
                pieces.append(data[at:at + self.left])
                at += len(pieces[-1])
                self.left -= len(pieces[-1])
            if self.left or at == len(data):
                break
            line = (end if self.last else size_line).match(data, at)
            if line is None or (not self.last and self.first == line[0].startswith(b"\r")):
                self._check_open(data, at, open_line)
                break
            at = line.end()
            if self.last:
                self.done = True
            else:
                self.first, self.left = False, int(line[1], 16)
                self.last = not self.left
        return b"".join(pieces), data[at:]

    def _check_open(self, data: bytes, at: int, open_line: re.Pattern[bytes]) -> None:
        """What has not ended must still be able to become good."""
        if self.last:
            good = data[at:] == b"\r" if self.strict else len(data) - at <= self.TRAILERS_LIMIT
        else:
            good = open_line.fullmatch(data, at) is not None and self.first != data.startswith(b"\r", at)
        if not good:
            raise Malformed("its chunked body is broken, or has extensions or trailers")


# ----------------------------------------------------------------------------------------------------------------------
# 5. Allowlist: which method, path, query and type of body may pass. Pure.

RULE = re.compile(r"(?:([A-Z]+) )?(/[^ ]*)(?: ([a-z0-9.+\-]+/[a-z0-9.+\-]+))?")
QUERY = re.compile(r"(?:[A-Za-z0-9\-._~!$'()*+,:@/?=&]|%[0-9A-Fa-f]{2})*")
QUERY_CREDENTIAL = re.compile(r"key|api-?key|token|access-token|auth|authorization|oauth-token|client-secret"
                              r"|x-.*|\$(?!alt$).*", re.S)
WIDE = {"files", "batches", "fine_tuning", "uploads", "containers", "vector_stores", "assistants", "threads"}


class Rule:
    """One entry of `allowed_paths`.

    `*` stands for one or more characters inside one segment, but never for the `:` of a segment whose pattern has one:
    `/v1/models/*:generateContent` does not match `/v1/models/a:b:generateContent`.
    """

    def __init__(self, text: str) -> None:
        """Raises ValueError for an entry that no request can match."""
        match = RULE.fullmatch(text)
        if match is None:
            raise ValueError('must be "/path", "METHOD /path" or "METHOD /path type/subtype"')
        self.method, self.path, self.type = match[1] or "POST", match[2], match[3] or JSON_TYPE
        if not PATH.fullmatch(self.path.replace("*", "a")) or len(self.path) > PATH_LIMIT:
            raise ValueError("no request can match it: a path is made of segments of A-Z a-z 0-9 . _ ~ : @ + , = - "
                             "between single slashes, without a query, a % or a slash at the end")
        if self.method == "CONNECT" or (self.path in HEALTH_PATHS and self.method in ("GET", "HEAD")):
            raise ValueError("no request can match it: the broker answers this one itself")
        self.text = f"{self.method} {self.path}" + (f" {self.type}" if self.type != JSON_TYPE else "")
        self.pattern = re.compile("/".join(re.escape(segment).replace(r"\*", "[^/:]+" if ":" in segment else "[^/]+")
                                           for segment in self.path.split("/")))

    @property
    def is_wide(self) -> bool:
        """Whether it reaches stored data or a bill of its own, beyond a single call of a model."""
        segments = self.path.split("/")
        return self.method == "DELETE" or segments[-1] == "*" or not WIDE.isdisjoint(segments)


class Allowlist:
    """The rules of one caller. A decision is cached, so that a hundred rules cost what one does."""

    def __init__(self, rules: list[Rule]) -> None:
        self.rules = rules
        self.decide = functools.lru_cache(maxsize=256)(self._decide)

    def _decide(self, method: str, path: str) -> tuple[frozenset[str], frozenset[str]]:
        """(types of body for this method and path, methods that are known for the path)"""
        known = [rule for rule in self.rules if rule.pattern.fullmatch(path)]
        return (frozenset(rule.type for rule in known if rule.method == method), frozenset(rule.method for rule in known))

    def match(self, head: RequestHead) -> frozenset[str]:
        """The types of body that the request may have. Raises RequestError."""
        types, methods = self.decide(head.method, head.path)
        if methods and "upgrade" in head.fields and "websocket" in words(head.fields["upgrade"]):
            raise RequestError("upgrade_not_supported", "the broker speaks plain HTTP/1.1, no WebSocket: send the request "
                               "as HTTP", "Upgrade: HTTP/1.1\r\nConnection: Upgrade\r\n")
        if types:
            return types
        what = f"{head.method} {head.path} is not in the broker's allowed_paths"
        if methods:
            allow = ", ".join(sorted(methods))
            raise RequestError("method_not_allowed", f"{what}, which has this path for {allow} only", f"Allow: {allow}\r\n")
        twin = head.path[3:] if head.path.startswith("/v1/") else "/v1" + head.path
        rules = sorted(self.rules, key=lambda rule: not rule.pattern.fullmatch(twin))
        more = f" and {len(rules) - 20} more" if len(rules) > 20 else ""
        raise RequestError("path_not_allowed", f"{what}; allowed: {', '.join(rule.text for rule in rules[:20])}{more}. "
                           "If it should be, add it to the broker's configuration")


def check_query(query: str) -> None:
    """Attack: an agent adds `?key=` (Google reads it), and its caller's data goes to somebody else's account."""
    if len(query) > QUERY_LIMIT or query.count("&") >= PARAMETER_LIMIT or not QUERY.fullmatch(query):
        raise RequestError("query_not_allowed", f"the query must have at most {QUERY_LIMIT} characters and "
                           f"{PARAMETER_LIMIT} parameters, of plain characters and %XX")
    for parameter in query.split("&"):
        name = urllib.parse.unquote_plus(parameter.partition("=")[0]).casefold().replace("_", "-")
        if QUERY_CREDENTIAL.fullmatch("".join(name.partition("[")[0].split())):
            raise RequestError("query_not_allowed", "the query names a credential, which only the broker attaches: leave "
                               "that parameter out")


# ----------------------------------------------------------------------------------------------------------------------
# 6. Secrets: where the key comes from, and who may see it.
#
# To add a secret source: one function that returns the key's text or raises SecretUnavailable, and its row in
# SECRET_SOURCES; validation, --check, caching and redaction come with it.

VARIABLE = "[A-Za-z_][A-Za-z0-9_]*"
TAKEN: dict[str, str] = {}              # variables taken out of os.environ, so that no child gets them
RUNNING: set[Popen] = set()             # secret commands
SPAWNING, ENDING = threading.Lock(), threading.Event()      # so that none is overlooked, or started, at our own end
COMMAND_OUTPUT_LIMIT = 64 * KIB


class Secret:
    """The provider's key. It shows itself only when asked by name, never in a repr or a traceback."""

    def __init__(self, value: str) -> None:
        """Raises SecretUnavailable for what can't be a key; the text does not quote it."""
        value = re.sub(r"\r?\n\Z", "", value)
        if not re.fullmatch(r"[!-~]{16,4096}", value):
            raise SecretUnavailable("what it gives is not a key: expected one line of 16 to 4096 visible ASCII characters "
                                    f"without a space, got {len(value)} characters")
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "[redacted]"


class SecretSource(NamedTuple):
    """`secret_source`, checked. `options` are those of its row in SECRET_SOURCES."""
    kind: str
    options: dict[str, Any]

    @property
    def variable(self) -> str | None:
        return self.options.get("name")

    @property
    def cache_seconds(self) -> float:
        return float(self.options.get("cache_seconds", "inf"))

    def resolve(self) -> Secret | None:
        """Asks the source; a command may take its whole time-out. Raises SecretUnavailable."""
        text = SECRET_SOURCES[self.kind][0](**self.options)
        return None if text is None else Secret(text)

    def describe(self) -> str:
        return {"env": f"environment variable {self.variable}", "none": "no credential",
                "command": f"command {self.options.get('argv', [''])[0]}"}.get(self.kind, self.kind)


def take_variable(name: str) -> str | None:
    """A variable's value; it is gone from the environment afterwards, and remembered for a reload."""
    if name in os.environ:
        TAKEN[name] = os.environ.pop(name)
    return TAKEN.get(name)


def digest(text: str) -> bytes:
    """For comparisons in constant time: of equal length, whatever is compared."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def same(one: Secret | None, other: Secret | None) -> bool:
    if one is None or other is None:
        return one is other
    return hmac.compare_digest(digest(one.reveal()), digest(other.reveal()))


def secret_from_env(name: str) -> str:
    value = take_variable(name)
    if not value:
        raise SecretUnavailable(f"environment variable {name} is not set: export it in the shell that starts the broker, "
                                "or name another secret_source")
    return value


def secret_from_command(argv: list[str], folder: str, timeout_seconds: float, cache_seconds: float) -> str:
    """Runs it without a shell, without input, in a session of its own, so that it can be ended with its children."""
    import subprocess
    try:
        with SPAWNING:
            if ENDING.is_set():
                raise SecretUnavailable("the broker ends")
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       cwd=folder, start_new_session=True)
            RUNNING.add(process)
    except (OSError, ValueError) as error:
        raise SecretUnavailable(f"{argv[0]} can't be run: {getattr(error, 'strerror', error)}") from None
    said = [bytearray(), bytearray()]

    def read(pipe: Any, data: bytearray) -> None:
        with pipe:
            while len(data) <= COMMAND_OUTPUT_LIMIT and (piece := pipe.read1(4096)):
                data += piece
        if len(data) > COMMAND_OUTPUT_LIMIT:
            kill_command(process)       # it writes without end
    threads = [threading.Thread(target=read, args=pair, daemon=True) for pair in zip((process.stdout, process.stderr), said)]
    try:
        for thread in threads:
            thread.start()
        process.wait(timeout_seconds)
        for thread in threads:
            thread.join(0.5)
        if any(thread.is_alive() for thread in threads):
            kill_command(process)       # a child that it left behind holds the pipe open
    except subprocess.TimeoutExpired:
        kill_command(process)
        raise SecretUnavailable(f"{argv[0]} gave no answer within {timeout_seconds:g} seconds (timeout_seconds): is it "
                                "waiting for you to unlock something?") from None
    finally:
        RUNNING.discard(process)
    if max(map(len, said)) > COMMAND_OUTPUT_LIMIT:
        raise SecretUnavailable(f"{argv[0]} wrote more than {COMMAND_OUTPUT_LIMIT // KIB} KiB")
    if process.returncode:
        words_of_it = mask(said[1].decode("utf-8", "replace")) or "nothing"
        raise SecretUnavailable(f"{argv[0]} failed with exit code {process.returncode} and said: {words_of_it}")
    return said[0].decode("utf-8", "replace")


def kill_command(process: Popen) -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()              # Windows has no process groups of this kind: children of it live on
    except OSError:
        pass
    process.wait()


def kill_running_commands() -> None:
    with SPAWNING:
        ENDING.set()
    for process in list(RUNNING):
        kill_command(process)


def mask(text: str) -> str:
    """A failing command's own words, with everything that might be a key, or a part of one, hidden."""
    def hide(word: re.Match[str]) -> str:
        mixed = re.search("[0-9]", word[0]) and re.search("[A-Za-z]", word[0])
        return "[masked]" if len(word[0]) >= 16 or mixed else word[0]
    return " ".join(re.sub(r"\S{8,}", hide, text).split())[:400]


def find_program(source: SecretSource, folder: str) -> SecretSource:
    """With argv[0] absolute. Attack: an agent writes an `op` into a folder that a relative PATH entry names."""
    if source.kind != "command":
        return source
    import shutil
    program, *arguments = source.options["argv"]
    path = os.pathsep.join(filter(os.path.isabs, os.environ.get("PATH", os.defpath).split(os.pathsep)))
    found = os.path.join(folder, program) if os.path.dirname(program) else shutil.which(program, path=path)
    if found is None or not os.path.exists(found):
        raise SecretUnavailable(f"program {program!r} is not found: install it, or put its absolute path into argv")
    return source._replace(options={**source.options, "argv": [os.path.abspath(found), *arguments], "folder": folder})


# ----------------------------------------------------------------------------------------------------------------------
# 7. Configuration: tables of keys. No raw dictionary leaves this section but for the reload's comparison.
#
# To add a key: one row in KEYS, one field in Config, one row in README.md.
#
# One upstream and one caller today. A request is matched to both (Broker.upstream, identify_caller), so that several
# of each can come without a change to the request's way.

BASE_URL = re.compile(r"(https?)://([A-Za-z0-9](?:[A-Za-z0-9.\-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])"
                      rf"(?::([0-9]{{1,5}}))?((?:/{SEGMENT})*)/?", re.I)
HOST_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._\-]*[a-z0-9])?|\[[0-9a-f:.]+\]")
LOOPBACK = re.compile(r"localhost|127(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}|\[::1\]")
FRAMING_HEADER = re.compile(HOP_BY_HOP + "|host|content-length|content-type|content-encoding|accept-encoding|expect"
                            "|x-broker-.*")
DEFAULT_HOSTS = ["127.0.0.1", "localhost"]
DEFAULT_TOKEN_VARIABLE = "BROKER_CLIENT_TOKEN"
AFTER_RESTART = ("listen_port", "mode", "upstream_base_url", "secret_source", "auth_header", "event_log")


class UpstreamConfig(NamedTuple):
    """Where requests go, and with what authority."""
    secure: bool
    host: str                           # lower case; an IPv6 address keeps its brackets
    port: int
    path: str                           # put before the request's path; no slash at the end
    auth_header: str
    auth_scheme: str
    extra_headers: dict[str, str]
    source: SecretSource
    own_headers: frozenset[str]         # names that only the broker sets, as `is_dropped` reads them
    authority: str                      # the host, with the port if it is not the scheme's own

    @property
    def url(self) -> str:
        return f"http{'s' if self.secure else ''}://{self.authority}{self.path}"

    @property
    def is_loopback(self) -> bool:
        return LOOPBACK.fullmatch(self.host) is not None

    def describe_credential(self) -> str:
        if self.source.kind == "none":
            return "no credential"
        return " ".join(filter(None, (f"{self.auth_header}:", self.auth_scheme, f"[{self.source.describe()}]")))


class Config(NamedTuple):
    """A valid configuration."""
    file: str                           # absolute
    raw: dict[str, Any]
    listen_port: int
    dry_run: bool
    upstream: UpstreamConfig
    allowlist: Allowlist
    client_token_env: str | None        # None: any program on this machine may use the key
    allowed_hosts: frozenset[str]
    max_request_bytes: int
    upstream_timeout: float
    max_concurrent: int
    event_log: str                      # absolute

    @property
    def mode(self) -> str:
        return "dry_run" if self.dry_run else "proxy"


Check = Callable[[Any], Any]            # the checked value, maybe in another form; ValueError with the words for the key


def number(low: float, high: float, whole: bool = False) -> Check:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
            raise ValueError(f"must be a{' whole' if whole else ''} number from {low:g} to {high:g}")
        return value
    return check


def text(pattern: str, meaning: str) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"must be {meaning}")
        return value
    return check


def check_base_url(value: Any) -> tuple[bool, str, int, str]:
    match = BASE_URL.fullmatch(value) if isinstance(value, str) else None
    if match is None or (match[4] and not PATH.fullmatch(match[4])) or ".." in match[2]:
        raise ValueError("must be https://host[:port][/path], without user, query, fragment or dot segment")
    secure, host = match[1].lower() == "https", match[2].lower()
    port = int(match[3] or (443 if secure else 80))
    if not 1 <= port <= 65535:
        raise ValueError("has a port that is not from 1 to 65535")
    if not secure and not LOOPBACK.fullmatch(host):
        raise ValueError("must be https://: plain http:// would send the key readable over the network, and is accepted to "
                         "a loopback address only")
    return secure, host, port, match[4]


def check_allowed_paths(value: Any) -> Allowlist:
    if not isinstance(value, list) or not value:
        raise ValueError('must be a non-empty list such as ["/v1/chat/completions", "GET /v1/models"]')
    rules = []
    for entry in value:
        try:
            rules.append(Rule(entry if isinstance(entry, str) else ""))
        except ValueError as error:
            raise ValueError(f"has the entry {json.dumps(entry)[:200]}: {error}") from None
    return Allowlist(rules)


def check_argv(value: Any) -> Any:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and "\0" not in word for word in value):
        raise ValueError("must be a list of words, the program first: it is run without a shell")
    return text("(?s).+", "a list whose first word is a program")(value[0]) and value


def check_secret_source(value: Any) -> SecretSource:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in SECRET_SOURCES:
        raise ValueError(f'must be an object whose "kind" is one of {", ".join(SECRET_SOURCES)}')
    members = {key: member for key, member in value.items() if key != "kind"}
    try:
        return SecretSource(kind, check_members(members, SECRET_SOURCES[kind][1]))
    except ValueError as error:
        raise ValueError(f"of kind {kind}: {error}") from None


def check_extra_headers(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError('must be an object such as {"anthropic-version": "2023-06-01"}')
    for name, content in value.items():
        if not re.fullmatch(TOKEN, name) or not isinstance(content, str) or not re.fullmatch(r"[ -~]*", content):
            raise ValueError(f"has the header {name!r}: it needs a name of letters, digits and -, and a printable ASCII value")
        if FRAMING_HEADER.fullmatch(name.lower()) or [other.lower() for other in value].count(name.lower()) > 1:
            raise ValueError(f"has the header {name!r}, which is there twice or is the broker's own to set")
    return {name: content.strip() for name, content in value.items()}


def check_auth_header(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(TOKEN, value) or FRAMING_HEADER.fullmatch(value.lower()):
        raise ValueError('must be the name of a header for a credential, such as "Authorization" or "x-api-key"')
    return value


def check_allowed_hosts(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not value or not all(
            isinstance(host, str) and HOST_NAME.fullmatch(host.lower()) for host in value):
        raise ValueError('must be a non-empty list of host names without a port, such as ["127.0.0.1", "localhost"]')
    return frozenset(host.lower() for host in value)


def check_token_variable(value: Any) -> Any:
    name = text(VARIABLE, "the name of an environment variable, or null, written out, for no caller token at all")
    return None if value is None else name(value)


REQUIRED = object()
SECONDS = number(0.1, 86400)
# kind -> (function, its options: name -> (default, check))
SECRET_SOURCES: dict[str, tuple[Callable[..., str | None], dict[str, tuple[Any, Check]]]] = {
    "env": (secret_from_env, {"name": (REQUIRED, text(VARIABLE, "the name of an environment variable"))}),
    "command": (secret_from_command, {"argv": (REQUIRED, check_argv), "timeout_seconds": (60, SECONDS),
                                      "cache_seconds": (3600, number(0, 31 * 86400))}),
    "none": (lambda: None, {}),
}
KEYS: dict[str, tuple[Any, Check]] = {
    "listen_host": ("127.0.0.1", text(r"127\.0\.0\.1", 'exactly "127.0.0.1": the broker is not for other machines')),
    "listen_port": (8791, number(0, 65535, whole=True)),
    "mode": ("proxy", text("proxy|dry_run", '"proxy" or "dry_run"')),
    "upstream_base_url": (REQUIRED, check_base_url),
    "allowed_paths": (REQUIRED, check_allowed_paths),
    "client_token_env": (REQUIRED, check_token_variable),
    "secret_source": (REQUIRED, check_secret_source),
    "auth_header": ("Authorization", check_auth_header),
    "auth_scheme": ("Bearer", text(r"[!-~]*", 'one word such as "Bearer", or "" for none')),
    "extra_headers": ({}, check_extra_headers),
    "allowed_hosts": (DEFAULT_HOSTS, check_allowed_hosts),
    "max_request_bytes": (32 * MIB, number(1, BUFFERED_LIMIT, whole=True)),
    "upstream_timeout_seconds": (600, SECONDS),
    "max_concurrent_requests": (128, number(1, 10000, whole=True)),
    "event_log": ("events.jsonl", text(r"[^\0\ud800-\udfff]+", "the path of a file")),
}


def check_members(members: dict[str, Any], table: dict[str, tuple[Any, Check]]) -> dict[str, Any]:
    """The members of a JSON object by their table, defaults put in. Raises ValueError."""
    for key in members:
        if key not in table:
            import difflib
            near = difflib.get_close_matches(key, table, 1)
            raise ValueError(f"unknown key {json.dumps(key[:64])}: "
                             + (f'did you mean "{near[0]}"?' if near else f"known are {', '.join(table) or 'none'}"))
    values = {}
    for key, (default, check) in table.items():
        if key not in members and default is REQUIRED:
            raise ValueError(f'"{key}" is missing: it is required, see the configuration table in README.md')
        try:
            values[key] = check(members.get(key, default))
        except ValueError as error:
            raise ValueError(f'"{key}" {error}') from None
    return values


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For JSON objects: Python keeps the last of two equal keys, another parser may keep the first."""
    members = dict(pairs)
    if len(members) != len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {json.dumps(twice[:64])} is there twice")
    return members


def no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


ANY_JSON = json.JSONDecoder()
STRICT_JSON = json.JSONDecoder(object_pairs_hook=no_duplicates, parse_constant=no_constant)


def load_config(file: str, dry_run: bool = False, port: int | None = None) -> Config:
    """The configuration in a file, with the command line's words put over it. Raises ConfigError."""
    shown, file = file, os.path.abspath(file)
    folder = os.path.dirname(file)
    try:
        with open(file, "rb") as stream:
            raw = STRICT_JSON.decode(stream.read(MIB).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{shown}: can't be read: {error.strerror}: give the file with --config FILE") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown}: is not JSON (UTF-8, no comments, no byte-order mark): {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{shown}: must be a JSON object: start from broker_config.example.json")
    dry_run = dry_run or raw.get("mode") == "dry_run"
    try:
        values = check_members({"client_token_env": DEFAULT_TOKEN_VARIABLE, **raw} if dry_run else raw, KEYS)
        secure, host, upstream_port, path = values["upstream_base_url"]
        own = frozenset(name.lower().replace("_", "-") for name in (values["auth_header"], *values["extra_headers"]))
        upstream = UpstreamConfig(secure, host, upstream_port, path, values["auth_header"], values["auth_scheme"],
                                  values["extra_headers"], values["secret_source"], own,
                                  host if upstream_port == (443 if secure else 80) else f"{host}:{upstream_port}")
        config = Config(file, raw, values["listen_port"] if port is None else port, dry_run, upstream,
                        values["allowed_paths"], values["client_token_env"], values["allowed_hosts"],
                        values["max_request_bytes"], values["upstream_timeout_seconds"], values["max_concurrent_requests"],
                        os.path.join(folder, values["event_log"]))
        check_together(config)
    except ValueError as error:
        raise ConfigError(f"{shown}: {error}") from None
    return config


def check_together(config: Config) -> None:
    """What can only be said of several keys. Raises ValueError."""
    upstream = config.upstream
    if upstream.is_loopback and upstream.port == config.listen_port:
        raise ValueError('"upstream_base_url" is the broker itself: give the provider\'s address')
    if config.client_token_env is None and not config.allowed_hosts <= set(DEFAULT_HOSTS):
        raise ValueError('"client_token_env" is null, which is refused while "allowed_hosts" has more than the default: name '
                         "a variable that holds a caller token")
    if config.client_token_env is not None and config.client_token_env == upstream.source.variable:
        raise ValueError('"client_token_env" names the secret\'s own variable: a caller token is another value, see --new-token')
    if upstream.auth_header.lower().replace("_", "-") in (name.lower().replace("_", "-") for name in upstream.extra_headers):
        raise ValueError('"extra_headers" has the name of "auth_header": leave it out there')


# ----------------------------------------------------------------------------------------------------------------------
# 8. Event log: one JSON object a line, one write a line. The only writer.
#
# To add a field: its name in EVENT_FIELDS, and in FOREIGN_FIELDS if others choose what is in it. An unlisted field is a
# programming error.

EVENT_FIELDS = {event: dict.fromkeys(names.split()) for event, names in {
    "start": "mode version listen",
    "stop": "mode version listen",
    "reload": "mode version listen",
    "request": "id client method path mode model stream request_bytes",
    "response": "id status outcome response_bytes ttfb_ms duration_ms usage upstream_request_id attempt",
    "denied": "id status reason method path suppressed",
}.items()}
# What json.JSONEncoder makes anew for every text: 1.3 us in place of 2.9.
C_ENCODER = json.encoder.c_make_encoder and json.encoder.c_make_encoder(        # type: ignore[attr-defined]
    None, None, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True)


def encode_json(value: Any) -> str:
    """Compact, ASCII only."""
    return "".join(C_ENCODER(value, 0)) if C_ENCODER else json.dumps(value, separators=(",", ":"))


# What others chose: redacted before it is cut, so that no part of a secret stays.
FOREIGN_FIELDS = ("method", "path", "model", "upstream_request_id")


@functools.lru_cache(maxsize=256)
def shown(value: str) -> str:
    """A string that somebody else chose, as it may stand in the log. The same few come again and again."""
    text = OUTPUT_REDACTOR.text(value)[:LOGGED_STRING_LIMIT]
    # Attack: with a secret that has a backslash, a string that JSON's escapes turn into it.
    return "[redacted]" if OUTPUT_REDACTOR.has(encode_json(text).encode()) else text


class EventLog:
    """Appends to a file of mode 0600. Every method raises OSError when it can't."""

    def __init__(self, path: str) -> None:
        self.path, self.fd, self.torn = path, -1, False

    @staticmethod
    def _check(found: os.stat_result) -> None:
        # Attack: a link in the log's place makes us append to a file of the attacker's choice.
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise OSError(errno.EINVAL, "it is not a regular file of its own (no link, no pipe)")
        if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "it belongs to another user")

    def check(self) -> None:
        """Finds what `open` would, but makes nothing."""
        if os.path.lexists(self.path):
            self._check(os.lstat(self.path))
        elif not os.path.isdir(os.path.dirname(self.path)):
            raise FileNotFoundError(errno.ENOENT, "its folder does not exist")
        if not os.access(self.path if os.path.lexists(self.path) else os.path.dirname(self.path), os.W_OK):
            raise PermissionError(errno.EACCES, "it is not writable")

    def open(self) -> None:
        """Opens or makes the file anew; the old one stays in use when that fails."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOCTTY"):
            flags |= getattr(os, name, 0)
        fd = os.open(self.path, flags, 0o600)
        try:
            self._check(os.fstat(fd))
            if hasattr(os, "fchmod"):
                os.fchmod(fd, 0o600)
            size = os.lseek(fd, 0, os.SEEK_END)
            os.lseek(fd, max(0, size - 1), os.SEEK_SET)
            torn = os.read(fd, 1) not in (b"", b"\n")       # a crash, or a full disk
        except OSError:
            os.close(fd)
            raise
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.torn = fd, torn

    def append(self, event: str, fields: dict[str, Any]) -> None:
        """Writes one line; in what others chose the secret and the tokens are redacted."""
        if not fields.keys() <= EVENT_FIELDS[event].keys():
            raise KeyError(event)
        for name in FOREIGN_FIELDS:
            if value := fields.get(name):
                fields[name] = (shown if len(value) <= LOGGED_STRING_LIMIT else shown.__wrapped__)(value)
        now = int(time.time() * 1000)
        line = encode_json({"time": f"{utc(now // 1000)}.{now % 1000:03d}Z", "event": event, **fields})
        data = line.encode() + b"\n"
        # A deleted file is noticed by its link count: 1 us, where a look at its path would be 2.
        if self.fd < 0 or os.fstat(self.fd).st_nlink == 0:
            self.open()
        data = b"\n" + data if self.torn else data
        written = os.write(self.fd, data)
        if written < len(data):
            self.torn = data[:written][-1:] not in (b"", b"\n") or (self.torn and not written)
            raise OSError(errno.ENOSPC, "the disk is full")
        self.torn = False


@functools.lru_cache(maxsize=4)
def utc(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


# ----------------------------------------------------------------------------------------------------------------------
# 9. Admission: a check for each step of the map. It raises RequestError, or lets the request pass.

HOST = re.compile(r"(.+?)(?::[0-9]{1,5})?")
# RFC 9110 section 8.3.1. A charset other than utf-8 would let two parsers read two texts.
JSON_CONTENT = re.compile(rf'application/json(?:[ \t]*;[ \t]*(?:charset=(?:utf-8|"utf-8")'
                          rf'|(?!charset=){TOKEN}=(?:{TOKEN}|"[^"\\]*")))*[ \t]*', re.I)
CASE_SENSITIVE_KEYS = frozenset(("model", "stream", "tools", "messages", "input"))


@functools.lru_cache(maxsize=8)
def host_name(field: str) -> str | None:
    """Of a Host header, without the port; None for what is no host."""
    host = HOST.fullmatch(field.lower())
    return host and host[1]


@functools.lru_cache(maxsize=8)
def media_type(field: str) -> str:
    """Of a Content-Type header, lower case; "" for JSON that is not surely UTF-8."""
    kind = field.partition(";")[0].strip().lower()
    return "" if kind == JSON_TYPE and not JSON_CONTENT.fullmatch(field) else kind


class Caller(NamedTuple):
    """Who may ask: the name in the event log, and the digest of its token (None: no token needed)."""
    name: str
    digest: bytes | None


def check_host(head: RequestHead, config: Config) -> None:
    """Attack: DNS rebinding. A page's own name is made to point at 127.0.0.1; its Host header gives it away."""
    field = head.fields["host"]
    if (host_name if len(field) <= 256 else host_name.__wrapped__)(field) not in config.allowed_hosts:
        raise RequestError("host_not_allowed", "the Host header names a host that is not in the broker's allowed_hosts: call "
                           "it as 127.0.0.1 or localhost, or add the name to its configuration")


def check_not_a_web_page(head: RequestHead) -> None:
    """Attack: a web page posts to localhost. A browser says so in Origin or Sec-Fetch-Site; an SDK sends neither.

    Node's fetch sends Sec-Fetch-Mode, so that one may not decide.
    """
    if not head.fields.keys().isdisjoint(("origin", "sec-fetch-site", "access-control-request-method")):
        raise RequestError("browser_not_allowed", "a web browser made this request, and the broker serves none: call it from "
                           "a program (curl, an SDK, an agent)")


def identify_caller(head: RequestHead, callers: list[Caller]) -> Caller:
    """Who is asking. The first token header that is there decides, so that nobody can try two at once."""
    if callers[0].digest is None:
        return callers[0]
    token = ""
    for name in TOKEN_HEADERS:
        if name in head.fields:
            token = head.fields[name]
            break
    if name in head.repeated:
        raise RequestError("bad_request", "the header with the caller token is there twice")
    if name == "authorization":
        scheme, _, token = token.partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
    token_digest, known = digest(token), None
    for caller in callers:              # all of them, so that the time does not tell which one it was
        if hmac.compare_digest(token_digest, caller.digest or b""):
            known = caller
    if known is None:
        raise RequestError("client_token_required", "the broker asks for its caller token in the X-Broker-Token header (or "
                           "as the API key of your SDK); the right value is known to who started the broker")
    return known


def check_body_head(head: RequestHead, types: frozenset[str], limit: int) -> None:
    """All that can be said of a body before it comes."""
    if head.length is not None and head.length > limit:
        raise RequestError("request_too_large", f"the body has {head.length} bytes, the broker takes {limit} "
                           "(max_request_bytes in its configuration)")
    if head.fields.get("content-encoding", "identity").lower() != "identity" or "content-encoding" in head.repeated:
        raise RequestError("content_encoding_not_supported", "the broker must be able to read the body: send it uncompressed "
                           "(for Codex: set enable_request_compression = false under [features])")
    if (head.length or head.chunked) and (media_type(head.fields.get("content-type", "")) not in types
                                          or "content-type" in head.repeated):
        raise RequestError("content_type_not_supported", f"the body's Content-Type must be {' or '.join(sorted(types))} "
                           "(charset absent or utf-8)")


class BodyFacts(NamedTuple):
    """What the rest of the way wants to know of a body."""
    model: str | None = None
    stream: bool = False
    json: dict[str, Any] = {}           # empty unless dry-run asks for it


def check_json(body: bytes | bytearray, keep: bool) -> BodyFacts:
    """Attack: one JSON text that we and the provider read differently, so that a checked value is not the used one."""
    try:
        members = STRICT_JSON.decode(str(body, "utf-8"))
        if not isinstance(members, dict):
            raise ValueError("it is not one object")
        for key in members:
            if key not in CASE_SENSITIVE_KEYS and key.casefold() in CASE_SENSITIVE_KEYS:
                raise ValueError(f"it has a key that is {key.casefold()!r} but for case")
    except json.JSONDecodeError as error:
        raise RequestError("invalid_json", f"the body is not strict JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise RequestError("invalid_json", "the body is not strict JSON: it is nested too deeply") from None
    except ValueError as error:
        what = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)[:200]
        raise RequestError("invalid_json", f"the body is not strict JSON: {what}") from None
    model = members.get("model")
    return BodyFacts(model if isinstance(model, str) else None, members.get("stream") is True, members if keep else {})


def check_no_secret(head: RequestHead, body: bytes | bytearray, redactor: Redactor) -> None:
    """The caller should not have the secret; if it does, it has leaked already and must be changed."""
    if redactor.forms and (redactor.has(head.raw) or find_any(redactor.body_forms, body)
                           or ("%" in head.query and redactor.has(urllib.parse.unquote_to_bytes(head.query)))):
        say("broker: ALARM: a caller sent a request that holds the secret itself: it has leaked, replace it in its store")
        raise RequestError("secret_in_request", "the request holds the provider's key, which only the broker should have: "
                           "remove it from the caller, and tell the key's owner to replace it")


# ----------------------------------------------------------------------------------------------------------------------
# 10. Providers: canned answers for dry-run, and where an answer says what it cost.
#
# To add a provider: a function that returns its answer and its row in SHAPES, and a row in CLIENT_VARIABLES if its SDK
# takes a base URL from the environment.

Json = Any                              # a JSON object; or a list of events: (name or None, JSON object or text)


class Dry(NamedTuple):
    """What a canned answer is made from."""
    text: str                           # what would have been sent where
    parts: list[str]                    # the same in pieces, for a stream
    head: RequestHead
    body: dict[str, Any]
    size: int                           # of the body, in bytes
    model: str

    @property
    def stream(self) -> bool:
        return self.body.get("stream") is True


def chat_completion(dry: Dry) -> Json:
    """platform.openai.com/docs/api-reference/chat"""
    count = len(dry.parts)
    base = {"id": "chatcmpl-dryrun", "created": int(time.time()), "model": dry.model}
    usage = {"prompt_tokens": 0, "completion_tokens": count, "total_tokens": count}

    def choice(key: str, message: Json, finish: str | None) -> Json:
        return [{"index": 0, key: message, "logprobs": None, "finish_reason": finish}]
    if not dry.stream:
        return {**base, "object": "chat.completion", "usage": usage,
                "choices": choice("message", {"role": "assistant", "content": dry.text, "refusal": None}, "stop")}
    base["object"] = "chat.completion.chunk"
    events = [choice("delta", {"role": "assistant", "content": ""}, None),
              *(choice("delta", {"content": part}, None) for part in dry.parts), choice("delta", {}, "stop")]
    options = dry.body.get("stream_options")
    last = [(None, {**base, "choices": [], "usage": usage})] if isinstance(options, dict) and options.get("include_usage") else []
    return [*((None, {**base, "choices": choices}) for choices in events), *last, (None, "[DONE]")]


def response(dry: Dry) -> Json:
    """platform.openai.com/docs/api-reference/responses and …/responses-streaming"""
    count = len(dry.parts)
    part = {"type": "output_text", "text": dry.text, "annotations": [], "logprobs": []}
    item = {"type": "message", "id": "msg_dryrun", "status": "completed", "role": "assistant", "content": [part]}
    whole = {"id": "resp_dryrun", "object": "response", "created_at": int(time.time()), "status": "completed", "error": None,
             "incomplete_details": None, "instructions": None, "metadata": {}, "model": dry.model, "output": [item],
             "parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0,
             "usage": {"input_tokens": 0, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                       "output_tokens": count, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": count}}
    if not dry.stream:
        return whole
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    place = {"item_id": "msg_dryrun", "output_index": 0, "content_index": 0}
    events: list[tuple[str, Json]] = [
        ("created", {"response": begun}), ("in_progress", {"response": begun}),
        ("output_item.added", {"output_index": 0, "item": {**item, "status": "in_progress", "content": []}}),
        ("content_part.added", {**place, "part": {**part, "text": ""}}),
        *(("output_text.delta", {**place, "delta": piece, "logprobs": []}) for piece in dry.parts),
        ("output_text.done", {**place, "text": dry.text, "logprobs": []}), ("content_part.done", {**place, "part": part}),
        ("output_item.done", {"output_index": 0, "item": item}), ("completed", {"response": whole})]
    return [(f"response.{name}", {"type": f"response.{name}", "sequence_number": at, **event})
            for at, (name, event) in enumerate(events)]


def message(dry: Dry) -> Json:
    """docs.anthropic.com/en/api/messages and …/messages-streaming"""
    count = len(dry.parts)
    whole = {"id": "msg_dryrun", "type": "message", "role": "assistant", "model": dry.model, "stop_reason": "end_turn",
             "content": [{"type": "text", "text": dry.text}], "stop_sequence": None,
             "usage": {"input_tokens": 0, "output_tokens": count}}
    if not dry.stream:
        return whole
    begun = {**whole, "content": [], "stop_reason": None, "usage": {"input_tokens": 0, "output_tokens": 0}}
    end = {"delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": count}}
    events: list[tuple[str, Json]] = [
        ("message_start", {"message": begun}),
        ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
        *(("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": piece}}) for piece in dry.parts),
        ("content_block_stop", {"index": 0}), ("message_delta", end), ("message_stop", {})]
    return [(name, {"type": name, **event}) for name, event in events]


def embeddings(dry: Dry) -> Json:
    """platform.openai.com/docs/api-reference/embeddings; the SDKs ask for base64 of 32-bit floats by default."""
    given, size = dry.body.get("input"), dry.body.get("dimensions")
    count = min(len(given), 2048) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
    size = size if isinstance(size, int) and 1 <= size <= 4096 else 8
    vector: Json = [1.0] + [0.0] * (size - 1)
    if dry.body.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
    data = [{"object": "embedding", "index": index, "embedding": vector} for index in range(count)]
    return {"object": "list", "data": data, "model": dry.model, "usage": {"prompt_tokens": 0, "total_tokens": 0},
            "dry_run": dry.text}


def models(dry: Dry) -> Json:
    """One path, two providers: Anthropic's SDK always sends anthropic-version."""
    if "anthropic-version" in dry.head.fields:
        model = {"type": "model", "id": "dry-run", "display_name": dry.text, "created_at": "2026-01-01T00:00:00Z",
                 "lifecycle": "active"}
        return {"data": [model], "has_more": False, "first_id": "dry-run", "last_id": "dry-run"}
    return {"object": "list", "data": [{"id": "dry-run", "object": "model", "created": 0, "owned_by": dry.text}]}


def generate_content(dry: Dry) -> Json:
    """ai.google.dev/api/generate-content: a stream is server-sent events with alt=sse, else a JSON list."""
    usage = {"promptTokenCount": 0, "candidatesTokenCount": len(dry.parts), "totalTokenCount": len(dry.parts)}
    stream = dry.head.path.endswith(":streamGenerateContent")
    texts = dry.parts if stream else [dry.text]
    pieces = [{"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, "index": 0,
                               **({"finishReason": "STOP"} if at == len(texts) else {})}],
               "usageMetadata": usage, "modelVersion": dry.model} for at, text in enumerate(texts, 1)]
    if not stream:
        return pieces[0]
    return [(None, piece) for piece in pieces] if "alt=sse" in dry.head.query.split("&") else {"": pieces}


# (method, end of the path, answer). The end, so that /openai/deployments/NAME/… is found as well.
SHAPES: tuple[tuple[str, str, Callable[[Dry], Json]], ...] = (
    ("POST", "/chat/completions", chat_completion),
    ("POST", "/responses", response),
    ("POST", "/embeddings", embeddings),
    ("POST", "/messages", message),
    ("POST", "/messages/count_tokens", lambda dry: {"input_tokens": dry.size // 4}),
    ("GET", "/models", models),
    ("POST", ":generateContent", generate_content),
    ("POST", ":streamGenerateContent", generate_content),
    ("", "", lambda dry: {"object": "dry_run", "message": dry.text}),
)


def dry_run_answer(head: RequestHead, facts: BodyFacts, size: int, upstream: UpstreamConfig) -> tuple[str, list[bytes]]:
    """(Content-Type, the body in the pieces that a stream would have) for a request that is not sent."""
    text = (f"DRY RUN: the broker would send {head.method} {upstream.url}{head.path} with a body of {size} bytes and "
            f"{upstream.describe_credential()} attached. No secret was read and nothing was sent.")
    in_path = re.search(r"/models/([^/:]+)", head.path)
    model = (facts.model or (in_path[1] if in_path else "dry-run"))[:LOGGED_STRING_LIMIT]
    dry = Dry(text, re.findall(r"(?:\S+\s*){1,6}", text), head, facts.json, size, model)
    canned = next(shape for method, end, shape in SHAPES if method in ("", head.method) and head.path.endswith(end))(dry)
    if isinstance(canned, dict):
        return JSON_TYPE, [encode_json(canned.get("", canned)).encode()]
    return "text/event-stream; charset=utf-8", [
        ((f"event: {name}\n" if name else "") + f"data: {data if isinstance(data, str) else encode_json(data)}\n\n").encode()
        for name, data in canned]


USAGE_KEY = re.compile(rb'(?<!\\)"usage(?:Metadata)?"\s*:\s*')


class UsageReader:
    """Finds the token counts in an answer that passes by, in each provider's own place for them."""

    NAMES = {"input_tokens": "input_tokens", "prompt_tokens": "input_tokens", "promptTokenCount": "input_tokens",
             "output_tokens": "output_tokens", "completion_tokens": "output_tokens", "candidatesTokenCount": "output_tokens"}

    def __init__(self, content_type: str) -> None:
        kind = content_type.partition(";")[0].strip().lower()
        self.stream, self.wanted = kind == "text/event-stream", kind in ("text/event-stream", JSON_TYPE)
        self.pending = b""
        self.usage: dict[str, int] | None = None

    def feed(self, data: bytes) -> None:
        if not self.wanted:
            return
        self.pending += data
        if self.stream:
            lines, newline, self.pending = self.pending.rpartition(b"\n")
            if b'"usage' in lines:
                for line in lines.splitlines():
                    if line.startswith(b"data:") and b'"usage' in line:
                        self._parse(line[5:])
        self.wanted = len(self.pending) <= USAGE_LIMIT

    def finish(self) -> dict[str, int] | None:
        if self.wanted and not self.stream and b'"usage' in self.pending:
            self._parse(self.pending)
        return self.usage

    def _parse(self, data: bytes) -> None:
        try:
            # Where it is the last member of the object, there is no need to read all the rest.
            if data.count(b'"usage') == 1 and (key := USAGE_KEY.search(data)):
                found, end = ANY_JSON.raw_decode(text := data[key.end():].decode())
                if text[end:].strip() == "}":
                    return self._add(found)
            answer = ANY_JSON.decode(data.decode())
        except (ValueError, RecursionError):
            return
        for holder in answer if isinstance(answer, list) else [answer]:
            for inner in (holder, holder.get("message"), holder.get("response")) if isinstance(holder, dict) else ():
                self._add(isinstance(inner, dict) and (inner.get("usage") or inner.get("usageMetadata")))

    def _add(self, found: Any) -> None:
        for name, count in found.items() if isinstance(found, dict) else ():
            if name in self.NAMES and type(count) is int and 0 <= count < 10 ** 12:
                self.usage = self.usage or {}
                self.usage[self.NAMES[name]] = count


# ----------------------------------------------------------------------------------------------------------------------
# 11. The loop: one thread, many conversations. A coroutine a connection, woken by `selectors`.
#
# Why not http.server's threads: with 32 callers they hand over the interpreter lock at every system call, which costs
# more than all the checks, and 500 streams would be 500 threads. Why not asyncio: its transports cost more than all the
# checks as well (tests/benchmark.py has a proxy on it). What waits without a descriptor (a secret command, a name
# look-up, a huge JSON text) runs in a thread.

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
NEVER = float("inf")


class Task:
    """A coroutine under way. Whoever holds it while it waits may resume it, or throw into it."""

    def __init__(self, loop: Loop, coroutine: Coroutine[Any, Any, None]) -> None:
        self.loop, self.coroutine, self.done = loop, coroutine, False

    def resume(self, value: Any = None, error: BaseException | None = None) -> None:
        outer, self.loop.running = self.loop.running, self
        try:
            if error is None:
                self.coroutine.send(value)
            else:
                self.coroutine.throw(error)
        except StopIteration:
            self.done = True
        except Exception as bug:
            self.done = True
            if bug is not error:
                report_bug(bug)
        finally:
            self.loop.running = outer


class Future:
    """A result that several tasks may wait for."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.done = loop, False
        self.waiters: list[Task] = []
        self.value: Any = None
        self.error: Exception | None = None

    def set(self, value: Any, error: Exception | None = None) -> None:
        self.value, self.error, self.done = value, error, True
        for task in self.waiters[:]:
            task.resume()

    @types.coroutine
    def wait(self) -> Generator[None, Any, Any]:
        """The value; raises the error."""
        if not self.done:
            task = self.loop.running
            assert task is not None
            self.waiters.append(task)
            try:
                yield
            finally:
                self.waiters.remove(task)   # a task that was interrupted is not resumed from here
        if self.error is not None:
            raise self.error
        return self.value


class Loop:
    """Runs tasks until `stopped` is set. Only `soon` may be called from another thread."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.targets: dict[int, Any] = {}       # by descriptor: whose `on_events` is called
        # Asked directly where it is epoll: EpollSelector.select takes 1.5 us more, four times a request.
        self.epoll = (select.epoll.fromfd(os.dup(self.selector.fileno()))
                      if isinstance(self.selector, getattr(selectors, "EpollSelector", ())) else None)
        self.channels: set[Channel] = set()
        self.next_look = NEVER                  # when to look through them for deadlines
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.ready: collections.deque[Callable[[], None]] = collections.deque()
        self.running: Task | None = None
        self.stopped = False
        self.wake_reader, self.wake_writer = socket.socketpair()
        self.wake_reader.setblocking(False)
        self.wake_writer.setblocking(False)
        self.watch(self.wake_reader, READ, self)

    def watch(self, sock: socket.socket, events: int, target: Any) -> None:
        """Calls `target.on_events(events)` for these from now on, in place of those before; for 0 no more."""
        fd = sock.fileno()
        if fd not in self.targets:
            self.selector.register(fd, events)
        elif events:
            self.selector.modify(fd, events)
        else:
            self.selector.unregister(fd)
            del self.targets[fd]
            return
        self.targets[fd] = target

    def look(self, timeout: float | None) -> list[tuple[Any, int]]:
        """(target, events) of what has come."""
        if self.epoll is None:
            return [(self.targets[key.fd], events) for key, events in self.selector.select(timeout)]
        return [(self.targets[fd], (READ if came & ~select.EPOLLOUT else 0) | (WRITE if came & ~select.EPOLLIN else 0))
                for fd, came in self.epoll.poll(timeout)]

    def on_events(self, events: int) -> None:
        self.wake_reader.recv(4096)

    def soon(self, function: Callable[[], None]) -> None:
        """Calls it in the loop's next round."""
        self.ready.append(function)
        try:
            self.wake_writer.send(b"\0")
        except OSError:
            pass                        # full: it wakes up anyway; or closed: there is no next round

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (time.monotonic() + seconds, id(function), function))

    def _expire(self) -> float | None:
        """Calls what is due; returns the seconds until the next look.

        Deadlines move with every byte, so they are not queued but looked through: at the next one, but once a second at
        most, so that 500 idle connections cost next to nothing.
        """
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            heapq.heappop(self.timers)[2]()
        if self.next_look <= now:
            for channel in [channel for channel in self.channels if channel.deadline <= now]:
                channel.on_deadline()
            nearest = min((channel.deadline for channel in self.channels), default=NEVER)
            self.next_look = max(nearest, now + 1)
        nearest = min(self.next_look, self.timers[0][0]) if self.timers else self.next_look
        return None if nearest == NEVER else max(0.0, nearest - now)

    def run(self) -> None:
        while not self.stopped:
            try:
                timeout = self._expire()
                if self.ready:
                    timeout = 0
                until = time.monotonic() + LINGER_SECONDS
                while not (came := self.look(0)) and timeout != 0 and time.monotonic() < until:
                    pass
                for target, events in came or self.look(timeout):
                    target.on_events(events)
                for _ in range(len(self.ready)):
                    self.ready.popleft()()
            except Exception as bug:    # one conversation's fault must not end the others
                report_bug(bug)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        Task(self, coroutine).resume()

    def in_thread(self, function: Callable[..., Any], *arguments: Any, then: Callable[..., None] | None = None) -> Future:
        """The future result of a function that blocks; `then(value, error)` is called in the loop before it is set."""
        future = Future(self)

        def finish(value: Any, error: Exception | None) -> None:
            if then is not None:
                then(value, error)
            future.set(value, error)

        def run() -> None:
            try:
                result = function(*arguments), None
            except Exception as error:
                result = None, error    # type: ignore[assignment]
            self.soon(functools.partial(finish, *result))
        threading.Thread(target=run, daemon=True).start()
        return future


class Channel:
    """A non-blocking socket in the loop, with at most one task that waits on it.

    Its interest in the selector is changed lazily: a kept connection that only reads, request after request, costs no
    system call for it. Methods raise OSError, and TimeoutError at the deadline (time.monotonic).
    """

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.loop, self.sock, self.buffer = loop, sock, b""     # the buffer: what came and is not yet read
        self.closed = self.secure = False       # secure: TLS, the socket is an SSLSocket
        self.task: Task | None = None
        self.wanted = self.interest = 0         # what the task waits for; what the selector watches
        self.watcher: Callable[[Channel], None] | None = None   # called for input that no task waits for
        self.expire: Callable[[Channel], None] | None = None    # called at the deadline when no task waits
        self.deadline = NEVER
        self.poller: Any = None                 # of an upstream's connection: 0.3 us, where a peek takes 1.2
        loop.channels.add(self)

    def set_deadline(self, deadline: float) -> None:
        self.deadline = deadline
        if deadline < self.loop.next_look:
            self.loop.next_look = deadline

    @types.coroutine
    def wait(self, events: int, deadline: float) -> Generator[None, Any, int]:
        """Suspends the running task until one of the events; returns those that came."""
        self.task, self.wanted = self.loop.running, events
        if self.interest & events != events:
            self._watch(self.interest | events)
        self.set_deadline(deadline)
        try:
            came: int = yield
            return came
        finally:
            self.task, self.wanted, self.deadline = None, 0, NEVER

    def watch_input(self, watcher: Callable[[Channel], None] | None) -> None:
        """Calls it at input while no task waits for that."""
        self.watcher = watcher
        if watcher is not None and not self.interest & READ:
            self._watch(self.interest | READ)

    def _watch(self, events: int) -> None:
        if self.closed or events == self.interest:
            return
        self.loop.watch(self.sock, events, self)
        self.interest = events

    def on_events(self, events: int) -> None:
        if events & READ & ~self.wanted and self.watcher is not None and not self.closed:
            self.watcher(self)
        if self.closed:
            return
        if events & self.wanted and self.task is not None:
            self.task.resume(events & self.wanted)
        else:
            self._watch(self.wanted | (READ if self.watcher else 0))

    def on_deadline(self) -> None:
        self.deadline = NEVER
        if self.task is not None:
            self.task.resume(error=TimeoutError())
        elif self.expire is not None:
            self.expire(self)

    def recv_now(self) -> bytes | None:
        """What is there: b"" at the end, None for nothing yet."""
        try:
            return self.sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None

    async def recv(self, deadline: float) -> bytes:
        # Waiting comes first, for one recv a round of the loop: a fast sender does not keep it to itself.
        if not self.secure or not self.sock.pending():      # type: ignore[attr-defined]
            await self.wait(READ, deadline)
        while (data := self.recv_now()) is None:
            await self.wait(READ, deadline)
        return data

    def has_input(self) -> bool:
        """Whether data, or the end, is there to read."""
        if self.poller is not None:
            return bool(self.poller.poll(0))
        try:
            self.sock.recv(1, socket.MSG_PEEK)
            return True
        except BlockingIOError:
            return False

    def send_now(self, data: bytes | memoryview) -> int:
        try:
            return self.sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0

    async def send(self, data: bytes | memoryview, silence: float) -> None:
        """Sends all; `silence` is the longest time in which the peer takes nothing."""
        view = memoryview(data)
        while view := view[self.send_now(view):]:
            await self.wait(WRITE, time.monotonic() + silence)

    async def start_tls(self, context: ssl.SSLContext, host: str, deadline: float) -> None:
        self._watch(0)
        self.sock = context.wrap_socket(self.sock, server_hostname=host, do_handshake_on_connect=False,
                                        suppress_ragged_eofs=False)
        self.secure = True
        while True:
            try:
                return self.sock.do_handshake()
            except ssl.SSLWantReadError:
                await self.wait(READ, deadline)
            except ssl.SSLWantWriteError:
                await self.wait(WRITE, deadline)

    def close(self, abort: bool = False) -> None:
        """`abort` resets the connection, where a plain end would look like a complete answer."""
        if self.closed:
            return
        self._watch(0)
        self.closed, self.watcher, self.expire = True, None, None
        self.loop.channels.discard(self)
        try:
            if abort:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if os.name == "nt" else "ii", 1, 0))
            self.sock.close()
        except OSError:
            pass


# ----------------------------------------------------------------------------------------------------------------------
# 12. The secret at work, and the upstream: kept connections, requests out, answers in.
#
# Why not http.client: it takes 103 for the answer, and then the next caller gets this one's; it takes two lengths, bare
# LF and negative chunk sizes; and it can't be interrupted when the caller leaves.


class SecretCache:
    """The current secret of one upstream. `learn` is told each new one, and may refuse it."""

    def __init__(self, source: SecretSource, loop: Loop, learn: Callable[[Secret], None]) -> None:
        self.source, self.loop, self.learn = source, loop, learn
        self.secret: Secret | None = None
        self.rejected: Secret | None = None
        self.run: Future | None = None
        self.failure = SecretUnavailable("")
        self.fresh_until = self.failed_until = self.rejected_until = 0.0
        self.serving = False            # before that a failure ends the start, which says it
        self.renewed_at = -NEVER

    def adopt(self, secret: Secret | None) -> None:
        """Raises SecretUnavailable where the secret is also a caller token."""
        if secret is not None:
            self.learn(secret)
        self.secret, self.fresh_until = secret, time.monotonic() + self.source.cache_seconds

    async def get(self) -> Secret | None:
        """The secret to attach. Raises RequestError."""
        try:
            secret = self.secret if time.monotonic() < self.fresh_until else await self.resolve()
        except SecretUnavailable:
            raise RequestError("secret_unavailable", "the broker could not get the provider's key from its source; the reason "
                               "stands in the terminal where the broker runs") from None
        if self.rejected is not None and time.monotonic() < self.rejected_until and same(self.rejected, secret):
            raise self.rejection()
        return secret

    async def resolve(self) -> Secret | None:
        """Asks the source, once for all who wait. Raises SecretUnavailable; for some seconds again without asking."""
        if self.run is None:
            if time.monotonic() < self.failed_until:
                raise self.failure
            self.run = self.loop.in_thread(self.source.resolve, then=self._resolved)
        await self.run.wait()
        if time.monotonic() < self.failed_until:
            raise self.failure
        return self.secret

    def _resolved(self, secret: Secret | None, error: Exception | None) -> None:
        self.run = None
        try:
            if error is not None:
                raise error
            self.adopt(secret)
        except Exception as failure:
            self.failure = failure if isinstance(failure, SecretUnavailable) else SecretUnavailable(type(failure).__name__)
            self.failed_until = time.monotonic() + FAILURE_SECONDS
            if self.serving:
                say(f"broker: the secret is not available: {self.failure}")

    async def renew(self, used: Secret) -> Secret:
        """For a secret that was rejected: another one if the source has one by now, else the same."""
        if same(self.secret, used) and (self.run is not None or time.monotonic() >= self.renewed_at + RENEWAL_SECONDS):
            self.renewed_at = time.monotonic()
            try:
                await self.resolve()
            except SecretUnavailable:
                pass                    # it has been said; the old one stays
        return self.secret or used

    def reject(self, secret: Secret) -> RequestError:
        self.rejected, self.rejected_until = secret, time.monotonic() + FAILURE_SECONDS
        say("broker: the upstream rejects the secret (401): check the key in its store; then wait, or send SIGHUP")
        return self.rejection()

    @staticmethod
    def rejection() -> RequestError:
        return RequestError("upstream_rejected_secret", "the provider rejects the key that the broker holds (401). Your caller "
                            "token is fine: whoever runs the broker has to check the key at its source")


def outbound_head(head: RequestHead, size: int, upstream: UpstreamConfig, secret: Secret | None) -> bytes:
    """The request's head for the upstream: strip what the caller brought, attach ours last.

    Stripping comes first, so that a caller can't name our headers in `Connection` and have them removed.
    """
    length = f"Content-Length: {size}\r\n" if size or head.method in ("POST", "PUT", "PATCH") else ""
    extra = "".join([f"{name}: {value}\r\n" for name, value in upstream.extra_headers.items()])
    scheme = f"{upstream.auth_scheme} " if upstream.auth_scheme else ""
    credential = f"{upstream.auth_header}: {scheme}{secret.reveal()}\r\n" if secret is not None else ""
    # Accept-Encoding: the secret can't be found in a compressed answer.
    return (f"{head.method} {upstream.path}{head.target} HTTP/1.1\r\nHost: {upstream.authority}\r\n"
            f"{head.headers.end_to_end(REQUEST_DROPPED, upstream.own_headers)}{length}Accept-Encoding: identity\r\n"
            f"{extra}{credential}\r\n").encode("latin-1")


def protocol_error(reason: object) -> RequestError:
    return RequestError("upstream_protocol_error", f"the provider's answer is not proper HTTP: {reason}")


def only_interim(data: bytes) -> bool:
    """Whether what came while a body is still being sent are interim answers (100, 103) alone, maybe one not yet whole."""
    heads = data.split(b"\r\n\r\n")
    return len(data) <= UPSTREAM_HEAD_LIMIT and len(heads) <= INTERIM_LIMIT + 1 and all(
        b"HTTP/1.1 1".startswith(head[:10]) or b"HTTP/1.0 1".startswith(head[:10]) for head in heads)


class Stale(Exception):
    """The upstream closed before a byte of answer. `unread`: nothing of the request can have arrived."""

    def __init__(self, unread: bool = False) -> None:
        self.unread = unread


class Upstream:
    """One provider's address: its connections, and how a request gets there."""

    def __init__(self, config: UpstreamConfig, proxy: tuple[str, int, str] | None, loop: Loop) -> None:
        self.config, self.loop = config, loop
        self.idle: list[Channel] = []
        self.context: ssl.SSLContext | None = None
        self.proxy = proxy

    async def ask(self, head: RequestHead, raw: bytes, body: bytes | bytearray, timeout: float) -> Answer:
        """Sends the request and returns the answer when its head is there. Raises RequestError."""
        kept = self._take_idle()
        while True:
            channel = kept or await self.connect()
            try:
                complete = await self._send(channel, [raw, body] if len(body) > 16 * KIB else [raw + body], timeout)
                answer = await receive_answer(channel, head.method, timeout)
                answer.reusable &= complete
                return answer
            except Stale as stale:
                channel.close()
                # RFC 9112 section 9.3.1: only what is safe to repeat is repeated, and only for a kept connection.
                if kept is None or not (stale.unread or head.method in ("GET", "HEAD")):
                    raise RequestError("upstream_unreachable", f"{self.config.authority} closed the connection before it "
                                       "answered; the request may have been carried out") from None
                kept = None             # not another kept one, which may be on its way out as well
            except TimeoutError:
                channel.close()
                raise RequestError("upstream_timeout", f"{self.config.authority} did not answer within {timeout:g} seconds "
                                   "(upstream_timeout_seconds in the broker's configuration)") from None
            except BaseException:
                channel.close()
                raise

    @staticmethod
    async def _send(channel: Channel, pieces: list[Any], silence: float) -> bool:
        """Whether all was taken; if not, the upstream has answered before (413, say), or closed."""
        sent = 0
        for view in pieces:
            while view:
                try:
                    count = channel.send_now(view)
                    if count < len(view) and await channel.wait(READ | WRITE, time.monotonic() + silence) & READ:
                        said = channel.recv_now()
                        channel.buffer += said or b""
                        if said == b"" or not only_interim(channel.buffer):
                            return False
                except TimeoutError:
                    raise
                except OSError:
                    if not sent:
                        raise Stale(unread=True) from None
                    return False        # what it said before it closed may still be there to read
                sent += count
                view = memoryview(view)[count:] if count < len(view) else b""
        return True

    def _take_idle(self) -> Channel | None:
        """A kept connection on which nothing has happened since; one that was closed is noticed here."""
        while self.idle:
            channel = self.idle.pop()
            channel.expire, channel.watcher, channel.deadline = None, None, NEVER
            try:
                # TLS looks through its own layer, for session tickets that are still to be read.
                quiet = channel.recv_now() is None if channel.secure else not channel.has_input()
            except OSError:
                quiet = False
            if quiet:
                return channel
            channel.close()
        return None

    def keep(self, channel: Channel) -> None:
        """Takes a connection back whose answer was read exactly to its end."""
        if len(self.idle) >= UPSTREAM_IDLE_CONNECTIONS:
            return channel.close()
        self.idle.append(channel)
        if channel.poller is None and not channel.secure and hasattr(select, "poll"):
            channel.poller = select.poll()
            channel.poller.register(channel.sock, select.POLLIN)
        channel.expire = self._drop
        channel.watch_input(self._on_input)
        channel.set_deadline(time.monotonic() + IDLE_SECONDS)

    def _drop(self, channel: Channel) -> None:
        self.idle.remove(channel)
        channel.close()

    def _on_input(self, channel: Channel) -> None:
        """An idle connection that is closed, or talks unasked, is of no use; but TLS may have had its own to say."""
        try:
            if channel.secure and channel.recv_now() is None:
                return
        except OSError:
            pass
        self._drop(channel)

    async def connect(self) -> Channel:
        """A new connection, TLS and proxy included. Raises RequestError."""
        host, port, _ = self.proxy or (self.config.host, self.config.port, "")
        addresses = await self._look_up(host.strip("[]"), port)
        deadline = time.monotonic() + UPSTREAM_CONNECT_SECONDS
        channel = None
        try:
            channel = await self._open(addresses, deadline)
            if self.proxy is not None:
                await self._tunnel(channel, self.proxy[2], deadline)
            if self.config.secure:
                await self._start_tls(channel, deadline)
            return channel
        except BaseException as error:
            if channel is not None:
                channel.close()
            if isinstance(error, TimeoutError):
                raise RequestError("upstream_timeout", f"no connection to {self.config.authority} within "
                                   f"{UPSTREAM_CONNECT_SECONDS} seconds") from None
            if isinstance(error, OSError):
                raise RequestError("upstream_unreachable",
                                   f"no connection to {host}:{port}: {error.strerror or 'it failed'}") from None
            raise

    async def _look_up(self, host: str, port: int) -> list[tuple[Any, Any]]:
        if host == "localhost":         # never asked of a name server: the key would go where it says
            return [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port))]
        numeric = ":" in host or host.replace(".", "").isdigit()
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = look_up(flags=socket.AI_NUMERICHOST) if numeric else await self.loop.in_thread(look_up).wait()
        except (OSError, UnicodeError):
            raise RequestError("upstream_unreachable", f"the name {host} can't be resolved: is the network up?") from None
        return [(family, address) for family, _, _, _, address in found]

    async def _open(self, addresses: list[tuple[Any, Any]], deadline: float) -> Channel:
        """The first address that answers; each gets an equal share of the time that is left."""
        failure = OSError(0, "it has no address")
        for at, (family, address) in enumerate(addresses):
            channel = None
            try:
                channel = Channel(self.loop, socket.socket(family, socket.SOCK_STREAM))
                channel.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                code = channel.sock.connect_ex(address)
                if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
                    now = time.monotonic()
                    await channel.wait(WRITE, now + (deadline - now) / (len(addresses) - at))
                    code = channel.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return channel
                failure = OSError(code, os.strerror(code))
            except OSError as error:
                failure = error
            except BaseException:
                if channel is not None:
                    channel.close()
                raise
            if channel is not None:
                channel.close()
        raise failure

    async def _tunnel(self, channel: Channel, authorization: str, deadline: float) -> None:
        target = f"{self.config.host}:{self.config.port}"
        await channel.send(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorization}\r\n".encode(), deadline)
        try:
            head = AnswerHead(await read_head(channel, deadline, UPSTREAM_HEAD_LIMIT))
        except (Malformed, EOFError):
            raise OSError(0, "the proxy gave no proper answer to CONNECT") from None
        if not 200 <= head.status < 300 or channel.buffer:
            raise OSError(0, f"the proxy refused CONNECT with status {head.status}")

    async def _start_tls(self, channel: Channel, deadline: float) -> None:
        """Attack: somebody in the network's path. Host name and certificate are always checked."""
        if self.context is None:
            # A bare context, for create_default_context() writes the keys where SSLKEYLOGFILE says.
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self.context.minimum_version = ssl.TLSVersion.TLSv1_2
            self.context.load_default_certs()
            self.context.set_alpn_protocols(["http/1.1"])
            # Python sets it: with OpenSSL 3 an answer that was cut off would read as a complete one.
            self.context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
        try:
            await channel.start_tls(self.context, self.config.host.strip("[]"), deadline)
        except TimeoutError:
            raise
        except ssl.SSLCertVerificationError as error:
            raise RequestError("upstream_tls_error", f"the certificate of {self.config.authority} is not valid: "
                               f"{error.verify_message}. Is a proxy in the way, or SSL_CERT_FILE missing?") from None
        except OSError as error:
            reason = getattr(error, "reason", None) or "the connection was closed"
            raise RequestError("upstream_tls_error", f"no TLS with {self.config.authority}: {reason}") from None


def find_proxy(config: UpstreamConfig) -> tuple[str, int, str] | None:
    """(host, port, header) of the proxy that the environment names for the upstream, as urllib reads it.

    Attack: in urllib `http_proxy` applies to 127.0.0.1 too; a loopback upstream's key would go there readable.
    """
    named = any(name.lower() == "https_proxy" for name in os.environ) or sys.platform in ("win32", "darwin")
    if config.is_loopback or not named:
        return None                     # urllib.request would cost 30 ms at every start to say the same
    import urllib.request
    url = urllib.request.getproxies().get("https")
    if not url or urllib.request.proxy_bypass(f"{config.host.strip('[]')}:{config.port}"):
        return None
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme not in ("http", "https") or not HOST_NAME.fullmatch(f"[{host}]" if ":" in host else host):
            raise ValueError
    except ValueError:
        raise ConfigError("HTTPS_PROXY: must be http://[user:password@]host[:port]: SOCKS is not supported") from None
    if parts.username is None:
        return host, port, ""
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return host, port, f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"


async def receive_answer(channel: Channel, method: str, timeout: float) -> Answer:
    """The final answer's head; interim ones are dropped. Raises RequestError, Stale and TimeoutError."""
    deadline, limit = time.monotonic() + timeout, UPSTREAM_HEAD_LIMIT
    for _ in range(INTERIM_LIMIT + 1):
        try:
            head = AnswerHead(await read_head(channel, deadline, limit))
        except TimeoutError:
            raise
        except Malformed as error:
            raise protocol_error(error) from None
        except (EOFError, OSError):
            if limit < UPSTREAM_HEAD_LIMIT or channel.buffer:
                raise protocol_error("it ends in its head") from None
            raise Stale from None
        limit -= len(head.raw)
        if head.status == 101:
            break
        if head.status >= 200:
            answer = Answer(channel, head, method, timeout)
            coding = "several" if "content-encoding" in head.repeated else head.fields.get("content-encoding", "identity")
            if not answer.has_no_body and coding.lower() != "identity":
                raise protocol_error("its body is compressed although identity was asked for")
            return answer
    raise protocol_error("it switches protocols, or sends too many interim answers")


class Answer:
    """An answer from the upstream: its head, and its body piece by piece."""

    def __init__(self, channel: Channel, head: AnswerHead, method: str, timeout: float) -> None:
        self.channel, self.head, self.timeout, self.status = channel, head, timeout, head.status
        self.has_no_body = method == "HEAD" or head.status in (204, 304)
        self.body = Body(0 if self.has_no_body else head.length, head.chunked and not self.has_no_body, strict=False)
        self.announced_length = head.length if head.status != 204 else None
        self.reusable = head.keep_alive

    def end_to_end_lines(self) -> bytes:
        """Status line and headers as they may go on to the caller."""
        lines = self.head.headers.end_to_end(ANSWER_DROPPED, NONE)
        return f"HTTP/1.1 {self.status} {self.head.reason}\r\n{lines}".encode("latin-1")

    def ready(self) -> bytes:
        """The body's bytes that have come. Raises RequestError."""
        if self.body.done:
            return b""
        try:
            data, self.channel.buffer = self.body.take(self.channel.buffer)
        except Malformed as error:
            raise protocol_error(error) from None
        return data

    async def read(self) -> bytes:
        """The next piece of the body, maybe empty. Raises RequestError."""
        try:
            data = await self.channel.recv(time.monotonic() + self.timeout)
        except TimeoutError:
            raise RequestError("upstream_timeout", "the provider fell silent in the middle of its answer") from None
        except OSError:
            raise protocol_error("it was cut off") from None    # a reset, or an end without TLS's own
        if not data:
            if self.body.chunked or self.body.left is not None:
                raise protocol_error("it was cut off")
            self.body.done, self.reusable = True, False
        self.channel.buffer += data
        return self.ready() if data else b""

    def release(self, upstream: Upstream) -> None:
        """Keeps the connection if this answer was read exactly to its end; else closes it."""
        if self.body.done and self.reusable and not self.channel.buffer and not self.channel.closed:
            upstream.keep(self.channel)
        else:
            self.channel.close()


# ----------------------------------------------------------------------------------------------------------------------
# 13. A caller's connection: the map, executed. Order is policy, so it stands here as plain lines.


RUN_ID, COUNTER = os.urandom(4).hex(), itertools.count(1)    # an id tells requests apart, it guards nothing


class Exchange:
    """One request and its answer: id, clock, and what the event log will say of it."""

    head: RequestHead | None = None
    caller: Caller | None = None
    secret: Secret | None = None            # the one that was attached
    unread: Body | None = None              # of the request, what is still to come
    in_flight = False
    reserved = 0                            # bytes of the common body buffer
    logged = False                          # the log has the request line, so it gets a response line
    status: int | None = None               # of the answer whose head has gone out
    outcome = ""
    response_bytes, attempt = 0, 1
    ttfb: float | None = None
    usage: dict[str, int] | None = None
    upstream_request_id: str | None = None

    def __init__(self, log: EventLog) -> None:
        self.log, self.id, self.began = log, f"{RUN_ID}{next(COUNTER):08x}", time.monotonic()

    def log_request(self, head: RequestHead, facts: BodyFacts, size: int, mode: str) -> None:
        """Raises RequestError when the log does not take it: what is not written down is not sent."""
        try:
            self.log.append("request", {
                "id": self.id, "client": self.caller.name if self.caller else None, "method": head.method, "path": head.path,
                "mode": mode, "model": facts.model, "stream": facts.stream, "request_bytes": size})
        except OSError as error:
            say(f"broker: the event log can't be written, requests are refused: {self.log.path}: {error.strerror}")
            raise RequestError("event_log_unavailable", "the broker can't write its event log, and without it nothing is sent: "
                               "whoever runs the broker has to make room, or mend the file's permissions") from None
        self.logged = True

    def milliseconds(self) -> float:
        return round((time.monotonic() - self.began) * 1000, 3)

    def finish(self) -> None:
        """Writes the response line. The answer has gone out: an unwritable log can only be told."""
        if self.logged:
            write_event(self.log, "response", {
                "id": self.id, "status": self.status, "outcome": self.outcome, "response_bytes": self.response_bytes,
                "ttfb_ms": self.ttfb, "duration_ms": self.milliseconds(), "usage": self.usage,
                "upstream_request_id": self.upstream_request_id, "attempt": self.attempt})


def write_event(log: EventLog, event: str, fields: dict[str, Any]) -> None:
    """A line that nothing depends on: where it can't be written, stderr says so."""
    try:
        log.append(event, fields)
    except OSError as error:
        say(f"broker: the event log can't be written: {log.path}: {error.strerror}")


class Connection:
    """A caller's connection: one request after the other."""

    def __init__(self, broker: Broker, sock: socket.socket) -> None:
        self.broker, self.channel = broker, Channel(broker.loop, sock)
        self.task: Task | None = None
        self.looking = False                # for the end of a caller that pipelines a lot

    async def serve(self) -> None:
        self.task = self.broker.loop.running
        try:
            self.channel.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while await self.serve_one() and not self.broker.stopping:
                pass
        except (ClientDisconnected, OSError):
            pass
        finally:
            self.channel.close()
            self.broker.forget(self)

    def cut(self, reason: Exception) -> None:
        """Ends what the connection is doing. To be called from the loop, not from a task."""
        if self.task is not None and not self.task.done:
            self.task.resume(error=reason)

    async def serve_one(self) -> bool:
        """One request and its answer; True if the connection goes on."""
        while self.channel.buffer in (b"", b"\r\n"):    # RFC 9112 section 2.2: an empty line before a request is let pass
            data = await self.channel.recv(time.monotonic() + IDLE_SECONDS)
            if not data:
                return False
            self.channel.buffer += data
        exchange = Exchange(self.broker.log)
        try:
            return await self.handle(exchange)
        except RequestError as error:
            return await self.refuse(error, exchange)
        except (ClientDisconnected, OSError):
            exchange.outcome = "client_disconnected"
            return False
        except Exception as bug:
            report_bug(bug)
            return await self.refuse(RequestError("internal_error", "the broker has a bug here; the terminal where it runs "
                                                  f"names the place, this request's id is {exchange.id}"), exchange)
        finally:
            self.channel.watch_input(None)
            exchange.finish()
            self.broker.release(exchange, self)

    async def handle(self, exchange: Exchange) -> bool:
        """The map, step by step."""
        broker = self.broker
        head = await self.read_request_head(exchange)                                   # 1
        check_host(head, broker.config)                                                 # 2
        check_not_a_web_page(head)                                                      # 3
        if head.path in HEALTH_PATHS and head.method in ("GET", "HEAD"):                # 4
            return await self.answer(exchange, 200, JSON_TYPE, [b'{"ok": true}'])
        exchange.caller = identify_caller(head, broker.callers)                         # 5
        broker.waiting.pop(self, None)
        types = broker.config.allowlist.match(head)                                     # 6
        if head.query:
            check_query(head.query)
        broker.take_slot(exchange)
        check_body_head(head, types, broker.config.max_request_bytes)                   # 7
        body = await self.read_body(exchange, head)
        facts = await self.check_body(head, body)
        exchange.log_request(head, facts, len(body), broker.config.mode)                # 8
        self.channel.watch_input(self.on_input)
        if broker.config.dry_run:                                                       # 9
            exchange.outcome = "dry_run"
            kind, pieces = dry_run_answer(head, facts, len(body), broker.config.upstream)
            return await self.answer(exchange, 200, kind, pieces)
        return await self.relay(exchange, head, await self.forward(exchange, head, body))       # 10-12

    async def read_request_head(self, exchange: Exchange) -> RequestHead:
        try:
            if self.channel.buffer.startswith(b"\r\n"):
                self.channel.buffer = self.channel.buffer[2:]
            raw = await read_head(self.channel, time.monotonic() + HEAD_SECONDS, HEAD_LIMIT)
            head = exchange.head = RequestHead(raw)
        except TooLong as error:
            raise RequestError("headers_too_large", f"not a proper HTTP request: {error}") from None
        except Malformed as error:
            raise RequestError("bad_request", f"not a proper HTTP request: {error}") from None
        except EOFError:
            raise ClientDisconnected from None
        except TimeoutError:
            raise RequestError("request_timeout", f"the request's head took longer than {HEAD_SECONDS} seconds") from None
        if head.length or head.chunked:
            exchange.unread = Body(head.length, head.chunked, strict=True)
        return head

    async def read_body(self, exchange: Exchange, head: RequestHead) -> bytes | bytearray:
        """The whole body, as it came; for a chunked one its content."""
        source, began, limit = exchange.unread, time.monotonic(), self.broker.config.max_request_bytes
        if source is None:
            return b""
        self.broker.reserve(exchange, head.length or 0)
        if head.fields.get("expect", "").lower() == "100-continue" and head.minor and not self.channel.buffer:
            await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body, data = bytearray(), self.channel.buffer
        try:
            while True:
                piece, rest = source.take(data)
                if head.chunked:
                    self.broker.reserve(exchange, len(piece))
                    if len(body) + len(piece) + (source.left or 0) > limit:
                        raise RequestError("request_too_large", f"the body has more than {limit} bytes (max_request_bytes in "
                                           "the broker's configuration)")
                if source.done:
                    exchange.unread, self.channel.buffer = None, rest
                    if not body:
                        return piece
                body += piece
                if source.done:
                    return body
                now = time.monotonic()
                data = await self.channel.recv(min(now + BODY_SILENCE_SECONDS, began + 60 + len(body) / (64 * KIB)))
                if not data:
                    raise Malformed("it ends in its body")
                data = rest + data
        except Malformed as error:
            raise RequestError("bad_request", f"not a proper HTTP request: {error}") from None
        except TimeoutError:
            raise RequestError("request_timeout", "the request's body came too slowly, or fell silent") from None

    async def check_body(self, head: RequestHead, body: bytes | bytearray) -> BodyFacts:
        """Strict JSON where it is JSON; and never the secret."""
        facts, dry_run = BodyFacts(), self.broker.config.dry_run
        if body and media_type(head.fields["content-type"]) == JSON_TYPE:
            if len(body) > JSON_INLINE_LIMIT:
                facts = await self.broker.loop.in_thread(check_json, body, dry_run).wait()
            else:
                facts = check_json(body, dry_run)
        check_no_secret(head, body, self.broker.redactor)
        return facts

    def on_input(self, channel: Channel) -> None:
        """Something came from the caller while its request is in flight: its leaving, or the next request."""
        if len(channel.buffer) > READ_AHEAD_LIMIT:
            channel.watch_input(None)
            return self.look_for_end()
        try:
            data = channel.recv_now()
        except OSError:
            data = b""
        if data == b"":
            self.cut(ClientDisconnected())
        elif data:
            channel.buffer += data

    def look_for_end(self) -> None:
        """A caller that pipelines more than we read ahead may still leave: where the system tells, we look."""
        if self.looking or self.channel.closed or self in self.broker.waiting or sys.platform != "linux":
            return
        established = 1
        if self.channel.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != established:
            self.cut(ClientDisconnected())
        else:
            def again() -> None:
                self.looking = False
                self.look_for_end()
            self.looking = True
            self.broker.loop.after(0.5, again)

    async def send(self, data: bytes) -> None:
        try:
            if (sent := self.channel.send_now(data)) < len(data):
                await self.channel.send(memoryview(data)[sent:], self.broker.config.upstream_timeout)
        except TimeoutError:
            raise RequestError("request_timeout", "the caller does not take its answer") from None
        except OSError:
            raise ClientDisconnected from None

    async def forward(self, exchange: Exchange, head: RequestHead, body: bytes | bytearray) -> Answer:
        """The upstream's answer; asked once more with a new secret if the first one is rejected."""
        broker, config = self.broker, self.broker.config
        secret = await broker.secrets.get()                                             # 10
        while True:
            exchange.secret = secret
            raw = outbound_head(head, len(body), config.upstream, secret)               # 11
            answer = await broker.upstream.ask(head, raw, body, config.upstream_timeout)
            if answer.status != 401 or secret is None:
                break
            answer.channel.close()
            used, secret = secret, await broker.secrets.renew(secret)
            if exchange.attempt == 2 or same(used, secret):
                raise broker.secrets.reject(used)
            exchange.attempt = 2
        if 300 <= answer.status < 400 and "location" in answer.head.fields:
            # Attack: a redirect would take the credential, or the caller's next request, to another host.
            answer.channel.close()
            raise RequestError("upstream_redirect", f"the provider answered with a redirect ({answer.status}), which is not "
                               "followed: check upstream_base_url in the broker's configuration")
        return answer

    async def relay(self, exchange: Exchange, head: RequestHead, answer: Answer) -> bool:
        """The answer as it arrives: each piece at once, the secret redacted."""
        fields, latest = answer.head.fields, self.broker.redactor
        redactor = latest.also(exchange.secret)
        exchange.upstream_request_id = fields.get("x-request-id") or fields.get("request-id")
        stream, usage = RedactedStream(redactor), UsageReader(fields.get("content-type", ""))
        try:
            data = stream.feed(answer.ready(), answer.body.done)
            whole = answer.body.done
            keep = head.keep_alive and not self.broker.stopping and (whole or head.minor == 1)
            chunked = not whole and head.minor == 1
            length = answer.announced_length if answer.has_no_body else len(data) if whole else None
            framing = "" if length is None else f"Content-Length: {length}\r\n"
            framing = "Transfer-Encoding: chunked\r\n" if chunked else framing
            start = (redactor.clean(answer.end_to_end_lines()) + f"{framing}{own_lines(exchange.id, keep, head)}\r\n".encode())
            exchange.status, exchange.ttfb = answer.status, exchange.milliseconds()
            while True:
                usage.feed(data)
                exchange.response_bytes += len(data)
                if start or data:
                    await self.send(start + (b"%x\r\n%b\r\n" % (len(data), data) if chunked and data else data))
                start = b""
                if answer.body.done:
                    break
                data = await answer.read()
                if latest is not self.broker.redactor:      # a secret was rotated meanwhile
                    latest = self.broker.redactor
                    stream.redactor = latest.also(exchange.secret)
                data = stream.feed(data, answer.body.done)
            if chunked:
                await self.send(b"0\r\n\r\n")
        finally:
            answer.release(self.broker.upstream)
            exchange.usage = usage.finish()
        exchange.outcome = "ok" if answer.status < 400 else "upstream_error"
        return keep

    async def answer(self, exchange: Exchange, status: int, kind: str, pieces: list[bytes], headers: str = "") -> bool:
        """Sends an answer of our own; several pieces go out one by one. True if the connection goes on."""
        head = exchange.head
        # A stranger's connection ends with its refusal: the answer is the same for all of them.
        known = exchange.caller is not None or status == 200
        keep = known and head is not None and head.keep_alive and not exchange.unread and not self.broker.stopping
        exchange.status, exchange.ttfb = status, exchange.milliseconds()
        start = (f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\nDate: "
                 f"{http_date(int(time.time()))}\r\nContent-Length: {sum(map(len, pieces))}\r\n{headers}"
                 f"{own_lines(exchange.id, keep, head)}\r\n").encode("latin-1")
        pieces = [] if head is not None and head.method == "HEAD" else pieces
        exchange.response_bytes = sum(map(len, pieces))
        await self.send(start + b"".join(pieces[:1]))
        for piece in pieces[1:]:
            await self.send(piece)
        if exchange.unread or not known:
            await self.drain(exchange)
        return keep

    async def refuse(self, error: RequestError, exchange: Exchange) -> bool:
        """The one place that answers a RequestError, or cuts the connection where an answer has begun."""
        if exchange.status is not None:
            exchange.outcome = "upstream_aborted"
            self.channel.close(abort=True)
            return False
        exchange.outcome = error.code
        if not exchange.logged:
            self.broker.log_denied(exchange, error)
        self.broker.waiting[self] = None
        detail = {"type": error.code, "code": error.code, "message": self.broker.redactor.text(error.message), "param": None}
        headers = f"X-Broker-Error: {error.code}\r\n{error.headers}" + ("x-should-retry: false\r\n" if error.final else "")
        try:
            return await self.answer(exchange, error.status, JSON_TYPE,
                                     [encode_json({"type": "error", "error": detail}).encode()], headers)
        except (RequestError, ClientDisconnected, OSError):
            return False

    async def drain(self, exchange: Exchange) -> None:
        """Reads what still comes of a refused request, so that no reset overtakes the answer."""
        seconds, limit = DRAIN_STRANGER
        if exchange.caller is not None:
            seconds, limit = DRAIN_CALLER_SECONDS, self.broker.config.max_request_bytes
        deadline, limit = time.monotonic() + seconds, limit - len(self.channel.buffer)
        try:
            self.channel.sock.shutdown(socket.SHUT_WR)
            while limit > 0 and (data := await self.channel.recv(deadline)):
                limit -= len(data)
        except OSError:
            pass


def own_lines(request_id: str, keep: bool, head: RequestHead | None) -> str:
    """The headers that every answer has."""
    connection = "Connection: close\r\n" if not keep else "" if head is None or head.minor else "Connection: keep-alive\r\n"
    return f"X-Broker-Request-Id: {request_id}\r\n{ANSWER_FIXED}{connection}"


@functools.lru_cache(maxsize=2)
def http_date(second: int) -> str:
    """RFC 9110 section 5.6.7; made once a second."""
    import email.utils
    return email.utils.formatdate(second, usegmt=True)


# ----------------------------------------------------------------------------------------------------------------------
# 14. The broker: what all connections share, and the life of the process.


class Listener(http.server.HTTPServer):
    """The port: http.server's own binding and accepting, but a connection goes to the loop, not to a thread."""

    request_queue_size = 1024
    # On Windows SO_REUSEADDR lets another process bind the same port; on POSIX it only lets us come back at once.
    allow_reuse_address = os.name == "posix"
    allow_reuse_port = False

    def __init__(self, broker: Broker, port: int) -> None:
        """Raises OperationalError when the port can't be ours alone."""
        self.broker = broker
        self.guard: socket.socket | None = None
        for _ in range(20 if port == 0 else 1):     # a free port has to be free on ::1 as well
            super().__init__(("127.0.0.1", port), http.server.BaseHTTPRequestHandler, bind_and_activate=False)
            try:
                self.server_bind()
                self.server_activate()
                self.guard = guard_ipv6(self.port)
                return self.socket.setblocking(False)
            except OSError as error:
                failure = error
                self.server_close()
        raise OperationalError(f"port {port} can't be bound ({failure.strerror}): stop the program that has it, on 127.0.0.1 or "
                               "::1, or use --port 0 for any free one")

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    def server_bind(self) -> None:
        # Not HTTPServer's own: that one asks the name server for our host name.
        exclusive(self.socket)
        socketserver.TCPServer.server_bind(self)

    def server_close(self) -> None:
        super().server_close()
        if self.guard is not None:
            self.guard.close()

    def accepting(self, on: bool) -> None:
        loop = self.broker.loop
        if (on and not self.broker.stopping) != (self.socket.fileno() in loop.targets):
            loop.watch(self.socket, READ if on else 0, self)

    def on_events(self, events: int) -> None:
        try:
            self.process_request(*self.get_request())
        except BlockingIOError:
            pass
        except OSError as error:
            say(f"broker: can't accept a connection: {error.strerror}: raise the limit of open files (ulimit -n)")
            self.accepting(False)
            self.broker.loop.after(1, lambda: self.accepting(True))

    def process_request(self, request: Any, client_address: Any) -> None:
        self.broker.accept(request)


def exclusive(sock: socket.socket) -> None:
    if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)


def guard_ipv6(port: int) -> socket.socket | None:
    """Holds the port on ::1 as well, without listening. Attack: another program stands there for "localhost"."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        exclusive(sock)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::1", port))
        return sock
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise
        return None                     # no IPv6 on this machine


class Broker:
    """State that requests share. It is touched by the loop's thread alone, so there are no locks."""

    def __init__(self, config: Config, token: str | None, loop: Loop) -> None:
        self.config, self.loop, self.log = config, loop, EventLog(config.event_log)
        self.redactor = Redactor()      # of the secrets, expired ones too; a token may pass in an answer
        self.upstream = Upstream(config.upstream, None if config.dry_run else find_proxy(config.upstream), loop)
        self.secrets = SecretCache(config.upstream.source, loop, self.learn)
        self.set_token(token)
        self.listener: Listener | None = None
        self.url = f"http://127.0.0.1:{config.listen_port}"
        self.connections: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}   # without a request past the caller check, the longest so first
        self.in_flight = self.buffered = self.most_buffered = 0
        self.denials: dict[str, list[float]] = {}   # code -> [minute's begin, written, suppressed]
        self.stopping = False

    def set_token(self, token: str | None) -> None:
        self.token = self.next_token = token    # the next one: while a reload is under way
        self.callers = [Caller("default", None if token is None else digest(token))]

    def learn(self, secret: Secret) -> None:
        """A new secret: hidden everywhere from now on. Raises SecretUnavailable if it is the caller token too."""
        if any(token is not None and same(Secret(token), secret) for token in (self.token, self.next_token)):
            raise SecretUnavailable("it equals the caller token: give the callers a token of their own, see --new-token")
        if secret.reveal() not in self.redactor.secrets:
            self.redactor = Redactor((*self.redactor.secrets[-7:], secret.reveal()))
            guard_output(*filter(None, (self.token, self.next_token)), secret.reveal())

    def open(self) -> Listener:
        """Takes the port; connections wait in its queue until they are accepted. Raises OperationalError."""
        self.listener = Listener(self, self.config.listen_port)
        self.url = f"http://127.0.0.1:{self.listener.port}"
        return self.listener

    def accept(self, sock: socket.socket) -> None:
        if len(self.connections) >= 4 * self.config.max_concurrent:
            # Attack: idle connections until nobody gets in. The one idle for longest gives way.
            oldest = next(iter(self.waiting), None)
            if oldest is None:
                return sock.close()
            oldest.cut(ClientDisconnected())
        connection = Connection(self, sock)
        self.connections.add(connection)
        self.waiting[connection] = None
        self.loop.spawn(connection.serve())

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.waiting.pop(connection, None)
        if self.stopping and not self.connections:
            self.loop.stopped = True

    def take_slot(self, exchange: Exchange) -> None:
        if self.in_flight >= self.config.max_concurrent:
            raise too_many(f"{self.in_flight} requests are in flight (max_concurrent_requests)")
        self.in_flight += 1
        exchange.in_flight = True

    def reserve(self, exchange: Exchange, size: int) -> None:
        """Room for so many bytes of a body, until the request ends."""
        if self.buffered + size > BUFFERED_LIMIT:
            raise too_many(f"the bodies of all requests together are over {BUFFERED_LIMIT // MIB} MiB")
        self.buffered += size
        self.most_buffered = max(self.most_buffered, self.buffered)
        exchange.reserved += size

    def release(self, exchange: Exchange, connection: Connection) -> None:
        self.in_flight -= exchange.in_flight
        self.buffered -= exchange.reserved
        if self.most_buffered > 4 * MIB and not self.buffered:
            self.most_buffered = 0
            self.loop.after(1, trim_memory)
        self.waiting.setdefault(connection)

    def log_denied(self, exchange: Exchange, error: RequestError) -> None:
        """A refusal's line; a stranger's are written at most DENIALS_A_MINUTE times for each reason."""
        method, path = (exchange.head.method, exchange.head.path) if exchange.head else (None, None)
        fields: dict[str, Any] = {"id": exchange.id, "status": error.status, "reason": error.code, "method": method,
                                  "path": path}
        if exchange.caller is None:
            now = time.monotonic()
            window = self.denials.setdefault(error.code, [now, 0, 0])
            if now - window[0] >= 60:
                window[:2] = now, 0
            if window[1] >= DENIALS_A_MINUTE:
                window[2] += 1
                return
            window[1] += 1
            if window[2]:
                fields["suppressed"], window[2] = int(window[2]), 0
        write_event(self.log, "denied", fields)

    @property
    def lifecycle(self) -> dict[str, Any]:
        """What the events of the process itself say."""
        return {"mode": self.config.mode, "version": __version__, "listen": self.url}

    def stop(self) -> None:
        """No new requests; those in flight get GRACE_SECONDS."""
        def give_up() -> None:
            for connection in list(self.connections):
                connection.cut(RequestError("upstream_timeout", "the broker was stopped before the answer was complete"))
            self.loop.after(1, lambda: setattr(self.loop, "stopped", True))
        self.stopping = True
        if self.listener is not None:
            self.listener.accepting(False)
            self.listener.server_close()
        for connection in list(self.waiting):
            connection.cut(ClientDisconnected())
        self.loop.stopped = not self.connections
        self.loop.after(GRACE_SECONDS, give_up)

    def end(self) -> None:
        """The last lines of the log."""
        for connection in list(self.connections):
            connection.cut(ClientDisconnected())
        for reason, (_, _, suppressed) in self.denials.items():
            if suppressed:
                write_event(self.log, "denied", {"status": ERRORS[reason][0], "reason": reason, "method": None, "path": None,
                                                 "suppressed": int(suppressed)})
        write_event(self.log, "stop", self.lifecycle)

    async def reload(self, own_token: str | None) -> None:
        """SIGHUP: configuration, token and secret anew, and the log's file; what is wrong changes nothing."""
        try:
            self.log.open()
        except OSError as error:
            say(f"broker: reload: the event log can't be opened anew, the old file stays in use: {error.strerror}")
        old = self.config
        try:
            new = load_config(old.file, old.dry_run, old.listen_port)
            check_files(new._replace(dry_run=old.dry_run))
            waits = [key for key in AFTER_RESTART if old.raw.get(key, KEYS[key][0]) != new.raw.get(key, KEYS[key][0])]
            upstream = old.upstream._replace(
                extra_headers=new.upstream.extra_headers, own_headers=old.upstream.own_headers | new.upstream.own_headers,
                auth_scheme=(old if "auth_header" in waits else new).upstream.auth_scheme)      # it belongs to its header
            new = new._replace(raw=old.raw, dry_run=old.dry_run, upstream=upstream, event_log=old.event_log)
            check_together(new)
            token = own_token or caller_token(new) or (self.token if new.client_token_env and old.dry_run else None)
            self.next_token = token
            if not old.dry_run:
                self.secrets.failed_until = 0.0
                await self.secrets.resolve()
        except (ConfigError, SecretUnavailable, ValueError) as error:
            self.next_token = self.token
            what = "the secret is not available: " if isinstance(error, SecretUnavailable) else ""
            return say(f"broker: reload: nothing was changed: {what}{error}")
        self.config = new
        self.set_token(token)
        say("broker: reloaded" + (f"; changed, but only after a restart: {', '.join(waits)}" if waits else ""))
        write_event(self.log, "reload", self.lifecycle)


def too_many(reason: str) -> RequestError:
    return RequestError("too_many_requests_in_flight", f"the broker is full: {reason}; try again in a moment",
                        "Retry-After: 1\r\n")


# ----------------------------------------------------------------------------------------------------------------------
# 15. The process: what it holds is closed to others before the secret is read.

INHERITED_LIMITS: dict[int, tuple[int, int]] = {}       # as they were, for the command that we start


def guard_process() -> str:
    """No memory for other processes of this user, no core file. Returns what could not be had."""
    try:
        import resource
    except ImportError:
        pass                            # Windows: it has neither
    else:
        for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 65536)):
            soft, hard = INHERITED_LIMITS[limit] = resource.getrlimit(limit)
            wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
            try:
                resource.setrlimit(limit, (wanted if most == 0 else max(soft, wanted), hard))
            except (OSError, ValueError):
                pass                    # macOS caps open files elsewhere
    if sys.platform != "linux":
        return "on this system other programs of your user may read the broker's memory: only Linux lets it forbid that"
    import ctypes
    pr_set_dumpable = 4
    if ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0):
        return "the process could not be made non-dumpable: other programs of your user may read its memory"
    return ""


def trim_memory() -> None:
    """Gives back what glibc would keep: after compiling this file 5 MB, after many long bodies 80 MB."""
    if sys.platform == "linux":
        import ctypes
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def check_files(config: Config) -> list[str]:
    """Who else could change what we run. Returns warnings; raises ConfigError in proxy mode.

    Attack: another user edits the configuration, which can run commands and redirect the key.
    """
    warnings: list[str] = []
    paths = {os.path.realpath(path) for path in (config.file, __file__)} if os.name == "posix" else set()
    for path in sorted(paths | {os.path.dirname(path) for path in paths}):
        found = os.stat(path)
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        if found.st_mode & stat.S_IWOTH and not sticky:
            problem = f"{path}: every user of this machine may write it, and could so redirect the key: chmod o-w {path}"
            if not config.dry_run:
                raise ConfigError(problem)
            warnings.append(problem)
        if found.st_uid not in (os.geteuid(), 0):
            warnings.append(f"{path} belongs to another user, who can change what the broker does")
        if found.st_mode & stat.S_IWGRP and found.st_gid != os.getegid() and not sticky:
            warnings.append(f"{path} may be written by a group that is not your own: chmod g-w {path}")
    return warnings


def caller_token(config: Config, required: bool = True) -> str | None:
    """The token that callers must show; None where there is none. Raises ConfigError."""
    name = config.client_token_env
    token = take_variable(name) if name is not None else None
    if name is None or (not token and (config.dry_run or not required)):
        return None
    where = f'{config.file}: "client_token_env" names {name}, '
    if not token:
        raise ConfigError(f'{where}which is not set: export {name}="$(python broker.py --new-token)" in the shell that starts '
                          "the broker")
    if not re.fullmatch(r"[!-~]{16,4096}", token):
        raise ConfigError(f"{where}whose value is not at least 16 visible ASCII characters: make one with --new-token")
    guard_output(token)
    return token


def new_token() -> str:
    """256 random bits, for humans to copy."""
    return base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()


class Signals:
    """Signals arrive in the loop, as calls. Before it runs they end the program."""

    NAMES = [name for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP") if hasattr(signal, name)]

    def __init__(self, loop: Loop) -> None:
        self.loop, self.count = loop, 0
        self.handlers: dict[int, Callable[[int], Any]] = {}
        signal.set_wakeup_fd(loop.wake_writer.fileno(), warn_on_full_buffer=False)
        for name in self.NAMES:
            signal.signal(getattr(signal, name), self._arrived)

    def on(self, handler: Callable[[int], Any], *names: str) -> None:
        self.handlers.update({getattr(signal, name): handler for name in names if name in self.NAMES})

    def _arrived(self, number: int, frame: Any) -> None:
        if number in self.handlers:
            self.loop.soon(functools.partial(self.handlers[number], number))
        elif number != getattr(signal, "SIGHUP", None):
            raise KeyboardInterrupt(number)

    def stop(self, broker: Broker, number: int) -> None:
        """The first one stops, the second one ends at once."""
        self.count += 1
        if self.count == 1:
            return broker.stop()
        kill_running_commands()
        os._exit(128 + number)


# ----------------------------------------------------------------------------------------------------------------------
# 16. Commands.
#
# To add a command: one function that returns an exit code, and its line in `main`.

# To add a client: (paths of the allowlist, what its SDK reads its base URL and key from).
OPENAI = {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": "{token}"}
CLIENT_VARIABLES = (
    (r"/v1/(?:chat/completions|responses|embeddings|completions)", OPENAI),
    (r"/v1/messages", {"ANTHROPIC_BASE_URL": "{url}", "ANTHROPIC_AUTH_TOKEN": "{token}", "ANTHROPIC_API_KEY": "{token}"}),
    (r"/openai/deployments/.*", {"AZURE_OPENAI_ENDPOINT": "{url}", "AZURE_OPENAI_API_KEY": "{token}"}),
    (r".*:generateContent", {"GOOGLE_GEMINI_BASE_URL": "{url}", "GEMINI_API_KEY": "{token}"}),
)


def client_variables(allowlist: Allowlist, url: str, token: str) -> dict[str, str]:
    """What points the SDKs that the allowlist serves at the broker."""
    return {name: value.format(url=url, token=token) for pattern, variables in CLIENT_VARIABLES
            if any(rule.method == "POST" and re.fullmatch(pattern, rule.path) for rule in allowlist.rules)
            for name, value in variables.items()}


def start_command(argv: list[str], broker: Broker, token: str) -> Popen:
    """Starts the caller's command as its shell would have, in our environment less all that is secret. Raises OSError."""
    hidden = {digest(value) for value in (token, *TAKEN.values(), *OUTPUT_REDACTOR.secrets) if value}
    environment = {name: value for name, value in os.environ.items() if digest(value) not in hidden
                   and name not in (broker.config.client_token_env, broker.config.upstream.source.variable)}
    environment.update(client_variables(broker.config.allowlist, broker.url, token), BROKER_URL=broker.url,
                       BROKER_CLIENT_TOKEN=token)
    if re.fullmatch(r"claude(\.\w+)?", os.path.basename(argv[0])):
        environment.pop("ANTHROPIC_API_KEY", None)      # it would ask about it at every start
    for name in ("NO_PROXY", "no_proxy"):
        if environment.get(name) != "*":
            environment[name] = ",".join(filter(None, (environment.get(name), "127.0.0.1,localhost")))
    import subprocess

    def as_inherited() -> None:
        import resource
        for limit, values in INHERITED_LIMITS.items():
            resource.setrlimit(limit, values)
        for name in Signals.NAMES:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    return subprocess.Popen(argv, env=environment, preexec_fn=as_inherited if os.name == "posix" else None)


class Started(NamedTuple):
    """What stands before the first request."""
    broker: Broker
    token_is_random: bool               # for this run
    warnings: list[str]


def prepare(config: Config, loop: Loop, own_token: bool) -> Started:
    """All that can fail before the port is taken, in the order in which a user can mend it."""
    warnings = check_files(config)
    unguarded = guard_process()
    token = caller_token(config, required=not own_token)
    value = take_variable(config.upstream.source.variable or "")
    if value:
        guard_output(value.rstrip("\r\n"))
        if token is not None and digest(value.rstrip("\r\n")) == digest(token):
            raise ConfigError(f'{config.file}: "client_token_env": the caller token equals the secret: give the callers a '
                              "token of their own, see --new-token")
    random = own_token or (token is None and config.client_token_env is not None)
    if random:
        token = new_token()
        if own_token:
            guard_output(token)
    if not config.dry_run:
        warnings += [*proxy_warnings(config, token), *filter(None, [unguarded])]
        try:
            source = find_program(config.upstream.source, os.path.dirname(config.file))
        except SecretUnavailable as error:
            raise unavailable(config, error) from None
        config = config._replace(upstream=config.upstream._replace(source=source))
    return Started(Broker(config, token, loop), random, warnings)


def unavailable(config: Config, error: SecretUnavailable) -> OperationalError:
    return OperationalError(f'{config.file}: "secret_source": the secret is not available: {error}')


def resolve_at_start(broker: Broker, signals: Signals) -> None:
    """So that a vault asks now, and not in the middle of the work. Raises OperationalError, and KeyboardInterrupt."""
    loop, outcome = broker.loop, []     # type: Loop, list[Any]

    async def resolve() -> None:
        try:
            await broker.secrets.resolve()
        except SecretUnavailable as error:
            outcome.append(unavailable(broker.config, error))
        loop.stopped = True

    def interrupt(number: int) -> None:
        outcome.append(KeyboardInterrupt(number))
        loop.stopped = True
    if not broker.config.dry_run:
        signals.on(interrupt, "SIGINT", "SIGTERM", "SIGBREAK")
        loop.spawn(resolve())
        loop.run()
        if outcome:
            raise outcome[0]
        loop.stopped, broker.secrets.serving = False, True


def proxy_warnings(config: Config, token: str | None) -> Iterable[str]:
    """What weakens the broker in this configuration, a line each."""
    if token is None:
        yield "no caller token (client_token_env is null): any program on this machine may use the key"
    if config.upstream.source.kind == "env":
        yield (f"the secret comes from the environment ({config.upstream.source.variable}): an agent started in the same shell "
               "can read it there; a command (1Password, Azure Key Vault) keeps it out")
    folder = os.path.dirname(os.path.realpath(config.file))
    while folder != os.path.dirname(folder) and not os.path.exists(os.path.join(folder, ".git")):
        folder = os.path.dirname(folder)
    if os.path.exists(os.path.join(folder, ".git")):
        yield f"the configuration lies in a git work tree ({folder}): an agent that works there can change it"
    for host in sorted(config.allowed_hosts):
        if not LOOPBACK.fullmatch(host) and not host.endswith(".localhost"):
            yield f"allowed_hosts has {host}, which a network could answer for: a web page under that name passes the check"
    if wide := [rule.text for rule in config.allowlist.rules if rule.is_wide]:
        yield f"wide paths in allowed_paths reach stored data or open-ended jobs: {', '.join(wide)}"


def describe(broker: Broker) -> Iterable[str]:
    """What is allowed, in plain words: the lines that --check and a start have in common."""
    config, upstream = broker.config, broker.config.upstream
    yield f"mode: {config.mode}" + (" (no secret is read, nothing is sent)" if config.dry_run else "")
    yield f"upstream: {upstream.url}, with {upstream.describe_credential()}"
    for rule in config.allowlist.rules:
        yield f"allowed: {rule.text}"
    if config.dry_run:
        return
    if upstream.source.kind == "command":
        yield f"secret command: {upstream.source.options['argv'][0]}"
    if broker.upstream.proxy is not None:
        yield "proxy from the environment: {}:{}".format(*broker.upstream.proxy)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if os.environ.get(name) and upstream.secure:
            yield f"trust store from the environment: {name}={os.path.abspath(os.environ[name])}"


def paste_lines(started: Started) -> Iterable[str]:
    """Lines for a shell: the token, a call, an SDK."""
    broker, variable = started.broker, started.broker.config.client_token_env
    if started.token_is_random and variable:
        yield f"export {variable}={broker.token}"
    rules = broker.config.allowlist.rules
    rule = next((rule for rule in rules if rule.method == "POST" and rule.type == JSON_TYPE), rules[0])
    call = f"curl {broker.url}{rule.path.replace('*', 'NAME')}" + (f' -H "X-Broker-Token: ${variable}"' if variable else "")
    if rule.method != "POST":
        call += f" -X {rule.method}"
    elif rule.type == JSON_TYPE:
        call += (' -H "anthropic-version: 2023-06-01"' if "/messages" in rule.path else "") + (
            """ -H "Content-Type: application/json" -d '{"model": "MODEL", "max_tokens": 64, """
            """"messages": [{"role": "user", "content": "hello"}]}'""")
    yield call
    settings = client_variables(broker.config.allowlist, broker.url, f'"${variable}"' if variable else "unused")
    if settings:
        yield f"export {' '.join(f'{name}={value}' for name, value in settings.items())}"


def serve(config: Config, command: list[str]) -> int:
    """Serves until a signal, or for as long as the command runs."""
    loop = Loop()
    signals = Signals(loop)
    started = prepare(config, loop, own_token=bool(command))
    broker = started.broker
    listener = broker.open()
    try:
        broker.log.open()
        resolve_at_start(broker, signals)
        broker.log.append("start", broker.lifecycle)
    except OSError as error:
        raise OperationalError(f'{config.file}: "event_log": {config.event_log} can\'t be written ({error.strerror}): make its '
                               "folder, or name another file") from None
    signals.on(functools.partial(signals.stop, broker), "SIGINT", "SIGTERM", "SIGBREAK")
    signals.on(lambda number: loop.spawn(broker.reload(broker.token if command else None)), "SIGHUP")
    code = 0
    trim_memory()
    listener.accepting(True)
    if command:
        code = run_command(command, broker, signals)
    else:
        for line in (*(f"broker: warning: {warning}" for warning in started.warnings),
                     f"broker {__version__} listens on {broker.url}", *(f"  {line}" for line in describe(broker)),
                     "Stop it with Ctrl-C. To paste into another shell:", *(f"  {line}" for line in paste_lines(started))):
            say(line)
        loop.run()
    broker.end()
    return code


def run_command(command: list[str], broker: Broker, signals: Signals) -> int:
    """Serves while the command runs; returns what a shell would call its exit code."""
    loop = broker.loop
    signals.on(lambda number: process.terminate(), "SIGTERM")
    signals.on(lambda number: None, "SIGINT", "SIGBREAK")       # the terminal sends it to the command as well
    try:
        process = start_command(command, broker, broker.token or "")
    except (OSError, ValueError) as error:
        say(f"broker: error: the command {command[0]!r} can't be run: {getattr(error, 'strerror', None) or error}")
        return 127 if isinstance(error, FileNotFoundError) else 126

    def wait() -> None:
        process.wait()
        loop.soon(lambda: setattr(loop, "stopped", True))
    threading.Thread(target=wait, daemon=True).start()
    loop.run()
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def check(config: Config) -> int:
    """--check: all that a start does, but for the port and files; says it in plain words."""
    loop = Loop()
    signals = Signals(loop)
    started = prepare(config, loop, own_token=False)
    broker, variable = started.broker, config.client_token_env
    try:
        broker.log.check()
    except OSError as error:
        raise OperationalError(f'{config.file}: "event_log": {config.event_log} can\'t be written: {error.strerror}') from None
    resolve_at_start(broker, signals)
    token = ("none: any program on this machine may use the key" if variable is None else
             "a random one for each run" if started.token_is_random else f"from environment variable {variable}")
    for line in (f"{config.file} is valid", *describe(broker), f"listens on: {broker.url}", f"caller token: {token}",
                 f"hosts a caller may use: {', '.join(sorted(config.allowed_hosts))}", f"event log: {config.event_log}",
                 *(f"warning: {warning}" for warning in started.warnings)):
        print(printable(line))
    if config.dry_run:
        return 0
    if config.upstream.source.kind != "none":
        print("the secret was resolved")
    broker.loop.spawn(check_upstream(broker, outcome := []))    # type: ignore[var-annotated]
    broker.loop.run()
    if not outcome:
        raise KeyboardInterrupt
    if isinstance(outcome[0], RequestError) and outcome[0].code == "upstream_tls_error":
        raise OperationalError(outcome[0].message)
    print(printable(f"the upstream can't be reached now: {outcome[0].message}" if isinstance(outcome[0], RequestError)
                    else f"the upstream can be reached{outcome[0]}"))
    return 0


async def check_upstream(broker: Broker, outcome: list[Any]) -> None:
    """Connects, sends nothing: appends what the certificate says, or the RequestError."""
    try:
        channel = await broker.upstream.connect()
        found = channel.sock.getpeercert() if channel.secure else {}    # type: ignore[attr-defined]
        issuer = ", ".join(value for part in found.get("issuer", ()) for name, value in part
                           if name in ("organizationName", "commonName"))
        outcome.append(f"; its certificate is valid until {found['notAfter']}, issued by {issuer}" if found else "")
        channel.close()
    except RequestError as error:
        outcome.append(error)
    finally:
        broker.loop.stopped = True


class Tally:
    """A row of the report."""

    def __init__(self) -> None:
        self.requests = self.errors = self.input_tokens = self.output_tokens = 0
        self.denied: collections.Counter[str] = collections.Counter()
        self.durations: list[float] = []


def report(config: Config) -> int:
    """--report: the event log as a table."""
    rows: dict[tuple[str, str, str], Tally] = collections.defaultdict(Tally)
    pending: dict[str, tuple[str, str, str]] = {}       # requests without their response yet
    unreadable = 0
    try:
        with open(config.event_log, "rb") as stream:
            for line in stream:
                try:
                    tally_event(json.loads(line), rows, pending)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
                    unreadable += 1
    except OSError as error:
        raise OperationalError(f"{config.event_log} can't be read ({error.strerror}): has the broker run yet?") from None
    table = [("client", "path", "model", "requests", "denied", "errors", "p50 ms", "p95 ms", "tokens in", "tokens out")]
    for key, row in sorted(rows.items()):
        denied = " ".join(f"{reason}:{count}" for reason, count in sorted(row.denied.items())) or "0"
        table.append((*key, str(row.requests), denied, str(row.errors), nearest_rank(row.durations, 50),
                      nearest_rank(row.durations, 95), str(row.input_tokens), str(row.output_tokens)))
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print(printable("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()))
    if unreadable:
        print(f"{unreadable} lines could not be read")
    return 0


def tally_event(event: Any, rows: dict[tuple[str, str, str], Tally], pending: dict[str, tuple[str, str, str]]) -> None:
    """Adds one line of the log. Raises ValueError and its like for a line that is not an event."""
    kind = event["event"]
    if kind == "request":
        key = pending[str(event["id"])] = (str(event["client"]), str(event["path"]), str(event["model"] or "-"))
        rows[key].requests += 1
    elif kind == "denied":
        rows["-", str(event["path"] or "-"), "-"].denied[str(event["reason"])] += int(event.get("suppressed", 0)) + (
            "id" in event)              # the line at the stop only carries a count
    elif kind == "response":
        duration, usage = float(event["duration_ms"]), event["usage"] or {}
        tokens = int(usage.get("input_tokens", 0)), int(usage.get("output_tokens", 0))
        row = rows[pending.pop(str(event["id"]), ("-", "-", "-"))]
        row.errors += event["outcome"] not in ("ok", "dry_run", "client_disconnected")
        row.durations.append(duration)
        row.input_tokens += tokens[0]
        row.output_tokens += tokens[1]
    elif kind not in EVENT_FIELDS:
        raise ValueError(kind)


def nearest_rank(values: list[float], percent: int) -> str:
    """The smallest value that `percent` of all do not exceed."""
    return f"{sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]:.1f}" if values else "-"


def parse_arguments(argv: list[str]) -> tuple[Any, list[str]]:
    """The command line: options, and the command behind `--`."""
    import argparse
    at = argv.index("--") if "--" in argv else len(argv)
    command = argv[at + 1:]
    parser = argparse.ArgumentParser(
        prog="broker.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="broker.py [--config FILE] [--dry-run] [--port N] [--check | --report | --new-token] [-- COMMAND [ARG...]]",
        description="A localhost credential broker: it holds the provider's key, your agent does not.",
        epilog="examples:\n"
               "  python broker.py --config broker_config.example.json --dry-run   try it, no key needed\n"
               "  python broker.py --config my.json --check                        is all well?\n"
               "  python broker.py --config my.json                                serve\n"
               "  python broker.py --config my.json -- claude                      serve for this command alone\n\n"
               "exit codes: 0 stopped, 1 an operational failure, 2 wrong usage or configuration;\n"
               "with a command its own (128+n on a signal, 127 not found, 126 not executable)")
    parser.add_argument("--config", metavar="FILE", help="the configuration (default: broker_config.json in this folder, if "
                        "its secret source runs no command)")
    parser.add_argument("--dry-run", action="store_true", help="read no secret and contact no upstream: canned answers")
    parser.add_argument("--port", type=int, metavar="N", help="instead of listen_port; 0 for any free port")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="validate, resolve the secret, say what would be allowed; exit")
    only.add_argument("--report", action="store_true", help="summarise the event log as a table; exit")
    only.add_argument("--new-token", action="store_true", help="print a fresh random caller token; exit")
    parser.add_argument("--version", action="version", version=f"broker.py {__version__}")
    options = parser.parse_args(argv[:at])
    if options.port is not None and not 0 <= options.port <= 65535:
        parser.error("argument --port: must be from 0 to 65535")
    if at < len(argv) and (not command or options.check or options.report or options.new_token):
        parser.error("`--` must be followed by a command, which does not go with --check, --report or --new-token")
    return options, command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Every failure is one line on stderr."""
    options, command = parse_arguments(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")    # a model's name may have any letters, a pipe may not
    ENDING.clear()
    try:
        if options.new_token:
            print(new_token())
            return 0
        file = options.config or "broker_config.json"
        config = load_config(file, options.dry_run, 0 if command and options.port is None else options.port)
        if options.config is None and config.upstream.source.kind == "command":
            # Attack: a cloned folder whose broker_config.json runs a command of its author's.
            raise ConfigError(f'{file}: "secret_source" runs a command, and the file was not named: if you trust it, say '
                              f"--config {file}")
        if options.report:
            return report(config)
        return check(config) if options.check else serve(config, command)
    except (ConfigError, OperationalError) as error:
        say(f"broker: error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as stopped:    # before the broker was ready
        return 128 + stopped.args[0] if command and stopped.args else 0
    except BrokenPipeError:
        return 0
    except Exception as bug:
        report_bug(bug)
        return 1
    finally:
        kill_running_commands()


if __name__ == "__main__":
    # CPython keeps a script's syntax tree, some 6 MB for this one, for as long as the script runs; but it has let it go
    # when it calls the hook for an uncaught exception. So the program runs there, and idles at two thirds of the memory.
    sys.excepthook = lambda *_: sys.exit(main())
    raise RuntimeError("the program runs in the hook")
