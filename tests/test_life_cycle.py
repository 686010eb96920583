"""The life of a broker: what it says as it starts, what a signal does, what a reload changes."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

from tests.support import (
    ABSENT,
    BROKER,
    INSTALLED,
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    BrokerTestCase,
    Lifeline,
    canary,
    eventually,
    fresh_token,
    linux_only,
    make_executable,
    posix_only,
    run_broker,
    run_each,
    slow,
)

CHAT = "/v1/chat/completions"


def wait_until_stopping(broker):
    """Until it has heard a signal: the port is closed."""

    def closed():
        try:
            socket.create_connection(("127.0.0.1", broker.port), 5).close()
        except OSError:
            return True
        return False

    eventually(closed, what="the end of the listening")


def line_end_of_ready(broker):
    """All lines of a start have come when the last ones, to be pasted, have."""
    broker.wait_stderr("curl [^\n]*\n")
    return broker.stderr_text()


def warnings_of(text):
    return [line for line in text.splitlines() if "warning" in line.lower()]


# ------------------------------------------------------------------------------------------------
# Start


class Start(BrokerTestCase):
    def test_says_where_it_listens_what_is_allowed_and_how_to_call_it(self):
        broker = self.broker(self.stub(), config={"allowed_paths": [CHAT, "GET /v1/models/*"]})
        broker.wait_stderr("curl ")
        broker.wait_stderr("OPENAI_BASE_URL=.*/v1")
        text = broker.stderr_text()
        self.assertIn(f"http://127.0.0.1:{broker.port}", text)
        for words in ("proxy", CHAT, "GET /v1/models/*", "$" + TOKEN_VARIABLE):
            self.assertIn(words, text)
        # Which line holds the token's variable is a matter of taste; that its value stands nowhere
        # is what the leak check sees to.
        self.assertNotIn(f"export {TOKEN_VARIABLE}=", text)
        self.assertEqual(broker.stdout_text(), "")
        self.assertEqual(broker.request("GET", "/healthz", token=False).json(), {"ok": True})

    def test_shows_the_random_token_of_a_dry_run_once_as_a_line_to_paste(self):
        configs = {TOKEN_VARIABLE: {}, r"\w+": {"client_token_env": ABSENT}}
        keywords = {name: {"dry_run": True, "token": ABSENT, "config": config} for name, config in configs.items()}
        for variable, broker in self.brokers(keywords).items():
            with self.subTest(variable):
                token = broker.wait_stderr(rf"(?m)^\s*export {variable}=(\S+)$").group(1)
                text = line_end_of_ready(broker)
                self.assertRegex(token, r"\A[A-Za-z0-9_-]{43,}\Z")
                self.assertEqual(text.count(token), 1)
                self.assertEqual(broker.post_json(CHAT, {"model": "m"}, token=token).status, 200)
                self.assertEqual(broker.post_json(CHAT, {"model": "m"}, token=token[:-1] + "!").status, 401)
                broker.post_json(CHAT, {"model": "m " + token}, token=token)
                broker.post_json("/" + token, {}, token=token)
                broker.close()
                self.assertEqual(broker.stderr_text().count(token), 1)

    def test_keeps_a_token_that_is_set_to_itself(self):
        broker = self.broker(dry_run=True)
        text = line_end_of_ready(broker)
        self.assertNotIn(f"export {TOKEN_VARIABLE}=", text)

    def test_answers_from_the_line_on(self):
        # The connection comes as soon as the URL is there, not a moment later.
        for _ in range(3):
            broker = self.broker(dry_run=True, wait_ready=False)
            broker.wait_ready()
            self.assertEqual(broker.request("GET", "/healthz", token=False).status, 200)

    def test_of_two_brokers_at_once_is_won_by_one(self):
        first = self.broker(dry_run=True)
        run = run_broker("--dry-run", config={"listen_port": first.port}, timeout=20)
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertIn(str(first.port), run.stderr)
        self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
        self.assertEqual(first.request("GET", "/healthz").status, 200)


class ThePort(BrokerTestCase):
    def bind(self, family, address):
        sock = socket.socket(family)
        self.addCleanup(sock.close)
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen()

    def test_is_held_against_everybody_who_would_stand_there_for_localhost(self):
        broker = self.broker(dry_run=True)
        with self.assertRaises(OSError):
            self.bind(socket.AF_INET, ("127.0.0.1", broker.port))
        try:
            self.bind(socket.AF_INET6, ("::1", 0))
        except OSError:
            self.skipTest("no IPv6 here")
        with self.assertRaises(OSError):
            self.bind(socket.AF_INET6, ("::1", broker.port))
        # It is held, not served: a browser that tries ::1 first goes on to 127.0.0.1.
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(("::1", broker.port), 5)

    def test_is_free_again_after_the_end(self):
        broker = self.broker(dry_run=True)
        broker.request("GET", "/healthz")
        broker.close()
        again = self.broker(dry_run=True, args=["--port", broker.port])
        self.assertEqual(again.port, broker.port)

    def test_is_not_that_of_another_machine(self):
        broker = self.broker(dry_run=True)
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Sends nothing: it only asks which address of ours would be used.
            probe.connect(("192.0.2.1", 9))
            address = probe.getsockname()[0]
            if not address.startswith("127."):
                with self.assertRaises(OSError):
                    socket.create_connection((address, broker.port), 5)


class Warnings(BrokerTestCase):
    """At the start, in proxy mode, one line each."""

    WIDE = [
        "GET /v1/files",
        "GET /v1/files/*/content",
        "/v1/batches",
        "/v1/fine_tuning/jobs",
        "/v1/uploads",
        "/v1/containers",
        "/v1/vector_stores/*/search",
        "/v1/assistants",
        "/v1/threads/*/runs",
        "DELETE /v1/responses/*",
        "DELETE /v1/models/a",
        "GET /v1/responses/*",
        "/v1/*",
        # They reach files, and fine_tuning too.
        "/v1/*s",
        "/v1/fi*",
        "GET /v1/*es/a",
    ]
    NARROW = [CHAT, "GET /v1/models", "/openai/deployments/*/chat/completions", "/v1/messages", "/v1/filesystem"]

    def start(self, **keywords):
        return warnings_of(line_end_of_ready(self.broker(**keywords)))

    def assert_one(self, warnings, *words):
        found = [line for line in warnings if all(word in line for word in words)]
        self.assertEqual(len(found), 1, (words, warnings))

    @posix_only
    def test_are_none_where_all_is_well(self):
        secret = canary()
        program = make_executable(self.folder(), "op", f"echo {secret}\n")
        config = {"allowed_paths": self.NARROW, "secret_source": {"kind": "command", "argv": [program]}}
        self.assertEqual(self.start(config=config, secret=secret, env={SECRET_VARIABLE: ABSENT}), [])

    def test_tell_what_weakens_the_broker(self):
        folder = self.folder()
        os.mkdir(os.path.join(folder, ".git"))
        os.mkdir(os.path.join(folder, "config"))
        config = {"allowed_hosts": ["127.0.0.1", "localhost", "host.docker.internal"], "allowed_paths": self.NARROW}
        warnings = self.start(config=config, folder=os.path.join(folder, "config"))
        self.assert_one(warnings, SECRET_VARIABLE)
        self.assert_one(warnings, "git")
        self.assert_one(warnings, "host.docker.internal")
        self.assertEqual(len(warnings), 3, warnings)

    def test_tell_that_there_is_no_token(self):
        config = {"client_token_env": None, "allowed_paths": self.NARROW, "secret_source": {"kind": "none"}}
        warnings = self.start(config=config)
        self.assert_one(warnings, "client_token_env")
        self.assertEqual(len(warnings), 1, warnings)

    def test_name_each_path_that_is_wide_and_no_other(self):
        config = {"allowed_paths": self.WIDE + self.NARROW, "secret_source": {"kind": "none"}}
        warnings = "\n".join(self.start(config=config))
        for rule in self.WIDE:
            with self.subTest(rule):
                self.assertRegex(warnings, re.escape(rule) + r"(?![\w/*])")
        for rule in self.NARROW:
            with self.subTest(rule):
                self.assertNotIn(rule, warnings)

    def test_tell_of_a_path_that_would_be_there_twice(self):
        # The provider would answer 404, and the agent would say nothing more than that.
        source = {"kind": "none"}
        base = "http://127.0.0.1:9"
        cases = {
            (base + "/v1", CHAT): True,
            (base + "/api/v1", "GET /v1/models"): True,
            (base + "/v1", "/chat/completions"): False,
            (base + "/openai", CHAT): False,
        }
        runs = {
            (url, path): {
                "args": ["--check"],
                "config": {"upstream_base_url": url, "allowed_paths": [path], "secret_source": source},
            }
            for url, path in cases
        }
        for case, call in run_each(runs).items():
            with self.subTest(case):
                self.assertEqual(call().returncode, 0, call().stderr)
                warnings = warnings_of(call().stdout + call().stderr)
                self.assertEqual(["twice" in line and case[0] in line for line in warnings], [True] * cases[case])

    def test_are_of_no_use_in_a_dry_run(self):
        config = {"allowed_paths": self.WIDE, "allowed_hosts": ["127.0.0.1", "host.docker.internal"]}
        self.assertEqual(self.start(config=config, dry_run=True), [])


# ------------------------------------------------------------------------------------------------
# Stop


@posix_only
class Stop(BrokerTestCase):
    def stream(self, number):
        """A stream that goes on after this signal, up to its end: the broker, and its caller."""
        more = threading.Event()

        def handler(conn, request):
            conn.start_stream()
            conn.chunk(b"data: 1\n\n")
            conn.hold(more)
            conn.chunk(b"data: 2\n\n")
            conn.end()

        broker = self.broker(self.stub(handler))
        caller = broker.connect()
        self.addCleanup(caller.close)
        caller.send(broker.post_bytes(CHAT, {"stream": True}))
        head = caller.read_head()
        self.assertEqual(caller.read_chunk(), b"data: 1\n\n")
        broker.signal(number)
        wait_until_stopping(broker)
        self.assertIsNone(broker.process.poll())
        more.set()
        self.assertEqual(caller.read_body(head), b"data: 2\n\n")
        return broker, caller

    def test_lets_a_stream_in_flight_come_to_its_end(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                broker, caller = self.stream(number)
                caller.close()
                self.assertEqual(broker.wait(), 0)
                outcomes = [event["outcome"] for event in broker.events() if event["event"] == "response"]
                self.assertEqual(outcomes, ["ok"])
                self.assertEqual(broker.events()[-1]["event"], "stop")
                broker.upstream.wait_closed()

    def test_does_not_wait_for_a_caller_that_keeps_its_connection(self):
        # As the SDKs do. The answer said "keep-alive", for it began before the signal.
        broker, caller = self.stream(signal.SIGTERM)
        caller.settimeout(5)
        self.assertEqual(caller.read_all(), b"")
        self.assertEqual(broker.wait(5), 0)

    def test_serves_no_new_request_behind_a_stream_in_flight(self):
        broker, caller = self.stream(signal.SIGTERM)
        broker.upstream.script(lambda conn, request: conn.respond_json({}))
        caller.settimeout(5)
        with contextlib.suppress(OSError, AssertionError):
            caller.send(broker.head("GET", "/v1/models"))
            caller.read_all()
        self.assertEqual(len(broker.upstream.requests), 1)

    def test_closes_connections_that_wait_for_nothing(self):
        release = threading.Event()

        def handler(conn, request):
            conn.hold(release)
            conn.respond_json({})

        stub = self.stub()
        broker = self.broker(stub)
        with broker.connect() as silent, broker.connect() as idle, broker.connect() as half, broker.connect() as busy:
            idle.send(broker.head("GET", "/v1/models"))
            self.assertEqual(idle.read_answer().status, 200)
            half.send(b"GET /v1/models HTTP/1.1\r\n")
            stub.script(handler)
            busy.send(broker.head("GET", "/v1/models"))
            stub.wait_for_requests(2)
            broker.signal(signal.SIGTERM)
            # Long before the 30 s that the busy one has.
            for caller in (silent, idle, half):
                caller.settimeout(10)
                caller.read_all()
            release.set()
            self.assertEqual(busy.read_answer().status, 200)
        self.assertEqual(broker.wait(), 0)

    def test_takes_no_new_request_on_an_open_connection(self):
        release = threading.Event()

        def handler(conn, request):
            conn.hold(release)
            conn.respond_json({})

        stub = self.stub(handler)
        broker = self.broker(stub)
        with broker.connect() as caller:
            caller.send(broker.head("GET", "/v1/models"))
            stub.wait_for_requests(1)
            broker.signal(signal.SIGTERM)
            wait_until_stopping(broker)
            with contextlib.suppress(OSError):
                caller.send(broker.head("GET", "/v1/models"))
            release.set()
            self.assertEqual(caller.read_answer().status, 200)
            caller.read_all()
        self.assertEqual(broker.wait(), 0)
        self.assertEqual(len(stub.requests), 1)

    def test_is_at_once_at_the_second_signal(self):
        stub = self.stub(lambda conn, request: conn.wait_gone(60))
        cases = ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM), (signal.SIGINT, signal.SIGINT))
        for (first, second), broker in self.brokers({case: {"upstream": stub} for case in cases}).items():
            with self.subTest(first=first, second=second):
                with broker.connect() as caller:
                    before = len(stub.requests)
                    caller.send(broker.head("GET", "/v1/models"))
                    stub.wait_for_requests(before + 1)
                    broker.signal(first)
                    wait_until_stopping(broker)
                    self.assertIsNone(broker.process.poll())
                    broker.signal(second)
                    self.assertIn(broker.wait(10), (128 + second, -second))
                    caller.read_all()

    @slow
    def test_gives_a_request_that_does_not_end_half_a_minute(self):
        stub = self.stub(lambda conn, request: conn.wait_gone(60))
        broker = self.broker(stub)
        with broker.connect(60) as caller:
            caller.send(broker.head("GET", "/v1/models"))
            stub.wait_for_requests(1)
            began = time.monotonic()
            broker.signal(signal.SIGTERM)
            self.assertEqual(broker.wait(50), 0)
            self.assertGreater(time.monotonic() - began, 25)
            caller.read_all()
        self.assertEqual(broker.events()[-1]["event"], "stop")

    def test_of_a_broker_that_has_not_begun_to_serve_is_one_too(self):
        # The vault asks its person, who thinks better of it.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, "the window closes"):
            with self.subTest(number):
                folder = self.folder()
                lifeline = Lifeline(os.path.join(folder, "alive"))
                self.addCleanup(lifeline.close)
                program = make_executable(folder, "op", f"exec 9>'{lifeline.path}'; echo >&9; sleep 30 & wait")
                config = {"secret_source": {"kind": "command", "argv": [program]}}
                broker, window = self.on_a_terminal(config=config, wait_ready=False)
                eventually(lifeline.has_begun, what="the command")
                if isinstance(number, str):
                    number = signal.SIGHUP
                    window.close()
                else:
                    broker.signal(number)
                self.assertIn(broker.wait(10), (0, 128 + number))
                eventually(lifeline.has_ended, 5, "the end of the command")
                self.assertEqual(broker.stderr_text(), "")

    def test_ends_a_secret_command_with_its_children(self):
        for case, signals in {"when its caller has left": 1, "at the second signal": 2, "at Ctrl-\\": 0}.items():
            with self.subTest(case):
                folder, secret = self.folder(), canary()
                lifeline = Lifeline(os.path.join(folder, "alive"))
                self.addCleanup(lifeline.close)
                script = f"""
                    cd "$(dirname "$0")"
                    if [ ! -e second ]; then touch second; echo {secret}; exit; fi
                    trap '' TERM HUP INT
                    exec 9>alive; echo >&9
                    sleep 30 &
                    wait
                """
                program = make_executable(folder, "op", script)
                config = {"secret_source": {"kind": "command", "argv": [program], "cache_seconds": 0}}
                broker = self.broker(self.stub(), config=config, secret=secret, env={SECRET_VARIABLE: ABSENT})
                with broker.connect() as caller:
                    caller.send(broker.post_bytes(CHAT, {"model": "m"}))
                    eventually(lifeline.has_begun, what="the command")
                    if signals == 2:
                        broker.signal(signal.SIGTERM)
                        wait_until_stopping(broker)
                        self.assertIsNone(broker.process.poll())
                        broker.signal(signal.SIGTERM)
                        broker.wait(10)
                if signals == 0:
                    broker.signal(signal.SIGQUIT)
                    self.assertEqual(broker.wait(10), 128 + signal.SIGQUIT)
                if signals == 1:
                    broker.wait_event(event="response")
                    broker.signal(signal.SIGTERM)
                    self.assertEqual(broker.wait(10), 0)
                eventually(lifeline.has_ended, 5, "the end of the command")
                # That it ends with us is no failure of its own.
                self.assertNotIn("not available", broker.stderr_text())

    def on_a_terminal(self, **keywords):
        """A broker that a shell in a window started, and the window's end of that terminal."""
        import fcntl
        import pty
        import termios

        window, terminal = pty.openpty()
        window = open(window, "rb", buffering=0)
        self.addCleanup(window.close)

        def take_it():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        try:
            return self.broker(stdin=terminal, preexec_fn=take_it, **keywords), window
        finally:
            os.close(terminal)

    def test_is_what_a_terminal_window_that_closes_means(self):
        release = threading.Event()

        def hold(conn, request):
            conn.hold(release)
            conn.respond_json({"held": True})

        stub = self.stub(hold)
        broker, window = self.on_a_terminal(upstream=stub)
        # While the window is open SIGHUP means what it always does.
        broker.signal(signal.SIGHUP)
        broker.wait_event(event="reload")
        with broker.connect() as caller:
            caller.send(broker.head("GET", "/v1/models"))
            stub.wait_for_requests(1)
            window.close()
            wait_until_stopping(broker)
            release.set()
            self.assertEqual(caller.read_answer().json(), {"held": True})
        self.assertEqual(broker.wait(), 0)
        self.assertEqual(broker.events()[-1]["event"], "stop")

    def test_is_not_what_it_means_under_nohup(self):
        broker, window = self.on_a_terminal(dry_run=True, ignored=("HUP",))
        window.close()
        broker.wait_event(event="reload")
        broker.signal(signal.SIGHUP)
        broker.wait_event(event="reload", count=2)
        self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)

    def test_is_not_what_sighup_means_without_a_terminal(self):
        # As systemd sends it.
        broker = self.broker(dry_run=True)
        broker.signal(signal.SIGHUP)
        broker.wait_event(event="reload")
        self.assertEqual(broker.request("GET", "/healthz").status, 200)
        self.assertIsNone(broker.process.poll())

    def test_is_not_what_sighup_means_before_it_serves_either(self):
        # As systemd sends it while the vault still asks its person: the reload comes after.
        folder, secret = self.folder(), canary()
        script = f"cd '{folder}'; touch begun; while [ ! -e go ]; do sleep 0.01; done; echo {secret}\n"
        program = make_executable(folder, "op", script)
        source = {"kind": "command", "argv": [program]}
        broker = self.broker(config={"secret_source": source}, secret=secret, env={SECRET_VARIABLE: ABSENT}, wait_ready=False)
        eventually(lambda: os.path.exists(os.path.join(folder, "begun")), what="the command")
        broker.signal(signal.SIGHUP)
        open(os.path.join(folder, "go"), "w").close()
        broker.wait_ready()
        broker.wait_event(event="reload")
        self.assertEqual(broker.request("GET", "/healthz").status, 200)

    def test_under_a_command_is_what_a_terminal_window_that_closes_means(self):
        # The shell's SIGHUP goes to us; the command, which ignores its own, gets SIGTERM from us.
        script = "trap '' HUP; trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done"
        broker, window = self.on_a_terminal(command=["sh", "-c", script])
        broker.wait_stdout("ready", 20)
        window.close()
        self.assertEqual(broker.wait(), 9)

    @linux_only
    def test_leaves_nothing_running(self):
        broker = self.broker(self.stub())
        broker.post_json(CHAT, {})
        broker.signal(signal.SIGTERM)
        self.assertEqual(broker.wait(), 0)
        session = [
            entry
            for entry in os.listdir("/proc")
            if entry.isdigit() and self.session_of(entry) == broker.pid and int(entry) != broker.pid
        ]
        self.assertEqual(session, [])

    def session_of(self, process):
        try:
            with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
                return int(file.read().rpartition(")")[2].split()[3])
        except (FileNotFoundError, ProcessLookupError):
            return None


