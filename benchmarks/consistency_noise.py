"""Does the consistency filter find wrong pairs? Plants some in real data and counts.

    python benchmarks/consistency_noise.py --teacher=MODEL [--pairs=DIR | --data_dir=runs/data] \\
        [--count=50000] [--noise=0.1] [--query_prompt="query: "] [--document_prompt="passage: "] \\
        [--work=DIR] [--output=FILE.json]

Draws --count pairs, moves the documents of --noise of them to other queries of their source and
language (so every wrong document is a right one for somebody else), filters, and compares what was
dropped with what was planted: precision, recall and F1 of the dropped pairs, and the share of clean
pairs that was lost. Clean pairs of real data are not all right, so precision is a lower bound.

--data_dir: the default data, as the quickstart prepares it. Prints a Markdown table; --output gets
all of it. --work keeps vectors and continues; without it everything is done in a temporary folder.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_embed_jax import launching  # noqa: E402
from moe_embed_jax.curation.consistency_rule import ConsistencyRule  # noqa: E402
from moe_embed_jax.curation.teacher_config import TeacherConfig  # noqa: E402
from moe_embed_jax.markdown_table import markdown_table  # noqa: E402

COLUMNS = ("pairs", "planted", "dropped", "precision", "recall", "F1", "clean lost")


def plant(rows, share: float, rng):
    """(rows in which documents changed places within a group, bool [rows]: whose did).

    `rows`: of one source and language. A document that moves to a pair with the same one (up to
    case and white space) is not counted as planted.
    """
    import numpy as np

    from moe_embed_jax.pairs.normal_form import normal_form

    planted = np.zeros(len(rows), bool)
    chosen = rng.permutation(len(rows))[: round(share * len(rows))]
    changed = list(rows)
    for place, giver in zip(chosen, np.roll(chosen, 1), strict=True):
        document = rows[giver].document
        planted[place] = normal_form(document) != normal_form(rows[place].document)
        changed[place] = rows[place]._replace(document=document)
    return changed, planted


def write_noisy(pairs, output: pathlib.Path, count: int, share: float, seed: int):
    """A prepared folder of `count` pairs, some wrong; returns bool [count] of the wrong ones."""
    import numpy as np

    from moe_embed_jax.preparation.pair_writer import PairWriter

    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.permutation(len(pairs))[:count])
    labels = []
    with PairWriter(output, {"noise": share, "seed": seed, "of": pairs.content_hash}) as writer:
        for start, stop in pairs.groups.values():
            numbers = drawn[slice(*np.searchsorted(drawn, [start, stop]))]
            rows, planted = plant(pairs.read(numbers), share, rng)
            labels.append(planted)
            for row in rows:
                writer.write(row)
    return np.concatenate(labels)


def score(planted, keep) -> dict:
    hits = int((planted & ~keep).sum())
    dropped, wrong = int((~keep).sum()), int(planted.sum())
    precision = hits / dropped if dropped else None
    recall = hits / wrong if wrong else None
    return {
        "pairs": len(keep),
        "planted": wrong,
        "dropped": dropped,
        "precision": precision,
        "recall": recall,
        "F1": 2 * hits / (dropped + wrong) if dropped + wrong else None,
        "clean lost": int((~planted & ~keep).sum()) / max(1, len(keep) - wrong),
    }


def table(scores: dict[str, dict]) -> str:
    def cell(value):
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"

    rows = [[name, *(cell(of_one[c]) for c in COLUMNS)] for name, of_one in scores.items()]
    return markdown_table(["source", *COLUMNS], rows, "lr")


def run(arguments, work: pathlib.Path) -> dict:
    import numpy as np

    from moe_embed_jax.curation.consistency import ConsistencyFilter
    from moe_embed_jax.curation.pair_texts import Embedding
    from moe_embed_jax.curation.teacher import load_teacher
    from moe_embed_jax.mesh import MeshConfig, describe, make_mesh
    from moe_embed_jax.pairs.folder import PairFolder
    from moe_embed_jax.preparation.export_pairs import export_pairs

    folder = pathlib.Path(arguments.pairs or work / "pairs")
    if not arguments.pairs and not folder.exists():
        export_pairs(pathlib.Path(arguments.data_dir), folder)
    settings = (arguments.count, arguments.noise, arguments.seed)
    noisy = work / "noisy-{}-{}-{}".format(*settings)
    labels = noisy.with_suffix(noisy.suffix + ".npy")
    if not labels.exists():
        np.save(labels, write_noisy(PairFolder(folder), noisy, *settings))
    pairs, planted = PairFolder(noisy), np.load(labels)
    mesh = make_mesh(MeshConfig())
    teacher, prompts = load_teacher(arguments.teacher, mesh), launching.prompts(arguments)
    embedding = Embedding(teacher, *prompts.values(), arguments.dtype)
    rule = launching.from_flags(ConsistencyRule, arguments)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=work) as output:
        curation = ConsistencyFilter(pairs, work / f"{noisy.name}.work", embedding, rule, mesh)
        curation.run(pathlib.Path(output) / "kept")
    seconds = time.monotonic() - start
    rule_name = f"k={rule.k}" + (f",margin={rule.margin}" if rule.margin else "")
    keep = curation.kept()
    np.save(work / f"{noisy.name}.kept {rule_name}.npy", keep)  # for filtering_effect.py
    sources = {}
    for (source, _), (first, last) in pairs.groups.items():
        sources.setdefault(source, []).append(np.arange(first, last))
    rows = {name: np.concatenate(parts) for name, parts in sorted(sources.items())}
    scores = {name: score(planted[at], keep[at]) for name, at in rows.items()}
    rates = {
        f"pairs_per_second_of_{part}": len(pairs) / took if took > 0 else None
        for part, took in curation.seconds.items()
    }
    return {
        "total": score(planted, keep),
        "sources": scores,
        **rates,
        "seconds": {"all": seconds, **curation.seconds},
        "about": curation.about,
        "mesh": describe(mesh),
        "arguments": vars(arguments),
    }


def main():
    flags = launching.parser(__doc__)
    flags.add_argument(
        "--teacher", required=True, help="model folder or sentence-transformers:NAME"
    )
    flags.add_argument("--pairs", help="prepared folder; default: the default data")
    flags.add_argument("--data_dir", default="runs/data", help="the prepared default data")
    flags.add_argument("--count", type=int, default=50_000, help="pairs to draw")
    flags.add_argument("--noise", type=float, default=0.1, help="share of wrong pairs to plant")
    flags.add_argument("--seed", type=int, default=0)
    launching.add_flags(flags, ConsistencyRule)
    launching.add_flags(flags, TeacherConfig)
    flags.add_argument("--work", help="folder that keeps vectors; default: a temporary one")
    flags.add_argument("--output", help="JSON file to write")
    arguments = flags.parse_args()
    with contextlib.ExitStack() as stack:
        work = arguments.work or stack.enter_context(tempfile.TemporaryDirectory())
        pathlib.Path(work).mkdir(parents=True, exist_ok=True)
        found = run(arguments, pathlib.Path(work))
    print(table(found["sources"] | {"all": found["total"]}))
    for name, rate in found.items():
        if name.startswith("pairs_per_second") and rate:
            print(f"{name}: {rate:,.0f}")
    if arguments.output:
        pathlib.Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(arguments.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(launching.run(main))
