"""`python -m antdist` is `antdist`."""

from antdist.cli.main import main

main()
