"""HTTP itself: what is malformed is refused and never forwarded, what is well-formed is understood."""

import itertools
import json
import re
import socket
import threading
import time
import unittest

import broker
from tests.support import BrokerTestCase, SharedBroker, eventually, linux_only, seeded, slow

CHAT = "/v1/chat/completions"

# Bytes that no field value may hold, by their names.
CONTROL = {"NUL": b"\0", "BEL": b"\x07", "VT": b"\x0b", "ESC": b"\x1b", "DEL": b"\x7f"}


class HttpTestCase(SharedBroker):
    """One broker and one echoing upstream for all tests of a class."""

    def start_of(self, method="POST", path=CHAT, version="HTTP/1.1"):
        """A good head so far, as bytes without the blank line: host and token."""
        return self.served.head(method, path, version=version)[:-2]

    def assert_still_serves(self):
        before = len(self.upstream.requests)
        answer = self.served.post_json(CHAT, {"model": "control"})
        self.assertEqual(answer.status, 200)
        self.assertEqual(len(self.upstream.requests), before + 1)

    def assert_refused_and_closed(self, data, status=400, code="bad_request"):
        """Exactly one answer, this refusal; then the connection is closed; nothing is forwarded."""
        answers = self.served.raw_answers(data)
        self.assertEqual(len(answers), 1, answers)
        self.assert_refused(answers[0], status, code)
        self.assertEqual(self.upstream.requests, [])
        return answers[0]


class MalformedHead(HttpTestCase):
    def test_is_refused_and_the_connection_closed(self):
        good = self.start_of("GET", "/v1/models")
        host = b"Host: localhost\r\nX-Broker-Token: " + self.served.token.encode() + b"\r\n\r\n"
        cases = {
            "a bare LF ends a line": good + b"X: y\n\r\n",
            "a bare LF inside a value": good + b"X: a\nb: c\r\n\r\n",
            "a bare LF ends the request line": b"GET /v1/models HTTP/1.1\n" + host,
            "a bare CR inside a value": good + b"X: a\rb\r\n\r\n",
            "a bare CR between two headers": good + b"X: a\rY: b\r\n\r\n",
            "a folded header": good + b"X: a\r\n b\r\n\r\n",
            "a header folded with a tab": good + b"X: a\r\n\tb\r\n\r\n",
            "the first header line is a fold": b"GET /v1/models HTTP/1.1\r\n " + host,
            "a blank before the colon": good + b"X : y\r\n\r\n",
            "a tab before the colon": good + b"X\t: y\r\n\r\n",
            "a blank inside a name": good + b"X Y: z\r\n\r\n",
            "a line without a colon": good + b"nonsense\r\n\r\n",
            "an empty name": good + b": y\r\n\r\n",
            "a name that is not ASCII": good + "Ünicode: y\r\n\r\n".encode(),
            "a name with brackets": good + b"X[0]: y\r\n\r\n",
            "a name with a slash": good + b"X/Y: z\r\n\r\n",
            "no version": b"GET /v1/models\r\n" + host,
            "no target": b"GET HTTP/1.1\r\n" + host,
            "an empty target": b"GET  HTTP/1.1\r\n" + host,
            "two blanks before the target": b"GET  /v1/models HTTP/1.1\r\n" + host,
            "two blanks after the target": b"GET /v1/models  HTTP/1.1\r\n" + host,
            "a tab after the method": b"GET\t/v1/models HTTP/1.1\r\n" + host,
            "a blank at the end of the request line": b"GET /v1/models HTTP/1.1 \r\n" + host,
            "a blank before the method": b" GET /v1/models HTTP/1.1\r\n" + host,
            "a fourth word": b"GET /v1/models HTTP/1.1 x\r\n" + host,
            "a version in lower case": b"GET /v1/models http/1.1\r\n" + host,
            "HTTP/0.9": b"GET /v1/models HTTP/0.9\r\n" + host,
            "HTTP/2.0": b"GET /v1/models HTTP/2.0\r\n" + host,
            "a version of three digits": b"GET /v1/models HTTP/1.10\r\n" + host,
            "a version without a point": b"GET /v1/models HTTP/11\r\n" + host,
            "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "a method with a colon": b"GE:T /v1/models HTTP/1.1\r\n" + host,
            "a method that is not ASCII": "GÉT /v1/models HTTP/1.1\r\n".encode() + host,
            "an absolute target": b"GET http://localhost/v1/models HTTP/1.1\r\n" + host,
            "an absolute target elsewhere": b"GET https://evil.example/v1/models HTTP/1.1\r\n" + host,
            "an authority as target": b"CONNECT evil.example:443 HTTP/1.1\r\n" + host,
            "the asterisk as target": b"OPTIONS * HTTP/1.1\r\n" + host,
            "a target without its slash": b"GET v1/models HTTP/1.1\r\n" + host,
            "a NUL in the request line": b"GET /v1/mod\0els HTTP/1.1\r\n" + host,
        }
        for name, control in CONTROL.items():
            cases["a " + name + " in a value"] = good + b"X: a" + control + b"b\r\n\r\n"
            cases["a " + name + " in a name"] = good + b"X" + control + b": a\r\n\r\n"
        for case, data in cases.items():
            with self.subTest(case):
                self.assert_refused_and_closed(data)
        self.assert_still_serves()

    def test_is_refused_before_anybody_asks_for_the_token(self):
        data = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n"
        self.assert_refused_and_closed(data)

    def test_is_refused_alike_when_it_comes_byte_by_byte(self):
        with self.served.connect() as caller:
            try:
                for byte in self.start_of() + b"X: a\r\n b\r\n\r\n":
                    caller.send(bytes([byte]))
            except (BrokenPipeError, ConnectionResetError):
                pass  # it need not wait for the last byte to refuse
            self.assert_refused(caller.read_answer(), 400, "bad_request")

    def test_is_no_reason_to_lose_what_was_asked_before_on_the_connection(self):
        good = self.served.head("GET", "/v1/models")
        answers = self.served.raw_answers(good + self.start_of("GET", "/v1/models") + b"X : y\r\n\r\n" + good)
        self.assertEqual([answer.status for answer in answers], [200, 400])
        self.assertEqual(len(self.upstream.requests), 1)


