"""What a student learns from a teacher: its vectors, and how it ranks a query's documents.

The teacher is not run here. Its vectors and scores come with the batch, so it may have another
tokenizer, width and framework.
"""

import jax
import jax.numpy as jnp

from moe_embed_jax.losses.contents import compare_contents
from moe_embed_jax.losses.contrast import unit
from moe_embed_jax.losses.distillation_config import DistillationConfig
from moe_embed_jax.losses.ring import TILE
from moe_embed_jax.losses.streaming import streamed_divergence

NOTHING = -1e30  # a logit whose probability is 0, also among others like it


def initial_projection(key: jax.Array, width: int, teacher_width: int) -> jax.Array:
    """float32 projection_DW, which keeps lengths in the mean."""
    return jax.random.normal(key, (width, teacher_width), jnp.float32) * teacher_width**-0.5


def vector_loss(
    config: DistillationConfig,
    widths: list[tuple[int, float]],
    text_XD: jax.Array,
    teacher_XW: jax.Array,
    projection_DW: jax.Array | None = None,
) -> jax.Array:
    """1 - cosine between a student's and a teacher's vectors, the mean over texts.

    With unit vectors this is half of their squared distance, the loss of EmbedDistill
    (arXiv 2301.12005).

    Args:
      widths: (Matryoshka width, weight) as of `ContrastConfig.widths`; the result is the weighted
        sum of the losses of the vectors that are cut to each width.
      text_XD, teacher_XW: of the same texts, of any length.
      projection_DW: parameter, where `config.match` is "projection".

    Returns: float32 scalar, with a gradient to `text_XD` and `projection_DW`.
    """
    text_XD, teacher_XW = text_XD.astype(jnp.float32), teacher_XW.astype(jnp.float32)

    def of_width(width: int) -> jax.Array:
        if config.match == "slice":
            compared = min(width, teacher_XW.shape[-1])
            student_XW, target_XW = text_XD[:, :compared], teacher_XW[:, :compared]
        else:
            student_XW = jnp.matmul(text_XD[:, :width], projection_DW[:width], precision="highest")
            target_XW = teacher_XW
        return 1 - jnp.mean(jnp.sum(unit(student_XW) * unit(target_XW), axis=-1))

    return sum(weight * of_width(width) for width, weight in widths)


def score_loss(
    config: DistillationConfig,
    widths: list[tuple[int, float]],
    scale: jax.Array,
    query_BD: jax.Array,
    document_BMD: jax.Array,
    valid_BM: jax.Array,
    teacher_score_BM: jax.Array,
) -> jax.Array:
    """Divergence of the student's from the teacher's distribution over each query's documents.

    With the teacher's probabilities p (softmax of its scores over `teacher_temperature`) and the
    student's r (softmax of `scale` times its cosines) it is the sum of p log(p / r) in nats, the
    mean over the queries with two or more scored documents: KL(p, r) of Hinton et al.
    (arXiv 1503.02531), over a list of documents as in RocketQAv2 (arXiv 2110.07367).

    Args:
      widths: (Matryoshka width, weight); the result is the weighted sum over widths.
      scale: 1 / temperature, float32 scalar.
      query_BD, document_BMD: pooled vectors of any length; the own document, then hard negatives.
      valid_BM: which documents are there.
      teacher_score_BM: NaN where none is known; such a document is not compared.

    Returns: float32 scalar, with a gradient to the vectors and `scale`.
    """
    known_BM = valid_BM & jnp.isfinite(teacher_score_BM)
    teacher_BM = jnp.where(known_BM, teacher_score_BM / config.teacher_temperature, NOTHING)
    log_p_BM = jax.nn.log_softmax(teacher_BM, axis=1)
    p_BM = jnp.where(known_BM, jnp.exp(log_p_BM), 0.0)
    query_BD = query_BD.astype(jnp.float32)
    # What stands in an empty slot is never read, in either direction.
    document_BMD = jnp.where(known_BM[..., None], document_BMD.astype(jnp.float32), 0.0)
    counts_B = jnp.sum(known_BM, axis=1) >= 2

    def of_width(width: int) -> jax.Array:
        q_BD, d_BMD = unit(query_BD[:, :width]), unit(document_BMD[..., :width])
        student_BM = scale * jnp.einsum("BD,BMD->BM", q_BD, d_BMD, precision="highest")
        log_r_BM = jax.nn.log_softmax(jnp.where(known_BM, student_BM, NOTHING), axis=1)
        # 0 log 0 is 0: a document that the teacher rules out costs nothing.
        parts_BM = jnp.where(p_BM > 0, p_BM * (log_p_BM - log_r_BM), 0.0)
        total = jnp.sum(jnp.where(counts_B, jnp.sum(parts_BM, axis=1), 0.0))
        return total / jnp.maximum(jnp.sum(counts_B), 1)

    return sum(weight * of_width(width) for width, weight in widths)


