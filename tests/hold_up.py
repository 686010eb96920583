"""How long the others wait while somebody tries to hold the broker up: `python tests/hold_up.py`.

    python tests/hold_up.py                    every attack, a table
    python tests/hold_up.py --only pipelin     those with this word in their name
    python tests/hold_up.py --requests 500     the others' requests for each (default 200)

While an attack goes on, one caller asks a small question again and again, by turns on a kept connection and on a new
one. The table says the median and the worst of these waits, and memory (RssAnon), threads and descriptors: before the
attack, the most seen during it, and after it. `tests/test_nobody_waits.py` drives the same functions, without a clock.

The attackers and the upstream are processes of their own, or what Python does for them would stand in the others'
waits. An attack is only counted where it is seen to go on before the first of the others' requests and after the last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import SkipTest

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)
if __name__ == "__main__":
    os.environ.setdefault("BROKER_TEST_START", "command")  # a fork has the memory of what it was forked from

from tests.support import (  # noqa: E402
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    Broker,
    Caller,
    Gone,
    StubUpstream,
    canary,
    eventually,
    free_port,
    make_executable,
    run_broker,
)

CHAT = "/v1/chat/completions"
ATTACKERS = 40
BODY_BYTES = 30_000_000
STRUCTURE_LIMIT = 1_000_000  # of { [ and , together
STEP_SECONDS = 30  # the longest wait for an attack to show that it goes on
RELOADS_SECONDS = 60
BACK_SECONDS = 30  # a refused body is drained for ten seconds at most
DRAINED = 503  # bodies beyond what all may hold together: refused unparsed

# ---------------------------------------------------------------------------------------------------------------------
# Processes beside the broker. Each ends when its stdin does, so that none outlives whoever started it.


class Helper:
    """This very file in another role, which speaks on stdout."""

    def __init__(self, *words: object, **environment: str) -> None:
        argv = [sys.executable, os.path.realpath(__file__), *(str(word) for word in words)]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment}, start_new_session=True
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stdout.close()


class Provider(Helper):
    """The upstream; what `Broker` wants to know of one."""

    tls = False

    def __init__(self) -> None:
        super().__init__("provide")
        self.port = int(self.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        self.stdin.write(b"?\n")
        self.stdin.flush()
        return int(self.stdout.readline())

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self.process.returncode:
            raise AssertionError("the upstream saw what it must never see, look above")


class Attackers(Helper):
    """Callers who attack: a dot on stdout for every step of theirs that has succeeded (at most 20 a second)."""

    def __init__(self, role: str, broker: Broker, argument: str = "", count: int = ATTACKERS) -> None:
        variables = {SECRET_VARIABLE: broker.secret, TOKEN_VARIABLE: broker.token}
        super().__init__("attack", role, broker.port, count, argument, **variables)
        os.set_blocking(self.stdout.fileno(), False)

    def assert_going_on(self) -> None:
        """Returns once another step has succeeded after this call."""
        while self.stdout.read():
            pass
        if not select.select([self.stdout], [], [], STEP_SECONDS)[0]:
            raise AssertionError(f"the attack has come to a halt: no step within {STEP_SECONDS} s")
        if not self.stdout.read():
            raise AssertionError("the attackers gave up, they say above why")


# ---------------------------------------------------------------------------------------------------------------------
# What the upstream and the attackers do in their processes


def provide() -> None:
    """A StubUpstream that floods whoever asks for a stream. A line on stdin asks how many connections are open."""
    flood = b"data: " + b"x" * 65_000 + b"\n\n"

    def answer(conn, request):
        if b'"stream"' not in (request.body or b"")[:100]:
            return conn.respond_json({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})
        conn.start_stream()
        while True:  # until the broker leaves
            conn.chunk(flood)

    with StubUpstream(answer) as stub:
        print(stub.port, flush=True)
        for _ in sys.stdin:
            print(stub.open_connections, flush=True)
    if stub.errors:
        sys.exit("; ".join(stub.errors))


class Attacker(NamedTuple):
    """One of the many: a function that goes on for ever, and calls `step` whenever something has succeeded."""

    port: int
    argument: str
    step: Callable[[], None]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 60)

    def head(self, request_line: str, *headers: str, token: str | None = None) -> bytes:
        token = os.environ[TOKEN_VARIABLE] if token is None else token
        lines = [f"{request_line} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", f"X-Broker-Token: {token}", *headers]
        lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode()

    def post(self, body: bytes, path: str = CHAT) -> bytes:
        return self.head(f"POST {path}", "Content-Type: application/json", f"Content-Length: {len(body)}") + body

    def ask(self, request: bytes) -> int:
        """Send this on a connection of its own and read to its end (a half-close would be a caller who leaves)."""
        with self.connect() as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(request)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while data := sock.recv(65536):
                    answer += data
        return int(answer[9:12] or 0)

    def expect(self, status: int, *allowed: int) -> None:
        """Attackers that are answered otherwise than they think attack something else than they say."""
        if status not in allowed:
            os.write(2, f"attackers: {self.argument or 'this'} was answered with {status}, not {allowed}\n".encode())
            os._exit(1)

    # The roles

    def pipelines(self) -> None:
        requests = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
        while True:
            with self.connect() as sock, contextlib.suppress(OSError):
                while True:
                    sock.sendall(requests)
                    answers = 0
                    while answers < 100:
                        data = sock.recv(1 << 20)
                        if not data:
                            raise ConnectionResetError
                        answers += data.count(b"HTTP/1.1 200 ")
                    self.step()

    def rattles(self) -> None:
        while True:
            self.expect(self.ask(self.head(f"GET {CHAT}", token="x" * 40)), 401)
            self.step()

    def sends_crumbs(self) -> None:
        head = self.head(f"POST {CHAT}", "Content-Type: application/json", "Transfer-Encoding: chunked")
        body = b'{"a":"' + b"x" * 20_000 + b'"}'
        request = head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        while True:
            self.expect(self.ask(request), 200)
            self.step()

    def never_reads(self) -> None:
        with self.connect() as sock:
            sock.sendall(self.post(b'{"stream":true}'))
            sock.recv(64)
            leaving = select.poll()
            leaving.register(sock, select.POLLRDHUP)  # seen behind what was never read, too
            while not leaving.poll(50):
                self.step()
        os._exit(1)  # cut off: nobody attacks any more

    def sends_json(self) -> None:
        text, allowed = JSON_TEXTS[self.argument]
        request = self.post(text())
        while True:
            status = self.ask(request)
            self.expect(status, *allowed, DRAINED)
            if status != DRAINED:
                self.step()

    def raises_alarms(self) -> None:
        request = self.post(b'{"a":"%s"}' % os.environ[SECRET_VARIABLE].encode())
        while True:
            self.expect(self.ask(request), 403)
            self.step()

    def looks_up(self) -> None:
        # A caller who stays, for the look-up is given up when its caller has gone.
        request = self.post(b"{}", "/silent" + CHAT)
        while True:
            with self.connect() as sock:
                sock.sendall(request)
                self.expect(int(sock.recv(65536)[9:12] or 0), 502, 504)
                self.step()


def attack(role: str, port: str, count: str, argument: str) -> None:
    steps = threading.Event()
    attacker = Attacker(int(port), argument, steps.set)
    for _ in range(int(count)):
        threading.Thread(target=getattr(attacker, role), daemon=True).start()
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        while not selector.select(0.05):
            if steps.is_set():
                steps.clear()
                os.write(1, b".")
    os._exit(0)


def filled(*pieces: bytes) -> bytes:
    """An object with a list of these pieces over and over, about BODY_BYTES of it."""
    piece = b"".join(pieces)
    return b'{"a":[' + piece * (BODY_BYTES // len(piece)) + b"0]}"


def just_under(piece: bytes) -> bytes:
    """The same, with as much structure as may be, and one long string for the rest."""
    count = (STRUCTURE_LIMIT - 4) // sum(map(piece.count, (b"{", b"[", b",")))
    text = b'{"a":[' + piece * count + b'0],"b":"'
    return text + b"x" * (BODY_BYTES - len(text) - 2) + b'"}'


OVER, UNDER = (413,), (200,)
JSON_TEXTS: dict[str, tuple[Callable[[], bytes], tuple[int, ...]]] = {
    "30 MB of [": (lambda: b'{"a":' + b"[" * BODY_BYTES, OVER),
    '30 MB of {"a":1},': (lambda: filled(b'{"a":1},'), OVER),
    "30 MB of 1,": (lambda: filled(b"1,"), OVER),
    "[], just under the bound": (lambda: just_under(b"[],"), UNDER),
    '{"a":1}, just under the bound': (lambda: just_under(b'{"a":1},'), UNDER),
    "1, just under the bound": (lambda: just_under(b"1,"), UNDER),
    # Few of { [ and , but long numbers: the parser's time grows faster than their length. 400 if they are too long.
    "30 MB of integers of 4,300 digits": (lambda: filled(b"9" * 4300, b","), (200, 400, 413)),
    "30 MB of numbers with 30 digits": (lambda: filled(b"1." + b"7" * 29, b","), (200, 400, 413)),
    "30 MB of strings with escapes": (lambda: filled(rb'"\u00e9\n\"\\', b'x" ,'), (200, 413)),
    "one string of 30 MB, all escapes": (lambda: b'{"a":"' + rb"\n" * (BODY_BYTES // 2) + b'"}', UNDER),
}


# ---------------------------------------------------------------------------------------------------------------------
# The attacks as the one who measures sees them


class Attack:
    """A broker to attack, and a way to do it. `grows_mb`: what memory may still be more of, afterwards."""

    def __init__(self, name: str, grows_mb: int = 32, aim_ms: int = 100) -> None:
        self.name, self.grows_mb, self.aim_ms = name, grows_mb, aim_ms

    def broker(self, provider: Provider, stack: contextlib.ExitStack) -> Broker:
        return stack.enter_context(Broker(provider))

    @contextlib.contextmanager
    def under_way(self, broker: Broker) -> Iterator[Callable[[], None]]:
        """The attack (here: none); what it gives raises AssertionError where it doesn't go on any more."""
        yield lambda: None


