"""The journal of a run, its progress on the screen, and its replay into a tracker."""
