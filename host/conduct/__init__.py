"""What Concept Conductor needs of the host."""
