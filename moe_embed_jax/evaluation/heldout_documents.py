"""What a masked language model is judged by: pseudo-perplexity of held-out documents."""

import pathlib

import numpy as np
from rich.table import Table

from moe_embed_jax.embedder import Embedder
from moe_embed_jax.evaluation.heldout import Metric
from moe_embed_jax.evaluation.pseudo_perplexity import MaskedModel, load_documents
from moe_embed_jax.tokenizers.vocabulary import WORD_START

SET = "held_out"
EXAMPLES = ("en", "de", "es", "ru", "zh-Hans")  # languages of the fill-mask examples, if there
EXAMPLE_TOKENS = 24  # of a document, where one token is masked
ROUTING_TEXTS = 64  # held-out documents per language for the routing map


class HeldOutDocuments:
    """The held-out documents of a folder; the `HeldOut` of masked language modelling."""

    metric = Metric("perplexity", "pseudo-perplexity", "documents", is_log=True)

    def __init__(self, folder: pathlib.Path, languages: int):
        """`languages`: how many are evaluated during the run."""
        self.folder = folder
        self.sets = load_documents(folder)  # by language
        self._languages = languages

    def evaluate(self, model: MaskedModel, every_language: bool) -> dict[str, dict]:
        """{"held_out/<language>": metrics}, without languages whose documents are too short."""
        languages = list(self.sets)
        if not every_language:
            count = min(self._languages, len(languages))
            languages = [languages[i * len(languages) // count] for i in range(count)]
        results = {}
        for language in languages:
            if metrics := model.pseudo_perplexity(self.sets[language]):
                results[f"{SET}/{language}"] = metrics
        return results

    def scores(self, results: dict[str, dict], every_language: bool) -> dict[str, float]:
        """{"perplexity/held_out": geometric mean over languages}."""
        suffix = "" if every_language else f" ({len(results)} languages)"
        return {f"{self.metric.key}/{SET}{suffix}": geometric_mean(results.values())}

    def baselines(self) -> dict[str, dict]:
        """None: perplexities of models with other tokenizers cannot be compared."""
        return {}

    def table(self, columns: dict[str, dict]) -> Table:
        """`columns`: {name: {"held_out/<language>": metrics}}, "trained" among them."""
        table = Table(title="Pseudo-perplexity of held-out documents (share guessed right)")
        table.add_column("language")
        table.add_column("tokens", justify="right")
        for name in columns:
            table.add_column(name, justify="right")
        for name, result in columns["trained"].items():
            values = [
                f"{results[name]['perplexity']:,.1f} ({results[name]['accuracy']:.1%})"
                for results in columns.values()
            ]
            table.add_row(name.split("/", 1)[1], f"{result['tokens']:,}", *values)
        table.add_section()
        means = [f"{geometric_mean(results.values()):,.1f}" for results in columns.values()]
        tokens = sum(result["tokens"] for result in columns["trained"].values())
        count = len(columns["trained"])
        table.add_row(f"geometric mean of {count}", f"{tokens:,}", *means, style="bold")
        return table

    def examples(self, model: MaskedModel) -> list[str]:
        """Lines: texts with the masked token as ___, that token, and the best guesses.

        They are not chosen by result: each is the middle token of the first document's beginning.
        """
        vocabulary = model.vocabulary
        languages = [language for language in EXAMPLES if language in self.sets]
        languages = languages or list(self.sets)[:3]
        sequences, columns = [], []
        for language in languages:
            text = self.sets[language][0]
            (ids,) = vocabulary.encode_texts([text], min(EXAMPLE_TOKENS, model.row_length))
            sequences.append(ids)
            columns.append(len(ids) // 2)
        id_RN, probability_RN = model.fill_mask(sequences, columns)
        lines = []
        for i, language in enumerate(languages):
            ids, column = sequences[i], columns[i]
            parts = [vocabulary.decode(part) for part in (ids[:column], ids[column + 1 :])]
            guesses = ", ".join(
                f"{_shown(vocabulary, guess)} {probability:.2f}"
                for guess, probability in zip(id_RN[i], probability_RN[i], strict=True)
                if guess < vocabulary.size
            )
            masked = _shown(vocabulary, ids[column])
            text = " ___ ".join(parts)
            lines.append(f"\n{language}: {text}\n  masked: {masked}   guessed: {guesses}")
        return lines

    def expert_shares(self, model: MaskedModel) -> dict[str, np.ndarray]:
        """{language: share of assignments [Y, E]} of held-out documents."""
        lengths = {side: model.row_length for side in ("query", "document")}
        embedder = Embedder(model.model, model.params, model.vocabulary, lengths, model.mesh)
        return {
            language: embedder.expert_shares(texts[:ROUTING_TEXTS], prompt=None)
            for language, texts in self.sets.items()
        }


def geometric_mean(results) -> float:
    """Of the perplexities: exp of the mean loss, every language alike."""
    return float(np.exp(np.mean([np.log(result["perplexity"]) for result in results])))


def _shown(vocabulary, token: int) -> str:
    """A token for readers; a bare start of a word decodes to nothing."""
    return repr(vocabulary.decode([token]) or WORD_START)
