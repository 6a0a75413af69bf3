"""Every metric against a case worked out by hand, and scikit-learn, scipy and sacrebleu on random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_causal, tiny_classifier, tiny_tokenizer

from tunesmith.batch import Batch, Outputs, Sample
from tunesmith.errors import DataError
from tunesmith.evaluate import tasks
from tunesmith.evaluate.classify import ScoreResult, evaluate_scores
from tunesmith.evaluate.generate import evaluate_generation, questions_of, side_by_side
from tunesmith.evaluate.likelihood import (
    LikelihoodResult,
    bytes_of_tokens,
    evaluate_likelihood,
    token_batches,
)
from tunesmith.model.language import LanguageModel
from tunesmith.model.score import ScoreModel
from tunesmith.rollout.sampler import Sampler


@dataclass
class Store:
    """Samples in memory."""

    rows: list[Sample]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(r) for r in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Sample:
        return self.rows[index]


def sample(ids: Sequence[int], weights: Sequence[float], label: Any = None, origin: str = "") -> Sample:
    return Sample(np.array(ids, np.int32), np.array(weights, np.float32), label=label, origin=origin)


def flat(samples: Sequence[Sample]) -> Batch:
    ids = [torch.from_numpy(s.ids.astype(np.int64)) for s in samples]
    targets = [torch.cat([i[1:], i[:1]]) for i in ids]
    weights = [torch.from_numpy(np.append(s.weights[1:], np.float32(0))) for s in samples]
    labels = None if any(s.label is None for s in samples) else torch.tensor([s.label for s in samples])
    return Batch(
        torch.cat(ids)[None],
        torch.cat(targets)[None],
        torch.cat(weights)[None],
        torch.cat([torch.arange(len(i)) for i in ids])[None],
        torch.cat([torch.full((len(i),), n) for n, i in enumerate(ids)])[None],
        labels=labels,
        origins=tuple(s.origin for s in samples),
        lengths=tuple(len(s) for s in samples),
    )


LABELS, GUESSES = [0, 0, 1, 1], [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (tasks.accuracy, 3 / 4),
        (tasks.precision, (1 / 1 + 2 / 3) / 2),
        (tasks.recall, (1 / 2 + 2 / 2) / 2),
        (tasks.f1, (2 / 3 + 4 / 5) / 2),
        (tasks.mcc, 2 / math.sqrt(1 * 3 * 2 * 2)),  # (tp·tn - fp·fn) / √(predicted 0 · 1, true 0 · 1) = (2 - 0) / √12
    ],
)
def test_classes_by_hand(metric: Any, value: float):
    assert metric(LABELS, GUESSES) == pytest.approx(value)
    assert metric(LABELS, LABELS) == 1.0
    assert metric(LABELS, GUESSES) != pytest.approx(metric(GUESSES, [0, 0, 0, 1]))  # control


def test_accuracy_on_ten_rows_by_hand():
    assert tasks.accuracy([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 1, 1, 0, 0, 1, 2, 2]) == pytest.approx(0.7)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_classes_equal_scikit_learn(num_classes: int):
    from sklearn import metrics as peer

    generator = np.random.default_rng(num_classes)
    labels, guesses = generator.integers(num_classes, size=(2, 300))
    scores = generator.normal(size=300).round(1)
    macro = {"average": "macro", "zero_division": 0}
    assert tasks.f1(labels, guesses) == pytest.approx(peer.f1_score(labels, guesses, **macro))
    assert tasks.precision(labels, guesses) == pytest.approx(peer.precision_score(labels, guesses, **macro))
    assert tasks.recall(labels, guesses) == pytest.approx(peer.recall_score(labels, guesses, **macro))
    assert tasks.mcc(labels, guesses) == pytest.approx(peer.matthews_corrcoef(labels, guesses))
    assert tasks.auc(labels == 0, scores) == pytest.approx(peer.roc_auc_score(labels == 0, scores))
    many, found = generator.integers(2, size=(2, 50, num_classes))
    assert tasks.f1(many, found) == pytest.approx(peer.f1_score(many, found, **macro))
    assert tasks.accuracy(many, found) == pytest.approx(peer.accuracy_score(many, found))


def test_a_class_never_guessed_counts_zero_and_one_class_has_no_correlation():
    assert tasks.f1([0, 1], [0, 0]) == pytest.approx((2 / 3 + 0) / 2)
    assert tasks.mcc([0, 1], [0, 0]) == 0.0


def test_auc_and_pearson_by_hand():
    assert tasks.auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert tasks.auc([0, 1], [0.5, 0.5]) == 0.5
    with pytest.raises(ValueError, match="both classes"):
        tasks.auc([1, 1], [0.1, 0.2])
    assert tasks.pearson([1, 2, 3], [1, 2, 4]) == pytest.approx(3 / math.sqrt(2 * 42 / 9))
    assert math.isnan(tasks.pearson([1, 1], [1, 2]))


def test_text_by_hand():
    assert tasks.exact_match(["four ", "a  b", "A"], ["four", "a b", "a"]) == pytest.approx(2 / 3)
    assert tasks.rouge_l(["a b c d"], ["a c d e"]) == pytest.approx(0.75)  # longest common: a c d
    assert tasks.rouge_l(["привет мир", "你好"], ["Привет, мир!", "你们"]) == pytest.approx((1 + 0.5) / 2)
    assert tasks.rouge_l([""], ["a"]) == 0.0
    # matches 4 of 5, 2 of 4, 1 of 3, 0 of 2 (smoothed to 1/2 of 1/2), no brevity penalty
    expected = 100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25
    assert tasks.bleu(["the cat sat on mats"], ["the cat sat up on"]) == pytest.approx(expected, rel=1e-6)


def test_bleu_equals_sacrebleu_on_a_corpus():
    from sacrebleu import corpus_bleu

    guesses = ["the cat sat on the mat today", "a dog ran", "", "completely different words here now"]
    references = ["the cat sat on a mat today", "a dog ran home", "nothing", "not the same at all"]
    assert tasks.bleu(guesses, references) == pytest.approx(corpus_bleu(guesses, [references]).score)


def test_likelihood_by_hand():
    result = LikelihoodResult(np.array([2.0, 6.0]), np.array([2.0, 2.0]), np.array([8.0, 8.0]), ("a:1", "a:2"))
    found = result.metrics()
    assert found["loss"].value == 2.0  # 8 nats over 4 tokens
    assert found["perplexity"].value == pytest.approx(math.e**2)
    assert found["bits_per_byte"].value == pytest.approx(8 / math.log(2) / 16)
    assert result.worst(1) == [("a:2", 3.0)]
    no_bytes = LikelihoodResult(result.nats, result.tokens, np.zeros(2))
    assert "bits_per_byte" not in no_bytes.metrics()


def test_likelihood_of_a_model_equals_its_own_row_by_row():
    model = LanguageModel(tiny_causal("llama"))
    rows = [
        sample([7, 8, 9, 10], [0, 1, 1, 1]),
        sample([11, 12], [0, 1]),
        sample([13] * 6, [0, 0, 0, 1, 0.5, 1]),
    ]
    table = bytes_of_tokens(tiny_tokenizer(), 320)
    together = evaluate_likelihood(model, Store(rows), collate=flat, token_bytes=table)
    alone = evaluate_likelihood(model, Store(rows), collate=flat, max_tokens=1)
    np.testing.assert_allclose(together.nats, alone.nats, rtol=1e-5)
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = model.backbone(input_ids=torch.tensor(row.ids[None].astype(np.int64))).logits[0].log_softmax(-1)
        own = -sum(float(row.weights[t]) * float(logits[t - 1, row.ids[t]]) for t in range(1, len(row)))
        assert together.nats[i] == pytest.approx(own, rel=1e-5)
    assert together.tokens.tolist() == [3.0, 1.0, 2.5]
    assert together.bytes.tolist() == [table[[8, 9, 10]].sum(), table[12], 3 * table[13]]


@pytest.mark.parametrize("text", ["the cat sat", "naïve 猫 🙂", "Q: two\n\nA: four"])
def test_bytes_of_byte_level_tokens_add_up(text: str):
    tokenizer = tiny_tokenizer()
    table = bytes_of_tokens(tokenizer)
    assert table[tokenizer(text)["input_ids"]].sum() == len(text.encode())
    assert table[tokenizer.all_special_ids].sum() == 0


def test_batches_hold_every_row_once_within_the_budget():
    lengths = np.array([5, 9, 1, 30, 7, 7])
    groups = token_batches(lengths, 16)
    assert sorted(i for g in groups for i in g) == list(range(6))
    assert all(lengths[g].sum() <= 16 or len(g) == 1 for g in groups)


def test_scores_by_hand():
    scores = np.log(np.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]))
    result = ScoreResult(scores, np.array([0, 1, 1]), scores.argmax(1))
    assert result.metrics()["loss"].value == pytest.approx(-(math.log(0.5) + math.log(0.8) + math.log(0.1)) / 3)
    assert result.metrics()["accuracy"].value == pytest.approx(2 / 3)
    assert {k: v.value for k, v in result.per_class(["no", "yes"]).items()} == {"no": 1.0, "yes": 0.5}


def test_several_labels_by_hand():
    scores = np.array([[2.0, -1.0], [-1.0, 3.0]])
    result = ScoreResult(scores, np.array([[1, 0], [1, 1]]), (scores > 0).astype(np.int64))
    found = result.metrics()
    assert found["accuracy"].value == 0.5 and "mcc" not in found
    costs = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(1)), math.log1p(math.exp(-3))]
    assert found["loss"].value == pytest.approx(sum(costs) / 4)
    assert found["f1"].value == pytest.approx((2 / 3 + 1) / 2)


def test_scores_of_a_model_in_the_rows_order():
    model = ScoreModel(tiny_classifier("bert"))
    rows = [sample([5, 7, 8], [0, 0, 0], 1, "a:1"), sample([5] + [9] * 7, [0] * 8, 0, "a:2")]
    result = evaluate_scores(model, Store(rows), collate=flat)
    with torch.no_grad():
        own = [model.backbone(input_ids=torch.tensor(r.ids[None].astype(np.int64))).logits[0].numpy() for r in rows]
    np.testing.assert_allclose(result.scores, own, atol=1e-5)
    assert result.labels.tolist() == [1, 0] and result.origins == ("a:1", "a:2")
    with pytest.raises(DataError, match="a:9: no label"):
        evaluate_scores(model, Store([sample([5, 7], [0, 0], None, "a:9")]), collate=flat)


def test_evaluation_puts_the_mode_back_and_takes_dropout_off():
    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, batch: Batch) -> Outputs:
            assert not torch.is_grad_enabled()
            return Outputs(logprobs=self.drop(-torch.ones(batch.weights.shape)))

    model = Noisy().train()
    result = evaluate_likelihood(model, Store([sample([1, 2, 3], [0, 1, 1])]), collate=flat)
    assert result.nats.tolist() == [2.0] and model.training and model.drop.training


def test_generation():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Q: what is two plus two?\n\nA:")["input_ids"]
    answer = [*tokenizer(" four")["input_ids"], 2]
    rows = [
        sample([*ids, *answer], [0] * len(ids) + [1] * len(answer), origin="q:1"),
        sample([7, 8], [0, 0]),  # nothing to answer
        sample([7, 8, 9, 10], [0, 0, 1, 0]),
    ]
    questions = questions_of(Store(rows), tokenizer)
    assert [q.reference for q in questions] == [" four", tokenizer.decode([9])]
    assert questions[0].prompt_ids == tuple(ids) and questions[0].origin == "q:1"
    sampler = Sampler(LanguageModel(tiny_causal("llama")), tokenizer)
    result = evaluate_generation(sampler, questions, max_tokens=4)
    assert set(result.metrics()) == {"share_ended", "exact_match", "rouge_l", "bleu"}
    lines = side_by_side(result, result, limit=1)
    assert [line["reference"] for line in lines] == [" four"] and lines[0]["before"] == lines[0]["after"]
    assert len(questions_of(Store(rows * 10), tokenizer, limit=6)) <= 6
