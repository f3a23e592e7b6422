"""`python -m tlearn`: what `accelerate launch -m tlearn` and torchrun start."""

from tlearn.cli import main

if __name__ == "__main__":
    main()
