"""The script one writes first: `python early_script.py PORT UPSTREAM_PORT`. A peer for scale, not an example to use.

http.server takes the request, urllib sends it on, and in between stand one token, one list of paths and a line of log.
Everything is held until it is whole, answers too: a streamed one comes all at once at its end. And as http.server does
by itself, it speaks HTTP/1.0: a connection for each request, on both sides.
The token comes by the environment, as BENCH_TOKEN.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, UPSTREAM = int(sys.argv[1]), f"http://127.0.0.1:{int(sys.argv[2])}"
ALLOWED = {"/v1/chat/completions"}
LARGEST_BODY = 256 * 1024
SECRET = "sk-bench-0123456789abcdef"


class Handler(BaseHTTPRequestHandler):
    def answer(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        print(json.dumps({"path": self.path, "status": status, "bytes": len(body)}), file=sys.stderr, flush=True)

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, json.dumps({"error": message}).encode())

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self.answer(200, b'{"ok": true}')
        else:
            self.refuse(403, "path not allowed")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("X-Broker-Token") != os.environ["BENCH_TOKEN"]:
            return self.refuse(401, "token required")
        if self.path not in ALLOWED:
            return self.refuse(403, "path not allowed")
        if len(body) > LARGEST_BODY:
            return self.refuse(413, "too large")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {SECRET}"}
        request = urllib.request.Request(UPSTREAM + self.path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                self.answer(response.status, response.read(), response.headers.get("Content-Type", ""))
        except urllib.error.URLError as error:
            self.refuse(502, str(error))

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