class ExitCode(BrokerTestCase):
    def test_is_1_for_what_somebody_has_to_mend_and_2_for_what_was_written_wrong(self):
        cases = {
            "no secret": ({"secret": ABSENT}, 1, SECRET_VARIABLE),
            "a secret that is none": ({"secret": "short"}, 1, "secret"),
            "no folder for the log": ({"config": {"event_log": "no/where.jsonl"}}, 1, "event_log"),
            "no token": ({"token": ABSENT}, 2, TOKEN_VARIABLE),
            "an unknown key": ({"config": {"listen_prot": 1}}, 2, "listen_port"),
        }
        calls = run_each({case: keywords for case, (keywords, _, _) in cases.items()})
        for case, (_, code, word) in cases.items():
            with self.subTest(case):
                run = calls[case]()
                self.assertEqual(run.returncode, code, run.stderr)
                self.assertIn(word, run.stderr)
                self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
                if code == 2:
                    self.assertEqual(run.files, ["broker_config.json"])


# ------------------------------------------------------------------------------------------------
# Reload


@posix_only
class Reload(BrokerTestCase):
    """By SIGHUP. One broker for all: whatever is tried, it has to be well afterwards."""

    @classmethod
    def setUpClass(cls):
        cls.upstream, cls.other_upstream = cls.class_stub(), cls.class_stub()
        folder = tempfile.TemporaryDirectory(prefix="broker-test-")
        cls.addClassCleanup(folder.cleanup)
        cls.value = os.path.join(os.path.realpath(folder.name), "value")
        cls.program = make_executable(folder.name, "op", 'cat "$1" || exit 9\n')
        secret = canary()
        source = {"kind": "command", "argv": [cls.program, cls.value]}
        cls.other_token, cls.short = fresh_token(), "short"
        env = {SECRET_VARIABLE: ABSENT, "OTHER_TOKEN": cls.other_token, "SHORT_TOKEN": cls.short}
        with open(cls.value, "w", encoding="ascii") as file:
            file.write(secret)
        cls.served = cls.class_broker(cls.upstream, config={"secret_source": source}, secret=secret, env=env)
        cls.served.also_token(cls.other_token)

    def setUp(self):
        self.upstream.forget()
        self.mend()

    def mend(self):
        self.served.write_config(self.served.config)
        os.chmod(self.served.config_path, 0o600)
        with open(self.value, "w", encoding="ascii") as file:
            file.write(self.served.secret)

    def reload(self):
        """One that succeeds; where in stderr its words begin."""
        start = len(self.served.stderr_text())
        done = len([event for event in self.served.events() if event["event"] == "reload"])
        self.served.signal(signal.SIGHUP)
        self.served.wait_event(event="reload", count=done + 1)
        return start

    def assert_reported(self, keys, start, known):
        """That these keys wait for a restart, and of the known ones no others."""
        for key in keys:
            self.served.wait_stderr(key, start=start)
        # The line that says so, or that there is nothing of the kind, has come then.
        self.served.wait_stderr("(?i)reload", start=start)
        for key in set(known) - set(keys):
            self.assertNotIn(key, self.served.stderr_text()[start:])

    def assert_as_before(self, old):
        answer = self.served.post_json(old, {"model": "m"})
        self.assertEqual(answer.status, 200, answer)
        self.assertEqual(self.upstream.requests[-1].header("Authorization"), "Bearer " + self.served.secret)
        self.assert_refused(self.served.post_json(old, {}, token=self.other_token), 401, "client_token_required")
        self.assert_refused(self.served.post_json("/v1/new", {}), 403, "path_not_allowed")

    def test_with_a_broken_file_changes_nothing_and_says_so(self):
        new = {**self.served.config, "allowed_paths": ["/v1/new"]}
        cases = {
            "no JSON": (lambda: self.served.write_config('{"allowed_paths": ["/v1/new"]'), "broker_config.json"),
            "a list": (lambda: self.served.write_config("[]"), "broker_config.json"),
            "an unknown key": (lambda: self.served.write_config({**new, "alowed_paths": []}), "allowed_paths"),
            "a wrong value": (lambda: self.served.write_config({**new, "max_request_bytes": "1"}), "max_request_bytes"),
            "a required key missing": (
                lambda: self.served.write_config({k: v for k, v in new.items() if k != "secret_source"}),
                "secret_source",
            ),
            "no file": (lambda: os.remove(self.served.config_path), "broker_config.json"),
            "a file that the world may write": (
                lambda: (self.served.write_config(new), os.chmod(self.served.config_path, 0o666)),
                "broker_config.json",
            ),
            "one that says it is for a dry-run only": (
                lambda: (
                    self.served.write_config({**new, "mode": "dry_run"}),
                    os.chmod(self.served.config_path, 0o666),
                ),
                "broker_config.json",
            ),
            "a token that is not set": (
                lambda: self.served.write_config({**new, "client_token_env": "NOT_SET_ANYWHERE"}),
                "NOT_SET_ANYWHERE",
            ),
            "a token that is too short": (
                lambda: self.served.write_config({**new, "client_token_env": "SHORT_TOKEN"}),
                "SHORT_TOKEN",
            ),
            "a secret that fails": (lambda: (self.served.write_config(new), os.remove(self.value)), "secret"),
            "a secret that is none": (lambda: (self.served.write_config(new), open(self.value, "w").close()), "secret"),
            "a good file with another token but a secret that fails": (
                lambda: (
                    self.served.write_config({**new, "client_token_env": "OTHER_TOKEN"}),
                    os.remove(self.value),
                ),
                "secret",
            ),
        }
        self.assert_as_before(CHAT)
        reloads = len([event for event in self.served.events() if event["event"] == "reload"])
        for case, (break_it, word) in cases.items():
            with self.subTest(case):
                self.mend()
                break_it()
                start = len(self.served.stderr_text())
                self.served.signal(signal.SIGHUP)
                self.served.wait_stderr("reload[^\n]*" + word, start=start)
                self.assert_as_before(CHAT)
        self.assertEqual(len([event for event in self.served.events() if event["event"] == "reload"]), reloads)
        self.mend()
        self.reload()
        self.assert_as_before(CHAT)

    def test_reports_what_waits_for_a_restart(self):
        config = self.served.config
        changes = {"listen_port": 18791, "mode": "dry_run", "event_log": "elsewhere.jsonl"}
        for key, value in changes.items():
            with self.subTest(key):
                self.served.write_config({**config, key: value})
                self.assert_reported([key], self.reload(), changes)
                self.assert_as_before(CHAT)
        # And what is not reported counts from now on.
        self.served.write_config({**config, **changes, "max_request_bytes": 10})
        self.assert_reported(changes, self.reload(), [*changes, "max_request_bytes"])
        self.assert_refused(self.served.post_json(CHAT, {"model": "too long"}), 413, "request_too_large")
        self.assertEqual(os.listdir(self.served.folder).count("elsewhere.jsonl"), 0)
        self.served.write_config(config)
        self.assert_reported([], self.reload(), changes)

    def test_takes_the_upstream_and_how_the_secret_is_had_and_attached_at_once(self):
        source = {"kind": "command", "argv": [self.program, self.value + "2"], "cache_seconds": 0}
        with open(self.value + "2", "w", encoding="ascii") as file:
            file.write(new := canary())
        self.served.also_secret(new)
        changes = {"upstream_base_url": self.other_upstream.url, "secret_source": source, "auth_header": "x-api-key"}
        self.served.write_config({**self.served.config, **changes, "auth_scheme": ""})
        start = self.reload()
        self.assert_reported([], start, changes)
        self.assertEqual(self.served.post_json(CHAT, {"model": "m"}).status, 200)
        request = self.other_upstream.requests[-1]
        self.assertEqual((request.header("x-api-key"), request.header("Authorization")), (new, None))
        self.assertEqual(self.upstream.requests, [])
        # The secret that is no longer in use stays one.
        self.assert_refused(self.served.post_json(CHAT, {"m": self.served.secret}), 403, "secret_in_request")
        self.mend()
        self.reload()
        self.assert_as_before(CHAT)

    def test_of_the_same_thing_written_differently_is_no_change(self):
        self.mend()
        self.reload()
        config = self.served.config
        source = {"argv": [self.program, self.value], "kind": "command"}
        mixed = dict(reversed(list({**config, "secret_source": source}.items())))
        self.served.write_config(json.dumps(mixed, indent=7))
        self.assert_reported([], self.reload(), config)

    def test_while_the_broker_itself_is_being_replaced_changes_nothing(self):
        # An update takes the file away and puts the new one there a moment later.
        folder = self.folder()
        script = shutil.copy(BROKER, folder)
        broker = self.broker(script=script)
        os.rename(script, script + ".new")
        said = broker.reload()
        self.assertIn("nothing was changed", said)
        self.assertIn(script, said)
        os.symlink(os.path.basename(script), script)
        self.assertIn("nothing was changed", broker.reload(), "a link to itself")
        os.rename(script + ".new", script)
        self.assertIn("reloaded", broker.reload())

    def test_reopens_the_log(self):
        moved = self.served.log_path + ".1"
        os.rename(self.served.log_path, moved)
        self.addCleanup(os.remove, moved)
        self.reload()
        answer = self.served.post_json(CHAT, {"model": "after"})
        name = answer.header("X-Broker-Request-Id")
        self.served.wait_event(event="response", id=name)
        with open(moved, encoding="ascii") as file:
            self.assertNotIn(name, file.read())
        self.assertEqual(os.stat(self.served.log_path).st_mode & 0o777, 0o600)

    def test_takes_another_token_from_the_variable_that_is_named_now(self):
        self.served.write_config({**self.served.config, "client_token_env": "OTHER_TOKEN"})
        self.reload()
        self.assertEqual(self.served.post_json(CHAT, {}, token=self.other_token).status, 200)
        self.assert_refused(self.served.post_json(CHAT, {}), 401, "client_token_required")
        self.mend()
        self.reload()
        self.assert_as_before(CHAT)

    def test_keeps_the_port_that_the_command_line_gave(self):
        self.served.write_config({**self.served.config})
        self.assert_reported([], self.reload(), ["listen_port"])
        self.assertEqual(self.served.request("GET", "/healthz").status, 200)

    def test_many_in_a_row_under_traffic_are_survived(self):
        done = threading.Event()
        statuses = []

        def ask():
            while not done.is_set():
                statuses.append(self.served.post_json(CHAT, {"model": "m"}).status)

        callers = [threading.Thread(target=ask) for _ in range(3)]
        for caller in callers:
            caller.start()
        for _ in range(20):
            self.served.signal(signal.SIGHUP)
        self.reload()
        done.set()
        for caller in callers:
            caller.join()
        self.assertEqual(set(statuses), {200})


