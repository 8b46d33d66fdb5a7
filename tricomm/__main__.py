"""``python -m tricomm``."""

from tricomm.cli import main

main()
