"""What anagrams need of the host."""
