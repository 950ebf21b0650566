"""What an application imports: `Embedder.load(folder).encode(texts)`."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from tqdm import tqdm

from moe_embed_jax.compilation_cache import keep_programs
from moe_embed_jax.data.packing import fill_rows
from moe_embed_jax.errors import UserError
from moe_embed_jax.inference_batches import SLOTS, TOKENS_PER_CALL, Call, call_rows, plan_calls
from moe_embed_jax.mesh import batch_sharding, check_dtype, single_device_mesh
from moe_embed_jax.model_folder import PROMPTS, load_model
from moe_embed_jax.models.encoder import (
    EncoderConfig,
    encode_tokens,
    expert_choices,
    unstack_params,
)
from moe_embed_jax.models.pooling import pool_texts
from moe_embed_jax.processes import to_devices, to_host
from moe_embed_jax.shapes import PADDING
from moe_embed_jax.token_ids import checked_ids
from moe_embed_jax.tokenizers.truncation import Truncation, side_of
from moe_embed_jax.unstacked import Unstacked

PAD_ID = 1  # what fills empty slots; nothing reads it
# On a CPU calls are a quarter as large for models with fewer parameters in their blocks, so that
# activations stay in its caches: with 21 M (multilingual-e5-small) smaller calls won, with 283 M
# (nomic-embed-text-v2-moe) they lost, when a call copied all weights (int8 weights still are).
FEW_BLOCK_PARAMS = 64 << 20


class Embedder:
    """Texts in, unit-norm embeddings out, on one device or on a training run's mesh.

    On a mesh of several processes every process makes the same calls, with the same texts, and gets
    all of the result. Each tokenises its share of the texts.

    Attributes:
      prompts: name -> prefix, "query" and "document" among them.
      has_prompts: whether the model's folder names a prefix that is not empty.
      max_lengths: {"query": tokens, "document": tokens}; longer texts are truncated.
      truncation: how many texts and tokens were cut, of each side.
    """

    def __init__(
        self,
        model: EncoderConfig,
        params,
        vocabulary,
        max_lengths: Mapping[str, int],
        mesh,
        prompts: Mapping[str, str] = PROMPTS,
        has_prompts: bool = True,
    ):
        """`vocabulary`: None if the model came without one; then only ids can be encoded.

        Raises `UserError` on GPUs that cannot compute in the model's dtype.
        """
        check_dtype(model.dtype, mesh)
        self.model = model
        self.params = params
        self.vocabulary = vocabulary
        self.max_lengths = dict(max_lengths)
        self.mesh = mesh
        self.prompts = dict(prompts)
        self.has_prompts = has_prompts
        self.truncation = Truncation()

    @classmethod
    def load(
        cls,
        folder,
        step: int | None = None,
        mesh=None,
        weights: str = "float32",
        compilation_cache=None,
    ) -> "Embedder":
        """From any model folder: a training run's work directory (`step` None: its newest
        checkpoint), an imported model, or a published checkpoint as safetensors (the layout of
        nomic-embed-text-v2-moe, BERT, XLM-RoBERTa).

        weights: what matrices and word table are kept as on a CPU. "float32"; "bfloat16" for half
        of the memory, in which products are computed, too; "int8" for a quarter (models/
        int8_weight.py), computed in float32; "auto": bfloat16 where the processor multiplies it
        faster, which takes half a second to measure.
        compilation_cache: folder in which the process keeps compiled programs, for the next one to
        find (`keep_programs`). None: as JAX is set, by JAX_COMPILATION_CACHE_DIR for example.

        Raises `UserError` when the folder is not a model, naming what is missing; for other
        weights, and for bfloat16 and int8 on a mesh that is not one CPU device.
        """
        if compilation_cache is not None:
            keep_programs(compilation_cache)
        mesh = mesh or single_device_mesh()
        loaded = load_model(folder, mesh, step, weights)
        params = loaded.params
        if weights != "int8" and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu":
            params = unstack_params(params)
        return cls(
            loaded.model,
            params,
            loaded.vocabulary,
            loaded.max_lengths,
            mesh,
            loaded.prompts,
            loaded.has_prompts,
        )

    @property
    def width(self) -> int:
        return self.model.width

    def encode(
        self,
        texts,
        prompt: str | None = "query",
        dim: int | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
        on_truncation: str = "warn",
    ) -> np.ndarray:
        """Embeddings of `texts` in their order: float32 [len(texts), dim or width], unit norm.

        Args:
          texts: list of str; any lengths, may be empty. An empty text is embedded as its prompt.
          prompt: a name in `prompts` ("query", "document", ...), None (no prefix), or a prefix
            itself, which has a colon or a space ("query: ").
          dim: keep the first `dim` features, then normalise again (Matryoshka).
          batch_size: most texts in a device call; None: the token budget decides.
          on_truncation: of texts that are longer than `max_lengths`. "warn": one line on standard
            error, once for each side; `truncation` counts all. "error": `UserError` that names the
            first one, and nothing is embedded. "ignore": they are not counted, which saves
            tokenising them to their end.
        """
        width = self._width(dim)
        sequences = self.tokenize(texts, prompt, on_truncation)
        pooled = self.embed_sequences(sequences, None, batch_size, show_progress)
        return unit_norm(pooled[:, :width])

    def tokenize(self, texts, prompt: str | None, on_truncation: str = "warn") -> list[np.ndarray]:
        """Token ids (specials included) of the prompted texts, truncated at their side's length."""
        if isinstance(texts, str):
            raise UserError("encode takes a list of texts, not one str: use encode([text])")
        if self.vocabulary is None:
            raise UserError(
                "the model's folder has no tokenizer (sentencepiece.bpe.model or tokenizer.json): "
                "put one there, or tokenise yourself and use encode_ids"
            )
        prefix = self.prefix(prompt)
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{i}] is a {type(text).__name__}, not a str")
        return self.truncation.tokenize(
            self.vocabulary,
            [prefix + text for text in texts],
            side_of(prompt),
            self._max_length(prompt),
            self.mesh,
            on_truncation,
        )

    def identity(self, prompt: str | None) -> dict:
        """What decides the embeddings of `encode(texts, prompt)`, for vectors that are kept.

        "hash": SHA-256 of architecture, weights and tokenizer; "prefix"; "max_length" in tokens.
        """
        return {"hash": self._hash, **self.text_form(prompt)}

    def text_form(self, prompt: str | None) -> dict:
        """What becomes of a text: "prefix" before it, cut at "max_length" tokens."""
        return {"prefix": self.prefix(prompt), "max_length": self._max_length(prompt)}

    @functools.cached_property
    def _hash(self) -> str:
        fields = {
            "model": dataclasses.asdict(self.model),
            "vocabulary": self.vocabulary and self.vocabulary.content_hash,
        }
        sha256 = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        leaves = jax.tree_util.tree_leaves_with_path(
            self.params, is_leaf=lambda node: isinstance(node, Unstacked)
        )
        for path, leaf in leaves:
            sha256.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
            for array in leaf.arrays() if isinstance(leaf, Unstacked) else [leaf]:
                sha256.update(np.ascontiguousarray(to_host(array)).view(np.uint8))
        return sha256.hexdigest()

    @functools.cached_property
    def _tokens_per_call(self) -> int:
        blocks = {name: self.params[name] for name in self.model.parts}
        count = sum(leaf.size for leaf in jax.tree.leaves(blocks))
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return TOKENS_PER_CALL // 4 if on_cpu and count < FEW_BLOCK_PARAMS else TOKENS_PER_CALL

    def _calls(self, lengths, batch_size: int | None = None) -> Iterator[Call]:
        return plan_calls(lengths, self.mesh.size, batch_size, self._tokens_per_call)

    def _max_length(self, prompt: str | None) -> int:
        return self.max_lengths[side_of(prompt)]

    def prefix(self, prompt: str | None) -> str:
        """What stands before each text for `prompt`, see `encode`."""
        if prompt is None:
            return ""
        if prompt in self.prompts:
            return self.prompts[prompt]
        if ":" in prompt or " " in prompt:
            return prompt
        raise UserError(
            f"prompt={prompt!r}: choose one of {', '.join(sorted(self.prompts))}, None, or a "
            "prefix with a colon or a space"
        )

    def _width(self, dim: int | None) -> int:
        width = self.width if dim is None else dim
        if not 1 <= width <= self.width:
            raise UserError(f"dim={dim} must be between 1 and the model's width {self.width}")
        return width

    def encode_ids(
        self, input_ids, attention_mask, dim: int | None = None, normalize: bool = True
    ) -> np.ndarray:
        """Embeddings of texts that the caller tokenised: float32 [batch, dim or width].

        The mean over the tokens with mask 1 (their first or last one, if the model pools so), cut
        to `dim`, then normalised. A row without tokens gives zeros.

        Args:
          input_ids, attention_mask: integers [batch, length]; a token's position is its column.

        Raises:
          UserError: other shapes, a mask that is not 0 or 1, ids outside the word table, more
            columns than the model has positions.
        """
        width = self._width(dim)
        ids_BL, mask_BL = checked_ids(input_ids, attention_mask, self.model)
        sequences = [ids[mask] for ids, mask in zip(ids_BL, mask_BL, strict=True)]
        positions = [np.flatnonzero(mask).astype(np.int32) for mask in mask_BL]
        pooled = self.embed_sequences(sequences, positions)[:, :width]
        return unit_norm(pooled) if normalize else pooled

    def hidden_states(self, input_ids, attention_mask) -> np.ndarray:
        """Last hidden states: float32 [batch, length, width], zeros where the mask is 0.

        Arguments and errors as in `encode_ids`.
        """
        ids_BL, mask_BL = checked_ids(input_ids, attention_mask, self.model)
        batch, length = ids_BL.shape
        result = np.zeros((batch, length, self.width), np.float32)
        # A few shapes only: lengths in powers of two, rows by the token budget.
        padded = max(16, 1 << (length - 1).bit_length()) if length else 16
        position_L = np.arange(padded, dtype=np.int32)
        if self.model.max_positions:
            position_L = np.minimum(position_L, self.model.max_positions - 1)
        begin = 0
        for rows in call_rows(batch, padded, self.mesh.size, self._tokens_per_call):
            part = slice(begin, min(begin + rows, batch))
            count, begin = part.stop - part.start, part.stop
            position_RL = np.broadcast_to(position_L, (rows, padded))
            token_RL = np.full((rows, padded), PAD_ID, np.int32)
            text_index_RL = np.full((rows, padded), PADDING, np.int32)
            token_RL[:count, :length] = np.where(mask_BL[part], ids_BL[part], PAD_ID)
            text_index_RL[:count, :length] = np.where(mask_BL[part], 0, PADDING)
            x_RLD = self._call(_encode_rows, token_RL, text_index_RL, position_RL)
            result[part] = to_host(x_RLD)[:count, :length]
        return result * mask_BL[..., None]

    def embed_sequences(
        self, sequences, positions=None, batch_size=None, show_progress=False
    ) -> np.ndarray:
        """Pooled, not normalised embeddings of token id sequences: float32 [n, D].

        `positions`: of each token; None counts from 0. An empty sequence gives zeros.
        """
        pooled = np.zeros((len(sequences), self.width), np.float32)
        lengths = np.array([len(s) for s in sequences], np.int64)
        bar = tqdm(
            total=len(sequences),
            desc="embedding",
            unit=" texts",
            disable=not show_progress,
            leave=False,
        )

        def collect(call, pooled_RSD):
            slot = call.packing.slot(SLOTS)
            pooled[call.members] = to_host(pooled_RSD).reshape(-1, self.width)[slot]
            bar.update(len(call.members))

        pending = None
        for call in self._calls(lengths, batch_size):
            pooled_RSD, _ = self._run(call, sequences, positions)
            # Fetch one call behind, so that packing overlaps with the device.
            if pending is not None:
                collect(*pending)
            pending = call, pooled_RSD
        if pending is not None:
            collect(*pending)
        bar.close()
        return pooled

    def expert_shares(self, texts, prompt: str | None = "document") -> np.ndarray:
        """Share of the token assignments that each expert gets: float32 [MoE layers, E]."""
        self.check_experts()
        sequences = self.tokenize(texts, prompt)
        lengths = np.array([len(s) for s in sequences], np.int64)
        assigned_YE = np.zeros((self.model.num_moe_layers, self.model.num_experts), np.float32)
        for call in self._calls(lengths):
            _, statistics = self._run(call, sequences)
            assigned_YE += to_host(statistics.assignments_E)
        return assigned_YE / np.maximum(assigned_YE.sum(-1, keepdims=True), 1.0)

    def expert_choices(self, texts, prompt: str | None = "document") -> list[np.ndarray]:
        """Of each text the experts of its tokens: int16 [MoE layers, tokens, K], best first.

        `tokenize(texts, prompt)` gives the tokens. All processes call this together.
        """
        self.check_experts()
        sequences = self.tokenize(texts, prompt)
        shape = self.model.num_moe_layers, 0, self.model.experts_per_token
        chosen = [np.zeros(shape, np.int16)] * len(sequences)
        for call in self._calls([len(s) for s in sequences]):
            arrays = self._rows(call, sequences)
            expert_YRLK = to_host(self._call(_choose_rows, *arrays)).astype(np.int16)
            places = zip(call.members, call.packing.row, call.packing.start, strict=True)
            for text, row, start in places:
                span = slice(start, start + len(sequences[text]))
                chosen[text] = expert_YRLK[:, row, span].copy()
        return chosen

    def check_experts(self) -> None:
        """Raises `UserError` for a model without experts."""
        if not self.model.num_moe_layers:
            raise UserError("this model has no experts (moe_every=0)")

    def _run(self, call: Call, sequences, positions=None):
        """(pooled_RSD, routing statistics) of one device call."""
        return self._call(_pool_rows, *self._rows(call, sequences, positions))

    def _rows(self, call: Call, sequences, positions=None):
        """token_RL, text_index_RL, position_RL of one device call."""
        sequences = [sequences[i] for i in call.members]
        positions = None if positions is None else [positions[i] for i in call.members]
        return fill_rows(call.packing, sequences, call.rows, call.row_length, PAD_ID, positions)

    def _call(self, function, *arrays):
        arrays = [to_devices(array, batch_sharding(self.mesh)) for array in arrays]
        with jax.set_mesh(self.mesh):
            return function(self.model, self.params, *arrays)


def unit_norm(x_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnums=0)
def _pool_rows(model: EncoderConfig, params, token_RL, text_index_RL, position_RL):
    x_RLD, statistics = encode_tokens(model, params, token_RL, text_index_RL, position_RL)
    return pool_texts(model.pooling, x_RLD, text_index_RL, SLOTS), statistics


_choose_rows = jax.jit(expert_choices, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _encode_rows(model: EncoderConfig, params, token_RL, text_index_RL, position_RL):
    return encode_tokens(model, params, token_RL, text_index_RL, position_RL)[0]
