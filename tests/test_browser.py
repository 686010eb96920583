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
    """One browser for all pages of a class: a start of it takes longer than all that a page does."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if not browser_works():
            raise unittest.SkipTest("Chromium does not start here")

    @classmethod
    def browse(cls, *urls, mapping=()):
        """Show pages, several each in a window of its own, where these names lead to these addresses; the browser, and
        all that it started, ends with the class."""
        url, rules = urls[0], ", ".join(f"MAP {name} {address}" for name, address in mapping)
        if len(urls) > 1:
            site = cls.class_site()
            site.content = b"<script>for (const url of %b) open(url, '_blank', 'noopener')</script>" % json.dumps(urls).encode()
            url = f"http://127.0.0.1:{site.port}/page"
        cls.addClassCleanup(end_browser, *start_browser(url, *[f"--host-resolver-rules={rules}"] * bool(rules)))

    @classmethod
    def class_site(cls):
        site = Site()
        cls.addClassCleanup(site.stop)
        return site

    def report_of(self, site):
        try:
            return site.reports.get(timeout=60)
        except queue.Empty:
            raise AssertionError("the page did not report") from None

    def denied(self, broker):
        """The reasons for all that was refused, of which there is something."""
        return {event["reason"] for event in eventually(lambda: broker.events("denied"))}


class HostilePage(BrowserCase):
    """The browser is led from one page to the next; each attacks something else, and reports to its own site."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.unguarded = Unguarded()
        cls.addClassCleanup(cls.unguarded.stop)
        cls.stubs, cls.brokers_of, cls.sites = {}, {}, {}
        for name in ("a file", "another port", "another site", "localhost", "another name"):
            cls.stubs[name] = cls.class_stub()
            config = {} if name == "another port" else TOKENLESS
            cls.brokers_of[name] = cls.class_broker(cls.stubs[name], config=config)
        env = {"BROKER_TEST_TOKEN": ABSENT}
        cls.brokers_of["dry-run"] = cls.class_broker(dry_run=True, config=TOKENLESS, env=env)
        cls.show(
            [
                # A page of the net may not lead to one of the disk, so that one is the first.
                ("a file", None, "127.0.0.1", ""),
                ("no guard", "127.0.0.1", "127.0.0.1", "token-of-the-control"),
                ("another port", "127.0.0.1", "127.0.0.1", cls.brokers_of["another port"].token),
                ("another site", "localhost", "127.0.0.1", ""),
                ("localhost", "localhost", "localhost", ""),
                ("dry-run", "127.0.0.1", "127.0.0.1", ""),
                ("another name", "evil.test", "evil.test", ""),
            ]
        )

    @classmethod
    def show(cls, pages):
        """Each of (case, host of the page, host that it attacks, token that it knows)."""
        leads_to = None
        for case, host, attacked, token in reversed(pages):
            site = cls.sites[case] = cls.class_site()
            target = f"http://{attacked}:{cls.brokers_of.get(case, cls.unguarded).port}"
            values = {"target": target, "report": site.report, "token": token, "only": None, "next": leads_to}
            site.content = page("attack.html", **values)
            leads_to = f"http://{host}:{site.port}/page"
        file = Path(cls.class_folder()) / "page.html"
        file.write_bytes(site.content)
        cls.browse(file.as_uri(), mapping=[("evil.test", "127.0.0.1")])

    def attack(self, case):
        """What the page could do, by the name of the way."""
        report = self.report_of(self.sites[case])
        return {result["name"]: result for result in report["results"]}, report["sizes"]

    def test_finds_that_every_way_is_a_way_where_nobody_stands_guard(self):
        """The control: what the page tries does arrive, and is readable."""
        ways, _ = self.attack("no guard")
        arrived = set(self.unguarded.attempts)
        self.assertEqual(set(ways) - arrived, STOPPED_BY_THE_BROWSER)
        readable = {name for name, way in ways.items() if "readable" in way["read"]}
        self.assertLess({"fetch-cors-get", "fetch-preflight-token", "xhr-post", "worker", "sandbox-cors"}, readable)

    def assert_nothing_happens(self, case, reason="browser_not_allowed"):
        broker, stub = self.brokers_of[case], self.stubs[case]
        self.assert_nothing_is_read(case)
        self.assertEqual(stub.requests, [])
        self.assertEqual(stub.connections, 0)
        self.assertEqual([event for event in broker.events() if event["event"] in ("request", "response")], [])
        self.assertEqual(self.denied(broker), {reason})

    def assert_nothing_is_read(self, case):
        ways, sizes = self.attack(case)
        for name, way in ways.items():
            self.assertEqual(way["read"], "", name)
        for name, *numbers in sizes:
            self.assertFalse(any(numbers), (name, numbers))
        self.assertGreater(len(ways), 50)

    def assert_a_program_gets_through(self, case, token=True):
        """The control: the same request, not made by a page."""
        body = {"model": "gpt-test", "messages": [{"role": "user", "content": "hello"}]}
        answer = self.brokers_of[case].post_json("/v1/chat/completions", body, token=token)
        self.assertEqual(answer.status, 200)
        self.assertEqual(len(self.stubs[case].requests), 1)

    def test_of_another_port_that_knows_the_token(self):
        self.assert_nothing_happens("another port")
        self.assert_a_program_gets_through("another port")

    def test_of_another_site_where_no_token_is_asked_for(self):
        self.assert_nothing_happens("another site")
        self.assert_a_program_gets_through("another site", token=False)

    def test_that_calls_it_localhost(self):
        self.assert_nothing_happens("localhost")

    def test_opened_from_a_file(self):
        self.assert_nothing_happens("a file")

    def test_that_calls_it_by_another_name_for_this_machine(self):
        """A name that always meant this machine: another origin, so the browser also says that a page asks."""
        self.assert_nothing_happens("another name", "host_not_allowed")

    def test_is_told_nothing_by_a_dry_run(self):
        self.assert_nothing_is_read("dry-run")
        self.assertEqual(self.brokers_of["dry-run"].events("request"), [])


