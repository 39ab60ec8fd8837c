"""`python cli.py train recipe.yaml` from a checkout."""

from folora_q.cli.app import main

if __name__ == "__main__":
    main()
