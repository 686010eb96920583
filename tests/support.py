"""What the tests stand on: a scriptable upstream, the broker as a subprocess, and a leak check.

Nothing here knows the inside of `broker.py`: it is started as a user starts it, spoken to over
real sockets, and judged by what it answers, prints, logs and sends to its upstream.

    class SomebodyAsks(BrokerTestCase):
        def test_the_answer_comes_from_the_upstream(self):
            stub = self.stub()
            broker = self.broker(stub)
            answer = broker.post_json("/v1/chat/completions", {"model": "m"})
            self.assertEqual(answer.status, 200)
            self.assertEqual(stub.requests[0].header("Authorization"), "Bearer " + broker.secret)

Every test is a leak test too: `Broker.close()` searches all answers it saw, stdout, stderr and the
event log for the secret and the token, in the forms in which they could slip out.
"""

import base64
import contextlib
import gc
import http.client
import json
import os
import queue
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import string
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import warnings

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
BROKER = os.path.join(ROOT, "broker.py")
CERTS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "certs")
CA_FILE = os.path.join(CERTS, "ca.pem")

SECRET_VARIABLE = "BROKER_TEST_SECRET"
TOKEN_VARIABLE = "BROKER_TEST_TOKEN"

# Nobody listens on the discard port; a test that is never to reach an upstream points there.
NOBODY = "http://127.0.0.1:9"

ALLOWED_PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "GET /v1/models",
    "HEAD /v1/models",
    "GET /v1/models/*",
    "GET /v1/responses/*",
    "DELETE /v1/responses/*",
    "POST /v1/responses/*/cancel",
    "/v1beta/models/*:generateContent",
    "/v1beta/models/*:streamGenerateContent",
    "/openai/deployments/*/chat/completions",
    "POST /v1/audio/transcriptions multipart/form-data",
]

# A configuration override with this value takes the key out of the file.
ABSENT = object()

# The promised time-outs of 10 to 60 seconds are waited for only when somebody asks for it.
slow = unittest.skipUnless(os.environ.get("BROKER_SLOW_TESTS"), "BROKER_SLOW_TESTS is not set")

posix_only = unittest.skipUnless(os.name == "posix", "POSIX only")
linux_only = unittest.skipUnless(sys.platform == "linux", "Linux only")

# What is remembered of the answers for the leak check.
REMEMBERED_BYTES = 64 << 20


def canary():
    """A fresh secret, unlike anything that could stand in an answer by chance."""
    alphabet = string.ascii_letters + string.digits + "_-"
    return "sk-canary-" + "".join(secrets.choice(alphabet) for _ in range(40))


def fresh_token():
    """A fresh caller token."""
    return "token-canary-" + secrets.token_urlsafe(24)


