"""From raw sources to a prepared folder of pairs, with Apache Beam.

Three pipelines, one after the other, with a check of the counts behind each:

    read    every input file: parse, validate, quarantine, hash (and count tokens)
    spread  by ranges of the hash: duplicates meet and are removed (in rounds, where memory is
            that of one machine)
    write   shards of a fixed number of rows, by source, language and hash

The result is a function of the input files and the options in the plan: workers, bundles, rounds
and interruptions leave no trace in it.
"""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import canonical_hash
from moe_embed_jax.new_folder import remove_unfinished, upload
from moe_embed_jax.ownership import own
from moe_embed_jax.pairs import manifest as pair_manifest
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.manifest import MANIFEST, manifest_text
from moe_embed_jax.preparation import pair_writer
from moe_embed_jax.preparation.beam import work_folder as work_module
from moe_embed_jax.preparation.beam.accounts import (
    bucket_bytes,
    bucket_counts,
    check_duplicates,
    empty_bucket,
    place_rows,
    rounds,
    source_counts,
)
from moe_embed_jax.preparation.beam.options import Options
from moe_embed_jax.preparation.beam.read import exists, open_file
from moe_embed_jax.preparation.beam.sources import Part, Source, find_parts, read_sources
from moe_embed_jax.preparation.beam.stages import (
    SUMS,
    TOKEN_SUMS,
    ReadParts,
    SpreadParts,
    WriteBuckets,
    WriteShards,
    copy,
)
from moe_embed_jax.preparation.beam.work_folder import Work, bucket_name, part_name, shard_work_name
from moe_embed_jax.refusals import refusal_of_system

QUARANTINE = "quarantine"  # folder of bad rows, in that of the pairs
VERSION = 3  # raise it when the same input starts to give another result
# Compressed bytes of pairs that one machine shuffles at a time, in memory.
LOCAL_ROUND_BYTES = 1 << 30
_LOCAL_RUNNERS = ("DirectRunner", "BundleBasedDirectRunner", "FnApiRunner")


def prepare(options: Options) -> dict:
    """Prepares `options.output`, going on where an earlier call stopped; returns its manifest.

    Raises:
      UserError: bad sources, too many bad rows, something else at `output`, a failed pipeline.
    """
    _check_flags(options.beam)
    sources = read_sources(options.sources)
    parts = find_parts(sources)
    vocabulary = _read_vocabulary(options.vocabulary)
    plan = {
        "version": VERSION,
        # Not the limit on bad rows: it does not change the result, and may be raised on the way.
        "sources": [{**s.as_dict(), "max_bad_share": None} for s in sources],
        "files": [[part.path, part.size] for part in parts],
        "vocabulary": canonical_hash({"model": vocabulary[1].hex()}) if vocabulary else None,
        "rows_per_shard": options.rows_per_shard,
    }
    plan = json.loads(json.dumps(plan))
    if storage.is_remote(options.output) and _is_local(options.beam):
        return _prepare_and_upload(options, plan, sources, parts, vocabulary)
    with _alone(options.output):
        return _prepare(options, plan, sources, parts, vocabulary)


def _prepare_and_upload(options: Options, plan: dict, *inputs) -> dict:
    """On this machine: Beam fills a folder in its cache, which is uploaded when it is whole."""
    target = storage.path(options.output)
    place = storage.local_place(target)
    with own(target) as owner, _alone(str(place)):
        remove_unfinished(target)
        if (target / MANIFEST).is_file():
            pairs = PairFolder(target)
            _check_plan(pairs.manifest, plan, options.output)
            pairs.verify()
            print(f"prepared before: {options.output}")
            return pairs.manifest
        if target.exists():
            raise UserError(f"{target} exists and is not empty: choose another --output")
        manifest = _prepare(dataclasses.replace(options, output=str(place)), plan, *inputs)
        owner.check()
        upload(place, target, last=MANIFEST)
        storage.remove(place)
    return manifest


def _prepare(
    options: Options,
    plan: dict,
    sources: list[Source],
    parts: list[Part],
    vocabulary: tuple[str, bytes] | None,
) -> dict:
    work = Work(options.output)
    work_module.make_folder(options.output)
    if manifest := _finished(options.output, plan):
        work.remove()
        print(f"prepared before: {options.output}")
        return manifest
    work.begin(plan)
    run = _Run(work, options, sources, parts)
    run.read(vocabulary)
    run.spread()
    run.write()
    manifest = run.finish(plan)
    work.remove()
    return manifest


