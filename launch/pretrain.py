"""The pre-training job as Ray submits it: `ray job submit --working-dir . -- python launch/pretrain.py --config F [key=value]`."""

import sys

from antdist.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["pretrain"]
    main()
