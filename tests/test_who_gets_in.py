"""Who may call, what they may call, and what a refusal looks like."""

import base64
import functools
import gzip
import itertools
import json
import re
import threading
import time
import unittest

from broker import segment_matches, segments_meet
from tests.support import (
    ABSENT,
    ALLOWED_PATHS,
    Broker,
    BrokerTestCase,
    StubUpstream,
    canary,
    eventually,
    fresh_token,
    seeded,
    stop_stub,
)

CHAT = "/v1/chat/completions"
JSON = ("Content-Type", "application/json")


@functools.cache
def started_for_all():
    """(upstream, broker) of the classes that change nothing and read neither log nor stderr."""
    upstream = StubUpstream()
    unittest.addModuleCleanup(stop_stub, upstream)
    served = Broker(upstream)
    unittest.addModuleCleanup(served.close)
    return upstream, served


class DoorTestCase(BrokerTestCase):
    """One broker and one echoing upstream for all tests of a class, or of several."""

    config = {}
    dry_run = False
    alone = False  # it looks at the log, where refusals are counted and no longer written after a while

    @classmethod
    def setUpClass(cls):
        if not (cls.config or cls.dry_run or cls.alone):
            cls.upstream, cls.served = started_for_all()
            return
        cls.upstream = cls.class_stub()
        cls.served = cls.class_broker(cls.upstream, config=cls.config, dry_run=cls.dry_run)

    def setUp(self):
        self.upstream.forget()

    def ask(self, method="GET", path="/v1/models", headers=(), token=True, host=True, body=b""):
        """One request as raw bytes, its answer read by length: nothing is normalised on the way."""
        headers = list(headers)
        if body:
            headers.append(("Content-Length", len(body)))
        with self.served.connect() as caller:
            caller.send(self.served.head(method, path, headers, token, host) + body)
            return caller.read_answer(method)

    def assert_lets_in(self, **request):
        before = len(self.upstream.requests)
        answer = self.ask(**request)
        self.assertEqual(answer.status, 200, answer)
        self.assertEqual(len(self.upstream.requests), before + 1)

    def assert_keeps_out(self, status, code, **request):
        before = len(self.upstream.requests)
        answer = self.ask(**request)
        self.assert_refused(answer, status, code)
        self.assertEqual(len(self.upstream.requests), before, "it was forwarded")
        return answer


class Host(DoorTestCase):
    def test_of_this_machine_is_let_in_with_any_port_and_case(self):
        for host in ("127.0.0.1", "localhost", "LOCALHOST", "LocalHost:1", "127.0.0.1:99999", "localhost:8791"):
            with self.subTest(host):
                self.assert_lets_in(headers=[("Host", host)], host=False)

    def test_of_another_name_is_refused_because_it_may_be_a_rebound_one(self):
        hosts = ["evil.example", "evil.example:8791", "127.0.0.1.evil.example", "localhost.evil.example", "xlocalhost"]
        hosts += [
            "localhost.",
            "127.0.0.2",
            "127.1",
            "0.0.0.0",
            "2130706433",
            "0x7f000001",
            "[::1]",
            "[::1]:8791",
            "::1",
        ]
        hosts += ["localhost:", "localhost:123456", "localhost:80a", "localhost:-1", "localhost:+1", "localhost: 80"]
        hosts += ["localhost:80:80", "user@localhost", "localhost/", "localhost, evil.example", "local host", ""]
        for host in hosts:
            with self.subTest(host):
                self.assert_keeps_out(403, "host_not_allowed", headers=[("Host", host)], host=False)
        self.assert_lets_in()

    def test_missing_or_sent_twice_is_malformed(self):
        self.assert_keeps_out(400, "bad_request", host=False)
        self.assert_keeps_out(400, "bad_request", headers=[("Host", "localhost")])
        self.assert_keeps_out(400, "bad_request", headers=[("Host", "evil.example")])
        self.assert_keeps_out(400, "bad_request", headers=[("host", "localhost"), ("HOST", "localhost")], host=False)

    def test_is_looked_at_before_anything_else(self):
        evil = [("Host", "evil.example")]
        cases = {
            "no token": {"token": False},
            "a health check": {"path": "/healthz", "token": False},
            "a web page": {"headers": evil + [("Origin", "http://evil.example")]},
            "an unknown path": {"path": "/v1/unknown"},
        }
        for case, request in cases.items():
            with self.subTest(case):
                self.assert_keeps_out(403, "host_not_allowed", **{"headers": evil, **request}, host=False)


class WhatARefusalSays(DoorTestCase):
    """Agents often show nothing but the message: it names this very case, and its mend."""

    def test_names_the_case_and_the_mend(self):
        cases = {
            "another host": (403, {"headers": [("Host", "pi.local:8791")], "host": False}, ("pi.local", "allowed_hosts")),
            "a desktop app with a web view": (403, {"headers": [("Origin", "app://obsidian.md")]}, ("web view", "main process")),
            "a browser": (403, {"headers": [("Sec-Fetch-Site", "none")]}, ("browser", "curl")),
            "a key in the query": (403, {"path": "/v1/models?key=x"}, ("x-goog-api-key",)),
            "a base URL that ends in a slash": (400, {"path": "//v1/models"}, ("slash at the end", "base URL")),
            "CONNECT": (400, {"method": "CONNECT", "path": "api.openai.com:443"}, ("base URL", "no forward proxy")),
            "an absolute target": (400, {"path": "http://api.openai.com/v1/models"}, ("base URL", "no forward proxy")),
            "a semicolon": (400, {"path": "/v1/models;x=y"}, ("%XX",)),
            "an encoded slash": (400, {"path": "/v1%2Fmodels"}, ("%2F",)),
            "Codex' compression": (415, {
                "method": "POST", "path": CHAT, "headers": [JSON, ("Content-Encoding", "zstd")], "body": b"x",
            }, ("enable_request_compression",)),
        }  # fmt: skip
        for case, (status, request, words) in cases.items():
            with self.subTest(case):
                answer = self.ask(**request)
                self.assertEqual(answer.status, status, answer)
                for word in words:
                    self.assertIn(word, answer.message)


class FurtherHosts(DoorTestCase):
    config = {"allowed_hosts": ["127.0.0.1", "host.docker.internal"]}

    def test_are_those_of_the_configuration_and_no_others(self):
        for host in ("host.docker.internal", "host.docker.internal:8791", "Host.Docker.Internal", "127.0.0.1"):
            with self.subTest(host):
                self.assert_lets_in(headers=[("Host", host)], host=False)
        self.assert_keeps_out(403, "host_not_allowed", headers=[("Host", "localhost")], host=False)


class WebPageAtTheDoor(DoorTestCase):
    def test_is_refused_by_what_its_browser_says(self):
        cases = {
            "a foreign origin": [("Origin", "https://evil.example")],
            "an opaque origin": [("Origin", "null")],
            "our own origin": [("Origin", self.served.url)],
            "an empty origin": [("Origin", "")],
            "cross-site": [("Sec-Fetch-Site", "cross-site")],
            "same-site": [("Sec-Fetch-Site", "same-site")],
            "same-origin": [("Sec-Fetch-Site", "same-origin")],
            "typed into the address bar": [("Sec-Fetch-Site", "none")],
            "in another case": [("sec-fetch-site", "cross-site")],
        }
        for case, headers in cases.items():
            with self.subTest(case):
                self.assert_keeps_out(403, "browser_not_allowed", headers=headers)
        self.assert_lets_in()

    def test_is_refused_before_the_token_and_the_path_count(self):
        origin = [("Origin", "https://evil.example")]
        self.assert_keeps_out(403, "browser_not_allowed", headers=origin, token=False)
        self.assert_keeps_out(403, "browser_not_allowed", headers=origin, path="/v1/unknown")
        self.assert_keeps_out(403, "browser_not_allowed", headers=origin, path="/healthz")
        self.assert_keeps_out(403, "browser_not_allowed", headers=origin, path="/", token=False)

    def test_gets_no_permission_from_a_preflight(self):
        for origin in ([], [("Origin", "https://evil.example")]):
            headers = origin + [
                ("Access-Control-Request-Method", "POST"),
                ("Access-Control-Request-Headers", "x-api-key"),
            ]
            for path in (CHAT, "/healthz", "/v1/unknown"):
                with self.subTest(path=path, origin=origin):
                    request = {"method": "OPTIONS", "path": path, "headers": headers, "token": False}
                    answer = self.assert_keeps_out(403, "browser_not_allowed", **request)
                    self.assertEqual(answer.all("Allow"), [])

    def test_is_not_what_node_and_claude_code_look_like(self):
        headers = [("sec-fetch-mode", "cors"), ("accept-language", "*"), ("Sec-Fetch-Dest", "empty")]
        self.assert_lets_in(headers=headers + [("anthropic-dangerous-direct-browser-access", "true")])

    def test_never_reads_an_access_control_header(self):
        def generous(conn, request):
            headers = [("Access-Control-Allow-Origin", "*"), ("access-control-expose-headers", "x"), ("X-Kept", "y")]
            conn.respond_json({}, headers=headers)

        self.upstream.script(generous)
        answers = [
            self.ask(),
            self.ask(headers=[("Origin", "null")]),
            self.ask(path="/healthz"),
            self.ask(method="OPTIONS", headers=[("Access-Control-Request-Method", "GET")]),
            self.ask(token=False),
        ]
        self.assertEqual(answers[0].header("X-Kept"), "y")
        for answer in answers:
            names = [name.lower() for name, _ in answer.headers]
            self.assertEqual([name for name in names if name.startswith("access-control")], [])


