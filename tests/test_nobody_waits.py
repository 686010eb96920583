"""No caller, and nobody without a token, can hold up the others.

Nothing here looks at a clock: the others' requests come to their end while the attack is seen to go on, before the
first of them and after the last. `python tests/hold_up.py` says how long they waited.
"""

import copy

from tests.support import BrokerTestCase, linux_only, slow

try:
    from tests import hold_up
except ImportError:  # no fcntl, no termios: Windows
    hold_up = None

REQUESTS = 10
SENDERS = 12  # of 30 MB each: more than the broker takes at a time, so that some are refused unread
DEAREST = ("30 MB of [", '30 MB of {"a":1},')


@linux_only  # what is left behind is seen in /proc
class NobodyWaits(BrokerTestCase):
    def assert_not_held_up_by(self, name, attackers=None):
        """The others are served meanwhile; threads and descriptors are as before, memory nearly so."""
        attack = copy.copy(hold_up.ATTACKS[name])
        if attackers:
            attack.count = attackers
        row = hold_up.measure(attack, REQUESTS)
        self.assertEqual(len(row.waits), REQUESTS)
        self.assertEqual(row.left_behind, [], row._replace(waits=[]))

    def test_for_strangers_who_pipeline(self):
        self.assert_not_held_up_by("40 strangers who pipeline")

    def test_for_strangers_with_bad_tokens(self):
        self.assert_not_held_up_by("200 with bad tokens")

    def test_for_bodies_in_chunks_of_one_byte(self):
        self.assert_not_held_up_by("40 bodies in one-byte chunks")

    def test_for_callers_who_never_read_their_answers(self):
        self.assert_not_held_up_by("40 who never read their stream")

    def test_for_json_that_is_costly_to_parse(self):
        for name in DEAREST:
            with self.subTest(name):
                self.assert_not_held_up_by(name, SENDERS)

    @slow
    def test_for_any_other_json(self):
        for name in hold_up.JSON_TEXTS.keys() - set(DEAREST):
            with self.subTest(name):
                self.assert_not_held_up_by(name)

    def test_for_a_pipe_that_nobody_reads(self):
        self.assert_not_held_up_by("stderr: a full pipe")

    def test_for_a_terminal_whose_output_was_stopped(self):
        self.assert_not_held_up_by("stderr: a stopped terminal")

    def test_for_a_name_server_that_gives_no_answer(self):
        self.assert_not_held_up_by("40 who wait for a name server")

    def test_for_a_secret_command_whose_children_hold_its_pipes(self):
        self.assert_not_held_up_by("a secret command whose children stay")

    def test_for_sixty_rotations_of_a_long_key(self):
        self.assert_not_held_up_by("60 rotations of a 4 kB key")

    def test_every_attack_is_tried(self):
        with open(__file__, encoding="utf-8") as file:
            text = file.read()
        for name in hold_up.ATTACKS.keys() - hold_up.JSON_TEXTS.keys() - {"nobody"}:
            self.assertIn(f'self.assert_not_held_up_by("{name}")', text)
