"""Pure mathematics: torch and the standard library, no process group, no configuration, no engine."""
