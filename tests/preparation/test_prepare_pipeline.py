"""launch/prepare.py from raw sources to a prepared folder: counts, resuming, bytes."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, python_environment, run_python
from helpers import raw_sources
from helpers.raw_sources import ROWS_PER_SHARD, prepare

pytest.importorskip("apache_beam", reason="needs Apache Beam (pip install -e .[beam])")

from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.preparation.beam import pipeline
from moe_embed_jax.preparation.beam.work_folder import Work


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> pathlib.Path:
    """A sources file with several files, formats, languages, bad rows and duplicates."""
    folder = tmp_path_factory.mktemp("raw")
    for part in range(4):
        rows = raw_sources.pairs(70, f"part {part}", lang=["en", "de", "fr"][part % 3])
        rows += raw_sources.pairs(10, "common", lang="en")  # in every part: 30 duplicates
        raw_sources.jsonl(folder / f"web/{part}.jsonl.gz", rows)
    raw_sources.jsonl(
        folder / "web/4.jsonl.gz", ["{broken", {"query": "no document", "lang": "en"}]
    )
    raw_sources.parquet(
        folder / "triplets.parquet", raw_sources.pairs(90, "t", negatives=["first", "second"])
    )
    raw_sources.beir(folder / "beir")
    return raw_sources.write_sources(
        folder / "sources.json",
        {
            "name": "web",
            "format": "pairs",
            "path": folder / "web" / "*.jsonl.gz",
            "language_field": "lang",
        },
        {
            "name": "triplets",
            "format": "triplets",
            "path": folder / "triplets.parquet",
            "language": "ja",
        },
        {
            "name": "beir",
            "format": "beir",
            "path": folder / "beir",
            "language": "en",
            "max_bad_share": 0.5,
        },
    )


@pytest.fixture(scope="module")
def prepared(mixed, tmp_path_factory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("prepared") / "pairs"
    prepare(mixed, output)
    return output


def test_nothing_is_lost(prepared):
    folder = PairFolder(prepared)
    folder.verify()
    sources = folder.manifest["about"]["sources"]
    assert sources == {
        "web": {
            "in": 322,
            "out": 290,
            "quarantine": 2,
            "exact_duplicates": 30,
            "normalised_duplicates": 0,
            "dropped_negatives": 0,
        },
        "triplets": {
            "in": 90,
            "out": 90,
            "quarantine": 0,
            "exact_duplicates": 0,
            "normalised_duplicates": 0,
            "dropped_negatives": 0,
        },
        "beir": {
            "in": 3,
            "out": 2,
            "quarantine": 1,
            "exact_duplicates": 0,
            "normalised_duplicates": 0,
            "dropped_negatives": 0,
        },
    }
    rows = folder.read(range(len(folder)))
    assert len(rows) == 290 + 90 + 2
    expected = {
        (row["query"], row["document"])
        for part in range(4)
        for row in raw_sources.pairs(70, f"part {part}") + raw_sources.pairs(10, "common")
    }
    assert {row[:2] for row in rows if row.source == "web"} == expected
    assert {row.negatives for row in rows if row.source == "triplets"} == {("first", "second")}
    names = [("web", "de"), ("web", "en"), ("web", "fr"), ("triplets", "ja"), ("beir", "en")]
    assert list(folder.groups) == names
    for (source, language), (start, stop) in folder.groups.items():
        assert {(r.source, r.language) for r in rows[start:stop]} == {(source, language)}
    # Full shards, whatever the groups are.
    assert [s["rows"] for s in folder.manifest["shards"]] == [64] * 5 + [62]
    group = folder.manifest["groups"][3]
    own = rows[group["start"] : group["stop"]]
    assert group["document_characters"] == sum(len(row.document) for row in own)
    assert group["negatives"] == 180


def test_the_quarantine_names_file_line_and_field(prepared, mixed):
    lines = (prepared / "quarantine" / "web.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    file = str(mixed.parent / "web/4.jsonl.gz")
    assert (first["source"], first["file"], first["line"], first["field"]) == ("web", file, 1, "")
    assert first["problem"].startswith("bad JSON") and first["row"] == "{broken"
    assert (second["line"], second["field"]) == (2, "document")
    assert sorted(p.name for p in (prepared / "quarantine").iterdir()) == [
        "beir.jsonl",
        "web.jsonl",
    ]
    assert not (prepared / "work").exists()


def test_tfds_reads_it(prepared):
    code = f"""
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(prepared)!r})
rows = builder.as_data_source("train")
print(len(rows), rows[0]["query"].decode(), rows[0]["language"].decode())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    row = PairFolder(prepared).read([0])[0]
    assert result.stdout.split(maxsplit=1)[0] == "382"
    assert result.stdout.strip().endswith(f"{row.query} {row.language}")


