"""Persona data: the sets written for this project, loaders for the user's own, prompts, batches."""
