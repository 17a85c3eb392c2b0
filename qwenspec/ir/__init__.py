"""The resolved program: what is true of a model, decided once."""
