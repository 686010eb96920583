"""`--report`: who used what, day by day, as a table and for programs; and what of each day's budget is gone."""

import json
import os

from tests.long_form import CHAT, LongForm, day, pair, request_line
from tests.support import BrokerTestCase, posix_only, run_broker

MESSAGES = "/v1/messages"


def on(date, lines):
    """The lines of today, as if written on another day."""
    return lines.replace(f'"time":"{day()}', f'"time":"{date}')


def denied(id, client, reason, model=None, **more):
    fields = {"time": day() + "T00:00:00.000Z", "event": "denied", "id": id, "status": 403, "reason": reason}
    fields.update({"client": client} if client else {}, method="POST", path=CHAT, model=model, **more)
    return json.dumps(fields, separators=(",", ":")) + "\n"


LONG = "m" * 60_000


def log():
    return "".join(
        [
            on("2026-01-01", pair("a", 10, client="alice")),
            on("2026-01-02", pair("b", 20, client="alice")),
            on("2026-01-02", pair("c", 30, client="bob")),
            on("2026-01-02", pair("d", 40, client="bob").replace('"model":"m"', '"model":"other"')),
            on("2026-01-02", pair("e", 50, client="bob").replace(CHAT, MESSAGES)),
            on("2026-01-02", pair("f", None, client="bob", outcome="upstream_error")),
            pair("g", 100, client="alice"),
            request_line("h", client="alice", size=400),
            denied("i", "alice", "budget_exhausted", "m"),
            denied("j", "alice", "budget_exhausted", "m", suppressed=4),
            denied("k", "alice", "model_not_allowed", "dear"),
            denied("l", None, "client_token_required"),
            "no json\n",
            pair("n", 1, client="bob").replace('"model":"m"', f'"model":"{LONG}"'),
        ]
    )


def keep(text):
    def prepare(run):
        with open(run.log_path, "w", encoding="ascii") as file:
            file.write(text)

    return prepare


def form():
    return LongForm(None, {"alice": {"tokens_per_day": 5000}, "bob": {}, "carol": {"tokens_per_day": 700}})


class Report(BrokerTestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.today = day()
        cls.run_json = run_broker("--report", "--json", prepare=keep(log()), **form().options)
        cls.run_table = run_broker("--report", prepare=keep(log()), **form().options)
        cls.objects = [json.loads(line) for line in cls.run_json.stdout.splitlines()]

    def rows(self, **wanted):
        return [row for row in self.objects if "requests" in row and wanted.items() <= row.items()]

    def test_has_a_row_a_day_client_path_and_model(self):
        self.assertEqual(self.run_json.returncode, 0, self.run_json.stderr)
        keys = [(row["day"], row["client"], row["path"], row["model"][:9]) for row in self.rows()]
        self.assertEqual(
            sorted(keys),
            sorted(
                [
                    ("2026-01-01", "alice", CHAT, "m"),
                    ("2026-01-02", "alice", CHAT, "m"),
                    ("2026-01-02", "bob", CHAT, "m"),
                    ("2026-01-02", "bob", CHAT, "other"),
                    ("2026-01-02", "bob", MESSAGES, "m"),
                    (self.today, "alice", CHAT, "m"),
                    (self.today, "alice", CHAT, "dear"),
                    (self.today, "-", CHAT, "-"),
                    (self.today, "bob", CHAT, LONG[:9]),
                ]
            ),
        )

    def test_for_programs_has_these_members_and_no_others(self):
        row = self.rows(day="2026-01-02", client="bob", path=CHAT, model="m")[0]
        wanted = {
            "day": "2026-01-02",
            "client": "bob",
            "path": CHAT,
            "model": "m",
            "requests": 2,
            "denied": {},
            "errors": 1,
            "p50_ms": 2.0,
            "p95_ms": 2.0,
            "input_tokens": 1,
            "output_tokens": 29,
        }
        self.assertEqual(row, wanted)
        for row in self.rows():
            self.assertEqual(set(row), set(wanted))

    def test_counts_denials_for_each_client_by_their_reason(self):
        self.assertEqual(self.rows(day=self.today, client="alice", model="m")[0]["denied"], {"budget_exhausted": 6})
        self.assertEqual(self.rows(day=self.today, client="alice", model="dear")[0]["denied"], {"model_not_allowed": 1})
        self.assertEqual(self.rows(day=self.today, client="-")[0]["denied"], {"client_token_required": 1})
        self.assertRegex(self.run_table.stdout, r"alice .*budget_exhausted\W+6\b")

    def test_says_what_is_gone_of_each_budget_today(self):
        shares = [row for row in self.objects if "requests" not in row]
        self.assertEqual(
            shares,
            [
                {"client": "alice", "day": self.today, "tokens_per_day": 5000, "used": 200},
                {"client": "carol", "day": self.today, "tokens_per_day": 700, "used": 0},
            ],
        )
        last = self.run_table.stdout.splitlines()
        self.assertTrue([line for line in last if "alice" in line and "200" in line and "5000" in line], last)
        self.assertTrue([line for line in last if "carol" in line and "700" in line], last)

    def test_says_what_it_could_not_read_and_for_programs_not_among_the_rows(self):
        self.assertRegex(self.run_table.stdout + self.run_table.stderr, r"\b1 lines?\b.*read")
        self.assertRegex(self.run_json.stderr, r"\b1 lines?\b.*read")

    def test_has_no_cell_wider_than_60_characters(self):
        widest = max(len(word) for line in self.run_table.stdout.splitlines() for word in line.split())
        self.assertLessEqual(widest, 60)
        self.assertIn("mmmm", self.run_table.stdout)
        self.assertLess(max(map(len, self.run_table.stdout.splitlines())), 400)


class ReportOfWhatIsNoLog(BrokerTestCase):
    @posix_only
    def test_a_fifo_is_refused_and_not_waited_for(self):
        run = run_broker("--report", config={}, prepare=lambda run: os.mkfifo(run.log_path), timeout=15)
        self.assertEqual((run.returncode, run.stdout, run.stderr.count("\n")), (1, "", 1), run.stderr)
        self.assertIn("events.jsonl", run.stderr)

    def test_json_goes_with_report_only(self):
        run = run_broker("--json", config={})
        self.assertEqual((run.returncode, run.stdout), (2, ""))
        self.assertIn("--report", run.stderr)
