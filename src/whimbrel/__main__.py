"""`python -m whimbrel` is `whimbrel`."""

from whimbrel.cli import main

if __name__ == "__main__":
    main()
