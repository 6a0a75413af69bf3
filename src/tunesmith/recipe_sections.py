"""The sections of a recipe and their keys. What a key means stands beside it; what depends on the stage does not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

StageName = Literal["pretrain", "mlm", "sft", "classify", "reward", "dpo", "ppo", "grpo"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the recipe: frozen, typed strictly, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class MixPart(Section):
    """One of several training sets and how much of the mix it is."""

    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    format: str | None = None
    columns: dict[str, str] | None = None
    template: str | None = None


class SplitSpec(Section):
    """Shares of `train` to hold out when no `eval` or `test` is named."""

    eval: Share = 0.1
    test: Share = 0.0


class DataSpec(Section):
    """What is read and how it is turned into samples."""

    train: str | None = None
    mix: list[MixPart] | None = None
    eval: str | None = None
    test: str | None = None
    split: SplitSpec | None = None
    group_key: str | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    template: str | None = None
    max_length: Positive | None = None
    on_too_long: Literal["error", "truncate_left", "truncate_right", "split", "drop"] = "error"
    on_bad_row: Literal["error", "skip"] = "error"
    on_overlap: Literal["error", "allow"] = "error"
    train_on_prompt: bool = False
    multi_label: bool = False
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15


class TuneSpec(Section):
    """Which parameters learn."""

    method: Literal["full", "last_layers", "head", "lora", "bias", "peft"] = "lora"
    layers: Positive | None = None
    rank: Positive | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Share | None = None
    targets: Literal["all-linear"] | list[str] | None = None
    init: Literal["default", "pissa"] | None = None
    rank_stabilized: bool | None = None
    dora: bool | None = None
    train_also: list[str] | None = None
    adapter: str | None = None
    peft: dict[str, Any] | None = None


class StoppingSpec(Section):
    """Stop when the selected metric has not improved for `patience` evaluations."""

    patience: Positive


class TrainSpec(Section):
    """How the loop runs."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    batch_examples: Positive | None = None
    batch_tokens: Positive | None = None
    micro_batch_tokens: Positive = 8192
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    adapter_b_rate_ratio: Annotated[float, Field(gt=0)] | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    beta1: Share = 0.9
    beta2: Share = 0.999
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    eval_every: Positive | None = None
    save_every: Positive | None = None
    keep: Positive = 2
    select_by: str | None = None
    early_stopping: StoppingSpec | None = None
    checkpoint_activations: bool = False


class GenerateSpec(Section):
    """How completions for the evaluation are sampled."""

    max_tokens: Positive = 128
    examples: Positive = 50


class EvaluateSpec(Section):
    """What is measured before and after, beside the loss."""

    samples: Annotated[int, Field(ge=0)] = 5
    generate: GenerateSpec | None = None
    probe: str | None = None
    sentences: list[str] = Field(default_factory=list)


class LengthSpec(Section):
    """Reward by length: 1 at `target` tokens, falling in a straight line to 0 at a distance of `target` tokens."""

    target: Positive


class RewardSpec(Section):
    """What a completion earns (stages ppo and grpo). Every key but `weights` and `clip` is one part of the reward.

    The reward is the sum of the parts, each times its weight (1 unless `weights` names it), then clipped to
    [-clip, clip]. Parts are called by their key; a function by its own name.
    """

    run: str | None = None
    """A finished run of stage reward; several runs separated by commas give the mean of their scores."""
    model: str | None = None
    """A sequence classifier with one score: folder or hub id."""
    function: str | list[str] | None = None
    """`file.py:name`, called as `name(prompts, completions, **columns) -> list[float]`."""
    contains: str | list[str] | None = None
    """1 when this text, or one of these texts, stands in the completion."""
    regex: str | None = None
    """1 when the pattern is found in the completion."""
    exact: bool | None = None
    """1 when the completion's answer is the row's `answer`, spaces and case folded."""
    answer_pattern: str | None = None
    """Where the answer stands in a completion: the last match's first group. Without it: the whole completion."""
    length: LengthSpec | None = None
    weights: dict[str, float] | None = None
    clip: Annotated[float, Field(gt=0)] | None = None


