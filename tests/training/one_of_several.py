"""What test_processes.py starts in each process of a small group: one_of_several.py FOLDER.

Prepares data (process 0 alone), makes batches on a mesh in whose order the processes alternate, and
writes what this process read and what all of them put together to FOLDER/<process>.json and .npz.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import numpy as np
from helpers import synthetic_data

from moe_embed_jax import config as config_files
from moe_embed_jax import distributed
from moe_embed_jax.data.batches import PairBatches
from moe_embed_jax.data.schedule import Schedule, mixture_groups
from moe_embed_jax.errors import UserError
from moe_embed_jax.mesh import MeshConfig, batch_sharding, make_mesh
from moe_embed_jax.processes import process_0_first, to_devices, to_host, true_anywhere
from moe_embed_jax.search.knn import top_k
from moe_embed_jax.training import workdir as workdir_module
from moe_embed_jax.training.run_config import RunConfig

STEPS = (0, 5, 11)


def main(folder: pathlib.Path) -> None:
    distributed.INTERRUPT_WAIT = 1000  # this program catches what Ctrl-C raises
    distributed.start()
    process = jax.process_index()
    data_dir = folder / "data"
    prepared = []

    def prepare(config):
        prepared.append(config.data.dir)
        time.sleep(2)  # long enough for the others to arrive and find nothing, if they did not wait
        synthetic_data.write_data(data_dir)

    workdir_module.prepare = prepare
    page = folder / "config.py"
    if process == 0:
        page.write_text(synthetic_data.config_text(data_dir))
    config = process_0_first("page", lambda: config_files.load(RunConfig, str(page), {}))
    store, vocabulary = process_0_first(
        "data", lambda: workdir_module.open_data(folder, config, write=process == 0)
    )

    refused = []
    for name, action in (("failure", refuse), ("signal", stop), ("Ctrl-C", interrupt)):
        if action is interrupt and process == 1:  # while it waits
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        try:
            process_0_first(name, action)
        except (UserError, SystemExit, KeyboardInterrupt) as error:
            refused.append(str(error) or type(error).__name__)

    rows_read = []
    read = store.read
    store.read = lambda rows: (rows_read.append(np.asarray(rows).tolist()), read(rows))[1]
    # Device 0 of each process, then device 1 of each, and so on.
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1).T.reshape(-1).tolist()
    mesh = make_mesh(MeshConfig(), devices)
    schedule = Schedule(
        mixture_groups(store.groups, None), config.batch_size, max(STEPS) + 1, config.seed
    )
    batches = PairBatches(store, schedule, mesh, 48, 6, vocabulary.pad_id)
    arrays = {}
    for step in STEPS:
        for name, array in vars(batches.at(step).arrays).items():
            arrays[f"{step}/{name}"] = to_host(array)
    document_ND = np.random.default_rng(0).normal(size=(2000, 8))
    arrays["scores"], arrays["indices"] = top_k(document_ND[:9], document_ND, 20, mesh, block=256)
    document_ND[300] = np.nan  # of process 1, where there are two
    try:
        top_k(document_ND[:9], document_ND, 20, mesh, block=256)
    except (UserError, ValueError) as error:
        refused.append(str(error))
    numbers = np.arange(4 * mesh.size)
    record = {
        "prepared": prepared,
        "refused": refused,
        "rows_read": rows_read,
        "rows": [schedule.rows(step).tolist() for step in STEPS],
        "kept": bool((to_host(to_devices(numbers, batch_sharding(mesh))) == numbers).all()),
        "true_anywhere": [true_anywhere(False), true_anywhere(process == 0)],
    }
    (folder / f"{process}.json").write_text(json.dumps(record))
    np.savez(folder / f"{process}.npz", **arrays)
    print("printed by process", process)
    print("warning", file=sys.stderr)


def refuse():
    raise UserError(f"no, says process {jax.process_index()}")


def stop():
    raise SystemExit(7)


def interrupt():
    time.sleep(2)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
