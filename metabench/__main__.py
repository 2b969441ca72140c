"""`python -m metabench`: the command line."""

from metabench.cli import main

main()
