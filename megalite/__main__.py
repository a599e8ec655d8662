"""`python -m megalite COMMAND` is `megalite COMMAND`."""

from megalite.commands.main import main

if __name__ == "__main__":
    main()
