import pytest

from moe_embed_jax.markdown_table import markdown_table


def test_sides_and_cells():
    table = markdown_table(["name", "n", "share"], [["a|b\nc", 1, 0.5], ["", 20, None]], "lr")
    assert table.splitlines() == [
        "| name | n | share |",
        "| --- | ---: | ---: |",
        "| a\\|b c | 1 | 0.5 |",
        "|  | 20 | None |",
    ]


def test_more_sides_than_columns_are_no_columns():
    assert markdown_table(["name"], [], "lrr").splitlines() == ["| name |", "| --- |"]


def test_a_row_of_another_width_is_an_error():
    with pytest.raises(ValueError, match="2 cells in a table of 1 columns"):
        markdown_table(["name"], [["a", "b"]], "l")
