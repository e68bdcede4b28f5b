"""Pick-up latency: from the submitter's commit to the claim of an idle worker, both by the database's clock.

Usage: python -m bench.pickup [--tries 300]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import psycopg

from bench.running import bench_server, fresh_settings, wait_until_ended, workers

SUBMIT = "SELECT submit_document('missing', doc_id => %s, content_sha256 => repeat(md5(gen_random_uuid()::text), 2)), clock_timestamp()"
CLAIMED = "SELECT processing_started_at, state FROM file_extractions WHERE doc_id = %s"


def main() -> None:
    """Submit one document at a time to an idle worker and print median, p95 and the worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=300)
    given = parser.parse_args()
    waits: list[float] = []
    with bench_server() as (server, folder):
        settings = fresh_settings(
            server, folder, "pickup", embedding_provider="hash", log_level="CRITICAL"
        )  # the documents name no file, so they fail
        with workers(settings), psycopg.connect(server.get_uri(database="pickup"), autocommit=True) as conn:
            conn.execute(SUBMIT, ["warm-up"])
            wait_until_ended(settings, 1, time.perf_counter(), 60)
            for i in range(given.tries):
                time.sleep(0.05 + random.random() / 10)  # the worker is idle again and waits at a random point of its poll
                row = conn.execute(SUBMIT, [f"try {i}"]).fetchone()
                assert row is not None
                while True:
                    seen = conn.execute(CLAIMED, [f"try {i}"]).fetchone()
                    if seen is not None and seen[0] is not None:
                        waits.append((seen[0] - row[1]).total_seconds() * 1000)
                        break
                    time.sleep(0.002)
    waits.sort()
    p95 = waits[int(len(waits) * 0.95)]
    print(f"pick-up over {len(waits)} tries: median {statistics.median(waits):.1f} ms, p95 {p95:.1f} ms, worst {waits[-1]:.1f} ms")


if __name__ == "__main__":
    main()
