"""The method's benchmark: what is trained, how, and what is told of it. See scripts/bench-method."""
