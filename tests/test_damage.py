"""Damage to every kind of file of data, pairs, vectors and curation: named, or without effect.

Each case damages one file of a small folder and reads the folder. The reader must give what it gave
before, or a `UserError` of one line that names a file or folder there. Checkpoints:
test_checkpoint.py.
"""

import random
import shutil

import numpy as np
import pytest
from helpers.stand_in_teacher import StandInTeacher

from moe_embed_jax.checksums import write_checksums
from moe_embed_jax.curation.consistency import ConsistencyFilter
from moe_embed_jax.curation.consistency_rule import ConsistencyRule
from moe_embed_jax.curation.negatives import NegativeMining
from moe_embed_jax.curation.negatives_rule import NegativesRule
from moe_embed_jax.curation.pair_texts import Embedding
from moe_embed_jax.curation.report import Report
from moe_embed_jax.data.token_store import TokenStore, TokenStoreWriter
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation.heldout import load_heldout
from moe_embed_jax.evaluation.pseudo_perplexity import load_documents
from moe_embed_jax.ownership import own
from moe_embed_jax.pairs.folder import PairFolder
from moe_embed_jax.pairs.row import PairRow
from moe_embed_jax.preparation import document_store
from moe_embed_jax.preparation import held_out_sets as retrieval_sets
from moe_embed_jax.preparation.pair_writer import PairWriter
from moe_embed_jax.refusals import refusal_of_system
from moe_embed_jax.search import vectors

TEXTS = [f"text {i}" for i in range(40)]
ROWS = [
    PairRow(f"what is topic{i}a topic{i}b", f"topic{i}a topic{i}b explained", (), "faq", "en")
    for i in range(20)
]


def write_tokens(folder):
    generator = np.random.default_rng(0)
    with TokenStoreWriter(folder, {"mixture": "m"}, rows_per_shard=20) as writer:
        writer.start_group("faq", "en", 1.0)
        for _ in range(50):
            texts = [generator.integers(0, 9999, n) for n in generator.integers(2, 9, 4)]
            writer.write(texts, generator.integers(0, 9999, (4, 2)))
        writer.write_json("statistics.json", {})


def read_tokens(folder):
    store = TokenStore.open(folder)
    arrays = (store.lengths, store.content_ids, store.negative_lengths, store.negative_ids)
    rows = [[ids.tolist() for ids in row] for row in store.read(range(len(store)))]
    return store.spec, rows, [array.tolist() for array in arrays]


def write_pairs(folder):
    with PairWriter(folder, {"made": "by hand"}, 8) as writer:
        for row in ROWS:
            writer.write(row)


def read_pairs(folder):
    pairs = PairFolder(folder)
    return pairs.manifest, pairs.read(range(len(pairs))), pairs.lengths().tolist()


def encode(texts):
    return np.array([[len(text), int(text[5:])] for text in texts], np.float32).reshape(-1, 2)


def write_vectors(folder):
    vectors.write_vectors(folder, lambda: TEXTS, encode, {"hash": "abc"})


def read_vectors(folder):
    """As the command that wrote them does when it is repeated."""
    store = vectors.write_vectors(folder, lambda: TEXTS, encode, {"hash": "abc"})
    return store[:].tolist(), vectors.VectorStore(folder)[3:20].tolist()


def curated(command, folder, rule):
    """The output of a command on the pairs beside its work folder."""
    pairs, output = folder.with_name("pairs"), folder.with_name("out")
    if not pairs.exists():
        write_pairs(pairs)
    shutil.rmtree(output, ignore_errors=True)
    command(PairFolder(pairs), folder, Embedding(StandInTeacher()), rule).run(output)
    return output


def filtered(folder):
    """The bytes that filtering gives, continued with the work folder that is there."""
    output = curated(ConsistencyFilter, folder, ConsistencyRule())
    return {path.name: path.read_bytes() for path in output.iterdir()}


def mined(folder):
    output = curated(NegativeMining, folder, NegativesRule(count=2, search=10))
    return {path.name: path.read_bytes() for path in output.iterdir()}


