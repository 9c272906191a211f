"""Priors made while a student trains: in its process, or on ranks of the teacher's own."""
