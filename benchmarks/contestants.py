"""What the throughput benchmarks share: contestants in processes of their own, model, texts.

Contestants take turns in rounds, so that a slow minute of the machine meets all of them. Each lives
in one process for the whole benchmark (compiled once, its memory and threads its own) and sleeps on
a pipe while it is not its turn; the processor time of that sleep is measured too, and should be 0.
"""

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_embed_jax.errors import UserError  # noqa: E402

MOST_OTHERS = 0.05
SCALES = ("wall", "cpu")  # seconds by the clock, processor seconds of the contestant's process


def require(extra: str, *modules: str) -> None:
    """Ends the program with one line where modules that a benchmark needs are not installed.

    For the start of a benchmark: its contestants would miss them minutes later. extra: whose
    installation brings them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: this benchmark needs {', '.join(missing)}, not installed here: "
            f"pip install -e .[{extra}]",
            file=sys.stderr,
        )
        raise SystemExit(2)


class Turns:
    """A contestant's end of the pipe: `wait(result)` hands in a turn and sleeps until the next."""

    def __init__(self, pipe):
        self._pipe = pipe
        self.idle_cpu = 0.0

    def wait(self, result=None) -> None:
        self._pipe.send(result)
        cpu = time.process_time()
        go = self._pipe.recv()
        self.idle_cpu += time.process_time() - cpu
        if not go:
            raise SystemExit(0)
        self._start = time.perf_counter(), time.process_time(), machine_seconds()

    def seconds(self) -> dict[str, float]:
        """Since this turn began; "others_cpu": of all other processes on the machine."""
        wall, cpu, machine = self._start
        result = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        others = machine_seconds() - machine - result["cpu"]
        return result | {"others_cpu": max(others, 0.0), "idle_cpu": self.idle_cpu}


def machine_seconds() -> float:
    """Processor seconds that the whole machine has spent on anything; 0 where Linux is not."""
    try:
        fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, _ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _serve(pipe, function, settings) -> None:
    try:
        function(Turns(pipe), **settings)
    except (Exception, KeyboardInterrupt):
        pipe.send(RuntimeError(traceback.format_exc()))


class Contestant:
    """A process that runs `function(turns, **settings)`; `function` must be importable."""

    def __init__(self, function, **settings):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function, settings))
        self._process.start()
        theirs.close()

    def result(self):
        """What the contestant hands in next; waits for it."""
        try:
            result = self._pipe.recv()
        except EOFError:
            raise UserError(
                f"a contestant died with exit code {self._process.exitcode}; too little memory?"
            ) from None
        if isinstance(result, Exception):
            raise result
        return result

    def turn(self):
        self._pipe.send(True)
        return self.result()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(False)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


@contextlib.contextmanager
def contestants(functions: dict):
    """{name: (function, settings)} -> {name: (Contestant, what it said when it was ready)}.

    Started one after the other, so that nobody compiles or warms up while another one does.
    """
    started = {}
    try:
        for name, (function, settings) in functions.items():
            start = time.perf_counter()
            contestant = Contestant(function, **settings)
            started[name] = (contestant, None)
            started[name] = (contestant, contestant.result())
            print(f"{name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
        yield started
    finally:
        for contestant, _ in started.values():
            contestant.stop()


def play(started: dict, rounds: int) -> dict[str, list]:
    """{name: [what it handed in, for every round]}, A B C A B C ..."""
    results = {name: [] for name in started}
    for index in range(rounds):
        for name, (contestant, _) in started.items():
            results[name].append(contestant.turn())
            wall = results[name][-1]["wall"]
            print(f"round {index + 1}/{rounds}  {name:24} {wall:8.2f} s", flush=True)
    return results


def rates(results: dict[str, list], unit: str) -> dict[str, dict]:
    """Units (tokens, texts) per second: {name: {scale: {"median", "values"}}}."""
    table = {}
    for name, turns in results.items():
        values = {scale: [turn[unit] / turn[scale] for turn in turns] for scale in SCALES}
        table[name] = {s: {"median": statistics.median(v), "values": v} for s, v in values.items()}
    return table


def median_ratio(table: dict, one: str, other: str, scale: str = "wall") -> float:
    """Median over the rounds of rate(one) / rate(other): both met the same minute and texts."""
    pairs = zip(table[one][scale]["values"], table[other][scale]["values"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def others_share(results: dict[str, list]) -> float:
    """Processor time of everybody else while the contestants had their turns, of all there was.

    Says on the terminal when it is too much: a benchmark needs the machine for itself. PyTorch's
    threads wait for each other by spinning, so company costs it far more than it costs XLA.
    """
    turns = [turn for of_one in results.values() for turn in of_one]
    share = sum(t["others_cpu"] for t in turns) / (sum(t["wall"] for t in turns) * threads())
    if share > MOST_OTHERS:
        print(f"WARNING: other processes used {share:.0%} of the machine: do not trust the ratios")
    return share


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns[:1], title=title, title_justify="left")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:,.3g}" for cell in row))
    Console(width=max(100, Console().width)).print(table)


def circumstances(arguments, results: dict, ready: dict, made: dict) -> dict:
    """What every report says besides its figures: the raw turns, the model, the machine."""
    return {
        "others_cpu_share": others_share(results),
        "rounds": results,
        "ready": ready,
        "model": made,
        "arguments": vars(arguments),
        "machine": machine(),
    }


def write_report(path: str | None, report: dict) -> None:
    if path:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n")


### Data, model


def add_flags(flags) -> None:
    """Data and architecture, the same in both benchmarks."""
    data = flags.add_argument_group("data")
    data.add_argument("--data_dir", default="runs/data", help="prepared data; prepared if missing")
    data.add_argument("--wheels_dir", default="", help="the pinned wheels, without a network")
    data.add_argument("--vocabulary", default="", help="SentencePiece model; default: trained one")
    data.add_argument("--vocabulary_size", type=int, default=16_384, help="of the trained one")
    data.add_argument("--query_length", type=int, default=32)
    data.add_argument("--document_length", type=int, default=256)
    data.add_argument("--seed", type=int, default=0)
    model = flags.add_argument_group("model")
    model.add_argument("--layers", type=int, default=12)
    model.add_argument("--width", type=int, default=384, help="heads: width / 64, experts: 4 width")
    model.add_argument("--experts", type=int, default=8, help="every second layer, top-2")
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",  # of both sides
        help="of products, on both sides; PyTorch's by autocast",
    )
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--output", help="JSON file to write")


