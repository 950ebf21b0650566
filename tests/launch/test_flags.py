"""Flags of launchers are made from dataclasses, with their defaults."""

import pytest

from moe_embed_jax import launching
from moe_embed_jax.curation.consistency_rule import ConsistencyRule
from moe_embed_jax.curation.negatives_rule import NegativesRule
from moe_embed_jax.curation.teacher_config import TeacherConfig
from moe_embed_jax.errors import UserError
from moe_embed_jax.planning.request import Assumptions


@pytest.mark.parametrize("cls", [ConsistencyRule, NegativesRule, TeacherConfig, Assumptions])
def test_flags_have_the_defaults_of_their_dataclass(cls):
    flags = launching.parser("")
    launching.add_flags(flags, cls)
    assert launching.from_flags(cls, flags.parse_args([])) == cls()


def test_flags_are_of_the_type_of_their_field():
    flags = launching.parser("")
    launching.add_flags(flags, NegativesRule)
    arguments = flags.parse_args(["--relative=none", "--absolute=0.5", "--count=3"])
    assert launching.from_flags(NegativesRule, arguments) == NegativesRule(3, None, 0.5)
    with pytest.raises(UserError, match="argument --count: invalid int value: 'few'"):
        flags.parse_args(["--count=few"])
