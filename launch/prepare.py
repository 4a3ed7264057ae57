"""A preparation as Ray submits it: `ray job submit --working-dir . -- python launch/prepare.py SRC --domain NAME --out DATA ...`."""

import sys

from antdist.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["prepare"]
    main()
