"""Where the secret may come from besides a variable and a command: a file, or the person who starts the broker."""

import os

from tests.long_form import CHAT, LongForm, WrongFiles, an_upstream, chat
from tests.support import ABSENT, SECRET_VARIABLE, BrokerTestCase, canary, eventually, posix_only, run_broker
from tests.terminal import Terminal, with_terminals


def write(path, text, mode=0o600):
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    os.chmod(path, mode)
    return path


class FromAFile(BrokerTestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.upstream, cls.served_in = cls.class_stub(), cls.class_folder()
        cls.form = LongForm(
            {
                "kept": an_upstream(cls.upstream, CHAT, secret_source={"kind": "file", "path": "kept"}),
                "fresh": an_upstream(
                    cls.upstream, "/v1/fresh", secret_source={"kind": "file", "path": "fresh", "cache_seconds": 0}
                ),
            }
        )
        for name, secret in cls.form.secrets.items():
            write(os.path.join(cls.served_in, name), secret + "\n")
        folders = {"folder": cls.served_in, "cwd": cls.class_folder()}
        cls.served = cls.form.watched(cls.class_broker(cls.upstream, **cls.form.options, **folders))

    def setUp(self):
        super().setUp()
        self.upstream.forget()

    def changed(self, name):
        """The secret that is now in this upstream's file."""
        self.form.secrets[name] = canary()
        self.served.also_secret(self.form.secrets[name])
        write(os.path.join(self.served_in, name), self.form.secrets[name])
        return self.form.secrets[name]

    def assert_sent(self, path, secret):
        self.assertEqual(self.served.post_json(path, chat()).status, 200)
        self.assertEqual(self.upstream.requests[-1].header("Authorization"), "Bearer " + secret)

    def test_beside_the_configuration_it_is_what_is_sent(self):
        self.assert_sent(CHAT, self.form.secrets["kept"])
        self.assert_sent("/v1/fresh", self.form.secrets["fresh"])

    @posix_only
    def test_is_read_anew_by_a_reload_and_when_the_upstream_rejects_it(self):
        old = self.form.secrets["kept"]
        new = self.changed("kept")
        # It is kept for an hour unless somebody says so.
        self.assert_sent(CHAT, old)
        self.served.reload()
        self.served.wait_event(event="reload")
        self.assert_sent(CHAT, new)
        newest = self.changed("kept")
        self.upstream.script(lambda conn, request: conn.respond_json({}, 401), lambda conn, request: conn.respond_json({}))
        self.assert_sent(CHAT, newest)

    def test_is_read_each_time_where_cache_seconds_is_zero(self):
        for _ in range(2):
            self.assert_sent("/v1/fresh", self.changed("fresh"))


class FromAFileThatWillNotDo(BrokerTestCase):
    def config(self, path):
        return {"secret_source": {"kind": "file", "path": path}}

    def test_that_cannot_be_had_is_1_and_names_the_mend(self):
        path = write(os.path.join(self.folder(), "key"), canary(), 0o644 if os.name == "posix" else 0o600)
        path = path if os.name == "posix" else path + "-missing"
        run = run_broker(config=self.config(path), timeout=15)
        self.assertEqual((run.returncode, run.stdout, run.stderr.count("\n")), (1, "", 1), run.stderr)
        for words in ("broker_config.json", "secret_source", path, "chmod 600" if os.name == "posix" else "can't be read"):
            self.assertIn(words, run.stderr)

    def test_is_not_even_read_where_nobody_named_the_configuration(self):
        broker = self.broker(config=self.config("/nowhere/key"), use_config=False, wait_ready=False)
        self.assertEqual(broker.wait(), 2)
        broker.wait_stderr("secret_source.*kind file.*--config broker_config.json")


@posix_only
class FromWhichFile(BrokerTestCase):
    """Shown to a running broker, which reads the secret at a reload as it does at its start."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.credentials, cls.elsewhere = cls.class_folder(), cls.class_folder()
        cls.secret = canary()
        config = {"secret_source": {"kind": "file", "path": write(os.path.join(cls.elsewhere, "first"), cls.secret)}}
        env = {"CREDENTIALS_DIRECTORY": cls.credentials, SECRET_VARIABLE: ABSENT}
        cls.served = cls.class_broker(config=config, secret=cls.secret, env=env)

    def assert_each(self, cases):
        """{case: (path, what is wrong with it; None where it will do)}"""
        for case, (path, wrong) in cases.items():
            with self.subTest(case):
                said = self.served.reload({**self.served.config, "secret_source": {"kind": "file", "path": path}})
                if wrong is None:
                    self.assertNotIn("nothing was changed", said)
                else:
                    for words in ("nothing was changed", "secret_source", wrong):
                        self.assertIn(words, said)

    def at(self, name):
        return os.path.join(self.elsewhere, name)

    def test_is_one_that_its_owner_alone_may_read(self):
        os.symlink(write(self.at("key"), self.secret), self.at("link"))
        os.mkfifo(self.at("fifo"), 0o600)
        os.mkdir(self.at("folder"), 0o700)
        cases = {"mode 600": (self.at("key"), None), "mode 400": (write(self.at("400"), self.secret, 0o400), None)}
        for mode in ("640", "604", "644", "660", "602"):
            cases["mode " + mode] = write(self.at(mode), self.secret, int(mode, 8)), "chmod 600 " + self.at(mode)
        cases["a link"] = self.at("link"), "link"
        cases["a fifo"] = self.at("fifo"), "regular file"
        cases["a folder"] = self.at("folder"), "regular file"
        cases["missing"] = self.at("missing"), "No such file"
        self.assert_each(cases)

    def test_is_one_that_holds_a_key_and_nothing_else(self):
        texts = {
            "with its line end": (self.secret + "\r\n", None),
            "empty": ("", "empty"),
            "two lines": (f"{self.secret}\n{self.secret}\n", "lines"),
            "in quotes": (f'"{self.secret}"', "quotes"),
            "NAME=": ("OPENAI_API_KEY=" + self.secret, "NAME="),
            "a comma": (self.secret + ",", "comma"),
            "UTF-16": (self.secret.encode("utf-16"), "UTF-16"),
            "a byte-order mark": (b"\xef\xbb\xbf" + self.secret.encode(), "byte-order mark"),
            "too long": ("k" * 70_000, "64 KiB"),
        }
        self.assert_each({case: (write(self.at(case[:3]), text), wrong) for case, (text, wrong) in texts.items()})

    def test_of_systemds_or_a_containers_may_have_any_mode_and_be_a_link_among_them(self):
        os.mkdir(os.path.join(self.credentials, "..data"))
        real = write(os.path.join(self.credentials, "..data", "key"), self.secret, 0o444)
        among = os.path.join(self.credentials, "key")
        os.symlink(real, among)
        outside = write(self.at("outside"), self.secret)
        out = os.path.join(self.credentials, "out")
        os.symlink(outside, out)
        os.symlink(real, self.at("in"))
        os.chmod(outside, 0o444)
        nowhere = os.path.join(self.credentials, "nowhere")
        os.symlink(os.path.join(self.credentials, "..data", "missing"), nowhere)
        around = os.path.join(self.credentials, "..", os.path.basename(self.elsewhere), "outside")
        self.assert_each(
            {
                "a link among them": (among, None),
                "the file itself": (real, None),
                "a link among them to nothing": (nowhere, "No such file"),
                "a link out of them": (out, "link"),
                "a link into them": (self.at("in"), "link"),
                "a path out of them": (around, "chmod 600"),
                "outside": (outside, "chmod 600"),
            }
        )


@with_terminals
class Asked(BrokerTestCase):
    PROMPT = {"kind": "prompt"}

    def asking(self, stub, form=None, secret=None, **more):
        self.terminal = Terminal(self)
        options = form.options if form else {"config": {"secret_source": self.PROMPT}, "env": {SECRET_VARIABLE: ABSENT}}
        return self.broker(stub, secret=secret, preexec_fn=self.terminal.attach, wait_ready=False, **options, **more)

    def test_once_for_each_upstream_by_its_name_without_echo_and_never_again(self):
        stub = self.stub()
        form = LongForm(
            {
                "first": an_upstream(stub, CHAT, secret_source=self.PROMPT),
                "none": an_upstream(stub, "/v1/none", secret_source={"kind": "none"}),
                "second": an_upstream(stub, "/v1/messages", secret_source=self.PROMPT),
            }
        )
        broker = form.watched(self.asking(stub, form))
        for name in ("first", "second"):
            self.terminal.wait_for(f"key for {name}")
            self.assertEqual(broker.stderr_text(), "")
            self.terminal.type(form.secrets[name] + "\n")
        broker.wait_ready()
        for _ in range(2):
            for path, name in {CHAT: "first", "/v1/messages": "second"}.items():
                self.assertEqual(broker.post_json(path, chat()).status, 200)
                self.assertEqual(stub.requests[-1].header("Authorization"), "Bearer " + form.secrets[name])
            broker.reload()
            broker.wait_event(event="reload")
        stub.script(lambda conn, request: conn.respond_json({}, 401))
        self.assert_refused(broker.post_json(CHAT, chat()), 502, "upstream_rejected_secret")
        self.terminal.wait_for("key for second")
        self.assertEqual(self.terminal.shown.count(b"key for"), 2)
        for secret in form.secrets.values():
            self.assertNotIn(secret.encode(), self.terminal.shown)
        self.assertTrue(self.terminal.echoes())

    def test_and_answered_with_ctrl_c_ends_with_130(self):
        broker = self.asking(self.stub())
        self.terminal.wait_for("key for default")
        self.terminal.type("\x03")
        self.assertEqual(broker.wait(), 130)
        self.assertTrue(self.terminal.echoes())

    def test_and_answered_with_what_is_no_key_ends_with_1(self):
        broker = self.asking(self.stub())
        self.terminal.wait_for("key for default")
        self.terminal.type("short\n")
        self.assertEqual(broker.wait(), 1)
        self.assertNotIn("short\n", broker.stderr_text())
        self.assertIn("secret_source", broker.stderr_text())

    def test_where_there_is_no_terminal_ends_with_1(self):
        run = run_broker(config={"secret_source": self.PROMPT}, stdin=canary() + "\n", timeout=15)
        self.assertEqual((run.returncode, run.stdout, run.stderr.count("\n")), (1, "", 1), run.stderr)
        self.assertIn("no terminal", run.stderr)

    def test_and_the_command_behind_us_has_the_terminal_and_no_secret(self):
        stub, secret = self.stub(), canary()
        broker = self.asking(stub, secret=secret, command=["/bin/sh", "-c", "env; stty -a </dev/tty"])
        self.terminal.wait_for("key for default")
        self.terminal.type(secret + "\n")
        self.assertEqual(broker.wait(), 0)
        eventually(lambda: " echo " in broker.stdout_text())
        self.assertIn("BROKER_URL=", broker.stdout_text())
        self.assertNotIn(secret, broker.stdout_text())


class WrongSources(WrongFiles):
    def test_are_told_in_one_line_that_names_the_key(self):
        wrong = [
            {"kind": "file"},
            {"kind": "file", "path": 5},
            {"kind": "file", "path": ""},
            {"kind": "file", "path": "a\0b"},
            {"kind": "file", "path": "key", "cache_seconds": -1},
            {"kind": "file", "path": "key", "name": "x"},
            {"kind": "prompt", "cache_seconds": 5},
            {"kind": "prompt", "question": "?"},
            {"kind": "none", "path": "x"},
            {"kind": "files", "path": "x"},
        ]
        self.assert_each_wrong({repr(value): (LongForm(secret_source=value), ["secret_source"]) for value in wrong})
