"""Which experts the tokens of a language or a topic take, and what an expert tells about them.

Assignments are counted: tokens that are sent to an expert. Every token of a text has K assignments
in every layer with experts. Prefixes and special tokens count, padding does not. Each assignment
counts once, whatever its gate; numbers of `first_choice` count only the one with the largest gate.
Y stands for the layers with experts, N for texts, A for groups of texts (languages, topics).
"""

import math
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.labelled_texts import LabelledText
from moe_embed_jax.routing.router import effective_experts

TEXTS_AT_ONCE = 8192  # whose choices, token by token, are held in memory
SHUFFLES = 200
SEED = 0
LABELS = ("language", "topic")


def count_choices(
    embedder, texts: Sequence[str], prompt: str | None, show_progress: bool = False
) -> np.ndarray:
    """Tokens of each text that take expert e as their k-th choice: int32 [N, Y, K, E].

    Raises `UserError` for a model without experts.
    """
    embedder.check_experts()
    model = embedder.model
    shape = model.num_moe_layers, model.experts_per_token, model.num_experts
    counts_NYKE = np.zeros((len(texts), *shape), np.int32)
    with tqdm(total=len(texts), unit=" texts", disable=not show_progress, leave=False) as bar:
        for begin in range(0, len(texts), TEXTS_AT_ONCE):
            chosen = embedder.expert_choices(texts[begin : begin + TEXTS_AT_ONCE], prompt)
            for text, expert_YTK in enumerate(chosen, begin):
                is_for_YTKE = expert_YTK[..., None] == np.arange(model.num_experts)
                counts_NYKE[text] = is_for_YTKE.sum(axis=1)
            bar.update(len(chosen))
    return counts_NYKE


def sum_by_label(counts_NX: np.ndarray, label_N: np.ndarray, labels: int) -> np.ndarray:
    """Sums over the texts of each label 0 ... `labels` - 1: int64 [A, ...]."""
    total_AX = np.zeros((labels, *counts_NX.shape[1:]), np.int64)
    np.add.at(total_AX, label_N, counts_NX)
    return total_AX


def mutual_information(weight_AYE: np.ndarray) -> np.ndarray:
    """I(group; expert) in bits, by layer: float64 [Y].

    The joint distribution is `weight` over its sum in the layer: with counts of assignments, one
    assignment drawn from all of the sample, groups as frequent as their assignments are in it.

    This plug-in estimate is above 0 even if experts do not depend on groups, and grows as texts
    become fewer: compare it with `shuffled_information`.
    """
    joint_AYE = np.asarray(weight_AYE, np.float64)
    joint_AYE = joint_AYE / joint_AYE.sum(axis=(0, 2), keepdims=True)
    expected_AYE = joint_AYE.sum(axis=0, keepdims=True) * joint_AYE.sum(axis=2, keepdims=True)
    ratio = np.divide(joint_AYE, expected_AYE, out=np.ones_like(joint_AYE), where=joint_AYE > 0)
    return np.maximum((joint_AYE * np.log2(ratio)).sum(axis=(0, 2)), 0.0)


def most_information(tokens_A: np.ndarray, experts: int, experts_per_token: int) -> float:
    """Upper bound of I(group; expert) in bits: min(H(group), log2(E / K)).

    A token's K assignments go to K different experts. One of them is drawn at random, so the token
    alone does not tell which: H(expert | group) >= log2(K). H(expert) is at most log2(E).
    """
    share_A = tokens_A / tokens_A.sum()
    entropy = -sum(p * math.log2(p) for p in share_A if p > 0)
    return min(entropy, math.log2(experts / experts_per_token))


def shuffled_information(
    counts_NYE: np.ndarray, label_N: np.ndarray, unit_N: np.ndarray, shuffles: int, seed: int
) -> np.ndarray:
    """`mutual_information` with labels in random order, once per shuffle: [shuffles, Y].

    Labels move between whole units, never between tokens, because the tokens of a text are alike.
    `unit_N`: 0, 1, ... of each text; texts of one unit have one label (translations of a sentence,
    which share its topic).
    """
    rng = np.random.default_rng(seed)
    label_U = np.zeros(unit_N.max() + 1, np.int64)
    label_U[unit_N] = label_N
    labels = int(label_N.max()) + 1
    bits = [
        mutual_information(sum_by_label(counts_NYE, rng.permutation(label_U)[unit_N], labels))
        for _ in range(shuffles)
    ]
    return np.array(bits)


