"""The training loop with its optimizer, metrics and guards."""
