"""The `qwenspec` command, and `python -m qwenspec`."""

import sys


def main() -> None:
    """Run the command line, and be quiet about a Ctrl-C while it is imported too."""
    try:
        from qwenspec import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
