"""launch/evaluate.py --suite: pages, results on disk, published rows, eight devices."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from helpers.evaluation_data import table, text_vectors, write, write_beir, write_miracl
from helpers.forked import run_forked
from helpers.stand_in_teacher import StandInTeacher

from moe_embed_jax import config as config_files
from moe_embed_jax import launching
from moe_embed_jax.curation import teacher as teacher_module
from moe_embed_jax.errors import UserError
from moe_embed_jax.evaluation import published
from moe_embed_jax.evaluation.language_tags import language_tag
from moe_embed_jax.evaluation.picture import scores_by_language
from moe_embed_jax.evaluation.subsets import SubsetScores
from moe_embed_jax.evaluation.suite import KINDS, TaskResult, load_suite, run_tasks
from moe_embed_jax.evaluation.suite_model import model_card

PAGE = """
def get_config(variant=""):
    tasks = {
        "XQuAD": dict(kind="cross_lingual", path="xquad/{subset}", languages=("de", "en")),
        "STS": dict(kind="sts", path="sts/{subset}.tsv.gz"),
        "Mining": dict(kind="bitext", layout="table", path="t.tsv.xz", pivot="eng"),
        "Topics": dict(kind="classification", path="sib/{subset}.tsv", train="eng_Latn"),
        "MIRACL": dict(
            kind="miracl",
            topics="miracl-v1.0-{subset}/topics/topics.miracl-v1.0-{subset}-dev.tsv",
            qrels="miracl-v1.0-{subset}/qrels/qrels.miracl-v1.0-{subset}-dev.tsv",
            corpus="miracl-corpus-v1.0-{subset}/docs-*.jsonl.gz",
        ),
        "Set": dict(kind="retrieval", path="xquad/en", languages="en"),
    }
    return {"tasks": {name: tasks[name] for name in tasks if variant in ("", name)}}
