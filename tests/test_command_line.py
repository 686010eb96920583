"""The command line: what each call prints, how it ends, and what a command under us finds."""

import functools
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import unittest

from tests.support import (
    ABSENT,
    ROOT,
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    BrokerTestCase,
    Lifeline,
    canary,
    eventually,
    free_port,
    make_executable,
    posix_only,
    run_broker,
    run_each,
)

CHAT = "/v1/chat/completions"


def python(code):
    """A command that runs this Python code."""
    return [sys.executable, "-c", code]


# Writes the command's environment where the test can read it: its output is looked through for leaks.
SHOW_ENVIRONMENT = "import json, os; json.dump(dict(os.environ), open('env.json', 'w'))"


class ShortCalls(BrokerTestCase):
    def test_version_prints_one(self):
        run = run_broker("--version")
        self.assertEqual(run.returncode, 0)
        self.assertRegex(run.stdout, r"[0-9]+\.[0-9]+")
        self.assertEqual(run.stdout.count("\n"), 1)

    def test_help_names_every_option(self):
        run = run_broker("--help")
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        options = ["--config", "--dry-run", "--port", "--check", "--report", "--new-token", "--version", "COMMAND"]
        for option in options:
            self.assertIn(option, run.stdout)

    def test_new_token_prints_256_fresh_random_bits(self):
        runs = [run() for run in run_each({number: {"args": ["--new-token"], "config": None} for number in range(3)}).values()]
        tokens = {run.stdout for run in runs}
        self.assertEqual(len(tokens), 3)
        for run in runs:
            self.assertEqual((run.returncode, run.stderr), (0, ""))
            self.assertRegex(run.stdout, r"\A[A-Za-z0-9_-]{43,64}\n\Z")
            self.assertEqual(run.files, [])

    def test_a_new_token_will_do_as_one(self):
        token = run_broker("--new-token").stdout.strip()
        self.assertEqual(run_broker("--check", config={}, token=token).returncode, 0)

    def test_wrong_usage_is_2_and_says_so_without_a_traceback(self):
        cases = [
            ["--no-such-option"],
            ["--port", "x", "--check"],
            ["--port", "-1", "--check"],
            ["--port", "65536", "--check"],
            ["--port", "80.5", "--check"],
            ["--config"],
            ["a stray word"],
            ["--check", "--report"],
        ]
        for case, call in run_each({" ".join(args): {"args": args} for args in cases}).items():
            with self.subTest(case):
                run = call()
                self.assertEqual(run.returncode, 2, run.stderr)
                self.assertTrue(run.stderr)
                self.assertEqual(run.stdout, "")


