"""grpo: film reviews that a sentiment model likes; three seeds, three prices of the KL, fluency."""

from __future__ import annotations

from common import place, write
from sentiment import checks, policies, reward_model, reward_note, side_by_side, summary

TITLE = "grpo: towards positive reviews with a model of 1,377,408 parameters"


def main() -> None:
    where, _ = place("grpo")
    runs = policies(where, "grpo")
    shown = next(run for price, seed, run in runs if (price, seed) == (0.02, 0))
    write("grpo", TITLE, reward_note(reward_model(where)), summary(where, runs), checks(runs), side_by_side(shown))


if __name__ == "__main__":
    main()
