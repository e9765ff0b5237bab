"""Two runs side by side, from files alone: whoever trained them, and with what."""
