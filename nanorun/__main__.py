"""`python -m nanorun`, and so `torchrun -m nanorun`."""

from nanorun.cli import main

main()
