"""The plan of a folder sync: a pure function of what is stored and what lies there."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from jobs.sync.files import Archive, Found, Stored
from jobs.sync.memory import _archives as read_archives
from jobs.sync.plan import make_plan, worth_reading
from models.stages import State

RUN, OLD_RUN = uuid.uuid4(), uuid.uuid4()


def stored(name: str, content: str = "", **changes: object) -> Stored:
    """A complete document of the file `name`, whose content has its SHA-256 for a name and its length for a size."""
    made = Stored(f"id:{name}", name, content or name, len(content or name), 1, RUN, "batch", State.COMPLETE, True, 0.0)
    return replace(made, **changes)  # type: ignore[arg-type]  # names of fields


def found(*names: str, **contents: str | None) -> dict[str, Found]:
    files = {name: name for name in names} | contents
    return {name: Found(name, f"id:{name}", len(content or name), content) for name, content in files.items()}


def test_files_are_new_changed_unchanged_or_vanished() -> None:
    plan = make_plan([stored("a"), stored("b"), stored("c")], found("a", "d", b="other"))
    assert (plan.new, plan.changed, plan.unchanged) == (["d"], ["b"], ["a"])
    assert [document.name for document in plan.vanished] == ["c"]
    assert (plan.moved, plan.kept, plan.waiting) == ([], [], [])


def test_a_stored_file_whose_size_shows_that_it_changed_need_not_be_read() -> None:
    files = found(a=None, bb=None)
    documents = [stored("a", "longer than before"), stored("bb")]
    assert worth_reading(documents, files, {}) == ["bb"]
    assert make_plan(documents, files).changed == ["a", "bb"]


def test_only_files_of_a_missing_ones_size_are_read_to_see_whether_they_are_it() -> None:
    assert worth_reading([stored("a", "12345")], found(x=None, y12345=None, yy345=None), {}) == ["yy345"]
    assert worth_reading([stored("a", "12345", file_size=None)], found(x=None), {}) == ["x"]
    assert worth_reading([], found(x=None), {}) == []


def test_a_missing_file_whose_content_lies_elsewhere_was_moved() -> None:
    plan = make_plan([stored("a")], found(b="a"))
    assert [(move.old.name, move.name, move.doc_id) for move in plan.moved] == [("a", "b", "id:b")]
    assert (plan.new, plan.vanished) == (["b"], [])


def test_of_several_places_the_one_with_the_same_name_is_where_it_went() -> None:
    plan = make_plan([stored("in/a", "x")], {**found(b="x"), "out/a": Found("out/a", "id:out/a", 1, "x"), **found(c="x")})
    assert [move.name for move in plan.moved] == ["out/a"]


def test_a_file_moved_over_another_waits_for_the_others_new_version() -> None:
    plan = make_plan([stored("a"), stored("b")], found(b="a"))
    assert plan.changed == ["b"]
    assert [(move.old.name, move.name) for move in plan.moved] == [("a", "b")]


def test_a_copy_that_is_complete_already_lets_the_missing_one_go_at_once() -> None:
    plan = make_plan([stored("a", "x"), stored("b", "x")], found(b="x"))
    assert [document.name for document in plan.vanished] == ["a"]


def test_a_copy_that_is_not_complete_yet_or_has_failed_does_not() -> None:
    for state in (State.QUEUED, State.WORKING, State.RETRYING, State.FAILED, State.CANCELLED, State.DUPLICATE):
        plan = make_plan([stored("a", "x"), stored("b", "x", state=state, duplicate_of="id:a")], found(b="x"))
        assert [move.name for move in plan.moved] == ["b"], state
        assert plan.vanished == []


def test_a_moved_document_that_no_search_sees_goes_at_once() -> None:
    plan = make_plan([stored("a", served=False, state=State.FAILED)], found(b="a"))
    assert (plan.new, [document.name for document in plan.vanished], plan.moved) == (["b"], ["a"], [])


def test_two_missing_files_of_one_content_are_both_replaced_by_the_one_that_is_left() -> None:
    plan = make_plan([stored("a", "x"), stored("b", "x")], found(c="x"))
    assert [(move.old.name, move.name) for move in plan.moved] == [("a", "c"), ("b", "c")]


def test_nothing_below_an_unreadable_folder_is_gone() -> None:
    plan = make_plan([stored("in/a"), stored("in/deep/b"), stored("inner"), stored("c")], found("c"), ["in"])
    assert [kept.name for kept in plan.kept] == ["in/a", "in/deep/b"]
    assert [document.name for document in plan.vanished] == ["inner"]


def test_a_file_that_is_there_again_is_replaced_by_nothing() -> None:
    plan = make_plan([stored("a", replaced_by="id:b"), stored("b", "a")], found("a"))
    assert plan.restored == ["id:a"]
    assert [document.name for document in plan.vanished] == ["b"]


def test_a_file_that_is_being_written_waits_and_so_does_a_missing_one_that_it_may_be() -> None:
    files = {**found("c"), "b": Found("b", "id:b", 1, None, busy=True)}
    plan = make_plan([stored("a"), stored("longer"), stored("c")], files)
    assert (plan.busy, plan.new, plan.waiting) == (["b"], [], ["a"])
    assert [document.name for document in plan.vanished] == ["longer"]


def test_a_file_that_has_just_gone_missing_waits() -> None:
    plan = make_plan([stored("a"), stored("b")], {}, unsettled={"a"})
    assert (plan.waiting, [document.name for document in plan.vanished]) == (["a"], ["b"])


def entry(name: str, inside: str, run_id: uuid.UUID) -> Stored:
    return replace(stored(f"{name}/{inside}"), name=name, entry=f"{name}/{inside}", run_id=run_id)


def archive(name: str, *, current: bool = True, in_run: bool = True) -> dict[str, Archive]:
    return {name: Archive("batch", name, name, RUN, name, in_run, current)}


def test_documents_out_of_an_archive_stay_as_long_as_it_is_there_and_may_hold_them() -> None:
    documents = [entry("z.zip", "kept", RUN), entry("z.zip", "gone", OLD_RUN)]
    for archives in ({}, archive("z.zip", current=False)):
        assert make_plan(documents, found("z.zip"), (), archives).vanished == []
    plan = make_plan(documents, found("z.zip"), (), archive("z.zip"))
    assert [document.entry for document in plan.vanished] == ["z.zip/gone"]
    assert (plan.unchanged, plan.new) == (["z.zip"], [])
    assert make_plan(documents, found(**{"z.zip": "other"}), (), archive("z.zip")).changed == ["z.zip"]
    assert make_plan(documents, found("z.zip"), (), archive("z.zip", in_run=False)).changed == ["z.zip"]


def test_documents_that_may_be_in_an_archive_that_cannot_be_unpacked_stay_and_are_named() -> None:
    documents = [entry("z.zip", "gone", OLD_RUN), entry("z.zip", "bad.zip/a", OLD_RUN), entry("z.zip", "bad.zip-old/a", OLD_RUN)]
    known = {"z.zip": replace(archive("z.zip")["z.zip"], failed=frozenset({"z.zip/bad.zip"}))}
    plan = make_plan(documents, found("z.zip"), (), known)
    assert [document.entry for document in plan.vanished] == ["z.zip/bad.zip-old/a", "z.zip/gone"]
    assert [(kept.name, kept.reason) for kept in plan.kept] == [
        ("z.zip/bad.zip/a", "nobody can say whether it is gone: z.zip/bad.zip has failed")
    ]
    for run, kept in ((RUN, ["z.zip/bad.zip/a"]), (OLD_RUN, [])):  # an entry that could not be read, and one of an earlier run
        entries = [*documents, replace(entry("z.zip", "bad.zip", run), state=State.FAILED)]
        plan = make_plan(entries, found("z.zip"), (), archive("z.zip"))
        assert [document.name for document in plan.kept] == kept
    plan = make_plan(documents, found(**{"z.zip": "other"}), (), known)
    assert (plan.vanished, plan.kept, plan.unpacking) == ([], [], ["z.zip"]), "of what it holds now nothing is known yet"
    known = {"z.zip": replace(archive("z.zip")["z.zip"], failed=frozenset({"z.zip"}))}
    plan = make_plan([stored("z.zip", "text", run_id=OLD_RUN), *documents], found("z.zip"), (), known)
    assert (plan.vanished, len(plan.kept)) == ([], 4)


def test_documents_out_of_an_archive_go_once_the_document_that_took_its_place_is_complete() -> None:
    file, gone = found(**{"z.zip": "text"}), archive("z.zip", in_run=False)
    inside = entry("z.zip", "a", OLD_RUN)
    for state in State:
        plan = make_plan([inside, stored("z.zip", "text", state=state)], file, (), gone)
        expected = ["z.zip/a"] if state in {State.COMPLETE, State.DUPLICATE} else []
        assert [document.entry for document in plan.vanished] == expected, state
        assert (plan.unchanged, plan.changed) == (["z.zip"], [])
    plan = make_plan([inside, stored("z.zip", "earlier text")], file, (), gone)
    assert (plan.changed, plan.vanished) == (["z.zip"], [])


def test_a_document_goes_once_the_archive_that_took_its_place_is_unpacked() -> None:
    file, before = found("z.zip"), stored("z.zip", "text", run_id=OLD_RUN)
    plan = make_plan([before, entry("z.zip", "a", RUN)], file, (), archive("z.zip"))
    assert (plan.vanished, plan.unchanged) == ([before], ["z.zip"])
    for archives in ({}, archive("z.zip", current=False), archive("z.zip", current=False, in_run=False)):
        assert make_plan([before], file, (), archives).vanished == []
    assert make_plan([replace(before, batch_id="a list's")], file, (), archive("z.zip")).vanished == []
    assert make_plan([before], found(**{"z.zip": "other"}), (), archive("z.zip")).vanished == []


def test_documents_out_of_an_archive_go_with_it_but_not_with_an_unreadable_folder() -> None:
    documents = [entry("in/z.zip", "a", RUN), entry("z.zip", "a", RUN)]
    plan = make_plan(documents, {}, ["in"])
    assert [document.entry for document in plan.vanished] == ["z.zip/a"]
    assert [kept.name for kept in plan.kept] == ["in/z.zip/a"]


def test_documents_out_of_a_moved_archive_are_replaced_by_those_out_of_the_archive_where_it_is_now() -> None:
    documents = [entry("z.zip", "deep/a", RUN)]
    files = {name: replace(file, may_be_archive=name == "new/y") for name, file in found(**{"new/y": None, "note": None}).items()}
    assert worth_reading(documents, files, archive("z.zip")) == ["new/y"]
    plan = make_plan(documents, found(**{"new/y.zip": "z.zip"}), (), archive("z.zip"), entry_id="entry:{}".format)
    assert [(move.name, move.doc_id) for move in plan.moved] == [("new/y.zip/deep/a", "entry:new/y.zip/deep/a")]
    assert plan.vanished == []
    there = replace(
        documents[0],
        doc_id="entry:new/y.zip/deep/a",
        name="new/y.zip",
        entry="new/y.zip/deep/a",
        content_sha256=documents[0].content_sha256,
    )
    plan = make_plan([*documents, there], found(**{"new/y.zip": "z.zip"}), (), archive("z.zip"), entry_id="entry:{}".format)
    assert [document.entry for document in plan.vanished] == ["z.zip/deep/a"]
    busy = {"y": Found("y", "id:y", 9, None, busy=True, may_be_archive=True)}
    assert make_plan(documents, busy, (), archive("z.zip")).waiting == ["z.zip/deep/a"]
    busy["y"] = replace(busy["y"], may_be_archive=False)
    assert make_plan(documents, busy, (), archive("z.zip")).waiting == []


def test_a_document_out_of_an_archive_that_lies_beside_it_unpacked_was_moved_there() -> None:
    plan = make_plan([entry("z.zip", "a", RUN)], found(a="z.zip/a"), (), archive("z.zip"))
    assert [(move.old.entry, move.name) for move in plan.moved] == [("z.zip/a", "a")]


def calls(work: Callable[[], object]) -> int:
    """Return how many functions are called, those written in C and each step of a generator included."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def move_of(count: int) -> None:
    """Plan the move of a folder with so many equal files."""
    plan = make_plan(
        [stored(f"old/{n}/LICENSE", "x", state=State.DUPLICATE) for n in range(count)],
        {f"new/{n}/LICENSE": Found(f"new/{n}/LICENSE", f"new {n}", 1, "x") for n in range(count)},
    )
    assert len(plan.moved) == count


