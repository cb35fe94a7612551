"""Benchmarks: `python -m eval.bench train|prefill|packing [--quick]`. Figures are ratios, measured in one run.

train: one training step, forward and backward, of Hugging Face's model, dense, fused, and the text alone.
prefill: prompt and 32 decode steps under each schedule.
packing: training steps on rows of mixed lengths, padded, grouped by length and packed.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.arguments import UsageError, check_file, command_line, make_folder, positive
from eval.benches import packing, prefill, train
from eval.benches.models import FAMILIES

BENCHES = {"train": train, "prefill": prefill, "packing": packing}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes them where asked."""
    parser = command_line("eval.bench", __doc__)
    parser.add_argument("what", choices=list(BENCHES))
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: two minutes")
    parser.add_argument("--repeats", type=positive, default=None, help="timed rounds (default 9, quick 5)")
    parser.add_argument("--family", choices=FAMILIES, default="llava", help="whose training step (default llava)")
    parser.add_argument("--out", type=Path, default=None, help="also write the tables to this file")
    args = parser.parse_args(argv)
    repeats = args.repeats or (5 if args.quick else 9)
    if repeats == 1:
        parser.error("--repeats: got 1, expected at least 2, because quartiles are printed")
    if args.what != "train" and args.family != "llava":
        parser.error(f"--family: got {args.family} with {args.what}, expected train")
    if args.out is not None:
        try:
            make_folder("--out", args.out.parent)
            check_file("--out", args.out)
        except UsageError as error:
            parser.exit(2, f"{error}\n")
    bench = BENCHES[args.what]
    shapes = bench.GPU_SHAPES if torch.cuda.is_available() else bench.SHAPES
    family = {"family": args.family} if args.what == "train" else {}
    tables = [bench.table(shape, repeats, **family) for shape in (bench.QUICK if args.quick else shapes)]
    options = (" --quick" if args.quick else "") + (f" --family {args.family}" if args.family != "llava" else "")
    command = f"`python -m eval.bench {args.what}{options} --repeats {repeats}`"
    about = f"{setting(args.what)}; medians of {repeats} rounds in turns after a warm-up. {bench.NOTE}"
    report = "\n".join([f"# {bench.TITLE}\n\n{command}: {about}", *tables])
    print(report)
    if args.out is not None:
        args.out.write_text(report, encoding="utf-8")


def setting(what: str) -> str:
    """Returns precision, machine and version of this process's figures, in words."""
    kernel = "" if what == "packing" else "sdpa, "
    if torch.cuda.is_available():
        return f"bfloat16, {kernel}{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"float32, {kernel}{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
