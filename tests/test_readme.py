"""README.md says what the program does: its commands are run as a reader would run them, and its tables are compared
with what `broker.py` knows.

A `console` block is a transcript: each line that begins with `$ ` is run, in the README's order and in a fresh folder,
and what follows is what it prints; a `text` block is what terminal 1 shows meanwhile. `…` stands for anything; times,
ids and tokens may differ. An `sh` block is shown only. The exercises are done by `python tests/guards.py`: the line is
taken out, the attack must work, and the test named must go red.
"""

import ast
import glob
import importlib.util
import json
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest

import broker
from tests.guards import readme_rows
from tests.support import (
    ABSENT,
    ROOT,
    SECRET_VARIABLE,
    BrokerTestCase,
    canary,
    eventually,
    free_port,
    linux_only,
    make_executable,
    minimal_environment,
    posix_only,
    run_broker,
    run_each,
)
from tests.terminal import Terminal

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()
with open(os.path.join(ROOT, "broker.py"), encoding="utf-8") as file:
    SOURCE = file.read()
EXAMPLE = "broker_config.example.json"
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.M | re.S)
needs_curl = unittest.skipUnless(shutil.which("curl"), "curl is not installed")


def blocks(language):
    """The fenced blocks of a language, in order, without their indent."""
    return [re.sub(f"(?m)^{found[1]}", "", found[3]) for found in BLOCK.finditer(README) if found[2] == language]


def section(title):
    """What stands under a headline, up to the next one of its rank or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n", README, re.M)
    assert found, f"the README has no section {title!r}"
    text = re.sub(r"(?ms)^```.*?^```$", lambda block: re.sub("(?m)^#", " #", block[0]), README[found.end() :])
    return re.split(rf"(?m)^#{{1,{len(found[1])}}} ", text)[0]


def rows(title, columns):
    """The cells of the first table with so many columns in a section, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    ends = [at for at, line in enumerate(lines) if line.startswith("|--")] + [len(lines) + 1]
    for begin, end in zip(ends, ends[1:]):
        if len(cells[begin]) == columns:
            return cells[begin + 1 : end - 1]
    raise AssertionError(f"{title!r} has no table of {columns} columns")


(AGENT,) = [("agent.py", program) for program in blocks("python") if "sk-workshop" in program]
(CLASS,) = [("class.json", config) for config in blocks("json") if "STUDENT_TOKEN" in config]


def words(cell):
    """What stands in backquotes in a cell."""
    return re.findall("`([^`]+)`", cell)