def forms_of(secret):
    """Every form (bytes) in which the secret must not be seen: as it is, base64 at the three
    alignments (the characters it shares with a neighbour left out), hex, percent-encoded."""
    raw = secret.encode()
    forms = {raw, raw.hex().encode(), raw.hex().upper().encode()}
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + raw)
        core = encoded[-(-shift * 8 // 6) : (shift + len(raw)) * 8 // 6]
        forms |= {core, core.replace(b"+", b"-").replace(b"/", b"_")}
    every_byte = "".join(f"%{byte:02X}" for byte in raw)
    forms |= {every_byte.encode(), every_byte.lower().encode()}
    return forms


def eventually(condition, timeout=10, what="it"):
    """The first true value of `condition()`; an AssertionError when none comes in time."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come about within {timeout} s")
        time.sleep(0.005)


def free_port():
    """A port of 127.0.0.1 that nobody holds just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def make_executable(folder, name, script, interpreter="/bin/sh"):
    """Place a small program in `folder` (a fake `op` or `az`) and return its path. A script
    without a `#!` line gets one for `interpreter`; say `sys.executable` there for Python."""
    path = os.path.join(folder, name)
    if not script.startswith("#!"):
        script = f"#!{interpreter}\n{script}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(script)
    os.chmod(path, 0o755)
    return path


class Lifeline:
    """Tells whether processes live, without their numbers: who holds this FIFO open for writing.

    A shell takes hold of it by `exec 9>PATH; echo >&9`, and its children inherit that."""

    def __init__(self, path):
        self.path = path
        os.mkfifo(path, 0o600)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._seen = False

    def has_begun(self):
        with contextlib.suppress(BlockingIOError):
            self._seen = self._seen or bool(os.read(self._descriptor, 65536))
        return self._seen

    def has_ended(self):
        """True once somebody had it open and nobody has any more."""
        self.has_begun()
        try:
            return self._seen and not os.read(self._descriptor, 65536)
        except BlockingIOError:
            return False

    def close(self):
        os.close(self._descriptor)


# ------------------------------------------------------------------------------------------------
# The upstream


class Gone(ConnectionError):
    """The peer closed while more of it was awaited."""


class StubRequest:
    """A request as the upstream got it."""

    def __init__(self, connection, head, method, target, headers):
        self.connection = connection  # the number of the connection, from 1
        self.head = head  # raw bytes, with the blank line
        self.method = method
        self.target = target
        self.headers = headers  # (name, value) in order, as sent
        self.body = None  # bytes, once it has arrived

    def header(self, name):
        """The value of a header that may stand there once; None where it is absent."""
        values = self.all(name)
        if len(values) > 1:
            raise AssertionError(f"{name} was sent {len(values)} times: {values!r}")
        return values[0] if values else None

    def all(self, name):
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"<{self.method} {self.target} on connection {self.connection}>"


class StubConnection:
    """One connection to the stub, as its handlers see it.

    A thread of its own reads all the time, so that the peer's leaving is noticed (`gone`) while
    a handler holds its answer back. TLS goes through memory buffers for the same reason: an
    SSLSocket may not be read and written by two threads at once."""

    BUFFER_LIMIT = 256 << 10

    def __init__(self, stub, sock, number):
        self.stub = stub
        self.sock = sock
        self.number = number
        self.request = None
        self.gone = threading.Event()
        self.closed = False
        self.tls_error = None
        self._buffer = bytearray()
        self._changed = threading.Condition()
        self._send_lock = threading.Lock()
        self._tls_lock = threading.Lock()
        self._tls = None
        self._handshaken = not stub.tls
        self._reader = threading.Thread(target=self._receive, daemon=True)
        if stub.tls:
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            context = server_context(stub.tls)
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    # What a handler calls

    def send(self, data):
        """Send these very bytes."""
        with self._send_lock:
            if self._tls:
                with self._tls_lock:
                    self._tls.write(data)
                    data = self._outgoing.read()
            self.sock.sendall(data)

    def respond(self, status=200, headers=(), body=b"", reason="OK"):
        """Send a whole answer. Content-Length is added unless `headers` say how long it is;
        to a HEAD, and with 1xx, 204 and 304, no body goes out."""
        if isinstance(body, str):
            body = body.encode()
        headers = list(headers.items() if isinstance(headers, dict) else headers)
        names = {name.lower() for name, _ in headers}
        bodiless = status < 200 or status in (204, 304)
        if not bodiless and not names & {"content-length", "transfer-encoding"}:
            headers.append(("Content-Length", str(len(body))))
        lines = [f"HTTP/1.1 {status} {reason}"]
        lines += ["{}: {}".format(*header) for header in headers]
        head = "\r\n".join(lines + ["", ""]).encode("latin-1")
        if bodiless or (self.request and self.request.method == "HEAD"):
            body = b""
        self.send(head + body)

    def respond_json(self, obj, status=200, headers=(), reason="OK"):
        headers = list(headers.items() if isinstance(headers, dict) else headers)
        headers.append(("Content-Type", "application/json"))
        self.respond(status, headers, json.dumps(obj).encode(), reason)

    def start_stream(self, content_type="text/event-stream", status=200, headers=(), reason="OK"):
        """Send the head of a chunked answer."""
        headers = list(headers.items() if isinstance(headers, dict) else headers)
        headers += [("Content-Type", content_type), ("Transfer-Encoding", "chunked")]
        lines = [f"HTTP/1.1 {status} {reason}"] + ["{}: {}".format(*header) for header in headers]
        self.send("\r\n".join(lines + ["", ""]).encode("latin-1"))

    def chunk(self, data):
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self):
        self.send(b"0\r\n\r\n")

    def close(self, notify=True):
        """Close in good order: TLS says so first (`notify`), then TCP does."""
        if not self._leave():
            return
        if self._tls and notify and self._handshaken:
            with contextlib.suppress(OSError, ValueError), self._send_lock:
                with self._tls_lock:
                    # Raises at once, because the peer's own goodbye isn't there yet; ours is
                    # in the buffer then.
                    with contextlib.suppress(ssl.SSLError):
                        self._tls.unwrap()
                    data = self._outgoing.read()
                self.sock.sendall(data)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._finish()

    def reset(self):
        """Close with a TCP reset."""
        if not self._leave():
            return
        # The reader's recv holds the socket open beyond close(); this wakes it without a FIN.
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)
        if self._reader.ident and self._reader is not threading.current_thread():
            self._reader.join(10)
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._finish()

    def wait_gone(self, timeout=10):
        """True when the peer closes within this time."""
        return self.gone.wait(timeout)

    def hold(self, event, timeout=30):
        """Wait until the test sets `event`. Raises Gone when the peer leaves or the stub stops,
        so that a held handler never outlives its test."""
        deadline = time.monotonic() + timeout
        while not event.wait(0.01):
            if self.gone.is_set() or self.closed or time.monotonic() > deadline:
                raise Gone("held until the end of the connection")

    # Reading, strictly

    def read_request(self):
        """The next request, None when the peer closed in between two of them."""
        head = self._read_head()
        if head is None:
            return None
        request = parse_request_head(self.number, head)
        self.request = request
        if self.stub.head_handler:
            self.stub.head_handler(self, request)
        request.body = self._read_body(request)
        return request

    def read_exactly(self, count):
        with self._changed:
            taken = bytearray()
            while len(taken) < count:
                self._changed.wait_for(lambda: self._buffer or self._over())
                if not self._buffer:
                    raise Gone(f"closed {count - len(taken)} bytes early")
                part = self._buffer[: count - len(taken)]
                del self._buffer[: len(part)]
                taken += part
                self._changed.notify_all()
            return bytes(taken)

    def read_until(self, end, limit=1 << 20):
        with self._changed:
            while end not in self._buffer:
                if len(self._buffer) > limit:
                    raise MalformedRequest(f"no {end!r} within {limit} bytes")
                if self._over():
                    raise Gone(f"closed before {end!r}")
                self._changed.wait()
            count = self._buffer.index(end) + len(end)
            taken = bytes(self._buffer[:count])
            del self._buffer[:count]
            self._changed.notify_all()
            return taken

    def _read_head(self):
        with self._changed:
            self._changed.wait_for(lambda: self._buffer or self._over())
            if not self._buffer:
                return None
        return self.read_until(b"\r\n\r\n", 128 << 10)

    def _read_body(self, request):
        lengths = request.all("Content-Length")
        codings = request.all("Transfer-Encoding")
        if len(lengths) + len(codings) > 1:
            raise MalformedRequest(f"framing: {lengths!r} {codings!r}")
        if lengths:
            if not re.fullmatch("[0-9]+", lengths[0]):
                raise MalformedRequest(f"Content-Length: {lengths[0]!r}")
            return self.read_exactly(int(lengths[0]))
        if not codings:
            return b""
        if codings[0].lower() != "chunked":
            raise MalformedRequest(f"Transfer-Encoding: {codings[0]!r}")
        body = b""
        while True:
            line = self.read_until(b"\r\n", 4096)
            if not re.fullmatch(rb"[0-9A-Fa-f]+\r\n", line):
                raise MalformedRequest(f"chunk size {line!r}")
            size = int(line, 16)
            body += self.read_exactly(size)
            if self.read_exactly(2) != b"\r\n":
                raise MalformedRequest("a chunk without its end")
            if size == 0:
                return body

    # The threads

    def _over(self):
        return self.gone.is_set() or self.closed

    def _receive(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._buffer) < self.BUFFER_LIMIT or self.closed)
            if self.closed:
                return
            try:
                data = self.sock.recv(65536)
            except OSError:
                data = b""
            if not data or not self._feed(data):
                break
        with self._changed:
            if not self.closed:
                self.gone.set()
            self._changed.notify_all()
        self.stub._changed_notify()

    def _feed(self, data):
        """Take bytes from the wire; False when they end the conversation."""
        if not self._tls:
            with self._changed:
                self._buffer += data
                self._changed.notify_all()
            return True
        going_on, plain = True, b""
        with self._tls_lock:
            self._incoming.write(data)
            try:
                if not self._handshaken:
                    self._tls.do_handshake()
                    self._handshaken = True
                while True:
                    part = self._tls.read(65536)
                    if not part:
                        going_on = False
                        break
                    plain += part
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                going_on = False
            except ssl.SSLError as error:
                self.tls_error, going_on = error, False
            pending = self._outgoing.pending
        if pending:
            with contextlib.suppress(OSError), self._send_lock:
                with self._tls_lock:
                    data = self._outgoing.read()
                self.sock.sendall(data)
        with self._changed:
            self._buffer += plain
            self._changed.notify_all()
        return going_on

    def _serve(self):
        try:
            if self.stub.raw_handler:
                self.stub.raw_handler(self.sock)
                return
            self._reader.start()
            while not self.closed:
                request = self.read_request()
                if request is None:
                    return
                self.stub._serve_request(self, request)
                if (request.header("Connection") or "").lower() == "close":
                    return
        except OSError:
            if self.request is not None and self.request.body is None:
                self.stub.incomplete.append(self.request)
        except MalformedRequest as error:
            self.stub.errors.append(f"malformed request: {error}")
        except BaseException:
            self.stub.errors.append(traceback.format_exc())
        finally:
            self.close()
            if self._reader.ident:
                self._reader.join(10)
            self.sock.close()

    def _leave(self):
        with self._changed:
            if self.closed:
                return False
            self.closed = True
            self._changed.notify_all()
        return True

    def _finish(self):
        # While the reader is in recv the descriptor must stay ours; _serve closes it after.
        if not self._reader.is_alive() or self._reader is threading.current_thread():
            self.sock.close()
        self.stub._changed_notify()


