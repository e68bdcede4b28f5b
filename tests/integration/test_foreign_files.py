"""A path in SQL brings in no file of docmill's own and none that was stored for somebody else, by no stage that opens files."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import submit_batch
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.storage import LocalStorage
from jobs.batch.unpacking import Unpacker
from jobs.stages import check, parse, validate
from tests.archives import write_zip
from tests.integration.conftest import Bench
from tests.integration.outside import Outside

HERS = "SELECT submit_document(%s, doc_id => 'hers', user_id => 'alice', file_name => 'hers.txt')"


@pytest.fixture
def storage(bench: Bench) -> LocalStorage:
    return LocalStorage.prepared(bench.settings)


@pytest.mark.parametrize("what", ["an upload", "a log file", "a temporary file"])
async def test_a_document_is_made_of_no_foreign_file(outside: Outside, storage: LocalStorage, sandbox: ProcessSandbox, what: str) -> None:
    name = {"an upload": storage.store_upload("bob's", b"his secret", 100).file_path, "a log file": "logs/docmill.worker-host-1.log",
            "a temporary file": "temp/0.part"}[what]  # fmt: skip
    storage.write(name, "his secret")
    outside.bench.conn.execute(HERS, [name])
    given = {"log_file_path": Path("docmill.log")}
    await outside.work(outside.runner({"validate": validate.run, "parse": parse.run, "check": check.run}, settings=given, sandbox=sandbox))
    assert outside.state("hers") == ("uploaded", "failed", 0)
    error_type, message = outside.bench.one("SELECT error_type::text, error_message FROM dead_letters")
    assert (error_type, name in message, "docmill" in message) == ("PERMANENT", True, True)


async def test_a_path_that_its_owner_changes_after_validation_is_looked_at_again(
    outside: Outside, storage: LocalStorage, sandbox: ProcessSandbox
) -> None:
    storage.write("inbox/hers.txt", "hers")
    outside.bench.conn.execute(HERS, ["inbox/hers.txt"])
    runner = outside.runner(
        {"validate": validate.run, "parse": parse.run, "check": check.run}, settings={"handoff": "queue"}, sandbox=sandbox
    )
    await outside.work(runner, until=lambda: outside.state("hers")[0] == "upload_validated")
    outside.bench.conn.execute("UPDATE file_extractions SET file_path = %s", [storage.store_upload("bob's", b"his secret", 100).file_path])
    await outside.work(runner)
    assert outside.state("hers") == ("upload_validated", "failed", 0)


@pytest.mark.usefixtures("front_door")
async def test_a_batch_is_made_of_no_archive_of_another(bench: Bench, storage: LocalStorage, tmp_path: Path) -> None:
    write_zip(tmp_path / "his.zip", {"secret.txt": "his secret"})
    submit_batch(tmp_path / "his.zip", batch_id="his", user_id="bob")
    name = bench.one("SELECT zip_path FROM processing_jobs")[0]
    bench.conn.execute("SELECT submit_batch(%s, batch_id => 'hers', user_id => 'alice')", [name])
    unpacker = Unpacker(
        settings=bench.settings, pool=bench.pool, sandbox=lambda folder: ProcessSandbox(children=1, writable=folder), stopping=bool
    )
    for (archive_id,) in bench.all("SELECT id FROM batch_archives"):
        await unpacker.run(archive_id)
    found = dict(bench.all("SELECT batch_id, state FROM batch_archives"))
    assert found == {"his": "unpacked", "hers": "failed"}
    assert bench.all("SELECT user_id FROM file_extractions") == [("bob",)]
    assert (
        f"File '{name}' is an upload that docmill has stored"
        in bench.one("SELECT error_message FROM batch_archives WHERE state = 'failed'")[0]
    )
