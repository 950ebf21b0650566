"""What a contrastive run is judged by: nDCG@10 on the held-out retrieval sets of its data."""

import numpy as np
from rich.table import Table
from rich.text import Text

from moe_embed_jax.embedder import Embedder
from moe_embed_jax.evaluation.bm25 import evaluate_bm25
from moe_embed_jax.evaluation.heldout import (
    Metric,
    evaluate_heldout,
    load_heldout,
    sample_languages,
)
from moe_embed_jax.evaluation.retrieval import mean_over_languages
from moe_embed_jax.search.knn import top_k

EXAMPLES = ("translations/es", "descriptions/de", "descriptions/zh-Hans")  # sets, if there
ROUTING_TEXTS = 64  # held-out documents per language for the routing map


class HeldOutRetrieval:
    """The held-out sets of a data directory; the `HeldOut` of a contrastive run."""

    metric = Metric("ndcg_at_10", "nDCG@10", "retrieval", is_log=False)

    def __init__(self, data_dir: str, is_optional: bool, languages: int):
        """
        Args:
          is_optional: a user's own pairs: there may be no sets, and nobody has checked that what
            is trained on is not in them.
          languages: of a multilingual set, in an evaluation during the run.
        """
        self.folder = f"{data_dir}/retrieval"
        self.sets = load_heldout(data_dir, is_optional)
        self._are_unchecked = is_optional
        self._languages = languages
        self._sampled = sample_languages(self.sets, languages)

    def evaluate(self, embedder: Embedder, every_language: bool) -> dict[str, dict]:
        """{"<set>/<language>": metrics}; empty without sets."""
        if not self.sets:
            return {}
        return evaluate_heldout(embedder, self.sets if every_language else self._sampled)

    def scores(self, results: dict[str, dict], every_language: bool) -> dict[str, float]:
        """{"ndcg_at_10/<set>": mean over its languages}."""
        suffix = "" if every_language else f" ({self._languages} languages)"
        key = self.metric.key
        means = mean_over_languages(results)
        return {f"{key}/{name}{suffix}": mean[key] for name, mean in means.items()}

    def baselines(self) -> dict[str, dict]:
        """Columns of the table beside the model's."""
        return {"BM25": {name: evaluate_bm25(each) for name, each in self.sets.items()}}

    def table(self, columns: dict[str, dict]) -> Table:
        """`columns`: {name: {"<set>/<language>": metrics}}, "trained" among them."""
        title = "nDCG@10 on held-out data"
        if not self._are_unchecked:
            title += " (no English string of it was trained on)"
        table = Table(title=title)
        table.add_column("set")
        table.add_column("language")
        table.add_column("queries", justify="right")
        table.add_column("documents", justify="right")
        for name in columns:
            table.add_column(name, justify="right")
        key = self.metric.key
        means = {name: mean_over_languages(results) for name, results in columns.items()}
        for set_name, mean in means["trained"].items():
            for name, metrics in columns["trained"].items():
                if name.split("/")[0] == set_name and mean["languages"] > 1:
                    values = [f"{columns[c][name][key]:.3f}" for c in columns]
                    counts = (str(metrics["queries"]), str(metrics["documents"]))
                    table.add_row(set_name, name.split("/")[1], *counts, *values)
            values = [f"{means[c][set_name][key]:.3f}" for c in columns]
            counts = (str(mean["queries"]), str(mean["documents"]))
            label = f"mean of {mean['languages']}" if mean["languages"] > 1 else "en"
            table.add_section()
            table.add_row(set_name, label, *counts, *values, style="bold", end_section=True)
        return table

    def examples(self, embedder: Embedder) -> list[Text | str]:
        """Lines: three held-out queries in three languages and their best documents.

        They are not chosen by result: each is the middle query of its set.
        """
        multilingual = [name for name in self.sets if not name.startswith("api/")]
        names = [name for name in EXAMPLES if name in self.sets]
        names += [name for name in multilingual if name not in names][: 3 - len(names)]
        lines = []
        for name in names:
            each = self.sets[name]
            middle = len(each.queries) // 2
            query = each.queries[middle]
            query_BD = embedder.encode([query], prompt="query")
            document_ND = embedder.encode(each.documents, prompt="document")
            score_BK, index_BK = top_k(query_BD, document_ND, 3)
            judged = each.qrels[each.query_ids[middle]]
            lines.append(Text.assemble("\n", (name, "bold"), f"  query: {query}"))
            for score, index in zip(score_BK[0], index_BK[0], strict=True):
                mark = "right" if judged.get(each.document_ids[index], 0) > 0 else "     "
                text = each.documents[index][:80].replace("\n", " ")
                lines.append(f"  {score:.3f} {mark} {text}")
        return lines

    def expert_shares(self, embedder: Embedder) -> dict[str, np.ndarray]:
        """{language: share of assignments [Y, E]} of held-out documents."""
        shares = {}
        for name, each in self.sets.items():
            set_name, language = name.split("/")
            if set_name == "translations" or (set_name == "api" and language not in shares):
                shares[language] = embedder.expert_shares(each.documents[:ROUTING_TEXTS])
        return shares
