"""THE loop. One for every stage: batches in, one optimizer step out, until the source is done.

A step: count what will be averaged over, sum the loss of every micro-batch, divide once, look for NaN, clip, update,
write one line. Evaluations and checkpoints stand at steps known beforehand, and a signal ends the run after the step
it arrived in, with a checkpoint. Nothing random is carried from step to step: dropout draws from (seed, step).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.batch import Batch
from tunesmith.engine.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, step_folder
from tunesmith.engine.contracts import FitSpec, Progress, Stage
from tunesmith.engine.limit import go_back, kept_steps, slowed
from tunesmith.engine.metrics import MetricsLog
from tunesmith.engine.optim import clip, gradient_norm, moments_finite, rate_at, set_rate
from tunesmith.engine.signals import StopSignals
from tunesmith.engine.state import TrainState
from tunesmith.errors import DataError, Interrupted, NonFiniteError, RunError, TunesmithError
from tunesmith.recipe_metrics import lower_is_better


@dataclass(frozen=True, slots=True)
class Files:
    """Where the loop writes: `metrics` and `evaluations` are the same bytes for the same run, `timings` are not.

    `others` are logs that a stage writes itself; they are flushed with a checkpoint and cut on resuming like the rest.
    """

    metrics: MetricsLog
    evaluations: MetricsLog
    timings: MetricsLog
    checkpoints: Path
    others: Mapping[str, MetricsLog] = field(default_factory=dict)

    @property
    def logs(self) -> dict[str, MetricsLog]:
        """Every log by its name."""
        own = {"metrics": self.metrics, "evaluations": self.evaluations, "timings": self.timings}
        return {**own, **self.others}


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished step, as the progress line shows it."""

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float


Say = Callable[[str], None]
Show = Callable[[StepReport], None]


def fit(
    stage: Stage, state: TrainState, spec: FitSpec, files: Files, *, say: Say, show: Show, resumed: bool = False
) -> Progress:
    """Train `stage` from `state.step` to the source's last step; the best weights are in the model afterwards.

    Raises `NonFiniteError` before a step that would spoil the weights and `Interrupted` after a signal, one in the
    last step too; in both cases the last good checkpoint stands. What a source cannot give (a reward that fails) ends
    the run too, and the steps before it are saved.
    """
    progress: Progress = state.progress
    if not resumed:
        save(stage, state, spec, files)
    last = state.step if _is_over(spec, progress) else stage.source.num_steps
    with StopSignals() as stop:
        for step in range(state.step + 1, last + 1):
            started = time.perf_counter()
            try:
                line, tokens = train_step(stage, state.optimizer, slowed(spec, progress), step)
            except (NonFiniteError, RunError):
                raise
            except TunesmithError:
                save(stage, state, spec, files)
                raise
            state.step = step
            progress.tokens += tokens
            files.metrics.append(line)
            _record_time(files, progress, started, tokens, line, stage.source.num_steps, show)
            over = _after_step(stage, state, spec, files, say)
            if stop.requested:
                save(stage, state, spec, files)
                raise Interrupted(_farewell(stop.name, step), stop.exit_code)
            if over:
                break
    load_best(stage, state, spec, files, say)
    return progress


def train_step(
    stage: Stage, optimizer: torch.optim.Optimizer, spec: FitSpec, step: int
) -> tuple[dict[str, float | int], int]:
    """One optimizer step over its micro-batches -> (its line in metrics.jsonl, its tokens)."""
    batches = [batch.to(spec.device) for batch in stage.source.step_batches(step)]
    count = sum(stage.objective.count(batch) for batch in batches)
    if not count:
        raise DataError(_nothing_to_learn(step, [o for b in batches for o in b.origins]))
    stage.model.train()
    optimizer.zero_grad(set_to_none=True)
    total, sums, rows = 0.0, dict[str, tuple[float, float]](), list[tuple[Batch, Tensor]]()
    with step_randomness(spec.seed, step, spec.device):
        for batch in batches:
            loss = stage.objective.loss(stage.model(batch), batch)
            if not torch.isfinite(loss.sum):
                raise NonFiniteError(_not_finite("the loss", step, _guilty(stage, batch)))
            (loss.sum / count).backward()
            total += float(loss.sum.detach())
            for name, (value, number) in loss.metrics.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(value), before[1] + number)
            rows += [] if loss.rows is None else [(batch, loss.rows)]
    norm = _update(stage, optimizer, spec, step, batches)
    if stage.keep_rows is not None:
        stage.keep_rows(step, rows)
    line = {
        "step": step,
        "epoch": round(step / stage.source.steps_per_epoch, 6),
        "loss": total / count,
        "grad_norm": norm,
        "learning_rate": rate_at(spec.optim, step - 1, stage.source.num_steps),
        "targets": count,
        **{name: value / number for name, (value, number) in sums.items() if number},
        **(stage.describe(step) if stage.describe is not None else {}),
    }
    return line, sum(batch.num_tokens for batch in batches)


