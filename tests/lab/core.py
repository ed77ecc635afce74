# SPDX-License-Identifier: Apache-2.0
"""Which tests of the lab every run has; the others only ``VOLUME_LAB=full``.

The guest is slow, and a run of all takes some three hours. Each
kind of thing that only a real kernel can show is here once.
"""

from __future__ import annotations

CORE: dict[str, frozenset[str]] = {
    'conformance.test_lvm.LabThinTest': frozenset({
        'test_clone_may_be_larger_and_is_zero_beyond',
        'test_created_volume_is_all_zero',
        'test_disowned_volume_is_foreign_and_can_be_adopted',
        'test_extents_tell_all_that_changed_since_a_snapshot',
        'test_resize_grows_and_repeats',
        'test_revert_keeps_the_size_and_zeros_what_is_beyond',
    }),
    'conformance.test_lvm.LabThickTest': frozenset({
        'test_created_volume_is_all_zero',
        'test_each_snapshot_keeps_its_own_moment',
    }),
    'lab.test_acceptance.Groups': frozenset({
        'test_case_43_a_volume_group_that_is_missing_is_named',
        'test_case_45_a_volume_that_snapshots_need_is_not_deleted',
    }),
    'lab.test_connector.IscsiConnectorTest': frozenset({
        'test_what_is_written_is_on_the_volume_when_it_is_detached',
        'test_a_disk_of_another_identity_is_let_go_of',
        'test_who_does_not_know_the_secret_is_not_let_in',
    }),
    'lab.test_connector.NvmeConnectorTest': frozenset({
        'test_what_is_written_is_on_the_volume_when_it_is_detached',
    }),
    'lab.test_end_to_end.ThinLio': frozenset({
        'test_another_host_reads_from_a_clone_what_one_has_written',
        'test_open_session_reads_no_more_when_its_access_ends',
        'test_host_that_was_not_let_in_stays_out',
        'test_reverted_volume_has_what_it_had',
        'test_read_only_host_cannot_write',
    }),
    'lab.test_lio.LioTest': frozenset({
        'test_another_host_with_the_secret_is_refused',
        'test_host_without_the_secret_is_refused',
        'test_open_session_is_ended_by_unexport_or_keeps_it_busy',
        'test_volume_is_one_disk_by_all_its_exports_and_after_a_restart',
    }),
    'lab.test_lvm.ThickBytesTest': frozenset({
        'test_new_volume_and_its_grown_tail_are_zero_under_use',
        'test_no_command_of_lvm_comes_between_those_that_hand_extents_on',
        'test_nothing_of_a_deleted_volume_or_snapshot_is_left',
    }),
    'lab.test_nvmet.NvmetTest': frozenset({
        'test_another_host_is_refused',
        'test_open_session_is_ended_by_unexport_or_keeps_it_busy',
    }),
    'lab.test_power.Power': frozenset({
        'test_case_51_after_a_power_cut_only_attached_volumes_are_exported',
    }),
}


def of(cls: type) -> frozenset[str]:
    """Return the names of a class's tests that every run has."""
    name = f'{cls.__module__}.{cls.__name__}'
    return CORE.get(name.removeprefix('tests.'), frozenset())
