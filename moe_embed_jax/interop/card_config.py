"""What a model card says that weights do not, as flags state it. Imports no jax."""

import dataclasses
import re

from moe_embed_jax.config import setting
from moe_embed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CardConfig:
    """Fields of the hub's front matter. Lists are separated by commas; empty: not said."""

    name: str = setting("", flag="of the model on the hub, OWNER/NAME")
    license: str = setting("", flag="of the weights, as the hub names it: apache-2.0, mit, ...")
    languages: str = setting("", flag="codes of ISO 639, separated by commas: en,de,sw")
    base_model: str = setting("", flag="OWNER/NAME of the model that training started from")
    datasets: str = setting("", flag="OWNER/NAME of data sets on the hub, separated by commas")
    tags: str = setting("", flag="further tags for the hub, separated by commas")
    mteb_datasets: str = setting("", flag="MTEB's names of data sets that were trained on")
    evaluation: str = setting("", flag="folder of results as launch/evaluate.py writes them")

    def __post_init__(self):
        for key in ("name", "base_model"):
            value = getattr(self, key)
            if value and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                raise UserError(f"{key}={value!r:.60} must be OWNER/NAME on the hub")
        for language in self.listed("languages"):
            if not re.fullmatch(r"[a-z]{2,3}", language):
                raise UserError(
                    f"languages: {language!r:.40} is no code of ISO 639: two or three small letters"
                )

    def listed(self, key: str) -> list[str]:
        """The entries of a list, without white space around them."""
        return [part.strip() for part in getattr(self, key).split(",") if part.strip()]
