"""The pages for people: their links lead somewhere, the files that they name are there."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!\\)\]\(<?([^)>\s]+)>?\)")
_HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$", re.MULTILINE)
ROOMS = ("kalshi_platform", "kalshi_platform_tests", "infra", "docs", "examples")
PATHS = {
    f"{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}"
    for path in (*ROOT.iterdir(), *(path for room in ROOMS for path in (ROOT / room).rglob("*")))
}


def prose(page: Path) -> str:
    return _FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub, and the site, make of a page's headings."""
    found: list[str] = []
    for heading in _HEADING.findall(prose(page)):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeated = sum(
            re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each) is not None for each in found
        )
        found.append(f"{slug}-{repeated}" if repeated else slug)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    broken = []
    for target in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        linked = (page.parent / name).resolve() if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {target.partition("#")[0] for target in _LINK.findall(prose(page))}
        linked = {(page.parent / name).resolve() for name in targets if name.endswith(".md")}
        waiting += linked.intersection(PAGES) - reached
    assert set(PAGES) - reached == set()


def test_the_site_has_every_page_in_its_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [page for section in site["nav"] for page in _flat(*section.values())]
    of_root = {"index.md", "contributing.md", "security-policy.md", "changelog.md"}
    assert set(pages) - of_root == {page.name for page in (ROOT / "docs").glob("*.md")}
    assert of_root <= set(pages)
    assert len(pages) == len(set(pages))


def _flat(pages: str | list[str]) -> list[str]:
    return [pages] if isinstance(pages, str) else pages


def test_the_files_that_contributing_names_are_there() -> None:
    named = re.findall(r"`([\w./-]+(?:\.(?:py|sql|md|yaml|example)|/))`", prose(CONTRIBUTING))
    assert len(named) > 40
    made = {"site/"}
    missing = {
        name
        for name in named
        if not any(path == name or path.endswith(f"/{name}") for path in PATHS)
    }
    assert missing - made == {"NNN_name.sql"}


@pytest.mark.parametrize(
    ("section", "example"),
    [
        ("A channel", r"\bTRADES\b|\bKind\.TRADE\b|\bcolumnar_trades\b"),
        ("An hourly asset", r"\bDEPTH\b"),
        ("A check", r"\b(def|import) crossed_books\b|import .*\bcrossed_books\b"),
        ("A store", r"\b(import|class)\b.*\b(ClickHouse|Parquet)Sink\b"),
    ],
)
def test_contributing_names_every_file_in_which_its_example_is(section: str, example: str) -> None:
    (text,) = re.findall(
        rf"^### {section}\n(.*?)^##", prose(CONTRIBUTING), re.MULTILINE | re.DOTALL
    )
    named = re.findall(r"`([\w./-]+\.py)`", text)
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kalshi_platform").rglob("*.py")
        if re.search(example, path.read_text())
    }
    assert len(found) > 1
    assert {path for path in found if not any(path.endswith(name) for name in named)} == set()
