"""The only room that touches ComfyUI's internals. Differences between host versions are handled here only."""
