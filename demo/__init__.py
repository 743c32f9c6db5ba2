"""The bundled demo model: its weights, loader and judge, and (under ``training``) how it was made."""