def batch_score_loss(
    config: DistillationConfig,
    widths: list[tuple[int, float]],
    scale: jax.Array,
    vectors: tuple[jax.Array, jax.Array],
    teacher_vectors: tuple[jax.Array, jax.Array],
    ids: tuple[jax.Array, jax.Array],
    in_batch_B: jax.Array | None = None,
    *,
    tile: int = TILE,
) -> jax.Array:
    """Divergence of the student's from the teacher's distribution over the documents of the batch.

    KL(p, r) as in `score_loss`, the mean over all queries. The documents of a query are its own and
    its negatives among the own documents of the global batch, as in the contrastive loss
    (`contents.py`): each distinct one once, and no other right answer of the query, which would
    share its probability. No score leaves one out (`loss.margin`), because the teacher says how
    near a document is. p is the softmax of the teacher's cosines over `teacher_temperature`.

    Args:
      widths: (Matryoshka width, weight); the result is the weighted sum over widths.
      scale: 1 / temperature, float32 scalar.
      vectors: pooled query_BD and own document_BD, of any length.
      teacher_vectors: query_BW and document_BW of the same texts, of any length.
      ids: query_id_B2 and document_id_B2, 64-bit content ids as two int32.
      in_batch_B: bool, queries that are compared with the texts of other pairs, default all; the
        others have one document, and no divergence.

    Returns: float32 scalar, with a gradient to `vectors` and `scale`. Leading axes are sharded over
      the mesh in context, whose size must divide B.
    """
    query_id_B2, document_id_B2 = ids
    there_B1 = jnp.ones((len(query_id_B2), 1), bool)
    contents = compare_contents(query_id_B2, document_id_B2[:, None], there_B1, True)
    teacher_BW, teacher_document_BW = (unit(x.astype(jnp.float32)) for x in teacher_vectors)
    teacher_BW /= config.teacher_temperature
    teacher_own_B = jnp.sum(teacher_BW * teacher_document_BW, axis=-1)
    limit_B = jnp.full(len(there_B1), jnp.inf)
    if in_batch_B is not None:
        limit_B = jnp.where(in_batch_B, limit_B, -jnp.inf)

    def of_width(width: int) -> jax.Array:
        q_BD, d_BD = (unit(x.astype(jnp.float32)[:, :width]) for x in vectors)
        lse_B, teacher_lse_B, mean_B = streamed_divergence(
            tile,
            scale * q_BD,
            contents.queries.own(),
            limit_B,
            d_BD[:, None],
            contents.documents,
            contents.partner_O,
            teacher_BW,
            teacher_document_BW[:, None],
        )
        # The own document is no negative, so it is added here.
        own_B = scale * jnp.sum(q_BD * d_BD, axis=-1)
        teacher_all_B = jnp.logaddexp(teacher_lse_B, teacher_own_B)
        p_own_B = jnp.exp(teacher_own_B - teacher_all_B)
        mean_B = p_own_B * (teacher_own_B - own_B) + jnp.exp(teacher_lse_B - teacher_all_B) * mean_B
        return jnp.mean(mean_B - teacher_all_B + jnp.logaddexp(lse_B, own_B))

    return sum(weight * of_width(width) for width, weight in widths)
