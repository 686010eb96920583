"""Several callers of one broker, each with a token of its own, and each held to less than the key could do."""

import concurrent.futures
import contextlib
import json
import re
import subprocess
import sys
import unittest

from tests.long_form import CHAT, LongForm, WrongFiles, an_upstream, chat, that_used
from tests.support import BrokerTestCase, Puppet, eventually, fresh_token, minimal_environment, run_broker
from tests.terminal import Terminal, with_terminals

try:
    import anthropic
    import openai
except ImportError:
    openai = None

MESSAGES = "/v1/messages"
AZURE = "/openai/deployments/{}/chat/completions"
GEMINI = "/v1beta/models/{}:generateContent"
BEDROCK = "/model/{}/converse"
PATHS = [
    CHAT,
    "/v1/responses",
    "GET /v1/models",
    "GET /v1/files/*",
    "DELETE /v1/files/*",
    "PUT /v1/files/*",
    "PATCH /v1/files/*",
    AZURE.format("*"),
    GEMINI.format("*"),
    BEDROCK.format("*"),
    "POST /v1/audio/transcriptions multipart/form-data",
    "POST /openai/deployments/*/audio/transcriptions multipart/form-data",
]
PROMPT: dict = {"messages": []}


class ServedForSeveral(BrokerTestCase):
    """One broker with two upstreams and a handful of clients, for the tests of a class."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.openai, cls.anthropic = cls.stubs = [cls.class_stub() for _ in range(2)]
        cls.form = LongForm(
            {"openai": an_upstream(cls.openai, *PATHS), "anthropic": an_upstream(cls.anthropic, MESSAGES, prefix="/claude")},
            {
                "alice": {},
                "bob": {"allowed_paths": [CHAT, "GET /v1/files/a*", "/claude/v1/messages"]},
                "carol": {"upstreams": ["anthropic"]},
                "dora": {"allowed_models": ["cheap-*", "exact", "*-mini-*-x"]},
                "eve": {"allowed_models": ["*"], "expires": "2999-12-31T23:59:59+01:00"},
                "old": {"expires": "2020-01-31T18:00:00Z"},
                "narrow": {
                    "upstreams": ["openai"],
                    "allowed_paths": [CHAT],
                    "allowed_models": ["cheap-*"],
                    "requests_per_minute": 5,
                    "max_concurrent_requests": 2,
                    "tokens_per_day": 9000,
                    "expires": "2999-01-01T00:00:00Z",
                },
            },
        )
        cls.served = cls.form.watched(cls.class_broker(cls.openai, **cls.form.options))

    def setUp(self):
        super().setUp()
        for stub in self.stubs:
            stub.forget()

    def ask(self, client, path=CHAT, body=None, method="POST", headers=()):
        body = PROMPT if body is None and method == "POST" else body
        return self.served.request(method, path, body, headers, token=self.form.tokens.get(client, client))

    def arrived(self):
        return sum(len(stub.requests) for stub in self.stubs)


class EachClient(ServedForSeveral):
    def test_is_known_by_its_own_token_in_whichever_header_and_named_in_the_log(self):
        for client, headers in {
            "alice": lambda token: {"Authorization": "Bearer " + token},
            "bob": lambda token: {"x-api-key": token},
            "dora": lambda token: {"x-goog-api-key": token, "Authorization": "Bearer none-of-ours-at-all"},
            "eve": lambda token: {"X-Broker-Token": token, "api-key": token},
        }.items():
            with self.subTest(client):
                answer = self.served.request("POST", CHAT, chat(model="exact"), headers(self.form.tokens[client]), token=None)
                self.assertEqual(answer.status, 200, answer)
                for kind in ("request", "response"):
                    event = self.served.wait_event(event=kind, id=answer.header("X-Broker-Request-Id"))
                    self.assertEqual((event["client"], event["upstream"], event["model"]), (client, "openai", "exact"))
        for request in self.openai.requests:
            self.assertEqual(request.header("Authorization"), "Bearer " + self.form.secrets["openai"])

    def test_is_named_in_the_log_where_it_is_refused_too(self):
        refused = self.ask("bob", "/v1/responses")
        event = self.served.wait_event(event="denied", id=refused.header("X-Broker-Request-Id"))
        self.assertEqual((event["client"], event["reason"]), ("bob", "path_not_allowed"))
        stranger = self.ask(fresh_token())
        event = self.served.wait_event(event="denied", id=stranger.header("X-Broker-Request-Id"))
        self.assertNotIn("client", event)

    def test_cannot_show_the_tokens_of_two(self):
        alice, bob = self.form.tokens["alice"], self.form.tokens["bob"]
        two = self.served.request("POST", CHAT, PROMPT, {"Authorization": "Bearer " + bob}, token=alice)
        self.assert_refused(two, 401, "client_token_required")
        self.assertEqual(self.arrived(), 0)
        twice = self.served.request("POST", CHAT, PROMPT, {"Authorization": "Bearer " + alice}, token=alice)
        self.assertEqual(twice.status, 200)

    def test_whose_time_is_over_is_a_stranger(self):
        self.assertEqual(self.ask("eve").status, 200)
        expired, stranger = self.ask("old"), self.ask(fresh_token())
        for answer in (expired, stranger):
            self.assert_refused(answer, 401, "client_token_required")
        self.assertEqual(expired.body, stranger.body)
        self.assertEqual(self.arrived(), 1)


class NarrowerPaths(ServedForSeveral):
    def test_are_held_to_both_the_clients_rules_and_the_upstreams(self):
        for client, method, path, status in [
            ("alice", "POST", "/v1/responses", 200),
            ("bob", "POST", "/v1/responses", 403),
            ("bob", "POST", CHAT, 200),
            ("bob", "GET", "/v1/files/abc", 200),
            ("bob", "GET", "/v1/files/xyz", 403),
            ("alice", "GET", "/v1/files/xyz", 200),
            ("bob", "DELETE", "/v1/files/abc", 405),
            ("alice", "DELETE", "/v1/files/abc", 200),
            ("bob", "POST", "/claude" + MESSAGES, 200),
            ("bob", "POST", MESSAGES, 403),
            ("carol", "POST", "/claude" + MESSAGES, 200),
            ("carol", "POST", CHAT, 403),
            ("narrow", "POST", "/claude" + MESSAGES, 403),
        ]:
            with self.subTest(client, method=method, path=path):
                before = self.arrived()
                answer = self.ask(client, path, method=method)
                self.assertEqual(answer.status, status, answer)
                self.assertEqual(self.arrived() - before, status == 200)

    def test_are_what_a_refusal_names(self):
        refused = self.ask("bob", "/v1/responses")
        self.assert_refused(refused, 403, "path_not_allowed")
        for rule in ("POST " + CHAT, "GET /v1/files/a*", "POST /claude" + MESSAGES):
            self.assertIn(rule, refused.message)
        self.assertNotIn("deployments", refused.message)
        self.assertEqual(self.ask("bob", "/v1/files/abc", method="DELETE").header("Allow"), "GET")

    def test_are_all_that_a_mended_v1_counts(self):
        self.assertEqual(self.ask("alice", "/responses").status, 200)
        self.assertEqual(self.ask("bob", "/chat/completions").status, 200)
        self.assertEqual(self.ask("bob", "/claude/messages").status, 200)
        seen = [request.target for stub in self.stubs for request in stub.requests]
        self.assertEqual(seen, ["/v1/responses", CHAT, MESSAGES])
        self.assert_refused(self.ask("bob", "/responses"), 403, "path_not_allowed")
        self.assert_refused(self.ask("carol", "/chat/completions"), 403, "path_not_allowed")


class AllowedModels(ServedForSeveral):
    """Checked where the provider would read the model, and nowhere else."""

    def assert_models(self, cases):
        for case, (path, body, model) in cases.items():
            with self.subTest(case):
                before = self.arrived()
                answer = self.ask("dora", path, body)
                if model is None:
                    self.assert_refused(answer, 403, "model_not_allowed")
                    self.assertEqual(self.arrived(), before)
                    for allowed in ("dora", "cheap-*", "exact"):
                        self.assertIn(allowed, answer.message)
                else:
                    self.assertEqual(answer.status, 200, answer)
                    event = self.served.wait_event(event="request", id=answer.header("X-Broker-Request-Id"))
                    self.assertEqual(event["model"], model)

    def test_of_the_body(self):
        self.assert_models(
            {
                "exact": (CHAT, {"model": "exact"}, "exact"),
                "a star for many": (CHAT, {"model": "cheap-1"}, "cheap-1"),
                "a star for none": (CHAT, {"model": "cheap-"}, "cheap-"),
                "a star over slashes": (CHAT, {"model": "cheap-a/b:c"}, "cheap-a/b:c"),
                "two stars": (CHAT, {"model": "a-mini-b-x"}, "a-mini-b-x"),
                "two stars that would overlap": (CHAT, {"model": "a-mini-x"}, None),
                "more behind it": (CHAT, {"model": "exactly"}, None),
                "more before it": (CHAT, {"model": "not-cheap-1"}, None),
                "another case": (CHAT, {"model": "Exact"}, None),
                "a blank behind it": (CHAT, {"model": "exact "}, None),
                "a line behind it": (CHAT, {"model": "exact\n"}, None),
                "none": (CHAT, {}, None),
                "null": (CHAT, {"model": None}, None),
                "a number": (CHAT, {"model": 5}, None),
                "a list of it": (CHAT, {"model": ["exact"]}, None),
                "an empty body": (CHAT, b"", None),
                "deeper only": (CHAT, {"extra_body": {"model": "exact"}}, None),
                "deeper is nobody's business": (CHAT, {"model": "exact", "metadata": {"model": "dear"}}, "exact"),
            }
        )

    def test_of_every_model_that_may_answer_instead(self):
        self.assert_models(
            {
                "models allowed": (CHAT, {"model": "exact", "models": ["cheap-1", "exact"]}, "exact"),
                "models with a dear one": (CHAT, {"model": "exact", "models": ["cheap-1", "dear"]}, None),
                "models alone, dear": (CHAT, {"models": ["dear"]}, None),
                "models, no list": (CHAT, {"model": "exact", "models": "dear"}, None),
                "models, an object": (CHAT, {"model": "exact", "models": {"a": "dear"}}, None),
                "models with a number": (CHAT, {"model": "exact", "models": [5]}, None),
                "fallbacks": (CHAT, {"model": "exact", "fallbacks": ["dear"]}, None),
                "fallbacks as objects": (CHAT, {"model": "exact", "fallbacks": [{"model": "dear"}]}, None),
                "fallbacks allowed": (CHAT, {"model": "exact", "fallbacks": [{"model": "cheap-2"}, "exact"]}, "exact"),
                "a nested list": (CHAT, {"model": "exact", "models": [["dear"]]}, None),
            }
        )

    def test_of_the_path_where_the_provider_has_it_there(self):
        self.assert_models(
            {
                "Azure": (AZURE.format("exact"), PROMPT, "exact"),
                "Azure, dear": (AZURE.format("dear"), PROMPT, None),
                "Azure reads the path, not the body": (AZURE.format("dear"), {"model": "exact"}, None),
                "Azure, whatever the body says": (AZURE.format("exact"), {"model": "dear"}, "exact"),
                "Gemini": (GEMINI.format("cheap-flash"), {}, "cheap-flash"),
                "Gemini, dear": (GEMINI.format("pro"), {"model": "exact"}, None),
                "Bedrock, decoded": (BEDROCK.format("cheap-v1%3A0"), {}, "cheap-v1:0"),
                "Bedrock, dear": (BEDROCK.format("dear-v1%3A0"), {"model": "exact"}, None),
                "the path's and a dear fallback": (AZURE.format("exact"), {"fallbacks": ["dear"]}, None),
            }
        )

    def test_by_the_method_where_none_is_named(self):
        for client, method, status in [
            ("dora", "GET", 200),
            ("dora", "DELETE", 200),
            ("dora", "PUT", 403),
            ("dora", "PATCH", 403),
            ("eve", "PUT", 200),
            ("eve", "PATCH", 200),
        ]:
            with self.subTest(client, method=method):
                answer = self.ask(client, "/v1/files/a", {} if method.startswith("P") else None, method)
                self.assertEqual(answer.status, status, answer)
        self.assertEqual(self.ask("dora", "/v1/models", method="GET").status, 200)

    def test_in_a_body_of_another_type_only_where_all_are_allowed(self):
        form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nexact\r\n--x--\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        for client, status in {"dora": 403, "eve": 200, "alice": 200}.items():
            for path in ("/v1/audio/transcriptions", "/openai/deployments/exact/audio/transcriptions"):
                with self.subTest(client, path=path):
                    self.assertEqual(self.ask(client, path, form, headers=headers).status, status)

    def test_are_nobody_elses_business(self):
        for client, status in {"alice": 200, "eve": 403}.items():
            self.assertEqual(self.ask(client, CHAT, {"model": "dear", "fallbacks": [5]}).status, status)


class WhatACallerIsTold(ServedForSeveral):
    """`GET /broker`."""

    def test_of_itself_alone(self):
        answer = self.ask("narrow", "/broker", method="GET")
        limits = {"requests_per_minute": 5, "max_concurrent_requests": 2, "tokens_per_day": 9000}
        self.assertEqual(answer.status, 200)
        self.assertEqual(
            answer.json(),
            {
                "client": "narrow",
                "allowed_paths": ["POST " + CHAT],
                "allowed_models": ["cheap-*"],
                "limits": limits,
                "left": {**limits, "tokens_per_day": 9000},
                "expires": answer.json()["expires"],
            },
        )
        self.assertRegex(answer.json()["expires"], r"^2999-01-01T00:00:00(\+00:00|Z)$")

    def test_of_what_its_upstreams_allow_where_it_has_no_narrower_rules(self):
        told = self.ask("carol", "/broker", method="GET").json()
        self.assertEqual(told["allowed_paths"], ["POST /claude" + MESSAGES])
        self.assertEqual((told["allowed_models"], told["limits"], told["left"], told["expires"]), (None, {}, {}, None))

    def test_costs_nothing_and_leaves_no_line(self):
        self.assertEqual(self.ask("alice").status, 200)
        before = len(self.served.events())
        for _ in range(8):
            told = self.ask("narrow", "/broker", method="GET")
            self.assertEqual((told.status, told.json()["left"]["requests_per_minute"]), (200, 5))
        self.assert_refused(self.ask("alice", "/v1/unknown"), 403, "path_not_allowed")
        self.served.wait_event(event="denied", path="/v1/unknown")
        kinds = [event["event"] for event in self.served.events()[before:]]
        self.assertEqual([kind for kind in kinds if kind != "response"], ["denied"])

    def test_only_with_a_token(self):
        for token in (None, fresh_token(), "old"):
            answer = self.served.request("GET", "/broker", token=self.form.tokens.get(token, token))
            self.assert_refused(answer, 401, "client_token_required")
        self.assertEqual(self.arrived(), 0)


class TheShortForm(BrokerTestCase):
    def test_tells_its_one_caller_too(self):
        broker = self.broker(config={"allowed_paths": [CHAT, "GET /v1/models"]}, dry_run=True)
        told = broker.request("GET", "/broker")
        self.assertEqual(
            told.json(),
            {
                "client": "default",
                "allowed_paths": ["POST " + CHAT, "GET /v1/models"],
                "allowed_models": None,
                "limits": {},
                "left": {},
                "expires": None,
            },
        )
        self.assert_refused(broker.request("GET", "/broker", token=None), 401, "client_token_required")
        self.assertEqual(broker.post_json(CHAT, chat()).status, 200)
        self.assertNotIn("upstream", broker.wait_event(event="request"))


ASKS_ONCE_A_LINE = """
import os, sys, urllib.error, urllib.request

