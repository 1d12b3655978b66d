"""Dagster's webserver, closed to other sites' pages: `python -m kalshi_platform.orchestration.webserver`.

Dagster's own asks for no password and looks at no `Origin`: any page open in the browser of somebody
who can reach it could start and end runs through `/graphql`. The options are `dagster-webserver`'s.
"""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

import dagster_webserver.app
from dagster_webserver.cli import DEFAULT_WEBSERVER_HOST
from dagster_webserver.cli import main as serve
from dagster_webserver.webserver import DagsterWebserver
from starlette.middleware import Middleware

from kalshi_platform.browsers import OwnPagesOnly
from kalshi_platform.loopback import is_loopback


class Webserver(DagsterWebserver[Any, Any]):
    """Links on other sites may open its pages; those sites' own requests are refused."""

    loopback: ClassVar[bool] = True
    """It listens on that interface alone, and so answers to no other name."""

    def build_middleware(self) -> list[Middleware]:
        """Dagster's, behind ours."""
        ours = Middleware(OwnPagesOnly, loopback=self.loopback, links=True)
        return [ours, *super().build_middleware()]


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("-h", "--host", default=DEFAULT_WEBSERVER_HOST)
    Webserver.loopback = is_loopback(options.parse_known_args()[0].host)
    vars(dagster_webserver.app)["DagsterWebserver"] = Webserver  # no option names another class
    serve()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
