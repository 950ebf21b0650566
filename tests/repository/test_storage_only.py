"""Files are reached through `storage` alone, so that every path may be in a bucket.

`LOCAL` names each call that is about this machine, and why.
"""

import ast

from conftest import ROOT

STORAGE = ("moe_embed_jax/storage.py", "moe_embed_jax/bucket.py")
LOCAL = {  # {file: {call: why}}
    "launch/embed.py": {"open": "/dev/null"},
    "moe_embed_jax/config.py": {"pathlib.Path": "a config file is code of this machine"},
    "moe_embed_jax/curation/units.py": {
        "Path": "a shard, before it is copied",
        "tempfile.TemporaryDirectory": "a shard, before it is copied",
    },
    "moe_embed_jax/distributed.py": {
        "glob.glob": "devices",
        "os.open": "/dev/null",
    },
    "moe_embed_jax/interop/tensors.py": {
        "safetensors.safe_open": "opens a local copy",
        "safetensors.numpy.save_file": "into a new folder, which is local",
    },
    "moe_embed_jax/interop/verify/runtimes.py": {
        "pathlib.Path": "the scripts beside it, and packages of Node.js",
        "shutil.which": "programs of this machine",
    },
    "moe_embed_jax/launching.py": {"os.open": "/dev/null"},
    "moe_embed_jax/ownership.py": {
        "os.path.exists": "/proc",
        "os.readlink": "/proc",
        "pathlib.Path": "/proc",
    },
    "moe_embed_jax/preparation/beam/columnar.py": {
        "open": "a file of this machine, or a copy",
        "tempfile.TemporaryFile": "what a child process says",
    },
    "moe_embed_jax/preparation/beam/pipeline.py": {
        "pathlib.Path": "files of TFDS, before Beam copies them",
        "tempfile.TemporaryDirectory": "files of TFDS, before Beam copies them",
    },
    "moe_embed_jax/preparation/beam/read.py": {
        "Path": "a copy for Arrow",
        "tempfile.TemporaryDirectory": "a copy for Arrow",
    },
    "moe_embed_jax/preparation/beam/stages.py": {
        "pathlib.Path": "a shard, before Beam copies it",
        "tempfile.TemporaryDirectory": "a shard, before Beam copies it",
    },
    "moe_embed_jax/preparation/builders/package_texts.py": {"Path": "TFDS writes on disks"},
    "moe_embed_jax/preparation/builders/wheels.py": {
        "Path": "pip downloads to a disk",
        "os.stat": "pip downloads to a disk",
        "os.walk": "pip downloads to a disk",
        "tempfile.TemporaryDirectory": "pip downloads to a disk",
        "tempfile.TemporaryFile": "what pip says",
        "zipfile.ZipFile": "a wheel on a disk",
    },
    "moe_embed_jax/preparation/document_store.py": {"open": "/dev/null"},
    "moe_embed_jax/preparation/xlmr_pieces.py": {
        "pathlib.Path": "rules for SentencePiece",
        "tempfile.TemporaryDirectory": "rules for SentencePiece",
    },
    "moe_embed_jax/recipe/config.py": {"pathlib.Path": "a config file is code of this machine"},
    "moe_embed_jax/recipe/records.py": {
        "fcntl.flock": "a lock that child processes inherit",
        "os.open": "a lock that child processes inherit",
    },
    "moe_embed_jax/training/metric_writer.py": {
        "pathlib.Path": "TensorBoard's file, before it is copied",
        "tempfile.TemporaryDirectory": "TensorBoard's file, before it is copied",
    },
}
MODULES = {"shutil", "tempfile", "fcntl", "glob", "mmap"}  # all of their calls
CALLS = {
    *(f"os.{name}" for name in ("open", "fdopen", "link", "symlink", "makedirs", "mkdir", "walk")),
    *(f"os.{name}" for name in ("remove", "unlink", "rmdir", "rename", "replace", "truncate")),
    *(f"os.{name}" for name in ("listdir", "scandir", "stat", "utime", "access", "readlink")),
    *(f"os.path.{name}" for name in ("exists", "isfile", "isdir", "getsize", "getmtime")),
    *(f"os.path.{name}" for name in ("abspath", "realpath", "expanduser")),
    *(f"np.{name}" for name in ("load", "save", "savez", "memmap", "fromfile", "loadtxt")),
    *(f"safetensors.{name}" for name in ("safe_open", "numpy.load_file", "numpy.save_file")),
    *("safe_open", "gzip.open", "lzma.open", "zipfile.ZipFile", "tarfile.open", "io.open"),
    *("open", "Path", "pathlib.Path"),
}
# First arguments that are no names of a user: open files, and the module itself.
OPEN = {"file", "io.BytesIO", "__file__"}


def name_of(node: ast.expr) -> str:
    """`a.b.c` of such an expression and of a call of it; "" for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return name_of(node.func)
    if isinstance(node, ast.Attribute) and (before := name_of(node.value)):
        return f"{before}.{node.attr}"
    return ""


def local_calls(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not (node.args and name_of(node.args[0]) in OPEN):
            name = name_of(node.func)
            is_of_module = "." in name and name.partition(".")[0] in MODULES
            if name in CALLS or (is_of_module and name != "shutil.copyfileobj"):  # of open files
                found.add(name)
    return found


def test_storage_alone_opens_files():
    found = {}
    for folder in ("moe_embed_jax", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            calls = local_calls(ast.parse(path.read_text()))
            if calls and name not in STORAGE:
                found[name] = calls
    assert found == {name: set(calls) for name, calls in LOCAL.items()}


def test_what_counts_as_a_local_call():
    code = "with path.open() as file: np.load(file)\nopen(path)\nshutil.rmtree(p)\npathlib.Path(x)"
    assert local_calls(ast.parse(code)) == {"open", "shutil.rmtree", "pathlib.Path"}
