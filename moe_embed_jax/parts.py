"""Work that several processes share without knowing of each other: `--part=3/16`, then `--finish`.

A command cuts its work into numbered units that do not depend on each other. A part does its units,
a process of any machine does a part, and whoever does a part again continues it. `--finish` makes
the result of what the parts have done. It is the same, whatever the number of parts. Imports no
jax.
"""

import argparse
import dataclasses
import re

from moe_embed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """The units whose number leaves the remainder `index` when it is divided by `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, flag: str) -> "Part":
        """The part of a flag: "3/16" is the fourth of 16. Raises `UserError` for anything else."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", flag)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(
                f"--part={flag} is no part: write I/N, with I from 0 to N - 1 (0/4, 1/4, 2/4, 3/4)"
            )
        return cls(int(match[1]), int(match[2]))

    def has(self, number: int) -> bool:
        return number % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Part()


def add_part_flags(flags: argparse.ArgumentParser) -> None:
    """--part (a `Part`, or None) and --finish; not both."""
    group = flags.add_mutually_exclusive_group()
    group.add_argument("--part", type=Part.parse, metavar="I/N", help="do this share, 0/N to N-1/N")
    group.add_argument("--finish", action="store_true", help="make the result of all parts")


def not_done(numbers: list[int], count: int, what: str, where: object) -> UserError:
    """The error of `--finish` where units are missing, to be raised."""
    shown = ", ".join(map(str, numbers[:20])) + ", and more" * (len(numbers) > 20)
    return UserError(
        f"{where}: {len(numbers)} of {count} {what} are not done (numbers {shown}): --part=I/N "
        "does those that leave the remainder I when divided by N; then repeat --finish"
    )
