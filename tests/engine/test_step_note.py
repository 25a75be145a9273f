"""The note of the step under way: what one process writes the other reads, whatever happens."""

from __future__ import annotations

from pathlib import Path

from engine.step_note import StepNote, StepNoteFile


def test_what_is_written_is_read_and_wiped(tmp_path: Path) -> None:
    reader = StepNoteFile(str(tmp_path), create=True)
    assert reader.read() is None
    writer = StepNoteFile(str(tmp_path))
    note = StepNote(12.5, 2048, [3, 1, 2**40])
    writer.write(note)
    assert reader.read() == note
    writer.write(StepNote(13.0, 1, [7]))
    writer.close()
    assert reader.read() == StepNote(13.0, 1, [7]), "it outlives its writer"
    StepNoteFile(str(tmp_path)).write(None)
    assert reader.read() is None


def test_a_note_that_is_half_written_or_nonsense_reads_as_none(tmp_path: Path) -> None:
    note = StepNoteFile(str(tmp_path), create=True)
    note.write(StepNote(1.0, 1, [1, 2, 3]))
    whole = (tmp_path / "step").read_bytes()
    for length in (*range(1, 12), 2**16, 2**32 - 1):
        (tmp_path / "step").write_bytes(length.to_bytes(4, "little") + whole[4:])
        if length != int.from_bytes(whole[:4], "little"):
            assert note.read() is None


def test_a_step_of_very_many_sequences_has_no_note(tmp_path: Path) -> None:
    note = StepNoteFile(str(tmp_path), create=True)
    note.write(StepNote(1.0, 1, list(range(10**6, 10**6 + 3000))))
    assert note.read() is not None
    note.write(StepNote(1.0, 1, list(range(10**6, 10**6 + 30000))))
    assert note.read() is None
