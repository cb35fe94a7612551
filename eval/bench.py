"""Benchmarks: `python -m eval.bench train|prefill|packing [--quick]`. Figures are ratios, measured in one run.

train: one training step, forward and backward, of Hugging Face's model, dense, fused, and the text alone.
prefill: prompt and 32 decode steps under each schedule.
packing: training steps on rows of mixed lengths, padded, grouped by length and packed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from eval import measure
from eval.arguments import UsageError, make_folder
from eval.benches import packing, prefill, train

TITLES = {
    "train": "Training step, side by side",
    "prefill": "Prefill and decode steps, side by side",
    "packing": "Padded, grouped and packed rows, side by side",
}
BENCHES = {"train": train, "prefill": prefill, "packing": packing}
MEMORY_NOTE = (
    "Peak memory is what one call adds; on a CPU it is the resident set of one fresh process, good to a fifth or so."
)
PREFILL_NOTES = f"""{MEMORY_NOTE}

Columns: "to token-layers" is the time as a multiple of what the live token-layers predict from the dense row (1 = as
predicted, below 1 = faster), "to FLOPs" the same with the cost model's decoder FLOPs. VisiPruner's thresholds are set
so that a random model fires (first tested layer, a tenth of the visual tokens kept, gone a quarter of the depth
later); "choice given" runs on the same live tokens without choosing them, so the difference is the price of the tests.
The other pruners have their published settings, layer numbers scaled to the depth.
"""
PACKING_NOTES = """The ratio is the median of the rounds'.

Rows: the sources of LLaVA-665k in their published proportions (LLaVA's issue 702); nobody published their lengths, so
the mean text length of each is assumed (eval/benches/packing.py) and spread log-normally; all lengths are scaled with
the image. A forward pass has 8 rows, or as many tokens as 8 rows have on average; tokens/s counts no padding; the
passes that are timed are of all sizes. Packed rows run under sdpa_packed, the others under sdpa.
"""
NOTES = {"train": f"{MEMORY_NOTE}\n", "prefill": PREFILL_NOTES, "packing": PACKING_NOTES}


def main(given: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(TITLES))
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: two minutes")
    parser.add_argument("--repeats", type=measure.positive, default=None, help="timed rounds (default 9, quick 5)")
    parser.add_argument(
        "--family", choices=measure.BENCH_FAMILIES, default="llava", help="whose training step (default llava)"
    )
    parser.add_argument("--out", type=Path, default=None, help="also write the tables to this file")
    args = parser.parse_args(given)
    bench = BENCHES[args.what]
    shapes = bench.GPU_SHAPES if torch.cuda.is_available() else bench.SHAPES
    repeats = args.repeats or (5 if args.quick else 9)
    if repeats == 1:
        parser.error("--repeats: got 1, expected at least 2, because quartiles are printed")
    if args.what != "train" and args.family != "llava":
        parser.error(f"--family: got {args.family} with {args.what}, expected train")
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    command = f"python -m eval.bench {args.what}" + (
        (" --quick" if args.quick else "")
        + (f" --family {args.family}" if args.family != "llava" else "")
        + f" --repeats {repeats}"
    )
    setting = measure.setting("") if args.what == "packing" else measure.setting()
    header = (
        f"# {TITLES[args.what]}\n\n`{command}`: {precision}, {setting}; medians of {repeats} rounds in turns "
        f"after a warm-up. {NOTES[args.what]}"
    )
    if args.out is not None:
        try:
            _check_file(args.out)
        except UsageError as error:
            parser.exit(2, f"{error}\n")
    families = {"family": args.family} if args.what == "train" else {}
    tables = [bench.table(shape, repeats, **families) for shape in (bench.QUICK if args.quick else shapes)]
    report = "\n".join([header, "\n\n".join(tables), ""])
    print(report)
    if args.out is not None:
        args.out.write_text(report, encoding="utf-8")


def _check_file(file: Path) -> None:
    """Raises UsageError where a file cannot be written; makes its folder."""
    if file.is_dir():
        raise UsageError(f"--out: got the folder {file}, expected a file")
    make_folder("--out", file.parent)


if __name__ == "__main__":
    main()
