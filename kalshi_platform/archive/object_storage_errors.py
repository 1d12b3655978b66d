"""Translates an object store's errors into the platform's, with a remedy.

The store's own message is not passed on, because it may quote what was sent; the error's name is.
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
_TRANSIENT = {"NO_SUCH_UPLOAD", "NoSuchUpload"}
"""A multipart upload that was completed or aborted before: the earlier response was lost."""
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
    """The error for a missing bucket, where the store did not report it itself."""
    return StoreRefused(f"{where}: {_BUCKET}.", name="NO_SUCH_BUCKET")


def object_store_error(where: str, error: Exception) -> StoreUnavailable | StoreRefused | None:
    """Translate an error of the object store; None for an error of another origin."""
    match = _ERROR.search(str(error))
    if match is None:
        return None
    name = match["exception"] or match["name"]
    status = int(match["status"] or 0)
    refusal = _REFUSALS.get(name) or _REFUSALS.get(match["name"])
    if refusal is None and status == 301:
        refusal = _REGION
    transient = status in {408, 429} or name in _TRANSIENT or match["name"] in _TRANSIENT
    if refusal is None and 400 <= status < 500 and not transient:
        refusal = f"it answers {status}. Check the store's own log"
    if refusal is not None:
        return StoreRefused(
            f"{where}: the object store refuses {match['act']} ({name}): {refusal}.", name=name
        )
    return StoreUnavailable(
        f"{where}: the object store cannot be reached ({name}{f' {status}' if status else ''} during"
        f" {match['act']}). Check that it runs and that the network reaches it; writing resumes by itself.",
        name=name,
    )
