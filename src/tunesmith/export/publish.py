"""What goes with an exported model: its card as README.md, and, only when asked by name, the way to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.evaluate.card import render_card
from tunesmith.evaluate.run_files import dig, read_run
from tunesmith.rundir import RunDir, write_whole


def write_readme(run: RunDir, folder: Path, *, library: str) -> Path:
    """The run's model card in the exported folder, with the header that the hub reads."""
    files = read_run(run.path)
    header: dict[str, Any] = {"library_name": library, "base_model": files.text("base.name", "base", otherwise="")}
    licence = dig(files.result, "base.licence")
    if isinstance(licence, str) and licence:
        header["license"] = licence
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items() if value)
    target = folder / "README.md"
    write_whole(target, f"---\n{lines}---\n\n{render_card(files)}")
    return target


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub as a private repository; its address. The login is the hub client's own."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of a tuned model")
    except Exception as error:  # the hub client raises many kinds, some with tokens in their text
        raise ModelError(
            f"{folder} is written, but could not be sent to {repository} ({type(error).__name__}). Is the network "
            "there, are you logged in (hf auth login), and may you write there?"
        ) from None
    return str(done)
