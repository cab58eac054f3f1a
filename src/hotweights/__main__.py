"""``python -m hotweights`` is ``hotweights``."""

from .cli import main

main()
