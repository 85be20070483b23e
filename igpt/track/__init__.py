"""Where metrics, pictures and settings go: JSON lines always, and the trackers that `config.track` names."""
