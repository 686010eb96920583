"""Secrets: where they come from, how their command is run, and what happens when one fails or changes."""

import contextlib
import json
import os
import signal
import string
import sys
import tempfile
import threading
import time
import unittest

from tests.support import (
    ABSENT,
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    Broker,
    BrokerTestCase,
    Lifeline,
    StubUpstream,
    canary,
    eventually,
    fresh_token,
    make_executable,
    posix_only,
    run_broker,
    run_each,
    seeded,
    stop_stub,
)

CHAT = "/v1/chat/completions"

# What a vault's program does: note the run, fail, wait or answer, as the files beside it say.
OP = """
cd "$(dirname "$0")"
echo run >> runs
if [ -p locked ]; then read unlocked < locked; fi
if [ -e failing ]; then cat failing >&2; exit 7; fi
cat value
"""


class Vault:
    """A secret store in a folder: `program` shows what `show` said last."""

    def __init__(self, folder):
        self.folder = folder
        self.program = make_executable(folder, "op", OP)
        self.value = canary()
        self.show(self.value)

    def path(self, name):
        return os.path.join(self.folder, name)

    def show(self, text):
        with open(self.path("value.new"), "w", encoding="utf-8") as file:
            file.write(text + "\n")
        # In one step: a run in between finds the old one or the new one.
        os.replace(self.path("value.new"), self.path("value"))

    def fail(self, words="not signed in"):
        with open(self.path("failing"), "w", encoding="utf-8") as file:
            file.write(words + "\n")

    def mend(self):
        os.remove(self.path("failing"))

    def lock(self):
        """From now on a run waits for unlock()."""
        os.mkfifo(self.path("locked"))

    def unlock(self):
        """Let one run go on; waits until there is one."""
        with open(self.path("locked"), "w", encoding="ascii") as file:
            # Taken away first, or the next run would wait too.
            os.remove(self.path("locked"))
            file.write("now\n")

    @property
    def runs(self):
        try:
            with open(self.path("runs"), encoding="ascii") as file:
                return file.read().count("run\n")
        except FileNotFoundError:
            return 0


def keyring(*accepted):
    """A provider that knows these keys. As some do, it shows a part of a wrong one."""

    def handler(conn, request):
        key = (request.header("Authorization") or "")[len("Bearer ") :]
        if key in accepted:
            conn.respond_json({"id": "answer"})
        else:
            conn.respond_json({"error": {"message": f"Incorrect API key provided: {key[:12]}"}}, 401)

    return handler


def keys_seen(stub):
    return [request.header("Authorization")[len("Bearer ") :] for request in stub.requests]


class SecretsTestCase(BrokerTestCase):
    def vault(self):
        return Vault(self.folder())

    def vault_config(self, vault, more=None, **source):
        return {"secret_source": {"kind": "command", "argv": [vault.program], **source}, **(more or {})}

    def vault_broker(self, stub, vault, more=None, **source):
        config = self.vault_config(vault, more, **source)
        return self.broker(stub, config=config, secret=vault.value, env={SECRET_VARIABLE: ABSENT})

    def ask(self, broker, **more):
        return broker.post_json(CHAT, {"model": "m"}, **more)

    def assert_lets_through(self, broker):
        answer = self.ask(broker)
        self.assertEqual(answer.status, 200, answer)

    def outcomes(self, broker, count):
        """(status, outcome, attempt) of the last `count` responses, once they are written."""
        responses = lambda: [event for event in broker.events() if event["event"] == "response"]  # noqa: E731
        requests = len([event for event in broker.events() if event["event"] == "request"])
        eventually(lambda: len(responses()) >= requests, what="all response lines")
        return [(event["status"], event["outcome"], event["attempt"]) for event in responses()[-count:]]


# ------------------------------------------------------------------------------------------------
# How a command is run


WITNESS = """
import json, os, sys
folder, secret = sys.argv[1:3]
seen = {
    "program": sys.argv[0],
    "words": sys.argv[3:],
    "folder": os.getcwd(),
    "input": sys.stdin.read(),
    "environment": dict(os.environ),
}
with open(os.path.join(folder, "seen.json"), "w") as file:
    json.dump(seen, file)
with open(secret) as file:
    print(file.read())
"""

# Each of them means something to a shell.
WORDS = ["$HOME", "$(touch planted)", "; touch planted", "*", "a b", "", "'", '"', "`id`", "> planted", "\u00e9", "--"]