class EveryAnswer(DoorTestCase):
    def test_tells_a_browser_to_do_nothing_with_it(self):
        wanted = {
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "default-src 'none'; sandbox",
        }
        answers = {
            "forwarded": self.ask(),
            "refused": self.ask(token=False),
            "malformed": self.ask(headers=[("Content-Length", "x")]),
            "health": self.ask(path="/healthz"),
        }
        for case, answer in answers.items():
            for name, value in wanted.items():
                with self.subTest(case=case, name=name):
                    self.assertEqual(answer.all(name), [value])

    def test_has_a_request_id_of_its_own(self):
        answers = [self.ask(), self.ask(token=False), self.ask(path="/healthz"), self.ask(path="/v1/unknown")]
        ids = [answer.header("X-Broker-Request-Id") for answer in answers]
        self.assertNotIn(None, ids)
        self.assertEqual(len(set(ids)), 4)

    def test_says_nothing_of_the_server_software(self):
        for answer in (self.ask(), self.ask(token=False), self.ask(path="/healthz")):
            self.assertEqual(answer.all("Server") + answer.all("Via"), [])


class HealthCheck(DoorTestCase):
    alone = True

    def test_needs_no_token_and_says_one_thing(self):
        for path in ("/healthz", "/"):
            with self.subTest(path):
                answer = self.ask(path=path, token=False)
                self.assertEqual((answer.status, answer.json()), (200, {"ok": True}))
                self.assertEqual(answer.header("Content-Type"), "application/json")
                head = self.ask("HEAD", path, token=False)
                self.assertEqual((head.status, head.body), (200, b""))
        self.assertEqual(self.upstream.requests, [])

    def test_says_the_same_to_those_who_have_the_token(self):
        bare = [self.ask(path="/healthz", token=token) for token in (True, False)]
        self.assertEqual(*[without_id(answer) for answer in bare])

    def test_leaves_no_line_in_the_log(self):
        before = self.served.wait_event(event="start") and len(self.served.events())
        for method, path in (("GET", "/healthz"), ("HEAD", "/"), ("GET", "/")):
            self.ask(method, path, token=False)
        # The log is in order, so this line comes after any that those might have left.
        self.ask(path="/v1/unknown/marker")
        self.served.wait_event(event="denied", path="/v1/unknown/marker")
        paths = [event.get("path") for event in self.served.events()[before:]]
        self.assertEqual(paths, ["/v1/unknown/marker"])

    def test_is_a_get_or_head_and_nothing_else(self):
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            with self.subTest(method):
                request = {"method": method, "path": "/healthz", "headers": [("Content-Length", "0")]}
                self.assert_keeps_out(401, "client_token_required", **request, token=False)


def without_id(answer):
    """All of an answer that may not differ from one request to the next. Whether the connection
    goes on is settled by the request's own framing, which tells nobody anything."""
    own = ("x-broker-request-id", "date", "connection")
    return answer.status, answer.reason, [pair for pair in answer.headers if pair[0].lower() not in own], answer.body


class CallerToken(DoorTestCase):
    def test_is_taken_from_each_header_that_a_client_may_use(self):
        token = self.served.token
        cases = {
            "our own header": ("X-Broker-Token", token),
            "our own header in lower case": ("x-broker-token", token),
            "Authorization": ("Authorization", "Bearer " + token),
            "authorization, scheme in lower case": ("authorization", "bearer " + token),
            "x-api-key": ("x-api-key", token),
            "api-key": ("Api-Key", token),
            "x-goog-api-key": ("x-goog-api-key", token),
            "xi-api-key, as ElevenLabs' clients send it": ("xi-api-key", token),
            "Authorization, as Deepgram's clients send it": ("Authorization", "Token " + token),
            "authorization, that scheme in lower case": ("authorization", "token " + token),
        }
        for case, header in cases.items():
            with self.subTest(case):
                self.assert_lets_in(headers=[header], token=False)
                sent = self.upstream.requests[-1]
                self.assertEqual(sent.all("Authorization"), ["Bearer " + self.served.secret])
                self.assertNotIn(token.encode(), sent.head)

    def test_wrong_or_missing_is_401(self):
        token = self.served.token
        cases = {
            "none": None,
            "an empty one": "",
            "another": fresh_token(),
            "its beginning": token[:-1],
            "one character more": token + "x",
            "in the other case": token.swapcase(),
            "in quotes": '"' + token + '"',
            "twice with a comma": token + ", " + token,
            "not ASCII": "é" * 20,
            "of 20,000 characters": token * 400,
            "with a scheme": "Bearer " + token,
        }
        for case, value in cases.items():
            with self.subTest(case):
                headers = [] if value is None else [("X-Broker-Token", value)]
                self.assert_keeps_out(401, "client_token_required", headers=headers, token=False)
        self.assert_lets_in()

    def test_counts_in_any_of_its_headers_whatever_the_others_say(self):
        # A session key of the provider may stand in the header that an SDK fills by itself.
        right, wrong = self.served.token, fresh_token()
        own, key, azure, google, labs = "X-Broker-Token", "x-api-key", "api-key", "x-goog-api-key", "xi-api-key"
        bearer = {right: ("Authorization", "Bearer " + right), wrong: ("Authorization", "Bearer " + wrong)}
        basic = ("Authorization", "Basic " + base64.b64encode(right.encode()).decode())
        let_in = {
            "ours right, Authorization wrong": [bearer[wrong], (own, right)],
            "ours wrong, Authorization right": [bearer[right], (own, wrong)],
            "ours empty, Authorization right": [bearer[right], (own, "")],
            "Authorization right, x-api-key wrong": [(key, wrong), bearer[right]],
            "Authorization wrong, x-api-key right": [(key, right), bearer[wrong]],
            "a session key as Authorization, x-api-key right": [(key, right), ("Authorization", "Bearer sess-0123456789abcdef")],
            "x-api-key wrong, api-key right": [(azure, right), (key, wrong)],
            "api-key wrong, x-goog-api-key right": [(google, right), (azure, wrong)],
            "x-goog-api-key wrong, xi-api-key right": [(labs, right), (google, wrong)],
            "another scheme, ours right": [basic, (own, right)],
            "another scheme, x-api-key right": [(key, right), basic],
            "no scheme, x-api-key right": [(key, right), ("Authorization", right)],
            "an empty Authorization, x-api-key right": [(key, right), ("Authorization", "")],
            "the same header twice, first right": [(own, right), (own.upper(), wrong)],
            "the same header twice, second right": [(key, wrong), (key.upper(), right)],
            "the same header twice, both right": [bearer[right], bearer[right]],
            "all of them right": [(name, right) for name in (own, key, azure, google, labs)] + [bearer[right]],
        }
        for case, headers in let_in.items():
            with self.subTest(case):
                self.assert_lets_in(headers=headers, token=False)
                sent = self.upstream.requests[-1]
                self.assertEqual(sent.all("Authorization"), ["Bearer " + self.served.secret])
                self.assertEqual([name for name in (own, key, azure, google, labs) if sent.all(name)], [])
        keep_out = {
            "all of them wrong": [(name, wrong) for name in (own, key, azure, google, labs)] + [bearer[wrong]],
            "another scheme": [basic],
            "no scheme": [("Authorization", right)],
            "a scheme that only begins alike": [("Authorization", "Bearerx " + right)],
            "a scheme in a header that has none": [(key, "Bearer " + right)],
            "a header that none of the clients uses": [("X-Auth-Token", right), ("X-Token", right), ("Token", right)],
            "half in one, half in the other": [(key, right[:20]), (key, right[20:])],
            "in a cookie": [("Cookie", "token=" + right)],
        }
        for case, headers in keep_out.items():
            with self.subTest(case):
                self.assert_keeps_out(401, "client_token_required", headers=headers, token=False)

    def test_missing_says_what_may_be_the_matter(self):
        message = self.assert_keeps_out(401, "client_token_required", token=False).message
        for words in ("missing, or not this broker's", "dry-run", "`--`", "X-Broker-Token"):
            self.assertIn(words, message)

    def test_missing_gets_the_same_answer_whatever_was_asked(self):
        large = ("Content-Length", "99999999999")
        requests = {
            "an allowed path": {},
            "an unknown path": {"path": "/v1/unknown"},
            "another method": {"method": "DELETE", "path": CHAT},
            "an unheard-of method": {"method": "BREW"},
            "a key in the query": {"path": "/v1/models?key=x"},
            "a body that is too large": {"method": "POST", "path": CHAT, "headers": [large, JSON]},
            "another content type": {
                "method": "POST",
                "path": CHAT,
                "headers": [("Content-Type", "text/plain")],
                "body": b"x",
            },
            "an encoded body": {
                "method": "POST",
                "path": CHAT,
                "headers": [("Content-Encoding", "gzip")],
                "body": b"x",
            },
            "no JSON": {"method": "POST", "path": CHAT, "headers": [JSON], "body": b"["},
            "an upgrade": {"path": "/v1/responses", "headers": [("Upgrade", "websocket"), ("Connection", "Upgrade")]},
            "a wrong token": {"headers": [("x-api-key", fresh_token())]},
            "the secret itself": {"headers": [("Authorization", "Bearer " + self.served.secret)]},
        }
        first = without_id(self.ask(token=False))
        for case, request in requests.items():
            with self.subTest(case):
                answer = self.assert_keeps_out(401, "client_token_required", **request, token=False)
                self.assertEqual(without_id(answer), first)


