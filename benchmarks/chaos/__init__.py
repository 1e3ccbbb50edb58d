"""What becomes of replies while engines die, hang and return."""