@posix_only
class Command(SecretsTestCase):
    """What it finds when it runs: one start, looked at from several sides."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="broker-test-")
        cls.addClassCleanup(folder.cleanup)
        cls.folder_of_program = os.path.realpath(folder.name)
        cls.elsewhere = os.path.join(cls.folder_of_program, "elsewhere")
        os.mkdir(cls.elsewhere)
        secret = canary()
        with open(os.path.join(cls.folder_of_program, "value"), "w", encoding="ascii") as file:
            file.write(secret)
        typed = os.path.join(cls.folder_of_program, "typed")
        with open(typed, "w", encoding="ascii") as file:
            file.write("typed by a person\n")
        make_executable(cls.folder_of_program, "witness", WITNESS, sys.executable)
        argv = ["witness", cls.folder_of_program, os.path.join(cls.folder_of_program, "value"), *WORDS]
        config = {"secret_source": {"kind": "command", "argv": argv, "timeout_seconds": 20}}
        env = {
            "PATH": cls.folder_of_program + os.pathsep + os.environ["PATH"],
            "OP_ACCOUNT": "work",
            SECRET_VARIABLE: ABSENT,
        }
        # What the program runs in its turn is looked for there: only in absolute folders.
        env["PATH"] = os.pathsep.join(["bin", ".", "", "./bin", env["PATH"]])
        with open(typed, encoding="ascii") as stdin:
            cls.served = cls.class_broker(config=config, env=env, secret=secret, cwd=cls.elsewhere, stdin=stdin)
        with open(os.path.join(cls.folder_of_program, "seen.json"), encoding="utf-8") as file:
            cls.seen = json.load(file)

    def test_gets_its_words_as_they_are(self):
        self.assertEqual(self.seen["words"], WORDS)

    def test_meets_no_shell(self):
        for folder in (self.folder_of_program, self.elsewhere, self.served.folder):
            self.assertNotIn("planted", os.listdir(folder))

    def test_finds_no_input(self):
        self.assertEqual(self.seen["input"], "")

    def test_runs_in_the_folder_of_the_configuration(self):
        self.assertEqual(self.seen["folder"], self.served.folder)

    def test_finds_the_environment_but_no_token_in_it(self):
        environment = self.seen["environment"]
        self.assertEqual(environment["OP_ACCOUNT"], "work")
        self.assertNotIn(TOKEN_VARIABLE, environment)
        self.assertNotIn(self.served.token, environment.values())

    def test_finds_no_relative_folder_in_its_path(self):
        entries = self.seen["environment"]["PATH"].split(os.pathsep)
        self.assertIn(self.folder_of_program, entries)
        self.assertEqual([entry for entry in entries if not os.path.isabs(entry)], [])

    def test_is_named_at_the_start_by_its_absolute_path(self):
        program = os.path.join(self.folder_of_program, "witness")
        self.assertEqual(self.seen["program"], program)
        self.served.wait_stderr("(?m)^.*command.*" + program)


@posix_only
class CommandLookedUp(SecretsTestCase):
    """Attack: an agent writes an `op` where a careless PATH finds it."""

    def program(self, folder, secret):
        os.makedirs(folder, exist_ok=True)
        return make_executable(folder, "fake-op", f"echo {secret}\n")

    def test_in_the_absolute_folders_of_path_only(self):
        folder, real, planted = self.folder(), canary(), canary()
        self.program(os.path.join(folder, "real"), real)
        for name in ("", "relative", "~"):
            self.program(os.path.join(folder, name), planted)
        path = os.pathsep.join(["relative", ".", "", "~", "./relative", os.path.join(folder, "real"), os.environ["PATH"]])
        stub = self.stub()
        config = {"secret_source": {"kind": "command", "argv": ["fake-op"]}}
        broker = self.broker(
            stub,
            config=config,
            secret=real,
            env={"PATH": path, SECRET_VARIABLE: ABSENT},
            folder=folder,
            cwd=folder,
        )
        self.assert_lets_through(broker)
        self.assertEqual(keys_seen(stub), [real])

    def test_and_nowhere_else(self):
        folder = self.folder()
        self.program(folder, canary())
        config = {"secret_source": {"kind": "command", "argv": ["fake-op"]}}
        env = {"PATH": os.pathsep.join([".", "", "relative"])}
        run = run_broker(config=config, env=env, folder=folder)
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertIn("fake-op", run.stderr)
        self.assertEqual(run.stderr.count("\n"), 1, run.stderr)

    def test_once_at_the_start(self):
        folder, real = self.folder(), canary()
        first = os.path.join(folder, "first")
        os.mkdir(first)
        program = self.program(os.path.join(folder, "second"), real)
        path = os.pathsep.join([first, os.path.dirname(program), os.environ["PATH"]])
        stub = self.stub()
        config = {"secret_source": {"kind": "command", "argv": ["fake-op"], "cache_seconds": 0}}
        broker = self.broker(stub, config=config, secret=real, env={"PATH": path, SECRET_VARIABLE: ABSENT})
        self.program(first, canary())
        self.assert_lets_through(broker)
        # It is asked each time, and the next answer is not the planted one.
        self.program(os.path.dirname(program), new := canary())
        broker.also_secret(new)
        self.assert_lets_through(broker)
        self.assertEqual(keys_seen(stub), [real, new])


@posix_only
class CommandThatMisbehaves(SecretsTestCase):
    def start_of(self, script, interpreter="/bin/sh", secret=None, **source):
        """The keywords of a start with this program."""
        program = make_executable(self.folder(), "op", script, interpreter)
        config = {"secret_source": {"kind": "command", "argv": [program], **source}}
        return {"config": config, "secret": secret, "env": {SECRET_VARIABLE: ABSENT}, "timeout": 30}

    def start(self, *args, **keywords):
        return run_broker(**self.start_of(*args, **keywords))

    def assert_failed(self, run, *words):
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
        for word in ("secret_source", *words):
            self.assertIn(word, run.stderr)

    def test_by_writing_without_end_is_ended(self):
        lifelines, keywords = {}, {}
        for stream in ("", " >&2"):
            lifeline = lifelines[stream] = Lifeline(os.path.join(self.folder(), "alive"))
            self.addCleanup(lifeline.close)
            script = f"exec 9>'{lifeline.path}'; echo >&9; while :; do echo 0123456789abcdef{stream} || exit 1; done"
            keywords[stream] = self.start_of(script, timeout_seconds=20)
        for stream, call in run_each(keywords).items():
            with self.subTest(stream):
                self.assert_failed(call(), "64")
                eventually(lifelines[stream].has_ended, what="the end of the command")

    def test_by_showing_more_than_64_kib_has_given_no_secret(self):
        # Nor are the first 64 KiB, or its last line, taken for one.
        scripts = ("print('x' * 2**16 + 'x')", "print('x\\n' * 2**16 + 'x' * 40)", "print(' ' * 2**17)")
        for script, call in run_each({script: self.start_of(script, sys.executable) for script in scripts}).items():
            with self.subTest(script):
                self.assert_failed(call())

    def test_by_taking_too_long_is_killed_with_its_children(self):
        lifeline = Lifeline(os.path.join(self.folder(), "alive"))
        self.addCleanup(lifeline.close)
        script = f"""
            trap '' TERM HUP INT
            exec 9>'{lifeline.path}'; echo >&9
            sleep 600 &
            sh -c 'sleep 600; true' &
            wait
        """
        began = time.monotonic()
        self.assert_failed(self.start(script, timeout_seconds=1), "timeout_seconds")
        self.assertTrue(lifeline.has_begun())
        eventually(lifeline.has_ended, what="the end of the command and its children")
        self.assertLess(time.monotonic() - began, 15)

    def test_by_leaving_somebody_behind_holds_nothing_up(self):
        # A vault's program may start a daemon of its own, which keeps the pipes open.
        folder = self.folder()
        leash = os.path.join(folder, "leash")
        os.mkfifo(leash)
        secret = canary()
        program = make_executable(folder, "op", f"(cat '{leash}') & echo {secret}\n")
        config = {"secret_source": {"kind": "command", "argv": [program], "timeout_seconds": 5}}
        broker = self.broker(config=config, secret=secret, env={SECRET_VARIABLE: ABSENT})
        self.assertEqual(broker.request("GET", "/healthz").status, 200)
        # The daemon reads the end of its input and is gone, unless it was killed.
        with contextlib.suppress(OSError):
            os.close(os.open(leash, os.O_WRONLY | os.O_NONBLOCK))

    def test_by_failing_is_told_with_its_exit_code_and_what_it_said(self):
        run = self.start("echo 'account is locked' >&2; exit 77")
        self.assert_failed(run, "77", "account is locked")

    def test_by_dying_of_a_signal_is_told_too(self):
        self.assert_failed(self.start("kill -9 $$"), "9")

    def test_by_not_being_a_program_is_told_too(self):
        folder = self.folder()
        path = os.path.join(folder, "op")
        with open(path, "w", encoding="ascii") as file:
            file.write("#!/bin/sh\necho 0123456789abcdef\n")
        for mode in (0o600, 0o700):
            os.chmod(path, mode)
            run = run_broker("--check", config={"secret_source": {"kind": "command", "argv": [path]}})
            self.assertEqual(run.returncode, 1 if mode == 0o600 else 0, run.stderr)

    def test_by_showing_the_secret_as_it_fails_shows_it_to_nobody(self):
        # The leak check looks for the secret in all its forms; the rest is what only looks like one.
        secret = canary()
        others = ["ops_eyJhbGciOiJIUzI1NiJ9." + fresh_token(), "Zm9vYmFyYmF6cXV4cXV1eGNvcmdl", "0123456789abcdef" * 2]
        said = [
            secret,
            f"password={secret}",
            f'{{"secret": "{secret}", "n": 1}}',
            f"Authorization: Bearer {secret}",
            f"https://user:{secret}@vault.example/?token={secret}",
            "(" + secret[:20] + ")",
            secret[12:],
            *others,
            *(f"key:'{other}'," for other in others),
        ]
        folder = self.folder()
        with open(os.path.join(folder, "said"), "w", encoding="ascii") as file:
            file.write("\n".join(["sorry", *said, "bye"]))
        scripts = {stream: f"cat '{folder}/said' {stream}; exit 3" for stream in ("", ">&2")}
        for stream, call in run_each({stream: self.start_of(scripts[stream], secret=secret) for stream in scripts}).items():
            with self.subTest(stream):
                run = call()
                self.assert_failed(run, "3")
                for other in [*others, secret[:20], secret[12:]]:
                    self.assertNotIn(other, run.stderr)

    def test_by_playing_with_the_terminal_is_shown_harmless(self):
        run = self.start(r"printf '\033[2J sorry\r\nbroker: all is well\007\n' >&2; exit 3")
        self.assert_failed(run, "sorry")
        self.assertNotRegex(run.stderr, r"[\x00-\x09\x0b-\x1f\x7f]")


WARNINGS = "".join(f"WARNING: the behaviour of this command has changed, see note {number}\n" for number in range(6))
AZ_REASON = "ERROR: AADSTS70043: The refresh token has expired due to sign-in frequency checks by conditional access."
AZ_MEND = "Interactive authentication is needed. Please run: az login --scope https://vault.azure.net/.default"


@posix_only
class WordsOfAVault(SecretsTestCase):
    """What az, op and their like say as they fail. The mend often stands in the last line, behind warnings."""

    SAID = {
        "az, behind six warnings": (
            f"{WARNINGS}{AZ_REASON}\n{AZ_MEND}\n",
            ["has changed", "AADSTS70043", "refresh token has expired", "az login --scope https://vault.azure.net/.default"],
        ),
        "az, with its long identifiers": (
            "ERROR: AADSTS700082: expired on 2026-11-23T10:11:12.0000000Z. Trace ID: x Timestamp: 2026-11-23 10:11:12Z\n",
            ["AADSTS700082", "2026-11-23"],
        ),
        "op": (
            "[ERROR] 2026/11/25 10:11:12 could not read secret 'op://Team/OpenAI/credential': isn't an item in \"Work\"\n",
            ["[ERROR] 2026/11/25", "op://Team/OpenAI/credential", "isn't an item"],
        ),
        "pass": ("gpg: can't connect to the gpg-agent: IPC connect call failed; try gpg-connect-agent\n", ["gpg-connect-agent"]),
        "vault": (
            "Error reading: Get https://vault.example.internal:8200/v1/secret/data/openai: connection refused\n",
            ["https://vault.example.internal:8200/v1/secret/data/openai", "connection refused"],
        ),
        "aws": ("An error occurred (ExpiredTokenException) when calling GetSecretValue\n", ["(ExpiredTokenException)"]),
        "a call stack of 40 lines": (
            "panic: no session\n" + "\tgoroutine 1 [running], main.go:12\n" * 40 + "RuntimeError: run op signin first\n",
            ["panic: no session", "run op signin first"],
        ),
        "nothing": ("", ["said: nothing"]),
    }

    def keywords(self, said, end):
        folder = self.folder()
        with open(os.path.join(folder, "said"), "w", encoding="utf-8") as file:
            file.write(said)
        program = make_executable(folder, "az", f"cat '{folder}/said' >&2; {end}\n")
        return {
            "args": ["--check"],
            "config": {"secret_source": {"kind": "command", "argv": [program]}},
            "env": {SECRET_VARIABLE: ABSENT},
        }

    def assert_said(self, run, *words):
        self.assertEqual(run.returncode, 1, run.stderr)
        self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
        for word in words:
            self.assertIn(word, run.stderr)

    def test_are_shown_the_first_and_the_last_of_them(self):
        for case, call in run_each({case: self.keywords(said, "exit 3") for case, (said, _) in self.SAID.items()}).items():
            with self.subTest(case):
                self.assert_said(call(), "exit code 3", *self.SAID[case][1])

    def test_are_shown_also_where_it_says_that_all_is_well(self):
        said, words = self.SAID["az, behind six warnings"]
        ends = {"nothing": "exit 0", "a word": "echo None; exit 0"}
        for case, call in run_each({case: self.keywords(said, end) for case, end in ends.items()}).items():
            with self.subTest(case):
                self.assert_said(call(), "exit code 0", *words)

    def test_are_shown_without_what_might_be_a_key(self):
        keys = [canary(), "hQxWbTzRkLmNpVcYdGfJ", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"]
        keys += ["hvs.CAESIJ8dKq2Xv7Zb1Lm3", "ghp_" + "aB3dE6" * 5]
        said = f"could not use {' '.join(keys[:3])} today\n"
        said += "".join(f"then token={key}&x=1 and https://me:{key}@host.example/?k={key} failed\n" for key in keys[3:])
        run = run_each({"": self.keywords(said, "exit 3")})[""]()
        self.assert_said(run, "could not use", "today", "host.example", "failed")
        for key in keys:
            self.assertNotIn(key, run.stderr)
            self.assertNotIn(key[4:], run.stderr)


    def test_are_shown_without_any_key_that_chance_makes(self):
        random = seeded("keys in words")
        alphabets = (string.ascii_letters + string.digits, string.hexdigits[:16], string.ascii_letters + string.digits + "-_")
        lines = {}
        for _ in range(8):
            keys = ["".join(random.choices(random.choice(alphabets), k=random.randrange(20, 40))) for _ in range(8)]
            around = ("token {}", "({})", "'{}'", '"{}",', "key={}", "x:{}", "<{}>", "{}.")
            said = [text.format(key) for text, key in zip(around, keys)]
            lines[tuple(keys)] = "".join(" ".join(pair) + " was refused\n" for pair in zip(said[::2], said[1::2]))
        for keys, call in run_each({keys: self.keywords(text, "exit 3") for keys, text in lines.items()}).items():
            run = call()
            self.assert_said(run, "token", "was refused")
            for key in keys:
                with self.subTest(key):
                    self.assertNotIn(key[:12], run.stderr)


@posix_only
class WhatACommandGives(SecretsTestCase):
    good = "sk-" + "g00d-Value_" * 3

    def test_instead_of_a_key_is_named_for_what_it_is_with_the_mend(self):
        given = {
            "empty": (b"", "is empty"),
            "a line end alone": (b"\n", "is empty"),
            "in quotes": (b'"%s"\n', "in quotes: take them off"),
            "in single quotes": (b"'%s'\n", "in quotes: take them off"),
            "NAME=value": (b"OPENAI_API_KEY=%s\n", "NAME=value: give the value alone"),
            "an export line": (b"export OPENAI_API_KEY=%s\n", "NAME=value: give the value alone"),
            "a comma": (b"%s,\n", "ends in a comma: take it off"),
            "two lines": (b"%s\n%s\n", "several lines"),
            "a carriage return": (b"%s\rx", "carriage return"),
            "a byte-order mark": (b"\xef\xbb\xbf%s\n", "byte-order mark"),
            "a space": (b"Bearer %s\n", "a space"),
            "beyond ASCII": (b"%s\xc3\xa9\n", "beyond ASCII"),
            "cut off": (b"sk-12345\n", "shorter than 16"),
        }
        texts = {case: text.replace(b"%s", self.good.encode()) for case, (text, _) in given.items()}
        for codec in ("utf-16", "utf-16-le"):
            given[codec], texts[codec] = (b"", "UTF-16"), self.good.encode(codec)
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault)
        for case, text in texts.items():
            with self.subTest(case):
                with open(vault.path("value"), "wb") as file:
                    file.write(text)
                said = broker.reload()
                self.assertIn(given[case][1], said)
                self.assertIn("nothing was changed", said)
                self.assertNotIn(self.good[:12], said)
        # A key that merely ends in = is one.
        broker.also_secret(key := self.good + "==")
        vault.show(key)
        self.assertIn("reloaded", broker.reload())
        self.assert_lets_through(broker)
        self.assertEqual(keys_seen(stub), [key])

    def test_is_a_secret_if_a_header_can_carry_it(self):
        self.check_all(
            True,
            {
                "as it is": self.good,
                "with a line end": self.good + "\n",
                "with that of Windows": self.good + "\r\n",
                "16 characters": "0123456789abcde_",
                "4096 characters": "s3cret-." * 512,
                "every visible character": "".join(map(chr, range(0x21, 0x7F))),
            },
        )

    def test_is_none_if_it_is_anything_else(self):
        self.check_all(
            False,
            {
                "nothing": "",
                "only a line end": "\n",
                "15 characters": "0123456789abcde",
                "15 characters and a line end": "0123456789abcde\n",
                "4097 characters": "s3cret-." * 512 + "x",
                "a space": "sk-0123456789 abcdef",
                "a space at its end": self.good + " ",
                "a space at its beginning": " " + self.good,
                "a tab": "sk-0123456789\tabcdef",
                "two line ends": self.good + "\n\n",
                "a line before it": "[INFO] signing in\n" + self.good + "\n",
                "another header": self.good + "\r\nX-Other: 1",
                "a control character": self.good + "\x7f",
                "NUL": self.good + "\0",
                "beyond ASCII": self.good + "\u00e9",
                "bytes that are no text": self.good + "\udcff",
                "more than is read": self.good + "\n" * 2**16,
            },
        )

    def check_all(self, usable, cases):
        """One broker, whose source is asked anew for each case: a start for each would take long."""
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault)
        kept = vault.value
        for case, text in cases.items():
            with self.subTest(case):
                with open(vault.path("value"), "wb") as file:
                    file.write(text.encode("utf-8", "surrogateescape"))
                stub.forget()
                said = broker.reload()
                self.assert_lets_through(broker)
                if usable:
                    kept = text.rstrip("\r\n")
                self.assertEqual(keys_seen(stub), [kept])
                # Why it is none is said without showing it.
                for part in text.split():
                    if len(part) >= 12:
                        self.assertNotIn(part, said)


# ------------------------------------------------------------------------------------------------
# Caching, sharing, failing


class AskedEachTime(SecretsTestCase):
    """A broker for the whole class, whose source is asked for each request."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="broker-test-")
        cls.addClassCleanup(folder.cleanup)
        cls.store, cls.upstream = Vault(os.path.realpath(folder.name)), cls.class_stub()
        source = {"kind": "command", "argv": [cls.store.program], "cache_seconds": 0}
        env = {SECRET_VARIABLE: ABSENT}
        cls.served = cls.class_broker(cls.upstream, {"secret_source": source}, secret=cls.store.value, env=env)

    def setUp(self):
        self.upstream.forget()
        with contextlib.suppress(FileNotFoundError):
            self.store.mend()
        self.store.show(self.store.value)
        # A reload makes an end of what the last test left: a remembered failure.
        reloads = len([event for event in self.served.events() if event["event"] == "reload"])
        self.served.signal(signal.SIGHUP)
        self.served.wait_event(event="reload", count=reloads + 1)
        self.runs_before = self.store.runs
        self.requests_before = len([event for event in self.served.events() if event["event"] == "request"])
        self.printed_before = len(self.served.stderr_text())

    @property
    def runs(self):
        return self.store.runs - self.runs_before

    def wait_for_requests(self, count):
        """Until so many have come: the line is written right before the secret is asked for."""
        self.served.wait_event(event="request", count=self.requests_before + count)