class AmbiguousFraming(HttpTestCase):
    def test_is_refused_and_the_connection_closed(self):
        start = self.start_of() + b"Content-Type: application/json\r\n"
        chunked = b"2\r\n{}\r\n0\r\n\r\n"
        cases = {
            "both lengths": b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked,
            "both lengths the other way round": b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n" + chunked,
            "two different lengths": b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
            "the same length twice": b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
            "the same length as a list": b"Content-Length: 2, 2\r\n\r\n{}",
            "a length with a plus": b"Content-Length: +2\r\n\r\n{}",
            "a length with a minus": b"Content-Length: -2\r\n\r\n{}",
            "a length in hex": b"Content-Length: 0x2\r\n\r\n{}",
            "a length with an underscore": b"Content-Length: 0_2\r\n\r\n{}",
            "a length with a blank inside": b"Content-Length: 0 2\r\n\r\n{}",
            "a length with a point": b"Content-Length: 2.0\r\n\r\n{}",
            "a length in quotes": b'Content-Length: "2"\r\n\r\n{}',
            "a length of superscript digits": b"Content-Length: \xb2\r\n\r\n{}",
            "a length of Arabic digits": "Content-Length: ٢\r\n\r\n{}".encode(),
            "an empty length": b"Content-Length:\r\n\r\n{}",
            "a length with a blank before the colon": b"Content-Length : 2\r\n\r\n{}",
            "an unknown transfer coding": b"Transfer-Encoding: gzip\r\n\r\n" + chunked,
            "gzip below chunked": b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked,
            "chunked below gzip": b"Transfer-Encoding: chunked, gzip\r\n\r\n" + chunked,
            "chunked twice in a list": b"Transfer-Encoding: chunked, chunked\r\n\r\n" + chunked,
            "chunked in two headers": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked,
            "identity beside chunked": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked,
            "chunked with a parameter": b"Transfer-Encoding: chunked;q=1\r\n\r\n" + chunked,
            "almost chunked": b"Transfer-Encoding: xchunked\r\n\r\n" + chunked,
            "chunked and a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n\r\n" + chunked,
            "an empty transfer coding": b"Transfer-Encoding:\r\n\r\n" + chunked,
        }
        for case, rest in cases.items():
            with self.subTest(case):
                self.assert_refused_and_closed(start + rest)
        with self.subTest("chunked with HTTP/1.0"):
            start = self.start_of(version="HTTP/1.0") + b"Content-Type: application/json\r\n"
            self.assert_refused_and_closed(start + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)
        self.assert_still_serves()

    def test_a_length_beyond_all_numbers_is_refused(self):
        for digits in (25, 5000):
            with self.subTest(digits), self.served.connect() as caller:
                headers = [("Content-Type", "application/json"), ("Content-Length", "9" * digits)]
                caller.send(self.served.head("POST", CHAT, headers))
                self.assertIn(caller.read_answer().code, ("bad_request", "request_too_large"))
        self.assertEqual(self.upstream.requests, [])

    def test_leading_zeros_are_digits_too(self):
        with self.served.connect() as caller:
            caller.send(self.start_of() + b"Content-Type: application/json\r\nContent-Length: 002\r\n\r\n{}")
            # Either reading of it is safe; a third one is not.
            self.assertIn(caller.read_answer().status, (200, 400))
        self.assertEqual([request.body for request in self.upstream.requests], [b"{}"] * len(self.upstream.requests))


