"""Baselines of a run: what the untouched base and simple systems make of the same held-out rows.

They are measured once, before the first step, and kept in the run; after training the tuned model is compared with
them row by row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.batch import Sample
from tunesmith.data.batches import collate
from tunesmith.data.store import SampleStore
from tunesmith.data.tokens import encode_text
from tunesmith.errors import RecipeError
from tunesmith.evaluate.baselines import TITLES, nearest_answers, rivals_of, worth
from tunesmith.evaluate.compare import compare
from tunesmith.evaluate.features import mean_hidden
from tunesmith.evaluate.generate import GenerationResult, questions_of
from tunesmith.evaluate.intervals import bootstrap, wilson
from tunesmith.evaluate.linear import fit_logistic, linear_probe, nearest, predict_logistic, tfidf
from tunesmith.evaluate.prompting import LabelPrompt, prompt_tokens, score_labels, with_examples
from tunesmith.evaluate.tasks import CLASS_METRICS
from tunesmith.model.language import LanguageModel
from tunesmith.model.load import is_encoder, load_backbone
from tunesmith.model.soft_prompt import context_tokens
from tunesmith.recipe_rules import BASELINES, CHEAP_BASELINES
from tunesmith.rundir import RunDir
from tunesmith.stages.job import Built, Job, Measured
from tunesmith.stages.likelihood import complete, measure_likelihood, with_completions
from tunesmith.stages.measuring import Moment, as_json, from_json, measurement_key

Json = dict[str, Any]
Classes = NDArray[np.int64]
PARTS = ("held_out", "test")
METRICS = ("accuracy", "f1", "mcc")


@dataclass(frozen=True, slots=True)
class Baseline:
    """One system measured: on held-out and test rows, the tokens that a request reads, seconds it took."""

    name: str
    title: str
    measured: Mapping[str, Measured]
    prompt_tokens: float | None
    seconds: float


def wanted(job: Job) -> tuple[str, ...]:
    """The recipe's baselines in the order of the table; the cheap ones when it names none.

    `RecipeError` when one that it names is not possible with this base.
    """
    stage, asked = job.recipe.stage, job.recipe.evaluate.baselines
    if asked is False or stage not in BASELINES or job.recipe.data.multi_label or _parts(job) == {}:
        return ()
    given = CHEAP_BASELINES[stage] if asked is None else BASELINES[stage] if asked is True else tuple(asked)
    impossible = {"nearest_neighbour"} if stage == "sft" and job.recipe.evaluate.generate is None else set()
    if "few_shot" in given and stage == "classify" and is_encoder(job.base, trust=job.recipe.trust_remote_code):
        if isinstance(asked, list):
            raise RecipeError(f"evaluate.baselines: {job.recipe.base} is an encoder, which reads no examples in its "
                              "prompt; leave out few_shot")  # fmt: skip
        impossible.add("few_shot")
    return tuple(name for name in TITLES if name in given and name not in impossible)


def measure_baselines(run: RunDir, built: Built, job: Job, say: Callable[[str], None]) -> None:
    """Measure every baseline that the recipe wants and keep it in baselines.json, unless this run has done so."""
    names = wanted(job)
    key = sha256(json.dumps([measurement_key(job), job.inputs.train.fingerprint, names]).encode()).hexdigest()[:32]
    if not names or (run.file("baselines").is_file() and run.read_json("baselines").get("key") == key):
        return
    found = measured(built, job, names)
    rows = [{"name": b.name, "title": b.title, "prompt_tokens": b.prompt_tokens, "seconds": round(b.seconds, 3),
             "tuned_prompt_tokens": _own_prompt_tokens(job),
             "measured": {part: as_json(m) for part, m in b.measured.items()}} for b in found]  # fmt: skip
    run.write_text("baselines", json.dumps({"key": key, "baselines": rows}) + "\n")
    took = sum(b.seconds for b in found)
    say(f"baselines: {', '.join(names)}, {took:.1f} s")


def measured(built: Built, job: Job, names: Sequence[str]) -> list[Baseline]:
    """Every baseline of `names` on the held-out and test rows."""
    return _classify(built, job, names) if job.recipe.stage == "classify" else _sft(built, job, names)


def beside(run: RunDir, job: Job, after: Moment) -> dict[str, Json]:
    """`{part: {"baselines": {title: {metrics, difference, prompt_tokens}}, "worth": text}}`, part "" being the
    held-out rows and "test" the test rows; empty without baselines. A difference is tuned - baseline."""
    if not wanted(job) or not run.file("baselines").is_file():
        return {}
    kept = run.read_json("baselines")["baselines"]
    found = {}
    for part in PARTS:
        tuned = getattr(after, part)
        table = {} if tuned is None else {b["title"]: _against(b, part, tuned, job) for b in kept}
        table = {title: entry for title, entry in table.items() if entry}
        if tuned is None or not table:
            continue
        metric, rivals = rivals_of(table, tuned.metrics, job.recipe.train.select_by)
        text = worth(metric, tuned.metrics[metric].value, rivals) if rivals else ""
        found["" if part == "held_out" else part] = {"baselines": table, "worth": text}
    return found


def _against(kept: Json, part: str, tuned: Measured, job: Job) -> Json:
    base = from_json(kept["measured"].get(part), tuned)
    if base is None:
        return {}
    changes = compare(base.statistics, tuned.statistics, seed=job.recipe.seed)
    entry: Json = {"metrics": base.as_json(), "difference": {name: c.as_json() for name, c in changes.items()}}
    if kept["prompt_tokens"] is not None:
        entry |= {"prompt_tokens": kept["prompt_tokens"], "tuned_prompt_tokens": kept["tuned_prompt_tokens"]}
    return entry


def _parts(job: Job) -> dict[str, SampleStore]:
    """The stores that a baseline is measured on."""
    stores = {"held_out": job.inputs.eval, "test": job.inputs.test}
    return {name: store for name, store in stores.items() if store is not None}


def _own_prompt_tokens(job: Job) -> float:
    """What the tuned model reads to answer a held-out row, on average."""
    store = next(iter(_parts(job).values()))
    if job.recipe.stage == "classify":
        return float(store.lengths.mean())
    return prompt_tokens([store[i] for i in range(len(store))])


def _spread(store: SampleStore, limit: int) -> list[Sample]:
    """At most `limit` samples, evenly spread."""
    num = min(limit, len(store))
    return [store[i * len(store) // num] for i in range(num)]


# classification


def _classify(built: Built, job: Job, names: Sequence[str]) -> list[Baseline]:
    train, parts = job.inputs.train, _parts(job)
    texts = _Texts(job.tokenizer, train, parts)
    makers: dict[str, Callable[[], tuple[dict[str, Classes], str, float | None]]] = {
        "majority": lambda: (_majority(texts), TITLES["majority"], None),
        "tfidf": lambda: (_tfidf(texts, job), TITLES["tfidf"], None),
        "linear_probe": lambda: (*_probe(features(), "linear_probe", job), None),
        "nearest_neighbour": lambda: (*_probe(features(), "nearest_neighbour", job), None),
        "zero_shot": lambda: _prompted(built, job, shots=0),
        "few_shot": lambda: _prompted(built, job, shots=_shots(job)),
    }
    made: list[_Features] = []

    def features() -> _Features:
        if not made:
            made.append(_features(built, job))
        return made[0]

    found = []
    for name in names:
        started = time.perf_counter()
        predictions, title, tokens = makers[name]()
        on = {part: _measured(texts.labels[part], said, job.recipe.seed) for part, said in predictions.items()}
        found.append(Baseline(name, title, on, tokens, time.perf_counter() - started))
    return found


class _Texts:
    """Labels of every set and, when asked for, the texts as the model sees them."""

    def __init__(self, tokenizer: Any, train: SampleStore, parts: Mapping[str, SampleStore]) -> None:
        self.sets = {"train": train, **parts}
        self.labels = {name: np.asarray([s.label for s in store], np.int64) for name, store in self.sets.items()}
        self._tokenizer = tokenizer

    def of(self, name: str) -> list[str]:
        return [str(self._tokenizer.decode(s.ids.tolist(), skip_special_tokens=True)) for s in self.sets[name]]

    @property
    def parts(self) -> list[str]:
        return [name for name in self.sets if name != "train"]


def _majority(texts: _Texts) -> dict[str, Classes]:
    most = int(np.bincount(texts.labels["train"]).argmax())
    return {part: np.full(len(texts.labels[part]), most) for part in texts.parts}


def _tfidf(texts: _Texts, job: Job) -> dict[str, Classes]:
    known, found = texts.of("train"), {}
    for part in texts.parts:
        train, asked = tfidf(known, texts.of(part))
        weights = fit_logistic(train, texts.labels["train"], len(job.inputs.label_names))
        found[part] = predict_logistic(weights, asked)
    return found


@dataclass(frozen=True, slots=True)
class _Features:
    """Frozen features `[n, D]` of training rows, at most so many, with their labels, and of the other sets."""

    train: NDArray[np.float32]
    labels: Classes
    parts: Mapping[str, NDArray[np.float32]]
    of_all: int


def _features(built: Built, job: Job) -> _Features:
    some = _spread(job.inputs.train, job.recipe.evaluate.baseline_rows)

    def of(samples: Sequence[Sample]) -> NDArray[np.float32]:
        return mean_hidden(built.stage.model, samples, collate=collate, max_tokens=job.eval_tokens, device=job.device)

    parts = {name: of(list(store)) for name, store in _parts(job).items()}
    return _Features(of(some), np.asarray([s.label for s in some], np.int64), parts, len(job.inputs.train))


def _probe(features: _Features, name: str, job: Job) -> tuple[dict[str, Classes], str]:
    classes, title = len(job.inputs.label_names), TITLES[name]
    if len(features.train) < features.of_all:
        title += f" ({len(features.train):,} of {features.of_all:,} training rows)"
    if name == "linear_probe":
        return {p: linear_probe(features.train, features.labels, x, classes) for p, x in features.parts.items()}, title
    return {p: features.labels[nearest(features.train, x)] for p, x in features.parts.items()}, title


def _measured(labels: Classes, said: Classes, seed: int) -> Measured:
    statistics = {name: CLASS_METRICS[name](labels, said) for name in METRICS}
    metrics = {name: bootstrap(statistic, seed=seed) for name, statistic in statistics.items()}
    return Measured(statistics, metrics | {"accuracy": wilson(int((labels == said).sum()), len(labels))})


def _shots(job: Job) -> int:
    return job.recipe.evaluate.prompting.shots


def label_words(job: Job) -> tuple[str, ...]:
    """The labels as a base may know them: the recipe's words, else their names."""
    given = {str(name): word for name, word in (job.recipe.evaluate.prompting.label_words or {}).items()}
    if unknown := sorted(set(given) - set(job.inputs.label_names)):
        raise RecipeError(f"evaluate.prompting.label_words names {', '.join(unknown)}; the labels are "
                          f"{', '.join(job.inputs.label_names)}")  # fmt: skip
    return tuple(given.get(name, name) for name in job.inputs.label_names)