class MalformedRequest(Exception):
    """The broker sent what it must never send; the test that caused it fails."""


def parse_request_head(connection, head):
    lines = head[:-4].decode("latin-1").split("\r\n")
    start = re.fullmatch(r"([A-Z]+) (/[!-~]*) HTTP/1\.1", lines[0])
    if not start:
        raise MalformedRequest(f"request line {lines[0]!r}")
    headers = []
    for line in lines[1:]:
        field = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*", line)
        if not field:
            raise MalformedRequest(f"header line {line!r}")
        headers.append(field.groups())
    if [name.lower() for name, _ in headers].count("host") != 1:
        raise MalformedRequest("not one Host")
    return StubRequest(connection, head, start.group(1), start.group(2), headers)


def echo(conn, request):
    """The default handler: 200 with a JSON object that says what arrived."""
    conn.respond_json(
        {
            "method": request.method,
            "target": request.target,
            "headers": request.headers,
            "body": request.body.decode("latin-1"),
        }
    )


class Puppet:
    """A handler that does nothing but what the test tells it, one call after the other:

    puppet = Puppet(stub)               # for the next request
    puppet.start_stream()               # any method of StubConnection
    puppet.chunk(b"data: 1\n\n")
    puppet.done()                       # the handler returns
    """

    def __init__(self, stub):
        self.conn = None
        self._arrived = threading.Event()
        self._calls = queue.Queue()
        stub.script(self._handle)

    def wait(self, timeout=10):
        """The connection, once the request is there."""
        if not self._arrived.wait(timeout):
            raise AssertionError("no request came")
        return self.conn

    def done(self):
        self._calls.put(None)

    def __getattr__(self, name):
        return lambda *arguments: self._calls.put((name, arguments))

    def _handle(self, conn, request):
        self.conn = conn
        self._arrived.set()
        while True:
            try:
                call = self._calls.get(timeout=0.05)
            except queue.Empty:
                if conn.gone.is_set() or conn.closed:
                    raise Gone("gone while the test held it") from None
                continue
            if call is None:
                return
            name, arguments = call
            getattr(conn, name)(*arguments)


