#!/usr/bin/env python3
"""broker.py: a localhost credential broker. It holds the key, so read it before you trust it.

An agent that holds a provider's key can leak it. The broker holds the key instead and offers, on 127.0.0.1 only,
an HTTP endpoint that lets listed paths through and attaches the key itself:

    python broker.py --config broker_config.example.json --dry-run      # no key, no network
    python broker.py --config my_config.json -- your-agent              # the agent never sees the key

THE MAP. A request's way, in the order of `Handler.handle_one_request`:

     1  read_head, RequestHead         the bytes are one unambiguous HTTP request       400 408 431
     2  check_host                     it was sent to us by name (DNS rebinding)        403
     3  check_not_a_web_page           no browser made it                               403
     4  HEALTH_PATHS                   /healthz and / say {"ok": true} to anybody
     5  identify_caller                it shows a caller's token                        401
        STATUS_PATH                    /broker says what that caller may do
     6  find_route, check_query        method, path and query are allowed               403 405 426
        Limits.enter                   its caller may ask so often, and there is room  429 503
     7  check_body_head, read_body     size, encoding and type                          408 413 415 503
        check_body, check_no_secret    strict JSON, and the secret is not in it         400 403 413
        check_model, Limits.reserve    its caller may use, and can pay for, the model   403 429
     8  Exchange.log_request           the event log takes it, or it goes no further    503
     9  DryRun.answer                  in dry-run a canned answer, and that is all
    10  SecretCache.get                the secret, from memory or its source            503
    11  outbound_head                  strip what the caller brought, attach ours
    12  Handler.relay                  the answer, as it arrives, the secret redacted   502 504
    13  Exchange.finish                the event log takes the outcome

The secret's own path is short: SECRET_SOURCES -> Secret -> outbound_head and Redactor.
What it does not protect from: hostile code that runs as your own user (it can replace this file), and a caller that
uses the listed paths for something you would not want. README.md says more.
"""
from __future__ import annotations

import os
import sys

if sys.version_info < (3, 9):           # noqa: UP036 (whoever starts it with an older one is told)
    sys.exit("broker: error: Python 3.9 or later is needed, this is {}.{}: start it with a newer one".format(*sys.version_info))
if __name__ == "__main__":
    # Attack: a planted ssl.py or json.py beside this file, in the current folder or where PYTHONPATH points (`-P` exists
    # only since 3.11). Nothing of ours is ever imported but from the interpreter's own folders.
    VERSION = "python{}.{}".format(*sys.version_info)
    LIBRARIES = [os.path.join(prefix, *place) for prefix in (sys.base_prefix, sys.base_exec_prefix) for place in (
        *((folder, *rest) for folder in ("lib", sys.platlibdir)
          for rest in ((VERSION,), (VERSION, "lib-dynload"), (VERSION.replace(".", "") + ".zip",))),
        ("Lib",), ("DLLs",), (VERSION.replace(".", "") + ".zip",))]     # the last three: Windows
    sys.path[:] = [entry for entry in sys.path if entry in LIBRARIES]

import base64
import collections
import contextlib
import copy
import email.utils
import errno
import hashlib
import hmac
import http.server
import itertools
import json
import math
import queue
import re
import select
import signal
import socket
import socketserver
import ssl
import stat
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Container, Iterable, Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

if TYPE_CHECKING:
    import subprocess

__version__ = "2.0.0"

# ----------------------------------------------------------------------------------------------------------------------
# 1. Vocabulary: limits, refusals, and what is told apart by its name. Seconds and bytes unless a name says otherwise.
#
# To add a refusal: one row in ERRORS, a check_... that raises it, and its line in the map.

KIB, MIB = 1024, 1024 * 1024
HEAD_LIMIT, HEADER_COUNT_LIMIT = 32 * KIB, 100      # Node allows 16 KiB; Apache and CPython 100 headers
HEAD_SECONDS = 10                       # from a head's first byte to its last
BODY_SILENCE_SECONDS, BODY_SECONDS, BODY_BYTES_A_SECOND = 30, 60, 64 * KIB
IDLE_SECONDS = 60                       # a caller's connection with nothing said, and a kept upstream one
PATH_LIMIT, QUERY_LIMIT, PARAMETER_LIMIT = 1024, 4096, 100
BUFFERED_LIMIT = 256 * MIB              # all request bodies together
DIGITS_LIMIT, DIGITS_READ = 4300, 300   # of a number in JSON; CPython takes no longer one
JSON_COST_LIMIT = 1_000_000             # `{`, `[` and `,` in a body: what its parsing costs
JSON_LIGHT_BYTES = 64 * KIB             # not worth counting
JSON_HEAVY_BYTES, JSON_HEAVY_COMMAS = MIB, 10_000   # from here on one text is parsed at a time
READ_AHEAD_LIMIT = 64 * KIB             # what a caller may pipeline behind a request in flight
DRAIN_STRANGER, DRAIN_CALLER = (1, 64 * KIB), (10, 64 * MIB)    # how long and how much of a refused body is dropped
UPSTREAM_HEAD_LIMIT, INTERIM_LIMIT = 256 * KIB, 8
CHUNK_LINE_LIMIT, TRAILERS_LIMIT, CHUNK_HEAP = 4 * KIB, 64 * KIB, 256
UPSTREAM_CONNECT_SECONDS, UPSTREAM_IDLE_CONNECTIONS = 10, 64
REJECTION_SECONDS, REJECTION_BYTES, REJECTION_WORDS = 2, 64 * KIB, 200      # of a 401: what is read, and told, of it
RECEIVE_BYTES = 64 * KIB
GRACE_SECONDS, LAST_SECONDS = 30, 1     # for requests in flight at the end; then to hear that they are given up
LOOK_SECONDS = 0.2                      # how often a thread that waits for another one looks up
FAILURE_SECONDS, RENEWAL_SECONDS = 5, 60    # a failed secret is not asked for again; a rejected one resolved anew
SECRET_OUTPUT_LIMIT = 64 * KIB
LOGGED_STRING_LIMIT, LINES_A_MINUTE = 256, 20
SAID_LINES_LIMIT = 1000                 # on their way to a stderr that nobody reads
BYTES_A_TOKEN = 4                       # for an estimate, where nobody counts
TOKENS_ASKED_UNSAID = 4096              # reserved for a request that names no limit of its own
EMBEDDED_NUMBERS_LIMIT = 256 * KIB      # in one canned answer; a caller asks for 2048 * 4096 of them with 10 kB
WHOLE_ANSWER_LIMIT = 64 * KIB           # what of an answer is parsed in one go for its counts
COUNT_DIGITS, KEY_LIMIT = 12, 64        # of a reported count of tokens; of a JSON key that may be one of ours
RETRY_WORTH_SECONDS = 60                # a longer wait is not worth asking again for
REPORT_CELL = 60                        # characters

# `!`: asking again can't help. It becomes `x-should-retry: false`, which the OpenAI and Anthropic SDKs and Claude Code
# obey; without it some of them ask for a minute.
ERRORS = {code.rstrip("!"): (status, code.endswith("!")) for status, codes in {
    400: "bad_request! invalid_json!",
    401: "client_token_required!",
    403: "browser_not_allowed! host_not_allowed! model_not_allowed! path_not_allowed! query_not_allowed! secret_in_request!",
    405: "method_not_allowed!",
    408: "request_timeout",
    413: "request_too_large!",
    415: "content_encoding_not_supported! content_type_not_supported!",
    426: "upgrade_not_supported!",
    429: "budget_exhausted rate_limited",
    431: "headers_too_large!",
    500: "internal_error",
    502: "upstream_protocol_error upstream_redirect! upstream_rejected_secret! upstream_tls_error! upstream_unreachable",
    503: "event_log_unavailable! secret_unavailable! too_many_requests_in_flight",
    504: "upstream_timeout",
}.items() for code in codes.split()}

HEALTH_PATHS, STATUS_PATH = ("/healthz", "/"), "/broker"
JSON_TYPE = "application/json"
BODY_METHODS = ("POST", "PUT", "PATCH")
TOKEN_HEADERS = ("x-broker-token", "authorization", "x-api-key", "api-key", "x-goog-api-key", "xi-api-key")


class Names:
    """Names such as `cookie*`, `*-key` and `via`: lower case, `_` read as `-` (WSGI and CGI servers can't tell them apart)."""

    def __init__(self, text: str) -> None:
        self._exact = frozenset(text.split())
        self._prefixes = tuple(word[:-1] for word in self._exact if word.endswith("*"))
        self._suffixes = tuple(word[1:] for word in self._exact if word.startswith("*"))

    def has(self, name: str) -> bool:
        return name in self._exact or name.startswith(self._prefixes) or name.endswith(self._suffixes)


# Attack: a prompt-injected agent brings a credential of its own (`?key=` is read by Google), names another method or
# path, or bills another organization. The caller brings no authority of its own: one vocabulary for headers and query.
CREDENTIALS = "key token secret auth code authorization *-authorization *api-key *apikey " + " ".join(
    f"{owner}-{what}" for what in ("key", "token", "secret") for owner in (
        "access", "api", "auth", "client", "id", "oauth", "private", "refresh", "secret", "security", "session", "subscription"))
CREDENTIAL_PARAMETERS = Names(f"x-* $* {CREDENTIALS}")
# RFC 9110 section 7.6.1.
HOP_BY_HOP = "connection keep-alive te trailer trailers transfer-encoding upgrade proxy*"
PAYERS = "openai-organization openai-project"
REQUEST_DROPPED = Names(
    "*-key *-token *-secret *-auth cookie* x-http-method* *method-override x-original-* x-rewrite-* x-forwarded-* forwarded via "
    "x-real-ip host origin referer expect http2-settings accept-encoding accept-charset a-im range if-range content-length "
    f"content-encoding x-goog-user-project {PAYERS} {CREDENTIALS} {HOP_BY_HOP}")
REQUEST_KEPT = ("idempotency-key",)     # at the end of a name; it is no credential
# What would give a web page or another origin a hold on the broker's answers, or name the account.
ANSWER_DROPPED = Names(
    "set-cookie* access-control-* www-authenticate alt-svc strict-transport-security clear-site-data refresh report-to "
    "reporting-endpoints nel speculation-rules timing-allow-origin content-security-policy* authentication-info server via "
    f"x-broker-* anthropic-organization-id content-length content-encoding x-content-type-options {PAYERS} "
    f"cross-origin-resource-policy {HOP_BY_HOP}")
ANSWER_FIXED = ("X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\n"
                "Content-Security-Policy: default-src 'none'; sandbox\r\n")
# Headers that a configuration may not set: the broker does.
BROKER_HEADERS = Names(f"host content-length content-type content-encoding accept-encoding expect x-broker-* {HOP_BY_HOP}")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Errors. Raised by checks, turned into an answer or an exit in one place each.


class ConfigError(Exception):
    """Exit 2: wrong usage, wrong configuration, a bad token. One line: the file and the key, what is wrong, and the mend."""


class OperationalError(Exception):
    """Exit 1: port taken, secret not resolvable, log not writable. The text names it and the mend."""


class SecretUnavailable(Exception):
    """503, or exit 1 at start: the secret can't be resolved. The text is for the operator and holds nothing token-like."""


class ClientDisconnected(Exception):
    """The caller has left, or its connection has to end: nobody is there to answer."""


class RequestError(Exception):
    """A refusal, answered with its code; but once an answer's head has gone out, the caller is cut off.

    `message` may be all that the caller's user sees, so it names the mend. `wait` (seconds) becomes Retry-After.
    """

    def __init__(self, code: str, message: str, headers: str = "", wait: int = 0) -> None:
        super().__init__(code)
        self.code, self.message = code, message
        self.status, final = ERRORS[code]
        self.headers = (f"X-Broker-Error: {code}\r\n{headers}" + (f"Retry-After: {wait}\r\n" if wait else "")
                        + ("x-should-retry: false\r\n" if final or wait > RETRY_WORTH_SECONDS else ""))


# ----------------------------------------------------------------------------------------------------------------------
# 3. Redaction: pure functions of bytes, one mechanism for answers, requests, the event log and stderr; and the one way
# out for text.
#
# Attack: an agent posts megabytes of one letter and times the answer. `bytes.find` skips by a table made from what it
# looks for, so the time would tell where in the secret that letter stands. So of every form a window is looked for that
# depends on the same WINDOW characters of the secret, and the rest is compared where the window stands, in constant time.

REDACTED, WINDOW = b"[redacted]", 6
Encoding = dict[int, str]               # for str.translate


def encoding_tables(unsafe: Iterable[Iterable[str]], forms: str) -> list[Encoding]:
    """A table for each unsafe set and form: its characters become `form % number`."""
    return [{ord(character): form % ord(character) for character in characters}
            for characters in unsafe for form in forms.split()]


EVERY_CHARACTER = {chr(code) for code in range(0x21, 0x7f)}      # that a secret may have
SPECIAL = {character for character in EVERY_CHARACTER if not character.isalnum()}
IN_JSON = {ord('"'): '\\"', ord("\\"): "\\\\"}
IN_PHP = {**IN_JSON, ord("/"): "\\/"}
# Go; Python's json_script; PHP; Java's Gson; .NET.
JSON_ENCODINGS = [{}, IN_JSON, IN_PHP, *({**usual, **table} for usual in (IN_JSON, IN_PHP) for table in encoding_tables(
    ("<>&", "<>&'", "<>&'\"", "<>&'=", "<>&'+`", "<>&'+`\""), r"\u%04x \u%04X"))]
# Of all others that work character by character: hex; percent-encoding of every byte, or of what the usual encoders call
# unsafe; HTML's numeric entities, with names for none, three or four of them (Go; Python, PHP, .NET and template languages).
UNRESERVED = ("-_.", "-_./", "-_.*", "-_.!*()", "-_.!*'()", "-_.$&+:=@", "-_.$&+,/:;=@", "-_.!*'();,/?:@&=+$#")
IN_HTML = ("&<>", "&<>\"'", "&<>\"'+", "&<>\"'+`", "&<>\"'=", "&<>\"'=`", "&<>\"'=`/", "&<>\"'+=`", "&<>\"'+=`/")
THREE_NAMES = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
OTHER_ENCODINGS = [
    *encoding_tables([EVERY_CHARACTER], "%02x %02X %%%02x %%%02X"),
    *encoding_tables([SPECIAL - {*safe, *tilde} for safe in UNRESERVED for tilde in ("", "~")], "%%%02x %%%02X"),
    *({**table, **names} for names in ({}, THREE_NAMES, {**THREE_NAMES, ord('"'): "&quot;"})
      for table in encoding_tables(IN_HTML, "&#%d; &#%03d; &#x%x; &#x%X;"))]


class Form(NamedTuple):
    """One spelling of a secret: all of it, and where in it the window stands."""
    whole: bytes
    before: int


def written_forms(secret: bytes, encodings: list[Encoding] = JSON_ENCODINGS) -> set[Form]:
    """The secret as these tables write it; if none are given, as a request's body might hold it."""
    text, first = secret.decode("latin-1"), (len(secret) - WINDOW) // 2
    pairs = {(text[:first].translate(table), text[first:].translate(table)) for table in encodings}
    return {Form((begin + end).encode("latin-1"), len(begin)) for begin, end in pairs}


