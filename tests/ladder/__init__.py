"""The ladder: numbered rungs, each assuming only those below it, so that the first red one is the diagnosis."""
