# /// script
# requires-python = ">=3.7"
# dependencies = ["pytest"]
# ///
"""Tests of taskserver.py: python -m pytest

The sections are those of the program. Within them the cheap tests come first: plain objects, then an application
without sockets, then real sockets and real processes. Tests assert on what a client sees. Nothing sleeps in the hope
that something happens meanwhile: tasks wait for events that a test owns, and every wait has a deadline.
"""

from __future__ import annotations

import ast
import base64
import calendar
import concurrent.futures
import contextlib
import gc
import hashlib
import http.client
import importlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import pathlib
import queue
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import tracemalloc
import uuid
import warnings
from typing import Any, NamedTuple

import pytest

import taskserver
from taskserver import Application, Fields, HTTPError, Record, Request, Response, Router, WorkerPool

PROGRAM = pathlib.Path(taskserver.__file__).resolve()
README = PROGRAM.with_name("README.md")
LONG = 30.0  # seconds: a deadline that passes only where something hangs
MIB = 1 << 20

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


# -- What the tests share --------------------------------------------------------------------------


def eventually(condition, seconds=LONG):
    """Return whether a condition that no event announces becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """No test leaves a thread or a process behind, but for the writers of journals: they have no end."""
    monkeypatch.setattr(WorkerPool, "IDLE_SECONDS", 0.03)
    before = set(threading.enumerate())

    def left():
        threads = [thread for thread in threading.enumerate() if thread not in before and thread.name != "journal"]
        return threads + multiprocessing.active_children()

    yield
    assert eventually(lambda: not left(), 10), left()


def readme(language="en"):
    """Return the part of README.md in one language."""
    if not README.exists():
        pytest.skip("README.md is not here")
    parts = re.split(r"(?m)^#+ По-русски", README.read_text(encoding="utf-8"))
    if language == "ru":
        assert len(parts) == 2, "README.md has no part in Russian"
    return parts[language == "ru"]


def brief(value):
    """Return the name of a parameter, for the names of tests."""
    return ascii(value)[:40]


def in_threads(n, function):
    """Call function(0) ... function(n - 1) at once; fail if one of them does or does not return."""
    futures = [concurrent.futures.Future() for _ in range(n)]

    def call(i):
        try:
            futures[i].set_result(function(i))
        except BaseException as error:
            futures[i].set_exception(error)

    for i in range(n):
        threading.Thread(target=call, args=(i,), daemon=True).start()
    for future in futures:
        future.result(LONG)


class Gate:
    """A task that says when it has begun, and goes on when the test lets it."""

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self, payload, report=lambda *_: None):
        report(0.25, "at the gate")
        self.begun.release()
        assert self.opened.wait(LONG)
        return payload.get("result")

    def wait_for(self, n=1):
        """Wait until so many tasks more have begun."""
        for _ in range(n):
            assert self.begun.acquire(timeout=LONG)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def application(gate):
    """An application with a task type that waits at the gate and one that returns its payload's "result"."""
    application = Application()
    application.task("gate")(gate)
    application.task("echo")(echo)
    taskserver.add_monitoring(application)
    taskserver.add_pages(application)
    return application


def echo(payload, report):
    """Return what was sent."""
    return payload.get("result")


def fail(payload, report):
    raise ValueError("what it said")


class Answer(NamedTuple):
    status: int
    headers: Any  # a mapping
    body: bytes

    @property
    def json(self):
        return json.loads(self.body.decode())


def request(method, target, body=b"", host="localhost", **headers):
    path, _, query = target.partition("?")
    fields = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    if method == "POST" and "content_type" not in headers:
        fields["content-type"] = "application/json"
    if method == "POST":
        fields["content-length"] = str(len(body))
    return Request(method, path, query, host, Fields(fields, len(body)), body)


def ask(application, method, target, body=b"", **more):
    """Return an application's answer to a request, without sockets."""
    response = application.handle(request(method, target, body, **more))
    return Answer(response.status, dict(response.headers), response.body)


def create(application, type, name="sample", **payload):
    answer = ask(application, "POST", f"/create-{type}", {"name": name, **payload})
    assert answer.status == 201, answer
    return answer.json


def poll(application, record, wait=0.0):
    query = f"?wait={wait}" if wait else ""
    answer = ask(application, "GET", f"/poll-{record['type']}/{record['id']}{query}")
    assert answer.status == 200, answer
    return answer.json


def final(application, record):
    """Return a task's record once it is final."""
    record = poll(application, record, LONG)
    assert record["status"] != "pending", record
    return record


def outcome(application, function, **payload):
    """Return the final record of one call of a function."""
    name = f"once-{len(application.types)}"
    application.task(name)(function)
    return final(application, create(application, name, **payload))


def consistent(record):
    """Check that no record is half changed."""
    assert list(record) == KEYS
    done = record["status"] != "pending"
    assert (record["finished_at"] is not None) == done
    assert (record["error"] is not None) == (record["status"] == "failed")
    if record["status"] == "completed":
        assert record["progress"] == 1.0
    if not done:
        assert record["result"] is None
    moments = [record[key] for key in ("created_at", "started_at", "finished_at") if record[key]]
    assert moments == sorted(moments)


KEYS = ["id", "name", "status", "type", "created_at", "started_at", "finished_at", "progress", "message", "result", "error"]


# -- 1. Lock ---------------------------------------------------------------------------------------


def test_writers_exclude_each_other_and_all_readers():
    lock, pair = taskserver.ReadersWriterLock(), [0, 0]

    def write(_):
        for _ in range(300):
            with lock.write:
                before = pair[0]
                time.sleep(0)  # gives the interpreter away
                pair[:] = before + 1, before + 1

    def read(_):
        for _ in range(300):
            with lock.read:
                first = pair[0]
                time.sleep(0)
                assert pair == [first, first]

    in_threads(8, lambda i: (read if i % 2 else write)(i))
    assert pair == [1200, 1200]


def test_readers_hold_the_lock_at_the_same_time():
    lock, together = taskserver.ReadersWriterLock(), threading.Barrier(5)

    def read(_):
        with lock.read:
            together.wait(LONG)

    in_threads(5, read)


def test_a_waiting_writer_goes_before_a_reader_that_comes_later():
    lock, order = taskserver.ReadersWriterLock(), []
    probes = []

    def write():
        with lock.write:
            order.append("writer")

    def read(entered):
        with lock.read:
            order.append("reader")
            entered.set()

    def probe():
        """Return whether a reader has to wait now."""
        entered = threading.Event()
        probes.append(threading.Thread(target=read, args=(entered,), daemon=True))
        probes[-1].start()
        return not entered.wait(0.2)

    writer = threading.Thread(target=write, daemon=True)
    with lock.read:
        writer.start()
        assert eventually(probe, 5), "readers go on entering while a writer waits"
        assert "writer" not in order
        del order[:]
    for thread in [writer, *probes]:
        thread.join(LONG)
    assert order == ["writer", "reader"]


def test_a_writer_enters_when_the_last_reader_has_left():
    lock, entered = taskserver.ReadersWriterLock(), threading.Event()

    def write():
        with lock.write:
            entered.set()

    writer = threading.Thread(target=write, daemon=True)
    with lock.read:
        second = threading.Thread(target=lambda: lock.read.__enter__(), daemon=True)  # a reader that stays
        second.start()
        second.join(LONG)
        writer.start()
        assert not entered.wait(0.05)
    assert not entered.wait(0.05)
    lock.read.__exit__(None, None, None)
    assert entered.wait(LONG)
    writer.join(LONG)


def test_all_readers_that_wait_for_a_writer_enter_together():
    lock, together = taskserver.ReadersWriterLock(), threading.Barrier(5)

    def read():
        with lock.read:
            together.wait(LONG)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    with lock.write:
        for reader in readers:
            reader.start()
    together.wait(LONG)
    for reader in readers:
        reader.join(LONG)


def test_an_exception_gives_the_lock_back():
    lock = taskserver.ReadersWriterLock()
    for side in lock.read, lock.write, lock.read, lock.write:
        with pytest.raises(ZeroDivisionError), side:
            1 / 0  # noqa: B018


# -- 2. Records and store --------------------------------------------------------------------------

RECORD = Record("0" * 8, "sample", "pending", "echo", 1700000000.5, payload=b'{"name": "sample"}')


def document(record, with_result=True):
    return json.loads(taskserver.encode_record(record, with_result).decode())


def test_a_record_has_all_keys_in_the_agreed_order():
    assert list(document(RECORD)) == KEYS
    completed = RECORD._replace(status="completed", finished_at=1700000001.0, progress=1.0, result=b'{"a": [1]}')
    assert list(document(completed)) == KEYS
    assert document(completed)["result"] == {"a": [1]}
    assert list(document(completed, with_result=False)) == [key for key in KEYS if key != "result"]


@pytest.mark.parametrize("seconds, text", [
    (0, "1970-01-01T00:00:00.000Z"),
    (1700000000.5, "2023-11-14T22:13:20.500Z"),
    (1700000000.9999, "2023-11-14T22:13:20.999Z"),
    (1709164800.001, "2024-02-29T00:00:00.001Z"),
    (4102444799.25, "2099-12-31T23:59:59.250Z"),
    (None, None),
])  # fmt: skip
def test_timestamps_are_rfc_3339_with_milliseconds(seconds, text):
    assert document(RECORD._replace(created_at=seconds, finished_at=seconds))["created_at"] == text


@pytest.mark.parametrize("text", ["", "ü€😀", '"\\', "\0\n\x1b\x7f", "\ud800", "</script>", "{}"])
def test_any_text_survives_in_a_record(text):
    got = document(RECORD._replace(name=text, message=text, error=text))
    assert [got["name"], got["message"], got["error"]] == [text] * 3


def test_progress_joins_the_record_when_it_is_read():
    progress = taskserver.Progress()
    running = RECORD._replace(live=progress)
    assert (document(running)["progress"], document(running)["message"]) == (None, None)
    progress.report(0.5, "half way")
    assert (document(running)["progress"], document(running)["message"]) == (0.5, "half way")
    progress.report(1)
    assert (document(running)["progress"], document(running)["message"]) == (1.0, "half way")


@pytest.mark.parametrize("size", [499, 500, 501, 100_000])
def test_a_message_is_cut_to_500_characters(size):
    progress = taskserver.Progress()
    progress.report(0, "é" * size)
    assert document(RECORD._replace(live=progress))["message"] == "é" * min(size, 500)


@pytest.mark.parametrize("fraction, message", [
    (-0.001, None), (1.001, None), (math.nan, None), (math.inf, None), ("0.5", None), (None, None), ([], None),
    (1j, None), (0.5, 5), (0.5, b"text"),
])  # fmt: skip
def test_a_report_of_anything_else_is_a_value_error(fraction, message):
    progress = taskserver.Progress()
    progress.report(0.5, "before")
    with pytest.raises(ValueError, match="report"):
        progress.report(fraction, message)
    assert document(RECORD._replace(live=progress))["message"] == "before"


@pytest.mark.parametrize("value", [
    None, True, 0, -1.5, "", "ü\0\ud800😀", [], {}, {"a": [1, {"b": None}]}, [[]] * 3, 10**300, {1: "a key of text"},
])  # fmt: skip
def test_results_of_json_are_kept(value):
    assert json.loads(taskserver.encode_result(value).decode()) == json.loads(json.dumps(value))


def cycle():
    loop = []
    loop.append(loop)
    return loop


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("make", [
    lambda: math.nan, lambda: [math.inf], lambda: {"a": -math.inf}, object, cycle, lambda: {1, 2}, lambda: b"bytes",
    lambda: {(1, 2): 3}, lambda: deep(100_000), lambda: 1j,
])  # fmt: skip
def test_a_result_that_json_cannot_hold_is_a_value_error_that_says_so(make):
    with pytest.raises(ValueError, match="the result cannot be written as JSON"):
        taskserver.encode_result(make())


def test_a_result_has_at_most_1_mib():
    assert len(taskserver.encode_result("x" * (MIB - 2))) == MIB
    with pytest.raises(ValueError, match="1048577 bytes .* at most 1048576"):
        taskserver.encode_result("x" * (MIB - 1))


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Nameless(type):
    __name__ = property(lambda cls: 1 / 0)


class Unspeakable(Exception, metaclass=Nameless):
    """Breaks whatever looks at it."""


@pytest.mark.parametrize("exception, text", [
    (ValueError("what it said"), "ValueError: what it said"),
    (KeyError("key"), "KeyError: 'key'"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (SystemExit(3), "SystemExit: 3"),
    (type("", (Exception,), {})(), "Exception"),
    (OSError("no file caf\udce9"), r"OSError: no file caf\udce9"),  # and not what no disk and no terminal can take
    (taskserver.TaskError("timed out"), "timed out"),
])  # fmt: skip
def test_an_exception_is_described_by_its_type_and_what_it_said(exception, text):
    assert taskserver.describe(exception) == text


def test_any_exception_can_be_described_briefly():
    assert taskserver.describe(Speechless()).startswith("Speechless")
    assert len(taskserver.describe(ValueError("x" * MIB))) == taskserver.MAX_ERROR


def test_what_the_log_says_of_an_exception_ends_with_what_it_said():
    assert taskserver.traceback_of(ValueError("what it said")).endswith("ValueError: what it said")
    assert taskserver.traceback_of(taskserver.TaskError("late", "from elsewhere")) == "from elsewhere"


def lines_journal():
    """Return the journal that README.md shows as the pattern for others."""
    found = re.search(r"(?ms)^class LinesJournal.*?(?=^\S(?<!c))", readme())
    return found.group() if found else pytest.skip("README.md shows no journal")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture(params=["memory", "sqlite", "lines"])
def store(request, tmp_path):
    """Every store, for the tests of what they have in common."""
    if request.param == "memory":
        yield taskserver.Store()
    elif request.param == "sqlite":
        pytest.importorskip("sqlite3")
        yield taskserver.Store(journal=taskserver.SQLiteJournal(str(tmp_path / "tasks.db")))
    else:
        names = {"os": os, "json": json, "threading": threading, "taskserver": taskserver}
        exec(lines_journal(), names)  # noqa: S102
        journal = names["LinesJournal"](str(tmp_path / "tasks.lines"))
        yield taskserver.Store(journal=journal)
        for value in vars(journal).values():
            getattr(value, "close", int)()


def put(store, n=1, status="pending", **changes):
    """Add so many records; return their ids."""
    ids = [str(uuid.uuid4()) for _ in range(n)]
    for id in ids:
        store.add(RECORD._replace(id=id))
        if status != "pending":
            finish(store, id, status=status, **changes)
    return ids


def finish(store, id, status="completed", **changes):
    store.finish(store.get(id)._replace(status=status, finished_at=1700000009.0, payload=None, **changes))


def test_a_store_gives_what_was_put_in(store):
    (id,) = put(store)
    assert store.get(id) == RECORD._replace(id=id)
    finish(store, id, result=b"[1]")
    assert (store.get(id).status, store.get(id).result) == ("completed", b"[1]")
    for method in store.get, lambda id: store.wait(id, 0):
        with pytest.raises(KeyError):
            method("unknown")


@pytest.mark.parametrize("limit", [0, 1, 4, 5, 6])
def test_newest_gives_the_newest_first_in_the_order_of_creation(store, limit):
    ids = put(store, 5)
    finish(store, ids[1])  # a change moves nothing
    assert [record.id for record in store.newest(limit)] == ids[::-1][:limit]


def test_final_records_are_counted_by_status_until_they_are_evicted(store):
    assert store.counts() == {"completed": 0, "failed": 0}
    put(store, 3), put(store, 2, "completed"), put(store, 1, "failed")
    assert store.counts() == {"completed": 2, "failed": 1}
    store.keep = 0
    store.evict()
    assert store.counts() == {"completed": 0, "failed": 0}
    assert len(store.newest(9)) == 3


def test_a_full_store_refuses_and_keeps_what_it_has(store):
    store.max_tasks = 3
    ids = put(store, 2) + put(store, 1, "completed")
    with pytest.raises(taskserver.Unavailable) as caught:
        put(store)
    assert 0 < caught.value.args[1] <= store.keep
    assert [record.id for record in store.newest(9)] == ids[::-1]


def test_a_full_store_makes_room_by_what_has_outlived_its_time(store):
    store.max_tasks = 3
    kept = put(store, 2)
    (gone,) = put(store, 1, "failed")
    store.keep = 0
    kept += put(store, 1)
    assert [record.id for record in store.newest(9)] == kept[::-1]
    with pytest.raises(KeyError):
        store.get(gone)
    with pytest.raises(taskserver.Unavailable):
        put(store)


def test_threads_that_add_at_once_never_overfill_a_store(store):
    store.max_tasks, added = 50, []

    def add(_):
        for _ in range(20):
            with contextlib.suppress(taskserver.Unavailable):
                added.extend(put(store))

    in_threads(8, add)
    assert len(added) == 50
    assert {record.id for record in store.newest(999)} == set(added)


def test_eviction_drops_any_number_at_once_but_nothing_pending(store):
    pending = put(store, 2)
    for id in put(store, 30 if store.journal else 2500):
        finish(store, id)
    store.evict()
    assert len(store.newest(9999)) > 2
    store.keep = 0
    store.evict()
    assert [record.id for record in store.newest(9999)] == pending[::-1]


@contextlib.contextmanager
def waiters(store, ids):
    """Have a thread wait for the end of each record; afterwards all must return soon."""
    futures = [concurrent.futures.Future() for _ in ids]
    for future, id in zip(futures, ids):
        threading.Thread(target=lambda f=future, id=id: f.set_result(store.wait(id, LONG)), daemon=True).start()
    assert not concurrent.futures.wait(futures, 0.1).done  # they do wait
    yield futures
    done = concurrent.futures.wait(futures, LONG / 3).done
    assert len(done) == len(futures)


def test_who_waits_is_woken_when_the_record_is_final(store):
    first, second = put(store, 2)
    with waiters(store, [first, first, first]) as woken:
        finish(store, second)
        store.save(store.get(first)._replace(started_at=1700000005.0))
        assert not concurrent.futures.wait(woken, 0.05).done  # neither of these is what they wait for
        finish(store, first)
    assert [future.result().status for future in woken] == ["completed"] * 3
    begun = time.monotonic()
    assert store.wait(first, LONG).status == "completed"
    assert time.monotonic() - begun < LONG / 3


def test_who_waits_in_vain_gets_the_record_as_it_is(store):
    (id,) = put(store)
    begun = time.monotonic()
    assert store.wait(id, 0.05).status == "pending"
    assert 0.04 < time.monotonic() - begun < LONG / 2


def test_nobody_waits_in_a_store_that_has_stopped(store):
    ids = put(store, 2)
    with waiters(store, ids) as woken:
        store.stop()
    assert [future.result().status for future in woken] == ["pending"] * 2
    begun = time.monotonic()
    assert store.wait(ids[0], LONG).status == "pending"
    assert time.monotonic() - begun < LONG / 3


def test_a_final_record_stays_for_as_long_as_it_is_kept_and_no_longer():
    clock = Clock()
    store = taskserver.Store(keep=10, clock=clock)
    put(store, 1, "completed")
    clock.now += 4
    (second,) = put(store, 1, "failed")
    clock.now += 5.999
    store.evict()
    assert len(store.newest(9)) == 2
    clock.now += 0.001
    store.evict()
    assert [record.id for record in store.newest(9)] == [second]
    clock.now += 4
    store.evict()
    assert store.newest(9) == []


def test_a_full_store_says_when_the_oldest_final_record_goes():
    clock = Clock()
    store = taskserver.Store(keep=10, max_tasks=2, clock=clock)
    put(store, 1, "completed")
    clock.now += 4
    put(store, 1, "completed")
    clock.now += 2.5
    with pytest.raises(taskserver.Unavailable) as caught:
        put(store)
    assert caught.value.args[1] == 3.5


# -- 3. Workers ------------------------------------------------------------------------------------


def submit(pool, *items):
    for item in items:
        pool.reserve()
        pool.submit(item)
    pool.send_worker()


def test_every_item_is_worked_at_once_and_only_once():
    done, all_done = [], threading.Event()

    def work(item):
        done.append(item)
        if len(done) == 2000:
            all_done.set()

    pool = WorkerPool("test", work, max_workers=50)
    in_threads(4, lambda i: submit(pool, *range(i * 500, i * 500 + 500)))
    assert all_done.wait(LONG)
    assert sorted(done) == list(range(2000))
    pool.join(LONG)
    assert pool.counts() == (0, 0)


def test_each_item_that_blocks_has_a_worker_of_its_own():
    pool = WorkerPool("test", lambda together: together.wait(LONG))
    for n in 20, 3, 30, 8:  # into a pool without workers, and into one whose workers are idle
        together = threading.Barrier(n + 1)
        submit(pool, *[together] * n)
        together.wait(LONG)
        pool.join(LONG)


def test_there_are_no_more_workers_than_agreed():
    gate, order = Gate(), queue.Queue()

    def work(item):
        order.put(item)
        gate({})

    pool = WorkerPool("test", work, max_workers=2)
    submit(pool, *range(6))
    gate.wait_for(2)
    assert pool.counts() == (4, 2)
    assert not gate.begun.acquire(timeout=0.05)
    gate.opened.set()
    pool.join(LONG)
    assert eventually(lambda: order.qsize() == 6)


def test_one_worker_takes_items_in_their_order():
    order = queue.Queue()
    pool = WorkerPool("test", order.put, max_workers=1)
    submit(pool, *range(100))
    assert [order.get(timeout=LONG) for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("max_workers, max_waiting", [(1, 0), (2, 1), (3, 5)])
def test_a_full_pool_refuses_one_item_too_many_and_takes_one_when_there_is_room(gate, max_workers, max_waiting):
    pool = WorkerPool("test", lambda item: gate({}), max_workers, max_waiting)
    submit(pool, *range(max_workers + max_waiting))
    gate.wait_for(max_workers)
    with pytest.raises(taskserver.Unavailable):
        pool.reserve()
    assert pool.counts() == (max_waiting, max_workers)
    pool.reserve(bounded=False)
    pool.release()
    with pytest.raises(taskserver.Unavailable):
        pool.reserve()
    gate.opened.set()
    assert eventually(lambda: pool.counts() == (0, 0))
    pool.reserve()
    pool.release()


def test_a_reserved_place_counts_until_it_is_given_back():
    pool = WorkerPool("test", print, max_workers=1, max_waiting=1)
    pool.reserve(), pool.reserve()
    with pytest.raises(taskserver.Unavailable):
        pool.reserve()
    pool.release()
    pool.reserve()


def test_workers_are_used_again():
    names = queue.Queue()
    pool = WorkerPool("test", lambda item: names.put(threading.get_ident()))
    seen = set()
    for n in range(50):
        submit(pool, n)
        seen.add(names.get(timeout=LONG))
        pool.join(LONG)
    assert len(seen) <= 3


def test_idle_workers_end_and_new_work_gets_a_new_one():
    threads = queue.Queue()
    pool = WorkerPool("test", lambda item: threads.put(threading.current_thread()))
    for n in range(2):
        submit(pool, n)
        thread = threads.get(timeout=LONG)
        thread.join(10)
        assert not thread.is_alive()


def test_no_item_is_lost_when_it_comes_in_the_moment_in_which_a_worker_ends(monkeypatch):
    monkeypatch.setattr(WorkerPool, "IDLE_SECONDS", 0.0005)

    def use(i):
        done, chance = queue.Queue(), random.Random(i)
        pool = WorkerPool("test", done.put, max_workers=1)
        for n in range(150):
            submit(pool, n)
            assert done.get(timeout=LONG) == n
            end = time.perf_counter() + chance.uniform(0.0004, 0.001)
            while time.perf_counter() < end:
                time.sleep(0)

    in_threads(4, use)  # which take the interpreter from each other at any moment


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_work_waits_while_no_thread_can_be_started(monkeypatch, error):
    done = queue.Queue()
    pool = WorkerPool("test", done.put, max_workers=1)

    def refuse(thread):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        submit(pool, 1, 2)
        pool.send_worker()
        assert pool.counts() == (2, 0)
    pool.send_worker()
    assert [done.get(timeout=LONG) for _ in range(2)] == [1, 2]


def test_drop_empties_the_queue_and_join_waits_for_what_is_in_work(gate):
    pool = WorkerPool("test", lambda item: gate({}), max_workers=1)
    submit(pool, *range(5))
    gate.wait_for()
    assert pool.drop() == 4
    assert pool.counts() == (0, 1)
    begun = time.monotonic()
    pool.join(0.05)
    assert pool.counts() == (0, 1) and time.monotonic() - begun < LONG / 2
    gate.opened.set()
    pool.join(LONG)
    assert pool.counts() == (0, 0)


# -- 4. Child processes ----------------------------------------------------------------------------


def pid(payload, report):
    return os.getpid()


def environment(payload, report):
    return [signal.getsignal(signal.SIGINT) == signal.SIG_IGN, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            os.nice(0) if hasattr(os, "nice") else None]  # fmt: skip


def end_itself(payload, report):
    how = payload["how"]
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, how))


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("never")


