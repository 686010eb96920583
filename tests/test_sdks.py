"""What real clients make of the broker: the OpenAI and Anthropic SDKs for Python and Node, and curl.

Each is used as its own documentation says, with nothing changed but the base URL and the key. Where one is not
installed its tests skip themselves by name. The Node SDKs are looked for in BROKER_TEST_NODE_MODULES, else in
tests/node/node_modules.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import unittest
from unittest import mock

from tests.support import ROOT, BrokerTestCase

try:
    import openai
except ImportError:
    openai = None
try:
    import anthropic
except ImportError:
    anthropic = None

CURL = shutil.which("curl")
NODE = shutil.which("node")
NODE_MODULES = os.environ.get("BROKER_TEST_NODE_MODULES") or os.path.join(ROOT, "tests", "node", "node_modules")

needs_openai = unittest.skipUnless(openai, "the OpenAI SDK for Python is not installed")
needs_anthropic = unittest.skipUnless(anthropic, "the Anthropic SDK for Python is not installed")
needs_curl = unittest.skipUnless(CURL, "curl is not installed")


def needs_node(package, name):
    if not NODE:
        return unittest.skip("node is not installed")
    there = os.path.isdir(os.path.join(NODE_MODULES, *package.split("/")))
    return unittest.skipUnless(there, f"the {name} SDK for Node is not installed")


# A variable of the developer's own must not decide where an SDK goes or which key it shows.
FOREIGN = ("OPENAI_", "ANTHROPIC_", "HTTP_", "HTTPS_", "ALL_", "NO_", "http_", "https_", "all_", "no_")
PLACE = "api.provider.example"
MESSAGES = [{"role": "user", "content": "Say hello. Größe 日本語"}]

# ------------------------------------------------------------------------------------------------
# A provider, as far as the SDKs look

USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1760000000,
    "model": "gpt-test",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1760000000,
    "status": "completed",
    "model": "gpt-test",
    "output": [
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello there", "annotations": [], "logprobs": []}],
        }
    ],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-test",
    "content": [{"type": "text", "text": "Hello there"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 9, "output_tokens": 2},
}
ANSWERS = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSE,
    "/v1/embeddings": {
        "object": "list",
        "model": "embed-test",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5, 1.0]}],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    },
    "/v1/models": {
        "object": "list",
        "data": [{"id": "gpt-test", "object": "model", "created": 1760000000, "owned_by": "us"}],
    },
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": {"input_tokens": 9},
}
CLAUDE_MODELS = {
    "data": [
        {
            "type": "model",
            "id": "claude-test",
            "display_name": "Test",
            "created_at": "2026-01-01T00:00:00Z",
            "lifecycle": "active",
        }
    ],
    "has_more": False,
    "first_id": "claude-test",
    "last_id": "claude-test",
}


def event(data, name=None):
    """One server-sent event, as bytes."""
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


def chat_chunk(text, finish=None):
    choice = {"index": 0, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": finish}
    return event({**CHAT, "object": "chat.completion.chunk", "choices": [choice], "usage": None})


def response_event(number, kind, **more):
    return event({"type": kind, "sequence_number": number, **more}, kind)


def response_delta(number, text):
    more = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": text, "logprobs": []}
    return response_event(number, "response.output_text.delta", **more)


def message_event(kind, **more):
    return event({"type": kind, **more}, kind)


def message_delta(text):
    return message_event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


STREAMS = {
    "/v1/chat/completions": [chat_chunk("Hello "), chat_chunk("there"), chat_chunk("", "stop"), b"data: [DONE]\n\n"],
    "/v1/responses": [
        response_event(0, "response.created", response={**RESPONSE, "status": "in_progress", "output": []}),
        response_delta(1, "Hello "),
        response_delta(2, "there"),
        response_event(3, "response.completed", response=RESPONSE),
    ],
    "/v1/messages": [
        message_event("message_start", message={**MESSAGE, "content": [], "stop_reason": None}),
        message_event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        message_event("ping"),
        message_delta("Hello "),
        message_delta("there"),
        message_event("content_block_stop", index=0),
        message_event(
            "message_delta",
            delta={"stop_reason": "end_turn", "stop_sequence": None},
            usage={"output_tokens": 2},
        ),
        message_event("message_stop"),
    ],
}


def provider(conn, request):
    """Answers as the real ones do; a stream comes event by event."""
    path = request.target.partition("?")[0]
    if request.body and request.json().get("stream"):
        conn.start_stream()
        for piece in STREAMS[path]:
            conn.chunk(piece)
        conn.end()
        return
    claude = path == "/v1/models" and request.all("anthropic-version")
    conn.respond_json(CLAUDE_MODELS if claude else ANSWERS[path], headers=[("x-request-id", "req_1")])


def error_of_the_provider(status, headers=()):
    def answer(conn, request):
        error = {"type": "server_error", "code": "oops", "message": "the provider's own words", "param": None}
        conn.respond_json({"type": "error", "error": error}, status=status, headers=headers, reason="Oops")

    return answer


# ------------------------------------------------------------------------------------------------


class ClientCase(BrokerTestCase):
    """A client of some kind, a broker, and what came to the provider."""

    def setUp(self):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        patch = mock.patch.dict(os.environ, kept, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def dry_run(self):
        return self.broker(dry_run=True, config={"upstream_base_url": f"https://{PLACE}"})

    def proxy(self, config=None, handler=provider, **more):
        """A broker before a provider that speaks TLS, with the tests' own authority."""
        stub = self.stub(handler, tls=True)
        return self.broker(stub, config=config, **more), stub

    def assert_says(self, text, path):
        """The text of a dry-run's answer: what would have been sent where."""
        self.assertIn(PLACE, text)
        self.assertIn(path, text)

    def assert_arrived(self, broker, request, method, target, body=None, credential=None):
        """The provider got this call, with our credential, and nothing of the caller's."""
        name, value = credential or ("Authorization", "Bearer " + broker.secret)
        self.assertEqual((request.method, request.target), (method, target))
        self.assertEqual(request.header(name), value)
        others = {"authorization", "x-api-key", "api-key", "x-goog-api-key", "x-broker-token"} - {name.lower()}
        self.assertEqual([header for header in request.headers if header[0].lower() in others], [])
        for mark in (broker.token, "placeholder"):
            self.assertNotIn(mark.encode(), request.head + request.body)
        self.assertEqual(request.header("Host"), broker.upstream.url.partition("//")[2])
        if body is not None:
            self.assertEqual(request.body, body)

    def denials(self, broker):
        """The reasons of all refusals that the broker has logged."""
        return [line["reason"] for line in broker.events() if line["event"] == "denied"]


