"""embed and evaluate as one program of two processes = the same in one process."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from helpers import labelled_model
from helpers.forked import run_forked
from helpers.two_processes import Together

from moe_embed_jax.search.vectors import VectorStore

TEXTS = [each.text for each in labelled_model.labelled(12)]


def commands(folder, output):
    embed = ("embed", f"--model={folder}/model", f"--input={folder}/texts.jsonl")
    return [
        [*embed, "--prompt=document", f"--output={output}/e.npy"],
        [*embed, "--prompt=query", f"--output={output}/e.zarr"],
        [
            *("evaluate", f"--model={folder}/model", f"--dataset={folder}/set"),
            f"--output={output}/scores.json",
        ],
    ]


def write_inputs(folder, data_dir):
    labelled_model.write_model(folder / "model", data_dir)
    lines = [json.dumps(text) for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "set").mkdir()
    rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(TEXTS[:12])]
    (folder / "set" / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"_id": f"q{i}", "text": text[:20]} for i, text in enumerate(TEXTS[:12])]
    (folder / "set" / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(12))
    (folder / "set" / "qrels.tsv").write_text(judged)


@pytest.mark.slow
def test_two_processes_embed_and_evaluate_as_one(tmp_path, data_dir):
    write_inputs(tmp_path, data_dir)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = run_forked([__file__, tmp_path, tmp_path / "one"], devices=2)
    assert alone.returncode == 0, alone.stderr
    together = Together([__file__, tmp_path, tmp_path / "two"], tmp_path, devices=1)
    together.wait()
    for name in ("e.npy", "scores.json"):
        one, two = ((tmp_path / each / name).read_bytes() for each in ("one", "two"))
        assert one == two, name
    stores = [VectorStore(tmp_path / each / "e.zarr") for each in ("one", "two")]
    assert len(stores[0]) == len(TEXTS) == 24
    np.testing.assert_array_equal(stores[0][:], stores[1][:])
    # Nothing is left of what process 0 wrote, and only it printed.
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        *("e.npy", "e.zarr", "scores.json", "tokenised-0", "tokenised-1")
    ]
    assert "e.zarr: float32" in together.output("out0") and together.output("out1") == ""
    # The texts of both are counted, however they were shared.
    told = [
        [line for line in out.splitlines() if "longer than" in line]
        for out in (alone.stdout, together.output("out0"))
    ]
    assert told[0] == told[1]
    assert told[0][0] == "document: none of 24 texts is longer than 2048 tokens"
    counts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/tokenised-*"))]
    # One process: texts twice, queries and documents. Each of two: half of them.
    assert counts[0] == [24, 24, 12, 12] and counts[1] == counts[2] == [12, 12, 6, 6]


def main(folder: str, output: str) -> None:
    """Runs the launchers in this process, and writes how many texts it tokenised at a time."""
    import importlib.util
    import pathlib

    from moe_embed_jax import distributed
    from moe_embed_jax.tokenizers.tokenizer import Tokenizer

    encode_counted, counts = Tokenizer.encode_counted, []

    def counted(self, texts, max_length):
        counts.append(len(texts))
        return encode_counted(self, texts, max_length)

    Tokenizer.encode_counted = counted
    start = distributed.start

    def start_once():
        distributed.start = lambda: None
        start()

    distributed.start = start_once
    for name, *flags in commands(folder, output):
        spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.argv = [name, *flags]
        module.main()
    import jax

    file = pathlib.Path(output) / f"tokenised-{jax.process_index()}"
    file.write_text(json.dumps([count for count in counts if count]))


if __name__ == "__main__":
    main(*sys.argv[1:])
