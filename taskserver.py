#!/usr/bin/env python3
# /// script
# requires-python = ">=3.7"
# ///
r"""An HTTP server for long work, in one file, with the standard library alone.

A client POSTs a task and gets a record with an id at once; a worker runs the task in the background; the client polls
the record until it is completed. `python3 taskserver.py` serves two task types to try that out. Your own are functions:

    import taskserver

    application = taskserver.Application()

    @application.task("thumbnail")               # POST /create-thumbnail, GET /poll-thumbnail/<id>
    def thumbnail(payload, report):              # payload: the posted object
        report(0.5, "half way")
        return {"size": 128}                     # the result; an exception makes the task fail

    if __name__ == "__main__":
        taskserver.main(application)

The file is one story: what a section uses stands above it. The way of a request through the sections:

    client                                                                        6 HTTP
      |  bytes --> Server, one loop: accepts, watches all connections --> Connection --> parse_request
      |                                                                                  | Request (4)
      |            a thread, where the answer may have to wait <-- or at once <----------+
      |                |                                                              5 Application
      |                +--> handle: checks (9), Router (4) --> _create: Record, pending  --> 2 Store (Lock: 1)
      |  <-- Response (4)                                 \--> _poll: the record as it is <--    |  saves it first: 8
      |                                                                                          |
      |                                      3 WorkerPool: a thread calls the function, here or in a child (10),
      |                                                    and replaces the record by one that is completed or failed

The core ends with section 6; what follows attaches to it: 7 Monitoring, 8 Durability, 9 Access, 10 Child processes,
11 OpenAPI, 12 Live page, 13 Running, 14 Demo and command line.

The stock request parser of `http.server` is not used: it ignores Transfer-Encoding, takes malformed requests for
others, and needs most of the time that an answer takes.

Words: a *task* is one request to run a *task type*, that is, a function and its two endpoints. A *record* describes a
task; it is *pending* (it waits or runs), then *final*: *completed* or *failed*. The *payload* is what was posted, the
*result* what the function returned. The *store* holds records, a *worker* is a thread that runs tasks, a *pool* owns
workers, the *journal* is where records outlive the process. Durations are in seconds, sizes in bytes.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import email.utils
import functools
import hashlib
import hmac
import http
import http.client
import http.server
import importlib.util
import ipaddress
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import numbers
import os
import pickle
import queue
import re
import selectors
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
import urllib.parse
import uuid
from typing import Any, Callable, ClassVar, Dict, Generator, Iterable, Mapping, NamedTuple, NoReturn, TypeVar

__version__ = "1.0.0"

log = logging.getLogger("taskserver")


# -- 1. Lock -----------------------------------------------------------------------------------------


class ReadersWriterLock:
    """Many readers at once, or one writer alone; a writer that waits goes before readers that come later.

    `with lock.read:` and `with lock.write:` hold one side. Neither side may be asked for by a thread that holds one
    already: a writer between the two requests would wait for the first, and the second for the writer. Nothing slow
    may be done while holding a side, and a stream of writers keeps readers out.
    """

    def __init__(self) -> None:
        self.mutex = threading.Lock()  # guards the three below; held for a few instructions at a time
        self.readers = 0  # threads that read
        self.writers = 0  # threads that write or wait to
        self.writing = False
        self.may_read = threading.Condition(self.mutex)  # the last writer has left
        self.may_write = threading.Condition(self.mutex)  # a writer, or the last reader, has left
        self.read = _ReadSide(self)
        self.write = _WriteSide(self)


class _ReadSide:
    def __init__(self, lock: ReadersWriterLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock.mutex:
            while lock.writers:
                lock.may_read.wait()
            lock.readers += 1

    def __exit__(self, *exception: object) -> None:
        lock = self._lock
        with lock.mutex:
            lock.readers -= 1
            if lock.writers and not lock.readers:
                lock.may_write.notify()


class _WriteSide:
    def __init__(self, lock: ReadersWriterLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock.mutex:
            lock.writers += 1
            while lock.readers or lock.writing:
                lock.may_write.wait()
            lock.writing = True

    def __exit__(self, *exception: object) -> None:
        lock = self._lock
        with lock.mutex:
            lock.writing = False
            lock.writers -= 1
            if lock.writers:
                lock.may_write.notify()
            else:
                lock.may_read.notify_all()


# -- 2. Records and store ----------------------------------------------------------------------------

PENDING, COMPLETED, FAILED = "pending", "completed", "failed"

MAX_MESSAGE = 500  # characters of a reported message that are kept
MAX_ERROR = 2000  # characters of an error that are kept
MAX_RESULT = 1 << 20  # bytes of a result, encoded


def escape_surrogates(text: str) -> str:
    """Return a text as UTF-8 can hold it: a lone surrogate, say of the name of a file, becomes \\udc80."""
    return text.encode("utf-8", "backslashreplace").decode()


class Progress:
    """When a task was started and what it reported last: each one value, replaced as a whole, so that no lock is needed."""

    __slots__ = ("last", "started_at")

    def __init__(self) -> None:
        self.started_at: float | None = None
        self.last: tuple[float | None, str | None] = (None, None)

    def report(self, fraction: float, message: str | None = None) -> None:
        """Say how far the task is: from 0 to 1, and in words, or None to leave the words as they are.

        ValueError: no number from 0 to 1, or a message that is no text. Never blocks.
        """
        if not isinstance(fraction, numbers.Real) or not 0 <= fraction <= 1:
            raise ValueError(f"report() takes a number from 0 to 1 first, not {fraction!r:.100}")
        if message is None:
            message = self.last[1]
        elif not isinstance(message, str):
            raise ValueError(f"report() takes a text or None second, not {message!r:.100}")
        self.last = (float(fraction), message and escape_surrogates(message[:MAX_MESSAGE])[:MAX_MESSAGE])


class Record(NamedTuple):
    """What is known of a task. It never changes: the store replaces it by a successor."""

    id: str  # a uuid4 in lower case
    name: str
    status: str
    type: str
    created_at: float  # seconds since the epoch, as are the next two
    started_at: float | None = None
    finished_at: float | None = None
    progress: float | None = None  # 0.0 to 1.0
    message: str | None = None
    result: bytes | None = None  # JSON, encoded once, by the worker
    error: str | None = None
    payload: bytes | None = None  # JSON as it was posted; dropped when the task is final
    live: Progress | None = None  # of a pending task, beside which it changes; not part of what is journaled


@functools.lru_cache(maxsize=64)
def _whole_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def timestamp(seconds: float | None) -> str:
    """Return 1700000000.5 as the JSON of "2023-11-14T22:13:20.500Z" (RFC 3339), None as null."""
    if seconds is None:
        return "null"
    second, millisecond = divmod(int(seconds * 1000), 1000)
    return f'"{_whole_second(second)}.{millisecond:03d}Z"'


def _json(value: object) -> str:
    return "null" if value is None else json.dumps(value)  # which needs a surprising time for None


def encode_record(record: Record, with_result: bool = True) -> bytes:
    """Return the record as the JSON that a client sees, with what its task has reported until now."""
    id, name, status, type, created_at, started_at, finished_at, progress, message, result, error, _, live = record
    if live:
        started_at, (progress, message) = live.started_at, live.last
    text = (
        f'{{"id": "{id}", "name": {json.dumps(name)}, "status": "{status}", "type": "{type}", '
        f'"created_at": {timestamp(created_at)}, "started_at": {timestamp(started_at)}, '
        f'"finished_at": {timestamp(finished_at)}, "progress": {_json(progress)}, "message": {_json(message)}, '
    )
    if with_result:
        text += f'"result": {result.decode() if result else "null"}, '
    return f'{text}"error": {_json(error)}}}'.encode()


_encode_and_keep = functools.lru_cache(maxsize=1024)(encode_record)


def encode_poll(record: Record) -> bytes:
    """Return the same as `encode_record`; faster for a final record, which is asked for again and never changes."""
    small = len(record.result or b"") < 4096  # so that what is kept takes some megabytes at most
    return _encode_and_keep(record) if small and record.status != PENDING else encode_record(record)


_ENCODER = json.JSONEncoder(allow_nan=False)


def encode_result(value: object) -> bytes:
    """Return what a function has returned as JSON. ValueError: JSON cannot hold it, or it is too large."""
    try:
        encoded = _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the result cannot be written as JSON: {error}") from None
    if len(encoded) > MAX_RESULT:
        raise ValueError(f"the result has {len(encoded)} bytes as JSON, at most {MAX_RESULT} are kept")
    return encoded


class TaskError(Exception):
    """An error whose text becomes the record's as it is; a second argument goes to the log alone."""

    def __init__(self, error: object = "", trace: str = "") -> None:
        super().__init__(error)
        self.trace = trace


def describe(exception: BaseException) -> str:
    """Return ValueError("no such host") as "ValueError: no such host", and the text of a TaskError alone."""
    name = "Exception"
    try:
        name = str(type(exception).__name__) or name
        text = str(exception)
        if text and not isinstance(exception, TaskError):
            text = f"{name}: {text}"
        return escape_surrogates((text or name)[:MAX_ERROR])[:MAX_ERROR]
    except BaseException:  # an exception may break whatever looks at it
        return f"{name}: (an exception that cannot say what it is)"


def traceback_of(exception: BaseException) -> str:
    """Return what the log is to say of an exception: its traceback, or what came with a TaskError."""
    with contextlib.suppress(BaseException):
        if not isinstance(exception, TaskError):
            return "".join(traceback.format_exception(type(exception), exception, exception.__traceback__)).rstrip()
        return exception.trace
    return ""


class Unavailable(Exception):
    """What cannot be done now: one sentence, and in how many seconds it may be tried again."""


class JournalError(Unavailable):
    """A record cannot be made durable."""