class RewardModelSpec(Section):
    """How stage reward learns."""

    margin: Annotated[float, Field(ge=0)] = 0.0
    """Scores of a pair must differ by this much (Llama 2, 2307.09288, eq. 2); 0 is InstructGPT's loss."""
    center_coef: Annotated[float, Field(ge=0)] = 0.0
    """Pulls the sum of a pair's two scores to 0 (2312.09244, 2); 0.01 is the paper's value."""
    calibrate: bool = True
    """Shift scores so that demonstrations average 0 (InstructGPT, 2203.02155, 3.5)."""
    demonstrations: str | None = None
    """Prompts and responses to calibrate on; the training rows' best answers otherwise."""


class SamplingSpec(Section):
    """How rollouts are drawn. The policy that is trained is the one at temperature 1 without cuts."""

    max_tokens: Positive = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    stop: list[str] | None = None
    num_per_prompt: Positive | None = None


class DpoSpec(Section):
    """Preference learning without a reward model."""

    loss: Literal["sigmoid", "ipo", "hinge", "orpo", "simpo"] = "sigmoid"
    beta: Annotated[float, Field(gt=0)] | None = None
    """How much a unit of log-ratio counts; for orpo the weight of its odds-ratio term (lambda)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """The share of pairs believed to be labelled the wrong way round: above 0 this is cDPO."""
    length_normalized: bool | None = None
    """Log-probs per token instead of per completion."""
    gamma: Annotated[float, Field(ge=0)] | None = None
    """SimPO's target margin."""
    sft_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight of the chosen completion's negative log-likelihood per token, added to the loss; orpo has it at 1."""


class PpoSpec(Section):
    """Proximal policy optimisation from rewards. One rollout is one episode."""

    rollouts: Positive = 64
    """Completions sampled before each round of updates."""
    epochs: Positive = 1
    """Passes over a round's rollouts."""
    minibatches: Positive = 4
    """Optimizer steps in a pass."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    kl_coef: Annotated[float, Field(ge=0)] = 0.02
    """Per-token price of log(policy / reference), in units of reward."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """Adapt `kl_coef` so that the KL of a completion stays near this many nats; fixed without it."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    value_coef: Annotated[float, Field(ge=0)] = 0.1
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    whiten: bool = True
    """Advantages of a round get mean 0 and variance 1."""
    end_bonus: float = 0.0
    """Added to the reward of a completion that ends by itself."""
    missing_end_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken from the reward of a completion that does not."""
    critic: Literal["own", "shared"] = "own"
    """`own`: a second model, started from the reward model where there is one; `shared`: a head on the policy."""
    critic_learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the log-likelihood of `ptx_data`, mixed in (PPO-ptx); 0 is plain PPO."""
    ptx_data: str | None = None
    ptx_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Texts of `ptx_data` for each rollout."""


class GrpoSpec(Section):
    """Group-relative policy optimisation: several completions of a prompt are each other's baseline."""

    variant: Literal["grpo", "dapo", "dr_grpo", "rloo"] = "grpo"
    """Sets the keys below that are left open to what that paper uses."""
    prompts: Positive = 8
    """Prompts sampled for before each round of updates."""
    group: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt."""
    epochs: Positive = 1
    minibatches: Positive = 1
    clip: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip_high: Annotated[float, Field(gt=0)] | None = None
    kl_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight of the KL to the reference in the loss; with 0 there is no reference."""
    baseline: Literal["mean", "leave_one_out"] | None = None
    normalise: Literal["std", "none"] | None = None
    """Divide a group's advantages by its standard deviation, or not."""
    length_normalisation: Literal["completion", "token", "constant", "sum"] | None = None
    """What tokens are averaged over: their completion first, all tokens alike, `sampling.max_tokens`, nothing."""
    overlong: Literal["keep", "mask", "penalty"] | None = None
    """Completions cut off at max_tokens: kept, left out of the loss, or punished as they near the limit."""
    overlong_buffer: Positive | None = None
    """Tokens before the limit in which `penalty` grows from 0 to 1."""
