"""What other programs of the same user can't get out of the broker's process.

Root may read any process, so as root the broker (and who looks at it) is started as an ordinary
user; where that can't be done, those tests skip themselves.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import unittest

from tests.support import (
    ABSENT,
    BROKER,
    ROOT,
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    BrokerTestCase,
    canary,
    eventually,
    forms_of,
    fresh_token,
    linux_only,
    make_executable,
    posix_only,
    run_broker,
    run_each,
)

CHAT = "/v1/chat/completions"
ORDINARY_USER = 65534


def become_ordinary():
    """For preexec_fn: what an `exec` after this starts is an ordinary user's."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(ORDINARY_USER)
        os.setuid(ORDINARY_USER)


def ordinary_python():
    """A Python that an ordinary user can run, or None: one below root's home is out of reach."""
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        check = "import ctypes, http.server, ssl, sys; sys.exit(sys.version_info < (3, 9))"
        try:
            run = subprocess.run([path, "-c", check], preexec_fn=become_ordinary, cwd="/", capture_output=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            continue
        if run.returncode == 0:
            return path
    return None


@linux_only
class OtherProgramsOfTheSameUser(BrokerTestCase):
    """Attack: an agent reads the key out of the broker's environment or memory."""

    @classmethod
    def setUpClass(cls):
        cls.python = ordinary_python()
        if cls.python is None:
            raise unittest.SkipTest("no Python here that an ordinary user may run")

    def ordinary_folder(self, *names):
        """A folder of the ordinary user's, with copies of these files."""
        folder = self.folder()
        for name in names:
            shutil.copy(name, folder)
        self.give_away(folder)
        return folder

    def give_away(self, folder):
        if os.getuid() == 0:
            for name in ["", *os.listdir(folder)]:
                os.chown(os.path.join(folder, name), ORDINARY_USER, ORDINARY_USER)

    def ordinary_broker(self, upstream=None, **keywords):
        folder = self.ordinary_folder(BROKER)

        def preexec():
            # The configuration was written into the folder meanwhile.
            self.give_away(folder)
            become_ordinary()

        return self.broker(
            upstream,
            folder=folder,
            script=os.path.join(folder, "broker.py"),
            python=self.python,
            python_args=["-B"],
            preexec_fn=preexec,
            **keywords,
        )

    def look(self, process, *names):
        """What another program of this user reads there: bytes in hex, or the name of an error."""
        code = """
import json, sys
found = {}
for name in sys.argv[2:]:
    path = f"/proc/{sys.argv[1]}/{name}"
    try:
        if name == "mem":
            with open(path, "rb") as file:
                with open(f"/proc/{sys.argv[1]}/maps") as maps:
                    ranges = [line.split()[0].split("-") for line in maps if " rw" in line]
                data = b""
                for low, high in ranges:
                    file.seek(int(low, 16))
                    data += file.read(min(int(high, 16) - int(low, 16), 1 << 24))
        else:
            with open(path, "rb") as file:
                data = file.read()
        found[name] = data.hex()
    except OSError as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""
        run = subprocess.run(
            [self.python, "-c", code, str(process), *names],
            preexec_fn=become_ordinary,
            cwd="/",
            capture_output=True,
            timeout=30,
        )
        self.assertEqual(run.returncode, 0, run.stderr)
        return json.loads(run.stdout)

    def test_read_an_unguarded_program_but_not_the_broker(self):
        # First that this way of looking sees what there is to be seen.
        secret = canary()
        unguarded = subprocess.Popen(
            [self.python, "-c", "import os, sys; kept = os.environ['S'] * 2; print(flush=True); sys.stdin.read()"],
            env={"S": secret},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=become_ordinary,
            cwd="/",
        )
        try:
            unguarded.stdout.readline()
            seen = self.look(unguarded.pid, "environ", "mem")
            if secret.encode().hex() not in seen["environ"]:
                self.skipTest("this system keeps all programs of a user apart")
            self.assertIn(secret.encode().hex(), seen["mem"])
        finally:
            unguarded.stdin.close()
            unguarded.stdout.close()
            unguarded.wait(10)

        broker = self.ordinary_broker(self.stub())
        self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)
        seen = self.look(broker.pid, "environ", "mem", "maps", "cmdline", "status")
        for name in ("environ", "mem", "maps"):
            self.assertEqual(seen[name], "PermissionError", name)
        # Not what a broker looks like that has crashed.
        self.assertIn(b"broker.py".hex(), seen["cmdline"])
        self.assertRegex(bytes.fromhex(seen["status"]), rb"(?m)^State:\s+[SR]")

    def test_find_no_secret_in_a_command_either(self):
        for arguments in ([], ["--dry-run"]):
            with self.subTest(arguments):
                broker = self.ordinary_broker(args=arguments, command=["sh", "-c", "echo $$; read rest"], stdin=subprocess.PIPE)
                child = int(broker.wait_stdout(r"([0-9]+)\n", 20).group(1))
                seen = self.look(child, "environ", "cmdline")
                environment = bytes.fromhex(seen["environ"])
                self.assertIn(b"BROKER_CLIENT_TOKEN=", environment)
                for value in (broker.secret, broker.token):
                    for form in forms_of(value):
                        self.assertNotIn(form, environment + bytes.fromhex(seen["cmdline"]))
                self.assertEqual(self.look(broker.pid, "environ")["environ"], "PermissionError")
                broker.process.stdin.write(b"\n")
                broker.process.stdin.close()
                broker.wait()

    def test_are_kept_out_before_the_secret_is_there(self):
        folder = self.ordinary_folder()
        secret = canary()
        fifo = os.path.join(folder, "go")
        os.mkfifo(fifo, 0o600)
        program = make_executable(folder, "op", f"read go < '{fifo}'; echo {secret}\n")
        self.give_away(folder)
        config = {"secret_source": {"kind": "command", "argv": [program]}}
        broker = self.ordinary_broker(config=config, secret=secret, env={SECRET_VARIABLE: ABSENT}, wait_ready=False)
        # Opens when the command reads; the broker waits for it then.
        with open(fifo, "w", encoding="ascii") as file:
            for name, seen in self.look(broker.pid, "environ", "mem").items():
                self.assertEqual(seen, "PermissionError", name)
            file.write("now\n")
        broker.wait_ready()


@posix_only
class CoreFile(BrokerTestCase):
    def test_is_not_written_of_the_broker(self):
        if not os.path.exists("/proc/self/limits"):
            self.skipTest("no /proc here")
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        limit = lambda: resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))  # noqa: E731
        for arguments in ([], ["--dry-run"]):
            with self.subTest(arguments):
                broker = self.broker(args=arguments, preexec_fn=limit)
                with open(f"/proc/{broker.pid}/limits", encoding="ascii") as file:
                    soft = re.search(r"(?m)^Max core file size\s+(\S+)", file.read()).group(1)
                self.assertEqual(soft, "0")


@linux_only
class CommandLineAndChildren(BrokerTestCase):
    def test_of_the_broker_show_no_secret(self):
        broker = self.broker(self.stub(), script=BROKER)
        with open(f"/proc/{broker.pid}/cmdline", "rb") as file:
            line = file.read()
        self.assertIn(b"broker.py", line)
        for value in (broker.secret, broker.token):
            self.assertNotIn(value.encode(), line)

    def test_of_a_secret_command_show_no_token(self):
        # It is asked under a command of ours too, where the caller's variable is of no use at all.
        folder, secret = self.folder(), canary()
        program = make_executable(folder, "op", f"cd '{folder}'; cat /proc/$$/environ > environ; echo {secret}\n")
        source = {"kind": "command", "argv": [program]}
        for command in (None, ["true"]):
            with self.subTest(command):
                token = fresh_token()
                env = {SECRET_VARIABLE: ABSENT}
                if command is None:
                    self.broker(config={"secret_source": source}, env=env, secret=secret, token=token)
                else:
                    run = run_broker(config={"secret_source": source}, env=env, secret=secret, token=token, command=command)
                    self.assertEqual(run.returncode, 0, run.stderr)
                with open(os.path.join(folder, "environ"), "rb") as file:
                    environment = file.read()
                self.assertNotIn(token.encode(), environment)
                self.assertNotIn(TOKEN_VARIABLE.encode(), environment)


class PlantedModule(BrokerTestCase):
    """Attack: who may write beside the broker plants a module that it imports."""

    NAMES = ("ssl", "json", "http", "socket", "threading", "argparse", "ctypes", "shutil", "difflib", "resource", "runpy")

    def plant(self, folder, names=NAMES):
        witness = os.path.join(folder, "loaded")
        for name in names:
            with open(os.path.join(folder, name + ".py"), "w", encoding="utf-8") as file:
                file.write(f"open({witness!r}, 'a').write(__name__)\nraise SystemExit('planted')\n")
        return witness

    def test_beside_it_is_not_loaded_at_any_time(self):
        folder = self.folder()
        script = shutil.copy(BROKER, folder)
        witness = self.plant(folder)
        broker = self.broker(self.stub(), script=script, cwd=folder)
        self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)
        if os.name == "posix":
            broker.signal(signal.SIGHUP)
            broker.wait_event(event="reload")
        broker.close()
        cases = {
            "--help": ({"config": None, "args": ["--help"]}, 0),
            "--new-token": ({"config": None, "args": ["--new-token"]}, 0),
            # A misspelt key and a program that is looked for need modules of their own.
            "a misspelt key": ({"config": {"listen_prot": 1}}, 2),
            "no program": ({"config": {"secret_source": {"kind": "command", "argv": ["no-such-program"]}}}, 1),
        }
        calls = run_each({case: {"script": script, "cwd": folder, **keywords} for case, (keywords, _) in cases.items()})
        for case, (_, code) in cases.items():
            self.assertEqual(calls[case]().returncode, code, case)
        self.assertFalse(os.path.exists(witness))

    def test_is_not_loaded_through_a_link_or_a_relative_path(self):
        folder = self.folder()
        shutil.copy(BROKER, folder)
        witness = self.plant(folder)
        self.assertEqual(run_broker("--new-token", script="broker.py", cwd=folder).returncode, 0)
        self.assertEqual(run_broker("--new-token", script="./broker.py", cwd=folder).returncode, 0)
        if os.name == "posix":
            elsewhere = self.folder()
            os.symlink(os.path.join(folder, "broker.py"), os.path.join(elsewhere, "linked.py"))
            self.assertEqual(run_broker("--new-token", script="linked.py", cwd=elsewhere).returncode, 0)
        self.assertFalse(os.path.exists(witness))


    def test_where_the_environment_points_is_not_loaded(self):
        folder, elsewhere = self.folder(), self.folder()
        witness, other = self.plant(folder), self.plant(elsewhere)
        paths = (os.pathsep + elsewhere, ".", "", os.pathsep.join([elsewhere, "", "./"]))
        keywords = {"args": ["--check"], "script": BROKER, "cwd": folder}
        for path, call in run_each({path: {**keywords, "env": {"PYTHONPATH": path}} for path in paths}).items():
            with self.subTest(path):
                self.assertEqual(call().returncode, 0, call().stderr)
        self.assertEqual([os.path.exists(path) for path in (witness, other)], [False, False])

    def test_where_the_environment_points_is_loaded_by_python_itself(self):
        # That the plants above are ones.
        folder = self.folder()
        self.plant(folder)
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": folder}
        run = subprocess.run([sys.executable, "-c", "import ssl"], env=env, capture_output=True, timeout=20)
        self.assertIn(b"planted", run.stderr)


class OtherSurroundings(BrokerTestCase):
    def start_with(self, lines):
        """A script that starts the broker, as the installed command does, where these lines hold."""
        script = os.path.join(self.folder(), "localhost-broker")
        with open(script, "w", encoding="utf-8") as file:
            file.write(f"import sys\n{lines}\nsys.path[0] = {ROOT!r}\nfrom broker import main\nsys.exit(main())\n")
        return script

    def test_that_is_too_old_is_told_so_in_one_line(self):
        old = os.path.expanduser("~/.pyenv/versions/3.8.18/bin/python")
        if not os.path.exists(old):
            self.skipTest("no Python 3.8 here")
        for arguments in ([], ["--help"], ["--check", "--config", "x"]):
            run = subprocess.run([old, BROKER, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
            self.assertNotEqual(run.returncode, 0)
            self.assertEqual(run.stderr.count(b"\n"), 1, run.stderr)
            self.assertIn(b"3.9", run.stderr)

    @posix_only
    def test_without_ctypes_is_said_and_gone_on_with(self):
        # It is an optional part of Python, which some builds leave out.
        broker = self.broker(self.stub(), script=self.start_with("sys.modules['ctypes'] = None"))
        self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)
        if sys.platform == "linux":
            self.assertRegex(broker.stderr_text(), "warning: [^\n]*ctypes")

    def test_without_a_name_server_has_no_need_of_one_for_this_machine_or_a_number(self):
        # Attack: who answers for a name, or makes its look-up last, decides where the key goes, or who waits.
        dead = "import socket, time\nlook_up = socket.getaddrinfo\n"
        dead += "def never(*a, flags=0, **k):\n"
        dead += f"    return look_up(*a, flags=flags, **k) if flags & {int(socket.AI_NUMERICHOST)} else time.sleep(60)\n"
        dead += "socket.getaddrinfo = never\n"
        stub = self.stub()
        urls = [f"http://127.0.0.1:{stub.port}", f"http://localhost:{stub.port}"]
        script = self.start_with(dead)
        brokers = self.brokers({url: {"config": {"upstream_base_url": url}, "script": script} for url in urls})
        for url, broker in brokers.items():
            with self.subTest(url):
                self.assertEqual(broker.post_json(CHAT, {"model": "m"}, timeout=10).status, 200)


@linux_only
class FirstProcess(BrokerTestCase):
    """In a container the broker may be PID 1, to which everybody's orphans fall."""

    def test_buries_what_others_leave_behind(self):
        unshare = shutil.which("unshare")
        namespace = [unshare or "", "--pid", "--fork", "--kill-child"]
        if os.getuid() or not unshare or subprocess.run([*namespace, "true"], capture_output=True, timeout=20).returncode:
            self.skipTest("only root can make a PID namespace")
        folder, secret = self.folder(), canary()
        # Its child is an orphan from the moment on that it has shown the secret, and ends a moment later.
        program = make_executable(folder, "op", f"(setsid sh -c 'sleep 0.3; echo >> \"{folder}/ended\"' &) ; echo {secret}\n")
        config = {"secret_source": {"kind": "command", "argv": [program], "cache_seconds": 0}}
        broker = self.broker(
            self.stub(),
            config=config,
            secret=secret,
            env={SECRET_VARIABLE: ABSENT},
            python=unshare,
            python_args=[*namespace[1:], sys.executable],
        )
        (first,) = self.children(broker.pid)
        self.addCleanup(self.end, first)
        for _ in range(3):
            self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)
        eventually(lambda: os.path.exists(f"{folder}/ended") and os.path.getsize(f"{folder}/ended") == 4, what="all orphans' end")
        eventually(lambda: not self.children(first), 5, "the burial of all orphans")
        # And its own children are not taken from it.
        self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)

    def end(self, process):
        # unshare passes no signal on, but ends with it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)

    def children(self, process):
        with open(f"/proc/{process}/task/{process}/children", encoding="ascii") as file:
            return [int(number) for number in file.read().split()]


