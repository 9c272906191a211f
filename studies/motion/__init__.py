"""Can a video model's priors be told from a student's own attention? A captioner that learns from scratch."""