class _Run:
    """The stages of one preparation; each returns at once where its work is done."""

    def __init__(self, work: Work, options: Options, sources: list[Source], parts: list[Part]):
        self._work = work
        self._options = options
        self._sources = sources
        self._parts = parts
        self._read: list[dict] = []  # markers of the parts
        self._buckets: dict[str, dict] = {}  # markers by name
        self._shards: list[dict] = []  # markers
        self._groups: list[dict] = []

    def read(self, vocabulary: tuple[str, bytes] | None) -> None:
        names = [part_name(part) for part in range(len(self._parts))]
        done = self._work.done("read")
        pending = [part for part, name in enumerate(names) if name not in done]
        _say("read", len(names), len(pending), "input files")
        if pending:
            stage = ReadParts(self._work, self._sources, self._parts, vocabulary)
            self._run(pending, beam.ParDo(stage))
            done = self._work.done("read")
        self._read = [_marker(done, name) for name in names]
        _collect_quarantine(self._options.output, self._work, self._sources, self._read)
        for index, source in enumerate(self._sources):
            markers = [marker for marker in self._read if marker["source"] == index]
            limit = source.max_bad_share
            limit = self._options.max_bad_share if limit is None else limit
            _check_share(source.name, markers, limit, self._options.output)

    def spread(self) -> None:
        buckets = bucket_counts(self._read, len(self._sources), self._options.rows_per_shard)
        names = [bucket_name(s, b) for s, count in buckets.items() for b in range(count)]
        done = self._work.done("buckets")
        pending = [
            (source, bucket)
            for source, count in buckets.items()
            for bucket in range(count)
            if bucket_name(source, bucket) not in done
        ]
        _say("remove duplicates", len(names), len(pending), "ranges of rows")
        most_bytes = LOCAL_ROUND_BYTES if _is_local(self._options.beam) else math.inf
        for wanted in rounds(pending, bucket_bytes(self._read, buckets), most_bytes):
            used = [n for n, part in enumerate(self._parts) if part.source in wanted]
            spread = SpreadParts(self._work, self._parts, buckets, wanted)
            write = WriteBuckets(self._work)
            self._run(used, beam.ParDo(spread), beam.GroupByKey(), beam.ParDo(write))
            # A range of keys may be empty: its marker says so.
            found = self._work.done("buckets")
            for source, chosen in wanted.items():
                for bucket in chosen:
                    if bucket_name(source, bucket) not in found:
                        self._work.mark(
                            "buckets", bucket_name(source, bucket), empty_bucket(source, bucket)
                        )
        done = self._work.done("buckets")
        self._buckets = {name: _marker(done, name) for name in names}
        for index, source in enumerate(self._sources):
            check_duplicates(source.name, index, self._read, self._buckets.values())

    def write(self) -> None:
        names = [source.name for source in self._sources]
        sums = (*SUMS, *(TOKEN_SUMS if self._options.vocabulary else ()))
        ranges, self._groups = place_rows(
            names, self._buckets.values(), sums, self._options.rows_per_shard
        )
        names = [shard_work_name(shard) for shard in range(len(ranges))]
        done = self._work.done("shards")
        pending = [
            (shard, ranges[shard]) for shard in range(len(names)) if names[shard] not in done
        ]
        _say("write", len(names), len(pending), "shards")
        if pending:
            self._run(pending, beam.ParDo(WriteShards(self._work, self._sources)))
            done = self._work.done("shards")
        self._shards = [_marker(done, name) for name in names]
        rows = sum(group["stop"] - group["start"] for group in self._groups)
        written = sum(shard["rows"] for shard in self._shards)
        if written != rows:
            raise RuntimeError(f"{written} rows are in the shards, {rows} were to be written")

    def finish(self, plan: dict) -> dict:
        """Moves the shards to their place and writes the metadata; the manifest comes last."""
        output = self._options.output
        counts = {
            source.name: source_counts(source.name, index, self._read, self._buckets.values())
            for index, source in enumerate(self._sources)
        }
        about = {"made_by": "launch/prepare.py", "plan": plan, "sources": counts}
        manifest = pair_manifest.make_manifest(self._shards, self._groups, about)
        for number, entry in enumerate(manifest["shards"]):
            for key, suffix in (("file", "array_record"), ("lengths", "npy")):
                target = posixpath.join(output, entry[key])
                path = self._work.path("shards", f"{shard_work_name(number)}.{suffix}")
                if FileSystems.exists(path):
                    work_module.move(path, target)
                elif not FileSystems.exists(target):  # no killed process has moved it
                    raise UserError(
                        f"{path} is missing: delete the folder of --output, and prepare again"
                    )
        with tempfile.TemporaryDirectory() as folder:
            manifest = pair_writer.write_tfds_metadata(pathlib.Path(folder), manifest)
            for path in sorted(pathlib.Path(folder).iterdir()):
                copy(path, posixpath.join(output, path.name))
        with work_module.written_whole(posixpath.join(output, MANIFEST)) as file:
            file.write(manifest_text(manifest).encode("utf-8"))
        return manifest

    def _run(self, elements: list, *steps: beam.PTransform) -> None:
        """Beam's steps, one after the other, on the elements, which are spread over the workers."""
        with _Pipeline(self._options.beam) as pipeline:
            results = pipeline | beam.Create(elements, reshuffle=False) | beam.Reshuffle()
            for step in steps:
                results |= step