class Recorder:
    """The bodies an SDK for Python sent, as its HTTP client saw them."""

    def __init__(self):
        self.bodies = []

    def __call__(self, request):
        self.bodies.append(request.content)


class OpenAICase(ClientCase):
    def client(self, broker, **more):
        """A client that raises where an answer differs from the SDK's own types; `sent` are the bodies it sends."""
        sent = Recorder()
        http_client = openai.DefaultHttpxClient(event_hooks={"request": [sent]})
        more.setdefault("api_key", broker.token)
        client = openai.OpenAI(
            base_url=broker.url + "/v1", http_client=http_client, _strict_response_validation=True, **more
        )
        self.addCleanup(client.close)
        client.sent = sent.bodies
        return client


@needs_openai
class OpenAIForPythonInDryRun(OpenAICase):
    def setUp(self):
        super().setUp()
        self.client = self.client(self.dry_run(), max_retries=0)

    def test_chat_completion(self):
        answer = self.client.chat.completions.create(model="gpt-test", messages=MESSAGES)
        self.assertEqual(answer.object, "chat.completion")
        self.assert_says(answer.choices[0].message.content, "/v1/chat/completions")
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_chat_completion_as_a_stream(self):
        text, finish = "", None
        with self.client.chat.completions.create(model="gpt-test", messages=MESSAGES, stream=True) as stream:
            for chunk in stream:
                self.assertEqual(chunk.object, "chat.completion.chunk")
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    finish = choice.finish_reason or finish
        self.assert_says(text, "/v1/chat/completions")
        self.assertEqual(finish, "stop")

    def test_chat_completion_by_the_streaming_helper(self):
        with self.client.chat.completions.stream(model="gpt-test", messages=MESSAGES) as stream:
            answer = stream.get_final_completion()
        self.assert_says(answer.choices[0].message.content, "/v1/chat/completions")

    def test_response(self):
        answer = self.client.responses.create(model="gpt-test", input="Say hello")
        self.assertEqual((answer.object, answer.status), ("response", "completed"))
        self.assert_says(answer.output_text, "/v1/responses")

    def test_response_as_a_stream(self):
        text, last = "", None
        with self.client.responses.create(model="gpt-test", input="Say hello", stream=True) as stream:
            for part in stream:
                if part.type == "response.output_text.delta":
                    text += part.delta
                last = part
        self.assert_says(text, "/v1/responses")
        self.assertEqual(last.type, "response.completed")
        self.assertEqual(last.response.output_text, text)

    def test_response_by_the_streaming_helper(self):
        with self.client.responses.stream(model="gpt-test", input="Say hello") as stream:
            answer = stream.get_final_response()
        self.assert_says(answer.output_text, "/v1/responses")

    def test_embeddings_in_both_encodings(self):
        for encoding in ("float", "base64", None):
            with self.subTest(encoding):
                more = {"encoding_format": encoding} if encoding else {}
                # Asked for nothing, the SDK asks for base64, which its own type (a list of numbers) doesn't know.
                self.client._strict_response_validation = encoding == "float"
                answer = self.client.embeddings.create(model="embed-test", input=["one", "two"], **more)
                self.assertEqual([item.index for item in answer.data], [0, 1])
                if encoding == "base64":
                    self.assertIsInstance(answer.data[0].embedding, str)
                else:
                    self.assertTrue(all(isinstance(number, float) for number in answer.data[0].embedding))
                    self.assertGreater(len(answer.data[0].embedding), 0)

    def test_list_of_models(self):
        models = list(self.client.models.list())
        self.assertTrue(models)
        self.assertTrue(all(model.object == "model" for model in models))

    def test_async_client(self):
        async def ask():
            async with openai.AsyncOpenAI(base_url=self.client.base_url, api_key=self.client.api_key) as client:
                calls = [client.chat.completions.create(model="gpt-test", messages=MESSAGES) for _ in range(20)]
                answers = await asyncio.gather(*calls)
                text = ""
                async for chunk in await client.chat.completions.create(
                    model="gpt-test", messages=MESSAGES, stream=True
                ):
                    text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                return [answer.choices[0].message.content for answer in answers] + [text]

        for text in asyncio.run(ask()):
            self.assert_says(text, "/v1/chat/completions")


