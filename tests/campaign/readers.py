"""Readers in this process: files are damaged or changed, then read, and what came is compared."""

import dataclasses
import itertools
import json
import pathlib
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable

import jax
import numpy as np
from campaign import damage, outcome
from campaign.world import World
from helpers import evaluation_data, synthetic_data

from moe_embed_jax import config as config_files
from moe_embed_jax.checksums import take_own
from moe_embed_jax.data.data_spec import held_out_path
from moe_embed_jax.data.token_store import TokenStore
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.heldout import load_heldout
from moe_embed_jax.evaluation.pseudo_perplexity import load_documents
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.training import workdir
from moe_embed_jax.training.run_config import RUN_CONFIGS


@dataclasses.dataclass(frozen=True)
class Reader:
    """part: of the world, or a file in it. read: of its path, to anything that `digest` takes.

    written: the project wrote these files and can tell a change: another result is a loss.
    skip: parts of names of files that are left alone.
    retype: half of the attempts write a column of another Arrow type.
    named: further results that are right where a line says why.
    """

    part: str
    read: Callable[[pathlib.Path], object]
    written: bool = False
    skip: tuple[str, ...] = ()
    retype: bool = False
    named: Callable[[pathlib.Path], list] | None = None


def attempt(world: World, name: str, seed: int, scratch: pathlib.Path) -> outcome.Outcome:
    """Copies the input to `scratch`, damages it by the seed, reads it."""
    reader = READERS[name]
    part, _, inner = reader.part.partition("/")
    source = world.part(part)
    rng = random.Random(f"{name} {seed}")
    folder = scratch / part
    if inner:  # one file alone
        folder.mkdir(parents=True)
        shutil.copy(source / inner, folder)
        inner = pathlib.Path(inner).name
    else:
        shutil.copytree(source, folder, symlinks=True)
        if (file := folder / "sources.json").is_file():  # it names the files beside it
            file.write_text(file.read_text().replace(str(source), str(folder)))
    outside = scratch / "outside"
    change = damage.damage if reader.written else damage.fuzz
    if reader.retype and rng.random() < 0.5:
        done = damage.retype(rng, folder / inner)
    else:
        done = change(rng, folder, outside, reader.skip)
    outcome.write_input(scratch, {"area": name, "seed": seed, "done": done})
    before = set(scratch.iterdir())
    expected = pristine(world, name)
    if reader.named and name not in _NAMED:
        _NAMED[name] = [outcome.digest(result) for result in reader.named(source)]
    named = _NAMED.get(name, ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = outcome.judge(lambda: reader.read(folder / inner), expected, reader.written, named)
    if set(scratch.iterdir()) != before:
        new = ", ".join(path.name for path in set(scratch.iterdir()) - before)
        result = outcome.Outcome(outcome.LOST, f"wrote outside its folder: {new}")
    elif "escape:" in done and outside.is_dir() and result.kind in (outcome.SAME, outcome.ACCEPTED):
        result = outcome.Outcome(outcome.LOST, "read a file outside its folder")
    return outcome.Outcome(result.kind, f"{done}\n{result.detail}".strip())


_DIGESTS: dict[str, str] = {}
_NAMED: dict[str, list[str]] = {}


def pristine(world: World, name: str) -> str:
    """Digest of the undisturbed reading, which has to be the same twice."""
    if name not in _DIGESTS:
        reader = READERS[name]
        part, _, inner = reader.part.partition("/")
        path = world.part(part) / inner
        _DIGESTS[name] = outcome.digest(reader.read(path))
        if outcome.digest(reader.read(path)) != _DIGESTS[name]:
            raise RuntimeError(f"{name}: two undisturbed readings differ")
    return _DIGESTS[name]


# ---- What the project wrote itself ---------------------------------------------------------------


def store(path):
    """Token stores, as training opens and reads them."""
    found = []
    for folder in sorted(path.iterdir()):
        opened = TokenStore.open(folder)
        found.append((opened.read(np.arange(len(opened))), opened.groups, opened.spec))
    return found


def data_folder(path):
    """What a run of each objective takes of a prepared data folder, and how it takes it."""
    found = []
    for text, held_out in (
        (synthetic_data.config_text(path), lambda config: load_heldout(path)),
        (synthetic_data.masked_config_text(path), _documents),
    ):
        page = path.with_name("page.py")
        page.write_text(text)
        config = config_files.load(RUN_CONFIGS, str(page), {})
        page.unlink()
        store, vocabulary = workdir.open_data(path.parent, config, write=False)
        rows = store.read(np.arange(len(store)))
        found.append((rows, vocabulary.encode_texts(TEXTS, 64), held_out(config)))
    return found


def _documents(config):
    return load_documents(held_out_path(config.data.preparation(), config.data.dir))


def pairs(path):
    folder = PairFolder(path)
    folder.verify()
    return folder.read(np.arange(len(folder))), folder.lengths(), sorted(folder.groups.items())


def vectors(path):
    from moe_embed_jax.search.vectors import VectorStore

    return VectorStore(path)[:]


def teacher(path):
    from helpers.stand_in_teacher import pair

    from moe_embed_jax.data.teacher_vectors import TeacherVectors
    from moe_embed_jax.tokenizers.vocabulary import content_ids

    rows = [pair(i) for i in range(40)]
    texts = [content_ids([r[column] for r in rows]) for column in (0, 1)]
    used, numbers = np.ones(len(rows), bool), np.arange(len(rows))
    with tempfile.TemporaryDirectory() as copy:
        found = TeacherVectors(path, copy, np.stack(texts, axis=1), used, texts[1][:5])
        return [found.queries(numbers), found.documents(numbers), found.negatives(numbers[:5])]


def steps(path):
    """The models of all checkpoints of a run."""
    return [embedder(path, int(p.name)) for p in (path / "checkpoints").iterdir()]


TEXTS = ["", "babe bibo", "x <s> y\u0301 \U0001f600", "query: " * 40]


def embedder(path, step=None):
    """A model folder as users load it: weights, token ids, prompts, lengths."""
    from moe_embed_jax import Embedder

    loaded = Embedder.load(path, step)
    ids = [loaded.tokenize(TEXTS, prompt) for prompt in ("query", "document", None)]
    leaves = jax.tree_util.tree_leaves_with_path(loaded.params)
    arrays = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    vectors_ND = loaded.encode(TEXTS[:2])
    if not np.isfinite(vectors_ND).all():
        raise AssertionError("vectors that are not finite, without a word")
    return arrays, ids, sorted(loaded.prompts.items()), loaded.max_lengths, loaded.model


# ---- What users bring ----------------------------------------------------------------------------


def opened_model(path):
    """A published folder, read and placed; without the compilation of each architecture."""
    from moe_embed_jax.mesh import single_device_mesh
    from moe_embed_jax.model_folder import open_model

    opened = open_model(path)
    ids = opened.vocabulary.encode_texts(TEXTS, 32) if opened.vocabulary else None
    loaded = opened.load(single_device_mesh())
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(loaded.params)]
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise AssertionError("weights that are not finite, without a word")
    return leaves, ids, sorted(opened.prompts.items()), opened.max_lengths, opened.model


