import dataclasses
import gzip
import json
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import python_environment
from helpers import synthetic_wheels

from moe_embed_jax.errors import UserError
from moe_embed_jax.hashes import file_hash
from moe_embed_jax.preparation.builders import (
    api_documentation,
    home_assistant,
    package_texts,
    statistics,
    wheels,
)
from moe_embed_jax.preparation.builders.text_pairs import ParseReport, clean_text, is_prose


@pytest.fixture
def wheels_dir(tmp_path, monkeypatch):
    """A folder of synthetic wheels, which are the pinned ones during the test."""
    monkeypatch.delenv(wheels.WHEELS_DIR_VARIABLE, raising=False)
    repin(monkeypatch, tmp_path / "wheels")
    return tmp_path / "wheels"


def repin(monkeypatch, folder: Path, **changed_files) -> None:
    for name, wheel in synthetic_wheels.write_wheels(folder, **changed_files).items():
        monkeypatch.setitem(wheels.WHEELS, name, wheel)


def parse(parser, files: dict[str, bytes], folder: Path):
    path = folder / "test-1.whl"
    synthetic_wheels.write_wheel(path, files)
    report = ParseReport("test")
    with wheels.open_wheel(path) as archive:
        return parser(archive, report), report.as_dict()


def all_rows(data_dir, config, split):
    rows, groups = package_texts.open_split(data_dir, config, split)
    return [row._asdict() for row in rows.read(range(len(rows)))], groups


# ---- Parsers -------------------------------------------------------------------------------------


def test_home_assistant_pairs(tmp_path):
    pairs, report = parse(home_assistant.parse, synthetic_wheels.home_assistant_files(4), tmp_path)
    found = {(p.source, p.language, p.query, p.document): p.english for p in pairs}
    assert len(found) == len(pairs)
    shared = "en the same long string in every component"
    assert found["translations", "de", shared, "de" + shared[2:]] == (shared,)
    english = synthetic_wheels.sentence("2.1")
    name, text = "ja service 2 1", f"ja {english}"
    assert set(found["descriptions", "ja", name, text]) == {"en service 2 1", f"en {english}"}
    assert ("descriptions", "en", "en service 2 1", f"en {english}") in found
    assert {language for _, language, _, _ in found} == {"en", *synthetic_wheels.LANGUAGES}
    texts = {p.query for p in pairs} | {p.document for p in pairs}
    assert not any("[%" in t or t.startswith(("{", "This English", "short")) for t in texts)
    assert report["problems"] == {}
    assert report["dropped"]["translations_untranslated"] > 0
    # ja, de, fr have the shared string in four components each, ta in three; the first stays.
    assert report["dropped"]["translations_duplicate"] == 3 * 3 + 2


def test_equal_pair_keeps_all_its_origins(tmp_path):
    """Two keys whose German texts agree and whose English ones do not."""

    def content(name, description):
        return json.dumps({"a": {"name": name, "description": description}}).encode()

    folder = "homeassistant/components/{}/translations/{}.json"
    files = {
        folder.format("x", "en"): content("The first name", "A long enough English text one"),
        folder.format("y", "en"): content("The second name", "A long enough English text two"),
        folder.format("x", "de"): content("Ein einziger Name", "Ein ausreichend langer Text hier"),
        folder.format("y", "de"): content("Ein einziger Name", "Ein ausreichend langer Text hier"),
    }
    pairs, _ = parse(home_assistant.parse, files, tmp_path)
    german = [p for p in pairs if p.source == "descriptions" and p.language == "de"]
    assert len(german) == 1
    assert {"The first name", "The second name"} < set(german[0].english)
    assert len(german[0].english) == 4


def test_foreign_text_that_is_english_counts_as_english(tmp_path):
    folder = "homeassistant/components/{}/translations/{}.json"
    files = {
        folder.format("x", "en"): json.dumps({"k": "Please open the cloud account"}).encode(),
        folder.format("x", "de"): json.dumps({"k": "Home Assistant Cloud account"}).encode(),
        folder.format("y", "en"): json.dumps({"k": "Home Assistant Cloud account"}).encode(),
        folder.format("y", "de"): json.dumps({"k": "Konto der Home Assistant Cloud"}).encode(),
    }
    pairs, _ = parse(home_assistant.parse, files, tmp_path)
    by_query = {p.query: p.english for p in pairs}
    assert by_query["Please open the cloud account"] == (
        "Please open the cloud account",
        "Home Assistant Cloud account",
    )


