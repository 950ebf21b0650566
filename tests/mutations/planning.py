"""Faults of the planner: what a compiled program costs, and which setting is the fastest."""

from mutations.fault import Fault

HLO = "planning/test_planning_hlo.py"
FREE = "planning/test_planning.py -k 'not TestCompiled'"  # of the TPU compiler

FAULTS = (
    Fault(
        "trip-counts-from-conditions-are-ignored",
        "planning/loops.py",
        "None if start is None or stop is None else max(stop - start, 0)",
        "None if start is None or stop is None else 1",
        f"{HLO} -k tpu_loops",
    ),
    Fault(
        "known-trip-counts-are-one-too-few",
        "planning/loops.py",
        "return int(known.group(1))",
        "return int(known.group(1)) - 1",
        f"{HLO} -k 'scan and often'",
    ),
    Fault(
        "collectives-in-loops-count-once",
        "planning/cost.py",
        "mine[key] += count * times",
        "mine[key] += count",
        f"{HLO} -k bytes_and_axes",
    ),
    Fault(
        "matmul-counts-its-multiply-adds-once",
        "planning/matmul.py",
        "return 2.0 * instruction.shapes[0].size",
        "return 1.0 * instruction.shapes[0].size",
        f"{HLO} -k 'twice or batched_matmul'",
    ),
    Fault(
        "convolution-counts-products-with-padding",
        "planning/matmul.py",
        "count += int(((between == 0) & (at >= 0) & (at < size)).sum())",
        "count += out",
        f"{HLO} -k convolution",
    ),
    Fault(
        "all-reduce-is-one-pass-of-the-ring",
        "planning/collectives.py",
        '"all-reduce": 2.0',
        '"all-reduce": 1.0',
        "planning/test_planning.py -k ring",
    ),
    Fault(
        "all-gather-has-the-bytes-of-a-shard",
        "planning/collectives.py",
        'bytes=operand * size if kind == "all-gather" else operand',
        "bytes=operand",
        f"{HLO} -k bytes_and_axes",
    ),
    Fault(
        "latency-of-a-ring-is-forgotten",
        "planning/collectives.py",
        " + HOP_SECONDS * (n - 1))",
        ")",
        "planning/test_planning.py -k ring",
    ),
    Fault(
        "groups-vary-over-the-other-axes",
        "planning/collectives.py",
        "moved = np.moveaxis(positions, places, range(-len(places), 0))",
        "moved = np.moveaxis(positions, places, range(len(places)))",
        f"{HLO} -k device_groups",
    ),
    Fault(
        "transposed-groups-are-not-transposed",
        "planning/collectives.py",
        "(numbers.transpose(_integers(order)) if order else numbers).reshape(-1)",
        "numbers.reshape(-1)",
        f"{HLO} -k device_groups",
    ),
    Fault(
        "all-asynchronous-communication-is-exposed",
        "planning/roofline.py",
        "max(0.0, self.async_collectives - self.busy)",
        "self.async_collectives",
        "planning/test_planning.py -k hides",
    ),
    Fault(
        "compute-and-memory-of-a-kernel-add-up",
        "planning/roofline.py",
        "        return max(\n            flops / chip.peak_flops,\n",
        "        return math.fsum(\n            [flops / chip.peak_flops,\n",
        FREE,
        more=(
            (
                "            vector_operations / chip.vector_operations,\n        )",
                "            vector_operations / chip.vector_operations]\n        )",
            ),
            ("import dataclasses\n", "import dataclasses\nimport math\n"),
        ),
    ),
    Fault(
        "bytes-on-chip-count-as-hbm",
        "planning/hlo.py",
        '"S(" in layout',
        "False",
        f"{HLO} -k their_memory",
    ),
    Fault(
        "gigabytes-of-the-compiler-are-decimal",
        "planning/memory.py",
        '"G": 2**30',
        '"G": 10**9',
        f"{HLO} -k out_of_memory_is_understood",
    ),
    Fault(
        "advice-does-not-look-at-what-dominates",
        "planning/memory.py",
        'if dominant in ("parameters", "optimiser state"):',
        "if False:",
        "planning/test_planning.py -k advice",
    ),
    Fault(
        "slowest-candidate-wins",
        "planning/search.py",
        "min(fitting)[1] if fitting",
        "max(fitting)[1] if fitting",
        "planning/test_planning.py -k search_skips",
    ),
    Fault(
        "candidates-that-need-more-are-tried-all-the-same",
        "planning/search.py",
        "all(more >= less for more, less in at_least)",
        "all(more < less for more, less in at_least)",
        "planning/test_planning.py -k search_skips",
    ),
    Fault(
        "meshes-do-not-divide-the-experts",
        "planning/search.py",
        " and config.model.num_experts % expert == 0",
        "",
        FREE,
    ),
    Fault(
        "hard-negatives-have-no-tokens",
        "stages/contrastive.py",
        "tokens = pairs * (query_tokens + documents * document_tokens)",
        "tokens = pairs * (query_tokens + document_tokens)",
        "planning/test_planning.py -k fine_tuning_is_planned",
    ),
    Fault(
        "rows-are-taken-as-full",
        "stages/contrastive.py",
        "tokens / (PACKED_SHARE * data.row_length)",
        "tokens / data.row_length",
        "planning/test_planning.py -k rows_follow",
    ),
)
