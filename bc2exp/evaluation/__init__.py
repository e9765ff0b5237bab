"""Judging a model: scores of single rows, and statistics over them."""
