"""One cluster and one reference for all scenarios of a process; an arena for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster
from tests.faults.harness import Arena, Reference

MODES = ("inline", "queue")
MakeArena = Callable[[str], Arena]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(cluster, tmp_path_factory.mktemp("reference"))


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def arena(cluster: Cluster, reference: Reference, mode: str, tmp_path: Path) -> Iterator[Arena]:
    if not cluster.running():
        cluster.start()
    with Arena(cluster, tmp_path / "arena", reference, mode) as arena:
        yield arena


FULL = os.environ.get("FAULTS") == "full"
