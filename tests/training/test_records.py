"""The record files of a run: what a kill leaves is repaired, all other damage is named. And what
TensorBoard shows."""

import json
import struct

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from moe_embed_jax.errors import UserError
from moe_embed_jax.training.metric_writer import Board
from moe_embed_jax.training.records import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    append_record,
    as_line,
    checksums,
    continue_records,
    read_records,
)

STEPS = 40
SAVED = 36  # a whole block of lines, another one, and a part


@pytest.fixture
def run(tmp_path):
    """(work directory, what its checkpoint of step SAVED holds about the records)."""
    for step in range(1, SAVED + 1):
        append_record(tmp_path / METRICS_FILE, {"step": step, "loss": step / 7})
    for step in (0, 12, 24):
        append_record(tmp_path / EVALUATIONS_FILE, {"step": step, "sets": {}})
    saved = json.loads(json.dumps(checksums(tmp_path)))
    append_record(tmp_path / EVALUATIONS_FILE, {"step": SAVED, "sets": {}})
    for step in range(SAVED + 1, STEPS + 1):
        append_record(tmp_path / METRICS_FILE, {"step": step, "loss": step / 7})
    append_record(tmp_path / EVALUATIONS_FILE, {"step": STEPS, "sets": {}})
    return tmp_path, saved


def lines(workdir, name=METRICS_FILE) -> list[bytes]:
    return (workdir / name).read_bytes().splitlines(keepends=True)


def other(step) -> bytes:
    """The line of another run."""
    return as_line({"step": step, "loss": 1.0})


@pytest.mark.parametrize("tail", [b"", b'{"step": 41, "lo', b"\0\0\0", b'{"step": 41}'])
def test_a_run_continues_its_files_at_the_checkpoint(run, tail):
    workdir, saved = run
    before = [lines(workdir, name) for name in (METRICS_FILE, EVALUATIONS_FILE)]
    for name in (METRICS_FILE, EVALUATIONS_FILE):
        with (workdir / name).open("ab") as file:
            file.write(tail)
    assert len(read_records(workdir / METRICS_FILE)) == STEPS
    assert continue_records(workdir, SAVED, saved) == []
    assert lines(workdir) == before[0][:SAVED]
    assert lines(workdir, EVALUATIONS_FILE) == before[1][:4]  # that of the checkpoint's step, too
    assert continue_records(workdir, SAVED, saved) == []


def test_a_cut_at_any_byte_after_the_checkpoint_is_repaired(run):
    workdir, saved = run
    whole = (workdir / METRICS_FILE).read_bytes()
    kept = b"".join(lines(workdir)[:SAVED])
    for size in range(len(kept), len(whole)):
        (workdir / METRICS_FILE).write_bytes(whole[:size])
        continue_records(workdir, SAVED, saved)
        assert (workdir / METRICS_FILE).read_bytes() == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:4] + lines[5:], "line 5: step 6 comes after step 4"),
        (lambda lines: lines[:5] + lines[4:], "line 6: step 5 comes after step 5"),
        (lambda lines: [*lines[:4], b"{\n", *lines[5:]], "line 5: it is not a record"),
        (lambda lines: [*lines[:4], b"[]\n", *lines[5:]], "line 5: it is not a record"),
        (lambda lines: [*lines[:4], b"\n", *lines[4:]], "line 5: it is not a record"),
        (lambda lines: [*lines[:4], b'{"step": "5"}\n', *lines[5:]], "line 5: it is not a record"),
        (lambda lines: lines[1:], "one of the lines 1 to 16: it was changed"),
        (
            lambda lines: [*lines[:20], lines[20].replace(b"3.", b"2."), *lines[21:]],
            "line 21: it was changed",
        ),
        (lambda lines: [*lines[:20], other(21), *lines[21:]], "one of the lines 17 to 32: it was"),
        (lambda lines: [*lines[:35], other(36), *lines[36:]], "one of the lines 33 to 36: it was"),
        (lambda lines: lines[:30], "ends after line 30, and the checkpoint .* after line 36"),
    ],
)
def test_damage_before_the_checkpoint_is_named(run, change, message):
    workdir, saved = run
    content = b"".join(change(lines(workdir)))
    (workdir / METRICS_FILE).write_bytes(content)
    with pytest.raises(UserError, match=rf"metrics.jsonl.*{message}.*put the right file back"):
        continue_records(workdir, SAVED, saved)
    assert (workdir / METRICS_FILE).read_bytes() == content
    (workdir / METRICS_FILE).rename(workdir / "away")  # as the message says
    (said,) = continue_records(workdir, SAVED, saved)
    assert "metrics.jsonl has no records of the steps up to 36" in said


