"""The one training command: `deepspeed train/run.py RECIPE [key=value ...] [--check]`."""

import os
import sys
from pathlib import Path

# The only path edit in the repository: a script's own folder must not hide packages of the same names.
_ROOT = Path(__file__).resolve().parents[1]
if Path(sys.path[0]).resolve() == _ROOT / "train":
    sys.path.pop(0)
sys.path.insert(0, str(_ROOT))

# On a CPU that does other work too, torch's threads wait for one another by spinning, which made a step 30 times
# slower (16 conversations, 2 threads beside 2 busy processes: 9.1 s; so, 0.3 s). Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse

from data.rows import DataError
from recipes.schema import RecipeError, load_recipe
from train import ranks
from train.failure import TrainingError


def main() -> int:
    """Runs one phase of a recipe on this rank, then the next one in a fresh process; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train what a recipe says.")
    parser.add_argument("recipe", help="YAML file, e.g. recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=20")
    parser.add_argument("--check", action="store_true", help="validate, say what it will do, stop")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("--phase", type=int, default=0, help=argparse.SUPPRESS)  # set by run_next
    arguments = parser.parse_intermixed_args()
    ranks.prepare()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.check:
            from train.preview import preview

            if ranks.rank() == 0:
                print("\n".join(preview(recipe, ranks.count())))
            return 0
        from train.phase import run_phase

        finished = run_phase(recipe, arguments.phase)
    except RecipeError as error:
        where = "" if str(error).startswith(arguments.recipe) else f"{arguments.recipe}: "
        return ranks.fail(f"{where}{error}", code=2)
    except DataError as error:  # of a worker too, whose message torch puts behind a traceback
        return ranks.fail(str(error).strip().splitlines()[-1].partition("DataError: ")[2] or str(error), code=1)
    except TrainingError as error:
        return ranks.fail(str(error), code=1)
    if finished and arguments.phase + 1 < len(recipe.phases):
        ranks.run_next(arguments.phase + 1)
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
