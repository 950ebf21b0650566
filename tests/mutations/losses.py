"""Faults of the contrastive loss and masked language modelling."""

from mutations.fault import Fault

MEANING = "losses/test_objectives.py"
ORACLE = "losses/test_streamed_infonce.py -k oracle"

FAULTS = (
    Fault(
        "contents-compared-by-half-of-their-hash",
        "losses/contents.py",
        "jnp.any(sorted_X2[1:] != sorted_X2[:-1], axis=-1)",
        "sorted_X2[1:, 0] != sorted_X2[:-1, 0]",
        f"{MEANING} -k half_of_a_hash",
    ),
    Fault(
        "hard-negatives-come-before-documents-of-later-pairs",
        "losses/contents.py",
        "jnp.arange(M)[None, :] * B + jnp.arange(B)[:, None]",
        "jnp.arange(B)[:, None] * M + jnp.arange(M)[None, :]",
        ORACLE,
    ),
    Fault(
        "hard-negative-that-is-the-query-stays",
        "losses/contents.py",
        " & (hard_BN != query_BM)",
        "",
        f"{MEANING} -k hard_negative",
    ),
    Fault(
        "hard-negative-that-is-a-document-of-the-batch-counts-twice",
        "losses/contents.py",
        " & ~is_own_X[hard_BN]",
        "",
        ORACLE,
    ),
    Fault(
        "document-with-the-content-of-the-query-is-a-negative",
        "losses/streaming.py",
        "(other.number[:, None] == text.number) | ",
        "",
        f"{MEANING} -k duplicates",
    ),
    Fault(
        "copies-of-the-second-right-answer-are-negatives",
        "losses/streaming.py",
        "        jnp.minimum(longest_c, longest_a),\n",
        "        1,\n",
        f"{MEANING} -k 'duplicates or copy'",
    ),
    Fault(
        "documents-keep-the-gradients-of-their-own-slice",
        "losses/streaming.py",
        'return jax.lax.psum_scatter(gradient_IbMD, "slice")',
        'return gradient_IbMD[jax.lax.axis_index("slice")]',
        "losses/test_streamed_infonce.py -k equal",
    ),
    Fault(
        "streamed-backward-ignores-its-cotangent",
        "losses/streaming.py",
        "jnp.exp(logits_ac - lse_a[:, None]) * dlse_a[:, None]",
        "jnp.exp(logits_ac - lse_a[:, None])",
        ORACLE,
    ),
    Fault(
        "margin-below-the-own-document",
        "losses/infonce.py",
        "own_B + config.margin * scale",
        "own_B - config.margin * scale",
        f"{MEANING} -k margin",
    ),
    Fault(
        "margin-in-units-of-the-logits",
        "losses/infonce.py",
        "own_B + config.margin * scale",
        "own_B + config.margin",
        f"{MEANING} -k margin",
    ),
    Fault(
        "matryoshka-normalises-then-cuts",
        "losses/contrast.py",
        "unit(query_BD[:, :width])",
        "unit(query_BD)[:, :width]",
        f"{MEANING} -k matryoshka",
    ),
    Fault(
        "document-to-query-scored-with-the-query",
        "losses/infonce.py",
        "by_document.append(against_queries(d_BD))",
        "by_document.append(against_queries(q_BD))",
        f"{MEANING} -k clip",
    ),
    Fault(
        "accuracy-counts-a-tie-as-right",
        "losses/contrast.py",
        "own_B > top_B",
        "own_B >= top_B",
        f"{MEANING} -k 'accuracy or tie or duplicates'",
    ),
    Fault(
        "learned-temperature-has-a-gradient-outside-its-bounds",
        "losses/contrast.py",
        "jnp.where(clipped == log_scale, log_scale, clipped)",
        "log_scale + jax.lax.stop_gradient(clipped - log_scale)",
        f"{MEANING} -k learned_temperature",
    ),
    Fault(
        "masked-count-of-unshared-negatives-includes-the-own-document",
        "losses/contrast.py",
        "others_B = B - 1 + jnp.sum(valid_BM[:, 1:], axis=1)",
        "others_B = B + jnp.sum(valid_BM[:, 1:], axis=1)",
        f"{MEANING} -k hard_negative",
    ),
    Fault(
        "masked-lm-loss-of-empty-predictions",
        "losses/masked_lm.py",
        "jnp.where(there_T, loss_T, 0.0)",
        "loss_T",
        "stages/test_masked_step.py -k sums_of_nothing",
    ),
    Fault(
        "masked-lm-accuracy-misses-ties",
        "losses/masked_lm.py",
        "own_T >= best_T",
        "own_T > best_T",
        "stages/test_masked_step.py -k sums_of_nothing",
    ),
    Fault(
        "matryoshka-width-takes-all-of-the-projection",
        "losses/distillation.py",
        "jnp.matmul(text_XD[:, :width], projection_DW[:width], precision",
        "jnp.matmul(text_XD, projection_DW, precision",
        "losses/test_distillation.py -k vectors_against",
    ),
    Fault(
        "slice-of-a-teacher-that-is-wider-than-the-student",
        "losses/distillation.py",
        "compared = min(width, teacher_XW.shape[-1])",
        "compared = teacher_XW.shape[-1]",
        "losses/test_distillation.py -k vectors_against",
    ),
)