@needs_openai
class OpenAIForPythonThroughTheProxy(OpenAICase):
    def test_every_call_arrives_with_our_credential_and_the_very_body(self):
        broker, stub = self.proxy()
        client = self.client(broker)
        chat = {"model": "gpt-test", "messages": MESSAGES}
        calls = [
            ("/v1/chat/completions", lambda: client.chat.completions.create(**chat).choices[0].message.content),
            ("/v1/chat/completions", lambda: "".join(
                chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**chat, stream=True)
            )),
            ("/v1/responses", lambda: client.responses.create(model="gpt-test", input="hello").output_text),
            ("/v1/responses", lambda: "".join(
                getattr(part, "delta", "") for part in client.responses.create(model="g", input="hello", stream=True)
            )),
            ("/v1/embeddings", lambda: client.embeddings.create(model="e", input="hello", encoding_format="float")),
        ]  # fmt: skip
        for number, (path, call) in enumerate(calls):
            with self.subTest(path, number=number):
                answer = call()
                if isinstance(answer, str):
                    self.assertEqual(answer, "Hello there")
                else:
                    self.assertEqual(answer.data[0].embedding, [0.25, -0.5, 1.0])
                self.assert_arrived(broker, stub.requests[-1], "POST", path, client.sent[-1])
        self.assertEqual([model.id for model in client.models.list()], ["gpt-test"])
        self.assert_arrived(broker, stub.requests[-1], "GET", "/v1/models", b"")
        self.assertEqual(len(stub.requests), len(calls) + 1)

    def test_token_in_its_own_header_beside_a_placeholder_key(self):
        broker, stub = self.proxy()
        client = self.client(broker, api_key="placeholder", default_headers={"X-Broker-Token": broker.token})
        client.chat.completions.create(model="gpt-test", messages=MESSAGES)
        self.assert_arrived(broker, stub.requests[0], "POST", "/v1/chat/completions", client.sent[0])

    def test_the_payer_is_the_operators_choice(self):
        broker, stub = self.proxy(config={"extra_headers": {"OpenAI-Project": "proj_ours"}})
        client = self.client(broker, organization="org_theirs", project="proj_theirs")
        client.chat.completions.create(model="gpt-test", messages=MESSAGES)
        self.assertEqual(stub.requests[0].all("OpenAI-Organization"), [])
        self.assertEqual(stub.requests[0].all("OpenAI-Project"), ["proj_ours"])

    def test_first_chunk_arrives_while_the_provider_still_holds_the_second(self):
        more = threading.Event()

        def slowly(conn, request):
            conn.start_stream()
            conn.chunk(STREAMS["/v1/chat/completions"][0])
            conn.hold(more)
            for piece in STREAMS["/v1/chat/completions"][1:]:
                conn.chunk(piece)
            conn.end()

        broker, _ = self.proxy(handler=slowly)
        client = self.client(broker)
        with client.chat.completions.create(model="gpt-test", messages=MESSAGES, stream=True) as stream:
            self.assertEqual(next(stream).choices[0].delta.content, "Hello ")
            more.set()
            self.assertEqual(next(stream).choices[0].delta.content, "there")
            self.assertEqual(len(list(stream)), 1)

    def test_a_stream_left_early_is_left_at_the_provider_too(self):
        gone = threading.Event()

        def endless(conn, request):
            conn.start_stream()
            conn.chunk(STREAMS["/v1/chat/completions"][0])
            conn.wait_gone()
            gone.set()

        broker, _ = self.proxy(handler=endless)
        stream = self.client(broker).chat.completions.create(model="gpt-test", messages=MESSAGES, stream=True)
        next(stream)
        stream.close()
        self.assertTrue(gone.wait(3), "the provider still works for nobody")
        self.assertEqual(broker.wait_event(event="response")["outcome"], "client_disconnected")

    def test_a_large_prompt_and_a_file_beside_it(self):
        broker, stub = self.proxy()
        client = self.client(broker)
        text = "Größe \\ \" \u2028 \U0001f600\n" * 40_000
        client.chat.completions.create(model="gpt-test", messages=[{"role": "user", "content": text}])
        self.assert_arrived(broker, stub.requests[0], "POST", "/v1/chat/completions", client.sent[0])
        self.assertEqual(stub.requests[0].json()["messages"][0]["content"], text)


