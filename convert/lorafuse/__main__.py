"""`python -m lorafuse`."""

from lorafuse.cli import main

main()
