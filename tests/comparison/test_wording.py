"""The headline, the notes below it, and the format of numbers."""
