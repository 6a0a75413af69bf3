"""What one does with a finished run: measure it on other data, ask it, export it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.encode import prompt_ids
from tunesmith.data.records import read_records
from tunesmith.data.templates import get_template
from tunesmith.errors import DataError, ModelError, RecipeError, RunError
from tunesmith.export.merge import export_run
from tunesmith.export.publish import push, write_readme
from tunesmith.export.verify import agree, logits_of, probe_ids
from tunesmith.model.load import base_record, load_config, load_tokenizer
from tunesmith.model.quantize import quantized_as
from tunesmith.model.score import ScoreModel
from tunesmith.model.trainable import Trainable
from tunesmith.plan.hardware import choose_device, choose_precision
from tunesmith.recipe import Recipe, load_recipe, load_resolved
from tunesmith.recipe_metrics import metric_name, named
from tunesmith.rollout.sampler import Sampler
from tunesmith.rundir import RunDir, model_run, open_run
from tunesmith.stages import finals, mlm
from tunesmith.stages.finals import Tuned, classify_texts, longest_of, open_tuned
from tunesmith.stages.job import Inputs, Job, Measured, text_tokens
from tunesmith.stages.named_code import located, reward_functions, with_rewards
from tunesmith.stages.own_metrics import Given, Own, given_metrics
from tunesmith.stages.prepare import (
    ONLINE,
    STAGES,
    Say,
    Sets,
    labels_of,
    load_model,
    make_encoder,
    read_sets,
    store_of,
    tally,
)


def evaluate(
    target: str | Path, data: str, *, stage: str | None, metrics: Sequence[Given] = (), rewards: Sequence[str] = (),
    say: Say,
) -> dict[str, Any]:  # fmt: skip
    """`{model, stage, data, metrics, ...}` of a run or of any model folder or hub id; `metrics` are the user's own.

    Python that the run's recipe names runs only where it is named here, as one of `metrics` or `rewards`.
    """
    run = find_run(target)
    if run is None and rewards:
        raise RecipeError(f"--reward is for runs that have a reward; {target} is no run")
    model = _of_run(run, data, rewards) if run is not None else _of_base(str(target), data, stage)
    records = read_sets(model.recipe, Path.cwd()).train
    measured, _ = _measured(model, run, records, say, metrics)
    return _evaluation(str(target), data, model.recipe, measured)


def measure_records(run: RunDir, records: Any, recipe: Recipe, folder: Path) -> tuple[Measured, list[str]]:
    """A run on any records of its stage, and where each row that was measured stands.

    The user has named `recipe`, whose paths begin in `folder`, so the metrics and the reward functions in it run.
    """
    metrics = located(named(recipe.evaluate.metrics), folder)
    rewards = reward_functions(recipe) if recipe.stage in ONLINE else []
    model = _of_run(run, None, located(rewards, folder))
    return _measured(model, run, records, _silent, metrics)


def _silent(_: str) -> None:
    return None


def _measured(
    model: _Model, run: RunDir | None, records: Any, say: Say, metrics: Sequence[Given] = ()
) -> tuple[Measured, list[str]]:
    own = _own(model.recipe, run, records, metrics, say)
    labels = model.labels
    if not labels and model.recipe.stage == "classify":
        labels = _own_labels(model.base, Sets(records, None, None))
    backbone = model.backbone if model.backbone is not None else load_model(model.recipe, model.base, labels)
    if run is None and model.recipe.stage == "mlm":
        mlm.head_note(model.base, backbone, ())
    context = text_tokens(model.recipe, base_record(model.base, trust=model.recipe.trust_remote_code))
    encoder = make_encoder(model.recipe, model.tokenizer, labels, context)
    store = store_of(records, encoder, model.recipe, context, say=say)
    say(f"{records.describe()}: {len(store):,} samples")
    for text in tally(store):
        say(text)
    job = Job(
        model.recipe, model.tokenizer, Inputs(store, store, None, label_names=labels), backbone, model.trainable,
        model.device, model.precision, base=model.base, folder=_folder_of(run), say=say, own=own,
        start=None if run is None else partial(finals.untrained, run),
    )  # fmt: skip
    measured = STAGES[model.recipe.stage].build(job).measure(store, True)
    return measured, [store.origin(i) for i in range(len(store))]


def _own(recipe: Recipe, run: RunDir | None, records: Any, metrics: Sequence[Given], say: Say) -> Own | None:
    """The metrics given here. Those of the run's recipe are told of: nobody named them here, so they do not run."""
    own = given_metrics(recipe.stage, metrics, records, "--metric")
    given, asked = () if own is None else own.names, named(recipe.evaluate.metrics)
    for text, path in zip(asked, located(asked, _folder_of(run)), strict=True):
        if metric_name(text) not in given:
            say(f"note: metric {text} of the run's recipe is left out, Python that nobody named here; read it, and add "
                f"--metric {path}")  # fmt: skip
    return own