class Check(BrokerTestCase):
    def said(self, run):
        return run.stdout + run.stderr

    def test_says_what_would_be_allowed_and_where_it_goes(self):
        run = run_broker("--check", config={"allowed_paths": ["/v1/messages", "GET /v1/models/*"]})
        self.assertEqual(run.returncode, 0, run.stderr)
        for words in ("/v1/messages", "POST", "GET", "/v1/models/*", "http://127.0.0.1:9"):
            self.assertIn(words, self.said(run))

    def test_makes_no_file_and_opens_no_port(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            run = run_broker("--check", config={"listen_port": taken.getsockname()[1]})
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertEqual(run.files, ["broker_config.json"])

    def test_resolves_the_secret_and_ends_with_1_where_that_fails(self):
        run = run_broker("--check", config={}, secret=ABSENT)
        self.assertEqual(run.returncode, 1)
        self.assertIn(SECRET_VARIABLE, run.stderr)

    @posix_only
    def test_runs_the_secret_command_once_and_shows_nothing_of_it(self):
        folder = self.folder()
        secret = canary()
        witness = os.path.join(folder, "runs")
        program = make_executable(folder, "op", f"echo run >> '{witness}'; echo {secret}\n")
        source = {"kind": "command", "argv": [program, "read"]}
        run = run_broker("--check", config={"secret_source": source}, secret=secret, env={SECRET_VARIABLE: ABSENT})
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn(program, self.said(run))
        with open(witness, encoding="ascii") as file:
            self.assertEqual(file.read(), "run\n")

    @posix_only
    def test_in_a_dry_run_runs_no_secret_command(self):
        folder = self.folder()
        witness = os.path.join(folder, "ran")
        program = make_executable(folder, "op", f"touch '{witness}'\n")
        source = {"kind": "command", "argv": [program]}
        run = run_broker("--check", "--dry-run", config={"secret_source": source})
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertFalse(os.path.exists(witness))

    def test_ends_as_a_start_would(self):
        cases = {
            "a wrong key": ({"config": {"mode": "x"}}, 2),
            "no token": ({"config": {}, "token": ABSENT}, 2),
            "a short token": ({"config": {}, "token": "short"}, 2),
            "a log in no folder": ({"config": {"event_log": "nowhere/events.jsonl"}}, 1),
        }
        calls = run_each({case: {"args": ["--check"], **keywords} for case, (keywords, _) in cases.items()})
        for case, (_, code) in cases.items():
            with self.subTest(case):
                run = calls[case]()
                self.assertEqual(run.returncode, code, run.stderr)
                self.assertNotIn("events.jsonl", run.files)

    def test_only_says_that_the_upstream_cannot_be_reached(self):
        run = run_broker("--check", config={"upstream_base_url": f"https://127.0.0.1:{free_port()}"})
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertRegex(self.said(run).lower(), "reach|connect|refused")

    def test_tells_who_vouches_for_the_upstream_and_until_when(self):
        stub = self.stub(tls=True)
        run = run_broker("--check", config={}, upstream=stub)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("2120", self.said(run))
        self.assertRegex(self.said(run), r"\bca\b")
        self.assertEqual(stub.requests, [])

    def test_ends_with_1_at_a_bad_certificate(self):
        kinds = ("expired", "wrong_host", "self_signed")
        for kind, call in run_each({kind: {"args": ["--check"], "upstream": self.stub(tls=kind)} for kind in kinds}).items():
            with self.subTest(kind):
                run = call()
                self.assertEqual(run.returncode, 1, run.stderr)
                self.assertIn("certificate", run.stderr.lower())

    def test_repeats_the_warnings_of_a_start(self):
        none = {"secret_source": {"kind": "none"}, "allowed_paths": ["/v1/messages"]}
        wide = ["GET /v1/files", "/v1/batches", "/v1/fine_tuning/jobs", "/v1/uploads", "/v1/containers", "/v1/vector_stores"]
        wide += ["/v1/assistants", "/v1/threads", "DELETE /v1/x", "GET /v1/y/*"]
        cases = {
            "a secret in the environment": ({}, ["environment"]),
            "no caller token": ({**none, "client_token_env": None}, ["token"]),
            "a host that a network may answer for": ({**none, "allowed_hosts": ["localhost", "broker.lan"]}, ["broker.lan"]),
            "wide paths": ({**none, "allowed_paths": wide}, [rule.rpartition(" ")[2] for rule in wide]),
            "nothing": (none, []),
        }
        calls = run_each({case: {"args": ["--check"], "config": config} for case, (config, _) in cases.items()})
        for case, (_, words) in cases.items():
            with self.subTest(case):
                run = calls[case]()
                self.assertEqual(run.returncode, 0, run.stderr)
                warnings = [line for line in self.said(run).splitlines() if "warning" in line.lower()]
                for word in words:
                    self.assertTrue(any(word in line for line in warnings), (word, warnings))
                self.assertEqual(bool(warnings), bool(words), warnings)

    @posix_only
    def test_ended_by_a_signal_says_so_by_its_exit_code(self):
        # A vault that asks its person: Ctrl-C there is no "all is well" for a script.
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number):
                folder = self.folder()
                program = make_executable(folder, "op", f"touch '{folder}/begun'; sleep 30\n")
                config = {"secret_source": {"kind": "command", "argv": [program]}}
                env = {SECRET_VARIABLE: ABSENT}
                broker = self.broker(config=config, env=env, args=["--check"], wait_ready=False)
                eventually(lambda: os.path.exists(os.path.join(folder, "begun")), what="the command")  # noqa: B023
                broker.signal(number)
                self.assertEqual(broker.wait(10), 128 + number)
                self.assertEqual(broker.stderr_text(), "")

    def test_warns_about_a_configuration_in_a_git_work_tree(self):
        folder = self.folder()
        os.makedirs(os.path.join(folder, ".git"))
        os.makedirs(os.path.join(folder, "sub"))
        run = run_broker("--check", config={}, folder=os.path.join(folder, "sub"))
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertRegex(self.said(run), r"(?i)warning.*\bgit\b")


