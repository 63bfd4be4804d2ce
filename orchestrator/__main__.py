"""`python -m orchestrator …`, which is what a submitted Ray job runs."""

from orchestrator.cli import main

if __name__ == "__main__":
    main()
