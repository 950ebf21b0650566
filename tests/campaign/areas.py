"""The names of all areas, in a module that imports nothing heavy."""

READERS = (
    *(
        "damage/store",
        "damage/data",
        "damage/pairs",
        "damage/vectors",
        "damage/teacher",
        "damage/import",
        "damage/run",
    ),
    *("fuzz/export", "fuzz/nomic", "fuzz/xlmr", "fuzz/tokenizer_json", "fuzz/sentencepiece"),
    *("fuzz/jsonl", "fuzz/gzip", "fuzz/txt", "fuzz/labelled", "fuzz/beir", "fuzz/suite"),
    *("fuzz/raw", "fuzz/parquet", "fuzz/arrow", "fuzz/config"),
)
COMMANDS = (
    *("train", "train_masked", "train_4_devices", "train_2_processes", "embed_npy", "embed_zarr"),
    *("filter", "mine", "evaluate", "suite", "import", "upcycle", "export", "prepare", "recipe"),
)
SMALL = tuple(name for name in COMMANDS if name not in ("recipe", "train_2_processes"))
AREAS = (
    *READERS,
    *(f"kill/{name}" for name in COMMANDS if name != "recipe"),
    *(f"disk/{name}" for name in SMALL),
    *(f"race/{name}" for name in (*SMALL, "load")),
    *(f"again/{name}" for name in SMALL if name not in ("embed_npy", "evaluate")),
    "kill/recipe",  # the slowest comes last
)
WEIGHTS = {"kill": 3, "disk": 2, "race": 1, "again": 2, "damage": 1, "fuzz": 2}  # of the time

# Fixed attempts of the suite: {area: seeds}. Inputs of `fuzz` cost milliseconds each.
QUICK = {
    **{f"fuzz/{name}": range(15) for name in ("jsonl", "gzip", "txt", "labelled", "beir")},
    **{f"fuzz/{name}": range(15) for name in ("nomic", "xlmr", "tokenizer_json", "sentencepiece")},
    **{f"fuzz/{name}": range(15) for name in ("suite", "raw")},
    **{f"fuzz/{name}": range(8) for name in ("parquet", "arrow")},
    **{f"damage/{name}": range(15) for name in ("store", "data", "pairs", "vectors")},
    "damage/teacher": range(15),
    "kill/embed_zarr": (3,),
}