class Report(BrokerTestCase):
    def line(self, event, **fields):
        return json.dumps({"time": "2026-01-02T03:04:05.678Z", "event": event, **fields}) + "\n"

    def pair(self, number, path=CHAT, model="gpt-x", outcome="ok", status=200, duration=10, usage=None, client="default"):
        common = {"id": f"id-{number}", "method": "POST", "path": path, "mode": "proxy", "model": model}
        request = self.line("request", client=client, stream=False, request_bytes=10, **common)
        answer = {"status": status, "outcome": outcome, "response_bytes": 5, "ttfb_ms": 1, "duration_ms": duration}
        return request + self.line("response", id=f"id-{number}", usage=usage, attempt=1, **answer)

    def report(self, text, **keywords):
        if isinstance(text, str):
            text = text.encode()

        def prepare(run):
            with open(run.log_path, "wb") as file:
                file.write(text)

        return run_broker("--report", config={}, prepare=prepare, **keywords)

    def row(self, run, *words):
        rows = [line for line in run.stdout.splitlines() if all(word in line for word in words)]
        self.assertEqual(len(rows), 1, run.stdout)
        return rows[0]

    def numbers(self, row):
        return [float(number) for number in re.findall(r"(?<![\w./-])[0-9]+(?:\.[0-9]+)?(?![\w/-])", row.replace(",", ""))]

    def test_counts_lines_with_impossible_numbers_as_unreadable(self):
        good, bad = self.pair(1, usage={"input_tokens": 3, "output_tokens": 4}), self.pair(2)
        text = good + bad.replace('"duration_ms": 10', f'"duration_ms": 1{"0" * 400}')
        text += self.pair(3).replace('"usage": null', '"usage": {"input_tokens": 1e999}')
        run = self.report(text)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertIn("2 lines could not be read", run.stdout)

    def test_survives_letters_that_the_terminal_does_not_have(self):
        run = self.report(self.pair(1, model="\ubaa8\ub378"), env={"PYTHONIOENCODING": "cp1252"})
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.row(run, CHAT, "??")

    def test_counts_requests_errors_latency_and_tokens(self):
        text = "".join(
            self.pair(number, duration=number * 10, usage={"input_tokens": 100, "output_tokens": 7}) for number in range(1, 21)
        )
        for number, outcome in enumerate(["upstream_error", "upstream_timeout", "client_disconnected", "dry_run"], 100):
            text += self.pair(number, model="other-model", outcome=outcome, status=500, duration=33)
        run = self.report(text)
        self.assertEqual(run.returncode, 0, run.stderr)
        # By nearest rank: of 20 values the 10th and the 19th.
        numbers = self.numbers(self.row(run, CHAT, "gpt-x"))
        for wanted in (20, 0, 100, 190, 2000, 140):
            self.assertIn(wanted, numbers)
        # Two of four: a caller who left and a dry-run are no errors.
        numbers = self.numbers(self.row(run, CHAT, "other-model"))
        for wanted in (4, 2, 33):
            self.assertIn(wanted, numbers)

    def test_tells_models_and_paths_apart(self):
        text = self.pair(1) + self.pair(2, model="gpt-y") + self.pair(3, path="/v1/messages", model="gpt-x")
        run = self.report(text)
        self.row(run, CHAT, "gpt-x")
        self.row(run, CHAT, "gpt-y")
        self.row(run, "/v1/messages", "gpt-x")

    def test_counts_denials_by_their_reason(self):
        denied = [("path_not_allowed", 3), ("client_token_required", 2)]
        text = "".join(
            self.line("denied", id=f"d-{reason}-{number}", status=403, reason=reason, method="GET", path="/v1/x")
            for reason, count in denied
            for number in range(count)
        )
        run = self.report(text)
        self.assertEqual(run.returncode, 0, run.stderr)
        for reason, count in denied:
            self.assertRegex(run.stdout, rf"{reason}\W+{count}\b|\b{count}\W+{reason}")

    def test_counts_those_that_were_suppressed_too(self):
        fields = {"status": 401, "reason": "client_token_required", "method": "GET", "path": "/v1/x"}
        text = self.line("denied", id="a", **fields) + self.line("denied", id="b", suppressed=40, **fields)
        self.assertRegex(self.report(text).stdout, r"client_token_required\W+42\b|\b42\W+client_token_required")

    def test_counts_lines_that_it_cannot_read_and_says_so(self):
        bad = [b"not json\n", b"[]\n", b"null\n", b'{"event": 5}\n', b"\xff\xfe\n", b"\0\0\0\n", b'{"event": "resp']
        run = self.report(self.pair(1).encode() + b"".join(bad[:5]) + self.pair(2).encode() + b"".join(bad[5:]))
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertRegex(run.stdout + run.stderr, r"\b[5-7] lines?\b")
        self.assertIn(2, self.numbers(self.row(run, CHAT, "gpt-x")))

    def test_survives_fields_of_any_kind(self):
        odd = [None, True, -1, 1.5, 1e300, "x", [], {}, "9" * 5000]
        text = ""
        for number, value in enumerate(odd):
            text += self.pair(number, path=value, model=value, duration=value, usage=value, client=value)
            text += self.pair(number + 100, usage={"input_tokens": value, "output_tokens": value}, outcome=value, status=value)
            text += self.line("denied", id=value, status=value, reason=value, path=value, method=value, suppressed=value)
        text += self.line("response", id="nobody asked") + self.line("start") + self.line("something new")
        self.assertEqual(self.report(text).returncode, 0)

    def test_prints_only_what_is_printable(self):
        evil = "\x1b[2J\x07\u202e\x9b1m\r\n"
        text = self.pair(1, path="/v1/" + evil, model="m" + evil, client="c" + evil)
        text += self.line("denied", id="d", status=403, reason="r" + evil, method="GET", path="/v1/x" + evil)
        run = self.report(text)
        self.assertEqual(run.returncode, 0, run.stderr)
        for line in (run.stdout + run.stderr).splitlines():
            self.assertTrue(line.isprintable(), repr(line))

    def test_needs_neither_token_nor_secret(self):
        run = self.report(self.pair(1), secret=ABSENT, token=ABSENT)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.row(run, CHAT, "gpt-x")

    def test_reads_what_the_broker_wrote(self):
        stub = self.stub()
        broker = self.broker(stub)
        for _ in range(3):
            broker.post_json(CHAT, {"model": "gpt-real"})
        broker.request("GET", "/v1/unknown")
        broker.wait_event(event="response", count=3)
        broker.wait_event(event="denied")
        run = run_broker("--report", "--config", broker.config_path)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn(3, self.numbers(self.row(run, CHAT, "gpt-real")))
        self.assertIn("path_not_allowed", run.stdout)

    def test_has_no_cell_wider_than_60_characters(self):
        long = "m" * 60_000
        text = self.pair(1, model=long, path="/" + long, client=long)
        text += self.line("denied", id="d", status=403, reason=long, method="GET", path="/v1/x")
        run = self.report(text)
        self.assertEqual(run.returncode, 0, run.stderr)
        for line in run.stdout.splitlines():
            for cell in re.split(" {2,}", line):
                self.assertLessEqual(len(cell), 60, cell[:100])
        self.row(run, "m" * 59 + "\u2026", "10.0")

    @posix_only
    def test_of_a_fifo_is_refused(self):
        # Opened, it would be waited for until somebody writes.
        run = run_broker("--report", config={}, prepare=lambda run: os.mkfifo(run.log_path), timeout=10)
        self.assertEqual((run.returncode, run.stdout), (1, ""))
        self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
        self.assertIn("events.jsonl", run.stderr)

    def test_for_programs_is_an_object_a_line(self):
        text = "".join(self.pair(number, duration=number * 10, usage={"input_tokens": 3}) for number in range(1, 5))
        text += self.pair(9, outcome="upstream_error", model="m" * 60_000)
        for reason in ("path_not_allowed", "path_not_allowed", "budget_exhausted"):
            fields = {"status": 403, "reason": reason, "method": "POST", "path": CHAT}
            text += self.line("denied", id="d", client="default", **fields)

        def prepare(run):
            with open(run.log_path, "w", encoding="utf-8") as file:
                file.write(text + "no line\n")

        run = run_broker("--report", "--json", config={}, prepare=prepare)
        self.assertEqual(run.returncode, 0, run.stderr)
        rows = {row["model"]: row for row in map(json.loads, run.stdout.splitlines())}
        self.assertEqual(
            rows["gpt-x"],
            {
                "day": "2026-01-02",
                "client": "default",
                "path": CHAT,
                "model": "gpt-x",
                "requests": 4,
                "denied": {},
                "errors": 0,
                "p50_ms": 20,
                "p95_ms": 40,
                "input_tokens": 12,
                "output_tokens": 0,
            },
        )
        self.assertEqual([row["errors"] for row in rows.values() if row["model"] and row["model"][:1] == "m"], [1])
        self.assertIn({"path_not_allowed": 2, "budget_exhausted": 1}, [row["denied"] for row in rows.values()])
        self.assertIn("1 line", run.stderr)

    def test_without_a_log_ends_in_one_line(self):
        run = run_broker("--report", config={})
        self.assertLessEqual((run.stdout + run.stderr).count("\n"), 1)
        self.assertNotIn("events.jsonl", run.files)


