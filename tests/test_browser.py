"""A real browser shows a hostile page, and the page tries to use the key.

tests/browser/attack.html holds every way that a page has to send a request to a local port. First it is let loose on a
server without any guard, which shows that its ways are ways; then on the broker, with and without a caller token, where
nothing may reach the upstream and the page may read nothing. Skipped by name where Chromium is not installed.
"""

import contextlib
import functools
import http.server
import json
import os
import queue
import shutil
import signal
import socket
import socketserver
import subprocess
import tempfile
import threading
import unittest
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.support import ABSENT, ROOT, BrokerTestCase, eventually

PAGES = Path(ROOT) / "tests" / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-popup-blocking",
)

# A page can't cause these to be sent at all; the control shows that it's the browser that stops them.
STOPPED_BY_THE_BROWSER = {f"fetch-same-origin-{what}" for what in (
    "get", "post", "credentials", "keepalive", "health", "root", "head", "no-referrer", "no-store",
)}  # fmt: skip

TOKENLESS = {"client_token_env": None}


def page(name, **values):
    """A page of tests/browser, with its values."""
    text = (PAGES / name).read_text(encoding="utf-8")
    assert "/*VALUES*/ {}" in text
    return text.replace("/*VALUES*/ {}", json.dumps(values)).encode()


class Quiet(http.server.BaseHTTPRequestHandler):
    """Says nothing on stderr, and never tears down a test over a browser that has left."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(OSError):
            super().handle()

    def reply(self, body, content_type="text/html", status=200, headers=()):
        self.send_response(status)
        for header in [("Content-Type", content_type), ("Content-Length", str(len(body))), *headers]:
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


class LocalServer(http.server.ThreadingHTTPServer):
    """An http.server on a loopback port of its own, in a thread, with the connections it has open."""

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.port = self.server_address[1]
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def stop(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Site(LocalServer):
    """The page's own server: gives the page, takes what it reports."""

    # A browser that was killed leaves connections behind; they must not hold up the end of a test.
    block_on_close = False

    def __init__(self):
        self.content = b""
        self.reports = queue.Queue()
        site = self

        class Handler(Quiet):
            def do_GET(self):
                self.reply(site.content if urlsplit(self.path).path == "/page" else b"", headers=[CLOSE])

            def do_POST(self):
                site.reports.put(json.loads(self.body()))
                self.reply(b"", headers=[CLOSE])

        super().__init__(Handler)

    @property
    def report(self):
        return f"http://127.0.0.1:{self.port}/report"


CLOSE = ("Connection", "close")


class Unguarded(LocalServer):
    """A local server as they mostly are: answers everybody, and lets every page read the answer."""

    block_on_close = False

    def __init__(self):
        self.attempts = []
        unguarded = self

        class Handler(Quiet):
            def answer(self):
                body = self.body()
                query = urlsplit(self.path).query or body.decode("latin-1")
                unguarded.attempts += parse_qs(query).get("attempt", [])
                allow = [
                    ("Access-Control-Allow-Origin", self.headers.get("Origin") or "*"),
                    ("Access-Control-Allow-Credentials", "true"),
                    ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE"),
                    ("Access-Control-Allow-Headers", "content-type, authorization, x-broker-token"),
                    ("Timing-Allow-Origin", "*"),
                    CLOSE,
                ]
                self.reply(b'"readable"', "application/json", headers=allow)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = answer

        super().__init__(Handler)


