"""A trained model over HTTP: `mit-semseg serve` and the page of `mit-semseg app`."""
