"""Which format the rows have: recognised from names and values, never registered. Doubt is an error that asks.

`survey` looks at a sample of the rows, `recognise` names the format and which column plays which role.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tunesmith.errors import DataError

Finding = Mapping[str, str] | None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PROMPTS = _words(
    "prompt question instruction query request problem user human input source q ask frage anfrage "
    "aufgabe pregunta domanda pergunta vraag fraga"
)
ANSWERS = _words(
    "completion answer response output reply solution assistant target summary translation a antwort "
    "respuesta risposta resposta antwoord svar reponse réponse"
)
TEXTS = _words("text content document sentence review body comment message article passage tweet post abstract")
LABELS = _words("label labels class category sentiment stars rating score intent topic tag target klasse kategorie")
SYSTEMS = ("system", "system_prompt")
CONTEXTS = ("context", "passage", "document", "article", "background")
IGNORED = _words("id idx index uid uuid guid url link source_url date timestamp created_at name split")
KNOWN_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
    ("source", "target"),
    ("user", "assistant"),
    ("frage", "antwort"),
)
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("question1", "question2"),
    ("text", "text_pair"),
)


@dataclass(slots=True)
class Column:
    """What the sample shows of one column. Shares are of the rows that have it."""

    name: str
    num_rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    num_asking: int = 0

    @property
    def kind(self) -> str:
        """text, number, messages, turns, list, object or null: the most frequent that is not null."""
        real = {kind: count for kind, count in self.kinds.items() if kind != "null"}
        return max(real, key=lambda kind: real[kind]) if real else "null"

    @property
    def asks(self) -> float:
        """Share of values that end in a question mark."""
        return self.num_asking / max(self.num_rows, 1)


class Survey:
    """The columns that at least half of the sampled rows have, in file order."""

    def __init__(self, rows: Sequence[Mapping[str, object]]) -> None:
        self.num_rows = len(rows)
        seen: dict[str, Column] = {}
        for row in rows:
            for name, value in row.items():
                column = seen.setdefault(name, Column(name))
                kind = kind_of_value(value)
                column.num_rows += 1
                column.kinds[kind] = column.kinds.get(kind, 0) + 1
                column.num_asking += isinstance(value, str) and value.rstrip().endswith(("?", "？"))
        self.columns = {name: c for name, c in seen.items() if c.num_rows * 2 >= len(rows)}
        self._folded = {fold(name): name for name in reversed(self.columns)}

    def find(self, name: str, *kinds: str) -> str | None:
        """The column of that name (case and -/space/_ aside), if its values are of these kinds."""
        found = self._folded.get(name)
        return found if found is not None and (not kinds or self.columns[found].kind in kinds) else None

    def first(self, names: Sequence[str], *kinds: str) -> str | None:
        """The first of `names` that is a column of these kinds."""
        return next((found for name in names if (found := self.find(name, *kinds))), None)

    def all(self, names: Sequence[str], *kinds: str) -> list[str]:
        """Every one of `names` that is a column of these kinds."""
        return list(dict.fromkeys(found for name in names if (found := self.find(name, *kinds))))

    def texts(self) -> list[str]:
        """Columns of text that are not ids, dates and the like."""
        return [c.name for c in self.columns.values() if c.kind == "text" and fold(c.name) not in IGNORED]


def fold(name: str) -> str:
    """How column names are compared."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def kind_of_value(value: object) -> str:
    """text, number, messages (role/content), turns (from/value), list, object or null."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool | int | float):
        return "number"
    if isinstance(value, list | tuple):
        heads = [set(item) for item in value if isinstance(item, Mapping)]
        if heads and len(heads) == len(value):
            if all("role" in head for head in heads):
                return "messages"
            if all("from" in head for head in heads):
                return "turns"
        return "list"
    return "object"


@dataclass(frozen=True, slots=True)
class Format:
    """A shape of rows: its roles, the stages that read it and how it is found in a survey."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    stages: tuple[str, ...]
    find: Callable[[Survey], Finding]


class Ambiguous(Exception):
    """Several readings fit. The message says which."""


