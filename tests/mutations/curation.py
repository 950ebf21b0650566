"""Faults of consistency filtering and of the mining of hard negatives."""

from mutations.fault import Fault

LOOP = "curation/test_consistency.py -k loop_over_all_scores"
MINED = "curation/test_negatives.py -k oracle"

FAULTS = (
    Fault(
        "consistency-compares-the-best-other-document",
        "curation/consistency.py",
        "self.other_Pk[:, -1] <=",
        "self.other_Pk[:, 0] <=",
        LOOP,
    ),
    Fault(
        "consistency-drops-ties",
        "curation/consistency.py",
        "self.other_Pk[:, -1] <= self.own_P",
        "self.other_Pk[:, -1] < self.own_P",
        LOOP,
    ),
    Fault(
        "consistency-leaves-the-best-other-document-out",
        "curation/consistency.py",
        "np.where(is_own_Pm.any(axis=1), is_own_Pm.argmax(axis=1), k)",
        "np.where(is_own_Pm.any(axis=1), is_own_Pm.argmax(axis=1), 0)",
        LOOP,
    ),
    Fault(
        "own-score-from-another-order-of-sums",
        "curation/consistency.py",
        "own_P = np.where(is_own_Pm.any(axis=1), score_Pm[~others_Pm], own_P)",
        "pass",
        "curation/test_consistency.py -k 'twin or loop_over_all_scores'",
    ),
    Fault(
        "neighbours-of-another-k-are-reused",
        "curation/consistency.py",
        "json.dumps([rule.k, queries.about",
        "json.dumps([queries.about",
        "curation/test_consistency.py -k 'filters_a_folder or another_k'",
    ),
    Fault(
        "negatives-at-the-limit-are-taken",
        "curation/negatives.py",
        "(score_Bm < score_limit",
        "(score_Bm <= score_limit",
        MINED,
    ),
    Fault(
        "relative-limit-of-a-negative-score-lies-above-it",
        "curation/negatives.py",
        "positive_B - (1 - rule.relative) * np.abs(positive_B)",
        "positive_B * rule.relative",
        "curation/test_negatives.py -k negative_positive",
    ),
    Fault(
        "query-is-its-own-negative",
        "curation/negatives.py",
        "            found.add((query, document))",
        "            pass",
        MINED,
    ),
    Fault(
        "limit-by-the-best-own-document",
        "curation/negatives.py",
        "np.minimum.at(positive_Q",
        "np.maximum.at(positive_Q",
        MINED,
        more=(
            (
                "np.full(end - begin, np.inf, np.float32)",
                "np.full(end - begin, -np.inf, np.float32)",
            ),
        ),
    ),
    Fault(
        "too-few-candidates-where-own-documents-are-many",
        "curation/negatives.py",
        "k = rule.search + -(-lost // 16) * 16",
        "k = rule.search",
        MINED,
    ),
    Fault(
        "mined-parts-of-another-rule-are-reused",
        "curation/negatives.py",
        "sources = [dataclasses.asdict(rule), queries.about",
        "sources = [queries.about",
        "curation/test_negatives.py -k parts_and_another_rule",
    ),
    Fault(
        "units-of-another-rule-are-reused",
        "curation/units.py",
        'for key in ("teacher", "rule")},',
        'for key in ("teacher",)},',
        "curation/test_units.py -k another_rule",
    ),
    Fault(
        "shards-are-replaced-under-the-record-of-others",
        "curation/units.py",
        "(unit.folder / UNIT_FILE).unlink(missing_ok=True)",
        "pass",
        "curation/test_units.py -k between_shards",
    ),
    Fault(
        "a-group-of-which-nothing-is-left-is-listed",
        "curation/units.py",
        '        if not group["stop"]:\n            continue\n',
        "",
        "curation/test_units.py -k taken_over",
    ),
    Fault(
        "a-part-of-mined-negatives-is-of-any-queries",
        "curation/negatives.py",
        "json.dumps([*sources, begin], sort_keys=True)",
        "json.dumps([*sources], sort_keys=True)",
        "curation/test_negatives.py -k parts_and",
    ),
    Fault(
        "a-finished-folder-is-not-read-again",
        "curation/units.py",
        "                found.verify()\n",
        "",
        "curation/test_units.py -k as_commands",
    ),
    Fault(
        "a-finished-preparation-is-not-read-again",
        "preparation/beam/pipeline.py",
        "PairFolder(output).verify()",
        "PairFolder(output)",
        "preparation/test_prepare_pipeline.py -k second_start",
    ),
)