class Store:
    """The records by id: a dict behind a readers-writer lock, bounded in number and in time.

    A final record stays for `keep` seconds; then `evict` drops it. With a `journal`, a record is in there before it can
    be seen, and `add`, `save` and `finish` block until it is. A journal is any object with three methods: `load()`
    returns the records in the order of their creation; `save(record)` blocks until that one is durable, and is called by
    many threads; `delete(ids)` does not block. Whatever exception `save` raises means that the record is not written.
    """

    FAILING_SECONDS = 30.0  # after a failure, in which the journal counts as failing unless a save succeeds

    def __init__(self, keep: float = 3600, max_tasks: int = 100_000, journal: Any = None,
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        self.keep, self.max_tasks, self.journal = keep, max_tasks, journal
        self.stopping = False  # set once, by any thread
        self._clock = clock
        self._failed_at = -math.inf  # when the journal did, by the monotonic clock; one value, replaced as a whole
        self._lock = ReadersWriterLock()  # guards all below
        # In the order of creation; reversed() takes a plain dict since Python 3.8 only.
        self._records: dict[str, Record] = {} if sys.version_info >= (3, 8) else collections.OrderedDict()
        self._held = 0  # records, and places kept for such as are being saved
        self._failed = 0  # records
        self._finished: collections.deque[tuple[float, str]] = collections.deque()  # when by the clock, and id; oldest first
        self._awaited: dict[str, threading.Event] = {}  # by id: set when the record becomes final

    @property
    def failing(self) -> bool:
        """Whether the journal cannot be written."""
        return time.monotonic() - self._failed_at < self.FAILING_SECONDS

    def counts(self) -> dict[str, int]:
        """Return the number of final records by status."""
        with self._lock.read:
            return {COMPLETED: len(self._finished) - self._failed, FAILED: self._failed}

    def get(self, id: str) -> Record:
        """Return a record. KeyError: unknown or evicted."""
        with self._lock.read:
            return self._records[id]

    def newest(self, limit: int) -> list[Record]:
        """Return at most so many records, the newest first."""
        with self._lock.read:
            return list(itertools.islice(reversed(self._records.values()), limit))

    def add(self, record: Record) -> None:
        """Put in a new record. Unavailable: `max_tasks` are held, or JournalError. Neither leaves anything behind."""
        if self._held >= self.max_tasks:  # a glance; it is judged below
            self.evict()
        with self._lock.write:
            if self._held >= self.max_tasks:
                seconds = self._finished[0][0] + self.keep - self._clock() if self._finished else self.keep
                raise Unavailable("As many tasks are held as --max-tasks allows; try again when the oldest final one has "
                                  "outlived --keep.", seconds)  # fmt: skip
            self._held += 1
            if self.journal is None:
                return self._insert(record)
        try:
            self._save_once(record)
        except JournalError:
            with self._lock.write:
                self._held -= 1
            raise
        with self._lock.write:
            self._insert(record)

    def save(self, record: Record) -> None:
        """Have a record outlive a crash, if there is a journal; nobody sees it yet. Tries until that has worked."""
        pauses = itertools.chain((0.1, 0.3, 1, 3), itertools.repeat(10))
        while self.journal is not None:
            try:
                return self._save_once(record)
            except JournalError:
                time.sleep(next(pauses))  # nothing tells when a disk has room again

    def finish(self, record: Record) -> None:
        """Replace a record by its final successor, once that is saved, and wake who waits for it."""
        self.save(record)
        with self._lock.write:
            self._insert(record)
            awaited = self._awaited.pop(record.id, None)
        if awaited:
            awaited.set()

    def wait(self, id: str, seconds: float) -> Record:
        """Return a record once it is final, or as it is after so many seconds. KeyError: unknown or evicted.

        Blocks, but holds no lock meanwhile.
        """
        with self._lock.write:
            pending = self._records[id].status == PENDING and not self.stopping
            awaited = self._awaited.setdefault(id, threading.Event()) if pending else None
        if awaited:
            awaited.wait(seconds)
        return self.get(id)

    def evict(self) -> None:
        """Drop final records that have outlived their time, but not so many that readers would have to wait for long."""
        ids: list[str] = []
        with self._lock.write:
            oldest = self._clock() - self.keep
            while self._finished and self._finished[0][0] <= oldest and len(ids) < 10_000:
                ids.append(self._finished.popleft()[1])
                self._failed -= self._records.pop(ids[-1]).status == FAILED
            self._held -= len(ids)
        if ids and self.journal is not None:
            try:
                self.journal.delete(ids)
            except BaseException as error:  # then they are evicted once more after the next start
                log.error("the journal has not deleted %d records: %s", len(ids), describe(error))

    def recover(self) -> list[Record]:
        """Take in what the journal holds; return those records that are pending."""
        records = [] if self.journal is None else self.journal.load()
        records = [record._replace(live=Progress()) if record.status == PENDING else record for record in records]
        now = time.time()
        with self._lock.write:
            for record in records:
                self._insert(record, min(max(0.0, now - (record.finished_at or now)), self.keep))
            self._finished = collections.deque(sorted(self._finished))
            self._held = len(self._records)
        return [record for record in records if record.live]

    def stop(self) -> None:
        """Wake all who wait; nobody waits from now on."""
        with self._lock.write:
            self.stopping = True
            awaited = list(self._awaited.values())
        for event in awaited:
            event.set()

    def _insert(self, record: Record, age: float = 0.0) -> None:
        """Put a record into its place; if it is final, as so many seconds old. The write side is held."""
        self._records[record.id] = record
        if record.status != PENDING:
            self._finished.append((self._clock() - age, record.id))
            self._failed += record.status == FAILED

    def _save_once(self, record: Record) -> None:
        try:
            self.journal.save(record)
        except BaseException as error:
            if not self.failing:
                log.error("the journal fails and will be tried again: %s", describe(error))
            self._failed_at = time.monotonic()
            raise JournalError("The journal cannot be written; try again later.", 5) from error
        self._failed_at = -math.inf


# -- 3. Workers --------------------------------------------------------------------------------------


class WorkerPool:
    """Threads that are made when there is work, and end when there has been none for a while.

    Each takes one item after the other out of the queue and calls `work` with it, which lets no exception out. As
    a rule one worker at a time is on its way to the queue; when it finds more than it takes, it sends the next one.
    So a burst of short items wakes few threads, and long ones get a thread each.
    """

    IDLE_SECONDS = 10.0  # without work, after which a worker ends

    def __init__(self, name: str, work: Callable[[Any], None], max_workers: float = math.inf,
                 max_waiting: float = math.inf, at_end: Callable[[], object] = lambda: None):  # fmt: skip
        """`at_end` is called by each worker before it ends."""
        self.name, self.max_workers, self.max_waiting = name, max_workers, max_waiting
        self._work, self._at_end = work, at_end
        self._lock = threading.Lock()  # guards all below
        self._queue: collections.deque[Any] = collections.deque()
        self._items = 0  # in the queue or in work, and places kept for such as will be
        self._running = 0  # items in work
        self._workers = 0  # threads
        self._idle: list[threading.Lock] = []  # one for each idle worker, released to wake it; the last goes first
        self._on_the_way = False  # a worker was made or woken, and has not arrived yet
        self._at_rest = threading.Condition(self._lock)  # _running has become 0

    def counts(self) -> tuple[int, int]:
        """Return how many items wait and how many are in work."""
        with self._lock:
            return self._items - self._running, self._running

    def reserve(self, bounded: bool = True) -> None:
        """Keep a place for an item, for `submit` or `release`.

        Unavailable: all workers that there may be have work, and `max_waiting` items wait.
        """
        with self._lock:
            if bounded and self._items >= self.max_workers + self.max_waiting:
                raise Unavailable("As many tasks wait as --max-waiting allows; try again later.", 1)
            self._items += 1

    def release(self) -> None:
        """Give back a place that is not needed."""
        with self._lock:
            self._items -= 1

    def submit(self, item: Any) -> None:
        """Queue an item in its reserved place. It stays there until `send_worker`, which does for several items."""
        with self._lock:
            self._queue.append(item)

    def send_worker(self) -> None:
        """Wake or make a worker if there is something for it to do.

        The system may have no thread to give: call it again later.
        """
        if not self._queue:  # a glance without the lock: it is nearly always so, and whoever submits calls this afterwards
            return
        with self._lock:
            if not self._queue or self._on_the_way or not self._idle and self._workers >= self.max_workers:
                return
            self._on_the_way = True
            if self._idle:
                self._idle.pop().release()
                return
            self._workers += 1
        try:
            threading.Thread(target=self._run, name=self.name, daemon=True).start()
        except (RuntimeError, MemoryError):
            with self._lock:
                self._workers -= 1
                self._on_the_way = False

    def drop(self) -> int:
        """Empty the queue; return how many items were in it."""
        with self._lock:
            dropped = len(self._queue)
            self._queue.clear()
            self._items -= dropped
            return dropped

    def join(self, seconds: float) -> None:
        """Wait until nothing is in work, at most so many seconds."""
        with self._lock:
            self._at_rest.wait_for(lambda: not self._running, seconds)

    def _run(self) -> None:
        woken = threading.Lock()
        woken.acquire()
        while True:
            with self._lock:
                self._on_the_way = False  # here it is
            while True:
                with self._lock:
                    if not self._queue:
                        self._idle.append(woken)
                        break
                    item = self._queue.popleft()
                    self._running += 1
                self.send_worker()
                self._work(item)
                with self._lock:
                    self._items -= 1
                    self._running -= 1
                    if not self._running:
                        self._at_rest.notify_all()
            if not woken.acquire(timeout=self.IDLE_SECONDS):
                with self._lock:
                    ends = woken in self._idle
                    if ends:
                        self._idle.remove(woken)
                        self._workers -= 1
                if ends:
                    self._at_end()
                    return
                woken.acquire()  # it has been sent in this moment


# -- 4. Requests, responses, routes ------------------------------------------------------------------


class Fields(NamedTuple):
    """The headers of a request and what follows from them."""

    headers: Mapping[str, str] = {}  # names in lower case; the values of several lines joined by ", "
    length: int = 0  # bytes of the body, unless that is chunked
    chunked: bool = False
    keep_alive: bool = True
    expects_continue: bool = False
    minor: int = 1  # of the HTTP version: 1 for HTTP/1.1


class Request(NamedTuple):
    """One request as the application sees it."""

    method: str
    path: str  # percent-encoded, as it was sent
    query: str = ""  # the same
    host: str = ""  # the authority that it is meant for; "" where HTTP/1.0 names none
    fields: Fields = Fields()
    body: bytes = b""


class Response(NamedTuple):
    """One answer."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "application/json"


class HTTPError(Exception):
    """A refusal: a status and one sentence that says what to do."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(status, message)
        self.response = Response(status, json.dumps({"error": message}).encode(), headers)


Endpoint = Callable[..., Response]  # takes a request and, where the pattern ends in {id}, that segment


class Router:
    """Finds the endpoint of a request. The last segment of a pattern may be {id}."""

    def __init__(self) -> None:
        self._routes: dict[tuple[str | None, ...], dict[str, Endpoint]] = {}  # segments, None for {id} -> method -> endpoint
        self.match = functools.lru_cache(maxsize=1024)(self._match)  # who polls asks for one path again and again

    def add(self, method: str, pattern: str, endpoint: Endpoint) -> None:
        """Have an endpoint answer a method at a path; who answers GET answers HEAD as well."""
        segments: list[str | None] = [None if segment == "{id}" else segment for segment in pattern.split("/")]
        methods = self._routes.setdefault(tuple(segments), {})
        methods.update({method: endpoint, "HEAD": endpoint} if method == "GET" else {method: endpoint})
        self.match.cache_clear()

    def _match(self, method: str, path: str) -> tuple[Endpoint, tuple[str, ...]]:
        """Return an endpoint and its arguments. HTTPError 404: no such path; 405: no such method there.

        A path is split before it is decoded, once, so that %2F is no slash (RFC 3986, 2.4).
        """
        segments = tuple(path.split("/"))
        if "%" in path:
            segments = tuple(map(urllib.parse.unquote, segments))
        methods, arguments = self._routes.get(segments), segments[:0]
        if methods is None:
            methods = self._routes.get((*segments[:-1], None))
            arguments = segments[-1:]
        if methods and method in methods:
            return methods[method], arguments
        if methods is None and path != "*":  # which OPTIONS asks about for the server as a whole (RFC 9110, 9.3.7)
            raise HTTPError(404, "There is nothing at this path; GET /openapi.json lists what there is.")
        allow = ("Allow", ", ".join(sorted({"OPTIONS", *(methods or ("GET", "HEAD", "POST"))})))
        if method == "OPTIONS":
            return (lambda *_: Response(204, headers=(allow,))), ()
        raise HTTPError(405, f"This path takes another method: {allow[1]}.", allow)


MAX_DEPTH = 100  # of nested arrays and objects
MAX_DIGITS = 4300  # of an integer; the bound of newer Pythons

_NESTING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{\]}]', re.DOTALL)  # strings, the last one maybe cut short, and brackets


