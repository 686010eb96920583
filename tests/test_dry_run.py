"""Dry-run: canned answers in each provider's own shape, no secret read, nothing sent.

The shapes are written down field by field from the providers' references; a client's own library
looks at them in test_sdks.py.
"""

import base64
import json
import os
import re
import struct
import unittest

from tests.support import (
    ABSENT,
    ALLOWED_PATHS,
    SECRET_VARIABLE,
    BrokerTestCase,
    fresh_token,
    make_executable,
    posix_only,
)

CHAT = "/v1/chat/completions"
GEMINI = "/v1beta/models/gemini-x:"


def parse_events(body):
    """(event name or None, data) of each server-sent event; strict about how they are written."""
    text = body.decode()
    if not text.endswith("\n\n"):
        raise AssertionError(f"the last event does not end: {text[-100:]!r}")
    events = []
    for block in text[:-2].split("\n\n"):
        match = re.fullmatch(r"(?:event: ([\w.]+)\n)?data: ([^\n]+)", block)
        if not match:
            raise AssertionError(f"not an event: {block!r}")
        events.append(match.groups())
    return events


class DryRunTestCase(BrokerTestCase):
    """One broker for each class. Its upstream is a real one, so that a request to it would be seen."""

    allowed = [*ALLOWED_PATHS, "/v1/responses/compact", "/v1/whatever", "GET /v1/whatever/*", "GET /anthropic/v1/models"]

    @classmethod
    def setUpClass(cls):
        if cls is DryRunTestCase:
            return
        cls.upstream = cls.class_stub()
        config = {"allowed_paths": cls.allowed, "upstream_base_url": cls.upstream.url + "/base"}
        cls.served = cls.class_broker(cls.upstream, config=config, dry_run=True)

    def tearDown(self):
        if hasattr(self, "upstream"):
            self.assertEqual(self.upstream.connections, 0)

    def post(self, path, body, content_type="application/json"):
        answer = self.served.post_json(path, body)
        self.assertEqual(answer.status, 200, answer)
        self.assertEqual(answer.header("Content-Type").partition(";")[0], content_type)
        return answer

    def post_stream(self, path, body):
        return parse_events(self.post(path, body, "text/event-stream").body)

    def assert_says(self, text, path, method="POST"):
        """What would have been sent where, with which kind of credential."""
        for words in (method, self.upstream.url + "/base" + path, "Authorization", SECRET_VARIABLE):
            self.assertIn(words, text)
        self.assertRegex(text, "(?i)dry.?run")

    def assert_counts(self, usage, *names):
        for name in names:
            self.assertIs(type(usage[name]), int, name)
            self.assertGreaterEqual(usage[name], 0, name)


