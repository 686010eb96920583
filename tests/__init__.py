"""The tests. Found by discovery (`python -m unittest`), their modules run in three processes beside each other: most of
them wait for a broker, an upstream or a browser most of the time. What they have to say is told when a module ends.

Named (`python -m unittest tests.test_config`), with `-f` or `-b`, under BROKER_TEST_PROCESSES=1, or where there is only
one core, they run in this process, one after the other."""

import concurrent.futures
import multiprocessing
import os
import sys
import traceback
import unittest
import warnings

CORES = os.cpu_count() or 1
PROCESSES = int(os.environ.get("BROKER_TEST_PROCESSES") or (min(3, CORES + 1) if CORES > 1 else 1))
LONGEST = ("tests.test_nobody_waits", "tests.test_browser", "tests.test_readme")


def load_tests(loader, tests, pattern):
    """What discovery asks for this folder's tests."""
    found = loader.discover(os.path.dirname(os.path.realpath(__file__)), pattern=pattern or "test*.py")
    return Beside(found, loader.testNamePatterns)


class Beside(unittest.TestSuite):
    def __init__(self, found=(), patterns=None):
        super().__init__(found)
        self.patterns = patterns

    def run(self, result, debug=False):
        modules = {type(test).__module__ for test in each(self)}
        if debug or result.failfast or result.buffer or PROCESSES < 2 or "unittest.loader" in modules:  # one can't be loaded
            return super().run(result, debug)
        try:
            pool = concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn"))
        except (ImportError, NotImplementedError, OSError):  # a sandbox without semaphores
            return super().run(result, debug)
        try:
            longest_first = sorted(modules, key=lambda name: (name not in LONGEST, name))
            for call in concurrent.futures.as_completed([pool.submit(run_module, name, self.patterns) for name in longest_first]):
                for method, test, *more in call.result():
                    if hasattr(result, method):  # addDuration came later than Python 3.9
                        getattr(result, method)(test, *more)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return result


def each(suite):
    for test in suite:
        yield from each(test) if isinstance(test, unittest.TestSuite) else [test]


def run_module(name, patterns):
    """In a process of its own: what a result is told of the module's tests, as (method, test, …)."""
    if not sys.warnoptions:
        warnings.simplefilter("default")  # as the runner has it
    loader, result = unittest.TestLoader(), Recorder()
    loader.testNamePatterns = patterns
    loader.loadTestsFromName(name).run(result)
    return result.said


class Told:
    """A test that ran elsewhere, as far as a result wants to know it."""

    failureException = AssertionError

    def __init__(self, test):
        self.names = test.id(), str(test), test.shortDescription()

    def id(self):
        return self.names[0]

    def __str__(self):
        return self.names[1]

    def shortDescription(self):
        return self.names[2]


class Elsewhere(Exception):
    """What went wrong there, as text."""


class FailedElsewhere(Elsewhere, AssertionError):
    pass


class Recorder(unittest.TestResult):
    def __init__(self):
        super().__init__()
        self.said = []

    def __getattribute__(self, name):
        told = super().__getattribute__(name)
        if not name.startswith("add") and name not in ("startTest", "stopTest"):
            return told

        def note(test, *more):
            told(test, *more)
            self.said.append((name, Told(test), *map(self.picklable, more)))

        return note

    @staticmethod
    def picklable(value):
        if isinstance(value, tuple):  # as of sys.exc_info()
            kind = FailedElsewhere if issubclass(value[0], AssertionError) else Elsewhere
            return kind, kind("\n" + "".join(traceback.format_exception(*value))), None
        return Told(value) if isinstance(value, unittest.TestCase) else value
