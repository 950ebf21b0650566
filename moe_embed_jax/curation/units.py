"""A prepared folder made of another one unit by unit: by one process, or by many.

A unit is a range of pairs of one source and language that is judged without the others. Its folder
holds

    shard-00000, lengths-00000, ...   its rows of the new folder
    unit.json                         what it was made of, counts, examples; written last

All of it is a function of pairs, teacher and rule, so nobody need know which process made it.
"""

import abc
import dataclasses
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np

from moe_embed_jax import storage
from moe_embed_jax.config import save_json
from moe_embed_jax.curation.pair_texts import Embedding, progress_bar
from moe_embed_jax.curation.report import Example, Report
from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import canonical_hash
from moe_embed_jax.new_folder import new_folder
from moe_embed_jax.ownership import own
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.manifest import (
    LENGTHS,
    MANIFEST,
    count_row,
    empty_group,
    make_manifest,
    manifest_text,
)
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.parts import WHOLE, Part, not_done
from moe_embed_jax.preparation.pair_writer import ROWS_PER_SHARD, ShardWriter, write_tfds_metadata

UNIT_FILE = "unit.json"
COPIES = 8  # of shards at a time


@dataclasses.dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of the pairs; `folder` keeps whatever need not be computed again."""

    number: int
    source: str
    language: str
    start: int
    stop: int
    folder: Path

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of a unit's pairs.

    kept_P: bool, the pairs that stay. rows: of the new folder, in their order. counts: of the
    report, see `Report.counts`. examples: for the report.
    """

    kept_P: np.ndarray
    rows: Iterable[PairRow]
    counts: dict[str, int]
    examples: list[Example]


