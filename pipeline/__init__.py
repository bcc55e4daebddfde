"""Persona data -> activation statistics -> scores -> masks -> switched model -> evaluation."""
