"""An `Embedder` as a model of the Massive Text Embedding Benchmark: `mteb.evaluate(model, tasks)`.

Needs the extra `mteb`; nothing else of the package imports this file.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import get_args

import jax
import numpy as np

from moe_embed_jax import triton_first
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.errors import UserError
from moe_embed_jax.interop.prompts import SYMMETRIC_TYPES
from moe_embed_jax.models.encoder import count_params

triton_first.before_torch()
try:
    import mteb
    from mteb.abstasks.task_metadata import TaskType
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise UserError(
        f"the adapter to MTEB needs mteb, which is not installed ({error}): pip install -e .[mteb]"
    ) from None

# Retrieval, reranking and instruction tasks say "query" or "document", and get what the model was
# trained on. The rest are documents: that side has seen texts of every length, and it is what MTEB
# takes for Nomic's models where their own table is silent.
PROMPTS = {
    "query": "query",
    "document": "document",
    **dict.fromkeys(SYMMETRIC_TYPES, "document"),
}


class MtebModel(AbsEncoder):
    """What `mteb.evaluate` takes (its `EncoderProtocol`); similarity is the cosine.

    `Embedder.encode` makes the embeddings, as everywhere in this package. All texts of a
    call are packed together: MTEB's `batch_size` only cuts its own data loader.

    Attributes:
      embedder: what embeds.
      dim: features that are kept; None: all.
      prompts: see `__init__`, complete.
      mteb_model_meta: sizes and hash of the model; what a folder of weights does not say (licence,
        languages, training data, date) is None. `revision` is the SHA-256 of the embedder's
        identity under every prompt of the table, so that results which MTEB keeps never belong to
        other weights, another tokenizer, other prompts or lengths; `dim` is in `experiment_kwargs`,
        which is part of the results' path.
    """

    def __init__(
        self,
        embedder: Embedder,
        name: str,
        prompts: Mapping[str, str | None] | None = None,
        dim: int | None = None,
    ):
        """
        Args:
          name: "OWNER/MODEL", under which MTEB files the results.
          prompts: changes to the table of prompts. A key is "query", "document", a task type of
            MTEB ("STS"), the name of a task, or a type or task and a side ("Reranking-query");
            the more specific one decides, in MTEB's order. A value is a prompt of
            `Embedder.encode`. Without a change: `PROMPTS`, and in its place what the model's own
            folder says for a task type.
          dim: keep the first `dim` features, then normalise again (Matryoshka).

        Raises:
          UserError: an unknown key or prompt, another width than the model can give, a name
            without an owner, a model without a tokenizer.
        """
        if name.count("/") != 1 or name.startswith("/") or name.endswith("/"):
            raise UserError(f"name={name!r}: MTEB files results under OWNER/MODEL")
        for key in prompts or {}:
            _check_key(key)
        own = {key: key for key in embedder.prompts if _kind(key) in get_args(TaskType)}
        self.embedder, self.dim = embedder, dim
        self.prompts: dict[str, str | None] = {**PROMPTS, **own, **(prompts or {})}
        for prompt in self.prompts.values():
            embedder.encode([], prompt=prompt, dim=dim)  # complains before any task is loaded
        self.mteb_model_meta = _model_meta(embedder, name, self.prompts, dim)

    def encode(
        self,
        inputs,
        *,
        task_metadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = True,
        precision: str | None = None,
    ) -> np.ndarray:
        """Embeddings of all texts, in order: float32 [N, dim or width], unit norm.

        Args:
          inputs: batches with a list of str under "text".
          task_metadata, prompt_type: decide the prompt, see `prompt_for`.
          hf_split, hf_subset, batch_size: MTEB passes them; they change nothing.
          precision: MTEB's word for quantised embeddings.

        Raises:
          UserError: a precision other than float32.
        """
        del hf_split, hf_subset, batch_size
        if precision not in (None, "float32"):
            raise UserError(f"precision={precision!r}: embeddings are float32, leave it out")
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = self.prompt_for(task_metadata, prompt_type)
        return self.embedder.encode(
            texts, prompt=prompt, dim=self.dim, show_progress=show_progress_bar
        )

    def prompt_for(self, task_metadata, prompt_type: PromptType | None) -> str | None:
        """The prompt of a task's texts; "document" where the table has nothing for its type."""
        key = get_prompt_name(self.prompts, task_metadata, prompt_type)
        return self.prompts[key or PromptType.document.value]


def _kind(key: str) -> str:
    """The task type or task of a key, without its side."""
    for side in PromptType:
        key = key.removesuffix(f"-{side.value}")
    return key


def _check_key(key: str) -> None:
    sides = [side.value for side in PromptType]
    kind = _kind(key)
    if key in sides or kind in get_args(TaskType):
        return
    try:
        mteb.get_task(kind)
    except KeyError:
        raise UserError(
            f"prompts[{key!r}]: choose {', '.join(sides)}, one of MTEB's task types "
            f"({', '.join(SYMMETRIC_TYPES)}, Retrieval, Reranking, ...) or tasks, or one of those "
            "with -query or -document behind it; a task of your own goes by its type"
        ) from None


def _model_meta(
    embedder: Embedder, name: str, prompts: Mapping[str, str | None], dim: int | None
) -> ModelMeta:
    identity = {key: embedder.identity(prompt) for key, prompt in prompts.items()}
    revision = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    model = embedder.model
    total, active = count_params(model)
    word_table = model.vocab_size * model.width
    return ModelMeta(
        loader=None,  # it is loaded already; MTEB cannot load it by name
        name=name,
        revision=revision,
        n_parameters=total,
        n_embedding_parameters=word_table,
        # As MTEB counts them: without the word table.
        n_active_parameters_override=active - word_table if model.num_moe_layers else None,
        memory_usage_mb=sum(leaf.nbytes for leaf in jax.tree.leaves(embedder.params)) / 2**20,
        max_tokens=max(embedder.max_lengths.values()),
        embed_dim=dim or embedder.width,
        experiment_kwargs={"embed_dim": dim} if dim else None,
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=any(embedder.prefix(prompt) for prompt in prompts.values()),
        framework=["JAX"],
        release_date=None,
        languages=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        training_datasets=None,
    )
