"""What the tests of all families share: the table of families, batches with padding, and the checks of generate()."""
