"""How well a masked language model guesses: evaluations during the run, the table at its end."""

import pathlib

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_embed_jax.config import save_json
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.evaluation.pseudo_perplexity import MaskedModel, load_documents
from moe_embed_jax.processes import wait_for_all
from moe_embed_jax.tokenizers.vocabulary import WORD_START
from moe_embed_jax.training import pictures
from moe_embed_jax.training.records import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    append_record,
    read_records,
)
from moe_embed_jax.training.report import PICTURE_FILE, ROUTING_TEXTS
from moe_embed_jax.training.run_config import MaskedRunConfig
from moe_embed_jax.training.workdir import RESULTS_FILE

METRIC = "perplexity"
SET = "held_out"
EXAMPLES = ("en", "de", "es", "ru", "zh-Hans")  # languages of the fill-mask examples, if there
EXAMPLE_TOKENS = 24  # of a document, where one token is hidden


class MaskedJudge:
    """Evaluates one run on the held-out documents of its data; keeps the records in its folder."""

    def __init__(
        self,
        workdir: pathlib.Path,
        config: MaskedRunConfig,
        documents_folder: pathlib.Path,
        is_writer: bool,
    ):
        self.workdir = workdir
        self.config = config
        self.is_writer = is_writer
        self.documents = load_documents(documents_folder)
        self.model: MaskedModel | None = None
        self._routing: dict[str, np.ndarray] = {}  # known at the end of a run

    def use(self, model: MaskedModel) -> None:
        """The model for `report`, in place of an evaluation that was recorded before."""
        self.model = model

    def evaluate(self, model: MaskedModel, step: int, every_language: bool) -> dict[str, float]:
        """Evaluates now; returns the pseudo-perplexity, a geometric mean over languages."""
        self.model = model
        languages = list(self.documents)
        if not every_language:
            count = min(self.config.eval_languages, len(languages))
            languages = [languages[i * len(languages) // count] for i in range(count)]
        sets = {}
        for language in languages:
            if found := model.pseudo_perplexity(self.documents[language]):
                sets[f"{SET}/{language}"] = found
        if not sets:
            return {}
        if self.is_writer:
            record = {"step": step, "complete": every_language, "sets": sets}
            append_record(self.workdir / EVALUATIONS_FILE, record)
        suffix = "" if every_language else f" ({len(sets)} languages)"
        return {f"{METRIC}/{SET}{suffix}": geometric_mean(sets.values())}

    def report(self) -> None:
        """Writes results.json; prints the table and some guesses. `draw` comes after it.

        Every process calls this: what is encoded is encoded on the mesh; process 0 writes.
        """
        self._routing = self._routing_by_language()
        examples = self._examples()
        if self.is_writer:
            self._write_results(examples)
            print(f"Picture, metrics and checkpoints are in {self.workdir}/")
        wait_for_all("report")

    def draw(self) -> None:
        """Writes report.png, also of a run that was stopped: what there is of it."""
        records = read_records(self.workdir / METRICS_FILE) if self.is_writer else []
        if records:
            evaluations = read_records(self.workdir / EVALUATIONS_FILE)
            path = self.workdir / PICTURE_FILE
            pictures.draw_report(path, self.config, records, evaluations, self._routing)

    def _write_results(self, examples: list) -> None:
        evaluations = read_records(self.workdir / EVALUATIONS_FILE)
        complete = [record for record in evaluations if record["complete"]]
        if not complete:  # the file says that the run is finished
            save_json(self.workdir / RESULTS_FILE, {})
        else:
            columns = {}
            if complete[0]["step"] == 0:
                start = "before" if self.config.init.source else "untrained"
                columns[start] = complete[0]["sets"]
            columns["trained"] = complete[-1]["sets"]
            save_json(self.workdir / RESULTS_FILE, columns)
            console = Console(width=110)
            console.print(_table(columns))
            for language, text, hidden, guesses in examples:
                line = f"\n{language}: {text}\n  hidden: {hidden}   guessed: {guesses}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _examples(self) -> list[tuple[str, str, str, str]]:
        """[(language, text with the hidden token as ___, that token, the best guesses)].

        Not chosen by result: the middle token of the first document's beginning.
        """
        vocabulary = self.model.vocabulary
        languages = [language for language in EXAMPLES if language in self.documents]
        languages = languages or list(self.documents)[:3]
        sequences, columns = [], []
        for language in languages:
            text = self.documents[language][0]
            (ids,) = vocabulary.encode_texts([text], min(EXAMPLE_TOKENS, self.model.row_length))
            sequences.append(ids)
            columns.append(len(ids) // 2)
        id_RN, probability_RN = self.model.fill_mask(sequences, columns)
        examples = []
        for i, language in enumerate(languages):
            ids, column = sequences[i], columns[i]
            parts = [vocabulary.decode(part) for part in (ids[:column], ids[column + 1 :])]
            guesses = ", ".join(
                f"{_shown(vocabulary, guess)} {probability:.2f}"
                for guess, probability in zip(id_RN[i], probability_RN[i], strict=True)
                if guess < vocabulary.size
            )
            hidden = _shown(vocabulary, ids[column])
            examples.append((language, " ___ ".join(parts), hidden, guesses))
        return examples

    def _routing_by_language(self) -> dict[str, np.ndarray]:
        """{language: share of assignments [M, E]} of held-out documents; empty without experts."""
        if not self.config.model.num_moe_layers:
            return {}
        model = self.model
        lengths = {side: model.row_length for side in ("query", "document")}
        embedder = Embedder(model.model, model.params, model.vocabulary, lengths, model.mesh)
        return {
            language: embedder.expert_shares(texts[:ROUTING_TEXTS], prompt=None)
            for language, texts in self.documents.items()
        }


def geometric_mean(results) -> float:
    """Of the perplexities: exp of the mean loss, every language alike."""
    return float(np.exp(np.mean([np.log(result[METRIC]) for result in results])))


def _shown(vocabulary, token: int) -> str:
    """A token for readers; a bare start of a word decodes to nothing."""
    return repr(vocabulary.decode([token]) or WORD_START)


def _table(columns: dict[str, dict]) -> Table:
    table = Table(title="Pseudo-perplexity of held-out documents (share guessed right)")
    table.add_column("language")
    table.add_column("tokens", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for name, result in columns["trained"].items():
        values = [
            f"{columns[c][name][METRIC]:,.1f} ({columns[c][name]['accuracy']:.1%})" for c in columns
        ]
        table.add_row(name.split("/", 1)[1], f"{result['tokens']:,}", *values)
    table.add_section()
    means = [f"{geometric_mean(columns[c].values()):,.1f}" for c in columns]
    tokens = sum(result["tokens"] for result in columns["trained"].values())
    count = len(columns["trained"])
    table.add_row(f"geometric mean of {count}", f"{tokens:,}", *means, style="bold")
    return table
