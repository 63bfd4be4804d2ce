"""Storage: file systems, atomic writes, free space and checkpoints."""
