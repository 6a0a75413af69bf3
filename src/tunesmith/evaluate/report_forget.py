"""The report on a limit on forgetting: what it cost, what was kept, the trade-off evaluation by evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluate import plots
from tunesmith.evaluate.report_html import Markup, amount, figure, interval, is_number, section, table, tag
from tunesmith.evaluate.run_files import RunFiles, as_number, dig, estimates, evaluations_of

FORGETTING = "forgetting"


def forget_section(run: RunFiles) -> Markup:
    """Empty for a run without a limit."""
    found = run.result.get("forget")
    if not isinstance(found, Mapping):
        return Markup("")
    drawn = _trade_off(run, found)
    picture = figure(drawn, "The task's metric over forgetting, a point an evaluation") if drawn else ""
    rows = [_row(name, probe) for name, probe in dict(found.get("probes") or {}).items() if isinstance(probe, Mapping)]
    head = ("probe", "loss before", "loss after", "rise")
    return section(
        "Forgetting as a limit", tag("p", str(found.get("verdict", ""))), table(head, rows), picture,
        tag("p", _what_was_done(found), "soft small"),
    )  # fmt: skip


def points(run: RunFiles, metric: str | None) -> list[tuple[float, float, float]]:
    """(step, forgetting as a share, the task's metric) of every evaluation that has both, the start first."""
    found = []
    for line in evaluations_of(run):
        held = estimates(line.get("metrics"))
        if metric in held and (FORGETTING in held or line.get("step") == 0):
            lost = as_number(held[FORGETTING]["value"]) if FORGETTING in held else 0.0
            found.append((as_number(line.get("step")), lost, as_number(held[metric]["value"])))
    return found


def _trade_off(run: RunFiles, found: Mapping[str, Any]) -> bytes | None:
    metric = run.main_metric()
    if metric is None or not is_number(found.get("at_most")) or not is_number(found.get("kept_step")):
        return None
    return plots.trade_off(points(run, metric), found["kept_step"], found["at_most"], metric)


def _row(name: str, probe: Mapping[str, Any]) -> tuple[str, str, str, str]:
    was, now = (estimates(dig(probe, part)).get("loss", {}) for part in ("before", "after"))
    change = estimates(probe.get("difference")).get("loss", {})
    rose = f"{100 * as_number(probe.get('rise')):+.2f} %"
    spread = interval(change.get("low"), change.get("high"), sign=True)
    return name, amount(was.get("value")), amount(now.get("value")), f"{rose} (loss {spread})" if spread else rose


def _what_was_done(found: Mapping[str, Any]) -> str:
    done = [f"{found.get('exceeded', 0)} evaluations were over the limit"]
    if found.get("went_back"):
        done.append(f"the run went back {found['went_back']} times")
    if is_number(found.get("rate")) and found["rate"] != 1:
        done.append(f"the learning rate ended at {found['rate']:.3g} of its schedule")
    if is_number(found.get("replay_ratio")):
        done.append(f"replayed rows ended at {100 * found['replay_ratio']:.0f} % of the loss")
    return "; ".join(done) + "."