@posix_only
class SecretInMemory(SecretsTestCase):
    def test_is_kept_for_cache_seconds(self):
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault, cache_seconds=3600)
        for _ in range(5):
            self.assert_lets_through(broker)
        self.assertEqual(vault.runs, 1)

    def test_is_asked_for_again_when_that_time_is_over(self):
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault, cache_seconds=1)
        vault.show(new := canary())
        broker.also_secret(new)

        def asked_again():
            self.assert_lets_through(broker)
            return vault.runs == 2

        eventually(asked_again, what="a second run")
        self.assertEqual(set(keys_seen(stub)), {vault.value, new})

    def test_is_asked_for_each_time_where_that_time_is_zero(self):
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault, cache_seconds=0)
        for runs in (2, 3, 4):
            self.assert_lets_through(broker)
            self.assertEqual(vault.runs, runs)

    def test_from_the_environment_stays(self):
        stub = self.stub()
        broker = self.broker(stub)
        for _ in range(3):
            self.assert_lets_through(broker)
        self.assertEqual(set(keys_seen(stub)), {broker.secret})

    def test_that_is_over_is_still_hidden_in_answers_and_kept_out_of_requests(self):
        vault = self.vault()
        stub = self.stub(lambda conn, request: conn.respond_json({"old": vault.value}))
        broker = self.vault_broker(stub, vault, cache_seconds=0)
        vault.show(new := canary())
        broker.also_secret(new)
        answer = self.ask(broker)
        self.assertEqual(keys_seen(stub), [new])
        self.assertEqual(answer.json(), {"old": "[redacted]"})
        self.assert_refused(broker.post_json(CHAT, {"m": vault.value}), 403, "secret_in_request")
        self.assert_refused(broker.post_json(CHAT, {"m": new}), 403, "secret_in_request")


