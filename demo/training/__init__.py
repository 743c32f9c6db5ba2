"""How the weights under ``demo/weights`` were made. The pack runs without this."""
