"""The reward of a model's completions of held-out prompts, as a metric that a checkpoint can be chosen by.

The validation loss of instruction tuning rises after an epoch while people, and the reward model that stands for them,
like the later models better (InstructGPT, 2203.02155, 3.5).
"""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.data.kinds import Chat, Pair, Prompt, Ranking, Record, output_text
from tunesmith.data.prompts import PromptSet, encode_prompts
from tunesmith.evaluate.intervals import Statistic, mean_statistic
from tunesmith.model.language import LanguageModel
from tunesmith.model.soft_prompt import context_tokens
from tunesmith.recipe_sections import GenerateSpec
from tunesmith.rollout.collect import Collector, Sampling
from tunesmith.rollout.sampler import Sampler
from tunesmith.stages.job import Job


def reward_of_completions(job: Job, model: LanguageModel) -> Callable[[], Statistic] | None:
    """A function that completes the held-out prompts greedily and gives the mean reward with its rows.

    None when the recipe names no reward, or nothing is held out. At most `evaluate.generate.examples` prompts.
    """
    from tunesmith.stages.prepare import read_sets  # it knows every stage
    from tunesmith.stages.rewarding import build_reward

    if job.recipe.reward is None or job.inputs.eval is None:
        return None
    how = job.recipe.evaluate.generate or GenerateSpec()
    held_out = read_sets(job.recipe, job.folder).eval
    if held_out is None:
        return None
    records = [_asked(record) for record in held_out]
    prompts = _encoded(job, [record for record in records if record is not None][: how.examples])
    reward = build_reward(job, [prompts])

    def measured() -> Statistic:
        collector = Collector(Sampler(model, job.tokenizer), reward, Sampling(how.max_tokens, 0.0))
        played = collector.play(prompts, range(len(prompts)), num_per_prompt=1, seed=job.recipe.seed)
        return mean_statistic("reward", played.rewards.total)

    return measured


def _encoded(job: Job, records: list[Prompt]) -> PromptSet:
    longest = (context_tokens(job.backbone) or 1 << 20) - 1
    return encode_prompts(
        records, job.tokenizer, max_tokens=longest, room=f"{job.recipe.base} takes {longest + 1} tokens",
        on_too_long="drop", fingerprint="held out",
    )  # fmt: skip


def _asked(record: Record) -> Prompt | None:
    """What a held-out row asks, and its answer for rewards that compare."""
    if isinstance(record, Chat):
        last = max((i for i, m in enumerate(record.messages) if m.role == "assistant"), default=0)
        return Prompt(record.messages[:last], output_text(record), plain=record.plain, origin=record.origin)
    if isinstance(record, Pair | Ranking):
        return Prompt(record.prompt, output_text(record), plain=record.plain, origin=record.origin)
    return None
