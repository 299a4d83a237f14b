"""Lying devices, and what they do to a run. See scripts/bench-liars."""
