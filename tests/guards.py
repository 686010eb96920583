"""Take each guard of the broker out, and see the attack that it is there for succeed: `python tests/guards.py`.

    python tests/guards.py                      every guard, a few at a time
    python tests/guards.py --only dot_segment   this one alone; may be given again for others
    python tests/guards.py --list               names and attacks

For each row of GUARDS: in a copy of this repository the guard's line is replaced; the attack must then work, and the
test that is named must go red. In a copy with the guard in place the same attack must fail, and the same test pass.
The exit code is 0 if all of that was seen. A guard whose test stays green is a hole in the tests; one whose attack fails
either way guards nothing, or something else guards it as well.

To add a guard: one row in GUARDS.

    name, attack    a word for it; who does what, in a sentence
    line, without   a piece of broker.py that stands there once, on one line, the shorter the better; what takes its place
    test            goes red without it (`tests.` is left out)
    tries           the attack: takes a Scene, says whether it worked; the functions before the table make most of them
    curl            instead of `tries`: a line for the shell of the README's workshop, step 4. It becomes an exercise there
    codes           the error codes that stand for this refusal; each of the broker's is named by some guard
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import functools
import glob
import gzip
import http.client
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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from tests.support import (  # noqa: E402
    ABSENT,
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    Answer,
    Broker,
    Lifeline,
    StubUpstream,
    canary,
    eventually,
    free_port,
    fresh_token,
    make_executable,
    run_broker,
)
from tests.test_process_guards import ORDINARY_USER, become_ordinary, ordinary_python  # noqa: E402

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
JSON = ("Content-Type", "application/json")
FORM = ("Content-Type", "multipart/form-data; boundary=x")
CHUNKED = ("Transfer-Encoding", "chunked")
OK = b"HTTP/1.1 200 OK\r\n"
WORKERS = 3  # one more than a small machine has cores: many a test goes red by waiting in vain
TEST_SECONDS = 60
ENOUGH_SECONDS = 3  # what has not come by then is taken for not coming


# ----------------------------------------------------------------------------------------------------------------------
# What attacks are made of


class Scene:
    """What one attack needs around it: a broker from `place`, its upstream, folders. All of it ends with the attack."""

    def __init__(self, place: str) -> None:
        self.script = os.path.join(place, "broker.py")
        self._installed = os.path.join(place, "tests", "support", "localhost-broker")
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def stub(self, handler: Any = None, **keywords: Any) -> StubUpstream:
        return self._ends.enter_context(StubUpstream(handler, **keywords))

    def broker(self, upstream: StubUpstream | None = None, **keywords: Any) -> Broker:
        broker = Broker(upstream, **{"script": self._installed, **keywords})
        self._ends.callback(self._end, broker)
        return broker

    def run(self, *args: str, **keywords: Any) -> Any:
        """A call of the program that ends by itself, with the default configuration unless another is given."""
        return run_broker(*args, **{"script": self._installed, "config": {}, **keywords})

    def folder(self) -> str:
        return os.path.realpath(self._ends.enter_context(tempfile.TemporaryDirectory(prefix="broker-test-")))

    def ask(
        self,
        method: str = "POST",
        path: str = CHAT,
        body: Any = None,
        headers: Any = (),
        handler: Any = None,
        token: Any = True,
        **keywords: Any,
    ) -> Answer:
        """The answer to one request; `keywords` are the broker's. What arrived is in `self.upstream.requests`."""
        self.upstream = self.stub(handler)
        self.served = self.broker(self.upstream, **keywords)
        body = {"model": "m"} if body is None and method == "POST" else body
        return self.served.request(method, path, body, headers, token)

    def curl(self, command: str) -> str:
        """What a command line prints in the shell of the workshop's step 4."""
        tokens = {"BROKER_CLIENT_TOKEN": fresh_token(), "STUDENT_TOKEN": fresh_token()}
        config = json.dumps({**workshop_config(), "listen_port": 0})
        broker = self.broker(config_text=config, dry_run=True, env=tokens)
        variables = {
            "URL": broker.url,
            "JSON": "Content-Type: application/json",
            "TOKEN": "X-Broker-Token: " + tokens["BROKER_CLIENT_TOKEN"],
            "STUDENT": "X-Broker-Token: " + tokens["STUDENT_TOKEN"],
            "PATH": os.environ.get("PATH", os.defpath),
        }
        run = subprocess.run(["sh", "-c", command], cwd=broker.folder, env=variables, capture_output=True, timeout=20)
        return run.stdout.decode()

    @staticmethod
    def _end(broker: Broker) -> None:
        # What it let out is the attack's to judge, and nobody waits for its end.
        broker.process.kill()
        with contextlib.suppress(AssertionError):
            broker.close()


