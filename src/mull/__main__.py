"""``python -m mull`` is the command ``mull``; ``torchrun -m mull`` starts it on every rank."""

from mull.app.cli import main

if __name__ == "__main__":
    main()
