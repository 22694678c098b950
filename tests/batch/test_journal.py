"""The journal: committed rows, recovery, and outputs in order."""

import os

import pytest

from jfp8kv.batch.journal import CompletedRows, Journal, Totals, ordered_outputs


def test_completed_rows_are_a_mark_and_the_rows_beyond_it():
    done = CompletedRows(1, 3)
    seen = set()
    for row in (4, 1, 13, 10, 7):
        done.add(row)
        seen.add(row)
        assert all((number in done) == (number in seen) for number in range(1, 20, 3))
    assert not done._ahead


def test_a_journal_returns_the_committed_rows_in_order(tmp_path):
    path = tmp_path / "a.partial"
    with Journal(path) as journal:
        for row in (2, 0, 3, 1):
            output = b'{"n":%d}' % row
            journal.append(row, output, prompt_tokens=row, completion_tokens=10, ok=row != 3)
    assert list(ordered_outputs(path)) == [b'{"n":%d}' % row for row in range(4)]
    with Journal(path) as journal:
        assert journal.totals == Totals(rows=4, failed=1, prompt_tokens=6, completion_tokens=40)
        assert all(row in journal.done for row in range(4)) and 4 not in journal.done


def test_a_failed_append_leaves_the_journal_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "a.partial"
    write = os.write
    with Journal(path) as journal:
        journal.append(0, b"{}")
        before = path.read_bytes()

        def full(file, content):
            if len(content) > 10:
                return write(file, content[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(1, b"{}" * 5)
        monkeypatch.undo()
        assert path.read_bytes() == before and 1 not in journal.done
        journal.append(1, b"{}")
    assert list(ordered_outputs(path)) == [b"{}", b"{}"]
