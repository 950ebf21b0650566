"""What the first cell of every notebook does once it knows the repository: installs, and checks.

Imports only the standard library, because it runs before the package is there. On a machine with a
TPU or GPU the package comes with the JAX that drives it.
"""

import glob
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

# Whose release an installation may change although this Python has imported the old one.
IMPORTED_EARLY = ("jax", "jaxlib", "flax", "numpy")


def accelerator() -> str | None:
    """The extra that drives what this machine has: "tpu", "cuda12", or None on a CPU."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return "tpu"
    return "cuda12" if shutil.which("nvidia-smi") else None


def prepare(root, modules=(), extras=(), on_cpu: bool = False) -> None:
    """Installs the repository `root` where a module is missing, and checks that JAX works.

    Args:
      modules: that the notebook needs besides the package.
      extras: of the package, that bring them.
      on_cpu: the notebook computes on the CPU even where there is an accelerator.
    Raises `RuntimeError` with a line that says what to do.
    """
    extra = None if on_cpu else accelerator()
    # Programs that a session has compiled serve the next one, and commands that a cell runs.
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.cwd() / "runs" / "compiled")
    )
    if any(importlib.util.find_spec(name) is None for name in ("moe_embed_jax", *modules)):
        _install(root, [*extras, *([extra] if extra else [])])
    if extra and os.environ.get("JAX_PLATFORMS") != "cpu":
        _check(extra)


def _install(root, extras) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    constraints = pathlib.Path(root) / "constraints" / f"python{version}.txt"
    if not constraints.is_file():
        raise RuntimeError(f"Python {version} is not supported: take one of {constraints.parent}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    package = f"{root}[{','.join(extras)}]" if extras else str(root)  # pip refuses "[]"
    try:
        subprocess.run([*command, "--editable", package], check=True)
    except subprocess.CalledProcessError:
        raise RuntimeError(f"pip could not install {package}: its own lines say why") from None
    sys.path.insert(0, str(root))  # this Python started before the package was there
    importlib.invalidate_caches()
    stale = [name for name in IMPORTED_EARLY if name in sys.modules and _is_stale(name)]
    if stale:
        raise RuntimeError(
            f"installed, but this Python has imported the old {', '.join(stale)}: restart it (on "
            "Colab: Runtime, Restart session), then run this cell again"
        )


def _is_stale(name: str) -> bool:
    return importlib.metadata.version(name) != getattr(sys.modules[name], "__version__", None)


def _check(extra: str) -> None:
    import jax

    kind = {"tpu": "TPU", "cuda12": "GPU"}[extra]
    try:
        device, reason = jax.devices()[0], ""
    except RuntimeError as error:
        device, reason = None, f" ({str(error).splitlines()[0]})"
    if device is None or device.platform == "cpu":
        raise RuntimeError(
            f"this machine has a {kind}, but JAX does not see it{reason}: uninstall moe_embed_jax "
            "(pip uninstall --yes moe_embed_jax), restart this Python (on Colab: Runtime, Restart "
            "session), and run this cell again"
        )
    print(f"JAX {jax.__version__} on {len(jax.devices())} x {device.device_kind}")
