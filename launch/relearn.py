"""The re-learning job as Ray submits it: `ray job submit --working-dir . -- python launch/relearn.py --config F target=NAME ...`."""

import sys

from antdist.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["relearn"]
    main()
