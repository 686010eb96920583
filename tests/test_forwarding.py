"""What goes to the upstream, over which connection, and whose answer comes back."""

import contextlib
import json
import os
import select
import socket
import struct
import tempfile
import threading

from tests.support import ABSENT, BrokerTestCase, posix_only, run_each, seeded, slow

CHAT = "/v1/chat/completions"
JSON = ("Content-Type", "application/json")
HELLO = b'{"model":"m"}'


def plain(name):
    """A header's name as the broker compares it."""
    return name.lower().replace("_", "-")


def seen(request):
    """All headers of a request as the upstream got them, in an order that can be compared."""
    return sorted((name.lower(), value) for name, value in request.headers)


def counted(body, status=b"200 OK"):
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


class ForwardingTestCase(BrokerTestCase):
    """One broker and one echoing upstream for all tests of a class."""

    config: dict = {}
    env: dict = {}
    tls = False

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.class_stub(tls=cls.tls)
        cls.served = cls.class_broker(cls.upstream, config=cls.config, env=cls.env)

    def setUp(self):
        self.upstream.forget()

    def ours(self, *more, broker=None, upstream=None, length=None):
        """The whole header set that the upstream has to see, `more` being the caller's part."""
        authority = (upstream or self.upstream).url.split("//")[1]
        headers = [("Host", authority), ("Accept-Encoding", "identity")]
        headers += [("Authorization", "Bearer " + (broker or self.served).secret), *more]
        if length is not None:
            headers.append(("Content-Length", str(length)))
        return sorted((name.lower(), value) for name, value in headers)

    def only_request(self):
        self.assertEqual(len(self.upstream.requests), 1, self.upstream.requests)
        return self.upstream.requests[0]

    def sent(self, method="POST", path=CHAT, headers=(), body=None):
        """What the upstream sees of one request whose headers are exactly these and the token."""
        self.upstream.forget()
        data = self.served.head(method, path, [("Connection", "close"), *headers], token=True) + (body or b"")
        answers = self.served.raw_answers(data)
        self.assertEqual([answer.status for answer in answers], [200], answers)
        return self.only_request()


class TheUpstreamSees(ForwardingTestCase):
    def test_exactly_these_headers_of_a_post(self):
        brought = [JSON, ("User-Agent", "OpenAI/Python 3.54.0"), ("X-Stainless-Lang", "python"), ("Accept", "*/*")]
        request = self.sent(headers=[*brought, ("Content-Length", len(HELLO))], body=HELLO)
        self.assertEqual(seen(request), self.ours(*brought, length=len(HELLO)))
        self.assertEqual((request.method, request.target, request.body), ("POST", CHAT, HELLO))

    def test_exactly_these_headers_of_a_get(self):
        request = self.sent("GET", "/v1/models", headers=[("User-Agent", "node")])
        self.assertEqual(seen(request), self.ours(("User-Agent", "node")))

    def test_a_length_with_an_empty_post(self):
        for framing in ([], [("Content-Length", "0")], [JSON, ("Content-Length", "0")]):
            with self.subTest(framing):
                request = self.sent(path="/v1/responses/r/cancel", headers=framing)
                brought = [header for header in framing if header == JSON]
                self.assertEqual(seen(request), self.ours(*brought, length=0))

    def test_a_length_in_place_of_chunks(self):
        body = b'4\r\n{"a"\r\n3\r\n:1}\r\n0\r\n\r\n'
        request = self.sent(headers=[JSON, ("Transfer-Encoding", "chunked")], body=body)
        self.assertEqual(seen(request), self.ours(JSON, length=7))
        self.assertEqual(request.body, b'{"a":1}')

    def test_the_method_as_it_came(self):
        for method, path in (("HEAD", "/v1/models"), ("DELETE", "/v1/responses/r")):
            with self.subTest(method):
                self.upstream.forget()
                self.assertEqual(self.served.request(method, path).status, 200)
                self.assertEqual(self.only_request().method, method)

    def test_the_query_as_it_came(self):
        for query in ("limit=20&after=abc", "alt=sse", "a=%2F%2f+b&&c", "q=a?b/c=d", "api-version=2024-10-21"):
            with self.subTest(query):
                self.assertEqual(self.sent("GET", "/v1/models?" + query).target, "/v1/models?" + query)

    def test_a_header_that_carries_no_authority_as_it_came(self):
        brought = [
            ("anthropic-version", "2023-06-01"),
            ("anthropic-beta", "a, b"),
            ("anthropic-beta", "c"),  # repeated headers stay two, in their order
            ("OpenAI-Beta", "assistants=v2"),
            ("x-codex-turn-metadata", json.dumps({"a": ['{"', ":,"], "b": "x" * 700})),
            ("session_id", "underscores are common in Codex"),
            ("Idempotency-Key", "k"),
            ("X-Request-Id", "r"),
            ("x-app", "cli"),
            ("Accept-Language", "*"),
            ("sec-fetch-mode", "cors"),
            ("Token-Count", "ends in neither -token nor api-key"),
            ("X-Empty", ""),
            ("X-Latin", "\xe9"),
        ]
        request = self.sent("GET", "/v1/models", headers=brought)
        self.assertEqual(seen(request), self.ours(*brought))
        betas = [value for name, value in request.headers if name.lower() == "anthropic-beta"]
        self.assertEqual(betas, ["a, b", "c"])


