"""What a user reads of an error."""

import pickle

import pytest

from moe_embed_jax.errors import UserError


@pytest.mark.parametrize(
    "control", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\x1b[2J"]
)
def test_data_in_a_message_cannot_break_its_line_or_move_the_cursor(control):
    said = str(UserError(f"t.tsv:1: no column 'text' (columns: a{control}b)"))
    assert len(said.splitlines()) == 1 and said.isprintable()
    assert said.startswith("t.tsv:1: no column 'text' (columns: a\\")


def test_other_characters_stay():
    message = "naïve\tيوم 👩‍💻 'C:\\\\dir'"
    assert str(UserError(message)) == message
    assert str(UserError()) == ""


def test_a_log_stands_below_the_line():
    error = UserError("step x failed; its log is l:", log=["one\r", "two"])
    assert str(error) == "step x failed; its log is l:\n  one\\r\n  two"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
