"""The bundled demo model: its weights, its loader, its judge and score board, and (under ``training``) how it was made."""
