"""`mit-semseg bench`: compares the published procedure with this package, in alternation."""
