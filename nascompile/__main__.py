"""`python -m nascompile`."""

from nascompile.cli import main

if __name__ == "__main__":
    main()