def same_shape(text):
    """The text with all that may differ between two runs made alike."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
    text = re.sub(r'"(id|_ms|\w+_ms)":("[0-9a-f]{16}"|[0-9.]+)', r'"\1":0', text)
    text = re.sub(r"\d{4}-\d\d-\d\d", "DAY", text)
    text = re.sub(r"(?m)^\d\d:\d\d:\d\d (.*) \d+ ms", r"CLOCK \1 MS", text.replace("\r\n", "\n"))
    return re.sub(r"(?m)[ \t]{2,}| +$", "  ", text).strip()


def pattern(expected):
    """A regular expression for what is printed."""
    return ".*?".join(re.escape(part) for part in same_shape(expected).split("…"))


# ------------------------------------------------------------------------------------------------
# The commands


class Reader(BrokerTestCase):
    """Somebody with the README in one folder: a shell that keeps its exports, and a broker in terminal 1."""

    def setUp(self):
        super().setUp()
        self.place = self.folder()
        self.port = free_port()
        for path in glob.glob(os.path.join(ROOT, "broker*.*")):
            shutil.copy(path, self.place)
        self.write(EXAMPLE, self.read(EXAMPLE).replace("8791", str(self.port)))
        for program in (AGENT, CLASS):
            self.write(*program)
        programs = self.folder()
        for name in ("python", "python3"):
            make_executable(programs, name, f'exec "{sys.executable}" "$@"')
        path = programs + os.pathsep + os.environ.get("PATH", os.defpath)
        self.env = minimal_environment({"PATH": path, "HOME": self.place})
        self.exports = ""
        self.server = self.terminal = None
        self.key = canary()

    def read(self, name):
        with open(os.path.join(self.place, name), encoding="utf-8") as file:
            return file.read()

    def write(self, name, text):
        if name == CLASS[0]:
            text = json.dumps({"listen_port": self.port, **json.loads(text)})
        with open(os.path.join(self.place, name), "w", encoding="utf-8") as file:
            file.write(text)

    def do(self, command):
        """Runs one command line as the reader's shell; what it prints."""
        if command.startswith("export "):
            self.exports += command + "\n"
            return ""
        if command.startswith("python3 broker.py --config") and command.endswith(("--dry-run", ".json")):
            return self.serve([word.replace("~", self.place) for word in shlex.split(command)[2:]])
        run = subprocess.run(
            ["sh", "-c", self.exports + command],
            cwd=self.place,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=20,
        )
        return run.stdout.decode()

    def serve(self, args):
        """Ctrl-C in terminal 1, then the broker anew, there; what it prints. Asked for the key, the reader types it."""
        self.stop()
        env = {name: self.do(f"printf %s ${name}") or ABSENT for name in ("BROKER_CLIENT_TOKEN", "STUDENT_TOKEN")}
        self.terminal = Terminal(self)
        self.server = self.broker(
            use_config=False,
            args=args,
            folder=self.place,
            script=os.path.join(self.place, "broker.py"),
            env=env,
            secret=self.key,
            preexec_fn=self.terminal.attach_stderr,
            wait_ready=False,
        )
        if "--dry-run" not in args:
            self.terminal.wait_for("(it will not be shown): ")
            self.terminal.type(self.key + "\n")
        return eventually(self.ready, what="the broker in terminal 1")

    def ready(self):
        """What it printed, once it is all there."""
        shown = self.terminal.read().decode()
        if self.server.process.poll() is not None:
            raise AssertionError(f"it ended: {shown}")
        return re.search(r"export OPENAI_BASE_URL.*\n", shown) and shown

    def stop(self):
        if self.server is not None:
            os.write(self.terminal.master, b"\x03")
            self.assertEqual(self.server.wait(), 0)
            self.server.close()


# What the provider answers.
COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "gpt-4o-mini",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello!"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10},
}


@posix_only
@needs_curl
class Transcripts(Reader):
    """All `console` blocks, from the first to the last, by one reader in one folder."""

    def setUp(self):
        super().setUp()
        self.provider = self.stub(lambda conn, _: conn.respond_json(COMPLETION, headers={"x-request-id": "req-1"}))

    def test_are_what_a_reader_sees(self):
        ran = []
        for _, language, block in BLOCK.findall(README):
            block = block.replace("8791", str(self.port))
            if language == "text":
                with self.subTest(block):
                    line = rf"(?ms)^{pattern(block)}$"
                    eventually(lambda: re.search(line, same_shape(self.terminal.read().decode())), 3, line)  # noqa: B023
            if language != "console":
                continue
            for step in re.split(r"(?m)^\$ ", block)[1:]:
                command, _, expected = step.partition("\n")
                with self.subTest(command):
                    printed = self.do(command)
                    self.assertRegex(same_shape(printed), rf"(?s)\A{pattern(self.here(expected))}\Z")
                if command.startswith("sed "):
                    self.move_to_the_stub(command.split()[-1])
                ran.append(command)
        self.assertGreater(len(ran), 30)
        self.assert_first_real_call()

    def move_to_the_stub(self, config):
        """Step 6 is in earnest, and the provider of a test a stub."""
        config = config.replace("~/", "")
        self.write(config, self.read(config).replace("https://api.openai.com", self.provider.url))

    def assert_first_real_call(self):
        (request,) = self.provider.requests
        self.assertEqual((request.target, request.json()["max_tokens"]), ("/v1/chat/completions", 16))
        self.assertEqual(request.header("Authorization"), "Bearer " + self.key)
        self.assertIsNone(request.header("X-Broker-Token"))
        # "In no environment, history or file."
        for folder, _, names in os.walk(self.place):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    self.assertNotIn(self.key.encode(), file.read(), name)
        self.assertNotIn(self.key.encode(), self.terminal.read())

    @staticmethod
    def here(expected):
        """Nothing is closed to root, and only Linux has /proc."""
        closed = sys.platform == "linux" and os.geteuid() != 0
        return expected if closed else expected.replace("my parent's Permission denied", "my parent's …")