@posix_only
class ManyCallers(AskedEachTime):
    def all_at_once(self, count=20):
        """What each of them gets; `unlock` comes when all of them wait."""
        answers = []
        callers = [threading.Thread(target=lambda: answers.append(self.ask(self.served))) for _ in range(count)]
        for caller in callers:
            caller.start()
        self.wait_for_requests(count)
        self.assertEqual(self.served.request("GET", "/healthz").status, 200)
        self.store.unlock()
        for caller in callers:
            caller.join()
        return answers

    def test_wait_for_one_run_and_share_what_it_gives(self):
        self.store.lock()
        self.assertEqual([answer.status for answer in self.all_at_once()], [200] * 20)
        self.assertEqual(self.runs, 1)
        self.assertEqual(keys_seen(self.upstream), [self.store.value] * 20)

    def test_share_a_failure_too(self):
        self.store.lock()
        self.store.fail()
        for answer in self.all_at_once():
            self.assert_refused(answer, 503, "secret_unavailable")
        self.assertEqual(self.runs, 1)
        self.assertEqual(self.upstream.requests, [])

    def test_do_not_end_the_run_when_one_of_them_leaves(self):
        self.store.lock()
        answers = []
        with self.served.connect() as impatient:
            impatient.send(self.served.post_bytes(CHAT, {"model": "m"}))
            self.wait_for_requests(1)
            patient = threading.Thread(target=lambda: answers.append(self.ask(self.served).status))
            patient.start()
            self.wait_for_requests(2)
        self.served.wait_event(event="response", outcome="client_disconnected")
        self.store.unlock()
        patient.join()
        self.assertEqual(answers, [200])
        self.assertEqual(self.runs, 1)
        self.assertEqual(len(self.upstream.requests), 1)


