"""The letters of the shapes, declared once.

An array is named after its axes, as in `x_RLD`; docstrings use the same letters.

    B  texts (or pairs) in a batch              R  packed rows
    L  row length in tokens                     S  text slots in a row
    T  tokens (rows flattened)                  D  model width
    H  attention heads                          F  feed-forward width
    E  experts                                  K  experts per token
    V  vocabulary                               N  negatives per query
    G  groups of blocks (the unit of the layer scan)
    C  chunks of a batch, encoded in turn; in the loss: candidates, the documents of a batch
    M  documents of a pair: its own, then N negatives
    X  all texts of a batch
    P  predicted (hidden) tokens of a row, at most

Padding is text index -1; it is never attended to, routed, pooled or counted.
"""

PADDING = -1