class TheCallerBringsNoAuthority(ForwardingTestCase):
    # By what they would do at the upstream, or at a proxy in front of it.
    DROPPED = {
        "a credential": [
            "Authorization", "X-Amz-Authorization", "X-Authorization", "X-Api-Key", "Api-Key", "ApiKey", "X-Goog-Api-Key",
            "X-ApiKey", "My-Own-Api-Key", "X-Functions-Key", "X-Access-Key", "X-Client-Secret", "Client-Secret",
            "X-Auth-Token", "Private-Token", "X-Amz-Security-Token", "Ocp-Apim-Subscription-Key", "Cookie", "Cookie2",
            "X-Broker-Token", "XI-Api-Key", "Token", "Secret", "Key", "Auth", "Code", "X-Token", "X-Auth-Key", "X-Secret-Key",
            "Private-Key", "Helicone-Auth", "Session-Token", "Subscription-Key", "Refresh-Token", "Id-Token", "Access-Secret",
            "X-Upstream-Auth", "Cookie-Jar",
        ],
        "another method or path": [
            "X-HTTP-Method", "X-HTTP-Method-Override", "X-Method-Override", "Method-Override", "X-Original-URL",
            "X-Original-Method", "X-Rewrite-URL",
        ],
        "where it comes from": [
            "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Prefix", "Forwarded", "Via", "X-Real-IP",
            "Proxy-Authorization", "Proxy-Connection", "Proxy", "Referer",
        ],
        "who pays": ["OpenAI-Organization", "OpenAI-Project", "X-Goog-User-Project"],
        "the form of the answer": ["Range", "If-Range", "A-IM", "Accept-Charset"],
        "this hop only": ["Keep-Alive", "TE", "Trailer", "Upgrade", "HTTP2-Settings", "Accept-Encoding", "Expect"],
    }  # fmt: skip

    # Those that may hold the caller token, and how.
    TOKEN_HEADERS = {"authorization": "Bearer {}", "x-api-key": "{}", "api-key": "{}", "x-goog-api-key": "{}"}

    def brought(self, name):
        """A value for this header that gets past the door."""
        return {"upgrade": "h2c", "te": "trailers", "expect": "100-continue"}.get(plain(name), "another")

    def test_by_any_header_that_means_some(self):
        for reason, names in self.DROPPED.items():
            for name in names:
                spellings = [name, name.upper(), name.lower()]
                if "-" in name:
                    spellings += [name.replace("-", "_"), name.upper().replace("-", "_", 1)]
                for spelling in spellings:
                    with self.subTest(reason, header=spelling):
                        if spelling.lower() == "x-broker-token":
                            continue  # it is in every request here
                        request = self.sent("GET", "/v1/models", headers=[(spelling, self.brought(name))])
                        self.assertEqual(seen(request), self.ours())

    def test_by_the_header_that_holds_its_token(self):
        for name, form in self.TOKEN_HEADERS.items():
            with self.subTest(name):
                self.upstream.forget()
                headers = [(name, form.format(self.served.token)), ("Accept-Encoding", "gzip")]
                self.assertEqual(self.served.request("GET", "/v1/models", headers=headers, token=False).status, 200)
                self.assertEqual(seen(self.only_request()), self.ours())

    def test_by_a_name_that_another_server_may_read_as_one_of_these(self):
        # PHP reads `.` and CGI nearly anything as `_`, and there that is `-`.
        names = ["Api.Key", "X~Api~Key", "Content.Length", "X!Y", "Authorization'", "X|Forwarded|For", "x.y", "anthropic.version"]
        for name in names:
            with self.subTest(name):
                self.assertEqual(seen(self.sent("GET", "/v1/models", headers=[(name, "1")])), self.ours())

    def test_but_an_idempotency_key_is_none(self):
        brought = [("Idempotency-Key", "1"), ("X-Idempotency-Key", "2"), ("x_idempotency_key", "3")]
        self.assertEqual(seen(self.sent("GET", "/v1/models", headers=brought)), self.ours(*brought))

    def test_by_a_framing_header_in_another_spelling(self):
        # Some servers can't tell the two spellings apart; what one of them reads is another message.
        more = [
            ("Content_Type", "text/plain"),
            ("CONTENT_ENCODING", "gzip"),
            ("Transfer_Encoding", "chunked"),
            ("Content_Length", "1"),
        ]
        for header in more:
            with self.subTest(header[0]):
                request = self.sent(headers=[JSON, header, ("Content-Length", len(HELLO))], body=HELLO)
                self.assertEqual(seen(request), self.ours(JSON, length=len(HELLO)))


class TheConnectionHeader(ForwardingTestCase):
    def test_removes_what_it_names(self):
        cases = {
            "one name": ["X-Mine"],
            "among others": ["keep-alive, x-mine ,TE"],
            "in other letters": ["X-MINE"],
            "in a second header": ["keep-alive", "X-Mine"],
        }
        for case, values in cases.items():
            with self.subTest(case):
                self.upstream.forget()
                headers = [("Connection", value) for value in values] + [("X-Mine", "1"), ("X-Other", "2")]
                self.assertEqual(self.served.request("GET", "/v1/models", headers=headers).status, 200)
                self.assertEqual(seen(self.only_request()), self.ours(("X-Other", "2")))

    def test_removes_a_header_whose_name_is_one_of_its_own_words(self):
        headers = [("Connection", "close"), ("Close", "1"), ("X-Other", "2")]
        self.assertEqual(self.served.request("GET", "/v1/models", headers=headers).status, 200)
        self.assertEqual(seen(self.only_request()), self.ours(("X-Other", "2")))

    def test_reads_an_underscore_as_a_hyphen(self):
        for named, header in (("X_Mine", "X_Mine"), ("X_Mine", "X-Mine"), ("X-Mine", "X_Mine")):
            with self.subTest(named, header=header):
                self.upstream.forget()
                headers = [("Connection", named), (header, "1"), ("X-Other", "2")]
                self.assertEqual(self.served.request("GET", "/v1/models", headers=headers).status, 200)
                self.assertEqual(seen(self.only_request()), self.ours(("X-Other", "2")))

    def test_cannot_remove_our_credential(self):
        names = ["Authorization", "Host", "Content-Length", "Accept-Encoding", "authorization, host, content-length"]
        for name in names:
            with self.subTest(name):
                request = self.sent(
                    headers=[JSON, ("Content-Length", len(HELLO)), ("Connection", name)], body=HELLO
                )
                self.assertEqual(seen(request), self.ours(JSON, length=len(HELLO)))

    def test_cannot_remove_the_content_type(self):
        # What was checked as JSON has to arrive as JSON.
        for name in ("Content-Type", "content-type, close", "CONTENT_TYPE"):
            with self.subTest(name):
                request = self.sent(headers=[JSON, ("Content-Length", 2), ("Connection", name)], body=b"{}")
                self.assertEqual(seen(request), self.ours(JSON, length=2))