def secret_forms(secret: bytes) -> set[Form]:
    """Every form in which an upstream, or a program that logs, might show a secret.

    JSON, HTML, percent-encoding, hex, and base64 at the three alignments: of each the inner characters, which depend on
    no neighbour. So b"s3cr3t" is looked for as `s3cr3t`, `733363723374`, `%73%33%63%72%33%74`, and (base64) `czNjcjN0`,
    `MzY3Izd`, `zM2NyM3`.
    """
    first, forms = (len(secret) - WINDOW) // 2, written_forms(secret, JSON_ENCODINGS + OTHER_ENCODINGS)
    for alignment, shared in enumerate((0, 2, 3)):
        inner = base64.b64encode(bytes(alignment) + secret)[shared:(alignment + len(secret)) * 8 // 6]
        before = -(-(alignment + first) * 8 // 6) - shared      # the first character that is the window's alone
        forms |= {Form(inner, before), Form(inner.translate(bytes.maketrans(b"+/", b"-_")), before)}
    return forms


class Redactor:
    """Replaces every form of the given secrets by `[redacted]`."""

    def __init__(self, secrets: Iterable[str] = (), forms_of: Callable[[bytes], set[Form]] = secret_forms,
                 known: Redactor | None = None) -> None:
        """`known` has made the forms of some of them already: for a long secret that takes a while."""
        made = known.secrets if known is not None else {}
        self.secrets: dict[str, set[Form]] = {
            secret: made.get(secret) or forms_of(secret.encode("utf-8", "surrogateescape")) for secret in secrets}
        self.windows: dict[bytes, list[Form]] = collections.defaultdict(list)
        for form in set().union(*self.secrets.values()):
            self.windows[form.whole[form.before:form.before + WINDOW]].append(form)
        self.forms = [form.whole for forms in self.windows.values() for form in forms]
        self.longest, self.shortest = max(map(len, self.forms), default=0), min(map(len, self.forms), default=0)
        self.beginnings = frozenset(form[:WINDOW] for form in self.forms)
        # What stands in none of them before its end.
        self.outer_bytes = bytes(range(256)).translate(None, b"".join(form[:-1] for form in self.forms))

    def also(self, secret: str | None) -> Redactor:
        """One that knows this secret too: that of a request in flight may have been rotated away long ago."""
        return self if secret is None or secret in self.secrets else Redactor((*self.secrets, secret), known=self)

    def _window_places(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        if len(data) < 2 * len(self.windows):       # many secrets in little text: one look-up a place costs less
            yield from ((at, data[at:at + WINDOW]) for at in range(len(data)) if data[at:at + WINDOW] in self.windows)
            return
        for window in self.windows:
            at = data.find(window)
            while at >= 0:
                yield at, window
                at = data.find(window, at + 1)

    def _places(self, data: bytes) -> Iterator[tuple[int, int]]:
        """(begin, end) of every whole form."""
        for at, window in self._window_places(data):
            for form in self.windows[window]:
                begin, end = at - form.before, at - form.before + len(form.whole)
                if begin >= 0 and hmac.compare_digest(data[begin:end], form.whole):
                    yield begin, end

    def has(self, data: bytes) -> bool:
        return any(True for _ in self._places(data))

    def clean(self, data: bytes) -> bytes:
        pieces, done = [], 0
        for begin, end in sorted(self._places(data), key=lambda place: (place[0], -place[1])):
            if begin >= done:               # the first one counts, the longest of several that begin together
                pieces += [data[done:begin], REDACTED]
                done = end
        return b"".join([*pieces, data[done:]])

    def text(self, text: str) -> str:
        if len(text) < self.shortest:
            return text                 # most of what the log holds
        return self.clean(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def open_tail(self, data: bytes) -> int:
        """How many bytes at the end might be the beginning of a form: all that may be held back."""
        if not data or data[-1] in self.outer_bytes:
            return 0
        for at in range(max(0, len(data) - self.longest + 1), len(data)):
            is_likely = at > len(data) - WINDOW or data[at:at + WINDOW] in self.beginnings
            if is_likely and any(form.startswith(data[at:]) for form in self.forms):
                return len(data) - at
        return 0


class RedactedStream:
    """A redactor for data that comes in pieces: a secret split across them is found all the same."""

    def __init__(self, redactor: Redactor) -> None:
        self.redactor, self.held = redactor, b""

    def feed(self, data: bytes, last: bool) -> bytes:
        data = self.redactor.clean(self.held + data)
        keep = 0 if last else self.redactor.open_tail(data)
        self.held = data[len(data) - keep:]
        return data[:len(data) - keep] if keep else data


class Hidden:
    """What must not come out: secrets in answers and requests, secrets and caller tokens in the log and on stderr.

    Former ones count on, but only so many: the work and the memory for them stay the same after any number of rotations.
    """

    FORMER = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[bool, str], list[str]] = {}    # (is it a secret, whose) -> the newest last
        self.in_answers = self.in_bodies = self.in_output = Redactor()

    def add(self, owner: str, value: str, in_answers: bool = True) -> None:
        """Another secret of an upstream, or token of a client (not hidden in answers)."""
        with self._lock:
            known = self._values.get((in_answers, owner), [])
            if value in known[-1:]:
                return
            self._values[in_answers, owner] = [*(other for other in known if other != value), value][-1 - self.FORMER:]
            secrets = [each for (is_secret, _), values in self._values.items() if is_secret for each in values]
            self.in_output = Redactor(itertools.chain(*self._values.values()), known=self.in_output)
            self.in_answers = Redactor(secrets, known=self.in_output)
            self.in_bodies = Redactor(secrets, written_forms, known=self.in_bodies)


HIDDEN = Hidden()


def printable(text: str) -> str:
    """The one way out for text: on one line, printable characters only, secrets and tokens redacted."""
    return "".join(c if c.isprintable() else "?" for c in HIDDEN.in_output.text(text))


class PerMinute:
    """Attack: a caller that fills the disk, or the terminal, by being refused. So many lines of a kind a minute are written or
    said; the others are counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[Any, tuple[float, int]] = {}      # since when, and how many in that minute

    def suppressed(self, kind: Any) -> int | None:
        """Counts one more of its kind. None if that one is to be suppressed, else how many before it were."""
        with self._lock:
            now = time.monotonic()
            since, count = self._kinds.get(kind, (-math.inf, 0))
            if now < since + 60:
                self._kinds[kind] = since, count + 1
                return 0 if count < LINES_A_MINUTE else None
            self._kinds[kind] = now, 1
            return max(0, count - LINES_A_MINUTE)

    def rest(self) -> dict[Any, int]:
        """How many of each kind no line has told of."""
        with self._lock:
            return {kind: count - LINES_A_MINUTE for kind, (_, count) in self._kinds.items() if count > LINES_A_MINUTE}


class Stderr:
    """Attack: a terminal or a pipe that nobody reads stops whoever writes to it, for ever. So one thread does, from a
    bounded queue; what does not fit is counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: queue.Queue[str | None] = queue.Queue(SAID_LINES_LIMIT)
        self._writer: threading.Thread | None = None
        self._lost = 0
        self._often = PerMinute()

    def say(self, text: str, often: str = "") -> None:
        """Queues one line. `often` names what callers can cause: so many of it a minute and no more."""
        if often and self._often.suppressed(often) is None:
            return
        with self._lock:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_lines, daemon=True)
                self._writer.start()
            try:
                self._lines.put_nowait(printable(text))
            except queue.Full:
                self._lost += 1

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._lost:
                line, self._lost = f"{line}\nbroker: {self._lost} lines could not be written here in time", 0
            data = (line + "\n").encode("utf-8", "replace")
            with contextlib.suppress(OSError, ValueError):      # nobody can read it any more
                while data and sys.stderr is not None:
                    # Not by way of sys.stderr: it has a lock that the interpreter's own end would wait for.
                    data = data[os.write(sys.stderr.fileno(), data):]

    def close(self) -> None:
        """What is queued still goes out, if somebody reads it."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        if self._writer is not None:
            self._writer.join(LAST_SECONDS)


STDERR = Stderr()
say = STDERR.say


def report_bug(bug: BaseException) -> None:
    """One line for the operator: type and place, not the text, which may hold what a caller sent."""
    import traceback
    for frame in traceback.extract_tb(bug.__traceback__, -1):
        say(f"broker: internal error: {type(bug).__name__} in {frame.name}, line {frame.lineno}: please report it", often="bug")


# ----------------------------------------------------------------------------------------------------------------------
# 4. HTTP messages: bytes in, values out (RFC 9112), strict, one parser for requests and answers.
#
# Why not http.server's and http.client's own: they take bare LF, NUL, folded lines, two lengths, `//v1` for `/v1`, and
# 103 for the answer, so that the next caller gets this one's.

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"     # RFC 9110 section 5.6.2
REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.(?P<minor>[01])")
STATUS_LINE = re.compile(r"HTTP/1\.(?P<minor>[01]) ([1-5][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
# One line a match. Blanks around the value are cut in Python: as part of the pattern they would make a line of blanks
# with a control character at its end take quadratic time.
HEADER_LINE = re.compile(rf"^({TOKEN}):([\t\x20-\x7e\x80-\xff]*)\r\n", re.M)
# What no head may hold, found before its end has come: a caller that speaks TLS, or ends lines with LF alone, is told
# at once and not after HEAD_SECONDS.
HOPELESS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
IDENTITY_CODINGS = {"identity", "none", "utf-8", ""}    # what servers write who mean that there is none


class Malformed(Exception):
    """The bytes are not one unambiguous HTTP message; the text says why and quotes nothing."""


class TooLong(Malformed):
    """A head over its limit."""


class Head:
    """The whole head of a message, its empty line included. Raises Malformed. Attack: two readings of where it ends."""

    def __init__(self, raw: bytes, first_line: re.Pattern[str]) -> None:
        self.raw = raw
        first, _, rest = raw[:-2].decode("latin-1").partition("\r\n")
        line, found = first_line.fullmatch(first), HEADER_LINE.findall(rest)
        if line is None:
            raise Malformed("its first line is not HTTP/1.1's")
        if len(found) != rest.count("\n"):
            raise Malformed("a header is not `Name: value` with CRLF at its end")
        self.line, self.is_http_1_1 = line, line["minor"] == "1"
        self.lines = [(name, name.lower(), value.strip("\t ")) for name, value in found]
        self.fields: dict[str, str] = {}        # by lower-case name; what came more than once is joined by commas
        for _, name, value in self.lines:
            self.fields[name] = f"{self.fields[name]}, {value}" if name in self.fields else value
        self.length, self.chunked = self._framing()
        self.is_identity = IDENTITY_CODINGS.issuperset(self.words("content-encoding"))   # as far as it says, not compressed
        self.connection = self.words("connection")
        self.keep_alive = "close" not in self.connection if self.is_http_1_1 else "keep-alive" in self.connection

    def words(self, name: str) -> list[str]:
        """Of a field that is a list, lower case."""
        return [word.strip().lower() for word in self.fields.get(name, "").split(",")]

    def _framing(self) -> tuple[int | None, bool]:
        """(the body's length, whether it comes in chunks)."""
        length, coding = self.fields.get("content-length"), self.fields.get("transfer-encoding")
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            raise Malformed("its Content-Length is not one plain number, once")
        if coding is not None and (length is not None or coding.lower() != "chunked" or not self.is_http_1_1):
            raise Malformed("its Transfer-Encoding is not exactly `chunked`, once, with HTTP/1.1, without a Content-Length")
        return None if length is None else int(length), coding is not None

    def end_to_end(self, dropped: Names, own: frozenset[str] = frozenset(), kept: tuple[str, ...] = ()) -> str:
        """The lines that go on: not dropped, nor in `own`, nor named by `Connection`, but for the body's type."""
        hop_by_hop = own | {name.replace("_", "-") for name in self.connection} - {"content-type"}
        lines = []
        for name, lower, value in self.lines:
            plain = lower.replace("_", "-")
            if plain in hop_by_hop or (dropped.has(plain) and not plain.endswith(kept)):
                continue
            # `content_type` is read as the real one by some servers.
            if plain.replace("-", "").isalnum() and lower != "content_type":
                lines.append(f"{name}: {value}\r\n")
        return "".join(lines)


PATH_FAULTS = [(re.compile(pattern), words) for pattern, words in (
    (r"\A(?!/)", "this is a base URL, no forward proxy: give it to the client as its base URL, not as a proxy"),
    (rf"\A.{{{PATH_LIMIT + 1}}}", f"its path is longer than {PATH_LIMIT} characters"),
    (r"//|(?<=.)/\Z", "its path has an empty segment: leave out the slash at the end of the client's base URL"),
    (r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9._~:@+,=\-/%]", "its path has {}, and may have only A-Z a-z 0-9 . _ ~ : @ + , = - / %XX"),
    (r"/\.\.?(?![^/])", "its path has a dot segment"),
)]


def decoded_path(path: str) -> str:
    """A request's path with %XX decoded; raises Malformed for a path that two programs could read differently."""
    for pattern, words in PATH_FAULTS:
        if found := pattern.search(path):
            raise Malformed(words.format(ascii(found[0])))
    if "%" not in path:
        return path
    for code in re.findall("%(..)", path):
        if re.match(r"[A-Za-z0-9\-._~/\\%?#;\x00-\x1f\x7f]", chr(int(code, 16))):
            raise Malformed(f"its path has %{code}, which must stand there plainly or not at all")
    decoded = urllib.parse.unquote(path, errors="surrogateescape")
    if re.search("[\x80-\x9f\udc80-\udcff]", decoded):
        raise Malformed("its path is not UTF-8, or has a control character")
    return decoded


class RequestHead(Head):
    """A request's head, its path and Host in the one accepted form."""

    def __init__(self, raw: bytes) -> None:
        if raw.count(b"\n") > HEADER_COUNT_LIMIT + 2:       # before they are read: a thousand of one name take long to join
            raise TooLong(f"it has more than {HEADER_COUNT_LIMIT} headers")
        super().__init__(raw, REQUEST_LINE)
        self.method, self.target = str(self.line[1]), str(self.line[2])
        self.path, _, self.query = self.target.partition("?")
        self.decoded_path = decoded_path(self.path)
        if [name for _, name, _ in self.lines].count("host") != 1:
            raise Malformed("it must have exactly one Host header")


class AnswerHead(Head):
    def __init__(self, raw: bytes) -> None:
        super().__init__(raw, STATUS_LINE)
        self.status, self.reason = int(self.line[2]), self.line[3] or ""
        self.request_id = self.fields.get("x-request-id") or self.fields.get("request-id")


def asked_for(raw: bytes) -> tuple[str | None, str | None]:
    """(method, path) as far as they can be read in what is no proper request, for the log."""
    line = re.match(rb"([!-~]+) ([^\s?#]+)", raw)
    return (line[1].decode("latin-1"), line[2].decode("latin-1")) if line else (None, None)


def chunk_lines(extension: bytes, trailers: bytes, trailers_so_far: bytes) -> list[tuple[re.Pattern[bytes], re.Pattern[bytes]]]:
    """What stands before the first chunk, before another one, and at the end; of each the whole, and any beginning of it."""
    size = rb"([0-9A-Fa-f]{1,15})" + extension
    return [(re.compile(whole), re.compile(so_far)) for whole, so_far in (
        (size + rb"\r\n", size + rb"\r?"),
        (rb"\r\n" + size + rb"\r\n", rb"\r(?:\n(?:" + size + rb"\r?)?)?"),
        (trailers + rb"\r\n", trailers_so_far))]


class Body:
    """Where a message's body ends (RFC 9112 sections 6 and 7), and what of the bytes that came belongs to it.

    A caller's body (`strict`) is held to the bare form: chunks without extensions, and no trailers.
    """

    STRICT = chunk_lines(b"", b"", rb"\r")
    LENIENT = chunk_lines(rb"[ \t]{0,%d}(?:;[\t\x20-\x7e\x80-\xff]{0,%d})?" % (CHUNK_LINE_LIMIT, CHUNK_LINE_LIMIT),
                          rb"(?:[\t\x20-\x7e\x80-\xff]+\r\n)*", rb"(?s:.{0,%d})" % TRAILERS_LIMIT)

    def __init__(self, length: int | None, chunked: bool, strict: bool) -> None:
        """`length` None and not chunked: until the connection ends."""
        self.chunked, self.left, self.done = chunked, 0 if chunked else length, length == 0
        self._lines, self._next = self.STRICT if strict else self.LENIENT, 0    # which line comes next

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """(the body's bytes among these, the rest: not yet readable, or behind the body). Raises Malformed."""
        if self.chunked:
            return self._take_chunks(data)
        piece = data[:self.left]
        if self.left is not None:
            self.left -= len(piece)
            self.done = not self.left
        return piece, data[len(piece):]

    def _take_chunks(self, data: bytes) -> tuple[bytes, bytes]:
        pieces, at = [], 0
        while not self.done:
            if self.left:
                pieces.append(data[at:at + self.left])
                at += len(pieces[-1])
                self.left -= len(pieces[-1])
            if self.left or at == len(data):
                break
            whole, so_far = self._lines[self._next]
            line = whole.match(data, at)
            if line is None:
                if so_far.fullmatch(data, at):
                    break
                raise Malformed("its chunked body is broken, or has extensions or trailers")
            at, self.done = line.end(), self._next == 2
            if not self.done:
                self.left = int(line[1], 16)
                self._next = 1 if self.left else 2
        return b"".join(pieces), data[at:]


# ----------------------------------------------------------------------------------------------------------------------
# 5. Rules: which method, path, query and type of body may pass. Pure.

RULE = re.compile(r"(?:([A-Z]+) )?(/[^ ]*)(?: ([a-z0-9.+\-]+/[a-z0-9.+\-]+))?")
QUERY = re.compile(r"(?:[A-Za-z0-9\-._~!$'()*+,:@/?=&\[\]]|%[0-9A-Fa-f]{2})*")
# Stored data, or a bill of its own, beyond a single call of a model.
WIDE_SEGMENTS = ("files", "batches", "fine_tuning", "uploads", "containers", "vector_stores", "assistants", "threads")


def glob_matches(pattern: str, text: str, least: int) -> bool:
    """Whether they match if each `*` stands for so many characters or more; in time linear in the text's length."""
    if "*" not in pattern:
        return pattern == text
    first, *middle, last = pattern.split("*")
    at = len(first)
    for part in middle:
        at = text.find(part, at + least)
        if at < 0:
            return False
        at += len(part)
    return text.startswith(first) and text.endswith(last) and len(text) - len(last) >= at + least


def segment_matches(pattern: str, segment: str) -> bool:
    """`*` is one or more characters, but never the `:` of a pattern that has one: `*:generateContent` does not match
    `a:b:generateContent`."""
    return (":" not in pattern or segment.count(":") == pattern.count(":")) and glob_matches(pattern, segment, 1)


def globs_meet(one: str, other: str) -> bool:
    """Whether some text matches both; neither has a `:` unless the other has none."""
    if "*" not in one or "*" not in other:
        return segment_matches(one, other) or segment_matches(other, one)
    # Between the beginnings and the ends that they ask for there is room for what both ask for in the middle.
    (begin, *_, end), (start, *_, stop) = one.split("*"), other.split("*")
    return (begin.startswith(start) or start.startswith(begin)) and (end.endswith(stop) or stop.endswith(end))


def segments_meet(one: str, other: str) -> bool:
    """Whether some segment matches both patterns."""
    if ":" in one and ":" in other:
        return one.count(":") == other.count(":") and all(map(globs_meet, one.split(":"), other.split(":")))
    return globs_meet(one, other)


class Rule:
    """One entry of `allowed_paths`: "/path", "METHOD /path" or "METHOD /path type/subtype"."""

    def __init__(self, text: str, prefix: str = "") -> None:
        """`prefix` stands before its path where a caller writes it. Raises ValueError for what no request can match."""
        match = RULE.fullmatch(text)
        if match is None:
            raise ValueError('must be "/path", "METHOD /path" or "METHOD /path type/subtype"')
        self.method, self.path, self.type = match[1] or "POST", match[2], match[3] or JSON_TYPE
        self.whole, self.segments, self.is_literal = prefix + self.path, self.path.split("/"), "*" not in self.path
        self.text = f"{self.method} {self.whole}" + (f" {self.type}" if self.type != JSON_TYPE else "")
        if "%" in self.whole or any(fault.search(self.whole.replace("*", "_")) for fault, _ in PATH_FAULTS):
            raise ValueError("no request can match it: a path is made of segments of A-Z a-z 0-9 . _ ~ : @ + , = - and * "
                             "between single slashes, without a query, a % or a slash at the end")
        if any("**" in segment or segment.count("*") > 2 for segment in self.segments):
            raise ValueError("`*` stands for characters inside one segment, at most twice in it and never as `**`: write a "
                             "rule for each depth")
        if self.method == "CONNECT" or (self.method == "GET" and self.whole == STATUS_PATH) or (
                self.method in ("GET", "HEAD") and self.whole in HEALTH_PATHS):
            raise ValueError("no request can match it: the broker answers this one itself")

    def matches(self, path: str, segments: list[str]) -> bool:
        """`segments`: the path's, split once for many rules."""
        if self.is_literal:
            return path == self.path
        return len(segments) == len(self.segments) and all(map(segment_matches, self.segments, segments))

    def meets(self, other: Rule) -> bool:
        """Whether one request could match both, by method and path as a caller writes it."""
        one, two = self.whole.split("/"), other.whole.split("/")
        return self.method == other.method and len(one) == len(two) and all(map(segments_meet, one, two))

    @property
    def is_wide(self) -> bool:
        """Whether it reaches stored data or open-ended jobs."""
        # A `*` alone, or among digits, says nothing of what stands there: `fi*` does.
        told = [segment for segment in self.segments if re.fullmatch(r"[^*]+|[A-Za-z*]*[A-Za-z][A-Za-z*]*", segment)]
        return self.method == "DELETE" or self.segments[-1] == "*" or any(
            segment_matches(segment, wide) for segment in told for wide in WIDE_SEGMENTS)


class Allowlist(tuple[Rule, ...]):
    """Rules, found by the number of their segments first: a hundred cost little more than one."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._by_length: dict[int, list[Rule]] = collections.defaultdict(list)
        for rule in self:
            self._by_length[len(rule.segments)].append(rule)

    def pairs(self, path: str) -> set[tuple[str, str]]:
        """(method, type of body) of those for a path."""
        segments = path.split("/")
        return {(rule.method, rule.type) for rule in self._by_length.get(len(segments), ()) if rule.matches(path, segments)}


def other_reading(path: str) -> str:
    """The path with the `/v1` that is missing, or without the one that is there twice: base URLs differ."""
    if "/v1/v1/" in path:
        return path.replace("/v1/v1/", "/v1/", 1)
    return path if path.startswith("/v1/") else f"/v1{path}"


def check_query(query: str) -> None:
    """Attack: an agent adds `?key=`, and its caller's data goes to somebody else's account. Raises RequestError."""
    if len(query) > QUERY_LIMIT or query.count("&") >= PARAMETER_LIMIT or not QUERY.fullmatch(query):
        raise RequestError("query_not_allowed", f"the query must have at most {QUERY_LIMIT} characters and {PARAMETER_LIMIT} "
                           "parameters, of A-Z a-z 0-9 - . _ ~ ! $ ' ( ) * + , : @ / ? = & [ ] and %XX")
    for parameter in query.split("&"):
        name = urllib.parse.unquote_plus(parameter.partition("=")[0]).casefold().replace("_", "-")
        name = "".join(name.partition("[")[0].split())
        if CREDENTIAL_PARAMETERS.has(name) and name != "$alt":      # Google's choice of the answer's form
            mend = " (a client may show its token in the header x-goog-api-key instead)" if name == "key" else ""
            raise RequestError("query_not_allowed", f"the query names a credential ({name[:64]}), which only the broker "
                               f"attaches: leave that parameter out{mend}")


# ----------------------------------------------------------------------------------------------------------------------
# 6. Secrets: where the key comes from, who may see it, and how long it is kept.
#
# To add a secret source: one function that asks it (a Secret, or SecretUnavailable), and its row in SECRET_SOURCES;
# validation, --check, caching, sharing, redaction and the error's way out come with it.
# A source is asked in a thread of its own, with no lock held: a vault that waits for a person stops nobody who needs it not.

Json = dict[str, Any]
Texts = dict[str, str]
Waiting = Callable[[], None]            # called now and then while a thread waits; if it raises, only this waiter leaves
Check = Callable[[Any], Any]            # the checked value, maybe in another form; ValueError with the words for the key
KeyTable = dict[str, tuple[Any, Check]]          # key -> (default, check)
T = TypeVar("T")
REQUIRED = object()                     # in place of a default
VARIABLE = "[A-Za-z_][A-Za-z0-9_]*"


def a_number(low: float, high: float, whole: bool = False) -> Check:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
            raise ValueError(f"must be a{' whole' if whole else ''} number from {low} to {high}")
        return value
    return check


def is_text(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def a_text(pattern: str, meaning: str) -> Check:
    def check(value: Any) -> Any:
        if not is_text(value, pattern):
            raise ValueError(f"must be {meaning}")
        return value
    return check


def a_list(pattern: str, meaning: str) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, list) or not value or not all(is_text(entry, pattern) for entry in value):
            raise ValueError(f"must be a non-empty list of {meaning}")
        return tuple(value)
    return check


def a_map(names: str, texts: str | None, meaning: str) -> Check:
    """`texts`: the form of its values; None for objects, at least one."""
    def check(value: Any) -> Any:
        if not isinstance(value, dict) or not (value or texts):
            raise ValueError(f"must be {meaning}")
        for name, member in value.items():
            if not is_text(name, names) or not (is_text(member, texts) if texts else isinstance(member, dict)):
                raise ValueError(f"has {json.dumps(name)[:80]}, but must be {meaning}")
        return value
    return check


def checked_members(members: Json, table: KeyTable, prefix: str = "") -> Json:
    """The members of a JSON object by their table; a default is checked as well, but for None.

    Raises ValueError, which names the key, `prefix` before it.
    """
    for key in members:
        if key not in table:
            import difflib
            near = difflib.get_close_matches(key, table, 1)
            raise ValueError(f"unknown key {json.dumps(prefix + key[:64])}: "
                             + (f'did you mean "{near[0]}"?' if near else f"known are {', '.join(table) or 'none'}"))
    values = {}
    for key, (default, check) in table.items():
        value = members.get(key, default)
        if value is REQUIRED:
            raise ValueError(f'"{prefix}{key}" is missing: it is required, see the configuration table in README.md')
        try:
            values[key] = check(value) if key in members or value is not None else None
        except ValueError as error:
            raise ValueError(f'"{prefix}{key}" {error}') from None
    return values


# What vaults, files and shells give in place of a key, the more telling one first.
WRONG_TEXTS = (
    (r"\A\s*\Z", "is empty"),
    (r"\A\ufeff", "begins with a byte-order mark: save it as UTF-8 without one"),
    (r"\A(?:\udcff\udcfe|\udcfe\udcff)|\0", "is UTF-16, or has NUL in it: save it as UTF-8"),
    (r"\n", "has several lines: give the one with the value alone"),
    (r"\r", "has a carriage return in it: save it with Unix line ends"),
    (r"""(?s)\A(["'`]).*\1\Z""", "is in quotes: take them off"),
    (rf"\A(?:export\s+)?{VARIABLE}=+[^=]", "is NAME=value: give the value alone"),
    (r"[ \t]", "has a space in it: give the value alone"),
    (r",\Z", "ends in a comma: take it off"),
    (r"[\x00-\x1f\x7f]", "has a control character in it: give the value alone"),
    (r"[^\x00-\x7f]", "has a character beyond ASCII in it: give the value alone, copied from where it was made"),
    (r"\A.{0,15}\Z", "is shorter than 16 characters: is it the whole one?"),
    (r"\A.{4097}", "is longer than 4096 characters: give the value alone"),
)


def what_is_wrong(text: str) -> str:
    """Why this is no key and no token, in words that follow its name and show nothing of it; "" if it may be one."""
    return next((words for pattern, words in WRONG_TEXTS if re.search(pattern, text)), "")


class Secret:
    """The provider's key. It shows itself only when asked by name, never in a repr, a format or a traceback."""

    def __init__(self, text: str, name: str) -> None:
        """What a source gives, less one line end. Raises SecretUnavailable for what is no key; `name` is what it is called."""
        text = re.sub(r"\r?\n\Z", "", text)
        if problem := what_is_wrong(text):
            raise SecretUnavailable(f"{name} {problem}")
        self._value = text

    def reveal(self) -> str:
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)


def digest(text: str) -> bytes:
    """For comparisons in constant time: of equal length, whatever is compared."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def command_path() -> str:
    """PATH as secret commands get it. Attack: an agent writes an `op` into a folder that a relative entry names."""
    return os.pathsep.join(filter(os.path.isabs, os.environ.get("PATH", os.defpath).split(os.pathsep)))


class SecretSource:
    """`secret_source`, checked; its options in the configuration are attributes of these names."""

    variable: str | None                # the environment variable that holds the secret
    argv: tuple[str, ...] = ()
    path = ""
    timeout_seconds: float
    cache_seconds = math.inf
    folder: str                         # the configuration's, absolute
    upstream_name: str

    def __init__(self, kind: str, words: str, ask: Callable[[SecretSource], Secret | None], options: Json) -> None:
        self.kind, self._words, self._ask, self.variable = kind, words, ask, options.get("name")
        vars(self).update(options)

    def prepare(self, folder: str, upstream_name: str) -> None:
        """Once, before it is asked."""
        self.folder, self.upstream_name = folder, upstream_name
        if self.path:
            self.path = os.path.abspath(os.path.join(folder, self.path))
        if self.argv:
            # Looked up once: who can write an `op` into an earlier folder later on changes nothing.
            import shutil
            program = os.path.join(folder, self.argv[0]) if os.path.dirname(self.argv[0]) else self.argv[0]
            self.argv = (shutil.which(program, path=command_path()) or self.argv[0], *self.argv[1:])

    def resolve(self) -> Secret | None:
        """Asks the source, which may take long. Raises SecretUnavailable."""
        return self._ask(self)

    def describe(self) -> str:
        return self._words.format(**vars(self))


TAKEN_VARIABLES: Texts = {}             # taken out of os.environ, so that no child gets them; kept for a reload
HIDDEN_VARIABLES: set[str] = set()      # further ones that no secret command gets


def take_variable(name: str) -> str | None:
    """A variable's value; it is gone from the environment afterwards."""
    if name in os.environ:
        TAKEN_VARIABLES[name] = os.environ.pop(name)
    return TAKEN_VARIABLES.get(name)


def ask_environment(source: SecretSource) -> Secret:
    """A variable of the broker's own environment."""
    value = take_variable(source.variable or "")
    if value is None:
        raise SecretUnavailable(f"{source.describe()} is not set: export it in the shell that starts the broker, or name "
                                "another secret_source")
    return Secret(value, source.describe())


def command_environment() -> Texts:
    kept = {name: value for name, value in os.environ.items() if name not in {*HIDDEN_VARIABLES, "PATH"}}
    # Left out where nothing remains: an empty PATH would be the current folder.
    return {**kept, "PATH": command_path()} if command_path() else kept


COMMAND_LOOK_SECONDS = 0.02
ENDING = threading.Event()              # the broker ends: who runs a secret command kills it, none is started any more
SECRET_COMMANDS, SECRET_COMMANDS_LOCK = set[int](), threading.Lock()     # the numbers of those under way


def read_output(process: subprocess.Popen[bytes], seconds: float) -> tuple[int | None, bytes, bytes]:
    """(its exit code, None if it goes on for too long; what it wrote to stdout; to stderr), each up to one byte over the limit.

    It ends with the process, not with its pipes: a vault's program may leave a daemon behind that holds them open. So they
    are looked into from time to time, without waiting: no thread is stuck in a read that nobody ends.
    """
    deadline, code = time.monotonic() + seconds, None
    if os.name != "posix":
        # Windows knows no such look into a pipe; there threads read, and live as long as whoever holds the pipe.
        import subprocess
        while time.monotonic() < deadline and not ENDING.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                both = process.communicate(timeout=COMMAND_LOOK_SECONDS)
                return process.returncode, *both
        return None, b"", b""
    with process.stdout as output, process.stderr as errors:       # type: ignore[union-attr]
        said = {output: bytearray(), errors: bytearray()}
        for pipe in said:
            os.set_blocking(pipe.fileno(), False)
        while code is None and time.monotonic() < deadline and max(map(len, said.values())) <= SECRET_OUTPUT_LIMIT:
            if ENDING.wait(COMMAND_LOOK_SECONDS):
                raise SecretUnavailable("the broker ends")
            code = process.poll()       # looked at first, so that its last words are not missed
            for pipe, data in said.items():
                while piece := pipe.read(SECRET_OUTPUT_LIMIT + 1 - len(data)):
                    data += piece
    return code, bytes(said[output]), bytes(said[errors])


def run_secret_command(argv: tuple[str, ...], folder: str, seconds: float) -> tuple[int | None, bytes, bytes]:
    """What `read_output` says of it. It runs without a shell and without input, in a session of its own."""
    import subprocess
    with SECRET_COMMANDS_LOCK:          # held until it stands in the set: end_secret_commands overlooks none
        if ENDING.is_set():
            raise SecretUnavailable("the broker ends")
        process = subprocess.Popen(argv, bufsize=0, cwd=folder, env=command_environment(), start_new_session=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        SECRET_COMMANDS.add(process.pid)
    try:
        return read_output(process, seconds)
    finally:
        with contextlib.suppress(OSError):
            # Only this thread reaps it. Until then its number can't be another process's.
            if process.poll() is None and hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()              # Windows has no process groups of this kind: its children live on
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)             # not for ever: one that has become another user's can't be killed
        SECRET_COMMANDS.remove(process.pid)


def end_secret_commands() -> None:
    """At our own end: returns when none runs any more."""
    with SECRET_COMMANDS_LOCK:
        ENDING.set()
    while SECRET_COMMANDS:
        time.sleep(COMMAND_LOOK_SECONDS)


# Compiled when a command has failed, not at every start.
ADDRESS_OR_WORD = (
    r"(?i)(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)(?P<user>[^\s/?#@\"'`<>]*@)?(?P<host>[A-Za-z0-9.\-]*(?::[0-9]+)?)"
    r"(?P<path>(?:/[A-Za-z0-9._~%+,=:@/\-]*)?)(?P<query>[?#][^\s\"'`<>]*)?"
    r"|(?P<named>(?:key|token|secret|password|passwd|pwd)(?:=|[\"']\s*:\s*)[\"']?)[^\s\"'`<>,;&]+"
    r"|[A-Za-z0-9!#$%*+\-./@\\^_~]+")
KNOWN_TOKEN = re.compile(r"\b(?:sk|pk|rk)[-_].{8}|\b(?:gh[a-z]_|AKIA|AIza).{8}|eyJ.{8}")
# A word (`token`, `AzureCliCredential`), an error code (`AADSTS70043`), a number or date (`20261123`, `23T10`), a status.
PLAIN_PIECE = re.compile(r"[A-Za-z]{0,32}|(?:[A-Z]{1,10}|[A-Z]?[a-z]{1,15})[0-9]{1,7}|[0-9]{1,14}"
                         r"|[0-9]{1,4}[A-Za-z]{1,3}[0-9]{0,4}|(?:0x)?[0-9A-Fa-f]{1,8}")
CHANGE_OF_CASE = re.compile(r"[a-z](?=[A-Z])|[A-Z](?=[a-z])")


def is_plain(piece: str) -> bool:
    """Random letters change their case with every other one, words with every third at most."""
    return PLAIN_PIECE.fullmatch(piece) is not None and 3 * len(CHANGE_OF_CASE.findall(piece)) <= len(piece)


def is_token_like(word: str, least: int = 12) -> bool:
    """A path, host name, version or hyphenated word is made of plain pieces; what has been made by chance is not."""
    parts = [part.strip("!#$%*+^~") for part in re.split(r"[./:@\\]", word)]
    return KNOWN_TOKEN.search(word) is not None or any(
        len(part) >= least and not all(map(is_plain, re.split("[-_]", part))) for part in parts)


def masked(text: str) -> str:
    """A command's own words with everything that might be a key, or a part of one, hidden: the mend often stands in them.

    `AADSTS70043: see https://aka.ms/x?t=1, token=abc` becomes `AADSTS70043: see https://aka.ms/x?[masked], token=[masked]`.
    """
    def hide(match: re.Match[str]) -> str:
        if match["scheme"]:
            host = "[masked]" if is_token_like(match["host"], 20 if "." in match["host"] else 12) else match["host"]
            path = "/[masked]" if is_token_like(match["path"]) else match["path"]
            return (match["scheme"] + ("[masked]@" if match["user"] else "") + host + path
                    + (match["query"][0] + "[masked]" if match["query"] else ""))
        return (match["named"] or "") + "[masked]" if match["named"] or is_token_like(match[0]) else match[0]
    return re.sub(ADDRESS_OR_WORD, hide, text)


def first_and_last_words(errors: bytes) -> str:
    """Of a command's stderr, masked: az writes six warnings before its reason, op's mend stands in the last line."""
    lines = masked(errors.decode("utf-8", "replace")).splitlines()
    said = " / ".join(" ".join(line.split()) for line in lines if line.strip()) or "nothing"
    return said if len(said) <= 800 else f"{said[:300]} … {said[-500:]}"


def ask_command(source: SecretSource) -> Secret:
    """What a program such as `op` or `az` writes."""
    program = source.argv[0]
    if not os.path.isabs(program):          # not found; or Windows has looked into the current folder first
        raise SecretUnavailable(f"program {program!r} is not found, or may not be executed: install it, or put its absolute "
                                "path into argv")
    try:
        code, output, errors = run_secret_command(source.argv, source.folder, source.timeout_seconds)
    except (OSError, ValueError) as error:
        raise SecretUnavailable(f"{program} can't be run: {getattr(error, 'strerror', None) or error}: check that it is "
                                "there and may be executed") from None
    if max(len(output), len(errors)) > SECRET_OUTPUT_LIMIT:
        problem = f"wrote more than {SECRET_OUTPUT_LIMIT // KIB} KiB"
    elif code is None:
        problem = (f"gave no answer within {source.timeout_seconds:g} seconds (timeout_seconds): is it waiting for you to "
                   "unlock something?")
    elif code:
        problem = f"failed with exit code {code}"
    else:
        try:
            return Secret(output.decode("utf-8", "surrogateescape"), "what it gives")
        except SecretUnavailable as error:
            problem = f"ended with exit code 0, but {error}"
    raise SecretUnavailable(f"{program} {problem}; on stderr it said: {first_and_last_words(errors)}")


def is_credential_path(path: str) -> bool:
    """Below a folder that systemd or a container runtime fills, where modes are theirs to choose."""
    folders = filter(os.path.isabs, ("/run/secrets", os.environ.get("CREDENTIALS_DIRECTORY", "")))
    return any(path.startswith(os.path.join(name, "")) for folder in folders for name in (folder, os.path.realpath(folder)))


def read_secret_file(path: str) -> bytes:
    """Raises OSError, and ValueError with what is wrong with the file."""
    real = os.path.realpath(path)           # Kubernetes and systemd link from one file of theirs to another
    trusted = is_credential_path(path) and is_credential_path(real)
    # O_NONBLOCK: a FIFO would hold us until somebody writes. What is checked is what was opened, not what has the name.
    flags = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
    with open(real if trusted else path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
        status = os.fstat(file.fileno())
        has_modes = os.name == "posix" and not trusted      # Windows has no mode bits that say who may read
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no regular file: name one")
        if has_modes and status.st_uid not in (0, os.geteuid()):
            raise ValueError("belongs to another user: copy it into a file of your own, then chmod 600")
        if has_modes and status.st_mode & 0o077:
            raise ValueError(f"is open to others (mode {stat.S_IMODE(status.st_mode):03o}): chmod 600 {path}")
        data = file.read(SECRET_OUTPUT_LIMIT + 1)
    if len(data) > SECRET_OUTPUT_LIMIT:
        raise ValueError(f"is longer than {SECRET_OUTPUT_LIMIT // KIB} KiB: give the key alone")
    return data


def ask_file(source: SecretSource) -> Secret:
    """What a file holds that only its owner may read, or that systemd or a container runtime has put there."""
    try:
        return Secret(read_secret_file(source.path).decode("utf-8", "surrogateescape"), source.path)
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise SecretUnavailable(f"{source.path} can't be read: {reason}: name a regular file of yours") from None
    except ValueError as problem:
        raise SecretUnavailable(f"{source.path} {problem}") from None


def ask_on_terminal(question: str) -> str:
    """An answer typed without echo. Raises SecretUnavailable where there is no terminal; KeyboardInterrupt passes."""
    import getpass
    import warnings
    try:
        if os.name == "posix":
            with open("/dev/tty", "rb", buffering=0) as terminal:
                if os.tcgetpgrp(terminal.fileno()) != os.getpgrp():
                    raise OSError           # a background job that touches the terminal is stopped, callers and all
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)      # it would read stdin instead, with echo
            return getpass.getpass(question)
    except (OSError, EOFError, ValueError, getpass.GetPassWarning):
        raise SecretUnavailable("there is no terminal to ask for it on: start the broker in the foreground of one, or name "
                                "another secret_source") from None


TYPED_SECRETS: dict[str, Secret] = {}   # by the upstream's name: nobody is asked twice, not by a reload either


def ask_person(source: SecretSource) -> Secret:
    """What somebody types at the start."""
    if source.upstream_name not in TYPED_SECRETS:
        typed = ask_on_terminal(f"broker: the provider's key for {source.upstream_name} (it will not be shown): ")
        TYPED_SECRETS[source.upstream_name] = Secret(typed, "what was typed")
    return TYPED_SECRETS[source.upstream_name]


def an_argv(value: Any) -> Any:
    argv = a_list(r"[^\0\ud800-\udfff]*", "words, the program first: it is run without a shell")(value)
    if not argv[0]:
        raise ValueError("must begin with the program")
    return argv


A_PATH = a_text(r"[^\0\ud800-\udfff]+", "the path of a file")
A_TIMEOUT = a_number(0.1, 86400)
CACHE_ROW = (3600, a_number(0, 31 * 86400))     # default and check of `cache_seconds`
# kind -> (the words for it, in which `{...}` stands for an attribute; who asks; the options)
SECRET_SOURCES: dict[str, tuple[str, Callable[[SecretSource], Secret | None], KeyTable]] = {
    "env": ("environment variable {variable}", ask_environment, {
        "name": (REQUIRED, a_text(VARIABLE, "the name of an environment variable"))}),
    "command": ("command {argv[0]}", ask_command, {
        "argv": (REQUIRED, an_argv), "timeout_seconds": (60, A_TIMEOUT), "cache_seconds": CACHE_ROW}),
    "file": ("file {path}", ask_file, {"path": (REQUIRED, A_PATH), "cache_seconds": CACHE_ROW}),
    "prompt": ("typed at the start", ask_person, {}),
    "none": ("no credential", lambda source: None, {}),
}


def a_secret_source(value: Any) -> SecretSource:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in SECRET_SOURCES:
        raise ValueError(f'must be an object whose "kind" is one of {", ".join(SECRET_SOURCES)}')
    words, ask, options = SECRET_SOURCES[kind]
    try:
        found = checked_members({key: member for key, member in value.items() if key != "kind"}, options)
        return SecretSource(kind, words, ask, found)
    except ValueError as error:
        raise ValueError(f"of kind {kind}: {error}") from None


class SharedRun(Generic[T]):
    """A call that may take long, in a thread of its own and once at a time: who asks meanwhile gets the same result."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._thread = threading.Thread()           # the last run; this one is none
        self._value: T
        self._error: BaseException | None = None

    def _run(self) -> None:
        try:
            self._value, self._error = self._function(), None
        except BaseException as error:
            self._error = error.with_traceback(None)

    def start(self) -> bool:
        """Unless one is under way; whether none was."""
        with self._lock:
            if self._thread.is_alive():
                return False
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
            return True

    def result(self, while_waiting: Waiting) -> T:
        """Of the run under way, or else of the last one. It goes on, also if `while_waiting` raises."""
        thread = self._thread
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            while_waiting()
        if (error := self._error) is not None:
            raise copy.copy(error)          # one each: a shared one would gather every waiter's traceback
        return self._value


class SecretCache:
    """The current secret of one upstream. `tokens`: the digests of what it must not be, for a caller would hold it."""

    def __init__(self, source: SecretSource, tokens: Container[bytes | None]) -> None:
        self._source, self._tokens = source, tokens
        self._asking = SharedRun(self._resolve)
        self._lock = threading.Lock()           # of what follows; held while a run starts, never while it runs
        self._secret: Secret | None = None
        self._fresh_until = self._failed_until = self._renewed_at = -math.inf

    def _learn(self, secret: Secret | None) -> None:
        """It is hidden from now on, as the newest. Raises SecretUnavailable for one that a caller has."""
        if secret is not None:
            if digest(secret.reveal()) in self._tokens:
                raise SecretUnavailable("it equals a caller token: give the callers tokens of their own, see --new-token")
            HIDDEN.add(self._source.upstream_name, secret.reveal())

    def learn_again(self) -> None:
        self._learn(self._secret)

    def _resolve(self) -> Secret | None:
        try:
            secret = self._source.resolve()
            self._learn(secret)
        except Exception as error:
            is_ours = isinstance(error, SecretUnavailable)
            failure = error if is_ours else SecretUnavailable(f"its source fails with {type(error).__name__}")
            self._failed_until = time.monotonic() + FAILURE_SECONDS
            if self._secret is not None and not ENDING.is_set():    # else it is a start that fails, which says it
                say(f"broker: the secret of {self._source.upstream_name} is not available: {failure}",
                    often=f"secret {self._source.upstream_name}")
            raise failure from None
        with self._lock:
            self._secret, self._fresh_until = secret, time.monotonic() + self._source.cache_seconds
            self._failed_until = -math.inf
        return secret

    def get(self, while_waiting: Waiting) -> Secret | None:
        """The secret to attach. Raises SecretUnavailable; after a failure for some seconds again, without asking."""
        with self._lock:
            now = time.monotonic()
            if now < self._fresh_until:
                return self._secret
            if now >= self._failed_until:
                self._asking.start()
        return self._asking.result(while_waiting)

    def resolve_now(self) -> None:
        """At the start and for SIGHUP, which makes a new cache. Raises SecretUnavailable."""
        if self._source.kind == "prompt":
            self._resolve()                     # in this thread: Ctrl-C has to reach the one that has turned the echo off
        else:
            self.get(lambda: None)

    def renew(self, used: Secret | None, while_waiting: Waiting) -> Secret | None:
        """For a secret that the upstream rejected: another one if there is one by now, else the same."""
        with self._lock:
            if self._secret != used:
                return self._secret             # at once: a run under way is none of its business
            now = time.monotonic()
            if now >= self._renewed_at + RENEWAL_SECONDS and self._asking.start():
                self._renewed_at = now          # one that was under way may have begun before the key was changed
        with contextlib.suppress(SecretUnavailable):        # it has been said; the old one stays
            self._asking.result(while_waiting)
        return self._secret


# ----------------------------------------------------------------------------------------------------------------------
# 7. Providers: what is known of each API: its canned answer for a dry run, where it says what an answer cost, which model
# and how many tokens a request asks for, what its clients read from the environment and what a first call to it needs.
#
# To add a provider: its row in SHAPES (path, the body of a first call, the answer, and the events where it is a stream), the
# names of its counts in COUNTS and the place of these in ROOT, where they are new, and a row in CLIENT_VARIABLES if its
# clients take both a base URL and a key from the environment. A key alone would send some clients straight to the provider.

EVENT_STREAM, JSON_LINES = "text/event-stream; charset=utf-8", "application/x-ndjson"


class Shape(NamedTuple):
    """One call of an API. Answers are JSON with `$name` for one of ANSWER_PARTS or of canned_answer's values."""
    method: str
    end: str                            # of its path: before it may stand /v1, /openai/deployments/NAME, …
    whole: str                          # the answer in one piece, if it has that form
    stream: tuple[str, ...] = ()        # its events; one with `$piece` comes once for each, one with `?` only where asked for
    kind: str = EVENT_STREAM            # of the stream
    example: str = ""                   # the body of a first call; `MODEL` is for the user to replace
    header: str = ""                    # that a first call needs, beside the token's, as curl takes it
    told_by: str = ""                   # the header that tells it from another call of its path


ANSWER_PARTS = {                        # OpenRouter's client wants `system_fingerprint` to be a string
    "openai": '"created": 1767225600, "model": $model, "system_fingerprint": "fp_dryrun"',
    "chunk": '"id": "chatcmpl-dryrun", "object": "chat.completion.chunk", $openai',
    "completion": '"id": "cmpl-dryrun", "object": "text_completion", $openai',
    "open": '"index": 0, "logprobs": null, "finish_reason": null',
    "stop": '"index": 0, "logprobs": null, "finish_reason": "stop"',
    "usage": '"usage": {"prompt_tokens": 0, "completion_tokens": $length, "total_tokens": $length}',
    "response": '"id": "resp_dryrun", "object": "response", "created_at": 1767225600, "error": null, "incomplete_details": null, '
                '"instructions": null, "metadata": {}, "model": $model, "parallel_tool_calls": true, "temperature": 1.0, '
                '"tool_choice": "auto", "tools": [], "top_p": 1.0',
    "response_begun": '{$response, "status": "in_progress", "output": [], "usage": null}',
    "response_whole": '{$response, "status": "completed", "output": [$item], $response_usage}',
    "response_usage": '"usage": {"input_tokens": 0, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, '
                      '"output_tokens": $length, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": $length}',
    "item": '{"type": "message", "id": "msg_dryrun", "status": "completed", "role": "assistant", "content": [$part]}',
    "part": '{"type": "output_text", "text": $text, "annotations": [], "logprobs": []}',
    "place": '"sequence_number": $at, "item_id": "msg_dryrun", "output_index": 0, "content_index": 0',
    "message": '"id": "msg_dryrun", "type": "message", "role": "assistant", "model": $model, "stop_sequence": null',
    "gemini": '"usageMetadata": {"promptTokenCount": 0, "candidatesTokenCount": $length, "totalTokenCount": $length}, '
              '"modelVersion": $model',
    "ollama": '"model": $model, "created_at": "2026-01-01T00:00:00Z"',
    "ollama_end": '"done": true, "done_reason": "stop", "prompt_eval_count": 0, "eval_count": $length',
    "cohere_end": '"finish_reason": "COMPLETE", "usage": {"billed_units": $cohere_counts, "tokens": $cohere_counts}',
    "cohere_counts": '{"input_tokens": 0, "output_tokens": $length}',
}
CHAT_EXAMPLE = '{"model": "MODEL", "messages": [{"role": "user", "content": "hello"}]}'
INPUT_EXAMPLE = '{"model": "MODEL", "input": "hello"}'
PROMPT_EXAMPLE = '{"model": "MODEL", "prompt": "hello"}'
CONTENT_EXAMPLE = '{"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}'
ANTHROPIC_VERSION = ' -H "anthropic-version: 2023-06-01"'
SHAPES = (                              # the first that fits counts
    # platform.openai.com/docs/api-reference
    Shape("POST", "/chat/completions", '{"id": "chatcmpl-dryrun", "object": "chat.completion", $openai, "choices": [{'
          '"message": {"role": "assistant", "content": $text, "refusal": null}, $stop}], $usage}', (
              '{$chunk, "choices": [{"delta": {"role": "assistant", "content": ""}, $open}]}',
              '{$chunk, "choices": [{"delta": {"content": $piece}, $open}]}',
              '{$chunk, "choices": [{"delta": {}, $stop}]}',
              '?{$chunk, "choices": [], $usage}',
              '[DONE]'), example=CHAT_EXAMPLE),
    Shape("POST", "/completions", '{$completion, "choices": [{"text": $text, $stop}], $usage}', (
              '{$completion, "choices": [{"text": $piece, $open}]}',
              '{$completion, "choices": [{"text": "", $stop}], $usage}',
              '[DONE]'), example=PROMPT_EXAMPLE),
    Shape("POST", "/responses", "$response_whole", (
              '{"type": "response.created", "sequence_number": $at, "response": $response_begun}',
              '{"type": "response.in_progress", "sequence_number": $at, "response": $response_begun}',
              '{"type": "response.output_item.added", "sequence_number": $at, "output_index": 0, "item": {"type": "message", '
              '"id": "msg_dryrun", "status": "in_progress", "role": "assistant", "content": []}}',
              '{"type": "response.content_part.added", $place, "part": {"type": "output_text", "text": "", "annotations": [], '
              '"logprobs": []}}',
              '{"type": "response.output_text.delta", $place, "delta": $piece, "logprobs": []}',
              '{"type": "response.output_text.done", $place, "text": $text, "logprobs": []}',
              '{"type": "response.content_part.done", $place, "part": $part}',
              '{"type": "response.output_item.done", "sequence_number": $at, "output_index": 0, "item": $item}',
              '{"type": "response.completed", "sequence_number": $at, "response": $response_whole}'), example=INPUT_EXAMPLE),
    Shape("POST", "/responses/compact", '{"id": "resp_dryrun", "object": "response.compaction", "created_at": 1767225600, '
          '"output": [{"type": "compaction", "id": "cmp_dryrun", "encrypted_content": $text}], $response_usage}',
          example=INPUT_EXAMPLE),
    Shape("POST", "/embeddings", '{"object": "list", "data": $vectors, "model": $model, "dry_run": $text, '
          '"usage": {"prompt_tokens": 0, "total_tokens": 0}}', example=INPUT_EXAMPLE),
    # docs.anthropic.com/en/api; its clients always send anthropic-version
    Shape("GET", "/models", '{"data": [{"type": "model", "id": "dry-run", "display_name": $text, "lifecycle": "active", '
          '"created_at": "2026-01-01T00:00:00Z"}], "has_more": false, "first_id": "dry-run", "last_id": "dry-run"}',
          told_by="anthropic-version"),
    Shape("GET", "/models", '{"object": "list", "data": [{"id": "dry-run", "object": "model", "created": 0, '
          '"owned_by": $text}]}'),
    Shape("POST", "/messages", '{$message, "content": [{"type": "text", "text": $text}], "stop_reason": "end_turn", '
          '"usage": {"input_tokens": 0, "output_tokens": $length}}', (
              '{"type": "message_start", "message": {$message, "content": [], "stop_reason": null, '
              '"usage": {"input_tokens": 0, "output_tokens": 0}}}',
              '{"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}',
              '{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": $piece}}',
              '{"type": "content_block_stop", "index": 0}',
              '{"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null}, '
              '"usage": {"output_tokens": $length}}',
              '{"type": "message_stop"}'), example=CHAT_EXAMPLE[:-1] + ', "max_tokens": 64}', header=ANTHROPIC_VERSION),
    Shape("POST", "/messages/count_tokens", '{"input_tokens": $tokens}', example=CHAT_EXAMPLE, header=ANTHROPIC_VERSION),
    # ai.google.dev/api/generate-content: a stream is server-sent events with alt=sse, else a JSON list
    Shape("POST", ":generateContent", '{"candidates": [{"content": {"role": "model", "parts": [{"text": $text}]}, "index": 0, '
          '"finishReason": "STOP"}], $gemini}', example=CONTENT_EXAMPLE),
    Shape("POST", ":streamGenerateContent", "", (
              '{"candidates": [{"content": {"role": "model", "parts": [{"text": $piece}]}, "index": 0}], $gemini}',
              '{"candidates": [{"content": {"role": "model", "parts": [{"text": ""}]}, "index": 0, "finishReason": "STOP"}], '
              '$gemini}'), JSON_TYPE, CONTENT_EXAMPLE),
    # docs.ollama.com/api: a stream is the default
    Shape("POST", "/api/chat", '{$ollama, "message": {"role": "assistant", "content": $text}, $ollama_end}', (
              '{$ollama, "message": {"role": "assistant", "content": $piece}, "done": false}',
              '{$ollama, "message": {"role": "assistant", "content": ""}, $ollama_end}'), JSON_LINES, CHAT_EXAMPLE),
    Shape("POST", "/api/generate", '{$ollama, "response": $text, $ollama_end}', (
              '{$ollama, "response": $piece, "done": false}',
              '{$ollama, "response": "", $ollama_end}'), JSON_LINES, PROMPT_EXAMPLE),
    # docs.cohere.com/reference/chat and …/chat-stream
    Shape("POST", "/v2/chat", '{"id": "dryrun", "message": {"role": "assistant", "content": [{"type": "text", '
          '"text": $text}]}, $cohere_end}', (
              '{"type": "message-start", "id": "dryrun", "delta": {"message": {"role": "assistant", "content": [], '
              '"tool_plan": "", "tool_calls": [], "citations": []}}}',
              '{"type": "content-start", "index": 0, "delta": {"message": {"content": {"type": "text", "text": ""}}}}',
              '{"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": $piece}}}}',
              '{"type": "content-end", "index": 0}',
              '{"type": "message-end", "id": "dryrun", "delta": {$cohere_end}}'), example=CHAT_EXAMPLE),
    Shape("", "", '{"object": "dry_run", "message": $text}', example="{}"),
)


def shape_of(method: str, path: str, fields: Iterable[str] = ()) -> Shape:
    """`fields`: the names of the request's headers."""
    return next(shape for shape in SHAPES if shape.method in ("", method) and path.endswith(shape.end)
                and (not shape.told_by or shape.told_by in fields))


def filled(template: str, values: Json) -> str:
    def value(word: re.Match[str]) -> str:
        return filled(ANSWER_PARTS[word[1]], values) if word[1] in ANSWER_PARTS else json.dumps(values[word[1]])
    return re.sub(r"\$(\w+)", value, template)


def canned_vectors(body: Json) -> list[Json]:
    """As many as there are inputs; the SDKs ask for base64 of 32-bit floats by default."""
    given, size = body.get("input"), body.get("dimensions")
    count = min(len(given), 2048) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
    size = size if isinstance(size, int) and 1 <= size <= 4096 else 8
    vector: Any = [1.0] + [0.0] * (min(size, EMBEDDED_NUMBERS_LIMIT // count) - 1)
    if body.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return [{"object": "embedding", "index": index, "embedding": vector} for index in range(count)]


def canned_answer(
        head: RequestHead, path: str, body: Json, size: int, model: str | None, text: str) -> tuple[str, list[bytes]]:
    """(Content-Type, body) that the provider's clients can read, in one piece or as the stream that they ask for.

    `path` is the one upstream, `size` the request's in bytes; `text`, what would have been sent where, is the answer.
    """
    shape = shape_of(head.method, path, head.fields)
    pieces = re.findall(r"(?:\S+\s*){1,6}", text)           # one event would not look like a stream
    values: Json = {"model": (model or "dry-run")[:LOGGED_STRING_LIMIT], "tokens": size // BYTES_A_TOKEN, "text": text,
                    "length": len(pieces), "vectors": canned_vectors(body)}
    is_asked_for = body.get("stream", shape.kind == JSON_LINES) is True or not shape.whole
    if not shape.stream or not is_asked_for:
        return JSON_TYPE, [filled(shape.whole, values).encode()]
    options = body.get("stream_options")
    wants_usage = isinstance(options, dict) and options.get("include_usage")
    steps = [(line.lstrip("?"), piece) for line in shape.stream if wants_usage or not line.startswith("?")
             for piece in (pieces if "$piece" in line else [""])]
    events = [filled(line, {**values, "piece": piece, "at": at}) for at, (line, piece) in enumerate(steps)]
    if shape.kind == JSON_LINES:
        return JSON_LINES, [f"{event}\n".encode() for event in events]
    if shape.kind == JSON_TYPE and "alt=sse" not in head.query.replace("$", "").split("&"):
        return JSON_TYPE, [f"[{', '.join(events)}]".encode()]
    # An event that has a type is called by it.
    framed = (f"data: {event}\n\n" for event in events)
    return EVENT_STREAM, [re.sub('^(?=data: {"type": "(.+?)")', r"event: \1\n", event).encode() for event in framed]


Place = dict["bytes | None", Any]       # JSON key -> the place below it, or what the number there counts; None is a list's
# What a count is called -> what it counts. `prompt` includes what came from a cache; `input` does too where `cached` is
# told beside it (OpenAI's responses), else not (Anthropic, Bedrock). Gemini's thoughts are not among its candidates.
COUNTS: Place = {name.encode(): count for count, names in {
    "prompt": "prompt_tokens promptTokenCount", "input": "input_tokens inputTokens input_token_count",
    "output": "completion_tokens output_tokens outputTokens candidatesTokenCount output_token_count",
    "total": "total_tokens", "tool_prompt": "toolUsePromptTokenCount", "thoughts": "thoughtsTokenCount",
    "cached": "cached_tokens cachedContentTokenCount prompt_cache_hit_tokens",
    "cache_read": "cache_read_input_tokens cacheReadInputTokens",
    "cache_write": "cache_creation_input_tokens cacheWriteInputTokens",
}.items() for name in names.split()}
# Attack: a model's text, or a tool call's arguments, that look like `usage`. Only these places count.
USAGE: Place = {**COUNTS, b"tokens": COUNTS, b"billed_units": COUNTS, b"prompt_tokens_details": {b"cached_tokens": "cached"},
                b"input_tokens_details": {b"cached_tokens": "cached"},
                b"completion_tokens_details": {b"reasoning_tokens": "reasoning"}}
HOLDER: Place = {b"usage": USAGE, b"usageMetadata": USAGE}
ROOT: Place = {**HOLDER, b"message": HOLDER, b"response": HOLDER, b"x_groq": HOLDER, b"delta": HOLDER, b"meta": USAGE,
               b"metrics": USAGE, b"choices": {None: HOLDER}, b"prompt_eval_count": "prompt", b"eval_count": "output",
               b"error": "error", b"type": "type"}
TOP_LIST: Place = {None: {**HOLDER, b"error": {b"code": "error"}}}      # Gemini's stream without alt=sse

# Where a line may begin a JSON text, or name an event an error; else it is of no interest.
LINE = re.compile(rb"(?:\xef\xbb\xbf)?(?:[ \t\r]*(data:[ \t]*)?([{\[])|(event: ?error\s*\n)|[^\n]*\n\s*)")
# A string, its end if it has one, and, if it is a key, a number or word behind it; a bracket; an empty line, or the data's end.
JSON_TOKEN = re.compile(
    rb'"([^"\\\n]*(?:\\.[^"\\\n]*)*)("[ \t]*)?(?(2)(?::\s*([^\s"{}\[\],:]*))?)|[{}\[\]]|\n\r?(?:\n|\Z)', re.S)
USAGE_BEGINS = re.compile(rb'usage(?:Metadata)?"\s*:\s*{')


def is_plain_event(data: bytes) -> bool:
    """Whether it is whole events with nothing in them that counts, as nearly every piece of a stream is."""
    return (data.startswith((b"data:", b"event:")) and data.endswith((b"\n\n", b"\n\r\n"))
            and b"error" not in data and b"failed" not in data and b"billed" not in data
            and (b"usage" not in data or not USAGE_BEGINS.search(data)))


class UsageReader:
    """Finds the counts of tokens in an answer that passes by, and the error in a stream that began with 200.

    One way for JSON, JSON lines and server-sent events, whatever the Content-Type says: keys and brackets are read as they
    come, which takes no more memory for an answer of any size than for the way down to the place that they lead to.
    """

    def __init__(self, content_type: str) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.failed = False
        # It is several JSON texts, or a list of them. Some send an error as bare JSON between events.
        self._is_stream = any(kind in content_type.lower() for kind in ("ndjson", "stream+json", "event-stream"))
        self._places: list[Place] = []      # the way down to here in it; empty between two of them
        self._below = 0                     # brackets open further down, where nothing counts
        self._key: bytes | None = None      # whose value comes next
        self._pending = b""                 # the beginning of a token; short

    def feed(self, data: bytes) -> None:
        if not self._places and not self._pending:
            if is_plain_event(data):
                self._is_stream = True
                return
            may_be_whole = data.startswith(b"{") and data.rstrip().endswith(b"}") and not self._is_stream
            if may_be_whole and len(data) <= WHOLE_ANSWER_LIMIT:
                with contextlib.suppress(ValueError, RecursionError):   # it is not; else the parser is faster
                    return self._walk(ROOT, json.loads(data))
        data, self._pending, at = self._pending + data, b"", 0
        while at < len(data):
            at = self._read_json(data, at) if self._places else self._read_line(data, at)

    def _walk(self, place: Any, value: Any) -> None:
        """Down a value that was parsed, to the places that count."""
        if isinstance(place, dict) and isinstance(value, (dict, list)):
            members: Any = value.items() if isinstance(value, dict) else [(None, item) for item in value]
            for key, member in members:
                self._walk(place.get(key if key is None else key.encode("utf-8", "surrogatepass")), member)
        elif isinstance(place, str) and type(value) is int and 0 <= value < 10 ** COUNT_DIGITS:
            self.counts[place] = max(self.counts[place], value)

    def finish(self) -> None:
        if self._pending and not self._places:          # of a number that was cut nobody knows the rest
            self.feed(b"\n")

    @property
    def usage(self) -> dict[str, int] | None:
        """`input_tokens`, `output_tokens` and `cache_tokens` (the input that was read from a cache), as far as told."""
        told, usage = self.counts, {}
        if "prompt" in told:
            usage["input_tokens"] = told["prompt"] + told["tool_prompt"]
        elif "input" in told or "cache_read" in told:
            usage["input_tokens"] = told["input"] + (0 if "cached" in told else told["cache_read"] + told["cache_write"])
        if "output" in told or "thoughts" in told:
            # xAI leaves reasoning out of completion_tokens, OpenAI does not: the sum tells which.
            is_apart = told["total"] == told["prompt"] + told["output"] + told["reasoning"]
            usage["output_tokens"] = told["output"] + told["thoughts"] + (told["reasoning"] if is_apart else 0)
        if "cached" in told or "cache_read" in told:
            usage["cache_tokens"] = max(told["cached"], told["cache_read"])
        return usage or None

    def _read_line(self, data: bytes, at: int) -> int:
        """Reads up to where a JSON text begins, or a line ends. Returns how far."""
        match = LINE.match(data, at)
        if match is None:
            rest = data[at:].lstrip()
            self._pending = rest if len(rest) <= KEY_LIMIT else b"?"
            return len(data)
        if match[2]:
            self._is_stream |= bool(match[1]) or match[2] == b"["
            self._places, self._below, self._key = [ROOT if match[2] == b"{" else TOP_LIST], 0, None
        self.failed |= match[3] is not None
        return match.end()

    def _read_json(self, data: bytes, at: int) -> int:
        """Reads up to the end of the JSON text, or of the data. Returns how far."""
        for match in JSON_TOKEN.finditer(data, at):
            token = match[0]
            if match[1] is not None:
                self._read_string(match, data)
            elif token in b"{[":
                self._take_value(token)
            elif token in b"}]":
                self._leave()
            elif token.count(b"\n") == 1:                       # cut
                self._pending = token
            elif self._is_stream:                               # the event ends, even if its JSON is broken
                self._places = []
            if not self._places:
                return match.end()
        return len(data)

    def _read_string(self, match: re.Match[bytes], data: bytes) -> None:
        """Reads a key with a number or word, or another string."""
        is_short, has_end = len(match[0]) <= KEY_LIMIT, match[2] is not None
        if not has_end and data.startswith(b"\n", match.end()):        # broken: no string holds a line's end
            self._places = []
        elif not has_end or (is_short and match.end() == len(data)):    # cut; half an escape may stand behind it
            self._pending = (match[0] if is_short else b'"?') + data[match.end():]
        elif match[3] is None:
            self._take_value(match[0].rstrip())
        else:
            self._key = match[1]
            if match[3]:
                self._take_value(match[3])

    def _take_value(self, value: bytes) -> None:
        """Takes a number or word, a string with its quotes, or the bracket that opens a value."""
        place, self._key = None if self._below else self._places[-1].get(self._key), None
        if value in (b"{", b"["):
            if isinstance(place, dict):
                self._places.append(place)
            else:
                self._below += 1
        if place == "error":
            self.failed |= self._is_stream and value != b"null"
        elif place == "type":
            self.failed |= self._is_stream and value in (b'"error"', b'"response.failed"')
        elif isinstance(place, str) and value.isdigit() and len(value) <= COUNT_DIGITS:
            # The larger counts: some providers tell it again at the end, with zeros.
            self.counts[place] = max(self.counts[place], int(value))

    def _leave(self) -> None:
        if self._below:
            self._below -= 1
        else:
            self._places.pop()
        self._key = None


# ai.google.dev: `models/NAME:verb`; learn.microsoft.com: `openai/deployments/NAME/…`, also where `/openai` is in the base
# URL; docs.aws.amazon.com (Bedrock): `model/NAME/…`.
MODEL_IN_PATH = re.compile(r"(?:(?:^|/openai)/deployments|^/model)/([^/]+)/|/models/([^/]+):[A-Za-z]+$")
TOKEN_LIMIT_NAMES = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_tokens_to_sample", "maxOutputTokens",
                     "maxTokens")


def model_in_path(path: str) -> str | None:
    """`/model/a%3A0/converse` is of the model `a:0`."""
    match = MODEL_IN_PATH.search(urllib.parse.unquote(path))
    return match and (match[1] or match[2])


def models_asked(path: str, body: Json) -> list[str | None]:
    """Every model that may answer; None for what names none that anybody may use.

    Attack: an allowed `model`, and the wanted one in OpenRouter's `models` or LiteLLM's `fallbacks`.
    """
    named = model_in_path(path)
    asked: list[Any] = [named] if named is not None else [body["model"]] if "model" in body else []
    for name in ("models", "fallbacks"):
        others = body.get(name)
        if others is not None:
            entries = others if isinstance(others, list) else [others]
            asked += [entry.get("model") if isinstance(entry, dict) else entry for entry in entries]
    return [entry if isinstance(entry, str) else None for entry in asked]


def tokens_asked(body: Json) -> int:
    """The most tokens that the answer may have."""
    places = [place for place in (body, body.get("generationConfig"), body.get("inferenceConfig")) if isinstance(place, dict)]

    def greatest(names: tuple[str, ...], unsaid: int) -> int:
        found: list[Any] = [place.get(name) for place in places for name in names]
        return max((int(each) for each in found if type(each) in (int, float) and each >= 1 and each % 1 == 0), default=unsaid)
    return greatest(TOKEN_LIMIT_NAMES, TOKENS_ASKED_UNSAID) * greatest(("n", "candidateCount"), 1)


# What clients read a base URL and a key from, and what tells them so: a path that is allowed for POST (`*` for any beginning
# or end), or the upstream's host. As measured with each provider's own clients; some put /v1 before the path themselves.
CLIENT_VARIABLES = (
    ("/v1/chat/completions /v1/responses /v1/embeddings /v1/completions",
     "OPENAI_BASE_URL={url}/v1 OPENAI_API_BASE={url}/v1 OPENAI_API_KEY={token}"),
    ("/v1/messages", "ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={token} ANTHROPIC_API_KEY={token}"),
    ("/openai/deployments/*", "AZURE_OPENAI_ENDPOINT={url} AZURE_OPENAI_API_KEY={token}"),
    ("*:generateContent /v1/models/NAME:generateContent /v1beta/models/NAME:generateContent",
     "GOOGLE_GEMINI_BASE_URL={url} GEMINI_API_KEY={token}"),
    ("api.groq.com", "GROQ_BASE_URL={url} GROQ_API_KEY={token}"),
    ("api.together.xyz", "TOGETHER_BASE_URL={url} TOGETHER_API_KEY={token}"),
    ("api.cerebras.ai", "CEREBRAS_BASE_URL={url} CEREBRAS_API_KEY={token}"),
    ("api.perplexity.ai", "PERPLEXITY_BASE_URL={url} PERPLEXITY_API_KEY={token}"),
    ("api.fireworks.ai", "FIREWORKS_BASE_URL={url} FIREWORKS_API_KEY={token}"),
    ("openrouter.ai", "OPENROUTER_BASE_URL={url}/api/v1 OPENROUTER_API_KEY={token}"),
    ("api.mistral.ai", "MISTRAL_BASE_URL={url}/v1 MISTRAL_API_KEY={token}"),
    ("api.cohere.com", "CO_API_URL={url} CO_API_KEY={token}"),
    ("api.replicate.com", "REPLICATE_BASE_URL={url} REPLICATE_API_TOKEN={token}"),
    ("127.0.0.1:11434 localhost:11434 [::1]:11434", "OLLAMA_HOST={url} OLLAMA_API_KEY={token}"),
)


def path_served(path: str, rule: Rule) -> bool:
    return glob_matches(path, rule.path, 0) if "*" in path else rule.matches(path, path.split("/"))


def client_variables(rules: Iterable[Rule], host: str, url: str, token: str) -> Texts:
    """What points the clients that the rules serve at the broker. `host`: the upstream's, with its port if it has one."""
    posts = [rule for rule in rules if rule.method == "POST"]
    found = [settings for places, settings in CLIENT_VARIABLES
             if any(place == host or path_served(place, rule) for place in places.split() for rule in posts)]
    pairs = (setting.partition("=") for setting in " ".join(found).split())
    return {name: value.format(url=url, token=token) for name, _, value in pairs}


def curl_line(rules: Iterable[Rule], url: str, token_variable: str | None) -> str:
    """A first call, to be pasted into a POSIX shell: of the first rule that takes JSON, if there is one."""
    rule = max(rules, key=lambda rule: rule.method == "POST" and rule.type == JSON_TYPE)
    path = rule.path.replace("*", "NAME")
    call = f"curl {url}{path}" + (f' -H "X-Broker-Token: ${token_variable}"' if token_variable else "")
    if rule.method == "POST" and rule.type == JSON_TYPE:
        shape = shape_of(rule.method, path)
        return f"{call}{shape.header} -H \"Content-Type: {JSON_TYPE}\" -d '{shape.example}'"
    return call if rule.method == "GET" else f"{call} -X {rule.method}"


# ----------------------------------------------------------------------------------------------------------------------
# 8. Configuration: tables of keys. No raw dictionary leaves this section.
#
# To add a key: one row in its table, one field in its class, one row in README.md. One upstream and one caller are the
# short form of many: both become the same values here, and nothing behind this section knows which one it was.

PLAIN_PATH = r"(?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9._~:@+,=\-]+)*"      # no dot segment, no slash at its end
BASE_URL = re.compile(r"(https?)://([A-Za-z0-9](?:[A-Za-z0-9.\-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])"
                      rf"(?::([0-9]{{1,5}}))?({PLAIN_PATH})/?", re.I)
HOST_NAME = r"(?i)[a-z0-9](?:[a-z0-9._\-]*[a-z0-9])?|\[[0-9a-f:.]+\]"
HEADER_NAME = r"[A-Za-z0-9_\-]+"
LOOPBACK = re.compile(r"localhost|127(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}|\[::1\]")
DEFAULT_HOSTS = ["127.0.0.1", "localhost"]
DEFAULT_NAME, DEFAULT_TOKEN_VARIABLE = "default", "BROKER_CLIENT_TOKEN"
DEFAULT_CONFIG = "broker_config.json"
UNASKED_SOURCES = ("env", "prompt", "none")     # what a configuration that nobody named may use
AFTER_RESTART = ("listen_port", "mode", "event_log")


class Address(NamedTuple):
    """A base URL: lower-case host (an IPv6 address keeps its brackets), and a path without a slash at its end."""
    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The host, with the port if it is not the scheme's own."""
        return self.host if self.port == (443 if self.secure else 80) else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http{'s' if self.secure else ''}://{self.authority}{self.path}"

    @property
    def is_loopback(self) -> bool:
        return LOOPBACK.fullmatch(self.host) is not None


class UpstreamConfig(NamedTuple):
    """Where requests go, and with what authority."""
    name: str
    key: str                            # what its own keys are called by in an error: "upstreams.NAME.", or "" in the short form
    address: Address
    prefix: str
    rules: Allowlist
    source: SecretSource
    auth_header: str
    auth_scheme: str
    extra_headers: Texts
    environment: Texts                  # its `{url}` has the prefix behind it already
    own_headers: frozenset[str]         # names that only the broker sets, lower case, `_` read as `-`

    def describe_credential(self) -> str:
        if self.source.kind == "none":
            return self.source.describe()
        return " ".join(filter(None, (f"{self.auth_header}:", self.auth_scheme, f"[{self.source.describe()}]")))


class ClientConfig(NamedTuple):
    """Who may ask, and for what. None: not narrowed, or no limit; but for the token: anybody may ask."""
    name: str
    key: str                            # the same: "clients.NAME.", or "client_" for the short form's `client_token_env`
    token_env: str | None
    upstreams: tuple[UpstreamConfig, ...]       # a longer prefix before a shorter one
    rules: Allowlist | None
    models: tuple[str, ...] | None
    requests_per_minute: int | None
    max_concurrent_requests: int | None
    tokens_per_day: int | None
    expires: datetime | None

    @property
    def limits(self) -> dict[str, int]:
        """Those that it has, by the configuration's names."""
        names = ("requests_per_minute", "max_concurrent_requests", "tokens_per_day")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class Config(NamedTuple):
    file: str                           # absolute
    fixed: Json                         # what the file says of AFTER_RESTART, whatever the command line says
    listen_port: int
    dry_run: bool
    upstreams: tuple[UpstreamConfig, ...]
    clients: tuple[ClientConfig, ...]
    allowed_hosts: frozenset[str]
    max_request_bytes: int
    upstream_timeout: float
    max_concurrent: int
    event_log: str                      # absolute

    @property
    def mode(self) -> str:
        return "dry_run" if self.dry_run else "proxy"

    @property
    def has_budgets(self) -> bool:
        return any(client.tokens_per_day is not None for client in self.clients)

def a_base_url(value: Any) -> Address:
    match = BASE_URL.fullmatch(value) if isinstance(value, str) else None
    if match is None or ".." in match[2]:
        raise ValueError("must be https://host[:port][/path], in ASCII, without user, query, fragment or dot segment")
    secure = match[1].lower() == "https"
    address = Address(secure, match[2].lower(), int(match[3] or (443 if secure else 80)), match[4])
    if not 1 <= address.port <= 65535:
        raise ValueError("has a port that is not from 1 to 65535")
    if not secure and not address.is_loopback:
        raise ValueError("must be https://: plain http:// would send the key readable over the network, and is accepted to "
                         "a loopback address only")
    return address


def make_rules(entries: Iterable[str], key: str, prefix: str = "") -> Allowlist:
    rules = []
    for entry in entries:
        try:
            rules.append(Rule(entry, prefix))
        except ValueError as error:
            raise ValueError(f'"{key}" has the entry {json.dumps(entry)[:200]}: {error}') from None
    return Allowlist(rules)


def a_variable_or_null(value: Any) -> Any:
    name = a_text(VARIABLE, "the name of an environment variable, or null, written out, for no caller token at all")
    return None if value is None else name(value)


def a_moment(value: Any) -> datetime:
    """RFC 3339 with an offset."""
    form = r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.\d+)?(?:[Zz]|([+\-]\d\d:\d\d))"
    match = re.fullmatch(form, str(value), re.ASCII)
    with contextlib.suppress(ValueError):
        if match is not None:
            return datetime.fromisoformat(f"{match[1]}T{match[2]}{match[3] or '+00:00'}")
    raise ValueError('must be a date and time with an offset, such as "2027-01-31T18:00:00+01:00"')


A_LIMIT = a_number(1, 10 ** 12, whole=True)
SOME_RULES = a_list(r"(?s).*", 'rules such as "/v1/chat/completions" and "GET /v1/models"')      # looked at with their prefix
NAMED_PARTS = a_map(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,63}", None, "a non-empty object of objects; each has a name, of at most 64 of "
                    "A-Z a-z 0-9 . _ -, a letter or digit first")
UPSTREAM_KEYS: KeyTable = {
    "base_url": (REQUIRED, a_base_url),
    "prefix": ("", a_text(PLAIN_PATH, 'a path such as "/github", no slash at its end')),
    "allowed_paths": (REQUIRED, SOME_RULES),
    "secret_source": (REQUIRED, a_secret_source),
    "auth_header": ("Authorization", a_text(HEADER_NAME, 'the name of a header, such as "Authorization" or "x-api-key"')),
    "auth_scheme": ("Bearer", a_text(r"[!-~]*", 'one word such as "Bearer", or "" for none')),
    "extra_headers": ({}, a_map(HEADER_NAME, r"[ -~]*", 'an object such as {"anthropic-version": "2023-06-01"}: names of '
                                "letters, digits and -, values of printable ASCII")),
    "environment": ({}, a_map(f"(?!(?i:BROKER_)){VARIABLE}", r"[^\0]*", 'an object such as {"MY_BASE_URL": "{url}/v1"}: names '
                              "of letters, digits and _ that don't begin with BROKER_, and texts")),
}
CLIENT_KEYS: KeyTable = {
    "token_env": (REQUIRED, a_text(VARIABLE, "the name of an environment variable that holds this client's token")),
    "upstreams": (None, a_list("(?s).+", "names of upstreams")),
    "allowed_paths": (None, SOME_RULES),
    "allowed_models": (None, a_list("(?s).+", 'patterns such as "gpt-4o-mini*"')),
    "requests_per_minute": (None, A_LIMIT),
    "max_concurrent_requests": (None, A_LIMIT),
    "tokens_per_day": (None, A_LIMIT),
    "expires": (None, a_moment),
}
# What the short form, which has no prefix, calls an upstream's keys at the top.
SHORT_NAMES = {key: "upstream_base_url" if key == "base_url" else key for key in UPSTREAM_KEYS if key != "prefix"}
KEYS: KeyTable = {
    "listen_host": ("127.0.0.1", a_text(r"127\.0\.0\.1", 'exactly "127.0.0.1": the broker is not for other machines')),
    "listen_port": (8791, a_number(0, 65535, whole=True)),
    "mode": ("proxy", a_text("proxy|dry_run", '"proxy" or "dry_run"')),
    **{short: UPSTREAM_KEYS[key] for key, short in SHORT_NAMES.items()},
    "client_token_env": (REQUIRED, a_variable_or_null),
    "upstreams": (None, NAMED_PARTS),
    "clients": (None, NAMED_PARTS),
    "allowed_hosts": (DEFAULT_HOSTS, a_list(HOST_NAME, 'host names without a port, such as "127.0.0.1" and "localhost"')),
    "max_request_bytes": (32 * MIB, a_number(1, BUFFERED_LIMIT, whole=True)),
    "upstream_timeout_seconds": (600, A_TIMEOUT),
    "max_concurrent_requests": (128, a_number(1, 10000, whole=True)),
    "event_log": ("events.jsonl", A_PATH),
}


class InvalidJson(ValueError):
    """Why a text is no strict JSON, in words about JSON."""


def no_key_twice(pairs: list[tuple[str, Any]]) -> Json:
    """For JSON objects: Python keeps the last of two equal keys, another parser may keep the first."""
    members = dict(pairs)
    if len(members) != len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise InvalidJson(f"the key {json.dumps(twice[:64])} is there twice")
    return members


def no_constant(name: str) -> NoReturn:
    raise InvalidJson(f"{name} is no JSON number")


def an_integer(text: str) -> int:
    """Attack: megabytes of digits, whose reading takes seconds. The first ones are enough to be over every limit of ours."""
    if len(text) > DIGITS_LIMIT:
        raise InvalidJson("it has a number with too many digits")
    return int(text[:DIGITS_READ])


def a_decimal(text: str) -> float:
    return float(text)                  # a function of ours: between two calls another thread may have its turn


STRICT_JSON = json.JSONDecoder(object_pairs_hook=no_key_twice, parse_constant=no_constant, parse_int=an_integer,
                               parse_float=a_decimal)


def strict_json(data: bytes) -> Any:
    """The value in a JSON text (RFC 8259). Raises InvalidJson."""
    try:
        if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
            raise InvalidJson("it begins with a byte-order mark: save it as UTF-8 without one")
        return STRICT_JSON.decode(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise InvalidJson(f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos}") from None
    except UnicodeDecodeError:
        raise InvalidJson("it is not UTF-8") from None
    except RecursionError:
        raise InvalidJson("it is nested too deeply") from None


def make_upstream_config(name: str, key: str, values: Json) -> UpstreamConfig:
    """From the checked values of its keys, in their order."""
    own = [header.lower().replace("_", "-") for header in (values["auth_header"], *values["extra_headers"])]
    for at, header in enumerate(own):
        if BROKER_HEADERS.has(header) or header in own[:at]:
            raise ValueError(f'"{key}{"extra_headers" if at else "auth_header"}" names {header}, which the broker sets itself, '
                             "or which is there already: leave it out, or name another")
    rules = make_rules(values["allowed_paths"], f"{key}allowed_paths", values["prefix"])
    environment = {name: text.replace("{url}", "{url}" + values["prefix"]) for name, text in values["environment"].items()}
    values = {**values, "allowed_paths": rules, "environment": environment}
    return UpstreamConfig._make((name, key, *values.values(), frozenset(own)))


def make_client_config(name: str, key: str, values: Json, upstreams: tuple[UpstreamConfig, ...]) -> ClientConfig:
    """From the checked values of its keys, in their order. Raises ValueError for a rule that no request could ever match."""
    known = [upstream.name for upstream in upstreams]
    chosen = values["upstreams"] or known
    if unknown := [each for each in chosen if each not in known]:
        raise ValueError(f'"{key}upstreams" has {json.dumps(unknown[0][:64])}, which "upstreams" has not: known are '
                         f'{", ".join(known)}')
    theirs = sorted((upstream for upstream in upstreams if upstream.name in chosen), key=lambda upstream: -len(upstream.prefix))
    rules = values["allowed_paths"] and make_rules(values["allowed_paths"], f"{key}allowed_paths")
    for rule in rules or ():
        if not any(rule.meets(other) and rule.type == other.type for upstream in theirs for other in upstream.rules):
            raise ValueError(f'"{key}allowed_paths" has the entry "{rule.text}", which no request could ever match: no rule of '
                             f'{", ".join(chosen)} lets it through; write the path as the caller does, prefix included')
    return ClientConfig._make((name, key, *{**values, "upstreams": tuple(theirs), "allowed_paths": rules}.values()))


def checked_parts(values: Json, long: str, table: KeyTable) -> list[tuple[str, str, Json]]:
    """(name, `key`, checked values) of each upstream or client of the long form; none of the short form."""
    return [(name, f"{long}.{name}.", checked_members(members, table, f"{long}.{name}."))
            for name, members in (values[long] or {}).items()]


def keys_for(raw: Json, dry_run: bool) -> KeyTable:
    """KEYS as the forms of this file need them. Raises ValueError where it mixes the two."""
    table = dict(KEYS)
    if dry_run:
        table["client_token_env"] = (DEFAULT_TOKEN_VARIABLE, a_variable_or_null)
    for long, short in (("upstreams", [*SHORT_NAMES.values()]), ("clients", ["client_token_env"])):
        for key in short if long in raw else ():
            if key in raw:
                raise ValueError(f'"{long}" and "{key}" are both there: keep "{long}" and move "{key}" into it, or keep the '
                                 f'short form and leave out "{long}"')
            table[key] = (None, table[key][1])
    return table


def check_variables(config: Config) -> None:
    """No variable for two things. Raises ValueError."""
    owners = {upstream.source.variable: f"{upstream.key}secret_source" for upstream in config.upstreams}
    for client in config.clients:
        key = f"{client.key}token_env"
        if client.token_env is not None and owners.setdefault(client.token_env, key) != key:
            raise ValueError(f'"{owners[client.token_env]}" and "{key}" name the same variable {client.token_env}: give each '
                             "client a token of its own, see --new-token")
        for one, other in itertools.combinations(client.upstreams, 2):
            for name, text in one.environment.items():
                if other.environment.get(name, text) != text:
                    raise ValueError(f'"environment" of upstreams.{one.name} and of upstreams.{other.name} give the variable '
                                     f"{name} two values for the client {client.name}: leave it out of one")


def check_together(config: Config) -> None:
    """What can only be said of several keys. Raises ValueError."""
    for upstream in config.upstreams:
        if upstream.address.is_loopback and upstream.address.port == config.listen_port:
            key = upstream.key or "upstream_"
            raise ValueError(f'"{key}base_url" is the broker itself: give the provider\'s address')
    if any(client.token_env is None for client in config.clients) and not config.allowed_hosts <= set(DEFAULT_HOSTS):
        raise ValueError('"client_token_env" is null, which is refused while "allowed_hosts" has more than the default: name '
                         "a variable that holds a caller token")
    for one, other in itertools.combinations(config.upstreams, 2):
        for rule, twin in itertools.product(one.rules, other.rules):
            if rule.meets(twin):
                raise ValueError(f'"upstreams.{one.name}" and "upstreams.{other.name}" have rules that one request could match: '
                                 f'"{rule.text}" and "{twin.text}"; narrow one of them, or give one upstream a "prefix"')
    check_variables(config)


def load_config(file: str, dry_run: bool = False, port: int | None = None) -> Config:
    """The configuration in a file, with the command line's words put over it. Raises ConfigError."""
    path = os.path.abspath(file)
    try:
        with open(path, "rb") as stream:
            raw = strict_json(stream.read(MIB))
        if not isinstance(raw, dict):
            raise InvalidJson("it is not one object: start from broker_config.example.json")
        is_dry_run = dry_run or raw.get("mode") == "dry_run"
        values = checked_members(raw, keys_for(raw, is_dry_run))
        short = {key: values.get(SHORT_NAMES.get(key, key), "") for key in UPSTREAM_KEYS}
        parts = checked_parts(values, "upstreams", UPSTREAM_KEYS) or [(DEFAULT_NAME, "", short)]
        upstreams = tuple(make_upstream_config(*part) for part in parts)
        short = {**dict.fromkeys(CLIENT_KEYS), "token_env": values["client_token_env"]}
        parts = checked_parts(values, "clients", CLIENT_KEYS) or [(DEFAULT_NAME, "client_", short)]
        clients = tuple(make_client_config(*part, upstreams) for part in parts)
        config = Config(path, {key: values[key] for key in AFTER_RESTART}, values["listen_port"] if port is None else port,
                        is_dry_run, upstreams, clients, frozenset(map(str.lower, values["allowed_hosts"])),
                        values["max_request_bytes"], values["upstream_timeout_seconds"], values["max_concurrent_requests"],
                        os.path.join(os.path.dirname(path), values["event_log"]))
        check_together(config)
        return config
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror}: give the file with --config FILE") from None
    except InvalidJson as error:
        raise ConfigError(f"{file}: is not JSON (UTF-8, no comments, no byte-order mark): {error}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# 9. Event log and ledger: one JSON object a line, one write a line, the only writer; and what is left of a limit.
#
# To add a field: its name in EVENT_FIELDS, and in FOREIGN_FIELDS if others choose what is in it. An unlisted field is a
# programming error. The log is the only ledger: whoever reads it can say what is left of a budget.

EVENT_FIELDS = {event: frozenset(names.split()) for event, names in {
    **dict.fromkeys(("start", "stop", "reload"), "mode version listen"),
    "request": "id client upstream method path mode model stream request_bytes",
    "response": "id client upstream model status outcome response_bytes ttfb_ms duration_ms usage upstream_request_id attempt",
    "denied": "id client upstream status reason method path model suppressed",
}.items()}
FOREIGN_FIELDS = ("method", "path", "model", "upstream_request_id")
LOG_LINE_LIMIT, PENDING_LIMIT = MIB, 20_000     # of a log that is read: a line, and requests without a response yet
encode_json = json.JSONEncoder(separators=(",", ":")).encode
first_json = json.JSONDecoder().raw_decode      # at half the price of json.loads: a start reads hundreds of thousands of lines


def utc_time() -> str:
    """RFC 3339, milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def today() -> int:
    """The UTC day's number."""
    return int(time.time() // 86400)


def loggable(value: str) -> str:
    """A string that somebody else chose, as it may stand in the log: redacted before it is cut, so that no part stays."""
    redactor = HIDDEN.in_output
    text = redactor.text(value[:LOGGED_STRING_LIMIT + redactor.longest])[:LOGGED_STRING_LIMIT]
    # Attack: with a secret that has a backslash, a string that JSON's escapes turn into it.
    is_plain = text.isprintable() and text.isascii() and "\\" not in text and '"' not in text
    return "[redacted]" if not is_plain and redactor.has(encode_json(text).encode()) else text


def lock_exclusively(fd: int) -> None:
    """Raises OSError where another broker has it. Windows has no such lock: there two brokers would share a budget."""
    try:
        import fcntl
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        raise OSError(errno.EWOULDBLOCK, "another broker with budgets writes it: give each an event_log of its own") from None


class EventLog:
    """Appends to a file of mode 0600. Every method raises OSError when it can't."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.RLock()      # held for a write, which may make the file anew: two lines must not mix
        self._fd, self._torn, self._is_ledger, self._is_closed = -1, False, False, False

    @staticmethod
    def _check_file(found: os.stat_result) -> None:
        # Attack: a link in the log's place makes us append to a file of the attacker's choice.
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise OSError(errno.EINVAL, "it must be a regular file of its own, no link and no pipe: remove it or name another")
        if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "it belongs to another user: name another file")

    def check(self) -> None:
        """Finds what `open` would, but makes nothing."""
        if os.path.lexists(self.path):
            self._check_file(os.lstat(self.path))
        elif not os.path.isdir(os.path.dirname(self.path)):
            raise FileNotFoundError(errno.ENOENT, "its folder does not exist: make it")
        if not os.access(self.path if os.path.lexists(self.path) else os.path.dirname(self.path), os.W_OK):
            raise PermissionError(errno.EACCES, "it is not writable")

    def open(self) -> None:
        """Opens or makes the file anew; the old one stays in use when that fails."""
        with self._lock:
            flags = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_NOCTTY"))
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | flags, 0o600)
            except OSError as error:
                reason = "it is a link: name the file itself" if error.errno == errno.ELOOP else error.strerror
                raise OSError(error.errno, reason) from None
            try:
                self._check_file(os.fstat(fd))
                if hasattr(os, "fchmod"):
                    os.fchmod(fd, 0o600)
                same = self._fd >= 0 and os.path.sameopenfile(fd, self._fd)
                if self._is_ledger and not same:
                    lock_exclusively(fd)
                size = os.lseek(fd, 0, os.SEEK_END)
                os.lseek(fd, max(0, size - 1), os.SEEK_SET)
                self._torn = os.read(fd, 1) not in (b"", b"\n")     # a crash, or a full disk
            except OSError:
                os.close(fd)
                raise
            if self._fd >= 0:
                os.close(fd if same else self._fd)      # a lock is the descriptor's that has it
            self._fd = self._fd if same else fd

    def become_ledger(self) -> None:
        """The ledger of budgets: from now on no other broker may write it."""
        with self._lock:
            if not self._is_ledger:
                lock_exclusively(self._fd)
                self._is_ledger = True

    def append(self, event: str, fields: dict[str, Any]) -> None:
        """Writes one line; in what others chose the secret and the tokens are redacted."""
        if not EVENT_FIELDS[event].issuperset(fields):
            raise KeyError(event)
        foreign = {name: loggable(fields[name]) for name in FOREIGN_FIELDS if fields.get(name)}
        data = (encode_json({"time": utc_time(), "event": event, **fields, **foreign}) + "\n").encode()
        with self._lock:
            if self._is_closed:
                return                  # the last line stands there already
            # A deleted file is noticed by its link count, without a look at its path.
            if os.fstat(self._fd).st_nlink == 0:
                self.open()
            data = b"\n" + data if self._torn else data
            self._torn = os.write(self._fd, data) < len(data)
            if self._torn:
                raise OSError(errno.ENOSPC, "the disk is full")

    def write(self, event: str, fields: dict[str, Any]) -> None:
        """A line that nothing depends on: where it can't be written, stderr says so."""
        try:
            self.append(event, fields)
        except OSError as error:
            say(f"broker: the event log can't be written: {self.path}: {error.strerror}", often="log")

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._is_closed = -1, True


def read_events(path: str, day: str = "") -> Iterator[Json]:
    """The events in a log, {} for a line that can't be read; with `day` only those of that UTC day. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    with open(path, "rb") as file:
        while line := file.readline(LOG_LINE_LIMIT):
            if line.startswith(b'{"time":"') and not line.startswith(day.encode(), 9):
                continue
            try:
                text = line.decode()
                event, end = first_json(text)
                if text[end:].strip() or event["event"] not in EVENT_FIELDS:
                    raise ValueError
            except (ValueError, TypeError, KeyError, RecursionError):
                event = {}
            if not event or str(event.get("time", "")).startswith(day):
                yield event


def log_files(path: str) -> list[str]:
    """The log, and before it the files of ours that were rotated from it: STEM.*.EXT, of today at least."""
    import glob
    stem, extension = map(glob.escape, os.path.splitext(path))
    found = []
    for rotated in glob.iglob(f"{stem}.*{extension}"):
        with contextlib.suppress(OSError):
            info = os.lstat(rotated)
            ours = not hasattr(os, "geteuid") or info.st_uid == os.geteuid()
            if stat.S_ISREG(info.st_mode) and ours and info.st_mtime >= today() * 86400:
                found.append((info.st_mtime, rotated))
    return [*(rotated for _, rotated in sorted(found)), *filter(os.path.exists, [path])]


def estimated_tokens(size: int) -> int:
    return -(-size // BYTES_A_TOKEN)


def tokens_in(usage: Any) -> int:
    """What a `usage` of the log adds up to. Raises ValueError, TypeError."""
    return sum(int(usage.get(name, 0)) for name in ("input_tokens", "output_tokens")) if isinstance(usage, dict) else 0


def used_today(path: str) -> tuple[dict[str, int], int]:
    """(tokens that each client has used, lines that can't be read), from the log and its rotated files. Raises OSError."""
    used: collections.Counter[str] = collections.Counter()
    # A request is charged an estimate until its response tells better: how much, by its id; None where nothing is charged.
    charged: dict[str, int | None] = {}
    unreadable, day = 0, utc_time()[:10]
    for event in itertools.chain.from_iterable(read_events(file, day) for file in log_files(path)):
        try:
            if event["event"] == "request":
                asks = event["mode"] == "proxy" and event["method"] in BODY_METHODS
                estimate = estimated_tokens(int(event["request_bytes"])) if asks else None
                used[event["client"]] += estimate or 0
                charged[event["id"]] = estimate
                if len(charged) > PENDING_LIMIT:
                    del charged[next(iter(charged))]
            elif event["event"] == "response":
                # Without its request it began before midnight: the day is the response's.
                estimate = charged.pop(event["id"], None if event["outcome"] == "dry_run" else 0)
                if estimate is not None:
                    used[event["client"]] += tokens_in(event["usage"]) - estimate
        except (KeyError, TypeError, ValueError, OverflowError):
            unreadable += 1
    return used, unreadable


class ClientUse:
    """What one client has under way and behind it."""

    def __init__(self) -> None:
        self.places, self.filled = math.inf, 0.0    # in its bucket of requests, full at first; and at what time
        self.in_flight = self.reserved = 0          # requests, and the tokens that they asked for
        self.used: collections.Counter[int] = collections.Counter()     # tokens, by the day's number

    def fill(self, rate: int) -> None:
        """Its bucket has `rate` places, and gets as many back a minute."""
        now = time.monotonic()
        self.places = min(rate, self.places + (now - self.filled) * rate / 60)
        self.filled = now


def too_many(reason: str) -> RequestError:
    return RequestError("too_many_requests_in_flight", f"the broker is full: {reason}; try again in a moment", wait=1)


class Limits:
    """What requests hold of the limits of their client, by its name, and of those for all together; outlives a reload."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[str, ClientUse] = collections.defaultdict(ClientUse)
        self._in_flight = self._buffered = 0        # all requests, and the bytes of their bodies

    def load(self, used: dict[str, int]) -> None:
        """What the log says of today."""
        with self._lock:
            for name, tokens in used.items():
                self._uses[name].used[today()] = tokens

    def enter(self, client: ClientConfig, most: int) -> None:
        """Counts a request in. Raises RequestError; a refusal by the rate costs nothing, a later one its place."""
        with self._lock:
            use, rate = self._uses[client.name], client.requests_per_minute
            if rate is not None:
                use.fill(rate)
                if use.places < 1:
                    wait = math.ceil((1 - use.places) * 60 / rate)
                    raise RequestError("rate_limited", f"{client.name} may make {rate} requests a minute (requests_per_minute): "
                                       f"try again in {wait} s, or have whoever runs the broker raise it", wait=wait)
                use.places -= 1
            if client.max_concurrent_requests is not None and use.in_flight >= client.max_concurrent_requests:
                raise too_many(f"{client.name} has {use.in_flight} requests in flight (max_concurrent_requests)")
            if self._in_flight >= most:
                raise too_many(f"{self._in_flight} requests are in flight (max_concurrent_requests)")
            use.in_flight += 1
            self._in_flight += 1

    def buffer(self, size: int) -> None:
        """Room for so many bytes more of a request's body. Raises RequestError."""
        with self._lock:
            if self._buffered + size > BUFFERED_LIMIT:
                raise too_many(f"the bodies of all requests together are over {BUFFERED_LIMIT // MIB} MiB")
            self._buffered += size

    def reserve(self, client: ClientConfig, asked: int) -> None:
        """Sets tokens aside for a request. Raises RequestError where they don't fit into the day's budget."""
        with self._lock:
            use, budget = self._uses[client.name], client.tokens_per_day
            used = use.used[today()]
            if budget is not None and used + use.reserved + asked > budget:
                midnight = 86400 - int(time.time()) % 86400
                fits_later = used + asked <= budget
                patience = "" if asked > budget else f"wait {'for those in flight' if fits_later else 'until midnight UTC'}, "
                raise RequestError(
                    "budget_exhausted", f"{client.name} may use {budget} tokens a day (tokens_per_day): {used} are used, "
                    f"{use.reserved} reserved by requests in flight, and this request asks for {asked}. Ask for fewer "
                    f"(max_tokens), {patience}or have whoever runs the broker raise it", wait=1 if fits_later else midnight)
            use.reserved += asked

    def leave(self, client: ClientConfig, size: int, reserved: int, used: int) -> None:
        """Gives back all that a request holds, and charges the tokens that it used."""
        with self._lock:
            use = self._uses[client.name]
            use.in_flight -= 1
            use.reserved -= reserved
            use.used[today()] += used
            self._in_flight -= 1
            self._buffered -= size

    def left(self, client: ClientConfig) -> dict[str, int]:
        """By the configuration's names."""
        with self._lock:
            use = self._uses[client.name]
            if client.requests_per_minute is not None:
                use.fill(client.requests_per_minute)
            left = {"requests_per_minute": use.places,
                    "max_concurrent_requests": (client.max_concurrent_requests or 0) - use.in_flight,
                    "tokens_per_day": (client.tokens_per_day or 0) - use.used[today()] - use.reserved}
            return {name: max(0, int(left[name])) for name in client.limits}


# ----------------------------------------------------------------------------------------------------------------------
# 10. Admission: a check for each step of the map. It raises RequestError, or lets the request pass. Pure, but for an alarm
# and the turn that heavy work waits for.

PORT = re.compile(r":[0-9]{1,5}\Z")
# RFC 9110 section 8.3.1. A charset other than UTF-8 would let two parsers read two texts; every other parameter, and an
# empty one, says nothing about the text. Blanks stand in one place: in two, a match that fails takes exponential time.
JSON_CONTENT = re.compile(
    rf'application/json[ \t]*(?:;[ \t]*(?:(?:charset=(?:utf-?8|us-ascii|"utf-?8"|"us-ascii")'
    rf'|(?!charset){TOKEN}=(?:{TOKEN}|"[^"\\]*"))[ \t]*)?)*', re.I)
CASE_SENSITIVE_KEYS = frozenset(("model", "stream", "tools", "messages", "input"))
# json holds the interpreter's lock for a whole text: a long one, or one of many small parts, is parsed alone. So is a heap
# of small chunks.
HEAVY_WORK = threading.Lock()


class Caller(NamedTuple):
    """A client as a request meets it: with the digest of its token (None: no token needed)."""
    client: ClientConfig
    digest: bytes | None

    @property
    def rules(self) -> list[Rule]:
        """What it may ask for, as it writes it; without a prefix first."""
        if self.client.rules is not None:
            return list(self.client.rules)
        return [rule for upstream in reversed(self.client.upstreams) for rule in upstream.rules]


class Route(NamedTuple):
    """Where a request goes, with which types of body, and its path: as the caller should have written it, and as sent."""
    upstream: UpstreamConfig
    types: frozenset[str]
    path: str
    upstream_path: str


def check_host(head: RequestHead, allowed: frozenset[str]) -> None:
    """Attack: DNS rebinding. A page's own name is made to point at 127.0.0.1; its Host header gives it away."""
    host = PORT.sub("", head.fields["host"].lower())
    if host not in allowed:
        raise RequestError("host_not_allowed", f"the Host header names {host[:100] or 'no host'}, which is not in the broker's "
                           "allowed_hosts: call it as 127.0.0.1 or localhost, or add the name to its configuration")


def check_not_a_web_page(head: RequestHead) -> None:
    """Attack: a web page posts to localhost. A browser says so in Origin or Sec-Fetch-Site; an SDK sends neither.

    Node's fetch sends Sec-Fetch-Mode, so that one may not decide.
    """
    if not head.fields.keys().isdisjoint(("origin", "sec-fetch-site", "access-control-request-method")):
        raise RequestError("browser_not_allowed", "a web browser or a desktop app's web view made this request, as its headers "
                           "say (Origin, Sec-Fetch-Site), and the broker serves none: call it from a program (curl, an SDK, an "
                           "agent), or from the app's main process")


def shown_tokens(head: RequestHead) -> Iterator[str]:
    """Every value that may be a caller token, in whichever header an SDK puts its API key."""
    for _, name, value in head.lines:
        if name == "authorization":
            scheme, _, value = value.partition(" ")
            if scheme.lower() in ("bearer", "token"):
                yield value.strip()
        elif name in TOKEN_HEADERS:
            yield value


def identify_caller(head: RequestHead, callers: dict[bytes | None, Caller]) -> Caller:
    """Who is asking. `callers` by the digest of their token: what is looked up tells a guesser nothing of a token, and
    takes the same time for every one. Raises RequestError."""
    if None in callers:
        return callers[None]
    digests = {digest(token) for token in shown_tokens(head)}
    known = [callers[shown] for shown in digests if shown in callers and hmac.compare_digest(shown, callers[shown].digest or b"")]
    if len(known) == 1 and (known[0].client.expires is None or datetime.now(timezone.utc) < known[0].client.expires):
        return known[0]
    raise RequestError("client_token_required", "the broker's caller token is missing, or not this broker's: a dry-run and `--` "
                       "make a new one at each start. It goes into the X-Broker-Token header, or where your SDK puts its API key")


def find_route(head: RequestHead, caller: Caller) -> Route:
    """The one upstream with a rule for the request. Raises RequestError.

    The prefix comes off first. A `/v1` that is missing or there twice is mended where only the mended path has a rule.
    """
    wants_websocket = "websocket" in head.words("upgrade")
    methods: set[str] = set()
    for mend in (str, other_reading):           # `str`: as it came
        for upstream in caller.client.upstreams:
            if not head.path.startswith(upstream.prefix + "/"):
                continue
            path, decoded = (mend(whole[len(upstream.prefix):]) for whole in (head.path, head.decoded_path))
            pairs = upstream.rules.pairs(decoded)
            if pairs and caller.client.rules is not None:
                pairs &= caller.client.rules.pairs(upstream.prefix + decoded)
            types = frozenset(kind for method, kind in pairs if method == head.method)
            if types and not wants_websocket:
                return Route(upstream, types, upstream.prefix + path, path)
            methods |= {method for method, _ in pairs}
        if methods:
            break
    if methods and wants_websocket:
        raise RequestError("upgrade_not_supported", "the broker speaks plain HTTP/1.1, no WebSocket: send the request as HTTP",
                           "Upgrade: HTTP/1.1\r\nConnection: Upgrade\r\n")
    what = f"{head.method} {head.path} is not in the broker's allowed_paths"
    if methods:
        allow = ", ".join(sorted(methods))
        raise RequestError("method_not_allowed", f"{what}, which has this path for {allow} only", f"Allow: {allow}\r\n")
    more = f" and {len(caller.rules) - 20} more" if len(caller.rules) > 20 else ""
    raise RequestError("path_not_allowed", f"{what}; allowed: {', '.join(rule.text for rule in caller.rules[:20])}{more}. If it "
                       "should be, add it to the broker's configuration")


def media_type(field: str) -> str:
    """Of a Content-Type header, lower case; "" for two of them, and for JSON that is not surely UTF-8."""
    kind, is_list = field.partition(";")[0].strip().lower(), "," in re.sub('"[^"]*"', "", field)
    return "" if is_list or (kind == JSON_TYPE and not JSON_CONTENT.fullmatch(field)) else kind


def check_body_head(head: RequestHead, types: frozenset[str], limit: int) -> None:
    """All that can be said of a body before it comes."""
    if head.length is not None and head.length > limit:
        raise RequestError("request_too_large", f"the body has {head.length} bytes, the broker takes {limit} "
                           "(max_request_bytes in its configuration)")
    if not head.is_identity:
        raise RequestError("content_encoding_not_supported", "the broker must be able to read the body: send it uncompressed "
                           "(for Codex: set enable_request_compression = false under [features])")
    if (head.length or head.chunked) and media_type(head.fields.get("content-type", "")) not in types:
        raise RequestError("content_type_not_supported", f"the body's Content-Type must be {' or '.join(sorted(types))} "
                           "(charset absent or utf-8)")


class BodyFacts(NamedTuple):
    """What the rest of the way wants to know of a body."""
    model: str | None = None            # as it was checked
    models: tuple[Any, ...] = ()        # every one that the provider might take, for a client with allowed_models
    tokens: int = 0                     # asked for, by a client with tokens_per_day
    stream: bool = False
    json: Json = {}                     # empty unless dry-run asks for it


def check_json(body: bytes) -> Json:
    """Attack: one JSON text that we and the provider read differently, so that a checked value is not the used one."""
    try:
        members = strict_json(body)
        if not isinstance(members, dict):
            raise InvalidJson("it is not one object")
        for key in members:
            if key not in CASE_SENSITIVE_KEYS and key.casefold() in CASE_SENSITIVE_KEYS:
                raise InvalidJson(f"it has a key that is {json.dumps(key.casefold())} but for case")
    except InvalidJson as error:
        raise RequestError("invalid_json", f"the body is not strict JSON: {error}") from None
    return members


def body_facts(path: str, members: Json, keep: bool, client: ClientConfig) -> BodyFacts:
    """From what a body says, {} where it says nothing that we can read."""
    model = model_in_path(path) or members.get("model")
    return BodyFacts(model if isinstance(model, str) else None,
                     tuple(models_asked(path, members)) if client.models is not None else (),
                     tokens_asked(members) if client.tokens_per_day is not None else 0,
                     members.get("stream") is True, members if keep else {})


@contextlib.contextmanager
def parsing_turn(body: bytes) -> Iterator[None]:
    """One long text is parsed at a time, but for one of few parts: that one need not wait for the others."""
    is_long = len(body) > JSON_LIGHT_BYTES
    alone = is_long and HEAVY_WORK.acquire(blocking=False)
    # Without commas there are few parts: what is nested deeply ends the parser soon.
    if is_long and not alone and (len(body) > JSON_HEAVY_BYTES or body.count(b",") > JSON_HEAVY_COMMAS):
        alone = HEAVY_WORK.acquire()
    try:
        yield
    finally:
        if alone:
            HEAVY_WORK.release()


def check_body(head: RequestHead, path: str, body: bytes, keep: bool, client: ClientConfig) -> BodyFacts:
    """The facts of a body that is JSON, and of one that is not. Attack: a text that takes seconds to parse."""
    if not body or media_type(head.fields["content-type"]) != JSON_TYPE:
        facts = body_facts(path, {}, keep, client)
        # Whatever its path names: a form may name another model, where nobody looks.
        return facts._replace(models=()) if body and head.method in BODY_METHODS else facts
    if len(body) > JSON_COST_LIMIT and (cost := sum(map(body.count, (b"{", b"[", b",")))) > JSON_COST_LIMIT:
        raise RequestError("request_too_large", f"the JSON body has {cost} of {{ [ and , together, the broker takes "
                           f"{JSON_COST_LIMIT}: send less at once")
    with parsing_turn(body):
        return body_facts(path, check_json(body), keep, client)


def check_no_secret(head: RequestHead, body: bytes) -> None:
    """The caller should not have the secret; if it does, it has leaked already and must be changed."""
    secrets = HIDDEN.in_answers
    if secrets.windows and (secrets.has(head.raw) or HIDDEN.in_bodies.has(body) or (
            "%" in head.target and secrets.has(urllib.parse.unquote_to_bytes(head.target)))):
        say("broker: ALARM: a caller sent a request that holds the secret itself: it has leaked, replace it in its store",
            often="alarm")
        raise RequestError("secret_in_request", "the request holds the provider's key, which only the broker should have: "
                           "remove it from the caller, and tell the key's owner to replace it")


def check_model(client: ClientConfig, method: str, facts: BodyFacts) -> None:
    """Attack: an agent that may use a cheap model names a dear one, as a fallback say."""
    if client.models is None:
        return
    for model in facts.models:
        if not isinstance(model, str) or not any(glob_matches(pattern, model, 0) for pattern in client.models):
            raise RequestError("model_not_allowed", f"{client.name} may not use the model {json.dumps(model)[:100]}; allowed: "
                               f"{', '.join(client.models)}. If it should, add it to allowed_models in its configuration")
    if not facts.models and method in BODY_METHODS and "*" not in client.models:
        raise RequestError("model_not_allowed", f"{client.name} may only use {', '.join(client.models)}, and the request names "
                           "no model where the broker could check it: name one in a JSON body")


# ----------------------------------------------------------------------------------------------------------------------
# 11. Wires: a socket with deadlines, and the caller looked at while a thread waits for somebody else.
#
# Sockets don't block here, threads do, in one place: `wait_for`. So the thread that owns a caller's connection notices
# by itself that the caller has left, and closes what it holds; nobody closes another thread's socket.

READ, WRITE = 1, 4                      # as select.poll calls them, where there is one


def ready(wanted: dict[int, int], seconds: float) -> list[tuple[int, int]]:
    """(descriptor, events) of those that came within so many seconds; an end or a failure counts as all that was wanted."""
    if hasattr(select, "poll"):
        poller = select.poll()
        for fd, events in wanted.items():
            poller.register(fd, events)
        return [(fd, came & wanted[fd] or wanted[fd]) for fd, came in poller.poll(seconds * 1000)]
    reading, writing = ([fd for fd, events in wanted.items() if events & kind] for kind in (READ, WRITE))
    readable, writable, failed = select.select(reading, writing, [*wanted], seconds)
    return [*((fd, READ) for fd in readable), *((fd, WRITE) for fd in writable), *((fd, wanted[fd]) for fd in failed)]


class Wire:
    """A connection, and what came on it and is not yet read. Deadlines are time.monotonic's; methods raise OSError,
    TimeoutError at the deadline, and ClientDisconnected when a caller that is looked at meanwhile leaves."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.buffer = sock, b""
        self._is_more_likely = True         # to be there at once: what is read next

    @property
    def is_secure(self) -> bool:
        return isinstance(self.sock, ssl.SSLSocket)

    def receive_now(self) -> bytes | None:
        """What is there: b"" at the end, None for nothing yet."""
        try:
            return self.sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None

    def fill(self, deadline: float, caller: Wire | None = None) -> None:
        """Waits for more to read. Raises EOFError at the end."""
        # Where much comes it is there already; TLS may hold it, unseen by a poll. Elsewhere a look would be in vain, and each
        # call of the system passes the interpreter's lock on. That more is there is no longer time for it.
        data = self.receive_now() if self._is_more_likely and time.monotonic() < deadline else None
        while data is None:
            wait_for(self, READ, deadline, caller)
            data = self.receive_now()
        self._is_more_likely = self.is_secure or len(data) == RECEIVE_BYTES
        if not data:
            raise EOFError
        self.buffer = self.buffer + data if self.buffer else data

    def send_now(self, data: bytes | memoryview) -> int:
        try:
            return self.sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0

    def send(self, data: bytes, silence: float, caller: Wire | None = None) -> None:
        """Sends all; `silence` is the longest time in which the peer takes nothing."""
        sent = self.send_now(data)
        while sent < len(data):
            wait_for(self, WRITE, time.monotonic() + silence, caller)
            sent += self.send_now(memoryview(data)[sent:])

    def look(self) -> None:
        """Takes in what a caller has said meanwhile. Raises ClientDisconnected when it has left, or said too much."""
        if ready({self.sock.fileno(): READ}, 0):
            try:
                data = self.receive_now()
            except OSError:
                data = b""
            if data == b"" or len(self.buffer) + len(data or b"") > READ_AHEAD_LIMIT:
                raise ClientDisconnected
            self.buffer += data or b""

    def start_tls(self, context: ssl.SSLContext, host: str, deadline: float, caller: Wire | None) -> None:
        self._is_more_likely = True
        self.sock = context.wrap_socket(self.sock, server_hostname=host, do_handshake_on_connect=False,
                                        suppress_ragged_eofs=False)
        while True:
            try:
                return self.sock.do_handshake()
            except ssl.SSLWantReadError:
                wait_for(self, READ, deadline, caller)
            except ssl.SSLWantWriteError:
                wait_for(self, WRITE, deadline, caller)

    def close(self, abort: bool = False) -> None:
        """`abort` resets the connection, where a plain end would look like a complete answer."""
        with contextlib.suppress(OSError):
            if abort:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if os.name == "nt" else "ii", 1, 0))
            self.sock.close()


def wait_for(wire: Wire, events: int, deadline: float, caller: Wire | None = None) -> int:
    """Blocks until one of the events; returns those that came."""
    wanted = {wire.sock.fileno(): events}
    if caller is not None:
        fd = caller.sock.fileno()
        wanted[fd] = wanted.get(fd, 0) | READ
    while (left := deadline - time.monotonic()) > 0:
        happened = 0
        for came_to, came in ready(wanted, left):
            if caller is not None and came_to == fd and came & READ:
                caller.look()
            if came_to == wire.sock.fileno():
                happened |= came & events
        if happened:
            return happened
    raise TimeoutError


def watching(caller: Wire | None) -> Waiting:
    """For who waits without a socket: what to call now and then."""
    return caller.look if caller is not None else (lambda: None)


def read_head(wire: Wire, deadline: float, limit: int, caller: Wire | None = None) -> bytes:
    """A head with its empty line. Raises Malformed, OSError, and EOFError when the peer says nothing at all."""
    scanned, end = 0, wire.buffer.find(b"\r\n\r\n") + 4
    while end < 4 and len(wire.buffer) <= limit:
        if HOPELESS.search(wire.buffer, max(0, scanned - 2)):
            raise Malformed("its head has a control character, or a line that does not end in CRLF")
        scanned = len(wire.buffer)
        try:
            wire.fill(deadline, caller)
        except EOFError:
            raise Malformed("it ends in its head") if wire.buffer else EOFError from None
        end = wire.buffer.find(b"\r\n\r\n", max(0, scanned - 3)) + 4
    if not 4 <= end <= limit:
        raise TooLong(f"its head is longer than {limit // KIB} KiB")
    raw, wire.buffer = wire.buffer[:end], wire.buffer[end:]
    return raw


# ----------------------------------------------------------------------------------------------------------------------
# 12. The upstream: kept connections, requests out, answers in; and what stands in its place in a dry run.
#
# Why not http.client or urllib.request: they take 103 for the answer, two lengths, bare LF and negative chunk sizes; they
# can't be left when the caller leaves; and urllib follows redirects and sends a loopback upstream's key to a proxy.


def outbound_head(head: RequestHead, path: str, size: int, upstream: UpstreamConfig, secret: Secret | None) -> bytes:
    """The request's head for the upstream. First what the caller brought is stripped, then ours is attached: so a caller
    can't name our headers in `Connection` and have them removed."""
    target = upstream.address.path + path + head.target[len(head.path):]     # the query as it came
    length = f"Content-Length: {size}\r\n" if size or head.method in BODY_METHODS else ""
    extra = "".join([f"{name}: {value}\r\n" for name, value in upstream.extra_headers.items()])
    scheme = f"{upstream.auth_scheme} " if upstream.auth_scheme else ""
    credential = f"{upstream.auth_header}: {scheme}{secret.reveal()}\r\n" if secret is not None else ""
    # Accept-Encoding: the secret can't be found in a compressed answer.
    return (f"{head.method} {target} HTTP/1.1\r\nHost: {upstream.address.authority}\r\n"
            f"{head.end_to_end(REQUEST_DROPPED, upstream.own_headers, REQUEST_KEPT)}{length}Accept-Encoding: identity\r\n"
            f"{extra}{credential}\r\n").encode("latin-1")


def protocol_error(reason: object) -> RequestError:
    return RequestError("upstream_protocol_error", f"the provider's answer is not proper HTTP: {reason}")


class Answer:
    """An answer from the upstream: its head, and its body piece by piece."""

    def __init__(self, wire: Wire, head: AnswerHead, request: RequestHead, timeout: float, caller: Wire,
                 keep: Callable[[Wire], None] | None) -> None:
        """`keep` takes the connection back; None where it must not be used again. Raises Malformed."""
        self._wire, self._timeout, self._caller = wire, timeout, caller
        self.status, self.reason, self.head = head.status, head.reason, head
        self.has_no_body = request.method == "HEAD" or head.status in (204, 304)
        if not self.has_no_body and not head.is_identity:
            raise Malformed("its body is compressed although identity was asked for")
        self._body = Body(0 if self.has_no_body else head.length, head.chunked and not self.has_no_body, strict=False)
        # Attack: a body after an answer that has none: it would be the next caller's answer.
        self._keep, self._is_closed = keep if head.keep_alive and not self.has_no_body else None, False
        self.announced_length = None if head.status == 204 else head.length
        self._looked = time.monotonic()

    @property
    def done(self) -> bool:
        return self._body.done

    def end_to_end(self) -> str:
        """The header lines that may go on to the caller."""
        return self.head.end_to_end(ANSWER_DROPPED)

    def ready(self) -> bytes:
        """The body's bytes that have come. Raises RequestError."""
        data = b""
        try:
            if not self._body.done:
                data, self._wire.buffer = self._body.take(self._wire.buffer)
        except Malformed as error:
            raise protocol_error(error) from None
        if self._body.done:
            self.close()                    # now and not when the caller has it all: so its next request finds the connection
        return data

    def read(self, deadline: float | None = None) -> bytes:
        """The next piece of the body, maybe empty. Raises RequestError."""
        if (now := time.monotonic()) - self._looked > LOOK_SECONDS:
            self._looked = now          # who has always more to say leaves no wait in which a leaving caller is seen
            self._caller.look()
        try:
            self._wire.fill(deadline or now + self._timeout, self._caller)
        except (EOFError, OSError) as error:    # a reset, silence, or an end without TLS's own are no end of a body
            if isinstance(error, OSError) or self._body.chunked or self._body.left is not None:
                raise protocol_error("it was cut off") from None
            self._body.done, self._keep = True, None
        return self.ready()

    def close(self) -> None:
        """Gives the connection back if the answer was read exactly to its end, or else closes it."""
        if self._is_closed:
            return                          # the connection may be another's by now
        self._is_closed = True
        if self._keep is not None and self._body.done and not self._wire.buffer:
            self._keep(self._wire)
        else:
            self._wire.close()


class CannedWire(Wire):
    """No connection: a dry run's answer stands on it as if it had come from an upstream, piece by piece."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = iter(pieces)
        self.buffer = next(self._pieces, b"")

    def fill(self, deadline: float, caller: Wire | None = None) -> None:
        self.buffer += next(self._pieces)

    def close(self, abort: bool = False) -> None:
        pass


class DryRun:
    """In an upstream's place: it is never given a secret source or a connection."""

    def __init__(self, config: UpstreamConfig) -> None:
        self.config = config

    def answer(self, exchange: Exchange, head: RequestHead, body: bytes, caller: Wire) -> Answer:
        """A canned answer, whose text says what would have been sent where."""
        path, config, facts = exchange.upstream_path, self.config, exchange.facts
        text = (f"DRY RUN: the broker would send {head.method} {config.address.url}{path} with a body of {len(body)} bytes and "
                f"{config.describe_credential()} attached. No secret was read and nothing was sent.")
        exchange.outcome = "dry_run"
        kind, pieces = canned_answer(head, path, facts.json, len(body), facts.model, text)
        raw = (f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nDate: {email.utils.formatdate(usegmt=True)}\r\n"
               f"Content-Length: {sum(map(len, pieces))}\r\n\r\n")
        return Answer(CannedWire(pieces), AnswerHead(raw.encode()), head, 0, caller, None)


def only_interim(data: bytes) -> bool:
    """Whether what came while a body is still being sent are interim answers (100, 103) alone, maybe one not yet whole."""
    heads = data.split(b"\r\n\r\n")
    return len(data) <= UPSTREAM_HEAD_LIMIT and len(heads) <= INTERIM_LIMIT + 1 and all(
        b"HTTP/1.1 1".startswith(head[:10]) or b"HTTP/1.0 1".startswith(head[:10]) for head in heads)


def provider_words(answer: Answer, secret: Secret) -> str:
    """Why a provider rejects a key, in its own words: a missing scope, an address, an organization. Nothing of the key."""
    deadline, body = time.monotonic() + REJECTION_SECONDS, b""
    with contextlib.closing(answer), contextlib.suppress(RequestError):
        body = answer.ready()
        while not answer.done and len(body) < REJECTION_BYTES:
            body += answer.read(deadline)
    try:
        said = json.loads(body)
        error = said.get("error", said)
        text = error if isinstance(error, str) else error.get("message") or error.get("detail") or ""
    except (ValueError, AttributeError, RecursionError):
        return ""
    key, words = secret.reveal(), masked(str(text)[:4 * REJECTION_WORDS]).split()
    shown = ["[masked]" if "*" in word or any(word[at:at + 4] in key for at in range(len(word) - 3)) else word for word in words]
    return printable(" ".join(shown))[:REJECTION_WORDS]


class Proxy(NamedTuple):
    """The forward proxy that the environment names for an upstream. `authorization`: a header line, or nothing."""
    host: str
    port: int
    authorization: str


def find_proxy(address: Address) -> Proxy | None:
    """As urllib reads it. Raises ConfigError."""
    named = any(name.lower() == "https_proxy" for name in os.environ) or sys.platform in ("win32", "darwin")
    # Attack: in urllib `http_proxy` applies to 127.0.0.1 too; a loopback upstream's key would go there readable.
    if address.is_loopback or not named:
        return None                     # urllib.request would take long to import, at every start, to say the same
    import urllib.request
    url = urllib.request.getproxies().get("https")
    if not url or urllib.request.proxy_bypass(f"{address.host.strip('[]')}:{address.port}"):
        return None
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname or "", parts.port or 80
        # urllib would speak to an https:// proxy in plain text.
        if parts.scheme != "http" or not is_text(f"[{host}]" if ":" in host else host, HOST_NAME):
            raise ValueError
        if parts.username is None:
            return Proxy(host, port, "")
        pair = ":".join(urllib.parse.unquote(word, errors="strict") for word in (parts.username, parts.password or "")).encode()
    except ValueError:
        raise ConfigError("HTTPS_PROXY: must be http://[user:password@]host[:port], in UTF-8: TLS to the proxy (https://) and "
                          "SOCKS are not supported; name another one, or unset it") from None
    return Proxy(host, port, f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}\r\n")


def is_quiet(wire: Wire) -> bool:
    """Whether nothing has come on an idle connection, nor its end. Not asked of a poll: TLS has session tickets to read."""
    try:
        return wire.receive_now() is None
    except OSError:
        return False


def make_tls_context() -> ssl.SSLContext:
    # A bare context, for create_default_context() writes the keys where SSLKEYLOGFILE says.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_default_certs()
    context.set_alpn_protocols(["http/1.1"])
    # Python sets it: with OpenSSL 3 an answer that was cut off would read as a complete one.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
    return context


class Upstream:
    """One provider's address with its secret: its connections, and how a request gets there."""

    def __init__(self, config: UpstreamConfig, secrets: SecretCache, proxy: Proxy | None, timeout: float) -> None:
        self.config, self.secrets, self.proxy, self._timeout = config, secrets, proxy, timeout
        self._lock = threading.Lock()       # of the idle connections; held for no I/O that waits
        self._idle: dict[Wire, float] = {}  # since when, the newest last
        self._closed = False
        self._context: ssl.SSLContext | None = None
        self._host, self._port, _ = proxy or (config.address.host.strip("[]"), config.address.port, "")     # to connect to
        self._addresses = SharedRun(self._look_up)

    def answer(self, exchange: Exchange, head: RequestHead, body: bytes, caller: Wire) -> Answer:
        """The provider's answer; asked once more with a new secret if the first one is rejected. Raises RequestError."""
        secret = self._secret(caller)
        while True:
            exchange.secret = secret.reveal() if secret is not None else None
            raw = outbound_head(head, exchange.upstream_path, len(body), self.config, secret)
            answer = self._ask(head, raw, body, caller)
            exchange.upstream_request_id = answer.head.request_id
            if answer.status != 401 or secret is None:
                break
            used, words = secret, provider_words(answer, secret)
            secret = self.secrets.renew(used, watching(caller))
            if exchange.attempt == 2 or secret == used:
                raise self._rejection(words)
            exchange.attempt = 2
        if 300 <= answer.status < 400 and "location" in answer.head.fields:
            # Attack: a redirect would take the credential, or the caller's next request, to another host.
            answer.close()
            raise RequestError("upstream_redirect", f"the provider answered with a redirect ({answer.status}), which is not "
                               "followed: check upstream_base_url (base_url below upstreams) in the broker's configuration")
        return answer

    def _secret(self, caller: Wire) -> Secret | None:
        try:
            return self.secrets.get(watching(caller))
        except SecretUnavailable:
            raise RequestError("secret_unavailable", "the broker could not get the provider's key from its source; the reason "
                               "stands in the terminal where the broker runs") from None

    def _rejection(self, words: str) -> RequestError:
        said = f", and says: {words}" if words else ""
        say(f"broker: {self.config.address.authority} rejects the secret (401){said}: check the key, then send SIGHUP",
            often=f"rejected {self.config.name}")
        return RequestError("upstream_rejected_secret", f"the provider rejects the key that the broker holds (401){said}. Your "
                            "caller token is fine: whoever runs the broker has to check the key at its source")

    def _ask(self, head: RequestHead, raw: bytes, body: bytes, caller: Wire) -> Answer:
        """Sends the request and returns the answer when its head is there. Raises RequestError."""
        kept, data = self._take_idle(), raw + body
        while True:
            wire, sent = kept or self.connect(caller), 0
            try:
                sent = self._send(wire, data, caller)
                # Attack: a GET's body that the upstream does not read: it would be the next caller's request.
                may_keep = sent == len(data) and (not body or head.method in BODY_METHODS)
                return self._receive(wire, head, caller, self._keep if may_keep else None)
            except BaseException as error:
                wire.close()
                authority = self.config.address.authority
                if isinstance(error, Malformed):
                    raise protocol_error(error) from None
                if isinstance(error, TimeoutError):
                    raise RequestError("upstream_timeout", f"{authority} did not answer within {self._timeout:g} seconds "
                                       "(upstream_timeout_seconds in the broker's configuration)") from None
                if not isinstance(error, (EOFError, OSError)):
                    raise
                # RFC 9112 section 9.3.1: only what is safe to repeat is repeated, and only for a kept connection.
                if kept is None or (sent and head.method not in ("GET", "HEAD")):
                    raise RequestError("upstream_unreachable", f"{authority} closed the connection before it answered; the "
                                       "request may have been carried out") from None
                kept = None             # not another kept one, which may be on its way out as well

    def _send(self, wire: Wire, data: bytes, caller: Wire) -> int:
        """How much was taken; not all if the upstream has answered before (413, say), or closed. Raises OSError for none."""
        sent = 0
        try:
            while sent < len(data):
                sent += wire.send_now(memoryview(data)[sent:])
                if sent < len(data) and wait_for(wire, READ | WRITE, time.monotonic() + self._timeout, caller) & READ:
                    said = wire.receive_now()
                    wire.buffer += said or b""
                    if said == b"" or not only_interim(wire.buffer):
                        break
        except OSError as error:
            if isinstance(error, TimeoutError) or not sent:
                raise
        return sent                     # what it said before it closed may still be there to read

    def _receive(self, wire: Wire, request: RequestHead, caller: Wire, keep: Callable[[Wire], None] | None) -> Answer:
        """The final answer; interim ones are dropped. Raises Malformed, TimeoutError; OSError and EOFError before any byte."""
        deadline, limit = time.monotonic() + self._timeout, UPSTREAM_HEAD_LIMIT
        for _ in range(INTERIM_LIMIT + 1):
            try:
                head = AnswerHead(read_head(wire, deadline, limit, caller))
            except (EOFError, OSError) as error:
                if not isinstance(error, TimeoutError) and (limit < UPSTREAM_HEAD_LIMIT or wire.buffer):
                    raise Malformed("it ends in its head") from None
                raise
            limit -= len(head.raw)
            if head.status == 101:
                break
            if head.status >= 200:
                return Answer(wire, head, request, self._timeout, caller, keep)
        raise Malformed("it switches protocols, or sends too many interim answers")

    def _take_idle(self) -> Wire | None:
        """A kept connection on which nothing has happened since; one that was closed is noticed here."""
        while True:
            with self._lock:
                wire = self._idle.popitem()[0] if self._idle else None
            if wire is None or is_quiet(wire):
                return wire
            wire.close()

    def _keep(self, wire: Wire) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < UPSTREAM_IDLE_CONNECTIONS:
                self._idle[wire] = time.monotonic()
                return
        wire.close()

    def sweep(self) -> None:
        """Closes idle connections that are too old, or were closed at the other end."""
        with self._lock:
            for wire, since in [*self._idle.items()]:
                if self._closed or since + IDLE_SECONDS < time.monotonic() or not is_quiet(wire):
                    del self._idle[wire]
                    wire.close()

    def close(self) -> None:
        """No connection is kept any more."""
        self._closed = True
        self.sweep()

    def connect(self, caller: Wire | None = None) -> Wire:
        """A new connection, TLS and proxy included. Raises RequestError."""
        address, wire, in_tls = self.config.address, None, False
        try:
            addresses = self._resolve(caller)
            deadline = time.monotonic() + UPSTREAM_CONNECT_SECONDS
            wire = self._open(addresses, deadline, caller)
            if self.proxy is not None:
                self._tunnel(wire, self.proxy.authorization, deadline, caller)
            in_tls = address.secure
            if in_tls:
                # Attack: somebody in the network's path. Host name and certificate are always checked.
                self._context = self._context or make_tls_context()
                wire.start_tls(self._context, address.host.strip("[]"), deadline, caller)
            return wire
        except BaseException as error:
            if wire is not None:
                wire.close()
            if isinstance(error, (OSError, UnicodeError, Malformed, EOFError)):
                raise self._no_connection(error, in_tls) from None
            raise

    def _no_connection(self, error: Exception, in_tls: bool) -> RequestError:
        """What failed before anything was sent, in the caller's words."""
        authority, mend = self.config.address.authority, "check the network, the address and HTTPS_PROXY where the broker runs"
        if isinstance(error, TimeoutError):
            return RequestError("upstream_timeout", f"no connection to {authority} within {UPSTREAM_CONNECT_SECONDS} seconds: "
                                f"{mend}")
        if isinstance(error, ssl.SSLCertVerificationError):
            return RequestError("upstream_tls_error", f"the certificate of {authority} is not valid: "
                                f"{error.verify_message.rstrip('.')}. Is a proxy in the way, or SSL_CERT_FILE missing?")
        if in_tls:
            reason = getattr(error, "reason", None) or "the connection was closed"
            return RequestError("upstream_tls_error", f"no TLS with {authority} ({reason}): is it an https:// address, "
                                "and no proxy in the way?")
        peer = f"the proxy {self.proxy.host}:{self.proxy.port}" if self.proxy is not None else authority
        reason = getattr(error, "strerror", None) or str(error) or "it was closed"
        return RequestError("upstream_unreachable", f"no connection to {peer} ({reason}): {mend}")

    def _look_up(self, flags: int = 0) -> list[tuple[Any, Any]]:
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=flags)
        return [(family, address) for family, _, _, _, address in found]

    def _resolve(self, caller: Wire | None) -> list[tuple[Any, Any]]:
        """The addresses; a look-up that takes long is shared by all who wait for it, so that there is one at a time."""
        host = self._host
        if host == "localhost":         # never asked of a name server: the key would go where it says
            return [(socket.AF_INET, ("127.0.0.1", self._port)), (socket.AF_INET6, ("::1", self._port))]
        if ":" in host or host.replace(".", "").isdigit():
            return self._look_up(socket.AI_NUMERICHOST)
        self._addresses.start()
        return self._addresses.result(watching(caller))

    def _open(self, addresses: list[tuple[Any, Any]], deadline: float, caller: Wire | None) -> Wire:
        """The first address that answers; each gets an equal share of the time that is left. Raises the last one's OSError."""
        failure = OSError(0, "it has no address")
        for at, (family, address) in enumerate(addresses):
            now, wire = time.monotonic(), None
            try:
                wire = Wire(socket.socket(family, socket.SOCK_STREAM))
                code = wire.sock.connect_ex(address)
                if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
                    wait_for(wire, WRITE, now + (deadline - now) / (len(addresses) - at), caller)
                    code = wire.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return wire
                raise OSError(code, os.strerror(code))
            except BaseException as error:
                if wire is not None:
                    wire.close()
                if not isinstance(error, OSError):      # the caller has left, or Ctrl-C ends --check
                    raise
                failure = error
        raise failure

    def _tunnel(self, wire: Wire, authorization: str, deadline: float, caller: Wire | None) -> None:
        """Has the proxy connect us. Raises OSError, Malformed and EOFError."""
        target = f"{self.config.address.host}:{self.config.address.port}"
        request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorization}\r\n"
        wire.send(request.encode(), UPSTREAM_CONNECT_SECONDS, caller)
        head = AnswerHead(read_head(wire, deadline, UPSTREAM_HEAD_LIMIT, caller))
        if not 200 <= head.status < 300 or wire.buffer:
            raise OSError(0, f"it refused CONNECT with status {head.status}")


class State(NamedTuple):
    """All that a reload replaces, at once: a request in flight keeps the one that it was admitted under, whole."""
    config: Config
    callers: dict[bytes | None, Caller]
    upstreams: dict[str, Upstream | DryRun]

    @property
    def real_upstreams(self) -> list[Upstream]:
        """None in a dry run."""
        return [upstream for upstream in self.upstreams.values() if isinstance(upstream, Upstream)]

    def resolve_secrets(self) -> None:
        """So that a vault asks now, and not in the middle of the work. Raises SecretUnavailable."""
        for upstream in self.real_upstreams:
            try:
                upstream.secrets.resolve_now()
            except SecretUnavailable as error:
                key = upstream.config.key
                raise SecretUnavailable(f'"{key}secret_source": the secret is not available: {error}') from None

    def stay_hidden(self) -> None:
        """The secrets that are in use count as the newest again: those of a reload that failed must not push them out."""
        for upstream in self.real_upstreams:
            upstream.secrets.learn_again()

    def close(self) -> None:
        for upstream in self.real_upstreams:
            upstream.close()


# ----------------------------------------------------------------------------------------------------------------------
# 13. The process: what it holds is closed to others before the secret is read; who may write what it runs; and a state
# made from a configuration.

INHERITED_LIMITS: dict[int, tuple[int, int]] = {}       # as they were, for the command that we start
INHERITED_SIGNALS: dict[int, Any] = {}
WANTED_DESCRIPTORS = 65536
OWN_CHILDREN, OWN_CHILDREN_LOCK = set[int](), threading.Lock()     # the command that is served


def guard_process() -> list[str]:
    """No memory for other processes of this user, no core file. Returns what could not be had."""
    if os.name == "posix":              # Windows knows no such limits
        import resource
        for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, WANTED_DESCRIPTORS)):
            soft, hard = INHERITED_LIMITS[limit] = resource.getrlimit(limit)
            wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
            with contextlib.suppress(OSError, ValueError):      # macOS caps open files elsewhere
                resource.setrlimit(limit, (wanted if most == 0 else max(soft, wanted), hard))
    if sys.platform != "linux":
        return ["on this system other programs of your user may read the broker's memory: only Linux lets it forbid that"]
    pr_set_dumpable = 4
    try:
        import ctypes
        refused = ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        return ["this Python has no ctypes, so other programs of your user may read the broker's memory: use one that has it"]
    return ["the process could not be made non-dumpable: other programs of your user may read its memory"] if refused else []


