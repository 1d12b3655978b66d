"""A hook of mkdocs (`mkdocs.yml`): pages of the root on the site, links that leave it, GitHub's anchors."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the repository's root, and what they are called on the site."""
_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)#\s:]+)(#[^)\s]*|)\)")


def slug(heading: str, separator: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let the site's anchors be those that links on GitHub have."""
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": slug}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the root's pages beside those of docs/."""
    for name, on_site in ROOT_PAGES.items():
        files.append(File.generated(config, on_site, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to the root's pages lead to the site's; a link to what is not on the site keeps its text alone."""
    folder = "" if page.file.src_uri in ROOT_PAGES.values() else "docs"

    def on_site(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path not in ROOT_PAGES and not path.startswith("docs/"):
            return text
        return f"{image}[{text}]({ROOT_PAGES.get(path) or path.removeprefix('docs/')}{anchor})"

    return _LINK.sub(on_site, markdown)