class BadChunks(HttpTestCase):
    def start(self):
        return self.start_of() + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"

    def test_are_refused_and_the_connection_closed(self):
        cases = {
            "a size that is no number": b"zz\r\n{}\r\n0\r\n\r\n",
            "an empty size": b"\r\n{}\r\n0\r\n\r\n",
            "a size with a minus": b"-2\r\n{}\r\n0\r\n\r\n",
            "a size with a plus": b"+2\r\n{}\r\n0\r\n\r\n",
            "a size with 0x": b"0x2\r\n{}\r\n0\r\n\r\n",
            "a size with an underscore": b"0_2\r\n{}\r\n0\r\n\r\n",
            "a blank before the size": b" 2\r\n{}\r\n0\r\n\r\n",
            "a blank after the size": b"2 \r\n{}\r\n0\r\n\r\n",
            "a tab after the size": b"2\t\r\n{}\r\n0\r\n\r\n",
            "an extension": b"2;a=b\r\n{}\r\n0\r\n\r\n",
            "an empty extension": b"2;\r\n{}\r\n0\r\n\r\n",
            "an extension on the last chunk": b"2\r\n{}\r\n0;a\r\n\r\n",
            "a bare LF after the size": b"2\n{}\r\n0\r\n\r\n",
            "a bare CR after the size": b"2\r{}\r\n0\r\n\r\n",
            "a bare LF after the data": b"2\r\n{}\n0\r\n\r\n\r\n",
            "nothing after the data": b"2\r\n{}0\r\n\r\n\r\n",
            "data longer than its size": b"2\r\n{} \r\n0\r\n\r\n",
            "data shorter than its size": b"4\r\n{}\r\n0\r\n\r\n",
            "a trailer": b"2\r\n{}\r\n0\r\nX: y\r\n\r\n",
            "a trailer that says a length": b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n",
            "a bare LF at the very end": b"2\r\n{}\r\n0\r\n\n\r\n",
            "a size of twenty digits": b"f" * 20 + b"\r\n{}\r\n0\r\n\r\n",
            "a size line without an end": b"0" * 20000 + b"2\r\n{}\r\n0\r\n\r\n",
        }
        for case, body in cases.items():
            with self.subTest(case):
                if case == "a size of twenty digits":
                    # Far too large or plainly malformed: both are true.
                    [answer] = self.served.raw_answers(self.start() + body)
                    self.assertIn(answer.code, ("bad_request", "request_too_large"))
                else:
                    self.assert_refused_and_closed(self.start() + body)
        self.assertEqual(self.upstream.requests, [])
        self.assert_still_serves()

    def test_never_reach_the_upstream_as_the_next_request(self):
        smuggled = self.served.head("GET", "/v1/models")
        self.assert_refused_and_closed(self.start() + b"2;x\r\n{}\r\n0\r\n\r\n" + smuggled)


