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


class TuneSpec(Section):
    """Which parameters learn."""

    method: Literal["full", "last_layers", "head", "lora", "bias", "peft"] = "lora"
    """Everything, the last blocks, a new head, LoRA, biases, or another PEFT method."""
    layers: Positive | None = None
    """How many blocks, counted from the end."""
    rank: Positive | None = None
    """Rank of LoRA's update (2106.09685, 4.1)."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank; twice the rank when not set."""
    dropout: Share | None = None
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] | None = None
    """Layers that get an adapter: names or their endings, or `all-linear` (all but the head)."""
    init: Literal["default", "pissa"] | None = None
    """`default`: A random, B zero; `pissa`: the leading singular vectors (2404.02948)."""
    rank_stabilized: bool | None = None
    """Scale by alpha / sqrt(rank) (2312.03732)."""
    dora: bool | None = None
    """Learn magnitude and direction apart (2402.09353)."""
    train_also: list[str] | None = None
    """Modules trained fully beside the adapter, by name; `embeddings` and `head` fit every family."""
    quantize: Literal["none", "8bit", "4bit"] | None = None
    """Hold the base's frozen linear layers in few bits (QLoRA, 2305.14314): `4bit` is NormalFloat with double
    quantisation, `8bit` absmax in blocks; `none` when not set."""
    adapter: str | None = None
    """Folder of an adapter to go on from."""
    peft: dict[str, Any] | None = None
    """Configuration of the PEFT method, `peft_type` included."""
    cache_features: bool | None = None
    """Run the frozen body once over every row, without its dropout, and train the head on what is kept; each step
    runs the body anew when not set."""


class StoppingSpec(Section):
    """Stop when the selected metric has not improved for `patience` evaluations."""

    patience: Positive
    """Evaluations without a better value before the run ends."""


class TrainSpec(Section):
    """How the loop runs."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; may be a fraction."""
    steps: Positive | None = None
    """Optimizer steps, instead of `epochs`."""
    batch_examples: Positive | None = None
    """Rows in a step."""
    batch_tokens: Positive | None = None
    """Tokens in a step, about, instead of `batch_examples`."""
    micro_batch_tokens: Positive = 8192
    """Most tokens in one forward; bounds memory, changes nothing else."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Peak rate; depends on the stage and the method when not set."""
    adapter_b_rate_ratio: Annotated[float, Field(gt=0)] | None = None
    """Rate of LoRA's B over that of A (LoRA+, 2402.12354)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (1711.05101) or plain SGD."""
    beta1: Share = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Share = 0.999
    """AdamW's decay of the mean squared gradient."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after warm-up: in a line to 0, by a half cosine to 0, or not at all."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Steps in which the rate rises: a share of all steps below 1, else a number of steps."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of matrices; biases and norms are not decayed."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Most that the norm of a step's gradient may be; null leaves it alone."""
    eval_every: Positive | None = None
    """Steps between evaluations; the end of every epoch when not set."""
    save_every: Positive | None = None
    """Steps between checkpoints; the end of every epoch when not set. Evaluations save too."""
    keep: Positive = 2
    """Newest checkpoints that stay; the best one stays besides."""
    select_by: str | None = None
    """Metric by which the best checkpoint is chosen, of equals the earliest; null keeps the last."""
    early_stopping: StoppingSpec | None = None
    """End the run when `select_by` stops improving."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward: less memory, more time."""


class GenerateSpec(Section):
    """How completions for the evaluation are sampled."""

    max_tokens: Positive = 128
    """Most tokens of a completion."""
    examples: Positive = 50
    """Held-out prompts that are completed, spread evenly."""


class PromptingSpec(Section):
    """How the untuned base is asked, for the baselines `zero_shot` and `few_shot`."""

    shots: Positive = 4
    """Training rows that stand in the prompt of `few_shot`, drawn by the seed from the shorter half of the rows."""
    template: str = "{text}\nLabel: {label}"
    """Of classify: what is put to the base. `{label}` stands last, and is what the base is asked for."""
    label_words: dict[str | int, str] | None = None
    """Of classify: the words for labels that say nothing by themselves, as in `{"0": negative, "1": positive}`."""


