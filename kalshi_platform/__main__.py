"""`python -m kalshi_platform`: the same as the console script."""

from kalshi_platform.commands.main import run

if __name__ == "__main__":
    run()
