"""The error that belongs to the person at the keyboard."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input or environment: one sentence says what, where, which value, and what would work.

    Printed without a traceback; the command ends with exit code 2.
    """
