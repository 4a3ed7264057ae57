"""Ray sessions, process groups and collectives."""
