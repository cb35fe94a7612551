"""The stage analysis as numbers, in words, as one picture, and as the recipe of the proposed stages."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from eval.arguments import UsageError, check_file
from eval.checkpoint import Checkpoint
from eval.comparison.plots import set_log_scale
from eval.comparison.tables import markdown
from eval.stage_analysis.probes import SINKS, narrowed
from eval.stage_analysis.search import Analysis, Proposal, Trial, Trials, side_intervals
from models.cost import plan_cost
from recipes.resolved import dump_recipe
from recipes.schema import Recipe, RecipeError, load_recipe

Record = dict[str, Any]
WIDTH = 112  # characters of a line
_COLOURS = ("C0", "C3", "C2", "C1")
_MASKED = {"masked_before": "masked in [0, l)", "masked_from": "masked in [l, L)"}
_RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOREIGN = _RECIPES / "llava_fused.yaml"
READY = _RECIPES / "qwen3_vl_4b_fused.yaml"  # tunes a ready VLM; nothing else of it is Qwen's but `data.processor`


def record_of(analysis: Analysis, proposal: Proposal | None, args: argparse.Namespace, name: str) -> Record:
    """Returns everything that was found, ready for JSON.

    Args:
        analysis: after its run.
        proposal: None where the task does not need the image.
        args: the command line, with `command` as text.
        name: the checkpoint's.
    """
    trials, depth, width = analysis.trials, analysis.trials.depth, analysis.window
    windows = dict(trials.windows(width))
    record: Record = {
        "command": args.command,
        "checkpoint": name,
        "stages": None if analysis.plan is None else analysis.plan.to_dict(),
        "task": args.task,
        "samples": len(analysis.samples),
        "tolerance": args.tolerance,
        "layers": depth,
        "window": width,
        "score": asdict(trials.result(trials.whole)),
        "without_vision": asdict(trials.result(trials.nothing)),
        **_masked(trials),
        "masked_window": _results(trials, windows.__getitem__, len(windows)),
        "removed_before": _results(trials, lambda layer: trials.removed_outside(layer, depth), depth + 1),
        "by_layer": analysis.measurements.means(),
        "by_family": _families(analysis),
        "visipruner": _firings(analysis),
    }
    record["proposal"], record["verdict"] = _proposal(analysis, proposal, args.tolerance)
    record["answers"] = {
        sample.id: [bool(trials.right[trial][place]) for trial in (trials.whole, trials.nothing)]
        for place, sample in enumerate(analysis.samples)
    }
    return record


def _masked(trials: Trials, places: Sequence[int] | None = None) -> dict[str, list[Record]]:
    """Returns what masking before each layer, and from it on, costs; with `places`, over these samples alone."""
    depth = trials.depth
    return {
        "masked_before": _results(trials, lambda layer: trials.masked_outside(layer, depth), depth + 1, places),
        "masked_from": _results(trials, lambda layer: trials.masked_outside(0, layer), depth + 1, places),
    }


def _results(
    trials: Trials, trial_of: Callable[[int], Trial], count: int, places: Sequence[int] | None = None
) -> list[Record]:
    return [{"layer": layer, **asdict(trials.result(trial_of(layer), places))} for layer in range(count)]


def _families(analysis: Analysis) -> dict[str, Record]:
    """Returns, for each kind of question where there are several, its samples and what the knock-outs cost it."""
    trials = analysis.trials
    members: dict[str, list[int]] = {}
    for place, sample in enumerate(analysis.samples):
        members.setdefault(sample.family, []).append(place)
    if len(members) < 2:
        return {}
    return {
        family: {
            "samples": len(places),
            "score": asdict(trials.result(trials.whole, places)),
            "without_vision": asdict(trials.result(trials.nothing, places)),
            **_masked(trials, places),
        }
        for family, places in sorted(members.items())
    }


def _firings(analysis: Analysis) -> Record:
    found = analysis.firings
    counts = {
        key: sorted(Counter(value for one in found if (value := getattr(one, key)) is not None).items())
        for key in ("fusion", "kept", "exit")
    }
    return {"samples": len(found), **{key: [list(pair) for pair in pairs] for key, pairs in counts.items()}}


def _proposal(analysis: Analysis, found: Proposal | None, tolerance: float) -> tuple[Record | None, str]:
    """Returns the proposal with what it costs, or None, and the verdict in words."""
    trials = analysis.trials
    if found is None:
        without = trials.result(trials.nothing)
        return None, (
            f"this checkpoint does not need the image for this task: without vision it loses {_loss(without.__dict__)} "
            f"points, which is not more than {tolerance:g} points and two standard errors"
        )
    if (found.enter, found.exit) == (0, trials.depth):
        return None, "vision is needed from the first layer to the last: no window loses as little as the tolerance"
    plan = narrowed(analysis.plan, found.enter, found.exit)
    if plan is None:
        raise ValueError(f"no vision in layers [{found.enter}, {found.exit})")
    config = analysis.model.config.text_config
    visual, text = (round(sum(many) / len(many)) for many in (analysis.visual_tokens, analysis.text_tokens))
    costs = {
        name: asdict(plan_cost(config, one, visual=visual, text=text))
        for name, one in (("proposed", plan), ("as_it_is", analysis.plan), ("dense", None))
    }
    return {
        "enter": found.enter,
        "exit": found.exit,
        "stages": plan.to_dict(),
        "first": list(found.first),
        "interval": asdict(side_intervals(trials, tolerance)),
        "crossed": found.crossed,
        "widened": found.is_widened,
        "masked": asdict(trials.result(trials.masked_outside(found.enter, found.exit))),
        "removed": asdict(trials.result(trials.removed_outside(found.enter, found.exit))),
        "cost": {"visual": visual, "text": text, **costs},
    }, f"enter {found.enter}, exit {found.exit}"


def evidence_lines(record: Record) -> list[str]:
    """Returns the finding in lines that fit on a screen, and in a recipe's comment."""
    return [line for sentence in evidence(record) for line in wrap(sentence, WIDTH, subsequent_indent="  ")]


