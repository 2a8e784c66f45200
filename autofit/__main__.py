"""`python -m autofit`: the command, where its script is not on the PATH."""

from autofit.cli.main import main

main()