for line in sys.stdin:
    headers = {"X-Broker-Token": os.environ["BROKER_CLIENT_TOKEN"]}
    try:
        with urllib.request.urlopen(urllib.request.Request(os.environ["BROKER_URL"] + "/v1/models", headers=headers)) as answer:
            print(answer.status, flush=True)
    except urllib.error.HTTPError as error:
        with error:
            print(error.code, flush=True)
"""


class AtAReload(BrokerTestCase):
    """What SIGHUP takes from one client leaves the others' streams alone."""

    def test_a_client_that_is_taken_out_or_gets_another_token_is_a_stranger_and_streams_go_on(self):
        stub = self.stub()
        form = LongForm(None, {"alice": {}, "bob": {}, "carol": {}})
        form.env["TEST_TOKEN_NEXT"] = form.tokens["next"] = fresh_token()
        broker = form.watched(self.broker(stub, **form.options))
        callers = {}
        for client in ("alice", "bob", "carol"):
            upstream = Puppet(stub)
            caller = broker.connect()
            self.addCleanup(caller.close)
            caller.send(broker.post_bytes(CHAT, chat(stream=True), {"X-Broker-Token": form.tokens[client]}, token=False))
            upstream.start_stream()
            upstream.chunk(b"data: 1\n\n")
            caller.read_head()
            self.assertEqual(caller.read_chunk(), b"data: 1\n\n")
            callers[client] = caller, upstream
        stub.forget()
        clients = dict(broker.config["clients"], bob={"token_env": "TEST_TOKEN_NEXT"})
        del clients["carol"]
        self.assertNotIn("nothing", broker.reload({**broker.config, "clients": clients}))
        broker.wait_event(event="reload")
        for client, status in {"alice": 200, "bob": 401, "carol": 401, "next": 200}.items():
            with self.subTest(client):
                self.assertEqual(broker.post_json(CHAT, chat(), token=form.tokens[client]).status, status)
        for caller, upstream in callers.values():
            upstream.chunk(b"data: 2\n\n")
            upstream.end()
            upstream.done()
            self.assertEqual(caller.read_chunk(), b"data: 2\n\n")
            self.assertEqual(caller.read_chunk(), b"")
        # The line is written behind the answer's last bytes.
        eventually(lambda: "carol" in {event["client"] for event in broker.events("response")}, what="carol's line")

    def test_a_client_that_is_taken_out_while_a_command_runs_as_it_is_a_stranger_too(self):
        form = LongForm(None, {"alice": {}, "bob": {}})
        command = [sys.executable, "-c", ASKS_ONCE_A_LINE]
        broker = self.broker(self.stub(), args=["--client", "alice"], command=command, stdin=subprocess.PIPE, **form.options)
        clients = {"bob": broker.config["clients"]["bob"]}
        for status, config in ((200, {**broker.config, "clients": clients}), (401, broker.config), (200, None)):
            broker.process.stdin.write(b"\n")
            broker.process.stdin.flush()
            broker.wait_stdout(rf"{status}\n\Z", 20)
            if config is not None:
                self.assertNotIn("nothing", broker.reload(config))
        broker.process.stdin.close()
        self.assertEqual(broker.wait(), 0)

    def test_a_client_that_expires_now_is_a_stranger_and_one_that_is_narrowed_is_held_to_it(self):
        stub = self.stub()
        form = LongForm(None, {"alice": {}, "bob": {}})
        broker = form.watched(self.broker(stub, **form.options))
        self.assertEqual([broker.post_json(CHAT, chat(), token=token).status for token in form.tokens.values()], [200, 200])
        clients = broker.config["clients"]
        clients["alice"]["expires"] = "2020-01-01T00:00:00Z"
        clients["bob"]["allowed_models"] = ["other"]
        self.assertNotIn("nothing", broker.reload({**broker.config, "clients": clients}))
        broker.wait_event(event="reload")
        self.assert_refused(broker.post_json(CHAT, chat(), token=form.tokens["alice"]), 401, "client_token_required")
        self.assert_refused(broker.post_json(CHAT, chat(), token=form.tokens["bob"]), 403, "model_not_allowed")


