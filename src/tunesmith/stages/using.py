"""What one does with a finished run: measure it on other data, ask it, export it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.data.encode import prompt_ids
from tunesmith.data.store import build_store
from tunesmith.data.templates import get_template
from tunesmith.errors import DataError, ModelError, RecipeError, TunesmithError
from tunesmith.export.merge import export_run
from tunesmith.export.verify import probe_ids
from tunesmith.model.load import base_record, load_config, load_tokenizer
from tunesmith.model.score import ScoreModel
from tunesmith.model.trainable import Trainable
from tunesmith.recipe import Recipe, load_recipe
from tunesmith.rollout.sampler import Sampler
from tunesmith.rundir import RunDir, open_run
from tunesmith.stages.finals import Tuned, classify_texts, open_tuned
from tunesmith.stages.job import Inputs, Job, Measured
from tunesmith.stages.prepare import STAGES, Say, Sets, cache_folder, labels_of, load_model, make_encoder, read_sets


def evaluate(target: str | Path, data: str, *, stage: str | None, say: Say) -> dict[str, Any]:
    """`{model, stage, data, metrics, ...}` of a run or of any model folder or hub id."""
    try:
        run = open_run(target)
    except TunesmithError:
        run = None
    if run is not None:
        tuned = open_tuned(run)
        recipe, backbone, tokenizer, labels = tuned.recipe, tuned.backbone, tuned.tokenizer, tuned.label_names
        base, trainable = tuned.base, tuned.trainable
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=_only(data))})
    else:
        recipe = load_recipe(
            {"stage": stage or _guess_stage(str(target)), "base": str(target), "data": _only(data)}
        ).recipe
        base, tokenizer, labels, backbone = str(target), load_tokenizer(str(target)), (), None
        trainable = Trainable("none", (), 0, 0, 0, (), ())
    sets = read_sets(recipe, Path.cwd())
    labels = labels or (_own_labels(base, sets) if recipe.stage == "classify" else ())
    backbone = backbone if backbone is not None else load_model(recipe, base, labels)
    context = base_record(base, trust=recipe.trust_remote_code)["context_tokens"]
    store = build_store(sets.train, make_encoder(recipe, tokenizer, labels, context), cache_folder())
    say(f"{sets.train.describe()}: {len(store):,} samples")
    job = Job(recipe, tokenizer, Inputs(store, store, None, label_names=labels), backbone, trainable, "cpu", "float32")
    measured: Measured = STAGES[recipe.stage].build(job).measure(store, True)
    return _evaluation(str(target), data, recipe, measured)


def _only(data: str) -> dict[str, Any]:
    return {"train": data, "eval": None, "test": None, "mix": None, "split": None}


def _evaluation(target: str, data: str, recipe: Recipe, measured: Measured) -> dict[str, Any]:
    out: dict[str, Any] = {
        "model": target, "stage": recipe.stage, "data": data, "metrics": measured.as_json()
    }  # fmt: skip
    if measured.predictions:
        out["predictions"] = [dict(row) for row in measured.predictions]
    if measured.generation is not None:
        out["completions"] = list(measured.generation.completions)
    return out


def _guess_stage(base: str) -> str:
    built = (load_config(base).architectures or [""])[0]
    if built.endswith("ForSequenceClassification"):
        return "classify"
    return "mlm" if built.endswith("ForMaskedLM") else "pretrain"


def _own_labels(base: str, sets: Sets) -> tuple[str, ...]:
    """The label names a classifier was saved with; those of the data must be among them."""
    config = load_config(base)
    names = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
    unknown = sorted(set(labels_of(sets.train)) - set(names))
    if unknown:
        raise DataError(f"the data has the labels {', '.join(unknown[:10])}, and {base} knows {', '.join(names[:20])}")
    return names


def predict(run: RunDir, texts: Sequence[str], *, say: Say) -> list[dict[str, Any]]:
    """Labels with probabilities, or greedy completions."""
    tuned = open_tuned(run)
    if isinstance(tuned.model, ScoreModel):
        longest = tuned.recipe.data.max_length or 512
        return classify_texts(
            tuned.model, tuned.tokenizer, texts, tuned.label_names, longest, tuned.recipe.data.multi_label
        )
    return [{"text": text, "answer": _complete(tuned, text, 256, 0.0, 0)} for text in texts]


def chat(run: RunDir, prompt: str, *, max_tokens: int, temperature: float, seed: int) -> str:
    """One completion, or the label for a classifier."""
    tuned = open_tuned(run)
    if isinstance(tuned.model, ScoreModel):
        longest = tuned.recipe.data.max_length or 512
        found = classify_texts(
            tuned.model, tuned.tokenizer, [prompt], tuned.label_names, longest, tuned.recipe.data.multi_label
        )
        return str(found[0]["answer"])
    return _complete(tuned, prompt, max_tokens, temperature, seed)


def _complete(tuned: Tuned, prompt: str, max_tokens: int, temperature: float, seed: int) -> str:
    if tuned.recipe.stage == "mlm":
        raise RecipeError(f"{tuned.run.path} is a masked language model, which fills holes and does not answer")
    ids = encode_prompt(tuned, prompt)
    sampler = Sampler(tuned.model, tuned.tokenizer)
    rollout = sampler.sample([ids], max_tokens=max_tokens, temperature=temperature, seed=seed)[0]
    return str(tuned.tokenizer.decode(rollout.ids, skip_special_tokens=True))


def encode_prompt(tuned: Tuned, prompt: str) -> list[int]:
    """The prompt as training saw prompts: through the run's template, the chat template, or as it stands."""
    if tuned.recipe.stage == "pretrain":
        return prompt_ids(prompt, tuned.tokenizer, raw=True)
    if tuned.template is not None:
        template = get_template(tuned.template)
        wanted = [name for name in template.columns if "{" + name + "}" in template.prompt]
        if len(wanted) != 1:
            raise DataError(f"the run's template asks for {', '.join(wanted)}; `chat` takes one text only")
        return prompt_ids(template.render({wanted[0]: prompt}, completion=False)[0], tuned.tokenizer, plain=True)
    return prompt_ids(prompt, tuned.tokenizer)


def export(run: RunDir, to: Path, format: str, *, say: Say) -> dict[str, Any]:
    """Write adapter or merged model to a new folder, verified against the trained model first."""
    tuned = open_tuned(run)
    if format not in ("adapter", "merged"):
        raise ModelError(f"there is no export format `{format}`; take adapter or merged")
    if format == "adapter" and tuned.recipe.tune.method not in ("lora", "peft"):
        raise ModelError(
            f"{run.path} trained by method {tuned.recipe.tune.method}, which has no adapter; take --format merged"
        )
    config = tuned.backbone.config.get_text_config()
    probes = probe_ids(config.vocab_size, avoid=config.pad_token_id)
    done = export_run(tuned.backbone, tuned.tokenizer, to, format, base_name=tuned.recipe.base, probes=probes)  # type: ignore[arg-type]
    say(f"{format} written to {done.folder} ({done.num_bytes:,} bytes)")
    agreement = (
        None if done.agreement is None else {"error": done.agreement.error, "tolerance": done.agreement.tolerance}
    )
    return {
        "run": run.name,
        "format": format,
        "folder": str(done.folder),
        "bytes": done.num_bytes,
        "agreement": agreement,
    }
