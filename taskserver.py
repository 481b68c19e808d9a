#!/usr/bin/env python3
# /// script
# requires-python = ">=3.7"
# ///
r"""An HTTP server for long work, in one file, with the standard library alone.

A client POSTs a task and at once gets a record with an id. A worker runs the task in the
background. The client polls the record until it is completed. `python3 taskserver.py` serves two
task types to try that out. Your own are functions:

    import taskserver

    application = taskserver.Application()

    @application.task("thumbnail")               # POST /create-thumbnail, GET /poll-thumbnail/<id>
    def thumbnail(payload, report):              # payload: the posted object
        report(0.5, "half way")
        return {"size": 128}                     # the result; an exception makes the task fail

    if __name__ == "__main__":
        taskserver.main(application)

What it promises:

- A create is answered at once; it never waits for a worker.
- A task goes only from pending to completed or failed, and its record is never seen half changed.
- Memory is bounded: a task that does not fit is refused, and nothing is dropped before its time.
- With a journal, what was acknowledged outlives `kill -9`.
- A stop finishes what it can in the time that it is given, and says what it could not.

The file is one story: each section uses only what stands above it, with one exception. The store
(2) calls the methods of a journal, which section 10 describes. (Some comments point ahead. And some
routes carry the name of a schema, such as "TaskRecord", that section 12 defines.)

    1 Lock      2 Records and store    3 Workers        4 Child processes
    5 Requests, responses, routes      6 Application    7 HTTP    8 Running

Here the core ends. The rest attaches to it:

    9 Monitoring    10 Durability    11 Access    12 OpenAPI    13 Live page
    14 Demo and command line

Words:

- A *task* is one request to run a *task type*, that is, a function and its endpoints. Its *payload*
  is what was posted, its *result* what the function returned.
- A *record* describes a task. It is *pending* while the task waits or runs; then it is *final*:
  either *completed* or *failed*. A final record that has outlived its time is *evicted*.
- The *store* holds the records. The *journal* is where they outlive the process; it is *lost* when
  this server may not use it any more, for example because another server has taken it over.
- A *pool* owns *workers*, which are threads; most of them run tasks. A *coroutine* and a *child*
  process are the two other places where a function can run.
- The server's *loop* is the thread that waits for all sockets at once, and in each *round* does
  what there is to do (7). The *event loop* is that of asyncio (3).
- To *wake* a thread, a loop or a connection is to have it look again for what it waits for; it may
  find nothing.
- A request of HTTP has a *head*, which is its first line and its headers, and perhaps a *body*.
- Words such as --keep are options of the command line (14). Durations are in seconds, sizes in
  bytes.

The way of a create:

 1. The server's loop hears that a connection has received bytes (7 HTTP, `Server.serve_forever`).
 2. The connection takes the head of a request out of them (7, `read_head`).
 3. The application finds its endpoint, and checks by the head alone whether the request is let in
    (6, `judge`). Then the connection takes the body (7, `read_body`).
 4. The endpoint reserves a place in a pool of workers (3) and adds a pending record to the store
    (2), a dict behind a lock (1). With a journal (10), the record is written to disk before that.
    Then the record is put into the pool's queue (3). Usually the loop itself calls the endpoint.
    With a journal or a long body, that could take long; then a thread of the server calls it.
 5. The connection sends the answer, status 201, and waits for the next request (7).
 6. The loop begins its next round by waking a worker, which is a thread (3). It wakes only one:
    to wake a thread costs the loop as much time as a whole create. That worker takes the oldest
    record of the queue and, if there are more, wakes the next worker. Then it calls the function,
    or has its child process do so (4); a coroutine it hands to an event loop (3).
 7. The worker replaces the record by a final one (2), which polls will see.

The way of a long poll, `GET /poll-TYPE/<id>?wait=30`:

 1. As above, until its endpoint finds a record that is pending (6, `_poll`).
 2. Instead of a response, the endpoint returns a `Later`: what to wait for, for how long, and how
    to answer then (5).
 3. The connection waits in the server's loop, as an idle one does: it has no thread (7).
 4. A worker makes the record final; the store calls whoever watches it (2, `Store.finish`).
 5. That puts the connection into a queue and wakes the loop. The loop has the connection send the
    answer (7).

Of `http.server.ThreadingHTTPServer` this file uses three things: the listening socket with its
address; the code that binds that socket, accepts from it and closes it; and the names of some
methods (`serve_forever`, `shutdown`, `service_actions`), so that whoever knows that class finds
them here. Two parts are replaced. The first is its threads: here, one loop serves all connections.
A thread for each would cost 16 KiB while it is idle, and to wake it for every answer would take
time. The second is its request parser, because it ignores Transfer-Encoding, accepts malformed
requests, and takes most of the time of an answer.

Why not asyncio's streams? They would serve just as many idle connections. But merely to receive a
head with them, and to send a fixed answer, takes 80 % of the time of a whole poll here; the work of
the poll would come on top. And buffers, limits, deadlines and wake-ups would be handled inside
asyncio, where the reader of this file cannot see them.

Docstrings name the exceptions that a caller has to expect, and the reasons, like this: "KeyError:
there is no such record." Where the reason is plain, it is left out.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import collections
import contextlib
import contextvars
import email.utils
import errno
import functools
import gc
import hashlib
import hmac
import http
import http.client
import http.server
import importlib
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import re
import selectors
import signal
import socket
import socketserver
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import weakref
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    Generator,
    Hashable,
    Iterable,
    Mapping,
    NamedTuple,
    NoReturn,
    Tuple,
    TypeVar,
    Union,
)

try:
    import ssl
except ImportError:  # not every Python is built with it
    ssl = None  # type: ignore[assignment]

__version__ = "1.1.0"

log = logging.getLogger("taskserver")


# -- 1. Lock ---------------------------------------------------------------------------------------
#
# Four facts about threads, for all that follows:
#
# 1. Between any two steps of one thread, another thread may go on. One thread at a time can hold a
#    lock; others that ask for it wait.
# 2. With a Condition, a thread waits until another one has changed something. It belongs to a lock
#    (its own, if it is given none), and whoever calls its methods must hold that lock. wait() gives
#    the lock back, sleeps until another thread calls notify() or notify_all(), or until the time
#    that it was given is over, and takes the lock again. wait_for(function) does so until the
#    function returns true.
# 3. When its main thread has ended, a process waits for its other threads, but not for daemon
#    threads. The threads here are daemon threads.
# 4. One thread at a time runs Python's code: it has the *global interpreter lock*. It gives that
#    away while the system works for it, and after some milliseconds, but not in the middle of a
#    long call, such as that of a JSON encoder. (There is no such lock if Python is free-threaded.)


class ReadersWriterLock:
    """Many readers at once, or one writer alone.

    A writer that waits goes before readers that come after it.

    `with lock.read:` and `with lock.write:` hold one side. The lock is not reentrant: a thread that
    holds a side and asks for one again may wait for ever. Nothing slow may be done while holding a
    side.

    To read costs three times what a plain lock costs (1.6 and 0.5 microseconds). The gain: a
    poll does not wait for a listing of 500 records; without a global interpreter lock, polls look
    up their records at the same time.
    """

    def __init__(self) -> None:
        # Guards the two below. A reader holds it to enter and to leave, a writer while it writes.
        self.mutex = threading.Lock()
        self.readers = 0  # threads that read
        self.waiting_writers = 0  # threads that wait for readers to leave
        # Readers wait here while a writer waits:
        self.may_read = threading.Condition(self.mutex)
        # Writers wait here while readers are inside:
        self.may_write = threading.Condition(self.mutex)
        self.read = _ReadSide(self)
        self.write = _WriteSide(self)


class _ReadSide:
    def __init__(self, lock: ReadersWriterLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock.mutex:
            while lock.waiting_writers:
                lock.may_read.wait()
            lock.readers += 1

    def __exit__(self, *exception: object) -> None:
        lock = self._lock
        with lock.mutex:
            lock.readers -= 1
            if lock.waiting_writers and not lock.readers:
                lock.may_write.notify_all()


class _WriteSide:
    def __init__(self, lock: ReadersWriterLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        # Kept until __exit__, except in wait(), below. That alone keeps all others out while this
        # one writes; `waiting_writers` is needed only while readers are inside.
        lock.mutex.acquire()
        if lock.readers:
            lock.waiting_writers += 1  # while this is above 0, no new reader enters
            # While it sleeps, wait() gives the mutex back, so that readers can leave. Several
            # writers may wait here. The last reader that leaves wakes all of them, and they get the
            # mutex one after the other.
            while lock.readers:
                lock.may_write.wait()
            lock.waiting_writers -= 1
            if not lock.waiting_writers:
                lock.may_read.notify_all()  # they go on when they get the mutex, after __exit__

    def __exit__(self, *exception: object) -> None:
        self._lock.mutex.release()


# -- 2. Records and store --------------------------------------------------------------------------

PENDING, COMPLETED, FAILED = "pending", "completed", "failed"

MAX_MESSAGE = 500  # characters of a reported message that are kept
MAX_ERROR = 2000  # characters of an error that are kept
MAX_RESULT = 1 << 20  # bytes of a result, encoded
MAX_DIGITS = 4300  # of an integer; the bound of newer Pythons
MAX_TRACE = 20_000  # characters of a traceback in the log
# A reported fraction may be this much below 0 or above 1, because sums of float32 often are.
ROUNDING = 1e-4


class Cancelled(BaseException):
    """Raised by report() in a task that was asked to end.

    A BaseException, so that `except Exception` in a loop of the function does not swallow it.
    """


# When a task was started, in seconds since the epoch; and what it reported last: a fraction from
# 0.0 to 1.0, and a message. A plain tuple: a NamedTuple takes nine times as long to make.
Progress = Tuple[Union[float, None], Union[float, None], Union[str, None]]

_NOT_STARTED: Progress = (None, None, None)


def escape_surrogates(text: str) -> str:
    """Return a text that UTF-8 can hold.

    Python puts lone surrogates into file names that are not UTF-8; they become escapes like
    \\udc80.
    """
    return text.encode("utf-8", "backslashreplace").decode()


class Live:
    """What changes of a task while it is pending: its progress, and the wish to cancel it."""

    __slots__ = ("cancel_requested", "progress", "withdrawn")

    def __init__(self) -> None:
        self.progress = _NOT_STARTED  # replaced as a whole, so that nobody sees half of it
        self.cancel_requested = False  # becomes true once, by any thread
        self.withdrawn = False  # true if it was cancelled before it began: then it never begins

    def start(self) -> float:
        """Note that the task starts now; return the time."""
        now = time.time()
        self.progress = (now, None, None)
        return now

    def report(self, fraction: float, message: str | None = None) -> None:
        """Say how far the task is, from 0 to 1, and in words; None leaves the words as they are.

        Never blocks. ValueError: no number from 0 to 1, or a message that is no text. Cancelled:
        the task was asked to end.
        """
        if self.cancel_requested:
            raise Cancelled
        if type(fraction) is not float:
            fraction = _to_float(fraction)
        if not 0.0 <= fraction <= 1.0:
            fraction = _cut_rounding(fraction)
        started_at, _, last_message = self.progress
        if message is None:
            message = last_message
        elif isinstance(message, str):
            # The first cut bounds the work. Escapes can be longer, so cut again.
            message = escape_surrogates(message[:MAX_MESSAGE])[:MAX_MESSAGE]
        else:
            raise ValueError(
                f"the second argument of report() must be a text or None, not {message!r:.100}"
            )
        self.progress = (started_at, fraction, message)


def _to_float(number: Any) -> float:
    """Return any real number as a float: an int, a Decimal, a Fraction, numpy's.

    ValueError: it is no real number.
    """
    is_number = hasattr(number, "__float__") or hasattr(number, "__index__")
    try:
        if is_number:
            return float(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(
        f"the first argument of report() must be a number from 0 to 1, not {number!r:.100}"
    )


def _cut_rounding(fraction: float) -> float:
    """Return 0.0 or 1.0 for a fraction that is outside by rounding alone.

    ValueError: it is further outside.
    """
    if -ROUNDING <= fraction < 0.0:
        return 0.0
    if 1.0 < fraction <= 1.0 + ROUNDING:
        return 1.0
    raise ValueError(
        f"the first argument of report() must be a number from 0 to 1, not {fraction!r}"
    )


class Record(NamedTuple):
    """What is known of a task.

    A record never changes: the store puts a successor in its place. Only the object `live` changes.
    """

    id: str  # a uuid4, or the client's Idempotency-Key; in lower case
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
    sequence: int = 0  # its place in the order of creation, if there is a journal
    live: Live | None = None  # while the task is pending; clients see its progress alone

    def size(self) -> int:
        """Return the number of bytes that count against the store's `max_memory`."""
        return len(self.payload or self.result or b"")  # it never has both


@functools.lru_cache(maxsize=64)
def _whole_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _encode_time(seconds: float | None) -> str:
    """Return 1700000000.5 as the JSON of "2023-11-14T22:13:20.500Z" (RFC 3339), None as null."""
    if seconds is None:
        return "null"
    second, millisecond = divmod(int(seconds * 1000), 1000)
    return f'"{_whole_second(second)}.{millisecond:03d}Z"'


_ENCODER = json.JSONEncoder(allow_nan=False)


def _encode_json(value: object) -> str:
    if value is None:
        return "null"  # the encoder needs a surprising time for it
    return _ENCODER.encode(value)  # json.dumps needs twice the time for a short text


def encode_record(record: Record, with_result: bool = True) -> bytes:
    """Return the record as JSON for a client, with what its task has reported until now."""
    started_at, fraction, message = record.started_at, record.progress, record.message
    if record.live is not None:
        started_at, fraction, message = record.live.progress
    text = (
        f'{{"id": "{record.id}", "name": {_encode_json(record.name)}, '
        f'"status": "{record.status}", "type": "{record.type}", '
        f'"created_at": {_encode_time(record.created_at)}, '
        f'"started_at": {_encode_time(started_at)}, '
        f'"finished_at": {_encode_time(record.finished_at)}, '
        f'"progress": {_encode_json(fraction)}, '
        f'"message": {_encode_json(message)}, '
    )
    if with_result:
        result = record.result.decode() if record.result else "null"
        text += f'"result": {result}, '
    text += f'"error": {_encode_json(record.error)}}}'
    return text.encode()


_encode_final_record = functools.lru_cache(maxsize=2048)(encode_record)
_MAX_CACHED = 4096  # bytes of a result; so the cache takes some ten megabytes


def encode_cached(record: Record, with_result: bool = True) -> bytes:
    """Return what `encode_record` does; faster for final records, which are polled repeatedly."""
    if record.status == PENDING:
        return encode_record(record, with_result)
    if record.result is not None and len(record.result) > _MAX_CACHED:
        return encode_record(record, with_result)
    return _encode_final_record(record, with_result)


# Finds the escapes in a text of JSON, each as a whole. Only lone surrogates will be changed. But a
# pattern for these alone would also match where there is none:
#
#     \ud83d\ude00  a pair, which is one character: each half looks like a lone surrogate
#     \\ud800       an escaped backslash, then text; it looks like one without its first character
_JSON_ESCAPE = re.compile(
    r"""
    \\ud[89ab].. \\ud[c-f]..  # two surrogates, a pair, which is one character
    | \\u....                  # any other character, or a lone surrogate
    | \\.                      # any other escape, such as that of a backslash
    """,
    re.VERBOSE,
)
_LONE_SURROGATE = re.compile(r"\\ud[89a-f]..")


def _double_backslash(escape: re.Match[str]) -> str:
    """Return an escape as it is; but if it is a lone surrogate, with two backslashes.

    A lone surrogate is no character, and many clients refuse it. With two backslashes, they decode
    it to plain text: a backslash and, for example, "udc80".
    """
    text = escape.group()
    if _LONE_SURROGATE.fullmatch(text):
        return "\\" + text
    return text


class _Huge(Exception):
    """A result is too large even to be encoded."""


def encode_result(value: object, default: Callable[[Any], Any] | None = None) -> bytes:
    """Return what a function has returned as JSON; `default` is that of `json.dumps`.

    ValueError: JSON cannot hold it (the text says what, and at which key), or it is too large.
    """
    try:
        text = _encode_checked(value, default)
    except _Huge:
        sentence = f"the result has more than {MAX_RESULT} bytes as JSON, or it contains itself"
        raise ValueError(sentence) from None
    except Exception as error:  # `default` may raise anything
        place = _place_of_fault(value, default)
        sentence = f"the result cannot be written as JSON{place}: {text_of(error)}"
        raise ValueError(sentence) from None
    if "\\ud" in text and len(text) <= MAX_RESULT:  # a longer one is refused below
        text = _JSON_ESCAPE.sub(_double_backslash, text)
    encoded = text.encode()
    if len(encoded) > MAX_RESULT:
        size = len(encoded)
        raise ValueError(f"the result has {size} bytes as JSON, at most {MAX_RESULT} are kept")
    return encoded


def _encode_checked(value: object, default: Callable[[Any], Any] | None) -> str:
    """Return a value as JSON. It raises whatever the check, the encoder or `default` raises.

    The check comes first, because the encoder would work at a huge value for seconds, and no other
    thread could go on meanwhile.
    """
    check = _Check(default)
    check.see(value)
    if default is None:
        return _ENCODER.encode(value)
    return json.JSONEncoder(allow_nan=False, default=check.convert).encode(value)


class _Check:
    """Looks at a value, and at what `default` makes of parts of it, before they are encoded."""

    def __init__(self, default: Callable[[Any], Any] | None) -> None:
        self._default = default
        self._size = 0  # bytes that all it has seen needs as JSON, at least

    def convert(self, value: object) -> object:
        """Return what `default` makes of a value. The encoder calls this. ValueError, _Huge."""
        assert self._default is not None  # otherwise the encoder does not call this
        converted = self._default(value)
        self.see(converted)
        return converted

    def see(self, value: object) -> None:
        """Look at a value and at all that is in it.

        ValueError: two keys of a dict would be the same in JSON, such as 1 and "1"; or an integer
        is too long. _Huge: all that was seen needs more than MAX_RESULT bytes.
        """
        size = self._size
        unseen = [value]
        while unseen:
            part = unseen.pop()
            members: Iterable[object] = ()
            if isinstance(part, str):
                size += len(part)
            elif isinstance(part, int):
                size += _length_of(part)
            elif isinstance(part, dict):
                # Beside the key and the member themselves, `"key": member, ` has 6 characters. The
                # last has no comma and space, but there are the braces.
                size += 6 * len(part)
                members = part.values()
            elif isinstance(part, (list, tuple)):
                size += 2 * len(part)  # for each, a comma and a space; for the last, the brackets
                members = part
            if size > MAX_RESULT:  # before its keys and members are looked at, which may take long
                raise _Huge
            if isinstance(part, dict):
                size += _length_of_keys(part)
            # Short integers, floats, true, false and null are counted here, as a byte each; that is
            # faster than by way of `unseen`. Other objects are not counted: the encoder will hand
            # them to convert(), which sees what `default` makes of them.
            for member in members:
                if isinstance(member, int) and -(10**18) < member < 10**18:
                    size += 1
                elif isinstance(member, (str, int, dict, list, tuple)):
                    unseen.append(member)
                elif member is None or isinstance(member, float):
                    size += 1
        self._size = size
        if size > MAX_RESULT:  # by what the last part has added
            raise _Huge


def _length_of_keys(part: dict[Any, Any]) -> int:
    """Return how long the keys of a dict are in JSON.

    ValueError: two of them would be the same, or one is an integer that is too long.
    """
    if _are_ascii(part):
        return sum(map(len, part))
    keys = [_json_key(key) for key in part]
    if len(set(keys)) < len(keys):
        raise ValueError("two keys are the same as JSON, such as 1 and '1'")
    return sum(map(len, keys))


_TOO_LONG = 10**MAX_DIGITS  # the smallest integer that has more digits


def _length_of(number: int) -> int:
    """Return how many digits an integer has at least. ValueError: more than MAX_DIGITS."""
    if not -_TOO_LONG < number < _TOO_LONG:
        raise ValueError(f"an integer has more than {MAX_DIGITS} digits")
    return number.bit_length() * 3 // 10


def _are_ascii(keys: Iterable[object]) -> bool:
    """Return whether keys are texts in ASCII, which JSON leaves as they are."""
    for key in keys:  # all() with a generator would take four times as long
        if type(key) is not str or not key.isascii():
            return False
    return True


def _json_key(key: object) -> str:
    """Return the key that a client finds in JSON for a key of a dict. ValueError: too long."""
    if isinstance(key, str):
        # A lone surrogate reaches a client as a plain text (_double_backslash). So the keys
        # "\udc80", which is one character, and r"\udc80", which are six, are the same there.
        return escape_surrogates(key)
    if isinstance(key, int):
        _length_of(key)  # raises if it is too long
    if type(key) is int:
        return str(key)
    # A dict with this key alone is written and read again: its only key is the answer.
    (written,) = json.loads(json.dumps({key: None}))
    return str(written)


def _place_of_fault(value: object, default: Callable[[Any], Any] | None) -> str:
    """Return where the part that cannot be encoded stands in a value, such as " at ['a'][0]"."""
    place = ""
    fault = _faulty_member(value, default)
    # The value may contain itself, if another fault was met before its size was found to be too
    # large. The search would run round in it for ever, so it ends when the place is long.
    while fault is not None and len(place) < 200:
        key, member = fault
        try:
            place += f"[{key!r:.50}]"
        except Exception:  # a huge integer, or an object that breaks whatever looks at it
            place += "[...]"
        fault = _faulty_member(member, default)
    if not place:
        return ""
    return f" at {escape_surrogates(place)}"


def _faulty_member(
    value: object, default: Callable[[Any], Any] | None
) -> tuple[object, object] | None:
    """Return the first member that cannot be encoded, with its key or index before it, or None."""
    members: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, (list, tuple)):
        members = enumerate(value)
    size = 0
    for key, member in members:
        try:
            size += len(_encode_checked(member, default))
        except Exception:
            return key, member
        if size > MAX_RESULT:  # the value is too large as well, and to go on might take long
            break
    return None


class TaskError(Exception):
    """An error whose text becomes the record's `error` unchanged; `trace` is for the log alone."""

    def __init__(self, error: object = "", trace: str = "") -> None:
        super().__init__(error)
        self.trace = trace


def describe(exception: BaseException) -> str:
    """Return ValueError("no such host") as "ValueError: no such host"; of a TaskError, its text."""
    name = "Exception"
    try:
        name = str(type(exception).__name__) or name
        text = str(exception)
        if text and not isinstance(exception, TaskError):
            text = f"{name}: {text}"
        return escape_surrogates((text or name)[:MAX_ERROR])[:MAX_ERROR]
    except BaseException:  # an exception may break whatever looks at it
        return f"{name}: (an exception that cannot say what it is)"


def text_of(exception: BaseException) -> str:
    """Return the text of an exception, without its name; if it is empty, see describe()."""
    try:
        return escape_surrogates(str(exception)[:MAX_ERROR]) or describe(exception)
    except BaseException:  # as in describe()
        return describe(exception)


def traceback_of(exception: BaseException) -> str:
    """Return what the log is to say of an exception: its traceback; of a TaskError, its `trace`."""
    try:
        if isinstance(exception, TaskError):
            return exception.trace
        lines = traceback.format_exception(type(exception), exception, exception.__traceback__)
        return "".join(lines).rstrip()[-MAX_TRACE:]
    except BaseException:  # as in describe()
        return ""


class Unavailable(Exception):
    """What cannot be done now: a sentence, and in how many seconds it may be tried again."""

    def __init__(self, sentence: str, retry_after: float) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


# How a journal can fail to save a record, and what becomes of its task:
#
# (A record is saved up to three times: when its task is created, when it starts, and when it is
# final, which is its *outcome*.)
#
#                      a create             a start or an outcome
#     JournalError     is refused (503)     is saved again until that works
#     RecordRefused    is refused (400)     makes the task failed
#     JournalLost      is refused (503)     is left to the new owner; this server ends


class JournalError(Unavailable):
    """Raised by the store: a record was not saved.

    Or perhaps it was: the error may have come late, for example in the commit.
    """


class RecordRefused(Exception):
    """Raised by a journal that can never take this record. Says why."""


class JournalLost(Exception):
    """Raised by a journal that another server has taken over (10), so that this one must end.

    Says why. The store raises it, too, when it may not use its journal any more (`Store.lost`).
    (SQLiteJournal never raises it; a journal of your own may.)
    """


class Duplicate(Exception):
    """There is a record with this id already; or there will be, for it is just being saved."""


_CAN_FREEZE = hasattr(gc, "freeze")  # CPython from 3.7 on