class Ready(BrokerTestCase):
    def test_prints_what_a_person_needs_to_call(self):
        stub = self.stub()
        broker = self.broker(stub, config={"allowed_paths": [CHAT, "/v1/messages", "GET /v1/models"]})
        broker.wait_stderr("curl ")
        broker.wait_stderr(r"OPENAI_BASE_URL=\S*" + re.escape(broker.url + "/v1"))
        broker.wait_stderr(r"ANTHROPIC_BASE_URL=\S*" + re.escape(broker.url))
        text = broker.stderr_text()
        for words in ("proxy", CHAT, "/v1/messages", "GET /v1/models", "$" + TOKEN_VARIABLE):
            self.assertIn(words, text)
        self.assertNotIn("export " + TOKEN_VARIABLE, text)
        self.assertEqual(broker.stdout_text(), "")

    def test_answers_the_health_check_from_then_on(self):
        broker = self.broker(dry_run=True)
        self.assertEqual(broker.request("GET", "/healthz", token=False).json(), {"ok": True})

    def test_says_that_it_is_a_dry_run(self):
        for case, broker in self.brokers({"--dry-run": {"dry_run": True}, "mode": {"config": {"mode": "dry_run"}}}).items():
            with self.subTest(case):
                broker.wait_stderr("(?i)dry.run")

    def test_prints_a_curl_call_that_works(self):
        broker = self.broker(dry_run=True)
        broker.wait_stderr("curl ")
        text = broker.stderr_text()
        at = text.index("curl ")
        lines = []
        for line in text[at:].splitlines():
            lines.append(line.rstrip("\\"))
            if not line.endswith("\\"):
                break
        try:
            env = {**os.environ, TOKEN_VARIABLE: broker.token}
            run = subprocess.run(["sh", "-c", " ".join(lines)], env=env, capture_output=True, timeout=20)
        except FileNotFoundError:
            self.skipTest("no sh here")
        if run.returncode == 127:
            self.skipTest("no curl here")
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertNotIn(b'"error"', run.stdout)
        self.assertTrue(json.loads(run.stdout))

    def test_names_what_the_environment_brings_in(self):
        folder = self.folder()
        bundle = os.path.join(folder, "bundle.pem")
        open(bundle, "w").close()
        config = {"upstream_base_url": "https://192.0.2.1", "secret_source": {"kind": "none"}}
        env = {"HTTPS_PROXY": "http://proxy.example:3128", "SSL_CERT_FILE": bundle}
        run = run_broker("--check", "--dry-run", config=config, env=env)
        self.assertEqual(run.returncode, 0, run.stderr)
        broker = self.broker(config=config, env=env)
        broker.wait_stderr("proxy.example:3128")
        broker.wait_stderr(re.escape(bundle))

    @posix_only
    def test_names_the_absolute_path_of_the_secret_command(self):
        folder = self.folder()
        secret = canary()
        program = make_executable(folder, "fake-op", f"echo {secret}\n")
        env = {"PATH": folder + os.pathsep + os.environ["PATH"], SECRET_VARIABLE: ABSENT}
        broker = self.broker(config={"secret_source": {"kind": "command", "argv": ["fake-op"]}}, env=env, secret=secret)
        broker.wait_stderr(re.escape(program))

    def test_warns_once_about_each_thing(self):
        broker = self.broker(config={"client_token_env": None, "allowed_paths": ["GET /v1/files/*", "/v1/messages"]})
        broker.wait_stderr("curl ")
        warnings = [line for line in broker.stderr_text().splitlines() if "warning" in line.lower()]
        for words in ("token", SECRET_VARIABLE, "/v1/files/*"):
            self.assertEqual(sum(words in line for line in warnings), 1, (words, warnings))


