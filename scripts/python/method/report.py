"""Results of several seeds as rows, a table for the terminal, Markdown and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from p2pcollab import cost
from p2pcollab.run import STEM, RunSpec

Result = Mapping[str, Any]

#: What every row has beside the columns; null without devices, or without the dense network.
_ALWAYS = (
    "gap_mean", "gap_sd", "saving_min", "saving_median", "saving_max", "network_macs_ratio",
    "bytes_sent_median", "epoch_seconds_ratio",
)  # fmt: skip


def row(
    dataset: str,
    model: str,
    name: str,
    epochs: float,
    columns: Mapping[str, Sequence[Result]],
    measured: Result | None = None,
) -> dict[str, Any]:
    """What the seeds of one configuration have in common, and how they differ. Percent and ratios.

    Args:
        columns: results by column, in the order of the seeds; some may be missing.
        measured: `columns.measure`, if the devices' models were assembled.
    """
    made: dict[str, Any] = {"dataset": dataset, "model": model, "config": name, "epochs": epochs}
    seeds = sorted({result["seed"] for results in columns.values() for result in results})
    made["seeds"] = seeds
    first = next(result for results in columns.values() for result in results)
    made["train_images"] = first["train_images"]
    for column in "ABCD":
        accuracies = [100 * result["accuracy"] for result in columns.get(column, ())]
        made[f"{column}_mean"] = statistics.fmean(accuracies) if accuracies else None
        made[f"{column}_sd"] = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        made[f"{column}_seeds"] = len(accuracies)
    made |= dict.fromkeys(_ALWAYS)
    gaps = list(differences(columns.get("D", ()), columns.get("A", ())).values())
    if gaps:
        made["gap_mean"] = statistics.fmean(gaps)
        made["gap_sd"] = statistics.stdev(gaps) if len(gaps) > 1 else None
    dense = statistics.fmean(result["macs"] for result in columns["A"]) if columns.get("A") else None
    assembled = columns.get("D", ())
    if assembled and dense:
        macs = [device["macs"] for result in assembled for device in result["devices"]]
        made |= {
            "devices": len(assembled[0]["devices"]),
            "saving_min": dense / max(macs),
            "saving_median": dense / statistics.median(macs),
            "saving_max": dense / min(macs),
            "network_macs_ratio": statistics.fmean(result["macs"] for result in assembled) / dense,
        }
    if assembled:
        made |= {
            "bytes_sent_median": statistics.median(
                device["sent_bytes"] for result in assembled for device in result["devices"]
            ),
            "inference_macs_ratio": assembled[0]["inference_macs"] / assembled[0]["dense_inference_macs"],
            "parameters": assembled[0]["parameters"],
        } | _trying(assembled)
    if measured is not None:
        made |= {
            "epoch_seconds_ratio": measured["timing"]["ratio"],
            "epoch_seconds_sub_model": measured["timing"]["sub_model_epoch_s"],
            "epoch_seconds_dense": measured["timing"]["dense_epoch_s"],
            "peak_rss_bytes": measured["peak_rss_bytes"],
        }
    if columns.get("A"):
        made["dense_schedule"] = columns["A"][0]["spec"]["schedule"]
    divided = (assembled or columns.get("C") or columns.get("B") or [first])[0]["spec"]
    made["model_settings"], made["schedule"] = divided["model"], divided["schedule"]
    if assembled or columns.get("C"):
        made["saving_one_task"] = _saving_one_task(divided)
    return made


def differences(some: Sequence[Result], others: Sequence[Result]) -> dict[int, float]:
    """By seed, the points of accuracy that one column has more than another; only seeds that both have."""
    other_of = {result["seed"]: result["accuracy"] for result in others}
    return {
        result["seed"]: 100 * (result["accuracy"] - other_of[result["seed"]])
        for result in some
        if result["seed"] in other_of
    }


def _trying(assembled: Sequence[Result]) -> dict[str, float]:
    """What trying others' work takes of all computation, and how much is refused of it, all honest."""
    devices = [device for result in assembled for device in result["devices"]]
    tried = sum(device["tried"] for device in devices)
    return {
        "trying_share": sum(device["tried_macs"] for device in devices)
        / sum(device["macs"] for device in devices),
        "refused_share": sum(device["refused"] for device in devices) / max(1, tried),
    }


