"""Simple systems beside a tuned classifier, so that nobody is fooled by easy data or by one frequent label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunesmith.errors import DataError
from tunesmith.evaluate.intervals import Estimate, wilson

BAG_OF_WORDS = "TF-IDF + logistic regression"
MAJORITY = "most frequent label"


def bag_of_words(train: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[str]:
    """The label of each text from the words in it alone: TF-IDF weights and logistic regression fitted on `train`.

    `train` are (text, label). Words are lower-cased, 1 + log(count) weighted; the regression is scikit-learn's default
    (L2, C = 1). `DataError` unless there are two labels.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labels = [label for _, label in train]
    if len(set(labels)) < 2:
        raise DataError("a classifier needs at least two labels in its training rows")
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    system: Any = make_pipeline(words, LogisticRegression(max_iter=1000))
    system.fit([text for text, _ in train], labels)
    return [str(label) for label in system.predict(list(texts))]


def classifier_baselines(
    train: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]]
) -> dict[str, dict[str, Estimate]]:
    """system -> {"accuracy": with Wilson's interval} on `held_out`, fitted on `train`; both are (text, label)."""
    truth = [label for _, label in held_out]
    most = Counter(label for _, label in train).most_common(1)[0][0]
    said = {MAJORITY: [most] * len(truth), BAG_OF_WORDS: bag_of_words(train, [text for text, _ in held_out])}
    return {
        system: {"accuracy": wilson(sum(a == b for a, b in zip(labels, truth, strict=True)), len(truth))}
        for system, labels in said.items()
    }