def give_memory_back() -> None:
    """Has glibc take long bodies from the system and give them back: by itself it keeps what is freed, after the first few,
    for the next ones of their size, and that for every thread apart. Of shorter ones it keeps some."""
    m_mmap_threshold, m_arena_max, m_trim_threshold = -3, -8, -1
    with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):
        import ctypes
        for option, value in ((m_mmap_threshold, MIB), (m_arena_max, 1), (m_trim_threshold, 4 * MIB)):
            ctypes.CDLL(None).mallopt(option, value)


def descriptor_limit() -> int:
    """How many descriptors the process may have, once it is guarded."""
    if os.name != "posix":
        return WANTED_DESCRIPTORS
    import resource
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def reap_orphans() -> None:
    """As PID 1 of a container we get everybody's orphans; nobody else would bury them."""
    with contextlib.suppress(ChildProcessError):
        while os.getpid() == 1 and hasattr(os, "waitid"):
            # Only looked at: our own children are waited for elsewhere, and soon.
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            with OWN_CHILDREN_LOCK, SECRET_COMMANDS_LOCK:
                if found is None or found.si_pid in OWN_CHILDREN | SECRET_COMMANDS:
                    return
            os.waitpid(found.si_pid, os.WNOHANG)


def way_to(path: str) -> list[str]:
    """Every folder, file and link that decides what an absolute path leads to, `/` included. Raises OSError."""
    found, here = ["/"], "/"
    for name in filter(None, path.split("/")):
        step = os.path.normpath(os.path.join(here, name))       # before a `..` there is no link any more
        found.append(step)
        if os.path.islink(step):
            os.stat(step)               # raises where links lead round in a ring
            # A pipe that a shell hands over as /dev/fd/63 is a link that leads to no place.
            found += filter(os.path.lexists, way_to(os.path.join(here, os.readlink(step))))
        here = os.path.realpath(step)
    return found


