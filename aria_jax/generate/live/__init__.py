"""Playing with a model: a session, what it hears and reads, and the programs that run it."""
