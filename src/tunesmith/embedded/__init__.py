"""What comes with the program: a small base model and small data sets, each under a short name.

`tunesmith/reviews-1m` is the base (a Llama of 1,377,408 parameters, pre-trained on film reviews); `embedded:NAME/SPLIT`
is a data file, with the names and splits of `SETS` and `SPLITS`. Both stand in a recipe wherever a folder or file does.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from tunesmith.errors import DataError, ModelError

BASE = "tunesmith/reviews-1m"
SETS = ("reviews", "instructions", "preferences", "prompts")
SPLITS = ("train", "eval", "test")
_PREFIX, _OWNER = "embedded:", "tunesmith/"


def base_folder(name: str) -> Path | None:
    """The folder of an embedded base; None for any other name. `ModelError` for `tunesmith/...` that is not one."""
    if not name.startswith(_OWNER):
        return None
    if name != BASE:
        raise ModelError(f"{name}: no base of that name comes with the program; there is {BASE}")
    return _here() / "reviews-1m"


def data_file(name: str) -> Path | None:
    """The file of an embedded data set; None for any other name. `DataError` for `embedded:...` that is not one."""
    if not name.startswith(_PREFIX):
        return None
    known = [f"{_PREFIX}{group}/{split}" for group in SETS for split in SPLITS]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
        raise DataError(f"{name}: no data of that name comes with the program{hint}")
    return _here() / "data" / f"{name.removeprefix(_PREFIX)}.jsonl"


def _here() -> Path:
    """The package's own folder; pip unpacks wheels, so its files are plain files."""
    return Path(str(files(__name__)))
