"""The letters of the shapes, declared once.

An array is named after its axes, as in `x_RLD`; docstrings use the same letters.

    B  texts (or pairs) in a batch              R  packed rows
    L  row length in tokens                     S  slots: of texts in a row, of assignments
    T  tokens (rows flattened)                  D  model width
    H  attention heads                          F  feed-forward width
    E  experts                                  K  experts per token
    V  vocabulary                               N  negatives per query
    G  groups of blocks (the unit of the layer scan)
    Y  layers with experts                      C  chunks of a batch, encoded in turn
    J  features of an attention head            U  3 D features: q, k and v side by side
    M  documents of a pair: its own, then N negatives
    X  all texts of a batch                     Z  all documents of a batch
    P  predicted (masked) tokens of a row, at most
    I  TPU slices of the mesh                   W  width of a teacher's vectors

A small letter is a part of the axis with the large one: s rows of S, n of N.

Padding is text index -1; it is never attended to, routed, pooled or counted.
"""

PADDING = -1