def test_aws_pairs(tmp_path):
    pairs, report = parse(api_documentation.parse_aws, synthetic_wheels.botocore_files(), tmp_path)
    by_query = {p.query: p.document for p in pairs}
    text = synthetic_wheels.sentence("op 1 7", 12)
    assert by_query["Amazon Service 1 Get Thing7"] == f"new Get. & {text}"
    member = by_query["Amazon Service 3 Thing Request max Results"]
    assert member == synthetic_wheels.sentence("member 3", 12)
    assert len(pairs) == 4 * 41 and not any("old" in p.document.split() for p in pairs)
    assert report["problems"]["empty_text"]["count"] == 4
    assert report["dropped"] == {"aws_api_without_documentation": 4}


def test_google_pairs(tmp_path):
    files = synthetic_wheels.google_files()
    pairs, _ = parse(api_documentation.parse_google, files, tmp_path)
    by_query = {p.query: p.document for p in pairs}
    assert len(pairs) == 3 * 33
    assert by_query["Synthetic 2 API Thing List field4"].startswith("v2 ")
    assert by_query["Synthetic 0 API things list"].startswith("v2 ")
    assert "Synthetic 0 API things list page Size" in by_query


@pytest.mark.parametrize(
    ("versions", "newest"),
    [
        (["v1", "v2beta1"], ["v2beta1"]),
        (["v2", "v2beta1", "v2alpha"], ["v2"]),
        (["v1.2", "v1.10", "v1.9"], ["v1.10"]),
        (["v1beta1", "v1p5beta1", "v1beta2"], ["v1p5beta1"]),
        (["directory_v1", "reports_v1"], ["directory_v1", "reports_v1"]),
    ],
)
def test_newest_version_of_an_api(tmp_path, versions, newest):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for version in versions:
            archive.writestr(f"googleapiclient/discovery_cache/documents/api.{version}.json", "{}")
        found = api_documentation.newest_google(archive)
    assert [name.rsplit("api.")[-1].removesuffix(".json") for name in found] == newest


def test_cleaning():
    assert clean_text("  a\n\n b\u00a0c ") == "a b c"
    assert is_prose("{name} is on") and not is_prose("{name}: {value} 12 %")
    assert not is_prose("[%key:common::x%] and text") and not is_prose("12 - 34")
    html = "<p>Use <code>x</code>, <a href='u'>y</a>.</p><ul><li>a &lt; b</li></ul><!-- <p>no -->"
    assert clean_text(api_documentation.strip_html(html)) == "Use x, y. a < b"
    assert api_documentation.words_of_identifier("getIamPolicy") == "get Iam Policy"
    assert api_documentation.words_of_identifier("VPCId_max-value") == "VPC Id max value"


def test_defects_of_a_wheel_are_counted_and_named(tmp_path):
    folder = "homeassistant/components/{}/translations/{}.json"
    long_text = "a text of more than twenty characters"
    files = {
        **synthetic_wheels.home_assistant_files(2),
        folder.format("bad", "en"): json.dumps({"k": long_text, "n": 3, "e": " "}).encode(),
        folder.format("bad", "de"): b'{"k": "truncated',
        folder.format("bad", "fr"): b'{"k": "caf\xe9 is not UTF-8"}',
        folder.format("bad", "ja"): b'["a list"]',
        folder.format("bad", "ta"): b'{"k": "half of a pair \\ud800 is not a character"}',
        folder.format("alone", "de"): b"{}",
    }
    _, report = parse(home_assistant.parse, files, tmp_path)
    problems = report["problems"]
    assert {kind: p["count"] for kind, p in problems.items()} == {
        "invalid_json": 1,
        "invalid_utf8": 1,
        "invalid_unicode": 1,
        "not_an_object": 1,
        "not_text": 1,
        "empty_text": 1,
        "no_english_file": 1,
    }
    assert problems["invalid_json"]["first"][0].startswith(f"test: {folder.format('bad', 'de')}: ")
    assert problems["invalid_utf8"]["first"] == [f"test: {folder.format('bad', 'fr')}: byte 10"]
    assert problems["not_text"]["first"] == [f"test: {folder.format('bad', 'en')}: /n"]


def test_damaged_gzip_member_is_named(tmp_path):
    member = "botocore/data/broken/2020-01-01/service-2.json.gz"
    files = synthetic_wheels.botocore_files()
    files[member] = gzip.compress(b"{}" * 100, mtime=0)[:-12]
    pairs, report = parse(api_documentation.parse_aws, files, tmp_path)
    assert len(pairs) == 164
    assert report["problems"]["damaged_member"]["first"][0].startswith(f"test: {member}: ")


# ---- Prepared data -------------------------------------------------------------------------------


