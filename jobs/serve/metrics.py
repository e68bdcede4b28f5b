"""`/metrics`: Prometheus' text, computed from SQL, so that it is right with any number of workers and with none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.metadata import version

import psycopg
from loguru import logger
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from jobs.health import Component
from jobs.redaction import describe
from jobs.serve.examining import Doctor, all_work
from jobs.serve.measures import PARTS, counters
from jobs.serve.reading import Database, DatabaseAway, Look, TooSlow
from jobs.serve.tally import Tally

SCRAPE_SECONDS = 8.0  # of the 10 that Prometheus waits where it is told nothing else
Part = Callable[[Look], Awaitable[list[Metric]]]
_LEVEL = {"ok": 1.0, "degraded": 0.5, "down": 0.0, "unknown": 0.0}


class Meter:
    """Measures the installation when asked, and counts events meanwhile."""

    def __init__(self, database: Database, doctor: Doctor) -> None:
        self._database = database
        self._doctor = doctor
        self.tally = Tally()

    async def catch_up(self, *, within: float | None = None) -> None:
        """Count the events since the last time; called often enough that there are never many. `within`: seconds after which it is left
        to who counts next."""
        try:
            await asyncio.wait_for(self.tally.lock.acquire(), within)
        except TimeoutError:
            return
        try:
            async with self._database.look(within=within) as look:
                await self.tally.catch_up(look)
        except DatabaseAway:
            return
        except (TooSlow, psycopg.Error) as error:
            if within is not None and isinstance(error, TooSlow):
                return
            # Asked again for ever more, it would never come to an end.
            logger.warning("Some events are not counted in /metrics: {}", describe(error))
            self.tally.forget()
        finally:
            self.tally.lock.release()

    async def text(self, *, within: float = SCRAPE_SECONDS) -> bytes:
        """Return everything as Prometheus' text, without what could not be read within so many seconds."""
        started = time.monotonic()

        def half() -> float:
            # Each takes so much of the time that is left at most: one that hangs leaves some for the others.
            return (started + within - time.monotonic()) / 2

        components = await self._doctor.examine()
        failed = GaugeMetricFamily("docmill_scrape_failed", "1 for a part that could not be measured this time.", labels=["part"])
        metrics = list(_health(components))
        try:
            if _is_away(components):
                raise DatabaseAway("It was not asked: it is down.")
            await self.catch_up(within=half())
            async with self._database.look(within=2 * half()) as look:
                for name, part in PARTS.items():
                    metrics += await self._measured(look, name, part, failed, half())
        except (DatabaseAway, TooSlow) as error:
            failed.add_metric(["database"], 1)
            logger.debug("Only part of /metrics could be told: {}", describe(error))
        metrics += counters(self.tally)
        took = time.monotonic() - started
        metrics += [failed, GaugeMetricFamily("docmill_scrape_duration_seconds", "How long it took to measure all this.", value=took)]
        return _text(metrics)

    async def _measured(self, look: Look, name: str, part: Part, failed: GaugeMetricFamily, within: float) -> list[Metric]:
        try:
            async with look.apart(within=within):
                found = await part(look)
        except (TooSlow, psycopg.errors.QueryCanceled):
            failed.add_metric([name], 1)
            return []
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            logger.warning("The metrics of {} could not be read: {}", name, describe(error))
            failed.add_metric([name], 1)
            return []
        failed.add_metric([name], 0)
        return found


def _is_away(components: Sequence[Component]) -> bool:
    """Say whether nothing can be read. A database that takes no writes is down too, but has told facts of itself."""
    return any(found.name == "database" and found.health == "down" and not found.detail for found in components)


def _health(components: Sequence[Component]) -> Iterator[Metric]:
    info = GaugeMetricFamily("docmill_build_info", "Version of docmill that serves this.", labels=["version"])
    info.add_metric([version("docmill")], 1)
    up = GaugeMetricFamily("docmill_component_up", "1 well, 0.5 degraded, 0 down or not to be told.", labels=["component"])
    for component in components:
        up.add_metric([component.name], _LEVEL[component.health])
    yield info
    yield up
    yield GaugeMetricFamily("docmill_ready", "1 while no component is down: the same as /readyz.", value=float(all_work(components)))
    storage = next((found.detail for found in components if found.name == "storage" and found.detail), None)
    if storage is not None:
        yield GaugeMetricFamily("docmill_storage_free_bytes", "Free space where files are kept.", value=storage["free_mb"] * 1e6)
        yield GaugeMetricFamily("docmill_storage_size_bytes", "Whole space there.", value=storage["total_mb"] * 1e6)


class _Ready:
    """What prometheus_client calls a collector, over metrics that are there already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        """Return the metrics."""
        return self._metrics


def _text(metrics: list[Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Ready(metrics))
    return generate_latest(registry)