class TlsKeyLog(BrokerTestCase):
    def test_is_not_written(self):
        stub = self.stub(tls=True)
        path = os.path.join(self.folder(), "keys")
        broker = self.broker(stub, env={"SSLKEYLOGFILE": path})
        self.assertEqual(broker.post_json(CHAT, {"model": "m"}).status, 200)
        self.assertEqual(len(stub.requests), 1)
        self.assertFalse(os.path.exists(path))
        run = run_broker("--check", config={}, upstream=stub, env={"SSLKEYLOGFILE": path})
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertFalse(os.path.exists(path))


@posix_only
class Files(BrokerTestCase):
    def test_that_the_broker_makes_are_for_its_user_alone(self):
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        broker = self.broker(self.stub(), config={"event_log": "logs.jsonl"}, cwd=self.folder())
        broker.post_json(CHAT, {"model": "m"})
        made = set(os.listdir(broker.folder)) - {"broker_config.json"}
        self.assertEqual(made, {"logs.jsonl"})
        self.assertEqual(os.stat(os.path.join(broker.folder, "logs.jsonl")).st_mode & 0o7777, 0o600)


STATE = """
import json, os, re, resource, signal, sys
mask = os.umask(0)
open_ones = {}
for name in os.listdir("/proc/self/fd"):
    try:
        open_ones[int(name)] = os.readlink("/proc/self/fd/" + name)
    except OSError:
        pass  # the one that listdir itself had open
with open("/proc/self/status") as file:
    signals = dict(re.findall(r"(?m)^(Sig\\w+):\\s+([0-9a-f]{16})$", file.read()))
print(json.dumps({
    "mask": mask,
    "folder": os.getcwd(),
    "group": os.getpgrp(),
    "session": os.getsid(0),
    "parent": os.getppid(),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "signals": signals,
    "open": open_ones,
}))
"""
# Python ignores SIGPIPE and SIGXFSZ as it starts, so does the one that looks; libc's own two are left ignored by vfork.
NOT_OURS = sum(1 << (number - 1) for number in (13, 25, 32, 33))