def test_prepare_and_open(wheels_dir, tmp_path, capsys):
    data_dir = tmp_path / "data"
    section = package_texts.prepare(data_dir, wheels_dir, progress=True)
    assert "Prepared text pairs" in capsys.readouterr().out
    english = {"train": set(), "test": set()}
    total = 0
    for config in package_texts.CONFIGS:
        for split in package_texts.SPLITS:
            rows, groups = all_rows(data_dir, config, split)
            total += len(rows)
            assert sorted(groups) == list(groups)
            assert [start for start, _ in groups.values()] == [
                0,
                *(stop for _, stop in list(groups.values())[:-1]),
            ]
            for name, (start, stop) in groups.items():
                assert start < stop
                found = {f"{row['source']}/{row['language']}" for row in rows[start:stop]}
                assert found == {name}
            for row in rows:
                assert row.pop("negatives") == ()
                if row["source"] == "translations":
                    english[split].add(row["query"])
                elif row["language"] == "en":
                    english[split] |= {row["query"], row["document"]}
    assert english["test"] and not english["train"] & english["test"]
    assert sum(section["pairs"].values()) == total
    assert section["languages"] == 5
    assert section["sources"]["aws_api"]["pairs"]["train"] > 100
    assert 0.05 < section["sources"]["translations"]["held_out"]["english_strings_share"] < 0.15
    quantiles = section["sources"]["google_api"]["document_characters"]
    assert list(quantiles) == ["5", "25", "50", "75", "95", "100"]
    assert statistics.read_section(data_dir, "package_texts") == section
    folder = package_texts.dataset_folder(data_dir, "aws_api")
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["sha256"] == wheels.WHEELS["botocore"].sha256
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record" and "Apache-2.0" in str(info)


