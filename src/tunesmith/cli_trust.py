"""The commands about trust, before a run and after it: plan, compare, selftest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from tunesmith.cli_output import cell_text, duration, table

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Values over the recipe's.")]
Give = Callable[[Any, bool, Callable[[Any], Iterable[str]]], None]
Say = Callable[[str], None]


def register(app: typer.Typer, give: Give, say: Say) -> None:
    """Add the commands to `app`."""
    _add_plan(app, give, say)
    _add_compare(app, give, say)
    _add_selftest(app, give, say)


def _add_plan(app: typer.Typer, give: Give, say: Say) -> None:
    @app.command()
    def plan(
        recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
        overrides: Overrides = None,
        *,
        on: Annotated[str | None, typer.Option("--on", help="A device by name, such as RTX 4090 or H100.")] = None,
        price: Annotated[float | None, typer.Option("--price", min=0.0, help="What an hour of it costs.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """Bytes by line, operations and time of a run, before a weight is loaded."""
        from tunesmith import api

        give(api.plan(recipe, overrides or (), on=on, price=price, say=say), as_json, _plan_lines)


def _add_compare(app: typer.Typer, give: Give, say: Say) -> None:
    @app.command()
    def compare(
        recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file, with held-out rows.")],
        overrides: Overrides = None,
        *,
        tune: Annotated[str | None, typer.Option("--tune", help="full,last_layers=1,head,lora:rank=4,...")] = None,
        base: Annotated[str | None, typer.Option("--base", help="Models, separated by commas.")] = None,
        grid: Annotated[list[str] | None, typer.Option("--grid", help="key=value,value; may be repeated.")] = None,
        seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each way, with seeds one apart.")] = 1,
        untuned: Annotated[
            str | None, typer.Option("--untuned", help="Models that are only asked, zero-shot and few-shot; commas.")
        ] = None,
        budget: Annotated[str | None, typer.Option("--budget", help="Time for all runs: 90s, 10m, 2h.")] = None,
        to: Annotated[str | None, typer.Option("--to", help="Name of the comparison under ./runs.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """Train a recipe in several ways and set quality, cost and size side by side, with a recommendation."""
        from tunesmith import api

        found = api.compare(
            recipe, overrides or (), tune=_listed(tune), bases=_listed(base), grid=grid or (), seeds=seeds,
            untuned=_listed(untuned), budget=budget, to=to, say=say,
        )  # fmt: skip
        give(found, as_json, _compare_lines)


def _add_selftest(app: typer.Typer, give: Give, say: Say) -> None:
    @app.command()
    def selftest(
        recipe: Annotated[str | None, typer.Argument(help="A recipe; without one, the embedded model.")] = None,
        overrides: Overrides = None,
        *,
        as_json: AsJson = False,
    ) -> None:
        """Try the laws of training on your own model and machine; exit code 1 when one does not hold."""
        from tunesmith import api

        result = api.selftest(recipe, overrides or (), say=say)
        give(result, as_json, _selftest_lines)
        if not result["passed"]:
            raise typer.Exit(1)


def _selftest_lines(result: Mapping[str, Any]) -> list[str]:
    rows = [["law", "difference", "allowed", "in", "holds"]]
    for check in result["checks"]:
        error = "-" if check["error"] is None else f"{check['error']:.1e}"
        holds = "not tried" if check["error"] is None else ("yes" if check["passed"] else "NO")
        rows.append([check["name"], error, f"{check['limit']:.0e}", check["unit"], holds])
    return [*table(rows), "", "every law holds" if result["passed"] else "a law does NOT hold on this machine"]


def _listed(text: str | None) -> list[str]:
    """Parts between commas; a comma inside brackets belongs to its part."""
    from tunesmith.stages.comparing import split_list

    return split_list(text) if text else []


def _compare_lines(found: Mapping[str, Any]) -> list[str]:
    head = ["", found["metric"], "95 %", "best minus it", "sure", "before", "forgets", "trained", "seconds", "peak MB",
            "file MB", "seeds"]  # fmt: skip
    rows = [head]
    for row in found["rows"]:
        forgets = "-" if row["forgetting"] is None else f"{row['forgetting']:+.3f}"
        behind = f"{row['behind']['value']:+.4f}" if "behind" in row else "-"
        rows.append([
            row["name"], f"{row['value']:.4f}", f"[{row['low']:.4f}, {row['high']:.4f}]", behind,
            f"{100 * row['sure']:.1f} %" if "sure" in row else "-", f"{row['before']:.4f}",
            forgets, f"{row['trainable_parameters']:,}", f"{row['seconds']:.0f}",
            f"{row['peak_memory_bytes'] / 1e6:,.0f}", f"{row['file_bytes'] / 1e6:.2f}", str(row["seeds"]),
        ])  # fmt: skip
    lines = [*table(rows), "", found["recommendation"]]
    if found["left_out"]:
        lines.append(f"left out, the budget was spent: {', '.join(found['left_out'])}")
    lines += [f"failed: {entry['name']}, seed {entry['seed']}: {entry['why']}" for entry in found["failed"]]
    if found.get("test"):
        test = found["test"]["metrics"][found["metric"]]
        looks = (
            "measured once" if found["test"]["looks"] == 1 else f"measured with {found['test']['looks']} winners so far"
        )
        lines.append(f"test rows, {looks}, with {found['best']}: {cell_text(test)}")
    return [*lines, *_untuned_lines(found), f"page: {found['page']}"]


def _untuned_lines(found: Mapping[str, Any]) -> list[str]:
    """Models that were only asked, beside the winner."""
    untuned = found.get("untuned")
    if not untuned:
        return []
    rows = [[f"on the {untuned['part'].replace('_', '-')} rows", "parameters", found["metric"], "tuned minus it"]]
    tuned = untuned["tuned"]
    rows.append([f"{tuned['name']}, tuned", f"{tuned['parameters']:,}", f"{tuned['value']:.4f}", "-"])
    for row in untuned["rows"]:
        rows.append([row["name"], f"{row['parameters']:,}", cell_text(row), cell_text(row["difference"])])
    return ["", *table(rows), *([untuned["claim"]] if untuned["claim"] else [])]


def _plan_lines(found: Mapping[str, Any]) -> list[str]:
    """Bytes by line, whether it fits, time; then the same for other methods and devices."""
    memory = found["memory"]
    names = ("weights", "gradients", "optimizer", "activations", "head", "step", "allocator", "rollouts", "runtime",
             "first_use", "features", "peak")  # fmt: skip
    rows = [["memory", "GB"], *([name, f"{memory[name] / 1e9:.3f}"] for name in names if memory[name])]
    lines = [f"{found['stage']} of {found['base']} on {found['on']}", "", *table(rows), ""]
    verdict = "fits" if found["fits"] else "does NOT fit"
    lines.append(f"peak {memory['peak'] / 1e9:.2f} GB {verdict} in the {found['room'] / 1e9:.1f} GB there are")
    lines += [f"  {text}" for text in found["advice"]]
    cost = "" if found["price"] is None else f", costs {found['price']:.2f}"
    lines.append(
        f"{found['steps']:,} steps, {found['tokens']:,} tokens, {found['flops']:.2e} operations, "
        f"about {duration(found['seconds'])}{cost}"
    )
    methods = [["method", "trained", "weights, gradients, optimizer GB", "activations GB", "peak GB", "fits"]]
    for row in found["methods"]:
        sizes = [f"{row[name] / 1e9:.3f}" for name in ("states", "activations", "peak")]
        methods.append([row["method"], f"{row['trainable_parameters']:,}", *sizes, "yes" if row["fits"] else "no"])
    devices = [["device", "GB", "fits", "about"]]
    for row in found["devices"]:
        size, fits = f"{row['memory'] / 1e9:.0f}", "yes" if row["fits"] else "no"
        devices.append([row["device"], size, fits, duration(row["seconds"])])
    return [*lines, "", *table(methods), "", *table(devices)]
