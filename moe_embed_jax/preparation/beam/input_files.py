"""Input files as pairs: records in the layout of their source."""

from collections.abc import Iterator

from moe_embed_jax.preparation.beam import beir_folders, scored
from moe_embed_jax.preparation.beam.formats import LAYOUTS, BadField, with_usable_negatives
from moe_embed_jax.preparation.beam.read import MAX_RAW, Bad, Good, records, row_language
from moe_embed_jax.preparation.beam.scored import choose
from moe_embed_jax.preparation.beam.sources import FOLDERS, Part, Source


def read_part(source: Source, part: Part) -> Iterator[Good | Bad]:
    """Everything in an input file, in its order; every line gives one or more of these."""
    if source.format in FOLDERS:
        read = {"beir": beir_folders, "scored_tables": scored}[source.format].read_folder
        yield from read(source, part)
        return
    layout = LAYOUTS[source.format]
    fields = {**layout.fields, **source.fields}
    for record in records(part.path):
        if isinstance(record, Bad):
            yield record
            continue
        line, value, raw = record
        try:
            language = row_language(source, part, value)
            pairs = layout.read(value, fields)
        except BadField as error:
            yield Bad(part.path, line, error.field, str(error), raw[:MAX_RAW])
            continue
        positives = [texts.document for texts in pairs]
        for texts in pairs:
            if source.format == "scored":
                texts = choose(texts, source.count, source.relative)
            yield Good(line, *with_usable_negatives(texts, positives), language)