class NoCallerToken(DoorTestCase):
    config = {"client_token_env": None}

    def test_means_that_anybody_on_this_machine_may_call(self):
        self.assert_lets_in(token=False)
        self.assert_lets_in(headers=[("Authorization", "Bearer whatever")], token=False)
        self.assertEqual(self.upstream.requests[-1].header("Authorization"), "Bearer " + self.served.secret)

    def test_still_keeps_web_pages_and_other_hosts_out(self):
        self.assert_keeps_out(403, "browser_not_allowed", headers=[("Origin", "null")], token=False)
        self.assert_keeps_out(403, "host_not_allowed", headers=[("Host", "evil.example")], host=False, token=False)


class Allowlist(DoorTestCase):
    alone = True

    def test_lets_in_what_a_rule_names(self):
        cases = [
            ("GET", "/v1/models"),
            ("HEAD", "/v1/models"),
            ("GET", "/v1/models/gpt-4"),
            ("GET", "/v1/models/ft:gpt-4o:org::id"),
            ("DELETE", "/v1/responses/resp_1"),
            ("POST", "/v1/responses/resp_1/cancel"),
            ("POST", "/v1beta/models/gemini-2.5-pro:generateContent"),
            ("POST", "/openai/deployments/my-gpt/chat/completions"),
            ("POST", CHAT),
        ]
        for method, path in cases:
            with self.subTest(method + " " + path):
                headers = [("Content-Length", "0")] if method == "POST" else []
                self.assert_lets_in(method=method, path=path, headers=headers)
                self.assertEqual((self.upstream.requests[-1].method, self.upstream.requests[-1].target), (method, path))

    def test_keeps_out_what_only_looks_like_it(self):
        cases = {
            "an unknown path": "/v1/unknown",
            "a prefix": "/v1",
            "more behind": "/v1/chat/completions/x",
            "a longer name": "/v1/chat/completionsx",
            "something in front": "/x/v1/chat/completions",
            "another case": "/V1/Chat/Completions",
            "a point where a rule has none": "/v1/chat.completions",
            "two segments for one asterisk": "/v1/models/a/b",
            "a colon in a segment whose pattern has one": "/v1beta/models/a:b:generateContent",
            "nothing for the asterisk": "/v1beta/models/:generateContent",
            "something behind the verb": "/v1beta/models/gemini:generateContents",
            "another verb": "/v1beta/models/gemini:deleteModel",
            "a verb as a segment": "/v1beta/models/gemini/generateContent",
            "two segments in the middle": "/openai/deployments/a/b/chat/completions",
        }
        for case, path in cases.items():
            with self.subTest(case):
                self.assert_keeps_out(
                    403, "path_not_allowed", method="POST", path=path, headers=[("Content-Length", "0")]
                )

    def test_says_which_method_would_be_allowed(self):
        cases = [
            ("GET", CHAT, {"POST"}),
            ("PUT", CHAT, {"POST"}),
            ("OPTIONS", CHAT, {"POST"}),
            ("TRACE", CHAT, {"POST"}),
            ("BREW", CHAT, {"POST"}),
            ("POST", "/v1/models", {"GET", "HEAD"}),
            ("PATCH", "/v1/responses/resp_1", {"GET", "DELETE"}),
            ("HEAD", "/v1/models/gpt-4", {"GET"}),
        ]
        for method, path, allowed in cases:
            with self.subTest(method + " " + path):
                answer = self.ask(method, path)
                self.assertEqual((answer.status, answer.code), (405, "method_not_allowed"))
                self.assertEqual({name.strip() for name in answer.header("Allow").split(",")}, allowed)
        self.assertEqual(self.upstream.requests, [])

    def test_names_the_mend_in_the_message_of_a_refusal(self):
        message = self.assert_keeps_out(403, "path_not_allowed", path="/v1/unknown").message
        self.assertIn("/v1/unknown", message)
        self.assertIn("allowed_paths", message)
        self.assertIn(CHAT, message)

    def test_writes_a_denied_line_without_the_query(self):
        self.assert_keeps_out(403, "path_not_allowed", path="/v1/unknown/q?limit=20")
        event = self.served.wait_event(event="denied", path="/v1/unknown/q")
        self.assertEqual((event["status"], event["reason"], event["method"]), (403, "path_not_allowed", "GET"))
        self.assertNotIn("limit", json.dumps(event))

    def test_cannot_be_changed_by_an_override_header(self):
        headers = [("X-HTTP-Method-Override", "POST"), ("X-Original-URL", CHAT), ("X-Rewrite-URL", CHAT)]
        self.assert_keeps_out(405, "method_not_allowed", path=CHAT, headers=headers)
        self.assert_lets_in(headers=headers)
        self.assertEqual(self.upstream.requests[-1].target, "/v1/models")
        for name, _ in headers:
            self.assertEqual(self.upstream.requests[-1].all(name), [])


class GeneratedRules(unittest.TestCase):
    """The pure part by itself, against a regular expression and against all short segments there are."""

    @staticmethod
    def model(pattern):
        anything = "[^:]+" if ":" in pattern else ".+"
        return re.compile(anything.join(map(re.escape, pattern.split("*"))))

    def patterns(self, count, longest):
        random = seeded("patterns")
        while count:
            pattern = "".join(random.choices("ab:*", weights=(4, 3, 1, 3), k=random.randint(1, longest)))
            if pattern.count("*") <= 2 and "**" not in pattern:
                count -= 1
                yield pattern

    def test_match_what_a_regular_expression_would(self):
        segments = ["".join(letters) for length in range(1, 6) for letters in itertools.product("ab:", repeat=length)]
        for pattern in set(self.patterns(150, 5)):
            model = self.model(pattern)
            for segment in segments:
                self.assertEqual(segment_matches(pattern, segment), bool(model.fullmatch(segment)), (pattern, segment))

    def test_are_said_to_meet_wherever_one_request_could_match_both(self):
        segments = ["".join(letters) for length in range(1, 9) for letters in itertools.product("ab:", repeat=length)]
        patterns = sorted(set(self.patterns(60, 4)))
        matched = {pattern: set(filter(self.model(pattern).fullmatch, segments)) for pattern in patterns}
        for one, other in itertools.combinations_with_replacement(patterns, 2):
            self.assertEqual(segments_meet(one, other), bool(matched[one] & matched[other]), (one, other))


