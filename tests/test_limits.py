"""What a client may use at most: requests a minute, requests at once, tokens a day; and the event log as their ledger."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import threading
import unittest

from tests.long_form import CHAT, LongForm, chat, left_of, pair, request_line, response_line, that_used
from tests.support import BrokerTestCase, Puppet, eventually, linux_only, posix_only, run_broker

try:
    import openai
except ImportError:
    openai = None

PATHS = [CHAT, "GET /v1/x", "HEAD /v1/x", "DELETE /v1/x", "PUT /v1/x", "PATCH /v1/x"]
UNTIL_MIDNIGHT = 86400


class LimitsTestCase(BrokerTestCase):
    """Its subclasses share a broker, and give each test clients of its own."""

    def start(self, clients, stub=None, **more):
        """A broker of this test's own."""
        stub = stub or self.stub()
        form = LongForm(None, clients, allowed_paths=PATHS)
        return form.watched(self.broker(stub, **{**form.options, **more})), form

    def ask(self, client, body=None, method="POST", path=CHAT):
        return self.served.request(method, path, chat() if body is None else body, token=self.form.tokens[client])

    def left(self, client):
        return left_of(self.served, self.form.tokens[client])

    def held(self, client, body):
        """(caller, puppet): a request that is at the upstream, which does nothing until told."""
        puppet = Puppet(self.upstream)
        caller = self.served.connect()
        self.addCleanup(caller.close)
        caller.send(self.served.post_bytes(CHAT, body, {"X-Broker-Token": self.form.tokens[client]}, token=False))
        puppet.wait()
        return caller, puppet

    def usage_of(self, answer):
        return self.served.wait_event(event="response", id=answer.header("X-Broker-Request-Id"))["usage"]

    def assert_rate_limited(self, answer):
        self.assert_refused(answer, 429, "rate_limited")
        wait = int(answer.header("Retry-After"))
        self.assertEqual(answer.header("x-should-retry"), "false" if wait > 60 else None)
        return wait

    def assert_exhausted(self, answer, budget, used, reserved, asked):
        """Its message names all of it, for the agent's user; and it says when to come back."""
        self.assert_refused(answer, 429, "budget_exhausted")
        numbers = [int(number) for number in re.findall(r"\b\d+\b", answer.message)]
        for number in (budget, used, reserved, asked):
            self.assertIn(number, numbers, answer.message)
        self.assertIn("tokens_per_day", answer.message)
        wait = int(answer.header("Retry-After"))
        if used + asked <= budget:
            self.assertEqual((wait, answer.header("x-should-retry")), (1, None))
        else:
            self.assertTrue(1 <= wait <= UNTIL_MIDNIGHT)
            self.assertEqual(answer.header("x-should-retry"), "false" if wait > 60 else None)


class Shared(LimitsTestCase):
    clients = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.upstream = cls.class_stub()
        cls.form = LongForm(None, cls.clients, allowed_paths=PATHS)
        cls.served = cls.form.watched(cls.class_broker(cls.upstream, **cls.form.options, **cls.started()))

    @classmethod
    def started(cls):
        """Further keywords of the broker."""
        return {}

    def setUp(self):
        super().setUp()
        self.upstream.forget()