class GeneratedRequests(HttpTestCase):
    def test_a_head_of_good_lines_passes_and_one_bad_line_spoils_it(self):
        rng = seeded("header blocks")
        token_characters = "!#$%&'*+-.^_`|~0123456789abcXYZ"

        def good_line():
            name = "X-" + "".join(rng.choice(token_characters) for _ in range(rng.randint(1, 12)))
            blank = rng.choice(["", " ", "\t", "  \t "])
            value = "".join(rng.choice('abc {}[]":;,=\\/\t\xe9~!') for _ in range(rng.randint(0, 30)))
            return (name + ":" + blank + value + rng.choice(["", " ", "\t"])).encode("latin-1")

        bad_lines = [
            lambda: good_line().replace(b":", b" :", 1),
            lambda: b" " + good_line(),
            lambda: b"\t" + good_line(),
            lambda: good_line() + rng.choice(list(CONTROL.values())) + b"x",
            lambda: b"X" + bytes([rng.choice(b'()<>@,;\\"/[]?={} \x80\xff')]) + good_line(),
            lambda: good_line() + b"\r" + good_line(),
            lambda: good_line() + b"\n" + good_line(),
            lambda: good_line().replace(b":", b"", 1).replace(b":", b""),
            lambda: b":" + good_line(),
            lambda: b"Content-Length: 1\r\nContent-Length: 1",
        ]
        for number in range(150):
            lines = [good_line() for _ in range(rng.randint(0, 20))]
            spoilt = rng.random() < 0.6
            if spoilt:
                lines.insert(rng.randint(0, len(lines)), rng.choice(bad_lines)())
            data = self.start_of("GET", "/v1/models") + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
            with self.subTest(number=number, data=data), self.served.connect() as caller:
                self.upstream.forget()
                caller.send(data)
                answer = caller.read_answer()
                if spoilt:
                    self.assert_refused(answer, 400, "bad_request")
                    self.assertEqual(caller.read_all(), b"")
                    self.assertEqual(self.upstream.requests, [])
                else:
                    self.assertEqual(answer.status, 200, answer)

    def test_a_chunked_body_arrives_whole_however_it_is_cut(self):
        rng = seeded("chunked bodies")
        with self.served.connect() as caller:
            for number in range(60):
                text = "".join(rng.choice("abc\r\n0;{}é") for _ in range(rng.randint(0, 400)))
                body = json.dumps({"number": number, "text": text}, ensure_ascii=rng.random() < 0.5).encode()
                wire, rest = [], body
                while rest:
                    size = rng.randint(1, rng.choice([1, 10, 500]))
                    part, rest = rest[:size], rest[size:]
                    digits = format(len(part), rng.choice(["x", "X", "03x"]))
                    wire.append(digits.encode() + b"\r\n" + part + b"\r\n")
                wire.append(rng.choice([b"0", b"000"]) + b"\r\n\r\n")
                head = self.start_of() + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                data = head + b"".join(wire)
                with self.subTest(number=number):
                    while data:
                        size = rng.randint(1, rng.choice([3, 50, 5000]))
                        caller.send(data[:size])
                        data = data[size:]
                    answer = caller.read_answer()
                    self.assertEqual(answer.status, 200, answer)
                    request = self.upstream.requests[-1]
                    self.assertEqual(request.body, body)
                    self.assertEqual(request.header("Content-Length"), str(len(body)))
                    self.assertEqual(request.all("Transfer-Encoding"), [])

    def test_one_changed_byte_in_the_framing_is_never_a_second_request(self):
        rng = seeded("changed bytes")
        marker = self.served.head("GET", "/v1/models/smuggled").decode()
        inner = json.dumps({"text": marker}).encode()
        pieces = [b"5\r\n", inner[:5], b"\r\n%x\r\n" % (len(inner) - 5), inner[5:], b"\r\n0\r\n\r\n"]
        body = b"".join(pieces)
        start = self.start_of() + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        # Only where the framing stands: elsewhere another byte is merely another text.
        framing, at = [], 0
        for number, piece in enumerate(pieces):
            framing += range(at, at + len(piece)) if number % 2 == 0 else []
            at += len(piece)
        for number in range(120):
            changed = bytearray(body)
            changed[rng.choice(framing)] = rng.choice(b"0123456789abcdefg;\r\n \t\0+-x")
            with self.subTest(number=number, body=bytes(changed)):
                if changed == body:
                    continue
                answers = self.served.raw_answers(start + changed, half_close=True)
                self.assertLessEqual(len(answers), 1, answers)
                targets = [request.target for request in self.upstream.requests]
                self.assertNotIn("/v1/models/smuggled", targets)
        self.assert_still_serves()

    def test_garbage_gets_an_error_or_nothing(self):
        rng = seeded("garbage")
        words = [b"GET", b"POST", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b":", b"Host"]
        words += [b"localhost", b"Content-Length", b"Transfer-Encoding", b"chunked", b"1", b"\0", b"\xff", b"{}", b"%"]
        for number in range(150):
            data = b"".join(rng.choice(words) for _ in range(rng.randint(1, 40)))
            with self.subTest(number=number, data=data):
                for answer in self.served.raw_answers(data, half_close=True):
                    # "/" with a host is the one thing here that may be answered.
                    self.assertTrue(400 <= answer.status < 500 or answer.body in (b'{"ok": true}', b""), answer)
        self.assertEqual(self.upstream.requests, [])
        self.assert_still_serves()