class ExtraHeaders(ForwardingTestCase):
    config = {"extra_headers": {"anthropic-version": "2023-06-01", "X-Team": "blue", "OpenAI-Organization": "org-ours"}}
    FIXED = [("anthropic-version", "2023-06-01"), ("X-Team", "blue"), ("OpenAI-Organization", "org-ours")]

    def test_are_put_on_every_request(self):
        self.assertEqual(seen(self.sent("GET", "/v1/models")), self.ours(*self.FIXED))
        request = self.sent(headers=[JSON, ("Content-Length", 2)], body=b"{}")
        self.assertEqual(seen(request), self.ours(JSON, *self.FIXED, length=2))

    def test_stand_in_place_of_the_callers(self):
        for name in ("X-Team", "x-team", "X_Team", "Anthropic-Version", "anthropic_version", "openai-organization"):
            with self.subTest(name):
                request = self.sent("GET", "/v1/models", headers=[(name, "red"), (name, "green")])
                self.assertEqual(seen(request), self.ours(*self.FIXED))

    def test_cannot_be_removed_by_the_connection_header(self):
        request = self.sent("GET", "/v1/models", headers=[("Connection", "x-team, anthropic-version")])
        self.assertEqual(seen(request), self.ours(*self.FIXED))


class TheCredential(BrokerTestCase):
    def test_is_attached_as_the_configuration_says(self):
        stub = self.stub()
        cases = {
            "Anthropic": ("x-api-key", "", "x-api-key", "{}"),
            "Azure OpenAI": ("api-key", "", "api-key", "{}"),
            "another scheme": ("Authorization", "Token", "authorization", "Token {}"),
            "a header of its own": ("X-Upstream-Auth", "", "x-upstream-auth", "{}"),
            "a header that nothing else would drop": ("X-Mine", "", "x-mine", "{}"),
        }
        for case, (header, scheme, name, form) in cases.items():
            with self.subTest(case):
                stub.forget()
                broker = self.broker(stub, config={"auth_header": header, "auth_scheme": scheme})
                # The caller's own header of that name must not stand beside ours.
                mine = [(header.replace("-", "_"), "mine"), ("X-Upstream", "mine"), ("X-Broker-Token", broker.token)]
                if plain(header) not in TheCallerBringsNoAuthority.TOKEN_HEADERS:
                    mine.append((header.upper(), "mine"))
                answer = broker.request("GET", "/v1/models", headers=mine, token=False)
                self.assertEqual(answer.status, 200)
                expected = [("host", f"127.0.0.1:{stub.port}"), ("accept-encoding", "identity")]
                expected += [(name, form.format(broker.secret)), ("x-upstream", "mine")]
                self.assertEqual(seen(stub.requests[0]), sorted(expected))

    def test_is_absent_for_an_upstream_that_needs_none(self):
        stub = self.stub()
        broker = self.broker(stub, config={"secret_source": {"kind": "none"}})
        headers = [("Authorization", "Bearer mine"), ("x-api-key", "mine")]
        self.assertEqual(broker.request("GET", "/v1/models", headers=headers).status, 200)
        expected = [("accept-encoding", "identity"), ("host", f"127.0.0.1:{stub.port}")]
        self.assertEqual(seen(stub.requests[0]), expected)
        # Then a 401 is about the caller's own doing, and passed on; WWW-Authenticate never is.
        refuse = lambda conn, request: conn.respond(401, [("WWW-Authenticate", "Basic")], b"who?")  # noqa: E731
        stub.script(refuse)
        for _ in range(2):
            answer = broker.request("GET", "/v1/models")
            self.assertEqual((answer.status, answer.body, answer.code), (401, b"who?", None))
            self.assertIsNone(answer.header("WWW-Authenticate"))
        self.assertEqual(len(stub.requests), 3)
        self.assertEqual(broker.wait_event(event="response", status=401)["outcome"], "upstream_error")


