"""InfoNCE over global in-batch negatives, streamed (paper section 4 and equation 3).

`contents.py` says what a negative is, `contrast.py` what the loss is made of, `reference.py` the
same with all logits in memory. Here the sums over negatives come from `streaming.py`, and the rest
is plain arithmetic on a handful of numbers per pair.
"""

import jax
import jax.numpy as jnp

from moe_embed_jax.losses.contents import Contents, compare_contents
from moe_embed_jax.losses.contrast import (
    ContrastConfig,
    ContrastResult,
    over_widths,
    prepare,
    score_scale,
)
from moe_embed_jax.losses.ring import TILE
from moe_embed_jax.losses.streaming import streamed_log_sum_exp


def infonce(
    config: ContrastConfig,
    query_BD,
    document_BMD,
    query_id_B2,
    document_id_BM2,
    valid_BM=None,
    log_scale=None,
    in_batch_B=None,
    *,
    tile: int = TILE,
) -> ContrastResult:
    """The contrastive loss of a batch of B pairs, with a gradient to vectors and `log_scale`.

    Args:
      query_BD: pooled vectors, of any length: they are normalised here, once per Matryoshka width.
      document_BMD: the own document of each query in slot 0, then its N = M - 1 hard negatives.
      query_id_B2, document_id_BM2: 64-bit content ids as two int32.
      valid_BM: which slots are filled, default all; slot 0 always is.
      log_scale: scalar, only with `config.learn_temperature`, see `initial_log_scale`.
      in_batch_B: bool, queries that are compared with the texts of other pairs, default all; the
        others have no negatives but their own hard ones.
      tile: most texts per side that are scored at once on a device.

    Leading axes are sharded over the mesh in context, whose size must divide B.
    """
    query_BD, document_BMD, valid_BM = prepare(query_BD, document_BMD, valid_BM)
    scale = score_scale(config, log_scale)
    own_hard = in_batch_B is not None or not config.margin_hard_negatives
    contents = compare_contents(
        query_id_B2, document_id_BM2, valid_BM, config.share_hard_negatives, own_hard
    )

    def one_width(q_BD, d_BMD):
        return _one_width(config, scale, q_BD, d_BMD, contents, in_batch_B, tile)

    first_of = contents.queries.counts[:, 0], contents.documents.counts[:, 0]
    return over_widths(config, query_BD, document_BMD, valid_BM, one_width, first_of)


def _one_width(
    config: ContrastConfig, scale, q_BD, d_BMD, contents: Contents, in_batch_B, tile: int
):
    """Loss, own score, and maximum and number of the negative documents' scores, all [B]."""
    d_BD = d_BMD[:, 0]
    own_B = scale * jnp.sum(q_BD * d_BD, axis=-1)
    limit_B = jnp.full_like(own_B, jnp.inf)
    if config.margin is not None:
        limit_B = jax.lax.stop_gradient(own_B + config.margin * scale)

    # What the streamed sums leave out: they know no pairs, so a pair's own hard negatives that are
    # to stay are added afterwards.
    stream_limit_B = limit_B
    if in_batch_B is not None:
        stream_limit_B = jnp.where(in_batch_B, limit_B, -jnp.inf)
    own_negative_BN = contents.own_negative_BN
    if contents.hard_BN is not None:
        shared = contents.hard_BN.shape[1] - own_negative_BN.shape[1]
        own_negative_BN = jnp.pad(own_negative_BN, ((0, 0), (shared, 0)))

    def against_documents(x_BD):
        """Summands of the denominator [B, ...], their maximum and number."""
        lse_B, top_B, count_B = streamed_log_sum_exp(
            tile,
            False,
            scale * x_BD,
            contents.queries.own(),
            stream_limit_B,
            d_BMD[:, : contents.documents.number.shape[1]],
            contents.documents,
            contents.partner_O,
        )
        hard_BND = d_BMD[:, d_BMD.shape[1] - own_negative_BN.shape[1] :]
        hard_BN = scale * jnp.einsum("BD,BND->BN", x_BD, hard_BND, precision="highest")
        below_BN = hard_BN <= stream_limit_B[:, None]
        counts_BN = own_negative_BN & below_BN
        if contents.hard_BN is not None:
            stays_BN = contents.hard_BN & ~below_BN
            if config.margin_hard_negatives:
                stays_BN &= hard_BN <= limit_B[:, None]
            counts_BN |= stays_BN
        hard_BN = jnp.where(counts_BN, hard_BN, -jnp.inf)
        top_B = jnp.maximum(top_B, jnp.max(hard_BN, axis=1, initial=-jnp.inf))
        summands_BK = jnp.concatenate([lse_B[:, None], hard_BN], axis=1)
        return summands_BK, top_B, count_B + counts_BN.sum(axis=1)

    def against_queries(x_BD):
        lse_B, _, _ = streamed_log_sum_exp(
            tile,
            False,
            scale * x_BD,
            contents.documents.own(),
            stream_limit_B,
            q_BD[:, None],
            contents.queries,
            contents.partner_O,
        )
        return lse_B[:, None]

    right_B = own_B
    if config.positives == "all":
        texts = d_BMD[:, :1], contents.documents.own(column=True), contents.partner_O
        anchors = scale * q_BD, contents.queries.own(), jnp.full_like(own_B, jnp.inf)
        right_B, _, _ = streamed_log_sum_exp(tile, True, *anchors, *texts)
        if in_batch_B is not None:
            right_B = jnp.where(in_batch_B, right_B, own_B)
    from_documents_BK, top_B, count_B = against_documents(q_BD)
    by_query = [from_documents_BK]
    if config.has("q->q"):
        by_query.append(against_queries(q_BD))
    by_document = []
    if config.has("d->q"):
        by_document.append(against_queries(d_BD))
    if config.has("d->d"):
        by_document.append(against_documents(d_BD)[0])

    def negative_log_likelihood(summands, right_B):
        """-log(o / (o + all summands)) with o = exp(right_B), taken relative to o: exactly 0
        without any negative, and never NaN."""
        relative_BK = jnp.concatenate(summands, axis=1) - right_B[:, None]
        return jax.nn.logsumexp(jnp.pad(relative_BK, ((0, 0), (1, 0))), axis=1)

    if config.partition == "joint" or not by_document:
        loss_B = negative_log_likelihood(by_query + by_document, right_B)
    else:
        loss_B = negative_log_likelihood(by_query, right_B)
        loss_B = (loss_B + negative_log_likelihood(by_document, own_B)) / 2
    return loss_B, own_B, top_B, count_B