def check_files(config: Config) -> list[str]:
    """Who else could change what we run. Returns warnings; raises ConfigError in proxy mode.

    Attack: another user edits the configuration, or moves a folder on the way to it, and so runs commands and redirects
    the key.
    """
    warnings: list[str] = []
    if os.name != "posix":
        return ["on this system who may write the configuration is not looked at"]
    for path in dict.fromkeys(way_to(config.file) + way_to(os.path.abspath(__file__))):
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            continue                    # its own mode says nothing; who may replace it, its folder's does
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        if found.st_mode & stat.S_IWOTH and not sticky:
            problem = (f"{path}: every user of this machine may write it, and could so redirect the key: chmod o-w {path}, or, "
                       "where that has no effect (a mounted Windows drive, say), move the files elsewhere")
            if not config.dry_run:
                raise ConfigError(problem)
            warnings.append(problem)
        if found.st_uid not in (os.geteuid(), 0):
            warnings.append(f"{path} belongs to another user, who can change what the broker does: chown it, or move the files")
        if found.st_mode & stat.S_IWGRP and found.st_gid != os.getegid() and not sticky:
            warnings.append(f"{path} may be written by a group that is not your own: chmod g-w {path}")
    return warnings


def new_token() -> str:
    """256 random bits, for humans to copy."""
    return base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()


