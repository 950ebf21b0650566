"""What findings.py trains and compares: settings, arms, findings. Nothing here runs anything.

An arm is a setting with a few keys changed. Arms that several findings use are one run.
"""

import dataclasses

SETS = (
    *(f"descriptions/{language}" for language in ("de", "en", "ru")),
    *(f"translations/{language}" for language in ("he", "ja", "ko", "nl", "vi", "zh-Hans")),
)
FEW_SETS = ("descriptions/de", "translations/bg", "translations/ko", "translations/vi")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the arms of a kind have in common, on the page configs/quickstart.py.

    steps: of a whole run.
    width: of the model; a third of it is the narrow width that is evaluated too.
    sets: held-out sets of the default data that judge it.
    languages, every: the languages of XQuAD, and of its queries every how many; none: not judged
      by XQuAD.
    """

    steps: int
    width: int
    sets: tuple[str, ...]
    languages: str
    every: int
    config: dict
    evaluations: int = 2  # on the way, in runs that are cheap to judge

    @property
    def narrow(self) -> int:
        return self.width // 3


NEVER_STOP = {"health.stop_on_collapse": False}  # a collapsed router is a finding here
SCRATCH = NEVER_STOP | {"batch_size": 128, "model.num_layers": 4}  # twice the quickstart's layers
SETTINGS = {
    "scratch": Setting(
        steps=100,
        width=128,
        sets=SETS,
        languages="ar de en es ru zh",
        every=2,
        config=SCRATCH,
    ),
    # Long runs on given pairs, whose teacher's vectors lie beside them (--pairs).
    "pairs": Setting(
        steps=800,
        width=128,
        sets=SETS,
        languages="ar de en es ru zh",
        every=2,
        config=SCRATCH | {"data.rates": None},
        evaluations=8,
    ),
    # A few steps of the same training: what matters is whether the losses are equal.
    "curves": Setting(
        steps=20,
        width=128,
        sets=("translations/vi",),
        languages="",
        every=1,
        config=SCRATCH | {"optimizer.warmup_steps": 5},
    ),
    # multilingual-e5-small trained further, on the shorter texts: 21 M parameters in its layers.
    "upcycled": Setting(
        steps=30,
        width=384,
        sets=FEW_SETS,
        languages="de en zh",
        every=5,
        config=NEVER_STOP
        | {
            "batch_size": 64,
            "data.rates": {"translations": 0.7, "descriptions": 0.3},
            "optimizer.peak_learning_rate": 5e-5,
            "optimizer.warmup_steps": 5,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """
    text: what it is, for the report.
    changes: keys of the config.
    devices: fake CPU devices that share the batch.
    """

    setting: str
    text: str
    changes: dict
    devices: int = 1


FOUR = 4  # devices of the arms about balance: 32 pairs each
EXPERTS = {
    "dense": ("dense", {"model.moe_every": 0}),
    "dense-wide": ("dense, 1.5 times as wide", {"model.moe_every": 0, "model.ffn_width": 384}),
    "top-1": ("8 experts, top-1", {"model.experts_per_token": 1}),
    "top-2": ("8 experts, top-2", {}),
    "top-2-all": (
        "top-2, the router's gradient of all experts",
        {"model.router_gradient": "dense"},
    ),
}
TAUGHT = {"loss.distillation.vectors": 1.0}  # data.teacher is given with --pairs
ARMS = {
    **{f"pairs-{name}": Arm("pairs", text, keys) for name, (text, keys) in EXPERTS.items()},
    **{
        f"taught-{name}": Arm("pairs", f"{text}; distilled", keys | TAUGHT)
        for name, (text, keys) in EXPERTS.items()
    },
    # What a token uses is as wide as in top-2: 512 hidden units.
    "pairs-small-experts": Arm(
        "pairs",
        "16 experts of half the width, top-4",
        {"model.num_experts": 16, "model.experts_per_token": 4, "model.ffn_width": 128},
    ),
    "pairs-shared": Arm(
        "pairs",
        "16 experts of half the width, top-2, and a shared one of 256 units",
        {"model.num_experts": 16, "model.ffn_width": 128, "model.shared_expert_width": 256},
    ),
    "top-2": Arm("scratch", "8 experts, top-2, every second layer", {}),
    "top-1": Arm("scratch", "8 experts, top-1, every second layer", {"model.experts_per_token": 1}),
    "dense": Arm("scratch", "dense; active parameters of top-1", {"model.moe_every": 0}),
    "dense-wide": Arm(
        "scratch",
        "dense, feed-forward 1.5 times as wide; active parameters of top-2",
        {"model.moe_every": 0, "model.ffn_width": 384},
    ),
    "every-layer": Arm("scratch", "top-2 experts in every layer", {"model.moe_every": 1}),
    "every-layer-slim": Arm(
        "scratch",
        "top-2 in every layer, experts 3/4 as wide; active parameters of top-2",
        {"model.moe_every": 1, "model.ffn_width": 192},
    ),
    "matryoshka": Arm(
        "scratch",
        "top-2, loss at full width and at a third",
        {"loss.dims": {"128": 1.0, "42": 1.0}},
    ),
    "balance-0": Arm("scratch", "no balance loss", {"loss.balance": 0.0}, FOUR),
    **{
        f"{over}-{coefficient:g}": Arm(
            "scratch",
            f"balance over the {over}, coefficient {coefficient:g}",
            {"loss.balance_over": over, "loss.balance": coefficient},
            FOUR,
        )
        for over in ("batch", "device")
        for coefficient in (0.1, 1.0)
    },
    "packed": Arm("curves", "up to 8 texts share a row of 64 tokens", {}),
    "padded": Arm("curves", "every text has its own row", {"data.texts_per_row": 1}),
    "chunked": Arm("curves", "packed, 16 rows at a time (GradCache)", {"data.chunk_rows": 16}),
    "e5-dense": Arm("upcycled", "multilingual-e5-small as it is", {}),
    "e5-top-1-paper": Arm(
        "upcycled",
        "upcycled as in the reference code, top-1; active parameters of e5-dense",
        {"init.upcycle": "paper", "model.experts_per_token": 1},
    ),
    "e5-top-2-paper": Arm(
        "upcycled", "upcycled as in the reference code, top-2", {"init.upcycle": "paper"}
    ),
    "e5-top-2-preserving": Arm(
        "upcycled", "upcycled, preserving the function, top-2", {"init.upcycle": "preserving"}
    ),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """
    name: of its files in the report.
    comparisons: (arm, other arm, what differs); reported as arm - other.
    notes: what a reader must know that no number says.
    also: what a column's name holds that is judged beside the two of the whole vectors.
    """

    name: str
    title: str
    arms: tuple[str, ...]
    comparisons: tuple[tuple[str, str, str], ...]
    notes: str = ""
    also: str | None = None

    def judges(self, column: str) -> bool:
        return column in ("held-out", "XQuAD") or bool(self.also and self.also in column)


E5_NOTE = (
    "Upcycled arms start from multilingual-e5-small. Mode `preserving` needs at least two experts "
    "per token (with one, its gate would always be 1 and the router would not learn), so top-1 is "
    "upcycled in mode `paper`. A dense e5 with the active parameters of top-2 does not exist: "
    "against e5-dense, top-2 has more."
)
FINDINGS = {
    "a": Finding(
        "dense_vs_moe",
        "Dense against top-1 against top-2",
        (
            *("dense", "top-1", "dense-wide", "top-2"),
            *("e5-dense", "e5-top-1-paper", "e5-top-2-preserving"),
        ),
        (
            ("top-1", "dense", "equal active parameters"),
            ("top-2", "dense-wide", "equal active parameters"),
            ("top-2", "top-1", "equal total parameters"),
            ("top-2", "dense", "equal layers, top-2 computes more"),
            ("e5-top-1-paper", "e5-dense", "equal active parameters"),
            ("e5-top-2-preserving", "e5-dense", "equal start, top-2 computes more"),
        ),
        E5_NOTE,
    ),
    "b": Finding(
        "upcycling",
        "Upcycling: `paper` against `preserving`",
        ("e5-dense", "e5-top-2-paper", "e5-top-2-preserving"),
        (
            ("e5-top-2-paper", "e5-top-2-preserving", "the rule"),
            ("e5-top-2-paper", "e5-dense", "experts"),
            ("e5-top-2-preserving", "e5-dense", "experts"),
        ),
        "`at the start` is the model before its first step: what upcycling broke or kept.",
        also="at the start",
    ),
    "c": Finding(
        "balance",
        "Balance over the batch or over each device; coefficient 0, 0.1, 1",
        ("balance-0", "batch-0.1", "batch-1", "device-0.1", "device-1"),
        (
            ("batch-0.1", "balance-0", "coefficient"),
            ("batch-1", "balance-0", "coefficient"),
            ("batch-1", "batch-0.1", "coefficient"),
            ("device-0.1", "batch-0.1", "statistic"),
            ("device-1", "batch-1", "statistic"),
        ),
        f"All arms share their batches among {FOUR} devices, so that only the statistic differs. "
        "Each batch has one source and one language, as always.",
    ),
    "d": Finding(
        "moe_layers",
        "Experts in every layer or in every second one",
        ("top-2", "every-layer-slim", "every-layer"),
        (
            ("every-layer-slim", "top-2", "equal active parameters"),
            ("every-layer", "top-2", "every layer has more parameters, active and total"),
        ),
    ),
    "e": Finding(
        "matryoshka",
        "Matryoshka on and off, at full width and at a third",
        ("top-2", "matryoshka"),
        (("matryoshka", "top-2", "the loss"),),
        "Without Matryoshka the vectors are also cut to the first third of the features.",
        also="features",
    ),
    "f": Finding(
        "packing_chunking",
        "Packed or padded, in chunks or not: the same losses",
        ("packed", "padded", "chunked"),
        (("padded", "packed", "rows"), ("chunked", "packed", "chunks")),
        "Only the losses of these runs are compared.",
    ),
    "g": Finding(
        "where_experts_win",
        "Where experts win: longer runs, a teacher, smaller or shared experts",
        (
            *(f"{kind}-{name}" for kind in ("pairs", "taught") for name in EXPERTS),
            *("pairs-small-experts", "pairs-shared"),
        ),
        (
            *(
                (f"{kind}-{arm}", f"{kind}-{other}", what)
                for kind in ("pairs", "taught")
                for arm, other, what in (
                    ("top-1", "dense", "equal active parameters"),
                    ("top-2", "dense-wide", "equal active parameters"),
                    ("top-2", "top-1", "equal total parameters"),
                    ("top-2-all", "top-2", "the router's gradient"),
                )
            ),
            ("taught-dense", "pairs-dense", "the teacher"),
            ("taught-top-2", "pairs-top-2", "the teacher"),
            ("pairs-small-experts", "pairs-top-2", "smaller experts, as many active numbers"),
            ("pairs-shared", "pairs-top-2", "a shared expert, as many active numbers"),
        ),
        "At equal wall time: every run is judged at the time when the fastest arm of its seed was "
        "done, between its own evaluations on the way. Runs one at a time (--jobs=1) on an idle "
        "machine.",
        also="equal wall time",
    ),
}


def home(arm: str) -> str:
    """The finding in whose folder the arm's runs are."""
    return next(finding.name for finding in FINDINGS.values() if arm in finding.arms)


def arms_of(findings: list[str]) -> list[str]:
    """The arms of these findings, each once."""
    return list(dict.fromkeys(arm for key in findings for arm in FINDINGS[key].arms))