@needs_openai
class OpenAIForPythonRefused(OpenAICase):
    def refused(self, kind, call):
        with self.assertRaises(kind) as caught:
            call()
        return caught.exception

    def test_wrong_token_is_an_authentication_error_and_not_tried_again(self):
        broker, stub = self.proxy()
        client = self.client(broker, api_key="not-the-token-of-this-run")
        error = self.refused(
            openai.AuthenticationError,
            lambda: client.chat.completions.create(model="gpt-test", messages=MESSAGES),
        )
        self.assertEqual((error.status_code, error.code), (401, "client_token_required"))
        self.assertEqual(error.response.headers["x-should-retry"], "false")
        self.assertEqual(len(client.sent), 1)
        self.assertEqual(stub.requests, [])
        # The control: the same call with the right token.
        self.client(broker).chat.completions.create(model="gpt-test", messages=MESSAGES)
        self.assertEqual(len(stub.requests), 1)

    def test_each_refusal_is_the_sdks_own_error_and_tried_once(self):
        broker, stub = self.proxy(config={"max_request_bytes": 2000})
        client = self.client(broker)
        cases = [
            ("path_not_allowed", openai.PermissionDeniedError,
             lambda: client.moderations.create(model="m", input="hello")),
            ("method_not_allowed", openai.APIStatusError,
             lambda: client.post("/models", cast_to=object, body={})),
            ("request_too_large", openai.APIStatusError,
             lambda: client.chat.completions.create(
                 model="m", messages=[{"role": "user", "content": "x" * 3000}])),
            ("query_not_allowed", openai.PermissionDeniedError,
             lambda: client.models.list(extra_query={"api_key": "sk-somebody-elses"})),
        ]  # fmt: skip
        for code, kind, call in cases:
            with self.subTest(code):
                before = len(client.sent)
                error = self.refused(kind, call)
                self.assertEqual((error.code, error.type), (code, code))
                self.assertIn(error.message.partition(" - ")[0], str(error))
                self.assertEqual(len(client.sent) - before, 1)
        self.assertEqual(stub.requests, [])
        self.assertEqual(self.denials(broker), [code for code, _, _ in cases])

    def test_the_message_names_what_is_allowed(self):
        broker, _ = self.proxy()
        client = self.client(broker)
        error = self.refused(openai.PermissionDeniedError, lambda: client.moderations.create(model="m", input="hello"))
        self.assertIn("/v1/moderations", str(error))
        self.assertIn("allowed_paths", str(error))
        self.assertIn("/v1/chat/completions", str(error))

    def test_a_rejected_secret_is_no_authentication_error_of_the_callers(self):
        broker, stub = self.proxy(handler=error_of_the_provider(401))
        client = self.client(broker)
        error = self.refused(
            openai.InternalServerError, lambda: client.chat.completions.create(model="m", messages=MESSAGES)
        )
        self.assertEqual((error.status_code, error.code), (502, "upstream_rejected_secret"))
        # Its reason may be a missing scope or an address, which only the provider can tell.
        self.assertIn("the provider's own words", str(error))
        self.assertEqual((len(client.sent), len(stub.requests)), (1, 1))

    def test_an_unreachable_provider_is_tried_again_by_the_sdk(self):
        broker = self.broker()  # nobody is there
        client = self.client(broker, max_retries=1)
        error = self.refused(
            openai.InternalServerError, lambda: client.chat.completions.create(model="m", messages=MESSAGES)
        )
        self.assertEqual((error.status_code, error.code), (502, "upstream_unreachable"))
        self.assertEqual(len(client.sent), 2)

    def test_the_providers_own_errors_stay_its_own(self):
        cases = [
            (400, openai.BadRequestError, 1),
            (403, openai.PermissionDeniedError, 1),
            (404, openai.NotFoundError, 1),
            (422, openai.UnprocessableEntityError, 1),
            (429, openai.RateLimitError, 2),
            (500, openai.InternalServerError, 2),
            (503, openai.InternalServerError, 2),
        ]
        broker, stub = self.proxy()
        client = self.client(broker, max_retries=1)
        for status, kind, times in cases:
            with self.subTest(status):
                stub.forget()
                # Without a wait of its own the SDK would take seconds between its tries.
                stub.script(error_of_the_provider(status, [("retry-after-ms", "10")]))
                error = self.refused(kind, lambda: client.chat.completions.create(model="m", messages=MESSAGES))
                self.assertEqual((error.status_code, error.code), (status, "oops"))
                self.assertIn("the provider's own words", str(error))
                self.assertEqual(len(stub.requests), times)

    def test_a_rate_limit_is_waited_for_and_then_the_answer_comes(self):
        broker, stub = self.proxy()
        stub.script(error_of_the_provider(429, [("retry-after-ms", "10")]), provider)
        answer = self.client(broker).chat.completions.create(model="m", messages=MESSAGES)
        self.assertEqual(answer.choices[0].message.content, "Hello there")
        self.assertEqual(len(stub.requests), 2)

    @unittest.skipIf(os.name == "nt", "a shell script as the secret command")
    def test_a_vault_that_closed_is_not_asked_again_and_again(self):
        folder = tempfile.mkdtemp(prefix="broker-test-")
        self.addCleanup(shutil.rmtree, folder, True)
        vault, count = os.path.join(folder, "vault"), os.path.join(folder, "count")
        with open(vault, "w") as file:
            file.write("sk-canary-vault-0123456789abcdef\n")
        # The key is read once before the broker is ready; after that the vault is shut.
        script = f'echo x >>"{count}"; exec cat "{vault}"'
        source = {"kind": "command", "argv": ["/bin/sh", "-c", script], "cache_seconds": 0}
        broker, stub = self.proxy(config={"secret_source": source})
        broker.also_secret("sk-canary-vault-0123456789abcdef")
        os.remove(vault)
        client = self.client(broker)
        for _ in range(2):
            error = self.refused(
                openai.InternalServerError, lambda: client.chat.completions.create(model="m", messages=MESSAGES)
            )
            self.assertEqual((error.status_code, error.code), (503, "secret_unavailable"))
        self.assertEqual((len(client.sent), len(stub.requests)), (2, 0))
        with open(count) as file:
            self.assertEqual(file.read(), "x\nx\n")  # at start, and once for both