def _with(roles: Mapping[str, str | None]) -> dict[str, str]:
    return {role: column for role, column in roles.items() if column is not None}


def _find_messages(survey: Survey) -> Finding:
    columns = [c.name for c in survey.columns.values() if c.kind == "messages"]
    columns = survey.all(("messages", "conversation", "conversations", "chat", "dialogue"), "messages") or columns
    if len(columns) > 1:
        raise Ambiguous(f"several columns hold conversations: {', '.join(columns)}")
    return _with({"messages": columns[0], "tools": survey.find("tools", "list", "text")}) if columns else None


def _find_sharegpt(survey: Survey) -> Finding:
    columns = [c.name for c in survey.columns.values() if c.kind == "turns"]
    if len(columns) > 1:
        raise Ambiguous(f"several columns hold conversations: {', '.join(columns)}")
    return _with({"conversations": columns[0], "system": survey.first(SYSTEMS, "text")}) if columns else None


def _find_alpaca(survey: Survey) -> Finding:
    instruction = survey.find("instruction", "text")
    answers = survey.all(("output", "response", "completion", "answer"), "text")
    extra = survey.first(("input", "context"), "text", "null")
    if instruction is None or not answers or extra is None:
        return None
    if len(answers) > 1:
        raise Ambiguous(f"several columns could be the answer: {', '.join(answers)}")
    system = survey.first(SYSTEMS, "text")
    return _with({"instruction": instruction, "input": extra, "output": answers[0], "system": system})


def _find_pair(survey: Survey) -> tuple[str, str] | None:
    pairs = [
        (p, c)
        for prompt, answer in KNOWN_PAIRS
        if (p := survey.find(prompt, "text")) and (c := survey.find(answer, "text"))
    ]
    if len(pairs) > 1:
        raise Ambiguous("several pairs fit: " + ", ".join(f"{p} -> {c}" for p, c in pairs))
    if pairs:
        return pairs[0]
    prompts, answers = survey.all(PROMPTS, "text"), survey.all(ANSWERS, "text")
    texts = survey.texts()
    if len(prompts) == 1 and len(answers) == 1 and prompts != answers:
        return prompts[0], answers[0]
    if len(texts) != 2:
        return None
    known = [name for name in (*prompts, *answers) if name in texts]
    if len(known) == 1:
        other = texts[1 - texts.index(known[0])]
        return (known[0], other) if prompts else (other, known[0])
    asking = [name for name in texts if survey.columns[name].asks >= 0.6]
    if not known and len(asking) == 1:
        return asking[0], texts[1 - texts.index(asking[0])]
    return None


def _find_question_answer(survey: Survey) -> Finding:
    pair = _find_pair(survey)
    if pair is None or set(map(fold, pair)) == {"prompt", "completion"}:
        return None
    left_out = [name for name in survey.all(CONTEXTS, "text") if name not in pair]
    if left_out:
        raise Ambiguous(f"{pair[0]} -> {pair[1]} fits, but {left_out[0]!r} would be left out; a template can hold all")
    return _with({"question": pair[0], "answer": pair[1], "system": survey.first(SYSTEMS, "text")})


def _find_prompt_completion(survey: Survey) -> Finding:
    prompt, completion = survey.find("prompt", "text"), survey.find("completion", "text")
    if prompt is None or completion is None:
        for names in (("prompt", "completion"),):
            columns = [survey.find(name, "messages") for name in names]
            if all(columns):
                return _with(dict(zip(names, columns, strict=True)))
        return None
    return _with({"prompt": prompt, "completion": completion, "system": survey.first(SYSTEMS, "text")})


def _find_labelled(survey: Survey) -> Finding:
    labels = survey.all(LABELS, "text", "number", "list")
    label = survey.first(("label", "labels"), "text", "number", "list")
    if label is None and len(labels) > 1:
        raise Ambiguous(f"several columns could be the label: {', '.join(labels)}")
    label = label or (labels[0] if labels else None)
    if label is None:
        return None
    for left, right in TEXT_PAIRS:
        first, second = survey.find(left, "text"), survey.find(right, "text")
        if first and second:
            return {"text": first, "text_pair": second, "label": label}
    text = _only_text(survey, [label])
    return None if text is None else {"text": text, "label": label}