class RequestsPerMinute(Shared):
    clients = {
        "two": {"requests_per_minute": 2},
        "three": {"requests_per_minute": 3, "allowed_models": ["m"], "allowed_paths": [CHAT]},
        "one": {"requests_per_minute": 1},
        "reloaded": {"requests_per_minute": 2},
        "refilled": {"requests_per_minute": 60},
        "free": {},
    }

    def test_beyond_it_is_429_with_the_time_to_wait_and_words_for_a_person(self):
        self.assertEqual([self.ask("two").status for _ in range(2)], [200, 200])
        refused = self.ask("two")
        self.assertTrue(1 <= self.assert_rate_limited(refused) <= 30)
        for words in ("two", "2 requests", "requests_per_minute", "try again"):
            self.assertIn(words, refused.message)
        self.assertEqual(len(self.upstream.requests), 2)
        self.assertEqual(self.ask("free").status, 200)

    def test_is_not_spent_by_what_it_refuses_but_by_what_is_refused_later(self):
        self.assertEqual(self.left("three")["requests_per_minute"], 3)
        self.assert_refused(self.ask("three", path="/v1/unknown"), 403, "path_not_allowed")
        self.assertEqual(self.left("three")["requests_per_minute"], 3)
        self.assert_refused(self.ask("three", chat(model="dear")), 403, "model_not_allowed")
        self.assert_refused(self.ask("three", b"[]", method="POST"), 415, "content_type_not_supported")
        self.assertEqual(self.left("three")["requests_per_minute"], 1)
        self.assertEqual(self.ask("three").status, 200)
        waits = [self.assert_rate_limited(self.ask("three")) for _ in range(5)]
        self.assertLessEqual(max(waits), 20)

    def test_of_one_is_one(self):
        self.assertEqual(self.ask("one").status, 200)
        self.assertTrue(30 <= self.assert_rate_limited(self.ask("one")) <= 60)

    def test_fills_again_as_time_goes_by(self):
        statuses = []
        while 429 not in statuses:
            self.assertLess(len(statuses), 1000)
            statuses.append(self.ask("refilled").status)
        self.assertGreaterEqual(statuses.count(200), 60)
        eventually(lambda: self.ask("refilled").status == 200)

    @posix_only
    def test_is_kept_over_a_reload_and_its_new_number_counts_at_once(self):
        self.assertEqual([self.ask("reloaded").status for _ in range(2)], [200, 200])
        self.reload()
        self.assert_rate_limited(self.ask("reloaded"))
        self.reload(requests_per_minute=1)
        self.assertTrue(self.assert_rate_limited(self.ask("reloaded")) > 30)

    def reload(self, **keys):
        before = len(self.served.events("reload"))
        config = json.loads(json.dumps(self.served.config))
        config["clients"]["reloaded"].update(keys)
        self.served.reload(config)
        eventually(lambda: len(self.served.events("reload")) > before)

    def test_refused_is_a_denied_line_of_its_client(self):
        for _ in range(3):
            refused = self.ask("two")
        event = self.served.wait_event(event="denied", id=refused.header("X-Broker-Request-Id"))
        self.assertEqual((event["client"], event["status"], event["reason"]), ("two", 429, "rate_limited"))


class RequestsAtOnce(Shared):
    clients = {"single": {"max_concurrent_requests": 1}, "leaver": {"max_concurrent_requests": 1}, "free": {}}

    def test_beyond_them_is_503_and_the_others_pass(self):
        caller, puppet = self.held("single", chat())
        self.upstream.script(that_used(0))
        refused = self.ask("single")
        self.assert_refused(refused, 503, "too_many_requests_in_flight")
        self.assertTrue(int(refused.header("Retry-After")) >= 1)
        self.assertIn("single", refused.message)
        self.assertEqual(self.left("single")["max_concurrent_requests"], 0)
        self.assertEqual(self.ask("free").status, 200)
        puppet.respond_json({})
        puppet.done()
        self.assertEqual(caller.read_answer().status, 200)
        # Its place was given back before the last bytes went out.
        self.assertEqual([self.ask("single").status for _ in range(3)], [200, 200, 200])

    def test_of_a_caller_who_left_are_free_again(self):
        caller, puppet = self.held("leaver", chat())
        caller.close()
        eventually(lambda: self.left("leaver")["max_concurrent_requests"] == 1)
        self.upstream.script(that_used(0))
        self.assertEqual(self.ask("leaver").status, 200)