def _update(
    stage: Stage, optimizer: torch.optim.Optimizer, spec: FitSpec, step: int, batches: Sequence[Batch]
) -> float:
    """Check, clip, step; returns the gradient norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = gradient_norm(parameters)
    if not torch.isfinite(norm):
        raise NonFiniteError(_not_finite("a gradient", step, [o for b in batches for o in b.origins]))
    if not moments_finite(optimizer):
        raise NonFiniteError(_not_finite("the optimizer's memory", step, [o for b in batches for o in b.origins]))
    clip(parameters, norm, spec.optim.clip_norm)
    set_rate(optimizer, rate_at(spec.optim, step - 1, stage.source.num_steps))
    optimizer.step()
    return float(norm)


@contextmanager
def step_randomness(seed: int, step: int, device: str) -> Iterator[None]:
    """Draws inside depend on (seed, step) alone, and the process's own random state is left as it was."""
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + step) % (1 << 63))
        yield


def _after_step(stage: Stage, state: TrainState, spec: FitSpec, files: Files, say: Say) -> bool:
    """Evaluate and save where it is due; True when early stopping or the limit ends the run."""
    step, last = state.step, state.step == stage.source.num_steps
    boundary = stage.source.at_boundary(step)
    over = False
    evaluated = stage.evaluate is not None and (last or _due(step, spec.eval_every, boundary))
    if evaluated:
        over = _evaluate(stage, state, spec, files, say)
    if last or over or evaluated or _due(step, spec.save_every, boundary):
        save(stage, state, spec, files)
    return over


def _due(step: int, every: int | None, boundary: bool) -> bool:
    return boundary if every is None else step % every == 0


