"""Which files of the repository are pages of the site: a hook of mkdocs, see mkdocs.yml."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PATTERNS = (
    "*.md",
    "docs/*.md",
    "docs/*.json",
    "benchmarks/*.md",
    "benchmarks/*.svg",
    "calibration/*.md",
    "recipes/*.json",
    "recipes/*.yaml",
    "recipes/adapters/*/*.md",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces what mkdocs has found in `docs/` by the pages, each named by its path in the repository."""
    for file in list(files):
        if file.src_dir == config.docs_dir:  # the others are the theme's own
            files.remove(file)
    for path in sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files