class Curation(abc.ABC):
    """One rule and one teacher, applied to a prepared folder.

    Attributes:
      kind: what the manifest of the new folder calls it.
      units: in the order of the rows.
    """

    kind: str
    new_report: type[Report]

    def __init__(
        self,
        pairs: PairFolder,
        work: Path,
        embedding: Embedding,
        rule,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """`work`: keeps vectors and finished units; another rule there is cheap, other pairs or
        another teacher are an error. `rule`: a dataclass. `mesh`: of the search.
        """
        self.pairs, self.work, self.embedding = pairs, work, embedding
        self.rule, self.mesh = rule, mesh
        self.about = {
            "pairs": {"folder": str(pairs.folder), "content_hash": pairs.content_hash},
            "teacher": embedding.identity(),
            "rule": dataclasses.asdict(rule),
        }
        numbers = itertools.count()
        self.units = [
            Unit(next(numbers), source, language, *place)
            for index, ((source, language), (start, stop)) in enumerate(pairs.groups.items())
            for place in self._places(start, stop, self._group_folder(index, source, language))
        ]

    @abc.abstractmethod
    def _places(self, start: int, stop: int, folder: Path) -> Iterable[tuple[int, int, Path]]:
        """(start, stop, folder) of each unit of a source and language with the rows [start, stop)
        and the folder `folder`."""

    @abc.abstractmethod
    def judge(self, unit: Unit) -> Judged:
        """Computes a unit; what its folder has already is kept."""

    def _group_folder(self, index: int, source: str, language: str) -> Path:
        name = re.sub(r"[^\w.-]+", "_", f"{source}-{language}")[:80]
        return self.work / f"{index:05d}-{name}"

    def run(self, output: Path, part: Part | None = None, finish: bool = False) -> Report | None:
        """Writes `output`, a prepared folder with report.md and report.json.

        Args:
          part: do these units instead, and write no output.
          finish: compute nothing; the units are done.

        Returns the report, or None if this call wrote no output; it then prints a line.

        Raises:
          UserError: something else is at `output`; `work` belongs to other pairs or another
            teacher; another process does the same; `finish`, and a unit is missing; no pair is
            left.
        """
        if self._is_done(output):
            print(f"done before: {output}")
            return None
        if part is not None:
            done = self.make(part)
            print(f"part {part}: {done} of {len(self.units)} units are done, in {self.work}")
            return None
        with own(self.work, inside=True):
            if not finish:
                self.make(WHOLE)
            return self._write(output)

    def make(self, part: Part) -> int:
        """Computes the units of a part that are not done yet; returns how many it has."""
        units = [unit for unit in self.units if part.has(unit.number)]
        with progress_bar(sum(map(len, units)), " pairs") as bar:
            for unit in units:
                with own(unit.folder, inside=True):
                    if self._made(unit) is None:
                        self._make(unit)
                bar.update(len(unit))
        return len(units)

    def kept(self) -> np.ndarray:
        """bool [rows]: the pairs that stay. All units are done."""
        packed = [bytes.fromhex(self._made(unit)["kept"]) for unit in self.units]
        bits = [
            np.unpackbits(np.frombuffer(data, np.uint8), count=len(unit))
            for data, unit in zip(packed, self.units, strict=True)
        ]
        return np.concatenate(bits).astype(bool)

    def _manifest_about(self) -> dict:
        return {self.kind: self.about, "from": self.pairs.manifest["about"]}

    def _is_done(self, output: Path) -> bool:
        """Whether `output` is what this makes: a process may be killed after it appeared.

        Raises `UserError` if it is something else, or if a file of it is missing or damaged.
        """
        if not output.exists():
            return False
        if (output / MANIFEST).is_file():
            made, found = json.loads(json.dumps(self._manifest_about())), PairFolder(output)
            if found.manifest["about"] == made:
                found.verify()
                return True
        raise UserError(
            f"{output} exists, and is not what this command makes: choose another folder"
        )

    def _made_of(self, unit: Unit) -> dict:
        about = {
            "pairs": self.pairs.content_hash,
            "rows": [unit.start, unit.stop],
            **{key: self.about[key] for key in ("teacher", "rule")},
        }
        return json.loads(json.dumps(about))

    def _made(self, unit: Unit) -> dict | None:
        """unit.json; None: it must be made. A damaged one is said, not used."""
        path = unit.folder / UNIT_FILE
        if not storage.has_entry(path):
            return None
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            claimed = made.pop("hash")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            made, claimed = {}, None
        if canonical_hash(made) != claimed:
            print(f"warning: {path} is damaged: made again", file=sys.stderr, flush=True)
            return None
        return made if made["made_of"] == self._made_of(unit) else None

    def _make(self, unit: Unit) -> None:
        judged = self.judge(unit)
        (unit.folder / UNIT_FILE).unlink(missing_ok=True)  # the shards of another rule go
        group, shards = write_shards(unit, judged.rows)
        made = {
            "made_of": self._made_of(unit),
            "kept": np.packbits(judged.kept_P).tobytes().hex(),
            "counts": judged.counts,
            "examples": [dataclasses.asdict(example) for example in judged.examples],
            "group": group,
            "shards": shards,
        }
        save_json(unit.folder / UNIT_FILE, made | {"hash": canonical_hash(made)})

    def _write(self, output: Path) -> Report:
        made = [self._made(unit) for unit in self.units]
        if missing := [number for number, found in enumerate(made) if found is None]:
            raise not_done(missing, len(made), "units", self.work)
        report = self.new_report(self.about)
        for unit, found in zip(self.units, made, strict=True):
            report.add(unit.source, unit.language, found["counts"], found["examples"])
        report.write(self.work)
        shards = [
            (unit, number, entry)
            for unit, found in zip(self.units, made, strict=True)
            for number, entry in enumerate(found["shards"])
        ]
        if not shards:
            raise UserError(f"no pair was written to {output}: nothing is left")
        manifest = make_manifest(
            [entry for _, _, entry in shards],
            _joined([found["group"] for found in made]),
            self._manifest_about(),
        )
        with new_folder(output, last=MANIFEST) as partial, ThreadPoolExecutor(COPIES) as pool:
            copies = [
                pool.submit(copy_shard, unit, number, partial, entry)
                for (unit, number, _), entry in zip(shards, manifest["shards"], strict=True)
            ]
            for copy in copies:
                copy.result()
            report.write(partial)
            manifest = write_tfds_metadata(partial, manifest)
            (partial / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
        return report


def _shard_files(unit: Unit, number: int) -> tuple[Path, Path]:
    """The records and the lengths of a shard."""
    return unit.folder / f"shard-{number:05d}", unit.folder / f"lengths-{number:05d}"


def write_shards(unit: Unit, rows: Iterable[PairRow]) -> tuple[dict, list[dict]]:
    """(entry of the group, entries of the shards) in a manifest of this unit alone."""
    group, shards = empty_group(unit.source, unit.language, 0), []
    for shard in _split(iter(rows), ROWS_PER_SHARD):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "records", Path(folder) / "lengths"
            writer = ShardWriter(local[0])
            try:
                for row in shard:
                    writer.write(row)
                    count_row(group, row)
            except BaseException:
                writer.close()
                raise
            shards.append(writer.finish(local[1]))
            for source, target in zip(local, _shard_files(unit, len(shards) - 1), strict=True):
                storage.copy(source, target)
    return group, shards


def _split(rows: Iterator[PairRow], most: int) -> Iterator[Iterator[PairRow]]:
    for first in rows:
        yield itertools.chain([first], itertools.islice(rows, most - 1))


def _joined(groups: Iterable[dict]) -> list[dict]:
    """Entries of sources and languages from entries of their units; empty ones go."""
    joined: dict[tuple[str, str], dict] = {}
    rows = 0
    for group in groups:
        if not group["stop"]:
            continue
        key = group["source"], group["language"]
        entry = joined.setdefault(key, empty_group(*key, rows))
        for name in ("stop", *LENGTHS):
            entry[name] += group[name]
        rows += group["stop"]
    return list(joined.values())


def copy_shard(unit: Unit, number: int, folder: Path, entry: dict) -> None:
    """Copies a shard under the names of its entry in the manifest."""
    names = ("file", "sha256"), ("lengths", "lengths_sha256")
    for source, (name, digest) in zip(_shard_files(unit, number), names, strict=True):
        content = source.read_bytes() if source.is_file() else b""
        if sha256(content).hexdigest() != entry[digest]:
            raise UserError(
                f"{source} is missing or damaged: delete {unit.folder / UNIT_FILE}, and repeat "
                "the command that made it"
            )
        (folder / entry[name]).write_bytes(content)
