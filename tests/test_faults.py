"""Whatever the upstream does wrong, the caller gets a clear answer, and the broker serves on with nothing left behind."""

import concurrent.futures
import os
import threading

from tests.support import BrokerTestCase, Gone, SharedBroker, canary, eventually, seeded

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"

PROTOCOL = (502, "upstream_protocol_error")
UNREACHABLE = (502, "upstream_unreachable")
TIMEOUT = (504, "upstream_timeout")
REDIRECT = (502, "upstream_redirect")
REJECTED = (502, "upstream_rejected_secret")
CUT = "cut"

OK = b"HTTP/1.1 200 OK\r\n"
BODY = b"Content-Length: 4\r\n\r\nbody"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


def says(data):
    """Sends this and leaves the connection open: the broker must not wait for its end to decide."""
    return lambda conn, request: conn.send(data)


def says_and(end, data=b""):
    def act(conn, request):
        if data:
            conn.send(data)
        getattr(conn, end)()

    return act


def falls_silent(data=b""):
    def act(conn, request):
        if data:
            conn.send(data)
        conn.wait_gone(30)

    return act


def drips(pieces, pause, first=b""):
    def act(conn, request):
        if first:
            conn.send(first)
        for piece in pieces:
            conn.send(piece)
            if conn.wait_gone(pause):
                return

    return act


class FaultsTestCase(BrokerTestCase):
    """The upstream does for `GET /v1/models/N` what the case with that number says."""

    config = {"upstream_timeout_seconds": 1}

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.class_stub(lambda conn, request: conn.respond_json({}))
        cls.served = cls.class_broker(cls.upstream, config=cls.config)

    def setUp(self):
        self.upstream.forget()
        self.upstream.script(lambda conn, request: conn.respond_json({}))
        self.assertEqual(self.served.request("GET", MODELS).status, 200)
        if os.path.isdir("/proc/self/fd"):
            self.before = self.of_the_broker()
            self.addCleanup(self.assert_nothing_is_left)

    def of_the_broker(self):
        """Its descriptors, without those of kept connections, and its threads."""
        return self.served.fd_count() - self.upstream.open_connections, self.served.thread_count()

    def assert_nothing_is_left(self):
        eventually(lambda: self.of_the_broker() <= self.before, what=f"{self.before} descriptors and threads")

    def outcome(self, request_id):
        return self.served.wait_event(event="response", id=request_id)

    def run_table(self, cases, check):
        """`check(path, expected)` for each {name: (act, expected)}, many at a time."""
        acts = [act for act, _ in cases.values()]
        self.upstream.script(lambda conn, request: acts[int(request.target.rpartition("/")[2])](conn, request))
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            runs = [
                pool.submit(check, f"{MODELS}/{number}", expected) for number, (_, expected) in enumerate(cases.values())
            ]
        for name, run in zip(cases, runs):
            with self.subTest(name):
                run.result()
        self.upstream.script(lambda conn, request: conn.respond_json({}))
        self.assertEqual(self.served.post_json(CHAT, {}).status, 200)

    def ask(self, path):
        with self.served.connect() as caller:
            caller.send(self.served.head("GET", path, [("Connection", "close")]))
            return caller.read_answer()

    def check_refused(self, path, expected):
        answer = self.ask(path)
        self.assert_refused(answer, *expected)
        event = self.outcome(answer.header("X-Broker-Request-Id"))
        self.assertEqual((event["status"], event["outcome"]), expected)

    def check_passed(self, path, expected):
        answer = self.ask(path)
        status, body = expected
        self.assertEqual((answer.status, answer.body, answer.code), (status, body, None))
        event = self.outcome(answer.header("X-Broker-Request-Id"))
        self.assertEqual((event["status"], event["outcome"]), (status, "ok" if status < 400 else "upstream_error"))


