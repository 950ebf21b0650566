"""The contrastive loss with all its logits in memory: what the streamed form must equal.

Content ids are compared text by text, so this costs O(Z^2) memory in the number of documents; it
is meant to be read, and to test `infonce.infonce` against.
"""

import jax
import jax.numpy as jnp

from moe_embed_jax.losses.contrast import (
    ContrastConfig,
    ContrastResult,
    over_widths,
    prepare,
    score_scale,
)


def same_content(a_A2, b_Z2):
    """[A, Z] bool: equal 64-bit content ids."""
    return jnp.all(a_A2[:, None, :] == b_Z2[None, :, :], axis=-1)


def exists(a_AK, b_KZ):
    """[A, Z] bool: some k with a[a, k] and b[k, z]."""
    return jnp.matmul(a_AK.astype(jnp.float32), b_KZ.astype(jnp.float32)) > 0


def negative_documents(query_id_B2, document_id_BM2, valid_BM, share_hard_negatives: bool):
    """[B, Z] bool: document z is a negative of pair i (rules: `contents.py`)."""
    B, M = valid_BM.shape
    document_id_Z2 = document_id_BM2.reshape(B * M, 2)
    pair_Z, slot_Z = jnp.divmod(jnp.arange(B * M), M)
    own_BZ = jnp.arange(B)[:, None] == pair_Z[None, :]
    offered_BZ = valid_BM.reshape(-1) & ((slot_Z == 0) | own_BZ | share_hard_negatives)

    order_Z = slot_Z * B + pair_Z
    same_ZZ = same_content(document_id_Z2, document_id_Z2)
    copy_BZ = exists(offered_BZ, same_ZZ & (order_Z[:, None] < order_Z[None, :]))

    same_query_BB = same_content(query_id_B2, query_id_B2)
    right_answer_BZ = exists(same_query_BB, same_content(document_id_BM2[:, 0], document_id_Z2))
    return offered_BZ & ~copy_BZ & ~right_answer_BZ & ~same_content(query_id_B2, document_id_Z2)


def negative_queries(query_id_B2, document_id_B2):
    """[B, B] bool: query j is a negative of pair i; `document_id_B2` of the own documents."""
    same_query_BB = same_content(query_id_B2, query_id_B2)
    copy_B = jnp.any(jnp.triu(same_query_BB, k=1), axis=0)  # of an earlier query
    same_document_BB = same_content(document_id_B2, document_id_B2)
    asks_for_BB = exists(same_document_BB, same_query_BB)
    return ~copy_B & ~asks_for_BB & ~same_content(document_id_B2, query_id_B2)


def dense_infonce(
    config: ContrastConfig,
    query_BD,
    document_BMD,
    query_id_B2,
    document_id_BM2,
    valid_BM=None,
    log_scale=None,
    in_batch_B=None,
) -> ContrastResult:
    """Arguments and result of `infonce.infonce`; needs no mesh."""
    query_BD, document_BMD, valid_BM = prepare(query_BD, document_BMD, valid_BM)
    scale = score_scale(config, log_scale)
    documents_BZ = negative_documents(
        query_id_B2, document_id_BM2, valid_BM, config.share_hard_negatives
    )
    queries_BB = negative_queries(query_id_B2, document_id_BM2[:, 0])
    hard_BZ = own_hard_negatives(query_id_B2, document_id_BM2, valid_BM)

    texts = documents_BZ, queries_BB, hard_BZ

    def one_width(q_BD, d_BMD):
        return _one_width(config, scale, q_BD, d_BMD, *texts, in_batch_B, right_BB)

    first_of = [
        ~jnp.any(jnp.triu(same_content(ids_B2, ids_B2), k=1), axis=0)
        for ids_B2 in (query_id_B2, document_id_BM2[:, 0])
    ]
    same_document_BB = same_content(document_id_BM2[:, 0], document_id_BM2[:, 0])
    same_query_BB = same_content(query_id_B2, query_id_B2)
    right_BB = exists(same_query_BB, same_document_BB) & first_of[1]
    return over_widths(config, query_BD, document_BMD, valid_BM, one_width, first_of)


