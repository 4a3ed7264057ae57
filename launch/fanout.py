"""The fan-out as Ray submits it: `ray job submit --working-dir . -- python launch/fanout.py --config F --targets a,b ...`."""

import sys

from antdist.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["fanout"]
    main()
