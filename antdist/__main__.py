"""`python -m antdist` is `antdist`."""

from antdist.cli import main

main()