@functools.lru_cache
def workshop_config() -> dict[str, Any]:
    """The `class.json` of the README."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        (text,) = [text for text in re.findall(r"(?ms)^```json\n(.*?)^```$", file.read()) if "STUDENT_TOKEN" in text]
    return json.loads(text)


Attack = Callable[[Scene], bool]


def in_the_workshop(command: str) -> Attack:
    """Works if something is answered, and nothing refused."""

    def attack(scene: Scene) -> bool:
        printed = scene.curl(command)
        return bool(printed) and '"type":"error"' not in printed

    return attack


def passes(*request: Any, **keywords: Any) -> Attack:
    """Works if the request is not refused; as for `Scene.ask`."""
    return lambda scene: scene.ask(*request, **keywords).code is None


def arrives(name: str, value: str, **keywords: Any) -> Attack:
    """Works if the upstream gets this header from a caller."""

    def attack(scene: Scene) -> bool:
        scene.ask(headers={name: value}, **keywords)
        return value in scene.upstream.requests[0].all(name)

    return attack


def comes_back(name: str, value: str) -> Attack:
    """Works if the caller gets this header from the upstream."""
    return lambda scene: value in scene.ask(handler=lambda conn, _: conn.respond(200, {name: value})).all(name)


def shows_the_secret(answer_with: Callable[[Any, str], None]) -> Attack:
    """Works if the secret is in the answer, plainly, in base64 or compressed; `answer_with(conn, secret)` is the upstream."""

    def attack(scene: Scene) -> bool:
        answer = scene.ask(handler=lambda conn, request: answer_with(conn, request.header("Authorization")[len("Bearer ") :]))
        secret = scene.served.secret.encode()
        seen = repr(answer.headers).encode() + answer.body
        return secret in seen or base64.b64encode(secret) in seen or secret in unzipped(answer.body)

    return attack


def unzipped(data: bytes) -> bytes:
    with contextlib.suppress(OSError):
        return gzip.decompress(data)
    return b""


def sent(build: Callable[[Broker], bytes]) -> Attack:
    """Works if these very bytes are not refused."""

    def attack(scene: Scene) -> bool:
        broker = scene.broker(scene.stub())
        with broker.connect() as caller:
            caller.send(build(broker))
            return caller.read_answer().code is None

    return attack


def starts(**keywords: Any) -> Attack:
    """Works if the program finds nothing wrong with such a configuration; as for `run_broker`."""
    return lambda scene: scene.run("--check", **keywords).returncode == 0


def a_client(**members: Any) -> dict[str, Any]:
    """The configuration of one caller in the long form."""
    return {"client_token_env": ABSENT, "clients": {"me": {"token_env": TOKEN_VARIABLE, **members}}}


CHEAP = a_client(allowed_models=["cheap-*"])


def beside_one_in_flight(body: Any, config: Any) -> Attack:
    """Works if a request passes while another one like it waits for its answer."""

    def attack(scene: Scene) -> bool:
        stub = scene.stub()
        stub.script(lambda conn, _: conn.hold(threading.Event()), lambda conn, _: conn.respond_json({}))
        broker = scene.broker(stub, config=config)
        with broker.connect() as first:
            first.send(broker.post_bytes(CHAT, body))
            stub.wait_for_requests(1)
            return broker.post_json(CHAT, body).code is None

    return attack


def a_vault(scene: Scene, script: str) -> dict[str, Any]:
    """The configuration whose secret this shell script prints."""
    return {"secret_source": {"kind": "command", "argv": [make_executable(scene.folder(), "vault", script)]}}


# ----------------------------------------------------------------------------------------------------------------------
# Attacks that take more than one request


def plants_a_module(scene: Scene) -> bool:
    folder = scene.folder()
    with open(os.path.join(folder, "hmac.py"), "w", encoding="utf-8") as file:
        file.write("print('planted', flush=True)\nraise SystemExit\n")
    return "planted" in scene.run("--version", script=shutil.copy(scene.script, folder)).stdout


def hides_a_request_in_a_refused_body(scene: Scene) -> bool:
    stub = scene.stub()
    broker = scene.broker(stub)
    with broker.connect() as caller:
        caller.send(broker.post_bytes("/v1/files", broker.head("GET", MODELS)))
        caller.read_answer()
        return caller.read_answer().status == 200


def shows_two_tokens(scene: Scene) -> bool:
    clients = {"me": {"token_env": TOKEN_VARIABLE}, "other": {"token_env": "OTHER_TOKEN"}}
    config, other = {"client_token_env": ABSENT, "clients": clients}, fresh_token()
    return scene.ask(headers={"x-api-key": other}, config=config, env={"OTHER_TOKEN": other}).code is None


def goes_where_the_mended_path_leads(scene: Scene) -> bool:
    scene.ask(path="/chat", config={"allowed_paths": ["/chat", "/v1/chat"]})
    return scene.upstream.requests[0].target == "/v1/chat"


def announces_all_the_memory(scene: Scene) -> bool:
    broker = scene.broker(scene.stub())
    for _ in range(8):
        caller = broker.connect()
        caller.send(broker.head("POST", CHAT, [JSON, ("Content-Length", str(32 << 20)), ("Expect", "100-continue")]))
        caller.read_head()
    return broker.post_json(CHAT, {}).code is None


def sends_a_large_body_in_chunks(scene: Scene) -> bool:
    broker, body = scene.broker(scene.stub(), config={"max_request_bytes": 100}), json.dumps({"text": "x" * 200}).encode()
    with broker.connect() as caller:
        caller.send(broker.head("POST", CHAT, [JSON, CHUNKED]) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        return caller.read_answer().code is None


def hides_the_secret_in_gzip(scene: Scene) -> bool:
    broker = scene.broker(scene.stub())
    body = gzip.compress(broker.secret.encode())
    return broker.request("POST", "/v1/audio/transcriptions", body, [FORM, ("Content-Encoding", "gzip")]).code is None


def sends_the_secret(scene: Scene) -> bool:
    broker = scene.broker(scene.stub())
    return broker.post_json(CHAT, {"note": broker.secret}).code is None


def sends_the_secret_forty_times(scene: Scene) -> bool:
    broker = scene.broker(scene.stub())
    for _ in range(40):
        broker.post_json(CHAT, {"note": broker.secret})
    broker.close()
    return broker.stderr_text().count("ALARM") > 20


def sends_deep_json(scene: Scene) -> bool:
    return scene.ask(body=b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", headers=[JSON]).code == "internal_error"


def reaches_the_upstream_in_a_dry_run(scene: Scene) -> bool:
    scene.ask(dry_run=True)
    return bool(scene.upstream.requests)


def asks_a_locked_vault_again_and_again(scene: Scene) -> bool:
    config = a_vault(scene, f"echo >> calls\n[ $(wc -l < calls) -gt 1 ] || echo {canary()}\n")
    config["secret_source"]["cache_seconds"] = 0
    broker = scene.broker(scene.stub(), config=config)
    for _ in range(3):
        broker.post_json(CHAT, {})
    with open(os.path.join(broker.folder, "calls"), encoding="utf-8") as calls:
        return len(calls.readlines()) > 2


def plants_a_helper_of_the_vault(scene: Scene) -> bool:
    return starts(
        config=a_vault(scene, "key-helper\n"),
        env={"PATH": ".:/usr/bin:/bin"},
        prepare=lambda run: make_executable(run.folder, "key-helper", f"echo {canary()}\n"),
    )(scene)


def leaves_a_child_behind(scene: Scene) -> bool:
    life = Lifeline(os.path.join(scene.folder(), "life"))
    config = a_vault(scene, f"exec 9>{life.path}\necho >&9\nsleep 20 & wait\n")
    config["secret_source"]["timeout_seconds"] = 0.5
    scene.run("--check", config=config)
    try:
        return not eventually(life.has_ended, ENOUGH_SECONDS)
    except AssertionError:
        return True
    finally:
        life.close()


def reads_a_key(write: Callable[[str], None]) -> Attack:
    """Works if a key is taken from the file `key`, which `write(folder)` makes."""
    config = {"secret_source": {"kind": "file", "path": "key"}}
    return starts(config=config, prepare=lambda run: write(run.folder))


def open_key(folder: str) -> None:
    with open(os.path.join(folder, "key"), "w", encoding="utf-8") as file:
        file.write(canary())
    os.chmod(file.name, 0o644)


def linked_key(folder: str) -> None:
    open_key(folder)
    os.chmod(os.path.join(folder, "key"), 0o600)
    os.rename(os.path.join(folder, "key"), os.path.join(folder, "real"))
    os.symlink("real", os.path.join(folder, "key"))


def shows_the_secret_as_a_token(scene: Scene) -> bool:
    token = fresh_token()
    return starts(config=a_vault(scene, f"echo {token}\n"), token=token, secret=token)(scene)


def is_told_by_the_vault(script: str, found: str) -> Attack:
    """Works if a vault that fails has these words shown on stderr."""
    return lambda scene: found in scene.run("--check", config=a_vault(scene, script + "\nexit 1\n")).stderr


def brings_a_folder(scene: Scene) -> bool:
    mark = os.path.join(scene.folder(), "ran")
    config = {"upstream_base_url": "https://api.openai.com", "allowed_paths": [CHAT], "client_token_env": TOKEN_VARIABLE}
    config.update(a_vault(scene, f"touch {mark}\n"))
    scene.run("--check", config=None, prepare=lambda run: run.write_config(config))
    return os.path.exists(mark)


def goes_to_either_upstream(scene: Scene) -> bool:
    config = dict.fromkeys(("upstream_base_url", "allowed_paths", "secret_source"), ABSENT)
    upstreams = {
        name: {"base_url": f"https://{name}.example", "allowed_paths": [path], "secret_source": {"kind": "none"}}
        for name, path in (("one", "/v1/*"), ("two", "/v1/chat"))
    }
    return starts(config={**config, "upstreams": upstreams, "mode": "dry_run"})(scene)


def opens_the_folder_above(scene: Scene) -> bool:
    above = scene.folder()
    folder = os.path.join(above, "mine")
    os.mkdir(folder, 0o700)
    os.chmod(above, 0o777)
    return starts(folder=folder)(scene)


def names_a_header_in_connection(name: str, value: str) -> Attack:
    """Works if the upstream gets it all the same."""

    def attack(scene: Scene) -> bool:
        scene.ask(headers={name: value, "Connection": name})
        return value in scene.upstream.requests[0].all(name)

    return attack


def takes_the_content_type_away(scene: Scene) -> bool:
    return not names_a_header_in_connection("Content-Type", "application/json")(scene)


def answers_in_the_providers_name(scene: Scene) -> bool:
    stub = scene.stub(tls="self_signed")
    scene.broker(stub).post_json(CHAT, {})
    return bool(stub.requests)


def has_the_tls_keys_written_down(scene: Scene) -> bool:
    keys = os.path.join(scene.folder(), "keys")
    scene.broker(scene.stub(tls=True), env={"SSLKEYLOGFILE": keys}).post_json(CHAT, {})
    return os.path.exists(keys)


def names_a_proxy(scene: Scene) -> bool:
    proxy = scene.stub(raw_handler=lambda sock: sock.close())
    scene.broker(scene.stub(tls=True), env={"HTTPS_PROXY": proxy.url}).post_json(CHAT, {})
    return proxy.connections > 0


def charges_twice(scene: Scene) -> bool:
    stub = scene.stub()
    stub.script(lambda conn, _: conn.respond_json({}), lambda conn, _: conn.close())
    broker = scene.broker(stub)
    broker.post_json(CHAT, {})
    broker.post_json(CHAT, {})
    return len(stub.requests) > 2


def keeps_the_connection_after(method: str, body: bytes | None) -> Attack:
    """Works if the next request goes out on the connection of this one."""

    def attack(scene: Scene) -> bool:
        scene.ask(method, MODELS, body, [JSON] if body else ())
        scene.served.request("GET", MODELS)
        return scene.upstream.connections == 1

    return attack


def answers_the_next_caller(at_once: bool) -> Attack:
    """Works if an answer that nobody asked for, behind the first one, is what the second request gets."""
    planted = OK + b"Content-Length: 7\r\n\r\nplanted"

    def answer(conn: Any, request: Any) -> None:
        conn.send(OK + b"Content-Length: 2\r\n\r\n{}" + planted * at_once)

    def attack(scene: Scene) -> bool:
        scene.ask(handler=answer)
        if not at_once:
            scene.upstream.all_connections[0].send(planted)  # it lies there before the request is sent
        return scene.served.post_json(CHAT, {}).body == b"planted"

    return attack


def is_silent(scene: Scene) -> bool:
    broker = scene.broker(scene.stub(lambda conn, _: conn.hold(threading.Event())), config={"upstream_timeout_seconds": 0.3})
    with broker.connect(timeout=ENOUGH_SECONDS) as caller:
        caller.send(broker.post_bytes(CHAT, {}))
        return nothing_comes(caller.read_head)


def takes_no_answer(scene: Scene) -> bool:
    def flood(conn: Any, request: Any) -> None:
        conn.start_stream()
        while True:
            conn.chunk(b"x" * (1 << 20))

    stub = scene.stub(flood)
    broker = scene.broker(stub, config={"upstream_timeout_seconds": 0.3})
    with broker.connect() as caller:
        caller.send(broker.head("GET", MODELS))
        caller.read_head()
        return nothing_comes(lambda: stub.wait_closed(timeout=ENOUGH_SECONDS))


def nothing_comes(wait: Callable[[], Any]) -> bool:
    """Whether the wait came to nothing."""
    try:
        wait()
    except AssertionError:
        return True
    return False


def answer_is_taken_for_whole(tls: bool, head: bytes) -> Attack:
    """Works if an answer that the upstream cuts looks complete to the caller."""

    def cut(conn: Any, request: Any) -> None:
        conn.send(OK + head + b"\r\npart")
        conn.close(notify=False)

    def attack(scene: Scene) -> bool:
        if tls and sys.version_info < (3, 10):
            raise unittest.SkipTest("this Python's own ssl takes no cut for an end")
        broker = scene.broker(scene.stub(cut, tls=tls))
        with broker.connect() as caller:
            caller.send(broker.post_bytes(CHAT, {}))
            return caller.read_answer().status == 200

    return attack


def tells_the_end_of_the_key(scene: Scene) -> bool:
    def reject(conn: Any, request: Any) -> None:
        conn.respond_json({"error": {"message": "no key ends in " + request.header("Authorization")[-8:]}}, 401)

    message = scene.ask(handler=reject).message
    return scene.served.secret[-8:] in message


def splits_the_secret(scene: Scene) -> bool:
    go_on = threading.Event()

    def answer(conn: Any, request: Any) -> None:
        secret = request.header("Authorization")[len("Bearer ") :].encode()
        conn.start_stream()
        conn.chunk(b"data: " + secret[:20])
        conn.hold(go_on)
        conn.chunk(secret[20:])
        conn.end()

    broker = scene.broker(scene.stub(answer))
    with broker.connect() as caller:
        caller.send(broker.post_bytes(CHAT, {}))
        head = caller.read_head()
        begin = caller.read_chunk()
        go_on.set()
        return broker.secret.encode() in begin + caller.read_body(head)


def writes_to(victim_link: Callable[[str, str], None]) -> Attack:
    """Works if a link in the log's place has a line written to somebody else's file."""

    def attack(scene: Scene) -> bool:
        victim = os.path.join(scene.folder(), "victim")
        with open(victim, "wb"):
            pass
        scene.run("--dry-run", command=["true"], prepare=lambda run: victim_link(victim, run.log_path))
        return os.path.getsize(victim) > 0

    return attack


def finds_the_log_open(scene: Scene) -> bool:
    folder = scene.folder()
    log = os.path.join(folder, "events.jsonl")
    with open(log, "wb"):
        os.chmod(log, 0o644)
    scene.run("--dry-run", command=["true"], folder=folder)
    return bool(os.stat(log).st_mode & 0o077)


def fills_the_disk(scene: Scene) -> bool:
    broker = scene.broker(dry_run=True)
    for _ in range(40):
        broker.request("GET", MODELS, token=False)
    return len(broker.events("denied")) > 20


def logs(secret: str | None, model: Callable[[Broker], str], found: Callable[[Broker], str]) -> Attack:
    """Works if such a model's name brings what is looked for into the log."""

    def attack(scene: Scene) -> bool:
        broker = scene.broker(scene.stub(), secret=secret)
        broker.post_json(CHAT, {"model": model(broker)})
        with open(broker.log_path, encoding="utf-8") as log:
            return found(broker) in log.read()

    return attack


