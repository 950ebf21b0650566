"""Faults of what a score is: retrieval, bitext mining, STS, classification, pseudo-perplexity."""

from mutations.fault import Fault

FAULTS = (
    Fault(
        "query-stays-in-its-own-ranking",
        "evaluation/retrieval.py",
        "if qrels[query_id].get(query_id, 0) <= 0:",
        "if False:",
        "evaluation/test_retrieval.py -k itself",
    ),
    Fault(
        "reciprocal-rank-cut-at-nine",
        "evaluation/retrieval.py",
        "metric.value > 1 / 10.5",
        "metric.value > 1 / 9.5",
        "evaluation/test_retrieval.py -k cut_offs",
    ),
    Fault(
        "a-hundred-candidates-with-the-query-among-them",
        "evaluation/retrieval.py",
        "CANDIDATES = DEPTH + 1",
        "CANDIDATES = DEPTH",
        "evaluation/test_retrieval.py",
    ),
    Fault(
        "queries-that-found-nothing-are-left-out-of-the-mean",
        "evaluation/retrieval.py",
        "value / len(run)",
        "value / max(sum(map(bool, run.values())), 1)",
        "evaluation/test_retrieval.py -k nothing_found",
    ),
    Fault(
        "of-repeated-ids-the-first-document-stays",
        "evaluation/streamed_retrieval.py",
        "replaced = order[:-1][is_again]",
        "replaced = order[1:][is_again]",
        "evaluation/test_streamed_retrieval.py -k repeated_id_the_last",
    ),
    Fault(
        "bm25-ranks-documents-without-a-common-word",
        "evaluation/bm25.py",
        "(score_N >= kth) & (score_N > 0)",
        "score_N >= kth",
        "evaluation/test_bm25.py -k 'words or equal'",
    ),
    Fault(
        "mining-precision-not-shared-among-claimants",
        "evaluation/bitext.py",
        "is_right_B / np.maximum(np.bincount(found_B, minlength=count), 1)",
        "is_right_B / 1.0",
        "evaluation/test_evaluation_scores.py -k mining_scores",
    ),
    Fault(
        "bitext-keeps-pairs-with-one-known-side",
        "evaluation/bitext.py",
        "if not any(text in known",
        "if not all(text in known",
        "evaluation/test_evaluation_scores.py -k repeats",
    ),
    Fault(
        "sts-by-pearson",
        "evaluation/similarity.py",
        "scipy.stats.spearmanr(cosine_B, gold_B)",
        "scipy.stats.pearsonr(cosine_B, gold_B)",
        "evaluation/test_evaluation_scores.py -k correlations",
    ),
    Fault(
        "probe-learns-from-test-texts",
        "evaluation/probe.py",
        "is_train = data.splits == self.train_split",
        "is_train = data.splits != ''",
        "evaluation/test_evaluation_scores.py -k probe",
    ),
    Fault(
        "pseudo-perplexity-never-hides-the-last-offset",
        "evaluation/pseudo_perplexity.py",
        "for offset in range(PASSES)]",
        "for offset in range(PASSES - 1)]",
        "evaluation/test_pseudo_perplexity.py -k hidden_once",
    ),
    Fault(
        "hidden-files-are-data",
        "evaluation/subsets.py",
        "return [path for path in root.glob(pattern) if not is_hidden(path)]",
        "return list(root.glob(pattern))",
        "launch/test_models_in_a_bucket.py -k evaluations",
    ),
)