def evidence(record: Record) -> list[str]:
    """Returns the finding in a few sentences: what was asked, what is proposed, and why."""
    score, without, depth = record["score"], record["without_vision"], record["layers"]
    lines = [
        f"{record['checkpoint']} ({_plan_text(record['stages'])}), {record['samples']} samples of {record['task']}: "
        f"{_score(score)} as it is, {_score(without)} with vision masked in all {depth} layers.",
    ]
    found = record["proposal"]
    if found is None:
        return [*lines, f"No stages proposed: {record['verdict']}."]
    enter, leave = found["enter"], found["exit"]
    lines += [
        f"Proposed: enter {enter}, exit {leave} of {depth} layers (tolerance {record['tolerance']:g} points).",
        f"Vision masked in the layers outside loses {_loss(found['masked'])} points; one layer more masked, all before "
        f"layer {enter + 1} lose {_loss(record['masked_before'][enter + 1])}, all from layer {leave - 1} on "
        f"{_loss(record['masked_from'][leave - 1])}.",
    ]
    sides = [f"{name} {low}" + (f" to {high}" if high > low else "") for name, (low, high) in found["interval"].items()]
    lines.append(f"95 % intervals of a bootstrap over images, each side alone: {' and '.join(sides)}.")
    if found["widened"]:
        first = found["first"]
        lines.append(f"Each side alone allows [{first[0]}, {first[1]}); both together did not, so it was widened.")
    if found["crossed"]:
        lines.append("Either side alone can do without the middle: this is the narrowest window that can stand alone.")
    cost = found["cost"]
    tokens = {name: cost[name]["visual_token_layers"] for name in ("proposed", "as_it_is", "dense")}
    flops = cost["proposed"]["flops"] / cost["dense"]["flops"]
    return [
        *lines,
        f"With visual tokens removed outside, before any training, it loses {_loss(found['removed'])} points: the "
        "starting point of a training with these stages.",
        f"Cost of a sample ({cost['visual']} visual, {cost['text']} text tokens): {tokens['proposed']:,} visual "
        f"token-layers (as it is {tokens['as_it_is']:,}, dense {tokens['dense']:,}), {flops:.0%} of dense "
        "decoder FLOPs.",
    ]


