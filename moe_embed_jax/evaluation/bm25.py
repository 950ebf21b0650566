"""BM25 (library bm25s) on BEIR-like sets: the baseline that a trained model has to beat."""

import functools
import itertools
import logging
import re
import sys
import unicodedata

import bm25s
import numpy as np
import scipy.sparse
from bm25s.tokenization import Tokenized

from moe_embed_jax.evaluation.beir import RetrievalSet
from moe_embed_jax.evaluation.retrieval import CANDIDATES, Metrics, score_run

logging.getLogger("bm25s").setLevel(logging.ERROR)  # its import asks for DEBUG

QUERY_BLOCK = 256

# Scripts written without spaces between words, and Hangul, whose words carry their particles.
UNSPACED_SCRIPTS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"  # Hangul
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
# Zero-width joiner and soft hyphen stand inside words and are not part of their spelling.
INVISIBLE = dict.fromkeys((0x200D, 0x00AD))


ASCII_WORD = re.compile(r"[a-z0-9]+")
# Between the words of an identifier: get|Object, HTTP|Server.
INSIDE_IDENTIFIER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def word_tokens(text: str) -> list[str]:
    """Unicode words in lower case; in scripts without spaces, characters and their bigrams.

    A word is a run of letters, digits and combining marks (Indic vowel signs are marks), after
    NFKC normalisation and case folding. Identifiers are taken apart (GetObject and get_object are
    get, object), or names of functions would share no word with their descriptions. In Chinese,
    Japanese, Korean, Thai, Lao, Khmer and Burmese a token is a character with its marks, or two
    neighbouring ones, as in Lucene's analyser for the first three with unigrams on.
    """
    text = INSIDE_IDENTIFIER.sub(" ", text)
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    text = unicodedata.normalize("NFKC", text.translate(INVISIBLE)).casefold()
    tokens = []
    words, unspaced, unit = _unicode_words()
    for word in words.findall(text):
        if unspaced.match(word):
            characters = unit.findall(word)
            tokens += characters
            tokens += map("".join, itertools.pairwise(characters))
        else:
            tokens.append(word)
    return tokens


def evaluate_bm25(retrieval_set: RetrievalSet) -> Metrics:
    """Metrics of BM25 (Lucene's variant) over words, judged like embeddings (`score_run`).

    Documents that share no word with a query are not found by it; equal scores are ordered by the
    lower document index.
    """
    weight_NV, vocabulary = _index([word_tokens(text) for text in retrieval_set.documents])
    query_BV = _count_tokens([word_tokens(text) for text in retrieval_set.queries], vocabulary)
    weight_VN = weight_NV.T.tocsr()
    found = [
        _rank((query_BV[start : start + QUERY_BLOCK] @ weight_VN).toarray())
        for start in range(0, query_BV.shape[0], QUERY_BLOCK)
    ]
    return score_run(retrieval_set, np.concatenate(found))


def _index(documents: list[list[str]], k1: float = 1.5, b: float = 0.75):
    """Token weights [N, V] (float32, sparse) and the vocabulary, from bm25s' eager index."""
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(t, len(vocabulary)) for t in tokens] for tokens in documents]
    if not vocabulary:
        return scipy.sparse.csc_array((len(documents), 1), dtype=np.float32), vocabulary
    index = bm25s.BM25(method="lucene", k1=k1, b=b, csc_backend="scipy")
    index.index(Tokenized(ids, vocabulary), create_empty_token=False, show_progress=False)
    parts = (index.scores["data"], index.scores["indices"], index.scores["indptr"])
    return scipy.sparse.csc_array(parts, shape=(len(documents), len(vocabulary))), vocabulary


def _count_tokens(queries: list[list[str]], vocabulary: dict[str, int]) -> scipy.sparse.csr_array:
    """How often each query [B] holds each token of the vocabulary [V]."""
    known = [[vocabulary[t] for t in tokens if t in vocabulary] for tokens in queries]
    ends = np.cumsum([0] + [len(ids) for ids in known])
    columns = np.fromiter((i for ids in known for i in ids), np.int32, count=ends[-1])
    shape = (len(queries), max(1, len(vocabulary)))
    return scipy.sparse.csr_array((np.ones(len(columns), np.float32), columns, ends), shape=shape)


def _rank(score_BN: np.ndarray) -> np.ndarray:
    """Indices of the best `CANDIDATES` documents with positive scores, -1 for none; stable."""
    k = min(CANDIDATES, score_BN.shape[1])
    # A stable sort of all scores is exact about ties but slow; so sort only what can reach the k.
    kth_B = np.partition(score_BN, -k, axis=1)[:, -k]
    index_Bk = np.full((len(score_BN), k), -1, np.int64)
    for row, (score_N, kth) in enumerate(zip(score_BN, kth_B, strict=True)):
        candidate = np.flatnonzero((score_N >= kth) & (score_N > 0))
        order = np.argsort(-score_N[candidate], kind="stable")[:k]
        index_Bk[row, : len(order)] = candidate[order]
    return index_Bk


@functools.cache
def _unicode_words() -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """Patterns of a word or an unspaced run, of the start of the latter, and of its characters.

    `re` knows no Unicode categories, so letters, marks and numbers are listed as ranges.
    """
    in_unspaced = re.compile(f"[{UNSPACED_SCRIPTS}]")
    mark, unspaced, spaced = [], [], []
    for character in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(character)[0]
        if category == "M":
            mark.append(character)
        elif category in "LN":
            (unspaced if in_unspaced.match(character) else spaced).append(character)
    unit = f"{_class(unspaced)}{_class(mark)}*"
    return (
        re.compile(f"(?:{unit})+|{_class(spaced + mark)}+"),
        re.compile(_class(unspaced)),
        re.compile(unit),
    )


def _class(characters: list[str]) -> str:
    """A regular expression's character class; neighbours are joined to ranges."""
    codes = np.sort([ord(character) for character in characters])
    runs = np.split(codes, np.flatnonzero(np.diff(codes) > 1) + 1)
    return "[" + "".join(f"\\U{run[0]:08x}-\\U{run[-1]:08x}" for run in runs) + "]"
