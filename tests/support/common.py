"""What every test needs of the machine: paths, ports, programs, time."""

import contextlib
import os
import random
import socket
import sys
import time
import unittest

TESTS = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
ROOT = os.path.dirname(TESTS)

# The promised time-outs of 10 to 60 seconds are waited for only when somebody asks for it.
slow = unittest.skipUnless(os.environ.get("BROKER_SLOW_TESTS"), "BROKER_SLOW_TESTS is not set")

posix_only = unittest.skipUnless(os.name == "posix", "POSIX only")
linux_only = unittest.skipUnless(sys.platform == "linux", "Linux only")


class Gone(ConnectionError):
    """The peer closed while more of it was awaited."""


def eventually(condition, timeout=10, what="it"):
    """The first true value of `condition()`; an AssertionError when none comes in time."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come about within {timeout} s")
        time.sleep(0.005)


def free_port():
    """A port of 127.0.0.1 that nobody holds just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def make_executable(folder, name, script, interpreter="/bin/sh"):
    """Place a small program in `folder` (a fake `op` or `az`) and return its path. A script
    without a `#!` line gets one for `interpreter`; say `sys.executable` there for Python."""
    path = os.path.join(folder, name)
    if not script.startswith("#!"):
        script = f"#!{interpreter}\n{script}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(script)
    os.chmod(path, 0o755)
    return path


class Lifeline:
    """Tells whether processes live, without their numbers: who holds this FIFO open for writing.

    A shell takes hold of it by `exec 9>PATH; echo >&9`, and its children inherit that."""

    def __init__(self, path):
        self.path = path
        os.mkfifo(path, 0o600)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._seen = False

    def has_begun(self):
        with contextlib.suppress(BlockingIOError):
            self._seen = self._seen or bool(os.read(self._descriptor, 65536))
        return self._seen

    def has_ended(self):
        """True once somebody had it open and nobody has any more."""
        self.has_begun()
        try:
            return self._seen and not os.read(self._descriptor, 65536)
        except BlockingIOError:
            return False

    def close(self):
        os.close(self._descriptor)


def seeded(name):
    """A random generator that gives each test the same inputs at every run."""
    return random.Random("broker " + name)


def header_pairs(headers):
    """Headers given as a dictionary, as pairs or not at all: as a new list of pairs."""
    return list(headers.items() if isinstance(headers, dict) else headers or ())


class Headers:
    """What answers and requests have in common: `headers`, (name, value) in order."""

    headers = ()

    def all(self, name):
        """The values of this header, in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]
