"""The fastest setting that fits, over meshes, chunk sizes and rematerialisation.

A compilation takes minutes, so the search is greedy: every mesh with the settings that need least
memory, then on the fastest mesh that fits every chunk size, with rematerialisation and without.
"""

import dataclasses
import hashlib
import json
import pathlib

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from moe_embed_jax.config import save_json
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import MeshConfig
from moe_embed_jax.planning.report import to_json
from moe_embed_jax.training.run_config import RunConfig

CHUNK_ROWS = (32, 64, 128, 256)
FSDP = (1, 4, 16)
EXPERT = (1, 2, 4, 8)


def mesh_candidates(config: RunConfig, chips: int) -> list[RunConfig]:
    """Meshes that divide the chips and the experts, with the smallest chunks and remat."""
    experts = EXPERT if config.model.num_moe_layers else (1,)
    meshes = [
        MeshConfig(data=-1, fsdp=fsdp, expert=expert)
        for fsdp in FSDP
        for expert in experts
        if chips % (fsdp * expert) == 0 and config.model.num_experts % expert == 0
    ]
    return [_setting(config, mesh, True, CHUNK_ROWS[0]) for mesh in meshes]


def setting_candidates(config: RunConfig) -> list[RunConfig]:
    """All chunk sizes and remat on the mesh of `config`, those that need least memory first."""
    return [
        _setting(config, config.mesh, remat, rows) for remat in (True, False) for rows in CHUNK_ROWS
    ]


def _setting(config: RunConfig, mesh: MeshConfig, remat: bool, chunk_rows: int) -> RunConfig:
    model = dataclasses.replace(config.model, remat=remat)
    data = dataclasses.replace(config.data, chunk_rows=chunk_rows)
    return dataclasses.replace(config, mesh=mesh, model=model, data=data)


def search(config: RunConfig, chips: int, plan_of, identity: dict, cache_path, console: Console):
    """(config, plan) of the fastest candidate that fits, after a table of them all; (None, None) if
    none does. The plan is None if the cache had the candidate.

    Args:
      plan_of: config -> `Plan`.
      identity: what else the plans depend on (topology, versions), for the cache.
      cache_path: JSON file of finished candidates (or None): an interrupted search goes on there.
    """
    tried = _Tried(plan_of, _Cache(cache_path, identity))
    tried.run(mesh_candidates(config, chips), "meshes")
    best = tried.fastest()
    if best is not None:
        tried.run(setting_candidates(tried.rows[best][0]), "chunk sizes and remat")
        best = tried.fastest()
    console.print(_table(tried.rows))
    return (None, None) if best is None else (tried.rows[best][0], tried.plans.get(best))


class _Tried:
    """Candidates so far.

    rows: (config, JSON of its plan or why it has none). plans: by row, without those of the cache.
    """

    def __init__(self, plan_of, cache: "_Cache"):
        self.plan_of = plan_of
        self.cache = cache
        self.rows: list[tuple[RunConfig, dict]] = []
        self.plans = {}

    def run(self, candidates: list[RunConfig], title: str) -> None:
        known = [candidate for candidate, _ in self.rows]
        for candidate in tqdm([c for c in candidates if c not in known], desc=title, unit=""):
            why = self.why_skip(candidate)
            found = {"fits": False, "why": why} if why else self.find(candidate)
            self.rows.append((candidate, found))

    def why_skip(self, candidate: RunConfig) -> str | None:
        for other, found in self.rows:
            if "why" in found or not _needs_as_much(candidate, other):
                continue
            if not found["fits"]:
                return "skipped: a smaller one does not fit"
            if found["chunks"] == 1 and candidate.model.remat == other.model.remat:
                return "skipped: the batch is one chunk already"
        return None

    def find(self, candidate: RunConfig) -> dict:
        found = self.cache.get(candidate)
        if found is None:
            try:
                plan = self.plan_of(candidate)
            except UserError as error:  # a parameter that cannot be divided by this mesh
                found = {"fits": False, "why": str(error)}
            else:
                self.plans[len(self.rows)] = plan
                found = to_json(plan)
            self.cache.put(candidate, found)
        return found

    def fastest(self) -> int | None:
        fitting = [
            (found["predicted_step_seconds"], row)
            for row, (_, found) in enumerate(self.rows)
            if found["fits"]
        ]
        return min(fitting)[1] if fitting else None


class _Cache:
    """Results by everything that they depend on; without a path, forgetful."""

    def __init__(self, path, identity: dict):
        self.path = path and pathlib.Path(path)
        self.identity = identity
        self.known = {}
        if self.path and self.path.is_file():
            try:
                self.known = json.loads(self.path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"--cache={path} is no JSON file; remove it ({error})") from error

    def get(self, config: RunConfig) -> dict | None:
        return self.known.get(self._key(config))

    def put(self, config: RunConfig, found: dict) -> None:
        self.known[self._key(config)] = found
        if self.path:
            save_json(self.path, self.known)

    def _key(self, config: RunConfig) -> str:
        content = json.dumps([self.identity, dataclasses.asdict(config)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]


def describe(config: RunConfig) -> str:
    """The flags that set what a search varies."""
    return (
        f"--set=mesh.fsdp={config.mesh.fsdp} --set=mesh.expert={config.mesh.expert} "
        f"--set=model.remat={config.model.remat} --set=data.chunk_rows={config.data.chunk_rows}"
    )


def _needs_as_much(candidate: RunConfig, other: RunConfig) -> bool:
    """Whether `candidate` surely needs as much memory as `other`: the same mesh, chunks at least as
    large, and no more rematerialisation."""
    return (
        candidate.mesh == other.mesh
        and candidate.data.chunk_rows >= other.data.chunk_rows
        and candidate.model.remat <= other.model.remat
    )


def _table(rows) -> Table:
    table = Table(title="Candidates (predicted)", title_justify="left")
    for column in ("fsdp", "expert", "remat", "chunk_rows", "GiB", "step ms", "MFU", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for candidate, found in rows:
        setting = (
            str(candidate.mesh.fsdp),
            str(candidate.mesh.expert),
            str(candidate.model.remat),
            str(candidate.data.chunk_rows),
        )
        if "why" in found:
            table.add_row(*setting, "", "", "", found["why"])
        else:
            size = found["hbm_bytes_per_chip"]
            table.add_row(
                *setting,
                f"{size / 2**30:.2f}" if size else "",
                f"{found['predicted_step_seconds'] * 1e3:.1f}" if found["fits"] else "",
                f"{found['predicted_mfu']:.1%}" if found["fits"] else "",
                "fits" if found["fits"] else "does not fit",
            )
    return table
