"""Print the best bid and ask of every market, live from ClickHouse.

    kalshi-platform up                                            # in another terminal
    python examples/top_of_book.py --seconds 10

Any ClickHouse client does: the view is plain SQL, and reading the embedded ClickHouse needs no password.
"""

import argparse
import time
from urllib.parse import urlsplit

import clickhouse_connect

from kalshi_platform import settings

TOP = """
    SELECT market_ticker, yes_bid, yes_bid_size, yes_ask, yes_ask_size, age_seconds
    FROM top_of_book ORDER BY last_event_ts DESC, market_ticker LIMIT {most:UInt32}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--markets", type=int, default=20, help="the most to show")
    arguments = parser.parse_args()
    config = settings.current()
    server = urlsplit(config.clickhouse_url)
    until = time.monotonic() + arguments.seconds
    with clickhouse_connect.get_client(
        host=server.hostname,
        port=server.port or 8123,
        secure=server.scheme == "https",
        username=config.clickhouse_user,
        password=config.clickhouse_password.get_secret_value(),
        database=config.clickhouse_database,
    ) as client:
        while True:
            rows = client.query(TOP, parameters={"most": arguments.markets}).result_rows
            print(f"{'market':<32} {'bid':>18} {'ask':>18} {'age':>9}")
            for ticker, bid, bid_size, ask, ask_size, age in rows:
                print(f"{ticker:<32} {_quote(bid, bid_size)} {_quote(ask, ask_size)} {age:>7.1f} s")
            if time.monotonic() >= until:
                return
            time.sleep(1)


def _quote(price: object, size: object) -> str:
    return f"{'none' if price is None else f'{price} of {size}':>18}"


if __name__ == "__main__":
    main()