class AskedFor(Shared):
    """Before a request is sent: the most that its answer may cost."""

    clients = {"poor": {"tokens_per_day": 1}, "told": {"tokens_per_day": 1}, "rich": {"tokens_per_day": 10**9}}

    def test_is_what_the_body_allows_its_answer(self):
        asked = {
            "nothing": ({}, 4096),
            "max_tokens": ({"max_tokens": 7}, 7),
            "max_completion_tokens": ({"max_completion_tokens": 7}, 7),
            "max_output_tokens": ({"max_output_tokens": 7}, 7),
            "max_tokens_to_sample": ({"max_tokens_to_sample": 7}, 7),
            "Gemini": ({"generationConfig": {"maxOutputTokens": 7}}, 7),
            "Bedrock": ({"inferenceConfig": {"maxTokens": 7}}, 7),
            "the greatest of them": ({"max_tokens": 7, "max_completion_tokens": 70, "max_output_tokens": 9}, 70),
            "n": ({"max_tokens": 7, "n": 3}, 21),
            "n alone": ({"n": 3}, 12288),
            "candidateCount": ({"generationConfig": {"maxOutputTokens": 7, "candidateCount": 2}}, 14),
            "zero": ({"max_tokens": 0}, 4096),
            "below zero": ({"max_tokens": -5}, 4096),
            "a text": ({"max_tokens": "7"}, 4096),
            "true": ({"max_tokens": True}, 4096),
            "a fraction": ({"max_tokens": 7.5}, 4096),
            "null": ({"max_tokens": None}, 4096),
            "a list": ({"max_tokens": [7]}, 4096),
            "n that is none": ({"max_tokens": 7, "n": 0}, 7),
            "no object": ({"max_tokens": 7, "generationConfig": [5], "inferenceConfig": "x"}, 7),
            "deeper is nobody's business": ({"max_tokens": 7, "extra": {"max_tokens": 70}}, 7),
        }
        for case, (body, tokens) in asked.items():
            with self.subTest(case):
                self.assert_exhausted(self.ask("poor", chat(**body)), 1, 0, 0, tokens)
        self.assertEqual(self.upstream.requests, [])
        self.assertEqual(self.ask("rich").status, 200)

    def test_is_asked_by_what_has_a_body_only(self):
        for method, status in {"GET": 200, "HEAD": 200, "DELETE": 200, "PUT": 429, "PATCH": 429}.items():
            with self.subTest(method):
                answer = self.served.request(
                    method, "/v1/x", {} if status == 429 else None, token=self.form.tokens["poor"]
                )
                self.assertEqual(answer.status, status, answer)

    def test_refused_is_a_denied_line_with_the_model(self):
        refused = self.ask("told", chat(5, model="dear"))
        event = self.served.wait_event(event="denied", id=refused.header("X-Broker-Request-Id"))
        self.assertEqual((event["client"], event["reason"], event["model"]), ("told", "budget_exhausted", "dear"))
        self.assertFalse([event for event in self.served.events("request") if event["client"] == "told"])

    def test_has_words_that_name_the_cure(self):
        message = self.ask("poor", chat(5)).message
        for words in ("max_tokens", "whoever runs the broker"):
            self.assertIn(words, message)
        # More than a whole day's budget: waiting would be no cure.
        self.assertNotIn("midnight", message)