class VisitorLedToTheBroker(BrowserCase):
    WAYS = ("location", "link", "form")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.stub_of_all = cls.class_stub()
        cls.brokers_of = {way: cls.class_broker(cls.stub_of_all, config=TOKENLESS) for way in (*cls.WAYS, "typed")}
        cls.browse(cls.brokers_of["typed"].url + "/v1/models")
        urls = []
        for way in cls.WAYS:
            site = cls.class_site()
            site.content = page("navigate.html", target=cls.brokers_of[way].url, way=way)
            urls.append(f"http://localhost:{site.port}/page")
        cls.browse(*urls)

    def assert_refused_to(self, way, method, path):
        denied = self.brokers_of[way].wait_event(event="denied", path=path, timeout=30)
        self.assertEqual((denied["status"], denied["reason"]), (403, "browser_not_allowed"))
        self.assertEqual(denied["method"], method)
        self.assertEqual(self.stub_of_all.connections, 0)

    def test_top_level_navigation_is_refused(self):
        for way in self.WAYS:
            with self.subTest(way):
                self.assert_refused_to(way, "POST" if way == "form" else "GET", "/v1/chat/completions")

    def test_an_address_typed_into_the_browser_is_refused_too(self):
        self.assert_refused_to("typed", "GET", "/v1/models")


class NameThatCameToMeanThisMachine(BrowserCase):
    """DNS rebinding: the browser takes the broker for the page's own server."""

    CASES = (("evil.test", None), ("without-token.evil.test", TOKENLESS), ("localhost.evil.test", TOKENLESS))

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.stub_of_all, cls.rebound, urls = cls.class_stub(), {}, []
        for name, config in cls.CASES:
            site, broker = cls.class_site(), cls.class_broker(cls.stub_of_all, config=config)
            cls.rebound[name] = site, broker
            try:
                server = Rebinding(broker.port, page("rebound.html", report=site.report, token=broker.token))
            except OSError:
                raise unittest.SkipTest("this machine has no 127.0.0.2") from None
            cls.addClassCleanup(server.stop)
            urls.append(f"http://{name}:{broker.port}/page")
        cls.browse(*urls, mapping=[(name, "127.0.0.2") for name in cls.rebound])

    def test_every_request_is_refused_by_its_host(self):
        for name, (site, broker) in self.rebound.items():
            with self.subTest(name):
                results = self.report_of(site)["results"]
                self.assertEqual(len(results), 6)
                for result in results:
                    self.assertEqual((result.get("status"), result.get("code")), (403, "host_not_allowed"), result)
                self.assertEqual(self.stub_of_all.connections, 0)
                self.assertEqual(broker.events("request"), [])
                self.assertEqual(self.denied(broker), {"host_not_allowed"})


if __name__ == "__main__":
    unittest.main()
