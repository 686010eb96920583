"""The configuration file: what it may say, and the one line that tells what is wrong with it."""

import json
import os
import shutil
import subprocess
import sys
import unittest

from tests.support import (
    ABSENT,
    BROKER,
    NOBODY,
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    BrokerTestCase,
    SharedBroker,
    canary,
    eventually,
    free_port,
    fresh_token,
    make_config,
    make_executable,
    posix_only,
    run_broker,
    run_each,
)

# Enough to be a whole configuration, for files that are written as text.
WHOLE = """
  "listen_port": 0,
  "upstream_base_url": "http://127.0.0.1:9",
  "allowed_paths": ["/v1/chat/completions"],
  "client_token_env": "BROKER_TEST_TOKEN",
  "secret_source": {"kind": "env", "name": "BROKER_TEST_SECRET"}
"""


class Judge:
    """What wrong configurations have in common, for classes with a broker and for those without one."""

    def assert_wrong(self, run, *named, code=2):
        """It ended with this code and said so in one line that names the file and all of `named`."""
        self.assertEqual(run.returncode, code, run.stderr)
        self.assertEqual(run.stdout, "")
        lines = run.stderr.strip("\n").split("\n")
        self.assertEqual(len(lines), 1, run.stderr)
        for name in named:
            self.assertIn(name, lines[0])


class ConfigTestCase(Judge, BrokerTestCase):
    pass


class FilesTestCase(Judge, SharedBroker):
    """Files shown to a running broker, one after the other: a reload reads them as a start does, and takes
    milliseconds where a start takes a good part of a second. Where nobody can be told to reload, starts."""

    def assert_each_refused(self, files):
        """Each of {case: (text, words)} changes nothing, and one line names the file and all of these words."""
        if os.name != "posix":
            runs = {case: {"config_text": text, "args": ["--check"]} for case, (text, _) in files.items()}
            for case, run in run_each(runs).items():
                with self.subTest(case):
                    self.assert_wrong(run(), "broker_config.json", *files[case][1])
            return
        for case, (text, words) in files.items():
            with self.subTest(case):
                said = self.served.reload(text)
                for word in ("broker_config.json", *words):
                    self.assertIn(word, said)
        self.assertEqual(self.served.events("reload"), [])

    def assert_each_wrong(self, key, values):
        """Every one of these values for this key is refused in a line that names file and key."""
        texts = {f"{key}: {case}": json.dumps(make_config(NOBODY, {key: value})) for case, value in values.items()}
        self.assert_each_refused({case: (text, [key]) for case, text in texts.items()})

    def assert_each_taken(self, files):
        """Each of {case: text} is a good one."""
        if os.name != "posix":
            runs = {case: {"config_text": text, "args": ["--check", "--dry-run"]} for case, text in files.items()}
            for case, run in run_each(runs).items():
                with self.subTest(case):
                    self.assertEqual(run().returncode, 0, run().stderr)
            return
        for case, text in files.items():
            with self.subTest(case):
                before = len(self.served.events("reload"))
                said = self.served.reload(text)
                eventually(lambda: len(self.served.events("reload")) > before, 2, said)  # noqa: B023


def by_repr(*values):
    return {repr(value)[:60]: value for value in values}


