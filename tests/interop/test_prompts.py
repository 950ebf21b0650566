"""The prompts of exported folders."""

import pytest

from moe_embed_jax.interop.prompts import (
    SYMMETRIC_TYPES,
    exported_prompts,
    with_document_prefix,
)

OURS = {"query": "q: ", "document": "d: "}


def test_mteb_finds_the_prompts_of_the_adapter():
    """For every type of task, by MTEB's own choice among the prompts of a folder."""
    pytest.importorskip("mteb", reason="needs mteb (pip install -e .[mteb])")
    from helpers.mteb_tasks import describe
    from mteb.models.abs_encoder import get_prompt, get_prompt_name
    from mteb.types import PromptType

    from moe_embed_jax.evaluation.mteb_model import PROMPTS

    exported = exported_prompts(OURS)
    for kind, sides in (
        *((kind, (None, *PromptType)) for kind in SYMMETRIC_TYPES),
        *((kind, tuple(PromptType)) for kind in ("Retrieval", "Reranking")),
    ):
        metadata = describe(kind, "main")
        for side in sides:
            expected = OURS[PROMPTS[get_prompt_name(PROMPTS, metadata, side)]]
            assert get_prompt(exported, metadata, side) == expected, (kind, side)


def test_prompts_of_the_folder_itself_stay():
    own = OURS | {"STS": "s: ", "passage": "p: "}
    assert exported_prompts(own) == dict.fromkeys(SYMMETRIC_TYPES, "d: ") | own
    assert exported_prompts({"query": "q: ", "document": ""}) == {
        "query": "q: ",
        "document": "",
        "passage": "",
    }


def test_another_prefix_for_documents_is_that_of_the_types_which_had_the_old_one():
    prompts = exported_prompts(OURS | {"STS": "s: "})
    assert with_document_prefix(prompts, "x: ") == {"query": "q: ", "STS": "s: ", "document": "x: "}
