"""The features' job as Ray submits it: `ray job submit --working-dir . -- python launch/featurize.py DATA/NAME ...`."""

import sys

from antdist.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["featurize"]
    main()
