"""Dagster's webserver, closed to other sites' pages: `python -m kalshi_platform.orchestration.webserver`.

Dagster's own asks for no password and looks at no `Origin`: any page open in the browser of somebody
on this machine could start and end runs through `/graphql`. The options are `dagster-webserver`'s.
"""

from __future__ import annotations

from typing import Any

import dagster_webserver.app
from dagster_webserver.cli import main as serve
from dagster_webserver.webserver import DagsterWebserver
from starlette.middleware import Middleware

from kalshi_platform.browsers import OwnPagesOnly


class Webserver(DagsterWebserver[Any, Any]):
    """For the loopback interface. Links on other sites may open its pages."""

    def build_middleware(self) -> list[Middleware]:
        """Dagster's, behind ours."""
        return [Middleware(OwnPagesOnly, links=True), *super().build_middleware()]


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    vars(dagster_webserver.app)["DagsterWebserver"] = Webserver  # no option names another class
    serve()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
