"""What the broker costs, beside what people would use instead: `python tests/benchmark.py`.

    python tests/benchmark.py             every row, some minutes
    python tests/benchmark.py --quick     every row with fewer samples, a minute or so
    python tests/benchmark.py --gate      exit 1 if a row is worse than three times its aim, twice
    python tests/benchmark.py --profile   where a request's time goes inside the broker
    python tests/benchmark.py --json FILE --rows latency,load

All in one run, so that the numbers can be compared: the callers' way straight to the upstream (`direct`), through
nginx, through a proxy written by hand with aiohttp, through the script that one writes first (`early`, for scale), and
through the broker, in turns on the same connections. `installed` is the broker as its installed command starts it.
A peer that is not installed is named and left out. Everything stays on loopback, in processes started here and
ended here. The machine should have nothing else to do: the peers share what the others leave them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import py_compile
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "tests" / "bench"
BROKER = ROOT / "broker.py"
sys.path.insert(0, str(ROOT))

from tests.bench import wire  # noqa: E402

TOKEN = "token-bench-" + secrets.token_urlsafe(24)
SECRET = "sk-bench-" + secrets.token_urlsafe(32)
PEERS = ("direct", "nginx", "aiohttp", "early", "broker")
COLUMNS = (*PEERS, "installed")  # it differs from the broker in how it starts, and in what stays of that in memory
ROWS = ("latency", "load", "streams", "start", "limits", "ledger", "idle", "growth", "cost")
JUDGED_ROWS = ROWS[:6]  # those with an aim; the others are worth knowing
LEDGER_LINES = 200_000
BUDGET = 10**12
OTHER_TOKENS = {f"BENCH_TOKEN_{number}": "token-bench-" + secrets.token_urlsafe(24) for number in range(1, 100)}


class Sizes:
    """How much of everything is measured: enough to trust, or enough to notice a disaster."""

    def __init__(self, quick: bool) -> None:
        self.rounds = 3 if quick else 7
        self.small = (5, 60) if quick else (10, 100)  # blocks a round, requests a block
        self.middle = (2, 15) if quick else (4, 25)
        self.large = (1, 6) if quick else (2, 10)
        self.prompts = 2 if quick else 3  # the longest has no aim
        self.load_rounds = 2 if quick else 3
        self.load_seconds = 1 if quick else 4
        self.stream_rounds = 1 if quick else 3
        self.stream_seconds = 1.5 if quick else 5.0
        self.many_seconds = 2.0 if quick else 8.0
        # The early script gives nothing before a stream's end: 500 of them say no more than 50.
        self.many_peers = ("direct", "broker") if quick else tuple(name for name in PEERS if name != "early")
        self.starts = {name: 3 if quick and name != "installed" else 7 for name in COLUMNS}
        self.idle_seconds = 3.0 if quick else 5.0
        self.growth_requests = 20_000 if quick else 100_000
        self.cost_rounds = 3 if quick else 5
        self.ledger_starts = 2 if quick else 5


# ---------------------------------------------------------------------------------------------------------------------
# Processes: started here, ended here by their own id, also when somebody presses Ctrl-C
# ---------------------------------------------------------------------------------------------------------------------


class BenchmarkError(Exception):
    """Something without which there is nothing to measure; the message says what."""


class Child:
    def __init__(self, name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.name, self.process, self.port, self.log = name, process, port, log

    @property
    def pid(self) -> int:
        return self.process.pid


class Children:
    """Every process of this run. Each has its own session: Ctrl-C reaches us alone, and we end them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[Child] = []
        # Not what the shell holds: a proxy variable, say, would send loopback traffic elsewhere.
        self.environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "LC_ALL": "C.UTF-8"}
        for name in ("SYSTEMROOT", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE"):
            if name in os.environ:
                self.environment[name] = os.environ[name]

    def spawn(self, name: str, argv: list[Any], port: int = 0, stdout: Any = None, **environment: Any) -> Child:
        log = self.folder / f"{name}-{len(list(self.folder.iterdir()))}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [str(word) for word in argv],
                stdin=subprocess.DEVNULL,
                stdout=stdout or file,
                stderr=file,
                cwd=self.folder,
                env={**self.environment, "BENCH_TOKEN": TOKEN, **environment},
                start_new_session=True,
            )
        child = Child(name, process, port, log)
        self.running.append(child)
        return child

    def serve(self, name: str, argv: list[Any], port: int, **environment: str) -> Child:
        """Start a server and wait until it takes connections."""
        child = self.spawn(name, argv, port, **environment)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and child.process.poll() is None:
            with contextlib.suppress(OSError):
                wire.connect(port).close()
                return child
            time.sleep(0.001)
        self.end(child)
        raise BenchmarkError(f"{name} did not start: {child.log.read_text(errors='replace')[-800:]}")

    def run(self, name: str, argv: list[Any], timeout: float, **environment: Any) -> str:
        """A program that comes to an end by itself; what it printed."""
        child = self.spawn(name, argv, stdout=subprocess.PIPE, **environment)
        try:
            output, _ = child.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{name} did not end within {timeout} s") from None
        finally:
            self.end(child)
        if child.process.returncode:
            raise BenchmarkError(f"{name} failed: {child.log.read_text(errors='replace')[-800:]}")
        return output.decode()

    def end(self, *children: Child) -> None:
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()
        for child in children:
            # A second SIGTERM ends a server at once that would wait for its callers.
            for ask in (child.process.terminate, child.process.kill, lambda: None):
                try:
                    child.process.wait(3)
                    break
                except subprocess.TimeoutExpired:
                    ask()
            if child.process.stdout:
                child.process.stdout.close()
            if child in self.running:
                self.running.remove(child)

    def end_all(self) -> None:
        self.end(*self.running)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def raise_descriptor_limit() -> None:
    """500 streams are more than 1,000 descriptors in a proxy; the children inherit what is set here."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 16384 if hard == resource.RLIM_INFINITY else min(16384, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# ---------------------------------------------------------------------------------------------------------------------
# The peers
# ---------------------------------------------------------------------------------------------------------------------

# One process for all, so that its memory is one number. Keep-alive limits high: a new connection now and then would
# stand in the p99. A prompt is taken in whole, as nginx does by default and the broker must, but into memory: with the
# default buffer of 16 kB it would go through a file, and 400 kB would take five times as long.
NGINX = """
daemon off; master_process off; worker_processes 1; worker_rlimit_nofile 8192;
pid {folder}/nginx-{port}.pid; error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_timeout 3600s; keepalive_requests 100000000; tcp_nodelay on;
  client_max_body_size 64m; client_body_buffer_size 4m; client_header_timeout 600s; client_body_timeout 600s;
  client_body_temp_path {folder}/nginx-body; proxy_temp_path {folder}/nginx-proxy;
  fastcgi_temp_path {folder}/nginx-fastcgi; uwsgi_temp_path {folder}/nginx-uwsgi; scgi_temp_path {folder}/nginx-scgi;
  default_type application/json;
  {http}
}}
"""
NGINX_UPSTREAM = """
  server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ return 200 '{answer}'; }} }}