RANDOM_TOKENS: Texts = {}               # a dry run's, by the client's name: a reload keeps them


def caller_token(config: Config, client: ClientConfig) -> str | None:
    """A client's token; None where it needs none. Raises ConfigError."""
    if client.token_env is None:
        return None
    token = take_variable(client.token_env)
    if not token and config.dry_run:
        return RANDOM_TOKENS.setdefault(client.name, new_token())
    where = f'{config.file}: "{client.key}token_env" names {client.token_env}, '
    if not token:
        raise ConfigError(f'{where}which is not set: export {client.token_env}="$(python broker.py --new-token)" in the shell '
                          "that starts the broker")
    if problem := what_is_wrong(token):
        raise ConfigError(f"{where}whose value {problem}; make one with --new-token")
    HIDDEN.add(client.name, token, in_answers=False)
    return token


class RunAs(NamedTuple):
    """Whose command is served, and the one token that counts in this run."""
    client: str
    token: str


def make_callers(config: Config, run_as: RunAs | None) -> dict[bytes | None, Caller]:
    """The callers by the digest of their tokens. Raises ConfigError."""
    callers: dict[bytes | None, Caller] = {}
    for client in config.clients:
        if run_as is not None and client.name != run_as.client:
            continue
        token = run_as.token if run_as is not None else caller_token(config, client)
        key = digest(token) if token is not None else None
        if key in callers:
            raise ConfigError(f'{config.file}: "{callers[key].client.key}token_env" and "{client.key}token_env" '
                              "hold the same token: give each client one of its own, see --new-token")
        callers[key] = Caller(client, key)
    return callers