class Path(HttpTestCase):
    def test_with_a_character_or_segment_that_no_api_needs_is_refused(self):
        cases = {
            "a percent sign": "/v1/mod%65ls",
            "an encoded slash": "/v1%2fmodels",
            "an encoded slash inside a segment": "/v1/models/a%2Fb",
            "an encoded dot segment": "/v1/%2e%2e/admin",
            "one dot of two encoded": "/v1/.%2e/admin",
            "an encoded letter": "/v1/models/%61",
            "an encoded digit": "/v1/models/%30",
            "an encoded hyphen": "/v1/models/%2D",
            "an encoded underscore": "/v1/models/%5f",
            "an encoded tilde": "/v1/models/%7E",
            "an encoded backslash": "/v1/models/%5C",
            "an encoded percent sign": "/v1/models/%252e",
            "an encoded question mark": "/v1/models/a%3Fb",
            "an encoded number sign": "/v1/models/a%23b",
            "an encoded semicolon": "/v1/models/a%3bb",
            "an encoded NUL": "/v1/models/a%00",
            "an encoded line end": "/v1/models/a%0d%0aX:%20y",
            "an encoded DEL": "/v1/models/a%7F",
            "an encoded control character of Unicode": "/v1/models/a%C2%85",
            "half a character of UTF-8": "/v1/models/%C3",
            "an overlong slash": "/v1/models/%C0%AF",
            "an encoded surrogate": "/v1/models/%ED%A0%80",
            "Latin-1, encoded": "/v1/models/%E9",
            "a percent sign with one digit": "/v1/models/%4",
            "a percent sign with no hex behind": "/v1/models/%zz",
            "a lone percent sign": "/v1/models/%",
            "a semicolon": "/v1/models;x=y",
            "a backslash": "/v1\\models",
            "a double slash": "/v1//models",
            "a double slash in front": "//v1/models",
            "a host in front": "//evil.example/v1/models",
            "a dot segment": "/v1/./models",
            "a dot segment at the end": "/v1/models/.",
            "two dots": "/v1/x/../models",
            "two dots at the end": "/v1/models/..",
            "two dots in front": "/../v1/models",
            "a slash at the end": "/v1/models/",
            "a fragment": "/v1/models#x",
            "a quote": '/v1/models/"x"',
            "an angle bracket": "/v1/models/<x>",
            "a brace": "/v1/models/{x}",
            "a bar": "/v1/models/a|b",
            "a caret": "/v1/models/a^b",
            "a backtick": "/v1/models/a`b",
            "an asterisk": "/v1/models/*",
            "a bracket": "/v1/models/a(b)",
            "an exclamation mark": "/v1/models/a!b",
            "a dollar sign": "/v1/models/$a",
            "an ampersand": "/v1/models/a&b",
            "an apostrophe": "/v1/models/a'b",
            "Latin-1": "/v1/models/\xe9",
            "1025 characters": "/v1/models/" + "x" * (1025 - len("/v1/models/")),
        }
        for case, path in cases.items():
            with self.subTest(case), self.served.connect() as caller:
                caller.send(self.served.head("GET", path))
                self.assert_refused(caller.read_answer(), 400, "bad_request")
        self.assertEqual(self.upstream.requests, [])
        self.assert_still_serves()

    def test_with_every_character_that_one_may_hold_is_forwarded_as_it_is(self):
        names = ["AZaz09._~:@+,=-", "ft:gpt-4o:org::id", "...", ".a", "x" * (1024 - len("/v1/models/"))]
        names += ["anthropic.claude-v1%3A0", "a%3aB", "my%20file.txt", "%C3%A9t%C3%A9", "%F0%9F%98%80", "a%40b", "%5Bx%5D%22%3C"]
        for path in ["/v1/models/" + name for name in names]:
            with self.subTest(path[:40]):
                self.assertEqual(self.served.request("GET", path).status, 200)
                self.assertEqual(self.upstream.requests[-1].target, path)


    def test_is_matched_decoded_and_sent_as_it_came(self):
        # `%3A` is the `:` of the rule `*:generateContent`; boto3 writes it so.
        for target in ("/v1beta/models/gemini%3AgenerateContent", "/v1beta/models/gemini%3agenerateContent?alt=sse"):
            with self.subTest(target):
                self.assertEqual(self.served.post_json(target, {}).status, 200)
                self.assertEqual(self.upstream.requests[-1].target, target)
                self.served.wait_event(event="request", path=target.partition("?")[0])
        # And it is that `:` where a rule has none to spare.
        answer = self.served.post_json("/v1beta/models/a%3Ab:generateContent", {})
        self.assert_refused(answer, 403, "path_not_allowed")

    def test_that_is_refused_says_which_part_of_it(self):
        cases = {
            "/v1//models": "empty segment",
            "/v1/models/": "slash at the end",
            "/v1/../models": "dot segment",
            "/v1/models;x": "%XX",
            "/v1/models/%2e": "%2e",
            "/v1/models/%C3": "UTF-8",
            "/" + "x" * 1024: "1024",
            "http://127.0.0.1/v1/models": "no forward proxy",
        }
        for path, words in cases.items():
            with self.subTest(path[:30]), self.served.connect() as caller:
                caller.send(self.served.head("GET", path))
                answer = caller.read_answer()
                self.assert_refused(answer, 400, "bad_request")
                self.assertIn(words, answer.message)


class TheLogOfRefusedRequests(BrokerTestCase):
    def test_has_what_could_be_read_of_them(self):
        broker = self.broker(self.stub())
        long = "/v1/" + "x" * 3000
        cases = {
            "a path of 3000 characters": (broker.head("GET", long), "GET", long[:256]),
            "a double slash": (broker.head("POST", "/v1//y?key=hidden"), "POST", "/v1//y"),
            "an absolute target": (broker.head("GET", "http://x.example/z?q=hidden"), "GET", "http://x.example/z"),
            "CONNECT": (broker.head("CONNECT", "api.example:443"), "CONNECT", "api.example:443"),
            "a bad header": (b"GET /v1/bad HTTP/1.1\r\nX : y\r\n\r\n", "GET", "/v1/bad"),
            "a head that ends early": (b"GET /v1/early HTTP/1.1\r\nHost: ", "GET", "/v1/early"),
            "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", None, None),
        }
        for number, (case, (data, method, path)) in enumerate(cases.items(), 1):
            with self.subTest(case):
                broker.raw(data, half_close=True)
                event = broker.wait_event(event="denied", count=number)
                self.assertEqual((event["reason"], event["method"], event["path"]), ("bad_request", method, path))
                self.assertNotIn("hidden", json.dumps(event))