class TheBody(ForwardingTestCase):
    BODIES = {
        "one object": b'{"model":"m"}',
        "blanks that a serializer would drop": b' \t\r\n{ "a" : [ 1 , 2.50e+01 ] }\r\n\r\n',
        "escapes that a serializer would change": b'{"a":"\\u00e9\\/\\ud83d\\ude00","b":1.0,"c":1e2}',
        "UTF-8": '{"a":"é\u2028😀"}'.encode(),
        "of some megabytes": b'{"a":"' + b"0123456789abcdef" * (3 << 16) + b'"}',
    }

    def test_arrives_byte_for_byte(self):
        for case, body in self.BODIES.items():
            with self.subTest(case):
                request = self.sent(headers=[JSON, ("Content-Length", len(body))], body=body)
                self.assertTrue(request.body == body)
                self.assertEqual(seen(request), self.ours(JSON, length=len(body)))

    def test_arrives_byte_for_byte_from_chunks(self):
        random = seeded("chunks")
        for case, body in self.BODIES.items():
            with self.subTest(case):
                chunks, at = b"", 0
                while at < len(body):
                    piece = body[at : at + random.choice((1, 7, 4096, 70000)) + len(body) // 50]
                    chunks += b"%x\r\n%s\r\n" % (len(piece), piece)
                    at += len(piece)
                request = self.sent(headers=[JSON, ("Transfer-Encoding", "chunked")], body=chunks + b"0\r\n\r\n")
                self.assertTrue(request.body == body)
                self.assertEqual(seen(request), self.ours(JSON, length=len(body)))

    def test_arrives_byte_for_byte_after_100_continue(self):
        body = self.BODIES["UTF-8"]
        with self.served.connect() as caller:
            headers = [JSON, ("Content-Length", len(body)), ("Expect", "100-continue")]
            caller.send(self.served.head("POST", CHAT, headers))
            self.assertEqual(caller.read_head().status, 100)
            caller.send(body)
            self.assertEqual(caller.read_answer().status, 200)
        self.assertEqual(self.only_request().body, body)
        self.assertEqual(seen(self.only_request()), self.ours(JSON, length=len(body)))

    def test_of_another_type_arrives_byte_for_byte(self):
        body = bytes(range(256)) * 300
        kind = ("Content-Type", "multipart/form-data; boundary=b")
        request = self.sent(path="/v1/audio/transcriptions", headers=[kind, ("Content-Length", len(body))], body=body)
        self.assertTrue(request.body == body)
        self.assertEqual(seen(request), self.ours(kind, length=len(body)))

    def test_goes_on_when_the_upstream_says_continue_in_the_middle_of_it(self):
        # Some servers say so without having been asked. More is sent than all buffers on the way hold.
        body = b'{"a":"' + b"x" * (16 << 20) + b'"}'
        interim, hints = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        cases = {
            "100": [interim],
            "103": [hints],
            "both": [interim + hints],
            "one in pieces": [hints[at : at + 1] for at in range(len(hints))],
            "one and a half": [interim + hints[:3], hints[3:]],
        }
        for case, pieces in cases.items():
            with self.subTest(case):

                def say(conn, request, pieces=pieces):
                    for piece in pieces:
                        conn.send(piece)
                        conn.gone.wait(0.005)  # so that they travel one by one

                self.upstream.forget()
                self.upstream.head_handler = say
                self.upstream.script(lambda conn, request: conn.respond_json({"got": len(request.body)}))
                with self.served.connect() as caller:
                    caller.send(self.served.post_bytes(CHAT, body))
                    answer = caller.read_answer()
                self.assertEqual((answer.status, answer.body), (200, b'{"got": %d}' % len(body)))

    def test_that_the_upstream_does_not_want_to_hear_out_is_answered_all_the_same(self):
        leave = threading.Event()

        def too_large(conn, request):
            conn.respond_json({"error": "too large"}, 413, reason="Too Large")
            conn.hold(leave)

        self.upstream.head_handler = too_large
        with self.served.connect() as caller:
            caller.send(self.served.post_bytes(CHAT, b'{"a":"' + b"x" * (16 << 20) + b'"}'))
            answer = caller.read_answer()
            self.assertEqual((answer.status, answer.json()), (413, {"error": "too large"}))
            # The connection with half a request on it is good for nothing any more.
            before = self.upstream.connections
            leave.set()
            self.upstream.head_handler = None
            self.assertEqual(self.served.post_json(CHAT, {}).status, 200)
            self.assertEqual(self.upstream.connections, before + 1)


class BasePath(BrokerTestCase):
    def test_is_put_before_the_path_of_every_request(self):
        stub = self.stub()
        for base in ("/proxy/openai", "/a-b_c.d~e"):
            broker = self.broker(stub, config={"upstream_base_url": stub.url + base})
            for method, target in (("POST", CHAT), ("GET", "/v1/models?limit=1")):
                with self.subTest(base, target=target):
                    stub.forget()
                    self.assertEqual(broker.request(method, target).status, 200)
                    self.assertEqual(stub.requests[0].target, base + target)


class KeptTestCase(ForwardingTestCase):
    def setUp(self):
        super().setUp()
        # A test begins with no connection kept from the one before.
        for conn in self.upstream.all_connections:
            conn.close()
        self.upstream.wait_closed()
        self.before = self.upstream.connections

    def made(self):
        """How many connections this test has caused so far."""
        return self.upstream.connections - self.before

    def keep(self, count=1):
        """Have the broker keep so many connections."""
        together = threading.Barrier(count)

        def answer(conn, request):
            together.wait(10)
            conn.respond_json({})

        self.upstream.script(answer)
        callers = [self.served.connect() for _ in range(count)]
        for caller in callers:
            caller.send(self.served.head("GET", "/v1/models"))
        for caller in callers:
            self.assertEqual(caller.read_answer().status, 200)
            caller.close()
        self.assertEqual(self.made(), count)
        self.upstream.forget()


class KeptConnections(KeptTestCase):
    def test_serve_many_requests(self):
        with self.served.connect() as caller:
            for number in range(10):
                caller.send(self.served.post_bytes(CHAT, {"number": number}))
                self.assertEqual(json.loads(caller.read_answer().json()["body"]), {"number": number})
        for _ in range(10):  # and many callers
            self.assertEqual(self.served.request("GET", "/v1/models").status, 200)
        self.assertEqual(self.made(), 1)
        self.assertEqual(len(self.upstream.requests), 20)

    def test_serve_on_after_every_kind_of_whole_answer(self):
        def chunked(conn, request):
            conn.start_stream()
            conn.chunk(b"data: 1\n\n")
            conn.end()

        answers = {
            "counted": lambda conn, request: conn.respond(body=b"body"),
            "empty": lambda conn, request: conn.respond(),
            "chunked": chunked,
            "chunked, with trailers": lambda conn, request: conn.send(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nA: b\r\nC: d\r\n\r\n"
            ),
            "an error": lambda conn, request: conn.respond(500, reason="Oops"),
            "interim answers before it": lambda conn, request: conn.send(
                b"HTTP/1.1 103 Early Hints\r\n\r\n" + counted(b"body")
            ),
        }
        for case, handler in answers.items():
            with self.subTest(case):
                self.upstream.script(handler)
                self.served.request("GET", "/v1/models")
                self.served.request("GET", "/v1/models")
                self.assertEqual(self.made(), 1)

    def test_are_not_made_of_an_answer_without_a_body_by_rule(self):
        # A careless upstream sends one all the same, a moment later: the next caller would get it as its answer.
        answers = {
            "204": ("GET", lambda conn, request: conn.respond(204, reason="No Content")),
            "304": ("GET", lambda conn, request: conn.respond(304, [("Content-Length", "7")], reason="Not Modified")),
            "HEAD": ("HEAD", lambda conn, request: conn.respond(200, [("Content-Length", "7")])),
        }
        for case, (method, handler) in answers.items():
            with self.subTest(case):
                self.setUp()
                self.upstream.script(handler)
                for _ in range(2):
                    self.assertLess(self.served.request(method, "/v1/models").status, 400)
                self.assertEqual(self.made(), 2)
                self.upstream.wait_closed()

    def test_are_not_made_of_a_request_whose_body_the_upstream_may_not_have_read(self):
        # It would be read as the next request, and that one's answer goes to the next caller.
        for method, path, made in (("GET", "/v1/models", 2), ("DELETE", "/v1/responses/r", 2), ("POST", CHAT, 1)):
            for framing in ([("Content-Length", len(HELLO))], [("Transfer-Encoding", "chunked")]):
                with self.subTest(method, framing=framing):
                    self.setUp()
                    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(HELLO), HELLO)
                    body = HELLO if framing[0][0] == "Content-Length" else chunked
                    for _ in range(2):
                        self.assertEqual(self.sent(method, path, [JSON, *framing], body).body, HELLO)
                    self.assertEqual(self.made(), made)

    def test_are_not_made_where_the_upstream_wants_none(self):
        answers = {
            "it says close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
            "it says close among other things": b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 2\r\n\r\n{}",
            "it says close in a second header": (
                b"HTTP/1.1 200 OK\r\nConnection: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
            ),
            "it speaks HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        }
        for case, data in answers.items():
            with self.subTest(case):
                self.setUp()
                self.upstream.script(lambda conn, request, data=data: conn.send(data))
                for _ in range(2):
                    answer = self.served.request("GET", "/v1/models")
                    self.assertEqual((answer.status, answer.body), (200, b"{}"))
                self.assertEqual(self.made(), 2)
                self.upstream.wait_closed()

    def test_that_the_upstream_closed_meanwhile_are_noticed_before_use(self):
        for close in ("close", "reset"):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("DELETE", "/v1/responses/r")):
                with self.subTest(close, method=method):
                    self.setUp()
                    self.keep(3)
                    for conn in self.upstream.all_connections:
                        getattr(conn, close)()
                    self.assertEqual(self.served.request(method, path).status, 200)
                    self.assertEqual(len(self.upstream.requests), 1)
                    self.assertEqual(self.made(), 4)

    @posix_only
    def test_that_the_upstream_closes_while_the_request_is_coming_are_noticed_before_use(self):
        with self.served.connect() as caller:
            for close in ("close", "reset"):
                with self.subTest(close):
                    self.setUp()
                    self.keep()
                    caller.send(self.served.head("GET", "/healthz"))  # so that it has been taken
                    caller.read_answer()
                    with self.served.paused():
                        for conn in self.upstream.all_connections:
                            getattr(conn, close)()
                        # Last: on a busy machine even loopback takes its time, and it may not overtake.
                        caller.send(self.served.post_bytes(CHAT, {}))
                    answer = caller.read_answer()
                    self.assertEqual(answer.status, 200, answer)
                    self.assertEqual((len(self.upstream.requests), self.made()), (1, 2))

    def test_that_close_at_the_moment_of_use_have_a_get_sent_again_once(self):
        for close in ("close", "reset"):
            for method in ("GET", "HEAD"):
                with self.subTest(close, method=method):
                    self.setUp()
                    self.keep()
                    self.upstream.script(lambda conn, request, close=close: getattr(conn, close)(), echo_json)
                    self.assertEqual(self.served.request(method, "/v1/models").status, 200)
                    self.assertEqual(len(self.upstream.requests), 2)
                    self.assertEqual(self.made(), 2)
                    one, two = self.upstream.requests
                    self.assertEqual(seen(one), seen(two))

    def test_that_close_at_the_moment_of_use_have_a_get_sent_again_on_a_new_one(self):
        # Were it another kept one, that may be on its way out as well.
        self.keep(3)
        kept = set(self.upstream.all_connections)
        self.upstream.script(lambda conn, request: conn.close() if conn in kept else conn.respond_json({}))
        self.assertEqual(self.served.request("GET", "/v1/models").status, 200)
        self.assertEqual(len(self.upstream.requests), 2)
        self.assertEqual(self.made(), 4)

    def test_that_close_twice_end_it(self):
        self.keep()
        self.upstream.script(lambda conn, request: conn.close())
        self.assert_refused(self.served.request("GET", "/v1/models"), 502, "upstream_unreachable")
        self.assertEqual(len(self.upstream.requests), 2)

    def test_that_close_at_the_moment_of_use_never_have_anything_else_sent_again(self):
        for close in ("close", "reset"):
            for method, path in (("POST", CHAT), ("DELETE", "/v1/responses/r"), ("POST", "/v1/responses/r/cancel")):
                with self.subTest(close, method=method):
                    self.setUp()
                    self.keep()
                    self.upstream.script(lambda conn, request, close=close: getattr(conn, close)())
                    self.assert_refused(self.served.request(method, path), 502, "upstream_unreachable")
                    self.assertEqual(len(self.upstream.requests), 1)
                    self.assertEqual(self.made(), 1)

    def test_that_close_in_the_middle_of_a_body_never_have_it_sent_again(self):
        self.keep()
        self.upstream.head_handler = lambda conn, request: conn.close()
        answer = self.served.post_json(CHAT, {"a": "x" * (4 << 20)})
        self.assert_refused(answer, 502, "upstream_unreachable")
        self.assertEqual((self.made(), self.upstream.requests), (1, []))

    def test_that_close_after_a_byte_of_answer_have_nothing_sent_again(self):
        self.keep()

        def begin(conn, request):
            conn.send(b"H")
            conn.close()

        self.upstream.script(begin)
        self.assert_refused(self.served.request("GET", "/v1/models"), 502, "upstream_protocol_error")
        self.assertEqual((self.made(), len(self.upstream.requests)), (1, 1))

    def test_that_were_new_are_not_tried_again(self):
        self.upstream.script(lambda conn, request: conn.close())
        self.assert_refused(self.served.request("GET", "/v1/models"), 502, "upstream_unreachable")
        self.assertEqual(len(self.upstream.requests), 1)

    def test_number_at_most_64(self):
        self.keep(80)
        self.upstream.wait_closed(64)
        self.assertEqual(self.upstream.open_connections, 64)
        # The ones that stayed are good.
        self.assertEqual(self.served.request("GET", "/v1/models").status, 200)
        self.assertEqual(self.made(), 80)

    @slow
    def test_are_closed_after_a_minute(self):
        self.keep(2)
        self.upstream.wait_closed(0, timeout=75)


