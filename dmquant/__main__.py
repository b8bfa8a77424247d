"""Runs the commands by `python -m dmquant`, `accelerate launch -m dmquant` and `torchrun -m dmquant`."""

from dmquant.cli.app import main

if __name__ == "__main__":
    main()
