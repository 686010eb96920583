"""The table of guards (`python tests/guards.py` tries them all) can be tried, and its runner tells when one guards nothing."""

import contextlib
import importlib
import io
import os
import unittest

import broker
from tests import guards
from tests.support import ROOT, posix_only

with open(os.path.join(ROOT, "broker.py"), encoding="utf-8") as file:
    SOURCE = file.read()


class Table(unittest.TestCase):
    def test_has_each_name_once(self):
        names = [guard.name for guard in guards.GUARDS]
        self.assertEqual(sorted(set(names)), sorted(names))

    def test_names_lines_that_stand_in_the_program_once(self):
        for guard in guards.GUARDS:
            with self.subTest(guard.name):
                guards.source_without(guard, SOURCE)

    def test_names_tests_that_are_there(self):
        for guard in guards.GUARDS:
            with self.subTest(guard.name):
                module, *names = guard.test.split(".")
                found = importlib.import_module("tests." + module)
                for name in names:
                    found = getattr(found, name)

    def test_names_every_error_code(self):
        named = {code for guard in guards.GUARDS for code in guard.codes.split()}
        self.assertEqual(named, set(broker.ERRORS))


def nothing_is_taken_out(line):
    test = "test_guards.Table.test_has_each_name_once"
    return guards.Guard("nothing", "Nobody does anything.", line, line, test, lambda scene: True)


class Runner(unittest.TestCase):
    def run_it(self, guard):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = guards.main([], [guard])
        return code, printed.getvalue()

    @posix_only
    def test_tells_of_a_guard_that_guards_nothing(self):
        code, printed = self.run_it(nothing_is_taken_out("check_query(head.query)"))
        self.assertEqual(code, 1)
        self.assertIn("FAILED nothing: attack works without it, works with it; test_guards.Table.", printed)
        self.assertRegex(printed, r"\nguards: 1 tried, 0 hold, 1 failed, 0 skipped, \d+ s\n\Z")

    def test_tells_of_a_line_that_is_not_there_once(self):
        for line, found in (("no such line", "not found in"), ("def ", "times in")):
            with self.subTest(found):
                code, printed = self.run_it(nothing_is_taken_out(line))
                self.assertEqual(code, 1)
                self.assertIn(found, printed)


if __name__ == "__main__":
    unittest.main()
