"""What counts as wrong, and what is said of it; the card and golden.json."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT

from moe_embed_jax.interop.verify import report, runtimes
from moe_embed_jax.interop.verify.compare import Result, compare
from moe_embed_jax.interop.verify.golden import LONG, MARKUP, golden_texts

TEXTS = golden_texts(64)
PLACE = {golden.name: i for i, golden in enumerate(TEXTS)}
rng = np.random.default_rng(0)
VECTORS = rng.standard_normal((len(TEXTS), 16)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
IDS = [[0, 5 + i, 2] for i in range(len(TEXTS))]
IDS[-1] = [0, 5, 6, 7, 2]  # cut


def ours():
    return Result("1", [list(ids) for ids in IDS], VECTORS.copy(), 1.0)


def turned(vector, cosine):
    """A unit vector at that cosine to `vector`."""
    across = np.roll(vector, 1) - (np.roll(vector, 1) @ vector) * vector
    return cosine * vector + np.sqrt(1 - cosine**2) * across / np.linalg.norm(across)


def test_texts_cover_scripts_and_lengths():
    assert len({golden.name for golden in TEXTS}) == len(TEXTS) == 35
    assert {golden.prompt for golden in TEXTS} == {"query", "document"}
    assert len(TEXTS[PLACE[LONG]].text.split()) > 64 and TEXTS[-1].name == LONG
    assert len(golden_texts(5000)[-1].text.split()) > 5000


def test_the_same_vectors_are_right():
    found = compare(TEXTS, ours(), ours())
    assert (found.equal_ids, found.wrong, found.note) == ("35/35", "", "")
    assert found.max_abs == 0 and found.cosine == pytest.approx(1)
    hidden = ours()
    hidden.ids = None
    assert compare(TEXTS, ours(), hidden).equal_ids == "-"


def no_finite(result):
    result.vectors[3, 2] = np.nan


def narrow(result):
    result.vectors = result.vectors[:, :8]


def long(result):
    result.vectors *= 2


def other_ids(result):
    result.ids[PLACE["thai"]].append(7)


def other_vector(result):
    result.vectors[PLACE["thai"]] = turned(VECTORS[PLACE["thai"]], 0.998)


def slightly_off(result):
    result.vectors[PLACE["thai"]] = turned(VECTORS[PLACE["thai"]], 1 - 4e-6)


def cut(result):
    result.vectors[PLACE[LONG]] = turned(VECTORS[PLACE[LONG]], 0.9)


def cut_with_ids(result):
    cut(result)
    result.ids[PLACE[LONG]] = [1]


def refusing(result):
    result.refused = {PLACE["thai"]: "HTTP 500 no"}


def refusing_all(result):
    result.refused = dict.fromkeys(range(len(TEXTS)), "no")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_finite, "vectors hold NaN or infinite numbers"),
        (narrow, "vectors have the shape [35, 8] instead of [35, 16]"),
        (long, "vectors have lengths from 2.000 to 2.000, not 1"),
        (other_ids, 'token ids differ in "thai"'),
        (other_vector, 'vectors differ although the token ids are equal in "thai"'),
        (slightly_off, 'vectors differ although the token ids are equal in "thai"'),
        (cut, "only the long text differs (cosine 0.9000): it is cut elsewhere"),
        (cut_with_ids, 'it cuts "long" at another token, lowest cosine 0.9000: give it texts of'),
        (refusing, 'it refuses "thai": HTTP 500 no'),
        (refusing_all, "it refuses all texts"),
    ],
)
def test_what_is_wrong_is_said(change, reason):
    theirs = ours()
    change(theirs)
    assert compare(TEXTS, ours(), theirs).wrong.startswith(reason)


def test_a_text_that_is_cut_elsewhere_hides_no_other_difference():
    theirs = ours()
    cut_with_ids(theirs)
    found = compare(TEXTS, ours(), theirs)
    assert (found.equal_ids, found.max_abs) == ("34/35", 0)
    other_vector(theirs)
    assert compare(TEXTS, ours(), theirs).wrong.startswith("vectors differ although")


def test_coarse_arithmetic_is_allowed_where_it_was_asked_for():
    theirs = ours()
    theirs.vectors[5] = turned(VECTORS[5], 0.9993)
    assert [bool(compare(TEXTS, ours(), theirs, p).wrong) for p in ("float32", "half", "int8")] == [
        True,
        False,
        False,
    ]
    theirs.vectors[5] = turned(VECTORS[5], 0.94)
    assert compare(TEXTS, ours(), theirs, "int8").wrong


def test_what_is_no_fault_is_noted():
    theirs = ours()
    theirs.ids[PLACE[MARKUP]] = [0, 0, 2]
    theirs.vectors[PLACE[MARKUP]] = turned(VECTORS[PLACE[MARKUP]], 0.5)
    theirs.ids[PLACE[LONG]] = [0, 4]
    theirs.vectors[PLACE[LONG]] = turned(VECTORS[PLACE[LONG]], 0.9995)
    theirs.refused = {PLACE["empty"]: "HTTP 422 empty"}
    theirs.vectors[PLACE["empty"]] = np.nan
    found = compare(TEXTS, ours(), theirs)
    assert (found.wrong, found.equal_ids, found.max_abs) == ("", "32/34", 0)
    for words in ("refuses the empty text (HTTP 422", "control tokens", "cosine 0.99950"):
        assert words in found.note


def test_the_card_keeps_its_text_and_one_table(tmp_path):
    (tmp_path / "README.md").write_text("# Model\n\nText.\n")
    for content in ("| first |", "| second |"):
        report.write_card(tmp_path, content, 35)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# Model\n\nText.\n\n<!-- runtimes: begin -->\n## Runtimes\n")
    assert card.count("## Runtimes") == 1 and "| second |" in card and "| first |" not in card
    (tmp_path / "README.md").write_text(card + "\nAfter.\n")
    report.write_card(tmp_path, "| third |", 35)
    assert (tmp_path / "README.md").read_text() == card.replace("second", "third") + "\nAfter.\n"


def test_what_is_not_here_says_how_to_get_it(tmp_path, monkeypatch):
    def reason(name, node_folder="."):
        with pytest.raises(runtimes.Absent) as error:
            runtimes.answer_of(name, tmp_path, {}, None, node_folder)
        return str(error.value)

    assert "the folder has no onnx/model.onnx: launch/convert.py export --onnx" in reason(
        "openvino"
    )
    assert "convert_hf_to_gguf.py" in reason("llama.cpp")
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    assert "is not installed: pip install -e .[pytorch]" in reason("transformers")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    monkeypatch.setattr(runtimes.shutil, "which", lambda name: "node")
    assert "npm install @huggingface/transformers" in reason("transformers.js", str(tmp_path))
    monkeypatch.setattr(runtimes.shutil, "which", lambda name: None)
    assert "node is not installed" in reason("transformers.js")


def test_an_answer_that_is_cut_off():
    code = f"print({runtimes._RESULT!r} + '{{')"
    with pytest.raises(runtimes.Failed, match="cut off"):
        runtimes._run([sys.executable, "-c", code], {}, None)


def test_the_workers_mark_their_answer_alike():
    folder = ROOT / "moe_embed_jax" / "interop" / "verify"
    assert f'RESULT = "{runtimes._RESULT}"' in (folder / "worker.py").read_text()
    assert f"`\\n{runtimes._RESULT}${{JSON" in (folder / "worker.mjs").read_text()
    assert json.loads(json.dumps(TEXTS[0].text)) == TEXTS[0].text
