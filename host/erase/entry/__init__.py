"""Where the text enters a transformer: what is read there, and edits that act there."""
