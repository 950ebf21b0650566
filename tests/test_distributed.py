"""How a run finds its other processes."""

import http.server
import io
import threading

import jax
import pytest

from moe_embed_jax import distributed
from moe_embed_jax.errors import UserError

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
)


@pytest.fixture
def started(monkeypatch):
    """The keyword arguments of each call of jax.distributed.initialize."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t1v-n-0,t1v-n-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:8471", "TPU_WORKER_HOSTNAMES": "a"}, False),
    ],
)
def test_environment_decides(started, monkeypatch, environment, joins):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.start()
    assert len(started) == joins


def test_number_and_index_of_the_process(started, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    distributed.start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    distributed.start()
    found = [(call["num_processes"], call["process_id"]) for call in started]
    assert found == [(None, None), (4, 3)]
    monkeypatch.setenv("JAX_PROCESS_ID", "three")
    with pytest.raises(UserError, match="JAX_PROCESS_ID='three' must be a whole number"):
        distributed.start()


def test_incomplete_environment_is_one_line(monkeypatch):
    """By jax itself: it has no default for what is missing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_ADDRESS is set, but .*JAX_NUM_PROCESSES"):
        distributed.start()


@pytest.mark.parametrize(
    ("workers", "slices", "joins"),
    [
        ("10.0.0.2,10.0.0.3", None, True),
        ("10.0.0.2", None, False),
        ("10.0.0.2", 1, False),
        ("10.0.0.2", 2, True),
        ("10.0.0.2", 16, True),
    ],
)
def test_metadata_of_a_tpu_vm(started, monkeypatch, workers, slices, joins):
    attributes = {"worker-network-endpoints": workers}
    if slices is not None:
        attributes["tpu-env"] = f"WORKER_ID: '0'\nMEGASCALE_NUM_SLICES: '{slices}'\n"

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            found = folder.endswith("/instance/attributes") and name in attributes
            self.send_response(200 if found and self.headers["Metadata-Flavor"] else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        distributed.start()
        assert not started  # no chips here: the metadata are not asked
        monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"])
        monkeypatch.delenv("JAX_PLATFORMS")
        distributed.start()
        server.shutdown()
    assert len(started) == joins
    distributed.start()  # a server that does not answer is none
    assert len(started) == joins


def test_lines_of_other_processes_are_prefixed():
    stream = io.StringIO()
    prefixed = distributed._PrefixedLines(stream, "[process 3] ")
    for text in ("one\ntw", "o\n", "", "three"):
        print(text, end="", file=prefixed)
    assert stream.getvalue() == "[process 3] one\n[process 3] two\n[process 3] three"