def echo_json(conn, request):
    conn.respond_json({})


class NobodyGetsAnothersAnswer(KeptTestCase):
    EVIL = counted(b'{"evil": true}')

    def next_is_mine_and_on_a_new_connection(self):
        """What the next caller gets is the answer to what it asked."""
        self.upstream.script(lambda conn, request: conn.respond(body=request.body))
        before = self.upstream.connections
        answer = self.served.post_json(CHAT, {"I": "am the next"})
        self.assertEqual((answer.status, answer.json()), (200, {"I": "am the next"}))
        self.assertEqual(self.upstream.connections, before + 1)

    WITHOUT_END = {
        "a counted body": ("GET", counted(b"body"), b"body"),
        "an empty body": ("GET", counted(b""), b""),
        "the last chunk": ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", b"body"),
        "204": ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        "304": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 14\r\n\r\n", b""),
        "the head that HEAD asked for": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n", b""),
    }

    def test_from_bytes_that_stand_behind_an_answer(self):
        for case, (method, data, body) in self.WITHOUT_END.items():
            for extra in (self.EVIL, b"\r\n", b"x", b'{"evil": true}'):
                with self.subTest(case, extra=extra[:10]):
                    self.upstream.script(lambda conn, request, data=data + extra: conn.send(data))
                    answer = self.served.request(method, "/v1/models")
                    self.assertEqual(answer.body, body)
                    self.next_is_mine_and_on_a_new_connection()

    def test_from_bytes_that_come_on_an_idle_connection(self):
        for case, (method, data, body) in self.WITHOUT_END.items():
            for extra in (self.EVIL, b"x"):
                with self.subTest(case, extra=extra[:10]):
                    go, said = threading.Event(), threading.Event()

                    def answer(conn, request, data=data, extra=extra, go=go, said=said):
                        conn.send(data)
                        conn.hold(go)
                        conn.send(extra)
                        said.set()

                    self.upstream.script(answer)
                    self.assertEqual(self.served.request(method, "/v1/models").body, body)
                    go.set()
                    self.assertTrue(said.wait(10))
                    self.next_is_mine_and_on_a_new_connection()

    @posix_only
    def test_from_bytes_that_come_together_with_the_next_request(self):
        with self.served.connect() as caller:
            for extra in (self.EVIL, b"x"):
                with self.subTest(extra=extra[:10]):
                    self.setUp()
                    self.keep()
                    caller.send(self.served.head("GET", "/healthz"))
                    caller.read_answer()
                    self.upstream.script(lambda conn, request: conn.respond(body=request.body))
                    with self.served.paused():
                        caller.send(self.served.post_bytes(CHAT, {"mine": 1}))
                        (conn,) = [conn for conn in self.upstream.all_connections if not conn.closed]
                        conn.send(extra)
                    answer = caller.read_answer()
                    self.assertEqual((answer.status, answer.json()), (200, {"mine": 1}))
                    self.assertEqual(self.made(), 2)

    def test_from_an_answer_that_the_caller_did_not_wait_for(self):
        go = threading.Event()

        def late(conn, request):
            conn.hold(go)
            conn.send(self.EVIL)

        self.upstream.script(late)
        with self.served.connect() as caller:
            caller.send(self.served.head("GET", "/v1/models"))
            self.upstream.wait_for_requests()
        self.next_is_mine_and_on_a_new_connection()
        go.set()

    def test_from_the_rest_of_an_answer_that_its_caller_left(self):
        go = threading.Event()

        def long(conn, request):
            conn.start_stream()
            conn.chunk(b"begin")
            conn.hold(go)

        self.upstream.script(long)
        with self.served.connect() as caller:
            caller.send(self.served.head("GET", "/v1/models"))
            caller.read_head()
            self.assertEqual(caller.read_chunk(), b"begin")
        self.next_is_mine_and_on_a_new_connection()
        go.set()

    def test_from_one_interim_answer_too_many(self):
        # http.client takes 103 for the answer, and the next caller then reads this one's.
        def hints(conn, request):
            conn.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            conn.respond(body=request.body)

        self.upstream.script(hints)
        with self.served.connect() as caller:
            for number in range(5):
                caller.send(self.served.post_bytes(CHAT, {"number": number}))
                self.assertEqual(caller.read_answer().json(), {"number": number})

    def test_from_an_upstream_that_misbehaves_at_random(self):
        random = seeded("misbehaviour")
        lock = threading.Lock()

        def misbehave(conn, request):
            with lock:
                kind = random.randrange(8)
            body = request.body
            if kind == 0:
                conn.close()
            elif kind == 1:
                conn.send(counted(body) + self.EVIL)
            elif kind == 2:
                conn.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" + counted(body))
            elif kind == 3:
                conn.send(counted(body)[:-3])
                conn.close()
            elif kind == 4:
                conn.start_stream()
                for at in range(0, len(body), 7):
                    conn.chunk(body[at : at + 7])
                conn.end()
            elif kind == 5:
                conn.send(counted(body))
                conn.close()
            else:
                conn.send(counted(body))

        self.upstream.script(misbehave)
        whole = []

        def ask(caller_number):
            for number in range(40):
                mine = {"caller": caller_number, "number": number}
                with self.served.connect() as caller:
                    caller.send(self.served.post_bytes(CHAT, mine))
                    with contextlib.suppress(ConnectionError):
                        answer = caller.read_answer()
                        if answer.status == 200:
                            whole.append(answer.json() == mine)
                        else:
                            self.assertEqual(answer.status, 502)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertGreater(len(whole), 100)
        self.assertEqual(whole.count(False), 0)


