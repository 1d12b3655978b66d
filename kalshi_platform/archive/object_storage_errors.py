"""What an object store's errors mean, and what to do about them.

The store's own words are not passed on, for they may quote what was sent. Its name of the error is.
"""

from __future__ import annotations

import re

from kalshi_platform.errors import StoreRefused, StoreUnavailable

_ERROR = re.compile(
    r"AWS Error (?P<name>\w+)(?: \(HTTP status (?P<status>\d+)\))? during (?P<act>\w+)"
    r"(?:.*?ExceptionName: (?P<exception>\w+))?",
    re.DOTALL,
)
_KEY = (
    "its key is not known there, or has expired. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and"
    " AWS_SESSION_TOKEN, for a temporary one) to those of the account, and S3_ENDPOINT_URL where it is not"
    " Amazon's"
)
_ALLOWED = (
    "the key may not do that. Allow it s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"
    " there, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a key that may"
)
_BUCKET = "there is no such bucket. Create it, or set PARQUET_DIR to one that exists"
_REGION = "the bucket is in another region. Set AWS_REGION to the bucket's"
_CLOCK = "this machine's clock is off. Turn NTP on"
_PASSING = {"NO_SUCH_UPLOAD", "NoSuchUpload"}
"""An upload in parts that has come to its end before: the answer to that was lost, or somebody aborted it."""
_REFUSALS = {
    "ACCESS_DENIED": _ALLOWED,
    "AccessDenied": _ALLOWED,
    "INVALID_ACCESS_KEY_ID": _KEY,
    "InvalidAccessKeyId": _KEY,
    "SIGNATURE_DOES_NOT_MATCH": _KEY,
    "SignatureDoesNotMatch": _KEY,
    "INVALID_CLIENT_TOKEN_ID": _KEY,
    "InvalidToken": _KEY,
    "ExpiredToken": _KEY,
    "UNRECOGNIZED_CLIENT": _KEY,
    "MISSING_AUTHENTICATION_TOKEN": _KEY,
    "INCOMPLETE_SIGNATURE": _KEY,
    "NO_SUCH_BUCKET": _BUCKET,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "REQUEST_TIME_TOO_SKEWED": _CLOCK,
    "REQUEST_EXPIRED": _CLOCK,
}


def no_such_bucket(where: str) -> StoreRefused:
    """That a bucket is not there, where the store did not say so itself."""
    return StoreRefused(f"{where}: {_BUCKET}.", name="NO_SUCH_BUCKET")


def object_store_error(where: str, error: Exception) -> StoreUnavailable | StoreRefused | None:
    """The error as a sentence; None for one that is not an object store's."""
    found = _ERROR.search(str(error))
    if found is None:
        return None
    name = found["exception"] or found["name"]
    status = int(found["status"] or 0)
    refusal = _REFUSALS.get(name) or _REFUSALS.get(found["name"])
    if refusal is None and status == 301:
        refusal = _REGION
    passing = status in {408, 429} or name in _PASSING or found["name"] in _PASSING
    if refusal is None and 400 <= status < 500 and not passing:
        refusal = f"it answers {status}. Look at what the store's own log says of it"
    if refusal is not None:
        return StoreRefused(
            f"{where}: the object store refuses {found['act']} ({name}): {refusal}.", name=name
        )
    return StoreUnavailable(
        f"{where}: the object store cannot be had ({name}{f' {status}' if status else ''} during"
        f" {found['act']}). See that it runs and that"
        " the network reaches it; what goes there is taken up again by itself.",
        name=name,
    )
