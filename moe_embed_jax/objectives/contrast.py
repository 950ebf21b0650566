"""What a contrastive loss is made of: its configuration, its temperature and its result.

Both forms of the loss, `reference.dense_infonce` and `infonce.infonce`, take these.
"""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from moe_embed_jax.errors import UserError

TERMS = ("q->d", "q->q", "d->d", "d->q")


@dataclasses.dataclass(frozen=True)
class ContrastConfig:
    """Keys of the contrastive loss; the defaults are the paper's.

    A pair i has a query q_i, its own document d_i and up to N hard negatives. Its negatives are two
    sets of texts, D_i among the documents and Q_i among the queries (`contents.py` says which).
    Scores s are cosines over the temperature. A term names the vector that scores and the texts
    that are scored: Z[q->d] = sum of exp s(q_i, d) over d in D_i, Z[d->q] = sum of exp s(d_i, q)
    over q in Q_i, and so on. With o = exp s(q_i, d_i) the loss of a pair is, for `partition`

    * "joint": `-log(o / (o + the sum of all terms))` (GTE, arXiv 2308.03281);
    * "separate": the mean of `-log(o / (o + Z[q->d] + Z[q->q]))` and
      `-log(o / (o + Z[d->q] + Z[d->d]))`, less the terms that are not listed, and less the second
      part if it has none; "q->d d->q" is the symmetric loss of CLIP.

    temperature: of the softmax; with `learn_temperature` the value at the start.
    learn_temperature: the caller's parameter `log_scale` (= -log temperature) is used instead,
      clipped so that the temperature stays in [temperature_min, temperature_max].
    terms: some of "q->d", "q->q", "d->d", "d->q", separated by blanks; "q->d" is always there.
    share_hard_negatives: hard negatives are negatives of every query of the batch (the reference
      code) or only of their own (the paper's equation 3).
    margin: a text that scores more than this above s(q_i, d_i), in cosine units, is taken for a
      false negative and left out (Qwen3-Embedding, arXiv 2506.05176, has 0.1); None: none is.
    dims: Matryoshka widths and weights, {"768": 1.0, "256": 1.0}: vectors are cut, then normalised,
      and the loss is the weighted sum over widths; None: the full width, weight 1.
    """

    temperature: float = 0.02
    learn_temperature: bool = False
    temperature_min: float = 0.01
    temperature_max: float = 1.0
    terms: str = "q->d"
    partition: str = "joint"
    share_hard_negatives: bool = True
    margin: float | None = None
    dims: dict[str, float] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise UserError(f"loss.temperature={self.temperature} must be above 0")
        if not 0 < self.temperature_min <= self.temperature_max < math.inf:
            raise UserError(
                f"loss.temperature_min={self.temperature_min} must be above 0 and at most "
                f"loss.temperature_max={self.temperature_max}"
            )
        if self.learn_temperature and not (
            self.temperature_min <= self.temperature <= self.temperature_max
        ):
            raise UserError(
                f"loss.temperature={self.temperature} must lie between loss.temperature_min="
                f"{self.temperature_min} and loss.temperature_max={self.temperature_max}"
            )
        terms = self.terms.split()
        if unknown := [term for term in terms if term not in TERMS]:
            raise UserError(f"loss.terms={self.terms!r}: {unknown[0]!r} is not one of {TERMS}")
        if "q->d" not in terms or len(set(terms)) < len(terms):
            raise UserError(f"loss.terms={self.terms!r} must have 'q->d', and each term once")
        if self.partition not in ("joint", "separate"):
            raise UserError(f"loss.partition={self.partition!r}: choose 'joint' or 'separate'")
        if self.margin is not None and not _is_number(self.margin, least=0.0):
            raise UserError(f"loss.margin={self.margin!r} must be a number of at least 0, or None")
        if self.dims is not None:
            _check_dims(self.dims)
            dims = {str(width): float(weight) for width, weight in dict(self.dims).items()}
            object.__setattr__(self, "dims", dims)  # as JSON keeps it

    def has(self, term: str) -> bool:
        return term in self.terms.split()

    def widths(self, full: int) -> list[tuple[int, float]]:
        """(width, weight), widest first; raises `UserError` for a width above `full`."""
        if self.dims is None:
            return [(full, 1.0)]
        widths = sorted(((int(k), weight) for k, weight in self.dims.items()), reverse=True)
        if widths[0][0] > full:
            raise UserError(f"loss.dims: {widths[0][0]} is wider than the embeddings ({full})")
        return widths


def _is_number(value, least: float) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and least <= value < math.inf