def from_caches(command):
    """`command` with the vectors and rankings of a work folder, without its finished units."""

    def run(folder):
        for path in folder.rglob("unit.json"):
            path.unlink()
        return command(folder)

    return run


@pytest.mark.parametrize("command", [filtered, mined])
def test_report_and_pairs_appear_together(tmp_path, monkeypatch, command):
    """A kill between them leaves neither, and the same command continues."""
    write, killed = Report.write, []

    def killed_at_the_output(report, folder):
        if folder != tmp_path / "work":
            killed.append(folder)
            raise KeyboardInterrupt
        write(report, folder)

    monkeypatch.setattr(Report, "write", killed_at_the_output)
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path / "work")
    assert killed and sorted(path.name for path in tmp_path.iterdir()) == ["pairs", "work"]
    with own(tmp_path / "work", inside=True), pytest.raises(UserError, match="work is in use by"):
        command(tmp_path / "work")
    monkeypatch.undo()
    (tmp_path / ".out.partial").mkdir()  # as kill -9 leaves it
    command(tmp_path / "work")
    assert {"report.json", "report.md", "manifest.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs", "work"]


def write_sets(folder):
    for language in ("de", "en"):
        texts = retrieval_sets.TestSet()
        for i in range(12):
            texts.add(f"{language} question {i}", f"{language} answer {i % 7}")
        retrieval_sets.write_beir(folder / "retrieval" / "translations" / language, texts)
    write_checksums(folder / "retrieval")


def read_sets(folder):
    return {
        name: (one.queries, one.documents, one.qrels) for name, one in load_heldout(folder).items()
    }


def write_documents(folder):
    with document_store._HeldOut(folder) as held_out:
        for i in range(6):
            held_out.add("faq", ("de", "en")[i % 2], f"document {i}")


KINDS = {
    "tokens": (write_tokens, read_tokens, 12),
    "pairs": (write_pairs, read_pairs, 12),
    "vectors": (write_vectors, read_vectors, 12),
    "filter": (filtered, filtered, 1),
    "mine": (mined, mined, 1),
    "caches of filter": (filtered, from_caches(filtered), 1),
    "caches of mine": (mined, from_caches(mined), 1),
    "sets": (write_sets, read_sets, 4),
    "documents": (write_documents, load_documents, 12),
}  # name -> how to write the folder, to read it, and the flips in each file


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero(path, rng):
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    path.write_bytes(data[:start] + bytes(len(data) - start))


def cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def empty(path, rng):
    path.write_bytes(b"")


def delete(path, rng):
    path.unlink()


def replace_by_folder(path, rng):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_or_without_effect(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(vectors, "CHUNK", 16)
    write, read, flips = KINDS[kind]
    folder, kept = tmp_path / "folder", tmp_path / "kept"
    write(folder)
    expected = read(folder)
    shutil.copytree(folder, kept)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    rng = random.Random(kind)
    cases = [
        (name, operation) for name in files for operation in (empty, delete, replace_by_folder)
    ]
    cases += [(name, operation) for name in files for operation in [flip] * flips + [zero, cut]]
    named, failures = 0, []
    for name, operation in cases:
        if not (kept / name).stat().st_size:
            continue
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        operation(folder / name, rng)
        try:
            if read(folder) != expected:
                failures.append(f"{name}: {operation.__name__}: other results")
        except UserError as error:
            named += 1
            if "\n" in str(error) or str(tmp_path) not in str(error):
                failures.append(f"{name}: {operation.__name__}: {error}")
        except OSError as error:  # the launchers say it in one line
            named += 1
            if str(folder / name) not in refusal_of_system(error):
                failures.append(f"{name}: {operation.__name__}: {error!r}")
        except Exception as error:
            failures.append(f"{name}: {operation.__name__}: {error!r}")
    print(f"{kind}: {len(cases)} cases, {named} named")
    assert not failures, "\n".join(failures)
    assert named
