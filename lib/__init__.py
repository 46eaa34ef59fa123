"""The parallel room: synchronised batch normalisation and replicas. Needs torch and numpy only."""

if __name__ == "lib":
    raise ImportError(
        "import mit_semseg.lib in place of lib: a second copy of its classes "
        "would not be recognised by the package"
    )