# What an agent under `--` would do: look around, and try what it may and what it may not.
AGENT = """
import json, os, urllib.error, urllib.request

def ask(method, path, body=None):
    headers = {"X-Broker-Token": os.environ["BROKER_CLIENT_TOKEN"], "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["BROKER_URL"] + path, json.dumps(body).encode() if body else None, headers)
    request.method = method
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)

print(json.dumps({
    "environment": dict(os.environ),
    "told": ask("GET", "/broker")[1],
    "cheap": ask("POST", "/v1/chat/completions", {"model": "cheap"})[0],
    "dear": ask("POST", "/v1/chat/completions", {"model": "dear"})[0],
    "messages": ask("POST", "/v1/messages", {"model": "cheap"})[0],
}))
"""


class CommandOfAClient(BrokerTestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.upstream = cls.class_stub()
        form = cls.form()
        form.env["A_COPY"] = form.tokens["bob"]
        cls.alices, cls.alices_run = cls.run_agent(form, "--client", "alice")
        cls.hidden = {*form.tokens.values(), *form.secrets.values()}

    @classmethod
    def form(cls):
        return LongForm(
            {"openai": an_upstream(cls.upstream, CHAT), "anthropic": an_upstream(cls.upstream, MESSAGES, prefix="/claude")},
            {"alice": {"upstreams": ["openai"], "allowed_models": ["cheap"]}, "bob": {}},
        )

    @classmethod
    def run_agent(cls, form, *arguments):
        """(what the agent saw, the run)"""
        run = run_broker(*arguments, command=[sys.executable, "-c", AGENT], show_token=True, **form.options)
        return json.loads(run.stdout), run

    def test_is_held_to_its_policy_and_named_in_the_log(self):
        seen = self.alices
        self.assertEqual((seen["told"]["client"], seen["cheap"], seen["dear"], seen["messages"]), ("alice", 200, 403, 403))
        events = [json.loads(line) for line in self.alices_run.log_text.splitlines()]
        self.assertEqual({event["client"] for event in events if "client" in event}, {"alice"})
        self.assertEqual([event["event"] for event in events].count("request"), 1)

    def test_finds_the_variables_of_what_its_client_may_use_and_no_token_of_another(self):
        found = self.alices["environment"]
        self.assertEqual(found["OPENAI_BASE_URL"], found["BROKER_URL"] + "/v1")
        self.assertNotIn("ANTHROPIC_BASE_URL", found)
        self.assertFalse(self.hidden & set(found.values()))
        self.assertFalse([name for name in found if name.startswith("TEST_")])

    def test_needs_none_of_the_token_variables(self):
        form = self.form()
        for name in form.tokens:
            del form.env["TEST_TOKEN_" + name.upper()]
        form.env["TEST_TOKEN_BOB"] = "short"
        seen, _ = self.run_agent(form, "--client", "bob")
        self.assertEqual((seen["told"]["client"], seen["cheap"], seen["dear"]), ("bob", 200, 200))
        self.assertEqual(seen["environment"]["ANTHROPIC_BASE_URL"], seen["environment"]["BROKER_URL"] + "/claude")

    def test_must_say_as_whom_it_runs_where_there_are_several(self):
        form = self.form()
        for arguments, words in {
            (): ["--client", "alice", "bob"],
            ("--client", "mallory"): ["mallory", "alice", "bob"],
        }.items():
            with self.subTest(arguments):
                run = run_broker(*arguments, command=[sys.executable, "-c", "print('ran')"], **form.options)
                self.assertEqual((run.returncode, run.stdout, run.stderr.count("\n")), (2, "", 1), run.stderr)
                for word in ("broker_config.json", *words):
                    self.assertIn(word, run.stderr)

    def test_need_not_say_so_where_there_is_one(self):
        form = LongForm(None, {"alice": {"allowed_models": ["cheap"]}})
        form.config["upstream_base_url"] = self.upstream.url
        self.assertEqual(self.run_agent(form)[0]["told"]["client"], "alice")


@unittest.skipUnless(openai, "the OpenAI and Anthropic SDKs for Python are not installed")
class SdksAndAgentsAtOnce(BrokerTestCase):
    """Each with its own token, and each held to its own policy."""

    def setUp(self):
        super().setUp()
        allowed = {"allowed_models": ["cheap"]}
        self.form = LongForm(
            {"openai": an_upstream(None, CHAT), "anthropic": an_upstream(None, MESSAGES, prefix="/claude")},
            {"openai-sdk": allowed, "anthropic-sdk": allowed, "agent-one": allowed, "agent-two": {"upstreams": ["openai"]}},
        )
        self.served = self.form.watched(self.broker(dry_run=True, **self.form.options))

    def of_openai(self):
        url, key = self.served.url + "/v1", self.form.tokens["openai-sdk"]
        with contextlib.closing(openai.OpenAI(base_url=url, api_key=key)) as client:
            ask = lambda model: client.chat.completions.create(model=model, messages=[])  # noqa: E731
            self.assertEqual(ask("cheap").model, "cheap")
            with self.assertRaisesRegex(openai.PermissionDeniedError, 'may not use the model "dear"; allowed: cheap'):
                ask("dear")

    def of_anthropic(self):
        url, key = self.served.url + "/claude", self.form.tokens["anthropic-sdk"]
        with contextlib.closing(anthropic.Anthropic(base_url=url, api_key=key)) as client:
            ask = lambda model: client.messages.create(model=model, max_tokens=5, messages=[])  # noqa: E731
            self.assertEqual(ask("cheap").model, "cheap")
            with self.assertRaisesRegex(anthropic.PermissionDeniedError, 'may not use the model "dear"; allowed: cheap'):
                ask("dear")

    def of_an_agent(self, name, dear):
        env = minimal_environment({"BROKER_URL": self.served.url, "BROKER_CLIENT_TOKEN": self.form.tokens[name]})
        run = subprocess.run([sys.executable, "-c", AGENT], env=env, stdout=subprocess.PIPE, timeout=30, check=True)
        seen = json.loads(run.stdout)
        self.assertEqual((seen["told"]["client"], seen["cheap"], seen["dear"], seen["messages"]), (name, 200, dear, 403))

    def test_are_told_apart(self):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(self.of_openai), pool.submit(self.of_anthropic)]
            calls += [pool.submit(self.of_an_agent, "agent-one", 403), pool.submit(self.of_an_agent, "agent-two", 200)]
            for call in calls:
                call.result()
        asked = {event["client"]: 0 for event in self.served.events("request")}
        self.assertEqual(set(asked), set(self.form.tokens))