def make_upstream(config: Config, upstream: UpstreamConfig, callers: dict[bytes | None, Caller]) -> Upstream:
    """With its secret's source ready to be asked. Raises ConfigError."""
    value = take_variable(upstream.source.variable) if upstream.source.variable is not None else None
    equal = callers.get(digest(value.rstrip("\r\n"))) if value is not None else None
    if equal is not None:
        raise ConfigError(f'{config.file}: "{equal.client.key}token_env": the caller token equals the secret in '
                          f"{upstream.source.variable}: give the callers tokens of their own, see --new-token")
    upstream.source.prepare(os.path.dirname(config.file), upstream.name)
    return Upstream(upstream, SecretCache(upstream.source, callers), find_proxy(upstream.address), config.upstream_timeout)


def make_state(config: Config, run_as: RunAs | None) -> State:
    """All that requests need of a configuration; no secret is resolved yet. Raises ConfigError."""
    HIDDEN_VARIABLES.update(client.token_env for client in config.clients if client.token_env is not None)
    HIDDEN_VARIABLES.update(upstream.source.variable for upstream in config.upstreams if upstream.source.variable is not None)
    callers = make_callers(config, run_as)
    upstreams = {upstream.name: DryRun(upstream) if config.dry_run else make_upstream(config, upstream, callers)
                 for upstream in config.upstreams}
    return State(config, callers, upstreams)


