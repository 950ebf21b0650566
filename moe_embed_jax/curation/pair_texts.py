"""A range of pairs as distinct queries and documents, their vectors, and the pairs' own scores."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moe_embed_jax.curation.teacher import Teacher
from moe_embed_jax.curation.teacher_config import TeacherConfig
from moe_embed_jax.data.npz_file import read_npz
from moe_embed_jax.data.teacher_vectors import SIDES, write_index
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.normal_form import normal_form
from moe_embed_jax.search.knn import Documents
from moe_embed_jax.search.vectors import VectorStore, write_vectors
from moe_embed_jax.tokenizers.vocabulary import content_ids

READ_AT_ONCE = 8192
SCORED_AT_ONCE = 65_536  # documents in memory, when pairs are scored


@dataclasses.dataclass(frozen=True)
class Distinct:
    """Texts without duplicates, in the order of their first appearance.

    texts: the first of each normal form. row: int64 [n], which of them stands for the n-th text.
    content_ids: int32 [n, 2], of every text.
    """

    texts: list[str]
    row: np.ndarray
    content_ids: np.ndarray


def distinct(texts: Iterable[str]) -> Distinct:
    texts = list(texts)
    rows: dict[str, int] = {}
    kept: list[str] = []
    row = []
    for text in texts:
        form = normal_form(text)
        if form not in rows:
            rows[form] = len(kept)
            kept.append(text)
        row.append(rows[form])
    return Distinct(kept, np.array(row, np.int64), content_ids(texts))


@dataclasses.dataclass(frozen=True)
class PairTexts:
    """P pairs: pair p is (queries.row[p], documents.row[p])."""

    queries: Distinct
    documents: Distinct


def read_texts(pairs: PairFolder, start: int, stop: int) -> PairTexts:
    """Rows [start, stop) of a prepared folder; all their texts are in memory."""
    queries, documents = [], []
    for begin in range(start, stop, READ_AT_ONCE):
        for row in pairs.read(range(begin, min(begin + READ_AT_ONCE, stop))):
            queries.append(row.query)
            documents.append(row.document)
    return PairTexts(distinct(queries), distinct(documents))


@dataclasses.dataclass(frozen=True)
class Embedding:
    """How texts are embedded: by whom, with which prompts, stored in which dtype."""

    teacher: Teacher
    query_prompt: str | None = TeacherConfig.query_prompt
    document_prompt: str | None = TeacherConfig.document_prompt
    dtype: str = TeacherConfig.dtype

    def identity(self) -> dict:
        return {
            "query": self.teacher.identity(self.query_prompt),
            "document": self.teacher.identity(self.document_prompt),
            "dtype": self.dtype,
        }

    def embed(self, folder: Path, texts: PairTexts) -> tuple[VectorStore, VectorStore]:
        """Vectors of the distinct queries and documents in `folder`; continues what is there.

        Beside them lies which text has which vector (`write_index`), for distillation.
        """
        sides = dict(zip(SIDES, (texts.queries, texts.documents), strict=True))
        prompts = dict(zip(SIDES, (self.query_prompt, self.document_prompt), strict=True))
        stores = tuple(
            write_vectors(
                folder / f"{name}.zarr",
                lambda side=side: side.texts,
                _encode(self.teacher, prompts[name]),
                self.teacher.identity(prompts[name]),
                self.dtype,
            )
            for name, side in sides.items()
        )
        write_index(folder, {name: (side.content_ids, side.row) for name, side in sides.items()})
        return stores


def _encode(teacher: Teacher, prompt: str | None) -> Callable[[list[str]], np.ndarray]:
    return lambda texts: teacher.encode(texts, prompt=prompt)


def pair_scores(
    query_ND: np.ndarray, document_ND: Documents, query_row_P, document_row_P
) -> np.ndarray:
    """float32 [P]: inner products of pairs of rows; the documents are read in slices, once."""
    score_P = np.zeros(len(query_row_P), np.float32)
    order = np.argsort(document_row_P, kind="stable")
    sorted_rows = document_row_P[order]
    for begin in range(0, document_ND.shape[0], SCORED_AT_ONCE):
        first, last = np.searchsorted(sorted_rows, [begin, begin + SCORED_AT_ONCE])
        slice_ND = document_ND[begin : begin + SCORED_AT_ONCE].astype(np.float32)
        for part in range(first, last, READ_AT_ONCE):
            pairs = order[part : min(part + READ_AT_ONCE, last)]
            documents = slice_ND[document_row_P[pairs] - begin]
            score_P[pairs] = np.einsum("pd,pd->p", query_ND[query_row_P[pairs]], documents)
    return score_P


def read_cache(path: Path, made_of: str, names: Sequence[str]) -> list[np.ndarray] | None:
    """Arrays of an .npz file whose "made_of" is this text; None: they must be computed.

    Each array in it has a CRC-32. A damaged file is said, not used.
    """
    try:
        stored = read_npz(path, ["made_of", *names])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print(f"warning: {path} is damaged ({error}): computed again", file=sys.stderr, flush=True)
        return None
    return [stored[name] for name in names] if str(stored["made_of"]) == made_of else None


def progress_bar(total: int, unit: str) -> tqdm:
    return tqdm(total=total, unit=unit, disable=None, leave=False)
