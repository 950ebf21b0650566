"""A plan as text and JSON. Every number is labelled: nothing here was measured."""

import collections

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_embed_jax.markdown_table import markdown_table
from moe_embed_jax.planning import error_bars
from moe_embed_jax.planning.aot import Plan
from moe_embed_jax.planning.cards import MEMORY_FRACTION
from moe_embed_jax.planning.chips import DCN_SECONDS
from moe_embed_jax.planning.memory import largest_arguments

MIB, GIB = 2**20, 2**30
LARGEST_SOURCES = 10


def to_json(plan: Plan) -> dict:
    """All predictions of a plan; sizes in bytes, times in seconds, per chip unless named."""
    result = {
        "predicted": True,  # every number below
        "error_bars": error_bar_text(plan),
        "topology": plan.topology,
        "chips": plan.chips,
        "mesh": plan.mesh,
        "step": plan.step_name,
        "chunks": plan.step.chunks,
        "rows": plan.step.rows,
        "notes": list(plan.step.notes),
        "fits": plan.fits,
        "hbm_bytes_per_chip": plan.hbm_bytes,
        "hbm_capacity_bytes": plan.chip.hbm_bytes,
        "hbm_bytes_by_kind": plan.memory.by_kind() if plan.memory else None,
        "model_flops_per_chip": plan.model_flops,
        "compiled_flops_per_chip": plan.cost.flops if plan.cost else None,
        "predicted_step_seconds": plan.times.step_seconds if plan.times else None,
        "predicted_step_seconds_without_overlap": plan.times.serial_seconds if plan.times else None,
        "predicted_step_seconds_bounds": _bounds(plan),
        "predicted_mfu": plan.mfu,
        "predicted_mfu_of_real_tokens": plan.mfu and plan.mfu * plan.step.real_share,
        "collectives": [
            dict(
                kind=c.kind,
                axes=list(c.axes),
                group_size=c.group_size,
                overlaps=c.is_async,
                count=count,
                bytes=c.bytes * count,
                seconds=c.seconds(plan.chip) * count,
            )
            for c, count in plan.cost.collectives.items()
        ]
        if plan.cost
        else None,
        "compile_seconds": plan.compile_seconds,
    }
    if plan.cost:
        result["pallas_flops_per_chip"] = plan.cost.kernel_flops
        result["kernels"] = _kernel_calls(plan)
        result["kernels_without_estimate"] = _kernels_without_estimate(plan)
        result["loops_of_unknown_trip_count"] = dict(plan.cost.unknown_loops)
        result["is_lower_bound"] = is_incomplete(plan) or plan.is_gpu
        result["waits_for_other_slices"] = plan.cost.waits_for_slices
        result["transfers_between_slices_in_loops"] = dict(plan.cost.slice_loops)
        result["seconds_by_source"] = seconds_by_source(plan)
        result["seconds_by_kind"] = seconds_by_kind(plan)
        result[f"{plan.step.unit.replace(' ', '_')}_per_second"] = _rate(plan)
    if plan.times and plan.step.repeats:
        result["run_hours"] = _hours(plan)
        result["run_chip_hours"] = _hours(plan) * plan.chips
    if plan.exhausted:
        result["out_of_memory"] = dict(
            space=plan.exhausted.space,
            message=plan.exhausted.message,
            largest=list(plan.exhausted.largest),
        )
    if plan.advice:
        result["advice"] = plan.advice
    return result


def print_plan(plan: Plan, console: Console) -> None:
    """The report that a person reads."""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    console.print(
        f"[bold]{plan.step_name} step on {plan.topology}: predicted: {verdict}[/bold]\n"
        f"mesh        {plan.mesh}"
    )
    for note in plan.step.notes:
        console.print(f"batch       {note}")
    console.print(f"compiled    in {plan.compile_seconds:.0f} s (measured, on this machine)\n")
    if plan.exhausted:
        _print_exhausted(plan, console)
    else:
        _print_memory(plan, console)
        _print_work(plan, console)
        _print_collectives(plan, console)
        _print_time(plan, console)
        _print_sources(plan, console)
    for line in plan.advice:
        console.print(f"to make it fit: {line}")


def _print_exhausted(plan: Plan, console: Console) -> None:
    found = plan.exhausted
    console.print(f"the compiler ran out of {found.space.upper()}: {found.message}", markup=False)
    if found.needed:
        unit, name = (GIB, "GiB") if found.space == "hbm" else (MIB, "MiB")
        needed, available = found.needed / unit, found.available / unit
        console.print(f"predicted need at least {needed:.2f} of {available:.2f} {name} per chip")
    for line in found.largest:
        console.print(f"  allocation  {line}", markup=False)
    for path, size in largest_arguments(plan.step.arguments) if found.space == "hbm" else ():
        console.print(f"  argument    {size / GIB:.3f} GiB  {path}", markup=False)


