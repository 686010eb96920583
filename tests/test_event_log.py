"""The event log: what stands in it, what never does, and that nothing is sent that isn't in it."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import unittest
from datetime import datetime, timedelta, timezone

from tests.support import (
    NOBODY,
    Broker,
    SharedBroker,
    canary,
    eventually,
    linux_only,
    posix_only,
    run_broker,
    run_each,
    seeded,
    slow,
)

CHAT = "/v1/chat/completions"

COMMON = {"time", "event"}
FIELDS = {
    "start": {"mode", "version", "listen"},
    "stop": {"mode", "version", "listen"},
    "reload": {"mode", "version", "listen"},
    "request": {"id", "client", "method", "path", "mode", "model", "stream", "request_bytes"},
    "response": {
        "id",
        "client",
        "model",
        "status",
        "outcome",
        "response_bytes",
        "ttfb_ms",
        "duration_ms",
        "usage",
        "upstream_request_id",
        "attempt",
    },
    "denied": {"id", "client", "status", "reason", "method", "path"},
}


class EventLogTestCase(SharedBroker):
    def lines_of(self, answer, broker=None):
        """The lines that a request caused, by event, once its last one is written."""
        broker, name = broker or self.served, answer.header("X-Broker-Request-Id")

        def look():
            found = {event["event"]: event for event in broker.events() if event.get("id") == name}
            return found if "response" in found or "denied" in found else None

        return eventually(look, what="the last line of a request")

    def last_response(self, broker=None):
        """The newest `response`, once each `request` has one."""
        broker = broker or self.served

        def look():
            events = broker.events()
            answered = {event["id"] for event in events if event["event"] == "response"}
            if any(event["event"] == "request" and event["id"] not in answered for event in events):
                return None
            return [event for event in events if event["event"] == "response"][-1:]

        return eventually(look, what="a response line for each request")[0]

    def raw_log(self, broker=None):
        with open((broker or self.served).log_path, "rb") as file:
            return file.read()


def whole_log(*paths):
    """The events of these files; every line must be one."""
    events = []
    for path in paths:
        with open(path, "rb") as file:
            data = file.read()
        if not data.endswith(b"\n"):
            raise AssertionError(f"{path} ends in {data[-200:]!r}")
        events += [json.loads(line) for line in data[:-1].split(b"\n")]
    return events


# ------------------------------------------------------------------------------------------------
# What stands in it


class EveryLine(EventLogTestCase):
    def test_has_the_fields_of_its_event_and_no_others(self):
        broker = self.broker(self.upstream)
        broker.post_json(CHAT, {"model": "m"})
        broker.request("GET", "/v1/unknown")
        broker.request("GET", "/v1/models", token=False)
        if os.name == "posix":
            broker.signal(signal.SIGHUP)
            broker.wait_event(event="reload")
        broker.signal(signal.SIGTERM)
        broker.wait()
        events = broker.events()
        self.assertEqual({event["event"] for event in events}, set(FIELDS) - ({"reload"} if os.name != "posix" else set()))
        for event in events:
            with self.subTest(event["event"]):
                # A stranger has no name.
                unnamed = {"client"} if event.get("reason") == "client_token_required" else set()
                self.assertEqual(set(event), (COMMON | FIELDS[event["event"]]) - unnamed)

    def test_has_its_time_in_utc_with_milliseconds(self):
        before = datetime.now(timezone.utc) - timedelta(seconds=1)
        answer = self.served.post_json(CHAT, {"model": "m"})
        for event in self.lines_of(answer).values():
            self.assertRegex(event["time"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z")
            at = datetime.strptime(event["time"], "%Y-%m-%dT%H:%M:%S.%f%z")
            self.assertTrue(before <= at <= datetime.now(timezone.utc) + timedelta(seconds=1), event)

    def test_of_one_request_has_the_id_that_its_caller_was_told(self):
        answer = self.served.post_json(CHAT, {"model": "m"})
        self.assertEqual(set(self.lines_of(answer)), {"request", "response"})
        answer = self.served.request("GET", "/v1/unknown")
        self.assertEqual(set(self.lines_of(answer)), {"denied"})
        ids = [event["id"] for event in self.served.events() if event["event"] == "request"]
        self.assertEqual(len(ids), len(set(ids)))

    def test_is_written_before_the_upstream_is_asked(self):
        seen = []
        self.upstream.head_handler = lambda conn, request: seen.extend(self.served.events()[-1:])
        self.served.post_json(CHAT, {"model": "first things first"})
        self.assertEqual([(event["event"], event["model"]) for event in seen], [("request", "first things first")])


class StartAndStop(EventLogTestCase):
    def test_say_mode_version_and_where_it_listens(self):
        version = run_broker("--version").stdout.strip()
        for mode, broker in self.brokers({mode: {"config": {"mode": mode}} for mode in ("proxy", "dry_run")}).items():
            with self.subTest(mode):
                broker.signal(signal.SIGTERM)
                broker.wait()
                first, last = broker.events()
                self.assertEqual((first["event"], last["event"]), ("start", "stop"))
                for event in (first, last):
                    self.assertEqual((event["mode"], event["listen"]), (mode, broker.url))
                    self.assertTrue(version.endswith(event["version"]), (version, event))


class RequestLine(EventLogTestCase):
    def request_line(self, *args, **keywords):
        return self.lines_of(self.served.request(*args, **keywords))["request"]

    def test_says_who_asked_for_what(self):
        body = json.dumps({"model": "gpt-x", "messages": [], "stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        line = self.request_line("POST", CHAT, body, headers)
        wanted = {
            "client": "default",
            "method": "POST",
            "path": CHAT,
            "mode": "proxy",
            "model": "gpt-x",
            "stream": True,
            "request_bytes": len(body),
        }
        self.assertEqual({name: line[name] for name in wanted}, wanted)

    def test_of_a_request_without_a_body_has_no_model(self):
        line = self.request_line("GET", "/v1/models/gpt-x")
        self.assertEqual((line["method"], line["path"]), ("GET", "/v1/models/gpt-x"))
        self.assertEqual((line["model"], line["request_bytes"]), (None, 0))
        self.assertFalse(line["stream"])

    def test_leaves_the_query_out(self):
        line = self.request_line("GET", "/v1/models?after=query-of-mine&limit=3")
        self.assertEqual(line["path"], "/v1/models")
        self.assertNotIn(b"query-of-mine", self.raw_log())

    def test_takes_a_model_and_a_stream_of_any_type(self):
        for model in (None, 7, True, ["a"], {"a": 1}, "", 1e300):
            for stream in (None, 0, "yes", [], {}):
                with self.subTest(model=model, stream=stream):
                    line = self.request_line("POST", CHAT, {"model": model, "stream": stream})
                    self.assertIn(type(line["model"]), (str, type(None)))
                    self.assertIs(type(line["stream"]), bool)

    def test_counts_the_bytes_of_a_chunked_body(self):
        body = b'{"model": "in pieces"}'
        with self.served.connect() as caller:
            headers = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
            caller.send(self.served.head("POST", CHAT, headers))
            for at in range(len(body)):
                caller.send(b"1\r\n%c\r\n" % body[at])
            caller.send(b"0\r\n\r\n")
            line = self.lines_of(caller.read_answer())["request"]
        self.assertEqual((line["model"], line["request_bytes"]), ("in pieces", len(body)))


class ResponseLine(EventLogTestCase):
    def test_says_how_it_went(self):
        body = b'{"answer": "' + b"x" * 5000 + b'"}'
        self.upstream.script(lambda conn, request: conn.respond(201, [("X-Request-Id", "req_1")], body, "Created"))
        answer = self.served.post_json(CHAT, {"model": "m"})
        line = self.lines_of(answer)["response"]
        wanted = {
            "status": 201,
            "outcome": "ok",
            "response_bytes": len(body),
            "usage": None,
            "upstream_request_id": "req_1",
            "attempt": 1,
        }
        self.assertEqual({name: line[name] for name in wanted}, wanted)

    def test_tells_the_first_byte_from_the_last(self):
        release = threading.Event()

        def slowly(conn, request):
            conn.start_stream()
            conn.chunk(b"data: 1\n\n")
            conn.hold(release)
            conn.chunk(b"data: 2\n\n")
            conn.end()

        self.upstream.script(slowly)
        with self.served.connect() as caller:
            caller.send(self.served.post_bytes(CHAT, {"stream": True}))
            head = caller.read_head()
            caller.read_chunk()
            half_way = time.monotonic()
            # The line can't be there before the answer has ended.
            self.assertEqual(self.served.events()[-1]["event"], "request")
            while time.monotonic() < half_way + 0.1:
                self.served.request("GET", "/healthz")
            release.set()
            caller.read_body(head)
        line = self.lines_of(head)["response"]
        self.assertGreaterEqual(line["ttfb_ms"], 0)
        self.assertGreaterEqual(line["duration_ms"], line["ttfb_ms"] + 90)
        self.assertLess(line["duration_ms"], 30000)
        self.assertEqual(line["response_bytes"], 2 * len(b"data: 1\n\n"))

    def test_has_the_upstreams_own_id_of_it(self):
        cases = {"x-request-id": "req_0123", "request-id": "req_0456", "X-REQUEST-ID": "req_0789"}
        for name, value in cases.items():
            with self.subTest(name):
                self.upstream.script(lambda conn, request: conn.respond(200, [(name, value)]))  # noqa: B023
                line = self.lines_of(self.served.post_json(CHAT, {}))["response"]
                self.assertEqual(line["upstream_request_id"], value)

    def test_never_has_the_secret_for_an_id(self):
        for value in (self.served.secret, self.served.secret.encode().hex(), "x" * 250 + self.served.secret):
            self.upstream.script(lambda conn, request: conn.respond(200, [("x-request-id", value)]))  # noqa: B023
            line = self.lines_of(self.served.post_json(CHAT, {}))["response"]
            # Redacted before it is cut: else the cut would leave a part that nobody recognizes.
            self.assertNotIn(self.served.secret[:4], line["upstream_request_id"])


def openai_chunk(**more):
    return {"object": "chat.completion.chunk", "choices": [{"delta": {"content": '"usage": 1'}}], **more}


ANTHROPIC_START = {
    "type": "message_start",
    "message": {"content": [], "usage": {"input_tokens": 25, "cache_read_input_tokens": 3, "output_tokens": 1}},
}
ANTHROPIC_END = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}}
RESPONSES_USAGE = {
    "input_tokens": 36,
    "input_tokens_details": {"cached_tokens": 7},
    "output_tokens": 87,
    "output_tokens_details": {"reasoning_tokens": 8},
    "total_tokens": 123,
}
GEMINI_USAGE = {"promptTokenCount": 4, "candidatesTokenCount": 5, "totalTokenCount": 9}


def gemini(text, **usage):
    return {"candidates": [{"content": {"parts": [{"text": text}], "role": "model"}}], "usageMetadata": usage}


# (path, answer, usage): a list is a stream of events, with their names where the provider has some.
USAGE = {
    "OpenAI chat": (CHAT, {"usage": {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}}, (9, 12)),
    "OpenAI chat, streamed": (
        CHAT,
        [
            (None, openai_chunk(usage=None)),
            (None, openai_chunk(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21})),
            (None, "[DONE]"),
        ],
        (9, 12),
    ),
    "OpenAI responses": ("/v1/responses", {"object": "response", "usage": RESPONSES_USAGE}, (36, 87, 7)),
    "OpenAI responses, streamed": (
        "/v1/responses",
        [
            ("response.created", {"type": "response.created", "response": {"usage": None}}),
            ("response.output_text.delta", {"type": "response.output_text.delta", "delta": "usage"}),
            ("response.completed", {"type": "response.completed", "response": {"usage": RESPONSES_USAGE}}),
        ],
        (36, 87, 7),
    ),
    "OpenAI embeddings": ("/v1/embeddings", {"data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}}, (8, None)),
    "Anthropic": (
        "/v1/messages",
        {"type": "message", "usage": {"input_tokens": 2095, "output_tokens": 503}},
        (2095, 503),
    ),
    "Anthropic, streamed": (
        "/v1/messages",
        [
            ("message_start", ANTHROPIC_START),
            ("ping", {"type": "ping"}),
            ("content_block_delta", {"type": "content_block_delta", "delta": {"text": '"usage": {"output_tokens": 99}'}}),
            ("message_delta", ANTHROPIC_END),
            ("message_stop", {"type": "message_stop"}),
        ],
        (28, 15, 3),
    ),
    "Azure OpenAI": (
        "/openai/deployments/d/chat/completions",
        {"usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}},
        (1, 2),
    ),
    "Gemini": ("/v1beta/models/g:generateContent", {"candidates": [], "usageMetadata": GEMINI_USAGE}, (4, 5)),
    "Gemini, streamed": (
        "/v1beta/models/g:streamGenerateContent",
        [(None, gemini("a", promptTokenCount=4, candidatesTokenCount=1)), (None, gemini("b", **GEMINI_USAGE))],
        (4, 5),
    ),
    "none": (CHAT, {"choices": []}, None),
    "none, but what the model wrote looks like it": (
        "/v1/messages",
        {"content": [{"type": "tool_use", "input": {"usage": {"input_tokens": 424242}}}]},
        None,
    ),
    "Anthropic, with more behind it": ("/v1/messages", {"usage": {"input_tokens": 7, "output_tokens": 8}, "x": [{}]}, (7, 8)),
    "none, streamed": (CHAT, [(None, openai_chunk()), (None, "[DONE]")], None),
    # One prompt of 51,204 tokens, of which 51,200 came from a cache: the same for all who tell it.
    "OpenAI chat, cached": (
        CHAT,
        {"usage": {"prompt_tokens": 51204, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 51200}}},
        (51204, 9, 51200),
    ),
    "Anthropic, cached": (
        "/v1/messages",
        {"usage": {"input_tokens": 4, "cache_read_input_tokens": 51200, "cache_creation_input_tokens": 0, "output_tokens": 9}},
        (51204, 9, 51200),
    ),
    "Gemini, cached": (
        "/v1beta/models/g:generateContent",
        {"usageMetadata": {"promptTokenCount": 51204, "cachedContentTokenCount": 51200, "candidatesTokenCount": 9}},
        (51204, 9, 51200),
    ),
    "Anthropic, written to a cache": (
        "/v1/messages",
        {"usage": {"input_tokens": 4, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 100, "output_tokens": 9}},
        (104, 9, 0),
    ),
    "Gemini, with thoughts": (
        "/v1beta/models/g:generateContent",
        {"usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 150, "thoughtsTokenCount": 8000}},
        (7, 8150),
    ),
    "in a choice, streamed": (
        CHAT,
        [(None, openai_chunk(choices=[{"delta": {}, "usage": {"prompt_tokens": 5, "completion_tokens": 6}}]))],
        (5, 6),
    ),
    "in x_groq, streamed": (CHAT, [(None, openai_chunk(x_groq={"usage": {"prompt_tokens": 5, "completion_tokens": 6}}))], (5, 6)),
    "Anthropic, told again with zeros": (
        "/v1/messages",
        [
            ("message_start", {"type": "message_start", "message": {"usage": {"input_tokens": 15, "output_tokens": 1}}}),
            ("message_delta", {"type": "message_delta", "usage": {"input_tokens": 0, "output_tokens": 6}}),
        ],
        (15, 6),
    ),
}


class Usage(EventLogTestCase):
    def usage_of(self, path, handler):
        self.upstream.script(handler)
        answer = self.served.post_json(path, {"model": "m"})
        self.assertEqual(answer.status, 200, answer)
        return self.lines_of(answer)["response"]["usage"]

    def assert_usage(self, usage, wanted):
        if wanted is None:
            self.assertIsNone(usage)
        else:
            found = tuple(map(usage.get, ("input_tokens", "output_tokens", "cache_tokens")))
            self.assertEqual(found, (*wanted, None)[:3])
            self.assertEqual(set(usage) - {"input_tokens", "output_tokens", "cache_tokens"}, set())

    def test_is_what_each_provider_reports(self):
        for case, (path, answer, wanted) in USAGE.items():
            if isinstance(answer, list):
                continue
            with self.subTest(case):
                usage = self.usage_of(path, lambda conn, request: conn.respond_json(answer))  # noqa: B023
                self.assert_usage(usage, wanted)

    def test_is_found_in_a_stream_however_it_is_cut(self):
        for case, (path, events, wanted) in USAGE.items():
            if not isinstance(events, list):
                continue
            for line_end, size in (("\n", None), ("\r\n", None), ("\n", 7)):
                with self.subTest(case, line_end=line_end, size=size):
                    text = ""
                    for name, event in events:
                        text += f"event: {name}{line_end}" if name else ""
                        data = event if isinstance(event, str) else json.dumps(event)
                        text += f"data: {data}{line_end}{line_end}"
                    usage = self.usage_of(path, streamed(text.encode(), size))
                    self.assert_usage(usage, wanted)

    def test_is_found_wherever_chance_cuts_the_answer(self):
        random = seeded("usage")
        for case, (path, answer, wanted) in USAGE.items():
            events = answer if isinstance(answer, list) else [(None, answer)]
            data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for _, event in events if event != "[DONE]")
            for turn in range(4):
                with self.subTest(case, turn=turn):
                    cuts = sorted(random.sample(range(1, len(data)), min(len(data) - 1, 1 << turn)))
                    pieces = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)])]

                    def in_pieces(conn, request, pieces=pieces):
                        conn.start_stream()
                        for piece in pieces:
                            conn.chunk(piece)
                        conn.end()

                    self.assert_usage(self.usage_of(path, in_pieces), wanted)

    def test_is_found_where_nobody_says_what_the_answer_is(self):
        event = b'data: {"usage": {"prompt_tokens": 9, "completion_tokens": 12}}'
        bodies = {
            "without a line end": event,
            "with one": event + b"\n",
            "behind a byte-order mark": b"\xef\xbb\xbf" + event + b"\n\n",
            "JSON behind one": b"\xef\xbb\xbf" + event[6:],
            "JSON lines": b'{"choices": []}\n' + event[6:],
        }
        for case, body in bodies.items():
            for headers in ([], [("Content-Type", "text/plain")], [("Content-Type", "text/event-stream")]):
                with self.subTest(case, headers=headers):
                    usage = self.usage_of(CHAT, lambda conn, request: conn.respond(200, headers, body))  # noqa: B023
                    self.assert_usage(usage, (9, 12))

    def test_is_found_at_the_end_of_an_answer_of_any_size(self):
        usage = b'"usage": {"prompt_tokens": 8, "total_tokens": 8}}'
        numbers = b", ".join([b"0.0123456789"] * 150_000)
        text = b'"' + b"usage {" * 300_000 + b'"'
        for body in (b'{"data": [{"embedding": [' + numbers + b"]}], " + usage, b'{"data": ' + text + b", " + usage):
            with self.subTest(body[:30]):
                self.assertGreater(len(body), 1_900_000)
                headers = [("Content-Type", "application/json")]
                found = self.usage_of("/v1/embeddings", lambda conn, request: conn.respond(200, headers, body))  # noqa: B023
                self.assert_usage(found, (8, None))

    def test_is_found_in_an_event_of_any_size(self):
        response = {"output": ["x" * 500_000], "usage": RESPONSES_USAGE}
        event = b"data: " + json.dumps({"type": "response.completed", "response": response}).encode() + b"\n\n"
        self.assert_usage(self.usage_of("/v1/responses", streamed(event, 16384)), (36, 87, 7))

    def test_is_found_in_a_list_of_gemini_answers(self):
        pieces = [gemini("a", promptTokenCount=4, candidatesTokenCount=1), gemini("b", **GEMINI_USAGE)]
        handler = streamed(json.dumps(pieces, indent=1).encode(), 50, "application/json; charset=UTF-8")
        self.assert_usage(self.usage_of("/v1beta/models/g:streamGenerateContent", handler), (4, 5))

    def test_that_is_no_number_is_none(self):
        for value in ("7", -1, True, None, 1.5, [7], {"n": 7}, "x" * 1000, 10**400):
            with self.subTest(value):
                answer = {"usage": {"input_tokens": value, "output_tokens": value}}
                usage = self.usage_of("/v1/messages", lambda conn, request: conn.respond_json(answer))  # noqa: B023
                for count in (usage or {}).values():
                    self.assertIn(type(count), (int, float))
                    self.assertGreaterEqual(count, 0)
                self.assertLess(len(json.dumps(usage)), 100)

    def test_in_a_broken_answer_is_none_and_the_answer_passes_as_it_is(self):
        for body in (b'{"usage": {"input_tokens": 1', b'{"usage": [[[[' * 20000, b'{"usage": "\xff\xfe"}', b"null", b"[1, null]"):
            with self.subTest(body[:30]):
                headers = [("Content-Type", "application/json")]
                self.upstream.script(lambda conn, request: conn.respond(200, headers, body))  # noqa: B023
                answer = self.served.post_json(CHAT, {})
                self.assertEqual(answer.body, body)
                self.assertIsNone(self.lines_of(answer)["response"]["usage"])

    def test_is_there_of_a_stream_whose_caller_left(self):
        def handler(conn, request):
            conn.start_stream()
            conn.chunk(b"event: message_start\ndata: " + json.dumps(ANTHROPIC_START).encode() + b"\n\n")
            conn.wait_gone()

        self.upstream.script(handler)
        with self.served.connect() as caller:
            caller.send(self.served.post_bytes("/v1/messages", {"stream": True}))
            head = caller.read_head()
            caller.read_chunk()
        line = self.lines_of(head)["response"]
        self.assertEqual(line["outcome"], "client_disconnected")
        self.assertEqual(line["usage"]["input_tokens"], 28)


def streamed(data, size=None, content_type="text/event-stream"):
    """A handler that sends this in chunks of `size` bytes, or event by event."""
    pieces = [data[at : at + size] for at in range(0, len(data), size)] if size else re.findall(rb"(?s).+?(?:\n\r?\n|\Z)", data)

    def handler(conn, request):
        conn.start_stream(content_type)
        for piece in pieces:
            conn.chunk(piece)
        conn.end()

    return handler


# ------------------------------------------------------------------------------------------------
# Outcomes


class Outcome(EventLogTestCase):
    config = {"upstream_timeout_seconds": 1}

    def test_is_what_the_caller_got(self):
        redirect = [("Location", "https://elsewhere.example/")]

        def aborted(conn, request):
            conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of it")
            conn.close()

        cases = {
            "an answer": (lambda conn, request: conn.respond_json({}), 200, "ok"),
            "no body": (lambda conn, request: conn.respond(204), 204, "ok"),
            "a 304": (lambda conn, request: conn.respond(304), 304, "ok"),
            "a 400": (lambda conn, request: conn.respond_json({}, 400), 400, "upstream_error"),
            "a 403": (lambda conn, request: conn.respond_json({}, 403), 403, "upstream_error"),
            "a 429": (lambda conn, request: conn.respond_json({}, 429), 429, "upstream_error"),
            "a 500": (lambda conn, request: conn.respond_json({}, 500), 500, "upstream_error"),
            "a 529": (lambda conn, request: conn.respond_json({}, 529), 529, "upstream_error"),
            "a redirect": (lambda conn, request: conn.respond(302, redirect), 502, "upstream_redirect"),
            "no HTTP": (lambda conn, request: conn.send(b"SSH-2.0-x\r\n\r\n"), 502, "upstream_protocol_error"),
            "nothing": (lambda conn, request: conn.close(), 502, "upstream_unreachable"),
            "silence": (lambda conn, request: conn.wait_gone(), 504, "upstream_timeout"),
            "half an answer": (aborted, 200, "upstream_aborted"),
            "a refused secret": (lambda conn, request: conn.respond(401), 502, "upstream_rejected_secret"),
        }
        for case, (handler, status, outcome) in cases.items():
            with self.subTest(case):
                self.upstream.forget()
                self.upstream.script(handler)
                with contextlib.suppress(http.client.IncompleteRead, ConnectionResetError):
                    answer = self.served.post_json(CHAT, {"model": "m"})
                    self.assertEqual(answer.status, status, answer)
                    self.lines_of(answer)
                line = self.last_response()
                self.assertEqual((line["status"], line["outcome"]), (status, outcome))
                self.assertGreaterEqual(line["duration_ms"], 0)

    def test_of_a_caller_who_left_before_any_answer_has_no_status(self):
        broker = self.broker(self.upstream)
        self.upstream.script(lambda conn, request: conn.wait_gone())
        with broker.connect() as caller:
            caller.send(broker.post_bytes(CHAT, {"model": "m"}))
            self.upstream.wait_for_requests(1)
        line = self.last_response(broker)
        self.assertEqual((line["status"], line["outcome"]), (None, "client_disconnected"))
        self.assertEqual((line["ttfb_ms"], line["response_bytes"]), (None, 0))

    def test_of_a_caller_who_left_in_the_middle_has_the_status_that_it_saw(self):
        def handler(conn, request):
            conn.start_stream()
            conn.chunk(b"data: 1\n\n")
            conn.wait_gone()

        broker = self.broker(self.upstream)
        self.upstream.script(handler)
        with broker.connect() as caller:
            caller.send(broker.post_bytes(CHAT, {"stream": True}))
            caller.read_head()
            caller.read_chunk()
        line = self.last_response(broker)
        self.assertEqual((line["status"], line["outcome"]), (200, "client_disconnected"))

    def test_is_that_nobody_listens(self):
        broker = self.broker(config={"upstream_base_url": NOBODY})
        self.assert_refused(broker.post_json(CHAT, {}), 502, "upstream_unreachable")
        line = self.last_response(broker)
        self.assertEqual((line["status"], line["outcome"]), (502, "upstream_unreachable"))


    def test_of_a_stream_that_began_well_and_tells_an_error_is_one(self):
        begin = b'data: {"choices": [{"delta": {"content": "error"}}]}\n\n'
        error = {"error": {"message": "overloaded", "type": "server_error"}}
        streams = {
            "OpenAI": begin + b"data: " + json.dumps(error).encode() + b"\n\n",
            "OpenAI, responses": b'event: response.failed\ndata: {"type": "response.failed", "response": {}}\n\n',
            "Anthropic": b'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error"}}\n\n',
            "only by its name": begin + b'event: error\ndata: {"message": "x"}\n\n',
            "bare, between events": begin + json.dumps(error).encode() + b"\n",
        }
        harmless = {
            "null": b'data: {"choices": [], "error": null}\n\n',
            "in what the model wrote": b'data: {"choices": [{"delta": {"content": "event: error\\n\\n{\\"error\\": 1}"}}]}\n\n',
        }
        for wanted, cases in {"upstream_error": streams, "ok": harmless}.items():
            for case, data in cases.items():
                for size in (None, 5):
                    with self.subTest(case, size=size):
                        self.upstream.script(streamed(data, size))
                        answer = self.served.post_json(CHAT, {"model": "m", "stream": True})
                        self.assertEqual((answer.status, answer.body), (200, data))
                        line = self.lines_of(answer)["response"]
                        self.assertEqual((line["status"], line["outcome"]), (200, wanted))


class OutcomeOfADryRun(EventLogTestCase):
    dry_run = True

    def test_is_dry_run(self):
        lines = self.lines_of(self.served.post_json(CHAT, {"model": "m", "stream": True}))
        self.assertEqual((lines["request"]["mode"], lines["request"]["stream"]), ("dry_run", True))
        self.assertEqual((lines["response"]["status"], lines["response"]["outcome"]), (200, "dry_run"))
        self.assertGreater(lines["response"]["response_bytes"], 0)


# ------------------------------------------------------------------------------------------------
# Denied


class DeniedLine(EventLogTestCase):
    def test_says_what_was_refused_and_why(self):
        host = [("Host", "evil.example")]
        cases = {
            "no token": ({"method": "GET", "path": "/v1/models?q=1", "token": False}, 401, "client_token_required"),
            "another host": ({"method": "GET", "path": "/v1/models", "headers": host}, 403, "host_not_allowed"),
            "another path": ({"method": "GET", "path": "/v1/unknown?q=1"}, 403, "path_not_allowed"),
            "another method": ({"method": "PATCH", "path": "/v1/models"}, 405, "method_not_allowed"),
            "no JSON": ({"method": "POST", "path": CHAT, "body": "{", "headers": JSON}, 400, "invalid_json"),
            "another type": ({"method": "POST", "path": CHAT, "body": "{}"}, 415, "content_type_not_supported"),
        }
        for case, (request, status, reason) in cases.items():
            with self.subTest(case):
                answer = self.served.request(**request)
                self.assert_refused(answer, status, reason)
                line = self.lines_of(answer)["denied"]
                self.assertEqual((line["status"], line["reason"]), (status, reason))
                self.assertEqual((line["method"], line["path"]), (request["method"], request["path"].partition("?")[0]))

    def test_of_what_is_no_request_names_nothing(self):
        for data in (b"\0\r\n\r\n", b"GET\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\nHost: a\r\n\r\n"):
            with self.subTest(data):
                answer = self.served.raw_answers(data)[0]
                line = self.lines_of(answer)["denied"]
                self.assertEqual((line["status"], line["reason"]), (400, "bad_request"))

    def test_of_a_refused_head_says_what_could_be_read_of_it(self):
        path = "/v1/" + "x" * 3000
        heads = {
            f"GET {path}": ("GET", path[:256]),
            f"POST {path}?key=hidden-in-the-query": ("POST", path[:256]),
            "PATCH /v1//models": ("PATCH", "/v1//models"),
            "GET /v1/models;x": ("GET", "/v1/models;x"),
        }
        for line, wanted in heads.items():
            with self.subTest(line[:40]):
                data = f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
                answer = self.served.raw_answers(data)[0]
                self.assert_refused(answer, 400, "bad_request")
                denied = self.lines_of(answer)["denied"]
                self.assertEqual((denied["method"], denied["path"]), wanted)
        self.assertNotIn(b"hidden-in-the-query", self.raw_log())

    def test_is_not_written_for_the_health_check_or_a_caller_who_says_nothing(self):
        before = self.raw_log()
        self.served.request("GET", "/healthz", token=False)
        self.served.raw(b"", half_close=True)
        # What follows is in order: had they caused a line, it would stand before this one.
        self.lines_of(self.served.request("GET", "/v1/unknown"))
        new = self.raw_log()[len(before) :]
        self.assertEqual(new.count(b"\n"), 1)


JSON = [("Content-Type", "application/json")]


class Strangers(EventLogTestCase):
    def test_cannot_fill_the_disk(self):
        broker = self.broker(self.upstream)
        for _ in range(30):
            broker.request("GET", "/v1/models", token=False)
        for _ in range(25):
            broker.request("GET", "/v1/models", headers={"Host": "evil.example"}, token=False)
        for _ in range(3):
            broker.request("GET", "/v1/models", headers={"Origin": "http://evil.example"}, token=False)
        # An agent with a token can't do so either, and is counted for itself.
        for _ in range(30):
            broker.request("GET", "/v1/unknown")
        written = [event["reason"] for event in broker.events() if event["event"] == "denied"]
        counts = {reason: written.count(reason) for reason in written}
        wanted = {
            "client_token_required": 20,
            "host_not_allowed": 20,
            "browser_not_allowed": 3,
            "path_not_allowed": 20,
        }
        self.assertEqual(counts, wanted)
        self.assertFalse([event for event in broker.events() if "suppressed" in event])
        broker.signal(signal.SIGTERM)
        broker.wait()
        counts = {(event.get("client"), event["reason"]): event["suppressed"] for event in broker.events("denied")[-3:]}
        wanted = {(None, "client_token_required"): 10, (None, "host_not_allowed"): 5, ("default", "path_not_allowed"): 10}
        self.assertEqual(counts, wanted)
        self.assertEqual(broker.events()[-1]["event"], "stop")

    @slow
    def test_are_counted_in_the_first_line_of_the_next_minute(self):
        broker = self.broker(self.upstream)
        for _ in range(27):
            broker.request("GET", "/v1/models", token=False)

        def line_with_a_count():
            broker.request("GET", "/v1/models", token=False)
            return [event for event in broker.events() if "suppressed" in event]

        began = time.monotonic()
        line = eventually(line_with_a_count, 80, "a line that counts the others")[0]
        self.assertGreater(time.monotonic() - began, 50)
        self.assertEqual(line["reason"], "client_token_required")
        self.assertGreaterEqual(line["suppressed"], 7)


# ------------------------------------------------------------------------------------------------
# What never stands in it


class WhatOthersChose(EventLogTestCase):
    """Attack: somebody writes lines of his own into the log, or learns from it what it must not hold."""

    def test_is_cut_at_256_characters(self):
        longer = "x" * 200 + "y" * 700
        self.upstream.script(lambda conn, request: conn.respond(200, [("x-request-id", longer)]))
        lines = self.lines_of(self.served.post_json("/openai/deployments/" + longer + "/chat/completions", {"model": longer}))
        self.assertEqual(lines["request"]["model"], longer[:256])
        self.assertEqual(lines["request"]["path"], ("/openai/deployments/" + longer)[:256])
        self.assertEqual(lines["response"]["upstream_request_id"], longer[:256])
        denied = self.lines_of(self.served.request("M" * 1000, "/" + longer))["denied"]
        self.assertEqual((denied["method"], denied["path"]), ("M" * 256, ("/" + longer)[:256]))

    def test_makes_no_line_of_its_own(self):
        forged = '{"time":"2026-01-01T00:00:00.000Z","event":"request","id":"forged"}'
        ends = ["\n", "\r", "\r\n", "\0", "\x0b", "\x0c", "\x1b[2J", "\x1c", "\x85", "\u2028", "\u2029", '"}\n', "\\n", "\ud800"]
        for end in ends:
            with self.subTest(repr(end)):
                before = len(self.served.events())
                answer = self.served.post_json(CHAT, {"model": end + forged + end})
                lines = self.lines_of(answer)
                self.assertEqual(lines["request"]["model"], end + forged + end)
                self.assertEqual(len(self.served.events()), before + 2)
        heads = [
            b"GET /v1/models\n" + forged.encode() + b" HTTP/1.1\r\n",
            b"GET /v1/mo\rdels HTTP/1.1\r\n",
            b"GET /v1/mo\x1b[2Jdels HTTP/1.1\r\n",
            b'GET /"}{"event":"stop"} HTTP/1.1\r\n',
            "GET /\u2028 HTTP/1.1\r\n".encode(),
            b"G\x1bET / HTTP/1.1\r\n",
            b'G"}T /x HTTP/1.1\r\n',
        ]
        for head in heads:
            with self.subTest(head):
                answers = self.served.raw_answers(head + b"Host: 127.0.0.1\r\n\r\n", half_close=True)
                self.assertEqual(answers[0].status, 400)
        data = self.raw_log()
        self.assertNotRegex(data, rb"[^\n -~]")
        # However somebody reads lines, there are as many as events.
        text = data.decode()
        self.assertEqual(len(text.splitlines()), text.count("\n"))
        self.assertEqual(len(whole_log(self.served.log_path)), text.count("\n"))
        self.assertNotIn("forged", [event.get("id") for event in self.served.events()])

    def test_does_not_become_the_secret_by_the_escapes_of_json(self):
        # Attack: the secret has a backslash, and what the caller sends is it without.
        for secret, model in (
            ('sk-0123456789\\"abcdef', "sk-0123456789\\u0022abcdef"),
            ("sk-0123456789\\u00e9abcdef", "sk-0123456789éabcdef"),
        ):
            with self.subTest(secret):
                broker = self.broker(self.stub(lambda conn, request: conn.respond_json({})), secret=secret)
                answer = broker.request("POST", CHAT, f'{{"model": "{model}"}}'.encode(), [("Content-Type", "application/json")])
                self.assertEqual(answer.status, 200)
                self.assertEqual(broker.wait_event(event="request")["model"], "[redacted]")

    def test_brings_no_secret_and_no_token_in(self):
        # The leak check at the end looks for them in all forms; here are the ways in which they may come.
        served = self.broker(self.upstream)
        served.check_token_in_answers = False
        for value in (served.secret, served.token):
            for form in (value, value.encode().hex(), "x" * 215 + value, "x" * 225 + value, "x" * 250 + value):
                requests = [
                    {"method": "GET", "path": "/v1/models/" + form},
                    {"method": "GET", "path": "/" + form},
                    {"method": "GET", "path": "/" + form, "token": False},
                    {"method": "GET", "path": "/v1/models?a=" + form},
                    {"method": form.replace("=", ""), "path": CHAT},
                    {"method": form.replace("=", ""), "path": CHAT, "token": False},
                    {"method": "POST", "path": CHAT, "body": {"model": form}},
                    {"method": "POST", "path": CHAT, "body": {"model": "m", "n": form}},
                ]
                for request in requests:
                    with self.subTest(request):
                        served.request(**request)
                # In JSON the same text can be written in another way.
                escaped = "".join(f"\\u{ord(character):04x}" for character in form)
                served.request("POST", CHAT, b'{"model": "%s"}' % escaped.encode(), JSON)
        served.request("GET", "/healthz")
        data = self.raw_log(served).decode()
        for value in (served.secret, served.token):
            # Nor what a cut at 256 characters leaves of one.
            self.assertNotIn(value.partition("canary-")[2][:8], data)

    def test_is_no_prompt_no_completion_and_no_query(self):
        words = [canary() for _ in range(6)]
        self.upstream.script(
            lambda conn, request: conn.respond_json({"choices": [{"message": {"content": words[2]}}]}),
            lambda conn, request: conn.respond_json({"error": {"message": words[3]}}, 500),
        )
        served = self.broker(self.upstream)
        prompt = {"model": "m", "messages": [{"content": words[0]}], "user": words[1]}
        headers = {"X-Note": words[4]}
        self.assertIn(words[2].encode(), served.post_json(CHAT + "?after=" + words[5], prompt, headers).body)
        self.assertIn(words[3].encode(), served.post_json(CHAT, prompt).body)
        served.post_json("/v1/unknown?after=" + words[5], prompt, headers)
        served.post_json(CHAT + "?key=" + words[5], prompt)
        served.request("POST", CHAT, json.dumps(prompt).encode() + b"}", JSON)
        served.signal(signal.SIGTERM)
        served.wait()
        seen = self.raw_log(served).decode() + served.stderr_text() + served.stdout_text()
        for word in words:
            self.assertNotIn(word, seen)


# ------------------------------------------------------------------------------------------------
# The file


@posix_only
class File(EventLogTestCase):
    def test_is_for_its_user_alone_even_if_it_was_not(self):
        folder = self.folder()
        path = os.path.join(folder, "events.jsonl")
        open(path, "w").close()
        os.chmod(path, 0o666)
        broker = self.broker(dry_run=True, folder=folder)
        broker.post_json(CHAT, {})
        self.assertEqual(os.stat(path).st_mode & 0o7777, 0o600)

    def test_is_neither_a_link_nor_a_fifo_nor_somebody_elses(self):
        victim = os.path.join(self.folder(), "victim")

        cases = {
            "a link": lambda run: os.symlink(victim, run.log_path),
            "a link to nowhere": lambda run: os.symlink(victim + ".new", run.log_path),
            "a FIFO": lambda run: os.mkfifo(run.log_path),
            "a folder": lambda run: os.mkdir(run.log_path),
            "a second name": lambda run: os.link(victim, run.log_path),
        }
        if os.getuid() == 0:

            def of_another(run):
                open(run.log_path, "w").close()
                os.chown(run.log_path, 65534, 65534)

            cases["of another user"] = of_another
        with open(victim, "w", encoding="ascii") as file:
            file.write("precious\n")
        calls = run_each({case: {"args": ["--dry-run"], "prepare": prepare} for case, prepare in cases.items()})
        for case, call in calls.items():
            with self.subTest(case):
                run = call()
                self.assertEqual(run.returncode, 1, run.stderr)
                self.assertIn("events.jsonl", run.stderr)
                self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
                if case.startswith("a link"):
                    self.assertRegex(run.stderr, "is a link.*name the file itself|is a link.*remove it")
        with open(victim, encoding="ascii") as file:
            self.assertEqual(file.read(), "precious\n")
        self.assertFalse(os.path.exists(victim + ".new"))

    def test_deleted_while_running_is_made_anew(self):
        self.served.post_json(CHAT, {"model": "before"})
        os.unlink(self.served.log_path)
        self.lines_of(self.served.post_json(CHAT, {"model": "after"}))
        self.assertEqual([event.get("model") for event in self.served.events() if event["event"] == "request"], ["after"])
        self.assertEqual(os.stat(self.served.log_path).st_mode & 0o7777, 0o600)

    def test_deleted_and_replaced_by_a_link_is_not_written(self):
        broker = self.broker(self.upstream)
        victim = os.path.join(self.folder(), "victim")
        os.unlink(broker.log_path)
        os.symlink(victim, broker.log_path)
        self.assert_refused(broker.post_json(CHAT, {}), 503, "event_log_unavailable")
        self.assertEqual(self.upstream.requests, [])
        self.assertFalse(os.path.exists(victim))
        os.unlink(broker.log_path)
        self.assertEqual(broker.post_json(CHAT, {}).status, 200)

    def test_with_a_torn_last_line_gets_it_ended_first(self):
        folder = self.folder()
        path = os.path.join(folder, "events.jsonl")
        torn = b'{"time":"2026-01-01T00:00:00.000Z","event":"requ'
        with open(path, "wb") as file:
            file.write(torn)
        broker = self.broker(dry_run=True, folder=folder)
        broker.post_json(CHAT, {"model": "m"})
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
        self.assertEqual(lines[0], torn)
        self.assertEqual(json.loads(lines[1])["event"], "start")
        self.assertNotIn(b"", lines[:-1])

    def test_that_is_there_is_appended_to(self):
        folder = self.folder()
        for _ in range(2):
            with Broker(dry_run=True, folder=folder) as broker:
                broker.post_json(CHAT, {})
        names = [event["event"] for event in whole_log(os.path.join(folder, "events.jsonl"))]
        self.assertEqual(names, ["start", "request", "response", "stop"] * 2)


class ManyAtOnce(EventLogTestCase):
    def test_write_whole_lines(self):
        def many(number):
            connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=30)
            for turn in range(25):
                headers = {"X-Broker-Token": self.served.token, "Content-Type": "application/json"}
                connection.request("POST", CHAT, json.dumps({"model": f"m-{number}-{turn}-" + "x" * 200}), headers)
                connection.getresponse().read()
            connection.close()

        callers = [threading.Thread(target=many, args=(number,)) for number in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        self.last_response()
        events = whole_log(self.served.log_path)
        models = {event["model"][:12].rstrip("-x") for event in events if event["event"] == "request"}
        self.assertEqual(len(models), 200)
        for kind in ("request", "response"):
            self.assertEqual(len({event["id"] for event in events if event["event"] == kind}), 200)


@posix_only
class Rotation(EventLogTestCase):
    def test_by_renaming_and_sighup_loses_no_line(self):
        done = threading.Event()
        sent = []

        def ask(number):
            while not done.is_set():
                name = f"m-{number}-{len(sent)}"
                if self.served.post_json(CHAT, {"model": name}).status == 200:
                    sent.append(name)

        callers = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for caller in callers:
            caller.start()
        logs = [self.served.log_path]
        try:
            for turn in range(4):
                logs.append(f"{self.served.log_path}.{turn}")
                os.rename(self.served.log_path, logs[-1])
                self.served.signal(signal.SIGHUP)
                self.served.wait_event(event="reload")
                self.served.wait_event(event="response")
        finally:
            done.set()
            for caller in callers:
                caller.join()
        self.last_response_is_written(logs, len(sent))
        events = whole_log(*logs)
        models = [event["model"] for event in events if event["event"] == "request"]
        self.assertEqual(sorted(models), sorted(sent))
        for kind in ("request", "response"):
            self.assertEqual(len({event["id"] for event in events if event["event"] == kind}), len(sent))

    def last_response_is_written(self, logs, count):
        def all_there():
            return sum(event["event"] == "response" for event in whole_log(*logs)) >= count

        eventually(all_there, what="all response lines")


# ------------------------------------------------------------------------------------------------
# A log that can't be written


@posix_only
class LogThatCannotBeWritten(EventLogTestCase):
    def assert_refuses_and_recovers(self, broker, make_room):
        """Fill it, see requests turned away, make room, see them served."""
        stub = broker.upstream
        served = []

        def refused():
            answer = broker.post_json(CHAT, {"model": f"m-{len(served)}-" + "x" * 200})
            if answer.status == 200:
                served.append(answer)
                return None
            return answer

        self.assert_refused(eventually(refused, 20, "a full log"), 503, "event_log_unavailable")
        self.assertEqual(len(stub.requests), len(served))
        for _ in range(3):
            self.assert_refused(broker.post_json(CHAT, {"model": "no"}), 503, "event_log_unavailable")
        self.assertEqual(len(stub.requests), len(served))
        self.assertEqual(broker.request("GET", "/healthz").status, 200)
        # A refusal needs no line in order to be one.
        self.assert_refused(broker.request("GET", "/v1/unknown"), 403, "path_not_allowed")
        broker.wait_stderr(re.escape(broker.log_path))
        make_room()
        self.assertEqual(broker.post_json(CHAT, {"model": "again"}).status, 200)
        self.assertEqual(len(stub.requests), len(served) + 1)
        # What was written in part is one line, and none of the others suffered.
        with open(broker.log_path, "rb") as file:
            lines = file.read().split(b"\n")
        events, broken = [], []
        for line in filter(None, lines):
            try:
                events.append(json.loads(line))
            except ValueError:
                broken.append(line)
        self.assertLessEqual(len(broken), 1, broken)
        self.assertEqual([event["model"] for event in events if event["event"] == "request"][-1], "again")

    def test_at_its_limit_of_size_stops_the_forwarding_until_there_is_room(self):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))

        stub = self.stub()
        broker = self.broker(stub, preexec_fn=limit)

        def make_room():
            with open(broker.log_path, "rb") as file:
                os.truncate(broker.log_path, len(file.readline()))

        self.assert_refuses_and_recovers(broker, make_room)

    @linux_only
    def test_on_a_full_disk_stops_the_forwarding_until_there_is_room(self):
        disk = os.path.join(self.folder(), "disk")
        os.mkdir(disk)
        if os.getuid() != 0 or shutil.which("mount") is None:
            self.skipTest("only root can make a small disk")
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k,mode=700", "broker-test", disk], capture_output=True)
        if made.returncode:
            self.skipTest(f"no small disk can be made: {made.stderr.decode()}")
        self.addCleanup(subprocess.run, ["umount", "-l", disk], check=True, timeout=20)
        ballast = os.path.join(disk, "ballast")
        with open(ballast, "wb") as file:
            file.write(b"x" * 4096)
        stub = self.stub()
        broker = self.broker(stub, config={"event_log": os.path.join(disk, "events.jsonl")})
        self.assert_refuses_and_recovers(broker, lambda: os.unlink(ballast))

    def test_because_its_folder_is_gone_stops_the_forwarding_until_it_is_back(self):
        stub, folder = self.stub(), os.path.join(self.folder(), "logs")
        os.mkdir(folder)
        broker = self.broker(stub, config={"event_log": os.path.join(folder, "events.jsonl")})
        shutil.rmtree(folder)
        self.assert_refused(broker.post_json(CHAT, {}), 503, "event_log_unavailable")
        self.assertEqual(stub.requests, [])
        os.mkdir(folder)
        self.assertEqual(broker.post_json(CHAT, {}).status, 200)

    def test_stops_a_dry_run_as_well(self):
        broker = self.broker(dry_run=True)
        os.unlink(broker.log_path)
        os.mkdir(broker.log_path)
        self.assert_refused(broker.post_json(CHAT, {}), 503, "event_log_unavailable")
        os.rmdir(broker.log_path)
        self.assertEqual(broker.post_json(CHAT, {}).status, 200)

    def test_after_the_request_was_written_cuts_no_answer(self):
        release = threading.Event()

        def hold(conn, request):
            conn.start_stream()
            conn.chunk(b"data: 1\n\n")
            conn.hold(release)
            conn.chunk(b"data: 2\n\n")
            conn.end()

        stub = self.stub(hold)
        broker = self.broker(stub)
        with broker.connect() as caller:
            caller.send(broker.post_bytes(CHAT, {"model": "m"}))
            head = caller.read_head()
            caller.read_chunk()
            os.unlink(broker.log_path)
            os.mkdir(broker.log_path)
            release.set()
            self.assertEqual(caller.read_body(head), b"data: 2\n\n")
        broker.wait_stderr(re.escape(broker.log_path))
        os.rmdir(broker.log_path)


# ------------------------------------------------------------------------------------------------
# kill -9


@posix_only
class KilledAtAnyMoment(EventLogTestCase):
    def test_has_written_down_each_request_that_reached_the_upstream(self):
        stub = self.stub()
        folder, random = self.folder(), seeded("kill -9")
        secret = canary()
        for life in range(8):
            broker = self.broker(stub, folder=folder, secret=secret)
            ended = threading.Event()

            def ask(number, broker=broker, life=life, ended=ended):
                turn = 0
                while not ended.is_set():
                    turn += 1
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        broker.post_json(CHAT, {"model": f"life {life} caller {number} turn {turn}"}, timeout=5)

            callers = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
            for caller in callers:
                caller.start()
            # Not after a time but after so many requests: it hits the middle of one at any speed.
            stub.wait_for_requests(len(stub.requests) + random.randrange(1, 40))
            broker.process.kill()
            broker.wait()
            ended.set()
            for caller in callers:
                caller.join()
            with open(broker.log_path, "rb") as file:
                lines = file.read().split(b"\n")
            # The last one may be torn; then it is what follows the last line end.
            events = [json.loads(line) for line in lines[:-1] if line]
            written = {event["model"] for event in events if event["event"] == "request"}
            for request in list(stub.requests) + list(stub.incomplete):
                if request.body:
                    self.assertIn(request.json()["model"], written)
        # The next start goes on as if nothing had been.
        broker = self.broker(stub, folder=folder, secret=secret)
        self.assertEqual(broker.post_json(CHAT, {"model": "at last"}).status, 200)
        broker.wait_event(event="request", model="at last")
        self.assertEqual(sum(event["event"] == "start" for event in broker.events()), 9)


if __name__ == "__main__":
    unittest.main()
