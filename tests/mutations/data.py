"""Faults of packing, batches, schedules, masking, token stores and the preparation of raw data."""

from mutations.fault import Fault

BATCHES = "test_batches.py -k holds_exactly"

FAULTS = (
    Fault(
        "a-row-takes-one-text-too-many",
        "data/packing.py",
        "index + 1 < self.slots",
        "index < self.slots",
        "test_packing.py -k overlap",
    ),
    Fault(
        "positions-do-not-restart-for-each-text",
        "data/packing.py",
        "(np.arange(len(sequence)) for sequence in sequences)",
        "(s + np.arange(len(t)) for s, t in zip(packing.start.tolist(), sequences))",
        BATCHES,
    ),
    Fault(
        "own-document-has-the-id-of-the-query",
        "data/batches.py",
        "document_id_BM2[:, 0] = content[:, 1]",
        "document_id_BM2[:, 0] = content[:, 0]",
        BATCHES,
    ),
    Fault(
        "hard-negatives-have-each-others-ids",
        "data/batches.py",
        "document_id_BM2[:, 1:][mask_BN] = self.store.negative_ids[places]",
        "document_id_BM2[:, 1:][mask_BN] = self.store.negative_ids[places[::-1]]",
        "test_train_on_pairs.py -k 'batches_hold and 2-0'",
    ),
    Fault(
        "last-prefetched-batch-is-lost",
        "data/batches.py",
        "if step + PREFETCH < stop:",
        "if step + PREFETCH < stop - 1:",
        "test_batches.py -k function_of_the_step",
    ),
    Fault(
        "every-epoch-has-the-same-order",
        "data/schedule.py",
        "(seed, group_index, epoch)",
        "(seed, group_index, 0)",
        "test_schedule.py",
    ),
    Fault(
        "every-group-has-the-same-order",
        "data/schedule.py",
        "(seed, group_index, epoch)",
        "(seed, 0, epoch)",
        "test_schedule.py",
    ),
    Fault(
        "language-exponent-is-ignored",
        "data/schedule.py",
        "group.rows**language_exponent",
        "float(group.rows)",
        "test_schedule.py -k exponent",
    ),
    Fault(
        "index-arrays-of-a-token-store-not-checked",
        "data/token_store.py",
        'if not is_whole or _array_hash(array) != spec["content"][name]:',
        "if not is_whole:",
        "test_token_store.py",
    ),
    Fault(
        "content-ids-of-unnormalised-text",
        "data/vocabulary.py",
        'unicodedata.normalize("NFC", clean_text(text)).strip()',
        "clean_text(text)",
        "test_vocabulary.py -k content_ids",
    ),
    Fault(
        "special-tokens-can-be-hidden",
        "data/masking.py",
        "np.flatnonzero(self.is_ordinary[token_L])",
        "np.arange(len(token_L))",
        "test_masking.py -k 'shares or row'",
    ),
    Fault(
        "every-step-hides-the-same-tokens",
        "data/masking.py",
        "np.random.SeedSequence((seed, step, row))",
        "np.random.SeedSequence((seed, row))",
        "test_masking.py -k depends_on_seed",
    ),
    Fault(
        "hidden-tokens-are-always-masked",
        "data/masking.py",
        "hidden_L[chosen[kind < self.mask_share]] = self.mask_id",
        "hidden_L[chosen] = self.mask_id",
        "test_masking.py -k shares",
    ),
    Fault(
        "raw-duplicates-stay",
        "data/raw/pieces.py",
        "is_first[1:] = keys[1:] != keys[:-1]",
        "pass",
        "test_prepare_pipeline.py -k test_duplicates",
    ),
    Fault(
        "of-raw-duplicates-the-last-stays",
        "data/raw/pieces.py",
        '("part", "ascending"), ("number", "ascending")',
        '("part", "descending"), ("number", "descending")',
        "test_prepare_pipeline.py -k test_duplicates",
    ),
    Fault(
        "quarantined-rows-are-pairs-too",
        "data/raw/pieces.py",
        'good = np.flatnonzero(batch["problem"] == b"")',
        'good = np.arange(len(batch["problem"]))',
        "test_prepare_pipeline.py -k nothing_is_lost",
    ),
    Fault(
        "limit-of-bad-rows-is-excluded",
        "data/raw/quarantine.py",
        "bad <= limit * rows",
        "bad < limit * rows",
        "test_prepare_pipeline.py -k 'nothing_is_lost or too_many_bad'",
    ),
    Fault(
        "piece-of-a-document-cut-a-token-short",
        "data/document_rows.py",
        "end = np.minimum(begin + room, lengths[document])",
        "end = np.minimum(begin + room - 1, lengths[document])",
        "test_document_rows.py -k every_token_once",
    ),
)
