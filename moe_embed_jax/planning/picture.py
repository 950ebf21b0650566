"""A plan as a picture: a bar of memory and a bar of time, by kind."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_embed_jax import storage
from moe_embed_jax.planning.aot import Plan
from moe_embed_jax.planning.report import GIB, error_bar_text, seconds_by_kind


def save_picture(plan: Plan, path) -> None:
    """Writes a PNG; a plan that ran out of memory shows its need against the capacity."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    memory_axes, time_axes = figure.subplots(1, 2)
    figure.suptitle(
        f"{plan.step_name} step, {plan.mesh.split(',')[0]} ({plan.topology}): predicted"
    )
    figure.supxlabel(f"error bars: {error_bar_text(plan)}", fontsize=6, wrap=True)
    if plan.memory:
        kinds = plan.memory.by_kind()
    else:
        kinds = {f"needed ({plan.exhausted.space})": plan.exhausted.needed or 0}
    _bar(memory_axes, {kind: size / GIB for kind, size in kinds.items()}, "GiB of HBM per chip")
    capacity = plan.chip.hbm_bytes / GIB
    memory_axes.axhline(capacity, color="black", linestyle="--")
    memory_axes.annotate(
        "capacity", (0.98, capacity), xycoords=("axes fraction", "data"), ha="right"
    )
    if plan.times:
        kinds = {kind: seconds * 1e3 for kind, seconds in seconds_by_kind(plan).items()}
        _bar(time_axes, kinds, "ms per step, nothing hidden")
        step = plan.times.step_seconds * 1e3
        time_axes.axhline(step, color="black", linestyle="--")
        time_axes.annotate(
            "predicted", (0.98, step), xycoords=("axes fraction", "data"), ha="right"
        )
    else:
        time_axes.set_axis_off()
        time_axes.text(0.5, 0.5, "does not compile:\nout of memory", ha="center")
    with storage.written_whole(storage.path(path)) as file:
        figure.savefig(file, format="png", dpi=120)


def _bar(axes, kinds: dict[str, float], label: str) -> None:
    bottom = 0.0
    for kind, value in kinds.items():
        axes.bar(["step"], [value], bottom=bottom, width=0.4, label=f"{kind}: {value:.3g}")
        bottom += value
    axes.set_ylabel(label)
    axes.set_xlim(-0.4, 1.6)
    axes.legend(loc="center right", fontsize=7)
