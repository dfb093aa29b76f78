"""`python -m tests.trainers.twins` prints the table of the README."""

from tests.trainers.twins import table

print("\n".join(table()))
