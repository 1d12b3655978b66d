"""Dagster's webserver, protected from other sites: `python -m kalshi_platform.orchestration.host.webserver`.

Dagster's own has no password and ignores `Origin`: any web page open in a browser that can reach it could start
and stop runs through `/graphql`. The options are `dagster-webserver`'s. Behind a proxy with another name,
DAGSTER_UI_URL gives that name.
"""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

import dagster_webserver.app
from dagster_webserver.cli import DEFAULT_WEBSERVER_HOST
from dagster_webserver.cli import main as serve
from dagster_webserver.webserver import DagsterWebserver
from starlette.middleware import Middleware

from kalshi_platform import settings
from kalshi_platform.browsers import OwnPagesOnly
from kalshi_platform.loopback import is_loopback


class Webserver(DagsterWebserver[Any, Any]):
    """Dagster's webserver: links on other sites open its front page, their own requests are refused."""

    loopback: ClassVar[bool] = True
    """Whether it listens on the loopback interface only, and so answers to no other host name."""
    address: ClassVar[str | None] = None
    """A further URL of the server: DAGSTER_UI_URL, if it is set."""

    def build_middleware(self) -> list[Middleware]:
        """Put the protection in front of Dagster's middleware."""
        ours = Middleware(OwnPagesOnly, loopback=self.loopback, links=True, address=self.address)
        return [ours, *super().build_middleware()]


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("-h", "--host", default=DEFAULT_WEBSERVER_HOST)
    Webserver.loopback = is_loopback(options.parse_known_args()[0].host)
    own = settings.current()
    if "dagster_ui_url" in own.model_fields_set:
        Webserver.address = own.dagster_ui_url
    vars(dagster_webserver.app)["DagsterWebserver"] = Webserver  # no option names another class
    serve()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