class WrongValue(FilesTestCase):
    """Each is one line, exit code 2, naming the file and the key."""

    def test_listen_host_is_the_loopback_address_and_no_other(self):
        values = by_repr("0.0.0.0", "localhost", "::1", "127.0.0.2", "127.0.0.1 ", "", 5, None, ["127.0.0.1"])
        self.assert_each_wrong("listen_host", values)

    def test_listen_port_is_a_port(self):
        self.assert_each_wrong("listen_port", by_repr(-1, 65536, "8791", 1.5, 8791.0, True, None, [8791]))

    def test_mode_is_proxy_or_dry_run(self):
        self.assert_each_wrong("mode", by_repr("live", "", "Proxy", "dry-run", None, True, ["proxy"]))

    def test_upstream_base_url_is_an_https_url_or_plain_http_to_loopback(self):
        values = by_repr(
            ABSENT,
            "",
            5,
            None,
            "api.example.com",
            "//api.example.com",
            "ftp://api.example.com",
            "http://api.example.com",
            "http://127.0.0.1.example.com",
            "http://localhost.example.com",
            "http://192.168.0.1:8080",
            "http://0.0.0.0:8080",
            "https://",
            "https:///v1",
            "https://:443",
            "https://user@api.example.com",
            "https://user:password@api.example.com",
            "https://api.example.com?x=y",
            "https://api.example.com/v1?",
            "https://api.example.com/#x",
            "https://api.example.com/v1#",
            "https://api.example.com/a/../b",
            "https://api.example.com/./a",
            "https://api.example.com/..",
            "https://api.example.com:port",
            "https://api.example.com:99999",
            "https://api.example.com:-1",
            "https://bücher.example",
            "https://api.example.com/é",
            " https://api.example.com",
            "https://api.example.com ",
            "https://api.example.com\n",
            "https://api.exam\tple.com",
            "https://api.example.com\r\nX: y",
            "https://api.example.com\\@evil.example",
            "https://api example.com",
            ["https://api.example.com"],
        )
        self.assert_each_wrong("upstream_base_url", values)

    def test_upstream_base_url_is_not_the_broker_itself(self):
        port = free_port()
        urls = [f"http://{host}:{port}" for host in ("127.0.0.1", "localhost")]
        for url, call in run_each({url: {"config": {"listen_port": port, "upstream_base_url": url}} for url in urls}).items():
            with self.subTest(url):
                self.assert_wrong(call(), "broker_config.json", "upstream_base_url")

    def test_allowed_paths_are_rules_that_a_request_can_match(self):
        values = by_repr(
            ABSENT,
            [],
            None,
            "/v1/models",
            {"GET": "/v1/models"},
            [5],
            [None],
            [["GET", "/v1/models"]],
            [""],
            [" "],
            ["GET"],
            ["v1/models"],
            ["GET v1/models"],
            ["GET /v1/models application/json more"],
            ["POST /v1/x notatype"],
            ["/v1//models"],
            ["/v1/models/"],
            ["/v1/./models"],
            ["/v1/../models"],
            ["/v1/models?limit=1"],
            ["/v1/models#x"],
            ["/v1/models%20"],
            ["/v1/models;x"],
            ["/v1\\models"],
            ["/v1/mödels"],
            ["/v1/" + "x" * 1100],
            ["https://api.example.com/v1/models"],
            ["GET /healthz"],
            ["HEAD /"],
            ["G(T /v1/models"],
            ["/v1/**"],
            ["GET /v1/**/models"],
            ["/v1/a**b"],
            ["/v1/*a*b*"],
            ["/v1/*-*-*-*"],
            ["/v1/models", 5],
            ["/v1/models", "/v1//models"],
        )
        self.assert_each_wrong("allowed_paths", values)

    def test_client_token_env_is_the_name_of_a_variable(self):
        self.assert_each_wrong("client_token_env", by_repr(ABSENT, "", 5, True, ["A"], {"name": "A"}, "A=B", "A\0B"))

    def test_secret_source_is_one_of_three_kinds(self):
        command = {"kind": "command", "argv": ["true"]}
        values = by_repr(
            ABSENT,
            None,
            "env",
            [],
            {},
            {"name": "X"},
            {"kind": "vault"},
            {"kind": "ENV", "name": "X"},
            {"kind": None},
            {"kind": ["env"]},
            {"kind": "env"},
            {"kind": "env", "name": ""},
            {"kind": "env", "name": 5},
            {"kind": "env", "name": "X=Y"},
            {"kind": "env", "name": SECRET_VARIABLE, "argv": ["x"]},
            {"kind": "env", "nmae": SECRET_VARIABLE},
            {"kind": "none", "name": "X"},
            {"kind": "command"},
            {"kind": "command", "argv": []},
            {"kind": "command", "argv": "op read x"},
            {"kind": "command", "argv": [5]},
            {"kind": "command", "argv": ["op", None]},
            {"kind": "command", "argv": [""]},
            {"kind": "command", "argv": ["op", "a\0b"]},
            {**command, "shell": True},
            {**command, "timeout_seconds": 0},
            {**command, "timeout_seconds": -1},
            {**command, "timeout_seconds": "60"},
            {**command, "timeout_seconds": True},
            {**command, "cache_seconds": -1},
            {**command, "cache_seconds": "3600"},
            {**command, "cache_seconds": None},
        )
        self.assert_each_wrong("secret_source", values)

    def test_auth_header_is_a_header_name(self):
        values = by_repr("", "X Y", "X:", "X\r\nY", "X\0", "Ü", 5, None, ["Authorization"])
        self.assert_each_wrong("auth_header", values)

    def test_auth_scheme_is_a_word_or_nothing(self):
        self.assert_each_wrong("auth_scheme", by_repr("Bear\r\ner", "Bearer\n", "é", "a\0b", 5, None, ["Bearer"]))

    def test_extra_headers_are_names_and_values(self):
        values = by_repr(
            None,
            [],
            "X: y",
            {"": "y"},
            {"X Y": "z"},
            {"X:": "y"},
            {"X\r\nY": "z"},
            {"X": 5},
            {"X": None},
            {"X": ["y"]},
            {"X": "a\r\nY: z"},
            {"X": "a\nb"},
            {"X": "a\0b"},
        )
        self.assert_each_wrong("extra_headers", values)

    def test_allowed_hosts_are_host_names(self):
        values = by_repr(None, "localhost", [5], [""], ["a b"], ["http://localhost"], ["a/b"], ["a\nb"], {"a": 1})
        self.assert_each_wrong("allowed_hosts", values)

    def test_limits_are_whole_numbers_above_zero(self):
        for key in ("max_request_bytes", "max_concurrent_requests"):
            self.assert_each_wrong(key, by_repr(0, -1, "100", 1.5, True, None, [1]))

    def test_upstream_timeout_is_a_time(self):
        self.assert_each_wrong("upstream_timeout_seconds", by_repr(0, -1, "600", True, None, [1]))

    def test_event_log_is_a_path(self):
        self.assert_each_wrong("event_log", by_repr("", 5, None, True, ["events.jsonl"], "a\0b"))