class Requests(BrokerTestCase):
    def test_leave_and_arrive_as_the_first_page_shows_them(self):
        sent, arrived = (block.rstrip("\n").replace("\n", "\r\n").encode() for block in blocks("http"))
        stub = self.stub(tls=True)
        running = self.broker(stub)
        answers = running.raw_answers(
            sent.replace(b"CALLER-TOKEN", running.token.encode()).replace(b"Cookie", b"Connection: close\r\nCookie")
        )
        self.assertEqual([answer.status for answer in answers], [200])
        seen = stub.requests[0].head + stub.requests[0].body
        wanted = arrived.replace(b"PROVIDER-KEY", running.secret.encode())
        wanted = wanted.replace(b"api.openai.com", stub.url.partition("//")[2].encode())
        self.assertEqual(seen, wanted)


class Programs(BrokerTestCase):
    """The Python programs, in a dry-run of the example whose provider they call."""

    def test_run_as_they_stand(self):
        programs = [program for program in blocks("python") if program.startswith("from ")]
        self.assertEqual(len(programs), 2)
        for program in programs:
            package = re.match(r"from (\w+) import", program)[1]
            with self.subTest(package):
                ast.parse(program)
                if importlib.util.find_spec(package) is None:
                    self.skipTest(f"the {package} SDK for Python is not installed")
                example = {"openai": EXAMPLE, "anthropic": "broker_config.1password.example.json"}[package]
                folder = self.folder()
                shutil.copy(os.path.join(ROOT, example), folder)
                args = ["--config", os.path.join(folder, example), "--dry-run"]
                run = run_broker(*args, command=[sys.executable, "-c", program], show_token=True)
                self.assertEqual(run.returncode, 0, run.stderr)
                self.assertTrue(run.stdout.startswith("DRY RUN: the broker would send POST https://api."), run.stdout)


class Configurations(BrokerTestCase):
    def assert_load(self, configs):
        """Each of {case: configuration} passes `--check` in a dry run."""
        cases = {case: {"args": ["--check", "--dry-run"], "config_text": json.dumps(config)} for case, config in configs.items()}
        for case, run in run_each(cases).items():
            with self.subTest(case):
                self.assertEqual(run().returncode, 0, run().stderr)

    def test_that_are_whole_load(self):
        whole = {", ".join(config): config for config in map(json.loads, blocks("json")) if "clients" in config}
        self.assertEqual(len(whole), 2)
        self.assert_load(whole)

    def test_of_providers_load_alone_and_together(self):
        source = {"secret_source": {"kind": "env", "name": "PROVIDER_KEY"}}
        together = {name: {**source, **json.loads(words(entry)[0])} for name, entry in rows("Providers", 2)}
        providers = ["openai", "anthropic", "azure", "gemini", "openrouter", "groq", "mistral", "vertex", "ollama", "github"]
        self.assertEqual(list(together), providers)
        each = {name: {name: part} for name, part in together.items()}
        token = {"client_token_env": "BROKER_CLIENT_TOKEN"}
        self.assert_load({name: {**token, "upstreams": part} for name, part in {**each, "all": together}.items()})

    def test_of_vertex_sends_where_its_openai_compatible_calls_go(self):
        vertex = json.loads(dict((name, words(entry)[0]) for name, entry in rows("Providers", 2))["vertex"])
        stub, path = self.stub(), re.sub("https://[^/]+", "", vertex["base_url"])
        self.assertRegex(path, r"^/v1/projects/[^/]+/locations/[^/]+/endpoints/openapi$")
        vertex.update(base_url=stub.url + path, secret_source={"kind": "env", "name": SECRET_VARIABLE})
        short = {key: ABSENT for key in ("upstream_base_url", "allowed_paths", "secret_source")}
        running = self.broker(stub, config={**short, "upstreams": {"vertex": vertex}})
        self.assertEqual(running.post_json(vertex["prefix"] + "/chat/completions", {"model": "google/m"}).status, 200)
        self.assertEqual(stub.requests[0].target, path + "/chat/completions")
        self.assertEqual(stub.requests[0].header("Authorization"), "Bearer " + running.secret)

    def test_of_allowed_paths_are_rules(self):
        rules = re.findall(r'`"([A-Z/][^`"]*)"`', section("Allowed paths"))
        self.assertGreaterEqual(len(rules), 5)
        run = run_broker("--check", "--dry-run", config={"allowed_paths": rules})
        self.assertEqual(run.returncode, 0, run.stderr)