def report_of(record: Record) -> str:
    """Returns stages.md."""
    points = f"{record['tolerance']:g} points"
    parts = [
        f"# Stages of {record['checkpoint']}",
        f"`{record['command']}`",
        "\n".join(f"- {line}" for line in evidence(record)),
        "![all measurements by layer](stages.png)",
        "Scores are percentages of samples whose whole answer is the greedy one, plus or minus one standard error; "
        "`loss` is points against the checkpoint as it is, on the same samples. A range of layers may go where its "
        f"loss and one standard error together are at most {points}.",
        "## Vision masked or removed",
        _knockouts(record),
        *_by_family(record),
        "## What each layer shows",
        _layers(record),
        "## Where VisiPruner's tests fire",
        _visipruner(record),
    ]
    return "\n\n".join(parts) + "\n"


def _knockouts(record: Record) -> str:
    width, rows = record["window"], []
    for layer in range(record["layers"] + 1):
        cells = [
            _cell(record[key][layer]) if layer < len(record[key]) else "-"
            for key in ("masked_before", "masked_from", "masked_window", "removed_before")
        ]
        rows.append([str(layer), *cells])
    heads = ["l", "masked in [0, l)", "masked in [l, L)", f"masked in [l, l + {width})", "removed before l"]
    return (
        "Masked: no text token sees a visual one there; visual tokens still run. Removed: visual tokens enter at "
        "l, as a stage plan would have it (removing them from l on is the same as masking them there). Each cell: "
        "score and (loss).\n\n" + _table(heads, rows)
    )


def _by_family(record: Record) -> list[str]:
    """Returns the section on kinds of questions; nothing where there is one kind."""
    families = record["by_family"]
    if not families:
        return []
    heads = ["l", *(f"{name} ({found['samples']})" for name, found in families.items())]
    parts = [
        "## By kind of question",
        "How many samples in brackets. Each cell: points lost, plus or minus one standard error.",
    ]
    for key, words in (("masked_before", "masked in [0, l)"), ("masked_from", "masked in [l, L)")):
        rows = [
            [str(layer), *(_loss(found[key][layer]) for found in families.values())]
            for layer in range(record["layers"] + 1)
        ]
        parts.append(f"Vision {words}:\n\n" + _table(heads, rows))
    return parts


def _layers(record: Record) -> str:
    names = {
        "lens_probability": "p(answer)",
        "lens_rank": "rank",
        "lens_entropy": "entropy (nats)",
        "share_last": "vision's share, last token",
        "share_text": "the same, all text",
        "change_last": "change, last token",
        "change_text": "change, all text",
        "sink_value": "value norm, sinks",
        "other_value": "value norm, others",
    }
    shown = record["by_layer"]
    rows = [
        [str(layer), *("-" if shown[name][layer] is None else f"{shown[name][layer]:.3g}" for name in names)]
        for layer in range(record["layers"])
    ]
    return (
        "Means over samples. Logit lens: last norm and head on the last instruction token after the layer; probability "
        "and rank (1 is best) of the answer's first token. Vision's share of attention; change is 1 - cosine of the "
        f"attention over visual tokens with the layer before. L1 norm of value vectors: sinks are the {SINKS:.0%} of "
        "visual tokens that text attends to most in that layer.\n\n" + _table(["layer", *names.values()], rows)
    )


