"""What the user sees: the console, progress, the report, the loss curve."""
