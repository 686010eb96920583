"""The broker: a subprocess, started as a user starts it, and judged from outside.

`Broker` is one that serves, `run_broker` one that ends by itself, `run_each` many of the latter.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

from .caller import Answer, Caller
from .common import ROOT, eventually, header_pairs
from .forked import Fork, will_do
from .leaks import Canaries, Seen, canary, fresh_token
from .upstream import CA_FILE

BROKER = os.path.join(ROOT, "broker.py")

# How a broker comes about where a test doesn't say how: as a fork (see there) of one that is as the installed command.
# BROKER_TEST_START=command starts that each time, BROKER_TEST_START=script `python broker.py`, which compiles it, too.
INSTALLED = os.path.join(os.path.dirname(os.path.realpath(__file__)), "localhost-broker")
START = BROKER if os.environ.get("BROKER_TEST_START") == "script" else INSTALLED

SECRET_VARIABLE = "BROKER_TEST_SECRET"
TOKEN_VARIABLE = "BROKER_TEST_TOKEN"

# Nobody listens on the discard port; a test that is never to reach an upstream points there.
NOBODY = "http://127.0.0.1:9"

ALLOWED_PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "GET /v1/models",
    "HEAD /v1/models",
    "GET /v1/models/*",
    "GET /v1/responses/*",
    "DELETE /v1/responses/*",
    "POST /v1/responses/*/cancel",
    "/v1beta/models/*:generateContent",
    "/v1beta/models/*:streamGenerateContent",
    "/openai/deployments/*/chat/completions",
    "POST /v1/audio/transcriptions multipart/form-data",
]

JSON = ("Content-Type", "application/json")

# A configuration override with this value takes the key out of the file.
ABSENT = object()


def give_children_default_signals():
    """Our children start with the signals' default dispositions, however we were started.

    A shell has a job in the background ignore SIGINT and SIGQUIT, `nohup` SIGHUP, and whoever is started
    inherits what its parent ignores. What its parent handles it doesn't: so we handle them, by doing nothing."""
    for name in ("SIGINT", "SIGQUIT", "SIGHUP", "SIGTERM"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


give_children_default_signals()


def ignoring(signals, argv):
    """The command that starts `argv` with these signals (names without SIG) ignored, as the same process."""
    if not signals:
        return argv
    return ["/bin/sh", "-c", f"trap '' {' '.join(signals)}; exec \"$@\"", "sh", *argv]


def start(argv, env, cwd, stdin=subprocess.DEVNULL, script=None, python=None, ignored=(), preexec_fn=None):
    """The process: a fork, unless something of its start is said."""
    asked = stdin != subprocess.DEVNULL or script or python or ignored or preexec_fn
    if not asked and will_do(env):
        return Fork([INSTALLED, *argv], env, cwd)
    return subprocess.Popen(
        ignoring(ignored, [*(python or [sys.executable]), script or START, *argv]),
        env=env,
        cwd=cwd,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=preexec_fn,
        start_new_session=True,
    )


def wait_for_end(process, timeout):
    """Its exit code, or subprocess.TimeoutExpired. Where the kernel tells of the end nobody has to look
    again and again for it, as Popen.wait does, at up to 50 ms."""
    if hasattr(os, "pidfd_open") and isinstance(process, subprocess.Popen) and process.returncode is None:
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(process.pid)
            try:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.poll(timeout * 1000)
                timeout = 0.1
            finally:
                os.close(descriptor)
    return process.wait(timeout)


def minimal_environment(extra):
    """What the broker is started with: nothing of the developer's own but what a process needs."""
    env = {"LANG": "C.UTF-8"}
    for name in ("PATH", "HOME", "SYSTEMROOT", "TEMP", "TMP", "COVERAGE_PROCESS_START"):
        if name in os.environ:
            env[name] = os.environ[name]
    env.update(extra)
    return {name: str(value) for name, value in env.items() if value is not ABSENT and value is not None}


def make_config(upstream, overrides):
    config = {
        "listen_port": 0,
        "upstream_base_url": upstream,
        "allowed_paths": ALLOWED_PATHS,
        "client_token_env": TOKEN_VARIABLE,
        "secret_source": {"kind": "env", "name": SECRET_VARIABLE},
        "event_log": "events.jsonl",
    }
    config.update(overrides or {})
    return {key: value for key, value in config.items() if value is not ABSENT}


class _Run:
    """What a served broker and one that ends by itself have in common: a folder, a configuration,
    an environment, canaries."""

    def _prepare(self, upstream, config, config_text, env, secret, token, folder):
        self._own_folder = folder is None
        self.folder = os.path.realpath(folder or tempfile.mkdtemp(prefix="broker-test-"))
        os.chmod(self.folder, 0o700)
        self.upstream = upstream
        self.secret = canary() if secret is None else secret
        self.token = fresh_token() if token is None else token
        self.canaries = Canaries(self.secret, self.token)
        self.config_path = os.path.join(self.folder, "broker_config.json")
        self.config = None
        if config_text is None and config is not None:
            self.config = make_config(upstream.url if upstream else NOBODY, config)
            config_text = json.dumps(self.config, indent=2)
        if config_text is not None:
            self.write_config(config_text)
        # A test may name a log elsewhere; this is where the default one is.
        name = (self.config or {}).get("event_log", "events.jsonl")
        self.log_path = os.path.join(self.folder, name if isinstance(name, str) else "events.jsonl")
        self._variables = {SECRET_VARIABLE: self.secret, TOKEN_VARIABLE: self.token}
        if upstream is not None and upstream.tls:
            self._variables["SSL_CERT_FILE"] = CA_FILE
        self._variables.update(env or {})
        self.env = minimal_environment(self._variables)

    def write_config(self, config):
        """Write the configuration file anew: a dict (as it is), text or bytes."""
        if isinstance(config, dict):
            config = json.dumps(config, indent=2)
        if isinstance(config, str):
            config = config.encode("utf-8", "surrogateescape")
        descriptor = os.open(self.config_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(config)

    def also_secret(self, value):
        """Look for this one too in the leak check: a secret that a command or a reload brings."""
        self.canaries.secrets.append(value)

    def also_token(self, value):
        """And for this one: a token that a reload brings."""
        self.canaries.tokens.append(value)

    def _read_log(self):
        # A test may have put a folder or a FIFO there.
        if not os.path.isfile(self.log_path):
            return b""
        with open(self.log_path, "rb") as file:
            return file.read()

    def _remove_folder(self):
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)


class Broker(_Run):
    """One that serves.

    upstream    a StubUpstream; without one the base URL leads to nobody
    config      overrides of the default configuration (ABSENT takes a key out)
    config_text the whole file instead
    args        further arguments; dry_run adds --dry-run
    env         further variables of its environment (ABSENT takes one out)
    secret      the value of the secret's variable (default: a fresh canary)
    token       the value of the token's variable (default: a fresh one)
    command     what follows `--`; then nothing is ready before the command says so
    ignored     signals that it finds ignored, as under `nohup`: ("HUP",); the others are at their defaults
    wait_ready  False: return at once
    folder      a folder that is there already, and stays
    preexec_fn, cwd, stdin  as for subprocess
    python, python_args, script     another interpreter; words for it; BROKER, or a copy of it
    use_config  False: no --config (broker_config.json in the current folder counts then)

    Attributes: port, url, token, secret, folder, config_path, log_path, process.
    """

    def __init__(
        self,
        upstream=None,
        config=None,
        config_text=None,
        args=(),
        env=None,
        dry_run=False,
        secret=None,
        token=None,
        command=None,
        ignored=(),
        wait_ready=None,
        folder=None,
        cwd=None,
        stdin=subprocess.DEVNULL,
        preexec_fn=None,
        python_args=(),
        use_config=True,
        script=None,
        python=None,
    ):
        self._prepare(upstream, config or {}, config_text, env, secret, token, folder)
        self.port = None
        self.url = None
        self.closed = False
        self._asked_to_stop = False
        self.check_token_in_answers = True
        self.callers = []
        self.seen = Seen()
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self._printed = threading.Condition()
        argv = ["--config", self.config_path] * use_config + ["--dry-run"] * dry_run + [str(arg) for arg in args]
        if command is not None:
            argv += ["--"] + [str(arg) for arg in command]
        python = [python or sys.executable, *python_args] if python or python_args else None
        self.process = start(argv, self.env, cwd or self.folder, stdin, script, python, ignored, preexec_fn)
        self.pid = self.process.pid
        self._drains = []
        for name in ("stdout", "stderr"):
            drain = threading.Thread(target=self._drain, args=(name,), daemon=True)
            drain.start()
            self._drains.append(drain)
        if wait_ready is None:
            wait_ready = command is None
        if wait_ready:
            try:
                self.wait_ready()
            except BaseException:
                self._kill()
                self._remove_folder()
                raise

    # Its life

    def wait_ready(self, timeout=20):
        """Until it has printed the URL it listens on."""
        own = self.upstream.port if self.upstream else 9
        pattern = re.compile(rf"http://127\.0\.0\.1:(?!{own}\b)([0-9]+)")
        self.port = int(self.wait_stderr(pattern, timeout).group(1))
        self.url = f"http://127.0.0.1:{self.port}"

    def signal(self, number):
        self.process.send_signal(number)

    @contextlib.contextmanager
    def paused(self):
        """What happens within it the broker sees all at once, in its order."""
        self.signal(signal.SIGSTOP)
        if isinstance(self.process, subprocess.Popen):
            os.waitpid(self.pid, os.WUNTRACED)  # until it has stopped
        else:
            eventually(lambda: set(self._thread_states()) == {"T"}, what="the pause")
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def _thread_states(self):
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            with open(f"/proc/{self.pid}/task/{thread}/stat", encoding="ascii") as file:
                yield file.read().rpartition(") ")[2][0]

    def wait(self, timeout=20):
        """Its exit code, once it has ended."""
        try:
            return wait_for_end(self.process, timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self.stderr_text()}") from None

    def close(self):
        """End it, and search all that it let out for the secret and the token."""
        if self.closed:
            return
        self.closed = True
        for caller in self.callers:
            caller.close()
        ended = self._stop()
        self._kill()
        log = self._read_log()
        self._remove_folder()
        stderr = self.stderr_text()
        if not ended:
            raise AssertionError("two SIGTERM did not end it: " + stderr)
        if "Traceback" in stderr:
            raise AssertionError("a traceback on stderr: " + stderr)
        answers = self.seen.everything()
        if b"internal_error" in answers:
            raise AssertionError("internal_error: " + stderr)
        self.canaries.check({"stdout": self._output["stdout"], "stderr": self._output["stderr"], "the event log": log})
        self.canaries.check({"an answer": answers}, self.check_token_in_answers)

    def ask_to_stop(self):
        """The first SIGTERM of close(), ahead of it: so that several end beside each other."""
        if not self._asked_to_stop and self.process.poll() is None:
            self.process.terminate()
        self._asked_to_stop = True

    def _stop(self):
        """False when it does not end by itself; the second signal ends it at once, whatever is in flight."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            wait_for_end(self.process, 0.01)
            return True
        # Who waits for callers looks five times a second whether that is still wanted: sooner where one comes.
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port or 0), 1).close()
        for _ in range(2):
            with contextlib.suppress(subprocess.TimeoutExpired):
                wait_for_end(self.process, 5)
                return True
            self.process.terminate()
        return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _kill(self):
        """The end of the process, of what it left in its session, and of our threads."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        for drain in self._drains:
            drain.join(10)
        self.process.stdout.close()
        self.process.stderr.close()
        if self.process.stdin:
            self.process.stdin.close()

    def reload(self, config=None):
        """Send SIGHUP, with this configuration written before; the line of stderr that says what came of it."""
        if config is not None:
            self.write_config(config)
        start = len(self.stderr_text())
        self.signal(signal.SIGHUP)
        return self.wait_stderr("(?i)[^\n]*reload[^\n]*\n", start=start).group()

    # What it prints and logs

    def _drain(self, name):
        descriptor = getattr(self.process, name).fileno()
        while True:
            data = os.read(descriptor, 65536)
            with self._printed:
                self._output[name] += data
                self._printed.notify_all()
            if not data:
                return

    def stderr_text(self):
        with self._printed:
            return self._output["stderr"].decode("utf-8", "replace")

    def stdout_text(self):
        with self._printed:
            return self._output["stdout"].decode("utf-8", "replace")

    def wait_stderr(self, pattern, timeout=10, start=0):
        """The first match of a regular expression in what stderr has from character `start` on
        (whole lines only: half a port number is another one)."""
        return self._wait_printed("stderr", pattern, timeout, start)

    def wait_stdout(self, pattern, timeout=10, start=0):
        return self._wait_printed("stdout", pattern, timeout, start)

    def _wait_printed(self, name, pattern, timeout, start):
        deadline = time.monotonic() + timeout
        with self._printed:
            while True:
                found = search_whole_lines(self._output[name], pattern, start)
                if found:
                    return found
                ended = self._drains and not any(drain.is_alive() for drain in self._drains)
                if ended or time.monotonic() > deadline:
                    break
                self._printed.wait(0.1)
        raise AssertionError(
            f"{pattern!r} did not come on {name} within {timeout} s "
            f"(exit code {self.process.poll()}): {self.stdout_text()} {self.stderr_text()}"
        )

    def events(self, kind=None):
        """The whole lines of the event log, parsed; those of one event only where `kind` names it."""
        data = self._read_log()
        events = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        return [event for event in events if kind in (None, event["event"])]

    def wait_event(self, predicate=None, timeout=10, count=1, **fields):
        """The first event with these fields (and for which `predicate` holds); with `count`,
        wait until there are so many of them and return the last."""

        def look():
            found = [
                event
                for event in self.events()
                if all(event.get(key) == value for key, value in fields.items()) and (predicate is None or predicate(event))
            ]
            return found[count - 1 : count]

        try:
            return eventually(look, timeout, f"an event {fields or predicate!r}")[0]
        except AssertionError as error:
            raise AssertionError(f"{error}; there are {self.events()!r}") from None

    # Speaking to it

    def request(self, method, path, body=None, headers=None, token=True, timeout=30):
        """One request on a connection of its own. `headers`: dict or pairs; `token=True` shows
        the caller token in X-Broker-Token; a body that is a dict or list is sent as JSON."""
        headers = header_pairs(headers)
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
            if not any(name.lower() == "content-type" for name, _ in headers):
                headers.append(("Content-Type", "application/json"))
        if isinstance(body, str):
            body = body.encode()
        names = {name.lower() for name, _ in headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.connect()
            connection.putrequest(method, path, skip_host="host" in names, skip_accept_encoding=True)
            if token is True:
                connection.putheader("X-Broker-Token", self.token)
            elif token:
                connection.putheader("X-Broker-Token", token)
            for name, value in headers:
                connection.putheader(name, value)
            if body is not None and not names & {"content-length", "transfer-encoding"}:
                connection.putheader("Content-Length", str(len(body)))
            try:
                connection.endheaders(body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused while the body was still on its way: the answer is what counts
            response = connection.getresponse()
            try:
                data = response.read()
            except http.client.IncompleteRead as error:
                self.seen.add(error.partial)
                raise
            answer = Answer(response.status, response.reason, response.getheaders(), data)
            self.seen.add(repr(answer.headers).encode() + answer.body)
            return answer
        finally:
            connection.close()

    def post_json(self, path, obj, headers=None, **more):
        return self.request("POST", path, json.dumps(obj).encode(), [*header_pairs(headers), JSON], **more)

    def connect(self, timeout=10):
        """A raw connection (see Caller); what comes on it is part of the leak check."""
        return Caller(self, timeout)

    def raw(self, data, half_close=False, timeout=10):
        """Send these bytes; all bytes that come until the broker closes."""
        return bytes(self._send_and_read_all(data, half_close, timeout).received)

    def raw_answers(self, data, half_close=False, timeout=10):
        """As raw(), parsed."""
        return self._send_and_read_all(data, half_close, timeout).read_answers()

    def _send_and_read_all(self, data, half_close, timeout):
        with self.connect(timeout) as caller:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                caller.send(data)
                if half_close:
                    caller.half_close()
            caller.read_all()
            return caller

    def head(self, method, path, headers=(), token=True, host=True, version="HTTP/1.1"):
        """The bytes of a request's head, for raw connections."""
        lines = [f"{method} {path} {version}"]
        lines += [f"Host: 127.0.0.1:{self.port}"] * bool(host)
        lines += ["X-Broker-Token: " + self.token] * bool(token)
        lines += ["{}: {}".format(*header) for header in header_pairs(headers)]
        return "\r\n".join(lines + ["", ""]).encode("latin-1")

    def post_bytes(self, path, body, headers=(), token=True):
        """The bytes of a whole JSON POST, for raw connections."""
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        headers = [*header_pairs(headers), JSON, ("Content-Length", str(len(body)))]
        return self.head("POST", path, headers, token) + body

    # What the kernel says of it (Linux)

    def _status_field(self, name):
        with open(f"/proc/{self.pid}/status", encoding="ascii") as file:
            return int(re.search(rf"^{name}:\s+([0-9]+)", file.read(), re.M).group(1))

    def rss_anon_kb(self):
        return self._status_field("RssAnon")

    def thread_count(self):
        return self._status_field("Threads")

    def fd_count(self):
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except PermissionError:
            raise unittest.SkipTest("the descriptors of a non-dumpable process are root's to see") from None


def search_whole_lines(output, pattern, start):
    whole_lines = bytes(output[: output.rfind(b"\n") + 1]).decode("utf-8", "replace")
    return re.compile(pattern).search(whole_lines, start)

class Completed(_Run):
    """A call of `broker.py` that has ended: returncode, stdout, stderr (text), folder, and in
    `files` what lay in the folder afterwards."""


def run_broker(
    *args,
    config=None,
    config_text=None,
    upstream=None,
    env=None,
    secret=None,
    token=None,
    folder=None,
    cwd=None,
    command=None,
    stdin=None,
    timeout=30,
    preexec_fn=None,
    ignored=(),
    prepare=None,
    show_token=False,
    script=None,
):
    """Run `broker.py` to its own end (a configuration error, --check, --report, `-- COMMAND`).

    `config` (overrides, {} for the default one) or `config_text` writes a file and puts
    `--config FILE` before `args`; with neither there is no --config. `prepare(run)` is called
    before the start, with run.folder, run.config_path, run.log_path. `show_token`: leave the
    token out of the leak check (a `-- COMMAND` that prints its environment)."""
    run = Completed()
    run._prepare(upstream, config, config_text, env, secret, token, folder)
    argv = ["--config", run.config_path] if config is not None or config_text is not None else []
    argv += [str(arg) for arg in args]
    if command is not None:
        argv += ["--"] + [str(arg) for arg in command]
    if isinstance(stdin, str):
        stdin = stdin.encode()
    try:
        if prepare:
            prepare(run)
        where = subprocess.DEVNULL if stdin is None else subprocess.PIPE
        process = start(argv, run.env, cwd or run.folder, where, script, None, ignored, preexec_fn)
        try:
            stdout, stderr = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            stdout, stderr = process.communicate()
            raise AssertionError(f"still running after {timeout} s: {stderr!r}") from None
        run.returncode = process.returncode
        run.stdout = stdout.decode("utf-8", "replace")
        run.stderr = stderr.decode("utf-8", "replace")
        log = run._read_log()
        run.log_text = log.decode("utf-8", "replace")
        run.files = sorted(os.listdir(run.folder))
    finally:
        run._remove_folder()
    if "Traceback" in run.stderr:
        raise AssertionError("a traceback on stderr: " + run.stderr)
    run.canaries.check({"stdout": stdout, "stderr": stderr, "the event log": log}, tokens=not show_token)
    return run


def run_each(cases):
    """Run many of them, as many at a time as there are cores: {case: keywords of run_broker, with `args`}.

    Gives {case: call}; call() is the run, or raises what became of it, so that it may stand in a subTest:

        for case, run in run_each(cases).items():
            with self.subTest(case):
                self.assertEqual(run().returncode, 2)
    """

    def run_one(keywords):
        # A wrong configuration that is let in would serve for ever.
        return run_broker(*keywords.pop("args", ()), **{"config": {}, "timeout": 20, **keywords})

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return {case: pool.submit(run_one, dict(keywords)).result for case, keywords in cases.items()}
