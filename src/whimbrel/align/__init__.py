"""From a model that continues texts to one that answers: tuning, preferences, rewards, policy gradient, merging."""