# Stands in for a vault's program, which prints a key for these words and no others.
VAULT = """
import os, sys
with open(os.environ["VAULT_CALLS"], "a") as file:
    print(*sys.argv[1:], file=file)
if " ".join(sys.argv[1:]) != os.environ["VAULT_WORDS"]:
    sys.exit("unknown words")
print(os.environ["VAULT_SECRET"])
"""
VAULT_WORDS = {
    "1Password": "op read op://Private/OpenAI/credential",
    "Azure Key Vault": "az keyvault secret show --vault-name my-vault --name openai-key --query value -o tsv",
    "Azure, for an hour": "az account get-access-token --resource https://cognitiveservices.azure.com --query accessToken -o tsv",
    "Google, for an hour": "gcloud auth print-access-token",
    "AWS Secrets Manager": (
        "aws secretsmanager get-secret-value --secret-id openai-key --query SecretString --output text"
    ),
    "HashiCorp Vault": "vault kv get -field=key secret/openai",
    "Bitwarden": "bw get password openai",
    "macOS keychain": "security find-generic-password -s openai -w",
    "Secret Service": "secret-tool lookup service openai",
    "pass": "pass show api/openai",
}


class Recipes(BrokerTestCase):
    """Where the key lives: each row's secret source, with a stand-in for the store."""

    def recipes(self):
        return {store: json.loads(words(source)[0]) for store, _, source in rows("Where your key lives", 3)}

    def test_load(self):
        self.assertGreaterEqual(len(self.recipes()), 12)
        check = ["--check", "--dry-run"]
        runs = run_each({store: {"args": check, "config": {"secret_source": source}} for store, source in self.recipes().items()})
        for store, run in runs.items():
            with self.subTest(store):
                self.assertEqual(run().returncode, 0, run().stderr)

    @posix_only
    def test_ask_their_program_with_words_that_it_knows(self):
        commands = {store: source for store, source in self.recipes().items() if source["kind"] == "command"}
        self.assertEqual(set(commands), set(VAULT_WORDS))
        stub, cases = self.stub(), {}
        for store, source in commands.items():
            folder, secret = self.folder(), canary()
            program, _, arguments = VAULT_WORDS[store].partition(" ")
            make_executable(folder, program, VAULT, sys.executable)
            path = folder + os.pathsep + os.environ.get("PATH", os.defpath)
            env = {"PATH": path, "VAULT_CALLS": os.path.join(folder, "calls"), "VAULT_SECRET": secret, "VAULT_WORDS": arguments}
            cases[store] = {"upstream": stub, "config": {"secret_source": source}, "env": env, "secret": secret}
        for store, running in self.brokers(cases).items():
            with self.subTest(store):
                self.assertEqual(running.post_json("/v1/chat/completions", {"model": "m"}).status, 200)
                self.assertEqual(stub.requests[-1].header("Authorization"), "Bearer " + running.secret)
                with open(running.env["VAULT_CALLS"], encoding="utf-8") as file:
                    self.assertEqual(file.read(), running.env["VAULT_WORDS"] + "\n")

    def test_of_a_token_outlive_it_by_far(self):
        # az hands one out that lives for another five minutes, or more.
        short = {source["argv"][0]: source["cache_seconds"] for source in self.recipes().values() if "cache_seconds" in source}
        self.assertEqual(set(short), {"az", "gcloud"})
        self.assertLess(max(short.values()), 300)

    @posix_only
    def test_read_the_file_beside_the_configuration(self):
        stub, secret = self.stub(), canary()
        folder = self.folder()
        source = self.recipes()["a file"]
        with open(os.open(os.path.join(folder, source["path"]), os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secret + "\n")
        running = self.broker(stub, config={"secret_source": source}, folder=folder, secret=secret)
        self.assertEqual(running.post_json("/v1/chat/completions", {"model": "m"}).status, 200)
        self.assertEqual(stub.requests[0].header("Authorization"), "Bearer " + secret)


class Budget(BrokerTestCase):
    def test_is_charged_as_the_worked_example_says(self):
        stub = self.stub()
        client = {"token_env": "BROKER_TEST_TOKEN", "tokens_per_day": 5000}
        running = self.broker(stub, config={"client_token_env": ABSENT, "clients": {"me": client}})

        def left():
            return running.request("GET", "/broker").json()["left"]["tokens_per_day"]

        def ask(body, answer):
            stub.script(lambda conn, _: conn.respond(200, {"Content-Type": "application/json"}, answer.encode()))
            return running.post_json("/v1/chat/completions", body)

        usage = '{"usage": {"prompt_tokens": %d, "completion_tokens": %d}}'
        ask({"model": "m", "max_tokens": 500}, usage % (120, 80))
        self.assertEqual(left(), 4800)
        ask({"model": "m"}, usage % (1000, 500))
        self.assertEqual(left(), 3300)
        self.assert_refused(ask({"model": "m"}, usage % (1, 1)), 429, "budget_exhausted")
        self.assertEqual(left(), 3300)
        body = {"model": "m", "max_tokens": 100, "messages": []}
        body["user"] = "u" * (200 - len(json.dumps({**body, "user": ""})))
        ask(body, '{"x": "%s"}' % ("x" * 591))
        self.assertEqual(left(), 3100)


# What the agent tries as another user: to call, and to read what is the broker's.
OTHER_USER = """
import json, os, sys, urllib.request
headers = {"X-Broker-Token": os.environ["BROKER_CLIENT_TOKEN"]}
answer = urllib.request.urlopen(urllib.request.Request(os.environ["BROKER_URL"] + "/v1/models", headers=headers))
seen = {"call": answer.status, "uid": os.getuid()}
parent = "/proc/%d/" % os.getppid()
for path in [*sys.argv[1:], parent + "environ", parent + "mem"]:
    try:
        open(path, "rb").read(1)
        seen[path] = "read"
    except PermissionError:
        seen[path] = "closed"
print(json.dumps(seen))
"""


@linux_only
@unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "only root can become another user")
@unittest.skipUnless(shutil.which("setpriv") and os.path.exists("/usr/bin/python3"), "setpriv or /usr/bin/python3 is missing")
class AnotherUser(BrokerTestCase):
    """A stronger boundary; `setpriv` stands in for `sudo -u agent`."""

    def test_can_call_and_read_nothing_of_the_brokers(self):
        stub, folder, secret = self.stub(), self.folder(), canary()
        key, log = os.path.join(folder, "openai.key"), os.path.join(folder, "events.jsonl")
        with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secret + "\n")
        os.chmod(folder, 0o755)
        as_other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", OTHER_USER]
        config = {"secret_source": {"kind": "file", "path": "openai.key"}}
        run = run_broker(upstream=stub, config=config, secret=secret, folder=folder, command=[*as_other, key, log])
        self.assertEqual(run.returncode, 0, run.stderr)
        seen = json.loads(run.stdout)
        self.assertEqual((seen.pop("call"), seen.pop("uid")), (200, 65534))
        self.assertEqual(len(seen), 4)
        self.assertEqual(set(seen.values()), {"closed"}, seen)


