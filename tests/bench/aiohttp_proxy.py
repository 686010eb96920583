"""The proxy one would write by hand with aiohttp, without any checks: `python aiohttp_proxy.py PORT UPSTREAM_PORT`.

It attaches a credential and passes each piece of the answer on as it comes. A peer, not an example to use.
"""

from __future__ import annotations

import sys

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

SESSION = web.AppKey("session", ClientSession)
UPSTREAM = web.AppKey("upstream", str)
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length", "host"}
OURS = {"authorization", "x-broker-token", "accept-encoding"}


async def forward(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP | OURS}
    headers["Authorization"] = "Bearer sk-bench-0123456789abcdef"
    url = request.app[UPSTREAM] + request.raw_path
    sent = request.app[SESSION].request(request.method, url, headers=headers, data=body, allow_redirects=False)
    async with sent as answer:
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


async def session(app: web.Application):
    connector = TCPConnector(limit=0, keepalive_timeout=600)
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=600), auto_decompress=False) as opened:
        app[SESSION] = opened
        yield


def main() -> None:
    app = web.Application(client_max_size=64 << 20)
    app[UPSTREAM] = f"http://127.0.0.1:{int(sys.argv[2])}"
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)


if __name__ == "__main__":
    main()
