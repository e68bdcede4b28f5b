"""What `docmill logs` finds in log files: the document's lines, all of them, once, and nobody else's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli.log_lines import LogSearch
from models.settings import Settings

TEXT = "2026-01-31 08:15:0{second}.000 INFO     jobs.x: {message}{context}\n"


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LogSearch:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    return LogSearch(Settings(storage_base_path=tmp_path, log_file_path=Path("docmill.log")), "a", {"c1"})


def file(tmp_path: Path, pid: int = 1, rotated: str = "") -> Path:
    return tmp_path / "logs" / f"docmill.worker-h-{pid}{rotated}.log"


def text(second: int, message: str, context: str = "") -> str:
    return TEXT.format(second=second, message=message, context=context)


def texts(search: LogSearch) -> list[str]:
    return [line.text.split(": ", 1)[1].split(" ")[0] for line in search.find()]


def test_lines_of_the_document_are_found_in_all_files_in_the_order_of_time(search: LogSearch, tmp_path: Path) -> None:
    file(tmp_path, 1).write_text(text(3, "third", " doc_id=a stage=parse") + text(1, "first", " doc_id=a"))
    file(tmp_path, 2, ".2026-01-31_08-15-00_000000").write_text(text(2, "second", " batch_id=b doc_id=a correlation_id=c9"))
    (tmp_path / "logs" / "other.log").write_text(text(4, "foreign", " doc_id=a"))
    assert texts(search) == ["first", "second", "third"]
    assert search.find() == [], "each line once"


def test_another_documents_lines_are_left_out_also_those_that_share_its_correlation_id(search: LogSearch, tmp_path: Path) -> None:
    lines = [
        (" doc_id=ab", "no"),
        (" doc_id=b correlation_id=c1", "no"),
        (" correlation_id=c1", "submission"),
        (" correlation_id=c10", "no"),
    ]
    file(tmp_path).write_text("".join(text(1, message, context) for context, message in lines))
    assert texts(search) == ["submission"]


def test_a_traceback_belongs_to_its_line(search: LogSearch, tmp_path: Path) -> None:
    file(tmp_path).write_text(
        text(1, "broke", " doc_id=a") + "    Traceback\n      File x\n" + text(2, "other", " doc_id=b") + "    Traceback\n"
    )
    (found,) = search.find()
    assert found.text.endswith("Traceback\n      File x") and found.text.count("Traceback") == 1


def test_json_lines_are_read_and_what_is_no_json_is_passed_over(search: LogSearch, tmp_path: Path) -> None:
    line = {"time": "2026-01-31T07:15:00.000+00:00", "level": "ERROR", "logger": "jobs.x", "message": "broke", "exception": "Traceback"}
    made = [line | {"doc_id": "a", "stage": "parse"}, line | {"doc_id": "b", "message": 'says "a"'}, line | {"correlation_id": "c1"}]
    file(tmp_path).write_text("".join(json.dumps(one) + "\n" for one in made) + '{"a"\n{"a": [1]}\nnonsense a\n')
    found = search.find()
    assert [one.text for one in found] == ["ERROR    jobs.x: broke stage=parse\nTraceback", "ERROR    jobs.x: broke\nTraceback"]


def test_a_line_that_is_being_written_is_read_when_it_is_whole(search: LogSearch, tmp_path: Path) -> None:
    whole = text(1, "slow", " doc_id=a")
    file(tmp_path).write_text(whole[:40])
    assert search.find() == []
    with file(tmp_path).open("a") as written:
        written.write(whole[40:])
    assert texts(search) == ["slow"]


def test_a_rotated_file_is_not_read_again_and_a_new_one_is(search: LogSearch, tmp_path: Path) -> None:
    file(tmp_path).write_text(text(1, "old", " doc_id=a"))
    assert texts(search) == ["old"]
    file(tmp_path).rename(file(tmp_path, rotated=".2026-01-31_08-15-00_000000"))
    file(tmp_path).write_text(text(2, "new", " doc_id=a"))
    assert texts(search) == ["new"]


def test_a_doc_id_that_json_escapes_is_found(tmp_path: Path, search: LogSearch) -> None:
    search.doc_id = 'say "a" \\ b'
    line = {"time": "2026-01-31T07:15:00.000+00:00", "level": "INFO", "logger": "jobs.x", "message": "quoted", "doc_id": search.doc_id}
    file(tmp_path).write_text(json.dumps(line) + "\n")
    assert texts(search) == ["quoted"]


def test_without_log_files_there_is_nothing_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert LogSearch(Settings(storage_base_path=tmp_path), "a").find() == []
    assert LogSearch(Settings(storage_base_path=tmp_path / "none", log_file_path=Path("docmill.log")), "a").find() == []
