"""How good the model is and how it got there: evaluations during the run, the table at its end."""

import pathlib

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_embed_jax.config import save_json
from moe_embed_jax.embedder import Embedder
from moe_embed_jax.evaluation.bm25 import evaluate_bm25
from moe_embed_jax.evaluation.heldout import evaluate_heldout, load_heldout, sample_languages
from moe_embed_jax.evaluation.retrieval import mean_over_languages
from moe_embed_jax.processes import wait_for_all
from moe_embed_jax.search.knn import top_k
from moe_embed_jax.training import pictures
from moe_embed_jax.training.records import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    append_record,
    read_records,
)
from moe_embed_jax.training.run_config import RunConfig
from moe_embed_jax.training.workdir import RESULTS_FILE

ROUTING_FILE = "routing.json"
PICTURE_FILE = "report.png"
METRIC = "ndcg_at_10"
ROUTING_TEXTS = 64  # held-out documents per language for the routing map


class Judge:
    """Evaluates one run on the held-out sets of its data; keeps the records in its folder.

    A run on a folder of pairs is judged by the sets that lie in `data.dir`/retrieval, if any.
    """

    def __init__(self, workdir: pathlib.Path, config: RunConfig, is_writer: bool):
        self.workdir = workdir
        self.config = config
        self.is_writer = is_writer
        is_optional = bool(config.data.pairs)
        self.sets = load_heldout(config.data.dir, is_optional)
        if is_writer and not self.sets:
            print(f"evaluation  none: there are no held-out sets in {config.data.dir}/retrieval")
        self.sampled = sample_languages(self.sets, config.eval_languages)
        self.embedder: Embedder | None = None
        self._routing: dict[str, np.ndarray] = {}  # known at the end of a run

    def use(self, embedder: Embedder) -> None:
        """The model for `report`, in place of an evaluation that was recorded before."""
        self.embedder = embedder

    def evaluate(self, embedder: Embedder, step: int, every_language: bool) -> dict[str, float]:
        """Evaluates now; returns {"ndcg_at_10/<set>": mean over the languages evaluated}.

        Empty, and nothing is recorded, where there is nothing to evaluate on.
        """
        self.embedder = embedder
        if not self.sets:
            return {}
        sets = self.sets if every_language else self.sampled
        results = evaluate_heldout(embedder, sets)
        if self.is_writer:
            record = {"step": step, "complete": every_language, "sets": results}
            append_record(self.workdir / EVALUATIONS_FILE, record)
        suffix = "" if every_language else f" ({self.config.eval_languages} languages)"
        means = mean_over_languages(results)
        return {f"{METRIC}/{name}{suffix}": mean[METRIC] for name, mean in means.items()}

    def report(self) -> None:
        """Writes results.json ({} without sets), and routing.json of a model with experts
        ({language: each layer's shares of the assignments}); prints the table and some searches.
        `draw` comes after it.

        Every process calls this: what is encoded is encoded on the mesh; process 0 writes.
        """
        self._routing = self._routing_by_language()
        searches = self._searches()
        if self.is_writer:
            if self._routing:
                shares = {language: share.tolist() for language, share in self._routing.items()}
                save_json(self.workdir / ROUTING_FILE, shares)
            if self.sets:
                self._write_results(self._evaluations(), searches)
            else:  # the file says that the run is finished
                save_json(self.workdir / RESULTS_FILE, {})
            print(f"Picture, metrics and checkpoints are in {self.workdir}/")
        # BM25 takes a while on large sets, and a process that is done waits only so long at its
        # exit for the others.
        wait_for_all("report")

    def draw(self) -> None:
        """Writes report.png, also of a run that was stopped: what there is of it."""
        records = read_records(self.workdir / METRICS_FILE) if self.is_writer else []
        if records:
            path = self.workdir / PICTURE_FILE
            pictures.draw_report(path, self.config, records, self._evaluations(), self._routing)

    def _evaluations(self) -> list[dict]:
        return read_records(self.workdir / EVALUATIONS_FILE) if self.sets else []

    def _write_results(self, evaluations: list[dict], searches: list) -> None:
        complete = [record for record in evaluations if record["complete"]]
        bm25 = {name: evaluate_bm25(each) for name, each in self.sets.items()}
        columns = {"BM25": bm25}
        if complete[0]["step"] == 0:
            start = "before" if self.config.init.source else "untrained"
            columns[start] = complete[0]["sets"]
        columns["trained"] = complete[-1]["sets"]
        save_json(self.workdir / RESULTS_FILE, columns)
        console = Console(width=110)
        console.print(self._table(columns))
        _print_searches(console, searches)

    def _table(self, columns: dict[str, dict]) -> Table:
        title = "nDCG@10 on held-out data"
        if not self.config.data.pairs:  # of pairs of the user's own nobody has checked it
            title += " (no English string of it was trained on)"
        table = Table(title=title)
        table.add_column("set")
        table.add_column("language")
        table.add_column("queries", justify="right")
        table.add_column("documents", justify="right")
        for name in columns:
            table.add_column(name, justify="right")
        means = {name: mean_over_languages(results) for name, results in columns.items()}
        for set_name, mean in means["trained"].items():
            for name, metrics in columns["trained"].items():
                if name.split("/")[0] == set_name and mean["languages"] > 1:
                    values = [f"{columns[c][name][METRIC]:.3f}" for c in columns]
                    counts = (str(metrics["queries"]), str(metrics["documents"]))
                    table.add_row(set_name, name.split("/")[1], *counts, *values)
            values = [f"{means[c][set_name][METRIC]:.3f}" for c in columns]
            counts = (str(mean["queries"]), str(mean["documents"]))
            label = f"mean of {mean['languages']}" if mean["languages"] > 1 else "en"
            table.add_section()
            table.add_row(set_name, label, *counts, *values, style="bold", end_section=True)
        return table

    def _searches(self) -> list:
        """Three held-out queries in three languages and their best documents, right or wrong:
        [(set name, query, [(score, whether it is relevant, document)])].

        Not chosen by result: the middle query of the set.
        """
        wanted = ("translations/es", "descriptions/de", "descriptions/zh-Hans")
        multilingual = [name for name in self.sets if not name.startswith("api/")]
        names = [name for name in wanted if name in self.sets]
        names += [name for name in multilingual if name not in names][: 3 - len(names)]
        searches = []
        for name in names:
            each = self.sets[name]
            middle = len(each.queries) // 2
            query = each.queries[middle]
            query_BD = self.embedder.encode([query], prompt="query")
            document_ND = self.embedder.encode(each.documents, prompt="document")
            score_BK, index_BK = top_k(query_BD, document_ND, 3)
            judged = each.qrels[each.query_ids[middle]]
            found = [
                (score, judged.get(each.document_ids[index], 0) > 0, each.documents[index])
                for score, index in zip(score_BK[0], index_BK[0], strict=True)
            ]
            searches.append((name, query, found))
        return searches

    def _routing_by_language(self) -> dict[str, np.ndarray]:
        """{language: share of assignments [M, E]} of held-out documents; empty without experts."""
        if not self.config.model.moe_every:
            return {}
        shares = {}
        for name, each in self.sets.items():
            set_name, language = name.split("/")
            if set_name == "translations" or (set_name == "api" and language not in shares):
                shares[language] = self.embedder.expert_shares(each.documents[:ROUTING_TEXTS])
        return shares


def _print_searches(console: Console, searches: list) -> None:
    for name, query, found in searches:
        console.print(f"\n[bold]{name}[/bold]  query: {query}", highlight=False)
        for score, relevant, document in found:
            mark = "right" if relevant else "     "
            text = document[:80].replace("\n", " ")
            console.print(f"  {score:.3f} {mark} {text}", highlight=False, markup=False)
