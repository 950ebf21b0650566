"""The same suite with our encoder and with sentence-transformers': every score side by side.

    python benchmarks/evaluation_parity.py --model=E5 --data=ROOT --output=parity \\
        [--suite=configs/evaluation.py[:VARIANT]] [--threads=2]

MODEL is a folder of multilingual-e5-small (or another with a BERT or XLM-RoBERTa checkpoint) that
both can load. Both get E5's prefixes: "query: " for queries and for symmetric tasks, "passage: "
for documents. Vectors are kept in OUTPUT/vectors, per encoder: a run that was interrupted
continues, and one that is repeated only scores. Writes parity.md, a row for each task and one for
each score; exit status 1 if any score (0 to 1) differs by more than 0.001, 2 for a mistake.

Of such a folder sentence-transformers does not always find the right tokenizer: with a bare
sentencepiece.bpe.model beside a BERT config it loads another one and says nothing. So PyTorch runs
a copy to which transformers' own XLM-RoBERTa tokenizer is saved.
"""

import pathlib
import sys
import time

from moe_embed_jax import launching

LARGEST = 1e-3  # difference that counts as equal
PROMPTS = {"query": "query: ", "document": "passage: ", "symmetric": "query: "}
COUNTS = ("queries", "documents", "pairs", "texts")


def main() -> int:
    flags = launching.parser(__doc__)
    flags.add_argument("--model", required=True, help="folder that both can load")
    flags.add_argument("--data", required=True, help="folder of the suite's paths")
    flags.add_argument("--suite", default="configs/evaluation.py", help="page, with a :variant")
    flags.add_argument("--output", required=True, help="folder to write and to continue from")
    flags.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: as many as it takes")
    arguments = flags.parse_args()

    from moe_embed_jax.evaluation.suite import check_files, load_suite

    output, data = pathlib.Path(arguments.output), pathlib.Path(arguments.data)
    tasks = load_suite(arguments.suite)
    check_files(tasks, data)
    reference = reference_folder(pathlib.Path(arguments.model), output / "reference")
    encoders = {"ours": arguments.model, "reference": f"sentence-transformers:{reference}"}
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    scores = {key: all_scores(name, tasks, data, output) for key, name in encoders.items()}
    rows = compare(scores["ours"], scores["reference"])
    page = markdown(rows, {name: task.main_score for name, task in tasks.items()})
    output.mkdir(parents=True, exist_ok=True)
    (output / "parity.md").write_text(page)
    print(page)
    return int(largest(rows) > LARGEST)


def reference_folder(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy (links) of a model's folder that has tokenizer.json, as transformers makes it."""
    from moe_embed_jax.errors import UserError

    if (model / "tokenizer.json").is_file():
        return model
    if not (model / "sentencepiece.bpe.model").is_file():
        raise UserError(f"{model} has neither tokenizer.json nor sentencepiece.bpe.model")
    if not (folder / "tokenizer.json").is_file():
        from transformers import XLMRobertaTokenizer

        folder.mkdir(parents=True, exist_ok=True)
        for path in model.iterdir():
            if path.is_file() and path.suffix in (".json", ".safetensors"):
                link = folder / path.name
                link.unlink(missing_ok=True)
                link.symlink_to(path.resolve())
        XLMRobertaTokenizer.from_pretrained(str(model)).save_pretrained(folder)
    return folder


def all_scores(name: str, tasks: dict, data: pathlib.Path, output: pathlib.Path) -> dict:
    """{(task, subset, metric): score}; says what it does on the way."""
    from moe_embed_jax.curation.teacher import load_teacher
    from moe_embed_jax.evaluation.suite import run_tasks
    from moe_embed_jax.evaluation.suite_model import model_vectors
    from moe_embed_jax.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig())
    encoder = load_teacher(name, mesh)
    vectors = model_vectors(encoder, output / "vectors", PROMPTS, mesh, [None], "float32")
    found, start = {}, time.monotonic()
    for result in run_tasks(tasks, data, vectors):
        for subset in result.subsets:
            for metric, score in subset.scores[None].items():
                found[result.name, subset.name, metric] = score
        seconds = time.monotonic() - start
        mean = f"{result.main_score} {result.mean(None):.4f}"
        print(f"{name}: {result.name}: {mean}, {seconds:,.0f} s so far", flush=True)
    return found


def compare(ours: dict, reference: dict) -> list[tuple]:
    """(task, subset, metric, ours, reference, difference); counts must be equal.

    Raises `ValueError` where they are not, or one has scores that the other lacks.
    """
    if ours.keys() != reference.keys():
        raise ValueError(f"scores of one encoder only: {sorted(ours.keys() ^ reference.keys())}")
    rows = []
    for key, score in ours.items():
        if key[-1] not in COUNTS:
            rows.append((*key, score, reference[key], abs(score - reference[key])))
        elif score != reference[key]:
            raise ValueError(f"{key}: {score} and {reference[key]}")
    return rows


def largest(rows: list[tuple]) -> float:
    return max(row[-1] for row in rows)


def summary(rows: list[tuple], main_scores: dict[str, str]) -> list[str]:
    """A table of tasks: the mean of the main score over subsets, by both; the largest difference of
    any score."""
    lines = [
        "| task | main score | subsets | ours | sentence-transformers | scores | off by at most |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for task, main_score in main_scores.items():
        of_task = [row for row in rows if row[0] == task]
        main = [row for row in of_task if row[2] == main_score]
        ours, reference = (sum(row[i] for row in main) / len(main) for i in (3, 4))
        means = f"{ours:.6f} | {reference:.6f}"
        compared = f"{len(of_task)} | {largest(of_task):.6f}"
        lines.append(f"| {task} | {main_score} | {len(main)} | {means} | {compared} |")
    return lines


def markdown(rows: list[tuple], main_scores: dict[str, str]) -> str:
    """`main_scores`: task -> metric."""
    worst = max(rows, key=lambda row: row[-1])
    above = sum(row[-1] > LARGEST for row in rows)
    lines = [
        f"{len(rows)} scores; largest difference {worst[-1]:.6f} ({' '.join(worst[:3])}); "
        f"{above} differ by more than {LARGEST}",
        "",
        *summary(rows, main_scores),
        "",
        "| task | subset | metric | ours | sentence-transformers | difference |",
        "|---|---|---|---:|---:|---:|",
    ]
    for *names, ours, reference, difference in rows:
        lines.append(f"| {' | '.join(names)} | {ours:.6f} | {reference:.6f} | {difference:.6f} |")
    return "\n".join(lines) + "\n"


def run() -> int:
    """`launching.run` with the exit status of `main`."""
    status = []
    return launching.run(lambda: status.append(main())) or status[0]


if __name__ == "__main__":
    sys.exit(run())