# The same without a network: what answers, and what is seen of the other processes.
NO_NETWORK = """
import json, os, socket, sys, urllib.request
headers = {"X-Broker-Token": os.environ["BROKER_CLIENT_TOKEN"]}
answer = urllib.request.urlopen(urllib.request.Request(os.environ["BROKER_URL"] + "/v1/models", headers=headers))
seen = {"call": answer.status, "processes": sum(name.isdigit() for name in os.listdir("/proc"))}
for host, port in (("127.0.0.1", int(sys.argv[1])), ("192.0.2.1", 443)):
    try:
        socket.create_connection((host, port), 5).close()
        seen[host] = "open"
    except OSError as error:
        seen[host] = error.strerror
print(json.dumps(seen))
sys.exit(7)
"""


@linux_only
@unittest.skipUnless(all(map(shutil.which, ("socat", "unshare", "ip"))), "socat, unshare or ip is not installed")
class NoNetwork(BrokerTestCase):
    """A stronger boundary; the command as it stands, but for its configuration and COMMAND."""

    def test_but_for_the_broker(self):
        if subprocess.run(["unshare", "-rn", "--pid", "--fork", "--mount-proc", "true"], stderr=subprocess.DEVNULL).returncode:
            self.skipTest("a user may have no namespaces here")
        (command,) = [block for block in blocks("sh") if "unshare" in block]
        shell, option, script = shlex.split(command.partition(" -- ")[2])
        stub, folder = self.stub(), self.folder()
        with open(os.path.join(folder, "agent.py"), "w", encoding="utf-8") as file:
            file.write(NO_NETWORK)
        self.assertIn("COMMAND", script)
        script = script.replace("COMMAND", f"{sys.executable} agent.py {stub.port}")
        run = run_broker(upstream=stub, config={}, folder=folder, cwd=folder, command=[shell, option, script])
        self.assertEqual(run.returncode, 7, run.stderr)
        seen = json.loads(run.stdout)
        self.assertLess(seen.pop("processes"), 10)
        self.assertEqual(seen, {"call": 200, "127.0.0.1": "Connection refused", "192.0.2.1": "Network is unreachable"})
        self.assertEqual(len(stub.requests), 1)
        self.assertNotIn("broker.sock", os.listdir(folder))


