"""What docs/operations.md tells people to type names what is there and finds what it says."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest
import yaml

from jobs import submit_document
from models.settings import load_settings

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/operations.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("front_door")
def test_the_folder_of_an_upload_leads_to_its_document_and_users_to_what_they_store(conn: psycopg.Connection) -> None:
    (block,) = [sql for sql in re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL) if "<hash>" in sql]
    submit_document(b"first", doc_id="a", user_id="ann", file_name="a.txt")
    submit_document(b"second version", doc_id="a", user_id="ann", file_name="a.txt")
    (folder,) = (load_settings().storage_base_path / "uploads").iterdir()
    assert len(list(folder.iterdir())) == 2, "one file a version"
    whose, archives, weights = block.replace("<hash>", folder.name).split(";")[:3]
    assert conn.execute(whose.encode()).fetchall() == [("a", "ann", "a.txt", 2, "queued")]
    assert conn.execute(archives.partition("\n")[2].encode()).fetchall() == []
    assert conn.execute(weights.partition("\n")[2].encode()).fetchall() == [("ann", 1, "14 bytes")]


def test_the_commands_for_compose_name_its_services_user_database_and_folder() -> None:
    compose = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))
    services = re.findall(r"docker compose (?:exec|run --rm --no-deps) (?:-T )?(\w+)", PAGE)
    assert {"db", "worker"} <= set(services) <= set(compose["services"])
    server = compose["services"]["db"]["environment"]
    named = set(re.findall(r"-U (\w+) -d (\w+)", PAGE))
    assert named == {(server["POSTGRES_USER"], server["POSTGRES_DB"])}
    assert set(re.findall(r"tar -C (\S+)", PAGE)) == {compose["services"]["worker"]["environment"]["STORAGE_BASE_PATH"]}
