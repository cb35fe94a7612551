"""The stage analysis as one picture: eight panels over the decoder's layers, two more for kinds of question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

_COLOURS = ("C0", "C3", "C2", "C1")
_MASKED = {"masked_before": "masked in [0, l)", "masked_from": "masked in [l, L)"}


def draw_stages(record: Mapping[str, Any], file: Path) -> None:
    """Draws all measurements of an analysis; the proposed window is shaded, paler where resampling moves its borders.

    Args:
        record: as in stages.json.
        file: PNG to write.
    """
    families = record["by_family"]
    rows = 5 if families else 4
    figure, grid = plt.subplots(rows, 2, figsize=(11, 3.5 * rows), layout="constrained")
    knocked, sliding, *others = grid.flat
    lens, rank, entropy, shares, norms, fired = others[-6:]
    _scores(knocked, record, {**_MASKED, "removed_before": "removed before l"})
    knocked.set(title="Vision masked or removed", xlabel="l")
    width = record["window"]
    _scores(sliding, record, {"masked_window": f"masked in [l, l + {width})"})
    sliding.set(title=f"Vision masked in {width} layer{'s' if width > 1 else ''}", xlabel="l")
    for axes, key in zip(others[:-6], _MASKED, strict=False):
        _losses(axes, record, key)
    shown = record["by_layer"]
    _curves(lens, shown, {"lens_probability": ""})
    lens.set(title="Logit lens: probability of the answer", ylabel="probability", ylim=(0, 1.02))
    _curves(rank, shown, {"lens_rank": ""})
    rank.set(title="Logit lens: rank of the answer", ylabel="rank (1 = best)", yscale="log")
    rank.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    rank.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    rank.yaxis.set_minor_formatter(NullFormatter())
    _curves(entropy, shown, {"lens_entropy": ""})
    entropy.set(title="Logit lens: entropy", ylabel="nats")
    entropy.set_ylim(bottom=0)
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
    for axes in (lens, rank, entropy, shares, norms, fired):
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


def _losses(axes: Any, record: Mapping[str, Any], key: str) -> None:
    """Draws what one series of knock-outs costs each kind of question."""
    for number, (name, found) in enumerate(record["by_family"].items()):
        results = found[key]
        axes.errorbar(
            [result["layer"] for result in results],
            [result["loss"] for result in results],
            yerr=[result["loss_error"] for result in results],
            color=f"C{number}",
            marker="o",
            markersize=4,
            capsize=2,
            label=f"{name} ({found['samples']})",
        )
    axes.set(title=f"By kind of question: {_MASKED[key]}", xlabel="l", ylabel="points lost")
    axes.set_xlim(-0.5, record["layers"] + 0.5)
    axes.legend(fontsize=8)
    _shade(axes, record, between=False)


def _curves(axes: Any, shown: Mapping[str, Sequence[float | None]], names: Mapping[str, str]) -> None:
    """Draws measurements by layer; one that no layer has is left out, in the legend too."""
    for number, (key, label) in enumerate(names.items()):
        values = [float("nan") if value is None else value for value in shown[key]]
        if all(value is None for value in shown[key]):
            continue
        style = "--" if key.startswith("change") else "-"
        axes.plot(
            range(len(values)),
            values,
            marker="o",
            markersize=4,
            linestyle=style,
            color=f"C{number}",
            label=label or None,
        )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, loc="upper left", ncols=2)


def _firings(axes: Any, record: Mapping[str, Any]) -> None:
    """Draws how often each layer is the fusion layer, filled, and the first without vision, as a frame around it."""
    found = record["visipruner"]
    styles: Any = (
        ("fusion", "fusion layer", {"width": 0.5, "color": "C0"}),
        ("exit", "first layer without vision", {"width": 0.8, "fill": False, "edgecolor": "C1", "linewidth": 1.5}),
    )
    for key, label, style in styles:
        if found[key]:
            layers, counts = zip(*found[key], strict=True)
            axes.bar(layers, counts, label=label, **style)
    kept = [value for value, count in found["kept"] for _ in range(count)]
    words = f"{sum(kept) / len(kept):.1f} tokens kept on average" if kept else "did not fire"
    axes.set(title=f"VisiPruner's tests: {words}", ylabel=f"samples (of {found['samples']})")
    axes.set_ylim(bottom=0, top=None if kept else 1)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def _shade(axes: Any, record: Mapping[str, Any], *, between: bool) -> None:
    """Shades the window's layers; in a panel over borders between layers, from enter to exit."""
    found = record["proposal"]
    if found is None:
        return
    half = 0.5 if between else 0.0
    (earliest, _), (_, latest) = found["interval"]["enter"], found["interval"]["exit"]
    for first, end in ((found["enter"], found["exit"]), (min(earliest, found["enter"]), max(latest, found["exit"]))):
        axes.axvspan(first - half, end - half, color="0.5", alpha=0.1, zorder=0)
