"""Opens the archive that the settings name. What an archive does belongs in `interface`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs
from pydantic import SecretStr

from kalshi_platform.archive.interface import Archive
from kalshi_platform.archive.local import LocalArchive
from kalshi_platform.archive.object_storage import ObjectArchive
from kalshi_platform.settings import Settings, load


def open_archive(settings: Settings) -> Archive:
    """Open the archive that PARQUET_DIR names, to write or to read.

    Args:
        settings: Where the archive is and, for one on object storage, how to sign requests.

    Returns:
        The archive. It need not exist yet, and nothing is asked of it here.
    """
    base = settings.archive_base
    if base is None:
        return LocalArchive(settings.archive_dir)
    return ObjectArchive(base, _object_store(settings), settings.archive_dir)


def archive_at(location: str | Path) -> Archive:
    """Open an archive that is to be read.

    Args:
        location: A folder, or s3://bucket/prefix of the object store of the settings. A relative folder begins at the
            current one, as a person types it.

    Returns:
        The archive. Nothing is asked of it here: an archive that does not exist has no hours.

    Raises:
        SettingsError: `location` is neither a folder nor s3://bucket/prefix.
    """
    is_folder = "://" not in str(location)
    other = load(parquet_dir=Path(location).expanduser().absolute() if is_folder else location)
    if other.archive_base is None:
        return LocalArchive(other.archive_dir)
    return ObjectArchive(other.archive_base, _object_store(other), other.archive_dir / ".elsewhere")


def _object_store(settings: Settings) -> fs.FileSystem:
    """The object store's file system. Unset options are resolved as Amazon's own tools do."""

    def plain(secret: SecretStr | None) -> str | None:
        return secret.get_secret_value() if secret else None

    endpoint = urlsplit(settings.s3_endpoint_url) if settings.s3_endpoint_url else None
    return fs.S3FileSystem(
        access_key=plain(settings.aws_access_key_id),
        secret_key=plain(settings.aws_secret_access_key),
        session_token=plain(settings.aws_session_token),
        region=settings.aws_region,
        scheme=endpoint.scheme if endpoint else None,
        endpoint_override=endpoint.netloc + endpoint.path.rstrip("/") if endpoint else None,
        # At exit a process waits for pending requests, 3 s per attempt; the loader itself retries forever.
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        allow_delayed_open=True,  # a small file is one request
        # With foreground writes, releasing the stream of a failed upload completes it without the failed part.
        background_writes=True,
    )
