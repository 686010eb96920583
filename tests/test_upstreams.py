"""Several upstreams behind one broker: each request goes to the one with a rule for it, with that one's key alone."""

import json
import os
import sys

from tests.long_form import CHAT, LongForm, WrongFiles, an_upstream, chat
from tests.support import ABSENT, BrokerTestCase, Puppet, canary, fresh_token, run_broker, run_each

ISSUES = "/github/repos/octo/cat/issues"
GITHUB_PATHS = [
    "GET /repos/*/*/issues",
    "POST /repos/*/*/issues",
    "PATCH /repos/*/*/issues/*",
    "DELETE /repos/*/*/labels/*",
    "GET /repos/*/*/contents/*",
]


class ServedForAll(BrokerTestCase):
    """One broker with four upstreams, for the tests of a class."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.openai, cls.anthropic, cls.github, cls.groq = cls.stubs = [cls.class_stub() for _ in range(4)]
        cls.form = LongForm(
            {
                "openai": an_upstream(cls.openai, CHAT, "GET /v1/models"),
                "anthropic": an_upstream(
                    cls.anthropic,
                    "/v1/messages",
                    auth_header="x-api-key",
                    auth_scheme="",
                    extra_headers={"anthropic-beta": "fixed"},
                ),
                "github": an_upstream(cls.github, *GITHUB_PATHS, prefix="/github", extra_headers={"X-GitHub-Api-Version": "1"}),
                "groq": an_upstream(cls.groq, CHAT, prefix="/groq/fast"),
            }
        )
        cls.served = cls.form.watched(cls.class_broker(cls.openai, **cls.form.options))

    def setUp(self):
        super().setUp()
        for stub in self.stubs:
            stub.forget()

    def ask(self, path, body=None, method=None, **more):
        return self.served.request(method or "POST", path, body, **more)

    def seen(self):
        """(upstream, method, target) of all requests that arrived anywhere."""
        names = zip(self.form.secrets, self.stubs)
        return [(name, request.method, request.target) for name, stub in names for request in stub.requests]


class SeveralUpstreams(ServedForAll):
    def test_each_request_goes_to_the_one_with_a_rule_for_it(self):
        cases = {
            ("POST", CHAT): ("openai", CHAT),
            ("GET", "/v1/models"): ("openai", "/v1/models"),
            ("POST", "/v1/messages"): ("anthropic", "/v1/messages"),
            ("GET", ISSUES): ("github", "/repos/octo/cat/issues"),
            ("POST", "/groq/fast" + CHAT): ("groq", CHAT),
        }
        for (method, path), (name, target) in cases.items():
            with self.subTest(path):
                for stub in self.stubs:
                    stub.forget()
                answer = self.ask(path, chat() if method == "POST" else None, method)
                self.assertEqual(answer.status, 200, answer)
                self.assertEqual(self.seen(), [(name, method, target)])

    def test_each_gets_its_own_credential_and_fixed_headers_and_no_other_authority(self):
        self.ask("/v1/messages", b"{}", headers={"Content-Type": "application/json", "User-Agent": "test"})
        self.ask(ISSUES, method="GET", headers={"User-Agent": "test", "x-api-key": "mine", "X-GitHub-Api-Version": "2"})
        wanted = {
            self.anthropic: [
                ("Content-Type", "application/json"),
                ("Content-Length", "2"),
                ("anthropic-beta", "fixed"),
                ("x-api-key", self.form.secrets["anthropic"]),
            ],
            self.github: [
                ("X-GitHub-Api-Version", "1"),
                ("Authorization", "Bearer " + self.form.secrets["github"]),
            ],
        }
        for stub, own in wanted.items():
            common = [("Host", f"127.0.0.1:{stub.port}"), ("User-Agent", "test"), ("Accept-Encoding", "identity")]
            lower = lambda headers: sorted((name.lower(), value) for name, value in headers)  # noqa: E731
            self.assertEqual(lower(stub.requests[0].headers), lower(common + own))

    def test_a_prefix_comes_off_at_the_border_of_a_segment_and_once(self):
        for path in (
            "/githubs/repos/octo/cat/issues",
            "/github/github/repos/octo/cat/issues",
            "/github-repos/octo/cat/issues",
            "/repos/octo/cat/issues",
            "/github",
            "/GitHub/repos/octo/cat/issues",
            "/groq/v1/chat/completions",
            "/fast/v1/chat/completions",
        ):
            with self.subTest(path):
                self.assert_refused(self.ask(path, method="GET"), 403, "path_not_allowed")
        self.assertEqual(self.ask(ISSUES, method="GET").status, 200)
        self.assertEqual(self.seen(), [("github", "GET", "/repos/octo/cat/issues")])

    def test_what_is_allowed_is_named_with_its_prefix(self):
        answer = self.ask("/github/user", method="GET")
        self.assert_refused(answer, 403, "path_not_allowed")
        for rule in (f"POST {CHAT}", "GET /github/repos/*/*/issues", f"POST /groq/fast{CHAT}"):
            self.assertIn(rule, answer.message)

    def test_a_path_under_another_method_is_405_and_names_those_of_all(self):
        for path, allow in {CHAT: "POST", ISSUES: "GET, POST", "/v1/models": "GET"}.items():
            with self.subTest(path):
                answer = self.ask(path, method="DELETE")
                self.assert_refused(answer, 405, "method_not_allowed")
                self.assertEqual(answer.header("Allow"), allow)

    def test_a_missing_or_doubled_v1_is_mended_behind_the_prefix(self):
        for path in ("/groq/fast/chat/completions", "/groq/fast/v1/v1/chat/completions"):
            with self.subTest(path):
                answer = self.ask(path, chat())
                self.assertEqual((answer.status, self.groq.requests[-1].target), (200, CHAT))
                event = self.served.wait_event(event="request", id=answer.header("X-Broker-Request-Id"))
                self.assertEqual(event["path"], "/groq/fast" + CHAT)
        self.assert_refused(self.ask("/v1/groq/fast/chat/completions", chat()), 403, "path_not_allowed")

    def test_connections_are_kept_for_each_of_them_apart(self):
        paths = [CHAT, "/v1/messages", "/groq/fast" + CHAT]
        for path in paths:
            self.ask(path, chat())
        before = [stub.connections for stub in self.stubs]
        for path in paths * 3:
            self.assertEqual(self.ask(path, chat()).status, 200)
        self.assertEqual([stub.connections for stub in self.stubs], before)

    def test_the_secret_of_any_is_redacted_in_the_answers_of_all(self):
        secrets = list(self.form.secrets.values())

        def tell(conn, request):
            conn.respond_json({"all": secrets}, headers=[(f"X-Told-{n}", secret) for n, secret in enumerate(secrets)])

        for stub, path in zip((self.openai, self.anthropic, self.groq), (CHAT, "/v1/messages", "/groq/fast" + CHAT)):
            with self.subTest(path):
                stub.script(tell)
                answer = self.ask(path, chat())
                self.assertEqual(answer.json(), {"all": ["[redacted]"] * 4})
                self.assertEqual([answer.header(f"X-Told-{n}") for n in range(4)], ["[redacted]"] * 4)

    def test_the_secret_of_any_is_refused_in_the_requests_to_all(self):
        for name, secret in self.form.secrets.items():
            for path in (CHAT, "/v1/messages", "/groq/fast" + CHAT):
                with self.subTest(name, path=path):
                    self.assert_refused(self.ask(path, chat(user=secret)), 403, "secret_in_request")
        self.assert_refused(self.ask(ISSUES + "?q=" + self.form.secrets["openai"], method="GET"), 403, "secret_in_request")
        self.assertEqual(self.seen(), [])
        self.assertEqual(self.ask(CHAT, chat(user="somebody")).status, 200)

    def test_the_log_names_the_upstream_of_each_request(self):
        answer = self.ask(ISSUES, method="GET")
        refused = self.ask("/v1/messages", b"[]", headers={"Content-Type": "application/json"})
        for id, kind, name in (
            (answer.header("X-Broker-Request-Id"), "request", "github"),
            (answer.header("X-Broker-Request-Id"), "response", "github"),
            (refused.header("X-Broker-Request-Id"), "denied", "anthropic"),
        ):
            event = self.served.wait_event(event=kind, id=id)
            self.assertEqual((event["client"], event["upstream"]), ("default", name))


class RestApi(ServedForAll):
    """GitHub's, say: it is no model's, and all the same held by its rules."""

    def test_a_link_to_the_next_page_and_its_query_pass_as_they_are(self):
        link = '<https://api.github.com/repos/octo/cat/issues?per_page=100&page=3>; rel="next", <https://x/y>; rel="last"'
        self.github.script(lambda conn, request: conn.respond_json([1], headers=[("Link", link)]))
        answer = self.ask(ISSUES + "?per_page=100&page=2&state=all", method="GET")
        self.assertEqual((answer.json(), answer.header("Link")), ([1], link))
        self.assertEqual(self.seen(), [("github", "GET", "/repos/octo/cat/issues?per_page=100&page=2&state=all")])

    def test_a_percent_encoded_file_name_reaches_it_as_it_came(self):
        contents = "/repos/octo/cat/contents/"
        for name in ("READ%20ME.md", "%C3%BCber%20uns.md", "a+b%26c.txt", "%5Bid%5D.tsx", "v1%3A0"):
            with self.subTest(name):
                answer = self.ask("/github" + contents + name, method="GET")
                self.assertEqual(answer.status, 200, answer)
                self.assertEqual(self.github.requests[-1].target, contents + name)
                event = self.served.wait_event(event="request", id=answer.header("X-Broker-Request-Id"))
                self.assertEqual(event["path"], "/github" + contents + name)
        seen = len(self.github.requests)
        for name in ("a%2Fb", "%2e%2e", "%41", "a%00", "a%3Fb", "%FF", "a;b"):
            with self.subTest(name):
                self.assert_refused(self.ask("/github" + contents + name, method="GET"), 400, "bad_request")
        self.assertEqual(len(self.github.requests), seen)

    def test_a_star_is_one_segment(self):
        for path in ("contents/src/a.py", "contents/", "contents"):
            with self.subTest(path):
                refused = self.ask("/github/repos/octo/cat/" + path, method="GET")
                self.assertIn(refused.code, ("path_not_allowed", "bad_request"))
        self.assertEqual(self.seen(), [])

    def test_a_get_without_a_body_stays_one(self):
        answer = self.ask(ISSUES, method="GET", headers={"Accept": "application/vnd.github+json"})
        self.assertEqual(answer.status, 200)
        request = self.github.requests[0]
        self.assertEqual((request.body, request.header("Content-Length"), request.header("Content-Type")), (b"", None, None))
        self.assertEqual(request.header("Accept"), "application/vnd.github+json")

    def test_what_changes_something_passes_with_its_body_and_its_empty_answer(self):
        self.github.script(
            lambda conn, request: conn.respond_json({"number": 7}, 201),
            lambda conn, request: conn.respond_json({"state": "closed"}),
            lambda conn, request: conn.respond(204, reason="No Content"),
        )
        self.assertEqual(self.ask(ISSUES, {"title": "t"}).status, 201)
        self.assertEqual(self.ask(ISSUES + "/7", {"state": "closed"}, "PATCH").json(), {"state": "closed"})
        answer = self.ask("/github/repos/octo/cat/labels/old%20one", method="DELETE")
        self.assertEqual((answer.status, answer.body), (204, b""))
        self.assertEqual([request.body for request in self.github.requests], [b'{"title": "t"}', b'{"state": "closed"}', b""])


class OneThatFails(BrokerTestCase):
    """It leaves the others alone."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.rejecting, cls.losing, cls.slow, cls.other = (cls.class_stub() for _ in range(4))
        cls.key = os.path.join(cls.class_folder(), "key")
        cls.form = LongForm(
            {
                "rejecting": an_upstream(cls.rejecting, CHAT),
                "losing": an_upstream(
                    cls.losing, "/v1/losing", secret_source={"kind": "file", "path": cls.key, "cache_seconds": 0}
                ),
                "slow": an_upstream(cls.slow, "/v1/slow"),
                "other": an_upstream(cls.other, "/v1/other"),
            }
        )
        keep_in_file(cls.key, cls.form.secrets["losing"])
        cls.served = cls.form.watched(cls.class_broker(cls.other, **cls.form.options))

    def assert_others_go_on(self):
        self.assertEqual(self.served.post_json("/v1/other", chat()).status, 200)
        self.assertEqual(self.other.requests[-1].header("Authorization"), "Bearer " + self.form.secrets["other"])

    def test_by_rejecting_its_key_is_502_for_its_own_requests_only(self):
        self.rejecting.script(lambda conn, request: conn.respond_json({"error": {"message": "key revoked"}}, 401))
        for _ in range(3):
            refused = self.served.post_json(CHAT, chat())
            self.assert_refused(refused, 502, "upstream_rejected_secret")
            self.assertIn("key revoked", refused.message)
            self.assert_others_go_on()
        self.rejecting.forget()
        self.assertEqual(self.served.post_json(CHAT, chat()).status, 200)

    def test_by_losing_its_secret_is_503_for_its_own_requests_only(self):
        self.assertEqual(self.served.post_json("/v1/losing", chat()).status, 200)
        os.remove(self.key)
        refused = self.served.post_json("/v1/losing", chat())
        self.assert_refused(refused, 503, "secret_unavailable")
        self.assertNotIn(self.key, refused.message)
        self.served.wait_stderr(r"the secret of losing is not available: .*/key")
        self.assert_others_go_on()
        self.assertEqual(len(self.losing.requests), 1)

    def test_at_every_reload_leaves_the_others_key_known(self):
        fresh, missing = (os.path.join(self.folder(), name) for name in ("fresh", "missing"))
        sources = {path: {"kind": "file", "path": path} for path in (fresh, missing)}
        form = LongForm(
            {
                "renewed": an_upstream(self.other, CHAT, secret_source=sources[fresh]),
                "failing": an_upstream(self.losing, "/v1/losing", secret_source=sources[missing]),
            }
        )
        first = form.secrets["renewed"]
        for path, secret in zip((fresh, missing), (first, form.secrets["failing"])):
            keep_in_file(path, secret)
        served = form.watched(self.broker(self.other, **form.options))
        os.remove(missing)
        for _ in range(6):
            secret = canary()
            served.also_secret(secret)
            keep_in_file(fresh, secret)
            self.assertIn("nothing was changed", served.reload())
        self.assert_refused(served.post_json(CHAT, chat(user=first)), 403, "secret_in_request")
        self.assertEqual(served.post_json(CHAT, chat()).status, 200)

    def test_by_being_slow_holds_up_nobody_else(self):
        held = Puppet(self.slow)
        with self.served.connect() as caller:
            caller.send(self.served.post_bytes("/v1/slow", chat()))
            held.wait()
            self.assert_others_go_on()
            held.respond_json({"late": True})
            held.done()
            self.assertEqual(caller.read_answer().json(), {"late": True})


