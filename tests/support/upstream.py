"""The upstream: a scriptable provider on 127.0.0.1 that records what it is asked, and is strict about it."""

import contextlib
import json
import os
import queue
import re
import socket
import ssl
import struct
import threading
import time
import traceback
import warnings

from .common import TESTS, Gone, Headers, header_pairs

CERTS = os.path.join(TESTS, "certs")
CA_FILE = os.path.join(CERTS, "ca.pem")


class StubRequest(Headers):
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
        headers = header_pairs(headers)
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
        headers = [*header_pairs(headers), ("Content-Type", "application/json")]
        self.respond(status, headers, json.dumps(obj).encode(), reason)

    def start_stream(self, content_type="text/event-stream", status=200, headers=(), reason="OK"):
        """Send the head of a chunked answer."""
        headers = header_pairs(headers)
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


def stop_stub(stub):
    """End it; an AssertionError when the broker sent it what it must never send, or a handler failed."""
    stub.stop()
    if stub.errors:
        raise AssertionError("at the upstream: " + "; ".join(stub.errors))
