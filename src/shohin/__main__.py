"""``python -m shohin`` is the command ``shohin``."""

from shohin.cli import main

if __name__ == "__main__":
    main()