class Units(unittest.TestCase):
    """What starts it at login is well-formed."""

    def test_property_list(self):
        (text,) = blocks("xml")
        parsed = plistlib.loads(text.encode())
        self.assertEqual(parsed["ProgramArguments"][:2], ["/bin/sh", "-c"])
        self.assertIn("broker.py --config", parsed["ProgramArguments"][2])

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_unit(self):
        (text,) = blocks("ini")
        with tempfile.TemporaryDirectory(prefix="broker-test-") as folder:
            path = os.path.join(folder, "broker.service")
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            env = minimal_environment({"XDG_RUNTIME_DIR": folder})
            run = subprocess.run(["systemd-analyze", "--user", "verify", path], env=env, capture_output=True, timeout=30)
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertEqual(run.stderr, b"")


# ------------------------------------------------------------------------------------------------
# The tables


class Tables(BrokerTestCase):
    def test_have_every_configuration_key_with_its_default(self):
        table = {word: default for key, default, _ in rows("Configuration keys", 3) for word in words(key)}
        self.assertEqual(list(table), list(broker.KEYS))
        for key, (default, _) in broker.KEYS.items():
            with self.subTest(key):
                wanted = "required" if default is broker.REQUIRED else "none" if default is None else f"`{json.dumps(default)}`"
                self.assertEqual(table[key], wanted)

    def test_have_the_keys_that_the_program_itself_names(self):
        named = re.search("known are (.+)", run_broker("--check", config={"zzzz": 1}).stderr)[1].split(", ")
        self.assertEqual([word for row in rows("Configuration keys", 3) for word in words(row[0])], named)

    def test_have_every_key_of_upstreams_and_clients(self):
        text = section("Configuration keys")
        upstreams = text[text.index("Each of `upstreams`") : text.index("Each of `clients`")]
        self.assertEqual([word for word in words(upstreams) if word.isidentifier()][1:], list(broker.UPSTREAM_KEYS))
        clients = [line for line in text[text.index("Each of `clients`") :].splitlines() if line.startswith("|`")]
        self.assertEqual([word for line in clients for word in words(line.split("|")[1])], list(broker.CLIENT_KEYS))

    def test_have_every_secret_source_with_its_options(self):
        table = {words(kind)[0]: options for kind, options, _ in rows("Secret sources", 3)}
        self.assertEqual(list(table), list(broker.SECRET_SOURCES))
        for kind, (*_, options) in broker.SECRET_SOURCES.items():
            with self.subTest(kind):
                self.assertEqual(words(table[kind]), list(options))
                for name, (default, _) in options.items():
                    if default is not broker.REQUIRED:
                        self.assertIn(f"`{name}` ({default})", table[kind])

    def test_have_every_error_code_with_its_status_and_retry_hint(self):
        text = section("Error codes")
        again = set(words(text[text.index("Asking again can help") : text.index("the others")]))
        table = {words(code)[0]: (int(status), words(code)[0] not in again) for status, code, _ in rows("Error codes", 3)}
        self.assertEqual(table, broker.ERRORS)

    def test_have_every_event_with_its_fields_and_every_field_with_its_meaning(self):
        table = {event: words(fields) for events, fields in rows("Event log", 2) for event in words(events)}
        self.assertEqual({event: set(fields) for event, fields in table.items()}, broker.EVENT_FIELDS)
        text = section("Event log")
        meanings = text[text.index("|field|") :]
        explained = {word for line in meanings.splitlines() if line.startswith("|") for word in words(line.split("|")[1])}
        everything = {field for fields in broker.EVENT_FIELDS.values() for field in fields}
        self.assertLess(explained, everything)
        # The workshop has two lines, and a word on each of their fields.
        lines, _, text = section("Step 2: the live lines and the log").rpartition("```")
        in_workshop = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
        self.assertEqual([line["event"] for line in in_workshop], ["request", "response"])
        fields = {field for line in in_workshop for field in line} - {"event"}
        self.assertEqual(fields, set(words(text)) & (everything | {"time"}))
        self.assertLess(everything - explained, set(words(text)))

    def test_have_the_fields_that_the_log_itself_has(self):
        table = {event: set(words(fields)) for events, fields in rows("Event log", 2) for event in words(events)}
        own = {"allowed_paths": ["/v1/chat/completions"], "secret_source": {"kind": "none"}}
        two = {"one": {**own, "base_url": "https://one.example"}}
        two["two"] = {**own, "base_url": "https://two.example", "prefix": "/two"}
        client = {"token_env": "BROKER_TEST_TOKEN", "allowed_models": ["m"]}
        config = {key: ABSENT for key in ("upstream_base_url", "allowed_paths", "secret_source", "client_token_env")}
        running = self.broker(dry_run=True, config={**config, "upstreams": two, "clients": {"me": client}})
        running.post_json("/v1/chat/completions", {"model": "m"})
        running.post_json("/v1/chat/completions", {"model": "dear"})
        for event in running.events():
            found = set(event) - {"time", "event"}
            self.assertEqual(found | {"suppressed"} if event["event"] == "denied" else found, table[event["event"]])

    def test_have_every_option_of_the_command_line(self):
        run = run_broker("--help")
        options = set(re.findall(r"(?m)(?:^| |\[)(--[a-z-]+)", run.stdout))
        self.assertGreater(len(options), 6)
        table = {word.split()[0] for call, _ in rows("Command line", 2) for word in words(call)}
        self.assertEqual(table, options | {"--"})

    def test_have_every_exit_code(self):
        text = run_broker("--help").stdout.partition("exit codes:")[2]
        codes = re.findall(r"\b(\d\d\d\+n|\d+)\b", text)
        self.assertGreaterEqual(len(codes), 6)
        self.assertEqual({code for row in rows("Exit codes", 2) for code in words(row[0])}, set(codes) | {"128+n"})

    def test_have_the_variables_that_a_command_gets(self):
        code = "import json, os; json.dump(sorted(os.environ), open('seen.json', 'w'))"
        folder = self.folder()
        before = {"OPENAI_API_KEY": ABSENT}
        run_broker("--dry-run", config={}, env=before, command=[sys.executable, "-c", code], folder=folder)
        with open(os.path.join(folder, "seen.json"), encoding="utf-8") as file:
            seen = {name for name in json.load(file) if re.match("OPENAI|ANTHROPIC|AZURE|GOOGLE|GEMINI|BROKER_", name)}
        table = {word for _, cell in rows("Every day", 2) for word in words(cell)} - {"claude"}
        self.assertEqual(seen, table | {"BROKER_URL", "BROKER_CLIENT_TOKEN"})


