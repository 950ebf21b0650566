"""What a contrastive loss is made of: its configuration, its temperature and its result.

Both forms of the loss, `reference.dense_infonce` and `infonce.infonce`, take these.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_embed_jax.errors import UserError
from moe_embed_jax.losses.contrast_config import FLOAT32, ContrastConfig
from moe_embed_jax.losses.quantisation import as_stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ContrastResult:
    """float32 scalars.

    loss: mean over pairs, nats; with several widths or forms the weighted sum over them.
    accuracy: share of queries whose own document scores above all their negative documents.
    masked: mean number of documents per query that were left out as negatives: copies, right
      answers, and those above the margin. Its own document and empty slots are not counted.
    loss_of: the unweighted loss of each width and form: "256", "256_int8".
    spread: the spread-out regulariser, unweighted; with several widths the weighted sum. 0 where it
      is off.

    accuracy and masked are those of the widest vectors in the first form.
    """

    loss: jax.Array
    accuracy: jax.Array
    masked: jax.Array
    loss_of: dict[str, jax.Array]
    spread: jax.Array


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


def spread_of(first_B, x_BD):
    """Mean of (x_i . x_j)^2 over ordered pairs i != j of those texts that are the `first_B` with
    their content; 0 where there is one.

    With G the sum of x x^T the sum of all squares is G's squared norm, so no B x B array and no
    exchange of vectors is needed: every device sums over its own texts, D x D numbers are added up.
    """
    x_BD = jnp.where(first_B[:, None], x_BD, 0.0)
    gram_DD = jnp.einsum("BD,BE->DE", x_BD, x_BD, precision="highest")
    own = jnp.sum(jnp.square(jnp.sum(jnp.square(x_BD), axis=1)))  # i = j
    texts = jnp.sum(first_B.astype(jnp.float32))
    return (jnp.sum(jnp.square(gram_DD)) - own) / jnp.maximum(texts * (texts - 1), 1.0)


def over_widths(
    config: ContrastConfig, query_BD, document_BMD, valid_BM, one_width, first_of
) -> ContrastResult:
    """The result of a batch from its vectors, of any length, cut to each Matryoshka width, in each
    form of an index.

    Args:
      first_of: bool [B] of the queries and of the own documents, the first with their content.
      one_width: (q_BD, d_BMD), as they are compared -> the loss of every pair, the score of its own
        document, and maximum and number of the scores of its negative documents, all [B].
    """
    spread = jnp.zeros((), jnp.float32)
    parts, weights = {}, []
    for width, weight in config.widths(query_BD.shape[-1]):
        q_BD, d_BMD = unit(query_BD[:, :width]), unit(document_BMD[..., :width])
        for form, share in config.forms():
            name = str(width) if form == FLOAT32 else f"{width}_{form}"
            parts[name] = one_width(*as_stored(form, q_BD, d_BMD, valid_BM))
            weights.append(weight * share)
        if config.spread:
            sides = zip(first_of, (q_BD, d_BMD[:, 0]), strict=True)
            spread += weight * sum(spread_of(first_B, x_BD) for first_B, x_BD in sides)
    B = len(valid_BM)
    if config.share_hard_negatives:
        others_B = jnp.full(B, jnp.sum(valid_BM) - 1)
    else:
        others_B = B - 1 + jnp.sum(valid_BM[:, 1:], axis=1)
    _, own_B, top_B, count_B = next(iter(parts.values()))
    losses = {name: jnp.mean(loss_B) for name, (loss_B, *_) in parts.items()}
    return ContrastResult(
        loss=sum(weight * loss for weight, loss in zip(weights, losses.values(), strict=True)),
        accuracy=jnp.mean(jax.lax.stop_gradient(own_B > top_B).astype(jnp.float32)),
        masked=jnp.mean((others_B - count_B).astype(jnp.float32)),
        loss_of=losses,
        spread=spread,
    )


def describe_negatives(config: ContrastConfig, batch_size: int, negatives: int) -> str:
    """In words what a query is compared with; `negatives` is the most hard negatives of a pair."""
    compared = f"the {batch_size - 1:,} other documents of the global batch"
    if negatives and config.share_hard_negatives:
        compared += (
            f" and up to {batch_size * negatives:,} hard negatives, {negatives:,} of its own and "
            "the rest of other queries"
        )
    elif negatives:
        compared += f" and up to {negatives:,} hard negatives of its own"
    masked = "Copies of its own document, copies of the query, and documents of identical queries"
    sentences = [
        f"Each query is compared with {compared}. Duplicates count once.",
        f"{masked} are masked.",
    ]
    if config.positives == "all":
        sentences.append("All right answers in the batch stand together against the negatives.")
    if config.hard_negatives_only:
        sentences.append(
            f"Queries of {', '.join(config.hard_negatives_only.split())} are compared with their "
            "own hard negatives alone."
        )
    if config.margin is not None:
        spared = "" if config.margin_hard_negatives else ", but its own hard negatives stay"
        sentences.append(
            f"Documents that score more than {config.margin:g} above its own document are masked"
            f"{spared}."
        )
    extra = [term for term in config.terms.split() if term != "q->d"]
    if extra:
        denominators = {
            "joint": "one denominator",
            "separate": "one denominator for the query and one for its document",
        }
        sentences.append(
            f"The terms {', '.join(extra)} (q query, d its document) follow the same rules, with "
            f"{denominators[config.partition]}."
        )
    return " ".join(sentences)
