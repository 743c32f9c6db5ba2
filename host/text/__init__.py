"""Tokens and phrases of the host's text encoders."""