def tokenizer(path):
    from moe_embed_jax.tokenizers.files import load_tokenizer

    if path.is_dir():
        raise UserError(f"{path} is a folder")  # a folder without a tokenizer has none, rightly
    vocabulary = load_tokenizer(path)
    return vocabulary.encode_texts(TEXTS, 64), vocabulary.size, vocabulary.pad_id


def texts(path):
    from moe_embed_jax.data.text_files import read_texts

    return list(read_texts(path))


def beir(path):
    from moe_embed_jax.evaluation.beir import load_beir
    from moe_embed_jax.evaluation.model_scores import score_bm25

    return score_bm25([{"set": load_beir(path)}])


def suite(path):
    from moe_embed_jax.evaluation.suite import check_files, load_suite, run_tasks

    tasks = load_suite(str(path / "suite.py"))
    check_files(tasks, path)
    vectors = evaluation_data.text_vectors(path / "cache")
    return [(r.name, r.revision, r.subsets) for r in run_tasks(tasks, path, vectors)]


def labelled(path):
    from moe_embed_jax.evaluation.labelled_texts import read_labelled

    return read_labelled([path])


def raw(path):
    """Every part of every source, row by row: bad rows are named, not raised."""
    from moe_embed_jax.preparation.beam.input_files import read_part
    from moe_embed_jax.preparation.beam.read import Bad
    from moe_embed_jax.preparation.beam.sources import find_parts, read_sources

    sources = read_sources(str(path / "sources.json"))
    rows = []
    for part in find_parts(sources):
        rows += [tuple(r) for r in itertools.islice(read_part(sources[part.source], part), 2000)]
    assert all(row[-2] for row in rows if isinstance(row, Bad))
    return [row for row in rows if not isinstance(row, Bad)]


