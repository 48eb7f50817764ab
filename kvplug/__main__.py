"""``python -m kvplug``: the command ``kvplug``."""

from __future__ import annotations

from kvplug.cli import main

if __name__ == "__main__":
    main()