class AnUpstreamThatBreaksOff(FaultsTestCase):
    def test_before_or_in_the_head_is_answered_for(self):
        cases = {}
        for end in ("close", "reset"):
            cases[f"{end}, before a byte"] = (says_and(end), UNREACHABLE)
            for part in (b"H", b"HTTP/1.1 200", OK, OK + b"X: y\r\n", OK + b"X: y\r\n\r"):
                cases[f"{end}, after {part!r}"] = (says_and(end, part), PROTOCOL)
            cases[f"{end}, after an interim answer"] = (says_and(end, HINTS), PROTOCOL)
            cases[f"{end}, after two of them"] = (says_and(end, HINTS + HINTS), PROTOCOL)
            cases[f"{end}, in the second head"] = (says_and(end, HINTS + b"HTTP/1.1 2"), PROTOCOL)
        self.run_table(cases, self.check_refused)


class AHeadThatIsNotStrict(FaultsTestCase):
    def test_is_refused_without_waiting_for_more(self):
        lines = {
            "of another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
            "of a mail server": b"220 mail.example ESMTP\r\n\r\n",
            "of no version": b"200 OK\r\n" + BODY,
            "of HTTP/2": b"HTTP/2.0 200 OK\r\n" + BODY,
            "of HTTP/0.9": b"<html>hello</html>\r\n\r\n",
            "in small letters": b"http/1.1 200 OK\r\n" + BODY,
            "of Shoutcast": b"ICY 200 OK\r\n" + BODY,
            "with two blanks": b"HTTP/1.1  200 OK\r\n" + BODY,
            "with a tab": b"HTTP/1.1\t200 OK\r\n" + BODY,
            "with a status of two digits": b"HTTP/1.1 20 OK\r\n" + BODY,
            "with a status of four digits": b"HTTP/1.1 2000 OK\r\n" + BODY,
            "with a status of letters": b"HTTP/1.1 abc OK\r\n" + BODY,
            "with a negative status": b"HTTP/1.1 -20 OK\r\n" + BODY,
            "with status 000": b"HTTP/1.1 000 OK\r\n" + BODY,
            "with status 099": b"HTTP/1.1 099 OK\r\n" + BODY,
            "with a NUL in the reason": b"HTTP/1.1 200 O\0K\r\n" + BODY,
            "behind an empty line": b"\r\n" + OK + BODY,
            "behind a blank": b" " + OK + BODY,
        }
        cases = {"a status line " + name: data for name, data in lines.items()}
        cases.update({
            "bare LF alone": OK.replace(b"\r", b"") + b"Content-Length: 0\n\n",
            "a bare LF ends one line": OK + b"X: y\n" + BODY,
            "a bare LF inside a value": OK + b"X: y\nZ: z\r\n" + BODY,
            "a bare CR inside a value": OK + b"X: y\rSet-Cookie: evil=1\r\n" + BODY,
            "a fold": OK + b"X: y\r\n z\r\n" + BODY,
            "a fold by a tab": OK + b"X: y\r\n\tz\r\n" + BODY,
            "a fold in the first line": OK + b" X: y\r\n" + BODY,
            "a blank before the colon": OK + b"X : y\r\n" + BODY,
            "a line without a colon": OK + b"nonsense\r\n" + BODY,
            "an empty name": OK + b": y\r\n" + BODY,
            "a name with a blank": OK + b"X Y: z\r\n" + BODY,
            "a name that is not ASCII": OK + "Ü: y\r\n".encode() + BODY,
        })  # fmt: skip
        for control in b"\0\x01\x07\x08\x0b\x0c\x1b\x1f\x7f":
            cases[f"control character {control} in a value"] = OK + b"X: a%cb\r\n" % control + BODY
            cases[f"control character {control} in a name"] = OK + b"X%c: b\r\n" % control + BODY
        lengths = {
            "two lengths": b"Content-Length: 4\r\nContent-Length: 5",
            "two equal lengths": b"Content-Length: 4\r\nContent-Length: 4",
            "two lengths in one": b"Content-Length: 4, 4",
            "a length with a sign": b"Content-Length: +4",
            "a negative length": b"Content-Length: -4",
            "a length in hex": b"Content-Length: 0x4",
            "a length of words": b"Content-Length: four",
            "an empty length": b"Content-Length:",
            "a length with a blank": b"Content-Length: 4 4",
            "a length with a fraction": b"Content-Length: 4.0",
            "a length with an underscore": b"Content-Length: 1_0",
            "a length in other digits": "Content-Length: ٤".encode(),
            "a length beyond all numbers": b"Content-Length: " + b"9" * 40,
            "a length beside chunks": b"Content-Length: 4\r\nTransfer-Encoding: chunked",
            "chunks beside a length": b"Transfer-Encoding: chunked\r\nContent-Length: 4",
            "another coding": b"Transfer-Encoding: gzip",
            "another coding before chunks": b"Transfer-Encoding: gzip, chunked",
            "chunks twice": b"Transfer-Encoding: chunked, chunked",
            "chunks twice in two headers": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "identity as a coding": b"Transfer-Encoding: identity",
            "chunks with a parameter": b"Transfer-Encoding: chunked;q=1",
            "chunks with a comma": b"Transfer-Encoding: chunked,",
            "chunks misspelt": b"Transfer-Encoding: xchunked",
            "an empty coding": b"Transfer-Encoding:",
        }
        cases.update({name: OK + framing + b"\r\n\r\n4\r\nbody\r\n0\r\n\r\n" for name, framing in lengths.items()})
        cases["chunks with HTTP/1.0"] = b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
        large = 257 << 10
        cases.update({
            "one endless line": OK + b"X: " + b"y" * large,
            "an endless status line": b"HTTP/1.1 200 " + b"y" * large,
            "endless lines": OK + b"X: y\r\n" * (large // 6),
            "256 KiB with its end": OK + b"X: " + b"y" * large + b"\r\n" + BODY,
            "256 KiB in several heads": (HINTS[:-2] + b"X: " + b"y" * (large // 4) + b"\r\n\r\n") * 4 + OK + BODY,
            "no head, but silence after an LF": b"HTTP/1.1 200 OK\n",
        })  # fmt: skip
        self.run_table({name: (says(data), PROTOCOL) for name, data in cases.items()}, self.check_refused)

    def test_is_told_from_one_that_is_only_unusual(self):
        cases = {
            "no reason": b"HTTP/1.1 200 \r\n" + BODY,
            "not even the blank before it": b"HTTP/1.1 200\r\n" + BODY,
            "a reason in Latin-1": b"HTTP/1.1 200 d\xe9j\xe0 vu\r\n" + BODY,
            "HTTP/1.0": b"HTTP/1.0 200 OK\r\n" + BODY,
            "a tab in a value": OK + b"X: a\tb\r\n" + BODY,
            "Latin-1 in a value": OK + b"X: \xe9\r\n" + BODY,
            "blanks around a value": OK + b"X: \t y \t\r\nContent-Length: \t4 \r\n\r\nbody",
            "no blank before a value": OK + b"X:y\r\nContent-Length:4\r\n\r\nbody",
            "an empty value": OK + b"X:\r\n" + BODY,
            "a length with zeros before it": OK + b"Content-Length: 0004\r\n\r\nbody",
            "200 KiB": OK + b"X: %s\r\n" % (b"y" * 1000) * 200 + BODY,
            "the name of chunks in capitals": OK + b"TRANSFER-ENCODING: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
            "identity": OK + b"Content-Encoding: identity\r\n" + BODY,
            "none": OK + b"Content-Encoding: none\r\n" + BODY,
            "utf-8": OK + b"Content-Encoding: UTF-8\r\n" + BODY,
            "no coding at all": OK + b"Content-Encoding:\r\n" + BODY,
            "identity twice": OK + b"Content-Encoding: identity, identity\r\n" + BODY,
            "none of them in two headers": OK + b"Content-Encoding: none\r\nContent-Encoding: identity\r\n" + BODY,
            "an extension of a chunk": OK + b'Transfer-Encoding: chunked\r\n\r\n4;a=b;c="d e"\r\nbody\r\n0;e\r\n\r\n',
            "zeros before a chunk's size": OK + b"Transfer-Encoding: chunked\r\n\r\n0004\r\nbody\r\n000\r\n\r\n",
            "trailers": OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nA: b\r\nC: d\r\n\r\n",
        }  # fmt: skip
        self.run_table({name: (says(data), (200, b"body")) for name, data in cases.items()}, self.check_passed)


class InterimAnswers(FaultsTestCase):
    def test_are_dropped_up_to_eight(self):
        whole = OK + BODY
        cases = {
            "one": says(HINTS + whole),
            "eight": says(HINTS * 8 + whole),
            "a 100 that nobody asked for": says(b"HTTP/1.1 100 Continue\r\n\r\n" + whole),
            "a 102": says(b"HTTP/1.1 102 Processing\r\n\r\n" + whole),
            "one of each": says(b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 102 \r\n\r\n" + HINTS + b"HTTP/1.1 199 \r\n\r\n" + whole),
            "cut into bytes": drips([bytes([byte]) for byte in HINTS + whole], 0),
        }
        self.run_table({name: (act, (200, b"body")) for name, act in cases.items()}, self.check_passed)

    def test_are_refused_beyond_and_so_is_a_switch_of_protocols(self):
        whole = OK + BODY
        cases = {
            "nine": says(HINTS * 9 + whole),
            "without end": drips([HINTS] * 1000, 0),
            "101": says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"),
            "101 after a 100": says(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n"),
            "one that is not strict": says(b"HTTP/1.1 103 Early Hints\r\nLink : x\r\n\r\n" + whole),
            "one with another answer's end": says(b"HTTP/1.1 103 Early Hints\n\n" + whole),
        }
        self.run_table({name: (act, PROTOCOL) for name, act in cases.items()}, self.check_refused)


    def test_without_end_are_refused_while_the_upstream_is_sent_the_body_too(self):
        # Were they only collected until the body is through, an upstream that reads nothing could fill our memory.
        endless = {"of them": b"HTTP/1.1 100 Continue\r\n\r\n" * 4000, "of one": b"y" * (64 << 10)}
        for case, piece in endless.items():
            with self.subTest(case):

                def chatter(conn, request, piece=piece):
                    conn.send(b"HTTP/1.1 100 Continue\r\nX: ")
                    for _ in range(1000):
                        conn.send(piece)

                self.upstream.head_handler = chatter
                try:
                    with self.served.connect() as caller:
                        caller.send(self.served.post_bytes(CHAT, b'{"a":"' + b"x" * (16 << 20) + b'"}'))
                        self.assert_refused(caller.read_answer(), *PROTOCOL)
                finally:
                    self.upstream.head_handler = None


class ABody(FaultsTestCase):
    def test_that_is_compressed_is_refused(self):
        # Nobody could look for the secret in it.
        codings = ("gzip", "GZIP", "br", "deflate", "zstd", "x-gzip", "identity, gzip", "gzip, identity", "none, gzip", "x")
        cases = {}
        for coding in codings:
            cases[coding] = (says(OK + b"Content-Encoding: %s\r\n" % coding.encode() + BODY), PROTOCOL)
        for first, second in ((b"identity", b"gzip"), (b"gzip", b"identity")):
            data = OK + b"Content-Encoding: %s\r\nContent-Encoding: %s\r\n" % (first, second) + BODY
            cases[f"{first!r} and {second!r} in two headers"] = (says(data), PROTOCOL)
        for status in (b"400 Bad Request", b"500 Oops"):
            cases[f"gzip with {status!r}"] = (says(b"HTTP/1.1 %s\r\nContent-Encoding: gzip\r\n" % status + BODY), PROTOCOL)
        self.run_table(cases, self.check_refused)

    JUNK = {
        "no hex": b"zz\r\n",
        "a negative size": b"-5\r\nsecon\r\n",
        "a size with a sign": b"+5\r\nsecon\r\n",
        "a size with its prefix": b"0x5\r\nsecon\r\n",
        "a size with an underscore": b"0_5\r\nsecon\r\n",
        "no size": b"\r\nsecon\r\n",
        "a blank before the size": b" 5\r\nsecon\r\n",
        "a size beyond all numbers": b"F" * 17 + b"\r\nsecon\r\n",
        "a size beyond 64 bits": b"1" + b"0" * 16 + b"\r\nsecon\r\n",
        "an extension with a control character": b"5;a=\x01\r\nsecon\r\n",
        "a size without a semicolon behind it": b"5 x\r\nsecon\r\n",
        "a bare LF": b"5\nsecon\n" + b"0\n\n" + b"\r\n",
        "a chunk that is longer than its size": b"3\r\nsecond\r\n",
        "a chunk that ends with LF": b"5\r\nsecon\n0\r\n\r\n",
        "a size line without end": b"5;" + b"a" * 5000,
        "a size line of blanks without end": b"5" + b" " * 5000,
        "a size line that is too long": b"5;" + b"a" * 5000 + b"\r\nsecon\r\n",
        "trailers without end": b"0\r\n" + b"X: y\r\n" * 12000,
        "one trailer without end": b"0\r\nX: " + b"y" * (66 << 10),
    }

    def test_of_broken_chunks_is_cut_without_waiting_for_more(self):
        headed = {name: threading.Event() for name in self.JUNK}

        def act(name):
            def begin(conn, request):
                conn.send(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
                conn.hold(headed[name])
                conn.send(self.JUNK[name])

            return begin

        def check_cut(path, name):
            with self.served.connect() as caller:
                caller.send(self.served.head("GET", path))
                head = caller.read_head()
                self.assertEqual((head.status, caller.read_chunk()), (200, b"first"))
                headed[name].set()
                with self.assertRaises((Gone, ConnectionResetError)):
                    while True:
                        self.assertNotEqual(caller.read_chunk(), b"", "it looks complete")
            event = self.outcome(head.header("X-Broker-Request-Id"))
            self.assertEqual((event["status"], event["outcome"]), (200, "upstream_aborted"))
            # Silence would have been cut as well, but only after the time-out.
            self.assertLess(event["duration_ms"], 900)

        self.run_table({name: (act(name), name) for name in self.JUNK}, check_cut)

    def test_of_junk_right_behind_the_head_never_looks_complete(self):
        def check_not_whole(path, _):
            try:
                answer = self.ask(path)
            except (Gone, ConnectionResetError):
                return
            self.assert_refused(answer, *PROTOCOL)

        head = OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n"
        self.run_table({name: (says(head + junk), None) for name, junk in self.JUNK.items()}, check_not_whole)


class Silence(FaultsTestCase):
    def test_is_answered_with_a_time_out(self):
        cases = {
            "at all": falls_silent(),
            "in the status line": falls_silent(b"HTTP/1.1 20"),
            "in the head": falls_silent(OK + b"X: y\r\n"),
            "after an interim answer": falls_silent(HINTS),
            # Neither a single byte now and then nor an interim answer is one: this comes in two seconds.
            "but for a byte now and then": drips([b"y"] * 20 + [b"\r\n" + BODY], 0.1, OK + b"X: "),
            "but for a header now and then": drips([b"X: y\r\n"] * 10 + [BODY], 0.2, OK),
            "but for an interim answer now and then": drips([HINTS] * 7 + [OK + BODY], 0.3),
        }
        self.run_table({name: (act, TIMEOUT) for name, act in cases.items()}, self.check_refused)

    def test_in_the_body_does_not_count_from_the_beginning(self):
        # Six tenths of a second at a time: never a whole one, but more than that together.
        slow = drips([b"body"] * 3, 0.6, OK + b"Content-Length: 12\r\n\r\n")
        self.run_table({"a piece now and then": (slow, (200, b"body" * 3))}, self.check_passed)

    def test_while_the_upstream_is_sent_the_body_is_answered_with_a_time_out(self):
        leave = threading.Event()
        self.upstream.head_handler = lambda conn, request: leave.wait(30)
        try:
            with self.served.connect() as caller:
                caller.send(self.served.post_bytes(CHAT, b'{"a":"' + b"x" * (16 << 20) + b'"}'))
                answer = caller.read_answer()
            self.assert_refused(answer, *TIMEOUT)
            self.assertEqual(self.outcome(answer.header("X-Broker-Request-Id"))["outcome"], "upstream_timeout")
        finally:
            leave.set()
            self.upstream.head_handler = None
        eventually(lambda: self.upstream.incomplete, what="the end of that body")


class Refusals(FaultsTestCase):
    def test_of_the_upstream_pass_as_they_are(self):
        errors = (400, 402, 403, 404, 405, 408, 409, 413, 415, 418, 422, 426, 429, 451, 499, 500, 501, 502, 503, 504, 529, 599)
        body = b'{"error": {"message": "of the provider", "type": "its_own"}}'

        def act(status):
            def answer(conn, request):
                headers = [("Content-Type", "application/json"), ("Retry-After", "7"), ("x-should-retry", "true")]
                conn.respond(status, [*headers, ("X-Own", str(status))], body, reason="Its Own Words")

            return answer

        def check(path, status):
            answer = self.ask(path)
            self.assertEqual((answer.status, answer.reason, answer.body), (status, "Its Own Words", body))
            self.assertEqual(answer.header("X-Own"), str(status))
            self.assertEqual((answer.all("Retry-After"), answer.all("x-should-retry")), (["7"], ["true"]))
            self.assertEqual(answer.header("Content-Type"), "application/json")
            self.assertIsNone(answer.code)
            event = self.outcome(answer.header("X-Broker-Request-Id"))
            self.assertEqual((event["status"], event["outcome"]), (status, "upstream_error"))

        self.run_table({str(status): (act(status), status) for status in errors}, check)
        # None of them was tried twice.
        self.assertEqual(len(self.upstream.requests), len(errors) + 2)

    def test_by_a_redirect_are_neither_followed_nor_passed_on(self):
        elsewhere = self.stub()
        places = [f"{elsewhere.url}/evil", f"{self.upstream.url}{MODELS}", "/relative", "//evil.example/", "https://evil.example/"]
        cases = {}
        for status in (300, 301, 302, 303, 305, 307, 308, 399):
            for place in places if status == 302 else places[:1]:
                data = f"HTTP/1.1 {status} Found\r\nLocation: {place}\r\nContent-Length: 4\r\n\r\nbody".encode()
                cases[f"{status} to {place}"] = (says(data), REDIRECT)
        self.run_table(cases, self.check_refused)
        self.assertEqual(elsewhere.connections, 0)
        self.assertEqual(len(self.upstream.requests), len(cases) + 2)
        # Without a place to go to it is an answer like any other.
        passed = {str(status): (says(b"HTTP/1.1 %d X\r\n" % status + BODY), (status, b"body")) for status in (300, 302, 308)}
        passed["201 with a place"] = (says(b"HTTP/1.1 201 Created\r\nLocation: /x\r\n" + BODY), (201, b"body"))
        self.run_table(passed, self.check_passed)

    def test_never_name_where_the_redirect_led(self):
        # It may hold a session's token, or talk an agent into going there.
        self.upstream.script(says(b"HTTP/1.1 302 Found\r\nLocation: https://evil.example/?t=1\r\n" + BODY))
        answer = self.served.request("GET", MODELS)
        self.assert_refused(answer, *REDIRECT)
        self.assertNotIn("evil", answer.message)
        self.assertIsNone(answer.header("Location"))


class ARejectedSecret(SharedBroker):
    """A provider's 401 is the operator's matter, and its reason stands in its own words."""

    def reject(self, message, headers=()):
        """What the caller gets when the provider rejects the key with these words."""
        body = message if isinstance(message, (bytes, dict)) else {"error": {"message": message, "type": "invalid_request_error"}}
        headers = [*headers, ("WWW-Authenticate", "Bearer"), ("x-request-id", "req_of_the_provider")]

        def answer(conn, request):
            if isinstance(body, bytes):
                conn.respond(401, headers, body)
            else:
                conn.respond_json(body, 401, headers)

        self.upstream.script(answer)
        answer = self.served.request("GET", MODELS)
        self.assert_refused(answer, *REJECTED)
        self.assertIsNone(answer.header("WWW-Authenticate"))
        return answer

    def test_is_told_with_the_reason_and_the_providers_id(self):
        answer = self.reject("Missing scopes: model.read")
        self.assertIn("Missing scopes: model.read", answer.message)
        for words in ("401", "caller token is fine", "whoever runs the broker"):
            self.assertIn(words, answer.message)
        event = self.served.wait_event(event="response", id=answer.header("X-Broker-Request-Id"))
        self.assertEqual((event["status"], event["outcome"]), REJECTED)
        self.assertEqual((event["upstream_request_id"], event["attempt"]), ("req_of_the_provider", 1))
        self.served.wait_stderr("Missing scopes: model.read")

    def test_is_no_reason_to_hold_anything_else_back(self):
        # A key may lack the scope for one path; and one agent must not lock out all.
        self.reject("Missing scopes: model.read")
        self.upstream.script(lambda conn, request: conn.respond_json({}))
        for _ in range(3):
            self.assertEqual(self.served.post_json(CHAT, {}).status, 200)
        self.upstream.forget()
        for _ in range(3):
            self.reject("Missing scopes: model.read")
        self.assertEqual(len(self.upstream.requests), 3)

    def test_is_told_in_words_that_hold_nothing_of_a_key(self):
        secret = self.served.secret
        cases = {
            "stars and an end": f"Incorrect API key provided: sk-canary-********{secret[-4:]}.",
            "stars and nothing else of it": "Incorrect API key provided: k3y-***yz.",
            "a beginning and an end": f"Bad key {secret[:9]}...{secret[-6:]} here",
            "four characters of it": f"The key that ends in {secret[-4:]} is bad",
            "all of it": f"The key {secret} is bad",
            "another key": "Use sk-proj-0123456789abcdefghijABCDEFGHIJ instead",
        }
        for case, text in cases.items():
            with self.subTest(case):
                message = self.reject(text).message
                self.assertIn("[masked]", message)
                for piece in (secret[:9], secret[-4:], "***", "0123456789abcdef"):
                    self.assertNotIn(piece, message)
        message = self.reject("Your IP 203.0.113.7 is not on the list of org-acme, see https://example.com/help").message
        self.assertIn("IP 203.0.113.7 is not on the list", message)

    def test_is_told_wherever_the_provider_puts_its_words_and_never_at_length(self):
        cases = {
            "OpenAI": ({"error": {"message": "no such scope"}}, True),
            "as a text": ({"error": "no such scope"}, True),
            "at the top": ({"message": "no such scope"}, True),
            "no JSON": (b"<html>no such scope</html>", False),
            "a list": (b'["no such scope"]', False),
            "deep": (b"[" * 60000, False),
            "a number": ({"error": {"message": 1}}, False),
            "nothing": (b"", False),
        }
        for case, (body, told) in cases.items():
            with self.subTest(case):
                self.assertEqual("no such scope" in self.reject(body).message, told)
        message = self.reject("word " * 1000).message
        self.assertLessEqual(message.count("word"), 40)
        self.assertGreater(message.count("word"), 30)
        message = self.reject("two\nlines\x1b[31m").message
        self.assertIn("two lines", message)
        self.assertNotIn("\x1b", message)

    def test_is_waited_for_two_seconds_at_most(self):
        def hold(conn, request):
            conn.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 1000\r\n\r\n{")
            conn.wait_gone(30)

        self.upstream.script(hold)
        with self.served.connect() as caller:
            caller.send(self.served.post_bytes(CHAT, {}))
            answer = caller.read_answer()
        self.assert_refused(answer, *REJECTED)
        event = self.served.wait_event(event="response", id=answer.header("X-Broker-Request-Id"))
        self.assertLess(event["duration_ms"], 8000)


class EveryFaultAtOnce(FaultsTestCase):
    """What single faults can't show: that one conversation's fault touches no other."""

    def test_leaves_the_others_in_peace(self):
        random = seeded("faults")
        faults = [
            says_and("close"), says_and("reset"), says_and("close", OK), says_and("reset", OK + BODY[:-2]), says(HINTS * 20),
            says(b"\0" * 1000), says(OK + b"Content-Length: -1\r\n\r\n"),
            says(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), says(OK + BODY + OK + BODY),
        ]  # fmt: skip
        plan = iter([random.choice(faults) for _ in range(250)])  # a GET may be asked twice
        lock = threading.Lock()

        def misbehave(conn, request):
            if request.target != MODELS:
                conn.respond(body=request.body)
                return
            with lock:
                fault = next(plan)
            fault(conn, request)

        self.upstream.script(misbehave)
        good = []

        def provoke(count, waits):
            for _ in range(count):
                try:
                    with self.served.connect() as caller:
                        caller.send(self.served.head("GET", MODELS))
                        if waits:
                            caller.read_answer()
                except (Gone, ConnectionResetError):
                    pass

        def behave(name):
            for number in range(40):
                body = {"name": name, "number": number, "filler": canary()}
                answer = self.served.post_json(CHAT, body)
                good.append(answer.status == 200 and answer.json() == body)

        threads = [threading.Thread(target=provoke, args=(30, waits)) for waits in (True, True, True, False)]
        threads += [threading.Thread(target=behave, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(good, [True] * 120)
