# /// script
# requires-python = ">=3.7"
# dependencies = ["pytest"]
# ///
"""Tests of taskserver.py: python -m pytest

The sections are those of the program. Within them the cheap tests come first: plain objects, then
an application without sockets, then real sockets and real processes. Tests assert on what a client
sees. Nothing sleeps in the hope that something happens meanwhile: tasks wait for events that a test
owns, and every wait has a deadline.

After those of the program come 15 Guards, 16 README and 17 Exercises. What the page does in real
browsers is checked by `.ci/browsers`, generated clients by `.ci/clients`. What costs memory or time
is measured by the bench, not here.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import calendar
import collections
import concurrent.futures
import contextlib
import contextvars
import decimal
import dis
import errno
import fractions
import functools
import gc
import hashlib
import http.client
import importlib.util
import inspect
import json
import logging
import math
import multiprocessing
import os
import pathlib
import queue
import random
import re
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import warnings
import weakref
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
    """No test leaves a thread or a process behind, but for the writers of journals: they have no
    end. The event loops of coroutines are ended here."""
    monkeypatch.setattr(WorkerPool, "IDLE_SECONDS", 0.03)
    before = set(threading.enumerate())
    pools, make = [], taskserver.CoroutinePool.__init__

    def make_and_remember(pool, *arguments):
        make(pool, *arguments)
        pools.append(pool)

    monkeypatch.setattr(taskserver.CoroutinePool, "__init__", make_and_remember)

    def left():
        threads = [
            thread
            for thread in threading.enumerate()
            if thread not in before and thread.name != "journal"
        ]
        try:
            return threads + multiprocessing.active_children()
        except OSError:  # Windows: a thread has closed one of them just now
            return [*threads, "a child that is just ending"]

    yield
    for pool in pools:
        pool.shut_down(0.1)
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
    """An application with a type that waits at the gate, and one that returns "result"."""
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
    if record["started_at"] is None:
        assert record["progress"] is None and record["message"] is None
    moments = [record[key] for key in ("created_at", "started_at", "finished_at") if record[key]]
    assert moments == sorted(moments)


KEYS = [
    "id",
    "name",
    "status",
    "type",
    "created_at",
    "started_at",
    "finished_at",
    "progress",
    "message",
    "result",
    "error",
]


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
        # A reader that stays.
        second = threading.Thread(target=lambda: lock.read.__enter__(), daemon=True)
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
    completed = RECORD._replace(
        status="completed", finished_at=1700000001.0, progress=1.0, result=b'{"a": [1]}'
    )
    assert list(document(completed)) == KEYS
    assert document(completed)["result"] == {"a": [1]}
    assert list(document(completed, with_result=False)) == [key for key in KEYS if key != "result"]


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1700000000.5, "2023-11-14T22:13:20.500Z"),
        (1700000000.9999, "2023-11-14T22:13:20.999Z"),
        (1709164800.001, "2024-02-29T00:00:00.001Z"),
        (4102444799.25, "2099-12-31T23:59:59.250Z"),
        (None, None),
    ],
)
def test_timestamps_are_rfc_3339_with_milliseconds(seconds, text):
    try:
        time.gmtime(seconds)
    except OverflowError:
        pytest.skip("the clock of this system ends in 2038")
    assert document(RECORD._replace(created_at=seconds, finished_at=seconds))["created_at"] == text


@pytest.mark.parametrize("text", ["", "ü€😀", '"\\', "\0\n\x1b\x7f", "</script>", "{}"])
def test_any_text_survives_in_a_record(text):
    got = document(RECORD._replace(name=text, message=text, error=text))
    assert [got["name"], got["message"], got["error"]] == [text] * 3


def test_progress_joins_the_record_when_it_is_read():
    live = taskserver.Live()
    running = RECORD._replace(live=live)
    assert [document(running)[key] for key in ("started_at", "progress", "message")] == [None] * 3
    live.start()
    assert document(running)["started_at"] and document(running)["progress"] is None
    live.report(0.5, "half way")
    assert (document(running)["progress"], document(running)["message"]) == (0.5, "half way")
    live.report(1)
    assert (document(running)["progress"], document(running)["message"]) == (1.0, "half way")


class LiveThatMoves(taskserver.Live):
    """A task that starts and reports in whatever moment somebody looks twice."""

    @property
    def progress(self):
        self.looks += 1
        if self.looks == 1:
            return (None, None, None)
        return (1700000001.0, 0.5, "half way")

    def __init__(self):
        self.looks = 0


def test_a_progress_is_never_seen_beside_a_start_that_has_not_been():
    record = RECORD._replace(live=LiveThatMoves())
    for is_running in False, True, True:
        seen = document(record)
        assert (seen["started_at"] is not None) == is_running
        assert (seen["progress"], seen["message"]) == (
            (0.5, "half way") if is_running else (None,) * 2
        )


@pytest.mark.parametrize("size", [499, 500, 501, 100_000])
def test_a_message_is_cut_to_500_characters(size):
    live = taskserver.Live()
    live.report(0, "é" * size)
    assert document(RECORD._replace(live=live))["message"] == "é" * min(size, 500)
    live.report(0, "\ud800" * size)  # a lone surrogate is escaped, and what is cut is what is seen
    assert document(RECORD._replace(live=live))["message"] == ("\\ud800" * 84)[:500]


class Odd:
    """A real number that is none of Python's, as numpy's are."""

    def __init__(self, number):
        self.number = number

    def __float__(self):
        return self.number


@pytest.mark.parametrize(
    "fraction, seen",
    [
        (0, 0.0),
        (1, 1.0),
        (True, 1.0),
        (0.25, 0.25),
        (-0.0, 0.0),
        (1.0000000000000013, 1.0),  # sum([0.1] * 10) and its like
        (1.00001, 1.0),
        (-1e-17, 0.0),
        (-0.00001, 0.0),
        (decimal.Decimal("0.5"), 0.5),
        (decimal.Decimal("1.0000000000000013"), 1.0),
        (fractions.Fraction(1, 4), 0.25),
        (Odd(0.75), 0.75),
        (Odd(1.0000000000000013), 1.0),
    ],
    ids=brief,
)
def test_a_fraction_may_be_any_real_number_and_what_rounding_leaves_is_cut(fraction, seen):
    live = taskserver.Live()
    live.report(fraction)
    assert document(RECORD._replace(live=live))["progress"] == seen


@pytest.mark.parametrize(
    "fraction, message",
    [
        (-0.001, None),
        (1.001, None),
        (50, None),
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        (10**400, None),
        (decimal.Decimal("NaN"), None),
        (decimal.Decimal("sNaN"), None),
        (decimal.Decimal(2), None),
        (fractions.Fraction(3, 2), None),
        (Odd("text"), None),
        (Odd(math.nan), None),
        ("0.5", None),
        (b"0", None),
        (None, None),
        ([], None),
        (1j, None),
        (0.5, 5),
        (0.5, b"text"),
    ],
    ids=brief,
)
def test_a_report_of_anything_else_is_a_value_error(fraction, message):
    live = taskserver.Live()
    live.report(0.5, "before")
    with pytest.raises(ValueError, match="report"):
        live.report(fraction, message)
    assert document(RECORD._replace(live=live))["message"] == "before"


def test_a_report_of_a_task_that_was_asked_to_end_raises_what_except_exception_does_not_catch():
    live = taskserver.Live()
    live.report(0.5)
    live.cancel_requested = True
    with pytest.raises(taskserver.Cancelled):
        live.report(0.75)
    assert document(RECORD._replace(live=live))["progress"] == 0.5
    assert not issubclass(taskserver.Cancelled, Exception)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1.5,
        "",
        "ü\0😀",
        [],
        {},
        {"a": [1, {"b": None}]},
        [[]] * 3,
        10**300,
        {1: "a key of text"},
    ],
)
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: math.nan,
        lambda: [math.inf],
        lambda: {"a": -math.inf},
        object,
        lambda: {1, 2},
        lambda: b"bytes",
        lambda: {(1, 2): 3},
        lambda: deep(100_000),
        lambda: 1j,
    ],
)
def test_a_result_that_json_cannot_hold_is_a_value_error_that_says_so(make):
    with pytest.raises(ValueError, match="the result cannot be written as JSON"):
        taskserver.encode_result(make())


@pytest.mark.parametrize(
    "value, place",
    [
        ({"a": [1, {"b": 1j}]}, r" at \['a'\]\[1\]\['b'\]: "),
        ([0, [math.nan]], r" at \[1\]\[0\]: "),
        (({}, {3: {4}}), r" at \[1\]\[3\]: "),
        ({"deep": {(1, 2): 3}}, r" at \['deep'\]: "),
        ({"x": {"y": {1: "a", "1": "b"}}}, r" at \['x'\]\['y'\]: two keys are the same as JSON"),
        ({"\ud800": 1j}, r" at \['\\ud800'\]: "),
        (1j, "JSON: "),
    ],
    ids=brief,
)
def test_an_error_says_at_which_key_a_value_stands_that_json_cannot_hold(value, place):
    with pytest.raises(ValueError, match="the result cannot be written as JSON.*") as caught:
        taskserver.encode_result(value)
    assert re.search(place, str(caught.value))


@pytest.mark.parametrize(
    "value",
    [
        {1: "a", "1": "b"},
        {True: 1, "true": 2},
        {None: 1, "null": 2},
        {1.5: 1, "1.5": 2},
        [{"a": ({2: 1, "2": 2},)}],
    ],
    ids=brief,
)
def test_keys_that_are_equal_as_json_are_a_value_error_with_a_sentence(value):
    with pytest.raises(ValueError, match=r"two keys are the same as JSON, such as 1 and '1'"):
        taskserver.encode_result(value)


@pytest.mark.parametrize(
    "text, seen",
    [
        ("a\ud800", "a\\ud800"),
        ("\udc80.txt", "\\udc80.txt"),
        ("\ud83d\ude00", "😀"),  # two that make a pair in JSON
        ("\ude00\ud83d", "\\ude00\\ud83d"),
        ("\ud83d\ud83d\ude00", "\\ud83d😀"),
        ("\\ud800", "\\ud800"),  # no surrogate but seven characters, which stay as they are
        ("\\\ud800", "\\\\ud800"),
    ],
    ids=brief,
)
def test_a_lone_surrogate_in_a_result_is_escaped_so_that_any_client_can_read_it(text, seen):
    encoded = taskserver.encode_result([text, {text: 1}])
    assert json.loads(encoded.decode()) == [seen, {seen: 1}]
    json.dumps(json.loads(encoded.decode()), ensure_ascii=False).encode()  # UTF-8 can hold it


class Texts(dict):
    """Something that can be called, but has no hash."""

    def __call__(self, value):
        return str(value)


def refuse_all(value):
    raise LookupError("no word for it")


def test_default_makes_json_of_what_json_does_not_know_and_its_errors_say_where():
    value = {"sum": decimal.Decimal("1.10"), "known": 1, "two": {"parts": fractions.Fraction(1, 2)}}
    encoded = taskserver.encode_result(value, str)
    expected = {"sum": "1.10", "known": 1, "two": {"parts": "1/2"}}
    assert json.loads(encoded.decode()) == expected
    with pytest.raises(ValueError, match=r"JSON at \['sum'\]: no word for it"):
        taskserver.encode_result(value, refuse_all)
    assert json.loads(taskserver.encode_result(value, Texts()).decode()) == expected
    with pytest.raises(ValueError, match="JSON"):  # it may return what it was given
        taskserver.encode_result(value, lambda value: value)
    with pytest.raises(ValueError, match=r"JSON at \['a'\]: two keys are the same as JSON"):
        taskserver.encode_result({"a": 1j}, lambda value: [{1: "a", "1": "b"}])
    with pytest.raises(ValueError, match="two keys are the same as JSON"):
        taskserver.encode_result({"\udc80": 1, "\\udc80": 2})


def test_a_result_has_at_most_1_mib():
    assert len(taskserver.encode_result("x" * (MIB - 2))) == MIB
    with pytest.raises(ValueError, match="1048577 bytes .* at most 1048576"):
        taskserver.encode_result("x" * (MIB - 1))


@pytest.mark.parametrize(
    "value",
    [
        [0] * (MIB + 1),
        {"a": ["x" * MIB, "x"]},
        {"x" * MIB: 0},
        [{"x" * 1000: 0}] * 1100,
        [[["x" * 1000] * 50] * 50] * 50,  # the same lists again and again
        [10**4000] * 300,
        cycle(),
        [0, (cycle(), {"a": cycle()})],
    ],
)
def test_a_huge_result_is_refused_before_it_is_encoded(value, monkeypatch):
    def encode(encoder, value):
        raise AssertionError("no other thread could go on meanwhile")

    monkeypatch.setattr(json.JSONEncoder, "encode", encode)
    with pytest.raises(ValueError, match="more than 1048576 bytes as JSON, or it contains itself"):
        taskserver.encode_result(value)


def test_what_default_makes_counts_as_well():
    value = [object() for _ in range(20)]
    with pytest.raises(ValueError, match="more than 1048576 bytes as JSON"):
        taskserver.encode_result(value, lambda one: [0] * 20_000)
    assert len(taskserver.encode_result(value, lambda one: [0] * 10_000)) == 20 * 30_002


@pytest.mark.parametrize(
    "value",
    [10**4300, [{"a": -(10**4300)}], {10**4300: object()}],
    ids=["alone", "within", "a key"],
)
def test_an_integer_in_a_result_has_as_many_digits_as_one_in_a_payload(value):
    with pytest.raises(ValueError, match="4300 digits"):
        taskserver.encode_result(value)
    assert taskserver.encode_result(10**4300 - 1) == b"9" * 4300


def test_the_place_of_a_fault_is_not_sought_in_what_is_too_large_anyway(monkeypatch):
    encoded, encode = [], json.JSONEncoder.encode
    monkeypatch.setattr(json.JSONEncoder, "encode", lambda *of: encoded.append(of) or encode(*of))
    with pytest.raises(ValueError, match="4300 digits"):
        taskserver.encode_result(["x" * 900_000] * 20_000 + [10**4300])
    assert len(encoded) <= 2


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Nameless(type):
    __name__ = property(lambda cls: 1 / 0)


class Unspeakable(Exception, metaclass=Nameless):
    """Breaks whatever looks at it."""


@pytest.mark.parametrize(
    "exception, text",
    [
        (ValueError("what it said"), "ValueError: what it said"),
        (KeyError("key"), "KeyError: 'key'"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (SystemExit(3), "SystemExit: 3"),
        (type("", (Exception,), {})(), "Exception"),
        (
            OSError("no file caf\udce9"),
            r"OSError: no file caf\udce9",
        ),  # and not what no disk and no terminal can take
        (taskserver.TaskError("timed out"), "timed out"),
    ],
)
def test_an_exception_is_described_by_its_type_and_what_it_said(exception, text):
    assert taskserver.describe(exception) == text


def test_any_exception_can_be_described_briefly():
    assert taskserver.describe(Speechless()).startswith("Speechless")
    assert len(taskserver.describe(ValueError("x" * MIB))) == taskserver.MAX_ERROR


def test_what_the_log_says_of_an_exception_ends_with_what_it_said():
    assert taskserver.traceback_of(ValueError("what it said")).endswith("ValueError: what it said")
    assert (
        taskserver.traceback_of(taskserver.TaskError("late", "from elsewhere")) == "from elsewhere"
    )


def test_what_the_log_says_of_an_exception_has_a_bound():
    trace = taskserver.traceback_of(ValueError("x" * MIB + "the end"))
    assert len(trace) == taskserver.MAX_TRACE and trace.endswith("the end")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class MemoryJournal(taskserver.Journal):
    """Keeps in a dict what a journal keeps; a test may hold up, break and look at what it does."""

    def __init__(self):
        self.records = {}
        self.before_save = lambda record: None
        self.before_delete = lambda ids: None
        self.lock = threading.Lock()

    def load(self):
        with self.lock:
            records = sorted(self.records.values(), key=lambda record: record.sequence)
        assert len({record.sequence for record in records}) == len(records)
        return records

    def save(self, record):
        self.before_save(record)
        fields = {field: getattr(record, field) for field in taskserver.JOURNALED}
        with self.lock:
            self.records[record.id] = Record(**fields)

    def delete(self, ids):
        self.before_delete(ids)
        with self.lock:
            for id in ids:
                self.records.pop(id, None)


def journaled():
    """Return a store with a journal in memory."""
    store = taskserver.Store()
    store.journal = MemoryJournal()
    return store


def is_being_saved(store, id):
    try:
        store.find(id)
    except taskserver.Duplicate:
        return True
    return False


def refuse(record):
    raise taskserver.RecordRefused("a text with a NUL")


def lose(record):
    raise taskserver.JournalLost("another server has it")


def fail_to_save(record):
    raise OSError("the disk is full")


@pytest.fixture(params=["memory", "sqlite", "lines"])
def store(request, tmp_path):
    """Every store, for the tests of what they have in common."""
    store = taskserver.Store()
    if request.param == "sqlite":
        pytest.importorskip("sqlite3")
        store.journal = taskserver.SQLiteJournal(str(tmp_path / "tasks.db"))
    elif request.param == "lines":
        store.journal = LinesJournal(str(tmp_path / "tasks.lines"))
    store.load()
    yield store
    if store.journal is not None:
        store.journal.close()


def put(store, n=1, status="pending", **changes):
    """Add so many records; return their ids."""
    ids = [str(uuid.uuid4()) for _ in range(n)]
    for id in ids:
        store.add(RECORD._replace(id=id))
        if status != "pending":
            finish(store, id, status=status, **changes)
    return ids


def finish(store, id, status="completed", **changes):
    successor = store.get(id)._replace(
        status=status, finished_at=1700000009.0, payload=None, **changes
    )
    store.finish(successor)


def newest(store, limit=9999, **filters):
    return [record.id for record in store.newest(limit, **filters)]


def test_a_store_gives_what_was_put_in(store):
    (id,) = put(store)
    assert store.get(id)._replace(sequence=0) == RECORD._replace(id=id)
    finish(store, id, result=b"[1]")
    assert (store.get(id).status, store.get(id).result) == ("completed", b"[1]")
    with pytest.raises(KeyError):
        store.get("unknown")
    assert store.find("unknown") is None and store.find(id) == store.get(id)


def test_an_id_is_taken_but_once(store):
    (id,) = put(store)
    with pytest.raises(taskserver.Duplicate):
        store.add(RECORD._replace(id=id, name="another"))
    finish(store, id)
    with pytest.raises(taskserver.Duplicate):
        store.add(RECORD._replace(id=id, name="another"))
    assert store.get(id).name == "sample" and newest(store) == [id]
    assert store.counts() == {("echo", "pending"): 0, ("echo", "completed"): 1}


@pytest.mark.parametrize("limit", [0, 1, 4, 5, 6])
def test_newest_gives_the_newest_first_in_the_order_of_creation(store, limit):
    ids = put(store, 5)
    finish(store, ids[1])  # a change moves nothing
    assert newest(store, limit) == ids[::-1][:limit]


def test_newest_may_be_those_of_a_status_and_a_type(store):
    a, b, c, d = put(store, 4)
    e = str(uuid.uuid4())
    store.add(RECORD._replace(id=e, type="other"))
    finish(store, a), finish(store, c), finish(store, d, status="failed"), finish(store, e)
    assert newest(store, status="completed") == [e, c, a]
    assert newest(store, 2, status="completed") == [e, c]
    assert newest(store, type_name="echo") == [d, c, b, a]
    assert newest(store, type_name="echo", status="pending") == [b]
    assert newest(store, type_name="nothing") == []


def test_records_are_counted_by_type_and_status_until_they_are_evicted(store):
    def counts():
        return {key: count for key, count in store.counts().items() if count}

    assert counts() == {}
    put(store, 3), put(store, 2, "completed"), put(store, 1, "failed")
    store.add(RECORD._replace(id=str(uuid.uuid4()), type="other"))
    expected = {("echo", "pending"): 3, ("echo", "completed"): 2, ("echo", "failed"): 1}
    assert counts() == {**expected, ("other", "pending"): 1}
    store.keep = 0
    store.evict()
    assert counts() == {("echo", "pending"): 3, ("other", "pending"): 1}
    assert len(store.newest(9)) == 4


def test_a_full_store_refuses_and_keeps_what_it_has(store):
    store.max_tasks = 3
    ids = put(store, 2) + put(store, 1, "completed")
    with pytest.raises(taskserver.Unavailable, match="--max-tasks.*--keep") as caught:
        put(store)
    assert 0 < caught.value.retry_after <= store.keep
    assert newest(store) == ids[::-1]


def test_a_full_store_makes_room_by_what_has_outlived_its_time(store):
    store.max_tasks = 3
    kept = put(store, 2)
    (gone,) = put(store, 1, "failed")
    store.keep = 0
    kept += put(store, 1)
    assert newest(store) == kept[::-1]
    with pytest.raises(KeyError):
        store.get(gone)
    with pytest.raises(taskserver.Unavailable):
        put(store)


def test_payloads_and_results_have_a_bound_in_bytes(store):
    size = RECORD.size()
    store.max_memory = 3 * size
    ids = put(store, 3)
    with pytest.raises(taskserver.Unavailable, match="--max-memory.*--keep") as caught:
        put(store)
    assert caught.value.retry_after > 0
    finish(store, ids[0])  # which drops its payload
    put(store)
    finish(store, ids[1], result=b"1" * size)  # in the place of its payload
    with pytest.raises(taskserver.Unavailable, match="--max-memory"):
        put(store)
    finish(store, ids[2], result=b"1" * 100 * size)  # what is done is kept, even beyond the bound
    assert store.get(ids[2]).result == b"1" * 100 * size
    with pytest.raises(taskserver.Unavailable, match="--max-memory"):
        store.add(RECORD._replace(id=str(uuid.uuid4()), payload=b"{}"))
    store.keep = 0
    put(store, 2)  # there is room by what has outlived its time, without being asked for
    with pytest.raises(taskserver.Unavailable, match="--max-memory"):
        put(store)


def test_bytes_of_what_is_being_saved_count_and_those_of_what_was_refused_do_not():
    store, held = journaled(), Gate()
    store.max_memory = 2 * RECORD.size()
    for outcome in refuse, fail_to_save:
        store.journal.before_save = outcome
        for _ in range(5):
            with pytest.raises((taskserver.RecordRefused, taskserver.JournalError)):
                put(store)
    store.journal.before_save = lambda record: held({})
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        saved = [executor.submit(put, store) for _ in range(2)]
        held.wait_for(2)
        with pytest.raises(taskserver.Unavailable, match="--max-memory"):
            put(store)
        held.opened.set()
    ids = {id for future in saved for id in future.result()}
    assert set(newest(store)) == ids and len(ids) == 2


def test_threads_that_add_at_once_never_overfill_a_store(store):
    store.max_tasks, added = 50, []

    def add(_):
        for _ in range(20):
            with contextlib.suppress(taskserver.Unavailable):
                added.extend(put(store))

    in_threads(8, add)
    assert len(added) == 50
    assert set(newest(store)) == set(added)


def test_eviction_drops_any_number_but_nothing_pending(store):
    pending = put(store, 2)
    n = 30 if store.journal else 2500
    for id in put(store, n):
        finish(store, id)
    assert store.evict() == 0 and not store.has_expired()
    store.keep = 0
    assert store.has_expired()
    portions = list(iter(store.evict, 0))
    assert sum(portions) == n and max(portions) <= store.EVICTED_AT_ONCE
    assert newest(store) == pending[::-1] and not store.has_expired()


@pytest.fixture
def watch(store):
    """Return a function that watches a record; it returns the event that a wake sets."""

    def watch(id):
        woken = threading.Event()
        store.watch(id, woken.set)
        return woken

    return watch


def test_who_watches_is_woken_when_the_record_is_final(store, watch):
    first, second = put(store, 2)
    woken = [watch(first) for _ in range(3)]
    finish(store, second)
    store.save(store.get(first)._replace(started_at=1700000005.0))
    assert not any(event.is_set() for event in woken)  # neither of these is what they wait for
    finish(store, first)
    assert all(event.is_set() for event in woken)
    assert watch(first).is_set() and watch("unknown").is_set()  # there is nothing to wait for


def test_who_watches_no_more_is_not_woken(store):
    (id,) = put(store)
    gone, here = threading.Event(), threading.Event()
    store.watch(id, gone.set), store.watch(id, here.set)
    store.unwatch(id, gone.set), store.unwatch(id, gone.set), store.unwatch("unknown", gone.set)
    finish(store, id)
    assert here.is_set() and not gone.is_set()
    store.unwatch(id, here.set)


def test_a_wake_sees_the_final_record_and_may_use_the_store(store):
    (id,) = put(store)
    seen = []
    store.watch(id, lambda: seen.append((store.get(id).status, put(store))))
    finish(store, id)
    assert [status for status, _ in seen] == ["completed"]


def test_who_waits_is_woken_when_the_store_stops_and_can_wait_again(store, watch):
    ids = put(store, 2)
    woken = [watch(id) for id in ids]
    store.stop()
    assert all(event.is_set() for event in woken)
    assert store.get(ids[0]).status == "pending"
    again = watch(ids[0])
    assert not again.is_set()
    finish(store, ids[0])
    assert again.is_set()


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
    assert newest(store) == [second]
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
    assert caught.value.retry_after == 3.5


# With a journal: `MemoryJournal`, for section 10 tries the real one


def test_after_a_restart_the_order_of_creation_is_what_it_was():
    store, held = journaled(), Gate()
    ids = put(store, 1)
    # Of two that are saved at the same time, the second is on the disk first.
    late = str(uuid.uuid4())
    store.journal.before_save = lambda record: record.id == late and held({})
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        slow = executor.submit(store.add, RECORD._replace(id=late))
        held.wait_for()
        ids += [late, *put(store, 2)]
        assert newest(store) == [ids[3], ids[2], ids[0]]  # nobody sees it before it is saved
        held.opened.set()
        slow.result(LONG)
    finish(store, ids[0]), finish(store, ids[2])
    for _ in range(2):  # and after one more
        assert newest(store) == ids[::-1]
        restarted = taskserver.Store()
        restarted.journal = store.journal
        pending = restarted.load()
        assert [record.id for record in pending] == [
            id for id in ids if restarted.get(id).status == "pending"
        ]
        assert newest(restarted) == ids[::-1]
        assert restarted.counts() == store.counts()
        store = restarted
        ids += put(store, 1)


def test_after_a_restart_final_records_stay_for_the_rest_of_their_time():
    store = journaled()
    for seconds_ago in 500, 5000, 2000:
        (id,) = put(store)
        finish(store, id)
        store.save(store.get(id)._replace(finished_at=time.time() - seconds_ago))
    clock = Clock()
    restarted = taskserver.Store(keep=6000, clock=clock)
    restarted.journal = store.journal
    assert restarted.load() == []
    for seconds, left in (500, 3), (1500, 2), (4500, 1), (5600, 0):
        clock.now = Clock().now + seconds
        restarted.evict()
        assert len(restarted.newest(9)) == left


def test_a_record_that_the_journal_cannot_take_now_leaves_nothing_behind_and_fails_the_journal():
    store = journaled()
    id = str(uuid.uuid4())
    store.journal.before_save = fail_to_save
    with pytest.raises(taskserver.JournalError, match="journal") as caught:
        store.add(RECORD._replace(id=id))
    assert caught.value.retry_after > 0 and store.failing
    assert store.find(id) is None and newest(store) == [] and store.counts() == {}
    store.journal.before_save = lambda record: None
    store.add(RECORD._replace(id=id))
    assert newest(store) == [id] and not store.failing


class SpeechlessLoss(Speechless, taskserver.JournalLost):
    pass


def test_a_journal_is_lost_whatever_the_exception_says():
    store, told = journaled(), []
    store.journal_lost = told.append

    def lose(record):
        raise SpeechlessLoss

    store.journal.before_save = lose
    with pytest.raises(taskserver.JournalError):
        put(store)
    assert told == [store.lost] and "SpeechlessLoss" in store.lost


def test_a_record_that_the_journal_can_never_take_is_refused_and_the_journal_is_not_to_blame():
    store = journaled()
    store.journal.before_save = refuse
    with pytest.raises(taskserver.RecordRefused, match="NUL"):
        put(store)
    assert newest(store) == [] and store.counts() == {} and not store.failing


def test_an_outcome_is_saved_again_until_that_works_and_is_seen_only_then():
    store, attempts, woken = journaled(), [], threading.Event()
    (id,) = put(store)
    store.watch(id, woken.set)

    def fail_twice(record):
        attempts.append((store.get(id).status, woken.is_set()))
        if len(attempts) <= 2:
            raise OSError("the disk is full")

    store.journal.before_save = fail_twice
    finish(store, id, result=b"[1]")
    assert attempts == [("pending", False)] * 3
    assert (store.get(id).result, woken.is_set()) == (b"[1]", True)
    assert store.journal.records[id].result == b"[1]" and not store.failing


def test_an_outcome_that_the_journal_can_never_take_makes_a_failed_task_of_it():
    store = journaled()
    (id,) = put(store)
    store.journal.before_save = lambda record: record.result and refuse(record)
    finish(store, id, result=b'"a\\u0000"', message="a message")
    for record in store.get(id), store.journal.records[id]:
        assert (record.status, record.result, record.payload) == ("failed", None, None)
        assert "journal cannot take" in record.error and "NUL" in record.error
    assert not store.failing


def test_an_outcome_of_which_the_journal_takes_nothing_is_final_all_the_same():
    store = journaled()
    (id,) = put(store)
    store.journal.before_save = refuse
    finish(store, id, result=b"1")
    assert (store.get(id).status, store.journal.records[id].status) == ("failed", "pending")


@pytest.mark.parametrize("how", ["save", "delete"])
def test_a_journal_that_is_lost_is_left_alone_and_who_made_the_store_is_told_once(how):
    store, told = journaled(), []
    store.journal_lost = told.append
    pending, final = put(store, 2)
    finish(store, final)
    if how == "save":
        store.journal.before_save = lose
        with pytest.raises(taskserver.JournalError, match="belongs to this server no more"):
            put(store)
    else:
        store.keep, store.journal.before_delete = 0, lose
        assert store.evict() == 1
        assert store.has_doomed()
        store.delete_doomed()
        assert not store.has_doomed()
    assert told == ["another server has it"] == [store.lost]
    kept = dict(store.journal.records)
    store.journal.before_save = store.journal.before_delete = lambda _: None
    with pytest.raises(taskserver.JournalError):
        put(store)
    with pytest.raises(taskserver.JournalLost):
        finish(store, pending)
    store.keep = 0
    store.evict()
    assert store.delete_doomed() == 0
    assert store.journal.records == kept and told == ["another server has it"]
    assert store.get(pending).status == "pending"  # the next owner decides what becomes of it


def delete_all(store):
    return sum(iter(store.delete_doomed, 0))


def test_a_journal_deletes_what_is_evicted_for_one_thread_at_a_time():
    store, busy, deleted = journaled(), threading.Lock(), []

    def delete(ids):
        assert busy.acquire(blocking=False), "two threads delete"
        time.sleep(0)  # gives the interpreter away
        deleted.extend(ids)
        busy.release()

    store.journal.before_delete = delete
    store.EVICTED_AT_ONCE = 1
    ids = put(store, 200, "completed")
    store.keep = 0
    in_threads(8, lambda i: [store.evict() and store.delete_doomed() for _ in range(50)])
    delete_all(store)
    assert sorted(deleted) == sorted(ids) and store.journal.records == {}


def test_who_makes_room_does_not_wait_for_the_journal_to_delete():
    store, held = journaled(), Gate()
    store.max_tasks = 1
    put(store, 1, "completed")
    store.keep, store.journal.before_delete = 0, lambda ids: held({})
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        (second,) = put(store)
        deleted = executor.submit(store.delete_doomed)
        held.wait_for()
        finish(store, second)
        (third,) = put(store)
        held.opened.set()
        assert deleted.result(LONG) == 1
    assert newest(store) == [third] and set(store.journal.records) == {second, third}


def test_a_journal_that_cannot_delete_is_left_in_peace_for_a_while():
    store = journaled()
    put(store, 1, "completed")
    store.keep, store.journal.before_delete = 0, fail_to_save
    store.evict()
    assert store.has_doomed()
    assert store.delete_doomed() == 0 and not store.has_doomed()


def test_what_the_journal_did_not_delete_is_gone_all_the_same_and_tried_again(caplog):
    store = journaled()
    store.DELETE_AGAIN_SECONDS = 0
    ids = put(store, 3, "completed")
    store.keep, store.journal.before_delete = 0, fail_to_save
    assert store.evict() == 3
    assert delete_all(store) == 0
    assert newest(store) == [] and "the disk is full" in caplog.text
    assert set(store.journal.records) == set(ids)
    store.add(RECORD._replace(id=ids[1]))  # it takes the place of what should have been deleted
    store.journal.before_delete = lambda ids: None
    assert store.has_doomed() and delete_all(store) == 2 and not store.has_doomed()
    assert set(store.journal.records) == {ids[1]}


def test_what_was_refused_but_is_in_the_journal_all_the_same_leaves_it():
    store = journaled()
    save = store.journal.save

    def save_and_fail(record):
        save(record)
        raise OSError("the connection broke before the commit was confirmed")

    store.journal.save = save_and_fail
    ids = [str(uuid.uuid4()) for _ in range(3)]
    for id in ids:
        with pytest.raises(taskserver.JournalError):
            store.add(RECORD._replace(id=id))
    assert set(store.journal.records) == set(ids) and newest(store) == []
    store.journal.save = save
    store.add(RECORD._replace(id=ids[1]))
    assert store.has_doomed() and delete_all(store) == 2
    assert set(store.journal.records) == {ids[1]}


def test_an_evicted_id_that_comes_again_outlives_the_delete_of_its_old_record():
    store, held = journaled(), Gate()
    early, late = put(store, 2, "completed")
    store.keep, store.journal.before_delete = 0, lambda ids: held({})
    assert store.evict() == 2
    store.add(RECORD._replace(id=early, name="again"))  # before the delete has begun
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        deleted = executor.submit(store.delete_doomed)
        held.wait_for()
        added = executor.submit(store.add, RECORD._replace(id=late, name="again"))
        assert eventually(lambda: is_being_saved(store, late))
        assert not added.done() and store.journal.records[late].name == "sample"
        (other,) = put(store)  # others do not wait
        held.opened.set()
        assert deleted.result(LONG) == 1
        added.result(LONG)
    for id in early, late:
        assert store.journal.records[id].name == store.get(id).name == "again"
    assert newest(store) == [other, late, early] and not store.has_doomed()


# -- 3. Workers ------------------------------------------------------------------------------------


def submit(pool, *items):
    """Queue items and have workers come for them; return their keys."""
    keys = [object() for _ in items]
    for key, item in zip(keys, items):
        pool.reserve(key)
        pool.put(key, item)
    pool.wake()
    return keys


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
def test_a_full_pool_refuses_one_item_too_many_and_takes_one_when_there_is_room(
    gate, max_workers, max_waiting
):
    pool = WorkerPool("test", lambda item: gate({}), max_workers, max_waiting)
    submit(pool, *range(max_workers + max_waiting))
    gate.wait_for(max_workers)
    with pytest.raises(taskserver.Unavailable, match="--max-waiting") as caught:
        pool.reserve("key")
    assert caught.value.retry_after > 0
    assert pool.counts() == (max_waiting, max_workers)
    pool.reserve("key", bounded=False)
    pool.release("key")
    with pytest.raises(taskserver.Unavailable):
        pool.reserve("key")
    gate.opened.set()
    assert eventually(lambda: pool.counts() == (0, 0))
    pool.reserve("key")
    pool.release("key")


def test_a_reserved_place_counts_until_it_is_given_back():
    pool = WorkerPool("test", print, max_workers=1, max_waiting=1)
    pool.reserve(1), pool.reserve(2)
    assert pool.counts() == (2, 0)
    with pytest.raises(taskserver.Unavailable):
        pool.reserve(3)
    pool.release(1)
    pool.reserve(3)
    assert pool.counts() == (2, 0)


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
        pool.wake()
        assert pool.counts() == (2, 0)
    pool.wake()
    assert [done.get(timeout=LONG) for _ in range(2)] == [1, 2]


def test_an_item_without_a_name_and_a_place_is_worked_whatever_waits():
    done = threading.Event()
    pool = WorkerPool("test", lambda work: work(), max_workers=1, max_waiting=0)
    submit(pool, lambda: pool.submit(done.set))
    assert done.wait(LONG)


def test_each_worker_does_what_is_to_be_done_before_it_ends(gate):
    ended = queue.Queue()
    pool = WorkerPool(
        "test", lambda item: gate({}), at_end=lambda: ended.put(threading.get_ident())
    )
    submit(pool, *range(3))
    gate.wait_for(3)
    assert ended.empty()
    gate.opened.set()
    assert len({ended.get(timeout=LONG) for _ in range(3)}) == 3


def test_an_item_that_waits_can_be_withdrawn_and_is_never_begun():
    gate, done = Gate(), queue.Queue()
    pool = WorkerPool("test", lambda item: (gate({}), done.put(item)), 1, max_waiting=3)
    running, first, second, third = submit(pool, 0, 1, 2, 3)
    gate.wait_for()
    assert pool.withdraw(second)
    assert pool.counts() == (2, 1) and pool.oldest() == 1
    assert not pool.withdraw(second) and not pool.withdraw(running) and not pool.withdraw("other")
    (fourth,) = submit(pool, 4)  # its place is free
    assert pool.withdraw(first) and pool.oldest() == 3
    gate.opened.set()
    assert [done.get(timeout=LONG) for _ in range(3)] == [0, 3, 4]
    assert pool.join(LONG) and done.empty() and pool.oldest() is None
    assert not pool.withdraw(third) and not pool.withdraw(fourth)


def test_an_item_can_be_withdrawn_before_it_has_come_into_its_place():
    done = queue.Queue()
    pool = WorkerPool("test", done.put, max_workers=1, max_waiting=0)
    pool.reserve("early")
    assert pool.withdraw("early") and not pool.withdraw("early")
    assert pool.counts() == (0, 0)
    pool.reserve("next")  # the place is free
    pool.put("early", "of no use")
    pool.put("next", "wanted")
    pool.wake()
    assert done.get(timeout=LONG) == "wanted"
    assert pool.join(LONG) and done.empty() and pool.counts() == (0, 0)


def test_to_withdraw_one_of_many_costs_no_more_than_one_of_a_few():
    n = 200_000  # with a search for each, this takes minutes
    pool = WorkerPool("test", print, max_workers=0)
    keys = submit(pool, *range(n))
    begun = time.monotonic()
    assert all(map(pool.withdraw, keys[n // 2 :] + keys[: n // 2]))
    assert time.monotonic() - begun < LONG
    assert pool.counts() == (0, 0)


def test_of_a_worker_and_who_withdraws_one_gets_the_item():
    worked, withdrawn = [], []
    pool = WorkerPool("test", worked.append, max_workers=4)

    def use(i):
        chance = random.Random(i)
        for n in range(300):
            key = (i, n)
            pool.reserve(key)
            if chance.random() < 0.2 and pool.withdraw(key):
                withdrawn.append(key)
            pool.put(key, key)
            if chance.random() < 0.7:
                pool.wake()
            if chance.random() < 0.5 and pool.withdraw(key):
                withdrawn.append(key)
        pool.wake()

    in_threads(6, use)
    assert eventually(lambda: pool.counts() == (0, 0))
    assert sorted(worked + withdrawn) == [(i, n) for i in range(6) for n in range(300)]
    assert worked and withdrawn


def test_a_worker_into_which_an_exception_is_thrown_ends_alone():
    done = queue.Queue()

    def work(item):
        if item == "thrown":
            raise KeyboardInterrupt
        done.put(item)

    pool = WorkerPool("test", work, max_workers=1)
    submit(pool, "thrown", 1, 2)
    assert [done.get(timeout=LONG) for _ in range(2)] == [1, 2]
    assert pool.join(LONG) and pool.counts() == (0, 0)


def test_a_pool_that_has_stopped_begins_nothing_and_ends_what_it_has_begun(gate):
    done = queue.Queue()
    pool = WorkerPool("test", lambda item: (gate({}), done.put(item)), max_workers=2)
    submit(pool, 1, 2)
    gate.wait_for(2)
    pool.reserve("reserved")
    (waiting,) = submit(pool, 3)
    assert pool.stop() == 2
    assert not pool.join(0)
    pool.put("reserved", 4)  # it was being stored when the stop began
    submit(pool, 5)
    gate.opened.set()
    assert pool.join(LONG) and pool.counts() == (3, 0)
    assert sorted(done.get(timeout=LONG) for _ in range(2)) == [1, 2]
    pool.wake()
    assert pool.withdraw(waiting)  # by a cancel
    assert eventually(lambda: not [t for t in threading.enumerate() if t.name == "test"])
    assert pool.counts() == (2, 0) and done.empty()


def test_a_pool_whose_workers_are_idle_when_it_stops_begins_nothing():
    done, pool = queue.Queue(), None
    pool = WorkerPool("test", done.put)
    for n in range(50):
        submit(pool, n)
    assert eventually(lambda: pool.counts() == (0, 0))
    assert pool.stop() == 0
    submit(pool, *range(3))
    assert pool.join(LONG) and pool.counts() == (3, 0)
    assert done.qsize() == 50


# Coroutines, as plain objects. What becomes of tasks in them is in section 6.


class Coroutines(taskserver.CoroutinePool):
    """A pool whose items are coroutine functions, or pairs of one and a time limit."""

    def __init__(self, *bounds):
        super().__init__(self.first, self.last, *bounds)
        self.ended = queue.Queue()  # item, value, error
        self.skipped = set()  # items that are final before they begin
        self.first_step = lambda item: None

    def first(self, item):
        self.first_step(item)
        if item in self.skipped:
            return None, None
        return item if isinstance(item, tuple) else (item, None)

    def last(self, item, value, error):
        self.ended.put((item, value, error))

    def next_end(self):
        """Return what the next one of them returned, and what it raised."""
        return self.ended.get(timeout=LONG)[1:]


class AsyncGate:
    """A coroutine that says when it has begun, and goes on when the test lets it."""

    def __init__(self, value=None):
        self.begun = threading.Semaphore(0)
        self.opened = threading.Event()
        self.value = value
        self.cleaned_up = threading.Event()

    async def __call__(self):
        import asyncio

        self.begun.release()
        try:
            while not self.opened.is_set():
                await asyncio.sleep(0.001)
            return self.value
        finally:
            await asyncio.sleep(0)
            self.cleaned_up.set()

    def wait(self):
        assert self.begun.acquire(timeout=LONG)


async def seven():
    return 7


def test_coroutines_run_in_one_thread_and_end_with_what_they_return():
    pool, threads = Coroutines(), set()

    async def function():
        threads.add(threading.current_thread())
        return 7

    submit(pool, *[functools.partial(function) for _ in range(50)])
    assert [pool.next_end() for _ in range(50)] == [(7, None)] * 50
    assert len(threads) == 1 and threading.current_thread() not in threads
    assert pool.join(LONG) and pool.counts() == (0, 0)


@pytest.mark.parametrize(
    "raised", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=brief
)
def test_whatever_a_coroutine_raises_ends_it_alone(raised):
    pool, sister = Coroutines(), AsyncGate("well")
    submit(pool, sister)
    sister.wait()

    async def function():
        raise raised

    submit(pool, function)
    assert pool.next_end() == (None, raised)
    sister.opened.set()
    assert pool.next_end() == ("well", None)


def test_a_coroutine_that_raises_cancelled_error_itself_has_failed():
    pool = Coroutines()

    async def raises():
        import asyncio

        raise asyncio.CancelledError

    async def cancels_itself():
        import asyncio

        asyncio_task = getattr(asyncio, "current_task", None)
        asyncio_task().cancel()
        await asyncio.sleep(LONG)

    for function in raises, cancels_itself:
        submit(pool, function)
        value, error = pool.next_end()
        assert value is None and type(error).__name__ == "CancelledError"


def test_there_are_no_more_coroutines_than_agreed_and_the_rest_waits_under_its_bound():
    pool, gates = Coroutines(2, 1), [AsyncGate() for _ in range(3)]
    keys = submit(pool, *gates)
    gates[0].wait(), gates[1].wait()
    assert pool.counts() == (1, 2)
    with pytest.raises(taskserver.Unavailable):
        pool.reserve("one too many")
    assert not gates[2].begun.acquire(timeout=0.05)
    gates[1].opened.set()
    gates[2].wait()
    assert not pool.withdraw(keys[2])
    gates[0].opened.set(), gates[2].opened.set()
    assert pool.join(LONG) and pool.counts() == (0, 0)


def test_a_coroutine_that_waits_can_be_withdrawn():
    pool, gate = Coroutines(1), AsyncGate(1)
    never = AsyncGate()
    _, key = submit(pool, gate, never)
    gate.wait()
    assert pool.withdraw(key) and not pool.withdraw(key)
    gate.opened.set()
    assert pool.next_end() == (1, None)
    submit(pool, seven)
    assert pool.next_end() == (7, None)
    assert not never.begun.acquire(blocking=False)


def test_what_is_final_before_it_begins_gives_its_place_to_the_next():
    pool = Coroutines(1)
    skipped = AsyncGate()
    pool.skipped.add(skipped)
    submit(pool, skipped, skipped, seven)
    assert pool.next_end() == (7, None)
    assert pool.join(LONG) and not skipped.begun.acquire(blocking=False)


def test_a_coroutine_is_interrupted_where_it_waits_and_its_finally_may_wait():
    pool, gate, sister = Coroutines(), AsyncGate(), AsyncGate("well")
    key, _ = submit(pool, gate, sister)
    gate.wait(), sister.wait()
    error = taskserver.TaskError("cancelled")
    pool.interrupt(key, error), pool.interrupt(key, taskserver.TaskError("once more"))
    assert pool.next_end() == (None, error)
    assert gate.cleaned_up.is_set()
    pool.interrupt(key, error), pool.interrupt("unknown", error)  # of no use
    sister.opened.set()
    assert pool.next_end() == ("well", None)


def test_a_coroutine_that_returns_all_the_same_ends_as_it_says():
    pool, begun = Coroutines(), threading.Event()

    async def stubborn():
        import asyncio

        begun.set()
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            return "done before"

    (key,) = submit(pool, stubborn)
    assert begun.wait(LONG)
    pool.interrupt(key, taskserver.TaskError("cancelled"))
    assert pool.next_end() == ("done before", None)


def test_a_coroutine_that_goes_on_after_its_grace_is_given_up_and_keeps_its_place():
    pool, begun, may_end = Coroutines(1), threading.Event(), threading.Event()
    pool.grace = 0.01

    async def deaf():
        import asyncio

        begun.set()
        while not may_end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.001)

    key, _ = submit(pool, deaf, seven)
    assert begun.wait(LONG)
    error = taskserver.TaskError("cancelled")
    pool.interrupt(key, error)
    assert pool.next_end() == (None, error)
    assert pool.counts() == (1, 1)
    may_end.set()
    assert pool.next_end() == (7, None)
    assert pool.join(LONG) and pool.ended.empty()


def test_a_coroutine_has_a_time_limit():
    pool, gate, sister = Coroutines(), AsyncGate(), AsyncGate("in time")
    sister.opened.set()
    submit(pool, (gate, 0.05))
    value, error = pool.next_end()
    assert value is None and str(error) == "timed out after 0.05 seconds"
    submit(pool, (sister, LONG))
    assert pool.next_end() == ("in time", None)


def test_the_end_of_a_pool_interrupts_all_its_coroutines_and_ends_its_loop():
    pool, gates = Coroutines(), [AsyncGate() for _ in range(5)]
    pool.shut_down(LONG)  # there is no event loop yet
    submit(pool, *gates)
    for gate in gates:
        gate.wait()
    (loop,) = [thread for thread in threading.enumerate() if thread.name == "event-loop"]
    pool.shut_down(LONG)
    assert [type(pool.next_end()[1]) for _ in gates] == [taskserver.Stopped] * 5
    assert pool.counts() == (0, 0)
    loop.join(LONG)
    assert not loop.is_alive()


def test_a_coroutine_whose_first_step_is_slower_than_the_stop_is_interrupted_as_it_begins():
    pool, running, late = Coroutines(), AsyncGate(), AsyncGate()
    may_begin = threading.Event()
    first_steps = threading.Semaphore(0)

    def first_step(item):
        first_steps.release()
        assert item is running or may_begin.wait(LONG)

    pool.first_step = first_step
    submit(pool, running, late)
    running.wait()
    assert all(first_steps.acquire(timeout=LONG) for _ in range(2))
    stop = threading.Thread(target=pool.shut_down, args=(LONG,))
    stop.start()
    assert isinstance(pool.next_end()[1], taskserver.Stopped)  # so the stop has reached the loop
    may_begin.set()
    assert isinstance(pool.next_end()[1], taskserver.Stopped)
    stop.join(LONG)
    assert pool.counts() == (0, 0)


def test_coroutines_that_wait_when_their_pool_stops_do_not_begin():
    pool, gate, never = Coroutines(1), AsyncGate(1), AsyncGate()
    submit(pool, gate, never)
    gate.wait()
    assert pool.stop() == 1
    gate.opened.set()
    assert pool.next_end() == (1, None)
    assert pool.join(LONG) and pool.counts() == (1, 0)
    assert not never.begun.acquire(blocking=False)


def test_a_coroutine_that_cannot_be_cancelled_is_given_up_after_its_grace():
    pool, begun = Coroutines(), threading.Event()
    pool.grace = 0.01
    awaited = []

    async def function():
        import asyncio

        class Stubborn(asyncio.Future):
            def cancel(self, *message):
                raise RecursionError

        future = Stubborn()
        awaited.append((asyncio.get_running_loop(), future))
        begun.set()
        return await future

    key, _ = submit(pool, function, AsyncGate())
    assert begun.wait(LONG)
    pool.interrupt(key, taskserver.TaskError("by request"))
    assert str(pool.next_end()[1]) == "by request"
    loop, future = awaited.pop()
    loop.call_soon_threadsafe(future.set_result, 1)
    pool.shut_down(LONG)


@pytest.mark.parametrize("error", [ValueError("no more tasks"), SystemExit("no more tasks")])
def test_a_task_factory_that_fails_fails_coroutines_and_leaves_none_waiting(error):
    pool = Coroutines()

    async def spoil():
        import asyncio

        def refuse(*arguments, **more):
            arguments[1].close()
            raise error

        asyncio.get_running_loop().set_task_factory(refuse)

    submit(pool, spoil)
    assert pool.next_end() == (None, None)
    submit(pool, AsyncGate())
    assert str(pool.next_end()[1]) == "no more tasks"
    assert pool.join(LONG) and pool.counts() == (0, 0)


def test_no_coroutine_sees_the_context_variables_of_another():
    pool, variable = Coroutines(), contextvars.ContextVar("variable", default="fresh")

    async def function():
        seen = variable.get()
        variable.set("used")
        return seen

    variable.set("of the test")
    for _ in range(3):
        submit(pool, functools.partial(function))
        assert pool.next_end() == ("fresh", None)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_coroutines_wait_while_no_thread_can_be_started(monkeypatch, error):
    pool = Coroutines()

    def refuse(thread):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        submit(pool, seven)
        pool.wake()
        assert pool.ended.empty()
    pool.wake()
    assert pool.next_end() == (7, None)


def test_coroutines_wait_while_asyncio_cannot_be_imported(monkeypatch, caplog):
    monkeypatch.setattr(taskserver.EventLoop, "RETRY_SECONDS", 0.0)
    pool = Coroutines()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "asyncio", None)
        submit(pool, seven)
        assert eventually(lambda: "no event loop" in caplog.text)
        for _ in range(10):
            pool.wake()
    assert eventually(lambda: pool.wake() or not pool.ended.empty())
    assert pool.next_end() == (7, None)
    assert caplog.text.count("no event loop") == 1


def test_an_event_loop_that_was_closed_is_replaced():
    pool = Coroutines()

    async def close():
        loop = asyncio.get_running_loop()
        loop.run_forever = loop.close  # so it is closed when it is run again
        loop.call_soon(loop.stop)
        return "closed"

    async def where():
        return id(asyncio.get_running_loop())

    submit(pool, where)
    before, _ = pool.next_end()
    submit(pool, close)
    assert pool.next_end() == ("closed", None)
    assert eventually(lambda: "event-loop" not in [t.name for t in threading.enumerate()])
    submit(pool, where)
    after, error = pool.next_end()
    assert error is None and after != before


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), LookupError("a policy"), SystemExit(3)]
)
def test_coroutines_wait_while_no_event_loop_can_be_had(error, monkeypatch):
    monkeypatch.setattr(taskserver.EventLoop, "RETRY_SECONDS", 0.0)
    pool, refused = Coroutines(), threading.Event()

    def refuse():
        refused.set()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", refuse)
        submit(pool, seven)
        assert refused.wait(LONG)
        assert eventually(lambda: pool.counts() == (1, 0))

    def has_ended():
        pool.wake()
        return not pool.ended.empty()

    assert eventually(has_ended)
    assert pool.next_end() == (7, None)


def test_a_coroutine_can_be_withdrawn_while_the_first_steps_of_others_wait():
    pool, held = Coroutines(), Gate()
    pool.first_step = lambda item: held({})  # as when the disk hangs
    keys = submit(pool, *[seven] * 100)
    held.wait_for(pool.THREADS)
    assert pool.withdraw(keys[-1]) and not pool.withdraw(keys[-1]) and not pool.withdraw(keys[0])
    held.opened.set()
    assert [pool.next_end() for _ in range(99)] == [(7, None)] * 99
    assert pool.join(LONG) and pool.ended.empty()


# What wakes a thread that waits for sockets or pipes


@pytest.fixture
def waker():
    waker = taskserver.Waker()
    yield waker
    waker.close()


def can_be_read(waker):
    return bool(multiprocessing.connection.wait([waker], 0))


def test_a_wake_can_be_waited_for_until_it_is_cleared(waker):
    assert not can_be_read(waker)
    waker.wake()
    assert can_be_read(waker) and can_be_read(waker)
    waker.clear()
    assert not can_be_read(waker)
    waker.wake()
    assert can_be_read(waker)


def test_no_number_of_wakes_blocks_and_all_of_them_can_be_cleared(waker):
    for _ in range(1_000_000):  # as many bytes fit into no socket
        waker.wake()

    def is_cleared():  # where it is a TCP connection, bytes may still be on their way
        waker.clear()
        return not can_be_read(waker)

    assert eventually(is_cleared)


def test_what_is_there_before_a_wake_is_found_after_its_clear(waker):
    """Whoever wakes puts something in first. Whoever is woken clears first, then takes all."""
    things, taken, per_thread = queue.SimpleQueue(), [], 20_000

    def put():
        for _ in range(per_thread):
            things.put(None)
            waker.wake()

    threads = [threading.Thread(target=put) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(taken) < per_thread * len(threads):
        assert multiprocessing.connection.wait([waker], LONG), "a wake was lost"
        waker.clear()
        while not things.empty():
            taken.append(things.get())
    for thread in threads:
        thread.join()


def test_a_wake_after_the_close_does_nothing(waker):
    waker.close()
    waker.wake()


# -- 4. Child processes ----------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="needs fork")


class Leash:
    """What programs and copies hold on to, so that a test sees that they live, and lets them go.

    It is a port: unlike a process's number, a connection tells its end everywhere and at once.
    """

    # For a program of its own; the arguments are the port and what to say first.
    PROGRAM = (
        "import socket, sys\n"
        "end = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "end.sendall(sys.argv[2].encode() + b'\\n')\n"
        "end.recv(1)\n"
    )

    def __init__(self):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(16)
        self.listener.settimeout(LONG)
        self.port = self.listener.getsockname()[1]
        self.ends = []

    def next(self):
        """Wait for the next one that takes hold; return its end and what it says first."""
        end = self.listener.accept()[0]
        self.ends.append(end)
        end.settimeout(LONG)
        said = b""
        while not said.endswith(b"\n"):
            said += end.recv(1)
        return end, said.decode().strip()

    def close(self):
        for sock in [self.listener, *self.ends]:
            sock.close()


def let_go(end):
    end.sendall(b"\n")


def has_ended(end):
    """Wait until a process that holds on has ended; return whether it does in time."""
    try:
        return end.recv(1) == b""
    except ConnectionError:
        return True
    except socket.timeout:
        return False


def hold_on(port, said=""):
    """Hold on to a test's leash until the test lets go, or ends."""
    with socket.create_connection(("127.0.0.1", port)) as end:
        end.sendall(said.encode() + b"\n")
        end.recv(1)


@pytest.fixture
def leash():
    leash = Leash()
    yield leash
    leash.close()


def pid(payload, report):
    return os.getpid()


def end_itself(payload, report):
    how = payload["how"]
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, how))


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("never")


RAISED = {
    "exit": (SystemExit(3), "SystemExit: 3"),
    "interrupt": (KeyboardInterrupt(), "KeyboardInterrupt"),
    "memory": (MemoryError(), "MemoryError"),
    "unpicklable": (Unpicklable("text"), "Unpicklable: text"),
    "surrogate": (ValueError("\ud800 ü"), r"ValueError: \ud800 ü"),
    "speechless": (Speechless(), "Speechless: (an exception that cannot say what it is)"),
}


def raise_as_told(payload, report):
    report(0.1)
    report(0.2, "before")
    raise RAISED[payload["how"]][0]


def return_what_cannot_be(payload, report):
    if payload["how"] == "report":
        report(math.nan)
    results = {"nan": math.nan, "cycle": cycle(), "object": object(), "large": "x" * MIB}
    return results[payload["how"]]


def return_a_number_of_its_own(payload, report):
    return {"sum": decimal.Decimal("1.50")}


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


def hold(payload, report):
    """Hold on to the test's leash itself."""
    hold_on(payload["port"], str(os.getpid()))
    return "let go"


def start_a_program(payload, report):
    """Start a program that holds on to the test's leash; then end in one way or another."""
    command = [sys.executable, "-c", Leash.PROGRAM, str(payload["port"]), "the program"]
    subprocess.Popen(command, close_fds=False)  # it inherits all that can be inherited
    hold_on(payload["port"], "the child")
    if payload["how"] == "exit":
        os._exit(3)
    if payload["how"] != "return":
        threading.Event().wait()


def start_a_copy(payload, report):
    """Fork a copy that holds on to the test's leash, then die."""
    if os.fork() == 0:
        hold_on(payload["port"], "the copy")
        os._exit(0)
    hold_on(payload["port"], "the child")
    os._exit(3)


def read_stdin_in_a_program(payload, report):
    code = "import sys; print(repr(sys.stdin.read()))"
    return subprocess.check_output([sys.executable, "-c", code]).decode().strip()


# Signals that are blocked, ignored or handled in a program, before it does anything itself.
SIGNALS_OF_A_PROGRAM = (
    "import json, signal\n"
    "ignored = [n for n in range(1, signal.NSIG) if signal.getsignal(n) == signal.SIG_IGN]\n"
    "print(json.dumps([sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), ignored]))\n"
)


def signals_of_a_program(payload, report):
    out = subprocess.check_output([sys.executable, "-c", SIGNALS_OF_A_PROGRAM])
    return json.loads(out.decode())


def surroundings(payload, report):
    """Return what a task can change in its process, and which process that is."""
    umask = os.umask(0)
    os.umask(umask)
    handlers = [
        getattr(signal.getsignal(number), "__name__", str(signal.getsignal(number)))
        for number in range(1, signal.NSIG)
    ]
    found = [os.getpid(), os.getcwd(), umask, handlers]
    if os.name == "posix":
        timers = signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF
        found.append([signal.getitimer(timer)[0] for timer in timers])
        found.append(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        import resource

        found.append([resource.getrlimit(number) for number in limits_of_resources()])
    for number in range(3):
        status = os.fstat(number)
        found.append([status.st_dev, status.st_ino])
    return found


def limits_of_resources():
    """Return the number of each limit that a task can lower and raise again."""
    import resource

    return [getattr(resource, name) for name in ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_NOFILE")]


def leave_a_mess(payload, report):
    os.chdir(payload["path"])
    os.umask(0o777)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.name == "posix":
        os.rmdir(payload["path"])
        signal.signal(signal.SIGALRM, lambda number, frame: 1 / 0)
        for timer in signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF:
            signal.setitimer(timer, 1000)
        # One that would end the process as soon as it is not blocked any more.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        import resource

        for number in limits_of_resources():
            hard = resource.getrlimit(number)[1]
            resource.setrlimit(number, (1 << 40 if number == resource.RLIMIT_AS else 100, hard))
    os.close(0)
    os.close(1)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)


class HeardLive(taskserver.Live):
    """Has a function called with each report that comes from the child."""

    __slots__ = ("heard",)

    def __init__(self, heard):
        super().__init__()
        self.heard = heard

    def report(self, *report):
        self.heard(*report)
        super().report(*report)


@pytest.fixture
def child():
    """A child process, for the next three functions."""
    child = taskserver.Child(threading.Lock())
    yield child
    child.close()


def run_live(child, function, live, timeout=LONG, default=None, **payload):
    """Call a function in a child; return its result."""
    data = json.dumps(payload).encode()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # for Child blocks signals in its thread
        return json.loads(pool.submit(child.call, function, data, live, timeout, default).result())


def run(child, function, report=None, **more):
    """Call a function in a child, and another one here with each report; return its result."""
    live = HeardLive(report) if report else taskserver.Live()
    return run_live(child, function, live, **more)


def error_of(child, function, **more):
    with pytest.raises(taskserver.TaskError) as caught:
        run(child, function, **more)
    return caught.value.args[0]


def is_gone(pid):
    """Return whether a process has ended; one that nobody has waited for yet has, too."""
    if os.name == "nt":
        import ctypes

        kernel = ctypes.windll.kernel32
        handle = kernel.OpenProcess(0x100000, False, pid)  # SYNCHRONIZE: the right to wait for it
        if not handle:
            return True
        try:
            return kernel.WaitForSingleObject(handle, 0) == 0
        finally:
            kernel.CloseHandle(handle)
    try:
        os.kill(pid, 0)
    except OSError:
        return True
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_child_is_used_again_after_whatever_a_task_raises_or_returns(child):
    before = run(child, pid)
    assert before != os.getpid()
    for how, (_, error) in RAISED.items():
        assert error_of(child, raise_as_told, how=how) == error
    for how in "nan", "cycle", "object", "large", "report":
        assert error_of(child, return_what_cannot_be, how=how).startswith("ValueError: ")
    assert run(child, echo, result={"é": "x" * 1_000_000}) == {"é": "x" * 1_000_000}
    assert run(child, pid) == before


def test_default_makes_json_of_a_result_in_a_child_too(child):
    assert run(child, return_a_number_of_its_own, default=str) == {"sum": "1.50"}
    assert "['sum']" in error_of(child, return_a_number_of_its_own)


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

    error = error_of(child, raise_as_told, report=report, how="exit")
    assert error.startswith("the child process died")
    assert run(child, echo, result=5) == 5


@posix
def test_a_copy_that_a_function_forks_does_not_answer_as_well(child):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn: there are threads
        assert run(child, fork) == run(child, pid)
    for n in range(3):
        assert run(child, echo, result=n) == n


async def fork_and_return(payload, report):
    return os.fork()


async def fork_and_wait(payload, report):
    copy = os.fork()
    await asyncio.sleep(0 if copy else LONG)
    return copy


async def fork_in_another_task(payload, report):
    forked = asyncio.get_running_loop().create_future()

    async def fork():
        copy = os.fork()
        if copy:
            forked.set_result(copy)

    task = asyncio.ensure_future(fork())
    await task
    return await forked


async def fork_in_a_callback(payload, report):
    forked = asyncio.get_running_loop().create_future()

    def fork():
        copy = os.fork()
        if copy:
            forked.set_result(copy)

    asyncio.get_running_loop().call_soon(fork)
    return await forked


@posix
def test_a_copy_that_a_coroutine_forks_runs_no_other_coroutine(application, tmp_path):
    note = tmp_path / "pids"

    async def wake_others(payload, report):
        woken, forked = asyncio.Event(), asyncio.get_running_loop().create_future()

        async def wait():
            await woken.wait()
            with note.open("a") as file:
                file.write(f"{os.getpid()}\n")

        async def fork():
            copy = os.fork()
            woken.set()
            if copy:
                forked.set_result(copy)
            await asyncio.sleep(0)

        tasks = [asyncio.ensure_future(wait()) for _ in range(5)]
        await asyncio.sleep(0)
        for _ in range(10):
            asyncio.get_running_loop().call_soon(int)
        tasks.append(asyncio.ensure_future(fork()))
        for _ in range(10):
            asyncio.get_running_loop().call_soon(int)
        await asyncio.gather(*tasks)
        return await forked

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn: there are threads
        copy = outcome(application, wake_others)["result"]
    try:
        assert eventually(lambda: os.waitpid(copy, os.WNOHANG)[0] == copy)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(copy, signal.SIGKILL)
    assert note.read_text().split() == [str(os.getpid())] * 5


@posix
@pytest.mark.parametrize(
    "fork", [fork_and_return, fork_and_wait, fork_in_another_task, fork_in_a_callback]
)
def test_a_copy_that_a_coroutine_forks_ends_when_it_would_go_back_to_the_loop(application, fork):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn: there are threads
        copy = outcome(application, fork)["result"]
    try:
        assert eventually(lambda: os.waitpid(copy, os.WNOHANG) == (copy, 0))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(copy, signal.SIGKILL)


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


def begin_reporters_late(payload, report):
    """Have the threads that send reports begin when the function has reported."""
    send = taskserver._send_reports

    def send_late(pipe, live, done):
        while live.progress[1] is None and not done.wait(0.001):
            pass
        send(pipe, live, done)

    taskserver._send_reports = send_late


def report_once(payload, report):
    report(0.5, "early")


def test_a_report_that_comes_before_its_thread_has_begun_is_sent(child):
    heard = []
    run(child, begin_reporters_late)
    run(child, report_once, lambda *report: heard.append(report))
    assert heard == [(0.5, "early")]


def take_threads_away(payload, report):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse


def test_a_child_without_a_thread_for_reports_says_so(child):
    run(child, take_threads_away)
    assert error_of(child, echo) == "RuntimeError: can't start new thread"


def test_a_dead_child_fails_its_task_alone_says_how_it_died_and_is_replaced(child):
    ends = {"exit": "exit status 3"}
    if os.name == "posix":
        ends.update(SIGKILL="killed by signal 9", SIGABRT="killed by signal 6")
    for how, status in ends.items():
        before = run(child, pid)
        assert error_of(child, end_itself, how=how) == f"the child process died ({status})"
        assert run(child, pid) != before
    for is_noticed in True, False:
        before = run(child, pid)
        os.kill(before, signal.SIGABRT)  # on Windows, any signal ends it at once
        if is_noticed:
            assert eventually(lambda: not multiprocessing.active_children())
        assert run(child, pid) != before  # one that dies between two tasks costs none


def leave_a_daemon(payload, report):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            hold_on(payload["port"], "the daemon")
        os._exit(0)
    return os.getpid()


@posix
def test_a_daemon_that_a_task_has_left_costs_the_next_one_nothing_though_its_child_dies(
    child, leash
):
    before = run(child, leave_a_daemon, port=leash.port)
    end, _ = leash.next()
    os.kill(before, signal.SIGKILL)
    assert run(child, pid) != before
    let_go(end)


REAP = """
import os, signal, threading, taskserver, test_taskserver as tests
if __name__ == "__main__":
    child = taskserver.Child(threading.Lock())
    number = tests.run(child, tests.pid)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)  # as a task in a thread may do
    ending = threading.Thread(target=child.end, daemon=True)
    ending.start()
    ending.join(4)
    print("waits on" if ending.is_alive() else "has ended")
    os._exit(0)
"""


@posix
def test_a_child_that_somebody_else_has_reaped_is_not_waited_for():
    assert python(REAP).strip() == "has ended"


def test_no_task_begins_in_a_new_child_once_all_are_killed(monkeypatch, tmp_path):
    children, done = taskserver.Children(), tmp_path / "done"
    wait = multiprocessing.connection.wait

    def kill_and_wait(*of):
        # Between the look whether tasks may begin, and the child's READY.
        monkeypatch.setattr(multiprocessing.connection, "wait", wait)
        children.kill()
        return wait(*of)

    def call(function, **payload):
        data = json.dumps(payload).encode()
        return children.call(function, data, taskserver.Live(), LONG, None)

    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        worker.submit(call, pid).result()
        monkeypatch.setattr(multiprocessing.connection, "wait", kill_and_wait)
        with pytest.raises(taskserver.TaskError):
            worker.submit(call, touch, path=str(done)).result()
        worker.submit(children.end_mine).result()
    assert not done.exists()


def touch(payload, report):
    pathlib.Path(payload["path"]).touch()


def lower_a_hard_limit(payload, report):
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    if os.getuid() == 0:
        os.setuid(65534)  # root could raise it again


def limit_of_files(payload, report):
    import resource

    return list(resource.getrlimit(resource.RLIMIT_NOFILE))


@posix
def test_a_hard_limit_that_a_task_has_lowered_is_not_that_of_the_next(child):
    before = run(child, limit_of_files)
    run(child, lower_a_hard_limit)
    assert run(child, limit_of_files) == before


@linux
def test_children_that_have_ended_hold_no_descriptors(child):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    error_of(child, end_itself, how="exit")
    before = descriptors()
    for _ in range(5):
        error_of(child, end_itself, how="exit")
    assert descriptors() == before


def test_a_task_beyond_its_time_is_ended_but_the_start_of_a_child_does_not_count(child, leash):
    assert run(child, echo, timeout=0.05, result=1) == 1  # a start takes longer
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        error = pool.submit(error_of, child, hold, timeout=0.2, port=leash.port)
        end, _ = leash.next()
        assert error.result() == "timed out after 0.2 seconds"
        assert has_ended(end)


# What must end with a child: its time is over, it crashes, its task is cancelled, it is ended by
# its worker, or by the end of its server.
ENDS = ["timeout", "exit", "kill", "cancel", "end of the worker", "end of the server"]


@posix
@pytest.mark.parametrize("how", ENDS)
def test_what_a_task_has_started_ends_with_its_child(child, leash, how):
    live = taskserver.Live()
    more = {"port": leash.port, "how": how}
    if how == "timeout" or how.startswith("end of"):
        more["how"] = "return"
    number = run(child, pid)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(run_live, child, start_a_program, live, **more)
        ends = {said: end for end, said in (leash.next(), leash.next())}
        let_go(ends["the child"])
        if how == "kill":
            os.kill(number, signal.SIGKILL)
        elif how == "cancel":
            live.cancel_requested = True
            child.wake()
        if more["how"] == "return":
            assert outcome.result() is None
            assert not select.select([ends["the program"]], [], [], 0)[0]  # until its child ends
        else:
            error = outcome.exception(LONG)  # it does not wait for the program
            assert isinstance(error, (taskserver.TaskError, taskserver.Cancelled))
    if how == "timeout":
        assert error_of(child, sleep_long, timeout=0.1) == "timed out after 0.1 seconds"
    elif how == "end of the worker":
        child.end()
    elif how == "end of the server":
        child.kill()
    assert has_ended(ends["the program"])


@needs_fork
def test_a_child_that_dies_is_missed_though_a_copy_of_it_lives(child, leash):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        error = pool.submit(error_of, child, start_a_copy, port=leash.port)
        ends = {said: end for end, said in (leash.next(), leash.next())}
        let_go(ends["the child"])
        assert error.result(LONG) == "the child process died (exit status 3)"
    assert has_ended(ends["the copy"])


@posix
def test_a_program_that_a_task_runs_reads_nothing_and_has_no_signal_blocked_or_ignored(child):
    assert run(child, read_stdin_in_a_program) == "''"
    out = subprocess.check_output([sys.executable, "-c", SIGNALS_OF_A_PROGRAM])
    _, ignored_without_us = json.loads(out.decode())
    blocked, ignored = run(child, signals_of_a_program)
    assert blocked == []
    assert set(ignored) <= set(ignored_without_us)  # Python ignores some, and so may who runs this
    assert not {signal.SIGINT, signal.SIGTERM} & set(ignored)


def test_what_a_task_leaves_in_its_child_is_put_back_before_the_next(child, tmp_path):
    (tmp_path / "deleted").mkdir()
    before = run(child, surroundings)
    assert run(child, leave_a_mess, path=str(tmp_path / "deleted")) is None
    assert run(child, surroundings) == before


@posix
def test_a_working_directory_that_was_deleted_is_named(child, tmp_path, monkeypatch):
    (tmp_path / "deleted").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "deleted")
        (tmp_path / "deleted").rmdir()
        assert "the working directory of the server was deleted" in error_of(child, pid)
    number = run(child, pid)
    with monkeypatch.context() as patch:
        (tmp_path / "deleted").mkdir()
        patch.chdir(tmp_path / "deleted")
        (tmp_path / "deleted").rmdir()
        assert run(child, pid) == number  # who has a child already needs none


@posix
def test_children_step_back_and_outlive_what_is_sent_to_all(child, leash):
    assert run(child, nice) >= min(19, os.nice(0) + 10)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, child, hold, port=leash.port)
        end, number = leash.next()
        for name in "SIGINT", "SIGTERM", "SIGHUP":
            os.kill(int(number), getattr(signal, name))
        let_go(end)
        assert result.result() == "let go"
    for name in "SIGINT", "SIGTERM", "SIGHUP":
        os.kill(int(number), getattr(signal, name))
        assert run(child, pid) == int(number)


def nice(payload, report):
    return os.nice(0)


def test_a_cancel_ends_a_child_and_one_that_comes_late_ends_none(child, leash):
    live = taskserver.Live()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(run_live, child, hold, live, port=leash.port)
        end, _ = leash.next()
        child.wake()  # for another task
        live.cancel_requested = True
        child.wake()
        assert isinstance(outcome.exception(LONG), taskserver.Cancelled)
        assert has_ended(end)
    before = run(child, pid)
    for _ in range(3):
        for _ in range(100):
            child.wake()
        assert run(child, pid) == before
    with pytest.raises(taskserver.Cancelled):  # it is cancelled before the child begins
        run_live(child, hold, live, port=leash.port)
    assert run(child, echo, result=5) == 5


def test_reports_cross_in_order_throttled_and_the_last_is_never_lost(child, tmp_path):
    got = []
    begun = time.monotonic()
    run(child, storm, report=lambda *report: got.append(report))
    took = time.monotonic() - begun
    assert got[-1] == (1.0, "last")
    assert got == sorted(got, key=lambda report: report[0])
    assert len(got) <= 3 + 25 * took

    def report(fraction, message):
        got.append(message)
        if message == "second":
            (tmp_path / "go").write_text("")  # the task goes on only because this report came

    assert run(child, wait_for_file, report=report, path=str(tmp_path / "go")) is True
    assert got[-1] == "second"
    error_of(child, raise_as_told, report=lambda *report: got.append(report), how="exit")
    assert got[-1] == (0.2, "before")


def test_reports_of_a_stray_thread_are_ignored_after_the_end(child):
    before, got = run(child, pid), []
    run(child, leave_a_thread)
    assert not threading.Event().wait(0.3)  # the thread reports, and nobody asks
    assert run(child, pid, report=lambda *report: got.append(report)) == before
    for n in range(20):
        assert run(child, echo, report=lambda *report: got.append(report), result=n) == n
    assert got == []


@pytest.mark.parametrize(
    "error",
    [BlockingIOError(11, "no process"), OSError(24, "no descriptor"), MemoryError()],
    ids=brief,
)
def test_no_process_to_be_had_fails_the_task_and_the_next_one_tries_again(
    child, monkeypatch, error
):
    def start(process):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.get_context("spawn").Process, "start", start)
        assert "no child process can take the task: " in error_of(child, echo)
    assert run(child, echo, result=1) == 1


def test_cpu_tasks_run_in_children_of_their_own_and_end_with_their_workers(application):
    application.cpu_pool.max_workers = 2
    application.task("pid", cpu=True)(pid)
    application.task("sleep", cpu=True, timeout=0.5)(sleep_long)
    application.task("killed", cpu=True)(end_itself)
    slow, killed = create(application, "sleep"), create(application, "killed", how="exit")
    assert final(application, killed)["error"] == "the child process died (exit status 3)"
    slow = final(application, slow)
    assert slow["error"] == "timed out after 0.5 seconds"
    assert (slow["progress"], slow["result"]) == (0.5, None)
    assert final(application, create(application, "pid"))["result"] != os.getpid()


def test_the_end_of_all_children_ends_no_process_of_others(application, leash):
    application.task("hold", cpu=True)(hold)
    other = multiprocessing.get_context("spawn").Process(target=hold_on, args=(leash.port,))
    other.start()
    held, _ = leash.next()
    record = create(application, "hold", port=leash.port)
    own, _ = leash.next()
    application.children.kill()
    assert has_ended(own)
    assert final(application, record)["error"].startswith("the child process died")
    assert other.is_alive()
    let_go(held)
    other.join(LONG)
    assert other.exitcode == 0


@needs_fork
def test_a_copy_that_a_task_in_a_thread_forks_does_not_keep_children_alive(child, leash):
    """Their server ends, and they must see that, though a copy of the server lives."""
    code = (
        "import sys, threading, taskserver, test_taskserver as tests\n"
        "if __name__ == '__main__':\n"
        "    child, port = taskserver.Child(threading.Lock()), int(sys.argv[1])\n"
        "    begin = threading.Thread(target=tests.run, args=(child, tests.hold),\n"
        "                             kwargs={'port': port}, daemon=True)\n"
        "    begin.start()\n"
        "    tests.hold_on(port, 'the server')\n"
        "    if tests.os.fork() == 0:\n"
        "        tests.hold_on(port, 'the copy')\n"
        "        tests.os._exit(0)\n"
        "    tests.hold_on(port, 'the server again')\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(leash.port)]
    server = subprocess.Popen(command, cwd=str(PROGRAM.parent))
    try:
        ends = dict(reversed(leash.next()) for _ in range(2))
        let_go(ends.pop("the server"))
        ((_, child_end),) = ends.items()
        ends = dict(reversed(leash.next()) for _ in range(2))
        server.kill()
        assert has_ended(child_end)
        assert not select.select([ends["the copy"]], [], [], 0)[0]
    finally:
        server.kill()
        server.wait(LONG)


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
        created = program.ask("POST", "/create-mine", {"name": "x", "burn": True})
        path = "/poll-mine/" + created.json["id"]
        assert eventually(lambda path=path: program.ask("GET", path).json["message"])
        numbers.append(int(program.ask("GET", path).json["message"]))
    assert not any(map(is_gone, numbers))
    assert len(set(numbers)) == 2
    return numbers


@pytest.mark.parametrize(
    "number, grace, status",
    [
        (None, "1", None),
        (signal.SIGTERM, "0.2", 0),
        (signal.SIGINT, "0.2", 0),
        (signal.SIGTERM, "1000", 143),
    ],
)
def test_children_end_with_their_server_however_it_ends(tmp_path, number, grace, status):
    file = tmp_path / "mine.py"
    file.write_text(MAIN.format(guard="if __name__ == '__main__': "))
    with Program("--cpu-workers", "2", "--grace", grace, file=file) as program:
        record = program.ask("POST", "/create-mine", {"name": "x"}).json
        record = program.ask("GET", f"/poll-mine/{record['id']}?wait=30").json
        assert record["result"] == "__mp_main__"
        numbers = burning(program)
        if status == 143:  # a second signal follows
            program.send(number)
            assert "stopping" in program.log(wait_for="stopping")
        if number is None:  # no signal but kill -9, or what is like it on Windows
            program.process.kill()
            assert program.process.wait(LONG)
        else:
            assert program.stops(number) == status
        assert eventually(lambda: all(map(is_gone, numbers)), 5)
        assert "Traceback" not in program.log()


def test_a_missing_main_guard_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MAIN.format(guard=""))
    with Program(file=file) as program:
        record = program.ask("POST", "/create-mine", {"name": "x"}).json
        record = program.ask("GET", f"/poll-mine/{record['id']}?wait=30").json
        assert record["status"] == "failed"
        assert "__main__" in record["error"]
        assert "__main__" in program.log()
        assert "Traceback" not in program.log()


# -- 5. Requests, responses, routes ----------------------------------------------------------------


@pytest.fixture
def router():
    router = Router()
    for known in "GET /", "POST /create-a", "GET /poll-a/{id}", "GET /both", "POST /both":
        router.add(*known.split(), lambda *_, found=known: found)
    return router


@pytest.mark.parametrize(
    "method, path, found",
    [
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
    ],
)
def test_a_path_finds_its_endpoint_and_is_decoded_once(router, method, path, found):
    call = router.match(method, path)
    assert (call.route.endpoint(), call.arguments) == found


@pytest.mark.parametrize(
    "path",
    [
        "",
        "//",
        "/x",
        "/create-a/",
        "//create-a",
        "/create-a%00",
        "/create-a%2F",
        "/poll-a",
        "/poll-a/7/",
        "/poll-a%2F7",
        "/poll-a/7/8",
        "/./create-a",
        "/x/../create-a",
        "/CREATE-A",
        "/create%2Da/x",
        "/{id}",
        "*x",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "BREW"])
def test_an_unknown_path_is_404_whatever_the_method(router, method, path):
    with pytest.raises(HTTPError) as caught:
        router.match(method, path)
    assert caught.value.response.status == 404


@pytest.mark.parametrize(
    "path, allow",
    [
        ("/", "GET, HEAD, OPTIONS"),
        ("/create-a", "OPTIONS, POST"),
        ("/poll-a/7", "GET, HEAD, OPTIONS"),
        ("/both", "GET, HEAD, OPTIONS, POST"),
    ],
)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "TRACE", "BREW", "get", "post", "OPTIONS"])
def test_another_method_is_405_with_allow_and_options_204(router, method, path, allow):
    if method == "OPTIONS":
        response = router.match(method, path).route.endpoint(Request(method, path))
    else:
        with pytest.raises(HTTPError) as caught:
            router.match(method, path)
        response = caught.value.response
    assert response.status == (204 if method == "OPTIONS" else 405)
    assert dict(response.headers)["Allow"] == allow


def test_options_for_the_whole_server(router):
    response = router.match("OPTIONS", "*").route.endpoint(Request("OPTIONS", "*"))
    assert (response.status, response.body) == (204, b"")


def test_a_path_of_its_own_goes_before_any_id(router):
    router.add("GET", "/poll-a/newest", lambda *_: "newest")
    assert router.match("GET", "/poll-a/newest").route.endpoint() == "newest"
    assert router.match("GET", "/poll-a/{id}").arguments == ("{id}",)


def test_a_route_that_is_added_later_is_found(router):
    with pytest.raises(HTTPError):
        router.match("GET", "/late")
    router.add("GET", "/late", lambda: "late")
    assert router.match("GET", "/late").route.endpoint() == "late"


def test_a_route_says_what_there_is_and_may_block_unless_it_says_otherwise(router):
    router.add("GET", "/quick", seven, blocks=taskserver.never_blocks, summary="Quick")
    plain, quick = router.match("GET", "/both").route, router.match("HEAD", "/quick").route
    assert plain.blocks(Request("GET", "/both")) and not quick.blocks(Request("GET", "/quick"))
    assert [route.pattern for route in router.routes[-2:]] == ["/both", "/quick"]
    assert router.routes[-1].summary == "Quick"
    with pytest.raises(TypeError, match="sumary"):
        router.add("GET", "/typing-error", seven, sumary="Quick")


def test_a_request_with_a_body_is_the_same_request():
    request = Request("POST", "/x", "a=b", "h", Fields({"c": "d"}, 3), b"", "192.0.2.1", False)
    assert request.with_body(b"abc") == request._replace(body=b"abc")


@pytest.mark.parametrize(
    "query, value",
    [
        ("", None),
        ("other=5", None),
        ("n=5", "5"),
        ("n=%35&m=1", "5"),
        ("n=5&n=5", HTTPError),
        ("n=", HTTPError),
        ("n", HTTPError),
        ("n=x", HTTPError),
        ("n=5%0A", HTTPError),
    ],
)
def test_a_parameter_of_the_query_matches_its_pattern_or_is_400_with_an_example(query, value):
    request = Request("GET", "/x", query)
    if value is not HTTPError:
        assert request.parameter("n", "[0-9]", example="7") == value
        return
    with pytest.raises(HTTPError, match="n=7") as caught:
        request.parameter("n", "[0-9]", example="7")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "seconds, text",
    [(-5, "1"), (0, "1"), (0.2, "1"), (1, "1"), (1.01, "2"), (math.inf, "1000000000")],
)
def test_what_cannot_be_done_now_is_503_with_whole_seconds_to_wait(seconds, text):
    response = taskserver.unavailable(taskserver.Unavailable("Not now.", seconds)).response
    assert (response.status, response.headers) == (503, (("Retry-After", text),))
    assert json.loads(response.body.decode()) == {"error": "Not now."}


def test_a_refusal_is_one_sentence_in_json():
    response = HTTPError(503, 'Say "why".', ("Retry-After", "1")).response
    assert (response.status, response.content_type) == (503, "application/json")
    assert response.headers == (("Retry-After", "1"),)
    assert json.loads(response.body.decode()) == {"error": 'Say "why".'}


@pytest.mark.parametrize(
    "body, value",
    [
        (b"{}", {}),
        (b' \r\n\t{"a" : 1 } ', {"a": 1}),
        (
            b'{"a": [true, false, null, -0.5e3, "\xc3\xa9\\u00e9\\ud83d\\ude00"]}',
            {"a": [True, False, None, -500.0, "éé😀"]},
        ),
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
    ],
)
def test_a_strict_json_object_is_decoded(body, value):
    decoded = taskserver.decode_object(body)
    assert "a" in decoded if value is None else decoded == value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"{}"',
        b"1",
        b"{} {}",
        b"{",
        b"}",
        b'{"a": 1,}',
        b"{'a': 1}",
        b'{"a": 01}',
        b'{"a": .5}',
        b'{"a": +1}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": -1e999}',
        b'{"a": 1, "a": 2}',
        b'{"b": [{"a": 1, "a": 1}]}',
        b'{"a": 1, "\\u0061": 2}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\xc0\x80"}',
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        '{"a": 1}'.encode("utf-16-le"),
        b'{"a": "\n"}',
        b'{"a": "\0"}',
        b'{"a": "\\x41"}',
        b'{"a": tru}',
        b'{"a": 1}\0',
        b'{"a": 1 // comment\n}',
        b'\x0c{"a": 1}',
        '{"a": ١}'.encode(),
        b'{"a": %s1%s}' % (b"[" * 100, b"]" * 100),
        b'{"a":' * 101 + b"1" + b"}" * 101,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": %s}' % (b"9" * 4301),
        b'{"a": -%s}' % (b"9" * 4301),
        b'{"a": %s}' % (b"9" * 1_000_000),
        b'{"a": "%s' % (b"\\" * 100_001),
    ],
    ids=brief,
)
def test_anything_else_is_400(body):
    with pytest.raises(HTTPError) as caught:
        taskserver.decode_object(body)
    response = caught.value.response
    assert response.status == 400 and len(response.body) < 500
    assert list(json.loads(response.body.decode())) == ["error"]


def test_an_unterminated_string_of_escapes_is_refused_in_a_time_that_grows_with_its_length():
    for end in b"", b"\\":
        # With a search for each quote this takes an hour.
        body = b"[" * 101 + b'"' + b'\\"' * 400_000 + end
        with pytest.raises(HTTPError) as refused:
            taskserver.decode_object(body)
        assert refused.value.response.status == 400


def test_a_string_full_of_brackets_is_not_nested():
    assert taskserver.decode_object(b'{"name": "%s"}' % (b"[" * 200)) == {"name": "[" * 200}
    with pytest.raises(HTTPError, match="one JSON object"):
        taskserver.decode_object(b'"' + b"[" * 200 + b'"')


@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_json_with_a_byte_order_mark_is_400_and_the_sentence_names_it(codec):
    with pytest.raises(HTTPError, match="byte order mark") as caught:
        taskserver.decode_object('\ufeff{"name": "x"}'.encode(codec))
    assert caught.value.status == 400


# -- 6. Application --------------------------------------------------------------------------------


BUILD = """
import multiprocessing, sys, threading
import taskserver

application = taskserver.demo()
taskserver.add_monitoring(application)
taskserver.add_pages(application)

@application.task("coroutine", timeout=5)
async def coroutine(payload, report):
    pass

print(threading.active_count(), multiprocessing.active_children(), "asyncio" in sys.modules)
"""


def test_building_an_application_starts_nothing_and_imports_no_asyncio():
    command = [sys.executable, "-c", BUILD]
    out = subprocess.check_output(command, cwd=str(PROGRAM.parent))
    assert out.split() == [b"1", b"[]", b"False"]


def test_the_decorator_returns_the_function_unchanged():
    assert Application().task("echo")(echo) is echo
    assert Application().task("echo", cpu=True, timeout=5)(echo) is echo
    assert Application().task("wait", timeout=5)(wait_a_moment) is wait_a_moment


@pytest.mark.parametrize(
    "name", ["", "A", "a b", "1a", "-a", "a_b", "a/b", "é", "a\n", "{id}", "a.b", None, 5]
)
def test_a_bad_name_of_a_task_type_is_a_value_error(name):
    with pytest.raises(ValueError, match="choose a name"):
        Application().task(name)


def test_a_name_that_is_taken_is_a_value_error():
    application = Application()
    application.task("a-1")(echo)
    with pytest.raises(ValueError, match="'a-1'.*taken"):
        application.task("a-1")(fail)
    decorator = application.task("a-2")
    decorator(echo)
    with pytest.raises(ValueError, match="'a-2'.*taken"):
        decorator(fail)


async def wait_a_moment(payload, report):
    return payload.get("result")


def yields(payload, report):
    yield 1


async def yields_later(payload, report):
    yield 1


class Ways:
    """Ways in which an object can be called, or cannot."""

    def plain(self, payload, report):
        return [self.__class__.__name__, payload["name"]]

    def yields(self, payload, report):
        yield 1

    async def waits(self, payload, report):
        return payload["name"]

    @staticmethod
    def static(payload, report):
        return payload["name"]


class Plain(Ways):
    __call__ = Ways.plain


class Yields(Ways):
    __call__ = Ways.yields


class Waits(Ways):
    __call__ = Ways.waits


def one_argument(payload):
    pass


def three_arguments(payload, report, more):
    pass


def only_by_name(payload, *, report):
    pass


def through(function):
    """Return a function that hands everything on, as decorators do."""

    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


def without_report(function):
    """Return a function of two arguments that calls one of one."""

    @functools.wraps(function)
    def wrapper(payload, report):
        return function(payload)

    return wrapper


def name_of(payload):
    return payload["name"]


TWO = r"must take two arguments, \(payload, report\)"
YIELDS = "a generator cannot be a task: return the result instead of yielding"
TOP_LEVEL = "with cpu=True, use a function at the top level of a module"
WAITS = "a coroutine waits and does not compute: leave out cpu=True"
NO_FUNCTION = r"decorate a function that takes \(payload, report\)"
CPU = {"cpu": True}


@pytest.mark.parametrize(
    "function, options, sentence",
    [
        (one_argument, {}, TWO),
        (three_arguments, {}, TWO),
        (only_by_name, {}, TWO),
        (lambda: None, {}, TWO),
        (functools.partial(echo, {}), {}, TWO),
        (Ways.plain, {}, TWO),  # of the class, which lacks an object
        (yields, {}, YIELDS),
        (yields_later, {}, YIELDS),
        (functools.partial(yields), {}, YIELDS),
        (Ways().yields, {}, YIELDS),
        (Yields(), {}, YIELDS),
        (Ways, {}, NO_FUNCTION),
        (None, {}, NO_FUNCTION),
        ("echo", {}, NO_FUNCTION),
        (staticmethod(echo), {}, "swap the decorators: @staticmethod above @application.task"),
        (classmethod(echo), {}, "swap the decorators: @classmethod above @application.task"),
        (property(echo), {}, "swap the decorators: @property above @application.task"),
        (lambda payload, report: None, CPU, TOP_LEVEL),
        (functools.partial(lambda payload, report: None), CPU, TOP_LEVEL),
        (through(lambda payload, report: None), CPU, TOP_LEVEL),
        (wait_a_moment, CPU, WAITS),
        (Waits(), CPU, WAITS),
        (functools.partial(wait_a_moment), CPU, WAITS),
        (echo, {"timeout": 5}, "a thread cannot be ended, so leave out timeout="),
        (Plain(), {"timeout": 5}, "a thread cannot be ended, so leave out timeout="),
    ],
)
def test_a_function_that_cannot_work_is_refused_with_a_sentence(function, options, sentence):
    application = Application()
    with pytest.raises(ValueError, match="^task type 'x': .*" + sentence):
        application.task("x", **options)(function)
    application.task("x")(echo)  # the name is free


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, 1e7, "5", [5]], ids=brief)
@pytest.mark.parametrize("options", [{}, CPU])
def test_a_time_limit_is_a_number_of_seconds(options, timeout):
    with pytest.raises(
        ValueError, match="'x': use a timeout= of more than 0 and at most a million"
    ):
        Application().task("x", timeout=timeout, **options)


@pytest.mark.parametrize(
    "schemas", [["n"], {"n": int}, {"n": "integer"}, {"n": {"type": int}}, {"name": {}}], ids=brief
)
def test_what_is_no_schema_of_a_payload_is_refused(schemas):
    with pytest.raises(ValueError, match="task type 'x': in payload=, "):
        Application().task("x", payload=schemas)


def test_options_that_do_not_exist_are_a_type_error_and_that_of_executors_shows_what_to_do():
    with pytest.raises(TypeError, match=r"'x'.*await .*run_in_executor\(executor, work, payload\)"):
        Application().task("x", executor=None)
    with pytest.raises(TypeError, match="'x'.*no option time_out="):
        Application().task("x", time_out=5)
    with pytest.raises(TypeError, match="name the task type"):
        Application().task(echo)


@pytest.mark.parametrize(
    "function, result",
    [
        (Ways().plain, ["Ways", "sample"]),
        (Ways().static, "sample"),
        (Plain(), ["Plain", "sample"]),
        (functools.partial(lambda more, payload, report: more, 7), 7),
        (functools.partial(Ways().plain), ["Ways", "sample"]),
        (through(Ways().plain), ["Ways", "sample"]),
        (without_report(name_of), "sample"),
        (lambda *arguments: len(arguments), 2),
        (lambda payload, report, more=7: more, 7),
        (wait_a_moment, None),
        (functools.partial(wait_a_moment), None),
        (Ways().waits, "sample"),
        (Waits(), "sample"),
    ],
)
def test_whatever_takes_two_arguments_can_be_a_task(application, function, result):
    record = outcome(application, function)
    assert (record["status"], record["result"]) == ("completed", result)


def test_a_plain_function_that_returns_an_awaitable_fails_with_a_sentence(application):
    class Promise:
        def __await__(self):
            yield

    for function in through(wait_a_moment), lambda payload, report: Promise():
        record = outcome(application, function)
        sentence = "the function returned an awaitable; declare it with `async def`"
        assert (record["status"], record["error"]) == ("failed", sentence)


IN_MAIN = """
import taskserver

application = taskserver.Application()

@application.task("x", cpu=True)
def work(payload, report):
    pass

try:
    application.check_types()
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["a package", "a command line", "a file"])
def test_what_a_child_cannot_import_is_refused_at_the_start(tmp_path, how):
    (tmp_path / "package").mkdir()
    main = tmp_path / "package" / "__main__.py"
    main.write_text(IN_MAIN)
    command = {"a package": ["-m", "package"], "a command line": ["-c", IN_MAIN], "a file": [main]}
    out = subprocess.check_output(
        [sys.executable, *map(str, command[how])],
        cwd=str(tmp_path),
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parent)},
    )
    sentence = b"task type 'x': a child process cannot import this program; with cpu=True, move"
    assert out.startswith(sentence) if how != "a file" else not out


hidden = through(Ways.static)  # its name leads to another function


def test_what_cannot_be_pickled_for_a_child_is_refused_at_the_start():
    for function in hidden, NotToBePickled():
        application = Application()
        application.task("x", cpu=True)(function)
        with pytest.raises(ValueError, match="'x': a child process cannot get this function") as it:
            application.check_types()
        assert "at the top level of a module" in str(it.value)
    application = Application(default=lambda value: None)
    application.task("x", cpu=True)(echo)
    with pytest.raises(ValueError, match="'x': a child process cannot get"):
        application.check_types()
    application = Application(default=str)
    application.task("x", cpu=True)(echo)
    application.task("in-a-thread")(NotToBePickled())
    application.check_types()


def test_a_module_that_a_child_does_not_find_is_refused_at_the_start(tmp_path, monkeypatch):
    """As those who load plugins by their path have it."""
    for name in "plugin", "package", "package.plugin":
        path = tmp_path.joinpath("elsewhere", *name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("def work(payload, report): return payload")
        spec = importlib.util.spec_from_file_location(name, str(path))
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        application = Application()
        application.task("x", cpu=True)(module.work)
        with pytest.raises(ValueError, match=f"'x': a child process cannot import {name}; with"):
            application.check_types()
    for found in echo, Plain(), functools.partial(echo), divmod:
        application = Application()
        application.task("x", cpu=True)(found)
        application.check_types()


class NotToBePickled:
    def __call__(self, payload, report):
        pass

    def __reduce__(self):
        raise TypeError("not this one")


def test_the_description_shows_the_text_of_a_function_and_not_that_of_what_wraps_it():
    application = Application()
    application.task("wrapped")(functools.partial(echo))
    application.task("method")(Ways().plain)
    paths = taskserver.openapi(application)["paths"]
    assert paths["/create-wrapped"]["post"]["description"] == "Return what was sent."
    assert "partial" not in json.dumps(paths)


def test_create_answers_201_with_the_record_and_its_location(application):
    begun = time.time()
    answer = ask(application, "POST", "/create-gate", {"name": "ü \U0001f600"})
    record = answer.json
    assert answer.status == 201
    assert answer.headers["Location"] == f"/poll-gate/{record['id']}"
    assert str(uuid.UUID(record["id"])) == record["id"] and uuid.UUID(record["id"]).version == 4
    assert list(record) == KEYS
    assert {key: record[key] for key in KEYS[5:]} == dict.fromkeys(KEYS[5:])
    seen = (record["name"], record["status"], record["type"])
    assert seen == ("ü \U0001f600", "pending", "gate")
    created = time.strptime(record["created_at"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert abs(calendar.timegm(created) - begun) < 5


def test_pending_covers_waiting_and_running_and_ends_as_completed(application, gate):
    application.pool.max_workers = 1
    first = create(application, "gate", result=[1])
    second = create(application, "gate", result={"a": None})
    gate.wait_for()
    running, waiting = poll(application, first), poll(application, second)
    seen = [running[key] for key in ("status", "progress", "message")]
    assert seen == ["pending", 0.25, "at the gate"]
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


@pytest.mark.parametrize(
    "raised, error",
    [
        (ValueError("what it said"), "ValueError: what it said"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit("x"), "GeneratorExit: x"),
        (AssertionError(), "AssertionError"),
        (ValueError("caf\udce9 \0"), "ValueError: caf\\udce9 \0"),
        (Speechless(), "Speechless: (an exception that cannot say what it is)"),
        (HTTPError(404, "no"), "HTTPError: (404, 'no')"),
        (taskserver.JournalError("no", 1), "JournalError: no"),
        (taskserver.Cancelled(), "Cancelled"),  # nobody has asked for it
    ],
    ids=brief,
)
def test_whatever_a_task_raises_makes_it_fail_alone_and_its_traceback_goes_to_the_log(
    application, caplog, raised, error
):
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


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: math.nan, "JSON"),
        (object, "JSON"),
        (cycle, "JSON"),
        (lambda: {"a": [{}, {1: 2, "1": 3}]}, "JSON at ['a'][1]: two keys are the same as JSON"),
        (lambda: {"when": {"day": 1j}}, "JSON at ['when']['day']: "),
        (lambda: "x" * (MIB - 1), "1048577 bytes"),
    ],
    ids=["nan", "object", "cycle", "equal keys", "place", "1 MiB + 1"],
)
def test_a_result_that_cannot_be_kept_makes_the_task_fail_and_breaks_no_poll(
    application, make, error
):
    record = outcome(application, lambda payload, report: make())
    assert record["status"] == "failed" and error in record["error"] and record["result"] is None


def test_a_result_of_1_mib_is_polled_whole(application):
    text = "x" * (MIB - 2)
    assert outcome(application, lambda payload, report: text)["result"] == text


@pytest.mark.parametrize("waits", [False, True], ids=["thread", "coroutine"])
def test_default_makes_json_of_a_result_that_json_does_not_know(waits):
    def function(payload, report):
        return {"sum": decimal.Decimal("1.10"), "half": [fractions.Fraction(1, 2)]}

    async def coroutine(payload, report):
        return function(payload, report)

    task = coroutine if waits else function
    record = outcome(Application(default=str), task)
    assert record["result"] == {"sum": "1.10", "half": ["1/2"]}
    record = outcome(Application(default=refuse_all), task)
    assert record["status"] == "failed"
    assert record["error"].endswith("as JSON at ['sum']: no word for it")
    record = outcome(Application(), task)
    assert record["status"] == "failed" and "JSON at ['sum']: " in record["error"]


def test_a_lone_surrogate_in_a_result_breaks_no_client(application):
    name = "caf\udce9.txt"  # what os.listdir says of a name that is not UTF-8
    assert outcome(application, lambda payload, report: {name: name})["result"] == {
        "caf\\udce9.txt": "caf\\udce9.txt"
    }


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
    assert record["error"].startswith("ValueError: the first argument of report() must be a number")
    assert (record["progress"], record["message"]) == (0.5, "m" * 500)


@pytest.mark.parametrize("error", [taskserver.JournalLost, taskserver.Stopped])
def test_an_exception_of_the_server_that_a_task_raises_fails_it(application, error):
    def task(payload, report):
        raise error("what it said")

    async def coroutine(payload, report):
        raise error("what it said")

    for function in task, coroutine:
        assert outcome(application, function)["error"].endswith("what it said")


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
                if now["status"] != "pending":
                    stage = "final"
                else:
                    stage = "running" if now["started_at"] else "waiting"
                seen = order[stage], now["progress"] or 0.0
                assert seen >= last[n] or now["status"] == "failed"
                last[n] = seen

    in_threads(4, watch)
    statuses = [poll(application, record)["status"] for record in records]
    assert (statuses.count("failed"), statuses.count("completed")) == (20, 40)


def test_50_clients_create_and_poll_and_every_task_is_found_and_completed(application):
    ids = set()

    def client(i):
        for n in range(20):
            record = final(application, create(application, "echo", result=[i, n]))
            assert (record["status"], record["result"]) == ("completed", [i, n])
            ids.add(record["id"])

    in_threads(50, client)
    assert len(ids) == 1000


@pytest.mark.parametrize(
    "name, status",
    [
        ("x", 201),
        ("x" * 256, 201),
        ("😀" * 256, 201),
        (" x ", 201),
        ("\0", 201),
        ("x" * 257, 400),
        ("", 400),
        (" \t\n", 400),
        ("\u3000", 400),
        (None, 400),
        (5, 400),
        (["x"], 400),
        (True, 400),
    ],
    ids=brief,
)
def test_a_name_is_a_string_that_is_not_blank_of_at_most_256_characters(application, name, status):
    answer = ask(application, "POST", "/create-echo", {"name": name})
    assert answer.status == status
    assert answer.json["name"] == name if status == 201 else '"name"' in answer.json["error"]


def test_a_body_that_is_no_object_or_has_no_name_is_400_and_makes_no_task(application):
    for body in (
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"Name": "x"}',
        b'{"name": "x", "name": "x"}',
        b'{"name": "\xff"}',
    ):
        assert ask(application, "POST", "/create-echo", body).status == 400
    assert ask(application, "GET", "/tasks").json == {"tasks": []}


@pytest.mark.parametrize(
    "headers, status",
    [
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
    ],
    ids=brief,
)
def test_only_plain_json_is_taken(application, headers, status):
    answer = ask(application, "POST", "/create-echo", {"name": "x"}, **headers)
    assert answer.status == status, answer


SOME_UUID = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
NO_UUIDS = [
    SOME_UUID.replace("-", ""),
    "{{{}}}",
    "urn:uuid:{}",
    "{}0",
    SOME_UUID[:-1],
    SOME_UUID[:-1] + "g",
    "",
    "%20{}",
    "{}%0A",
    SOME_UUID.replace("0", "%D9%A0"),
]


def test_an_id_is_the_hyphenated_form_in_any_case(application):
    record = create(application, "echo")
    id = record["id"]
    assert final(application, dict(record, id=id.upper()))["id"] == id
    for bad in NO_UUIDS:
        for method, path in ("GET", "/poll-echo"), ("POST", "/cancel-echo"):
            answer = ask(application, method, f"{path}/{bad.format(id)}")
            assert answer.status == 400 and "36 characters" in answer.json["error"], bad
    unknown = uuid.uuid4()
    for target in f"/poll-echo/{unknown}", f"/poll-gate/{id}", f"/poll-echo/{unknown}?wait=30":
        assert ask(application, "GET", target).status == 404
    for target in f"/cancel-echo/{unknown}", f"/cancel-gate/{id}":
        assert ask(application, "POST", target).status == 404


@pytest.mark.parametrize(
    "query, status",
    [
        ("wait=0", 200),
        ("wait=0.01", 200),
        ("wait=00.010", 200),
        ("", 200),
        ("other=1", 200),
        ("wait=%30", 200),
        ("wait=", 400),
        ("wait", 400),
        ("wait=-1", 400),
        ("wait=%2B1", 400),
        ("wait=+1", 400),
        ("wait=.5", 400),
        ("wait=5.", 400),
        ("wait=1e1", 400),
        ("wait=nan", 400),
        ("wait=inf", 400),
        ("wait=1_0", 400),
        ("wait=%D9%A1", 400),
        ("wait=0x1", 400),
        ("wait=1&wait=1", 400),
        ("wait=1%0A", 400),
        ("wait=%201", 400),
        ("wait=1,5", 400),
    ],
)
def test_wait_is_a_plain_number(application, gate, query, status):
    record = create(application, "gate")
    assert ask(application, "GET", f"/poll-gate/{record['id']}?{query}").status == status


def test_wait_is_clamped(application, gate, monkeypatch):
    assert taskserver.MAX_WAIT == 30
    monkeypatch.setattr(taskserver, "MAX_WAIT", 0.05)
    record = create(application, "gate")
    for seconds in "31", "9" * 400:
        begun = time.monotonic()
        answer = ask(application, "GET", f"/poll-gate/{record['id']}?wait={seconds}")
        assert answer.json["status"] == "pending"
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


def test_a_store_that_is_full_by_bytes_answers_503_with_the_flag(application, gate):
    application.store.max_memory = 1000
    record = create(application, "gate", text="x" * 600)
    refused = ask(application, "POST", "/create-gate", {"name": "x", "text": "x" * 600})
    assert refused.status == 503 and int(refused.headers["Retry-After"]) >= 1
    assert "--max-memory" in refused.json["error"] and "--keep" in refused.json["error"]
    assert application.pool.counts()[0] + application.pool.counts()[1] == 1
    gate.opened.set()
    final(application, record)  # which has no payload any more
    create(application, "gate", text="x" * 600)


def test_workers_come_for_what_waits_when_the_system_has_threads_again(application, monkeypatch):
    final(application, create(application, "echo"))
    assert eventually(lambda: not [t for t in threading.enumerate() if t.name == "task"])

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        waiting = create(application, "echo", result=5)
    assert poll(application, waiting)["status"] == "pending"
    application.wake_workers()
    assert final(application, waiting)["result"] == 5


def test_a_pool_that_is_busy_does_not_hold_up_another(application, gate):
    application.task("elsewhere")(wait_a_moment)
    application.pool.max_workers = 1
    create(application, "gate"), create(application, "gate")
    gate.wait_for()
    assert final(application, create(application, "elsewhere", result=1))["result"] == 1


def test_a_fault_in_an_endpoint_is_500_in_json_and_tells_the_log_alone(application, caplog):
    application.router.add("GET", "/fault", lambda request: 1 / 0)
    answer = ask(application, "GET", "/fault")
    assert answer.status == 500 and list(answer.json) == ["error"]
    assert "Zero" not in answer.json["error"] and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    "error, text",
    [
        (taskserver.TaskError, "TaskError"),
        (taskserver.TaskError(""), "TaskError"),
        (taskserver.TaskError("disk: full"), "disk: full"),
    ],
)
def test_a_task_error_fails_the_task_with_its_text_whatever_it_says(application, error, text):
    def task(payload, report):
        raise error

    record = outcome(application, task)
    assert (record["status"], record["error"]) == ("failed", text)
    application.pool.join(LONG)
    assert application.pool.counts() == (0, 0)


# How a request is judged and answered


def refuse_strangers(request):
    if "x-let-me-in" not in request.fields.headers:
        raise HTTPError(403, "Ask nicely.")


def test_a_check_may_refuse_a_request_before_anything_else_is_said(application):
    application.checks.append(refuse_strangers)
    assert ask(application, "POST", "/create-echo", {"name": "x"}).json == {"error": "Ask nicely."}
    assert ask(application, "POST", "/create-echo", b"{").status == 403
    assert ask(application, "POST", "/create-echo", content_type="text/plain").status == 403
    assert ask(application, "GET", "/nowhere").status == 403
    assert ask(application, "PUT", "/create-echo").status == 403
    welcome = {"x_let_me_in": "please"}
    assert ask(application, "POST", "/create-echo", {"name": "x"}, **welcome).status == 201
    assert ask(application, "GET", "/nowhere", **welcome).status == 404


def test_a_check_runs_once_for_each_request_and_sees_its_head(application, gate):
    seen, own = [], []
    application.checks.append(lambda request: seen.append((request.method, request.path)))
    application.router.add("GET", "/own", lambda request: Response(200), check=own.append)
    id = create(application, "gate")["id"]
    gate.wait_for()
    asked = [
        ("POST", "/create-gate"),
        ("GET", f"/poll-gate/{id}"),
        ("GET", f"/poll-gate/{id}?wait=0.01"),
        ("POST", f"/cancel-gate/{id}"),
        ("GET", "/own"),
        ("GET", "/nowhere"),
        ("PUT", "/own"),
        ("OPTIONS", "/own"),
    ]
    for method, target in asked[1:]:
        ask(application, method, target)
    assert seen == [(method, target.partition("?")[0]) for method, target in asked]
    assert [request.path for request in own] == ["/own"]


def test_who_the_client_is_can_be_seen_by_a_check(application):
    def once_each(request):
        if request.peer in peers:
            raise HTTPError(429, "Wait a minute.")
        peers.add(request.peer)

    peers = set()
    application.checks.append(once_each)
    statuses = [
        application.handle(Request("GET", "/healthz", host="localhost", peer=peer)).status
        for peer in ("192.0.2.1", "192.0.2.2", "192.0.2.1")
    ]
    assert statuses == [200, 200, 429]


def test_a_fault_in_a_check_is_500_and_no_way_in(application, caplog):
    application.checks.append(lambda request: 1 / 0)
    assert ask(application, "POST", "/create-echo", {"name": "x"}).status == 500
    assert "ZeroDivisionError" in caplog.text
    del application.checks[:]
    assert ask(application, "GET", "/tasks").json == {"tasks": []}


def test_a_route_may_do_without_a_check_and_then_knows_that_it_was_refused(application):
    def tell(request):
        return Response(200, json.dumps(request.trusted).encode())

    def check_for(name, status):
        def check(request):
            ran.append(name)
            if name in request.fields.headers:
                raise HTTPError(status, "No.")

        return check

    ran = []
    application.checks += [check_for("a", 401), check_for("b", 421), check_for("c", 403)]
    application.router.add("GET", "/waives", tell, waived=(401, 421))
    application.router.add("GET", "/does-not", tell)
    assert ask(application, "GET", "/waives").json is True
    assert ask(application, "GET", "/waives", a="").json is False
    assert ask(application, "GET", "/waives", b="").json is False
    assert ask(application, "GET", "/does-not").json is True
    assert [ask(application, "GET", "/does-not", **{name: ""}).status for name in "abc"] == [
        401,
        421,
        403,
    ]
    # Who is refused by one that is waived has to do with the others all the same.
    del ran[:]
    assert ask(application, "GET", "/waives", a="", c="").status == 403
    assert ran == ["a", "b", "c"]
    assert ask(application, "OPTIONS", "/does-not", a="", b="").status == 204
    assert ask(application, "OPTIONS", "/does-not", c="").status == 403


def test_the_rule_of_a_route_is_its_own(application):
    def needs_a_length(request):
        if "content-length" not in request.fields.headers:
            raise HTTPError(411, "Send a Content-Length.")

    application.router.add("POST", "/text", lambda request: Response(200), check=needs_a_length)
    assert ask(application, "POST", "/text", b"text", content_type="text/plain").status == 200
    assert application.handle(Request("POST", "/text")).status == 411


def test_a_create_without_a_length_is_411_and_a_cancel_needs_neither_body_nor_media_type(
    application,
):
    record = final(application, create(application, "echo"))
    json_alone = Fields({"content-type": "application/json"})
    assert application.handle(Request("POST", "/create-echo", fields=json_alone)).status == 411
    assert application.handle(Request("POST", f"/cancel-echo/{record['id']}")).status == 200


def test_what_may_block_is_known_before_it_is_called(application, gate):
    def blocks(method, target, body=b""):
        asked = request(method, target, body)
        return application.judge(asked).route.blocks(asked)

    id = create(application, "gate")["id"]
    application.router.add("GET", "/mine", lambda request: Response(200))
    for method, target in ("GET", f"/poll-gate/{id}?wait=30"), ("POST", f"/cancel-gate/{id}"):
        assert not blocks(method, target)
    assert not blocks("GET", "/healthz") and not blocks("OPTIONS", "/mine")
    assert not blocks("POST", "/create-gate", {"name": "x"})
    assert blocks("POST", "/create-gate", {"name": "x" * 100_000})  # long to decode
    assert blocks("GET", "/mine")
    application.store.journal = MemoryJournal()
    assert blocks("POST", "/create-gate", {"name": "x"})


class Doorbell:
    """Something for which an endpoint may wait."""

    def __init__(self, answer=lambda: Response(200, b'"rung"')):
        self.calls = []
        self.watched = threading.Semaphore(0)
        self.answer = answer

    def watch(self, wake):
        self.calls.append(("watch", wake))
        self.watched.release()

    def unwatch(self, wake):
        self.calls.append(("unwatch", wake))

    def respond(self):
        self.calls.append(("answer", None))
        return self.answer()

    def later(self, seconds=LONG):
        return taskserver.Later(seconds, self.watch, self.unwatch, self.respond)


def ring(bell):
    assert bell.watched.acquire(timeout=LONG)
    wake = bell.calls[0][1]
    wake(), wake()


def test_an_endpoint_may_answer_later_whatever_it_waits_for(application):
    bell = Doorbell()
    application.router.add("GET", "/bell", lambda request: bell.later())
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        answer = executor.submit(ask, application, "GET", "/bell")
        ring(bell)
        assert answer.result(LONG).json == "rung"
    assert [what for what, _ in bell.calls] == ["watch", "unwatch", "answer"]
    assert bell.calls[0][1] == bell.calls[1][1]


def test_an_answer_that_comes_later_comes_when_its_time_is_over(application):
    bell = Doorbell()
    application.router.add("GET", "/bell", lambda request: bell.later(0.01))
    assert ask(application, "GET", "/bell").json == "rung"
    assert [what for what, _ in bell.calls] == ["watch", "unwatch", "answer"]


def test_an_answer_that_comes_later_may_be_a_refusal_or_a_fault(application, caplog):
    def refuse():
        raise HTTPError(410, "It is gone.")

    for answer, status in (refuse, 410), (lambda: 1 / 0, 500):
        bell = Doorbell(answer)
        application.router.add("GET", f"/bell-{status}", lambda request, b=bell: b.later(0.01))
        assert ask(application, "GET", f"/bell-{status}").status == status
    assert "ZeroDivisionError" in caplog.text


def test_a_long_poll_answers_when_the_task_is_final(application, gate):
    record = create(application, "gate", result=[7])
    gate.wait_for()
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        polls = [executor.submit(poll, application, record, wait=LONG) for _ in range(3)]
        assert not concurrent.futures.wait(polls, 0.05).done
        gate.opened.set()
        for answer in polls:
            assert answer.result(LONG)["result"] == [7]


# The stop


def test_a_stopping_application_refuses_creates_and_answers_polls(application, gate):
    running = create(application, "gate")
    gate.wait_for()
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        long_poll = executor.submit(poll, application, running, wait=LONG)
        assert not concurrent.futures.wait([long_poll], 0.05).done
        application.stop()
        assert long_poll.result(LONG / 3)["status"] == "pending"
    refused = ask(application, "POST", "/create-gate", {"name": "x"})
    assert refused.status == 503 and refused.headers["Retry-After"]
    assert "stopping" in refused.json["error"]
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        long_poll = executor.submit(poll, application, running, wait=LONG)
        assert not concurrent.futures.wait([long_poll], 0.05).done  # or clients would be too busy
        gate.opened.set()
        assert long_poll.result(LONG)["status"] == "completed"
    assert application.pool.join(LONG)


def test_nothing_begins_when_an_application_stops(application, gate):
    application.pool.max_workers = 1
    running, waiting = create(application, "gate"), create(application, "echo")
    gate.wait_for()
    assert application.stop() == 1
    gate.opened.set()
    assert application.pool.join(LONG)
    application.wake_workers()
    assert [poll(application, record)["status"] for record in (running, waiting)] == [
        "completed",
        "pending",
    ]


def restarted(application, *types, **options):
    """Return another application that takes over the journal of one, with these types of it."""
    successor = Application()
    for type in types:
        successor.task(type, **options)(application.types[type].function)
    taskserver.add_monitoring(successor)
    successor.store.journal = application.store.journal
    taskserver.recover(successor)
    successor.wake_workers()
    return successor


@pytest.mark.parametrize("waits", [False, True], ids=["thread", "coroutine"])
@pytest.mark.parametrize("n", [1, 12])
def test_a_create_that_is_being_journaled_when_the_stop_begins_is_not_begun(application, n, waits):
    journal, begun, held = MemoryJournal(), [], Gate()
    application.store.journal = journal

    def note(payload, report):
        begun.append(payload["n"])

    async def note_in_the_loop(payload, report):
        note(payload, report)

    application.task("note")(note_in_the_loop if waits else note)
    journal.before_save = lambda record: held({})
    with concurrent.futures.ThreadPoolExecutor(n) as executor:
        created = [executor.submit(create, application, "note", n=i) for i in range(n)]
        held.wait_for(n)
        application.stop()
        held.opened.set()
        records = [future.result(LONG) for future in created]
    application.wake_workers()
    assert all(pool.join(LONG) for pool in application.pools)
    assert not begun
    assert [poll(application, record)["started_at"] for record in records] == [None] * n
    successor = restarted(application, "note")
    assert [final(successor, record)["status"] for record in records] == ["completed"] * n
    assert sorted(begun) == list(range(n))


# With a journal


@pytest.fixture
def memory_journal(application, monkeypatch):
    monkeypatch.setattr(taskserver, "CANCEL_SECONDS", LONG)
    application.store.journal = MemoryJournal()
    return application.store.journal


def test_records_outlive_the_process_in_their_order_with_their_outcome(application, memory_journal):
    application.task("fail")(fail)
    records = [create(application, type, result=n) for n, type in enumerate(["echo", "fail"] * 5)]
    records = [final(application, record) for record in records]
    successor = restarted(application, "echo", "fail")
    assert [poll(successor, record) for record in records] == records
    before, after = ask(application, "GET", "/tasks"), ask(successor, "GET", "/tasks")
    assert after.json == before.json and len(after.json["tasks"]) == 10


def test_a_start_is_in_the_journal_before_the_function_is_called_unless_it_may_run_again(
    application, memory_journal
):
    def started(payload, report):
        (record,) = [r for r in memory_journal.records.values() if r.name == payload["name"]]
        return record.started_at is not None

    application.task("once")(started)
    application.task("again", rerun=True)(started)
    assert final(application, create(application, "once", "a"))["result"] is True
    assert final(application, create(application, "again", "b"))["result"] is False


def test_a_create_that_the_journal_cannot_take_now_is_503_and_one_that_it_never_can_is_400(
    application, memory_journal
):
    memory_journal.before_save = fail_to_save
    answer = ask(application, "POST", "/create-echo", {"name": "x"})
    assert answer.status == 503 and answer.headers["Retry-After"]
    assert "disk" not in answer.json["error"]
    assert ask(application, "GET", "/healthz").status == 503
    memory_journal.before_save = lambda record: None
    create(application, "echo")
    assert ask(application, "GET", "/healthz").status == 200
    memory_journal.before_save = refuse
    answer = ask(application, "POST", "/create-echo", {"name": "x\0"})
    assert answer.status == 400 and "a text with a NUL" in answer.json["error"]
    assert ask(application, "GET", "/healthz").status == 200
    assert len(ask(application, "GET", "/tasks").json["tasks"]) == 1
    assert eventually(lambda: application.pool.counts() == (0, 0))


def test_a_start_that_the_journal_can_never_take_fails_its_task_alone(application, memory_journal):
    memory_journal.before_save = lambda record: (
        record.started_at and record.payload and refuse(record)
    )
    record = final(application, create(application, "echo", result=1))
    assert record["status"] == "failed" and "a text with a NUL" in record["error"]
    memory_journal.before_save = lambda record: None
    assert final(application, create(application, "echo", result=1))["result"] == 1


def test_nothing_begins_once_the_journal_is_lost(application, memory_journal):
    begun, told = [], threading.Event()
    application.task("note")(lambda payload, report: begun.append(payload))
    application.store.journal_lost = lambda reason: told.set()
    memory_journal.before_save = lambda record: record.started_at and lose(record)
    record = create(application, "note")
    assert told.wait(LONG)
    application.stop()
    assert poll(application, record)["status"] == "pending" and not begun
    application.store.lost = "over"  # as at a second signal: its worker need not try for ever
    assert application.pool.join(LONG)


# Cancel


def cancel(application, record, **headers):
    """Return the answer to a cancel that has neither a body nor a media type."""
    headers.setdefault("content_type", None)
    return ask(application, "POST", f"/cancel-{record['type']}/{record['id']}", **headers)


def cancelled(application, record, **headers):
    answer = cancel(application, record, **headers)
    assert answer.status == 200, answer
    consistent(answer.json)
    return answer.json


BY_REQUEST = "cancelled: by request"


@pytest.mark.parametrize("has_journal", [False, True])
def test_a_task_that_waits_is_final_at_once_and_never_begun(application, gate, has_journal):
    if has_journal:
        application.store.journal = MemoryJournal()
    application.pool.max_workers, application.pool.max_waiting = 1, 1
    begun = []
    application.task("note")(lambda payload, report: begun.append(payload))
    create(application, "gate")
    gate.wait_for()
    record = create(application, "note")
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        long_poll = executor.submit(poll, application, record, wait=LONG)
        assert not concurrent.futures.wait([long_poll], 0.05).done
        answer = cancelled(application, record)
        assert long_poll.result(LONG / 3) == answer
    assert (answer["status"], answer["error"]) == ("failed", BY_REQUEST)
    assert (answer["started_at"], answer["progress"], answer["result"]) == (None, None, None)
    assert poll(application, record) == answer == cancelled(application, record)
    if has_journal:
        assert application.store.journal.records[record["id"]].error == BY_REQUEST
    last = create(application, "echo", result=1)  # its place is free
    gate.opened.set()
    assert final(application, last)["result"] == 1 and not begun
    assert eventually(lambda: application.pool.counts() == (0, 0))
    counts = application.store.counts()
    assert (counts["note", "failed"], counts["note", "pending"]) == (1, 0)


def test_a_task_in_a_thread_meets_its_cancel_when_it_reports_next(application):
    begun, asked, after = threading.Event(), threading.Event(), []

    @application.task("loop")
    def loop(payload, report):
        begun.set()
        assert asked.wait(LONG)
        while True:
            try:
                report(0.5)
            except Exception:
                after.append("swallowed")
            finally:
                after.append("finally")

    record = create(application, "loop")
    assert begun.wait(LONG)
    answer = cancelled(application, record)
    assert (answer["status"], answer["started_at"] is not None) == ("pending", True)
    asked.set()
    record = final(application, record)
    consistent(record)
    assert (record["status"], record["error"]) == ("failed", BY_REQUEST)
    assert record["started_at"] and after == ["finally"]


@pytest.mark.parametrize(
    "end, status, error, result",
    [
        ("return", "completed", None, "done all the same"),
        ("raise", "failed", "ValueError: of its own", None),
        ("no report", "completed", None, "done all the same"),
    ],
)
def test_a_function_that_ends_in_its_own_way_decides_what_became_of_its_task(
    application, end, status, error, result
):
    begun, asked = threading.Event(), threading.Event()

    @application.task("stubborn")
    def stubborn(payload, report):
        begun.set()
        assert asked.wait(LONG)
        if end != "no report":
            with pytest.raises(taskserver.Cancelled):
                report(0.5)
        if end == "raise":
            raise ValueError("of its own")
        return "done all the same"

    record = create(application, "stubborn")
    assert begun.wait(LONG)
    cancel(application, record)
    asked.set()
    record = final(application, record)
    consistent(record)
    assert (record["status"], record["error"], record["result"]) == (status, error, result)


def test_a_coroutine_is_cancelled_where_it_waits(application):
    begun, after = threading.Event(), []

    @application.task("wait")
    async def wait(payload, report):
        import asyncio

        report(0.5, "so far")
        begun.set()
        try:
            await asyncio.sleep(LONG)
        finally:
            await asyncio.sleep(0)
            after.append("finally")

    record = create(application, "wait")
    assert begun.wait(LONG)
    cancelled(application, record)
    record = final(application, record)
    consistent(record)
    assert (record["status"], record["error"]) == ("failed", BY_REQUEST)
    assert (record["progress"], record["message"], after) == (0.5, "so far", ["finally"])


@pytest.mark.parametrize("type", ["echo", "fail"])
def test_what_is_final_stays_as_it_is(application, type):
    application.task("fail")(fail)
    record = final(application, create(application, type, result=1))
    assert cancelled(application, record) == record == poll(application, record)


def test_a_hundred_cancels_of_one_task_are_one(application, gate, memory_journal, monkeypatch):
    lines, held, waiting = [], Gate(), threading.Semaphore(0)
    application.log_task = lambda *line: lines.append(line[0] % line[1:])
    application.pool.max_workers = 1
    create(application, "gate")
    gate.wait_for()
    record = create(application, "echo")
    memory_journal.before_save = lambda record: held({})
    watch = application.store.watch

    def watch_and_tell(id, wake):
        watch(id, wake)
        waiting.release()

    monkeypatch.setattr(application.store, "watch", watch_and_tell)
    with concurrent.futures.ThreadPoolExecutor(100) as executor:
        futures = [executor.submit(cancelled, application, record) for _ in range(100)]
        for _ in futures:
            assert waiting.acquire(timeout=LONG)
        held.opened.set()
        answers = [future.result(LONG) for future in futures]
    assert answers == [answers[0]] * 100 and answers[0]["error"] == BY_REQUEST
    about = [line for line in lines if record["id"] in line]
    assert len(about) == 2  # it was created, and is to be cancelled
    assert application.store.counts()["echo", "failed"] == 1


def test_of_a_cancel_and_a_start_at_the_same_moment_one_wins(application):
    begun = []
    application.task("note")(lambda payload, report: begun.append(payload["n"]))
    application.pool.max_workers = 2

    def client(i):
        chance = random.Random(i)
        for n in range(100):
            record = create(application, "note", n=(i, n))
            while chance.random() < 0.5:
                time.sleep(0)
            cancelled(application, record)
            record = final(application, record)
            consistent(record)
            was_begun = [i, n] in begun
            if record["status"] == "completed":
                assert was_begun
            else:
                assert record["error"] == BY_REQUEST and not was_begun

    in_threads(6, client)
    assert eventually(lambda: application.pool.counts() == (0, 0))
    counts = application.store.counts()
    assert counts["note", "pending"] == 0
    assert counts["note", "completed"] == len(begun)
    assert counts["note", "completed"] + counts["note", "failed"] == 600


def test_of_a_cancel_and_an_end_at_the_same_moment_one_wins(application):
    returned = []

    def work(payload, report):
        while payload["loops"]:
            payload["loops"] -= 1
            report(0.5)
        returned.append(payload["n"])
        return "done"

    application.task("work")(work)
    application.store.journal = MemoryJournal()

    def client(i):
        for n in range(60):
            record = create(application, "work", n=[i, n], loops=n % 20)
            cancelled(application, record)
            record = final(application, record)
            consistent(record)
            completed = record["status"] == "completed"
            assert completed == ([i, n] in returned)
            assert completed or record["error"] == BY_REQUEST
            saved = application.store.journal.records[record["id"]]
            assert (saved.status, saved.error) == (record["status"], record["error"])

    in_threads(6, client)
    assert eventually(lambda: application.pool.counts() == (0, 0))


def test_a_cancel_between_the_storing_of_a_create_and_its_place_in_the_queue(
    application, monkeypatch
):
    begun, answers, put = [], [], application.pool.put
    application.task("note")(lambda payload, report: begun.append(payload))

    def put_late(key, record, *more):
        asked = {"type": record.type, "id": record.id}
        answers.append(cancelled(application, asked))
        put(key, record)

    with monkeypatch.context() as patch:
        patch.setattr(application.pool, "put", put_late)
        record = create(application, "note")
    assert [answer["error"] for answer in answers] == [BY_REQUEST]
    assert poll(application, record) == answers[0]
    assert application.pool.join(LONG) and application.pool.counts() == (0, 0) and not begun


def test_a_cancel_while_the_start_is_being_journaled_means_that_nothing_is_called(
    application, memory_journal
):
    begun, held = [], Gate()
    application.task("note")(lambda payload, report: begun.append(payload))
    memory_journal.before_save = lambda record: record.payload and record.started_at and held({})
    record = create(application, "note")
    held.wait_for()
    answer = cancelled(application, record)
    assert answer["status"] == "pending" and answer["started_at"]
    held.opened.set()
    record = final(application, record)
    assert (record["status"], record["error"]) == ("failed", BY_REQUEST)
    assert record["started_at"] == answer["started_at"] and not begun


def test_a_cancel_of_what_waits_is_in_the_journal_before_it_is_answered(
    application, gate, memory_journal
):
    application.pool.max_workers, held = 1, Gate()
    create(application, "gate")
    gate.wait_for()
    record = create(application, "echo")
    memory_journal.before_save = lambda record: held({})
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        answers = [executor.submit(cancelled, application, record) for _ in range(2)]
        held.wait_for()
        assert not concurrent.futures.wait(answers, 0.1).done  # the second waits for the same save
        assert poll(application, record)["status"] == "pending"
        memory_journal.before_save = lambda record: None
        held.opened.set()
        assert [answer.result(LONG)["error"] for answer in answers] == [BY_REQUEST] * 2
    assert memory_journal.records[record["id"]].error == BY_REQUEST


def test_a_cancel_by_a_client_that_has_ended_its_sending_waits_for_the_journal_as_well(
    server, application, gate, memory_journal
):
    application.pool.max_workers, held = 1, Gate()
    create(application, "gate")
    gate.wait_for()
    record = create(application, "echo")
    memory_journal.before_save = lambda record: held({})
    with server.client() as client:
        client.send(raw("POST", f"/cancel-echo/{record['id']}"))
        client.socket.shutdown(socket.SHUT_WR)
        held.wait_for()
        assert not client.says(0.1)
        held.opened.set()
        assert client.answer().json["error"] == BY_REQUEST


def test_a_cancel_that_the_journal_cannot_take_is_503_and_the_task_does_not_begin(
    application, gate, memory_journal, monkeypatch
):
    monkeypatch.setattr(taskserver, "CANCEL_SECONDS", 0.05)
    application.pool.max_workers, begun = 1, []
    application.task("note")(lambda payload, report: begun.append(payload))
    create(application, "gate")
    gate.wait_for()
    record = create(application, "note")
    memory_journal.before_save = fail_to_save
    answer = cancel(application, record)
    assert answer.status == 503 and answer.headers["Retry-After"]
    assert "does not say yet" in answer.json["error"]
    assert poll(application, record)["status"] == "pending"
    memory_journal.before_save = lambda record: None
    record = final(application, record)  # it was tried again
    assert record["error"] == BY_REQUEST
    gate.opened.set()
    assert application.pool.join(LONG) and not begun


def test_a_cancel_works_while_the_server_stops(application, gate):
    application.pool.max_workers = 1
    create(application, "gate")
    gate.wait_for()
    record = create(application, "echo")
    application.stop()
    assert cancelled(application, record)["error"] == BY_REQUEST


def test_a_restart_changes_nothing_of_a_cancel(application, gate, memory_journal):
    application.task("again", rerun=True)(echo)
    application.pool.max_workers = 1
    create(application, "gate")
    gate.wait_for()
    records = [cancelled(application, create(application, type)) for type in ("echo", "again")]
    successor = restarted(application, "echo", "again", rerun=True)
    assert [poll(successor, record) for record in records] == records
    assert successor.pool.counts() == (0, 0)
    gate.opened.set()


def test_a_cancel_of_what_a_restart_has_queued_again(application, memory_journal, gate):
    waiting = create(application, "gate"), create(application, "gate")
    gate.wait_for(2)
    successor = Application()
    successor.task("gate", rerun=True)(gate)
    successor.store.journal = memory_journal
    taskserver.recover(successor)
    record = cancelled(successor, waiting[0])
    assert (record["status"], record["error"]) == ("failed", BY_REQUEST)
    successor.wake_workers()
    gate.wait_for()
    gate.opened.set()
    assert final(successor, waiting[1])["status"] == "completed"


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),  # curl
        ({"content_type": "application/json"}, 200),
        ({"sec_fetch_site": "same-origin", "origin": "http://localhost"}, 200),
        ({"sec_fetch_site": "none"}, 200),  # the user, by hand
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "cross-site", "origin": "http://localhost"}, 403),
        ({"origin": "http://localhost"}, 200),  # an older browser
        ({"origin": "https://LOCALHOST"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:81"}, 403),
        ({"origin": "http://localhost.evil.example"}, 403),
        ({"origin": "null"}, 403),  # a page in a sandbox, or of a file
        ({"origin": "localhost"}, 403),
        ({"origin": "http://evil.example, http://localhost"}, 403),
        ({"origin": "null", "host": ""}, 403),
        ({"origin": "http://evil.example", "content_type": "text/plain"}, 403),  # a form
    ],
    ids=brief,
)
def test_a_page_of_another_site_cannot_cancel(application, gate, headers, status):
    record = create(application, "gate")
    gate.wait_for()
    answer = cancel(application, record, **headers)
    assert answer.status == status
    if status == 403:
        assert list(answer.json) == ["error"]
        application.checks.append(refuse_strangers)
        assert cancel(application, record, x_let_me_in="", **headers).status == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_a_cancel_is_a_post(application, gate, method):
    record = create(application, "gate")
    answer = ask(application, method, f"/cancel-gate/{record['id']}")
    assert (answer.status, answer.headers["Allow"]) == (405, "OPTIONS, POST")


# Creates with long bodies


def test_a_body_that_is_long_to_decode_is_not_decoded_by_the_loop(server, monkeypatch):
    threads, decode = [], taskserver.decode_object

    def watched(body):
        threads.append(threading.current_thread().name)
        return decode(body)

    monkeypatch.setattr(taskserver, "decode_object", watched)
    with server.client() as client:
        for lists in 0, 1000:
            body = {"name": "sample", "lists": [[]] * lists}
            assert client.ask("POST", "/create-echo", body).status == 201
    assert threads[0] != "request" and threads[1] == "request"


def test_a_long_body_that_waits_too_long_for_its_turn_to_be_decoded_is_503(
    application, monkeypatch
):
    monkeypatch.setattr(taskserver, "DECODE_SECONDS", 0.02)
    short, long = ({"name": "sample", "text": "x" * size} for size in (10_000, 20_000))
    with taskserver.turn_to_decode(json.dumps(long).encode()):
        answer = ask(application, "POST", "/create-echo", long)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert ask(application, "POST", "/create-echo", short).status == 201
    assert ask(application, "POST", "/create-echo", long).status == 201


# Creates that may be sent twice


def create_with(application, key, type="echo", name="sample", **payload):
    return ask(
        application, "POST", f"/create-{type}", {"name": name, **payload}, idempotency_key=key
    )


def new_key():
    return str(uuid.uuid4())


def test_a_create_with_a_key_is_made_once_and_answered_each_time(application, gate):
    key = new_key()
    first = create_with(application, key, "gate", result=1)
    assert (first.status, first.json["id"]) == (201, key)
    assert first.headers["Location"] == f"/poll-gate/{key}"
    gate.wait_for()
    again = create_with(application, key, "gate", result=2)  # the payload is not compared
    assert (again.status, again.headers["Location"]) == (200, first.headers["Location"])
    assert again.json == poll(application, first.json) and again.json["started_at"]
    gate.opened.set()
    record = final(application, first.json)
    assert record["result"] == 1
    assert create_with(application, key, "gate").json == record
    assert len(ask(application, "GET", "/tasks").json["tasks"]) == 1


def test_a_key_may_be_of_any_case_and_in_quotes(application):
    key = new_key()
    assert create_with(application, f'"{key.upper()}"').json["id"] == key
    for same in key, key.upper(), f'"{key}"':
        answer = create_with(application, same)
        assert (answer.status, answer.json["id"]) == (200, key)


@pytest.mark.parametrize(
    "key",
    [
        *(bad for bad in NO_UUIDS if "%" not in bad),
        '"',
        '""',
        '"{}',
        '{}"',
        "'{}'",
        '""{}""',
        "{0}, {0}",  # the header, twice
        "8e03978e",
        '"a-key-of-text"',
        "{};a=1",
        "٠" * 36,
    ],
    ids=brief,
)
def test_a_key_that_is_no_uuid_is_400_and_makes_no_task(application, key):
    answer = create_with(application, key.format(SOME_UUID))
    assert answer.status == 400 and "UUID" in answer.json["error"]
    head = request("POST", "/create-echo", idempotency_key=key.format(SOME_UUID))
    assert application.judge(head).refusal.status == 400  # before its body is awaited
    assert ask(application, "GET", "/tasks").json == {"tasks": []}


def test_a_key_that_was_used_for_another_type_or_name_is_422(application, gate):
    key = new_key()
    assert create_with(application, key, "gate").status == 201
    for type, name in ("gate", "another"), ("echo", "sample"), ("gate", "Sample"):
        answer = create_with(application, key, type, name)
        assert answer.status == 422 and "choose a new one" in answer.json["error"]
    record = create(application, "gate")  # an id that the server gave counts as a key, too
    assert create_with(application, record["id"], "echo").status == 422
    answer = create_with(application, record["id"], "gate")
    assert (answer.status, answer.json["id"]) == (200, record["id"])
    assert len(ask(application, "GET", "/tasks").json["tasks"]) == 2


def test_a_body_is_judged_whether_its_key_was_used_or_not(application):
    key = new_key()
    for body in b"{", b"{}", b'{"name": ""}':
        answer = ask(application, "POST", "/create-echo", body, idempotency_key=key)
        assert answer.status == 400
    assert create_with(application, key).status == 201  # it was left free
    for body in b"{", b"{}":
        answer = ask(application, "POST", "/create-echo", body, idempotency_key=key)
        assert answer.status == 400


def test_a_key_whose_first_create_is_still_being_stored_is_409(application, memory_journal):
    key, held = new_key(), Gate()
    memory_journal.before_save = lambda record: record.started_at or held({})
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        first = executor.submit(create_with, application, key)
        held.wait_for()
        for type, name in ("echo", "sample"), ("gate", "another"):
            answer = create_with(application, key, type, name)
            assert answer.status == 409 and int(answer.headers["Retry-After"]) >= 1
            assert "try again" in answer.json["error"]
        assert ask(application, "GET", f"/poll-echo/{key}").status == 404
        held.opened.set()
        assert first.result(LONG).status == 201
    assert create_with(application, key).status == 200


def test_of_two_creates_with_a_key_that_meet_in_the_store_one_is_told_so(
    application, memory_journal, monkeypatch
):
    key, held, add = new_key(), Gate(), application.store.add

    def add_late(record):
        """Come to the store when another one with this key is being saved, and leave later."""
        first = executor.submit(add, record._replace(live=taskserver.Live()))
        held.wait_for()
        try:
            return add(record)
        finally:
            held.opened.set()
            assert isinstance(first.exception(LONG), outcome) if outcome else first.result(LONG)

    def save(record):
        held({})
        if outcome is taskserver.JournalError:
            raise OSError("the disk is full")

    memory_journal.before_save = lambda record: record.started_at or save(record)
    monkeypatch.setattr(application.store, "add", add_late)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        outcome = taskserver.JournalError
        answer = create_with(application, key)
        assert answer.status == 409 and answer.headers["Retry-After"]
        held, outcome = Gate(), None
        assert create_with(application, key).status == 200
    assert application.pool.counts() == (0, 0)


@pytest.mark.parametrize("has_journal", [False, True])
def test_640_creates_of_40_keys_by_16_clients_make_40_tasks_each_run_once(application, has_journal):
    if has_journal:
        application.store.journal = MemoryJournal()
    ran, answers = [], []
    application.task("note")(lambda payload, report: ran.append(payload["n"]))
    keys = [new_key() for _ in range(40)]

    def client(i):
        own = keys[:]
        random.Random(i).shuffle(own)
        for key in own:
            answers.append((create_with(application, key, "note", n=key).status, key))

    in_threads(16, client)
    assert len(answers) == 640
    assert {status for status, _ in answers} <= {200, 201, 409}
    assert sorted(key for status, key in answers if status == 201) == sorted(keys)
    assert application.pool.join(LONG)
    assert eventually(lambda: application.pool.counts() == (0, 0))
    assert sorted(ran) == sorted(keys)
    tasks = ask(application, "GET", "/tasks?limit=500").json["tasks"]
    assert sorted(record["id"] for record in tasks) == sorted(keys)


def test_a_create_that_was_refused_leaves_its_key_free(application, gate, memory_journal):
    key = new_key()
    application.pool.max_workers, application.pool.max_waiting = 1, 0
    create(application, "gate")
    gate.wait_for()
    assert create_with(application, key, "gate").status == 503  # the pool is full
    assert create_with(application, key, "echo", "another").status == 503
    application.pool.max_waiting = 5
    application.store.max_tasks = 1
    assert create_with(application, key).status == 503  # the store is full
    application.store.max_tasks = 100
    memory_journal.before_save = fail_to_save
    assert create_with(application, key).status == 503
    memory_journal.before_save = refuse
    assert create_with(application, key).status == 400
    memory_journal.before_save = lambda record: None
    assert create_with(application, key, "gate", "of another name").status == 201


def test_a_repeat_of_a_stored_create_is_answered_though_the_server_is_full_or_stopping(
    application, gate, memory_journal
):
    application.pool.max_workers = 1
    stored = create(application, "gate")
    gate.wait_for()
    application.pool.max_waiting = 0
    application.store.max_tasks = 0
    memory_journal.before_save = fail_to_save
    assert create_with(application, new_key(), "gate").status == 503
    assert create_with(application, stored["id"], "gate").status == 200
    application.stop()
    assert create_with(application, new_key(), "gate").status == 503
    assert create_with(application, stored["id"], "gate").status == 200
    memory_journal.before_save = lambda record: None
    gate.opened.set()
    assert application.pool.join(LONG)


def test_a_key_outlives_a_restart_with_its_record(application, memory_journal):
    key = new_key()
    record = final(application, create_with(application, key, result=7).json)
    successor = restarted(application, "echo")
    answer = create_with(successor, key, result=8)
    assert (answer.status, answer.json) == (200, record)


def test_a_key_that_comes_again_after_its_record_was_evicted_is_a_new_task(
    application, memory_journal
):
    key, held = new_key(), Gate()
    assert final(application, create_with(application, key, result="old").json)["result"] == "old"
    memory_journal.before_delete = lambda ids: held({})
    application.store.keep = 0
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        assert application.store.evict() == 1
        deleted = executor.submit(application.store.delete_doomed)
        held.wait_for()
        again = executor.submit(create_with, application, key, result="new")
        assert eventually(lambda: is_being_saved(application.store, key))
        assert create_with(application, key).status == 409
        assert not again.done()  # for the old record is still being deleted
        application.store.keep = 3600
        held.opened.set()
        deleted.result(LONG)
        assert again.result(LONG).status == 201
    assert final(application, again.result().json)["result"] == "new"
    assert memory_journal.records[key].result == b'"new"'
    assert poll(restarted(application, "echo"), again.result().json)["result"] == "new"


def test_a_cancelled_task_keeps_its_key(application, gate):
    key = new_key()
    application.pool.max_workers = 1
    create(application, "gate")
    gate.wait_for()
    record = cancelled(application, create_with(application, key).json)
    answer = create_with(application, key)
    assert (answer.status, answer.json) == (200, record)


# Coroutines


class Door:
    """A coroutine that says when it has begun, and goes on when the test lets it."""

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.cancelled = threading.Semaphore(0)
        self._opened = concurrent.futures.Future()

    async def __call__(self, payload, report=lambda *_: None):
        report(0.25, "at the door")
        self.begun.release()
        try:
            await self.wait()
        except asyncio.CancelledError:
            self.cancelled.release()
            raise
        return payload.get("result")

    async def wait(self):
        """Wait in an event loop until the door is open."""
        await asyncio.shield(asyncio.wrap_future(self._opened))

    def wait_for(self, n=1):
        """Wait in a thread until so many more have come."""
        for _ in range(n):
            assert self.begun.acquire(timeout=LONG)

    def open(self):
        if not self._opened.done():
            self._opened.set_result(None)


@pytest.fixture
def door():
    door = Door()
    yield door
    door.open()


@pytest.fixture
def coroutines(application, door):
    """The same application with a task type that waits at the door."""
    application.task("door")(door)
    return application


COUNTS_REFERENCES = hasattr(sys, "getrefcount")  # PyPy does not


def left_behind(caplog, about, collect=not COUNTS_REFERENCES):
    """Return what the log says of what coroutines have left behind, if it is about something."""
    if collect:  # that it was left is found when it is deleted
        gc.collect()
    return [text for text in caplog.messages if "left behind" in text and about in text]


def ends_of_the_loop(caplog, about):
    """Return what the log says of what has ended the event loop, if it is about something."""
    if not COUNTS_REFERENCES:  # a generator that was left ends when it is deleted
        gc.collect()
    return [text for text in caplog.messages if "loop was ended" in text and about in text]


async def where(payload, report):
    return [threading.get_ident(), id(asyncio.get_running_loop())]


def test_a_coroutine_is_a_task_like_any_other(coroutines):
    @coroutines.task("squares")
    async def squares(payload, report):
        for n in range(3):
            await asyncio.sleep(0)
            report(n / 4, f"step {n}")
        return [number**2 for number in payload["numbers"]]

    created = create(coroutines, "squares", numbers=[1, 2, 3])
    assert {key: created[key] for key in KEYS[5:]} == dict.fromkeys(KEYS[5:])
    record = final(coroutines, created)
    consistent(record)
    assert (record["status"], record["result"]) == ("completed", [1, 4, 9])
    assert record["message"] == "step 2"


def test_a_coroutine_that_waits_is_pending_with_its_progress(coroutines, door):
    record = create(coroutines, "door", result=5)
    door.wait_for()
    now = poll(coroutines, record)
    consistent(now)
    assert [now[key] for key in ("status", "progress", "message")] == [
        "pending",
        0.25,
        "at the door",
    ]
    assert now["started_at"]
    door.open()
    assert final(coroutines, record)["result"] == 5


def test_all_coroutines_run_in_one_loop_in_a_thread_that_begins_with_the_first(coroutines):
    before = threading.active_count()
    coroutines.task("where")(where)
    coroutines.task("where-too")(where)
    assert threading.active_count() == before
    records = [create(coroutines, name) for name in ("where", "where-too") * 5]
    places = {tuple(final(coroutines, record)["result"]) for record in records}
    assert len(places) == 1
    assert places.pop()[0] not in (threading.get_ident(), outcome(coroutines, thread_id)["result"])


def thread_id(payload, report):
    return threading.get_ident()


def test_a_server_without_coroutines_does_not_import_asyncio():
    code = """
        import http.client, json, sys, threading, taskserver
        application = taskserver.demo()
        taskserver.add_monitoring(application), taskserver.add_pages(application)
        server = taskserver.Server(("127.0.0.1", 0), application)
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def run(type):
            client = http.client.HTTPConnection("127.0.0.1", server.server_port)
            body = json.dumps({"name": "x", "seconds": 0})
            client.request("POST", f"/create-{type}", body, {"Content-Type": "application/json"})
            id = json.loads(client.getresponse().read().decode())["id"]
            client.request("GET", f"/poll-{type}/{id}?wait=30")
            record = json.loads(client.getresponse().read().decode())
            return record["status"], "asyncio" in sys.modules

        print(run("task"))
        @application.task("coroutine")
        async def coroutine(payload, report):
            pass
        print("asyncio" in sys.modules, run("coroutine"))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.check_output(command, cwd=str(PROGRAM.parent), timeout=LONG)
    assert out.decode().splitlines() == ["('completed', False)", "False ('completed', True)"]


class Methods:
    async def method(self, payload, report):
        return await where(payload, report)

    @staticmethod
    async def static(payload, report):
        return await where(payload, report)

    @classmethod
    async def of_the_class(cls, payload, report):
        return await where(payload, report)

    async def __call__(self, payload, report):
        return await where(payload, report)


async def with_more(more, payload, report, most=None):
    return await where(payload, report)


@pytest.mark.parametrize(
    "function",
    [
        where,
        Methods(),
        Methods().method,
        Methods.static,
        Methods.of_the_class,
        functools.partial(with_more, 1),
        functools.partial(functools.partial(with_more, 1), most=2),
        functools.partial(Methods()),
        functools.partial(Methods().method),
    ],
    ids=lambda _: "",
)
def test_whatever_gives_a_coroutine_runs_in_the_loop(coroutines, function):
    here = outcome(coroutines, where)["result"]
    coroutines.task("limited", timeout=LONG)(function)  # which no thread can have
    assert final(coroutines, create(coroutines, "limited"))["result"] == here


def give_a_coroutine(payload, report):
    return where(payload, report)


def give_a_future(payload, report):
    class Awaitable:
        def __await__(self):
            return iter(())

    return Awaitable()


@pytest.mark.parametrize("function", [give_a_coroutine, give_a_future])
def test_a_plain_function_that_returns_an_awaitable_fails_with_advice(application, function):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a coroutine that nobody awaits
        record = outcome(application, function)
        gc.collect()
    assert record["error"] == "the function returned an awaitable; declare it with `async def`"


def test_as_many_coroutines_run_as_workers_allow_and_the_rest_has_a_queue_of_its_own(
    coroutines, door, gate
):
    coroutines.coroutine_pool.max_workers, coroutines.coroutine_pool.max_waiting = 2, 3
    coroutines.pool.max_workers, coroutines.pool.max_waiting = 1, 0
    records = [create(coroutines, "door", result=n) for n in range(5)]
    door.wait_for(2)
    refused = ask(coroutines, "POST", "/create-door", {"name": "one too many"})
    assert refused.status == 503 and int(refused.headers["Retry-After"]) >= 1
    assert "--max-waiting" in refused.json["error"]
    assert not door.begun.acquire(timeout=0.05)
    health = ask(coroutines, "GET", "/healthz").json
    assert (health["waiting"], health["running"]) == (3, 2)
    create(coroutines, "gate")  # the queue of the threads is another
    assert ask(coroutines, "POST", "/create-gate", {"name": "one too many"}).status == 503
    door.open()
    assert [final(coroutines, record)["result"] for record in records] == list(range(5))
    assert final(coroutines, create(coroutines, "door"))["status"] == "completed"


def test_thousands_of_coroutines_wait_at_once_in_a_few_threads(coroutines, door):
    coroutines.coroutine_pool.max_workers = 2000
    before = threading.active_count()
    records = [create(coroutines, "door", result=n) for n in range(2000)]
    door.wait_for(2000)
    assert threading.active_count() - before <= 10
    door.open()
    assert [final(coroutines, record)["result"] for record in records] == list(range(2000))


@pytest.mark.parametrize(
    "raised, error",
    [
        (ValueError("what it said"), "ValueError: what it said"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit("x"), "GeneratorExit: x"),
        (StopIteration(), "RuntimeError: coroutine raised StopIteration"),
        (StopAsyncIteration("x"), "StopAsyncIteration: x"),
        (asyncio.CancelledError(), "CancelledError"),
        (asyncio.TimeoutError("x"), "TimeoutError: x"),
        (taskserver.Cancelled(), "Cancelled"),
        (taskserver.TaskError("in its own words"), "in its own words"),
        (Speechless(), "Speechless: (an exception that cannot say what it is)"),
    ],
    ids=brief,
)
@pytest.mark.parametrize("when", ["at once", "later"])
def test_whatever_a_coroutine_raises_fails_it_alone(coroutines, door, caplog, raised, error, when):
    sister = create(coroutines, "door", result="unharmed")
    door.wait_for()

    async def task(payload, report):
        report(0.5, "so far")
        if when == "later":
            await asyncio.sleep(0)
        raise raised

    record = outcome(coroutines, task)
    consistent(record)
    assert (record["status"], record["error"], record["message"]) == ("failed", error, "so far")
    if not isinstance(raised, taskserver.TaskError):
        assert caplog.text.count("Traceback") >= 1 and "raise raised" in caplog.text
    door.open()
    assert final(coroutines, sister)["result"] == "unharmed"
    assert not left_behind(caplog, "raise raised")


@pytest.mark.parametrize("raised", [SystemExit("inner"), KeyboardInterrupt("inner")], ids=brief)
def test_what_an_awaited_task_raises_fails_the_coroutine_that_awaits_it(coroutines, caplog, raised):
    async def inner():
        await asyncio.sleep(0)
        raise raised

    async def task(payload, report):
        await asyncio.ensure_future(inner())

    assert outcome(coroutines, task)["error"] == f"{type(raised).__name__}: inner"
    gc.collect()
    assert "raise raised" in caplog.text and "left behind" not in caplog.text
    assert outcome(coroutines, where)["status"] == "completed"


def test_a_result_that_json_cannot_hold_fails_the_coroutine_alone(coroutines):
    async def give_an_object(payload, report):
        return {"a": object()}

    assert "JSON" in outcome(coroutines, give_an_object)["error"]
    coroutines.default = lambda value: "an object"
    assert outcome(coroutines, give_an_object)["result"] == {"a": "an object"}


def current_task():
    if hasattr(asyncio, "current_task"):
        return asyncio.current_task()
    return asyncio.Task.current_task()


def test_a_coroutine_that_cancels_itself_fails_where_it_waits_next(coroutines):
    async def cancel_and_wait(payload, report):
        current_task().cancel()
        await asyncio.sleep(LONG)

    async def cancel_and_return(payload, report):
        current_task().cancel()
        return "it did not wait"

    assert outcome(coroutines, cancel_and_wait)["error"] == "CancelledError"
    assert outcome(coroutines, cancel_and_return)["result"] == "it did not wait"
    assert outcome(coroutines, where)["status"] == "completed"


def test_no_coroutine_ends_the_loop(coroutines, door, caplog):
    sister = create(coroutines, "door", result="unharmed")
    door.wait_for()

    async def stop(payload, report):
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)
        return "it goes on"

    async def close(payload, report):
        asyncio.get_running_loop().close()

    before = outcome(coroutines, where)["result"]
    assert outcome(coroutines, stop)["result"] == "it goes on"
    assert outcome(coroutines, close)["error"].startswith("RuntimeError")
    assert outcome(coroutines, where)["result"] == before
    door.open()
    assert final(coroutines, sister)["result"] == "unharmed"


async def fail_soon(raised):
    await asyncio.sleep(0)
    raise raised


async def numbers(raised):
    try:
        yield 1
        yield 2
    finally:
        raise raised


async def leave_a_task(raised):
    asyncio.ensure_future(fail_soon(raised))


async def leave_a_future(raised):
    asyncio.get_running_loop().create_future().set_exception(raised)


async def leave_a_callback(raised):
    def fail():
        raise raised

    asyncio.get_running_loop().call_soon(fail)


async def leave_a_generator(raised):
    async for _ in numbers(raised):
        break


def check_what_is_left(coroutines, door, leave, kind, logged):
    """See that it is logged, and that other coroutines go on."""
    sister = create(coroutines, "door", result="unharmed")
    door.wait_for()

    @coroutines.task("leaves")
    async def leaves(payload, report):
        await leave(kind(f"stray {payload['n']}."))
        return "well"

    for n in range(3):
        assert final(coroutines, create(coroutines, "leaves", n=n))["result"] == "well"
    for n in range(3):
        assert eventually(lambda n=n: logged(f"{kind.__name__}: stray {n}."))
    assert outcome(coroutines, where)["status"] == "completed"
    door.open()
    assert final(coroutines, sister)["result"] == "unharmed"


@pytest.mark.parametrize(
    "leave, kind",
    [
        (leave_a_task, SystemExit),
        (leave_a_task, KeyboardInterrupt),
        (leave_a_callback, SystemExit),
        (leave_a_generator, SystemExit),
    ],
)
def test_an_exit_that_coroutines_leave_behind_does_not_end_the_loop_and_is_logged(
    coroutines, door, caplog, leave, kind
):
    check_what_is_left(coroutines, door, leave, kind, functools.partial(ends_of_the_loop, caplog))
    assert len(ends_of_the_loop(caplog, "stray")) == 3
    gc.collect()  # asyncio logs them now, and not in another test


@pytest.mark.parametrize(
    "leave", [leave_a_task, leave_a_future, leave_a_callback, leave_a_generator]
)
def test_what_coroutines_leave_behind_does_no_harm_and_is_logged_once(
    coroutines, door, caplog, leave
):
    check_what_is_left(coroutines, door, leave, ValueError, functools.partial(left_behind, caplog))
    assert len(left_behind(caplog, "stray", collect=True)) == 3


def test_an_exit_that_was_raised_in_another_thread_does_not_end_the_loop(coroutines, caplog):
    """Its traceback has a frame of that thread, which still runs."""
    done = threading.Event()

    @coroutines.task("leaves")
    async def leaves(payload, report):
        loop, raised = asyncio.get_running_loop(), asyncio.Event()

        def raise_again(error):
            raised.set()
            raise error

        def run():
            try:
                sys.exit("from another thread")
            except SystemExit as error:
                loop.call_soon_threadsafe(raise_again, error)
                done.wait(LONG)

        threading.Thread(target=run).start()
        await raised.wait()
        return "well"

    try:
        assert final(coroutines, create(coroutines, "leaves"))["result"] == "well"
        assert outcome(coroutines, where)["status"] == "completed"
        assert eventually(lambda: ends_of_the_loop(caplog, "from another thread"))
    finally:
        done.set()


def test_a_task_left_behind_that_waits_for_nothing_is_logged_once(coroutines, caplog):
    async def forlorn():
        await asyncio.get_running_loop().create_future()

    async def task(payload, report):
        asyncio.ensure_future(forlorn())
        await asyncio.sleep(0)

    assert outcome(coroutines, task)["status"] == "completed"
    assert eventually(lambda: left_behind(caplog, "forlorn", collect=True))
    (text,) = left_behind(caplog, "forlorn", collect=True)
    assert "pending" in text


def test_a_task_left_behind_goes_on_after_its_coroutine(coroutines):
    ended = threading.Event()

    async def task(payload, report):
        async def go_on():
            while not payload["ended"]:
                await asyncio.sleep(0)
            ended.set()

        payload["ended"] = False
        asyncio.get_running_loop().call_soon(payload.update, {"ended": True})
        task.left = asyncio.ensure_future(go_on())

    assert outcome(coroutines, task)["status"] == "completed"
    assert ended.wait(LONG)


def test_context_variables_are_fresh_in_each_coroutine(coroutines):
    variable = contextvars.ContextVar("variable", default="fresh")
    variable.set("set by the test")

    async def look_and_set(payload, report):
        seen = variable.get()
        variable.set(payload["name"])
        await asyncio.sleep(0)
        return [seen, variable.get()]

    coroutines.task("look")(look_and_set)
    for record in [create(coroutines, "look", name) for name in ("a", "b", "c")]:
        assert final(coroutines, record)["result"] == ["fresh", record["name"]]


def test_a_coroutine_reports_from_the_loop_and_from_other_threads(coroutines, door):
    @coroutines.task("in-threads")
    async def in_an_executor(payload, report):
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *(loop.run_in_executor(None, report, 0.5, "from a thread") for _ in range(8))
        )
        door.begun.release()
        await door.wait()
        report(0.75)
        in_an_executor.report = report

    record = create(coroutines, "in-threads")
    door.wait_for()
    now = poll(coroutines, record)
    assert (now["progress"], now["message"]) == (0.5, "from a thread")
    door.open()
    assert final(coroutines, record)["message"] == "from a thread"
    in_an_executor.report(0.1, "late")
    now = poll(coroutines, record)
    assert (now["progress"], now["message"]) == (1.0, "from a thread")


def test_a_coroutine_that_blocks_holds_up_its_sisters_and_nobody_else(
    coroutines, server, door, gate
):
    async def block(payload, report):
        return gate(payload, report)

    coroutines.task("block")(block)
    with server.client() as client:
        records = []
        for name in "block", "door", "echo":
            created = client.ask("POST", f"/create-{name}", {"name": "x", "result": 1})
            assert created.status == 201
            records.append(created.json)
            if name == "block":
                gate.wait_for()
        blocked, sister, other = records
        assert final(coroutines, other)["result"] == 1  # in a thread
        for record in blocked, sister:
            answer = client.ask("GET", f"/poll-{record['type']}/{record['id']}")
            assert (answer.status, answer.json["status"]) == (200, "pending")
        assert not door.begun.acquire(blocking=False)
        door.open()
        gate.opened.set()
    assert [final(coroutines, record)["result"] for record in (blocked, sister)] == [1, 1]


def test_a_time_limit_ends_a_coroutine_where_it_waits_and_its_finally_may_await(coroutines, door):
    begun, cleaned = threading.Event(), []

    @coroutines.task("limited", timeout=0.01)
    async def limited(payload, report):
        report(0.5, "so far")
        try:
            await asyncio.sleep(LONG * 2)
        finally:
            begun.set()
            await door.wait()
            report(0.6)
            cleaned.append(True)

    record = create(coroutines, "limited")
    assert begun.wait(LONG)
    assert poll(coroutines, record)["status"] == "pending"
    door.open()
    record = final(coroutines, record)
    consistent(record)
    assert (record["status"], record["error"]) == ("failed", "timed out after 0.01 seconds")
    assert (record["progress"], record["message"], cleaned) == (0.6, "so far", [True])


def test_a_coroutine_within_its_time_limit_is_left_alone(coroutines):
    coroutines.task("in-time", timeout=LONG)(where)
    assert final(coroutines, create(coroutines, "in-time"))["status"] == "completed"


class Stubborn:
    """A coroutine that does not end where it is cancelled, but when the test lets it."""

    def __init__(self, door):
        self.door = door
        self.cancelled = threading.Event()

    async def __call__(self, payload, report):
        self.door.begun.release()
        try:
            await asyncio.sleep(LONG * 2)
        except asyncio.CancelledError:
            self.cancelled.set()
        await self.door.wait()
        return "all the same"


def test_a_coroutine_that_outlasts_the_grace_is_final_and_keeps_its_place(coroutines, door):
    pool = coroutines.coroutine_pool
    pool.grace, pool.max_workers = 0.01, 1
    coroutines.task("stubborn", timeout=0.01)(Stubborn(door))
    first, second = create(coroutines, "stubborn"), create(coroutines, "door", result=2)
    door.wait_for()
    record = final(coroutines, first)
    consistent(record)
    assert record["error"] == "timed out after 0.01 seconds"
    assert pool.counts() == (1, 1) and not door.begun.acquire(timeout=0.05)
    assert poll(coroutines, second)["started_at"] is None
    door.open()
    assert final(coroutines, second)["result"] == 2
    assert pool.join(LONG) and pool.counts() == (0, 0)
    assert poll(coroutines, first) == record


def test_a_coroutine_that_swallows_its_time_limit_and_returns_is_completed(coroutines, door):
    stubborn = Stubborn(door)
    coroutines.task("stubborn", timeout=0.01)(stubborn)
    record = create(coroutines, "stubborn")
    assert stubborn.cancelled.wait(LONG)
    door.open()
    record = final(coroutines, record)
    assert (record["status"], record["result"]) == ("completed", "all the same")


def test_a_journal_that_hangs_stops_no_coroutine_that_runs(coroutines, memory_journal, door):
    pool, held, first = coroutines.coroutine_pool, Gate(), Door()
    pool.max_workers = 2
    went_on = threading.Event()
    coroutines.task("first")(first)

    @coroutines.task("steps")
    async def steps(payload, report):
        door.begun.release()
        await door.wait()
        for n in range(10):
            report(n / 10)
            await asyncio.sleep(0.001)
        went_on.set()
        return "went on"

    ending, running = create(coroutines, "first", result="ended"), create(coroutines, "steps")
    first.wait_for(), door.wait_for()
    waiting = [create(coroutines, "door", result=n) for n in range(pool.THREADS + 5)]
    memory_journal.before_save = lambda record: held({})
    first.open()
    held.wait_for()  # its outcome is to be saved
    pool.max_workers = 100
    coroutines.wake_workers()
    held.wait_for(pool.THREADS - 1)  # each is to save the start of a task
    door.open()
    assert went_on.wait(LONG)
    assert poll(coroutines, running)["status"] == "pending"
    assert not door.begun.acquire(blocking=False)  # none begins before its start is on disk
    held.opened.set()
    assert final(coroutines, ending)["result"] == "ended"
    assert final(coroutines, running)["result"] == "went on"
    assert [final(coroutines, record)["result"] for record in waiting] == list(range(len(waiting)))


def test_many_coroutines_share_the_commits_of_a_journal(coroutines, memory_journal, door):
    taskserver.recover(coroutines)  # as the program does when it opens a journal
    held = Gate()
    memory_journal.before_save = lambda record: record.started_at and held({})
    records = [create(coroutines, "door") for _ in range(40)]
    held.wait_for(32)  # starts that are being saved at once
    door.open()
    held.opened.set()
    assert {final(coroutines, record)["status"] for record in records} == {"completed"}


def stop(application, grace):
    """Stop an application as its server does."""
    with serving(application) as server:
        taskserver.stop_in_order(server, grace)


def test_the_stop_gives_coroutines_the_grace(coroutines, memory_journal, door):
    record = create(coroutines, "door", result=5)
    door.wait_for()
    opener = threading.Thread(target=lambda: eventually(is_stopping) and door.open())

    def is_stopping():
        return ask(coroutines, "GET", "/healthz").status == 503

    opener.start()
    stop(coroutines, LONG)
    opener.join(LONG)
    assert poll(restarted(coroutines, "door"), record)["result"] == 5
    assert not door.cancelled.acquire(blocking=False)


def test_the_stop_cancels_coroutines_that_outlast_the_grace_and_the_next_start_says_so(
    coroutines, memory_journal
):
    begun, cleaned = threading.Semaphore(0), []

    async def outlast(payload, report):
        begun.release()
        try:
            await asyncio.sleep(LONG * 2)
        except asyncio.CancelledError:
            if payload["name"] == "returns":
                return "its end decides"
            raise
        finally:
            await asyncio.sleep(0.001)
            cleaned.append(payload["name"])
            if payload["name"] == "raises":
                raise ValueError("because of the stop")

    coroutines.task("outlast")(outlast)
    names = ["ends", "raises", "returns"]
    records = [create(coroutines, "outlast", name) for name in names]
    for _ in names:
        assert begun.acquire(timeout=LONG)
    stop(coroutines, 0.01)
    assert sorted(cleaned) == names
    successor = restarted(coroutines, "outlast")
    *interrupted, returned = [final(successor, record) for record in records]
    for record in interrupted:
        consistent(record)
        assert record["error"] == "interrupted: the server ended while it ran"
    assert returned["result"] == "its end decides"


def test_a_coroutine_that_may_run_again_does_so_after_the_stop(coroutines, memory_journal):
    begun, may_end = threading.Semaphore(0), []

    async def run_again(payload, report):
        begun.release()
        if not may_end:
            await asyncio.sleep(LONG * 2)
        return "in the second run"

    coroutines.task("again", rerun=True)(run_again)
    record = create(coroutines, "again")
    assert begun.acquire(timeout=LONG)
    stop(coroutines, 0)
    may_end.append(True)
    successor = restarted(coroutines, "again", rerun=True)
    assert final(successor, record)["result"] == "in the second run"


def test_the_stop_does_not_wait_for_a_coroutine_that_does_not_end(coroutines, memory_journal, door):
    coroutines.task("stubborn")(Stubborn(door))
    record, beside = create(coroutines, "stubborn"), create(coroutines, "door")
    door.wait_for(2)
    begun = time.monotonic()
    stop(coroutines, 0)
    assert time.monotonic() - begun < LONG / 2
    assert door.cancelled.acquire(timeout=LONG)
    successor = restarted(coroutines, "stubborn", "door")
    for one in record, beside:
        assert final(successor, one)["error"] == "interrupted: the server ended while it ran"


def test_no_coroutine_that_waits_begins_during_the_stop(coroutines, memory_journal, door):
    coroutines.coroutine_pool.max_workers = 1
    running, waiting = create(coroutines, "door"), create(coroutines, "door", result="later")
    door.wait_for()
    stop(coroutines, 0)
    assert poll(coroutines, waiting)["started_at"] is None
    assert not door.begun.acquire(blocking=False)
    door.open()
    successor = restarted(coroutines, "door")
    assert final(successor, running)["error"].startswith("interrupted: ")
    assert final(successor, waiting)["result"] == "later"


def test_work_in_a_pool_of_threads_reports_and_a_cancel_reaches_it(coroutines, gate):
    called, after = [], queue.Queue()

    def work(payload, report):
        called.append(payload["name"])
        try:
            gate(payload, report)
            report(0.5)
        except BaseException as error:
            after.put(error)
            raise
        return "done"

    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        @coroutines.task("pooled")
        async def pooled(payload, report):
            return await asyncio.get_running_loop().run_in_executor(pool, work, payload, report)

        running = create(coroutines, "pooled", "a")
        gate.wait_for()
        waiting, last = create(coroutines, "pooled", "b"), create(coroutines, "pooled", "c")
        assert poll(coroutines, running)["message"] == "at the gate"
        for record in waiting, running:
            cancelled(coroutines, record)
            assert final(coroutines, record)["error"] == BY_REQUEST
        gate.opened.set()  # until now the work went on
        assert isinstance(after.get(timeout=LONG), taskserver.Cancelled)
        assert final(coroutines, last)["result"] == "done"
        assert called == ["a", "c"]


@pytest.mark.skipif(not hasattr(sys, "getrefcount"), reason="needs counted references")
def test_nobody_holds_what_a_coroutine_held_when_it_failed(coroutines):
    class Held:
        pass

    held = []

    async def hold(payload, report):
        here = Held()
        held.append(weakref.ref(here))
        raise ValueError("with a traceback, in which `here` is")

    gc.disable()
    try:
        assert outcome(coroutines, hold)["status"] == "failed"
        assert eventually(lambda: held[0]() is None)
    finally:
        gc.enable()


def test_executor_is_refused_with_the_idiom_that_takes_its_place():
    with pytest.raises(TypeError) as caught:
        Application().task("there", executor=concurrent.futures.Executor())
    assert "task type 'there'" in str(caught.value)
    assert "await asyncio.get_running_loop().run_in_executor(" in str(caught.value)


# Cancel of coroutines and children


def test_cancel_ends_a_coroutine_where_it_waits_and_its_finally_may_await(coroutines, door, caplog):
    in_finally = threading.Event()

    @coroutines.task("cleans")
    async def cleans(payload, report):
        report(0.5, "so far")
        try:
            door.begun.release()
            await asyncio.sleep(LONG * 2)
        finally:
            in_finally.set()
            await door.wait()

    record = create(coroutines, "cleans")
    door.wait_for()
    assert cancelled(coroutines, record)["status"] == "pending"
    assert in_finally.wait(LONG)
    assert poll(coroutines, record)["status"] == "pending"
    door.open()
    record = final(coroutines, record)
    consistent(record)
    assert (record["status"], record["error"]) == ("failed", BY_REQUEST)
    assert (record["progress"], record["message"]) == (0.5, "so far")
    assert "Traceback" not in caplog.text
    assert cancelled(coroutines, record) == record


def test_a_coroutine_that_swallows_its_cancel_and_returns_is_completed(coroutines, door):
    stubborn = Stubborn(door)
    coroutines.task("stubborn")(stubborn)
    record = create(coroutines, "stubborn")
    door.wait_for()
    cancelled(coroutines, record)
    assert stubborn.cancelled.wait(LONG)
    door.open()
    record = final(coroutines, record)
    assert (record["status"], record["result"]) == ("completed", "all the same")
    assert cancelled(coroutines, record) == record


def test_a_cancelled_coroutine_that_outlasts_the_grace_is_final_and_keeps_its_place(
    coroutines, door
):
    pool = coroutines.coroutine_pool
    pool.grace, pool.max_workers = 0.01, 1
    coroutines.task("stubborn")(Stubborn(door))
    first, second = create(coroutines, "stubborn"), create(coroutines, "door", result=2)
    door.wait_for()
    cancelled(coroutines, first)
    assert final(coroutines, first)["error"] == BY_REQUEST
    assert pool.counts() == (1, 1)
    door.open()
    assert final(coroutines, second)["result"] == 2
    assert final(coroutines, first)["error"] == BY_REQUEST


def test_report_raises_cancelled_in_the_loop_and_in_executors(coroutines, door):
    reporting = threading.Event()

    def work(report):
        reporting.set()
        while True:  # a loop that `except Exception` does not leave
            with contextlib.suppress(Exception):
                report(0.5)

    @coroutines.task("elsewhere")
    async def elsewhere(payload, report):
        future = asyncio.get_running_loop().run_in_executor(None, work, report)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            with pytest.raises(taskserver.Cancelled):
                await future
            with pytest.raises(taskserver.Cancelled):
                report(0.6)
            raise

    record = create(coroutines, "elsewhere")
    assert reporting.wait(LONG)
    cancelled(coroutines, record)
    assert final(coroutines, record)["error"] == BY_REQUEST


def test_a_waiting_coroutine_that_is_cancelled_is_final_at_once_and_never_begins(coroutines, door):
    pool = coroutines.coroutine_pool
    pool.max_workers, pool.max_waiting = 1, 1
    running, waiting = create(coroutines, "door"), create(coroutines, "door")
    door.wait_for()
    refused = ask(coroutines, "POST", "/create-door", {"name": "full"})
    assert refused.status == 503
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        polling = threads.submit(poll, coroutines, waiting, LONG)
        record = cancelled(coroutines, waiting)
        assert polling.result(LONG) == record
    consistent(record)
    assert (record["error"], record["started_at"]) == (BY_REQUEST, None)
    last = create(coroutines, "door", result="in its place")
    door.open()
    assert final(coroutines, last)["result"] == "in its place"
    assert final(coroutines, running)["status"] == "completed"
    door.wait_for()  # that is the last one
    assert not door.begun.acquire(blocking=False)


def test_a_coroutine_that_is_cancelled_between_its_start_and_its_turn_in_the_loop_is_not_called(
    coroutines, door, gate
):
    async def block(payload, report):
        gate({})

    coroutines.task("block")(block)
    blocking = create(coroutines, "block")
    gate.wait_for()  # the loop can begin nothing now
    record = create(coroutines, "door")
    assert eventually(lambda: poll(coroutines, record)["started_at"])
    asked = cancelled(coroutines, record)
    assert asked["status"] == "pending"
    gate.opened.set()
    record = final(coroutines, record)
    consistent(record)
    assert (record["error"], record["started_at"]) == (BY_REQUEST, asked["started_at"])
    assert final(coroutines, blocking)["status"] == "completed"
    assert not door.begun.acquire(blocking=False)


def test_a_coroutine_that_is_cancelled_before_the_loop_knows_of_it_is_not_called(
    coroutines, monkeypatch
):
    pool, answers, called = coroutines.coroutine_pool, [], []
    call_in_loop, start = pool._event_loop.call_soon, pool._start_run

    def call_late(function, *arguments):
        if function == start:
            (record,) = ask(coroutines, "GET", "/tasks").json["tasks"]
            answers.append(cancelled(coroutines, record))
        return call_in_loop(function, *arguments)

    @coroutines.task("note")
    async def note(payload, report):
        called.append(payload["name"])

    monkeypatch.setattr(pool._event_loop, "call_soon", call_late)
    record = final(coroutines, create(coroutines, "note"))
    consistent(record)
    assert (record["error"], record["started_at"]) == (BY_REQUEST, answers[0]["started_at"])
    assert not called


@pytest.fixture
def places(coroutines, tmp_path):
    """Functions that leave a mark when they are called: in a coroutine and in a child."""
    mark = tmp_path / "called"

    async def in_the_loop(payload, report):
        leave_a_mark(payload, report)

    coroutines.task("coroutine")(in_the_loop)
    coroutines.task("child", cpu=True)(leave_a_mark)
    return lambda type: (create(coroutines, type, path=str(mark)), mark)


def leave_a_mark(payload, report):
    pathlib.Path(payload["path"]).write_text("called", encoding="utf-8")


@pytest.mark.parametrize("type", ["coroutine", "child"])
def test_a_task_that_is_cancelled_while_its_start_is_journaled_is_not_called_there(
    coroutines, memory_journal, places, type
):
    held = Gate()
    memory_journal.before_save = lambda record: record.payload and record.started_at and held({})
    record, mark = places(type)
    held.wait_for()
    asked = cancelled(coroutines, record)
    assert asked["status"] == "pending" and asked["started_at"]
    held.opened.set()
    record = final(coroutines, record)
    consistent(record)
    assert (record["error"], record["started_at"]) == (BY_REQUEST, asked["started_at"])
    assert not mark.exists()
    assert memory_journal.records[record["id"]].error == BY_REQUEST


def test_a_waiting_coroutine_that_is_cancelled_is_in_the_journal_before_the_answer(
    coroutines, memory_journal, door
):
    coroutines.coroutine_pool.max_workers = 1
    create(coroutines, "door")
    door.wait_for()
    record = cancelled(coroutines, create(coroutines, "door"))
    assert (record["error"], record["started_at"]) == (BY_REQUEST, None)
    assert memory_journal.records[record["id"]].error == BY_REQUEST


def test_rerun_does_not_bring_a_cancelled_coroutine_back(coroutines, memory_journal, door):
    coroutines.task("again", rerun=True)(door.__call__)
    record = create(coroutines, "again")
    door.wait_for()
    cancelled(coroutines, record)
    record = final(coroutines, record)
    successor = restarted(coroutines, "again", rerun=True)
    assert poll(successor, record) == record and record["error"] == BY_REQUEST
    assert not door.begun.acquire(blocking=False)


def sleep_with_a_process(payload, report):
    """Start a process, tell its number, and sleep."""
    code = "import time; time.sleep(600)"
    if os.name != "posix":  # there it outlives its parent; this one ends when its stdin does
        code = "import sys; sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    report(0.5, f"{os.getpid()} {process.pid}")
    time.sleep(600)


def test_cancel_ends_a_child_with_all_that_it_has_started(application, caplog):
    application.task("sleep", cpu=True)(sleep_with_a_process)
    application.task("echo-there", cpu=True)(echo)
    application.cpu_pool.max_workers = 1
    record, after = create(application, "sleep"), create(application, "echo-there", result=7)
    assert eventually(lambda: poll(application, record)["message"])
    numbers = [int(number) for number in poll(application, record)["message"].split()]
    cancelled(application, record)
    record = final(application, record)
    consistent(record)
    assert (record["error"], record["progress"]) == (BY_REQUEST, 0.5)
    assert final(application, after)["result"] == 7
    if os.name == "posix":
        assert eventually(lambda: all(is_gone(number) for number in numbers))
    assert "Traceback" not in caplog.text


def test_a_waiting_task_of_a_child_that_is_cancelled_is_final_at_once(application, tmp_path):
    application.task("sleep", cpu=True)(sleep_with_a_process)
    application.task("mark", cpu=True)(leave_a_mark)
    application.cpu_pool.max_workers = 1
    running = create(application, "sleep")
    assert eventually(lambda: poll(application, running)["message"])
    waiting = create(application, "mark", path=str(tmp_path / "called"))
    record = cancelled(application, waiting)
    assert (record["status"], record["error"], record["started_at"]) == ("failed", BY_REQUEST, None)
    cancelled(application, running)
    assert final(application, running)["error"] == BY_REQUEST
    assert application.cpu_pool.join(LONG) and not (tmp_path / "called").exists()


def test_a_cancel_that_comes_as_a_child_just_ends_leaves_the_next_task_alone(application):
    application.task("echo-there", cpu=True)(echo)
    application.cpu_pool.max_workers = 1
    final(application, create(application, "echo-there"))  # the process has started
    chance = random.Random(13)
    for n in range(12):
        first = create(application, "echo-there", result=n)
        second = create(application, "echo-there", result=-n)
        end = time.perf_counter() + chance.uniform(0, 0.002)
        while time.perf_counter() < end:
            pass
        cancelled(application, first)
        assert final(application, second)["result"] == -n
        record = final(application, first)
        assert record["result"] == n or record["error"] == BY_REQUEST


@pytest.mark.parametrize("type", ["door", "sleep"])
def test_a_hundred_cancels_of_one_that_runs_are_one(coroutines, door, caplog, type):
    caplog.set_level(logging.INFO, "taskserver")
    coroutines.task("sleep", cpu=True)(sleep_with_a_process)
    record = create(coroutines, type)
    assert eventually(lambda: poll(coroutines, record)["message"])
    in_threads(100, lambda _: cancelled(coroutines, record))
    assert final(coroutines, record)["error"] == BY_REQUEST
    assert coroutines.types[type].pool.join(LONG)
    about = [text for text in caplog.messages if record["id"] in text]
    assert sum("is to be cancelled" in text for text in about) == 1
    assert sum(" failed: " in text for text in about) == 1
    assert len(about) == 3  # created, cancelled, failed
    if type == "door":
        assert door.cancelled.acquire(timeout=LONG) and not door.cancelled.acquire(blocking=False)


@pytest.mark.parametrize("type", ["door", "echo-there"])
def test_of_a_cancel_and_a_start_or_an_end_elsewhere_one_wins(coroutines, door, type):
    door.open()
    coroutines.task("echo-there", cpu=True)(echo)
    coroutines.cpu_pool.max_workers = 2
    wait = threading.Barrier(2)
    records = []

    def cancel(i):
        for n in range(60):
            wait.wait(LONG)
            cancelled(coroutines, records[n])

    def make(i):
        for n in range(60):
            records.append(create(coroutines, type, result=n))
            wait.wait(LONG)

    in_threads(2, lambda i: (make, cancel)[i](i))
    for n, record in enumerate(records):
        record = final(coroutines, record)
        consistent(record)
        assert record["result"] == n or record["error"] == BY_REQUEST
    pool = coroutines.types[type].pool
    assert pool.join(LONG) and pool.counts() == (0, 0)
    health = ask(coroutines, "GET", "/healthz").json
    assert health["completed"] + health["failed"] == 60


# -- 7. HTTP ---------------------------------------------------------------------------------------


# Requests as bytes


def reading(buffer):
    """Read one request with its body, as a connection does."""
    request = yield from taskserver.read_head(buffer)
    body = yield from taskserver.read_body(request.fields, buffer)
    return request.with_body(body)


def parse(*pieces):
    """Return what comes out when bytes arrive in pieces: requests, then the status of a refusal."""
    buffer, out = bytearray(), []
    parsing = None
    try:
        for piece in pieces:
            buffer += piece
            while buffer or parsing:
                parsing = parsing or reading(buffer)
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


@pytest.mark.parametrize(
    "data, expected",
    [
        # request line (RFC 9112, 3)
        (get(), ("GET", "/a", "", "h", b"")),
        (b"\r\n" + get(), ("GET", "/a", "", "h", b"")),
        (b"\r\n" * 50 + get(), ("GET", "/a", "", "h", b"")),
        (
            b"GET /a/b?c=d&e?f/%20 HTTP/1.1\r\nHost: h\r\n\r\n",
            ("GET", "/a/b", "c=d&e?f/%20", "h", b""),
        ),
        (
            b"GET /%C3%A9%2F;a=b,c@:! HTTP/1.1\r\nHost: h\r\n\r\n",
            ("GET", "/%C3%A9%2F;a=b,c@:!", "", "h", b""),
        ),
        (b"GET //h/.. HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "//h/..", "", "h", b"")),
        (b"get /a HTTP/1.1\r\nHost: h\r\n\r\n", ("get", "/a", "", "h", b"")),
        (
            b"M-SEARCH!#$%&'*+.^_`|~ /a HTTP/1.1\r\nHost: h\r\n\r\n",
            ("M-SEARCH!#$%&'*+.^_`|~", "/a", "", "h", b""),
        ),
        (b"GET http://g:80/a?b HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "/a", "b", "g:80", b"")),
        (b"GET HTTPS://g HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "/", "", "g", b"")),
        (b"GET http://g?b HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "/", "b", "g", b"")),
        (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", ("OPTIONS", "*", "", "h", b"")),
        (b"GET /a HTTP/1.0\r\n\r\n", ("GET", "/a", "", "", b"")),
        (b"GET /a HTTP/1.0\r\nHost: h\r\n\r\n", ("GET", "/a", "", "h", b"")),
        (b"GET /a HTTP/1.2\r\nHost: h\r\n\r\n", ("GET", "/a", "", "h", b"")),
        (b"GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nHost: h\r\n\r\n", ("POST", "/a", "", "h", b"")),
        (b"OPTIONS * HTTP/1.1\r\nHost:\r\n\r\n", ("OPTIONS", "*", "", "", b"")),
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
        (b"\n" + get(), 400),
        (b"\r" + get(), 400),
        (b"\r\n\n" + get(), 400),
        (b"\r\n " + get(), 400),
        (b"GET /a HTTP/2.0\r\nHost: h\r\n\r\n", 505),
        (b"GET /a HTTP/0.9\r\nHost: h\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        # headers (RFC 9112, 5; RFC 9110, 5.5 and 7.2)
        (
            get(b"A:", b"B: \t x \t ", b"A: y", b"C:\xe9\xff"),
            {"a": ", y", "b": "x", "c": "\xe9\xff", "host": "h"},
        ),
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
        (b"OPTIONS * HTTP/1.1\r\n\r\n", 400),
        (b"OPTIONS *?a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"OPTIONS /a HTTP/1.1\r\nHost:\r\n\r\n", 400),
        (b"GET http://g/a HTTP/1.1\r\nHost:\r\n\r\n", ("GET", "/a", "", "g", b"")),
        (b"GET /a HTTP/1.0\r\nHost:\r\n\r\n", ("GET", "/a", "", "", b"")),
        (b"GET /a HTTP/1.1\r\nHost: h:\r\n\r\n", ("GET", "/a", "", "h:", b"")),
        (b"GET /a HTTP/1.1\r\nHost: h:0000080\r\n\r\n", ("GET", "/a", "", "h:0000080", b"")),
        (
            b"GET /a HTTP/1.1\r\nHost: h:" + b"1" * 40 + b"\r\n\r\n",
            ("GET", "/a", "", "h:" + "1" * 40, b""),
        ),
        (b"GET http://[::1]:0080 HTTP/1.1\r\nHost: h\r\n\r\n", ("GET", "/", "", "[::1]:0080", b"")),
        (b"GET /a HTTP/1.1\r\nHost: :80\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost: h:\xb2\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost: h:port\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost: h:-1\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
        (
            b"GET /a HTTP/1.1\r\nHost: h,g\r\n\r\n",
            ("GET", "/a", "", "h,g", b""),
        ),  # a reg-name may hold commas
        (b"GET /a HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", ("GET", "/a", "", "[::1]:80", b"")),
        (b"GET /a HTTP/1.0\r\nHost: a b\r\n\r\n", 400),
        (b"GET http://g/a HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        # bodies by Content-Length (RFC 9112, 6)
        (posted(b"abcde", b"Content-Length: 5"), ("POST", "/a", "", "h", b"abcde")),
        (posted(b"abcde", b"content-length:\t005 "), ("POST", "/a", "", "h", b"abcde")),
        (posted(b"", b"Content-Length: 0"), ("POST", "/a", "", "h", b"")),
        (
            b"GET /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nGET /",
            ("GET", "/a", "", "h", b"GET /"),
        ),
        (
            posted(b"abcde", b"Content-Length: 5", b"Upgrade: h2c", b"Connection: upgrade"),
            ("POST", "/a", "", "h", b"abcde"),
        ),
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
        (
            posted(b"abcde", b"Content-Length: " + b"0" * 5000 + b"5"),
            ("POST", "/a", "", "h", b"abcde"),
        ),
        (posted(b"", b"Content-Length: " + b"0" * 30), ("POST", "/a", "", "h", b"")),
        (posted(b"abcde", b"Content-Length: " + b"9" * 19), 413),
        (posted(b"abcde", b"Content-Length: " + b"9" * 5000), 413),
        (posted(b"abcde", b"Content-Length: 00001048577"), 413),
        (posted(b"", b"Content-Length: 1048577"), 413),
        # chunked bodies (RFC 9112, 7.1)
        (posted(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", CHUNKED), ("POST", "/a", "", "h", b"abcde")),
        (posted(b"0\r\n\r\n", CHUNKED), ("POST", "/a", "", "h", b"")),
        (
            posted(b'00A;x=y;z="q"\r\n0123456789\r\n000\r\nT: x\r\n\r\n', CHUNKED),
            ("POST", "/a", "", "h", b"0123456789"),
        ),
        (
            posted(b"a ;x\r\n0123456789\r\n0\r\n\r\n", b"transfer-encoding:CHUNKED"),
            ("POST", "/a", "", "h", b"0123456789"),
        ),
        (
            b"GET /a HTTP/1.1\r\nHost: h\r\n" + CHUNKED + b"\r\n\r\n1\r\nx\r\n0\r\n\r\n",
            ("GET", "/a", "", "h", b"x"),
        ),
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
        (
            posted(b"0" * 900 + b"3\r\nabc\r\n" + b"0" * 30 + b"\r\n\r\n", CHUNKED),
            ("POST", "/a", "", "h", b"abc"),
        ),
        (posted(b"0" * 30 + b"100001\r\nabc", CHUNKED), 413),
        (posted(b"f" * 900 + b"\r\nabc", CHUNKED), 413),
        (
            posted(b'3; x = y ;z;q="a;\\"\\\\ b"\r\nabc\r\n0;end\r\n\r\n', CHUNKED),
            ("POST", "/a", "", "h", b"abc"),
        ),
        (posted(b"3;\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
        (posted(b"3;x;\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
        (posted(b"3;bad[=x\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
        (posted(b"3;x=\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
        (posted(b"3;=y\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
        (posted(b"3;x y\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
        (posted(b'3;x="y\r\nabc\r\n0\r\n\r\n', CHUNKED), 400),
        (posted(b'3;x="y"z\r\nabc\r\n0\r\n\r\n', CHUNKED), 400),
        (posted(b'3;x="y\\"\r\nabc\r\n0\r\n\r\n', CHUNKED), 400),
        (posted(b"3,x\r\nabc\r\n0\r\n\r\n", CHUNKED), 400),
        (posted(b"0;\r\n\r\n", CHUNKED), 400),
        (posted(b"ffffffffffffffff\r\nabc", CHUNKED), 413),
        (posted(b"100001\r\nabc", CHUNKED), 413),
        (posted(b"0\r\n\r\n", CHUNKED, b"Content-Length: 5"), 400),
        (posted(b"0\r\n\r\n", b"Content-Length: 5", CHUNKED), 400),
        (posted(b"0\r\n\r\n", CHUNKED, CHUNKED), 400),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: gzip, chunked"), 501),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: chunked, gzip"), 400),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: xchunked"), 400),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding:"), 400),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: gzip"), 400),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: gzip", CHUNKED), 501),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: identity, chunked"), 501),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: gzip,, chunked"), 400),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: chunked, chunked"), 400),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: chunked;q=1"), 400),
        (get(b"Transfer-Encoding: gzip"), 400),
        (posted(b"0\r\n\r\n", b"Transfer-Encoding: identity"), 400),
        (b"POST /a HTTP/1.0\r\nHost: h\r\n" + CHUNKED + b"\r\n\r\n0\r\n\r\n", 400),
        # expectations (RFC 9110, 10.1.1)
        (
            posted(b"abcde", b"Content-Length: 5", b"Expect: 100-Continue"),
            ("POST", "/a", "", "h", b"abcde"),
        ),
        (posted(b"abcde", b"Content-Length: 5", b"Expect: 200-ok"), 417),
        (posted(b"abcde", b"Content-Length: 5", b"Expect: 100-continue, x"), 417),
        (b"GET /a HTTP/1.0\r\nExpect: x\r\n\r\n", ("GET", "/a", "", "", b"")),
    ],
    ids=brief,
)
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


@pytest.mark.parametrize(
    "data",
    [
        get(),
        posted(b"abcde", b"Content-Length: 5"),
        posted(b"3;x\r\nabc\r\n0\r\nT: x\r\n\r\n", CHUNKED),
        b"\r\n" + get(),
    ],
    ids=brief,
)
def test_no_beginning_of_a_request_is_a_request_or_refused(data):
    for size in range(len(data)):
        assert parse(data[:size]) == []
    assert [request.path for request in parse(data * 3)] == ["/a"] * 3
    assert parse(*bytewise(data * 3)) == parse(data * 3)


@pytest.mark.parametrize(
    "line, words",
    [
        (b"CONNECT h:80 HTTP/1.1", "no proxy"),
        (b"CONNECT http://h:port HTTP/1.1", "no proxy"),
        (b"GET http://user@g/a HTTP/1.1", "well-formed host"),
        (b"GET http:///a HTTP/1.1", "well-formed host"),
        (b"GET http://a b/ HTTP/1.1", "well-formed host"),
        (b"GET http://[::1/a HTTP/1.1", "well-formed host"),
        (b"GET ftp://g/a HTTP/1.1", "well-formed host"),
        (b"GET a HTTP/1.1", "slash"),
        (b"GET * HTTP/1.1", "slash"),
        (b"GET /%zz HTTP/1.1", "percent-encoded"),
        (b"GET /%ff HTTP/1.1", "percent-encoded"),
        (b"hello", "GET /healthz HTTP/1.1"),
    ],
    ids=brief,
)
def test_a_request_line_is_refused_with_a_sentence_that_fits(line, words):
    with pytest.raises(HTTPError) as refusal:
        taskserver.parse_head(line + b"\r\nHost: h")
    assert refusal.value.status == 400
    assert words in json.loads(refusal.value.response.body.decode())["error"]


@pytest.mark.parametrize("begin, rest", [("http://", "a"), ("http://a:", "1"), ("/", "a")])
def test_the_time_for_a_request_line_does_not_grow_with_the_square_of_its_length(begin, rest):
    code = """
import sys, taskserver
taskserver.MAX_LINE = 10**7
try:
    taskserver.parse_request_line(b"GET " + sys.stdin.buffer.read() + b" HTTP/1.x")
except taskserver.HTTPError as refusal:
    print(refusal.status)
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        input=(begin + rest * 10**6).encode(),
        stdout=subprocess.PIPE,
        cwd=str(PROGRAM.parent),
        timeout=LONG,  # it would take an hour
        check=True,
    )
    assert out.stdout.split() == [b"400"]


def test_a_body_of_many_small_chunks_lets_others_have_their_turn():
    chunks = 10 * taskserver.CHUNKS_PER_TURN
    buffer = bytearray(b"1\r\nx\r\n" * chunks + b"0\r\n\r\n")
    left = len(buffer)
    steps = taskserver.read_body(taskserver.Fields(chunked=True), buffer)
    with pytest.raises(StopIteration) as end:
        while True:
            assert next(steps) is taskserver.BODY_TURN
            assert left - len(buffer) <= 6 * taskserver.CHUNKS_PER_TURN
            left = len(buffer)
    assert end.value.value == b"x" * chunks


def test_a_body_has_a_bounded_number_of_bytes_of_extensions():
    def chunks(extension, count):
        return posted(b"1;%s\r\nx\r\n" % extension * count + b"0\r\n\r\n", CHUNKED)

    one = b"a=" + b"b" * 509  # with the semicolon, 512 bytes
    (whole,) = parse(chunks(one, 8))
    assert whole.body == b"x" * 8
    assert parse(chunks(one, 9)) == [400]
    assert parse(chunks(b"a", 3000), *[b""] * 100) == [400]  # it takes turns


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_that_is_dropped_takes_no_memory_and_the_next_request_follows(chunked):
    size, buffer = 1 << 20, bytearray()
    fields = taskserver.Fields(chunked=True) if chunked else taskserver.Fields(length=size)
    body = b"x" * size
    if chunked:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (size, body)
    body += b"GET /next"
    steps = taskserver.read_body(fields, buffer, is_dropped=True)
    assert next(steps) is taskserver.BODY
    with pytest.raises(StopIteration) as end:
        for start in range(0, len(body), 10_000):
            buffer += body[start : start + 10_000]
            assert next(steps) is taskserver.BODY
            assert len(buffer) < 10_000
    assert end.value.value == b"" and buffer == b"GET /next"


class Scanned(bytearray):
    """A buffer that counts the bytes which are looked at in it."""

    looked_at = 0

    def find(self, what, start=0, end=None):
        self.looked_at += max(0, min(len(self), len(self) if end is None else end) - start)
        return super().find(what, start, len(self) if end is None else end)

    def __getitem__(self, index):
        taken = super().__getitem__(index)
        self.looked_at += len(taken) if isinstance(index, slice) else 1
        return taken


class ScannedPattern:
    """A regular expression that adds to the same count."""

    def __init__(self, pattern):
        self.pattern = pattern

    def search(self, buffer, start=0, end=None):
        end = len(buffer) if end is None else end
        buffer.looked_at += max(0, end - start)
        return self.pattern.search(buffer, start, end)


@pytest.mark.parametrize(
    "data",
    [
        get(*[b"A: x" + b"x" * 150] * 95),
        b"GET /" + b"x" * 8000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
        posted(b"0\r\n" + b"\r\n".join([b"A: x" + b"x" * 150] * 95) + b"\r\n\r\n", CHUNKED),
        posted(b"0\r\nA: " + b"x" * 8000 + b"\r\n\r\n", CHUNKED),
        posted(b"0" * 1000 + b"\r\n\r\n", CHUNKED),
        b"\r\n" * 8000 + get(),
    ],
    ids=["headers", "request line", "trailers", "long trailer", "chunk line", "empty lines"],
)
def test_what_comes_byte_by_byte_is_looked_at_once(data, monkeypatch):
    monkeypatch.setattr(taskserver, "_FORBIDDEN", ScannedPattern(taskserver._FORBIDDEN))
    buffer = Scanned()
    coroutine = reading(buffer)
    with pytest.raises(StopIteration) as end:
        for piece in bytewise(data):
            buffer += piece
            next(coroutine)
    assert end.value.value.path.startswith("/")
    assert buffer.looked_at < 20 * len(data)  # not half its square


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


@pytest.mark.parametrize(
    "make, limit, status",
    [
        (lambda n: sized(n, b"GET /", b" HTTP/1.1") + b"\r\nHost: h\r\n\r\n", 8192, 414),
        (
            lambda n: sized(n, b"GET /", b"") + b"\r\nHost: h\r\n\r\n" if n > 8192 else get(),
            8192,
            414,
        ),
        (lambda n: b"\r\n" * n + get(), 8192, 431),
        (lambda n: get(sized(n, b"A: ")), 8192, 431),
        (lambda n: get(*many_headers(n)), 16_384, 431),
        (lambda n: b"GET /" + b"x" * 8178 + get(*many_headers(n))[6:], 16_384, 431),
        (lambda n: get(*[b"A: x"] * (n - 1)), 100, 431),
        (lambda n: posted(b"x" * n, b"Content-Length: %d" % n), MIB, 413),
        (lambda n: posted(b"%x\r\n" % n + b"x" * n + b"\r\n0\r\n\r\n", CHUNKED), MIB, 413),
        (
            lambda n: posted(
                b"8\r\n12345678\r\n%x\r\n" % (n - 8) + b"x" * (n - 8) + b"\r\n0\r\n\r\n", CHUNKED
            ),
            MIB,
            413,
        ),
        (lambda n: posted(sized(n, b"1;") + b"\r\nx\r\n0\r\n\r\n", CHUNKED), 1022, 400),
        (lambda n: posted(b"0\r\n" + b"\r\n".join([b"A: x"] * n) + b"\r\n\r\n", CHUNKED), 100, 431),
        (lambda n: posted(b"0\r\n" + sized(n, b"A: ") + b"\r\n\r\n", CHUNKED), 8192, 431),
    ],
    ids=[
        "request line",
        "request line without end",
        "empty lines",
        "header",
        "headers",
        "headers after the longest line",
        "count",
        "body",
        "chunk",
        "chunks",
        "chunk line",
        "count of trailers",
        "trailer",
    ],
)
def test_each_limit_is_kept_to_the_byte_however_the_bytes_arrive(make, limit, status):
    for n, expected in (limit, "request"), (limit + 1, status):
        data = make(n)
        head, tail = data[:-40], data[-40:]
        for pieces in (
            [data],
            [head, *bytewise(tail)],
            [data[i : i + 997] for i in range(0, len(data), 997)],
        ):
            (got,) = parse(*pieces)
            assert ("request" if isinstance(got, Request) else got) == expected, (n, len(pieces))


@pytest.mark.parametrize(
    "data, status",
    [
        (b"G" * 8194, 414),
        (b"GET /a HTTP/2.0\r\n", 505),
        (b"GET /a\r\n", 400),
        (b"GET /a HTTP/1.1\r\n" + b"A: x\r\n" * 3000, 431),
        (b"GET /a HTTP/1.1\r\nA:" + b"x" * 17_000, 431),
        (b"GET /\0", 400),
        (posted(b"", b"Content-Length: 1048577", b"Expect: 100-continue"), 413),
        (posted(b"1;" + b"x" * 1100, CHUNKED), 400),
        (posted(b"0\r\nA:" + b"x" * 17_000, CHUNKED), 431),
    ],
    ids=brief,
)
def test_what_is_wrong_already_is_refused_before_its_end(data, status):
    assert parse(data) == [status]


SEEDS = [
    get(b"Accept: */*"),
    get(b"Connection: close"),
    b"GET http://h:80/%41?a=%42 HTTP/1.1\r\nHost: [::1]\r\n\r\n",
    posted(b'{"name": "x"}', b"Content-Length: 13", b"Content-Type: application/json"),
    posted(b"3;a=b\r\nabc\r\n0\r\nT: x\r\n\r\n", CHUNKED),
    posted(b"", b"Content-Length: 0", b"Expect: 100-continue"),
    b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
]
GRAINS = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b";",
    b",",
    b"%",
    b"%00",
    b"/",
    b"?",
    b"#",
    b"*",
    b"0",
    b"9" * 20,
    b"-1",
    b"\xff",
    b"\x80",
    b"HTTP/1.1",
    b"HTTP/9.9",
    b"Host: h\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 99999999\r\n",
    CHUNKED + b"\r\n",
    b"Transfer-Encoding: gzip\r\n",
    b"Expect: x\r\n",
    b"x" * 9000,
    b"A: x\r\n" * 120,
    b"0\r\n\r\n",
]
REFUSALS = {400, 411, 413, 414, 417, 431, 501, 505}


def mutated(seed):
    chance = random.Random(seed)
    data = b"".join(chance.choice(SEEDS) for _ in range(chance.randint(1, 3)))
    for _ in range(chance.randint(1, 4)):
        i = chance.randrange(len(data) + 1)
        k = i + chance.choice([0, 0, 1, 2, 10])
        data = (
            data[:i]
            + chance.choice([*GRAINS, b"", data[i:k] * 2, bytes([chance.randrange(256)])])
            + data[k:]
        )
    return data


def test_mutated_requests_are_taken_or_refused_the_same_however_they_arrive():
    refused = 0
    for seed in range(4000):
        data, chance = mutated(seed), random.Random(seed)
        whole = parse(data)
        cuts = sorted(chance.sample(range(len(data) + 1), min(len(data), chance.randint(1, 30))))
        pieces = [data[i:k] for i, k in zip([0, *cuts], [*cuts, len(data)])]
        again = parse(*pieces)
        assert [r for r in whole if isinstance(r, Request)] == [
            r for r in again if isinstance(r, Request)
        ], data
        for out in whole, again:
            assert all(isinstance(r, Request) for r in out[:-1]), data
            assert all(isinstance(r, Request) or r in REFUSALS for r in out), (data, out)
        assert whole[-1:] == again[-1:] or {
            *map(type, (whole + [0])[-1:] + (again + [0])[-1:])
        } == {int}, data
        refused += bool(whole) and not isinstance(whole[-1], Request)
    assert 1000 < refused < 3900


# Answers over a socket


class WatchedServer(taskserver.Server):
    """A server that knows which sockets its connections had."""

    def __init__(self, application, tls=None):
        self.sockets = []
        self.errors = []  # raised in their turn instead of accepting
        super().__init__(("127.0.0.1", 0), application, tls)

    def get_request(self):
        if self.errors:
            raise self.errors.pop(0)
        sock, address = super().get_request()
        self.sockets.append(sock)
        return sock, address

    def open_connections(self):
        return sum(sock.fileno() >= 0 for sock in self.sockets)

    def client(self, **options):
        return Client(self.server_port, **options)


@contextlib.contextmanager
def serving(application, tls=None, poll_interval=0.02):
    """Serve an application in a thread of this process."""
    server = WatchedServer(application, tls)
    thread = threading.Thread(target=server.serve_forever, args=(poll_interval,), daemon=True)
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
        for method, target, body in [
            ("GET", "/healthz", b""),
            ("POST", "/create-echo", {"name": "x"}),
            ("PUT", "/", b""),
            ("GET", "/x", b""),
            ("OPTIONS", "/", b""),
            ("HEAD", "/", b""),
            ("POST", "/create-echo", b""),
            ("GET", "/%zz", b""),
        ]:
            answer = client.ask(method, target, body)
            assert (
                answer.headers["Cache-Control"] == "no-store"
                and answer.headers["X-Content-Type-Options"] == "nosniff"
            )
            assert re.fullmatch(
                r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", answer.headers["Date"]
            )
            assert (answer.headers["Content-Length"] is None) == (answer.status == 204)
            if answer.status >= 400:
                assert (
                    list(answer.json) == ["error"]
                    and answer.headers["Content-Type"] == "application/json"
                )
        assert answer.status == 400 and answer.headers["Connection"] == "close" and client.ended()


def test_head_is_answered_like_get_without_the_body(server):
    with server.client() as client:
        for target in (
            "/",
            "/healthz",
            "/openapi.json",
            "/tasks",
            f"/poll-echo/{uuid.uuid4()}",
            "/x",
        ):
            got, head = client.ask("GET", target), client.ask("HEAD", target)
            assert head.status == got.status
            assert {k: v for k, v in head.headers.items() if k != "Date"} == {
                k: v for k, v in got.headers.items() if k != "Date"
            }


def test_pipelined_requests_are_answered_in_their_order(server, gate):
    with server.client() as client, server.client() as other:
        first = client.ask("POST", "/create-gate", {"name": "x"}).json
        path = f"/poll-gate/{first['id']}"
        sent = [raw("GET", path + "?wait=30")]
        for n in range(30):
            sent += [
                raw("POST", "/create-echo", {"name": str(n)}),
                raw("GET", "/tasks?limit=1"),
                raw("GET", f"/{n}"),
            ]
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


@pytest.mark.parametrize(
    "version, lines, stays",
    [
        ("1.1", [], True),
        ("1.1", ["Connection: keep-alive"], True),
        ("1.1", ["Connection: x, CLOSE"], False),
        ("1.1", ["Connection: x", "Connection: close"], False),
        ("1.1", ["Connection: closed"], True),
        ("1.0", [], False),
        ("1.0", ["Connection: Keep-Alive"], True),
        ("1.0", ["Connection: keep-alive, close"], False),
    ],
)
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
        client.send(
            raw("POST", "/create-echo", b"", "Expect: 100-continue", CHUNKED.decode()).replace(
                b"Content-Length: 0\r\n", b""
            )
        )
        assert client.answer().status == 100
        client.send(b"d\r\n" + body + b"\r\n0\r\n\r\n")
        assert client.answer().status == 201


@pytest.mark.parametrize(
    "target, lines, version, status",
    [
        ("/nowhere", [], "1.1", 404),
        ("/healthz", [], "1.1", 405),
        ("/create-echo", ["Content-Encoding: gzip"], "1.1", 415),
        ("/create-echo", ["Content-Length: 9"], "1.1", 400),
        ("/create-echo", [], "1.0", None),
    ],
)
def test_no_100_continue_for_what_is_refused_nor_to_http_1_0(
    server, target, lines, version, status
):
    body = b'{"name": "x"}'
    with server.client() as client:
        client.send(
            raw("POST", target, body, "Expect: 100-continue", *lines, version=version)[: -len(body)]
        )
        if status is None:
            assert not client.says(0.1)
            client.send(body)
        assert client.answer().status == (status or 201)
        assert client.send(get()).ended()  # the body that was not sent is never taken for a request


def test_a_body_is_never_taken_for_a_request(server):
    inner = raw("POST", "/create-echo", {"name": "smuggled"})
    with server.client() as client:
        for method, target, status in (
            ("GET", "/healthz", 200),
            ("PUT", "/nowhere", 404),
            ("DELETE", "/healthz", 405),
        ):
            client.send(raw(method, target, b"", f"Content-Length: {len(inner)}") + inner)
            assert client.answer().status == status
        assert client.ask("GET", "/tasks").json == {"tasks": []}
    for lines in (
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 0", "Content-Length: 5"],
        ["Transfer-Encoding: x"],
    ):
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


@pytest.mark.parametrize(
    "head, status",
    [
        (b"POST /create-echo HTTP/1.1\r\nHost: h\r\nContent-Length: 50000000\r\n\r\n", 413),
        (b"POST /create-echo HTTP/1.1\r\nHost: h\r\n" + CHUNKED + b"\r\n\r\n2faf080\r\n", 413),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n", 414),
        (b"nonsense\r\n\r\n", 400),
    ],
    ids=brief,
)
def test_a_client_gets_its_refusal_even_when_it_is_still_sending(server, head, status):
    with server.client() as client:
        client.send(head)
        for _ in range(160):  # more than the buffers of both ends hold
            client.send(b"x" * 65_536)
        answer = client.answer()
        assert answer.status == status and answer.headers["Connection"] == "close"
        assert client.ended()


def test_many_requests_at_once_leave_others_their_turn(server, application):
    seen = []
    with server.client() as pipelining, server.client() as other:

        def mark(asked):
            if not seen:
                other.send(raw("GET", "/mark?other"))
            seen.append(asked.query)
            return Response(200)

        application.router.add("GET", "/mark", mark, blocks=taskserver.never_blocks)
        pipelining.send(raw("GET", "/mark?many") * 100)
        assert other.answer().status == 200
        assert [pipelining.answer().status for _ in range(100)] == [200] * 100
    assert seen.index("other") < 50


def test_a_head_that_is_refused_is_answered_without_content(server):
    for request in (b"HEAD / HTTP/1.1\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n"):
        with server.client() as client:
            client.send(request)
            answer = client.answer("HEAD")
            assert answer.status == 400 and int(answer.headers["Content-Length"]) > 0
            assert client.ended()


def test_a_length_is_asked_for_by_create_alone(server):
    with server.client() as client:
        for target, status in [
            ("/nowhere", 404),
            ("/healthz", 405),
            (f"/cancel-echo/{uuid.uuid4()}", 404),
        ]:
            client.send(f"POST {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert client.answer().status == status
        client.send(b"POST /create-echo HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.answer().status == 411
        assert client.ended()


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


# Slow and silent clients


def patient(monkeypatch, **seconds):
    """Shorten the time that a phase of a connection may take."""
    for name, value in seconds.items():
        phase = getattr(taskserver, name.upper())
        monkeypatch.setattr(taskserver, name.upper(), phase._replace(seconds=value))


def test_the_phases_have_the_agreed_seconds():
    agreed = {"header": 10, "body": 20, "answer": 20, "idle": 75}
    assert {name: getattr(taskserver, name.upper()).seconds for name in agreed} == agreed


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /healthz HTTP/1.1\r\nA: ",
        (
            b"POST /create-echo HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100000\r\n\r\n"
        ),
        b"POST /create-echo HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        + CHUNKED
        + b"\r\n\r\n5000\r\n",
    ],
    ids=["header", "body", "chunked body"],
)
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
        assert eventually(lambda: server.open_connections() == 1) and eventually(
            lambda: server.open_connections() == 0
        )
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
    whole = [
        raw("GET", f"/poll-gate/{record['id']}?wait=30"),
        raw("POST", "/create-echo", {"name": "x"}),
        raw("GET", "/") * 50,
    ]
    chance = random.Random(5)
    for n in range(150):
        client = server.client()
        data = whole[n % 3]
        client.send(data if n % 2 else data[: chance.randrange(len(data))])
        client.vanish() if n % 4 < 2 else client.__exit__()
    application.store.stop()
    with server.client() as client:
        assert client.ask("GET", "/healthz").status == 503
    # A system may drop a connection that is reset before it is accepted; the others are seen.
    assert eventually(lambda: len(server.sockets) > 75 and server.open_connections() == 0)
    assert "Traceback" not in caplog.text


def test_a_connection_that_waits_keeps_no_answer_and_no_request(server, application):
    tracemalloc = pytest.importorskip("tracemalloc")
    record = final(application, create(application, "echo", result="x" * (MIB - 2)))
    asked = (
        raw("GET", f"/poll-echo/{record['id']}"),
        raw("POST", "/create-echo", {"name": "x", "more": "x" * (MIB - 100)}),
    )
    tracemalloc.start()
    try:
        with contextlib.ExitStack() as stack:
            for n in range(20):
                assert stack.enter_context(server.client()).send(asked[n % 2]).answer().status in (
                    200,
                    201,
                )
            assert eventually(lambda: tracemalloc.get_traced_memory()[0] < 5 * MIB)
    finally:
        tracemalloc.stop()


def test_empty_lines_between_requests_leave_a_connection_idle(server, monkeypatch):
    patient(monkeypatch, header=0.05)
    with server.client() as client, server.client() as other:
        client.send(b"\r\n")
        other.send(raw("GET", "/healthz") + b"\r")
        assert other.answer().status == 200
        assert not client.says(0.3)  # no 408
        assert not other.says(0)
        client.send(b"\r\n\r\n" + raw("GET", "/healthz") + b"\r\n\r\n")
        other.send(b"\n\r\n" + raw("GET", "/healthz"))
        assert client.answer().status == other.answer().status == 200
        assert not client.says(0.3)
        client.send(b"G")
        assert client.answer().status == 408


def test_who_sends_nothing_but_empty_lines_is_closed_as_idle_ones_are(server, monkeypatch):
    patient(monkeypatch, idle=0.3)
    with server.client() as client:
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while not client.says(0.02):
                client.send(b"\r\n")
                assert time.monotonic() - begun < LONG
        assert client.ended()


# Answers that come later


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


def test_small_chunks_give_a_body_no_more_time(server, monkeypatch):
    monkeypatch.setattr(taskserver, "BODY", taskserver.BODY._replace(seconds=0.3))
    with server.client() as client:
        head = raw("POST", "/create-echo", b"", "Transfer-Encoding: chunked")
        client.send(head.replace(b"Content-Length: 0\r\n", b""))
        deadline = time.monotonic() + LONG
        while not client.says(0.02):
            client.send(b"1\r\n \r\n" * taskserver.CHUNKS_PER_TURN)
            assert time.monotonic() < deadline
        assert client.answer().status == 408


def test_a_request_that_waits_for_its_turn_when_the_server_ends_is_answered(server, application):
    has_begun = threading.Event()
    wake = server._waker.wake

    def wake_and_tell():  # shutdown() calls it when all is set
        wake()
        has_begun.set()

    def end(request):
        server._waker.wake = wake_and_tell
        threading.Thread(target=server.shutdown, args=(LONG,)).start()
        assert has_begun.wait(LONG)
        return Response(200)

    application.router.add("GET", "/end", end, blocks=taskserver.never_blocks)
    with server.client() as client:
        client.send(2 * raw("GET", "/end"))
        assert client.answer().status == 200
        last = client.answer()
        assert (last.status, last.headers["Connection"]) == (200, "close")
        assert client.ended()


class Bell:
    """An endpoint whose answer comes later: when it is rung, or after some seconds."""

    def __init__(self):
        self.seconds = 10 * LONG
        self.raises = None  # by unwatch()
        self.wakes = []  # what rings, of each that has waited
        self.waiting = threading.Semaphore(0)  # released when one waits
        self.left = threading.Semaphore(0)  # released when one waits no more

    def __call__(self, request):
        return taskserver.Later(self.seconds, self.watch, self.unwatch, self.answer)

    def watch(self, wake):
        self.wakes.append(wake)
        self.waiting.release()

    def unwatch(self, wake):
        assert wake in self.wakes
        self.left.release()
        if self.raises is not None:
            raise self.raises

    def answer(self):
        return Response(200, b'"rung"')

    def await_waiting(self, n=1):
        """Wait until so many more wait."""
        for _ in range(n):
            assert self.waiting.acquire(timeout=LONG)

    def await_left(self, n=1):
        """Wait until so many more wait no longer."""
        for _ in range(n):
            assert self.left.acquire(timeout=LONG)


@pytest.fixture
def bell(application):
    """What GET /bell waits for."""
    bell = Bell()
    application.router.add("GET", "/bell", bell, blocks=taskserver.never_blocks)
    return bell


@pytest.mark.parametrize("raised", [ValueError("no"), OSError("no"), SystemExit(3)], ids=brief)
def test_a_wait_that_ends_with_an_exception_ends_its_connection_alone(server, bell, raised):
    bell.raises = raised
    with server.client() as client, server.client() as other:
        for one in client, other:
            one.send(raw("GET", "/bell"))
            bell.await_waiting()
        other.vanish()
        bell.await_left()
        bell.wakes[0]()
        assert client.ended()
    with server.client() as client:
        assert client.ask("OPTIONS", "*").status == 204


@pytest.fixture(params=["plain", "TLS"])
def either(request, application):
    """A server with or without TLS; `connect()` makes a client of it."""
    if request.param == "plain":
        with serving(application) as server:
            server.connect = server.client
            yield server
    else:
        tls = request.getfixturevalue("tls")

        def connect():
            client = tls.tls_client()
            client.ask("OPTIONS", "/")  # the tickets of the session come before the first answer
            return client

        tls.connect = connect
        yield tls


def pass_through_the_loop(client):
    """Return when the server has done all that was to do before."""
    for _ in range(2):  # the first may be answered in the round that has yet to do it
        assert client.ask("OPTIONS", "/").status == 204


def test_an_answer_that_comes_later_comes_once_however_often_it_is_rung(either, bell):
    with either.connect() as client, either.connect() as other:
        client.send(raw("GET", "/bell"))
        bell.await_waiting()
        pass_through_the_loop(other)
        assert not client.says(0)
        in_threads(5, lambda n: bell.wakes[0]())
        assert client.answer().json == "rung"
        bell.await_left()
        pass_through_the_loop(other)
        assert not client.says(0)
        assert client.ask("GET", "/healthz").status == 200


def test_a_wake_that_comes_late_wakes_no_later_wait(either, bell):
    with either.connect() as client, either.connect() as other:
        client.send(raw("GET", "/bell"))
        bell.await_waiting()
        bell.wakes[0]()
        assert client.answer().json == "rung"
        client.send(raw("GET", "/bell"))
        bell.await_waiting()
        bell.wakes[0]()
        pass_through_the_loop(other)
        assert not client.says(0)
        bell.wakes[1]()
        assert client.answer().json == "rung"


def test_what_is_due_at_once_or_after_its_seconds_is_not_rung(server, bell, monkeypatch):
    monkeypatch.setattr(bell, "watch", lambda wake: (bell.wakes.append(wake), wake(), wake()))
    with server.client() as client:
        assert [client.ask("GET", "/bell").json for _ in range(3)] == ["rung"] * 3
    monkeypatch.undo()
    bell.seconds = 0.01
    with server.client() as client:
        assert [client.ask("GET", "/bell").json for _ in range(3)] == ["rung"] * 3
    bell.await_left(6)


def test_requests_behind_one_that_waits_are_answered_after_it(either, bell):
    with either.connect() as client, either.connect() as other:
        client.send(raw("GET", "/bell") + raw("GET", "/healthz") + raw("GET", "/bell")[:9])
        bell.await_waiting()
        client.send(raw("GET", "/bell")[9:] + raw("GET", "/nowhere"))
        pass_through_the_loop(other)
        assert not client.says(0)
        bell.wakes[0]()
        assert client.answer().json == "rung"
        assert client.answer().json["status"] == "ok"
        bell.await_waiting()
        pass_through_the_loop(other)
        assert not client.says(0)
        bell.wakes[1]()
        assert [client.answer().status for _ in range(2)] == [200, 404]


def test_more_than_is_read_ahead_behind_one_that_waits_is_answered_too(either, bell):
    sent = raw("POST", "/create-echo", {"name": "x", "more": "x" * 900_000})
    with either.connect() as client:
        client.send(raw("GET", "/bell"))
        bell.await_waiting()

        is_sent = threading.Event()

        def takes_more():
            return select.select([], [client.socket], [], 0)[1]

        def ring_when_no_more_is_taken():
            eventually(lambda: is_sent.is_set() or not takes_more())
            bell.wakes[0]()

        # One thread sends and receives, for a TLS session is not for two.
        ringer = threading.Thread(target=ring_when_no_more_is_taken, daemon=True)
        ringer.start()
        client.send(sent * 3)
        is_sent.set()
        ringer.join(LONG)
        assert [client.answer().status for _ in range(4)] == [200, 201, 201, 201]


def test_who_sends_more_and_more_behind_a_wait_that_is_over_stops_no_clock(server, gate):
    with server.client() as dribbler, server.client() as other:
        record = other.ask("POST", "/create-gate", {"name": "x"}).json
        path = f"/poll-gate/{record['id']}"
        dribbler.send(raw("GET", f"{path}?wait=0.001") + b"POST /create-echo HTTP/1.1\r\nX: ")
        is_answered = threading.Event()

        def dribble():
            for _ in range(16_000):
                dribbler.send(b"x")
                if is_answered.wait(0.002):
                    return

        sender = threading.Thread(target=dribble, daemon=True)
        sender.start()
        assert other.ask("GET", f"{path}?wait=0.1").json["status"] == "pending"
        is_answered.set()
        sender.join(LONG)


@pytest.mark.parametrize("how", ["closes", "vanishes"])
def test_who_waits_is_freed_at_once_when_its_client_goes(either, bell, how):
    clients = [either.connect() for _ in range(5)]
    for client in clients:
        client.send(raw("GET", "/bell"))
    bell.await_waiting(5)
    for client in clients:
        client.vanish() if how == "vanishes" else client.__exit__()
    bell.await_left(5)
    assert eventually(lambda: either.open_connections() == 0)


def test_who_ends_its_sending_side_gets_the_record_as_it_is_now(server, bell, gate):
    with server.client() as client:
        record = client.ask("POST", "/create-gate", {"name": "x"}).json
        gate.wait_for()
        client.send(raw("GET", f"/poll-gate/{record['id']}?wait=30") + raw("GET", "/bell"))
        client.send(raw("GET", "/nowhere"))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.answer().json["status"] == "pending"
        assert client.answer().json == "rung"
        assert client.answer().status == 404
        assert client.ended()
    assert eventually(lambda: server.open_connections() == 0)


def test_over_tls_who_ends_its_sending_side_gets_the_answer_as_it_is_now(tls, bell):
    import ssl

    with tls.client() as client:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = tls.client_context.wrap_bio(incoming, outgoing, server_hostname="localhost")

        def do(step, *arguments):
            """Take a step of TLS, whose bytes go over the socket."""
            while True:
                try:
                    result = step(*arguments)
                    break
                except ssl.SSLWantReadError:
                    client.send(outgoing.read())
                    incoming.write(client.socket.recv(65_536))
            client.send(outgoing.read())
            return result

        do(session.do_handshake)
        do(session.write, raw("GET", "/bell") * 2)
        bell.await_waiting()
        with contextlib.suppress(ssl.SSLWantReadError):
            session.unwrap()  # says that nothing more comes, and would wait for the same
        client.send(outgoing.read())
        received = b""
        while received.count(b'"rung"') < 2:
            received += do(session.read, 65_536)
        bell.await_left()
        while client.socket.recv(65_536):  # the connection ends, though this side is open
            pass
    assert eventually(lambda: tls.open_connections() == 0)


def test_who_waits_is_answered_when_the_server_shuts_down(application, bell):
    with serving(application) as server, server.client() as client:
        client.send(raw("GET", "/bell") + raw("GET", "/bell"))
        bell.await_waiting()
        server.shutdown(LONG)
        answer = client.answer()
        assert answer.json == "rung"
        assert answer.headers["Connection"] == "close"
        assert client.ended()
        bell.await_left()


def test_two_hundred_that_wait_have_no_thread_and_all_are_woken(server, application, gate):
    waiting = threading.Semaphore(0)
    watch = application.store.watch

    def watch_and_tell(id, wake):
        watch(id, wake)
        waiting.release()

    application.store.watch = watch_and_tell
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(server.client())
        record = client.ask("POST", "/create-gate", {"name": "x"}).json
        gate.wait_for()
        polls = [stack.enter_context(server.client()) for _ in range(200)]
        threads = set(threading.enumerate())
        for poll in polls:
            poll.send(raw("GET", f"/poll-gate/{record['id']}?wait=30"))
        for _ in polls:
            assert waiting.acquire(timeout=LONG)
        assert set(threading.enumerate()) <= threads
        gate.opened.set()
        assert {poll.answer().json["status"] for poll in polls} == {"completed"}


def test_others_are_answered_while_many_are_woken(server, application, bell, monkeypatch):
    monkeypatch.setattr(taskserver.Server, "RESUMED_PER_ROUND", 5)
    order = []
    rung, asked = threading.Event(), threading.Event()

    def ring(request):
        for wake in bell.wakes:
            wake()
        rung.set()
        assert asked.wait(LONG)  # the loop is held up until another has asked something
        return Response(200)

    def note(request):
        order.append("asked")
        return Response(200)

    monkeypatch.setattr(bell, "answer", lambda: (order.append("rung"), Response(200))[1])
    application.router.add("GET", "/ring", ring, blocks=taskserver.never_blocks)
    application.router.add("GET", "/note", note, blocks=taskserver.never_blocks)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(50)]
        for client in clients:
            client.send(raw("GET", "/bell"))
        bell.await_waiting(50)
        ringer, other = [stack.enter_context(server.client()) for _ in range(2)]
        pass_through_the_loop(other)
        ringer.send(raw("GET", "/ring"))
        assert rung.wait(LONG)
        other.send(raw("GET", "/note"))
        asked.set()
        assert {client.answer().status for client in [*clients, ringer, other]} == {200}
    assert order.count("rung") == 50
    assert order.index("asked") <= 10


@pytest.mark.parametrize("faulty", ["watch", "unwatch", "answer"])
def test_a_fault_of_what_waits_harms_that_connection_alone(server, bell, faulty, caplog):
    def fail_at_once(*arguments):
        bell.waiting.release()
        raise ValueError("a fault of the endpoint's")

    setattr(bell, faulty, fail_at_once)
    bell.seconds = 0.01
    with server.client() as client, server.client() as other:
        client.send(raw("GET", "/bell"))
        if faulty == "answer":
            assert client.answer().status == 500
        else:
            assert client.ended()
        leaving = server.client()
        bell.seconds = 10 * LONG
        leaving.send(raw("GET", "/bell"))
        bell.await_waiting()
        leaving.__exit__()
        assert other.ask("GET", "/healthz").status == 200
    assert eventually(lambda: server.open_connections() == 0)
    assert "a fault of the endpoint's" in caplog.text


def test_a_refusal_that_comes_later_is_a_refusal(server, bell):
    def refuse():
        raise HTTPError(503, "Try again.", ("Retry-After", "5"))

    bell.seconds, bell.answer = 0.01, refuse
    with server.client() as client:
        answer = client.ask("GET", "/bell")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        assert client.ask("GET", "/healthz").status == 200


class MetTwice(collections.deque):
    """A queue in which two threads are always together before one goes on."""

    def __init__(self):
        super().__init__()
        self.barrier = threading.Barrier(2)

    def append(self, item):
        super().append(item)
        with contextlib.suppress(threading.BrokenBarrierError):
            self.barrier.wait(LONG)
            self.barrier.abort()  # the two have met; nobody waits from now on


def test_two_answers_that_are_ready_in_one_moment_wake_the_loop(application, bell, monkeypatch):
    patient(monkeypatch, header=10 * LONG, idle=10 * LONG)  # so that nothing else wakes it
    with serving(application, poll_interval=10 * LONG) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(2)]
        for client in clients:
            client.send(raw("GET", "/bell"))
        bell.await_waiting(2)
        pass_through_the_loop(stack.enter_context(server.client()))
        server._due = MetTwice()
        in_threads(2, lambda n: bell.wakes[n]())
        assert [client.answer().json for client in clients] == ["rung"] * 2


def test_a_request_is_judged_once_however_it_is_answered(server, application, bell):
    seen, routed = [], []
    bell.seconds = 0.01
    application.checks.append(lambda request: seen.append(request.path))
    application.router.add(
        "POST",
        "/odd",
        lambda request: Response(200),
        check=lambda request: routed.append(request.path),
    )
    body = b'{"name": "x"}'
    awaited = raw("POST", "/create-echo", body, "Expect: 100-continue")[: -len(body)]
    asked = 0
    with server.client() as client:
        for method, target, sent in [
            ("GET", "/healthz", b""),
            ("HEAD", "/healthz", b""),
            ("OPTIONS", "/", b""),
            ("GET", "/tasks", b""),  # in a thread
            ("GET", "/bell", b""),  # later
            ("POST", "/create-echo", body),
            ("POST", "/create-echo", b'{"name": "x", "more": "%s"}' % (b"x" * 100_000)),
            ("POST", "/odd", body),
            ("GET", "/nowhere", b""),
            ("PUT", "/healthz", b""),
        ]:
            client.ask(method, target, sent)
            asked += 1
            assert len(seen) == asked, (method, target)
        client.send(awaited)
        assert client.answer().status == 100
        client.send(body)
        assert client.answer().status == 201
        assert len(seen) == asked + 1
        for byte in bytewise(raw("POST", "/odd", body)):
            client.send(byte)
        assert client.answer().status == 200
        assert len(seen) == asked + 2
    assert routed == ["/odd"] * 2


# Many clients, and too few descriptors or threads


def test_a_burst_of_300_clients_is_answered(server):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(300)]
        for client in clients:
            client.send(raw("POST", "/create-echo", {"name": "x"}))
        ids = {client.answer().json["id"] for client in clients}
        assert len(ids) == 300
    assert eventually(lambda: server.open_connections() == 0)


def test_no_thread_for_a_request_delays_it_and_harms_nobody(server, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with server.client() as client, server.client() as other:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            client.send(raw("GET", "/tasks"))
            pass_through_the_loop(other)
            assert not client.says(0)
        assert client.answer().json == {"tasks": []}


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
            fields = (
                pathlib.Path(f"/proc/{program.process.pid}/stat")
                .read_text()
                .rsplit(")", 1)[1]
                .split()
            )
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = burnt()
        assert not select.select(
            [client.socket for client in clients if client not in served], [], [], 0.7
        )[0]
        assert burnt() - before < 0.2
        for client in served:
            client.__exit__()
        for client in clients:
            if client not in served:
                assert client.answer().status == 200
                client.__exit__()
        assert program.ask("GET", "/healthz").status == 200
        assert program.log().count("have to wait") == 1


WANT = ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"]
GONE = ["ECONNABORTED", "ECONNRESET", "EPROTO", "ENETDOWN", "EHOSTUNREACH", "EPERM", "EINVAL"]


@pytest.mark.parametrize("name", [name for name in GONE if hasattr(errno, name)])
def test_a_client_that_goes_before_it_is_accepted_holds_up_nobody(application, caplog, name):
    with serving(
        application, poll_interval=10 * LONG
    ) as server, server.client() as idle, server.client() as client:
        assert idle.ask("GET", "/healthz").status == 200
        server.errors += [OSError(getattr(errno, name), "gone")] * 3
        assert client.ask("GET", "/healthz").status == 200
        with server.client() as other:
            assert other.ask("GET", "/healthz").status == 200
        assert not server.errors
        assert idle.ask("GET", "/healthz").status == 200
    assert "have to wait" not in caplog.text


@pytest.mark.parametrize("name", [name for name in WANT if hasattr(errno, name)])
def test_want_of_descriptors_or_memory_pauses_accepting_until_one_is_free(
    application, caplog, name
):
    with serving(
        application, poll_interval=10 * LONG
    ) as server, server.client() as client, server.client() as leaving:
        assert client.ask("GET", "/healthz").status == 200
        assert leaving.ask("GET", "/healthz").status == 200
        server.errors += [OSError(getattr(errno, name), "no more")] * 2
        with server.client() as late:
            late.send(raw("GET", "/healthz"))
            assert eventually(lambda: len(server.errors) == 1)
            pass_through_the_loop(client)
            assert len(server.errors) == 1  # it does not try again and again
            server.errors.clear()
            leaving.__exit__()
            assert late.answer().status == 200
    assert caplog.text.count("have to wait") == 1


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="needs a system that forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_copy_that_a_task_forks_does_not_keep_the_sockets(application, bell):
    mine, its = socket.socketpair()

    def fork(payload, report):
        """Leave a copy of this process behind, which ends when the test lets it."""
        pid = os.fork()
        if pid == 0:
            mine.close()
            its.recv(1)
            os._exit(0)
        return pid

    application.task("fork")(fork)
    try:
        with serving(application) as server:
            port = server.server_port
            client, waiting = server.client(), server.client()
            waiting.send(raw("GET", "/bell"))
            bell.await_waiting()
            created = client.ask("POST", "/create-fork", {"name": "x"}).json
            record = client.ask("GET", f"/poll-fork/{created['id']}?wait=30").json
            assert record["status"] == "completed"
            assert client.ask("GET", "/healthz").status == 200  # the server has its sockets still
        with client, waiting:
            assert client.ended()
            assert waiting.answer().json == "rung"
            assert waiting.ended()
        assert os.waitpid(record["result"], os.WNOHANG) == (0, 0)  # it lives
        taskserver.Server(("127.0.0.1", port), application).server_close()
    finally:
        its.close()
        mine.close()
    os.waitpid(record["result"], 0)


# The end of a server


class Broken(Exception):
    """What leaves the loop of a server in a test."""


@pytest.mark.parametrize("waits", [False, True])
def test_a_server_whose_loop_fails_can_be_shut_down(application, bell, waits):
    server = WatchedServer(application)
    if waits:
        bell.unwatch = lambda wake: fail({}, None)
    failed = threading.Event()

    def serve():
        try:
            server.serve_forever(0.02)
        except Broken:
            failed.set()

    serving_thread = threading.Thread(target=serve, daemon=True)
    serving_thread.start()
    try:
        with server.client() as client:
            client.send(raw("GET", "/bell"))
            bell.await_waiting()
            server.errors.append(Broken())
            with server.client():
                assert failed.wait(LONG)
            stopper = threading.Thread(target=server.shutdown, daemon=True)
            stopper.start()
            stopper.join(LONG)
            assert not stopper.is_alive()
            assert client.ended()
    finally:
        serving_thread.join(LONG)
        server.server_close()


def test_a_server_that_does_not_serve_is_shut_down_at_once(application):
    server = WatchedServer(application)
    server.shutdown()
    server.serve_forever()
    server.server_close()


def test_a_client_that_still_sends_when_the_server_stops_is_not_cut_off_from_its_answer(server):
    head = "POST /create-echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.client() as idle, server.client() as sender:
        idle.ask("GET", "/healthz")
        sender.send(f"{head}Content-Length: 2000000\r\n\r\n".encode())
        assert sender.says(LONG)
        stopper = threading.Thread(target=server.shutdown, args=(LONG,), daemon=True)
        stopper.start()
        assert idle.ended()  # so the stop has begun
        for _ in range(20):
            sender.send(b"x" * 1000)
        assert sender.answer().status == 413
    stopper.join(LONG)
    assert not stopper.is_alive()


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


def test_a_server_that_was_shut_down_can_serve_again(application):
    server = WatchedServer(application)
    for _ in range(3):
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with server.client() as client:
            assert client.ask("GET", "/healthz").status == 200
        server.shutdown()
        thread.join(LONG)
    server.server_close()


def test_the_port_is_free_at_once(application):
    with serving(application) as server:
        port = server.server_port
        with server.client() as client:
            assert client.ask("GET", "/healthz").status == 200
    again = taskserver.Server(("127.0.0.1", port), application)
    again.server_close()


# -- 8. Running ------------------------------------------------------------------------------------


@contextlib.contextmanager
def logging_to(descriptor):
    """Have a logger write to a descriptor."""
    handler = taskserver.LogHandler(descriptor)
    logger = logging.Logger("test")  # noqa: LOG001 -- pytest is not to know it
    logger.addHandler(handler)
    try:
        yield logger, handler
    finally:
        logger.removeHandler(handler)
        handler.finish(LONG)


@contextlib.contextmanager
def pipe():
    """Make a pipe of two files: unlike a number, a file may be closed twice."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as far, open(writing, "wb", buffering=0) as end:
        yield far, end


def test_the_log_escapes_what_came_from_outside():
    with pipe() as (ends, end):
        with logging_to(end.fileno()) as (logger, _):
            logger.warning("task %s: %s", 1, "a\nb\x1b[2J\r\0\x7f\x85\u2028é\ud800😀")
            try:
                raise ValueError("what\nit said")
            except ValueError:
                logger.exception("failed")
        end.close()
        text = ends.readall().decode("ascii")
    lines = text.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ WARNING task 1: a", lines[0])
    assert not set(text) - set(map(chr, range(32, 127))) - {"\n"}
    assert [line for line in lines if not line.startswith("    ")] == [
        lines[0],
        next(line for line in lines if "ERROR" in line),
    ]
    assert (
        "\\x1b[2J" in text
        and "\\xe9\\ud800\\U0001f600" in text
        and "it said" in text
        and "Traceback" in text
    )


def test_a_line_that_cannot_be_composed_does_not_end_the_log():
    with pipe() as (far, end):
        with logging_to(end.fileno()) as (logger, _):
            logger.warning("%d", "no number")
            try:
                raise Unspeakable
            except Unspeakable:
                logger.exception("failed")
            logger.warning("the last")
        end.close()
        text = far.readall().decode("ascii")
    assert "WARNING %d" in text and "ERROR failed" in text and "WARNING the last" in text


def test_a_log_that_nobody_reads_blocks_nobody_and_says_what_it_dropped():
    with pipe() as (far, end), logging_to(end.fileno()) as (
        logger,
        handler,
    ), concurrent.futures.ThreadPoolExecutor(1) as pool:
        lines = taskserver.LogHandler.MAX_LINES * 2
        in_threads(1, lambda _: [logger.warning("%d %s", n, "x" * 50) for n in range(lines)])
        in_threads(1, lambda _: handler.finish(0.1))  # in vain, yet it returns
        reading = pool.submit(far.readall)
        handler.finish(LONG)
        end.close()
        text = reading.result(LONG).decode("ascii")
    numbers = [int(line.split()[2]) for line in text.splitlines() if "WARNING" in line]
    (dropped,) = re.findall(r"(\d+) lines of the log did not fit", text)
    assert numbers == sorted(numbers) and len(numbers) + int(dropped) == lines


def test_a_log_that_is_closed_stops_nobody():
    with pipe() as (far, end), logging_to(end.fileno()) as (logger, _):
        far.close()
        for n in range(100):
            logger.warning("%d", n)


# Windows has no way to send a signal to one process, but a process can raise each in itself, as
# Ctrl-C does: in another thread. This runs a file, and raises what comes on stdin.
OBEDIENT = '''
import ctypes, os, runpy, signal, sys, threading

def obey():
    """Raise signals until stdin ends."""
    python37 = not hasattr(signal, "raise_signal")
    raise_signal = getattr(ctypes.CDLL("ucrtbase"), "raise") if python37 else signal.raise_signal
    for number in iter(lambda: os.read(0, 1), b""):
        raise_signal(ord(number))

threading.Thread(target=obey, daemon=True).start()
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
'''


class Program:
    """A server in a process of its own: a file, or what `command` says."""

    def __init__(
        self,
        *flags,
        file=PROGRAM,
        command=None,
        port=0,
        stdout=subprocess.PIPE,
        stderr=None,
        token=None,
        environment=(),
        **options,
    ):
        arguments = [*(command or [str(file)]), "--port", str(port), *flags]
        if os.name == "nt" and not command:
            arguments[:0] = ["-c", OBEDIENT]
            options["stdin"] = subprocess.PIPE
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.stderr = self.folder / "stderr"
        with self.stderr.open("ab") as own_stderr:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=stdout,
                stderr=stderr or own_stderr,
                env={
                    **os.environ,
                    "PYTHONPATH": str(PROGRAM.parent),
                    "PYTHONUNBUFFERED": "",
                    "TASKSERVER_TOKEN": token or "",
                    **dict(environment),
                },
                **options,
            )
        if stdout == subprocess.PIPE:
            self.hello = [self.process.stdout.readline().decode() for _ in range(3)]
            address = self.hello[0]
        else:
            self.hello = []
            address = self.log(wait_for="serving ")
        found = re.search(r" https?://\S+:(\d+)\b", address)
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
        for pipe in filter(None, (self.process.stdin, self.process.stdout)):
            pipe.close()
        shutil.rmtree(str(self.folder), ignore_errors=True)

    def client(self):
        return Client(self.port)

    def ask(self, method, target, body=b"", *lines):
        with self.client() as client:
            return client.ask(method, target, body, *lines)

    def create(self, type, **payload):
        """Create a task; return where it can be polled."""
        created = self.ask("POST", f"/create-{type}", {"name": "x", **payload})
        assert created.status == 201, created
        return created.headers["Location"]

    def final(self, path):
        """Return the final record of a task; it may start many processes on a slow machine."""
        for _ in range(4):
            record = self.ask("GET", path + "?wait=30").json
            if record["status"] != "pending":
                break
        assert record["status"] != "pending", record
        return record

    def result(self, type, **payload):
        """Create a task, and return its result."""
        record = self.final(self.create(type, **payload))
        assert record["status"] == "completed", record
        return record["result"]

    def log(self, wait_for=""):
        """Return what is in the log, once a text is there."""
        eventually(lambda: wait_for.encode() in self.stderr.read_bytes(), 10)
        return self.stderr.read_bytes().decode()

    def send(self, number):
        """Send a signal."""
        if os.name == "nt":
            self.process.stdin.write(bytes([number]))
            self.process.stdin.flush()
        else:
            self.process.send_signal(number)

    def stops(self, number):
        """Send a signal; return the exit status."""
        self.send(number)
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
        file = tmp_path / "waiting.py"
        yield lambda *flags, **more: stack.enter_context(Program(*flags, file=file, **more))


def begin(program, path, name="one"):
    """Create a task that waits for a file; return its path once it runs."""
    where = program.create("wait", name=name, path=str(path))
    assert eventually(lambda: program.ask("GET", where).json["message"] == "begun")
    return where


STOPPING = ["SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"]  # the last two exist on some systems only


@pytest.mark.parametrize(
    "number", [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
)
def test_a_signal_drains_running_tasks_and_drops_waiting_ones(waiting, tmp_path, number):
    options = {}
    if os.name == "posix":  # even if this runs under nohup
        options["preexec_fn"] = lambda: signal.signal(number, signal.SIG_DFL)
    program = waiting("--workers", "1", **options)
    running = begin(program, tmp_path / "go")
    for name in "two", "three":
        program.create("wait", name=name, path=str(tmp_path / "go"))
    with program.client() as poll, program.client() as client:
        poll.send(raw("GET", running + "?wait=30"))
        assert not poll.says(0.1)
        program.send(number)
        assert poll.answer().json["status"] == "pending"  # woken
        poll.send(raw("GET", running + "?wait=30"))
        health = client.ask("GET", "/healthz")
        assert (health.status, health.json) == (503, {"status": "stopping"})
        refused = client.ask("POST", "/create-wait", {"name": "x"})
        assert refused.status == 503 and "stopping" in refused.json["error"]
        assert client.ask("GET", running).json["status"] == "pending"
        assert not poll.says(0.1)
        (tmp_path / "go").write_text("")
        assert poll.answer().json["status"] == "completed"
        assert program.process.wait(LONG) == 0
    assert (tmp_path / "go.one").exists() and not (tmp_path / "go.two").exists()
    assert "2 waiting tasks" in program.log() and "Traceback" not in program.log()
    assert (
        taskserver.Server(("127.0.0.1", program.port), Application()).server_close() is None
    )  # the port is free


def test_a_task_that_hangs_is_left_after_the_grace(waiting, tmp_path):
    program = waiting("--grace", "0.2")
    begin(program, tmp_path / "never")
    begun = time.monotonic()
    assert program.stops(signal.SIGTERM) == 0
    assert 0.2 <= time.monotonic() - begun < 10
    assert "Traceback" not in program.log()


@pytest.mark.parametrize(
    "first, second, status",
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGINT, 130)],
)
def test_a_second_signal_leaves_at_once(waiting, tmp_path, first, second, status):
    program = waiting("--grace", "1000")
    begin(program, tmp_path / "never")
    program.send(first)
    assert "stopping" in program.log(wait_for="stopping")
    begun = time.monotonic()
    assert program.stops(second) == status
    assert time.monotonic() - begun < 5 and "Traceback" not in program.log()


def test_with_a_journal_waiting_tasks_stay_for_the_next_start(waiting, tmp_path, path):
    program = waiting("--workers", "1", "--db", path, "--grace", "0.2")
    running = begin(program, tmp_path / "go")
    later = program.create("wait", name="two", path=str(tmp_path / "go"))
    assert program.stops(signal.SIGTERM) == 0
    assert "1 waiting tasks stay" in program.log() and "memory" not in program.hello[2]
    (tmp_path / "go").write_text("")
    program = waiting("--workers", "1", "--db", path)
    assert program.ask("GET", later + "?wait=30").json["status"] == "completed"
    interrupted = program.ask("GET", running + "?wait=30").json
    assert interrupted["status"] == "failed" and interrupted["error"].startswith("interrupted: ")
    assert not (tmp_path / "go.one").exists() and (tmp_path / "go.two").exists()


def test_a_signal_under_load_tears_no_answer():
    statuses = []

    def load(program, begun, i):
        with contextlib.suppress(ConnectionError), program.client() as client:
            while True:
                answer = client.ask(
                    *[("GET", "/tasks"), ("POST", "/create-task", {"name": "x", "seconds": 0})][
                        i % 2
                    ]
                )
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
            assert program.result("task", seconds=0) == {"seconds": 0}
        assert program.result("primes", limit=10)["primes"] == 4
        assert program.stops(signal.SIGTERM) == 0


@posix
def test_a_full_stderr_that_nobody_reads_stops_nobody():
    with pipe() as (_, end):
        os.set_blocking(end.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(end.fileno(), b"x" * 4096)
        os.set_blocking(end.fileno(), True)
        with Program("--verbose", stderr=end) as program, program.client() as client:
            for _ in range(20):
                client.send(raw("GET", "/healthz") * 100)
                assert {client.answer().status for _ in range(100)} == {200}
            assert client.ask("POST", "/create-task", {"name": "x", "seconds": 0}).status == 201
            begun = time.monotonic()
            assert program.stops(signal.SIGTERM) == 0
            assert time.monotonic() - begun < 10


@posix
@pytest.mark.parametrize("is_ignored", [False, True], ids=["", "with nohup"])
def test_sighup_stops_unless_it_is_ignored(waiting, tmp_path, is_ignored):
    if is_ignored and sys.implementation.name == "pypy":
        pytest.skip("PyPy does not tell that a signal is ignored since the start")

    def set_up():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)

    program = waiting("--workers", "1", preexec_fn=set_up)
    running = begin(program, tmp_path / "go")
    program.process.send_signal(signal.SIGHUP)
    if is_ignored:
        (tmp_path / "go").write_text("")
        assert program.final(running)["status"] == "completed"
        assert "stopping" not in program.log()
        assert program.stops(signal.SIGTERM) == 0
    else:
        assert "stopping" in program.log(wait_for="stopping")
        assert program.stops(signal.SIGHUP) == 129  # the second one
    assert "Traceback" not in program.log()


# Tasks that hold on to a test's leash. A child does so, too, when it is to import its file slowly.
HOLDING = '''
import asyncio, logging, multiprocessing, os, signal, socket, sys, threading, time
import taskserver

{hold_on}

if __name__ != "__main__" and "SLOW_IMPORT" in os.environ:
    hold_on(int(os.environ["SLOW_IMPORT"]), str(os.getpid()))
application = taskserver.Application()

def hold(payload, report):
    """Print, and go on when the test lets it."""
    report(0.5, "begun")
    print(payload.get("text", "holding").replace("(lone)", "\\ud800"))
    hold_on(payload["port"], str(os.getpid()))
    return payload.get("text")

async def hold_in_the_loop(payload, report):
    """The same, without holding up its sisters."""
    report(0.5, "begun")
    print(payload.get("text", "holding").replace("(lone)", "\\ud800"))
    run = asyncio.get_running_loop().run_in_executor
    await run(None, hold_on, payload["port"], str(os.getpid()))
    return payload.get("text")

application.task("thread")(hold)
application.task("coroutine")(hold_in_the_loop)
application.task("child", cpu=True)(hold)
application.task("child-with-a-limit", cpu=True, timeout=0.5)(hold)
'''.replace("{hold_on}", inspect.getsource(hold_on))

AND_SERVE = """
if __name__ == "__main__":
    taskserver.main(application)
"""


@pytest.fixture
def holding(tmp_path):
    """Start a server with tasks that hold on to a leash; it may do something first."""
    file = tmp_path / "holding.py"
    with contextlib.ExitStack() as stack:

        def start(*flags, first="", then=AND_SERVE, **options):
            file.write_text(HOLDING + textwrap.dedent(first) + textwrap.dedent(then))
            return stack.enter_context(Program(*flags, file=file, **options))

        yield start


@posix
@pytest.mark.parametrize("where", ["at its start", "at work"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_child_outlives_a_signal_to_all_processes_and_has_the_grace(holding, leash, where, name):
    """As a service manager or a terminal sends it. The server decides what becomes of tasks."""
    number = getattr(signal, name)
    environment = {"SLOW_IMPORT": str(leash.port)}
    program = holding(
        "--grace",
        "60",
        environment=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # even if this runs under nohup
    )
    path = program.create("child", port=leash.port, text="done")
    end, child = leash.next()  # it imports its file
    if where == "at its start":
        os.kill(int(child), number)
        os.killpg(program.process.pid, number)
        assert "stopping" in program.log(wait_for="stopping")
    let_go(end)
    end, child = leash.next()  # it is called
    if where == "at work":
        os.killpg(program.process.pid, number)
        os.kill(int(child), number)
        assert "stopping" in program.log(wait_for="stopping")
    with program.client() as client:
        client.send(raw("GET", path))
        assert client.answer().json["status"] == "pending"
        let_go(end)
        assert program.process.wait(LONG) == 0
    assert "completed" in program.log()
    assert "Traceback" not in program.log()


@posix
@pytest.mark.parametrize("how", ["kill -9", "after the grace", "by a second signal"])
def test_what_a_task_has_started_ends_with_its_server_however_it_ends(holding, leash, how):
    first = f"""
        import subprocess

        @application.task("program", cpu=True)
        def program(payload, report):
            arguments = [str(payload["port"]), "the program"]
            subprocess.Popen([sys.executable, "-c", {Leash.PROGRAM!r}, *arguments])
            hold_on(payload["port"], "the child")
    """
    program = holding("--grace", "0.2" if how == "after the grace" else "1000", first=first)
    program.create("program", port=leash.port)
    ends = [leash.next()[0] for _ in range(2)]
    if how == "kill -9":
        program.process.kill()
    elif how == "by a second signal":
        program.send(signal.SIGTERM)
        assert "stopping" in program.log(wait_for="stopping")
    if how != "kill -9":
        assert program.stops(signal.SIGTERM) in (0, 143)
    assert all(has_ended(end) for end in ends)


@posix
def test_a_child_that_may_run_again_does_so_after_a_signal_to_all(tmp_path, leash, path):
    again = "application.task('again', cpu=True, rerun=True)(hold)\n"
    file = tmp_path / "holding.py"
    file.write_text(HOLDING + again + AND_SERVE)
    with Program("--db", path, "--grace", "0.2", file=file) as program:
        where = program.create("again", port=leash.port, text="done")
        _, child = leash.next()
        os.kill(int(child), signal.SIGTERM)
        assert program.stops(signal.SIGTERM) == 0
    with Program("--db", path, file=file) as program:
        let_go(leash.next()[0])
        assert program.final(where)["result"] == "done"


FORKING = '''
import multiprocessing, os, time, taskserver
application = taskserver.Application()

def square(n):
    return n * n

def begin(has_begun):
    has_begun.set()
    time.sleep(600)

def use_processes(payload, report):
    """Use a pool, which ends its processes; end one of its own."""
    context = multiprocessing.get_context(payload["how"])
    with context.Pool(2) as pool:
        squares = pool.map(square, range(4))
    has_begun = context.Event()
    process = context.Process(target=begin, args=(has_begun,))
    process.start()
    has_begun.wait()
    process.terminate()
    process.join()
    return [squares, process.exitcode]

async def use_processes_in_the_loop(payload, report):
    return use_processes(payload, report)

application.task("thread")(use_processes)
application.task("coroutine")(use_processes_in_the_loop)
application.task("child", cpu=True)(use_processes)

if __name__ == "__main__":
    taskserver.main(application)
'''


@pytest.mark.parametrize("how", multiprocessing.get_all_start_methods())
def test_a_task_may_use_processes_and_terminate_ends_them(tmp_path, how):
    file = tmp_path / "forking.py"
    file.write_text(FORKING)
    with Program(file=file) as program:
        for type in "thread", "coroutine", "child":
            assert program.result(type, how=how) == [[0, 1, 4, 9], -signal.SIGTERM], type


@needs_fork
def test_a_signal_that_reaches_a_copy_at_once_is_not_lost():
    """Before Python has noticed that it is a copy, it has the handlers of the server."""
    code = (
        "import os, signal\n"
        "end = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "os.register_at_fork(after_in_child=end)\n"  # it is called before that of the next line
        "import taskserver\n"
        "taskserver.handle_stop_signals(lambda number, frame: None)\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0)\n"
        "print(os.waitpid(pid, 0)[1])\n"
    )
    out = subprocess.check_output([sys.executable, "-c", code], cwd=str(PROGRAM.parent))
    assert int(out) == signal.SIGTERM


@posix
@pytest.mark.parametrize("how", multiprocessing.get_all_start_methods())
def test_the_stop_waits_for_no_process_that_a_task_has_doomed_behind_and_ends_none(
    holding, leash, how
):
    first = """
        @application.task("leave")
        def leave(payload, report):
            context = multiprocessing.get_context(payload["how"])
            context.Process(target=hold_on, args=(payload["port"],)).start()
    """
    program = holding("--grace", "1", first=first)
    program.result("leave", port=leash.port, how=how)
    end, _ = leash.next()
    assert program.stops(signal.SIGTERM) == 0
    assert not select.select([end], [], [], 0)[0]
    assert "Traceback" not in program.log()
    let_go(end)
    assert has_ended(end)


@needs_fork
def test_the_port_is_free_after_kill_9_while_a_copy_of_the_server_lives(holding, leash):
    first = """
        @application.task("leave")
        def leave(payload, report):
            context = multiprocessing.get_context("fork")
            context.Process(target=hold_on, args=(payload["port"],)).start()
    """
    program = holding(first=first)
    with program.client() as client:  # it has a connection of a client, too
        created = client.ask("POST", "/create-leave", {"name": "x", "port": leash.port})
        end, _ = leash.next()
        client.ask("GET", created.headers["Location"] + "?wait=30")
        assert program.stops(signal.SIGKILL) == -signal.SIGKILL
        assert client.ended()
    taskserver.Server(("127.0.0.1", program.port), Application()).server_close()
    assert not select.select([end], [], [], 0)[0]


def test_the_logging_of_the_application_is_left_alone(holding, leash):
    first = """
        def switches():
            names = "logThreads", "logProcesses", "logMultiprocessing", "raiseExceptions"
            found = [getattr(logging, name) for name in names]
            return found + [len(logging.root.handlers), logging.root.level, logging.root.disabled]

        before = switches()

        @application.task("log")
        def log(payload, report):
            "Configure logging after main was called, if nobody has before, and use it."
            assert switches()[:4] == before[:4]
            logging.basicConfig(
                level="INFO",
                format="%(levelname)s|%(threadName)s|%(processName)s|%(process)d|%(filename)s|"
                "%(funcName)s|%(message)s",
            )
            logging.getLogger("application").info("seen %s", payload["name"])
            return [os.getpid(), threading.current_thread().name, before == switches()]

        application.task("log-there", cpu=True)(log)
        if "CONFIGURE" in os.environ:
            logging.basicConfig(level="INFO", format="%(levelname)s|%(threadName)s|%(message)s")
            before = switches()
    """
    for configures in False, True:
        environment = {"CONFIGURE": "1"} if configures else {}
        program = holding(first=first, environment=environment)
        for type, process in ("log", "MainProcess"), ("log-there", "taskserver-child"):
            number, thread, is_as_before = program.result(type)
            line = f"INFO|{thread}|{process}|{number}|holding.py|log|seen x"
            if configures:
                assert is_as_before
                line = f"INFO|{thread}|seen x"
            assert line in program.log(wait_for=line).splitlines()
        for text in "created: type log, ", "created: type log-there, ", "serving http":
            assert program.log().count(text) == 1  # by the handler of the server alone


def test_a_configuration_that_disables_all_loggers_does_not_mean_that_of_the_server(holding):
    first = """
        import logging.config
        logging.config.dictConfig({"version": 1})
    """
    program = holding(first=first)
    assert "serving http" in program.log(wait_for="serving http")


@pytest.mark.parametrize("type", ["thread", "coroutine", "child"])
def test_what_a_task_prints_is_seen_at_once_in_a_file(holding, leash, tmp_path, type):
    file = tmp_path / "stdout"
    with file.open("wb") as stdout:
        program = holding(stdout=stdout)
    path = program.create(type, port=leash.port, text="seen")
    end, _ = leash.next()
    assert "seen" in file.read_text().splitlines()  # while the task goes on
    let_go(end)
    assert program.final(path)["result"] == "seen"
    if type == "child":
        path = program.create("child-with-a-limit", port=leash.port, text="seen, too")
        assert program.final(path)["error"] == "timed out after 0.5 seconds"
        assert "seen, too" in file.read_text().splitlines()


@pytest.mark.parametrize("type", ["thread", "coroutine", "child"])
def test_what_a_task_prints_is_seen_at_once_in_a_pipe(holding, leash, type):
    program = holding()
    path = program.create(type, port=leash.port, text="seen")
    end, _ = leash.next()
    seen = []
    in_threads(1, lambda _: seen.append(program.process.stdout.readline()))
    assert seen[0].split() == [b"seen"]
    let_go(end)
    assert program.final(path)["result"] == "seen"


@posix
@pytest.mark.parametrize("type", ["thread", "coroutine", "child"])
def test_what_a_task_prints_is_seen_at_once_in_a_terminal(holding, leash, type):
    mine, its = os.openpty()
    with open(mine, "rb", buffering=0) as screen, open(its, "wb", buffering=0) as terminal:
        program = holding(stdout=terminal)
        path = program.create(type, port=leash.port, text="seen")
        end, _ = leash.next()
        shown = b""
        while b"seen" not in shown.split():
            assert select.select([screen], [], [], LONG)[0], shown
            shown += screen.read(4096)
        let_go(end)
        assert program.final(path)["result"] == "seen"


@pytest.mark.parametrize("type", ["thread", "coroutine", "child"])
def test_any_text_can_be_printed_in_any_locale(holding, leash, tmp_path, type):
    no_utf_8 = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    no_utf_8.update(PYTHONIOENCODING="")
    text = "é \u2028 😀 (lone) done"
    file = tmp_path / "stdout"
    with file.open("wb") as stdout:
        program = holding(stdout=stdout, environment=no_utf_8)
    path = program.create(type, port=leash.port, text=text)
    let_go(leash.next()[0])
    record = program.final(path)
    assert (record["error"], record["result"]) == (None, text)
    assert b"done" in file.read_bytes()


@posix
@pytest.mark.parametrize("how", ["by whoever starts it", "by the program"])
def test_a_closed_stdout_stops_nobody(holding, leash, how):
    def close():
        if how == "by whoever starts it":
            os.close(1)

    first = "sys.stdout.close()" if how == "by the program" else ""
    program = holding(first=first, stdout=subprocess.DEVNULL, preexec_fn=close)
    for type in "thread", "coroutine", "child":
        path = program.create(type, port=leash.port, text="not seen")
        let_go(leash.next()[0])
        assert program.final(path)["result"] == "not seen"
    assert program.stops(signal.SIGTERM) == 0
    assert "Traceback" not in program.log()


@posix
def test_a_stdout_that_nobody_reads_stops_nobody(holding, leash):
    with pipe() as (far, end):
        far.close()
        program = holding(first="print('before')", stdout=end)
        for type in "thread", "coroutine", "child":
            path = program.create(type, port=leash.port, text="not seen")
            let_go(leash.next()[0])
            assert program.final(path)["result"] == "not seen"
        assert program.ask("GET", "/healthz").status == 200
        assert program.stops(signal.SIGTERM) == 0
        assert "Traceback" not in program.log()


def test_main_works_in_a_thread_of_its_own_without_signals(holding, leash):
    then = """
        class RememberedServer(taskserver.Server):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                servers.append(self)

        if __name__ == "__main__":
            servers, before = [], signal.getsignal(signal.SIGINT)
            taskserver.Server = RememberedServer
            thread = threading.Thread(target=taskserver.main, args=(application,))
            thread.start()
            hold_on(int(os.environ["LEASH"]))
            assert signal.getsignal(signal.SIGINT) == before
            servers[0].shutdown()
            thread.join(30)
            assert not thread.is_alive()
            names = sorted(thread.name for thread in threading.enumerate())
            hold_on(int(os.environ["LEASH"]), " ".join(names))
    """
    program = holding(then=then, environment={"LEASH": str(leash.port)})
    end, _ = leash.next()
    for type in "thread", "coroutine", "child":
        path = program.create(type, port=leash.port, text="done")
        let_go(leash.next()[0])
        assert program.final(path)["result"] == "done"
    let_go(end)
    end, names = leash.next()
    assert "stop" not in names.split()
    assert "log" not in names.split()
    let_go(end)
    assert program.process.wait(LONG) == 0
    assert "Traceback" not in program.log()


@pytest.mark.parametrize("how", multiprocessing.get_all_start_methods())
def test_main_works_in_a_process_of_multiprocessing(holding, leash, how):
    then = """
        @application.task("pid")
        def pid(payload, report):
            return os.getpid()

        def serve():
            taskserver.main(application)

        if __name__ == "__main__":
            process = multiprocessing.get_context(sys.argv.pop()).Process(target=serve)
            process.start()
            process.join()
            sys.exit(process.exitcode + 7)
    """
    program = holding(how, then=then)
    number = program.result("pid")
    assert number != program.process.pid
    for type in "thread", "coroutine", "child":
        path = program.create(type, port=leash.port, text="done")
        let_go(leash.next()[0])
        assert program.final(path)["result"] == "done"
    os.kill(number, signal.SIGTERM)
    status = program.process.wait(LONG)
    assert "Traceback" not in program.log()
    if os.name == "posix":
        assert status == 7
        assert "stopping" in program.log()


# What PyInstaller makes of a program: `sys.frozen`, an executable that is the program itself, and a
# freeze_support that goes on in a child, and in the process that keeps track of resources, on every
# system. The standard library's does so on Windows alone.
FROZEN = """
import multiprocessing, multiprocessing.spawn, os, sys
import taskserver

def freeze_support():
    if sys.argv[-2:-1] == ["-c"]:
        sys.exit(exec(sys.argv[-1]))
    multiprocessing.spawn.freeze_support()

sys.frozen = True
sys.executable = os.environ["EXECUTABLE"]
multiprocessing.set_executable(sys.executable)
multiprocessing.freeze_support = freeze_support
application = taskserver.demo()

@application.task("mine", cpu=True)
def mine(payload, report):
    return [os.getpid(), sys.frozen]

if __name__ == "__main__":
    taskserver.main(application)
"""


@posix
def test_a_program_that_is_frozen_runs_its_tasks_in_children(tmp_path):
    file, executable = tmp_path / "frozen.py", tmp_path / "frozen"
    file.write_text(FROZEN)
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{file}" "$@"\n')
    executable.chmod(0o700)
    with Program(file=file, environment={"EXECUTABLE": str(executable)}) as program:
        number, is_frozen = program.result("mine")
        assert number != program.process.pid
        assert is_frozen
        assert program.result("primes", limit=10)["primes"] == 4
        assert program.stops(signal.SIGTERM) == 0
        assert "Traceback" not in program.log()


def test_a_journal_that_is_lost_ends_the_program_with_status_1(holding, leash):
    """Whatever runs, for another server may run it by now."""
    first = """
        class Taken(taskserver.Journal):
            def load(self):
                return []

            def save(self, record):
                if record.name == "the last":
                    raise taskserver.JournalLost("somebody else has it")

            def delete(self, ids):
                pass

        application.store.journal = Taken()
    """
    program = holding("--grace", "1000", first=first)
    program.create("thread", port=leash.port)
    program.create("child", port=leash.port)
    ends = [leash.next()[0] for _ in range(2)]
    refused = program.ask("POST", "/create-thread", {"name": "the last", "port": leash.port})
    assert refused is None or refused.status == 503
    assert program.process.wait(LONG) == 1
    assert all(has_ended(end) for end in ends)
    assert "somebody else has it" in program.log()
    assert "Traceback" not in program.log()


# ==== The core ends here. =========================================================================


# -- 9. Monitoring ---------------------------------------------------------------------------------


def test_a_query_has_at_most_100_parameters(application):
    for number, status in (100, 200), (101, 400):
        query = "&".join(["a=1"] * number)
        assert ask(application, "GET", f"/tasks?{query}").status == status


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
    application.checks.append(taskserver.token_check("secret"))
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


def test_a_listing_for_which_there_is_no_thread_is_made_when_there_is_one(application, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    asked, woken = request("GET", "/tasks"), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        later = application.answer(application.judge(asked), asked)
        later.watch(woken.set)
    assert not woken.is_set()
    application.wake_workers()  # as the server does in each round
    assert woken.wait(LONG)


def test_no_listing_is_made_by_the_loop_for_a_client_that_has_ended_its_sending_side(
    server, application, monkeypatch
):
    threads, newest = [], application.store.newest

    def watched(*arguments):
        threads.append(threading.current_thread().name)
        return newest(*arguments)

    monkeypatch.setattr(application.store, "newest", watched)
    with server.client() as client:
        client.send(raw("GET", "/tasks") * 3)
        client.socket.shutdown(socket.SHUT_WR)
        assert [client.answer().status for _ in range(3)] == [200] * 3
        assert client.ended()
    assert threads == ["lister"] * 3


def test_a_listing_that_is_not_made_in_time_is_503_and_the_loop_does_not_make_it(
    application, monkeypatch
):
    made, asked = [], request("GET", "/tasks")
    monkeypatch.setattr(application.store, "newest", lambda *of: made.append(of) or [])
    later = application.answer(application.judge(asked), asked)
    answer = application.answer_later(later, asked)
    assert answer.status == 503 and ("Retry-After", "1") in answer.headers
    assert not made


def test_a_listing_under_way_is_answered_when_the_server_ends(server, application, monkeypatch):
    held, newest = Gate(), application.store.newest
    monkeypatch.setattr(application.store, "newest", lambda *of: held({}) or newest(*of))
    with server.client() as client:
        client.send(raw("GET", "/tasks"))
        held.wait_for()
        ending = threading.Thread(target=server.shutdown, args=(LONG,), daemon=True)
        ending.start()
        assert not client.says(0.1)
        held.opened.set()
        assert client.answer().status == 200
    ending.join(LONG)


def test_only_so_many_listings_may_wait(application, monkeypatch):
    monkeypatch.setattr(taskserver, "MAX_LISTINGS", 2)
    held, newest, asked = Gate(), application.store.newest, request("GET", "/tasks")
    monkeypatch.setattr(application.store, "newest", lambda *of: held({}) or newest(*of))
    woken = [threading.Event() for _ in range(3)]
    laters = [application.answer(application.judge(asked), asked) for _ in woken]
    laters[0].watch(woken[0].set)
    held.wait_for()  # it is being made, the others wait
    for later, event in zip(laters[1:], woken[1:]):
        later.watch(event.set)
    refused = application.answer(application.judge(asked), asked)
    assert refused.status == 503 and ("Retry-After", "1") in refused.headers
    held.opened.set()
    assert all(event.wait(LONG) for event in woken)
    assert ask(application, "GET", "/tasks").status == 200


def test_a_listing_that_cannot_be_made_is_500(application, monkeypatch):
    monkeypatch.setattr(application.store, "newest", lambda *of: 1 / 0)
    assert ask(application, "GET", "/tasks").status == 500


def test_a_listing_for_which_nobody_waits_any_more_is_not_made(application, monkeypatch):
    asked = request("GET", "/tasks")
    held, free = threading.Event(), threading.Event()
    made, newest = [], application.store.newest

    def watched(*arguments):
        made.append(arguments)
        held.set()
        assert free.wait(LONG)
        return newest(*arguments)

    monkeypatch.setattr(application.store, "newest", watched)
    woken = threading.Event()
    first, dropped, last = (application.answer(application.judge(asked), asked) for _ in range(3))
    first.watch(lambda: None)
    assert held.wait(LONG)
    dropped.watch(lambda: None)
    dropped.unwatch(lambda: None)
    last.watch(woken.set)
    free.set()
    assert woken.wait(LONG) and len(made) == 2


# -- 10. Durability --------------------------------------------------------------------------------


class ObedientJournal(MemoryJournal):
    """A journal in memory that waits, refuses and fails as it is told."""

    def __init__(self, *records):
        super().__init__()
        self.records.update((record.id, record) for record in records)
        self.before_save, self.before_delete = self.obey_before_save, self.obey_before_delete
        self.calls = []  # "save" or "delete", and an id
        self.refuse = lambda record: False  # whether it can never take a record
        self.error = self.late_error = None  # instead of saving; after it has saved
        self.delete_error = None
        self.writable, self.deletable = threading.Event(), threading.Event()
        self.writable.set()
        self.deletable.set()
        self.asked = threading.Semaphore(0)  # to save
        self.asked_to_delete = threading.Semaphore(0)

    def obey_before_save(self, record):
        self.asked.release()
        assert self.writable.wait(LONG)
        if self.refuse(record):
            raise taskserver.RecordRefused("this disk takes no such thing")
        if self.error:
            raise self.error

    def save(self, record):
        super().save(record)
        self.calls.append(("save", record.id))
        if self.late_error:
            raise self.late_error

    def obey_before_delete(self, ids):
        self.asked_to_delete.release()
        assert self.deletable.wait(LONG)
        if self.delete_error:
            raise self.delete_error
        self.calls += [("delete", id) for id in ids]


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
    while store.evict() or store.delete_doomed():
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
    lines = []
    application.log_task = lambda text, *arguments: lines.append(text % arguments)
    record = final(application, create(application, "echo", result="bad"))
    assert application.pool.join(LONG) and "completed" not in "".join(lines)
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


def test_a_server_without_a_thread_for_its_stop_ends_and_says_so(application, monkeypatch, caplog):
    server = taskserver.Server(("127.0.0.1", 0), application)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert taskserver.run_until_stopped(server, 0) == 1
    assert "can't start new thread" in caplog.text
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.server_port), 1).close()


def test_nothing_begins_after_a_loss_even_while_the_stop_is_being_begun(
    application, journal, monkeypatch
):
    begin_the_stop = threading.Event()

    def stop_late(server, grace):
        assert begin_the_stop.wait(LONG)
        server.shutdown(0)

    monkeypatch.setattr(taskserver, "stop_in_order", stop_late)
    application.store.journal_lost = None  # until the server wants to be told
    server = taskserver.Server(("127.0.0.1", 0), application)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        status = pool.submit(taskserver.run_until_stopped, server, 0)
        try:
            assert eventually(lambda: application.store.journal_lost is not None)
            journal.error = taskserver.JournalLost("somebody else has the lock")
            with Client(server.server_port) as client:
                assert client.ask("POST", "/create-echo", {"name": "x"}).status == 503
                refused = client.ask("POST", "/create-echo", {"name": "x"})
                assert refused.status == 503 and "stopping" in refused.json["error"]
        finally:
            begin_the_stop.set()
        assert status.result(LONG) == 1


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
        assert eventually(lambda: is_being_saved(application.store, key))
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
    assert eventually(lambda: application.pool.counts() == (0, 0))  # its worker counts it last


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
@pytest.mark.parametrize("limit", [999, 1000])
def test_the_garbage_collector_overlooks_what_was_loaded_if_that_is_much(
    application, monkeypatch, limit
):
    monkeypatch.setattr(application.store, "MANY", limit)
    name = f"loaded-{limit}"
    records = [numbered(n + 1, status="failed", type=name) for n in range(1000)]
    application.store.journal = ObedientJournal(*records)
    assert collected(name) == 1000
    try:
        taskserver.recover(application)
        assert gc.isenabled()
        assert (collected(name) == 0) == (limit < 1000)
    finally:
        gc.unfreeze()


def many(n, type="many"):
    """Return so many final records."""
    record = RECORD._replace(status="failed", type=type)
    return [record._replace(id=str(uuid.uuid4())) for _ in range(n)]


@needs_freeze
def test_the_garbage_collector_overlooks_many_records_and_only_many(monkeypatch):
    store = taskserver.Store()
    monkeypatch.setattr(store, "MANY", 299)
    monkeypatch.setattr(store, "MANY_NEW", 300)

    def add(n):
        for record in many(n, "held"):
            store.add(record)
        store.freeze_records()
        return collected("held")

    try:
        assert [add(n) for n in (200, 99, 1, 299, 1, 50)] == [200, 299, 0, 299, 0, 50]
    finally:
        gc.unfreeze()


@needs_freeze
def test_the_garbage_collector_looks_at_few_records_of_many_that_came_and_went(monkeypatch):
    store = taskserver.Store(keep=0)
    monkeypatch.setattr(store, "MANY", 299)
    monkeypatch.setattr(store, "MANY_NEW", 300)
    for _ in range(300):
        store.evict()
        store.add(*many(1, "evicted"))
    try:
        store.freeze_records()
        assert collected("evicted") == 1
    finally:
        gc.unfreeze()


@needs_freeze
def test_a_cycle_that_was_frozen_is_freed_when_there_are_few_records_again(monkeypatch):
    now = 0.0
    store = taskserver.Store(keep=60, clock=lambda: now)
    monkeypatch.setattr(store, "MANY", 299)
    monkeypatch.setattr(store, "MANY_NEW", 300)

    class Cycle:
        def __init__(self):
            self.itself = self

    cycle = Cycle()
    is_freed = threading.Event()
    weakref.finalize(cycle, is_freed.set)
    try:
        for now in [0.0] * 150 + [30.0] * 150:
            store.add(*many(1))
        store.freeze_records()
        del cycle
        for now, held in ((61.0, 150), (91.0, 0)):  # half of them are not few
            store.evict()
            store.freeze_records()
            gc.collect()
            assert collected("many") == 0
            assert is_freed.is_set() == (not held), held
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
        # With -c, Python looks into the working folder first, where another copy may be.
        code = (
            f"import sys; sys.path.insert(0, {here!r}); "
            "import test_taskserver; test_taskserver.obey()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
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
    assert eventually(lambda: (store.delete_doomed(), store.has_doomed())[1] is False)
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
        list(database.execute("PRAGMA journal_mode = WAL"))  # PyPy wants its row to be fetched
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
    assert f"there is no folder {tmp_path / 'none'}" in refusal(tmp_path / "none" / "tasks.db")
    assert "it is a folder" in refusal(tmp_path)
    assert os.listdir(str(tmp_path)) == []
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


OPEN_IT = "try: SQLiteJournal(sys.argv[1])\nexcept OSError as error: print(error)"


def test_a_second_process_on_the_same_file_is_refused(path):
    with sqlite_journal(path) as journal:
        journal.save(numbered(1))
        assert "is locked; stop the server that uses it" in python(OPEN_IT, path)
        assert "is locked" in refusal(path)


@posix
def test_a_task_that_reads_the_file_does_not_let_a_second_process_in(path, tmp_path):
    with sqlite_journal(path) as journal:
        journal.save(numbered(1))
        shutil.copytree(str(tmp_path), str(tmp_path / "copy"))  # takes SQLite's own lock away
        assert "is locked; stop the server that uses it" in python(OPEN_IT, path)
        journal.save(numbered(2))
    with sqlite_journal(path) as journal:
        assert list(journal.load()) == [numbered(1), numbered(2)]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_copy_that_a_task_forks_does_not_keep_the_lock_of_the_file(path):
    with sqlite_journal(path):
        mine, its = socket.socketpair()
        copy = os.fork()
        if copy == 0:
            mine.close()
            its.recv(1)  # until the test lets it end
            os._exit(0)
    try:
        with sqlite_journal(path):
            assert os.waitpid(copy, os.WNOHANG) == (0, 0)  # it lives
    finally:
        its.close()
        mine.close()
        os.waitpid(copy, 0)


@posix
def test_a_file_system_without_such_locks_is_used_all_the_same_and_the_log_says_so(
    path, monkeypatch, caplog
):
    import fcntl

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sqlite_journal(path) as journal:
        journal.save(numbered(1))
        assert "is locked; stop the server that uses it" in python(OPEN_IT, path)
    (line,) = caplog.messages
    assert "see that no other server uses" in line and "No locks available" in line


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
import os, sys, threading, time, taskserver
application = taskserver.Application()
one_at_a_time = threading.Lock()  # on Windows, O_APPEND looks for the end and then writes

def mark(payload, report):
    """Leave a mark outside."""
    with one_at_a_time:
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

    def kill(program, more):
        """Wait until so many tasks more were acknowledged and some were final; kill the server."""
        created, final = len(acknowledged) + more, len(finals) + 2
        # A slow disk may not come so far in time; then fewer are tried.
        eventually(lambda: len(acknowledged) > created and len(finals) > final, LONG / 2)
        program.process.kill()

    for moment in range(3):
        with start() as program:
            killer = threading.Thread(target=kill, args=(program, chance.randint(12, 60)))
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


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("127.0.0.1", 200),
        ("127.0.0.1:80", 200),
        ("10.1.2.3", 200),
        ("[::1]:8000", 200),
        ("[fe80::1]", 200),
        ("tasks.example:8000", 200),
        ("TASKS.example", 200),
        ("localhost.", 200),
        ("Localhost.:0008000", 200),
        ("tasks.example.", 200),
        ("", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost..", 421),
        ("localhost.evil.example.", 421),
        ("1.2.3", 421),
        ("localhost,evil.example", 421),
        ("127.0.0.1evil", 421),
        ("0x7f000001", 421),
    ],
)
def test_a_host_that_is_no_address_nor_allowed_is_421_and_the_flag_is_named(
    application, host, status
):
    application.checks.append(taskserver.host_check(["Tasks.example"]))
    for target in "/tasks", "/":
        answer = ask(application, "GET", target, host=host)
        assert answer.status == status
        assert status == 200 or "--allow-host" in answer.json["error"]


def test_a_name_may_be_allowed_with_the_dot_that_ends_all_names(application):
    application.checks.append(taskserver.host_check(["tasks.example."]))
    for host in "tasks.example", "tasks.example.:80":
        assert ask(application, "GET", "/tasks", host=host).status == 200


@pytest.mark.parametrize(
    "authorization, status",
    [
        ("Bearer s3cret", 201),
        ("bearer s3cret", 201),
        ("BEARER  s3cret ", 201),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer s3cre", 401),
        ("Bearer s3crets", 401),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        ("Bearer s3cr\xe9t", 401),
        ("Bearer s3cret, Bearer s3cret", 401),
        ("Bearer S3CRET", 401),
    ],
    ids=brief,
)
def test_a_token_is_asked_for(application, authorization, status):
    application.checks.append(taskserver.token_check("s3cret"))
    answer = ask(application, "POST", "/create-echo", {"name": "x"}, authorization=authorization)
    assert answer.status == status
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert "s3cr" not in answer.json["error"]


OPEN = ["/", "/healthz", "/tasks", "/openapi.json", "/create-echo", "/poll-echo/1"]
CLOSED = ["/nowhere", "//", "/healthz/"]


@pytest.mark.parametrize("target", [*OPEN, *CLOSED])
def test_health_page_and_options_are_open_and_nothing_else(application, target):
    application.checks.append(taskserver.token_check("s3cret"))
    statuses = {
        method: ask(application, method, target).status
        for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT")
    }
    refused = dict.fromkeys(statuses, 401)
    if target in OPEN:
        refused.pop("OPTIONS")
    if target in ("/", "/healthz"):
        refused.pop("GET")
        refused.pop("HEAD")
    assert refused == {method: status for method, status in statuses.items() if status == 401}
    assert {statuses[method] for method in statuses if method not in refused} <= {200, 204}


@pytest.mark.parametrize("checks", ["token", "host", "both"])
def test_what_a_balancer_asks_is_answered_and_tells_it_the_status_alone(application, checks):
    if checks != "host":
        application.checks.append(taskserver.token_check("s3cret"))
    if checks != "token":
        application.checks.append(taskserver.host_check([]))
    foreign = b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    with serving(application) as server, server.client() as client:
        client.send(foreign.replace(b"evil.example", b"localhost"))
        known = client.answer()
        assert (known.json == {"status": "ok"}) == (checks != "host")
        client.send(foreign + foreign.replace(b"GET", b"HEAD"))
        stranger = client.answer()
        assert (stranger.status, client.answer("HEAD").status) == (200, 200)
        assert (stranger.json == {"status": "ok"}) == (
            checks != "token" or known.json == stranger.json
        )
        client.send(
            foreign.replace(b"evil.example\r\n", b"localhost\r\nAuthorization: Bearer s3cret\r\n")
        )
        assert {"waiting", "running", "oldest_waiting"} <= set(client.answer().json)
        for path in b"/tasks", b"*":
            client.send(b"OPTIONS %s HTTP/1.1\r\nHost: evil.example\r\n\r\n" % path)
            answer = client.answer()
            assert answer.status == 204
            assert "OPTIONS" in answer.headers["Allow"]
        client.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.answer().status == 200
        assert client.ended()
    with serving(application) as server, server.client() as client:
        client.send(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert client.answer().status == 400
        assert client.ended()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A file with a self-signed certificate for localhost, and with its key: twice its path."""
    pytest.importorskip("ssl")
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_text(taskserver.SELF_CHECK_PEM, encoding="ascii")
    return str(path), str(path)


@pytest.fixture
def tls(application, certificate):
    """A server that speaks TLS; `tls_client()` makes a client of it."""
    import ssl

    context = ssl.create_default_context(cafile=certificate[0])

    class TLSClient(Client):
        def __init__(self, port):
            super().__init__(port)
            self.file.close()
            self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
            self.file = self.socket.makefile("rb")

    with serving(application, taskserver.tls_context(*certificate)) as server:
        server.client_context = context
        server.tls_client = lambda: TLSClient(server.server_port)
        yield server


@pytest.mark.parametrize(
    "ciphers", [None, "ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE+AES:!AESGCM:!AESCCM"]
)
def test_tls_1_2_has_forward_secrecy_and_authenticated_encryption_or_is_not_spoken(tls, ciphers):
    import ssl

    tls.client_context.maximum_version = ssl.TLSVersion.TLSv1_2
    if ciphers:
        tls.client_context.set_ciphers(ciphers)
    if ciphers and "!" in ciphers:
        with pytest.raises(ssl.SSLError):
            tls.tls_client()
        return
    with tls.tls_client() as client:
        assert client.ask("GET", "/healthz").status == 200
        name, version, _ = client.socket.cipher()
        assert re.match("ECDHE-ECDSA-(CHACHA20-POLY1305|AES(128|256)-GCM-)", name)
        assert version == "TLSv1.2"


def test_tls_offers_nothing_else(certificate):
    for cipher in taskserver.tls_context(*certificate).get_ciphers():
        if cipher["protocol"] == "TLSv1.2":
            assert re.match(
                "ECDHE-(RSA|ECDSA)-(CHACHA20-POLY1305|AES(128|256)-GCM-)", cipher["name"]
            )


def test_tls_carries_what_plain_connections_carry(tls, application, gate):
    record = outcome(application, lambda payload, report: "x" * (MIB - 2))
    with tls.tls_client() as client:
        assert (
            client.ask("POST", "/create-echo", {"name": "x", "more": "y" * 300_000}).status == 201
        )
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
        client.send(
            raw("POST", "/create-echo", b"", "Content-Length: 50000000").replace(
                b"Content-Length: 0\r\n", b""
            )
        )
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
    """Return all that a part of a document refers to."""
    if isinstance(part, list):
        return [reference for member in part for reference in references(member)]
    if not isinstance(part, dict):
        return []
    own = [part["$ref"]] if "$ref" in part else []
    return own + [reference for member in part.values() for reference in references(member)]


def resolved(document, part):
    """Return what a part of a document refers to, or the part itself."""
    for key in part.get("$ref", "#").split("/")[1:]:
        document = document[key]
    return document if "$ref" in part else part


def members_of(document, name):
    """Return the schemas of the members of a schema, those of what it shares included."""
    schema = document["components"]["schemas"][name]
    members = dict(schema.get("properties", {}))
    for part in schema.get("allOf", ()):
        members.update(resolved(document, part)["properties"])
    return {key: resolved(document, member) for key, member in members.items()}


def operations(document):
    """Return all operations, with their methods and paths."""
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def matches(schema, value):
    """Return whether a value is of the type, the enum and the bounds that a schema names."""
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    names = {str: "string", float: "number", type(None): "null", list: "array", dict: "object"}
    name = names.get(type(value), "integer")
    is_number = name in ("number", "integer")
    if types and name not in types and not (name == "integer" and "number" in types):
        return False
    if is_number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    return value in schema.get("enum", [value])


def test_all_that_is_there_is_described_and_its_references_resolve(application):
    application.task("more-1")(fail)
    document = ask(application, "GET", "/openapi.json").json
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["version"] == taskserver.__version__
    for name in application.types:
        assert list(document["paths"][f"/create-{name}"]) == ["post"]
        assert list(document["paths"][f"/poll-{name}/{{id}}"]) == ["get"]
        assert list(document["paths"][f"/cancel-{name}/{{id}}"]) == ["post"]
    assert {"/", "/tasks", "/healthz", "/openapi.json"} < set(document["paths"])
    assert document["paths"]["/create-echo"]["post"]["description"] == "Return what was sent."
    found = references(document)
    assert found
    for reference in found:
        assert resolved(document, {"$ref": reference})
    for method, path, operation in operations(document):
        assert operation["summary"] and operation["description"]
        target = path.replace("{id}", str(uuid.uuid4()))
        assert ask(application, method, target).status in (200, 400, 404)


def test_an_endpoint_that_somebody_adds_is_described(application):
    answer = {"title": "The uptime", "type": "object"}
    application.router.add(
        "GET", "/uptime", lambda request: Response(200), summary="How long", answer=answer
    )
    document = ask(application, "GET", "/openapi.json").json
    operation = document["paths"]["/uptime"]["get"]
    assert operation["summary"] == "How long" and operation["operationId"] == "getUptime"
    content = operation["responses"]["200"]["content"]["application/json"]
    assert resolved(document, content["schema"]) == {"type": "object"}
    assert content["schema"]["$ref"].endswith("/Theuptime")


def test_what_somebody_adds_may_use_our_schemas_and_our_names(application):
    mine = {"title": "Error", "$ref": "#/components/schemas/Health"}
    word = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    status = {"name": "s", "in": "query", "schema": {"$ref": "#/components/schemas/TaskStatus"}}
    router = taskserver.Router()
    router.add(
        "GET",
        "/words/{id}",
        lambda request, word: Response(200),
        statuses={200: "A word.", 204: "None."},
        answer=mine,
        parameters=(word, status),
    )
    router.add(
        "POST", "/words", lambda request: Response(204), statuses={204: "Kept."}, answer=None
    )
    application.router = router
    document = taskserver.openapi(application)
    for reference in references(document):
        assert resolved(document, {"$ref": reference})
    operation = document["paths"]["/words/{id}"]["get"]
    assert operation["parameters"] == [word, status]
    assert operation["responses"]["200"]["description"] == "A word."
    content = operation["responses"]["200"]["content"]["application/json"]
    assert resolved(document, content["schema"]) == {"$ref": "#/components/schemas/Health"}
    assert "content" not in document["paths"]["/words"]["post"]["responses"]["204"]
    for status in ("400", "421"):
        refusal = resolved(document, operation["responses"][status])
        schema = resolved(document, refusal["content"]["application/json"]["schema"])
        assert list(schema["properties"]) == ["error"]


def test_every_operation_has_a_tag_that_is_described(application):
    application.router.add("GET", "/uptime", lambda request: Response(200), tag="mine")
    document = taskserver.openapi(application)
    described = {tag["name"] for tag in document["tags"] if tag["description"]}
    used = {tag for _, _, operation in operations(document) for tag in operation["tags"]}
    assert used == described == {*application.types, "mine", "server"}
    assert all(len(operation["tags"]) == 1 for _, _, operation in operations(document))


def test_names_of_operations_and_of_bodies_are_unique_whatever_the_types_are_called(application):
    for name in ("a-b", "ab", "a--b", "a2", "a-2", "server"):
        application.task(name)(fail)
    document = taskserver.openapi(application)
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert {"createEcho", "pollEcho", "cancelEcho", "listTasks", "health", "describe"} <= set(names)
    assert all(re.fullmatch("[a-z][A-Za-z0-9]*", name) for name in names)
    assert len({name.lower() for name in names}) == len(names)
    bodies = [
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for _, path, operation in operations(document)
        if path.startswith("/create-")
    ]
    assert len({body.lower() for body in bodies}) == len(application.types)
    assert not any("title" in resolved(document, {"$ref": body}) for body in bodies)
    tags = [re.sub("[^a-z0-9]", "", tag["name"].lower()) for tag in document["tags"]]
    assert len(set(tags)) == len(tags) == len({*application.types, "server"})


def test_names_that_are_not_ascii_are_described_all_the_same(application):
    add = application.router.add
    add("GET", "/one", echo, operation="один", tag="первая", answer={"title": "Ответ"})
    add("GET", "/two", echo, operation="два", tag="вторая", answer={"title": "Другой"})
    document = taskserver.openapi(application)
    described = {path: operation for _, path, operation in operations(document)}
    assert described["/one"]["operationId"] == "getOne"
    assert (described["/one"]["tags"], described["/two"]["tags"]) == (["первая"], ["вторая"])
    for reference in references(document):
        resolved(document, {"$ref": reference})
        assert not reference.endswith("/")


def test_the_description_is_made_anew_only_for_other_routes(application, monkeypatch):
    made, make = [], taskserver.openapi

    def count(application):
        made.append(application)
        return make(application)

    monkeypatch.setattr(taskserver, "openapi", count)
    for _ in range(3):
        assert "/added" not in ask(application, "GET", "/openapi.json").json["paths"]
    assert len(made) == 1
    application.router.add("GET", "/added", echo)
    assert "/added" in ask(application, "GET", "/openapi.json").json["paths"]


def test_the_records_that_are_described_are_those_that_are_answered(application, gate):
    document = taskserver.openapi(application)
    record, summary = members_of(document, "TaskRecord"), members_of(document, "TaskSummary")
    completed = final(application, create(application, "echo", result={"a": 1}))
    running = create(application, "gate")
    gate.wait_for()
    assert set(record) == set(completed) == {*summary, "result"}
    assert set(ask(application, "GET", "/tasks").json["tasks"][0]) == set(summary)
    assert document["components"]["schemas"]["TaskSummary"]["required"] == list(summary)
    for one in (completed, running, poll(application, running)):
        for key, value in one.items():
            assert matches(record[key], value), key
    never_null = {"id", "name", "status", "type", "created_at"}
    for key, schema in record.items():
        assert ("null" not in schema.get("type", "null")) == (key in never_null), key
        assert schema["description"]
    assert record["id"]["format"] == "uuid" and record["created_at"]["format"] == "date-time"


def test_the_health_that_is_described_is_the_one_that_is_answered(application):
    health = members_of(taskserver.openapi(application), "Health")
    answer = ask(application, "GET", "/healthz").json
    assert set(answer) == set(health)
    for key, value in answer.items():
        assert matches(health[key], value), key


def test_payloads_are_open_and_what_a_type_declares_stands_in_its_own_body():
    document = taskserver.openapi(taskserver.demo())
    for name, key in (("CreateTask", "seconds"), ("CreatePrimes", "limit")):
        body = document["components"]["schemas"][name]
        assert body["additionalProperties"] is True and body["required"] == ["name"]
        assert matches(body["properties"][key], 5) and not matches(body["properties"][key], -1)
        assert "default" not in body["properties"][key]  # or some clients demand it
        pattern = body["properties"]["name"]["pattern"]  # some tools match from the start alone
        assert re.match(pattern, "   a") and not re.search(pattern, "  \n ")


def test_the_refusals_that_are_answered_are_described(application):
    document = taskserver.openapi(application)
    application.checks.append(taskserver.host_check([]))
    record = create(application, "echo")
    for method, target, path, body, more in (
        ("POST", "/create-echo", "/create-echo", b"{", {}),
        ("POST", "/create-echo", "/create-echo", b"{}", {"content_type": "text/plain"}),
        ("POST", "/create-echo", "/create-echo", b"{}", {"host": "evil.example"}),
        ("POST", "/create-echo", "/create-echo", b"{}", {"idempotency_key": "5"}),
        ("GET", "/poll-echo/5", "/poll-echo/{id}", b"", {}),
        ("GET", f"/poll-echo/{uuid.uuid4()}", "/poll-echo/{id}", b"", {}),
        ("GET", f"/poll-echo/{record['id']}?wait=x", "/poll-echo/{id}", b"", {}),
        ("POST", f"/cancel-echo/{uuid.uuid4()}", "/cancel-echo/{id}", b"", {}),
        ("POST", f"/cancel-echo/{uuid.uuid4()}", "/cancel-echo/{id}", b"", {"origin": "null"}),
        ("GET", "/tasks?limit=x", "/tasks", b"", {}),
    ):
        answer = ask(application, method, target, body, **more)
        assert answer.status >= 400
        responses = document["paths"][path][method.lower()]["responses"]
        refusal = resolved(document, responses[str(answer.status)])
        schema = resolved(document, refusal["content"]["application/json"]["schema"])
        assert list(schema["properties"]) == list(answer.json) == schema["required"] == ["error"]


def in_lines(payload, report):
    """Do it.

    This is said in two lines,
    and this is the second.
    """


def test_what_is_said_of_a_function_in_several_lines_is_not_indented(application):
    application.task("lines")(in_lines)
    application.task("silent")(lambda payload, report: None)
    paths = taskserver.openapi(application)["paths"]
    text = "Do it.\n\nThis is said in two lines,\nand this is the second."
    assert paths["/create-lines"]["post"]["description"] == text
    assert paths["/create-silent"]["post"]["description"] == "Create a task of type silent."


def test_refusals_are_described_by_sentences(application):
    responses = taskserver.openapi(application)["components"]["responses"]
    assert len(responses) > 10
    for response in responses.values():
        assert response["description"].endswith(".") and response["description"].count(" ") > 3


def test_parameters_and_headers_are_described_with_their_types_and_bounds(application):
    document = taskserver.openapi(application)
    create = document["paths"]["/create-echo"]["post"]
    parameters = {
        parameter["name"]: parameter
        for _, _, operation in operations(document)
        for parameter in operation.get("parameters", ())
    }
    assert set(parameters) == {"Idempotency-Key", "id", "limit", "status", "type", "wait"}
    assert all(parameter["description"] for parameter in parameters.values())
    assert parameters["wait"]["schema"]["type"] == "number"
    assert parameters["limit"]["schema"]["maximum"] == 500
    assert parameters["Idempotency-Key"]["in"] == "header"
    for status in ("200", "201"):
        assert create["responses"][status]["headers"]["Location"]["description"]
    for status in ("409", "503"):
        refusal = resolved(document, create["responses"][status])
        assert refusal["headers"]["Retry-After"]["schema"]["type"] == "integer"
    assert document["info"]["description"] and document["info"]["license"]["identifier"] == "MIT"


@pytest.mark.parametrize("secured", [False, True])
def test_a_token_is_described_where_one_is_asked_for(application, secured):
    application.secured = secured
    document = taskserver.openapi(application)
    assert bool(document["security"]) == secured
    assert ("securitySchemes" in document["components"]) == secured
    assert ("401" in document["paths"]["/tasks"]["get"]["responses"]) == secured
    assert "401" not in document["paths"]["/"]["get"]["responses"]  # it needs no token
    health = document["paths"]["/healthz"]["get"]  # which tells more to those who send it
    assert health.get("security") == ([{"token": []}, {}] if secured else None)


def test_addresses_are_relative_to_where_the_description_is(application):
    (server,) = taskserver.openapi(application)["servers"]
    assert not server["url"].startswith(("/", "http"))


# -- 13. Live page ---------------------------------------------------------------------------------

# Here is what can be seen without a browser; the rest is in `.ci/browsers`.


def test_the_page_allows_its_own_script_and_style_and_nothing_else(application):
    answer = ask(application, "GET", "/")
    assert application.handle(request("GET", "/")).content_type == "text/html; charset=utf-8"
    policy = dict(
        part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert (
        policy["default-src"] == "'none'"
        and policy["connect-src"] == "'self'"
        and policy["frame-ancestors"] == "'none'"
    )
    for tag in "script", "style":
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), answer.body, re.DOTALL)
        assert (
            policy[tag + "-src"]
            == "'sha256-" + base64.b64encode(hashlib.sha256(text).digest()).decode() + "'"
        )
        assert answer.body.count(f"<{tag}".encode()) == 1
    assert "unsafe" not in str(policy)


def test_the_page_needs_nothing_from_outside_and_makes_no_html_of_text():
    markup, script = taskserver.PAGE.split("<script>")
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(", taskserver.PAGE.replace("location.origin", "")
    )
    assert re.findall(r"\b(?:src|href)=\"([^\"]*)\"", markup) == ["data:,"]
    assert not re.search(r"\son\w+=|\sstyle=", markup)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function"
        r"|localStorage|cookie",
        script,
    )


def test_the_page_asks_for_nothing_beside_its_own_address():
    """Below https://host/tasks/ of a proxy, its neighbours must not be asked."""
    markup, script = taskserver.PAGE.split("<script>")
    assert not re.search(r"""["'`]/[\w$]""", script)  # no path from the root
    assert "const here = location.origin + location.pathname" in script
    assert re.findall(r"\bfetch\((\w+) \+", script) == ["here"]
    assert script.count("fetch(") == 1
    assert not re.search(r"XMLHttpRequest|EventSource|WebSocket|sendBeacon|import\(", script)
    assert not re.search(r"<(?:form|button|input)[^>]* (?:form)?action=", markup)


def test_the_page_says_what_to_do_without_scripts():
    (advice,) = re.findall(r"(?s)<noscript>(.*?)</noscript>", taskserver.PAGE)
    assert "curl ADDRESS/tasks" in advice


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
# Chromium reads commands from descriptor 3 and writes answers to 4; the two arrive here under other
# numbers.
WIRE = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page in Chromium, driven over a DevTools pipe.

    `events` holds what it has told without being asked.
    """

    def __init__(self, home):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", WIRE, str(commands), str(answers)),
                *(CHROMIUM, "--user-data-dir=" + home, *CHROMIUM_FLAGS),
            ],
            pass_fds=(commands, answers),
            env=dict(os.environ, HOME=home),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands), os.close(answers)
        self.buffer, self.id, self.session, self.events = b"", 0, {}, []

    def open(self, url):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
        }
        self.call("Log.enable")
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        self.id += 1
        command = dict(self.session, id=self.id, method=method, params=params)
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.answers], [], [], LONG)[0], (
                    method + " was not answered in time"
                )
                self.buffer += os.read(self.answers, 1 << 16) or pytest.fail("Chromium ended")
            text, self.buffer = self.buffer.split(b"\0", 1)
            self.events.append(json.loads(text.decode()))
            if self.events[-1].get("id") == self.id:
                return self.events.pop()["result"]

    def js(self, code):
        return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get(
            "value"
        )

    def until(self, code):
        assert eventually(lambda: self.js(code)), "never true: " + code

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        os.close(self.commands), os.close(self.answers)


@pytest.mark.skipif(os.name != "posix" or not CHROMIUM, reason="needs Chromium")
def test_in_a_browser_a_task_is_created_moves_completes_and_its_name_stays_text(
    server, application, gate, tmp_path
):
    name = "<img src=x onerror=alert(1)> 'quoted'"
    with contextlib.closing(Browser(str(tmp_path))) as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.until("!!document.querySelector('option[value=gate]')")
        values = json.dumps(["gate", name, '{"result": "<b>done</b>"}'])
        browser.js(
            f"[fields.type.value, fields.name.value, fields.rest.value] = {values}; "
            "fields.rest.dispatchEvent(new Event('input', {bubbles: true})); "
            "document.querySelector('#create button').click()"
        )
        gate.wait_for()
        browser.until(
            f"(document.querySelector('#tasks h3') || {{}}).textContent === {json.dumps(name)}"
        )
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


def command(*flags, file=PROGRAM, program=None, text=None, **environment):
    """Return the status of a run that ends by itself, and what it printed.

    What runs is a file, or what `program` says; it gets the text on stdin.
    """
    environment = {**os.environ, "TASKSERVER_TOKEN": "", "COLUMNS": "200", **environment}
    done = subprocess.run(
        [sys.executable, *(program or [str(file)]), *flags],
        capture_output=True,
        input=text.encode() if text is not None else None,
        timeout=LONG,
        env=environment,
        check=False,
    )
    out, err = (text.decode().replace(os.linesep, "\n") for text in (done.stdout, done.stderr))
    return done.returncode, out, err


def refused(*flags, status=1, **more):
    """Return the one line with which a start is refused."""
    got, out, err = command(*flags, **more)
    assert (got, out) == (status, ""), err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


FLAGS = """
    --host --port --workers --cpu-workers --max-waiting --max-tasks --max-memory --keep --db --grace
    --allow-host --allow-anonymous --tls-cert --tls-key --verbose --quiet --self-check --version
"""


def test_help_and_version_are_printed():
    assert command("--version") == (0, f"taskserver {taskserver.__version__}\n", "")
    status, out, err = command("--help")
    assert (status, err) == (0, "")
    assert set(re.findall(r"(?m)^ +(?:-h, )?(--[a-z-]+)", out)) == {"--help", *FLAGS.split()}


def test_what_an_author_has_set_is_the_default_of_the_options(capsys):
    application = Application()
    application.store.keep, application.store.max_tasks = 71, 72
    application.pool.max_workers, application.pool.max_waiting = 73, 74
    application.cpu_pool.max_workers, application.store.max_memory = 75, 76 << 20
    with pytest.raises(SystemExit):
        taskserver.main(application, ["--help"])
    out = capsys.readouterr().out
    assert all(f"({value})" in out for value in range(71, 77))


def test_a_bound_of_bytes_that_an_author_has_set_holds_to_the_byte(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(
        "import taskserver\n"
        "application = taskserver.demo()\n"
        "application.store.max_memory = 1000\n" + AND_SERVE
    )
    with Program(file=file) as program, program.client() as client:
        for size, status in (900, 201), (200, 503):
            client.send(
                raw("POST", "/create-task", {"name": "x", "pad": "x" * size, "seconds": 60})
            )
            assert client.answer().status == status


CHECKS = ["a task in a thread", "a coroutine", "a child process", "a journal", "TLS"]


def self_check(**broken):
    """Run --self-check where some names of the program are something else.

    Return its status and the outcome of each check.
    """
    broken = "".join(f"taskserver.{name} = {value}\n" for name, value in broken.items())
    code = (
        "import sys\n"
        "def fail(*_, **__):\n"
        "    raise OSError('broken')\n"
        "sys.modules.update(dict.fromkeys(sys.argv.pop().split()))\n"  # there is no such module
        f"import taskserver\n{broken}taskserver.main()\n"
    )
    return lambda missing="": outcomes(
        command("--self-check", missing, program=["-c", code], PYTHONPATH=str(PROGRAM.parent))
    )


def outcomes(done):
    """Return the status, what each check has seen, and the last line."""
    status, out, err = done
    assert status == 1 or err == "", err
    first, *lines, last = out.splitlines()
    assert first.startswith(f"taskserver {taskserver.__version__}, Python ")
    assert sys.version.split()[0] in first
    assert sys.platform in first
    assert len(lines) == len(CHECKS)
    assert all(line.startswith("  " + check) for line, check in zip(lines, CHECKS))
    return status, [line.partition(": ")[2] for line in lines], last


def test_self_check_tries_each_kind_of_task_a_journal_and_tls():
    status, seen, last = outcomes(command("--self-check"))
    assert status == 0
    assert '{"seconds": 0.1}' in seen[0]
    assert '{"seconds": 0.1}' in seen[1]
    assert '{"limit": 10000, "primes": 1229}' in seen[2]
    if importlib.util.find_spec("_sqlite3"):
        assert "read again" in seen[3]
    if importlib.util.find_spec("_ssl"):
        assert "TLSv1." in seen[4]
    assert last == "all that is here works"


@pytest.mark.parametrize(
    "check, broken",
    [
        (0, {"wait_for_seconds": "fail"}),
        (1, {"is_coroutine_function": "lambda function: False"}),
        (2, {"Child.call": "fail"}),
        (3, {"SQLiteJournal.load": "lambda journal: []"}),
        (3, {"SQLiteJournal.save": "fail"}),
        (4, {"tls_context": "fail"}),
        (4, {"SELF_CHECK_PEM": "'no certificate'"}),
    ],
    ids=brief,
)
def test_self_check_that_finds_a_fault_says_so_and_ends_with_status_1(check, broken):
    status, seen, last = self_check(**broken)()
    if check == 3 and not importlib.util.find_spec("_sqlite3"):
        pytest.skip("this Python has no sqlite3")
    assert status == 1
    assert [n for n, text in enumerate(seen) if text.startswith("FAILED")] == [check]
    assert "works" not in last.replace("does not work", "")


@pytest.mark.parametrize("module, check", [("ssl _ssl", 4), ("sqlite3 _sqlite3", 3)])
def test_self_check_passes_nothing_that_it_cannot_try(module, check):
    status, seen, last = self_check()(module)
    assert status == 0
    assert [n for n, text in enumerate(seen) if text.startswith("not here")] == [check]
    assert last == "all that is here works"


WRONG_USAGE = """
    --nonsense | extra | --port | --port x | --port -1 | --port 65536 | --port 1.5 | --port 1_0
    --workers 0 | --workers -5 | --cpu-workers 0 | --max-waiting -1 | --max-tasks 0 | --max-memory 0
    --keep -1 | --keep nan | --keep x | --grace -0.1 | --tls-cert x | --tls-key x | --work 5
    --quiet=1 | --max-memory 1.5 | --self | --allow-host https://tasks.example/
    --allow-host tasks.example:8443 | --allow-host *.example | --allow-host é.example
"""


@pytest.mark.parametrize("flags", re.split(r" \| |\n +", WRONG_USAGE.strip()))
def test_wrong_usage_is_one_line_and_status_2(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        taskserver.main(Application(), flags.split())
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert "taskserver: " in err
    assert "--help" in err


def test_wrong_usage_of_the_program_is_status_2():
    assert "--nonsense" in refused("--nonsense", status=2)


def test_a_port_that_is_taken_or_an_address_that_is_not_ours_is_one_line_and_status_1():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = str(other.getsockname()[1])
        assert port in refused("--port", port)
    assert "192.0.2.1" in refused("--host", "192.0.2.1", "--allow-anonymous", "--port", "0")
    unknown = ["--host", "no.such.invalid", "--allow-anonymous", "--port", "0"]
    assert "no.such.invalid" in refused(*unknown)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "tasks.example"])
def test_a_foreign_address_is_refused_without_a_token_or_permission(host):
    err = refused("--host", host, "--port", "0")
    assert "TASKSERVER_TOKEN" in err
    assert "--allow-anonymous" in err


def lines_of_a_program_that_calls_main(code):
    """Return what a program prints in whose main() the server stops at once; it ends in time."""
    begin = """
import threading, time, taskserver

def run_and_stop(server, grace):
    threading.Thread(target=server.shutdown).start()
    return run(server, grace)

run, taskserver.run_until_stopped = taskserver.run_until_stopped, run_and_stop
"""
    out = subprocess.run(
        [sys.executable, "-c", begin + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=str(PROGRAM.parent),
        timeout=LONG,
        check=True,
    )
    return out.stdout.decode().splitlines()


def test_what_follows_main_in_a_program_is_not_cut_off():
    """The watchdog, which sees that the process ends, begins when Python begins to end."""
    code = """
for _ in range(2):
    try:
        taskserver.main(argv=["--port", "0", "--quiet"])
    except SystemExit as end:
        print("ended with", end.code, flush=True)
time.sleep(2.5)
print("not cut off", flush=True)
threading.Thread(target=time.sleep, args=(3600,)).start()
"""
    lines = lines_of_a_program_that_calls_main(code)
    assert lines.count("ended with 0") == 2 and lines[-1] == "not cut off"


def test_an_executor_that_a_program_begins_after_main_does_not_hold_it_up():
    code = """
try:
    taskserver.main(argv=["--port", "0", "--quiet"])
finally:
    from concurrent.futures import ThreadPoolExecutor
    ThreadPoolExecutor().submit(threading.Event().wait)
    print("begun", flush=True)
"""
    assert lines_of_a_program_that_calls_main(code)[-1] == "begun"


def test_a_start_that_fails_leaves_the_log_as_it_was():
    code = (
        "before = list(log.handlers)\n"
        "for _ in range(2):\n"
        "    try: main(argv=['--db', os.devnull + '/tasks.db', '--port', '0'])\n"
        "    except SystemExit as end: print('cannot be opened' in end.code)\n"
        "print(log.handlers == before)"
    )
    assert python(code).split() == ["True"] * 3


def test_a_foreign_address_is_served_with_permission_or_with_a_token():
    with Program("--host", "0.0.0.0", "--allow-anonymous") as program:
        assert program.ask("GET", "/tasks").status == 200
    with Program("--host", "0.0.0.0", "--verbose", token="s3cret") as program:
        assert program.ask("GET", "/tasks").status == 401
        assert program.ask("GET", "/tasks", b"", "Authorization: Bearer s3cret").status == 200
        assert program.ask("GET", "/tasks", b"", "Authorization: Bearer s3crex").status == 401
        assert program.ask("GET", "/healthz").status == 200
        assert program.stops(signal.SIGTERM) == 0
        assert "s3cre" not in program.log()
        assert "/tasks" in program.log()


def test_a_token_that_cannot_be_sent_is_refused():
    err = refused("--port", "0", TASKSERVER_TOKEN="two words")
    assert "TASKSERVER_TOKEN" in err
    assert "two words" not in err


def test_a_name_must_be_allowed_to_be_used():
    with Program("--allow-host", "tasks.example") as program, program.client() as client:
        for host, status in {
            b"evil.example": 421,
            b"tasks.example:80": 200,
            b"127.0.0.1": 200,
            b"localhost": 200,
        }.items():
            client.send(raw("GET", "/tasks").replace(b"Host: localhost", b"Host: " + host))
            assert client.answer().status == status


def test_a_journal_that_cannot_be_used_is_one_line_and_status_1(path, tmp_path):
    nowhere = str(tmp_path / "none" / "tasks.db")
    assert "choose another file" in refused("--port", "0", "--db", nowhere)
    with Program("--db", path):
        assert "stop the server that uses it" in refused("--port", "0", "--db", path)


def test_a_certificate_that_cannot_be_used_is_one_line_and_status_1(certificate, tmp_path):
    certificate, _ = certificate
    alone, none, empty = (str(tmp_path / name) for name in ("alone", "none", "empty"))
    pem = pathlib.Path(certificate).read_text(encoding="ascii")
    pathlib.Path(alone).write_text(pem.partition("-----BEGIN PRIVATE")[0], encoding="ascii")
    pathlib.Path(empty).write_text("")
    for cert, key in (
        (certificate, alone),
        (certificate, none),
        (none, certificate),
        (empty, certificate),
        (certificate, empty),
    ):
        err = refused("--port", "0", "--tls-cert", cert, "--tls-key", key)
        assert "TLS" in err
        assert cert in err
        assert key in err


def test_tls_is_spoken_on_request(certificate):
    import ssl

    with Program("--tls-cert", certificate[0], "--tls-key", certificate[1]) as program:
        assert " on https://127.0.0.1:" in program.hello[0]
        context = ssl.create_default_context(cafile=certificate[0])
        connection = http.client.HTTPSConnection(
            "127.0.0.1", program.port, timeout=LONG, context=context
        )
        connection.request("GET", "/healthz")
        assert json.loads(connection.getresponse().read().decode())["status"] == "ok"
        connection.close()


def test_the_first_lines_say_address_usage_and_whether_tasks_outlive_it(path):
    with Program() as program:
        address = f"http://127.0.0.1:{program.port}"
        version = taskserver.__version__
        assert program.hello[0].rstrip() == f"taskserver {version} on {address}"
        assert "curl" in program.hello[1]
        assert f"{address}/create-task" in program.hello[1]
        assert "memory" in program.hello[2]
        assert "--db" in program.hello[2]
    with Program("--db", path) as program:
        assert path in program.hello[2]


def test_the_log_has_two_lines_for_each_task():
    with Program() as program:
        record = program.ask("POST", "/create-task", {"name": "a\nb\x1b", "seconds": 0}).json
        program.final("/poll-task/" + record["id"])
        log = program.log(wait_for="completed")
        assert log.count(f"task {record['id']} created: type task, name 'a\\nb\\x1b'") == 1
        assert log.count(f"task {record['id']} completed") == 1
        assert "/poll-task" not in log


def test_quiet_leaves_the_lines_of_tasks_out_but_says_what_failed(holding, leash):
    first = """
        @application.task("fail")
        def fail(payload, report):
            raise ValueError("what it said")
    """
    program = holding("--quiet", "--grace", "0.2", first=first)
    path = program.create("thread", port=leash.port)
    let_go(leash.next()[0])
    assert program.final(path)["status"] == "completed"
    failed = [program.create("fail"), program.create("child-with-a-limit", port=leash.port)]
    for path in failed:
        assert program.final(path)["status"] == "failed"
    interrupted = program.create("coroutine", port=leash.port)
    assert eventually(lambda: program.ask("GET", interrupted).json["message"] == "begun")
    assert program.stops(signal.SIGTERM) == 0
    log = program.log()
    assert f"task {interrupted[-36:]} is interrupted by the stop" in log
    for word in " created", " completed":
        assert word not in log
    assert "serving http" in log
    assert "Traceback" in log  # that of the function
    for path, error in zip(failed, ["what it said", "timed out after 0.5 seconds"]):
        assert any(path[-36:] in line and error in line for line in log.splitlines())
    assert "stopping" in log


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


MODULE = """
import taskserver
application = taskserver.Application()

@application.task("x", cpu={cpu})
def work(payload, report):
    return __name__

if __name__ == "__main__":
    taskserver.main(application)
"""


@pytest.fixture
def package(tmp_path):
    """Make a package, and a module, that serve a task type; return the folder for PYTHONPATH."""

    def make(cpu):
        (tmp_path / "package").mkdir()
        for name in "package/__main__.py", "module.py":
            (tmp_path / name).write_text(MODULE.format(cpu=cpu))
        return os.pathsep.join([str(tmp_path), str(PROGRAM.parent)])

    return make


@pytest.mark.parametrize("how", ["package", "stdin", "command line"])
def test_a_program_that_no_child_can_import_is_refused_at_the_start(package, how):
    program, text = {
        "package": (["-m", "package"], None),
        "stdin": (["-"], MODULE.format(cpu=True)),
        "command line": (["-c", MODULE.format(cpu=True)], None),
    }[how]
    err = refused("--port", "0", program=program, text=text, PYTHONPATH=package(True))
    assert "taskserver: task type 'x': " in err
    assert "move the function into a module of its own" in err


@pytest.mark.parametrize("name, cpu", [("module", True), ("package", False)])
def test_a_program_that_is_run_as_a_module_serves(package, name, cpu):
    environment = {"PYTHONPATH": package(cpu)}
    with Program(command=["-m", name], environment=environment) as program:
        assert program.result("x") in ("__mp_main__", "__main__")


def test_primes_are_counted_and_computing_does_not_stop_polls():
    for limit, count in {0: 0, 2: 0, 3: 1, 4: 2, 10: 4, 100: 25}.items():
        assert taskserver.primes({"limit": limit}, print)["primes"] == count
    seen = set()
    with Program("--cpu-workers", "1") as program, program.client() as client:
        for limit, count in (200_000, 17_984), (2_000_000, 148_933):
            record = client.ask("POST", "/create-primes", {"name": "x", "limit": limit}).json
            while record["status"] == "pending":
                record = client.ask("GET", f"/poll-primes/{record['id']}?wait=0.05").json
                seen.add(record["progress"])
            assert record["result"] == {"limit": limit, "primes": count}
            if any(fraction and 0 < fraction < 1 for fraction in seen):
                return  # otherwise, this machine was too fast to be seen at work
    raise AssertionError(f"no report was seen, but {seen}")


@pytest.mark.parametrize("limit", [-1, 100_000_001, True, "5", 1.0, None])
def test_primes_refuses_what_is_no_limit(limit):
    with pytest.raises(ValueError, match="limit"):
        taskserver.primes({"limit": limit}, print)


@pytest.mark.parametrize("seconds", [-0.1, 3600.1, True, "5", None, [], math.nan, 10**400])
def test_the_demo_refuses_what_are_no_seconds(seconds):
    with pytest.raises(ValueError, match="seconds"):
        taskserver.wait_for_seconds({"seconds": seconds}, print)


def test_the_demo_waits_and_reports():
    reports = []
    result = taskserver.wait_for_seconds({"seconds": 0.02}, lambda *report: reports.append(report))
    assert result == {"seconds": 0.02}
    assert reports
    assert all(0 <= fraction <= 1 for fraction, _ in reports)


# -- 15. Guards ------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """A statement at the top level of a module."""

    section: int
    node: ast.AST
    uses: set  # the names that it looks up in the module, whenever that may be
    defines: set


def headings(source):
    """Return the headings of the sections, each with its line."""
    lines = enumerate(source.splitlines(), 1)
    return [(number, line) for number, line in lines if re.match(r"# -- \d+\. ", line)]


def statements(source):
    starts = [number for number, _ in headings(source)]
    found = []
    for node in ast.parse(source).body:
        section = sum(start <= node.lineno for start in starts)
        module = ast.Module(body=[node], type_ignores=[])
        code = compile(module, "", "exec", flags=annotations.compiler_flag, dont_inherit=True)
        found.append(Statement(section, node, looked_up(code), defined(node)))
    return found


def looked_up(code):
    """Return the names that the compiler has looked up in the module, in functions, too."""
    loads = ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS")
    names = {step.argval for step in dis.get_instructions(code) if step.opname in loads}
    return names.union(*(looked_up(part) for part in code.co_consts if hasattr(part, "co_consts")))


def defined(node):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def changed(node, classes):
    """Yield the names of those classes that get or lose an attribute in a statement."""
    for part in ast.walk(node):
        target = None
        if isinstance(part, ast.Attribute) and not isinstance(part.ctx, ast.Load):
            target = part.value
        elif isinstance(part, ast.Call) and getattr(part.func, "id", "") in ("setattr", "delattr"):
            target = part.args[0]
        if getattr(target, "id", "") in classes:
            yield target.id


def misplaced(source):
    """Return what stands in the wrong place, as (section, what is used or changed too early).

    No section knows a later one; no value is used above the line in which it is defined; no class
    gets an attribute elsewhere than in its own text. Within a section, functions and classes may
    follow those that use them.
    """
    found = statements(source)
    classes = {part.node.name for part in found if isinstance(part.node, ast.ClassDef)}
    first = {}
    for place, part in enumerate(found):
        for name in part.defines:
            first.setdefault(name, place)
    problems = []
    for place, part in enumerate(found):
        problems += [(part.section, f"{name}.") for name in changed(part.node, classes)]
        for name in part.uses & set(first):
            definition = found[first[name]]
            is_value = not isinstance(definition.node, (ast.FunctionDef, ast.ClassDef))
            if first[name] > place and (is_value or definition.section > part.section):
                problems.append((part.section, name))
    return sorted(problems)


def test_what_a_section_uses_stands_above_it_and_no_class_is_changed_elsewhere():
    assert misplaced(PROGRAM.read_text(encoding="utf-8")) == []


TWO_SECTIONS = """
# -- 1. One ---
class First:
    value = 1
    def method(self, parameter: Later, value=1):
        later = [later for later in parameter]  # a local name, though there is another one
        return helper() + value + len(later)

def helper():
    return 1

def early():
    {early}

# -- 2. Two ---
class Later(First):
    pass

def later():
    return Later()

VALUE = 2

def late():
    {late}
"""


@pytest.mark.parametrize(
    "early, late, expected",
    [
        ("pass", "return First, VALUE, later()", []),
        ("later = 1; return later", "First().value = 2", []),
        ("def later(): pass", "for VALUE in (1, 2): First().value", []),
        ("return Later", "pass", [(1, "Later")]),
        ("return lambda: [later() for _ in range(3)]", "pass", [(1, "later")]),
        ("return VALUE", "pass", [(1, "VALUE")]),
        ("class Local: value = VALUE", "pass", [(1, "VALUE")]),
        ("def local(value=VALUE): pass", "pass", [(1, "VALUE")]),
        ("pass", "First.more = 1", [(2, "First.")]),
        ("pass", "First.value += 1", [(2, "First.")]),
        ("pass", "First.value: int = 1", [(2, "First.")]),
        ("pass", "del First.value", [(2, "First.")]),
        ("pass", "setattr(First, 'more', 1)", [(2, "First.")]),
        ("pass", "for First.value in (1, 2): pass", [(2, "First.")]),
        ("pass", "return AFTER\n\nAFTER = 1", [(2, "AFTER")]),
    ],
)
def test_the_guard_of_the_order_sees_what_it_is_to_see(early, late, expected):
    assert misplaced(TWO_SECTIONS.format(early=early, late=late)) == expected


def test_program_and_tests_have_the_same_sections():
    found = [line for _, line in headings(PROGRAM.read_text(encoding="utf-8"))]
    mine = [line for _, line in headings(pathlib.Path(__file__).read_text(encoding="utf-8"))]
    assert mine[: len(found)] == found
    assert {len(line) for line in found} == {100}


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
            origin = pathlib.Path(importlib.util.find_spec(name).origin or "").resolve()
            assert "site-packages" not in origin.parts
            assert home in origin.parents or "lib-dynload" in origin.parts, name


def test_no_line_is_longer_than_100_columns_and_the_formatter_is_never_switched_off():
    for number, line in enumerate(PROGRAM.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 100, number
        assert not re.search(r"# *fmt: *(off|skip)", line), number


def test_the_repository_holds_four_files_and_what_is_hidden():
    home = PROGRAM.parent
    if not (home / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a checkout, and git")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=str(home), stdout=subprocess.PIPE, check=False
    )
    if listing.returncode:
        pytest.skip("git does not tell")
    names = {path.split("/")[0] for path in listing.stdout.decode().split("\0") if path}
    visible = {name for name in names if not name.startswith(".")}
    assert visible == {"taskserver.py", "test_taskserver.py", "README.md", "LICENSE"}


RULED_LINE = re.compile(r"(?m)^# ==== The core ends here\..* =+$")

CORE_AT_WORK = '''
import http.client, json, sys, threading
import taskserver

taskserver.WorkerPool.IDLE_SECONDS = 1000  # no child ends because it was idle for long
application = taskserver.Application()

@application.task("thread")
def work(payload, report):
    """Say what came, when the time has come."""
    report(0.5, "begun")
    if "wait" in payload:
        assert released.wait(30)
    report(0.75)
    return [payload["name"], __name__]

application.task("child", cpu=True)(work)
released = threading.Event()

def ask(method, target, body=None):
    client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    headers = {"Content-Type": "application/json"}
    client.request(method, target, json.dumps(body) if body else None, headers)
    answer = client.getresponse()
    record = json.loads(answer.read().decode())
    client.close()
    return answer.status, record

if __name__ == "__main__":
    server = taskserver.Server(("127.0.0.1", 0), application)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    for type, module in ("thread", "__main__"), ("child", "__mp_main__"):
        status, record = ask("POST", f"/create-{type}", {"name": "x"})
        assert (status, record["status"]) == (201, "pending"), record
        status, record = ask("GET", f"/poll-{type}/{record['id']}?wait=30")
        assert (status, record["result"]) == (200, ["x", module]), record
    status, record = ask("POST", "/create-thread", {"name": "waits", "wait": True})
    path = "thread/" + record["id"]
    assert ask("GET", f"/poll-{path}")[1]["status"] == "pending"
    assert ask("GET", f"/poll-{path}?wait=0.01")[1]["status"] == "pending"
    assert ask("POST", f"/cancel-{path}")[0] == 200
    released.set()
    assert ask("GET", f"/poll-{path}?wait=30")[1]["error"] == "cancelled: by request"
    assert ask("GET", "/tasks")[0] == 404  # that is beyond the core
    server.shutdown()
    serving.join(30)
    assert not serving.is_alive()
    print("well done")
'''


def test_a_copy_that_is_cut_off_where_the_core_ends_serves_and_ends_by_itself(tmp_path):
    source = PROGRAM.read_text(encoding="utf-8")
    (cut,) = RULED_LINE.finditer(source)
    assert len(cut.group()) == 100
    later = [line for _, line in headings(source[cut.start() :])]
    assert later[0].startswith("# -- 9. Monitoring")
    (tmp_path / "taskserver.py").write_text(source[: cut.start()], encoding="utf-8")
    (tmp_path / "work.py").write_text(CORE_AT_WORK)
    done = command(file=tmp_path / "work.py", PYTHONPATH=str(tmp_path))
    assert done == (0, "well done\n", "")


# -- 16. README ------------------------------------------------------------------------------------


def blocks(language, kind):
    return re.findall(rf"(?ms)^```{kind}\n(.*?)^```$", readme(language))


both = pytest.mark.parametrize("language", ["en", "ru"])


@both
def test_every_option_is_in_the_readme_with_its_default_and_no_other(language):
    flag = "--[a-z]+(?:-[a-z]+)*"
    help = re.sub(
        r"\s+",
        " ",
        command("--help")[1].split(
            "options:" if sys.version_info >= (3, 10) else "optional arguments:"
        )[1],
    )
    options = dict.fromkeys(re.findall(flag, command("--help")[1]))
    options.update(re.findall(rf"({flag}) [A-Z]+ (?:(?! --)[^()])*\(([\d.]+)\)", help))
    assert options["--keep"] == "3600"
    rows = dict(re.findall(rf"(?m)^\| `({flag})[^|]*\|([^|]*)\|", readme(language)))
    text = re.sub(r"(?m)^ *(?:curl|openssl|sudo|pip|py|wget|git) .*$", "", readme(language))
    assert set(re.findall(rf"`({flag})", text)) | set(
        re.findall(rf"taskserver\.py.*?({flag})", text)
    ) <= set(options)
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
            if "import distributed" in block or "import psycopg" in block:
                compile(block, str(file), "exec")  # .ci/dask and .ci/postgres run them
            else:
                with Program(file=file, cwd=str(tmp_path)) as program:
                    assert program.ask("GET", "/healthz").status == 200
        if "urlopen" in block:
            with Program() as program:
                file.write_text(
                    block.replace("127.0.0.1:8000", f"127.0.0.1:{program.port}"), encoding="utf-8"
                )
                status, out, err = command(file=file)
                assert (status, err) == (0, "") and out.strip() in readme(language)


def test_the_pool_in_the_readme_works(tmp_path):
    (block,) = [block for block in blocks("en", "python") if "run_in_executor" in block]
    file = tmp_path / "pool.py"
    file.write_text(block, encoding="utf-8")
    program = runpy.run_path(str(file))
    with program["fragile"]:
        application = program["application"]
        record = final(application, create(application, "legacy", seconds=0))
    assert (record["result"], record["message"]) == ("done", "9 of 10")


@both
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_curl_lines_of_the_readme_work(language, tmp_path):
    (tmp_path / "mytasks.py").write_text(
        next(block for block in blocks(language, "python") if "measure" in block), encoding="utf-8"
    )
    office = next(block for block in blocks(language, "python") if "def office_hours" in block)
    (tmp_path / "office.py").write_text(
        office.replace("8 <=", "0 <=").replace("< 18", "< 24"), encoding="utf-8"
    )
    with Program() as demo, Program(file=tmp_path / "mytasks.py") as own, Program(
        file=tmp_path / "office.py"
    ) as extended:
        task = extended.ask("POST", "/create-task", {"name": "sample", "seconds": 0})
        done, created = 0, {extended.port: task.json["id"]}
        for line in "".join(blocks(language, "sh")).replace("\\\n", " ").splitlines():
            if line.startswith("curl ") and "https:" not in line:
                port = own.port if "measure" in line else demo.port
                if "/uptime" in line or "/settled/" in line:
                    port = extended.port
                line = (
                    line.replace(":8000", f":{port}")
                    .replace('"seconds": 5', '"seconds": 1')
                    .replace("curl ", "curl -sS ", 1)
                )
                line = re.sub(
                    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
                    lambda _, port=port: created[port],
                    line,
                )
                answer = json.loads(
                    subprocess.check_output(["sh", "-c", line], timeout=LONG).decode()
                )
                assert list(answer) != ["error"], (line, answer)
                created[port] = answer.get("id", created.get(port))
                done += 1
    assert done >= 9


@both
def test_the_records_in_the_readme_have_the_keys_of_records(language):
    records = [
        json.loads(line)
        for block in blocks(language, "text")
        for line in block.splitlines()
        if line.startswith('{"id"')
    ]
    assert records
    for record in records:
        consistent(record)


@both
def test_the_sizes_in_the_readme_are_those_of_the_program(language):
    source = PROGRAM.read_text(encoding="utf-8")
    sizes = [len(source.splitlines()), source[: source.index("# ==== The core ends")].count("\n")]
    said = re.findall(r"(\d)[, \u00a0](\d{3}) (?:lines|строк)", readme(language))
    for size, (thousands, rest) in zip(sizes, said):
        assert abs(int(thousands + rest) - size) < 0.05 * size, size
    assert len(said) == len(sizes)


@both
def test_the_readme_says_what_each_endpoint_answers(language):
    application = taskserver.demo()
    application.secured = True
    taskserver.add_monitoring(application)
    taskserver.add_pages(application)
    found = set()
    for row in re.findall(r"(?m)^\| `(?:GET|POST) /.*$", readme(language)):
        request, answer, refusals = [cell.strip() for cell in row.strip("|").split("|")]
        method, target = request.split("`")[1].split()
        pattern = target.partition("?")[0].replace("TYPE", "task").replace("<id>", "{id}")
        (route,) = [
            route
            for route in application.router.routes
            if (route.method, route.pattern) == (method, pattern)
        ]
        said = {int(status) for status in re.findall(r"\b[1-5]\d\d\b", refusals)}
        assert said == set(route.refusals) - set(route.waived), request
        said = {int(status) for status in re.findall(r"\b[1-5]\d\d\b", answer)}
        assert said - {500} == set(route.statuses), request  # 500 is the most of a listing
        parameters = {parameter["name"] for parameter in route.parameters}
        assert set(re.findall(r"[?&](\w+)=", target)) <= parameters
        found.add((method, pattern))
    # The endpoints of a type stand there once, as those of TYPE.
    others = tuple(f"-{name}" for name in application.types if name != "task")
    routes = {
        (route.method, route.pattern)
        for route in application.router.routes
        if not route.pattern.replace("/{id}", "").endswith(others)
    }
    assert found == routes, "add a row to both tables of endpoints in README.md"


@both
def test_the_readme_lists_the_sections_of_the_program(language):
    said = re.findall(r"(?m)^\| (\d+ [A-Z][^|]*?) \|", readme(language))
    sections = headings(PROGRAM.read_text(encoding="utf-8"))
    assert said == [line[5:].rstrip("- ").replace(".", "", 1) for _, line in sections]


@both
def test_the_self_check_in_the_readme_is_that_of_the_program(language):
    def what_was_tried(text):
        return re.findall(r"(?m)^  (\S.*?): ", text)

    (block,) = [block for block in blocks(language, "text") if "all that is here works" in block]
    assert what_was_tried(block) == what_was_tried(command("--self-check")[1])
    assert block.startswith(f"taskserver {taskserver.__version__}, ")


def test_the_checks_and_endpoints_in_the_readme_work(tmp_path, monkeypatch):
    (block,) = [block for block in blocks("en", "python") if "application.checks" in block]
    file = tmp_path / "office.py"
    file.write_text(block, encoding="utf-8")
    program = runpy.run_path(str(file))
    application = program["application"]
    assert ask(application, "GET", "/uptime").json["seconds"] >= 0
    assert ask(application, "GET", f"/settled/{uuid.uuid4()}").status == 404
    assert set(taskserver.openapi(application)["paths"]) > {"/uptime", "/settled/{id}"}
    application.checks.clear()
    record = create(application, "task", seconds=0)
    answer = ask(application, "GET", f"/settled/{record['id']}")
    assert answer.json == {"status": "completed"}
    application.checks.append(program["office_hours"])
    for hour, status in ((7, 503), (8, 201), (17, 201), (18, 503)):
        now = time.struct_time((2026, 1, 1, hour, 0, 0, 3, 1, 0))
        monkeypatch.setattr(time, "localtime", lambda now=now: now)
        answer = ask(application, "POST", "/create-task", {"name": "sample", "seconds": 0})
        assert answer.status == status, hour
        for language in ("en", "ru") if status == 503 else ():
            assert json.dumps(answer.json) in readme(language)


def anchors(text):
    """Return what links to the headings of a text end in."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", text)
    titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall("(?m)^#+ (.*)$", text)]
    return {title.replace(" ", "-") for title in titles}


@both
def test_the_links_of_the_readme_lead_to_its_headings(language):
    links = re.findall(r"\]\(#([^)]*)\)", readme(language))
    assert links
    assert set(links) <= anchors(README.read_text(encoding="utf-8"))


@both
def test_the_readme_says_of_each_exercise_in_which_sections_it_belongs(language):
    tests = [name for name in globals() if name.startswith("test_exercise_")]
    said = re.findall(r"(?m)^(\d+)\. \*\*[^*]+\*\* +\(([^)]*\d)\)", readme(language))
    assert [int(number) for number, _ in said] == list(range(1, len(said) + 1))
    assert {f"{int(number):02}" for number, _ in said} == {name.split("_")[2] for name in tests}
    known = {line.split()[2] for _, line in headings(PROGRAM.read_text(encoding="utf-8"))}
    assert {f"{n}." for _, where in said for n in re.findall(r"\d+", where)} <= known


@both
def test_the_first_task_type_in_the_readme_has_eight_lines(language):
    block = blocks(language, "python")[0]
    assert len([line for line in block.splitlines() if line]) == 8


def test_both_languages_of_the_readme_have_the_same_headings_and_commands():
    def shape(language):
        text = re.sub(r"(?ms)^ *```.*?^ *```$", "", readme(language))
        return [len(marks) for marks in re.findall("(?m)^(#+) ", text)]

    english, russian = shape("en"), shape("ru")
    assert [level for level in english if level > 1] == [level for level in russian if level > 1]
    assert set(blocks("ru", "sh")) <= set(blocks("en", "sh"))


# -- 17. Exercises ---------------------------------------------------------------------------------
#
# What README.md sets as exercises is not there yet, so these are skipped unless their name is asked
# for: python -m pytest -k exercise_03


@pytest.fixture
def asked_for(request):
    """Skip what nobody has asked for by its name."""
    # What stands before "::" is a path, and a folder may have such a name as well.
    names = [argument.partition("::")[2] for argument in request.config.args]
    words = [request.config.getoption("keyword"), *names]
    if not any("exercise" in word for word in words):
        pytest.skip("an exercise of README.md: ask for it with -k")


exercise = pytest.mark.usefixtures("asked_for")


@exercise
def test_exercise_01_a_task_type_that_counts_words():
    application = taskserver.demo()
    record = final(application, create(application, "words", text="one two\n three "))
    assert record["result"] == {"words": 3}
    record = final(application, create(application, "words"))
    assert record["status"] == "failed" and "text" in record["error"]


@exercise
def test_exercise_02_healthz_says_how_long_the_server_has_been_up():
    application, begun = Application(), time.monotonic()
    assert eventually(lambda: time.monotonic() > begun + 1)  # this second does not count
    added = time.monotonic()
    taskserver.add_monitoring(application)

    def uptime():
        seconds = ask(application, "GET", "/healthz").json["uptime"]
        assert 0 <= seconds <= time.monotonic() - added + 0.5  # it may be rounded
        return seconds

    first = uptime()
    assert eventually(lambda: time.monotonic() > added + 0.1)
    assert eventually(lambda: uptime() > first)
    assert (
        "uptime" in taskserver.openapi(application)["components"]["schemas"]["Health"]["properties"]
    )
    application.checks.append(taskserver.token_check("secret"))
    assert ask(application, "GET", "/healthz").json == {"status": "ok"}


@exercise
def test_exercise_03_the_log_says_how_long_a_task_took(application, gate, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)

    def work(payload, report):
        nonlocal now
        now += 2.04

    lines = []
    application.log_task = lambda text, *arguments: lines.append(text % arguments)
    application.task("work")(work)
    application.pool.max_workers = 1
    first, second = create(application, "gate"), create(application, "work")
    gate.wait_for()
    now += 7
    gate.opened.set()
    final(application, second)
    assert eventually(lambda: len(lines) == 4)
    assert lines[2] == f"task {first['id']} completed after 7.0 seconds"
    assert lines[3] == f"task {second['id']} completed after 2.0 seconds"


@exercise
def test_exercise_04_tasks_can_be_listed_by_name(application):
    for name in ("alpha", "Beta", "alphabet", "line\nfeed"):
        final(application, create(application, "echo", name))

    def names(query):
        return [
            record["name"] for record in ask(application, "GET", f"/tasks?{query}").json["tasks"]
        ]

    assert names("name=ALPHA") == ["alphabet", "alpha"]
    assert names("name=beta&limit=1") == ["Beta"]
    assert names("name=beta&status=completed&type=echo") == ["Beta"]
    assert names("name=beta&status=failed") == names("name=x") == []
    assert names("name=E%0AF") == ["line\nfeed"]
    described = taskserver.openapi(application)["paths"]["/tasks"]["get"]["parameters"]
    assert "name" in [parameter["name"] for parameter in described]


@exercise
def test_exercise_05_a_result_can_be_had_alone(application, gate):
    application.task("fail")(fail)
    done = final(application, create(application, "echo", result=[1, "two"]))
    failed = final(application, create(application, "fail"))
    pending = create(application, "gate")

    def result(record, type=None, id=None):
        return ask(application, "GET", f"/result-{type or record['type']}/{id or record['id']}")

    assert (result(done).status, result(done).body) == (200, b'[1, "two"]')
    for record in pending, failed:
        assert result(record).status == 409
        path = f"/poll-{record['type']}/{record['id']}"
        assert path in result(record).json["error"]
    assert result(done, type="gate").status == result(done, id=uuid.uuid4()).status == 404
    document = taskserver.openapi(application)
    said = document["paths"]["/result-echo/{id}"]["get"]["responses"]["409"]
    if "$ref" in said:
        said = document["components"]["responses"][said["$ref"].rpartition("/")[2]]
    only_of_creates = (
        "The first create with this Idempotency-Key is just being stored; send it again."
    )
    assert said["description"] != only_of_creates


@exercise
def test_exercise_06_a_client_may_create_only_so_many_tasks_in_a_while(application):
    now = 100.0
    application.checks.append(taskserver.limit_creates(2, 60, clock=lambda: now))

    def ask_from(peer, path, method="POST"):
        asked = request(method, path, {"name": "x"} if method == "POST" else b"")
        return application.handle(asked._replace(peer=peer))

    def creates(peer, n, path="/create-echo"):
        return [ask_from(peer, path).status for _ in range(n)]

    assert creates("192.0.2.1", 3) == [201, 201, 429]
    for path in "/tasks", "/healthz", "/create-echo":
        assert ask_from("192.0.2.1", path, "GET").status in (200, 405)
    assert creates("192.0.2.2", 1) == [201]
    now += 61
    assert creates("192.0.2.1", 3, f"/cancel-echo/{uuid.uuid4()}") == [404] * 3
    assert creates("192.0.2.1", 1, "/%63reate-echo") == [201]
    now += 30
    assert creates("192.0.2.1", 3) == [201, 429, 429]
    now += 20
    refusal = ask_from("192.0.2.1", "/%63reate-echo")
    seconds = int(dict(refusal.headers)["Retry-After"])
    assert refusal.status == 429 and 1 <= seconds <= 60
    now += seconds + 0.5
    assert creates("192.0.2.1", 1) == [201]

    class Address(str):
        """One to which there are weak references."""

    addresses = weakref.WeakSet()
    for n in range(1000):
        address = Address(f"198.51.{n // 250}.{n % 250}")
        addresses.add(address)
        assert creates(address, 1) == [201]
    del address
    for n in range(3):
        now += 61
        assert creates(f"203.0.113.{n}", 1) == [201]

    def remembered():
        gc.collect()
        return len(addresses)

    assert eventually(lambda: remembered() < 10)


def note_and_end(payload, report):
    """Note in a file that this was called; then end in one way or another."""
    with open(payload["path"], "ab") as file:
        file.write(b"!")
    how = payload["how"]
    if how == "sleep":
        time.sleep(LONG)
    if how == "exit":
        os._exit(3)
    raise OSError(how)


@exercise
def test_exercise_07_a_function_that_fails_is_called_again(application, gate):
    calls = []

    def shaky(payload, report):
        calls.append(payload["name"])
        if calls.count(payload["name"]) < payload["works_at"]:
            raise OSError("not yet")
        return "done"

    def cancelled(payload, report):
        calls.append(payload["name"])
        gate(payload)
        try:
            report(1.0)
        except taskserver.Cancelled:
            if payload["name"] == "swallows it":
                raise OSError("in a hurry") from None
            raise

    application.task("shaky", retries=2)(shaky)
    application.task("cancelled", retries=2)(cancelled)
    record = final(application, create(application, "shaky", "a", works_at=3))
    assert (record["result"], calls.count("a")) == ("done", 3)
    record = final(application, create(application, "shaky", "b", works_at=9))
    assert (record["error"], calls.count("b")) == ("OSError: not yet", 3)
    records = [create(application, "cancelled", name) for name in ("raises it", "swallows it")]
    gate.wait_for(2)
    for record in records:
        ask(application, "POST", f"/cancel-cancelled/{record['id']}")
    gate.opened.set()
    errors = [final(application, record)["error"] for record in records]
    assert errors == ["cancelled: by request", "OSError: in a hurry"]
    assert calls.count("raises it") == calls.count("swallows it") == 1

    async def coroutine(payload, report):
        """Never called."""

    with pytest.raises(ValueError):
        application.task("coroutine", retries=1)(coroutine)


@exercise
def test_exercise_07_a_function_in_a_process_is_called_again_only_if_it_raises(
    application, tmp_path
):
    application.task("process", cpu=True, retries=2)(note_and_end)
    application.task("slow", cpu=True, retries=2, timeout=0.5)(note_and_end)
    for type, how, error, calls in (
        ("process", "raise", "OSError: raise", 3),
        ("process", "exit", "the child process died (exit status 3)", 1),
        ("slow", "sleep", "timed out after 0.5 seconds", 1),
    ):
        path = tmp_path / how
        record = final(application, create(application, type, path=str(path), how=how))
        assert (record["error"], path.stat().st_size) == (error, calls), how


@posix
@exercise
def test_exercise_07_a_copy_that_a_function_has_forked_calls_nothing_again(application, tmp_path):
    original, path = os.getpid(), tmp_path / "calls"

    def fork(payload, report):
        """Have a copy of this process raise."""
        if os.getpid() == original:
            copy = os.fork()
            if copy:
                os.waitpid(copy, 0)
                return
        note_and_end({"path": str(path), "how": "raise"}, report)

    application.task("fork", retries=2)(fork)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn: there are threads
        final(application, create(application, "fork"))
    assert path.stat().st_size == 1


@exercise
def test_exercise_08_a_client_can_wait_for_the_first_of_several(application, gate, monkeypatch):
    other = Gate()
    application.task("other")(other)
    watched = set()  # ids
    watch, unwatch = application.store.watch, application.store.unwatch

    def watch_and_note(task_id, wake):
        watched.add(task_id)
        watch(task_id, wake)

    def unwatch_and_note(task_id, wake):
        watched.discard(task_id)
        unwatch(task_id, wake)

    monkeypatch.setattr(application.store, "watch", watch_and_note)
    monkeypatch.setattr(application.store, "unwatch", unwatch_and_note)

    def open_other():
        if eventually(lambda: len(watched) == 2):
            other.opened.set()

    with contextlib.ExitStack() as stack:
        stack.callback(other.opened.set)
        first, second = create(application, "gate"), create(application, "other", result=2)
        query = f"ids={first['id']},{second['id']}"
        assert ask(application, "GET", f"/first?{query}").json == {"tasks": []}
        for ids in (str(uuid.uuid4()), f"{first['id']},{uuid.uuid4()}"):
            assert ask(application, "GET", f"/first?ids={ids}&wait=30").status == 404
        opener = threading.Thread(target=open_other)
        opener.start()
        begun = time.monotonic()
        answer = ask(application, "GET", f"/first?{query}&wait=30").json
        assert time.monotonic() - begun < 25, "it has waited until the end of its time"
        opener.join()
        assert answer == {"tasks": [poll(application, second)]}
        assert not watched
    gate.opened.set()
    final(application, first)
    answer = ask(application, "GET", f"/first?{query}&wait=30").json
    assert answer == {"tasks": [poll(application, first), poll(application, second)]}


@exercise
def test_exercise_09_tasks_with_a_higher_priority_begin_first(application, gate):
    order = []
    application.task("note")(lambda payload, report: order.append(payload["name"]))
    application.pool.max_workers = 1
    create(application, "gate")
    gate.wait_for()
    waiting = [create(application, "note", "usual")]
    for name, priority in (("low", -1), ("high", 5), ("gone", 5), ("next", 1), ("later", 1)):
        waiting.append(create(application, "note", name, priority=priority))
    for priority in ("1", 1.5, True, None):
        body = {"name": "x", "priority": priority}
        assert ask(application, "POST", "/create-note", body).status == 400, priority
    cancelled = ask(application, "POST", f"/cancel-note/{waiting[3]['id']}").json
    assert (cancelled["status"], application.pool.counts()) == ("failed", (5, 1))
    assert application.pool.oldest().name == "usual"

    def lives():
        gc.collect()
        return sum(isinstance(thing, taskserver.Live) for thing in gc.get_objects())

    before = lives()
    for n in range(100):
        record = create(application, "note", "gone, too", priority=n)
        ask(application, "POST", f"/cancel-note/{record['id']}")
    assert eventually(lambda: lives() <= before + 10)
    gate.opened.set()
    for record in waiting:
        final(application, record)
    assert order == ["high", "next", "later", "usual", "low"]


@exercise
def test_exercise_10_tasks_outlive_the_process_in_a_file_of_json_lines(tmp_path):
    path = tmp_path / "tasks.jsonl"
    place = f"taskserver:JSONLinesJournal({str(path)!r})"
    records = [
        Record(str(uuid.uuid4()), f"\u20ac{n}", "pending", "task", 1.5, payload=b"{}", sequence=n)
        for n in (1, 2, 3)
    ]
    done = records[0]._replace(
        status="completed", started_at=2.0, finished_at=3.25, result=b'"\\u20ac"', payload=None
    )
    gone = [records[1].id, str(uuid.uuid4())]
    assert loaded(place) == []
    assert saved_and_killed(place, records[::-1], gone, [done]) == ["done"] * 4
    assert loaded(place) == [done, records[2]]
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len([json.loads(line) for line in lines]) == 6  # four saved, two deleted
    with open(str(path), "ab") as file:
        file.write(b'{"id": "torn by a cra')
    assert loaded(place) == [done, records[2]]
    assert saved_and_killed(place, [records[1]]) == ["done"]
    assert loaded(place) == [done, records[1], records[2]]