@posix_only
class ReloadUnderACommand(BrokerTestCase):
    def test_keeps_the_token_of_this_run(self):
        code = """
import json, os, urllib.request
def ask():
    headers = {"X-Broker-Token": os.environ["BROKER_CLIENT_TOKEN"], "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["BROKER_URL"] + "/v1/chat/completions", b"{}", headers)
    return urllib.request.urlopen(request).status
print(ask(), flush=True)
input()
print(ask(), flush=True)
"""
        broker = self.broker(self.stub(), command=[sys.executable, "-c", code], stdin=subprocess.PIPE)
        broker.wait_stdout("200\n", 20)
        broker.signal(signal.SIGHUP)
        broker.wait_event(event="reload")
        broker.process.stdin.write(b"\n")
        broker.process.stdin.close()
        self.assertEqual(broker.wait(), 0)
        self.assertEqual(broker.stdout_text(), "200\n200\n")


@posix_only
class Silence(BrokerTestCase):
    """With all of Python's warnings on, nothing is said of what was left open."""

    def test_at_the_end_whatever_was_open(self):
        arguments = ["-X", "dev", "-W", "error"]
        stub, more = self.stub(), threading.Event()
        broker = self.broker(stub, python_args=arguments)
        text = line_end_of_ready(broker)

        def stream(conn, request):
            conn.start_stream()
            conn.chunk(b"data: 1\n\n")
            more.set()
            conn.wait_gone()

        with broker.connect() as idle, broker.connect() as half, broker.connect() as leaver, broker.connect() as reader:
            # A kept connection on either side, half a head, a caller who leaves, a reload, a stream that is cut.
            idle.send(broker.head("GET", "/v1/models"))
            self.assertEqual(idle.read_answer().status, 200)
            half.send(b"GET /v1/models HTTP/1.1\r\n")
            stub.script(stream)
            leaver.send(broker.post_bytes(CHAT, {"stream": True}))
            leaver.read_head()
            leaver.close()
            broker.wait_event(event="response", outcome="client_disconnected")
            broker.reload()
            reader.send(broker.post_bytes(CHAT, {"stream": True}))
            reader.read_head()
            broker.signal(signal.SIGTERM)
            wait_until_stopping(broker)
            reader.reset()
            self.assertEqual(broker.wait(), 0)
        said = broker.stderr_text()[len(text) :]
        self.assertNotRegex(said, "(?i)warning|exception|error|unclosed")

    def test_of_short_calls_and_of_a_command(self):
        python = [sys.executable, "-X", "dev", "-W", "error"]
        folder, stub = self.folder(), self.stub(tls=True)
        broker = self.broker(stub, folder=folder)
        broker.post_json(CHAT, {"model": "m"})
        code = "import os, urllib.request as u; print(u.urlopen(os.environ['BROKER_URL'] + '/healthz').status)"
        calls = {
            "--check": (["--check"], 0),
            "--report": (["--report"], 0),
            "a command": (["--", sys.executable, "-c", code], 0),
            "no command": (["--", "no-such-program-anywhere"], 127),
            "a port that is taken": (["--port", str(broker.port)], 1),
        }
        for case, (arguments, code) in calls.items():
            with self.subTest(case):
                script = BROKER if case == "--check" else INSTALLED  # compiled anew, with its warnings, once
                argv = [*python, script, "--config", broker.config_path, *arguments]
                run = subprocess.run(argv, env=broker.env, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
                self.assertEqual(run.returncode, code, run.stderr)
                self.assertNotRegex(run.stderr, b"(?i)Warning:|exception|unclosed")


@linux_only
class Descriptors(BrokerTestCase):
    def test_that_strangers_use_up_are_taken_back_from_the_longest_idle(self):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if 0 <= hard < 256:
            self.skipTest("this system has fewer than 256 of them")
        stub = self.stub()
        limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # noqa: E731
        broker = self.broker(stub, preexec_fn=limit)
        with contextlib.ExitStack() as opened:
            strangers = [opened.enter_context(broker.connect()) for _ in range(300)]
            began = time.monotonic()
            for _ in range(3):
                self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)
                self.assertEqual(broker.request("GET", "/healthz").status, 200)
            self.assertLess(time.monotonic() - began, 10)
            # The first to come was the first to go; the last one is still welcome.
            strangers[0].settimeout(5)
            self.assertEqual(strangers[0].read_all(), b"")
            strangers[-1].send(broker.head("GET", "/v1/models"))
            self.assertEqual(strangers[-1].read_answer().status, 200)


class Idle(BrokerTestCase):
    @slow
    def test_connections_are_closed_after_a_minute(self):
        broker = self.broker(dry_run=True)
        with broker.connect(80) as silent, broker.connect(80) as idle:
            idle.send(broker.head("GET", "/healthz"))
            idle.read_answer()
            began = time.monotonic()
            silent.read_all()
            idle.read_all()
            self.assertTrue(50 < time.monotonic() - began < 75)


if __name__ == "__main__":
    unittest.main()