def columns(path):
    """The records of a Parquet or Arrow file, as preparation reads them."""
    from moe_embed_jax.preparation.beam.input_files import read_part
    from moe_embed_jax.preparation.beam.read import Good
    from moe_embed_jax.preparation.beam.sources import Part, Source

    if not path.is_file():
        raise UserError(f"{path} is no file")  # preparation lists what there is before it reads
    source = Source("columns", "pairs", (("en", str(path)),), language="en")
    rows = read_part(source, Part(0, str(path), "en", 1))
    return [tuple(row) for row in rows if isinstance(row, Good)]


def config(path):
    """A page of a config that gives the changed values of a card."""
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict):
            take_own(values)
        text = repr(values)
    except (ValueError, RecursionError, OSError):
        raise UserError(f"{path} gives no values") from None  # and so is no test of a page
    page = path.with_name("page.py")
    page.write_text(f"nan = inf = 0\n\n\ndef get_config(variant=''):\n    return {text}\n")
    loaded = config_files.load(RUN_CONFIGS, str(page), {})
    page.unlink()
    return dataclasses.asdict(loaded)


READERS = {
    "damage/store": Reader("tokens", store, written=True),
    "damage/data": Reader("data", data_folder, written=True),
    "damage/pairs": Reader("pairs", pairs, written=True),
    "damage/vectors": Reader("vectors", vectors, written=True),
    "damage/teacher": Reader("teacher", teacher, written=True),
    "damage/import": Reader("imported", embedder, written=True),
    "damage/run": Reader(
        "run", embedder, written=True, skip=("report", "tensorboard", "png"), named=steps
    ),
    "fuzz/export": Reader("exported", opened_model),
    "fuzz/nomic": Reader("model", opened_model),
    "fuzz/xlmr": Reader("xlmr", opened_model),
    "fuzz/tokenizer_json": Reader("xlmr/tokenizer.json", tokenizer),
    "fuzz/sentencepiece": Reader("model/sentencepiece.model", tokenizer),
    "fuzz/jsonl": Reader("texts/texts.jsonl", texts),
    "fuzz/gzip": Reader("texts/packed.jsonl.gz", texts),
    "fuzz/txt": Reader("texts/plain.txt", texts),
    "fuzz/labelled": Reader("texts/texts.jsonl", labelled),
    "fuzz/beir": Reader("beir", beir),
    "fuzz/suite": Reader("sets", suite, skip=(".py", "cache")),
    "fuzz/raw": Reader("raw", raw),
    "fuzz/parquet": Reader("columns/rows.parquet", columns, retype=True),
    "fuzz/arrow": Reader("columns/saved.arrow", columns, retype=True),
    "fuzz/config": Reader("run/config.json", config),
}