@with_terminals
class OnATerminal(BrokerTestCase):
    def test_a_line_follows_for_each_request_as_it_ends_and_names_its_client(self):
        stub, terminal = self.stub(that_used(31)), Terminal(self)
        form = LongForm(None, {"alice": {}, "bob": {"allowed_models": ["cheap"]}})
        broker = form.watched(self.broker(stub, preexec_fn=terminal.attach_stderr, wait_ready=False, **form.options))
        terminal.wait_for("To paste into another shell")
        broker.port = int(re.search(rb"listens on http://127\.0\.0\.1:([0-9]+)", terminal.shown).group(1))
        broker.post_json(CHAT, chat(model="gpt-x"), token=form.tokens["alice"])
        broker.post_json(CHAT, chat(model="gpt-x"), token=form.tokens["bob"])
        broker.request("GET", "/v1/models?q=hidden", token=fresh_token())
        for line in (
            r"\n\S+ alice POST /v1/chat/completions gpt-x 200\b.* \d+ ms 31 tokens\r\n",
            r"\n\S+ bob POST /v1/chat/completions gpt-x .*model_not_allowed.* \d+ ms\r\n",
            r"\n\S+ - GET /v1/models - .*client_token_required.* \d+ ms\r\n",
        ):
            eventually(lambda: re.search(line, terminal.read().decode()), what=line)  # noqa: B023
        for token in form.tokens.values():
            self.assertNotIn(token.encode(), terminal.shown)

    def test_under_a_command_there_is_none(self):
        stub, terminal = self.stub(), Terminal(self)
        command = [sys.executable, "-c", AGENT]
        broker = self.broker(stub, preexec_fn=terminal.attach_stderr, command=command)
        self.assertEqual(broker.wait(), 0)
        self.assertEqual(terminal.read(), b"")