class Store:
    """The records by id: a dict behind a readers-writer lock, bounded in number, bytes and time.

    A final record stays for `keep` seconds; then `evict` drops it. A new record is refused while
    there are `max_tasks` records, or payloads and results of `max_memory` bytes. A result is stored
    even beyond that.

    With a `journal` (its contract stands in section 10), a record is written there before anybody
    sees it: `add`, `save` and `finish` block until it is.

    An id is in one of these states:

        state       in this store     in the journal
        ----------  ----------------  ---------------------------------------------
        free        nothing           nothing
        reserved    a place, counted  its first record is being written
        pending     a record          a record
        final       a record          a record
        doomed      nothing           perhaps a record, which the journal is to delete

    and goes these ways. (Without a journal, it is never reserved or doomed.)

        free --add--> reserved --saved--> pending --finish--> final --evict--> doomed
        reserved --the save has failed--> doomed, because the record may be written all the same
        doomed --delete_doomed--> free
        doomed --add, if a client repeats its create--> reserved, and the delete is called off
    """

    FAILING_SECONDS = 30.0  # after a write has failed, the journal counts as failing for so long
    PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds between attempts to save; then always the last
    DELETE_AGAIN_SECONDS = 10.0  # after a failed delete, until the next one
    EVICTED_AT_ONCE = 1000  # records; the lock is held for a millisecond to drop them
    # The records that one call of journal.delete() deletes. A disk needs some 15 ms for so many,
    # and creates wait meanwhile, because one thread writes both (10).
    DELETED_AT_ONCE = 250

    # `freeze_records` (below) acts when there are more than MANY records, and MANY_NEW are new.
    MANY, MANY_NEW = 100_000, 50_000

    def __init__(
        self,
        keep: float = 3600,
        max_tasks: int = 100_000,
        max_memory: int = 1024 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keep, self.max_tasks, self.max_memory = keep, max_tasks, max_memory
        self.journal: Any = None
        self.journal_lost: Callable[[str], None] = lambda reason: None  # called when it is lost
        self.stopping = False  # becomes true once, by any thread
        # Empty while the journal may be used. Then a text that says why not: another server has
        # taken it over, or this process is ending. Set by any thread; never empty again.
        self.lost = ""
        self._clock = clock
        self._failed_at = -math.inf  # when the journal failed, by the monotonic clock
        # Guards every attribute from here down to `_unfrozen`. Where one is read without it, the
        # value may be out of date.
        self._lock = ReadersWriterLock()
        # In the order of creation. An id that is reserved has None.
        self._records: dict[str, Record | None]
        if sys.version_info >= (3, 8):
            self._records = {}
        else:  # there, reversed() takes no dict
            self._records = collections.OrderedDict()
        self._sequence = 0  # of the newest record
        self._bytes = 0  # of payloads and results
        # By type and status; a Counter would take twice the time.
        self._counts: dict[tuple[str, str], int] = collections.defaultdict(int)
        # Two parallel queues, oldest first: the ids of final records, and when each became final,
        # by `_clock`. One queue of pairs would take 48 bytes more for each record.
        self._finished: collections.deque[str] = collections.deque()
        self._finished_at: collections.deque[float] = collections.deque()
        self._watchers: dict[str, set[Callable[[], None]]] = {}
        self._unfrozen = 0  # records put in since the last gc.freeze(), see freeze_records
        # Whether gc.freeze() was called, see freeze_records. Only the thread that starts the
        # server, and then runs its loop, uses it.
        self._is_frozen = False
        # Guards all below, except that has_doomed() looks without it. Notified when a call of
        # journal.delete() has ended.
        self._deletion = threading.Condition()
        self._doomed: set[str] = set()  # ids that the journal may hold and is to delete
        self._deleting: set[str] = set()  # ids that journal.delete() is deleting now
        self._delete_at = -math.inf  # when a failed delete may be tried again (monotonic)

    def counts(self) -> dict[tuple[str, str], int]:
        """Return the number of records by type and status."""
        with self._lock.read:
            return dict(self._counts)

    def get(self, task_id: str) -> Record:
        """Return a record. KeyError: unknown, evicted, or just being saved."""
        with self._lock.read:
            record = self._records.get(task_id)
        if record is None:
            raise KeyError(task_id)
        return record

    def find(self, task_id: str) -> Record | None:
        """Return a record, None if it is unknown or evicted. Duplicate: it is just being saved."""
        with self._lock.read:
            if task_id not in self._records:
                return None
            record = self._records[task_id]
        if record is None:
            raise Duplicate(task_id)
        return record

    def newest(self, limit: int, status: str = "", type_name: str = "") -> list[Record]:
        """Return the newest records, at most `limit`; of one status or one type alone, if given."""
        with self._lock.read:
            if not status and not type_name:
                seen = filter(None, reversed(self._records.values()))
                return list(itertools.islice(seen, limit))
            records = list(self._records.values())  # eight milliseconds for a million
        matching = (  # a status or type that is "" lets every record through
            record
            for record in reversed(records)
            if record and status in ("", record.status) and type_name in ("", record.type)
        )
        return list(itertools.islice(matching, limit))

    # Creating and finishing

    def add(self, record: Record) -> Record:
        """Put in a new record; return it as it is held.

        Unavailable: the store is full or stopping, or a JournalError. RecordRefused: the journal
        cannot take it. Duplicate: its id is taken. After each of these, this record is not here.
        """
        size = record.size()
        # While there is no room, drop what has outlived its time. This looks without the lock, so
        # it is an estimate; below, the same is judged with the lock.
        while self._has_no_room(size) and self.evict():
            pass
        with self._lock.write:
            if self.stopping:
                raise Unavailable("The server is stopping; try again when it is back.", 5)
            if record.id in self._records:
                raise Duplicate(record.id)
            if len(self._records) >= self.max_tasks:
                raise self._refusal("tasks", "--max-tasks")
            if self._bytes + size > self.max_memory:
                raise self._refusal("bytes of payloads and results", "--max-memory")
            if self.journal is None:
                self._insert(record)
                return record
            self._sequence += 1
            record = record._replace(sequence=self._sequence)
            self._reserve_place(record.id, size)
        try:
            self._await_deletion(record.id)
            self._save_once(record)
        except BaseException as error:
            with self._lock.write:
                self._free_place(record.id, size)
                self._doom([record.id])  # it may be there; if not, the delete does no harm
            if isinstance(error, JournalLost):
                sentence = "The journal belongs to this server no more."
                raise JournalError(sentence, 5) from error
            raise
        with self._lock.write:
            self._bytes -= size  # which _reserve_place has counted, and _insert counts again
            self._insert(record)
        return record

    def finish(self, record: Record) -> Record:
        """Save the final record of a task, put it in the place of the pending one, wake who waits.

        Return it as it is held: failed, if the journal has refused it. JournalLost: it stays
        pending, and the new owner of the journal decides what becomes of it.
        """
        try:
            self.save(record)
        except RecordRefused as refusal:
            record = record._replace(
                status=FAILED,
                message=None,
                result=None,
                error=f"the journal cannot take the outcome: {describe(refusal)}",
            )
            with contextlib.suppress(RecordRefused):  # the store makes it final in any case
                self.save(record)
        with self._lock.write:
            self._insert(record)
            watchers = self._watchers.pop(record.id, ())
        for wake in watchers:
            wake()
        return record

    def save(self, record: Record) -> None:
        """Have a record outlive a crash, if there is a journal; nobody sees it yet.

        Blocks, and tries until that has worked. RecordRefused: it never will. JournalLost: the
        journal is another server's, or this process is ending.
        """
        if self.journal is None:
            return
        attempts = 0
        while True:
            try:
                self._save_once(record)
                return
            except JournalError:  # nothing tells when a disk has room again
                time.sleep(self.PAUSES[min(attempts, len(self.PAUSES) - 1)])
                attempts += 1

    def _save_once(self, record: Record) -> None:
        """Save a record.

        JournalError: nobody knows whether it is saved. RecordRefused: it can never be. JournalLost:
        the journal is another server's, or this process is ending.
        """
        if self.lost:
            raise JournalLost(self.lost)
        try:
            self.journal.save(record)
        except RecordRefused:
            raise
        except JournalLost as loss:
            self._lose(loss)
            raise
        except BaseException as error:  # a journal may raise anything, but it must end no thread
            if not self.failing:
                log.error("the journal fails and will be tried again: %s", describe(error))
            self._failed_at = time.monotonic()
            raise JournalError("The journal cannot be written; try again later.", 5) from error
        self._failed_at = -math.inf

    def _has_no_room(self, size: int) -> bool:
        """Return whether a record of so many bytes would be one too many."""
        return len(self._records) >= self.max_tasks or self._bytes + size > self.max_memory

    def _refusal(self, what: str, flag: str) -> Unavailable:
        """Return the refusal of one record too many. The write side is held."""
        seconds = self.keep
        if self._finished:
            age = self._clock() - self._finished_at[0]  # of the oldest final task
            seconds -= age
        sentence = f"As many {what} are held as {flag} allows; try again when the oldest final task"
        return Unavailable(f"{sentence} has outlived --keep.", seconds)

    def _reserve_place(self, task_id: str, size: int) -> None:
        """Keep the place of a record that is about to be saved. The write side is held."""
        self._records[task_id] = None
        self._bytes += size

    def _free_place(self, task_id: str, size: int) -> None:
        """Give back the place of a record that could not be saved. The write side is held."""
        del self._records[task_id]
        self._bytes -= size

    def _insert(self, record: Record) -> None:
        """Put a record into its place, which may be that of its predecessor.

        The write side is held.
        """
        predecessor = self._records.get(record.id)
        if predecessor is None:
            self._unfrozen += 1
        else:
            self._bytes -= predecessor.size()
            self._counts[predecessor.type, predecessor.status] -= 1
        self._records[record.id] = record
        self._bytes += record.size()
        self._counts[record.type, record.status] += 1
        if record.status != PENDING:
            self._finished.append(record.id)
            self._finished_at.append(self._clock())

    # Watching, and the stop

    def watch(self, task_id: str, wake: Callable[[], None]) -> None:
        """Have `wake` called once: when the record is final, or when stop() is called after this.

        If the record is final or gone already, `wake` is called at once. Any thread may call
        `wake`, so it must not block. (Who watches after stop() is not woken by that. But when the
        server ends, it ends all waits.)
        """
        with self._lock.write:
            record = self._records.get(task_id)
            pending = record is not None and record.status == PENDING
            if pending:
                self._watchers.setdefault(task_id, set()).add(wake)
        if not pending:
            wake()

    def unwatch(self, task_id: str, wake: Callable[[], None]) -> None:
        """Have `wake` called no more; a call that has begun may still come."""
        with self._lock.write:
            watchers = self._watchers.get(task_id, set())
            watchers.discard(wake)
            if not watchers:
                self._watchers.pop(task_id, None)

    def stop(self) -> None:
        """Wake all who wait, so that they learn of it soon; nothing is created from now on."""
        with self._lock.write:
            self.stopping = True
            watchers = [wake for wakes in self._watchers.values() for wake in wakes]
            self._watchers.clear()
        for wake in watchers:
            wake()

    # Dropping what has outlived its time

    def has_expired(self) -> bool:
        """Return whether there are final records that have outlived their time."""
        with self._lock.read:
            return bool(self._finished) and self._finished_at[0] <= self._clock() - self.keep

    def evict(self) -> int:
        """Drop final records that have outlived their time; return how many.

        At most EVICTED_AT_ONCE of them, so that readers never wait for long: call it until it
        returns 0. `delete_doomed` deletes them in the journal later. So `add`, which calls this to
        make room, need not wait for that.
        """
        ids: list[str] = []
        with self._lock.write:
            oldest = self._clock() - self.keep
            while self._finished and self._finished_at[0] <= oldest:
                if len(ids) == self.EVICTED_AT_ONCE:
                    break
                self._finished_at.popleft()
                ids.append(self._finished.popleft())
                self._remove(ids[-1])
            if self.journal is not None:
                self._doom(ids)
        return len(ids)

    def _remove(self, task_id: str) -> None:
        """Drop a final record. The write side is held."""
        record = self._records.pop(task_id)
        assert record is not None  # it is final, not reserved
        self._bytes -= record.size()
        self._counts[record.type, record.status] -= 1

    def has_doomed(self) -> bool:
        """Return whether the journal is to delete something, and that may be tried now."""
        return bool(self._doomed) and not self.lost and time.monotonic() >= self._delete_at

    def delete_doomed(self) -> int:
        """Have the journal delete some of the ids that are doomed; return how many. Blocks.

        Call it until it returns 0. What a lost journal holds is its new owner's business.
        """
        if not self.has_doomed():
            return 0
        with self._deletion:
            if self._deleting or not self._doomed:  # another thread is at it, or has done it
                return 0
            ids = list(itertools.islice(self._doomed, self.DELETED_AT_ONCE))
            self._deleting.update(ids)
            self._doomed.difference_update(ids)
        deleted, error = 0, None
        try:
            self.journal.delete(ids)
            deleted = len(ids)
        except JournalLost as loss:
            self._lose(loss)  # from now on, nothing is to be deleted
        except BaseException as exception:
            error = exception
        with self._deletion:
            if error is not None:
                self._doomed.update(ids)
                self._delete_at = time.monotonic() + self.DELETE_AGAIN_SECONDS
            self._deleting.clear()
            self._deletion.notify_all()
        if error is not None:
            log.error("the journal has not deleted %d records: %s", len(ids), describe(error))
        return deleted

    def _doom(self, ids: list[str]) -> None:
        """Note what the journal is to delete. The write side is held.

        (The order of the locks is `_lock`, then `_deletion`. If a thread took them in the other
        order, each of two threads could wait for ever for what the other one holds.)
        """
        with self._deletion:
            # A journal that never deletes must not fill memory. What is not noted here stays in the
            # journal, and the next start loads it.
            if len(self._doomed) < self.max_tasks:
                self._doomed.update(ids)

    def _await_deletion(self, task_id: str) -> None:
        """See that a delete of an older record with this id does not hit the new one.

        For example, a create with an Idempotency-Key was refused, because the journal failed. So
        the key is doomed. Now the client sends the create again. If the delete is still to come, it
        is called off here; if the journal is at it just now, this waits for its end. (If the old
        record is still in the journal, `save` replaces it.)

        JournalError: it takes too long.
        """
        with self._deletion:
            if not self._deletion.wait_for(lambda: task_id not in self._deleting, 5):
                raise JournalError("The journal is slow; try again later.", 5)
            # This calls off a delete that is still to come, or that has failed and would come
            # again.
            self._doomed.discard(task_id)

    # A journal that fails

    @property
    def failing(self) -> bool:
        """Whether a write has failed in the last FAILING_SECONDS, and none has worked since."""
        return time.monotonic() - self._failed_at < self.FAILING_SECONDS

    def _lose(self, loss: JournalLost) -> None:
        """Leave the journal alone from now on, and say so."""
        self.lost = text_of(loss)
        self.journal_lost(self.lost)

    # The garbage collector

    def freeze_records(self) -> None:
        """Have Python's garbage collector overlook the records while there are many.

        It does nothing with the default of --max-tasks, which is MANY: there are never more.

        CPython frees an object when nothing refers to it any more. Its garbage collector is for
        cycles of references alone. Now and then it looks at everything, while everybody waits: 0.5
        s for a million records. gc.freeze() hides from it all objects that there are now. So, after
        every MANY_NEW new records:

        1. The collector looks once at what is not hidden yet, and frees the garbage in it, which
           step 2 would hide as well. It takes 30 ms, and the first time 60.
        2. All that is left is hidden.

        The cost: a cycle that is hidden is not freed until there are few records again. CPython can
        do this from 3.7 on; in free-threaded builds the pause is shorter, but not gone; PyPy needs
        none of it.
        """
        if not _CAN_FREEZE:
            return
        held = len(self._records)
        if held > self.MANY and self._unfrozen >= self.MANY_NEW:
            gc.collect()
            self._freeze()
        elif held < self.MANY / 2 and self._is_frozen:
            gc.unfreeze()
            self._is_frozen = False
            self._set_unfrozen(held)  # now it sees all records again

    def _freeze(self) -> None:
        gc.freeze()
        self._is_frozen = True
        self._set_unfrozen(0)

    def _set_unfrozen(self, count: int) -> None:
        """Note how many records the collector sees."""
        with self._lock.write:
            self._unfrozen = count

    # The start

    def load(self) -> list[Record]:
        """Take in what the journal holds; return those records that are pending. Blocks.

        OSError: it cannot be read. JournalLost.
        """
        if self.journal is None:
            return []
        was_enabled = gc.isenabled()
        gc.disable()  # it would look at all that is loaded again and again
        try:
            pending = self._take_in(self._read_journal())
        finally:
            if was_enabled:
                gc.enable()
        if _CAN_FREEZE and len(self._records) > self.MANY:
            self._freeze()  # as in freeze_records
        return pending

    def _read_journal(self) -> list[Record]:
        """Return what the journal holds; when that takes long, say in the log how far it is."""
        loaded: list[Record] = []
        done = threading.Event()

        def say_how_far() -> None:
            seconds = 2.0
            while not done.wait(seconds):
                log.info("loading the journal: %d tasks so far", len(loaded))
                # Say it less and less often: a journal may wait in load() for hours, until the
                # server that uses it ends (10).
                seconds *= 2

        threading.Thread(target=say_how_far, name="loading", daemon=True).start()
        try:
            loaded.extend(self.journal.load())  # one by one, so len(loaded) grows meanwhile
        except (OSError, JournalLost):  # their text says already what to do
            raise
        except Exception as error:
            raise OSError(f"the journal cannot be loaded: {describe(error)}") from error
        finally:
            done.set()
        return loaded

    def _take_in(self, records: list[Record]) -> list[Record]:
        """Put in what was loaded, in this order; return those records that are pending."""
        pending, final = [], []
        with self._lock.write:
            for record in records:
                if record.status == PENDING:
                    live = Live()
                    live.progress = (record.started_at, None, None)
                    record = record._replace(live=live)
                    pending.append(record)
                else:
                    final.append(record)
                self._records[record.id] = record
                self._counts[record.type, record.status] += 1
            self._bytes += sum(record.size() for record in records)
            self._sequence = max((record.sequence for record in records), default=0)
            self._unfrozen += len(records)
            # The journal has times of the wall clock, `_finished_at` those of `_clock`. To convert
            # them, both clocks are read at one moment.
            now, moment = time.time(), self._clock()
            final.sort(key=lambda record: record.finished_at or now)
            for record in final:
                age = now - (record.finished_at or now)
                age = max(0.0, age)  # the clock may have been set back
                self._finished.append(record.id)
                self._finished_at.append(moment - age)
        return pending


# -- 3. Workers ------------------------------------------------------------------------------------


class BoundedQueue:
    """The items that wait for a pool, and the number of those in work.

    Who has an item calls, in this order:

        reserve(key)     keeps a place; refuses when all are taken
        put(key, item)   queues the item in that place, or release(key) gives the place back
        wake()           has a worker come for it; one call is enough after several puts

    Then a worker calls `_take` and, when the work is done, `_done`. Until it is taken, anybody may
    call withdraw(key), even between `reserve` and `put`; then nobody gets it. So a key goes

        reserved --put--> queued --_take--> in work --_done--> gone
        reserved or queued --withdraw--> gone

    A key is any hashable object that the caller uses for one item alone.
    """

    def __init__(self, max_workers: float = math.inf, max_waiting: float = math.inf) -> None:
        self.max_workers, self.max_waiting = max_workers, max_waiting
        self._lock = threading.Lock()  # guards all below
        # Notified when the last item in work is done, and when stop() lets nothing begin any more.
        self._at_rest = threading.Condition(self._lock)
        self._reserved: set[Hashable] = set()  # keys whose items are to come
        self._queue: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self._running = 0  # items in work
        self._stopped = False

    def wake(self) -> None:
        """Have a worker come for what was put. Does not block."""
        raise NotImplementedError

    def counts(self) -> tuple[int, int]:
        """Return how many items wait and how many are in work."""
        with self._lock:
            return len(self._reserved) + len(self._queue), self._running

    def oldest(self) -> Any:
        """Return the item that has been queued for the longest time, None if none is."""
        with self._lock:
            return next(iter(self._queue.values()), None)

    def reserve(self, key: Hashable, bounded: bool = True) -> None:
        """Keep a place for an item.

        Unavailable: `max_workers` + `max_waiting` items wait or are in work, and `bounded` is true.
        """
        with self._lock:
            items = len(self._reserved) + len(self._queue) + self._running
            if bounded and items >= self.max_workers + self.max_waiting:
                sentence = "As many tasks wait as --max-waiting allows; try again later."
                raise Unavailable(sentence, 1)
            self._reserved.add(key)

    def release(self, key: Hashable) -> None:
        """Give back a place that is not needed; it may have been withdrawn."""
        with self._lock:
            self._reserved.discard(key)

    def put(self, key: Hashable, item: Any) -> None:
        """Queue an item in its reserved place, unless that was withdrawn meanwhile."""
        with self._lock:
            if key in self._reserved:
                self._reserved.remove(key)
                self._queue[key] = item

    def withdraw(self, key: Hashable) -> bool:
        """Take back an item that no worker has taken. Return whether that was so.

        If it was, the item's place is free from now on. Otherwise it is in work, or done.
        """
        with self._lock:
            if key in self._queue:
                del self._queue[key]
                return True
            if key in self._reserved:
                self._reserved.remove(key)
                return True
            return False

    def stop(self) -> int:
        """Have nothing begin from now on; return how many items wait, and will go on waiting."""
        with self._lock:
            self._stopped = True
            self._at_rest.notify_all()
            return len(self._reserved) + len(self._queue)

    def join(self, seconds: float) -> bool:
        """Wait until no item is in work and none may begin, at most so long; return whether so."""
        with self._lock:
            return self._at_rest.wait_for(
                lambda: not self._running and not self._may_begin(), seconds
            )

    def _may_begin(self) -> bool:
        """Return whether a worker may begin an item. The lock is held."""
        return bool(self._queue) and not self._stopped

    def _take(self) -> tuple[Hashable, Any]:
        """Take the oldest item into work, and its key. The lock is held."""
        self._running += 1
        return self._queue.popitem(last=False)

    def _done(self) -> None:
        """Note that the work of one item is done."""
        with self._lock:
            self._running -= 1
            if not self._running:
                self._at_rest.notify_all()


class WorkerPool(BoundedQueue):
    """Threads that are made when there is work, and end when there has been none for a while.

    Each takes one item after the other out of the queue and calls `work` with it. `work` must not
    raise.

    Workers come one after the other: wake() has one come, which takes an item and calls wake()
    itself, before it begins to work; so the next one comes, until the queue is empty. Long items
    get a worker each; but of a burst of short ones, a worker may take several before the next one
    is there.

    To have one come is to notify an idle worker, or to make a new one if none is idle. From then
    until it looks into the queue, it is *on the way*. Meanwhile, wake() does nothing, and need not:
    that worker has still to look into the queue, so it will see all that is there by then.

    No item is forgotten, because wake() is called

    1. after an item was put (by the server once in each round, for all that were put in it);
    2. by each worker that has taken an item;
    3. by the server from time to time, even if nothing was put: an earlier wake() may have come to
       nothing, because the system had no thread to give.

    If all `max_workers` workers are busy, wake() has none come, and need not: each looks into the
    queue when it is done.
    """

    IDLE_SECONDS = 10.0  # without work, after which a worker ends

    def __init__(
        self,
        name: str,
        work: Callable[[Any], None],
        max_workers: float = math.inf,
        max_waiting: float = math.inf,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        """`at_end` is called by each worker before it ends."""
        super().__init__(max_workers, max_waiting)
        self.name = name
        self._work, self._at_end = work, at_end
        self._not_empty = threading.Condition(self._lock)  # notified when an idle worker is wanted
        # Guarded by the lock, too:
        self._workers = 0  # threads
        self._idle = 0  # workers that wait for an item
        # Whether a worker is on the way. That worker clears it, with the lock held, before it looks
        # into the queue.
        self._on_the_way = False

    def wake(self) -> None:
        """Have a worker come if there is something for it to do. Does not block.

        The system may have no thread to give: call it again later.
        """
        # This looks without the lock, so it may miss an item that is just being put. That does no
        # harm, because whoever puts an item calls wake() after it.
        if not self._queue:
            return
        with self._lock:
            if self._on_the_way or not self._may_begin():
                return
            if self._idle:
                self._on_the_way = True
                self._not_empty.notify()
                return
            if self._workers >= self.max_workers:
                return
            self._on_the_way = True
            self._workers += 1
        try:
            threading.Thread(target=self._be_worker, name=self.name, daemon=True).start()
        except (RuntimeError, MemoryError):
            with self._lock:
                self._workers -= 1
                self._on_the_way = False

    def submit(self, function: Callable[[], None]) -> None:
        """Queue a function that nobody withdraws, whatever the bounds, and wake a worker for it."""
        key = object()
        self.reserve(key, bounded=False)
        self.put(key, function)
        self.wake()

    def _be_worker(self) -> None:
        """Be a worker."""
        try:
            item = self._get(is_new=True)
            while item is not None:
                self.wake()  # if there are more items, for another worker
                self._work_on(item)
                item = self._get()
        except BaseException as error:
            # Normally nothing above raises. But a task can have any thread raise an exception at
            # any point, through Python's C interface (PyThreadState_SetAsyncExc).
            log.error("a worker ends: %s", describe(error))
        with self._lock:
            self._workers -= 1
            # It may have been set for this worker, which an exception has ended. (If it was set for
            # another one, one more than needed may come: no harm.)
            self._on_the_way = False
        self.wake()  # for items that came meanwhile
        self._at_end()

    def _work_on(self, item: Any) -> None:
        try:
            self._work(item)
        finally:
            self._done()

    def _get(self, is_new: bool = False) -> Any:
        """Return the next item; None: there was none for a while, and this worker has to end.

        `is_new`: the worker was just made.
        """
        with self._lock:
            if is_new:
                self._on_the_way = False
            while not self._may_begin():
                if not self._wait_idle():
                    return None
            return self._take()[1]

    def _wait_idle(self) -> bool:
        """Wait to be notified; return false if there was nothing to do for too long.

        The lock is held.
        """
        self._idle += 1
        try:
            notified = self._not_empty.wait(self.IDLE_SECONDS)
        finally:
            self._idle -= 1
        # A worker whose wait is over counts as idle until it has the lock back. So it may happen:
        #
        #     this worker                               another thread
        #     ----------------------------------------  --------------------------------------------
        #     has waited for too long
        #                                               puts an item, and calls wake(), which finds
        #                                               an idle worker, sets _on_the_way, and
        #                                               notifies this one, too late
        #     has the lock; wait() returns false
        #
        # Then nobody is on the way. So even after a wait in vain, the flag is cleared, and this
        # worker looks into the queue once more before it ends.
        self._on_the_way = False
        return notified or self._may_begin()


# Coroutines
#
# Four facts about asyncio:
#
# 1. An event loop runs many coroutines in one thread. Another thread may not touch them; it has the
#    loop call a function (call_soon_threadsafe).
# 2. A coroutine runs in a *task of asyncio*, which is no task in the words of this file. Its
#    cancel() raises a CancelledError where the coroutine waits. The coroutine may catch that and go
#    on.
# 3. A SystemExit or KeyboardInterrupt in a task or a callback ends the loop.
# 4. A coroutine may call os.fork, which makes a *copy* of the process (4). Of its threads, the copy
#    has only the one that has called it: here, that of the event loop, with all its coroutines.
#
# A CoroutinePool has `max_workers` slots; an item has one from its first step to its last. The pool
# is given two functions: one prepares an item, the other one settles it. They may take long, for a
# disk or for long JSON, and the event loop would stand still meanwhile. So threads call them:
#
#     before(item)              returns a function `start`, which makes the coroutine when it is
#                               called, and `seconds`, its time limit, None for no limit. If `start`
#                               is None, there is nothing to run.
#     after(item, value, error) gets what the coroutine has returned or raised.
#
# So an item goes through these methods:
#
#     method         in              what is done
#     -------------  --------------  --------------------------------------------------------
#     _begin_next    a thread        the first step: calls before(item)
#     _start_run     the event loop  makes a task of asyncio, which awaits start()
#     _ended         the event loop  called by asyncio when the coroutine has returned or raised
#     _last_step     a thread        the last step: calls after(item, value, error)
#
# A coroutine that runs can be interrupted, for one of three reasons: it was cancelled, its time is
# over, or the server stops.
#
#     _interrupt     the event loop  cancels the coroutine, as in fact 2. Usually that ends it:
#                                    _ended and _last_step follow, and the reason is its error
#     _give_up       the event loop  called some seconds later, when its grace is over. If the
#                                    coroutine still runs, a thread calls after(item, None, reason),
#                                    so its task fails now. The coroutine goes on, and has its slot
#                                    until it ends


class Stopped(Exception):
    """The error of a coroutine that is interrupted, or not begun, because the server stops."""


# The event loops of this process.
_event_loops: weakref.WeakSet[EventLoop] = weakref.WeakSet()


class EventLoop:
    """An event loop of asyncio, in a thread of its own."""

    RETRY_SECONDS = 1.0  # after a loop could not be made

    def __init__(self) -> None:
        self.loop: Any = None  # asyncio's; None before the start and after the end
        # Held to set `loop`, and by other threads while they use it. The loop's own thread uses it
        # without the lock, because nobody else sets it to None.
        self._lock = threading.Lock()
        # Set by end(), in the loop's thread. If asyncio's loop stops while this is false, a
        # coroutine has stopped it; then it is run again.
        self._is_ending = False
        # When a loop could not be made, by the monotonic clock; guarded by the lock.
        self._failed_at = -math.inf
        _event_loops.add(self)

    def start(self) -> bool:
        """Start the loop unless it runs; return whether it does now."""
        with self._lock:
            if self.loop is not None:
                return True
            if time.monotonic() < self._failed_at + self.RETRY_SECONDS:
                return False
            try:
                # Not at the top of this file: it takes a tenth of a second and 6 MiB, which only
                # coroutines are worth.
                import asyncio

                loop = asyncio.new_event_loop()
                loop.set_exception_handler(self._log_stray)
            except BaseException as error:  # no descriptor, or a policy of asyncio's that fails
                if self._failed_at == -math.inf:
                    log.error("no event loop for coroutines yet: %s", describe(error))
                self._failed_at = time.monotonic()
                return False
            self._failed_at = -math.inf
            thread = threading.Thread(
                target=self._be_thread, args=(loop,), name="event-loop", daemon=True
            )
            try:
                thread.start()
            except (RuntimeError, MemoryError):  # no thread to be had
                loop.close()
                return False
            self.loop = loop
            return True

    def call_soon(self, function: Callable[..., None], *arguments: Any) -> bool:
        """Have the loop's thread call a function. Does not block.

        Return false if there is no loop: no coroutine has begun, or the process is ending.
        """
        with self._lock:
            if self.loop is None:
                return False
            try:
                self.loop.call_soon_threadsafe(function, *arguments)
            except RuntimeError:  # a coroutine has closed it
                return False
            return True

    def end(self) -> None:
        """End the loop. To be called in its thread."""
        self._is_ending = True
        self.loop.stop()

    def _be_thread(self, loop: Any) -> None:
        """Be the loop's thread."""
        own = os.getpid()
        self._is_ending = False
        while not self._is_ending and not loop.is_closed():
            error: BaseException | None = None
            try:
                loop.run_forever()  # returns, too, when a coroutine stops the loop
            except BaseException as exception:  # fact 3
                error = exception
            if os.getpid() != own:  # this is a copy, see leave_in_copy
                os._exit(0)
            if error is not None:
                log.warning("the event loop was ended, and goes on: %s", traceback_of(error))
        with self._lock:
            self.loop = None
        loop.close()

    def leave_in_copy(self) -> None:
        """End the loop in a copy of this process (fact 4).

        In the copy, no coroutine may go on but the one that has forked; and that one only to its
        next `await`, or to its end. (Usually it soon calls os.execv or os._exit.) So it comes to
        this:

        1. os.fork calls this method in the copy, before it returns to the coroutine.
        2. The coroutine goes on. If it ends, `_catch_all`, below, ends the copy.
        3. If it comes to an `await`, the loop goes on. It was told to stop, and does so, or raises,
           because its queue is empty. Either way, `_be_thread` ends the copy.

        If another thread has forked, nobody runs the loop in the copy, and this has no effect.
        """
        if self.loop is not None:
            self.loop.stop()
            # Before it stops, it runs all callbacks that are ready, among them steps of other
            # coroutines. They are in `_ready`, which is private to asyncio, and may not be there.
            # It is replaced by a queue that drops all that is put into it.
            with contextlib.suppress(AttributeError):
                self.loop._ready = collections.deque(maxlen=0)

    def _log_stray(self, loop: Any, context: dict[str, Any]) -> None:
        """Log what asyncio says of an exception that nobody has fetched (a hook of asyncio)."""
        error = context.get("exception")
        if error is not None:
            text = traceback_of(error)
        else:  # for example "Task was destroyed but it is pending!"
            text = f"{context.get('message')} {context.get('task', '')}"
        log.warning("what a coroutine left behind failed: %s", text)


def _leave_event_loops() -> None:
    for event_loop in list(_event_loops):
        event_loop.leave_in_copy()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_leave_event_loops)


class CoroutineRun:
    """One call of a coroutine function, from its start in the event loop to its end."""

    __slots__ = ("aio_task", "given_up", "item", "outcome", "reason", "timer")

    def __init__(self, item: Any) -> None:
        self.item = item
        self.aio_task: Any = None  # the asyncio.Task in which it runs
        # asyncio's timer, set to the time limit; after an interrupt, to the end of the grace.
        self.timer: Any = None
        self.reason: Exception | None = None  # why it was interrupted
        self.outcome: tuple[Any, BaseException | None] | None = None  # its value and its error
        self.given_up = False  # it goes on, but after() was called already


class CoroutinePool(BoundedQueue):
    """Coroutines in one event loop, which starts with the first item.

    The comment above says what an item goes through. `before` and `after` must not raise.
    """

    # For the first and the last step. With a journal, each thread waits for the disk, and all that
    # wait share one commit: 10,000 starts took 4 to 9 s with 8 threads, 1 s with 32.
    THREADS, THREADS_WITH_JOURNAL = 8, 32

    def __init__(
        self,
        before: Callable[[Any], tuple[Callable[[], Any] | None, float | None]],
        after: Callable[[Any, Any, BaseException | None], None],
        max_workers: float = math.inf,
        max_waiting: float = math.inf,
    ) -> None:
        super().__init__(max_workers, max_waiting)
        self.grace = 10.0  # seconds for which a coroutine that was interrupted may go on
        self._before, self._after = before, after
        self._threads = WorkerPool("coroutine", lambda step: step(), self.THREADS)
        self._event_loop = EventLoop()
        # Guarded by the lock: a thread was told to begin the next item, and has not taken it.
        self._is_beginning = False
        # For the event loop's thread alone:
        self._runs: dict[Hashable, CoroutineRun] = {}  # by key
        # Set by shut_down: from then on each coroutine is interrupted, a new one at once.
        self._stop_reason: Exception | None = None

    def wake(self) -> None:
        """Have coroutines begin if there are items for them. Does not block.

        The system may have no thread or descriptor to give: call it again later.
        """
        self._threads.wake()  # for a step that could not get a thread the last time
        if not self._queue:  # without the lock, as in WorkerPool
            return
        with self._lock:
            if self._is_beginning or not self._may_begin():
                return
            self._is_beginning = True
        self._threads.submit(self._begin_next)

    def expect_journal(self) -> None:
        """Have more threads for the first and the last step, because these wait for a disk."""
        self._threads.max_workers = self.THREADS_WITH_JOURNAL

    def interrupt(self, key: Hashable, reason: Exception) -> None:
        """Cancel a coroutine where it waits. It fails with `reason`, unless it ends in another way.

        Does nothing if it does not run. Does not block.
        """
        self._event_loop.call_soon(self._interrupt_key, key, reason)

    def shut_down(self, seconds: float) -> None:
        """Interrupt all coroutines, wait for them at most so long, and end the event loop."""
        self._event_loop.call_soon(self._interrupt_all, Stopped())
        self.join(seconds)
        self._event_loop.call_soon(self._event_loop.end)

    def _may_begin(self) -> bool:
        return super()._may_begin() and self._running < self.max_workers

    # In a thread of the pool

    def _begin_next(self) -> None:
        """Do the first step of the oldest item; meanwhile, another thread does that of the next."""
        has_loop = self._event_loop.start()
        with self._lock:
            self._is_beginning = False
            if not has_loop or not self._may_begin():
                return
            key, item = self._take()
        self.wake()
        start, seconds = self._before(item)
        if start is None:
            self._free_slot()
            return
        run = CoroutineRun(item)
        if not self._event_loop.call_soon(self._start_run, key, run, start, seconds):
            self._last_step(item, None, Stopped("the event loop has ended"))

    def _last_step(self, item: Any, value: Any, error: BaseException | None) -> None:
        self._after(item, value, error)
        self._free_slot()

    def _free_slot(self) -> None:
        """Let the next item have the slot of one that has ended."""
        self._done()
        self.wake()

    # In the thread of the event loop

    def _start_run(
        self, key: Hashable, run: CoroutineRun, start: Callable[[], Any], seconds: float | None
    ) -> None:
        """Have a coroutine run."""
        loop = self._event_loop.loop
        self._runs[key] = run
        # Each task of asyncio has its own values of context variables. It begins with those of
        # where it was created: here, with none. So no task sees those of another.
        empty_context = contextvars.Context()
        coroutine = self._catch_all(run, start)
        try:
            run.aio_task = empty_context.run(loop.create_task, coroutine)
        except BaseException as error:  # a coroutine has given the loop a task factory that fails
            coroutine.close()
            del self._runs[key]
            self._threads.submit(functools.partial(self._last_step, run.item, None, error))
            return
        run.aio_task.add_done_callback(functools.partial(self._ended, key, run))
        if seconds is not None:
            reason = TaskError(f"timed out after {seconds} seconds")
            run.timer = loop.call_later(seconds, self._interrupt, run, reason)
        if self._stop_reason is not None:  # the stop has begun since the first step
            self._interrupt(run, self._stop_reason)

    async def _catch_all(self, run: CoroutineRun, start: Callable[[], Any]) -> None:
        """Note what the coroutine returns or raises: even SystemExit ends this one alone."""
        own = os.getpid()
        try:
            run.outcome = (await start(), None)
        except BaseException as error:
            run.outcome = None, error
        if os.getpid() != own:  # this is a copy, see EventLoop.leave_in_copy
            os._exit(0)

    def _interrupt_key(self, key: Hashable, reason: Exception) -> None:
        if key in self._runs:
            self._interrupt(self._runs[key], reason)

    def _interrupt_all(self, reason: Exception) -> None:
        self._stop_reason = reason
        for run in list(self._runs.values()):
            self._interrupt(run, reason)

    def _interrupt(self, run: CoroutineRun, reason: Exception) -> None:
        if run.reason is not None:  # once is enough
            return
        run.reason = reason
        if run.timer is not None:
            run.timer.cancel()
        run.timer = self._event_loop.loop.call_later(self.grace, self._give_up, run)
        try:
            run.aio_task.cancel()  # calls cancel() of what the coroutine waits for
        except Exception as error:  # RecursionError, say, if it waits for a long chain of others
            log.warning("a coroutine cannot be cancelled: %s", describe(error))

    def _give_up(self, run: CoroutineRun) -> None:
        """Call after() for a coroutine that goes on after its grace; its slot stays taken."""
        if not run.aio_task.done():
            run.given_up = True
            self._threads.submit(functools.partial(self._after, run.item, None, run.reason))

    def _ended(self, key: Hashable, run: CoroutineRun, aio_task: Any) -> None:
        """A coroutine has ended: have its last step taken.

        If it was given up, that was done already; then only free its slot.
        """
        del self._runs[key]
        if run.timer is not None:
            run.timer.cancel()
        value, error = _outcome(run)
        # Without this, each would refer to the next: run, outcome, error, its traceback, the frame
        # of _catch_all, and run again. Only the garbage collector would free them.
        run.outcome = None
        if run.given_up:
            self._free_slot()
        else:
            self._threads.submit(functools.partial(self._last_step, run.item, value, error))


def _outcome(run: CoroutineRun) -> tuple[Any, BaseException | None]:
    """Return the value and the error of a coroutine that has ended.

    If it was interrupted by the stop, the reason replaces any error. If it was cancelled, or its
    time was over, the reason replaces only a CancelledError; another error is kept.
    """
    import asyncio  # costs nothing: the loop runs, so it was imported before

    value: Any
    error: BaseException | None
    if run.outcome is not None:
        value, error = run.outcome
    else:  # it was cancelled before asyncio had begun it
        value, error = None, asyncio.CancelledError()
    if error is not None and isinstance(run.reason, Stopped):
        return None, run.reason
    if isinstance(error, asyncio.CancelledError) and run.reason is not None:
        return None, run.reason
    return value, error


# How a thread is woken that waits for sockets or pipes


class Waker:
    """A socket of our own that a thread waits for, beside others: so it can be woken.

    wake() may be called by any thread, and never blocks. The thread that is woken calls clear(),
    and only after that looks for what there is to do: so no wake is lost that comes in between.
    """

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor to wait for until it can be read."""
        return self._receiver.fileno()

    def wake(self) -> None:
        """Wake the thread."""
        # This fails if the socket is full: then what is in it wakes the thread. Or if it is closed:
        # then nobody waits.
        with contextlib.suppress(OSError):
            self._sender.send(b"\0")

    def clear(self) -> None:
        """Forget that wake() was called."""
        with contextlib.suppress(BlockingIOError):  # it was not called
            self._receiver.recv(4096)  # if there is more, that wakes the thread again

    def close(self) -> None:
        """Close both ends."""
        self._receiver.close()
        self._sender.close()


# -- 4. Child processes ----------------------------------------------------------------------------
#
# What a worker's thread and its child process say to each other, through one pipe:
#
#     the worker                                    the child
#                <--  READY: give me a job  --
#                --  function, payload, default  -->
#                <--  BEGUN: the function is called  --
#                <--  PROGRESS: a report, ten a second  --
#                <--  RESULT, or ERROR  --
#
# A cancel does not reach the child: it wakes the worker, and the worker ends the child. When either
# side ends, the other one meets the end of the file. From the child come bytes and JSON: the server
# never unpickles what a task made.
#
# Seven facts about processes explain most of the rest:
#
# 1. Ctrl-C in a terminal and service managers send their signals to the children as well. A child
#    does nothing about them, because the server decides when a task ends.
# 2. A thread can block signals: they are held back until it unblocks them. A process or thread that
#    it starts begins with the same signals blocked.
# 3. To *reap* an ended process is to fetch its exit status, which can be done once. Only then may
#    the system give its number to another process.
# 4. A task may call os.fork, which makes a *copy* of the process. The copy has the same handlers of
#    signals, and has the same files and pipes open; these are closed only when both processes have
#    closed them, or have ended. Suppose that a task in a child forks, and the child dies: the copy
#    still has the pipe open, so the server does not hear of the death. In the same way, a lock on a
#    file may outlive the server that has taken it.
# 5. What a function changes in its process, such as the working directory, is still changed for the
#    next function.
# 6. Python calls a handler of a signal in the main thread, between any two steps of whatever that
#    thread is doing.
# 7. Processes can form a group; one call ends all of them. A child has a group of its own, and the
#    programs that its tasks start belong to it, too. Only one group at a time may read from a
#    terminal; a program of another group that tries is suspended.
#
# So a child begins like this: its worker blocks the stop signals in its own thread, and starts it
# (`Child._start`). It makes its group, sets its handlers, and unblocks the signals (`_child_main`).
# No signal can end it before it has its handlers.

READY, BEGUN, PROGRESS, RESULT, ERROR = b"ready", b"begun", b"progress", b"result", b"error"

START_SECONDS = 120.0  # in which a child must have imported its modules
REPORT_SECONDS = 0.1  # between two reports that go through the pipe
CHILD_NAME = "taskserver-child"  # of each child in `multiprocessing`

_POSIX = os.name == "posix"  # Windows has neither signal masks nor groups of processes
_SPAWN = multiprocessing.get_context("spawn")  # never fork: the server has threads

_PLAIN_DECODER = json.JSONDecoder()

Report = Callable[..., None]  # report(fraction, message=None)
Default = Union[Callable[[Any], Any], None]  # as in json.dumps


# What a worker does in its own thread


# To decode JSON of many small values takes up to 0.3 microseconds a byte, and much memory. If many
# threads did so at once, nobody would be served. So longer texts have to wait for their turn.
MAX_QUICK = 2048  # bytes of a text that needs no turn, and may be decoded by the server's loop
MAX_SHORT = 16_384  # bytes of a text that need not wait for those that are really long
_short_turn, _long_turn = threading.Lock(), threading.Lock()


def turn_to_decode(text: bytes) -> Any:
    """Return the lock to be held while a text of more than MAX_QUICK bytes is decoded."""
    return _short_turn if len(text) <= MAX_SHORT else _long_turn


def _decode_payload(payload: bytes) -> Any:
    # Not json.loads(), which is slower: it looks at the type of its argument and at its options.
    if len(payload) <= MAX_QUICK:
        return _PLAIN_DECODER.decode(payload.decode())
    with turn_to_decode(payload):
        return _PLAIN_DECODER.decode(payload.decode())


def call_here(
    function: Callable[..., Any], payload: bytes, report: Report, default: Default
) -> bytes:
    """Call a function in this thread; return the encoded result."""
    result = function(_decode_payload(payload), report)
    if hasattr(result, "__await__"):
        if inspect.iscoroutine(result):
            result.close()
        raise TaskError("the function returned an awaitable; declare it with `async def`")
    return encode_result(result, default)


# Printing, in the server and in children


class SafeStream:
    """A text stream that shows each line at once, and to which a task can always print."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        with contextlib.suppress(OSError, ValueError):  # it is closed, or nobody reads it
            stream.reconfigure(line_buffering=True, errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write; what nobody reads any more is lost."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, too."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_printing_safe() -> None:
    """Have what tasks print appear at once, in any locale; printing never fails."""
    for name in "stdout", "stderr":
        stream = getattr(sys, name)
        # Somebody may have put a stream of their own there.
        if isinstance(stream, io.TextIOWrapper):
            if stream.closed:
                stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- stays open
            setattr(sys, name, SafeStream(stream))


# Signals, and copies that a task forks

# The signals that ask a process to end.
STOP_SIGNALS = [
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last one exists on Windows
    if name in signal.Signals.__members__
]

# What a copy of this process must give up (fact 4): the handlers of these signals; and files, that
# is, pipes to children and the lock of a journal.
_own_handlers: list[Any] = []
_own_files: weakref.WeakSet[Any] = weakref.WeakSet()


def handle_stop_signals(handler: Callable[[int, Any], None]) -> None:
    """Have a function called for each of STOP_SIGNALS, but not in copies that a task forks."""
    _own_handlers.append(handler)
    for number in STOP_SIGNALS:
        is_ignored = signal.getsignal(number) == signal.SIG_IGN
        if not (is_ignored and number.name == "SIGHUP"):  # nohup has it ignored
            signal.signal(number, handler)


# Held while a pipe to a child is made, and while a task forks: otherwise the copy might keep a pipe
# that is not in _own_files yet.
_fork_lock = threading.Lock()
# In a threading.local, each thread has attributes of its own. `mask` stands for the signals that
# the thread had blocked before it forked, to be restored after it.
_fork_state = threading.local()


def _before_fork() -> None:
    """Until the fork is over, let no child be started, and hold the stop signals back.

    Between the fork and _after_fork_in_copy, the copy still has our handlers. A signal that came in
    between would call one of them, and would not end the copy.
    """
    _fork_lock.acquire()
    _fork_state.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _after_fork() -> None:
    """Undo what _before_fork did.

    Each of the two processes calls this, because the copy, too, begins with the lock taken and with
    the signals blocked.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork_state.mask)
    _fork_lock.release()


# A context in which a copy may set handlers. PyPy needs one; elsewhere, it does nothing.
_setting_handlers: Any = contextlib.nullcontext()
if sys.implementation.name == "pypy":
    _setting_handlers = importlib.import_module("__pypy__.thread").signals_enabled


def _after_fork_in_copy() -> None:
    """Make a copy of this process a process like any other."""
    with _setting_handlers:
        for number in STOP_SIGNALS:
            if any(signal.getsignal(number) is handler for handler in _own_handlers):
                signal.signal(number, signal.SIG_DFL)
    for file in list(_own_files):
        with contextlib.suppress(OSError):  # another thread was just closing it
            file.close()
    _after_fork()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_copy
    )


# What happens in a child


def _working_directory() -> str:
    """Return the working directory. OSError: it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        sentence = "the working directory of the server was deleted; start it in another one"
        raise OSError(sentence) from None


def _end_group(leader: int) -> None:
    """End a child and all that it has started, where there are groups of processes."""
    if _POSIX:
        with contextlib.suppress(OSError):  # it has ended, or has not made its group yet
            os.killpg(leader, signal.SIGKILL)


def _was_reaped(child: int) -> bool:
    """Return whether somebody else has reaped a child: a task may call os.wait (POSIX only)."""
    if not _POSIX:
        return False
    try:
        os.kill(child, 0)  # sends nothing; fails if there is no such process
    except ProcessLookupError:
        return True
    except PermissionError:  # it is there, and belongs to another user now
        pass
    return False


def _resource_limits() -> dict[int, tuple[int, int]]:
    """Return the soft and the hard limit of each resource, such as memory; Windows has none."""
    if not _POSIX:
        return {}
    import resource  # POSIX only

    numbers = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
    return {number: resource.getrlimit(number) for number in numbers}


def _set_resource_limits(limits: dict[int, tuple[int, int]]) -> None:
    """Set these limits, except where a hard limit was lowered, which nobody may raise again."""
    import resource

    for number, limit in limits.items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(number, limit)


def _drop_signals() -> None:
    """Drop signals that are on the way to the last task, so that the next one does not get them.

    POSIX only. Their handlers must be set after this.
    """
    # 1. Stop the timers that it has set.
    for timer in signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF:
        signal.setitimer(timer, 0)
    # 2. Drop signals that have come while it had them blocked. The system does so when they are set
    #    to be ignored.
    for number in signal.sigpending():
        signal.signal(number, signal.SIG_IGN)


class Surroundings:
    """What a task may change in its child, and the next one must find as it was (fact 5)."""

    def __init__(self) -> None:
        self._directory = _working_directory()
        # Spare descriptors of stdin, stdout and stderr, because a task may close or redirect these.
        self._streams = {}
        for number in range(3):
            with contextlib.suppress(OSError):  # it is closed
                self._streams[number] = os.dup(number)
        self._limits = _resource_limits()
        self._umask = os.umask(0)  # it can only be read by setting it
        os.umask(self._umask)
        self._handlers = {number: signal.getsignal(number) for number in range(1, signal.NSIG)}

    def restore(self) -> None:
        """Put everything back."""
        with contextlib.suppress(OSError):  # the directory was deleted
            os.chdir(self._directory)
        for number, duplicate in self._streams.items():
            with contextlib.suppress(OSError):  # the task has closed the duplicate
                os.dup2(duplicate, number)
        if not self.limits_are_unchanged():
            _set_resource_limits(self._limits)
        os.umask(self._umask)
        if _POSIX:
            _drop_signals()
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        if _POSIX:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # unblock all

    def limits_are_unchanged(self) -> bool:
        """Return whether the limits of resources are as they were at the start."""
        return self._limits == _resource_limits()


def _take_no_notice(number: int, frame: object) -> None:
    """Do nothing about a signal (fact 1).

    SIG_IGN would do the same, but programs that a task starts would inherit it.
    """


def _empty_stdin() -> None:
    """Make stdin empty, for the programs that a task starts.

    They must not read from the terminal, which would suspend them (fact 7).
    """
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)


def _child_main(pipe: Any) -> None:
    """Run the jobs that come through the pipe, one at a time, until its end. Never returns."""
    own = os.getpid()
    try:
        if _POSIX:
            os.setpgid(0, 0)  # a group of its own, which ends as a whole
            os.nice(10)  # computing gives way to serving
            _empty_stdin()
            # Programs that a task starts must not keep the pipe open, just as copies must not.
            os.set_inheritable(pipe.fileno(), False)
        _own_files.add(pipe)
        handle_stop_signals(_take_no_notice)  # the server decides what becomes of its tasks
        make_printing_safe()
        surroundings = Surroundings()
        # This unblocks the stop signals, too, which Child._start blocks (fact 2).
        surroundings.restore()
        while True:
            # The server waits for READY before it sends a job. Otherwise, if this child hangs, the
            # server would hang as well, in the middle of sending.
            pipe.send_bytes(READY)
            answer = _run_job(pipe, pipe.recv_bytes())
            if os.getpid() != own:  # a copy that the function has forked must not answer as well
                return  # so it goes to `finally`, and ends there
            # Restore before the answer: once the server has that, this task is over. If a timer
            # which the task has left behind ended the child later, the next task would fail.
            surroundings.restore()
            pipe.send_bytes(answer)
            if not surroundings.limits_are_unchanged():  # the next task gets another child
                return
    except (EOFError, OSError):  # the server has ended, or this child's worker
        pass
    finally:
        if os.getpid() == own:
            _end_group(own)  # on POSIX, this process ends here, with all that tasks have started
        # For copies, and for Windows. Not sys.exit(), which would wait for threads of tasks.
        os._exit(1)


def _run_job(pipe: Any, job: bytes) -> bytes:
    """Run one job; return the message that says how it ended. Its reports go through the pipe."""
    live, done = Live(), threading.Event()
    reporter = threading.Thread(target=_send_reports, args=(pipe, live, done), daemon=True)
    try:
        reporter.start()
    except (RuntimeError, MemoryError) as error:  # no thread to be had
        return ERROR + b" " + json.dumps([describe(error), ""]).encode()
    try:
        function, payload, default = pickle.loads(job)  # imports the function's module
        # The reporter writes into the pipe, too, but never at the same time: before the function
        # begins, the reporter has nothing to send; and before the result is sent, the reporter has
        # ended.
        pipe.send_bytes(BEGUN)
        return RESULT + b" " + call_here(function, payload, live.report, default)
    except BaseException as error:  # even SystemExit ends this task alone
        details = [describe(error), traceback_of(error)]
        return ERROR + b" " + json.dumps(details).encode()
    finally:
        done.set()
        reporter.join()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(Exception):  # the function may have put anything there
                stream.flush()


def _send_reports(pipe: Any, live: Live, done: threading.Event) -> None:
    """Send reports until the task is done. When the server is gone, end this process at once."""
    sent = _NOT_STARTED
    with contextlib.suppress(OSError):
        # The server sends nothing meanwhile. If there is something to read, it is the end of the
        # file: the server is gone.
        while not pipe.poll():
            is_over = done.wait(REPORT_SECONDS)
            if live.progress is not sent:
                sent = live.progress
                _, fraction, message = sent
                report = json.dumps([fraction, message])
                pipe.send_bytes(PROGRESS + b" " + report.encode())
            if is_over:
                return  # the only way out that leaves this process alive
    # The pipe can be read, or nothing can be sent: in both cases, the server is gone.
    _end_group(os.getpid())
    os._exit(1)


# What happens in the server


def _start_tracker() -> None:
    """Start the process in which `multiprocessing` keeps track of resources, if it is not there."""
    name = "resource_tracker" if sys.version_info >= (3, 8) else "semaphore_tracker"
    importlib.import_module(f"multiprocessing.{name}").ensure_running()


class Child:
    """A process that runs one task at a time, and a pipe to it. It belongs to one worker.

    The process starts with the first call(), serves the later ones, too, and is replaced when it
    has ended. On Windows, what a task has started itself may outlive it.

    A worker that starts a child blocks the stop signals in its own thread, for good. So the child
    begins with them blocked, and unblocks them once its handlers are set. The main thread must not
    use call(), because it has to receive these signals.
    """

    def __init__(self, reaping: threading.Lock) -> None:
        self._reaping = reaping  # held while a process is started or joined, see Children
        self._process: Any = None
        self._pipe: Any = None  # our end
        self._waker = Waker()  # has call() look whether its task was cancelled
        self.may_retry = True  # becomes false once, by any thread, when this process ends

    def call(
        self,
        function: Callable[..., Any],
        payload: bytes,
        live: Live,
        timeout: float | None,
        default: Default,
    ) -> bytes:
        """Return the encoded result of function(decoded payload, report), called in the child.

        Blocks. `timeout` counts from when the function is called. Cancelled: `live` asks for it.
        TaskError: the function raised (then `trace` tells where), or its process died, was too
        slow, or could not start.
        """
        try:
            self._hand_over(function, payload, live, default)
            deadline = None if timeout is None else time.monotonic() + timeout
            while True:
                kind, _, body = self._receive(live, deadline).partition(b" ")
                if kind == RESULT:
                    return body
                if kind == ERROR:
                    raise TaskError(*json.loads(body))
                fraction, message = json.loads(body)  # what is left is PROGRESS
                live.report(fraction, message)  # raises Cancelled, if that was asked for
        except TaskError:
            raise
        except TimeoutError:
            self.end()
            raise TaskError(f"timed out after {timeout} seconds") from None
        except Cancelled:
            self.end()
            raise
        except Exception:  # the child has ended, or has sent what no child sends
            how = self.end()
            raise TaskError(f"the child process died ({how})") from None

    def wake(self) -> None:
        """Have call() look whether its task was cancelled. Never blocks; called by any thread."""
        self._waker.wake()

    def kill(self) -> None:
        """End the process at once, if there is one. Waits for no lock."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ValueError):  # end() has just closed it, so it has ended
            # Another thread may just have reaped it. But the system gives numbers away in turn, so
            # no other process has this one so soon.
            _end_group(process.pid)
            process.kill()

    def end(self) -> str:
        """End the process and what it has started, if there is one; return how it ended."""
        if self._process is None:
            return ""
        with self._reaping:
            self.kill()
            deadline = time.monotonic() + 5
            # join(5) would wait until `sentinel` can be read, a descriptor that a copy of the
            # process may keep open (fact 4). So ask the system, by `exitcode`, again and again.
            while self._process.exitcode is None and time.monotonic() < deadline:
                if _was_reaped(self._process.pid):
                    break
                self._process.join(0.02)
            status = self._process.exitcode
            if status is not None:
                self._process.close()  # its descriptors; PyPy would do that some time later
        self._process = None
        self._pipe.close()
        if status is not None and status < 0:
            return f"killed by signal {-status}"
        return f"exit status {status}"

    def close(self) -> None:
        """End the process for good."""
        self.end()
        self._waker.close()

    def _hand_over(
        self, function: Callable[..., Any], payload: bytes, live: Live, default: Default
    ) -> None:
        """Have the child begin; start it if there is none.

        TaskError: it did not begin. Cancelled. ValueError: it sent what no child sends.
        """
        is_new = self._process is None
        try:
            job = pickle.dumps((function, payload, default))
            if is_new:
                self._start()
        except Exception as error:  # it cannot be pickled; or no process or memory is to be had
            raise TaskError(f"no child process can take the task: {describe(error)}") from None
        deadline = time.monotonic() + START_SECONDS
        try:
            if self._receive(live, deadline) != READY:
                raise ValueError("no child begins like this")
            self._pipe.send_bytes(job)
            message = self._receive(live, deadline)
        except TimeoutError:
            how = self.end()
            raise TaskError(
                "the child process did not take the task "
                f"(no start in {START_SECONDS:g} seconds, {how})"
            ) from None
        except Exception:  # not Cancelled, which is a BaseException
            how = self.end()
            if not is_new and self.may_retry:  # it has ended since its last task: begin a new one
                self._hand_over(function, payload, live, default)
                return
            raise TaskError(
                f"the child process ended before it took the task ({how}); "
                'is `if __name__ == "__main__":` missing?'
            ) from None
        kind, _, body = message.partition(b" ")
        if kind == ERROR:  # say, the function's module cannot be imported
            raise TaskError(*json.loads(body))
        if kind != BEGUN:
            raise ValueError(kind)

    def _receive(self, live: Live, deadline: float | None) -> bytes:
        """Return the next message of the child. EOFError: it has ended. TimeoutError. Cancelled."""
        while True:
            if live.cancel_requested:
                raise Cancelled
            seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            # `sentinel` can be read when the process has ended. The pipe alone is not enough: on
            # Windows a process may die and leave it open.
            sources: list[Any] = [self._pipe, self._process.sentinel, self._waker]
            ready: list[Any] = multiprocessing.connection.wait(sources, seconds)
            if not ready:
                raise TimeoutError
            if self._waker in ready:
                self._waker.clear()  # now the loop looks at `cancel_requested` again
            elif self._pipe.poll():
                message: bytes = self._pipe.recv_bytes()
                return message
            else:
                raise EOFError

    def _start(self) -> None:
        """Start a process."""
        _working_directory()  # without one, `multiprocessing` fails and does not say why
        if _POSIX:
            # Starting the tracker unblocks signals, as a side effect. So it is started before they
            # are blocked; otherwise process.start() would start it, and undo the block.
            _start_tracker()
            # The child inherits this, so that no signal reaches it before its handlers are set.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        # process.start() does not use os.fork. If it did, _before_fork would wait for ever for the
        # lock that is held here.
        with self._reaping, _fork_lock:
            self._pipe, far_end = _SPAWN.Pipe()
            _own_files.add(self._pipe)
            # `with` closes the child's end in this process. While it is open here, we do not meet
            # the end of the file when the child ends.
            with far_end:
                process = _SPAWN.Process(target=_child_main, args=(far_end,), name=CHILD_NAME)
                process.start()
        self._process = process


class Children:
    """The children of an application: one for each worker that runs tasks in one."""

    def __init__(self) -> None:
        # Held while a process is started or joined: each time, `multiprocessing` looks at all its
        # children, and reaps those that have ended. If two threads did so at once, both might try
        # to reap the same child, and one would not get its exit status (fact 3). These are slow
        # system calls, but no thread that serves clients takes this lock.
        self._reaping = threading.Lock()
        self._mine = threading.local()  # .child is that of this thread, if it has one
        self._lock = threading.Lock()  # guards the next one; kill() alone reads it without
        self._all: set[Child] = set()
        self._closed = False  # becomes true once, by any thread

    def call(
        self,
        function: Callable[..., Any],
        payload: bytes,
        live: Live,
        timeout: float | None,
        default: Default,
    ) -> bytes:
        """Call a function in the child of this worker, as `Child.call` says."""
        if self._closed:
            raise TaskError("the server ended before the task was begun")
        if not hasattr(self._mine, "child"):
            self._add()
        child: Child = self._mine.child
        return child.call(function, payload, live, timeout, default)

    def end_mine(self) -> None:
        """End the child of this worker, because the worker ends."""
        child = getattr(self._mine, "child", None)
        if child is not None:
            with self._lock:
                self._all.discard(child)
            child.close()

    def wake(self) -> None:
        """Have each worker look whether its task was cancelled. Does not block."""
        with self._lock:  # so that none of them is closed meanwhile
            for child in self._all:
                child.wake()

    def kill(self) -> None:
        """End all children, because this process ends; no task is begun in one any more.

        Waits for no lock, so that a signal handler may call it. A child that a worker starts just
        now ends by itself, when it sees that this process has ended.
        """
        self._closed = True
        for child in list(self._all):
            child.may_retry = False
            child.kill()

    def _add(self) -> None:
        child = Child(self._reaping)
        with self._lock:
            # At its end, Python calls what is registered here, the last function first.
            # `multiprocessing` has registered one at its import, which waits for its children. So
            # kill() comes before it, and there is nothing left to wait for.
            atexit.unregister(self.kill)  # so that it is registered once
            atexit.register(self.kill)
            self._all.add(child)
        self._mine.child = child


# -- 5. Requests, responses, routes ----------------------------------------------------------------


MAX_PARAMETERS = 100  # of a query


class Fields(NamedTuple):
    """The headers of a request and what follows from them."""

    # Names in lower case; the values of several lines joined by ", ".
    headers: Mapping[str, str] = {}
    length: int = 0  # bytes of the body, unless that is chunked
    chunked: bool = False
    keep_alive: bool = True
    expects_continue: bool = False
    minor: int = 1  # of the HTTP version: 1 for HTTP/1.1

    def has_body(self) -> bool:
        """Return whether a body follows; one in chunks may turn out to be empty."""
        return self.chunked or self.length > 0


class Request(NamedTuple):
    """One request as the application sees it."""

    method: str
    path: str  # percent-encoded, as it was sent: unquote it before you compare it
    query: str = ""  # the same
    # The host that the request is for, and the port, if it is given; from the URL in the first
    # line, or, if there is none, from the Host header. "" if a request of HTTP/1.0 names none.
    host: str = ""
    fields: Fields = Fields()
    body: bytes = b""
    peer: str = ""  # the address of the client, or of the proxy between
    # False: a check has refused it, for lack of a token, say; but its route lets such requests in
    # all the same (`waived` in Router.add), as that of /healthz does.
    trusted: bool = True

    def with_body(self, body: bytes) -> Request:
        """Return the request with a body. Half a microsecond; `_replace` needs two."""
        return Request(
            self.method,
            self.path,
            self.query,
            self.host,
            self.fields,
            body,
            self.peer,
            self.trusted,
        )

    def header(self, name: str) -> str:
        """Return the value of a header by its name in lower case, "" if it is not there."""
        return self.fields.headers.get(name, "")

    def parameter(self, name: str, pattern: str, *, example: str) -> str | None:
        """Return a parameter of the query, None if it is not there.

        HTTPError 400: it is there twice, or does not match the pattern; `example` shows what would.
        Or there are too many.
        """
        if self.query.count("&") >= MAX_PARAMETERS:
            raise HTTPError(400, f"Send at most {MAX_PARAMETERS} parameters.")
        pairs = urllib.parse.parse_qsl(self.query, keep_blank_values=True)
        values = [value for key, value in pairs if key == name]
        if not values:
            return None
        if len(values) > 1:
            raise HTTPError(400, f"Send {name} once, such as {name}={example}.")
        if not re.fullmatch(pattern, values[0]):
            raise HTTPError(400, f"Send another value of {name}, such as {name}={example}.")
        return values[0]


class Response(NamedTuple):
    """One answer. The server adds a line feed to the body, so that it reads well in a terminal."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "application/json"


class Later(NamedTuple):
    """Returned by an endpoint that cannot answer yet. Its connection waits, and no thread does.

    The server's loop (or Application.handle) calls `watch(wake)`. From then on any thread may call
    `wake`, once or more. The wait is over at the first of these:

    - `wake` was called;
    - `seconds` have passed;
    - the client has ended its sending, and `answers_early` is true. (Each side of a connection ends
      its own sending, see 7, fact 3. So the client may still read, or it may be gone. Nobody can
      tell, so it is answered now.)
    - the server shuts down.

    Then the loop calls `unwatch(wake)` and `answer()`. If the connection breaks, it calls
    `unwatch(wake)` alone. If the wait is over before it has begun, because the client has ended its
    sending already, it calls `answer()` alone.

    None of these functions may block. If `watch` or `unwatch` raises, the connection is closed.
    """

    seconds: float
    watch: Callable[[Callable[[], None]], None]
    unwatch: Callable[[Callable[[], None]], None]
    answer: Callable[[], Response]
    # True: answer() has something to say at any time; as for a long poll, the pending record.
    # False: before `wake` was called, it can only refuse, so a client that has ended its sending
    # waits on.
    answers_early: bool = True


class HTTPError(Exception):
    """A refusal: a status and one sentence that says what to do."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(status, message)
        self.status = status
        self.response = Response(status, json.dumps({"error": message}).encode(), headers)


def unavailable(error: Unavailable) -> HTTPError:
    """Return the refusal of what cannot be done now (RFC 9110, 10.2.3)."""
    seconds = math.ceil(min(max(1.0, error.retry_after), 1e9))
    return HTTPError(503, str(error), ("Retry-After", str(seconds)))


# An endpoint takes a request and, where the pattern of its route ends in {id}, that segment.
Endpoint = Callable[..., Union[Response, Later]]
Schema = Union[str, Mapping[str, Any], None]  # JSON Schema, or the name of one in /openapi.json
_ANYTHING: Schema = {}


class Route(NamedTuple):
    """An endpoint: when it is called, and what clients are told of it. See `Router.add`."""

    method: str
    pattern: str
    endpoint: Endpoint
    blocks: Callable[[Request], bool] = lambda request: True
    check: Callable[[Request], None] | None = None
    waived: tuple[int, ...] = ()
    summary: str = ""
    details: str = ""
    tag: str = ""
    operation: str = ""
    statuses: Mapping[int, str] = {200: "What was asked for."}
    refusals: tuple[int, ...] = (400, 401, 421)
    answer: Schema = _ANYTHING
    media_type: str = "application/json"
    body: Schema = None
    parameters: tuple[Mapping[str, Any], ...] = ()


class Verdict(NamedTuple):
    """What is to become of a request: which route answers it; or a refusal, if there is one."""

    route: Route
    arguments: tuple[str, ...] = ()  # of its endpoint, after the request
    refusal: Response | None = None
    trusted: bool = True  # goes into the request


# Stands in where there is no route. The verdict has a refusal then, so the endpoint is not called.
_NO_ROUTE = Route("", "", lambda request: Response(404))


class Router:
    """Finds the route of a request, and lists what there is for /openapi.json."""

    def __init__(self) -> None:
        self.routes: list[Route] = []
        self._longest = 0  # segments of a pattern
        # By the segments of the pattern, None for {id}, then by method.
        self._routes: dict[tuple[str | None, ...], dict[str, Route]] = {}
        # A client that polls asks for the same path again and again.
        self.match = functools.lru_cache(maxsize=1024)(self._match)

    def add(self, method: str, pattern: str, endpoint: Endpoint, **more: Any) -> None:
        """Have an endpoint answer a method at a path. Who answers GET answers HEAD as well.

        The last segment of a pattern may be {id}; it is handed to the endpoint. Further arguments,
        all of them by name:

        - `blocks(request)`: whether the endpoint may wait or compute for long; then a thread calls
          it. That is the default. If it is false, the server's loop calls the endpoint itself, and
          all other connections wait meanwhile.
        - `check(request)`: a rule for the head of a request; may raise HTTPError; must be quick.
        - `waived`: statuses, such as (401, 421). If a check of the application refuses a request
          with one of these, this route lets it in all the same, with `trusted` false.
        - `summary`, `details`: what it does, in a line, and more. `tag`: to which group it belongs.
        - `operation`: its name in clients that are made from the description.
        - `statuses`: those that its answer can have, with a sentence for each. `refusals`: those
          that an error can have.
        - `answer`, `body`: the schemas of the answer and of what is posted, or their names; None
          where there is nothing. One with a title becomes a type of that name in clients.
        - `media_type`: that of the answer, as in its Response. If it is not that of JSON, `answer`
          is not used.
        - `parameters`: those of query and headers, as OpenAPI describes them; {id} as well, if it
          is something else than a UUID.
        """
        route = Route(method, pattern, endpoint, **more)
        segments = [None if segment == "{id}" else segment for segment in pattern.split("/")]
        self._longest = max(self._longest, len(segments))
        methods = self._routes.setdefault(tuple(segments), {})
        methods[method] = route
        if method == "GET":
            methods["HEAD"] = route
        self.routes.append(route)
        self.match.cache_clear()

    def _match(self, method: str, path: str) -> Verdict:
        """Return what answers a method at a path.

        HTTPError 404: no such path; 405: no such method there. A path is split at its slashes
        first, then each segment is decoded, so that %2F does not split one (RFC 3986, 2.4).
        """
        if path == "*":  # only OPTIONS asks so, about the server as a whole (RFC 9110, 9.3.7)
            return Verdict(_options_route(path, "GET, HEAD, OPTIONS, POST"))
        segments = tuple(path.split("/"))
        # A path that is longer than all patterns matches none, and is not worth decoding.
        if "%" in path and len(segments) <= self._longest:
            segments = tuple(map(urllib.parse.unquote, segments))
        arguments: tuple[str, ...] = ()
        methods = self._routes.get(segments)
        if methods is None:
            arguments = segments[-1:]
            methods = self._routes.get((*segments[:-1], None))
        if methods is None:
            sentence = "There is nothing at this path; GET /openapi.json lists what there is."
            raise HTTPError(404, sentence)
        route = methods.get(method)
        if route is not None:
            return Verdict(route, arguments)
        allowed = ", ".join(sorted({"OPTIONS", *methods}))
        if method == "OPTIONS":
            return Verdict(_options_route(path, allowed))
        raise HTTPError(405, f"This path takes another method: {allowed}.", ("Allow", allowed))


def _options_route(path: str, allowed: str) -> Route:
    """Return what answers OPTIONS, which needs no token and no particular Host."""
    response = Response(204, headers=(("Allow", allowed),))
    return Route("OPTIONS", path, lambda request: response, never_blocks, waived=(401, 421))


def never_blocks(request: Request) -> bool:
    """Say of any request that its endpoint answers at once."""
    return False


MAX_DEPTH = 100  # of nested arrays and objects

# What _check_depth looks at: brackets, quotes, and escapes in strings, such as that of a quote.
_BRACKET_QUOTE_OR_ESCAPE = re.compile(r'[\[{\]}"]|\\.', re.DOTALL)


def _check_depth(text: str) -> None:
    """ValueError: a text of JSON is nested too deep for the decoders of some Pythons."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    is_in_string = False
    for match in _BRACKET_QUOTE_OR_ESCAPE.finditer(text):
        token = match.group()
        if token == '"':
            is_in_string = not is_in_string
        elif is_in_string:
            continue  # brackets do not count there
        elif token in ("[", "{"):
            depth += 1
        elif token in ("]", "}"):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("an object has a key twice")
    return members


def _bounded_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"an integer has more than {MAX_DIGITS} digits")
    return int(text)


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is not a number that JSON can hold")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_members,
    parse_int=_bounded_int,
    parse_float=_finite_float,
    parse_constant=_finite_float,
)


