"""Fine-tune language models on one machine, and know whether it helped.

import tunesmith
result = tunesmith.finetune(base="my-model", data="rows.jsonl", stage="sft")
print(result["verdict"])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import (
        chat,
        check,
        compare,
        elo,
        evaluate,
        export,
        finetune,
        init,
        plan,
        predict,
        quickstart,
        rank,
        ratings,
        resume,
        runs_diff,
        runs_list,
        runs_show,
        sample,
        selftest,
        serve,
        train,
        winrate,
    )
    from tunesmith.errors import (
        DataError,
        DiskError,
        Interrupted,
        MetricError,
        ModelError,
        NonFiniteError,
        OutOfMemoryError,
        RecipeError,
        RewardError,
        RunError,
        TunesmithError,
    )
    from tunesmith.recipe import load_recipe

    __version__: str

_WHERE = {
    "api": (
        "chat", "check", "compare", "elo", "evaluate", "export", "finetune", "init", "plan", "predict", "quickstart",
        "rank", "ratings", "resume", "runs_diff", "runs_list", "runs_show", "sample", "selftest", "serve", "train",
        "winrate",
    ),
    "errors": (
        "DataError", "DiskError", "Interrupted", "MetricError", "ModelError", "NonFiniteError", "OutOfMemoryError",
        "RecipeError", "RewardError", "RunError", "TunesmithError",
    ),
    "recipe": ("load_recipe",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "DataError",
    "DiskError",
    "Interrupted",
    "MetricError",
    "ModelError",
    "NonFiniteError",
    "OutOfMemoryError",
    "RecipeError",
    "RewardError",
    "RunError",
    "TunesmithError",
    "__version__",
    "chat",
    "check",
    "compare",
    "elo",
    "evaluate",
    "export",
    "finetune",
    "init",
    "load_recipe",
    "plan",
    "predict",
    "quickstart",
    "rank",
    "ratings",
    "resume",
    "runs_diff",
    "runs_list",
    "runs_show",
    "sample",
    "selftest",
    "serve",
    "train",
    "winrate",
]

# A package is put into its parent's names when it is first loaded. Loaded here (they are empty), these cannot
# take the place of the verbs of the same name later.
for _name in ("evaluate", "export", "plan", "serve"):
    import_module(f"tunesmith.{_name}")
    del globals()[_name]


def __getattr__(name: str) -> Any:
    """Load what is asked for and no more (PEP 562): torch comes only with the verb that needs it."""
    if name == "__version__":
        from tunesmith.rundir import installed_version

        value: Any = installed_version()
    elif name in _MODULE_OF:
        value = getattr(import_module(f"tunesmith.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