def _check_dims(dims) -> None:
    for width, weight in dict(dims).items():
        if not (str(width).isdecimal() and int(width) > 0 and _is_number(weight, least=0.0)):
            raise UserError(
                f"loss.dims: {width!r}: {weight!r} must be a width above 0 and a weight of at "
                'least 0, as in {"768": 1.0, "256": 1.0}'
            )
    if not any(dict(dims).values()):
        raise UserError(f"loss.dims={dims}: no width has a weight above 0")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ContrastResult:
    """float32 scalars.

    loss: mean over pairs, nats; with several widths the weighted sum over them.
    accuracy: share of queries whose own document scores above all their negative documents.
    masked: mean number of documents per query that were left out as negatives: copies, right
      answers, and those above the margin. Its own document and empty slots are not counted.
    loss_of_width: the unweighted loss of each width.

    accuracy and masked are those of the widest vectors.
    """

    loss: jax.Array
    accuracy: jax.Array
    masked: jax.Array
    loss_of_width: dict[int, jax.Array]


def initial_log_scale(config: ContrastConfig) -> jax.Array:
    return jnp.asarray(-math.log(config.temperature), jnp.float32)


def clip_log_scale(config: ContrastConfig, log_scale):
    """`log_scale` within its bounds; gradient 1 between them, both included, and 0 outside.

    The loss clips for itself. Clip the parameter too after each update: outside the bounds it has
    no gradient, and would stay there.
    """
    low, high = -math.log(config.temperature_max), -math.log(config.temperature_min)
    clipped = jax.lax.stop_gradient(jnp.clip(log_scale, low, high))
    # Not jnp.clip alone: its gradient at a bound is a half.
    return jnp.where(clipped == log_scale, log_scale, clipped)


def score_scale(config: ContrastConfig, log_scale):
    """1 / temperature, float32 scalar, fixed or learned."""
    if not config.learn_temperature:
        return jnp.asarray(1.0 / config.temperature, jnp.float32)
    if log_scale is None:
        raise UserError("loss.learn_temperature=True needs a parameter log_scale, and got none")
    return jnp.exp(clip_log_scale(config, log_scale.astype(jnp.float32)))


def unit(x_D):
    """Unit L2 norm over the last axis; a zero vector stays zero, with zero gradient."""
    square = jnp.sum(jnp.square(x_D), axis=-1, keepdims=True)
    return x_D * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def prepare(query_BD, document_BMD, valid_BM):
    """float32 vectors and a mask; nothing in an empty slot is ever read, in either direction."""
    B, D = query_BD.shape
    if document_BMD.ndim != 3 or (len(document_BMD), document_BMD.shape[2]) != (B, D):
        raise ValueError(f"documents {document_BMD.shape} must be [B, M, D], as queries are {B, D}")
    if valid_BM is None:
        valid_BM = jnp.ones(document_BMD.shape[:2], bool)
    valid_BM = valid_BM.astype(bool).at[:, 0].set(True)
    document_BMD = jnp.where(valid_BM[..., None], document_BMD.astype(jnp.float32), 0.0)
    return query_BD.astype(jnp.float32), document_BMD, valid_BM


def summarize(config: ContrastConfig, valid_BM, widths, parts) -> ContrastResult:
    """The result of a batch; `parts` has, for each of `widths`, the loss of every pair, its own
    score, and maximum and number of the scores of its negative documents."""
    B = len(valid_BM)
    if config.share_hard_negatives:
        others_B = jnp.full(B, jnp.sum(valid_BM) - 1)
    else:
        others_B = B - 1 + jnp.sum(valid_BM[:, 1:], axis=1)
    _, own_B, top_B, count_B = parts[0]
    losses = [jnp.mean(loss_B) for loss_B, _, _, _ in parts]
    return ContrastResult(
        loss=sum(weight * loss for (_, weight), loss in zip(widths, losses, strict=True)),
        accuracy=jnp.mean(jax.lax.stop_gradient(own_B > top_B).astype(jnp.float32)),
        masked=jnp.mean((others_B - count_B).astype(jnp.float32)),
        loss_of_width={width: loss for (width, _), loss in zip(widths, losses, strict=True)},
    )


def describe_negatives(config: ContrastConfig, batch_size: int, negatives: int) -> str:
    """In words what a query is compared with; `negatives` is the most hard negatives of a pair."""
    documents = f"the {batch_size - 1:,} other pairs' documents of the global batch"
    if negatives and config.share_hard_negatives:
        documents += (
            f" and up to {batch_size * negatives:,} hard negatives, {negatives:,} of its own and "
            "all other queries'"
        )
    elif negatives:
        documents += f" and up to {negatives:,} hard negatives of its own"
    left_out = "those with the content of its own document or query, and documents of equal queries"
    if config.margin is not None:
        left_out += f", and all that score over {config.margin:g} above its own document"
    sentence = f"each query against {documents}, each distinct one once, less {left_out}"
    extra = [term for term in config.terms.split() if term != "q->d"]
    if extra:
        sentence += (
            f"; also {', '.join(extra)} under the same rules (q query, d its document), "
            + {
                "joint": "in one denominator",
                "separate": "with one denominator for the query and one for its document",
            }[config.partition]
        )
    return sentence
