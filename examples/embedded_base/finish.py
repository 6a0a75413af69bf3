"""The last step: the exported model as bf16, half the size, with its tokenizer beside it.

python finish.py EXPORTED NEW_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tunesmith.model.folder import quiet
from tunesmith.model.load import load_backbone, load_tokenizer


def main(exported: Path, folder: Path) -> None:
    """Write the new folder."""
    with quiet():
        model = load_backbone(exported, "causal").to(torch.bfloat16)
        model.save_pretrained(folder)
        load_tokenizer(exported).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k not in ("is_local", "local_files_only")}
    settings.write_text(json.dumps(kept, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
