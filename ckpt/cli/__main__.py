"""`python -m ckpt.cli` is the command `ckpt`."""

from ckpt.cli import main

main()
