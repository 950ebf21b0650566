"""Tasks of MTEB over texts in memory: no hub, no network. Needs mteb."""

from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

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
