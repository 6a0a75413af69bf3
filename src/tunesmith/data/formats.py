"""The shapes rows come in: which columns play which role, found by names and values. Doubt is said, not settled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.survey import IGNORED, Survey, fold

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
TEXTS = _words(
    "text content document sentence review body comment message article passage tweet post abstract "
    "rezension satz texto texte"
)
LABELS = _words(
    "label labels class category sentiment stars rating score intent topic tag target klasse kategorie etikett sterne "
    "stimmung bewertung categoria categoría catégorie clase classe etiqueta étiquette"
)
SYSTEMS = ("system", "system_prompt")
CONTEXTS = ("context", "passage", "document", "article", "background")
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
    if survey.find("prompt", "messages") and survey.find("completion", "messages"):
        return None
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


def _find_instances(survey: Survey) -> Finding:
    instruction, instances = survey.find("instruction", "text"), survey.find("instances", "instances")
    return {"instruction": instruction, "instances": instances} if instruction and instances else None


def _find_pair(survey: Survey) -> tuple[str, str] | None:
    pairs = [
        (p, c)
        for prompt, answer in KNOWN_PAIRS
        if (p := survey.find(prompt, "text")) and (c := survey.find(answer, "text"))
    ]
    if len(pairs) > 1:
        raise Ambiguous("several pairs fit: " + ", ".join(f"{p} -> {c}" for p, c in pairs))
    prompts, answers = survey.all(PROMPTS, "text"), survey.all(ANSWERS, "text")
    if pairs and len(answers) > 1 and pairs[0][1] in answers:
        raise Ambiguous(f"several columns could be the answer: {', '.join(answers)}")
    if pairs:
        return pairs[0]
    if len(prompts) == 1 and len(answers) == 1 and prompts != answers:
        return prompts[0], answers[0]
    texts = survey.texts()
    speaking = survey.speaking([w for w in PROMPTS if len(w) > 1]), survey.speaking([w for w in ANSWERS if len(w) > 1])
    if len(speaking[0]) == 1 and len(speaking[1]) == 1 and speaking[0] != speaking[1]:
        return speaking[0][0], speaking[1][0]
    if len(texts) != 2 or any(fold(name) in CONTEXTS for name in texts):
        return None
    known = [name for name in (*prompts, *answers) if name in texts and len(name) > 1]
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
    label = label or (labels[0] if labels else _class_like(survey))
    if label is None:
        return None
    for left, right in TEXT_PAIRS:
        first, second = survey.find(left, "text"), survey.find(right, "text")
        if first and second:
            return {"text": first, "text_pair": second, "label": label}
    text = _only_text(survey, [label])
    return None if text is None else {"text": text, "label": label}


def _class_like(survey: Survey) -> str | None:
    """The label by its name's parts, or the one column of few values that come again and again."""
    named = [name for name in survey.speaking([w for w in LABELS if len(w) > 3]) if survey.columns[name].is_class_like]
    if len(named) == 1:
        return named[0]
    alike = [c.name for c in survey.columns.values() if c.is_class_like and fold(c.name) not in IGNORED]
    if len(alike) > 1:
        raise Ambiguous(f"several columns could be the label: {', '.join(alike)}")
    return alike[0] if alike else None


def _only_text(survey: Survey, taken: Sequence[str] = ()) -> str | None:
    if (named := survey.find("text", "text")) and named not in taken:
        return named
    named_all = [name for name in survey.all(TEXTS, "text") if name not in taken]
    texts = [name for name in survey.texts() if name not in taken]
    named_all = named_all or [name for name in survey.speaking([w for w in TEXTS if len(w) > 3]) if name not in taken]
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
    kinds = ("text", "messages", "turns")
    chosen, rejected = survey.find("chosen", *kinds), survey.find("rejected", *kinds)
    if chosen is None or rejected is None:
        return None
    prompt = survey.first(PROMPTS, *kinds)
    extra = survey.find("input", "text", "null") if prompt and fold(prompt) == "instruction" else None
    if prompt is None and survey.columns[chosen].kind == "text":
        return None
    margin = survey.find("margin", "number", "text")
    return _with({"prompt": prompt, "input": extra, "chosen": chosen, "rejected": rejected, "margin": margin})


COMPLETIONS = _words("completions responses answers candidates outputs replies")


def _find_ranking(survey: Survey) -> Finding:
    completions = survey.first(COMPLETIONS, "list")
    ranks = survey.first(("ranks", "ranking", "rank"), "list")
    prompt = survey.first(PROMPTS, "text", "messages")
    if completions is None or ranks is None or prompt is None:
        return None
    return {"prompt": prompt, "completions": completions, "ranks": ranks}


def _find_scored(survey: Survey) -> Finding:
    completions = survey.first(COMPLETIONS, "list")
    scores = survey.first(("scores", "ratings", "rewards"), "list")
    prompt = survey.first(PROMPTS, "text", "messages")
    if completions is None or scores is None or prompt is None:
        return None
    return {"prompt": prompt, "completions": completions, "scores": scores}


def _find_dialogue_pairs(survey: Survey) -> Finding:
    chosen, rejected = survey.find("chosen", "text"), survey.find("rejected", "text")
    if chosen is None or rejected is None or survey.first(PROMPTS, "text", "messages"):
        return None
    return {"chosen": chosen, "rejected": rejected}


def _find_prompts(survey: Survey) -> Finding:
    column = survey.first(("messages",), "messages") or survey.find("prompt", "text", "messages")
    answer = survey.first(("answer", "ground_truth", "solution", "completion"), "text")
    if column:
        return _with({"prompt": column, "answer": answer})
    alpaca = _find_alpaca(survey)
    if alpaca:
        return _with({"prompt": alpaca["instruction"], "input": alpaca["input"], "answer": alpaca["output"]})
    prompts, texts = survey.all(PROMPTS, "text"), survey.texts()
    if len(prompts) == 1 and answer:
        return {"prompt": prompts[0], "answer": answer}
    pair = _find_pair(survey)
    if pair:
        return {"prompt": pair[0], "answer": pair[1]}
    turns = _find_sharegpt(survey)
    if turns:
        return {"prompt": turns["conversations"]}
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
        Format("instances", ("instruction", "instances"), (), _SFT, _find_instances),
        Format("prompt_completion", ("prompt", "completion"), ("system",), _SFT, _find_prompt_completion),
        Format("question_answer", ("question", "answer"), ("system",), _SFT, _find_question_answer),
        Format("labelled", ("text", "label"), ("text_pair",), _CLASSIFY, _find_labelled),
        Format("ranking", ("prompt", "completions", "ranks"), (), _PAIRS, _find_ranking),
        Format("scored", ("prompt", "completions", "scores"), (), _PAIRS, _find_scored),
        Format("preference", ("chosen", "rejected"), ("prompt", "input", "margin"), _PAIRS, _find_preference),
        Format("dialogue_pairs", ("chosen", "rejected"), (), _PAIRS, _find_dialogue_pairs),
        Format("prompts", ("prompt",), ("input", "answer"), _RL, _find_prompts),
    )
}
ALIASES = {"lines": "text", "openai": "messages", "chatml": "messages", "hh-rlhf": "dialogue_pairs"}
