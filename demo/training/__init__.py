"""How the weights under ``demo/weights`` were made. Nobody needs this to run the pack."""
