"""A finished model laid over several ranks, from outside."""
