import asyncio, time
import psycopg, pytest
from jobs.database import make_pool
from jobs.services import Service, Terms
from models.calls import *
from models.errors import *
from models.settings import Settings


async def test_smoke(settings, database, conn):
    pool = make_pool(settings, database)
    await pool.open()
    s = Service(pool, Terms("embedding http://x key:1", "embedding", 3000, 100000), worker="w:1")
    p = CallPurpose("embed", (CallShare("a"),), "m", tokens=10)

    async def ok():
        return Reply([1], tokens_in=7)

    r = await s.call(ok, p)
    print(conn.execute("select * from provider_usage").fetchall())
    print(conn.execute("select * from provider_budget_use").fetchall())
    t = time.perf_counter()
    for _ in range(100):
        await s.call(ok, p)
    print("ms", (time.perf_counter() - t) * 10)

    async def bad():
        raise RetryableError("boom")

    for _ in range(12):
        try:
            await s.call(bad, p)
        except Exception as e:
            print(type(e), e, getattr(e, "retry_after", None))
    print(conn.execute("select * from circuit_breakers").fetchall())
    print(conn.execute("select * from cost_by_document").fetchall())
    await s.aclose()
    await pool.close()