_WHITE_SPACE = " \t\r\n"  # of JSON (RFC 8259, 2)


def decode_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body; stricter than `json`, and the same on every Python.

    HTTPError 400: no UTF-8 or a byte order mark (RFC 8259, 8.1), no JSON, no object, a key twice, a
    lone surrogate, a number or a depth beyond bounds.
    """
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise HTTPError(400, "Send the body in UTF-8 without a byte order mark.")
    try:
        text = body.decode()
        _check_depth(text)
        # Not _DECODER.decode(), which is slower: it skips white space by regular expressions.
        text = text.rstrip(_WHITE_SPACE)
        begin = len(text) - len(text.lstrip(_WHITE_SPACE))
        value, end = _DECODER.raw_decode(text, begin)
        if end < len(text):
            raise ValueError("something follows the value")
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails for a lone surrogate
    except UnicodeError:
        raise HTTPError(400, "Send the body in UTF-8, without lone surrogates.") from None
    except ValueError as error:
        raise HTTPError(400, f"Send a body of JSON: {error}.") from None
    if not isinstance(value, dict):
        raise HTTPError(400, 'Send one JSON object, such as {"name": "sample"}.')
    return value


# -- 6. Application --------------------------------------------------------------------------------

Function = TypeVar("Function", bound=Callable[[Dict[str, Any], Report], Any])

MAX_NAME = 256  # characters
MAX_WAIT = 30.0  # seconds of a long poll
CANCEL_SECONDS = 5.0  # for which the answer to a cancel waits for the journal
DECODE_SECONDS = 5.0  # for which a create with a long body waits for its turn to be decoded

BY_REQUEST = "cancelled: by request"  # the error of a task that was cancelled

_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# What /openapi.json says of parameters and bodies.

WAIT = {
    "name": "wait",
    "in": "query",
    "description": "Answer when the task is final, or after so many seconds (up to "
    f"{MAX_WAIT:g}): a plain decimal number, such as 2.5.",
    "schema": {"type": "number", "minimum": 0, "default": 0},
}

IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A new UUID for each task; it becomes its id. Who sends a create again with the "
    "same one, because no answer came, gets the record of the first.",
    # Without "format": "uuid", because some generated clients cannot send a UUID in a header.
    "schema": {"type": "string"},
}

CANCEL_DETAILS = (
    "A task that waits is final at once; one that runs is asked to end, and its record tells what "
    "came of it. One that is final stays as it is."
)


def new_id() -> str:
    """Return a random UUID (RFC 9562, 5.4), in a third of the time that the module `uuid` needs."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def check_create(request: Request) -> None:
    """Check the headers of a create: a length, JSON, and a key that is a UUID.

    HTTPError 411, 415, 400.
    """
    headers = request.fields.headers
    if "content-length" not in headers and not request.fields.chunked:
        raise HTTPError(411, "Send a Content-Length.")
    media_type = headers.get("content-type", "").partition(";")[0].strip(" \t").lower()
    if media_type != "application/json" or "content-encoding" in headers:
        sentence = "Send JSON that is not compressed, with Content-Type: application/json."
        raise HTTPError(415, sentence)
    idempotency_key(request)


