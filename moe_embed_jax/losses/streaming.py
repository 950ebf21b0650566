"""Sums over the scores of anchors with all candidates of the mesh, one tile at a time (`ring.py`).

The softmax is online: a running maximum and sum per anchor (as in FlashAttention, arXiv 2205.14135,
and Inf-CL, arXiv 2410.17243).
"""

import functools

import jax
import jax.numpy as jnp

from moe_embed_jax.losses.contents import Texts
from moe_embed_jax.losses.ring import gather, gradients_of_vectors, matmul, reduce_over_candidates


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def streamed_log_sum_exp(
    tile: int,
    answers: bool,
    anchor_BD,
    other: Texts,
    limit_B,
    candidate_BMD,
    candidates: Texts,
    partner_O,
):
    """Log-sum-exp, maximum and number of each anchor's scores with its negatives.

    Args:
      tile: most anchors, and most candidates, that are scored at once.
      answers: take its partners, each once, in place of its negatives.
      anchor_BD: float32; scores are inner products, so the scale must be in here.
      other: [B], the text of each anchor's pair that decides what is no negative: its query where
        documents are scored, its document where queries are (`contents.py`).
      limit_B: scores above it are left out; inf for no limit.
      candidate_BMD, candidates: the texts that are scored, float32 and [B, M].
      partner_O: partner lists, see `Contents`.

    Returns:
      lse_B (-inf where there is no negative), top_B (the same) and count_B, float32. Only lse_B has
      a gradient, to anchor_BD and candidate_BMD. All sharded like the batch; needs a mesh in
      context whose size divides B.
    """
    arguments = anchor_BD, other, limit_B, candidate_BMD, candidates, partner_O
    return _forward(tile, answers, *arguments)[0]


def _forward(tile, answers, anchor_BD, other, limit_B, candidate_BMD, candidates, partner_O):
    anchors, gathered = (anchor_BD, other, limit_B), gather((candidate_BMD, candidates))

    def update(stats, anchor, candidate, partner_O):
        return _accumulate(stats, _logits(answers, anchor, candidate, partner_O))

    start = -jnp.inf, 0.0, 0.0
    stats = reduce_over_candidates(tile, update, start, anchors, gathered, partner_O)
    top_B, total_B, count_B = stats
    lse_B = top_B + jnp.log(total_B)
    return (lse_B, top_B, count_B), (anchors, gathered, partner_O, lse_B)


def _backward(tile, answers, residuals, cotangents):
    *arguments, lse_B = residuals

    def dlogits(anchor, candidate, partner_O, of_anchor):
        lse_a, dlse_a = of_anchor
        logits_ac = _logits(answers, anchor, candidate, partner_O)
        return jnp.exp(logits_ac - lse_a[:, None]) * dlse_a[:, None]

    of_anchors = _finite(lse_B), cotangents[0]
    danchor_BD, dcandidate_BMD = gradients_of_vectors(tile, dlogits, *arguments, of_anchors)
    return danchor_BD, None, None, dcandidate_BMD, None, None


streamed_log_sum_exp.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def streamed_divergence(
    tile: int,
    anchor_BD,
    other: Texts,
    limit_B,
    candidate_BMD,
    candidates: Texts,
    partner_O,
    teacher_anchor_BW,
    teacher_candidate_BMW,
):
    """What the divergence of two distributions over each anchor's negatives is made of.

    With the scores s (of the vectors) and t (of the teacher's vectors), and p = softmax(t), it is
    mean - teacher_lse + lse.

    Args: those of `streamed_log_sum_exp`, the scale being in the teacher's anchors, too.

    Returns: lse_B and teacher_lse_B, the log-sum-exps of s and t, -inf where there is no negative;
      mean_B, the sum of p (t - s), 0 there. lse_B and mean_B have a gradient to anchor_BD and
      candidate_BMD.
    """
    arguments = anchor_BD, other, limit_B, candidate_BMD, candidates, partner_O
    teacher = teacher_anchor_BW, teacher_candidate_BMW
    return _divergence_forward(tile, *arguments, *teacher)[0]


def _both_logits(anchor, candidate, partner_O):
    """Scores s and t of one tile, -inf where the candidate is no negative of the anchor."""
    *student, teacher_aW = anchor
    *text, teacher_cW = candidate
    logits_ac = _logits(False, student, text, partner_O)
    teacher_ac = matmul("aW,cW->ac", teacher_aW, teacher_cW)
    return logits_ac, jnp.where(logits_ac == -jnp.inf, -jnp.inf, teacher_ac)


