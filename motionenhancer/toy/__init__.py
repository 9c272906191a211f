"""A small world of moving shapes with tiny real models: what every command runs on by default."""