def own_hard_negatives(query_id_B2, document_id_BM2, valid_BM):
    """[B, Z] bool: document z is a hard negative of pair i, and the first of its content there;
    neither its query nor a document of that query."""
    B, M = valid_BM.shape
    document_id_Z2 = document_id_BM2.reshape(B * M, 2)
    pair_Z, slot_Z = jnp.divmod(jnp.arange(B * M), M)
    own_BZ = (jnp.arange(B)[:, None] == pair_Z) & valid_BM.reshape(-1) & (slot_Z > 0)
    same_ZZ = same_content(document_id_Z2, document_id_Z2)
    copy_BZ = exists(own_BZ, same_ZZ & (slot_Z[:, None] < slot_Z[None, :]))
    same_query_BB = same_content(query_id_B2, query_id_B2)
    answer_BZ = exists(same_query_BB, same_content(document_id_BM2[:, 0], document_id_Z2))
    return own_BZ & ~copy_BZ & ~answer_BZ & ~same_content(query_id_B2, document_id_Z2)


def _one_width(
    config: ContrastConfig,
    scale,
    q_BD,
    d_BMD,
    documents_BZ,
    queries_BB,
    hard_BZ,
    in_batch_B,
    right_BB,
):
    """Loss, own score, and maximum and number of the negative documents' scores, all [B]."""
    d_BD, d_ZD = d_BMD[:, 0], d_BMD.reshape(-1, d_BMD.shape[-1])
    own_B = scale * jnp.sum(q_BD * d_BD, axis=-1)

    limit_B = jnp.full_like(own_B, jnp.inf)
    if config.margin is not None:
        limit_B = own_B + config.margin * scale
    stays_BZ = hard_BZ if in_batch_B is not None else jnp.zeros_like(hard_BZ)
    if not config.margin_hard_negatives:
        stays_BZ = hard_BZ

    def logits(x_BD, y_ZD, negative_BZ, stays_BZ=False):
        logits_BZ = scale * jnp.einsum("BD,ZD->BZ", x_BD, y_ZD, precision="highest")
        below_BZ = logits_BZ <= limit_B[:, None]
        takes_part_BZ = below_BZ if in_batch_B is None else below_BZ & in_batch_B[:, None]
        spared_BZ = stays_BZ & (below_BZ if config.margin_hard_negatives else True)
        negative_BZ = (negative_BZ & takes_part_BZ) | (spared_BZ & ~takes_part_BZ)
        return jnp.where(negative_BZ, logits_BZ, -jnp.inf)

    logits_of = {
        "q->d": logits(q_BD, d_ZD, documents_BZ, stays_BZ),
        "q->q": logits(q_BD, q_BD, queries_BB),
        "d->d": logits(d_BD, d_ZD, documents_BZ, stays_BZ),
        "d->q": logits(d_BD, q_BD, queries_BB),
    }

    answer_B = own_B
    if config.positives == "all":
        scores_BB = scale * jnp.einsum("BD,CD->BC", q_BD, d_BD, precision="highest")
        answer_B = jax.nn.logsumexp(jnp.where(right_BB, scores_BB, -jnp.inf), axis=1)
        if in_batch_B is not None:
            answer_B = jnp.where(in_batch_B, answer_B, own_B)

    def negative_log_likelihood(answer_B, *terms):
        chosen_BZ = jnp.concatenate([logits_of[term] for term in terms if config.has(term)], axis=1)
        relative_BZ = jnp.pad(chosen_BZ - answer_B[:, None], ((0, 0), (1, 0)))  # 0: the answer
        return jax.nn.logsumexp(relative_BZ, axis=1)

    if config.partition == "joint":
        loss_B = negative_log_likelihood(answer_B, "q->d", "q->q", "d->d", "d->q")
    elif config.has("d->q") or config.has("d->d"):
        by_document_B = negative_log_likelihood(own_B, "d->q", "d->d")
        loss_B = (negative_log_likelihood(answer_B, "q->d", "q->q") + by_document_B) / 2
    else:
        loss_B = negative_log_likelihood(answer_B, "q->d", "q->q")
    found_BZ = logits_of["q->d"]
    return loss_B, own_B, jnp.max(found_BZ, axis=1), jnp.sum(found_BZ > -jnp.inf, axis=1)
