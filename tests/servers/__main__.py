"""`python -m tests.servers openai|llamaparse --port N`: one server by itself, for benchmarks and for trying things by hand.

GET /_tally tells what it has seen. POST /_script changes its failures, for example {"when": "outage", "fault": "502_html", "start": 0,
"end": 60}; POST /_reset forgets everything; POST /_latency {"seconds": 0.2} slows it down.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json

from tests.servers.faults import NAMED, from_json
from tests.servers.llamaparse import LlamaParseServer
from tests.servers.openai import OpenAIServer


def main() -> None:
    """Parse arguments and serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__)
    parser.add_argument("service", choices=["openai", "llamaparse"])
    parser.add_argument("--port", type=int, default=0, help="a free one by default")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--punctual", action="store_true", help="the latency includes what making an answer takes")
    parser.add_argument("--key", help="the key that is asked for; none by default")
    parser.add_argument("--dimensions", type=int, default=1536)
    parser.add_argument("--cheap", action="store_true", help="embeddings without meaning, at little cost")
    parser.add_argument("--rpm", type=int, help="requests a minute before 429")
    parser.add_argument("--tpm", type=int, help="tokens a minute before 429")
    parser.add_argument("--job-seconds", type=float, default=1.0, help="how long a LlamaParse job takes")
    parser.add_argument("--script", type=json.loads, default={}, help=f"as for /_script; faults: {', '.join(NAMED)}")
    given = parser.parse_args()
    server: OpenAIServer | LlamaParseServer
    if given.service == "openai":
        server = OpenAIServer(port=given.port, latency=given.latency, key=given.key, dimensions=given.dimensions)
        server.cheap = given.cheap
        server.requests_per_minute, server.tokens_per_minute = given.rpm, given.tpm
    else:
        server = LlamaParseServer(port=given.port, latency=given.latency, key=given.key)
        server.seconds = given.job_seconds
    server.punctual = given.punctual
    server.script(from_json(given.script))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server.serve(announce=True))


if __name__ == "__main__":
    main()
