"""Dagster's webserver, closed to other sites' pages: `python -m kalshi_platform.orchestration.webserver`.

Dagster's own asks for no password and looks at no `Origin`: any page open in the browser of somebody
on this machine could start and end runs through `/graphql`. The options are `dagster-webserver`'s.
"""

from __future__ import annotations

from typing import Any

from dagster_webserver import app, cli
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
    app.DagsterWebserver = Webserver  # type: ignore[misc]
    cli.main()


if __name__ == "__main__":
    main()
