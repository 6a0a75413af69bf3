"""One folder of stand-ins for all pages, and one finished run that they share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, blocks
from tests.docs.running import run_block
from tests.docs.workspace import fill


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, data, and the README's own recipe as the finished run `first`."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        fill(folder)
        for block in blocks(ROOT / "README.md"):
            if block.file_name == "tune.yaml":
                run_block(block, folder)
        from tunesmith import api

        api.train("tune.yaml", run="first")
    return folder


@pytest.fixture
def workspace(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder of its own, as the working directory."""
    folder = tmp_path / "work"
    shutil.copytree(model_folder, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
    return folder