class ABaseUrlThatDiffersByV1(DoorTestCase):
    """Some SDKs add `/v1` themselves, others want it in their base URL."""

    config = {"allowed_paths": [*ALLOWED_PATHS, "/chat/completions", "GET /v1/*/items/*"]}

    def test_is_mended_where_only_the_mended_path_has_a_rule(self):
        cases = [
            ("POST", "/messages", "/v1/messages"),
            ("POST", "/v1/v1/messages", "/v1/messages"),
            ("POST", "/embeddings", "/v1/embeddings"),
            ("GET", "/models", "/v1/models"),
            ("GET", "/models/gpt-4", "/v1/models/gpt-4"),
            ("GET", "/v1/v1/models/gpt-4", "/v1/models/gpt-4"),
            ("GET", "/responses/a%3Ab", "/v1/responses/a%3Ab"),
            ("POST", "/v1/v1/responses/r_1/cancel", "/v1/responses/r_1/cancel"),
        ]
        for method, path, mended in cases:
            with self.subTest(method + " " + path):
                headers = [("Content-Length", "0")] if method == "POST" else []
                self.assert_lets_in(method=method, path=path + "?limit=1", headers=headers)
                self.assertEqual(self.upstream.requests[-1].target, mended + "?limit=1")
                self.served.wait_event(event="request", path=mended)
        self.assertEqual([event for event in self.served.events() if event.get("path") in ("/messages", "/v1/v1/messages")], [])

    def test_is_left_as_it_is_where_it_has_a_rule_of_its_own(self):
        for path in ("/chat/completions", "/v1/chat/completions"):
            with self.subTest(path):
                self.assert_lets_in(method="POST", path=path, headers=[("Content-Length", "0")])
                self.assertEqual(self.upstream.requests[-1].target, path)

    def test_is_no_way_to_a_path_without_a_rule(self):
        cases = ["/v1/v1/v1/messages", "/messages/x", "/v2/messages", "/v1messages", "/V1/v1/messages", "/v1/items/b", "/unknown"]
        for path in cases:
            with self.subTest(path):
                self.assert_keeps_out(403, "path_not_allowed", method="POST", path=path, headers=[("Content-Length", "0")])
        # A `/v1` that is there is not missing: this one must not become an item of "v1".
        self.assert_keeps_out(403, "path_not_allowed", path="/v1/items/b")

    def test_is_told_of_a_wrong_method_and_a_websocket_like_any_other(self):
        answer = self.assert_keeps_out(405, "method_not_allowed", method="DELETE", path="/messages")
        self.assertEqual(answer.header("Allow"), "POST")
        self.assert_keeps_out(426, "upgrade_not_supported", path="/responses", headers=UpgradeOffer.websocket)


class ARuleWithManyAsterisks(DoorTestCase):
    config = {"allowed_paths": ["GET /v1/a*b*c", "GET /v1/" + "/".join(["a*a*a"] * 8)]}

    def test_takes_no_longer_for_a_long_path(self):
        # A pattern that tries every place for every asterisk takes seconds here.
        paths = ["/v1/" + "a" * 1000 + "c", "/v1/a" + "b" * 1000 + "d", "/v1/" + "/".join(["a" * 120] * 7 + ["a" * 119 + "b"])]
        began = time.monotonic()
        for path in paths * 20:
            self.assert_keeps_out(403, "path_not_allowed", path=path)
        self.assertLess(time.monotonic() - began, 10)

    def test_means_what_it_says(self):
        for path, inside in (
            ("/v1/axbxc", True), ("/v1/axxbbbxc", True), ("/v1/abbbc", True), ("/v1/abc", False), ("/v1/axbc", False),
            ("/v1/abxc", False), ("/v1/axbx", False), ("/v1/xaxbxc", False), ("/v1/axcxb", False),
        ):  # fmt: skip
            with self.subTest(path):
                if inside:
                    self.assert_lets_in(path=path)
                else:
                    self.assert_keeps_out(403, "path_not_allowed", path=path)


class UnusualRules(DoorTestCase):
    config = {
        "allowed_paths": [
            "/v1/gpt*",
            "GET /v1/*/items/*",
            "POST /v1/lines application/jsonl",
            "POST /v1/both",
            "POST /v1/both text/plain",
        ]
    }

    def test_asterisk_in_a_word_stands_for_at_least_one_character(self):
        for path, inside in (("/v1/gpt", False), ("/v1/gpt4", True), ("/v1/gpt-4o:x", True), ("/v1/gpt/4", False)):
            with self.subTest(path):
                request = {"method": "POST", "path": path, "headers": [("Content-Length", "0")]}
                if inside:
                    self.assert_lets_in(**request)
                else:
                    self.assert_keeps_out(403, "path_not_allowed", **request)

    def test_two_asterisks_stand_for_two_segments(self):
        self.assert_lets_in(path="/v1/a/items/b")
        self.assert_keeps_out(403, "path_not_allowed", path="/v1/a/x/items/b")
        self.assert_keeps_out(403, "path_not_allowed", path="/v1/items/b")

    def test_type_of_a_rule_is_not_taken_for_json_because_it_begins_alike(self):
        lines = b'{"a": 1}\n{"a": 1, "a": 2}\n[]\n'
        headers = [("Content-Type", "application/jsonl")]
        self.assert_lets_in(method="POST", path="/v1/lines", headers=headers, body=lines)
        self.assertEqual(self.upstream.requests[-1].body, lines)

    def test_two_rules_for_a_path_let_both_types_in(self):
        for kind, body in (("application/json", b"{}"), ("text/plain", b"hello")):
            with self.subTest(kind):
                self.assert_lets_in(method="POST", path="/v1/both", headers=[("Content-Type", kind)], body=body)
        headers = [("Content-Type", "application/json")]
        self.assert_keeps_out(400, "invalid_json", method="POST", path="/v1/both", headers=headers, body=b"hello")
        headers = [("Content-Type", "text/html")]
        self.assert_keeps_out(
            415, "content_type_not_supported", method="POST", path="/v1/both", headers=headers, body=b"x"
        )


class BasePath(BrokerTestCase):
    def test_of_the_upstream_is_put_before_the_path_of_the_request(self):
        stub = self.stub()
        broker = self.broker(stub, config={"upstream_base_url": stub.url + "/proxy/openai/"})
        self.assertEqual(broker.request("GET", "/v1/models?limit=2").status, 200)
        self.assertEqual(stub.requests[-1].target, "/proxy/openai/v1/models?limit=2")
        answer = broker.request("GET", "/proxy/openai/v1/models")
        self.assert_refused(answer, 403, "path_not_allowed")


class UpgradeOffer(DoorTestCase):
    websocket = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]

    def test_of_a_websocket_is_turned_down_so_that_the_agent_falls_back(self):
        cases = {
            "under another method": {"path": "/v1/responses"},
            "with the very method": {"path": "/v1/models"},
            "in another case": {
                "path": "/v1/responses",
                "headers": [("Upgrade", "WebSocket"), ("Connection", "upgrade")],
            },
            "with a query that would be refused": {"path": "/v1/responses?key=x"},
        }
        for case, request in cases.items():
            with self.subTest(case):
                answer = self.assert_keeps_out(426, "upgrade_not_supported", **{"headers": self.websocket, **request})
                self.assertEqual(answer.header("Upgrade"), "HTTP/1.1")

    def test_of_a_websocket_on_an_unknown_path_is_as_any_other_request(self):
        self.assert_keeps_out(403, "path_not_allowed", path="/v1/unknown", headers=self.websocket)

    def test_of_anything_else_is_ignored_and_dropped(self):
        offers = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABkAAQAAP__")]
        self.assert_lets_in(headers=offers)
        sent = self.upstream.requests[-1]
        self.assertEqual(sent.all("Upgrade") + sent.all("HTTP2-Settings"), [])
        self.assertNotIn("upgrade", (sent.header("Connection") or "").lower())


class UpgradeOfferInDryRun(DoorTestCase):
    dry_run = True

    def test_is_turned_down_alike(self):
        answer = self.assert_keeps_out(
            426, "upgrade_not_supported", path="/v1/responses", headers=UpgradeOffer.websocket
        )
        self.assertEqual(answer.header("Upgrade"), "HTTP/1.1")