class Https(ForwardingTestCase):
    tls = True

    @classmethod
    def setUpClass(cls):
        # A debugging aid of OpenSSL: with it anyone who reads that file reads the key off the wire.
        folder = tempfile.TemporaryDirectory(prefix="broker-test-")
        cls.addClassCleanup(folder.cleanup)
        cls.key_log = os.path.join(folder.name, "keys")
        cls.env = {"SSLKEYLOGFILE": cls.key_log}
        super().setUpClass()

    def test_upstream_sees_the_same_as_without(self):
        request = self.sent(headers=[JSON, ("Content-Length", len(HELLO))], body=HELLO)
        self.assertEqual(seen(request), self.ours(JSON, length=len(HELLO)))

    def test_upstream_gets_and_sends_large_bodies_whole(self):
        body = b'{"a":"' + b"%x" % seeded("tls").getrandbits(16 << 20) + b'"}'
        self.upstream.script(lambda conn, request: conn.respond(body=request.body))
        answer = self.served.request("POST", CHAT, body, [JSON])
        self.assertEqual(answer.status, 200)
        self.assertTrue(answer.body == body)

    def test_connections_are_kept_too(self):
        before = self.upstream.connections
        for _ in range(10):
            self.assertEqual(self.served.post_json(CHAT, {}).status, 200)
        self.assertLessEqual(self.upstream.connections, before + 1)

    def test_connections_that_were_closed_meanwhile_are_noticed(self):
        for notify in (True, False):
            with self.subTest("with close_notify" if notify else "without"):
                self.served.post_json(CHAT, {})
                for conn in self.upstream.all_connections:
                    conn.close(notify=notify)
                self.upstream.forget()
                self.assertEqual(self.served.post_json(CHAT, {}).status, 200)
                self.assertEqual(len(self.upstream.requests), 1)

    def test_nobody_gets_what_came_on_an_idle_connection(self):
        go, said = threading.Event(), threading.Event()

        def answer(conn, request):
            conn.respond_json({})
            conn.hold(go)
            conn.send(counted(b'{"evil": true}'))
            said.set()

        self.upstream.script(answer)
        self.assertEqual(self.served.request("GET", "/v1/models").json(), {})
        go.set()
        self.assertTrue(said.wait(10))
        self.upstream.script(lambda conn, request: conn.respond(body=request.body))
        self.assertEqual(self.served.post_json(CHAT, {"mine": 1}).json(), {"mine": 1})

    def test_keys_are_not_written_where_the_environment_says(self):
        self.assertEqual(self.served.request("GET", "/v1/models").status, 200)
        self.assertFalse(os.path.exists(self.key_log))


