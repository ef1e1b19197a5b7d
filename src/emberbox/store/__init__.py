"""Tables, queries and migrations. Called by `control`."""