def _visipruner(record: Record) -> str:
    found = record["visipruner"]
    fired, gone = (sum(count for _, count in found[key]) for key in ("fusion", "exit"))
    text = (
        f"Published settings, scaled to the depth. The middle's test fired in {fired} of {found['samples']} samples; "
        f"vision was gone before the end in {gone}."
    )
    if not fired:
        return text
    kept = sum(value * count for value, count in found["kept"]) / fired
    fusion, leaving = (dict(found[key]) for key in ("fusion", "exit"))
    rows = [
        [str(layer), str(fusion.get(layer, 0)), str(leaving.get(layer, 0))]
        for layer in range(record["layers"])
        if layer in fusion or layer in leaving
    ]
    return f"{text} It kept {kept:.1f} visual tokens on average.\n\n" + _table(
        ["layer", "fusion layer of", "first without vision in"], rows
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown([heads, *rows]).rstrip("\n")


def _plan_text(stages: Record | None) -> str:
    if stages is None:
        return "dense"
    if stages["layers"] is not None:
        return f"vision in layers {', '.join(map(str, stages['layers']))}"
    return f"enter {stages['enter']}, exit {stages['exit']}"


def _score(result: Record) -> str:
    return f"{result['score']:.1f} +- {result['error']:.1f} %"


def _loss(result: Record) -> str:
    return f"{result['loss']:.1f} +- {result['loss_error']:.1f}"


def _cell(result: Record) -> str:
    return f"{_score(result)} ({result['loss']:+.1f})"


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
    _draw_scores(knocked, record, {**_MASKED, "removed_before": "removed before l"})
    knocked.set(title="Vision masked or removed", xlabel="l")
    width = record["window"]
    _draw_scores(sliding, record, {"masked_window": f"masked in [l, l + {width})"})
    sliding.set(title=f"Vision masked in {width} layer{'s' if width > 1 else ''}", xlabel="l")
    for axes, key in zip(others[:-6], _MASKED, strict=False):
        _draw_losses(axes, record, key)
    shown = record["by_layer"]
    _draw_curves(lens, shown, {"lens_probability": ""})
    lens.set(title="Logit lens: probability of the answer", ylabel="probability", ylim=(0, 1.02))
    _draw_curves(rank, shown, {"lens_rank": ""})
    rank.set(title="Logit lens: rank of the answer", ylabel="rank (1 = best)")
    set_log_scale(rank)
    _draw_curves(entropy, shown, {"lens_entropy": ""})
    entropy.set(title="Logit lens: entropy", ylabel="nats")
    entropy.set_ylim(bottom=0)
    _draw_curves(
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
    _draw_curves(norms, shown, {"sink_value": "sinks", "other_value": "other visual tokens"})
    norms.set(title="L1 norm of value vectors")
    norms.set_ylim(0, 1.25 * norms.get_ylim()[1])
    _draw_firings(fired, record)
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


def _draw_scores(axes: Any, record: Mapping[str, Any], names: Mapping[str, str]) -> None:
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


def _draw_losses(axes: Any, record: Mapping[str, Any], key: str) -> None:
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


def _draw_curves(axes: Any, shown: Mapping[str, Sequence[float | None]], names: Mapping[str, str]) -> None:
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


def _draw_firings(axes: Any, record: Mapping[str, Any]) -> None:
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


def check_target(target: Path | None) -> None:
    """Raises UsageError where the recipe's file exists or cannot be made."""
    if target is None:
        return
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--write: got {target}, expected a .yaml file in a folder that exists")
    check_file("--write", target, is_new=True)


def starting_recipe(checkpoint: Checkpoint, given: str) -> Recipe:
    """Returns the recipe that a checkpoint was trained with; of one without, one that starts from the checkpoint.

    That is LLaVA's for a LLaVA, and one that tunes a ready VLM for any other family.

    Args:
        checkpoint: the checkpoint.
        given: what it was called by: a folder or a hub name.

    Raises:
        RecipeError: that recipe cannot be used any more.
    """
    recipe = checkpoint.weights / "recipe.yaml"
    if recipe.is_file():
        return load_recipe(recipe)
    is_llava = checkpoint.family == "llava"
    foreign = load_recipe(FOREIGN if is_llava else READY).model_dump()
    if not is_llava:
        how = {"format": checkpoint.chat_format, "image_aspect": checkpoint.aspect}
        foreign["data"] |= {**how, "processor": {}, "expected_visual_tokens": None}
    model = {"config": None, "checkpoint": given, "language_model": None, "vision_tower": None, "stages": None}
    return Recipe.model_validate({**foreign, "model": model})


def write_recipe(target: Path, start: Recipe, record: dict[str, Any]) -> None:
    """Writes a recipe with the proposed stages, the evidence in a comment on top.

    Args:
        target: file to write; it must not exist.
        start: what else the recipe says.
        record: of the analysis.

    Raises:
        RecipeError: nothing was proposed, or the file exists.
    """
    if record["proposal"] is None:
        raise RecipeError(f"--write: {target} was not written: no stages are proposed: {record['verdict']}")
    fields = start.model_dump()
    fields |= {"name": target.stem, "output": f"outputs/{target.stem}"}
    fields["model"]["stages"] = record["proposal"]["stages"]
    recipe = Recipe.model_validate(fields)
    lines = ["The stages of this recipe were proposed by", f"  {record['command']}", *evidence_lines(record)]
    text = "".join(f"# {line}\n" for line in lines) + "\n" + dump_recipe(recipe)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RecipeError(f"--write: {target}: {error.strerror}, expected a file that can be made") from error
    load_recipe(target)
