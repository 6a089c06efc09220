"""What is uploaded, downloaded and leased."""

from __future__ import annotations

from tests.mutations.mutation import in_file

TESTS = "unit/pipeline/remote"
REMOTE = "pipeline/remote"

MUTATIONS = [
    *in_file(
        f"{REMOTE}/file_transfer.py",
        f"{TESTS}/test_exchange.py",
        (
            "a damaged download is used",
            "    if not _is_here(file, listed):\n",
            "    if False:\n",
            "test_a_damaged_result_is_refused_and_never_counts",
        ),
    ),
    *in_file(
        f"{REMOTE}/remote_checkpoints.py",
        f"{TESTS}/test_remote_checkpoints.py",
        (
            "a checkpoint of the store replaces a newer one",
            "            if checkpoint.progress <= local_work(work).progress:\n                return\n",
            "",
            "test_what_is_further_here_is_not_replaced",
        ),
        (
            "another machine continues without the log of the first",
            '"*/*.jsonl", ',
            "",
            "test_another_machine_gets_all_that_it_needs_and_nothing_of_the_first",
        ),
        (
            "servers' replies after the last stored part are not uploaded",
            "        return self.step, self.parts, self.replies\n",
            "        return self.step, self.parts, 0\n",
            "test_replies_after_the_last_part_reach_another_machine",
        ),
        (
            "lists that differ in replies alone take the place of the checkpoint before",
            "newest.setdefault((checkpoint.step, checkpoint.parts), checkpoint)",
            "newest.setdefault(checkpoint.progress, checkpoint)",
            "test_replies_that_are_new_leave_the_checkpoint_before_where_it_is",
        ),
        (
            "checkpoints pile up in the store",
            "        self._rotate([checkpoint, *stored])\n",
            "",
            "test_the_two_newest_are_kept_and_what_only_older_ones_name_is_removed",
        ),
    ),
    *in_file(
        f"{REMOTE}/lease.py",
        f"{TESTS}/test_lease.py",
        (
            "a lease that is renewed is taken over",
            "age < LEASE_SECONDS",
            "age < 0",
            "test_a_second_machine_is_refused_while_the_first_renews",
        ),
        (
            "a lease is not renewed",
            "                self._store.write(self._key, _content(self._record))\n",
            "                pass\n",
            "test_a_second_machine_is_refused_while_the_first_renews",
        ),
    ),
    *in_file(
        f"{REMOTE}/store_errors.py",
        f"{TESTS}/test_store_errors.py",
        (
            "an error of a store repeats a secret",
            '            text = text.replace(value, "…")\n',
            "            pass\n",
            "test_credentials_are_not_repeated",
        ),
    ),
    *in_file(
        "pipeline/execute/exchange.py",
        f"{TESTS}/test_exchange.py",
        (
            "a result that was made without the store is never uploaded",
            "    if plan.store is not None:\n        upload_result",
            "    if False:\n        upload_result",
            "test_what_was_made_without_the_store_is_uploaded_later",
        ),
        (
            "checkpoints of a call that was cut off stay in the store",
            "        RemoteCheckpoints(plan.store, stage.fingerprint).remove()\n",
            "",
            "test_checkpoints_of_a_call_that_was_cut_off_are_removed_with_the_late_upload",
        ),
    ),
]
