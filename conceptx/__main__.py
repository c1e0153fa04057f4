"""`python -m conceptx` is `conceptx`."""

from conceptx.cli import main

main()