class LargeHead(HttpTestCase):
    def test_of_too_many_bytes_is_431(self):
        with self.served.connect() as caller:
            caller.send(self.start_of("GET", "/v1/models") + b"X: " + b"x" * (33 << 10) + b"\r\n\r\n")
            self.assert_refused(caller.read_answer(), 431, "headers_too_large")
        self.assert_still_serves()

    def test_that_never_ends_is_431_too(self):
        with self.served.connect() as caller:
            caller.send(self.start_of("GET", "/v1/models") + b"X: " + b"x" * (40 << 10))
            self.assert_refused(caller.read_answer(), 431, "headers_too_large")

    def test_of_nearly_32_kib_passes(self):
        start = self.start_of("GET", "/v1/models")
        value = b"x" * ((32 << 10) - len(start) - 100)
        with self.served.connect() as caller:
            caller.send(start + b"X-Long: " + value + b"\r\n\r\n")
            self.assertEqual(caller.read_answer().status, 200)
        self.assertEqual(self.upstream.requests[0].header("X-Long"), value.decode())

    def test_of_100_headers_passes_and_of_101_is_431(self):
        for count, status in ((100, 200), (101, 431)):
            with self.subTest(count), self.served.connect() as caller:
                headers = [(f"X-{number}", "y") for number in range(count - 2)]
                caller.send(self.served.head("GET", "/v1/models", headers))
                answer = caller.read_answer()
                self.assertEqual(answer.status, status)
                if status == 431:
                    self.assert_refused(answer, 431, "headers_too_large")

    def test_of_one_endless_request_line_is_refused(self):
        with self.served.connect() as caller:
            caller.send(b"GET /" + b"x" * (40 << 10))
            # Too long a path and too large a head at once.
            self.assertIn(caller.read_answer().code, ("bad_request", "headers_too_large"))
        self.assert_still_serves()

    def test_of_a_real_agent_passes_with_its_json_in_a_header_value(self):
        metadata = json.dumps({"turn": "x" * 700, "list": [1, {"a": "b;c,d"}]})
        answer = self.served.post_json(CHAT, {"model": "m"}, [("x-codex-turn-metadata", metadata)])
        self.assertEqual(answer.status, 200)
        self.assertEqual(self.upstream.requests[0].header("x-codex-turn-metadata"), metadata)


class Pipelining(HttpTestCase):
    def test_answers_come_in_the_order_of_the_requests(self):
        with self.served.connect() as caller:
            caller.send(b"".join(self.served.post_bytes(CHAT, {"number": number}) for number in range(5)))
            for number in range(5):
                answer = caller.read_answer()
                self.assertEqual(json.loads(answer.json()["body"]), {"number": number})
        self.assertEqual(len(self.upstream.requests), 5)

    def test_a_health_check_behind_a_request_waits_for_its_turn(self):
        with self.served.connect() as caller:
            caller.send(self.served.post_bytes(CHAT, {}) + self.served.head("GET", "/healthz"))
            self.assertIn("method", caller.read_answer().json())
            self.assertEqual(caller.read_answer().json(), {"ok": True})

    def test_the_body_of_a_refused_request_is_never_the_next_request(self):
        inner = self.served.head("GET", "/v1/models")
        length = [("Content-Length", len(inner))]
        as_json = length + [("Content-Type", "application/json")]
        cases = {
            "no such path": self.served.head("POST", "/v1/unknown", as_json),
            "no such method": self.served.head("PUT", CHAT, as_json),
            "no token": self.served.head("POST", CHAT, as_json, token=False),
            "another host": self.served.head("POST", CHAT, [("Host", "evil.example")] + as_json, host=False),
            "a web page": self.served.head("POST", CHAT, [("Origin", "https://evil.example")] + as_json),
            "no content type": self.served.head("POST", CHAT, length),
            "a coding": self.served.head("POST", CHAT, as_json + [("Content-Encoding", "gzip")]),
            "not JSON": self.served.head("POST", CHAT, as_json),
            "a health check": self.served.head("GET", "/healthz", as_json, token=False),
            "a bad query": self.served.head("POST", CHAT + "?key=x", as_json),
            "an upgrade": self.served.head("POST", CHAT, as_json + [("Upgrade", "websocket")]),
            "a bad path": self.served.head("POST", "/v1//x", as_json),
        }
        for case, head in cases.items():
            with self.subTest(case), self.served.connect() as caller:
                caller.send(head + inner)
                first = caller.read_answer()
                self.assertEqual(first.status == 200, case == "a health check", first)
                # Whether it closes or goes on, the next thing it understands is the next request.
                try:
                    caller.send(self.served.head("GET", "/healthz", token=False))
                    answers = [caller.read_answer()]
                except (ConnectionError, OSError):
                    answers = []
                self.assertIn([answer.json() for answer in answers], ([], [{"ok": True}]))
                self.assertEqual(self.upstream.requests, [])


