"""What an object store answers when it does not do what it was asked, and whether asking again can help.

Full jitter between tries, and a budget of time rather than of tries: a store that throttles for ten minutes slows a run
and does not end it. The library's own retries are off for single requests, since they would hide from `uploads` that
the store is throttling. The trade-off: failures are told apart by the text of the library's message, which is all that
it gives; text that is not known is not tried again.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from typing import Final, Literal, TypeVar

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from distill_pipe.errors import DistillPipeError, StorageFullError, StoreAccessError, StoreError, UsageError
from distill_pipe.store.uploads import UPLOADS

BUDGET_SECONDS: Final = 900.0
# A store that never answered is more likely a wrong address than a broken one.
FIRST_SECONDS: Final = 30.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0
_TOLD_AFTER_SECONDS = 10.0
Answer = TypeVar("Answer")
Class = Literal["throttled", "passing", "access", "usage", "full", "unknown"]

# The first class with a word that is found decides. Words are codes of S3; `code: 503` is any store's HTTP status.
_CLASSES: Final[dict[Class, tuple[str, ...]]] = {
    "usage": ("NoSuchBucket", "ContainerNotFound", "bucket does not exist", "PermanentRedirect", "InvalidBucketName",
              "AuthorizationHeaderMalformed", "incorrectly configured region", "Missing region", "builder error",
              "URL error", "must be specified", r"code: 30[1278]"),
    "full": ("QuotaExceeded", "InsufficientStorage", "code: 507"),
    "access": (r"169\.254\.169\.254", r"metadata\.google\.internal", "ExpiredToken", "InvalidToken", "credential",
               "TokenRefreshRequired", "RequestTimeTooSkewed", r"code: 40[137]"),
    "throttled": ("SlowDown", "Throttl", "RequestLimitExceeded", "TooManyRequests", "ServerBusy", "code: 429",
                  "code: 503"),
    "passing": ("RequestTimeout", "BadDigest", "ContentSHA256Mismatch", "OperationAborted", r"code: 5\d\d",
                r"code: 40[89]", "HTTP error", "response body", "timed out", "[Cc]onnection"),
}
_WITHOUT_TLS: Final = "_ALLOW_HTTP=true for one without TLS)"
# What a user sets to say where a store is, and who asks; by the first letter of the address's scheme.
_SETTINGS: Final = {
    "s": (f"the bucket's name, its region (AWS_REGION) and the endpoint (AWS_ENDPOINT_URL, with AWS{_WITHOUT_TLS}",
          "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "g": (f"the bucket's name, and the endpoint (GOOGLE_BASE_URL, with GOOGLE{_WITHOUT_TLS}",
          "GOOGLE_SERVICE_ACCOUNT"),
    "a": (f"the names of container and account and the endpoint (AZURE_STORAGE_ENDPOINT, with AZURE{_WITHOUT_TLS}",
          "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY")}
_log = logging.getLogger(__name__)


class UnsettledError(Exception):
    """A request that the store refused for one that is not finished yet; what became of it is not known."""


def patiently(call: Callable[[], Answer], where: str, seconds: float) -> Answer:
    """What `call` returns, asked again for up to `seconds` while its failures may pass.

    Raises:
        UsageError: the address is wrong: no such bucket, another region, no such host.
        StoreAccessError: the store refuses our credentials, or there are none.
        StorageFullError: a quota is used up.
        StoreError: it failed until the time was over, or in a way that is not known to pass.
    """
    started, pause, told = time.monotonic(), _FIRST_PAUSE, False
    while True:
        try:
            return call()
        except (BaseError, UnsettledError) as error:
            kind = _class_of(error)
            waited = time.monotonic() - started
            if kind not in ("throttled", "passing") or waited > seconds:
                raise _explained(kind, where, error, waited) from error
            if kind == "throttled":
                UPLOADS.throttled()
            if waited > _TOLD_AFTER_SECONDS and not told:
                told = True
                _log.warning("%s: %s; trying again for up to %.0f s", where, _short(error), seconds - waited)
        # Not a secret: the randomness keeps many workers from asking at the same moment.
        time.sleep(random.uniform(0, pause))  # noqa: S311
        pause = min(2 * pause, _LONGEST_PAUSE)


def _class_of(error: Exception) -> Class:
    if isinstance(error, UnsettledError):
        return "passing"
    text = _told(error)
    for kind, words in _CLASSES.items():
        if re.search("|".join(words), text):
            return kind
    return "access" if isinstance(error, (PermissionDeniedError, UnauthenticatedError)) else "unknown"


def _explained(kind: Class, where: str, error: Exception, waited: float) -> DistillPipeError:
    short = _short(error)
    place, credentials = _SETTINGS.get(where[0], _SETTINGS["s"])
    if kind == "usage":
        return UsageError(f"{where}: {short}; check {place}")
    if kind == "access":
        return StoreAccessError(f"{where}: {short}; give credentials that may read, write and list there "
                                f"({credentials}), then run the same command again")
    if kind == "full":
        return StorageFullError(f"{where}: {short}; free some room or raise the quota, then run the same command again")
    after = f" after {waited:.0f} s" if waited > 1 else ""
    return StoreError(f"{where}: {short}{after}; what is committed is safe, and the same command continues")


def _short(error: Exception) -> str:
    """The store's own code and words, where it gave any; never the headers or the address of a request."""
    text = _told(error)
    code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
    if code is not None:
        # Azure's words go on with lines for its own people.
        lines = message[1].strip().splitlines() if message is not None else []
        return code[1] + (f" ({lines[0].rstrip('.')})" if lines else "")
    if "169.254.169.254" in text or "metadata.google.internal" in text:
        return "there are no credentials"
    status = re.search(r"status code: (\d+ [\w -]*\w)", text)
    return status[1] if status else " ".join(text.rpartition(" - ")[2].split())[:200]


def _told(error: Exception) -> str:
    return str(error).partition("Debug source")[0]
