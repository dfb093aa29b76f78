"""The ladder: each rung assumes only those below it, so that the first red one is the diagnosis."""