VAULTS_KEY = "sk-0123456789abcdefghijABCDEFGHIJ"
QUOTED = 'sk-0123\\"456789abcdef'


def uses(input_tokens: int) -> Callable[[Any, Any], None]:
    """An upstream that reports so many."""
    return lambda conn, _: conn.respond_json({"usage": {"prompt_tokens": input_tokens, "completion_tokens": 0}})


def starts_anew_with_its_budget(scene: Scene) -> bool:
    folder, stub, config = scene.folder(), scene.stub(uses(900)), a_client(tokens_per_day=1000)
    for _ in range(2):
        broker = scene.broker(stub, config=config, folder=folder)
        answer = broker.post_json(CHAT, {"max_tokens": 500})
        broker.close()
    return answer.code is None


def is_charged_nothing(scene: Scene) -> bool:
    body, config = {"max_tokens": 900}, a_client(tokens_per_day=1000)
    scene.ask(body=body, handler=lambda conn, _: conn.respond_json({"text": "x" * 8000}), config=config)
    return scene.served.post_json(CHAT, body).code is None


def speaks_of_usage(scene: Scene) -> bool:
    answer = {"output": {"usage": {"prompt_tokens": 900}}, "usage": {"prompt_tokens": 1}}
    scene.ask(handler=lambda conn, _: conn.respond_json(answer))
    return scene.served.wait_event(event="response")["usage"]["input_tokens"] == 900


def shares_a_budget(scene: Scene) -> bool:
    first = scene.broker(dry_run=True, config=a_client(tokens_per_day=1000))
    config = {**a_client(tokens_per_day=1000), "event_log": first.log_path}
    return scene.run("--dry-run", config=config, command=["true"]).returncode == 0


def holds_all_connections(scene: Scene) -> bool:
    broker = scene.broker(dry_run=True, config={"max_concurrent_requests": 1})
    for _ in range(4):
        caller = broker.connect()
        caller.send(broker.head("GET", "/healthz"))
        caller.read_answer()
    try:
        return broker.request("GET", "/healthz").status != 200
    except (OSError, http.client.HTTPException):
        return True


def sends_without_a_token_and_without_end(scene: Scene) -> bool:
    broker, size = scene.broker(dry_run=True), 48 << 20
    with broker.connect() as caller:
        caller.send(broker.head("POST", CHAT, [JSON, ("Content-Length", str(size))], token=False))
        caller.read_answer()
        caller.send(b"x" * size)
    return True


def does_not_read_stderr(scene: Scene) -> bool:
    """Works if a request that is told to the operator has no answer while the pipe is full."""
    reader, writer = os.pipe()
    try:
        port = free_port()
        keywords = {"args": ["--port", port], "preexec_fn": lambda: os.dup2(writer, 2) and None, "wait_ready": False}
        broker = scene.broker(scene.stub(), **keywords)
        broker.port = port
        eventually(lambda: is_healthy(broker), 20, "readiness")
        fill(writer)
        with broker.connect(timeout=ENOUGH_SECONDS) as caller:
            caller.send(broker.post_bytes(CHAT, {"note": broker.secret}))
            return nothing_comes(caller.read_head)
    finally:
        os.close(reader)
        os.close(writer)


def is_healthy(broker: Broker) -> bool:
    with contextlib.suppress(OSError):
        return broker.request("GET", "/healthz", token=False).status == 200
    return False


def fill(pipe: int) -> None:
    # By another open file: O_NONBLOCK on this one would be the broker's as well.
    descriptor = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, b"x" * size)
    os.close(descriptor)


def finds_the_secret(*args: str, variable: str = SECRET_VARIABLE) -> Attack:
    """Works if the command that the broker runs finds it in this variable of its environment."""

    def attack(scene: Scene) -> bool:
        secret = canary()
        look = ["sh", "-c", f'test -n "${variable}"']
        return scene.run(*args, secret=secret, env={variable: secret}, command=look).returncode == 0

    return attack


def reads_the_environment_of_the_broker(scene: Scene) -> bool:
    """As another program of the same user: not as root, who may read everything."""
    python = ordinary_python()
    if python is None:
        raise unittest.SkipTest("no Python here that an ordinary user may run")
    folder = scene.folder()
    shutil.copy(scene.script, folder)

    def become_its_owner() -> None:
        if os.getuid() == 0:
            for name in ["", *os.listdir(folder)]:
                os.chown(os.path.join(folder, name), ORDINARY_USER, ORDINARY_USER)
        become_ordinary()

    script = os.path.join(folder, "broker.py")
    keywords = {"folder": folder, "script": script, "python": python, "preexec_fn": become_its_owner}
    broker = scene.broker(scene.stub(), **keywords)
    command = ["cat", f"/proc/{broker.pid}/environ"]
    look = subprocess.run(command, preexec_fn=become_ordinary, cwd="/", capture_output=True, timeout=20)
    return broker.secret.encode() in look.stdout


def stands_on_the_other_localhost(scene: Scene) -> bool:
    broker = scene.broker(dry_run=True)
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            raise unittest.SkipTest("there is no IPv6 here") from None
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", broker.port))
        return True


