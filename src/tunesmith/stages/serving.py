"""A run or a model behind HTTP: conversations through the template of their training, texts, answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.encode import prompt_ids
from tunesmith.data.kinds import Message, Prompt
from tunesmith.errors import DataError, ModelError
from tunesmith.model.load import load_backbone, load_config, load_tokenizer
from tunesmith.model.score import ScoreModel
from tunesmith.plan.hardware import choose_device, choose_precision
from tunesmith.recipe import load_resolved
from tunesmith.rollout.rewards import Completed, Score
from tunesmith.rollout.sampler import Sampler
from tunesmith.serve.protocol import Answer, Ask, Limits, RequestError, Written
from tunesmith.serve.server import ModelServer, Served
from tunesmith.stages import sampling
from tunesmith.stages.bases import base_path
from tunesmith.stages.finals import classify_texts, longest_of, open_tuned, wrap
from tunesmith.stages.prepare import Say
from tunesmith.stages.rewarding import run_score
from tunesmith.stages.using import find_run, settled


@dataclass(frozen=True, slots=True)
class Language:
    """A language model that goes on with texts and answers conversations."""

    name: str
    speaker: sampling.Speaker
    sampler: Sampler
    kind: str = "language"

    def complete(self, ask: Ask) -> Answer:
        """Texts as they stand, begun as in training; a conversation through the run's template or the chat template."""
        tokenizer, draw = self.speaker.tokenizer, ask.draw
        prompts = (
            [self._asked(ask.messages)] if ask.messages else [prompt_ids(t, tokenizer, raw=True) for t in ask.texts]
        )
        self._refuse_misfits(prompts)
        rollouts = self.sampler.sample(
            prompts, num_per_prompt=draw.n, temperature=draw.temperature, top_p=draw.top_p, max_tokens=draw.max_tokens,
            seed=draw.seed, stop=draw.stop,
        )  # fmt: skip
        written = tuple(Written(rollout.text, len(rollout.ids), rollout.ended) for rollout in rollouts)
        return Answer(written, sum(map(len, prompts)))

    def _asked(self, messages: Sequence[Message]) -> list[int]:
        if self.speaker.template is not None and (len(messages) != 1 or messages[0].role != "user"):
            what = "this model was trained on a prompt template, which holds one user message and nothing else"
            raise RequestError(400, f"{what}; send that, or the whole text to /v1/completions", param="messages")
        return sampling.encode(self.speaker, sampling.Asked(Prompt(tuple(messages), origin="the request"), {}))

    def _refuse_misfits(self, prompts: Sequence[Sequence[int]]) -> None:
        room = self.speaker.context_tokens
        for i, ids in enumerate(prompts):
            if not ids:
                raise RequestError(400, f"prompt {i} has no token", param="prompt")
            if room is not None and len(ids) >= room:
                what = f"prompt {i} has {len(ids):,} tokens; the model takes {room:,} in all, prompt and completion"
                raise RequestError(400, what, code="context_length_exceeded")

    def label(self, texts: list[str]) -> list[dict[str, Any]]:
        raise ModelError("a language model has no labels")

    def score(self, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
        raise ModelError("a language model gives no scores")


@dataclass(frozen=True, slots=True)
class Classifier:
    """A model that labels texts, cut at their beginning when they are too long."""

    name: str
    model: ScoreModel
    tokenizer: Any
    labels: tuple[str, ...]
    max_tokens: int
    multi_label: bool
    kind: str = "classifier"

    def label(self, texts: list[str]) -> list[dict[str, Any]]:
        """`{text, answer, probabilities}` for each."""
        return classify_texts(self.model, self.tokenizer, texts, self.labels, self.max_tokens, self.multi_label)

    def complete(self, ask: Ask) -> Answer:
        raise ModelError("a classifier writes no text")

    def score(self, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
        raise ModelError("a classifier gives labels; ask with texts")


@dataclass(frozen=True, slots=True)
class Judge:
    """A reward model that scores answers to prompts."""

    name: str
    scored: Score
    template: str | None
    kind: str = "reward"

    def score(self, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
        """`{score}` for each."""
        items = [self._item(row) for row in rows]
        return [{"score": round(float(value), 6)} for value in self.scored(items)]

    def _item(self, row: dict[str, str]) -> Completed:
        turns = [Message("user", row["prompt"])]
        if self.template is not None:
            turns = sampling.through_template(self.template, sampling.Asked(Prompt(tuple(turns)), {}))
        return Completed(row["prompt"], row["response"], messages=tuple(turns), origin="the request")

    def complete(self, ask: Ask) -> Answer:
        raise ModelError("a reward model writes no text")

    def label(self, texts: list[str]) -> list[dict[str, Any]]:
        raise ModelError("a reward model scores an answer to a prompt")


def open_served(target: str | Path) -> Served:
    """The run of that name or folder, else a model folder or hub id, ready to answer. Raises what opening it raises."""
    run, name = find_run(target), str(target)
    if run is None:
        return _open_base(name)
    recipe = load_resolved(run.file("recipe"))
    device, precision = settled(run, recipe)
    if recipe.stage == "reward":
        return Judge(name, run_score(run, label=None, device=device, precision=precision), recipe.data.asked_by())
    if recipe.stage != "classify":
        return _language(name, sampling.open_speaker(target))
    tuned = open_tuned(run, device=device, precision=precision)
    assert isinstance(tuned.model, ScoreModel), "stage classify is a score model"
    longest = longest_of(recipe, tuned.backbone)
    return Classifier(name, tuned.model, tuned.tokenizer, tuned.label_names, longest, recipe.data.multi_label)


def _language(name: str, speaker: sampling.Speaker) -> Language:
    return Language(name, speaker, Sampler(speaker.model, speaker.tokenizer))


def _open_base(name: str) -> Served:
    base = base_path(name, Path.cwd())
    config = load_config(base)
    built = (config.architectures or [""])[0]
    if built.endswith("ForMaskedLM"):
        raise ModelError(f"{name} is a masked language model, which fills holes and does not answer")
    if not built.endswith("ForSequenceClassification"):
        return _language(name, sampling.open_speaker(name))
    labels = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
    if len(labels) < 2:
        raise ModelError(f"{name} gives a single score; serve the run of stage reward that made it, which knows how "
                         "prompts and answers were put together")  # fmt: skip
    device = choose_device("auto")
    backbone = load_backbone(base, "classifier", label_names=labels)
    if backbone.tunesmith_new:
        raise ModelError(f"{name} has no trained head ({', '.join(backbone.tunesmith_new)} is missing): train it first")
    model = wrap("classify", backbone, choose_precision("auto", device)).to(device).eval()
    assert isinstance(model, ScoreModel), "a classifier is a score model"
    multi = getattr(config, "problem_type", None) == "multi_label_classification"
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 512)
    return Classifier(name, model, load_tokenizer(base), labels, longest, multi)


def open_server(target: str | Path, *, host: str, port: int, max_tokens: int, say: Say) -> ModelServer:
    """The server, listening; `DataError` for limits that make no sense."""
    if max_tokens < 1:
        raise DataError(f"--max-tokens {max_tokens} must be at least 1")
    served = open_served(target)
    server = ModelServer(served, host, port, limits=Limits(max_tokens=max_tokens), say=say)
    say(f"{served.name} ({served.kind}) at {server.url}; Ctrl-C ends")
    if not server.loopback:
        say(f"warning: whoever reaches {server.url} can use it, without key and encryption; put a proxy that has both "
            "before it, or bind to 127.0.0.1")  # fmt: skip
    return server