@posix_only
class SecretThatCannotBeHad(AskedEachTime):
    def said(self, pattern):
        return self.served.wait_stderr(pattern, start=self.printed_before)

    def test_is_told_to_the_caller_without_a_reason_and_to_the_operator_with_it(self):
        self.store.fail("the vault is sealed")
        answer = self.ask(self.served)
        self.assert_refused(answer, 503, "secret_unavailable")
        self.assertNotIn(b"sealed", answer.body)
        self.assertNotIn(self.store.program.encode(), answer.body)
        self.said(r"\b7\b.*the vault is sealed")
        self.assertEqual(self.upstream.requests, [])
        self.assertEqual(self.outcomes(self.served, 1), [(503, "secret_unavailable", 1)])

    def test_is_asked_for_once_however_often_an_agent_tries(self):
        self.store.fail()
        for _ in range(30):
            self.assert_refused(self.ask(self.served), 503, "secret_unavailable")
        self.assertEqual(self.runs, 1)

    def test_may_be_the_callers_own_token(self):
        self.store.show(self.served.token)
        self.assert_refused(self.ask(self.served), 503, "secret_unavailable")
        self.assertEqual(self.upstream.requests, [])

    def test_may_be_no_secret_at_all(self):
        self.store.show("[ERROR] not signed in")
        self.assert_refused(self.ask(self.served), 503, "secret_unavailable")
        self.assertEqual(self.upstream.requests, [])

    def test_may_be_shown_by_a_command_as_it_fails_and_is_masked(self):
        unknown = canary()
        self.served.also_secret(unknown)
        self.store.fail(f"could not unwrap {unknown} with {self.store.value} for {self.served.token}")
        self.assert_refused(self.ask(self.served), 503, "secret_unavailable")
        self.said("could not unwrap")

    def test_may_be_late(self):
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault, cache_seconds=0, timeout_seconds=1)
        vault.lock()
        self.assert_refused(self.ask(broker), 503, "secret_unavailable")
        broker.wait_stderr("timeout_seconds")
        self.assertEqual(stub.requests, [])

    def test_may_come_from_a_program_that_is_gone(self):
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault, cache_seconds=0)
        start = len(broker.stderr_text())
        os.remove(vault.program)
        self.assert_refused(self.ask(broker), 503, "secret_unavailable")
        broker.wait_stderr(vault.program, start=start)


