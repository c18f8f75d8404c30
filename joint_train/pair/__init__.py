"""The mathematics: joint forward, visibility, targets, losses. No files and no process groups."""
