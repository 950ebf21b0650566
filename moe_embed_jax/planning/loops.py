"""How often the loops of a compiled program run."""

import re

from moe_embed_jax.planning.hlo import Computation, Instruction, Module

_PASSES_VALUE = ("copy", "bitcast", "reshape", "copy-done", "copy-start")


def trip_count(module: Module, parent: Computation, loop: Instruction) -> int | None:
    """Iterations of a `while` instruction of `parent`, None where only the data decide.

    From `known_trip_count` where the compiler wrote it (XLA:CPU does, libtpu 0.0.42 does not), else
    from a condition `i < constant` whose i starts at a constant and grows by one.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called["condition"][0]]
    body = module.computations[loop.called["body"][0]]
    if condition.root.opcode != "compare" or condition.root.attribute("direction") != "LT":
        return None
    counter, bound = (_follow(condition, name) for name in condition.root.operands)
    index = _tuple_index(counter)
    if index is None or not _grows_by_one(body, index):
        return None
    start = _initial(parent, loop, index)
    stop = _constant(bound)
    carried = _tuple_index(bound)
    if carried is not None and _is_unchanged(body, carried):
        stop = _initial(parent, loop, carried)
    return None if start is None or stop is None else max(stop - start, 0)


def _follow(computation: Computation, name: str) -> Instruction:
    """Through copies to where a value comes from."""
    instruction = computation.instructions[name]
    while instruction.opcode in _PASSES_VALUE:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _tuple_index(value: Instruction) -> int | None:
    return int(value.attribute("index")) if value.opcode == "get-tuple-element" else None


def _constant(value: Instruction) -> int | None:
    is_integer = value.opcode == "constant" and re.fullmatch(r"-?\d+", value.operand_text)
    return int(value.operand_text) if is_integer else None


def _initial(parent: Computation, loop: Instruction, index: int) -> int | None:
    """The constant that element `index` of the loop's state starts with."""
    state = _follow(parent, loop.operands[0])
    if state.opcode != "tuple":
        return None
    return _constant(_follow(parent, state.operands[index]))


def _next(body: Computation, index: int) -> Instruction | None:
    """What an iteration leaves in element `index`."""
    if body.root.opcode != "tuple":
        return None
    return _follow(body, body.root.operands[index])


def _is_unchanged(body: Computation, index: int) -> bool:
    value = _next(body, index)
    return value is not None and _tuple_index(value) == index


def _grows_by_one(body: Computation, index: int) -> bool:
    value = _next(body, index)
    if value is None or value.opcode != "add":
        return False
    terms = [_follow(body, name) for name in value.operands]
    return {_tuple_index(term) for term in terms} >= {index} and 1 in map(_constant, terms)
