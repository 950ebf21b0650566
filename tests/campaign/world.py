"""The small inputs of the campaign, each made once, undisturbed, when it is first asked for."""

import contextlib
import fcntl
import gzip
import json
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from campaign import xlmr_folder
from helpers import evaluation_data, published_models, raw_sources, synthetic_data
from helpers.labelled_model import write_model
from helpers.stand_in_teacher import StandInTeacher, pair

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RUN = dict(steps=12, eval_every=6, checkpoint_every=4, data=synthetic_data.ONE_ROW_COUNT)


class World:
    """`world.part(name)`: the path of an input under `folder`; processes may share a folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, name: str) -> pathlib.Path:
        path = self.folder / name
        if not (self.folder / f".{name}.made").exists():
            for needed in NEEDS.get(name, ()):
                self.part(needed)
            with self.lock(name):
                if not (self.folder / f".{name}.made").exists():
                    for left in (path, path.with_name(f"{name}.work")):
                        shutil.rmtree(left, ignore_errors=True)
                    PARTS[name](self, path)
                    (self.folder / f".{name}.made").touch()
        return path

    def make_apart(self, names) -> None:
        """Makes the parts in another process: a fork of one that has read ArrayRecord files may
        crash when it reads one."""
        if not all((self.folder / f".{name}.made").exists() for name in names):
            self.launch("tests/campaign/world.py", self.folder, *names)

    @contextlib.contextmanager
    def lock(self, name: str):
        with (self.folder / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def launch(self, script: str, *arguments, module: bool = False) -> None:
        command = [sys.executable, *(["-m"] if module else []), script, *map(str, arguments)]
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr[-2000:]}")


def _data(world: World, path) -> None:
    synthetic_data.write_documents(synthetic_data.write_data(path))


def _tokens(world: World, path) -> None:
    shutil.copytree(world.part("data") / "tokens", path)


def _config(world: World, path) -> None:
    path.mkdir()
    data = world.part("data")
    (path / "run.py").write_text(synthetic_data.config_text(data, **RUN))
    (path / "masked.py").write_text(synthetic_data.masked_config_text(data, eval_every=0))


def _run(world: World, path) -> None:
    config = world.part("config") / "run.py"
    world.launch("launch/train.py", f"--config={config}", f"--workdir={path}")


def _model(world: World, path) -> None:
    write_model(path, world.part("data"))


def _dense(world: World, path) -> None:
    """A dense model of the same layout, to upcycle."""
    config = published_models.NOMIC | {"vocab_size": 512, "n_positions": 128, "num_experts": 0}
    tensors = published_models.random_tensors(published_models.nomic_shapes(config))
    published_models.write_folder(path, config, tensors)
    shutil.copy(world.part("model") / "sentencepiece.model", path)


def _imported(world: World, path) -> None:
    flags = (f"--source={world.part('model')}", f"--target={path}")
    world.launch("launch/convert.py", "import", *flags)


def _exported(world: World, path) -> None:
    flags = (f"--source={world.part('imported')}", f"--target={path}")
    world.launch("launch/convert.py", "export", *flags)


def _pairs(world: World, path) -> None:
    synthetic_data.write_pairs(path)


def _vectors(world: World, path) -> None:
    from moe_embed_jax.search.vectors import write_vectors

    texts = [f"a text of {i} words" for i in range(300)]
    teacher = StandInTeacher()
    write_vectors(path, lambda: iter(texts), teacher.encode, teacher.identity(None), "float32")


def _teacher(world: World, path) -> None:
    """A work folder of launch/mine.py with one source and language."""
    from moe_embed_jax.curation.pair_texts import Embedding, PairTexts, distinct

    rows = [pair(i) for i in range(40)]
    texts = PairTexts(distinct(r.query for r in rows), distinct(r.document for r in rows))
    Embedding(StandInTeacher()).embed(path / "00000-faq-en", texts)


def _texts(world: World, path) -> None:
    path.mkdir()
    texts = [
        text for language in ("aa", "bb") for text in synthetic_data.documents(language, 60, 4)
    ]
    titles = [{"title": "a title"} if i % 3 else {} for i in range(len(texts))]
    lines = [json.dumps({"text": t} | title) for t, title in zip(texts, titles, strict=True)]
    raw_sources.jsonl(path / "texts.jsonl", lines)
    raw_sources.jsonl(path / "packed.jsonl.gz", lines[:20])
    (path / "plain.txt").write_text("\n".join(texts[:30]) + "\n")


def _beir(world: World, path) -> None:
    pairs = synthetic_data.pairs("descriptions", "aa", 20, seed=3)
    synthetic_data.write_beir(path, pairs)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"):  # plain, so that values are changed
        (path / name).write_bytes(gzip.decompress((path / f"{name}.gz").read_bytes()))
        (path / f"{name}.gz").unlink()


def _sets(world: World, path) -> None:
    """One small set of every kind of a suite."""
    from moe_embed_jax.evaluation.suite import load_suite

    words = [f"w{i} w{i + 1} w{i % 3}" for i in range(12)]
    documents = {f"d{i}": text for i, text in enumerate(words)}
    queries = {f"q{i}": words[i][:5] for i in range(5)}
    qrels = [(f"q{i}", f"d{i}", 1) for i in range(5)]
    evaluation_data.write_beir(path / "beir", documents, queries, qrels, gz="")
    evaluation_data.write_miracl(
        path / "miracl",
        "xx",
        [[(f"p#{i}", "t", text) for i, text in enumerate(words)]],
        {"1": "w1 w2", "2": "w5"},
        [("1", "p#1", 1), ("2", "p#5", 1), ("2", "p#6", 0)],
    )
    rows = [(i % 4, words[i], words[-i]) for i in range(8)]
    evaluation_data.write(
        path / "sts.tsv", evaluation_data.table(*rows, header=("score", "sentence1", "sentence2"))
    )
    rows = [("aa", words[i], words[i] + " x") for i in range(6)]
    evaluation_data.write(
        path / "bitext.tsv", evaluation_data.table(*rows, header=("lang", "sentence", "en"))
    )
    page = {
        "beir": dict(kind="retrieval", path="beir"),
        "miracl": dict(
            kind="miracl",
            topics="miracl/miracl-v1.0-{subset}/topics/topics.miracl-v1.0-{subset}-dev.tsv",
            qrels="miracl/miracl-v1.0-{subset}/qrels/qrels.miracl-v1.0-{subset}-dev.tsv",
            corpus="miracl/miracl-corpus-v1.0-{subset}/docs-*.jsonl.gz",
        ),
        "sts": dict(kind="sts", path="sts.tsv", languages="en"),
        "bitext": dict(kind="bitext", path="bitext.tsv", layout="table", pivot="en"),
    }
    suite = path / "suite.py"
    suite.write_text(f"def get_config(variant=''):\n    return {{'tasks': {page!r}}}\n")
    load_suite(str(suite))


def _raw(world: World, path) -> None:
    """Raw sources of every format for launch/prepare.py."""
    rows = raw_sources.pairs(30)
    raw_sources.jsonl(path / "pairs.jsonl", rows)
    raw_sources.jsonl(path / "packed.jsonl.gz", raw_sources.pairs(12, "b"))
    raw_sources.parquet(path / "rows.parquet", raw_sources.pairs(12, "c"))
    raw_sources.arrow(path / "saved" / "data.arrow", raw_sources.pairs(12, "d"))
    raw_sources.jsonl(path / "miracl.jsonl", [raw_sources.MIRACL])
    raw_sources.beir(path / "beir")
    source = dict(format="pairs", language="en")
    entries = [
        dict(source, name="plain", path=str(path / "pairs.jsonl")),
        dict(source, name="packed", path=str(path / "packed.jsonl.gz")),
        dict(source, name="columns", path=str(path / "rows.parquet")),
        dict(source, name="saved", path=str(path / "saved")),
        dict(name="miracl", format="miracl", language="de", path=str(path / "miracl.jsonl")),
        dict(name="beir", format="beir", language="en", path=str(path / "beir")),
    ]
    (path / "sources.json").write_text(json.dumps(entries))


def _columns(world: World, path) -> None:
    raw_sources.parquet(path / "rows.parquet", raw_sources.pairs(40, "c"))
    raw_sources.arrow(path / "saved.arrow", raw_sources.pairs(40, "d"))


def _recipe_sources(world: World, path) -> None:
    sources = []
    for task in ("translations", "descriptions"):
        paths = {}
        for language in synthetic_data.LANGUAGES[:2]:
            pairs = synthetic_data.pairs(task, language, 60, seed=1)
            rows = [{"query": q, "document": d} for q, d in pairs]
            file = raw_sources.jsonl(path / f"{task}-{language}.jsonl", rows)
            paths[language] = str(file)
        sources.append({"name": task, "format": "pairs", "path": paths})
    (path / "sources.json").write_text(json.dumps(sources))


PARTS = {
    made.__name__.removeprefix("_"): made
    for made in (
        *(_data, _tokens, _config, _run, _model, _dense, _imported, _exported, _pairs),
        *(_vectors, _teacher, _texts, _beir, _sets, _raw, _columns, _recipe_sources),
    )
} | {"xlmr": lambda world, path: xlmr_folder.write(path)}
NEEDS = {
    "tokens": ["data"],
    "config": ["data"],
    "run": ["config"],
    "model": ["data"],
    "dense": ["model"],
    "imported": ["model"],
    "exported": ["imported"],
}

if __name__ == "__main__":
    world = World(pathlib.Path(sys.argv[1]))
    for name in sys.argv[2:]:
        world.part(name)