# ------------------------------------------------------------------------------------------------


CLAUDE = {"auth_header": "x-api-key", "auth_scheme": ""}
QUESTION = {"model": "claude-test", "max_tokens": 50, "messages": MESSAGES}


class AnthropicCase(ClientCase):
    def client(self, broker, **more):
        sent = Recorder()
        http_client = anthropic.DefaultHttpxClient(event_hooks={"request": [sent]})
        if "auth_token" not in more:
            more.setdefault("api_key", broker.token)
        client = anthropic.Anthropic(
            base_url=broker.url, http_client=http_client, _strict_response_validation=True, **more
        )
        self.addCleanup(client.close)
        client.sent = sent.bodies
        return client


@needs_anthropic
class AnthropicForPythonInDryRun(AnthropicCase):
    def setUp(self):
        super().setUp()
        self.client = self.client(self.dry_run(), max_retries=0)

    def test_message(self):
        answer = self.client.messages.create(**QUESTION)
        self.assertEqual((answer.type, answer.role, answer.stop_reason), ("message", "assistant", "end_turn"))
        self.assert_says(answer.content[0].text, "/v1/messages")

    def test_message_as_a_stream(self):
        kinds = []
        with self.client.messages.create(**QUESTION, stream=True) as stream:
            text = ""
            for part in stream:
                kinds.append(part.type)
                if part.type == "content_block_delta":
                    text += part.delta.text
        self.assert_says(text, "/v1/messages")
        self.assertEqual((kinds[0], kinds[-1]), ("message_start", "message_stop"))

    def test_message_by_the_streaming_helper(self):
        with self.client.messages.stream(**QUESTION) as stream:
            text = "".join(stream.text_stream)
            whole = stream.get_final_message()
        self.assert_says(text, "/v1/messages")
        self.assertEqual(whole.content[0].text, text)

    def test_count_of_tokens(self):
        answer = self.client.messages.count_tokens(model="claude-test", messages=MESSAGES)
        self.assertIsInstance(answer.input_tokens, int)

    def test_list_of_models(self):
        models = list(self.client.models.list())
        self.assertTrue(models)
        self.assertTrue(all(model.type == "model" and model.display_name for model in models))


