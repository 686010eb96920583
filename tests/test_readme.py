"""README.md says what the program does: its commands are run as a reader would run them, and its tables are compared
with what `broker.py` knows.

A `console` block is a transcript: each line that begins with `$ ` is run, in the README's order and in a fresh folder,
and what follows is what it prints. `…` stands for anything; times, ids and tokens may differ. An `sh` block is shown
only. Under BROKER_SLOW_TESTS the exercises are done as well: the line is taken out, and the test named must go red.
"""

import ast
import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

import broker
from tests.support import (
    ABSENT,
    ROOT,
    BrokerTestCase,
    free_port,
    linux_only,
    make_executable,
    minimal_environment,
    posix_only,
    run_broker,
    slow,
)

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
    lines = [line for line in section(title).splitlines() if line.startswith("| ") or line.startswith("|--")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    ends = [at for at, line in enumerate(lines) if line.startswith("|--")] + [len(lines) + 1]
    for begin, end in zip(ends, ends[1:]):
        if len(cells[begin]) == columns:
            return cells[begin + 1 : end - 1]
    raise AssertionError(f"{title!r} has no table of {columns} columns")


def words(cell):
    """What stands in backquotes in a cell."""
    return re.findall("`([^`]+)`", cell)


def same_shape(text):
    """The text with all that may differ between two runs made alike."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
    text = re.sub(r'"(id|_ms|\w+_ms)":("[0-9a-f]{16}"|[0-9.]+)', r'"\1":0', text)
    text = re.sub(r"(TOKEN=)[\w-]{43}", r"\1TOKEN", text)
    text = re.sub(r"\b\d+\.\d\b", "0.0", text)          # the report's milliseconds
    return re.sub(r"(?m)[ \t]{2,}| +$", "  ", text).strip()


def pattern(expected):
    return ".*?".join(re.escape(part) for part in same_shape(expected).split("…"))


# ------------------------------------------------------------------------------------------------
# The commands


@posix_only
@needs_curl
class Transcripts(BrokerTestCase):
    """The workshop, from its first to its last `console` block, by one reader in one folder."""

    def setUp(self):
        self.place = self.folder()
        self.port = free_port()
        for path in glob.glob(os.path.join(ROOT, "broker*.*")):
            shutil.copy(path, self.place)
        self.rewrite(os.path.join(self.place, EXAMPLE), lambda text: text.replace("8791", str(self.port)))
        programs = self.folder()
        make_executable(programs, "python", f'exec "{sys.executable}" "$@"')
        path = programs + os.pathsep + os.environ.get("PATH", os.defpath)
        self.env = minimal_environment({"PATH": path, "HOME": self.place})
        self.exports = ""
        self.server = None

    @staticmethod
    def rewrite(path, change):
        with open(path, encoding="utf-8") as file:
            text = file.read()
        with open(path, "w", encoding="utf-8") as file:
            file.write(change(text))

    def test_are_what_a_reader_sees(self):
        ran = 0
        for block in blocks("console"):
            block = block.replace("8791", str(self.port))
            for step in re.split(r"(?m)^\$ ", block)[1:]:
                command, _, expected = step.partition("\n")
                printed = self.do(command)
                self.assertRegex(same_shape(printed), rf"(?s)\A{pattern(expected)}\Z", command)
                ran += 1
        self.assertGreater(ran, 10)
        self.assertIsNotNone(self.server)

    def do(self, command):
        """Runs one command line as the reader's shell; what it prints."""
        if command == "export BROKER_CLIENT_TOKEN=…":
            command = f"export BROKER_CLIENT_TOKEN={self.server.token}"
        if command.startswith("export "):
            self.exports += command + "\n"
            return ""
        if command.endswith("--dry-run"):
            return self.serve(shlex.split(command)[2:])
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
        script = os.path.join(self.place, "broker.py")
        log = os.path.join(self.place, "events.jsonl")
        if os.path.exists(log):
            os.unlink(log)              # of the two calls at the README's top
        self.server = self.broker(use_config=False, args=args, folder=self.place, script=script)
        self.server.token = self.server.wait_stderr(r"export BROKER_CLIENT_TOKEN=(\S+)")[1]
        self.server.wait_stderr("export OPENAI_BASE_URL")
        return self.server.stderr_text()


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
        programs = blocks("python")
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
    def test_load(self):
        fragments = blocks("json")
        self.assertGreaterEqual(len(fragments), 2)
        with open(os.path.join(ROOT, EXAMPLE), encoding="utf-8") as file:
            example = json.load(file)
        for fragment in fragments:
            with self.subTest(fragment):
                config = json.loads(fragment)
                if "upstream_base_url" not in config:
                    config = {**example, **config}
                run = run_broker("--check", "--dry-run", config_text=json.dumps(config))
                self.assertEqual(run.returncode, 0, run.stderr)

    def test_of_allowed_paths_are_rules(self):
        rules = re.findall(r'`"([A-Z/][^`"]*)"`', section("Allowed paths"))
        self.assertGreaterEqual(len(rules), 6)
        run = run_broker("--check", "--dry-run", config={"allowed_paths": rules})
        self.assertEqual(run.returncode, 0, run.stderr)


# ------------------------------------------------------------------------------------------------
# The tables


class Tables(BrokerTestCase):
    def test_have_every_configuration_key_with_its_default(self):
        table = {words(key)[0]: default for key, default, _ in rows("Configuration keys", 3)}
        self.assertEqual(list(table), list(broker.KEYS))
        for key, (default, _) in broker.KEYS.items():
            with self.subTest(key):
                wanted = "required" if default is broker.REQUIRED else f"`{json.dumps(default)}`"
                self.assertEqual(table[key], wanted)

    def test_have_the_keys_that_the_program_itself_names(self):
        named = re.search("known are (.+)", run_broker("--check", config={"zzzz": 1}).stderr)[1].split(", ")
        self.assertEqual([words(row[0])[0] for row in rows("Configuration keys", 3)], named)

    def test_have_every_secret_source_with_its_options(self):
        table = {words(kind)[0]: options for kind, options, _ in rows("Secret sources", 3)}
        self.assertEqual(list(table), list(broker.SECRET_SOURCES))
        for kind, (_, options) in broker.SECRET_SOURCES.items():
            with self.subTest(kind):
                self.assertEqual(words(table[kind]), list(options))
                for name, (default, _) in options.items():
                    if default is not broker.REQUIRED:
                        self.assertIn(f"`{name}` ({default})", table[kind])

    def test_have_every_error_code_with_its_status_and_retry_hint(self):
        table = {words(code)[0]: (int(status), retry) for status, code, _, _, retry in rows("Error codes", 5)}
        wanted = {code: (status, "no" if final else "yes") for code, (status, final) in broker.ERRORS.items()}
        self.assertEqual(table, wanted)

    def test_have_every_event_with_its_fields_and_every_field_with_its_meaning(self):
        table = {event: words(fields) for events, fields in rows("Event log", 2) for event in words(events)}
        self.assertEqual(table, {event: list(fields) for event, fields in broker.EVENT_FIELDS.items()})
        text = section("Event log")
        meanings = text[text.index("| field |") :]
        explained = {word for line in meanings.splitlines() if line.startswith("|") for word in words(line.split("|")[1])}
        self.assertEqual(explained, {field for fields in broker.EVENT_FIELDS.values() for field in fields})

    def test_have_the_fields_that_the_log_itself_has(self):
        table = {event: set(words(fields)) for events, fields in rows("Event log", 2) for event in words(events)}
        running = self.broker(dry_run=True)
        running.post_json("/v1/chat/completions", {"model": "m"})
        running.request("GET", "/v1/nothing")
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
        table = {word for _, cell in rows("SDKs and agents under `--`", 2) for word in words(cell)} - {"claude"}
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
        files = set(re.findall(r"tests/(test_\w+\.py)", README))
        self.assertEqual(files, {os.path.basename(path) for path in glob.glob(os.path.join(ROOT, "tests", "test_*.py"))})

    def test_to_files_sections_and_limits_of_length_are_right(self):
        for name in re.findall(r"\bbroker_config\.[\w.-]*example\.json", README):
            self.assertTrue(os.path.exists(os.path.join(ROOT, name)), name)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall("(?m)^#+ (.+)$", README)}
        for anchor in re.findall(r"\]\(#([^)]+)\)", README):
            self.assertIn(anchor, anchors)
        lines = int(re.search(r"one file of about ([\d,]+) lines", README)[1].replace(",", ""))
        self.assertAlmostEqual(lines, SOURCE.count("\n"), delta=lines * 0.05)

    def test_to_names_in_the_source_are_right(self):
        names = r"`([A-Z][A-Z_]+|Connection\.handle|parse_arguments|SecretUnavailable)`"
        for name in re.findall(names, section("For developers")):
            if name != "BROKER_SLOW_TESTS":
                self.assertRegex(SOURCE, rf"\b{name.rpartition('.')[2]}\b", name)

    def test_to_machines_of_ours_are_none(self):
        self.assertNotRegex(README, r"/(work|root|tmp|home)/")