class Rebinding(socketserver.ThreadingTCPServer):
    """What a browser sees of a name that changes its address between two requests: the first connection of its port
    brings the attacker's page, every later one ends at the broker. (The name itself can't change within one run of the
    browser, so it leads to 127.0.0.2, and from there on.)"""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, port, content):
        self.content = content
        super().__init__(("127.0.0.2", port), None)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def finish_request(self, request, client_address):
        with contextlib.suppress(OSError):
            request.settimeout(20)
            head = b""
            while b"\r\n\r\n" not in head:
                data = request.recv(65536)
                if not data:
                    return
                head += data
            if head.startswith(b"GET /page "):
                fields = f"Content-Type: text/html\r\nContent-Length: {len(self.content)}\r\nConnection: close"
                request.sendall(f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n".encode() + self.content)
                return
            with socket.create_connection(("127.0.0.1", self.server_address[1]), 10) as onward:
                onward.sendall(head)
                back = threading.Thread(target=self.pump, args=(onward, request), daemon=True)
                back.start()
                self.pump(request, onward)
                back.join(20)

    def pump(self, source, sink):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def handle_error(self, request, client_address):
        pass

    def stop(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


def start_browser(url, *flags, stdout=subprocess.DEVNULL):
    """The browser with a fresh profile, showing a page; the process and the profile's folder."""
    profile = tempfile.mkdtemp(prefix="broker-test-browser-")
    argv = [CHROMIUM, *FLAGS, *flags, "--user-data-dir=" + profile]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        argv.append("--no-sandbox")  # Chromium refuses to run as root with it
    browser = subprocess.Popen(
        [*argv, url],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": profile},
        start_new_session=True,
    )
    return browser, profile


def end_browser(browser, profile):
    # Its own session, so this ends its many children and nobody else.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(browser.pid, signal.SIGKILL)
    browser.kill()
    browser.wait(20)
    if browser.stdout:
        browser.stdout.close()
    for _ in range(20):
        shutil.rmtree(profile, ignore_errors=True)
        if not os.path.exists(profile):
            break


@functools.cache
def browser_works():
    """Installed is not enough: an ordinary user in a container may have no sandbox to start it in."""
    browser, profile = start_browser("data:text/html,<p>it works", "--dump-dom", stdout=subprocess.PIPE)
    try:
        return b"it works" in browser.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        return False
    finally:
        end_browser(browser, profile)


@unittest.skipUnless(CHROMIUM, "Chromium is not installed")
class BrowserCase(BrokerTestCase):
    def setUp(self):
        if not browser_works():
            self.skipTest("Chromium does not start here")

    def browse(self, url, *flags):
        """Show a page; the browser and all that it started end with the test."""
        self.addCleanup(end_browser, *start_browser(url, *flags))

    def site(self):
        site = Site()
        self.addCleanup(site.stop)
        return site

    def report_of(self, site):
        try:
            return site.reports.get(timeout=60)
        except queue.Empty:
            raise AssertionError("the page did not report") from None

    def attack(self, target, host="127.0.0.1", token="", scheme="http"):
        """What the page could do against `target`, by the name of the way."""
        site = self.site()
        site.content = page("attack.html", target=target, report=site.report, token=token, only=None)
        if scheme == "file":
            folder = Path(self.folder())
            (folder / "page.html").write_bytes(site.content)
            self.browse((folder / "page.html").as_uri())
        else:
            self.browse(f"http://{host}:{site.port}/page")
        report = self.report_of(site)
        return {result["name"]: result for result in report["results"]}, report["sizes"]


class PageBeforeAnUnguardedServer(BrowserCase):
    """The control: what the page tries does arrive, and is readable, where nobody stands guard."""

    def test_every_way_is_a_way(self):
        unguarded = Unguarded()
        self.addCleanup(unguarded.stop)
        ways, _ = self.attack(f"http://127.0.0.1:{unguarded.port}", token="token-of-the-control")
        arrived = set(unguarded.attempts)
        self.assertEqual(set(ways) - arrived, STOPPED_BY_THE_BROWSER)
        readable = {name for name, way in ways.items() if "readable" in way["read"]}
        self.assertLess({"fetch-cors-get", "fetch-preflight-token", "xhr-post", "worker", "sandbox-cors"}, readable)


class PageBeforeTheBroker(BrowserCase):
    def assert_nothing_happened(self, broker, stub, ways, sizes):
        for name, way in ways.items():
            self.assertEqual(way["read"], "", name)
        for name, *numbers in sizes:
            self.assertFalse(any(numbers), (name, numbers))
        self.assertGreater(len(ways), 50)
        self.assertEqual(stub.requests, [])
        self.assertEqual(stub.connections, 0)
        events = broker.events()
        self.assertEqual([event for event in events if event["event"] in ("request", "response")], [])
        reasons = {event["reason"] for event in events if event["event"] == "denied"}
        self.assertEqual(reasons, {"browser_not_allowed"})

    def assert_a_program_gets_through(self, broker, stub, token=True):
        """The control: the same request, not made by a page."""
        body = {"model": "gpt-test", "messages": [{"role": "user", "content": "hello"}]}
        answer = broker.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}, token=token
        )
        self.assertEqual(answer.status, 200)
        self.assertEqual(len(stub.requests), 1)

    def test_page_of_another_port_that_knows_the_token(self):
        stub = self.stub()
        broker = self.broker(stub)
        ways, sizes = self.attack(broker.url, token=broker.token)
        self.assert_nothing_happened(broker, stub, ways, sizes)
        self.assert_a_program_gets_through(broker, stub)

    def test_page_of_another_site_where_no_token_is_asked_for(self):
        stub = self.stub()
        broker = self.broker(stub, config=TOKENLESS)
        ways, sizes = self.attack(broker.url, host="localhost")
        self.assert_nothing_happened(broker, stub, ways, sizes)
        self.assert_a_program_gets_through(broker, stub, token=False)

    def test_page_that_calls_it_localhost(self):
        stub = self.stub()
        broker = self.broker(stub, config=TOKENLESS)
        ways, sizes = self.attack(f"http://localhost:{broker.port}", host="localhost")
        self.assert_nothing_happened(broker, stub, ways, sizes)

    def test_page_opened_from_a_file(self):
        stub = self.stub()
        broker = self.broker(stub, config=TOKENLESS)
        ways, sizes = self.attack(broker.url, scheme="file")
        self.assert_nothing_happened(broker, stub, ways, sizes)

    def test_dry_run_tells_a_page_nothing(self):
        broker = self.broker(dry_run=True, config=TOKENLESS, env={"BROKER_TEST_TOKEN": ABSENT})
        ways, sizes = self.attack(broker.url)
        for name, way in ways.items():
            self.assertEqual(way["read"], "", name)
        self.assertFalse(any(any(numbers) for _, *numbers in sizes))
        self.assertEqual([event for event in broker.events() if event["event"] == "request"], [])


