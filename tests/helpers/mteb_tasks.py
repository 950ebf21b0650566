"""Tasks of MTEB over texts in memory, without hub or network, and what its tests do with them.

Needs mteb.
"""

import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata
from sklearn.linear_model import LogisticRegression

from moe_embed_jax.evaluation.beir import RetrievalSet
from moe_embed_jax.evaluation.retrieval import CANDIDATES

ENGLISH = "eng-Latn"  # whatever the texts are: MTEB wants a language it knows


def describe(kind: str, main_score: str, languages=(ENGLISH,)) -> TaskMetadata:
    return TaskMetadata(
        name=f"Local{kind}",
        description="texts in memory",
        dataset={"path": "local/none", "revision": "1"},
        type=kind,
        eval_langs=languages if isinstance(languages, dict) else list(languages),
        main_score=main_score,
    )


def _task(base, metadata: TaskMetadata, data, **attributes):
    def load_data(self, num_proc=None, **kwargs):
        del num_proc, kwargs
        self.dataset, self.data_loaded = data(), True

    members = {"metadata": metadata, "load_data": load_data, **attributes}
    return type(metadata.name, (base,), members)()


def retrieval_task(sets: dict):
    """A `RetrievalSet` per subset; documents come as title and text, as in BEIR."""

    def split(retrieval_set):
        documents = [text.partition(" ") for text in retrieval_set.documents]
        return {
            "corpus": Dataset.from_dict(
                {
                    "id": retrieval_set.document_ids,
                    "title": [title for title, _, _ in documents],
                    "text": [text for _, _, text in documents],
                }
            ),
            "queries": Dataset.from_dict(
                {"id": retrieval_set.query_ids, "text": retrieval_set.queries}
            ),
            "relevant_docs": retrieval_set.qrels,
            "top_ranked": None,
        }

    metadata = describe("Retrieval", "ndcg_at_10", {name: [ENGLISH] for name in sets})
    return _task(
        AbsTaskRetrieval,
        metadata,
        lambda: {name: {"test": split(each)} for name, each in sets.items()},
    )


def _one_split(columns: dict):
    return lambda: DatasetDict({"test": Dataset.from_dict(columns)})


def sts_task(first: list[str], second: list[str], scores):
    columns = {"sentence1": first, "sentence2": second, "score": list(scores)}
    return _task(AbsTaskSTS, describe("STS", "cosine_spearman"), _one_split(columns))


def bitext_task(first: list[str], second: list[str]):
    columns = {"sentence1": first, "sentence2": second}
    return _task(AbsTaskBitextMining, describe("BitextMining", "f1"), _one_split(columns))


def classification_task(train: dict, test: dict, experiments: int):
    """`train`, `test`: {"text": ..., "label": ...}."""

    def data():
        return DatasetDict({"train": Dataset.from_dict(train), "test": Dataset.from_dict(test)})

    metadata = describe("Classification", "accuracy")
    return _task(AbsTaskClassification, metadata, data, n_experiments=experiments)


def probe_accuracy(train, test, experiments: int) -> float:
    """What MTEB calls accuracy: mean over probes on 8 texts per label; each side is (x, labels)."""
    seed = 42  # MTEB's
    (x_BD, labels_B), order = train, list(range(len(train[0])))
    accuracies = []
    for _ in range(experiments):
        np.random.RandomState(seed).shuffle(order)
        chosen = []
        for label in np.unique(labels_B):
            chosen += [i for i in order if labels_B[i] == label][:8]
        chosen.sort(key=order.index)
        probe = LogisticRegression(max_iter=100, random_state=seed)
        accuracies.append(probe.fit(x_BD[chosen], labels_B[chosen]).score(*test))
    return float(np.mean(accuracies))


def evaluate(model, task, cache=None, **options) -> dict[str, dict]:
    """{subset: scores}"""
    results = mteb.evaluate(
        model, task, cache=cache, co2_tracker=False, show_progress_bar=False, **options
    )
    return {scores["hf_subset"]: scores for scores in results.task_results[0].scores["test"]}


def graded_set(queries: list[str], documents: list[str]) -> RetrievalSet:
    """Every query has a document of grade 2 and one of grade 1."""
    ids = [f"d{i}" for i in range(len(documents))]
    grades = {f"q{i}": {ids[i]: 2, ids[i - 7]: 1} for i in range(len(queries))}
    return RetrievalSet("graded", list(grades), queries, ids, documents, grades)


def ranking(retrieval_set: RetrievalSet, run: dict[str, dict[str, float]]) -> np.ndarray:
    """Document indices, best first, of the scores that MTEB kept: [queries, CANDIDATES]."""
    index = {identity: i for i, identity in enumerate(retrieval_set.document_ids)}
    rows = np.full((len(retrieval_set.queries), CANDIDATES), -1)
    for row, query in zip(rows, retrieval_set.query_ids, strict=True):
        best = sorted(run[query], key=run[query].get, reverse=True)[:CANDIDATES]
        row[: len(best)] = [index[identity] for identity in best]
    return rows


def encode(model, texts, **options) -> np.ndarray:
    """As texts of an STS task, in MTEB's batches."""
    batches = [{"text": texts[i : i + 32]} for i in range(0, len(texts), 32)]
    return model.encode(
        batches,
        task_metadata=describe("STS", "main"),
        hf_split="test",
        hf_subset="default",
        **{"show_progress_bar": False, **options},
    )


class SpyVocabulary:
    """Remembers what is tokenised: (texts, limit) of each call."""

    def __init__(self, vocabulary):
        self.vocabulary, self.calls = vocabulary, []

    def encode_counted(self, texts, limit):
        self.calls.append((texts, limit))
        return self.vocabulary.encode_counted(texts, limit)

    def __getattr__(self, name):
        return getattr(self.vocabulary, name)
