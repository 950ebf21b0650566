"""The table of runtimes, for the terminal and for the card of an export."""

import pathlib

from moe_embed_jax import storage
from moe_embed_jax.interop.model_card import CARD
from moe_embed_jax.interop.verify.compare import Comparison, Result
from moe_embed_jax.interop.verify.known import TOLERANCE
from moe_embed_jax.markdown_table import markdown_table

BEGIN, END = "<!-- runtimes: begin -->", "<!-- runtimes: end -->"
HEAD = ("runtime", "version", "ids equal", "max-abs", "lowest cosine", "ms a text", "")


def table(rows: list[tuple[str, Result, Comparison]]) -> str:
    """Markdown; the first row is the reference."""

    def cells(name, result, comparison):
        max_abs, cosine = comparison.max_abs, comparison.cosine
        return (
            name,
            result.version,
            comparison.equal_ids,
            "-" if max_abs is None else f"{max_abs:.1e}",
            "-" if cosine is None else f"{cosine:.6f}",
            f"{result.ms:.1f}",
            f"**wrong**: {comparison.wrong}" if comparison.wrong else comparison.note,
        )

    return markdown_table(HEAD, [cells(*row) for row in rows], "llrrrrl")


def write_card(folder: pathlib.Path, content: str, texts: int) -> None:
    """Puts a table into README.md of `folder`, in the place of an earlier one."""
    path = folder / CARD
    card = path.read_text() if path.is_file() else ""
    before, found, rest = card.partition(BEGIN)
    _, _, after = rest.partition(END) if found else ("", "", "")
    most, least = TOLERANCE["float32"]
    section = f"""{BEGIN}
## Runtimes

{texts} texts in 20 scripts (`golden.json`), compared with moe_embed_jax. Right is a difference of
at most {most:g} and a cosine of at least {least}; int8 may cost a cosine of {TOLERANCE["int8"][1]}.
Only sentence-transformers adds prefixes by itself; the others were given texts with theirs.

{content}
{END}"""
    if not found:
        before = before.rstrip("\n") + "\n\n" if before.strip() else ""
        after = "\n"
    storage.write(path, before + section + after)