def _divergence_forward(
    tile,
    anchor_BD,
    other,
    limit_B,
    candidate_BMD,
    candidates,
    partner_O,
    teacher_anchor_BW,
    teacher_candidate_BMW,
):
    anchors = anchor_BD, other, limit_B, teacher_anchor_BW
    gathered = gather((candidate_BMD, candidates, teacher_candidate_BMW))

    def update(stats, anchor, candidate, partner_O):
        *stats, top_a, total_a, sum_a = stats
        logits_ac, teacher_ac = _both_logits(anchor, candidate, partner_O)
        new_top_a, total_a, _ = _accumulate((top_a, total_a, 0.0), teacher_ac)
        base_a = _finite(new_top_a)
        gap_ac = jnp.where(teacher_ac == -jnp.inf, 0.0, teacher_ac - logits_ac)
        sum_a = sum_a * jnp.exp(top_a - base_a)
        sum_a += jnp.sum(jnp.exp(teacher_ac - base_a[:, None]) * gap_ac, axis=1)
        return (*_accumulate(stats, logits_ac), new_top_a, total_a, sum_a)

    start = -jnp.inf, 0.0, 0.0, -jnp.inf, 0.0, 0.0
    stats = reduce_over_candidates(tile, update, start, anchors, gathered, partner_O)
    top_B, total_B, _, teacher_top_B, teacher_total_B, sum_B = stats
    lse_B, teacher_lse_B = top_B + jnp.log(total_B), teacher_top_B + jnp.log(teacher_total_B)
    mean_B = sum_B / jnp.where(teacher_total_B > 0, teacher_total_B, 1.0)
    return (lse_B, teacher_lse_B, mean_B), (anchors, gathered, partner_O, lse_B, teacher_lse_B)


def _divergence_backward(tile, residuals, cotangents):
    *arguments, lse_B, teacher_lse_B = residuals

    def dlogits(anchor, candidate, partner_O, of_anchor):
        lse_a, teacher_lse_a, dlse_a, dmean_a = (x_a[:, None] for x_a in of_anchor)
        logits_ac, teacher_ac = _both_logits(anchor, candidate, partner_O)
        return jnp.exp(logits_ac - lse_a) * dlse_a - jnp.exp(teacher_ac - teacher_lse_a) * dmean_a

    of_anchors = _finite(lse_B), _finite(teacher_lse_B), cotangents[0], cotangents[2]
    danchor_BD, dcandidate_BMD = gradients_of_vectors(tile, dlogits, *arguments, of_anchors)
    return danchor_BD, None, None, dcandidate_BMD, None, None, None, None


streamed_divergence.defvjp(_divergence_forward, _divergence_backward)


def _finite(lse_B):
    """0 for -inf: an anchor without negatives has logits that are all -inf, and exp stays at 0."""
    return jnp.where(lse_B == -jnp.inf, 0.0, lse_B)


def _logits(answers: bool, anchor, candidate, partner_O):
    """logits_ac of one tile, -inf where the candidate is no negative of the anchor (no partner, if
    `answers`)."""
    x_aD, other, limit_a = anchor
    y_cD, text = candidate
    # Partners are looked up in the candidates' lists or in the anchors', where the longest list of
    # this tile is shorter. It nearly always has one entry; but a label may answer all queries.
    longest_c = jnp.max(jnp.where(text.counts, text.partners, 0))
    longest_a = jnp.max(other.partners)
    by_candidate = longest_c <= longest_a

    def is_partner(k):
        left_a = jnp.where(by_candidate, other.number, _partner(other, k, partner_O))
        right_c = jnp.where(by_candidate, _partner(text, k, partner_O), text.number)
        return left_a[:, None] == right_c[None, :]

    def or_partners(found_ac):
        return jax.lax.fori_loop(
            1,
            jnp.minimum(longest_c, longest_a),
            lambda k, found_ac: found_ac | is_partner(k),
            found_ac,
        )

    if answers:
        left_out_ac = ~(text.counts & or_partners(is_partner(0)))
    else:
        left_out_ac = ~text.counts | (other.number[:, None] == text.number) | is_partner(0)
        left_out_ac = or_partners(left_out_ac)
    logits_ac = matmul("aD,cD->ac", x_aD, y_cD)
    return jnp.where(left_out_ac | (logits_ac > limit_a[:, None]), -jnp.inf, logits_ac)


def _partner(texts: Texts, k, partner_O):
    """Number of the k-th partner of each text, -1 for none."""
    number = partner_O.at[texts.first_partner + k].get(mode="clip")
    return jnp.where(k < texts.partners, number, -1)


def _accumulate(stats, logits_ac):
    """(maximum, sum relative to it, number) of the scores so far and those of a tile."""
    top_a, total_a, count_a = stats
    new_top_a = jnp.maximum(top_a, jnp.max(logits_ac, axis=1))
    base_a = _finite(new_top_a)  # no negative yet: -inf - -inf
    total_a = total_a * jnp.exp(top_a - base_a)
    total_a += jnp.sum(jnp.exp(logits_ac - base_a[:, None]), axis=1)
    return new_top_a, total_a, count_a + jnp.sum(logits_ac > -jnp.inf, axis=1)
