"""What the pack knows of each family of networks: a file a family, facts only."""