def _print_memory(plan: Plan, console: Console) -> None:
    table = _table("HBM per chip (predicted)", "kind", "GiB", "of capacity")
    for kind, size in plan.memory.by_kind().items():
        table.add_row(kind, f"{size / GIB:.3f}", f"{size / plan.chip.hbm_bytes:.1%}")
    total, capacity = plan.memory.total, plan.chip.hbm_bytes
    table.add_row("total", f"{total / GIB:.3f}", f"{total / capacity:.1%}", style="bold")
    table.add_row("capacity", f"{capacity / GIB:.3f}", "fits" if plan.fits else "DOES NOT FIT")
    console.print(table)
    if plan.is_gpu:
        console.print(
            f"capacity is what jax takes of the card, {MEMORY_FRACTION:.0%} of "
            f"{plan.chip.memory_bytes / GIB:.2f} GiB; XLA_PYTHON_CLIENT_MEM_FRACTION changes that"
        )
    kinds = plan.memory.by_kind()
    largest = ", ".join(
        f"{path} {size / GIB:.3f} GiB"
        for path, size in largest_arguments(plan.step.arguments, count=3)
    )
    console.print(
        f"dominated by {max(kinds, key=kinds.get)}; largest arguments: {largest}\n", markup=False
    )


def _print_work(plan: Plan, console: Console) -> None:
    cost = plan.cost
    table = _table("FLOPs per chip and step (predicted)", "", "TFLOP", "compiled / model")
    table.add_row(f"model, {plan.step.work}", f"{plan.model_flops / 1e12:.4g}", "")
    table.add_row("compiled: matrix products", f"{cost.matmul_flops / 1e12:.4g}", "")
    table.add_row(
        "compiled: kernels of our own and cuDNN's" if plan.is_gpu else "compiled: Pallas kernels",
        f"{cost.kernel_flops / 1e12:.4g}",
        "",
    )
    ratio = f"{cost.flops / plan.model_flops:.2f}"
    table.add_row("compiled", f"{cost.flops / 1e12:.4g}", ratio, style="bold")
    console.print(table)
    if plan.is_gpu:
        calls = "; ".join(f"{count} x {name}" for name, count in _kernel_calls(plan).items())
        launches = sum(cost.kernels.values()) + sum(cost.unestimated.values())
        console.print(f"kernels     {launches:,} a step, of which {calls or 'none of our own'}")
    for kernel in _kernels_without_estimate(plan):
        console.print(f"Pallas kernel without a cost estimate, counted as nothing: {kernel}")
    if is_incomplete(plan):
        console.print(
            "compiled FLOPs below the model's: loops of unknown trip count hide work (experts of "
            "the blocked back end do): the real step is slower than predicted here"
        )
    for name, count in cost.unknown_loops.items():
        console.print(
            f"unknown trip count (only the data decide), counted {plan.step.unknown_trips} x per "
            f"entry: loop in {name}, entered {count} x",
            markup=False,
        )


def is_incomplete(plan: Plan) -> bool:
    """Whether a part of the work was surely not seen, so that time is a lower bound only."""
    return bool(plan.cost.unknown_loops) and plan.cost.flops < plan.model_flops


def _print_collectives(plan: Plan, console: Console) -> None:
    table = _table(
        "Collectives per step (predicted)", "kind", "axes", "overlaps", "count", "MB", "ms"
    )
    merged = collections.defaultdict(lambda: [0, 0, 0.0])
    for c, count in plan.cost.collectives.items():
        row = merged[c.kind, " x ".join(c.axes) or "-", "yes" if c.is_async else "no"]
        row[0] += count
        row[1] += c.bytes * count
        row[2] += c.seconds(plan.chip) * count
    for key, (count, size, seconds) in sorted(merged.items(), key=lambda item: -item[1][2]):
        table.add_row(*key, str(count), f"{size / 1e6:.3f}", f"{seconds * 1e3:.3f}")
    console.print(table if merged else "no collectives\n")
    if plan.cost.waits_for_slices:
        console.print(
            f"between slices: the step waits {plan.cost.waits_for_slices} x for the others, "
            f"{DCN_SECONDS * 1e3:g} ms each (assumed), and {plan.chip.dcn_bandwidth / 1e9:g} GB/s "
            "per chip\n"
        )
    for name, count in plan.cost.slice_loops.items():
        console.print(
            f"WARNING: {count} transfers between slices stand in the loop {name}", markup=False
        )


def seconds_by_kind(plan: Plan) -> dict[str, float]:
    """What the step's time is made of; sums to the time without overlap."""
    times = plan.times
    return {
        "compiler's cycle estimates": times.estimated,
        "Pallas kernels (roofline)": times.kernels,
        "others (roofline)": times.unestimated,
        "blocking collectives": times.blocking_collectives,
        "between slices": times.between_slices,
        "overlapping collectives": times.async_collectives,
        "copies to on-chip memory": times.prefetches,
    }


