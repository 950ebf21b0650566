"""What a runtime answered, held against ours: right, or wrong and why."""

import dataclasses

import numpy as np

from moe_embed_jax.interop.verify.golden import EMPTY, LONG, MARKUP, Golden
from moe_embed_jax.interop.verify.known import TOLERANCE

CUT_ELSEWHERE = 0.999  # cosine from which another cut of the long text is no fault


@dataclasses.dataclass
class Result:
    """Answers to the golden texts.

    Attributes:
      version: of the runtime.
      ids: of every text; None where the runtime does not show them.
      vectors: float32 [texts, width]; a row of NaN where a text was refused.
      ms: the median of a single text.
      refused: place of a text -> what the runtime said.
    """

    version: str
    ids: list[list[int]] | None
    vectors: np.ndarray
    ms: float
    refused: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Comparison:
    """`wrong`: why, in one sentence; "": nothing is wrong. Numbers are None where nothing compares.

    `note`: what is not wrong, and a user should know.
    """

    equal_ids: str
    max_abs: float | None
    cosine: float | None
    wrong: str
    note: str


def compare(
    texts: list[Golden], ours: Result, theirs: Result, precision: str = "float32"
) -> Comparison:
    """`precision`: one of TOLERANCE, what `theirs` was computed in.

    What differs in the markup text alone, by its ids, is noted and left out of the numbers; so is
    another cut of a long text that hardly changes its vector. One that changes it is wrong, and is
    left out of the numbers too.
    """
    refused = {texts[i].name: reason for i, reason in theirs.refused.items()}
    notes = [f"refuses the {name} text ({said:.80})" for name, said in refused.items()]
    answered = [i for i in range(len(texts)) if i not in theirs.refused]
    other_ids = [] if theirs.ids is None else [i for i in answered if _differ(ours, theirs, i)]
    equal_ids = "-" if theirs.ids is None else f"{len(answered) - len(other_ids)}/{len(answered)}"

    def wrong(reason):
        return Comparison(equal_ids, None, None, reason, "; ".join(notes))

    if theirs.vectors.shape != ours.vectors.shape:
        shapes = f"{list(theirs.vectors.shape)} instead of {list(ours.vectors.shape)}"
        return wrong(f"vectors have the shape {shapes}")
    if not answered:
        return wrong("it refuses all texts")
    if not np.isfinite(theirs.vectors[answered]).all():
        return wrong("vectors hold NaN or infinite numbers")
    norm_N = np.linalg.norm(theirs.vectors, axis=1)
    cosine_N = np.sum(theirs.vectors * ours.vectors, 1) / np.maximum(norm_N, 1e-12)
    difference_N = np.abs(theirs.vectors - ours.vectors).max(1)
    longest = max(map(len, ours.ids))  # of a text that was cut
    badly_cut = []
    for i in other_ids.copy():
        if texts[i].name == MARKUP:
            notes.append("reads markup such as <s> in a text as control tokens")
        elif len(ours.ids[i]) == longest and cosine_N[i] >= CUT_ELSEWHERE:
            cut = f"cuts {texts[i].name} at another token (cosine {cosine_N[i]:.5f})"
            notes.append(cut)
        elif len(ours.ids[i]) == longest:
            badly_cut.append(i)
        else:
            continue
        other_ids.remove(i)
        answered.remove(i)
    if not answered:
        return wrong("its token ids differ in all texts")
    max_abs, cosine = float(difference_N[answered].max()), float(cosine_N[answered].min())
    comparison = Comparison(equal_ids, max_abs, cosine, "", "; ".join(notes))
    most, least = TOLERANCE[precision]
    off = [i for i in answered if cosine_N[i] < least or (most and difference_N[i] > most)]
    names = [texts[i].name for i in off]
    if others := [name for name in refused if name not in (LONG, EMPTY)]:
        comparison.wrong = f"it refuses {_some(others)}: {refused[others[0]]:.120}"
    elif other_ids:
        which = _some([texts[i].name for i in other_ids])
        comparison.wrong = f"token ids differ in {which}, lowest cosine {cosine:.4f}"
    elif np.abs(norm_N[answered] - 1).max() > 1e-2:
        least, most = norm_N[answered].min(), norm_N[answered].max()
        comparison.wrong = f"vectors have lengths from {least:.3f} to {most:.3f}, not 1"
    elif names == [LONG]:
        comparison.wrong = f"only the long text differs (cosine {cosine:.4f}): it is cut elsewhere"
    elif names:
        equal = "" if theirs.ids is None else "although the token ids are equal "
        comparison.wrong = (
            f"vectors differ {equal}in {_some(names)}: largest difference {max_abs:.1e}, lowest "
            f"cosine {cosine:.5f}, {precision} allows {least}"
        )
    elif badly_cut:
        least, which = cosine_N[badly_cut].min(), _some([texts[i].name for i in badly_cut])
        comparison.wrong = (
            f"it cuts {which} at another token, lowest cosine {least:.4f}: give it texts of fewer "
            f"than {longest} tokens, prefix and special tokens included"
        )
    return comparison


def _differ(ours: Result, theirs: Result, i: int) -> bool:
    return list(ours.ids[i]) != list(theirs.ids[i])


def _some(names: list[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:3])
    return f"{shown} and {len(names) - 3} more texts" if len(names) > 3 else shown