def inspect_routing(
    embedder,
    texts: Sequence[LabelledText],
    prompt: str | None = "document",
    shuffles: int = SHUFFLES,
    seed: int = SEED,
    show_progress: bool = False,
) -> dict:
    """All numbers of launch/inspect_routing.py, as lists and dicts for JSON.

    Keys: "experts", "experts_per_token", "moe_layers", "prefix", "texts", "tokens", "shuffles",
    "seed"; "layers": of every layer the share of each expert and what follows from it; and for
    each label that the texts have, "language", "topic":
      "groups": {name: texts, tokens, "layers" as above};
      "information": of every layer `bits` = I(expert; label), `most_bits`, `of_most` = their ratio
        (None where nothing is possible), `shuffled_mean` and `shuffled_max` over the shuffles,
        `above_shuffled` = bits - shuffled_mean, `p` = (1 + shuffles with at least `bits`) /
        (1 + shuffles); and in "first_choice" the same numbers of first choices alone.
    Loads are relative to an equal share (1 / E). Layers are counted from 0.

    Raises `UserError`: a model without experts; no texts; texts without labels, or some without; a
    label with one value only; a sentence of two topics.
    """
    embedder.check_experts()
    if shuffles < 1:
        raise UserError(f"shuffles={shuffles} must be at least 1: they are what to compare with")
    groupings = {label: names for label in LABELS if (names := _label_names(texts, label))}
    if not groupings:
        raise UserError("no text says of which language or topic it is: nothing can be compared")
    units = {"language": np.arange(len(texts))}
    if "topic" in groupings:
        units["topic"] = _sentences(texts)
    counts_NYKE = count_choices(embedder, [t.text for t in texts], prompt, show_progress)
    model = embedder.model
    report = {
        "experts": model.num_experts,
        "experts_per_token": model.experts_per_token,
        "moe_layers": model.moe_layers,
        "prefix": embedder.prefix(prompt),
        "texts": len(texts),
        "tokens": int(counts_NYKE[:, 0, 0].sum()),
        "shuffles": shuffles,
        "seed": seed,
        "layers": _layers(counts_NYKE.sum(axis=(0, 2)), model.moe_layers),
    }
    for label, names in groupings.items():
        of_text = [getattr(text, label) for text in texts]
        label_N = np.array([names.index(name) for name in of_text])
        counts_AYKE = sum_by_label(counts_NYKE, label_N, len(names))
        groups = {
            name: {
                "texts": of_text.count(name),
                "tokens": int(counts_YKE[0, 0].sum()),
                "layers": _layers(counts_YKE.sum(axis=1), model.moe_layers),
            }
            for name, counts_YKE in zip(names, counts_AYKE, strict=True)
        }
        shuffle = label_N, units[label], shuffles, seed
        of_all = _information(counts_NYKE.sum(axis=2), model.experts_per_token, *shuffle)
        of_first = _information(counts_NYKE[:, :, 0], 1, *shuffle)
        information = [
            {"layer": layer, **one, "first_choice": first}
            for layer, one, first in zip(model.moe_layers, of_all, of_first, strict=True)
        ]
        report[label] = {"groups": groups, "information": information}
    return report


def shares(part: dict) -> np.ndarray:
    """Share of the assignments [Y, E] of a report, or of one of its groups."""
    return np.array([layer["share"] for layer in part["layers"]])


def _layers(assigned_YE: np.ndarray, layers: list[int]) -> list[dict]:
    share_YE = assigned_YE / np.maximum(assigned_YE.sum(axis=1, keepdims=True), 1)
    load_YE = share_YE * share_YE.shape[1]
    return [
        {
            "layer": layer,
            "share": share_E.tolist(),
            "load_max": float(load_E.max()),
            "load_min": float(load_E.min()),
            "effective_experts": float(effective_experts(share_E)),
        }
        for layer, share_E, load_E in zip(layers, share_YE, load_YE, strict=True)
    ]


def _information(counts_NYE, choices: int, label_N, unit_N, shuffles: int, seed: int) -> list[dict]:
    counts_AYE = sum_by_label(counts_NYE, label_N, int(label_N.max()) + 1)
    bits_Y = mutual_information(counts_AYE)
    shuffled_SY = shuffled_information(counts_NYE, label_N, unit_N, shuffles, seed)
    most = most_information(counts_AYE[:, 0].sum(axis=1), counts_NYE.shape[-1], choices)
    return [
        {
            "bits": float(bits),
            "most_bits": most,
            "of_most": float(bits / most) if most > 0 else None,
            "shuffled_mean": float(shuffled_S.mean()),
            "shuffled_max": float(shuffled_S.max()),
            "above_shuffled": float(bits - shuffled_S.mean()),
            "p": float((1 + (shuffled_S >= bits).sum()) / (1 + shuffles)),
        }
        for bits, shuffled_S in zip(bits_Y, shuffled_SY.T, strict=True)
    ]


def _label_names(texts: Sequence[LabelledText], label: str) -> list[str]:
    """The values of a label, sorted; none where no text has it."""
    of_text = [getattr(text, label) for text in texts]
    names = sorted({name for name in of_text if name is not None})
    if not names:
        return []
    if missing := of_text.count(None):
        raise UserError(
            f"{missing} of {len(texts)} texts have no {label}, the first is number "
            f"{of_text.index(None) + 1}: give all of them one, or none"
        )
    if len(names) == 1:
        raise UserError(
            f"all {len(texts)} texts are of {label} {names[0]!r}: add texts of another one to "
            f"compare with, or leave {label} out"
        )
    return names


def _sentences(texts: Sequence[LabelledText]) -> np.ndarray:
    """Of each text the number of the sentence that it renders, [N]."""
    number: dict[str, int] = {}
    topics: list[str | None] = []
    unit_N = []
    for text in texts:
        unit = len(topics) if text.id is None else number.setdefault(text.id, len(topics))
        if unit == len(topics):
            topics.append(text.topic)
        if topics[unit] != text.topic:
            raise UserError(
                f"texts of id {text.id!r} are of topics {topics[unit]!r} and {text.topic!r}: "
                "what has the same id says the same"
            )
        unit_N.append(unit)
    return np.array(unit_N)
