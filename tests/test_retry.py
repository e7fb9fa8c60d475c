"""Which answers of a store are worth another try, how many uploads go at once, and reads that run ahead.

Catches a wrong key that is tried for a quarter of an hour, a busy store that ends a run, a gate that closes for ever,
answers out of order, and threads that go on after an error.
"""

import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError

from distill_pipe.errors import DistillPipeError, StorageFullError, StoreAccessError, StoreError, UsageError
from distill_pipe.store import retry
from distill_pipe.store.ahead import ahead
from distill_pipe.store.retry import UnsettledError, patiently
from distill_pipe.store.uploads import MOST, UploadGate


def answer(status: str, code: str = "") -> GenericError:
    """An error as the library words it."""
    words = "The words of the store.\nRequestId:0123456789"
    body = f": <Error><Code>{code}</Code><Message>{words}</Message></Error>" if code else ""
    return GenericError("Generic S3 error: Error performing PUT http://host/b/x?X-Amz-Signature=0123456789 in 3ms - "
                        f"Server returned non-2xx status code: {status}{body}\n\n"
                        "Debug source:\nGeneric { status: 503, SlowDown }")


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.0)


@pytest.mark.parametrize("error", [
    answer("503 Service Unavailable", "SlowDown"), answer("429 Too Many Requests"), answer("500 Internal Server Error"),
    answer("502 Bad Gateway"), answer("400 Bad Request", "RequestTimeout"), answer("400 Bad Request", "BadDigest"),
    answer("409 Conflict", "OperationAborted"), answer("408 Request Timeout"),
    GenericError("Generic S3 error: Error performing GET http://h/x in 1s - HTTP error: error sending request"),
    GenericError("Generic S3 error: HTTP error: request or response body error"), UnsettledError("half a body")])
def test_what_may_pass_is_tried_again(error: Exception, no_pause: None) -> None:
    left = [error, error]

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    assert patiently(call, "s3://b/x", 60) == "done"


@pytest.mark.parametrize(("error", "kind", "text"), [
    (answer("403 Forbidden", "AccessDenied"), StoreAccessError, "AccessDenied (The words of the store)"),
    (answer("401 Unauthorized"), StoreAccessError, "401 Unauthorized"),
    (answer("400 Bad Request", "ExpiredToken"), StoreAccessError, "ExpiredToken"),
    (PermissionDeniedError("The operation lacked the necessary privileges"), StoreAccessError, "give credentials"),
    (GenericError("Error performing PUT http://169.254.169.254/latest/api/token in 1s - HTTP error: x"),
     StoreAccessError, "there are no credentials"),
    (answer("404 Not Found", "NoSuchBucket"), UsageError, "NoSuchBucket"),
    (answer("301 Moved Permanently", "PermanentRedirect"), UsageError, "AWS_REGION"),
    (answer("400 Bad Request", "AuthorizationHeaderMalformed"), UsageError, "AWS_REGION"),
    (answer("403 Forbidden", "QuotaExceeded"), StorageFullError, "QuotaExceeded"),
    (answer("507 Insufficient Storage"), StorageFullError, "raise the quota"),
    (answer("400 Bad Request", "MalformedXML"), StoreError, "MalformedXML"),
    (BaseError("something new"), StoreError, "something new")])
def test_what_cannot_pass_ends_at_once_in_one_line(error: Exception, kind: type[DistillPipeError], text: str) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(kind) as caught:
        patiently(call, "s3://b/x", 60)
    assert len(calls) == 1
    assert str(caught.value).startswith("s3://b/x: ")
    assert text in str(caught.value)
    for absent in ("\n", "0123456789", "Debug"):
        assert absent not in str(caught.value)


@pytest.mark.parametrize(("address", "name"), [("s3://b/x", "AWS_"), ("gs://b/x", "GOOGLE_"), ("az://c/x", "AZURE_")])
@pytest.mark.parametrize("failure", [answer("404 Not Found", "NoSuchBucket"), answer("403 Forbidden", "AccessDenied")])
def test_advice_names_the_settings_of_the_store_that_was_asked(address: str, name: str, failure: Exception) -> None:
    def call() -> None:
        raise failure

    with pytest.raises(DistillPipeError) as caught:
        patiently(call, address, 60)
    assert [vendor for vendor in ("AWS_", "GOOGLE_", "AZURE_") if vendor in str(caught.value)] == [name]


def test_patience_ends_with_its_time(no_pause: None) -> None:
    started = time.monotonic()

    def call() -> None:
        raise answer("503 Service Unavailable", "SlowDown")

    with pytest.raises(StoreError, match="what is committed is safe"):
        patiently(call, "s3://b/x", 0.2)
    assert time.monotonic() - started >= 0.2


@given(st.lists(st.booleans(), max_size=60))
def test_the_gate_stays_open_and_within_its_bounds(refusals: list[bool]) -> None:
    gate = UploadGate()
    for refused in refusals:
        before = gate.limit
        if refused:
            gate.throttled()
            assert gate.limit == max(before // 2, 1)
        else:
            with gate.slot():
                pass
            assert gate.limit == min(before + 1, MOST)
    assert 1 <= gate.limit <= MOST


def test_no_more_uploads_are_in_flight_than_the_gate_allows() -> None:
    gate, busy, seen = UploadGate(), [0], []
    gate.limit = 1
    lock = threading.Lock()

    def upload() -> None:
        with gate.slot():
            with lock:
                busy[0] += 1
                seen.append(busy[0] <= max(gate.limit, 1))
            time.sleep(random.uniform(0, 0.002))
            with lock:
                busy[0] -= 1

    threads = [threading.Thread(target=upload) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen)
    assert (len(seen), busy[0]) == (40, 0)


def test_an_upload_that_fails_gives_its_place_back() -> None:
    gate = UploadGate()
    gate.limit = 1
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), gate.slot():
            raise ZeroDivisionError
    assert gate.limit == 1
    with gate.slot():
        pass


def test_reads_run_ahead_and_are_answered_in_order() -> None:
    running, most, lock = [0], [0], threading.Lock()

    def read(item: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(random.uniform(0, 0.003))
        with lock:
            running[0] -= 1
        return item * item

    assert list(ahead(read, range(100), 5)) == [i * i for i in range(100)]
    assert 1 < most[0] <= 5


def test_an_error_ends_the_reads_behind_it() -> None:
    started: list[int] = []
    before = set(threading.enumerate())

    def read(item: int) -> int:
        started.append(item)
        if item == 3:
            raise ValueError("item 3")
        return item

    found = []
    with pytest.raises(ValueError, match="item 3"):
        found.extend(ahead(read, range(1000), 4))
    assert max(started) < 12
    assert set(threading.enumerate()) <= before