class DryRun(BrokerTestCase):
    def test_shows_each_client_without_its_variable_a_random_token(self):
        form = LongForm(None, {"alice": {"allowed_models": ["cheap"]}, "bob": {}, "carol": {}})
        del form.env["TEST_TOKEN_ALICE"], form.env["TEST_TOKEN_CAROL"]
        broker = self.broker(dry_run=True, **form.options)
        shown = {
            name: broker.wait_stderr(rf"export TEST_TOKEN_{name.upper()}=(\S+)").group(1) for name in ("alice", "carol")
        }
        self.assertNotIn("TEST_TOKEN_BOB=", broker.stderr_text())
        self.assertNotEqual(shown["alice"], shown["carol"])
        self.assertEqual(broker.post_json(CHAT, chat("dear"), token=shown["carol"]).status, 200)
        self.assert_refused(broker.post_json(CHAT, chat(model="dear"), token=shown["alice"]), 403, "model_not_allowed")
        self.assertEqual(broker.post_json(CHAT, chat(), token=form.tokens["bob"]).status, 200)


class WrongClients(WrongFiles):
    """Exit code 2, and one line that names the file, the key and the mend."""

    def alice(self, served=None, **keys):
        form = LongForm(served, {"alice": keys})
        form.config["clients"]["alice"] = {
            key: value for key, value in form.config["clients"]["alice"].items() if value is not LEFT_OUT
        }
        return form

    def test_values_of_its_keys(self):
        no_number = [0, -1, 1.5, "10", None, True, [], 10**30]
        wrong = {
            "tokens_per_day": no_number,
            "requests_per_minute": no_number,
            "max_concurrent_requests": no_number,
            "token_env": [LEFT_OUT, None, "", "A B", 5, "A=B"],
            "upstreams": [None, [], "openai", ["nobody"], [5]],
            "allowed_paths": [None, [], CHAT, ["v1"], ["/v1/**"], [5]],
            "allowed_models": [None, [], "cheap", [5], [""]],
            "expires": [
                None, 5, "", "tomorrow", "2027-01-31", "2027-01-31T18:00:00", "2027-13-01T00:00:00Z", "2027-01-31T18:00:00+1",
            ],
        }  # fmt: skip
        cases = {
            f"{key} {value!r}": (self.alice(**{key: value}), [f"clients.alice.{key}"])
            for key, values in wrong.items()
            for value in values
        }
        self.assert_each_wrong(cases, start=True)

    def test_a_misspelt_key_names_the_nearest_one(self):
        self.assert_each_wrong({"": (self.alice(token_per_day=5), ["clients.alice.token_per_day", "tokens_per_day"])})

    def test_a_rule_that_no_request_could_ever_match(self):
        upstreams = {"github": an_upstream(None, "GET /repos/*", prefix="/github"), "openai": an_upstream(None, CHAT)}
        key = "clients.alice.allowed_paths"
        self.assert_each_wrong(
            {
                "no upstream has it": (self.alice(upstreams, allowed_paths=["/v1/embeddings"]), [key, "/v1/embeddings"]),
                "another method": (self.alice(upstreams, allowed_paths=["GET " + CHAT]), [key, "GET " + CHAT]),
                "without the prefix": (self.alice(upstreams, allowed_paths=["GET /repos/a"]), [key, "prefix"]),
                "of an upstream it may not use": (
                    self.alice(upstreams, upstreams=["openai"], allowed_paths=["GET /github/repos/a"]),
                    [key, "GET /github/repos/a"],
                ),
                "another type of body": (self.alice(upstreams, allowed_paths=[f"POST {CHAT} text/plain"]), [key]),
            }
        )

    def test_maps_and_names(self):
        def with_clients(value):
            form = LongForm(None, {"alice": {}})
            form.config["clients"] = value
            return form

        keys = {"token_env": "TEST_TOKEN_ALICE"}
        values = {repr(value)[:40]: value for value in ({}, [], None, "x", {"it": None}, {"it": "TOKEN"})}
        names = {name[:8]: {name: keys} for name in ("", "-a", "_a", "a b", "a/b", "ü", "x" * 65)}
        self.assert_each_wrong({case: (with_clients(value), ["clients"]) for case, value in {**values, **names}.items()})

    def test_short_and_long_form_mixed_names_both_and_says_which_to_keep(self):
        cases = {}
        for value in ("TEST_TOKEN", None):
            form = LongForm(None, {"alice": {}})
            form.config["client_token_env"] = value
            cases[repr(value)] = (form, ['"clients"', '"client_token_env"', "keep"])
        self.assert_each_wrong(cases)

    def test_two_that_name_one_variable(self):
        form = LongForm(None, {"alice": {}, "bob": {"token_env": "TEST_TOKEN_ALICE"}})
        self.assert_each_wrong({"": (form, ["clients.alice.token_env", "clients.bob.token_env"])})


class WrongTokens(BrokerTestCase):
    def test_two_clients_with_one_token_and_one_without_are_2_and_name_both(self):
        same = LongForm(None, {"alice": {}, "bob": {}})
        same.env["TEST_TOKEN_BOB"] = same.env["TEST_TOKEN_ALICE"]
        unset = LongForm(None, {"alice": {}, "bob": {}})
        del unset.env["TEST_TOKEN_BOB"]
        for form, words in ((same, ["clients.alice.token_env", "clients.bob.token_env"]), (unset, ["clients.bob.token_env"])):
            run = run_broker(**form.options)
            self.assertEqual((run.returncode, run.stderr.count("\n")), (2, 1), run.stderr)
            for word in ("broker_config.json", *words):
                self.assertIn(word, run.stderr)


LEFT_OUT = object()