_contexts = {}


def server_context(kind):
    """The TLS side of a stub: True, "expired", "wrong_host", "self_signed" or "tls11"."""
    if kind not in _contexts:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        name = "server" if kind in (True, "tls11") else kind
        context.load_cert_chain(os.path.join(CERTS, name + ".pem"))
        if kind == "tls11":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = ssl.TLSVersion.TLSv1
                context.maximum_version = ssl.TLSVersion.TLSv1_1
            context.set_ciphers("ALL:@SECLEVEL=0")
        _contexts[kind] = context
    return _contexts[kind]


class StubUpstream:
    """A provider of our own on 127.0.0.1: does what `handler(conn, request)` says.

    handler       called for each whole request; the default one echoes
    head_handler  called with the request's head before its body is read (body None then); the
                  body is read when it returns
    raw_handler   `raw_handler(sock)` gets the bare socket right after accept, TLS or not
    tls           False, True, "expired", "wrong_host", "self_signed", "tls11"
    """

    def __init__(self, handler=None, tls=False, raw_handler=None, head_handler=None):
        self.tls = tls
        self.raw_handler = raw_handler
        self.head_handler = head_handler
        self.requests = []
        self.incomplete = []  # requests whose body broke off
        self.errors = []  # what the broker or a handler did wrong
        self.all_connections = []
        self._changed = threading.Condition()
        self._threads = []
        self._stopping = False
        self.script(handler or echo)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(512)
        self.port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    @property
    def url(self):
        return f"https://localhost:{self.port}" if self.tls else f"http://127.0.0.1:{self.port}"

    def script(self, *handlers):
        """From now on answer with these handlers, one a request; the last one stays."""
        with self._changed:
            self._handlers = list(handlers)

    def forget(self):
        """Back to the default handler and no requests seen: for a stub that tests share."""
        with self._changed:
            self.requests = []
            self.incomplete = []
            self.head_handler = None
        self.script(echo)

    # What the tests ask

    @property
    def connections(self):
        """How many connections were ever accepted."""
        return len(self.all_connections)

    @property
    def open_connections(self):
        return sum(not conn.gone.is_set() and not conn.closed for conn in self.all_connections)

    def wait_for_requests(self, n=1, timeout=10):
        """The requests, once there are `n`."""
        return self._wait(lambda: len(self.requests) >= n and self.requests, timeout, f"{n} requests")

    def wait_for_connections(self, n=1, timeout=10):
        """The connections, once `n` were accepted."""
        wanted = lambda: self.connections >= n and self.all_connections  # noqa: E731
        return self._wait(wanted, timeout, f"{n} connections")

    def wait_closed(self, n_open=0, timeout=10):
        """Return once at most `n_open` connections are open."""
        wanted = lambda: self.open_connections <= n_open  # noqa: E731
        self._wait(wanted, timeout, f"at most {n_open} open connections")

    def stop(self):
        """Close all, join all threads."""
        if self._stopping:
            return
        self._stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        # Where shutdown doesn't wake accept(), a caller does.
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        self._acceptor.join(10)
        self._listener.close()
        for conn in self.all_connections:
            conn.close(notify=False)
        for thread in self._threads:
            thread.join(10)
            if thread.is_alive():
                self.errors.append("a handler of the stub did not end")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    # Inside

    def _wait(self, condition, timeout, what):
        with self._changed:
            value = self._changed.wait_for(condition, timeout)
            if not value:
                raise AssertionError(
                    f"{what} did not come about within {timeout} s: requests {self.requests!r}, "
                    f"{self.connections} connections, {self.open_connections} open, errors {self.errors!r}"
                )
            return value

    def _changed_notify(self):
        with self._changed:
            self._changed.notify_all()

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._stopping:
                sock.close()
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conn = StubConnection(self, sock, len(self.all_connections) + 1)
            thread = threading.Thread(target=conn._serve, daemon=True)
            with self._changed:
                self.all_connections.append(conn)
                self._threads.append(thread)
                self._changed.notify_all()
            thread.start()

    def _serve_request(self, conn, request):
        with self._changed:
            handler = self._handlers.pop(0) if len(self._handlers) > 1 else self._handlers[0]
            self.requests.append(request)
            self._changed.notify_all()
        handler(conn, request)