class KeepAlive(HttpTestCase):
    def test_an_http_1_1_connection_serves_many_requests(self):
        with self.served.connect() as caller:
            for number in range(20):
                caller.send(self.served.post_bytes(CHAT, {"number": number}))
                answer = caller.read_answer()
                self.assertEqual(answer.status, 200)
                self.assertNotEqual((answer.header("Connection") or "").lower(), "close")

    def test_a_connection_outlives_health_checks_and_heads(self):
        with self.served.connect() as caller:
            for path, method in itertools.product(["/healthz", "/v1/models"], ["GET", "HEAD", "GET"]):
                caller.send(self.served.head(method, path))
                self.assertEqual(caller.read_answer(method).status, 200)

    def test_connection_close_is_obeyed_and_said(self):
        for value in ("close", "Close", "x-foo, close"):
            with self.subTest(value):
                data = self.served.head("GET", "/v1/models", [("Connection", value)])
                [answer] = self.served.raw_answers(data)
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.header("Connection").lower(), "close")

    def test_nothing_behind_connection_close_is_served(self):
        closing = self.served.head("GET", "/v1/models", [("Connection", "close")])
        answers = self.served.raw_answers(closing + self.served.head("GET", "/v1/models"))
        self.assertEqual(len(answers), 1)
        self.assertEqual(len(self.upstream.requests), 1)

    def test_an_answer_to_head_has_no_body_even_when_it_is_a_refusal(self):
        with self.served.connect() as caller:
            caller.send(self.served.head("HEAD", "/v1/unknown"))
            answer = caller.read_answer("HEAD")
            self.assertEqual((answer.status, answer.code), (403, "path_not_allowed"))
            if (answer.header("Connection") or "").lower() == "close":
                self.assertEqual(caller.read_all(), b"")
            else:
                caller.send(self.served.head("GET", "/healthz"))
                self.assertEqual(caller.read_answer().json(), {"ok": True})


class Http10(HttpTestCase):
    def test_is_served_and_the_connection_closed(self):
        [answer] = self.served.raw_answers(self.served.head("GET", "/v1/models", version="HTTP/1.0"))
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.json()["method"], "GET")
        self.assertEqual(answer.all("Transfer-Encoding"), [])

    def test_takes_a_body_with_a_length(self):
        head = self.start_of(version="HTTP/1.0") + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n"
        [answer] = self.served.raw_answers(head + b"{}")
        self.assertEqual(answer.json()["body"], "{}")

    def test_gets_a_stream_ended_by_closing(self):
        first_arrived = threading.Event()

        def stream(conn, request):
            conn.start_stream()
            conn.chunk(b"data: 0\n\n")
            conn.hold(first_arrived)
            conn.chunk(b"data: 1\n\n")
            conn.end()

        self.upstream.script(stream)
        with self.served.connect() as caller:
            caller.send(self.served.head("GET", "/v1/models", version="HTTP/1.0"))
            answer = caller.read_head()
            self.assertEqual(answer.all("Transfer-Encoding") + answer.all("Content-Length"), [])
            self.assertEqual(caller.read_until(b"\n\n"), b"data: 0\n\n")
            first_arrived.set()
            self.assertEqual(caller.read_all(), b"data: 1\n\n")

    def test_needs_a_host_too(self):
        data = b"GET /v1/models HTTP/1.0\r\nX-Broker-Token: " + self.served.token.encode() + b"\r\n\r\n"
        self.assert_refused_and_closed(data)

    def test_never_gets_an_interim_answer(self):
        head = self.start_of(version="HTTP/1.0") + b"Content-Type: application/json\r\nContent-Length: 2\r\n"
        with self.served.connect() as caller:
            caller.send(head + b"Expect: 100-continue\r\n\r\n")
            # By the time this is answered, the head above has been read.
            self.served.request("GET", "/healthz")
            caller.send(b"{}")
            self.assertEqual([answer.status for answer in caller.read_answers()], [200])

    def test_upstream_always_gets_http_1_1(self):
        self.served.raw(self.served.head("GET", "/v1/models", version="HTTP/1.0"))
        self.assertTrue(self.upstream.requests[0].head.startswith(b"GET /v1/models HTTP/1.1\r\n"))


