"""`python -m qwenspec`."""

from qwenspec.cli import main

if __name__ == "__main__":
    main()