@linux_only
class CommandUnderUs(BrokerTestCase):
    """It finds itself where its caller's shell would have put it."""

    @classmethod
    def setUpClass(cls):
        import resource

        # Readable, so that it shows what our caller had, not what Python makes of it.
        cls.limits = {
            "core": (8192, resource.getrlimit(resource.RLIMIT_CORE)[1]),
            "files": (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        }
        if cls.limits["core"][1] != resource.RLIM_INFINITY:
            cls.limits["core"] = (cls.limits["core"][1],) * 2

        def set_up():
            os.umask(0o037)
            resource.setrlimit(resource.RLIMIT_CORE, cls.limits["core"])
            resource.setrlimit(resource.RLIMIT_NOFILE, cls.limits["files"])

        cls.run_of_it = run_broker(config={}, command=[sys.executable, "-c", STATE], preexec_fn=set_up, timeout=30)
        if cls.run_of_it.returncode:
            raise AssertionError(cls.run_of_it.stderr)
        cls.state = json.loads(cls.run_of_it.stdout)

    def test_has_its_callers_umask_and_folder(self):
        self.assertEqual(self.state["mask"], 0o037)
        self.assertEqual(self.state["folder"], self.run_of_it.folder)

    def test_has_its_callers_limits(self):
        for name, limits in self.limits.items():
            with self.subTest(name):
                self.assertEqual(tuple(self.state[name]), limits)

    def test_is_in_its_callers_process_group_and_session(self):
        # The broker was made the leader of both.
        self.assertEqual(self.state["group"], self.state["parent"])
        self.assertEqual(self.state["session"], self.state["parent"])

    def test_has_the_default_disposition_of_every_signal(self):
        masks = {name: int(mask, 16) for name, mask in self.state["signals"].items()}
        self.assertEqual(masks["SigBlk"], 0)
        self.assertEqual(masks["SigIgn"] & ~NOT_OURS, 0)

    def test_that_is_no_python_has_them_too(self):
        run = run_broker(config={}, command=["cat", "/proc/self/status"])
        masks = dict(re.findall(r"(?m)^(Sig(?:Blk|Ign|Cgt)):\s+(\w+)$", run.stdout))
        found = {name: int(mask, 16) & ~(3 << 31) for name, mask in masks.items()}
        self.assertEqual(found, {"SigBlk": 0, "SigIgn": 0, "SigCgt": 0})

    def test_has_the_three_standard_descriptors_and_no_others(self):
        self.assertEqual(sorted(self.state["open"]), ["0", "1", "2"])

    def test_may_be_stopped_and_ended_as_any_other(self):
        keywords = {
            number: {"args": ["--dry-run"], "command": ["sh", "-c", f"kill -{int(number)} $$; echo survived"]}
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE)
        }
        for number, call in run_each(keywords).items():
            with self.subTest(number):
                self.assertEqual((call().returncode, call().stdout), (128 + number, ""))


if __name__ == "__main__":
    unittest.main()
