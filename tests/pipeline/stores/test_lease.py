from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest

from raymerge.pipeline.errors import HeldError, OutputError
from raymerge.pipeline.stores import lease
from raymerge.pipeline.stores.lease import Holder, hold_lease
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.one_object import URL, Objects


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.02)


def held(objects: Objects) -> Holder:
    assert objects.content is not None
    return Holder(**json.loads(objects.content[0]))


def put(objects: Objects, holder: Holder, *, age: float = 0) -> None:
    objects.content = (holder.encode(), f"put {age}", objects.now - age)


def wait_until(condition: object) -> None:
    assert callable(condition)
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def elsewhere() -> Holder:
    return Holder(12, "elsewhere", "boot", "2026-01-02 03:04:05+00:00", "their token")


def of_this_machine(pid: int) -> Holder:
    return Holder(pid, os.uname().nodename, lease._boot_id(), "2026-01-02 03:04:05+00:00", "their token")


def dead_pid() -> int:
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE).stdout)


def test_it_says_who_holds_it_and_is_gone_afterwards(objects: Objects) -> None:
    with hold_lease(objects, URL, FaultLog()) as lock:
        lock.check()
        holder = held(objects)
        assert (holder.pid, holder.host) == (os.getpid(), os.uname().nodename)
        assert not holder.is_dead()
        with pytest.raises(
            OutputError,
            match=rf"another raymerge run \(pid {os.getpid()}, since .*, on host .*\) is writing to store://bucket/out;"
            r".*if it was killed, try again in 30 s",
        ):
            hold_lease(objects, URL, FaultLog()).__enter__()
    assert objects.content is None


@pytest.mark.parametrize(("age", "seconds"), [(0, 30), (29, 1), (-5, 35)])
def test_one_of_another_machine_is_taken_only_when_it_has_expired(objects: Objects, age: float, seconds: int) -> None:
    put(objects, elsewhere(), age=age)
    with pytest.raises(OutputError, match=rf"pid 12, since 2026-01-02.*on host elsewhere.*try again in {seconds} s"):
        hold_lease(objects, URL, FaultLog()).__enter__()
    assert held(objects) == elsewhere()
    objects.now += 31 - age
    with hold_lease(objects, URL, FaultLog()) as lock:
        lock.check()
        assert held(objects).pid == os.getpid()
    assert objects.content is None


def test_one_of_a_dead_process_of_this_machine_is_taken_at_once(objects: Objects) -> None:
    put(objects, of_this_machine(dead_pid()))
    with hold_lease(objects, URL, FaultLog()):
        assert held(objects).pid == os.getpid()


def test_one_of_a_living_process_is_not(objects: Objects) -> None:
    put(objects, of_this_machine(os.getppid()))
    with pytest.raises(OutputError, match=f"pid {os.getppid()}"):
        hold_lease(objects, URL, FaultLog()).__enter__()


@pytest.mark.parametrize("boot", ["", "another boot"])
def test_a_pid_says_nothing_where_it_cannot_be_looked_up(objects: Objects, boot: str) -> None:
    put(objects, replace(of_this_machine(dead_pid()), boot=boot))
    with pytest.raises(OutputError):
        hold_lease(objects, URL, FaultLog()).__enter__()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'"', b'{"pid": "x"}', b"\xff"])
def test_a_damaged_one_expires_too(objects: Objects, content: bytes) -> None:
    objects.content = (content, "etag", objects.now)
    with pytest.raises(OutputError, match=r"another raymerge run \(just started\)"):
        hold_lease(objects, URL, FaultLog()).__enter__()
    objects.now += 31
    with hold_lease(objects, URL, FaultLog()):
        pass


def test_one_of_many_takes_an_expired_one(objects: Objects) -> None:
    put(objects, elsewhere(), age=100)
    start, num_taken, taken = threading.Barrier(8), [0], threading.Event()

    def take() -> None:
        start.wait()
        try:
            with hold_lease(objects, URL, FaultLog()):
                num_taken[0] += 1
                taken.wait(60)
        except OutputError:
            pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: sum(thread.is_alive() for thread in threads) == 1)
    taken.set()
    for thread in threads:
        thread.join()
    assert num_taken == [1]


