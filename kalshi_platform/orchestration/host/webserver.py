"""Dagster's webserver, closed to other sites' pages: `python -m kalshi_platform.orchestration.host.webserver`.

Dagster's own asks for no password and looks at no `Origin`: any page that is open in a browser which can
reach it could start and end runs through `/graphql`. The options are `dagster-webserver`'s. Behind a proxy
that people reach by another name, DAGSTER_UI_URL says that name.
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
    """Links on other sites may open its pages; those sites' own requests are refused."""

    loopback: ClassVar[bool] = True
    """It listens on that interface alone, and so answers to no other name."""
    address: ClassVar[str | None] = None
    """Where people reach it besides: DAGSTER_UI_URL, where that is set."""

    def build_middleware(self) -> list[Middleware]:
        """Dagster's, behind ours."""
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
