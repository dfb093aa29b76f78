"""What a person sees: the console, the report, the loss curve."""
