"""The fastest setting that fits, over meshes, chunk sizes and rematerialisation.

A compilation takes minutes, so the search is greedy: every mesh with the setting that needs least
memory, then on the fastest mesh that fits every setting.
"""

import dataclasses
import hashlib
import json
import math

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from moe_embed_jax import json_file, storage
from moe_embed_jax.config import save_json
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import MeshConfig
from moe_embed_jax.planning.report import to_json
from moe_embed_jax.training.run_config import Run

# (data.chunk_rows, model.remat_rows), those that need least memory first; 0 is all rows. They are
# rows of 256 tokens: of longer ones proportionally fewer.
SETTINGS = ((32, 32), (256, 64), (0, 64), (0, 128), (0, 256), (0, 512), (0, 0))
FSDP = (1, 4, 16)
EXPERT = (1, 2, 4, 8)
RESULT_KEYS = ("fits", "rows", "predicted_step_seconds")  # of a plan, which a search reads


def mesh_candidates(config: Run, chips: int) -> list[Run]:
    """Meshes that divide the chips of a slice and the experts, in the setting of least memory."""
    experts = EXPERT if config.model.num_moe_layers else (1,)
    meshes = [
        MeshConfig(data=-1, fsdp=fsdp, expert=expert)
        for fsdp in FSDP
        for expert in experts
        if chips % (fsdp * expert) == 0 and config.model.num_experts % expert == 0
    ]
    return [_setting(config, mesh, *SETTINGS[0]) for mesh in meshes]


def setting_candidates(config: Run) -> list[Run]:
    """All SETTINGS on the mesh of `config`."""
    return [_setting(config, config.mesh, *setting) for setting in SETTINGS]


def _setting(config: Run, mesh: MeshConfig, chunk_rows: int, remat_rows: int) -> Run:
    longer = max(config.data.row_length // 256, 1)
    chunk_rows, remat_rows = (-(-rows // longer) for rows in (chunk_rows, remat_rows))
    model = dataclasses.replace(config.model, remat_rows=remat_rows)
    data = dataclasses.replace(config.data, chunk_rows=chunk_rows)
    return dataclasses.replace(config, mesh=mesh, model=model, data=data)


def search(config: Run, chips: int, plan_of, identity: dict, cache_path, console: Console):
    """(config, plan) of the fastest candidate that fits, after a table of them all; (None, None) if
    none does. The plan is None if the cache had the candidate.

    Args:
      chips: of a slice.
      plan_of: config -> `Plan`.
      identity: what else the plans depend on (topology, versions), for the cache.
      cache_path: JSON file of finished candidates (or None): an interrupted search continues there.
    """
    tried = _Tried(plan_of, _Cache(cache_path, identity))
    tried.run(mesh_candidates(config, chips), "meshes")
    best = tried.fastest()
    if best is not None:
        tried.run(setting_candidates(tried.rows[best][0]), "chunks and remat")
        best = tried.fastest()
    console.print(_table(tried.rows))
    return (None, None) if best is None else (tried.rows[best][0], tried.plans.get(best))


class _Tried:
    """Candidates so far.

    rows: (config, JSON of its plan or why it has none). plans: by row, without the cache's.
    """

    def __init__(self, plan_of, cache: "_Cache"):
        self.plan_of = plan_of
        self.cache = cache
        self.rows: list[tuple[Run, dict]] = []
        self.plans = {}

    def run(self, candidates: list[Run], title: str) -> None:
        known = [candidate for candidate, _ in self.rows]
        for candidate in tqdm([c for c in candidates if c not in known], desc=title, unit=""):
            why = self.why_skip(candidate)
            result = {"fits": False, "why": why} if why else self.find(candidate)
            self.rows.append((candidate, result))

    def why_skip(self, candidate: Run) -> str | None:
        for other, result in self.rows:
            if "why" in result or not _needs_as_much(candidate, other):
                continue
            if not result["fits"]:
                return "skipped: a smaller one does not fit"
            if _limits(candidate, result["rows"]) == _limits(other, result["rows"]):
                return "skipped: the batch has no more rows"
        return None

    def find(self, candidate: Run) -> dict:
        result = self.cache.get(candidate)
        if result is None:
            try:
                plan = self.plan_of(candidate)
            except UserError as error:  # a parameter that cannot be divided by this mesh
                result = {"fits": False, "why": str(error)}
            else:
                self.plans[len(self.rows)] = plan
                result = to_json(plan)
            self.cache.put(candidate, result)
        return result

    def fastest(self) -> int | None:
        fitting = [
            (result["predicted_step_seconds"], row)
            for row, (_, result) in enumerate(self.rows)
            if result["fits"]
        ]
        return min(fitting)[1] if fitting else None


class _Cache:
    """Results by everything that they depend on; without a path, forgetful."""

    def __init__(self, path, identity: dict):
        self.path = path and storage.path(path)
        self.identity = identity
        self.known = {}
        if self.path and storage.has_entry(self.path):
            self.known = json_file.read_object(self.path)

    def get(self, config: Run) -> dict | None:
        result = self.known.get(self._key(config))
        if result is not None and not _is_result(result):
            raise UserError(f"--cache={self.path}: a result in it is damaged: remove the file")
        return result

    def put(self, config: Run, result: dict) -> None:
        self.known[self._key(config)] = result
        if self.path:
            save_json(self.path, self.known)

    def _key(self, config: Run) -> str:
        content = json.dumps([self.identity, dataclasses.asdict(config)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]


def _is_result(result) -> bool:
    needs = ("fits",) if isinstance(result, dict) and "why" in result else RESULT_KEYS
    return isinstance(result, dict) and all(key in result for key in needs)


def describe(config: Run) -> str:
    """The flags that set what a search varies."""
    return (
        f"--set=mesh.fsdp={config.mesh.fsdp} --set=mesh.expert={config.mesh.expert} "
        f"--set=data.chunk_rows={config.data.chunk_rows} "
        f"--set=model.remat_rows={config.model.remat_rows}"
    )


def _needs_as_much(candidate: Run, other: Run) -> bool:
    """Whether `candidate` surely needs as much memory as `other`: the same mesh, and at least as
    many rows at a time."""
    at_least = zip(_limits(candidate), _limits(other), strict=True)
    return candidate.mesh == other.mesh and all(more >= less for more, less in at_least)


def _limits(config: Run, rows: float = math.inf) -> tuple[float, ...]:
    """Rows of a chunk and rows whose activations are kept, of a device that has `rows`.

    Keeping all (remat_rows=0) is more than all rows one group of blocks after the other.
    """
    chunk, remat = config.data.chunk_rows, config.model.remat_rows
    return min(chunk or math.inf, rows), min(remat, rows) if remat else math.inf


def _table(rows) -> Table:
    table = Table(title="Candidates (predicted)", title_justify="left")
    for column in ("fsdp", "expert", "chunk rows", "remat rows", "GiB", "step ms", "MFU", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for candidate, result in rows:
        setting = (
            str(candidate.mesh.fsdp),
            str(candidate.mesh.expert),
            str(candidate.data.chunk_rows),
            str(candidate.model.remat_rows),
        )
        if "why" in result:
            table.add_row(*setting, "", "", "", result["why"])
        else:
            size = result["hbm_bytes_per_chip"]
            table.add_row(
                *setting,
                f"{size / 2**30:.2f}" if size else "",
                f"{result['predicted_step_seconds'] * 1e3:.1f}" if result["fits"] else "",
                f"{result['predicted_mfu']:.1%}" if result["fits"] else "",
                "fits" if result["fits"] else "does not fit",
            )
    return table
