"""`python -m lorafuse.cli`."""

from lorafuse.cli import main

main()