def data_config(arguments):
    from moe_embed_jax.data.data_config import DataConfig, VocabularyConfig

    if arguments.vocabulary:
        vocabulary = VocabularyConfig("file", path=arguments.vocabulary)
    else:
        vocabulary = VocabularyConfig("train", size=arguments.vocabulary_size)
    return DataConfig(
        dir=arguments.data_dir,
        wheels_dir=arguments.wheels_dir,
        vocabulary=vocabulary,
        query_length=arguments.query_length,
        document_length=arguments.document_length,
        row_length=arguments.document_length,
    )


def open_store(arguments):
    """(TokenStore, Vocabulary, path of the vocabulary) of the default data, prepared if need be."""
    from moe_embed_jax.data.data_spec import planned_store_path, token_store_path, vocabulary_path
    from moe_embed_jax.data.token_store import TokenStore
    from moe_embed_jax.tokenizers.vocabulary import Vocabulary
    from moe_embed_jax.training import workdir
    from moe_embed_jax.training.run_config import RunConfig

    config = data_config(arguments)
    preparation = config.preparation()
    path = vocabulary_path(preparation, config.dir)
    if token_store_path(preparation, config.dir) is None or not path.is_file():
        workdir.prepare(RunConfig(data=config))
    store = TokenStore.open(planned_store_path(preparation, config.dir))
    return store, Vocabulary.load(path), path


def model_fields(arguments, vocabulary_size: int) -> dict:
    """Arguments of EncoderConfig."""
    return dict(
        vocab_size=-(-vocabulary_size // 64) * 64,
        num_layers=arguments.layers,
        width=arguments.width,
        num_heads=max(arguments.width // 64, 1),
        ffn_width=4 * arguments.width,
        num_experts=arguments.experts,
    )


def random_model(turns, folder: str, fields: dict, vocabulary: str, lengths: dict, seed: int):
    """A contestant of no turn: writes `folder`/ours and `folder`/exported with random weights."""
    import jax

    from moe_embed_jax.conversion import export_model
    from moe_embed_jax.model_folder import PROMPTS, LoadedModel, save_model
    from moe_embed_jax.models.encoder import EncoderConfig, count_params, init_params
    from moe_embed_jax.tokenizers.vocabulary import Vocabulary

    folder = pathlib.Path(folder)
    model = EncoderConfig(**fields)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed))
    loaded = LoadedModel(model, params, None, Vocabulary.load(vocabulary), PROMPTS, lengths)
    save_model(folder / "ours", loaded, "random numbers")
    export_model(folder / "ours", folder / "exported")
    total, active = count_params(model)
    turns.wait({"parameters": total, "active_parameters": active, **dataclasses.asdict(model)})


def call(function, **settings):
    """What `function` hands in first, in a process that ends with it."""
    with contestants({function.__name__: (function, settings)}) as started:
        return started[function.__name__][1]


def text_of(vocabulary, ids, prefix: str) -> str:
    """The text behind stored ids (truncated as they are), without its prefix."""
    return vocabulary.decode(ids).removeprefix(prefix.strip()).lstrip()


def machine() -> dict:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ("jax", "torch", "transformers", "sentence-transformers", "faiss-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "cores": threads(),
        "processor": _processor(),
        "python": platform.python_version(),
        **packages,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


def threads() -> int:
    """As many for each contestant as the process may use; XLA takes the same number by itself."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def quiet_torch():
    """torch with its threads set; transformers' loading bars off."""
    import torch
    import transformers

    torch.set_num_threads(threads())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch


def autocast(dtype: str):
    """PyTorch's products on CPUs in `dtype`."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def temporary_folder():
    return tempfile.TemporaryDirectory(prefix="moe_embed_benchmark_")
