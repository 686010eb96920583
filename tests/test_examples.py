"""The example configurations: they load as they stand, and work with the programs that they name."""

import json
import os
import shutil
import sys
import unittest

from tests.support import (
    ABSENT,
    ROOT,
    BrokerTestCase,
    canary,
    fresh_token,
    make_executable,
    posix_only,
    run_broker,
)

PLAIN = "broker_config.example.json"
ONE_PASSWORD = "broker_config.1password.example.json"
AZURE = "broker_config.azure-keyvault.example.json"
EXAMPLES = (PLAIN, ONE_PASSWORD, AZURE)


def load(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return json.load(file)


class Examples(BrokerTestCase):
    def test_are_these_and_no_others(self):
        found = {name for name in os.listdir(ROOT) if name.startswith("broker_config.") and ".example." in name}
        self.assertEqual(found, set(EXAMPLES))

    def test_are_valid_as_they_stand(self):
        for name in EXAMPLES:
            with self.subTest(name):
                run = run_broker("--check", "--dry-run", "--config", os.path.join(ROOT, name))
                self.assertEqual(run.returncode, 0, run.stderr)
                for rule in load(name)["allowed_paths"]:
                    self.assertIn(rule, run.stdout + run.stderr)

    def test_serve_a_dry_run_as_they_stand(self):
        for name in EXAMPLES:
            with self.subTest(name):
                # A copy: its event log is written beside it.
                folder = self.folder()
                shutil.copy(os.path.join(ROOT, name), folder)
                arguments = ["--config", os.path.join(folder, name), "--dry-run", "--port", "0"]
                broker = self.broker(use_config=False, folder=folder, args=arguments)
                token = broker.wait_stderr(r"(?m)^\s*export BROKER_CLIENT_TOKEN=(\S+)$").group(1)
                rule = load(name)["allowed_paths"][0].partition(" ")[2].replace("*", "mine")
                answer = broker.post_json(rule, {"model": "m", "messages": []}, token=token)
                self.assertEqual(answer.status, 200, answer)
                self.assertIn(load(name)["upstream_base_url"], answer.body.decode())

    def test_let_codex_work_through_a_long_session(self):
        # In the middle of one it calls another path, and without that the session is lost.
        rules = load(PLAIN)["allowed_paths"]
        for path in ("POST /v1/responses", "POST /v1/responses/compact"):
            self.assertIn(path, rules)

    def test_ask_for_a_token_and_hold_no_secret(self):
        for name in EXAMPLES:
            with self.subTest(name):
                config = load(name)
                self.assertEqual(config["client_token_env"], "BROKER_CLIENT_TOKEN")
                self.assertIn(config["secret_source"]["kind"], ("env", "command"))
                self.assertTrue(config["upstream_base_url"].startswith("https://"))

    def test_tell_what_is_missing_when_they_are_started_for_real(self):
        # Nothing is installed or set here; that must be one clear line.
        for name, missing in {PLAIN: "OPENAI_API_KEY", ONE_PASSWORD: "op", AZURE: "az"}.items():
            with self.subTest(name):
                folder = self.folder()
                shutil.copy(os.path.join(ROOT, name), folder)
                env = {"PATH": folder, "BROKER_CLIENT_TOKEN": fresh_token()}
                arguments = ["--config", os.path.join(folder, name), "--port", "0"]
                run = run_broker(*arguments, env=env, timeout=20)
                self.assertEqual(run.returncode, 1, run.stderr)
                self.assertIn(missing, run.stderr)
                self.assertEqual(run.stderr.count("\n"), 1, run.stderr)


class PlainExample(BrokerTestCase):
    def test_puts_the_key_where_openai_wants_it(self):
        stub, config = self.stub(), load(PLAIN)
        config["upstream_base_url"], config["listen_port"] = stub.url, 0
        secret, token = canary(), fresh_token()
        env = {"BROKER_CLIENT_TOKEN": token, "OPENAI_API_KEY": secret}
        broker = self.broker(stub, config_text=json.dumps(config), secret=secret, token=token, env=env)
        self.assertEqual(broker.post_json("/v1/chat/completions", {"model": "m"}).status, 200)
        self.assertEqual(stub.requests[0].header("Authorization"), "Bearer " + secret)
        self.assertEqual(broker.post_json("/v1/messages", {"model": "m"}).status, 403)


# Stands in for `op` and `az`: the words that it is called with are the whole of its interface.
VAULT = """
import json, os, sys
folder = os.path.dirname(os.path.realpath(__file__))
with open(os.path.join(folder, "wanted.json")) as file:
    wanted = json.load(file)
with open(os.path.join(folder, "calls"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1:] != wanted["words"]:
    sys.exit(f"unknown command {sys.argv[1:]!r}")
print(wanted["secret"])
"""


@posix_only
class ExampleWithAVault(BrokerTestCase):
    def serve(self, example, program, words):
        """The example for real: only its upstream and its port are others."""
        stub, config = self.stub(), load(example)
        config["upstream_base_url"], config["listen_port"] = stub.url, 0
        secret, token, folder = canary(), fresh_token(), self.folder()
        self.program = make_executable(folder, program, VAULT, sys.executable)
        with open(os.path.join(folder, "wanted.json"), "w", encoding="utf-8") as file:
            json.dump({"words": words, "secret": secret}, file)
        env = {
            "PATH": folder + os.pathsep + os.environ["PATH"],
            "BROKER_CLIENT_TOKEN": token,
            "BROKER_TEST_SECRET": ABSENT,
            "BROKER_TEST_TOKEN": ABSENT,
        }
        self.calls = os.path.join(folder, "calls")
        broker = self.broker(stub, config_text=json.dumps(config), secret=secret, token=token, env=env)
        broker.wait_stderr(self.program)
        return broker

    def assert_asked_once(self, words):
        with open(self.calls, encoding="utf-8") as file:
            self.assertEqual([json.loads(line) for line in file], [words])

    def test_1password_is_asked_as_its_command_line_wants_it(self):
        words = ["read", "op://Private/Anthropic/credential"]
        broker = self.serve(ONE_PASSWORD, "op", words)
        stub = broker.upstream
        for path in ("/v1/messages?beta=true", "/v1/messages/count_tokens"):
            headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "tools-2024"}
            self.assertEqual(broker.post_json(path, {"model": "m"}, headers).status, 200)
            request = stub.requests[-1]
            self.assertEqual(request.target, path)
            self.assertEqual(request.header("x-api-key"), broker.secret)
            self.assertEqual(request.header("anthropic-version"), "2023-06-01")
            self.assertEqual(request.header("anthropic-beta"), "tools-2024")
            self.assertIsNone(request.header("Authorization"))
        self.assertEqual(broker.request("GET", "/v1/models").status, 200)
        self.assertEqual(broker.post_json("/v1/files", {}).status, 403)
        self.assert_asked_once(words)

    def test_azure_key_vault_is_asked_as_its_command_line_wants_it(self):
        words = "keyvault secret show --vault-name my-vault --name azure-openai-key --query value -o tsv".split()
        broker = self.serve(AZURE, "az", words)
        path = "/openai/deployments/mine/chat/completions?api-version=2024-10-21"
        self.assertEqual(broker.post_json(path, {"messages": []}).status, 200)
        (request,) = broker.upstream.requests
        self.assertEqual(request.target, path)
        self.assertEqual(request.header("api-key"), broker.secret)
        self.assertIsNone(request.header("Authorization"))
        self.assertEqual(broker.post_json("/openai/deployments/mine/images/generations", {}).status, 403)
        self.assert_asked_once(words)


if __name__ == "__main__":
    unittest.main()
