"""Imports, exports, upcycles and merges models, and uploads exports.

    python launch/convert.py import  --source=FOLDER --target=DIR
    python launch/convert.py export  --source=DIR --target=FOLDER
    python launch/convert.py upcycle --source=DIR --target=DIR --mode=paper|preserving
    python launch/convert.py merge --source=A --source=B@STEP --target=DIR --method=average|slerp
    python launch/convert.py push --source=FOLDER --target=OWNER/NAME [--private]

import: a published checkpoint (safetensors; nomic-embed-text-v2-moe, BERT, XLM-RoBERTa) becomes a
folder that training configs (init.source) and all launchers read. export: any model folder becomes
a self-contained one for PyTorch and servers. upcycle: any dense encoder becomes an MoE encoder.
merge: models of one architecture, or checkpoints of runs (FOLDER@STEP), become one. A
source is a model folder or hf://OWNER/NAME[@REVISION] on the Hugging Face hub; the target must not
exist, or be what the same command made of the same files. push: an exported folder goes to the hub,
as the user whom the hub's own client knows (`hf auth login`, or HF_TOKEN).
--dry_run checks all that can be checked without writing. Nothing is ever unpickled.
"""

import dataclasses
import functools
import sys
import time

from moe_embed_jax import distributed, launching


def main():
    from moe_embed_jax.interop.card_config import CardConfig
    from moe_embed_jax.interop.merge_config import MergeConfig
    from moe_embed_jax.interop.onnx_export import CHOICES
    from moe_embed_jax.models.upcycle_config import UpcycleConfig

    flags = launching.parser(__doc__)
    actions = flags.add_subparsers(dest="action", required=True)
    parsers = {
        name: actions.add_parser(name, allow_abbrev=False)
        for name in ("import", "export", "upcycle")
    }
    for parser in parsers.values():
        parser.add_argument("--source", required=True, help="model folder, or hf://OWNER/NAME")
        parser.add_argument("--target", required=True, help="folder to write")
        parser.add_argument("--dry_run", action="store_true", help="check, write nothing")
        parser.add_argument("--vocabulary", help="tokenizer file, where the source has none")
        parser.add_argument("--query_prefix", help='default: what the source says; e.g. "query: "')
        parser.add_argument("--document_prefix", help='e.g. "passage: "')
    for name in ("export", "upcycle"):
        parsers[name].add_argument("--step", type=int, help="of a training run; default: newest")
    parsers["import"].add_argument(
        "--positions",
        choices=("learned", "rotary"),
        help="learned: keep the position table (exact). rotary: drop it, for stage 1 (the default "
        "for XLM-RoBERTa with its language-model head)",
    )
    parsers["export"].add_argument(
        "--onnx",
        nargs="?",
        const="fp32",
        choices=CHOICES,
        help="write onnx/model.onnx too (fp32, the default), or onnx/model_qint8.onnx, or both",
    )
    parsers["export"].add_argument(
        "--drop_expert_output_bias",
        action="store_true",
        help="take it out of a model with experts, because llama.cpp's converter drops it; prints "
        "what that costs",
    )
    launching.add_flags(parsers["export"], CardConfig)
    upcycling = parsers["upcycle"]
    upcycling.add_argument("--mode", required=True, choices=("paper", "preserving"))
    launching.add_flags(upcycling, UpcycleConfig)
    merging = actions.add_parser("merge", allow_abbrev=False)
    merging.add_argument(
        "--source", required=True, action="append", help="model folder or FOLDER@STEP; repeat it"
    )
    merging.add_argument("--target", required=True, help="folder to write")
    merging.add_argument("--dry_run", action="store_true", help="check, write nothing")
    launching.add_flags(merging, MergeConfig)
    merging.add_argument(
        "--keep_expert_order",
        action="store_true",
        help="expert e of each model is merged with expert e of the first; default: with the "
        "expert that it fits best",
    )
    pushing = actions.add_parser("push", allow_abbrev=False)
    pushing.add_argument("--source", required=True, help="exported folder")
    pushing.add_argument("--target", required=True, help="OWNER/NAME on the hub")
    pushing.add_argument("--private", action="store_true", help="a new model is not public")
    pushing.add_argument("--message", default="Upload the model", help="of the commit")
    pushing.add_argument("--dry_run", action="store_true", help="check and list, send nothing")
    options = vars(flags.parse_args())
    action = options.pop("action")
    distributed.refuse_several_processes()
    if action == "export":
        options["card"] = taken(CardConfig, options)
    if action == "merge":
        options["config"] = taken(MergeConfig, options)
        options["sources"] = options.pop("source")
    check(action, options)

    from tqdm import tqdm

    from moe_embed_jax import conversion

    start = time.monotonic()
    if action == "push":
        conversion.push_model(**options)
        done = "checked, nothing sent" if options["dry_run"] else f"sent to {options['target']}"
        print(f"{done}, {time.monotonic() - start:.1f} s")
        return
    action = getattr(conversion, "merge_models" if action == "merge" else f"{action}_model")
    bar = functools.partial(tqdm, unit=" tensors", disable=not sys.stderr.isatty(), leave=False)
    if not action(**options, progress=bar):
        print(f"done before: {options['target']}")
        return
    done = "checked, nothing written" if options["dry_run"] else f"wrote {options['target']}"
    print(f"{done}, {time.monotonic() - start:.1f} s")


def taken(cls, options: dict):
    """The dataclass of `launching.add_flags`, its values taken out of `options`."""
    return cls(**{field.name: options.pop(field.name) for field in dataclasses.fields(cls)})


def check(action: str, options: dict) -> None:
    """Finds the mistakes that can be found without importing jax, which takes seconds."""
    from moe_embed_jax.interop.merge_config import split_step
    from moe_embed_jax.interop.onnx_export import check_packages
    from moe_embed_jax.interop.source import check_source
    from moe_embed_jax.made_by import done_before
    from moe_embed_jax.models.upcycle_config import UpcycleConfig

    if action == "upcycle":
        names = [field.name for field in dataclasses.fields(UpcycleConfig)]
        UpcycleConfig(**{name: options[name] for name in names if name in options})
    if options.get("onnx"):
        check_packages()
    if action != "push":
        done_before(options["target"])
    if action == "merge":
        options["config"].shares(len(options["sources"]))
        for source in options["sources"]:
            check_source(split_step(source)[0])
    else:
        check_source(options["source"])


if __name__ == "__main__":
    sys.exit(launching.run(main))
