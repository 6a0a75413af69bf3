"""Every key and value of a recipe: typos named, bad values refused, origins kept, and all of it at once."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import yaml

from tunesmith.errors import RecipeError
from tunesmith.recipe import MixPart, known_keys, load_recipe

BASE = {"stage": "sft", "base": "some/base", "data": {"train": "rows.jsonl", "split": {"eval": 0.1}}}


def _nested(key: str, value) -> dict:
    *parents, last = key.split(".")
    whole = at = {}
    for parent in parents:
        at[parent] = {}
        at = at[parent]
    at[last] = value
    return whole


def _with(key: str, value, base=BASE) -> dict:
    """`base` with one more key."""
    whole = yaml.safe_load(yaml.safe_dump(base))
    *parents, last = key.split(".")
    at = whole
    for parent in parents:
        at = at.setdefault(parent, {})
    at[last] = value
    return whole


def _said(source, *overrides) -> str:
    with pytest.raises(RecipeError) as refused:
        load_recipe(source, overrides)
    return str(refused.value)


def _typos(word: str, rng: random.Random) -> set[str]:
    """Every one-letter deletion and swap, and an insertion and a replacement at every place."""
    letters, found = "abcdefghijklmnopqrstuvwxyz_", set()
    for i in range(len(word) + 1):
        found.add(word[:i] + rng.choice(letters) + word[i:])
        if i < len(word):
            found |= {word[:i] + word[i + 1 :], word[:i] + rng.choice(letters) + word[i + 1 :]}
        if i + 1 < len(word):
            found.add(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    return found - {"", word}


def test_every_typo_in_every_key_is_refused_and_the_right_key_named_first():
    keys = list(known_keys())
    keys += sorted({key[:i] for key in keys for i in range(len(key)) if key[i] == "."})
    rng, wrong, named = random.Random(0), 0, 0
    for key in keys:
        section, _, word = key.rpartition(".")
        beside = {k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section} | {"extends", "stages"}
        for typo in sorted(_typos(word, rng) - beside):
            written = f"{section}.{typo}".lstrip(".")
            said = _said(_nested(written, 1))
            wrong += 1
            named += f"there is no key `{written}`; did you mean `{word}`?" in said
            assert f"there is no key `{written}`" in said
    assert wrong > 2000 and named / wrong >= 0.95


def test_typos_in_a_part_of_a_mix_and_keys_of_another_section_are_named():
    data = {"mix": [{"path": "a", "weigth": 2}]}
    assert "no key `data.mix.0.weigth`; did you mean `weight`?" in _said({**BASE, "data": data})
    assert "did you mean `train.learning_rate`?" in _said({**BASE, "learning_rate": 1e-4})
    assert set(MixPart.model_fields) >= {"path", "weight"}


BAD = [
    ("train.learning_rate", v) for v in (-1, 0, float("nan"), float("inf"), "fast", "1e-4", [1], True, {}, 11)
] + [
    ("train.epochs", v) for v in (0, -2, "3", False, {}, float("inf"))
] + [
    ("train.steps", v) for v in (0, 1.5, "many", True, -5)
] + [
    ("train.batch_examples", v) for v in (0, -1, 2.5, "16", [])
] + [
    ("train.weight_decay", v) for v in (-0.1, 1, "x")
] + [
    ("train.optimizer", v) for v in ("adam", 3, "")
] + [
    ("train.warmup", v) for v in (-1, 1.5, "a")
] + [
    ("train.clip_norm", v) for v in (0, -1, "one")
] + [
    ("train.early_stopping", v) for v in (3, {"patience": 0}, {"patienc": 3})
] + [
    ("tune.method", v) for v in ("lor", 1, True)
] + [
    ("tune.rank", v) for v in (0, -4, 1.5, "16", True)
] + [
    ("tune.dropout", v) for v in (1, -0.1, "0.1")
] + [
    ("tune.alpha", v) for v in (0, -1, float("nan"))
] + [
    ("tune.targets", v) for v in ("everything", 3, [1])
] + [
    ("data.max_length", v) for v in (0, -1, 2.5, "512")
] + [
    ("data.on_too_long", v) for v in ("truncate", True, 1)
] + [
    ("data.on_bad_row", "ignore"), ("data.columns", ["text"]), ("data.columns", {"text": 3}), ("data.split", 0.1),
    ("data.split.eval", 1), ("data.split.eval", -0.1), ("data.mix", []), ("seed", -1), ("seed", 1.5), ("seed", "42"),
    ("precision", "fp16"), ("threads", 0), ("device", 0), ("base", 3), ("base", None),
    ("data", "rows.jsonl"), ("tune", []), ("evaluate.samples", -1), ("evaluate.generate.max_tokens", 0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD, ids=[f"{k}={v!r}" for k, v in BAD])
def test_a_bad_value_is_refused_by_name(key, value):
    assert len(BAD) >= 60
    said = _said(_with(key, value))
    assert f"`{key}" in said or f"`{key.rpartition('.')[0]}" in said, said
    assert "Traceback" not in said and "pydantic" not in said.casefold()


def _write(tmp_path, text: str, name: str = "r.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


GOOD = "stage: sft\nbase: some/base\ndata:\n  train: rows.jsonl\n  split: {eval: 0.1}\n"


def test_all_problems_stand_in_one_message_with_their_lines(tmp_path):
    path = _write(
        tmp_path, "stage: sfd\nbass: x\ndata:\n  trian: a\n  max_length: no\ntrain:\n  epochs: '3'\n  seed: 1\n"
    )
    said = _said(path, "oops", "train.steps=0")
    for line, text in (
        (1, "there is no stage `sfd`; did you mean `sft`?"), (2, "there is no key `bass`; did you mean `base`?"),
        (4, "there is no key `data.trian`; did you mean `train`?"), (5, "`data.max_length` is 'no'"),
        (7, "`train.epochs` is '3'"), (8, "there is no key `train.seed`; did you mean `seed`?"),
    ):  # fmt: skip
        assert f"{path}:{line}: {text}" in said
    assert "write 3 without them" in said and "`base` is missing" in said
    assert "`oops` is not an override" in said and "`train.steps` is 0" in said


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2.0E-5", 2e-5), ("0.001", 1e-3), ("1", 1.0)])
def test_a_rate_is_a_number_however_it_is_written(text, value, tmp_path):
    resolved = load_recipe(_write(tmp_path, f"{GOOD}train: {{learning_rate: {text}}}\n"))
    assert resolved.recipe.train.learning_rate == value
    assert load_recipe(BASE, [f"train.learning_rate={text}"]).recipe.train.learning_rate == value


def test_every_value_has_an_origin(tmp_path):
    _write(tmp_path, "stage: sft\nbase: other/base\ntrain: {epochs: 2, clip_norm: 0.5}\n", "parent.yaml")
    path = _write(tmp_path, "extends: parent.yaml\nbase: some/base\ndata: {train: rows.jsonl}\ntrain: {epochs: 4}\n")
    resolved = load_recipe(path, ["train.weight_decay=0.1", "tune={method: lora, rank: 8}"])
    assert (
        resolved.recipe.train.epochs == 4 and resolved.recipe.train.clip_norm == 0.5 and resolved.recipe.tune.rank == 8
    )
    wanted = {
        "base": "user", "train.epochs": "user", "stage": "extends parent.yaml",
        "train.clip_norm": "extends parent.yaml", "train.weight_decay": "override", "tune.rank": "override",
        "tune.alpha": "derived", "train.learning_rate": "derived", "seed": "default",
    }  # fmt: skip
    assert {key: resolved.origins[key] for key in wanted} == wanted


def test_a_fault_in_the_parent_is_named_there(tmp_path):
    parent = _write(tmp_path, "stage: sft\ntrain:\n  epochs: -1\n", "parent.yaml")
    path = _write(tmp_path, "extends: parent.yaml\nbase: b\ndata: {train: rows.jsonl}\nsede: 1\n")
    said = _said(path)
    assert f"{parent}:3: `train.epochs` is -1" in said and f"{path}:4: there is no key `sede`" in said


def test_extending_in_a_circle_or_out_of_the_folder_is_refused(tmp_path):
    _write(tmp_path, "extends: b.yaml\n", "a.yaml")
    assert "extends itself" in _said(_write(tmp_path, "extends: a.yaml\n", "b.yaml"))
    inside = tmp_path / "inside"
    inside.mkdir()
    assert "leaves the recipe's folder" in _said(_write(inside, "extends: ../a.yaml\n"))
    assert "there is no recipe" in _said(_write(tmp_path, "extends: none.yaml\n"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tune": {"method": "full"}},
        {"tune": {"method": "last_layers", "layers": 2}},
        {"train": {"clip_norm": None, "steps": 5, "learning_rate": 1e-4}},
        {"stage": "pretrain", "data": {"train": "ä b.txt"}},
        {"data": {"mix": [{"path": "a", "weight": 2.0}, {"path": "b"}]}},
        {"data": {"train": "x", "template": "{a}: {b}\n"}},
    ],
)
def test_the_resolved_recipe_reads_back_as_the_same(changes, tmp_path):
    first = load_recipe({**BASE, **changes})
    again = load_recipe(_write(tmp_path, first.to_yaml()))
    assert again.recipe == first.recipe and load_recipe(yaml.safe_load(first.to_yaml())).recipe == first.recipe


def test_overrides_make_sections_and_what_is_none_is_named():
    resolved = load_recipe(
        BASE, ["evaluate.generate.max_tokens=7", "tune.targets=[q_proj, v_proj]", "run=null", "base='1e5'"]
    )
    assert resolved.recipe.evaluate.generate.max_tokens == 7 and resolved.recipe.tune.targets == ["q_proj", "v_proj"]
    assert resolved.recipe.run is None and resolved.recipe.base == "1e5"
    said = _said(BASE, "noequals", "=1", "base.x=1", "train.lerning_rate=1")
    assert said.count("is not an override") == 2 and "`base.x=1`: base holds a value, not a section" in said
    assert "there is no key `train.lerning_rate`; did you mean `learning_rate`?" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {}}, "name the training data once"),
        ({"data": {"train": "a", "mix": [{"path": "b"}]}}, "name the training data once"),
        ({"train": {"epochs": 1, "steps": 3}}, "keep one"),
        ({"train": {"batch_examples": 1, "batch_tokens": 3}}, "keep one"),
        ({"train": {"warmup": 1.5}}, "a share below 1 or a whole number"),
        ({"train": {"select_by": "accuracy"}}, "is not measured in stage sft"),
        ({"data": {"train": "a"}, "train": {"select_by": "loss"}}, "needs held-out rows"),
        ({"data": {"train": "a", "on_too_long": "split"}}, "would cut an answer in two"),
        ({"tune": {"method": "full", "rank": 4}}, "`tune.rank` does nothing with method full"),
        ({"tune": {"method": "peft"}}, "method peft needs"),
        ({"tune": {"method": "head"}}, "method head"),
        ({"data": {"train": "a", "mask_rate": 0.2}}, "`data.mask_rate` does nothing in stage sft"),
        ({"tune": {"adapter": "a", "rank": 4}}, "`tune.rank` does nothing beside `tune.adapter`"),
        ({"train": {"select_by": None, "early_stopping": {"patience": 1}}}, "`train.early_stopping` needs a metric"),
    ],
)
def test_keys_that_contradict_each_other_or_do_nothing_are_refused(changes, said):
    assert said in _said({**BASE, **changes})


def test_a_key_of_another_method_that_is_null_is_not_given():
    assert load_recipe({**BASE, "tune": {"method": "full", "rank": None}}).recipe.tune.method == "full"


def _mixed(*templates, stage="sft", **data):
    parts = [{"path": f"{i}.jsonl"} | ({} if t is None else {"template": t}) for i, t in enumerate(templates)]
    return {"stage": stage, "base": "b", "data": {"mix": parts, "eval": "e.jsonl", **data}}


def test_the_template_that_all_parts_of_a_mix_share_is_the_one_of_eval_and_of_later_prompts():
    shared = load_recipe(_mixed("qa", "qa"))
    assert shared.recipe.data.asked_by() == "qa" and shared.origins["data.template"] == "derived"
    assert load_recipe(_mixed(None, "none")).recipe.data.asked_by() is None


@pytest.mark.parametrize("templates", [("qa", "alpaca"), ("qa", None), ("qa", "none")])
def test_parts_of_a_mix_with_different_templates_need_one_for_eval(templates):
    assert "name as `data.template` the one of held-out rows" in _said(_mixed(*templates))
    named, without = (load_recipe(_mixed(*templates, template=name)).recipe.data for name in ("alpaca", "none"))
    assert (named.asked_by(), named.asked_by("qa"), named.asked_by("none")) == ("alpaca", "qa", None)
    assert (without.asked_by(), without.asked_by("qa")) == (None, "qa")


def test_an_adapter_that_is_gone_on_from_keeps_its_own_settings():
    tune = load_recipe({**BASE, "tune": {"adapter": "a"}}).recipe.tune
    assert (tune.rank, tune.alpha, tune.targets) == (None, None, None)
    assert load_recipe(BASE).recipe.tune.rank == 16


def test_a_rate_of_the_other_kind_of_run_is_pointed_out():
    full = load_recipe({**BASE, "tune": {"method": "full"}, "train": {"learning_rate": 2e-4}})
    lora = load_recipe({**BASE, "train": {"learning_rate": 1e-5}})
    assert "an adapter's rate" in full.warnings[0] and "a full run's rate" in lora.warnings[0]
    assert not load_recipe(BASE).warnings
    rates = {m: load_recipe({**BASE, "tune": {"method": m}}).recipe.train.learning_rate for m in ("full", "lora")}
    assert rates["lora"] == 10 * rates["full"]
    assert "cannot tell whether it helped" in load_recipe({**BASE, "data": {"train": "a"}}).warnings[-1]


def test_a_recipe_is_checked_without_torch():
    program = (
        "import sys; from tunesmith.recipe import load_recipe\n"
        "try: load_recipe({'stage': 'sfd'})\n"
        "except Exception as error: assert 'did you mean' in str(error)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_text_that_is_no_recipe_is_named(tmp_path):
    assert "a recipe is a list of `key: value` lines" in _said(_write(tmp_path, "- a\n- b\n"))
    assert "a recipe is a list of `key: value` lines" in _said(_write(tmp_path, ""))


def test_a_section_written_as_a_value_is_told_its_keys(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stage: sft\nbase: here\ndata: {train: rows.jsonl, split: 0.25}\ntune: lora\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    said = str(caught.value)
    assert ":3: `data.split` is 0.25, and takes keys of its own: eval, test" in said
    assert ":4: `tune` is 'lora', and takes keys of its own: method, " in said