class AtTheStart(ConfigTestCase):
    def test_a_wrong_value_of_any_key_is_the_end_of_it(self):
        wrong = {
            "listen_host": "0.0.0.0",
            "listen_port": -1,
            "mode": "live",
            "upstream_base_url": "http://api.example.com",
            "allowed_paths": [],
            "client_token_env": ABSENT,
            "secret_source": {"kind": "vault"},
            "auth_header": "X Y",
            "auth_scheme": "é",
            "extra_headers": {"X": 5},
            "allowed_hosts": ["a b"],
            "max_request_bytes": 0,
            "max_concurrent_requests": True,
            "upstream_timeout_seconds": 0,
            "event_log": "",
        }
        for key, call in run_each({key: {"config": {key: value}} for key, value in wrong.items()}).items():
            with self.subTest(key):
                self.assert_wrong(call(), "broker_config.json", key)


class RightValue(FilesTestCase):
    dry_run = True

    def test_of_every_key_is_let_in(self):
        command = {"kind": "command", "argv": ["op", "read", "op://a/b/c"], "timeout_seconds": 5, "cache_seconds": 0}
        values = {
            "listen_host": ["127.0.0.1", ABSENT],
            "listen_port": [0, 1024, 65535, ABSENT],
            "mode": ["proxy", "dry_run"],
            "upstream_base_url": [
                "https://api.example.com",
                "https://api.example.com/",
                "https://api.example.com:8443/base/path",
                "https://192.0.2.1",
                "https://[2001:db8::1]:8443/v1",
                "http://127.0.0.1:11434",
                "http://localhost:11434/api",
                "http://[::1]:11434",
            ],
            "allowed_paths": [
                ["/"],
                ["/v1/messages"],
                ["GET /v1/models/*"],
                ["/v1beta/models/*:generateContent"],
                ["/v1/*-*/*.*"],
                ["/openai/deployments/*/chat/completions"],
                ["POST /v1/audio/transcriptions multipart/form-data"],
                ["PATCH /v1/a", "DELETE /v1/a", "OPTIONS /v1/a"],
                ["GET /v1/AZaz09._~:@+,=-"],
            ],
            "secret_source": [command, {"kind": "none"}, {"kind": "env", "name": "ANYTHING"}],
            "auth_header": ["x-api-key", "api-key", ABSENT],
            "auth_scheme": ["", "Bearer", "Token", ABSENT],
            "extra_headers": [{}, {"anthropic-version": "2023-06-01", "X-Json": '{"a": [1, "b;c"]}'}],
            "allowed_hosts": [["127.0.0.1", "localhost", "host.docker.internal"], ["broker"]],
            "max_request_bytes": [1, 1 << 27],
            "upstream_timeout_seconds": [1, 0.5, 3600],
            "max_concurrent_requests": [1, 1000],
            "event_log": ["log.jsonl", ABSENT],
            "client_token_env": [None, "SOME_TOKEN", ABSENT],
        }
        texts = {
            f"{key}: {value!r}": json.dumps(make_config(NOBODY, {key: value}))
            for key, choices in values.items()
            for value in choices
        }
        self.assert_each_taken(texts)


