"""Going on after an out-of-memory inside training: same samples, same order, same weights as if it had not happened."""