@dataclass(frozen=True, slots=True)
class _Model:
    """What is evaluated; `backbone` None is still to be loaded, when the labels are known."""

    recipe: Recipe
    tokenizer: Any
    base: str
    trainable: Trainable
    device: str
    precision: str
    labels: tuple[str, ...] = ()
    backbone: Any = None


def _folder_of(run: RunDir | None) -> Path:
    """Where the paths of a run's recipe begin."""
    return Path.cwd() if run is None else Path(run.read_json("inputs")["recipe_folder"])


def find_run(target: str | Path) -> RunDir | None:
    """The run of that name or folder; None when it is no run. A run that is not finished is still one."""
    try:
        return model_run(open_run(target))
    except RunError:
        return None


def settled(run: RunDir, recipe: Recipe) -> tuple[str, str]:
    """(device, precision) the run was trained with, or what this machine has when that device is not here."""
    began = run.read_json("environment")
    try:
        device = choose_device(began["device"])
    except ValueError:
        device = choose_device("auto")
    if device.partition(":")[0] == began["device"].partition(":")[0]:
        return device, began["precision"]
    return device, choose_precision(recipe.precision, device)


def _of_run(run: RunDir, data: str | None, rewards: Sequence[str]) -> _Model:
    device, precision = settled(run, load_resolved(run.file("recipe")))
    tuned, only = open_tuned(run, precision=precision), {} if data is None else _only(data)
    recipe = tuned.recipe.model_copy(update={"data": tuned.recipe.data.model_copy(update=only)})
    recipe = with_rewards(recipe, rewards)
    return _Model(
        recipe, tuned.tokenizer, tuned.base, tuned.trainable, device, precision, tuned.label_names, tuned.backbone
    )


def _of_base(base: str, data: str, stage: str | None) -> _Model:
    stage = stage or _guess_stage(base, data)
    policy = "split" if stage in ("pretrain", "mlm") else "truncate_left"
    recipe = load_recipe({"stage": stage, "base": base, "data": {**_only(data), "on_too_long": policy}}).recipe
    device = choose_device("auto")
    trainable = Trainable("none", (), 0, 0, 0, (), ())
    return _Model(recipe, load_tokenizer(base), base, trainable, device, choose_precision("auto", device))


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


def _guess_stage(base: str, data: str) -> str:
    """By what the model was built as and, for a causal one, by whether the data has answers."""
    built = (load_config(base).architectures or [""])[0]
    if built.endswith("ForSequenceClassification"):
        return "classify"
    if built.endswith("ForMaskedLM"):
        return "mlm"
    try:
        next(iter(read_records(data, stage="sft")))
    except DataError:
        return "pretrain"
    return "sft"


def _own_labels(base: str, sets: Sets) -> tuple[str, ...]:
    """The label names a classifier was saved with; those of the data must be among them."""
    config = load_config(base)
    names = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
    unknown = sorted(set(labels_of(sets.train)) - set(names))
    if unknown:
        raise DataError(f"the data has the labels {', '.join(unknown[:10])}, and {base} knows {', '.join(names[:20])}")
    return names


def predict(run: RunDir, texts: Sequence[str], *, max_tokens: int = 256) -> list[dict[str, Any]]:
    """Labels with probabilities, or greedy completions, in the order of `texts`."""
    return answers(opened(run), texts, max_tokens, 0.0, 0)