def idempotency_key(request: Request) -> str | None:
    """Return the Idempotency-Key of a create in lower case, None if it has none.

    A create with a key may be sent twice. The key may stand in quotes, as the draft of the IETF
    says (draft-ietf-httpapi-idempotency-key). HTTPError 400: it is no UUID.
    """
    if "idempotency-key" not in request.fields.headers:
        return None
    key = request.header("idempotency-key").lower()
    if key.startswith('"') and key.endswith('"'):
        key = key[1:-1]
    if not _UUID.fullmatch(key):
        raise HTTPError(400, "Send a UUID as the Idempotency-Key: 36 characters, with hyphens.")
    return key


def _still_being_stored() -> HTTPError:
    sentence = "The first create with this Idempotency-Key is being stored; try again."
    return HTTPError(409, sentence, ("Retry-After", "1"))


def check_origin(request: Request) -> None:
    """See that no page of another site sends this. HTTPError 403.

    Browsers say in Sec-Fetch-Site where a request comes from; older ones, in Origin. Others, such
    as curl, send neither.

    (A create needs no such check, because its media type is that of JSON. Before a browser sends
    such a request for a page of another site, it asks by OPTIONS whether it may: a *preflight*. Our
    answer has no Access-Control-Allow-Origin, so it may not.)
    """
    site = request.header("sec-fetch-site")
    origin = request.header("origin").lower()
    if site:
        is_own = site in ("same-origin", "none")
    elif origin:
        _, separator, host = origin.partition("://")
        is_own = separator != "" and host == request.host.lower()
    else:
        is_own = True
    if not is_own:
        raise HTTPError(403, "Send this from a page of this server, or without a browser.")


def location(record: Record) -> tuple[str, str]:
    """Return the header that says where a task can be polled."""
    return "Location", f"/poll-{record.type}/{record.id}"


def _unwrapped(function: Any) -> Any:
    """Return what a functools.partial calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _is_a(kind: Callable[[Any], bool], function: Any) -> bool:
    """Return whether a function is of this kind; or if it is an object, whether its __call__ is."""
    function = _unwrapped(function)
    if kind(function):
        return True
    # To call an object is to call the __call__ of its class.
    return callable(function) and kind(type(function).__call__)


def is_coroutine_function(function: Any) -> bool:
    """Return whether something is an `async def` function, or an object whose __call__ is one."""
    return _is_a(inspect.iscoroutinefunction, function)


def _check_options(name: Any, timeout: Any, unknown: Mapping[str, Any]) -> None:
    """ValueError, TypeError: a task type cannot be registered with these options."""
    if "executor" in unknown:
        raise TypeError(
            f"task type {name!r}: instead of executor=, register an `async def` function that says "
            "`await asyncio.get_running_loop().run_in_executor(executor, work, payload)`"
        )
    if unknown:
        raise TypeError(f"task type {name!r}: there is no option {next(iter(unknown))}=")
    if callable(name):  # @application.task without parentheses
        raise TypeError('name the task type: @application.task("thumbnail")')
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9-]*", name):
        raise ValueError(
            f"task type {name!r}: choose a name of lower-case letters, digits and hyphens"
        )
    if timeout is not None and not _is_time_limit(timeout):
        raise ValueError(
            f"task type {name!r}: use a timeout= of more than 0 and at most a million seconds"
        )


def _check_payload_schemas(name: str, schemas: Any) -> None:
    """ValueError: these are no JSON Schemas of members of a payload."""
    problem = ""
    if not isinstance(schemas, Mapping) or not all(map(_is_schema, schemas.values())):
        problem = "map names of members to JSON Schemas, such as {'seconds': {'type': 'number'}}"
    elif "name" in schemas:
        problem = "leave out 'name', which every payload has"
    if problem:
        raise ValueError(f"task type {name!r}: in payload=, {problem}")


def _is_schema(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, (Mapping, bool))


def _is_time_limit(timeout: Any) -> bool:
    return isinstance(timeout, (int, float)) and 0 < timeout <= 1e6


def _check_function(name: str, function: Any, cpu: bool) -> None:
    """ValueError: a function cannot be that of a task type."""
    problem = _problem_of(function)
    if not problem and cpu:
        problem = _problem_with_cpu(function)
    if problem:
        raise ValueError(f"task type {name!r}: {problem}")


# Decorators that have to stand above @application.task, not below it.
_OUTER_DECORATORS = (staticmethod, classmethod, property)


def _problem_of(function: Any) -> str:
    """Return why something cannot be the function of a task type, "" if it can."""
    if isinstance(function, _OUTER_DECORATORS):
        return f"swap the decorators: @{type(function).__name__} above @application.task"
    if isinstance(function, type) or not callable(function):
        return "decorate a function that takes (payload, report)"
    for kind in inspect.isgeneratorfunction, inspect.isasyncgenfunction:
        if _is_a(kind, function):
            return "a generator cannot be a task: return the result instead of yielding"
    try:
        # The signature of the wrapper, because it may take other arguments than what it wraps.
        inspect.signature(function, follow_wrapped=False).bind({}, None)
    except TypeError:
        return "the function must take two arguments, (payload, report)"
    except ValueError:  # written in C, it does not tell
        pass
    return ""


def _problem_with_cpu(function: Any) -> str:
    """Return why a function cannot run in a child process, "" if none is seen yet."""
    if is_coroutine_function(function):
        return "a coroutine waits and does not compute: leave out cpu=True"
    function = _unwrapped(function)
    qualified_name = getattr(function, "__qualname__", type(function).__qualname__)
    if "<lambda>" in qualified_name or "<locals>" in qualified_name:
        return "with cpu=True, use a function at the top level of a module"
    return ""


def _check_import(name: str, function: Any, default: Default) -> None:
    """ValueError: a child process cannot import what it is to call.

    The module of the function may be

    - __main__, this program;
    - __mp_main__: so the program is called in a child of `multiprocessing`. This process is one;
      its own children will find the function under the same name;
    - any other: one of Python's finders must find it by its name.
    """
    module = getattr(_unwrapped(function), "__module__", None) or ""
    if module == "__main__":
        if not _is_program_importable():
            raise ValueError(
                f"task type {name!r}: a child process cannot import this program; with cpu=True, "
                "move the function into a module of its own"
            )
    elif module != "__mp_main__" and not _is_importable(module):
        raise ValueError(
            f"task type {name!r}: a child process cannot import {module}; with cpu=True, put the "
            "function into a module that `import` finds"
        )
    try:
        pickle.dumps((function, default))
    except Exception as error:
        raise ValueError(
            f"task type {name!r}: a child process cannot get this function ({describe(error)}); "
            "with cpu=True, put it at the top level of a module, with @application.task as the "
            "outermost decorator"
        ) from None


def _is_program_importable() -> bool:
    """Return whether a child process can import this program.

    That depends on how this process was started:

        python program.py      yes
        python -m program      yes
        python -m package      no, children do not import package.__main__
        python < program.py    no, and so with -c or interactively: there is no file
        ./program              yes, if it was packed by PyInstaller, for example
    """
    program = sys.modules.get("__main__")
    spec = getattr(program, "__spec__", None)  # None, unless it was started with -m
    if spec is not None and spec.name.rpartition(".")[2] == "__main__":
        return False
    file = getattr(program, "__file__", None) or ""
    has_file = file != "" and not file.startswith("<")  # it may be <stdin>
    return has_file or hasattr(sys, "frozen")


def _is_importable(module: str) -> bool:
    """Return whether a new process finds a module by its name.

    This process may have loaded the module in some other way.
    """
    if module == "":  # some functions that are written in C have no __module__: let them pass
        return True
    package, _, _ = module.rpartition(".")
    if package and not _is_importable(package):
        return False
    path = getattr(sys.modules.get(package), "__path__", None)
    for finder in sys.meta_path:
        # Some finders of Python 3.7 cannot be asked. One of them might find it: let it pass.
        find_spec = getattr(finder, "find_spec", None)
        if find_spec is None or find_spec(module, path) is not None:
            return True
    return False


class TaskType(NamedTuple):
    """A registered function, and where and how it is called."""

    name: str
    function: Callable[..., Any]
    pool: WorkerPool | CoroutinePool
    timeout: float | None
    rerun: bool
    payload_schemas: Mapping[str, Any]  # of members of the payload, for the description


def _create_schema(task_type: TaskType) -> dict[str, Any]:
    """Return what /openapi.json says of the body that creates a task of this type."""
    words = [word.capitalize() for word in task_type.name.split("-")]
    name = {
        "type": "string",
        "description": "Any text that tells it from others; not blank.",
        "minLength": 1,
        "maxLength": MAX_NAME,
        # Just "\S" would do, but some tools match a pattern only at the start of the text.
        "pattern": r"^[\s\S]*\S",
    }
    return {
        "title": "Create" + "".join(words),
        "type": "object",
        "description": f"The payload of a task of type {task_type.name}.",
        "required": ["name"],
        "properties": {"name": name, **task_type.payload_schemas},
        "additionalProperties": True,
        "examples": [{"name": "sample"}],
    }


class Application:
    """The task types, their endpoints, and the life of a task. It knows no sockets.

    Building one starts no thread, process or socket. Public attributes may be set until the first
    request. The bounds of `store`, `pool` and `cpu_pool` are the defaults of main's options; an
    option that is given replaces them. (`coroutine_pool` always gets the bounds of `pool`, and
    `cpu_pool` its `max_waiting`.)
    """

    # A task that waits for a network costs a thread of some 16 KiB, so hundreds fit into the
    # smallest machine. More at once would overload what they wait for, and not be done earlier.
    WORKERS = 256
    MAX_WAITING = 10_000

    def __init__(self, default: Default = None) -> None:
        """`default` is that of `json.dumps`: it makes JSON of results that `json` does not know."""
        self.default = default
        self.store = Store()
        self.router = Router()
        # Each sees the head of a request once, before its endpoint; may raise HTTPError; is quick.
        self.checks: list[Callable[[Request], None]] = []
        self.secured = False  # whether one of the checks asks for a token
        self.types: dict[str, TaskType] = {}
        self.children = Children()
        self.pool = WorkerPool("task", self._run_task, self.WORKERS, self.MAX_WAITING)
        self.cpu_pool = WorkerPool(
            "cpu-task",
            self._run_task,
            os.cpu_count() or 1,
            self.MAX_WAITING,
            self.children.end_mine,
        )
        self.coroutine_pool = CoroutinePool(
            self._begin_coroutine, self._end_coroutine, self.WORKERS, self.MAX_WAITING
        )
        self.pools: list[BoundedQueue] = [self.pool, self.cpu_pool, self.coroutine_pool]
        # Takes the lines that the log has for each task, usually two. `main` replaces it by
        # LogHandler.put, which takes a fifth of the time.
        self.log_task: Callable[..., None] = log.info
        # A task that no worker runs, because it was cancelled or found unfinished at the start, is
        # made final by these threads: with a journal, that may take long.
        self._savers = WorkerPool("saver", lambda save: save(), 8)
        self.helpers = [self._savers]  # pools for other things than tasks
        # Guards Live.withdrawn: to set it and to withdraw the task from the pool are one step.
        self._cancelling = threading.Lock()

    def task(
        self,
        name: str,
        *,
        cpu: bool = False,
        timeout: float | None = None,
        rerun: bool = False,
        payload: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> Callable[[Function], Function]:
        """Make a function a task type: POST /create-NAME, GET /poll-NAME/ID, POST /cancel-NAME/ID.

        The function gets the posted object and `report(fraction, message=None)`; what it returns is
        the result. It runs in a thread; if it is an `async def`, in an event loop, with all others;
        with `cpu`, in a child process. `timeout` ends a coroutine or process after that time.
        `rerun`: a task that was running when the server ended runs again at the next start;
        otherwise it fails. `payload` describes members of the payload by JSON Schemas; they stand
        in /openapi.json, and are not enforced.

        ValueError: a bad or taken name, options that exclude each other, or a function that cannot
        work. That a child cannot import a function is reported when the server starts.
        """
        _check_options(name, timeout, unknown)
        _check_payload_schemas(name, payload or {})

        def register(function: Function) -> Function:
            if name in self.types:
                raise ValueError(f"task type {name!r}: choose another name, this one is taken")
            _check_function(name, function, cpu)
            pool: WorkerPool | CoroutinePool = self.cpu_pool if cpu else self.pool
            if is_coroutine_function(function):
                pool = self.coroutine_pool
            elif timeout is not None and not cpu:
                raise ValueError(
                    f"task type {name!r}: a thread cannot be ended, so leave out timeout=, "
                    "or use cpu=True or an `async def` function"
                )
            self.types[name] = TaskType(name, function, pool, timeout, rerun, payload or {})
            self._add_routes(self.types[name])
            return function

        return register

    def check_types(self) -> None:
        """See that children can import what they are to call. ValueError: they cannot."""
        for task_type in self.types.values():
            if task_type.pool is self.cpu_pool:
                _check_import(task_type.name, task_type.function, self.default)

    def judge(self, request: Request) -> Verdict:
        """Return what is to become of a request, judged by its head, once. Raises nothing.

        Refusals have this order: that of the application's checks, so that without a token nobody
        learns what paths there are; that of the router (404, 405); that of the route's own check.
        The router is asked first all the same, because the route says which refusals it waives.
        """
        try:
            try:
                verdict = self.router.match(request.method, request.path)
            except HTTPError as error:  # answer() sends it, unless a check refuses first
                verdict = Verdict(_NO_ROUTE, (), error.response)
            for check in self.checks:
                try:
                    check(request)
                except HTTPError as refusal:
                    if refusal.status not in verdict.route.waived:
                        return Verdict(verdict.route, (), refusal.response)
                    verdict = verdict._replace(trusted=False)
            if verdict.refusal is None and verdict.route.check is not None:
                try:
                    verdict.route.check(request)
                except HTTPError as refusal:
                    return Verdict(verdict.route, (), refusal.response)
            return verdict
        except BaseException as error:
            return Verdict(_NO_ROUTE, (), self._fault(request, error))

    def answer(self, verdict: Verdict, request: Request) -> Response | Later:
        """Return the answer to a request that was judged and is complete. Raises nothing."""
        if verdict.refusal is not None:
            return verdict.refusal
        if not verdict.trusted:
            request = request._replace(trusted=False)
        try:
            return verdict.route.endpoint(request, *verdict.arguments)
        except HTTPError as refusal:
            return refusal.response
        except BaseException as error:  # even SystemExit ends this answer alone
            return self._fault(request, error)

    def answer_later(self, later: Later, request: Request) -> Response:
        """Return the answer to a request that has waited. Raises nothing."""
        try:
            return later.answer()
        except HTTPError as refusal:
            return refusal.response
        except BaseException as error:
            return self._fault(request, error)

    def handle(self, request: Request) -> Response:
        """Return the answer to a request, without a server. Blocks as long as it takes."""
        answer = self.answer(self.judge(request), request)
        self.wake_workers()
        if isinstance(answer, Response):
            return answer
        woken = threading.Event()
        wake = woken.set
        answer.watch(wake)
        try:
            woken.wait(answer.seconds)
        finally:
            answer.unwatch(wake)
        return self.answer_later(answer, request)

    def wake_workers(self) -> None:
        """Have the tasks that were created begin. To be called after any answer; does not block."""
        for pool in (*self.pools, *self.helpers):
            pool.wake()

    def stop(self) -> int:
        """Refuse creates, answer long polls, begin no task any more; return how many wait."""
        self.store.stop()
        return sum(pool.stop() for pool in self.pools)

    def fail(self, record: Record, reason: str) -> None:
        """Make a task failed that no worker runs; the reason becomes its error.

        Does not wait for the journal: if there is one, a thread does it.
        """
        finish = functools.partial(self._finish, record, None, TaskError(reason))
        if self.store.journal is None:
            finish()
        else:
            self._savers.submit(finish)

    def join(self, seconds: float) -> None:
        """Wait until no task runs and what was cancelled is saved, but at most so many seconds."""
        deadline = time.monotonic() + seconds
        for pool in (*self.pools, self._savers):
            pool.join(max(0.0, deadline - time.monotonic()))

    def _fault(self, request: Request, error: BaseException) -> Response:
        path = ascii(request.path)
        log.error("an endpoint failed: %s %s\n%s", request.method, path, traceback_of(error))
        return HTTPError(500, "The server has a fault here; its log says more.").response

    # The endpoints of a task type

    def _add_routes(self, task_type: TaskType) -> None:
        name = task_type.name
        self.router.add(
            "POST",
            f"/create-{name}",
            functools.partial(self._create, task_type),
            blocks=self._create_blocks,
            check=check_create,
            summary=f"Create a task of type {name}",
            details=inspect.getdoc(_unwrapped(task_type.function)) or "",
            tag=name,
            operation=f"create-{name}",
            statuses={
                201: "The task was created.",
                200: "It was created before, with this Idempotency-Key.",
            },
            refusals=(400, 401, 408, 409, 411, 413, 415, 421, 422, 501, 503),
            answer="TaskRecord",
            body=_create_schema(task_type),
            parameters=(IDEMPOTENCY_KEY,),
        )
        self.router.add(
            "GET",
            f"/poll-{name}/{{id}}",
            functools.partial(self._poll, task_type),
            blocks=never_blocks,
            summary=f"Ask how a task of type {name} is, or wait for its end",
            tag=name,
            operation=f"poll-{name}",
            details="The answer is the record as it is, at once, unless `wait` says otherwise.",
            refusals=(400, 401, 404, 421),
            answer="TaskRecord",
            parameters=(WAIT,),
        )
        self.router.add(
            "POST",
            f"/cancel-{name}/{{id}}",
            functools.partial(self._cancel, task_type),
            blocks=never_blocks,
            check=check_origin,
            summary=f"Cancel a task of type {name}",
            tag=name,
            operation=f"cancel-{name}",
            details=CANCEL_DETAILS,
            refusals=(400, 401, 403, 404, 421, 503),
            answer="TaskRecord",
        )

    def _create_blocks(self, request: Request) -> bool:
        return self.store.journal is not None or len(request.body) > MAX_QUICK

    def _create(self, task_type: TaskType, request: Request) -> Response:
        name = self._decode(request.body).get("name")
        if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
            bounds = f"not blank, of at most {MAX_NAME} characters"
            raise HTTPError(400, f'Send a "name": a string that is {bounds}.')
        key = idempotency_key(request)
        if key is not None:
            repeated = self._answer_repeat(task_type, key, name)
            if repeated is not None:
                return repeated
        task_id = key or new_id()
        live = Live()
        record = Record(
            task_id, name, PENDING, task_type.name, time.time(), payload=request.body, live=live
        )
        try:
            self._add(task_type, record, live)
        except Duplicate:  # another client with this key was faster
            repeated = self._answer_repeat(task_type, task_id, name)
            if repeated is None:  # the other create was refused after all: try again
                raise _still_being_stored() from None
            return repeated
        self.log_task("task %s created: type %s, name %s", task_id, record.type, ascii(name))
        return Response(201, encode_record(record), (location(record),))

    def _decode(self, body: bytes) -> dict[str, Any]:
        """Return the payload in a body. HTTPError 400; 503: its turn does not come."""
        if len(body) <= MAX_QUICK:
            return decode_object(body)
        turn = turn_to_decode(body)
        if not turn.acquire(timeout=DECODE_SECONDS):
            sentence = "Many long bodies have come at once; try again later."
            raise unavailable(Unavailable(sentence, 1))
        try:
            return decode_object(body)
        finally:
            turn.release()

    def _add(self, task_type: TaskType, record: Record, live: Live) -> None:
        """Store a record and queue it. Duplicate; HTTPError: it cannot be done."""
        try:
            # The key is `live`: no other task has the same object, and a cancel finds it in the
            # record.
            task_type.pool.reserve(live)
            try:
                record = self.store.add(record)
            except BaseException:
                task_type.pool.release(live)
                raise
        except Unavailable as error:
            raise unavailable(error) from None
        except RecordRefused as error:
            sentence = f"The journal cannot take this task: {text_of(error)}."
            raise HTTPError(400, sentence) from None
        # If the task was cancelled since it was stored, this does nothing. A worker is woken later,
        # by `wake_workers`.
        task_type.pool.put(live, record)

    def _answer_repeat(self, task_type: TaskType, task_id: str, name: str) -> Response | None:
        """Return the answer to a create whose key was used before, None if it was not.

        The payloads are not compared, because a final record has none any more.

        HTTPError 409: the first one is just being stored; 422: the key was used for something else.
        """
        try:
            record = self.store.find(task_id)
        except Duplicate:
            raise _still_being_stored() from None
        if record is None:
            return None
        if (record.type, record.name) != (task_type.name, name):
            sentence = "This Idempotency-Key was used for another task; choose a new one."
            raise HTTPError(422, sentence)
        return Response(200, encode_cached(record), (location(record),))

    def _find(self, task_type: TaskType, task_id: str) -> Record:
        """Return the record of this type with this id. HTTPError 400: no id; 404: no such task."""
        task_id = task_id.lower()
        try:
            record = self.store.get(task_id)
            if record.type == task_type.name:
                return record
        except KeyError:
            pass
        if not _UUID.fullmatch(task_id):
            raise HTTPError(400, "Send the id that create answered: 36 characters, with hyphens.")
        raise HTTPError(404, "No task of this type has this id; it may have been evicted.")

    def _poll(self, task_type: TaskType, request: Request, task_id: str) -> Response | Later:
        record = self._find(task_type, task_id)
        if not request.query:
            return Response(200, encode_cached(record))
        seconds = float(request.parameter("wait", r"[0-9]+(\.[0-9]+)?", example="30") or 0)
        if record.status != PENDING or not seconds:
            return Response(200, encode_cached(record))
        answer = functools.partial(self._answer_poll, task_type, record.id)
        return self._when_final(record, min(seconds, MAX_WAIT), answer, answers_early=True)

    def _answer_poll(self, task_type: TaskType, task_id: str) -> Response:
        return Response(200, encode_cached(self._find(task_type, task_id)))

    def _when_final(
        self, record: Record, seconds: float, answer: Callable[[], Response], answers_early: bool
    ) -> Later:
        """Return a Later: `answer` is called when a record is final, or after so many seconds."""
        watch = functools.partial(self.store.watch, record.id)
        unwatch = functools.partial(self.store.unwatch, record.id)
        return Later(seconds, watch, unwatch, answer, answers_early)

    def _cancel(self, task_type: TaskType, request: Request, task_id: str) -> Response | Later:
        record = self._find(task_type, task_id)
        live = record.live
        if live is None:  # it is final
            return Response(200, encode_cached(record))
        # In the server, only the loop comes here; but several threads may call `handle`. Without
        # the lock, a second cancel could come between these lines. It would see that the task was
        # cancelled, but not yet that it was withdrawn; would take it for running; and would answer
        # at once that it is pending.
        with self._cancelling:
            is_first = not live.cancel_requested
            live.cancel_requested = True
            if task_type.pool.withdraw(live):
                live.withdrawn = True
        if is_first:
            self.log_task("task %s is to be cancelled", record.id)
            self._carry_out_cancel(task_type, record, live)
        if not live.withdrawn:  # a worker has it; the answer does not wait for its end
            return Response(200, encode_record(self._find(task_type, task_id)))
        answer = functools.partial(self._answer_cancel, task_type, record.id)
        return self._when_final(record, CANCEL_SECONDS, answer, answers_early=False)

    def _carry_out_cancel(self, task_type: TaskType, record: Record, live: Live) -> None:
        """Have a cancel take effect. A function in a thread meets it when it reports next."""
        if live.withdrawn:
            self.fail(record, BY_REQUEST)
        elif isinstance(task_type.pool, CoroutinePool):
            task_type.pool.interrupt(live, TaskError(BY_REQUEST))
        elif task_type.pool is self.cpu_pool:
            self.children.wake()

    def _answer_cancel(self, task_type: TaskType, task_id: str) -> Response:
        record = self._find(task_type, task_id)
        if record.status == PENDING:
            sentence = "The journal does not say yet that the task is cancelled; ask again."
            raise HTTPError(503, sentence, ("Retry-After", "5"))
        return Response(200, encode_cached(record))

    # The life of a task, in a worker

    def _run_task(self, record: Record) -> None:
        """Run a task in this thread, or in this worker's child, to its end. Raises nothing."""
        task_type = self.types[record.type]
        own = os.getpid()
        result, error = None, None
        try:
            live = self._begin(task_type, record)
            result = self._call(task_type, record.payload or b"", live)
        except BaseException as exception:  # even SystemExit ends this task alone
            error = exception
        if os.getpid() != own:  # a copy that the function has forked: the task is not its own
            os._exit(0)
        self._finish(record, result, error)

    def _call(self, task_type: TaskType, payload: bytes, live: Live) -> bytes:
        """Call the function; return the encoded result.

        If the function forks, the copy returns from this, too; `_run_task` ends it.
        """
        if task_type.pool is self.cpu_pool:
            return self.children.call(
                task_type.function, payload, live, task_type.timeout, self.default
            )
        return call_here(task_type.function, payload, live.report, self.default)

    def _begin(self, task_type: TaskType, record: Record) -> Live:
        """Note that a task starts, in the journal, too. JournalLost.

        Cancelled: its function is not to be called.
        """
        live = record.live
        assert live is not None  # each pending record has one
        now = live.start()
        # A task that is not `rerun` must not run twice. Therefore its start is saved before its
        # function is called. If the process dies after that, the next start of the server makes the
        # task failed.
        if self.store.journal is not None and not task_type.rerun:
            self.store.save(record._replace(started_at=now))
        if live.cancel_requested:
            raise Cancelled
        return live

    def _finish(self, record: Record, result: bytes | None, error: BaseException | None) -> None:
        """Make a record final: completed, or failed with an error. Raises nothing."""
        if isinstance(error, JournalLost) and self.store.lost:
            # The server that owns the journal now decides what becomes of the task. (`lost` is
            # asked as well, because a function may raise JournalLost itself, and that is a usual
            # failure.)
            return
        live = record.live
        assert live is not None  # each pending record has one
        started_at, fraction, message = live.progress
        status = FAILED
        if error is None:
            status, fraction = COMPLETED, 1.0
        if isinstance(error, Cancelled) and live.cancel_requested:
            error = TaskError(BY_REQUEST)
        description = None
        if error is not None:
            description = describe(error)
            trace = traceback_of(error)
            if trace:
                log.warning("task %s: %s", record.id, trace)
        final = Record(  # in half the time of record._replace
            id=record.id,
            name=record.name,
            status=status,
            type=record.type,
            created_at=record.created_at,
            started_at=started_at,
            finished_at=time.time(),
            progress=fraction,
            message=message,
            result=result,
            error=description,
            sequence=record.sequence,
        )
        try:
            final = self.store.finish(final)
        except JournalLost:
            return
        if final.status == COMPLETED:
            self.log_task("task %s completed", record.id)
        else:  # this is said with --quiet, too
            log.info("task %s failed: %s", record.id, ascii(final.error))

    def _begin_coroutine(self, record: Record) -> tuple[Callable[[], Any] | None, float | None]:
        """Return what starts the coroutine of a task, and its time limit.

        (None, None): there is nothing to start. The task is final now, or the journal is lost.
        """
        task_type = self.types[record.type]
        try:
            live = self._begin(task_type, record)
            payload = _decode_payload(record.payload or b"")
        except BaseException as error:
            self._finish(record, None, error)
            return None, None
        start = functools.partial(_start_coroutine, task_type.function, payload, live)
        return start, task_type.timeout

    def _end_coroutine(self, record: Record, value: Any, error: BaseException | None) -> None:
        """Make the record of a coroutine final."""
        if isinstance(error, Stopped) and self.store.stopping:
            # With a journal, the next start decides what becomes of it; else it ends with the
            # process.
            log.info("task %s is interrupted by the stop", record.id)
            return
        result = None
        if error is None:
            try:
                result = encode_result(value, self.default)
            except BaseException as exception:
                error = exception
        self._finish(record, result, error)


def _start_coroutine(function: Callable[..., Any], payload: Any, live: Live) -> Any:
    if live.cancel_requested:  # since _begin
        raise Cancelled
    return function(payload, live.report)


# -- 7. HTTP ---------------------------------------------------------------------------------------
#
# Four facts about sockets:
#
# 1. The sockets here never wait: recv() raises if nothing has come (BlockingIOError), and send()
#    takes only a part if there is no room for more. A selector is given many sockets, waits, and
#    returns those that can be read, or have room.
# 2. Bytes come in pieces of any size: half a request, or three requests, when a client sends the
#    next one before it has the answer (*pipelining*).
# 3. Each side ends its own sending. Then recv() returns b"" at the other side, the *end of file*. A
#    client that has ended its sending may still read: the connection is *half-closed*.
# 4. If one side closes its socket while bytes are in it that it has not read, the connection is
#    *reset*: the other side may lose what it has not read yet.

