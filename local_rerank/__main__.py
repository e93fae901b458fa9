"""`python -m local_rerank` runs the command `local-rerank`."""

from local_rerank.commands.app import main

if __name__ == "__main__":
    main()