class BadCertificates(BrokerTestCase):
    def test_end_it_before_the_key_is_sent(self):
        cases = {
            "expired": ("expired", {}),
            "another host's": ("wrong_host", {}),
            "signed by itself": ("self_signed", {}),
            "of an authority that nobody here knows": (True, {"SSL_CERT_FILE": ABSENT}),
            "TLS 1.1": ("tls11", {}),
        }
        for case, (tls, env) in cases.items():
            with self.subTest(case):
                stub = self.stub(tls=tls)
                broker = self.broker(stub, env=env)
                for _ in range(2):
                    self.assert_refused(broker.post_json(CHAT, {}), 502, "upstream_tls_error")
                self.assertEqual((stub.requests, stub.incomplete), ([], []))
                stub.wait_closed()
                broker.wait_event(event="response", outcome="upstream_tls_error", status=502)


class BadTls(BrokerTestCase):
    """Something else than TLS on an https port."""

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.class_stub(raw_handler=lambda sock: cls.behaviour(sock))
        url = f"https://localhost:{cls.upstream.port}"
        cls.served = cls.class_broker(cls.upstream, config={"upstream_base_url": url})

    def test_is_said_and_the_key_not_sent(self):
        heard = []

        def close_at_once(sock):
            pass

        def close_in_the_handshake(sock):
            heard.append(sock.recv(4096))

        def reset_in_the_handshake(sock):
            heard.append(sock.recv(4096))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

        def alert(sock):
            heard.append(sock.recv(4096))
            sock.sendall(b"\x15\x03\x03\x00\x02\x02\x28")

        def http(sock):
            heard.append(sock.recv(4096))
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        def junk(sock):
            heard.append(sock.recv(4096))
            sock.sendall(b"\x00" * 100)

        for behaviour in (close_at_once, close_in_the_handshake, reset_in_the_handshake, alert, http, junk):
            with self.subTest(behaviour.__name__):
                type(self).behaviour = staticmethod(behaviour)
                self.assert_refused(self.served.post_json(CHAT, {}), 502, "upstream_tls_error")
        self.assertEqual(len(heard), 5)
        self.assertNotIn(self.served.secret.encode(), b"".join(heard))

    @slow
    def test_that_stays_silent_is_given_up_after_ten_seconds(self):
        type(self).behaviour = staticmethod(lambda sock: sock.recv(4096) and sock.recv(4096))
        self.assert_refused(self.served.post_json(CHAT, {}), 504, "upstream_timeout")


