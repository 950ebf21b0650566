"""What a student learns from a teacher: its vectors should say what the teacher's say.

The teacher is not run here. Its vectors of the batch's texts come with the batch, so it may have
another tokenizer, width and framework.
"""

import jax
import jax.numpy as jnp

from moe_embed_jax.losses.contrast import unit
from moe_embed_jax.losses.distillation_config import DistillationConfig


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
