"""The parent's side of a run: its folder, its processes, its record. Loads neither torch nor mlflow."""