# ----------------------------------------------------------------------------------------------------------------------
# The table


class Guard(NamedTuple):
    """A row; what its members are stands at the top of this file."""

    name: str
    attack: str
    line: str
    without: str
    test: str
    tries: Attack | None = None
    curl: str = ""
    codes: str = ""


FRAMING = "test_http_hygiene.AmbiguousFraming.test_is_refused_and_the_connection_closed"
PATHS = "test_http_hygiene.Path.test_with_a_character_or_segment_that_no_api_needs_is_refused"
AUTHORITY = "test_forwarding.TheCallerBringsNoAuthority.test_by_any_header_that_means_some"
ANSWERS = "test_streaming.TheAnswersHead.test_loses_each_dropped_header"

GUARDS = (
    # ------------------------------------------------------------------------------------------------------------------
    # Before anything else: what is run, and who may change it
    Guard("planted_module", "An agent puts a module of its own beside the broker, which runs it.",
          "sys.path[:] = [entry for entry in sys.path if entry in LIBRARIES]", "pass",
          "test_process_guards.PlantedModule.test_beside_it_is_not_loaded_at_any_time", plants_a_module),
    Guard("cloned_folder", "A cloned folder brings a broker_config.json that runs a command of its author's.",
          "if options.config is None and upstream.source.kind not in UNASKED_SOURCES:", "if False:",
          "test_secret_sources.FromAFileThatWillNotDo.test_is_not_even_read_where_nobody_named_the_configuration",
          brings_a_folder),
    Guard("writable_config", "Another user writes into the configuration, and so redirects the key.",
          "if found.st_mode & stat.S_IWOTH and not sticky:", "if False:",
          "test_config.WhoMayWriteTheFiles.test_a_configuration_or_folder_that_the_world_may_write_is_refused",
          starts(prepare=lambda run: os.chmod(run.config_path, 0o666))),
    Guard("writable_folder_above",
          "Another user moves a folder on the way to the configuration, and puts another one in its place.",
          "in dict.fromkeys(way_to(config.file) + way_to(os.path.abspath(__file__))):",
          "in (config.file, os.path.dirname(config.file)):",
          "test_config.WhoMayWriteTheFiles.test_a_folder_anywhere_on_the_way_that_the_world_may_write_is_refused",
          opens_the_folder_above),
    Guard("hosts_without_a_token", "A page whose name is among allowed_hosts needs no token where there is none.",
          "and not config.allowed_hosts <= set(DEFAULT_HOSTS):", "and False:",
          "test_config.TheToken.test_may_be_done_without_only_where_the_default_hosts_are_let_in",
          starts(config={"client_token_env": None, "allowed_hosts": ["example.com"]})),
    Guard("rules_that_meet", "A request that two upstreams have a rule for goes to the one, with its key, that nobody meant.",
          "if rule.meets(twin):", "if False:",
          "test_upstreams.WrongUpstreams.test_rules_that_two_share_name_both",
          goes_to_either_upstream),
    Guard("open_key_file", "Another user reads the key in a file that is open to all.",
          "if has_modes and status.st_mode & 0o077:", "if False:",
          "test_secret_sources.FromWhichFile.test_is_one_that_its_owner_alone_may_read", reads_a_key(open_key)),
    Guard("linked_key_file",
          "An agent puts a link to another file in the place of the key's, which is then sent to the provider.",
          '"O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"', '"O_NONBLOCK", "O_NOCTTY", "O_BINARY"',
          "test_secret_sources.FromWhichFile.test_is_one_that_its_owner_alone_may_read", reads_a_key(linked_key)),
    Guard("secret_as_token", "The caller token is the secret itself, so whoever calls holds the key.",
          "if digest(secret.reveal()) in self._tokens:", "if False:",
          "test_secrets.Reload.test_with_a_secret_that_is_the_new_token_changes_neither", shows_the_secret_as_a_token),
    Guard("memory_of_the_process", "An agent of the same user reads the key in the broker's environment or memory.",
          "prctl(pr_set_dumpable, 0,", "prctl(pr_set_dumpable, 1,",
          "test_process_guards.OtherProgramsOfTheSameUser.test_read_an_unguarded_program_but_not_the_broker",
          reads_the_environment_of_the_broker),
    Guard("copy_in_the_environment", "An agent finds the key in its environment, under another name.",
          'and value.rstrip("\\r\\n") not in hidden', "",
          "test_command_line.CommandUnderUs.test_finds_neither_the_secret_nor_a_token_in_its_environment",
          finds_the_secret(variable="COPY")),
    Guard("variable_of_the_secret",
          "An agent under a dry-run finds the key in its environment: nobody has looked at it, and nobody took it away.",
          "if name not in HIDDEN_VARIABLES and", "if",
          "test_process_guards.OtherProgramsOfTheSameUser.test_find_no_secret_in_a_command_either",
          finds_the_secret("--dry-run")),
    Guard("other_localhost", 'Another program stands on ::1 for "localhost", and is shown the caller token.',
          "self._guard = guard_ipv6(self.server_address[1])", "pass",
          "test_life_cycle.ThePort.test_is_held_against_everybody_who_would_stand_there_for_localhost",
          stands_on_the_other_localhost),
    Guard("idle_connections", "Somebody without a token opens connections until nobody else gets in.",
          "and not self.make_room()", "",
          "test_load.TooManyConnections.test_cost_the_one_that_was_idle_longest_its_own", holds_all_connections),
    Guard("unread_stderr", "The terminal's output is stopped, and with it everybody who causes a line there.",
          "self._lines.put_nowait(printable(text))", 'os.write(2, (printable(text) + "\\n").encode())',
          "test_nobody_waits.NobodyWaits.test_for_a_pipe_that_nobody_reads", does_not_read_stderr),
    Guard("flood_of_stderr", "An agent drives what the operator should read out of the terminal.",
          "self._often.suppressed(often) is None", "False",
          "test_who_gets_in.TheSecretItself.test_again_and_again_is_told_twenty_times_a_minute_at_most",
          sends_the_secret_forty_times),
    Guard("unprintable_text", "A program's words move the cursor of the operator's terminal, or rename its window.",
          'c if c.isprintable() else "?"', "c",
          "test_secrets.CommandThatMisbehaves.test_by_playing_with_the_terminal_is_shown_harmless",
          is_told_by_the_vault("printf '\\033]0;owned\\007' >&2", "\033]0;")),
    # ------------------------------------------------------------------------------------------------------------------
    # 1. The bytes are one unambiguous HTTP request
    Guard("bare_lf", "A header that ends in LF alone is two headers for one reader, and none for another.",
          'if len(found) != rest.count("\\n"):', "if False:",
          "test_http_hygiene.MalformedHead.test_is_refused_and_the_connection_closed",
          sent(lambda broker: broker.head("GET", MODELS)[:-2] + b"X-Note: a\nX-Hidden: b\r\n\r\n"), codes="bad_request"),
    Guard("two_lengths",
          "Of two lengths we take the one and a server behind us the other: what lies between is a request of its own.",
          'raise Malformed("its Content-Length is not one plain number, once")', 'length = length.split(",")[0]',
          FRAMING,
          sent(lambda broker: broker.head("POST", CHAT, [JSON, ("Content-Length", "2"), ("Content-Length", "30")]) + b"{}"),
          codes="bad_request"),
    Guard("length_beside_chunks", "The same with a length beside chunks.",
          "(length is not None or coding.lower()", "(coding.lower()",
          FRAMING,
          sent(lambda broker: broker.head("POST", CHAT, [JSON, ("Content-Length", "12"), CHUNKED]) + b"2\r\n{}\r\n0\r\n\r\n"),
          codes="bad_request"),
    Guard("chunk_extension", "The same with a chunk's extension, which not every server ends where we do.",
          "self.STRICT if strict else self.LENIENT", "self.LENIENT",
          "test_http_hygiene.BadChunks.test_are_refused_and_the_connection_closed",
          sent(lambda broker: broker.head("POST", CHAT, [JSON, CHUNKED]) + b"2;a=b\r\n{}\r\n0\r\n\r\n"), codes="bad_request"),
    Guard("body_as_request", "The body of a refused request, which a stranger may have written, is served as the next request.",
          "and exchange.unread is None and not", "and not",
          "test_http_hygiene.Pipelining.test_the_body_of_a_refused_request_is_never_the_next_request",
          hides_a_request_in_a_refused_body),
    Guard("large_head", "Somebody without a token fills the memory with heads.",
          "= 32 * KIB, 100", "= 320 * KIB, 100",
          "test_http_hygiene.LargeHead.test_of_too_many_bytes_is_431", passes("GET", MODELS, headers={"X-Note": "x" * 40_000}),
          codes="headers_too_large"),
    Guard("dot_segment", "An agent leaves the allowed path by `..`, which the provider's server follows.",
          r'(r"/\.\.?(?![^/])", "its path has a dot segment"),', "",
          PATHS, passes("GET", "/v1/models/.."), codes="bad_request"),
    Guard("encoded_dot_segment", "The same with `%2e%2e`.",
          'raise Malformed(f"its path has %{code}, which must stand there plainly or not at all")', "pass",
          PATHS, passes("GET", "/v1/models/%2e%2e"), codes="bad_request"),
    Guard("strange_path", "An agent uses a character that some servers take for the end of a segment.",
          r"|[^A-Za-z0-9._~:@+,=\-/%]", "",
          PATHS, passes("GET", "/v1/models/a;b\\c"), codes="bad_request"),
    # ------------------------------------------------------------------------------------------------------------------
    # 2. and 3. No web page made it
    Guard("dns_rebinding", "A web page's own name is made to point at this machine.",
          "check_host(head, state.config.allowed_hosts)", "pass",
          "test_who_gets_in.Host", curl='curl -s $URL/v1/models -H "$TOKEN" -H "Host: evil.example"', codes="host_not_allowed"),
    Guard("web_page", "A web page posts to localhost.",
          "check_not_a_web_page(head)", "pass",
          "test_who_gets_in.WebPageAtTheDoor", curl='curl -s $URL/v1/models -H "$TOKEN" -H "Origin: https://evil.example"',
          codes="browser_not_allowed"),
    Guard("web_page_without_origin",
          "A web page has an image or a script loaded from localhost, for which browsers send no Origin.",
          '"origin", "sec-fetch-site", "access-control-request-method"', '"origin",',
          "test_who_gets_in.WebPageAtTheDoor.test_is_refused_by_what_its_browser_says",
          passes("GET", MODELS, headers={"Sec-Fetch-Site": "cross-site"}), codes="browser_not_allowed"),
    # ------------------------------------------------------------------------------------------------------------------
    # 5. It shows a caller's token
    Guard("no_token", "Another program on this machine uses the key.",
          "identify_caller(head, state.callers)", "[*state.callers.values()][0]",
          "test_who_gets_in.CallerToken", curl="curl -s $URL/v1/models", codes="client_token_required"),
    Guard("two_tokens", "Somebody with the tokens of two clients picks the limits of the one, the name of the other.",
          "if len(known) == 1 and (", "if known and (",
          "test_clients.EachClient.test_cannot_show_the_tokens_of_two", shows_two_tokens, codes="client_token_required"),
    Guard("expired_token", "Somebody whose time is over goes on to call.",
          "datetime.now(timezone.utc) < known[0].client.expires)", "True)",
          "test_clients.EachClient.test_whose_time_is_over_is_a_stranger",
          passes(config=a_client(expires="2020-01-01T00:00:00Z")), codes="client_token_required"),
    Guard("body_of_a_stranger", "Somebody without a token has the broker read without end.",
          "DRAIN_STRANGER if exchange.caller is None else DRAIN_CALLER", "DRAIN_CALLER",
          "test_who_gets_in.RefusalWhileTheBodyIsStillComing.test_of_a_stranger_is_not_read_to_its_end",
          sends_without_a_token_and_without_end),
    # ------------------------------------------------------------------------------------------------------------------
    # 6. Method, path and query are allowed, and its caller has not asked too often
    Guard("path", "An agent deletes a stored file.",
          "find_route(head, caller)", "Route(caller.client.upstreams[0], {JSON_TYPE}, head.path, head.path)",
          "test_who_gets_in.Allowlist", curl='curl -s -X DELETE $URL/v1/files/mine -H "$TOKEN"', codes="path_not_allowed"),
    Guard("method", "An agent uses another method on an allowed path.",
          "for method, kind in pairs if method == head.method)", "for method, kind in pairs)",
          "test_who_gets_in.Allowlist.test_says_which_method_would_be_allowed", passes("DELETE", CHAT),
          codes="method_not_allowed"),
    Guard("paths_of_a_client", "An agent asks for a path of the upstream's that its own client has not.",
          "pairs &= caller.client.rules.pairs(upstream.prefix + decoded)", "pass",
          "test_clients.NarrowerPaths.test_are_held_to_both_the_clients_rules_and_the_upstreams",
          passes(path="/v1/embeddings", config=a_client(allowed_paths=[CHAT])), codes="path_not_allowed"),
    Guard("mended_path", "A path that has a rule of its own is taken for another one, because that has `/v1` in front.",
          "for mend in (str, other_reading):", "for mend in (other_reading, str):",
          "test_who_gets_in.ABaseUrlThatDiffersByV1.test_is_left_as_it_is_where_it_has_a_rule_of_its_own",
          goes_where_the_mended_path_leads),
    Guard("websocket", "An agent that offers a WebSocket is left without the answer on which it falls back to plain HTTP.",
          "if types and not wants_websocket:", "if types:",
          "test_who_gets_in.UpgradeOffer.test_of_a_websocket_is_turned_down_so_that_the_agent_falls_back",
          passes("GET", MODELS, headers={"Connection": "Upgrade", "Upgrade": "websocket"}), codes="upgrade_not_supported"),
    Guard("credential_in_the_query", "An agent sends your data to somebody else's account, by a key in the query.",
          "check_query(head.query)", "pass",
          "test_who_gets_in.Query", curl='curl -s "$URL/v1/models?key=other" -H "$TOKEN"', codes="query_not_allowed"),
    Guard("credential_in_another_spelling", "The same, the key's name written in another way.",
          'urllib.parse.unquote_plus(parameter.partition("=")[0]).casefold().replace("_", "-")', 'parameter.partition("=")[0]',
          "test_who_gets_in.Query.test_with_a_credential_is_refused_however_it_is_spelt",
          passes("GET", MODELS + "?API%5FKey=mine"), codes="query_not_allowed"),
    Guard("rate", "An agent asks without end.",
          "exchange.take_place()", "pass",
          "test_limits.RequestsPerMinute", curl='for i in 1 2 3 4 5 6; do curl -s $URL/v1/models -H "$STUDENT"; done',
          codes="rate_limited"),
    Guard("requests_at_once", "Callers take all threads and connections.",
          "if self._in_flight >= most:", "if False:",
          "test_load.TooManyRequests.test_get_a_clean_refusal_and_the_others_their_answer",
          beside_one_in_flight({}, {"max_concurrent_requests": 1}), codes="too_many_requests_in_flight"),
    # ------------------------------------------------------------------------------------------------------------------
    # 7. Its body can be read in one way, holds no secret, and asks for what its caller may have
    Guard("type_of_the_body", "An agent sends what the broker can't read, a form say, and what is in it is not checked.",
          "check_body_head(head, route.types, state.config.max_request_bytes)", "pass",
          "test_who_gets_in.ContentType", curl='curl -s $URL/v1/chat/completions -H "$TOKEN" -d no-json',
          codes="content_type_not_supported"),
    Guard("compressed_body", "An agent that has got hold of the key sends it out compressed, where the broker doesn't see it.",
          "if not head.is_identity:", "if False:",
          "test_who_gets_in.ContentEncoding.test_other_than_identity_is_refused_with_the_cure", hides_the_secret_in_gzip,
          codes="content_encoding_not_supported"),
    Guard("large_body", "A caller fills the memory.",
          "if head.length is not None and head.length > limit:", "if False:",
          "test_who_gets_in.LargeRequests.test_beyond_it_are_refused",
          passes(body={"text": "x" * 200}, config={"max_request_bytes": 100}), codes="request_too_large"),
    Guard("large_body_in_chunks", "The same without saying how much will come.",
          "if exchange.request_bytes + (source.left or 0) > limit:", "if False:",
          "test_who_gets_in.LargeRequests.test_in_chunks_are_refused_as_soon_as_they_are_too_large",
          sends_a_large_body_in_chunks, codes="request_too_large"),
    Guard("all_bodies_together", "Many callers fill it together.",
          "if self._buffered + size > BUFFERED_LIMIT:", "if False:",
          "test_load.TheBodiesTogether.test_are_bounded_by_what_was_announced", announces_all_the_memory,
          codes="too_many_requests_in_flight"),
    Guard("key_twice", "Of two `model` the broker checks the one, and the provider takes the other.",
          "object_pairs_hook=no_key_twice, ", "",
          "test_who_gets_in.JsonBody.test_has_no_key_twice_at_any_level",
          passes(body='{"model": "cheap", "model": "dear"}', headers=[JSON]), codes="invalid_json"),
    Guard("key_in_another_case", "The same with a `Model` beside it, which Go takes for `model`.",
          "if key not in CASE_SENSITIVE_KEYS and key.casefold() in CASE_SENSITIVE_KEYS:", "if False:",
          "test_who_gets_in.JsonBody.test_has_no_top_level_key_that_another_parser_takes_for_one_of_ours",
          passes(body={"model": "cheap", "Model": "dear"}), codes="invalid_json"),
    Guard("no_json_number", "An agent sends NaN, which is JSON for Python alone.",
          "parse_constant=no_constant, ", "",
          "test_who_gets_in.JsonBody.test_is_one_strict_object",
          passes(body='{"model": "m", "temperature": NaN}', headers=[JSON]), codes="invalid_json"),
    Guard("long_number", "An agent sends a number whose reading takes seconds.",
          "if len(text) > DIGITS_LIMIT:", "if False:",
          "test_who_gets_in.JsonBody.test_is_refused_in_words_about_json",
          passes(body='{"model": "m", "seed": ' + "9" * 5000 + "}", headers=[JSON]), codes="invalid_json"),
    Guard("deep_json", "An agent nests JSON until the parser gives up, and is answered with a bug.",
          "except RecursionError:", "except ZeroDivisionError:",
          "test_who_gets_in.JsonBody.test_deeper_or_longer_than_the_parser_goes_is_refused", sends_deep_json,
          codes="invalid_json internal_error"),
    Guard("costly_json", "An agent sends JSON whose parsing holds up everybody.",
          "if len(body) > JSON_COST_LIMIT and", "if False and",
          "test_who_gets_in.JsonBody.test_of_more_than_a_million_parts_is_refused_wherever_they_stand",
          passes(body='{"a": [1' + ",1" * 1_000_001 + "]}", headers=[JSON]), codes="request_too_large"),
    Guard("secret_in_a_request", "An agent that has got hold of the key sends it out, in a prompt say.",
          "check_no_secret(head, body)", "pass",
          "test_who_gets_in.TheSecretItself.test_in_a_request_is_refused_and_told_to_the_operator", sends_the_secret,
          codes="secret_in_request"),
    Guard("model", "An agent that may use a cheap model names a dear one.",
          "check_model(caller.client, head.method, exchange.facts)", "pass",
          "test_clients.AllowedModels",
          curl="""curl -s $URL/v1/chat/completions -H "$STUDENT" -H "$JSON" -d '{"model":"dear-1","max_tokens":9}'""",
          codes="model_not_allowed"),
    Guard("fallback_model", "The same in OpenRouter's `models` or LiteLLM's `fallbacks`.",
          'for name in ("models", "fallbacks"):', "for name in ():",
          "test_clients.AllowedModels.test_of_every_model_that_may_answer_instead",
          passes(body={"model": "cheap-1", "fallbacks": ["dear-1"]}, config=CHEAP),
          codes="model_not_allowed"),
    Guard("model_in_the_path", "The same in the path, an allowed one in the body.",
          "[named] if named is not None else ", "",
          "test_clients.AllowedModels.test_of_the_path_where_the_provider_has_it_there",
          passes(path="/openai/deployments/dear-1/chat/completions", body={"model": "cheap-1"}, config=CHEAP),
          codes="model_not_allowed"),
    Guard("budget", "An agent asks for more than its day has left.",
          "exchange.reserve_tokens()", "pass",
          "test_limits.AskedFor", curl="""curl -s $URL/v1/chat/completions -H "$STUDENT" -H "$JSON" -d '{"model":"cheap-1"}'""",
          codes="budget_exhausted"),
    Guard("budget_in_flight", "An agent spends its budget many times at once.",
          "used + use.reserved + asked > budget", "used + asked > budget",
          "test_limits.Settled.test_reserves_meanwhile_what_was_asked_for",
          beside_one_in_flight({"max_tokens": 600}, a_client(tokens_per_day=1000)), codes="budget_exhausted"),
    Guard("budget_over_a_restart", "A restart fills the budget again.",
          "self.limits.load({name: used.get(name, 0) for name in new})", "pass",
          "test_limits.LedgerAtTheStart.test_has_what_each_client_used", starts_anew_with_its_budget, codes="budget_exhausted"),
    Guard("one_ledger", "Two brokers give the same budget twice.",
          "lock_exclusively(self._fd)", "pass",
          "test_limits.Ledger.test_is_one_brokers_alone", shares_a_budget),
    # ------------------------------------------------------------------------------------------------------------------
    # 8. The event log takes it, or it goes no further
    Guard("unwritable_log", "What an agent does leaves no trace once the disk is full.",
          "exchange.log_request(state.config.mode)", "pass",
          "test_event_log.LogThatCannotBeWritten", curl='rm class.jsonl; mkdir class.jsonl; curl -s $URL/v1/models -H "$TOKEN"',
          codes="event_log_unavailable"),
    Guard("log_behind_a_hard_link",
          "Somebody puts another name of a file of yours in the log's place, and the broker writes into it.",
          "if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:", "if False:",
          "test_event_log.File.test_is_neither_a_link_nor_a_fifo_nor_somebody_elses", writes_to(os.link)),
    Guard("log_behind_a_link", "The same with a symbolic link.",
          '"O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_NOCTTY"', '"O_NONBLOCK", "O_BINARY", "O_NOCTTY"',
          "test_event_log.File.test_deleted_and_replaced_by_a_link_is_not_written", writes_to(os.symlink)),
    Guard("open_log", "Another user reads who asked for what.",
          "os.fchmod(fd, 0o600)", "pass",
          "test_event_log.File.test_is_for_its_user_alone_even_if_it_was_not", finds_the_log_open),
    Guard("flood_of_the_log", "Somebody without a token fills the disk by being refused.",
          "return 0 if count < LINES_A_MINUTE else None", "return 0",
          "test_event_log.Strangers.test_cannot_fill_the_disk", fills_the_disk),
    Guard("token_in_the_log", "A caller's token gets into the log as the name of a model.",
          "loggable(fields[name]) for name in FOREIGN_FIELDS", "fields[name] for name in FOREIGN_FIELDS",
          "test_event_log.WhatOthersChose.test_brings_no_secret_and_no_token_in",
          logs(None, lambda broker: broker.token, lambda broker: broker.token)),
    Guard("secret_by_escapes", "A caller chooses a string that the escapes of JSON turn into the secret.",
          '"[redacted]" if not is_plain and redactor.has(encode_json(text).encode()) else text', "text",
          "test_event_log.WhatOthersChose.test_does_not_become_the_secret_by_the_escapes_of_json",
          logs(QUOTED, lambda broker: QUOTED.replace("\\", ""), lambda broker: QUOTED)),
    # ------------------------------------------------------------------------------------------------------------------
    # 9. and 10. A dry-run does nothing; else the secret, from memory or its source
    Guard("dry_run", "Somebody who only tries it out is charged, by an upstream that was asked for real.",
          "DryRun(upstream) if config.dry_run else ", "",
          "test_dry_run.NothingRead.test_and_nothing_run_or_sent", reaches_the_upstream_in_a_dry_run),
    Guard("locked_vault", "An agent that asks again and again has the vault ask its user as often.",
          "if now >= self._failed_until:", "if True:",
          "test_secrets.SecretThatCannotBeHad.test_is_asked_for_once_however_often_an_agent_tries",
          asks_a_locked_vault_again_and_again, codes="secret_unavailable"),
    Guard("relative_path_of_a_command",
          "An agent writes a program into a folder that a relative entry of PATH names, and the vault's script runs it.",
          'os.pathsep.join(filter(os.path.isabs, os.environ.get("PATH", os.defpath).split(os.pathsep)))',
          'os.environ.get("PATH", os.defpath)',
          "test_secrets.Command.test_finds_no_relative_folder_in_its_path", plants_a_helper_of_the_vault),
    Guard("children_of_a_command", "A vault's program that took too long leaves a child behind, key and all.",
          "os.killpg(process.pid, signal.SIGKILL)", "process.kill()",
          "test_secrets.CommandThatMisbehaves.test_by_taking_too_long_is_killed_with_its_children", leaves_a_child_behind),
    Guard("words_of_a_command", "A vault's program shows the key as it fails, and it stays in the terminal.",
          "return re.sub(ADDRESS_OR_WORD, hide, text)", "return text",
          "test_secrets.WordsOfAVault.test_are_shown_without_what_might_be_a_key",
          is_told_by_the_vault(f"echo no access with {VAULTS_KEY} >&2", VAULTS_KEY)),
    # ------------------------------------------------------------------------------------------------------------------
    # 11. What the caller brought is stripped, ours is attached
    Guard("credential", "An agent brings a credential of its own, and the work is done in somebody else's account.",
          "*-key *-token *-secret *-auth ", "",
          AUTHORITY, arrives("X-Vault-Token", "mine")),
    Guard("underscore", "The same under a name with `_`, which WSGI and CGI servers can't tell from `-`.",
          "dropped.has(plain) and", "dropped.has(lower) and",
          AUTHORITY, arrives("X_Vault_Token", "mine")),
    Guard("strange_name", "The same under a name with a character that some servers read as `-`.",
          'if plain.replace("-", "").isalnum() and', "if",
          "test_forwarding.TheCallerBringsNoAuthority.test_by_a_name_that_another_server_may_read_as_one_of_these",
          arrives("X.Vault.Token", "mine")),
    Guard("payer", "An agent bills another organization that the key belongs to.",
          "content-encoding x-goog-user-project {PAYERS}", "content-encoding",
          AUTHORITY, arrives("OpenAI-Organization", "org-other")),
    Guard("override", "An agent turns the allowed POST into a DELETE.",
          "x-http-method* *method-override x-original-* x-rewrite-* ", "",
          AUTHORITY, arrives("X-HTTP-Method-Override", "DELETE")),
    Guard("forwarded", "An agent passes for another address, which the provider trusts.",
          "x-forwarded-* forwarded via ", "",
          AUTHORITY, arrives("X-Forwarded-For", "127.0.0.1")),
    Guard("range", "An agent asks for the answer in pieces, each too short to hold the secret whole.",
          "a-im range if-range", "a-im",
          AUTHORITY, arrives("Range", "bytes=0-9")),
    Guard("upgrade", "An agent switches to HTTP/2, in which nobody checks what it says.",
          " upgrade proxy*", " proxy*",
          AUTHORITY, arrives("Upgrade", "h2c")),
    Guard("named_by_connection", "A header that was meant for us alone reaches the provider.",
          'own | {name.replace("_", "-") for name in self.connection} - {"content-type"}', "own",
          "test_forwarding.TheConnectionHeader.test_removes_what_it_names", names_a_header_in_connection("X-Note", "for you")),
    Guard("content_type_named_by_connection", "An agent has the body's type taken away, and the provider guesses another one.",
          ' - {"content-type"}', "",
          "test_forwarding.TheConnectionHeader.test_cannot_remove_the_content_type", takes_the_content_type_away),
    Guard("framing_in_another_spelling", "An agent names another type in a spelling that some servers read as the real one.",
          ' and lower != "content_type"', "",
          "test_forwarding.TheCallerBringsNoAuthority.test_by_a_framing_header_in_another_spelling",
          arrives("Content_Type", "text/other")),
    Guard("fixed_header", "An agent sends a header that the operator has fixed, and the provider takes that one.",
          "REQUEST_DROPPED, upstream.own_headers, REQUEST_KEPT", "REQUEST_DROPPED, frozenset(), REQUEST_KEPT",
          "test_forwarding.ExtraHeaders.test_stand_in_place_of_the_callers",
          arrives("X-Region", "mine", config={"extra_headers": {"X-Region": "fixed"}})),
    Guard("certificate", "Somebody in the network's path answers in the provider's name, and gets the key.",
          "ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)", "ssl._create_unverified_context()",
          "test_forwarding.BadCertificates.test_end_it_before_the_key_is_sent", answers_in_the_providers_name,
          codes="upstream_tls_error"),
    Guard("tls_key_log", "An agent that sets SSLKEYLOGFILE reads what goes to the provider, key and all.",
          "ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)", "ssl.create_default_context()",
          "test_process_guards.TlsKeyLog.test_is_not_written", has_the_tls_keys_written_down),
    Guard("proxy_before_loopback", "A proxy of the environment's gets what was meant for an upstream on this machine.",
          "if address.is_loopback or not named:", "if not named:",
          "test_forwarding.TheProxy.test_never_comes_between_us_and_a_loopback_upstream", names_a_proxy),
    Guard("charged_twice", "A POST that the provider may have carried out is sent again.",
          'if kept is None or (sent and head.method not in ("GET", "HEAD")):', "if kept is None:",
          "test_forwarding.KeptConnections.test_that_close_at_the_moment_of_use_never_have_anything_else_sent_again",
          charges_twice, codes="upstream_unreachable"),
    Guard("silent_upstream", "An upstream that says nothing holds its callers for ever.",
          "deadline, limit = time.monotonic() + self._timeout,", "deadline, limit = time.monotonic() + 3600,",
          "test_faults.Silence.test_is_answered_with_a_time_out", is_silent, codes="upstream_timeout"),
    # ------------------------------------------------------------------------------------------------------------------
    # 12. The answer, as it arrives, the secret redacted
    Guard("secret_in_an_answer", "The provider, or a program behind it, shows the key in its answer.",
          "self.redactor.clean(self.held + data)", "self.held + data",
          "test_redaction.EveryForm.test_is_replaced_in_a_body_and_nothing_else_is",
          shows_the_secret(lambda conn, secret: conn.respond_json({"key": secret}))),
    Guard("secret_across_chunks", "The same in two pieces.",
          "keep = 0 if last else self.redactor.open_tail(data)", "keep = 0",
          "test_redaction.Streams.test_are_searched_across_every_split", splits_the_secret),
    Guard("secret_in_base64", "The same in base64.",
          "enumerate((0, 2, 3))", "enumerate(())",
          "test_redaction.EveryForm.test_of_base64_is_replaced_but_for_what_a_neighbour_shares",
          shows_the_secret(lambda conn, secret: conn.respond(body=base64.b64encode(secret.encode())))),
    Guard("secret_in_a_header", "The same in a header.",
          "HIDDEN.in_answers.also(exchange.secret).clean(", "bytes(",
          "test_redaction.EveryForm.test_is_replaced_in_headers",
          shows_the_secret(lambda conn, secret: conn.respond(200, {"X-Echo": secret}))),
    Guard("secret_in_gzip", "The same in a compressed answer, in which nobody can look for it.",
          "if not self.has_no_body and not head.is_identity:", "if False:",
          "test_faults.ABody.test_that_is_compressed_is_refused",
          shows_the_secret(lambda conn, secret: conn.respond(200, {"Content-Encoding": "gzip"}, gzip.compress(secret.encode()))),
          codes="upstream_protocol_error"),
    Guard("end_of_the_key", "The provider tells the last characters of the key that it rejects.",
          '"[masked]" if "*" in word or any(word[at:at + 4] in key for at in range(len(word) - 3)) else word', "word",
          "test_faults.ARejectedSecret.test_is_told_in_words_that_hold_nothing_of_a_key", tells_the_end_of_the_key,
          codes="upstream_rejected_secret"),
    Guard("rejected_key", "A 401 has the agent's user look for the mistake in the caller token, or give the agent a key.",
          "if answer.status != 401 or secret is None:", "if True:",
          "test_faults.ARejectedSecret.test_is_told_with_the_reason_and_the_providers_id",
          lambda scene: scene.ask(handler=lambda conn, _: conn.respond(401)).status == 401, codes="upstream_rejected_secret"),
    Guard("redirect", "A redirect takes the caller's next request, prompt and all, to another host.",
          'if 300 <= answer.status < 400 and "location" in answer.head.fields:', "if False:",
          "test_faults.Refusals.test_by_a_redirect_are_neither_followed_nor_passed_on",
          lambda scene: scene.ask(handler=lambda conn, _: conn.respond(307, {"Location": "https://evil.example"})).status == 307,
          codes="upstream_redirect"),
    Guard("interim_answers", "An upstream sends interim answers without end.",
          "for _ in range(INTERIM_LIMIT + 1):", "for _ in range(1000):",
          "test_faults.InterimAnswers.test_are_refused_beyond_and_so_is_a_switch_of_protocols",
          passes(handler=lambda conn, _: conn.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20 + OK + b"Content-Length: 0\r\n\r\n")),
          codes="upstream_protocol_error"),
    Guard("answer_behind_an_answer", "What an upstream sends behind an answer is what the next caller gets.",
          "and self._body.done and not self._wire.buffer:", "and self._body.done:",
          "test_forwarding.NobodyGetsAnothersAnswer.test_from_bytes_that_stand_behind_an_answer",
          answers_the_next_caller(at_once=True)),
    Guard("answer_on_an_idle_connection", "The same with what it sends later, unasked.",
          "if wire is None or is_quiet(wire):", "if True:",
          "test_forwarding.NobodyGetsAnothersAnswer.test_from_bytes_that_come_on_an_idle_connection",
          answers_the_next_caller(at_once=False)),
    Guard("body_of_a_head",
          "The same with the body of an answer that should have none, which may come together with the next request.",
          "keep if head.keep_alive and not self.has_no_body else None", "keep if head.keep_alive else None",
          "test_forwarding.KeptConnections.test_are_not_made_of_an_answer_without_a_body_by_rule",
          keeps_the_connection_after("HEAD", None)),
    Guard("body_of_a_get", "A server that reads no body with a GET takes it for the next request.",
          "sent == len(data) and (not body or head.method in BODY_METHODS)", "sent == len(data)",
          "test_forwarding.KeptConnections.test_are_not_made_of_a_request_whose_body_the_upstream_may_not_have_read",
          keeps_the_connection_after("GET", b"{}")),
    Guard("cut_answer", "An answer that was cut looks complete, and half a command is carried out.",
          "self._body.chunked or self._body.left is not None", "False",
          "test_streaming.TheUpstreamBreaksOff.test_at_any_byte_and_it_is_never_taken_for_whole",
          answer_is_taken_for_whole(tls=False, head=b"Content-Length: 99\r\n")),
    Guard("cut_tls", "The same where somebody in the network's path cuts the connection, and the answer has no length.",
          "suppress_ragged_eofs=False", "suppress_ragged_eofs=True",
          "test_streaming.TlsBreaksOff.test_a_body_that_ends_with_the_connection_is_whole_only_with_close_notify",
          answer_is_taken_for_whole(tls=True, head=b"")),
    Guard("set_cookie", "A provider sets a cookie for localhost, which other servers here would get.",
          '"set-cookie* ', '"',
          ANSWERS, comes_back("Set-Cookie", "session=theirs")),
    Guard("access_control", "A provider lets web pages read its answers.",
          " access-control-* ", " ",
          ANSWERS, comes_back("Access-Control-Allow-Origin", "*")),
    Guard("www_authenticate", "A provider has a browser ask its user for a password.",
          " www-authenticate ", " ",
          ANSWERS, comes_back("WWW-Authenticate", "Basic")),
    Guard("brokers_own_header", "A provider's answer passes for a refusal of ours.",
          "x-broker-* anthropic-organization-id", "anthropic-organization-id",
          ANSWERS, comes_back("X-Broker-Error", "secret_unavailable")),
    Guard("organization", "An agent learns whose account it works in.",
          " anthropic-organization-id ", " ",
          ANSWERS, comes_back("Anthropic-Organization-Id", "org-ours")),
    Guard("answer_in_a_browser", "A browser takes what a model says for a page or a script of localhost.",
          "{ANSWER_FIXED}", "",
          "test_who_gets_in.EveryAnswer.test_tells_a_browser_to_do_nothing_with_it",
          lambda scene: scene.ask().header("X-Content-Type-Options") is None),
    Guard("untaken_answer", "A caller that takes nothing of its answer holds its place for ever.",
          "wait_for(self, WRITE, time.monotonic() + silence, caller)", "wait_for(self, WRITE, time.monotonic() + 3600, caller)",
          "test_streaming.SlowReaders.test_that_take_nothing_for_the_time_out_are_cut", takes_no_answer, codes="request_timeout"),
    # ------------------------------------------------------------------------------------------------------------------
    # 13. The outcome
    Guard("unreported_usage", "A provider reports no usage, and the budget lasts for ever.",
          "self.status >= 400 or (self.is_whole and self.usage is not None):", "True:",
          "test_limits.Settled.test_is_a_quarter_of_the_bytes_where_nothing_is_reported", is_charged_nothing),
    Guard("talk_of_usage", "What a model says looks like a report of usage, and is charged.",
          'key.encode("utf-8", "surrogatepass")), member)', 'key.encode("utf-8", "surrogatepass"), place), member)',
          "test_event_log.Usage.test_is_what_each_provider_reports", speaks_of_usage),
)


