"""Answers go back as they arrive, never look complete when they are not, and end when their caller leaves."""

import contextlib
import json
import os
import select
import socket
import threading
import time
import unittest

from broker import UsageReader
from tests.support import (
    BrokerTestCase,
    Gone,
    Puppet,
    eventually,
    linux_only,
    make_executable,
    posix_only,
    seeded,
)

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"

# The promise is one second; the rest is for a busy machine.
SOON = 3


class StreamingTestCase(BrokerTestCase):
    """One broker and one upstream for all tests of a class."""

    config: dict = {}
    tls = False

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.class_stub(tls=cls.tls)
        cls.served = cls.class_broker(cls.upstream, config=cls.config)

    def setUp(self):
        self.upstream.forget()

    def ask(self, data=None, version="HTTP/1.1", method="GET"):
        """A caller that has sent its request, and the upstream's end of it in our hands."""
        puppet = Puppet(self.upstream)
        caller = self.served.connect()
        self.addCleanup(caller.close)
        caller.send(data or self.served.head(method, MODELS, version=version))
        self.addCleanup(puppet.done)
        puppet.wait()
        return caller, puppet


class AsItArrives(StreamingTestCase):
    def test_first_event_arrives_while_the_upstream_still_holds_the_second(self):
        caller, puppet = self.ask(self.served.post_bytes(CHAT, {"stream": True}))
        puppet.start_stream()
        puppet.chunk(b"data: 1\n\n")
        self.assertEqual(caller.read_head().header("Content-Type"), "text/event-stream")
        self.assertEqual(caller.read_chunk(), b"data: 1\n\n")
        puppet.chunk(b"data: 2\n\n")
        self.assertEqual(caller.read_chunk(), b"data: 2\n\n")
        puppet.end()
        self.assertEqual(caller.read_chunk(), b"")

    def test_head_arrives_before_any_body(self):
        heads = {
            "chunked": b"Transfer-Encoding: chunked",
            "counted": b"Content-Length: 7",
            "until the end of the connection": b"X-No-Length: at all",
        }
        for case, framing in heads.items():
            with self.subTest(case):
                caller, puppet = self.ask()
                puppet.send(b"HTTP/1.1 200 OK\r\nX-Mine: yes\r\n%s\r\n\r\n" % framing)
                self.assertEqual(caller.read_head().header("X-Mine"), "yes")
                puppet.close()

    def test_each_piece_arrives_at_once_however_the_answer_is_framed(self):
        frames = {
            "chunked": (b"Transfer-Encoding: chunked", lambda data: b"%x\r\n%s\r\n" % (len(data), data)),
            "counted": (b"Content-Length: 1000", lambda data: data),
            "until the end of the connection": (b"Connection: close", lambda data: data),
        }
        for case, (framing, frame) in frames.items():
            for version in ("HTTP/1.1", "HTTP/1.0"):
                with self.subTest(case, version=version):
                    caller, puppet = self.ask(version=version)
                    puppet.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%s\r\n\r\n" % framing)
                    self.assertEqual(caller.read_head().status, 200)
                    for number in range(10):
                        piece = b"piece %d, not an event" % number
                        puppet.send(frame(piece))
                        got = caller.read_chunk() if version == "HTTP/1.1" else caller.read_exactly(len(piece))
                        self.assertEqual(got, piece)
                    puppet.close()

    def test_a_chunk_arrives_before_its_own_end(self):
        caller, puppet = self.ask()
        puppet.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nthe begin")
        caller.read_head()
        self.assertEqual(caller.read_chunk(), b"the begin")
        puppet.send(b"ning" + b"." * 87 + b"\r\n0\r\n\r\n")
        self.assertEqual(caller.read_chunk(), b"ning" + b"." * 87)
        self.assertEqual(caller.read_chunk(), b"")

    def test_ends_for_the_caller_when_it_ends_although_the_upstream_holds_the_connection(self):
        caller, puppet = self.ask()
        puppet.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")
        caller.read_head()
        puppet.send(b"body")
        self.assertEqual(caller.read_chunk(), b"body")
        self.assertEqual(caller.read_chunk(), b"")