"""
NGINX_PROXY = """
  upstream provider {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 9999999; keepalive_timeout 1h; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://provider; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header X-Broker-Token ""; proxy_set_header Authorization "Bearer {secret}";
      proxy_buffering off; proxy_read_timeout 600s; proxy_send_timeout 600s;
    }}
  }}
"""


class Stage:
    """What can be started, and with what."""

    def __init__(self, children: Children, folder: Path) -> None:
        self.children, self.folder = children, folder
        self.nginx_program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        self.wrk = shutil.which("wrk")
        self.missing: list[str] = []
        self.peers = ["direct"]
        if self.nginx_program:
            self.peers.append("nginx")
        else:
            self.missing.append("nginx is not installed: no comparison with it, and the upstream is a slower one")
        try:
            import aiohttp
        except ImportError:
            self.missing.append("aiohttp is not installed: no comparison with a proxy written with it")
        else:
            self.peers.append("aiohttp")
            self.aiohttp_version = aiohttp.__version__
        self.peers.append("early")
        if BROKER.exists():
            self.peers += ["broker", "installed"]
        else:
            self.missing.append(f"{BROKER} is not there")
        if not self.wrk:
            self.missing.append("wrk is not installed: the load comes from tests/bench/load.py, which takes more time")

    def upstream(self) -> Child:
        """The fastest thing that gives one fixed answer."""
        port = free_port()
        if not self.nginx_program:
            return self.stream_upstream()
        http = NGINX_UPSTREAM.format(port=port, answer=wire.COMPLETION.decode().replace("'", "\\'"))
        return self._nginx("upstream", port, http)

    def stream_upstream(self) -> Child:
        port = free_port()
        return self.children.serve("stream-upstream", [sys.executable, BENCH / "upstream.py", port], port)

    def peer(self, name: str, upstream: int) -> Child:
        port = free_port()
        if name == "nginx":
            return self._nginx("nginx", port, NGINX_PROXY.format(port=port, upstream=upstream, secret=SECRET))
        if name == "aiohttp":
            argv = [sys.executable, BENCH / "aiohttp_proxy.py", port, upstream]
            return self.children.serve("aiohttp", argv, port)
        if name == "early":
            return self.children.serve("early", [sys.executable, BENCH / "early_script.py", port, upstream], port)
        return self.broker(upstream, port=port, program=self.installed() if name == "installed" else None)

    def installed(self) -> list[Any]:
        """The installed command, with what pip leaves of it: a module that is compiled, and a script that imports it."""
        script = self.folder / "venv" / "bin" / "localhost-broker"
        if not script.exists():
            self.children.run("venv", [sys.executable, "-m", "venv", "--without-pip", self.folder / "venv"], 60)
            (site_packages,) = (self.folder / "venv" / "lib").glob("python*/site-packages")
            shutil.copy(BROKER, site_packages)
            py_compile.compile(str(site_packages / "broker.py"), doraise=True)
            script.write_text("import sys\nfrom broker import main\nif __name__ == '__main__':\n    sys.exit(main())\n")
        return [self.folder / "venv" / "bin" / "python", script]

    def _nginx(self, name: str, port: int, http: str) -> Child:
        file = self.folder / f"nginx-{port}.conf"
        file.write_text(NGINX.format(folder=self.folder, port=port, http=http))
        argv = [self.nginx_program, "-c", file, "-p", self.folder, "-e", "stderr"]
        return self.children.serve(name, argv, port)

    def broker_config(self, upstream: int, rules: int = 1, log_bytes: int = 0, clients: int = 0) -> Path:
        """The short form; with `clients`, the long one, in which the last of them is whom the benchmark calls as."""
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="broker-"))
        others = [f"/v1/deployments/d{number}/chat/*" for number in range(rules - 1)]
        provider = {
            "allowed_paths": [*others, wire.PATH],  # the one that matches stands last: the longest way
            "secret_source": {"kind": "env", "name": "BENCH_SECRET"},
        }
        url = f"http://127.0.0.1:{upstream}"
        short = {"upstream_base_url": url, **provider, "client_token_env": "BENCH_TOKEN"}
        limits = {
            "allowed_paths": provider["allowed_paths"],
            "allowed_models": ["another-*", "gpt-bench"],
            "requests_per_minute": 10**9,
            "max_concurrent_requests": 1000,
            "tokens_per_day": BUDGET,
            "expires": "2999-12-31T23:59:59Z",
        }
        variables = [f"BENCH_TOKEN_{number}" for number in range(1, clients)] + ["BENCH_TOKEN"]
        named = {f"client-{number}": {"token_env": name, **limits} for number, name in enumerate(variables, 1)}
        long = {"upstreams": {"provider": {"base_url": url, **provider}}, "clients": named}
        config = folder / "broker_config.json"
        config.touch(0o600)
        more = {"listen_port": 0, "max_concurrent_requests": 1024, "event_log": "events.jsonl"}
        config.write_text(json.dumps({**(long if clients else short), **more}))
        if log_bytes:
            line = json.dumps({"time": "2026-01-01T00:00:00.000Z", "event": "request", "id": "x" * 100}) + "\n"
            log = folder / "events.jsonl"
            log.touch(0o600)
            with open(log, "w") as file:
                for _ in range(log_bytes // (len(line) * 1000)):
                    file.write(line * 1000)
        return config

    def broker(self, upstream: int, port: int = 0, program: list[Any] | None = None, **more: int) -> Child:
        return self.broker_on(self.broker_config(upstream, **more), port, program)

    def broker_on(self, config: Path, port: int = 0, program: list[Any] | None = None) -> Child:
        port = port or free_port()
        argv = [*(program or [sys.executable, BROKER]), "--config", config, "--port", port]
        return self.children.serve("broker", argv, port, BENCH_SECRET=SECRET, **OTHER_TOKENS)

    def knows_limits(self, row: str) -> bool:
        """Whether this broker takes the long form; if not, the row is named as left out."""
        argv = [sys.executable, BROKER, "--check", "--config", self.broker_config(9, clients=1)]
        try:
            self.children.run("check", argv, 30, BENCH_SECRET=SECRET)
        except BenchmarkError as error:
            if "unknown key" not in str(error):
                raise
            self.missing.append(f"{row}: this broker does not know upstreams and clients")
            return False
        return True

    @contextlib.contextmanager
    def stood_up(self, upstream: Child, names: list[str] | tuple[str, ...]) -> Iterator[dict[str, Child]]:
        """The named peers before this upstream; `direct` is the upstream itself. All ended on the way out."""
        started = {name: self.peer(name, upstream.port) for name in names if name != "direct" and name in self.peers}
        try:
            yield {name: started.get(name, upstream) for name in names if name in self.peers}
        finally:
            self.children.end(*started.values())


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def refuses(port: int, request: bytes) -> bool:
    """Whether such a body is too large for this peer."""
    with contextlib.suppress(OSError, ValueError, wire.WireError), wire.connect(port) as connection:
        return wire.exchange(connection, request)[0] == 413
    return False


def in_turns(ports: dict[str, int], body: bytes, rounds: int, blocks: tuple[int, int]) -> dict[str, Any]:
    """One caller on kept connections, block by block in turns: the machine's moods fall on everybody alike."""
    requests = {name: wire.request(port, body, TOKEN) for name, port in ports.items()}
    ports = {name: port for name, port in ports.items() if name != "early" or not refuses(port, requests[name])}
    connections = {name: wire.connect(port) for name, port in ports.items()}
    errors = dict.fromkeys(ports, 0)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ports}

    def ask(name: str) -> float:
        begun = time.perf_counter()
        try:
            if name == "early":  # it keeps no connection: that a new one takes time is a part of its time
                connections[name].close()
                connections[name] = wire.connect(ports[name])
            status, answer = wire.exchange(connections[name], requests[name])
        except (OSError, ValueError, wire.WireError):
            status, answer = 0, b""
            connections[name].close()
            connections[name] = wire.connect(ports[name])
        taken = time.perf_counter() - begun
        if status != 200 or answer != wire.COMPLETION:
            errors[name] += 1
            if errors[name] > 20:
                raise BenchmarkError(f"{name} answers with errors: {status} {answer[:300]!r}")
        return taken * 1000

    for name in ports:
        for _ in range(5 + blocks[1] // 2):
            ask(name)
    order = list(ports)
    for _ in range(rounds):
        times: dict[str, list[float]] = {name: [] for name in ports}
        for _ in range(blocks[0]):
            for name in order:
                times[name] += [ask(name) for _ in range(blocks[1])]
            order.append(order.pop(0))
        for name, values in times.items():
            seen[name].append((wire.percentile(values, 0.5), wire.percentile(values, 0.99)))
    for connection in connections.values():
        connection.close()
    return {
        name: {
            "p50_ms": statistics.median(p50 for p50, _ in values),
            "p99_ms": statistics.median(p99 for _, p99 in values),
            "errors": errors[name],
        }
        for name, values in seen.items()
    }


def status_kb(pid: int) -> dict[str, int]:
    """Memory as /proc says it; empty where there is no /proc."""
    found = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith(("RssAnon:", "VmRSS:")):
                found[line.split(":")[0]] = int(line.split()[1])
    return found


def memory(child: Child) -> dict[str, float]:
    return {name: kb / 1024 for name, kb in status_kb(child.pid).items()}


def cpu_and_wakeups(pid: int) -> tuple[float, int] | None:
    """Seconds of processor time so far, and how often any of its threads woke up."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(") ")[2].split()
        wakeups = 0
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/status") as file:
                wakeups += sum(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), wakeups


def latency_rows(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    upstream = stage.upstream()
    found: dict[str, Any] = {}
    with stage.stood_up(upstream, PEERS) as peers:
        ports = {name: child.port for name, child in peers.items()}
        for label, size, blocks in (
            ("1 kB", 1_000, sizes.small),
            ("400 kB", 400_000, sizes.middle),
            ("2 MB", 2_000_000, sizes.large),
        )[: sizes.prompts]:
            body = wire.prompt(size)
            found[label] = in_turns(ports, body, sizes.rounds, blocks)
            times = []
            for _ in range(11):
                begun = time.perf_counter()
                json.loads(body)
                times.append((time.perf_counter() - begun) * 1000)
            found[label]["json.loads"] = {"p50_ms": statistics.median(times)}
            for numbers in found[label].values():
                for key in ("p50_ms", "p99_ms"):
                    if key in numbers and "direct" in found[label]:
                        numbers["added_" + key] = numbers[key] - found[label]["direct"][key]
    stage.children.end(upstream)
    return found


def one_load(stage: Stage, port: int, callers: int, seconds: float, requests: int = 0) -> dict[str, Any]:
    """A closed loop of callers, each on its own kept connection; by time with wrk, by number with our own."""
    file = stage.folder / "prompt-1k.json"
    file.write_bytes(wire.prompt(1_000))
    if stage.wrk and not requests:
        argv: list[Any] = [stage.wrk, "-t1", f"-c{callers}", f"-d{int(seconds)}s", "--latency", "--timeout", "10s"]
        argv += ["-s", BENCH / "wrk.lua", f"http://127.0.0.1:{port}{wire.PATH}"]
        output = stage.children.run("wrk", argv, seconds + 30, BENCH_BODY_FILE=str(file))
    else:
        argv = [sys.executable, BENCH / "load.py", port, callers, requests, seconds, file]
        output = stage.children.run("load", argv, (seconds or 120) + 30)
    return dict(json.loads(output.strip().splitlines()[-1]))


def load_rows(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    upstream = stage.upstream()
    runs: dict[str, list[dict[str, Any]]] = {}
    with stage.stood_up(upstream, PEERS) as peers:
        for _ in range(sizes.load_rounds):
            for name, child in peers.items():
                runs.setdefault(name, []).append(one_load(stage, child.port, 32, sizes.load_seconds))
    stage.children.end(upstream)
    return {
        name: {
            "per_second": statistics.median(run["per_second"] for run in seen),
            "p50_ms": statistics.median(run["p50_ms"] for run in seen),
            "p99_ms": statistics.median(run["p99_ms"] for run in seen),
            "errors": sum(run["errors"] for run in seen),
        }
        for name, seen in runs.items()
    }


def one_stream_run(stage: Stage, child: Child, streams: int, seconds: float, again: bool = True) -> dict[str, Any]:
    """So many streams of 20 events a second; the child's memory while all of them are open."""
    chunks = int(seconds * 20)
    argv = [sys.executable, BENCH / "receive.py", child.port, streams, chunks, 0.05]
    receiver = stage.children.spawn("receive", argv, stdout=subprocess.PIPE)
    assert receiver.process.stdout
    try:
        line = receiver.process.stdout.readline()  # receive.py ends by itself at its own deadline, and so this does
        found: dict[str, Any] = {}
        if line.strip() == b"open":
            time.sleep(seconds / 2)
            found = memory(child)
            line = receiver.process.stdout.readline()
        try:
            found = {**json.loads(line), **found}
        except ValueError:
            raise BenchmarkError(f"receive.py: {receiver.log.read_text(errors='replace')[-800:]}") from None
    finally:
        stage.children.end(receiver)
    if found["counted"] < streams and again:
        # On a busy machine the first streams may end before the last one has begun.
        return one_stream_run(stage, child, streams, seconds * 4, again=False)
    return found


def stream_rows(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    upstream = stage.stream_upstream()
    found: dict[str, Any] = {"idle": {}, "50": {}, "200": {}, "500": {}}
    with stage.stood_up(upstream, COLUMNS) as peers:
        body = wire.prompt(1_000)
        for name, child in peers.items():
            for _ in range(10):  # what is loaded with the first request belongs to an idle process, too
                with wire.connect(child.port) as connection:
                    wire.exchange(connection, wire.request(child.port, body, TOKEN))
            found["idle"][name] = memory(child)
        runs: dict[str, list[dict[str, Any]]] = {}
        for number in range(sizes.stream_rounds):
            for name, child in peers.items():
                if number == 0 or name not in ("early", "installed"):
                    runs.setdefault(name, []).append(one_stream_run(stage, child, 50, sizes.stream_seconds, name != "early"))
        for name, seen in runs.items():
            found["50"][name] = together = {}
            for key in seen[0]:
                values = [run[key] for run in seen if run.get(key) is not None]
                total = sum if key in ("lost", "errors", "counted") else statistics.median
                together[key] = total(values) if values else None
            for key in ("RssAnon", "VmRSS"):
                if key in seen[0]:
                    found["50"][name][key] = seen[0][key]  # the first: later ones stand on what earlier ones left
        for name in (name for name in sizes.many_peers if name in peers):
            if name != "direct":
                found["200"][name] = one_stream_run(stage, peers[name], 200, 1.0)
            found["500"][name] = one_stream_run(stage, peers[name], 500, sizes.many_seconds)
    stage.children.end(upstream)
    return found


def start_rows(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """From the start of the process to its first 200; another port is asked each time, so nobody else can answer."""
    upstream = stage.upstream()
    if "installed" in stage.peers:
        stage.installed()  # that is no part of any start
    times: dict[str, list[float]] = {}
    for number in range(max(sizes.starts.values())):
        for name in COLUMNS[1:]:
            if name not in stage.peers or number >= sizes.starts[name]:
                continue
            begun = time.perf_counter()
            child = stage.peer(name, upstream.port)
            with wire.connect(child.port) as connection:
                connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{child.port}\r\n\r\n".encode())
                answer = connection.recv(4096)
            times.setdefault(name, []).append((time.perf_counter() - begun) * 1000)
            stage.children.end(child)
            if not answer.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
                raise BenchmarkError(f"{name}: /healthz answered {answer[:100]!r}")
    stage.children.end(upstream)
    return {name: {"ms": statistics.median(seen), "worst_ms": max(seen)} for name, seen in times.items()}


def idle_rows(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    upstream = stage.upstream()
    found = {}
    with stage.stood_up(upstream, ("nginx", "aiohttp", "broker")) as peers:
        for child in peers.values():
            with wire.connect(child.port) as connection:
                for _ in range(20):
                    wire.exchange(connection, wire.request(child.port, wire.prompt(1_000), TOKEN))
        time.sleep(1.0)
        before = {name: cpu_and_wakeups(child.pid) for name, child in peers.items()}
        time.sleep(sizes.idle_seconds)
        for name, child in peers.items():
            start, end = before[name], cpu_and_wakeups(child.pid)
            if start and end:
                found[name] = {
                    "cpu_percent": (end[0] - start[0]) / sizes.idle_seconds * 100,
                    "wakeups_per_second": (end[1] - start[1]) / sizes.idle_seconds,
                }
    stage.children.end(upstream)
    return found


def growth_rows(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    upstream = stage.upstream()
    found: dict[str, Any] = {}
    with stage.stood_up(upstream, ("broker",)) as peers:
        for broker in peers.values():
            errors = one_load(stage, broker.port, 32, 0, 1_000)["errors"]
            few = memory(broker)
            errors += one_load(stage, broker.port, 32, 0, sizes.growth_requests - 1_000)["errors"]
            many = memory(broker)
            if few and many:
                found = {
                    "after_1000": few,
                    "after_many": many,
                    "requests": sizes.growth_requests,
                    "grown_mb": many["RssAnon"] - few["RssAnon"],
                    "errors": errors,
                }
    stage.children.end(upstream)
    return found


def cost_rows(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """What a long allowlist, a big log and many idle callers add to one request: brokers side by side, in turns."""
    if "broker" not in stage.peers:
        return {}
    upstream = stage.upstream()
    brokers = {
        "plain": stage.broker(upstream.port),
        "100 rules": stage.broker(upstream.port, rules=100),
        "100 MB log": stage.broker(upstream.port, log_bytes=100_000_000),
        "500 idle connections": stage.broker(upstream.port),
    }
    idle = [wire.connect(brokers["500 idle connections"].port) for _ in range(500)]
    ports = {name: child.port for name, child in brokers.items()}
    found = in_turns(ports, wire.prompt(1_000), sizes.cost_rounds, sizes.small)
    for connection in idle:
        connection.close()
    stage.children.end(*brokers.values(), upstream)
    return found


def limits_rows(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """What clients with every kind of limit add to one request, beside the short form, in turns."""
    if "broker" not in stage.peers or not stage.knows_limits("limits"):
        return {}
    upstream = stage.upstream()
    brokers = {
        "short form": stage.broker(upstream.port),
        "1 client": stage.broker(upstream.port, clients=1),
        "100 clients": stage.broker(upstream.port, clients=100, rules=100),
    }
    ports = {name: child.port for name, child in brokers.items()}
    found = in_turns(ports, wire.prompt(1_000), sizes.rounds, sizes.small)
    for numbers in found.values():
        numbers["added_p50_ms"] = numbers["p50_ms"] - found["short form"]["p50_ms"]
    stage.children.end(*brokers.values(), upstream)
    return found


def write_ledger(log: Path, lines: int) -> None:
    """The `request` and `response` that the broker wrote of one request, under other ids, until there are so many."""
    events = [line for line in log.read_text().splitlines(True) if json.loads(line)["event"] in ("request", "response")]
    (number,) = {json.loads(line)["id"] for line in events}
    pair = "".join(events)
    with open(log, "a") as file:
        for other in range(lines // len(events)):
            file.write(pair.replace(number, f"{other:0{len(number)}d}"))


def ledger_rows(stage: Stage, sizes: Sizes) -> dict[str, Any]:
    """A start with a long event log of today that has to be read because a client has tokens_per_day."""
    if "broker" not in stage.peers or not stage.knows_limits("ledger"):
        return {}
    upstream = stage.upstream()
    config = stage.broker_config(upstream.port, clients=1)
    found: dict[str, Any] = {}
    for name in ("empty", "long"):
        times = []
        for _ in range(sizes.ledger_starts):
            begun = time.perf_counter()
            child = stage.broker_on(config)
            with wire.connect(child.port) as connection:
                head = f"Host: 127.0.0.1:{child.port}\r\n{wire.TOKEN_HEADER}: {TOKEN}\r\n\r\n"
                status, answer = wire.exchange(connection, f"GET /broker HTTP/1.1\r\n{head}".encode())
                times.append((time.perf_counter() - begun) * 1000)
                if name == "empty" and len(times) == 1:  # what the long log is made of
                    wire.exchange(connection, wire.request(child.port, wire.prompt(1_000), TOKEN))
            found[name] = {"ms": statistics.median(times), **memory(child)}
            stage.children.end(child)
        if name == "empty":
            write_ledger(config.parent / "events.jsonl", LEDGER_LINES)
    used = BUDGET - json.loads(answer)["left"]["tokens_per_day"] if status == 200 else 0
    expected = json.loads(wire.COMPLETION)["usage"]["total_tokens"] * (LEDGER_LINES // 2 + 1)
    if used != expected:  # a start is quick that doesn't read it
        raise BenchmarkError(f"the ledger says that {used} tokens are used, and not {expected}")
    stage.children.end(upstream)
    return found


MEASURES = {
    "latency": latency_rows,
    "load": load_rows,
    "streams": stream_rows,
    "start": start_rows,
    "limits": limits_rows,
    "ledger": ledger_rows,
    "idle": idle_rows,
    "growth": growth_rows,
    "cost": cost_rows,
}


# ---------------------------------------------------------------------------------------------------------------------
# Saying it
# ---------------------------------------------------------------------------------------------------------------------


def dig(found: Any, *keys: str) -> Any:
    """found[a][b][c], or None where anything on the way was not measured."""
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found


def table_lines(found: dict[str, Any]) -> list[list[str]]:
    """The table: a row's name, then a cell for each of COLUMNS."""

    def row(name: str, form: str, *keys: str) -> list[str]:
        *path, last = keys
        values = [dig(found, *path, peer, last) for peer in COLUMNS]
        return [name] + ["-" if value is None else format(value, form) for value in values]

    lines = [["", *COLUMNS]]
    for size in ("1 kB", "400 kB", "2 MB"):
        lines.append(row(f"{size} prompt, p50, ms", ".3f", "latency", size, "p50_ms"))
        lines.append(row("  added p50, ms", ".3f", "latency", size, "added_p50_ms"))
        lines.append(row("  added p99, ms", ".3f", "latency", size, "added_p99_ms"))
        loads = dig(found, "latency", size, "json.loads", "p50_ms")
        if loads is not None:
            lines.append([f"  (json.loads of it: {loads:.3f} ms)"])
    lines.append(row("32 callers, requests/s", ",.0f", "load", "per_second"))
    lines.append(row("  p50, ms", ".2f", "load", "p50_ms"))
    lines.append(row("  p99, ms", ".2f", "load", "p99_ms"))
    lines.append(row("  errors", "d", "load", "errors"))
    for streams in ("50", "500"):
        lines.append(row(f"{streams} streams, delay of a chunk, p50, ms", ".2f", "streams", streams, "p50_ms"))
        lines.append(row("  p99, ms", ".2f", "streams", streams, "p99_ms"))
        lines.append(row("  worst, ms", ".1f", "streams", streams, "max_ms"))
        lines.append(row("  chunks lost", "d", "streams", streams, "lost"))
        lines.append(row("  errors", "d", "streams", streams, "errors"))
    for streams in ("idle", "50", "200", "500"):
        title = "memory idle, RssAnon, MB" if streams == "idle" else f"  with {streams} streams"
        lines.append(row(title, ".1f", "streams", streams, "RssAnon"))
    lines.append(row("memory idle, VmRSS, MB", ".1f", "streams", "idle", "VmRSS"))
    lines.append(row("  with 50 streams", ".1f", "streams", "50", "VmRSS"))
    lines.append(row("start to first answer, ms", ".0f", "start", "ms"))
    lines.append(row("idle, processor, %", ".2f", "idle", "cpu_percent"))
    lines.append(row("idle, wake-ups a second", ".1f", "idle", "wakeups_per_second"))
    for line in lines:
        if "streams" in found and line[0].startswith(("memory", "  with")):
            line[1] = "-"  # the upstream's own memory would stand there, and is nobody's business
    return [line for line in lines if any(cell != "-" for cell in line[1:]) or len(line) == 1]


def further_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    growth = found.get("growth")
    if growth:
        lines.append(
            f"memory after 1,000 requests {growth['after_1000']['RssAnon']:.2f} MB, "
            f"after {growth['requests']:,}: {growth['after_many']['RssAnon']:.2f} MB, errors {growth['errors']}"
        )
    for name, numbers in (found.get("limits") or {}).items():
        if name != "short form":
            lines.append(f"limits of {name}: {numbers['added_p50_ms'] * 1000:+.0f} us a request, beside the short form")
    if found.get("ledger"):
        long, empty = found["ledger"]["long"], found["ledger"]["empty"]
        megabytes = f", {long['RssAnon']:.1f} MB (without: {empty['RssAnon']:.1f} MB)" if "RssAnon" in long else ""
        starts = f"{long['ms']:.0f} ms (without: {empty['ms']:.0f} ms)"
        lines.append(f"start with {LEDGER_LINES:,} lines of log: {starts}{megabytes}")
    plain = dig(found, "cost", "plain", "p50_ms")
    for name, numbers in (found.get("cost") or {}).items():
        if name != "plain":
            lines.append(f"p50 with {name}: {numbers['p50_ms']:.3f} ms (without: {plain:.3f} ms)")
    return lines


def aims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each aim that this run can judge: the number, its limit and where the limit comes from."""
    judged: list[dict[str, Any]] = []

    def judge(
        row: str, name: str, value: Any, limit: Any, source: str, at_least: bool = False, gated: bool = True
    ) -> None:
        if value is None or limit is None:
            return
        met = value >= limit if at_least else value <= limit
        worse = (value < limit / 3) if at_least else (value > limit * 3)
        sign = ">=" if at_least else "<="
        judged.append({"row": row, "name": name, "value": value, "sign": sign, "limit": limit, "source": source})
        judged[-1].update(met=met, worse=worse and gated)

    def times(value: Any, factor: float, plus: float = 0.0) -> Any:
        return None if value is None else value * factor + plus

    def added(size: str, peer: str) -> Any:
        return dig(found, "latency", size, peer, "added_p50_ms")

    def peer(name: str, *keys: str) -> Any:
        """found[a][b][name][c]"""
        return dig(found, *keys[:-1], name, keys[-1])

    for size in ("1 kB", "400 kB"):
        # A long prompt is parsed here and not by the proxy by hand: what that takes is the machine's, so it gates nothing.
        judge(
            "latency", f"added p50, {size}, ms", added(size, "broker"), added(size, "aiohttp"), "aiohttp", gated=size == "1 kB"
        )
        judge("latency", f"errors, {size}", peer("broker", "latency", size, "errors"), 0, "none")
    rate = peer("broker", "load", "per_second")
    limit = times(peer("aiohttp", "load", "per_second"), 0.6)
    judge("load", "32 callers, requests/s", rate, limit, "0.6 x aiohttp", at_least=True)
    # For scale only: the early scripts of this world differ among themselves by more than a gate could allow.
    limit = times(peer("early", "load", "per_second"), 5)
    judge("load", "32 callers, requests/s", rate, limit, "5 x early, for scale", at_least=True, gated=False)
    tail = times(peer("aiohttp", "load", "p99_ms"), 1.5)
    judge("load", "32 callers, p99, ms", peer("broker", "load", "p99_ms"), tail, "1.5 x aiohttp")
    judge("load", "32 callers, errors", peer("broker", "load", "errors"), 0, "none")
    delay = peer("aiohttp", "streams", "50", "p99_ms")
    judge("streams", "50 streams, p99, ms", peer("broker", "streams", "50", "p99_ms"), delay, "aiohttp")
    # Fixed limits in milliseconds are for a quiet machine of two cores; a gate for every machine they are not.
    judge("streams", "500 streams, p99, ms", peer("broker", "streams", "500", "p99_ms"), 50.0, "fixed", gated=False)
    for streams in ("50", "500"):
        judge("streams", f"{streams} streams, lost", peer("broker", "streams", streams, "lost"), 0, "none")
        judge("streams", f"{streams} streams, errors", peer("broker", "streams", streams, "errors"), 0, "none")
    idle, many = (peer("broker", "streams", key, "RssAnon") for key in ("idle", "500"))
    if idle is not None and many is not None:
        judge("streams", "500 streams, MB a stream", (many - idle) / 500, 0.08, "fixed")
    judge("streams", "memory idle, MB", idle, 24.0, "fixed")
    judge("streams", "memory with 50 streams, MB", peer("broker", "streams", "50", "RssAnon"), 32.0, "fixed")
    judge("streams", "memory idle, installed, MB", peer("installed", "streams", "idle", "RssAnon"), 16.0, "fixed")
    judge("start", "start to first answer, ms", peer("broker", "start", "ms"), peer("aiohttp", "start", "ms"), "aiohttp")
    judge("start", "the same, installed, ms", peer("installed", "start", "ms"), 120.0, "fixed", gated=False)
    for name in ("1 client", "100 clients"):
        judge("limits", f"limits of {name}, ms", peer(name, "limits", "added_p50_ms"), 0.05, "fixed", gated=False)
    judge("ledger", "start with a long log, ms", peer("long", "ledger", "ms"), 2000.0, "fixed", gated=False)
    return judged


def print_report(found: dict[str, Any], stage: Stage) -> list[dict[str, Any]]:
    lines = table_lines(found)
    width = max(len(line[0]) for line in lines)
    print()
    for line in lines:
        print(line[0].ljust(width) + "".join(cell.rjust(12) for cell in line[1:]))
    print()
    for text in further_lines(found):
        print(text)
    judged = aims(found)
    if judged:
        print("\n" + "aim".ljust(32) + "broker".rjust(10) + "limit".rjust(10) + "   ")
        for aim in judged:
            word = "met" if aim["met"] else "WORSE THAN 3 x" if aim["worse"] else "missed"
            value, limit = (format(aim[key], ",.0f" if aim[key] >= 1000 else ".3f") for key in ("value", "limit"))
            print(f"{aim['name']:<32}{value:>10}{aim['sign']:>3}{limit:>9}  {word:<15} ({aim['source']})")
    for text in stage.missing:
        print("left out: " + text)
    return judged


# ---------------------------------------------------------------------------------------------------------------------
# Where the time goes
# ---------------------------------------------------------------------------------------------------------------------


def print_profile(stage: Stage, quick: bool) -> dict[str, Any]:
    """Processor time of each function of broker.py, a request: the broker runs with a stop-watch around each."""
    upstream = stage.upstream()
    report: dict[str, Any] = {}
    for label, size, count in (("1 kB", 1_000, 3_000), ("400 kB", 400_000, 300)):
        count = count // 3 if quick else count
        result = stage.folder / f"profile-{size}.json"
        program = [sys.executable, BENCH / "profiled_broker.py", BROKER, result]
        broker = stage.broker(upstream.port, program=program)
        request = wire.request(broker.port, wire.prompt(size), TOKEN)
        for number, sign in ((80, "start"), (count, "stop")):  # the first 80 load and connect: not counted
            with wire.connect(broker.port) as connection:
                for _ in range(number):
                    status, answer = wire.exchange(connection, request)
                    if status != 200:
                        raise BenchmarkError(f"the broker answered {status}: {answer[:300]!r}")
            time.sleep(0.2)  # until the connection's thread has ended, and its own row with it
            mark = Path(f"{result}.{sign}")
            mark.touch()
            deadline = time.monotonic() + 10
            while mark.exists():
                if time.monotonic() > deadline or broker.process.poll() is not None:
                    raise BenchmarkError(f"no profile: {broker.log.read_text(errors='replace')[-800:]}")
                time.sleep(0.01)
        stage.children.end(broker)
        rows = json.loads(result.read_text())
        report[label] = rows
        print(f"\n{label} prompt, {count} requests on one connection; processor time in microseconds a request")
        print("(the stop-watch itself is in it, about 1 us a call; waiting is not)\n")
        print(f"{'self':>8}{'with callees':>14}{'calls':>8}  function")
        for row in rows[:45]:
            own, whole, calls = (row[key] / count for key in ("self_us", "total_us", "calls"))
            if own >= 0.05 or whole >= 1:
                print(f"{own:8.1f}{whole:14.1f}{calls:8.2f}  {row['name']}")
        print(f"{sum(row['self_us'] for row in rows) / count:8.1f}  all together")
    stage.children.end(upstream)
    return report


# ---------------------------------------------------------------------------------------------------------------------


def measure(rows: list[str], found: dict[str, Any], stage: Stage, sizes: Sizes) -> None:
    for row in rows:
        begun = time.monotonic()
        print(f"measuring: {row} ...", end=" ", file=sys.stderr, flush=True)
        found[row] = MEASURES[row](stage, sizes)
        print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures the broker beside nginx and a proxy written with aiohttp.")
    parser.add_argument("--quick", action="store_true", help="fewer samples; a minute or so")
    parser.add_argument("--gate", action="store_true", help="exit 1 if a row is worse than three times its aim")
    parser.add_argument("--profile", action="store_true", help="where a request's time goes in the broker")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--rows", help="only these: " + ",".join(ROWS))
    options = parser.parse_args(argv)
    wanted = options.rows.split(",") if options.rows else JUDGED_ROWS if options.gate else ROWS
    if set(wanted) - set(ROWS):
        parser.error("--rows knows " + ", ".join(ROWS))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise_descriptor_limit()
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as name:
        folder = Path(os.path.realpath(name))
        children = Children(folder)
        stage = Stage(children, folder)
        load_average = f", load average {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
        print(f"Python {platform.python_version()}, {os.cpu_count()} processors{load_average}, {platform.platform()}")
        if load_average and os.getloadavg()[0] > 0.5:
            print("the machine has other things to do just now: the absolute numbers are too high, the ratios less so")
        found: dict[str, Any] = {}
        judged: list[dict[str, Any]] = []
        try:
            if options.profile:
                found["profile"] = print_profile(stage, options.quick)
            else:
                measure([row for row in ROWS if row in wanted], found, stage, Sizes(options.quick))
                judged = print_report(found, stage)
                suspects = {aim["row"] for aim in judged if aim["worse"]}
                if options.gate and suspects:
                    # One bad moment of the machine must not turn a gate red: what is bad is bad twice.
                    measure([row for row in ROWS if row in suspects], found, stage, Sizes(options.quick))
                    judged = print_report(found, stage)
        except BenchmarkError as error:
            print(f"\nbenchmark: error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        finally:
            children.end_all()
        if options.json:
            Path(options.json).write_text(json.dumps({"measured": found, "aims": judged}, indent=1) + "\n")
        if options.gate and any(aim["worse"] for aim in judged):
            print("benchmark: a row is worse than three times its aim", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
