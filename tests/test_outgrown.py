"""What the README says of moving on: its nginx configuration is started as it stands (port, provider, tokens and key
aside) and gets the same calls as the broker beside it. What it keeps is shown by equal answers; of each row of the
table of losses it is shown that nginx does not do it.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import unittest

from tests.support import (
    BrokerTestCase,
    Puppet,
    canary,
    eventually,
    free_port,
    fresh_token,
    linux_only,
    minimal_environment,
)
from tests.support.upstream import CA_FILE
from tests.test_readme import blocks, rows

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
MODEL = b'{"model":"m","messages":[]}'


class Nginx:
    """The README's configuration, served by one nginx in a folder of its own; `more` replaces parts of it."""

    def __init__(self, case, stub, more=()):
        self.folder = case.folder()
        self.key, self.token, self.port = canary(), fresh_token(), free_port()
        (text,) = blocks("nginx")
        changes = {
            "8791": str(self.port),
            "https://api.openai.com": stub.url,
            "/etc/ssl/certs/ca-certificates.crt": CA_FILE,
            "PROVIDER-KEY": self.key,
            "TOKEN-OF-ALICE": self.token,
            "http {": "http { " + " ".join(f"{name}_temp_path {name};" for name in TEMPORARY),
            **dict(more),
        }
        for words, others in changes.items():
            assert words in text, f"the README's nginx configuration has no {words!r}"
            text = text.replace(words, others)
        self.path = os.path.join(self.folder, "nginx.conf")
        self.write(text)
        options = f"daemon off; master_process off; pid {self.folder}/nginx.pid;"
        self.argv = [NGINX, "-p", self.folder, "-c", self.path, "-e", "stderr", "-g", options]
        self.process = subprocess.Popen(
            self.argv,
            env=minimal_environment({}),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        case.addCleanup(self.close)
        eventually(self.answers, what="nginx")

    def write(self, text):
        with open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)

    def read(self, name):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self.folder, name), encoding="utf-8") as file:
            return file.read()
        return ""

    def answers(self):
        if self.process.poll() is not None:
            raise AssertionError("nginx ended: " + self.process.stderr.read().decode())
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True

    def close(self):
        self.process.kill()
        self.process.wait(10)
        self.process.stderr.close()


TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def ask(port, token, method="POST", path=CHAT, headers=JSON, body=MODEL, stream=False):
    """The status, the headers and the body of an answer; with `stream` the answer itself and its connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, path, body if method == "POST" else None, {**authorization, **headers})
        answer = connection.getresponse()
        if stream:
            return answer, connection
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        if not stream:
            connection.close()


@linux_only
@unittest.skipUnless(NGINX, "nginx is not installed")
class Outgrown(BrokerTestCase):
    def setUp(self):
        super().setUp()
        self.upstream = self.stub(tls=True)

    def nginx(self, **more):
        return Nginx(self, self.upstream, more.items())

    def sent(self, status=200, **call):
        """Asks nginx; what the upstream got."""
        before = len(self.upstream.requests)
        self.assertEqual(ask(self.served.port, self.served.token, **call)[0], status)
        self.assertEqual(len(self.upstream.requests), before + 1)
        return self.upstream.requests[-1]


class Kept(Outgrown):
    CALLS = {
        "the call": (200, {}),
        "another listed one": (200, {"method": "GET", "path": "/v1/models"}),
        "a path that nobody listed": (403, {"method": "GET", "path": "/v1/files"}),
        "the same in another case": (403, {"path": "/V1/chat/completions"}),
        "a listed path by a detour": (403, {"path": "/v1/x/../chat/completions"}),
        "another method": (403, {"method": "DELETE"}),
        "a credential in the query": (403, {"path": CHAT + "?key=other"}),
        "33 MiB": (413, {"body": b" " * (33 << 20)}),
    }

    def test_calls_have_the_answers_that_the_broker_gives(self):
        served = self.nginx(**{"rate=20r/m": "rate=100r/s"})
        rules = {"allowed_paths": [CHAT, "GET /v1/models"]}
        beside = self.broker(self.upstream, config=rules)
        for name, (status, call) in self.CALLS.items():
            with self.subTest(name):
                self.assertEqual(ask(served.port, served.token, **call)[0], status)
                by_the_broker = ask(beside.port, beside.token, **call)[0]
                # What nginx can't tell apart is refused all the same.
                self.assertEqual({400: 403, 405: 403}.get(by_the_broker, by_the_broker), status)
        for token in ("", fresh_token(), served.token.swapcase(), served.token + "x", "x" + served.token):
            with self.subTest(token):
                self.assertEqual(ask(served.port, token)[0], 401)
                self.assertEqual(ask(beside.port, token)[0], 401)
        self.assertEqual(len(self.upstream.requests), 4)

    def test_caller_brings_no_authority(self):
        self.served = self.nginx()
        brought = {"Cookie": "a=1", "OpenAI-Organization": "mine", "x-api-key": "mine", "X-Forwarded-For": "1.2.3.4"}
        request = self.sent(headers={**JSON, **brought, "Accept": "text/event-stream"})
        self.assertEqual(
            sorted(request.headers),
            [
                ("Accept", "text/event-stream"),
                ("Authorization", "Bearer " + self.served.key),
                ("Content-Length", str(len(MODEL))),
                ("Content-Type", "application/json"),
                ("Host", self.upstream.url.partition("//")[2]),
            ],
        )
        self.assertEqual(request.body, MODEL)

    def test_rate_is_each_clients_own(self):
        other = fresh_token()
        served = self.nginx(**{"TOKEN-OF-BOB": other})
        statuses = [ask(served.port, served.token)[0] for _ in range(7)]
        self.assertEqual(statuses, [200] * 6 + [429])
        self.assertEqual(ask(served.port, other)[0], 200)

    def test_log_says_who_asked_for_what_and_no_secret(self):
        served = self.nginx()
        ask(served.port, served.token)
        ask(served.port, served.token, path="/v1/files?key=" + served.key)
        ask(served.port, fresh_token())
        lines = eventually(lambda: served.read("calls.log").splitlines()[2:] and served.read("calls.log").splitlines())
        shown = [(line.split()[1:4], line.split(" ")[-1]) for line in lines]
        wanted = [(["200", "POST", CHAT], "alice"), (["403", "POST", "/v1/files"], "alice"), (["401", "POST", CHAT], "")]
        self.assertEqual(shown, wanted)
        self.assertNotIn(served.key, "".join(lines))
        self.assertNotIn(served.token, "".join(lines))

    def test_stream_arrives_as_it_comes_and_a_cut_one_is_not_whole(self):
        served, puppet = self.nginx(), Puppet(self.upstream)
        puppet.start_stream()
        puppet.chunk(b"data: 1\n\n")
        answer, connection = ask(served.port, served.token, stream=True)
        with contextlib.closing(connection), contextlib.closing(answer):
            self.assertEqual(answer.read1(100), b"data: 1\n\n")
            puppet.chunk(b"data: 2\n\n")
            self.assertEqual(answer.read1(100), b"data: 2\n\n")
            puppet.reset()
            with self.assertRaises(http.client.IncompleteRead):
                answer.read()

    def test_provider_with_a_wrong_certificate_gets_no_key(self):
        stub = self.stub(tls="self_signed")
        served = Nginx(self, stub)
        self.assertEqual(ask(served.port, served.token)[0], 502)
        self.assertEqual(stub.requests, [])


class Lost(Outgrown):
    """A method a row of the table, in its order."""

    def test_is_what_the_table_says(self):
        checks = [name for name in vars(Lost) if name.startswith("lose_")]
        table = [re.sub(r"\W+", "_", promise.lower()).strip("_") for promise, _ in rows("When you outgrow it", 2)]
        self.assertEqual(["lose_" + promise for promise in table], checks)
        for check in checks:
            with self.subTest(check):
                self.served = self.nginx()
                getattr(self, check)()
                self.served.close()

    def answered(self, status=200, headers=(), body=b"{}"):
        """What the caller gets of this answer of the provider's."""
        self.upstream.script(lambda conn, _: conn.respond(status, headers, body))
        return ask(self.served.port, self.served.token)

    def lose_strict_json(self):
        for body in (b'{"model":"cheap","model":"dear"}', b"no JSON"):
            self.assertEqual(self.sent(body=body).body, body)

    def lose_models(self):
        self.assertEqual(self.sent(body=b'{"model":"dear"}').json(), {"model": "dear"})

    def lose_tokens_per_day(self):
        self.sent(body=b'{"model":"m","max_tokens":1000000000}')
        self.assertEqual(self.answered(body=b'{"usage":{"total_tokens":1000000000}}')[0], 200)
        self.sent()

    def lose_secret_in_request(self):
        body = json.dumps({"messages": [self.served.key]}).encode()
        self.assertEqual(self.sent(body=body).body, body)

    def lose_redaction(self):
        _, headers, body = self.answered(headers={"X-Echo": self.served.key}, body=self.served.key.encode())
        self.assertEqual((headers["X-Echo"], body), (self.served.key, self.served.key.encode()))

    def lose_no_web_page_no_foreign_name(self):
        self.sent(headers={**JSON, "Origin": "https://evil.example"})
        self.sent(headers={**JSON, "Host": "evil.example"})

    def lose_log_before_sending(self):
        puppet = Puppet(self.upstream)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=10)) as connection:
            connection.request("POST", CHAT, MODEL, {**JSON, "Authorization": "Bearer " + self.served.token})
            puppet.wait()
            self.served.process.send_signal(signal.SIGKILL)
            self.served.process.wait(10)
        self.assertEqual(self.served.read("calls.log"), "")
        self.served = self.nginx(**{"access_log calls.log": "access_log /dev/full"})
        self.upstream.script(lambda conn, _: conn.respond_json({}))
        self.sent()

    def lose_models_and_tokens_in_the_log(self):
        self.answered(body=b'{"model":"gpt-x","usage":{"prompt_tokens":12345}}')
        line = eventually(lambda: self.served.read("calls.log"))
        self.assertNotRegex(line, "gpt-x|12345")

    def lose_vaults_and_rotation(self):
        self.served.write(self.served.read("nginx.conf").replace(self.served.key, canary()))
        self.assertEqual(self.answered(status=401)[0], 401)
        self.upstream.script(lambda conn, _: conn.respond_json({}))
        self.assertEqual(self.sent().header("Authorization"), "Bearer " + self.served.key)

    def lose_dry_run(self):
        test = subprocess.run([*self.served.argv, "-t"], capture_output=True, timeout=20)
        self.assertEqual(test.returncode, 0, test.stderr)
        self.sent()

    def lose_redirects(self):
        status, headers, _ = self.answered(307, {"Location": "https://evil.example/"})
        self.assertEqual((status, headers["Location"]), (307, "https://evil.example/"))

    def lose_clean_headers(self):
        _, headers, _ = self.answered(headers={"Access-Control-Allow-Origin": "*", "Set-Cookie": "a=1"})
        self.assertEqual(headers["Access-Control-Allow-Origin"], "*")
        self.assertNotIn("Set-Cookie", headers)
        self.assertNotIn("Content-Security-Policy", headers)

    def lose_refusals_with_a_mend(self):
        status, headers, body = ask(self.served.port, "")
        self.assertEqual((status, headers["Content-Type"]), (401, "text/html"))
        self.assertNotIn("x-should-retry", headers)
        self.assertNotIn(b"token", body)


if __name__ == "__main__":
    unittest.main()
