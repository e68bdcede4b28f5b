"""What a folder given to ingest is taken to hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.adapters.folders import is_hidden, list_folder, storage_folders
from models.errors import SubmitError
from models.settings import Settings


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_nested_files_are_listed_in_the_order_of_their_parts(tmp_path: Path) -> None:
    fill(tmp_path, "b.txt", "a/z.txt", "a/b/c.txt", "a-b.txt", "A.txt")
    assert list_folder(tmp_path).files == ["A.txt", "a/b/c.txt", "a/z.txt", "a-b.txt", "b.txt"]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", "__MACOSX", ".git", "~$report.docx"])
def test_hidden_and_system_names_are_known(name: str) -> None:
    assert is_hidden(name)


@pytest.mark.parametrize("name", ["report.pdf", "thumbs.dbx", "a.DS_Store", "~report.docx", "$x"])
def test_other_names_are_not_hidden(name: str) -> None:
    assert not is_hidden(name)


def test_hidden_files_and_folders_are_skipped_and_counted_once_each(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", ".DS_Store", "sub/Thumbs.db", ".git/one", ".git/two", "__MACOSX/._a.txt")
    listing = list_folder(tmp_path)
    assert (listing.files, listing.skipped) == (["a.txt"], 4)


def test_links_out_of_the_folder_and_to_folders_are_not_followed(tmp_path: Path) -> None:
    inside = fill(tmp_path / "inside", "a.txt", "sub/b.txt")
    fill(tmp_path, "secret.txt")
    (inside / "out.txt").symlink_to(tmp_path / "secret.txt")
    (inside / "up").symlink_to(tmp_path)
    (inside / "circle").symlink_to(inside / "sub")
    (inside / "same.txt").symlink_to("a.txt")
    listing = list_folder(inside)
    assert (listing.files, listing.skipped) == (["a.txt", "same.txt", "sub/b.txt"], 3)


def test_the_storage_is_never_ingested_into_itself(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "storage/uploads/x", "storage/temp/x", "storage/inbox/b.txt", "storage/inbox/uploads/c.txt")
    fill(tmp_path, "storage/postgres/PG_VERSION", "storage/postgres/x")
    leave_out = storage_folders(Settings(storage_base_path=tmp_path / "storage"))
    for folder, files, skipped in (
        (tmp_path, ["a.txt"], 1),
        (tmp_path / "storage", ["inbox/b.txt", "inbox/uploads/c.txt"], 3),
        (tmp_path / "storage" / "inbox", ["b.txt", "uploads/c.txt"], 0),
    ):
        listing = list_folder(folder, leave_out=leave_out)
        assert (listing.files, listing.skipped) == (files, skipped)


def test_of_the_storage_only_folders_that_are_really_in_use_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "extracted/a", "logs/b", "postgres/c")
    for log, files in ((None, ["extracted/a", "logs/b", "postgres/c"]), (tmp_path / "log", ["extracted/a", "logs/b", "postgres/c"]),
                       (Path("docmill.log"), ["extracted/a", "postgres/c"])):  # fmt: skip
        settings = Settings(storage_base_path=tmp_path, log_file_path=log, storage_keep_extracted=False)
        assert list_folder(tmp_path, leave_out=storage_folders(settings)).files == files


def test_a_folder_that_is_a_link_itself_is_listed(tmp_path: Path) -> None:
    fill(tmp_path, "real/a.txt")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert list_folder(tmp_path / "link").files == ["a.txt"]


def test_names_that_are_no_utf8_are_listed(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("x")
    assert [os.fsencode(name) for name in list_folder(tmp_path).files] == [b"\xff.txt"]


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt")
    for name in ("nothing", "a.txt"):
        with pytest.raises(SubmitError, match=name):
            list_folder(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_inside_that_may_not_be_listed_is_reported_and_its_neighbours_are_listed(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "shut/b.txt")
    (tmp_path / "shut").chmod(0)
    try:
        listing = list_folder(tmp_path)
    finally:
        (tmp_path / "shut").chmod(0o700)
    assert listing.files == ["a.txt"]
    assert [name for name, _ in listing.unreadable] == ["shut"]
