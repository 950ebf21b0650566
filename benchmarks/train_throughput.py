"""Training throughput in real tokens per second: ours, ours without packing, sentence-transformers.

    python benchmarks/train_throughput.py [--width=384] [--batch_size=128] [--dtype=bfloat16]
        [--output=FILE.json]

All contestants train the same architecture from the same weights on the same pairs in the same
order, with InfoNCE at temperature 0.02 over the batch, AdamW and a clipped gradient. Both compute
in --dtype: float32, the default of both, or bfloat16 (model.dtype, PyTorch's autocast).

* ours: the training step, several texts packed into each row.
* ours, padded: the same step with the fixed shapes of the paper's code, [B, query_length] and
  [B, document_length]: documents one to a row, queries side by side in slots of query_length. Its
  rows go through the encoder in chunks (--padded_chunk_rows), which costs a second forward pass:
  128 padded pairs at once need 26 GB.
* sentence-transformers: its own SentenceTransformerTrainer on the exported folder with
  CachedMultipleNegativesRankingLoss (GradCache). It computes no load-balancing loss, which ours
  does. The mini-batch size is the fastest of --mini_batch_sizes on the first batch.
* sentence-transformers, plain: MultipleNegativesRankingLoss, the whole batch at once: more memory,
  no second forward pass.

Real tokens are queries' and documents', specials and prefixes included, padding not. The
texts given to sentence-transformers are decoded from the token store, so both truncate alike; its
own count of tokens is checked against ours. Reading, tokenising (theirs) and packing (ours) count.

Needs `pip install -e .[pytorch,benchmark]`.
"""

import argparse
import concurrent.futures
import itertools
import math
import statistics

import contestants
import numpy as np
from sentence_transformers_trainer import OPTIMIZER, TEMPERATURE, sentence_transformers

OURS, PADDED = "ours", "ours, padded"
CACHED, PLAIN = "sentence-transformers", "sentence-transformers, plain"
NAMES = (OURS, PADDED, CACHED, PLAIN)


def schedule_of(store, batch_size: int, steps: int, seed: int):
    from moe_embed_jax.data.schedule import Schedule, mixture_groups

    return Schedule(mixture_groups(store.groups, None), batch_size, steps, seed)


### Ours


def ours(turns, store: str, fields: dict, pad_id: int, sizes: dict, padded: bool):
    """`sizes`: batch_size, steps (a turn), rounds, seed, query_length, document_length, slots."""
    import jax

    from moe_embed_jax.data.token_store import TokenStore
    from moe_embed_jax.mesh import single_device_mesh
    from moe_embed_jax.models.encoder import EncoderConfig
    from moe_embed_jax.stages.contrastive import Contrastive
    from moe_embed_jax.training.optimizer import make_optimizer
    from moe_embed_jax.training.run_config import LossConfig, OptimizerConfig
    from moe_embed_jax.training.state import create_state
    from moe_embed_jax.training.step import jit_train_step

    store = TokenStore.open(store)
    timed = sizes["steps"] * sizes["rounds"]
    schedule = schedule_of(store, sizes["batch_size"], timed + 1, sizes["seed"])
    mesh = single_device_mesh()
    batches = make_batches(store, schedule, mesh, pad_id, sizes, padded)
    model = EncoderConfig(**fields)
    optimizer = make_optimizer(
        OptimizerConfig(
            peak_learning_rate=OPTIMIZER["lr"],
            schedule="constant",
            warmup_steps=0,
            b1=OPTIMIZER["beta_1"],
            b2=OPTIMIZER["beta_2"],
            epsilon=OPTIMIZER["epsilon"],
            weight_decay=OPTIMIZER["decay"],
            clip_norm=OPTIMIZER["clip"],
        ),
        timed + 1,
    )
    config = Contrastive(model, LossConfig(temperature=TEMPERATURE), batches.texts_per_row)
    step = jit_train_step(config, optimizer, mesh)
    state = create_state(config, optimizer, mesh, sizes["seed"])

    # Batch 0 gives the loss that is compared; then one batch of every other shape, to compile it.
    state, metrics = step(state, batches.at(0).arrays)
    first_loss = float(metrics["contrastive_loss"])
    seen = {needed_bucket(batches, 0)}
    for index in range(1, timed + 1):
        if (bucket := needed_bucket(batches, index)) not in seen:
            seen.add(bucket)
            state, metrics = step(state, batches.at(index).arrays)
    jax.block_until_ready(state)

    batch_of_step = prefetched(batches.at, range(1, timed + 1))
    result = {"first_loss": first_loss, "row_counts": sorted(seen)}
    while True:
        turns.wait(result)
        tokens, slots = 0, 0
        for batch in itertools.islice(batch_of_step, sizes["steps"]):
            state, metrics = step(state, batch.arrays)
            tokens += batch.tokens
            slots += batch.arrays.token_CRL.size
        jax.block_until_ready(state)
        result = turns.seconds() | {
            "tokens": tokens,
            "slots": slots,
            "loss": float(metrics["contrastive_loss"]),
        }


