"""What a folder given to ingest is taken to hold."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from jobs.adapters.folders import is_hidden, list_folder, refuse_foreign_file, storage_folders
from jobs.adapters.storage import LocalStorage
from models.errors import PermanentError, SubmitError
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


OTHERS = hashlib.sha256(b"bob's").hexdigest()
FOREIGN = (f"uploads/{OTHERS}/{'1' * 64}", f"uploads/{OTHERS}/x/y", f"uploads/{OTHERS.upper()}/{'1' * 64}", "temp/a.part",
           "temp/unpack-1/0/1", "logs/docmill.worker-host-1.log", "postgres/base/1/2", "inbox/link.txt", "inbox/folder/a.log",
           "extracted/aa/a.md")  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_path_in_sql_names_no_file_of_docmills_own_and_none_of_somebody_elses(tmp_path: Path, name: str) -> None:
    fill(tmp_path, "postgres/PG_VERSION", "logs/a.log", "inbox/a.txt", f"uploads/{OTHERS}/{'1' * 64}")
    (tmp_path / "inbox/link.txt").symlink_to(tmp_path / f"uploads/{OTHERS}/{'1' * 64}")
    (tmp_path / "inbox/folder").symlink_to(tmp_path / "logs")
    settings = Settings(storage_base_path=tmp_path, log_file_path=Path("docmill.log"))
    with pytest.raises(PermanentError, match=f"File '{name}' (lies in .* which docmill keeps for itself|is an upload that docmill has)"):
        refuse_foreign_file(settings, LocalStorage.from_settings(settings).resolve(name), name, "alice's")


def test_a_path_in_sql_names_uploads_of_its_own_and_what_people_have_put_into_the_storage(tmp_path: Path) -> None:
    """Also where it is called as docmill calls folders that it does not use here."""
    own = hashlib.sha256("alice's ä".encode()).hexdigest()
    names = (f"uploads/{own}/{'1' * 64}", f"uploads/{own}/refused", "uploads/a.txt", f"uploads/mine/{OTHERS}/a.txt", "a.txt", "inbox/a.txt",
             "logs/a.txt", "postgres/a.txt", "inbox/extracted/a.txt", "inbox/temp/a.txt", "temporary/a.txt", "uploads", "temp")  # fmt: skip
    settings = Settings(storage_base_path=tmp_path)
    for name in names:
        refuse_foreign_file(settings, LocalStorage.from_settings(settings).resolve(name), name, "alice's ä")


def test_a_folder_of_docmills_own_is_known_by_another_name_of_it(tmp_path: Path) -> None:
    """As on file systems that do not tell upper case from lower; here a link to the base makes another name."""
    fill(tmp_path, "storage/temp/a.part")
    (tmp_path / "link").symlink_to(tmp_path / "storage")
    settings = Settings(storage_base_path=tmp_path / "storage")
    with pytest.raises(PermanentError, match="keeps for itself"):
        refuse_foreign_file(settings, tmp_path / "link" / "temp" / "a.part", "TEMP/a.part", "a")
