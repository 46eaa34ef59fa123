"""Synchronised batch normalisation and data parallelism. Imports torch and numpy only."""

if __name__ == "lib":
    raise ImportError(
        "import mit_semseg.lib instead of lib, which would create a second copy of its classes"
    )