@needs_anthropic
class AnthropicForPythonThroughTheProxy(AnthropicCase):
    def test_every_call_arrives_with_our_credential_and_the_very_body(self):
        for how in ("api_key", "auth_token"):
            broker, stub = self.proxy(config=CLAUDE)
            client = self.client(broker, **{how: broker.token})
            credential = ("x-api-key", broker.secret)

            def plain(client=client):
                return client.messages.create(**QUESTION).content[0].text

            def count(client=client):
                return client.messages.count_tokens(model="claude-test", messages=MESSAGES).input_tokens

            def stream(client=client):
                with client.messages.stream(**QUESTION) as stream:
                    return "".join(stream.text_stream)

            calls = [
                ("/v1/messages", "Hello there", plain),
                ("/v1/messages", "Hello there", stream),
                ("/v1/messages/count_tokens", 9, count),
            ]
            for path, expected, call in calls:
                with self.subTest(path, how=how):
                    self.assertEqual(call(), expected)
                    self.assert_arrived(broker, stub.requests[-1], "POST", path, client.sent[-1], credential)
                    self.assertTrue(stub.requests[-1].header("anthropic-version"))
            with self.subTest("models", how=how):
                self.assertEqual([model.id for model in client.models.list()], ["claude-test"])
                request = stub.requests[-1]
                self.assert_arrived(broker, request, "GET", request.target, b"", credential)
                self.assertEqual(request.target.partition("?")[0], "/v1/models")

    def test_a_beta_query_passes(self):
        broker, stub = self.proxy(config=CLAUDE)
        client = self.client(broker)
        client.messages.create(**QUESTION, extra_query={"beta": "true"})
        self.assertEqual(stub.requests[0].target, "/v1/messages?beta=true")

    def test_first_text_arrives_while_the_provider_still_holds_the_second(self):
        more = threading.Event()

        def slowly(conn, request):
            conn.start_stream()
            for piece in STREAMS["/v1/messages"][:4]:
                conn.chunk(piece)
            conn.hold(more)
            for piece in STREAMS["/v1/messages"][4:]:
                conn.chunk(piece)
            conn.end()

        broker, _ = self.proxy(config=CLAUDE, handler=slowly)
        with self.client(broker).messages.stream(**QUESTION) as stream:
            pieces = stream.text_stream
            self.assertEqual(next(pieces), "Hello ")
            more.set()
            self.assertEqual("".join(pieces), "there")


@needs_anthropic
class AnthropicForPythonRefused(AnthropicCase):
    def test_each_refusal_is_the_sdks_own_error_and_tried_once(self):
        broker, stub = self.proxy(config={**CLAUDE, "allowed_paths": ["/v1/messages"], "max_request_bytes": 2000})
        long = {**QUESTION, "messages": [{"role": "user", "content": "x" * 3000}]}
        right, wrong = self.client(broker), self.client(broker, api_key="not-the-token-of-this-run")
        cases = [
            ("client_token_required", anthropic.AuthenticationError, wrong, lambda: wrong.messages.create(**QUESTION)),
            ("path_not_allowed", anthropic.PermissionDeniedError, right, lambda: right.models.list()),
            ("request_too_large", anthropic.APIStatusError, right, lambda: right.messages.create(**long)),
        ]
        for code, kind, client, call in cases:
            with self.subTest(code):
                before = len(client.sent)
                with self.assertRaises(kind) as caught:
                    call()
                self.assertEqual(caught.exception.body["error"]["type"], code)
                self.assertIn(caught.exception.body["error"]["message"], str(caught.exception))
                self.assertEqual(len(client.sent) - before, 1)
        self.assertEqual(stub.requests, [])
        self.assertEqual(right.messages.create(**QUESTION).content[0].text, "Hello there")

    def test_a_rejected_secret_is_tried_once(self):
        broker, stub = self.proxy(config=CLAUDE, handler=error_of_the_provider(401))
        client = self.client(broker)
        with self.assertRaises(anthropic.InternalServerError) as caught:
            client.messages.create(**QUESTION)
        self.assertEqual(caught.exception.body["error"]["type"], "upstream_rejected_secret")
        self.assertEqual((len(client.sent), len(stub.requests)), (1, 1))

    def test_the_providers_overload_is_tried_again(self):
        broker, stub = self.proxy(config=CLAUDE)
        stub.script(error_of_the_provider(529, [("retry-after-ms", "10")]), provider)
        self.assertEqual(self.client(broker).messages.create(**QUESTION).content[0].text, "Hello there")
        self.assertEqual(len(stub.requests), 2)


# ------------------------------------------------------------------------------------------------


