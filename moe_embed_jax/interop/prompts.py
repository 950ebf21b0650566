"""The prompts of an exported folder: a name for each side and for MTEB's task types.

Imports nothing, so that the adapter to MTEB and the export have one table.
"""

from collections.abc import Mapping

# Task types that MTEB encodes without saying which side a text is on: both texts of a pair, or
# texts alone, get the same prompt.
SYMMETRIC_TYPES = (
    "BitextMining",
    "Classification",
    "Clustering",
    "MultilabelClassification",
    "PairClassification",
    "Regression",
    "STS",
    "Summarization",
)


def exported_prompts(prompts: Mapping[str, str]) -> dict[str, str]:
    """{name: prefix} of `prompts` and of what other libraries look for.

    sentence-transformers' encode_document looks for "document" first and takes no prefix at all
    where it is missing; the published model says "passage". MTEB takes a prompt by the type of a
    task, and none where a symmetric one is missing.
    """
    document = prompts["document"]
    types = dict.fromkeys(SYMMETRIC_TYPES, document) if document else {}
    return {"passage": document, **types, **prompts}


def own_prompts(prompts: Mapping[str, str]) -> dict[str, str]:
    """`prompts` without those that `exported_prompts` would add."""
    added = ("passage", *SYMMETRIC_TYPES)
    document = prompts.get("document")
    return {n: text for n, text in prompts.items() if n not in added or text != document}


def with_document_prefix(prompts: Mapping[str, str], prefix: str) -> dict[str, str]:
    """`prompts` with another prefix for documents, under each name that had the old one."""
    old = prompts.get("document")
    names = {"document", "passage", "corpus"}
    names |= {name for name in SYMMETRIC_TYPES if prompts.get(name) == old}
    return {name: text for name, text in prompts.items() if name not in names} | {
        "document": prefix
    }