# ------------------------------------------------------------------------------------------------
# The exercises


def exercises():
    """(line, replacement, test)"""
    return [(words(line)[0], words(to)[0], words(test)[0]) for line, to, _, test in rows("Exercises: take a check out", 4)]


def without(line, replacement):
    """broker.py with one line of Connection.handle replaced."""
    at = SOURCE.index("    async def handle(")
    end = SOURCE.index("    async def ", at + 1)
    body = SOURCE[at:end]
    assert body.count(line) == 1, f"Connection.handle does not have {line!r} once"
    return SOURCE[:at] + body.replace(line, replacement) + SOURCE[end:]


class Exercises(unittest.TestCase):
    def test_name_lines_that_are_there(self):
        self.assertGreaterEqual(len(exercises()), 8)
        for line, replacement, _ in exercises():
            with self.subTest(line):
                ast.parse(without(line, replacement))

    @slow
    @linux_only
    def test_turn_red_what_they_name(self):
        for line, replacement, test in exercises():
            with self.subTest(line):
                self.assertEqual(self.outcome(SOURCE, test), 0)
                self.assertEqual(self.outcome(without(line, replacement), test), 1)

    def outcome(self, source, test):
        """The exit code of a test in a copy of all this."""
        with tempfile.TemporaryDirectory(prefix="broker-test-") as folder:
            shutil.copytree(os.path.join(ROOT, "tests"), os.path.join(folder, "tests"), ignore=shutil.ignore_patterns("node*"))
            for path in glob.glob(os.path.join(ROOT, "broker_config*")):
                shutil.copy(path, folder)
            with open(os.path.join(folder, "broker.py"), "w", encoding="utf-8") as file:
                file.write(source)
            process = subprocess.Popen(
                [sys.executable, "-m", "unittest", test], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                return process.wait(120)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # it then cleans up behind itself
                process.wait(60)
                raise AssertionError(f"{test} hangs") from None


if __name__ == "__main__":
    unittest.main()