class NodeCase(ClientCase):
    def drive(self, sdk, broker, *calls, key=None):
        """The lines of tests/node/drive.cjs, by call."""
        done = subprocess.run(
            [NODE, os.path.join(ROOT, "tests", "node", "drive.cjs"), sdk, *calls],
            env={
                **os.environ,
                "NODE_PATH": NODE_MODULES,
                "BASE_URL": broker.url + ("/v1" if sdk == "openai" else ""),
                "API_KEY": key or broker.token,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        lines = {line["call"]: line for line in map(json.loads, done.stdout.splitlines())}
        self.assertEqual(set(lines), set(calls), done.stderr.decode())
        for line in lines.values():
            if line["call"] != "not_allowed" and key is None:
                self.assertNotIn("error", line, line)
        return lines


@needs_node("openai", "OpenAI")
class OpenAIForNode(NodeCase):
    def test_every_call_in_dry_run(self):
        calls = ("chat", "chat_stream", "responses", "responses_stream", "embeddings", "models")
        seen = self.drive("openai", self.dry_run(), *calls)
        self.assert_says(seen["chat"]["text"], "/v1/chat/completions")
        self.assert_says(seen["chat_stream"]["text"], "/v1/chat/completions")
        self.assert_says(seen["responses"]["text"], "/v1/responses")
        self.assert_says(seen["responses_stream"]["text"], "/v1/responses")
        self.assertEqual(seen["responses_stream"]["last"], "response.completed")
        self.assertTrue(seen["embeddings"]["finite"] and seen["embeddings"]["numbers"])
        self.assertTrue(seen["models"]["found"])

    def test_every_call_through_the_proxy(self):
        broker, stub = self.proxy()
        calls = ("chat", "chat_stream", "responses", "responses_stream", "models")
        seen = self.drive("openai", broker, *calls)
        for call in calls[:-1]:
            self.assertEqual(seen[call]["text"], "Hello there", call)
        self.assertEqual(seen["models"]["found"], ["gpt-test"])
        self.assertEqual(len(stub.requests), len(calls))
        for request in stub.requests:
            self.assert_arrived(broker, request, request.method, request.target)

    def test_refusals_are_the_sdks_own_errors_and_tried_once(self):
        broker, stub = self.proxy()
        wrong = self.drive("openai", broker, "chat", "not_allowed", key="not-the-token-of-this-run")["chat"]
        self.assertEqual((wrong["error"], wrong["status"]), ("AuthenticationError", 401))
        refused = self.drive("openai", broker, "not_allowed")["not_allowed"]
        self.assertEqual((refused["error"], refused["status"]), ("PermissionDeniedError", 403))
        self.assertIn("allowed_paths", refused["message"])
        self.assertEqual(self.denials(broker), ["client_token_required"] * 2 + ["path_not_allowed"])
        self.assertEqual(stub.requests, [])

    def test_a_rejected_secret_is_tried_once(self):
        broker, stub = self.proxy(handler=error_of_the_provider(401))
        line = self.drive("openai", broker, "chat", key=broker.token)["chat"]
        self.assertEqual((line["error"], line["status"]), ("InternalServerError", 502))
        self.assertEqual(len(stub.requests), 1)


@needs_node("@anthropic-ai/sdk", "Anthropic")
class AnthropicForNode(NodeCase):
    def test_every_call_in_dry_run(self):
        seen = self.drive("anthropic", self.dry_run(), "messages", "messages_stream", "count_tokens", "models")
        self.assert_says(seen["messages"]["text"], "/v1/messages")
        self.assert_says(seen["messages_stream"]["text"], "/v1/messages")
        self.assertEqual(seen["messages_stream"]["whole"], seen["messages_stream"]["text"])
        self.assertEqual(seen["messages_stream"]["stop"], "end_turn")
        self.assertIsInstance(seen["count_tokens"]["tokens"], int)
        self.assertTrue(seen["models"]["found"])

    def test_every_call_through_the_proxy(self):
        broker, stub = self.proxy(config=CLAUDE)
        seen = self.drive("anthropic", broker, "messages", "messages_stream", "count_tokens", "models")
        self.assertEqual(seen["messages"]["text"], "Hello there")
        self.assertEqual(seen["messages_stream"]["text"], "Hello there")
        self.assertEqual(seen["count_tokens"]["tokens"], 9)
        self.assertEqual(seen["models"]["found"], ["claude-test"])
        self.assertEqual(len(stub.requests), 4)
        for request in stub.requests:
            credential = ("x-api-key", broker.secret)
            self.assert_arrived(broker, request, request.method, request.target, credential=credential)

    def test_refusals_are_the_sdks_own_errors_and_tried_once(self):
        broker, stub = self.proxy(config={**CLAUDE, "allowed_paths": ["/v1/messages"]})
        wrong = self.drive("anthropic", broker, "messages", key="not-the-token-of-this-run")["messages"]
        self.assertEqual((wrong["error"], wrong["status"]), ("AuthenticationError", 401))
        refused = self.drive("anthropic", broker, "not_allowed")["not_allowed"]
        self.assertEqual((refused["error"], refused["status"]), ("PermissionDeniedError", 403))
        self.assertEqual(self.denials(broker), ["client_token_required", "path_not_allowed"])
        self.assertEqual(stub.requests, [])


# ------------------------------------------------------------------------------------------------


@needs_curl
class Curl(ClientCase):
    def curl(self, broker, path, *args, token=True, data=None):
        """Status, headers (text) and body of one call of curl."""
        argv = [CURL, "-q", "-sS", "-i", "--noproxy", "*", "--max-time", "20", broker.url + path, *args]
        if token:
            argv += ["-H", "X-Broker-Token: " + broker.token]
        if data is not None:
            argv += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
        done = subprocess.run(argv, input=data or b"", capture_output=True, timeout=30)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        rest = done.stdout
        while True:
            head, _, rest = rest.partition(b"\r\n\r\n")
            status = int(head.split()[1])
            if status >= 200:
                return status, head.decode("latin-1"), rest

    def test_each_shape_in_dry_run(self):
        broker = self.dry_run()
        paths = {
            "/v1/chat/completions": {"model": "m", "messages": MESSAGES},
            "/v1/responses": {"model": "m", "input": "hello"},
            "/v1/messages": QUESTION,
        }
        for path, question in paths.items():
            for stream in (False, True):
                with self.subTest(path, stream=stream):
                    data = json.dumps({**question, "stream": stream}).encode()
                    status, head, body = self.curl(broker, path, "-N", data=data)
                    self.assertEqual(status, 200, body)
                    self.assertIn("text/event-stream" if stream else "application/json", head.lower())
                    if stream:
                        self.assertTrue(body.startswith((b"data: ", b"event: ")), body)
                        self.assertTrue(body.endswith(b"\n\n"), body)
                    else:
                        self.assert_says(json.dumps(json.loads(body)), path)
        self.assertIn("input_tokens", json.loads(self.curl(broker, "/v1/messages/count_tokens", data=b"{}")[2]))

    def test_every_way_of_sending_a_body_arrives_whole(self):
        broker, stub = self.proxy()
        small = json.dumps({"model": "m", "messages": MESSAGES}, ensure_ascii=False).encode()
        large = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 1_500_000}]}).encode()
        cases = {
            "a length": (small, ()),
            "chunked": (small, ("-H", "Transfer-Encoding: chunked")),
            "Expect: 100-continue, which curl adds for a large body": (large, ()),
            "large and chunked": (large, ("-H", "Transfer-Encoding: chunked")),
            "HTTP/1.0": (small, ("--http1.0",)),
            "an offer of HTTP/2": (small, ("--http2",)),
            "gzip asked for": (small, ("--compressed",)),
        }
        for name, (data, args) in cases.items():
            with self.subTest(name):
                before = len(stub.requests)
                status, _, body = self.curl(broker, "/v1/chat/completions", *args, data=data)
                self.assertEqual((status, json.loads(body)), (200, CHAT))
                self.assertEqual(len(stub.requests), before + 1)
                self.assert_arrived(broker, stub.requests[-1], "POST", "/v1/chat/completions", data)
                self.assertEqual(stub.requests[-1].header("Content-Length"), str(len(data)))
                for header in ("Transfer-Encoding", "Expect", "Upgrade", "HTTP2-Settings"):
                    self.assertEqual(stub.requests[-1].all(header), [])
                self.assertEqual(stub.requests[-1].header("Accept-Encoding"), "identity")

    def test_a_refused_large_body_is_a_readable_answer(self):
        broker, stub = self.proxy(config={"max_request_bytes": 1000})
        data = json.dumps({"model": "m", "input": "x" * 5_000_000}).encode()
        # Without `Expect` curl sends at once, and must not lose the answer to a reset.
        for args in ((), ("-H", "Expect:")):
            with self.subTest(args):
                status, head, body = self.curl(broker, "/v1/responses", *args, data=data)
                self.assertEqual(status, 413)
                self.assertEqual(json.loads(body)["error"]["code"], "request_too_large")
        self.assertEqual(stub.requests, [])

    def test_health_and_head(self):
        broker, stub = self.proxy()
        self.assertEqual(self.curl(broker, "/healthz", token=False)[::2], (200, b'{"ok": true}'))
        self.assertEqual(self.curl(broker, "/healthz", "--head", token=False)[0], 200)
        self.assertEqual(stub.requests, [])

    def test_two_calls_on_one_connection(self):
        broker, stub = self.proxy()
        argv = [CURL, "-q", "-sS", "-v", "--noproxy", "*", "-H", "Authorization: Bearer " + broker.token]
        argv += [broker.url + "/v1/models"] * 2
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
        self.assertEqual(done.stdout.count(b"gpt-test"), 2)
        self.assertIn(b"Re-using existing connection", done.stderr)
        self.assertEqual(stub.connections, 1)

    def test_the_line_that_is_printed_at_the_start_works_as_pasted(self):
        broker = self.dry_run()
        with contextlib.suppress(AssertionError):
            broker.wait_stderr(r"curl ", timeout=5)
        lines = broker.stderr_text().splitlines()
        start = next((number for number, line in enumerate(lines) if line.strip().startswith("curl ")), None)
        self.assertIsNotNone(start, broker.stderr_text())
        end = start
        while lines[end].rstrip().endswith("\\"):
            end += 1
        call = "\n".join(lines[start : end + 1])
        done = subprocess.run(
            ["/bin/sh", "-c", call],
            env={**os.environ, **broker.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
        )
        self.assert_says(done.stdout.decode(), "/v1/")


if __name__ == "__main__":
    unittest.main()
