"""The stage analysis as one picture: six panels over the decoder's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

_COLOURS = ("C0", "C3", "C2", "C1")


def draw_stages(record: Mapping[str, Any], file: Path) -> None:
    """Draws all measurements of an analysis; the proposed window is shaded.

    Args:
        record: as in stages.json.
        file: PNG to write.
    """
    figure, grid = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    knocked, sliding, lens, shares, norms, fired = grid.flat
    _scores(knocked, record, {
        "masked_before": "masked in [0, l)",
        "masked_from": "masked in [l, L)",
        "removed_before": "removed before l",
    })  # fmt: skip
    knocked.set(title="Vision masked or removed", xlabel="l")
    width = record["window"]
    _scores(sliding, record, {"masked_window": f"masked in [l, l + {width})"})
    sliding.set(title=f"Vision masked in {width} layer{'s' if width > 1 else ''}", xlabel="l")
    shown = record["by_layer"]
    _lens(lens, shown)
    _curves(
        shares,
        shown,
        {
            "share_last": "share, last token",
            "share_text": "share, all text",
            "change_last": "change, last token",
            "change_text": "change, all text",
        },
    )
    shares.set(title="Attention on vision", ylabel="share of attention; 1 - cosine", ylim=(0, 1.3))
    _curves(norms, shown, {"sink_value": "sinks", "other_value": "other visual tokens"})
    norms.set(title="L1 norm of value vectors")
    norms.set_ylim(0, 1.25 * norms.get_ylim()[1])
    _firings(fired, record)
    for axes in grid.flat:
        if not axes.get_xlabel():
            axes.set_xlabel("decoder layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for axes in (lens, shares, norms, fired):
        axes.set_xlim(-0.7, record["layers"] - 0.3)
        _shade(axes, record, between=True)
    _shade(knocked, record, between=False)
    figure.suptitle(_title(record))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _title(record: Mapping[str, Any]) -> str:
    head = f"{record['checkpoint']}, {record['samples']} samples of {Path(record['task']).name}: "
    found = record["proposal"]
    if found is None:
        return head + "no stages proposed"
    return head + f"proposed enter {found['enter']}, exit {found['exit']} (shaded)"


def _scores(axes: Any, record: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for number, (key, label) in enumerate(names.items()):
        results = record[key]
        axes.errorbar(
            [result["layer"] for result in results],
            [result["score"] for result in results],
            yerr=[result["error"] for result in results],
            color=_COLOURS[number],
            marker="o",
            markersize=4,
            capsize=2,
            label=label,
            linestyle="--" if key == "removed_before" else "-",
        )
    axes.axhline(record["score"]["score"], color="0.4", linewidth=1, label="as it is")
    axes.axhline(record["without_vision"]["score"], color="0.4", linewidth=1, linestyle=":", label="no vision at all")
    axes.set(ylabel="answered right (%)", xlim=(-0.5, record["layers"] + 0.5))
    axes.legend(fontsize=8)


def _lens(axes: Any, shown: Mapping[str, Sequence[float | None]]) -> None:
    layers = range(len(shown["lens_probability"]))
    axes.plot(layers, shown["lens_probability"], "C0o-", markersize=4, label="probability of the answer")
    axes.set(title="Logit lens, last instruction token", ylabel="probability")
    axes.set_ylim(0, 1.02)
    other = axes.twinx()
    other.plot(layers, shown["lens_entropy"], "C1s--", markersize=4, label="entropy")
    other.plot(layers, shown["lens_rank"], "C2^:", markersize=4, label="rank of the answer")
    other.set(ylabel="entropy (nats); rank (1 = best)", yscale="symlog")
    other.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], fontsize=8, loc="center right")


def _curves(axes: Any, shown: Mapping[str, Sequence[float | None]], names: Mapping[str, str]) -> None:
    for number, (key, label) in enumerate(names.items()):
        values = [float("nan") if value is None else value for value in shown[key]]
        style = "--" if key.startswith("change") else "-"
        axes.plot(
            range(len(values)), values, marker="o", markersize=4, linestyle=style, color=f"C{number}", label=label
        )
    axes.legend(fontsize=8, loc="upper left", ncols=2)


def _firings(axes: Any, record: Mapping[str, Any]) -> None:
    found, depth = record["visipruner"], record["layers"]
    for shift, key, label in ((-0.2, "fusion", "fusion layer"), (0.2, "exit", "first layer without vision")):
        counts = dict(found[key])
        axes.bar(
            [layer + shift for layer in range(depth)],
            [counts.get(layer, 0) for layer in range(depth)],
            0.4,
            label=label,
        )
    kept = [value for value, count in found["kept"] for _ in range(count)]
    words = f"{sum(kept) / len(kept):.1f} tokens kept on average" if kept else "did not fire"
    axes.set(title=f"VisiPruner's tests: {words}", ylabel=f"samples (of {found['samples']})")
    axes.set_ylim(bottom=0, top=None if kept else 1)
    axes.legend(fontsize=8)


def _shade(axes: Any, record: Mapping[str, Any], *, between: bool) -> None:
    """Shades the window's layers; in a panel over borders between layers, from enter to exit."""
    found = record["proposal"]
    if found is not None:
        half = 0.5 if between else 0.0
        axes.axvspan(found["enter"] - half, found["exit"] - half, color="0.5", alpha=0.15, zorder=0)
