"""Hugging Face folders: a pair is read from them, sharded, and written back to them."""