def needed_bucket(batches, step: int) -> int:
    packings = batches._packings(batches.schedule.rows(step))
    needed = max(packing.rows for packing in packings)
    return next(bucket for bucket in batches.buckets if bucket >= needed)


def make_batches(store, schedule, mesh, pad_id: int, sizes: dict, padded: bool):
    from moe_embed_jax.data.batches import PairBatches
    from moe_embed_jax.data.buckets import in_chunks
    from moe_embed_jax.data.packing import Packing

    query_length, row_length = sizes["query_length"], sizes["document_length"]
    per_row = row_length // query_length  # queries side by side

    class PaddedBatches(PairBatches):
        """Every text in a place of fixed length; one device."""

        def __init__(self, *args):
            super().__init__(*args)
            rows = in_chunks(self._packings(None)[0].rows, self.chunk_rows)
            self.buckets = (math.prod(rows),)

        def _packings(self, rows):
            pairs = np.arange(self.per_device)
            first = -(-pairs.size // per_row)  # rows of queries
            zeros = np.zeros_like(pairs)
            packing = Packing(
                row=np.concatenate([pairs // per_row, first + pairs]),
                index=np.concatenate([pairs % per_row, zeros]),
                start=np.concatenate([pairs % per_row * query_length, zeros]),
                rows=first + pairs.size,
            )
            return [packing]

    if padded:
        chunk_rows = sizes["padded_chunk_rows"]
        return PaddedBatches(store, schedule, mesh, row_length, per_row, pad_id, chunk_rows)
    return PairBatches(
        store, schedule, mesh, row_length, sizes["slots"], pad_id, sizes["chunk_rows"]
    )


def prefetched(function, arguments, ahead: int = 2):
    """As `Batches.iterate`: the next batches are prepared in a thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        arguments = iter(arguments)
        pending = [executor.submit(function, a) for a in itertools.islice(arguments, ahead)]
        while pending:
            result = pending.pop(0).result()
            pending += [executor.submit(function, a) for a in itertools.islice(arguments, 1)]
            yield result


### The run


def settings(arguments) -> tuple[dict, dict]:
    """(settings of `ours`, of `sentence_transformers`), without what tells their variants apart."""
    from moe_embed_jax.tokenizers.vocabulary import DOCUMENT_PREFIX, QUERY_PREFIX

    store, vocabulary, path = contestants.open_store(arguments)
    sizes = dict(
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        rounds=arguments.rounds,
        seed=arguments.seed,
        query_length=arguments.query_length,
        document_length=arguments.document_length,
        slots=arguments.texts_per_row,
        chunk_rows=arguments.chunk_rows,
        padded_chunk_rows=arguments.padded_chunk_rows,
        dtype=arguments.dtype,
        mini_batch_sizes=[int(n) for n in arguments.mini_batch_sizes.split(",")],
        prefixes=(QUERY_PREFIX, DOCUMENT_PREFIX),
    )
    fields = contestants.model_fields(arguments, vocabulary.size)
    steps = 1 + arguments.steps * arguments.rounds
    schedule = schedule_of(store, arguments.batch_size, steps, arguments.seed)
    batches = []
    for step in range(steps):
        rows = schedule.rows(step)
        pairs = [
            tuple(
                contestants.text_of(vocabulary, ids, prefix)
                for ids, prefix in zip(pair, sizes["prefixes"], strict=True)
            )
            for pair in store.read(rows)
        ]
        batches.append((pairs, int(store.lengths[rows].sum())))
    own = dict(store=str(store.folder), fields=fields, pad_id=vocabulary.pad_id, sizes=sizes)
    return own | {"vocabulary": str(path)}, dict(batches=batches, sizes=sizes)


def main():
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    contestants.add_flags(flags)
    flags.add_argument("--batch_size", type=int, default=128, help="pairs a step")
    flags.add_argument("--steps", type=int, default=2, help="in each turn")
    flags.add_argument("--texts_per_row", type=int, default=32, help="most texts in a packed row")
    flags.add_argument("--chunk_rows", type=int, default=0, help="of ours; 0: the batch at once")
    flags.add_argument("--padded_chunk_rows", type=int, default=48, help="of ours, padded")
    flags.add_argument("--mini_batch_sizes", default="16,32,64", help="tried for GradCache")
    flags.add_argument("--remat_rows", type=int, default=0, help="of ours; 0: nothing recomputed")
    flags.add_argument(
        "--contestants", default=";".join(NAMES), help="';'-separated; fewer need less memory"
    )
    arguments = flags.parse_args()
    names = arguments.contestants.split(";")
    if OURS not in names or CACHED not in names or not set(names) <= set(NAMES):
        flags.error(f"--contestants must hold {OURS!r} and {CACHED!r}, may hold all of {NAMES}")
    contestants.require(
        "pytorch,benchmark",
        "torch",
        "transformers",
        "sentence_transformers",
        "datasets",
        "accelerate",
    )

    own, theirs = settings(arguments)
    lengths = {"query": arguments.query_length, "document": arguments.document_length}
    with contestants.temporary_folder() as folder:
        made = contestants.call(
            contestants.random_model,
            folder=folder,
            fields=own["fields"],
            vocabulary=own.pop("vocabulary"),
            lengths=lengths,
            seed=arguments.seed,
        )
        own["fields"] |= {"remat_rows": arguments.remat_rows, "dtype": arguments.dtype}
        theirs["folder"] = f"{folder}/exported"
        functions = {
            OURS: (ours, own | {"padded": False}),
            PADDED: (ours, own | {"padded": True}),
            CACHED: (sentence_transformers, theirs | {"cached": True}),
            PLAIN: (sentence_transformers, theirs | {"cached": False}),
        }
        functions = {name: functions[name] for name in names}
        with contestants.contestants(functions) as started:
            results = contestants.play(started, arguments.rounds)
            ready = {name: first for name, (_, first) in started.items()}

    table = contestants.rates(results, "tokens")
    utilisation = {
        name: sum(t["tokens"] for t in turns) / sum(t["slots"] for t in turns)
        for name, turns in results.items()
    }
    report = {
        "ratio": contestants.median_ratio(table, OURS, CACHED),
        "compares": "real tokens/s of a training step: ours / SentenceTransformerTrainer with "
        "CachedMultipleNegativesRankingLoss (without a balance loss), median over rounds",
        "ratio_cpu": contestants.median_ratio(table, OURS, CACHED, "cpu"),
    }
    for key, name in (("ratio_padded", PADDED), ("ratio_plain", PLAIN)):
        if name in results:
            report[key] = contestants.median_ratio(table, OURS, name)
            report[f"{key}_cpu"] = contestants.median_ratio(table, OURS, name, "cpu")
    report |= {
        "compares_padded": "ours / ours with one text in each place of fixed length",
        "compares_plain": "ours / SentenceTransformerTrainer with MultipleNegativesRankingLoss",
        "tokens_per_second": table,
        "utilisation": utilisation,
        **contestants.circumstances(arguments, results, ready, made),
    }
    contestants.print_table(
        f"Training in {arguments.dtype}, {arguments.batch_size} pairs, width {arguments.width}",
        ["", "real tokens/s", "per CPU second", "real slots", "s/step", "ours is faster by"],
        [
            [
                name,
                table[name]["wall"]["median"],
                table[name]["cpu"]["median"],
                utilisation[name],
                statistics.median(t["wall"] for t in results[name]) / arguments.steps,
                contestants.median_ratio(table, OURS, name),
            ]
            for name in results
        ],
    )
    contestants.write_report(arguments.output, report)


if __name__ == "__main__":
    main()