# ------------------------------------------------------------------------------------------------
# What it refers to


def names_of_tests():
    """Module, module.Class and module.Class.method of everything in tests/."""
    names = set()
    for path in glob.glob(os.path.join(ROOT, "tests", "test_*.py")):
        module = "tests." + os.path.basename(path)[:-3]
        names.add(module)
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        for item in tree.body:
            if isinstance(item, ast.ClassDef):
                names.add(f"{module}.{item.name}")
                names |= {f"{module}.{item.name}.{part.name}" for part in item.body if isinstance(part, ast.FunctionDef)}
    return names


class References(unittest.TestCase):
    def test_to_tests_are_right_and_no_test_file_is_left_out(self):
        names = names_of_tests()
        for name in re.findall(r"tests\.test_[\w.]*\w", README):
            self.assertIn(name, names)
        files = set(re.findall(r"`(?:tests/)?(test_\w+\.py)`", README))
        self.assertEqual(files, {os.path.basename(path) for path in glob.glob(os.path.join(ROOT, "tests", "test_*.py"))})

    def test_to_files_sections_and_limits_of_length_are_right(self):
        for name in re.findall(r"\bbroker_config\.[\w.-]*example\.json", README):
            self.assertTrue(os.path.exists(os.path.join(ROOT, name)), name)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall("(?m)^#+ (.+)$", README)}
        for anchor in re.findall(r"\]\(#([^)]+)\)", README):
            self.assertIn(anchor, anchors)
        lines = int(re.search(r"one file of about ([\d,]+) lines", README)[1].replace(",", ""))
        self.assertAlmostEqual(lines, SOURCE.count("\n"), delta=lines * 0.1)

    def test_to_names_in_the_source_are_right(self):
        for name in re.findall(r"`Handler\.(\w+)`", README):
            self.assertRegex(SOURCE, rf"\bdef {name}\(")
        named = re.split(r",\s| or ", re.search(r"To add (.+?), look for `To add`", section("For developers"), re.S)[1])
        self.assertEqual(named, re.findall("(?m)^# To add (.+?):", SOURCE))

    def test_of_the_map_are_to_what_is_in_the_source(self):
        named = re.findall(r"(?m)^ {4}[ \d]{2}  ((?:[A-Z]\w*\.)?\w+(?:, [\w.]+)*) {2,}", broker.__doc__)
        self.assertGreater(len(named), 13)
        for name in ", ".join(named).split(", "):
            owner, _, member = name.rpartition(".")
            owners = [getattr(broker, owner)] if owner else [broker, broker.Handler]
            self.assertTrue(any(hasattr(found, member) for found in owners), name)

    def test_to_machines_of_ours_are_none(self):
        self.assertNotRegex(README, r"/(work|root|tmp|home)/")


