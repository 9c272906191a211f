"""A small world of moving shapes with tiny real models, the default of every command."""
