"""--part and --finish as flags, and launchers that are one process."""

import pytest
from helpers.commands import files_of, launch
from helpers.stand_in_teacher import StandInTeacher

from moe_embed_jax import embedder as embedder_module
from moe_embed_jax.errors import UserError
from moe_embed_jax.parts import WHOLE, Part
from moe_embed_jax.search import vectors


def test_a_part_of_a_flag():
    part = Part.parse("3/16")
    assert part == Part(3, 16) and str(part) == "3/16"
    assert [number for number in range(40) if part.has(number)] == [3, 19, 35]
    assert all(map(WHOLE.has, range(5)))
    for flag in ("16/16", "3", "-1/4", "0/0", "1/4/5", "a/b", ""):
        with pytest.raises(UserError, match=f"--part={flag} is no part: write I/N, with I from 0"):
            Part.parse(flag)


CURATION = ("--pairs=p", "--teacher=t", "--output=o")
ALONE = {
    "filter": CURATION,
    "mine": CURATION,
    "embed": ("--model=m", "--input=i", "--output=o.zarr", "--prompt=none", "--part=0/2"),
    "evaluate": ("--model=bm25", "--dataset=d", "--output=o"),
    "prepare": ("--sources=s", "--output=o"),
    "recipe": ("--config=configs/recipe.py:small", "--workdir=w"),
    "convert": ("export", "--source=s", "--target=t"),
    "inspect_routing": ("--model=m", "--output=o"),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_command_of_one_process_refuses_the_variables_of_several(monkeypatch, capsys, name):
    for variable, value, cause in (
        ("TPU_WORKER_HOSTNAMES", "a,b", "TPU_WORKER_HOSTNAMES names several hosts"),
        ("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1", "JAX_COORDINATOR_ADDRESS is set"),
    ):
        monkeypatch.setenv(variable, value)
        assert launch(monkeypatch, name, *ALONE[name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {cause}, but this command runs as one process: unset it")
        assert error.count("\n") == 1
        assert ("--part=0/4" in error) == (name in ("filter", "mine"))


@pytest.fixture
def embed(monkeypatch, tmp_path):
    """embed(*flags) -> exit status, with a stand-in for the model, 40 texts and chunks of 8."""

    class Embedder(StandInTeacher):
        def encode(self, texts, prompt=None, dim=None):
            return super().encode(texts, prompt)[:, :dim]

    monkeypatch.setattr(embedder_module.Embedder, "load", lambda *_, **__: Embedder())
    monkeypatch.setattr(vectors, "CHUNK", 8)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "t.txt").write_text("\n".join(f"word{i} of {i % 7}" for i in range(35)) + "\n")

    def run(output, *flags):
        where = ("--model=model", "--input=t.txt", f"--output={output}", "--prompt=none")
        return launch(monkeypatch, "embed", *where, *flags)

    return run


def test_embeds_in_parts(embed, tmp_path, capsys):
    assert embed("whole.zarr", "--dtype=float16") == 0
    assert embed("e.zarr", "--dtype=float16", "--part=1/2") == 0
    assert "part 1/2 of e.zarr: float16 [16, 64], " in capsys.readouterr().out
    assert embed("e.zarr", "--dtype=float16", "--finish") == 2
    assert "3 of 5 chunks of 8 texts are not done (numbers 0, 2, 4)" in capsys.readouterr().err
    assert embed("e.zarr", "--dtype=float16", "--part=0/2") == 0
    assert embed("e.zarr", "--dtype=float16", "--finish") == 0
    assert "\ne.zarr: float16 [35, 64]\n" in capsys.readouterr().out
    assert files_of(tmp_path / "e.zarr") == files_of(tmp_path / "whole.zarr")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("e.npy", "--part=0/2"), "--part and --finish write a .zarr"),
        (("e.npy", "--finish"), "--part and --finish write a .zarr"),
        (("e.zarr", "--part=2/2"), "--part=2/2 is no part: write I/N"),
        (("e.zarr", "--part=0/2", "--finish"), "argument --finish: not allowed with argument"),
    ],
)
def test_refuses(embed, capsys, flags, message):
    assert embed(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