# ------------------------------------------------------------------------------------------------
# The caller


class Answer:
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

    def all(self, name):
        return [value for key, value in self.headers if key.lower() == name.lower()]

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
        broker._callers.append(self)

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
            self.broker._remember(body)
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


# ------------------------------------------------------------------------------------------------
# The broker


def minimal_environment(extra):
    """What the broker is started with: nothing of the developer's own but what a process needs."""
    env = {"LANG": "C.UTF-8"}
    for name in ("PATH", "HOME", "SYSTEMROOT", "TEMP", "TMP", "COVERAGE_PROCESS_START"):
        if name in os.environ:
            env[name] = os.environ[name]
    env.update(extra)
    return {name: str(value) for name, value in env.items() if value is not ABSENT and value is not None}


def make_config(upstream, overrides):
    config = {
        "listen_port": 0,
        "upstream_base_url": upstream,
        "allowed_paths": ALLOWED_PATHS,
        "client_token_env": TOKEN_VARIABLE,
        "secret_source": {"kind": "env", "name": SECRET_VARIABLE},
        "event_log": "events.jsonl",
    }
    config.update(overrides or {})
    return {key: value for key, value in config.items() if value is not ABSENT}


class _Run:
    """What a served broker and one that ends by itself have in common: a folder, a configuration,
    an environment, canaries."""

    def _prepare(self, upstream, config, config_text, env, secret, token, folder):
        self._own_folder = folder is None
        self.folder = os.path.realpath(folder or tempfile.mkdtemp(prefix="broker-test-"))
        os.chmod(self.folder, 0o700)
        self.upstream = upstream
        self.secret = canary() if secret is None else secret
        self.token = fresh_token() if token is None else token
        self.canaries = [value for value in (self.secret, self.token) if isinstance(value, str) and len(value) >= 16]
        self._secrets = [self.secret] if isinstance(self.secret, str) and len(self.secret) >= 16 else []
        self.config_path = os.path.join(self.folder, "broker_config.json")
        self.config = None
        if config_text is None and config is not None:
            self.config = make_config(upstream.url if upstream else NOBODY, config)
            config_text = json.dumps(self.config, indent=2)
        if config_text is not None:
            self.write_config(config_text)
        # A test may name a log elsewhere; this is where the default one is.
        name = (self.config or {}).get("event_log", "events.jsonl")
        self.log_path = os.path.join(self.folder, name if isinstance(name, str) else "events.jsonl")
        self._variables = {SECRET_VARIABLE: self.secret, TOKEN_VARIABLE: self.token}
        if upstream is not None and upstream.tls:
            self._variables["SSL_CERT_FILE"] = CA_FILE
        self._variables.update(env or {})
        self.env = minimal_environment(self._variables)

    def write_config(self, config):
        """Write the configuration file anew: a dict (as it is), text or bytes."""
        if isinstance(config, dict):
            config = json.dumps(config, indent=2)
        if isinstance(config, str):
            config = config.encode("utf-8", "surrogateescape")
        descriptor = os.open(self.config_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(config)

    def also_secret(self, value):
        """Look for this one too in the leak check: a secret that a command or a reload brings."""
        self.canaries.append(value)
        self._secrets.append(value)

    def _read_log(self):
        # A test may have put a folder or a FIFO there.
        if not os.path.isfile(self.log_path):
            return b""
        with open(self.log_path, "rb") as file:
            return file.read()

    def _check_for_leaks(self, places):
        found = []
        for what, value in [("secret", value) for value in self._secrets] + [
            ("token", value) for value in self.canaries if value not in self._secrets
        ]:
            for form in forms_of(value):
                found += [f"the {what}, as {form!r}, in {name}" for name, data in places if form in data]
        if found:
            raise AssertionError("leaked: " + "; ".join(found))

    def _remove_folder(self):
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)


