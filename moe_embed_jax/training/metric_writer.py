"""What a run leaves behind while it runs: metrics.jsonl, TensorBoard, a progress bar.

`metrics.jsonl` has one line per step and holds nothing that depends on the clock, so the files of a
resumed and of an uninterrupted run are equal byte for byte.
"""

import contextlib
import importlib
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
from tqdm import tqdm

from moe_embed_jax import storage
from moe_embed_jax.training.records import METRICS_FILE, as_line


def _import_tensorboard(*modules: str) -> list:
    """Modules of tensorboardX without PyTorch.

    Its `__init__` imports PyTorch where it is installed, whatever module is wanted, and no setting
    prevents that: seconds and memory that a training process has no use for. None in sys.modules
    stands for "not installed". It is gone again when this returns.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        return [importlib.import_module(f"tensorboardX.{module}") for module in modules]
    finally:
        if hidden:
            del sys.modules["torch"]


_events, _event, _summary = _import_tensorboard(
    "event_file_writer", "proto.event_pb2", "proto.summary_pb2"
)
_MOST_BYTES = 4 << 20  # of an object with scalars


class Board:
    """A file of TensorBoard scalars, written by the thread that calls.

    tensorboardX's own writer has a thread: when that dies, of a full disk for example, `add_scalar`
    waits for it for ever.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        """Scalars of earlier files from `first_step` on are no longer shown."""
        self._folder, self._local = folder, None
        self._open()
        start = _event.SessionLog(status=_event.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        local = self._folder
        if storage.is_remote(self._folder):
            self._local = tempfile.TemporaryDirectory()
            local = pathlib.Path(self._local.name)
        self._writer = _events.EventsWriter(str(local / "events"))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        values = [
            _summary.Summary.Value(tag=name, simple_value=float(value))
            for name, value in scalars.items()
        ]
        self._write(step=step, summary=_summary.Summary(value=values))

    def flush(self) -> None:
        self._writer.flush()
        if self._local is None:
            return
        # An object is written whole: a large one ends here, and TensorBoard reads them in order.
        (file,) = pathlib.Path(self._local.name).iterdir()
        storage.copy(file, self._folder / file.name)
        if file.stat().st_size > _MOST_BYTES:
            self.close()
            self._open()

    def close(self) -> None:
        self._writer.close()
        if self._local is not None:
            self._local.cleanup()

    def _write(self, **fields) -> None:
        self._writer.write_event(_event.Event(wall_time=time.time(), **fields))


class MetricWriter:
    """Collects device metrics without waiting for the device; writes them at `flush`."""

    def __init__(
        self,
        workdir: pathlib.Path,
        start_step: int,
        learning_rates: np.ndarray,
        loss_name: str,
        is_writer: bool,
    ):
        """Appends to the file; `records.continue_records` removes what comes after `start_step`.

        Args:
          learning_rates: of every step of the run, which the records repeat.
          loss_name: of the metric that is shown as the loss: the stage's own, without balance.
          is_writer: process 0 writes; the others only keep time.
        """
        self.is_writer = is_writer
        self._loss_name = loss_name
        self._learning_rates = learning_rates
        self._pending = []
        self._clock = time.perf_counter()
        if not is_writer:
            return
        self._file = storage.AppendedFile(workdir / METRICS_FILE)
        self._board = Board(workdir / "tensorboard", start_step + 1)
        # A terminal is redrawn twice a second; a log file gets a line every half minute.
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=len(learning_rates),
            initial=start_step,
            desc="training",
            unit="step",
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
        )

    def add(self, step: int, group: str, tokens: int, metrics: dict) -> None:
        """`metrics`: device arrays of the update that made step `step` (from 1); not waited for."""
        self._pending.append((step, group, tokens, metrics))

    def flush(self) -> list[dict]:
        """Fetches and writes the pending steps; returns their records, in every process."""
        fetched = jax.device_get([metrics for *_, metrics in self._pending])
        records = []
        for (step, group, tokens, _), metrics in zip(self._pending, fetched, strict=True):
            values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
            rate = float(self._learning_rates[step - 1])
            head = {"step": step, "group": group, "tokens": int(tokens), "learning_rate": rate}
            records.append({**head, **values})
        seconds = time.perf_counter() - self._clock
        tokens_per_second = sum(n for _, _, n, _ in self._pending) / max(seconds, 1e-9)
        self._clock = time.perf_counter()
        self._pending = []
        if self.is_writer and records:
            self._write(records, tokens_per_second)
        return records

    def pause(self) -> None:
        """Starts the clock anew, so that an evaluation does not count as training time."""
        self._clock = time.perf_counter()

    def _write(self, records: list[dict], tokens_per_second: float) -> None:
        for record in records:
            self._file.write(as_line(record))
            source = record["group"].split("/")[0]
            scalars = {
                f"train/{name}": value
                for name, value in record.items()
                if isinstance(value, (int, float)) and name != "step"
            }
            scalars[f"loss_by_source/{source}"] = record[self._loss_name]
            if "expert_load" in record:
                load_E = np.mean(record["expert_load"], axis=0)
                for expert, share in enumerate(load_E):
                    scalars[f"expert_load/{expert}"] = share
                    scalars[f"expert_load_{source}/{expert}"] = share
            self._board.add(record["step"], scalars)
        last_step = records[-1]["step"]
        self._board.add(last_step, {"speed/real_tokens_per_second": tokens_per_second})
        self._file.flush()
        self._board.flush()
        mean = {
            name: np.mean([record[name] for record in records])
            for name in ("accuracy", "utilisation")
        }
        shown = {"loss": f"{np.mean([record[self._loss_name] for record in records]):.3f}"}
        if "balance" in records[-1]:
            shown["balance"] = f"{np.mean([r['balance'] for r in records]):.2f}"
        shown["acc"] = f"{mean['accuracy']:.2f}"
        shown["fill"] = f"{mean['utilisation']:.0%}"
        shown["tok/s"] = f"{tokens_per_second:,.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(last_step - self._bar.n)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Further TensorBoard scalars, e.g. of an evaluation."""
        if self.is_writer:
            self._board.add(step, values)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_writer:
            tqdm.write(text, file=sys.stderr)

    def sync(self) -> None:
        """Returns when what was flushed is on the disk."""
        if self.is_writer:
            self._file.sync()

    def close(self) -> None:
        """Ends the bar's line and closes the files; a second call does nothing."""
        if self.is_writer and not self._file.closed:
            with contextlib.closing(self._board), contextlib.closing(self._file):
                self._bar.close()
