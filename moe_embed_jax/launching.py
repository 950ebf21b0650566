"""What every launcher does: flags, and one line for a user's mistake."""

import argparse
import atexit
import contextlib
import dataclasses
import gc
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

from moe_embed_jax import config as config_files
from moe_embed_jax import distributed, orbax_leftovers, storage
from moe_embed_jax.curation.teacher_config import PROMPT_HELP as PROMPT_HELP
from moe_embed_jax.curation.teacher_config import TeacherConfig
from moe_embed_jax.errors import INTERRUPTED, UserError, end_at_once
from moe_embed_jax.interop.source import EXTERNAL, check_source
from moe_embed_jax.pairs.manifest import MANIFEST, read_manifest
from moe_embed_jax.parts import add_part_flags
from moe_embed_jax.refusals import is_lost_connection, refusal_of_system
from moe_embed_jax.search import check_dtype
from moe_embed_jax.weights import WEIGHTS

LONGEST_END = 10  # seconds, of a process that Ctrl-C has ended


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that raises `UserError` for a mistake; flags must be written in full."""
    return _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse_with_config(flags: argparse.ArgumentParser, config_classes, argv=None):
    """Parses `--config=FILE[:VARIANT]`, `--config.key=value` overrides and the flags of `flags`.

    Returns (namespace, config); `config_classes` as in `config.load`.
    """
    flags.add_argument("--config", required=True, help="config file, with an optional :variant")
    namespace, rest = flags.parse_known_args(argv)
    overrides = {}
    rest = list(rest)
    while rest:
        flag = rest.pop(0)
        key, equals, value = flag.partition("=")
        if not key.startswith("--config."):
            raise UserError(f"unknown argument {flag} (see {flags.prog} --help)")
        if not equals:
            if not rest:
                raise UserError(f"{flag} needs a value: {flag}=VALUE")
            value = rest.pop(0)
        overrides[key.removeprefix("--config.")] = value
    return namespace, config_files.load(config_classes, namespace.config, overrides)


def add_flags(flags: argparse.ArgumentParser, cls) -> None:
    """A flag with its default for every field of a dataclass that has a `config.setting` with the
    text of one."""
    types = {float | None: number_or_none}
    for field in dataclasses.fields(cls):
        if text := field.metadata.get("flag"):
            kind = types.get(field.type, field.type)
            flags.add_argument(f"--{field.name}", type=kind, default=field.default, help=text)


def from_flags(cls, arguments: argparse.Namespace):
    """The dataclass of `add_flags` with the values of the flags."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: getattr(arguments, name) for name in names})


def prompt(flag: str) -> str | None:
    """The `prompt` argument of `Embedder.encode` from a flag: "none" is no prefix."""
    return None if flag == "none" else flag


def add_dtype_flag(flags: argparse.ArgumentParser, help_text: str) -> None:
    flags.add_argument("--dtype", type=check_dtype, default="float32", help=help_text)


def add_weights_flag(flags: argparse.ArgumentParser) -> None:
    text = "of the model on a CPU: bfloat16 and int8 need less memory; auto: bfloat16 if faster"
    flags.add_argument("--weights", choices=WEIGHTS, default="float32", help=text)


def curation_arguments(description: str, rule_class) -> tuple[argparse.Namespace, object]:
    """(arguments, rule) of launch/filter.py and launch/mine.py; `rule_class`: a dataclass.

    Finds what is wrong with the flags before jax is imported. An --output that is a prepared folder
    may be the result of the same command.
    """
    flags = parser(description)
    flags.add_argument("--pairs", required=True, help="prepared folder to read")
    flags.add_argument(
        "--teacher", required=True, help="model folder or sentence-transformers:NAME"
    )
    flags.add_argument("--output", required=True, help="prepared folder to write")
    add_weights_flag(flags)
    add_flags(flags, TeacherConfig)
    add_part_flags(flags)
    add_flags(flags, rule_class)
    arguments = flags.parse_args()
    rule = from_flags(rule_class, arguments)
    from_flags(TeacherConfig, arguments)  # finds a wrong dtype
    distributed.refuse_several_processes("share the work with --part=0/4, --part=1/4, ...")
    read_manifest(storage.path(arguments.pairs))
    output = storage.path(arguments.output)
    if output.exists() and not (output / MANIFEST).is_file():
        raise UserError(f"--output={output} exists: choose another folder")
    check_model(arguments.teacher)
    return arguments, rule


def curate(curation_class, arguments: argparse.Namespace, rule):
    """The report of a `curation.units.Curation` with these `curation_arguments`, whose table is
    printed; None if it wrote no output. Its work folder is OUTPUT.work."""
    from moe_embed_jax.curation.pair_texts import Embedding
    from moe_embed_jax.curation.teacher import load_teacher
    from moe_embed_jax.mesh import MeshConfig, make_mesh
    from moe_embed_jax.pairs.folder import PairFolder

    pairs, output = PairFolder(arguments.pairs), storage.path(arguments.output)
    mesh = make_mesh(MeshConfig())
    teacher, sides = load_teacher(arguments.teacher, mesh, arguments.weights), prompts(arguments)
    report_prompts(teacher, sides)
    embedding = Embedding(teacher, *sides.values(), arguments.dtype)
    work = output.with_name(f"{output.name}.work")
    report = curation_class(pairs, work, embedding, rule, mesh).run(
        output, arguments.part, arguments.finish
    )
    report_truncation(teacher)
    if report is not None:
        print(report.table())
    return report