class Expect100Continue(HttpTestCase):
    def head(self, length=2, path=CHAT, content_type="application/json", more=(), token=True):
        headers = [("Content-Length", length), ("Content-Type", content_type), ("Expect", "100-continue"), *more]
        return self.served.head("POST", path, headers, token)

    def test_is_answered_before_the_body(self):
        with self.served.connect() as caller:
            caller.send(self.head())
            self.assertEqual(caller.read_until(b"\r\n\r\n"), b"HTTP/1.1 100 Continue\r\n\r\n")
            caller.send(b"{}")
            self.assertEqual(caller.read_answer().status, 200)
        self.assertEqual(self.upstream.requests[0].all("Expect"), [])

    def test_is_answered_for_a_chunked_body_too(self):
        headers = [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json"), ("Expect", "100-continue")]
        with self.served.connect() as caller:
            caller.send(self.served.head("POST", CHAT, headers))
            self.assertEqual(caller.read_head().status, 100)
            caller.send(b"2\r\n{}\r\n0\r\n\r\n")
            self.assertEqual(caller.read_answer().status, 200)

    def test_is_not_answered_where_the_head_decides(self):
        cases = {
            "no token": (self.head(token=False), 401, "client_token_required"),
            "a web page": (self.head(more=[("Origin", "http://localhost")]), 403, "browser_not_allowed"),
            "no such path": (self.head(path="/v1/unknown"), 403, "path_not_allowed"),
            "another method": (self.head(path="/v1/models"), 405, "method_not_allowed"),
            "a key in the query": (self.head(path=CHAT + "?key=x"), 403, "query_not_allowed"),
            "too large": (self.head(length=33554433), 413, "request_too_large"),
            "a coding": (self.head(more=[("Content-Encoding", "gzip")]), 415, "content_encoding_not_supported"),
            "another type": (self.head(content_type="text/plain"), 415, "content_type_not_supported"),
            "an upgrade": (self.head(more=[("Upgrade", "websocket")]), 426, "upgrade_not_supported"),
            "a bad length": (self.head(length="+2"), 400, "bad_request"),
        }
        for case, (data, status, code) in cases.items():
            with self.subTest(case), self.served.connect() as caller:
                caller.send(data)
                self.assert_refused(caller.read_answer(), status, code)
        self.assertEqual(self.upstream.requests, [])

    def test_what_only_the_body_decides_is_refused_after_it(self):
        with self.served.connect() as caller:
            caller.send(self.head())
            self.assertEqual(caller.read_head().status, 100)
            caller.send(b"[]")
            self.assert_refused(caller.read_answer(), 400, "invalid_json")

    def test_a_caller_that_does_not_wait_is_served_too(self):
        with self.served.connect() as caller:
            caller.send(self.head() + b"{}")
            answer = caller.read_answer()
            if answer.status == 100:
                answer = caller.read_answer()
            self.assertEqual(answer.status, 200)


class CallersWhoLeave(HttpTestCase):
    def test_in_the_head_or_the_body_leave_no_trace_upstream(self):
        whole = self.served.post_bytes(CHAT, {"model": "m"})
        for count in (1, 20, whole.index(b"\r\n\r\n") + 2, len(whole) - 1):
            with self.subTest(count):
                self.served.raw(whole[:count], half_close=True)
        chunked = self.start_of() + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        for body in (b"", b"2", b"2\r\n{", b"2\r\n{}\r\n", b"2\r\n{}\r\n0\r\n"):
            with self.subTest(body):
                self.served.raw(chunked + body, half_close=True)
        self.assertEqual(self.upstream.requests, [])
        self.assertEqual(self.upstream.incomplete, [])
        self.assert_still_serves()

    @linux_only
    def test_leave_no_descriptor_behind(self):
        self.assert_still_serves()
        before = self.served.fd_count()
        callers = [self.served.connect() for _ in range(50)]
        for number, caller in enumerate(callers):
            caller.send(self.start_of()[: number * 2])
        for number, caller in enumerate(callers):
            caller.reset() if number % 2 else caller.close()
        eventually(lambda: self.served.fd_count() <= before + 2, what="the old number of descriptors")
        self.assert_still_serves()


@slow
class SlowCallers(BrokerTestCase):
    """All waits at once: the longest decides how long this takes."""

    def test_are_let_go_in_their_time(self):
        stub = self.stub()
        broker = self.broker(stub)
        head = broker.head("POST", CHAT, [("Content-Type", "application/json"), ("Content-Length", "2")])
        seen = {}

        def wait(case, data):
            with broker.connect(timeout=90) as caller:
                caller.send(data)
                seen[case] = caller.read_all()

        cases = {
            "a head that stops": head[:40],
            "a body that stops": head + b"{",
            "nothing said": b"",
            "idle after an answer": broker.head("GET", "/healthz"),
        }
        threads = [threading.Thread(target=wait, args=case) for case in cases.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertIn(b" 408 ", seen["a head that stops"])
        self.assertIn(b"X-Broker-Error: request_timeout", seen["a body that stops"])
        self.assertEqual(seen["nothing said"], b"")
        self.assertEqual(len(re.findall(b"HTTP/1.1 ", seen["idle after an answer"])), 1)
        self.assertEqual(stub.requests, [])


class BytesThatNeverEnd(unittest.TestCase):
    def test_are_not_taken_any_more_when_their_time_is_over(self):
        """Forty callers with chunks of one byte have always more to say than a thread can take: none ever waits."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.send(b"more")
            wire = broker.Wire(ours)
            with self.assertRaises(TimeoutError):
                wire.fill(time.monotonic() - 1)
            wire.fill(time.monotonic() + 1)
            self.assertEqual(wire.buffer, b"more")


class TheListener(BrokerTestCase):
    def test_is_on_the_loopback_address_alone(self):
        broker = self.broker(dry_run=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                # No packet is sent by this; it only asks which address would be used.
                probe.connect(("192.0.2.1", 9))
                own = probe.getsockname()[0]
            except OSError:
                self.skipTest("no other address here")
        with self.assertRaises(OSError):
            socket.create_connection((own, broker.port), 5).close()

    def test_keeps_the_port_on_the_ipv6_loopback_too_without_answering_there(self):
        broker = self.broker(dry_run=True)
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            self.skipTest("no IPv6 here")
        with self.assertRaises(OSError):
            socket.create_connection(("::1", broker.port), 5).close()
        with socket.socket(socket.AF_INET6) as stranger, self.assertRaises(OSError):
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stranger.bind(("::1", broker.port))


if __name__ == "__main__":
    unittest.main()