class OpenAIChat(DryRunTestCase):
    REQUEST = {"model": "gpt-x", "messages": [{"role": "user", "content": "hello"}]}

    def assert_envelope(self, answer, kind):
        self.assertEqual(answer["object"], kind)
        self.assertEqual(answer["model"], "gpt-x")
        self.assertIs(type(answer["id"]), str)
        self.assertIs(type(answer["created"]), int)
        # OpenRouter's client wants a string there, Cerebras' wants it to be there.
        self.assertIs(type(answer["system_fingerprint"]), str)

    def test_is_a_chat_completion(self):
        answer = self.post(CHAT, self.REQUEST).json()
        self.assert_envelope(answer, "chat.completion")
        (choice,) = answer["choices"]
        self.assertEqual((choice["index"], choice["finish_reason"], choice["logprobs"]), (0, "stop", None))
        message = choice["message"]
        self.assertEqual((message["role"], message["refusal"]), ("assistant", None))
        self.assert_says(message["content"], CHAT)
        usage = answer["usage"]
        self.assert_counts(usage, "prompt_tokens", "completion_tokens", "total_tokens")
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])

    def chunks(self, **more):
        events = self.post_stream(CHAT, {**self.REQUEST, "stream": True, **more})
        self.assertEqual({name for name, _ in events}, {None})
        self.assertEqual(events[-1][1], "[DONE]")
        chunks = [json.loads(data) for _, data in events[:-1]]
        for chunk in chunks:
            self.assert_envelope(chunk, "chat.completion.chunk")
        self.assertEqual(len({(chunk["id"], chunk["created"]) for chunk in chunks}), 1)
        return chunks

    def assert_deltas(self, chunks):
        for chunk in chunks:
            (choice,) = chunk["choices"]
            self.assertEqual(choice["index"], 0)
            self.assertIsNone(chunk.get("usage"))
        choices = [chunk["choices"][0] for chunk in chunks]
        self.assertEqual(choices[0]["delta"]["role"], "assistant")
        self.assertEqual([choice["finish_reason"] for choice in choices], [None] * (len(choices) - 1) + ["stop"])
        self.assertEqual(choices[-1]["delta"], {})
        # As a stream it comes in more than one piece, or nobody would see that it is one.
        pieces = [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]
        self.assertGreater(len(pieces), 1)
        self.assert_says("".join(pieces), CHAT)

    def test_streams_chunks_up_to_done(self):
        self.assert_deltas(self.chunks())

    def test_streams_the_usage_last_if_asked_for_it(self):
        *chunks, last = self.chunks(stream_options={"include_usage": True})
        self.assert_deltas(chunks)
        self.assertEqual(last["choices"], [])
        self.assert_counts(last["usage"], "prompt_tokens", "completion_tokens", "total_tokens")
        for options in ({"include_usage": False}, {}, None):
            self.assert_deltas(self.chunks(stream_options=options))

    def test_streams_only_where_stream_is_true(self):
        for stream in (False, None, 0):
            self.assertEqual(self.post(CHAT, {**self.REQUEST, "stream": stream}).json()["object"], "chat.completion")

    def test_is_that_of_an_azure_deployment_too(self):
        path = "/openai/deployments/mine/chat/completions"
        answer = self.post(path + "?api-version=2024-10-21", self.REQUEST).json()
        self.assertEqual(answer["object"], "chat.completion")
        self.assert_says(answer["choices"][0]["message"]["content"], path)


class OpenAICompletions(DryRunTestCase):
    PATH = "/v1/completions"
    REQUEST = {"model": "gpt-x", "prompt": "hello"}

    def texts(self, answers):
        """The text of each, with what all of them have in common looked at."""
        for answer in answers:
            self.assertEqual((answer["object"], answer["model"]), ("text_completion", "gpt-x"))
            self.assertEqual([type(answer[name]) for name in ("id", "created", "system_fingerprint")], [str, int, str])
            (choice,) = answer["choices"]
            self.assertEqual((choice["index"], choice["logprobs"]), (0, None))
        finishes = [answer["choices"][0]["finish_reason"] for answer in answers]
        self.assertEqual(finishes, [None] * (len(answers) - 1) + ["stop"])
        return [answer["choices"][0]["text"] for answer in answers]

    def test_are_a_text(self):
        answer = self.post(self.PATH, self.REQUEST).json()
        (text,) = self.texts([answer])
        self.assert_says(text, self.PATH)
        usage = answer["usage"]
        self.assert_counts(usage, "prompt_tokens", "completion_tokens", "total_tokens")
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])

    def test_stream_pieces_of_it_up_to_done(self):
        events = self.post_stream(self.PATH, {**self.REQUEST, "stream": True})
        self.assertEqual({name for name, _ in events}, {None})
        self.assertEqual(events[-1][1], "[DONE]")
        texts = self.texts([json.loads(data) for _, data in events[:-1]])
        self.assertGreater(len(texts), 2)
        self.assert_says("".join(texts), self.PATH)