def reread_config(old: Config) -> tuple[Config, list[str]]:
    """(the file's configuration, with what waits for a restart as it was, and the keys of that). Raises ConfigError."""
    new = load_config(old.file, old.dry_run, old.listen_port)
    waits = [key for key in AFTER_RESTART if new.fixed[key] != old.fixed[key]]
    new = new._replace(fixed=old.fixed, dry_run=old.dry_run, event_log=old.event_log)
    check_files(new)
    return new, waits


# ----------------------------------------------------------------------------------------------------------------------
# 14. A caller's connection: the map, executed. Order is policy, so it stands here as plain lines; nothing is decided here.

RUN_ID, COUNTER = os.urandom(4).hex(), itertools.count(1)    # an id tells requests apart, it guards nothing


class Exchange:
    """One request and its answer: id, clock, what it holds of what is shared, and what the event log will say of it."""

    def __init__(self, server: Server) -> None:
        self.server, self.state, self.log = server, server.state, server.log
        self.id, self.began = f"{RUN_ID}{next(COUNTER):08x}", time.monotonic()
        self.head: RequestHead | None = None
        self.method: str | None = None          # as far as they could be read
        self.path: str | None = None
        self.upstream_path = ""
        self.caller: Caller | None = None
        self.upstream: UpstreamConfig | None = None
        self.facts = BodyFacts()
        self.unread: Body | None = None         # of the request, what is still to come
        self.entered = False                    # it holds a place,
        self.buffered = self.reserved = 0       # room for so many bytes, and tokens
        self.request_bytes = 0
        self.secret: str | None = None          # the one that was attached
        self.logged = False                     # the log has the request line, so it gets a response line
        self.status: int | None = None          # of the answer whose head has gone out
        self.refused = ""                       # the error code; the error itself would keep the body alive, by its traceback
        self.outcome = ""
        self.is_whole = False                   # the answer came to its end
        self.response_bytes, self.attempt = 0, 1
        self.ttfb: float | None = None
        self.reader: UsageReader | None = None  # of the answer that is on its way
        self.usage: dict[str, Any] | None = None
        self.upstream_request_id: str | None = None

    def take_route(self, route: Route) -> Route:
        """Remembers it: the log and the upstream get the path as the caller should have written it."""
        self.upstream, self.path, self.upstream_path = route.upstream, route.path, route.upstream_path
        return route

    def take_place(self) -> None:
        """Counts the request in. Raises RequestError."""
        assert self.caller is not None
        self.server.limits.enter(self.caller.client, self.state.config.max_concurrent)
        self.entered = True

    def reserve_room(self, size: int) -> None:
        """Room for so many bytes of a body. Raises RequestError."""
        self.server.limits.buffer(size)
        self.buffered += size

    def reserve_tokens(self) -> None:
        assert self.caller is not None
        client = self.caller.client
        if client.tokens_per_day is not None and self.method in BODY_METHODS:
            self.server.limits.reserve(client, self.facts.tokens)
            self.reserved = self.facts.tokens

    def settle(self) -> None:
        """Gives back what it holds: before the answer's last bytes go, so that the caller's next request finds it."""
        if self.reader is not None:
            reader, self.reader = self.reader, None
            reader.finish()
            self.usage = reader.usage
        if self.entered and self.caller is not None:
            self.entered = False
            used = self._tokens_used() if self.reserved else 0
            self.server.limits.leave(self.caller.client, self.buffered, self.reserved, used)

    def _tokens_used(self) -> int:
        """What to charge: nothing for a dry run; an estimate where nobody tells, or the end was not seen, is put into `usage`."""
        if self.state.config.dry_run:
            return 0
        reported = tokens_in(self.usage)
        if self.status is None or self.status >= 400 or (self.is_whole and self.usage is not None):
            return reported
        estimate, sent = estimated_tokens(self.request_bytes + self.response_bytes), estimated_tokens(self.request_bytes)
        if estimate > reported or self.usage is None:
            self.usage = {"input_tokens": sent, "output_tokens": estimate - sent, "estimated": True}
        return max(reported, estimate)

    def names(self) -> dict[str, Any]:
        """What the log says of who asked whom."""
        names = {"client": self.caller.client.name} if self.caller is not None else {}
        if self.upstream is not None and len(self.state.config.upstreams) > 1:
            names["upstream"] = self.upstream.name
        return names

    def log_request(self, mode: str) -> None:
        """Raises RequestError when the log does not take it: what is not written down is not sent."""
        try:
            self.log.append("request", {
                "id": self.id, **self.names(), "method": self.method, "path": self.path, "mode": mode,
                "model": self.facts.model, "stream": self.facts.stream, "request_bytes": self.request_bytes})
        except OSError as error:
            say(f"broker: the event log can't be written, requests are refused: {self.log.path}: {error.strerror}", often="log")
            raise RequestError("event_log_unavailable", "the broker can't write its event log, and without it nothing is sent: "
                               "whoever runs the broker has to make room, or mend the file's permissions") from None
        self.logged = True

    def milliseconds(self) -> float:
        return round((time.monotonic() - self.began) * 1000, 3)

    def finish(self) -> None:
        """Gives back everything and writes the response line. An unwritable log can only be told: the answer is out."""
        self.settle()
        if self.logged:
            self.log.write("response", {
                "id": self.id, **self.names(), "model": self.facts.model, "status": self.status, "outcome": self.outcome,
                "response_bytes": self.response_bytes, "ttfb_ms": self.ttfb, "duration_ms": self.milliseconds(),
                "usage": self.usage, "upstream_request_id": self.upstream_request_id, "attempt": self.attempt})
            self.server.show(self)

    def log_denied(self, error: RequestError) -> None:
        """A refusal's line, unless there were too many of its kind."""
        client = self.caller.client.name if self.caller is not None else None
        suppressed = self.server.denials.suppressed((client, error.code))
        if suppressed is not None:
            self.log.write("denied", {
                "id": self.id, **self.names(), "status": error.status, "reason": error.code, "method": self.method,
                "path": self.path, **({"model": self.facts.model} if self.facts.model else {}),
                **({"suppressed": suppressed} if suppressed else {})})
            self.server.show(self)


def status_of(caller: Caller, limits: Limits) -> dict[str, Any]:
    """What `GET /broker` tells a caller of itself."""
    client = caller.client
    return {"client": client.name, "allowed_paths": [rule.text for rule in caller.rules],
            "allowed_models": list(client.models) if client.models is not None else None, "limits": client.limits,
            "left": limits.left(client), "expires": client.expires.isoformat() if client.expires is not None else None}


def internal_error(bug: BaseException, request_id: str) -> RequestError:
    """What the caller is told of a bug; the operator is told its place."""
    report_bug(bug)
    return RequestError("internal_error", "the broker has a bug here; the terminal where it runs names the place, this "
                        f"request's id is {request_id}")


class Handler(http.server.BaseHTTPRequestHandler):
    """A caller's connection, one request after the other, in a thread of its own."""

    server: Server

    def setup(self) -> None:
        self.wire = Wire(self.request)

    def finish(self) -> None:
        pass                                # there is no file around the socket to be flushed

    def handle_one_request(self) -> None:
        """The map, step by step; http.server calls it until `close_connection`."""
        self.close_connection = True
        if not self.request_comes():
            return
        exchange = Exchange(self.server)
        state = exchange.state
        try:
            head = self.read_head(exchange)                                                 # 1
            check_host(head, state.config.allowed_hosts)                                    # 2
            check_not_a_web_page(head)                                                      # 3
            if head.path in HEALTH_PATHS and head.method in ("GET", "HEAD"):                # 4
                return self.send_own(exchange, 200, b'{"ok": true}')
            caller = exchange.caller = identify_caller(head, state.callers)                 # 5
            self.server.connections.mark_busy(self.request)
            if (head.path, head.method) == (STATUS_PATH, "GET"):
                return self.send_own(exchange, 200, encode_json(status_of(caller, self.server.limits)).encode())
            route = exchange.take_route(find_route(head, caller))                           # 6
            check_query(head.query)
            exchange.take_place()
            check_body_head(head, route.types, state.config.max_request_bytes)              # 7
            body = self.read_body(exchange, head)
            exchange.facts = check_body(head, route.upstream_path, body, state.config.dry_run, caller.client)
            check_no_secret(head, body)
            check_model(caller.client, head.method, exchange.facts)
            exchange.reserve_tokens()
            exchange.log_request(state.config.mode)                                         # 8
            upstream = state.upstreams[route.upstream.name]
            with contextlib.closing(upstream.answer(exchange, head, body, self.wire)) as answer:    # 9-11
                self.relay(exchange, head, answer)                                          # 12
        except RequestError as error:
            self.refuse(error, exchange)
        except (ClientDisconnected, OSError):
            self.give_up(exchange)
        except Exception as bug:
            self.refuse(internal_error(bug, exchange.id), exchange)
        finally:
            exchange.finish()                                                               # 13
            self.server.connections.mark_waiting(self.request)

    def request_comes(self) -> bool:
        """Waits for the first byte of a request. RFC 9112 section 2.2: an empty line before it is let pass."""
        deadline = time.monotonic() + IDLE_SECONDS
        try:
            while self.wire.buffer in (b"", b"\r", b"\r\n") and not self.server.stopping:
                self.wire.fill(deadline)
        except (OSError, EOFError):
            return False
        if self.server.stopping:
            return False
        if self.wire.buffer.startswith(b"\r\n"):
            self.wire.buffer = self.wire.buffer[2:]
        return True

    def read_head(self, exchange: Exchange) -> RequestHead:
        raw = b""
        try:
            raw = read_head(self.wire, time.monotonic() + HEAD_SECONDS, HEAD_LIMIT)
            head = exchange.head = RequestHead(raw)
        except Malformed as error:
            exchange.method, exchange.path = asked_for(raw or self.wire.buffer)
            exchange.unread = Body(None, False, strict=True)        # nobody knows what follows
            code = "headers_too_large" if isinstance(error, TooLong) else "bad_request"
            raise RequestError(code, f"not a proper HTTP request: {error}") from None
        except EOFError:
            raise ClientDisconnected from None
        except TimeoutError:
            exchange.method, exchange.path = asked_for(self.wire.buffer)
            raise RequestError("request_timeout", f"the request's head took longer than {HEAD_SECONDS} seconds") from None
        exchange.method, exchange.path = head.method, head.path
        if head.length or head.chunked:
            exchange.unread = Body(head.length, head.chunked, strict=True)
        return head

    def read_body(self, exchange: Exchange, head: RequestHead) -> bytes:
        """The whole body, as it came; for a chunked one its content."""
        source, began, limit = exchange.unread, time.monotonic(), exchange.state.config.max_request_bytes
        if source is None:
            return b""
        exchange.reserve_room(head.length or 0)
        if head.fields.get("expect", "").lower() == "100-continue" and head.is_http_1_1 and not self.wire.buffer:
            self.send(exchange, b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray()                  # not a list of pieces: long ones between others' leave holes in the memory
        try:
            while True:
                # Attack: chunks of one byte, from many callers at once. One thread at a time takes such a heap apart.
                is_heap = head.chunked and self.wire.buffer.count(b"\r\n") > CHUNK_HEAP
                with HEAVY_WORK if is_heap else contextlib.nullcontext():
                    piece, self.wire.buffer = source.take(self.wire.buffer)
                exchange.request_bytes += len(piece)
                if head.chunked:
                    exchange.reserve_room(len(piece))
                    if exchange.request_bytes + (source.left or 0) > limit:
                        raise RequestError("request_too_large", f"the body has more than {limit} bytes (max_request_bytes in "
                                           "the broker's configuration)")
                if source.done:
                    exchange.unread = None
                    return bytes(body + piece) if body else piece
                body += piece
                whole = began + BODY_SECONDS + exchange.request_bytes / BODY_BYTES_A_SECOND
                self.wire.fill(min(time.monotonic() + BODY_SILENCE_SECONDS, whole))
        except (Malformed, EOFError) as error:
            reason = error if isinstance(error, Malformed) else "it ends in its body"
            raise RequestError("bad_request", f"not a proper HTTP request: {reason}") from None
        except TimeoutError:
            raise RequestError("request_timeout", "the request's body came too slowly, or fell silent") from None

    def send(self, exchange: Exchange, data: bytes) -> None:
        try:
            self.wire.send(data, exchange.state.config.upstream_timeout, self.wire if exchange.logged else None)
        except TimeoutError:
            raise RequestError("request_timeout", "the caller does not take its answer") from None

    def answer_head(self, exchange: Exchange, status_line: str, lines: str, framing: str, keep: bool) -> bytes:
        """The head of every answer, whoever made the body."""
        is_old = exchange.head is not None and not exchange.head.is_http_1_1
        connection = "Connection: close\r\n" if not keep else "Connection: keep-alive\r\n" if is_old else ""
        exchange.ttfb = exchange.milliseconds()
        return HIDDEN.in_answers.also(exchange.secret).clean(
            f"HTTP/1.1 {status_line}\r\n{lines}{framing}X-Broker-Request-Id: {exchange.id}\r\n{ANSWER_FIXED}{connection}\r\n"
            .encode("latin-1", "replace"))

    def relay(self, exchange: Exchange, head: RequestHead, answer: Answer) -> None:
        """The answer as it arrives: each piece at once, the secret redacted."""
        lines, piece = answer.end_to_end(), answer.ready()
        known = HIDDEN.in_answers
        reader = exchange.reader = UsageReader(answer.head.fields.get("content-type", ""))
        stream = RedactedStream(known.also(exchange.secret))
        data, whole = stream.feed(piece, answer.done), answer.done
        chunked = not whole and head.is_http_1_1
        keep = head.keep_alive and not self.server.stopping and (whole or head.is_http_1_1)
        length = answer.announced_length if answer.has_no_body else len(data) if whole else None
        framing = "Transfer-Encoding: chunked\r\n" if chunked else "" if length is None else f"Content-Length: {length}\r\n"
        start = self.answer_head(exchange, f"{answer.status} {answer.reason}", lines, framing, keep)
        while True:
            reader.feed(data)
            exchange.status = answer.status
            exchange.response_bytes += len(data)
            framed = b"%x\r\n%b\r\n" % (len(data), data) if chunked and data else data
            if answer.done:
                exchange.is_whole = True
                exchange.settle()
                self.send(exchange, start + framed + (b"0\r\n\r\n" if chunked else b""))
                break
            if start or data:
                self.send(exchange, start + framed)
            start = b""
            piece = answer.read()
            if HIDDEN.in_answers is not known:      # a secret was rotated in meanwhile: it counts from now on
                known = HIDDEN.in_answers
                stream.redactor = known.also(exchange.secret)
            data = stream.feed(piece, answer.done)
        failed = answer.status >= 400 or reader.failed
        exchange.outcome = exchange.outcome or ("upstream_error" if failed else "ok")
        self.close_connection = not keep

    def send_own(self, exchange: Exchange, status: int, body: bytes, headers: str = "") -> None:
        """Sends an answer of our own."""
        head = exchange.head
        # A stranger's connection ends with its refusal: the answer is the same for all of them.
        known = exchange.caller is not None or status == 200
        keep = known and head is not None and head.keep_alive and exchange.unread is None and not self.server.stopping
        exchange.settle()
        exchange.status = status
        lines = f"Content-Type: {JSON_TYPE}\r\nDate: {self.date_time_string()}\r\n{headers}"
        framing = f"Content-Length: {len(body)}\r\n"
        start = self.answer_head(exchange, f"{status} {http.HTTPStatus(status).phrase}", lines, framing, keep)
        body = b"" if head is not None and head.method == "HEAD" else body
        exchange.response_bytes = len(body)
        self.send(exchange, start + body)
        self.close_connection = not keep
        if not keep and (exchange.unread is not None or not known):
            self.drain(exchange)

    def refuse(self, error: RequestError, exchange: Exchange) -> None:
        """The one place that answers a RequestError, or cuts the connection where an answer has begun."""
        self.server.connections.mark_waiting(self.request)
        if exchange.status is not None:
            exchange.outcome = "upstream_aborted"
            self.close_connection = True
            return self.wire.close(abort=True)
        exchange.outcome = exchange.refused = error.code
        if not exchange.logged:
            exchange.log_denied(error)
        detail = {"type": error.code, "code": error.code, "message": HIDDEN.in_answers.text(error.message), "param": None}
        with contextlib.suppress(RequestError, ClientDisconnected, OSError):
            self.send_own(exchange, error.status, encode_json({"type": "error", "error": detail}).encode(), error.headers)

    def give_up(self, exchange: Exchange) -> None:
        """The caller has left, or is made to leave because the broker ends."""
        if self.server.gave_up and exchange.logged:
            stopped = RequestError("upstream_timeout", "the broker was stopped before the answer was complete")
            return self.refuse(stopped, exchange)
        exchange.outcome = "client_disconnected"

    def drain(self, exchange: Exchange) -> None:
        """Reads what still comes of a refused request, so that no reset overtakes the answer."""
        seconds, limit = DRAIN_STRANGER if exchange.caller is None else DRAIN_CALLER
        deadline, limit = time.monotonic() + seconds, limit - len(self.wire.buffer)
        with contextlib.suppress(OSError, EOFError):
            self.request.shutdown(socket.SHUT_WR)
            while limit > 0:
                self.wire.buffer = b""
                self.wire.fill(deadline)
                limit -= len(self.wire.buffer)
        self.wire.buffer = b""


# ----------------------------------------------------------------------------------------------------------------------
# 15. The server: the port, what all connections share, and how it is replaced and ended.


class Connections:
    """All open ones, and which of them are without a request past the caller check, the longest so first.

    Who may be closed for another, and who has just been let in, is one decision under one lock. One thread admits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._waiting: dict[socket.socket, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, sock: socket.socket, most: int) -> bool:
        """Attack: idle connections until nobody gets in. The one idle for longest gives way."""
        if len(self) >= most and not self.make_room():
            return False
        with self._lock:
            self._open.add(sock)
            self._waiting[sock] = None
        return True

    def make_room(self) -> bool:
        """Closes the one that waits longest; whether there was one."""
        with self._lock:
            sock = next(iter(self._waiting), None)
            if sock is None:
                return False
            del self._waiting[sock]
            self._open.discard(sock)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            return True

    def mark_busy(self, sock: socket.socket) -> None:
        """It has a request past the caller check. Raises ClientDisconnected if it has just given way."""
        with self._lock:
            if sock not in self._open:
                raise ClientDisconnected
            self._waiting.pop(sock, None)

    def mark_waiting(self, sock: socket.socket) -> None:
        """It has none (any more)."""
        with self._lock:
            if sock in self._open:
                self._waiting.setdefault(sock)

    def forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)
            self._waiting.pop(sock, None)

    def end_reading(self) -> None:
        """To all others it looks as if their caller had left; they can still say something to it."""
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RD)


def bind_alone(sock: socket.socket) -> None:
    if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)


def guard_ipv6(port: int) -> socket.socket | None:
    """Holds the port on ::1 as well, without listening. Attack: another program stands there for "localhost"."""
    sock = None
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        bind_alone(sock)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::1", port))
        return sock
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno == errno.EADDRINUSE:
            raise
        return None                     # no IPv6 on this machine


class Server(http.server.ThreadingHTTPServer):
    """The port, a thread for each connection, and what they share: each thing behind the lock of its own class."""

    request_queue_size = 1024
    # On Windows SO_REUSEADDR lets another process bind the same port; on POSIX it only lets us come back at once.
    allow_reuse_address = os.name == "posix"
    allow_reuse_port = False

    def __init__(self, state: State) -> None:
        """Takes the port; connections wait in its queue until `serve_forever`. Raises OperationalError."""
        self.state, self.log = state, EventLog(state.config.event_log)
        self.connections, self.limits, self.denials = Connections(), Limits(), PerMinute()
        self.stopping = self.gave_up = False
        self.counted: set[str] = set()      # the clients with a budget: of the others nobody adds up what they use
        self.shows_requests = False         # a line on stderr for each
        self._guard: socket.socket | None = None
        self._next_sweep = 0.0
        port = state.config.listen_port
        for _ in range(20 if port == 0 else 1):     # a free port has to be free on ::1 as well
            try:
                return super().__init__(("127.0.0.1", port), Handler)
            except OSError as error:
                failure = error
        raise OperationalError(f"port {port} can't be bound ({failure.strerror}): stop the program that has it, on 127.0.0.1 or "
                               "::1, or use --port 0 for any free one")

    def server_bind(self) -> None:
        # Not HTTPServer's own: that one asks the name server for our host name.
        bind_alone(self.socket)
        socketserver.TCPServer.server_bind(self)
        self._guard = guard_ipv6(self.server_address[1])
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # What the events of the process itself say: no reload changes it.
        self.lifecycle = {"mode": self.state.config.mode, "version": __version__, "listen": self.url}

    def server_close(self) -> None:
        super().server_close()
        if self._guard is not None:
            self._guard.close()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                say("broker: no descriptor is left for a connection: raise the limit of open files (ulimit -n)", often="files")
                self.connections.make_room()
                time.sleep(LOOK_SECONDS / 10)       # until one is given back; the queue holds who waits
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        # Each may need an upstream connection as well, and a few descriptors are the process's own.
        most = min(4 * self.state.config.max_concurrent, descriptor_limit() // 2 - 16)
        return not self.stopping and self.connections.admit(request, most)

    def shutdown_request(self, request: Any) -> None:
        self.connections.forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        bug = sys.exc_info()[1]
        if bug is not None and not isinstance(bug, OSError):
            report_bug(bug)

    def service_actions(self) -> None:
        """Called after each connection as well, so it looks at the clock."""
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + LOOK_SECONDS
            for upstream in self.state.real_upstreams:
                upstream.sweep()
            reap_orphans()

    def show(self, exchange: Exchange) -> None:
        """A line for whoever watches the terminal."""
        if self.shows_requests:
            usage, client = exchange.usage or {}, exchange.caller.client.name if exchange.caller is not None else "-"
            tokens = f" {tokens_in(usage)} tokens" if usage else ""
            what = f"refused: {exchange.refused}" if exchange.refused else f"{exchange.status} {exchange.outcome}"
            say(f"{time.strftime('%H:%M:%S')} {client} {exchange.method or '-'} {(exchange.path or '-')[:LOGGED_STRING_LIMIT]} "
                f"{(exchange.facts.model or '-')[:64]} {what} {exchange.milliseconds():.0f} ms{tokens}")

    def load_ledger(self, config: Config) -> None:
        """What the log says of today, for each client that had no budget before. Raises OSError."""
        budgets = {client.name for client in config.clients if client.tokens_per_day is not None}
        if new := budgets - self.counted:
            self.log.become_ledger()
            used, unreadable = used_today(config.event_log)
            self.limits.load({name: used.get(name, 0) for name in new})
            if unreadable:
                say(f"broker: {unreadable} lines of the event log can't be read, and count as nothing: {config.event_log}")
        self.counted = budgets

    def reload_when_asked(self, asked: queue.SimpleQueue[int], run_as: RunAs | None) -> None:
        """SIGHUP: configuration, tokens, secrets and the log's file anew; what is wrong changes nothing."""
        while asked.get() and not self.stopping:
            while not asked.empty():
                asked.get()             # this time will do for all that came before it began
            try:
                self.log.open()
            except OSError as error:
                say(f"broker: reload: the event log can't be opened anew, the old file stays in use: {error.strerror}")
            try:
                waits = self._replace_state(run_as)
            except (ConfigError, SecretUnavailable, OSError) as error:
                say(f"broker: reload: nothing was changed: {error}")
            except Exception as bug:        # else its thread would end
                report_bug(bug)
            else:
                say("broker: reloaded" + (f"; changed, but only after a restart: {', '.join(waits)}" if waits else ""))
                self.log.write("reload", self.lifecycle)
            finally:
                self.state.stay_hidden()    # of a reload that failed the secrets are known by now

    def _replace_state(self, run_as: RunAs | None) -> list[str]:
        """Returns the keys that wait for a restart. Raises ConfigError, SecretUnavailable, OSError."""
        old = self.state
        config, waits = reread_config(old.config)
        state = make_state(config, run_as)
        state.resolve_secrets()
        self.load_ledger(config)
        self.state = state
        old.close()
        return waits

    def stop(self) -> None:
        """No new requests; those in flight go on."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        while self.connections.make_room():
            pass

    def end(self) -> None:
        """The last lines of the log."""
        for (client, reason), suppressed in self.denials.rest().items():
            self.log.write("denied", {**({"client": client} if client else {}), "status": ERRORS[reason][0], "reason": reason,
                                      "method": None, "path": None, "suppressed": suppressed})
        self.log.write("stop", self.lifecycle)
        self.state.close()
        self.log.close()


# ----------------------------------------------------------------------------------------------------------------------
# 16. Commands.
#
# To add a command: one function that returns an exit code, and its line in `run_options`.


def has_terminal() -> bool:
    with contextlib.suppress(OSError), open("/dev/tty", "rb", buffering=0):
        return True
    return False


class Signals:
    """Signals end the program until `raising` is off; from then on they arrive here, for the main thread to take. A SIGHUP
    that asks a server for a reload stands in `reloads`, whenever it comes.

    The main thread looks up by itself: the system may give a signal to any thread, and Python handles it in the main one.
    """

    HANG_UP, QUIT = getattr(signal, "SIGHUP", 0), getattr(signal, "SIGQUIT", 0)      # 0, which is none: Windows

    def __init__(self, serves: bool) -> None:
        self.raising, self._serves, self._has_terminal = True, serves, has_terminal()
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()     # the one kind that a handler may put into
        self.reloads: queue.SimpleQueue[int] = queue.SimpleQueue()
        for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP", "SIGQUIT"):
            if number := getattr(signal, name, None):
                INHERITED_SIGNALS[number] = signal.signal(number, self._take)

    def _take(self, number: int, frame: Any) -> None:
        if self._serves and number == self.HANG_UP and not self._is_terminals_end():
            self.reloads.put(number)
        elif not self.raising:
            self._arrived.put(number)
        else:
            self.raising = False            # one is enough: the next must not interrupt the way out
            raise KeyboardInterrupt(number)

    def _is_terminals_end(self) -> bool:
        """Whether SIGHUP says that our terminal is gone (`nohup` ignores that one, and so do we)."""
        return INHERITED_SIGNALS.get(self.HANG_UP) != signal.SIG_IGN and self._has_terminal and not has_terminal()

    def next(self, seconds: float) -> int | None:
        """The next one, or None after so many seconds."""
        with contextlib.suppress(queue.Empty):
            return self._arrived.get_nowait()
        time.sleep(seconds)             # not in `get`: up to CPython 3.11 a signal may make it forget its time-out
        return None


@contextlib.contextmanager
def as_inherited() -> Iterator[None]:
    """For a moment the process is what its child is to inherit: its limits, and what it ignores.

    Not by preexec_fn: that would run Python in a forked copy of a process with threads.
    """
    with contextlib.ExitStack() as back:
        for number, handler in INHERITED_SIGNALS.items():
            if handler == signal.SIG_IGN:
                back.callback(signal.signal, number, signal.signal(number, handler))
        for limit, inherited in INHERITED_LIMITS.items():
            import resource
            ours = resource.getrlimit(limit)
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(limit, inherited)
                back.callback(resource.setrlimit, limit, ours)
        yield


def rules_of(client: ClientConfig, upstream: UpstreamConfig) -> list[Rule]:
    """What the client may ask of the upstream, without the prefix: of two rules that meet, the plainer one."""
    if client.rules is None:
        return list(upstream.rules)
    found = []
    for rule, narrower in itertools.product(upstream.rules, client.rules):
        if rule.meets(narrower):
            is_plainer = not rule.is_literal and narrower.path.startswith(upstream.prefix + "/")
            path = narrower.path[len(upstream.prefix):] if is_plainer else rule.path
            found.append(Rule(f"{rule.method} {path} {rule.type}", upstream.prefix))
    return found


def variables_for(config: Config, client: ClientConfig, url: str, token: str) -> Texts:
    """What points a client's SDKs at the broker. Raises ConfigError where one variable would need two values."""
    found: dict[str, tuple[str, UpstreamConfig]] = {}
    upstreams = client.upstreams[::-1]
    set_for_it = {name: text.replace("{url}", url).replace("{token}", token)
                  for upstream in upstreams for name, text in upstream.environment.items()}
    for upstream in upstreams:
        theirs = client_variables(rules_of(client, upstream), upstream.address.authority, url + upstream.prefix, token)
        for name, value in theirs.items():
            known, other = found.setdefault(name, (value, upstream))
            if known != value and other.prefix and name not in set_for_it:
                raise ConfigError(f'{config.file}: "upstreams.{other.name}" and "upstreams.{upstream.name}" give the variable '
                                  f'{name} two values for the client {client.name}: set it in "environment" of one of them')
    return {**{name: value for name, (value, _) in found.items()}, **set_for_it}


def environment_for(config: Config, run_as: RunAs, url: str, command: str) -> Texts:
    """Our own environment, less all that is secret, for the command that is served."""
    tokens = {os.environ.get(client.token_env or "", "") for client in config.clients} - {""}
    hidden = {*TAKEN_VARIABLES.values(), *HIDDEN.in_output.secrets, *tokens}
    environment = {name: value for name, value in os.environ.items()
                   if name not in HIDDEN_VARIABLES and value.rstrip("\r\n") not in hidden}
    client = next(client for client in config.clients if client.name == run_as.client)
    environment.update(variables_for(config, client, url, run_as.token))
    # Claude Code asks at every start whether to use a key that it finds; for ANTHROPIC_AUTH_TOKEN it does not.
    if re.fullmatch(r"(?i)claude(?:\.\w+)?", os.path.basename(command)):
        environment.pop("ANTHROPIC_API_KEY", None)
    environment.update(BROKER_URL=url, BROKER_CLIENT_TOKEN=run_as.token)
    for name in ("NO_PROXY", "no_proxy"):
        if environment.get(name) != "*":
            environment[name] = ",".join(filter(None, (environment.get(name), "127.0.0.1,localhost")))
    return environment


def proxy_warnings(config: Config) -> Iterator[str]:
    """What weakens the broker in this configuration, a line each."""
    if any(client.token_env is None for client in config.clients):
        yield "no caller token (client_token_env is null): any program on this machine may use the key"
    for upstream in config.upstreams:
        if upstream.source.kind == "env":
            yield (f"the secret comes from the environment ({upstream.source.variable}): an agent started in the same shell can "
                   "read it there; a command (1Password, Azure Key Vault) keeps it out")
    folder = os.path.dirname(os.path.realpath(config.file))
    while folder != os.path.dirname(folder) and not os.path.exists(os.path.join(folder, ".git")):
        folder = os.path.dirname(folder)
    if os.path.exists(os.path.join(folder, ".git")):
        yield f"the configuration lies in a git work tree ({folder}): an agent that works there can change it"
    for host in sorted(config.allowed_hosts):
        if not LOOPBACK.fullmatch(host) and not host.endswith(".localhost"):
            yield f"allowed_hosts has {host}, which a network could answer for: a web page under that name passes the check"
    if wide := [rule.text for upstream in config.upstreams for rule in upstream.rules if rule.is_wide]:
        yield f"wide paths in allowed_paths reach stored data or open-ended jobs: {', '.join(wide)}"
    for upstream in config.upstreams:
        last = upstream.address.path.rpartition("/")[2]
        if last and any(rule.segments[1] == last for rule in upstream.rules):
            yield (f"{upstream.address.url} ends in /{last} and its allowed_paths begin with /{last}, so that it would be there "
                   "twice: leave it out of one of them")


def describe_client(config: Config, client: ClientConfig, is_shown: bool) -> Iterator[str]:
    """What one client may do."""
    yield "caller token: " + ("none: any program on this machine may use the key" if client.token_env is None else
                              "a random one for each run" if is_shown else f"from environment variable {client.token_env}")
    if client.rules is not None or len(client.upstreams) < len(config.upstreams):
        for rule in Caller(client, None).rules:
            yield f"may ask for {rule.text}"
    if client.models is not None:
        yield f"models: {', '.join(client.models)}"
    for name, limit in client.limits.items():
        yield f"{name}: {limit}"
    if client.expires is not None:
        over = " (over)" if client.expires <= datetime.now(timezone.utc) else ""
        yield f"expires: {client.expires.isoformat()}{over}"


def describe(state: State) -> Iterator[str]:
    """What is allowed, in plain words: the lines that --check and a start have in common."""
    config = state.config
    yield f"mode: {config.mode}" + (" (no secret is read, nothing is sent)" if config.dry_run else "")
    for upstream in state.upstreams.values():
        name = f"upstream {upstream.config.name}" if len(config.upstreams) > 1 else "upstream"
        yield f"{name}: {upstream.config.address.url}, with {upstream.config.describe_credential()}"
        for rule in upstream.config.rules:
            yield f"allowed: {rule.text}"
        if isinstance(upstream, Upstream) and upstream.proxy is not None:
            yield f"proxy from the environment: {upstream.proxy.host}:{upstream.proxy.port}"
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if os.environ.get(name) and not config.dry_run and any(upstream.address.secure for upstream in config.upstreams):
            yield f"trust store from the environment: {name}={os.path.abspath(os.environ[name])}"
    for client in config.clients:
        shown = client.name in RANDOM_TOKENS
        yield from (f"client {client.name}: {line}" for line in describe_client(config, client, shown))


def paste_lines(state: State, url: str) -> Iterator[str]:
    """Lines for a shell: the tokens that nobody knows yet, a call, an SDK."""
    for client in state.config.clients:
        if client.name in RANDOM_TOKENS:
            yield f"export {client.token_env}={RANDOM_TOKENS[client.name]}"
    client = state.config.clients[0]
    upstream = client.upstreams[-1]
    yield curl_line(rules_of(client, upstream) or upstream.rules, url + upstream.prefix, client.token_env)
    with contextlib.suppress(ConfigError):
        settings = variables_for(state.config, client, url, f'"${client.token_env}"' if client.token_env else "unused")
        if settings:
            yield f"export {' '.join(f'{name}={value}' for name, value in settings.items())}"


@contextlib.contextmanager
def start_failures(config: Config) -> Iterator[None]:
    """What may fail of the log, the ledger and the secrets, as an OperationalError."""
    try:
        yield
    except SecretUnavailable as error:
        raise OperationalError(f"{config.file}: {error}") from None
    except OSError as error:
        raise OperationalError(f'{config.file}: "event_log": {config.event_log} can\'t be written or read ({error.strerror}): '
                               "mend that, or name another file") from None


def prepare(config: Config, run_as: RunAs | None) -> tuple[State, list[str]]:
    """(state, warnings): what can fail before the port is taken, in the order in which a user can mend it."""
    warnings = check_files(config)
    unguarded = guard_process()
    if not config.dry_run:
        warnings += [*proxy_warnings(config), *unguarded]
    return make_state(config, run_as), warnings


def serve_until_stopped(server: Server, signals: Signals) -> int:
    """The first signal stops, with time for what is in flight; the second one, and SIGQUIT, end at once."""
    while (number := signals.next(LOOK_SECONDS)) is None:
        pass
    if number == signals.QUIT:
        sys.exit(128 + number)
    server.stop()
    for seconds in (GRACE_SECONDS, LAST_SECONDS):
        deadline = time.monotonic() + seconds
        while len(server.connections) and time.monotonic() < deadline:
            number = signals.next(LOOK_SECONDS / 4)
            if number is not None and number != signals.HANG_UP:
                sys.exit(128 + number)
        server.gave_up = True
        server.connections.end_reading()
    return 0


def run_command(command: list[str], server: Server, signals: Signals, environment: Texts) -> int:
    """Serves while the command runs; returns what a shell would call its exit code."""
    import subprocess
    try:
        with as_inherited(), OWN_CHILDREN_LOCK:
            process = subprocess.Popen(command, env=environment)
            OWN_CHILDREN.add(process.pid)
    except (OSError, ValueError) as error:
        say(f"broker: error: the command {command[0]!r} can't be run: {getattr(error, 'strerror', None) or error}")
        server.stop()
        return 127 if isinstance(error, FileNotFoundError) else 126

    def pass_on() -> None:
        while (number := signals.next(0)) is not None:
            # The others come from the terminal, which sends them to the command as well.
            if number in (signal.SIGTERM, signals.HANG_UP):
                with contextlib.suppress(OSError):      # of another user by now (sudo)
                    process.terminate()
    ending = SharedRun(process.wait)
    ending.start()
    code = ending.result(pass_on)
    server.gave_up = True
    server.stop()
    server.connections.end_reading()
    deadline = time.monotonic() + LOOK_SECONDS
    while len(server.connections) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS / 20)   # so that the log has their last lines
    return 128 - code if code < 0 else code


