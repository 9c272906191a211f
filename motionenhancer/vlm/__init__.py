"""Students: one file a model family, attention capture, word mapping."""