def readme_rows() -> list[list[str]]:
    """The README's exercises: line, replacement, attack and test of each guard that the shell of its workshop can attack."""
    return [[guard.line, guard.without, guard.curl, "tests." + guard.test] for guard in GUARDS if guard.curl]


# ----------------------------------------------------------------------------------------------------------------------
# The runner


class NotThere(Exception):
    """The guard's line is not in broker.py, or not once."""


def source_without(guard: Guard, source: str) -> str:
    found = source.count(guard.line)
    if found != 1:
        where = "not found in" if not found else f"found {found} times in"
        raise NotThere(f"its line is {where} broker.py: {guard.line!r}: give another piece, that stands there once")
    return source.replace(guard.line, guard.without)


def copy_of_all_this(folder: str, source: str) -> str:
    """This repository in the folder, as far as attacks and tests need it, with this as its broker.py."""
    unneeded = shutil.ignore_patterns("node", "browser", "bench")
    shutil.copytree(os.path.join(ROOT, "tests"), os.path.join(folder, "tests"), ignore=unneeded)
    for path in glob.glob(os.path.join(ROOT, "broker_config*.json")) + [os.path.join(ROOT, "README.md")]:
        shutil.copy(path, folder)
    with open(os.path.join(folder, "broker.py"), "w", encoding="utf-8") as file:
        file.write(source)
    return folder