def _only_text(survey: Survey, taken: Sequence[str] = ()) -> str | None:
    if (named := survey.find("text", "text")) and named not in taken:
        return named
    named_all = [name for name in survey.all(TEXTS, "text") if name not in taken]
    texts = [name for name in survey.texts() if name not in taken]
    if len(named_all) > 1:
        raise Ambiguous(f"several columns could be the text: {', '.join(named_all)}")
    if named_all:
        return named_all[0]
    if len(texts) > 1:
        raise Ambiguous(f"several columns could be the text: {', '.join(texts)}")
    return texts[0] if texts else None


def _find_text(survey: Survey) -> Finding:
    text = _only_text(survey)
    return None if text is None else {"text": text}


def _find_preference(survey: Survey) -> Finding:
    chosen, rejected = survey.find("chosen", "text", "messages"), survey.find("rejected", "text", "messages")
    if chosen is None or rejected is None:
        return None
    prompt = survey.first(PROMPTS, "text", "messages")
    extra = survey.find("input", "text", "null") if prompt and fold(prompt) == "instruction" else None
    if prompt is None and survey.columns[chosen].kind == "text":
        return None
    return _with({"prompt": prompt, "input": extra, "chosen": chosen, "rejected": rejected})


def _find_dialogue_pairs(survey: Survey) -> Finding:
    chosen, rejected = survey.find("chosen", "text"), survey.find("rejected", "text")
    if chosen is None or rejected is None or survey.first(PROMPTS, "text", "messages"):
        return None
    return {"chosen": chosen, "rejected": rejected}


def _find_prompts(survey: Survey) -> Finding:
    column = survey.first(("messages",), "messages") or survey.find("prompt", "text", "messages")
    if column:
        answers = ("answer", "ground_truth", "solution", "completion")
        return _with({"prompt": column, "answer": survey.first(answers, "text")})
    alpaca = _find_alpaca(survey)
    if alpaca:
        return _with({"prompt": alpaca["instruction"], "input": alpaca["input"], "answer": alpaca["output"]})
    pair = _find_pair(survey)
    if pair:
        return {"prompt": pair[0], "answer": pair[1]}
    turns = _find_sharegpt(survey)
    if turns:
        return {"prompt": turns["conversations"]}
    prompts, texts = survey.all(PROMPTS, "text"), survey.texts()
    if len(prompts) > 1:
        raise Ambiguous(f"several columns could be the prompt: {', '.join(prompts)}")
    only = prompts or (texts if len(texts) == 1 else [])
    return {"prompt": only[0]} if only else None


_TEXT, _SFT, _CLASSIFY = ("pretrain", "mlm"), ("sft",), ("classify",)
_PAIRS, _RL = ("reward", "dpo"), ("ppo", "grpo")
STAGES = (*_TEXT, *_SFT, *_CLASSIFY, *_PAIRS, *_RL)

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("text", ("text",), (), _TEXT, _find_text),
        Format("messages", ("messages",), ("tools",), _SFT, _find_messages),
        Format("sharegpt", ("conversations",), ("system",), _SFT, _find_sharegpt),
        Format("alpaca", ("instruction", "output"), ("input", "system"), _SFT, _find_alpaca),
        Format("prompt_completion", ("prompt", "completion"), ("system",), _SFT, _find_prompt_completion),
        Format("question_answer", ("question", "answer"), ("system",), _SFT, _find_question_answer),
        Format("labelled", ("text", "label"), ("text_pair",), _CLASSIFY, _find_labelled),
        Format("preference", ("chosen", "rejected"), ("prompt", "input"), _PAIRS, _find_preference),
        Format("dialogue_pairs", ("chosen", "rejected"), (), _PAIRS, _find_dialogue_pairs),
        Format("prompts", ("prompt",), ("input", "answer"), _RL, _find_prompts),
    )
}
ALIASES = {"lines": "text", "openai": "messages", "chatml": "messages", "hh-rlhf": "dialogue_pairs"}


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