class Settled(Shared):
    """After the answer: what it did cost."""

    clients = {
        name: {"tokens_per_day": 1000}
        for name in ("exact", "held", "stream", "over", "silent", "refused", "unreached", "gone", "cut", "never")
    }

    def used(self, client):
        return 1000 - self.left(client)["tokens_per_day"]

    def test_is_what_was_reported_before_the_last_bytes_go_out(self):
        self.upstream.script(that_used(31))
        for number in range(1, 6):
            self.assertEqual(self.ask("exact", chat(500)).status, 200)
            self.assertEqual(self.used("exact"), number * 31)
        refused = self.ask("exact", chat(846))
        self.assert_exhausted(refused, 1000, 155, 0, 846)
        self.assertIn("midnight", refused.message)
        self.assertEqual(self.ask("exact", chat(845)).status, 200)

    def test_reserves_meanwhile_what_was_asked_for(self):
        caller, puppet = self.held("held", chat(600))
        self.assertEqual(self.used("held"), 600)
        self.assert_exhausted(self.ask("held", chat(401)), 1000, 0, 600, 401)
        self.assert_exhausted(self.ask("held", chat(1001)), 1000, 0, 600, 1001)
        puppet.respond_json({"usage": {"prompt_tokens": 10, "completion_tokens": 20}})
        puppet.done()
        self.assertEqual(caller.read_answer().status, 200)
        self.assertEqual(self.used("held"), 30)
        self.upstream.script(that_used(0))
        self.assertEqual(self.ask("held", chat(970)).status, 200)

    def test_is_what_a_stream_reported_and_the_stream_is_never_cut(self):
        def stream(conn, request):
            conn.start_stream()
            for number in range(50):
                conn.chunk(b'data: {"choices": [{"delta": {"content": "%d"}}]}\n\n' % number)
            conn.chunk(b'data: {"usage": {"prompt_tokens": 100, "completion_tokens": 5000}}\n\ndata: [DONE]\n\n')
            conn.end()

        self.upstream.script(stream)
        answer = self.ask("stream", chat(10, stream=True))
        self.assertEqual((answer.status, answer.body.count(b"data: ")), (200, 52))
        self.assertEqual(self.left("stream")["tokens_per_day"], 0)
        self.assert_exhausted(self.ask("stream", chat(1)), 1000, 5100, 0, 1)
        self.assertEqual(self.usage_of(answer), {"input_tokens": 100, "output_tokens": 5000})

    def test_is_a_quarter_of_the_bytes_where_nothing_is_reported(self):
        self.upstream.script(lambda conn, request: conn.respond(200, [("Content-Type", "text/plain")], b"x" * 101))
        body = json.dumps(chat(10)).encode()
        answer = self.served.request(
            "POST", CHAT, body, {"Content-Type": "application/json"}, token=self.form.tokens["silent"]
        )
        wanted = -(-(len(body) + 101) // 4)
        self.assertEqual(self.used("silent"), wanted)
        usage = self.usage_of(answer)
        self.assertIs(usage["estimated"], True)
        self.assertEqual(usage["input_tokens"] + usage["output_tokens"], wanted)

    def test_is_nothing_for_an_error_unless_it_reports_something(self):
        self.upstream.script(lambda conn, request: conn.respond_json({"error": {"message": "x" * 999}}, 400))
        self.assertEqual(self.ask("refused", chat(500)).status, 400)
        self.assertEqual(self.used("refused"), 0)
        self.upstream.script(that_used(40, 500))
        self.assertEqual(self.ask("refused", chat(500)).status, 500)
        self.assertEqual(self.used("refused"), 40)

    def test_is_nothing_where_no_byte_of_an_answer_came(self):
        self.upstream.script(lambda conn, request: conn.close())
        self.assert_refused(self.ask("unreached", chat(500)), 502, "upstream_unreachable")
        self.assertEqual(self.used("unreached"), 0)
        caller, _ = self.held("never", chat(500))
        self.assertEqual(self.used("never"), 500)
        caller.close()
        eventually(lambda: self.used("never") == 0)

    def test_is_the_greater_of_the_two_where_the_answer_did_not_end(self):
        for client, leaves in {"gone": True, "cut": False}.items():
            with self.subTest(client):
                caller, puppet = self.held(client, chat(600, stream=True))
                puppet.start_stream()
                reported = b'data: {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n'
                text = b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % (b"x" * 900)
                puppet.chunk(reported + text)
                caller.read_head()
                self.assertEqual(caller.read_chunk(), reported + text)
                if leaves:
                    caller.close()
                else:
                    puppet.close()
                event = self.served.wait_event(event="response", client=client)
                self.assertEqual(event["outcome"], "client_disconnected" if leaves else "upstream_aborted")
                size = len(json.dumps(chat(600, stream=True))) + len(reported + text)
                self.assertIs(event["usage"]["estimated"], True)
                self.assertEqual(event["usage"]["input_tokens"] + event["usage"]["output_tokens"], -(-size // 4))
                eventually(lambda: self.used(client) == -(-size // 4))  # noqa: B023
                self.upstream.forget()


class AtTheEdge(Shared):
    clients = {"racer": {"tokens_per_day": 1000}, "crowd": {"max_concurrent_requests": 7}, "fast": {"requests_per_minute": 9}}

    def all_at_once(self, client, count=50, held_until=None):
        """The answers to so many callers, whom the upstream holds until all others were refused."""
        together = threading.Barrier(count)
        go_on = threading.Event()

        def hold(conn, request):
            conn.hold(go_on)
            that_used(100)(conn, request)

        def call(number):
            together.wait(20)
            answer = self.ask(client, chat(100))
            if answer.status != 200:
                refused.append(answer)
                if len(refused) >= held_until:
                    go_on.set()
            return answer

        refused = []
        self.upstream.script(hold)
        self.addCleanup(go_on.set)
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(call, range(count)))

    def test_of_a_budget_fifty_callers_get_no_more_than_fits(self):
        answers = self.all_at_once("racer", held_until=40)
        self.assertEqual(sorted(answer.status for answer in answers), [200] * 10 + [429] * 40)
        self.assertEqual(len(self.upstream.requests), 10)
        self.assertEqual({answer.header("Retry-After") for answer in answers if answer.status == 429}, {"1"})
        self.assertEqual(self.left("racer")["tokens_per_day"], 0)
        self.assert_exhausted(self.ask("racer", chat(1)), 1000, 1000, 0, 1)

    def test_of_a_rate_fifty_callers_get_no_more_than_it_allows(self):
        answers = self.all_at_once("fast", held_until=41)
        self.assertEqual(sorted(answer.status for answer in answers), [200] * 9 + [429] * 41)

    def test_of_places_fifty_callers_get_no_more_than_there_are(self):
        answers = self.all_at_once("crowd", held_until=43)
        self.assertEqual(sorted(answer.status for answer in answers), [200] * 7 + [503] * 43)
        self.assertEqual(self.left("crowd")["max_concurrent_requests"], 7)


BUDGET = 10_000


def log_and_rotated_files():
    """What each of some clients has in the log and in the files that were rotated from it."""
    return {
        "events.jsonl": [
            pair("several a", 100, client="several"),
            pair("several b", 250, client="several"),
            pair("another", 7, client="another"),
            # A day is that of the response's time.
            pair("before", 100, client="yesterday", offset=-1),
            request_line("midnight", client="yesterday", offset=-1),
            response_line("midnight", 3, client="yesterday"),
            request_line("unanswered yesterday", client="yesterday", offset=-1, size=4000),
            pair("tomorrow", 100, client="yesterday", offset=1),
            # A request without its response is charged a quarter of its bytes.
            request_line("unanswered a", client="unanswered", size=4001),
            request_line("unanswered b", client="unanswered", size=7),
            pair("answered", 50, client="unanswered"),
            # What asked for no tokens, or got nothing for them, is charged nothing.
            pair("get", 100, client="free", method="GET"),
            request_line("delete", client="free", method="DELETE", size=4000),
            pair("dry", 100, client="free", mode="dry_run", outcome="dry_run"),
            response_line("dry at midnight", 100, client="free", outcome="dry_run"),
            request_line("dry unanswered", client="free", mode="dry_run", size=4000),
            pair("failed", None, client="free", size=4000),
            response_line("over the rotation", 1, client="rotated"),
            pair("newest", 2, client="rotated"),
            "no json\n",
            "[]\n",
            '{"event":5}\n',
            "\udcff\udcfe\n",
            response_line("infinite").replace("99", "1e999"),
            request_line("bytes").replace('"request_bytes":40', '"request_bytes":"x"'),
            request_line("torn")[:60],
        ],
        "events.1.jsonl": [pair("older", 10, client="rotated"), request_line("over the rotation", client="rotated", size=4000)],
        "events.2026-11-25.jsonl": [pair("oldest", 100, client="rotated")],
        "events.jsonl.1": [pair("no STEM.*.EXT", 1000, client="rotated")],
        "events.1.json": [pair("another end", 1000, client="rotated")],
        "other.1.jsonl": [pair("another beginning", 1000, client="rotated")],
    }


class LedgerAtTheStart(Shared):
    """The log is the only ledger: what it says of today counts after any restart."""

    clients = {
        name: {"tokens_per_day": BUDGET}
        for name in ("several", "another", "yesterday", "unanswered", "free", "rotated", "linked")
    }

    @classmethod
    def started(cls):
        folder, elsewhere = cls.class_folder(), cls.class_folder()
        for name, lines in log_and_rotated_files().items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write("".join(lines).encode("utf-8", "surrogateescape"))
        if os.name == "posix":
            with open(os.path.join(elsewhere, "log"), "w", encoding="ascii") as file:
                file.write(pair("linked", 1000, client="linked"))
            os.symlink(os.path.join(elsewhere, "log"), os.path.join(folder, "events.link.jsonl"))
            os.mkfifo(os.path.join(folder, "events.fifo.jsonl"))
        os.mkdir(os.path.join(folder, "events.folder.jsonl"))
        return {"folder": folder}

    def used(self, client):
        return BUDGET - self.left(client)["tokens_per_day"]

    def test_has_what_each_client_used(self):
        self.assertEqual((self.used("several"), self.used("another")), (350, 7))
        self.assert_exhausted(self.ask("several", chat(9651)), BUDGET, 350, 0, 9651)
        self.assertEqual(self.ask("several", chat(9650)).status, 200)

    def test_takes_the_day_from_the_time_of_the_response(self):
        self.assertEqual(self.used("yesterday"), 3)

    def test_charges_a_request_without_its_response_a_quarter_of_its_bytes(self):
        self.assertEqual(self.used("unanswered"), 1001 + 2 + 50)

    def test_charges_nothing_for_what_cost_nothing(self):
        self.assertEqual(self.used("free"), 0)

    def test_has_the_files_that_were_rotated_from_the_log_and_no_others(self):
        self.assertEqual(self.used("rotated"), 1 + 2 + 10 + 100)

    def test_follows_no_link_and_waits_for_no_fifo(self):
        self.assertEqual(self.used("linked"), 0)

    def test_counts_what_cannot_be_read_and_says_it_once(self):
        self.served.wait_stderr(r"broker: 7 lines of the event log can't be read")
        self.assertEqual(self.served.stderr_text().count("can't be read"), 1)


class Ledger(LimitsTestCase):
    """What was counted alive is what the log says afterwards."""

    BUDGET = {"alice": {"tokens_per_day": BUDGET}}

    def setUp(self):
        super().setUp()
        self.upstream, self.shared_folder = self.stub(), self.folder()
        self.start_again()

    def start_again(self):
        self.served, self.form = self.start(self.BUDGET, self.upstream, folder=self.shared_folder)

    def test_survives_a_kill_in_the_middle_of_the_work(self):
        self.upstream.script(that_used(200))
        for _ in range(2):
            self.assertEqual(self.ask("alice", chat(500)).status, 200)
        self.served.wait_event(event="response", count=2)
        body = chat(500, user="x" * 300)
        self.held("alice", body)
        self.served.signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        self.served.wait()
        self.start_again()
        self.assertEqual(self.left("alice")["tokens_per_day"], BUDGET - 400 - -(-len(json.dumps(body)) // 4))

    def test_agrees_after_a_stop_with_what_was_counted_alive(self):
        handlers = [that_used(31), that_used(7, 500), lambda conn, request: conn.respond(200, body=b"x" * 77)]
        handlers += [lambda conn, request: conn.respond_json({}, 400), lambda conn, request: conn.close()]
        for handler in handlers:
            self.upstream.script(handler)
            self.ask("alice", chat(500))
        self.upstream.script(that_used(5))
        self.served.request("GET", "/v1/x", token=self.form.tokens["alice"])
        before = self.left("alice")
        self.served.wait_event(event="response", count=6)
        self.served.close()
        self.start_again()
        self.assertEqual(self.left("alice"), before)
        self.assertLess(before["tokens_per_day"], BUDGET - 38)

    @posix_only
    def test_is_kept_over_a_reload_that_rotates_it(self):
        self.upstream.script(that_used(40))
        self.ask("alice", chat(500))
        self.served.wait_event(event="response")
        os.rename(self.served.log_path, os.path.join(self.shared_folder, "events.1.jsonl"))
        config = json.loads(json.dumps(self.served.config))
        config["clients"]["alice"]["tokens_per_day"] = 50
        self.served.reload(config)
        self.served.wait_event(event="reload")
        self.assertEqual(self.left("alice")["tokens_per_day"], 10)
        self.assert_exhausted(self.ask("alice", chat(11)), 50, 40, 0, 11)

    @linux_only
    def test_is_one_brokers_alone(self):
        other = LongForm(None, self.BUDGET, event_log=self.served.log_path)
        run = run_broker(**other.options, timeout=15)
        self.assertEqual((run.returncode, run.stdout, run.stderr.count("\n")), (1, "", 1), run.stderr)
        for words in ("event_log", self.served.log_path, "another broker"):
            self.assertIn(words, run.stderr)
        self.assertEqual(self.ask("alice", chat(5)).status, 200)


class LedgerOfADryRun(LimitsTestCase):
    def test_is_not_charged_though_it_is_held_to_its_budget(self):
        self.served, self.form = self.start({"alice": {"tokens_per_day": 1000}}, dry_run=True)
        for _ in range(3):
            self.assertEqual(self.ask("alice", chat(1000)).status, 200)
        self.assert_exhausted(self.ask("alice", chat(1001)), 1000, 0, 0, 1001)


class NoLedger(BrokerTestCase):
    def test_where_a_limit_needs_it_is_1(self):
        form = LongForm(None, {"alice": {"tokens_per_day": 1000}})
        run = run_broker(**form.options, prepare=lambda run: os.mkdir(run.log_path), timeout=15)
        self.assertEqual((run.returncode, run.stderr.count("\n")), (1, 1), run.stderr)
        self.assertIn("event_log", run.stderr)


@unittest.skipUnless(openai, "the OpenAI SDK for Python is not installed")
class RunawayAgent(LimitsTestCase):
    def test_is_stopped_by_its_limit_in_words_that_its_user_sees(self):
        self.upstream = self.stub()
        message = {"role": "assistant", "content": "again"}
        answer = {
            "id": "x", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40},
        }  # fmt: skip
        self.upstream.script(lambda conn, request: conn.respond_json(answer))
        served, form = self.start({"agent": {"tokens_per_day": 200}}, self.upstream)
        with contextlib.closing(openai.OpenAI(base_url=served.url + "/v1", api_key=form.tokens["agent"])) as client:
            with self.assertRaises(openai.RateLimitError) as stopped:
                for _ in range(100):
                    client.chat.completions.create(model="m", max_tokens=50, messages=[{"role": "user", "content": "go on"}])
        for words in ("agent may use 200 tokens a day", "tokens_per_day", "midnight"):
            self.assertIn(words, str(stopped.exception))
        self.assertEqual(len(self.upstream.requests), 4)