class Seen(NamedTuple):
    """What was seen of a guard: `summary` for the eye, `holds` None where it could not be tried here."""

    guard: Guard
    holds: bool | None
    summary: str


def attack_in(place: str, guard: Guard) -> str:
    """Whether it "works" or "fails", with the reason if one is known."""
    try:
        if guard.curl and not shutil.which("curl"):
            raise unittest.SkipTest("curl is not installed")
        with Scene(place) as scene:
            return "works" if (guard.tries or in_the_workshop(guard.curl))(scene) else "fails"
    except (AssertionError, OSError, http.client.HTTPException) as error:
        return f"fails ({type(error).__name__}: {str(error)[:200]})"


def test_in(place: str, test: str) -> str:
    """Whether it is "red" or "green", or what else became of it."""
    command = [sys.executable, "-m", "unittest", "-f", "tests." + test]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        said = process.communicate(timeout=TEST_SECONDS)[1].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it then cleans up behind itself
        process.communicate()
        return f"without an end in {TEST_SECONDS} s"
    if "skipped=" in said and process.returncode == 0:
        raise unittest.SkipTest(f"{test} skips itself here")
    return "red" if process.returncode else "green"


def look_at(guard: Guard, source: str, intact: str, test_intact: Callable[[str], str]) -> Seen:
    """Tries the attack and the test without the guard and with it. `intact` has it, and there `test_intact` runs a test."""
    try:
        with tempfile.TemporaryDirectory(prefix="broker-guards-") as folder:
            place = copy_of_all_this(folder, source_without(guard, source))
            without = attack_in(place, guard), test_in(place, guard.test)
        with_it = attack_in(intact, guard), test_intact(guard.test)
    except NotThere as error:
        return Seen(guard, False, str(error))
    except unittest.SkipTest as reason:
        return Seen(guard, None, f"skipped, {reason}")
    except Exception as error:
        return Seen(guard, False, f"{type(error).__name__}: {error}")
    holds = without == ("works", "red") and with_it[0].startswith("fails") and with_it[1] == "green"
    attacks = [with_it[0].partition(" ")[0] if holds else with_it[0], without[0]]
    return Seen(guard, holds, f"attack {attacks[1]} without it, {attacks[0]} with it; {guard.test} {without[1]}, {with_it[1]}")


