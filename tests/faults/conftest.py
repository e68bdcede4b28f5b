"""One cluster and one reference for all scenarios of a process; an arena for each; and which of them are the short form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster
from tests.faults.harness import Arena, Reference

MODES = ("inline", "queue")
SHORT = {
    "test_crashes": [
        "test_a_kill_at_any_point_leaves_the_rows_of_an_uninterrupted_run[inline-each]",
        "test_a_kill_at_any_point_leaves_the_rows_of_an_uninterrupted_run[queue-usual]",
        "test_a_worker_paused_past_its_lease_changes_nothing_when_it_wakes_up[inline]",
        "test_a_document_that_kills_its_worker_is_a_dead_letter_and_its_neighbours_are_not_blamed[queue-in_company]",
        "test_a_document_that_takes_all_memory_fails_alone[inline]",
        "test_a_kill_between_checkpoint_and_job_finish_neither_loses_nor_doubles[inline]",
    ],
    "test_postgres": [
        "test_workers_outlive_trouble_with_postgres_untouched[inline-immediate crash]",
        "test_a_storm_of_terminated_backends_loses_nothing_and_listening_comes_back[queue-5]",
        "test_a_lease_connection_that_hangs_costs_no_document_and_no_patience[inline]",
        "test_a_refused_checkpoint_is_written_in_the_end[queue-40P01]",
        "test_a_checkpoint_behind_somebodys_lock_runs_into_the_limit_and_is_written_later[inline-lock_timeout]",
        "test_a_full_disk_costs_time_and_nothing_else[queue-8]",
    ],
    "test_submission": [
        "test_the_same_documents_from_many_clients_at_once_are_worked_on_once[inline]",
        "test_new_content_in_mid_run_wins_and_the_old_never_shows[queue]",
        "test_a_submission_while_the_document_waits_for_its_retry[inline]",
        "test_an_open_transaction_on_one_document_harms_no_other[inline-commit]",
        "test_a_held_document_that_comes_back_while_another_is_alone_keeps_its_lease[inline]",
    ],
    "test_batches": [
        "test_last_documents_that_end_in_the_same_moment_end_their_batch_once[inline]",
        "test_a_worker_killed_between_a_last_document_and_its_batch_leaves_no_batch_open[queue]",
    ],
    "test_removal": [
        "test_a_deed_while_each_stage_runs_wins[inline-cancel]",
        "test_a_batch_is_cancelled_and_deleted_under_load[queue]",
        "test_a_storm_of_submissions_cancels_and_deletes_ends_with_what_was_submitted_last[inline]",
    ],
    "test_shutdown": [
        "test_a_stopped_worker_finishes_or_hands_on_what_it_has_and_blames_nobody[inline-grace_exceeded]",
        "test_a_second_signal_leaves_at_once[queue]",
    ],
    "test_reconcilers": [
        "test_a_reconciler_killed_before_or_after_any_repair_is_made_up_for[inline]",
        "test_reconcilers_at_the_same_moment_repair_each_thing_once[queue]",
    ],
    "test_storms": [
        "test_transient_faults_at_random_end_complete_without_help[queue-100]",
    ],
    "test_sync": [
        "test_a_killed_sync_is_finished_by_the_next_and_no_search_misses_a_moved_file[inline-sync_submitted]",
    ],
    "test_reembedding": [
        "test_workers_killed_at_every_step_of_a_reembedding_lose_nothing_and_searches_never_miss_a_passage[inline]",
    ],
    "test_reembedding_hosted": [
        "test_a_run_to_a_hosted_model_and_back_pays_each_text_once_but_for_one_request_a_kill_and_searches_never_miss_a_passage[queue]",
    ],
    "test_unpacking": [
        "test_a_kill_at_any_point_of_unpacking_leaves_the_batch_of_an_uninterrupted_run[inline]",
        "test_an_unpacker_paused_until_another_has_taken_over_changes_nothing_when_it_wakes_up[queue-stored]",
        "test_batches_cancelled_in_a_callers_long_transaction_stop_no_worker[inline-commit]",
    ],
    "test_hosted": [
        "test_a_kill_in_mid_embed_pays_at_most_one_request_twice[inline-80]",
        "test_a_kill_while_the_service_parses_pays_no_page_twice[queue]",
    ],
    "test_small_documents": [
        "test_a_worker_killed_with_several_in_hand_loses_and_doubles_none[inline-in_checkpoint:complete]",
        "test_a_worker_killed_with_several_that_waited_for_a_service_loses_and_doubles_none[inline-kept-20]",
        "test_parsers_killed_under_several_documents_cost_none_of_them[inline]",
    ],
    "test_services": [
        "test_every_document_outlasts_a_service_that_fails[inline-embedding-hang_in_body]",
        "test_a_document_alone_with_a_failing_service_waits_too[inline-500-embedding]",
    ],
    "test_services_refusing": [
        "test_documents_wait_for_a_key_that_works_again_and_spend_nothing[queue-401-embedding]",
    ],
    "test_services_moody": [],
    "test_services_parsing": [
        "test_an_outage_of_the_parsing_service_pays_no_page_twice_and_new_files_are_parsed_here[inline-10]",
    ],
    "test_services_unreachable": [],
    "test_services_parsing_failing": [],
    "test_services_parsing_unreachable": [],
    "test_hosts": [],
    "test_races": [],
    "test_deploy": [
        "test_a_document_whose_task_is_unknown_to_all_workers_is_parked_visibly_and_can_be_requeued[queue]",
        "test_a_worker_refuses_an_older_schema_with_a_clear_message_and_loses_nothing[inline]",
    ],
}
"""A few minutes of each scenario, each in one mode; everything else here is long."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem in SHORT and item.name not in SHORT[item.path.stem]:
            item.add_marker(pytest.mark.long)


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
