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

No B x B array is needed for this. Sorting the ids numbers the distinct contents, and the partners
of a text (the queries that a document answers, the documents that answer a query) are a range of
one sorted table. All of it is small, and known to every device: about 16 bytes a text.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Texts:
    """What the masks need to know about some texts; four arrays of one shape.

    number: int32, equal for equal contents, over queries and documents alike.
    counts: whether it is a real text, and the first with its content.
    first_partner, partners: the numbers of its partners are a range of `Contents.partner_O`, from
      `first_partner`, `partners` long.
    """

    number: jax.Array
    counts: jax.Array
    first_partner: jax.Array
    partners: jax.Array

    def own(self, column: bool = False) -> "Texts":
        """[B] of slot 0; [B, 1] with `column`."""
        return jax.tree.map(lambda x_BM: x_BM[:, :1] if column else x_BM[:, 0], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Contents:
    """The texts of B pairs. A document is a negative of a pair if it counts, and is neither the
    pair's query (by number) nor one of its partners; a query likewise, with the pair's document.

    documents: [B, M], the own document in slot 0; [B, 1] if hard negatives are not shared.
    queries: [B, 1].
    partner_O: numbers of partners, int32; O = 2 B, every pair in both directions.
    own_negative_BN: which hard negatives that are not among `documents` are negatives of their own
      pair; [B, 0] if hard negatives are shared.
    hard_BN: which hard negatives are negatives of their own pair, whatever else is in the batch:
      neither its query nor a right answer, and no copy of an earlier one of its own. None where
      it was not asked for.
    """

    documents: Texts
    queries: Texts
    partner_O: jax.Array
    own_negative_BN: jax.Array
    hard_BN: jax.Array | None


def compare_contents(
    query_id_B2, document_id_BM2, valid_BM, share_hard_negatives: bool, own_hard: bool = False
) -> Contents:
    """Slot 0 of `document_id_BM2` is the own document, `valid_BM` says which slots are filled.
    `own_hard`: find `Contents.hard_BN`.

    Needs a mesh in context.
    """
    # Every device needs all of it, and sorts it for itself. Without the same word about the result,
    # the compiler sorts a part on each device, and passes single numbers round.
    query_id_B2, document_id_BM2, valid_BM = jax.lax.with_sharding_constraint(
        (query_id_B2, document_id_BM2, valid_BM), P()
    )
    B, M = valid_BM.shape
    number_X = number_contents(jnp.concatenate([query_id_B2, document_id_BM2.reshape(B * M, 2)]))
    query_BM, document_BM = number_X[:B, None], number_X[B:].reshape(B, M)
    query_B, own_B, X = query_BM[:, 0], document_BM[:, 0], len(number_X)
    # A content can be a document of one pair and the query of another: two lists, two keys.
    first_Y, length_Y, partner_O = _lists(
        jnp.concatenate([own_B, query_B + X]), jnp.concatenate([query_B, own_B]), 2 * X
    )

    def texts(number_BM, valid_BM, key_BM):
        counts_BM = _is_first(number_BM, valid_BM, X)
        return Texts(number_BM, counts_BM, first_Y[key_BM], length_Y[key_BM])

    shared = M if share_hard_negatives else 1
    documents = texts(document_BM[:, :shared], valid_BM[:, :shared], document_BM[:, :shared])
    queries = texts(query_BM, valid_BM[:, :1], query_BM + X)

    number_BN, valid_BN = document_BM[:, 1:], valid_BM[:, 1:]
    earlier_NN = jnp.tri(M - 1, k=-1, dtype=bool)
    same_BNN = number_BN[:, :, None] == number_BN[:, None, :]
    copy_BN = jnp.any(same_BNN & earlier_NN & valid_BN[:, None, :], axis=-1)
    distinct_BN = valid_BN & ~copy_BN & (number_BN != query_BM)
    is_own_X = jnp.zeros(X, bool).at[own_B].set(True)  # those count as own documents
    own_negative_BN = (distinct_BN & ~is_own_X[number_BN])[:, shared - 1 :]
    hard_BN = distinct_BN & ~_are_pairs(query_BM, number_BN, own_B) if own_hard else None
    contents = Contents(documents, queries, partner_O, own_negative_BN, hard_BN)
    return jax.lax.with_sharding_constraint(contents, P())


def _are_pairs(query_B1, number_BN, own_B):
    """[B, N] bool: some pair of the batch has this query and this document."""
    B, N = number_BN.shape
    asked_BM = jnp.concatenate([own_B[:, None], number_BN], axis=1)
    both_BM2 = jnp.stack([jnp.broadcast_to(query_B1, asked_BM.shape), asked_BM], axis=-1)
    both_BM = number_contents(both_BM2.reshape(-1, 2)).reshape(B, N + 1)
    return jnp.zeros(both_BM.size, bool).at[both_BM[:, 0]].set(True)[both_BM[:, 1:]]


def number_contents(ids_X2):
    """int32 number_X from 0 to at most X - 1; equal ids have equal numbers."""
    order_X = jnp.lexsort((ids_X2[:, 1], ids_X2[:, 0]))
    rank_X = jnp.cumsum(_is_new(ids_X2[order_X]), dtype=jnp.int32) - 1
    return jnp.zeros_like(rank_X).at[order_X].set(rank_X)


def _is_new(sorted_X2):
    """[X] bool: the row differs from the row before it."""
    differs_X = jnp.any(sorted_X2[1:] != sorted_X2[:-1], axis=-1)
    return jnp.concatenate([jnp.ones(1, bool), differs_X])


def _is_first(number_BM, valid_BM, numbers: int):
    """[B, M] bool: a valid text, and the first with its number, slot by slot."""
    B, M = number_BM.shape
    order_BM = jnp.arange(M)[None, :] * B + jnp.arange(B)[:, None]
    first_X = jnp.full(numbers, B * M).at[number_BM].min(jnp.where(valid_BM, order_BM, B * M))
    return valid_BM & (order_BM == first_X[number_BM])


def _lists(key_O, value_O, keys: int):
    """The distinct values of each key: first_Y, length_Y (Y keys), and all values, by key."""
    sorted_O2 = jnp.stack([key_O, value_O], axis=1)[jnp.lexsort((value_O, key_O))]
    is_new_O = _is_new(sorted_O2)
    slot_O = jnp.where(is_new_O, jnp.cumsum(is_new_O) - 1, len(key_O))  # past the end: dropped
    values_O = jnp.zeros_like(value_O).at[slot_O].set(sorted_O2[:, 1], mode="drop")
    length_Y = jnp.zeros(keys, jnp.int32).at[sorted_O2[:, 0]].add(is_new_O)
    return jnp.cumsum(length_Y, dtype=jnp.int32) - length_Y, length_Y, values_O
