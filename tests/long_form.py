"""Configurations with several upstreams and several clients, the environment that goes with them, and lines of a log."""

import datetime
import json

from tests.support import ABSENT, NOBODY, SECRET_VARIABLE, TOKEN_VARIABLE, BrokerTestCase, canary, fresh_token, run_each

CHAT = "/v1/chat/completions"
SHORT_UPSTREAM_KEYS = ("upstream_base_url", "allowed_paths", "secret_source", "auth_header", "auth_scheme", "extra_headers")


def variable(kind, name):
    return f"TEST_{kind}_{name.upper().replace('-', '_').replace('.', '_')}"


def an_upstream(stub, *allowed_paths, **keys):
    """Where `stub` is, None for nobody. Its secret comes from a variable of its own unless `keys` say otherwise."""
    return {"base_url": stub.url if stub else NOBODY, "allowed_paths": list(allowed_paths), **keys}


class LongForm:
    """A configuration (`config`: overrides of the default one), and `env` with a fresh canary in each of its variables.

    `upstreams` and `clients`: {name: keys}, as in the file; what is left out is the short form's."""

    def __init__(self, upstreams=None, clients=None, **more):
        self.config = dict(more)
        self.secrets, self.tokens, self.env = {}, {}, {}
        if upstreams:
            self.config.update({key: ABSENT for key in SHORT_UPSTREAM_KEYS}, upstreams={})
            self.env[SECRET_VARIABLE] = ABSENT
            for name, keys in upstreams.items():
                source = {"kind": "env", "name": variable("SECRET", name)}
                self.config["upstreams"][name] = {"secret_source": source, **keys}
                self.secrets[name] = self.env[source["name"]] = canary()
        if clients:
            self.config.update(client_token_env=ABSENT, clients={})
            self.env[TOKEN_VARIABLE] = ABSENT
            for name, keys in clients.items():
                self.config["clients"][name] = {"token_env": variable("TOKEN", name), **keys}
                self.tokens[name] = self.env[variable("TOKEN", name)] = fresh_token()

    @property
    def options(self):
        """Keywords of Broker and run_broker."""
        return {"config": self.config, "env": self.env}

    def watched(self, broker):
        """The broker, whose leak check now knows these secrets and tokens."""
        for secret in self.secrets.values():
            broker.also_secret(secret)
        for token in self.tokens.values():
            broker.also_token(token)
        return broker


class WrongFiles(BrokerTestCase):
    """Files with something wrong, shown to a running broker one after the other: a reload reads them as a start does,
    and takes milliseconds. With `start` the first one of a table is also a start as a user makes it."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.served = cls.class_broker(dry_run=True)

    def assert_each_wrong(self, cases, start=False):
        """Each of {case: (LongForm, words)} is refused in one line that names the file and all of the words."""
        for number, (case, (form, words)) in enumerate(cases.items()):
            with self.subTest(case):
                if start and number == 0:
                    run = run_each({case: form.options})[case]()
                    self.assertEqual((run.returncode, run.stdout), (2, ""), run.stderr)
                    self.assert_one_line(run.stderr, words)
                config = {**self.served.config, **form.config}
                said = self.served.reload({key: value for key, value in config.items() if value is not ABSENT})
                self.assertIn("nothing was changed", said)
                self.assert_one_line(said, words)

    def assert_one_line(self, text, words):
        self.assertEqual(text.count("\n"), 1, text)
        for word in ("broker_config.json", *words):
            self.assertIn(word, text)


def chat(max_tokens=None, model="m", **more):
    """A chat's body."""
    return {"model": model, "messages": [], **({} if max_tokens is None else {"max_tokens": max_tokens}), **more}


def that_used(tokens, status=200):
    """A handler that answers, and reports so many tokens."""
    usage = {"prompt_tokens": tokens // 2, "completion_tokens": tokens - tokens // 2}
    return lambda conn, request: conn.respond_json({"usage": usage}, status)


def left_of(broker, token):
    """What the broker says that this caller has left."""
    return broker.request("GET", "/broker", token=token).json()["left"]


def day(offset=0):
    """A day in UTC, as the log writes it."""
    return (datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=offset)).strftime("%Y-%m-%d")


def line(event, offset=0, **fields):
    return json.dumps({"time": day(offset) + "T00:00:00.000Z", "event": event, **fields}, separators=(",", ":")) + "\n"


def request_line(id, client="alice", offset=0, size=40, method="POST", mode="proxy", **of_the_response):
    fields = {"method": method, "path": CHAT, "mode": mode, "model": "m", "stream": False, "request_bytes": size}
    return line("request", offset, id=id, client=client, **fields)


def response_line(id, used=100, client="alice", offset=0, outcome="ok", **of_the_request):
    usage = None if used is None else {"input_tokens": 1, "output_tokens": used - 1}
    fields = {"model": "m", "status": 200, "outcome": outcome, "response_bytes": 5, "ttfb_ms": 1.0, "duration_ms": 2.0}
    return line("response", offset, id=id, client=client, usage=usage, upstream_request_id=None, attempt=1, **fields)


def pair(id, used=100, **more):
    return request_line(id, **more) + response_line(id, used, **more)
