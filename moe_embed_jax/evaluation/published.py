"""Scores that others published, and the measures of ours that they may stand beside.

A measure lists the parts it is the mean of with the number of their documents: published rows are
shown only where ours has all parts, of that size. Percent. `source` says where a number is from;
`is_primary` is False where only a secondary source was at hand (a review of the paper), or somebody
else than the model's makers measured it.
"""

import dataclasses

import numpy as np

from moe_embed_jax.evaluation.suite import TaskResult

CARD = "model card of nomic-embed-text-v2-moe"
PAPER = "arXiv 2502.07972v3, by a review"
PORT = "a port's reference run"

# Documents; of CQADupStack's 12 forums together. BEIR's own statistics.
BEIR = {
    "MSMARCO": 8_841_823,
    "TRECCOVID": 171_332,
    "NFCorpus": 3_633,
    "NQ": 2_681_468,
    "HotpotQA": 5_233_329,
    "FiQA2018": 57_638,
    "ArguAna": 8_674,
    "Touche2020": 382_545,
    "CQADupstack": 457_199,
    "QuoraRetrieval": 522_931,
    "DBPedia": 4_635_922,
    "SCIDOCS": 25_657,
    "FEVER": 5_416_568,
    "ClimateFEVER": 5_416_593,
    "SciFact": 5_183,
}
# Passages, MIRACL's own statistics.
MIRACL = {
    "ar": 2_061_414,
    "bn": 297_265,
    "en": 32_893_221,
    "es": 10_373_953,
    "fa": 2_207_172,
    "fi": 1_883_509,
    "fr": 14_636_953,
    "hi": 506_264,
    "id": 1_446_315,
    "ja": 6_953_614,
    "ko": 1_486_752,
    "ru": 9_543_918,
    "sw": 131_924,
    "te": 518_079,
    "th": 542_166,
    "zh": 4_934_368,
}
SURPRISE = {"de": 15_866_222, "yo": 49_043}  # languages without training data

Part = tuple[str, str | None]  # task, and subset (None: all of its subsets)


@dataclasses.dataclass(frozen=True)
class PublishedScore:
    model: str
    width: int
    percent: float
    source: str
    is_primary: bool


@dataclasses.dataclass(frozen=True)
class Measure:
    """nDCG@10, the mean over `parts` (part -> documents)."""

    name: str
    parts: dict[Part, int]
    rows: tuple[PublishedScore, ...]

    def own(self, results: list[TaskResult], width: int | None) -> float | None:
        """Percent; None where the results are not the same measure."""
        by_name = {result.name: result for result in results}
        values = []
        for (task, name), documents in self.parts.items():
            if task not in by_name or by_name[task].main_score != "ndcg_at_10":
                return None
            result = by_name[task]
            subsets = [s for s in result.subsets if name in (None, s.name)]
            if sum(s.scores[width]["documents"] for s in subsets) != documents:
                return None
            values.append(np.mean([result.score(subset, width) for subset in subsets]))
        return 100 * float(np.mean(values))


def _measure(name: str, parts: dict[Part, int], source: str, is_primary: bool, *rows) -> Measure:
    return Measure(name, parts, tuple(PublishedScore(*row, source, is_primary) for row in rows))


def _miracl(languages: dict[str, int]) -> dict[Part, int]:
    return {("MIRACL", language): count for language, count in languages.items()}


# Models and widths of the card's table, with the means over BEIR and over MIRACL's 16 languages.
_CARD_ROWS = (
    ("Nomic Embed v2", 768, 52.86, 65.80),
    ("mE5 base", 768, 48.88, 62.30),
    ("mGTE base", 768, 51.10, 63.40),
    ("Arctic Embed v2 base", 768, 55.40, 59.90),
    ("mE5 large", 1024, 51.40, 66.50),
    ("Jina v3", 1024, 53.88, 61.20),
    ("BGE-M3", 1024, 48.80, 69.20),
    ("Arctic Embed v2 large", 1024, 55.65, 66.00),
)
# Of the paper's table of languages, the columns that are known.
_LANGUAGES = ("ar", "en", "fr", "hi", "ja", "ru", "zh")
_LANGUAGE_ROWS = {
    "Nomic Embed v2": (768, 76.7, 54.7, 55.8, 60.5, 67.0, 65.2, 59.5),
    "mE5 base": (768, 71.6, 51.2, 49.7, 58.4, 64.7, 61.5, 51.5),
    "mGTE base": (768, 71.4, 54.0, 54.5, 51.9, 65.8, 63.2, 61.8),
    "BGE-M3": (1024, 78.5, 56.9, 58.2, 59.5, 72.8, 70.1, 62.6),
}
# nDCG@10 of nomic-embed-text-v2-moe on XQuAD, questions and passages of one language.
_XQUAD = {"ar": 93.75, "de": 96.39, "en": 97.73, "es": 96.91, "ru": 95.55, "zh": 95.90}
_XQUAD |= {"el": 95.54, "hi": 95.16, "ro": 96.65, "th": 95.32, "tr": 95.20, "vi": 95.65}

_BEIR_PARTS = {(task, None): count for task, count in BEIR.items()}
MEASURES = (
    _measure(
        "BEIR, mean of 15 sets",
        _BEIR_PARTS,
        CARD,
        True,
        *((model, width, beir) for model, width, beir, _ in _CARD_ROWS),
    ),
    _measure("BEIR, mean of 15 sets", _BEIR_PARTS, PAPER, False, ("Nomic Embed v2", 256, 49.63)),
    *(
        _measure(
            task,
            {(task, None): BEIR[task]},
            PAPER,
            False,
            ("Nomic Embed v2", 768, full),
            ("Nomic Embed v2", 256, narrow),
        )
        for task, full, narrow in (
            ("QuoraRetrieval", 87.95, 87.49),
            ("SciFact", 72.89, 66.31),
            ("HotpotQA", 68.53, 63.67),
        )
    ),
    _measure(
        "MIRACL, mean of 16 languages",
        _miracl(MIRACL),
        CARD,
        True,
        *((model, width, miracl) for model, width, _, miracl in _CARD_ROWS),
    ),
    _measure(
        "MIRACL, mean of 18 languages",
        _miracl(MIRACL | SURPRISE),
        PAPER,
        False,
        ("Nomic Embed v2", 768, 66.0),
        ("mE5 base", 768, 62.2),
        ("mGTE base", 768, 63.6),
        ("BGE-M3", 1024, 69.2),
    ),
    *(
        _measure(
            f"MIRACL {language}",
            {("MIRACL", language): MIRACL[language]},
            PAPER,
            False,
            *((model, row[0], row[1 + i]) for model, row in _LANGUAGE_ROWS.items()),
        )
        for i, language in enumerate(_LANGUAGES)
    ),
    *(
        _measure(
            f"XQuAD {language}",
            {("XQuAD", f"{language}-{language}"): 240},
            PORT,
            False,
            ("Nomic Embed v2", 768, percent),
        )
        for language, percent in _XQUAD.items()
    ),
)