def chat(run: RunDir) -> Callable[..., str]:
    """The run opened once: `ask(prompt, max_tokens, temperature, seed)` gives a completion, or a classifier's label."""
    tuned = opened(run)

    def ask(prompt: str, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> str:
        return str(answers(tuned, [prompt], max_tokens, temperature, seed)[0]["answer"])

    return ask


def opened(run: RunDir) -> Tuned:
    """The finished run, where it was trained; `RecipeError` for a masked language model, which does not answer."""
    device, precision = settled(run, load_resolved(run.file("recipe")))
    tuned = open_tuned(run, device=device, precision=precision)
    if tuned.recipe.stage == "mlm":
        raise RecipeError(f"{run.path} is a masked language model, which fills holes and does not answer")
    return tuned


def answers(
    tuned: Tuned, texts: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[dict[str, Any]]:
    """`{text, answer}` for each text, a classifier's with probabilities."""
    if tuned.recipe.stage == "reward":
        raise RecipeError(f"{tuned.run.path} is a reward model: it scores answers to prompts and has none of its own; "
                          "measure it with `tunesmith eval`, or use it as `reward.run`")  # fmt: skip
    if isinstance(tuned.model, ScoreModel):
        data = tuned.recipe.data
        return classify_texts(
            tuned.model,
            tuned.tokenizer,
            texts,
            tuned.label_names,
            longest_of(tuned.recipe, tuned.backbone),
            data.multi_label,
        )
    prompts = [encode_prompt(tuned, text) for text in texts]
    rollouts = Sampler(tuned.model, tuned.tokenizer).sample(
        prompts, max_tokens=max_tokens, temperature=temperature, seed=seed
    )
    answers = [tuned.tokenizer.decode(rollout.ids, skip_special_tokens=True) for rollout in rollouts]
    return [{"text": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]


def encode_prompt(tuned: Tuned, prompt: str) -> list[int]:
    """The prompt as training saw prompts: through the run's template, the chat template, or as it stands."""
    sampling = tuned.recipe.sampling
    if tuned.recipe.stage == "pretrain" or (sampling is not None and sampling.continue_prompt):
        return prompt_ids(prompt, tuned.tokenizer, raw=True)
    if tuned.template is not None:
        template = get_template(tuned.template)
        wanted = [name for name in template.columns if "{" + name + "}" in template.prompt]
        if len(wanted) != 1:
            raise DataError(f"the run's template asks for {', '.join(wanted)}; `chat` takes one text only")
        return prompt_ids(template.render({wanted[0]: prompt}, completion=False)[0], tuned.tokenizer, plain=True)
    return prompt_ids(prompt, tuned.tokenizer)


def export(run: RunDir, to: Path, format: str, *, push_to: str | None, say: Say) -> dict[str, Any]:
    """Write adapter or merged model to a new folder, verified against the trained model first."""
    if format not in ("adapter", "merged"):
        raise ModelError(f"there is no export format `{format}`; take adapter or merged")
    tuned = open_tuned(run)
    if format == "adapter" and tuned.recipe.tune.method not in ("lora", "peft"):
        raise ModelError(
            f"{run.path} trained by method {tuned.recipe.tune.method}, which has no adapter; take --format merged"
        )
    config = tuned.backbone.config.get_text_config()
    probes = probe_ids(config.vocab_size, avoid=config.pad_token_id)
    library = "peft" if format == "adapter" else "transformers"

    def card(folder: Path) -> None:
        write_readme(run, folder, library=library)

    done = export_run(
        tuned.backbone, tuned.tokenizer, to, format, base_name=tuned.recipe.base, probes=probes, beside=card
    )  # type: ignore[arg-type]
    say(f"{format} written to {done.folder} ({done.num_bytes:,} bytes)")
    if push_to is not None:
        say(f"sent to {push(done.folder, push_to)}, which is private")
    agreement = (
        None if done.agreement is None else {"error": done.agreement.error, "tolerance": done.agreement.tolerance}
    )
    result = {
        "run": run.name,
        "format": format,
        "folder": str(done.folder),
        "bytes": done.num_bytes,
        "agreement": agreement,
    }
    return result | _on_plain_base(run, tuned, probes, say)


def _on_plain_base(run: RunDir, tuned: Tuned, probes: Sequence[Sequence[int]], say: Say) -> dict[str, Any]:
    """How far the adapter of a quantised run is from what was trained where it stands on the base's own weights."""
    kind = quantized_as(tuned.backbone)
    if kind is None:
        return {}
    plain = open_tuned(run, quantized=False)
    apart = agree(logits_of(tuned.backbone, probes), logits_of(plain.backbone, probes), torch.float32)
    say(f"trained beside the base in {kind}; on the base's own weights the adapter's logits differ by "
        f"{apart.error:.1e} of the largest, {apart.kl:.1e} nats a token; merged, it is what was trained")  # fmt: skip
    return {"on_plain_base": {"trained_beside": kind, "error": apart.error, "kl": apart.kl}}