class Callers(Attack):
    """By callers, on a broker like any other."""

    def __init__(self, name: str, role: str, argument: str = "", count: int = ATTACKERS, **more: int) -> None:
        super().__init__(name, **more)
        self.role, self.argument, self.count = role, argument, count

    @contextlib.contextmanager
    def under_way(self, broker: Broker) -> Iterator[Callable[[], None]]:
        with Attackers(self.role, broker, self.argument, self.count) as attackers:
            yield attackers.assert_going_on


class UnreadStderr(Callers):
    """Callers who cause a line on stderr, which nobody reads: the broker's own writes must not wait for it."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "raises_alarms", count=4)

    def open(self, stack: contextlib.ExitStack) -> int:
        """The descriptor that becomes stderr."""
        raise NotImplementedError

    def stop_reading(self) -> None:
        raise NotImplementedError

    def broker(self, provider: Provider, stack: contextlib.ExitStack) -> Broker:
        descriptor, port = self.open(stack), free_port()
        broker = Broker(
            provider, args=["--port", port], wait_ready=False, preexec_fn=lambda: os.dup2(descriptor, 2) and None
        )
        stack.enter_context(broker)
        broker.port, broker.url = port, f"http://127.0.0.1:{port}"
        eventually(lambda: is_healthy(broker), 20, "readiness")
        self.stop_reading()
        return broker


class FullPipe(UnreadStderr):
    def open(self, stack: contextlib.ExitStack) -> int:
        reader, self.writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, self.writer)
        return self.writer

    def stop_reading(self) -> None:
        # By another open file: O_NONBLOCK on ours would be on the broker's stderr as well, and nothing would wait.
        descriptor = os.open(f"/proc/self/fd/{self.writer}", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, b"x" * 4096)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, b"x")
        os.close(descriptor)


class StoppedTerminal(UnreadStderr):
    def open(self, stack: contextlib.ExitStack) -> int:
        self.master, self.terminal = os.openpty()
        stack.callback(os.close, self.master)
        stack.callback(os.close, self.terminal)
        return self.terminal

    def stop_reading(self) -> None:
        termios.tcflow(self.terminal, termios.TCOOFF)  # what Ctrl-S does


class SilentNameServer(Callers):
    """A name server that takes questions and gives no answer, in a mount namespace of the broker's own.

    The attackers' upstream has to be looked up, the others' has not."""

    PORT = 53
    PROGRAM = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'

    def __init__(self, name: str) -> None:
        super().__init__(name, "looks_up")

    def broker(self, provider: Provider, stack: contextlib.ExitStack) -> Broker:
        if not knows(LONG_FORM):
            raise SkipTest('this broker does not know "upstreams", and with one upstream everybody waits for its name')
        address = f"127.{os.getpid() % 250 + 1}.53.53"
        server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-test-"))
        resolver = os.path.join(folder, "resolv.conf")
        with open(resolver, "w", encoding="ascii") as file:
            file.write(f"nameserver {address}\noptions timeout:1 attempts:1\n")
        unshare = ["unshare", "--mount", "sh", "-c", self.PROGRAM, resolver]
        try:
            server.bind((address, self.PORT))
            subprocess.run([*unshare, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SkipTest(f"no name server of our own here, that takes root and unshare: {error}") from None
        config = {**LONG_FORM, "upstreams": {**LONG_FORM["upstreams"]}}
        config["upstreams"]["near"] = {**config["upstreams"]["near"], "base_url": provider.url}
        text = json.dumps(config)
        python, *words = [shutil.which(unshare[0]) or "", *unshare[1:], sys.executable]
        return stack.enter_context(Broker(provider, config_text=text, python=python, python_args=words))


class Reloads(Attack):
    """SIGHUP again and again, each time with a run of the secret's command."""

    def __init__(self, name: str, script: str, key_bytes: int, at_least: int, **more: int) -> None:
        super().__init__(name, **more)
        self.script, self.key_bytes, self.at_least = script, key_bytes, at_least

    def broker(self, provider: Provider, stack: contextlib.ExitStack) -> Broker:
        self.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-test-"))
        self.runs, self.key, held = (os.path.join(self.folder, name) for name in ("runs", "key", "held"))
        os.mkfifo(held)
        # Whoever reads it waits until we are gone.
        stack.callback(os.close, os.open(held, os.O_RDWR))
        self.keys: list[str] = []
        self.new_key()
        command = make_executable(self.folder, "vault", f"cd {self.folder}\necho >> runs\n{self.script}\nexec cat key")
        source = {"kind": "command", "argv": [command], "timeout_seconds": 10}
        return stack.enter_context(Broker(provider, config={"secret_source": source}))

    def new_key(self) -> None:
        self.keys.append((canary() * (self.key_bytes // 50 + 1))[: self.key_bytes])
        with open(self.key + ".new", "w", encoding="ascii") as file:
            file.write(self.keys[-1])
        os.replace(self.key + ".new", self.key)

    def wait_for_a_run(self, before: int) -> None:
        eventually(lambda: os.path.getsize(self.runs) > before, STEP_SECONDS, "another run of the command")

    @contextlib.contextmanager
    def under_way(self, broker: Broker) -> Iterator[Callable[[], None]]:
        enough, turned = threading.Event(), threading.Semaphore(0)
        count, deadline = 0, time.monotonic() + RELOADS_SECONDS

        def reload() -> None:
            nonlocal count
            while time.monotonic() < deadline and not (enough.is_set() and count >= self.at_least):
                before = os.path.getsize(self.runs)
                self.new_key()
                broker.signal(signal.SIGHUP)
                # Whole, or the next signal falls into the same reload.
                with contextlib.suppress(AssertionError):
                    self.wait_for_a_run(before)
                    broker.wait_event(event="reload", count=count + 1, timeout=STEP_SECONDS)
                    count += 1
                    turned.release()

        def assert_going_on() -> None:
            while turned.acquire(blocking=False):
                pass
            if not turned.acquire(timeout=STEP_SECONDS):
                raise AssertionError(f"no reload came to its end within {STEP_SECONDS} s")

        thread = threading.Thread(target=reload)
        thread.start()
        try:
            yield assert_going_on
        except BaseException:
            deadline = 0.0
            raise
        finally:
            enough.set()
            thread.join()
        if count < self.at_least:
            raise AssertionError(f"only {count} of {self.at_least} reloads within {RELOADS_SECONDS} s")
        for key in self.keys:
            broker.also_secret(key)


LONG_FORM: dict[str, Any] = {
    "listen_port": 0,
    "upstreams": {
        "near": {
            "base_url": "http://127.0.0.1:9",
            "allowed_paths": [CHAT],
            "secret_source": {"kind": "env", "name": SECRET_VARIABLE},
        },
        "far": {
            "base_url": "https://silent.test",
            "prefix": "/silent",
            "allowed_paths": [CHAT],
            "secret_source": {"kind": "env", "name": SECRET_VARIABLE},
        },
    },
    "client_token_env": TOKEN_VARIABLE,
}

ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("nobody"),
        Callers("40 strangers who pipeline", "pipelines"),
        Callers("200 with bad tokens", "rattles", count=200),
        Callers("40 bodies in one-byte chunks", "sends_crumbs"),
        Callers("40 who never read their stream", "never_reads"),
        *(
            Callers(name, "sends_json", name, grows_mb=128, aim_ms=250 if allowed != OVER else 100)
            for name, (_, allowed) in JSON_TEXTS.items()
        ),
        FullPipe("stderr: a full pipe"),
        StoppedTerminal("stderr: a stopped terminal"),
        SilentNameServer("40 who wait for a name server"),
        Reloads("a secret command whose children stay", "setsid cat held &", 60, 5),
        Reloads("60 rotations of a 4 kB key", "", 4000, 60),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def knows(config: dict[str, Any]) -> bool:
    """Whether this broker takes the keys of such a configuration."""
    return "unknown key" not in run_broker("--check", "--dry-run", config_text=json.dumps(config)).stderr


def is_healthy(broker: Broker) -> bool:
    with contextlib.suppress(OSError):
        return broker.request("GET", "/healthz", token=False, timeout=2).status == 200
    return False


class Counts(NamedTuple):
    rss_mb: float
    threads: int
    descriptors: int | None  # but for those to the upstream, which may be kept; None where only root may count them


def counts(broker: Broker, provider: Provider) -> Counts:
    try:
        descriptors = broker.fd_count() - provider.open_connections
    except SkipTest:
        descriptors = None
    return Counts(broker.rss_anon_kb() / 1024, broker.thread_count(), descriptors)


class Row(NamedTuple):
    """What was seen: the others' waits in seconds; before the attack, the most during it, after it."""

    waits: list[float]
    before: Counts
    most: Counts
    after: Counts
    grows_mb: int  # what memory may be more of, afterwards

    @property
    def left_behind(self) -> list[str]:
        """The columns that are not back where they were."""
        before = self.before._replace(rss_mb=self.before.rss_mb + self.grows_mb)
        names = ("memory", "threads", "descriptors")
        return [name for name, then, now in zip(names, before, self.after) if (now or 0) > (then or 0)]


class Others:
    """Somebody with a small question, by turns on a kept connection and on a new one."""

    def __init__(self, broker: Broker) -> None:
        self.broker, self.kept = broker, broker.connect(timeout=STEP_SECONDS)
        self.request = broker.post_bytes(CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi"}]})

    def __enter__(self) -> Others:
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.close()

    def ask(self, caller: Caller) -> None:
        caller.send(self.request)
        status = caller.read_answer().status
        if status != 200:
            raise AssertionError(f"the others get {status}")

    def wait(self, number: int) -> float:
        """Seconds until the answer."""
        begun = time.perf_counter()
        if number % 2:
            self.ask(self.kept)
        else:
            with self.broker.connect(timeout=STEP_SECONDS) as caller:
                self.ask(caller)
        return time.perf_counter() - begun


def most(seen: list[Counts]) -> Counts:
    return Counts(max(c.rss_mb for c in seen), max(c.threads for c in seen), max(c.descriptors or 0 for c in seen))


def measure(attack: Attack, requests: int) -> Row:
    """The others make so many requests while the attack goes on. Raises AssertionError where they are not served, or
    where it doesn't; SkipTest where it can't be made here."""
    with contextlib.ExitStack() as stack:
        provider = stack.enter_context(Provider())
        broker = attack.broker(provider, stack)
        with Others(broker) as others:
            for number in range(20):  # what is loaded with the first requests was not caused by the attack
                others.wait(number)
        broker.request("GET", CHAT, token="x" * 40)
        before, seen, waits = settled(broker, provider), [], []
        with attack.under_way(broker) as assert_going_on, Others(broker) as others:
            assert_going_on()
            try:
                for number in range(requests):
                    waits.append(others.wait(number))
                    if number % 10 == 0:
                        seen.append(counts(broker, provider))
            except (Gone, OSError) as error:
                raise AssertionError(f"the others are not served any more, after {len(waits)} requests: {error!r}") from None
            assert_going_on()
        row = Row(waits, before, most(seen), before, attack.grows_mb)
        deadline = time.monotonic() + BACK_SECONDS
        while True:
            row = row._replace(after=counts(broker, provider))
            if not row.left_behind or time.monotonic() > deadline:
                return row
            time.sleep(0.05)


def settled(broker: Broker, provider: Provider) -> Counts:
    """The counts once the connections of those who have left are closed here, too: three times the same."""
    seen = [counts(broker, provider)]
    while len(seen) < 3 or len({c[1:] for c in seen[-3:]}) > 1:
        time.sleep(0.1)
        seen.append(counts(broker, provider))
    return seen[-1]


def line(attack: Attack, row: Row) -> str:
    milliseconds = [wait * 1000 for wait in row.waits]
    three = list(zip(row.before, row.most, row.after))
    median = statistics.median(milliseconds)
    word = "met" if median <= attack.aim_ms else "missed"
    left_behind = "".join(f", {name} NOT BACK" for name in row.left_behind)
    return (
        f"{attack.name:<38}{median:>9.1f}{max(milliseconds):>9.1f}"
        f"{' / '.join(f'{mb:.0f}' for mb in three[0]):>18}{' / '.join(map(str, three[1])):>16}"
        f"{' / '.join(map(str, three[2])):>18}  <= {attack.aim_ms} ms {word}{left_behind}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="How long the others wait while somebody tries to hold the broker up.")
    parser.add_argument("--only", default="", help="those with this in their name")
    parser.add_argument("--requests", type=int, default=200, help="of the others, for each attack")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"{'attack':<38}{'median':>9}{'worst':>9}{'memory, MB':>18}{'threads':>16}{'descriptors':>18}  aim")
    print(f"{'':<38}{'ms':>9}{'ms':>9}{'before / most / after':>18}")
    failed = 0
    for attack in ATTACKS.values():
        if options.only not in attack.name:
            continue
        try:
            print(line(attack, measure(attack, options.requests)), flush=True)
        except SkipTest as reason:
            print(f"{attack.name:<38}  left out: {reason}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"{attack.name:<38}  FAILED: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["provide"]:
        provide()
    elif sys.argv[1:2] == ["attack"]:
        attack(*sys.argv[2:])
    else:
        sys.exit(main())
