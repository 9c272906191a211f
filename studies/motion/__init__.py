"""Do a video model's priors help more than a student's own attention? A study of captioners from scratch."""
