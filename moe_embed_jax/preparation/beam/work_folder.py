"""The work folder of an unfinished preparation: what is done stays done.

    OUTPUT/work/plan.json      what is being prepared; another plan is refused
    OUTPUT/work/read/          per input file: its pairs, its bad rows, and a marker with counts
    OUTPUT/work/buckets/       per range of keys: its pairs without duplicates, and a marker
    OUTPUT/work/shards/        finished shards, and their markers

Every file appears whole or not at all, and the marker (.json) of a piece comes last. It says which
piece it is of, and has a CRC-32 of its own and of each file that is read as a whole. Tables say
which piece they are of, and their pages have checksums. All are compared when they are read. All
paths are of Beam's file systems.
"""

import contextlib
import io
import json
import posixpath
import uuid
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from moe_embed_jax import json_file
from moe_embed_jax.checksums import take_own, with_own
from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.beam.buckets import SCHEMA
from moe_embed_jax.preparation.beam.read import open_file

STAGES = ("read", "buckets", "shards")
# Small, so that a shard that needs some rows of a bucket reads little else.
ROWS_PER_ROW_GROUP = 4096
_READ_AT_ONCE = 1 << 20


class Work:
    """Paths and markers of a work folder."""

    def __init__(self, output: str):
        self.folder = posixpath.join(output, "work")

    def path(self, stage: str, name: str) -> str:
        return posixpath.join(self.folder, stage, name)

    def begin(self, plan: dict) -> None:
        """Makes the folder, or checks that it belongs to `plan`.

        Raises `UserError` that names what differs.
        """
        path = posixpath.join(self.folder, "plan.json")
        if FileSystems.exists(path):
            old = _read_record(path)
            changed = [key for key in plan if old.get(key) != plan[key]]
            if changed:
                raise UserError(
                    f"{self.folder} is the unfinished work of another preparation (other "
                    f"{', '.join(changed)}): delete that folder, or choose another --output"
                )
            return
        for stage in STAGES:
            make_folder(posixpath.join(self.folder, stage))
        _write_record(path, plan)

    def done(self, stage: str) -> dict[str, dict]:
        """name -> marker of the pieces of a stage that are finished."""
        (found,) = FileSystems.match([self.path(stage, "*.json")])
        paths = sorted(entry.path for entry in found.metadata_list)
        names = [posixpath.basename(path).removesuffix(".json") for path in paths]
        markers = dict(zip(names, map(_read_record, paths), strict=True))
        for name, path in zip(names, paths, strict=True):
            found = markers[name].pop("piece", None)
            if found != f"{stage}/{name}":
                what = f"that of piece {found}" if found else "of an older version"
                raise _damaged(path, f"it is {what}")
        return markers

    def mark(self, stage: str, name: str, marker: dict, suffixes: tuple[str, ...] = ()) -> None:
        """Writes the marker of a piece, with the CRC-32 of its files of these suffixes."""
        crc32 = {suffix: _crc32(self.path(stage, name + suffix)) for suffix in suffixes}
        marker = marker | {"piece": f"{stage}/{name}", "crc32_of": crc32}
        _write_record(self.path(stage, f"{name}.json"), marker)

    def checked(self, stage: str, name: str, suffix: str) -> str:
        """The path of a piece's file, which is read once to compare it with the marker."""
        marker = _read_record(self.path(stage, f"{name}.json"))
        path = self.path(stage, name + suffix)
        if _crc32(path) != marker["crc32_of"][suffix]:
            raise _damaged(path, "it is damaged (its CRC-32 differs)")
        return path

    def remove(self) -> None:
        if FileSystems.exists(self.folder):
            FileSystems.delete([self.folder])


def part_name(part: int) -> str:
    return f"{part:06d}"


def bucket_name(source: int, bucket: int) -> str:
    return f"{source:04d}-{bucket:06d}"


def shard_work_name(shard: int) -> str:
    return f"{shard:05d}"


def make_folder(path: str) -> None:
    if not FileSystems.exists(path):
        FileSystems.mkdirs(path)


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` when the block ends well."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    file = FileSystems.create(temporary, compression_type=CompressionTypes.UNCOMPRESSED)
    try:
        yield file
    except BaseException:
        file.close()
        FileSystems.delete([temporary])
        raise
    file.close()
    move(temporary, path)


def move(source: str, target: str) -> None:
    """Replaces `target`."""
    if "://" in target and FileSystems.exists(target):
        FileSystems.delete([target])
    FileSystems.rename([source], [target])


def size(path: str) -> int:
    """Bytes of a file."""
    (found,) = FileSystems.match([path])
    return found.metadata_list[0].size_in_bytes


def read_json(path: str) -> dict:
    """A file of ours. Raises `UserError` where it holds no JSON object."""
    try:
        with open_file(path) as file:
            return json_file.parse_object(file.read(), path)
    except (UserError, IsADirectoryError) as error:
        raise _damaged(path, f"it is damaged ({error})") from None


def _read_record(path: str) -> dict:
    content = read_json(path)
    if not take_own(content):
        raise _damaged(path, "it is damaged, or of an older version (its CRC-32 differs)")
    return content


def _write_record(path: str, content: dict) -> None:
    with written_whole(path) as file:
        text = json.dumps(with_own(content), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        file.write(text.encode("utf-8"))


def _damaged(path: str, why) -> UserError:
    return UserError(f"{path}: {why}: delete the folder of --output, and prepare again")


def _crc32(path: str) -> int:
    crc = 0
    with open_file(path) as file:
        while block := file.read(_READ_AT_ONCE):
            crc = zlib.crc32(block, crc)
    return crc


@contextlib.contextmanager
def table_writer(path: str) -> Iterator[pq.ParquetWriter]:
    """Writes a table, which appears as `path` when the block ends well and says which it is."""
    schema = SCHEMA.with_metadata({"piece": _piece(path)})
    options = dict(compression="zstd", write_page_checksum=True)
    with written_whole(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        yield writer


def _piece(path: str) -> str:
    """STAGE/NAME of a table."""
    return "/".join(path.removesuffix(".parquet").split("/")[-2:])


@contextlib.contextmanager
def open_table(path: str) -> Iterator[pq.ParquetFile]:
    """What `table_writer` wrote. Raises `UserError` for a damaged file, also while it is read.

    Each shard reads some rows of every bucket, so the pages that are read are compared, and not
    the whole file.
    """
    try:
        with open_file(path) as file:
            whole = file if file.seekable() else io.BytesIO(file.read())
            table = pq.ParquetFile(whole, page_checksum_verification=True)
            found = (table.schema_arrow.metadata or {}).get(b"piece", b"").decode(errors="replace")
            if found != _piece(path):
                raise _damaged(path, f"it is that of piece {found}")
            yield table
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None) is not None:  # of the system, not of Arrow
            raise
        raise _damaged(path, f"it is damaged ({error})") from None


def read_rows(path: str, start: int, stop: int) -> pa.Table:
    """Rows start..stop-1 of a Parquet file; reads only the row groups that hold them."""
    with open_table(path) as parquet:
        groups, first, position = [], 0, 0
        for group in range(parquet.num_row_groups):
            end = position + parquet.metadata.row_group(group).num_rows
            if end > start and position < stop:
                if not groups:
                    first = position
                groups.append(group)
            position = end
        return parquet.read_row_groups(groups).slice(start - first, stop - start)