MAX_LINE = 8192  # bytes of a request line, and of a header (RFC 9112, 3 asks for 8000 at least)
MAX_HEADERS = 16_384  # bytes of all headers
MAX_HEADER_COUNT = 100
MAX_BODY = 1 << 20  # bytes, decoded
MAX_CHUNK_LINE = 1024  # bytes of a chunk's size and extensions, with the end of the line
MAX_EXTENSIONS = 4096  # bytes of all extensions of a body (RFC 9112, 7.1.1 asks for a limit)
CHUNKS_PER_TURN = 64  # of a body, which take half a millisecond; then other connections come first

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
_VALUE = rb"[\t\x20-\x7e\x80-\xff]*"  # RFC 9110, 5.5
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'  # 5.6.4
# RFC 3986, 3.2, without user information: an IPv6 address in brackets or a name, and a port.
_NAME = rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+"
_HOST = rb"(?:\[[0-9A-Fa-f]*:[0-9A-Fa-f:.]+\]|" + _NAME + rb")(?::[0-9]*)?"
# Browsers send more than RFC 3986, 3.3 allows: take all that is printable. But a path has no "?" or
# "#", a query no "#", and a percent sign begins two hexadecimal digits.
_PATH = rb"(?:[^\x00-\x20\x7f-\xff?#%]|%[0-9A-Fa-f]{2})*"
_QUERY = rb"(?:[^\x00-\x20\x7f-\xff#%]|%[0-9A-Fa-f]{2})*"
# RFC 9112, 3: the method, the target, and the version.
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([^ ]*) HTTP/([0-9])\.([0-9])")
# A target is a path and perhaps a query. If it is a URL (in absolute-form), the host stands before.
_URL_BEFORE_PATH = re.compile(rb"(?i:https?)://(" + _HOST + rb")")
_PATH_AND_QUERY = re.compile(rb"(" + _PATH + rb")(?:\?(" + _QUERY + rb"))?")
_ABSOLUTE_FORM = re.compile(rb"%s [A-Za-z][A-Za-z0-9+.\-]*://" % _TOKEN)
_HEADER = re.compile(rb"(%s):(%s)" % (_TOKEN, _VALUE))
_WELL_FORMED_HOST = re.compile(_HOST.decode())
# RFC 9112, 7.1 and 7.1.1: the size, and extensions, such as b'1a; name="value"'.
_ARGUMENT = rb"[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb")"
_EXTENSION = rb"[ \t]*;[ \t]*" + _TOKEN + rb"(?:" + _ARGUMENT + rb")?"
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]+)(?:" + _EXTENSION + rb")*")
# What a head and a chunk line must not contain (RFC 9112, 2.2).
_FORBIDDEN = re.compile(
    rb"""
    [^\t\r\n\x20-\x7e\x80-\xff]  # a control byte
    | (?<!\r)\n                   # an LF without a CR
    | \r(?!\n|\Z)                # a CR without an LF, but not as the last byte: it may still come
    """,
    re.VERBOSE,
)


class Phase(NamedTuple):
    """What a connection waits for."""

    name: str
    events: int  # what the selector waits for in this phase: to read, to write; 0 for nothing
    receives: bool  # whether bytes that arrive in this phase are put into the buffer
    seconds: float  # from its beginning to its deadline


_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

HANDSHAKE = Phase("handshake", _READ, False, 10)  # for bytes that TLS needs
HEADER = Phase("header", _READ, True, 10)  # for the rest of a head, or a new client's first bytes
BODY = Phase("body", _READ, True, 20)  # for the rest of its body
LENT = Phase("lent", 0, False, math.inf)  # for a thread that works on the answer, or on TLS
WAITING = Phase("waiting", _READ, True, math.inf)  # for an answer that comes later: `wait_for`
ANSWER = Phase("answer", _WRITE, False, 20)  # for the socket to take the rest of what is sent
# For its turn: the next request is in the buffer already, but other connections come first. A
# trick has it called again in the next round: it waits for room to send, which a socket nearly
# always has, and sends nothing.
TURN = Phase("turn", _WRITE, False, 20)
# The same in the middle of a body that comes in many small chunks. It shares its deadline with
# BODY: to change between the two does not renew it.
BODY_TURN = Phase("body-turn", _WRITE, False, 20)
IDLE = Phase("idle", _READ, True, 75)  # for the next request
LINGER = Phase("linger", _READ, True, 5)  # for the client to close, after the last answer


# Reading a request. A reader is a generator, so that it can be written as if it could wait, much as
# a coroutine with `await`:
#
#     request = yield from read_head(buffer)
#
# read_head takes bytes out of the buffer. When it needs more, it yields the phase in which to wait
# for them. `yield from` hands that on to Connection.resume, below, which has the reader go on when
# more bytes are in the buffer. In the end, read_head returns the request, which becomes the value
# of `yield from`. (Its type, Generator[Phase, Any, Request], says so: it yields phases and returns
# a request. The type in the middle is that of the values which resume() may send to a `yield`;
# readers do not use them.)


def take(buffer: bytearray, size: int) -> bytes:
    """Remove and return the first bytes of a buffer."""
    taken = bytes(buffer[:size])
    del buffer[:size]
    return taken


def read_head(buffer: bytearray, peer: str = "") -> Generator[Phase, Any, Request]:
    """Return the next request, without its body.

    HTTPError: it is refused, and nobody can tell where the next one begins.
    """
    # The caller has waited for the first byte. If that is a CR, empty lines come first.
    if buffer.startswith(b"\r"):
        yield from _skip_empty_lines(buffer)
    seen = 0  # bytes that earlier rounds have looked at
    line_end = -1  # where the request line ends; -1 until that is known
    while True:
        # Look at new bytes alone, and at the three before them: CR LF CR LF may come in two parts.
        end = buffer.find(b"\r\n\r\n", max(0, seen - 3))
        if end >= 0:
            head = bytes(buffer[:end])
            request = parse_head(head, peer)
            # These bytes are deleted only now. If parsing raises, next_answer() looks at them, to
            # see whether the method was HEAD: then the refusal must have no content.
            del buffer[: end + 4]
            return request
        # Not complete, but wrong already? The sender may be waiting for an answer. (Begin one byte
        # earlier: a CR that was the last byte can be judged only now. What stands before it is seen
        # by the lookbehind of the pattern.)
        if _FORBIDDEN.search(buffer, max(0, seen - 1)):
            sentence = "Send HTTP/1.1 without control characters, in lines that end in CR LF."
            raise HTTPError(400, sentence)
        if line_end < 0:
            line_end = buffer.find(b"\r\n", max(0, seen - 1))
            if line_end >= 0:
                parse_request_line(bytes(buffer[:line_end]))  # raises if it is wrong
            elif len(buffer) >= MAX_LINE + 2:  # a CR LF would be in it by now
                parse_request_line(bytes(buffer))  # raises because it is too long
        if line_end >= 0:
            length = len(buffer) - (line_end + 2)
            if length >= MAX_HEADERS + 4:  # CR LF CR LF would be in it by now
                raise HTTPError(431, f"Send at most {MAX_HEADERS} bytes of headers.")
        seen = len(buffer)
        yield HEADER


def _skip_empty_lines(buffer: bytearray) -> Generator[Phase, Any, None]:
    """Wait for a request; a client may send empty lines before it (RFC 9112, 2.2)."""
    skipped = 0
    while True:
        while buffer.startswith(b"\r\n"):
            del buffer[:2]
            skipped += 2
        if skipped > MAX_HEADERS:
            raise HTTPError(431, "Send fewer empty lines before a request.")
        if buffer and buffer != b"\r":
            return
        yield IDLE


def read_body(
    fields: Fields, buffer: bytearray, is_dropped: bool = False
) -> Generator[Phase, Any, bytes]:
    """Return the body that belongs to a head; b"" if it is dropped as it comes.

    HTTPError 400, 413: it is refused, and nobody can tell where the next request begins.
    """
    if fields.chunked:
        return (yield from _read_chunks(buffer, is_dropped))
    return (yield from _read_bytes(buffer, fields.length, is_dropped))


def _read_bytes(buffer: bytearray, size: int, is_dropped: bool) -> Generator[Phase, Any, bytes]:
    """Return so many bytes; b"" if they are dropped as they come."""
    while len(buffer) < size:
        if is_dropped:
            size -= len(buffer)
            buffer.clear()
        yield BODY
    taken = take(buffer, size)
    return b"" if is_dropped else taken


def _read_chunks(buffer: bytearray, is_dropped: bool) -> Generator[Phase, Any, bytes]:
    """Return a body that comes in chunks (RFC 9112, 7.1); b"" if it is dropped as it comes."""
    body = bytearray()
    length = 0  # bytes of the body so far, also if they are dropped
    extensions = 0  # bytes
    for number in itertools.count(1):
        if number % CHUNKS_PER_TURN == 0:
            yield BODY_TURN
        line = yield from _read_line(buffer, MAX_CHUNK_LINE, 400)
        match = _CHUNK_LINE.fullmatch(line)
        if not match:
            raise HTTPError(400, "Send chunk sizes in hexadecimal digits, with correct extensions.")
        extensions += len(line) - match.end(1)
        if extensions > MAX_EXTENSIONS:
            raise HTTPError(400, f"Send at most {MAX_EXTENSIONS} bytes of chunk extensions.")
        size = int(match.group(1), 16)
        if size == 0:
            break
        length += size
        if length > MAX_BODY:
            raise HTTPError(413, f"Send at most {MAX_BODY} bytes.")
        body += yield from _read_bytes(buffer, size, is_dropped)
        if (yield from _read_bytes(buffer, 2, False)) != b"\r\n":
            raise HTTPError(400, "Send chunks that are as long as they say.")
    trailers: list[bytes] = []
    room = MAX_HEADERS
    while True:
        line = yield from _read_line(buffer, room, 431)
        if not line:
            break
        trailers.append(line)
        room -= len(line) + 2
    _split_headers(b"\r\n".join(trailers))  # checked, and dropped
    return bytes(body)


def _read_line(buffer: bytearray, limit: int, status: int) -> Generator[Phase, Any, bytes]:
    """Return a line without its CR LF.

    HTTPError `status`: the line and its CR LF have more than `limit` bytes. HTTPError 400: it has a
    control character.
    """
    seen = 0
    while True:
        # The CR LF counts against the limit, too. So find() does not look for it beyond that.
        end = buffer.find(b"\r\n", max(0, seen - 1), limit)
        is_complete = end >= 0
        length = end if is_complete else len(buffer)  # of the line, as far as it is here
        if _FORBIDDEN.search(buffer, max(0, seen - 1), length):
            raise HTTPError(400, "Send lines that end in CR LF, without control characters.")
        if is_complete:
            return take(buffer, length + 2)[:-2]
        if len(buffer) >= limit:
            raise HTTPError(status, f"Send lines of at most {max(0, limit - 2)} bytes here.")
        seen = len(buffer)
        yield BODY


@functools.lru_cache(maxsize=512)  # a client that polls sends the same bytes again and again
def parse_head(head: bytes, peer: str = "") -> Request:
    """Return a request without its body. HTTPError."""
    line, _, block = head.partition(b"\r\n")
    method, authority, path, query, minor = parse_request_line(line)
    fields = parse_headers(block, minor)
    host = authority or fields.headers.get("host", "")
    # HTTP/1.1 requires a Host. It may be empty only for `OPTIONS *` (RFC 9112, 3.2).
    if not host and minor and path != "*":
        raise HTTPError(400, "Send the name or address of this server as the Host.")
    return Request(method, path, query, host, fields, peer=peer)


def parse_request_line(line: bytes) -> tuple[str, str, str, str, int]:
    """Return b"GET /a?b HTTP/1.1" as ("GET", "", "/a", "b", 1): the last is the minor version.

    The second is the authority of an absolute-form. HTTPError 400, 414, 505.
    """
    if len(line) > MAX_LINE:
        raise HTTPError(414, f"Send a request line of at most {MAX_LINE} bytes.")
    sentence = "Send a request line such as GET /healthz HTTP/1.1, correctly percent-encoded."
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPError(400, _advice_for(line, sentence))
    method, target, major, minor = match.groups()
    authority = b""
    url = _URL_BEFORE_PATH.match(target)
    if url:
        authority = url.group(1)
        target = target[url.end() :]
        if target == b"" or target.startswith(b"?"):  # such as http://localhost?a=b
            target = b"/" + target
    parts = _PATH_AND_QUERY.fullmatch(target)
    if not parts:
        raise HTTPError(400, _advice_for(line, sentence))
    path, query = parts.group(1), parts.group(2) or b""
    if major != b"1":
        raise HTTPError(505, "Use HTTP/1.1.")
    is_asterisk = line.startswith(b"OPTIONS * ")
    if not path.startswith(b"/") and not is_asterisk:
        raise HTTPError(400, _advice_for(line, "Send a path that begins with a slash."))
    try:
        urllib.parse.unquote(target.decode(), errors="strict")
    except UnicodeDecodeError:
        sentence = "Send a path that is UTF-8 where it is percent-encoded."
        raise HTTPError(400, sentence) from None
    return method.decode(), authority.decode(), path.decode(), query.decode(), int(minor)


def _advice_for(line: bytes, otherwise: str) -> str:
    """Return a sentence for a request line that is refused: `otherwise`, if nothing fits better."""
    if line.startswith(b"CONNECT "):
        return "This server is no proxy: send GET or POST with a path, not CONNECT."
    if _ABSOLUTE_FORM.match(line):
        return "Send a path, or a URL of http or https with a well-formed host."
    return otherwise


@functools.lru_cache(maxsize=512)  # a client that polls several tasks sends the same headers
def parse_headers(block: bytes, minor: int) -> Fields:
    """Return the headers of a request and what RFC 9110 and 9112 make of them.

    HTTPError 400, 413, 417, 431, 501.
    """
    headers = _split_headers(block)
    _check_host(headers, minor)
    chunked = _is_chunked(headers, minor)
    length = _content_length(headers)
    options = {option.strip(" \t").lower() for option in headers.get("connection", "").split(",")}
    keep_alive = "close" not in options
    if not minor:
        keep_alive = keep_alive and "keep-alive" in options
    expectation = headers.get("expect", "").lower() if minor else ""  # RFC 9110, 10.1.1
    if expectation not in ("", "100-continue"):
        raise HTTPError(417, "Expect nothing but 100-continue.")
    return Fields(headers, length, chunked, keep_alive, bool(expectation), minor)


def _check_host(headers: Mapping[str, str], minor: int) -> None:
    """HTTPError 400: no well-formed Host, or several (RFC 9112, 3.2)."""
    if "host" not in headers and minor == 0:
        return
    host = headers.get("host")
    if host == "":  # parse_head judges this, because it knows the path
        return
    if host is None or not _WELL_FORMED_HOST.fullmatch(host):
        raise HTTPError(400, "Send one well-formed Host.")


def _is_chunked(headers: Mapping[str, str], minor: int) -> bool:
    """Return whether the body is chunked. HTTPError 400, 501 (RFC 9112, 6.1 and 6.3)."""
    if "transfer-encoding" not in headers:
        return False
    # With both headers, a proxy might see the end of the body at another place than this server
    # does, and take for a body what is a request here ("request smuggling").
    if not minor or "content-length" in headers:
        raise HTTPError(400, "Send either Content-Length or, in HTTP/1.1, Transfer-Encoding.")
    codings = [coding.strip(" \t") for coding in headers["transfer-encoding"].lower().split(",")]
    # (RFC 9110, 5.6.1.2 would have empty elements of the list ignored. Proxies differ about them.)
    if codings[-1] != "chunked" or "" in codings or "chunked" in codings[:-1]:
        raise HTTPError(400, "Name the coding chunked once, as the last one of Transfer-Encoding.")
    if len(codings) > 1:
        raise HTTPError(501, "Send the body chunked, with no other coding.")
    return True


def _content_length(headers: Mapping[str, str]) -> int:
    """Return the length of the body, 0 if none is named. HTTPError 400, 413 (RFC 9110, 8.6)."""
    text = headers.get("content-length", "0")
    if not re.fullmatch("[0-9]+", text):
        raise HTTPError(400, "Send one Content-Length, a plain number.")
    digits = text.lstrip("0") or "0"
    # The number of digits is compared first: newer Pythons convert no more than 4,300 of them.
    if len(digits) > len(str(MAX_BODY)) or int(digits) > MAX_BODY:
        raise HTTPError(413, f"Send at most {MAX_BODY} bytes.")
    return int(digits)


def _split_headers(block: bytes) -> dict[str, str]:
    """Return names in lower case and values; lines of one name are joined by ", " (RFC 9110, 5.3).

    HTTPError 400, 431.
    """
    lines = block.split(b"\r\n") if block else []
    longest = max(map(len, lines), default=0)
    if len(block) > MAX_HEADERS or len(lines) > MAX_HEADER_COUNT or longest > MAX_LINE:
        raise HTTPError(
            431,
            f"Send at most {MAX_HEADER_COUNT} headers of {MAX_LINE} bytes, in all {MAX_HEADERS}.",
        )
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if not match:
            raise HTTPError(400, "Send headers of the form Name: value, each in one line.")
        name = match.group(1).decode().lower()
        value = match.group(2).decode("latin-1").strip(" \t")
        if name in headers:
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


# Writing an answer


@functools.lru_cache(maxsize=64)  # the answers of one second begin alike
def _common_headers(status: int, content_type: str, connection: str, second: int) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        f"Date: {email.utils.formatdate(second, usegmt=True)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
    ]
    if status != 204:
        lines.append(f"Content-Type: {content_type}")
    if connection:
        lines.append(f"Connection: {connection}")
    return "\r\n".join(lines).encode()


def encode_response(response: Response, request: Request | None, close: bool) -> bytes:
    """Return an answer as it is sent. `request` is None where it could not be read."""
    status, body, headers, content_type = response
    connection = ""
    if close:
        connection = "close"
    elif request is not None and not request.fields.minor:
        connection = "keep-alive"  # HTTP/1.0 has to be told
    head = _common_headers(status, content_type, connection, int(time.time()))
    for name, value in headers:
        head += f"\r\n{name}: {value}".encode()
    if status != 204:
        body += b"\n"  # or the prompt of a shell would follow in the same line
        head += b"\r\nContent-Length: %d" % len(body)
    if request is not None and request.method == "HEAD":
        body = b""
    return head + b"\r\n\r\n" + body


# Bytes that are received at once: as many as a piece of TLS has at most (RFC 8446, 5.1). TLS takes
# such a piece out of the socket and decrypts it as a whole. If only a part of it were received, the
# rest would lie in the TLS object. The selector, which looks into the socket alone, would not see
# it, and the connection would hang.
RECEIVE_SIZE = 16_384
MAX_PIPELINED = 65_536  # bytes that are read ahead while an answer comes later

_WOULD_BLOCK: tuple[type[BaseException], ...] = (BlockingIOError,)
if ssl is not None:
    _WOULD_BLOCK += (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection:
    """One client's socket, what has arrived on it, and the phase that it waits in.

    Only the thread of the server's loop calls its methods. (The exception is try_handshake, which
    another thread calls.) Nothing here blocks: what might block (some endpoints, a step of TLS)
    is done by a thread of `server`.

    What a connection does is written in one generator, `serve`, as if it could wait: it yields the
    phase to wait in, and is resumed when what it waits for has come, or the deadline of the phase
    has passed. A request leads it through HEADER, BODY, LENT, WAITING and ANSWER; it skips the
    phases in which there is nothing to wait for.

    Each `yield` of a phase leads to `stay_or_begin`. If the connection is in that phase already, it
    keeps its deadline: a client that sends a byte now and then gets no more time for it. Code that
    wants a fresh deadline calls `begin` before the yield.

        phase                      what resumes it             what its deadline does
        -------------------------  --------------------------  -----------------------
        HEADER, BODY               more bytes, in the buffer   refuses with status 408 (*)
        BODY_TURN                  a socket that takes bytes   the same
        IDLE                       more bytes, in the buffer   closes the connection
        LENT                       what the thread returns     (there is none)
        WAITING                    see `wait_for`              resumes it
        ANSWER, TURN               a socket that takes bytes   closes the connection
        HANDSHAKE                  bytes, still in the socket  closes the connection
        LINGER                     more bytes, to be dropped   closes the connection

        (*) if a request has begun; otherwise it closes the connection

    A long poll, for example, with wait=30:

        what happens                                     phase      deadline in
        -----------------------------------------------  ---------  -----------
        it was answered, and sends nothing               IDLE       75 seconds
        a part of a head arrives                         HEADER     10 seconds
        the rest arrives; the record is pending          WAITING    30 seconds
        the record is final; the socket takes a part
        of the answer                                    ANSWER     20 seconds
        the socket takes the rest                        IDLE       75 seconds

    An OSError, whoever raises it, means that the connection is over.
    """

    __slots__ = (
        "awaited",
        "buffer",
        "client_ended",
        "closing",
        "deadline",
        "peer",
        "phase",
        "registered",
        "server",
        "socket",
        "steps",
        "unsent",
    )

    def __init__(self, sock: Any, peer: str, server: Server) -> None:
        self.socket, self.peer, self.server = sock, peer, server
        self.buffer = bytearray()  # what belongs to no request yet
        # What the socket has not taken yet of an answer.
        self.unsent: bytes | memoryview = b""
        self.closing = False  # the answer under way is the last
        # The client has ended its side: it sends no more, but may still read.
        self.client_ended = False
        self.registered = 0  # the events with which the selector has it now
        # What it waits for, if it is WAITING or LENT: a Later, or the work of a thread.
        self.awaited: object = None
        self.begin(HEADER)  # not IDLE: a new client has ten seconds for its first bytes
        # A generator that has not begun. Each call of resume() has it run to its next yield. The
        # first call comes when there are bytes, or with TLS, at once.
        self.steps = self.serve()
        if server.tls is not None:
            self.begin(HANDSHAKE)
            self.socket = server.tls.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )

    def begin(self, phase: Phase, deadline: float | None = None) -> None:
        """Begin a phase, with the usual deadline or another one."""
        self.phase = phase
        self.deadline = time.monotonic() + phase.seconds if deadline is None else deadline

    def stay_or_begin(self, phase: Phase) -> None:
        """Wait in a phase: stay in it and keep its deadline, or begin it.

        ConnectionError: it would wait for bytes, but the client has ended its sending.
        """
        if self.client_ended and phase in (HEADER, BODY, IDLE, LINGER):
            raise ConnectionError
        if phase is self.phase:
            return
        if phase in (BODY, BODY_TURN) and self.phase in (BODY, BODY_TURN):
            self.phase = phase  # with the deadline that it has
        else:
            self.begin(phase)

    def events(self) -> int:
        """Return what the selector has to wait for; 0 for nothing."""
        if self.phase is WAITING:
            if self.client_ended:  # nothing more will come
                return 0
            if len(self.buffer) >= MAX_PIPELINED:  # no more is read before the answer is sent
                return 0
        return self.phase.events

    def on_ready(self) -> None:
        """Go on: the socket has bytes, or takes some."""
        if not self.phase.receives:
            self.resume()
            return
        try:
            data = self.socket.recv(RECEIVE_SIZE)
        except _WOULD_BLOCK:
            return
        if data:
            self.buffer += data
            if self.phase is not WAITING:  # there it belongs to the next request
                self.resume()
        elif self.phase is WAITING:
            # The client is gone, or has ended its sending and still reads: nobody can tell. So
            # answer now, if that may be. Then `serve` goes on with what is in the buffer. When it
            # would have to receive more, stay_or_begin() closes the connection (RFC 9112, 9.5).
            self.client_ended = True
            if isinstance(self.awaited, Later) and self.awaited.answers_early:
                self.resume()
        else:  # the client has ended its sending, and no answer is due
            raise ConnectionError

    def resume(self, outcome: Any = None) -> None:
        """Go on until there is something to wait for.

        `outcome` becomes the value of the yield at which the steps wait; only that of LENT uses it.
        """
        self.awaited = None
        next_phase = self.steps.send(outcome)  # runs the steps to their next yield
        self.stay_or_begin(next_phase)

    def expire(self) -> None:
        """Do what the table says of this phase, because its deadline has passed."""
        if self.phase is WAITING:
            self.resume()
            return
        is_in_body = self.phase in (BODY, BODY_TURN)
        is_in_head = self.phase is HEADER and len(self.buffer) > 0
        if not is_in_body and not is_in_head:  # also a new connection on which nothing has come
            raise TimeoutError
        refusal = HTTPError(408, "Send a request without long pauses.")
        # throw() raises the refusal at the `yield` where the steps wait, for example in read_head.
        # next_answer() catches it like any other. Then the steps run on to their next yield.
        next_phase = self.steps.throw(refusal)
        self.stay_or_begin(next_phase)

    def serve(self) -> Generator[Phase, Any, None]:
        """Answer requests in their order."""
        if self.server.tls is not None:
            yield from self.shake_hands()
        while True:
            self.unsent = yield from self.next_answer()
            while self.send_some():
                yield ANSWER
            if self.closing:
                break
            if self.buffer:
                # It may be in TURN still, from the last request. Each turn has its own deadline.
                self.begin(TURN)
                yield TURN
        # A plain close would reset the connection, and a client that is still sending would lose
        # the answer. So end this side only, and drop what still comes (RFC 9112, 9.6).
        self.end_sending()
        while True:
            self.buffer.clear()
            yield LINGER  # until on_ready() sees the end of what comes, or the deadline passes

    def next_answer(self) -> Generator[Phase, Any, bytes]:
        """Take a request; return its answer as it is sent."""
        application = self.server.application
        request = None
        try:
            # When the steps begin, the first bytes of the first request are in the buffer. So if it
            # is empty here, this is a pause between two requests.
            if not self.buffer:
                self.begin(IDLE)  # each pause has a deadline of its own
                yield IDLE
            request = yield from read_head(self.buffer, self.peer)
            verdict = application.judge(request)
            if request.fields.has_body():
                request = yield from self.take_body(request, verdict)
            if verdict.refusal is None and verdict.route.blocks(request):
                self.server.lend(self, functools.partial(application.answer, verdict, request))
                answer = yield LENT
            else:
                answer = application.answer(verdict, request)
            if isinstance(answer, Later):
                yield from self.wait_for(answer)
                answer = application.answer_later(answer, request)
            # After 411, a body may follow that nobody has announced.
            if not request.fields.keep_alive or answer.status == 411:
                self.closing = True
        except HTTPError as refusal:  # nobody can tell where the next request begins
            self.closing = True
            answer = refusal.response
            if request is None and self.buffer.startswith(b"HEAD "):
                request = Request("HEAD", "")  # its answer has no content (RFC 9110, 9.3.2)
        if log.isEnabledFor(logging.DEBUG):
            what = f"{request.method} {request.path!a}" if request else "no request"
            log.debug("%s %s: %d", self.peer, what, answer.status)
        return encode_response(answer, request, self.closing)

    def take_body(self, request: Request, verdict: Verdict) -> Generator[Phase, Any, Request]:
        """Return a request with its body. If the client waits for 100 Continue, send that first.

        If the request is refused, such a client may send its body or not. Then there is no telling
        what follows, and the connection ends (RFC 9110, 10.1.1).
        """
        is_refused = verdict.refusal is not None
        # If some of the body is here already, the client does not wait.
        if request.fields.expects_continue and not self.buffer:
            if is_refused:
                self.closing = True
                return request
            self.unsent = b"HTTP/1.1 100 Continue\r\n\r\n"
            while self.send_some():
                yield ANSWER
        # The body of a request that is refused is read to its end, because the next request begins
        # there; but it must not take memory.
        body = yield from read_body(request.fields, self.buffer, is_dropped=is_refused)
        return request.with_body(body)

    def wait_for(self, later: Later) -> Generator[Phase, Any, None]:
        """Wait until an answer is due.

        The wait can end in four ways, all of them in the server's loop, so that no two of them
        happen at once:

        - a wake: wake() puts this connection and this Later into the loop's queue, and the loop
          resumes the connection if it still awaits just this Later, and not that of another request
          (`Server._serve_once`);
        - the deadline: `expire` resumes it if its phase is WAITING;
        - a client that ends its sending: `on_ready` resumes it in that phase, too;
        - the end of the server: `Server._drain` does the same.

        resume() sets `awaited` to None, and the phase WAITING ends. So if two of them come, the
        second one does nothing.

        watch() itself may call wake(), if the record is final already. wake() only puts something
        into the loop's queue. The loop, in whose thread this runs, reads it after the `yield`.
        """
        if self.client_ended and later.answers_early:
            return
        wake = functools.partial(self.server.wake, self, later)
        self.awaited = later
        self.begin(WAITING, time.monotonic() + later.seconds)
        later.watch(wake)
        try:
            yield WAITING
        finally:
            later.unwatch(wake)

    def send_some(self) -> bool:
        """Send what the socket takes; return whether something is left."""
        try:
            sent = self.socket.send(self.unsent)
        except _WOULD_BLOCK:
            return True
        if sent == len(self.unsent):
            self.unsent = b""
            return False
        self.unsent = memoryview(self.unsent)[sent:]  # a view, because to copy the rest takes time
        return True

    def end_sending(self) -> None:
        """Tell the client that nothing more comes."""
        if self.server.tls is not None:
            with contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()  # sends the end of TLS, and does not wait for the client's
        self.socket.shutdown(socket.SHUT_WR)

    def shake_hands(self) -> Generator[Phase, Any, None]:
        """Begin TLS. That takes milliseconds of computing, so a thread does it.

        One deadline holds for the handshake and for the head of the first request.
        """
        deadline = self.deadline  # kept here, because `yield LENT` sets another one
        outcome = ""
        while outcome != "done":
            self.server.lend(self, self.try_handshake)
            outcome = yield LENT
            if outcome == "more":
                self.begin(HANDSHAKE, deadline)
                yield HANDSHAKE
            elif outcome != "done":
                log.info("no TLS with %s: %s", self.peer, outcome)
                raise ConnectionError
        self.begin(HEADER, deadline)
        yield HEADER  # for the first byte; next_answer() would wait for it in IDLE

    def try_handshake(self) -> str:
        """Go on with the handshake as far as it goes; say "done", "more", or what is wrong."""
        try:
            self.socket.do_handshake()
        except _WOULD_BLOCK:
            return "more"
        except Exception as error:
            return describe(error)
        return "done"


