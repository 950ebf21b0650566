"""Which heavy libraries a launcher loads: none for its help, hardly any to report a mistake, and no
more than it needs to work. A library that nobody needs costs every start seconds and memory."""

import json

import pytest
from conftest import ROOT, run_python
from helpers import labelled_model

LAUNCHERS = sorted(path.stem for path in (ROOT / "launch").glob("*.py"))
HEAVY = {
    *("apache_beam", "array_record", "bm25s", "datasets", "flax", "grain", "huggingface_hub"),
    *("ir_measures", "jax", "jaxlib", "matplotlib", "mteb", "numpy", "onnx", "onnxruntime"),
    *("onnxscript", "openvino", "optax", "orbax", "pandas"),
    *("pyarrow", "safetensors", "scipy", "sentence_transformers", "sentencepiece", "seqio"),
    *("sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets", "tensorflow_text"),
    *("tensorstore", "tokenizers", "torch", "transformers"),
}
# flax brings optax along.
MODEL = "flax jax jaxlib numpy optax safetensors sentencepiece tokenizers"
# Runs a script, and writes the names of all modules that are loaded when it ends.
PROBE = """
import atexit, pathlib, runpy, sys
report, *sys.argv = sys.argv[1:]
atexit.register(lambda: pathlib.Path(report).write_text(" ".join(sys.modules)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PAGE = "--config=configs/quickstart.py"
RECIPE = "--config=configs/recipe.py:small"
CURATION = ("--pairs=none", "--teacher=none", "--output=none")
# (launcher, flags, what is reported, the libraries that this takes)
MISTAKES = [
    (
        "convert",
        ("export", "--source=none", "--target=new"),
        "model folder none does not exist",
        "",
    ),
    ("convert", ("upcycle", "--source=a", "--target=b", "--mode=paper", "--noise=-1"), "noise", ""),
    ("embed", ("--model=none", "--input=x", "--output=x.npy", "--prompt=query"), "none", ""),
    (
        "embed",
        ("--model=a", "--input=x", "--output=x.npy", "--prompt=q", "--dtype=int8"),
        "int8",
        "",
    ),
    ("evaluate", ("--model=a", "--output=r.json", "--dim=x"), "--dim=x must be a number", ""),
    (
        "evaluate",
        ("--model=none", "--output=r.json", "--dataset=x"),
        "model folder none",
        "ir_measures numpy",
    ),
    ("evaluate", ("--model=a", "--output=r", "--data=.", "--suite=none.py"), "none.py", ""),
    ("filter", (*CURATION, "--k=0"), "k=0", ""),
    ("filter", CURATION, "none/manifest.json is missing", ""),
    ("inspect_routing", ("--model=none", "--output=new"), "model folder none does not exist", ""),
    ("mine", (*CURATION, "--count=0"), "count=0", ""),
    ("mine", (*CURATION, "--dtype=int8"), "dtype=int8", ""),
    ("plan", ("--topology=v5e:4x4", PAGE, "--set", "model.widht=3"), "model.widht", ""),
    ("plan", ("--topology=v5e:4", PAGE), "v5e has 2 dimensions", ""),
    ("plan", ("--topology=v5e:4x4", PAGE, "--step=sleep"), "choose from train", ""),
    ("prepare", ("--sources=none", "--output=o"), "cannot be read", "numpy sentencepiece"),
    (
        "prepare",
        ("--sources=x", "--output=o", "--rows_per_shard=0"),
        "1 or more",
        "numpy sentencepiece",
    ),
    ("recipe", ("--workdir=w", RECIPE, "--config.filtr.k=3"), "did you mean filter", ""),
    (
        "recipe",  # all steps are made, and none is run
        ("--workdir=w", RECIPE, "--config.stage2.set.batch_sise=4"),
        "did you mean batch_size",
        "array_record ir_measures numpy sentencepiece tokenizers",
    ),
    ("train", ("--workdir=w",), "the following arguments are required: --config", ""),
    ("verify_export", ("--model=none",), "model folder none does not exist", ""),
    ("verify_export", ("--model=a", "--runtimes=onyx"), "choose from sentence-transformers", ""),
    ("train", ("--workdir=w", "--config=none.py"), "config file none.py does not exist", ""),
    ("train", ("--workdir=w", PAGE, "--stps=3"), "unknown argument --stps=3", ""),
    ("train", ("--workdir=w", PAGE, "--config.model.widht=3"), "did you mean model.width", ""),
    ("train", ("--workdir=w", PAGE, "--config.steps=ten"), "it must be a int", ""),
]


# "Dive into the code" in README.md. Other rooms are loaded when a run needs them.
CORE = {
    *("data", "kernels", "losses", "models", "pairs", "routing", "stages", "tokenizers"),
    "training",
}


def test_the_training_loop_loads_the_core_alone():
    """A reader who follows its imports meets no other room."""
    code = "import sys, moe_embed_jax.training.loop; print(*sys.modules)"
    result = run_python(["-c", code])
    modules = result.stdout.split()
    own = {name.split(".")[1] for name in modules if name.startswith("moe_embed_jax.")}
    rooms = {name for name in own if (ROOT / "moe_embed_jax" / name).is_dir()}
    assert rooms == CORE
    assert not {"model_folder", "embedder", "inference_batches", "conversion"} & own
    heavy = {name.partition(".")[0] for name in modules} & HEAVY
    assert not heavy & {"matplotlib", "bm25s", "scipy", "safetensors", "ir_measures", "tensorflow"}


@pytest.fixture
def loaded(tmp_path):
    """loaded(*arguments of python) -> (the finished process, the heavy libraries it loaded)."""

    def run(*arguments):
        report = tmp_path / "modules"
        result = run_python(["-c", PROBE, report, *arguments])
        modules = {name.partition(".")[0] for name in report.read_text().split()}
        return result, modules & HEAVY

    return run


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help_loads_no_heavy_library(loaded, launcher):
    result, libraries = loaded(f"launch/{launcher}.py", "--help")
    assert result.returncode == 0 and "usage:" in result.stdout
    assert libraries == set()


@pytest.mark.parametrize(("launcher", "flags", "message", "needed"), MISTAKES)
def test_a_mistake_is_reported_before_heavy_libraries_are_loaded(
    loaded, launcher, flags, message, needed
):
    result, libraries = loaded(f"launch/{launcher}.py", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert libraries <= set(needed.split())


def test_every_launcher_has_a_mistake():
    assert {launcher for launcher, *_ in MISTAKES} == set(LAUNCHERS)


def test_configs_are_classes_of_plain_python(loaded, tmp_path):
    modules = "training.run_config", "planning.request", "recipe.config", "launching"
    lines = ["import moe_embed_jax", *(f"import moe_embed_jax.{name}" for name in modules)]
    (tmp_path / "imports.py").write_text("\n".join(lines))
    result, libraries = loaded(tmp_path / "imports.py")
    assert result.returncode == 0, result.stderr
    assert libraries == set()


def test_a_published_model_embeds_without_orbax(loaded, tmp_path, data_dir):
    model = labelled_model.write_model(tmp_path / "model", data_dir)
    (tmp_path / "texts.txt").write_text("one text\n")
    flags = (f"--model={model}", f"--input={tmp_path}/texts.txt", f"--output={tmp_path}/e.npy")
    result, libraries = loaded("launch/embed.py", *flags, "--prompt=none")
    assert result.returncode == 0, result.stderr
    assert libraries == set(MODEL.split())


def test_bm25_scores_without_a_model_and_its_libraries(loaded, tmp_path):
    files = {
        "corpus": [{"_id": "d", "title": "", "text": "a red fox"}],
        "queries": [{"_id": "q", "text": "red"}],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    output = tmp_path / "scores.json"
    flags = ("--model=bm25", f"--dataset={tmp_path}", f"--output={output}")
    result, libraries = loaded("launch/evaluate.py", *flags)
    assert result.returncode == 0, result.stderr
    assert json.loads(output.read_text())[tmp_path.name]["ndcg_at_10"] == 1.0
    # bm25s looks for jax, and takes its top-k where it finds it.
    assert libraries == {"bm25s", "ir_measures", "jax", "jaxlib", "numpy", "scipy"}


# What launchers import to work, and the libraries that this may load.
WORK = {
    "train": (
        ["training.loop"],
        f"{MODEL} array_record bm25s ir_measures matplotlib orbax scipy tensorboardX tensorstore",
    ),
    "plan": (["planning.run"], f"{MODEL} array_record"),
    "filter, mine and evaluate": (
        ["curation.consistency", "curation.negatives", "evaluation.suite", "evaluation.results"],
        f"{MODEL} array_record ir_measures matplotlib tensorflow_datasets tensorstore",
    ),
}


@pytest.mark.parametrize("name", WORK)
def test_work_loads_no_more_than_it_needs(loaded, tmp_path, name):
    modules, needed = WORK[name]
    (tmp_path / "imports.py").write_text("".join(f"import moe_embed_jax.{m}\n" for m in modules))
    result, libraries = loaded(tmp_path / "imports.py")
    assert result.returncode == 0, result.stderr
    assert libraries <= set(needed.split())
