"""The one training command: `deepspeed train/run.py RECIPE [key=value ...] [--check]`."""

import gc
import os
import sys
from pathlib import Path

# Nothing is garbage while modules are imported, and looking for it takes a quarter of the time (5.6 s, without it 4.3).
gc.disable()

# The only path edit in the repository: a script's folder must not hide packages of the same names.
_ROOT = Path(__file__).resolve().parents[1]
if Path(sys.path[0]).resolve() == _ROOT / "train":
    sys.path.pop(0)
sys.path.insert(0, str(_ROOT))

# On a CPU that does other work too, torch's threads wait for one another by spinning, which made a step 30 times
# slower (16 conversations, 2 threads beside 2 busy processes: 9.1 s, with this 0.3). Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
from typing import TYPE_CHECKING

from train.errors import PeerError, Stopped, TrainingError
from train.stop import StopRequest

if TYPE_CHECKING:
    from recipes.schema import Recipe


def main() -> int:
    """Runs a recipe on this rank; returns the exit code."""
    arguments = _arguments()
    stop = StopRequest()
    stop.watch()  # before the slow imports
    try:
        from recipes.errors import RecipeError
        from train import distributed

        try:
            distributed.setup_env()
        except RecipeError as error:  # nothing tells yet whether this rank speaks for all
            print(error, file=sys.stderr, flush=True)
            return 2
    except Stopped:
        print(f"stopped by {stop.reason} before the start", flush=True)
        return 0
    try:
        return _run(arguments, stop)
    except Stopped:
        text = f"stopped by {stop.reason}; nothing was left to save; the same command goes on"
        return distributed.exit_with(text, code=0)
    except RecipeError as error:
        where = "" if str(error).startswith(arguments.recipe) else f"{arguments.recipe}: "
        return distributed.exit_with(f"{where}{error}", code=2)
    except TrainingError as error:
        return distributed.exit_with(str(error), code=1)
    except PeerError as error:
        return error.code if error.is_reported else distributed.exit_with(str(error), code=1)


def _run(arguments: argparse.Namespace, stop: StopRequest) -> int:
    from recipes.errors import RecipeError
    from recipes.schema import load_recipe
    from train import distributed

    if distributed.world_size() > 1 and not arguments.check:
        distributed.connect()  # from here on, ranks report failures to each other
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    for given, other in (("gpu", "check"), ("mfu", "gpu")):
        found = getattr(arguments, given)
        if found is not None and not getattr(arguments, other):
            raise RecipeError(f"--{given}: got '{found}' without --{other}, expected both or neither")
    if arguments.check:
        from train.estimate import parse_card
        from train.preview import preview

        gc.enable()
        if distributed.rank() == 0:
            card = parse_card(arguments.gpu, count=distributed.world_size()) if arguments.gpu is not None else None
            share = {} if arguments.mfu is None else {"mfu": _share(arguments.mfu)}
            print("\n".join(preview(recipe, distributed.world_size(), card=card, **share)))
        return 0
    _train(recipe, arguments.phase, stop)
    distributed.shutdown()
    return 0


def _train(recipe: "Recipe", first: int, stop: StopRequest) -> None:
    """Trains the phases from `first` on, each in a fresh process, or finds them done."""
    from train import distributed
    from train.loop import run_phase

    gc.freeze()  # what was imported stays
    gc.enable()
    for phase in range(first, len(recipe.phases)):
        if phase > first:
            if distributed.any_rank(stop.is_requested()):
                raise Stopped
            if distributed.is_initialized():  # the phase before was trained here, under its DeepSpeed configuration
                distributed.run_next(phase)
        if not run_phase(recipe, phase, stop):
            return


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a model from a recipe.")
    parser.add_argument("recipe", help="YAML file, e.g. recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=20")
    parser.add_argument("--check", action="store_true", help="validate, print steps, memory and cost, then exit")
    parser.add_argument("--gpu", metavar="GPU", help="with --check: 24 (GB), A100 or 8xH100: estimate fit and time")
    parser.add_argument("--mfu", metavar="SHARE", help="with --gpu: assumed model FLOPs utilization; default 0.4")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("--phase", type=int, default=0, help=argparse.SUPPRESS)  # set by run_next
    return parser.parse_intermixed_args()


def _share(text: str) -> float:
    from recipes.errors import RecipeError

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise RecipeError(f"--mfu: got '{text}', expected a number above 0, up to 1")
    return value


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # a rank that failed must not wait for others in a destructor
    sys.exit(0)
