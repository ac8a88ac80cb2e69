"""Thin adapters to training frameworks, one file per framework."""
