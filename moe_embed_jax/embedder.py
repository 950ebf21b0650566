"""What an application imports: `Embedder.load(folder).encode(texts)`."""

import functools
import json
import pathlib

import jax
import numpy as np
from tqdm import tqdm

from moe_embed_jax import config as config_page
from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.data.packing import fill_rows, pack
from moe_embed_jax.data.vocabulary import DOCUMENT_PREFIX, QUERY_PREFIX, Vocabulary
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import batch_sharding, single_device_mesh
from moe_embed_jax.models.encoder import EncoderConfig, encode_tokens, init_params
from moe_embed_jax.models.pooling import mean_pool
from moe_embed_jax.sharding import rules_for, with_shardings

PROMPTS = {"query": QUERY_PREFIX, "document": DOCUMENT_PREFIX, None: ""}
TOKENS_PER_CALL = 8_192  # slots per device and call; larger ones fall out of a CPU cache
SLOTS = 32  # most texts that share a row
MODEL_CARD = "config.json"
VOCABULARY_FILE = "sentencepiece.model"
CHECKPOINTS = "checkpoints"


class Embedder:
    """Texts in, unit-norm embeddings out, on one device or on a training run's mesh."""

    def __init__(self, model: EncoderConfig, params, vocabulary: Vocabulary, max_lengths, mesh):
        """`max_lengths`: {"query": tokens, "document": tokens}; longer texts are truncated."""
        self.model = model
        self.params = params
        self.vocabulary = vocabulary
        self.max_lengths = max_lengths
        self.mesh = mesh

    @classmethod
    def load(cls, folder, step: int | None = None, mesh=None) -> "Embedder":
        """From the work directory of a training run; `step` None: the newest checkpoint.

        Raises `UserError` when the folder is not a model, naming what is missing.
        """
        folder = pathlib.Path(folder)
        card_path = folder / MODEL_CARD
        if not card_path.is_file():
            raise UserError(f"{folder} is not a model folder: {MODEL_CARD} is missing")
        card = json.loads(card_path.read_text())
        mesh = mesh or single_device_mesh()
        model = config_page.build(EncoderConfig, card["model"], "model")
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        abstract = with_shardings(shapes, rules_for(model), mesh)
        if not (folder / CHECKPOINTS).is_dir():
            raise UserError(f"{folder} holds no checkpoint yet: {CHECKPOINTS}/ is missing")
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        try:
            step = checkpoints.latest_step() if step is None else step
            if step is None:
                raise UserError(f"{folder / CHECKPOINTS} holds no finished checkpoint yet")
            params, _ = checkpoints.restore(step, abstract)
        finally:
            checkpoints.close()
        vocabulary = Vocabulary.load(folder / VOCABULARY_FILE)
        lengths = {
            "query": card["data"]["query_length"],
            "document": card["data"]["document_length"],
        }
        return cls(model, params, vocabulary, lengths, mesh)

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
    ) -> np.ndarray:
        """Embeddings of `texts` in their order: float32 [len(texts), dim or width], unit norm.

        Args:
          texts: list of str; any lengths, may be empty. An empty text is embedded as its prompt.
          prompt: "query", "document" or None (no prefix).
          dim: keep the first `dim` features, then normalise again (Matryoshka).
          batch_size: texts per device call at most; None lets the token budget decide.
        """
        if isinstance(texts, str):
            raise UserError("encode takes a list of texts, not one str: use encode([text])")
        if prompt not in PROMPTS:
            raise UserError(f"prompt={prompt!r}: choose 'query', 'document' or None")
        width = self.width if dim is None else dim
        if not 1 <= width <= self.width:
            raise UserError(f"dim={dim} must be between 1 and the model's width {self.width}")
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{i}] is a {type(text).__name__}, not a str")
        limit = self.max_lengths[prompt or "document"]
        prefix = PROMPTS[prompt]
        sequences = self.vocabulary.encode_texts([prefix + text for text in texts], limit)
        embeddings = self.embed_sequences(sequences, batch_size, show_progress)[:, :width]
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        return embeddings / np.maximum(norms, 1e-12)

    def embed_sequences(self, sequences, batch_size=None, show_progress=False) -> np.ndarray:
        """Mean-pooled, not normalised embeddings of token id sequences: float32 [n, D]."""
        pooled = np.zeros((len(sequences), self.width), np.float32)
        lengths = np.array([len(s) for s in sequences], np.int64)
        bar = tqdm(
            total=len(sequences),
            desc="embedding",
            unit=" texts",
            disable=not show_progress,
            leave=False,
        )

        def collect(members, slot, pooled_RSD, _):
            pooled[members] = np.asarray(pooled_RSD).reshape(-1, self.width)[slot]
            bar.update(len(members))

        pending = None
        for members, row_length in _calls(lengths, batch_size, self.mesh.size):
            call = (members, *self._run([sequences[i] for i in members], row_length))
            # Fetch one call behind, so that packing overlaps with the device.
            if pending is not None:
                collect(*pending)
            pending = call
        if pending is not None:
            collect(*pending)
        bar.close()
        return pooled

    def expert_shares(self, texts, prompt: str | None = "document") -> np.ndarray:
        """Share of the token assignments that each expert gets: float32 [MoE layers, E]."""
        if not self.model.moe_every:
            raise UserError("this model has no experts (moe_every=0)")
        texts = [PROMPTS[prompt] + text for text in texts]
        sequences = self.vocabulary.encode_texts(texts, self.max_lengths[prompt or "document"])
        lengths = np.array([len(s) for s in sequences], np.int64)
        assigned_ME = np.zeros((self.model.num_moe_layers, self.model.num_experts), np.float32)
        for members, row_length in _calls(lengths, None, self.mesh.size):
            *_, statistics = self._run([sequences[i] for i in members], row_length)
            assigned_ME += np.asarray(statistics.assignments_E)
        return assigned_ME / np.maximum(assigned_ME.sum(-1, keepdims=True), 1.0)

    def _run(self, sequences, row_length: int):
        """One device call: slot of each text, pooled_RSD and routing statistics (device arrays)."""
        packing = pack([len(s) for s in sequences], row_length, SLOTS)
        rows = _round_rows(packing.rows, row_length, self.mesh.size)
        arrays = fill_rows(packing, sequences, rows, row_length, self.vocabulary.pad_id)
        arrays = [jax.device_put(array, batch_sharding(self.mesh)) for array in arrays]
        with jax.set_mesh(self.mesh):
            return packing.slot(SLOTS), *_pool_rows(self.model, self.params, *arrays)