class VisitorLedToTheBroker(BrowserCase):
    def test_top_level_navigation_is_refused(self):
        for way in ("location", "link", "form"):
            with self.subTest(way):
                stub = self.stub()
                broker = self.broker(stub, config=TOKENLESS)
                site = self.site()
                site.content = page("navigate.html", target=broker.url, way=way)
                self.browse(f"http://localhost:{site.port}/page")
                denied = broker.wait_event(event="denied", path="/v1/chat/completions", timeout=30)
                self.assertEqual((denied["status"], denied["reason"]), (403, "browser_not_allowed"))
                self.assertEqual(denied["method"], "POST" if way == "form" else "GET")
                self.assertEqual(stub.connections, 0)

    def test_an_address_typed_into_the_browser_is_refused_too(self):
        stub = self.stub()
        broker = self.broker(stub, config=TOKENLESS)
        self.browse(broker.url + "/v1/models")
        denied = broker.wait_event(event="denied", path="/v1/models", timeout=30)
        self.assertEqual((denied["status"], denied["reason"]), (403, "browser_not_allowed"))
        self.assertEqual(stub.connections, 0)


class NameThatCameToMeanThisMachine(BrowserCase):
    """DNS rebinding: the browser takes the broker for the page's own server."""

    def rebound(self, broker, name):
        site = self.site()
        content = page("rebound.html", report=site.report, token=broker.token)
        try:
            server = Rebinding(broker.port, content)
        except OSError:
            self.skipTest("this machine has no 127.0.0.2")
        self.addCleanup(server.stop)
        self.browse(f"http://{name}:{broker.port}/page", f"--host-resolver-rules=MAP {name} 127.0.0.2")
        return self.report_of(site)["results"]

    def test_every_request_is_refused_by_its_host(self):
        for name, config in (("evil.test", None), ("evil.test", TOKENLESS), ("localhost.evil.test", TOKENLESS)):
            with self.subTest(name, config=config):
                stub = self.stub()
                broker = self.broker(stub, config=config)
                results = self.rebound(broker, name)
                self.assertEqual(len(results), 6)
                for result in results:
                    self.assertEqual((result.get("status"), result.get("code")), (403, "host_not_allowed"), result)
                self.assertEqual(stub.connections, 0)
                self.assertEqual([event for event in broker.events() if event["event"] == "request"], [])
                denied = eventually(lambda broker=broker: [e for e in broker.events() if e["event"] == "denied"])
                self.assertEqual({event["reason"] for event in denied}, {"host_not_allowed"})

    def test_another_name_for_this_machine_is_refused_as_well(self):
        """A name that always meant this machine: another origin, so the browser also says that a page asks."""
        stub = self.stub()
        broker = self.broker(stub, config=TOKENLESS)
        site = self.site()
        target = f"http://evil.test:{broker.port}"
        site.content = page("attack.html", target=target, report=site.report, token="", only=None)
        self.browse(f"http://evil.test:{site.port}/page", "--host-resolver-rules=MAP evil.test 127.0.0.1")
        report = self.report_of(site)
        for way in report["results"]:
            self.assertEqual(way["read"], "", way)
        self.assertEqual(stub.connections, 0)
        reasons = {event["reason"] for event in broker.events() if event["event"] == "denied"}
        self.assertEqual(reasons, {"host_not_allowed"})


if __name__ == "__main__":
    unittest.main()
