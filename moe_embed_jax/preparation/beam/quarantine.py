"""Bad rows: kept where a person can read them, and a limit on their share.

OUTPUT/quarantine/<source>.jsonl   {"source", "file", "line", "field", "problem", "row"} each
"""

import posixpath

from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.beam import work_folder as work_module
from moe_embed_jax.preparation.beam.read import open_file
from moe_embed_jax.preparation.beam.sources import Source
from moe_embed_jax.preparation.beam.work_folder import Work, part_name

FOLDER = "quarantine"


def quarantine_path(output: str, source: str) -> str:
    return posixpath.join(output, FOLDER, f"{source}.jsonl")


def collect_quarantine(output: str, work: Work, sources: list[Source], markers: list[dict]) -> None:
    """One file per source with bad rows, in the order of the input."""
    for index, source in enumerate(sources):
        bad = [n for n, m in enumerate(markers) if m["source"] == index and m["bad"]]
        if not bad:
            continue
        work_module.make_folder(posixpath.join(output, FOLDER))
        with work_module.written_whole(quarantine_path(output, source.name)) as target:
            for part in bad:
                with open_file(work.path("read", f"{part_name(part)}.bad")) as file:
                    while block := file.read(1 << 22):
                        target.write(block)


def check_share(source: str, markers: list[dict], limit: float, output: str) -> None:
    """Raises `UserError`, which names the worst file, if more than `limit` of the rows are bad."""
    rows, bad = (sum(marker[key] for marker in markers) for key in ("rows", "bad"))
    if not bad or bad <= limit * rows:
        return
    worst = max(markers, key=lambda marker: (marker["bad"], marker["file"]))
    first = worst["first_bad"]
    field = f", field {first['field']}" if first["field"] else ""
    raise UserError(
        f"source {source}: {bad:,} of {rows:,} rows are bad ({bad / rows:.2%}, allowed "
        f"{limit:.2%}). The worst file is {worst['file']} with {worst['bad']:,} of "
        f"{worst['rows']:,}; the first of them: {first['file']}, line {first['line']}{field}: "
        f"{first['problem']}. All are in {quarantine_path(output, source)}; correct the files and "
        "delete the work folder, or allow more with --max_bad_share and run again"
    )
