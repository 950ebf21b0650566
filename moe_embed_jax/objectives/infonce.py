"""InfoNCE over global in-batch negatives (paper section 4; unidirectional, query -> document).

What is a negative: for query i, every document of the global batch, on whatever device, except its
own positive, and except
  * any document with the same content as the positive,
  * the positive of another copy of the same query,
  * a document with the same content as the query itself,
  * a second copy of a document that is a candidate already (a small language fills a batch with
    several copies of its rows; each counts once).
Contents are compared by 64-bit hashes (two int32), which travel with the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class InfoNCEResult:
    """loss: mean over queries, nats. accuracy: share of queries whose own document scores highest
    among the candidates. masked: mean number of candidates excluded per query."""

    loss: jax.Array
    accuracy: jax.Array
    masked: jax.Array


def same_content(a_B2, b_C2):
    """[B, C] bool: equal 64-bit content ids."""
    return jnp.all(a_B2[:, None, :] == b_C2[None, :, :], axis=-1)


def negatives_mask(query_id_B2, document_id_B2):
    """[B, B] bool: document j is a negative of query i. The diagonal (the positive) is False."""
    same_document_BB = same_content(document_id_B2, document_id_B2)
    is_copy_B = jnp.any(jnp.tril(same_document_BB, k=-1), axis=-1)  # of an earlier document
    excluded_BB = (
        same_document_BB  # the diagonal included
        | same_content(query_id_B2, query_id_B2)
        | same_content(query_id_B2, document_id_B2)
        | is_copy_B
    )
    return ~excluded_BB


def infonce(query_BD, document_BD, query_id_B2, document_id_B2, temperature) -> InfoNCEResult:
    """-log softmax of each query's own document among its candidates.

    `query_BD` and `document_BD` are unit-norm float32; row i of both is a pair. The [B, B] logits
    exist here: this is the plain reference form.
    """
    batch = query_BD.shape[0]
    logits_BB = jnp.einsum("BD,CD->BC", query_BD, document_BD, precision="highest") / temperature
    own_BB = jnp.eye(batch, dtype=bool)
    candidate_BB = negatives_mask(query_id_B2, document_id_B2) | own_BB
    logits_BB = jnp.where(candidate_BB, logits_BB, -jnp.inf)
    own_B = jnp.sum(jnp.where(own_BB, logits_BB, 0.0), axis=-1)
    loss_B = jax.nn.logsumexp(logits_BB, axis=-1) - own_B
    return InfoNCEResult(
        loss=jnp.mean(loss_B),
        accuracy=jnp.mean(own_B >= jnp.max(logits_BB, axis=-1)),
        masked=jnp.mean(jnp.sum(~candidate_BB, axis=-1).astype(jnp.float32)),
    )
