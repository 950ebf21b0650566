"""No import runs upwards: the floors of CONTRIBUTING.md."""

import ast

from conftest import ROOT

PACKAGE = ROOT / "moe_embed_jax"
FLOORS = (
    {"mesh", "mesh_config", "shapes", "processes", "config", "errors", "json_file", "storage"}
    | {
        "bucket",
        "compute_capability",
        "ownership",
        "refusals",
        "children",
        "compilation_cache",
        "finite",
        "distributed",
        "hashes",
        "markdown_table",
        "orbax_leftovers",
        "parts",
        "safe_names",
        "triton_first",
        "unstacked",
    },
    {"checksums", "new_folder", "made_by", "kernels"},
    {"card"},
    {"tokenizers", "pairs"},
    {"routing", "losses", "data", "search", "sharding"},
    {"models", "checkpoint", "newest_checkpoint", "inference_batches"},
    {"interop"},
    {"model_folder", "weights"},
    {"embedder", "token_ids", "conversion", "preparation"},
    {"evaluation", "curation"},
    {"training", "stages"},
    {"planning", "recipe"},
)
PREPARATION_LIBRARIES = {"tensorflow", "tensorflow_datasets", "seqio", "apache_beam"}
ENTRY = "launching"  # for what has a `main`


def floor(room: str) -> int:
    (found,) = [i for i, rooms in enumerate(FLOORS) if room in rooms]
    return found


def imported(tree: ast.AST) -> set[str]:
    """The rooms of the package that a module imports, also inside functions."""
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_embed_jax"):
            _, *room = node.module.split(".")
            rooms |= {room[0]} if room else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            rooms |= {parts[1] for parts in names if parts[0] == "moe_embed_jax" and parts[1:]}
    return rooms


def imported_libraries(tree: ast.AST) -> set[str]:
    """The top-level modules of other libraries that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def test_only_preparation_imports_tensorflow_and_what_brings_it():
    """A process that trains, embeds or searches must never load them."""
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if imported_libraries(ast.parse(path.read_text())) & PREPARATION_LIBRARIES
    }
    assert importers == {"preparation"}


def test_imports_run_downwards():
    upwards, seen = [], 0
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in ("__init__", ENTRY):
            continue
        tree = ast.parse(path.read_text())
        has_main = any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree.body)
        for other in imported(tree):
            seen += 1
            allowed = has_main if other == ENTRY else floor(other) <= floor(room)
            if not allowed:
                upwards.append(f"{path.relative_to(ROOT)} imports {other}")
    assert seen > 100
    assert not upwards


def test_no_file_is_longer_than_400_lines():
    folders = ("moe_embed_jax", "launch", "configs", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 300
    assert not [str(path) for path in files if len(path.read_text().splitlines()) > 400]