def _print_time(plan: Plan, console: Console) -> None:
    times = plan.times
    table = _table("Time per step (predicted)", "", "ms", "")
    hidden = {"overlapping collectives": times.exposed_async, "copies to on-chip memory": 0.0}
    for kind, seconds in seconds_by_kind(plan).items():
        note = f"{hidden[kind] * 1e3:.3f} ms of it not hidden" if kind in hidden else ""
        table.add_row(kind, f"{seconds * 1e3:.3f}", note)
    table.add_row("step", f"{times.step_seconds * 1e3:.3f}", "", style="bold")
    bound = "" if plan.is_gpu else "upper bound"
    table.add_row("step, nothing hidden", f"{times.serial_seconds * 1e3:.3f}", bound)
    console.print(table)
    if plan.is_gpu:
        console.print(
            "a lower bound: each kernel is taken to reach the full rate of what limits it "
            "(products or memory), and gaps between kernels are left out"
        )
    share = plan.step.real_share
    lines = [
        f"MFU         {plan.mfu:.1%} of {plan.step.work}"
        + (f", {plan.mfu * share:.1%} of real tokens ({share:.0%} of slots)" if share < 1 else ""),
        f"throughput  {_rate(plan):,.0f} {plan.step.unit}/s over {plan.chips} chips",
    ]
    if plan.step.repeats:
        hours = _hours(plan)
        lines.append(
            f"whole run   {plan.step.repeats:,} steps: {hours:,.2f} hours, "
            f"{hours * plan.chips:,.1f} chip-hours (evaluation and checkpoints left out)"
        )
    if found := _bounds(plan):
        low, high = (seconds * 1e3 for seconds in found)
        lines.insert(0, f"step        {low:,.4g} to {high:,.4g} ms with its error bars")
    for line in lines:
        console.print(f"predicted   {line}")
    console.print(f"error bars  {error_bar_text(plan)}")


def error_bar_text(plan: Plan) -> str:
    """How far predictions of this kind were from measurements."""
    return error_bars.describe(plan.step_name, plan.is_gpu)


def _bounds(plan: Plan) -> tuple[float, float] | None:
    """Seconds of the step with error bars; None where nothing of the kind was ever compared."""
    is_compared = plan.times and plan.step_name == "train" and not plan.is_gpu
    return error_bars.bounds(plan.times.step_seconds) if is_compared else None


def to_markdown(plans: list[Plan]) -> str:
    """A table with a row per plan."""
    head = ["topology", "chips", "data x fsdp x expert", "chunk rows", "remat rows"]
    head += ["HBM per chip, GiB", "fits", "step, s", "MFU", "MFU of real tokens"]
    head += [f"{plans[0].step.unit}/s", "run, hours", "chip-hours"]
    rows = []
    for plan in plans:
        config = plan.config
        size = plan.hbm_bytes
        cells = [
            plan.topology,
            str(plan.chips),
            " x ".join(map(str, plan.mesh_shape)),
            str(config.data.chunk_rows),
            str(config.model.remat_rows),
            (f"{size / GIB:.1f}" if size else "?") + f" of {plan.chip.hbm_bytes / GIB:.1f}",
            "yes" if plan.fits else "no",
        ]
        if plan.times and plan.fits:
            cells += [
                f"{plan.times.step_seconds:.3f}",
                f"{plan.mfu:.0%}",
                f"{plan.mfu * plan.step.real_share:.0%}",
                f"{_rate(plan):,.0f}",
                f"{_hours(plan):,.0f}" if plan.step.repeats else "",
                f"{_hours(plan) * plan.chips:,.0f}" if plan.step.repeats else "",
            ]
        else:
            cells += [""] * 6
        rows.append(cells)
    title = f"Predicted for one {plans[0].step_name} step, not measured:"
    texts = dict.fromkeys(error_bar_text(plan) for plan in plans)
    notes = "\n".join(f"Error bars: {text}." for text in texts)
    return f"{title}\n\n{markdown_table(head, rows, 'l')}\n\n{notes}\n"


def seconds_by_source(plan: Plan) -> dict[str, float]:
    """The places in the program that the compiler gives most cycles, most first."""
    largest = plan.cost.cycles_by_source.most_common(LARGEST_SOURCES)
    return {source: cycles / plan.chip.clock_hz for source, cycles in largest}


def _print_sources(plan: Plan, console: Console) -> None:
    if not plan.cost.cycles:  # of a compiler that gives none
        return
    table = _table("Where the compiler's cycles go (predicted)", "place in the program", "ms", "")
    for source, seconds in seconds_by_source(plan).items():
        share = seconds / plan.times.step_seconds
        table.add_row(escape(source), f"{seconds * 1e3:.3f}", f"{share:.1%} of the step")
    console.print(table)


def _kernels_without_estimate(plan: Plan) -> list[str]:
    return sorted({kernel.name for kernel in plan.cost.kernels if kernel.flops is None})


def _kernel_calls(plan: Plan) -> dict[str, int]:
    """How often a step calls each kernel of our own, and cuDNN's."""
    calls = collections.Counter()
    for kernel, count in plan.cost.kernels.items():
        calls[kernel.name] += count
    return dict(sorted(calls.items()))


def _rate(plan: Plan) -> float:
    return plan.step.units / plan.times.step_seconds


def _hours(plan: Plan) -> float:
    return plan.step.repeats * plan.times.step_seconds / 3600


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        is_number = column in ("GiB", "TFLOP", "count", "MB", "ms", "of capacity")
        table.add_column(column, justify="right" if index and is_number else "left")
    return table
