"""One owner at a time, whoever dies when: on this machine and, by the lease, on others."""

import dataclasses
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_embed_jax import ownership
from moe_embed_jax.errors import UserError
from moe_embed_jax.ownership import own

# Owns argv[1] until it is killed.
HOLD = """
import sys, time
from moe_embed_jax.ownership import own
with own(sys.argv[1], inside=True):
    print("owned", flush=True)
    time.sleep(60)
"""


def owner_files(folder):
    return [path for path in folder.iterdir() if ownership.is_owner_file(path)]


@pytest.mark.parametrize("inside", [False, True])
def test_a_second_owner_is_refused_by_name_and_nothing_is_left(tmp_path, inside):
    target = tmp_path / "parent" / "target"
    with own(target, inside):
        (file,) = owner_files(target if inside else target.parent)
        assert target.exists() == inside
        message = f"{target} is in use by process {os.getpid()} on .*since .*: wait until it has"
        with pytest.raises(UserError, match=message), own(target, inside):
            pass
        assert file.exists()
        with own(target.with_name("targe"), inside), own(target.with_name("target-1"), inside):
            pass
    assert not owner_files(file.parent)
    with own(target, inside):
        pass


def test_a_file_is_no_work_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), own(tmp_path / "file", inside=True):
        pass


@pytest.mark.parametrize("reaped", [False, True])
def test_a_killed_owner_is_succeeded_at_once(tmp_path, reaped):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(UserError, match=f"process {process.pid} "), own(tmp_path, inside=True):
        pass
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    else:  # its number is still taken
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    start = time.monotonic()
    with own(tmp_path, inside=True):
        (file,) = owner_files(tmp_path)
        assert file.name == ".owner-2"
    assert time.monotonic() - start < 5
    process.wait()


def write_owner(file, **changes):
    """As if another process owned: a record like this one's, with changes."""
    record = {
        **dataclasses.asdict(ownership._Record(place=ownership._place(), host="elsewhere")),
        **dict(pid=os.getpid(), start=ownership._start_of(os.getpid()), token="t"),
    }
    file.write_text(json.dumps(record | changes))


def test_a_reused_process_number_is_no_sign_of_life(tmp_path):
    file = tmp_path / ".owner-1"
    write_owner(file)
    with pytest.raises(UserError, match="on elsewhere"), own(tmp_path, inside=True):
        pass
    write_owner(file, start="1")
    with own(tmp_path, inside=True):
        pass


@pytest.mark.parametrize("content", ["record", "", "{", '{"pid": "x"}', "[]"])
def test_elsewhere_the_lease_decides(tmp_path, content):
    """A dead owner's lease runs out; one that is renewed is alive, whatever the clocks say."""
    file = tmp_path / ".target.owner-7"
    write_owner(file, place="another machine")
    if content != "record":
        file.write_text(content)
    start = time.monotonic()
    with own(tmp_path / "target", lease=0.6):
        assert time.monotonic() - start > 0.5
        assert [path.name for path in owner_files(tmp_path)] == [".target.owner-8"]
    file.touch()
    os.utime(file, (1, 1))  # long ago: nothing to wait for
    start = time.monotonic()
    with own(tmp_path / "target", lease=30):
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("clock", [0, 3600])
def test_an_owner_elsewhere_that_renews_is_alive(tmp_path, clock):
    """Its clock may be an hour ahead."""
    file, done = tmp_path / ".owner-1", threading.Event()
    write_owner(file, place="another machine")

    def renew():
        while not done.wait(0.05):
            os.utime(file, (time.time() + clock,) * 2)

    thread = threading.Thread(target=renew)
    thread.start()
    time.sleep(0.1)
    with pytest.raises(UserError, match="in use by process"), own(tmp_path, inside=True, lease=5):
        pass
    done.set()
    thread.join()


def test_owners_renew_their_lease_and_notice_its_loss(tmp_path):
    with own(tmp_path, inside=True, lease=0.3) as owner:
        (file,) = owner_files(tmp_path)
        os.utime(file, (1, 1))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        owner.check()
        file.unlink()
        with pytest.raises(UserError, match="was taken over by another process"):
            owner.check()
        write_owner(tmp_path / ".owner-2")
    assert [path.name for path in owner_files(tmp_path)] == [".owner-2"]  # the other's


def contend(folder, count, barrier, wins):
    """Tries to own; holds it for a moment; no two may be inside."""
    barrier.wait()
    for _ in range(count):
        try:
            with own(folder, inside=True):
                descriptor = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)
                time.sleep(0.001)
                os.unlink(folder / "inside")
                os.close(descriptor)
        except UserError:
            continue
        with wins.get_lock():
            wins.value += 1


def test_races_for_a_dead_owners_folder_have_one_winner(tmp_path):
    write_owner(tmp_path / ".owner-1", pid=2**22 + 1)  # no such process
    context = multiprocessing.get_context("spawn")
    barrier, wins = context.Barrier(3), context.Value("i", 0)
    arguments = (tmp_path, 100, barrier, wins)
    processes = [context.Process(target=contend, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, "two owners at once"
    assert wins.value >= 3
    assert not owner_files(tmp_path)


def test_a_full_disk_leaves_no_owner(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), own(tmp_path, inside=True):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_who_waits_long_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "LONGEST_PAUSE", 0.05)
    said = io.StringIO()  # capsys forgets what another thread says while it is read
    monkeypatch.setattr(sys, "stderr", said)

    def wait():
        with own(tmp_path / "target", wait=True):
            turns.append("waited")

    turns = []
    thread = threading.Thread(target=wait)
    with own(tmp_path / "target"):
        thread.start()
        while not said.getvalue():
            time.sleep(0.01)
        time.sleep(0.3)  # it looks some more times
        turns.append("first")
    thread.join(60)
    assert turns == ["first", "waited"]
    (line,) = said.getvalue().splitlines()
    assert line.startswith(f"waiting: {tmp_path}/target is in use by process {os.getpid()} on ")