class Query(DoorTestCase):
    def test_without_a_credential_is_forwarded_unchanged(self):
        many = "&".join(f"p{number}=x" for number in range(100))
        queries = [
            "beta=true",
            "alt=sse",
            "limit=20&after=x",
            "include%5B%5D=a&include%5b%5d=b",
            "include[]=file_search_call.results&include[]=x",
            "metadata[key]=x&a=[b]",
            "a=b=c",
            "flag",
            "a=&b=",
        ]
        queries += [
            "$alt=json",
            "%24alt=sse",
            "max_tokens=5",
            "page_token=x",
            "keys=1",
            "monkey=1",
            "tokens=2",
            "author=me",
            "page-token=x&pageToken=y&next_page_token=z",
            "max-completion-tokens=5&codes=1&secrets=2",
        ]
        queries += ["q=-._~!$'()*+,:@/?=%20%C3%A9", "q=key", "q=%6bey", "a=1&&b=2", "x=" + "y" * 4094, many]
        for query in queries:
            with self.subTest(query[:40]):
                self.assert_lets_in(path="/v1/models?" + query)
                self.assertEqual(self.upstream.requests[-1].target, "/v1/models?" + query)

    def test_with_a_credential_is_refused_however_it_is_spelt(self):
        names = ["key", "KEY", "Key", "api-key", "api_key", "API_KEY", "apikey", "apiKey", "token", "access-token"]
        names += [
            "access_token",
            "auth",
            "Authorization",
            "oauth_token",
            "oauth-token",
            "client_secret",
            "client-secret",
        ]
        names += [
            "x-api-key",
            "x_api_key",
            "X-Goog-Api-Key",
            "x-anything",
            "x_goog_user_project",
            "$key",
            "%24key",
            "$other",
        ]
        names += ["code", "secret", "subscription-key", "Subscription_Key", "session-token", "session_key", "refresh_token"]
        names += ["id_token", "private-key", "security-token", "auth-secret", "oauth_secret", "secret-key", "access-key"]
        names += ["auth_token", "client-key", "client_token", "api-token", "api_secret", "proxy-authorization", "my-api-key"]
        names += ["my_apikey", "key[]", "token[x]", "secret[", "subscription-key[0]"]
        names += [
            "%6bey",
            "k%65y",
            "%6B%65%79",
            "api%2dkey",
            "api%5Fkey",
            "api%5fkey",
            "%78-api-key",
            "client_%C5%BFecret",
        ]
        names += [
            "key%5B%5D",
            "key%5b0%5d",
            "key%5B",
            "token%5Bx%5D%5By%5D",
            "%20key",
            "key%20",
            "key+",
            "+key",
            "api%20key",
        ]
        for name in names:
            for query in (name + "=x", name, "a=b&" + name + "=x", "&" + name + "="):
                with self.subTest(query):
                    self.assert_keeps_out(403, "query_not_allowed", path="/v1/models?" + query)
        self.assert_lets_in(path="/v1/models?limit=1")

    def test_with_a_key_is_refused_with_the_mend(self):
        message = self.assert_keeps_out(403, "query_not_allowed", path="/v1/models?key=x").message
        self.assertIn("x-goog-api-key", message)
        self.assertIn("(key)", message)
        message = self.assert_keeps_out(403, "query_not_allowed", path="/v1/models?subscription-key=x").message
        self.assertIn("(subscription-key)", message)
        self.assertNotIn("x-goog-api-key", message)

    def test_that_is_malformed_is_refused(self):
        queries = [
            "a=%",
            "a=%4",
            "a=%zz",
            "a=%4g",
            "%",
            "a=<b>",
            'a="b"',
            "a=b;key=c",
            "a=b|c",
            "a=b\\c",
            "a={b}",
        ]
        queries += ["a^b", "a`b", "a=b#c", "x=" + "y" * 4095]
        queries += ["&".join(["p=1"] * 101)]
        for query in queries:
            with self.subTest(query[:40]):
                self.assert_keeps_out(403, "query_not_allowed", path="/v1/models?" + query)

    def test_that_no_text_decodes_from_is_no_crash(self):
        for query in ("%ff=1", "a=%ff", "%00=1", "key%00=1"):
            with self.subTest(query):
                self.assertIn(self.ask(path="/v1/models?" + query).status, (200, 403))
        with self.subTest("raw bytes"):
            # Malformed as HTTP and not allowed in a query: both are true.
            self.assertIn(self.ask(path="/v1/models?a=\xe9").status, (400, 403))
        self.assert_lets_in()

    def test_is_looked_at_after_path_and_method(self):
        self.assert_keeps_out(403, "path_not_allowed", path="/v1/unknown?key=x")
        self.assert_keeps_out(405, "method_not_allowed", path=CHAT + "?key=x")


