"""Tools for the rows before training: look at them, split them, find leaks, check the schema, impute reasoning."""