def decode_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body; stricter than `json`, and the same on every Python.

    HTTPError 400: no UTF-8 (RFC 8259, 8.1), no JSON, no object, a key twice, a lone surrogate, a number or a depth
    beyond bounds.
    """
    try:
        text = body.decode()
        if text.count("[") + text.count("{") > MAX_DEPTH:
            steps = (1 if token.group() in "[{" else -1 for token in _NESTING.finditer(text) if token.group()[0] != '"')
            if max(itertools.accumulate(steps), default=0) > MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails for a lone surrogate
    except UnicodeError:
        raise HTTPError(400, "Send the body in UTF-8, without lone surrogates.") from None
    except ValueError as error:
        raise HTTPError(400, f"Send a body of JSON: {error}.") from None
    if not isinstance(value, dict):
        raise HTTPError(400, 'Send one JSON object, such as {"name": "sample"}.')
    return value


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("an object has a key twice")
    return members


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS + digits.startswith("-"):
        raise ValueError(f"an integer has more than {MAX_DIGITS} digits")
    return int(digits)


def _finite_float(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text:.20} is not a number that JSON can hold")
    return float(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_members, parse_int=_bounded_int, parse_float=_finite_float,
                            parse_constant=_finite_float)  # fmt: skip


# -- 5. Application ----------------------------------------------------------------------------------

Report = Callable[..., None]  # report(fraction, message=None)
Function = TypeVar("Function", bound=Callable[[Dict[str, Any], Report], Any])

MAX_NAME = 256  # characters
MAX_WAIT = 30.0  # seconds of a long poll
MAX_QUICK = 16_384  # bytes of a body that is decoded without a thread; 1 MiB may take 0.3 seconds

_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class TaskType(NamedTuple):
    """A registered function, and where and how it is called."""

    name: str
    function: Callable[..., Any]
    pool: WorkerPool
    call: Callable[[Callable[..., Any], bytes, Report], bytes]  # returns the encoded result
    rerun: bool


def call_here(function: Callable[..., Any], payload: bytes, report: Report) -> bytes:
    """Call a function in this thread; return the encoded result."""
    return encode_result(function(json.loads(payload), report))


def ignore_report(fraction: float, message: str | None = None) -> None:
    """A `report` for where there is no way back; it can be pickled."""


class Application:
    """The task types, their endpoints, and the life of a task. It knows no sockets.

    Building one starts no thread, process or socket. Public attributes may be set until the first request; the
    bounds of the store and of the pools are the defaults of the options of `main`.
    """

    # A task that waits for a network costs a thread of some 16 KiB, so hundreds fit into the smallest machine; more of
    # them at once would sooner overrun the service that they wait for than be done earlier.
    WORKERS = 256
    MAX_WAITING = 10_000
    call_in_child: ClassVar[Callable[..., bytes]]  # how `cpu=True` functions are called: section 10 puts it here,
    end_child: ClassVar[Callable[..., object]]  # and what a worker that has called some does before it ends

    def __init__(self) -> None:
        self.store = Store()
        self.router = Router()
        self.before_request: list[Callable[[Request], None]] = []  # may raise HTTPError; must be quick; called twice at times
        self.quick: set[Endpoint] = set()  # endpoints that answer from memory, unless a query or a journal makes them wait
        self.types: dict[str, TaskType] = {}
        self.pool = WorkerPool("task", self._run, self.WORKERS, self.MAX_WAITING)
        self.cpu_pool = WorkerPool("cpu-task", self._run, os.cpu_count() or 1, self.MAX_WAITING, self.end_child)
        self.pools = [self.pool, self.cpu_pool]
        self.secured = False  # whether a check asks for a token

    def task(self, name: str, *, cpu: bool = False, timeout: float | None = None, executor: Any = None,
             rerun: bool = False) -> Callable[[Function], Function]:  # fmt: skip
        """Make a function a task type: POST /create-NAME creates a task, GET /poll-NAME/<id> polls it.

        The function gets the posted object and `report(fraction, message=None)`; what it returns is the result. It
        runs in a thread; with `cpu` in a process of its own, for at most `timeout` seconds; or where `executor` (as
        in `concurrent.futures`) runs it. `rerun`: after a crash it may run again.
        ValueError: a bad or taken name, options that exclude each other, or with `cpu` a function in another.
        """
        if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9-]*", name):
            raise ValueError(f"task type {name!r}: choose a name of lower-case letters, digits and hyphens")
        if cpu + (executor is not None) > 1 or timeout is not None and not (cpu and 0 < timeout <= 1e6):
            raise ValueError(f"task type {name!r}: use cpu=True, with or without a timeout= of at most a million seconds, or executor=")

        pool, call = self.pool, call_here
        if cpu:
            pool, call = self.cpu_pool, functools.partial(self.call_in_child, timeout)
        elif executor is not None:
            pool = WorkerPool("executor-task", self._run, self.pool.max_workers, self.pool.max_waiting)
            self.pools.append(pool)

            def call(function: Callable[..., Any], payload: bytes, report: Report) -> bytes:
                return encode_result(executor.submit(function, json.loads(payload), ignore_report).result())

        def register(function: Function) -> Function:
            if name in self.types:
                raise ValueError(f"task type {name!r}: choose another name, this one is taken")
            if cpu and "<" in getattr(function, "__qualname__", "<"):  # <lambda>, <locals>
                raise ValueError(f"task type {name!r}: with cpu=True, use a function at the top level of a module")
            self.types[name] = task_type = TaskType(name, function, pool, call, rerun)
            create, poll = (functools.partial(endpoint, task_type) for endpoint in (self._create, self._poll))
            self.router.add("POST", f"/create-{name}", create)
            self.router.add("GET", f"/poll-{name}/{{id}}", poll)
            self.quick.update((create, poll))
            return function

        return register

    def handle(self, request: Request, may_block: bool = True) -> Response | None:
        """Return the answer to a request. None: nothing was done, for it might block but must not. Raises nothing."""
        try:
            endpoint, arguments = self.check(request)
            journaled = request.method == "POST" and self.store.journal is not None
            quick = endpoint in self.quick and not (request.query or journaled or len(request.body) > MAX_QUICK)
            if not quick and not may_block:
                return None
            response = endpoint(request, *arguments)
            if may_block:
                self.send_workers()
            return response
        except HTTPError as refusal:
            return refusal.response
        except BaseException:  # SystemExit, too, ends this answer alone
            log.exception("an endpoint failed: %s %s", request.method, ascii(request.path))
            return HTTPError(500, "The server has a fault here; its log says more.").response

    def check(self, request: Request) -> tuple[Endpoint, tuple[str, ...]]:
        """Return what answers this request, judged without its body, and the arguments. HTTPError: it is refused."""
        for check in self.before_request:
            check(request)
        matched = self.router.match(request.method, request.path)
        if request.method == "POST":
            headers = request.fields.headers
            media_type = headers.get("content-type", "").partition(";")[0].strip(" \t").lower()
            if media_type != "application/json" or "content-encoding" in headers:
                raise HTTPError(415, "Send JSON that is not compressed, with Content-Type: application/json.")
        return matched

    def send_workers(self) -> None:
        """Have the tasks that were created begin. To be called often; does not block."""
        for pool in self.pools:
            pool.send_worker()

    # The two endpoints of a task type

    def _create(self, task_type: TaskType, request: Request) -> Response:
        name = decode_object(request.body).get("name")
        if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
            raise HTTPError(400, f'Send a "name": a string that is not blank, of at most {MAX_NAME} characters.')
        record = Record(str(uuid.uuid4()), name, PENDING, task_type.name, time.time(), payload=request.body,
                        live=Progress())  # fmt: skip
        try:
            if self.store.stopping:
                raise Unavailable("The server is stopping; try again when it is back.", 5)
            task_type.pool.reserve()
            try:
                self.store.add(record)
            except BaseException:
                task_type.pool.release()
                raise
        except Unavailable as error:
            sentence, seconds = error.args
            raise HTTPError(503, sentence, ("Retry-After", str(math.ceil(min(max(1, seconds), 1e9))))) from None
        log.info("task %s created: type %s, name %s", record.id, record.type, ascii(name))
        task_type.pool.submit(record)
        return Response(201, encode_record(record), (("Location", f"/poll-{record.type}/{record.id}"),))

    def _poll(self, task_type: TaskType, request: Request, id: str) -> Response:
        seconds = parameter(request, "wait", r"[0-9]+(\.[0-9]+)?") if request.query else None
        id = id.lower()
        try:
            record = self.store.get(id)
            if record.type != task_type.name:
                raise KeyError(id)
            if seconds:
                record = self.store.wait(id, min(float(seconds), MAX_WAIT))
        except KeyError:
            if not _UUID.fullmatch(id):
                raise HTTPError(400, "Poll with the id that create answered: 36 characters, with hyphens.") from None
            raise HTTPError(404, "No task of this type has this id; it may have been evicted.") from None
        return Response(200, encode_poll(record))

    # The life of a task, in a worker

    def _run(self, record: Record) -> None:
        """Run a task to its end, whatever that is. No exception crosses this border."""
        task_type, progress = self.types[record.type], record.live or Progress()
        progress.started_at = time.time()
        if not task_type.rerun:  # else it does not matter whether it had begun
            self.store.save(record._replace(started_at=progress.started_at))
        result, error = self._call(task_type, record, progress)
        fraction, message = progress.last
        status, fraction = (COMPLETED, 1.0) if error is None else (FAILED, fraction)
        self.store.finish(Record(record.id, record.name, status, record.type, record.created_at, progress.started_at,
                                 time.time(), fraction, message, result, error))  # fmt: skip
        if error is None:
            log.info("task %s completed", record.id)
        else:
            log.info("task %s failed: %s", record.id, ascii(error))

    def _call(self, task_type: TaskType, record: Record, progress: Progress) -> tuple[bytes | None, str | None]:
        """Call the function; return the encoded result and the error, one of them None."""
        try:
            return task_type.call(task_type.function, record.payload or b"", progress.report), None
        except BaseException as exception:  # SystemExit and KeyboardInterrupt, too, end a task and no worker
            error = describe(exception)
            log.warning("task %s: %s", record.id, traceback_of(exception) or ascii(error))
            return None, error


def parameter(request: Request, name: str, pattern: str) -> str | None:
    """Return a parameter of the query, None if it is not there. HTTPError 400: it is there twice or malformed."""
    values = [v for n, v in urllib.parse.parse_qsl(request.query, keep_blank_values=True) if n == name]
    if len(values) > 1 or values and not re.fullmatch(pattern, values[0]):
        raise HTTPError(400, f"Send {name} once, as a plain number.")
    return values[0] if values else None


# -- 6. HTTP -----------------------------------------------------------------------------------------

MAX_LINE = 8192  # bytes of a request line and of a header (RFC 9112, 3 asks for 8000 at least)
MAX_HEADERS = 16_384  # bytes of all headers
MAX_HEADER_COUNT = 100
MAX_BODY = 1 << 20  # bytes, decoded
MAX_CHUNK_LINE = 1024  # bytes of a chunk's size and extensions

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
_VALUE = rb"[\t\x20-\x7e\x80-\xff]*"  # RFC 9110, 5.5
_HOST = (  # RFC 3986, 3.2, without user information
    rb"(?:\[[0-9A-Fa-f]*:[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?")
# All that is printable but space, # and %, in a path ? too: browsers send more than RFC 3986, 3.3 allows.
_ESCAPED = rb"[%s]*(?:%%[0-9A-Fa-f]{2}[%s]*)*"  # any of these, and percent-encoded bytes
_PATH = _ESCAPED % ((rb'!"$&->@-~',) * 2)
_QUERY = _ESCAPED % ((rb'!"$&-~',) * 2)
_REQUEST_LINE = re.compile(  # RFC 9112, 3; origin-form, absolute-form, and asterisk-form among them
    rb"(%s) (?:(?i:https?)://(%s))?(%s)(?:\?(%s))? HTTP/([0-9])\.([0-9])" % (_TOKEN, _HOST, _PATH, _QUERY))
_HEADER = re.compile(rb"(%s):(%s)" % (_TOKEN, _VALUE))
_WELL_FORMED_HOST = re.compile(_HOST.decode())
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;%s)?" % _VALUE)  # RFC 9112, 7.1
# Control bytes, a bare LF, a bare CR (RFC 9112, 2.2); a CR at the end may still get its LF.
_FORBIDDEN = re.compile(rb"[^\t\r\n\x20-\x7e\x80-\xff]|(?<!\r)\n|\r(?!\n|\Z)")


# What a connection does while it waits: its phases, each with one deadline, in seconds, for the whole of it.
HEADER, BODY, RUNNING, ANSWER, IDLE, LINGER = "header", "body", "running", "answer", "idle", "linger"
PHASE_SECONDS = {HEADER: 10, BODY: 20, RUNNING: math.inf, ANSWER: 20, IDLE: 75, LINGER: 5}


def take(buffer: bytearray, size: int) -> bytes:
    """Remove and return the first bytes of a buffer."""
    taken = bytes(buffer[:size])
    del buffer[:size]
    return taken


def parse_request(buffer: bytearray, invite: Callable[[Request], Iterable[str]]) -> Generator[str, Any, Request]:
    """Take one request out of what has arrived; yields the phase whenever more has to come.

    `invite` is called with a request whose client wants to hear that its body is welcome.
    HTTPError: it is refused, and what follows on the connection has no meaning.
    """
    head = yield from _read_head(buffer)
    if not head.fields.chunked and not head.fields.length:
        return head
    if head.fields.expects_continue and not buffer:
        yield from invite(head)
    return head._replace(body=(yield from _read_body(head.fields, buffer)))


def _read_head(buffer: bytearray) -> Generator[str, Any, Request]:
    while True:
        start = 2 if buffer.startswith(b"\r\n") else 0  # one empty line is skipped (RFC 9112, 2.2)
        end = buffer.find(b"\r\n\r\n", start)
        if end >= 0:
            return parse_head(take(buffer, end + 4)[start:-4])
        # Not complete, but wrong already? The sender may be waiting for an answer.
        line, line_end, block = bytes(buffer[start:]).partition(b"\r\n")
        if _FORBIDDEN.search(buffer, start):
            raise HTTPError(400, "Send HTTP/1.1 without control characters, in lines that end in CR LF.")
        if line_end or len(line.rstrip(b"\r")) > MAX_LINE:
            parse_request_line(line)
        if len(block.rstrip(b"\r\n")) > MAX_HEADERS:
            raise HTTPError(431, f"Send at most {MAX_HEADERS} bytes of headers.")
        yield HEADER


def _read_body(fields: Fields, buffer: bytearray) -> Generator[str, Any, bytes]:
    if not fields.chunked:
        while len(buffer) < fields.length:
            yield BODY
        return take(buffer, fields.length)
    body = bytearray()
    while True:  # RFC 9112, 7.1
        match = _CHUNK_SIZE.fullmatch((yield from _read_until(b"\r\n", buffer, MAX_CHUNK_LINE, 400)))
        if not match:
            raise HTTPError(400, "Send chunk sizes in hexadecimal digits.")
        size = int(match.group(1), 16)
        if size == 0:
            break
        if len(body) + size > MAX_BODY:
            raise HTTPError(413, f"Send at most {MAX_BODY} bytes.")
        while len(buffer) < size + 2:
            yield BODY
        body += take(buffer, size)
        if take(buffer, 2) != b"\r\n":
            raise HTTPError(400, "Send chunks that are as long as they say.")
    buffer[:0] = b"\r\n"  # so that the end is the same with and without trailers
    trailers = yield from _read_until(b"\r\n\r\n", buffer, MAX_HEADERS, 431)
    _split_headers(trailers[2:])  # checked, and dropped
    return bytes(body)


def _read_until(end: bytes, buffer: bytearray, limit: int, status: int) -> Generator[str, Any, bytes]:
    """Return what stands before an end, if both are within a limit."""
    while buffer.find(end, 0, limit) < 0:
        broken = _FORBIDDEN.search(buffer)
        if broken or len(buffer) >= limit:
            raise HTTPError(400 if broken else status, f"Send lines that end in CR LF, at most {limit} bytes of them.")
        yield BODY
    return take(buffer, buffer.find(end) + len(end))[: -len(end)]


@functools.lru_cache(maxsize=512)  # who polls sends the same bytes again and again
def parse_head(head: bytes) -> Request:
    """Return a request without its body. HTTPError."""
    line, _, block = head.partition(b"\r\n")
    method, host, path, query, minor = parse_request_line(line)
    fields = parse_headers(block, minor)
    if method == "POST" and not fields.chunked and "content-length" not in fields.headers:
        raise HTTPError(411, "Send a Content-Length.")
    return Request(method, path, query, host or fields.headers.get("host", ""), fields)


def parse_request_line(line: bytes) -> tuple[str, str, str, str, int]:
    """Return b"GET /a?b HTTP/1.1" as ("GET", "", "/a", "b", 1): method, authority, path, query, minor version.

    HTTPError 400, 414, 505.
    """
    if len(line) > MAX_LINE:
        raise HTTPError(414, f"Send a request line of at most {MAX_LINE} bytes.")
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPError(400, "Send a request line such as GET /healthz HTTP/1.1, with correct percent-encoding.")
    method, host, path, query, major, minor = [(group or b"").decode() for group in match.groups()]
    if major != "1":
        raise HTTPError(505, "Use HTTP/1.1.")
    path = path or "/" if host else path
    try:
        well_formed = path.startswith("/") or (path, method, host) == ("*", "OPTIONS", "")
        if "%" in path + query:
            urllib.parse.unquote(f"{path}?{query}", errors="strict")
    except UnicodeDecodeError:
        well_formed = False
    if not well_formed:
        raise HTTPError(400, "Send a path that begins with a slash, and is UTF-8 where it is percent-encoded.")
    return method, host, path, query, int(minor)


@functools.lru_cache(maxsize=512)  # or the same headers with another path
def parse_headers(block: bytes, minor: int) -> Fields:
    """Return the headers of a request, and what RFC 9110 and 9112 make of them. HTTPError 400, 413, 417, 431, 501."""
    headers = _split_headers(block)
    host = headers.get("host", "")
    if not _WELL_FORMED_HOST.fullmatch(host) and (minor or "host" in headers):  # RFC 9112, 3.2
        raise HTTPError(400, "Send one well-formed Host.")
    length = headers.get("content-length", "0")
    coding = headers.get("transfer-encoding", "").lower()
    if "transfer-encoding" in headers:  # RFC 9112, 6.1 and 6.3
        if not minor or "content-length" in headers:
            raise HTTPError(400, "Send either Content-Length or, in HTTP/1.1, Transfer-Encoding.")
        if coding != "chunked":
            codings = [name.strip(" \t") for name in coding.split(",")]
            raise HTTPError(400 if "" in codings or "chunked" in codings[:-1] else 501, "Send it chunked, and that once.")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise HTTPError(400, "Send one Content-Length, a plain number.")
    if int(length) > MAX_BODY:
        raise HTTPError(413, f"Send at most {MAX_BODY} bytes.")
    options = {option.strip(" \t").lower() for option in headers.get("connection", "").split(",")}
    keep_alive = "close" not in options and bool(minor or "keep-alive" in options)
    expectation = headers.get("expect", "").lower() if minor else ""  # RFC 9110, 10.1.1
    if expectation not in ("", "100-continue"):
        raise HTTPError(417, "Expect nothing but 100-continue.")
    return Fields(headers, int(length), bool(coding), keep_alive, bool(expectation), minor)


def _split_headers(block: bytes) -> dict[str, str]:
    """Return names in lower case and values; several lines of one name are joined by ", " (RFC 9110, 5.3)."""
    lines = block.split(b"\r\n") if block else []
    if len(block) > MAX_HEADERS or len(lines) > MAX_HEADER_COUNT or max(map(len, lines), default=0) > MAX_LINE:
        raise HTTPError(431, f"Send at most {MAX_HEADER_COUNT} headers of {MAX_LINE}, in all {MAX_HEADERS} bytes.")
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if not match:
            raise HTTPError(400, "Send headers of the form Name: value, each in one line.")
        name, value = match.group(1).decode().lower(), match.group(2).decode("latin-1").strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


@functools.lru_cache(maxsize=64)  # the answers of one second begin alike
def _common_headers(status: int, content_type: str, connection: str, second: int) -> bytes:
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Date: {email.utils.formatdate(second, usegmt=True)}",
             "Cache-Control: no-store", "X-Content-Type-Options: nosniff"]  # fmt: skip
    if status != 204:
        lines.append(f"Content-Type: {content_type}")
    if connection:
        lines.append(f"Connection: {connection}")
    return "\r\n".join(lines).encode()


def encode_response(response: Response, request: Request | None, close: bool) -> bytes:
    """Return an answer as it is sent. `request` is None where it could not be read."""
    status, body, headers, content_type = response
    connection = "close" if close else "" if request and request.fields.minor else "keep-alive"
    head = _common_headers(status, content_type, connection, int(time.time()))
    for name, value in headers:
        head += f"\r\n{name}: {value}".encode()
    if status != 204:
        body += b"\n"  # or the prompt of a shell would follow in the same line
        head += b"\r\nContent-Length: %d" % len(body)
    return head + b"\r\n\r\n" + (b"" if request and request.method == "HEAD" else body)


RECEIVE_SIZE = 16_384  # bytes; a whole TLS record (RFC 8446, 5.1), so that none of it stays where no selector sees it


class Connection:
    """One client's socket, what has arrived on it, and the phase that it waits in.

    It belongs to the accept loop, which alone calls it. Nothing here blocks: what may is done by a thread of `server`.
    serve() is a coroutine: a generator that yields the phase to wait in, and is resumed by

        IDLE, HEADER, BODY    ready(): more has arrived, and is in the buffer
        RUNNING               resume(response), once a thread has it
        ANSWER                ready(): the socket takes more
        LINGER                ready(), to no purpose but to see the end
        HEADER, BODY          expire(), by a refusal that comes out of the yield as an HTTPError

    An OSError, whoever raises it, means that the connection is over.
    """

    __slots__ = ("buffer", "closing", "coroutine", "deadline", "peer", "phase", "server", "socket", "watched")
    would_block: tuple[Any, ...] = (BlockingIOError,)

    def __init__(self, sock: Any, peer: str, server: Server) -> None:
        self.socket, self.peer, self.server = sock, peer, server
        self.buffer = bytearray()  # what belongs to no request yet
        self.closing = False  # the answer under way is the last
        self.watched = 0  # the events that the selector waits for
        self.phase = ""
        self.coroutine = self.serve()  # suspended in a yield whenever there is something to wait for
        self.enter(HEADER)

    def enter(self, phase: str) -> None:
        """Wait in a phase; one that is new begins its deadline."""
        if phase is not self.phase:
            self.phase = phase
            self.deadline = time.monotonic() + PHASE_SECONDS[phase]

    def events(self) -> int:
        """Return what the selector has to wait for; 0 for nothing."""
        return selectors.EVENT_WRITE if self.phase is ANSWER else 0 if self.phase is RUNNING else selectors.EVENT_READ

    def ready(self) -> None:
        """Go on: the socket can be read, or takes more of an answer."""
        if self.phase is not ANSWER:
            try:
                data = self.socket.recv(RECEIVE_SIZE)
            except self.would_block:
                return
            if not data:
                raise ConnectionError
            self.buffer += data
        self.resume()

    def resume(self, response: Any = None) -> None:
        """Go on until there is something to wait for."""
        self.enter(self.coroutine.send(response))

    def expire(self) -> None:
        """End the phase, whose deadline has passed: refuse a request that has begun, else close."""
        if self.phase is not BODY and not (self.phase is HEADER and self.buffer):
            raise TimeoutError
        self.enter(self.coroutine.throw(HTTPError(408, "Send a request without long pauses.")))

    def serve(self) -> Generator[str, Any, None]:
        """Answer requests in their order. Yields the phase to wait in."""
        while not self.closing:
            # No name for the answer here: it may have a megabyte, and this frame lives as long as the connection.
            yield from self.send((yield from self.next_answer()))
            self.phase = ""  # the next one, even if it is called the same, has its own deadline
        # A plain close would reset the connection, and a client that is still sending would lose the answer. So end this
        # side only, and drop what still comes (RFC 9112, 9.6).
        self.end_sending()
        while True:
            self.buffer.clear()
            yield LINGER  # until ready() sees the end of what comes, or the deadline passes

    def next_answer(self) -> Generator[str, Any, bytes]:
        """Take a request and return its answer as it is sent. Yields RUNNING for the response of a thread."""
        request = None
        try:
            while not self.buffer:
                yield IDLE
            request = yield from parse_request(self.buffer, self.invite)
            response = self.server.application.handle(request, may_block=False)
            if response is None:
                self.server.lend(self, functools.partial(self.server.application.handle, request))
                response = yield RUNNING
        except HTTPError as refusal:
            response = refusal.response
        self.closing |= not request or not request.fields.keep_alive
        if log.isEnabledFor(logging.DEBUG):
            what = f"{request.method} {request.path!a}" if request else "no request"
            log.debug("%s %s: %d", self.peer, what, response.status)
        return encode_response(response, request, self.closing)

    def send(self, data: bytes) -> Generator[str, Any, None]:
        """Send all; yields while the socket takes no more."""
        while data:
            try:
                data = data[self.socket.send(data) :]
            except self.would_block:
                pass
            if data:
                yield ANSWER

    def invite(self, request: Request) -> Generator[str, Any, None]:
        """Tell the client that the body is awaited. HTTPError: it is not (RFC 9110, 10.1.1)."""
        self.server.application.check(request)
        yield from self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def end_sending(self) -> None:
        """Tell the client that nothing more comes."""
        self.socket.shutdown(socket.SHUT_WR)


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, watches them in one selector, and lends a thread to each request that may block.

    `ThreadingHTTPServer` gives a thread to every connection. Here one that is idle, or slow to send or to read, has
    none, and what can be answered from memory is answered by the accept loop: a thread would have to wait for
    the interpreter that the loop holds, and to be woken costs as much as the answer.
    """

    allow_reuse_address = os.name != "nt"  # on Windows it lets two servers share a port
    request_queue_size = 1024  # the kernel's; with the base class's 5 most of a burst of clients get no answer
    connection_class = Connection

    def __init__(self, address: tuple[str, int], application: Application) -> None:
        """Bind and listen. OSError: the address is taken, or is not of this machine."""
        self.application = application
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._max_connections = _raise_descriptor_limit()
        self._connections: set[Connection] = set()
        self._accepting = False
        self._refused_at = -math.inf  # when it was last logged that no connection can be accepted
        self._done: collections.deque[tuple[Connection, Any]] = collections.deque()  # what threads have done, and the response
        self._end = math.inf  # when answers under way are given up; set by any thread
        self._stopped = threading.Event()
        self._pool = WorkerPool("request", lambda work: work())
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        super().__init__(address, http.server.BaseHTTPRequestHandler)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind, without the look-up of the host's name in HTTPServer: it stalls where no resolver answers."""
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def serve_forever(self, poll_interval: float = 0.25) -> None:
        """Serve until `shutdown`: the accept loop. Every `poll_interval` seconds it does what is due."""
        self._selector.register(self._woken, selectors.EVENT_READ)
        next_tick = 0.0
        while self._end == math.inf or self._answering() and time.monotonic() < self._end:
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + poll_interval
                try:
                    self.service_actions()
                except Exception:
                    log.exception("something that is due from time to time failed")
            for key, _ in self._selector.select(max(0.0, next_tick - now)):
                if key.data:
                    self._act(key.data, key.data.ready)
                elif key.fileobj is self.socket:
                    self._accept()
                else:
                    self._woken.recv(4096)
            while self._done:
                connection, response = self._done.popleft()
                self._act(connection, functools.partial(connection.resume, response))
            self.application.send_workers()  # one for all that this round has created: to wake one costs as much as a create
        for connection in list(self._connections):
            self._close(connection)
        self._stopped.set()

    def shutdown(self, seconds: float = 2.0) -> None:
        """Have `serve_forever` end once the answers under way are sent, or so many seconds have passed.

        Waits for that, and so must not be called in its thread.
        """
        self._end = time.monotonic() + seconds
        self._wake()
        self._stopped.wait()

    def server_close(self) -> None:
        """Close the sockets; to be called after `serve_forever` has ended."""
        super().server_close()
        for resource in (self._selector, self._waker, self._woken):
            resource.close()

    def service_actions(self) -> None:
        """Do what is due from time to time (a hook of the base class)."""
        self.application.store.evict()
        self._pool.send_worker()
        now = time.monotonic()
        for connection in [c for c in self._connections if c.deadline < now]:
            self._act(connection, connection.expire)
        self._accept_again()

    def lend(self, connection: Connection, work: Callable[[], Any]) -> None:
        """Have a thread do `work`, which raises nothing, and resume the connection with what it returns."""

        def call() -> None:
            self._done.append((connection, work()))
            self._wake()

        self._pool.reserve()
        self._pool.submit(call)
        self._pool.send_worker()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the loop is about to wake anyhow; closed: there is none any more
            self._waker.send(b"\0")

    def _act(self, connection: Connection, act: Callable[[], None]) -> None:
        """Have a connection do something, then have the selector wait for what it waits for now."""
        try:
            act()
        except BaseException as error:
            if not isinstance(error, OSError):
                log.exception("a connection failed")
            self._close(connection)
            return
        events = connection.events()
        if events != connection.watched:
            if connection.watched:
                self._selector.unregister(connection.socket)
            if events:
                self._selector.register(connection.socket, events, connection)
            connection.watched = events

    def _close(self, connection: Connection) -> None:
        if connection in self._connections:  # it may have given way to another in this round of the loop
            self._connections.remove(connection)
            if connection.watched:
                self._selector.unregister(connection.socket)
            connection.socket.close()
            connection.coroutine.close()  # it and the connection refer to each other, which only the garbage collector would undo
            self._accept_again()

    def _accept(self) -> None:
        room = self._max_connections - len(self._connections)
        if room <= 0:
            self._refuse("all connections are in use")
        for _ in range(min(room, 100)):  # then the others have their turn
            try:
                sock, address = self.get_request()
            except (BlockingIOError, ConnectionError):  # no more, or gone already
                return
            except OSError as error:  # no descriptor left
                self._refuse(str(error))
                return
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = self.connection_class(sock, address[0], self)
            except (OSError, ValueError):  # gone by now
                sock.close()
                continue
            self._connections.add(connection)
            self._act(connection, connection.ready)  # its request may be here already

    def _refuse(self, reason: str) -> None:
        """Accept no more until a connection is closed or the next tick, else the loop would spin.

        The connection that has been idle for the longest time, at least some seconds, gives way.
        """
        self._selector.unregister(self.socket)
        self._accepting = False
        now = time.monotonic()
        if now - self._refused_at > 60:
            self._refused_at = now
            log.warning("new connections have to wait: %s", reason)
        idle = [connection for connection in self._connections if connection.phase is IDLE]
        oldest = min(idle, key=lambda connection: connection.deadline, default=None)
        if oldest and oldest.deadline - now < PHASE_SECONDS[IDLE] - 5:
            self._close(oldest)

    def _accept_again(self) -> None:
        if not self._accepting:
            self._selector.register(self.socket, selectors.EVENT_READ)
            self._accepting = True

    def _answering(self) -> bool:
        """Close what is at rest, let other connections end with their answer, and return whether there are any."""
        for connection in list(self._connections):
            if connection.phase in (RUNNING, ANSWER):
                connection.closing = True
            else:
                self._close(connection)
        return bool(self._connections)


