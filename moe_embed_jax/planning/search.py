"""The fastest setting that fits: a short explicit list of candidates, each compiled."""

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


def candidates(config: RunConfig, chips: int) -> list[RunConfig]:
    """Meshes that divide the chips and the experts, chunk sizes in powers of two, remat off and on.

    Small chunks and remat first within a mesh, so that what does not fit can be skipped.
    """
    result = []
    for fsdp in FSDP:
        for expert in EXPERT:
            moe = config.model.num_moe_layers > 0
            if chips % (fsdp * expert) or (expert > 1 and not moe):
                continue
            if expert > 1 and config.model.num_experts % expert:
                continue
            mesh = MeshConfig(data=-1, fsdp=fsdp, expert=expert)
            for remat in (True, False):
                for rows in CHUNK_ROWS:
                    model = dataclasses.replace(config.model, remat=remat)
                    data = dataclasses.replace(config.data, chunk_rows=rows)
                    result.append(dataclasses.replace(config, mesh=mesh, model=model, data=data))
    return result


def search(config: RunConfig, chips: int, plan_of, identity: dict, cache_path, console: Console):
    """(config, plan) of the fastest candidate that fits, after a table of them all; (None, None) if
    none does. The plan is None if the cache had the candidate.

    Args:
      plan_of: config -> `Plan`.
      identity: what else the plans depend on (topology, versions), for the cache.
      cache_path: JSON file of finished candidates (or None): an interrupted search goes on there.
    """
    cache = _Cache(cache_path, identity)
    failed, rows, plans = [], [], {}
    for candidate in tqdm(candidates(config, chips), desc="candidates", unit=""):
        index = len(rows)
        if any(_needs_more(candidate, other) for other in failed):
            rows.append((candidate, None))
            continue
        found = cache.get(candidate)
        if found is None:
            try:
                plans[index] = plan_of(candidate)
                found = to_json(plans[index])
            except UserError as error:  # a parameter that cannot be divided by this mesh
                found = {"fits": False, "error": str(error)}
            cache.put(candidate, found)
        if not found["fits"] and "error" not in found:
            failed.append(candidate)
        rows.append((candidate, found))
    console.print(_table(rows))
    fitting = [
        (found["predicted_step_seconds"], index)
        for index, (_, found) in enumerate(rows)
        if found and found["fits"]
    ]
    if not fitting:
        return None, None
    best = min(fitting)[1]
    return rows[best][0], plans.get(best)


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


def _needs_more(candidate: RunConfig, other: RunConfig) -> bool:
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
        if found is None:
            table.add_row(*setting, "", "", "", "skipped: a smaller one does not fit")
        elif "error" in found:
            table.add_row(*setting, "", "", "", found["error"])
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
