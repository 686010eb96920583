"""Opens many streams at once and takes the time each event needed: `python receive.py PORT STREAMS CHUNKS INTERVAL`.

A process of its own, so that neither the upstream nor the benchmark's other work delays the moment of receipt.
Prints `open` when every stream has had its first event, and a line of JSON when all have ended.
Only what arrives while *all* are open counts for the delays; for the losses, everything does. Where nothing arrives in
that time, because it is held back until a stream's end, all of it counts for the delays, too.
The token comes by the environment, as BENCH_TOKEN.
"""

from __future__ import annotations

import gc
import json
import os
import re
import selectors
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench import wire  # noqa: E402

STAMP = re.compile(rb'"bench":\{"i":(\d+),"t":(\d+)\}\}\n\n')


def main() -> None:
    port, streams, chunks, interval = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    body = wire.prompt(1000, stream=True, bench={"chunks": chunks, "interval": interval})
    request = wire.request(port, body, os.environ["BENCH_TOKEN"])
    deadline = time.monotonic() + 30 + 4 * chunks * interval
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        sock = wire.connect(port)
        sock.sendall(request)
        sock.setblocking(False)
        # What is open: the answer so far, the text of an event cut in two, the number the next event must have.
        selector.register(sock, selectors.EVENT_READ, [wire.Answer(), b"", 0])

    gc.disable()  # a pause of ours would stand in the row as a delay of theirs
    delays: list[int] = []
    of_all: list[int] = []
    started = ended = out_of_order = errors = received = 0
    while started < streams or ended < streams:
        if time.monotonic() > deadline:
            break
        for key, _ in selector.select(1.0):
            state = key.data
            try:
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            now = time.monotonic_ns()
            answer, text, expected = state
            failed = not data
            if data:
                try:
                    text += answer.feed(data)
                    failed = answer.status not in (0, 200)
                except (wire.WireError, ValueError):
                    failed = True
            at = 0
            for match in STAMP.finditer(text):
                at = match.end()
                if int(match.group(1)) != expected:
                    out_of_order += 1
                if expected == 0:
                    started += 1
                    if started == streams:
                        print("open", flush=True)
                of_all.append(now - int(match.group(2)))
                if expected and started == streams and ended == 0:
                    delays.append(now - int(match.group(2)))
                expected += 1
                received += 1
            state[1], state[2] = text[at:], expected
            if failed or answer.done:
                errors += failed
                ended += 1
                if expected == 0:
                    started += 1
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
    counted = len(delays)
    delays = delays or of_all
    print(
        json.dumps(
            {
                "p50_ms": wire.percentile(delays, 0.5) / 1e6 if delays else None,
                "p99_ms": wire.percentile(delays, 0.99) / 1e6 if delays else None,
                "max_ms": max(delays, default=0) / 1e6,
                "counted": counted,
                "lost": streams * chunks - received + out_of_order,
                "errors": errors + streams - ended,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