def fail_as_told(payload, report):
    report(0.1)
    report(0.2, "before")
    if payload["how"] == "report":
        report(math.nan)
    if payload["how"] in ("nan", "cycle", "object", "large"):
        return {"nan": math.nan, "cycle": cycle(), "object": object(), "large": "x" * MIB}[payload["how"]]
    raise {"exit": SystemExit(3), "interrupt": KeyboardInterrupt(), "memory": MemoryError(), "unpicklable": Unpicklable("text"),
           "speechless": Speechless(), "surrogate": ValueError("\ud800 ü")}[payload["how"]]  # fmt: skip


def fork(payload, report):
    os.fork()
    return os.getpid()


def say(payload, report):
    print(payload["text"])


def sleep_long(payload, report):
    report(0.5, str(os.getpid()))
    time.sleep(LONG)


def storm(payload, report):
    for n in range(100_000):
        report(n / 100_000, str(n))
    report(1.0, "last")


def wait_for_file(payload, report):
    """Report twice in a moment, then no more until a file appears."""
    report(0.1, "first")
    report(0.2, "second")
    return eventually(lambda: os.path.exists(payload["path"]))


def leave_a_thread(payload, report):
    def report_for_ever():
        while True:
            report(0.9, "stray")

    threading.Thread(target=report_for_ever, daemon=True).start()


@pytest.fixture
def child():
    """Runs functions in one child process."""
    child = taskserver.Child()
    yield child
    child.end()
    if hasattr(signal, "pthread_sigmask"):  # run() blocks it in its thread, which here is the main one
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def run(child, function, report=lambda *_: None, timeout=LONG, **payload):
    return json.loads(child.run(timeout, function, json.dumps(payload).encode(), report).decode())


def error_of(child, function, timeout=LONG, **payload):
    with pytest.raises(taskserver.TaskError) as caught:
        run(child, function, timeout=timeout, **payload)
    return caught.value.args[0]


def is_gone(pid):
    try:
        os.kill(pid, 0)
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_child_is_used_again_after_whatever_a_task_raises_or_returns(child):
    before = run(child, pid)
    assert before != os.getpid()
    for how, error in [("exit", "SystemExit: 3"), ("interrupt", "KeyboardInterrupt"), ("memory", "MemoryError"),
                       ("unpicklable", "Unpicklable: text"), ("surrogate", r"ValueError: \ud800 ü"),
                       ("speechless", "Speechless: (an exception that cannot say what it is)")]:  # fmt: skip
        assert error_of(child, fail_as_told, how=how) == error
    for how in "nan", "cycle", "object", "large", "report":
        assert error_of(child, fail_as_told, how=how).startswith("ValueError: ")
    assert run(child, echo, result={"é": "x" * 1_000_000}) == {"é": "x" * 1_000_000}
    assert run(child, pid) == before


def test_a_function_that_cannot_cross_or_cannot_be_imported_is_a_clear_error(child, monkeypatch):
    assert "no child process can take the task: " in error_of(child, lambda payload, report: 1)

    def late(payload, report):
        pass

    late.__qualname__ = "late"
    monkeypatch.setattr(sys.modules[__name__], "late", late, raising=False)
    assert error_of(child, late).startswith("AttributeError: ")
    assert run(child, echo, result=1) == 1


def test_what_a_child_has_not_told_to_the_end_is_no_answer_to_the_next_task(child):
    def report(*_):
        raise MemoryError

    assert error_of(child, fail_as_told, report=report, how="exit").startswith("the child process died")
    assert run(child, echo, result=5) == 5


@posix
def test_a_copy_that_a_function_forks_does_not_answer_as_well(child):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn: there are threads
        assert run(child, fork) == run(child, pid)
    for n in range(3):
        assert run(child, echo, result=n) == n


@posix
def test_a_worker_that_ends_leaves_no_process_not_even_a_dead_one(application):
    application.task("pid", cpu=True)(pid)
    number = final(application, create(application, "pid"))["result"]

    def is_known():
        try:
            os.kill(number, 0)
            return True
        except ProcessLookupError:
            return False

    assert eventually(lambda: not is_known())


@posix
def test_what_a_child_prints_to_nobody_is_lost_and_no_more():
    code = ("import taskserver, test_taskserver as t\nif __name__ == '__main__': child = taskserver.Child(); "
            "print(t.run(child, t.say, text='heard'), t.run(child, t.pid) == t.run(child, t.pid), file=sys.stderr)")  # fmt: skip
    reading, writing = os.pipe()
    os.close(reading)
    try:
        out = subprocess.run([sys.executable, "-c", "import sys\n" + code], check=False, cwd=str(PROGRAM.parent),
                             stdout=writing, stderr=subprocess.PIPE, timeout=LONG, env={**os.environ, "PYTHONUNBUFFERED": ""})  # fmt: skip
    finally:
        os.close(writing)
    assert out.stderr.decode().startswith("None True\n")


@posix
def test_a_dead_child_fails_its_task_alone_says_how_it_died_and_is_replaced(child):
    for how, status in ("exit", "exit status 3"), ("SIGKILL", "killed by signal 9"), ("SIGABRT", "killed by signal 6"):
        before = run(child, pid)
        assert error_of(child, end_itself, how=how) == f"the child process died ({status})"
        assert is_gone(before)
    before = run(child, pid)
    os.kill(before, signal.SIGKILL)
    assert eventually(lambda: not multiprocessing.active_children())
    assert run(child, pid) != before  # one that dies between two tasks costs none


def test_a_task_beyond_its_time_is_ended_but_the_start_of_a_child_does_not_count(child):
    assert run(child, echo, timeout=0.1, result=1) == 1  # a start takes longer
    before = run(child, pid)
    begun = time.monotonic()
    assert error_of(child, sleep_long, timeout=0.2) == "timed out after 0.2 seconds"
    assert time.monotonic() - begun < LONG / 2 and is_gone(before)


@posix
def test_children_ignore_ctrl_c_and_step_back(child):
    ignores, ends, nice = run(child, environment)
    assert ignores and ends and nice >= min(19, os.nice(0) + 10)
    number = run(child, pid)
    os.kill(number, signal.SIGINT)
    assert run(child, pid) == number


def test_reports_cross_in_order_throttled_and_the_last_is_never_lost(child, tmp_path):
    got = []
    begun = time.monotonic()
    run(child, storm, lambda *report: got.append(report))
    took = time.monotonic() - begun
    assert got[-1] == (1.0, "last") and got == sorted(got, key=lambda report: report[0])
    assert len(got) <= 3 + 25 * took

    def report(fraction, message):
        got.append(message)
        if message == "second":
            (tmp_path / "go").write_text("")  # the task goes on only because this report came

    assert run(child, wait_for_file, report, path=str(tmp_path / "go")) is True
    assert got[-1] == "second"
    with pytest.raises(taskserver.TaskError):
        run(child, fail_as_told, lambda *report: got.append(report), how="exit")
    assert got[-1] == (0.2, "before")


def test_reports_of_a_stray_thread_are_ignored_after_the_end(child):
    before, got = run(child, pid), []
    run(child, leave_a_thread)
    assert not threading.Event().wait(0.3)  # the thread reports, and nobody asks
    assert run(child, pid, lambda *report: got.append(report)) == before
    for n in range(20):
        assert run(child, echo, lambda *report: got.append(report), result=n) == n
    assert got == []


@pytest.mark.parametrize("error", [BlockingIOError(11, "no process"), OSError(24, "no descriptor"), MemoryError()], ids=brief)
def test_no_process_to_be_had_fails_the_task_and_the_next_one_tries_again(child, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.get_context("spawn").Process, "start", lambda process: (_ for _ in ()).throw(error))
        assert "no child process can take the task: " in error_of(child, echo)
    if isinstance(error, MemoryError):
        assert run(child, echo, result=1) == 1


def test_cpu_tasks_run_in_children_of_their_own_and_end_with_their_workers(application):
    application.cpu_pool.max_workers = 2
    application.task("pid", cpu=True)(pid)
    application.task("sleep", cpu=True, timeout=0.5)(sleep_long)
    application.task("killed", cpu=True)(end_itself)
    slow, killed = create(application, "sleep"), create(application, "killed", how="exit")
    assert final(application, killed)["error"] == "the child process died (exit status 3)"
    assert final(application, slow)["error"] == "timed out after 0.5 seconds"
    assert (poll(application, slow)["progress"], poll(application, slow)["result"]) == (0.5, None)
    assert final(application, create(application, "pid"))["result"] != os.getpid()


MAIN = '''
import os, sys, time, taskserver
application = taskserver.Application()

@application.task("mine", cpu=True)
def mine(payload, report):
    """Say who runs it, and go on for ever if told so."""
    report(0.5, str(os.getpid()))
    while payload.get("burn"):
        pass
    return __name__

{guard}taskserver.main(application)
'''


def burning(program):
    """Have two children compute for ever; return their ids."""
    numbers = []
    for _ in range(2):
        path = "/poll-mine/" + program.ask("POST", "/create-mine", {"name": "x", "burn": True}).json["id"]
        assert eventually(lambda path=path: program.ask("GET", path).json["message"])
        numbers.append(int(program.ask("GET", path).json["message"]))
    assert not any(map(is_gone, numbers)) and len(set(numbers)) == 2
    return numbers


@posix
@pytest.mark.parametrize("number, grace, status", [
    (signal.SIGKILL, "1", -9), (signal.SIGTERM, "0.2", 0), (signal.SIGINT, "0.2", 0), (signal.SIGTERM, "1000", 143),
])  # fmt: skip
def test_children_end_with_their_server_however_it_ends(tmp_path, number, grace, status):
    file = tmp_path / "mine.py"
    file.write_text(MAIN.format(guard="if __name__ == '__main__': "))
    with Program("--cpu-workers", "2", "--grace", grace, file=file) as program:
        record = program.ask("POST", "/create-mine", {"name": "x"}).json
        assert program.ask("GET", f"/poll-mine/{record['id']}?wait=30").json["result"] == "__mp_main__"
        numbers = burning(program)
        if status == 143:  # a second signal follows
            program.process.send_signal(number)
            assert "stopping" in program.log(wait_for="stopping")
        assert program.stops(number) == status
        assert eventually(lambda: all(map(is_gone, numbers)), 5)
        assert "Traceback" not in program.log()


def test_a_missing_main_guard_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MAIN.format(guard=""))
    with Program(file=file) as program:
        record = program.ask("POST", "/create-mine", {"name": "x"}).json
        record = program.ask("GET", f"/poll-mine/{record['id']}?wait=30").json
        assert record["status"] == "failed" and "__main__" in record["error"]
        assert "Traceback" not in program.log() and "__main__" in program.log()


# -- 5. Requests, responses, routes ----------------------------------------------------------------


@pytest.fixture
def router():
    router = Router()
    for method, pattern in ("GET", "/"), ("POST", "/create-a"), ("GET", "/poll-a/{id}"), ("GET", "/both"), ("POST", "/both"):
        router.add(method, pattern, lambda *_, found=method + " " + pattern: found)
    return router


@pytest.mark.parametrize("method, path, found", [
    ("GET", "/", ("GET /", ())),
    ("HEAD", "/", ("GET /", ())),
    ("POST", "/create-a", ("POST /create-a", ())),
    ("GET", "/poll-a/7", ("GET /poll-a/{id}", ("7",))),
    ("GET", "/%70oll-a/7", ("GET /poll-a/{id}", ("7",))),
    ("GET", "/poll-a/%37", ("GET /poll-a/{id}", ("7",))),
    ("GET", "/poll-a/x%2Fy", ("GET /poll-a/{id}", ("x/y",))),
    ("GET", "/poll-a/%2537", ("GET /poll-a/{id}", ("%37",))),
    ("GET", "/poll-a/", ("GET /poll-a/{id}", ("",))),
    ("GET", "/poll-a/%C3%A9", ("GET /poll-a/{id}", ("é",))),
    ("HEAD", "/both", ("GET /both", ())),
    ("POST", "/both", ("POST /both", ())),
])  # fmt: skip
def test_a_path_finds_its_endpoint_and_is_decoded_once(router, method, path, found):
    endpoint, arguments = router.match(method, path)
    assert (endpoint(), arguments) == found


@pytest.mark.parametrize("path", [
    "", "//", "/x", "/create-a/", "//create-a", "/create-a%00", "/create-a%2F", "/poll-a", "/poll-a/7/", "/poll-a%2F7",
    "/poll-a/7/8", "/./create-a", "/x/../create-a", "/CREATE-A", "/create%2Da/x", "/{id}", "*x",
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "BREW"])
def test_an_unknown_path_is_404_whatever_the_method(router, method, path):
    with pytest.raises(HTTPError) as caught:
        router.match(method, path)
    assert caught.value.response.status == 404