"""


def write_all(root: Path) -> Path:
    """A page, and the data that it names in data/."""
    (root / "page.py").write_text(PAGE)
    data = root / "data"
    for language in ("de", "en"):
        documents = {f"d{n}": f"wort{n} {language}{n} w{n % 5}" for n in range(40)}
        questions = {f"q{n}": f"wort{n} w{n % 7} frage{language}" for n in range(0, 40, 2)}
        judged = [(f"q{n}", f"d{n}", 1) for n in range(0, 40, 2)]
        write_beir(data / "xquad" / language, documents, questions, judged)
        rows = [(5 - n / 4, f"a{n} b c", f"a{n % 6} b d{n}") for n in range(20)]
        head = ("score", "sentence1", "sentence2")
        write(data / f"sts/{language}.tsv.gz", table(*rows, header=head))
    rows = [(code, f"s{n} {code}", f"s{n % 9} e") for n in range(12) for code in ("deu", "cmn")]
    write(data / "t.tsv.xz", table(*rows, header=("lang", "sentence", "eng")))
    for language in ("eng_Latn", "deu_Latn", "arb_Arab"):
        rows = [
            (n, "test" if n > 29 else "train", "ab"[n % 2], f"w{n % 6} {language}{n}")
            for n in range(40)
        ]
        head = ("index_id", "split", "category", "text")
        write(data / f"sib/{language}.tsv", table(*rows, header=head))
    shards = [[(f"{n}#{s}", "", f"wort{n} {s}") for n in range(25)] for s in range(2)]
    topics = {str(n): f"wort{n}" for n in range(12)}
    judged = [(n, f"{n}#{n % 2}", 1) for n in range(12)]
    write_miracl(data, "ar", shards, topics, judged)
    return data


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """launch("--flag=value", ...) -> exit status, in `tmp_path` with data and a stand-in model."""
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path)
    (tmp_path / "runs/my model").mkdir(parents=True)
    encoder = StandInTeacher()
    monkeypatch.setattr(teacher_module, "load_teacher", lambda name, mesh, weights: encoder)
    sys.path.append(str(ROOT / "launch"))
    import evaluate

    def run(*arguments):
        flags = ["--model=runs/my model", "--data=data", "--output=out", *arguments]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
        return launching.run(evaluate.main)

    run.encoder = encoder
    yield run
    sys.path.remove(str(ROOT / "launch"))


def results_of(output: Path, width: str = "") -> dict[str, dict]:
    found = output.glob(f"results/*/*/{width}*.json")
    return {path.stem: json.loads(path.read_text()) for path in found}


def test_a_whole_suite(launch, tmp_path, capsys):
    assert launch("--suite=page.py", "--dim=64,16") == 0
    printed = capsys.readouterr().out
    assert printed.index("XQuAD: ndcg_at_10") < printed.index("STS: cosine_spearman")
    wide, narrow = results_of(tmp_path / "out"), results_of(tmp_path / "out", "experiments/*/")
    names = {"XQuAD", "STS", "Mining", "Topics", "MIRACL", "Set"}
    assert wide.keys() == narrow.keys() == names | {"model_meta"}
    for name in names:
        result = wide[name]
        assert result["task_name"] == name and len(result["dataset_revision"]) == 40
        ((split, subsets),) = result["scores"].items()
        assert split == ("dev" if name == "MIRACL" else "test")
        for subset in subsets:
            assert 0 < subset["main_score"] <= 1
    assert wide["Set"]["scores"]["test"][0]["main_score"] != pytest.approx(
        narrow["Set"]["scores"]["test"][0]["main_score"]
    )
    found = {s["hf_subset"]: s for s in wide["XQuAD"]["scores"]["test"]}
    assert [*found] == ["de-de", "de-en", "en-de", "en-en"]
    assert found["de-en"]["languages"] == ["deu-Latn", "eng-Latn"]
    assert found["en-en"]["main_score"] == wide["Set"]["scores"]["test"][0]["main_score"]
    assert wide["Mining"]["scores"]["test"][1]["languages"] == ["cmn-Hans", "eng-Latn"]
    meta = narrow["model_meta"]
    assert meta["name"] == "local/my model" and meta["embed_dim"] == 16
    assert meta["experiment_kwargs"] == {"embed_dim": 16}
    (folder,) = (tmp_path / "out/results").glob("*/*")
    assert folder.parent.name == "local__my_model" and folder.name == meta["revision"]

    page = (tmp_path / "out/table.md").read_text()
    assert "| task | kind | score | subsets | 64 dim | 16 dim |" in page
    matrix = [line for line in page.splitlines() if line.startswith("| de |")]
    expected = [100 * found[f"de-{other}"]["main_score"] for other in ("de", "en")]
    assert matrix[0] == f"| de | {expected[0]:.2f} | {expected[1]:.2f} |"
    assert "published" not in page.lower()  # nothing here has the size of a published set
    assert (tmp_path / "out/languages.png").read_bytes().startswith(b"\x89PNG")

    embedded = launch.encoder.texts
    assert launch("--suite=page.py", "--dim=64,16") == 0
    assert launch("--suite=page.py:STS", "--output=other", "--cache=out/vectors") == 0
    assert launch.encoder.texts == embedded  # nothing is embedded again
    assert results_of(tmp_path / "other")["STS"]["scores"] == wide["STS"]["scores"]


def test_mteb_reads_the_results(launch, tmp_path):
    task_result = pytest.importorskip("mteb.results.task_result", reason="mteb is not installed")
    from mteb.models.model_meta import ModelMeta

    assert launch("--suite=page.py", "--dim=64,16", "--name=me/mine") == 0
    for path in (tmp_path / "out/results/me__mine").rglob("*.json"):
        if path.stem == "model_meta":
            meta = ModelMeta.model_validate(json.loads(path.read_text()))
            parts = path.relative_to(tmp_path / "out/results").parts
            assert meta.model_name_as_path() == parts[0] and meta.revision == parts[1]
            assert meta.experiment_name == (parts[3] if len(parts) > 3 else None)
        else:
            result = task_result.TaskResult.from_disk(path)
            means = [s["main_score"] for split in result.scores.values() for s in split]
            assert result.get_score() == pytest.approx(np.mean(means))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("{}", "page.py lists no tasks"),
        ("{'task': {}}", "unknown config key task; did you mean tasks?"),
        ("{'tasks': {'A': 3}}", "tasks.A must be a section with keys, got 3"),
        ("{'tasks': {'A': {}}}", "tasks.A.kind=None: choose one of retrieval, miracl"),
        ("{'tasks': {'A': dict(kind='sst', path='x')}}", "tasks.A.kind='sst': choose one of"),
        ("{'tasks': {'A': dict(kind='sts')}}", "config key tasks.A.path is missing"),
        (
            "{'tasks': {'A': dict(kind='sts', pth='x')}}",
            "unknown config key tasks.A.pth; did you mean tasks.A.path?",
        ),
        ("{'tasks': {'A': dict(kind='sts', path=3)}}", "config key tasks.A.path=3 is a int"),
        ("{'tasks': {'A/B': dict(kind='sts', path='x')}}", "tasks.A/B: the name is that of a file"),
        (
            "{'tasks': {'A': dict(kind='sts', path='x', languages=[3])}}",
            "tasks.A: languages: 3 is not a code like 'en'",
        ),
        (
            "{'tasks': {'A': dict(kind='sts', path='x', languages=())}}",
            "tasks.A: languages is empty: leave it out",
        ),
        (
            "{'tasks': {'A': dict(kind='bitext', path='x', layout='rows', pivot='en')}}",
            "tasks.A: layout='rows': choose one of table, aligned, columns, records",
        ),
        (
            "{'tasks': {'A': dict(kind='bitext', path='x', layout='table')}}",
            "tasks.A: layout 'table' needs a pivot",
        ),
        (
            "{'tasks': {'A': dict(kind='bitext', path='x', layout='aligned', pivot='en')}}",
            "tasks.A: layout 'aligned' takes a path with {subset}: 'x'",
        ),
        (
            "{'tasks': {'A': dict(kind='cross_lingual', path='x')}}",
            "tasks.A: path 'x' has no {subset}, the language",
        ),
    ],
)
def test_pages_are_refused(tmp_path, page, message):
    (tmp_path / "page.py").write_text(f"def get_config(variant):\n    return {page}\n")
    with pytest.raises(UserError) as error:
        load_suite(str(tmp_path / "page.py"))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite=page.py", "--dataset=x"], "--suite and --dataset or --heldout: give one"),
        (["--suite=page.py", "--model=bm25"], "--model=bm25 has no vectors"),
        (["--suite=page.py", "--data="], "--suite needs --data=FOLDER"),
        (["--suite=page.py", "--data=gone"], "--data=gone: no such folder"),
        (["--suite=page.py", "--data=model"], "task XQuAD: model/xquad/de: no such file or folder"),
        (["--suite=gone.py"], "config file gone.py does not exist"),
        (["--suite=page.py", "--output=page.py"], "--output=page.py is a file, expected a folder"),
        (["--suite=page.py", "--dim=65"], "--dim=65 must be between 1 and the model's width 64"),
        (["--suite=page.py", "--dim=x"], "--dim=x must be a number"),
        (["--suite=page.py", "--dtype=int8"], "dtype=int8: choose one of float32"),
    ],
)
def test_flags_are_refused(launch, tmp_path, capsys, arguments, message):
    (tmp_path / "model").mkdir()
    assert launch(*arguments) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"error: {message}") and captured.count("\n") == 1
    assert launch.encoder.texts == 0 and not (tmp_path / "out/results").exists()


def test_the_pages_of_the_project():
    for variant, kinds in {"": 17, "some": 17, "miracl": 1, "beir": 15, "smoke": 4}.items():
        assert len(load_suite(f"{ROOT / 'configs/evaluation.py'}:{variant}")) == kinds
    with pytest.raises(UserError, match="unknown variant 'x'"):
        load_suite(f"{ROOT / 'configs/evaluation.py'}:x")
    _, values = config_files.read_config_file(dict, f"{ROOT / 'configs/evaluation.py'}:beir")
    assert load_suite("read.py before", values).keys() == published.BEIR.keys()  # not read again
    assert load_suite(f"{ROOT / 'configs/evaluation.py'}:beir").keys() == published.BEIR.keys()


@pytest.mark.parametrize("variant", ["", "some", "miracl", "beir", "smoke"])
def test_the_page_states_no_default(variant):
    _, page = config_files.read_config_file(dict, f"{ROOT / 'configs/evaluation.py'}:{variant}")
    for name, task in page["tasks"].items():
        defaults = config_files.defaults(KINDS[task["kind"]]) | {"kind": None}
        assert [key for key, value in task.items() if value == defaults[key]] == [], name


def retrieval_result(name, scores, documents):
    subsets = tuple(
        SubsetScores(s, (s,), {None: {"ndcg_at_10": v, "documents": documents[s]}})
        for s, v in scores.items()
    )
    return TaskResult(name, "miracl", "dev", "ndcg_at_10", "0" * 40, subsets, 1.0)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("hf://org/model@main", "org/model"),
        ("sentence-transformers:org/model", "org/model"),
        ("runs/model", "local/model"),
        ("gs://bucket/runs/model", "local/model"),
    ],
)
def test_results_are_filed_under_the_name_of_the_model(bucket, monkeypatch, tmp_path, model, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/model").mkdir(parents=True)
    vectors = text_vectors(tmp_path / "cache")
    assert model_card(StandInTeacher(), vectors, model).name == name


def test_published_rows_only_beside_the_same_measure():
    by_name = {measure.name: measure for measure in published.MEASURES}
    sixteen = by_name["MIRACL, mean of 16 languages"]
    scores = {language: i / 16 for i, language in enumerate(published.MIRACL)}
    whole = [retrieval_result("MIRACL", scores, published.MIRACL)]
    assert sixteen.own(whole, None) == pytest.approx(100 * np.mean([*scores.values()]))
    assert by_name["MIRACL, mean of 18 languages"].own(whole, None) is None
    assert by_name["MIRACL en"].own(whole, None) == pytest.approx(100 * scores["en"])
    smaller = [retrieval_result("MIRACL", scores, {**published.MIRACL, "sw": 131_923})]
    assert sixteen.own(smaller, None) is None
    assert sixteen.own([retrieval_result("Other", scores, published.MIRACL)], None) is None
    assert sixteen.own([], None) is None
    card = {(r.model, r.width): r for r in sixteen.rows}
    assert card["Nomic Embed v2", 768].percent == 65.80 and card["Nomic Embed v2", 768].is_primary
    assert (
        by_name["XQuAD zh"].rows[0].percent == 95.90 and not by_name["XQuAD zh"].rows[0].is_primary
    )


def test_published_rows_are_marked_in_the_table():
    from moe_embed_jax.evaluation.results import ModelCard, markdown

    card = ModelCard("me/mine", "0" * 40, 64, 512, {"query": ""})
    result = retrieval_result("MIRACL", {"ar": 0.5}, published.MIRACL)
    page = markdown(card, [result])
    assert "| MIRACL ar | me/mine | 64 | 50.00 | measured here |" in page
    row = "| MIRACL ar | Nomic Embed v2 | 768 | 76.70 | published: arXiv 2502.07972v3, by a review"
    assert f"{row}, not checked against the original |" in page


def test_languages_of_other_data_sets_are_the_same():
    for codes in (
        ("ar", "ara", "arb_Arab"),
        ("zh", "cmn", "zho_Hans"),
        ("sw", "swh_Latn"),
        ("ko", "kor_Hang"),
    ):
        assert len({language_tag(code, merged=True) for code in codes}) == 1
    assert [language_tag(c) for c in ("de", "arb_Arab", "zho_Hant", "kor", "no such")] == [
        *("deu-Latn", "arb-Arab", "zho-Hant", "kor-Kore", "no such")
    ]


def test_picture_shows_means_by_first_language():
    results = [
        retrieval_result("A", {"de": 0.5, "fr": 0.25}, {"de": 1, "fr": 1}),
        TaskResult(
            *("B", "bitext", "test", "f1", ""),
            tuple(
                SubsetScores(f"{a}-{b}", (a, b), {None: {"f1": v}})
                for a, b, v in (("deu", "eng", 0.4), ("deu", "fra", 0.6), ("jpn", "eng", 1.0))
            ),
            1.0,
        ),
    ]
    tags, score_LT = scores_by_language(results, None)
    assert tags == ["deu-Latn", "fra-Latn", "jpn-Jpan"]
    np.testing.assert_allclose(score_LT, [[50, 50], [25, np.nan], [np.nan, 100]])


def scores_on(devices: int, folder: Path) -> dict:
    result = run_forked([__file__, folder, devices], devices=devices)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_eight_devices_score_like_one(tmp_path):
    write_all(tmp_path)
    one, eight = scores_on(1, tmp_path), scores_on(8, tmp_path)
    assert [*one] == [*eight] == ["XQuAD", "Mining", "MIRACL"]
    for name, expected in one.items():
        assert eight[name] == pytest.approx(expected, abs=1e-6), name


if __name__ == "__main__":
    from moe_embed_jax.mesh import MeshConfig, make_mesh

    root, count = Path(sys.argv[1]), int(sys.argv[2])
    mesh = make_mesh(MeshConfig())
    assert mesh.size == count
    vectors = text_vectors(root / f"v{count}", mesh=mesh)
    tasks = load_suite(str(root / "page.py"))
    searching = {name: tasks[name] for name in ("XQuAD", "Mining", "MIRACL")}
    found = run_tasks(searching, root / "data", vectors)
    values = {r.name: [v for s in r.subsets for v in s.scores[None].values()] for r in found}
    print(json.dumps(values))
