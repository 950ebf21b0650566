"""Preparation jobs in processes of their own."""

import os
import signal
import time

import pytest

from moe_embed_jax.errors import UserError
from moe_embed_jax.preparation.builders.parallel import run_in_processes


def _report_for_ever(report):
    while True:
        report("wait", 1, 2)
        time.sleep(0.01)


def _fail(report, how: str):
    if how == "error":
        raise UserError("this job failed")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "message"),
    [("error", "this job failed"), ("kill", "prepares fail was killed .out of memory")],
)
def test_a_failed_job_ends_the_others(monkeypatch, how, message):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    jobs = {"wait": (_report_for_ever, ()), "fail": (_fail, (how,))}
    with pytest.raises(UserError, match=message):
        run_in_processes(_run_job, jobs, progress=False)


def _run_job(report, function, arguments):
    function(report, *arguments)
