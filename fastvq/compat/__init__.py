"""Stand-ins for other libraries' modules, for code that imports them by name."""