class ContentType(DoorTestCase):
    def test_of_json_is_let_in(self):
        for value in (
            "application/json",
            "Application/JSON",
            "application/json; charset=utf-8",
            "application/json;charset=UTF-8",
            "application/json;",
            "application/json ; charset=utf-8",
            "application/json;; charset=utf-8;",
            "application/json; charset=utf8",
            'application/json; charset="utf-8"',
            "application/json; charset=us-ascii",
            "application/json; version=1; profile=\"a b\"",
        ):
            with self.subTest(value):
                self.assert_lets_in(method="POST", path=CHAT, headers=[("Content-Type", value)], body=b"{}")
                self.assertEqual(self.upstream.requests[-1].all("Content-Type"), [value])

    def test_of_anything_else_is_refused(self):
        values = ["text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
        values += [
            "application/jsonp",
            "application/json-patch+json",
            "application/json+x",
            "xapplication/json",
            "json",
            "",
        ]
        values += [
            "application/json; charset=latin-1",
            "application/json; charset=utf-16",
            "application/json, text/plain",
        ]
        values += ["text/plain; application/json", "application/json; charset=utf-8; charset=utf-16"]
        parameters = ["charset*=utf-16''x", "charset*0=utf-16", "charsets=utf-16", 'charset="utf-16"', "charset", "charset=", "x"]
        parameters += ['a="; charset=utf-16', "charset=utf-7", "charset=utf-8, text/plain"]
        values += ["application/json; " + parameter for parameter in parameters] + ["application/json charset=utf-8"]
        for value in values:
            with self.subTest(value):
                request = {"method": "POST", "path": CHAT, "headers": [("Content-Type", value)], "body": b"{}"}
                self.assert_keeps_out(415, "content_type_not_supported", **request)
        with self.subTest("none at all"):
            self.assert_keeps_out(415, "content_type_not_supported", method="POST", path=CHAT, body=b"{}")

    def test_sent_twice_is_refused(self):
        for second in ("text/plain", "application/json"):
            with self.subTest(second):
                headers = [JSON, ("Content-Type", second)]
                self.assertIn(self.ask("POST", CHAT, headers, body=b"{}").status, (400, 415))
        self.assertEqual(self.upstream.requests, [])

    def test_of_a_rule_counts_instead_of_json(self):
        path = "/v1/audio/transcriptions"
        form = [("Content-Type", "multipart/form-data; boundary=xyz")]
        body = b'--xyz\r\nContent-Disposition: form-data; name="file"\r\n\r\nnot { json\0\xff\r\n--xyz--\r\n'
        self.assert_lets_in(method="POST", path=path, headers=form, body=body)
        self.assertEqual(self.upstream.requests[-1].body, body)
        self.assertEqual(self.upstream.requests[-1].all("Content-Type"), [form[0][1]])
        self.assert_keeps_out(415, "content_type_not_supported", method="POST", path=path, headers=[JSON], body=b"{}")
        mixed = [("Content-Type", "multipart/mixed; boundary=xyz")]
        self.assert_keeps_out(415, "content_type_not_supported", method="POST", path=path, headers=mixed, body=body)

    def test_of_an_empty_body_does_not_matter(self):
        cases = {
            "labelled JSON, of length 0": ("POST", "/v1/responses/resp_1/cancel", [JSON, ("Content-Length", "0")]),
            "labelled JSON, without a length": ("DELETE", "/v1/responses/resp_1", [JSON]),
            "without a label": ("POST", "/v1/responses/resp_1/cancel", [("Content-Length", "0")]),
            "labelled text": ("POST", "/v1/responses/resp_1/cancel", [("Content-Type", "text/plain")]),
            "where a form is expected": ("POST", "/v1/audio/transcriptions", [JSON, ("Content-Length", "0")]),
        }
        for case, (method, path, headers) in cases.items():
            with self.subTest(case):
                self.assert_lets_in(method=method, path=path, headers=headers)
                sent = self.upstream.requests[-1]
                self.assertEqual(sent.body, b"")
                if method == "POST":
                    self.assertEqual(sent.all("Content-Length"), ["0"])
        with self.subTest("chunked, of no chunk"), self.served.connect() as caller:
            caller.send(self.served.head("POST", CHAT, [("Transfer-Encoding", "chunked"), JSON]) + b"0\r\n\r\n")
            self.assertEqual(caller.read_answer().status, 200)


class ContentEncoding(DoorTestCase):
    def test_other_than_identity_is_refused_with_the_cure(self):
        codings = ["gzip", "zstd", "br", "deflate", "x-gzip", "identity, gzip", "gzip, identity", "compress", "x", "none, br"]
        for coding in [*codings, "utf-16"]:
            with self.subTest(coding):
                headers = [JSON, ("Content-Encoding", coding)]
                request = {"method": "POST", "path": CHAT, "headers": headers, "body": gzip.compress(b"{}")}
                answer = self.assert_keeps_out(415, "content_encoding_not_supported", **request)
                self.assertIn("codex", answer.message.lower())

    def test_of_two_headers_is_refused(self):
        headers = [JSON, ("Content-Encoding", "identity"), ("Content-Encoding", "gzip")]
        self.assertIn(self.ask("POST", CHAT, headers, body=b"{}").status, (400, 415))
        self.assertEqual(self.upstream.requests, [])

    def test_that_means_none_is_let_in_and_dropped(self):
        for coding in ("identity", "Identity", "none", "utf-8", "UTF-8", "", "identity, identity", "none,utf-8", " , "):
            with self.subTest(coding):
                self.assert_lets_in(method="POST", path=CHAT, headers=[JSON, ("Content-Encoding", coding)], body=b"{}")
                self.assertEqual(self.upstream.requests[-1].all("Content-Encoding"), [])
        twice = [("Content-Encoding", "identity"), ("content-encoding", "none")]
        self.assert_lets_in(method="POST", path=CHAT, headers=[JSON, *twice], body=b"{}")
        self.assertEqual(self.upstream.requests[-1].all("Content-Encoding"), [])

    def test_in_a_spelling_that_some_servers_take_for_it_is_dropped(self):
        spellings = [("Content_Encoding", "gzip"), ("Content_Type", "text/plain"), ("Transfer_Encoding", "chunked")]
        self.assert_lets_in(method="POST", path=CHAT, headers=[JSON, *spellings, ("Content_Length", "99")], body=b"{}")
        names = [name.lower() for name, _ in self.upstream.requests[-1].headers]
        self.assertEqual([name for name in names if "_" in name], [])


class JsonBody(DoorTestCase):
    def post(self, body):
        return self.ask("POST", CHAT, [JSON], body=body)

    def test_with_one_of_many_keys_twice_holds_nobody_up(self):
        keys = [f'"{number}": 1' for number in range(60000)]
        answer = self.post(f"{{{', '.join([*keys, keys[-1]])}}}".encode())
        self.assert_refused(answer, 400, "invalid_json")

    def test_is_one_strict_object(self):
        cases = {
            "an array": b"[]",
            "a number": b"1",
            "a string": b'"x"',
            "null": b"null",
            "blanks only": b"  ",
            "an open object": b"{",
            "two objects": b"{}{}",
            "something behind": b"{}x",
            "a byte order mark": b"\xef\xbb\xbf{}",
            "NaN": b'{"a": NaN}',
            "Infinity": b'{"a": Infinity}',
            "minus Infinity": b'{"a": [-Infinity]}',
            "a comma too many": b'{"a": 1,}',
            "a comment": b'{"a": 1 /* x */}',
            "single quotes": b"{'a': 1}",
            "a bare name": b"{a: 1}",
            "a leading zero": b'{"a": 01}',
            "a plus": b'{"a": +1}',
            "a hex number": b'{"a": 0x1}',
            "a line end in a string": b'{"a": "b\nc"}',
            "a NUL in a string": b'{"a": "b\0c"}',
            "an unknown escape": b'{"a": "\\x41"}',
            "half an escape": b'{"a": "\\u12"}',
            "bytes that are no UTF-8": b'{"a": "\xff"}',
            "an overlong encoding": b'{"a": "\xc0\xaf"}',
            "an encoded surrogate": b'{"a": "\xed\xa0\x80"}',
            "UTF-16": '{"a": 1}'.encode("utf-16"),
            "UTF-16 without a mark": '{"a": 1}'.encode("utf-16-le"),
            "UTF-32": '{"a": 1}'.encode("utf-32-be"),
            "a vertical tab as a blank": b'{\x0b"a": 1}',
            "a no-break space as a blank": '{\xa0"a": 1}'.encode(),
        }
        for case, body in cases.items():
            with self.subTest(case):
                self.assert_refused(self.post(body), 400, "invalid_json")
        self.assertEqual(self.upstream.requests, [])
        self.assertEqual(self.post(b"{}").status, 200)

    def test_has_no_key_twice_at_any_level(self):
        cases = {
            "at the top": b'{"model": "a", "model": "b"}',
            "with the same value": b'{"a": 1, "a": 1}',
            "one of them escaped": b'{"model": "a", "\\u006dodel": "b"}',
            "one of them escaped in capitals": b'{"m\\u006Fdel": "a", "model": "b"}',
            "one level down": b'{"a": {"b": 1, "b": 2}}',
            "in an object of an array": b'{"a": [1, {"b": 1, "c": 2, "b": 3}]}',
            "far down": b'{"a": ' * 50 + b'{"b": 1, "b": 2}' + b"}" * 50,
            "empty keys": b'{"": 1, "": 2}',
            "the slash escaped": b'{"a/b": 1, "a\\/b": 2}',
            "behind a large text": b'{"a": "' + b"x" * 300000 + b'", "b": 1, "b": 2}',
            "before a large text": b'{"b": 1, "b": 2, "a": "' + b"x" * 300000 + b'"}',
        }
        for case, body in cases.items():
            with self.subTest(case):
                self.assert_refused(self.post(body), 400, "invalid_json")
        self.assertEqual(self.upstream.requests, [])

    def test_has_no_top_level_key_that_another_parser_takes_for_one_of_ours(self):
        keys = [
            "Model",
            "MODEL",
            "mOdel",
            "Stream",
            "STREAM",
            "Tools",
            "Messages",
            "INPUT",
            "\u017ftream",
            "tool\u017f",
        ]
        keys += ["me\u017f\u017fages", "me\u017fsages", "\\u017ftream", "\\u004dodel"]
        for key in keys:
            for body in ('{"model": "a", "%s": "b"}', '{"%s": "b"}', '{"%s": true, "x": {"y": 1}}'):
                with self.subTest(key=key, body=body):
                    self.assert_refused(self.post(body.replace("%s", key).encode()), 400, "invalid_json")
        self.assertEqual(self.upstream.requests, [])

    def test_that_is_strict_is_forwarded_byte_for_byte(self):
        cases = {
            "blanks everywhere": b' \r\n\t{ "model" :\t"m" ,\n"a" : [ 1 , 2 ] }\n ',
            "escapes": b'{"\\u006dodel": "\\u00e9\\/\\ud83d\\ude00"}',
            "UTF-8": '{"text": "é😀\u2028"}'.encode(),
            "numbers as they are written": b'{"a": 1.0, "b": 1E40, "c": -0, "d": 1e-7, "e": 10000000000000000000000}',
            "the same key on different levels": b'{"a": {"a": {"a": 1}}}',
            "the same key in two objects": b'{"a": [{"b": 1}, {"b": 2}]}',
            "a key of ours in another case, below the top": b'{"x": {"Model": 1, "model": 2, "STREAM": 3}}',
            "keys that only resemble ours": b'{"models": 1, "Modell": 2, "inputs": 3, "streaming": true}',
            "two unknown keys that differ in case": b'{"Temperature": 1, "temperature": 2}',
            "keys in an order of their own": b'{"z": 1, "a": 2, "m": 3}',
            "the words inside a text": b'{"a": "NaN Infinity \\"b\\": 1, \\"b\\": 2"}',
            "a lone surrogate": b'{"a": "\\ud800"}',
            "a large text": b'{"a": "' + b"x" * 500000 + b'"}',
        }
        for case, body in cases.items():
            with self.subTest(case):
                answer = self.post(body)
                self.assertEqual(answer.status, 200, answer)
                self.assertEqual(self.upstream.requests[-1].body, body)
                self.assertEqual(self.upstream.requests[-1].all("Content-Length"), [str(len(body))])

    def test_deeper_or_longer_than_the_parser_goes_is_refused(self):
        cases = {
            "arrays": b'{"a": ' + b"[" * 100000 + b"]" * 100000 + b"}",
            "objects": b'{"a": ' * 100000 + b"1" + b"}" * 100000,
            "arrays that never close": b'{"a": ' + b"[" * 900000,
        }
        for case, body in cases.items():
            with self.subTest(case):
                self.assert_refused(self.post(body), 400, "invalid_json")
        with self.subTest("a number of 50,000 digits"):
            # A Python without the limit may read it; a crash is what must not be.
            self.assertIn(self.post(b'{"a": ' + b"7" * 50000 + b"}").status, (200, 400))
        self.assertEqual(self.post(b"{}").status, 200)

    def test_of_more_than_a_million_parts_is_refused_wherever_they_stand(self):
        million = 1_000_000
        cases = {
            "brackets": (b'{"a": ' + b"[" * million, 413),
            "objects": (b'{"a": [' + b"{}," * (million // 2) + b"{}]}", 413),
            "numbers": (b'{"a": [' + b"1," * million + b"1]}", 413),
            "in a text, one too many": (b'{"a": "' + b"{[,,[{" * (million // 6) + b"," * 4 + b'"}', 413),
            "in a text, as many as may be": (b'{"a": "' + b"{[,,[{" * (million // 6) + b"," * 3 + b'"}', 200),
        }
        for case, (body, status) in cases.items():
            with self.subTest(case):
                answer = self.post(body)
                self.assertEqual(answer.status, status)
                if status == 413:
                    self.assert_refused(answer, 413, "request_too_large")
                    self.assertIn("1000000", answer.message)

    def test_is_refused_in_words_about_json(self):
        cases = {
            "a byte-order mark": (b"\xef\xbb\xbf{}", "byte-order mark"),
            "a huge integer": (b'{"a": ' + b"7" * 5000 + b"}", "digits"),
            "deep": (b'{"a": ' + b"[" * 100000 + b"]" * 100000 + b"}", "deep"),
            "a key twice": (b'{"model": 1, "model": 2}', "model"),
        }
        for case, (body, words) in cases.items():
            with self.subTest(case):
                answer = self.post(body)
                self.assert_refused(answer, 400, "invalid_json")
                self.assertIn(words, answer.message)
                for foreign in ("utf-8-sig", "recursion", "set_int_max_str_digits", "Python", "codec", "Exceeds"):
                    self.assertNotIn(foreign, answer.message)

    def test_is_looked_at_on_every_path_with_a_body(self):
        for path in (
            "/v1/messages",
            "/v1/responses",
            "/v1beta/models/gemini:generateContent",
            "/v1/responses/r_1/cancel",
        ):
            with self.subTest(path):
                self.assert_keeps_out(400, "invalid_json", method="POST", path=path, headers=[JSON], body=b"[]")


class TheSecretItself(DoorTestCase):
    alone = True

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # A caller may see its own token, in an echo of a path that it chose.
        cls.served.check_token_in_answers = False

    def forms(self):
        secret = self.served.secret.encode()
        return {
            "as it is": secret,
            "hex": secret.hex().encode(),
            "base64": base64.b64encode(secret),
        }

    def test_in_a_request_is_refused_and_told_to_the_operator(self):
        secret = self.served.secret
        cases = {
            "in the body": {
                "method": "POST",
                "path": CHAT,
                "headers": [JSON],
                "body": json.dumps({"a": secret}).encode(),
            },
            "in a key of the body": {
                "method": "POST",
                "path": CHAT,
                "headers": [JSON],
                "body": b'{"%s": 1}' % secret.encode(),
            },
            "in the query": {"path": "/v1/models?after=" + secret},
            "in the query, half of it percent-encoded": {
                "path": "/v1/models?after=" + secret[:20] + "".join(f"%{ord(character):02x}" for character in secret[20:]),
            },
            "in the path": {"path": "/v1/models/" + secret},
            "in a header": {"headers": [("X-Note", "a " + secret + " b")]},
            "in a header that is dropped": {"headers": [("Authorization", "Bearer " + secret)]},
            "in a cookie": {"headers": [("Cookie", "a=" + secret)]},
        }
        for case, request in cases.items():
            with self.subTest(case):
                start = len(self.served.stderr_text())
                answer = self.assert_keeps_out(403, "secret_in_request", **request)
                self.assertNotIn(secret.encode(), answer.body)
                self.served.wait_stderr("(?i)secret", start=start)
        self.assert_lets_in()

    def test_again_and_again_is_told_twenty_times_a_minute_at_most(self):
        broker = self.broker(self.upstream)
        for _ in range(30):
            self.assert_refused(broker.post_json(CHAT, {"a": broker.secret}), 403, "secret_in_request")
        broker.close()
        self.assertEqual(broker.stderr_text().count("ALARM"), 20)

    def test_in_a_chunked_body_is_refused_too(self):
        body = json.dumps({"a": self.served.secret}).encode()
        half = body.index(b"canary")
        with self.served.connect() as caller:
            caller.send(self.served.head("POST", CHAT, [("Transfer-Encoding", "chunked"), JSON]))
            for part in (body[:half], body[half:], b""):
                caller.send(b"%x\r\n%s\r\n" % (len(part), part))
            self.assert_refused(caller.read_answer(), 403, "secret_in_request")
        self.assertEqual(self.upstream.requests, [])

    def test_in_a_form_is_refused_too(self):
        form = [("Content-Type", "multipart/form-data; boundary=xyz")]
        body = b"--xyz\r\n\r\n" + self.served.secret.encode() + b"\r\n--xyz--\r\n"
        path = "/v1/audio/transcriptions"
        self.assert_keeps_out(403, "secret_in_request", method="POST", path=path, headers=form, body=body)

    def test_wherever_a_caller_puts_it_is_neither_answered_nor_printed_nor_logged(self):
        # What is looked for is done by the leak check when the broker is closed.
        for value in (*self.forms().values(), self.served.token.encode()):
            text = value.decode()
            path = text.replace("/", "_")
            requests = [
                {"path": "/v1/unknown/" + path},
                {"path": "/v1/models/" + path},
                {"path": "/" + path, "token": False},
                {"path": "/healthz?" + path, "token": False},
                {"path": "/v1/models?" + path.replace("=", "") + "=" + path},
                {"path": "/v1/models?key=" + path},
                {"method": path.rstrip("=") + "X", "path": CHAT},
                {"method": path.rstrip("=") + "X", "token": False},
                {"headers": [("Host", text)], "host": False},
                {"headers": [("Origin", text)]},
                {"headers": [("Upgrade", "websocket"), ("X-Note", text)], "path": "/v1/unknown"},
                {"headers": [("Content-Type", text)], "method": "POST", "path": CHAT, "body": b"{}"},
                {"headers": [JSON, ("Content-Encoding", text)], "method": "POST", "path": CHAT, "body": b"{}"},
                {"headers": [("Content-Length", text)], "method": "POST", "path": CHAT},
                {"headers": [("Transfer-Encoding", text)], "method": "POST", "path": CHAT},
                {"headers": [(path.rstrip("=") + "(", "x")]},
                {"headers": [("Expect", text)], "method": "POST", "path": CHAT},
            ]
            for request in requests:
                with self.subTest(request=request):
                    self.assertGreaterEqual(self.ask(**request).status, 200)


class LargeRequests(DoorTestCase):
    config = {"max_request_bytes": 100000}

    def body(self, size):
        return b'{"a": "' + b"x" * (size - 9) + b'"}'

    def test_up_to_the_limit_pass(self):
        self.assert_lets_in(method="POST", path=CHAT, headers=[JSON], body=self.body(100000))

    def test_beyond_it_are_refused(self):
        self.assert_keeps_out(
            413, "request_too_large", method="POST", path=CHAT, headers=[JSON], body=self.body(100001)
        )

    def test_are_refused_by_their_announced_length_before_a_byte_of_them_came(self):
        for length in (100001, 10**12):
            with self.subTest(length), self.served.connect() as caller:
                caller.send(self.served.head("POST", CHAT, [JSON, ("Content-Length", length)]))
                self.assert_refused(caller.read_answer(), 413, "request_too_large")

    def test_in_chunks_are_refused_as_soon_as_they_are_too_large(self):
        with self.served.connect() as caller:
            caller.send(self.served.head("POST", CHAT, [JSON, ("Transfer-Encoding", "chunked")]))
            caller.send(b"186a1\r\n" + self.body(100001) + b"\r\n")
            self.assert_refused(caller.read_answer(), 413, "request_too_large")
        with self.served.connect() as caller:
            caller.send(self.served.head("POST", CHAT, [JSON, ("Transfer-Encoding", "chunked")]))
            # Announced and not yet there.
            caller.send(b"7fffffff\r\n{")
            self.assert_refused(caller.read_answer(), 413, "request_too_large")

    def test_of_up_to_the_limit_pass_in_chunks_too(self):
        with self.served.connect() as caller:
            caller.send(self.served.head("POST", CHAT, [JSON, ("Transfer-Encoding", "chunked")]))
            caller.send(b"186a0\r\n" + self.body(100000) + b"\r\n0\r\n\r\n")
            self.assertEqual(caller.read_answer().status, 200)
        self.assertEqual(len(self.upstream.requests[-1].body), 100000)

    def test_are_judged_by_their_size_before_their_type(self):
        headers = [("Content-Type", "text/plain"), ("Content-Encoding", "gzip")]
        request = {"method": "POST", "path": CHAT, "headers": headers, "body": self.body(100001)}
        self.assert_keeps_out(413, "request_too_large", **request)


def is_closed_to(caller):
    """Whether what the caller goes on to send, a byte now, is refused by now."""
    try:
        return caller.sock.send(b"x") != 1
    except ConnectionError:
        return True


class RefusalWhileTheBodyIsStillComing(DoorTestCase):
    def test_can_be_read_by_a_caller_that_sends_all_of_it_first(self):
        large, small = b"x" * (5 << 20), b"x" * (60 << 10)
        cases = {
            "no such path": ("/v1/unknown", [JSON], True, large, 403),
            "another method": ("/v1/models", [JSON], True, large, 405),
            "a key in the query": (CHAT + "?key=x", [JSON], True, large, 403),
            "another type": (CHAT, [("Content-Type", "text/plain")], True, large, 415),
            "an encoded body": (CHAT, [JSON, ("Content-Encoding", "zstd")], True, large, 415),
            "not JSON": (CHAT, [JSON], True, large, 400),
            "no token": (CHAT, [JSON], False, small, 401),
            "a web page": (CHAT, [JSON, ("Origin", "null")], False, small, 403),
        }
        for case, (path, headers, token, body, status) in cases.items():
            with self.subTest(case):
                request = {"method": "POST", "path": path, "headers": headers, "token": token, "body": body}
                answer = self.ask(**request)
                self.assertEqual(answer.status, status)
                self.assertTrue(answer.code)

    def test_can_be_read_at_once(self):
        for case, token, status in (("no token", False, 401), ("another type", True, 415)):
            with self.subTest(case), self.served.connect(timeout=5) as caller:
                headers = [("Content-Type", "text/plain"), ("Content-Length", 1 << 20)]
                caller.send(self.served.head("POST", CHAT, headers, token) + b"x" * 1000)
                self.assertEqual(caller.read_answer().status, status)

    def test_does_not_keep_a_stranger_for_long(self):
        with self.served.connect(timeout=10) as caller:
            headers = [JSON, ("Content-Length", 1 << 20)]
            caller.send(self.served.head("POST", CHAT, headers, token=False) + b"x")
            self.assertEqual(caller.read_answer().status, 401)
            eventually(lambda: is_closed_to(caller), 5, "the end of the reading, a second after the answer")

    def test_of_a_stranger_is_not_read_to_its_end(self):
        size = 48 << 20
        with self.served.connect(timeout=10) as caller:
            caller.send(self.served.head("POST", CHAT, [JSON, ("Content-Length", size)], token=False))
            self.assertEqual(caller.read_answer().status, 401)
            with self.assertRaises(ConnectionError):
                caller.send(b"x" * size)


class ManyRequestsAtOnce(BrokerTestCase):
    def test_beyond_the_limit_are_turned_away_until_one_has_ended(self):
        release = threading.Event()

        def hold(conn, request):
            conn.hold(release)
            conn.respond_json({})

        stub = self.stub(hold)
        broker = self.broker(stub, config={"max_concurrent_requests": 2})
        with broker.connect() as first, broker.connect() as second:
            first.send(broker.head("GET", "/v1/models"))
            second.send(broker.head("GET", "/v1/models"))
            stub.wait_for_requests(2)
            answer = broker.request("GET", "/v1/models")
            self.assert_refused(answer, 503, "too_many_requests_in_flight")
            self.assertRegex(answer.header("Retry-After"), "^[0-9]+$")
            # Neither a stranger's request nor one that the allowlist stops is in flight.
            self.assertEqual(broker.request("GET", "/v1/models", token=False).status, 401)
            self.assertEqual(broker.request("GET", "/healthz").status, 200)
            self.assertEqual(broker.request("GET", "/v1/unknown").status, 403)
            release.set()
            self.assertEqual((first.read_answer().status, second.read_answer().status), (200, 200))
        eventually(lambda: broker.request("GET", "/v1/models").status == 200, what="a free place")

    def test_hold_no_more_than_256_mib_of_bodies_together(self):
        stub = self.stub()
        broker = self.broker(stub)
        head = broker.head("POST", CHAT, [JSON, ("Content-Length", 32 << 20), ("Expect", "100-continue")])
        callers = [broker.connect() for _ in range(8)]
        for caller in callers:
            caller.send(head)
            # It promises to take this one's body: it is counted from now on.
            self.assertEqual(caller.read_head().status, 100)
            caller.send(b"{")

        def turned_away():
            answer = broker.post_json(CHAT, {"a": "x" * 1000})
            return answer.status == 503 and answer

        self.assert_refused(eventually(turned_away), 503, "too_many_requests_in_flight")
        # A request without a body needs no place for one.
        self.assertEqual(broker.request("GET", "/v1/models").status, 200)
        for caller in callers:
            caller.close()
        eventually(lambda: broker.post_json(CHAT, {"a": "x" * 1000}).status == 200, what="room for a body")


class DryRunAtTheDoor(DoorTestCase):
    dry_run = True

    def test_refuses_as_the_real_thing_does(self):
        cases = {
            "no token": ({"token": False}, 401, "client_token_required"),
            "a web page": ({"headers": [("Origin", "null")]}, 403, "browser_not_allowed"),
            "another host": ({"headers": [("Host", "evil.example")], "host": False}, 403, "host_not_allowed"),
            "an unknown path": ({"path": "/v1/unknown"}, 403, "path_not_allowed"),
            "another method": ({"path": CHAT}, 405, "method_not_allowed"),
            "a key in the query": ({"path": "/v1/models?key=x"}, 403, "query_not_allowed"),
            "no JSON": ({"method": "POST", "path": CHAT, "headers": [JSON], "body": b"["}, 400, "invalid_json"),
        }
        for case, (request, status, code) in cases.items():
            with self.subTest(case):
                answer = self.ask(**request)
                self.assertEqual((answer.status, answer.code), (status, code))

    def test_knows_no_secret_that_a_request_could_hold(self):
        answer = self.ask("POST", CHAT, [JSON], body=json.dumps({"model": "m", "x": canary()}).encode())
        self.assertEqual(answer.status, 200)
        self.assertEqual(self.upstream.connections, 0)

    def test_makes_a_token_of_its_own_where_none_is_set(self):
        for config, env in (({}, {"BROKER_TEST_TOKEN": ABSENT}), ({"client_token_env": ABSENT}, {})):
            with self.subTest(config=config, env=env):
                broker = self.broker(config=config, env=env, dry_run=True)
                shown = broker.wait_stderr(r"export ([A-Z_]+)=['\"]?([!-&(-~]+?)['\"]?\s")
                self.assertGreaterEqual(len(shown.group(2)), 32)
                self.assertEqual(broker.stderr_text().count(shown.group(2)), 1)
                self.assertEqual(broker.request("GET", "/v1/models", token=False).status, 401)
                self.assertEqual(broker.request("GET", "/v1/models", token=shown.group(2)).status, 200)


if __name__ == "__main__":
    unittest.main()
