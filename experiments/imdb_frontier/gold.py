"""The gold reward of IMDb texts: P(positive) by a classifier that no policy's text was made from.

It is trained on the labels of the test split, while language model and policies see the train split
alone: both would memorise the same reviews otherwise. Its log-odds are calibrated on windows of 32
to 48 words of reviews that it was not trained on (Platt 1999), because completions are that short.
"""

import functools
import gzip
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

SEED = 0
HELD_OUT = 5000  # reviews of the test split that calibrate and measure, and do not train
WINDOW = (32, 48)  # words
TERMS: dict[str, Any] = {"ngram_range": (1, 2), "sublinear_tf": True}
# The file of the classifier that `positive` reads: a run's reward is told nothing else.
VARIABLE = "IMDB_GOLD"


class Gold(NamedTuple):
    """Words and pairs of words -> calibrated log-odds, linear in their TF-IDF."""

    vectors: TfidfVectorizer
    weights: np.ndarray  # [terms]
    intercept: float

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """log P(positive) - log P(negative). [N]."""
        return self.vectors.transform(texts) @ self.weights + self.intercept

    def probability(self, texts: Sequence[str]) -> np.ndarray:
        """P(positive). [N]."""
        return 1 / (1 + np.exp(-self.log_odds(texts)))


def read_reviews(path: pathlib.Path) -> tuple[list[str], np.ndarray]:
    """Texts without line breaks of HTML, and labels: 1 is positive."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [" ".join(row["text"].replace("<br />", " ").split()) for row in rows]
    return texts, np.array([row["label"] for row in rows])


def windows(texts: Sequence[str], rng: np.random.Generator, least: int, most: int) -> list[str]:
    """A window of `least` to `most` words from anywhere in each text."""
    found = []
    for text in texts:
        words = text.split()
        length = int(rng.integers(least, most + 1))
        start = int(rng.integers(max(1, len(words) - length)))
        found.append(" ".join(words[start : start + length]))
    return found


def train_gold(texts: Sequence[str], labels: np.ndarray) -> tuple[Gold, dict[str, Any]]:
    """The classifier, and what it is worth on reviews that it was not trained on."""
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(texts))
    held_out = order[:HELD_OUT]
    train = order[HELD_OUT:]
    vectors = TfidfVectorizer(**TERMS, min_df=2)
    features = vectors.fit_transform([texts[i] for i in train])
    classifier = LogisticRegression(C=20.0, max_iter=200).fit(features, labels[train])
    own = [str(texts[i]) for i in held_out]
    calibration = windows(own, rng, *WINDOW)
    raw = classifier.decision_function(vectors.transform(calibration))
    half = len(own) // 2
    platt = LogisticRegression(C=1e6).fit(raw[:half, None], labels[held_out[:half]])
    slope = float(platt.coef_[0, 0])
    intercept = slope * float(classifier.intercept_[0]) + float(platt.intercept_[0])
    gold = Gold(vectors, slope * classifier.coef_[0], intercept)

    def accuracy(shown: Sequence[str]) -> float:
        return float(np.mean((gold.log_odds(shown) > 0) == labels[held_out]))

    later = gold.probability(calibration[half:])
    found = {
        "reviews": len(own),
        "accuracy_whole": accuracy(own),
        "accuracy_32_words": accuracy(windows(own, rng, 32, 32)),
        "mean_probability": float(later.mean()),
        "mean_label": float(labels[held_out[half:]].mean()),
        "calibration_error": float(_calibration_error(later, labels[held_out[half:]])),
    }
    return gold, found


def _calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean |share of positives - mean probability| over ten bins of equally many texts."""
    order = np.argsort(probabilities)
    bins = np.array_split(order, 10)
    gaps = [abs(labels[b].mean() - probabilities[b].mean()) * len(b) for b in bins]
    return sum(gaps) / len(order)


def save_gold(gold: Gold, path: pathlib.Path) -> None:
    """Writes the classifier as JSON, under another name first: a file that is there is whole."""
    held = {
        "terms": gold.vectors.get_feature_names_out().tolist(),
        "idf": gold.vectors.idf_.tolist(),
        "weights": gold.weights.tolist(),
        "intercept": gold.intercept,
    }
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(held), encoding="utf-8")
    unfinished.rename(path)


@functools.cache
def load_gold(path: str) -> Gold:
    """The classifier that `save_gold` wrote."""
    held = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    vectors = TfidfVectorizer(**TERMS, vocabulary=held["terms"])
    vectors.idf_ = np.array(held["idf"])
    return Gold(vectors, np.array(held["weights"]), held["intercept"])


def positive(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """P(positive) of prompt and response together: the reward of a run."""
    texts = [f"{prompt}{response}" for prompt, response in zip(prompts, responses, strict=True)]
    return load_gold(os.environ[VARIABLE]).probability(texts).tolist()