def look_at_all(guards: Sequence[Guard]) -> list[Seen]:
    """Some at a time; a line for each as it is done."""
    with open(os.path.join(ROOT, "broker.py"), encoding="utf-8") as file:
        source = file.read()
    seen: list[Seen] = []
    with tempfile.TemporaryDirectory(prefix="broker-guards-") as folder, \
            concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        intact = copy_of_all_this(folder, source)
        test_intact = functools.lru_cache(maxsize=None)(lambda test: test_in(intact, test))     # several guards share one
        tries = [pool.submit(look_at, guard, source, intact, test_intact) for guard in guards]
        for done in concurrent.futures.as_completed(tries):
            seen.append(done.result())
            name, fate = seen[-1].guard.name, "FAILED: " if seen[-1].holds is False else ""
            print(f"[{len(seen)}/{len(guards)}] {name}: {fate}{seen[-1].summary}", flush=True)
    return seen


def main(argv: list[str] | None = None, table: Sequence[Guard] = GUARDS) -> int:
    parser = argparse.ArgumentParser(description="Take each guard of the broker out, and see its attack succeed.")
    parser.add_argument("--only", metavar="NAME", action="append", help="this guard alone; may be given again")
    parser.add_argument("--list", action="store_true", help="names and attacks")
    options = parser.parse_args(argv)
    names = {guard.name for guard in table}
    for name in options.only or ():
        if name not in names:
            parser.error(f"there is no guard {name}; --list shows them")
    guards = [guard for guard in table if not options.only or guard.name in options.only]
    if options.list:
        for guard in guards:
            print(f"{guard.name}: {guard.attack}")
        return 0
    began = time.monotonic()
    seen = look_at_all(guards)
    failed = [each for each in seen if each.holds is False]
    skipped = sum(each.holds is None for each in seen)
    for each in failed:
        print(f"FAILED {each.guard.name}: {each.summary}")
    print(f"guards: {len(seen)} tried, {len(seen) - len(failed) - skipped} hold, {len(failed)} failed, {skipped} skipped, "
          f"{time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