@functools.partial(jax.jit, static_argnums=0)
def _pool_rows(model: EncoderConfig, params, token_RL, text_index_RL, position_RL):
    x_RLD, statistics = encode_tokens(model, params, token_RL, text_index_RL, position_RL)
    return mean_pool(x_RLD, text_index_RL, SLOTS), statistics


def _row_length(length: int) -> int:
    """64, 128, 256, ...: twice the text at least, so that rows fill well, but no more, because
    attention costs what the row is long."""
    return max(64, 1 << (2 * length - 1).bit_length())


def _round_rows(rows: int, row_length: int, devices: int) -> int:
    """The full call for big inputs, else 1, 8, 64, ... rows a device: few shapes, because a
    compilation costs more than many half-empty calls."""
    full = max(TOKENS_PER_CALL // row_length, 1) * devices
    size = devices
    while size < rows and size < full:
        size *= 8
    return max(min(size, full), rows)


def _calls(lengths, batch_size: int | None, devices: int):
    """Splits texts, shortest first, into calls of at most the token budget (and `batch_size`)."""
    order = np.argsort(lengths, kind="stable")
    begin = 0
    while begin < order.size:
        budget = TOKENS_PER_CALL * devices
        end, used = begin, 0
        row_length = _row_length(int(lengths[order[begin]]))
        while end < order.size and (batch_size is None or end - begin < batch_size):
            length = int(lengths[order[end]])
            used += length
            # 0.9: packing leaves gaps; the rows of a call must stay within the full shape.
            if end > begin and (_row_length(length) != row_length or used > 0.9 * budget):
                break
            end += 1
        yield order[begin:end], row_length
        begin = end
