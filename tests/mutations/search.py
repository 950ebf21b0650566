"""Faults of exact and of compressed nearest-neighbour search."""

from mutations.fault import Fault

FAULTS = (
    Fault(
        "equal-scores-go-to-the-later-load",
        "search/knn.py",
        "merge([best, found], k)",
        "merge([found, best], k)",
        "search/test_knn.py -k 'whatever_the_order and equal and other'",
    ),
    Fault(
        "padding-of-a-block-is-a-document",
        "search/selection.py",
        "jnp.where(at < valid, score, -jnp.inf)",
        "jnp.where(at <= valid, score, -jnp.inf)",
        "search/test_knn.py -k negative_scores",
    ),
    Fault(
        "overflow-ranks-with-padding",
        "search/selection.py",
        "score = jnp.maximum(score, jnp.finfo(jnp.float32).min)  # an overflow ranks above padding",
        "pass",
        "search/test_knn.py -k overflowing",
    ),
    Fault(
        "negative-zero-ranks-below-zero",
        "search/selection.py",
        "score = jnp.where(score == 0, 0.0, score)  # top-k ranks -0 below 0",
        "pass",
        "search/test_knn.py -k negative_zero",
    ),
    Fault(
        "groups-of-a-block-are-not-in-document-order",
        "search/cpu.py",
        "group_Bg = jnp.sort(_top_k(peak_BG, k)[1], axis=1)",
        "group_Bg = _top_k(peak_BG, k)[1]",
        "search/test_knn.py -k 'whatever_the_order and CPUs'",
    ),
    Fault(
        "devices-results-merged-in-reverse",
        "search/cpu.py",
        "order_Bm = jnp.argsort(found[1], axis=1)",
        "order_Bm = jnp.argsort(-found[1], axis=1)",
        "search/test_knn.py -k eight_devices",
    ),
    Fault(
        "int8-has-one-scale-for-all-features",
        "search/compressed.py",
        "np.maximum(largest_D, np.abs(x_nD).max(axis=0), out=largest_D)",
        "np.maximum(largest_D, np.abs(x_nD).max(), out=largest_D)",
        "search/test_compressed.py -k half_a_scale",
    ),
    Fault(
        "bit-of-the-threshold-itself-is-set",
        "search/compressed.py",
        "np.packbits(x_nD > threshold_D, axis=1)",
        "np.packbits(x_nD >= threshold_D, axis=1)",
        "search/test_compressed.py -k bits_are_signs",
    ),
    Fault(
        "rescoring-gives-ties-to-the-higher-index",
        "search/compressed.py",
        "index_Bm = np.sort(index_Bm, axis=1)",
        "index_Bm = -np.sort(-index_Bm, axis=1)",
        "search/test_compressed.py -k rescoring",
    ),
    Fault(
        "rescoring-without-the-scale",
        "search/compressed.py",
        "        query_BD = query_BD * self.scale_D\n        return np.einsum",
        "        return np.einsum",
        "search/test_compressed.py -k int8_search",
    ),
    Fault(
        "vectors-without-checksums",
        "search/vectors.py",
        '_CHECKED = [*_CODECS, {"name": "crc32c"}]',
        "_CHECKED = _CODECS",
        "test_damage.py -k vectors",
    ),
    Fault(
        "chunks-that-are-there-are-embedded-again",
        "search/vectors.py",
        "own_C & ~there_C,",
        "own_C,",
        "search/test_vectors.py -k taken_over",
    ),
    Fault(
        "a-store-is-finished-with-a-chunk-missing",
        "search/vectors.py",
        "    if not there_C.all():\n        missing",
        "    if False:\n        missing",
        "search/test_vectors.py -k taken_over",
    ),
    Fault(
        "a-lost-connection-is-damage",
        "search/vectors.py",
        "    except (IsADirectoryError, ValueError, RecursionError) as error:",
        "    except (OSError, ValueError, RecursionError) as error:",
        "search/test_vectors.py -k lost_connection",
    ),
)