WORKFLOW = os.path.join(ROOT, ".github", "workflows", "tests.yml")


class Project(unittest.TestCase):
    def test_installs_the_command_that_the_page_names(self):
        with open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as file:
            command, function = re.search(r'(?m)^([\w-]+) = "broker:(\w+)"$', file.read()).groups()
        self.assertTrue(callable(getattr(broker, function)))
        self.assertIn(command, words(section("Command line")))

    @unittest.skipUnless(os.path.exists(WORKFLOW), "only the repository has it")
    def test_workflow_runs_the_two_commands(self):
        with open(WORKFLOW, encoding="utf-8") as file:
            workflow = file.read()
        for command in blocks("sh")[0].splitlines():
            self.assertIn(command, workflow)
        with open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as file:
            versions = re.findall(r"Python :: (3\.\d+)", file.read())
        self.assertIn(f'python: ["{versions[0]}", "{versions[-1]}"]', workflow)
        for system in ("ubuntu", "macos", "windows"):
            self.assertIn(system + "-latest", workflow)


# ------------------------------------------------------------------------------------------------
# The exercises


def exercises():
    """(line, replacement, attack, test)"""
    return [[words(cell)[0] for cell in row] for row in rows("Exercises: take a check out", 4)]


class Exercises(unittest.TestCase):
    def test_name_lines_that_are_there(self):
        self.assertGreaterEqual(len(exercises()), 8)
        at = SOURCE.index("    def handle_one_request(")
        way = SOURCE[at : SOURCE.index("    def ", at + 1)]
        for line, *_ in exercises():
            self.assertEqual(way.count(line), 1, line)

    def test_are_those_that_python_tests_guards_py_does(self):
        self.assertEqual(exercises(), readme_rows())


if __name__ == "__main__":
    unittest.main()
