"""The public names and their signatures: what scripts lean on does not change unseen."""

from __future__ import annotations

import inspect
import subprocess
import sys

import tunesmith

SIGNATURES = {
    "chat": "(run, prompt, *, max_tokens=256, temperature=0.0, seed=0)",
    "check": "(recipe_or_data, overrides=(), *, html=None, say=_silent)",
    "compare": "(recipe, overrides=(), *, tune=(), bases=(), grid=(), seeds=1, untuned=(), "
    "budget=None, to=None, say=_silent)",
    "elo": "(files, *, seed=0)",
    "evaluate": "(run_or_model, data, *, stage=None, metrics=(), rewards=(), say=_silent)",
    "export": "(run, to, format='adapter', *, push_to=None, say=_silent)",
    "finetune": "(base, data, stage, method='lora', *, say=_silent, show=_silent, **settings)",
    "init": "(stage=None, *, data=None, base=None, to=None, say=_silent)",
    "load_recipe": "(source, overrides=())",
    "plan": "(recipe, overrides=(), *, on=None, price=None, say=_silent)",
    "predict": "(run, texts, *, max_tokens=256)",
    "quickstart": "(stage='classify', overrides=(), *, folder='quickstart', say=_silent, show=_silent)",
    "rank": "(file, *, ask, show, to=None, pairs=None, seed=0)",
    "ratings": "(files)",
    "resume": "(run, *, say=_silent, show=_silent)",
    "runs_diff": "(a, b)",
    "runs_list": "(root='runs')",
    "runs_show": "(run)",
    "sample": "(run_or_model, prompts, *, num=4, temperature=1.0, top_p=1.0, max_tokens=128, seed=0, to=None,"
    " limit=None, say=_silent)",
    "selftest": "(recipe=None, overrides=(), *, say=_silent)",
    "serve": "(run_or_model, *, host='127.0.0.1', port=8000, max_tokens=1024, say=_silent)",
    "train": "(recipe, overrides=(), *, run=None, say=_silent, show=_silent)",
    "winrate": "(a, b, prompts, judge, *, judge_model=None, judge_key_env=None, judge_label=None, tie_margin=0.0,"
    " temperature=0.0, max_tokens=128, seed=0, to=None, limit=None, say=_silent)",
}
ERRORS = {
    "DataError": ValueError, "DiskError": RuntimeError, "Interrupted": Exception, "MetricError": ValueError,
    "ModelError": ValueError, "NonFiniteError": ArithmeticError, "OutOfMemoryError": MemoryError,
    "RecipeError": ValueError, "RewardError": ValueError, "RunError": RuntimeError, "TunesmithError": Exception,
}  # fmt: skip


def signature(function) -> str:
    parts, starred = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts, starred = [*parts, "*"], True
        shown = getattr(p.default, "__name__", None) or repr(p.default)
        stars = "**" if p.kind is p.VAR_KEYWORD else ""
        parts.append(stars + p.name + ("" if p.default is p.empty else f"={shown}"))
    return f"({', '.join(parts)})"


def test_the_public_names_are_these():
    assert set(tunesmith.__all__) == {*SIGNATURES, *ERRORS, "__version__"}
    assert set(dir(tunesmith)) >= set(tunesmith.__all__)


def test_the_signatures_are_these():
    assert {name: signature(getattr(tunesmith, name)) for name in SIGNATURES} == SIGNATURES


def test_errors_are_one_tree_and_also_the_standard_ones():
    for name, standard in ERRORS.items():
        error = getattr(tunesmith, name)
        assert issubclass(error, tunesmith.TunesmithError) and issubclass(error, standard)


def test_verbs_stay_functions_when_their_packages_are_loaded():
    """`evaluate` and `export` are packages too; loading them must not hide the verbs."""
    code = (
        "import tunesmith, tunesmith.evaluate.report, tunesmith.export.merge, tunesmith.stages.using\n"
        "assert callable(tunesmith.evaluate) and callable(tunesmith.export)\n"
        "from tunesmith.evaluate import report; from tunesmith import export; assert callable(export)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(tunesmith, "fine_tune")


def test_the_version_is_the_installed_one():
    assert tunesmith.__version__[0].isdigit()


def test_the_package_is_typed():
    from importlib.resources import files

    assert files("tunesmith").joinpath("py.typed").is_file()
