"""Prepared folders of text pairs with hard negatives: random access::

    folder = PairFolder("pairs")
    rows = folder.read(range(*folder.groups["wiki", "de"]))

launch/prepare.py makes such folders from raw text. launch/filter.py and launch/mine.py make new
ones from old ones. `preparation.pair_writer` writes them and lists their files.
"""

import io
import os
from collections.abc import Sequence

import numpy as np

from moe_embed_jax import storage
from moe_embed_jax.hashes import file_hash
from moe_embed_jax.pairs.array_records import damaged, open_records
from moe_embed_jax.pairs.manifest import MANIFEST, PREFIX, read_manifest
from moe_embed_jax.pairs.row import PairRow


class PairFolder:
    """The rows of a prepared folder, by number.

    Attributes:
      folder: where it lies.
      manifest: the content of manifest.json.
      groups: (source, language) -> (start, stop) of its rows, in the order of the rows.
      content_hash: stands for every row and its place.
      data_source: its `Records`.
    """

    def __init__(self, folder: str | os.PathLike):
        """Raises `UserError` where something is missing or damaged; names the file."""
        self.folder = storage.path(folder)
        self.manifest = read_manifest(self.folder)
        self.content_hash: str = self.manifest["content_hash"]
        self.groups: dict[tuple[str, str], tuple[int, int]] = {
            (group["source"], group["language"]): (group["start"], group["stop"])
            for group in self.manifest["groups"]
        }
        for name, sha256 in self.manifest.get("metadata", {}).items():
            self._check(name, sha256)
        self.data_source = open_records(self.folder, PREFIX, self.manifest["rows"])
        self._stops = np.cumsum([shard["rows"] for shard in self.manifest["shards"]])
        self._checked: set[int] = set()  # shards

    def __len__(self) -> int:
        return self.manifest["rows"]

    def read(self, rows: Sequence[int] | np.ndarray) -> list[PairRow]:
        """`Records.read` of the folder's rows; a shard's SHA-256 is compared when it is first read.

        Records have checksums, but those of another shard in its place are right, too.
        """
        shards = np.unique(np.searchsorted(self._stops, np.asarray(rows), side="right"))
        for number in set(shards.tolist()) - self._checked:
            if number < len(self._stops):  # else `Records` says which row there is not
                shard = self.manifest["shards"][number]
                self._check(shard["file"], shard["sha256"])
                self._checked.add(number)
        return self.data_source.read(rows)

    def lengths(self) -> np.ndarray:
        """int32 [rows, 3]: characters of query and document, number of negatives."""
        for shard in self.manifest["shards"]:
            self._check(shard["lengths"], shard["lengths_sha256"])
        paths = [self.folder / shard["lengths"] for shard in self.manifest["shards"]]
        return np.concatenate([np.load(io.BytesIO(path.read_bytes())) for path in paths])

    def verify(self) -> None:
        """Reads every file once; raises `UserError` that names one which was changed."""
        for shard in self.manifest["shards"]:
            for name, key in (("file", "sha256"), ("lengths", "lengths_sha256")):
                self._check(shard[name], shard[key])

    def _check(self, name: str, sha256: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise damaged(path, None, "it is missing")
        if file_hash(path) != sha256:
            raise damaged(path, None, f"its SHA-256 is not the one in {MANIFEST}")
