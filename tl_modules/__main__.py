"""`python -m tl_modules`: the command line."""

from tl_modules.cli import main

if __name__ == "__main__":
    main()
