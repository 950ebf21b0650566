"""Reads the text of a compiled (optimised, scheduled) HLO module.

Only the syntax: computations, their instructions, shapes and attributes. What they cost is counted
in `cost.py`. Grammar by example::

    %body.1 (param.0: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
      ROOT %add.2 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} add(%a.1, %b.1), backend_config={...}
    }
"""

import dataclasses
import functools
import json
import math
import re

DTYPE_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "s4", "u4"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
    "token": 0,
}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array. `fast`: it lies in the on-chip memory (VMEM and the like), not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.size * DTYPE_BYTES.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`shapes`: of the result; several for a tuple. `operands`: names. `rest`: attributes."""

    name: str
    opcode: str
    type_text: str
    operand_text: str
    rest: str
    is_root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return parse_shapes(self.type_text)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.operand_text))

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """{"body": [...], "calls": [...], ...}: computations that this one runs."""
        return {kind: re.findall(r"[\w.\-]+", names) for kind, names in _CALLED.findall(self.rest)}

    def attribute(self, name: str) -> str | None:
        """Text of `name={...}` or `name=word`, braces left out; None without it."""
        found = re.search(rf"[ ,]{name}=(\{{[^{{}}]*\}}|[^ ,{{]+)", self.rest)
        return found.group(1).strip("{}") if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """Attribute `name={0,2}` as integers; () without it."""
        return tuple(int(n) for n in re.findall(r"\d+", self.attribute(name) or ""))

    @functools.cached_property
    def backend_config(self) -> dict:
        start = self.rest.find("backend_config={")
        if start < 0:
            return {}
        try:
            text = self.rest[start + len("backend_config=") :]
            return json.JSONDecoder().raw_decode(text)[0]
        except json.JSONDecodeError:  # other back ends write other things there
            return {}


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        found = [self.instructions[name] for name in instruction.operands]
        return [operand.shapes for operand in found]


@dataclasses.dataclass(frozen=True)
class Module:
    """`places`: stack frame -> the file and function of the program's source, where the text says
    so."""

    computations: dict[str, Computation]
    entry: str
    places: dict[str, str]

    def place(self, instruction: Instruction) -> str | None:
        """Where the source makes the instruction: "losses/infonce.py, against_documents"."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        return self.places.get(found[1]) if found else None


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Arrays in the text of a type, tuples flattened."""
    return tuple(
        Shape(dtype, tuple(int(d.strip("<=")) for d in dims.split(",") if d), "S(" in layout)
        for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*[^*]*\*/", "", text))
    )


def parse_module(text: str) -> Module:
    """The module in `compiled.as_text()`."""
    computations, entry, name, instructions = {}, None, None, {}
    for line in _lines(text):
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            name, instructions = header.group(2), {}
            entry = name if header.group(1) else entry
        elif line == "}" and name:
            computations[name] = Computation(name, instructions)
            name = None
        elif name:
            instruction = _parse_instruction(line)
            if instruction:
                instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation in the text of the compiled module")
    return Module(computations, entry, _places(text))


def _places(text: str) -> dict[str, str]:
    """From the tables before the first computation."""
    head = text.partition("\n\n%")[0]
    tables = dict(re.findall(r"^(\w+)\n((?:\d+ .*\n?)*)", head, re.MULTILINE))
    files, functions = (
        dict(re.findall(r'^(\d+) "(.*)"$', tables.get(name, ""), re.MULTILINE))
        for name in ("FileNames", "FunctionNames")
    )
    of_location = {
        number: f"{files[file].split('moe_embed_jax/')[-1]}, {functions[function].split('.')[-1]}"
        for number, file, function in re.findall(
            r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)",
            tables.get("FileLocations", ""),
            re.MULTILINE,
        )
    }
    frames = re.findall(
        r"^(\d+) \{file_location_id=(\d+)", tables.get("StackFrames", ""), re.MULTILINE
    )
    return {frame: of_location[location] for frame, location in frames}


def _lines(text: str):
    """Lines of the text; the JSON of a `backend_config` that is spread over several (a kernel's
    inside a fusion is) joined to the line that it began in."""
    joined = None
    for line in text.splitlines():
        if joined is not None and line != "}" and line.startswith(('"', "}")):
            joined += line
            continue
        if joined is not None:
            yield joined
        joined = line
    if joined is not None:
        yield joined


def _parse_instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if not start:
        return None
    begin = start.end()
    is_tuple = line[begin] == "("
    end = _closing(line, begin) + 1 if is_tuple else line.index(" ", begin)
    bracket = line.index("(", end)
    close = _closing(line, bracket)
    return Instruction(
        name=start.group(2),
        opcode=line[end:bracket].strip(),
        type_text=line[begin:end],
        operand_text=line[bracket + 1 : close],
        rest=line[close + 1 :],
        is_root=bool(start.group(1)),
    )


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"bracket not closed in: {text[:200]}")
