"""A fault of the mutation check: one deliberate mistake, and the tests that must notice it."""

import ast
import dataclasses
import pathlib
import re
import shlex

PACKAGE = "moe_embed_jax"


@dataclasses.dataclass(frozen=True)
class Fault:
    """In `file` of the package the text `old` becomes `new`; then `tests` must fail.

    tests: pytest arguments, files from tests/ on: "a/test_b.py::test_c" or "a/test_b.py -k d".
    more: further (old, new) of the same file, for a mistake that one edit cannot make.
    equivalent: why no test can notice the fault. Such a fault is listed apart and never runs.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    more: tuple[tuple[str, str], ...] = ()
    equivalent: str = ""

    @property
    def path(self) -> str:
        return f"{PACKAGE}/{self.file}"

    @property
    def arguments(self) -> list[str]:
        """`tests` for pytest, from the root of the repository."""
        words = shlex.split(self.tests)
        is_file = re.compile(r"(\w+/)?test_\w+\.py($|::)").match
        return [f"tests/{word}" if is_file(word) else word for word in words]

    @property
    def test_files(self) -> list[str]:
        return [word.split("::")[0] for word in self.arguments if word.startswith("tests/")]

    @property
    def test_names(self) -> list[str]:
        """Names of tests, or parts of them, in `tests`; not the ids of parameters (1-2, case0)."""
        chosen = [
            word.partition("::")[2].partition("[")[0] if "::" in word else word
            for word in shlex.split(self.tests)
            if "::" in word or not word.endswith(".py")
        ]
        words = re.split(r"[\s()]+", " ".join(chosen))
        operators = ("-k", "and", "or", "not")
        return [word for word in words if re.fullmatch(r"[a-z_]+", word) and word not in operators]

    def apply(self, text: str) -> str:
        """`text` of the file with the fault in it.

        Raises:
          ValueError: a place is gone or is not the only one, or the result is not Python.
        """
        for old, new in ((self.old, self.new), *self.more):
            if old == new:
                raise ValueError(f"the new text is the old one: {old!r}")
            if (count := text.count(old)) != 1:
                raise ValueError(f"the old text stands {count} times in it, not once: {old!r}")
            text = text.replace(old, new)
        try:
            ast.parse(text)
        except SyntaxError as error:
            raise ValueError(f"the result is not Python: {error}") from None
        return text


def problems(root: pathlib.Path, areas: dict[str, tuple[Fault, ...]]) -> list[str]:
    """What keeps the faults from being run on the repository `root`, a line for each fault."""
    found, names = [], set()
    for area, faults in areas.items():
        for fault in faults:
            where = f"{area}: {fault.name}: {fault.path}"
            if fault.name in names:
                found.append(f"{where}: another fault has this name")
            names.add(fault.name)
            if not fault.test_files:
                found.append(f"{where}: no test file is named: {fault.tests!r}")
            for file in fault.test_files:
                if not (root / file).is_file():
                    found.append(f"{where}: {file} does not exist")
            files = [root / file for file in fault.test_files if (root / file).is_file()]
            text = "".join(file.read_text() for file in files)
            gone = [name for name in fault.test_names if files and name not in text]
            found.extend(f"{where}: no test is called {name}: {fault.tests!r}" for name in gone)
            try:
                fault.apply((root / fault.path).read_text())
            except (ValueError, OSError) as error:
                found.append(f"{where}: {error}")
    return found