class AnyFraming(StreamingTestCase):
    def random_answer(self, random):
        """(body, the answer's bytes in pieces) as an upstream may send it."""
        body = bytes(random.choices(b"abc\r\n01:;", k=random.choice((0, 1, 5, 200, 70000))))
        if random.random() < 0.5:
            data = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        else:
            data, at = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0
            while at < len(body):
                piece = body[at : at + random.choice((1, 3, 50, 20000)) + len(body) // 40]
                size = random.choice((b"%x", b"%X", b"00%x")) % len(piece)
                data += size + random.choice((b"", b"", b";a=b", b' ; a="b c"')) + b"\r\n" + piece + b"\r\n"
                at += len(piece)
            data += b"0\r\n" + random.choice((b"", b"", b"X-Sum: 1\r\nX-More: 2\r\n")) + b"\r\n"
        at = random.choice((1, 9, 60, len(data)))
        pieces = [data[:at]]
        while at < len(data):
            step = random.choice((1, 2, 10, 1000)) + len(data) // 60
            pieces.append(data[at : at + step])
            at += step
        return body, pieces

    def test_arrives_whole_however_the_upstream_cuts_it(self):
        random = seeded("framing")
        plans = [self.random_answer(random) for _ in range(120)]
        bodies = [body for body, _ in plans]
        waiting = iter(plans)

        def play(conn, request):
            for piece in next(waiting)[1]:
                conn.send(piece)

        self.upstream.script(play)
        with self.served.connect() as caller:
            for number, body in enumerate(bodies):
                caller.send(self.served.head("GET", MODELS))
                answer = caller.read_answer()
                self.assertTrue(answer.status == 200 and answer.body == body, f"answer {number}: {answer}")

    def test_length_is_passed_on_only_where_the_whole_body_was_in_hand(self):
        self.upstream.script(lambda conn, request: conn.respond(body=b"all of it"))
        answer = self.served.request("GET", MODELS)
        self.assertEqual((answer.header("Content-Length"), answer.header("Transfer-Encoding")), ("9", None))
        caller, puppet = self.ask()
        puppet.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nall ")
        head = caller.read_head()
        self.assertEqual((head.header("Content-Length"), head.header("Transfer-Encoding")), (None, "chunked"))
        puppet.send(b"of it")
        self.assertEqual(caller.read_body(head), b"all of it")

    def test_length_is_that_of_what_is_sent_where_the_secret_was_taken_out(self):
        self.upstream.script(lambda conn, request: conn.respond(body=request.header("Authorization")))
        answer = self.served.request("GET", MODELS)
        self.assertEqual((answer.body, answer.header("Content-Length")), (b"Bearer [redacted]", "17"))

    def test_length_is_passed_on_for_head_and_304(self):
        answers = {
            "HEAD": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n", "1234"),
            "HEAD of a stream": ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", None),
            "HEAD of something refused": ("HEAD", b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n", "9"),
            "304": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1234\r\n\r\n", "1234"),
            "304 without one": ("GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", None),
            "204": ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", None),
            "204 that says 0": ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", None),
        }
        with self.served.connect() as caller:
            for case, (method, data, length) in answers.items():
                with self.subTest(case):
                    self.upstream.script(lambda conn, request, data=data: conn.send(data))
                    caller.send(self.served.head(method, MODELS))
                    head = caller.read_head()
                    self.assertEqual(head.status, int(data[9:12]))
                    if method != "HEAD" or length:
                        self.assertEqual(head.header("Content-Length"), length)
                    if method != "HEAD":
                        self.assertIsNone(head.header("Transfer-Encoding"))
                    # There is no body: the next answer follows at once.
                    caller.send(self.served.head("GET", "/healthz"))
                    self.assertEqual(caller.read_answer().json(), {"ok": True})

    def test_is_ended_by_closing_for_http_1_0(self):
        handlers = {
            "a stream": lambda conn, request: (conn.start_stream(), conn.chunk(b"all "), conn.chunk(b"of it"), conn.end()),
            "a counted body": lambda conn, request: conn.respond(body=b"all of it"),
            "a counted body in pieces": lambda conn, request: (
                conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nall "),
                conn.send(b"of it"),
            ),
        }
        for case, handler in handlers.items():
            with self.subTest(case):
                self.upstream.script(handler)
                data = self.served.raw(self.served.head("GET", MODELS, version="HTTP/1.0"))
                head, _, body = data.partition(b"\r\n\r\n")
                self.assertEqual(body, b"all of it")
                self.assertNotIn(b"transfer-encoding", head.lower())


class TheAnswersHead(StreamingTestCase):
    FIXED = [
        ("x-content-type-options", "nosniff"),
        ("cross-origin-resource-policy", "same-origin"),
        ("content-security-policy", "default-src 'none'; sandbox"),
    ]
    DROPPED = [
        "Keep-Alive", "Proxy-Authenticate", "Proxy-Connection", "TE", "Trailer", "Upgrade", "Set-Cookie", "Set-Cookie2",
        "Access-Control-Allow-Origin", "Access-Control-Expose-Headers", "Access-Control-Anything", "WWW-Authenticate",
        "Alt-Svc", "Strict-Transport-Security", "Clear-Site-Data", "Refresh", "Report-To", "NEL", "Server", "Via",
        "Reporting-Endpoints", "Speculation-Rules", "Timing-Allow-Origin", "Content-Security-Policy-Report-Only",
        "Authentication-Info", "Proxy-Authentication-Info",
        "X-Broker-Error", "X-Broker-Request-Id", "X-Broker-Anything", "openai-organization", "openai-project",
        "anthropic-organization-id", "X-Content-Type-Options", "Cross-Origin-Resource-Policy", "Content-Security-Policy",
    ]  # fmt: skip

    def whole_head(self, headers, status=200, reason="OK"):
        """All headers of the answer, less the framing and the request's id, which is there once."""
        self.upstream.script(lambda conn, request: conn.respond(status, headers, b"body", reason))
        answer = self.served.request("GET", MODELS)
        self.assertEqual((answer.status, answer.reason), (status, reason))
        self.assertEqual(len(answer.all("X-Broker-Request-Id")), 1)
        found = [(name.lower(), value) for name, value in answer.headers]
        return sorted(header for header in found if header[0] not in ("x-broker-request-id", "content-length"))

    def test_is_the_upstreams_less_what_is_dropped(self):
        kept = [
            ("Content-Type", "text/event-stream; charset=utf-8"),
            ("Date", "Mon, 01 Jan 2024 00:00:00 GMT"),
            ("Cache-Control", "no-store"),
            ("ETag", '"x"'),
            ("Retry-After", "7"),
            ("Link", '<https://api.github.com/x?page=2>; rel="next"'),
            ("openai-processing-ms", "12"),
            ("openai-version", "2020-10-01"),
            ("x-ratelimit-remaining-tokens", "100"),
            ("anthropic-ratelimit-requests-limit", "5"),
            ("x-request-id", "req_1"),
            ("x-should-retry", "true"),
            ("X-Twice", "1"),
            ("X-Twice", "2"),
        ]
        expected = sorted([(name.lower(), value) for name, value in kept] + self.FIXED)
        self.assertEqual(self.whole_head(kept + [(name, "x") for name in self.DROPPED]), expected)
        self.assertEqual(self.whole_head(kept + [(name.upper(), "x") for name in self.DROPPED], 404, "Gone Fishing"), expected)

    def test_loses_each_dropped_header(self):
        for name in self.DROPPED:
            with self.subTest(name):
                self.assertEqual(self.whole_head([(name, "x")]), sorted(self.FIXED))

    def test_loses_a_coding_that_means_none(self):
        for coding in ("identity", "none", "utf-8", "", "identity, identity", "NONE, UTF-8"):
            with self.subTest(coding):
                self.assertEqual(self.whole_head([("Content-Encoding", coding)]), sorted(self.FIXED))

    def test_loses_what_connection_names(self):
        for case, values in {"one": ["X-Mine"], "among others": ["keep-alive, x-mine"], "twice": ["a", "X-MINE"]}.items():
            with self.subTest(case):
                headers = [("Connection", value) for value in values] + [("X-Mine", "1"), ("X-Other", "2")]
                self.assertEqual(self.whole_head(headers), sorted([*self.FIXED, ("x-other", "2")]))

    def test_has_no_trailers_and_no_interim_answers_behind_or_before_it(self):
        data = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        data += b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
        data += b"4\r\nbody\r\n0\r\nX-Sum: 1\r\nSet-Cookie: a=b\r\n\r\n"
        self.upstream.script(lambda conn, request: conn.send(data))
        with self.served.connect() as caller:
            caller.send(self.served.head("GET", MODELS, [("TE", "trailers"), ("Connection", "TE, close")]))
            everything = caller.read_all()
        self.assertEqual(everything.count(b"HTTP/1.1 "), 1)
        for gone in (b"Early Hints", b"Processing", b"X-Sum", b"Set-Cookie", b"Link"):
            self.assertNotIn(gone, everything)
        self.assertIn(b"body", everything)


class TheCallerLeaves(StreamingTestCase):
    WAYS = ("close", "reset", "half_close")

    def requests_logged(self):
        return {event["id"] for event in self.served.events() if event["event"] == "request"}

    @contextlib.contextmanager
    def logged_as(self, status):
        """Within it a caller asks for something and leaves; afterwards the log says so."""
        before = self.requests_logged()
        yield
        (request_id,) = self.requests_logged() - before
        event = self.served.wait_event(event="response", id=request_id, timeout=SOON)
        self.assertEqual((event["outcome"], event["status"]), ("client_disconnected", status))

    def assert_lets_go(self, caller, way, conn):
        """Leaving this way closes that connection to the upstream."""
        self.assertFalse(conn.gone.is_set() or conn.closed)
        getattr(caller, way)()
        # Where the stub's own thread is the first to notice, it closes its end.
        eventually(lambda: conn.gone.is_set() or conn.closed, SOON, "the end of the upstream's connection")

    def test_while_the_upstream_is_silent(self):
        for data in (self.served.head("GET", MODELS), self.served.post_bytes(CHAT, {"stream": True})):
            for way in self.WAYS:
                with self.subTest(way), self.logged_as(None):
                    caller, puppet = self.ask(data)
                    self.assert_lets_go(caller, way, puppet.conn)

    def test_while_the_head_of_the_answer_is_coming(self):
        for way in self.WAYS:
            with self.subTest(way), self.logged_as(None):
                caller, puppet = self.ask()
                puppet.send(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200")
                self.assert_lets_go(caller, way, puppet.conn)

    def test_in_the_middle_of_a_stream(self):
        for way in self.WAYS:
            with self.subTest(way), self.logged_as(200):
                caller, puppet = self.ask()
                puppet.start_stream()
                puppet.chunk(b"data: 1\n\n")
                caller.read_head()
                caller.read_chunk()
                self.assert_lets_go(caller, way, puppet.conn)

    def test_while_it_takes_nothing_of_its_answer(self):
        for way in self.WAYS:
            with self.subTest(way), self.logged_as(200):
                caller, puppet = self.ask()
                puppet.start_stream()
                for _ in range(40):
                    puppet.chunk(b"x" * (1 << 20))
                caller.read_head()
                self.assert_lets_go(caller, way, puppet.conn)

    def test_half_of_it_while_the_upstream_never_pauses(self):
        def pour(conn, request):
            conn.start_stream("application/octet-stream")
            with contextlib.suppress(OSError, Gone):
                while not conn.gone.is_set():
                    conn.chunk(b"x" * (1 << 16))

        self.upstream.script(pour)
        with self.served.connect() as caller, self.logged_as(200):
            caller.send(self.served.head("GET", MODELS))
            caller.read_head()
            caller.half_close()
            until = time.monotonic() + SOON
            while caller.sock.recv(1 << 16):    # it takes all there is, so that nobody waits for it either
                self.assertLess(time.monotonic(), until, "it is still being sent the answer")

    def test_while_the_upstream_is_sent_the_body(self):
        body = b'{"a":"' + b"x" * (16 << 20) + b'"}'
        for way in self.WAYS:
            self.upstream.forget()
            read_on, arrived = threading.Event(), threading.Event()

            def hold(conn, request, read_on=read_on, arrived=arrived):
                arrived.set()
                read_on.wait(30)

            self.upstream.head_handler = hold
            # A stub that reads nothing can't see the end, so the log's word is taken first.
            with self.subTest(way), self.served.connect() as caller, self.logged_as(None):
                caller.send(self.served.post_bytes(CHAT, body))
                self.assertTrue(arrived.wait(10))
                getattr(caller, way)()
            read_on.set()
            eventually(lambda: self.upstream.incomplete, what="the end of the body")
            self.assertEqual(self.upstream.requests, [])

    def test_with_another_request_behind(self):
        for way in self.WAYS:
            self.upstream.forget()
            with self.subTest(way), self.logged_as(None):
                caller, puppet = self.ask(self.served.post_bytes(CHAT, {}) + self.served.post_bytes(CHAT, {"next": 1}))
                self.assert_lets_go(caller, way, puppet.conn)
            # What it had asked for besides is not sent.
            self.upstream.script(lambda conn, request: conn.respond_json({}))
            self.assertEqual(self.served.request("GET", MODELS).status, 200)
            self.assertEqual([request.method for request in self.upstream.requests], ["POST", "GET"])

    def test_which_more_behind_than_is_read_ahead_counts_as(self):
        # What a caller says meanwhile is kept for it, and that has to have an end.
        for size in (90000, 300000):
            with self.subTest(size), self.logged_as(200):
                caller, puppet = self.ask(self.served.post_bytes(CHAT, {}))
                puppet.start_stream()
                caller.read_head()
                with contextlib.suppress(ConnectionError):
                    caller.send(self.served.post_bytes(CHAT, {"next": "x" * size}))
                let_go = lambda conn=puppet.conn: conn.gone.is_set() or conn.closed  # noqa: E731
                eventually(let_go, SOON, "the end of the upstream's connection")
                with self.assertRaises((Gone, ConnectionResetError)):
                    caller.read_chunk()
        self.assertEqual([request.json() for request in self.upstream.requests], [{}, {}])

    def test_which_another_request_behind_alone_does_not_mean(self):
        for size in (10, 60000):
            with self.subTest(size):
                caller, puppet = self.ask(self.served.post_bytes(CHAT, {}))
                puppet.start_stream()
                caller.read_head()
                caller.send(self.served.post_bytes(CHAT, {"next": "x" * size}))
                for number in range(3):
                    puppet.chunk(b"data: %d\n\n" % number)
                    self.assertEqual(caller.read_chunk(), b"data: %d\n\n" % number)
                self.upstream.script(lambda conn, request: conn.respond_json({"got": len(request.body)}))
                puppet.end()
                puppet.done()
                self.assertEqual(caller.read_chunk(), b"")
                self.assertEqual(caller.read_answer().json(), {"got": size + 12})

    def test_and_nothing_stays_behind_in_the_broker(self):
        self.assertEqual(self.served.request("GET", MODELS).status, 200)
        self.upstream.wait_closed(1)
        before = self.served.fd_count() if os.path.isdir("/proc/self/fd") else None
        for number in range(30):
            caller, puppet = self.ask()
            if number % 2:
                puppet.start_stream()
                caller.read_head()
            getattr(caller, self.WAYS[number % 3])()
            self.assertTrue(puppet.conn.wait_gone(SOON))
            caller.close()
        if before is not None:
            eventually(lambda: self.served.fd_count() <= before, what="the old number of descriptors")
        self.upstream.forget()
        self.assertEqual(self.served.request("GET", MODELS).status, 200)


class TheCallerLeavesEarly(BrokerTestCase):
    """Before there is a connection to the upstream that could tell."""

    @linux_only
    def test_while_the_broker_is_connecting(self):
        with contextlib.ExitStack() as sockets:
            listener = sockets.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            # A full backlog makes the kernel drop what asks to connect: it looks like a slow network.
            for _ in range(10):
                sock = sockets.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(listener.getsockname())
                if not select.select([], [sock], [], 0.3)[1]:
                    break
            else:
                self.skipTest("this kernel has no full backlog")
            broker = self.broker(config={"upstream_base_url": f"http://127.0.0.1:{listener.getsockname()[1]}"})
            before = broker.fd_count()
            for number, way in enumerate(TheCallerLeaves.WAYS):
                with self.subTest(way), broker.connect() as caller:
                    caller.send(broker.post_bytes(CHAT, {}))
                    broker.wait_event(event="request", count=number + 1)
                    getattr(caller, way)()
                    event = broker.wait_event(event="response", count=number + 1, timeout=SOON)
                    self.assertEqual((event["outcome"], event["status"]), ("client_disconnected", None))
            eventually(lambda: broker.fd_count() <= before, what="the old number of descriptors")

    @posix_only
    def test_while_the_secret_command_runs(self):
        stub, folder = self.stub(), self.folder()
        fifo = os.path.join(folder, "fifo")
        script = make_executable(folder, "get-secret", "[ -p fifo ] && read line < fifo; echo $SECRET_HERE")
        source = {"kind": "command", "argv": [script], "cache_seconds": 0}
        secret = "sk-of-the-command-0123456789abcdef"
        broker = self.broker(stub, config={"secret_source": source}, env={"SECRET_HERE": secret}, folder=folder)
        broker.also_secret(secret)
        for number, way in enumerate(TheCallerLeaves.WAYS):
            with self.subTest(way), broker.connect() as caller:
                stub.forget()
                os.mkfifo(fifo)
                caller.send(broker.post_bytes(CHAT, {"number": number}))
                held = eventually(lambda: open_for_writing(fifo), what="the command's read")
                try:
                    getattr(caller, way)()
                    event = broker.wait_event(event="response", outcome="client_disconnected", count=number + 1, timeout=SOON)
                    self.assertEqual(event["status"], None)
                finally:
                    os.unlink(fifo)
                    os.write(held, b"\n")
                    os.close(held)
                # What the caller no longer waits for is not sent when the secret is there at last.
                self.assertEqual(broker.post_json(CHAT, {"another": number}).status, 200)
                self.assertEqual([request.json() for request in stub.requests], [{"another": number}])


def open_for_writing(fifo):
    """A descriptor, once somebody has it open for reading."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


class AStreamThatBeganWell(StreamingTestCase):
    """Its status says 200, and then it tells of an error: that is no success."""

    def outcome_of(self, pieces, content_type="text/event-stream"):
        def stream(conn, request):
            conn.start_stream(content_type)
            for piece in pieces:
                conn.chunk(piece)
            conn.end()

        self.upstream.script(stream)
        answer = self.served.request("GET", MODELS)
        self.assertEqual((answer.status, answer.body), (200, b"".join(pieces)))
        return self.served.wait_event(event="response", id=answer.header("X-Broker-Request-Id"))["outcome"]

    def test_and_tells_of_an_error_is_logged_as_one(self):
        text = b'data: {"choices": [{"delta": {"content": "hello"}}]}\n\n'
        error = b'{"error": {"message": "overloaded", "type": "server_error"}}'
        cases = {
            "OpenAI": [text, b"data: " + error + b"\n\n"],
            "without a blank": [text, b"data:" + error + b"\n\n"],
            "Anthropic": [text, b'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error"}}\n\n'],
            "its name alone": [text, b"event: error\ndata: oh no\n\n"],
            "OpenAI responses": [b'event: response.failed\ndata: {"type": "response.failed", "response": {"id": "r"}}\n\n'],
            "the name in the data alone": [b'data: {"type": "response.failed", "response": {}}\n\n'],
            "a text as the error": [text, b'data: {"error": "overloaded"}\n\n'],
            "cut anywhere": [text, *(bytes([byte]) for byte in b"data: " + error + b"\n\n")],
            "in a last line without an end": [text, b"data: " + error],
            "with CRLF": [text.replace(b"\n", b"\r\n"), b"data: " + error + b"\r\n\r\n"],
            "behind a byte-order mark": [b"\xef\xbb\xbfdata: " + error + b"\n\n"],
            "behind a comment": [b": keep-alive\n\n", b"data: " + error + b"\n\n"],
        }
        for case, pieces in cases.items():
            with self.subTest(case):
                self.assertEqual(self.outcome_of(pieces), "upstream_error")
        with self.subTest("lines of JSON"):
            self.assertEqual(self.outcome_of([b'{"message": {}}\n', error + b"\n"], "application/x-ndjson"), "upstream_error")

    def test_and_only_speaks_of_errors_is_a_success(self):
        cases = {
            "in its text": [b'data: {"choices": [{"delta": {"content": "{\\"error\\": 1}"}}]}\n\n'],
            "as null": [b'data: {"type": "response.completed", "error": null}\n\n'],
            "further down": [b'data: {"delta": {"error": "x"}, "choices": [{"error": "y", "type": "error"}]}\n\n'],
            "as another event": [b'event: errors\ndata: {"type": "errors"}\n\n'],
            "as arguments of a tool": [b'data: {"type": "input_json_delta", "partial_json": "\\"type\\": \\"error\\""}\n\n'],
        }
        for case, pieces in cases.items():
            with self.subTest(case):
                self.assertEqual(self.outcome_of(pieces), "ok")
        with self.subTest("in an answer that is no stream"):
            # Whoever answers 200 with it means it so.
            self.assertEqual(self.outcome_of([b'{"error": {"code": 1}}'], "application/json"), "ok")


class GeneratedAnswers(unittest.TestCase):
    """The reader of usage by itself: what it finds may not depend on how an answer is cut, nor on what a model says."""

    def answer(self, random):
        """(content type, body, usage) with texts in it that look like usage."""
        decoys = ['"usage": {"prompt_tokens": 99, "completion_tokens": 99}', '{"error": 1}', "\n\ndata: {", '\\"}', "é\u2028"]
        text = lambda: "".join(random.choices(decoys + ["word "], k=random.randint(0, 5)))  # noqa: E731
        counts = {"prompt_tokens": random.randint(0, 10**6), "completion_tokens": random.randint(0, 10**6)}
        usage = {"input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"]}
        below = {"deep": {"usage": {"prompt_tokens": 77}, "list": [{"usage": {"completion_tokens": 77}}, [text()]]}}
        pieces = [{"choices": [{"delta": {"content": text()}}], **below} for _ in range(random.randint(0, 4))]
        pieces.append({"choices": [], "text": text(), "usage": {"details": {"prompt_tokens": 66}, **counts}})
        if random.random() < 0.4:
            indent = random.choice((None, 1))
            return "application/json", json.dumps({**below, **pieces[-1]}, ensure_ascii=False, indent=indent).encode(), usage
        end = random.choice(("\n\n", "\r\n\r\n"))
        fields = ("data: ", "data:", f"id: 1{end[: len(end) // 2]}data: ")
        events = [random.choice(fields) + json.dumps(piece) + end for piece in pieces]
        events.append(random.choice(("", f"data: [DONE]{end}", f": done{end}")))
        mark = random.choice(("", "\ufeff"))
        return random.choice(("text/event-stream", "", "application/octet-stream")), (mark + "".join(events)).encode(), usage

    def test_tell_the_same_usage_however_they_are_cut(self):
        random = seeded("usage")
        for number in range(300):
            kind, body, usage = self.answer(random)
            for size in (len(body), 1, random.randint(2, 40)):
                with self.subTest(number, size=size, body=body):
                    reader = UsageReader(kind)
                    for at in range(0, len(body), size):
                        reader.feed(body[at : at + size])
                    reader.finish()
                    self.assertEqual((reader.usage, reader.failed), (usage, False))


class TheUpstreamBreaksOff(StreamingTestCase):
    config = {"upstream_timeout_seconds": 0.3}

    HEAD = b"HTTP/1.1 200 OK\r\n%s\r\n\r\n"
    CHUNKED = HEAD % b"Transfer-Encoding: chunked" + b"5\r\nfirst\r\n"
    COUNTED = HEAD % b"Content-Length: 10" + b"first"
    ENDLESS = HEAD % b"X-No-Length: at all" + b"first"

    CASES = {
        "closes between two chunks": (CHUNKED, b"", "close"),
        "closes inside a chunk": (CHUNKED, b"5\r\nse", "close"),
        "closes inside a chunk's size": (CHUNKED, b"5", "close"),
        "closes inside the last chunk": (CHUNKED, b"0\r\n", "close"),
        "closes inside the trailers": (CHUNKED, b"0\r\nX-Sum: 1\r\n", "close"),
        "closes a counted body early": (COUNTED, b"", "close"),
        "closes a counted body one byte early": (COUNTED, b"seco", "close"),
        "resets between two chunks": (CHUNKED, b"", "reset"),
        "resets a counted body": (COUNTED, b"", "reset"),
        "resets a body without a length": (ENDLESS, b"", "reset"),
        "sends junk in place of a chunk's size": (CHUNKED, b"zz\r\n", None),
        "sends more than a chunk's size": (CHUNKED, b"1\r\nxyz\r\n", None),
        "falls silent between two chunks": (CHUNKED, b"", None),
        "falls silent in a counted body": (COUNTED, b"s", None),
        "falls silent in a body without a length": (ENDLESS, b"", None),
    }

    def cut(self, version, data, more, end):
        """What the caller still gets after the first piece, and how it ends: "end" or "reset"."""
        caller, puppet = self.ask(version=version)
        puppet.send(data)
        request_id = caller.read_head().header("X-Broker-Request-Id")
        first = caller.read_chunk() if version == "HTTP/1.1" else caller.read_exactly(5)
        self.assertEqual(first, b"first")
        if more:
            puppet.send(more)
        if end:
            getattr(puppet, end)()
        rest, how = b"", "end"
        try:
            while True:
                piece = caller.recv()
                if not piece:
                    break
                rest += piece
        except ConnectionResetError:
            how = "reset"
        event = self.served.wait_event(event="response", id=request_id)
        self.assertEqual((event["outcome"], event["status"]), ("upstream_aborted", 200))
        eventually(lambda: puppet.conn.gone.is_set() or puppet.conn.closed, what="the end of the upstream's connection")
        puppet.done()
        return rest, how

    def test_and_the_answer_never_looks_complete(self):
        for case, (data, more, end) in self.CASES.items():
            with self.subTest(case):
                rest, _ = self.cut("HTTP/1.1", data, more, end)
                self.assertNotIn(b"0\r\n\r\n", rest)

    def test_and_a_caller_that_knows_no_chunks_sees_a_reset(self):
        # Its answers end with the connection: a plain end would be a whole answer.
        for case, (data, more, end) in self.CASES.items():
            with self.subTest(case):
                self.assertEqual(self.cut("HTTP/1.0", data, more, end)[1], "reset")

    def test_at_any_byte_and_it_is_never_taken_for_whole(self):
        whole = {
            "chunked": self.CHUNKED + b"6\r\nsecond\r\n0\r\n\r\n",
            "chunked, with trailers": self.CHUNKED + b"0\r\nX-Sum: 1\r\n\r\n",
            "counted": self.COUNTED + b"other",
        }
        for case, data in whole.items():
            for end in ("close", "reset"):
                for size in range(len(data)):
                    with self.subTest(case, end=end, size=size):

                        def stop_there(conn, request, part=data[:size], end=end):
                            if part:
                                conn.send(part)
                            getattr(conn, end)()

                        self.upstream.script(stop_there)
                        caller = self.served.connect()
                        caller.send(self.served.head("GET", MODELS))
                        try:
                            answer = caller.read_answer()
                            self.assertIn(answer.status, (502, 504), answer)
                        except (Gone, ConnectionResetError):
                            pass
                        caller.close()


class TlsBreaksOff(StreamingTestCase):
    tls = True

    def test_a_body_that_ends_with_the_connection_is_whole_only_with_close_notify(self):
        for notify in (True, False):
            with self.subTest(notify=notify):
                caller, puppet = self.ask()
                puppet.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nfirst")
                head = caller.read_head()
                self.assertEqual(caller.read_chunk(), b"first")
                # Somebody in between can forge the end of TCP, but not that of TLS.
                puppet.close(notify)
                if notify:
                    self.assertEqual(caller.read_chunk(), b"")
                    outcome = "ok"
                else:
                    with self.assertRaises((Gone, ConnectionResetError)):
                        caller.read_chunk()
                    outcome = "upstream_aborted"
                event = self.served.wait_event(event="response", id=head.header("X-Broker-Request-Id"))
                self.assertEqual(event["outcome"], outcome)

    def test_a_length_counts_with_close_notify_too(self):
        for framing in (b"Content-Length: 10", b"Transfer-Encoding: chunked"):
            with self.subTest(framing):
                caller, puppet = self.ask()
                puppet.send(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % framing)
                caller.read_head()
                puppet.close()
                with self.assertRaises((Gone, ConnectionResetError)):
                    caller.read_chunk()

    def test_the_caller_leaving_still_lets_the_upstream_go(self):
        for way in TheCallerLeaves.WAYS:
            with self.subTest(way):
                caller, puppet = self.ask()
                puppet.start_stream()
                caller.read_head()
                getattr(caller, way)()
                self.assertTrue(puppet.conn.wait_gone(SOON))

    def test_each_piece_arrives_at_once(self):
        # TLS has a buffer of its own: what is left in it must not wait for the next packet.
        caller, puppet = self.ask()
        puppet.start_stream()
        caller.read_head()
        random = seeded("tls pieces")
        for size in (1, 100, 16384, 16385, 50000, 65536, 65537, 200000):
            piece = bytes(random.choices(b"+!;:", k=size))  # nothing that a form of the secret begins with
            puppet.chunk(piece)
            got = b""
            while len(got) < size:
                got += caller.read_chunk()
            self.assertTrue(got == piece, size)
        puppet.end()
        self.assertEqual(caller.read_chunk(), b"")


class SlowReaders(BrokerTestCase):
    @linux_only
    def test_make_the_upstream_wait_and_not_the_broker_swell(self):
        total, piece = 40, b"0123456789abcdef" * (1 << 16)
        sent = []

        def much(conn, request):
            conn.start_stream()
            for _ in range(total):
                conn.chunk(piece)
                sent.append(None)
            conn.end()

        stub = self.stub(much, head_handler=None)
        broker = self.broker(stub)
        with broker.connect() as caller:
            caller.send(broker.head("GET", MODELS))
            head = caller.read_head()
            before = broker.rss_anon_kb()
            # Others are served meanwhile, and give the upstream every chance to go on sending.
            stub.script(lambda conn, request: conn.respond_json({}))
            for _ in range(300):
                self.assertEqual(broker.request("GET", MODELS).status, 200)
            self.assertLess(len(sent), total, "all of it went somewhere although nobody took it")
            self.assertLess(broker.rss_anon_kb(), before + (16 << 10))
            got = 0
            while True:
                chunk = caller.read_chunk()
                if not chunk:
                    break
                self.assertTrue(chunk == (piece * 2)[got % 16 :][: len(chunk)], got)
                got += len(chunk)
            self.assertEqual((head.status, got), (200, total << 20))
            self.assertLess(broker.rss_anon_kb(), before + (16 << 10))

    def test_that_take_nothing_for_the_time_out_are_cut(self):
        stub = self.stub()
        broker = self.broker(stub, config={"upstream_timeout_seconds": 0.5})

        def much(conn, request):
            conn.start_stream()
            while True:
                conn.chunk(b"x" * (1 << 20))

        stub.script(much)
        for version in ("HTTP/1.1", "HTTP/1.0"):
            with self.subTest(version), broker.connect() as caller:
                caller.send(broker.head("GET", MODELS, version=version))
                request_id = caller.read_head().header("X-Broker-Request-Id")
                stub.wait_closed()
                event = broker.wait_event(event="response", id=request_id)
                self.assertEqual((event["outcome"], event["status"]), ("upstream_aborted", 200))
                # What was on its way is lost or not; an end that looks like one never comes.
                with self.assertRaises(ConnectionResetError):
                    while caller.recv():
                        pass