class Broker(_Run):
    """`broker.py` as a subprocess that serves.

    upstream    a StubUpstream; without one the base URL leads to nobody
    config      overrides of the default configuration (ABSENT takes a key out)
    config_text the whole file instead
    args        further arguments; dry_run adds --dry-run
    env         further variables of its environment (ABSENT takes one out)
    secret      the value of the secret's variable (default: a fresh canary)
    token       the value of the token's variable (default: a fresh one)
    command     what follows `--`; then nothing is ready before the command says so
    wait_ready  False: return at once
    folder      a folder that is there already, and stays
    preexec_fn, cwd, stdin  as for subprocess
    python, python_args, script     another interpreter; words for it; another copy of broker.py
    use_config  False: no --config (broker_config.json in the current folder counts then)

    Attributes: port, url, token, secret, folder, config_path, log_path, process.
    """

    def __init__(
        self,
        upstream=None,
        config=None,
        config_text=None,
        args=(),
        env=None,
        dry_run=False,
        secret=None,
        token=None,
        command=None,
        wait_ready=None,
        folder=None,
        cwd=None,
        stdin=subprocess.DEVNULL,
        preexec_fn=None,
        python_args=(),
        use_config=True,
        script=BROKER,
        python=None,
    ):
        self._prepare(upstream, config or {}, config_text, env, secret, token, folder)
        self.port = None
        self.url = None
        self.closed = False
        self.check_token_in_answers = True
        self._callers = []
        self._seen = []
        self._seen_bytes = 0
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self._printed = threading.Condition()
        argv = [python or sys.executable, *python_args, script]
        if use_config:
            argv += ["--config", self.config_path]
        argv += ["--dry-run"] * dry_run + [str(arg) for arg in args]
        if command is not None:
            argv += ["--"] + [str(arg) for arg in command]
        self.process = subprocess.Popen(
            argv,
            env=self.env,
            cwd=cwd or self.folder,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=preexec_fn,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self._drains = []
        for name in ("stdout", "stderr"):
            drain = threading.Thread(target=self._drain, args=(name,), daemon=True)
            drain.start()
            self._drains.append(drain)
        if wait_ready is None:
            wait_ready = command is None
        if wait_ready:
            try:
                self.wait_ready()
            except BaseException:
                self._kill()
                self._remove_folder()
                raise

    # Its life

    def wait_ready(self, timeout=20):
        """Until it has printed the URL it listens on."""
        own = self.upstream.port if self.upstream else 9
        pattern = re.compile(rf"http://127\.0\.0\.1:(?!{own}\b)([0-9]+)")
        self.port = int(self.wait_stderr(pattern, timeout).group(1))
        self.url = f"http://127.0.0.1:{self.port}"

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, timeout=20):
        """Its exit code, once it has ended."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self.stderr_text()}") from None

    def close(self):
        """End it, and search all that it let out for the secret and the token."""
        if self.closed:
            return
        self.closed = True
        asked = self.process.poll() is None
        killed = False
        for caller in self._callers:
            caller.close()
        if asked:
            # The second one ends it at once, whatever is in flight.
            for _ in range(2):
                with contextlib.suppress(ProcessLookupError):
                    self.process.terminate()
                try:
                    self.process.wait(5)
                    break
                except subprocess.TimeoutExpired:
                    pass
            else:
                killed = True
        self._kill()
        log = self._read_log()
        self._remove_folder()
        stderr = self.stderr_text()
        if killed:
            raise AssertionError("two SIGTERM did not end it: " + stderr)
        if "Traceback" in stderr:
            raise AssertionError("a traceback on stderr: " + stderr)
        answers = b"\n".join(self._seen + [bytes(caller.received) for caller in self._callers])
        if b"internal_error" in answers:
            raise AssertionError("internal_error: " + stderr)
        places = [("stdout", bytes(self._output["stdout"])), ("stderr", stderr.encode()), ("the event log", log)]
        self._check_for_leaks(places)
        for value in self.canaries if self.check_token_in_answers else self._secrets:
            for form in forms_of(value):
                if form in answers:
                    at = answers.index(form)
                    raise AssertionError(f"leaked in an answer: {answers[max(0, at - 200) : at + 200]!r}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _kill(self):
        """The end of the process, of what it left in its session, and of our threads."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        for drain in self._drains:
            drain.join(10)
        self.process.stdout.close()
        self.process.stderr.close()
        if self.process.stdin:
            self.process.stdin.close()

    # What it prints and logs

    def _drain(self, name):
        descriptor = getattr(self.process, name).fileno()
        while True:
            data = os.read(descriptor, 65536)
            with self._printed:
                self._output[name] += data
                self._printed.notify_all()
            if not data:
                return

    def stderr_text(self):
        with self._printed:
            return self._output["stderr"].decode("utf-8", "replace")

    def stdout_text(self):
        with self._printed:
            return self._output["stdout"].decode("utf-8", "replace")

    def wait_stderr(self, pattern, timeout=10, start=0):
        """The first match of a regular expression in what stderr has from character `start` on
        (whole lines only: half a port number is another one)."""
        return self._wait_printed("stderr", pattern, timeout, start)

    def wait_stdout(self, pattern, timeout=10, start=0):
        return self._wait_printed("stdout", pattern, timeout, start)

    def _wait_printed(self, name, pattern, timeout, start):
        deadline = time.monotonic() + timeout
        with self._printed:
            while True:
                found = search_whole_lines(self._output[name], pattern, start)
                if found:
                    return found
                ended = self._drains and not any(drain.is_alive() for drain in self._drains)
                if ended or time.monotonic() > deadline:
                    break
                self._printed.wait(0.1)
        raise AssertionError(
            f"{pattern!r} did not come on {name} within {timeout} s "
            f"(exit code {self.process.poll()}): {self.stdout_text()} {self.stderr_text()}"
        )

    def events(self):
        """The whole lines of the event log, parsed."""
        data = self._read_log()
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]

    def wait_event(self, predicate=None, timeout=10, count=1, **fields):
        """The first event with these fields (and for which `predicate` holds); with `count`,
        wait until there are so many of them and return the last."""

        def look():
            found = [
                event
                for event in self.events()
                if all(event.get(key) == value for key, value in fields.items()) and (predicate is None or predicate(event))
            ]
            return found[count - 1 : count]

        try:
            return eventually(look, timeout, f"an event {fields or predicate!r}")[0]
        except AssertionError as error:
            raise AssertionError(f"{error}; there are {self.events()!r}") from None

    # Speaking to it

    def request(self, method, path, body=None, headers=None, token=True, timeout=30):
        """One request on a connection of its own. `headers`: dict or pairs; `token=True` shows
        the caller token in X-Broker-Token; a body that is a dict or list is sent as JSON."""
        headers = list(headers.items() if isinstance(headers, dict) else headers or ())
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
            if not any(name.lower() == "content-type" for name, _ in headers):
                headers.append(("Content-Type", "application/json"))
        if isinstance(body, str):
            body = body.encode()
        names = {name.lower() for name, _ in headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.connect()
            connection.putrequest(method, path, skip_host="host" in names, skip_accept_encoding=True)
            if token is True:
                connection.putheader("X-Broker-Token", self.token)
            elif token:
                connection.putheader("X-Broker-Token", token)
            for name, value in headers:
                connection.putheader(name, value)
            if body is not None and not names & {"content-length", "transfer-encoding"}:
                connection.putheader("Content-Length", str(len(body)))
            try:
                connection.endheaders(body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused while the body was still on its way: the answer is what counts
            response = connection.getresponse()
            try:
                data = response.read()
            except http.client.IncompleteRead as error:
                self._remember(error.partial)
                raise
            answer = Answer(response.status, response.reason, response.getheaders(), data)
            self._remember(repr(answer.headers).encode() + answer.body)
            return answer
        finally:
            connection.close()

    def post_json(self, path, obj, headers=None, **more):
        return self.request("POST", path, json.dumps(obj).encode(), _with_json(headers), **more)

    def connect(self, timeout=10):
        """A raw connection (see Caller); what comes on it is part of the leak check."""
        return Caller(self, timeout)

    def raw(self, data, half_close=False, timeout=10):
        """Send these bytes; all bytes that come until the broker closes."""
        return bytes(self._send_and_read_all(data, half_close, timeout).received)

    def raw_answers(self, data, half_close=False, timeout=10):
        """As raw(), parsed."""
        return self._send_and_read_all(data, half_close, timeout).read_answers()

    def _send_and_read_all(self, data, half_close, timeout):
        with self.connect(timeout) as caller:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                caller.send(data)
                if half_close:
                    caller.half_close()
            caller.read_all()
            return caller

    def head(self, method, path, headers=(), token=True, host=True, version="HTTP/1.1"):
        """The bytes of a request's head, for raw connections."""
        lines = [f"{method} {path} {version}"]
        lines += [f"Host: 127.0.0.1:{self.port}"] * bool(host)
        lines += ["X-Broker-Token: " + self.token] * bool(token)
        lines += ["{}: {}".format(*header) for header in (headers.items() if isinstance(headers, dict) else headers)]
        return "\r\n".join(lines + ["", ""]).encode("latin-1")

    def post_bytes(self, path, body, headers=(), token=True):
        """The bytes of a whole JSON POST, for raw connections."""
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        headers = list(headers.items() if isinstance(headers, dict) else headers)
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        return self.head("POST", path, headers, token) + body

    def _remember(self, data):
        if self._seen_bytes < REMEMBERED_BYTES:
            self._seen.append(data)
            self._seen_bytes += len(data)

    # What the kernel says of it (Linux)

    def _status_field(self, name):
        with open(f"/proc/{self.pid}/status", encoding="ascii") as file:
            return int(re.search(rf"^{name}:\s+([0-9]+)", file.read(), re.M).group(1))

    def rss_anon_kb(self):
        return self._status_field("RssAnon")

    def thread_count(self):
        return self._status_field("Threads")

    def fd_count(self):
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except PermissionError:
            raise unittest.SkipTest("the descriptors of a non-dumpable process are root's to see") from None


def search_whole_lines(output, pattern, start):
    whole_lines = bytes(output[: output.rfind(b"\n") + 1]).decode("utf-8", "replace")
    return re.compile(pattern).search(whole_lines, start)


def _with_json(headers):
    headers = list(headers.items() if isinstance(headers, dict) else headers or ())
    return headers + [("Content-Type", "application/json")]


class Completed(_Run):
    """A call of `broker.py` that has ended: returncode, stdout, stderr (text), folder, and in
    `files` what lay in the folder afterwards."""


def run_broker(
    *args,
    config=None,
    config_text=None,
    upstream=None,
    env=None,
    secret=None,
    token=None,
    folder=None,
    cwd=None,
    command=None,
    stdin=None,
    timeout=30,
    preexec_fn=None,
    prepare=None,
    show_token=False,
    script=BROKER,
):
    """Run `broker.py` to its own end (a configuration error, --check, --report, `-- COMMAND`).

    `config` (overrides, {} for the default one) or `config_text` writes a file and puts
    `--config FILE` before `args`; with neither there is no --config. `prepare(run)` is called
    before the start, with run.folder, run.config_path, run.log_path. `show_token`: leave the
    token out of the leak check (a `-- COMMAND` that prints its environment)."""
    run = Completed()
    run._prepare(upstream, config, config_text, env, secret, token, folder)
    argv = [sys.executable, script]
    if config is not None or config_text is not None:
        argv += ["--config", run.config_path]
    argv += [str(arg) for arg in args]
    if command is not None:
        argv += ["--"] + [str(arg) for arg in command]
    if show_token:
        run.canaries = [value for value in run.canaries if value in run._secrets]
    if isinstance(stdin, str):
        stdin = stdin.encode()
    try:
        if prepare:
            prepare(run)
        process = subprocess.Popen(
            argv,
            env=run.env,
            cwd=cwd or run.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=preexec_fn,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(stdin or b"", timeout)
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            stdout, stderr = process.communicate()
            raise AssertionError(f"still running after {timeout} s: {stderr!r}") from None
        run.returncode = process.returncode
        run.stdout = stdout.decode("utf-8", "replace")
        run.stderr = stderr.decode("utf-8", "replace")
        log = run._read_log()
        run.log_text = log.decode("utf-8", "replace")
        run.files = sorted(os.listdir(run.folder))
    finally:
        run._remove_folder()
    if "Traceback" in run.stderr:
        raise AssertionError("a traceback on stderr: " + run.stderr)
    run._check_for_leaks([("stdout", stdout), ("stderr", stderr), ("the event log", log)])
    return run


# ------------------------------------------------------------------------------------------------
# The test case


class BrokerTestCase(unittest.TestCase):
    """Cleans up after itself, and turns what Python only mutters about (a socket left open, an
    exception in a thread) into failures."""

    longMessage = True
    maxDiff = None

    def run(self, result=None):
        self._muttered = []
        # Added first, so it runs last, when everything of the test has been closed.
        self.addCleanup(self._check_muttered)
        hooks = sys.unraisablehook, threading.excepthook
        sys.unraisablehook = lambda what: self._muttered.append(f"{what.exc_value!r} in {what.object!r}")
        threading.excepthook = lambda what: self._muttered.append(
            "".join(traceback.format_exception(what.exc_type, what.exc_value, what.exc_traceback))
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ResourceWarning)
                return super().run(result)
        finally:
            sys.unraisablehook, threading.excepthook = hooks

    def _check_muttered(self):
        gc.collect()
        if self._muttered:
            self.fail("left behind: " + "; ".join(self._muttered))

    # A stub or a broker for this test, or for the whole class (from setUpClass)

    def stub(self, *args, **keywords):
        stub = StubUpstream(*args, **keywords)
        self.addCleanup(stop_stub, stub)
        return stub

    def broker(self, *args, **keywords):
        """A running Broker that is closed, and searched for leaks, after the test."""
        broker = Broker(*args, **keywords)
        self.addCleanup(broker.close)
        return broker

    @classmethod
    def class_stub(cls, *args, **keywords):
        stub = StubUpstream(*args, **keywords)
        cls.addClassCleanup(stop_stub, stub)
        return stub

    @classmethod
    def class_broker(cls, *args, **keywords):
        broker = Broker(*args, **keywords)
        cls.addClassCleanup(broker.close)
        return broker

    def folder(self):
        """A fresh folder, removed after the test."""
        folder = os.path.realpath(tempfile.mkdtemp(prefix="broker-test-"))
        self.addCleanup(shutil.rmtree, folder, True)
        return folder

    # What is asserted again and again

    def assert_refused(self, answer, status, code):
        """One of the broker's own errors, in the shape that all of them have."""
        self.assertEqual((answer.status, answer.code), (status, code), answer)
        self.assertEqual(answer.header("Content-Type"), "application/json")
        body = answer.json()
        self.assertEqual(set(body), {"type", "error"})
        self.assertEqual(body["type"], "error")
        self.assertEqual(set(body["error"]), {"type", "code", "message", "param"})
        self.assertEqual((body["error"]["type"], body["error"]["code"]), (code, code))
        self.assertIsNone(body["error"]["param"])
        self.assertTrue(body["error"]["message"])
        self.assertTrue(answer.header("X-Broker-Request-Id"))
        never = (400 <= status < 500 and status != 408) or code in NOT_TO_BE_RETRIED
        self.assertEqual(answer.header("x-should-retry"), "false" if never else None)


NOT_TO_BE_RETRIED = {
    "secret_unavailable",
    "event_log_unavailable",
    "upstream_rejected_secret",
    "upstream_redirect",
    "upstream_tls_error",
}


def stop_stub(stub):
    stub.stop()
    if stub.errors:
        raise AssertionError("at the upstream: " + "; ".join(stub.errors))


def seeded(name):
    """A random generator that gives each test the same inputs at every run."""
    return random.Random("broker " + name)
