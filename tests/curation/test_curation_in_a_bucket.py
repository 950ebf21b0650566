"""Filtering in parts, then mining, where pairs, work folders and results are in a bucket."""

import pytest
from helpers.commands import files_of, launch
from helpers.stand_in_teacher import StandInTeacher, pair

from moe_embed_jax.curation import teacher as teacher_module
from moe_embed_jax.preparation.pair_writer import PairWriter

FILES = ("array_record", "npy", "features.json")  # the others name folders


@pytest.fixture
def curate(monkeypatch):
    """curate(root) -> the files of what root/pairs becomes."""
    monkeypatch.setattr(teacher_module.Embedder, "load", lambda name, **_: StandInTeacher())

    def run(root) -> dict[str, bytes]:
        with PairWriter(root / "pairs", {}, rows_per_shard=8) as writer:
            for i in range(30):
                writer.write(pair(i, language="en" if i < 20 else "de", wrong=i % 7 == 0))
        both = [f"--teacher={root}"]
        flags = [*both, f"--pairs={root}/pairs", f"--output={root}/kept", "--chunk=10"]
        for more in ("--part=1/2", "--part=0/2", "--finish"):
            assert launch(monkeypatch, "filter", *flags, more) == 0
        flags = [*both, f"--pairs={root}/kept", f"--output={root}/mined", "--count=2"]
        assert launch(monkeypatch, "mine", *flags) == 0
        found = {f"{n}/{k}": v for n in ("kept", "mined") for k, v in files_of(root / n).items()}
        return {name: content for name, content in found.items() if name.endswith(FILES)}

    return run


def test_filtered_and_mined_pairs(curate, bucket, tmp_path):
    in_bucket = curate(bucket)
    assert len(in_bucket) > 6 and in_bucket == curate(tmp_path)
    names = {path.name for path in bucket.iterdir()}
    assert names >= {"pairs", "kept", "kept.work", "mined"} and not any("owner" in n for n in names)
