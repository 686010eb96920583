"""The test cases: what they start is ended after them, and nothing that goes wrong in silence stays so."""

import contextlib
import functools
import gc
import os
import shutil
import sys
import tempfile
import threading
import traceback
import unittest
import warnings

from .broker import Broker
from .upstream import StubUpstream, stop_stub

NOT_TO_BE_RETRIED = {
    "secret_unavailable",
    "event_log_unavailable",
    "upstream_rejected_secret",
    "upstream_redirect",
    "upstream_tls_error",
}


class Muttered(contextlib.AbstractContextManager):
    """Notes what Python would only mutter about: a socket left open, an exception in a thread or a destructor."""

    def __enter__(self):
        self.what = []
        self._hooks = sys.unraisablehook, threading.excepthook
        sys.unraisablehook = lambda what: self.what.append(f"{what.exc_value!r} in {what.object!r}")
        threading.excepthook = lambda what: self.what.append(
            "".join(traceback.format_exception(what.exc_type, what.exc_value, what.exc_traceback))
        )
        # As an error it reaches the hook above: a destructor has nobody to raise it to.
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        warnings.simplefilter("error", ResourceWarning)
        return self

    def __exit__(self, *error):
        self._filters.__exit__(*error)
        sys.unraisablehook, threading.excepthook = self._hooks

    def check(self):
        gc.collect()
        if self.what:
            raise AssertionError("left behind: " + "; ".join(self.what))


@functools.cache
def freeze_once():
    """All modules are loaded when the first test runs, and a collection after each need not look through them."""
    gc.freeze()


class BrokerTestCase(unittest.TestCase):
    """Cleans up after itself, and fails by what Python only mutters about."""

    longMessage = True
    maxDiff = None

    def run(self, result=None):
        freeze_once()
        with Muttered() as muttered:
            # Added first, so it runs last, when everything of the test has been closed.
            self.addCleanup(muttered.check)
            return super().run(result)

    # A stub or a broker for this test, or for the whole class (from setUpClass)

    def stub(self, *args, **keywords):
        stub = StubUpstream(*args, **keywords)
        self.addCleanup(stop_stub, stub)
        return stub

    def broker(self, *args, **keywords):
        """A running Broker that is closed, and searched for leaks, after the test."""
        broker = Broker(*args, **keywords)
        self.addCleanup(broker.close)
        return broker

    def brokers(self, cases):
        """Several that start beside each other: {case: keywords of Broker} -> {case: running Broker}."""
        brokers = {case: self.broker(**{"wait_ready": False, **keywords}) for case, keywords in cases.items()}
        self.addCleanup(lambda: [broker.ask_to_stop() for broker in brokers.values()])
        for broker in brokers.values():
            broker.wait_ready()
        return brokers

    @classmethod
    def class_stub(cls, *args, **keywords):
        stub = StubUpstream(*args, **keywords)
        cls.addClassCleanup(stop_stub, stub)
        return stub

    @classmethod
    def class_broker(cls, *args, **keywords):
        broker = Broker(*args, **keywords)
        cls.addClassCleanup(broker.close)
        return broker

    def folder(self):
        """A fresh folder, removed after the test."""
        folder = os.path.realpath(tempfile.mkdtemp(prefix="broker-test-"))
        self.addCleanup(shutil.rmtree, folder, True)
        return folder

    @classmethod
    def class_folder(cls):
        """A fresh folder, removed after the class."""
        folder = os.path.realpath(tempfile.mkdtemp(prefix="broker-test-"))
        cls.addClassCleanup(shutil.rmtree, folder, True)
        return folder

    # What is asserted again and again

    def assert_refused(self, answer, status, code):
        """One of the broker's own errors, in the shape that all of them have."""
        self.assertEqual((answer.status, answer.code), (status, code), answer)
        self.assertEqual(answer.header("Content-Type"), "application/json")
        body = answer.json()
        self.assertEqual(set(body), {"type", "error"})
        self.assertEqual(body["type"], "error")
        self.assertEqual(set(body["error"]), {"type", "code", "message", "param"})
        self.assertEqual((body["error"]["type"], body["error"]["code"]), (code, code))
        self.assertIsNone(body["error"]["param"])
        self.assertTrue(body["error"]["message"])
        self.assertTrue(answer.header("X-Broker-Request-Id"))
        if status != 429:  # there it depends on how long the wait is
            never = (400 <= status < 500 and status != 408) or code in NOT_TO_BE_RETRIED
            self.assertEqual(answer.header("x-should-retry"), "false" if never else None)


class SharedBroker(BrokerTestCase):
    """One broker (`served`), with one stub (`upstream`), for all tests of a class: for tests that change nothing.

    A subclass says how it is started. What it let out is searched for leaks after the last test, and the stub
    forgets what it saw before each. A class without tests of its own is started for nobody: put what several
    classes share into one."""

    tls = False  # as for StubUpstream
    config = env = secret = None  # as for Broker
    dry_run = False

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.muttered_by_class = Muttered()
        cls.muttered_by_class.__enter__()
        cls.addClassCleanup(cls.muttered_by_class.__exit__, None, None, None)
        cls.addClassCleanup(cls.muttered_by_class.check)
        cls.upstream = cls.class_stub(tls=cls.tls)
        keywords = {"config": cls.config, "env": cls.env, "secret": cls.secret, "dry_run": cls.dry_run}
        cls.served = cls.class_broker(cls.upstream, **keywords)

    def setUp(self):
        super().setUp()
        self.upstream.forget()
