"""What the tests stand on, by what a test holds in its hand.

    broker    the broker as a subprocess        upstream  a scriptable provider on 127.0.0.1
    caller    raw bytes, and answers            leaks     canaries, and the search for them
    case      the test cases                    common    paths, ports, programs, time

Nothing here knows the inside of `broker.py`: it is started as a user starts it, spoken to over
real sockets, and judged by what it answers, prints, logs and sends to its upstream.

    class SomebodyAsks(BrokerTestCase):
        def test_the_answer_comes_from_the_upstream(self):
            stub = self.stub()
            broker = self.broker(stub)
            answer = broker.post_json("/v1/chat/completions", {"model": "m"})
            self.assertEqual(answer.status, 200)
            self.assertEqual(stub.requests[0].header("Authorization"), "Bearer " + broker.secret)

Every test is a leak test too: `Broker.close()` searches all answers it saw, stdout, stderr and the
event log for the secret and the token, in the forms in which they could slip out.
"""

from .broker import (
    ABSENT,
    ALLOWED_PATHS,
    BROKER,
    INSTALLED,
    NOBODY,
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    Broker,
    make_config,
    minimal_environment,
    run_broker,
    run_each,
)
from .caller import Answer, Caller
from .case import BrokerTestCase, SharedBroker
from .common import (
    ROOT,
    Gone,
    Lifeline,
    eventually,
    free_port,
    linux_only,
    make_executable,
    posix_only,
    seeded,
    slow,
)
from .leaks import canary, forms_of, fresh_token
from .upstream import Puppet, StubUpstream, stop_stub

__all__ = [
    "ABSENT",
    "ALLOWED_PATHS",
    "BROKER",
    "INSTALLED",
    "NOBODY",
    "ROOT",
    "SECRET_VARIABLE",
    "TOKEN_VARIABLE",
    "Answer",
    "Broker",
    "BrokerTestCase",
    "Caller",
    "Gone",
    "Lifeline",
    "Puppet",
    "SharedBroker",
    "StubUpstream",
    "canary",
    "eventually",
    "forms_of",
    "free_port",
    "fresh_token",
    "linux_only",
    "make_config",
    "make_executable",
    "minimal_environment",
    "posix_only",
    "run_broker",
    "run_each",
    "seeded",
    "slow",
    "stop_stub",
]
