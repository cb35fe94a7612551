"""`python -m train.warm`: compiles what DeepSpeed compiles on its first use, so that the first run need not."""

from train import ranks


def main() -> None:
    """Starts and leaves a process group of one, which builds the communication operator of the CPU."""
    ranks.prepare()
    ranks.join()
    ranks.leave()


if __name__ == "__main__":
    main()