def raise_descriptor_limit() -> int:
    """Raise the limit of descriptors; return the number that connections may use."""
    if issubclass(selectors.DefaultSelector, selectors.SelectSelector):  # Windows: it takes 512
        return 480
    import resource  # POSIX only

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says that the hard limit is infinite. But there the soft limit cannot be set to that,
    # only to 10,240. So try these in turn.
    for limit in hard, max(soft, 10_240), soft:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            break
    if limit == resource.RLIM_INFINITY:
        return 1 << 20
    return limit - min(64, limit // 4)


# The servers of this process.
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, and watches all of them in one loop; threads do what would block it.

    The preface says what is used of the base class. `tls`, an `ssl.SSLContext`, makes it HTTPS.
    """

    allow_reuse_address = os.name != "nt"  # on Windows it lets two servers share a port
    # The kernel's queue of new connections. With the base class's 5, most of a burst get no answer.
    request_queue_size = 1024

    ACCEPTED_PER_ROUND = 100  # new connections in one round of the loop
    RESUMED_PER_ROUND = 100  # connections for which something was due, in one round
    CHECK_SECONDS = 0.02  # at least, between two checks of all deadlines

    def __init__(
        self,
        address: tuple[str, int],
        application: Application,
        tls: ssl.SSLContext | None = None,
        bind_and_activate: bool = True,
    ) -> None:
        """Bind and listen; who wants to do that later calls `server_bind` and `server_activate`.

        OSError: the address is taken, or is not of this machine. ValueError: a task type cannot
        work.
        """
        application.check_types()
        self.application, self.tls = application, tls
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        # Connections leave some descriptors to children, each of which needs six, at most eight.
        limit = raise_descriptor_limit()
        reserved = 8 * application.cpu_pool.max_workers
        self._max_connections = int(max(limit // 4, limit - reserved))
        self._connections: set[Connection] = set()
        self._is_accepting = False
        self._pause_logged_at = -math.inf  # when the log was last told that accepting pauses
        self._next_check = -math.inf  # when deadlines are checked next, and service_actions called
        # Filled by any thread: the connection to resume, what it waited for, and what came of that.
        self._due: collections.deque[tuple[Connection, object, Any]] = collections.deque()
        self._give_up_at = math.inf  # when answers under way are given up; set by any thread
        self._is_evicting = False  # set by the loop, cleared by the thread that evicts
        self._stopped = threading.Event()  # clear while serve_forever runs
        self._stopped.set()
        self._pool = WorkerPool("request", lambda work: work())
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()  # has the loop look at `_due` and `_give_up_at`
        self._selector.register(self._waker, selectors.EVENT_READ)
        super().__init__(address, http.server.BaseHTTPRequestHandler, bind_and_activate)
        self.socket.setblocking(False)
        _servers.add(self)

    def server_bind(self) -> None:
        """Bind, without the look-up of the host in HTTPServer: it stalls without a resolver."""
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def serve_forever(self, poll_interval: float = 0.25) -> None:
        """Serve until `shutdown`. At least every `poll_interval` seconds, do what is due."""
        self._stopped.clear()
        try:
            self._resume_accepting()
            # `_give_up_at` is infinite until shutdown() sets it. Then _drain() says in each round
            # whether there is something left to do.
            while self._give_up_at == math.inf or self._drain():
                self._serve_once(poll_interval)
        finally:
            try:
                for connection in list(self._connections):
                    self._close(connection)
            finally:
                self._give_up_at = math.inf  # so that it can be called again
                self._stopped.set()

    def shutdown(self, seconds: float = 2.0) -> None:
        """Have `serve_forever` end when the answers under way are sent, or after so many seconds.

        Waits for that, and so must not be called in its thread.
        """
        self._give_up_at = time.monotonic() + seconds
        self._waker.wake()
        self._stopped.wait()

    def server_close(self) -> None:
        """Close the sockets; to be called after `serve_forever` has ended."""
        super().server_close()
        self._selector.close()
        self._waker.close()

    def abandon(self) -> None:
        """Close the sockets in a copy of this process, which must not keep them."""
        for connection in list(self._connections):
            connection.socket.close()
        self.server_close()

    def service_actions(self) -> None:
        """Do what is due from time to time (a hook of the base class)."""
        self._pool.wake()
        store = self.application.store
        store.freeze_records()
        has_work = store.has_expired() or store.has_doomed()
        if has_work and not self._is_evicting:
            self._is_evicting = True
            self._pool.submit(self._evict)
        self._resume_accepting()

    def lend(self, connection: Connection, work: Callable[[], Any]) -> None:
        """Have a thread do `work`, which raises nothing; resume the connection with its outcome."""

        def run() -> None:
            outcome = work()
            self._put_due(connection, work, outcome)

        connection.awaited = work
        self._pool.submit(run)

    def wake(self, connection: Connection, later: Later) -> None:
        """Resume a connection, if it still waits for this. Any thread may call it, repeatedly."""
        self._put_due(connection, later, None)

    def _serve_once(self, poll_interval: float) -> None:
        """Wait until there is something to do, and do it."""
        now = time.monotonic()
        if now >= self._next_check:
            self._next_check = now + poll_interval
            self._check_deadlines(now)
            try:
                self.service_actions()
            except Exception as error:
                log.error("what is due from time to time failed: %s", traceback_of(error))
        # Once for all tasks that the last round has created, not once for each: to wake a worker
        # costs as much as a create.
        self.application.wake_workers()
        seconds = 0.0 if self._due else max(0.0, self._next_check - now)
        for key, _ in self._selector.select(seconds):
            connection = key.data
            if connection is not None:
                self._act(connection, connection.on_ready)
            elif key.fileobj is self.socket:  # clients have come
                self._accept()
            else:  # somebody has called the waker
                self._waker.clear()
        for _ in range(min(len(self._due), self.RESUMED_PER_ROUND)):
            connection, awaited, outcome = self._due.popleft()
            if awaited is connection.awaited:  # otherwise it is a wake that comes too late
                self._act(connection, functools.partial(connection.resume, outcome))

    def _check_deadlines(self, now: float) -> None:
        """Tell connections that their deadlines have passed, and find out when the next ones do."""
        for connection in [c for c in self._connections if c.deadline <= now]:
            self._act(connection, connection.expire)
        deadline = min((c.deadline for c in self._connections), default=math.inf)
        if deadline < self._next_check:
            self._check_at(deadline)

    def _check_at(self, deadline: float) -> None:
        """Have the next check at this deadline, unless one comes earlier anyway.

        But not sooner than in CHECK_SECONDS, so that there is time for other things.
        """
        moment = max(deadline, time.monotonic() + self.CHECK_SECONDS)
        self._next_check = min(moment, self._next_check)

    def _evict(self) -> None:
        """Drop what has outlived its time. A thread does it, because the journal may be slow."""
        store = self.application.store
        try:
            while store.evict() or store.delete_doomed():
                pass
        finally:
            self._is_evicting = False

    def _put_due(self, connection: Connection, awaited: object, outcome: Any) -> None:
        self._due.append((connection, awaited, outcome))
        self._waker.wake()

    def _act(self, connection: Connection, act: Callable[[], None]) -> None:
        """Have a connection do something; then tell the selector what it waits for now."""
        if connection not in self._connections:  # it was closed in this round of the loop
            return
        try:
            act()
            events = connection.events()
            if events != connection.registered:
                if connection.registered:
                    self._selector.unregister(connection.socket)
                connection.registered = 0  # if register() fails, _close() must not unregister
                if events:
                    self._selector.register(connection.socket, events, connection)
                connection.registered = events
        except BaseException as error:
            if not isinstance(error, OSError):
                log.error("a connection failed: %s", traceback_of(error))
            self._close(connection)
            return
        if connection.deadline < self._next_check:
            self._check_at(connection.deadline)

    def _close(self, connection: Connection) -> None:
        self._connections.remove(connection)
        if connection.registered:
            self._selector.unregister(connection.socket)
        try:
            # Ends the generator at its yield. There, wait_for() calls unwatch(). And a cycle of
            # references is broken.
            connection.steps.close()
        except BaseException as error:
            log.error("a connection failed: %s", traceback_of(error))
        connection.socket.close()
        self._resume_accepting()

    def _accept(self) -> None:
        room = self._max_connections - len(self._connections)
        if room <= 0:
            self._pause_accepting("all connections are in use")
            return
        for _ in range(min(room, self.ACCEPTED_PER_ROUND)):
            try:
                sock, address = self.get_request()
            except BlockingIOError:  # there are no more
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting(str(error))
                    return
                continue  # that client has gone already, or its network (accept(2) lists how)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(sock, address[0], self)
            except (OSError, ValueError):  # gone by now
                sock.close()
                continue
            self._connections.add(connection)
            # Its request may be here already; with TLS, this begins the handshake.
            self._act(connection, connection.on_ready)

    def _pause_accepting(self, reason: str) -> None:
        """Accept no more until a connection is closed, or until the next check.

        Otherwise the loop would spin: while clients wait to be accepted, the selector returns the
        listening socket at once, again and again.

        If connections have been idle for more than 5 seconds, the one idle for longest is closed.
        (`_close` ends the pause.)
        """
        self._selector.unregister(self.socket)
        self._is_accepting = False
        now = time.monotonic()
        if now - self._pause_logged_at > 60:
            self._pause_logged_at = now
            log.warning("new connections have to wait: %s", reason)
        idle = [connection for connection in self._connections if connection.phase is IDLE]
        oldest = min(idle, key=lambda connection: connection.deadline, default=None)
        if oldest is not None:
            idle_since = oldest.deadline - IDLE.seconds
            if now - idle_since > 5:
                self._close(oldest)

    def _resume_accepting(self) -> None:
        if not self._is_accepting:
            self._selector.register(self.socket, selectors.EVENT_READ)
            self._is_accepting = True

    def _drain(self) -> bool:
        """Close connections without a complete request; give the others time to send their answers.

        Return true while connections are left and time is left. LINGER is spared, too, because to
        close such a connection could lose its last answer, see `Connection.serve`.
        """
        for connection in list(self._connections):
            if connection.phase not in (LENT, WAITING, ANSWER, TURN, LINGER):
                self._close(connection)
                continue
            connection.closing = True
            if connection.phase is WAITING and self._ends_wait(connection.awaited):
                self._act(connection, connection.resume)
        return bool(self._connections) and time.monotonic() < self._give_up_at

    def _ends_wait(self, awaited: object) -> bool:
        """Return whether a wait is over, because the server ends.

        If its answer could only be a refusal now, it goes on until the last second.
        """
        if isinstance(awaited, Later) and awaited.answers_early:
            return True
        return time.monotonic() >= self._give_up_at - 1


def _leave_servers() -> None:
    """Close the sockets in a copy of this process, which a task has forked."""
    for server in list(_servers):
        server.abandon()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_leave_servers)


# -- 8. Running ------------------------------------------------------------------------------------


def write_all(descriptor: int, data: bytes) -> None:
    """Write all, unless nobody reads it any more."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


class LogHandler(logging.Handler):
    """Writes log lines from one daemon thread: a stderr that is full or closed stops nobody.

    What does not fit into its queue is dropped, counted, and said later.
    """

    MAX_LINES = 10_000
    # What came from outside must not look like a line of the log, nor move a terminal's cursor. So
    # a line feed is followed by an indent, and other control characters are written as escapes.
    ESCAPES: ClassVar[dict[int, str]] = {
        **{code: f"\\x{code:02x}" for code in (*range(32), 127)},
        ord("\n"): "\n    ",
    }

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._dropped = 0  # lines, in all; guarded by the lock of the base class
        # Of each line the time, the level, the format, and its arguments. None ends the thread.
        self._lines: queue.SimpleQueue[tuple[float, str, str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._be_writer, name="log", daemon=True)
        self._thread.start()

    def put(self, text: str, *arguments: object) -> None:
        """Queue a line of level INFO.

        It costs a fifth of `Logger.info`, which looks for its caller, thread, process and task.
        """
        self._put((time.time(), "INFO", text, arguments))

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line (a hook of the base class)."""
        text, arguments = str(record.msg), record.args
        if record.exc_info and record.exc_info[1]:
            with contextlib.suppress(Exception):  # arguments that do not fit
                text = record.getMessage()
            text, arguments = f"{text}\n{traceback_of(record.exc_info[1])}", ()
        self._put((record.created, record.levelname, text, arguments))

    def finish(self, seconds: float) -> None:
        """Write what is queued, at most for so long."""
        self._lines.put(None)
        self._thread.join(seconds)

    def _put(self, line: tuple[float, str, str, Any]) -> None:
        if self._lines.qsize() < self.MAX_LINES:
            self._lines.put(line)
            return
        self.acquire()
        self._dropped += 1
        self.release()

    def _be_writer(self) -> None:
        """Be the thread that writes."""
        reported = 0  # how many dropped lines the log has told of
        lines: list[tuple[float, str, str, Any] | None] = []
        while None not in lines:
            lines = [self._lines.get()]
            time.sleep(0.01)  # gather lines: to be woken costs more than to write one
            while not self._lines.empty():
                lines.append(self._lines.get())
            text = "".join(self._compose(*line) for line in lines if line)
            dropped = self._dropped
            if dropped > reported:
                text += f"{dropped - reported} lines of the log did not fit and were dropped\n"
                reported = dropped
            write_all(self._descriptor, text.encode())

    def _compose(self, seconds: float, level: str, text: str, arguments: Any) -> str:
        """Return a line in ASCII; a traceback makes more lines, which are indented."""
        if arguments:
            try:  # contextlib.suppress would take as long as all the rest
                text %= arguments
            except Exception:  # arguments that do not fit
                pass
        if not text.isprintable() or not text.isascii():
            text = text.translate(self.ESCAPES).encode("ascii", "backslashreplace").decode()
        return f"{_whole_second(int(seconds))}Z {level} {text}\n"


ENDING = "this process is ending"  # why a store no longer uses its journal


def run_until_stopped(server: Server, grace: float) -> int:
    """Serve until a signal or `server.shutdown`, then stop in order; return an exit status.

    SIGINT, SIGTERM, SIGBREAK, and SIGHUP unless it is ignored, begin the stop; a second one ends
    the process at once, with status 128 + its number. In a thread that is not the main one, there
    are no signals. Status 1: the journal was lost, or there is no thread for the stop.
    """
    application = server.application
    # The thread below waits for what is put here. To begin the stop, put the seconds that running
    # tasks may still have; if there is nothing to stop any more, put None.
    #
    # Why not an Event? Suppose that the main thread is in the middle of event.set(), and so holds
    # the lock of the event. A signal comes, and Python calls the handler in the same thread (4,
    # fact 6). The handler's own event.set() would wait for that lock for ever. But the put() of a
    # SimpleQueue may be interrupted by another put().
    stops: queue.SimpleQueue[float | None] = queue.SimpleQueue()
    signals: list[int] = []
    losses: list[str] = []

    def on_signal(number: int, frame: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            # The children are killed next. The journal must not note their tasks as failed.
            application.store.lost = ENDING
            application.children.kill()
            os._exit(128 + number)
        stops.put(grace)

    def on_journal_lost(reason: str) -> None:
        application.stop()  # at once: nothing may begin any more
        losses.append(reason)
        stops.put(0.0)

    def stop() -> None:
        seconds = stops.get()
        if seconds is not None:
            stop_in_order(server, seconds)

    application.store.journal_lost = on_journal_lost
    if application.store.lost:  # it was lost after it was loaded, and nobody was told
        on_journal_lost(application.store.lost)
    if threading.current_thread() is threading.main_thread():
        handle_stop_signals(on_signal)
    try:
        threading.Thread(target=stop, name="stop", daemon=True).start()
    except (RuntimeError, MemoryError) as error:  # no thread to be had
        server.server_close()
        log.error("cannot serve, because there is no thread for the stop: %s", describe(error))
        return 1
    try:
        server.serve_forever()
    finally:
        server.server_close()
    # If somebody else has called server.shutdown, the application is still to be stopped, and the
    # thread waits. If it was stop_in_order, these two lines do nothing any more.
    application.stop()
    stops.put(None)
    if losses:
        log.error("stopped, because the journal belongs to this server no more: %s", losses[0])
    return 1 if losses else 0


def stop_in_order(server: Server, grace: float) -> None:
    """Stop an application and its server. Blocks, at most a few seconds longer than `grace`."""
    application = server.application
    deadline = time.monotonic() + grace
    waiting = application.stop()  # 1. creates get 503, long polls are answered, nothing begins
    fate = "are dropped"
    if application.store.journal is not None:
        fate = "stay in the journal for the next start"
    log.info(
        "stopping: running tasks have %g seconds, a second signal ends them; %d waiting tasks %s",
        grace,
        waiting,
        fate,
    )
    application.join(grace)  # 2. running tasks go on for a while, and polls are answered
    # 3. Coroutines are interrupted. Other tasks that still run end with the process.
    application.coroutine_pool.shut_down(1)
    server.shutdown(max(2.0, deadline - time.monotonic()))  # 4. answers under way are sent


# ==== The core ends here. Everything below is optional. ===========================================


# -- 9. Monitoring ---------------------------------------------------------------------------------

MAX_LIMIT = 500  # records of one listing
MAX_LISTINGS = 500  # that wait for their turn, which takes some milliseconds for each
LISTING_SECONDS = 20.0  # for which one may wait

_LIMIT = {
    "name": "limit",
    "in": "query",
    "description": f"How many at most; more than {MAX_LIMIT} are taken for {MAX_LIMIT}.",
    "schema": {"type": "integer", "minimum": 0, "maximum": MAX_LIMIT, "default": 50},
}
_STATUS = {
    "name": "status",
    "in": "query",
    "description": "Only tasks of this status.",
    "schema": {"$ref": "#/components/schemas/TaskStatus"},
}
_TYPE = {
    "name": "type",
    "in": "query",
    "description": "Only tasks of this type.",
    "schema": {"type": "string"},
}


class Listing:
    """What GET /tasks answers: made by a worker, while the connection waits."""

    def __init__(self, store: Store, limit: int, status: str, type_name: str) -> None:
        self._store = store
        self._limit, self._status, self._type = limit, status, type_name
        # What the worker has made: at first nothing, then one of these two.
        self._response: Response | None = None
        self._error: Exception | None = None
        self._is_dropped = False  # becomes true once, by any thread

    def drop(self) -> None:
        """Say that nobody waits for the response any more."""
        self._is_dropped = True

    def make(self, wake: Callable[[], None]) -> None:
        """Make the response and call `wake`; do nothing if nobody waits for it any more."""
        if self._is_dropped:
            return
        try:
            records = self._store.newest(self._limit, self._status, self._type)
            documents = []
            for number, record in enumerate(records, 1):
                documents.append(encode_cached(record, False))
                if number % 20 == 0:
                    # Give way to the loop. It gives the interpreter away at each system call, and
                    # would wait up to a millisecond to get it back (see _switch_interval).
                    time.sleep(1e-5)
            self._response = Response(200, b'{"tasks": [%s]}' % b", ".join(documents))
        except Exception as error:
            self._error = error
        wake()

    def response(self) -> Response:
        """Return the response, or raise why it could not be made.

        HTTPError 503: the worker has not come to it in time.
        """
        if self._error is not None:
            raise self._error
        if self._response is None:
            raise _too_many_listings()
        return self._response


def _too_many_listings() -> HTTPError:
    return unavailable(Unavailable("Many listings are asked for at once; try again later.", 1))


class Monitoring:
    """GET /healthz and GET /tasks of an application."""

    def __init__(self, application: Application) -> None:
        self._application = application
        # One worker makes all listings. Fifty at once would take the interpreter from everybody:
        # beside them, the slowest /healthz took 0.8 seconds.
        self._lister = WorkerPool("lister", lambda make: make(), max_workers=1)
        application.helpers.append(self._lister)
        application.router.add(
            "GET",
            "/tasks",
            self.tasks,
            blocks=never_blocks,
            summary="List the newest tasks, without their results",
            operation="list-tasks",
            details="All that are held, or those of a status and a type.",
            refusals=(400, 401, 421, 503),
            answer="TaskList",
            parameters=(_LIMIT, _STATUS, _TYPE),
        )
        application.router.add(
            "GET",
            "/healthz",
            self.healthz,
            blocks=never_blocks,
            waived=(401, 421),
            summary="Say whether tasks are taken, and how many there are",
            details="Without the server's token, where it has one, only the status is told.",
            operation="health",
            statuses={200: "Tasks are taken.", 503: "No tasks are taken; `status` says why."},
            refusals=(400,),
            answer="Health",
        )

    def tasks(self, request: Request) -> Later:
        """Answer with the newest tasks, once a worker has put their records together."""
        # float, because int takes no more than 4,300 digits in newer Pythons.
        wanted = float(request.parameter("limit", "[0-9]+", example="50") or 50)
        limit = int(min(wanted, MAX_LIMIT))
        statuses = f"{PENDING}|{COMPLETED}|{FAILED}"
        status = request.parameter("status", statuses, example=FAILED) or ""
        some_type = next(iter(self._application.types), "")
        type_name = request.parameter("type", ".*", example=some_type) or ""
        if type_name and type_name not in self._known_types():
            known = ", ".join(sorted(self._known_types()))
            raise HTTPError(400, f"Send a type that there is: {known}.")
        waiting, _ = self._lister.counts()
        if waiting >= MAX_LISTINGS:
            raise _too_many_listings()
        listing = Listing(self._application.store, limit, status, type_name)
        return Later(
            LISTING_SECONDS,
            watch=lambda wake: self._lister.submit(functools.partial(listing.make, wake)),
            unwatch=lambda wake: listing.drop(),
            answer=listing.response,
            answers_early=False,
        )

    def healthz(self, request: Request) -> Response:
        """Answer whether tasks are taken; to those who may know it, also how many there are."""
        store = self._application.store
        if store.stopping:
            return Response(503, b'{"status": "stopping"}')
        if store.failing:
            return Response(503, b'{"status": "journal failing"}')
        health = {"status": "ok"}
        if request.trusted:
            health.update(self._numbers())
        return Response(200, json.dumps(health).encode())

    def _known_types(self) -> set[str]:
        """Return the types that are registered, and those of records from before this start."""
        return {
            *self._application.types,
            *(type_name for type_name, _ in self._application.store.counts()),
        }

    def _numbers(self) -> dict[str, Any]:
        application = self._application
        counts = application.store.counts()
        totals = {COMPLETED: 0, FAILED: 0}
        tasks = {
            type_name: {PENDING: 0, COMPLETED: 0, FAILED: 0}
            for type_name in sorted(self._known_types())
        }
        for (type_name, status), count in counts.items():
            tasks[type_name][status] = count
            if status != PENDING:
                totals[status] += count
        pools = [pool.counts() for pool in application.pools]
        oldest = [pool.oldest() for pool in application.pools]
        moments = [record.created_at for record in oldest if record is not None]
        return {
            "waiting": sum(waiting for waiting, _ in pools),
            "running": sum(running for _, running in pools),
            **totals,
            "oldest_waiting": max(0.0, time.time() - min(moments)) if moments else None,
            "types": list(application.types),
            "tasks": tasks,
        }


def add_monitoring(application: Application) -> None:
    """Add GET /healthz and GET /tasks."""
    Monitoring(application)


# -- 10. Durability --------------------------------------------------------------------------------


class Journal:
    """Where records outlive the process: the contract of `application.store.journal`.

    A journal is an object with the three methods below. To write one, it is enough to know what is
    said here. The server never closes a journal: it is there until the process ends.

    A journal of your own opens its database in `load`, whose errors are shown in one line.
    (SQLiteJournal opens it in `__init__`. That is possible because `main` makes it, and shows its
    errors.)

    What is kept of a record are the fields in JOURNALED, each exactly as it is:

        id                        str of 36 characters; no two records have it at a time
        sequence                  int from 1 to 2 ** 63 - 1, another one for each record
        name, status, type        str of any characters, even NUL, but no lone surrogates
        message, error            the same, up to 2,000 characters, or None
        created_at                float
        started_at, finished_at,
        progress                  float or None
        result, payload           bytes of JSON, up to 1 MiB, or None

    `[getattr(record, field) for field in JOURNALED]` makes a row of a record, and
    `Record(**dict(zip(JOURNALED, row)))` a record of a row.

    *One server.* A journal belongs to one server at a time, because each server holds all records
    in memory. `load` keeps a second one out, or has it wait until the first has ended: by a lock
    that goes when its owner dies. (A lock made by `flock` belongs to the open file. If a task calls
    os.fork, the copy has that file open, too, and the lock lasts until both have closed it. So give
    `os.register_at_fork` a function that closes it in the copy.)

    Another server may take a journal over all the same. Once the journal notices, each of its
    methods raises JournalLost, from then on. The server then begins nothing more, and ends with
    status 1.

    *Order.* The server promises that for one id the calls follow each other: the next one begins
    after the last one has returned or raised. Calls for different ids come from many threads at
    once. The journal has to see to it that a call which has raised never takes effect later.

    *Errors.* RecordRefused from `save` says that this record can never be written: a create is
    refused with 400; if the record is the start or the outcome of a task, that becomes failed.
    Other records that are written at the same time must not suffer.

    Any other exception says that the record is not written now, or that nobody knows, because a
    connection broke before the commit was confirmed. Then a create is refused with 503, and
    `delete` is called for its id later, in case that it was written. For a start or an outcome,
    `save` is called again until it works. So a repeated call must do no harm. An OSError with one
    sentence that says what to do is best, because the log shows it.
    """

    def load(self) -> Iterable[Record]:
        """Return all records in the order of their sequence; may be a generator.

        Called once and first, by the thread that starts the server, while the server does not
        listen yet. It may take its time. An exception ends the start: its text is shown in one
        line, and the exit status is 1.
        """
        raise NotImplementedError

    def save(self, record: Record) -> None:
        """Write a record, in the place of one with the same id; return when it survives a crash.

        Called by up to some hundred threads at once, each with a record of its own; they are
        faster when they share a transaction. Of a task it is called when it is created, when it
        starts (unless its type says `rerun`), and when it is final.

        After a crash, each record must be in the state of the last call that has returned, or of
        the one that was under way.
        """
        raise NotImplementedError

    def delete(self, ids: list[str]) -> None:
        """Delete some hundred records; return when that survives a crash.

        Called by one thread at a time, some time after the records were evicted. Some of the ids
        may not be there: those of creates whose `save` raised. If the process dies before such a
        delete, the next start loads the record and runs its task, although the create was refused.
        """
        raise NotImplementedError


# The fields of a record that a journal keeps: all of Record but `live`, in the same order. Whoever
# changes them changes what is in files: so raise SQLiteJournal.VERSION, change its _CREATE, and
# have its _prepare convert older files. (And have Application._finish hand a new field on.)
JOURNALED = (
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
    "payload",
    "sequence",
)


def recover(application: Application) -> None:
    """Take over what the last process left: queue what had not begun, settle what was running."""
    if application.store.journal is not None:
        application.coroutine_pool.expect_journal()
    for record in application.store.load():
        task_type = application.types.get(record.type)
        if task_type is None:
            application.fail(record, "interrupted: the server has no such task type any more")
        elif record.started_at is not None and not task_type.rerun:
            application.fail(record, "interrupted: the server ended while it ran")
        else:
            task_type.pool.reserve(record.live, bounded=False)
            task_type.pool.put(record.live, record)


def _locked_file(path: str) -> Any:
    """Lock a file, made if there is none, and return it; the lock ends when it is closed.

    POSIX only. OSError: after a second, another process still has the lock.
    """
    import fcntl  # POSIX only

    deadline = time.monotonic() + 1
    file = open(path, "ab")  # noqa: SIM115 -- stays open
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise OSError("it is locked") from None
            time.sleep(0.02)  # flock knows no deadline
        except OSError as error:  # this file system has no such locks
            log.warning("see that no other server uses %s, which cannot be locked: %s", path, error)
            break
    _own_files.add(file)
    return file


class _Job(NamedTuple):
    """What a thread asks of the thread that writes."""

    record: Record | None  # to be saved
    ids: list[str]  # to be deleted
    # The thread that asks waits here. The one that writes puts None, or the error.
    reply: queue.SimpleQueue[Exception | None]


class SQLiteJournal(Journal):
    """Keeps records in an SQLite file that no other process can open meanwhile.

    One thread writes. While it waits for the disk, other threads hand records to it. It writes all
    of them in its next transaction, with one wait.

    A lock on a file beside it keeps a second server out. SQLite's own lock is not enough, because
    of an old rule of POSIX: a process loses its locks on a file when it closes any descriptor of
    that file. So a task that opens the database and closes it again, say to copy it, would unlock
    it.
    """

    # The version of the table, which the file keeps as user_version. Version 1 has the fields of
    # JOURNALED as above; `seq` is the sequence, times are seconds since 1970, result and payload
    # are blobs of JSON.
    VERSION = 1
    _CREATE = (
        "CREATE TABLE task (seq INTEGER PRIMARY KEY, id, name, status, type, created_at, "
        "started_at, finished_at, progress, message, result, error, payload, UNIQUE (id))"
    )
    _COLUMNS = ", ".join(JOURNALED).replace("sequence", "seq")
    _ROW = "(" + ", ".join("?" * len(JOURNALED)) + ")"
    _MAX_VALUES = 999  # of one statement; SQLite before 3.32 takes no more

    def __init__(self, path: str) -> None:
        """Open or create the file, within a second. OSError says what is wrong and what to do."""
        # SQLite follows a link, and puts its log beside the file itself. So the link is followed
        # here.
        self._path = os.path.realpath(path)
        # What the thread is to write; None ends it.
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock_file = None
        try:
            import sqlite3  # not every Python is built with it

            folder = os.path.dirname(self._path)
            if not os.path.isdir(folder):
                raise OSError(f"there is no folder {folder}")
            if os.path.isdir(self._path):
                raise OSError("it is a folder")
            if _POSIX:
                self._lock_file = _locked_file(self._path + "-lock")
            self._database = sqlite3.connect(
                self._path, timeout=1, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
                self._files = self._stat()
            except BaseException:
                self._database.close()  # which unlocks the file
                raise
        except Exception as error:
            self._unlock()
            raise self._error("opened", error, "stop the server that uses it, ") from error
        self._thread = threading.Thread(target=self._be_writer, name="journal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write all that was handed over, then close the file. Blocks.

        The server never does this.
        """
        self._jobs.put(None)
        self._thread.join()
        self._database.close()
        self._unlock()

    def load(self) -> Iterable[Record]:
        """Yield all records in the order of their creation. OSError."""
        statement = f"SELECT {self._COLUMNS} FROM task ORDER BY seq"
        intern = sys.intern
        try:
            for task_id, name, status, type_name, *rest in self._database.execute(statement):
                # In the order of JOURNALED, which is that of Record. A million records that share
                # these two texts are smaller by 100 MiB.
                yield Record(task_id, name, intern(status), intern(type_name), *rest)
        except Exception as error:
            raise self._error("read", error) from error

    def save(self, record: Record) -> None:
        """Write a record; return once it is on the disk. OSError: it is not. RecordRefused."""
        self._hand_over(record, [])

    def delete(self, ids: list[str]) -> None:
        """Delete records; return once that is on the disk. OSError: it is not."""
        self._hand_over(None, ids)

    def _hand_over(self, record: Record | None, ids: list[str]) -> None:
        reply: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._jobs.put(_Job(record, ids, reply))
        error = reply.get()
        if error is not None:
            raise error

    def _unlock(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()

    def _query(self, statement: str) -> list[Any]:
        """Execute a statement; return all rows, because PyPy needs them fetched."""
        return list(self._database.execute(statement))

    def _prepare(self) -> None:
        """Lock the file, see whose it is, make the table if it is new; spare a foreign file."""
        self._query("PRAGMA locking_mode = EXCLUSIVE")  # what is locked once is locked from then on
        self._query("BEGIN EXCLUSIVE")
        version = self._query("PRAGMA user_version")[0][0]
        if not self._query("SELECT 1 FROM sqlite_master"):
            self._query(self._CREATE)
        elif version != self.VERSION or not self._query(
            "SELECT 1 FROM sqlite_master WHERE name = 'task'"
        ):
            raise ValueError(f"a newer server or another program wrote it (schema {version})")
        self._query(f"PRAGMA user_version = {self.VERSION}")
        self._query("COMMIT")
        self._query("PRAGMA journal_mode = WAL")
        self._query("PRAGMA synchronous = FULL")
        self._query("PRAGMA fullfsync = 1")  # macOS: a plain fsync leaves data in the drive's cache
        # In bytes. After a huge transaction, SQLite cuts its log (the -wal file) back to that.
        self._query("PRAGMA journal_size_limit = 16777216")
        self._query("SELECT 1 FROM task LIMIT 1")  # makes SQLite's log, which _stat looks at

    def _stat(self) -> list[tuple[int, int]]:
        """Return which files are now at the path of the database and at that of SQLite's log."""
        statuses = [os.stat(path) for path in (self._path, self._path + "-wal")]
        return [(status.st_dev, status.st_ino) for status in statuses]

    def _error(self, verb: str, reason: object, advice: str = "") -> OSError:
        return OSError(
            f"the journal {self._path} cannot be {verb}: {reason}; {advice}"
            "see that this user may write there and that there is space, or choose another file"
        )

    def _be_writer(self) -> None:
        """Be the thread that writes."""
        is_ending = False
        while not is_ending:
            jobs = [self._jobs.get()]
            while not self._jobs.empty():
                jobs.append(self._jobs.get())
            is_ending = None in jobs
            self._write_all([job for job in jobs if job is not None])

    def _write_all(self, jobs: list[_Job]) -> None:
        error = self._write(jobs)
        for job in jobs:
            if isinstance(error, RecordRefused):
                # One of them was refused, so none was written. Write each alone: then only that one
                # is refused.
                job.reply.put(self._write([job]))
            else:
                job.reply.put(error)

    def _write(self, jobs: list[_Job]) -> Exception | None:
        """Do jobs in one transaction; return why that did not work."""
        records = [job.record for job in jobs if job.record is not None]
        deleted = [task_id for job in jobs for task_id in job.ids]
        try:
            self._commit(records, deleted)
            return None
        except Exception as exception:  # whatever it is: nobody may be left waiting
            # If this fails, the next transaction fails as well, and its error is logged.
            with contextlib.suppress(Exception):
                self._database.rollback()
            if isinstance(exception, (UnicodeError, OverflowError)):
                return RecordRefused(describe(exception))
            return self._error("written", exception)

    def _commit(self, records: list[Record], deleted: list[str]) -> None:
        """Delete, then save, in one transaction.

        With a statement for each row, saves are five times slower beside a thread that computes:
        each statement gives up the interpreter, and has to wait to get it back.
        """
        if self._stat() != self._files:  # a file that was moved is not found by the next start
            raise OSError("it is not at its path any more")
        execute = self._database.execute
        execute("BEGIN IMMEDIATE")
        for some_ids in _portions(deleted, self._MAX_VALUES):
            marks = ", ".join("?" * len(some_ids))
            execute(f"DELETE FROM task WHERE id IN ({marks})", some_ids)
        for some in _portions(records, self._MAX_VALUES // len(JOURNALED)):
            rows = ", ".join([self._ROW] * len(some))
            values = [getattr(record, field) for record in some for field in JOURNALED]
            # REPLACE, because ON CONFLICT needs SQLite 3.24.
            execute(f"INSERT OR REPLACE INTO task ({self._COLUMNS}) VALUES {rows}", values)
        execute("COMMIT")


def _portions(items: list[Any], size: int) -> Iterable[list[Any]]:
    """Yield the items in lists of at most so many."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


# -- 11. Access ------------------------------------------------------------------------------------


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that a text is, None for a name."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def host_check(names: Iterable[str]) -> Callable[[Request], None]:
    """Return a check that a request is meant for an IP address, localhost, or one of these names.

    Against DNS rebinding:

    1. A browser loads a hostile page from evil.example.
    2. The owner of that name changes it: now it stands for the address of this server.
    3. The page asks evil.example again. The browser sends that to this server, and lets the page
       read the answer, because the name is that of its own site.

    But such a request has evil.example as its Host, and is refused. A Host that is an address
    cannot come about in this way.

    HTTPError 421 (RFC 9110, 15.5.20).
    """
    allowed = {"localhost", *(name.lower().rstrip(".") for name in names)}

    @functools.lru_cache(maxsize=256)
    def is_meant(host: str) -> bool:
        if host.startswith("["):
            name = host[1:].partition("]")[0]
        else:
            name = host.partition(":")[0].lower()
        if name.endswith("."):  # a full name may end so: "localhost." (RFC 1034, 3.1)
            name = name[:-1]
        return name in allowed or parse_address(name) is not None

    def check(request: Request) -> None:
        # HTTP/1.0 may name no host; no browser does so.
        if request.host and not is_meant(request.host):
            sentence = "This server does not go by that name: use its address, or start it with "
            raise HTTPError(421, f"{sentence}--allow-host.")

    return check


def token_check(token: str) -> Callable[[Request], None]:
    """Return a check for `Authorization: Bearer` with this token. HTTPError 401 (RFC 6750, 3)."""
    expected = token.encode()

    def check(request: Request) -> None:
        scheme, _, credentials = request.header("authorization").partition(" ")
        given = credentials.strip().encode("latin-1")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, expected):
            challenge = ("WWW-Authenticate", "Bearer")
            raise HTTPError(401, "Send the server's token: Authorization: Bearer TOKEN.", challenge)

    return check


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """Return a context for `Server`: TLS 1.2 or newer, with forward secrecy and AEAD alone.

    *Forward secrecy*: who gets hold of the key later cannot decrypt what was recorded. *AEAD*: what
    was changed on the way is noticed.

    OSError: a file is missing or wrong. ValueError: this Python has no TLS.
    """
    if ssl is None:
        raise ValueError(
            "this Python has no module ssl; use another one, or a proxy that speaks TLS"
        )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client may ask for another handshake on a connection that is open. The loop would compute
    # it, and all others would wait. OpenSSL 3 refuses that by itself.
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    # These are ciphers of TLS 1.2; all ciphers of TLS 1.3 have forward secrecy and AEAD.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.load_cert_chain(certificate, key, password=_no_pass_phrase)
    return context


def _no_pass_phrase() -> str:
    """Refuse, when OpenSSL would ask for the pass phrase of a key. OSError."""
    raise OSError("the key has a pass phrase, which nobody could type; give a key without one")


# -- 12. OpenAPI -----------------------------------------------------------------------------------


# What each refusal in the description means. All endpoints share these sentences. If you
# add an endpoint that refuses for another reason, add that to the sentence.
REFUSALS = {
    400: "The request is malformed, or says something that cannot be; `error` says what to send.",
    401: "The server asks for a token: send `Authorization: Bearer TOKEN`.",
    403: "A page of another site has sent this.",
    404: "No task of this type has this id; it may have been evicted.",
    408: "The request did not come to its end in time.",
    409: "The first create with this Idempotency-Key is just being stored; send it again.",
    411: "Send a Content-Length, or chunks.",
    413: f"The body is too large; at most {MAX_BODY} bytes are taken.",
    415: "Send JSON that is not compressed, as `application/json`.",
    421: "The server does not go by the name in `Host`.",
    422: "The Idempotency-Key was used for another name or type; choose a new one.",
    501: "The body has a transfer coding other than chunked.",
    503: "Not now; try again after as many seconds as `Retry-After` says.",
}

_MOMENT = {"type": ["string", "null"], "format": "date-time"}


def _described(schema: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {**schema, "description": description}


# A record without its result, as it is listed.
_SUMMARY: dict[str, Any] = {
    "id": _described({"type": "string", "format": "uuid"}, "The id to poll with."),
    "name": _described({"type": "string", "maxLength": MAX_NAME}, "The name as it was posted."),
    "status": {"$ref": "#/components/schemas/TaskStatus"},
    "type": _described({"type": "string"}, "The type of the task."),
    "created_at": _described(
        {"type": "string", "format": "date-time"}, "When the task was created, in UTC."
    ),
    "started_at": _described(_MOMENT, "When a worker took it; null until then."),
    "finished_at": _described(_MOMENT, "When it became final; null until then."),
    "progress": _described(
        {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "How far it is, as reported last; null before the first report.",
    ),
    "message": _described(
        {"type": ["string", "null"], "maxLength": MAX_MESSAGE},
        "What it has reported last in words.",
    ),
    "error": _described({"type": ["string", "null"]}, "Why it failed; null unless it did."),
}

_COUNT = {"type": "integer", "minimum": 0}

SCHEMAS: dict[str, Any] = {
    "TaskStatus": {
        "type": "string",
        "description": "Pending while the task waits or runs; then one of the others, for good.",
        "enum": [PENDING, COMPLETED, FAILED],
    },
    "TaskSummary": {
        "type": "object",
        "description": "A task without its result.",
        "required": list(_SUMMARY),
        "properties": _SUMMARY,
    },
    "TaskRecord": {
        "description": "All that is known of a task.",
        "allOf": [
            {"$ref": "#/components/schemas/TaskSummary"},
            {
                "type": "object",
                "required": ["result"],
                "properties": {
                    "result": {"description": "What the function returned, if it is completed."}
                },
            },
        ],
    },
    "TaskList": {
        "type": "object",
        "description": "Tasks, the newest first.",
        "required": ["tasks"],
        "properties": {
            "tasks": {
                "type": "array",
                "description": "As many as were asked for, if there are as many.",
                "items": {"$ref": "#/components/schemas/TaskSummary"},
            }
        },
    },
    "Health": {
        "type": "object",
        "description": "How the server is. Who has no token is told the status alone.",
        "required": ["status"],
        "properties": {
            "status": {
                "type": "string",
                "description": "Whether tasks are taken, and why not.",
                "enum": ["ok", "stopping", "journal failing"],
            },
            "waiting": _described(_COUNT, "Tasks that wait for a worker."),
            "running": _described(_COUNT, "Tasks that run."),
            "completed": _described(_COUNT, "Completed tasks that are held."),
            "failed": _described(_COUNT, "Failed tasks that are held."),
            "oldest_waiting": _described(
                {"type": ["number", "null"]}, "For how many seconds the oldest one has waited."
            ),
            "types": {
                "type": "array",
                "description": "The types that can be created.",
                "items": {"type": "string"},
            },
            "tasks": {
                "type": "object",
                "description": "By type and status, how many tasks are held.",
                "additionalProperties": {"type": "object", "additionalProperties": _COUNT},
            },
        },
    },
    "Error": {
        "type": "object",
        "description": "A refusal.",
        "required": ["error"],
        "properties": {"error": {"type": "string", "description": "What to do, in one sentence."}},
    },
    "Description": {
        "type": "object",
        "description": "A description in the OpenAPI format.",
        "additionalProperties": True,
    },
}

_RETRY_AFTER = {"description": "In so many seconds.", "schema": {"type": "integer", "minimum": 1}}
_LOCATION = {"description": "Where to poll the task.", "schema": {"type": "string"}}
_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The id that create answered.",
    "schema": {"type": "string", "format": "uuid"},
}


class Description:
    """Makes the OpenAPI 3.1 description of all that the router of an application knows."""

    def __init__(self, application: Application) -> None:
        self._is_secured = application.secured
        self._types = application.types
        self._routes = application.router.routes
        self._schemas: dict[str, Any] = {}  # those that are used
        self._responses: dict[str, Any] = {}  # the same
        # For each kind, the names that are taken (in lower case, without punctuation), and the
        # schema, route or tag that has each; for _unique().
        self._owners: dict[str, dict[str, Any]] = {"schema": {}, "operation": {}, "tag": {}}
        for name, schema in SCHEMAS.items():  # nothing else gets these names
            self._unique("schema", name, schema)

    def document(self) -> dict[str, Any]:
        """Return the description."""
        paths: dict[str, dict[str, Any]] = {}
        for route in self._routes:
            paths.setdefault(route.pattern, {})[route.method.lower()] = self._operation(route)
        components: dict[str, Any] = {"schemas": self._schemas, "responses": self._responses}
        if self._is_secured:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        tags = {self._tag(route): self._about(route.tag) for route in self._routes}
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "taskserver",
                "version": __version__,
                "description": "A server for long work: create a task, then poll it to its end.",
                "license": {"name": "MIT", "identifier": "MIT"},
            },
            "servers": [{"url": ".", "description": "Where this description was found."}],
            "security": [{"token": []}] if self._is_secured else [],
            "tags": [{"name": tag, "description": tags[tag]} for tag in sorted(tags)],
            "paths": paths,
            "components": components,
        }

    def _operation(self, route: Route) -> dict[str, Any]:
        subject = route.summary or route.pattern
        operation: dict[str, Any] = {
            "operationId": self._name(route),
            "summary": route.summary or f"{route.method} {route.pattern}",
            "description": route.details or f"{subject}.",
            "tags": [self._tag(route)],
            "responses": {str(status): self._success(route, status) for status in route.statuses},
        }
        for status in route.refusals:
            if status in route.waived:  # so it is never sent
                continue
            if status == 401 and not self._is_secured:
                continue
            operation["responses"][str(status)] = self._refusal(status)
        if self._is_secured and 401 in route.waived:
            operation["security"] = [{"token": []}, {}]  # with a token or without
        parameters = [*route.parameters]
        is_told = any(parameter.get("in") == "path" for parameter in parameters)
        if route.pattern.endswith("/{id}") and not is_told:
            parameters.insert(0, _ID)
        if parameters:
            operation["parameters"] = parameters
        if route.body is not None:
            operation["requestBody"] = {"required": True, "content": self._json(route.body)}
        self._take_along(operation)
        return operation

    def _unique(self, kind: str, name: str, owner: Any) -> str:
        """Return a name that this owner alone has: `name`, or that with a 2 behind it.

        Names are compared without case and punctuation, because types a-b and ab would both become
        CreateAb.
        """
        owners = self._owners[kind]
        while True:
            plain = re.sub("[^a-z0-9]", "", name.lower()) or name
            if owners.setdefault(plain, owner) == owner:  # nobody else has it
                return name
            name += "2"

    def _name(self, route: Route) -> str:
        """Return a name like createThumbnail that no other operation has."""
        words = re.findall("[A-Za-z0-9]+", route.operation)
        if not words:
            words = re.findall("[A-Za-z0-9]+", f"{route.method} {route.pattern}")
        first, *others = [word.lower() for word in words]
        name = first + "".join(word.capitalize() for word in others)
        return self._unique("operation", name, route)

    def _tag(self, route: Route) -> str:
        """Return the name of the group of a route."""
        name = route.tag or "server"
        return self._unique("tag", name, name)

    def _about(self, tag: str) -> str:
        if tag in self._types:
            return f"Tasks of type {tag}."
        return "Endpoints that belong to no single type of task."

    def _success(self, route: Route, status: int) -> dict[str, Any]:
        """Return what is said of a status that bears the answer of a route."""
        response: dict[str, Any] = {"description": route.statuses[status]}
        if route.media_type != "application/json":
            response["content"] = {route.media_type: {"schema": {"type": "string"}}}
        elif route.answer is not None:
            response["content"] = self._json(route.answer)
        if 201 in route.statuses:  # a create: all its answers name where to poll
            response["headers"] = {"Location": _LOCATION}
        return response

    def _refusal(self, status: int) -> dict[str, Any]:
        """Return a reference to what is said of a refusal, which is the same for all routes."""
        name = f"Error{status}"
        response: dict[str, Any] = {
            "description": REFUSALS.get(status, f"{http.HTTPStatus(status).phrase}."),
            "content": self._json("Error"),
        }
        if status in (409, 503):
            response["headers"] = {"Retry-After": _RETRY_AFTER}
        self._responses[name] = response
        return {"$ref": f"#/components/responses/{name}"}

    def _json(self, schema: Schema) -> dict[str, Any]:
        """Return a body of JSON. A schema with a name or a title is put where all can use it."""
        return {"application/json": {"schema": self._reference(schema)}}

    def _reference(self, schema: Schema) -> Any:
        if isinstance(schema, str):
            name, schema = schema, SCHEMAS[schema]
        elif schema is not None and "title" in schema:
            title = re.sub("[^A-Za-z0-9]", "", schema["title"]) or "Schema"
            name = self._unique("schema", title, schema)
            # The title is left out, because some generators take it for the name, and two schemas
            # may have the same title.
            schema = {key: value for key, value in schema.items() if key != "title"}
        else:
            return schema
        if name not in self._schemas:
            self._schemas[name] = schema
            self._take_along(schema)
        return {"$ref": f"#/components/schemas/{name}"}

    def _take_along(self, part: Any) -> None:
        """Add those of SCHEMAS to which this part refers, and so those to which they refer."""
        for name in re.findall('"#/components/schemas/([A-Za-z]+)"', json.dumps(part)):
            if name in SCHEMAS:
                self._reference(name)


def openapi(application: Application) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of all that the router of an application knows."""
    return Description(application).document()


# -- 13. Live page ---------------------------------------------------------------------------------

PAGE = r"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>taskserver</title><link rel="icon" href="data:,">
<style>
/* Text has at least 7:1 of contrast on --ground and on --card, in light and in dark. */
:root { color-scheme: light dark;
  --ground: light-dark(#f4f6f9, #10141b); --card: light-dark(#ffffff, #191f29);
  --line: light-dark(#dde2ea, #2f3847); --edge: light-dark(#767f8e, #7f8a9b);
  --text: light-dark(#1a2230, #e6eaf1); --quiet: light-dark(#434c5b, #b4bdcb);
  --accent: light-dark(#1d459f, #a3bfff); --good: light-dark(#0f5230, #8bdcae);
  --bad: light-dark(#8f1512, #ffada8); }
* { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
body { max-width: 76rem; margin: auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, sans-serif; background: var(--ground); color: var(--text); }
header { margin-bottom: 1rem; }
header > div { justify-content: space-between; }
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1.5rem; align-items: start; }
h2, h3, summary { font-size: 1rem; font-weight: 600; }
.stack { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0.75rem; padding: 0;
  list-style: none; }
.line { display: flex; flex-wrap: wrap; gap: 0.25rem 0.75rem; align-items: center; }
.status { min-height: 2.25rem; }  /* so that a button that comes pushes nothing */
#shells button { min-width: 5rem; }  /* nor does its answer */
.task code { font-size: 0.75rem; }
.task .copy { margin-left: -0.5rem; padding: 0 0.5rem; min-height: 1.625rem;
  border-color: transparent; }
.cancel { margin-left: auto; }
.note { flex-basis: 100%; text-align: right; }
#countdown:empty, .note:empty { display: none; }  /* or they would have gaps of their own */
#shells .line { justify-content: space-between; margin-top: 0.75rem; }
#access { max-width: 25rem; }
main:has(#access:not([hidden])):has(#tasks:empty) > :is(section, aside) { display: none; }
.card { padding: 1rem; border: 1px solid var(--line); border-radius: 0.75rem;
  background: var(--card); }
.quiet, .wrong, .message, .task a { font-size: 0.875rem; }
.quiet { color: var(--quiet); }
.wrong { font-weight: 600; color: var(--bad); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
a { color: var(--accent); }
::placeholder { color: var(--quiet); opacity: 1; }
input, select, textarea, pre { width: 100%; padding: 0.5rem 0.75rem; border-radius: 0.5rem;
  font: inherit; color: inherit; background: var(--ground); border: 1px solid var(--edge); }
label > * { margin-top: 0.25rem; }
[aria-invalid=true] { border: 2px solid var(--bad); }
button, nav a { padding: 0.25rem 0.75rem; border: 1px solid var(--edge); border-radius: 0.5rem;
  font: inherit; font-size: 0.875rem; color: var(--accent); background: var(--card);
  text-decoration: none; cursor: pointer; }
form button, #fresh { padding: 0.5rem 1.25rem; border-color: var(--accent);
  background: var(--accent); color: var(--card); }
#fresh { position: fixed; top: 0.75rem; left: 50%; translate: -50%; }  /* so it pushes nothing */
button[aria-disabled=true] { cursor: default; color: var(--text); background: var(--line); }
nav a[aria-current] { font-weight: 600; background: var(--accent); color: var(--card);
  text-decoration: underline; }
pre, textarea, code { font: 0.8125rem/1.5 ui-monospace, monospace; }
pre { max-height: 24rem; overflow: auto; margin-top: 0.5rem; border: 0; white-space: pre-wrap; }
.task { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0.25rem 1rem;
  padding-block: 0.75rem; border-left: 0.375rem solid var(--hue); }
.task > :nth-child(n + 3) { grid-column: 1 / -1; }
.pending { --hue: var(--accent); } .completed { --hue: var(--good); } .failed { --hue: var(--bad); }
.limited { max-height: 6rem; overflow: auto; scrollbar-width: thin; }
.pill { align-self: start; padding: 0 0.75rem; border-radius: 1rem; font-size: 0.875rem;
  color: var(--hue); background: var(--ground); }
.gone, .old .task { border: 1px dashed var(--edge); border-left: 0.375rem solid var(--line); }
.gone .pill::after { content: ", no longer listed"; }
.old .pill::after { content: ", may be old"; }
progress { appearance: none; display: block; width: 100%; height: 0.5rem;
  border: 1px solid var(--line); border-radius: 1rem; overflow: hidden; background: var(--line);
  forced-color-adjust: none; print-color-adjust: exact; }
progress:indeterminate { background: repeating-linear-gradient(
  -45deg, var(--hue) 0 0.375rem, var(--line) 0 0.75rem); }
::-webkit-progress-bar { background: transparent; }
::-webkit-progress-value { background: var(--hue); print-color-adjust: exact; }
::-moz-progress-bar { background: var(--hue); print-color-adjust: exact; }
:indeterminate::-moz-progress-bar { background: transparent; }
@media (min-width: 56rem) {
  .card { padding-inline: 1.25rem; }
  main { grid-template-columns: minmax(0, 1fr) 25rem; }
  #access { grid-column: 1 / -1; }
  #jump { display: none; }
}
@media (forced-colors: active) {
  progress { --hue: CanvasText; --line: Canvas; border-color: CanvasText; }
  nav a[aria-current], button[aria-disabled=true] { border: 3px double; }
}
@media print {
  :root { color-scheme: light; }
  aside, form, button, header .quiet, nav a:not([aria-current]) { display: none !important; }
  main, section, .stack { display: block; }
  nav a[aria-current] { padding: 0; border: 0; color: inherit; text-decoration: none; }
  .task { margin-top: 1rem; break-inside: avoid; }
  .limited, pre { max-height: none; }
}
</style>

<header>
  <div class="line">
    <h1>taskserver</h1>
    <div class="line status">
      <p id="connection" class="quiet" role="status"></p>
      <span id="countdown" class="quiet"></span>
      <button id="again" hidden>Try now</button>
    </div>
  </div>
  <p id="counts"></p>
  <noscript><p class="card">This page works by scripts, and they are switched off. Allow them for
    this address and load it again; or use a terminal: <code>curl ADDRESS/tasks</code> lists the
    tasks, with the address of this page for ADDRESS.</p></noscript>
</header>
<main hidden>
  <form id="access" class="card stack" hidden>
    <label>Token (kept in memory only)
      <input name="token" type="password" autocomplete="off" required></label>
    <div><button>Use this token</button></div>
  </form>
  <section class="stack" aria-labelledby="tasks-title">
    <div class="line status">
      <h2 id="tasks-title">Tasks</h2> <p id="amount" class="quiet"></p>
      <button id="fresh" hidden></button> <button id="jump">New task</button>
    </div>
    <nav id="statuses" class="line" aria-label="Filter by status"></nav>
    <nav id="types" class="line" aria-label="Filter by type"></nav>
    <p id="empty" class="card quiet" hidden></p>
    <ul id="tasks" class="stack" role="list"></ul>
    <div><button id="more" hidden>Show more</button></div>
  </section>
  <aside class="stack" aria-label="New tasks">
    <form id="create" class="card stack" aria-labelledby="create-title">
      <h2 id="create-title">Create a task</h2>
      <label>Task type <select name="type" required></select></label>
      <label>Name <input name="name" value="my task" maxlength="256" required></label>
      <label>Rest of the payload, as a JSON object
        <textarea name="rest" rows="3" spellcheck="false" placeholder='{"seconds": 10}'
          aria-describedby="problem"></textarea></label>
      <p id="problem" class="wrong" hidden></p>
      <div class="line"><button>Create task</button>
        <output id="answer" class="quiet"></output></div>
    </form>
    <details id="commands" class="card">
      <summary>The same in a terminal</summary>
      <p id="no-command" class="quiet">There is a command as soon as the form is complete.</p>
      <div id="shells" hidden>
        <div class="line"><h3>curl</h3>
          <button data-of="curl" data-about="the command of curl"></button></div>
        <pre id="curl" tabindex="0"></pre>
        <div class="line"><h3>PowerShell</h3>
          <button data-of="powershell" data-about="the command of PowerShell"></button></div>
        <pre id="powershell" tabindex="0"></pre>
      </div>
    </details>
  </aside>
  <p id="news" class="unseen" role="status"></p>
</main>
<template id="row"><li>
  <h3 class="limited" dir="auto"></h3><span class="pill"></span>
  <p class="about quiet"></p>
  <progress max="1"></progress>
  <p class="message limited" dir="auto"></p>
  <p class="error wrong limited" dir="auto" hidden></p>
  <div class="line"><code></code> <button class="copy"></button>
    <button class="cancel"></button> <span class="note quiet"></span></div>
  <details hidden><summary class="quiet"></summary>
    <pre tabindex="0">Asking the server …</pre> <a hidden></a></details>
</li></template>

<script>
const byId = (id) => document.getElementById(id);
const form = byId("create"), fields = form.elements, list = byId("tasks");

// All requests go below the address of this page, never beside it, where others may live.
const here = location.origin + location.pathname.replace(/\/?$/, "/");

const NO_ANSWER = "The server does not answer.";
const FILTERS = [["", "All"], ["pending", "Waiting or running"], ["completed", "Completed"],
  ["failed", "Failed"]];
const MOST = 500;    // tasks that the server lists at once
const PART = 20000;  // characters of a result that are shown

// A server that hangs is reported after IDLE + SLOW seconds: less than five.
const IDLE = 3.6;    // seconds between two requests when no task waits or runs
const SLOW = 1.1;    // seconds after which an answer is missed

let token = "";        // lives in memory only
let limit = 50;        // how many tasks are asked for
let records = [];      // as the server listed them last
let isListed = false;  // they are those of the filters that are chosen
let held = {};         // how many tasks it has: {TYPE: {pending: 1, completed: 2, failed: 0}}
let isBusy = false;    // a task waits or runs
let serverTime;        // in milliseconds; our own clock may be wrong

// -- Small things --

function setText(element, text) {
  // Setting the same text again would undo what somebody has selected.
  if (element.textContent !== text) element.textContent = text;
}

// Hides an element or shows it. If the focus was in it, the refuge gets the focus.
function setHidden(element, isHidden, refuge) {
  const hadFocus = element.contains(document.activeElement);
  element.hidden = isHidden;
  if (isHidden && hadFocus) focusOn(refuge || byId("tasks-title"));
}

function focusOn(element) {
  element.tabIndex = -1;  // without it, a heading or a row takes no focus
  element.focus();
}

// Sets the text of a button. Its label says, too, which of many it is.
function setButton(button, text) {
  const {about} = button.dataset;
  setText(button, text);
  if (about) button.setAttribute("aria-label", `${text}: ${about}`);
}

// Lets a button rest while its request is under way. Disabling it would lose the focus.
function setResting(button, isResting, text) {
  button.setAttribute("aria-disabled", isResting);
  setButton(button, text);
}

function isResting(button) {
  return button.getAttribute("aria-disabled") === "true";
}

let newsTimer;

// Says something to screen readers, and takes it away before they come upon it again.
function say(text) {
  setText(byId("news"), text);
  clearTimeout(newsTimer);
  newsTimer = setTimeout(() => setText(byId("news"), ""), 4000);
}

// navigator.clipboard is there at https addresses and localhost only, so this does without.
function copy(text, button) {
  const fill = (event) => {
    event.clipboardData.setData("text/plain", text);
    event.preventDefault();
  };
  document.addEventListener("copy", fill);
  const isDone = document.execCommand("copy");
  document.removeEventListener("copy", fill);
  say(isDone ? "Copied." : "The browser does not let this page copy.");
  setButton(button, isDone ? "Copied" : "Not copied");
  setTimeout(() => setButton(button, "Copy"), 2000);
}

// Returns a random UUID (RFC 9562, version 4). crypto.randomUUID is not there at all addresses.
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = bytes[6] & 0x0f | 0x40;
  bytes[8] = bytes[8] & 0x3f | 0x80;
  const digits = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return digits.replace(/(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

// -- Requests --

// Returns {answer, text, error}: what came, as an object and as text, and a sentence if it is a
// refusal. `isUnheard` is there if no answer came: nobody knows whether the request was done.
async function request(path, {method = "GET", headers = {}, body, signals = []} = {}) {
  const used = token;  // until the answer comes, another one may be typed
  if (body) headers["Content-Type"] = "application/json";
  if (used) headers.Authorization = "Bearer " + bytesOf(used);
  const signal = AbortSignal.any([AbortSignal.timeout(10000), ...signals]);
  try {
    const response = await fetch(here + path, {method, headers, body, signal, redirect: "error"});
    const text = await response.text();
    const answer = JSON.parse(text);
    serverTime = Date.parse(response.headers.get("Date")) || Date.now();
    if (response.ok) return {answer, text, error: ""};
    if (response.status === 401) return {error: askForToken(used)};
    return {error: answer.error || `The server says: ${answer.status || response.status}.`};
  } catch {
    return {error: NO_ANSWER, isUnheard: true};
  }
}

// Returns the text as a header takes it: a character for each byte.
function bytesOf(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

function askForToken(used) {  // returns what is wrong
  const field = byId("access").elements.token;
  byId("access").hidden = false;
  field.setAttribute("aria-invalid", used !== "");
  if (document.activeElement === document.body) field.focus();
  return used ? "This token is wrong: the server refuses it." : "The server asks for its token.";
}

// -- Following the server --

// In each round the server is asked for its numbers and then for the tasks, with a rest after each.
// Both at once, half as often, would be as much work, and notice later that it hangs.

let round = new AbortController();  // hurry() ends it: then the next begins without a rest
let delay = 1;                      // seconds until the next try after one that failed

async function watch() {
  let isCalm = false;  // the last round went well, and nobody is in a hurry
  for (;;) {
    round = new AbortController();
    const {signal} = round;
    const problem = await askForBoth(isCalm);
    if (!signal.aborted) {
      showConnection(problem);
      sayWhatEnded();
      await rest(problem);
    }
    isCalm = !problem && !signal.aborted;
  }
}

async function askForBoth(isCalm) {  // returns what is wrong
  const problem = await follow("healthz", showHealth);
  if (problem === NO_ANSWER) return problem;
  if (isCalm && !problem) await rest("");
  return await follow(listing(), showTasks) || problem;
}

async function follow(path, show) {  // returns what is wrong
  const {signal} = round;
  const watchdog = setTimeout(() => {
    showConnection(NO_ANSWER);
    setText(byId("countdown"), "Still waiting for it.");
  }, 1000 * SLOW);
  const {answer, error} = await request(path, {signals: [signal]});
  clearTimeout(watchdog);
  if (signal.aborted) return "";  // the next round tells
  if (error) return error;
  try {
    show(answer);
    return "";
  } catch (reason) {
    console.error(reason);
    return "What answers here is another server than this page belongs to.";
  }
}

async function rest(problem) {
  if (!problem) return pause(pace());
  if (isOfToken(problem)) return pause(30);  // a token that is typed ends it
  for (let left = document.hidden ? 20 : delay; left > 0 && !round.signal.aborted; left -= 1) {
    setText(byId("countdown"), `Trying again in ${left} s.`);
    await pause(1);
  }
  setText(byId("countdown"), "Trying …");
  delay = Math.min(2 * delay, 4);
}

function pace() {  // returns seconds
  if (document.hidden) return 20;
  const isShown = records.some(({status}) => status === "pending");
  if (!isBusy && !isShown) return IDLE;
  return Math.min(IDLE, 0.55 * limit / 50);  // a longer listing comes less often
}

function pause(seconds) {
  const {signal} = round;
  return new Promise((resolve) => {
    setTimeout(resolve, signal.aborted ? 0 : 1000 * seconds);
    signal.addEventListener("abort", resolve);
  });
}

function hurry() {
  round.abort();
}

function showConnection(problem) {
  setText(byId("connection"), problem || "Connected to the server.");
  setText(byId("countdown"), "");
  byId("connection").className = problem ? "wrong" : "quiet";
  document.body.classList.toggle("old", problem !== "");
  setHidden(byId("again"), !problem || isOfToken(problem));
  if (!problem) delay = 1;
}

function isOfToken(problem) {
  return !byId("access").hidden && problem !== NO_ANSWER;
}

// -- Filters: they stand in the address, so that it can be sent --

function chosen() {  // what the server would refuse is not chosen
  const {status, type} = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const isStatus = FILTERS.some(([known]) => known === status);
  return {status: isStatus ? status : "", type: Object.hasOwn(held, type) ? type : ""};
}

function query(members) {  // returns what is not empty, such as status=failed&type=task
  return String(new URLSearchParams(Object.entries(members).filter(([, value]) => value)));
}

function listing() {
  return `tasks?${query({limit, ...chosen()})}`;
}

function count({status, type}) {  // "" stands for any
  let sum = 0;
  for (const [heldType, counts] of Object.entries(held)) {
    for (const [heldStatus, number] of Object.entries(counts)) {
      if ((!type || type === heldType) && (!status || status === heldStatus)) sum += number;
    }
  }
  return sum;
}

function showFilters() {
  const types = Object.keys(held).map((type) => [type, type]);
  showChoices(byId("statuses"), "status", FILTERS);
  showChoices(byId("types"), "type", [["", "All types"], ...types]);
  byId("types").hidden = types.length < 2;
}

function showChoices(nav, key, choices) {
  const now = chosen();
  for (const [value, name] of choices) {
    let link = nav.querySelector(`[data-value="${value}"]`);
    if (!link) {
      link = nav.appendChild(document.createElement("a"));
      link.dataset.value = value;
    }
    const then = {...now, [key]: value};  // what will be chosen
    link.href = "#" + (query(then) || "all");
    setText(link, `${name} ${count(then)}`);
    if (now[key] === value) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function showAmount() {
  const {status, type} = chosen();
  const shown = list.children.length;
  const all = Math.max(shown, count({status, type}));
  const hint = limit === MOST && all > shown ? " The filters find the others." : "";
  setText(byId("amount"), shown ? `${shown} of ${all}, the newest first.${hint}` : "");
  const isAll = all <= records.length || limit >= MOST;
  setHidden(byId("more"), !isListed || isAll, list.lastElementChild);
  setText(byId("empty"), status || type ? "There is no such task now. All shows the others."
    : "No tasks yet. Create one with the form or in a terminal.");
  byId("empty").hidden = !isListed || shown > 0;
}

function showHealth(health) {
  if (!health.tasks) return;  // without the token, the server tells its status alone
  const seconds = health.oldest_waiting;
  const oldest = seconds === null ? "" : `, the oldest for ${duration(seconds)}`;
  setText(byId("counts"), `${health.running} running · ${health.waiting} waiting${oldest}`);
  held = health.tasks;
  isBusy = health.waiting + health.running > 0;
  for (const type of health.types) {
    if (!fields.type.querySelector(`[value="${type}"]`)) fields.type.add(new Option(type, type));
  }
  showFilters();
  showAmount();
  showCommands();
}

// -- The list --

function showTasks({tasks}) {
  records = tasks;
  isListed = true;
  placeRows();
  setHidden(byId("access"), true);
  const made = intention && tasks.find(({id}) => id === intention.key);
  if (made) showCreated(made);  // the answer was lost
}

// Rows never move. What is under the pointer stays there: new rows wait until it has gone, so that
// nobody cancels a task that was not meant. A row that is open stays even without its record.
function placeRows() {
  const isHeld = list.matches(":hover");
  const ids = new Set(records.map(({id}) => id));
  for (const row of [...list.children]) {
    const isGone = !ids.has(row.id);
    row.classList.toggle("gone", isGone);
    if (isGone && !isHeld && !row.querySelector("[open]")) removeRow(row);
  }
  let newer = null;  // the row before the next one
  let waiting = 0;
  for (const record of records) {
    let row = byId(record.id);
    if (!row) {
      const wouldPush = newer !== list.lastElementChild;  // the rows that follow it
      if (isHeld && wouldPush) {
        waiting += 1;
        continue;
      }
      row = newRow(record);
      if (newer) newer.after(row);
      else list.prepend(row);
    }
    showTask(record, row);
    newer = row;
  }
  setHidden(byId("fresh"), waiting === 0);
  setText(byId("fresh"), `Show ${waiting} new`);
  makeScrollable();
  showAmount();
}

function newRow({id, name}) {
  const row = byId("row").content.firstElementChild.cloneNode(true);
  const part = (selector) => row.querySelector(selector);
  row.id = id;
  setText(part("h3"), name);
  setText(part("code"), id);
  part("progress").setAttribute("aria-label", `Progress of ${name}`);
  part(".copy").dataset.about = `the id of ${name}`;
  part(".cancel").dataset.about = name;
  setButton(part(".copy"), "Copy");
  setButton(part(".cancel"), "Cancel");
  return row;
}

function removeRow(row) {
  const hadFocus = row.contains(document.activeElement);
  const refuge = row.nextElementSibling || row.previousElementSibling || byId("tasks-title");
  URL.revokeObjectURL(row.querySelector("a").href);
  row.remove();
  if (hadFocus) focusOn(refuge);
}

function makeScrollable() {  // by keyboard: what is higher than its box can have the focus
  for (const box of list.querySelectorAll(".limited")) {
    if (box.scrollHeight > box.clientHeight) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

function showTask(record, row) {
  const {finished_at, message} = record;
  const before = row.record;
  if (before && before.finished_at && !finished_at) return;  // an older answer that comes late
  if (before && !before.finished_at && finished_at) ended.push(record);
  row.record = record;
  row.className = `task card ${record.status}`;
  const part = (selector) => row.querySelector(selector);
  setText(part(".pill"), stateOf(record));
  setText(part(".about"), about(record));
  showProgress(record, part("progress"));
  setText(part(".message"), message || "");
  showEnd(record, part);
  if (finished_at) setText(part(".note"), "");
  setHidden(part(".cancel"), finished_at !== null, row);
}

function showProgress(record, bar) {
  const {finished_at, progress} = record;
  const isUnknown = progress === null && stateOf(record) === "running";
  if (isUnknown) bar.removeAttribute("value");  // it is striped
  else bar.value = progress || 0;
  bar.hidden = progress === null && finished_at !== null;
}

function showEnd({name, finished_at, error}, part) {
  const [firstLine, ...others] = (error || "").split("\n");
  setText(part(".error"), firstLine);
  part(".error").hidden = error === null;
  const outcome = error === null ? "Result" : "Whole error";
  setText(part("summary"), outcome);
  part("summary").setAttribute("aria-label", `${outcome} of ${name}`);
  const isAllSeen = error !== null && others.length === 0;
  part("details").hidden = finished_at === null || isAllSeen;
}

function stateOf({status, started_at}) {
  if (status !== "pending") return status;
  return started_at ? "running" : "waiting";
}

function about(record) {
  const {type, finished_at, progress} = record;
  const percent = progress === null || finished_at ? "" : ` · ${Math.floor(100 * progress)} %`;
  return `${type}${percent} · ${times(record)}`;
}

function times({created_at, started_at, finished_at}) {
  const end = finished_at ? Date.parse(finished_at) : serverTime;
  const seconds = (end - Date.parse(started_at || created_at)) / 1000;
  if (!started_at) {
    if (finished_at) return `created ${clock(created_at)}, never begun`;
    return `waiting for ${duration(seconds)}`;
  }
  if (!finished_at) return `began ${clock(started_at)}, for ${duration(seconds)}`;
  const lasted = seconds < 10 ? `${seconds} s` : duration(seconds);  // 0.012 s, to be exact
  return `began ${clock(started_at)}, took ${lasted}`;
}

const swedish = new Intl.DateTimeFormat("sv", {dateStyle: "short", timeStyle: "medium"});

// Returns 14:03:22, or 2026-11-27 14:03:22 if it was on another day: so it is written in Sweden.
function clock(moment) {
  const [day, time] = swedish.format(Date.parse(moment)).split(" ");
  const [today] = swedish.format(serverTime).split(" ");
  return day === today ? time : `${day} ${time}`;
}

function duration(seconds) {  // 12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h
  if (seconds < 60) return `${Math.floor(Math.max(0, seconds))} s`;
  const units = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
  const [big, bigName, small, smallName] = units.find(([size]) => size <= seconds);
  const rest = Math.floor(seconds % big / small);
  return `${Math.floor(seconds / big)} ${bigName} ${rest} ${smallName}`;
}

// -- What has ended is said politely, and of eighty at once in one sentence --

let ended = [];     // records
let quietUntil = 0;

function sayWhatEnded() {
  if (ended.length === 0 || performance.now() < quietUntil) return;
  const those = (status) => ended.filter((record) => record.status === status);
  say(sentence("Completed", those("completed")) + sentence("Failed", those("failed")));
  ended = [];
  quietUntil = performance.now() + 5000;
}

function sentence(verb, tasks) {
  if (tasks.length === 0) return "";
  const names = tasks.slice(0, 3).map(({name}) => name.slice(0, 60)).join(", ");
  const others = tasks.length > 3 ? ` and ${tasks.length - 3} more` : "";
  return `${verb}: ${names}${others}. `;
}

// -- A row's buttons --

async function cancel(row) {
  const button = row.querySelector(".cancel"), note = row.querySelector(".note");
  if (isResting(button)) return;
  setResting(button, true, "Cancelling …");
  setText(note, "");
  const path = `cancel-${row.record.type}/${row.id}`;
  const {answer, error, isUnheard} = await request(path, {method: "POST"});
  if (error) {
    setResting(button, false, "Cancel");
    setText(note, isUnheard ? "No answer came. Perhaps it was cancelled; press again." : error);
    say(note.textContent);
    return;
  }
  showTask(answer, row);
  if (!answer.finished_at) {
    setResting(button, true, "Cancel asked for");
    setText(note, "It ends when its function next reports.");
    say(note.textContent);
  }
  hurry();
}

async function showOutcome(row) {
  const pre = row.querySelector("pre");
  if (row.record.error) {
    setText(pre, row.record.error);
    return;
  }
  if (row.isLoaded) return;
  const {text, error} = await request(`poll-${row.record.type}/${row.id}`);
  if (error) {
    setText(pre, error);
    return;
  }
  row.isLoaded = true;
  const {shown, isWhole} = resultIn(text);
  setText(pre, isWhole ? shown : `${shown} …`);
  if (!isWhole) offer(text, row);
}

function offer(text, row) {  // as a file
  const link = row.querySelector("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = `${row.id}.json`;
  const size = (text.length / 1048576).toFixed(1);
  setText(link, `This is the first part. Save the whole record (${size} MiB).`);
  link.hidden = false;
}

// The pieces of a JSON text: strings, brackets and punctuation, numbers and words.
const PIECES = /"(?:[^"\\]|\\.)*"?|[[\]{},:]|[^\s"[\]{},:]+/g;
const OPENING = ["[", "{"], CLOSING = ["]", "}"];

// Returns {shown, isWhole}: the result in the text of a record, indented, or its first part. It is
// not parsed and written again, because JavaScript would change numbers that are long or like 1.0.
function resultIn(text) {
  const pieces = text.slice(0, 2 * PART).match(PIECES);
  const key = pieces.findIndex((piece, i) => piece === '"result"' && pieces[i + 1] === ":");
  let shown = "", depth = 0, last = "";
  for (const piece of pieces.slice(key + 2)) {
    const closes = CLOSING.includes(piece);
    if (closes) depth -= 1;
    if (depth < 0 || depth === 0 && piece === ",") return {shown, isWhole: true};
    const wasOpened = OPENING.includes(last);  // an empty [] or {} stays on its line
    if (closes ? !wasOpened : wasOpened || last === ",") shown += "\n" + "  ".repeat(depth);
    shown += piece === ":" ? ": " : piece;
    if (OPENING.includes(piece)) depth += 1;
    if (shown.length > PART) break;
    last = piece;
  }
  return {shown: shown.slice(0, PART), isWhole: false};
}

// -- Creating --

let intention = null;  // what was sent, until it is known to be created

function payload() {  // returns {body} as it is to be sent, or {problem}
  const rest = fields.rest.value.trim() || "{}";
  try {
    const typed = JSON.parse(rest);
    if (rest[0] !== "{") throw new Error("Put braces around it.");
    if ("name" in typed) throw new Error("The name has a field of its own.");
  } catch (error) {
    return {problem: `Write JSON like {"seconds": 10}. ${error.message}`};
  }
  const members = rest.slice(1, -1).trim();  // as typed: JavaScript would change long numbers
  return {body: `{"name": ${JSON.stringify(fields.name.value)}${members && ", " + members}}`};
}

async function create() {
  const button = form.querySelector("button");
  if (isResting(button)) return;
  const {body} = payload();
  if (!body) {
    fields.rest.focus();
    return;
  }
  // The same thing sent again bears the same key, and so makes no second task.
  const path = `create-${fields.type.value}`;
  const isSame = intention && intention.path === path && intention.body === body;
  if (!isSame) intention = {path, body, key: newKey()};
  setResting(button, true, "Sending …");
  setText(byId("answer"), "");
  const headers = {"Idempotency-Key": intention.key};
  const {answer, error, isUnheard} = await request(path, {method: "POST", body, headers});
  if (!error) showCreated(answer);
  else if (intention) showNotCreated(error, isUnheard);  // otherwise the list has shown the task
  hurry();
  setTimeout(() => setResting(button, false, "Create task"), 1000);  // a double click is one
}

function showCreated({type, id}) {
  intention = null;
  setText(byId("answer"), `Created. Poll it at ${here}poll-${type}/${id}`);
  byId("answer").className = "quiet";
}

function showNotCreated(error, isUnheard) {
  setText(byId("answer"), !isUnheard ? error : "No answer came, so nobody knows whether the task "
    + "was created. Send it again: that makes no second task.");
  byId("answer").className = "wrong";
}

function showCommands() {
  const {body, problem} = payload();
  const type = fields.type.value;
  setText(byId("problem"), problem || "");
  byId("problem").hidden = !problem;
  fields.rest.setAttribute("aria-invalid", Boolean(problem));
  const isReady = Boolean(type && body) && form.checkValidity();
  byId("shells").hidden = !isReady;
  byId("no-command").hidden = isReady;
  if (!isReady) return;
  setText(byId("curl"), curlCommands(type, body));
  setText(byId("powershell"), powershellCommands(type, body));
}

function curlCommands(type, body) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const [create, poll] = [quoted(`${here}create-${type}`), quoted(`${here}poll-${type}/ID`)];
  const program = token ? 'curl -H "Authorization: Bearer $TASKSERVER_TOKEN"' : "curl";
  return `${program} -H 'Content-Type: application/json' \\
  -d ${quoted(body)} \\
  ${create}\n\n${program} ${poll}`;
}

function powershellCommands(type, body) {
  // PowerShell takes curly quotes for quotes, so they are doubled, too.
  const quoted = (text) => `'${text.replace(/['\u2018-\u201b]/g, "$&$&")}'`;
  const [create, poll] = [quoted(`${here}create-${type}`), quoted(`${here}poll-${type}/ID`)];
  const headers = token && ' -Headers @{Authorization = "Bearer $env:TASKSERVER_TOKEN"}';
  const program = `Invoke-RestMethod${headers}`;
  return `${program} -Method Post \`
  -ContentType 'application/json; charset=utf-8' \`
  -Body ${quoted(body)} \`
  ${create}\n\n${program} ${poll}`;
}

// Keeps what is typed over a reload. The browser does not, because the page must not be stored.
function keepDraft() {
  const draft = JSON.stringify([fields.name.value, fields.rest.value]);
  try { sessionStorage.setItem(here, draft); } catch {}  // it may be forbidden: then it is not kept
}

function bringDraft() {
  try {
    const draft = JSON.parse(sessionStorage.getItem(here));
    if (draft) [fields.name.value, fields.rest.value] = draft;
  } catch {}
}

// -- What happens when --

form.oninput = () => {
  keepDraft();
  setText(byId("answer"), "");
  showCommands();
};
form.onsubmit = (event) => {
  event.preventDefault();
  create();
};
byId("access").onsubmit = (event) => {
  event.preventDefault();
  token = event.target.elements.token.value;
  event.target.reset();
  hurry();
};
list.onclick = ({target}) => {
  if (target.matches(".copy")) copy(target.closest("li").id, target);
  if (target.matches(".cancel")) cancel(target.closest("li"));
};
list.addEventListener("toggle", ({target}) => {
  if (target.open) showOutcome(target.closest("li"));
}, true);  // in the capturing phase, because this event does not bubble
list.onpointerleave = placeRows;
byId("fresh").onclick = placeRows;
byId("more").onclick = () => {
  limit = Math.min(2 * limit, MOST);
  hurry();
};
for (const button of document.querySelectorAll("[data-of]")) {
  setButton(button, "Copy");
  button.onclick = () => copy(byId(button.dataset.of).textContent, button);
}
byId("again").onclick = hurry;
byId("jump").onclick = () => fields.name.focus();
onhashchange = () => {
  limit = 50;
  records = [];
  isListed = false;
  if (list.contains(document.activeElement)) focusOn(byId("tasks-title"));
  list.replaceChildren();
  showFilters();
  showAmount();
  hurry();
};
document.onvisibilitychange = () => {
  if (!document.hidden) hurry();
};

bringDraft();
byId("commands").open = innerWidth > 900;
setText(byId("connection"), "Connecting …");
document.querySelector("main").hidden = false;  // without scripts it would be of no use
watch();
</script>"""


def add_pages(application: Application) -> None:
    """Add GET / for people and GET /openapi.json for programs."""
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of('script')}",
            f"style-src {_hash_of('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )
    headers = (("Content-Security-Policy", policy),)
    page = Response(200, PAGE.encode(), headers, "text/html; charset=utf-8")

    # Its arguments are not used. They are the key of the cache, so that it is made anew when a
    # route was added, or access was changed.
    @functools.lru_cache(maxsize=1)
    def document(route_count: int, is_secured: bool) -> bytes:
        return json.dumps(openapi(application)).encode()

    def describe_all(request: Request) -> Response:
        return Response(200, document(len(application.router.routes), application.secured))

    application.router.add(
        "GET",
        "/",
        lambda request: page,
        blocks=never_blocks,
        waived=(401,),  # it asks for the token itself
        summary="Show the live page",
        details="For people: it lists tasks, creates and cancels them.",
        operation="page",
        media_type="text/html",
    )
    application.router.add(
        "GET",
        "/openapi.json",
        describe_all,
        summary="Describe all endpoints",
        details="For programs: this description.",
        operation="describe",
        answer="Description",
    )


def _hash_of(tag: str) -> str:
    """Return what a Content-Security-Policy says of the one script or style of the page."""
    text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


# -- 14. Demo and command line ---------------------------------------------------------------------


def wait_for_seconds(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Wait, as if for a network: for "seconds", from 0 to 3600, 5 if they are not given."""
    seconds = payload.get("seconds", 5)
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not 0 <= seconds <= 3600:
        raise ValueError('"seconds" must be a number from 0 to 3600')
    steps = min(100, math.ceil(seconds))
    report(0, f"0 of {seconds:g} seconds")
    for step in range(1, steps + 1):
        time.sleep(seconds / steps)
        report(step / steps, f"{seconds * step / steps:g} of {seconds:g} seconds")
    return {"seconds": seconds}


def primes(payload: dict[str, Any], report: Report) -> dict[str, int]:
    """Count the primes below "limit", at most 100,000,000, by trial division.

    400,000, the limit if none is given, take about a second.
    """
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
    # Without "default", because with one some generated clients make the member mandatory.
    seconds = {"type": "number", "minimum": 0, "maximum": 3600}
    limit = {"type": "integer", "minimum": 0, "maximum": 100_000_000}
    application.task("task", payload={"seconds": seconds})(wait_for_seconds)
    application.task("primes", cpu=True, payload={"limit": limit})(primes)
    return application


# A certificate of localhost and its key, for --self-check alone. Everybody has them: no secret. It
# is valid from 1980 on, because a machine without a network may have a clock that is wrong.
SELF_CHECK_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBrjCCAVSgAwIBAgIUBXkMOeloCu1Wwms9zrJEpk1MeD8wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTgwMDEwMTAwMDAwMFoYDzIxMjYwMTAx
MDAwMDAwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR1Shtt+dUHqIBzsR8TUA4rx8mweGnz9dhCt6uLIfqUee6Z4KNxp/6H
Vk0qM6MpTmAr/tP7YiRmUIAISozLItVTo4GBMH8wHQYDVR0OBBYEFPh0VpvBGzRm
W/BeQZRBwFH6D6ryMB8GA1UdIwQYMBaAFPh0VpvBGzRmW/BeQZRBwFH6D6ryMA8G
A1UdEwEB/wQFMAMBAf8wLAYDVR0RBCUwI4IJbG9jYWxob3N0hwR/AAABhxAAAAAA
AAAAAAAAAAAAAAABMAoGCCqGSM49BAMCA0gAMEUCIA2XKIUlaBnTjy7pYEEFaiSM
aQWvRzPZsHVThALdZtXtAiEA+6McXlSk4tnEYgiNSzZgEqiIKklb68FnPj+QU8Wl
tcs=
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgM2drNZG9We3kBnvh
wLeMubA7HT9hZvrg2q3hjH71aSihRANCAAR1Shtt+dUHqIBzsR8TUA4rx8mweGnz
9dhCt6uLIfqUee6Z4KNxp/6HVk0qM6MpTmAr/tP7YiRmUIAISozLItVT
-----END PRIVATE KEY-----
"""


class NotHere(Exception):
    """What a self-check cannot try, because this Python was built without it."""


def self_check() -> int:
    """Try everything for real, with the demo; print a line for each; return an exit status."""
    print(f"taskserver {__version__}, Python {sys.version.split()[0]} on {sys.platform}")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("a task in a thread", functools.partial(_check_task, "task", {"seconds": 0.1})),
        ("a coroutine", functools.partial(_check_task, "nap", {})),
        ("a child process", functools.partial(_check_task, "primes", {"limit": 10_000})),
        ("a journal (--db)", _check_journal),
        ("TLS (--tls-cert)", _check_tls),
    ]
    status = 0
    for name, check in checks:
        begun = time.monotonic()
        try:
            seen = check()
        except NotHere as reason:
            seen = f"not here, {reason}"
        except Exception as error:
            seen = f"FAILED, {describe(error)}"
            status = 1
        print(f"  {name}: {seen} ({time.monotonic() - begun:.2f} seconds)")
    print("something does not work here" if status else "all that is here works")
    return status


@contextlib.contextmanager
def _serving(tls: ssl.SSLContext | None = None) -> Generator[int, None, None]:
    """Serve the demo and a coroutine on a free port; yield the port."""
    application = demo()

    @application.task("nap")
    async def nap(payload: dict[str, Any], report: Report) -> dict[str, Any]:
        import asyncio

        await asyncio.sleep(0.1)
        return {"seconds": 0.1}

    add_monitoring(application)
    server = Server(("127.0.0.1", 0), application, tls)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        application.stop()
        application.children.kill()


def _check_task(type_name: str, payload: dict[str, Any]) -> str:
    """Create a task, poll it to its end, and return what became of it."""
    with _serving() as port:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

        def ask(*request: Any) -> Any:
            client.request(*request)
            return json.loads(client.getresponse().read())

        body = json.dumps({"name": "self-check", **payload})
        record = ask("POST", f"/create-{type_name}", body, {"Content-Type": "application/json"})
        while record.get("status") == PENDING:
            record = ask("GET", f"/poll-{type_name}/{record['id']}?wait=30")
        client.close()
    if record.get("status") != COMPLETED:
        raise ValueError(record.get("error"))
    return f"completed with the result {json.dumps(record['result'])}"


def _check_journal() -> str:
    """Write a record into a new journal, close it, and read it from there."""
    if importlib.util.find_spec("_sqlite3") is None:
        raise NotHere("this Python has no sqlite3")
    record = Record(new_id(), "self-check", PENDING, "task", time.time(), sequence=1)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "self-check.db")
        journal = SQLiteJournal(path)
        journal.save(record)
        journal.close()
        journal = SQLiteJournal(path)
        loaded = list(journal.load())
        journal.close()
    if loaded != [record]:
        raise ValueError(f"it was written, but what it holds is {loaded}")
    return "written, closed, and read again"


def _check_tls() -> str:
    """Shake hands with a server over TLS, ask it how it is, and return what was agreed upon."""
    if ssl is None:
        raise NotHere("this Python has no ssl")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "self-check.pem")
        with open(path, "w", encoding="ascii") as file:
            file.write(SELF_CHECK_PEM)
        server_context = tls_context(path, path)
        client_context = ssl.create_default_context(cafile=path)
    with _serving(server_context) as port:
        client = http.client.HTTPSConnection("localhost", port, timeout=60, context=client_context)
        client.request("GET", "/healthz")
        secured: Any = client.sock
        version, cipher = secured.version(), secured.cipher()[0]
        answer = json.loads(client.getresponse().read())
        client.close()
    if answer.get("status") != "ok":
        raise ValueError(f"the server answered {answer}")
    return f"{version} with {cipher}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def _whole_number(low: int, high: float = 1e9) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,20}", text) or not low <= int(text) <= high:
            sentence = f"{text} is no whole number from {low} to {high:g}"
            raise argparse.ArgumentTypeError(sentence)
        return int(text)

    return convert


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or float(text) > 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 1e+09")
    return float(text)


def _host_name(text: str) -> str:
    if not re.fullmatch("[0-9A-Za-z._-]+", text) and parse_address(text) is None:
        sentence = f"{text} is no host name; give the name alone, such as tasks.example"
        raise argparse.ArgumentTypeError(sentence)
    return text


def _parse_options(argv: list[str] | None, application: Application) -> argparse.Namespace:
    """Return the options; what is not given is as the application has it."""
    store, pool, cpu_pool = application.store, application.pool, application.cpu_pool
    parser = _Parser(
        prog="taskserver", allow_abbrev=False, description="An HTTP server for long work."
    )

    def add(option: str, convert: Any, default: Any, value: str, text: str) -> None:
        parser.add_argument(option, type=convert, default=default, metavar=value, help=text)

    add("--host", str, "127.0.0.1", "ADDRESS", "listen on this address (%(default)s)")
    port = _whole_number(0, 65535)
    add("--port", port, 8000, "PORT", "listen on this port, 0 for a free one (%(default)s)")
    count = _whole_number(1)
    text = "run so many tasks at once in threads, and so many coroutines (%(default)s)"
    add("--workers", count, pool.max_workers, "N", text)
    text = "let so many tasks compute at once (%(default)s)"
    add("--cpu-workers", count, cpu_pool.max_workers, "N", text)
    text = "let so many wait for a worker (%(default)s)"
    add("--max-waiting", _whole_number(0, math.inf), pool.max_waiting, "N", text)
    text = "hold so many tasks, final ones included (%(default)s)"
    add("--max-tasks", count, store.max_tasks, "N", text)
    text = f"hold payloads and results of so many MiB ({store.max_memory / (1 << 20):g})"
    add("--max-memory", count, None, "MIB", text)
    text = "how long a final task can be polled (%(default)s)"
    add("--keep", _seconds, store.keep, "SECONDS", text)
    add("--db", str, None, "FILE", "keep tasks in this SQLite file, beyond this process")
    text = "how long running tasks may go on when the server stops (%(default)s)"
    add("--grace", _seconds, 10, "SECONDS", text)
    add("--tls-cert", str, None, "FILE", "speak HTTPS with this certificate chain (PEM)")
    add("--tls-key", str, None, "FILE", "and this private key (PEM)")
    text = "a name that clients may use"
    parser.add_argument(
        "--allow-host", type=_host_name, action="append", default=[], metavar="NAME", help=text
    )
    for flag, text in (
        ("--allow-anonymous", "serve other machines without a token"),
        ("--verbose", "log each request"),
        ("--quiet", "leave the two lines for each task out of the log"),
        ("--self-check", "try out what works here, and exit"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--version", action="version", version=f"taskserver {__version__}")
    options = parser.parse_args(argv)
    if (options.tls_cert is None) != (options.tls_key is None):
        parser.error("give --tls-cert and --tls-key together")
    return options


def _switch_interval(workers: int) -> float:
    """Return for how many seconds a thread that computes may keep the interpreter.

    It goes to sys.setswitchinterval. A shorter interval serves clients sooner beside tasks that
    compute. But each thread that waits for the interpreter wakes once in every interval; if there
    are thousands, that alone takes all the time. So: 5 microseconds for each worker, from 0.5 to 50
    milliseconds. (Python's default is 5 milliseconds.)
    """
    return min(max(0.0005, 5e-6 * workers), 0.05)


def _fill_standard_descriptors() -> None:
    """Open the null device where stdin, stdout or stderr is closed.

    Else a socket would get that number, and what something prints would go to a client.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)  # for children


def _set_access(application: Application, options: argparse.Namespace) -> None:
    """Say who may come in. ValueError: nobody said who may."""
    token = os.environ.get("TASKSERVER_TOKEN", "")
    if not re.fullmatch("[!-~]*", token):
        raise ValueError("TASKSERVER_TOKEN must consist of visible ASCII characters")
    ip = parse_address(options.host)
    is_local = ip.is_loopback if ip is not None else options.host == "localhost"
    if not is_local and not token and not options.allow_anonymous:
        raise ValueError(
            f"other machines can reach {options.host}: set a token in TASKSERVER_TOKEN, or allow "
            "everybody in with --allow-anonymous"
        )
    if token:  # then the Host is not checked: a foreign page does not know the token
        check = token_check(token)
    else:
        check = host_check([options.host, *options.allow_host])
    application.checks.insert(0, check)
    application.secured = bool(token)


def _bind(application: Application, options: argparse.Namespace) -> Server:
    """Return a server that is bound but does not listen yet. ValueError: it cannot be so."""
    tls = None
    if options.tls_cert is not None:
        try:
            tls = tls_context(options.tls_cert, options.tls_key)
        except OSError as error:
            files = f"{options.tls_cert} and {options.tls_key}"
            raise ValueError(
                f"cannot speak TLS with {files}: {error}; give a certificate chain and the private "
                "key that belongs to it, both as PEM files"
            ) from None
    server = Server((options.host, options.port), application, tls, bind_and_activate=False)
    try:
        server.server_bind()
    except OSError as error:
        raise _cannot_listen(options, error) from None
    return server


def _cannot_listen(options: argparse.Namespace, error: OSError) -> ValueError:
    where = f"{options.host}, port {options.port}"
    reason = error.strerror or error
    return ValueError(f"cannot listen on {where}: {reason}; choose another --host or --port")


def _listen(server: Server, options: argparse.Namespace) -> None:
    try:
        server.server_activate()
    except OSError as error:
        raise _cannot_listen(options, error) from None


def _set_bounds(application: Application, options: argparse.Namespace) -> None:
    # --max-waiting is for all three pools, --workers for two of them, --cpu-workers for the third.
    for pool in application.pools:
        pool.max_workers, pool.max_waiting = options.workers, options.max_waiting
    application.cpu_pool.max_workers = options.cpu_workers
    application.coroutine_pool.grace = options.grace
    application.store.keep, application.store.max_tasks = options.keep, options.max_tasks
    if options.max_memory is not None:  # otherwise it stays as it is, to the byte
        application.store.max_memory = options.max_memory << 20


def _open_journal(application: Application, options: argparse.Namespace) -> None:
    """Open the journal and take over what it holds. ValueError, OSError: what is wrong."""
    if options.db is not None:
        if application.store.journal is not None:
            raise ValueError("this application brings a journal of its own; leave out --db")
        application.store.journal = SQLiteJournal(options.db)
    recover(application)


def _address(options: argparse.Namespace, port: int) -> str:
    # A server can listen at 0.0.0.0 or ::, that is, at all addresses; but nobody can go to these.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    if ":" in host:
        host = f"[{host}]"
    scheme = "http" if options.tls_cert is None else "https"
    return f"{scheme}://{host}:{port}"


def _first_lines(application: Application, options: argparse.Namespace, address: str) -> str:
    """Return what a person is told: the address, how to create a task, where tasks are kept."""
    token = '-H "Authorization: Bearer $TASKSERVER_TOKEN" ' if application.secured else ""
    kept = "in memory and end with this process; --db FILE keeps them"
    if application.store.journal is not None:
        kept = f"in {options.db or 'a journal'}"
    type_name = next(iter(application.types), "TYPE")
    others = ""
    if options.host in ("0.0.0.0", "::"):
        others = " and all other addresses of this machine"
    return (
        f"taskserver {__version__} on {address}{others}\n"
        f"Open it in a browser, or create a task:  curl {token}"
        f"-H 'Content-Type: application/json' -d '{{\"name\": \"sample\"}}' "
        f"{address}/create-{type_name}\n"
        f"Tasks are kept {kept}.\n"
    )


def _open_log(application: Application, options: argparse.Namespace) -> LogHandler:
    """Have what this file logs written to stderr; what others log is left alone."""
    handler = LogHandler(2)
    log.addHandler(handler)
    log.propagate = False
    log.disabled = False  # logging.config disables all loggers that it does not name
    log.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    application.log_task = _say_nothing if options.quiet else handler.put
    return handler


def _detach_log(application: Application, handler: LogHandler) -> None:
    """Log no more to stderr."""
    log.removeHandler(handler)
    application.log_task = log.info


def _say_nothing(text: str, *arguments: object) -> None:
    """Take the place of the log's lines for each task."""


def main(application: Application | None = None, argv: list[str] | None = None) -> NoReturn:
    """Run the command line for an application, or for the demo; ends with SystemExit.

    If tasks still run at the end, the process ends at once. Status 0: stopped; 1: could not start,
    or lost its journal; 2: wrong usage; 128 + its number: ended by a second signal. In a thread
    that is not the main one, signals are left alone.
    """
    # If the program was packed into one executable (by PyInstaller, say), each of its children
    # comes here, too. Then freeze_support() does the child's work, and does not return.
    multiprocessing.freeze_support()
    if multiprocessing.current_process().name == CHILD_NAME:
        sys.exit(
            "taskserver: a child process has called main(); "
            'call it under `if __name__ == "__main__":` alone'
        )
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread:  # so that Ctrl-C ends a long start at once; later it begins the stop
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    application = application or demo()
    _fill_standard_descriptors()
    make_printing_safe()
    options = _parse_options(argv, application)
    sys.setswitchinterval(_switch_interval(options.workers))
    if options.self_check:
        sys.exit(self_check())
    handler = None
    try:
        handler = _open_log(application, options)
        server, address = _start(application, options)
    except (ValueError, OSError, RuntimeError, JournalLost) as error:  # RuntimeError: no thread
        if handler is not None:
            handler.finish(1)
            _detach_log(application, handler)
        sentence = " ".join(text_of(error).splitlines())
        sys.exit(f"taskserver: {sentence}")
    log.info("serving %s", address)
    status = run_until_stopped(server, options.grace)
    is_running = any(pool.counts()[1] for pool in application.pools)
    if is_running:
        log.warning("some tasks were still running and are cut off")
    handler.finish(1)  # now, because _leave() may end the process at once
    application.store.lost = ENDING  # what still runs is left for the next start to settle
    application.children.kill()
    if is_main_thread:
        _leave(status, at_once=is_running)
    _detach_log(application, handler)  # this process goes on
    sys.exit(status)


def _start(application: Application, options: argparse.Namespace) -> tuple[Server, str]:
    """Put the parts together; return a server that listens, and its address.

    ValueError, OSError, JournalLost, RuntimeError (no thread to be had): it cannot serve.
    """
    _set_access(application, options)
    add_monitoring(application)
    add_pages(application)
    _set_bounds(application, options)
    server = _bind(application, options)
    try:
        _open_journal(application, options)
        _listen(server, options)  # not before: who connects must be answered
    except BaseException:
        server.server_close()
        raise
    address = _address(options, server.server_port)
    lines = _first_lines(application, options, address)
    # A thread writes them, because stdout may be a full pipe. The lines contain the path of --db,
    # which may not be UTF-8.
    data = lines.encode("utf-8", "backslashreplace")
    threading.Thread(target=write_all, args=(1, data), daemon=True).start()
    return server, address


def _leave(status: int, at_once: bool) -> NoReturn:
    """End the process, even if a task that hangs, or a thread that a task has left, holds it up.

    At its end, Python waits for other threads, for processes, and for what was registered with
    atexit. If that takes more than two seconds, a watchdog ends the process.
    """
    if at_once:
        os._exit(status)
    # The two seconds begin when Python begins to end. From 3.9 on, a hook tells that. It must be
    # called before the hook of executors, which waits for their threads, perhaps for ever. The hook
    # that was registered last is called first. So theirs is registered now, by an import, then
    # ours.
    importlib.import_module("concurrent.futures.thread")
    has_begun = threading.Event()
    hook: Any = getattr(threading, "_register_atexit", None)

    def watch() -> None:
        if hook is not None:
            has_begun.wait()
        else:
            threading.main_thread().join()  # before 3.9, this returns when Python begins to end
        time.sleep(2)
        os._exit(status)

    with contextlib.suppress(RuntimeError, MemoryError):  # no thread to be had
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
        if hook is not None:
            hook(has_begun.set)
    sys.exit(status)


if __name__ == "__main__":
    main()
