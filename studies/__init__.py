"""What the package was studied with: run from a checkout, not installed."""