class OpenAIResponses(DryRunTestCase):
    PATH = "/v1/responses"
    REQUEST = {"model": "gpt-x", "input": "hello"}

    def assert_response(self, answer, status):
        self.assertEqual((answer["object"], answer["status"], answer["model"]), ("response", status, "gpt-x"))
        self.assertTrue(answer["id"].startswith("resp_"))
        self.assertIn(type(answer["created_at"]), (int, float))
        # What the reference calls required.
        for name in ("error", "incomplete_details", "instructions"):
            self.assertIsNone(answer[name], name)
        self.assertIs(type(answer["parallel_tool_calls"]), bool)
        self.assertEqual((answer["tool_choice"], answer["tools"], answer["metadata"]), ("auto", [], {}))
        self.assertIn(type(answer["temperature"]), (int, float))
        self.assertIn(type(answer["top_p"]), (int, float))

    def assert_item(self, item, text):
        self.assertEqual((item["type"], item["role"], item["status"]), ("message", "assistant", "completed"))
        self.assertTrue(item["id"].startswith("msg_"))
        self.assertEqual(item["content"], [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}])

    def test_is_a_response(self):
        answer = self.post(self.PATH, self.REQUEST).json()
        self.assert_response(answer, "completed")
        (item,) = answer["output"]
        self.assert_item(item, item["content"][0]["text"])
        self.assert_says(item["content"][0]["text"], self.PATH)
        usage = answer["usage"]
        self.assert_counts(usage, "input_tokens", "output_tokens", "total_tokens")
        self.assert_counts(usage["input_tokens_details"], "cached_tokens")
        self.assert_counts(usage["output_tokens_details"], "reasoning_tokens")
        self.assertEqual(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"])

    def test_is_compacted(self):
        path = self.PATH + "/compact"
        answer = self.post(path, self.REQUEST).json()
        self.assertEqual(answer["object"], "response.compaction")
        self.assertIn(type(answer["created_at"]), (int, float))
        (item,) = answer["output"]
        self.assertEqual(item["type"], "compaction")
        self.assert_says(item["encrypted_content"], path)
        self.assert_counts(answer["usage"], "input_tokens", "output_tokens", "total_tokens")

    def test_streams_its_events_in_order(self):
        named = self.post_stream(self.PATH, {**self.REQUEST, "stream": True})
        events = [json.loads(data) for _, data in named]
        self.assertEqual([name for name, _ in named], [event["type"] for event in events])
        self.assertEqual([event["sequence_number"] for event in events], list(range(len(events))))
        kinds = [event["type"].replace("response.", "", 1) for event in events]
        deltas = kinds.count("output_text.delta")
        self.assertGreater(deltas, 1)
        wanted = ["created", "in_progress", "output_item.added", "content_part.added"]
        wanted += ["output_text.delta"] * deltas
        wanted += ["output_text.done", "content_part.done", "output_item.done", "completed"]
        self.assertEqual(kinds, wanted)

        created, in_progress, item_added, part_added = events[:4]
        text_done, part_done, item_done, completed = events[-4:]
        for event in (created, in_progress):
            self.assert_response(event["response"], "in_progress")
            self.assertEqual((event["response"]["output"], event["response"]["usage"]), ([], None))
        self.assertEqual((item_added["output_index"], item_added["item"]["status"]), (0, "in_progress"))
        self.assertEqual(item_added["item"]["content"], [])
        identity = item_added["item"]["id"]
        for event in [part_added, *events[4:-2]]:
            self.assertEqual((event["item_id"], event["output_index"], event["content_index"]), (identity, 0, 0))
        self.assertEqual((part_added["part"]["type"], part_added["part"]["text"]), ("output_text", ""))
        text = "".join(event["delta"] for event in events[4:-4])
        self.assertEqual(text_done["text"], text)
        self.assertEqual(part_done["part"]["text"], text)
        self.assertEqual((item_done["output_index"], item_done["item"]["id"]), (0, identity))
        self.assert_item(item_done["item"], text)
        self.assert_response(completed["response"], "completed")
        self.assertEqual(completed["response"]["output"], [item_done["item"]])
        self.assert_counts(completed["response"]["usage"], "input_tokens", "output_tokens", "total_tokens")
        self.assertEqual({event["response"]["id"] for event in (created, completed)}, {created["response"]["id"]})
        self.assert_says(text, self.PATH)


class OpenAIEmbeddings(DryRunTestCase):
    PATH = "/v1/embeddings"

    def embed(self, given, **more):
        answer = self.post(self.PATH, {"model": "text-embedding-x", "input": given, **more}).json()
        self.assertEqual((answer["object"], answer["model"]), ("list", "text-embedding-x"))
        self.assert_counts(answer["usage"], "prompt_tokens", "total_tokens")
        for index, one in enumerate(answer["data"]):
            self.assertEqual((one["object"], one["index"]), ("embedding", index))
        return [one["embedding"] for one in answer["data"]]

    def test_are_a_list_of_numbers(self):
        for more in ({}, {"encoding_format": "float"}):
            (vector,) = self.embed("hello", **more)
            self.assertTrue(vector)
            for number in vector:
                self.assertIn(type(number), (int, float))

    def test_are_32_bit_floats_in_base64_if_asked_for(self):
        # As the libraries do by default.
        (encoded,) = self.embed("hello", encoding_format="base64")
        data = base64.b64decode(encoded, validate=True)
        self.assertEqual(len(data) % 4, 0)
        numbers = list(struct.unpack(f"<{len(data) // 4}f", data))
        self.assertEqual([numbers], self.embed("hello"))

    def test_are_as_many_as_the_inputs(self):
        cases = {"texts": (["a", "b", "c"], 3), "one text": (["a"], 1), "tokens": ([1, 2, 3], 1), "lists": ([[1], [2]], 2)}
        for case, (given, count) in cases.items():
            with self.subTest(case):
                self.assertEqual(len(self.embed(given)), count)
                self.assertEqual(len(self.embed(given, encoding_format="base64")), count)

    def test_have_as_many_dimensions_as_asked_for(self):
        (vector,) = self.embed("hello", dimensions=3)
        self.assertEqual(len(vector), 3)


    def test_are_bounded_whatever_is_asked_for(self):
        # 2048 inputs of 4096 dimensions are asked for with ten kilobytes.
        for more in ({}, {"encoding_format": "base64"}):
            with self.subTest(more):
                body = {"model": "m", "input": ["a"] * 2048, "dimensions": 4096, **more}
                answer = self.post(self.PATH, body)
                self.assertLess(len(answer.body), 4 << 20)
                self.assertEqual(len(answer.json()["data"]), 2048)
        for dimensions in (0, -1, 10**9, 1e9, True, "many"):
            with self.subTest(dimensions):
                self.assertLess(len(self.post(self.PATH, {"input": ["a"] * 10000, "dimensions": dimensions}).body), 4 << 20)


class Models(DryRunTestCase):
    def get(self, **headers):
        answer = self.served.request("GET", "/v1/models", headers={k.replace("_", "-"): v for k, v in headers.items()})
        self.assertEqual((answer.status, answer.header("Content-Type")), (200, "application/json"), answer)
        return answer.json()

    def test_are_those_of_openai(self):
        answer = self.get()
        self.assertEqual(answer["object"], "list")
        self.assertTrue(answer["data"])
        for model in answer["data"]:
            self.assertEqual(model["object"], "model")
            self.assertEqual([type(model[name]) for name in ("id", "created", "owned_by")], [str, int, str])

    def test_are_those_of_anthropic_where_its_version_is_named(self):
        for version in ("2023-06-01", "2026-10-21"):
            answer = self.get(anthropic_version=version)
            self.assertTrue(answer["data"])
            for model in answer["data"]:
                self.assertEqual(model["type"], "model")
                self.assertEqual([type(model[name]) for name in ("id", "display_name")], [str, str])
                self.assertRegex(model["created_at"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")
            self.assertIs(answer["has_more"], False)
            self.assertEqual((answer["first_id"], answer["last_id"]), (answer["data"][0]["id"], answer["data"][-1]["id"]))

    def test_say_nothing_to_a_head(self):
        answer = self.served.request("HEAD", "/v1/models")
        self.assertEqual((answer.status, answer.body), (200, b""))


class AnthropicMessages(DryRunTestCase):
    PATH = "/v1/messages"
    REQUEST = {"model": "claude-x", "max_tokens": 64, "messages": [{"role": "user", "content": "hello"}]}

    def assert_message(self, message):
        self.assertEqual((message["type"], message["role"], message["model"]), ("message", "assistant", "claude-x"))
        self.assertTrue(message["id"].startswith("msg_"))
        self.assertIsNone(message["stop_sequence"])
        self.assert_counts(message["usage"], "input_tokens", "output_tokens")

    def test_are_a_message(self):
        answer = self.post(self.PATH + "?beta=true", self.REQUEST).json()
        self.assert_message(answer)
        self.assertEqual(answer["stop_reason"], "end_turn")
        (block,) = answer["content"]
        self.assertEqual(block["type"], "text")
        self.assert_says(block["text"], self.PATH)

    def test_stream_their_events_in_order(self):
        named = self.post_stream(self.PATH, {**self.REQUEST, "stream": True})
        events = [json.loads(data) for _, data in named]
        self.assertEqual([name for name, _ in named], [event["type"] for event in events])
        events = [event for event in events if event["type"] != "ping"]
        start, block_start, *deltas = events[:-3]
        block_stop, message_delta, stop = events[-3:]
        self.assertEqual(start["type"], "message_start")
        self.assert_message(start["message"])
        self.assertEqual((start["message"]["content"], start["message"]["stop_reason"]), ([], None))
        self.assertEqual((block_start["type"], block_start["index"]), ("content_block_start", 0))
        self.assertEqual(block_start["content_block"], {"type": "text", "text": ""})
        self.assertGreater(len(deltas), 1)
        for delta in deltas:
            self.assertEqual((delta["type"], delta["index"]), ("content_block_delta", 0))
            self.assertEqual(delta["delta"]["type"], "text_delta")
        self.assert_says("".join(delta["delta"]["text"] for delta in deltas), self.PATH)
        self.assertEqual(block_stop, {"type": "content_block_stop", "index": 0})
        self.assertEqual(message_delta["type"], "message_delta")
        self.assertEqual(message_delta["delta"], {"stop_reason": "end_turn", "stop_sequence": None})
        self.assert_counts(message_delta["usage"], "output_tokens")
        self.assertEqual(stop, {"type": "message_stop"})

    def test_are_counted(self):
        answer = self.post(self.PATH + "/count_tokens", self.REQUEST).json()
        self.assertEqual(set(answer), {"input_tokens"})
        self.assertIs(type(answer["input_tokens"]), int)
        self.assertGreater(answer["input_tokens"], 0)


class GeminiContent(DryRunTestCase):
    REQUEST = {"contents": [{"parts": [{"text": "hello"}]}]}

    def text_of(self, answer, last=True):
        (candidate,) = answer["candidates"]
        self.assertEqual(candidate.get("index", 0), 0)
        self.assertEqual(candidate["content"]["role"], "model")
        self.assertEqual(candidate.get("finishReason"), "STOP" if last else None)
        (part,) = candidate["content"]["parts"]
        self.assertEqual(answer["modelVersion"], "gemini-x")
        self.assert_counts(answer["usageMetadata"], "promptTokenCount", "candidatesTokenCount", "totalTokenCount")
        return part["text"]

    def assert_pieces(self, answers, path):
        self.assertGreater(len(answers), 1)
        texts = [self.text_of(answer, last=answer is answers[-1]) for answer in answers]
        self.assert_says("".join(texts), path)

    def test_is_generated(self):
        path = GEMINI + "generateContent"
        self.assert_says(self.text_of(self.post(path, self.REQUEST).json()), path)

    def test_streams_server_sent_events_with_alt_sse(self):
        path = GEMINI + "streamGenerateContent"
        for query in ("?alt=sse", "?prettyPrint=false&alt=sse"):
            events = self.post_stream(path + query, self.REQUEST)
            self.assertEqual({name for name, _ in events}, {None})
            self.assert_pieces([json.loads(data) for _, data in events], path)

    def test_streams_a_list_without(self):
        path = GEMINI + "streamGenerateContent"
        for query in ("", "?alt=json"):
            self.assert_pieces(self.post(path + query, self.REQUEST).json(), path)


class AnythingElse(DryRunTestCase):
    def test_is_a_json_object_that_says_so(self):
        cases = [
            ("POST", "/v1/whatever", {"model": "m"}),
            ("GET", "/v1/whatever/else", None),
            ("DELETE", "/v1/responses/resp_1", None),
            ("POST", "/v1/responses/resp_1/cancel", None),
        ]
        for method, path, body in cases:
            with self.subTest(method=method, path=path):
                answer = self.served.request(method, path, body)
                self.assertEqual((answer.status, answer.header("Content-Type")), (200, "application/json"), answer)
                self.assertIs(type(answer.json()), dict)
                self.assert_says(answer.body.decode(), path, method)

    def test_that_is_no_json_is_answered_too(self):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = self.served.request("POST", "/v1/audio/transcriptions", b"--x\r\n\r\na\r\n--x--\r\n", headers)
        self.assertEqual(answer.status, 200)
        self.assert_says(answer.body.decode(), "/v1/audio/transcriptions")

    def test_that_is_odd_inside_is_answered_all_the_same(self):
        odd = [None, 0, True, -1, 1e300, "", "x" * 100000, [], [[]], {}, {"a": {}}, "\ud800", "\n\n", "\u2028", "</script>"]
        fields = ("model", "messages", "input", "stream_options", "dimensions", "encoding_format")
        paths = (CHAT, "/v1/responses", "/v1/embeddings", "/v1/messages", "/v1/messages/count_tokens", GEMINI + "generateContent")
        for path in paths:
            for value in odd:
                body = {**{field: value for field in fields}, "stream": len(str(value)) % 2 == 0}
                with self.subTest(path, value=str(value)[:20]):
                    answer = self.served.post_json(path, body)
                    self.assertEqual(answer.status, 200, answer)
                    if answer.header("Content-Type").startswith("text/event-stream"):
                        parse_events(answer.body)
                    else:
                        self.assertIs(type(answer.json()), dict)

    def test_does_not_repeat_the_query_or_the_body(self):
        answer = self.served.post_json(CHAT + "?after=query-of-mine", {"messages": "prompt-of-mine"})
        self.assertNotIn(b"-of-mine", answer.body)


class Credential(BrokerTestCase):
    def said(self, **config):
        broker = self.broker(dry_run=True, config={"allowed_paths": ["/v1/whatever"], **config})
        return broker.post_json("/v1/whatever", {}).body.decode()

    def test_is_named_by_its_kind(self):
        # No such program is there, and none is looked for.
        source = {"kind": "command", "argv": ["no-such-program", "read", "op://vault/item"]}
        text = self.said(secret_source=source, auth_header="x-api-key", auth_scheme="")
        for words in ("x-api-key", "command", "no-such-program"):
            self.assertIn(words, text)
        text = self.said(secret_source={"kind": "none"})
        self.assertNotIn("Authorization", text)
        self.assertNotIn("Bearer", text)


@posix_only
class NothingRead(BrokerTestCase):
    def test_and_nothing_run_or_sent(self):
        folder, stub = self.folder(), self.stub()
        program = make_executable(folder, "op", f"touch '{folder}/ran'\n")
        source = {"kind": "command", "argv": [program], "cache_seconds": 0}
        for keywords in ({"dry_run": True}, {"mode": "dry_run"}):
            with self.subTest(keywords):
                config = {"secret_source": source, **({"mode": keywords["mode"]} if "mode" in keywords else {})}
                broker = self.broker(stub, config=config, dry_run="dry_run" in keywords)
                for body in ({"model": "m"}, {"model": "m", "stream": True}):
                    self.assertEqual(broker.post_json(CHAT, body).status, 200)
                self.assertEqual(broker.request("GET", "/v1/models").status, 200)
                self.assertFalse(os.path.exists(os.path.join(folder, "ran")))
        self.assertEqual(stub.connections, 0)

    def test_so_that_a_secret_may_be_missing_or_wrong(self):
        for secret in (ABSENT, "too short"):
            with self.subTest(secret):
                broker = self.broker(dry_run=True, secret=secret)
                self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)

    def test_nor_compared_so_that_its_variable_may_hold_the_token(self):
        # In the other terminal's shell OPENAI_API_KEY is the caller token.
        token = fresh_token()
        broker = self.broker(dry_run=True, secret=token, token=token)
        self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)

    def test_and_the_token_is_asked_for_all_the_same(self):
        broker = self.broker(dry_run=True)
        self.assert_refused(broker.post_json(CHAT, {}, token=False), 401, "client_token_required")
        self.assert_refused(broker.post_json("/v1/unknown", {}), 403, "path_not_allowed")


if __name__ == "__main__":
    unittest.main()
