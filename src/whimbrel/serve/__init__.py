"""Where people and programs talk to a model: the terminal."""
