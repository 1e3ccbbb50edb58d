"""What becomes of more requests than the engines carry."""
