"""Where the real models and data of some tests are: `from tests.assets import asset`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[1].parent / "shared" / "assets"


def assets_folder() -> Path:
    """`TUNESMITH_ASSETS`, else `../shared/assets` beside the checkout; without it a test fails in CI, else skips."""
    folder = Path(os.environ.get("TUNESMITH_ASSETS") or _BESIDE)
    if not folder.is_dir():
        _without(f"{folder} is not a folder: set TUNESMITH_ASSETS to where the real models and data are")
    return folder


def asset(path: str) -> Path:
    """One file or folder of the assets, such as `data/imdb`; missing counts as `assets_folder` says."""
    found = assets_folder() / path
    if not found.exists():
        _without(f"{found} does not exist: the assets under TUNESMITH_ASSETS are not complete")
    return found


def _without(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