def test_a_lost_or_changed_evaluation_is_named(run):
    workdir, saved = run
    whole = lines(workdir, EVALUATIONS_FILE)
    (workdir / EVALUATIONS_FILE).write_bytes(b"".join(whole[:1] + whole[2:]))
    with pytest.raises(UserError, match=r"evaluations.jsonl, one of the lines 1 to 3"):
        continue_records(workdir, SAVED, saved)
    (workdir / EVALUATIONS_FILE).write_bytes(b"".join(whole[:2]))
    with pytest.raises(UserError, match=r"evaluations.jsonl ends after line 2"):
        continue_records(workdir, SAVED, saved)


def test_a_changed_evaluation_is_named_whenever_it_was_recorded(run):
    """The fourth was recorded after its checkpoint, which knows three."""
    workdir, saved = run
    path = workdir / EVALUATIONS_FILE
    whole = lines(workdir, EVALUATIONS_FILE)
    changed = whole[3].replace(b'"sets": {}', b'"sets": {"aa": false}')
    path.write_bytes(b"".join([*whole[:3], changed, *whole[4:]]))
    for read in (lambda: continue_records(workdir, SAVED, saved), lambda: read_records(path)):
        with pytest.raises(UserError, match=r"evaluations.jsonl, line 4: it was changed"):
            read()


def test_lines_of_an_earlier_version_have_no_checksum(run):
    workdir, _ = run
    path = workdir / EVALUATIONS_FILE
    path.write_text('{"step": 0, "sets": {}}\n')
    append_record(path, {"step": 12, "sets": {}})
    assert read_records(path) == [{"step": 0, "sets": {}}, {"step": 12, "sets": {}}]


def test_a_checkpoint_without_checksums_continues(run):
    workdir, _ = run
    assert continue_records(workdir, SAVED, {}) == []
    assert len(read_records(workdir / METRICS_FILE)) == SAVED


def test_there_may_be_no_files(tmp_path):
    assert read_records(tmp_path / METRICS_FILE) == []
    empty = checksums(tmp_path)
    assert continue_records(tmp_path, 0, empty) == []
    assert not list(tmp_path.iterdir())


def masked_crc(data: bytes) -> int:
    """Of the TFRecord format."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(path) -> list[Event]:
    """Of a file for TensorBoard, by the format of TFRecord."""
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        content = data[12 : 12 + size]
        assert struct.unpack("<I", data[8:12])[0] == masked_crc(data[:8])
        assert struct.unpack("<I", data[12 + size : 16 + size])[0] == masked_crc(content)
        found.append(Event.FromString(content))
        data = data[16 + size :]
    return found


def test_tensorboard_gets_each_scalar_at_once(tmp_path):
    board = Board(tmp_path / "tensorboard", first_step=7)
    board.add(7, {"train/loss": 0.5, "speed": 3})
    board.flush()
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, start, scalars = events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, start.session_log.START)
    assert scalars.step == 7
    assert {v.tag: v.simple_value for v in scalars.summary.value} == {"train/loss": 0.5, "speed": 3}
    board.close()


def test_a_full_disk_raises_in_the_thread_that_writes(tmp_path):
    board = Board(tmp_path, first_step=1)
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb") as full:
        board._writer._py_recordio_writer._writer = full
        for step in range(10_000):
            board.add(step, {"train/loss": 0.5})