def _prompted(built: Built, job: Job, *, shots: int) -> tuple[dict[str, Classes], str, float | None]:
    words = label_words(job)
    if is_encoder(job.base, trust=job.recipe.trust_remote_code):
        return _by_label_features(built, job, words), "zero-shot, cosine to the label's words, base untuned", None
    backbone = load_backbone(job.base, "causal", seed=job.recipe.seed, trust=job.recipe.trust_remote_code)
    model = LanguageModel(backbone, compute=job.compute).to(job.device)
    prompt = LabelPrompt(
        job.tokenizer, job.recipe.evaluate.prompting.template, words, tuple(_examples(job, shots)),
        context_of(model), job.recipe.data.on_too_long != "truncate_right",
    )  # fmt: skip
    found, tokens = {}, 0.0
    for part, store in _parts(job).items():
        found[part], tokens = score_labels(
            model, prompt, [s.ids.tolist() for s in store], collate=collate, max_tokens=job.eval_tokens,
            device=job.device,
        )  # fmt: skip
    title = TITLES["few_shot"] + f" ({shots} examples)" if shots else TITLES["zero_shot"]
    return found, title, tokens


def _examples(job: Job, shots: int) -> list[tuple[list[int], int]]:
    """`shots` training rows drawn by the seed, the labels in turn, each label's short half alone."""
    if not shots:
        return []
    draw = np.random.default_rng([job.recipe.seed, 17])
    train, classes = job.inputs.train, len(job.inputs.label_names)
    rows: dict[int, list[int]] = {c: [] for c in range(classes)}
    for i in draw.permutation(len(train)).tolist():
        rows[int(train[i].label)].append(i)  # type: ignore[arg-type]
    short = {c: [i for i in found if train.lengths[i] <= np.median(train.lengths[found])] for c, found in rows.items()}
    chosen = [short[c][n] for n in range(shots) for c in range(classes) if n < len(short[c])][:shots]
    return [(train[i].ids.tolist(), int(train[i].label)) for i in draw.permutation(chosen).tolist()]  # type: ignore[arg-type]


