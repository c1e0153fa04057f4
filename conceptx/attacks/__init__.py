"""Searches for inputs that bring a concept back."""