class ThePort(BrokerTestCase):
    def test_of_the_command_line_counts_more_than_that_of_the_file(self):
        port = free_port()
        broker = self.broker(dry_run=True, config={"listen_port": free_port()}, args=["--port", port])
        self.assertEqual(broker.port, port)
        self.assertNotEqual(self.broker(dry_run=True, args=["--port", 0]).port, 0)

    def test_that_somebody_holds_is_an_operational_failure(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            run = run_broker(config={"listen_port": port}, timeout=20)
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertIn(str(port), run.stderr)
        self.assertEqual(run.stderr.count("\n"), 1, run.stderr)

    def test_that_somebody_holds_on_the_ipv6_loopback_is_one_too(self):
        with socket.socket(socket.AF_INET6) as taken:
            try:
                taken.bind(("::1", 0))
            except OSError:
                self.skipTest("no IPv6 here")
            taken.listen()
            run = run_broker("--port", taken.getsockname()[1], config={}, timeout=20)
        self.assertEqual(run.returncode, 1, run.stderr)


@posix_only
class Ending(BrokerTestCase):
    def test_a_first_signal_is_a_clean_stop(self):
        for number, broker in self.brokers({n: {"dry_run": True} for n in (signal.SIGTERM, signal.SIGINT)}).items():
            with self.subTest(number):
                broker.wait_event(event="start")
                broker.signal(number)
                self.assertEqual(broker.wait(), 0)
                self.assertEqual(broker.events()[-1]["event"], "stop")

    def wait_for_no_entry(self, broker):
        def refused():
            try:
                broker.request("GET", "/healthz", timeout=5)
            except (OSError, http.client.HTTPException):
                return True
            return False

        eventually(refused, what="a closed door")

    def test_a_request_in_flight_is_finished_first(self):
        release = threading.Event()

        def hold(conn, request):
            conn.hold(release)
            conn.respond_json({"held": True})

        stub = self.stub(hold)
        broker = self.broker(stub)
        with broker.connect() as caller:
            caller.send(broker.head("GET", "/v1/models"))
            stub.wait_for_requests(1)
            broker.signal(signal.SIGTERM)
            self.wait_for_no_entry(broker)
            release.set()
            self.assertEqual(caller.read_answer().json(), {"held": True})
        self.assertEqual(broker.wait(), 0)

    def test_a_vault_that_fails_is_an_operational_failure(self):
        folder = self.folder()
        program = make_executable(folder, "op", "echo 'not signed in' >&2; exit 6\n")
        run = run_broker(config={"secret_source": {"kind": "command", "argv": [program]}}, timeout=20)
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertIn("6", run.stderr)
        self.assertIn("not signed in", run.stderr)
        run = run_broker(config={"secret_source": {"kind": "command", "argv": ["no-such-program-anywhere"]}}, timeout=20)
        self.assertIn(run.returncode, (1, 2), run.stderr)
        self.assertIn("no-such-program-anywhere", run.stderr)


@posix_only
class CommandUnderUs(BrokerTestCase):
    def run_command(self, command, *args, **keywords):
        return run_broker(*args, **{"config": {}, "show_token": True, **keywords}, command=command)

    def run_commands(self, cases):
        """Several beside each other, as run_each."""
        return run_each({case: {"show_token": True, **keywords} for case, keywords in cases.items()})

    def environment(self, upstream=None, name=None, **keywords):
        """The environment that a command finds."""
        return self.environments({"": {"upstream": upstream, "name": name, **keywords}})[""]()

    def environments(self, cases):
        """The same for several beside each other: {case: call}."""
        runs = {}
        for case, keywords in cases.items():
            folder = self.folder()
            program = make_executable(folder, keywords.pop("name", None) or "show", SHOW_ENVIRONMENT, sys.executable)
            runs[case] = {"command": [program], "folder": folder, **keywords}
        return {
            case: functools.partial(self.environment_of, call, runs[case]["folder"])
            for case, call in self.run_commands(runs).items()
        }

    def environment_of(self, call, folder):
        run = call()
        self.assertEqual((run.returncode, run.stdout, run.stderr), (0, "", ""))
        with open(os.path.join(folder, "env.json"), encoding="utf-8") as file:
            env = json.load(file)
        for value in env.values():
            self.assertNotIn(run.secret, value)
            self.assertNotIn(run.token, value)
        return env

    def test_its_exit_code_is_ours(self):
        codes = (0, 1, 2, 3, 77, 255)
        for code, call in self.run_commands({code: {"command": ["sh", "-c", f"exit {code}"]} for code in codes}).items():
            with self.subTest(code):
                run = call()
                self.assertEqual((run.returncode, run.stdout, run.stderr), (code, "", ""))

    def test_needs_no_other_token_than_its_own(self):
        run = self.run_command(["sh", "-c", "exit 5"], token=ABSENT)
        self.assertEqual((run.returncode, run.stdout, run.stderr), (5, "", ""))

    def test_looks_at_no_token_of_the_shell(self):
        # Whatever is left there from another day: this run has a token of its own.
        for value in ("short", "", "with a blank in it", "x" * 40):
            with self.subTest(value):
                env = {"BROKER_CLIENT_TOKEN": value, TOKEN_VARIABLE: ABSENT}
                found = self.environment(config={"client_token_env": "BROKER_CLIENT_TOKEN"}, env=env)
                self.assertRegex(found["BROKER_CLIENT_TOKEN"], r"\A[A-Za-z0-9_-]{43,}\Z")
        self.assertEqual(self.run_command(["sh", "-c", "exit 5"], token="short").returncode, 5)

    def test_keeps_a_no_proxy_that_means_everything(self):
        env = self.environment(env={"NO_PROXY": "*", "no_proxy": "*"})
        self.assertEqual((env["NO_PROXY"], env["no_proxy"]), ("*", "*"))

    def test_that_dies_of_a_signal_gives_128_and_its_number(self):
        numbers = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        calls = self.run_commands({number: {"command": ["sh", "-c", f"kill -{int(number)} $$"]} for number in numbers})
        for number, call in calls.items():
            with self.subTest(number):
                self.assertEqual(call().returncode, 128 + number)

    def test_that_is_not_there_is_127_and_one_that_cannot_run_is_126(self):
        folder = self.folder()
        with open(os.path.join(folder, "text"), "w", encoding="ascii") as file:
            file.write("hello\n")
        wanted = {
            "no-such-program-anywhere": 127,
            os.path.join(folder, "nothing"): 127,
            os.path.join(folder, "text"): 126,
            folder: 126,
        }
        for program, call in self.run_commands({program: {"command": [program]} for program in wanted}).items():
            with self.subTest(program):
                self.assertEqual(call().returncode, wanted[program])

    def test_that_is_not_named_is_wrong_usage(self):
        self.assertEqual(self.run_command([], timeout=20).returncode, 2)

    def test_is_not_run_where_the_start_fails(self):
        folder = self.folder()
        witness = os.path.join(folder, "ran")
        cases = {
            "a wrong key": ({"config": {"mode": "x"}}, 2),
            "no secret": ({"secret": ABSENT}, 1),
            "no log": ({"config": {"event_log": "nowhere/events.jsonl"}}, 1),
        }
        calls = self.run_commands({case: {"command": ["touch", witness], **keywords} for case, (keywords, _) in cases.items()})
        self.assertFalse(os.path.exists(witness))
        for case, (_, code) in cases.items():
            with self.subTest(case):
                run = calls[case]()
                self.assertEqual(run.returncode, code, run.stderr)
                self.assertEqual(run.stderr.count("\n"), 1)

    def test_ends_us_at_once_whatever_its_children_still_do(self):
        script = "sleep 100 > /dev/null 2>&1 < /dev/null & exit 3"
        self.assertEqual(self.run_command(["sh", "-c", script], timeout=10).returncode, 3)

    def test_takes_a_secret_command_that_still_runs_with_it(self):
        folder, secret = self.folder(), canary()
        lifeline = Lifeline(os.path.join(folder, "alive"))
        self.addCleanup(lifeline.close)
        script = f"""
            cd '{folder}'
            if [ ! -e second ]; then touch second; echo {secret}; exit; fi
            exec 9>alive; echo >&9; touch begun
            sleep 60 & wait
        """
        config = {"secret_source": {"kind": "command", "argv": [make_executable(folder, "op", script)], "cache_seconds": 0}}
        code = f"""
import os, socket, sys, time
with socket.create_connection(("127.0.0.1", int(os.environ["BROKER_URL"].rpartition(":")[2]))) as sock:
    token = os.environ["BROKER_CLIENT_TOKEN"]
    sock.sendall(b"GET /v1/models HTTP/1.1\\r\\nHost: localhost\\r\\nX-Broker-Token: " + token.encode() + b"\\r\\n\\r\\n")
    while not os.path.exists({os.path.join(folder, "begun")!r}):
        time.sleep(0.01)
    sys.exit(3)
"""
        run = self.run_command(python(code), config=config, secret=secret, env={SECRET_VARIABLE: ABSENT}, timeout=20)
        self.assertEqual(run.returncode, 3, run.stderr)
        eventually(lifeline.has_ended, 5, "the end of the secret command")

    def test_gets_its_arguments_as_they_are(self):
        words = ["a b", "", "--port", "--", "$HOME", "*"]
        run = self.run_command([*python("import sys; print(sys.argv[1:])"), *words])
        self.assertEqual(run.stdout, repr(words) + "\n")

    def test_has_the_standard_streams_of_its_caller(self):
        code = "import sys; sys.stdout.write(sys.stdin.read().upper()); sys.stderr.write('so')"
        run = self.run_command(python(code), stdin="hello")
        self.assertEqual((run.stdout, run.stderr), ("HELLO", "so"))

    def test_reaches_the_upstream_with_the_token_of_this_run_alone(self):
        stub = self.stub()
        code = """
import json, os, sys, urllib.error, urllib.request
results = []
for token in (os.environ["BROKER_CLIENT_TOKEN"], sys.argv[1], None):
    headers = {"Authorization": "Bearer " + token} if token else {}
    try:
        request = urllib.request.Request(os.environ["BROKER_URL"] + "/v1/models", headers=headers)
        results.append(urllib.request.urlopen(request).status)
    except urllib.error.HTTPError as error:
        results.append(error.code)
        error.close()
print(results)
"""
        token = "configured-token-canary"
        run = self.run_command([*python(code), token], upstream=stub, token=token)
        self.assertEqual((run.stdout, run.stderr), ("[200, 401, 401]\n", ""))
        self.assertEqual(stub.requests[0].header("Authorization"), "Bearer " + run.secret)
        events = [json.loads(line) for line in run.log_text.splitlines()]
        self.assertEqual((events[0]["event"], events[-1]["event"]), ("start", "stop"))

    def test_gets_a_port_of_its_own_unless_one_is_named(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            env = self.environment(config={"listen_port": port})
        self.assertRegex(env["BROKER_URL"], r"\Ahttp://127\.0\.0\.1:[0-9]+\Z")
        self.assertNotEqual(env["BROKER_URL"], f"http://127.0.0.1:{port}")
        port = free_port()
        folder = self.folder()
        run = self.run_command(["sh", "-c", "echo $BROKER_URL"], "--port", port, folder=folder)
        self.assertEqual(run.stdout, f"http://127.0.0.1:{port}\n")

    def test_gets_a_fresh_token_each_time(self):
        tokens = {environment()["BROKER_CLIENT_TOKEN"] for environment in self.environments({1: {}, 2: {}}).values()}
        self.assertEqual(len(tokens), 2)
        self.assertGreaterEqual(min(map(len, tokens)), 43)

    def test_finds_neither_the_secret_nor_a_token_in_its_environment(self):
        secret, token = canary(), canary()
        env = {"COPY_OF_THE_SECRET": secret, "COPY_OF_THE_TOKEN": token, "KEPT": "yes"}
        found = self.environment(secret=secret, token=token, env=env)
        for name in (SECRET_VARIABLE, TOKEN_VARIABLE, "COPY_OF_THE_SECRET", "COPY_OF_THE_TOKEN"):
            self.assertNotIn(name, found)
        self.assertEqual(found["KEPT"], "yes")

    def test_finds_no_copy_of_a_secret_that_a_command_brought(self):
        folder = self.folder()
        secret = canary()
        program = make_executable(folder, "op", f"echo {secret}\n")
        config = {"secret_source": {"kind": "command", "argv": [program]}}
        found = self.environment(config=config, secret=secret, env={SECRET_VARIABLE: ABSENT, "COPY": secret})
        self.assertNotIn("COPY", found)

    def test_goes_past_no_proxy_to_us(self):
        cases = {"": ({}, set()), "some": ({"NO_PROXY": "a.example", "no_proxy": "b.example"}, {"a.example"})}
        proxy = {"HTTP_PROXY": "http://192.0.2.1:9"}
        environments = self.environments({case: {"env": {**env, **proxy}} for case, (env, _) in cases.items()})
        for case, (_, wanted) in cases.items():
            with self.subTest(case):
                found = environments[case]()
                for name in ("NO_PROXY", "no_proxy"):
                    names = set(found[name].split(","))
                    self.assertLessEqual({"127.0.0.1", "localhost"}, names)
                self.assertLessEqual(wanted, set(found["NO_PROXY"].split(",")))

    def test_finds_the_variables_of_the_providers_that_the_allowlist_holds(self):
        openai = {"OPENAI_BASE_URL": "/v1", "OPENAI_API_BASE": "/v1", "OPENAI_API_KEY": None}
        anthropic = {"ANTHROPIC_BASE_URL": "", "ANTHROPIC_AUTH_TOKEN": None, "ANTHROPIC_API_KEY": None}
        azure = {"AZURE_OPENAI_ENDPOINT": "", "AZURE_OPENAI_API_KEY": None}
        google = {"GOOGLE_GEMINI_BASE_URL": "", "GEMINI_API_KEY": None}
        everything = {**openai, **anthropic, **azure, **google}
        cases = [
            ([CHAT], openai),
            (["/v1/responses"], openai),
            (["/v1/embeddings"], openai),
            (["/v1/completions"], openai),
            (["/v1/messages"], anthropic),
            (["/openai/deployments/*/chat/completions"], azure),
            (["/openai/deployments/gpt/embeddings"], azure),
            (["/v1beta/models/*:generateContent"], google),
            (["GET /v1/models"], {}),
            ([CHAT, "/v1/messages", "GET /v1/models"], {**openai, **anthropic}),
        ]
        environments = self.environments({str(allowed): {"config": {"allowed_paths": allowed}} for allowed, _ in cases})
        for allowed, wanted in cases:
            with self.subTest(allowed):
                env = environments[str(allowed)]()
                for name in everything:
                    if name not in wanted:
                        self.assertNotIn(name, env)
                    elif wanted[name] is None:
                        self.assertEqual(env[name], env["BROKER_CLIENT_TOKEN"])
                    else:
                        self.assertEqual(env[name], env["BROKER_URL"] + wanted[name])

    def test_called_claude_finds_no_api_key_that_it_would_ask_about(self):
        env = self.environment(config={"allowed_paths": ["/v1/messages"]}, name="claude")
        self.assertNotIn("ANTHROPIC_API_KEY", env)
        self.assertEqual(env["ANTHROPIC_AUTH_TOKEN"], env["BROKER_CLIENT_TOKEN"])

    def test_overrides_what_the_caller_had_set(self):
        env = self.environment(env={"OPENAI_BASE_URL": "https://elsewhere.example", "OPENAI_API_KEY": "sk-old"})
        self.assertEqual(env["OPENAI_BASE_URL"], env["BROKER_URL"] + "/v1")
        self.assertEqual(env["OPENAI_API_KEY"], env["BROKER_CLIENT_TOKEN"])

    def test_has_its_callers_folder_mask_limits_and_group(self):
        import resource

        folder = self.folder()
        state = (
            "import os, resource; "
            "mask = os.umask(0); "
            "print(os.getcwd(), mask, resource.getrlimit(resource.RLIMIT_CORE), os.getpgrp() == os.getppid())"
        )
        limits = resource.getrlimit(resource.RLIMIT_CORE)

        def set_up():
            os.umask(0o027)
            if limits[1] != 0:
                resource.setrlimit(resource.RLIMIT_CORE, (4096, limits[1]))

        soft = 4096 if limits[1] != 0 else limits[0]
        run = self.run_command(python(state), cwd=folder, preexec_fn=set_up)
        self.assertEqual(run.stdout, f"{folder} {0o027} {(soft, limits[1])} True\n")

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc here")
    def test_has_default_signals_and_none_of_our_descriptors(self):
        code = """
import os, re
status = open("/proc/self/status").read()
masks = {name: int(re.search(name + r":\\s+(\\w+)", status).group(1), 16) for name in ("SigBlk", "SigIgn")}
# Python itself ignores SIGPIPE and SIGXFSZ; 32 and 33 are libc's own, which vfork leaves ignored in a child.
masks["SigIgn"] &= ~(1 << 12 | 1 << 24 | 1 << 31 | 1 << 32)
open_ones = []
for name in os.listdir("/proc/self/fd"):
    try:
        os.fstat(int(name))
        open_ones.append(int(name))
    except OSError:
        pass  # the one that listdir itself had open
print(masks["SigBlk"], masks["SigIgn"], sorted(open_ones))
"""
        run = self.run_command(python(code))
        self.assertEqual(run.stdout, "0 0 [0, 1, 2]\n")
        run = self.run_command(["sh", "-c", "trap '' USR1; grep -E '^Sig(Blk|Ign)' /proc/self/status"])
        self.assertEqual([int(line.split()[1], 16) for line in run.stdout.splitlines()], [0, 1 << (signal.SIGUSR1 - 1)])

    def started(self, script):
        """A broker whose command has written its first line."""
        broker = self.broker(command=["sh", "-c", script])
        broker.wait_stdout("ready", 20)
        return broker

    def test_gets_a_sigterm_that_was_sent_to_us(self):
        broker = self.started("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done")
        broker.signal(signal.SIGTERM)
        self.assertEqual(broker.wait(), 7)

    def test_alone_decides_what_ctrl_c_does(self):
        broker = self.started("trap 'echo caught' INT; trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
        # A terminal sends it to the whole group.
        os.killpg(broker.pid, signal.SIGINT)
        broker.wait_stdout("caught")
        self.assertIsNone(broker.process.poll())
        broker.signal(signal.SIGTERM)
        self.assertEqual(broker.wait(), 9)

    def test_alone_decides_what_ctrl_backslash_does(self):
        broker = self.started("trap 'echo caught' QUIT; trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
        os.killpg(broker.pid, signal.SIGQUIT)
        broker.wait_stdout("caught")
        self.assertIsNone(broker.process.poll())
        broker.signal(signal.SIGTERM)
        self.assertEqual(broker.wait(), 9)

    def test_that_dies_of_ctrl_backslash_gives_131(self):
        broker = self.started("ulimit -c 0; echo ready; exec sleep 60")
        os.killpg(broker.pid, signal.SIGQUIT)
        self.assertEqual(broker.wait(), 128 + signal.SIGQUIT)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc here")
    def test_goes_on_to_ignore_what_its_caller_ignored(self):
        # `nohup broker … -- agent`: the agent is to outlive the window too.
        command = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]
        cases = {("HUP",): [signal.SIGHUP], ("INT", "QUIT"): [signal.SIGINT, signal.SIGQUIT], (): []}
        for ignored, call in self.run_commands({case: {"command": command, "ignored": case} for case in cases}).items():
            with self.subTest(ignored):
                blocked, found = (int(line.split()[1], 16) for line in call().stdout.splitlines())
                # 32 and 33 are libc's own.
                self.assertEqual((blocked, found & ~(3 << 31)), (0, sum(1 << (number - 1) for number in cases[ignored])))

    def test_lives_on_where_the_system_has_no_sighup(self):
        # Windows: "no signal has come" was taken for the SIGHUP that there is none of, and the command was ended.
        folder = self.folder()
        script = os.path.join(folder, "as_on_windows.py")
        with open(script, "w", encoding="utf-8") as file:
            file.write(
                f"import signal, sys\ndel signal.SIGHUP, signal.SIGQUIT\nsys.path[0] = {ROOT!r}\n"
                "import broker\nsys.exit(broker.main())\n"
            )
        run = self.run_command(python("import time; time.sleep(1)"), folder=folder, script=script)
        self.assertEqual((run.returncode, run.stderr), (0, ""))

    def test_that_dies_of_ctrl_c_gives_130(self):
        broker = self.started("echo ready; exec sleep 60")
        os.killpg(broker.pid, signal.SIGINT)
        self.assertEqual(broker.wait(), 130)

    def test_works_in_a_dry_run_too(self):
        run = self.run_command(["sh", "-c", 'test -n "$BROKER_URL" && exit 5'], "--dry-run", secret=ABSENT)
        self.assertEqual(run.returncode, 5, run.stderr)

    def test_sees_a_proxy_that_is_ready(self):
        code = """
import os, urllib.request
print(urllib.request.urlopen(os.environ["BROKER_URL"] + "/healthz").read())
"""
        run = self.run_command(python(code))
        self.assertEqual((run.stdout, run.stderr), ("b'{\"ok\": true}'\n", ""))

    def test_is_run_once_the_secret_is_there(self):
        folder = self.folder()
        order = os.path.join(folder, "order")
        secret = canary()
        program = make_executable(folder, "op", f"echo secret >> '{order}'; echo {secret}\n")
        config = {"secret_source": {"kind": "command", "argv": [program]}}
        self.run_command(["sh", "-c", f"echo command >> '{order}'"], config=config, secret=secret)
        with open(order, encoding="ascii") as file:
            self.assertEqual(file.read(), "secret\ncommand\n")


if __name__ == "__main__":
    unittest.main()