def context_of(model: Any) -> int:
    """Tokens that the model reads at most."""
    return context_tokens(model.backbone) or 512


def _by_label_features(built: Built, job: Job, words: Sequence[str]) -> dict[str, Classes]:
    """The label whose words, read by the same frozen encoder, are nearest by cosine (as in 1909.00161)."""

    def of(samples: Sequence[Sample]) -> NDArray[np.float32]:
        return mean_hidden(built.stage.model, samples, collate=collate, max_tokens=job.eval_tokens, device=job.device)

    ids = [np.asarray(encode_text(job.tokenizer, word, special=True), np.int32) for word in words]
    labels = of([Sample(row, np.zeros(len(row), np.float32), label=0) for row in ids])
    return {part: nearest(labels, of(list(store))) for part, store in _parts(job).items()}


# prompts and responses


def _sft(built: Built, job: Job, names: Sequence[str]) -> list[Baseline]:
    found = []
    for name in names:
        started = time.perf_counter()
        if name == "nearest_neighbour":
            title, on, tokens = "nearest training prompt's answer (TF-IDF)", _nearest_answers(job), None
        else:
            shots = _shots(job) if name == "few_shot" else 0
            title, on, tokens = _asked(built, job, shots)
        found.append(Baseline(name, title, on, tokens, time.perf_counter() - started))
    return found


