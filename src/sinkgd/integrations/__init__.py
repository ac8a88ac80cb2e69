"""Thin adapters to training frameworks, one file a framework."""
