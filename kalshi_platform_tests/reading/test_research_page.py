"""Every block of docs/research.md runs as it stands, one after the other, and comes to what the archive holds."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from kalshi_platform_tests.reading.test_engines import START, TICKER, recorded

PAGE = Path(__file__).resolve().parents[2] / "docs" / "research.md"


def test_the_page_runs_from_its_first_block_to_its_last(tmp_path: Path) -> None:
    recorded(tmp_path / "archive")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    names: dict[str, Any] = {
        "location": tmp_path / "archive",
        "ticker": TICKER,
        "start": START,
        "end": START + timedelta(minutes=20),
        "folder": tmp_path / "made",
    }
    for block in blocks:
        exec(block, names)
    assert names["covered"]["condition"].to_list() == ["synced"]
    assert names["by_second"].height == names["frame"].shape[0] == 1200
    assert names["bars"].height == 4
    assert names["features"].height > 1000
    assert names["trades"].height > 100
    assert len(names["bought"]) < names["trades"].height
    assert names["exported"].days[0].events.exists()
    assert names["fee"] == Decimal("0.0175")
