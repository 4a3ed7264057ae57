"""Readers of the forms in which users have their data; each gives one common form (`form.Source`)."""
