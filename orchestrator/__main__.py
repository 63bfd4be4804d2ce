"""`python -m orchestrator …`, which is what a submitted Ray job runs."""

from orchestrator.cli.app import main

if __name__ == "__main__":
    main()
