"""What the papers say, in pure torch. Importing the host here is an error; a test holds it."""
