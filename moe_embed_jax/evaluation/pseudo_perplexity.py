"""How well a masked language model guesses held-out documents, per language.

Pseudo-perplexity (arXiv 1910.14659): exp of the mean loss of every token, masked while the model
sees the others. To mask one token at a time costs a forward pass per token. Here a pass masks every
eighth token, so that eight passes predict each token once, from seven eighths of the others.
Numbers of models with different tokenizers cannot be compared.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_embed_jax import storage
from moe_embed_jax.checksums import verify_checksums
from moe_embed_jax.data.masking import ordinary_ids
from moe_embed_jax.data.packing import fill_rows, pack
from moe_embed_jax.data.text_files import read_json, string_field
from moe_embed_jax.errors import UserError
from moe_embed_jax.losses.masked_lm import MaskedSums
from moe_embed_jax.mesh import BATCH_SPEC, batch_sharding
from moe_embed_jax.models.encoder import (
    EncoderConfig,
    encode_rows,
    encode_tokens,
    gather_embeddings,
)
from moe_embed_jax.models.heads import mlm_logits, predict_tokens
from moe_embed_jax.processes import to_devices, to_host
from moe_embed_jax.shapes import PADDING
from moe_embed_jax.sharding import rules_for, specs

PASSES = 8
ROW_LENGTH = 256  # at most; a document counts up to here
TOKENS = 512  # per language: documents are taken in order until they have this number
ROWS_PER_CALL = TOKENS * PASSES // ROW_LENGTH  # about what a language needs
AT_ONCE = 1024  # predictions with logits at a time


@dataclasses.dataclass
class MaskedModel:
    """An encoder with its language-model head, on a mesh. Every process makes the same calls."""

    model: EncoderConfig
    params: dict
    head: dict
    vocabulary: object
    mesh: jax.sharding.Mesh

    @property
    def row_length(self) -> int:
        return min(ROW_LENGTH, self.model.max_positions or ROW_LENGTH)

    def pseudo_perplexity(self, texts: list[str]) -> dict[str, float] | None:
        """{"perplexity", "accuracy", "tokens"} of about the first `TOKENS` tokens of these texts;
        None if no text has `PASSES` tokens."""
        sequences, tokens = [], 0
        for text in texts:
            (ids,) = self.vocabulary.encode_texts([text], self.row_length)
            if len(ids) - 2 >= PASSES:
                sequences.append(ids)
                tokens += len(ids) - 2
            if tokens >= TOKENS:
                break
        if not sequences:
            return None
        sums = MaskedSums(0.0, 0.0, 0.0)
        for rows in self._calls(sequences):
            arrays = [to_devices(array, batch_sharding(self.mesh)) for array in rows]
            with jax.set_mesh(self.mesh):
                found = _sums(self.model, self.params, self.head, *arrays)
            sums = jax.tree.map(lambda a, b: a + float(to_host(b)), sums, found)
        return {
            "perplexity": float(np.exp(sums.loss / max(sums.count, 1))),
            "accuracy": sums.correct / max(sums.count, 1),
            "tokens": int(sums.count),
        }

    def _calls(self, sequences: list[np.ndarray]):
        """Arrays of `_sums` for every device call: all calls have one shape."""
        ordinary = np.isin(np.arange(self.vocabulary.size), ordinary_ids(self.vocabulary))
        copies = [(ids, offset) for ids in sequences for offset in range(PASSES)]
        length = self.row_length
        packing = pack([len(ids) for ids, _ in copies], length, length)
        step = -(-ROWS_PER_CALL // self.mesh.size) * self.mesh.size
        rows = -(-packing.rows // step) * step
        token_RL, text_index_RL, position_RL = fill_rows(
            packing, [ids for ids, _ in copies], rows, length, self.vocabulary.pad_id
        )
        # Of a text of n >= PASSES tokens at most twice n / PASSES are masked.
        column_RP = np.zeros((rows, 2 * length // PASSES), np.int32)
        target_RP = np.full(column_RP.shape, PADDING, np.int32)
        used = np.zeros(rows, int)
        for (ids, offset), row, start in zip(copies, packing.row, packing.start, strict=True):
            masked = np.arange(1 + offset, len(ids) - 1, PASSES)
            masked = masked[ordinary[ids[masked]]]
            places = slice(used[row], used[row] + len(masked))
            column_RP[row, places], target_RP[row, places] = start + masked, ids[masked]
            token_RL[row, start + masked] = self.vocabulary.mask_id
            used[row] += len(masked)
        arrays = (token_RL, text_index_RL, position_RL, column_RP, target_RP)
        for first in range(0, rows, step):
            yield [array[first : first + step] for array in arrays]

    def fill_mask(self, sequences: list[np.ndarray], columns: list[int], best: int = 5):
        """The `best` most probable ids for a masked token of each sequence, and their
        probabilities: int and float [texts, best]."""
        length, count = self.row_length, len(sequences)
        rows = -(-count // self.mesh.size) * self.mesh.size
        packing = pack([len(ids) for ids in sequences], length, 1)
        masked = [ids.copy() for ids in sequences]
        for ids, column in zip(masked, columns, strict=True):
            ids[column] = self.vocabulary.mask_id
        arrays = fill_rows(packing, masked, rows, length, self.vocabulary.pad_id)
        column_R = np.zeros(rows, np.int32)
        column_R[packing.row] = columns
        arrays = [to_devices(array, batch_sharding(self.mesh)) for array in (*arrays, column_R)]
        with jax.set_mesh(self.mesh):
            found = _best(self.model, best, self.params, self.head, *arrays)
        probability_RN, id_RN = map(to_host, found)
        return id_RN[packing.row], probability_RN[packing.row]


@functools.partial(jax.jit, static_argnums=0)
def _sums(model, params, head, token_RL, text_index_RL, position_RL, column_RP, target_RP):
    def local(params, head, column_RP, target_RP, *rows):
        params = gather_embeddings(model, params)
        x_RLD, _ = encode_rows(model, params, *rows)
        sums = predict_tokens(model, AT_ONCE, params, head, x_RLD, column_RP, target_RP)
        return jax.tree.map(lambda leaf: leaf[None], sums)

    sums = jax.shard_map(
        local,
        in_specs=(specs(params, rules_for(model)), P(), *(BATCH_SPEC,) * 5),
        out_specs=BATCH_SPEC,
        check_vma=False,
    )(params, head, column_RP, target_RP, token_RL, text_index_RL, position_RL)
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), sums)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _best(model, best, params, head, token_RL, text_index_RL, position_RL, column_R):
    x_RLD, _ = encode_tokens(model, params, token_RL, text_index_RL, position_RL)
    x_RD = jnp.take_along_axis(x_RLD, column_R[:, None, None], axis=1)[:, 0]
    logits_RV = mlm_logits(model, head, params["embeddings"]["token"], x_RD)
    return jax.lax.top_k(jax.nn.softmax(logits_RV), best)


def load_documents(folder) -> dict[str, list[str]]:
    """{language: held-out documents}, sorted by language; documents of its sources alternate.

    Raises `UserError` when there are none, for a bad line and for a file that was changed.
    """
    folder = storage.path(folder)
    verify_checksums(folder)
    documents: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        by_source: dict[str, list[str]] = {}
        for where, entry in read_json(path):
            source, text = (string_field(entry, key, where) for key in ("source", "text"))
            by_source.setdefault(source, []).append(text)
        if not by_source:
            raise UserError(f"{path}: there is no document in this file")
        longest = max(map(len, by_source.values()))
        documents[path.name.removesuffix(".jsonl.gz")] = [
            texts[i] for i in range(longest) for texts in by_source.values() if i < len(texts)
        ]
    if not documents:
        raise UserError(f"{folder} holds no held-out documents: prepare the data again")
    return documents
