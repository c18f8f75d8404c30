"""The training loop and what it is watched with: optimizer, metrics, guards."""