Baseline = Literal["majority", "tfidf", "linear_probe", "nearest_neighbour", "zero_shot", "few_shot"]


class EvaluateSpec(Section):
    """What is measured before and after, beside the loss."""

    samples: Annotated[int, Field(ge=0)] = 5
    """Held-out prompts whose completions are shown before and after."""
    generate: GenerateSpec | None = None
    """Complete held-out prompts and compare with the answers: exact match, ROUGE-L, BLEU, share that end."""
    metrics: str | list[str] | None = None
    """Metrics of your own, `file.py:name`: a function of one held-out row that gives a number. It asks by the names of
    its parameters for `predicted`, `label`, `probabilities` (classify) or `prompt`, `completion`, `answer` (the
    others), and `row`. Higher is better unless its name ends in a word such as `error`, `loss` or `lower`."""
    probe: str | None = None
    """Text outside the task on which forgetting is measured; a built-in one when not set."""
    row_losses: Literal["none", "seen", "all"] = "seen"
    """Losses kept row by row: those that training and evaluations compute anyway, or also those of all training rows
    under the final weights."""
    sentences: list[str] = Field(default_factory=list)
    """Texts of yours that are classified before and after."""
    baselines: bool | list[Baseline] | None = None
    """Simple systems beside the tuned model: names, true for all that are possible, false for none. Not set: those that
    cost at most one forward over the rows (classify: majority, tfidf, linear_probe, nearest_neighbour; sft with
    `generate`: nearest_neighbour)."""
    baseline_rows: Positive = 1000
    """Most training rows whose features linear_probe and nearest_neighbour are given."""
    prompting: PromptingSpec = Field(default_factory=PromptingSpec)
    """How zero_shot and few_shot ask the base."""
    test: bool = True
    """Measure the test rows; false keeps them out of training all the same."""


class LengthSpec(Section):
    """Reward by length: 1 at `target` tokens, falling in a straight line to 0 at a distance of `target` tokens."""

    target: Positive
    """Tokens at which the reward is 1."""


class RewardSpec(Section):
    """What a completion earns: what ppo and grpo learn from, and what sft and dpo may be selected by. Every key but
    `ensemble`, `label`, `weights` and `clip` is one part of the reward.

    The reward is the sum of the parts, each times its weight (1 unless `weights` names it), then clipped to
    [-clip, clip]. Parts are called by their key; a function by its own name.
    """

    run: str | None = None
    """A finished run of stage reward, or several separated by commas, whose scores become one by `ensemble`."""
    ensemble: Literal["mean", "min"] | None = None
    """Of several runs: the mean of their scores (when not set), or the least, so that one model's fault is not enough
    to earn a reward (2310.02743, 3.2)."""
    model: str | None = None
    """A sequence classifier: folder or hub id."""
    label: str | None = None
    """Of a run or model that tells several labels apart: the label whose log-odds are the reward."""
    function: str | list[str] | None = None
    """`file.py:name`, called as `name(prompts, completions, **columns) -> list[float]`."""
    contains: str | list[str] | None = None
    """1 when this text, or one of these texts, stands in the completion."""
    regex: str | None = None
    """1 when the pattern is found in the completion."""
    exact: bool | None = None
    """1 when the completion's answer is the row's `answer`, spaces and case folded."""
    answer_pattern: str | None = None
    """Where the answer stands in a completion: `number` is its last number, `boxed` its last \\boxed{...}, anything
    else a regular expression whose last match's first group it is. Without it: the whole completion."""
    length: LengthSpec | None = None
    """Reward by the number of tokens."""
    weights: dict[str, float] | None = None
    """Weight of each part by its name; 1 when not named."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Bound of the summed reward on both sides."""


