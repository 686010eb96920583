"""What a person sits at: a terminal to be asked on, and to watch."""

import contextlib
import os
import unittest

from tests.support import eventually

try:
    import fcntl
    import pty
    import termios
except ImportError:
    pty = None

with_terminals = unittest.skipUnless(pty, "there are no terminals here")


class Terminal:
    """A terminal of the test's own. As preexec_fn, in a new session: `attach` makes it the controlling one,
    `attach_stderr` makes it what is written to as well."""

    def __init__(self, case):
        self.master, self.slave = pty.openpty()
        self.shown = b""
        case.addCleanup(self.close)
        os.set_blocking(self.master, False)

    def attach(self):
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    def attach_stderr(self):
        self.attach()
        os.dup2(self.slave, 2)

    def close(self):
        for descriptor in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def read(self):
        """All that was shown so far."""
        with contextlib.suppress(OSError):
            self.shown += os.read(self.master, 65536)
        return self.shown

    def wait_for(self, words, count=1):
        def look():
            return self.read().count(words.encode()) >= count

        eventually(look, what=f"{words!r} on the terminal")

    def echoes(self):
        return bool(termios.tcgetattr(self.slave)[3] & termios.ECHO)

    def type(self, text):
        eventually(lambda: not self.echoes(), what="the end of the echo")
        os.write(self.master, text.encode())