def _evaluate(stage: Stage, state: TrainState, spec: FitSpec, files: Files, say: Say) -> bool:
    assert stage.evaluate is not None
    stage.model.eval()
    with step_randomness(spec.seed, state.step, spec.device):
        metrics = dict(stage.evaluate(state.step))
    epoch = round(state.step / stage.source.steps_per_epoch, 6)
    files.evaluations.append({"step": state.step, "epoch": epoch, "metrics": metrics})
    say(f"step {state.step} (epoch {epoch:g}): " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    within = _keeps_within(state, spec, files, metrics, say)
    if spec.select_by is not None:
        value = metrics[spec.select_by] if within else math.nan
        state.progress.note(value, state.step, lower=lower_is_better(spec.select_by))
    elif spec.limit is not None and within:
        state.progress.best_step = state.step
    if _stopped_early(spec, state.progress):
        say(f"early stopping: {spec.select_by} has not improved for {spec.patience} evaluations")
    return _is_over(spec, state.progress)


def _keeps_within(state: TrainState, spec: FitSpec, files: Files, metrics: Mapping[str, float], say: Say) -> bool:
    """True when this evaluation keeps within the limit, or there is none; else what the limit asks for is done."""
    if spec.limit is None or spec.limit.judge(metrics[spec.limit.metric], state.step, state.progress):
        return True
    limit, text = spec.limit, f"{spec.limit.metric} {metrics[spec.limit.metric]:.4f} is over {spec.limit.at_most:g}"
    if limit.on_exceed == "go_back":
        step = go_back(state, files.checkpoints)
        rate = state.progress.extra.get("rate", 1.0)
        say(f"{text}: back to the weights of step {step}, going on at {rate:g} of the learning rate")
    else:
        say(f"{text}: " + ("training ends" if limit.on_exceed == "stop" else "this checkpoint will not be kept"))
    return False


def _stopped_early(spec: FitSpec, progress: Progress) -> bool:
    return spec.patience is not None and progress.worse_in_a_row >= spec.patience


def _is_over(spec: FitSpec, progress: Progress) -> bool:
    return _stopped_early(spec, progress) or (spec.limit is not None and spec.limit.ends(progress))


def save(stage: Stage, state: TrainState, spec: FitSpec, files: Files) -> None:
    """Write a checkpoint of this moment; the best one so far is never pruned."""
    if not all(torch.isfinite(p).all() for p in _trained(state.optimizer)):
        raise NonFiniteError(f"step {state.step}: a weight is NaN or infinite; nothing was saved, the last good "
                             "checkpoint stands. Lower train.learning_rate or set train.clip_norm")  # fmt: skip
    tensors, meta = state.capture()
    for log in files.logs.values():
        log.sync()
    meta["log_bytes"] = {name: log.size() for name, log in files.logs.items()}
    protect = kept_steps(spec, state.progress)
    save_checkpoint(files.checkpoints, state.step, tensors, meta, keep=spec.keep, protect=protect)


def resume(state: TrainState, files: Files, *, say: Say) -> bool:
    """Bring `state` and the logs back to the newest sound checkpoint; False when there is none."""
    newest = latest_checkpoint(files.checkpoints, warn=say)
    if newest is None:
        return False
    tensors, meta = load_checkpoint(newest)
    state.restore(tensors, meta)
    for name, size in meta["log_bytes"].items():
        files.logs[name].cut(size)
    return True


def load_best(stage: Stage, state: TrainState, spec: FitSpec, files: Files, say: Say) -> None:
    """Put the best evaluated weights into the model; the last ones when nothing was selected by.

    Under a limit only weights within it are kept: those of the start when no others are.
    """
    best, limit = state.progress.best_step, spec.limit
    if best == state.step or (limit is None and (spec.select_by is None or best == 0)):
        return
    tensors, _ = load_checkpoint(step_folder(files.checkpoints, best))
    state.load_weights(tensors)
    if limit is not None and best == 0:
        say(f"NO CHECKPOINT KEEPS {limit.metric} within {limit.at_most:g}: the weights of the start are kept")
    elif spec.select_by is None:
        say(f"the last step that keeps within the limit is {best}; its weights are kept")
    else:
        say(f"best by {spec.select_by}: step {best} ({state.progress.best_value:.4f}); its weights are kept")


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _guilty(stage: Stage, batch: Batch) -> list[str]:
    """The rows whose own loss is not finite; all rows of the batch when none stands out."""
    with torch.no_grad():
        outputs = stage.model(batch)
    if outputs.scores is not None:
        bad = (~torch.isfinite(outputs.scores).all(1)).nonzero()[:, 0].tolist()
    else:
        assert outputs.logprobs is not None
        bad = sorted(set(batch.segments[~torch.isfinite(outputs.logprobs)].tolist()) - {-1})
    return [batch.origins[i] for i in bad] if bad else list(batch.origins)


def _shown(origins: Sequence[str]) -> str:
    return ", ".join(origins[:8]) + (f" and {len(origins) - 8} more" if len(origins) > 8 else "")


def _nothing_to_learn(step: int, origins: Sequence[str]) -> str:
    return (
        f"step {step}: nothing in its rows is trained on ({_shown(origins)}); mend these rows, or leave them out. "
        "The weights are as the step before left them"
    )


def _not_finite(what: str, step: int, origins: Sequence[str]) -> str:
    return (
        f"step {step}: {what} is NaN or infinite, found before the weights were touched. Rows: {_shown(origins)}. "
        "The last good checkpoint stands; lower train.learning_rate, set train.clip_norm, or look at these rows"
    )


def _farewell(signal: str, step: int) -> str:
    return f"stopped by {signal} after step {step}; a checkpoint is saved, go on with `tunesmith train --resume RUN`"


def _record_time(
    files: Files,
    progress: Progress,
    started: float,
    tokens: int,
    line: dict[str, float | int],
    num_steps: int,
    show: Show,
) -> None:
    seconds = time.perf_counter() - started
    progress.seconds += seconds
    step = int(line["step"])
    files.timings.append({"step": step, "seconds": round(seconds, 6), "tokens": tokens})
    left = (num_steps - step) * progress.seconds / max(step, 1)
    rate = tokens / seconds if seconds > 0 else math.inf
    show(StepReport(step, num_steps, float(line["loss"]), float(line["learning_rate"]), rate, left))