class _Pipeline(beam.Pipeline):
    """Runs when its block ends; what a worker says to the user becomes the error."""

    def __init__(self, flags: tuple[str, ...]):
        options = PipelineOptions(list(flags))
        if _runner(flags) == "DirectRunner":
            # DirectRunner would first try to download Prism, a runner in Go.
            options.view_as(StandardOptions).runner = "FnApiRunner"
        # It logs the stack trace of an error that `__exit__` gets, too.
        logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
        super().__init__(options=options)

    def __exit__(self, kind, error, traceback) -> None:
        try:
            super().__exit__(kind, error, traceback)
        except Exception as failure:
            said = re.findall(r"moe_embed_jax\.errors\.UserError: (.*)", str(failure))
            if said or (refusal := refusal_of_system(failure)) is None:
                lines = [line for line in str(failure).splitlines() if line.strip()] or [""]
                refusal = said[-1] if said else f"the pipeline failed: {lines[-1]}"
            raise UserError(refusal) from failure


def _quarantine_path(output: str, source: str) -> str:
    return posixpath.join(output, QUARANTINE, f"{source}.jsonl")


def _collect_quarantine(
    output: str, work: Work, sources: list[Source], markers: list[dict]
) -> None:
    """Bad rows where a person can read them: one file per source, in the order of the input.

    Each is {"source", "file", "line", "field", "problem", "row"}.
    """
    for index, source in enumerate(sources):
        bad = [n for n, m in enumerate(markers) if m["source"] == index and m["bad"]]
        if not bad:
            continue
        work_module.make_folder(posixpath.join(output, QUARANTINE))
        with work_module.written_whole(_quarantine_path(output, source.name)) as target:
            for part in bad:
                with open_file(work.checked("read", part_name(part), ".bad")) as file:
                    shutil.copyfileobj(file, target)


def _check_share(source: str, markers: list[dict], limit: float, output: str) -> None:
    """Raises `UserError`, which names the worst file, if more than `limit` of the rows are bad."""
    rows, bad = (sum(marker[key] for marker in markers) for key in ("rows", "bad"))
    if not bad or bad <= limit * rows:
        return
    worst = max(markers, key=lambda marker: (marker["bad"], marker["file"]))
    first = worst["first_bad"]
    field = f", field {first['field']}" if first["field"] else ""
    raise UserError(
        f"source {source}: {bad:,} of {rows:,} rows are bad ({bad / rows:.2%}, allowed "
        f"{limit:.2%}). The worst file is {worst['file']} with {worst['bad']:,} of "
        f"{worst['rows']:,}; the first of them: {first['file']}, line {first['line']}{field}: "
        f"{first['problem']}. All are in {_quarantine_path(output, source)}; correct the files and "
        "delete the work folder, or allow more with --max_bad_share and run again"
    )


def _runner(flags: tuple[str, ...]) -> str:
    return PipelineOptions(list(flags)).view_as(StandardOptions).runner or "DirectRunner"


def _is_local(flags: tuple[str, ...]) -> bool:
    return _runner(flags) in _LOCAL_RUNNERS


def _check_flags(flags: tuple[str, ...]) -> None:
    """Refuses flags that no part of Beam knows; a remote runner may know more."""
    options = PipelineOptions(list(flags))
    unknown = set(options.get_all_options(retain_unknown_options=True))
    unknown -= set(options.get_all_options())
    if unknown and _is_local(flags):
        raise UserError(f"unknown flag --{min(unknown)}: neither of this program nor of Beam")


def _read_vocabulary(path: str) -> tuple[str, bytes] | None:
    if not path:
        return None
    if not exists(path):
        raise UserError(f"--vocabulary={path} does not exist")
    with open_file(path) as file:
        return path, file.read()


def _finished(output: str, plan: dict) -> dict | None:
    path = posixpath.join(output, MANIFEST)
    if not FileSystems.exists(path):
        return None
    manifest = work_module.read_json(path)
    _check_plan(manifest, plan, output)
    if "://" not in output:
        PairFolder(output).verify()  # names a file that is missing or damaged
    return manifest


def _check_plan(manifest: dict, plan: dict, output: str) -> None:
    about = manifest.get("about")
    if not isinstance(about, dict) or about.get("plan") != plan:
        raise UserError(
            f"{output} holds pairs that were prepared from other sources or with other options: "
            "choose another --output, or delete it"
        )


@contextlib.contextmanager
def _alone(output: str) -> Iterator[None]:
    """One process prepares a local folder; another one is refused.

    What killed processes left half-written is removed.
    """
    if "://" in output:
        yield
        return
    with own(output):
        for path in storage.path(output).rglob("*.tmp"):
            path.unlink()
        yield


def _say(stage: str, count: int, pending: int, what: str) -> None:
    before = f", {count - pending} done before" if pending < count else ""
    print(f"{stage}: {count} {what}{before}", flush=True)


def _marker(done: dict[str, dict], name: str) -> dict:
    if name not in done:
        raise RuntimeError(f"the pipeline ended without {name}")
    return done[name]
