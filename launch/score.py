"""The top N for every user as Ray submits it: `ray job submit --working-dir . -- python launch/score.py MODEL DATA/NAME --out ...`."""

import sys

from antdist.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["score"]
    main()
