"""report.md: what each step took and gave, how good the models are, how to use the last one."""

import pathlib

from moe_embed_jax.data.text_files import written_whole
from moe_embed_jax.evaluation.heldout_retrieval import HeldOutRetrieval
from moe_embed_jax.evaluation.model_scores import BM25
from moe_embed_jax.markdown_table import markdown_table
from moe_embed_jax.recipe import picture
from moe_embed_jax.recipe.config import MERGED, STAGES
from moe_embed_jax.recipe.facts import TRAINED, Facts, Training, collect
from moe_embed_jax.recipe.steps import Step
from moe_embed_jax.recipe.view import duration

MARKDOWN_FILE, PICTURE_FILE = "report.md", "report.png"
TITLES = {BM25: "BM25", MERGED: MERGED} | {name: f"stage {name[-1]}" for name in STAGES}


def write_report(
    steps: list[Step], workdir: pathlib.Path, beside: tuple[str, dict] | None = None
) -> str:
    """Writes report.md and report.png of a finished recipe; returns the table of evaluations.

    beside: `inputs.last_scores` of another recipe, to compare the last models.
    """
    facts = collect(steps, workdir, beside)
    picture.draw(workdir / PICTURE_FILE, facts)
    with written_whole(workdir / MARKDOWN_FILE) as file:
        file.write(markdown(facts, workdir).encode())
    return evaluation_table(facts)


def markdown(facts: Facts, workdir: pathlib.Path) -> str:
    total = duration(sum(facts.seconds.values()))
    steps = [[name, duration(time), _outcome(name, facts)] for name, time in facts.seconds.items()]
    models = [[TITLES[name], *_model_cells(stage)] for name, stage in facts.stages.items()]
    model_columns = ["", "parameters", "active per token", "steps", "batch", "tokens", "loss"]
    parts = [
        f"# Recipe in {workdir}",
        f"![losses, pairs, evaluations]({PICTURE_FILE})",
        f"## Steps ({total} in all)",
        markdown_table(["step", "time", "what came out"], steps, "lrl"),
        "## Models",
        markdown_table(model_columns, models, "lrrrrrr"),
        "Loss: mean over the last tenth of the steps. Losses of different stages measure different "
        "things.",
    ]
    if facts.filtered:
        parts += ["## Pairs kept by the filter", _filter_table(facts.filtered)]
    parts += ["## Evaluation", _evaluation(facts)]
    if facts.beside and facts.scores:
        parts += [f"## Beside {facts.beside[0]}", _beside(facts)]
    parts += ["## Use", _use(workdir, facts.models[-1])]
    return "\n\n".join(parts) + "\n"


def _outcome(name: str, facts: Facts) -> str:
    if name == "prepare":
        manifest = facts.pairs["prepare"]
        return f"{manifest['rows']:,} pairs in {len(manifest['languages'])} languages"
    if name == "filter":
        kept, read = facts.pairs["filter"]["rows"], facts.pairs["prepare"]["rows"]
        return f"{kept:,} of {read:,} pairs kept ({kept / read:.1%})"
    if name == "mine":
        total = facts.mined.get("total")
        if not total:
            return f"{facts.pairs['mine']['rows']:,} pairs"
        return (
            f"{total['negatives']:,} hard negatives for {total['queries']:,} queries; "
            f"{total['short'] + total['empty']:,} found fewer than asked for"
        )
    if name in facts.stages:
        stage = facts.stages[name]
        loss = f"loss {stage.loss_S[0]:.3f} -> {stage.final_loss:.3f}"
        if TRAINED in stage.perplexity:
            columns = " -> ".join(f"{value:,.1f}" for value in stage.perplexity.values())
            return f"{loss}, pseudo-perplexity {columns}"
        return loss
    if name == "merge":
        return f"checkpoints {', '.join(f'{step:,}' for step in facts.merged)} of stage 3 as one"
    if name == "evaluate":
        return f"{len(facts.scores) - 1} models and BM25"
    if name == "export":
        return f"a PyTorch folder of {facts.exported_bytes / 1e6:,.1f} MB"
    return "multilingual-e5-small"


def _model_cells(stage: Training) -> list[str]:
    steps = len(stage.loss_S)
    return [
        f"{stage.total:,}",
        f"{stage.active:,}",
        f"{steps:,}",
        f"{stage.batch_size:,} {stage.unit}",
        f"{stage.tokens:,}",
        f"{stage.final_loss:.3f}",
    ]


def _filter_table(report: dict) -> str:
    sources: dict[str, list[int]] = {}
    for group in report["groups"]:
        counts = sources.setdefault(group["source"], [0, 0])
        counts[0] += group["pairs"]
        counts[1] += group["kept"]
    rows = [[name, f"{n:,}", f"{kept:,}", f"{kept / n:.1%}"] for name, (n, kept) in sources.items()]
    return markdown_table(["source", "pairs", "kept", "share"], rows, "lrrr")


def _evaluation(facts: Facts) -> str:
    if not facts.scores:
        return "No retrieval sets: name BEIR folders with `--config.evaluate.beir=FOLDER,FOLDER`."
    return (
        evaluation_table(facts)
        + "\n\nnDCG@10 by exact search, means over the languages of a set. BM25 over words has no "
        "dimensions. Stage 1 was trained to guess words, not to embed: it is the baseline."
    )


def evaluation_table(facts: Facts) -> str:
    """Sets x dimensions by models; empty without evaluations."""
    if not facts.scores:
        return ""
    models = [BM25, *facts.models]
    rows = []
    for dim, sets in facts.scores[facts.models[-1]].items():
        for name, metrics in sets.items():
            values = [facts.ndcg(model, dim, name) for model in models]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            rows.append([name, str(metrics["languages"]), dim, *cells])
    rows.sort(key=lambda row: row[0])  # stable: the widths of a set stay in their order
    head = ["set", "languages", "dimensions", *(TITLES[model] for model in models)]
    return markdown_table(head, rows, "lrr" + "r" * len(models))


def _beside(facts: Facts) -> str:
    """The last model against another recipe's, where both have the set and the width."""
    model, (_, others) = facts.models[-1], facts.beside
    rows = []
    for dim, sets in facts.scores[model].items():
        for name in sets:
            if other := others.get(dim, {}).get(name):
                ours, theirs = facts.ndcg(model, dim, name), other[HeldOutRetrieval.metric.key]
                rows.append([name, dim, f"{theirs:.3f}", f"{ours:.3f}", f"{ours - theirs:+.3f}"])
    if not rows:
        return "No set was evaluated at equal dimensions by both."
    rows.sort(key=lambda row: row[0])
    head = ["set", "dimensions", "that one", f"this {TITLES[model]}", "difference"]
    return markdown_table(head, rows, "lrrrr") + "\n\nOne run of each, without a second seed."


def _use(workdir: pathlib.Path, model: str) -> str:
    model = workdir / model
    return f"""```
python launch/embed.py --model={model} --input=texts.jsonl --prompt=document --output=x.npy
python launch/evaluate.py --model={model} --dataset=BEIR_FOLDER --output=results.json
```

```python
from moe_embed_jax import Embedder

embedder = Embedder.load("{model}")
queries = embedder.encode(["..."], prompt="query")
documents = embedder.encode(["..."], prompt="document")
```

`{workdir}/export` is the same model for PyTorch: a self-contained folder that sentence-transformers
and transformers load (`trust_remote_code=True`)."""
