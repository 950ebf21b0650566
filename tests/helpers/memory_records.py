"""Records of pairs in memory, in place of the `Records` of a builder's files."""

from moe_embed_jax.errors import UserError
from moe_embed_jax.pairs.row import PairRow, decode_pair, encode_pair


class MemoryRecords:
    """`rows`: dicts with query, document, language and source. A test may change `records`."""

    def __init__(self, rows: list[dict]):
        self.records = [encode_pair(PairRow(negatives=(), **row)) for row in rows]

    def __getitems__(self, rows) -> list[bytes]:
        return [self.records[row] for row in rows]

    def read(self, rows) -> list[PairRow]:
        found = []
        for row in rows:
            try:
                found.append(decode_pair(self.records[row]))
            except ValueError:
                raise UserError(f"some.array_record: record {row}: damaged") from None
        return found
