"""Visual anagrams: one picture that reads differently in several views."""
