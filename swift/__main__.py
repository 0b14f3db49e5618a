"""``python -m swift`` is ``swift``: for launchers that start a module, such as torchrun."""

from swift.cli import main

if __name__ == "__main__":
    main()