@pytest.mark.usefixtures("_quick")
def test_it_is_renewed_as_long_as_it_is_held(objects: Objects) -> None:
    with hold_lease(objects, URL, FaultLog()) as lock:
        token = held(objects).token
        wait_until(lambda: held(objects).renewals >= 5)
        assert held(objects).token == token
        lock.check()
    assert objects.content is None
    num_writes = objects.num_writes
    time.sleep(0.1)
    assert objects.num_writes == num_writes


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("num_lost", [1, 3])
def test_a_write_whose_answer_is_lost_is_ours_all_the_same(objects: Objects, num_lost: int) -> None:
    objects.num_lost = num_lost
    with hold_lease(objects, URL, FaultLog()) as lock:
        wait_until(lambda: held(objects).renewals >= 5)
        lock.check()
    assert objects.num_lost == 0
    assert objects.content is None


@pytest.mark.usefixtures("_quick")
def test_it_is_lost_when_another_run_has_taken_it(objects: Objects) -> None:
    with hold_lease(objects, URL, FaultLog()) as lock:
        put(objects, elsewhere())
        wait_until(lambda: not any(thread.name == "renew lock" for thread in threading.enumerate()))
        with pytest.raises(OutputError, match=r"another raymerge run \(pid 12, since 2026-01-02.* has taken the lock"):
            lock.check()
    assert held(objects) == elsewhere()


@pytest.mark.parametrize("is_first", [True, False])
def test_without_conditions_the_last_of_two_that_begin_at_once_has_it(
    objects: Objects, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    objects.is_weak = True
    monkeypatch.setattr("time.sleep", lambda _: put(objects, elsewhere()) if is_first else None)
    faults = FaultLog()
    if is_first:
        with pytest.raises(HeldError, match=r"pid 12, since 2026-01-02"):
            hold_lease(objects, URL, faults).__enter__()
        assert held(objects) == elsewhere()
    else:
        with hold_lease(objects, URL, faults) as lock:
            lock.check()
    (limit,) = faults.limits
    assert limit.startswith("store://bucket/out: this store has no conditional writes")
    assert not faults.drain()


@pytest.mark.usefixtures("_quick")
def test_it_is_lost_when_it_was_deleted(objects: Objects) -> None:
    with hold_lease(objects, URL, FaultLog()) as lock:
        objects.content = None
        wait_until(lambda: not any(thread.name == "renew lock" for thread in threading.enumerate()))
        with pytest.raises(OutputError, match="the lock of this run is gone: the output, or the bucket"):
            lock.check()


def test_it_is_not_trusted_when_it_could_not_be_renewed_for_long(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.02)
    now, seconds = lease._now, 0.0
    monkeypatch.setattr(lease, "_now", lambda: now() + seconds)
    with hold_lease(objects, URL, FaultLog()) as lock:
        objects.is_down = True
        lock.check()
        seconds = 29.0
        with pytest.raises(OutputError, match=r"could not be renewed for \d+ s, and may be taken"):
            lock.check()
        objects.is_down = False
        before = held(objects).renewals
        wait_until(lambda: held(objects).renewals > before)
        lock.check()  # nobody has taken it meanwhile
        objects.is_down = True
    assert objects.content is not None  # it cannot be deleted, and ends by itself


@pytest.mark.skipif(not lease._boot_id(), reason="tells boots apart by /proc")
def test_it_does_not_keep_a_process_alive() -> None:
    program = """
        from tests.pipeline.stores.one_object import Objects, URL
        from raymerge.pipeline.stores.lease import hold_lease
        from raymerge.pipeline.stores.retry import FaultLog
        context = hold_lease(Objects(), URL, FaultLog())
        context.__enter__()
        print("held")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=30, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"held\n")
