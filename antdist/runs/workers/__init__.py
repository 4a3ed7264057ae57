"""What Ray Train workers do."""
