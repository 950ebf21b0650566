"""How often the loops of a compiled program run."""

import re

from moe_embed_jax.planning.hlo import Computation, Instruction, Module

_PASSES_VALUE = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")


def trip_count(module: Module, parent: Computation, loop: Instruction) -> int | None:
    """Iterations of a `while` instruction, None where only the data decide.

    From `known_trip_count` where the compiler wrote it (CPU does, libtpu 0.0.42 does not), else from
    the condition `i < constant` of a counter that starts at a constant and grows by one.
    """
    known = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.rest)
    if known:
        return int(known.group(1))
    (condition_name,), (body_name,) = loop.called["condition"], loop.called["body"]
    condition = module.computations[condition_name]
    test = _follow(condition, condition.root)
    if test.opcode == "fusion":  # CPU wraps the comparison
        wrapper = test
        condition = module.computations[test.called["calls"][0]]
        test = condition.root
    else:
        wrapper = None
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    left, right = (_follow(condition, condition.instructions[n]) for n in test.operands)
    outer = module.computations[condition_name]
    left, right = (_outer(outer, wrapper, side) for side in (left, right))
    index = _tuple_index(left)
    if index is None:
        return None
    start = _initial(parent, loop, index)
    stop = _constant(right)
    if stop is None and _tuple_index(right) is not None:
        bound = _tuple_index(right)
        if _carried(module.computations[body_name], bound):
            stop = _initial(parent, loop, bound)
    if start is None or stop is None:
        return None
    return max(stop - start, 0) if _steps_by_one(module, body_name, index) else None


def _follow(computation: Computation, instruction: Instruction) -> Instruction:
    """Through copies to where a value comes from."""
    while instruction.opcode in _PASSES_VALUE and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _outer(computation: Computation, wrapper: Instruction | None, value: Instruction):
    """The operand of a fusion behind a parameter of it."""
    if wrapper is None or value.opcode != "parameter":
        return value
    operand = wrapper.operands[int(value.operand_text)]
    return _follow(computation, computation.instructions[operand])


def _tuple_index(instruction: Instruction) -> int | None:
    if instruction.opcode != "get-tuple-element":
        return None
    return int(instruction.attribute("index"))


def _constant(instruction: Instruction) -> int | None:
    text = instruction.operand_text
    is_integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", text)
    return int(text) if is_integer else None


def _initial(parent: Computation, loop: Instruction, index: int) -> int | None:
    """Constant that element `index` of the loop's state starts with."""
    state = _follow(parent, parent.instructions[loop.operands[0]])
    if state.opcode != "tuple":
        return None
    return _constant(_follow(parent, parent.instructions[state.operands[index]]))


def _carried(body: Computation, index: int) -> bool:
    """Whether the body hands element `index` on unchanged."""
    if body.root.opcode != "tuple":
        return False
    value = _follow(body, body.instructions[body.root.operands[index]])
    return _tuple_index(value) == index


def _steps_by_one(module: Module, body_name: str, index: int) -> bool:
    body = module.computations[body_name]
    if body.root.opcode != "tuple":
        return False
    value = _follow(body, body.instructions[body.root.operands[index]])
    wrapper = None
    inner = body
    if value.opcode == "fusion":
        wrapper = value
        inner = module.computations[value.called["calls"][0]]
        value = inner.root
    if value.opcode != "add":
        return False
    sides = [_follow(inner, inner.instructions[name]) for name in value.operands]
    sides = [_outer(body, wrapper, side) for side in sides]
    return any(_tuple_index(side) == index for side in sides) and any(
        _constant(side) == 1 for side in sides
    )
