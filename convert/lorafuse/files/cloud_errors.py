"""What an object store's errors mean, in words; nothing of a request that could hold a secret is repeated."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lorafuse.errors import LorafuseError, StorageError, UsageError, shown

INSTALL = "object storage needs `pip install 'lorafuse[cloud]'`"
# Where a machine in a cloud asks for credentials, when no other are found.
METADATA = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
_CODE = re.compile(r"<Code>([A-Za-z]+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_ENDPOINT = re.compile(r"(https?://)(?:[^/\s]*@)?([^/\s]+)")  # without a user
_REGION = re.compile(r"expecting '([a-z0-9-]+)'|<Region>([a-z0-9-]+)</Region>")
_TIMES = re.compile(r"after (\d+) retries")
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "NoSuchContainer")
OTHER_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
# Code of S3 → what it means.
REFUSED = {
    "InvalidAccessKeyId": "the store does not know the access key",
    "SignatureDoesNotMatch": "the secret key is not that of the access key",
    "ExpiredToken": "the credentials have expired",
    "InvalidToken": "the session token is not valid",
    "RequestTimeTooSkewed": "this machine's clock is off by more than the store allows; set it",
}


def is_broken(error: Exception) -> bool:
    """Whether the connection broke within an answer, which obstore does not ask for again."""
    return "body error" in str(error)


class NoConditionsError(Exception):
    """The store does not know calls that hold under a condition; never shown to a user."""


def is_unmet(error: Exception) -> bool:
    """Whether the condition of a call did not hold: an object is there already, or is another one by now. By
    name, since obstore is imported when the first URL asks for it."""
    return type(error).__name__ in ("AlreadyExistsError", "PreconditionError")


@contextmanager
def asking(label: str, root: str) -> Iterator[None]:
    """Turns what obstore raises about `label`, in the bucket `root`, into a FileNotFoundError or a
    StorageError that says what happened. Where a condition of the call did not hold, its error passes."""
    try:
        yield
    except (LorafuseError, MemoryError):
        raise
    except FileNotFoundError as e:
        if _code_of(str(e)) in NO_BUCKET:
            raise explained(e, label, root) from None
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), label) from None
    except Exception as e:
        if is_unmet(e):
            raise
        raise explained(e, label, root) from None


def not_installed(url: str) -> UsageError:
    """Without obstore there are no object stores."""
    return UsageError(f"{shown(url)}: {INSTALL}.")


def unusable(error: Exception, root: str) -> UsageError:
    """What obstore says of settings, before it asks the store."""
    return UsageError(
        f"{shown(root)}: the settings of the store cannot be used: {_first_line(str(error))} "
        "(docs/object-storage.md)."
    )


def explained(error: Exception, label: str, root: str) -> StorageError:
    """An error of obstore as an own one."""
    text = str(error)
    code, status, said = _code_of(text), _number(_STATUS, text), _first_line(text)
    endpoint = "".join(next(iter(_ENDPOINT.findall(text)), ("the endpoint",)))
    if any(host in text for host in METADATA) or "Account must be specified" in text:
        what = "no credentials were found; set those that the cloud's own tools read (docs/object-storage.md)"
    elif code in NO_BUCKET:
        return StorageError(f"{shown(root)}: there is no such bucket.")
    elif code in OTHER_REGION or "without LOCATION" in text:
        region = _REGION.search(text)
        name = f" ({region[1] or region[2]})" if region else ""
        what = f"the bucket is in another region{name}; set AWS_REGION to it"
    elif code in REFUSED:
        what = REFUSED[code]
    elif status in (401, 403):
        what = f"the store refuses access ({code or status}); your credentials lack a permission"
    elif status:
        times = _number(_TIMES, text)
        what = f"the store answered {status}{f' {code}' if code else ''}"
        what += f", {times + 1} times; try again later" if times else ""
    elif "HTTP error" in text or "error sending request" in text:
        what = f"the store at {endpoint} cannot be reached, or the connection broke: {said}"
    else:
        what = f"the store's answer cannot be used: {said}"
    return StorageError(f"{shown(label)}: {what}.")


def _code_of(text: str) -> str:
    found = _CODE.search(text)
    return found[1] if found else ""


def _number(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    return int(found[1]) if found else 0


def _first_line(text: str) -> str:
    """What obstore says first, without the answer's body and without a request's URL."""
    line = next(iter(text.splitlines()), "").rpartition(" - ")[2].partition("<")[0]
    return shown(re.sub(r"https?://\S+|(?<=Url: )[^,]*", "…", line).strip().rstrip(".:")) or "nothing is said"
