"""Many callers at once: none waits for another, none takes what is another's, and nothing of them stays."""

import string
import threading
import unittest

from tests.support import BrokerTestCase, Gone, eventually, linux_only

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
JSON = ("Content-Type", "application/json")
MIB = 1 << 20

STREAMS = 300


def setUpModule():
    """Each stream takes two descriptors here and two in the broker; the usual limit is 256 to 1024."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        unittest.addModuleCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))


class LoadTestCase(BrokerTestCase):
    def open(self, broker, count):
        """So many connections, closed after the test."""
        callers = []
        for _ in range(count):
            callers.append(broker.connect())
            self.addCleanup(callers[-1].close)
        return callers

    def assert_health(self, caller):
        caller.send(caller.broker.head("GET", "/healthz", token=False))
        self.assertEqual(caller.read_answer().json(), {"ok": True})

    def assert_closed(self, caller):
        """The broker has hung up on this one, and says nothing."""
        self.assertEqual(caller.read_all(), b"")


class ManyStreamsAtOnce(LoadTestCase):
    @linux_only
    def test_each_get_their_own_events_at_once_and_leave_nothing_behind(self):
        rounds = [threading.Event() for _ in range(4)]

        def stream(conn, request):
            name = request.json()["name"]
            conn.start_stream()
            for number, event in enumerate(rounds):
                conn.hold(event)
                conn.chunk(b"data: %d %d\n\n" % (name, number))
            conn.end()

        stub = self.stub()
        broker = self.broker(stub, config={"max_concurrent_requests": STREAMS})
        self.assertEqual(broker.request("GET", MODELS).status, 200)
        stub.script(stream)
        before = broker.fd_count() - stub.open_connections, broker.thread_count(), broker.rss_anon_kb()
        callers = self.open(broker, STREAMS)
        for name, caller in enumerate(callers):
            caller.send(broker.post_bytes(CHAT, {"name": name, "stream": True}))
        stub.wait_for_requests(STREAMS + 1)
        for caller in callers:
            self.assertEqual(caller.read_head().status, 200)
        for number, event in enumerate(rounds):
            event.set()
            for name, caller in enumerate(callers):
                self.assertEqual(caller.read_chunk(), b"data: %d %d\n\n" % (name, number))
        # 50 of them are promised to take 6 MB; ten times that each would be seen here.
        self.assertLess(broker.rss_anon_kb() - before[2], STREAMS * 250)
        for caller in callers:
            self.assertEqual(caller.read_chunk(), b"")
            caller.close()
        stub.wait_closed(64)
        now = lambda: (broker.fd_count() - stub.open_connections, broker.thread_count())  # noqa: E731
        eventually(lambda: now() <= before[:2], what="the old number of descriptors and threads")
        self.assertLess(broker.rss_anon_kb() - before[2], 16 << 10)
        outcomes = [event["outcome"] for event in broker.events() if event["event"] == "response"]
        self.assertEqual(outcomes, ["ok"] * (STREAMS + 1))

    def test_end_together_when_all_their_callers_leave(self):
        stub = self.stub(lambda conn, request: (conn.start_stream(), conn.chunk(b"data: 1\n\n"), conn.wait_gone(30)))
        broker = self.broker(stub)
        callers = self.open(broker, 100)
        for caller in callers:
            caller.send(broker.post_bytes(CHAT, {"stream": True}))
        for caller in callers:
            caller.read_head()
            self.assertEqual(caller.read_chunk(), b"data: 1\n\n")
        self.assertEqual(stub.open_connections, 100)
        for caller in callers:
            caller.close()
        stub.wait_closed(0)
        broker.wait_event(event="response", outcome="client_disconnected", count=100)
        # All places are free again.
        stub.script(lambda conn, request: conn.respond_json({}))
        self.assertEqual(broker.request("GET", MODELS).status, 200)


class TheSlow(LoadTestCase):
    def test_hold_nobody_up(self):
        def answer(conn, request):
            if request.target == MODELS:
                conn.respond_json({})
            else:
                conn.start_stream()
                while True:
                    conn.chunk(b"x" * MIB)

        stub = self.stub(answer)
        broker = self.broker(stub)
        head = broker.head("POST", CHAT, [JSON, ("Content-Length", MIB)])
        slow = self.open(broker, 60)
        for caller in slow[:15]:
            caller.send(head[:50])  # half a head
        for caller in slow[15:30]:
            caller.send(head + b'{"a": "')  # half a body
        for caller in slow[30:45]:
            caller.send(broker.post_bytes(CHAT, {}))  # an answer that is never read
            caller.read_head()
        for caller in slow[45:]:
            caller.send(b"")  # nothing at all
        for _ in range(100):
            self.assertEqual(broker.request("GET", MODELS, timeout=5).status, 200)
        # The slow ones have not been forgotten: half a body goes on where it stopped.
        caller = slow[15]
        caller.send(b"x" * (MIB - 9) + b'"}')
        self.assertEqual(caller.read_head().status, 200)

    def test_bodies_of_some_megabytes_hold_nobody_up(self):
        stub = self.stub(lambda conn, request: conn.respond_json({"got": len(request.body)}))
        broker = self.broker(stub)
        # Many small objects are what takes a JSON parser longest.
        body = b'{"a": [' + b'{"b": 1},' * 499_000 + b"{}]}"
        large = self.open(broker, 2)
        senders = [threading.Thread(target=caller.send, args=(broker.post_bytes(CHAT, body),)) for caller in large]
        for sender in senders:
            sender.start()
        for _ in range(20):
            self.assertEqual(broker.request("GET", MODELS, timeout=5).status, 200)
        for caller, sender in zip(large, senders):
            caller.settimeout(30)
            self.assertEqual(caller.read_answer().json(), {"got": len(body)})
            sender.join()


class TooManyRequests(LoadTestCase):
    def test_get_a_clean_refusal_and_the_others_their_answer(self):
        release = threading.Event()

        def hold(conn, request):
            conn.hold(release)
            conn.respond(body=request.body)

        stub = self.stub(hold)
        broker = self.broker(stub, config={"max_concurrent_requests": 20})
        callers = self.open(broker, 60)
        for number, caller in enumerate(callers):
            caller.send(broker.post_bytes(CHAT, {"number": number}))
            if number == 19:
                stub.wait_for_requests(20)
        for caller in callers[20:]:
            answer = caller.read_answer()
            self.assert_refused(answer, 503, "too_many_requests_in_flight")
            self.assertRegex(answer.header("Retry-After"), "^[0-9]+$")
        self.assertEqual(len(stub.requests), 20)
        release.set()
        for number, caller in enumerate(callers[:20]):
            self.assertEqual(caller.read_answer().json(), {"number": number})
        # Who was refused may ask again; the connection is still good if it was kept.
        eventually(lambda: broker.post_json(CHAT, {}).status == 200, what="a free place")
        reasons = [event["reason"] for event in broker.events() if event["event"] == "denied"]
        # So many a minute are written down, the others counted.
        self.assertEqual(reasons, ["too_many_requests_in_flight"] * 20)

    def test_end_their_count_whatever_became_of_them(self):
        # One that is counted for ever would close the broker in the end.
        stub, soon = self.stub(), {"upstream_timeout_seconds": 0.2}
        broker = self.broker(stub, config={"max_concurrent_requests": 2, "max_request_bytes": 9999, **soon})
        endings = {
            "answered": lambda conn, request: conn.respond_json({}),
            "refused": lambda conn, request: conn.respond_json({}, 500),
            "broken off before": lambda conn, request: conn.close(),
            "broken off after": lambda conn, request: (conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1"), conn.close()),
            "nonsense": lambda conn, request: conn.send(b"\0"),
            "silent": lambda conn, request: conn.wait_gone(5),
        }
        for case, handler in endings.items():
            with self.subTest(case):
                stub.script(handler)
                for _ in range(3):
                    with broker.connect() as caller:
                        caller.send(broker.post_bytes(CHAT, {}))
                        try:
                            self.assertNotEqual(caller.read_answer().code, "too_many_requests_in_flight")
                        except (Gone, ConnectionResetError):
                            pass
        bodies = {
            "no JSON": b"{",
            "two keys": b'{"a": 1, "a": 2}',
            "too large": b'{"a": "' + b"x" * 9999 + b'"}',
        }
        for case, body in bodies.items():
            with self.subTest(case):
                for _ in range(3):
                    self.assertIn(broker.request("POST", CHAT, body, [JSON]).status, (400, 413))
        for cut in (200, -1):
            for _ in range(3):
                broker.raw(broker.post_bytes(CHAT, {"a": "b"})[:cut], half_close=True)
        stub.script(lambda conn, request: conn.respond_json({}))
        eventually(lambda: broker.post_json(CHAT, {}).status == 200, what="a free place")


class TheBodiesTogether(LoadTestCase):
    def test_are_bounded_by_what_was_announced(self):
        stub = self.stub()
        broker = self.broker(stub, config={"max_request_bytes": 128 * MIB})
        announced = broker.head("POST", CHAT, [JSON, ("Content-Length", 128 * MIB), ("Expect", "100-continue")])
        first, second, third = self.open(broker, 3)
        for caller in (first, second):
            caller.send(announced)
            self.assertEqual(caller.read_head().status, 100)
        third.send(announced)
        answer = third.read_head()
        third.read_body(answer)
        self.assertEqual((answer.status, answer.code), (503, "too_many_requests_in_flight"))
        self.assertRegex(answer.header("Retry-After"), "^[0-9]+$")
        self.assertEqual(broker.request("GET", MODELS).status, 200)
        first.close()
        self.assertEqual(stub.errors, [])

        def there_is_room():
            with broker.connect() as caller:
                caller.send(announced)
                return caller.read_head().status == 100

        eventually(there_is_room, what="room for another body")

    def test_are_counted_until_their_request_ends(self):
        release = threading.Event()

        def hold(conn, request):
            conn.hold(release)
            conn.respond_json({})

        stub = self.stub(hold)
        broker = self.broker(stub, config={"max_request_bytes": 224 * MIB})
        holder, other = self.open(broker, 2)
        # In chunks, so that what arrived is counted and not what was announced.
        body = b'{"a": "' + b"x" * (32 * MIB - 9) + b'"}'
        holder.send(broker.head("POST", CHAT, [JSON, ("Transfer-Encoding", "chunked")]))
        holder.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        stub.wait_for_requests()
        announced = broker.head("POST", CHAT, [JSON, ("Content-Length", 224 * MIB), ("Expect", "100-continue")])
        other.send(announced)
        self.assertEqual(other.read_head().status, 100)
        self.assert_refused(broker.post_json(CHAT, {"a": 1}), 503, "too_many_requests_in_flight")
        release.set()
        self.assertEqual(holder.read_answer().status, 200)
        eventually(lambda: broker.post_json(CHAT, {"a": 1}).status == 200, what="room for another body")


class TooManyConnections(LoadTestCase):
    """At most four times the requests that may be in flight; here eight."""

    def setUp(self):
        self.release = threading.Event()

        def hold(conn, request):
            if request.method == "POST":
                conn.hold(self.release)
            conn.respond(body=request.body)

        self.upstream = self.stub(hold)
        self.served = self.broker(self.upstream, config={"max_concurrent_requests": 2})

    def in_flight(self, count):
        callers = self.open(self.served, count)
        for number, caller in enumerate(callers):
            caller.send(self.served.post_bytes(CHAT, {"number": number}))
        self.upstream.wait_for_requests(count)
        return callers

    def idle(self, count):
        """Connections that the broker has taken: it has answered a health check on each, one after the other."""
        callers = self.open(self.served, count)
        for caller in callers:
            self.assert_health(caller)
        return callers

    def assert_in_flight_end_well(self, callers):
        self.release.set()
        for number, caller in enumerate(callers):
            self.assertEqual(caller.read_answer().json(), {"number": number})

    def test_cost_the_one_that_was_idle_longest_its_own(self):
        busy = self.in_flight(2)
        idle = self.idle(6)
        for number in range(3):
            (newcomer,) = self.idle(1)
            self.assert_closed(idle[number])
            for other in idle[number + 1 :]:
                self.assert_health(other)
        self.assert_health(newcomer)
        self.assert_in_flight_end_well(busy)

    def test_count_from_the_last_request_past_the_caller_check(self):
        idle = self.idle(8)
        # The first one works, the second only rattles at the door.
        idle[0].send(self.served.head("GET", MODELS))
        self.assertEqual(idle[0].read_answer().status, 200)
        idle[1].send(self.served.head("GET", MODELS, token=False))
        self.assertEqual(idle[1].read_answer().status, 401)
        self.idle(1)
        self.assert_closed(idle[1])
        self.assert_health(idle[0])

    def test_of_any_kind_never_cost_one_that_is_in_flight_its_own(self):
        busy = self.in_flight(2)
        silent = self.open(self.served, 20)
        for number, caller in enumerate(silent):
            # Silent, idle, a head that never ends, a body that never comes: whoever came last may stay.
            try:
                caller.send((b"", b"GET / HT", self.served.head("GET", MODELS, token=False))[number % 3])
            except ConnectionError:
                pass
        self.assert_health(self.idle(1)[0])
        still_open = [caller for caller in silent if not has_ended(caller)]
        self.assertLessEqual(len(still_open), 5)
        self.assert_in_flight_end_well(busy)

    @linux_only
    def test_leave_no_descriptor_behind(self):
        before = self.served.fd_count()
        for number in range(200):
            caller = self.served.connect()
            if number % 2:
                caller.send(b"GET /v1/mod")
            if number % 3:
                caller.close()
            elif number % 5:
                caller.reset()
        eventually(lambda: self.served.fd_count() <= before + 8, what="at most eight connections")
        for caller in self.served.callers:
            caller.close()
        eventually(lambda: self.served.fd_count() <= before, what="the old number of descriptors")


def has_ended(caller):
    """Whether the broker has closed this connection."""
    caller.settimeout(0.05)
    try:
        while caller.recv():
            pass
        return True
    except ConnectionError:
        return True
    except OSError:
        return False
    finally:
        caller.settimeout(10)


class StrangersHeads(LoadTestCase):
    @linux_only
    def test_do_not_stay_in_memory(self):
        broker = self.broker(self.stub())
        names = [a + b for a in string.ascii_letters for b in string.ascii_letters]
        many = "".join(f"{name}:\r\n" for name in names[:600])
        listed = f"Connection: {','.join(names[:950])}\r\n"
        before = broker.rss_anon_kb()
        for number in range(70):
            for lines, status in ((many, 431), (listed, 200)):
                head = f"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: {number}\r\n{lines}\r\n"
                self.assertEqual(broker.raw_answers(head.encode(), half_close=True)[0].status, status)
        self.assertLess(broker.rss_anon_kb() - before, 4 << 10)


    @linux_only
    def test_with_huge_methods_do_not_stay_in_memory(self):
        broker = self.broker(self.stub())
        before = None
        for number in range(300):
            head = f"{'M' * 31000}{number} /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
            self.assertEqual(broker.raw_answers(head.encode(), half_close=True)[0].status, 401)
            before = broker.rss_anon_kb() if number == 50 else before
        self.assertLess(broker.rss_anon_kb() - before, 3 << 10)


@unittest.skipIf(resource is None, "no limit of descriptors here")
class FewDescriptors(LoadTestCase):
    LIMIT = 64

    def test_are_given_to_the_newcomer_by_the_longest_idle(self):
        stub = self.stub()
        limits = (self.LIMIT, self.LIMIT)
        broker = self.broker(stub, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
        self.assertEqual(broker.request("GET", MODELS).status, 200)
        strangers = []
        for _ in range(2 * self.LIMIT):
            strangers.append(broker.connect())
            self.addCleanup(strangers[-1].close)
        # A name that had to be looked up, or a log that had to be opened, would find no descriptor either.
        for _ in range(10):
            self.assert_health(self.open(broker, 1)[0])
            self.assertEqual(broker.request("GET", MODELS).status, 200)
            self.assertEqual(broker.post_json(CHAT, {}).status, 200)
        self.assertTrue(all(map(has_ended, strangers[:10])))
        self.assertLess(sum(not has_ended(caller) for caller in strangers[-self.LIMIT :]), self.LIMIT)


class Churn(LoadTestCase):
    @linux_only
    def test_of_a_thousand_requests_leaves_memory_and_descriptors_as_they_were(self):
        stub = self.stub(lambda conn, request: conn.respond(body=b"x" * 100_000))
        broker = self.broker(stub)

        def ask(count):
            for _ in range(count):
                self.assertEqual(broker.post_json(CHAT, {"a": "x" * 10_000}).status, 200)

        ask(100)
        before = broker.fd_count(), broker.thread_count(), broker.rss_anon_kb()
        threads = [threading.Thread(target=ask, args=(200,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stub.wait_closed(4)
        eventually(lambda: broker.fd_count() - stub.open_connections <= before[0], what="the old number of descriptors")
        eventually(lambda: broker.thread_count() <= before[1], what="the old number of threads")
        self.assertLess(broker.rss_anon_kb() - before[2], 4 << 10)
        self.assertEqual(len(stub.requests), 900)