class RewardModelSpec(Section):
    """How stage reward learns."""

    margin: Annotated[float, Field(ge=0)] = 0.0
    """Scores of a pair must differ by this much and the row's own margin (Llama 2, 2307.09288, eq. 2); 0 is
    InstructGPT's loss."""
    center_coef: Annotated[float, Field(ge=0)] = 0.0
    """Pulls the sum of a pair's two scores to 0 (2312.09244, 2); 0.01 is the paper's value."""
    calibrate: bool = True
    """Shift scores so that demonstrations average 0 (InstructGPT, 2203.02155, 3.5)."""
    demonstrations: str | None = None
    """Prompts and responses to calibrate on; the training rows' best answers otherwise."""


class SamplingSpec(Section):
    """How rollouts are drawn. The policy that is trained is the one at this temperature, without cuts."""

    max_tokens: Positive = 64
    """Most tokens of a completion."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits before drawing."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that hold this much probability; 1 cuts nothing."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from this many likeliest tokens; 0 cuts nothing."""
    stop: list[str] | None = None
    """Texts that end a completion."""
    num_per_prompt: Positive | None = None
    """Completions of each prompt."""
    continue_prompt: bool = False
    """Completions go on where the prompt's text ends, without chat template or line end: for a base that only
    continues text."""


class DpoSpec(Section):
    """Preference learning without a reward model."""

    loss: Literal["sigmoid", "ipo", "hinge", "orpo", "simpo"] = "sigmoid"
    """Which loss: DPO, IPO, hinge (SLiC), or the reference-free ORPO and SimPO."""
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
    """How far the ratio of new to old policy counts (1707.06347, eq. 7)."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.02
    """Per-token price of log(policy / reference), in units of reward."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """Adapt `kl_coef` so that the KL of a completion stays near this many nats; fixed without it."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of later rewards; 1 is none."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalised advantage estimation (1506.02438)."""
    value_coef: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the value loss."""
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    """How far a value may move from its old estimate in the loss; null lets it."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the policy's entropy."""
    whiten: bool = True
    """Advantages of a round get mean 0 and variance 1."""
    end_bonus: float = 0.0
    """Added to the reward of a completion that ends by itself."""
    missing_end_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken from the reward of a completion that does not."""
    critic: Literal["own", "shared"] = "own"
    """`own`: a second model, started from the reward model where there is one; `shared`: a head on the policy."""
    critic_learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """The critic's own rate."""
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the log-likelihood of `ptx_data`, mixed in (PPO-ptx); 0 is plain PPO."""
    ptx_data: str | None = None
    """Text for `ptx_coef`: a file, folder, glob or hub id."""
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
    """Passes over a round's rollouts."""
    minibatches: Positive = 1
    """Optimizer steps in a pass."""
    clip: Annotated[float, Field(gt=0, lt=1)] | None = None
    """How far the ratio may fall below 1."""
    clip_high: Annotated[float, Field(gt=0)] | None = None
    """How far the ratio may rise above 1; `clip` when not set."""
    kl_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight of the KL to the reference in the loss; with 0 there is no reference."""
    baseline: Literal["mean", "leave_one_out"] | None = None
    """What a reward is compared with: its group's mean, or the mean of the others."""
    normalise: Literal["std", "none"] | None = None
    """Divide a group's advantages by its standard deviation, or not."""
    length_normalisation: Literal["completion", "token", "constant", "sum"] | None = None
    """What tokens are averaged over: their completion first, all tokens alike, `sampling.max_tokens`, nothing."""
    filter_groups: bool | None = None
    """Leave out groups whose rewards are all equal: they teach nothing, and would only dilute the mean (DAPO)."""
    overlong: Literal["keep", "mask", "penalty"] | None = None
    """Completions cut off at max_tokens: kept, left out of the loss, or punished as they near the limit."""
    overlong_buffer: Positive | None = None
    """Tokens before the limit in which `penalty` grows from 0 to 1."""