def serve(config: Config, command: list[str], run_as: RunAs | None) -> int:
    """Serves until a signal, or for as long as the command runs."""
    signals = Signals(serves=True)
    give_memory_back()
    state, warnings = prepare(config, run_as)
    with Server(state) as server:
        with start_failures(config):
            server.log.open()
            server.load_ledger(config)
            state.resolve_secrets()
            server.log.append("start", server.lifecycle)
        signals.raising = False
        threading.Thread(target=server.serve_forever, args=(LOOK_SECONDS,), daemon=True).start()
        threading.Thread(target=server.reload_when_asked, args=(signals.reloads, run_as), daemon=True).start()
        if run_as is not None:
            code = run_command(command, server, signals, environment_for(config, run_as, server.url, command[0]))
        else:
            for line in (*(f"broker: warning: {warning}" for warning in warnings),
                         f"broker {__version__} listens on {server.url}", *(f"  {line}" for line in describe(state)),
                         "Stop it with Ctrl-C. To paste into another shell:",
                         *(f"  {line}" for line in paste_lines(state, server.url))):
                say(line)
            server.shows_requests = sys.stderr is not None and sys.stderr.isatty()
            code = serve_until_stopped(server, signals)
        server.end()
    return code


def check_upstream(upstream: Upstream) -> str:
    """Connects, sends nothing; what the certificate says. Raises OperationalError for one that is not valid."""
    authority = upstream.config.address.authority
    try:
        wire = upstream.connect()
    except RequestError as error:
        if error.code == "upstream_tls_error":
            raise OperationalError(error.message) from None
        return f"the upstream {authority} can't be reached now: {error.message}"
    with contextlib.closing(wire):
        found: Any = wire.sock.getpeercert() if isinstance(wire.sock, ssl.SSLSocket) else None
        issuer = ", ".join(value for part in (found or {}).get("issuer", ()) for name, value in part
                           if name in ("organizationName", "commonName"))
        return f"the upstream {authority} can be reached" + (
            f"; its certificate is valid until {found['notAfter']}, issued by {issuer}" if found else "")


def run_check(config: Config) -> int:
    """--check: all that a start does, but for the port and files; says it in plain words."""
    Signals(serves=False)
    state, warnings = prepare(config, None)
    with start_failures(config):
        EventLog(config.event_log).check()
        if config.has_budgets:
            used_today(config.event_log)    # a start has to read it
        state.resolve_secrets()
    has_secret = not config.dry_run and any(upstream.source.kind != "none" for upstream in config.upstreams)
    resolved = ", and the secret was resolved" if has_secret else ""
    for line in (f"{config.file} is valid{resolved}", *describe(state), f"listens on: http://127.0.0.1:{config.listen_port}",
                 f"hosts a caller may use: {', '.join(sorted(config.allowed_hosts))}", f"event log: {config.event_log}",
                 *(f"warning: {warning}" for warning in warnings)):
        print(printable(line))
    for upstream in state.real_upstreams:
        print(printable(check_upstream(upstream)))
    return 0


REPORT_KEYS = ("day", "client", "path", "model")
HARMLESS_OUTCOMES = ("ok", "dry_run", "client_disconnected")
Rows = dict[tuple[str, ...], Json]      # by the values of REPORT_KEYS; `durations` is there until they are all known


def add_event(rows: Rows, pending: dict[str, tuple[str, ...]], event: Json) -> None:
    """`pending`: requests without their response yet. Raises what an event that is not ours may cause."""
    kind, key = event["event"], (str(event["time"])[:10], *(str(event.get(name) or "-") for name in REPORT_KEYS[1:]))
    if kind == "request":
        pending[str(event["id"])] = key
        rows[key]["requests"] += 1
    elif kind == "denied":
        count = int(event.get("suppressed", 0)) + ("id" in event)      # the line at the stop only carries a count
        rows[key]["denied"][str(event["reason"])] += count
    elif kind == "response":
        duration, usage = float(event["duration_ms"]), event["usage"] or {}
        tokens = {name: int(usage.get(name, 0)) for name in ("input_tokens", "output_tokens")}
        row = rows[pending.pop(str(event["id"]), key)]
        row["errors"] += event["outcome"] not in HARMLESS_OUTCOMES
        row["durations"].append(duration)
        row.update({name: row[name] + count for name, count in tokens.items()})


def report_rows(path: str) -> tuple[list[Json], int]:
    """(a row a day, client, path and model; the number of lines that can't be read) of an event log. Raises OSError."""
    rows: Rows = collections.defaultdict(lambda: {
        "requests": 0, "denied": collections.Counter(), "errors": 0, "p50_ms": None, "p95_ms": None, "input_tokens": 0,
        "output_tokens": 0, "durations": []})
    pending: dict[str, tuple[str, ...]] = {}
    unreadable = 0
    for event in read_events(path):
        try:
            add_event(rows, pending, event)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            unreadable += 1
    for row in rows.values():
        durations = sorted(row.pop("durations"))
        for percent in (50, 95) if durations else ():       # by nearest rank: the smallest that so many do not exceed
            row[f"p{percent}_ms"] = durations[-(-len(durations) * percent // 100) - 1]
    return [{**dict(zip(REPORT_KEYS, key)), **row} for key, row in sorted(rows.items())], unreadable


def print_table(rows: list[Json]) -> None:
    def cell(value: Any) -> str:
        if isinstance(value, dict):
            value = " ".join(f"{reason}:{count}" for reason, count in sorted(value.items())) or "0"
        text = "-" if value is None else f"{value:.1f}" if isinstance(value, float) else printable(str(value))
        return text if len(text) <= REPORT_CELL else text[:REPORT_CELL - 1] + "…"
    table = [["day", "client", "path", "model", "requests", "denied", "errors", "p50 ms", "p95 ms", "tokens in", "tokens out"],
             *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("  ".join(text.ljust(width) for text, width in zip(cells, widths)).rstrip())


def report(config: Config, as_json: bool) -> int:
    """--report: the event log as a table, or as objects for programs; then today's share of each budget."""
    try:
        rows, unreadable = report_rows(config.event_log)
        used = used_today(config.event_log)[0] if config.has_budgets else {}
    except OSError as error:
        raise OperationalError(f"{config.event_log} can't be read ({error.strerror}): has the broker run yet?") from None
    day = utc_time()[:10]
    shares = [{"client": client.name, "day": day, "tokens_per_day": client.tokens_per_day, "used": used.get(client.name, 0)}
              for client in config.clients if client.tokens_per_day is not None]
    if as_json:
        for row in [*rows, *shares]:
            print(HIDDEN.in_output.text(encode_json(row)))
    else:
        print_table(rows)
        for share in shares:
            print(printable("{client} has used {used} of {tokens_per_day} tokens on {day} (UTC)".format(**share)))
    if unreadable:
        print(f"{unreadable} lines could not be read", file=sys.stderr if as_json else sys.stdout)
    return 0


def parse_arguments(argv: list[str]) -> tuple[Any, list[str]]:
    """The command line: options, and the command behind `--`."""
    import argparse
    at = argv.index("--") if "--" in argv else len(argv)
    command = argv[at + 1:]
    parser = argparse.ArgumentParser(
        prog=os.path.basename(sys.argv[0]), allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--config FILE] [--dry-run] [--port N] [--check | --report [--json] | --new-token]\n"
              "       %(prog)s [--config FILE] [--dry-run] [--port N] [--client NAME] -- COMMAND [ARG...]",
        description="A localhost credential broker: it holds the provider's key, your agent does not.",
        epilog="examples:\n"
               "  python broker.py --config broker_config.example.json --dry-run   try it, no key needed\n"
               "  python broker.py --config my.json --check                        is all well?\n"
               "  python broker.py --config my.json                                serve\n"
               "  python broker.py --config my.json -- claude                      serve for this command alone\n\n"
               "exit codes: 0 stopped, 1 an operational failure, 2 wrong usage or configuration;\n"
               "with a command its own (128+n on a signal, 127 not found, 126 not executable)")
    parser.add_argument("--config", metavar="FILE", help="the configuration (default: broker_config.json in this folder, if "
                        "its secret sources run no command and read no file)")
    parser.add_argument("--dry-run", action="store_true", help="read no secret and contact no upstream: canned answers")
    parser.add_argument("--port", type=int, metavar="N", help="instead of listen_port; 0 for any free port")
    parser.add_argument("--client", metavar="NAME", help="before `--`: as which client the command runs, where there are several")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="validate, resolve the secret, say what would be allowed; exit")
    only.add_argument("--report", action="store_true", help="summarise the event log as a table; exit")
    only.add_argument("--new-token", action="store_true", help="print a fresh random caller token; exit")
    parser.add_argument("--json", action="store_true", help="with --report: an object a line, for programs")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(argv[:at])
    if options.port is not None and not 0 <= options.port <= 65535:
        parser.error("argument --port: must be from 0 to 65535")
    if options.json and not options.report:
        parser.error("argument --json: goes with --report")
    if at < len(argv) and (not command or options.check or options.report or options.new_token):
        parser.error("`--` must be followed by a command, which does not go with --check, --report or --new-token")
    if options.client is not None and not command:
        parser.error("argument --client: goes with a command behind `--`")
    return options, command


def run_as_whom(config: Config, name: str | None) -> RunAs:
    """The client that a command runs as, with a token for this run. Raises ConfigError."""
    names = [client.name for client in config.clients]
    if name not in names and (name is not None or len(names) > 1):
        wrong = "there are several clients" if name is None else f"there is no client {name}"
        raise ConfigError(f"{config.file}: {wrong}: say --client NAME before `--`, one of {', '.join(names)}")
    run_as = RunAs(name or names[0], new_token())
    HIDDEN.add(run_as.client, run_as.token, in_answers=False)
    return run_as


def run_options(options: Any, command: list[str]) -> int:
    """What the command line asks for. Raises ConfigError, OperationalError."""
    if options.new_token:
        print(new_token())
        return 0
    file = options.config or DEFAULT_CONFIG
    config = load_config(file, options.dry_run, 0 if command and options.port is None else options.port)
    for upstream in config.upstreams:
        if options.config is None and upstream.source.kind not in UNASKED_SOURCES:
            # Attack: a cloned folder whose broker_config.json runs a command of its author's.
            raise ConfigError(f'{file}: "secret_source" of kind {upstream.source.kind} is not used unasked, and the file was not '
                              f"named: if you trust it, say --config {file}")
    if options.report:
        return report(config, options.json)
    try:
        if options.check:
            return run_check(config)
        return serve(config, command, run_as_whom(config, options.client) if command else None)
    except KeyboardInterrupt as stopped:    # before the broker was ready
        asked = any(upstream.source.kind == "prompt" for upstream in config.upstreams)
        at_once = command or options.check or asked or stopped.args[:1] == (Signals.QUIT,)
        return 128 + stopped.args[0] if stopped.args and at_once else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Every failure is one line on stderr."""
    options, command = parse_arguments(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")    # a model's name may have any letters, a pipe may not
    try:
        code = run_options(options, command)
        if sys.stdout is not None:
            sys.stdout.flush()                      # here: at the interpreter's end `--report | head` would be a failure
        return code
    except (ConfigError, OperationalError) as error:
        say(f"broker: error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # or the interpreter would complain at its end
        return 0
    except OSError as error:
        say(f"broker: error: the output can't be written: {error.strerror}: give it another place")
        return 1
    except Exception as bug:
        report_bug(bug)
        return 1
    finally:
        end_secret_commands()
        STDERR.close()


if __name__ == "__main__":
    sys.exit(main())
