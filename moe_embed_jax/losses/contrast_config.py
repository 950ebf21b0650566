"""The keys of the contrastive loss, as configs state them. Imports no jax."""

import dataclasses
import math
import numbers

from moe_embed_jax.errors import UserError

TERMS = ("q->d", "q->q", "d->d", "d->q")
FLOAT32, INT8, BINARY = FORMS = ("float32", "int8", "binary")  # of indexes, as in search/


@dataclasses.dataclass(frozen=True)
class ContrastConfig:
    """Keys of the contrastive loss; the defaults are the paper's.

    A pair i has a query q_i, its own document d_i and up to N hard negatives. Its negatives are two
    sets of texts, D_i among the documents and Q_i among the queries (`contents.py` says which).
    Scores s are cosines over the temperature. A term names the vector that scores and the texts
    that are scored: Z[q->d] = sum of exp s(q_i, d) over d in D_i, Z[d->q] = sum of exp s(d_i, q)
    over q in Q_i, and so on. With o = exp s(q_i, d_i) the loss of a pair is, for `partition`

    * "joint": `-log(o / (o + the sum of all terms))` (GTE, arXiv 2308.03281);
    * "separate": the mean of `-log(o / (o + Z[q->d] + Z[q->q]))` and
      `-log(o / (o + Z[d->q] + Z[d->d]))`. Terms that are not listed are left out, and so is the
      second part if none of its terms is listed. "q->d d->q" is the symmetric loss of CLIP.

    temperature: of the softmax; with `learn_temperature` the value at the start.
    learn_temperature: the caller's parameter `log_scale` (= -log temperature) is used instead,
      clipped so that the temperature stays in [temperature_min, temperature_max].
    terms: some of "q->d", "q->q", "d->d", "d->q", separated by blanks; "q->d" is always there.
    share_hard_negatives: True: hard negatives are negatives of every query of the batch (the
      reference code). False: of their pair's query alone (the paper's equation 3).
    margin: a text that scores more than this above s(q_i, d_i), in cosine units, is taken for a
      false negative and left out (Qwen3-Embedding, arXiv 2506.05176, has 0.1). None: no text is.
    margin_hard_negatives: False: a pair's own hard negatives stay, however high they score: for
      negatives that people or a cross-encoder chose.
    hard_negatives_only: sources, separated by blanks, whose queries are compared with their own
      hard negatives and nothing else of the batch: where the documents of other queries may be
      right answers (labels, paraphrases).
    positives: "own": o is that of the own document. "all": o is the sum over the distinct right
      answers in the batch, the own documents of every copy of the query (MIL-NCE, arXiv
      1912.06430): for queries with several answers, which "own" asks for one by one.
    spread: weight of the spread-out regulariser (GOR, arXiv 1708.06320; in the form of
      EmbeddingGemma, arXiv 2509.20354): the mean of (x_i . x_j)^2 over i != j for the distinct
      queries of a batch, plus the same for its distinct own documents, all of unit length.
    dims: Matryoshka widths and weights, {"768": 1.0, "256": 1.0}: vectors are cut, then normalised,
      and the loss is the weighted sum over widths; None: the full width, weight 1.
    quantisation: forms of vectors and weights, {"float32": 1.0, "int8": 1.0, "binary": 1.0}: each
      width is compared as a compressed index of that form scores it (`quantisation.py`), and the
      loss is the weighted sum over widths and forms; None: float32, weight 1.
    """

    temperature: float = 0.02
    learn_temperature: bool = False
    temperature_min: float = 0.01
    temperature_max: float = 1.0
    terms: str = "q->d"
    partition: str = "joint"
    share_hard_negatives: bool = True
    margin: float | None = None
    margin_hard_negatives: bool = True
    hard_negatives_only: str = ""
    positives: str = "own"
    spread: float = 0.0
    dims: dict[str, float] | None = dataclasses.field(default=None, hash=False)
    quantisation: dict[str, float] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise UserError(f"loss.temperature={self.temperature} must be above 0")
        if not 0 < self.temperature_min <= self.temperature_max < math.inf:
            raise UserError(
                f"loss.temperature_min={self.temperature_min} must be above 0 and at most "
                f"loss.temperature_max={self.temperature_max}"
            )
        if self.learn_temperature and not (
            self.temperature_min <= self.temperature <= self.temperature_max
        ):
            raise UserError(
                f"loss.temperature={self.temperature} must lie between loss.temperature_min="
                f"{self.temperature_min} and loss.temperature_max={self.temperature_max}"
            )
        terms = self.terms.split()
        if unknown := [term for term in terms if term not in TERMS]:
            raise UserError(f"loss.terms={self.terms!r}: {unknown[0]!r} is not one of {TERMS}")
        if "q->d" not in terms or len(set(terms)) < len(terms):
            raise UserError(f"loss.terms={self.terms!r} must have 'q->d', and each term once")
        if self.partition not in ("joint", "separate"):
            raise UserError(f"loss.partition={self.partition!r}: choose 'joint' or 'separate'")
        if self.margin is not None and not _is_number(self.margin, least=0.0):
            raise UserError(f"loss.margin={self.margin!r} must be a number of at least 0, or None")
        if not self.margin_hard_negatives and self.margin is None:
            raise UserError("loss.margin_hard_negatives=False needs loss.margin, which is None")
        if self.positives not in ("own", "all"):
            raise UserError(f"loss.positives={self.positives!r}: choose 'own' or 'all'")
        if not _is_number(self.spread, least=0.0):
            raise UserError(f"loss.spread={self.spread!r} must be 0 (off) or more")
        if self.dims is not None:
            _check_dims(self.dims)
            dims = {str(width): float(weight) for width, weight in dict(self.dims).items()}
            object.__setattr__(self, "dims", dims)  # as JSON keeps it
        if self.quantisation is not None:
            _check_forms(self.quantisation)
            weights = {form: float(weight) for form, weight in dict(self.quantisation).items()}
            object.__setattr__(self, "quantisation", weights)

    def has(self, term: str) -> bool:
        return term in self.terms.split()

    def widths(self, full: int) -> list[tuple[int, float]]:
        """(width, weight), widest first; raises `UserError` for a width above `full`."""
        if self.dims is None:
            return [(full, 1.0)]
        widths = sorted(((int(k), weight) for k, weight in self.dims.items()), reverse=True)
        if widths[0][0] > full:
            raise UserError(f"loss.dims: {widths[0][0]} is wider than the embeddings ({full})")
        return widths

    def forms(self) -> list[tuple[str, float]]:
        """(form, weight) of the vectors that are compared, float32 first."""
        if self.quantisation is None:
            return [(FLOAT32, 1.0)]
        return [(form, self.quantisation[form]) for form in FORMS if form in self.quantisation]


def _is_number(value, least: float) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and least <= value < math.inf


def _check_dims(dims) -> None:
    for width, weight in dict(dims).items():
        if not (str(width).isdecimal() and int(width) > 0 and _is_number(weight, least=0.0)):
            raise UserError(
                f"loss.dims: {width!r}: {weight!r} must be a width above 0 and a weight of at "
                'least 0, as in {"768": 1.0, "256": 1.0}'
            )
    if not any(dict(dims).values()):
        raise UserError(f"loss.dims={dims}: no width has a weight above 0")


def _check_forms(quantisation) -> None:
    for form, weight in dict(quantisation).items():
        if form not in FORMS:
            raise UserError(f"loss.quantisation: {form!r} is not one of {FORMS}")
        if not _is_number(weight, least=0.0) or not weight:
            raise UserError(
                f"loss.quantisation: {form!r}: {weight!r} must be a weight above 0; leave out a "
                "form that is not to be trained"
            )
    if not dict(quantisation):
        raise UserError("loss.quantisation={} has no form: give None for float32 alone")