class WrongFile(FilesTestCase):
    def test_is_told_in_one_line(self):
        cases = {
            "empty": "",
            "no JSON": "listen_port = 8791",
            "cut off": "{" + WHOLE,
            "a comma too many": "{" + WHOLE + ",}",
            "a comment": "{ // hello\n" + WHOLE + "}",
            "something behind": "{" + WHOLE + "} x",
            "a list": "[]",
            "null": "null",
            "a number": "5",
            "NaN": "{" + WHOLE + ', "upstream_timeout_seconds": NaN}',
            "Infinity": "{" + WHOLE + ', "upstream_timeout_seconds": Infinity}',
            "no UTF-8": b"{" + WHOLE.encode() + b', "event_log": "\xff"}',
            "too deep": '{"a": ' + "[" * 100000,
            "a number too long": '{"listen_port": ' + "1" * 10000 + "}",
        }
        self.assert_each_refused({case: (text, []) for case, text in cases.items()})
        with self.subTest("at the start"):
            self.assert_wrong(run_broker(config_text=cases["no JSON"], timeout=20), "broker_config.json")

    def test_with_a_number_that_is_none_names_the_key(self):
        key = "upstream_timeout_seconds"
        self.assert_each_refused({number: ("{" + WHOLE + f', "{key}": {number}}}', [key]) for number in ("1e999", "-1e999")})

    def test_with_a_key_twice_names_the_key(self):
        cases = {
            "at the top": ('"listen_port": 0,' + WHOLE, ["listen_port"]),
            "with the same value": (WHOLE + ', "mode": "proxy", "mode": "proxy"', ["mode"]),
            "in the secret source": (WHOLE.replace('"kind": "env"', '"kind": "none", "kind": "env"'), ["kind"]),
            "in the extra headers": (WHOLE + ', "extra_headers": {"X": "a", "X": "b"}', ["X"]),
        }
        self.assert_each_refused({case: ("{" + text + "}", keys) for case, (text, keys) in cases.items()})

    def test_with_an_unknown_key_names_it_and_the_nearest_known_one(self):
        cases = {
            "alowed_paths": "allowed_paths",
            "allowed_path": "allowed_paths",
            "listen_prot": "listen_port",
            "Mode": "mode",
            "upstream_url": "upstream_base_url",
            "client_token": "client_token_env",
            "max_request_byte": "max_request_bytes",
            "event-log": "event_log",
        }
        files = {key: ({key: 1}, [f'"{key}"', f'"{near}"']) for key, near in cases.items()}
        files["nothing near"] = ({"zzz": 1}, ['"zzz"'])
        source = {"kind": "command", "argv": ["true"], "timeout_second": 5}
        files["in the secret source"] = ({"secret_source": source}, ["timeout_second", "timeout_seconds"])
        self.assert_each_refused({case: (json.dumps(make_config(NOBODY, more)), words) for case, (more, words) in files.items()})

    def test_that_is_missing_or_a_folder_is_named(self):
        run = run_broker("--config", "nowhere.json", timeout=20)
        self.assert_wrong(run, "nowhere.json")
        folder = self.folder()
        run = run_broker("--config", folder, timeout=20)
        self.assertIn(folder, run.stderr)
        self.assertEqual((run.returncode, run.stderr.count("\n")), (2, 1))

    @posix_only
    def test_that_a_shell_hands_over_as_a_pipe_is_read(self):
        # `--config <(op inject …)` was told that "the output can't be written: No such file or directory".
        text = json.dumps(make_config(NOBODY, {"event_log": os.path.join(self.folder(), "events.jsonl")}))
        run = run_broker("--check", "--dry-run", "--config", "/dev/stdin", stdin=text, timeout=20)
        self.assertEqual(run.returncode, 0, run.stderr)

    def test_whose_text_would_play_with_the_terminal_is_shown_harmless(self):
        run = run_broker(config={"\x1b[31mred\x07": 1}, timeout=20)
        self.assert_wrong(run)
        self.assertTrue(run.stderr.strip("\n").isprintable(), repr(run.stderr))


