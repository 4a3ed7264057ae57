"""Files, storage and progress: what every room needs of the outside."""
