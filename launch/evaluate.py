"""A model's evaluation as Ray submits it: `ray job submit --working-dir . -- python launch/evaluate.py MODEL DATA/NAME ...`."""

import sys

from antdist.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate"]
    main()
