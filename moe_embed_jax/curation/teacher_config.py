"""How the teacher of launch/filter.py and launch/mine.py reads texts. Imports no jax."""

import dataclasses

from moe_embed_jax.config import setting
from moe_embed_jax.search import check_dtype

PROMPT_HELP = 'a name that the model knows (query, document), none, or a prefix like "query: "'


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """dtype: of stored vectors. Prompts: as of `Embedder.encode`, or "none"."""

    query_prompt: str = setting("query", flag=PROMPT_HELP)
    document_prompt: str = setting("document", flag=PROMPT_HELP)
    dtype: str = setting("float32", flag="of stored vectors: bfloat16, float16")

    def __post_init__(self):
        check_dtype(self.dtype)