# ------------------------------------------------------------------------------------------------
# Rotation


@posix_only
class SecretThatWasRotated(SecretsTestCase):
    def test_is_asked_for_anew_and_the_request_is_sent_once_more(self):
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault)
        vault.show(new := canary())
        broker.also_secret(new)
        stub.script(keyring(new))
        answer = broker.post_json(CHAT, {"model": "m", "n": 7}, {"X-Kept": "yes"})
        self.assertEqual((answer.status, answer.json()), (200, {"id": "answer"}))
        self.assertEqual(keys_seen(stub), [vault.value, new])
        first, second = stub.requests
        self.assertEqual((first.method, first.target, first.body), (second.method, second.target, second.body))
        self.assertEqual(
            [header for header in first.headers if header[0] != "Authorization"],
            [header for header in second.headers if header[0] != "Authorization"],
        )
        self.assertEqual(vault.runs, 2)
        self.assertEqual(self.outcomes(broker, 5), [(200, "ok", 2)])
        requests = [event for event in broker.events() if event["event"] == "request"]
        responses = [event for event in broker.events() if event["event"] == "response"]
        self.assertEqual([event["id"] for event in requests], [event["id"] for event in responses])
        # And from then on the new one counts.
        self.assert_lets_through(broker)
        self.assertEqual(keys_seen(stub)[2:], [new])
        self.assertEqual(self.outcomes(broker, 1), [(200, "ok", 1)])

    def test_is_asked_for_without_waiting_for_the_rest_of_the_refusal(self):
        vault = self.vault()

        def dripping(conn, request):
            conn.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 1000\r\n\r\n{")
            conn.wait_gone(30)

        stub = self.stub(dripping)
        broker = self.vault_broker(stub, vault)
        vault.show(new := canary())
        broker.also_secret(new)
        stub.script(dripping, keyring(new))
        began = time.monotonic()
        self.assert_lets_through(broker)
        self.assertLess(time.monotonic() - began, 10)

    def test_is_asked_for_once_by_all_who_were_refused(self):
        vault = self.vault()
        everybody = threading.Barrier(10)
        new = canary()

        def handler(conn, request):
            if request.header("Authorization") != "Bearer " + new:
                everybody.wait(20)
            keyring(new)(conn, request)

        stub = self.stub(handler)
        broker = self.vault_broker(stub, vault)
        vault.show(new)
        broker.also_secret(new)
        answers = []
        callers = [threading.Thread(target=lambda: answers.append(self.ask(broker).status)) for _ in range(10)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        self.assertEqual(answers, [200] * 10)
        self.assertEqual(vault.runs, 2)
        self.assertEqual(sorted(keys_seen(stub)), sorted([vault.value] * 10 + [new] * 10))

    def test_serves_a_late_refusal_at_once_while_the_vault_makes_others_wait(self):
        vault, refuse, new = self.vault(), threading.Event(), canary()

        def handler(conn, request):
            if request.header("Authorization") != "Bearer " + new:
                conn.hold(refuse)
            keyring(new)(conn, request)

        stub = self.stub(handler)
        broker = self.vault_broker(stub, vault, cache_seconds=0)
        with broker.connect() as late, broker.connect() as waiting:
            late.send(broker.post_bytes(CHAT, {"model": "m"}))
            stub.wait_for_requests(1)
            vault.show(new)
            broker.also_secret(new)
            self.assert_lets_through(broker)
            vault.lock()
            waiting.send(broker.post_bytes(CHAT, {"model": "m"}))
            eventually(lambda: vault.runs == 4)
            refuse.set()
            self.assertEqual(late.read_answer().status, 200)
            vault.unlock()
            self.assertEqual(waiting.read_answer().status, 200)

    def test_and_is_rejected_again_is_given_up(self):
        stub, vault = self.stub(keyring()), self.vault()
        broker = self.vault_broker(stub, vault)
        vault.show(new := canary())
        broker.also_secret(new)
        answer = self.ask(broker)
        self.assert_refused(answer, 502, "upstream_rejected_secret")
        self.assertEqual(keys_seen(stub), [vault.value, new])
        self.assertEqual(self.outcomes(broker, 5), [(502, "upstream_rejected_secret", 2)])
        # Nothing is held back for it: the next is asked as ever. But nobody unlocks a vault again within the minute.
        for _ in range(3):
            self.assert_refused(self.ask(broker), 502, "upstream_rejected_secret")
        self.assertEqual(keys_seen(stub)[2:], [new] * 3)
        self.assertEqual(vault.runs, 2)
        vault.show(canary())
        stub.script(keyring(new))
        self.assert_lets_through(broker)
        self.assertEqual(vault.runs, 2)


class RejectedSecret(SecretsTestCase):
    def test_is_the_operators_matter_and_nothing_of_it_is_shown(self):
        stub = self.stub(keyring())
        broker = self.broker(stub)
        answer = self.ask(broker)
        self.assert_refused(answer, 502, "upstream_rejected_secret")
        self.assertNotIn(b"sk-canary", answer.body)
        self.assertIn("Incorrect API key provided:", answer.message)
        self.assertIsNone(answer.header("WWW-Authenticate"))
        self.assertEqual(keys_seen(stub), [broker.secret])
        self.assertEqual(self.outcomes(broker, 1), [(502, "upstream_rejected_secret", 1)])

    def test_for_one_path_only_says_why_and_holds_nobody_up(self):
        # A 401 may mean a missing scope, an address that is not on a list, a closed organization.
        def scoped(conn, request):
            if request.target != "/v1/models":
                return conn.respond_json({"id": "answer"})
            error = {"error": {"message": "Missing scopes: model.read", "type": "invalid_request_error"}}
            return conn.respond_json(error, 401, [("x-request-id", "req_scope")])

        broker = self.broker(self.stub(scoped))
        for _ in range(2):
            answer = broker.request("GET", "/v1/models")
            self.assert_refused(answer, 502, "upstream_rejected_secret")
            self.assertIn("Missing scopes: model.read", answer.message)
            self.assert_lets_through(broker)
        broker.wait_stderr("Missing scopes: model.read")
        line = broker.wait_event(event="response", outcome="upstream_rejected_secret")
        self.assertEqual(line["upstream_request_id"], "req_scope")

    def test_is_told_in_the_providers_words_with_everything_of_a_key_hidden(self):
        secret = canary()
        # Each has a word of plain letters around it that has to be seen, and the first part must not be.
        hidden = {
            "as it is": secret,
            "a part of it": secret[14:24],
            "four characters": secret[20:24],
            "with stars": "sk-ca****" + secret[-4:],
            "with one star": "q1*z9",
            "another key": "sk-proj-Ab3dEf6hIj9kLm2nOp",
            "in an address": "https://user:" + secret + "@provider.example/",
        }
        stub = self.stub()
        broker = self.broker(stub, secret=secret)
        for case, word in hidden.items():
            with self.subTest(case):
                error = {"error": {"message": f"beginning {word} ending"}}
                stub.script(lambda conn, request: conn.respond_json(error, 401))  # noqa: B023
                message = self.ask(broker).message
                self.assertIn("beginning", message)
                self.assertIn("ending", message)
                self.assertNotIn(word, message)

    def test_is_told_in_200_characters_at_most_and_printable_ones(self):
        stub = self.stub()
        broker = self.broker(stub)
        for said in ("why " * 10_000, "\x1b[2Jwhy\r\n\u202ewhy", ["why"], None, {"a": {}}):
            with self.subTest(repr(said)[:40]):
                stub.script(lambda conn, request: conn.respond_json({"error": {"message": said}}, 401))  # noqa: B023
                answer = self.ask(broker)
                self.assert_refused(answer, 502, "upstream_rejected_secret")
                self.assertLess(answer.message.count("why"), 55)
                self.assertTrue(answer.message.isprintable(), answer.message)

    def test_where_there_is_none_is_the_callers_matter(self):
        stub = self.stub(lambda conn, request: conn.respond_json({"who": "are you"}, 401))
        broker = self.broker(stub, config={"secret_source": {"kind": "none"}}, secret=ABSENT)
        for _ in range(2):
            answer = self.ask(broker)
            self.assertEqual((answer.status, answer.code, answer.json()), (401, None, {"who": "are you"}))
        self.assertEqual([request.header("Authorization") for request in stub.requests], [None, None])

    def test_is_not_what_a_403_means(self):
        stub = self.stub(lambda conn, request: conn.respond_json({"error": "no access to this model"}, 403))
        broker = self.broker(stub)
        for _ in range(2):
            answer = self.ask(broker)
            self.assertEqual((answer.status, answer.code), (403, None))
        self.assertEqual(len(stub.requests), 2)


class Remembered:
    """What goes wrong once and is remembered for five seconds, probed in the background: so nobody waits for it."""

    def __init__(self, cache_seconds, go_wrong, be_well):
        self.folder = tempfile.TemporaryDirectory(prefix="broker-test-")
        self.vault, self.stub = Vault(os.path.realpath(self.folder.name)), StubUpstream()
        source = {"kind": "command", "argv": [self.vault.program], "cache_seconds": cache_seconds}
        env = {SECRET_VARIABLE: ABSENT}
        self.broker = Broker(self.stub, {"secret_source": source}, secret=self.vault.value, env=env)
        go_wrong(self)
        self.codes = [self.broker.post_json(CHAT, {}).code]
        self.began = time.monotonic()
        # From now on it would work, were it tried.
        be_well(self)
        self.seconds = None
        self.probe = threading.Thread(target=self._probe)
        self.probe.start()

    def _probe(self):
        while time.monotonic() < self.began + 30:
            answer = self.broker.post_json(CHAT, {})
            if answer.status == 200:
                self.seconds = time.monotonic() - self.began
                return
            self.codes.append(answer.code)
            time.sleep(0.1)

    def close(self):
        self.probe.join()
        try:
            self.broker.close()
        finally:
            stop_stub(self.stub)
            self.folder.cleanup()


def setUpModule():
    if os.name == "posix":
        failed.append(Remembered(0, lambda state: state.vault.fail(), lambda state: state.vault.mend()))
        unittest.addModuleCleanup(failed[0].close)


failed = []


@posix_only
class SourceThatFailed(SecretsTestCase):
    def test_is_remembered_for_five_seconds(self):
        state = failed[0]
        state.probe.join()
        self.assertIsNotNone(state.seconds, "it was remembered for too long")
        self.assertGreater(state.seconds, 4)
        self.assertEqual(set(state.codes), {"secret_unavailable"})
        # At the start, when it failed, and when it was well again.
        self.assertEqual(state.vault.runs, 3)

    def test_as_the_provider_rejected_the_secret_leaves_the_old_one_in_use(self):
        stub, vault = self.stub(keyring()), self.vault()
        broker = self.vault_broker(stub, vault)
        vault.fail()
        self.assert_refused(self.ask(broker), 502, "upstream_rejected_secret")
        self.assertEqual((keys_seen(stub), vault.runs), ([vault.value], 2))
        # The provider has thought better of it.
        stub.script(keyring(vault.value))
        self.assert_lets_through(broker)
        self.assertEqual(vault.runs, 2)


# ------------------------------------------------------------------------------------------------
# Reload


@posix_only
class Reload(SecretsTestCase):
    def reload(self, broker):
        done = len([event for event in broker.events() if event["event"] == "reload"])
        broker.signal(signal.SIGHUP)
        broker.wait_event(event="reload", count=done + 1)

    def failed_reload(self, broker):
        """What stderr says of it."""
        return broker.reload()

    def test_asks_the_source_anew(self):
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault)
        self.assert_lets_through(broker)
        vault.show(new := canary())
        broker.also_secret(new)
        self.reload(broker)
        self.assert_lets_through(broker)
        self.assertEqual(keys_seen(stub), [vault.value, new])
        self.assertEqual(vault.runs, 2)

    def test_makes_an_end_of_a_remembered_failure(self):
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault, cache_seconds=0)
        vault.fail()
        self.assert_refused(self.ask(broker), 503, "secret_unavailable")
        vault.mend()
        self.reload(broker)
        self.assert_lets_through(broker)

    def test_with_a_source_that_fails_keeps_the_old_secret_and_says_so(self):
        stub, vault = self.stub(), self.vault()
        broker = self.vault_broker(stub, vault)
        for words, prepare in {
            "not signed in": vault.fail,
            "": lambda: (vault.mend(), vault.show("short")),
            "token": lambda: vault.show(broker.token),
        }.items():
            with self.subTest(words):
                prepare()
                self.failed_reload(broker)
                broker.wait_stderr(words)
                self.assert_lets_through(broker)
        self.assertEqual(set(keys_seen(stub)), {vault.value})
        self.assertEqual([event for event in broker.events() if event["event"] == "reload"], [])

    def test_takes_the_token_from_the_variable_that_is_named_now(self):
        stub, other = self.stub(), fresh_token()
        broker = self.broker(stub, env={"OTHER_TOKEN": other})
        broker.also_token(other)
        self.assert_refused(self.ask(broker, token=other), 401, "client_token_required")
        broker.write_config({**broker.config, "client_token_env": "OTHER_TOKEN"})
        self.reload(broker)
        self.assertEqual(self.ask(broker, token=other).status, 200)
        self.assert_refused(self.ask(broker), 401, "client_token_required")

    def test_with_a_token_that_is_the_secret_changes_nothing(self):
        stub, secret = self.stub(), canary()
        broker = self.broker(stub, secret=secret, env={"SAME": secret})
        broker.write_config({**broker.config, "client_token_env": "SAME"})
        self.failed_reload(broker)
        self.assert_lets_through(broker)
        self.assertEqual(self.ask(broker, token=secret).status, 401)

    def test_with_a_secret_that_is_the_new_token_changes_neither(self):
        # Each of the two would do by itself; together they would let the caller have the secret.
        stub, vault, other = self.stub(), self.vault(), fresh_token()
        config = self.vault_config(vault)
        env = {SECRET_VARIABLE: ABSENT, "OTHER_TOKEN": other}
        broker = self.broker(stub, config=config, secret=vault.value, env=env)
        broker.also_token(other)
        vault.show(other)
        broker.write_config({**broker.config, "client_token_env": "OTHER_TOKEN"})
        self.failed_reload(broker)
        self.assert_lets_through(broker)
        self.assertEqual(keys_seen(stub), [vault.value])
        self.assert_refused(self.ask(broker, token=other), 401, "client_token_required")

    def test_takes_what_the_file_allows_now(self):
        stub = self.stub()
        broker = self.broker(stub)
        config = {**broker.config, "allowed_paths": ["GET /v1/models"], "extra_headers": {"X-Team": "blue"}}
        broker.write_config(config)
        self.reload(broker)
        self.assert_refused(self.ask(broker), 403, "path_not_allowed")
        self.assertEqual(broker.request("GET", "/v1/models").status, 200)
        self.assertEqual(stub.requests[-1].header("X-Team"), "blue")

    def test_lets_a_request_in_flight_end_as_it_began(self):
        release = threading.Event()

        def hold(conn, request):
            conn.hold(release)
            conn.respond_json({"held": request.header("Authorization")})

        stub, vault = self.stub(hold), self.vault()
        broker = self.vault_broker(stub, vault)
        with broker.connect() as caller:
            caller.send(broker.post_bytes(CHAT, {"model": "m"}))
            stub.wait_for_requests(1)
            vault.show(new := canary())
            broker.also_secret(new)
            broker.write_config({**broker.config, "allowed_paths": ["GET /v1/models"]})
            self.reload(broker)
            release.set()
            # The secret that it went with is hidden in its answer, though it is no longer in use.
            self.assertEqual(caller.read_answer().json(), {"held": "Bearer [redacted]"})


if __name__ == "__main__":
    unittest.main()
