"""What every launcher does: flags, the processes' runtime, one line for a user's mistake."""

import argparse
import logging
import os
import sys

from moe_embed_jax import config as config_page
from moe_embed_jax.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser whose complaints are `UserError`s; flags must be written in full."""
    return _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse_with_config(flags: argparse.ArgumentParser, config_class, argv=None):
    """Parses `--config=FILE[:VARIANT]`, `--config.key=value` overrides and the flags of `flags`.

    Returns (namespace, instance of `config_class`).
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
    return namespace, config_page.load(config_class, namespace.config, overrides)


PROMPT_HELP = 'a name that the model knows (query, document), none, or a prefix like "query: "'


def prompt(flag: str) -> str | None:
    """The `prompt` argument of `Embedder.encode` from a flag: "none" is no prefix."""
    return None if flag == "none" else flag


def run(main) -> int:
    """Runs `main()`; returns the exit status: 0, or 2 after one line that says what is wrong."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save at INFO
    logging.getLogger("bm25s").setLevel(logging.ERROR)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def start_distributed() -> None:
    """`jax.distributed.initialize()` where the environment names a coordinator or a TPU pod."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if "JAX_COORDINATOR_ADDRESS" in os.environ or "," in hosts:
        import jax

        jax.distributed.initialize()