class NoConfigNamed(ConfigTestCase):
    def file_for(self, folder, **overrides):
        config = {**json.loads("{" + WHOLE + "}"), **overrides}
        path = os.path.join(folder, "broker_config.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file)
        os.chmod(path, 0o600)

    def test_takes_the_one_in_the_current_folder(self):
        folder = self.folder()
        self.file_for(folder)
        run = run_broker("--check", cwd=folder)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("/v1/chat/completions", run.stdout + run.stderr)
        self.broker(use_config=False, cwd=folder)

    def test_runs_no_command_that_a_folder_brings(self):
        folder = self.folder()
        witness = os.path.join(folder, "ran")
        program = make_executable(folder, "op", f"touch '{witness}'; echo {canary()}\n")
        self.file_for(folder, secret_source={"kind": "command", "argv": [program]})
        cases = {"": [], "--check": ["--check"], "--port": ["--port", "0"]}
        calls = run_each({case: {"config": None, "args": args, "cwd": folder} for case, args in cases.items()})
        self.assertFalse(os.path.exists(witness))
        for case, call in calls.items():
            with self.subTest(case):
                self.assert_wrong(call(), "broker_config.json", "--config")
        with self.subTest("named, it may"):
            run = run_broker("--check", "--config", "broker_config.json", cwd=folder, timeout=20)
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertTrue(os.path.exists(witness))

    def test_and_none_there_says_what_to_do(self):
        run = run_broker(timeout=20)
        self.assert_wrong(run, "broker_config.json", "--config")


class TheToken(ConfigTestCase):
    WRONG = {
        "not set": ABSENT,
        "empty": "",
        "of 15 characters": "x" * 15,
        "with a blank": "x" * 20 + " " + "x" * 20,
        "with a tab": "x" * 20 + "\t" + "x" * 20,
        "with a line end": "x" * 40 + "\n",
        "not ASCII": "é" * 20,
    }

    @posix_only
    def test_is_refused_at_a_reload_too(self):
        names = {case: f"WRONG_{number}" for number, case in enumerate(self.WRONG)}
        broker = self.broker(env={names[case]: token for case, token in self.WRONG.items()})
        for case, name in names.items():
            with self.subTest(case):
                said = broker.reload({**broker.config, "client_token_env": name})
                self.assertIn(name, said)
                self.assertNotIn("x" * 15, said)
        self.assertEqual(broker.events("reload"), [])

    def test_must_be_there_and_of_16_visible_characters(self):
        runs = {case: {"token": token} for case, token in self.WRONG.items() if case in ("not set", "with a line end")}
        for case, future in run_each(runs).items():
            with self.subTest(case):
                run = future()
                self.assertEqual(run.returncode, 2, run.stderr)
                self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
                self.assertIn(TOKEN_VARIABLE, run.stderr)
                if case.startswith("with"):
                    self.assertNotIn("x" * 15, run.stderr)

    def test_of_16_characters_will_do(self):
        self.assertEqual(run_broker("--check", config={}, token="x!~" * 5 + "y").returncode, 0)

    def test_may_not_be_the_secret(self):
        secret = canary()
        run = run_broker(config={}, secret=secret, token=secret, timeout=20)
        self.assert_wrong(run, "broker_config.json", "client_token_env")

    @posix_only
    def test_may_not_be_the_secret_that_a_command_brings(self):
        folder = self.folder()
        token = canary()
        program = make_executable(folder, "op", f"echo {token}\n")
        source = {"kind": "command", "argv": [program]}
        run = run_broker(config={"secret_source": source}, token=token, timeout=20)
        self.assertEqual(run.returncode, 1, run.stderr)

    def test_may_be_done_without_only_where_the_default_hosts_are_let_in(self):
        runs = run_each(
            {
                "default": {"config": {"client_token_env": None}, "args": ["--check"]},
                "fewer": {"config": {"client_token_env": None, "allowed_hosts": ["localhost"]}, "args": ["--check"]},
                "more": {"config": {"client_token_env": None, "allowed_hosts": ["localhost", "broker"]}},
            }
        )
        self.assertEqual(runs["default"]().returncode, 0)
        self.assertEqual(runs["fewer"]().returncode, 0)
        self.assert_wrong(runs["more"](), "broker_config.json", "client_token_env", "allowed_hosts")

    def test_without_one_is_warned_about(self):
        run = run_broker("--check", config={"client_token_env": None})
        self.assertIn("warning", run.stderr.lower() + run.stdout.lower())


    def test_that_is_something_else_is_named_for_what_it_is_with_the_mend(self):
        token = canary()
        wrong = {
            "in quotes": (f'"{token}"', "in quotes: take them off"),
            "NAME=value": (f"BROKER_CLIENT_TOKEN={token}", "NAME=value: give the value alone"),
            "a comma": (token + ",", "ends in a comma: take it off"),
            "a byte-order mark": ("\ufeff" + token, "byte-order mark"),
            "a carriage return": (token + "\r", "carriage return"),
        }
        for case, call in run_each({case: {"token": value} for case, (value, _) in wrong.items()}).items():
            with self.subTest(case):
                run = call()
                self.assert_wrong(run, TOKEN_VARIABLE, wrong[case][1])
                self.assertNotIn(token, run.stderr)

    def test_in_a_dry_run_is_compared_with_no_secret_for_none_is_read(self):
        # A workshop's shell may hold the caller token as OPENAI_API_KEY, for the agent that is started there.
        token = fresh_token()
        runs = {
            "the same": {"secret": token},
            "no key": {"secret": "short"},
            "none": {"secret": ABSENT},
        }
        calls = run_each({case: {"args": ["--check", "--dry-run"], "token": token, **more} for case, more in runs.items()})
        for case, call in calls.items():
            with self.subTest(case):
                self.assertEqual(call().returncode, 0, call().stderr)
        broker = self.broker(dry_run=True, secret=token, token=token)
        self.assertEqual(broker.post_json("/v1/chat/completions", {"model": "m"}).status, 200)


class TheProxy(ConfigTestCase):
    """What HTTPS_PROXY says counts for an upstream that is not of this machine."""

    def test_that_cannot_be_used_is_a_configuration_error(self):
        config = {"upstream_base_url": "https://192.0.2.1", "secret_source": {"kind": "none"}}
        cases = {
            # urllib would speak to it in plain text.
            "TLS": "https://proxy.example:3128",
            "SOCKS": "socks5://proxy.example:1080",
            "a password that is no UTF-8": "http://user:%FF%FE@proxy.example:3128",
            "a password of other bytes": "http://user:\udcff\udcfe@proxy.example:3128",
            "no port": "http://proxy.example:port",
            "no host": "http://:3128",
            "another header": "http://proxy.example%0d%0aX:3128",
        }
        keywords = {case: {"config": config, "env": {"HTTPS_PROXY": url}} for case, url in cases.items()}
        for case, call in run_each(keywords).items():
            with self.subTest(case):
                run = call()
                self.assertEqual((run.returncode, run.stderr.count("\n")), (2, 1), run.stderr)
                self.assertIn("HTTPS_PROXY", run.stderr)
                self.assertIn("http://[user:password@]host[:port]", run.stderr)
                self.assertTrue(run.stderr.strip().isprintable())


class TheSecret(ConfigTestCase):
    def test_must_be_there_and_of_16_to_4096_visible_characters(self):
        cases = {
            # What else is none is tried with commands, which can be asked again and again.
            "not set": ABSENT,
            "empty": "",
            "of 15 characters": "s" * 15,
            "with a header of its own": "s" * 20 + "\r\nX-Evil: y",
        }
        runs = {case: {"secret": secret} for case, secret in cases.items()}
        for case, future in run_each(runs).items():
            with self.subTest(case):
                run = future()
                self.assertEqual(run.returncode, 1, run.stderr)
                self.assertEqual(run.stderr.count("\n"), 1, run.stderr)
                self.assertIn("broker_config.json", run.stderr)
                self.assertIn("secret_source", run.stderr)
                if case == "not set":
                    self.assertIn(SECRET_VARIABLE, run.stderr)
                self.assertNotIn("s" * 15, run.stderr)

    def test_of_16_and_of_4096_characters_and_with_one_line_end_will_do(self):
        secrets = ("s" * 16, "s" * 4096, "s" * 40 + "\r\n")
        for secret, run in run_each({secret: {"args": ["--check"], "secret": secret} for secret in secrets}).items():
            with self.subTest(len(secret)):
                self.assertEqual(run().returncode, 0, run().stderr)


@posix_only
class WhoMayWriteTheFiles(ConfigTestCase):
    def check_with(self, *args, file_mode=0o600, folder_mode=0o700, script=None, group=None):
        """The keywords of a --check with these modes."""

        def prepare(run):
            os.chmod(run.config_path, file_mode)
            os.chmod(run.folder, folder_mode)
            if group is not None:
                os.chown(run.config_path, -1, group)

        return {"args": ["--check", *args], "prepare": prepare, "script": script}

    def run_with(self, *args, **keywords):
        return run_each({"": self.check_with(*args, **keywords)})[""]()

    def test_a_configuration_or_folder_that_the_world_may_write_is_refused(self):
        keywords = {f"file {mode:o}": self.check_with(file_mode=mode) for mode in (0o602, 0o666, 0o777)}
        keywords.update({f"folder {mode:o}": self.check_with(folder_mode=mode) for mode in (0o777, 0o703)})
        for case, call in run_each(keywords).items():
            with self.subTest(case):
                run = call()
                self.assertEqual(run.returncode, 2, run.stderr)
                self.assertIn("broker_config.json" if case.startswith("file") else os.path.dirname(run.config_path), run.stderr)

    def test_a_sticky_folder_will_do_and_a_dry_run_only_warns(self):
        keywords = {
            "sticky": self.check_with(folder_mode=0o1777),
            "dry-run": self.check_with("--dry-run", file_mode=0o666),
        }
        calls = run_each(keywords)
        self.assertEqual(calls["sticky"]().returncode, 0, calls["sticky"]().stderr)
        run = calls["dry-run"]()
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("warning", (run.stderr + run.stdout).lower())

    def test_a_broker_that_the_world_may_write_is_refused_and_so_is_its_folder(self):
        folder = self.folder()
        script = shutil.copy(BROKER, folder)
        self.assertEqual(self.run_with(script=script).returncode, 0)
        os.chmod(script, 0o666)
        run = self.run_with(script=script)
        self.assertEqual(run.returncode, 2, run.stderr)
        self.assertIn("broker.py", run.stderr)
        os.chmod(script, 0o644)
        os.chmod(folder, 0o777)
        self.assertEqual(self.run_with(script=script).returncode, 2)

    def open_places(self):
        """{case: (configuration to name, folder that others may write)}: each is one on the way to a file that is closed."""
        places = {}
        for case in ("the folder of a link", "the folder of a link to its folder", "a folder above", "two folders above"):
            root = self.folder()
            for name in ("open", "closed", "open/above", "open/above/own"):
                os.mkdir(os.path.join(root, name), 0o700)
            places[case] = root, os.path.join(root, "open")
        for case, (root, folder) in places.items():
            link = os.path.join(root, "open", "link")
            if case == "the folder of a link":
                os.symlink(os.path.join(root, "closed", "broker_config.json"), link)
                places[case] = "closed", link, folder
            elif case == "the folder of a link to its folder":
                os.symlink(os.path.join(root, "closed"), link)
                places[case] = "closed", os.path.join(link, "broker_config.json"), folder
            elif case == "a folder above":
                places[case] = "open/above", os.path.join(root, "open", "above", "broker_config.json"), folder
            else:
                places[case] = "open/above/own", os.path.join(root, "open", "above", "own", "broker_config.json"), folder
            with open(os.path.join(root, places[case][0], "broker_config.json"), "w", encoding="utf-8") as file:
                json.dump(make_config(NOBODY, {}), file)
            os.chmod(file.name, 0o600)
            places[case] = places[case][1:]
        return places

    def test_a_folder_anywhere_on_the_way_that_the_world_may_write_is_refused(self):
        # Attack: who may write it puts another link, or another folder, in the place of ours.
        places = self.open_places()
        runs = {case: {"config": None, "args": ["--check", "--config", path]} for case, (path, _) in places.items()}
        for mode, code in {0o700: 0, 0o777: 2, 0o1777: 0}.items():
            for _, folder in places.values():
                os.chmod(folder, mode)
            for case, call in run_each(runs).items():
                with self.subTest(case, mode=oct(mode)):
                    run = call()
                    self.assertEqual(run.returncode, code, run.stderr)
                    if code:
                        self.assertEqual(run.stderr.count("\n"), 1)
                        self.assertIn(f"chmod o-w {places[case][1]}", run.stderr)
                        self.assertIn("move the files", run.stderr)

    def test_a_folder_on_the_way_that_was_opened_meanwhile_stops_a_reload(self):
        places = self.open_places()
        arguments = {"use_config": False, "args": ["--config"]}
        brokers = self.brokers({case: {**arguments, "args": ["--config", path]} for case, (path, _) in places.items()})
        for case, broker in brokers.items():
            with self.subTest(case):
                folder = places[case][1]
                os.chmod(folder, 0o777)
                said = broker.reload()
                self.assertIn("nothing was changed", said)
                self.assertIn(f"chmod o-w {folder}", said)
                os.chmod(folder, 0o700)
                self.assertNotIn("nothing was changed", broker.reload())

    def test_a_group_of_strangers_is_warned_about(self):
        quiet = self.run_with()
        if os.getuid() == 0:
            loud = self.run_with(file_mode=0o660, group=12345)
        else:
            others = [group for group in os.getgroups() if group != os.getgid()]
            if not others:
                self.skipTest("this user is in no second group")
            loud = self.run_with(file_mode=0o660, group=others[0])
        self.assertEqual((quiet.returncode, loud.returncode), (0, 0), loud.stderr)
        warned = [(run.stderr + run.stdout).lower().count("warning") for run in (quiet, loud)]
        self.assertEqual(warned[1], warned[0] + 1, loud.stderr)

    def test_a_planted_module_beside_the_broker_is_not_loaded(self):
        folder = self.folder()
        script = shutil.copy(BROKER, folder)
        witness = os.path.join(folder, "loaded")
        for name in ("ssl", "json", "http", "argparse", "ctypes", "sitecustomize"):
            with open(os.path.join(folder, name + ".py"), "w", encoding="utf-8") as file:
                file.write(f"open({witness!r}, 'w').close()\nraise SystemExit('planted')\n")
        run = self.run_with(script=script)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertFalse(os.path.exists(witness))

    def test_a_planted_module_in_the_current_folder_is_not_loaded(self):
        folder = self.folder()
        with open(os.path.join(folder, "ssl.py"), "w", encoding="utf-8") as file:
            file.write("raise SystemExit('planted')\n")
        run = run_broker("--check", config={}, cwd=folder, script=BROKER)
        self.assertEqual(run.returncode, 0, run.stderr)


class TheEventLogFile(ConfigTestCase):
    def test_that_cannot_be_written_is_an_operational_failure(self):
        folder = self.folder()

        def as_folder(run):
            os.mkdir(run.log_path)

        cases = {
            "its folder is missing": {"config": {"event_log": "nowhere/events.jsonl"}},
            "it is a folder": {"prepare": as_folder},
            "a file stands where its folder should": {"config": {"event_log": "broker_config.json/events.jsonl"}},
        }
        if os.name == "posix":
            elsewhere = os.path.join(folder, "elsewhere")
            cases["it is a link"] = {"prepare": lambda run: os.symlink(elsewhere, run.log_path)}
            cases["it is a FIFO"] = {"prepare": lambda run: os.mkfifo(run.log_path)}
        for case, future in run_each(cases).items():
            with self.subTest(case):
                run = future()
                self.assertEqual(run.returncode, 1, run.stderr)
                self.assertIn("event_log", run.stderr)
        self.assertEqual(os.listdir(folder), [])

    @posix_only
    def test_is_made_for_its_user_alone_beside_the_configuration(self):
        previous = os.umask(0)
        try:
            broker = self.broker(dry_run=True, cwd=self.folder())
        finally:
            os.umask(previous)
        broker.wait_event(event="start")
        self.assertEqual(os.stat(os.path.join(broker.folder, "events.jsonl")).st_mode & 0o7777, 0o600)


class WithoutTheStandardPlaces(ConfigTestCase):
    def test_it_starts_with_an_empty_environment(self):
        folder = self.folder()
        path = os.path.join(folder, "broker_config.json")
        with open(path, "w", encoding="utf-8") as file:
            file.write("{" + WHOLE + "}")
        os.chmod(path, 0o600)
        env = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
        argv = [sys.executable, BROKER, "--check", "--dry-run", "--config", path]
        run = subprocess.run(argv, env=env, capture_output=True, cwd=folder, timeout=30)
        self.assertEqual(run.returncode, 0, run.stderr)


if __name__ == "__main__":
    unittest.main()