def keep_in_file(path, secret):
    """Where `secret` is now, for its owner alone."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(secret + "\n")
    return path


class AtTheStart(BrokerTestCase):
    def test_a_secret_that_cannot_be_had_is_1_and_names_its_upstream(self):
        missing = {"kind": "file", "path": "/nowhere/key"}
        cases = {
            "a file": LongForm({"one": an_upstream(None, "/a"), "two": an_upstream(None, "/b", secret_source=missing)}),
            "a variable": LongForm({"one": an_upstream(None, "/a"), "two": an_upstream(None, "/b")}),
        }
        cases["a variable"].env.pop("TEST_SECRET_TWO")
        for case, run in run_each({case: form.options for case, form in cases.items()}).items():
            with self.subTest(case):
                self.assertIn(run().returncode, (1, 2))
                self.assertEqual(run().stderr.count("\n"), 1)
                self.assertRegex(run().stderr, r"upstreams\.two|TEST_SECRET_TWO")

    def test_a_token_that_is_the_secret_of_any_upstream_is_refused(self):
        token = fresh_token()
        in_file = {"kind": "file", "path": keep_in_file(os.path.join(self.folder(), "key"), token)}
        known = LongForm({"one": an_upstream(None, "/a"), "two": an_upstream(None, "/b")}, {"ann": {}, "bob": {}})
        known.env.update(TEST_TOKEN_BOB=token, TEST_SECRET_TWO=token)
        later = LongForm(
            {"one": an_upstream(None, "/a"), "two": an_upstream(None, "/b", secret_source=in_file)}, {"ann": {}, "bob": {}}
        )
        later.env.update(TEST_TOKEN_BOB=token)
        runs = run_each({"known": known.options, "later": later.options})
        self.assertEqual((runs["known"]().returncode, runs["later"]().returncode), (2, 1))
        self.assertIn("clients.bob.token_env", runs["known"]().stderr)
        self.assertIn("upstreams.two.secret_source", runs["later"]().stderr)
        for run in runs.values():
            self.assertEqual(run().stderr.count("\n"), 1)
            self.assertNotIn(token, run().stderr)

    def test_check_says_for_each_upstream_what_it_may_be_asked(self):
        form = LongForm(
            {"one": an_upstream(None, CHAT), "github": an_upstream(None, *GITHUB_PATHS, prefix="/github")},
            {"ann": {"upstreams": ["one"], "tokens_per_day": 500}, "bob": {"allowed_models": ["cheap*"]}},
        )
        run = run_broker("--check", **form.options)
        self.assertEqual(run.returncode, 0, run.stderr)
        of_upstreams = ["upstream one", "upstream github", "GET /github/repos/*/*/issues"]
        for words in [*of_upstreams, "ann: tokens_per_day: 500", "bob: models: cheap*"]:
            self.assertIn(words, run.stdout)
        self.assertNotIn("events.jsonl", run.files)

    def test_a_dry_run_asks_for_no_secret_of_any(self):
        form = LongForm(
            {
                "variable": an_upstream(None, CHAT),
                "file": an_upstream(None, "/v1/messages", secret_source={"kind": "file", "path": "/nowhere/key"}),
                "command": an_upstream(None, "/v1/x", secret_source={"kind": "command", "argv": ["/nowhere/command"]}),
                "prompt": an_upstream(None, "/v1/y", secret_source={"kind": "prompt"}),
            }
        )
        broker = self.broker(config=form.config, dry_run=True)
        for path in (CHAT, "/v1/messages", "/v1/x", "/v1/y"):
            self.assertEqual(broker.post_json(path, chat()).status, 200)


# What a child of `--` finds is printed by itself.
SHOW_ENVIRONMENT = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]


def environment_of_a_command(form, *arguments):
    run = run_broker(*arguments, command=SHOW_ENVIRONMENT, show_token=True, **form.options)
    return json.loads(run.stdout)


class EnvironmentOfTheCommand(BrokerTestCase):
    BY_HOST = {
        "https://api.groq.com": ("GROQ_BASE_URL", "", "GROQ_API_KEY"),
        "https://api.together.xyz": ("TOGETHER_BASE_URL", "", "TOGETHER_API_KEY"),
        "https://api.cerebras.ai:443": ("CEREBRAS_BASE_URL", "", "CEREBRAS_API_KEY"),
        "https://api.perplexity.ai": ("PERPLEXITY_BASE_URL", "", "PERPLEXITY_API_KEY"),
        "https://api.fireworks.ai/inference": ("FIREWORKS_BASE_URL", "", "FIREWORKS_API_KEY"),
        "https://openrouter.ai": ("OPENROUTER_BASE_URL", "/api/v1", "OPENROUTER_API_KEY"),
        "https://API.Mistral.ai": ("MISTRAL_BASE_URL", "/v1", "MISTRAL_API_KEY"),
        "https://api.cohere.com": ("CO_API_URL", "", "CO_API_KEY"),
        "http://127.0.0.1:11434": ("OLLAMA_HOST", "", "OLLAMA_API_KEY"),
    }
    NAMED = {"GH_URL": "{url}/api/v3", "GH_KEY": "{token}", "GH_BOTH": "{url}?a={token}", "GH_BRACES": "{} {x}"}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        upstreams = {
            f"u{number}": {"base_url": url, "allowed_paths": ["/api/chat"], "prefix": f"/p{number}"}
            for number, url in enumerate(cls.BY_HOST)
        }
        upstreams["plain"] = an_upstream(None, "/v1/responses", environment={"MY_CHAT": "{url}/v1"})
        upstreams["github"] = an_upstream(None, "GET /user", prefix="/github", environment=cls.NAMED)
        cls.form = LongForm(upstreams)
        cls.form.env.update(A_COPY=cls.form.secrets["github"], HARMLESS="stays")
        cls.found = environment_of_a_command(cls.form)
        cls.url, cls.token = cls.found["BROKER_URL"], cls.found["BROKER_CLIENT_TOKEN"]

    def test_has_what_the_clients_of_a_providers_host_read(self):
        for number, (host, (base, path, key)) in enumerate(self.BY_HOST.items()):
            with self.subTest(host):
                self.assertEqual((self.found.get(base), self.found.get(key)), (f"{self.url}/p{number}{path}", self.token))
        self.assertFalse({"ANTHROPIC_API_KEY", "GEMINI_API_KEY", "AZURE_OPENAI_API_KEY"} & set(self.found))

    def test_has_what_an_upstream_names_with_url_and_token_put_in(self):
        wanted = {
            "GH_URL": self.url + "/github/api/v3",
            "GH_KEY": self.token,
            "GH_BOTH": f"{self.url}/github?a={self.token}",
            "GH_BRACES": "{} {x}",
            "MY_CHAT": self.url + "/v1",
            "OPENAI_BASE_URL": self.url + "/v1",
            "OPENAI_API_KEY": self.token,
        }
        self.assertEqual({name: self.found.get(name) for name in wanted}, wanted)

    def test_has_no_secret_of_any_upstream_under_any_name(self):
        self.assertEqual(self.found.get("HARMLESS"), "stays")
        self.assertFalse(set(self.form.secrets.values()) & set(self.found.values()))
        self.assertFalse([name for name in self.found if name.startswith("TEST_SECRET_")])

    def test_may_be_named_in_the_short_form_too(self):
        found = environment_of_a_command(LongForm(environment={"MINE": "{url}#{token}"}))
        self.assertEqual(found["MINE"], f"{found['BROKER_URL']}#{found['BROKER_CLIENT_TOKEN']}")


class WrongUpstreams(WrongFiles):
    """Exit code 2, and one line that names the file, the key and the mend."""

    def one(self, **keys):
        """A form with one upstream called `it`; a key that is ABSENT is left out."""
        form = LongForm({"it": an_upstream(None, CHAT, **keys)})
        form.config["upstreams"]["it"] = {
            key: value for key, value in form.config["upstreams"]["it"].items() if value is not ABSENT
        }
        return form

    def test_values_of_its_keys(self):
        wrong = {
            "base_url": [ABSENT, None, "", "http://api.example.com", "https://u:p@x.example", "https://x.example/?a", 5],
            "prefix": [None, "github", "/github/", "/", "/a//b", "/a/../b", "/a b", "/a*", "/%61", 5],
            "allowed_paths": [ABSENT, None, [], ["v1"], ["/v1/**"], [5], "/v1/chat/completions"],
            "secret_source": [ABSENT, None, {}, {"kind": "vault"}, "env", {"kind": "env"}, {"kind": "prompt", "name": "x"}],
            "auth_header": [None, "", "Host", "Content-Length", "a b"],
            "auth_scheme": [None, "two words", 5],
            "extra_headers": [None, [], {"Host": "x"}, {"Authorization": "x"}, {"a": 5}],
            "environment": [None, [], {"BROKER_URL": "x"}, {"broker_x": "y"}, {"A B": "x"}, {"A": 5}, {"": "x"}],
        }
        cases = {
            f"{key} {value!r}": (self.one(**{key: value}), [f"upstreams.it.{key}"])
            for key, values in wrong.items()
            for value in values
        }
        self.assert_each_wrong(cases, start=True)

    def test_an_unknown_key_names_the_nearest_one(self):
        self.assert_each_wrong(
            {
                "upstream": (self.one(bas_url="x"), ["upstreams.it.bas_url", "base_url"]),
                "the short form's name": (self.one(upstream_base_url="x"), ["upstreams.it.upstream_base_url"]),
            }
        )

    def test_maps_and_names(self):
        def with_upstreams(value):
            form = LongForm({"it": an_upstream(None, CHAT)})
            form.config["upstreams"] = value
            return form

        keys = LongForm({"it": an_upstream(None, CHAT)}).config["upstreams"]["it"]
        values = {repr(value)[:40]: value for value in ({}, [], None, "x", {"it": None}, {"it": []})}
        names = {name[:8]: {name: keys} for name in ("", "-a", ".a", "a b", "a/b", "ü", "x" * 65)}
        cases = {case: (with_upstreams(value), ["upstreams"]) for case, value in {**values, **names}.items()}
        self.assert_each_wrong(cases)

    def test_short_and_long_form_mixed_names_both_and_says_which_to_keep(self):
        cases = {}
        for key, value in {
            "upstream_base_url": "https://x.example",
            "allowed_paths": [CHAT],
            "secret_source": {"kind": "none"},
            "auth_header": "x-api-key",
            "auth_scheme": "",
            "extra_headers": {},
            "environment": {},
        }.items():
            form = self.one()
            form.config[key] = value
            cases[key] = (form, ['"upstreams"', f'"{key}"', "keep"])
        self.assert_each_wrong(cases)

    def test_rules_that_two_share_name_both(self):
        shared = {
            "the same": ([CHAT], "", [CHAT], ""),
            "a star and a literal": (["GET /v1/*/models"], "", ["GET /v1/x/models"], ""),
            "two stars": (["/a/*b/c"], "", ["/a/c*/c"], ""),
            "a prefix and none": (["/v1/x"], "/groq", ["/groq/v1/x"], ""),
            "a prefix that a star meets": (["/*/v1/x"], "", ["/v1/x"], "/groq"),
            "nested prefixes": (["/b/c"], "/a", ["/c"], "/a/b"),
            "different types of body": (["POST /v1/audio"], "", ["POST /v1/audio multipart/form-data"], ""),
        }
        cases = {}
        for case, (one, prefix, other, other_prefix) in shared.items():
            form = LongForm(
                {"first": an_upstream(None, *one, prefix=prefix), "second": an_upstream(None, *other, prefix=other_prefix)}
            )
            paths = [prefix + one[0].split()[-1], other_prefix + other[0].split()[1 if " " in other[0] else 0]]
            cases[case] = (form, ["upstreams.first", "upstreams.second", *paths])
        self.assert_each_wrong(cases)

    def test_rules_that_no_request_could_match_twice_are_fine(self):
        fine = {
            "another method": (["GET /v1/x"], "", ["POST /v1/x"], ""),
            "another prefix": ([CHAT], "/a", [CHAT], "/b"),
            "another depth": (["/v1/*"], "", ["/v1/*/x"], ""),
            "stars that never meet": (["/a*"], "", ["/b*"], ""),
            "a colon": (["/v1/models/*:generateContent"], "", ["/v1/models/*:countTokens"], ""),
        }
        for case, (one, prefix, other, other_prefix) in fine.items():
            with self.subTest(case):
                form = LongForm(
                    {"first": an_upstream(None, *one, prefix=prefix), "second": an_upstream(None, *other, prefix=other_prefix)}
                )
                config = {**self.served.config, **form.config}
                said = self.served.reload({key: value for key, value in config.items() if value is not ABSENT})
                self.assertNotIn("nothing was changed", said)

    def test_one_variable_with_two_values(self):
        form = LongForm(
            {
                "first": an_upstream(None, CHAT, environment={"MY_URL": "{url}"}),
                "second": an_upstream(None, CHAT, prefix="/b", environment={"MY_URL": "{url}"}),
            }
        )
        self.assert_each_wrong({"by the prefix": (form, ["upstreams.first", "upstreams.second", "MY_URL"])})

    def test_a_path_that_the_broker_answers_itself(self):
        form = LongForm({"it": an_upstream(None, "GET /broker"), "that": an_upstream(None, CHAT)})
        self.assert_each_wrong({"as a rule": (form, ["upstreams.it.allowed_paths", "GET /broker"])})