def move_of_archives(count: int) -> None:
    """Plan the move of a folder with so many equal zips of one file each."""
    names = [f"{n}.zip" for n in range(count)]
    plan = make_plan(
        [replace(entry(f"old/{name}", "a", RUN), content_sha256="x") for name in names],
        {f"new/{name}": Found(f"new/{name}", f"new {name}", 1, "zip") for name in names},
        (),
        {f"old/{name}": replace(archive(f"old/{name}")[f"old/{name}"], content_sha256="zip") for name in names},
        entry_id="entry:{}".format,
    )
    assert {move.doc_id for move in plan.moved} == {"entry:new/0.zip/a"}
    assert len(plan.moved) == count


def loss_of(count: int) -> None:
    """Plan for so many documents of as many folders that cannot be read."""
    plan = make_plan([stored(f"folder {n}/in/a") for n in range(count)], {}, {f"folder {n}" for n in range(count)})
    assert len(plan.kept) == count


def archives_of(count: int) -> None:
    """Read what is known of so many archives, each with one inside."""
    known = {"run_id": RUN, "content_sha256": "x", "in_run": True, "ended": True, "failed": False, "unfinished": False, "cancelled": False}
    known["documents"] = 0
    paths = [path for n in range(count) for path in (f"in/{n}.zip/", f"in/{n}.zip/a/b.zip/")]
    rows = [{**known, "entry_path": path, "open": path == "in/7.zip/a/b.zip/"} for path in paths]
    made = read_archives("batch", rows, {"in/0.zip": "in/0.zip"})
    assert [name for name, archive in made.items() if archive.open] == ["in/7.zip"]
    assert len(made) == count
    assert all(archive.current for archive in made.values())


@pytest.mark.parametrize("work", [move_of, move_of_archives, loss_of, archives_of])
def test_twice_as_much_takes_about_twice_the_work(work: Callable[[int], None]) -> None:
    assert calls(lambda: work(400)) < 2.5 * calls(lambda: work(200))
