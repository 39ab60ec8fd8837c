"""`python cli.py train recipe.yaml` from a checkout."""

import sys

try:
    from folora_q.cli.app import main
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("folora_q"):
        raise
    print(f"error: {missing.name} is not installed for {sys.executable}", file=sys.stderr)
    print("hint: run `make setup`, then `.venv/bin/python cli.py`", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