def _saving_one_task(fields: Mapping[str, Any]) -> float:
    """Training MACs of the dense network over those of the costliest task's branch, for classes of one size.

    What a device spends on trying its results, and saves by waiting, is not in it.
    """
    spec = RunSpec.model_validate(_set(fields))
    classes = np.arange(len(spec.classes))
    costs = [cost.offered_macs(spec, [shard], classes) for shard in spec.shards if shard != STEM]
    return float(cost.training_macs_dense(spec) / max(costs))


def _set(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None: a kept result may have unset fields that there are not any more."""
    return {
        name: _set(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if value is not None
    }


def line(one: Mapping[str, Any]) -> str:
    """A row for the terminal."""
    columns = "  ".join(f"{column} {_percent(one, column)}" for column in "ABCD")
    savings = (
        f"  saving {one['saving_min']:.1f}/{one['saving_median']:.1f}/{one['saving_max']:.1f}x"
        if one["saving_min"] is not None
        else ""
    )
    return f"{one['dataset']} {one['model']} {one['config']}: {columns}{savings}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = (
        "| data | model | configuration | epochs | seeds | A dense | B grouped | C decoupled "
        "| **D assembled** | D - A "
        "| saving min / median / max | epoch, one core | sent per device | all devices |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(_markdown_row(one) for one in rows)


def _markdown_row(one: Mapping[str, Any]) -> str:
    def known(key: str, text: str) -> str:
        return text.format(one[key]) if one.get(key) is not None else "-"

    gap = known("gap_mean", "{:+.2f}")
    if one.get("gap_sd") is not None:
        gap += f" ± {one['gap_sd']:.2f}"
    saving = " / ".join(known(key, "{:.1f}x") for key in ("saving_min", "saving_median", "saving_max"))
    sent = f"{one['bytes_sent_median'] / 1e6:.0f} MB" if one.get("bytes_sent_median") is not None else "-"
    cells = [
        f"{one['dataset']} ({one['train_images']:,})",
        one["model"],
        one["config"],
        f"{one['epochs']:g}",
        str(len(one["seeds"])),
        *(_percent(one, column) for column in "ABC"),
        f"**{_percent(one, 'D')}**",
        gap,
        saving,
        known("epoch_seconds_ratio", "{:.1f}x faster"),
        sent,
        known("network_macs_ratio", "{:.2f} of A"),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _percent(one: Mapping[str, Any], column: str) -> str:
    mean, sd, seeds = (one.get(f"{column}_{what}") for what in ("mean", "sd", "seeds"))
    if mean is None:
        return "-"
    percent = f"{mean:.2f} ± {sd:.2f}" if sd is not None else f"{mean:.2f}"
    if seeds in (None, len(one["seeds"])):
        return percent
    return f"{percent} ({seeds} of {len(one['seeds'])} seeds)"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against computation, both relative to the dense network's.

    Filled: assembled from devices, and the device that computes least. Hollow: trained in one place with
    decoupled losses, and what a device with one task would compute. Bars: the seeds' standard deviation.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "p2pcollab"
    figure, axes = plt.subplots(figsize=(8.0, 8.0))
    colours = plt.get_cmap("tab20")  # more rows than the usual ten colours
    axes.set_prop_cycle(color=[colours(index) for index in range(colours.N)])
    for one in rows:
        column, saving = ("D", "saving_max") if one.get("D_mean") is not None else ("C", "saving_one_task")
        if any(one.get(key) is None for key in ("A_mean", f"{column}_mean", saving)):
            continue
        axes.errorbar(
            one[saving],
            one[f"{column}_mean"] - one["A_mean"],
            yerr=(one.get("gap_sd") if column == "D" else one["C_sd"]) or 0.0,
            fmt="o",
            fillstyle="full" if column == "D" else "none",
            capsize=3,
            label=f"{one['dataset']} ({one['train_images']:,}) {one['model']}: {one['config']}",
        )
    axes.axhline(0.0, color="grey", linewidth=1)
    axes.axvline(11.8, color="grey", linewidth=1, linestyle=":")
    axes.set_xlabel("times less training computation than the dense network")
    axes.set_ylabel("minus the dense network's accuracy, points")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