@pytest.mark.parametrize("path, allow", [
    ("/", "GET, HEAD, OPTIONS"),
    ("/create-a", "OPTIONS, POST"),
    ("/poll-a/7", "GET, HEAD, OPTIONS"),
    ("/both", "GET, HEAD, OPTIONS, POST"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["PUT", "DELETE", "TRACE", "BREW", "get", "post", "OPTIONS"])
def test_another_method_is_405_with_allow_and_options_204(router, method, path, allow):
    if method == "OPTIONS":
        response = router.match(method, path)[0]()
    else:
        with pytest.raises(HTTPError) as caught:
            router.match(method, path)
        response = caught.value.response
    assert response.status == (204 if method == "OPTIONS" else 405)
    assert dict(response.headers)["Allow"] == allow


def test_options_for_the_whole_server(router):
    response = router.match("OPTIONS", "*")[0]()
    assert (response.status, response.body) == (204, b"")


def test_a_path_of_its_own_goes_before_any_id(router):
    router.add("GET", "/poll-a/newest", lambda *_: "newest")
    assert router.match("GET", "/poll-a/newest")[0]() == "newest"
    assert router.match("GET", "/poll-a/{id}")[1] == ("{id}",)


def test_a_route_that_is_added_later_is_found(router):
    with pytest.raises(HTTPError):
        router.match("GET", "/late")
    router.add("GET", "/late", lambda: "late")
    assert router.match("GET", "/late")[0]() == "late"


def test_a_refusal_is_one_sentence_in_json():
    response = HTTPError(503, 'Say "why".', ("Retry-After", "1")).response
    assert (response.status, response.content_type, response.headers) == (503, "application/json", (("Retry-After", "1"),))
    assert json.loads(response.body.decode()) == {"error": 'Say "why".'}


@pytest.mark.parametrize("body, value", [
    (b"{}", {}),
    (b' \r\n\t{"a" : 1 } ', {"a": 1}),
    (b'{"a": [true, false, null, -0.5e3, "\xc3\xa9\\u00e9\\ud83d\\ude00"]}', {"a": [True, False, None, -500.0, "éé😀"]}),
    (b'{"a": 1e308}', {"a": 1e308}),
    (b'{"a": 1e-999}', {"a": 0.0}),
    (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
    (b'{"": "\\u0000"}', {"": "\0"}),
    (b'{"a": "\\\\ud800"}', {"a": "\\ud800"}),
    (b'{"a": "%s"}' % (b"[{" * 200), {"a": "[{" * 200}),
    (b'{"a": "\\"%s"}' % (b"[" * 200), {"a": '"' + "[" * 200}),
    (b'{"a": [%s]}' % b",".join([b"[]"] * 300), {"a": [[]] * 300}),
    (b'{"a": %s1%s}' % (b"[" * 99, b"]" * 99), None),
    (b'{"a": %s}' % (b"9" * 4300), None),
    (b'{"a": -%s}' % (b"9" * 4300), None),
])  # fmt: skip
def test_a_strict_json_object_is_decoded(body, value):
    decoded = taskserver.decode_object(body)
    assert "a" in decoded if value is None else decoded == value


@pytest.mark.parametrize("body", [
    b"", b" ", b"null", b"[]", b'"{}"', b"1", b"{} {}", b"{", b"}", b'{"a": 1,}', b"{'a': 1}", b'{"a": 01}', b'{"a": .5}',
    b'{"a": +1}', b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": -1e999}',
    b'{"a": 1, "a": 2}', b'{"b": [{"a": 1, "a": 1}]}', b'{"a": 1, "\\u0061": 2}', b'{"a": "\\ud800"}',
    b'{"a": "\\udc00\\ud800"}', b'{"\\ud800": 1}', b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\xc0\x80"}',
    b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-16-le"), b'{"a": "\n"}', b'{"a": "\0"}',
    b'{"a": "\\x41"}', b'{"a": tru}', b'{"a": 1}\0', b'{"a": 1 // comment\n}', b'\x0c{"a": 1}', '{"a": ١}'.encode(),
    b'{"a": %s1%s}' % (b"[" * 100, b"]" * 100), b'{"a":' * 101 + b"1" + b"}" * 101, b"[" * 100_000, b'{"a":' * 100_000,
    b'{"a": %s}' % (b"9" * 4301), b'{"a": -%s}' % (b"9" * 4301), b'{"a": %s}' % (b"9" * 1_000_000),
    b'{"a": "%s' % (b"\\" * 100_001),
], ids=brief)  # fmt: skip
def test_anything_else_is_400(body):
    with pytest.raises(HTTPError) as caught:
        taskserver.decode_object(body)
    response = caught.value.response
    assert response.status == 400 and len(response.body) < 500
    assert list(json.loads(response.body.decode())) == ["error"]


def test_an_unterminated_string_of_escapes_is_refused_in_a_time_that_grows_with_its_length():
    for end in b"", b"\\":
        body = b"[" * 101 + b'"' + b'\\"' * 400_000 + end  # with a search for each quote this takes an hour
        with pytest.raises(HTTPError) as refused:
            taskserver.decode_object(body)
        assert refused.value.response.status == 400


def test_a_string_full_of_brackets_is_not_nested():
    assert taskserver.decode_object(b'{"name": "%s"}' % (b"[" * 200)) == {"name": "[" * 200}
    with pytest.raises(HTTPError, match="one JSON object"):
        taskserver.decode_object(b'"' + b"[" * 200 + b'"')


# -- 6. Application --------------------------------------------------------------------------------


def test_building_an_application_starts_nothing():
    code = ("import threading, multiprocessing, taskserver as t; a = t.demo(); t.add_monitoring(a); t.add_pages(a); "
            "print(threading.active_count(), multiprocessing.active_children(), len(a.types))")  # fmt: skip
    assert subprocess.check_output([sys.executable, "-c", code], cwd=str(PROGRAM.parent)) == b"1 [] 2\n"


def test_the_decorator_returns_the_function_unchanged():
    assert Application().task("echo")(echo) is echo
    assert Application().task("echo", cpu=True, timeout=5)(echo) is echo


@pytest.mark.parametrize("name", ["", "A", "a b", "1a", "-a", "a_b", "a/b", "é", "a\n", "{id}", "a.b"])
def test_a_bad_name_of_a_task_type_is_a_value_error(name):
    with pytest.raises(ValueError, match="choose a name"):
        Application().task(name)(echo)


@pytest.mark.parametrize("options", [
    {"timeout": 5}, {"cpu": True, "executor": object()}, {"executor": object(), "timeout": 5},
])  # fmt: skip
def test_options_that_exclude_each_other_are_a_value_error(options):
    with pytest.raises(ValueError, match="task type 'echo': "):
        Application().task("echo", **options)(echo)


def test_a_name_that_is_taken_is_a_value_error():
    application = Application()
    application.task("a-1")(echo)
    with pytest.raises(ValueError, match="'a-1'"):
        application.task("a-1")(fail)
    decorator = application.task("a-2")
    decorator(echo)
    with pytest.raises(ValueError, match="'a-2'"):
        decorator(fail)


def test_a_function_that_cannot_be_pickled_is_a_value_error_with_cpu():
    def nested(payload, report):
        pass

    for function in nested, lambda payload, report: None:
        with pytest.raises(ValueError, match="top level"):
            Application().task("nested", cpu=True)(function)
        Application().task("nested")(function)


def test_create_answers_201_with_the_record_and_its_location(application):
    begun = time.time()
    answer = ask(application, "POST", "/create-gate", {"name": "ü \U0001f600"})
    record = answer.json
    assert answer.status == 201
    assert answer.headers["Location"] == f"/poll-gate/{record['id']}"
    assert str(uuid.UUID(record["id"])) == record["id"] and uuid.UUID(record["id"]).version == 4
    assert list(record) == KEYS
    assert {key: record[key] for key in KEYS[5:]} == dict.fromkeys(KEYS[5:])
    assert (record["name"], record["status"], record["type"]) == ("ü \U0001f600", "pending", "gate")
    created = time.strptime(record["created_at"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert abs(calendar.timegm(created) - begun) < 5


def test_pending_covers_waiting_and_running_and_ends_as_completed(application, gate):
    application.pool.max_workers = 1
    first, second = create(application, "gate", result=[1]), create(application, "gate", result={"a": None})
    gate.wait_for()
    running, waiting = poll(application, first), poll(application, second)
    assert [running[key] for key in ("status", "progress", "message")] == ["pending", 0.25, "at the gate"]
    assert running["started_at"] and not running["finished_at"]
    assert waiting == second
    gate.opened.set()
    first, second = final(application, first), final(application, second)
    assert [record["status"] for record in (first, second)] == ["completed"] * 2
    assert [record["result"] for record in (first, second)] == [[1], {"a": None}]
    assert [record["progress"] for record in (first, second)] == [1.0] * 2
    assert first["message"] == "at the gate" and first["error"] is None
    consistent(first), consistent(second)


def test_the_function_gets_what_was_posted_untouched(application):
    payload = {"b": [1.5, None, {"é": "\0"}], "a": 10**30, "status": "x", "id": 5}
    record = outcome(application, lambda payload, report: payload, **payload)
    assert record["result"] == {"name": "sample", **payload}
    assert list(record["result"]) == ["name", *payload]


@pytest.mark.parametrize("raised, error", [
    (ValueError("what it said"), "ValueError: what it said"),
    (SystemExit(3), "SystemExit: 3"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (GeneratorExit("x"), "GeneratorExit: x"),
    (AssertionError(), "AssertionError"),
    (ValueError("caf\udce9 \0"), "ValueError: caf\\udce9 \0"),
    (Speechless(), "Speechless: (an exception that cannot say what it is)"),
    (HTTPError(404, "no"), "HTTPError: (404, 'no')"),
    (taskserver.JournalError("no", 1), "JournalError: no"),
], ids=brief)  # fmt: skip
def test_whatever_a_task_raises_makes_it_fail_alone_and_its_traceback_goes_to_the_log(application, caplog, raised, error):
    application.pool.max_workers = 1

    def task(payload, report):
        report(0.5, "so far")
        raise raised

    record = outcome(application, task)
    assert (record["status"], record["error"], record["result"]) == ("failed", error, None)
    assert (record["progress"], record["message"]) == (0.5, "so far")
    assert "Traceback" in caplog.text and "raise raised" in caplog.text
    consistent(record)
    assert outcome(application, echo, result=1)["result"] == 1


@pytest.mark.parametrize("make, error", [
    (lambda: math.nan, "JSON"), (object, "JSON"), (cycle, "JSON"), (lambda: "x" * (MIB - 1), "1048577 bytes"),
], ids=["nan", "object", "cycle", "1 MiB + 1"])  # fmt: skip
def test_a_result_that_cannot_be_kept_makes_the_task_fail_and_breaks_no_poll(application, make, error):
    record = outcome(application, lambda payload, report: make())
    assert record["status"] == "failed" and error in record["error"] and record["result"] is None


def test_a_result_of_1_mib_is_polled_whole(application):
    assert outcome(application, lambda payload, report: "x" * (MIB - 2))["result"] == "x" * (MIB - 2)


def test_an_exception_that_breaks_whatever_looks_at_it_makes_the_task_fail(application):
    def task(payload, report):
        raise Unspeakable

    record = outcome(application, task)
    assert record["status"] == "failed" and record["error"]
    application.pool.join(LONG)
    assert application.pool.counts() == (0, 0)


def test_a_bad_report_fails_the_task_unless_it_is_caught(application):
    def task(payload, report):
        with pytest.raises(ValueError):
            report(2)
        report(0.5, "m" * 501)
        report("half")

    record = outcome(application, task)
    assert record["error"].startswith("ValueError: report() takes a number from 0 to 1")
    assert (record["progress"], record["message"]) == (0.5, "m" * 500)


def test_a_report_after_the_end_is_ignored(application):
    reports = []
    application.task("keep-it")(lambda payload, report: reports.append(report))
    record = create(application, "keep-it")
    assert poll(application, record, LONG)["status"] == "completed"
    reports[0](0.1, "late")
    record = poll(application, record)
    assert (record["progress"], record["message"]) == (1.0, None)


def test_the_payload_is_dropped_when_the_task_is_final(application, gate):
    record = create(application, "gate")
    gate.wait_for()
    assert application.store.get(record["id"]).payload
    gate.opened.set()
    final(application, record)
    assert application.store.get(record["id"]).payload is None


def test_records_are_never_half_changed_and_never_go_backwards_while_many_poll(application):
    def busy(payload, report):
        for n in range(200):
            report(n / 200, str(n))
        if payload["n"] % 3 == 0:
            raise ValueError("third")
        return payload["n"]

    application.task("busy")(busy)
    application.pool.max_workers = 4
    records = [create(application, "busy", n=n) for n in range(60)]
    order = {"waiting": 0, "running": 1, "final": 2}

    def watch(i):
        last = dict.fromkeys(range(60), (0, 0.0))
        deadline = time.monotonic() + LONG
        while any(stage < 2 for stage, _ in last.values()):
            assert time.monotonic() < deadline
            for n, record in enumerate(records):
                now = poll(application, record)
                consistent(now)
                if now["status"] == "pending" and now["message"] is not None:
                    assert now["progress"] == int(now["message"]) / 200
                if now["status"] == "completed":
                    assert now["result"] == n
                stage = "final" if now["status"] != "pending" else "running" if now["started_at"] else "waiting"
                seen = order[stage], now["progress"] or 0.0
                assert seen >= last[n] or now["status"] == "failed"
                last[n] = seen

    in_threads(4, watch)
    assert [record["status"] for record in ask(application, "GET", "/tasks").json["tasks"]].count("failed") in range(10, 21)


def test_50_clients_create_and_poll_and_every_task_is_found_and_completed(application):
    ids = set()

    def client(i):
        for n in range(20):
            record = final(application, create(application, "echo", result=[i, n]))
            assert (record["status"], record["result"]) == ("completed", [i, n])
            ids.add(record["id"])

    in_threads(50, client)
    assert len(ids) == 1000


@pytest.mark.parametrize("name, status", [
    ("x", 201), ("x" * 256, 201), ("😀" * 256, 201), (" x ", 201), ("\0", 201), ("x" * 257, 400), ("", 400), (" \t\n", 400),
    ("\u3000", 400), (None, 400), (5, 400), (["x"], 400), (True, 400),
], ids=brief)  # fmt: skip
def test_a_name_is_a_string_that_is_not_blank_of_at_most_256_characters(application, name, status):
    answer = ask(application, "POST", "/create-echo", {"name": name})
    assert answer.status == status
    assert answer.json["name"] == name if status == 201 else '"name"' in answer.json["error"]


def test_a_body_that_is_no_object_or_has_no_name_is_400_and_makes_no_task(application):
    for body in b"", b"{", b"[]", b"{}", b'{"Name": "x"}', b'{"name": "x", "name": "x"}', b'{"name": "\xff"}':
        assert ask(application, "POST", "/create-echo", body).status == 400
    assert ask(application, "GET", "/tasks").json == {"tasks": []}


@pytest.mark.parametrize("headers, status", [
    ({"content_type": "application/json"}, 201),
    ({"content_type": "Application/JSON ; charset=utf-8"}, 201),
    ({"content_type": "application/json;"}, 201),
    ({"content_type": None}, 415),
    ({"content_type": ""}, 415),
    ({"content_type": "text/plain"}, 415),
    ({"content_type": "text/plain, application/json"}, 415),
    ({"content_type": "application/json, text/plain"}, 415),
    ({"content_type": "application/jsonx"}, 415),
    ({"content_type": "application/vnd.api+json"}, 415),
    ({"content_type": "application/x-www-form-urlencoded"}, 415),
    ({"content_encoding": "gzip"}, 415),
    ({"content_encoding": "identity"}, 415),
], ids=brief)  # fmt: skip
def test_only_plain_json_is_taken(application, headers, status):
    answer = ask(application, "POST", "/create-echo", {"name": "x"}, **headers)
    assert answer.status == status, answer


def test_an_id_is_the_hyphenated_form_in_any_case(application):
    record = create(application, "echo")
    id = record["id"]
    assert final(application, dict(record, id=id.upper()))["id"] == id
    for bad in id.replace("-", ""), f"{{{id}}}", f"urn:uuid:{id}", id + "0", id[:-1], id[:-1] + "g", "", "%20" + id, id + "%0A":
        answer = ask(application, "GET", f"/poll-echo/{bad}")
        assert answer.status == 400 and "36 characters" in answer.json["error"], bad
    for target in f"/poll-echo/{uuid.uuid4()}", f"/poll-gate/{id}", f"/poll-echo/{uuid.uuid4()}?wait=30":
        assert ask(application, "GET", target).status == 404


@pytest.mark.parametrize("query, status", [
    ("wait=0", 200), ("wait=0.01", 200), ("wait=00.010", 200), ("", 200), ("other=1", 200), ("wait=%30", 200),
    ("wait=", 400), ("wait", 400), ("wait=-1", 400), ("wait=%2B1", 400), ("wait=+1", 400), ("wait=.5", 400),
    ("wait=5.", 400), ("wait=1e1", 400), ("wait=nan", 400), ("wait=inf", 400), ("wait=1_0", 400), ("wait=%D9%A1", 400),
    ("wait=0x1", 400), ("wait=1&wait=1", 400), ("wait=1%0A", 400), ("wait=%201", 400), ("wait=1,5", 400),
])  # fmt: skip
def test_wait_is_a_plain_number(application, gate, query, status):
    record = create(application, "gate")
    assert ask(application, "GET", f"/poll-gate/{record['id']}?{query}").status == status


def test_wait_is_clamped(application, gate, monkeypatch):
    assert taskserver.MAX_WAIT == 30
    monkeypatch.setattr(taskserver, "MAX_WAIT", 0.05)
    record = create(application, "gate")
    for seconds in "31", "9" * 400:
        begun = time.monotonic()
        assert ask(application, "GET", f"/poll-gate/{record['id']}?wait={seconds}").json["status"] == "pending"
        assert 0.04 < time.monotonic() - begun < LONG / 2


def test_full_queue_answers_503_with_retry_after_and_stores_nothing(application, gate):
    application.pool.max_workers, application.pool.max_waiting = 2, 3
    records = [create(application, "gate") for _ in range(5)]
    refused = ask(application, "POST", "/create-echo", {"name": "one too many"})
    assert refused.status == 503 and int(refused.headers["Retry-After"]) >= 1
    assert "--max-waiting" in refused.json["error"]
    listed = ask(application, "GET", "/tasks").json["tasks"]
    assert [record["id"] for record in listed] == [record["id"] for record in records[::-1]]
    gate.opened.set()
    for record in records:
        final(application, record)
    assert final(application, create(application, "echo", result=1))["result"] == 1


def test_a_full_store_answers_503_with_both_flags_and_when_to_come_again(application):
    application.store.max_tasks, application.store.keep = 3, 500
    for _ in range(3):
        last = final(application, create(application, "echo"))
    refused = ask(application, "POST", "/create-echo", {"name": "one too many"})
    assert refused.status == 503 and 490 < int(refused.headers["Retry-After"]) <= 500
    assert "--max-tasks" in refused.json["error"] and "--keep" in refused.json["error"]
    assert application.pool.counts() == (0, 0)
    application.store.keep = 0
    assert create(application, "echo")["name"] == "sample"
    assert ask(application, "GET", f"/poll-echo/{last['id']}").status == 404


def test_send_workers_finds_workers_for_what_waits(application, monkeypatch):
    final(application, create(application, "echo"))
    assert eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "task"])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
        waiting = create(application, "echo", result=5)
    assert poll(application, waiting)["status"] == "pending"
    application.send_workers()
    assert final(application, waiting)["result"] == 5


def test_a_pool_that_is_busy_does_not_hold_up_another(application, gate):
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        application.task("elsewhere", executor=executor)(echo)
        application.pool.max_workers = 1
        create(application, "gate"), create(application, "gate")
        gate.wait_for()
        assert final(application, create(application, "elsewhere", result=1))["result"] == 1
        gate.opened.set()


def test_a_check_before_the_request_may_refuse_it(application):
    def check(request):
        if "x-let-me-in" not in request.fields.headers:
            raise HTTPError(403, "Ask nicely.")

    application.before_request.append(check)
    assert ask(application, "POST", "/create-echo", {"name": "x"}).json == {"error": "Ask nicely."}
    assert ask(application, "GET", "/nowhere").status == 403
    assert ask(application, "POST", "/create-echo", {"name": "x"}, x_let_me_in="please").status == 201


def test_a_fault_in_an_endpoint_is_500_in_json_and_tells_the_log_alone(application, caplog):
    application.router.add("GET", "/fault", lambda request: 1 / 0)
    answer = ask(application, "GET", "/fault")
    assert answer.status == 500 and list(answer.json) == ["error"]
    assert "Zero" not in answer.json["error"] and "ZeroDivisionError" in caplog.text


def test_an_answer_that_may_have_to_wait_is_not_begun_where_it_must_not(application, gate):
    record = create(application, "gate")
    path = f"/poll-gate/{record['id']}"
    assert application.handle(request("GET", path, b""), may_block=False).status == 200
    assert application.handle(request("GET", path + "?wait=30"), may_block=False) is None
    application.router.add("GET", "/mine", lambda request: Response(200))
    assert application.handle(request("GET", "/mine"), may_block=False) is None


def test_a_stopping_application_refuses_creates_and_answers_polls(application, gate):
    record = create(application, "gate")
    application.store.stop()
    refused = ask(application, "POST", "/create-gate", {"name": "x"})
    assert refused.status == 503 and refused.headers["Retry-After"] and "stopping" in refused.json["error"]
    assert poll(application, record)["status"] == "pending"


# An executor is anything with submit() that returns a future with result().


@pytest.fixture(params=["threads", "processes"])
def executor(request):
    if request.param == "threads":
        made = concurrent.futures.ThreadPoolExecutor(2)
    else:
        made = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with made:
        yield made


def report_and_echo(payload, report):
    for n in range(101):
        report(n / 100, "not seen")
    return payload


def end_process(payload, report):
    os._exit(1)


def test_any_executor_runs_tasks(application, executor):
    application.task("there", executor=executor)(report_and_echo)
    application.task("fails-there", executor=executor)(fail)
    application.task("no-json-there", executor=executor)(cycle_there)
    records = [create(application, "there", n=n) for n in range(5)]
    failing, cyclic = create(application, "fails-there"), create(application, "no-json-there")
    for n, record in enumerate(final(application, record) for record in records):
        consistent(record)
        assert record["result"] == {"name": "sample", "n": n} and record["message"] is None
    assert final(application, failing)["error"] == "ValueError: what it said"
    assert "JSON" in final(application, cyclic)["error"]
    if isinstance(executor, concurrent.futures.ProcessPoolExecutor):
        application.task("dies-there", executor=executor)(end_process)
        assert "BrokenProcessPool" in final(application, create(application, "dies-there"))["error"]
        assert "BrokenProcessPool" in final(application, create(application, "there"))["error"]
        assert final(application, create(application, "echo", result=1))["result"] == 1


def cycle_there(payload, report):
    return cycle()


def test_an_executor_that_raises_or_cancels_fails_the_task_alone(application):
    class Broken:
        def submit(self, function, *arguments):
            raise RuntimeError("cannot schedule new futures after shutdown")

    class Cancels:
        def submit(self, function, *arguments):
            future = concurrent.futures.Future()
            future.cancel()
            return future

    for executor, error in (Broken(), "RuntimeError: cannot schedule"), (Cancels(), "CancelledError"):
        name = type(executor).__name__.lower()
        application.task(name, executor=executor)(echo)
        record = final(application, create(application, name))
        assert record["status"] == "failed" and record["error"].startswith(error)
    assert final(application, create(application, "echo", result=1))["result"] == 1


@pytest.mark.parametrize("error, text", [(taskserver.TaskError, "TaskError"), (taskserver.TaskError(""), "TaskError"),
                                         (taskserver.TaskError("disk: full"), "disk: full")])  # fmt: skip
def test_a_task_error_fails_the_task_with_its_text_whatever_it_says(error, text):
    application = taskserver.Application()

    @application.task("x")
    def fail(payload, report):
        raise error

    headers = {"content-type": "application/json"}
    created = application.handle(Request("POST", "/create-x", fields=Fields(headers), body=b'{"name": "n"}'))
    id = json.loads(created.body)["id"]
    record = json.loads(application.handle(Request("GET", f"/poll-x/{id}", "wait=30")).body)
    assert (record["status"], record["error"]) == ("failed", text)
    application.pool.join(LONG)
    assert application.pool.counts() == (0, 0)


# -- 7. HTTP ---------------------------------------------------------------------------------------


def parse(*pieces):
    """Return what comes out when bytes arrive in pieces: requests, then a refusal's status if there is one."""
    buffer, out = bytearray(), []
    parsing = None
    try:
        for piece in pieces:
            buffer += piece
            while buffer or parsing:
                parsing = parsing or taskserver.parse_request(buffer, lambda request: ())
                try:
                    next(parsing)
                    break
                except StopIteration as end:
                    out.append(end.value)
                    parsing = None
    except HTTPError as refusal:
        assert list(json.loads(refusal.response.body.decode())) == ["error"]
        out.append(refusal.response.status)
    return out


def bytewise(data):
    return [data[i : i + 1] for i in range(len(data))]


def get(*lines):
    return b"\r\n".join((b"GET /a HTTP/1.1", b"Host: h", *lines, b"", b""))


def posted(body, *lines):
    return b"\r\n".join((b"POST /a HTTP/1.1", b"Host: h", *lines, b"", body))


CHUNKED = b"Transfer-Encoding: chunked"


@pytest.mark.parametrize("data, expected", [
    # request line (RFC 9112, 3)
    (get(), ("GET", "/a", "", "h", b"")),
    (b"\r\n" + get(), ("GET", "/a", "", "h", b"")),
    (b"GET /a/b?c=d&e?f/%20 HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "/a/b", "c=d&e?f/%20", "h", b"")),
    (b"GET /%C3%A9%2F;a=b,c@:! HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "/%C3%A9%2F;a=b,c@:!", "", "h", b"")),
    (b"GET //h/.. HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "//h/..", "", "h", b"")),
    (b"get /a HTTP/1.1\r\nHost: h\r\n\r\n", ("get", "/a", "", "h", b"")),
    (b"M-SEARCH!#$%&'*+.^_`|~ /a HTTP/1.1\r\nHost: h\r\n\r\n", ("M-SEARCH!#$%&'*+.^_`|~", "/a", "", "h", b"")),
    (b"GET http://g:80/a?b HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "/a", "b", "g:80", b"")),
    (b"GET HTTPS://g HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "/", "", "g", b"")),
    (b"GET http://g?b HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "/", "b", "g", b"")),
    (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", ("OPTIONS", "*", "", "h", b"")),
    (b"GET /a HTTP/1.0\r\n\r\n", ("GET", "/a", "", "", b"")),
    (b"GET /a HTTP/1.0\r\nHost: h\r\n\r\n", ("GET", "/a", "", "h", b"")),
    (b"GET /a HTTP/1.2\r\nHost: h\r\n\r\n", ("GET", "/a", "", "h", b"")),
    (b"GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"POST /a HTTP/1.1\r\nHost: h\r\n\r\n", 411),
    (b"CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n", 400),
    (b"GET a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET ?b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET ftp://g/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET http:///a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET http://user@g/a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /%zz HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /%2 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a?%g0 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /%ff HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a?%C0%80 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET  /a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a  HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a HTTP/1.1 \r\nHost: h\r\n\r\n", 400),
    (b" GET /a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET\t/a\tHTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a\r\n\r\n", 400),
    (b"GET /a\r\nHost: h\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\n\r\n", 400),
    (b"GET /a http/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a HTTP/1.10\r\nHost: h\r\n\r\n", 400),
    (b"GET /a HTTP/01.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a HTTP/+1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a HTTP/1.\xd9\xa1\r\nHost: h\r\n\r\n", 400),
    (b"GE(T /a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"/a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"\r\n\r\n" + get(), 400),
    (b"\n" + get(), 400),
    (b"GET /a HTTP/2.0\r\nHost: h\r\n\r\n", 505),
    (b"GET /a HTTP/0.9\r\nHost: h\r\n\r\n", 505),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    # headers (RFC 9112, 5; RFC 9110, 5.5 and 7.2)
    (get(b"A:", b"B: \t x \t ", b"A: y", b"C:\xe9\xff"), {"a": ", y", "b": "x", "c": "\xe9\xff", "host": "h"}),
    (get(b"X-!#$%&'*+.^_`|~0: x"), {"x-!#$%&'*+.^_`|~0": "x", "host": "h"}),
    (get(b"A : x"), 400),
    (get(b"A\t: x"), 400),
    (get(b" A: x"), 400),
    (get(b"A: x", b" folded"), 400),
    (get(b"A: x", b"\tfolded"), 400),
    (get(b": x"), 400),
    (get(b"no colon"), 400),
    (get(b"A(b): x"), 400),
    (get(b"\xe9: x"), 400),
    (get(b"A: \0"), 400),
    (get(b"A: \x1f"), 400),
    (get(b"A: \x7f"), 400),
    (get(b"A: x\ry"), 400),
    (get(b"A: x\ny: z"), 400),
    (get(b"A: x\r"), 400),
    (b"GET /a HTTP/1.1\nHost: h\n\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: h\n\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: h\r\n\n", 400),
    (b"GET /a HTTP/1.1\r\r\nHost: h\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nHost:\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: h:port\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: h:-1\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
    (b"GET /a HTTP/1.1\r\nHost: h,g\r\n\r\n", ("GET", "/a", "", "h,g", b"")),  # a reg-name may hold commas
    (b"GET /a HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", ("GET", "/a", "", "[::1]:80", b"")),
    (b"GET /a HTTP/1.0\r\nHost: a b\r\n\r\n", 400),
    (b"GET http://g/a HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    # bodies by Content-Length (RFC 9112, 6)
    (posted(b"abcde", b"Content-Length: 5"), ("POST", "/a", "", "h", b"abcde")),
    (posted(b"abcde", b"content-length:\t005 "), ("POST", "/a", "", "h", b"abcde")),
    (posted(b"", b"Content-Length: 0"), ("POST", "/a", "", "h", b"")),
    (b"GET /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nGET /", ("GET", "/a", "", "h", b"GET /")),
    (posted(b"abcde", b"Content-Length: 5", b"Upgrade: h2c", b"Connection: upgrade"), ("POST", "/a", "", "h", b"abcde")),
    (posted(b"abcde", b"Content-Length: +5"), 400),
    (posted(b"abcde", b"Content-Length: -5"), 400),
    (posted(b"abcde", b"Content-Length: -0"), 400),
    (posted(b"abcde", b"Content-Length:"), 400),
    (posted(b"abcde", b"Content-Length: 5,5"), 400),
    (posted(b"abcde", b"Content-Length: 5", b"Content-Length: 5"), 400),
    (posted(b"abcde", b"Content-Length: 5", b"Content-Length: 6"), 400),
    (posted(b"abcde", b"Content-Length: 0x5"), 400),
    (posted(b"abcde", b"Content-Length: 5.0"), 400),
    (posted(b"abcde", b"Content-Length: 5 5"), 400),
    (posted(b"abcde", b"Content-Length: 5_0"), 400),
    (posted(b"abcde", b"Content-Length: \xb2"), 400),
    (posted(b"abcde", b"Content-Length: " + b"9" * 30), 400),
    (posted(b"", b"Content-Length: 1048577"), 413),
    # chunked bodies (RFC 9112, 7.1)
    (posted(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", CHUNKED), ("POST", "/a", "", "h", b"abcde")),
    (posted(b"0\r\n\r\n", CHUNKED), ("POST", "/a", "", "h", b"")),
    (posted(b"00A;x=y;z=\"q\"\r\n0123456789\r\n000\r\nT: x\r\n\r\n", CHUNKED), ("POST", "/a", "", "h", b"0123456789")),
    (posted(b"a ;x\r\n0123456789\r\n0\r\n\r\n", b"transfer-encoding:CHUNKED"), ("POST", "/a", "", "h", b"0123456789")),
    (b"GET /a HTTP/1.1\r\nHost: h\r\n" + CHUNKED + b"\r\n\r\n1\r\nx\r\n0\r\n\r\n", ("GET", "/a", "", "h", b"x")),
    (posted(b"0\r\nno colon\r\n\r\n", CHUNKED), 400),
    (posted(b"0\r\nA: x\ny\r\n\r\n", CHUNKED), 400),
    (posted(b"3\r\nabcd\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"3\nabc\n0\n\n", CHUNKED), 400),
    (posted(b"3\r\nabc\n\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"0x3\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"+3\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"-3\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b" 3\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"3 \r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"1_0\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"3;\0\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"g\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"0000000000000000f\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
    (posted(b"ffffffffffffffff\r\nabc", CHUNKED), 413),
    (posted(b"100001\r\nabc", CHUNKED), 413),
    (posted(b"0\r\n\r\n", CHUNKED, b"Content-Length: 5"), 400),
    (posted(b"0\r\n\r\n", b"Content-Length: 5", CHUNKED), 400),
    (posted(b"0\r\n\r\n", CHUNKED, CHUNKED), 400),
    (posted(b"0\r\n\r\n", b"Transfer-Encoding: gzip, chunked"), 501),
    (posted(b"0\r\n\r\n", b"Transfer-Encoding: chunked, gzip"), 400),
    (posted(b"0\r\n\r\n", b"Transfer-Encoding: xchunked"), 501),
    (posted(b"0\r\n\r\n", b"Transfer-Encoding:"), 400),
    (posted(b"0\r\n\r\n", b"Transfer-Encoding: gzip"), 501),
    (posted(b"0\r\n\r\n", b"Transfer-Encoding: identity"), 501),
    (b"POST /a HTTP/1.0\r\nHost: h\r\n" + CHUNKED + b"\r\n\r\n0\r\n\r\n", 400),
    # expectations (RFC 9110, 10.1.1)
    (posted(b"abcde", b"Content-Length: 5", b"Expect: 100-Continue"), ("POST", "/a", "", "h", b"abcde")),
    (posted(b"abcde", b"Content-Length: 5", b"Expect: 200-ok"), 417),
    (posted(b"abcde", b"Content-Length: 5", b"Expect: 100-continue, x"), 417),
    (b"GET /a HTTP/1.0\r\nExpect: x\r\n\r\n", ("GET", "/a", "", "", b"")),
], ids=brief)  # fmt: skip
def test_bytes_become_a_request_or_a_refusal_however_they_arrive(data, expected):
    whole = parse(data)
    assert parse(*bytewise(data)) == whole
    (got,) = whole
    if isinstance(expected, dict):
        assert got.fields.headers == expected
    elif isinstance(got, Request):
        assert (got.method, got.path, got.query, got.host, got.body) == expected
    else:
        assert got == expected


@pytest.mark.parametrize("data", [
    get(), posted(b"abcde", b"Content-Length: 5"), posted(b"3;x\r\nabc\r\n0\r\nT: x\r\n\r\n", CHUNKED), b"\r\n" + get(),
], ids=brief)  # fmt: skip
def test_no_beginning_of_a_request_is_a_request_or_refused(data):
    for size in range(len(data)):
        assert parse(data[:size]) == []
    assert [request.path for request in parse(data * 3)] == ["/a"] * 3
    assert parse(*bytewise(data * 3)) == parse(data * 3)


def test_what_follows_a_refusal_has_no_meaning():
    assert parse(posted(b"0\r\n\r\n" + get(), CHUNKED, b"Content-Length: 50")) == [400]


def sized(size, before, after=b""):
    """Return bytes of a size, filled up between two others."""
    return before + b"x" * (size - len(before) - len(after)) + after


def many_headers(size):
    """Return header lines of so many bytes in all, with the Host line of get()."""
    size -= len(b"Host: h")
    lines = [sized(4000, b"A: ")] * (size // 4002 - 1)
    return [*lines, sized(size - 4002 * len(lines) - 2, b"B: ")]


@pytest.mark.parametrize("make, limit, status", [
    (lambda n: sized(n, b"GET /", b" HTTP/1.1") + b"\r\nHost: h\r\n\r\n", 8192, 414),
    (lambda n: sized(n, b"GET /", b"") + b"\r\nHost: h\r\n\r\n" if n > 8192 else get(), 8192, 414),
    (lambda n: get(sized(n, b"A: ")), 8192, 431),
    (lambda n: get(*many_headers(n)), 16_384, 431),
    (lambda n: b"GET /" + b"x" * 8178 + get(*many_headers(n))[6:], 16_384, 431),
    (lambda n: get(*[b"A: x"] * (n - 1)), 100, 431),
    (lambda n: posted(b"x" * n, b"Content-Length: %d" % n), MIB, 413),
    (lambda n: posted(b"%x\r\n" % n + b"x" * n + b"\r\n0\r\n\r\n", CHUNKED), MIB, 413),
    (lambda n: posted(b"8\r\n12345678\r\n%x\r\n" % (n - 8) + b"x" * (n - 8) + b"\r\n0\r\n\r\n", CHUNKED), MIB, 413),
    (lambda n: posted(sized(n, b"1;") + b"\r\nx\r\n0\r\n\r\n", CHUNKED), 1022, 400),
    (lambda n: posted(b"0\r\n" + b"\r\n".join([b"A: x"] * n) + b"\r\n\r\n", CHUNKED), 100, 431),
    (lambda n: posted(b"0\r\n" + sized(n, b"A: ") + b"\r\n\r\n", CHUNKED), 8192, 431),
], ids=["request line", "request line without end", "header", "headers", "headers after the longest line", "count",
        "body", "chunk", "chunks", "chunk line", "count of trailers", "trailer"])  # fmt: skip
def test_each_limit_is_kept_to_the_byte_however_the_bytes_arrive(make, limit, status):
    for n, expected in (limit, "request"), (limit + 1, status):
        data = make(n)
        head, tail = data[:-40], data[-40:]
        for pieces in [data], [head, *bytewise(tail)], [data[i : i + 997] for i in range(0, len(data), 997)]:
            (got,) = parse(*pieces)
            assert ("request" if isinstance(got, Request) else got) == expected, (n, len(pieces))


@pytest.mark.parametrize("data, status", [
    (b"G" * 8193, 414),
    (b"GET /a HTTP/2.0\r\n", 505),
    (b"GET /a\r\n", 400),
    (b"GET /a HTTP/1.1\r\n" + b"A: x\r\n" * 3000, 431),
    (b"GET /a HTTP/1.1\r\nA:" + b"x" * 17_000, 431),
    (b"GET /\0", 400),
    (posted(b"", b"Content-Length: 1048577", b"Expect: 100-continue"), 413),
    (posted(b"1;" + b"x" * 1100, CHUNKED), 400),
    (posted(b"0\r\nA:" + b"x" * 17_000, CHUNKED), 431),
], ids=brief)  # fmt: skip
def test_what_is_wrong_already_is_refused_before_its_end(data, status):
    assert parse(data) == [status]


SEEDS = [
    get(b"Accept: */*"), get(b"Connection: close"), b"GET http://h:80/%41?a=%42 HTTP/1.1\r\nHost: [::1]\r\n\r\n",
    posted(b'{"name": "x"}', b"Content-Length: 13", b"Content-Type: application/json"),
    posted(b"3;a=b\r\nabc\r\n0\r\nT: x\r\n\r\n", CHUNKED), posted(b"", b"Content-Length: 0", b"Expect: 100-continue"),
    b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
]  # fmt: skip
GRAINS = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b";", b",", b"%", b"%00", b"/", b"?", b"#", b"*", b"0", b"9" * 20,
    b"-1", b"\xff", b"\x80", b"HTTP/1.1", b"HTTP/9.9", b"Host: h\r\n", b"Content-Length: 5\r\n", b"Content-Length: 99999999\r\n",
    CHUNKED + b"\r\n", b"Transfer-Encoding: gzip\r\n", b"Expect: x\r\n", b"x" * 9000, b"A: x\r\n" * 120, b"0\r\n\r\n",
]  # fmt: skip
REFUSALS = {400, 411, 413, 414, 417, 431, 501, 505}


def mutated(seed):
    chance = random.Random(seed)
    data = b"".join(chance.choice(SEEDS) for _ in range(chance.randint(1, 3)))
    for _ in range(chance.randint(1, 4)):
        i = chance.randrange(len(data) + 1)
        k = i + chance.choice([0, 0, 1, 2, 10])
        data = data[:i] + chance.choice([*GRAINS, b"", data[i:k] * 2, bytes([chance.randrange(256)])]) + data[k:]
    return data


def test_mutated_requests_are_taken_or_refused_the_same_however_they_arrive():
    refused = 0
    for seed in range(4000):
        data, chance = mutated(seed), random.Random(seed)
        whole = parse(data)
        cuts = sorted(chance.sample(range(len(data) + 1), min(len(data), chance.randint(1, 30))))
        pieces = [data[i:k] for i, k in zip([0, *cuts], [*cuts, len(data)])]
        again = parse(*pieces)
        assert [r for r in whole if isinstance(r, Request)] == [r for r in again if isinstance(r, Request)], data
        for out in whole, again:
            assert all(isinstance(r, Request) for r in out[:-1]), data
            assert all(isinstance(r, Request) or r in REFUSALS for r in out), (data, out)
        assert whole[-1:] == again[-1:] or {*map(type, (whole + [0])[-1:] + (again + [0])[-1:])} == {int}, data
        refused += bool(whole) and not isinstance(whole[-1], Request)
    assert 1000 < refused < 3900


class WatchedServer(taskserver.Server):
    """A server that knows which sockets its connections had."""

    def __init__(self, application, tls=None):
        self.sockets = []
        super().__init__(("127.0.0.1", 0), application, tls)

    def get_request(self):
        sock, address = super().get_request()
        self.sockets.append(sock)
        return sock, address

    def open_connections(self):
        return sum(sock.fileno() >= 0 for sock in self.sockets)

    def client(self, **options):
        return Client(self.server_port, **options)


@contextlib.contextmanager
def serving(application, certificate=None):
    """Serve an application in a thread of this process."""
    server = WatchedServer(application)
    if certificate:
        taskserver.use_tls(server, *certificate)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="serve", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        application.store.stop()
        server.shutdown(0.5)
        thread.join(LONG)
        server.server_close()


@pytest.fixture
def server(application):
    with serving(application) as server:
        yield server


class Client:
    """One connection to a server, and its answers as they come."""

    def __init__(self, port, host="127.0.0.1", receive_buffer=None):
        self.socket = socket.socket()
        self.socket.settimeout(LONG)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)
        return self

    def ask(self, method, target, body=b"", *lines, version="1.1"):
        """Send a request and return its answer."""
        self.send(raw(method, target, body, *lines, version=version))
        return self.answer(method)

    def answer(self, method="GET"):
        """Return the next answer, None at the end of the connection."""
        line = self.file.readline()
        if not line:
            return None
        version, status, _ = line.split(b" ", 2)
        assert version == b"HTTP/1.1" and line.endswith(b"\r\n")
        headers = http.client.parse_headers(self.file)
        if method == "HEAD" or status in (b"100", b"204"):
            return Answer(int(status), headers, b"")
        length = int(headers["Content-Length"])
        body = self.file.read(length)
        assert len(body) == length
        return Answer(int(status), headers, body)

    def says(self, seconds):
        """Return whether something arrives within so many seconds."""
        return bool(select.select([self.socket], [], [], seconds)[0])

    def ended(self):
        """Return whether the server ends the connection without another byte."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True

    def vanish(self):
        """Reset the connection."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.__exit__()


def raw(method, target, body=b"", *lines, version="1.1"):
    """Return a request as bytes."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    head = [f"{method} {target} HTTP/{version}", "Host: localhost"]
    if method == "POST":
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, *lines, "", ""]).encode("latin-1") + body


def test_a_task_is_created_and_polled_to_its_end(server):
    with server.client() as client:
        created = client.ask("POST", "/create-echo", {"name": "x", "result": [1, "é"]})
        assert created.status == 201
        polled = client.ask("GET", created.headers["Location"] + "?wait=30")
        assert polled.json["status"] == "completed" and polled.json["result"] == [1, "é"]


def test_every_answer_bears_the_headers_that_all_bear(server):
    with server.client() as client:
        for method, target, body in [("GET", "/healthz", b""), ("POST", "/create-echo", {"name": "x"}), ("PUT", "/", b""),
                                     ("GET", "/x", b""), ("OPTIONS", "/", b""), ("HEAD", "/", b""), ("POST", "/create-echo", b""),
                                     ("GET", "/%zz", b"")]:  # fmt: skip
            answer = client.ask(method, target, body)
            assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Content-Type-Options"] == "nosniff"
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", answer.headers["Date"])
            assert (answer.headers["Content-Length"] is None) == (answer.status == 204)
            if answer.status >= 400:
                assert list(answer.json) == ["error"] and answer.headers["Content-Type"] == "application/json"
        assert answer.status == 400 and answer.headers["Connection"] == "close" and client.ended()


def test_head_is_answered_like_get_without_the_body(server):
    with server.client() as client:
        for target in "/", "/healthz", "/openapi.json", "/tasks", f"/poll-echo/{uuid.uuid4()}", "/x":
            got, head = client.ask("GET", target), client.ask("HEAD", target)
            assert head.status == got.status
            assert {k: v for k, v in head.headers.items() if k != "Date"} == {k: v for k, v in got.headers.items() if k != "Date"}


def test_pipelined_requests_are_answered_in_their_order(server, gate):
    with server.client() as client, server.client() as other:
        first = client.ask("POST", "/create-gate", {"name": "x"}).json
        path = f"/poll-gate/{first['id']}"
        sent = [raw("GET", path + "?wait=30")]
        for n in range(30):
            sent += [raw("POST", "/create-echo", {"name": str(n)}), raw("GET", "/tasks?limit=1"), raw("GET", f"/{n}")]
        client.send(b"".join(sent))
        gate.wait_for()
        assert other.ask("GET", "/healthz").status == 200
        gate.opened.set()
        assert client.answer().json["status"] == "completed"
        for n in range(30):
            created, listed, refused = client.answer(), client.answer(), client.answer()
            assert (created.status, created.json["name"]) == (201, str(n))
            assert [record["name"] for record in listed.json["tasks"]] == [str(n)]
            assert refused.status == 404


@pytest.mark.parametrize("version, lines, stays", [
    ("1.1", [], True), ("1.1", ["Connection: keep-alive"], True), ("1.1", ["Connection: x, CLOSE"], False),
    ("1.1", ["Connection: x", "Connection: close"], False), ("1.1", ["Connection: closed"], True),
    ("1.0", [], False), ("1.0", ["Connection: Keep-Alive"], True), ("1.0", ["Connection: keep-alive, close"], False),
])  # fmt: skip
def test_a_connection_stays_or_ends_as_its_client_wishes(server, version, lines, stays):
    with server.client() as client:
        answer = client.ask("GET", "/healthz", b"", *lines, version=version)
        assert answer.status == 200
        said = {"1.1": None, "1.0": "keep-alive"}[version] if stays else "close"
        assert answer.headers["Connection"] == said
        if stays:
            assert client.ask("GET", "/healthz").status == 200
        else:
            assert client.send(raw("GET", "/healthz")).ended()


def test_100_continue_is_said_when_the_request_is_accepted_and_its_body_awaited(server):
    body = b'{"name": "x"}'
    head = raw("POST", "/create-echo", body, "Expect: 100-continue")[: -len(body)]
    with server.client() as client:
        for _ in range(2):
            client.send(head)
            assert client.answer().status == 100
            assert not client.says(0.05)
            client.send(body)
            assert client.answer().status == 201
        client.send(head + body)
        assert client.answer().status == 201  # no 100: the body was there
    with server.client() as client:
        client.send(raw("POST", "/create-echo", b"", "Expect: 100-continue", CHUNKED.decode()).replace(b"Content-Length: 0\r\n", b""))
        assert client.answer().status == 100
        client.send(b"d\r\n" + body + b"\r\n0\r\n\r\n")
        assert client.answer().status == 201


@pytest.mark.parametrize("target, lines, version, status", [
    ("/nowhere", [], "1.1", 404), ("/healthz", [], "1.1", 405), ("/create-echo", ["Content-Encoding: gzip"], "1.1", 415),
    ("/create-echo", ["Content-Length: 9"], "1.1", 400), ("/create-echo", [], "1.0", None),
])  # fmt: skip
def test_no_100_continue_for_what_is_refused_nor_to_http_1_0(server, target, lines, version, status):
    body = b'{"name": "x"}'
    with server.client() as client:
        client.send(raw("POST", target, body, "Expect: 100-continue", *lines, version=version)[: -len(body)])
        if status is None:
            assert not client.says(0.1)
            client.send(body)
        assert client.answer().status == (status or 201)
        assert client.send(get()).ended()  # the body that was not sent is never taken for a request


def test_a_body_is_never_taken_for_a_request(server):
    inner = raw("POST", "/create-echo", {"name": "smuggled"})
    with server.client() as client:
        for method, target, status in ("GET", "/healthz", 200), ("PUT", "/nowhere", 404), ("DELETE", "/healthz", 405):
            client.send(raw(method, target, b"", f"Content-Length: {len(inner)}") + inner)
            assert client.answer().status == status
        assert client.ask("GET", "/tasks").json == {"tasks": []}
    for lines in ["Transfer-Encoding: chunked", "Content-Length: 5"], ["Content-Length: 0", "Content-Length: 5"], ["Transfer-Encoding: x"]:
        with server.client() as client:
            client.send(raw("PUT", "/healthz", b"", *lines) + b"0\r\n\r\n" + inner)
            assert client.answer().status in (400, 501)
            assert client.ended()
    with server.client() as client:
        assert client.ask("GET", "/tasks").json == {"tasks": []}


def test_a_body_cut_short_makes_no_task(server):
    with server.client() as client:
        client.send(raw("POST", "/create-echo", {"name": "cut"})[:-1])
        client.socket.shutdown(socket.SHUT_WR)
        assert client.ended()
    assert eventually(lambda: server.open_connections() == 0)
    with server.client() as client:
        assert client.ask("GET", "/tasks").json == {"tasks": []}


@pytest.mark.parametrize("head, status", [
    (b"POST /create-echo HTTP/1.1\r\nHost: h\r\nContent-Length: 50000000\r\n\r\n", 413),
    (b"POST /create-echo HTTP/1.1\r\nHost: h\r\n" + CHUNKED + b"\r\n\r\n2faf080\r\n", 413),
    (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n", 414),
    (b"nonsense\r\n\r\n", 400),
], ids=brief)  # fmt: skip
def test_a_client_gets_its_refusal_even_when_it_is_still_sending(server, head, status):
    with server.client() as client:
        client.send(head)
        for _ in range(160):  # more than the buffers of both ends hold
            client.send(b"x" * 65_536)
        answer = client.answer()
        assert answer.status == status and answer.headers["Connection"] == "close"
        assert client.ended()


def patient(monkeypatch, **seconds):
    """Shorten the time that a phase of a connection may take."""
    for phase, value in seconds.items():
        assert phase in taskserver.PHASE_SECONDS
        monkeypatch.setitem(taskserver.PHASE_SECONDS, phase, value)


def test_the_phases_have_the_agreed_seconds():
    agreed = {"header": 10, "body": 20, "answer": 20, "idle": 75}
    assert {phase: taskserver.PHASE_SECONDS[phase] for phase in agreed} == agreed


@pytest.mark.parametrize("begin", [
    b"GET /healthz HTTP/1.1\r\nA: ",
    b"POST /create-echo HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n",
    b"POST /create-echo HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n" + CHUNKED + b"\r\n\r\n5000\r\n",
], ids=["header", "body", "chunked body"])  # fmt: skip
def test_a_client_that_drips_is_cut_after_one_deadline_over_the_whole(server, monkeypatch, begin):
    patient(monkeypatch, header=0.3, body=0.3)
    with server.client() as client:
        begun = time.monotonic()
        client.send(begin)
        while not client.says(0.05):
            client.send(b"x")
            assert time.monotonic() - begun < LONG
        assert client.answer().status == 408
        assert client.ended()
        assert 0.25 < time.monotonic() - begun < 5
    assert eventually(lambda: server.open_connections() == 0)


def test_clients_that_say_nothing_are_closed_without_an_answer(server, monkeypatch):
    patient(monkeypatch, header=0.2, idle=0.3)
    with server.client() as silent, server.client() as idle:
        assert idle.ask("GET", "/healthz").status == 200
        assert silent.ended() and idle.ended()
    assert eventually(lambda: server.open_connections() == 0)


def test_an_idle_connection_is_kept_and_a_later_request_has_its_own_deadline(server, monkeypatch):
    patient(monkeypatch, header=0.3)
    with server.client() as client:
        for _ in range(3):
            assert client.ask("GET", "/healthz").status == 200
            assert not client.says(0.2)
        client.send(b"GET /healthz HTTP/1.1\r\n")
        assert client.answer().status == 408


def test_a_client_that_never_reads_is_cut(server, monkeypatch, application):
    patient(monkeypatch, answer=0.4)
    record = outcome(application, lambda payload, report: "x" * (MIB - 2))
    request = raw("GET", f"/poll-{record['type']}/{record['id']}")
    with server.client(receive_buffer=4096) as client:
        client.send(request * 20)
        assert eventually(lambda: server.open_connections() == 1) and eventually(lambda: server.open_connections() == 0)
        received = 0
        with contextlib.suppress(ConnectionError):
            while True:
                piece = client.socket.recv(65_536)
                received += len(piece)
                if not piece:
                    break
        assert received < 20 * MIB


def test_a_slow_reader_gets_a_result_of_1_mib_whole(server, application):
    record = outcome(application, lambda payload, report: "x" * (MIB - 2))
    with server.client(receive_buffer=4096) as client, server.client() as other:
        client.send(raw("GET", f"/poll-{record['type']}/{record['id']}") * 2)
        for _ in range(2):
            head = client.file.readline()
            assert head == b"HTTP/1.1 200 OK\r\n"
            length = int(http.client.parse_headers(client.file)["Content-Length"])
            body = b""
            while len(body) < length:
                body += client.file.read(min(50_000, length - len(body)))
                assert other.ask("GET", "/healthz").status == 200
            assert json.loads(body.decode())["result"] == "x" * (MIB - 2)


def test_clients_that_vanish_leave_nothing_behind(server, application, gate, caplog):
    record = create(application, "gate")
    whole = [raw("GET", f"/poll-gate/{record['id']}?wait=30"), raw("POST", "/create-echo", {"name": "x"}), raw("GET", "/") * 50]
    chance = random.Random(5)
    for n in range(150):
        client = server.client()
        data = whole[n % 3]
        client.send(data if n % 2 else data[: chance.randrange(len(data))])
        client.vanish() if n % 4 < 2 else client.__exit__()
    application.store.stop()
    with server.client() as client:
        assert client.ask("GET", "/healthz").status == 503
    assert eventually(lambda: len(server.sockets) == 151 and server.open_connections() == 0)
    assert "Traceback" not in caplog.text


def test_a_connection_that_waits_keeps_no_answer_and_no_request(server, application):
    record = final(application, create(application, "echo", result="x" * (MIB - 2)))
    asked = raw("GET", f"/poll-echo/{record['id']}"), raw("POST", "/create-echo", {"name": "x", "more": "x" * (MIB - 100)})
    tracemalloc.start()
    try:
        with contextlib.ExitStack() as stack:
            for n in range(20):
                assert stack.enter_context(server.client()).send(asked[n % 2]).answer().status in (200, 201)
            assert eventually(lambda: tracemalloc.get_traced_memory()[0] < 5 * MIB)
    finally:
        tracemalloc.stop()


def test_a_long_poll_is_answered_when_the_task_is_final(server, gate):
    with server.client() as client:
        record = client.ask("POST", "/create-gate", {"name": "x", "result": 5}).json
        gate.wait_for()
        client.send(raw("GET", f"/poll-gate/{record['id']}?wait=30"))
        assert not client.says(0.1)
        begun = time.monotonic()
        gate.opened.set()
        assert client.answer().json["result"] == 5
        assert time.monotonic() - begun < LONG / 3


def test_a_long_poll_ends_with_the_record_as_it_is(server, gate):
    with server.client() as client:
        record = client.ask("POST", "/create-gate", {"name": "x"}).json
        answer = client.ask("GET", f"/poll-gate/{record['id']}?wait=0.1")
        assert answer.status == 200 and answer.json["status"] == "pending"


def test_long_polls_hold_up_nobody(server, gate):
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(server.client())
        record = client.ask("POST", "/create-gate", {"name": "x"}).json
        polls = [stack.enter_context(server.client()) for _ in range(60)]
        for poll in polls:
            poll.send(raw("GET", f"/poll-gate/{record['id']}?wait=30"))
        begun = time.monotonic()
        for _ in range(50):
            assert client.ask("GET", f"/poll-gate/{record['id']}").json["status"] == "pending"
        assert time.monotonic() - begun < 5
        gate.opened.set()
        assert {poll.answer().json["status"] for poll in polls} == {"completed"}


def test_a_server_that_shuts_down_sends_the_answers_under_way(application, gate):
    with serving(application) as server:
        client, idle = server.client(), server.client()
        record = client.ask("POST", "/create-gate", {"name": "x"}).json
        assert idle.ask("GET", "/healthz").status == 200
        client.send(raw("GET", f"/poll-gate/{record['id']}?wait=30"))
        assert not client.says(0.05)
    with client, idle:
        assert client.answer().json["status"] == "pending"
        assert client.ended() and idle.ended()


def test_the_port_is_free_at_once(application):
    with serving(application) as server:
        port = server.server_port
        with server.client() as client:
            assert client.ask("GET", "/healthz").status == 200
    again = taskserver.Server(("127.0.0.1", port), application)
    again.server_close()


def test_a_burst_of_300_clients_is_answered(server):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(300)]
        for client in clients:
            client.send(raw("POST", "/create-echo", {"name": "x"}))
        ids = {client.answer().json["id"] for client in clients}
        assert len(ids) == 300
    assert eventually(lambda: server.open_connections() == 0)


def test_no_thread_for_a_request_delays_it_and_harms_nobody(server, application, gate, monkeypatch):
    record = create(application, "gate")
    gate.wait_for()
    with server.client() as client, server.client() as other:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
            client.send(raw("GET", f"/poll-gate/{record['id']}?wait=0.01"))
            assert not client.says(0.1)
            assert other.ask("GET", "/healthz").status == 200
        assert client.answer().json["status"] == "pending"


def test_mutated_requests_over_a_socket_get_an_answer_or_nothing(server):
    for seed in range(300):
        with server.client() as client:
            client.send(mutated(seed))
            client.socket.shutdown(socket.SHUT_WR)
            data = client.file.read()
        for line in re.findall(rb"HTTP/1\.1 (\d+)", data):
            assert line[:1] in b"1234" or line in (b"501", b"503", b"505"), data
        assert data[:9] in (b"", b"HTTP/1.1 ")
    assert eventually(lambda: server.open_connections() == 0)


def test_addresses_of_ipv6_are_served(application):
    try:
        server = taskserver.Server(("::1", 0), application)
    except OSError:
        pytest.skip("no IPv6 here")
    assert server.server_port
    server.server_close()


@linux
def test_more_clients_than_descriptors_make_no_busy_loop_and_it_recovers():
    import resource

    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    with Program(preexec_fn=few) as program, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(program.client()) for _ in range(100)]
        for client in clients:
            client.send(raw("GET", "/healthz"))
        served = [client for client in clients if client.says(0.02)]
        assert 20 < len(served) < 64
        assert "new connections have to wait" in program.log(wait_for="have to wait")

        def burnt():
            fields = pathlib.Path(f"/proc/{program.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = burnt()
        assert not select.select([client.socket for client in clients if client not in served], [], [], 0.7)[0]
        assert burnt() - before < 0.2
        for client in served:
            client.__exit__()
        for client in clients:
            if client not in served:
                assert client.answer().status == 200
                client.__exit__()
        assert program.ask("GET", "/healthz").status == 200
        assert program.log().count("have to wait") == 1


# ==== The core ends here ============================================================================


# -- 8. Running ------------------------------------------------------------------------------------


@contextlib.contextmanager
def logging_to(descriptor):
    """Have a logger write to a descriptor."""
    handler, logger = taskserver.LogHandler(descriptor), logging.Logger("test")  # noqa: LOG001 -- pytest is not to know it
    logger.addHandler(handler)
    try:
        yield logger, handler
    finally:
        logger.removeHandler(handler)
        handler.finish(LONG)


@contextlib.contextmanager
def pipe():
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                os.close(end)


def read_all(descriptor):
    data = b""
    while True:
        piece = os.read(descriptor, 1 << 16)
        data += piece
        if not piece:
            return data.decode("ascii")


def test_the_log_escapes_what_came_from_outside():
    with pipe() as (ends, end):
        with logging_to(end) as (logger, _):
            logger.warning("task %s: %s", 1, "a\nb\x1b[2J\r\0\x7f\x85\u2028é\ud800😀")
            try:
                raise ValueError("what\nit said")
            except ValueError:
                logger.exception("failed")
        os.close(end)
        text = read_all(ends)
    lines = text.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ WARNING task 1: a", lines[0])
    assert not set(text) - set(map(chr, range(32, 127))) - {"\n"}
    assert [line for line in lines if not line.startswith("    ")] == [lines[0], next(line for line in lines if "ERROR" in line)]
    assert "\\x1b[2J" in text and "\\xe9\\ud800\\U0001f600" in text and "it said" in text and "Traceback" in text


def test_a_line_that_cannot_be_composed_does_not_end_the_log():
    with pipe() as (far, end):
        with logging_to(end) as (logger, _):
            logger.warning("%d", "no number")
            try:
                raise Unspeakable
            except Unspeakable:
                logger.exception("failed")
            logger.warning("the last")
        os.close(end)
        text = read_all(far)
    assert "WARNING %d" in text and "ERROR failed" in text and "WARNING the last" in text


def test_a_log_that_nobody_reads_blocks_nobody_and_says_what_it_dropped():
    with pipe() as (far, end), logging_to(end) as (logger, handler), concurrent.futures.ThreadPoolExecutor(1) as pool:
        lines = taskserver.LogHandler.MAX_LINES * 2
        in_threads(1, lambda _: [logger.warning("%d %s", n, "x" * 50) for n in range(lines)])
        in_threads(1, lambda _: handler.finish(0.1))  # in vain, yet it returns
        reading = pool.submit(read_all, far)
        handler.finish(LONG)
        os.close(end)
        text = reading.result(LONG)
    numbers = [int(line.split()[2]) for line in text.splitlines() if "WARNING" in line]
    (dropped,) = re.findall(r"(\d+) lines of the log did not fit", text)
    assert numbers == sorted(numbers) and len(numbers) + int(dropped) == lines


def test_a_log_that_is_closed_stops_nobody():
    with pipe() as (far, end), logging_to(end) as (logger, _):
        os.close(far)
        for n in range(100):
            logger.warning("%d", n)


class Program:
    """A server in a process of its own."""

    def __init__(self, *flags, file=PROGRAM, port=0, stderr=None, token=None, **options):
        environment = dict(os.environ, PYTHONPATH=str(PROGRAM.parent), TASKSERVER_TOKEN=token or "")
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, str(file), "--port", str(port), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr or self.stderr, env=environment, **options)
        self.hello = [self.process.stdout.readline().decode() for _ in range(3)]
        found = re.search(r" on https?://\S+:(\d+)\b", self.hello[0])
        self.port = int(found.group(1)) if found else None

    def __enter__(self):
        if not self.port:
            log = self.log()
            self.__exit__()
            pytest.fail(f"it did not start: {self.hello} {log}")
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LONG)
        self.process.stdout.close()
        self.stderr.close()

    def client(self):
        return Client(self.port)

    def ask(self, method, target, body=b"", *lines):
        with self.client() as client:
            return client.ask(method, target, body, *lines)

    def log(self, wait_for=""):
        """Return what is in the log, once a text is there."""

        def read():
            self.stderr.seek(0)
            return self.stderr.read().decode()

        eventually(lambda: wait_for in read(), 10)
        return read()

    def stops(self, number):
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(LONG)


WAITING = '''
import os, sys, time, taskserver
application = taskserver.Application()

@application.task("wait")
def wait(payload, report):
    """Wait until a file appears, then leave a mark."""
    report(0.5, "begun")
    while not os.path.exists(payload["path"]):
        time.sleep(0.01)
    open(payload["path"] + "." + payload["name"], "w").close()

if __name__ == "__main__":
    taskserver.main(application)
'''


@pytest.fixture
def waiting(tmp_path):
    """Start a server with tasks that wait for a file."""
    (tmp_path / "waiting.py").write_text(WAITING)
    with contextlib.ExitStack() as stack:
        yield lambda *flags: stack.enter_context(Program(*flags, file=tmp_path / "waiting.py"))


def begin(program, path, name="one"):
    """Create a task that waits for a file; return its path once it runs."""
    created = program.ask("POST", "/create-wait", {"name": name, "path": str(path)})
    where = created.headers["Location"]
    assert eventually(lambda: program.ask("GET", where).json["message"] == "begun")
    return where


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_running_tasks_and_drops_waiting_ones(waiting, tmp_path, number):
    program = waiting("--workers", "1")
    running = begin(program, tmp_path / "go")
    for name in "two", "three":
        assert program.ask("POST", "/create-wait", {"name": name, "path": str(tmp_path / "go")}).status == 201
    with program.client() as poll, program.client() as client:
        poll.send(raw("GET", running + "?wait=30"))
        assert not poll.says(0.1)
        program.process.send_signal(number)
        assert poll.answer().json["status"] == "pending"  # woken
        health = client.ask("GET", "/healthz")
        assert (health.status, health.json) == (503, {"status": "stopping"})
        refused = client.ask("POST", "/create-wait", {"name": "x"})
        assert refused.status == 503 and "stopping" in refused.json["error"]
        assert client.ask("GET", running).json["status"] == "pending"
        (tmp_path / "go").write_text("")
        assert program.process.wait(LONG) == 0
    assert (tmp_path / "go.one").exists() and not (tmp_path / "go.two").exists()
    assert "2 waiting tasks" in program.log() and "Traceback" not in program.log()
    assert taskserver.Server(("127.0.0.1", program.port), Application()).server_close() is None  # the port is free


@posix
def test_a_task_that_hangs_is_left_after_the_grace(waiting, tmp_path):
    program = waiting("--grace", "0.2")
    begin(program, tmp_path / "never")
    begun = time.monotonic()
    assert program.stops(signal.SIGTERM) == 0
    assert 0.2 <= time.monotonic() - begun < 10
    assert "Traceback" not in program.log()


@posix
@pytest.mark.parametrize("first, second, status", [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGINT, 130)])
def test_a_second_signal_leaves_at_once(waiting, tmp_path, first, second, status):
    program = waiting("--grace", "1000")
    begin(program, tmp_path / "never")
    program.process.send_signal(first)
    assert "stopping" in program.log(wait_for="stopping")
    begun = time.monotonic()
    assert program.stops(second) == status
    assert time.monotonic() - begun < 5 and "Traceback" not in program.log()


@posix
def test_with_a_journal_waiting_tasks_stay_for_the_next_start(waiting, tmp_path, path):
    program = waiting("--workers", "1", "--db", path, "--grace", "0.2")
    running = begin(program, tmp_path / "go")
    later = program.ask("POST", "/create-wait", {"name": "two", "path": str(tmp_path / "go")}).headers["Location"]
    assert program.stops(signal.SIGTERM) == 0
    assert "1 waiting tasks stay" in program.log() and "memory" not in program.hello[2]
    (tmp_path / "go").write_text("")
    program = waiting("--workers", "1", "--db", path)
    assert program.ask("GET", later + "?wait=30").json["status"] == "completed"
    interrupted = program.ask("GET", running + "?wait=30").json
    assert interrupted["status"] == "failed" and interrupted["error"].startswith("interrupted: ")
    assert not (tmp_path / "go.one").exists() and (tmp_path / "go.two").exists()


@posix
def test_a_signal_under_load_tears_no_answer():
    statuses = []

    def load(program, begun, i):
        with contextlib.suppress(ConnectionError), program.client() as client:
            while True:
                answer = client.ask(*[("GET", "/tasks"), ("POST", "/create-task", {"name": "x", "seconds": 0})][i % 2])
                if answer is None:
                    return
                statuses.append(answer.status)
                begun.release()

    with Program("--grace", "1") as program:
        begun = threading.Semaphore(0)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(load, program, begun, i) for i in range(8)]
            for _ in range(200):
                assert begun.acquire(timeout=LONG)
            assert program.stops(signal.SIGTERM) == 0
            for client in clients:
                client.result(LONG)
        assert set(statuses) <= {200, 201, 503} and "Traceback" not in program.log()


@posix
def test_a_closed_stderr_stops_nobody():
    def close():
        os.close(0), os.close(2)

    with Program(preexec_fn=close) as program:
        for _ in range(3):
            record = program.ask("POST", "/create-task", {"name": "x", "seconds": 0}).json
            assert program.ask("GET", f"/poll-task/{record['id']}?wait=30").json["status"] == "completed"
        assert program.stops(signal.SIGTERM) == 0


@posix
def test_a_stdout_that_nobody_reads_stops_nobody(tmp_path):
    log = tmp_path / "log"
    with pipe() as (far, end), log.open("wb") as stderr:
        os.close(far)
        process = subprocess.Popen([sys.executable, str(PROGRAM), "--port", "0"], stdout=end, stderr=stderr)
    try:
        assert eventually(lambda: re.search(r"serving http://\S+:\d+", log.read_text()), 10), log.read_text()
        with Client(int(re.findall(r"serving http://\S+:(\d+)", log.read_text())[0])) as client:
            assert client.ask("GET", "/healthz").status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0 and "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait(LONG)


@posix
def test_a_full_stderr_that_nobody_reads_stops_nobody():
    with pipe() as (_, end):
        os.set_blocking(end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(end, b"x" * 4096)
        os.set_blocking(end, True)
        with Program("--verbose", stderr=end) as program, program.client() as client:
            for _ in range(20):
                client.send(raw("GET", "/healthz") * 100)
                assert {client.answer().status for _ in range(100)} == {200}
            assert client.ask("POST", "/create-task", {"name": "x", "seconds": 0}).status == 201
            begun = time.monotonic()
            assert program.stops(signal.SIGTERM) == 0
            assert time.monotonic() - begun < 10


# -- 9. Monitoring and retention -------------------------------------------------------------------


def test_healthz_counts_what_there_is(application, gate):
    application.pool.max_workers = 2
    empty = ask(application, "GET", "/healthz")
    none = {"pending": 0, "completed": 0, "failed": 0}
    assert empty.status == 200
    assert empty.json == {
        "status": "ok",
        "waiting": 0,
        "running": 0,
        "completed": 0,
        "failed": 0,
        "oldest_waiting": None,
        "types": ["gate", "echo"],
        "tasks": {"echo": none, "gate": none},
    }
    outcome(application, fail)
    final(application, create(application, "echo"))
    for _ in range(5):
        create(application, "gate")
    gate.wait_for(2)
    counted = ask(application, "GET", "/healthz").json
    keys = "waiting", "running", "completed", "failed"
    assert [counted[key] for key in keys] == [3, 2, 1, 1]
    assert counted["tasks"]["gate"] == {**none, "pending": 5}
    assert counted["tasks"]["echo"] == {**none, "completed": 1}
    assert counted["tasks"][counted["types"][-1]] == {**none, "failed": 1}


def test_healthz_says_for_how_long_the_oldest_task_has_waited(application, gate):
    application.pool.max_workers = 1
    for _ in range(3):
        create(application, "gate")
    gate.wait_for()
    begun = time.time()
    seconds = ask(application, "GET", "/healthz").json["oldest_waiting"]
    assert 0 <= seconds < LONG
    assert eventually(lambda: time.time() > begun + 0.01)
    assert ask(application, "GET", "/healthz").json["oldest_waiting"] > seconds
    gate.opened.set()
    gate.wait_for(2)
    assert ask(application, "GET", "/healthz").json["oldest_waiting"] is None


def test_healthz_tells_those_without_the_token_its_status_alone(application):
    application.checks.append(taskserver.check_token("secret"))
    answer = ask(application, "GET", "/healthz")
    assert (answer.status, answer.json) == (200, {"status": "ok"})
    trusted = ask(application, "GET", "/healthz", authorization="Bearer secret")
    assert trusted.json["waiting"] == 0


def test_healthz_says_when_the_server_stops(application):
    application.store.stop()
    answer = ask(application, "GET", "/healthz")
    assert (answer.status, answer.json) == (503, {"status": "stopping"})


DONE = RECORD._replace(status="completed", finished_at=1700000001.0, result=b"[1]", payload=None)


def listed(application, **query):
    """Return the ids that /tasks lists."""
    words = "&".join(f"{key}={value}" for key, value in query.items())
    answer = ask(application, "GET", f"/tasks?{words}")
    assert answer.status == 200, answer
    return [record["id"] for record in answer.json["tasks"]]


@pytest.mark.parametrize(
    "query, count",
    [
        ("", 50),
        ("?limit=0", 0),
        ("?limit=1", 1),
        ("?limit=500", 500),
        ("?limit=501", 500),
        ("?limit=0050", 50),
        ("?limit=" + "9" * 4000, 500),
        ("?x=1", 50),
    ],
    ids=brief,
)
def test_tasks_lists_the_newest_without_results(application, query, count):
    for n in range(502):
        application.store.add(DONE._replace(id=str(n)))
    records = ask(application, "GET", "/tasks" + query).json["tasks"]
    assert [record["id"] for record in records] == [str(501 - n) for n in range(count)]
    assert all(list(record) == [key for key in KEYS if key != "result"] for record in records)


@pytest.mark.parametrize(
    "limit", ["", "-1", "%2B1", "1.5", "x", "1_0", "%D9%A1", "1&limit=1", "%201", "1e2"]
)
def test_a_limit_that_is_no_plain_number_is_400(application, limit):
    assert ask(application, "GET", "/tasks?limit=" + limit).status == 400


def test_tasks_can_be_filtered_by_status_and_type(application, gate):
    failed = DONE._replace(status="failed", result=None, error="E")
    kinds = [DONE, failed, DONE._replace(type="gate"), RECORD, DONE, DONE]
    for n, record in enumerate(kinds):
        application.store.add(record._replace(id=str(n)))
    assert listed(application, status="completed") == ["5", "4", "2", "0"]
    assert listed(application, status="failed") == ["1"]
    assert listed(application, status="pending") == ["3"]
    assert listed(application, type="gate") == ["2"]
    assert listed(application, type="gate", status="failed") == []
    assert listed(application, type="echo", status="completed", limit=2) == ["5", "4"]
    assert listed(application, limit=3) == ["5", "4", "3"]


def test_a_type_that_is_registered_no_more_can_be_asked_for_while_there_are_such_tasks(application):
    application.store.add(DONE._replace(id="0", type="former"))
    assert listed(application, type="former") == ["0"]


@pytest.mark.parametrize(
    "query, advice",
    [
        ("status=done", "failed"),
        ("status=", "failed"),
        ("status=FAILED", "failed"),
        ("status=failed&status=failed", "status"),
        ("type=none", "echo, gate"),
        ("type=Echo", "echo, gate"),
        ("type=echo&type=gate", "type"),
    ],
)
def test_a_filter_that_can_match_nothing_is_400_and_says_what_there_is(application, query, advice):
    answer = ask(application, "GET", "/tasks?" + query)
    assert answer.status == 400 and advice in answer.json["error"]


def test_what_has_outlived_its_time_goes_by_itself(application):
    application.store.keep = 0
    with serving(application) as server, server.client() as client:
        where = client.ask("POST", "/create-echo", {"name": "x"}).headers["Location"]
        assert eventually(lambda: client.ask("GET", where).status == 404)


def test_payloads_and_results_are_bounded_and_the_refusal_names_the_flag(application, gate):
    def size(n):  # of a payload that makes a body of so many bytes
        return "x" * (n - len(json.dumps({"name": "sample", "result": ""})))

    application.store.max_memory = 1000
    application.store.keep = 60
    waiting = create(application, "gate", result=size(700))
    body = {"name": "sample", "result": size(301)}
    refused = ask(application, "POST", "/create-gate", body)
    assert refused.status == 503 and 0 < int(refused.headers["Retry-After"]) <= 60
    assert "--max-memory" in refused.json["error"] and "--max-tasks" not in refused.json["error"]
    assert listed(application) == [waiting["id"]]
    create(application, "gate", result=size(300))
    gate.opened.set()
    assert eventually(lambda: listed(application, status="pending") == [])  # two results now
    assert ask(application, "POST", "/create-gate", body).status == 503
    application.store.keep = 0  # now they give way
    assert ask(application, "POST", "/create-gate", body).status == 201


# -- 10. Durability --------------------------------------------------------------------------------


class ObedientJournal(taskserver.Journal):
    """A journal that a test can hold up, break, or look into."""

    def __init__(self, *records):
        self.records = {record.id: record for record in records}
        self.calls = []  # "save" or "delete", and an id
        self.refuse = lambda record: False  # whether it can never take a record
        self.error = self.late_error = None  # instead of saving; after it has saved
        self.delete_error = None
        self.writable, self.deletable = threading.Event(), threading.Event()
        self.writable.set()
        self.deletable.set()
        self.asked = threading.Semaphore(0)  # to save
        self.asked_to_delete = threading.Semaphore(0)

    def load(self):
        return sorted(self.records.values(), key=lambda record: record.sequence)

    def save(self, record):
        self.asked.release()
        assert self.writable.wait(LONG)
        if self.refuse(record):
            raise taskserver.RecordRefused("this disk takes no such thing")
        if self.error:
            raise self.error
        self.calls.append(("save", record.id))
        self.records[record.id] = record
        if self.late_error:
            raise self.late_error

    def delete(self, ids):
        self.asked_to_delete.release()
        assert self.deletable.wait(LONG)
        if self.delete_error:
            raise self.delete_error
        for id in ids:
            self.calls.append(("delete", id))
            self.records.pop(id, None)


@pytest.fixture
def journal(application):
    """A journal of the application."""
    journal = application.store.journal = ObedientJournal()
    yield journal
    journal.error = journal.late_error = None
    journal.writable.set()
    journal.deletable.set()
    application.store.stop()


def forget_asked(journal):
    while journal.asked.acquire(blocking=False):
        pass


def evict(store):
    """Drop what has outlived its time, as a server does."""
    while store.evict() or store.delete_left():
        pass


def test_a_create_is_answered_once_its_record_is_on_disk_and_nobody_else_waits(
    application, journal, gate
):
    before = create(application, "gate")
    gate.wait_for()
    forget_asked(journal)
    journal.writable.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        creating = pool.submit(create, application, "echo")
        assert journal.asked.acquire(timeout=LONG) and not creating.done()
        assert poll(application, before)["status"] == "pending"
        assert listed(application) == listed(application, type="gate") == [before["id"]]
        assert ask(application, "GET", "/healthz").status == 200
        evict(application.store)
        assert not creating.done()
        journal.writable.set()
        assert creating.result(LONG)["id"] in journal.records


def test_the_start_of_a_task_is_on_disk_before_it_runs_unless_it_may_run_again(
    application, journal
):
    seen = {}

    def look(payload, report):
        (record,) = [r for r in journal.records.values() if r.name == payload["name"]]
        seen[record.name] = record.started_at

    application.task("once")(look)
    application.task("again", rerun=True)(look)
    for name in "once", "again":
        final(application, create(application, name, name))
    assert seen["once"] is not None and seen["again"] is None
    assert [record.status for record in journal.records.values()] == ["completed"] * 2


def test_a_final_state_is_seen_once_it_is_on_disk(application, journal, gate):
    record = create(application, "gate", result=5)
    gate.wait_for()
    forget_asked(journal)
    journal.writable.clear()
    gate.opened.set()
    assert journal.asked.acquire(timeout=LONG)
    assert poll(application, record)["status"] == "pending"
    journal.writable.set()
    assert final(application, record)["result"] == 5


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left"), taskserver.JournalError("broken", 5), RuntimeError()],
    ids=brief,
)
def test_a_journal_that_fails_refuses_creates_and_loses_no_final_state(
    application, journal, gate, caplog, error
):
    record = create(application, "gate", result=5)
    gate.wait_for()
    journal.error = error
    refused = ask(application, "POST", "/create-echo", {"name": "x"})
    assert refused.status == 503 and refused.headers["Retry-After"]
    assert "journal" in refused.json["error"]
    health = ask(application, "GET", "/healthz")
    assert (health.status, health.json) == (503, {"status": "journal failing"})
    assert listed(application) == [record["id"]] and application.pool.counts() == (0, 1)
    forget_asked(journal)
    gate.opened.set()
    for _ in range(2):
        assert journal.asked.acquire(timeout=LONG)  # it is tried, and tried again
    assert poll(application, record)["status"] == "pending"
    journal.error = None
    assert final(application, record)["result"] == 5
    assert ask(application, "GET", "/healthz").json["status"] == "ok"
    assert final(application, create(application, "echo", result=1))["result"] == 1
    assert "Traceback" not in caplog.text and caplog.text.count("the journal fails") == 1


def test_a_final_state_that_cannot_be_saved_is_tried_on_while_the_server_stops(
    application, journal, gate
):
    record = create(application, "gate", result=5)
    gate.wait_for()
    journal.error = OSError()
    forget_asked(journal)
    gate.opened.set()
    assert journal.asked.acquire(timeout=LONG)
    application.stop()
    assert poll(application, record)["status"] == "pending"
    assert application.pool.counts() == (0, 1)
    journal.error = None
    application.pool.join(LONG)
    assert poll(application, record)["result"] == 5


def test_a_create_whose_saving_failed_leaves_nothing_behind_though_it_was_written(
    application, journal
):
    def create_it():
        body = {"name": "x", "result": 1}
        return ask(application, "POST", "/create-echo", body, idempotency_key=key)

    key = str(uuid.uuid4())
    journal.late_error = ConnectionError("nobody knows whether that was committed")
    for _ in range(2):
        assert create_it().status == 503 and list(journal.records) == [key]
    evict(application.store)
    assert journal.records == {} and listed(application) == []
    assert create_it().status == 503
    journal.late_error = None  # the client tries once more, and its record replaces what is left
    created = create_it()
    assert created.status == 201
    evict(application.store)
    assert final(application, created.json)["result"] == 1
    assert [record.status for record in journal.records.values()] == ["completed"]


def test_what_is_saved_and_said_to_have_failed_is_saved_again(application, journal, gate):
    record = create(application, "gate", result=3)
    gate.wait_for()
    journal.late_error = ConnectionError("nobody knows whether that was committed")
    gate.opened.set()
    assert eventually(lambda: journal.calls.count(("save", record["id"])) >= 4)
    assert poll(application, record)["status"] == "pending"
    journal.late_error = None
    assert final(application, record)["result"] == 3
    assert [record.result for record in journal.records.values()] == [b"3"]


def test_a_task_that_the_journal_can_never_take_is_refused_alone(application, journal):
    journal.refuse = lambda record: "\0" in record.name
    key = str(uuid.uuid4())
    body = {"name": "a\0b"}
    refused = ask(application, "POST", "/create-echo", body, idempotency_key=key)
    assert refused.status == 400
    assert "this disk takes no such thing" in refused.json["error"]
    assert listed(application) == [] and application.pool.counts() == (0, 0)
    assert ask(application, "GET", "/healthz").json["status"] == "ok"
    again = ask(application, "POST", "/create-echo", {"name": "ab"}, idempotency_key=key)
    assert again.status == 201  # the key is free
    assert final(application, again.json)["status"] == "completed"


def test_an_outcome_that_the_journal_can_never_take_becomes_a_failure_that_says_so(
    application, journal
):
    journal.refuse = lambda record: record.result == b'"bad"'
    record = final(application, create(application, "echo", result="bad"))
    consistent(record)
    assert record["status"] == "failed"
    assert "this disk takes no such thing" in record["error"]
    assert journal.records[record["id"]].status == "failed"
    assert ask(application, "GET", "/healthz").json["status"] == "ok"
    journal.refuse = lambda record: record.status != "pending"
    record = final(application, create(application, "echo", result="good"))
    assert "this disk takes no such thing" in record["error"]  # as long as this server lives


def test_a_task_whose_start_the_journal_can_never_take_is_not_run(application, journal, gate):
    def is_start(record):
        return record.status == "pending" and record.started_at is not None

    journal.refuse = is_start
    record = final(application, create(application, "gate"))
    assert record["status"] == "failed" and not gate.begun.acquire(blocking=False)


def test_a_lost_journal_begins_nothing_more(application, journal, gate):
    losses = []
    application.store.journal_lost = lambda reason: (losses.append(reason), application.stop())
    application.pool.max_workers = 1
    running = create(application, "gate", result=1)
    waiting = create(application, "gate")
    gate.wait_for()
    journal.error = taskserver.JournalLost("somebody else has the lock")
    refused = ask(application, "POST", "/create-echo", {"name": "x"})
    assert refused.status == 503 and losses == ["somebody else has the lock"]
    journal.error = None  # whatever it says now: it is not asked any more
    journal.calls.clear()
    gate.opened.set()
    application.pool.join(LONG)
    for record in running, waiting:
        assert poll(application, record)["status"] == "pending"
    assert journal.calls == [] and not gate.begun.acquire(blocking=False)
    application.store.keep = 0
    evict(application.store)
    assert journal.calls == []


# What is evicted


def test_evicted_records_are_deleted_from_the_journal(application, journal):
    record = final(application, create(application, "echo"))
    evict(application.store)
    assert list(journal.records) == [record["id"]]
    application.store.keep = 0
    evict(application.store)
    assert journal.records == {}


def test_a_journal_that_cannot_delete_stops_nothing_and_is_asked_again(
    application, journal, caplog, monkeypatch
):
    gone = final(application, create(application, "echo"))
    application.store.keep = 0
    journal.delete_error = RuntimeError("out of order")
    evict(application.store)
    assert ask(application, "GET", f"/poll-echo/{gone['id']}").status == 404
    assert ask(application, "GET", "/healthz").json["status"] == "ok"
    evict(application.store)  # not at once
    assert caplog.text.count("has not deleted 1 records") == 1
    assert caplog.text.count("out of order") == 1 and "Traceback" not in caplog.text
    application.store.keep = 60
    kept = final(application, create(application, "echo"))
    journal.delete_error = None
    monkeypatch.setattr(application.store, "_delete_at", 0)  # it is time to try again
    evict(application.store)
    assert list(journal.records) == [kept["id"]]


def test_a_server_deletes_by_itself_in_bounded_pieces_and_no_create_waits_for_that(application):
    journal = application.store.journal = ObedientJournal()
    pieces, real = [], journal.delete
    journal.delete = lambda ids: (pieces.append(len(ids)), real(ids))
    for n in range(2500):
        application.store.add(DONE._replace(id=str(n)))
    journal.deletable.clear()
    application.store.keep, application.store.max_tasks = 0, 2500
    with serving(application) as server, server.client() as client:
        assert journal.asked_to_delete.acquire(timeout=LONG)
        created = client.ask("POST", "/create-echo", {"name": "x"})
        assert created.status == 201
        journal.deletable.set()
        assert eventually(lambda: journal.records.keys() <= {created.json["id"]})
    assert max(pieces) <= 1000 and sum(pieces) >= 2500


def test_a_create_in_a_full_store_makes_room_without_waiting_for_the_journal(application, journal):
    application.store.max_tasks = 1
    final(application, create(application, "echo"))
    application.store.keep = 0
    journal.deletable.clear()
    final(application, create(application, "echo"))


def is_being_stored(application, id):
    try:
        application.store.find(id)
    except taskserver.Duplicate:
        return True
    return False


def test_a_key_that_comes_again_while_its_old_record_is_deleted_makes_a_record_that_stays(
    application, journal
):
    key = str(uuid.uuid4())

    def create_again(n):
        body = {"name": "x", "result": n}
        return ask(application, "POST", "/create-echo", body, idempotency_key=key)

    first = create_again(1)
    final(application, first.json)
    application.store.keep = 0
    journal.deletable.clear()
    journal.calls.clear()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        evicting = pool.submit(evict, application.store)
        assert journal.asked_to_delete.acquire(timeout=LONG)
        application.store.keep = 60
        creating = pool.submit(create_again, 2)
        assert eventually(lambda: is_being_stored(application, key))
        assert create_again(2).status == 409
        assert not creating.done() and journal.calls == []
        journal.deletable.set()
        evicting.result(LONG)
        assert creating.result(LONG).status == 201
    assert final(application, creating.result().json)["result"] == 2
    assert journal.calls[:2] == [("delete", key), ("save", key)]
    evict(application.store)
    assert journal.records[key].result == b"2"


def test_a_key_that_comes_again_before_its_old_record_is_deleted_replaces_it(application, journal):
    key = str(uuid.uuid4())
    first = ask(application, "POST", "/create-echo", {"name": "x"}, idempotency_key=key)
    final(application, first.json)
    application.store.keep = 0
    assert application.store.evict() == 1
    application.store.keep = 60
    again = ask(application, "POST", "/create-echo", {"name": "y"}, idempotency_key=key)
    assert again.status == 201
    final(application, again.json)
    evict(application.store)
    assert journal.records[key].name == "y" and ("delete", key) not in journal.calls


# The next start


def left_by_a_process():
    """Return what is in a journal after a process has ended while it had much to do."""
    ids = [str(uuid.UUID(int=n, version=4)) for n in range(7)]
    now = time.time()
    new = RECORD._replace(created_at=now - 100, payload=b'{"name": "x", "result": [7]}')
    records = [new._replace(id=id, name=id, sequence=n + 1) for n, id in enumerate(ids)]
    begun = {"started_at": now - 90}
    done = {**begun, "payload": None}
    completed = {**done, "status": "completed", "progress": 1.0}
    records[0] = records[0]._replace(**completed, finished_at=now - 50, result=b"[1]")
    records[1] = records[1]._replace(**done, status="failed", finished_at=now + 1e6, error="E")
    records[2] = records[2]._replace(**begun)
    records[3] = records[3]._replace(**begun, type="again")
    records[5] = records[5]._replace(type="gone")
    records[6] = records[6]._replace(**completed, finished_at=now - 80, result=b"[6]")
    return ids, records


def test_the_next_start_settles_what_the_last_process_left(application):
    ids, records = left_by_a_process()
    application.task("again", rerun=True)(echo)
    application.pool.max_waiting = 0
    journal = application.store.journal = ObedientJournal(*records)
    application.store.keep = 60
    taskserver.recover(application)
    types = ["echo", "echo", "echo", "again", "echo"]
    got = [poll(application, {"type": t, "id": id}, LONG) for t, id in zip(types, ids)]
    statuses = ["completed", "failed", "failed", "completed", "completed"]
    assert [record["status"] for record in got] == statuses
    assert [record["result"] for record in got] == [[1], None, None, [7], [7]]
    assert got[2]["error"].startswith("interrupted: ") and got[1]["error"] == "E"
    assert got[2]["started_at"] is not None
    for record in got[2:]:
        consistent(record)
    assert eventually(lambda: ids[5] in listed(application, status="failed"))
    assert journal.records[ids[5]].error.startswith("interrupted: ")
    evict(application.store)
    assert ask(application, "GET", f"/poll-echo/{ids[6]}").status == 404  # older than it is kept
    assert ids[6] not in journal.records
    assert journal.records[ids[2]].status == "failed"
    assert application.pool.counts() == (0, 0)


def test_a_journal_that_fails_at_the_start_keeps_nobody_from_serving(application, gate):
    ids, records = left_by_a_process()
    journal = application.store.journal = ObedientJournal(*records[:4])
    journal.error = OSError("no space")
    taskserver.recover(application)
    got = poll(application, {"type": "echo", "id": ids[2]})
    assert got["status"] == "pending" and got["started_at"] is not None
    assert eventually(lambda: ask(application, "GET", "/healthz").status == 503)
    journal.error = None
    got = poll(application, {"type": "echo", "id": ids[2]}, LONG)
    assert got["error"].startswith("interrupted: ")


def test_tasks_that_many_threads_created_have_the_same_order_after_a_restart(application, journal):
    in_threads(16, lambda i: [create(application, "echo", f"{i}-{n}") for n in range(25)])
    before = listed(application, limit=500)
    assert len(before) == 400
    assert eventually(lambda: listed(application, status="pending") == [])
    restarted = Application()
    taskserver.add_monitoring(restarted)
    restarted.store.journal = journal
    taskserver.recover(restarted)
    assert listed(restarted, limit=500) == before
    newest = restarted.store.add(RECORD._replace(id="new"))
    assert listed(restarted, limit=500) == ["new", *before][:500]
    assert newest.sequence > max(journal.records[id].sequence for id in before)


OWN_JOURNAL = '''
import os, sys, time, taskserver
application = taskserver.demo()

class Journal(taskserver.Journal):
    def load(self):
        """Do what the test says; wait until it lets this go on."""
        yield taskserver.Record("a" * 36, "loaded", "completed", "task", 1.0, 1.0, time.time(), 1.0)
        while sys.argv[-1].startswith("wait") and not os.path.exists(sys.argv[-1][4:]):
            time.sleep(0.01)
        exec(sys.argv[-1] if sys.argv[-1].startswith("raise ") else "")

    def save(self, record):
        if record.name == "lose it":
            raise taskserver.JournalLost("another server has the lock")

    def delete(self, ids):
        pass

if __name__ == "__main__":
    application.store.journal = Journal()
    taskserver.main(application, sys.argv[1:-1])
'''


@pytest.fixture
def own_journal(tmp_path):
    """A program with a journal of its own."""
    path = tmp_path / "own.py"
    path.write_text(OWN_JOURNAL)
    return path


def test_nobody_can_connect_before_the_journal_is_loaded_and_the_log_says_how_far_it_is(
    own_journal, tmp_path
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    go = tmp_path / "go"
    with concurrent.futures.ThreadPoolExecutor(1) as pool, open(str(tmp_path / "log"), "w") as log:
        starting = pool.submit(Program, f"wait{go}", file=own_journal, port=port, stderr=log)
        try:
            said = "loading the journal: 1 tasks so far"
            assert eventually(lambda: said in (tmp_path / "log").read_text())
            with socket.socket() as client:
                client.settimeout(LONG)
                assert client.connect_ex(("127.0.0.1", port)) != 0
            assert not starting.done()
        finally:
            go.write_text("")
        with starting.result(LONG) as program:
            (loaded,) = program.ask("GET", "/tasks").json["tasks"]
            assert loaded["name"] == "loaded"


@pytest.mark.parametrize(
    "statement, text",
    [
        ("raise OSError('see that the disk is there')", "see that the disk is there"),
        ("raise RuntimeError('two\\nlines')", "cannot be loaded: RuntimeError: two lines"),
        ("raise KeyError", "cannot be loaded: KeyError"),
        ("raise taskserver.JournalLost('the lock is taken')", "the lock is taken"),
    ],
)
def test_a_journal_that_cannot_be_loaded_is_one_line_and_status_1(own_journal, statement, text):
    status, output = run_to_its_end(own_journal, "--port", "0", statement)
    assert status == 1 and output.startswith("taskserver: ")
    assert text in output and output.count("\n") == 1


def run_to_its_end(file, *arguments):
    """Return the exit status and what a program says on stderr."""
    environment = dict(os.environ, PYTHONPATH=str(PROGRAM.parent), TASKSERVER_TOKEN="")
    command = [sys.executable, str(file), *arguments]
    done = subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        timeout=LONG,
        check=False,
    )
    return done.returncode, done.stderr.decode().replace("\r\n", "\n")


def test_a_server_that_has_lost_its_journal_ends_with_status_1_and_says_why(own_journal):
    with Program("--grace", "20", "go", file=own_journal) as program:
        running = program.ask("POST", "/create-task", {"name": "x", "seconds": 600})
        assert running.status == 201
        assert program.ask("POST", "/create-task", {"name": "lose it"}).status == 503
        assert program.process.wait(LONG / 2) == 1  # there is no grace
        log = program.log("another server has the lock")
        assert log.count("another server has the lock") == 1 and "Traceback" not in log


needs_freeze = pytest.mark.skipif(
    not hasattr(gc, "freeze"), reason="this Python's collector does not stop all for long"
)


def collected(type):
    """Return how many records of a type Python's garbage collector looks at."""
    return sum(isinstance(thing, Record) and thing.type == type for thing in gc.get_objects())


@needs_freeze
def test_the_garbage_collector_overlooks_what_was_loaded(application):
    records = [numbered(n + 1, status="failed", type="loaded") for n in range(1000)]
    application.store.journal = ObedientJournal(*records)
    assert collected("loaded") == 1000
    try:
        taskserver.recover(application)
        assert gc.isenabled() and collected("loaded") == 0
    finally:
        gc.unfreeze()


@needs_freeze
def test_the_garbage_collector_overlooks_many_records_and_only_many(monkeypatch):
    store = taskserver.Store()
    monkeypatch.setattr(store, "MANY", 300)
    monkeypatch.setattr(store, "MANY_NEW", 200)

    def add(n):
        for _ in range(n):
            store.add(RECORD._replace(id=str(uuid.uuid4()), status="failed", type="many"))
        store.spare_collector()
        return collected("many")

    try:
        assert [add(n) for n in (200, 99, 1, 199, 1, 50)] == [200, 299, 0, 199, 0, 50]
    finally:
        gc.unfreeze()


# Every journal: the contract in its docstring. Each of them lives in processes that are killed.


class LinesJournal(taskserver.Journal):
    """Appends a line for each record, saved or deleted, to a file, which grows for ever."""

    def __init__(self, path):
        self.path, self.writing = path, threading.Lock()

    def load(self):
        self.locked = open(self.path + ".lock", "ab+")  # noqa: SIM115
        lock_file(self.locked)
        self.file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        rows = {}
        self.file.seek(0)
        for line in self.file.readlines():
            with contextlib.suppress(ValueError, SyntaxError):  # a crash has cut it short
                id, row = ast.literal_eval(line.decode())
                rows[id] = row
        records = [Record(**dict(zip(taskserver.JOURNALED, row))) for row in rows.values() if row]
        return sorted(records, key=lambda record: record.sequence)

    def save(self, record):
        row = tuple(getattr(record, field) for field in taskserver.JOURNALED)
        self.write([(record.id, row)])

    def delete(self, ids):
        self.write([(id, None) for id in ids])

    def write(self, lines):
        data = b"".join(b"\n" + ascii(line).encode() for line in lines)
        with self.writing:
            self.file.write(data)
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        self.locked.close()


def lock_file(file):
    """Lock a file until it is closed or this process ends. OSError: another process has it."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OSError(f"{file.name} is locked; stop the server that uses it") from None


class LyingJournal(LinesJournal):
    """Says that it has failed before it has done a thing, half done it, or done it; and refuses."""

    def load(self):
        yield from super().load()

    def save(self, record):
        self.lie()
        if "\0" in record.name:
            raise taskserver.RecordRefused("it holds a NUL")
        super().save(record)
        self.lie()

    def delete(self, ids):
        self.lie()
        super().delete(ids[: len(ids) // 2])
        self.lie()
        super().delete(ids)
        self.lie()

    def lie(self):
        if random.random() < 0.15:
            raise random.choice([OSError("not now"), RuntimeError("perhaps")])


YOURS = os.environ.get("TASKSERVER_JOURNAL")  # "module:expression", say "mine:MyJournal('path')"


@pytest.fixture(params=["sqlite", "lines", "lying", "yours"])
def place(request, tmp_path):
    """Where there is an empty journal: a module, and an expression in its words that makes it."""
    path = str(tmp_path / "tasks")
    if request.param == "yours":
        if not YOURS:
            pytest.skip("TASKSERVER_JOURNAL names no journal, as in 'module:expression'")
        assert loaded(YOURS) == [], "TASKSERVER_JOURNAL must name a journal that is empty"
        yield YOURS
        ids = [record.id for record in loaded(YOURS)]
        with Process(empty_it, YOURS, ids) as process:
            assert process.says() == "forgotten"
    elif request.param == "sqlite":
        pytest.importorskip("sqlite3")
        yield f"taskserver:SQLiteJournal({path!r})"
    else:
        name = {"lines": "LinesJournal", "lying": "LyingJournal"}[request.param]
        yield f"test_taskserver:{name}({path!r})"


class Process:
    """A process that calls a function of this file, and is killed at the end."""

    def __init__(self, function, *arguments):
        here = os.path.dirname(os.path.abspath(__file__))
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import test_taskserver; test_taskserver.obey()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join([here, os.getcwd()])),
        )
        self.process.stdin.write(ascii((function.__name__, arguments)).encode() + b"\n")
        self.process.stdin.flush()

    def says(self):
        """Return what it says next, None when it has ended."""
        line = self.process.stdout.readline()
        return ast.literal_eval(line.decode()) if line.endswith(b"\n") else None

    def kill(self):
        """Kill it; return what else it has said."""
        self.process.kill()
        return list(iter(self.says, None))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait(LONG)
        self.process.stdin.close()
        self.process.stdout.close()


def obey():
    """Be the process of a `Process`."""
    name, arguments = ast.literal_eval(sys.stdin.readline())
    globals()[name](*arguments)
    sys.stdin.read()  # until this is killed


def tell(thing):
    """Tell a test something."""
    taskserver.write_all(1, ascii(thing).encode() + b"\n")


in_use = []  # journals


def opened(place):
    """Return a journal, which stays in use as long as this process lives, and what it holds."""
    module, _, expression = place.partition(":")
    journal = eval(expression, vars(importlib.import_module(module)))
    in_use.append(journal)
    return journal, list(journal.load())


def until_it_works(call, *arguments):
    """Call something until it works, as the server does; return how it ended."""
    for _ in range(1000):
        try:
            call(*arguments)
            return "done"
        except taskserver.RecordRefused:
            return "refused"
        except taskserver.JournalLost:
            raise
        except Exception:
            time.sleep(0.001)
    raise AssertionError("it has not worked in a thousand times")


def tell_records(place):
    """Say what a journal holds, or why that cannot be said."""
    try:
        _, records = opened(place)
    except Exception as error:
        tell(f"{type(error).__name__}: {error}")
    else:
        tell([tuple(record) for record in records])


def empty_it(place, ids):
    """Delete records."""
    journal, _ = opened(place)
    for start in range(0, len(ids), 1000):
        until_it_works(journal.delete, ids[start : start + 1000])
    tell("forgotten")


def save_all(place, rows, ids, more):
    """Save rows by eight threads, delete some, and save more of them. Say how each save ended."""
    journal, _ = opened(place)

    def save(row):
        return until_it_works(journal.save, Record(*row))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        tell(list(pool.map(save, rows)))
    until_it_works(journal.delete, ids)
    tell(list(map(save, more)))


def save_versions(place):
    """Save one version after the other of a few records; say which are saved."""
    journal, _ = opened(place)

    def save(sequence):
        for n in range(100_000):
            until_it_works(journal.save, numbered(sequence, message=str(n)))
            tell((sequence, n))

    for i in range(8):
        threading.Thread(target=save, args=(i + 1,), daemon=True).start()


def loaded(place):
    """Return the records that a new process finds."""
    with Process(tell_records, place) as process:
        rows = process.says()
        assert isinstance(rows, list), rows
        return [Record(*row) for row in rows]


def saved_and_killed(place, records, ids=(), more=()):
    """Save and delete in a process that is killed then; return how the saves ended."""
    rows, more_rows = [[tuple(record) for record in some] for some in (records, more)]
    with Process(save_all, place, rows, list(ids), more_rows) as process:
        return process.says() + process.says()


def numbered(n, **changes):
    """Return a record with a sequence, and an id that goes with it."""
    return RECORD._replace(id=str(uuid.UUID(int=n, version=4)), sequence=n, **changes)


def test_every_journal_gives_back_what_was_saved_last_in_the_order_of_the_sequence(place):
    numbers = random.Random(1).sample(range(1, 2**62), 120)
    created = [numbered(n, payload=b'{"name": "\xc3\xa9"}') for n in numbers]
    ends = [
        record._replace(
            status="completed",
            started_at=1.1,
            finished_at=1700000000.1234567,
            progress=1 / 3,
            message="Zo\u00eb \U0001f600\n'; DROP TABLE task; --",
            result=b'"\\ud800 \xf0\x9f\x98\x80"',
            error="E" * 2000,
            payload=None,
        )
        for record in created[1::2]
    ]
    gone = [record.id for record in created[::3]]
    unknown = [str(uuid.uuid4()) for _ in range(1000 - len(gone))]
    again = created[0]._replace(name="a key that comes again", sequence=2**63 - 1)
    assert set(saved_and_killed(place, created, gone + unknown, [*ends, again])) == {"done"}
    expected = {record.id: record for record in created if record.id not in gone}
    expected.update((record.id, record) for record in [*ends, again])
    in_order = sorted(expected.values(), key=lambda record: record.sequence)
    assert loaded(place) == in_order
    assert loaded(place) == in_order  # to load it changes nothing


def test_every_journal_takes_a_record_as_it_is_or_refuses_it_alone(place):
    odd = [
        {"name": "a\0b"},
        {"message": "\0"},
        {"error": "\0" * 2000},
        {"name": "\U0010ffff" * 256, "type": "t" * 1000},
        {"name": "\ud800"},
        {"payload": b'{"name": "' + b"x" * MIB + b'"}'},
        {"status": "completed", "payload": None, "result": b'"\\u0000"'},
        {"created_at": 5e-324, "started_at": sys.float_info.max, "progress": 0.1 + 0.2},
    ]
    records = [numbered(n + 1, **(odd[n // 8] if n % 8 == 0 else {})) for n in range(64)]
    outcomes = saved_and_killed(place, records)
    refused = {record.id for record, end in zip(records, outcomes) if end == "refused"}
    assert refused <= {record.id for record in records[:40:8]}  # not for what JSON is made of
    assert loaded(place) == [record for record in records if record.id not in refused]


def test_every_journal_keeps_what_it_has_said_to_be_saved_through_kill_9(place):
    with Process(save_versions, place) as process:
        said = [process.says() for _ in range(60)]
        said += process.kill()
    found = {record.sequence: int(record.message) for record in loaded(place)}
    for sequence, n in dict(said).items():
        assert n <= found[sequence] <= n + 1


def test_every_journal_keeps_a_second_server_out_as_long_as_the_first_lives(place):
    with Process(tell_records, place) as first:
        assert first.says() == []
        with Process(tell_records, place) as second:
            said = queue.Queue()
            threading.Thread(target=lambda: said.put(second.says()), daemon=True).start()
            try:
                answer = said.get(timeout=3)
                assert isinstance(answer, str), "it has opened the journal of another server"
            except queue.Empty:  # it waits
                answer = None
            first.kill()
            answer = answer or said.get(timeout=LONG)
    assert answer == [] or answer.startswith("OSError: ") and "\n" not in answer, answer
    assert loaded(place) == []


def test_a_server_with_a_journal_that_lies_loses_nothing_and_keeps_nothing_refused(
    application, tmp_path
):
    path = str(tmp_path / "tasks")
    journal = application.store.journal = LyingJournal(path)
    taskserver.recover(application)
    application.store.DELETE_AGAIN_SECONDS = 0
    acknowledged, refused = {}, []

    def create_some(i):
        for n in range(6):
            key = str(uuid.uuid4())
            body = {"name": "x" if n else "\0", "result": [i, n]}
            statuses = set()
            for _ in range((1, 30)[n % 2]):
                answer = ask(application, "POST", "/create-echo", body, idempotency_key=key)
                statuses.add(answer.status)
                if answer.status == 201:
                    acknowledged[key] = [i, n]
                    break
            else:
                refused.append(key)
            assert statuses <= ({503, 201} if n else {503, 400})

    in_threads(8, create_some)
    assert len(acknowledged) > 20 and len(refused) >= 8
    for key, result in acknowledged.items():
        assert poll(application, {"type": "echo", "id": key}, LONG)["result"] == result
    store = application.store
    assert eventually(lambda: (store.delete_left(), store.has_left())[1] is False)
    journal.close()
    found = loaded(f"test_taskserver:LinesJournal({path!r})")
    assert {record.id: json.loads(record.result.decode()) for record in found} == acknowledged
    assert [record.id for record in found][::-1] == listed(application, limit=500)


# The journal in SQLite


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("sqlite3")
    return str(tmp_path / "tasks.db")


def python(code, *arguments):
    """Return what a process prints that knows all names of taskserver; it does not tidy up."""
    code = f"from taskserver import *\n{code}\nsys.stdout.flush()\nos._exit(0)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.check_output(command, cwd=str(PROGRAM.parent), timeout=LONG).decode()


@pytest.fixture
def commits(monkeypatch):
    """A list of the commits that SQLite journals make; each takes 5 ms more, or raises .error."""
    import sqlite3

    class Commits(list):
        error = None

    commits = Commits()

    class Slow(sqlite3.Connection):
        def execute(self, sql, *arguments):
            if sql == "COMMIT":
                if commits.error:
                    raise commits.error
                commits.append(time.monotonic())
                threading.Event().wait(0.005)
            return super().execute(sql, *arguments)

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: real(*args, factory=Slow, **more))
    return commits


@contextlib.contextmanager
def sqlite_journal(path):
    journal = taskserver.SQLiteJournal(str(path))
    try:
        yield journal
    finally:
        journal.close()


def test_threads_that_save_at_once_share_commits(path, commits):
    with sqlite_journal(path) as journal:
        del commits[:]
        in_threads(40, lambda i: [journal.save(numbered(i * 10 + n + 1)) for n in range(10)])
        assert 10 <= len(commits) <= 40 * 10 / 5
        assert [record.sequence for record in journal.load()] == list(range(1, 401))


def test_a_failed_commit_fails_all_who_wait_for_it_and_the_next_one_works(path, commits):
    import sqlite3

    with sqlite_journal(path) as journal:
        journal.save(numbered(1))
        journal.save(numbered(2))
        journal.delete([numbered(1).id])
        commits.error = sqlite3.OperationalError("disk I/O error")

        def save(i):
            with pytest.raises(OSError, match="cannot be written: disk I/O error"):
                journal.save(numbered(i + 10))

        in_threads(10, save)
        with pytest.raises(OSError, match="cannot be written: disk I/O error"):
            journal.delete([numbered(2).id])
        assert list(journal.load()) == [numbered(2)]
        commits.error = None
        journal.save(numbered(3))
        assert list(journal.load()) == [numbered(2), numbered(3)]


def test_the_file_does_not_grow_while_records_come_and_go(path):
    sizes = []
    with sqlite_journal(path) as journal:
        for n in range(9):
            records = [numbered(n * 200 + i + 1, payload=b"x" * 2000) for i in range(200)]

            def save(i, records=records):
                for record in records[i::20]:
                    journal.save(record)

            in_threads(20, save)
            journal.delete([record.id for record in records])
            sizes.append(os.path.getsize(path))
            assert os.path.getsize(path + "-wal") < 17 * MIB
        assert list(journal.load()) == []
    assert max(sizes) < 2 * 200 * 4000


def test_a_file_of_version_1_is_read_and_written_as_it_was(path):
    import sqlite3

    columns = (
        "id, name, status, type, created_at, started_at, finished_at, progress, message, result, "
        "error, payload"
    )
    schema = f"CREATE TABLE task (seq INTEGER PRIMARY KEY, {columns}, UNIQUE (id))"
    id = str(uuid.UUID(int=7, version=4))
    new = RECORD._replace(id=id, name="new", sequence=2)
    old = DONE._replace(started_at=1700000000.75, progress=1.0, message="m", error="E", sequence=1)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(schema)
        for record in new, old:  # the second one has the lower number
            row = [record.sequence, *record[:12]]
            database.execute("INSERT INTO task VALUES (?" + ", ?" * 12 + ")", row)
        database.execute("PRAGMA user_version = 1")
        database.commit()
    with sqlite_journal(path) as journal:
        assert list(journal.load()) == [old, new]
        journal.save(new._replace(started_at=1.0))
        journal.save(numbered(3))
    with sqlite_journal(path) as journal:
        assert list(journal.load()) == [old, new._replace(started_at=1.0), numbered(3)]
    ours = path + "2"
    with sqlite_journal(ours):
        pass
    for file in path, ours:
        with contextlib.closing(sqlite3.connect(file)) as database:
            assert list(database.execute("PRAGMA user_version")) == [(1,)]
            assert list(database.execute("SELECT sql FROM sqlite_master WHERE sql > ''")) == [
                (schema,)
            ]


def refusal(path):
    """Return why a journal cannot be opened."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        gc.collect()
        del seen[:]
        with pytest.raises(OSError) as caught:
            taskserver.SQLiteJournal(str(path))
        text = str(caught.value)
        del caught
        gc.collect()
    assert not seen  # Python 3.13 and later warn when a database was left open
    assert str(path) in text and "\n" not in text
    return text


def test_a_file_that_cannot_be_a_journal_is_refused_with_advice(path, tmp_path):
    assert "unable to open" in refusal(tmp_path / "none" / "tasks.db")
    assert "unable to open" in refusal(tmp_path)
    text = tmp_path / "text"
    text.write_text("hello " * 1000)
    assert "not a database" in refusal(text)


@pytest.mark.parametrize(
    "statement, reason",
    [
        ("CREATE TABLE theirs (x)", "another program"),
        ("CREATE TABLE task (x)", "another program"),
        ("PRAGMA user_version = 99", "newer server"),
    ],
)
def test_a_file_of_another_program_or_version_is_refused_and_stays_as_it_is(
    path, statement, reason
):
    import sqlite3

    if statement.startswith("PRAGMA"):
        with sqlite_journal(path):
            pass
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(statement)
        database.commit()
    before = pathlib.Path(path).read_bytes()
    assert reason in refusal(path)
    assert pathlib.Path(path).read_bytes() == before


def test_a_second_process_on_the_same_file_is_refused(path):
    code = "try: SQLiteJournal(sys.argv[1])\nexcept OSError as error: print(error)"
    with sqlite_journal(path) as journal:
        journal.save(numbered(1))
        assert "is locked; stop the server that uses it" in python(code, path)
        assert "is locked" in refusal(path)


@posix
@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_a_file_without_rights_is_refused_with_advice(path, mode):
    folder = pathlib.Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    file = folder / "tasks.db"
    try:
        with sqlite_journal(file):
            pass
        os.chmod(str(file), mode)
        os.chmod(str(folder), 0o777)
        code = (
            "import sqlite3\n"
            "if os.geteuid() == 0: os.setuid(65534)\n"
            "try: SQLiteJournal(sys.argv[1])\n"
            "except OSError as error: print(error)"
        )
        assert "cannot be opened" in python(code, file)
    finally:
        shutil.rmtree(str(folder))


@posix
@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_removed_meanwhile_acknowledges_nothing_until_it_is_back(
    path, suffix, replaced
):
    with sqlite_journal(path) as journal:
        journal.save(numbered(1))
        os.rename(path + suffix, path + ".away")
        if replaced:
            shutil.copy(path + ".away", path + suffix)
        for _ in range(2):
            with pytest.raises(OSError, match="No such file|not at its path any more"):
                journal.save(numbered(2))
        os.replace(path + ".away", path + suffix)
        journal.save(numbered(3))
        assert list(journal.load()) == [numbered(1), numbered(3)]


@linux
def test_a_disk_that_is_full_refuses_creates_loses_nothing_and_recovers(path):
    import resource

    with Program("--db", path) as program, program.client() as client:

        def create_task(**more):
            return client.ask("POST", "/create-task", {"name": "x", "seconds": 0, **more})

        kept = [create_task().json for _ in range(3)]
        limits = (65_536, resource.RLIM_INFINITY)
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, limits)
        refused = 0
        while refused < 3:
            answer = create_task(more="x" * 20_000)
            if answer.status == 201:
                kept.append(answer.json)
                assert len(kept) < 50
            else:
                assert answer.status == 503 and answer.headers["Retry-After"]
                refused += 1
        assert client.ask("GET", "/healthz").json == {"status": "journal failing"}
        assert program.stops(signal.SIGKILL) == -signal.SIGKILL
    with Program("--db", path) as program, program.client() as client:
        for record in kept:
            answer = client.ask("GET", f"/poll-task/{record['id']}?wait=30")
            assert answer.json["status"] in ("completed", "failed")
        body = {"name": "x", "more": "x" * 20_000}
        assert client.ask("POST", "/create-task", body).status == 201
        assert "Traceback" not in program.log()


@linux
def test_a_disk_that_has_room_again_is_written_again(path):
    import resource

    with Program("--db", path) as program, program.client() as client:
        for size, status in (1000, 503), (resource.RLIM_INFINITY, 201):
            limits = (size, resource.RLIM_INFINITY)
            resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, limits)
            created = client.ask("POST", "/create-task", {"name": "x", "seconds": 0})
            assert created.status == status
        record = client.ask("GET", f"/poll-task/{created.json['id']}?wait=30").json
        assert record["status"] == "completed"
        assert client.ask("GET", "/healthz").json["status"] == "ok"


CRASHING = '''
import os, sys, time, taskserver
application = taskserver.Application()

def mark(payload, report):
    """Leave a mark outside."""
    descriptor = os.open(sys.argv[-1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (payload["name"] + "\\n").encode())
    os.close(descriptor)
    time.sleep(0.01)
    return payload["name"]

application.task("once")(mark)
application.task("again", rerun=True)(mark)
if __name__ == "__main__":
    taskserver.main(application, sys.argv[1:-1])
'''


@posix
@pytest.mark.parametrize("seed", range(2))
def test_what_was_acknowledged_survives_kill_9_and_nothing_runs_twice(path, tmp_path, seed):
    chance, marks = random.Random(seed), tmp_path / "marks"
    acknowledged, finals = {}, {}  # by id: the record as created; the record once it was final
    file = tmp_path / "crashing.py"
    file.write_text(CRASHING)

    def start():
        return Program("--db", path, "--workers", "16", str(marks), file=file)

    def load(program, moment, i):
        type, mine = ("once", "again")[i % 2], []
        errors = OSError, AssertionError, ValueError, AttributeError
        with contextlib.suppress(*errors), program.client() as client:
            while True:  # until the connection breaks off somewhere
                name = f"{seed}-{moment}-{i}-{len(mine)}"
                created = client.ask("POST", f"/create-{type}", {"name": name})
                acknowledged[created.json["id"]] = created.json
                mine.append(created.json["id"])
                chosen = random.Random(len(mine)).choice(mine)
                record = client.ask("GET", f"/poll-{type}/{chosen}").json
                if record["status"] != "pending":
                    finals[record["id"]] = record

    def is_idle(client):
        health = client.ask("GET", "/healthz").json
        return health["waiting"] == health["running"] == 0

    for moment in range(3):
        with start() as program:
            killer = threading.Timer(0.1 + chance.random() * 0.3, program.process.kill)
            killer.start()
            in_threads(6, lambda i, moment=moment, program=program: load(program, moment, i))
            killer.join()
    with start() as program, program.client() as client:
        ends = {}
        for id, record in acknowledged.items():
            ends[id] = client.ask("GET", f"/poll-{record['type']}/{id}?wait=30").json
        assert eventually(lambda: is_idle(client))  # what was not acknowledged, too
        assert program.stops(signal.SIGTERM) == 0
        assert "Traceback" not in program.log()
    ran = marks.read_text().split("\n")
    assert len(acknowledged) > 30 and len(finals) > 5
    assert {id: ends[id] for id in finals} == finals
    for id, record in ends.items():
        assert record["name"] == acknowledged[id]["name"]
        times = ran.count(record["name"])
        if record["type"] == "once":
            assert times <= 1
            assert record["status"] == "completed" or record["error"].startswith("interrupted: ")
        else:
            assert record["status"] == "completed"
        if record["status"] == "completed":
            assert times >= 1 and record["result"] == record["name"]


# -- 11. Access ------------------------------------------------------------------------------------


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("LocalHost:8000", 200), ("127.0.0.1", 200), ("127.0.0.1:80", 200), ("10.1.2.3", 200), ("[::1]:8000", 200),
    ("[fe80::1]", 200), ("tasks.example:8000", 200), ("TASKS.example", 200), ("", 200),
    ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421), ("tasks.example.", 421), ("1.2.3", 421),
    ("localhost,evil.example", 421), ("127.0.0.1evil", 421), ("0x7f000001", 421),
])  # fmt: skip
def test_a_host_that_is_no_address_nor_allowed_is_421_and_the_flag_is_named(application, host, status):
    application.before_request.append(taskserver.check_host(["Tasks.example"]))
    for target in "/healthz", "/":
        answer = ask(application, "GET", target, host=host)
        assert answer.status == status
        assert status == 200 or "--allow-host" in answer.json["error"]


@pytest.mark.parametrize("authorization, status", [
    ("Bearer s3cret", 201), ("bearer s3cret", 201), ("BEARER  s3cret ", 201),
    (None, 401), ("", 401), ("Bearer", 401), ("Bearer ", 401), ("Bearer s3cre", 401), ("Bearer s3crets", 401), ("Basic s3cret", 401),
    ("s3cret", 401), ("Bearer s3cr\xe9t", 401), ("Bearer s3cret, Bearer s3cret", 401), ("Bearer S3CRET", 401),
], ids=brief)  # fmt: skip
def test_a_token_is_asked_for(application, authorization, status):
    application.before_request.append(taskserver.check_token("s3cret"))
    answer = ask(application, "POST", "/create-echo", {"name": "x"}, authorization=authorization)
    assert answer.status == status
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert "s3cr" not in answer.json["error"]


def test_health_and_page_are_open_and_nothing_else(application):
    application.before_request.append(taskserver.check_token("s3cret"))
    statuses = {(method, target): ask(application, method, target).status
                for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT")
                for target in ("/", "/healthz", "/tasks", "/openapi.json", "/nowhere", "/create-echo", "/poll-echo/1", "//", "/%68ealthz")}  # fmt: skip
    assert [key for key, status in statuses.items() if status != 401] == [
        (method, target) for method in ("GET", "HEAD") for target in ("/", "/healthz")]  # fmt: skip


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate and its key."""
    pytest.importorskip("ssl")
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.check_call(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2",
                           "-keyout", str(folder / "key"), "-out", str(folder / "cert")],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    return str(folder / "cert"), str(folder / "key")


@pytest.fixture
def tls(application, certificate):
    """A server that speaks TLS."""
    import ssl

    context = ssl.create_default_context(cafile=certificate[0])
    context.check_hostname = False

    class TLSClient(Client):
        def __init__(self, port):
            super().__init__(port)
            self.file.close()
            self.socket = context.wrap_socket(self.socket)
            self.file = self.socket.makefile("rb")

    with serving(application, certificate) as server:
        server.tls_client = lambda: TLSClient(server.server_port)
        yield server


def test_tls_carries_what_plain_connections_carry(tls, application, gate):
    record = outcome(application, lambda payload, report: "x" * (MIB - 2))
    with tls.tls_client() as client:
        assert client.ask("POST", "/create-echo", {"name": "x", "more": "y" * 300_000}).status == 201
        client.send(raw("GET", "/healthz") * 20)
        assert {client.answer().status for _ in range(20)} == {200}
        for _ in range(3):
            assert client.ask("GET", f"/poll-{record['type']}/{record['id']}").json == record
        waiting = client.ask("POST", "/create-gate", {"name": "x"}).json
        client.send(raw("GET", f"/poll-gate/{waiting['id']}?wait=30"))
        gate.opened.set()
        assert client.answer().json["status"] == "completed"
        assert client.ask("GET", "/healthz", b"", "Connection: close").status == 200
        assert client.ended()


def test_a_client_of_tls_gets_its_refusal_even_when_it_is_still_sending(tls):
    with tls.tls_client() as client:
        client.send(raw("POST", "/create-echo", b"", "Content-Length: 50000000").replace(b"Content-Length: 0\r\n", b""))
        with contextlib.suppress(OSError):
            for _ in range(20):
                client.send(b"x" * 65_536)
        assert client.answer().status == 413


def test_clients_without_a_handshake_hold_up_nobody_and_are_closed(tls, monkeypatch, caplog):
    patient(monkeypatch, header=0.4)
    with tls.client() as silent, tls.client() as half, tls.client() as plain:
        half.send(b"\x16\x03\x01\x02\x00\x01")
        plain.send(raw("GET", "/healthz"))
        with tls.tls_client() as client:
            assert client.ask("GET", "/healthz").status == 200
        for client in silent, half:
            assert client.ended()
        with contextlib.suppress(ConnectionError):
            assert b"HTTP/1.1 200" not in plain.file.read()
    with tls.tls_client() as client:
        assert client.ask("GET", "/healthz").status == 200
    assert "Traceback" not in caplog.text


# -- 12. OpenAPI -----------------------------------------------------------------------------------


def references(part):
    if isinstance(part, dict):
        found = [part["$ref"]] if "$ref" in part else []
        return found + [reference for value in part.values() for reference in references(value)]
    return [reference for value in part for reference in references(value)] if isinstance(part, list) else []


def test_openapi_describes_every_type_and_its_references_resolve(application):
    application.task("more-1")(fail)
    document = ask(application, "GET", "/openapi.json").json
    assert document["openapi"].startswith("3.1.") and document["info"]["title"] and document["info"]["version"]
    for name in application.types:
        assert list(document["paths"][f"/create-{name}"]) == ["post"] and list(document["paths"][f"/poll-{name}/{{id}}"]) == ["get"]
    assert {"/tasks", "/healthz", "/openapi.json"} < set(document["paths"])
    assert document["paths"]["/create-echo"]["post"]["description"] == "Return what was sent."
    found = references(document)
    assert found
    for reference in found:
        part = document
        for key in reference[2:].split("/"):
            part = part[key]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"] and all(key.isdigit() for key in operation["responses"])
            assert ask(application, method.upper(), path.replace("{id}", str(uuid.uuid4()))).status in (200, 400, 404)


def test_the_record_of_openapi_is_the_record_that_is_answered(application):
    schema = taskserver.openapi(application)["components"]["schemas"]["record"]
    record = final(application, create(application, "echo", result={"a": 1}))
    assert list(schema["properties"]) == schema["required"] == list(record) == list(schema["examples"][0])
    for key, value in record.items():
        types = schema["properties"][key].get("type", [])
        types = [types] if isinstance(types, str) else types
        name = {str: "string", float: "number", type(None): "null"}.get(type(value))
        assert not types or name in types, key
    consistent(schema["examples"][0])


def test_openapi_lists_the_refusals_that_are_answered(application):
    paths = taskserver.openapi(application)["paths"]
    application.before_request.append(taskserver.check_host([]))
    record = create(application, "echo")
    for method, target, path, body, more in [
        ("POST", "/create-echo", "/create-echo", b"{", {}),
        ("POST", "/create-echo", "/create-echo", b"{}", {"content_type": "text/plain"}),
        ("POST", "/create-echo", "/create-echo", b"{}", {"host": "evil.example"}),
        ("GET", "/poll-echo/5", "/poll-echo/{id}", b"", {}),
        ("GET", f"/poll-echo/{uuid.uuid4()}", "/poll-echo/{id}", b"", {}),
        ("GET", f"/poll-echo/{record['id']}?wait=x", "/poll-echo/{id}", b"", {}),
        ("GET", "/tasks?limit=x", "/tasks", b"", {}),
    ]:  # fmt: skip
        answer = ask(application, method, target, body, **more)
        assert str(answer.status) in paths[path][method.lower()]["responses"] and answer.status >= 400
    assert {"400", "401", "408", "411", "413", "415", "421", "501", "503"} < set(paths["/create-echo"]["post"]["responses"])


@pytest.mark.parametrize("secured", [False, True])
def test_openapi_says_whether_a_token_is_asked_for(application, secured):
    application.secured = secured
    document = taskserver.openapi(application)
    assert bool(document.get("security")) == secured
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert document["paths"]["/healthz"]["get"]["security"] == []


# -- 13. Live page ---------------------------------------------------------------------------------


def test_the_page_allows_its_own_script_and_style_and_nothing_else(application):
    answer = ask(application, "GET", "/")
    assert application.handle(request("GET", "/")).content_type == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    for tag in "script", "style":
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), answer.body, re.DOTALL)
        assert policy[tag + "-src"] == "'sha256-" + base64.b64encode(hashlib.sha256(text).digest()).decode() + "'"
        assert answer.body.count(f"<{tag}".encode()) == 1
    assert "unsafe" not in str(policy)


def test_the_page_needs_nothing_from_outside_and_makes_no_html_of_text():
    markup, script = taskserver.PAGE.split("<script>")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", taskserver.PAGE.replace("location.origin", ""))
    assert re.findall(r"\b(?:src|href)=\"([^\"]*)\"", markup) == ["data:,"]
    assert not re.search(r"\son\w+=|\sstyle=", markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|localStorage|cookie", script)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe"]  # fmt: skip
# Chromium reads commands from descriptor 3 and writes answers to 4; the two arrive here under other numbers.
WIRE = ("import fcntl, os, sys; ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]];"
        "os.dup2(ends[0], 3); os.dup2(ends[1], 4); os.execv(sys.argv[3], sys.argv[3:])")  # fmt: skip


class Browser:
    """One page in Chromium, driven over a DevTools pipe; `events` holds what it told without being asked."""

    def __init__(self, home):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", WIRE, str(commands), str(answers), CHROMIUM, "--user-data-dir=" + home, *FLAGS],
            pass_fds=(commands, answers), env=dict(os.environ, HOME=home), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(commands), os.close(answers)
        self.buffer, self.id, self.session, self.events = b"", 0, {}, []

    def open(self, url):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Log.enable")
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        self.id += 1
        command = dict(self.session, id=self.id, method=method, params=params)
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.answers], [], [], LONG)[0], method + " was not answered in time"
                self.buffer += os.read(self.answers, 1 << 16) or pytest.fail("Chromium ended")
            text, self.buffer = self.buffer.split(b"\0", 1)
            self.events.append(json.loads(text.decode()))
            if self.events[-1].get("id") == self.id:
                return self.events.pop()["result"]

    def js(self, code):
        return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def until(self, code):
        assert eventually(lambda: self.js(code)), "never true: " + code

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        os.close(self.commands), os.close(self.answers)


@pytest.mark.skipif(os.name != "posix" or not CHROMIUM, reason="needs Chromium")
def test_in_a_browser_a_task_is_created_moves_completes_and_its_name_stays_text(server, application, gate, tmp_path):
    name = "<img src=x onerror=alert(1)> 'quoted'"
    with contextlib.closing(Browser(str(tmp_path))) as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.until("!!document.querySelector('option[value=gate]')")
        values = json.dumps(["gate", name, '{"result": "<b>done</b>"}'])
        browser.js(f"[fields.type.value, fields.name.value, fields.rest.value] = {values}; "
                   "fields.rest.dispatchEvent(new Event('input', {bubbles: true})); "
                   "document.querySelector('#create button').click()")  # fmt: skip
        gate.wait_for()
        browser.until(f"(document.querySelector('#tasks h3') || {{}}).textContent === {json.dumps(name)}")
        browser.until("document.querySelector('#tasks progress').value === 0.25")
        assert browser.js("document.querySelector('#tasks .message').textContent") == "at the gate"
        gate.opened.set()
        browser.until("document.querySelector('#tasks .pill').textContent === 'completed'")
        assert browser.js("document.querySelector('#tasks progress').value") == 1
        browser.js("document.querySelector('#tasks summary').click()")
        browser.until("document.querySelector('#tasks pre').textContent === '\"<b>done</b>\"'")
        assert browser.js("document.images.length") == 0
        assert not [event for event in browser.events if event.get("method") == "Log.entryAdded"]


# -- 14. Demo and command line ---------------------------------------------------------------------


def command(*flags, file=PROGRAM, **environment):
    """Return the status of a run that ends by itself, and what it printed."""
    environment = {**os.environ, "TASKSERVER_TOKEN": "", "COLUMNS": "200", **environment}
    done = subprocess.run([sys.executable, str(file), *flags], capture_output=True, timeout=LONG, env=environment, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def refused(*flags, status=1, **environment):
    """Return the one line with which a start is refused."""
    got, out, err = command(*flags, **environment)
    assert (got, out) == (status, "") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_help_and_version_are_printed():
    assert command("--version") == (0, f"taskserver {taskserver.__version__}\n", "")
    status, out, err = command("--help")
    assert (status, err) == (0, "")
    for flag in ["--host", "--port", "--workers", "--cpu-workers", "--max-waiting", "--max-tasks", "--keep", "--db", "--grace",
                 "--allow-host", "--allow-anonymous", "--tls-cert", "--tls-key", "--verbose", "--self-check", "--version"]:  # fmt: skip
        assert re.search(rf"^ +{flag}\b", out, re.MULTILINE), flag


def test_what_an_author_has_set_is_the_default_of_the_options(capsys):
    application = Application()
    application.store.keep, application.store.max_tasks = 71, 72
    application.pool.max_workers, application.pool.max_waiting, application.cpu_pool.max_workers = 73, 74, 75
    with pytest.raises(SystemExit):
        taskserver.main(application, ["--help"])
    out = capsys.readouterr().out
    assert all(f"({value})" in out for value in range(71, 76))


def test_self_check_says_what_works():
    status, out, err = command("--self-check")
    assert (status, err) == (0, ""), out + err
    assert sys.version.split()[0] in out and sys.platform in out and out.count("works") >= 2
    assert "primes" in out and "all is well" in out


@pytest.mark.parametrize("flags", [
    ["--nonsense"], ["extra"], ["--port"], ["--port", "x"], ["--port", "-1"], ["--port", "65536"], ["--port", "1.5"],
    ["--workers", "0"], ["--workers", "-5"], ["--cpu-workers", "0"], ["--max-waiting", "-1"], ["--max-tasks", "0"],
    ["--keep", "-1"], ["--keep", "nan"], ["--keep", "x"], ["--grace", "-0.1"], ["--tls-cert", "x"], ["--tls-key", "x"], ["--work", "5"],
    ["--port", "1_0"],
], ids=" ".join)  # fmt: skip
def test_wrong_usage_is_one_line_and_status_2(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        taskserver.main(Application(), flags)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    assert "taskserver: " in err and "--help" in err


def test_wrong_usage_of_the_program_is_status_2():
    assert "--nonsense" in refused("--nonsense", status=2)


def test_a_port_that_is_taken_or_an_address_that_is_not_ours_is_one_line_and_status_1():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = str(other.getsockname()[1])
        assert port in refused("--port", port)
    assert "192.0.2.1" in refused("--host", "192.0.2.1", "--allow-anonymous", "--port", "0")
    assert "no.such.invalid" in refused("--host", "no.such.invalid", "--allow-anonymous", "--port", "0")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "tasks.example"])
def test_a_foreign_address_is_refused_without_a_token_or_permission(host):
    err = refused("--host", host, "--port", "0")
    assert "TASKSERVER_TOKEN" in err and "--allow-anonymous" in err


def test_a_foreign_address_is_served_with_permission_or_with_a_token():
    with Program("--host", "0.0.0.0", "--allow-anonymous") as program:
        assert program.ask("GET", "/tasks").status == 200
    with Program("--host", "0.0.0.0", "--verbose", token="s3cret") as program:
        assert program.ask("GET", "/tasks").status == 401
        assert program.ask("GET", "/tasks", b"", "Authorization: Bearer s3cret").status == 200
        assert program.ask("GET", "/tasks", b"", "Authorization: Bearer s3crex").status == 401
        assert program.ask("GET", "/healthz").status == 200
        assert program.stops(signal.SIGTERM) == (0 if os.name == "posix" else 1)
        assert "s3cre" not in program.log() and "/tasks" in program.log()


def test_a_token_that_cannot_be_sent_is_refused():
    err = refused("--port", "0", TASKSERVER_TOKEN="two words")
    assert "TASKSERVER_TOKEN" in err and "two words" not in err


def test_a_name_must_be_allowed_to_be_used():
    with Program("--allow-host", "tasks.example") as program, program.client() as client:
        for host, status in ("evil.example", 421), ("tasks.example:80", 200), ("127.0.0.1", 200), ("localhost", 200):
            client.send(raw("GET", "/healthz").replace(b"Host: localhost", b"Host: " + host.encode()))
            assert client.answer().status == status


def test_a_journal_that_cannot_be_used_is_one_line_and_status_1(path, tmp_path):
    assert "choose another file" in refused("--port", "0", "--db", str(tmp_path / "none" / "tasks.db"))
    with Program("--db", path):
        assert "stop the server that uses it" in refused("--port", "0", "--db", path)


def test_a_certificate_that_cannot_be_used_is_one_line_and_status_1(certificate):
    cert, key = certificate
    for files in (cert, cert), (cert, cert + "-none"), (key, key):
        assert "TLS" in refused("--port", "0", "--tls-cert", files[0], "--tls-key", files[1])


def test_tls_is_spoken_on_request(certificate):
    import ssl

    with Program("--tls-cert", certificate[0], "--tls-key", certificate[1]) as program:
        assert " on https://127.0.0.1:" in program.hello[0]
        context = ssl.create_default_context(cafile=certificate[0])
        context.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", program.port, timeout=LONG, context=context)
        connection.request("GET", "/healthz")
        assert json.loads(connection.getresponse().read().decode())["status"] == "ok"
        connection.close()


def test_the_first_lines_say_address_usage_and_whether_tasks_outlive_it(path):
    with Program() as program:
        assert program.hello[0].startswith(f"taskserver {taskserver.__version__} on http://127.0.0.1:{program.port}")
        assert "curl" in program.hello[1] and f"http://127.0.0.1:{program.port}/create-task" in program.hello[1]
        assert "memory" in program.hello[2] and "--db" in program.hello[2]
        record = program.ask("POST", "/create-task", {"name": "a\nb\x1b", "seconds": 0}).json
        assert program.ask("GET", f"/poll-task/{record['id']}?wait=30").json["result"] == {"seconds": 0}
        log = program.log(wait_for="completed")
        assert f"task {record['id']} created" in log and f"task {record['id']} completed" in log
        assert "a\\nb\\x1b" in log and "GET /poll" not in log
    with Program("--db", path) as program:
        assert path in program.hello[2]


def test_verbose_logs_requests():
    with Program("--verbose") as program:
        program.ask("GET", "/nowhere%0A")
        assert "/nowhere%0A" in program.log(wait_for="/nowhere")


def test_someones_own_file_gets_the_whole_command_line(waiting, tmp_path):
    program = waiting("--max-waiting", "0", "--workers", "1")
    begin(program, tmp_path / "go")
    assert program.ask("POST", "/create-wait", {"name": "x"}).status == 503
    assert program.ask("POST", "/create-task", {"name": "x"}).status == 404
    (tmp_path / "go").write_text("")


def test_primes_are_counted_and_computing_does_not_stop_polls():
    assert [taskserver.primes({"limit": n}, print)["primes"] for n in (0, 2, 3, 4, 10, 100)] == [0, 0, 1, 2, 4, 25]
    with Program("--cpu-workers", "1") as program, program.client() as client:
        record = client.ask("POST", "/create-primes", {"name": "x", "limit": 200_000}).json
        seen = set()
        while record["status"] == "pending":
            record = client.ask("GET", f"/poll-primes/{record['id']}?wait=0.05").json
            seen.add(record["progress"])
        assert record["result"] == {"limit": 200_000, "primes": 17_984}
        assert any(fraction and 0 < fraction < 1 for fraction in seen)


@pytest.mark.parametrize("limit", [-1, 100_000_001, True, "5", 1.0, None])
def test_primes_refuses_what_is_no_limit(limit):
    with pytest.raises(ValueError, match="limit"):
        taskserver.primes({"limit": limit}, print)


@pytest.mark.parametrize("seconds", [-0.1, 3600.1, True, "5", None, [], math.nan, 10**400])
def test_the_demo_refuses_what_are_no_seconds(seconds):
    with pytest.raises(ValueError, match="seconds"):
        taskserver.wait({"seconds": seconds}, print)


def test_the_demo_waits_and_reports():
    reports = []
    assert taskserver.wait({"seconds": 0.02}, lambda *report: reports.append(report)) == {"seconds": 0.02}
    assert reports and all(0 <= fraction <= 1 for fraction, _ in reports)


# -- 15. Guards ------------------------------------------------------------------------------------


def sections():
    """Return the top-level statements of the program by section."""
    lines = PROGRAM.read_text(encoding="utf-8").splitlines()
    starts = [(n, line) for n, line in enumerate(lines, 1) if re.match(r"# -- \d+\. ", line)]
    found = [[] for _ in range(len(starts) + 1)]
    for node in ast.parse("\n".join(lines)).body:
        found[sum(start <= node.lineno for start, _ in starts)].append(node)
    return [line for _, line in starts], found


def defined(nodes):
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        else:
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id


def test_no_section_knows_a_later_one():
    _, found = sections()
    where = {name: n for n, nodes in enumerate(found) for name in defined(nodes)}
    too_early = [
        (n, part.id)
        for n, nodes in enumerate(found)
        for node in nodes
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and where.get(part.id, 0) > n
    ]
    local = {"wait"}  # also the name of a method's variable or of a local one
    assert [use for use in too_early if use[1] not in local] == []


def test_program_and_tests_have_the_same_sections():
    headings, _ = sections()
    mine = re.findall(r"(?m)^# -- \d+\. .*$", pathlib.Path(__file__).read_text(encoding="utf-8"))
    assert mine[: len(headings)] == headings
    assert all(len(heading) == len(headings[0]) for heading in headings)


def test_only_the_standard_library_is_imported():
    names = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.partition(".")[0])
    home = pathlib.Path(os.__file__).resolve().parent
    for name in names - set(sys.builtin_module_names) - {"__future__"}:
        if hasattr(sys, "stdlib_module_names"):
            assert name in sys.stdlib_module_names
        else:
            origin = importlib.util.find_spec(name).origin or ""
            assert "site-packages" not in origin and (home in pathlib.Path(origin).resolve().parents or "lib-dynload" in origin), name


def test_the_size_is_counted():
    """Print the lines of Python without blank lines, comments and docstrings."""
    code, before = set(), tokenize.NEWLINE
    with PROGRAM.open(encoding="utf-8") as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            space = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            docstring = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            if not space and not docstring:
                code.update(range(token.start[0], token.end[0] + 1))
            before = token.type
    page = taskserver.PAGE.count("\n") + 1
    print(f"{len(code) - page} lines of Python, {page} lines of HTML")


# -- 16. README ------------------------------------------------------------------------------------


def blocks(language, kind):
    return re.findall(rf"(?ms)^```{kind}\n(.*?)^```$", readme(language))


both = pytest.mark.parametrize("language", ["en", "ru"])


@both
def test_every_option_is_in_the_readme_with_its_default_and_no_other(language):
    flag = "--[a-z]+(?:-[a-z]+)*"
    help = re.sub(r"\s+", " ", command("--help")[1].split("options:" if sys.version_info >= (3, 10) else "optional arguments:")[1])
    options = dict.fromkeys(re.findall(flag, command("--help")[1]))
    options.update(re.findall(rf"({flag}) [A-Z]+ (?:(?! --)[^()])*\(([\d.]+)\)", help))
    assert options["--keep"] == "3600"
    rows = dict(re.findall(rf"(?m)^\| `({flag})[^|]*\|([^|]*)\|", readme(language)))
    text = re.sub(r"(?m)^ *(?:curl|openssl|sudo|pip|py|wget|git) .*$", "", readme(language))
    assert set(re.findall(rf"`({flag})", text)) | set(re.findall(rf"taskserver\.py.*?({flag})", text)) <= set(options)
    for option, value in re.findall(rf"({flag}) ([A-Z]+) ", help):
        assert f"`{option} {value}`" in text
    for option, default in options.items():
        assert option in text
        if option in rows and default and option != "--cpu-workers":
            assert rows[option].strip() == default, option
    assert len(rows) >= 12


@both
def test_the_python_of_the_readme_can_be_run(language, tmp_path):
    found = blocks(language, "python")
    assert found
    for n, block in enumerate(found):
        file = tmp_path / f"example{n}.py"
        file.write_text(block, encoding="utf-8")
        if "taskserver" in block:
            if "distributed" in block:
                python("import runpy; runpy.run_path(sys.argv[1])", file)
            else:
                with Program(file=file, cwd=str(tmp_path)) as program:
                    assert program.ask("GET", "/healthz").status == 200
        if "urlopen" in block:
            with Program() as program:
                file.write_text(block.replace("127.0.0.1:8000", f"127.0.0.1:{program.port}"), encoding="utf-8")
                status, out, err = command(file=file)
                assert (status, err) == (0, "") and out.strip() in readme(language)


@both
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_curl_lines_of_the_readme_work(language, tmp_path):
    (tmp_path / "mytasks.py").write_text(next(block for block in blocks(language, "python") if "resolve" in block), encoding="utf-8")
    done, created = 0, {}
    with Program() as demo, Program(file=tmp_path / "mytasks.py") as own:
        for line in "".join(blocks(language, "sh")).replace("\\\n", " ").splitlines():
            if line.startswith("curl ") and "https:" not in line:
                port = own.port if "resolve" in line else demo.port
                line = line.replace(":8000", f":{port}").replace('"seconds": 5', '"seconds": 1').replace("curl ", "curl -sS ", 1)
                line = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", lambda _: created[demo.port], line)
                answer = json.loads(subprocess.check_output(["sh", "-c", line], timeout=LONG).decode())
                assert list(answer) != ["error"], (line, answer)
                created[port] = answer.get("id", created.get(port))
                done += 1
    assert done >= 5


@both
def test_the_records_in_the_readme_have_the_keys_of_records(language):
    records = [json.loads(line) for block in blocks(language, "text") for line in block.splitlines() if line.startswith('{"id"')]
    assert records
    for record in records:
        consistent(record)
