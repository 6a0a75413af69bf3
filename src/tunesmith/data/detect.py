"""Which format the rows have: recognised from names and values, never registered. Doubt is an error that asks."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.formats import ALIASES, COMPLETIONS, FORMATS, STAGES, Ambiguous, Format
from tunesmith.data.survey import IGNORED, Survey, fold
from tunesmith.errors import DataError

__all__ = ["STAGES", "Layout", "Survey", "recognise"]


@dataclass(frozen=True, slots=True)
class Layout:
    """A recognised format and the column of each role."""

    format: str
    columns: Mapping[str, str]


def recognise(
    survey: Survey, *, stage: str, name: str | None = None, given: Mapping[str, str] | None = None, where: str = "data"
) -> Layout:
    """The format of the surveyed rows; DataError listing the columns and how to name them where it is in doubt."""
    given = dict(given or {})
    _check_given(survey, stage, given, where)
    candidates = _candidates(stage, name, given, where)
    doubts: list[str] = []
    for candidate in candidates:
        try:
            found = candidate.find(survey)
        except Ambiguous as doubt:
            found = None
            doubts.append(str(doubt))
        roles = {**(found or {}), **given}
        complete = set(candidate.required) <= set(roles) <= {*candidate.required, *candidate.optional}
        if complete and (not doubts or set(candidate.required) <= set(given)):
            return Layout(candidate.name, roles)
        if doubts:
            break
    raise DataError(_unrecognised(survey, stage, candidates, doubts, where))


def _candidates(stage: str, name: str | None, given: Mapping[str, str], where: str) -> list[Format]:
    if name is not None:
        name = ALIASES.get(name, name)
        if name not in FORMATS:
            near = difflib.get_close_matches(name, FORMATS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(f"{where}: no data format is called {name!r}{hint} Known: {', '.join(FORMATS)}")
        if stage not in FORMATS[name].stages:
            fits = ", ".join(f.name for f in FORMATS.values() if stage in f.stages)
            raise DataError(f"{where}: stage {stage} does not read the format {name}; it reads {fits}")
        return [FORMATS[name]]
    fitting = [f for f in FORMATS.values() if stage in f.stages]
    if not given:
        return fitting
    return [f for f in fitting if set(given) <= {*f.required, *f.optional}]


def _check_given(survey: Survey, stage: str, given: Mapping[str, str], where: str) -> None:
    roles = {role for f in FORMATS.values() if stage in f.stages for role in (*f.required, *f.optional)}
    problems = []
    for role, column in given.items():
        if role not in roles:
            near = difflib.get_close_matches(role, roles, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(
                f"data.columns: {role!r} is no role of stage {stage}{hint} Roles: {', '.join(sorted(roles))}"
            )
        if column not in survey.columns:
            near = difflib.get_close_matches(str(column), list(survey.columns), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(
                f"data.columns: {role}: there is no column {column!r} in {where}{hint} "
                f"Columns: {', '.join(survey.columns)}"
            )
    if problems:
        raise DataError("\n".join(problems))


def _unrecognised(survey: Survey, stage: str, candidates: Sequence[Format], doubts: Sequence[str], where: str) -> str:
    seen = ", ".join(f"{c.name} ({c.kind})" for c in survey.columns.values()) or "none"
    lines = [f"{where}: which columns are meant for stage {stage}? Columns: {seen}"]
    lines += [f"  in doubt: {doubt}" for doubt in doubts]
    others = sorted({s for f in FORMATS.values() if stage not in f.stages and _fits(f, survey) for s in f.stages})
    if stage in ("reward", "dpo") and not doubts and survey.first(COMPLETIONS, "list"):
        lines.append("  the answers are not ranked yet: `tunesmith rank FILE` shows them and writes their ranks")
    if others and not doubts:
        lines.append(f"  these rows fit the stage{'s' if len(others) > 1 else ''} {', '.join(others)}")
    example = candidates[-1] if candidates else next(f for f in FORMATS.values() if stage in f.stages)
    names = [*survey.texts(), *(name for name in survey.columns if fold(name) not in IGNORED)]
    pick = list(dict.fromkeys(names))[: len(example.required)]
    pick += ["COLUMN"] * (len(example.required) - len(pick))
    sample = ", ".join(f"{role}: {column}" for role, column in zip(example.required, pick, strict=True))
    lines.append(f"  name them, for example data.columns: {{{sample}}}")
    reads = [f"{f.name} ({', '.join(f.required)})" for f in FORMATS.values() if stage in f.stages]
    lines.append(f"  stage {stage} reads {'; '.join(reads)}")
    return "\n".join(lines)


def _fits(candidate: Format, survey: Survey) -> bool:
    if candidate.name in ("text", "prompts"):
        return False
    try:
        return candidate.find(survey) is not None
    except Ambiguous:
        return False
