"""A teacher without weights: a text's vector is the sum of its words' random vectors."""

import hashlib
import time

import numpy as np

from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.tokenizers.truncation import Truncation

WIDTH = 64


class StandInTeacher:
    """`slowness`: seconds per call. Attributes: texts, how many it has embedded."""

    def __init__(self, name: str = "stand-in", slowness: float = 0.0):
        self.name = name
        self.slowness = slowness
        self.texts = 0
        self.truncation = Truncation()

    def encode(self, texts, prompt=None):
        self.texts += len(texts)
        time.sleep(self.slowness * bool(texts))
        x_ND = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in zip(x_ND, texts, strict=True):
            for word in text.lower().split():
                digest = hashlib.sha256(word.encode(errors="replace")).digest()
                seed = int.from_bytes(digest[:4], "little")
                row += np.random.default_rng(seed).normal(size=WIDTH)
        return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-6)

    def identity(self, prompt):
        return {"hash": self.name, **self.text_form(prompt)}

    def text_form(self, prompt):
        return {"prefix": str(prompt), "max_length": 512}

    has_prompts = True


def pair(number, source="faq", language="en", wrong=False):
    topic = [f"topic{number}{part}" for part in "abc"]
    document = f"{topic[0]} {topic[1]} {topic[2]} explained"
    if wrong:
        document = f"unrelated{number} words{number} entirely{number}"
    return PairRow(f"what is {topic[0]} {topic[1]}", document, (), source, language)
