"""The only room that touches ComfyUI's internals. One module a fact; every difference between host versions is met
here."""