def _raise_descriptor_limit() -> int:
    """Raise the limit of descriptors as far as it goes; return how many connections may be open at once: some fewer."""
    if issubclass(selectors.DefaultSelector, selectors.SelectSelector):  # Windows: select takes 512
        return 480
    import resource  # POSIX only

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in hard, max(soft, 10_240), soft:  # macOS refuses what it calls unlimited, but takes the second
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            break
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit - min(64, limit // 4)


# ==== The core ends here. Everything below is optional. ==============================================


# -- 7. Monitoring -----------------------------------------------------------------------------------

MAX_LIMIT = 500  # records of one listing


def add_monitoring(application: Application) -> None:
    """Add GET /healthz and GET /tasks."""

    def healthz(request: Request) -> Response:
        status = "stopping" if application.store.stopping else "journal failing" if application.store.failing else "ok"
        if status != "ok":
            return Response(503, json.dumps({"status": status}).encode())
        waiting, running = (sum(counts) for counts in zip(*(pool.counts() for pool in application.pools)))
        document = {"status": status, "waiting": waiting, "running": running, **application.store.counts(),
                    "types": list(application.types)}  # fmt: skip
        return Response(200, json.dumps(document).encode())

    def tasks(request: Request) -> Response:
        limit = int(min(float(parameter(request, "limit", "[0-9]+") or 50), MAX_LIMIT))
        records = application.store.newest(limit)
        return Response(200, b'{"tasks": [%s]}' % b", ".join(encode_record(record, False) for record in records))

    application.router.add("GET", "/healthz", healthz)
    application.router.add("GET", "/tasks", tasks)
    application.quick.add(healthz)


# -- 8. Durability -----------------------------------------------------------------------------------


def recover(application: Application) -> None:
    """Take over what the last process left: run what it had not begun, and settle what it was running."""
    for record in application.store.recover():
        task_type = application.types.get(record.type)
        if task_type and (task_type.rerun or record.started_at is None):
            task_type.pool.reserve(bounded=False)
            task_type.pool.submit(record)
        else:
            why = "the server ended while it ran" if task_type else "the server has no such task type any more"
            application.store.finish(record._replace(status=FAILED, finished_at=time.time(), error=f"interrupted: {why}",
                                                     payload=None, live=None))  # fmt: skip
    application.send_workers()


_FIELDS = Record._fields[:-1]  # all but `live`
_COLUMNS = ", ".join(_FIELDS)
_VERSION = 1  # of the schema; in the file as user_version, so that a later version can migrate
# `seq` is the order of creation: an update keeps it. Times are seconds since 1970, result and payload JSON.
_SCHEMA = f"CREATE TABLE task (seq INTEGER PRIMARY KEY, {_COLUMNS}, UNIQUE (id))"
_SAVE = f"INSERT OR REPLACE INTO task (seq, {_COLUMNS}) VALUES "  # ON CONFLICT needs SQLite 3.24
# For a new id the inner SELECT gives NULL, and SQLite the next number.
_SAVE_ROW = f"((SELECT seq FROM task WHERE id = ?){', ?' * len(_FIELDS)})"


class SQLiteJournal:
    """Keeps records in an SQLite file that no other process can open meanwhile.

    One thread writes. What many threads save while it waits for the disk shares its next transaction and sync.
    """

    def __init__(self, path: str) -> None:
        """Open or create the file, within a second. OSError says what is wrong and what to do."""
        self._path = os.path.realpath(path)  # SQLite, too, puts its log beside the target of a link
        self._saves: queue.SimpleQueue[tuple[Record, Any]] = queue.SimpleQueue()  # and where to put the outcome
        self._deleted: queue.SimpleQueue[str] = queue.SimpleQueue()  # ids to delete with the next transaction
        try:
            import sqlite3  # not every Python is built with it

            self._database = sqlite3.connect(self._path, timeout=1, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(self._database.execute)
                self._files = self._stat()
            except BaseException:
                self._database.close()  # which unlocks the file
                raise
        except Exception as error:
            raise self._error("opened", error) from error
        threading.Thread(target=self._run, name="journal", daemon=True).start()

    def load(self) -> list[Record]:
        """Return all records in the order of their creation. To be called before the first `save`."""
        try:
            return [Record(*row) for row in self._database.execute(f"SELECT {_COLUMNS} FROM task ORDER BY seq")]
        except Exception as error:
            raise self._error("read", error) from error

    def save(self, record: Record) -> None:
        """Write a record; return once it is on the disk. OSError: it is not."""
        outcome: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
        self._saves.put((record, outcome))
        error = outcome.get()
        if error:
            raise error

    def delete(self, ids: Iterable[str]) -> None:
        """Have records deleted with the next transaction. Does not wait for the disk."""
        for id in ids:
            self._deleted.put(id)

    def _prepare(self, execute: Callable[..., Any]) -> None:
        """Lock the file, check whose it is, make the table if it is new. A foreign file stays as it is."""
        execute("PRAGMA locking_mode = EXCLUSIVE")  # what the first transaction locks is locked from then on
        execute("BEGIN EXCLUSIVE")
        ((version,),) = execute("PRAGMA user_version")
        if not list(execute("SELECT 1 FROM sqlite_master")):
            execute(_SCHEMA)
        elif version != _VERSION or not list(execute("SELECT 1 FROM sqlite_master WHERE name = 'task'")):
            raise ValueError(f"a newer server or another program wrote it (schema {version})")
        execute(f"PRAGMA user_version = {_VERSION}")
        execute("COMMIT")
        # fullfsync: on macOS a plain fsync leaves data in the drive's cache. journal_size_limit: a huge
        # transaction leaves no huge log behind. The file itself reuses the pages of deleted records.
        for setting in ("journal_mode=WAL", "synchronous=FULL", "fullfsync=1", "journal_size_limit=16777216"):
            execute(f"PRAGMA {setting}")
        execute("SELECT 1 FROM task LIMIT 1")  # makes the log, for _stat

    def _stat(self) -> list[tuple[int, int]]:
        """Return which files the path and the path of its log name now."""
        return [(s.st_dev, s.st_ino) for s in map(os.stat, (self._path, self._path + "-wal"))]

    def _error(self, verb: str, reason: object) -> OSError:
        return OSError(f"the journal {self._path} cannot be {verb}: {reason}; stop the server that uses it, see that "
                            "this user may write there and that there is space, or choose another file")  # fmt: skip

    def _run(self) -> None:
        """Save and delete what comes, for ever."""
        while True:
            batch = [self._saves.get()]
            while not self._saves.empty():
                batch.append(self._saves.get())
            deleted = [self._deleted.get() for _ in range(self._deleted.qsize())]
            error = None
            try:
                self._commit([record for record, _ in batch], deleted)
            except Exception as exception:  # whatever it is: nobody may be left waiting
                error = self._error("written", exception)
                self.delete(deleted)
                with contextlib.suppress(Exception):  # else the next transaction fails, too, and says so
                    self._database.rollback()
            for _, outcome in batch:
                outcome.put(error)

    def _commit(self, records: list[Record], deleted: list[str]) -> None:
        """Delete, then save, in one transaction.

        With a statement for each row, saves are five times slower beside a thread that computes: after every
        statement this thread has to win the interpreter again.
        """
        if self._stat() != self._files:  # what is not where the next start looks is not safe
            raise OSError("it is not at its path any more")
        values = [value for record in records for value in (record.id, *record[:-1])]
        execute, width = self._database.execute, 1 + len(_FIELDS)  # the id once more, for the inner SELECT
        execute("BEGIN IMMEDIATE")
        for i in range(0, len(deleted), 500):  # SQLite before 3.32 takes 999 values a statement
            ids = deleted[i : i + 500]
            execute(f"DELETE FROM task WHERE id IN (?{', ?' * (len(ids) - 1)})", ids)
        for i in range(0, len(values), 64 * width):
            part = values[i : i + 64 * width]
            execute(_SAVE + ", ".join([_SAVE_ROW] * (len(part) // width)), part)
        execute("COMMIT")


# -- 9. Access ---------------------------------------------------------------------------------------


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that a text is, None for a name."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def check_host(names: Iterable[str]) -> Callable[[Request], None]:
    """Return a check that a request is meant for this server: for an IP address, localhost or one of these names.

    A web page can have its own name point here (DNS rebinding) and then talk to this server as if it were its
    own; it cannot do so with an address. HTTPError 421 (RFC 9110, 15.5.20).
    """
    allowed = {"localhost", *(name.lower() for name in names)}

    @functools.lru_cache(maxsize=256)
    def is_meant(host: str) -> bool:
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()
        return name in allowed or parse_address(name) is not None

    def check(request: Request) -> None:
        if request.host and not is_meant(request.host):  # HTTP/1.0 may name no host; no browser does that
            raise HTTPError(421, "This server does not go by that name: use its address, or start it with --allow-host.")

    return check


def check_token(token: str) -> Callable[[Request], None]:
    """Return a check for `Authorization: Bearer` with this token. HTTPError 401 (RFC 6750, 3)."""
    expected = token.encode()

    def check(request: Request) -> None:
        scheme, _, credentials = request.fields.headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and hmac.compare_digest(credentials.strip().encode("latin-1"), expected)
        if not known and not (request.path in ("/", "/healthz") and request.method in ("GET", "HEAD")):
            raise HTTPError(401, "Send the server's token: Authorization: Bearer TOKEN.", ("WWW-Authenticate", "Bearer"))

    return check


def use_tls(server: Server, certificate: str, key: str) -> None:
    """Have a server that has not begun yet speak TLS 1.2 or newer. OSError: a file is missing or wrong. ImportError."""
    import ssl  # not every Python is built with it

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)

    class TLSConnection(Connection):
        """The same, after a handshake, which costs milliseconds of computing and so is done by a thread."""

        would_block = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
        shaken = False

        def __init__(self, sock: Any, peer: str, server: Server) -> None:
            super().__init__(context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), peer, server)

        def ready(self) -> None:
            if self.shaken:
                super().ready()
            else:
                self.resume()

        def serve(self) -> Generator[str, Any, None]:
            deadline = self.deadline
            while not self.shaken:
                self.server.lend(self, self.shake_hands)
                error = yield RUNNING
                if error:
                    log.info("no TLS with %s: %s", self.peer, error)
                    raise ConnectionError
                self.phase, self.deadline = HEADER, deadline  # which goes on, for the phase is no new one
                yield HEADER
            yield from super().serve()

        def shake_hands(self) -> str:
            try:
                self.socket.do_handshake()
                self.shaken = True
            except self.would_block:
                pass
            except Exception as error:
                return describe(error)
            return ""

        def end_sending(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()  # says that this is the end, and does not wait for the same from the client
            super().end_sending()

    server.connection_class = TLSConnection


# -- 10. Child processes -----------------------------------------------------------------------------
#
#   a worker's thread                           its child process
#             <-- h: give me a job -----------  _child_main
#   Child.run --- function, payload --------->  _child_main
#             <-- s: the function is called --  _answer
#             <-- p: a report, ten a second --  _watch, a thread, <- Progress <- report(...)
#             <-- r: result, or e: error -----  _child_main, when _watch has ended
#
# From the child come bytes and JSON: the server never unpickles what a task made.

_SPAWN = multiprocessing.get_context("spawn")  # never fork: the server has threads
START_SECONDS = 120.0  # in which a child must have imported its modules
REPORT_SECONDS = 0.1  # between two reports that cross the border


def _child_main(pipe: Any) -> None:
    """Run the jobs that come through the pipe, one at a time, until its other end is closed. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the parent decides
    if hasattr(os, "nice"):  # Windows has none: there children keep the priority of the server
        os.nice(10)
    own = os.getpid()
    try:
        while True:
            pipe.send_bytes(b"h")  # unasked, a large job would wait, without an end, for a child that hangs
            job = pipe.recv_bytes()
            progress, done = Progress(), threading.Event()
            watcher = threading.Thread(target=_watch, args=(pipe, progress, done), daemon=True)
            watcher.start()
            answer = _answer(pipe, job, progress)
            done.set()
            watcher.join()
            if os.getpid() != own:  # a copy that the function has forked: it must not answer as well
                return
            pipe.send_bytes(answer)
    finally:
        os._exit(1)  # whatever threads a task has left


def _answer(pipe: Any, job: bytes, progress: Progress) -> bytes:
    """Return the message that says how the task ended. Whatever its function raises ends the task alone."""
    try:
        function, payload = pickle.loads(job)  # imports the function's module
        pipe.send_bytes(b"s")  # before this there is no report that _watch could send meanwhile
        return b"r" + call_here(function, payload, progress.report)
    except BaseException as error:
        return b"e" + json.dumps([describe(error), traceback_of(error)[-20_000:]]).encode()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(Exception):  # nobody reads it any more, or the function has put something else there
                stream.flush()  # what the function printed: a later kill would lose it


def _watch(pipe: Any, progress: Progress, done: threading.Event) -> None:
    """Send reports until the task is done. When the server is gone, end this process at once."""
    sent: Any = (None, None)
    with contextlib.suppress(OSError):
        while not pipe.poll():  # the server sends nothing meanwhile, so that is the end of file
            over = done.wait(REPORT_SECONDS)
            if progress.last != sent:
                sent = progress.last
                pipe.send_bytes(b"p" + json.dumps(sent).encode())
            if over:
                return
    os._exit(1)


class Child(threading.local):
    """For each thread that uses it, one spawned process and one pipe; it runs one task at a time.

    The process starts with the first run(), serves the later ones too, and is replaced after its death. run() is not
    for the main thread, for it blocks SIGINT in its thread.
    """

    # What each thread begins with; `lock` alone is the same for all.
    # It guards every start, kill and reaping, in all threads: multiprocessing has one table of children, and of two
    # threads that reap one of them one misses its exit status. Held around slow system calls.
    lock = threading.Lock()
    process: Any = None
    pipe: Any = None  # our end

    def run(self, timeout: float | None, function: Any, payload: bytes, report: Report) -> bytes:
        """Return the encoded result of function(decoded payload, report), called in the child. Blocks.

        `timeout` is in seconds and counts from when the function is called; `report` is called in this thread.
        TaskError: it raised, its process died, was too slow, or could not start.
        """
        try:
            job = pickle.dumps((function, payload))
            if self.process is None or multiprocessing.connection.wait([self.process.sentinel], 0):
                self.end()
                self.start()
        except Exception as error:  # also: no process, memory or descriptor to be had
            raise TaskError(f"no child process can take the task: {describe(error)}") from None
        lost = 'the child process ended before it took the task ({}); is `if __name__ == "__main__":` missing?'
        late = f"no start in {START_SECONDS:g} seconds"
        deadline: float | None = time.monotonic() + START_SECONDS
        ready = [self.pipe, self.process.sentinel]  # both: on Windows a process may die and leave its pipe open
        try:
            while True:
                if not multiprocessing.connection.wait(ready, deadline and max(0.0, deadline - time.monotonic())):
                    lost = late
                    break
                message = self.pipe.recv_bytes() if self.pipe.poll() else b""
                kind, body = message[:1], message[1:]
                if kind == b"h":
                    self.pipe.send_bytes(job)
                elif kind == b"s":
                    lost, late = "the child process died ({})", f"timed out after {timeout} seconds"
                    deadline = timeout and time.monotonic() + timeout
                elif kind == b"p":
                    report(*json.loads(body))
                elif kind == b"r":
                    return bytes(body)
                elif kind == b"e":
                    raise TaskError(*json.loads(body))
                else:
                    break
        except TaskError:
            raise
        except Exception:  # it died: end of file, or nobody to send to; or what it says cannot be taken
            pass
        raise TaskError(lost.format(self.end()))

    def start(self) -> None:
        """Start a process."""
        if sys.platform != "win32":  # inherited: no Ctrl-C reaches the child before it ignores it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with self.lock:
            self.pipe, far_end = _SPAWN.Pipe()
            with far_end:  # left open here, it would hide the end of file
                process = _SPAWN.Process(target=_child_main, args=(far_end,), daemon=True)
                process.start()
        self.process = process

    def end(self) -> str:
        """End the process, if there is one, and say how it ended."""
        if self.process is None:
            return ""
        with self.lock:
            self.process.kill()
            self.process.join(5)
            status = self.process.exitcode
        self.process = None
        self.pipe.close()
        return f"killed by signal {-status}" if status and status < 0 else f"exit status {status}"


def end_children() -> None:
    """End all child processes, because this process ends; waits for no lock, so that a signal handler may call it."""
    for process in multiprocessing.active_children():
        process.kill()


_child = Child()
Application.call_in_child, Application.end_child = _child.run, _child.end


# -- 11. OpenAPI -------------------------------------------------------------------------------------


def openapi(application: Application) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of an application."""

    def operation(summary: str, schema: Any, refusals: Iterable[int], status: int = 200, **more: Any) -> dict[str, Any]:
        responses = {str(refusal): {"$ref": f"#/components/responses/{refusal}"} for refusal in refusals}
        return {"summary": summary, "responses": {str(status): answer(status, schema), **responses}, **more}

    def answer(status: int, schema: Any) -> dict[str, Any]:
        return {"description": http.HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}

    def query(name: str, schema: Any) -> dict[str, Any]:
        return {"name": name, "in": "query", "schema": schema}

    record = {"$ref": "#/components/schemas/record"}
    health = {"type": "object", "required": ["status"]}
    tasks = {"type": "object", "required": ["tasks"], "properties": {"tasks": {"type": "array"}}}
    limit = query("limit", {"type": "integer", "minimum": 0, "default": 50})
    paths: dict[str, Any] = {
        "/tasks": {"get": operation("The newest tasks, without their results", tasks, (400, 401, 421), parameters=[limit])},
        "/openapi.json": {"get": operation("This description", {"type": "object"}, (401, 421))},
        "/healthz": {"get": operation("Whether tasks are taken, and how many there are", health, (421,), security=[])},
    }
    paths["/healthz"]["get"]["responses"]["503"] = answer(503, health)
    name = {"type": "string", "minLength": 1, "maxLength": MAX_NAME, "pattern": r"\S"}
    payload = {"type": "object", "required": ["name"], "properties": {"name": name}, "examples": [{"name": "sample"}]}
    body = {"required": True, "content": {"application/json": {"schema": payload}}}
    id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
    wait = query("wait", {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$", "description": f"seconds, at most {MAX_WAIT:g}"})
    for task_type in application.types.values():
        description = (task_type.function.__doc__ or "").strip()
        paths[f"/create-{task_type.name}"] = {"post": operation(
            f"Create a task of type {task_type.name}", record, (400, 401, 408, 411, 413, 415, 421, 501, 503), 201,
            description=description, requestBody=body)}  # fmt: skip
        paths[f"/poll-{task_type.name}/{{id}}"] = {"get": operation(
            f"Ask how a task of type {task_type.name} is, or wait for its end", record, (400, 401, 404, 421),
            parameters=[id, wait])}  # fmt: skip
    now = 1700000000.0
    example = json.loads(encode_record(Record(str(uuid.UUID(int=0)), "sample", COMPLETED, "task", now, now, now + 5,
                                              1.0, None, b'{"seconds": 5}')))  # fmt: skip
    properties: dict[str, Any] = {key: {"type": ["string", "null"]} for key in example}
    properties.update(progress={"type": ["number", "null"]}, result={})
    return {
        "openapi": "3.1.0",
        "info": {"title": "taskserver", "version": __version__},
        "paths": paths,
        "security": [{"token": []}] if application.secured else [],
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"record": {"type": "object", "required": list(example), "properties": properties,
                                   "examples": [example]}},
            "responses": {str(status): answer(status, {"type": "object", "required": ["error"]})
                          for status in (400, 401, 404, 408, 411, 413, 415, 421, 501, 503)},
        },
    }  # fmt: skip


# -- 12. Live page -----------------------------------------------------------------------------------

PAGE = r"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>taskserver</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ground: light-dark(#f4f6f9, #10141b); --card: light-dark(#ffffff, #191f29);
  --line: light-dark(#dde2ea, #2f3847); --text: light-dark(#1a2230, #e6eaf1); --quiet: light-dark(#566072, #a3adbe);
  --accent: light-dark(#2553c4, #93b4ff); --good: light-dark(#17693c, #7fd6a3); --bad: light-dark(#b0231f, #ff9f99); }
* { box-sizing: border-box; margin: 0; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
body { max-width: 76rem; margin: auto; padding: 1.5rem 1rem 3rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1.5rem; align-items: start; margin-top: 1.5rem; }
@media (min-width: 56rem) { main { grid-template-columns: 25rem minmax(0, 1fr); } }
h2, h3, summary { font-size: 1rem; font-weight: 600; }
.stack:not([hidden]) { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; padding: 0; list-style: none; }
.card.card { padding: 1.25rem; border: 1px solid var(--line); border-radius: 0.75rem; background: var(--card); }
.quiet, .wrong, ::placeholder { font-size: 0.875rem; color: var(--quiet); }
.wrong { font-weight: 600; color: var(--bad); }
input, select, textarea, button, pre { width: 100%; padding: 0.5rem 0.75rem; border-radius: 0.5rem; font: inherit;
  color: inherit; background: var(--ground); border: 1px solid color-mix(in srgb, var(--quiet) 75%, transparent); }
button { border: 0; background: var(--accent); color: var(--card); font-weight: 600; cursor: pointer; }
pre, textarea { font: 0.8125rem/1.5 ui-monospace, monospace; white-space: pre-wrap; }
summary ~ h3 { margin-top: 1rem; }
pre { max-height: 24rem; overflow: auto; margin-top: 0.5rem; border: 0; }
.task { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0.25rem 1rem; }
.pending { --hue: var(--accent); } .completed { --hue: var(--good); } .failed { --hue: var(--bad); }
.task :nth-child(n + 3) { grid-column: 1 / -1; }
.task h3, .message { max-height: 6rem; overflow: auto; scrollbar-width: thin; }
.pill { align-self: start; padding: 0 0.75rem; border-radius: 1rem; color: var(--hue); background: var(--ground); }
progress { appearance: none; width: 100%; height: 0.375rem; border: 0; }
progress, ::-webkit-progress-bar { border-radius: 1rem; overflow: hidden; background: var(--line); }
::-webkit-progress-value { background: var(--hue); } ::-moz-progress-bar { background: var(--hue); }
@media (forced-colors: active) { progress { appearance: auto; } }
</style>

<header>
  <h1>taskserver</h1>
  <p id="counts">&nbsp;</p>
  <p id="connection" class="quiet" role="status" aria-live="polite">Connecting …</p>
</header>
<main>
  <div class="stack">
    <form id="access" class="card stack" hidden>
      <label>Token (kept in memory only) <input name="token" type="password" autocomplete="off" required></label>
      <button>Use this token</button>
    </form>
    <form id="create" class="card stack" aria-labelledby="create-title">
      <h2 id="create-title">Create a task</h2>
      <label>Task type <select name="type"></select></label>
      <label>Name <input name="name" value="my task" maxlength="256" required autocomplete="off"></label>
      <label>Rest of the payload, as a JSON object
        <textarea name="rest" rows="3" spellcheck="false" placeholder='{"seconds": 10}'></textarea></label>
      <div><button>Create task</button> <output id="answer" class="quiet"></output></div>
    </form>
    <details id="commands" class="card">
      <summary>The same in a terminal</summary>
      <h3>curl</h3><pre id="curl" tabindex="0"></pre>
      <h3>PowerShell</h3><pre id="powershell" tabindex="0"></pre>
    </details>
  </div>
  <section class="stack" aria-labelledby="tasks-title">
    <h2 id="tasks-title">Newest tasks</h2>
    <p id="empty" class="card quiet" hidden>No tasks yet. Create one with the form or in a terminal.</p>
    <ul id="tasks" class="stack" role="list"></ul>
  </section>
</main>
<template id="row"><li>
  <h3 dir="auto"></h3><span class="pill quiet"></span>
  <p class="about quiet"></p>
  <progress max="1" aria-label="Progress"></progress>
  <p class="message" dir="auto"></p>
  <details><summary class="quiet"></summary><pre tabindex="0">Asking the server …</pre></details>
</li></template>

<script>
const byId = (id) => document.getElementById(id);
const fields = byId("create").elements, list = byId("tasks");
let token = "";                // lives in memory only
let turn = Promise.resolve();  // settled when the last job in line has ended
let pause = 1, serverTime, timer;

const inTurn = (job) => { turn = turn.then(job).catch(console.error); };  // never two requests under way

function setText(element, text, className = element.className) {
  if (element.textContent !== text) element.textContent = text;  // else: keep selection, announce nothing
  element.className = className;
}

async function request(path, body) {  // the answer as an object; one with "error" if that is all there is
  const method = body ? "POST" : "GET", headers = {"Content-Type": "application/json"};
  if (token) headers.Authorization = "Bearer " + String.fromCharCode(...new TextEncoder().encode(token));
  try {
    const response = await fetch(path, {method, headers, body, signal: AbortSignal.timeout(15000)});
    const answer = await response.json();
    serverTime = Date.parse(response.headers.get("Date"));  // our own clock may be wrong
    if (path !== "/healthz") byId("access").hidden = response.status !== 401;
    return response.ok || answer.error ? answer : {error: `The server says: ${answer.status}.`};
  } catch {
    return {error: "The server does not answer."};
  }
}

async function follow() {
  const {tasks, error} = await request("/tasks?limit=50");
  const health = await request("/healthz");
  const problem = error || health.error;
  const notice = problem ? `${problem} Trying again, less and less often.` : "Connected to the server.";
  setText(byId("connection"), notice, problem ? "wrong" : "quiet");
  pause = problem ? Math.min(2 * pause, 30) : health.waiting + health.running > 0 ? 1 : 5;
  clearTimeout(timer);
  timer = setTimeout(inTurn, 1000 * (document.hidden ? 30 : pause), follow);
  if (tasks) showTasks(tasks);
  if (health.types) showHealth(health);
}

function showHealth({waiting, running, completed, failed, types}) {
  setText(byId("counts"), `${waiting} waiting · ${running} running · ${completed} completed · ${failed} failed`);
  for (const type of types) if (!fields.type.querySelector(`[value=${type}]`)) fields.type.add(new Option(type, type));
  showCommands();
}

function showTasks(records) {  // rows never move; one that is open stays even when its record is gone
  const ids = records.map((record) => record.id);
  for (const row of [...list.children]) if (!ids.includes(row.id) && !row.querySelector("[open]")) row.remove();
  let newer = null;
  for (const record of records) {
    const row = byId(record.id) || byId("row").content.firstElementChild.cloneNode(true);
    showTask(record, row);
    if (!row.isConnected) newer ? newer.after(row) : list.prepend(row);
    newer = row;
  }
  byId("empty").hidden = records.length > 0;
}

function showTask(record, row) {
  const part = (selector) => row.querySelector(selector);
  const state = record.finished_at ? "" : record.started_at ? " · running" : " · waiting";
  const percent = record.progress === null ? "" : ` · ${Math.floor(100 * record.progress)} %`;
  Object.assign(row, {id: record.id, className: `task card ${record.status}`});
  setText(part("h3"), record.name);
  setText(part(".pill"), record.status);
  setText(part(".about"), `${record.type}${state}${percent} · ${age(record)}`);
  setText(part(".message"), record.message || "");
  setText(part("summary"), record.error ? "Error" : "Result");
  if (percent || record.finished_at) part("progress").value = record.progress || 0;  // no value: nobody knows yet
  part("details").hidden = !record.finished_at;
  part("details").dataset.path = `/poll-${record.type}/${record.id}`;
}

function age(record) {
  const seconds = Math.max(1, (serverTime - Date.parse(record.created_at)) / 1000);
  const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([size]) => size <= seconds);
  return `${Math.floor(seconds / size)} ${unit} ago`;
}

async function showOutcome(details) {
  const {error, result} = await request(details.dataset.path);
  setText(details.querySelector("pre"), error || JSON.stringify(result, null, 2));
}

function payload() {
  const rest = fields.rest.value.trim() || "{}";
  try {
    if (rest[0] !== "{" || "name" in JSON.parse(rest)) throw new Error('Put braces around it and no "name" inside.');
    fields.rest.setCustomValidity("");
  } catch (error) {
    fields.rest.setCustomValidity(`Write JSON like {"seconds": 10}. ${error.message}`);
  }
  const members = rest.slice(1, -1).trim();  // as typed: JavaScript would round long numbers
  return `{"name": ${JSON.stringify(fields.name.value)}${members && ", " + members}}`;
}

function showCommands() {
  const body = payload(), type = fields.type.value;
  const [create, poll] = [`create-${type}`, `poll-${type}/ID`].map((path) => `'${location.origin}/${path}'`);
  const shell = body.replaceAll("'", "'\\''");
  const powershell = body.replace(/['\u2018-\u201b]/g, "$&$&");  // curly quotes end a string there, too
  const curl = token ? 'curl -H "Authorization: Bearer $TASKSERVER_TOKEN"' : "curl";
  const invoke = "Invoke-RestMethod" + (token && ' -Headers @{Authorization = "Bearer $env:TASKSERVER_TOKEN"}');
  setText(byId("curl"), `${curl} -H 'Content-Type: application/json' \\
  -d '${shell}' \\
  ${create}\n\n${curl} ${poll}`);
  setText(byId("powershell"), `${invoke} -Method Post \`\n  -ContentType 'application/json; charset=utf-8' \`
  -Body '${powershell}' \`
  ${create}\n\n${invoke} ${poll}`);
}

byId("create").oninput = showCommands;
byId("create").onsubmit = (event) => {
  event.preventDefault();
  const path = `/create-${fields.type.value}`, body = payload();
  inTurn(async () => {
    const {error, type, id} = await request(path, body);
    setText(byId("answer"), error || `Created. Poll it at /poll-${type}/${id}`, error ? "wrong" : "quiet");
    await follow();
  });
};
fields.rest.oninvalid = () => setText(byId("answer"), fields.rest.validationMessage, "wrong");
byId("access").onsubmit = (event) => {
  event.preventDefault();
  token = event.target.elements.token.value;
  event.target.reset();
  inTurn(follow);
};
list.addEventListener("toggle", ({target}) => target.open && inTurn(() => showOutcome(target)), true);
document.onvisibilitychange = () => document.hidden || inTurn(follow);
byId("commands").open = innerWidth > 900;  // on a phone the tasks come first
inTurn(follow);
</script>"""


def add_pages(application: Application) -> None:
    """Add GET / for people and GET /openapi.json for programs."""

    def source(tag: str) -> str:
        text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    policy = (f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; connect-src 'self'; "
              "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
              "require-trusted-types-for 'script'")  # fmt: skip
    page = Response(200, PAGE.encode(), (("Content-Security-Policy", policy),), "text/html; charset=utf-8")
    application.router.add("GET", "/", lambda request: page)
    application.router.add("GET", "/openapi.json",
                           lambda request: Response(200, json.dumps(openapi(application)).encode()))  # fmt: skip


# -- 13. Running -------------------------------------------------------------------------------------


class LogHandler(logging.Handler):
    """Writes log lines from one daemon thread, so that a stderr which is full or closed stops nobody.

    What does not fit into its queue is dropped, counted, and said later.
    """

    MAX_LINES = 10_000
    # What came from outside must neither begin a line of its own nor move a terminal's cursor.
    ESCAPES: ClassVar = {**{code: f"\\x{code:02x}" for code in (*range(32), 127)}, 10: "\n    "}

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._dropped = 0  # lines, in all; guarded by the lock of the base class
        self._lines: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line. The base class holds its lock meanwhile."""
        if self._lines.qsize() < self.MAX_LINES:
            self._lines.put(record)
        else:
            self._dropped += 1

    def finish(self, seconds: float) -> None:
        """Write what is queued, at most for so long."""
        self._lines.put(None)
        self._thread.join(seconds)

    def format(self, record: logging.LogRecord) -> str:
        """Return a line in ASCII; a traceback makes more lines, which are indented."""
        text = str(record.msg)
        with contextlib.suppress(Exception):  # arguments that do not fit
            text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            text += "\n" + traceback_of(record.exc_info[1])
        if not text.isprintable() or not text.isascii():
            text = text.translate(self.ESCAPES).encode("ascii", "backslashreplace").decode()
        return f"{_whole_second(int(record.created))}Z {record.levelname} {text}\n"

    def _write(self) -> None:
        said = 0  # of the lines that were dropped
        records: list[logging.LogRecord | None] = []
        while None not in records:
            records = [self._lines.get()]
            time.sleep(0.01)  # to be woken costs more than to write a line, so many are written at once
            while not self._lines.empty():
                records.append(self._lines.get())
            text = "".join(self.format(record) for record in records if record)
            dropped = self._dropped - said
            if dropped:
                said += dropped
                text += f"{dropped} lines of the log did not fit and were dropped\n"
            write_all(self._descriptor, text.encode())


def write_all(descriptor: int, data: bytes) -> None:
    """Write all, unless nobody reads it any more."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


def run(server: Server, grace: float) -> bool:
    """Serve until SIGINT, SIGTERM or SIGBREAK, then stop in order; return whether no task was left running.

    To be called in the main thread. A second signal ends the process at once, with status 128 + its number.
    """
    application = server.application
    told = threading.Event()
    signals: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            application.store.journal = None  # the next start decides what becomes of the tasks that end now
            end_children()
            os._exit(128 + number)
        told.set()

    def stop() -> None:
        told.wait()
        deadline = time.monotonic() + grace
        application.store.stop()  # 1. creates get 503, healthz says so, long polls are answered
        dropped = sum(pool.drop() for pool in application.pools)  # 2. what waits is not begun
        log.info("stopping: running tasks have %g seconds, a second signal takes them; %s", grace, f"{dropped} waiting tasks " + (
            "are dropped" if application.store.journal is None else "stay in the journal for the next start"))  # fmt: skip
        for pool in application.pools:  # 3. running tasks go on for a while, and polls are answered
            pool.join(max(0.0, deadline - time.monotonic()))
        server.shutdown(max(2.0, deadline - time.monotonic()))  # 4. answers under way are sent, then all is closed

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the last exists on Windows
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)
    threading.Thread(target=stop, name="stop", daemon=True).start()
    try:
        server.serve_forever()
    finally:
        server.server_close()
    return not any(pool.counts()[1] for pool in application.pools)


# -- 14. Demo and command line -----------------------------------------------------------------------


def wait(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Wait, as if for a network: for "seconds", from 0 to 3600, 5 if they are not given."""
    seconds = payload.get("seconds", 5)
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 <= seconds <= 3600:
        raise ValueError('"seconds" must be a number from 0 to 3600')
    steps = min(100, math.ceil(seconds))
    report(0, f"0 of {seconds:g} seconds")
    for step in range(1, steps + 1):
        time.sleep(seconds / steps)
        report(step / steps, f"{seconds * step / steps:g} of {seconds:g} seconds")
    return {"seconds": seconds}


def primes(payload: dict[str, Any], report: Report) -> dict[str, int]:
    """Count the primes below "limit", at most 100,000,000, by trial division; 400,000 take about a second."""
    limit = payload.get("limit", 400_000)
    if type(limit) is not int or not 0 <= limit <= 100_000_000:
        raise ValueError('"limit" must be a whole number from 0 to 100,000,000')
    count = 0
    for number in range(2, limit):
        if number % 1000 == 0:
            report(number / limit, f"{count} primes below {number}")
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            count += 1
    return {"limit": limit, "primes": count}


def demo() -> Application:
    """Return an application with the two task types that this file brings along."""
    application = Application()
    application.task("task")(wait)
    application.task("primes", cpu=True)(primes)
    return application


def self_check() -> int:
    """Serve the demo on a free port, create a task of each type, poll it to its end; return an exit status."""
    print(f"taskserver {__version__}, Python {sys.version.split()[0]} on {sys.platform}")
    server = Server(("127.0.0.1", 0), demo())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)

    def ask(*request: Any) -> Any:
        client.request(*request)
        return json.loads(client.getresponse().read())

    status = 0
    for name, payload in ("task", {"seconds": 0.1}), ("primes", {"limit": 10_000}):
        begun = time.monotonic()
        body = json.dumps({"name": "self-check", **payload})
        record = ask("POST", f"/create-{name}", body, {"Content-Type": "application/json"})
        if "id" in record:
            record = ask("GET", f"/poll-{name}/{record['id']}?wait=30")
        good = record.get("status") == COMPLETED
        status |= not good
        print(f"  {name}: {'works' if good else record}, {time.monotonic() - begun:.2f} seconds")
    for module, option in ("_sqlite3", "--db"), ("_ssl", "--tls-cert"):
        print(f"  {option}: {'works' if importlib.util.find_spec(module) else f'not here, Python has no {module[1:]}'}")
    server.shutdown()
    end_children()
    print("something does not work here" if status else "all is well")
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def _number(convert: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    pattern = "[0-9]+" if convert is int else r"[0-9]+(\.[0-9]+)?"

    def number(text: str) -> float:
        value = convert(text) if re.fullmatch(pattern, text) else -1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is no {'whole ' if convert is int else ''}number from {low:g} to {high:g}")
        return value

    return number


def _parse_options(argv: list[str] | None, application: Application) -> argparse.Namespace:
    """Return the options; what is not given is as the application has it."""
    store, pool, cpu_pool = application.store, application.pool, application.cpu_pool
    parser = _Parser(prog="taskserver", allow_abbrev=False, description="An HTTP server for long work.")
    count, seconds = _number(int, 1, 1e9), _number(float, 0, 1e9)
    for option, convert, default, value, text in (
        ("--host", str, "127.0.0.1", "ADDRESS", "listen on this address (%(default)s)"),
        ("--port", _number(int, 0, 65535), 8000, "PORT", "listen on this port, 0 for a free one (%(default)s)"),
        ("--workers", count, pool.max_workers, "N", "run so many tasks at once, in threads (%(default)s)"),
        ("--cpu-workers", count, cpu_pool.max_workers, "N", "let so many tasks compute at once (%(default)s)"),
        ("--max-waiting", _number(int, 0), pool.max_waiting, "N", "let so many wait for a worker (%(default)s)"),
        ("--max-tasks", count, store.max_tasks, "N", "hold so many tasks, final ones included (%(default)s)"),
        ("--keep", seconds, store.keep, "SECONDS", "how long a final task can be polled (%(default)s)"),
        ("--db", str, None, "FILE", "keep tasks in this SQLite file, beyond this process"),
        ("--grace", seconds, 10, "SECONDS", "how long running tasks may go on when the server stops (%(default)s)"),
        ("--tls-cert", str, None, "FILE", "speak HTTPS with this certificate chain (PEM)"),
        ("--tls-key", str, None, "FILE", "and this private key (PEM)"),
    ):
        parser.add_argument(option, type=convert, default=default, metavar=value, help=text)
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name that clients may use")
    parser.add_argument("--allow-anonymous", action="store_true", help="serve other machines without a token")
    parser.add_argument("--verbose", action="store_true", help="log each request")
    parser.add_argument("--self-check", action="store_true", help="try out what works here, and exit")
    parser.add_argument("--version", action="version", version=f"taskserver {__version__}")
    options = parser.parse_args(argv)
    if (options.tls_cert is None) != (options.tls_key is None):
        parser.error("give --tls-cert and --tls-key together")
    return options


def _prepare_process(workers: int) -> None:
    """Set what holds for the process as a whole, in which so many tasks may run at once."""
    # Seconds for which a thread that computes keeps the others waiting: with the usual 5 ms some clients starve. But
    # each one that waits wakes that often; so thousands of tasks that end together would have no time for anything else.
    sys.setswitchinterval(min(max(0.0005, 5e-6 * workers), 0.05))
    logging._srcfile = None  # who logs, and from where, is in no line
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    while os.open(os.devnull, os.O_RDWR) < 2:  # what is closed now must not become a socket to which something prints
        pass


def _set_up(application: Application, options: argparse.Namespace) -> Server:
    """Put the parts together as the options say. ValueError, OSError: what is wrong."""
    token = os.environ.get("TASKSERVER_TOKEN", "")
    if not re.fullmatch("[!-~]*", token):
        raise ValueError("TASKSERVER_TOKEN must consist of visible ASCII characters")
    ip = parse_address(options.host)
    local = ip.is_loopback if ip else options.host == "localhost"
    if not (local or token or options.allow_anonymous):
        raise ValueError(f"other machines can reach {options.host}: set a token in TASKSERVER_TOKEN, or allow "
                         "everybody in with --allow-anonymous")  # fmt: skip
    application.secured = bool(token)
    application.before_request.insert(0, check_token(token) if token else check_host([options.host, *options.allow_host]))
    for pool in application.pools:
        pool.max_workers, pool.max_waiting = options.workers, options.max_waiting
    application.cpu_pool.max_workers = options.cpu_workers
    try:
        server = Server((options.host, options.port), application)
    except OSError as error:
        raise ValueError(f"cannot listen on {options.host}, port {options.port}: {error.strerror}; choose another "
                         "--host or --port") from None  # fmt: skip
    if options.tls_cert is not None:
        try:
            use_tls(server, options.tls_cert, options.tls_key)
        except (OSError, ImportError) as error:
            raise ValueError(f"cannot speak TLS with {options.tls_cert} and {options.tls_key}: {error}") from None
    application.store.keep, application.store.max_tasks = options.keep, options.max_tasks
    if options.db is not None:
        if application.store.journal is not None:
            raise ValueError("this application brings a journal of its own; leave out --db")
        application.store.journal = SQLiteJournal(options.db)
    recover(application)
    return server


def _address(options: argparse.Namespace, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)  # those are no addresses to go to
    return f"{'http' if options.tls_cert is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"


def _first_lines(application: Application, options: argparse.Namespace, address: str) -> str:
    """Return what a person is told at the start: the address, how to create a task, where tasks are kept."""
    token = "-H \"Authorization: Bearer $TASKSERVER_TOKEN\" " if application.secured else ""
    kept = f"in {options.db or 'a journal'}" if application.store.journal is not None else "in memory and end with this process; --db FILE keeps them"
    return (f"taskserver {__version__} on {address}\n"
            f"Open it in a browser, or create a task:  curl {token}-H 'Content-Type: application/json' -d '{{\"name\": \"sample\"}}' "
            f"{address}/create-{next(iter(application.types), 'TYPE')}\n"
            f"Tasks are kept {kept}.\n")  # fmt: skip


def main(application: Application | None = None, argv: list[str] | None = None) -> NoReturn:
    """Run the command line for an application, or for the demo; ends with SystemExit.

    Status 0: stopped; 1: could not start; 2: wrong usage; 128 + its number: ended by a second signal.
    """
    if multiprocessing.current_process().name != "MainProcess":
        sys.exit('taskserver: a child process has called main(); call it under `if __name__ == "__main__":` alone')
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C ends a long start; run() knows a better end
    application = application or demo()
    options = _parse_options(argv, application)
    _prepare_process(options.workers)
    if options.self_check:
        sys.exit(self_check())
    add_monitoring(application)
    add_pages(application)
    log.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    log.propagate = False
    try:
        handler = LogHandler(2)
        log.addHandler(handler)
        server = _set_up(application, options)
        address = _address(options, server.server_port)
        lines = _first_lines(application, options, address)
        threading.Thread(target=write_all, args=(1, lines.encode()), daemon=True).start()  # it may be a full pipe
    except (ValueError, OSError, RuntimeError) as error:  # the last one: no thread can be made
        sys.exit(f"taskserver: {error}")
    log.info("serving %s", address)
    clean = run(server, options.grace)
    if not clean:
        log.warning("some tasks were still running and are cut off")
    handler.finish(1)
    application.store.journal = None  # what ends now is interrupted
    end_children()
    if not clean:
        os._exit(0)  # a task that hangs, or an executor that waits for one, would hold the exit up
    sys.exit(0)


if __name__ == "__main__":
    main()