def test_second_call_does_nothing(wheels_dir, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"
    configs = ("google_api",)
    first = package_texts.prepare(data_dir, wheels_dir, configs, progress=False)
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    for name in ("fetch", "open_wheel"):
        monkeypatch.setattr(package_texts.pinned, name, None)
    assert package_texts.prepare(data_dir, tmp_path / "gone", configs, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before


def test_preparation_is_deterministic(wheels_dir, tmp_path):
    """Rows and groups; not bytes, as protobuf writes the features of a row in any order."""
    for name in ("one", "two"):
        package_texts.prepare(tmp_path / name, wheels_dir, ("aws_api",), progress=False)
    for split in package_texts.SPLITS:
        one, two = (all_rows(tmp_path / name, "aws_api", split) for name in ("one", "two"))
        assert one == two


def test_data_of_other_wheels_is_refused(wheels_dir, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"
    package_texts.prepare(data_dir, wheels_dir, ("aws_api",), progress=False)
    repin(monkeypatch, tmp_path / "other", botocore={"more.txt": b"x"})
    with pytest.raises(UserError, match=r"was prepared from botocore-1.*delete that folder"):
        package_texts.prepare(data_dir, tmp_path / "other", ("aws_api",), progress=False)
    with pytest.raises(UserError, match=wheels.WHEELS["botocore"].sha256):
        package_texts.open_split(data_dir, "aws_api", "train")


def test_random_access(wheels_dir, tmp_path):
    package_texts.prepare(tmp_path, wheels_dir, ("aws_api",), progress=False)
    rows, _ = package_texts.open_split(tmp_path, "aws_api", "train")
    everything = rows.read(range(len(rows)))
    wanted = [random.Random(0).randrange(len(rows)) for _ in range(300)]
    assert rows.read(wanted) == [everything[n] for n in wanted] and rows.read([]) == []
    assert [rows[n] for n in wanted] == rows.__getitems__(wanted)
    for bad in (-1, len(rows)):
        with pytest.raises(IndexError, match="there are"):
            rows.read([bad])


def test_unknown_names_and_unprepared_data(tmp_path):
    with pytest.raises(
        UserError, match="no config 'aws' of package_texts; there are home_assistant"
    ):
        package_texts.prepare(tmp_path, configs=("aws",))
    with pytest.raises(UserError, match="not prepared; run"):
        package_texts.open_split(tmp_path, "aws_api", "train")
    with pytest.raises(UserError, match="no split 'dev'"):
        package_texts.open_split(tmp_path, "aws_api", "dev")


@pytest.fixture
def train_file(wheels_dir, tmp_path):
    package_texts.prepare(tmp_path, wheels_dir, ("aws_api",), progress=False)
    folder = package_texts.dataset_folder(tmp_path, "aws_api")
    return folder / "package_texts-train.array_record-00000-of-00001"


def test_flipped_byte_names_file_and_record(train_file, tmp_path):
    content = bytearray(train_file.read_bytes())
    content[2000] ^= 0xFF
    train_file.write_bytes(content)
    rows, _ = package_texts.open_split(tmp_path, "aws_api", "train")
    with pytest.raises(UserError, match=rf"{train_file}: record \d+: damaged .*prepare again"):
        rows.read(range(len(rows)))


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_file_is_named(train_file, tmp_path, keep):
    content = train_file.read_bytes()
    train_file.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match=rf"{train_file}: damaged .*prepare again"):
        package_texts.open_split(tmp_path, "aws_api", "train")


def test_missing_shard_and_file_of_other_length(train_file, tmp_path):
    test_file = train_file.with_name(train_file.name.replace("train", "test"))
    train_file.write_bytes(test_file.read_bytes())
    with pytest.raises(UserError, match=r"17 rows, 147 expected: damaged"):
        package_texts.open_split(tmp_path, "aws_api", "train")
    train_file.unlink()
    with pytest.raises(UserError, match=r"shards \[\] of 0 are there"):
        package_texts.open_split(tmp_path, "aws_api", "train")


# ---- Failures during preparation -----------------------------------------------------------------


def test_damaged_wheel_leaves_nothing(wheels_dir, tmp_path, monkeypatch):
    path = wheels_dir / wheels.WHEELS["botocore"].file_name
    path.write_bytes(path.read_bytes()[:1000])
    wheel = dataclasses.replace(wheels.WHEELS["botocore"], sha256=file_hash(path))
    monkeypatch.setitem(wheels.WHEELS, "botocore", wheel)
    with pytest.raises(UserError, match=f"{path}: not readable as a zip file"):
        package_texts.prepare(tmp_path / "data", wheels_dir, progress=False)  # in a worker process
    assert not package_texts.dataset_folder(tmp_path / "data", "aws_api").exists()


def test_wheel_without_texts_is_refused(wheels_dir, tmp_path, monkeypatch):
    path = wheels_dir / wheels.WHEELS["botocore"].file_name
    synthetic_wheels.write_wheel(path, {"botocore/data/a/2020-01-01/service-2.json": b"not JSON"})
    wheel = dataclasses.replace(wheels.WHEELS["botocore"], sha256=file_hash(path))
    monkeypatch.setitem(wheels.WHEELS, "botocore", wheel)
    with pytest.raises(UserError, match=r"0 training and 0 test pairs.*invalid_json"):
        package_texts.prepare(tmp_path / "data", wheels_dir, ("aws_api",), progress=False)


def test_interrupt_leaves_nothing_that_looks_complete(wheels_dir, tmp_path, monkeypatch):
    folder = package_texts.dataset_folder(tmp_path, "aws_api")
    generate = package_texts.PackageTexts._generate_examples

    def interrupted(self, pairs, *arguments):
        for row, example in generate(self, pairs, *arguments):
            if row == 10:
                raise KeyboardInterrupt
            yield row, example

    with monkeypatch.context() as patch:
        patch.setattr(package_texts.PackageTexts, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            package_texts.prepare(tmp_path, wheels_dir, ("aws_api",), progress=False)
    assert list(folder.parent.iterdir()) == []
    package_texts.prepare(tmp_path, wheels_dir, ("aws_api",), progress=False)
    assert folder.is_dir()


_PREPARE = """
import os, signal, sys
from helpers import synthetic_wheels
from pathlib import Path
from moe_embed_jax.preparation.builders import package_texts
if __name__ == "__main__":
    data_dir, wheels_dir, deadly = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "kill"
    synthetic_wheels.pin(synthetic_wheels.write_wheels(wheels_dir))
    if deadly:
        def kill(self, pairs, *_):
            yield 0, dict.fromkeys(("query", "document", "source", "language"), "x")
            os.kill(os.getpid(), signal.SIGKILL)
        package_texts.PackageTexts._generate_examples = kill
    package_texts.prepare(data_dir, wheels_dir, ("google_api",), progress=False)
    assert "tensorflow" not in sys.modules
"""


def test_kill_leaves_nothing_that_looks_complete_and_no_tensorflow_is_imported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_PREPARE)
    folder = package_texts.dataset_folder(tmp_path / "data", "google_api")
    for mode, code in (("kill", -signal.SIGKILL), ("live", 0)):
        command = [sys.executable, str(script), str(tmp_path / "data"), str(tmp_path / "w"), mode]
        run = subprocess.run(command, env=python_environment(1), capture_output=True, text=True)
        assert run.returncode == code, run.stderr
        assert folder.exists() == (mode == "live")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