class TheProxy(BrokerTestCase):
    """HTTPS_PROXY, for an upstream whose name only the proxy has to know."""

    NAME = "elsewhere.example"

    def setUp(self):
        self.heads = []
        self.bytes_through = bytearray()

    def proxy(self, port=None, answer=b"HTTP/1.1 200 Connection established\r\n\r\n"):
        """A proxy that leads every CONNECT to this port of ours; without one it hangs up."""

        def handle(sock):
            head = b""
            while b"\r\n\r\n" not in head:
                data = sock.recv(4096)
                if not data:
                    return
                head += data
            self.heads.append(head)
            sock.sendall(answer() if callable(answer) else answer)
            if port is None:
                return
            with socket.create_connection(("127.0.0.1", port), 10) as far, contextlib.suppress(ValueError):
                while True:
                    for end in select.select([sock, far], [], [])[0]:
                        data = end.recv(65536)
                        if not data:
                            return
                        self.bytes_through += data
                        (far if end is sock else sock).sendall(data)

        return self.stub(raw_handler=handle)

    def served_through(self, proxy, stub=None, base=f"https://{NAME}", variable="HTTPS_PROXY", user="", **env):
        env[variable] = f"http://{user}127.0.0.1:{proxy.port}"
        return self.broker(stub or self.stub(), config={"upstream_base_url": base}, env=env)

    def test_is_asked_to_connect_and_sees_nothing_more(self):
        # The certificate of "another host" is this upstream's own: the check is made end to end.
        stub = self.stub(tls="wrong_host")
        for variable in ("HTTPS_PROXY", "https_proxy"):
            with self.subTest(variable):
                stub.forget()
                self.setUp()
                broker = self.served_through(self.proxy(stub.port), stub, variable=variable)
                for number in range(3):
                    self.assertEqual(broker.post_json(CHAT, {"number": number}).status, 200)
                self.assertEqual(stub.requests[0].header("Host"), self.NAME)
                self.assertEqual(stub.requests[0].header("Authorization"), "Bearer " + broker.secret)
                self.assertEqual(stub.requests[0].all("Proxy-Authorization"), [])
                # One tunnel for three requests, for it is kept like any connection.
                self.assertEqual(len(self.heads), 1)
                lines = self.heads[0].decode().split("\r\n")
                self.assertEqual(lines[0], f"CONNECT {self.NAME}:443 HTTP/1.1")
                self.assertIn(f"Host: {self.NAME}:443", lines)
                self.assertEqual(len(lines), 4, lines)
                for canary in (broker.secret, broker.token):
                    self.assertNotIn(canary.encode(), self.bytes_through)

    def test_gets_the_port_of_the_upstream(self):
        stub = self.stub(tls="wrong_host")
        broker = self.served_through(self.proxy(stub.port), stub, f"https://{self.NAME}:8443/base")
        self.assertEqual(broker.post_json(CHAT, {}).status, 200)
        self.assertTrue(self.heads[0].startswith(f"CONNECT {self.NAME}:8443 HTTP/1.1\r\n".encode()))
        self.assertEqual(stub.requests[0].header("Host"), f"{self.NAME}:8443")
        self.assertEqual(stub.requests[0].target, "/base" + CHAT)

    def test_gets_the_credentials_of_its_own_url_and_nobody_else_does(self):
        stub = self.stub(tls="wrong_host")
        broker = self.served_through(self.proxy(stub.port), stub, user="me:p%40ss@")
        self.assertEqual(broker.post_json(CHAT, {}).status, 200)
        self.assertIn(b"\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n", self.heads[0])
        self.assertEqual(stub.requests[0].all("Proxy-Authorization"), [])
        self.assertNotIn("p%40ss", broker.stderr_text())
        self.assertNotIn("bWU6", broker.stderr_text())

    def test_that_refuses_is_said(self):
        answers = {
            "403": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
            "407": b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n",
            "502": b"HTTP/1.1 502 Bad Gateway\r\n\r\nno such host",
            "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
            "nothing": b"",
        }
        waiting = iter(answers.values())
        broker = self.served_through(self.proxy(answer=lambda: next(waiting)))
        for number, case in enumerate(answers, 1):
            with self.subTest(case):
                self.assert_refused(broker.post_json(CHAT, {}), 502, "upstream_unreachable")
                broker.wait_event(event="response", outcome="upstream_unreachable", count=number)

    def test_that_cannot_be_reached_is_said(self):
        stub = self.stub()
        url = {"upstream_base_url": f"https://{self.NAME}"}
        broker = self.broker(stub, config=url, env={"HTTPS_PROXY": "http://127.0.0.1:9"})
        self.assert_refused(broker.post_json(CHAT, {}), 502, "upstream_unreachable")

    def test_that_is_spoken_to_by_tls_or_socks_is_refused_at_the_start(self):
        # What urllib would do is speak to it in plain text.
        cases = {
            url: {"config": {"upstream_base_url": f"https://{self.NAME}"}, "env": {"HTTPS_PROXY": url}}
            for url in ("https://127.0.0.1:9", "https://me:pass-of-mine@127.0.0.1", "socks5://127.0.0.1:9", "http://%ff:%fe@127.0.0.1")
        }
        for case, run in run_each(cases).items():
            with self.subTest(case):
                self.assertEqual(run().returncode, 2, run().stderr)
                self.assertIn("HTTPS_PROXY", run().stderr)
                self.assertEqual(run().stderr.count("\n"), 1)
                self.assertNotIn("pass-of-mine", run().stderr)

    def test_does_not_excuse_a_bad_certificate(self):
        stub = self.stub(tls=True)  # not for the name that was asked for
        broker = self.served_through(self.proxy(stub.port), stub)
        self.assert_refused(broker.post_json(CHAT, {}), 502, "upstream_tls_error")
        self.assertEqual(stub.requests, [])

    def test_is_passed_by_where_no_proxy_says_so(self):
        # A broadcast address: nobody can be reached there, and the system says so at once.
        proxy = self.proxy(answer=b"HTTP/1.1 403 Forbidden\r\n\r\n")
        cases = [
            ("NO_PROXY", "255.255.255.255", 0),
            ("no_proxy", "other.example,255.255.255.255", 0),
            ("NO_PROXY", "*", 0),
            ("NO_PROXY", "other.example", 1),
        ]
        for variable, value, asked in cases:
            with self.subTest(variable, value=value):
                self.heads.clear()
                broker = self.served_through(proxy, base="https://255.255.255.255", **{variable: value})
                answer = broker.post_json(CHAT, {})
                self.assertEqual(len(self.heads), asked)
                self.assert_refused(answer, 502, "upstream_unreachable")

    def test_never_comes_between_us_and_a_loopback_upstream(self):
        # urllib would send a plain http request for 127.0.0.1 there, the key in it readable.
        proxy = self.proxy(1)
        names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
        env = {name: f"http://127.0.0.1:{proxy.port}" for name in names}
        for tls, url in ((False, "http://127.0.0.1:{}"), (False, "http://localhost:{}"), (True, "https://localhost:{}"),
                         (True, "https://127.0.0.1:{}")):  # fmt: skip
            with self.subTest(url):
                stub = self.stub(tls=tls)
                broker = self.broker(stub, config={"upstream_base_url": url.format(stub.port)}, env=env)
                self.assertEqual(broker.post_json(CHAT, {}).status, 200)
                self.assertEqual(len(stub.requests), 1)
        self.assertEqual(proxy.connections, 0)


class TheUpstreamIsDown(BrokerTestCase):
    def test_is_said_and_it_works_again_when_it_is_back(self):
        stub = self.stub()
        broker = self.broker(stub)
        self.assertEqual(broker.post_json(CHAT, {}).status, 200)
        stub.stop()
        for method, path in (("POST", CHAT), ("GET", "/v1/models")):
            self.assert_refused(broker.request(method, path), 502, "upstream_unreachable")
        self.assertEqual(broker.wait_event(event="response", outcome="upstream_unreachable", count=2)["status"], 502)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", stub.port))
            listener.listen()
            with broker.connect() as caller:
                caller.send(broker.head("GET", "/v1/models"))
                upstream, _ = listener.accept()
                with upstream:
                    upstream.sendall(counted(b"{}"))
                    self.assertEqual(caller.read_answer().body, b"{}")
