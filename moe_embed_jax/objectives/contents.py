"""Which texts of a batch are negatives of which pair, from content ids alone.

Texts are compared by 64-bit hashes (two int32) that travel with the batch. For pair i, with query
q_i and document d_i, a document of the batch (own or hard negative) is a negative except
  * one that is the own document of q_i, or of another copy of that query, in any copy,
  * one with the content of q_i itself,
  * a second copy of a document: each distinct one counts once (a small language fills a batch with
    several copies of its rows). Own documents are counted before hard negatives;
and for the terms that score queries, a query of the batch is a negative except
  * one that has d_i as own document, in any copy (q_i is one),
  * one with the content of d_i itself,
  * a second copy of a query.

No B x B array is needed for this. Sorting the ids numbers the distinct contents; a text knows its
partners (the queries that a document answers, the documents that answer a query) as a range of one
sorted table of the batch's pairs. Both are small, and replicated: 12 bytes a text.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Candidates:
    """Texts that are scored, M per pair; a candidate is a negative of pair i if it counts, and
    neither its number nor that of any partner is the number of the other text of pair i.

    number_BM: int32, equal for equal contents, over queries and documents alike.
    counts_BM: whether this is a real text, and the first with its content.
    first_partner_BM, partners_BM: its partners' numbers are
      `partner_B[first_partner : first_partner + partners]`; none for texts that do not count.
    partner_B: numbers, by partnership; replicated.
    """

    number_BM: jax.Array
    counts_BM: jax.Array
    first_partner_BM: jax.Array
    partners_BM: jax.Array
    partner_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Contents:
    """Numbers of the B pairs and their two kinds of candidates.

    documents: [B, M] if hard negatives are shared, else the own documents only, [B, 1].
    queries: [B, 1].
    own_negative_BN: hard negatives of the pair itself that are not among `documents`, and are
      negatives of their pair; [B, 0] if hard negatives are shared.
    """

    query_number_B: jax.Array
    document_number_B: jax.Array
    documents: Candidates
    queries: Candidates
    own_negative_BN: jax.Array


def compare_contents(
    query_id_B2, document_id_BM2, valid_BM, share_hard_negatives: bool
) -> Contents:
    """Slot 0 of `document_id_BM2` is the own document, `valid_BM` says which slots are filled.

    Needs a mesh in context.
    """
    # Every device needs all of it, and sorts it for itself.
    query_id_B2, document_id_BM2, valid_BM = jax.lax.with_sharding_constraint(
        (query_id_B2, document_id_BM2, valid_BM), P()
    )
    B, M = valid_BM.shape
    number_X = number_contents(jnp.concatenate([query_id_B2, document_id_BM2.reshape(B * M, 2)]))
    query_B, document_BM = number_X[:B], number_X[B:].reshape(B, M)
    own_B, X = document_BM[:, 0], len(number_X)
    shared = M if share_hard_negatives else 1
    documents = _candidates(document_BM[:, :shared], valid_BM[:, :shared], own_B, query_B, X)
    queries = _candidates(query_B[:, None], jnp.ones((B, 1), bool), query_B, own_B, X)

    hard_BN, valid_BN = document_BM[:, shared:], valid_BM[:, shared:]
    earlier_NN = jnp.tri(M - shared, k=-1, dtype=bool)
    same_BNN = hard_BN[:, :, None] == hard_BN[:, None, :]
    copy_BN = jnp.any(same_BNN & earlier_NN & valid_BN[:, None, :], axis=-1)
    is_own_X = jnp.zeros_like(number_X, bool).at[own_B].set(True)  # those count as own documents
    own_negative_BN = valid_BN & ~copy_BN & ~is_own_X[hard_BN] & (hard_BN != query_B[:, None])
    return Contents(query_B, own_B, documents, queries, own_negative_BN)


def number_contents(ids_X2):
    """int32 number_X from 0 to at most X - 1; equal ids have equal numbers."""
    order_X = jnp.lexsort((ids_X2[:, 1], ids_X2[:, 0]))
    rank_X = jnp.cumsum(_is_new(ids_X2[order_X]), dtype=jnp.int32) - 1
    return jnp.zeros_like(rank_X).at[order_X].set(rank_X)


def _is_new(sorted_X2):
    differs_X = jnp.any(sorted_X2[1:] != sorted_X2[:-1], axis=-1)
    return jnp.concatenate([jnp.ones(1, bool), differs_X])


def _candidates(number_BM, valid_BM, text_B, partner_B, numbers: int) -> Candidates:
    """Candidates; pair i makes the texts `text_B[i]` and `partner_B[i]` partners."""
    B, M = number_BM.shape
    order_BM = jnp.arange(M)[None, :] * B + jnp.arange(B)[:, None]
    first_X = jnp.full(numbers, B * M).at[number_BM].min(jnp.where(valid_BM, order_BM, B * M))
    counts_BM = valid_BM & (order_BM == first_X[number_BM])

    pair_B2 = jnp.stack([text_B, partner_B], axis=1)
    pair_B2 = pair_B2[jnp.lexsort((partner_B, text_B))]
    is_new_B = _is_new(pair_B2)
    slot_B = jnp.where(is_new_B, jnp.cumsum(is_new_B) - 1, B)  # B: dropped
    table_B = jnp.full(B, -1, jnp.int32).at[slot_B].set(pair_B2[:, 1], mode="drop")
    partners_X = jnp.zeros(numbers, jnp.int32).at[pair_B2[:, 0]].add(is_new_B)
    first_partner_X = jnp.cumsum(partners_X, dtype=jnp.int32) - partners_X
    return Candidates(
        number_BM,
        counts_BM,
        first_partner_X[number_BM],
        jnp.where(counts_BM, partners_X[number_BM], 0),
        table_B,
    )
