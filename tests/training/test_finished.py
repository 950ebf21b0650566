import sys

import pytest

from moe_embed_jax import storage
from moe_embed_jax.training import finished


@pytest.mark.parametrize("place", ["tmp_path", "bucket"])
def test_a_run_is_finished_when_its_report_is_there(place, request, monkeypatch, capsys):
    workdir = request.getfixturevalue(place)
    monkeypatch.setattr(sys, "argv", ["finished", str(workdir)])
    assert finished.main() == 1
    assert capsys.readouterr().err == f"{workdir}: the run is not finished\n"
    storage.write(workdir / finished.RESULTS_FILE, "{}")
    assert finished.main() == 0
