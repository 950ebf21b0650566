"""What launch/prepare.py is asked for. Imports no Beam."""

import dataclasses

from moe_embed_jax.config import setting
from moe_embed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """sources: path of the sources file. output: the folder to make, of any Beam file system.
    vocabulary: file to count tokens with, or "". max_bad_share: of the rows of a source.
    beam: options for Beam (--runner=... and what that runner takes)."""

    sources: str
    output: str
    vocabulary: str = setting("", flag="count tokens with this vocabulary")
    max_bad_share: float = setting(0.01, flag="of a source's rows; more stop the run")
    rows_per_shard: int = setting(65_536, flag="pairs in a shard")
    beam: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"--max_bad_share={self.max_bad_share} must be from 0 to 1")
        if self.rows_per_shard < 1:
            raise UserError(f"--rows_per_shard={self.rows_per_shard} must be 1 or more")
