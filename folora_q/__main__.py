"""`python -m folora_q`, and `accelerate launch -m folora_q`."""

from folora_q.cli.app import main

if __name__ == "__main__":
    main()
