"""The command of this package."""

import sys

from train.release.release import main

sys.exit(main())
