"""How the test files are run: slow files first, the slowest named, a dead worker ends the run.

`tests/file_seconds.json` says how long each file took. With `--dist loadfile` pytest-xdist gives
the next file to the worker that is free, so the files that take longest have to start first;
without `--no-loadscope-reorder` it would start with the files that have the most tests.
Renew it on an idle machine, in the environment that `make test` made:
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --write-file-seconds
"""

import collections
import json
import pathlib
import re
import tempfile

import pytest

SECONDS = pathlib.Path(__file__).with_name("file_seconds.json")
LISTED = 10
# Imports of PyTorch, of TensorFlow, and of libraries on top of them.
FRAMEWORKS = re.compile(
    r"""^\s*(import|from)\s+(torch|transformers|sentence_transformers|mteb|tensorflow|seqio
        |tensorflow_datasets)\b
      | (importorskip|skip_without)\(
        "(torch|transformers|sentence_transformers|mteb|tensorflow|seqio)\b""",
    re.MULTILINE | re.VERBOSE,
)


def pytest_addoption(parser):
    parser.addoption("--write-file-seconds", action="store_true", help=f"renews {SECONDS.name}")


def pytest_configure(config):
    config.pluginmanager.register(_FileSeconds(config))
    if worker := getattr(config, "workerinput", None):
        config.pluginmanager.register(_CurrentFile(pathlib.Path(worker["current_file"])))
    elif config.getoption("dist", "no") != "no":
        config.pluginmanager.register(_DeadWorkers(config))


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by markers
def pytest_collection_modifyitems(items):
    """Slowest files first, those without a number before all; tests keep their order in a file.

    Tests of files that import PyTorch or TensorFlow get the marker `frameworks`.
    """
    imports = {path for path in {item.path for item in items} if _imports_frameworks(path)}
    for item in items:
        if item.path in imports:
            item.add_marker("frameworks")
    seconds = json.loads(SECONDS.read_text()) if SECONDS.is_file() else {}
    items.sort(key=lambda item: -seconds.get(item.path.name, float("inf")))


def _imports_frameworks(path: pathlib.Path) -> bool:
    return bool(FRAMEWORKS.search(path.read_text()))


class _FileSeconds:
    """Adds up what each file takes in set-up, calls and tear-down, and prints the slowest."""

    def __init__(self, config):
        self._config = config
        self._seconds = collections.Counter()

    def pytest_runtest_logreport(self, report):
        self._seconds[pathlib.Path(report.nodeid.split("::")[0]).name] += report.duration

    def pytest_terminal_summary(self, terminalreporter):
        if len(self._seconds) < 2:
            return
        terminalreporter.section(f"slowest {LISTED} files")
        for name, seconds in self._seconds.most_common(LISTED):
            terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
        if self._config.option.write_file_seconds:
            numbers = {name: round(seconds, 1) for name, seconds in sorted(self._seconds.items())}
            SECONDS.write_text(json.dumps(numbers, indent=1) + "\n")


class _DeadWorkers:
    """Names the file in which a worker process died; `--max-worker-restart=0` ends the run."""

    def __init__(self, config):
        folder = tempfile.TemporaryDirectory(prefix="current-file-")
        config.add_cleanup(folder.cleanup)
        self._folder = pathlib.Path(folder.name)

    def _path(self, node) -> pathlib.Path:
        return self._folder / node.gateway.id

    def pytest_configure_node(self, node):
        node.workerinput["current_file"] = str(self._path(node))

    @pytest.hookimpl(tryfirst=True)
    def pytest_testnodedown(self, node, error):
        if error and self._path(node).is_file():
            name = self._path(node).read_text()
            node.config.get_terminal_writer().line(f"\nworker {node.gateway.id} died in {name}")


class _CurrentFile:
    """In a worker: keeps the name of the file that is collected or run now."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def pytest_collectstart(self, collector):
        if isinstance(collector, pytest.Module):
            self._path.write_text(collector.nodeid)

    def pytest_runtest_logstart(self, nodeid):
        self._path.write_text(nodeid)