def check_model(name: str) -> None:
    """Raises `UserError` for a model folder that does not exist; imports no jax, asks no hub."""
    if not name.startswith(EXTERNAL):
        check_source(name)


def prompts(arguments) -> dict[str, str | None]:
    """Of each side, "query" and "document", in this order."""
    return {"query": prompt(arguments.query_prompt), "document": prompt(arguments.document_prompt)}


def report_prompts(encoder, prompts: dict[str, str | None]) -> None:
    """Prints what stands before the texts of each side, and where they are cut.

    Warns where the model's folder says nothing about prompts and one was asked for by its name:
    many models were trained with prefixes that only their description names.

    Args:
      encoder: an `Embedder` or a teacher.
      prompts: side -> prompt of `Embedder.encode`.
    """
    assumed = False
    for side, prompt in prompts.items():
        form = encoder.text_form(prompt)
        prefix = json.dumps(form["prefix"], ensure_ascii=False)
        assumed |= prompt in ("query", "document") and bool(form["prefix"])
        print(f"{side}: prefix {prefix}, at most {form['max_length']} tokens", flush=True)
    encoder.truncation.tells = False  # `report_truncation` does, at the end
    asked = [name for name in ("query", "document") if name in prompts.values()]
    if asked and not encoder.has_prompts:
        others = "Nomic's prefixes are used" if assumed else "there is no prefix"
        print(
            f"warning: the model's folder says nothing about prompts, so {others} for "
            f"{' and '.join(asked)}; if the model was trained with other prefixes, give them by "
            'flag (for E5: "query: " and "passage: ")',
            file=sys.stderr,
        )


def report_truncation(encoder) -> None:
    """Prints how many texts and tokens of each side were cut, of those that were embedded now."""
    for line in encoder.truncation.lines():
        print(line, flush=True)


def number_or_none(flag: str) -> float | None:
    return None if flag == "none" else float(flag)


def run(main) -> int:
    """Runs `main()` and returns the exit status: 0; 2 after one line that says what is wrong; 130
    after Ctrl-C. A second Ctrl-C ends the process at once."""
    # Imports and tracing make millions of objects that stay. To look for garbage among them after
    # every 700 new ones takes a sixth of the time until a launcher starts. Older generations keep
    # Python's rhythm: garbage among them may hold large arrays.
    gc.set_threshold(100_000)
    _quieten_orbax()
    # Texts and names of users may hold what the terminal, or UTF-8, cannot: it is shown as \\u....
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    lost = False
    with _interrupts() as interrupted:
        try:
            main()
            _flush_output()
            return 0
        except UserError as error:
            message = f"error: {error}"
        except KeyboardInterrupt as error:
            interrupted.append(error)
        except Exception as error:
            problem = refusal_of_system(error)
            if problem is None and not interrupted:
                raise
            message = f"error: {problem}"
            lost = is_lost_connection(error)
        if interrupted:
            reason = next((str(error) for error in interrupted if str(error)), None)
            message = f"interrupted: {reason or 'the same command starts again, or continues'}"
        print(message, file=sys.stderr, flush=True)
        status = INTERRUPTED if interrupted else 2
        if interrupted:
            _end_within(LONGEST_END, status)
        if lost:
            os._exit(status)  # see `LostConnection`
        return status


def _end_within(seconds: float, status: int) -> None:
    """Ends the process then, if it is still there: Ctrl-C may have left a thread without what it
    waits for, and at its end Python waits for its threads."""
    end = threading.Timer(seconds, os._exit, [status])
    end.daemon = True
    end.start()


def _quieten_orbax() -> None:
    """Orbax narrates every save, and logs the stack trace of every error that passes it."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)
    orbax_leftovers.hide()  # `_interrupts` restores the hook that it finds


def _flush_output() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again at its end
        error.filename = "standard output"
        raise


@contextlib.contextmanager
def _interrupts() -> Iterator[list]:
    """Ctrl-C raises KeyboardInterrupt, the next one ends the process; gives the list of what was
    raised. A process that ignores Ctrl-C, as one in the background does, keeps ignoring it.

    Python drops, and prints with a stack trace, what is raised in a callback, for instance of the
    garbage collector: it is raised again a moment later. While Python ends, Ctrl-C is a plain end.
    """
    raised: list[KeyboardInterrupt] = []
    show = sys.unraisablehook

    def dropped(unraisable):
        if not raised or unraisable.exc_value is not raised[-1]:
            return show(unraisable)
        raised.clear()
        # To the main thread, which may sleep: a signal to the timer's own would not wake it.
        main = threading.main_thread().ident
        again = threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT])
        again.daemon = True
        again.start()

    def interrupt(signum, frame):
        del signum, frame
        if raised:
            end_at_once()
        raised.append(KeyboardInterrupt())
        raise raised[0]

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield raised
        return
    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = dropped
    yield raised
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # the last one is called first
    sys.unraisablehook = show
    if not raised:  # else it stays, for what Python does at its end
        signal.signal(signal.SIGINT, before)
