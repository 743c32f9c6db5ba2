"""What erasing and its trainings need of the host."""
