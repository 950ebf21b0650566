"""Shows which experts the tokens of each language and topic take, in numbers and pictures.

    python launch/inspect_routing.py --model=DIR --texts=FILE[,FILE] --output=DIR
    python launch/inspect_routing.py --model=DIR --sib200=FOLDER [--languages=eng_Latn,deu_Latn] \\
        [--sentences=150] --output=DIR
        [--prompt=document|none|"PREFIX: "] [--shuffles=200] [--seed=0]

--texts: JSON lines, objects of "text" and "language" or "topic" or both, plain, .gz or .xz; texts
with the same "id", if there are any, are translations of each other. --sib200: a folder of
SIB-200's tables (LANGUAGE.tsv, .gz or .xz), with --sentences of them in each language, all if it is
not given. The model is any folder that launch/embed.py takes, published checkpoints included; one
without experts is refused.

Writes into the new folder --output: routing.json (every number), routing.md (tables), by_layer.png
and, for what the texts say of themselves, by_language.png and by_topic.png. What the numbers mean:
docs/routing_inspection.md.
"""

import sys

from moe_embed_jax import distributed, launching, storage


def main():
    flags = launching.parser(__doc__)
    flags.add_argument("--model", required=True, help="folder of the model")
    flags.add_argument("--texts", help="files of JSON lines, separated by commas")
    flags.add_argument("--sib200", help="folder of SIB-200's tables, instead of --texts")
    flags.add_argument("--languages", help="of --sib200, separated by commas; default: all")
    flags.add_argument("--sentences", type=int, help="of each language of --sib200; default: all")
    flags.add_argument("--output", required=True, help="folder to write")
    flags.add_argument("--prompt", default="document", help=launching.PROMPT_HELP)
    flags.add_argument("--shuffles", type=int, default=200, help="of labels, to compare with")
    flags.add_argument("--seed", type=int, default=0, help="of the shuffles")
    arguments = flags.parse_args()
    distributed.refuse_several_processes()

    from moe_embed_jax.interop.source import source_folder
    from moe_embed_jax.made_by import done_before, hash_command

    output = storage.path(arguments.output)
    done_before(output)
    launching.check_model(arguments.model)
    texts = labelled_texts(arguments)
    options = {key: value for key, value in vars(arguments).items() if key != "output"}
    inputs = [source_folder(arguments.model), *names(arguments.texts)]
    inputs += [arguments.sib200] if arguments.sib200 else []
    command = hash_command("inspect_routing", options, inputs)
    if done_before(output, command):
        print(f"done before: {output}")
        return

    from moe_embed_jax.embedder import Embedder
    from moe_embed_jax.evaluation.expert_use import inspect_routing
    from moe_embed_jax.evaluation.routing_report import write_report
    from moe_embed_jax.mesh import MeshConfig, make_mesh

    embedder = Embedder.load(arguments.model, mesh=make_mesh(MeshConfig()))
    report = inspect_routing(
        embedder,
        texts,
        launching.prompt(arguments.prompt),
        arguments.shuffles,
        arguments.seed,
        sys.stderr.isatty(),
    )
    written = write_report(output, report, command)
    print_information(report)
    print(f"{output}: {', '.join(path.name for path in written)}")


def labelled_texts(arguments) -> list:
    from moe_embed_jax.errors import UserError
    from moe_embed_jax.evaluation.labelled_texts import read_labelled, read_sib200

    files = names(arguments.texts)
    if bool(files) == bool(arguments.sib200):
        raise UserError("give either --texts or --sib200")
    if arguments.sib200:
        sentences = arguments.sentences
        if sentences is not None and sentences < 1:
            raise UserError(f"--sentences={sentences} must be at least 1")
        return read_sib200(arguments.sib200, names(arguments.languages), sentences)
    for flag in ("languages", "sentences"):
        if getattr(arguments, flag) is not None:
            raise UserError(f"--{flag} belongs to --sib200; --texts are taken as they are")
    return read_labelled(files)


def names(flag: str | None) -> list[str]:
    return [name for name in (flag or "").split(",") if name]


def print_information(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    from moe_embed_jax.evaluation.expert_use import LABELS

    labels = [label for label in LABELS if label in report]
    table = Table("layer", "experts in use", title="bits that an expert tells (shuffled labels)")
    for label in labels:
        table.add_column(f"I(expert; {label})")
    for column in table.columns:
        column.justify = "right"
    for i, layer in enumerate(report["layers"]):
        told = (report[label]["information"][i] for label in labels)
        cells = (f"{each['bits']:.4f} ({each['shuffled_mean']:.4f})" for each in told)
        used = f"{layer['effective_experts']:.2f} of {report['experts']}"
        table.add_row(str(layer["layer"]), used, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(launching.run(main))
