"""The ladder: each rung relies only on the rungs below it, so the first rung that fails is the diagnosis."""
