"""What a run's files say: summary, tables, plots. No torch."""
