"""Brokers without what a start costs: forks of a Python that has imported `broker.py` already.

A start takes a fifth of a second of processor time, nearly all of it for imports, and the tests start hundreds.
A fork is a process of its own with its own arguments, environment, folder, mask, session and descriptors, and calls
`main` as the installed command does. Whatever a test says of the start itself (the script, the interpreter, signals that are
ignored, a terminal) it gets by a start; so does everybody where the kernel has no descriptor for a process, and with
BROKER_TEST_START=command.

This file is both sides: a module for the tests, and the program that forks.
"""

import atexit
import contextlib
import gc
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

POSSIBLE = hasattr(os, "pidfd_open") and not {"BROKER_TEST_START", "COVERAGE_PROCESS_START"} & set(os.environ)

# What Python looks at only as it starts.
AT_THE_START = ("PYTHON", "LC_", "LANG", "LD_", "TZ", "OPENSSL", "MALLOC")


def will_do(env):
    """Whether a fork is what a start with this environment would be."""
    return POSSIBLE and not any(name.startswith(AT_THE_START) and value != "C.UTF-8" for name, value in env.items())


def umask():
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return int(re.search("(?m)^Umask:\\s*([0-7]+)", file.read())[1], 8)


class _Forking:
    """The program that forks, started when the first broker is wanted."""

    def __init__(self):
        self._lock = threading.Lock()
        self._line = None

    def send(self, argv, env, cwd, descriptors):
        with self._lock:
            if self._line is None:
                self._start(env)
            socket.send_fds(self._line, [json.dumps([argv, env, cwd, umask()]).encode()], descriptors)

    def _start(self, env):
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, os.path.realpath(__file__)],
                env={name: env[name] for name in ("LANG", "PATH", "HOME") if name in env},
                stdin=theirs,
                stdout=theirs,  # no pipe, but no more a file or a terminal than one
                start_new_session=True,
            )
        atexit.register(process.wait)
        atexit.register(self._line.close)  # which comes first, and ends it


_forking = _Forking()


class Fork:
    """A broker, as subprocess.Popen gives one, as far as the tests use that."""

    stdin = None

    def __init__(self, argv, env, cwd):
        self.returncode = None
        self._lock = threading.Lock()
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        nothing = os.open(os.devnull, os.O_RDONLY)
        (stdout, its_stdout), (stderr, its_stderr) = os.pipe(), os.pipe()
        self.stdout, self.stderr = open(stdout, "rb", 0), open(stderr, "rb", 0)
        try:
            _forking.send(argv, env, cwd, [theirs.fileno(), nothing, its_stdout, its_stderr])
        finally:
            theirs.close()
            for descriptor in (nothing, its_stdout, its_stderr):
                os.close(descriptor)
        self.pid = int(self._line.recv(16))

    def wait(self, timeout=None):
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._line, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("broker", timeout)
        with self._lock:
            if self.returncode is None:
                self.returncode = int(self._line.recv(16))
                self._line.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, nothing=None, timeout=3600):
        """All that it says on its stdout and its stderr, once nobody has these any more, and it has ended."""
        deadline = time.monotonic() + timeout
        left = lambda: max(0, deadline - time.monotonic())  # noqa: E731
        said = {self.stdout.fileno(): bytearray(), self.stderr.fileno(): bytearray()}
        poll = select.poll()
        for descriptor in said:
            poll.register(descriptor, select.POLLIN)
        unended = len(said)
        while unended:
            ready = poll.poll(left() * 1000)
            if not ready:
                raise subprocess.TimeoutExpired("broker", timeout)
            for descriptor, _ in ready:
                data = os.read(descriptor, 65536)
                said[descriptor] += data
                if not data:
                    poll.unregister(descriptor)
                    unended -= 1
        self.wait(left())
        stdout, stderr = map(bytes, said.values())
        self.stdout.close()
        self.stderr.close()
        return stdout, stderr

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(15)

    def kill(self):
        self.send_signal(9)


def serve(line):
    """Forks a broker for each message on `line`: its arguments, environment, folder and mask, and with them four descriptors,
    its three and one where its number and in the end its exit code are told. Returns in each fork, with its arguments."""
    poll = select.poll()
    poll.register(line, select.POLLIN)
    running = {}
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == line:
                with socket.socket(fileno=os.dup(line)) as sock:
                    message, descriptors, _, _ = socket.recv_fds(sock, 1 << 20, 4)
                if not message:
                    os._exit(0)
                pid = os.fork()
                if not pid:
                    return become(*json.loads(message), descriptors[1:])
                for unneeded in descriptors[1:]:
                    os.close(unneeded)
                tell(descriptors[0], pid)
                process = os.pidfd_open(pid)
                running[process] = pid, descriptors[0]
                poll.register(process, select.POLLIN)
            else:
                pid, whom = running.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                tell(whom, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(whom)


def tell(whom, number):
    with contextlib.suppress(OSError):  # a test that has gone
        os.write(whom, str(number).encode())


def become(argv, env, cwd, mask, descriptors):
    os.setsid()
    os.umask(mask)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, 1024)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    return argv


if __name__ == "__main__":
    sys.path[0] = ROOT
    # What it needs later too.
    import argparse  # noqa: F401
    import ctypes  # noqa: F401
    import urllib.request  # noqa: F401

    from broker import main

    gc.freeze()
    sys.argv = serve(0)
    sys.exit(main())