def _asked(built: Built, job: Job, shots: int) -> tuple[str, dict[str, Measured], float]:
    """The base with `shots` training conversations before every held-out one: its loss and, scored, its completions."""
    model = built.plain or built.stage.model
    assert isinstance(model, LanguageModel)
    generate, draw = job.recipe.evaluate.generate, np.random.default_rng([job.recipe.seed, 17])
    train = job.inputs.train
    half = np.flatnonzero(train.lengths <= np.median(train.lengths))
    examples = [train[int(i)] for i in draw.permutation(half)[:shots]]
    room = context_of(model) - (generate.max_tokens if generate is not None else 0)
    found, tokens = {}, 0.0
    for part, store in _parts(job).items():
        prompted = with_examples(list(store), examples, job.tokenizer, room)
        likelihood = measure_likelihood(job, model, prompted, collate)
        completed = complete(job, model, prompted) if generate is not None and part == "held_out" else None
        found[part] = with_completions(likelihood, completed, scored=True, seed=job.recipe.seed)
        tokens = prompt_tokens(prompted.samples)
    title = TITLES["few_shot"] + f" ({shots} examples where they fit)" if shots else TITLES["zero_shot"]
    return title, found, tokens


def _nearest_answers(job: Job) -> dict[str, Measured]:
    generate, held_out = job.recipe.evaluate.generate, job.inputs.eval
    if generate is None or held_out is None:
        return {}
    known, asked = (questions_of(store, job.tokenizer, limit=limit)
                    for store, limit in ((job.inputs.train, None), (held_out, generate.examples)))  # fmt: skip
    prompts, answers = [q.prompt for q in known], [q.reference for q in known]
    said = nearest_answers(prompts, answers, [q.prompt for q in asked])
    result = GenerationResult(tuple(asked), tuple(said), (True,) * len(asked), ())
    return {"held_out": Measured(result.statistics(), result.metrics(seed=job.recipe.seed))}