def test_a_second_start_returns_at_once(prepared, mixed, capsys):
    before = files(prepared)
    assert prepare(mixed, prepared) == PairFolder(prepared).manifest
    assert "prepared before" in capsys.readouterr().out and files(prepared) == before
    with pytest.raises(UserError, match="with other options"):
        prepare(mixed, prepared, rows_per_shard=32)
    moved = (prepared / "dataset_info.json").rename(prepared / "moved")
    with pytest.raises(UserError, match=r"dataset_info\.json"):
        prepare(mixed, prepared)
    moved.rename(prepared / "dataset_info.json")
    for path in sorted(prepared.glob("*-00000-of-*")):  # records, lengths
        path.write_bytes((content := path.read_bytes())[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{path}: damaged"):
            prepare(mixed, prepared)
        path.write_bytes(content)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["read", "buckets", "shards"])
def test_interrupted_work_continues(stage, mixed, prepared, tmp_path, monkeypatch, capsys):
    """An error behind the second piece of each stage, then a second start."""
    mark, marked = Work.mark, []

    def mark_some(self, of, *piece):
        mark(self, of, *piece)
        marked.append(of)
        if marked.count(stage) == 2:
            raise RuntimeError("pulled the plug")

    monkeypatch.setattr(Work, "mark", mark_some)
    with pytest.raises(UserError, match="pulled the plug"):
        prepare(mixed, tmp_path / "pairs")
    left = len(Work(str(tmp_path / "pairs")).done(stage))
    assert left >= 2
    capsys.readouterr()
    monkeypatch.setattr(Work, "mark", lambda *a: (marked.append(a[1]), mark(*a)))
    marked.clear()
    prepare(mixed, tmp_path / "pairs")
    total = {"read": 7, "buckets": 8, "shards": 6}[stage]
    assert marked.count(stage) == total - left  # nothing was done twice
    assert files(tmp_path / "pairs") == files(prepared)


def test_a_full_disk_is_one_line(mixed, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{tmp_path}/marker")

    monkeypatch.setattr(Work, "mark", full)
    with pytest.raises(UserError, match="there is no room left on this disk") as refused:
        prepare(mixed, tmp_path / "pairs")
    assert len(str(refused.value).splitlines()) == 1
    assert not [record for record in caplog.records if record.name.startswith("apache_beam")]


@pytest.mark.parametrize("damage", [b"", b"[]", b"[" * 100_000, b'{"\xff": 1}'])
def test_a_damaged_file_of_the_work_is_named(tmp_path, damage):
    work = Work(str(tmp_path / "out"))
    work.begin({"sources": 1})
    (tmp_path / "out/work/plan.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"plan\.json: it is damaged .*prepare again") as refused:
        work.begin({"sources": 1})
    assert len(str(refused.value).splitlines()) == 1


def killed_after(stage, mixed, output, monkeypatch) -> list[pathlib.Path]:
    """Prepares until a stage is done; returns the files of its pieces."""
    after = {"read": "spread", "buckets": "write"}[stage]
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(pipeline._Run, after, lambda self: (_ for _ in ()).throw(_Killed))
        prepare(mixed, output)
    return sorted((output / "work" / stage).iterdir())


@pytest.mark.parametrize("stage", ["read", "buckets"])
def test_work_that_was_changed_is_named(stage, mixed, tmp_path, monkeypatch):
    """Any value of any marker, and the tables beside them: not a trace, and no other pairs."""
    output = tmp_path / "pairs"
    files = killed_after(stage, mixed, output, monkeypatch)
    marker = next(path for path in files if path.suffix == ".json")
    whole = json.loads(marker.read_text())
    for key in whole:  # its checksum among them
        marker.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(UserError, match=rf"{marker.name}: it is damaged.*CRC-32 differs"):
            prepare(mixed, output)
    marker.write_text(json.dumps(whole))
    table = marker.with_suffix(".parquet")
    table.write_bytes(table.read_bytes()[:-9] + b"x" * 9)
    expected = rf"{table.name}: it is damaged \({'its CRC-32' * (stage == 'read')}.*prepare again"
    with pytest.raises(UserError, match=expected) as refused:
        prepare(mixed, output)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("stage", ["read", "buckets"])
@pytest.mark.parametrize(("suffix", "why"), [(".json", "of piece"), (".parquet", "CRC-32")])
def test_work_in_the_place_of_other_work_is_named(stage, suffix, why, mixed, tmp_path, monkeypatch):
    files = killed_after(stage, mixed, tmp_path / "pairs", monkeypatch)
    one, other, *_ = (path for path in files if path.suffix == suffix)
    one.rename(tmp_path / "one")
    other.rename(one)
    (tmp_path / "one").rename(other)  # whole, with right checksums
    why = why if stage == "read" else "of piece"
    with pytest.raises(UserError, match=rf"{suffix}: it is .*{why}.*prepare again"):
        prepare(mixed, tmp_path / "pairs")


def test_bad_rows_that_were_changed_are_named(mixed, tmp_path, monkeypatch):
    files = killed_after("read", mixed, tmp_path / "pairs", monkeypatch)
    path = next(path for path in files if path.suffix == ".bad" and path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(UserError, match=rf"{path.name}: it is damaged \(its CRC-32 differs\)"):
        prepare(mixed, tmp_path / "pairs")


def test_other_sources_do_not_continue_the_work(mixed, tmp_path, monkeypatch):
    killed_after("read", mixed, tmp_path / "pairs", monkeypatch)
    with pytest.raises(UserError, match=r"work of another preparation \(other rows_per_shard\)"):
        prepare(mixed, tmp_path / "pairs", rows_per_shard=10)


def test_killed_between_the_moves_of_the_end(mixed, prepared, tmp_path, monkeypatch):
    from moe_embed_jax.preparation.beam import work_folder as work

    move, moved = work.move, []

    def move_some(source, target):
        moved.append(target)
        if "pairs-train" in target and len([m for m in moved if "pairs-train" in m]) == 4:
            raise _Killed
        move(source, target)

    monkeypatch.setattr(work, "move", move_some)
    with pytest.raises(_Killed):
        prepare(mixed, tmp_path / "pairs")
    monkeypatch.setattr(work, "move", move)
    shutil.copytree(tmp_path / "pairs", tmp_path / "lost")
    prepare(mixed, tmp_path / "pairs")
    assert files(tmp_path / "pairs") == files(prepared)

    (left, *_) = sorted((tmp_path / "lost" / "work" / "shards").glob("*.array_record"))
    left.unlink()
    with pytest.raises(UserError, match=rf"{left} is missing: delete the folder of --output"):
        prepare(mixed, tmp_path / "lost")
    assert not (tmp_path / "lost" / "manifest.json").exists()


THREADS = "--direct_num_workers=3", "--direct_running_mode=multi_threading"


@pytest.mark.parametrize("flags", [THREADS, ("--runner=FnApiRunner",)])
def test_workers_leave_no_trace(flags, mixed, prepared, tmp_path):
    prepare(mixed, tmp_path / "pairs", beam=flags)
    assert files(tmp_path / "pairs") == files(prepared)


def test_rounds_leave_no_trace(mixed, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LOCAL_ROUND_BYTES", 1)  # every bucket in a round of its own
    prepare(mixed, tmp_path / "pairs")
    assert files(tmp_path / "pairs") == files(prepared)


def test_two_at_once_are_refused(mixed, prepared):
    code = f"""
from moe_embed_jax.preparation.beam import pipeline
try:
    pipeline.prepare(pipeline.Options({str(mixed)!r}, {str(prepared)!r}, rows_per_shard=64))
except pipeline.UserError as error:
    print(error)
"""
    with pipeline._alone(str(prepared)):
        result = run_python(["-c", code])
    assert f"{prepared} is in use by process" in result.stdout, result.stderr


def test_kill_9_in_the_middle(mixed, prepared, tmp_path, capsys):
    output = tmp_path / "pairs"
    flags = (f"--sources={mixed}", f"--output={output}", f"--rows_per_shard={ROWS_PER_SHARD}")
    process = subprocess.Popen(
        [sys.executable, "launch/prepare.py", *flags],
        cwd=ROOT,
        env=python_environment(1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((output / "work/read").glob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (output / "work/plan.json").exists() and not (output / "manifest.json").exists()
    prepare(mixed, output)
    assert "done before" in capsys.readouterr().out
    assert files(output) == files(prepared)


@pytest.mark.slow
def test_several_processes_leave_no_trace(mixed, prepared, tmp_path):
    output = tmp_path / "pairs"
    flags = (f"--sources={mixed}", f"--output={output}", f"--rows_per_shard={ROWS_PER_SHARD}")
    workers = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
    result = run_python(["launch/prepare.py", *flags, *workers])
    assert result.returncode == 0, result.stderr
    assert "382 pairs in 4 languages, 6 shards" in result.stdout
    assert files(output) == files(prepared)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_bad_shares=1",), "unknown flag --max_bad_shares"),
        (("--max_bad_share=7",), "must be from 0 to 1"),
        (("--rows_per_shard=0",), "must be 1 or more"),
        (("--vocabulary=nowhere.model",), "--vocabulary=nowhere.model does not exist"),
    ],
)
def test_mistakes_are_one_line(flags, message, mixed, tmp_path):
    result = run_python(
        ["launch/prepare.py", f"--sources={mixed}", f"--output={tmp_path / 'pairs'}", *flags]
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr


def test_tokens_are_counted(data_dir, tmp_path):
    from helpers.synthetic_data import PREPARATION

    from moe_embed_jax.data.data_spec import vocabulary_path
    from moe_embed_jax.tokenizers.vocabulary import Vocabulary

    path = vocabulary_path(PREPARATION, data_dir)
    raw = raw_sources.jsonl(tmp_path / "a.jsonl", raw_sources.pairs(20))
    sources = raw_sources.write_sources(
        tmp_path / "s.json", {"name": "a", "format": "pairs", "path": raw, "language": "en"}
    )
    (group,) = prepare(sources, tmp_path / "pairs", vocabulary=str(path))["groups"]
    vocabulary = Vocabulary.load(path)
    for name in ("query", "document"):
        expected = sum(len(vocabulary.encode(row[name])) for row in raw_sources.pairs(20))
        assert group[f"{name}_tokens"] == expected
